from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from lora.config import DataConfig
from lora.data.chat.choose_template import choose_template
from lora.data.reading.formats import Example, example_from_file, example_from_row
from lora.data.sequences import encode as module
from lora.data.sequences.documents import IGNORE
from lora.data.sequences.encode import encode_examples
from lora.data.sequences.encoded import EncodedExamples, check_has_targets
from lora.data.tokenizers.subword import TextTokenizer
from lora.errors import DataError

Turns = list[dict[str, Any]]
CHAT: Turns = [
    {"role": "user", "content": "What is 2 and 3?"},
    {"role": "assistant", "content": "The sum is 5.\n"},
    {"role": "user", "content": "And the dog?"},
    {"role": "assistant", "content": "  Lazy — ünï 漢🙂"},
]


def encode(
    rows: Sequence[dict[str, Any] | Example], tokenizer: TextTokenizer, **settings: Any
) -> EncodedExamples:
    examples = [
        row if isinstance(row, Example) else example_from_row(row, f"f:{n}")
        for n, row in enumerate(rows, 1)
    ]
    return encode_examples(examples, tokenizer, DataConfig(**settings))


def pieces(
    encoded: EncodedExamples, tokenizer: TextTokenizer, number: int = 0
) -> list[tuple[bool, str]]:
    """A document's text, cut where learned tokens begin and end."""
    ids, learned = encoded.documents.tokens(number)
    borders = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(ids)]
    return [
        (bool(learned[a]), tokenizer.decode(ids[a:b].tolist(), skip_special_tokens=False))
        for a, b in itertools.pairwise(borders)
    ]


def reference(tokenizer: TextTokenizer) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        chat_template=tokenizer.chat_template,
    )


@pytest.mark.parametrize(
    "name", ["chatml", "llama3", "mistral", "gemma", "zephyr", "marked", "thinking"]
)
@pytest.mark.parametrize("learn_on", ["assistant", "all"])
def test_tokens_of_chats_equal_transformers(
    bos_tokenizer: TextTokenizer, templates: dict[str, str], name: str, learn_on: str
) -> None:
    tokenizer = dataclasses.replace(bos_tokenizer, chat_template=templates[name])
    encoded = encode([{"messages": CHAT}], tokenizer, learn_on=learn_on)
    wanted = reference(tokenizer).apply_chat_template(CHAT, return_dict=False)
    assert encoded.documents.tokens(0)[0].tolist() == wanted
    assert wanted.count(tokenizer.bos_id) == (1 if "bos_token" in templates[name] else 0)
    if learn_on == "all":
        assert encoded.documents.tokens(0)[1].tolist() == [False] + [True] * (len(wanted) - 1)


def test_targets_of_generation_blocks_equal_transformers(
    tokenizer: TextTokenizer, templates: dict[str, str]
) -> None:
    tokenizer = dataclasses.replace(tokenizer, chat_template=templates["marked"])
    wanted = reference(tokenizer).apply_chat_template(
        CHAT, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, learned = encode([{"messages": CHAT}], tokenizer).documents.tokens(0)
    assert ids.tolist() == wanted["input_ids"]
    assert learned.astype(int).tolist() == wanted["assistant_masks"]


def test_answers_and_ends_of_turns_are_targets(chatml_tokenizer: TextTokenizer) -> None:
    encoded = encode([{"messages": CHAT}], chatml_tokenizer)
    assert pieces(encoded, chatml_tokenizer) == [
        (
            False,
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            "What is 2 and 3?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (True, "The sum is 5.\n<|im_end|>"),
        (False, "\n<|im_start|>user\nAnd the dog?<|im_end|>\n<|im_start|>assistant\n"),
        (True, "  Lazy — ünï 漢🙂<|im_end|>"),
        (False, "\n"),
    ]


def test_the_end_is_a_target_where_it_is_the_padding_too(
    bos_tokenizer: TextTokenizer, templates: dict[str, str]
) -> None:
    assert bos_tokenizer.pad_id == bos_tokenizer.eos_id
    tokenizer = dataclasses.replace(bos_tokenizer, chat_template=templates["zephyr"])
    rows = [{"messages": CHAT}, {"prompt": "p", "completion": "c"}, {"text": "t"}]
    encoded = encode(rows, tokenizer)
    learned = [text for is_learned, text in pieces(encoded, tokenizer) if is_learned]
    assert learned == ["The sum is 5.\n</s>", "  Lazy — ünï 漢🙂</s>"]
    assert [pieces(encoded, tokenizer, n)[-1] for n in (1, 2)] == [(True, "c</s>"), (True, "t</s>")]


def test_a_generation_block_that_leaves_the_end_out_learns_it_all_the_same(
    tokenizer: TextTokenizer,
) -> None:
    source = (
        "{% for m in messages %}<|im_start|>{% generation %}{{ m.content }}{% endgeneration %}"
        "<|im_end|>{{ '\\n' }}{% endfor %}"
    )
    tokenizer = dataclasses.replace(tokenizer, chat_template=source)
    encoded = encode([{"messages": CHAT[1:2]}], tokenizer)
    assert pieces(encoded, tokenizer)[1] == (True, "The sum is 5.\n<|im_end|>")


def test_plain_texts_have_one_bos_and_one_eos(
    tokenizer: TextTokenizer, bos_tokenizer: TextTokenizer
) -> None:
    rows = [{"text": "the dog"}, {"text": "<s>the dog</s>"}]
    encoded = encode(rows, bos_tokenizer)
    for number in (0, 1):
        assert pieces(encoded, bos_tokenizer, number) == [(False, "<s>"), (True, "the dog</s>")]
    first = reference(bos_tokenizer)("the dog")["input_ids"]
    assert encoded.documents.tokens(0)[0].tolist() == [*first, bos_tokenizer.eos_id]
    without = encode(rows[:1], tokenizer)  # this one has a BOS token, and never puts it there
    ids = without.documents.tokens(0)[0].tolist()
    assert ids == [*tokenizer.encode("the dog"), tokenizer.eos_id]


def test_a_tokenizer_without_ends_adds_none(tokenizer: TextTokenizer) -> None:
    bare = dataclasses.replace(tokenizer, eos_token=None, stop_ids=())
    ids = encode([{"text": "the dog"}], bare).documents.tokens(0)[0].tolist()
    assert ids == bare.encode("the dog")


def test_completions_are_targets_and_never_templated(chatml_tokenizer: TextTokenizer) -> None:
    row = {"prompt": "The capital of France is", "completion": " Paris."}
    encoded = encode([row, row], chatml_tokenizer)
    assert pieces(encoded, chatml_tokenizer) == [
        (False, "The capital of France is"),
        (True, " Paris.</s>"),
    ]
    everything = encode([row], chatml_tokenizer, learn_on="all")
    assert "".join(t for _, t in pieces(everything, chatml_tokenizer)) == (
        "The capital of France is Paris.</s>"
    )
    assert everything.documents.n_target_tokens == len(everything.documents.ids) - 1


def test_a_prompt_that_ends_in_a_word_has_the_tokens_with_which_it_is_asked(
    tokenizer: TextTokenizer,
) -> None:
    encoded = encode([{"prompt": "The cap", "completion": "ital of France"}], tokenizer)
    ids, learned = encoded.documents.tokens(0)
    apart = [*tokenizer.encode("The cap"), *tokenizer.encode("ital of France")]
    assert ids.tolist() == [*apart, tokenizer.eos_id]
    told = [text for is_learned, text in pieces(encoded, tokenizer) if is_learned]
    assert told == ["ital of France</s>"]
    assert learned.sum() < len(ids)


def test_instructions_use_the_chat_template_or_the_plain_format(
    chatml_tokenizer: TextTokenizer, tokenizer: TextTokenizer, bos_tokenizer: TextTokenizer
) -> None:
    row = {"instruction": "Name three.", "input": "colours", "output": "red"}
    chat = pieces(encode([row], chatml_tokenizer), chatml_tokenizer)
    assert chat[0][1].endswith("user\nName three.\n\ncolours<|im_end|>\n<|im_start|>assistant\n")
    assert chat[1] == (True, "red<|im_end|>")
    plain, origin = choose_template(tokenizer, None)
    assert "no chat template" in origin
    asked = "### Instruction:\nName three.\n\ncolours\n\n### Response:\n"
    found = pieces(encode([row], plain), plain)
    assert found == [(False, asked), (True, "red</s>"), (False, "\n\n")]
    plain, _ = choose_template(bos_tokenizer, None)
    assert pieces(encode([row], plain), plain)[0] == (False, "<s>" + asked)


LONG = " ".join(["the lazy dog"] * 40)


def test_long_texts_are_truncated(tokenizer: TextTokenizer) -> None:
    encoded = encode([{"text": LONG}, {"text": "the dog"}], tokenizer, max_length=16)
    whole = [*tokenizer.encode(LONG), tokenizer.eos_id]
    assert encoded.documents.tokens(0)[0].tolist() == whole[:16]
    assert encoded.lengths[0] == len(whole)
    counts = encoded.counts
    assert (counts.n_truncated, counts.n_split, counts.n_dropped) == (1, 0, 0)
    assert counts.n_cut_tokens == len(whole) - 16


def test_long_texts_are_split_and_every_token_is_a_target_once(tokenizer: TextTokenizer) -> None:
    encoded = encode([{"text": LONG}], tokenizer, max_length=16, long_examples="split")
    whole = np.array([*tokenizer.encode(LONG), tokenizer.eos_id])
    documents = encoded.documents
    assert documents.example_indices.tolist() == [0] * len(documents)
    assert np.diff(documents.starts).max() == 16
    assert documents.labels[documents.labels != IGNORE].tolist() == whole[1:].tolist()
    assert (encoded.counts.n_split, encoded.counts.n_cut_tokens) == (1, 0)


def test_long_texts_are_dropped(tokenizer: TextTokenizer) -> None:
    rows = [{"text": LONG}, {"text": "the dog"}]
    encoded = encode(rows, tokenizer, max_length=16, long_examples="drop")
    assert encoded.documents.example_indices.tolist() == [1]
    counts = encoded.counts
    assert (counts.n_dropped, counts.n_nothing_to_learn) == (1, 0)
    assert counts.n_cut_tokens == encoded.lengths[0]


def test_truncated_chats_keep_their_beginning_and_are_counted_without_an_answer(
    chatml_tokenizer: TextTokenizer,
) -> None:
    long_question = [{"role": "user", "content": LONG}, CHAT[1]]
    rows = [{"messages": CHAT}, {"messages": long_question}]
    n_tokens = int(encode(rows, chatml_tokenizer).lengths[0])
    encoded = encode(rows, chatml_tokenizer, max_length=n_tokens - 10)
    assert encoded.documents.example_indices.tolist() == [0]
    assert pieces(encoded, chatml_tokenizer)[0][1].startswith("<|im_start|>system\nYou are")
    assert (encoded.counts.n_truncated, encoded.counts.n_nothing_to_learn) == (2, 1)


def test_whole_files_are_always_split(tokenizer: TextTokenizer) -> None:
    file = example_from_file(LONG, "a.txt")
    for long_examples in ("truncate", "drop", "split"):
        encoded = encode([file], tokenizer, max_length=16, long_examples=long_examples)
        assert encoded.documents.n_target_tokens == encoded.lengths[0] - 1
        assert encoded.counts.n_split == 1


def test_large_files_are_tokenised_in_pieces_with_the_tokens_of_the_whole(
    bos_tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"line {n}\n{'  indented' * (n % 3)}\n\n\nThe dog — {n}é\n" for n in range(60))
    whole = [bos_tokenizer.bos_id, *bos_tokenizer.encode(text), bos_tokenizer.eos_id]
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 50)
    monkeypatch.setattr(module, "_PIECES_AT_ONCE", 3)
    encoded = encode([example_from_file(text, "a.txt")], bos_tokenizer, max_length=10_000)
    assert encoded.documents.tokens(0)[0].tolist() == whole


def test_texts_and_files_keep_the_order_of_the_examples(tokenizer: TextTokenizer) -> None:
    rows = [{"text": "one"}, example_from_file("two", "f"), {"text": "three"}]
    encoded = encode(rows, tokenizer)
    assert encoded.documents.example_indices.tolist() == [0, 1, 2]
    assert [pieces(encoded, tokenizer, n)[-1][1][-7:] for n in range(3)] == [
        *("ne</s>", "wo</s>", "ree</s>")
    ]


def test_examples_without_anything_to_learn_are_counted(
    chatml_tokenizer: TextTokenizer,
) -> None:
    rows = [{"text": " \n"}, {"messages": CHAT[:1]}, {"messages": CHAT}]
    encoded = encode(rows, chatml_tokenizer)
    assert encoded.documents.example_indices.tolist() == [2]
    assert encoded.counts.n_nothing_to_learn == 2
    check_has_targets(encoded, "assistant")


def test_nothing_at_all_to_learn_is_an_error_with_the_reasons(
    chatml_tokenizer: TextTokenizer,
) -> None:
    with pytest.raises(DataError, match=r"none of 1 examples .*no answers.*learn_on to 'all'"):
        check_has_targets(encode([{"messages": CHAT[:1]}], chatml_tokenizer), "assistant")
    cut = encode([{"messages": CHAT}], chatml_tokenizer, max_length=8)
    with pytest.raises(DataError, match="1 were truncated before their answers"):
        check_has_targets(cut, "assistant")
    dropped = encode([{"messages": CHAT}], chatml_tokenizer, max_length=8, long_examples="drop")
    with pytest.raises(DataError, match="1 were dropped as too long"):
        check_has_targets(dropped, "assistant")
    numbered = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    lost = encode(
        [{"messages": CHAT}], dataclasses.replace(chatml_tokenizer, chat_template=numbered)
    )
    with pytest.raises(DataError, match="2 answers cannot be located in the chat template"):
        check_has_targets(lost, "assistant")


def test_rejected_conversations_are_in_one_error_with_their_lines(
    tokenizer: TextTokenizer, templates: dict[str, str]
) -> None:
    tokenizer = dataclasses.replace(tokenizer, chat_template=templates["gemma"])
    system = {"messages": [{"role": "system", "content": "s"}, *CHAT]}
    rows = [{"messages": CHAT}, system, {"messages": CHAT[1:]}, system]
    with pytest.raises(DataError) as raised:
        encode(rows, tokenizer)
    assert "f:2 and 1 more: " in str(raised.value)
    assert "System role not supported" in str(raised.value)
    assert "f:3: " in str(raised.value)
    assert "Roles must alternate" in str(raised.value)


def test_conversations_without_a_template_are_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(DataError, match=r"no chat template\. .*choose_template"):
        encode([{"messages": CHAT}], tokenizer)


def test_progress_is_reported_after_a_while(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = [example_from_row({"text": "the dog"}, "f:1")] * 2000
    heard: list[float] = []
    encode_examples(examples, tokenizer, DataConfig(), heard.append)
    assert heard == []  # it was quick
    monkeypatch.setattr(module, "_QUIET_S", 0.0)
    monkeypatch.setattr(module, "_PROGRESS_EVERY_S", 0.0)
    encode_examples(examples, tokenizer, DataConfig(), heard.append)
    assert heard == sorted(heard)
    assert heard[-1] == 1.0
    assert len(heard) == 4


def test_flagged_answers_and_rows_are_never_targets(chatml_tokenizer: TextTokenizer) -> None:
    flagged = [CHAT[0], {**CHAT[1], "weight": 0}, *CHAT[2:]]
    rows = [{"messages": flagged}, {"text": "the dog", "train": False}, {"text": "the fox"}]
    encoded = encode(rows, chatml_tokenizer)
    assert encoded.documents.example_indices.tolist() == [0, 2]
    assert encoded.counts.n_nothing_to_learn == 1
    targets = "".join(text for is_target, text in pieces(encoded, chatml_tokenizer) if is_target)
    assert "Lazy" in targets
    assert "sum" not in targets


def test_flags_within_a_conversation_are_refused_if_every_token_is_learned(
    chatml_tokenizer: TextTokenizer,
) -> None:
    rows = [{"messages": CHAT}, {"messages": [CHAT[0], {**CHAT[1], "train": False}, *CHAT[2:]]}]
    with pytest.raises(DataError, match=r"f:2: messages\[1\].train turns off .*learn_on='all'"):
        encode(rows, chatml_tokenizer, learn_on="all")
    skipped = encode([{"messages": CHAT, "weight": 0}], chatml_tokenizer, learn_on="all")
    assert len(skipped.documents) == 0
