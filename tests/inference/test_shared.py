"""Prompts and examples shared by several processes: the answers and the loss of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora.config import DataConfig, SamplingConfig
from lora.data.reading.formats import example_from_row
from lora.data.tokenizers.subword import TextTokenizer
from lora.decoder.decoder import Decoder
from lora.device import DeviceChoice
from lora.distributed.world import ALONE, World
from lora.errors import DataError
from lora.inference.evaluation import Evaluation, prepare_evaluation
from lora.inference.shared import generate_shared, in_order
from tests.distributed.processes import run_processes

TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
PROMPTS = [[n + 1] * (1 + n % 3) for n in range(7)]
GREEDY, SAMPLED = SamplingConfig(max_new_tokens=6), SamplingConfig(temperature=1, max_new_tokens=6)


def answers_and_scores(
    world: World, model: Decoder, tokenizer: TextTokenizer
) -> tuple[list[list[list[int]]], list[Evaluation], list[tuple[str, int, int]], str]:
    torch.manual_seed(world.rank)  # nothing may depend on it
    written = [
        generate_shared(model, PROMPTS, sampling, world, stop_ids=[7])
        for sampling in (GREEDY, SAMPLED)
    ]
    rows = [{"prompt": f"{n}?", "completion": "!" * (n % 4 + 1)} for n in range(19)]
    examples = [example_from_row(row, f"row {n}") for n, row in enumerate(rows)]
    ready = prepare_evaluation(examples, tokenizer, DataConfig(packing=False, max_length=32), 19)
    choice = DeviceChoice(torch.device("cpu"), torch.float32, "a test")
    told: list[tuple[str, int, int]] = []

    def tell(*progress: Any) -> None:
        told.append(progress)

    evaluated = [
        ready.evaluate(model, tokenizer, choice, sampling, tell, world)
        for sampling in (GREEDY, SAMPLED)
    ]
    with pytest.raises(DataError, match="prompt 4: it has token 999"):
        generate_shared(model, [*PROMPTS[:4], [999]], GREEDY, world)
    return written, evaluated, told, f"rank {world.rank}"


def test_three_processes_answer_and_score_as_one_does(
    byte_model: Callable[[int], Decoder], byte_tokenizer: Callable[[str], TextTokenizer]
) -> None:
    model, tokenizer = byte_model(2), byte_tokenizer(TEMPLATE)
    alone = answers_and_scores(ALONE, model, tokenizer)
    for answered in run_processes(3, answers_and_scores, model, tokenizer):
        assert answered[:2] == alone[:2]  # the losses to the bit
        assert answered[2][-1] == alone[2][-1] == ("answers", 19, 19)
    assert alone[0][0] != alone[0][1]


def test_dealt_items_come_back_in_order() -> None:
    assert in_order([[0, 3, 6], [1, 4], [2, 5]]) == list(range(7))
    assert in_order([[0], [], []]) == [0]
    assert in_order([[], []]) == []
