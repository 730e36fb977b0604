"""The record of prepared data in run.json."""

from __future__ import annotations

from pathlib import Path

from lora.data.prepare import PreparedData
from lora.data.reading.readers import Source
from lora.runs.record import IN_MEMORY, DataRecord


def describe_data(data: PreparedData, source: Source, eval_source: Source | None) -> DataRecord:
    """Return the record of prepared data and of where they come from."""
    return DataRecord(
        source=_source_name(source),
        eval_source=None if eval_source is None else _source_name(eval_source),
        in_memory=not isinstance(source, Path | str) or None,
        examples=len(data.train_examples),
        held_out_examples=len(data.validation_examples),
        rows=len(data.train),
        learned_tokens=data.train.n_target_tokens,
        chat_template=data.template_origin,
        prompt_format=data.prompts,
        now=data.now.isoformat(),
        fingerprint=data.train.fingerprint(),
        held_out_fingerprint=data.validation.fingerprint() if data.validation else None,
    )


def _source_name(source: Source) -> str:
    return str(source) if isinstance(source, Path | str) else IN_MEMORY
