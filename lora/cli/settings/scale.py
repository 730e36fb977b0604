"""`lora scale`: a file that starts a run of `lora finetune` on several machines."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from lora import __version__
from lora.cli.finetune import FromAdapter, Full
from lora.cli.flags.from_fields import DATA, DEVICE, OUTPUT, Flat, changed_by
from lora.cli.flags.shared import (
    Deterministic,
    Implementation,
    Model,
    Overwrite,
    Report,
    Resume,
    ValidationData,
)
from lora.cli.settings.init import (
    InitBase,
    InitData,
    InitLoRA,
    InitMemory,
    InitRun,
    InitTrain,
    check_method,
    given_settings,
)
from lora.config import BaseWeights, DataConfig, LoRAConfig, MemoryConfig, RunConfig, TrainConfig
from lora.errors import ConfigError
from lora.pretrained.sources import DEFAULT_INSTALL
from lora.runs.directory import check_run_name
from lora.runs.outputs import OutputPath, input_paths
from lora.scale.run import ScaledRun
from lora.scale.skypilot import INPUTS, Package, missing_inputs, skypilot_file
from lora.scale.slurm import slurm_file
from lora.scale.torchrun import torchrun_file
from lora.settings.install import installed_from
from lora.terminal import print_line, print_note

Scheduler = Literal["torchrun", "slurm", "skypilot"]
ENDINGS = {"torchrun": "torchrun.sh", "slurm": "slurm.sh", "skypilot": "sky.yaml"}

Data = Annotated[Path | None, Parameter(group=DATA, help="Training examples, as in lora finetune.")]
RecordedRun = Annotated[
    Path | None,
    Parameter(
        group=DATA,
        help="Run directory (runs/NAME) with the settings to use; flags and a file override them.",
    ),
]
Nodes = Annotated[int, Parameter(group=DEVICE, help="Machines.")]
DevicesOfNode = Annotated[
    int, Parameter(group=DEVICE, help="Devices of each machine: GPUs, or processes on a CPU.")
]
Gpu = Annotated[
    str | None,
    Parameter(
        group=DEVICE,
        help="Type of GPU as the scheduler calls it, such as H100. SkyPilot needs it; in Slurm the "
        "default is any.",
    ),
]
Restarts = Annotated[
    int,
    Parameter(group=DEVICE, help="Times to start again from the newest checkpoint after an error."),
]
To = Annotated[Scheduler, Parameter(group=OUTPUT, help="What is to start the run.")]
File = Annotated[
    Path | None,
    Parameter(
        group=OUTPUT, help="File to write. Default: NAME.torchrun.sh, NAME.slurm.sh, NAME.sky.yaml."
    ),
]


def scale(
    data: Data = None,
    *,
    to: To,
    devices: DevicesOfNode,
    nodes: Nodes = 1,
    gpu: Gpu = None,
    max_restarts: Restarts = 3,
    file: File = None,
    overwrite: Overwrite = False,
    run: RecordedRun = None,
    model: Model = None,
    implementation: Implementation = "auto",
    eval_data: ValidationData = None,
    full: Full = False,
    from_adapter: FromAdapter = None,
    resume: Resume = False,
    deterministic: Deterministic = False,
    report: Report = True,
    lora: Annotated[InitLoRA | None, Flat] = None,
    train: Annotated[InitTrain | None, Flat] = None,
    data_config: Annotated[InitData | None, Flat] = None,
    run_config: Annotated[InitRun | None, Flat] = None,
    memory: Annotated[InitMemory | None, Flat] = None,
    base: Annotated[InitBase | None, Flat] = None,
) -> int:
    """Write a file that starts a run of lora finetune on several machines.

    For example:

        lora scale run.yaml --name orders --nodes 2 --devices 8 --to slurm
        lora scale run.yaml --name orders --devices 8 --to skypilot --gpu H100
        lora scale --run runs/orders --name orders-8 --devices 8 --to torchrun

    The settings are those of lora finetune: flags, a settings file, or the
    record of a run. The file holds them all, so it can be copied and changed. The
    run needs a name: started again, it finds its checkpoints by it. On one machine
    lora finetune --devices 8 needs no file.
    """
    given = given_settings(
        *(lora, train, data_config, run_config, memory, base),
        **{"data": data, "model": model, "eval_data": eval_data, "from_adapter": from_adapter},
        **{"full": full or None, "deterministic": deterministic or None},
        **{"resume": resume or None},
        **{"report": None if report else False},
        **{"implementation": None if implementation == "auto" else implementation},
    )
    from lora.fast.memory.parallel import check_parallel

    _check(given, to, gpu)
    _check_job(given, (lora, train, data_config, run_config, memory, base))
    scaled = ScaledRun(
        settings=given,
        out=Path(given.get("out", RunConfig.out)),
        nodes=nodes,
        devices=devices,
        max_restarts=max_restarts,
        gpu=gpu,
        directory=Path.cwd(),
        made_by=f"Written by lora scale --to {to}, lora-lm {__version__}.",
    )
    check_parallel(given.get("parallel", "auto"), nodes * devices)
    path = file or Path(f"{scaled.job_name}.{ENDINGS[to]}")
    output = OutputPath(path, inputs=input_paths(*map(given.get, INPUTS)), overwrite=overwrite)
    with output.building() as part:
        part.write_text(_text(scaled, to, path.name), encoding="utf-8")
    _tell(scaled, to, path)
    return 0


def _check(given: dict[str, Any], to: Scheduler, gpu: str | None) -> None:
    check_method(given)
    name = given.get("name")
    if name is None:
        raise ConfigError(
            "Cannot write a start file for a run without a name: started again, it finds its "
            "checkpoints by it. Give --name."
        )
    check_run_name(name)
    if "data" not in given and "resume" not in given:
        raise ConfigError("Cannot write a start file without training data. Give --data or --run.")
    if to == "skypilot" and given.get("device") == "cpu":
        raise ConfigError(
            "Cannot use --device cpu with --to skypilot, whose tasks ask for GPUs. Leave it out. "
            "Allowed: with torchrun and slurm."
        )
    if to == "skypilot" and gpu is None:
        raise ConfigError(
            "Cannot write a SkyPilot file without a type of GPU. Give --gpu, such as --gpu H100."
        )
    if to == "torchrun" and gpu is not None:
        raise ConfigError(
            f"Cannot use --gpu {gpu} with --to torchrun, which takes the GPUs of the machines that "
            "it is run on. Leave it out. Allowed: with slurm and skypilot."
        )
    if to == "skypilot" and "resume" in given:
        raise ConfigError(
            "Cannot use --resume with --to skypilot: the run directory is not on those machines. "
            "Copy it to the volume or bucket that holds --out there, and leave --resume out: the "
            "file continues a run that it finds."
        )


def _check_job(given: dict[str, Any], flags: Sequence[object | None]) -> None:
    """Raise ConfigError for what `lora finetune` would refuse before it reads anything."""
    from lora.finetune.job import FinetuneJob, check_base_dtype
    from lora.finetune.unused import check_unused

    lora, train, data_config, run, memory, base = flags
    job = FinetuneJob(
        data=given.get("data", ""),
        model=given.get("model"),
        eval_data=given.get("eval_data"),
        lora=None if "full" in given else changed_by(LoRAConfig(), lora),
        train=changed_by(TrainConfig(), train),
        data_config=changed_by(DataConfig(), data_config),
        run=changed_by(RunConfig(), run),
        memory=changed_by(MemoryConfig(), memory),
        from_adapter=given.get("from_adapter"),
        resume="resume" in given,
        **vars(changed_by(BaseWeights(), base)),
        implementation=given.get("implementation", "auto"),
        deterministic="deterministic" in given,
    )
    check_base_dtype(job)
    check_unused(job)


def _text(scaled: ScaledRun, to: Scheduler, name: str) -> str:
    if to == "torchrun":
        return torchrun_file(scaled, name)
    if to == "slurm":
        return slurm_file(scaled, name)
    return skypilot_file(scaled, name, Package(installed_from(), DEFAULT_INSTALL))


def _tell(scaled: ScaledRun, to: Scheduler, path: Path) -> None:
    if to == "skypilot":
        for text in missing_inputs(scaled):
            print_note(f"note: {text} is not on this machine: it must be there on the others")
    elif scaled.record.exists() and "resume" not in scaled.settings:
        print_note(f"note: {scaled.record.parent} exists: the file continues this run")
    quoted = shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))
    start = {
        "torchrun": f"bash {quoted}" if scaled.nodes == 1 else f"HEAD=node1 bash {quoted}",
        "slurm": f"sbatch {quoted}",
        "skypilot": f"sky launch -c {scaled.job_name} {quoted}",
    }
    where = " on every machine" if to == "torchrun" and scaled.nodes > 1 else ""
    print_line(f"wrote {path}. Start{where} with: {start[to]}")
