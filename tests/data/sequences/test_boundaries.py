"""Training and generation meet the same tokens where the prompt ends."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from tokenizers import Tokenizer

from lora.config import DataConfig
from lora.data.chat.prompts import example_prompt
from lora.data.inspection import inspect_data
from lora.data.reading.formats import example_from_row
from lora.data.sequences.encode import encode_examples
from lora.data.tokenizers.subword import TextTokenizer

PROMPTS = ("Q: ", "Q:", "What is it?\n\n", "The fox\n", "It is 12", "don'", "a\t", "x  ", "é ", " ")
ANSWERS = ("Ave", " Ave", "\nthe dog", "34", "t be", "  two", "\u0301", "🙂")


def check_meets(row: dict[str, object], tokenizer: TextTokenizer) -> None:
    example = example_from_row(row, "f:1")
    encoded = encode_examples([example], tokenizer, DataConfig(max_length=4096))
    ids, is_target = encoded.documents.tokens(0)
    asked = example_prompt(example, tokenizer)
    assert asked is not None
    n = len(asked.ids)
    assert ids[:n].tolist() == asked.ids, row
    assert not is_target[:n].any()
    assert is_target[n]


@pytest.mark.parametrize(
    "name", ["tokenizer", "bos_tokenizer", "smollm2_tokenizer", "prepends_a_space"]
)
@pytest.mark.parametrize(("prompt", "answer"), list(itertools.product(PROMPTS, ANSWERS)))
def test_a_trained_prompt_has_the_tokens_with_which_it_is_asked(
    request: pytest.FixtureRequest, sentencepiece: Tokenizer, name: str, prompt: str, answer: str
) -> None:
    if name == "prepends_a_space":
        tokenizer = TextTokenizer(sentencepiece, eos_token="</s>", stop_ids=(2,))
    else:
        tokenizer = request.getfixturevalue(name)
    check_meets({"prompt": prompt, "completion": answer}, tokenizer)


@pytest.mark.parametrize("answer", ["Ave", "  two", "\nthe dog", " \n x", "34"])
def test_the_last_answer_of_a_chat_meets_its_prompt(
    chatml_tokenizer: TextTokenizer, smollm2_tokenizer: TextTokenizer, answer: str
) -> None:
    turns = [{"role": "user", "content": "hi "}, {"role": "assistant", "content": answer}]
    for tokenizer in (chatml_tokenizer, smollm2_tokenizer):
        check_meets({"messages": turns}, tokenizer)


def test_long_prompts_are_compared_by_their_ends_alone(smollm2_tokenizer: TextTokenizer) -> None:
    long = "the lazy dog, " * 300
    for end in ("and so ", "\n\n", "word", "1234567890 " * 40, "x" * 300, "<|im_end|> "):
        check_meets({"prompt": long + end, "completion": "Ave"}, smollm2_tokenizer)


def test_texts_whose_tokens_meet_are_tokenised_whole(smollm2_tokenizer: TextTokenizer) -> None:
    rows = [
        {"prompt": "Q: the fox?", "completion": " the dog 🙂"},
        {"prompt": "", "completion": "a"},
    ]
    encoded = encode_examples(
        [example_from_row(row, "f:1") for row in rows], smollm2_tokenizer, DataConfig()
    )
    assert encoded.parted_prompts == {}
    whole = smollm2_tokenizer.encode(rows[0]["prompt"] + rows[0]["completion"])
    assert encoded.documents.tokens(0)[0][:-1].tolist() == whole


def test_the_inspection_tells_of_such_prompts(tokenizer: TextTokenizer) -> None:
    rows = [
        {"prompt": "Q:", "completion": " the"},
        {"prompt": "Capital: ", "completion": "the dog"},
    ]
    report = inspect_data(rows, dataclasses.replace(tokenizer), DataConfig())
    assert report.n_parted_prompts == 1
    (note,) = report.notes
    assert "1 of 2 examples have a prompt whose last tokens change with its answer" in note
    assert "as in row 2 with 'Capital: ' and 'the dog'" in note
