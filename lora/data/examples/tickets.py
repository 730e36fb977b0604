"""Support tickets with the team that they belong to: classification."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora.data.reading.orders import Part
from lora.errors import ConfigError

LABELS = ("billing", "delivery", "account", "product")


@dataclass(frozen=True)
class _Words:
    """Building blocks of one part's tickets."""

    problems: Mapping[str, tuple[str, ...]]
    """By label."""
    openings: tuple[str, ...]
    closings: tuple[str, ...]
    items: tuple[str, ...]
    days: tuple[str, ...]


_TRAIN = _Words(
    problems={
        "billing": (
            "I was charged twice for the {item}.", "The invoice for {day} shows the wrong amount.",
            "My card was debited although the payment failed.", "Where do I find my receipt?",
            "You have not refunded the {item} that I sent back.", "The discount code was ignored.",
            "Please send the bill to my company and not to me.", "Why is there a fee of 4 euros?",
            "The tax on my bill is that of another country.", "I paid on {day}, and you remind me.",
        ),
        "delivery": (
            "The parcel with the {item} should have come on {day}.", "The courier left it outside.",
            "Tracking has not changed since {day}.", "My {item} went to my old street.",
            "Two boxes were sent and only one is here.", "Can you ship the {item} to Norway?",
            "The driver says nobody was at home on {day}.", "It has been in customs for a week.",
            "I need the {item} before {day}; is there an express?", "The box was open and half empty.",
        ),
        "account": (
            "I cannot log in since {day}.", "The link to reset my password has expired.",
            "Please change my e-mail address.", "Someone else has signed in under my name.",
            "I want to close my profile and have my data deleted.", "The code never reaches my phone.",
            "My profile shows another person's name.", "How do I add a second user?",
            "I was locked out after three attempts.", "Two profiles have the same address; join them.",
        ),
        "product": (
            "The {item} broke on {day}, after a week.", "A screw of the {item} is missing.",
            "The {item} makes a loud noise.", "Which batteries does the {item} take?",
            "The colour of the {item} is not that of the picture.", "The {item} smells of glue.",
            "Is the {item} safe for children?", "The handle of the {item} is loose.",
            "The {item} does not switch on any more.", "The manual of the {item} is in no language I read.",
        ),
    },
    openings=("", "Hello.", "Hi there,", "Good morning.", "To whom it may concern:", "Hi, a question:"),
    closings=(
        "", "Thank you.", "Please help.", "I am waiting for your answer.", "Regards, Mia",
        "This is the second time I write.", "Best, Tom",
    ),
    items=("kettle", "desk lamp", "backpack", "toaster", "radio", "office chair", "drill", "blender"),
    days=("Monday", "Tuesday", "Wednesday", "the third of May", "Easter"),
)  # fmt: skip
_VALIDATION = _Words(
    problems={
        "billing": (
            "There are two payments for one {item}.", "I was promised money back on {day}.",
            "The price at the checkout was lower than on the invoice.",
        ),
        "delivery": (
            "Nobody knows where my {item} is.", "It was to arrive on {day} and did not.",
            "The postman brought the parcel to my neighbour.",
        ),
        "account": (
            "My password is refused.", "I would like another user name.",
            "You say that my address is registered already, and it is not.",
        ),
        "product": (
            "The {item} has a crack.", "How do I clean the {item}?",
            "The switch of the {item} got stuck on {day}.",
        ),
    },
    openings=("", "Dear team,", "Good evening."),
    closings=("", "Kind regards.", "Please call me."),
    items=("fan heater", "suitcase", "coffee mill"),
    days=("Thursday", "New Year"),
)  # fmt: skip
_TEST = _Words(
    problems={
        "billing": (
            "The amount taken from my bank is too high.", "Please correct the invoice of {day}.",
            "My refund for the {item} is still missing.", "Can I pay in two parts?",
        ),
        "delivery": (
            "My order is late: I expected the {item} on {day}.", "The courier cannot find my house.",
            "The parcel is said to be delivered, and I have nothing.", "Do you send the {item} abroad?",
        ),
        "account": (
            "Signing in fails with an error.", "I have forgotten my password.",
            "Please delete my profile.", "The confirmation e-mail does not arrive.",
        ),
        "product": (
            "The {item} stopped working on {day}.", "A part of the {item} was not in the box.",
            "Does the {item} fit a shelf of 30 cm?", "The {item} gets too hot.",
        ),
    },
    openings=("", "Hey,", "Dear Sir or Madam,"),
    closings=("", "Many thanks.", "I would be glad of a quick answer."),
    items=("hair dryer", "bread box", "projector"),
    days=("Friday", "Sunday", "the tenth of June"),
)  # fmt: skip
_PARTS = {"train": _TRAIN, "validation": _VALIDATION, "test": _TEST}


def make_tickets(part: Part, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return `count` different rows with the keys text and label, as many of each label.

    The same arguments give the same rows. Raises ConfigError for more rows than exist.
    """
    words, draw = _PARTS[part], random.Random(f"tickets {part} {seed}")
    made: dict[str, dict[str, Any]] = {}
    for _ in range(50 * count):
        if len(made) == count:
            break
        label = LABELS[len(made) % len(LABELS)]
        parts = (draw.choice(words.openings), draw.choice(words.problems[label]))
        whole = " ".join(filter(None, (*parts, draw.choice(words.closings))))
        text = whole.format(item=draw.choice(words.items), day=draw.choice(words.days))
        made.setdefault(text, {"text": text, "label": label})
    if len(made) < count:
        raise ConfigError(
            f"Cannot make {count} tickets: the {part} part has fewer different ones. Ask for fewer."
        )
    return list(made.values())
