"""What a model's directory holds beside weights and config: kept when a model is saved again.

Generation settings, padding side, maximum length, special tokens and named chat templates are the
base's; what training changed (the tokens, the template of the data) is put in their place.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lora.data.prompting.prompt_format import PROMPT_FORMAT_FILE
from lora.data.tokenizers.subword import TextTokenizer, load_tokenizer
from lora.runs.disk import atomic_write, disk_error, read_json

KEPT_FILES = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("spiece.model", "tekken.json", "chat_template.jinja", "chat_template.json"),
    *("additional_chat_templates", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)
"""Patterns of the files, and of one directory, that are copied from the base."""
MODEL_FILES = (
    *(*KEPT_FILES, PROMPT_FORMAT_FILE),
    *("config.json", "*.safetensors", "model.safetensors.index.json"),
)
"""Patterns of all that a saved model's directory holds."""
ADAPTER_FILES = (
    *(*KEPT_FILES, PROMPT_FORMAT_FILE),
    *("adapter_config.json", "adapter_model.safetensors"),
)
"""Patterns of all that a saved adapter's directory holds: never a model's config or weights."""
_WORDS = ("bos_token", "eos_token", "pad_token")


def save_tokenizer_files(tokenizer: TextTokenizer, base: Path, folder: Path) -> None:
    """Write into `folder` the tokenizer's files of the model in `base`, changed as `tokenizer` is.

    Files that need no change are copied byte for byte. Raises CheckpointError if the disk refuses.
    """
    if not (base / "tokenizer.json").is_file():
        tokenizer.save(folder)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _copy_files(base, folder)
    except OSError as error:
        raise disk_error(folder, error) from error
    former = load_tokenizer(base)
    if tokenizer.backend.to_str() != former.backend.to_str():
        atomic_write(folder / "tokenizer.json", tokenizer.backend.to_str().encode())
    now = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    now["pad_token"] = tokenizer.pad_token
    before = dict(zip(_WORDS, (former.bos_token, former.eos_token, former.pad_token), strict=True))
    changed = {word: now[word] for word in _WORDS if now[word] not in (None, before[word])}
    has_new_template = tokenizer.chat_template not in (None, former.chat_template)
    _change_tokens(folder, changed)
    if has_new_template:
        _change_template(folder, str(tokenizer.chat_template))
    if changed or has_new_template or not (folder / "generation_config.json").is_file():
        _add_stop_ids(folder, tokenizer)


def _copy_files(base: Path, folder: Path) -> None:
    for pattern in KEPT_FILES:
        for path in sorted(base.glob(pattern)):
            target = folder / path.name
            if path.is_dir():
                target.mkdir(exist_ok=True)
                for template in sorted(path.glob("*.jinja")):
                    shutil.copyfile(template, target / template.name)
            else:  # a link is followed: a hub's cache holds links to files elsewhere
                shutil.copyfile(path, target)


def _change_tokens(folder: Path, changed: dict[str, str | None]) -> None:
    if not changed:
        return
    _change(folder / "tokenizer_config.json", changed)
    if (folder / "special_tokens_map.json").is_file():
        _change(folder / "special_tokens_map.json", changed)


def _change_template(folder: Path, template: str) -> None:
    """Put `template` where the base has its own: a file, an entry among several, or a value."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        atomic_write(path, template.encode())
        return
    config = folder / "tokenizer_config.json"
    former = _read(config).get("chat_template")
    if isinstance(former, list):
        named = [t for t in former if isinstance(t, dict) and t.get("name") != "default"]
        _change(config, {"chat_template": [{"name": "default", "template": template}, *named]})
    else:
        _change(config, {"chat_template": template})


def _add_stop_ids(folder: Path, tokenizer: TextTokenizer) -> None:
    """Name the tokens that end an answer in the learned template, beside the base's own."""
    path = folder / "generation_config.json"
    settings = _read(path)
    former = settings.get("eos_token_id")
    known = former if isinstance(former, list) else [] if former is None else [former]
    missing = [number for number in tokenizer.stop_ids if number not in known]
    changes: dict[str, Any] = {"eos_token_id": [*known, *missing]} if missing else {}
    for key, number in (("bos_token_id", tokenizer.bos_id), ("pad_token_id", tokenizer.pad_id)):
        if key not in settings and number is not None:
            changes[key] = number
    if changes:
        _change(path, changes)


def _read(path: Path) -> dict[str, Any]:
    value = read_json(path) if path.is_file() else {}
    return value if isinstance(value, dict) else {}


def _change(path: Path, changes: dict[str, Any]) -> None:
    text = json.dumps({**_read(path), **changes}, indent=2, ensure_ascii=False) + "\n"
    atomic_write(path, text.encode())
