from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora.data.reading.readers import read_examples
from lora.errors import DataError

BOM = "\ufeff"


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(source: object) -> list[str | None]:
    return [example.text for example in read_examples(source)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "ü"}\n{"text": "b\\nc"}\n'),
        ("a.jsonl", f'{BOM}{BOM}{{"text": "ü"}}\r\n\r\n{BOM}{{"text": "b\\nc"}}'),
        ("a.ndjson", '{"text": "ü"}\n{"text": "b\\nc"}\n'),
        ("a.json", '[{"text": "ü"},\n {"text": "b\\nc"}]\n'),
        ("a.json", f'{BOM} {{"version": 1, "data": [{{"text": "ü"}}, {{"text": "b\\nc"}}]}}'),
        ("a.json", '{"train": [{"text": "ü"}, {"text": "b\\nc"}], "x": []}'),
        ("a.json", '{"text": "ü"}\n{"text": "b\\nc"}\n'),
        ("a.JSONL", '{"text": "ü"}\n{"text": "b\\nc"}\n'),
        ("a.csv", 'text,n\nü,1\n"b\nc",2\n'),
        ("a.csv", f'{BOM}n;text\r\n1;ü\r\n\r\n2;"b\nc"\r\n'),
        ("a.csv", 'text,"a\nname",,\nü,1,,\n"b\nc",2,,\n'),
        ("a.tsv", 'text\tn\nü\t1\n"b\nc"\t2\n'),
    ],
)
def test_tables_are_read(tmp_path: Path, name: str, content: str) -> None:
    assert texts(write(tmp_path / name, content)) == ["ü", "b\nc"]


def test_rows_have_their_file_and_line(tmp_path: Path) -> None:
    cases = {
        "a.jsonl": ('{"text": "a"}\n\n{"text": "b"}', [1, 3]),
        "a.json": ('[\n\n{"text":\n "a"},\n{"text": "b"}]', [3, 5]),
        "a.csv": ('text\n"a\nb"\nc\n', [2, 4]),
    }
    for name, (content, lines) in cases.items():
        path = write(tmp_path / name, content)
        assert [e.source for e in read_examples(path)] == [f"{path}:{line}" for line in lines]


def test_one_column_may_hold_the_delimiters_of_others(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.csv", 'text\na\tb; c\n"d, e"\n')) == ["a\tb; c", "d, e"]
    assert texts(write(tmp_path / "a.tsv", "text\na, b; c\n")) == ["a, b; c"]


def test_one_object_is_one_row(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.json", '{\n"text": "a"\n}\n')) == ["a"]


def test_parquet_is_read_without_the_nulls_that_tables_add(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    call = {"function": {"name": "f", "arguments": {"x": 1, "y": None}}}
    rows = [
        {"messages": [{"role": "user", "content": "a", "tool_calls": None}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = read_examples(tmp_path / "a.parquet")
    assert first.messages == ({"role": "user", "content": "a"},)
    assert second.messages is not None
    assert second.messages[0]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert second.source == f"{tmp_path / 'a.parquet'}:row 2"
    damaged = write(tmp_path / "b.parquet", b"PAR1 no")
    with pytest.raises(DataError, match=r"b\.parquet:row 1: cannot read as Parquet"):
        read_examples(damaged)


def test_rows_in_memory_are_read() -> None:
    rows = [{"text": "a"}, {"text": "b"}]
    assert texts(rows) == texts(iter(rows)) == ["a", "b"]
    assert [e.source for e in read_examples(rows)] == ["row 1", "row 2"]


def test_datasets_are_read_and_dicts_of_splits_refused() -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    assert texts(data) == ["a", "b"]
    splits = datasets.DatasetDict({"train": data, "test": data})
    with pytest.raises(DataError, match=r"DatasetDict with the keys train, test.*data\['train'\]"):
        read_examples(splits)


def test_a_text_file_is_one_example(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", f"{BOM}one\r\ntwo\r\n\r\nthree")
    (example,) = read_examples(path)
    assert example.text == "one\ntwo\n\nthree"
    assert example.is_file
    assert example.source == str(path)
    assert texts(str(path)) == [example.text]


def test_folders_of_texts_are_read_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "sub/c.txt", ".hidden/d.txt", "e.png"):
        write(tmp_path / name, name)
    assert texts(tmp_path) == ["a.md", "b.txt", "sub/c.txt"]


def test_tables_go_before_texts_and_other_parts_are_named(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl", "validation.jsonl", "more.jsonl"):
        write(tmp_path / name, json.dumps({"text": name}))
    write(tmp_path / "README.md", "read me")
    said: list[str] = []
    found = [e.text for e in read_examples(tmp_path, said.append)]
    assert found == ["more.jsonl", "train-0.jsonl", "train-1.jsonl"]
    assert said == [
        "skipped as texts beside tables: README.md",
        "not trained on, as validation data: validation.jsonl",
        "never trained on, as test data: test.jsonl (lora eval takes them)",
    ]


def test_all_faults_of_all_files_are_in_one_error(tmp_path: Path) -> None:
    write(
        tmp_path / "a.jsonl",
        b'{"text": "fine"}\n{"text": \n{"text": "\xff"}\n[1]\n{"texd": "x"}\n{"texd": "y"}\n'
        b'{"messages": [{"role": "boss", "content": ""}]}\n{"text": "\\ud800"}\n',
    )
    write(tmp_path / "b.jsonl", b"")
    write(tmp_path / "c.json", b'[{"text": "a"},\n{"text": "b"}\n{"text": "c"}]')
    write(tmp_path / "d.csv", b'text,n\na,1\nb\n"c\n\n,2\n')
    write(tmp_path / "e.csv", b"text\n\xe4\n")
    with pytest.raises(DataError) as raised:
        read_examples(tmp_path)
    message = str(raised.value)
    for words in (
        "a.jsonl:2: not JSON",
        "a.jsonl:3: byte 0xff is not UTF-8",
        "a.jsonl:4: the row is a list",
        "a.jsonl:5 and 1 more: the keys texd fit no format",
        "a.jsonl:7: messages[0] has the role 'boss'",
        "a.jsonl:8: text has '\\ud800'",
        "b.jsonl: the file is empty",
        "c.json:3: not JSON: a comma or the end of the list is missing",
        "d.csv:3: 1 fields, but the header names 2",
        "d.csv:4: not CSV: unexpected end of data",
        "e.csv:2: text has '\\udce4'",
    ):
        assert words in message
    assert "nothing was used" in message


def test_a_dozen_faults_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    rows = "".join(f'{{"key{n}": 1}}\n' for n in range(40))
    with pytest.raises(DataError, match=r"… and 28 more") as raised:
        read_examples(write(tmp_path / "a.jsonl", rows))
    assert str(raised.value).count("\n  - ") == 12


def test_reading_stops_when_everything_is_wrong() -> None:
    n_read = 0

    def endless() -> Iterator[dict[str, int]]:
        nonlocal n_read
        while True:
            n_read += 1
            yield {f"key{n_read}": 1}

    with pytest.raises(DataError, match="fit no format"):
        read_examples(endless())
    assert n_read == 1000


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "ab\ncd\xff".encode("latin-1"), r"a\.txt:2: byte 0xff is not UTF-8"),
        ("a.txt", "hello".encode("utf-16"), "looks like UTF-16: save it as UTF-8"),
        ("a.json", "\xfe[".encode("latin-1"), r"a\.json:1: byte 0xfe is not UTF-8"),
        ("a.txt", b" \n\n", "only white space"),
        ("a.jsonl", b"\n\n", "it has none. Add some rows"),
        ("a.csv", b"text\n", "it has none"),
        ("a.json", b"[]", "it has none"),
        ("a.json", b'[{"text": "a"}', "comma or the end of the list"),
        ("a.json", b"nonsense", r"a\.json:1: not JSON"),
        (
            "a.json",
            b'[{"text": "a"}]\n[{"text": "b"}]',
            r"a\.json:2: not JSON: there is more text after",
        ),
        ("a.json", b'{"data": [{"text": "a"}],\n"n": 1', r"a\.json:2: not JSON: .* at character 7"),
        ("a.json", b'{"data": [{"text": "a"}], "train": []}', "two lists of rows, data and train"),
        ("a.csv", "text,n\na,1\n".encode("utf-16"), r"a\.csv:1: .*looks like UTF-16"),
        ("a.csv", b"text,n,text\na,1,b\n", "a.csv:1: the header names 'text' more than once"),
        ("a.jsonl", b"[" * 200_000, r"a\.jsonl:1: not JSON"),
        ("a.xlsx", b"x", r"suffix is '\.xlsx'\. Allowed: \.jsonl"),
        ("a.jsonn", b"x", r"Did you mean '\.json"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_examples(write(tmp_path / name, content))


def test_an_unreadable_file_is_a_fault_like_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    write(tmp_path / "a.txt", "")
    write(tmp_path / "b.txt", "b")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(
        DataError, match=r"a\.txt: the file is empty\n.*b\.txt: .*Permission denied"
    ):
        read_examples(tmp_path)


@pytest.mark.parametrize(("source", "words"), [(None, "from null"), (3, "from a number")])
def test_sources_without_rows_are_refused(source: object, words: str) -> None:
    with pytest.raises(DataError, match=f"{words}. Allowed: a path, a list of dicts"):
        read_examples(source)  # type: ignore[arg-type]


def test_a_missing_path_is_an_error_with_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", "{}")
    with pytest.raises(DataError, match=r"no such file or folder. Did you mean 'data.jsonl'"):
        read_examples(tmp_path / "date.jsonl")
    with pytest.raises(DataError, match="no such file or folder"):
        read_examples(tmp_path / "no" / "x.jsonl")
    write(tmp_path / "pictures" / "a.png", "x")
    with pytest.raises(
        DataError, match=r"none of its 1 files has a known suffix\. Files there: a\.png\. Allowed"
    ):
        read_examples(tmp_path / "pictures")


def test_folders_of_arrow_files_are_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"Arrow files.*to_parquet.*load_from_disk"):
        read_examples(tmp_path / "saved")


def test_large_csv_fields_are_read_and_the_processs_limit_put_back(tmp_path: Path) -> None:
    import csv

    former = csv.field_size_limit()
    path = write(tmp_path / "a.csv", "text\n" + "x" * (former + 1) + "\n")
    assert len(texts(path)[0] or "") == former + 1
    assert csv.field_size_limit() == former


def test_cells_of_a_csv_file_may_hold_python_literals_and_flags(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    turns = "[{'from': 'Human', 'value': \"it's\"}, {'from': 'bard', 'value': 'a', 'weight': None}]"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["conversations", "tools", "weight"], [turns, "None", "0"]])
    (example,) = read_examples(path)
    assert [m["content"] for m in example.messages or ()] == ["it's", "a"]
    assert [m["role"] for m in example.messages or ()] == ["user", "assistant"]
    assert example.tools is None
    assert example.is_context


def test_a_flag_that_cannot_be_honoured_names_file_line_and_key(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b", "weight": 0.3}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a.jsonl:2: weight is 0.3: a loss flag must be"):
        read_examples(path)


def test_descriptions_beside_the_data_are_skipped_and_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"text": "a"}')
    write(tmp_path / "dataset_info.json", '{"a": {"file_name": "a.jsonl"}}')
    said: list[str] = []
    assert [e.text for e in read_examples(tmp_path, said.append)] == ["a"]
    assert said == ["skipped as descriptions of data: dataset_info.json"]


def test_files_of_unknown_suffixes_are_named_once(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"text": "a"}')
    for n in range(20):
        write(tmp_path / f"{n:02}.docx", "x")
    said: list[str] = []
    assert [e.text for e in read_examples(tmp_path, said.append)] == ["a"]
    (message,) = said
    assert message.startswith("skipped, with suffixes of no known format: 00.docx, 01.docx, ")
    assert message.endswith(" and 8 more")
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError, match=r"none of its 20 files .* Files there: 00\.docx, "):
        read_examples(tmp_path)
