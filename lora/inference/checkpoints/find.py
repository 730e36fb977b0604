"""Find the adapter that a user names: a directory, a run, or one of a run's checkpoints.

    runs/orders/adapter     that directory
    runs/orders             what the run saved: its adapter/, of a sweep its best/
    runs/orders@500         its checkpoint of step 500
    runs/orders@best        its checkpoint with the lowest validation loss
    runs/orders@last        its newest checkpoint
    runs/orders/checkpoints/step-000500     its checkpoint of step 500, by its directory

The adapter of a checkpoint is written beside it once, into `checkpoints/step-000500/adapter/`, and
goes with it; where the run directory cannot be written, into a temporary directory.
"""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from pathlib import Path

from lora.errors import CheckpointError
from lora.runs.outputs import output_lock
from lora.runs.read_record import read_result, read_run_record
from lora.runs.record import RUN_FILE

ADAPTER_CONFIG = "adapter_config.json"
SAVED = ("adapter", "best")
"""Names of what a run saves: a single run, a sweep."""
_STEP = re.compile(r"step-(\d+)")
"""Name of a checkpoint's directory."""


def find_adapter(name: Path | str) -> Path:
    """Return the directory of the adapter that `name` means.

    What is no run directory and none of its checkpoints is returned as it is: what reads it says
    what is wrong. Raises CheckpointError for a checkpoint that is not there or cannot be used.
    """
    path = Path(name)
    run, word = split_name(path)
    if word is not None:
        return _open_checkpoint(run, word)
    return _saved_by(path) if path.exists() else path


def split_name(path: Path) -> tuple[Path, str | None]:
    """Return the run directory and the checkpoint's word of `runs/orders@500`, else None for it."""
    step, above = _STEP.fullmatch(path.name), path.parent.parent
    if step is not None and path.is_dir() and (above / RUN_FILE).is_file():
        return (path, None) if (path / ADAPTER_CONFIG).is_file() else (above, str(int(step[1])))
    before, at, word = path.name.rpartition("@")
    run = path.parent / before
    if not at or not before or path.exists():
        return path, None
    if run.name in SAVED and not (run / RUN_FILE).is_file():  # runs/orders/adapter@500
        run = run.parent
    return (run, word) if (run / RUN_FILE).is_file() else (path, None)


def _saved_by(folder: Path) -> Path:
    """Return what the run in `folder` saved; `folder` itself if it is no run, or saved nothing."""
    if (folder / ADAPTER_CONFIG).is_file() or not (folder / RUN_FILE).is_file():
        return folder
    return next(
        (folder / n for n in SAVED if (folder / n / ADAPTER_CONFIG).is_file()),
        folder,
    )


def _open_checkpoint(run: Path, word: str) -> Path:
    _refuse_whole_models(run, word)
    # These modules import torch, which a name without @ does not need.
    from lora.inference.checkpoints.extract import extract_adapter
    from lora.inference.checkpoints.listing import check_keeps_checkpoints, find_entry

    check_keeps_checkpoints(run)
    try:
        entry = find_entry(run, word)
    except CheckpointError:
        if not _is_saved(run, word):
            raise
        return run / "adapter"  # the checkpoint is gone, but the run has saved just that one
    folder = entry.path / "adapter"
    if (folder / ADAPTER_CONFIG).is_file():
        return folder
    try:
        with output_lock(folder, wait=True):  # the processes of one command all come here
            if not (folder / ADAPTER_CONFIG).is_file():
                extract_adapter(run, entry, folder)
    except CheckpointError:
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f"lora-{run.name}-{entry.step}-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        extract_adapter(run, entry, folder)  # raises what the first call did, if not of the disk
        shutil.copyfile(run / RUN_FILE, folder / RUN_FILE)  # its data settings
    return folder


def _is_saved(run: Path, word: str) -> bool:
    """Whether `adapter/` has the weights that `word` names."""
    result = read_result(run)
    if result is None or result.saved_step is None or not (run / "adapter").is_dir():
        return False
    named = {"last": result.steps, "best": result.best_step}.get(word, word)
    return str(named) == str(result.saved_step)


def _refuse_whole_models(run: Path, word: str) -> None:
    record = read_run_record(run)
    if record.method == "full":
        raise CheckpointError(
            f"Cannot open {run}@{word} as an adapter: the run is full fine-tuning, and its "
            f"checkpoints are whole models. Write one with `lora checkpoint {run}@{word} --out "
            "DIRECTORY` and name that as the model."
        )
