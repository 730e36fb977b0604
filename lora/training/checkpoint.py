"""Checkpoints: a run's state on disk, written whole or not at all, checksummed, read back exactly.

A checkpoint is a directory `step-000120/` with `tensors.safetensors` (trained parameters, optimizer
moments, random generators' states), `state.json` (everything else) and `manifest.json` (size and
SHA-256 of both). It is built under a temporary name and renamed when complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lora.errors import CheckpointError, gather
from lora.runs.disk import atomic_write, disk_error
from lora.runs.tensor_files import Digest, TensorParts, digest_file, write_tensors
from lora.runs.typed_json import json_text

TENSORS_FILE, STATE_FILE, MANIFEST_FILE = "tensors.safetensors", "state.json", "manifest.json"
OPTIMIZER_KEYS = ("step", "exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter, as torch.optim.AdamW names it."""
OptimizerState = Mapping[str, Mapping[str, Tensor]]
"""By the parameter's name, then by `OPTIMIZER_KEYS`."""


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor | TensorParts],
    state: dict[str, Any],
    *,
    keep: int,
    best_step: int | None = None,
) -> Path:
    """Write the checkpoint of `step` into `folder`; remove all but the `keep` newest and the best.

    Later ones go too: a run that saves an earlier step was resumed from before them, because they
    are damaged, and they must not take the place of the newest. Raises CheckpointError if the disk
    refuses; older checkpoints are then untouched.
    """
    final = folder / _name(step)
    building = folder / f".{final.name}.building"
    state_file = (json_text({**state, "step": step}, sort_keys=True) + "\n").encode()
    try:
        folder.mkdir(exist_ok=True)  # not its parents: a run that was removed stays removed
        for left in folder.glob(".step-*.building"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        building.mkdir()
        written = {TENSORS_FILE: write_tensors(building / TENSORS_FILE, tensors)}
        atomic_write(building / STATE_FILE, state_file)
        written[STATE_FILE] = digest_file(building / STATE_FILE)
        manifest = json.dumps({n: _manifest_entry(d) for n, d in written.items()}, indent=2) + "\n"
        atomic_write(building / MANIFEST_FILE, manifest.encode())
        shutil.rmtree(final, ignore_errors=True)
        building.rename(final)
        _sync_folder(folder)
    except (OSError, CheckpointError) as error:  # atomic_write raises the latter
        shutil.rmtree(building, ignore_errors=True)
        cause = disk_error(folder, error) if isinstance(error, OSError) else error
        raise CheckpointError(
            f"Cannot save the checkpoint of step {step}; earlier ones are untouched. {cause}"
        ) from error
    until_here = [path for path in list_checkpoints(folder) if _age(path) <= _age(final)]
    kept = {path.name for path in until_here[-keep:]}
    kept |= set() if best_step is None else {_name(best_step)}
    for path in list_checkpoints(folder):
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, oldest first."""
    named = (p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdecimal())
    return sorted((p for p in named if (p / MANIFEST_FILE).is_file()), key=_age)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where `folder` has the checkpoint of `step`, if it has it."""
    return folder / _name(step)


def checkpoint_step(path: Path) -> int:
    """Return the step of a checkpoint that `list_checkpoints` found."""
    return int(path.name.removeprefix("step-"))


def has_checkpoint(folder: Path, step: int) -> bool:
    """Return whether `folder` has the complete checkpoint of `step`."""
    return (checkpoint_path(folder, step) / MANIFEST_FILE).is_file()


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the state of one checkpoint.

    Raises CheckpointError if a file is missing or its size or SHA-256 is not the manifest's.
    """
    with _reading(path):
        _check_digests(path, TENSORS_FILE, STATE_FILE)
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        return load_file(path / TENSORS_FILE), state


def read_trained_tensors(path: Path) -> dict[str, Tensor]:
    """Return the trained parameters of one checkpoint by their names, without AdamW's moments.

    Raises CheckpointError as `load_checkpoint` does.
    """
    with _reading(path):
        _check_digests(path, TENSORS_FILE)
        with safe_open(path / TENSORS_FILE, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith("model.")]  # noqa: SIM118
            return {name.removeprefix("model."): file.get_tensor(name) for name in names}


@torch.no_grad()
def load_trained_tensors(model: nn.Module, path: Path) -> None:
    """Changes `model` in place: what trains gets the values of the checkpoint at `path`.

    The optimizer and torch's generators stay as they are. Raises CheckpointError for a checkpoint
    that is damaged or of another model; `model` is then unchanged.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    saved = read_trained_tensors(path)
    check_parameters(named, saved)
    for name, parameter in named.items():
        parameter.copy_(saved[name])


def load_newest(
    folder: Path, on_message: Callable[[str], None]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the newest checkpoint in `folder` that is whole; `on_message` gets the damaged ones.

    Raises CheckpointError if there is none.
    """
    for path in reversed(list_checkpoints(folder)):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            on_message(f"{error} Trying the one before.")
    raise CheckpointError(
        f"Cannot resume from {folder}: there is no complete checkpoint. Start a new run."
    )


def training_tensors(model: nn.Module, optimizer_state: OptimizerState) -> dict[str, Tensor]:
    """Return what training changes: trained parameters, AdamW's moments, generators' states.

    Keys begin with `model.`, `optimizer.` and `random.`; parameters go by their names. Of GPUs it
    is the model's: a process has one, and another process's can have another number.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tensors = {f"model.{name}": p.detach() for name, p in named.items()}
    for name in named:
        for key, value in optimizer_state.get(name, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    return tensors | random_states(_device_of(named))


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of the generators that training on `device` draws from."""
    states = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random.cuda.0"] = torch.cuda.get_rng_state(device)
    return states


@torch.no_grad()
def restore_training_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Changes `model` and torch's generators in place, to what was saved.

    Returns the optimizer's state, as `training_tensors` was given it. Raises CheckpointError if
    names or shapes differ from the model's, all of them at once.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    saved = {key.removeprefix("model."): t for key, t in tensors.items() if key[:6] == "model."}
    check_parameters(named, saved)
    optimizer_state = {}
    for name, parameter in named.items():
        parameter.copy_(saved[name])
        keys = (key for key in OPTIMIZER_KEYS if f"optimizer.{key}.{name}" in tensors)
        moments = {key: tensors[f"optimizer.{key}.{name}"] for key in keys}
        if moments:  # a parameter that never had a gradient has none
            optimizer_state[name] = moments
    restore_random_states(tensors, _device_of(named))
    return optimizer_state


def restore_random_states(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Changes torch's generators in place, to what was saved."""
    torch.set_rng_state(tensors["random.cpu"])
    if device.type == "cuda":
        # Older checkpoints have the states of all GPUs of their machine.
        state = tensors.get(f"random.cuda.{device.index or 0}", tensors.get("random.cuda.0"))
        if state is not None:
            torch.cuda.set_rng_state(state, device)


def _device_of(trained: Mapping[str, Tensor]) -> torch.device:
    return next((tensor.device for tensor in trained.values()), torch.device("cpu"))


def check_parameters(named: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError with every name and shape that differs from the model's."""
    faults = [f"missing: {name}" for name in named if name not in saved]
    faults += [f"not trained here: {name}" for name in saved if name not in named]
    for name in named.keys() & saved.keys():
        if named[name].shape != saved[name].shape:
            shapes = f"{tuple(saved[name].shape)} saved, {tuple(named[name].shape)} here"
            faults.append(f"{name}: {shapes}")
    if faults:
        advice = "Resume with the settings that the run began with."
        raise CheckpointError(
            gather(sorted(faults), "Cannot restore a checkpoint of another run:", advice)
        )


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what reading a damaged checkpoint raises into a CheckpointError."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"Cannot read {path}: {error}. Use an earlier one.") from None


def _check_digests(path: Path, *names: str) -> None:
    """Raise CheckpointError for files whose size or SHA-256 is not the manifest's."""
    manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
    found = {name: digest_file(path / name) for name in names}
    faults = [
        f"{name}: {seen.n_bytes} bytes, SHA-256 {seen.sha256[:12]}…, the manifest says "
        f"{manifest[name]['bytes']} and {manifest[name]['sha256'][:12]}…"
        for name, seen in found.items()
        if manifest[name] != _manifest_entry(seen)
    ]
    if faults:
        what = f"Cannot read {path}, it is damaged:"
        raise CheckpointError(gather(faults, what, "Use an earlier one."))


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _age(path: Path) -> tuple[int, str]:
    return len(path.name), path.name  # step-1000000 is one digit longer than step-999999


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)  # a rename is on the disk when its folder is
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _manifest_entry(digest: Digest) -> dict[str, Any]:
    return {"bytes": digest.n_bytes, "sha256": digest.sha256}
