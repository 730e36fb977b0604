"""Order notes: repeatable, truthful, and the parts share nothing but the task."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from lora.data.orders import _PARTS, FIELDS, make_orders
from lora.errors import ConfigError


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_every_note_says_what_its_json_says(part: str) -> None:
    for row in make_orders(part, 100):  # type: ignore[arg-type]
        note, answer = (turn["content"] for turn in row["messages"])
        fields = json.loads(answer)
        assert tuple(fields) == FIELDS
        for name in ("customer", "city", "colour"):
            assert fields[name] in note
        urgent = any(words in note for words in _PARTS[part].urgent)
        assert fields["express"] is urgent
        if fields["quantity"] == 1:
            assert fields["item"] in note


def test_the_same_arguments_give_the_same_notes_and_no_note_comes_twice() -> None:
    first = make_orders("train", 200, seed=1)
    assert first == make_orders("train", 200, seed=1)
    assert first != make_orders("train", 200, seed=2)
    assert len({row["messages"][0]["content"] for row in first}) == 200


def test_the_parts_share_no_name_item_city_colour_or_phrasing() -> None:
    parts = list(_PARTS.values())
    for number, one in enumerate(parts):
        for other in parts[number + 1 :]:
            for field in ("customers", "cities", "items", "colours", "phrasings"):
                assert not set(getattr(one, field)) & set(getattr(other, field)), field


def test_an_unknown_part_and_too_many_notes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="allowed are train, validation, test"):
        make_orders("tests", 1)  # type: ignore[arg-type]
    few = replace(
        _PARTS["validation"],
        customers=("Rosa Delgado",),
        cities=("Cairo",),
        items=(("door mat", "door mats"),),
        colours=("grey",),
    )
    monkeypatch.setitem(_PARTS, "validation", few)
    with pytest.raises(ConfigError, match="not so many"):
        make_orders("validation", 1000)
