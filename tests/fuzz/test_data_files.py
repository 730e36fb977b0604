"""Data files of every format, damaged or of any content: examples, or one DataError."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from lora.config import DataConfig
from lora.data.chat.template import ChatTemplate
from lora.data.prepare import prepare_data
from lora.data.prompting.ask import Asker
from lora.data.prompting.prompt_format import PROMPT_FORMAT_FILE, read_prompt_format
from lora.data.prompting.row_template import parse_template
from lora.data.prompting.rules import rules_for
from lora.data.reading.formats import Example
from lora.data.reading.orders import make_orders
from lora.data.reading.readers import read_examples
from lora.data.tokenizers.subword import TextTokenizer, load_tokenizer

KEYS = (
    *("messages", "prompt", "completion", "instruction", "input", "output", "text", "chosen"),
    *("conversations", "from", "value", "role", "content", "tools", "system", "rejected", "data"),
    *("label", "question", "answer", "choices", "history", "segments"),
)
ROLES = ("system", "user", "assistant", "tool", "human", "gpt", "", "x")
ROWS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"prompt": "a", "completion": "b"},
    {"instruction": "a", "input": "b", "output": "c"},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"text": "a text"},
    {"text": "a text", "label": "b"},
    {"question": "a", "choices": ["b", "c"], "answer": "B"},
    {"segments": [{"text": "a", "label": False}, {"text": "b", "label": True}]},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> TextTokenizer:
    return load_tokenizer(tiny_folder)


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    return b"prompt,completion\r\n" + b"".join(
        f'"a, {number}","b ""{number}"""\r\n'.encode() for number, _ in enumerate(rows)
    )


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def files() -> dict[str, bytes]:
    chats = make_orders("train", 3)
    return {
        "x.jsonl": as_lines(chats),
        "x.json": json.dumps({"data": chats}).encode(),
        "x.csv": as_csv(chats),
        "x.tsv": as_csv(chats).replace(b",", b"\t"),
        "x.txt": "a text, naïve\n".encode(),
        "x.parquet": as_parquet(chats),
    }


@pytest.mark.parametrize("name", sorted(files()))
def test_damaged_files(name: str, fuzz: Any, make: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / name

    def check(data: bytes) -> None:
        path.write_bytes(data)
        assert all(isinstance(example, Example) for example in read_examples(path))

    fuzz(make["bytes"](files()[name]) | st.binary(max_size=60), check)


def rows(make: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Rows like real ones, with any JSON here and there."""
    turn = st.dictionaries(
        st.sampled_from(KEYS), st.sampled_from(ROLES) | make["json"](), max_size=3
    )
    value = st.lists(turn, max_size=4) | turn | make["json"]()
    free = st.dictionaries(st.sampled_from(KEYS), value, max_size=4)
    return free | st.sampled_from(ROWS) | st.sampled_from(ROWS).flatmap(make["object"])


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_any_rows_become_tokens_or_faults(
    name: str, fuzz: Any, make: dict[str, Any], tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    path, config = tmp_path / name, DataConfig(max_length=64, eval_fraction=0.0)

    def check(found: list[Any]) -> None:
        whole = name.endswith(".json")
        path.write_bytes(json.dumps(found).encode() if whole else as_lines(found))
        prepared = prepare_data(path, tokenizer, config, seed=1)
        assert prepared.train.n_target_tokens > 0

    fuzz(st.lists(rows(make), min_size=1, max_size=4), check)


def test_any_rows_in_memory(fuzz: Any, make: dict[str, Any], tokenizer: TextTokenizer) -> None:
    odd = st.sampled_from([b"x", 3 + 4j, object(), {1: 2}, float("nan"), "\ud800", ("a",)])
    turns = st.dictionaries(st.sampled_from(KEYS), odd | st.text(max_size=5), max_size=3)
    free = st.dictionaries(st.sampled_from(KEYS), st.lists(turns, max_size=3) | odd, max_size=4)
    config = DataConfig(max_length=64, eval_fraction=0.0)

    def check(found: list[Any]) -> None:
        prepare_data(found, tokenizer, config, seed=1)

    fuzz(st.lists(free | rows(make), min_size=1, max_size=4), check)


PIECES = (
    *("{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ messages }}", "{% if x %}"),
    *("{% endif %}", "{% set a = 'x' %}", "{% set a = a ~ a %}", "{{ a * 99999999 }}", "{{ a }}"),
    *("{{ range(9**9) | list }}", "{% for i in a %}", "{{ 'x'.ljust(10**11) }}", "{{ 1 / 0 }}"),
    *("{{ ''.__class__.__mro__ }}", "{{ raise_exception('no') }}", "{% generation %}"),
    *("{% endgeneration %}", "{{ '%99999999999d' % 1 }}", "{{ '{:>99999999999}'.format(1) }}"),
    *("{{ messages | tojson(indent=10**10) }}", "{% include 'x' %}", "{% import 'x' as y %}"),
    *("{{ a | center(10**11) }}", "{{ a | indent(10**11) }}", "{{ a.replace('', a) }}", "text"),
    *("{% macro b() %}", "{% endmacro %}", "{{ b() }}", "{% set ns = namespace(x=1) %}"),
    *("{{ 2 ** 99999999 }}", "{{ lipsum(10**9) }}", "{{ cycler }}", "{{ self }}", "{{ a | map }}"),
    *("{% filter upper %}", "{% endfilter %}", "{{ 99999999999 * [0] }}", "{{ [a, a] | join(a) }}"),
)


def test_any_chat_template(fuzz: Any) -> None:
    """Whatever it says, a template ends in text or in words, soon."""
    messages = ROWS[0]["messages"]

    def check(pieces: list[str]) -> None:
        ChatTemplate("".join(pieces)).render(messages)

    fuzz(st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=12), check)


TEMPLATE_PARTS = (
    "{text}",
    "{label}",
    "{",
    "}",
    "{{",
    "}}",
    "[[",
    "]]",
    " ",
    "a",
    r"\n",
    "{ }",
    "é",
)


def test_any_template_makes_texts_or_is_refused(fuzz: Any) -> None:
    def check(parts: list[str]) -> None:
        config = DataConfig(template="".join(parts))
        rules = rules_for(config, has_template=True)
        (example,) = read_examples([{"text": "a {x} [[b]]", "label": 1}], rules=rules)
        assert len(example.answers) == 1
        again = parse_template(str(rules.template and rules.template.source), has_escapes=False)
        assert again == rules.template

    fuzz(st.lists(st.sampled_from(TEMPLATE_PARTS), max_size=9), check)


def test_any_description_beside_the_data(fuzz: Any, make: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"a": [{"r": "u", "c": "hi"}, {"r": "b", "c": "ho"}], "b": "c"}]))
    names = st.sampled_from(["prompt", "response", "messages", "role_tag", "user_tag", "a", "b"])
    words = st.dictionaries(names, names | make["json"](), max_size=4) | make["json"]()
    entry = st.fixed_dictionaries(
        {"file_name": st.just("x.json")},
        optional={"columns": words, "tags": words, "formatting": st.just("sharegpt") | words},
    )

    def check(described: Any) -> None:
        text = json.dumps({"mine": described})
        (tmp_path / "dataset_info.json").write_text(text, encoding="utf-8")
        read_examples(path)

    fuzz(entry | make["json"](), check)


def test_any_record_of_the_prompts(fuzz: Any, make: dict[str, Any], tmp_path: Path) -> None:
    names = ("format_version", "style", "completions", "system", "template", "labels")
    values = st.sampled_from([1, "raw", "chat", "{a}", "{a} {b}", ["a"]]) | make["json"]()

    def check(record: Any) -> None:
        text = json.dumps(record)
        (tmp_path / PROMPT_FORMAT_FILE).write_text(text, encoding="utf-8")
        trained = read_prompt_format(tmp_path)
        rules_for(DataConfig(), has_template=True, trained=trained)
        assert trained is not None
        assert Asker(trained).describe() is not None

    fuzz(st.dictionaries(st.sampled_from(names), values, max_size=5) | make["json"](), check)
