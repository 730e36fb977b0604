"""Records with lists of records, and records that check themselves."""

from __future__ import annotations

from dataclasses import dataclass, field

from lora.runs.typed_json import Faults, parse, to_json


@dataclass
class Part:
    number: int
    """At least 0."""

    def __post_init__(self) -> None:
        if self.number < 0:
            raise ValueError(f"number is {self.number}, below 0")


@dataclass
class Whole:
    parts: list[Part]
    rungs: tuple[int, ...] = ()
    values: dict[str, list[int]] = field(default_factory=dict)


def test_lists_of_records_are_read_as_they_were_written() -> None:
    whole, faults = Whole([Part(1), Part(2)], (3, 4), {"a": [5]}), Faults()
    written = to_json(whole)
    assert written == {
        "parts": [{"number": 1}, {"number": 2}],
        "rungs": [3, 4],
        "values": {"a": [5]},
    }
    assert parse(Whole, written, "x.json", faults) == whole
    assert not faults


def test_what_a_record_refuses_is_a_fault_with_its_place() -> None:
    faults: Faults = []
    value = {"parts": [{"number": 1}, {"number": -2}], "rungs": [1, "2"], "values": {"a": [None]}}
    assert parse(Whole, value, "x.json", faults) is None
    assert faults[0] == "x.json: parts, number 2: number is -2, below 0"
    assert faults[1] == "x.json: rungs, number 2 is '2', not a whole number"
    assert faults[2].startswith("x.json: values: a, number 1 is None")
