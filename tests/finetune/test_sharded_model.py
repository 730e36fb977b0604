"""A model to be sharded is, tensor by tensor, the one that a process alone would have loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora.adapters.apply import applied_lora
from lora.adapters.fingerprint import base_fingerprint
from lora.adapters.save_load import save_adapter
from lora.config import DataConfig, LoRAConfig
from lora.data.sequences.batches import Batch
from lora.data.tokenizers.subword import TextTokenizer
from lora.decoder.quantised.fp8 import Fp8Linear
from lora.device import choose_device
from lora.errors import AdapterError
from lora.fast.sharded.base import ShardedBase
from lora.fast.step import FastStep
from lora.fast.why_not import why_not_hand_written, why_not_sharded
from lora.finetune.job import FinetuneJob
from lora.finetune.model import load_model
from lora.finetune.sharded_model import ShardedModel, build_sharded_model
from lora.kernels.step.ops import PLAIN
from lora.pretrained.sources import ModelSource
from lora.runs.progress import NoProgress
from tests.finetune.tiny_models import FAMILIES, save_tiny
from tests.integration.conftest import make_tokenizer

SPECIAL = ("<|tool|>", "<|think|>")


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return make_tokenizer()


class Messages(NoProgress):
    """Progress that keeps what is said of how the base is stored."""

    def __init__(self) -> None:
        super().__init__()
        self.of_base: list[str] = []

    def message(self, message: str) -> None:
        """Keep a line about the base."""
        if message.startswith("base in "):
            self.of_base.append(message)


def job_of(folder: Path, **changes: object) -> FinetuneJob:
    job = FinetuneJob(data=[], model=str(folder), lora=LoRAConfig(rank=3, dropout=0.1))
    return replace(job, **changes)


def build_both(job: FinetuneJob, tokenizer: TextTokenizer) -> tuple[ShardedModel, str]:
    """Check a model to be sharded against the one that is loaded; return it and its base's name."""
    source = ModelSource(Path(str(job.model)), "tiny", "tiny")
    if job.data_config.special_tokens:
        tokenizer = tokenizer.with_tokens(job.data_config.special_tokens)
    told, told_sharded = Messages(), Messages()
    arguments = job, source, choose_device("cpu"), tokenizer
    loaded, fingerprint = load_model(*arguments, told)
    drawn = torch.get_rng_state()
    sharded = build_sharded_model(*arguments, told_sharded)
    assert told_sharded.of_base == told.of_base
    assert len(told.of_base) == (job.base_dtype != "auto")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert sharded.fingerprint == fingerprint == base_fingerprint(sharded.model)
    assert sharded.model.config == loaded.config
    theirs = dict(loaded.named_parameters())
    ours = dict(sharded.model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        assert ours[name].requires_grad == wanted.requires_grad, name
        assert ours[name].shape == wanted.shape
        assert ours[name].dtype == wanted.dtype
        is_whole = wanted.requires_grad and not job.is_full
        assert ours[name].is_meta != is_whole, name
        read: Tensor = ours[name].detach() if is_whole else sharded.rows(name, slice(None))
        if wanted.element_size() > 1:
            assert torch.equal(read.to(wanted.dtype), wanted), name
            assert is_whole or torch.equal(sharded.rows(name, slice(5, 9)), read[5:9])
    return sharded, fingerprint


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_full", [False, True])
def test_every_family(family: str, is_full: bool, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    job = job_of(save_tiny(tmp_path, family))
    sharded, _ = build_both(replace(job, lora=None) if is_full else job, tokenizer)
    tables = sharded.model.get_input_embeddings().weight, sharded.model.output_head().weight
    assert (tables[0] is tables[1]) == sharded.model.config.tie_word_embeddings


@pytest.mark.parametrize("family", ["llama", "tied"])
def test_the_hand_written_step_trains_added_tokens_over_shards(
    family: str, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path, family, vocab_size=400, intermediate_size=24)
    lora = LoRAConfig(rank=3, modules_to_save=("norm",))
    job = job_of(folder, lora=lora, data_config=DataConfig(special_tokens=SPECIAL))
    added = tokenizer.with_tokens(SPECIAL)
    arguments = job, ModelSource(folder, "tiny", "tiny"), choose_device("cpu"), added, NoProgress()
    loaded, _ = load_model(*arguments)
    sharded = build_sharded_model(*arguments)
    assert why_not_hand_written(sharded.model) is None is why_not_sharded(sharded.model)
    base = ShardedBase(sharded.rows, torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 402, (2, 12), generator=draw)
    ids[:, ::3] = torch.tensor([400, 401, 5, 400])
    batch = Batch(ids, ids.roll(-1, 1), torch.arange(12).expand(2, -1), torch.zeros_like(ids))
    reports = []
    for model, of in ((loaded, None), (sharded.model, base)):
        step = FastStep(model, PLAIN, torch.float32, merges=False, base=of)  # type: ignore[arg-type]
        for number in (1, 2, 3):
            step.launch([batch], 1e-2, number)
            reports.append(step.report.tolist())
    assert reports[:3] == reports[3:]
    assert reports[2][0] < reports[0][0]


@pytest.mark.parametrize("family", ["llama", "tied"])
@pytest.mark.parametrize("vocab", [400, 405])
def test_added_tokens(family: str, vocab: int, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, family, vocab_size=vocab)  # 405: with rows to spare
    job = job_of(folder, data_config=DataConfig(special_tokens=SPECIAL))
    build_both(job, tokenizer)
    build_both(replace(job, lora=None), tokenizer)


def test_fully_trained_modules_are_whole(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    saved = LoRAConfig(modules_to_save=("embed_tokens", "norm"))
    sharded, _ = build_both(job_of(save_tiny(tmp_path, "tied"), lora=saved), tokenizer)
    assert sharded.model.lm_head.weight.is_meta
    assert applied_lora(sharded.model).originals["model.norm"].weight.is_meta


def test_fp8_linears_have_no_values(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    lora = LoRAConfig(targets=("q_proj",))
    job = job_of(save_tiny(tmp_path, "llama"), base_dtype="fp8", lora=lora)
    sharded, _ = build_both(job, tokenizer)
    layer = sharded.model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, Fp8Linear)
    assert layer.weight_scale.is_meta


@pytest.mark.parametrize("special", [(), SPECIAL])
def test_an_adapter_that_is_trained_on(
    special: tuple[str, ...], tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    data = DataConfig(special_tokens=special)
    saved = LoRAConfig(modules_to_save=() if special else ("lm_head",))
    first = job_of(save_tiny(tmp_path / "base", "llama", vocab_size=400), lora=saved)
    first = replace(first, data_config=data)
    source = ModelSource(tmp_path / "base", "tiny", "tiny")
    own = tokenizer.with_tokens(special) if special else tokenizer
    model, _ = load_model(first, source, choose_device("cpu"), own, NoProgress())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.rand_like(parameter) * parameter.requires_grad
    save_adapter(model, tmp_path / "adapter")
    build_both(replace(first, lora=None, from_adapter=tmp_path / "adapter"), tokenizer)
    save_tiny(tmp_path / "other", "tied", vocab_size=400)
    other = replace(first, model=str(tmp_path / "other"), from_adapter=tmp_path / "adapter")
    with pytest.raises(AdapterError, match="fingerprint"):
        build_both(replace(other, lora=None), tokenizer)
