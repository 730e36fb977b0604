"""Order notes: repeatable, truthful, and the parts share nothing but the task."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import fields, replace

import pytest

from lora.data.reading.orders import _PARTS, make_orders
from lora.errors import ConfigError

FIELDS = ("customer", "city", "item", "quantity", "colour", "express")


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_every_note_says_what_its_json_says(part: str) -> None:
    for row in make_orders(part, 100):  # type: ignore[arg-type]
        note, answer = (turn["content"] for turn in row["messages"])
        found = json.loads(answer)
        assert tuple(found) == FIELDS
        for name in ("customer", "city", "colour"):
            assert found[name] in note
        urgent = any(words in note for words in _PARTS[part].urgent)
        assert found["express"] is urgent
        if found["quantity"] == 1:
            assert found["item"] in note


def test_the_same_arguments_give_the_same_notes_and_no_note_comes_twice() -> None:
    first = make_orders("train", 200, seed=1)
    assert first == make_orders("train", 200, seed=1)
    assert first != make_orders("train", 200, seed=2)
    assert len({row["messages"][0]["content"] for row in first}) == 200


PAIRS = list(itertools.combinations(_PARTS, 2))


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_two_parts_share_no_name_item_city_colour_or_phrasing(one: str, other: str) -> None:
    for field in fields(_PARTS[one]):
        ours, theirs = (set(getattr(_PARTS[part], field.name)) for part in (one, other))
        assert ours, field.name
        assert not ours & theirs, field.name
    for words in (customer_names, item_forms):
        assert not words(one) & words(other)


@pytest.mark.parametrize("part", ["validation", "test"])
def test_training_notes_share_no_words_with_other_parts(part: str) -> None:
    asked = _PARTS[part]
    said = "\n".join(row["messages"][0]["content"] for row in make_orders("train", 3000)).lower()
    assert all(city.lower() in said for city in _PARTS["train"].cities)  # enough notes to tell
    held = {*asked.cities, *asked.colours, *asked.urgent, *asked.patient}
    held |= customer_names(part) | item_forms(part)
    assert not [words for words in held if re.search(rf"\b{re.escape(words.lower())}\b", said)]


def test_every_word_of_the_other_parts_is_used() -> None:
    for part, count in (("validation", 60), ("test", 40)):
        notes = "\n".join(row["messages"][0]["content"] for row in make_orders(part, count))
        words = _PARTS[part]
        pieces = {*words.customers, *words.cities, *words.colours, *words.urgent, *words.patient}
        assert not [piece for piece in pieces if piece not in notes], part


def customer_names(part: str) -> set[str]:
    """First and last names, each alone."""
    return {name for customer in _PARTS[part].customers for name in customer.split()}


def item_forms(part: str) -> set[str]:
    """Each item, one and several of it."""
    return {form for item in _PARTS[part].items for form in item}


def test_an_unknown_part_and_too_many_notes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="Allowed: train, validation, test"):
        make_orders("tests", 1)  # type: ignore[arg-type]
    few = replace(
        _PARTS["validation"],
        customers=("Rosa Delgado",),
        cities=("Cairo",),
        items=(("door mat", "door mats"),),
        colours=("grey",),
    )
    monkeypatch.setitem(_PARTS, "validation", few)
    with pytest.raises(ConfigError, match="fewer different orders"):
        make_orders("validation", 1000)
