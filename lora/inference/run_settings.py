"""The data settings under which an adapter was trained, from the record of its run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lora.config import DataConfig
from lora.runs.read_record import read_run_record
from lora.runs.record import RUN_FILE


@dataclasses.dataclass(frozen=True)
class RunDataSettings:
    """Data settings, and the file that they come from."""

    config: DataConfig
    source: Path | None
    """None: the defaults, because no run's record lies beside the adapter."""

    def __str__(self) -> str:
        if self.source is None:
            return "no run.json beside the adapter: the data settings are the defaults"
        return f"data settings of the run in {self.source.parent}"


def read_run_data_settings(adapter: Path) -> RunDataSettings:
    """Return the data settings of the run that made the adapter in a directory.

    The run's record lies in that directory or the one above it. Special tokens are left out, and
    the chat template where the adapter has its own tokenizer: they are in that. Raises
    CheckpointError for a damaged record, ConfigError for settings in it that are out of range.
    """
    folder = adapter.resolve()
    for directory in (folder, folder.parent):
        path = directory / RUN_FILE
        values = read_run_record(directory).data_config if path.is_file() else None
        if values is not None:
            has_tokenizer = (folder / "tokenizer.json").is_file()
            return RunDataSettings(_config_of(values, has_tokenizer), path)
    return RunDataSettings(DataConfig(), None)


def _config_of(values: dict[str, Any], has_tokenizer: bool) -> DataConfig:
    known = {field.name for field in dataclasses.fields(DataConfig)} - {"special_tokens"}
    kept = {name: value for name, value in values.items() if name in known}
    template = kept.pop("chat_template", None)
    if template is not None and not has_tokenizer:
        kept["chat_template"] = Path(template)
    return DataConfig(**kept)
