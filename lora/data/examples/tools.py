"""Conversations in which the assistant calls a tool, reads its result and answers."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from lora.data.reading.orders import Part
from lora.errors import ConfigError


def _tool(name: str, text: str, **parameters: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    function = {"name": name, "description": text, "parameters": schema}
    return {"type": "function", "function": function}


TOOLS = (
    _tool("weather", "The weather of a day in a city.", city="string", day="string"),
    _tool("convert_currency", "Convert money.", amount="number", source="string", target="string"),
    _tool("opening_hours", "When a shop is open on a day.", shop="string", day="string"),
)
_SKIES = ("sunny", "cloudy", "rainy", "windy", "foggy")
_CURRENCIES = ("EUR", "USD", "GBP", "JPY", "CHF", "SEK")


@dataclass(frozen=True)
class _Words:
    """Building blocks of one part's conversations."""

    weather: tuple[str, ...]
    money: tuple[str, ...]
    hours: tuple[str, ...]
    plain: tuple[tuple[str, str], ...]
    """A question that needs no tool, and its answer."""
    cities: tuple[str, ...]
    shops: tuple[str, ...]
    days: tuple[str, ...]


_TRAIN = _Words(
    weather=(
        "What is the weather in {city} on {day}?", "Do I need an umbrella in {city} on {day}?",
        "We travel to {city} on {day}. Will it rain?", "{day} in {city}: sun or clouds?",
    ),
    money=(
        "How much is {amount} {source} in {target}?", "Convert {amount} {source} to {target}.",
        "I have {amount} {source}. What do I get in {target}?",
        "A ticket costs {amount} {source}; what is that in {target}?",
    ),
    hours=(
        "When does {shop} open on {day}?", "Is {shop} open on {day}?",
        "Until when can I go to {shop} on {day}?", "Opening hours of {shop} on {day}, please.",
    ),
    plain=(
        ("Hello!", "Hello! How can I help?"), ("Thank you.", "You are welcome."),
        ("Who are you?", "I am an assistant that can look things up."),
        ("What can you do?", "I look up weather, opening hours and exchange rates."),
        ("Good night.", "Good night!"), ("How are you?", "I am fine. What can I do for you?"),
    ),
    cities=("Lisbon", "Hamburg", "Toronto", "Kyoto", "Bergen", "Denver", "Riga", "Quito", "Perth"),
    shops=("the bakery", "the library", "Miller's", "the pharmacy", "the post office"),
    days=("Monday", "Tuesday", "Wednesday", "Saturday", "Sunday"),
)  # fmt: skip
_VALIDATION = _Words(
    weather=("Tell me the forecast for {city}, {day}.", "Is {day} a warm day in {city}?"),
    money=("What are {amount} {source} worth in {target}?", "Change {amount} {source} into {target}."),
    hours=("At what time can I visit {shop} on {day}?", "Does {shop} work on {day}?"),
    plain=(("Hi.", "Hello! How can I help?"), ("Bye!", "Good bye!")),
    cities=("Turin", "Antwerp", "Cairo"),
    shops=("the bookshop", "Weber's"),
    days=("Thursday",),
)  # fmt: skip
_TEST = _Words(
    weather=("Will there be sun in {city} on {day}?", "How will {day} be in {city}?"),
    money=("I want to change {amount} {source}: how many {target} is that?", "{amount} {source} to {target}?"),
    hours=("From when to when is {shop} open on {day}?", "Can I shop at {shop} on {day}?"),
    plain=(("Good morning!", "Good morning! How can I help?"), ("Thanks a lot!", "You are welcome.")),
    cities=("Vienna", "Oslo", "Lima"),
    shops=("the garden centre", "the museum"),
    days=("Friday",),
)  # fmt: skip
_PARTS = {"train": _TRAIN, "validation": _VALIDATION, "test": _TEST}


def make_tool_chats(part: Part, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return `count` different conversations with `tools`, about one in five without a call.

    The same arguments give the same rows. Raises ConfigError for more rows than exist.
    """
    words, draw = _PARTS[part], random.Random(f"tools {part} {seed}")
    made: dict[str, dict[str, Any]] = {}
    kinds = (_weather, _money, _hours, _weather, _money, _hours, _plain)
    for _ in range(50 * count):
        if len(made) == count:
            break
        turns = draw.choice(kinds)(words, draw)
        made.setdefault(turns[0]["content"], {"messages": turns, "tools": list(TOOLS)})
    if len(made) < count:
        raise ConfigError(
            f"Cannot make {count} conversations: the {part} part has fewer different ones. Ask for "
            "fewer."
        )
    return list(made.values())


def _weather(words: _Words, draw: random.Random) -> list[dict[str, Any]]:
    given = {"city": draw.choice(words.cities), "day": draw.choice(words.days)}
    found = {"sky": draw.choice(_SKIES), "celsius": draw.randint(-5, 35)}
    answer = "It will be {sky} in {city} on {day}, with {celsius} degrees.".format(**given, **found)
    return _with_call(draw.choice(words.weather), "weather", given, found, answer)


def _money(words: _Words, draw: random.Random) -> list[dict[str, Any]]:
    source, target = draw.sample(_CURRENCIES, 2)
    amount = draw.choice((5, 12, 20, 35, 50, 80, 100, 250, 400))
    result = round(amount * draw.uniform(0.5, 2.0), 2)
    given = {"amount": amount, "source": source, "target": target}
    answer = f"{amount} {source} are {result} {target}."
    return _with_call(
        draw.choice(words.money), "convert_currency", given, {"amount": result}, answer
    )


def _hours(words: _Words, draw: random.Random) -> list[dict[str, Any]]:
    given = {"shop": draw.choice(words.shops), "day": draw.choice(words.days)}
    opens, closes = draw.randint(7, 11), draw.randint(15, 21)
    found = {"opens": f"{opens}:00", "closes": f"{closes}:00"}
    answer = "On {day} {shop} is open from {opens} to {closes}.".format(**given, **found)
    return _with_call(draw.choice(words.hours), "opening_hours", given, found, answer)


def _plain(words: _Words, draw: random.Random) -> list[dict[str, Any]]:
    question, answer = draw.choice(words.plain)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _with_call(
    question: str, name: str, given: dict[str, Any], found: dict[str, Any], answer: str
) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": name, "arguments": given}}
    return [
        {"role": "user", "content": question.format(**given)},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": json.dumps(found)},
        {"role": "assistant", "content": answer},
    ]
