"""Packages that are also functions, and public names that are loaded on first use.

`lora.finetune` is a package, so that `from lora.finetune import FinetuneJob` works, and it is
called like the function of that name: `lora.finetune("orders.jsonl", rank=16)`. Importing any
module of a package sets the package as an attribute of its parent, so a function of the same name
could not stay there. Python's documentation gives the way out ("Customizing module attribute
access"): a module's `__class__` may be set to a subclass of ModuleType, here one with `__call__`.

    sys.modules[__name__].__class__ = CallablePackage
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import inspect


class CallablePackage(ModuleType):
    """A package that is called like the public function inside it that has the package's name.

    Only its `__all__` is listed by `dir` and `help`.
    """

    __all__: list[str]

    def __call__(self, *args: Any, **settings: Any) -> Any:
        """Call the function."""
        return self._function(*args, **settings)

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the function, for `inspect.signature` and what editors show."""
        import inspect  # here, because `import lora` would take twice as long with it

        return inspect.signature(self._function)

    def __dir__(self) -> list[str]:
        return sorted(self.__all__)

    @property
    def _function(self) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(self, self.__name__.rpartition(".")[2])
        return function


PEFT_NAMES = {
    "LoraConfig": "LoRAConfig",
    "LoraModel": "apply_lora",
    "PeftModel": "load_adapter",
    "PeftModelForCausalLM": "load_adapter",
    "get_peft_model": "apply_lora",
    "inject_adapter_in_model": "apply_lora",
    "add_adapter": "apply_lora",
    "disable_adapter": "disabled_adapter",
    "merge_and_unload": "merge_lora",
    "merge_adapter": "merge_lora",
    "unload": "remove_lora",
    "save_pretrained": "save_adapter",
    "from_pretrained": "load_model",
    "SFTTrainer": "finetune",
    "SFTConfig": "TrainConfig",
    "TrainerCallback": "Callback",
}
"""Names that users of PEFT and TRL look for, and what is here instead."""


def load_name(package: str, name: str, homes: Mapping[str, str]) -> Any:
    """Return the public name of a package from the module that `homes` gives for it.

    For the `__getattr__` of a package (PEP 562). Raises AttributeError for any other name, with
    what it is called here if it is one of PEFT's.
    """
    if name not in homes:
        ours = PEFT_NAMES.get(name)
        hint = f": here it is {ours!r}" if ours in homes else ""
        raise AttributeError(f"module {package!r} has no attribute {name!r}{hint}", name=name)
    return getattr(importlib.import_module(homes[name]), name)
