"""PEFT's member of a comparison: LoRA by PEFT on transformers' model, as its users train it.

Same base, rank, alpha, targets, batches, schedule and AdamW as the other members. A's first values
are PEFT's own draws. The loop is lora's plain one: forward, backward, clip, AdamW, and one wait for
the device a step; the loss is transformers' own, over the sum of a step's learned tokens.
"""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora.compare.target import TrainingOutcome
from lora.config import DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.data.prepare import PreparedData
from lora.data.sequences.batches import IGNORE, Batch, BatchStream, ordered_batches
from lora.device import DeviceChoice, choose_device
from lora.errors import ConfigError, DependencyError
from lora.finetune.job import FinetuneJob
from lora.finetune.run import check_data
from lora.pretrained.sources import find_model
from lora.runs.directory import Run, create_run
from lora.runs.progress import Progress
from lora.training.trainer import TrainingJob, train

if TYPE_CHECKING:
    from lora.compare.decoder_target import DecoderTarget

PACKAGES = ("peft", "transformers")


def check_peft(lora: LoRAConfig, data_config: DataConfig) -> None:
    """Raise DependencyError if PEFT is not installed, ConfigError for what it is not given here."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyError(
            f"A comparison with PEFT was asked for: {' and '.join(missing)} not installed. "
            "Run: pip install 'lora-lm[bench]' — or leave --peft out."
        )
    if data_config.special_tokens:
        raise ConfigError(
            "A comparison with PEFT was asked for with special_tokens: rows of added tokens train "
            "in lora's members only. Leave out one or the other."
        )


def train_peft(
    target: DecoderTarget, train_config: TrainConfig, run: RunConfig, resume: bool,
    progress: Progress,
) -> TrainingOutcome:  # fmt: skip
    """Train PEFT's adapter in the folder `run.out`/`run.name`."""
    choice = choose_device(run.device, train_config.precision)
    source = find_model(target.model)
    job = FinetuneJob(
        data=target.data,
        model=target.model,
        eval_data=target.eval_data,
        lora=target.lora,
        train=train_config,
        data_config=target.data_config,
        run=run,
        resume=resume,
    )
    data, _ = check_data(job, source.folder, progress)
    model = build_peft(source.folder, target.lora, train_config.seed, choice)
    assert train_config.learning_rate is not None
    assert run.name is not None
    described = _describe(target, train_config, data, choice, source.name)
    with create_run(run.out, run.name, resume=resume, described=described) as opened:
        result = train(
            _training_job(model, data, train_config, run, opened, choice, resume, progress)
        )
        opened.write_json("result.json", asdict(result))
        saved = opened.folder / "adapter"
        shutil.rmtree(saved, ignore_errors=True)
        model.save_pretrained(saved)
        data.tokenizer.save(saved)
    return TrainingOutcome(
        folder=opened.folder,
        saved=saved,
        steps=result.steps,
        train_s=result.train_s,
        peak_memory_bytes=result.peak_memory_bytes,
        planned_memory_bytes=None,
        eval_loss=result.eval_loss,
        best_eval_loss=result.best_eval_loss,
    )


def build_peft(folder: Path, lora: LoRAConfig, seed: int, choice: DeviceChoice) -> Any:
    """Return transformers' model in `folder` with PEFT's LoRA on it, on the device."""
    import peft
    import transformers

    transformers.utils.logging.disable_progress_bar()
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=choice.compute_dtype
    )
    base.to(choice.device)
    base.config.use_cache = False
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    described: dict[str, Any] = {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": targets,
        "exclude_modules": list(lora.exclude) or None,
        "modules_to_save": list(lora.modules_to_save) or None,
        "use_rslora": lora.rslora,
        "rank_pattern": dict(lora.rank_pattern),
        "alpha_pattern": dict(lora.alpha_pattern),
        "layers_to_transform": None if lora.layers is None else list(lora.layers),
        "task_type": "CAUSAL_LM",
    }
    torch.manual_seed(seed)
    return peft.get_peft_model(base, peft.LoraConfig(**described))


def peft_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the loss sum in nats and the learned tokens, (1,) each: rows of one document each."""
    return _loss(model, batch, (batch.document_ids >= 0).long())  # (B, T)


def packed_peft_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The same of packed rows: a mask (B, 1, T, T) keeps documents apart."""
    ids = batch.document_ids
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
    same = ids[:, None, :, None] == ids[:, None, None, :]  # padding sees padding: nothing is empty
    return _loss(model, batch, same & causal)


def _loss(model: nn.Module, batch: Batch, mask: Tensor) -> tuple[Tensor, Tensor]:
    one = torch.ones((), device=batch.labels.device)
    output: Any = model(
        input_ids=batch.input_ids,
        attention_mask=mask,
        position_ids=batch.position_ids,
        labels=batch.labels,
        shift_labels=batch.labels,
        num_items_in_batch=one,  # which makes transformers' mean a sum
    )
    return output.loss[None], (batch.labels != IGNORE).sum()[None]


def _training_job(
    model: nn.Module,
    data: PreparedData,
    train_config: TrainConfig,
    run: RunConfig,
    opened: Run,
    choice: DeviceChoice,
    resume: bool,
    progress: Progress,
) -> TrainingJob:
    rows, held_out = train_config.micro_batch_size, data.validation
    assert held_out is not None
    assert train_config.learning_rate is not None
    is_packed = len(data.train) < len(data.train_examples)
    torch.manual_seed(train_config.seed)
    return TrainingJob(
        model=model,
        loss_fn=packed_peft_loss if is_packed else peft_loss,
        stream=BatchStream(data.train, rows, train_config.seed, choice.device),
        eval_batches=lambda: ordered_batches(held_out, rows, choice.device),
        train_config=train_config,
        learning_rate=train_config.learning_rate,
        run_config=run,
        run=opened,
        choice=choice,
        progress=progress,
        resume=resume,
    )


def _describe(
    target: DecoderTarget,
    train_config: TrainConfig,
    data: PreparedData,
    choice: DeviceChoice,
    name: str,
) -> dict[str, Any]:
    assert data.validation is not None
    return {
        "model": name,
        "method": "peft",
        "device": choice.reason,
        "learning_rate": train_config.learning_rate,
        "lora": asdict(target.lora),
        "train": asdict(train_config),
        "data_config": asdict(target.data_config),
        "data": {
            "now": data.now.isoformat(),
            "fingerprint": data.train.fingerprint(),
            "held_out_fingerprint": data.validation.fingerprint(),
        },
    }
