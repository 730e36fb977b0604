"""What a base in nf4 would save of a planned run, about: without a second plan."""

from __future__ import annotations

from torch import nn

from lora.decoder.decoder import Decoder
from lora.decoder.language_model import LanguageModel
from lora.decoder.quantised.base import base_kind
from lora.layers.quantised import LoRAQuantisedLinear
from lora.lora_module import LoRALinear

LINEARS = (nn.Linear, LoRALinear, LoRAQuantisedLinear)
"""What can be packed, or is packed already: codes of nf4 are no floating-point numbers."""

PACKED_BYTES = 0.5 + (1 + 4 / 256) / 64
"""Of a value: half a byte, and a byte for each block of 64 and four for 256 of these."""
UNPACKED_LINEARS = {"fast": 3, "captured": 1, "plain": 1}
"""Of the largest size, in the compute dtype at once: gate, up and down lie in the fast step's
scratch, other steps unpack one linear at a time."""


def nf4_saving(model: LanguageModel, step: str) -> int:
    """Return about how many bytes a base in nf4 would save; 0 where it has one, or can have none.

    `model` has no values: on the meta device, with LoRA applied or all of it trained.
    """
    weights = [m.weight for m in model.blocks().modules() if isinstance(m, LINEARS)]
    frozen = [w for w in weights if w.is_floating_point()]
    # What a folder in 4 bits leaves plain stays so; packed weights do not train.
    if not frozen or base_kind(model) == "nf4" or any(w.requires_grad for w in weights):
        return 0
    if isinstance(model, Decoder) and any(w.shape[1] % 2 for w in frozen):
        return 0
    largest = max(weight.nbytes for weight in frozen)
    packed = sum(weight.nbytes - round(PACKED_BYTES * weight.numel()) for weight in frozen)
    return max(0, packed - UNPACKED_LINEARS[step] * largest)
