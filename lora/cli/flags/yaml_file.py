"""Settings from a YAML file: names of flags, each once, with values as on the command line.

Values are read as they are written: `1e-3` is a number for a flag that takes numbers and a text for
one that takes texts, as on the command line. `null` and `~` mean no value. Settings may stand under
the group that they have in `--help` (`lora: {rank: 4}`), or flat.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora.cli.flags.from_fields import GROUP_KEYS
from lora.errors import ConfigError, did_you_mean, gather
from lora.runs.disk import os_reason
from lora.settings.peers import find_peer

if TYPE_CHECKING:
    import yaml

MAX_SETTINGS_BYTES = 1 << 20
MAX_SETTINGS_VALUES = 10_000
"""Values in one file, each counted wherever an alias repeats it."""

_NULL = "tag:yaml.org,2002:null"
_NEEDED = (
    "Write `name: value` lines with flags without leading dashes as names, for example `rank: 16`."
)


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings in the file `path` by flag, `-` for `_`, scalars as text or None.

    Raises ConfigError for a file that is no mapping of names to values, that gives a name twice,
    also as `batch_size` and `batch-size`, or that refers to itself.
    """
    import yaml

    try:
        root = yaml.compose(_read(path), Loader=yaml.SafeLoader)
    except OSError as error:
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = did_you_mean(path.name, names)
        raise _fault(path, f"{os_reason(error)}.{near} Name a YAML file.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _fault(path, f"not valid YAML: {error}") from None
    if not isinstance(root, yaml.MappingNode):
        raise _fault(path, f"not a mapping. {_NEEDED}")
    reader = _Reader()
    settings = reader.mapping(root, (), is_top=True)
    if reader.faults:
        raise ConfigError(gather(reader.faults, f"Cannot read the settings {path}:", _NEEDED))
    return settings


def flatten_groups(
    settings: dict[str, Any], group_of: Mapping[str, str], source: str
) -> dict[str, Any]:
    """Return `settings` with those that stand under a group (`lora: {rank: 4}`) on the top level.

    `group_of` has the group of each flag by its name with underscores. Raises ConfigError for a
    setting that stands under another group, or is given twice.
    """
    found: dict[str, Any] = {}
    faults: list[str] = []
    for key, value in settings.items():
        is_group = key in GROUP_KEYS and (value is None or isinstance(value, dict))
        if not is_group:
            pairs = {key: value}
        else:
            pairs = {name.replace("_", "-"): inner for name, inner in (value or {}).items()}
            faults += _misplaced(key, pairs, group_of)
        faults += [f"{name!r} is given twice. Keep one." for name in pairs.keys() & found.keys()]
        found |= pairs
    if faults:
        raise ConfigError(gather(faults, f"Cannot use {source}:", "Change these settings."))
    return found


def _misplaced(key: str, names: Iterable[str], group_of: Mapping[str, str]) -> list[str]:
    titles = {title: key for key, title in GROUP_KEYS.items()}
    faults = []
    for name in (each.replace("-", "_") for each in names):
        peer = None if name in group_of else find_peer(name)
        title = group_of.get(name if peer is None else str(peer.ours))
        if title is not None and title != GROUP_KEYS[key]:
            faults.append(f"{name!r} belongs under {titles[title]!r}, not under {key!r}.")
    return faults


def _read(path: Path) -> str:
    with path.open("rb") as file:  # a pipe as well as a file
        content = file.read(MAX_SETTINGS_BYTES + 1)
    if len(content) > MAX_SETTINGS_BYTES:
        raise _fault(path, f"longer than {MAX_SETTINGS_BYTES:,} bytes. Name a file of settings.")
    return content.decode("utf-8-sig")


def _fault(path: Path, what: str) -> ConfigError:
    return ConfigError(f"Cannot read the settings {path}: {what}")


class _Reader:
    """Nodes of a YAML file as dicts, lists, texts and None; faults are collected."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self._n_values = 0

    def mapping(
        self, node: yaml.MappingNode, above: tuple[int, ...], is_top: bool = False
    ) -> dict[str, Any]:
        seen: dict[str, str] = {}
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = f"line {key_node.start_mark.line + 1}"
            written = key_node.value
            if not isinstance(written, str) or key_node.tag == _NULL:
                self.faults.append(f"{line}: a name must be a text")
                continue
            if is_top and written.startswith("-"):
                near = written.lstrip("-")
                self.faults.append(f"{line}: {written!r} has leading dashes. Write {near!r}.")
                continue
            if key_node.tag.endswith(":merge"):
                self.faults.append(f"{line}: '<<' is not supported. Write the settings out.")
                continue
            name = written.replace("_", "-") if is_top else written
            if name in seen:
                again = "" if seen[name] == written else f" (as {seen[name]!r})"
                self.faults.append(f"{line}: {written!r} is given twice{again}. Keep one.")
            seen[name] = written
            found[name] = self._value(value_node, (*above, id(node)))
        return found

    def _value(self, node: yaml.Node, above: tuple[int, ...]) -> Any:
        import yaml

        line = f"line {node.start_mark.line + 1}"
        self._n_values += 1
        if id(node) in above:
            self.faults.append(f"{line}: the value refers to itself. Write it out.")
            return None
        if self._n_values > MAX_SETTINGS_VALUES:
            if self._n_values == MAX_SETTINGS_VALUES + 1:
                self.faults.append(f"{line}: more than {MAX_SETTINGS_VALUES:,} values")
            return None
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, above)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(each, (*above, id(node))) for each in node.value]
        return None if node.tag == _NULL else str(node.value)
