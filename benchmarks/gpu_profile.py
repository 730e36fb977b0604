"""Profile of one of our training steps on a GPU: its kernels by time.

python benchmarks/gpu_profile.py --case 1B-4x2048 --variant ours_lora
python benchmarks/gpu_profile.py --case 8B-4x2048 --variant ours_lora_cheap --json
"""

from __future__ import annotations

import argparse
import json
import sys

import torch
from one_gpu.cases import CASES, OURS
from one_gpu.models import build_stream
from one_gpu.ours import build_adapted, build_steps, fit_mode

from lora.config import TrainConfig
from lora.device import choose_device
from lora.fast.runner import DeviceStepRunner

WARM_UP_STEPS = 4


def main() -> int:
    """Profile one step after the warm-up and print its kernels."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=CASES, default="135M-4x512")
    variants = [variant for variant in OURS if "ours" in variant and "plain" not in variant]
    parser.add_argument("--variant", choices=variants, default="ours_lora")
    parser.add_argument("--kernels", type=int, default=25, help="rows of the table")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each kernel")
    arguments = parser.parse_args()
    shape, choice = CASES[arguments.case], choose_device("cuda")
    model = build_adapted(shape, arguments.variant, choice.compute_dtype)
    fit = None if arguments.variant == "ours_full" else fit_mode(shape, arguments.variant)
    config = TrainConfig(steps=200, batch_size=shape.rows, seed=0)
    steps = build_steps(model, choice, arguments.variant, fit, config)
    assert isinstance(steps, DeviceStepRunner)
    print(steps.describe(), file=sys.stderr)
    stream = build_stream(shape, "cpu", packed=arguments.variant.endswith("packed"))
    for number in range(1, WARM_UP_STEPS + 1):
        steps.launch(number, [next(stream)], [1e-4])
    steps.finished(wait=True)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        steps.launch(WARM_UP_STEPS + 1, [next(stream)], [1e-4])
        steps.finished(wait=True)
    by_time = profile.key_averages()
    if arguments.json:
        of_all = {"case": arguments.case, "variant": arguments.variant}
        of_all["hardware"] = f"one {torch.cuda.get_device_name()}"
        for one in sorted(by_time, key=lambda one: -one.device_time_total)[: arguments.kernels]:
            ms = round(one.device_time_total / 1000, 3)
            print(json.dumps({**of_all, "kernel": one.key, "ms": ms, "launches": one.count}))
        return 0
    table = by_time.table(
        sort_by="cuda_time_total", row_limit=arguments.kernels, max_name_column_width=70
    )
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
