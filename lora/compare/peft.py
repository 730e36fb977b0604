"""The PEFT member of a comparison: LoRA by PEFT on transformers' model, as its users train it.

Base, rank, alpha, targets, batches, schedule and AdamW are those of the other members; the initial
values of A are PEFT's own. The training loop is lora's plain one: forward, backward, clip, AdamW,
and one wait for the device per step. The loss is transformers' own, summed over target tokens.
"""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora.compare.decoder_job import DecoderJob
from lora.compare.target import MemberTask, TrainingOutcome
from lora.config import DataConfig, LoRAConfig
from lora.data.prepare import PreparedData
from lora.data.prompting.prompt_format import save_prompt_format
from lora.data.record import describe_data
from lora.data.sequences.batches import IGNORE, Batch
from lora.device import DeviceChoice, choose_device
from lora.errors import ConfigError, DependencyError
from lora.finetune.load_data import load_data
from lora.finetune.loop_inputs import data_inputs
from lora.pretrained.sources import find_model
from lora.runs.directory import Run, create_run
from lora.runs.progress import Progress
from lora.runs.record import RunRecord, RunResult
from lora.settings.install import install_extra
from lora.training.job import TrainingJob
from lora.training.plain_step import PlainStepRunner
from lora.training.trainer import train

PACKAGES = ("peft", "transformers")


def check_peft(lora: LoRAConfig, data_config: DataConfig) -> None:
    """Raise DependencyError if PEFT is not installed, ConfigError for what its member cannot do."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyError(
            f"Cannot compare with PEFT: not installed: {', '.join(missing)}. "
            f"Run: {install_extra('bench')} — or leave --peft out."
        )
    if data_config.special_tokens:
        raise ConfigError(
            "Cannot compare with PEFT when special_tokens are added: the PEFT member does not "
            "train the embedding rows of added tokens. Leave out --peft or --special-tokens."
        )


def train_peft(job: DecoderJob, task: MemberTask, progress: Progress) -> TrainingOutcome:
    """Train PEFT's adapter in `task.folder`."""
    choice = choose_device(task.run.device, task.train.precision)
    source = find_model(job.model)
    data, _ = load_data(job.finetune_job(task), source.folder, progress)
    model = build_peft(source.folder, job.lora, task.train.seed, choice)
    record = _describe(job, task, data, choice, source.name)
    with create_run(task.run.out, task.name, resume=task.resume, record=record) as run:
        result = train(_training_job(model, data, task, run, choice, progress))
        run.write_result(RunResult(**vars(result)))
        saved = run.folder / "adapter"
        shutil.rmtree(saved, ignore_errors=True)
        model.save_pretrained(saved)
        data.tokenizer.save(saved)
        save_prompt_format(data.prompts, saved)
    return TrainingOutcome(
        folder=run.folder,
        saved=saved,
        steps=result.steps,
        train_s=result.train_s,
        peak_memory_bytes=result.peak_memory_bytes,
        planned_memory_bytes=None,  # `lora plan` plans lora's own steps only
        eval_loss=result.eval_loss,
        best_eval_loss=result.best_eval_loss,
        saved_step=result.saved_step,
        saved_eval_loss=result.saved_eval_loss,
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
    """Return loss sum in nats and number of target tokens, (1,) each, for unpacked sequences."""
    return _loss(model, batch, (batch.document_ids >= 0).long())  # (B, T)


def packed_peft_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The same for packed sequences: a mask (B, 1, T, T) keeps documents apart."""
    ids = batch.document_ids  # (B, T)
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
    # Padding attends to padding: a softmax over no position at all would be NaN.
    same = ids[:, None, :, None] == ids[:, None, None, :]  # (B, 1, T, T)
    return _loss(model, batch, same & causal)


def _loss(model: nn.Module, batch: Batch, mask: Tensor) -> tuple[Tensor, Tensor]:
    one = torch.ones((), device=batch.labels.device)
    output: Any = model(
        input_ids=batch.input_ids,
        attention_mask=mask,
        position_ids=batch.position_ids,
        labels=batch.labels,
        shift_labels=batch.labels,  # our labels are shifted already
        num_items_in_batch=one,  # transformers divides the sum by this: 1 keeps it a sum
    )
    return output.loss[None], (batch.labels != IGNORE).sum()[None]


def _training_job(
    model: nn.Module,
    data: PreparedData,
    task: MemberTask,
    run: Run,
    choice: DeviceChoice,
    progress: Progress,
) -> TrainingJob:
    is_packed = len(data.train) < len(data.train_examples)
    loss_fn = packed_peft_loss if is_packed else peft_loss
    steps = PlainStepRunner(model, loss_fn, choice, task.train)
    torch.manual_seed(task.train.seed)
    return TrainingJob(
        **data_inputs(data, task.train, steps, choice),
        model=model,
        steps=steps,
        train_config=task.train,
        run_config=task.run,
        run=run,
        choice=choice,
        progress=progress,
        resume=task.resume,
    )


def _describe(
    job: DecoderJob, task: MemberTask, data: PreparedData, choice: DeviceChoice, name: str
) -> RunRecord:
    return RunRecord(
        kind="member",
        method="peft",
        model=name,
        device=choice.reason,
        learning_rate=task.train.peak_learning_rate,
        lora=asdict(job.lora),
        train=asdict(task.train),
        data_config=asdict(job.data_config),
        data=describe_data(data, job.data, job.eval_data),
    )
