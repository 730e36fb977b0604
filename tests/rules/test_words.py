"""Words: phrases that the project does not use, each with the field's word for it.

A reader who knows PyTorch and PEFT should find every text by the word they would search for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Phrase:
    """What is not written, what to write instead, and an example of each."""

    pattern: str
    """A regular expression; a space in it matches any white space, line breaks included."""
    instead: str
    found: str
    """A text in which the pattern is found."""
    passes: str
    """A text with the same words that is fine."""

    def search(self, text: str) -> Iterator[re.Match[str]]:
        """Yield the places in `text` where the phrase stands."""
        # Between two words of a phrase a line may end, and a comment's or a string's next begin.
        gap = r"""(?:\s|"|'|\#)+"""
        return re.finditer(self.pattern.replace(" ", gap), text)


# Written in pieces where the words would break this file's own rule elsewhere; it is not checked.
PHRASES = (
    Phrase(r"\bmade again\b", "recomputed, or built again", "is made again", "made against"),
    Phrase(
        r"\bthe way back\b",
        "the backward pass, or the inverse",
        "on the way back",
        "wrote the file back",
    ),
    Phrase(r"(?i)\beight bits\b", "FP8, or 8-bit", "kept in eight bits", "in 8-bit AdamW"),
    Phrase(
        r"\btrain(?:s|ed|ing)? whole\b|\btrains_whole\b",
        "fully trained modules (modules_to_save), or full fine-tuning",
        "modules that train whole",
        "trained on the whole file",
    ),
    Phrase(r"\bwhat a person\b", "what it is", "what a person sees", "when a person asks"),
    Phrase(r"\bhears\b", "is called with", "`say` hears of it", "a heard message"),
    Phrase(r"(?i)\bmatrix products?\b", "matmul, or GEMM", "a matrix product", "a dot product"),
    Phrase(
        r"\bproducts in (?:bf16|fp\d+|float\d+)\b|\b(?:d?type) of the products\b",
        "matmuls; compute dtype",
        "products in fp8",
        "itertools.product",
    ),
    Phrase(
        r"\b(?:is|are|was|were|and) told\b|\| told\b|\btold (?:once|after \d|in words|within)\b",
        "is reported, or a warning says so",
        "the step is told",
        "bases that can be told apart",
    ),
    Phrase(
        r"\bsay: Callable|\bsay=|\bsay\(",
        "on_message",
        "say: Callable[[str], None]",
        "What to say: nothing.",
    ),
    Phrase(r"\b_?(?:LEAST|MOST)_[A-Z]", "MIN_, MAX_", "MOST_TOKENS = 3", "counter.most_common()"),
    Phrase(
        r"\bheld-out examples?\b|\bevaluation data\b",
        "validation data, or test data",
        "ten held-out examples",
        "the held-out loss",
    ),
    Phrase(
        r"\brows (?:of (?:a|one|each|the) (?:optimizer )?step|a step)\b",
        "batch size",
        "the rows of one step",
        "rows of the table",
    ),
    Phrase(
        r"\b(?:run|runs|sweep|comparison|training|candidate) (?:that )?(?:goes|go) on\b"
        r"|\bname the \w+ to go on with\b",
        "continue, or resume",
        "while a run goes on",
        "LoRA goes on every linear",
    ),
    Phrase(
        r"\bprocess(?:es)? (?:apart|of (?:its|their) own)\b",
        "subprocess, or its own process",
        "in a process of its own",
        "in its own process",
    ),
    Phrase(r"\bwhat came of\b", "result", "what came of it", "what came first"),
    Phrase(
        r"\b(?:was|were) asked (?:for|of)\b",
        '"Cannot X: Y. Allowed: Z. Try W."',
        "LoRA was asked for a layer",
        "the user was asked a question",
    ),
    Phrase(
        r"\bwere to train\b|\b(?:was|were) to be (?:saved|stacked|merged|written|added|loaded)\b",
        '"Cannot X: Y. Allowed: Z. Try W."',
        "a model was to be saved",
        "the loss was to be expected",
    ),
    Phrase(
        r"\b(?:ms|nats|tokens) a (?:step|token|second)\b",
        "per",
        "3 ms a step",
        "tokens per second",
    ),
    Phrase(r"\b(?:object|row|example) a line\b", "JSON lines", "one object a line", "a line each"),
    Phrase(r"\btoken rows?\b", "embedding rows", "the token rows", "model.token_rows"),
    Phrase(r"\bwhat passes\b", "scratch buffers", "what passes lies there", "what passed the test"),
    Phrase(
        r"\b(?:turns?|answers?|adapters?|data) (?:that )?(?:is|are) asked\b|\basks every\b",
        "is generated, or prompted",
        "every assistant turn is asked",
        "the user is asked",
    ),
    Phrase(
        r"\bcho(?:sen|oses) again\b",
        "picked for the memory that is free then",
        "chosen again beside the weights",
        "chosen for the run",
    ),
    Phrase(
        r"\bha(?:s|ve) no equal\b",
        "has no equivalent",
        "a key that has no equal",
        "no equal sign",
    ),
    Phrase(r"\banew\b", "again", "is written anew", "a new file"),
    Phrase(r"\bleft alone\b", "not changed, or ignored", "is left alone", "left out; alone"),
    Phrase(
        r"\bclass (?:Contest|Ended|Tried|Standing|Ending)\b|\bPassingRows\b|\bkept_memory\b",
        "a noun of the field",
        "class Tried:",
        "class RateTrial:",
    ),
)

CHECKED = ("lora/", "models/", "tests/", "benchmarks/", "docs/")
"""Beside these the Python files and Markdown pages at the top."""
NOT_CHECKED = ("tests/rules/test_words.py", "benchmarks/results/")
STILL_TO_COME: tuple[str, ...] = ()
"""Folders and files whose texts are not rewritten yet; in the end there are none."""
SUFFIXES = {".py", ".md", ".jinja", ".css", ".yaml", ".toml"}


def faults_in(path: str, text: str) -> list[str]:
    """Return `path:line: phrase: what to write` for each phrase in `text`.

    CHANGELOG.md may quote former names as code.
    """
    if path == "CHANGELOG.md":
        text = re.sub(r"`[^`\n]*`", "``", text)
    return [
        f"{path}:{text.count(chr(10), 0, found.start()) + 1}: {' '.join(found[0].split())!r}: "
        f"write {phrase.instead}"
        for phrase in PHRASES
        for found in phrase.search(text)
    ]


def test_no_text_has_a_phrase_that_is_not_used(root: Path, tracked: list[Path]) -> None:
    faults: list[str] = []
    for path in tracked:
        name = path.relative_to(root).as_posix()
        is_checked = name.startswith(CHECKED) or "/" not in name
        if (
            is_checked
            and path.suffix in SUFFIXES
            and not name.startswith((*NOT_CHECKED, *STILL_TO_COME))
        ):
            faults += faults_in(name, path.read_text(encoding="utf-8"))
    assert not faults, "\n".join(["the field has other words for these:", *faults])


@pytest.mark.parametrize("phrase", PHRASES, ids=lambda phrase: phrase.instead)
def test_each_phrase_is_found(phrase: Phrase) -> None:
    assert list(phrase.search(phrase.found))
    wrapped = "\n    # ".join(phrase.found.split(" "))
    assert list(phrase.search(wrapped)), "not found where a comment's line ends"


@pytest.mark.parametrize("phrase", PHRASES, ids=lambda phrase: phrase.instead)
def test_ordinary_words_pass(phrase: Phrase) -> None:
    everything = ". ".join(other.passes for other in PHRASES)
    assert not list(phrase.search(everything))


def test_a_fault_names_its_line_and_the_word_to_write() -> None:
    assert faults_in("a.md", "fine\nis made\nagain here") == [
        "a.md:2: 'made again': write recomputed, or built again"
    ]
    assert not faults_in("CHANGELOG.md", "`on_message=`, formerly `say=`")
    assert faults_in("CHANGELOG.md", "`x`: a warning\nis told")
