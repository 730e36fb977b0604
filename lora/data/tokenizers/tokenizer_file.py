"""tokenizer.json: loaded by the tokenizers library, with what it must not do switched off."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models

from lora.data.tokenizers.tokenizer_trial import check_tokenizer
from lora.errors import DataError

MAX_TOKENIZER_BYTES = 256 * 1024 * 1024
_PIECES = {"tokenizer.model", "spiece.model"}
_OTHER_FILES = _PIECES | {"vocab.json", "merges.txt", "vocab.txt", "tekken.json"}


def load_backend(path: Path) -> Tokenizer:
    """Return the tokenizer in the file `path`, tried in a subprocess the first time.

    Raises DataError if it is missing or damaged, with how to create one.
    """
    if not path.is_file():
        raise DataError(_missing(path.parent))
    try:
        size = path.stat().st_size
        if size > MAX_TOKENIZER_BYTES:
            raise DataError(
                f"Cannot load {path}: it has {size:,} bytes. Allowed: {MAX_TOKENIZER_BYTES:,}."
            )
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot load the tokenizer {path}: {error}.") from None
    check_tokenizer(path, data)
    try:
        return Tokenizer.from_str(text)
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, ValueError):
            raise  # the library raises bare Exception for a file that it cannot parse
        raise DataError(f"Cannot load the tokenizer {path}: {error}.") from None


def switch_sampling_off(backend: Tokenizer) -> list[str]:
    """Changes `backend` in place: the same text always becomes the same tokens. Returns notes."""
    model = backend.model
    if isinstance(model, models.BPE) and model.dropout:
        note = f"note: tokenizer.json's BPE dropout of {model.dropout:g} is off"
        model.dropout = None
    elif isinstance(model, models.Unigram) and (model.alpha or model.nbest_size):
        note = "note: tokenizer.json's sampling of subwords (alpha, nbest_size) is off"
        model.alpha = model.nbest_size = None
    else:
        return []
    return [f"{note}: rows would differ from run to run, and from what is learned"]


def _missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"Cannot load a tokenizer from {folder}: there is no such folder. Name another."
    names = {path.name for path in folder.iterdir()}
    found = sorted(names & _OTHER_FILES)
    seen = f"only {', '.join(found)}, which is not enough" if found else "no tokenizer"
    needs = " (and pip install sentencepiece protobuf)" if names & _PIECES else ""
    return (
        f"Cannot load a tokenizer from {folder}: it has {seen}. tokenizer.json is needed. Create "
        f"it once with transformers{needs}: AutoTokenizer.from_pretrained({str(folder)!r})"
        f".save_pretrained({str(folder)!r}). Tokenizers without a fast version in transformers are "
        "not supported."
    )
