"""Plans over a base in nf4: exact bytes of codes and scales, the room to unpack, and the advice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora.cli import main
from lora.config import BaseWeights, LoRAConfig
from lora.fast.memory.plan import MemoryPlan, PlanInputs
from lora.fast.memory.planner import MemoryPlanner
from tests.tiny_llama import llama_config

WIDE = llama_config(
    vocab_size=300, hidden_size=1024, heads=(8, 4, 128), feed_forward=2048, n_layers=6
)
"""Wide enough for a fast step that does not merge LoRA's matrices into copies of the weights."""
LORA = LoRAConfig(rank=4)
SETTING = PlanInputs(WIDE, LORA, 2, 64, "cpu", torch.float32)
ON_GPU = replace(SETTING, device_type="cuda", compute_dtype=torch.bfloat16)
QKV, OUT, GATE_UP, DOWN = 2048 * 1024, 1024 * 1024, 4096 * 1024, 1024 * 2048
N_BLOCKS = len(WIDE.layers)
VALUES = N_BLOCKS * (QKV + OUT + GATE_UP + DOWN)


def plan(setting: PlanInputs) -> MemoryPlan:
    return MemoryPlanner(setting, base_bytes=0).plan()


def packed_bytes(block: int, *, double: bool) -> int:
    """Of all linears: codes, scales, scales of groups of 256, and an offset of each linear."""
    sizes = N_BLOCKS * [QKV // 2, QKV // 4, QKV // 4, OUT, GATE_UP // 2, GATE_UP // 2, DOWN]
    total = 0
    for size in sizes:
        n_scales = size // block
        total += size // 2 + 4
        total += n_scales + 4 * -(-n_scales // 256) if double else 4 * n_scales
    return total


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize(("block", "double"), [(64, True), (128, False)])
def test_weights_are_the_bytes_of_codes_and_scales(on_gpu: bool, block: int, double: bool) -> None:
    setting = ON_GPU if on_gpu else SETTING
    plain = plan(setting)
    base = BaseWeights("nf4", nf4_block=block, nf4_double_quant=double)
    packed = plan(replace(setting, base=base))
    less = VALUES * setting.compute_dtype.itemsize - packed_bytes(block, double=double)
    # The fast step has a copy of LoRA's matrices beside bf16 weights.
    beside = 0.05 * less if on_gpu else 0
    assert less <= plain.weights - packed.weights <= less + beside
    assert packed.parameters == plain.parameters
    assert packed.trained_parameters == plain.trained_parameters


def test_the_fast_step_plans_room_for_the_largest_weights_and_for_down() -> None:
    base = BaseWeights("nf4")
    plain, packed = plan(ON_GPU), plan(replace(ON_GPU, base=base))
    assert (plain.step, packed.step) == ("fast", "fast")
    room = 2 * (GATE_UP + DOWN)
    added = packed.activations - plain.activations
    assert room <= added < 1.1 * room  # and LoRA's matrices beside them


def test_on_a_gpu_the_plain_step_unpacks_without_scratch() -> None:
    on_cpu = replace(SETTING, base=BaseWeights("nf4"), compute_dtype=torch.bfloat16)
    planned = [plan(replace(on_cpu, device_type=kind, fast=False)) for kind in ("cpu", "cuda")]
    assert planned[1].activations < planned[0].activations


@pytest.mark.parametrize("setting", [SETTING, ON_GPU, replace(ON_GPU, fast=False)])
def test_the_saving_that_is_said_is_nearly_that_of_a_plan(setting: PlanInputs) -> None:
    planner = MemoryPlanner(setting, base_bytes=0)
    plain, over = planner.plan(), planner.over_nf4()
    assert over is not None
    packed = over.plan()
    # On a CPU weights are unpacked in fp32, with a copy of the codes.
    assert plain.nf4_saving == pytest.approx(plain.total - packed.total, rel=0.25)
    assert packed.nf4_saving == 0
    assert over.over_nf4() is None


def test_nf4_is_no_choice_for_full_fine_tuning_or_whole_linears() -> None:
    full = MemoryPlanner(replace(SETTING, lora=None), base_bytes=0)
    assert full.over_nf4() is None
    assert full.plan().nf4_saving == 0


def test_nf4_is_not_advised_where_it_would_be_refused() -> None:
    whole = LoRAConfig(rank=4, targets=("q_proj",), modules_to_save=("down_proj",))
    odd = llama_config(
        vocab_size=300, hidden_size=1024, heads=(8, 4, 128), feed_forward=2047, n_layers=2
    )
    some = frozenset({"model.layers.0.self_attn.q_proj.weight"})
    packed = replace(SETTING, base=BaseWeights("nf4"), quantised_weights=some)
    for setting in (replace(SETTING, lora=whole), replace(SETTING, config=odd), packed):
        planner = MemoryPlanner(setting, base_bytes=0)
        assert planner.over_nf4() is None
        assert planner.plan().nf4_saving == 0


def test_the_command_says_what_nf4_would_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256,
        "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 300, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    sizes = ["--batch-size", "2", "--max-length", "64", "--device", "cuda"]
    words = ["plan", "--model", str(tmp_path), *sizes, "--memory-gb", "0.001"]
    assert main([*words, "--json"]) == 0
    total = json.loads(capsys.readouterr().out)["over_nf4"]["lora"]
    assert main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    planned = f"with --base-dtype nf4 it would take {total / 1e9:.2f} GB"
    assert f"{planned}, with activation checkpointing full+offload, which does not fit" in said
    assert main([*words, "--base-dtype", "nf4"]) == 0
    assert "with --base-dtype nf4" not in capsys.readouterr().out
