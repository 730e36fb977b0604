"""What a folder in 4 bits is, and which settings of `base_dtype` fit it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lora.config import BaseDtype, BaseWeights
from lora.errors import ConfigError, ModelError, gather
from lora.pretrained.hf_files import open_tensors, read_config
from lora.pretrained.load.architectures import describe_architecture
from lora.pretrained.quantised.methods import is_4bit, settings_of
from lora.pretrained.quantised.stored import StoredNf4, collect_packed
from lora.settings.checks import refuse_other_words


@dataclass(frozen=True)
class FolderIn4Bit:
    """A folder some of whose weights are in bitsandbytes' nf4."""

    folder: Path
    base: BaseWeights
    """As if it had been quantised here: the usual block size and kind of scales of its weights."""
    packed: frozenset[str]
    """Names of the weights in nf4, as the files have them; every other weight is plain."""

    def describe(self) -> str:
        """Return one line for the user."""
        scales = "double quantisation" if self.base.nf4_double_quant else "fp32 scales"
        return (
            f"base: already in nf4 (bitsandbytes, blocks of {self.base.nf4_block}, {scales}): "
            f"{len(self.packed)} weights are read as they are stored"
        )

    def settled(self, asked: BaseWeights) -> BaseWeights:
        """Return how the base is stored. Raises ConfigError for settings that it does not have."""
        if asked.base_dtype == "auto" or asked == self.base:
            return self.base
        if asked.base_dtype == "original":
            raise ConfigError(_no_others(self.folder, asked.base_dtype))
        own, seen = vars(self.base), vars(asked)
        wrong = [f"{name}={value!r}" for name, value in seen.items() if own[name] != value]
        has = ", ".join(f"{name}={own[name]!r}" for name in own if seen[name] != own[name])
        raise ConfigError(
            f"Cannot use {', '.join(wrong)} with {self.folder}: it is in 4 bits already, with "
            f"{has}, and packing it again would lose more. Leave the setting out (base_dtype=auto "
            "takes the folder as it is), or name the unquantised model."
        )


def find_4bit(folder: Path, *, needs_weights: bool = True) -> FolderIn4Bit | None:
    """Return what `folder` is if it is in 4 bits, else None; no weights are read.

    Without `needs_weights` a folder of config.json alone is what transformers writes by default,
    blocks of 64. Raises ModelError for weights that are quantised otherwise, damaged ones, and a
    config.json that says 4 bits of files without. One that does not say so, without any files, is
    refused only when its weights are loaded: other faults are then found before.
    """
    config = read_config(folder)
    says_so = is_4bit(config, describe_architecture(config))
    has_files = any(folder.glob("*.safetensors"))
    if not says_so and not (needs_weights and has_files):
        return None
    if not needs_weights and not has_files:
        is_double = settings_of(config).get("bnb_4bit_use_double_quant") is True
        return FolderIn4Bit(folder, BaseWeights("nf4", nf4_double_quant=is_double), frozenset())
    with ExitStack() as files:
        stored, faults = collect_packed(open_tensors(folder, files))
        packed = {n: weight for n, weight in stored.items() if isinstance(weight, StoredNf4)}
        if faults:
            raise ModelError(cannot_load(folder, faults))
        if says_so and not packed:
            raise ModelError(not_packed(folder))
        return describe_packed(folder, packed) if packed else None


def check_answer_dtype(asked: str) -> None:
    """Raise ConfigError for a word that is no base dtype to answer with."""
    refuse_other_words("base_dtype", asked, BaseDtype)


def is_folder_in_4bit(folder: Path, asked: BaseDtype) -> bool:
    """Whether the weights in `folder` are in 4 bits. Raises ConfigError if others are asked for."""
    if find_4bit(folder) is None:
        return False
    if asked not in ("auto", "nf4"):
        raise ConfigError(_no_others(folder, asked))
    return True


def _no_others(folder: Path, asked: str) -> str:
    return (
        f"Cannot use base_dtype={asked!r} with {folder}: its weights are in 4 bits, and there "
        "are no others. Allowed: auto, nf4. Or name the model that it was made from."
    )


def describe_packed(folder: Path, packed: Mapping[str, StoredNf4]) -> FolderIn4Bit:
    """Return what a folder with these weights is."""
    blocks = Counter(weight.block for weight in packed.values())
    doubles = Counter(weight.group > 0 for weight in packed.values())
    base = BaseWeights(
        "nf4",
        nf4_block=blocks.most_common(1)[0][0],
        nf4_double_quant=doubles.most_common(1)[0][0],
    )
    return FolderIn4Bit(folder, base, frozenset(packed))


def not_packed(folder: Path) -> str:
    """Return the message for a config.json that says 4 bits of files in which nothing is."""
    return (
        f"Cannot load {folder}: quantization_config in config.json says that weights are in 4 "
        "bits (bitsandbytes), and none in the files is. Remove quantization_config from "
        "config.json: they are then loaded as they are, and --base-dtype nf4 packs them."
    )


def cannot_load(folder: Path, faults: list[str]) -> str:
    """Return the message for tensors of `folder` that cannot be read."""
    heading = f"Cannot load {folder}: its weights in 4 bits (bitsandbytes) are damaged:"
    return gather(faults, heading, "Download the folder again, or name the unquantised model.")
