"""Checks of this machine: packages, device, free memory and disk, a short training and save."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lora.adapters.apply import apply_lora, lora_layers
from lora.adapters.save_load import load_adapter, save_adapter
from lora.config import LoRAConfig, TrainConfig
from lora.data.sequences.batches import Batch
from lora.data.tokenizers.tokenizer_trial import KNOWN_FOLDER
from lora.decoder.decoder import Decoder, build_decoder
from lora.decoder.families import decoder_config
from lora.device import DeviceChoice, choose_device
from lora.errors import LoraError
from lora.fast.choose import choose_steps
from lora.fast.why_not import why_not_captured, why_not_fast
from lora.kernels.step.jit import HAS_TRITON
from lora.pretrained.load.architectures import is_new_enough
from lora.pretrained.sources import (
    DEFAULT_INSTALL,
    DEFAULT_NAME,
    cache_folder,
    find_default_file,
)
from lora.settings.install import install, install_extra
from lora.training.checkpoint import load_checkpoint, save_checkpoint
from lora.training.losses import loss_for
from lora.training.plain_step import PlainStepRunner

MIN_FREE_BYTES = 2**30
"""Required free disk space and free memory; less is too little for any real model."""
NEEDED = ("torch", "safetensors", "tokenizers", "numpy", "jinja2", "gguf", "rich")
OPTIONAL = {
    "transformers": ("models without a native decoder", "hf"),
    "peft": ("lora compare --peft", "bench"),
    "pyarrow": ("Parquet files", "data"),
    "datasets": ("data sets by owner/name on the hub", "data"),
    "huggingface_hub": ("models by owner/name on the hub", "hub"),
    "tensorboard": ("--tensorboard", "track"),
    "sacrebleu": ("lora eval --metrics bleu", "eval"),
    "rouge_score": ("lora eval --metrics rouge-l", "eval"),
    "triton": ("GPU kernels; part of PyTorch's CUDA builds", None),
}
"""By package: what needs it, and the extra that installs it."""
TRIAL_STEPS, TRIAL_RATE = 8, 2e-2
_TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    seen: str
    is_well: bool = True
    advice: str = ""
    """What to do if the check failed, or to get what is missing."""
    is_missing: bool = False
    """Whether it is a part that some runs need and that is not installed."""


def examine(runs: Path = Path("runs")) -> list[Check]:
    """Return the result of every check.

    `runs` is the directory for run directories, whose disk is checked. No files are left behind.
    """
    checks = [_python(), *_packages(), _default_model()]
    try:
        choice = choose_device()
    except LoraError as error:
        return [*checks, Check("device", str(error), False, "Choose another with --device.")]
    checks += [_device(choice), _several_devices(), _kernels(choice), _memory(choice)]
    checks.append(_disk("runs", runs))
    checks += [_disk("model cache", cache_folder()), _cache()]
    for name, trial in (("training", _try_training), ("saving", _try_saving)):
        checks.append(_run_trial(name, trial, choice))
    return checks


def _python() -> Check:
    seen = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Check("python", seen, sys.version_info >= (3, 11), "Install Python 3.11 or newer.")


def _packages() -> list[Check]:
    found = [Check("lora-lm", _version("lora-lm") or "not installed, run from its source")]
    for name in NEEDED:
        version = _version(name)
        advice = f"Run: {install(name)}"
        found.append(Check(name, version or "missing", version is not None, advice))
    return [*found, *(_optional(name, *needed) for name, needed in OPTIONAL.items())]


def _optional(name: str, use: str, extra: str | None) -> Check:
    version = _version(name)
    advice = "" if extra is None else f"Run: {install_extra(extra)}"
    if version is not None and name == "transformers" and not is_new_enough(version):
        return Check(name, f"{version} is too old for {use}", advice=advice, is_missing=True)
    if version is not None:
        return Check(name, version)
    return Check(name, f"not installed; needed for {use}", advice=advice, is_missing=True)


def _default_model() -> Check:
    file = find_default_file()
    if file is None:
        seen = f"{DEFAULT_NAME} is not installed; needed where no --model is given"
        advice = f"Run: {install(DEFAULT_INSTALL)}"
        return Check("default model", seen, advice=advice, is_missing=True)
    return Check("default model", f"{file.stem}, {file.stat().st_size / 1e6:.0f} MB")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(choice: DeviceChoice) -> Check:
    count = torch.cuda.device_count()
    others = f"; {count} CUDA devices" if count > 1 else ""
    if choice.device.type == "cpu":
        others += f"; {torch.get_num_threads()} threads on {os.cpu_count()} cores"
        others += f"; PyTorch {torch.__version__} sees no CUDA device"
    return Check("device", choice.reason + others)


def _several_devices() -> Check:
    """Return how many GPUs a run can use, and how they reach each other."""
    name, count = "several devices", torch.cuda.device_count()
    if not dist.is_available():
        return Check(name, "this PyTorch has no torch.distributed", is_missing=True)
    if count == 0:
        return Check(name, "no GPU; --devices N starts processes on the CPU, for trials")
    gpus = "1 GPU" if count == 1 else f"{count} GPUs"
    if not dist.is_nccl_available():
        return Check(name, f"{gpus}, and this PyTorch has no NCCL", is_missing=count > 1)
    version = ".".join(map(str, torch.cuda.nccl.version()))
    pairs = [pair for pair in itertools.combinations(range(count), 2) if not _reach(*pair)]
    seen = f"{gpus}, NCCL {version}"
    if count > 1 and not pairs:
        seen += ", each reads the others' memory"
    if pairs:
        named = ", ".join(f"{one} and {other}" for one, other in pairs[:4])
        seen += f"; no direct access between {named}{' …' if len(pairs) > 4 else ''}: slower"
    return Check(name, seen)


def _reach(one: int, other: int) -> bool:
    return torch.cuda.can_device_access_peer(one, other)


def _kernels(choice: DeviceChoice) -> Check:
    """Return which training step a common decoder would use here, and why not a faster one."""
    model = _adapted(choice)
    why_not = why_not_fast(model, choice)
    if why_not is None:
        return Check("kernels", "fast step: Triton kernels, one CUDA graph")
    either = why_not_captured(model) if choice.device.type == "cuda" else None
    is_captured = choice.device.type == "cuda" and either is None
    step = "captured step" if is_captured else "plain step"
    triton = "" if HAS_TRITON else "; Triton is not installed"
    return Check("kernels", f"{step}: {why_not}{f'; {either}' if either else ''}{triton}")


def _memory(choice: DeviceChoice) -> Check:
    if choice.device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(choice.device)
    else:
        free_bytes, total_bytes = _host_memory()
    seen = f"{free_bytes / 1e9:.1f} GB free of {total_bytes / 1e9:.1f} GB"
    advice = "Close other programs that use this memory."
    return Check("memory", seen, free_bytes >= MIN_FREE_BYTES, advice)


def _host_memory() -> tuple[int, int]:
    path = Path("/proc/meminfo")
    if path.is_file():
        lines = dict(line.split(":", 1) for line in path.read_text().splitlines())
        kib = [int(lines[name].split()[0]) for name in ("MemAvailable", "MemTotal")]
        return kib[0] * 1024, kib[1] * 1024
    page_bytes, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    return page_bytes * pages, page_bytes * pages  # not every system reports what is free


def _disk(name: str, folder: Path) -> Check:
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    free_bytes = shutil.disk_usage(nearest).free
    advice = f"Free some space there, or use another directory than {folder}."
    if not os.access(nearest, os.W_OK):
        return Check(f"disk of {name}", f"{nearest} is not writable", False, advice)
    seen = f"{free_bytes / 1e9:.1f} GB free at {nearest}"
    return Check(f"disk of {name}", seen, free_bytes >= MIN_FREE_BYTES, advice)


def _cache() -> Check:
    folder = cache_folder()
    entries = folder.iterdir() if folder.is_dir() else ()
    models = [path for path in entries if path.is_dir() and path.name != KNOWN_FOLDER]
    n_bytes = sum(_sizes(path for model in models for path in model.rglob("*")))
    return Check("model cache", f"{len(models)} models, {n_bytes / 1e9:.2f} GB in {folder}")


def _sizes(paths: Iterable[Path]) -> list[int]:
    return [path.stat().st_size for path in paths if path.is_file()]


def _run_trial(name: str, trial: Callable[[DeviceChoice], str], choice: DeviceChoice) -> Check:
    advice = "Run with --debug and report the output."
    began_s = time.perf_counter()
    try:
        seen = trial(choice)
    except (LoraError, RuntimeError, OSError, ImportError) as error:
        return Check(f"trial of {name}", f"{type(error).__name__}: {error}", False, advice)
    return Check(f"trial of {name}", f"{seen}, {time.perf_counter() - began_s:.1f} s")


def _adapted(choice: DeviceChoice) -> Decoder:
    model = build_decoder(
        decoder_config(_TINY), seed=1, dtype=choice.compute_dtype, device=choice.device
    )
    apply_lora(model, LoRAConfig(rank=8, init_seed=1))
    return model


def _batch() -> Batch:
    ids = torch.randint(0, 256, (4, 33), generator=torch.Generator().manual_seed(2))  # (B, T+1)
    positions = torch.arange(32).repeat(ids.size(0), 1)  # (B, T)
    return Batch(
        input_ids=ids[:, :-1].contiguous(),  # (B, T)
        labels=ids[:, 1:].contiguous(),  # (B, T)
        position_ids=positions,
        document_ids=torch.zeros_like(positions),
    )


def _try_training(choice: DeviceChoice) -> str:
    """Train a few steps as a run would; the loss must fall and frozen weights must not change."""
    model, config = _adapted(choice), TrainConfig(steps=TRIAL_STEPS)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not _trains(p)}
    chosen: list[str] = []
    batch = _batch()
    steps = choose_steps(model, choice, config, on_message=chosen.append)
    batch = batch.to(steps.batch_device)
    for step in range(1, TRIAL_STEPS + 1):
        steps.launch(step, [batch], [TRIAL_RATE])
    losses = [outcome.losses[0] for outcome in steps.finished(wait=True)]
    if not losses[-1] < losses[0]:
        raise RuntimeError(f"the loss did not fall: {losses}")
    parameters = dict(model.named_parameters())
    changed = [name for name, before in frozen.items() if not torch.equal(before, parameters[name])]
    if changed:
        raise RuntimeError(f"frozen weights have changed: {', '.join(changed[:3])}")
    how = chosen[0].split(":")[0] if chosen else "plain step"
    return f"{how}: loss {losses[0]:.3f} to {losses[-1]:.3f}, frozen weights unchanged"


def _trains(parameter: torch.Tensor) -> bool:
    return parameter.requires_grad


def _try_saving(choice: DeviceChoice) -> str:
    """Save and load an adapter and a checkpoint; all values must be bit-identical."""
    model = _adapted(choice)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator))
    batch = _batch().to(choice.device)
    with tempfile.TemporaryDirectory(prefix="lora-doctor-") as name:
        save_adapter(model, Path(name) / "adapter")
        loaded = build_decoder(
            decoder_config(_TINY), seed=1, dtype=choice.compute_dtype, device=choice.device
        )
        load_adapter(loaded, Path(name) / "adapter")
        with torch.no_grad():
            same = torch.equal(loaded(batch.input_ids), model(batch.input_ids))
        tensors = PlainStepRunner(model, loss_for(model), choice, TrainConfig()).state()
        path = save_checkpoint(Path(name), 1, tensors, {}, keep=1)
        back, _ = load_checkpoint(path)
    if not same:
        raise RuntimeError("the adapter gives different logits after saving and loading")
    if any(not torch.equal(back[key], tensor.cpu()) for key, tensor in tensors.items()):
        raise RuntimeError("the checkpoint has different values after saving and loading")
    return "adapter and checkpoint are bit-identical after loading"
