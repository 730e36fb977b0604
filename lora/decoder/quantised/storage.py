"""What of a base is quantised, what is not, and the memory of each, in words."""

from __future__ import annotations

from torch import Tensor, nn

from lora.decoder.quantised.base import QuantisedWeight

MAX_NAMES = 4
"""Of matrices that are not quantised: more are counted."""


def describe_storage(model: nn.Module) -> str | None:
    """Return one line about a base of which linears are quantised; None for another one.

    Matrices that are not quantised are named by their last name.
    """
    seen: set[int] = set()
    n_packed = n_values = packed_bytes = plain_bytes = 0
    kinds: list[str] = []
    names: list[str] = []
    for name, module in model.named_modules():
        own: list[Tensor] = [*module.parameters(recurse=False), *_scales(module)]
        new = [t for t in own if id(t) not in seen]
        seen.update(map(id, new))
        if isinstance(module, QuantisedWeight) and any(t is module.weight for t in new):
            n_packed, n_values = n_packed + 1, n_values + module.in_features * module.out_features
            packed_bytes += sum(t.nbytes for t in new if t is not module.bias)
            kinds.append(module.kind)
        elif any(t.dim() > 1 for t in new):
            plain_bytes += sum(t.nbytes for t in new)
            names.append(name.rpartition(".")[2])
    if not n_packed:
        return None
    stored = (
        f"base in {', '.join(dict.fromkeys(kinds))}: {n_packed:,} matrices, "
        f"{8 * packed_bytes / n_values:.2f} bits a weight, {packed_bytes / 1e9:,.2f} GB"
    )
    kept = list(dict.fromkeys(names))
    if not kept:
        return stored
    more = f" and {len(kept) - MAX_NAMES} more" if len(kept) > MAX_NAMES else ""
    shown = ", ".join(kept[:MAX_NAMES])
    return f"{stored}; not quantised: {shown}{more}, {plain_bytes / 1e9:,.2f} GB"


def _scales(module: nn.Module) -> list[Tensor]:
    names = module.packed_names if isinstance(module, QuantisedWeight) else ()
    return [module.get_buffer(name) for name in names]
