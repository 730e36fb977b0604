"""Steps of a model sharded with FSDP2 equal those of one process, and its memory is divided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lora.adapters.apply import train_token_rows
from lora.config import BaseWeights, LoRAConfig, TrainConfig
from lora.data.sequences.batches import ordered_batches
from lora.decoder.decoder import Decoder
from lora.decoder.quantised.base import quantised_modules
from lora.device import Share
from lora.distributed.shards import (
    ShardReader,
    local_part,
    on_main_with,
    scatter_rows,
    shard_of,
)
from lora.distributed.world import ALONE, World
from lora.errors import CheckpointError, ModelError
from lora.fast.choose import choose_steps
from lora.finetune.job import FinetuneJob
from lora.finetune.model import load_model
from lora.finetune.sharded_model import build_sharded_model, drop_values
from lora.pretrained.sources import ModelSource
from lora.runs.progress import NoProgress
from lora.runs.tensor_files import write_tensors
from lora.training.losses import loss_for
from lora.training.plain_step import PlainStepRunner
from lora.training.sharded_step import ShardedStepRunner
from tests.distributed.models import (
    VOCABULARY,
    Steps,
    cpu_choice,
    random_sequences,
    take_steps,
    train_config,
    with_lora,
    worst_difference,
)
from tests.distributed.processes import run_processes
from tests.finetune.tiny_models import build_tiny, save_tiny
from tests.pretrained.quantised.four_bit import write_4bit

# Its processes are started once, in one of the workers that share the tests.
pytestmark = pytest.mark.xdist_group("fsdp")

FP32_STEPS = 20


@dataclass(frozen=True)
class Case:
    """What trains, and on which batches."""

    family: str
    prepare: Callable[[Decoder], Decoder]
    config: TrainConfig = field(default_factory=lambda: train_config(8))
    recompute: bool = False

    def model(self, dtype: torch.dtype) -> Decoder:
        """Return the model as one process has it."""
        model = build_tiny(self.family, vocab_size=VOCABULARY).to(dtype)
        model.tie_head()
        return self.prepare(model)


def _full(model: Decoder) -> Decoder:
    return model.requires_grad_(True)


def _modules(model: Decoder) -> Decoder:
    return with_lora(model, modules_to_save=("embed_tokens", "norm"))


def _token_rows(model: Decoder) -> Decoder:
    train_token_rows(with_lora(model), [3, 5, 90])
    return model


CASES = {
    "llama": Case("llama", with_lora),
    "tied": Case("tied", with_lora, train_config(16, 2)),
    "gemma3": Case("gemma3", with_lora),
    "gpt2": Case("gpt2", with_lora),
    "a frozen block": Case("llama", partial(with_lora, layers=(1,))),
    "a frozen last block": Case("tied", partial(with_lora, layers=(0,)), recompute=True),
    "modules to save": Case("tied", _modules),
    "embedding rows": Case("llama", _token_rows),
    "a rank without a sequence": Case("llama", with_lora, train_config(2)),
    "dropout": Case("tied", partial(with_lora, dropout=0.3), train_config(16, 2)),
    "dropout, recomputed": Case("llama", partial(with_lora, dropout=0.3), recompute=True),
    "all weights, recomputed": Case("gemma3", _full, recompute=True),
    "all weights": Case("llama", _full, train_config(16, 2)),
    "all weights, tied": Case("tied", _full),
    "all weights, gpt2": Case("gpt2", _full),
    "all weights, a rank without a sequence": Case("qwen3", _full, train_config(2)),
}
BASES = {
    "fp8": BaseWeights("fp8"),
    "int8": BaseWeights("int8"),
    # Of rows of 16 and 20 values: most shards begin inside a block, and last blocks are shorter.
    "nf4": BaseWeights("nf4"),
    "nf4, plain scales": BaseWeights("nf4", nf4_block=32, nf4_double_quant=False),
    "in 4 bits already": BaseWeights(),
}
IN_4_BITS = "in-4-bits"
"""The folder beside the plain one."""
LONG = ("tied", "all weights, tied")


def run_case(world: World, name: str, dtype: torch.dtype, n_steps: int) -> Steps:
    """Return what steps of a case come to on this process, and the loss after them."""
    case = CASES[name]
    torch.manual_seed(11)
    model = case.model(dtype)
    if world.is_alone:
        runner: Any = PlainStepRunner(
            model, loss_for(model), cpu_choice(torch.float32), case.config
        )
    else:
        runner = shard(model, case.config, world, recompute=case.recompute)
    sequences = random_sequences(packing=True)
    done = take_steps(runner, sequences, case.config, n_steps, world)
    size = world.share.largest(3)
    (done.eval_loss,) = runner.evaluate(ordered_batches(sequences, size, share=world.share))
    trained = ((n, p.detach()) for n, p in model.named_parameters() if p.requires_grad)
    done.trained = {n: whole(p).clone().numpy() for n, p in trained}
    return done


def shard(
    model: Decoder,
    config: TrainConfig,
    world: World,
    *,
    rows: Any = None,
    recompute: bool = False,
) -> Any:
    """Changes a whole `model` in place: it is sharded; return the runner of its steps."""
    values = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    trains_all = all(p.requires_grad for p in model.parameters())
    drop_values(model, keep_trained=not trains_all)

    def own(name: str, part: slice) -> Tensor:
        assert part == shard_of(len(values[name]), world.share)  # no process reads more
        return values[name][part].clone()

    read = rows or own
    if not recompute:
        return choose_steps(model, cpu_choice(torch.float32), config, world=world, rows=read)
    from lora.distributed.fsdp import shard_decoder

    choice = cpu_choice(torch.float32)
    shard_decoder(model, read, world, choice, recompute=True)
    runner = ShardedStepRunner if trains_all else PlainStepRunner
    return runner(model, loss_for(model), choice, config, world)


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor's values in every process."""
    return (
        local_part(tensor.redistribute(placements=[_replicate()])) if is_split(tensor) else tensor
    )


def is_split(tensor: Tensor) -> bool:
    return local_part(tensor) is not tensor


def _replicate() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()


def run_all(world: World) -> dict[str, Steps]:
    """Return all cases: one step in fp64, and for some many in fp32."""
    done = {name: run_case(world, name, torch.float64, 1) for name in CASES}
    return done | {f"{n}, long": run_case(world, n, torch.float32, FP32_STEPS) for n in LONG}


@dataclass
class Quantised:
    """Steps over a quantised base beside those of a process alone."""

    difference: float
    n_bytes: tuple[int, int]
    """Of the codes here, and of all of them."""
    differing: list[str]
    """Names of codes and scales that are not those of a process alone, to the bit."""


@dataclass
class Seen:
    """What one of several processes saw."""

    steps: dict[str, Steps]
    quantised: dict[str, Quantised]
    """By what they are stored as."""
    said: list[str]
    """Errors."""
    notes: list[str]
    """On weights that are not finite."""


def run_together(world: World, folder: Path) -> Seen:
    """Return everything that the tests look at: starting processes takes seconds."""
    steps = run_all(world)
    quantised = {name: run_quantised(world, folder, base) for name, base in BASES.items()}
    return Seen(steps, quantised, run_faults(world, folder), run_damaged(world))


def run_quantised(world: World, folder: Path, base: BaseWeights) -> Quantised:
    """Return how a step on a quantised base, and this base, differ from one process's."""
    folder = folder if base.is_quantised else folder.with_name(IN_4_BITS)
    job = FinetuneJob(
        data=[],
        model=str(folder),
        lora=LoRAConfig(rank=2, targets=("q_proj", "down_proj"), dropout=0.0),
        **vars(base),
    )
    source, choice = ModelSource(folder, "tiny", "tiny"), cpu_choice(torch.float32)
    arguments: Any = job, source, choice, None, NoProgress()
    config, sequences, done = train_config(8), random_sequences(packing=True), []
    alone, _ = load_model(*arguments)
    built = build_sharded_model(*arguments)
    runner: Any = choose_steps(built.model, choice, config, world=world, rows=built.rows)
    plain = PlainStepRunner(alone, loss_for(alone), choice, config)
    for model, steps, own in ((alone, plain, ALONE), (built.model, runner, world)):
        done.append(take_steps(steps, sequences, config, 3, own))
        named = model.named_parameters()
        done[-1].trained = {n: p.detach().numpy() for n, p in named if p.requires_grad}
    modules, others = quantised_modules(built.model), quantised_modules(alone)
    differing = []
    for name, module in modules.items():
        own = shard_of(module.out_features, world.share)
        pairs = [(local_part(module.weight), others[name].weight[own])]
        pairs += [(module.get_buffer(n), others[name].get_buffer(n)) for n in module.packed_names]
        differing += [name for one, other in pairs if not torch.equal(bits(one), bits(other))]
    codes = [module.weight for module in modules.values()]
    n_bytes = sum(local_part(p).numel() for p in codes), sum(p.numel() for p in codes)
    return Quantised(worst_difference(done[1], done[0]), n_bytes, differing)


def bits(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes, with its shape and dtype checked on the way."""
    shape = torch.tensor([*tensor.shape, tensor.element_size()], dtype=torch.uint8)
    return torch.cat([shape, tensor.detach().reshape(-1).view(torch.uint8)])


def run_faults(world: World, folder: Path) -> list[str]:
    """Return what is raised here if one process cannot read, write or restore."""
    said = []

    def unreadable(name: str, part: slice) -> Tensor:
        if world.rank == 1:
            raise ModelError("Cannot read a file of rank 1.")
        return torch.zeros(part.stop - part.start, *shapes[name][1:])

    model = CASES["all weights"].model(torch.float32)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    with pytest.raises(ModelError) as refused:
        shard(model, train_config(8), world, rows=unreadable)
    said.append(str(refused.value))

    own = torch.arange(10.0)[shard_of(10, world.share), None].repeat(1, 3)
    reader = ShardReader({"a": own, "b": own + 100}, {"a": 10, "b": 10}, world)

    def stop_midway() -> None:
        next(reader.read("b"))  # the disk is full after the first part
        raise CheckpointError("Cannot write.")

    with pytest.raises(CheckpointError) as full:
        reader.on_main(stop_midway, "a save")
    said.append(str(full.value))

    path = folder / "read.safetensors"
    tensors = {"b": reader.whole("b"), "a": reader.whole("a"), "n": torch.ones(2)}

    def save_elsewhere() -> None:
        next(reader.read("b"))  # where the disk was full
        write_tensors(path, tensors)

    on_main_with(tensors.values(), world, save_elsewhere, "a save")
    if world.is_main:
        saved = load_file(path)
        assert torch.equal(saved["a"], torch.arange(10.0)[:, None].repeat(1, 3))
        assert torch.equal(saved["b"], saved["a"] + 100)
    restored = torch.zeros_like(own)
    given = torch.arange(10.0)[:, None].repeat(1, 3) if world.is_main else None
    scatter_rows(given, restored, 10, world, "a restore")
    assert torch.equal(restored, own)
    return said


def run_damaged(world: World) -> list[str]:
    """Return the notes on steps whose weights are not finite on one rank, frozen and trained."""
    notes = []
    for name in ("llama", "all weights"):
        case = CASES[name]
        model = case.model(torch.float32)
        with torch.no_grad():
            model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 3] = torch.nan
        runner = shard(model, case.config, world)
        assert isinstance(runner, PlainStepRunner if name == "llama" else ShardedStepRunner)
        done = take_steps(runner, random_sequences(packing=True), case.config, 1, world)
        notes += done.notes
    return notes


@pytest.fixture(scope="module")
def alone() -> dict[str, Steps]:
    return run_all(ALONE)


# Three share rows unevenly; of two there are whole runs in tests/integration/test_sharded_runs.py.
@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 3])
def together(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[Seen]:
    folder = save_tiny(tmp_path_factory.mktemp("models") / "plain", "llama", vocab_size=VOCABULARY)
    in_4_bits = folder.with_name(IN_4_BITS)
    write_4bit(folder, in_4_bits, skipped=lambda name: "layers.1.mlp.up_proj" in name)
    return run_processes(request.param, run_together, folder)


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_one_process(
    name: str, alone: dict[str, Steps], together: list[Seen]
) -> None:
    for done in (seen.steps[name] for seen in together):
        assert done.n_tokens == alone[name].n_tokens
        assert worst_difference(done, alone[name]) < 1e-12
        assert done.eval_loss == pytest.approx(alone[name].eval_loss, rel=1e-12)


@pytest.mark.parametrize("name", LONG)
def test_twenty_steps_in_fp32_are_those_of_one_process(
    name: str, alone: dict[str, Steps], together: list[Seen]
) -> None:
    for seen in together:
        assert worst_difference(seen.steps[f"{name}, long"], alone[f"{name}, long"]) < 1e-6


def test_all_processes_have_the_same_bits(together: list[Seen]) -> None:
    for seen in together[1:]:
        for name, done in seen.steps.items():
            first = together[0].steps[name]
            assert (done.losses, done.eval_loss) == (first.losses, first.eval_loss)
            for key, values in done.trained.items():
                assert np.array_equal(values, first.trained[key]), (name, key)


@pytest.mark.parametrize("name", BASES)
def test_a_quantised_base_has_the_bits_of_one_process_and_takes_a_share_of_the_memory(
    name: str, together: list[Seen]
) -> None:
    found = [seen.quantised[name] for seen in together]
    for one in found:
        assert one.difference < 1e-6
        assert one.differing == []
    n_here, n_whole = zip(*(one.n_bytes for one in found), strict=True)
    assert sum(n_here) == n_whole[0]
    assert max(n_here) <= n_whole[0] / len(together) * 1.2  # 16 rows are 6, 6 and 4


def test_an_error_of_one_process_is_that_of_all(together: list[Seen]) -> None:
    for seen in together:
        assert seen.said == ["Cannot read a file of rank 1.", "Cannot write."]


def test_weights_that_are_not_finite_are_named(together: list[Seen]) -> None:
    for seen in together:
        assert len(seen.notes) == 2
        for note in seen.notes:
            assert "The weights themselves are not finite: model.layers.1.mlp.up_proj" in note


def test_shards_cover_the_rows_once() -> None:
    for count in (1, 5, 10, 16):
        for size in (1, 2, 3, 4):
            parts = [shard_of(count, Share(rank, size)) for rank in range(size)]
            assert [n for part in parts for n in range(count)[part]] == list(range(count))
            sizes = [len(chunk) for chunk in torch.arange(count).chunk(size)]
            assert [part.stop - part.start for part in parts if part.stop > part.start] == sizes
