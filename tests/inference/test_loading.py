"""The base of an adapter is found from its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora.errors import ModelNotFoundError
from lora.inference.loading import describe_other_base, find_base_name, find_model_of
from lora.pretrained.sources import ADAPTER_CONFIG, DEFAULT_HUB_NAME, ModelSource


def make_adapter(folder: Path, base: object) -> Path:
    """Write an adapter's config that names `base`."""
    folder.mkdir(parents=True)
    (folder / ADAPTER_CONFIG).write_text(json.dumps({"base_model_name_or_path": base}))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_the_base_that_an_adapter_names_is_found(tmp_path: Path, base: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", str(base))
    assert find_model_of(None, adapter).folder == base
    assert find_model_of(str(base), None).folder == base


@pytest.mark.parametrize("named", [None, "", 3, DEFAULT_HUB_NAME])
def test_without_a_name_it_is_the_default_model(tmp_path: Path, named: object) -> None:
    assert find_base_name(make_adapter(tmp_path / "adapter", named)) is None
    assert find_base_name(tmp_path / "gone") is None


@pytest.mark.parametrize("given", [None, DEFAULT_HUB_NAME])
def test_the_run_tells_the_hubs_weights_from_the_default_models(
    tmp_path: Path, given: str | None
) -> None:
    adapter = make_adapter(tmp_path / "run" / "adapter", DEFAULT_HUB_NAME)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"model_source": given}))
    assert find_base_name(adapter) == given
    (tmp_path / "run" / "run.json").write_text("{")
    assert find_base_name(adapter) is None


def test_a_base_that_is_gone_is_named_with_what_to_give(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", "/models/gone")
    with pytest.raises(ModelNotFoundError, match=r"names '/models/gone'.*give it with --model"):
        find_model_of(None, adapter)


def test_a_mismatch_says_which_model_to_give(tmp_path: Path, base: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", str(base))
    other = ModelSource(tmp_path, "other", "/models/other")
    said = describe_other_base("other", adapter, other)
    assert said.endswith(f"leave --model out, or give --model {base}.")
    assert describe_other_base(None, adapter, ModelSource(base, "tiny", str(base))) == ""
    nameless = make_adapter(tmp_path / "nameless", None)
    assert "give that with --model" in describe_other_base(None, nameless, other)


def test_an_adapter_that_is_not_there_names_no_base(tmp_path: Path, base: Path) -> None:
    source = find_model_of(str(base), None)
    assert describe_other_base(str(base), tmp_path / "gone", source) == ""
    nameless = make_adapter(tmp_path / "adapter", None)
    assert "does not name its base" in describe_other_base(str(base), nameless, source)
