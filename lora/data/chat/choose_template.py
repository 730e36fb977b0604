"""Choice of the chat template: the given one, the model's own, or a plain one."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from pathlib import Path

from lora.data.chat.template import MAX_TEMPLATE_BYTES, ChatTemplate
from lora.data.tokenizers.subword import TextTokenizer, find_stop_ids
from lora.errors import DataError, DataNotFoundError
from lora.runs.disk import os_reason

PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.tool_calls -%}
{{- raise_exception('the plain format has no tool calls: give a chat_template that has') -}}
{%- elif message.role == 'assistant' -%}
{{- '### Response:\\n' -}}
{%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}
{{- '\\n\\n' -}}
{%- elif message.role in ('system', 'developer') -%}
{{- message.content + '\\n\\n' -}}
{%- elif message.role == 'user' -%}
{{- '### Instruction:\\n' + message.content + '\\n\\n' -}}
{%- else -%}
{{- '### Result:\\n' + message.content + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}
"""
"""Chat template for models without one of their own."""
SHIPPED_TEMPLATES = {"smollm2-tools": "named SmolLM, trained by Hugging Face"}
"""Templates that come with the package, by name: for models whose own template has this text."""


def choose_template(tokenizer: TextTokenizer, path: Path | None) -> tuple[TextTokenizer, str]:
    """Return the tokenizer with the chosen template, and a description of the template's origin.

    `path`, a file or one of SHIPPED_TEMPLATES, takes precedence over the model's own template. A
    model without one gets
    PLAIN_TEMPLATE; save the returned tokenizer with the model, so that it is prompted as it was
    trained.

    Raises:
        DataError: the file cannot be read, or is too long.
    """
    if path is not None:
        return _with_template(tokenizer, _read_template(path)), f"the chat template in {path}"
    if tokenizer.chat_template is not None:
        return tokenizer, "the model's chat template"
    begin = "{{- bos_token -}}\n" if begin_ids(tokenizer) == [tokenizer.bos_id] else ""
    source = begin + PLAIN_TEMPLATE
    if tokenizer.eos_token is None:
        source = source.replace(" + eos_token", "")
    return _with_template(
        tokenizer, source
    ), "the plain format, because the model has no chat template"


def find_shipped_template(tokenizer: TextTokenizer) -> str | None:
    """Return the name of a template with tools that comes with the package for this model."""
    own = tokenizer.chat_template or ""
    return next((name for name, marker in SHIPPED_TEMPLATES.items() if marker in own), None)


def compile_template(tokenizer: TextTokenizer, now: datetime | None = None) -> ChatTemplate:
    """Return the tokenizer's chat template, compiled with its special tokens.

    `now` is the date for templates that print one; None uses the clock. Raises DataError if there
    is no template, or it is not valid jinja2.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            "Cannot format a conversation: the model has no chat template. Give one with "
            "chat_template, or use choose_template to get the plain format."
        )
    tokens = {
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
    }
    known = {key: token for key, token in tokens.items() if token is not None}
    return ChatTemplate(tokenizer.chat_template, known, now=now)


def begin_ids(tokenizer: TextTokenizer) -> list[int]:
    """Return the ids that the tokenizer adds before a plain text: a BOS token, or none."""
    plain = tokenizer.encode("a")
    full = tokenizer.encode("a", add_special_tokens=True)
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []


def _with_template(tokenizer: TextTokenizer, source: str) -> TextTokenizer:
    stops = find_stop_ids(tokenizer.backend, tokenizer.eos_token, source, tokenizer.stop_ids)
    return dataclasses.replace(tokenizer, chat_template=source, stop_ids=stops)


def _read_template(path: Path) -> str:
    if str(path) in SHIPPED_TEMPLATES and not path.exists():
        path = Path(__file__).with_name("templates") / f"{path}.jinja"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEMPLATE_BYTES + 1)
        if len(data) > MAX_TEMPLATE_BYTES:
            raise DataError(f"Cannot use {path}: it has more than {MAX_TEMPLATE_BYTES:,} bytes.")
        return data.decode().removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")
    except OSError as error:
        kind = DataNotFoundError if isinstance(error, FileNotFoundError) else DataError
        raise kind(f"Cannot read the chat template {path}: {os_reason(error)}.") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"Cannot read the chat template {path}: it is not UTF-8: {error.reason}."
        ) from None
