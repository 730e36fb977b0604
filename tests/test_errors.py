"""The errors' tree and the helpers that word messages."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path

import pytest

import lora.errors
from lora.adapters.peft_files import read_adapter_files
from lora.config import LoRAConfig
from lora.data.reading.readers import read_examples
from lora.data.tokenizers.characters import read_text_file
from lora.errors import ConfigError, Interrupted, LoraError, TrainingError, did_you_mean, gather
from lora.pretrained.hf_files import read_config
from lora.pretrained.sources import find_model
from lora.runs.directory import check_run_directory
from lora.runs.disk import reading
from lora.terminal import MAX_MESSAGE_CHARACTERS
from lora.training.out_of_memory import explain_out_of_memory

CHILDREN = [
    kind
    for _, kind in inspect.getmembers(lora.errors, inspect.isclass)
    if issubclass(kind, LoraError) and kind is not LoraError
]


@pytest.mark.parametrize("kind", CHILDREN)
def test_every_error_is_in_the_drawn_tree_with_its_built_in_parent(kind: type[LoraError]) -> None:
    drawn = [
        line for line in str(lora.errors.__doc__).splitlines() if f"── {kind.__name__}" in line
    ]
    built_in = [base for base in kind.__bases__ if not issubclass(base, LoraError)]
    assert len(drawn) == 1
    assert [f"({base.__name__})" in drawn[0] for base in built_in] == [True] * len(built_in)
    assert kind is Interrupted or len(built_in) == 1
    assert kind.__doc__


def test_the_drawn_tree_has_no_other_errors() -> None:
    assert str(lora.errors.__doc__).count("── ") == len(CHILDREN)


@pytest.mark.parametrize("kind", [kind for kind in CHILDREN if kind is not Interrupted])
def test_a_message_stays_as_it_was_written_also_in_a_copy(kind: type[LoraError]) -> None:
    error = kind("Cannot do this: of that. Try another.")
    for each in (error, copy.copy(error)):
        assert type(each) is kind
        assert str(each) == "Cannot do this: of that. Try another."


def test_ordinary_except_clauses_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rank=0"):
        LoRAConfig(rank=0)
    with pytest.raises(FileNotFoundError, match="missing"):
        find_model(str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError, match="missing"):
        read_config(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="missing"):
        read_adapter_files(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl"):
        read_examples(tmp_path / "missing.jsonl")
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        read_text_file(tmp_path / "missing.txt")
    with pytest.raises(FileNotFoundError, match="missing"):
        check_run_directory(tmp_path, "missing", resume=True)


def test_a_path_that_exists_and_does_not_fit_is_not_missing(tmp_path: Path) -> None:
    for read in (read_config, read_adapter_files, read_text_file):
        with pytest.raises(LoraError) as raised:
            read(tmp_path)
        assert not isinstance(raised.value, FileNotFoundError)


def test_what_an_error_says_survives_a_block_that_reads(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rank=0"), reading(tmp_path):
        LoRAConfig(rank=0)


def test_memory_that_ran_out_is_explained_once() -> None:
    with (
        pytest.raises(TrainingError) as raised,
        explain_out_of_memory(lambda: "again."),
        explain_out_of_memory(lambda: "in the step."),
    ):
        raise RuntimeError("CUDA out of memory")
    assert str(raised.value) == "Memory ran out in the step. (torch: CUDA out of memory)"


def test_the_nearest_word_is_offered() -> None:
    assert did_you_mean("q_prj", ["k_proj", "q_proj"]) == " Did you mean 'q_proj'?"


def test_nothing_is_offered_when_nothing_is_near() -> None:
    assert did_you_mean("q_prj", ["embedding"]) == ""
    assert did_you_mean("q_prj", []) == ""
    assert did_you_mean("data", ["data", "path"]) == ""  # itself is no advice


def test_the_allowed_words_may_be_any_iterable() -> None:
    assert did_you_mean("rnk", {"rank": 8}) == " Did you mean 'rank'?"


def test_all_faults_are_listed_with_what_to_do() -> None:
    assert gather(["a", "b"], "Two faults:", "Mend them.") == (
        "Two faults:\n  - a\n  - b\nMend them."
    )


def test_many_faults_are_cut_off_with_their_number() -> None:
    message = gather([f"fault {i}" for i in range(15)], "Faults:", "Mend them.", max_shown=3)
    assert "fault 2" in message
    assert "fault 3" not in message
    assert "… and 12 more" in message
    assert message.endswith("Mend them.")


def test_faults_of_megabytes_leave_room_for_the_others_and_the_advice() -> None:
    message = gather(["a" * 10**6, "the second"], "Faults:", "Mend them.")
    assert len(message) < MAX_MESSAGE_CHARACTERS
    assert "  - the second\nMend them." in message
    long = "b" * 1000
    assert long in gather([long], "A fault:", "Mend it.")


def test_a_word_of_megabytes_is_compared_with_nothing() -> None:
    assert did_you_mean("x" * 10**7, ["x" * 10**7]) == ""
