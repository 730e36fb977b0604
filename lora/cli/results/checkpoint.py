"""`lora checkpoint`: list the checkpoints of a run, or write one as an adapter."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lora.cli.flags.from_fields import MODEL, OUTPUT
from lora.cli.flags.shared import Json, Overwrite, check_overwrite
from lora.runs.typed_json import json_text
from lora.terminal import build_console, print_line

if TYPE_CHECKING:
    from lora.inference.checkpoints.listing import CheckpointEntry

Out = Annotated[
    Path | None,
    Parameter(group=OUTPUT, help="Directory for the adapter: a new or empty one."),
]


def checkpoint(
    run: Annotated[Path, Parameter(group=MODEL)],
    *,
    out: Out = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """List the checkpoints of a run, or write one of them as an adapter.

    For example:

        lora checkpoint runs/orders
        lora checkpoint runs/orders@500 --out orders-500
        lora checkpoint runs/orders@best --out orders-best

    Commands that take an adapter open a checkpoint by the same name: --adapter
    runs/orders@500. Of full fine-tuning a whole model is written.

    Parameters
    ----------
    run
        Run directory (runs/x), or one of its checkpoints: runs/x@500, @best, @last.
    """
    from lora.errors import ConfigError
    from lora.inference.checkpoints.find import split_name
    from lora.inference.checkpoints.listing import find_entry, list_entries

    check_overwrite(overwrite, out, "--out")
    folder, word = split_name(run)
    entries = list_entries(folder) if word is None else [find_entry(folder, word)]
    if out is not None and word is None:
        raise ConfigError(
            f"Cannot write a checkpoint of {folder}: none is named. Name a step, or best or last: "
            f"lora checkpoint {folder}@best --out {out}."
        )
    if out is not None:
        _write(folder, entries[0], out, overwrite)
    found = [_as_json(entry) for entry in entries]
    if json:
        written = None if out is None else str(out)
        print(json_text({"run": str(folder), "checkpoints": found, "written": written}))
    elif out is not None:
        print_line(f"step {entries[0].step} of {folder}: {out}")
    else:
        _print(folder, entries)
    return 0


def _write(run: Path, entry: CheckpointEntry, out: Path, overwrite: bool) -> None:
    from lora.inference.checkpoints.extract import extract_adapter, extract_model
    from lora.pretrained.model_files import ADAPTER_FILES, MODEL_FILES
    from lora.runs.outputs import OutputPath, input_paths
    from lora.runs.read_record import read_run_record

    record = read_run_record(run)
    is_full = record.method == "full"
    files = MODEL_FILES if is_full else ADAPTER_FILES
    inputs = (run, entry.path, *input_paths(record.model_source))
    output = OutputPath(out, inputs, overwrite, is_directory=True, replaceable=files)
    with output.building() as part:
        write = extract_model if is_full else extract_adapter
        write(run, entry, part)


def _as_json(entry: CheckpointEntry) -> dict[str, Any]:
    return {**asdict(entry), "path": str(entry.path)}


def _print(run: Path, entries: list[CheckpointEntry]) -> None:
    from rich.table import Table

    from lora.runs.read_record import read_run_record

    if not entries:
        print_line(f"{run} has no checkpoints.")
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("step", "validation loss", "size"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for entry in entries:
        marks = {"best": entry.is_best, "last": entry.is_last, "saved": entry.is_saved}
        loss = "" if entry.eval_loss is None else f"{entry.eval_loss:.4f}"
        shown = ", ".join(word for word, is_so in marks.items() if is_so)
        table.add_row(str(entry.step), loss, f"{entry.size_bytes / 1e6:,.1f} MB", shown)
    build_console().print(table)
    name = f"{run}@{entries[-1].step}"
    if read_run_record(run).method == "full":
        print_line(f"Write one as a model: lora checkpoint {name} --out DIRECTORY.")
    else:
        print_line(f"Open one with --adapter {name}, or write it with --out DIRECTORY.")
