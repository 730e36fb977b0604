"""The data settings under which an adapter was trained, from the record of its run."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from lora.config import DataConfig, ImplementationName
from lora.data.prompting.prompt_format import read_prompt_format
from lora.data.prompting.row_template import parse_template
from lora.data.prompting.rules import ReadingRules, rules_for
from lora.data.tokenizers.subword import load_tokenizer
from lora.runs.read_record import read_run_record
from lora.runs.record import RUN_FILE, PromptFormat, RunRecord

OLDER = PromptFormat(completions="raw")
"""How adapters and runs without a record of it were trained."""

EVALUATION_DATE = datetime(2024, 7, 26)
"""For chat templates that print a date, where no run tells one: an evaluation can be repeated."""


@dataclasses.dataclass(frozen=True)
class RunDataSettings:
    """Data settings, and the file that they come from."""

    config: DataConfig
    source: Path | None
    """None: the defaults, because no run's record lies beside the adapter."""
    now: datetime = EVALUATION_DATE
    """The date that chat templates print: that of the run's start."""

    def __str__(self) -> str:
        if self.source is None:
            return "no run.json beside the adapter: the data settings are the defaults"
        return f"data settings of the run in {self.source.parent}"


def read_run_data_settings(adapter: Path) -> RunDataSettings:
    """Return the data settings of the run that made the adapter in a directory.

    The run's record lies in that directory or the one above it, or above the checkpoints. Special
    tokens are left out, and the chat template where the adapter has its own tokenizer: they are in
    that. Raises
    CheckpointError for a damaged record, ConfigError for settings in it that are out of range.
    """
    folder = adapter.resolve()
    for directory in _run_directories(folder):
        path = directory / RUN_FILE
        record = read_run_record(directory) if path.is_file() else None
        if record is not None and record.data_config is not None:
            has_tokenizer = (folder / "tokenizer.json").is_file()
            config = _config_of(record.data_config, has_tokenizer)
            return RunDataSettings(config, path, _date_of(record.data.now))
    return RunDataSettings(DataConfig(), None)


def find_prompt_format(
    adapter: Path | None, model_folder: Path | None = None
) -> PromptFormat | None:
    """Return how an adapter, or else the whole model in a directory, was prompted in training.

    From the file in its directory, or else the record of the adapter's run; None if nothing tells.
    Raises DataError or CheckpointError for a damaged file.
    """
    if adapter is None:
        return None if model_folder is None else read_prompt_format(model_folder)
    folder = adapter.resolve()
    found = read_prompt_format(folder)
    for directory in _run_directories(folder):
        if found is None and (directory / RUN_FILE).is_file():
            found = read_run_record(directory).data.prompt_format
    return found


def find_rules(config: DataConfig, adapter: Path | None, model_folder: Path) -> ReadingRules:
    """Return how examples are read to evaluate an adapter, or a whole model: as in training.

    `config` has the data settings of the run, changed by what the user gave.
    """
    trained = find_prompt_format(adapter, model_folder)
    if trained is None and adapter is not None:
        trained = OLDER
    template = load_tokenizer(model_folder).chat_template
    rules = rules_for(config, has_template=template is not None, trained=trained)
    is_rows_own = trained is None or trained.template in (None, trained.label_template)
    if config.template is None and not config.columns and trained is not None and not is_rows_own:
        return dataclasses.replace(
            rules, template=parse_template(str(trained.template), has_escapes=False)
        )
    return rules


def find_implementation(
    asked: ImplementationName, adapter: Path | None, model_folder: Path | None = None
) -> ImplementationName:
    """Return the code to run a model with: the one asked for; for auto what its run recorded.

    That is the run of the adapter, or else of the whole model in a directory; auto where no record
    tells. Raises CheckpointError for a damaged record.
    """
    folder = model_folder if adapter is None else adapter
    if asked != "auto" or folder is None:
        return asked
    for directory in _run_directories(folder.resolve()):
        if (directory / RUN_FILE).is_file():
            return recorded_implementation(read_run_record(directory)) or asked
    return asked


def recorded_implementation(record: RunRecord) -> ImplementationName | None:
    """Return the code that ran a model, from its run's record; None where that does not tell."""
    known = {name: name for name in get_args(ImplementationName)}
    return known.get(record.implementation or "")


def implementation_to_resume(run: Path) -> ImplementationName | None:
    """Return the code that a run to be resumed began with; None if there is no record."""
    if not (run / RUN_FILE).is_file():
        return None
    return recorded_implementation(read_run_record(run)) or "native"  # older versions had no other


def prompts_to_resume(run: Path) -> PromptFormat | None:
    """Return how the examples of a run to be resumed were read; None if there is no record."""
    if not (run / RUN_FILE).is_file():
        return None
    return read_run_record(run).data.prompt_format or OLDER


def _run_directories(folder: Path) -> list[Path]:
    """Return where the record of the run that made the adapter in `folder` can lie."""
    # An adapter of a checkpoint is in checkpoints/step-000500/adapter/ of the run directory.
    runs = [above.parent for above in folder.parents[:2] if above.name == "checkpoints"]
    return [folder, folder.parent, *runs]


def _config_of(values: dict[str, Any], has_tokenizer: bool) -> DataConfig:
    known = {field.name for field in dataclasses.fields(DataConfig)} - {"special_tokens"}
    kept = {name: value for name, value in values.items() if name in known}
    template = kept.pop("chat_template", None)
    if template is not None and not has_tokenizer:
        kept["chat_template"] = Path(template)
    return DataConfig(**kept)


def _date_of(text: str | None) -> datetime:
    try:
        return datetime.fromisoformat(text or "")
    except ValueError:  # older runs do not tell
        return EVALUATION_DATE
