"""Data sets of the hub: names, splits as parts, the cache of earlier downloads, no network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora.data.reading.readers import has_part, read_examples
from lora.data.sources import hub
from lora.data.sources.hub import HubName, parse_hub_name
from lora.errors import DataError, DataNotFoundError, DependencyError

NO_NETWORK = "no route to the hub"


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    hub.load_splits.cache_clear()
    yield
    hub.load_splits.cache_clear()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", HubName("owner/name")),
        ("owner/name:train", HubName("owner/name", split="train")),
        ("owner/name:main:train[:10]", None),
        ("owner/name:main:test", HubName("owner/name", "main", "test")),
        ("owner/name.jsonl", None),
        ("data.jsonl", None),
        ("/abs/olute", None),
        ("a/b/c", None),
    ],
)
def test_names_of_the_hub_are_told_from_paths(text: str, expected: HubName | None) -> None:
    assert parse_hub_name(text) == expected
    assert expected is None or parse_hub_name(Path(text)) == expected


def test_a_path_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    assert parse_hub_name("owner/name") is None  # a file of that directory, misspelt
    assert parse_hub_name("owner/name:train") == HubName("owner/name", split="train")
    with pytest.raises(DataNotFoundError, match="there is no such file or folder"):
        read_examples("owner/name")


def test_without_the_package_its_install_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"pip install 'lora-lm\[data\]'"):
        read_examples("owner/name")


@pytest.fixture(scope="module")
def tickets() -> Any:
    datasets = pytest.importorskip("datasets")
    classes = datasets.ClassLabel(names=["billing", "shipping"])
    features = datasets.Features({"text": datasets.Value("string"), "label": classes})
    rows = {"text": ["charged twice", "late"], "label": [0, 1]}
    return datasets.Dataset.from_dict(rows, features=features)


def answers(source: str, **more: Any) -> list[str]:
    return [str(e.completion).strip() for e in read_examples(source, **more)]


def test_splits_are_parts_and_classes_have_their_names(
    tickets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = {"train": tickets, "dev": tickets.select([1]), "test": tickets.select([0])}
    monkeypatch.setattr(hub, "_why_not_reached", lambda name: None)
    monkeypatch.setattr(hub, "_load", lambda name, config: splits)
    said: list[str] = []
    assert answers("owner/name", on_message=said.append) == ["billing", "shipping"]
    assert said[0] == "owner/name: the split train of train, dev, test"
    assert answers("owner/name", part="validation") == ["shipping"]
    assert answers("owner/name:test") == answers("owner/name", part="test") == ["billing"]
    assert has_part("owner/name", "validation")
    assert not has_part("owner/name:train", "validation")
    assert read_examples("owner/name")[1].source == "owner/name:train:row 2"
    with pytest.raises(
        DataError, match=r"no split 'tran'. Splits: train, dev.*Did you mean 'train"
    ):
        read_examples("owner/name:tran")


def test_without_the_hub_an_earlier_download_serves(
    tickets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(hub, "_why_not_reached", lambda name: NO_NETWORK)
    with pytest.raises(DataNotFoundError, match=f"{NO_NETWORK}.*no earlier download"):
        read_examples("owner/FineName")
    hub.load_splits.cache_clear()
    tickets.save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    folder = tmp_path / "owner___fine_name" / "default" / "0.0.0" / "abc"
    folder.mkdir(parents=True)
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test"):
        shutil.copy(arrow, folder / f"fine_name-{name}.arrow")
    assert answers("owner/FineName") == ["billing", "shipping"] * 2
    assert answers("owner/FineName:test") == ["billing", "shipping"]


def test_other_faults_of_the_package_are_told_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("datasets")

    def fail(name: str, config: str | None) -> None:
        raise ValueError("Config name is missing.\nPick one among: main, socratic")

    monkeypatch.setattr(hub, "_why_not_reached", lambda name: None)
    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(DataError, match=r"Config name is missing. Name a conf.*name:CONFIG:SPLIT"):
        read_examples("owner/name")


def test_a_connection_that_ends_during_the_download_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("datasets")
    broken = type("ReadError", (Exception,), {"__module__": "httpx"})
    errors = [broken("peer closed"), RuntimeError("a fault of ours")]

    def fail(name: str, config: str | None) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(hub, "_why_not_reached", lambda name: None)
    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(DataError, match=r"peer closed.*download the files"):
        read_examples("owner/name")
    with pytest.raises(RuntimeError, match="a fault of ours"):
        read_examples("owner/name")
