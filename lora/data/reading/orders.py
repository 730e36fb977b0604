"""A synthetic task: order notes in many phrasings, with the JSON that they describe.

Names, items, cities and phrasings are split: those of the validation and test parts never occur in
training, so a right answer there is not memorised.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lora.errors import ConfigError

Part = Literal["train", "validation", "test"]

_NUMBER_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class _Words:
    """Building blocks of one part's notes."""

    customers: tuple[str, ...]
    cities: tuple[str, ...]
    items: tuple[tuple[str, str], ...]
    """Singular, plural."""
    colours: tuple[str, ...]
    phrasings: tuple[str, ...]
    urgent: tuple[str, ...]
    patient: tuple[str, ...]


# All combinations of first name and surname, and many of everything else: a model that sees each
# word only a few times learns to copy from the note, not to choose from a list.
_FIRST_NAMES = (
    "Amara", "Ben", "Chiara", "Daniel", "Elena", "Farid", "Greta", "Hiro", "Ines", "Jonas", "Kavya",
    "Liam", "Mei", "Nadia", "Oscar", "Priya", "Quentin", "Rania", "Stefan", "Tara", "Ugo", "Wendy",
    "Yara", "Zoltan", "Agnes", "Bruno", "Clara", "Dmitri", "Esther", "Femi", "Gloria", "Henrik",
)  # fmt: skip
_SURNAMES = (
    "Okafor", "Wallace", "Rossi", "Weber", "Petrova", "Haddad", "Lind", "Tanaka", "Costa", "Berg",
    "Rao", "Byrne", "Chen", "Karim", "Nilsson", "Nair", "Leroy", "Saleh", "Ilic", "Singh", "Ferrari",
    "Clark", "Mansour", "Kovacs", "Fischer", "Adeyemi", "Lopez", "Murphy", "Sato", "Virtanen",
    "Walker", "Zielinski",
)  # fmt: skip
_DELIVERIES = (
    "I need it", "It has to be there", "We want to have it", "Please deliver it", "It should arrive",
)  # fmt: skip
_SOON = (
    "today", "tonight", "tomorrow morning", "right away", "by noon", "within a day", "immediately",
)  # fmt: skip
_LATE = (
    "next month", "some day", "in spring", "before the year ends", "in a few weeks", "next year",
    "at your leisure",
)  # fmt: skip
_TRAIN = _Words(
    customers=tuple(f"{first} {last}" for first in _FIRST_NAMES for last in _SURNAMES),
    cities=(
        "Lisbon", "Hamburg", "Toronto", "Nairobi", "Kyoto", "Bergen", "Porto", "Denver", "Krakow",
        "Leeds", "Lyon", "Mumbai", "Quito", "Riga", "Seville", "Tunis", "Ankara", "Boston",
        "Geneva", "Hanoi", "Jakarta", "Perth", "Sofia", "Valencia", "Accra", "Basel", "Chicago",
        "Durban", "Edinburgh", "Florence", "Glasgow", "Havana", "Izmir", "Kampala", "Ljubljana",
        "Manila", "Nantes", "Osaka", "Prague", "Rotterdam", "Santiago", "Tallinn", "Uppsala",
        "Venice", "Wroclaw", "York", "Zagreb", "Auckland",
    ),
    items=(
        ("desk lamp", "desk lamps"), ("oak chair", "oak chairs"), ("notebook", "notebooks"),
        ("coffee mug", "coffee mugs"), ("wool scarf", "wool scarves"), ("backpack", "backpacks"),
        ("wall clock", "wall clocks"), ("bicycle bell", "bicycle bells"), ("tea towel", "tea towels"),
        ("picture frame", "picture frames"), ("garden hose", "garden hoses"), ("kettle", "kettles"),
        ("hair brush", "hair brushes"), ("candle", "candles"), ("leather belt", "leather belts"),
        ("umbrella", "umbrellas"), ("toy train", "toy trains"), ("book shelf", "book shelves"),
        ("tennis ball", "tennis balls"), ("bed sheet", "bed sheets"), ("glass vase", "glass vases"),
        ("lunch box", "lunch boxes"), ("pocket diary", "pocket diaries"), ("fruit basket", "fruit baskets"),
        ("winter glove", "winter gloves"), ("wine rack", "wine racks"), ("teapot", "teapots"),
        ("window blind", "window blinds"), ("shower curtain", "shower curtains"), ("cork board", "cork boards"),
        ("hiking boot", "hiking boots"), ("kitchen scale", "kitchen scales"), ("guitar strap", "guitar straps"),
        ("wrist watch", "wrist watches"), ("beach tent", "beach tents"), ("spice jar", "spice jars"),
    ),
    colours=(
        "red", "blue", "green", "black", "white", "yellow", "violet", "gold", "navy", "olive",
        "crimson", "ivory", "lilac", "maroon", "khaki", "teal",
    ),
    phrasings=(
        "{customer} from {city} would like {count} {item} in {colour}. {hurry}",
        "Please send {count} {colour} {item} to {customer} in {city}. {hurry}",
        "Order for {customer}, {city}: {count} {item}, colour {colour}. {hurry}",
        "{hurry} {customer} ({city}) has ordered {count} {item}; make them {colour}.",
        "We need {count} {colour} {item} delivered to {city}. The customer is {customer}. {hurry}",
        "Hi, this is {customer} calling from {city}. Could I get {count} {item}, {colour} ones? {hurry}",
        "{count} {item} ({colour}) for {customer}. Ship to {city}. {hurry}",
        "A note from {city}: {customer} wants {count} {item}, all {colour}. {hurry}",
        "Sold: {count} {item}, {colour}. Buyer: {customer}, {city}. {hurry}",
        "My name is {customer}, I live in {city} and I need {count} {item} in {colour}. {hurry}",
        "{hurry} {city} branch here, {customer} bought {count} {item}. Only {colour} is all right.",
        "Dear shop, I would love {count} {item}. My colour is {colour}. Yours, {customer}, {city}. {hurry}",
        "{item} again for {customer} in {city}, this time {count}, in {colour}. {hurry}",
        "City: {city}. Customer: {customer}. Item: {item}. Colour: {colour}. How many: {count}. {hurry}",
        "Is {colour} still there? Then {count} {item}, and the parcel goes to {customer} in {city}. {hurry}",
        "Yesterday {customer} saw our {item} and took {count}, {colour}, on the bill of the {city} office. {hurry}",
        "Parcel to {city}, {count} {item} inside, each one {colour}, and {customer} signs for it. {hurry}",
        "{hurry} That goes for {customer} of {city}, who chose {count} {colour} {item}.",
    ),
    urgent=(
        *(f"{start} {soon}." for start in _DELIVERIES for soon in _SOON),
        "It is urgent.", "Express delivery, please.", "As fast as you can.", "Rush this one.",
        "The sooner the better.", "Top priority!", "Please hurry.", "Use the fastest courier you have.",
        "Every hour counts.", "It should have been there yesterday.", "Do this one first.",
        "Speed matters here.", "An express parcel, whatever it costs.", "The deadline is close.",
        "Drop everything else.", "Quickly, please.", "We are running out of time.",
    ),
    patient=(
        *(f"{start} {late}." for start in _DELIVERIES for late in _LATE),
        "No hurry.", "Standard delivery is fine.", "Take your time.", "Normal shipping.",
        "Nothing urgent about it.", "The cheapest shipping, please.", "There is plenty of time.",
        "A slow parcel is all right.", "Do it on a quiet day.", "The date does not matter.",
        "It comes with the usual van.", "Economy shipping, please.", "Late is fine with us.",
        "Put it in with the next batch.", "The slowest courier is good enough.",
        "Do all the others first.", "A standard parcel, to keep it cheap.",
    ),
)  # fmt: skip
_VALIDATION = _Words(
    customers=(
        "Rosa Delgado", "Samir Aziz", "Tilda Holm", "Umar Sayed", "Vera Novak", "Will Mason",
        "Abel Moreno", "Celia Brandt",
    ),
    cities=("Antwerp", "Bogota", "Cairo", "Dublin", "Turin", "Utrecht", "Gdansk", "Malaga"),
    items=(
        ("door mat", "door mats"), ("rain coat", "rain coats"), ("soup bowl", "soup bowls"),
        ("flower pot", "flower pots"), ("hand mirror", "hand mirrors"), ("butter dish", "butter dishes"),
    ),
    colours=("purple", "grey", "orange", "beige"),
    phrasings=(
        "Could you ship {count} {item}, {colour}, over to {customer}? The address is in {city}. {hurry}",
        "{customer} rang: {count} {colour} {item} for the shop in {city}. {hurry}",
        "For {city}, attention {customer}: {item}, {colour}, quantity {count}. {hurry}",
        "Our friend {customer} has moved to {city}; let us post {count} {item} there, {colour} if you have them. {hurry}",
        "It is {customer} again. {count} of the {colour} {item}, same address in {city}. {hurry}",
    ),
    urgent=("They need it at once.", "Please use the express service.", "They are in a great hurry."),
    patient=("There is no rush.", "The ordinary post will do.", "Whenever it suits you."),
)  # fmt: skip
_TEST = _Words(
    customers=(
        "Xenia Popov", "Yusuf Demir", "Zoe Martin", "Andre Silva", "Bianca Moretti", "Caleb Stone",
        "Dina Farah", "Erik Dahl",
    ),
    cities=("Vienna", "Warsaw", "Zurich", "Oslo", "Naples", "Montreal", "Lima", "Helsinki"),
    items=(
        ("paper lantern", "paper lanterns"), ("steel ladder", "steel ladders"),
        ("bread knife", "bread knives"), ("floor cushion", "floor cushions"),
        ("travel pillow", "travel pillows"), ("sun hat", "sun hats"),
    ),
    colours=("pink", "brown", "silver", "turquoise"),
    phrasings=(
        "{customer} asks whether we can bring {count} {item} to {city}; the colour should be {colour}. {hurry}",
        "New order! {count} {colour} {item}, going to {city}, name of {customer}. {hurry}",
        "I am writing for {customer}. In {city} they are waiting for {count} {item} in {colour}. {hurry}",
        "Put down {count} {item} for {customer}, please, {colour} if possible, to be sent to {city}. {hurry}",
    ),
    urgent=("They cannot wait.", "Send it by express."),
    patient=("It can wait.", "Regular delivery is enough."),
)  # fmt: skip
_PARTS: dict[str, _Words] = {"train": _TRAIN, "validation": _VALIDATION, "test": _TEST}


def make_orders(part: Part, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return `count` different examples in the chat format: a note, and its JSON as the answer.

    The same arguments give the same examples. Raises ConfigError for an unknown part and for more
    examples than exist.
    """
    if part not in _PARTS:
        raise ConfigError(f"part={part!r}. Allowed: {', '.join(_PARTS)}.")
    draw = random.Random(f"{part} {seed}")
    made: dict[str, dict[str, Any]] = {}
    for _ in range(50 * count):
        if len(made) == count:
            return list(made.values())
        note, fields = _make_order(_PARTS[part], draw)
        answer = json.dumps(fields)
        turns = [{"role": "user", "content": note}, {"role": "assistant", "content": answer}]
        made.setdefault(note, {"messages": turns})
    raise ConfigError(f"count={count}: the {part} part has fewer different orders. Ask for fewer.")


def _make_order(words: _Words, draw: random.Random) -> tuple[str, dict[str, Any]]:
    quantity = draw.randint(1, 10)
    one, several = draw.choice(words.items)
    express = draw.random() < 0.5
    fields = {
        "customer": draw.choice(words.customers),
        "city": draw.choice(words.cities),
        "item": one,
        "quantity": quantity,
        "colour": draw.choice(words.colours),
        "express": express,
    }
    written = str(quantity) if draw.random() < 0.5 else _NUMBER_WORDS[quantity - 1]
    hurry: Sequence[str] = words.urgent if express else words.patient
    note = draw.choice(words.phrasings).format(
        **fields | {"item": one if quantity == 1 else several},
        count=written,
        hurry=draw.choice(hurry),
    )
    return note, fields
