"""Which chat template is used: the one asked for, the model's own, or a plain one."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from pathlib import Path

from lora.data.chat.template import MAX_TEMPLATE_BYTES, ChatTemplate
from lora.data.tokenizers.subword import TextTokenizer, find_stop_ids
from lora.errors import DataError, DataNotFoundError

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
"""The format of conversations for models that have no chat template of their own."""


def choose_template(tokenizer: TextTokenizer, path: Path | None) -> tuple[TextTokenizer, str]:
    """Return the tokenizer with the template to use in it, and where that comes from, in words.

    The file `path` goes before the model's own template. A model that has none gets the plain one,
    PLAIN_TEMPLATE; save the returned tokenizer with the model, so that it is asked as it learned.

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
    return _with_template(tokenizer, source), "the plain format, for the model has no chat template"


def compile_template(tokenizer: TextTokenizer, now: datetime | None = None) -> ChatTemplate:
    """Return the tokenizer's chat template, with its special tokens.

    `now` is the time that templates with a date in them tell; None asks the clock. Raises DataError
    if there is no template, or it is no jinja.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            "A conversation was given, and the model has no chat template: give one with "
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
    """Return what the tokenizer itself puts before a plain text: a BOS token, or nothing."""
    plain = tokenizer.encode("a")
    full = tokenizer.encode("a", add_special_tokens=True)
    for place in range(len(full) - len(plain) + 1):
        if full[place : place + len(plain)] == plain:
            return full[:place]
    return []


def _with_template(tokenizer: TextTokenizer, source: str) -> TextTokenizer:
    stops = find_stop_ids(tokenizer.backend, tokenizer.eos_token, source, tokenizer.stop_ids)
    return dataclasses.replace(tokenizer, chat_template=source, stop_ids=stops)


def _read_template(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEMPLATE_BYTES + 1)
        if len(data) > MAX_TEMPLATE_BYTES:
            raise DataError(f"{path} has more than {MAX_TEMPLATE_BYTES:,} bytes: no template has.")
        return data.decode().removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")
    except OSError as error:
        kind = DataNotFoundError if isinstance(error, FileNotFoundError) else DataError
        raise kind(f"The chat template {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"The chat template {path} is not UTF-8: {error.reason}.") from None
