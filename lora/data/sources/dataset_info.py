"""LLaMA-Factory's `dataset_info.json` beside the data: columns and tags of files, by file name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora.data.reading.cells import from_json
from lora.data.sources.files import OnMessage
from lora.errors import CheckpointError, DataError
from lora.runs.disk import read_json

INFO_FILE = "dataset_info.json"
MAX_INFO_BYTES = 1 << 22
PARTS = {
    **{"prompt": "instruction", "query": "input", "response": "output", "messages": "messages"},
    **{name: name for name in ("system", "history", "tools", "images", "videos", "audios")},
}
"""Part of an example by its name there."""
_ROLES = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "function_call"),
    "system_tag": ("system", "system"),
}
"""By tag: the speaker's name without the tag, and the role."""
_PREFERENCE = ("chosen", "rejected", "kto_tag")
_USED = frozenset(("file_name", "formatting", "columns", "tags", "ranking"))


@dataclass(frozen=True)
class FileDescription:
    """What an entry says of a file's rows."""

    name: str
    columns: Mapping[str, str]
    """Column by part."""
    tags: Mapping[str, str] = field(default_factory=dict)

    def convert(self, row: object) -> object:
        """Return the row with its columns under the names of their parts, and roles by name."""
        if not isinstance(row, Mapping):
            return row
        given = {part: column for part, column in self.columns.items() if column in row}
        taken = set(given.values())
        found = {part: row[column] for part, column in given.items()}
        found |= {k: v for k, v in row.items() if k not in taken and k not in found}
        if "instruction" in given and not {"output", "response"} & found.keys():
            found["text"] = found.pop("instruction")  # texts to continue have a prompt alone
        if "messages" in found and self.tags:
            turns = from_json(found["messages"], "messages")
            if isinstance(turns, list | tuple):
                found["messages"] = [self._turn(turn) for turn in turns]
        return found

    def _turn(self, turn: object) -> object:
        role_tag = self.tags.get("role_tag", "from")
        content_tag = self.tags.get("content_tag", "value")
        if not isinstance(turn, Mapping) or role_tag not in turn:
            return turn
        names = {self.tags.get(tag, usual): role for tag, (usual, role) in _ROLES.items()}
        rest = {k: v for k, v in turn.items() if k not in (role_tag, content_tag)}
        speaker = turn[role_tag]
        role = names.get(speaker, speaker) if isinstance(speaker, str) else speaker
        return {"role": role, "content": turn.get(content_tag), **rest}


def describe_file(path: Path, on_message: OnMessage) -> FileDescription | None:
    """Return what `dataset_info.json`, beside a file or one directory above, says of it.

    None without such an entry. Raises DataError for preference data, and for two entries that
    describe the file differently.
    """
    entries = {
        name: entry
        for folder in path.absolute().parents[:2]
        for name, entry in read_info(folder / INFO_FILE, on_message).items()
        if _is_of(entry, folder, path)
    }
    if not entries:
        return None
    found = [_describe(name, entry) for name, entry in entries.items()]
    if any((one.columns, one.tags) != (found[0].columns, found[0].tags) for one in found):
        raise DataError(
            f"Cannot read examples from {path}: {INFO_FILE} describes it as {', '.join(entries)}, "
            "with different columns. Keep one, or give columns or a template."
        )
    entry = next(iter(entries.values()))
    shown = [f"{part}={column}" for part, column in found[0].columns.items()]
    shown += [f"{tag}={value}" for tag, value in found[0].tags.items()]
    if shown:
        on_message(f"{path.name} as {found[0].name} in {INFO_FILE}: {', '.join(shown)}")
    unused = sorted(entry.keys() - _USED)
    if unused:
        on_message(f"{INFO_FILE}: not used of {found[0].name}: {', '.join(unused)}")
    return found[0]


def read_info(path: Path, on_message: OnMessage = lambda message: None) -> Mapping[str, Any]:
    """Return the entries of a `dataset_info.json` by name; none if it is missing or damaged."""
    if not path.is_file() or path.stat().st_size > MAX_INFO_BYTES:
        return {}
    try:
        values = read_json(path)
    except CheckpointError as error:
        on_message(f"note: {error}")
        return {}
    return values if isinstance(values, dict) else {}


def _is_of(entry: object, folder: Path, path: Path) -> bool:
    """Return whether an entry is of a file, or of a directory that has it."""
    name = entry.get("file_name") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    named = (folder / name).resolve()
    return named == path.resolve() or named in path.resolve().parents


def _describe(name: str, entry: Mapping[str, Any]) -> FileDescription:
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    for value in (columns, tags):
        pairs = value.items() if isinstance(value, dict) else [(None, None)]
        if not all(isinstance(k, str) and isinstance(v, str) for k, v in pairs):
            raise DataError(
                f"Cannot use {name} of {INFO_FILE}: its columns and tags must be texts by name. "
                "Correct it, or give columns or a template."
            )
    if entry.get("ranking") or set(columns) & set(_PREFERENCE):
        raise DataError(
            f"Cannot train on {name} of {INFO_FILE}: it is preference data. Name another file."
        )
    unknown = sorted(set(columns) - set(PARTS))
    if unknown:
        raise DataError(
            f"Cannot use {name} of {INFO_FILE}: it has columns for {', '.join(unknown)}. Allowed: "
            f"{', '.join(PARTS)}. Correct it, or give columns or a template."
        )
    usual = {} if entry.get("formatting") in (None, "alpaca") else {"messages": "conversations"}
    parts = {PARTS[part]: column for part, column in columns.items()}
    return FileDescription(name, {**usual, **parts}, tags)
