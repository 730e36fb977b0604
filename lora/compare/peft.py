"""The PEFT member of a comparison: LoRA by PEFT on transformers' model, as its users train it.

Base, rank, alpha, targets, batches, schedule and AdamW are those of the other members; the initial
values of A are PEFT's own. A base in nf4 has bitsandbytes' linears, whose values are the same:
QLoRA as its users run it. The training loop is lora's plain one: forward, backward, clip, AdamW,
and one wait for the device per step. The loss is transformers' own, summed over target tokens.
"""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora.compare.decoder_job import DecoderJob
from lora.compare.target import MemberTask, TrainingOutcome
from lora.config import BaseWeights, DataConfig, LoRAConfig
from lora.data.prepare import PreparedData
from lora.data.prompting.prompt_format import save_prompt_format
from lora.data.record import describe_data
from lora.data.sequences.batches import IGNORE, Batch
from lora.device import DeviceChoice, choose_device
from lora.errors import ConfigError, DependencyError
from lora.finetune.load_data import load_data
from lora.finetune.loop_inputs import data_inputs
from lora.pretrained.load.task import settled_base
from lora.pretrained.quantised.folder import find_4bit
from lora.pretrained.sources import find_model
from lora.runs.directory import Run, create_run
from lora.runs.progress import Progress
from lora.runs.record import RunRecord, RunResult
from lora.settings.install import install_extra
from lora.training.job import TrainingJob
from lora.training.plain_step import PlainStepRunner
from lora.training.trainer import train

PACKAGES = ("peft", "transformers")
QUANTISING = "bitsandbytes"
"""What a base in nf4 takes besides."""


def check_peft(lora: LoRAConfig, data_config: DataConfig, base: BaseWeights) -> None:
    """Raise DependencyError if PEFT is not installed, ConfigError for what its member cannot do."""
    _check_base(base)
    packages = (*PACKAGES, QUANTISING) if base.is_quantised else PACKAGES
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
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


def _check_base(base: BaseWeights) -> None:
    """Raise ConfigError for a base that bitsandbytes does not have."""
    why = {
        "auto": None,
        "nf4": None,
        "int8": "8 bits of bitsandbytes have outlier columns, and would be another base",
    }.get(base.base_dtype, f"it has no base in {base.base_dtype}")
    if base.nf4_block != BaseWeights.nf4_block:
        why = f"transformers quantises in blocks of {BaseWeights.nf4_block}, not {base.nf4_block}"
    if base.nf4_embeddings:
        why = "transformers leaves the embedding and the output head as they are"
    if why is not None:
        raise ConfigError(
            f"Cannot compare with PEFT over a base in {base.base_dtype}: {why}. Leave out --peft, "
            "or change how the base is stored."
        )


def train_peft(job: DecoderJob, task: MemberTask, progress: Progress) -> TrainingOutcome:
    """Train PEFT's adapter in `task.folder`."""
    choice = choose_device(task.run.device, task.train.precision)
    source = find_model(job.model)
    base = settled_base(source.folder, job.base_weights)
    job = replace(job, **vars(base))  # a folder may be in 4 bits already
    data, _ = load_data(job.finetune_job(task), source.folder, progress)
    model = build_peft(source.folder, job.lora, task.train.seed, choice, base)
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


def build_peft(
    folder: Path, lora: LoRAConfig, seed: int, choice: DeviceChoice, stored: BaseWeights
) -> Any:
    """Return transformers' model in `folder` with PEFT's LoRA on it, on the device.

    Its frozen linears are bitsandbytes' where `stored` says nf4.
    """
    import peft
    import transformers

    transformers.utils.logging.disable_progress_bar()
    more: dict[str, Any] = {}
    if stored.is_quantised:
        more["device_map"] = {"": choice.device}
    if stored.is_quantised and find_4bit(folder) is None:  # else config.json says how it is
        more["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=stored.nf4_double_quant,
            bnb_4bit_compute_dtype=choice.compute_dtype,
        )
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=choice.compute_dtype, **more
    )
    base.to(choice.device)
    if stored.is_quantised:
        _settle_linears(base, choice.compute_dtype)
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


def _settle_linears(base: nn.Module, compute_dtype: torch.dtype) -> None:
    """Changes the bitsandbytes linears of `base` in place: they compute in `compute_dtype`, and
    evaluation leaves their codes as they are."""
    from bitsandbytes.nn import Linear4bit

    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = compute_dtype  # a folder in 4 bits may name another one
            # On CPUs with bf16 instructions it would lay the codes out differently in the first
            # evaluation, and read them wrongly in the training steps that follow (0.50).
            module.support_avx512bf16_for_cpu = False


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
        **job.recorded_base,
        lora=asdict(job.lora),
        train=asdict(task.train),
        data_config=asdict(job.data_config),
        data=describe_data(data, job.data, job.eval_data),
    )
