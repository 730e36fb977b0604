"""Rows that are too large or have a name twice, line ends, pipes: refused by file and line."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest

from lora.data.reading import faults, json_rows, tables
from lora.data.reading.readers import read_examples
from lora.errors import DataError

LIMIT = 2000


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the largest example one of 2,000 characters, and pieces of files 64."""
    for module in (faults, json_rows, tables):
        monkeypatch.setattr(module, "MAX_EXAMPLE_CHARACTERS", LIMIT)
    monkeypatch.setattr(json_rows, "_PIECE_CHARACTERS", 64)
    monkeypatch.setattr(tables, "_MAX_BATCH_BYTES", 4 * LIMIT)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize(
    ("name", "begin", "end", "where"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "', '"}\n{"text": "b"}\n', r"a\.jsonl:2"),
        ("a.jsonl", '{"text": "a"}\n{"text": "', '"}', r"a\.jsonl:2"),
        ("a.json", '[{"text": "a"},\n{"text": "', '"},\n{"text": "b"}]', r"a\.json:2"),
        ("a.json", '{"data": [\n{"text": "a"},\n{"text": "', '"}]}', r"a\.json:3"),
        ("a.json", '{"text": "', '"}', r"a\.json:1"),
        ("a.csv", "text,n\na,1\n", ",2\nb,3\n", r"a\.csv:3"),
        ("a.csv", 'text,n\na,1\n"', '",2\nb,3\n', r"a\.csv:3"),
        ("a.csv", "text,", "\na,b\n", r"a\.csv:1"),
    ],
)
@pytest.mark.parametrize("filler", ["x", "x\n"])
def test_an_example_that_is_too_large_is_refused_with_its_line(
    tmp_path: Path, name: str, begin: str, end: str, where: str, filler: str
) -> None:
    if filler == "x\n" and '"' not in begin.rpartition("\n")[2]:
        pytest.skip("a line end would end the row")
    if name.endswith(("json", "jsonl")):
        filler = json.dumps(filler)[1:-1]
    whole = write(tmp_path / name, begin + filler * (LIMIT // 4) + end)
    read_examples(whole)
    write(whole, begin + filler * (LIMIT + 10) + end)
    with pytest.raises(DataError, match=rf"{where}: .*more than 2,000 characters"):
        read_examples(whole)


@pytest.mark.usefixtures("small_limit")
def test_a_parquet_cell_that_is_too_large_is_refused_with_its_row(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"text": f"{n}" * 100} for n in range(100)]
    rows[40] = {"text": "x" * (2 * LIMIT)}
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=50)
    with pytest.raises(DataError, match=r"a\.parquet:row 41: the row has more than 2,000"):
        read_examples(path)
    parquet.write_table(pyarrow.Table.from_pylist(rows[:40] + rows[41:]), path)
    assert [e.text for e in read_examples(path)] == [r["text"] for r in rows[:40] + rows[41:]]


def test_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    values = pyarrow.array(["a", "b"])
    table = pyarrow.table([values, values], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: 'text' is the name of more than one column"):
        read_examples(tmp_path / "a.parquet")


def test_an_oversized_line_is_never_in_memory_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        for _ in range(4):
            file.write("[]," * (faults.MAX_EXAMPLE_CHARACTERS // 3))
        file.write("1]\n")
    tracemalloc.start()
    with pytest.raises(DataError, match=r"a\.jsonl:1: the row has more than 16,777,216"):
        read_examples(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * faults.MAX_EXAMPLE_CHARACTERS


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize(
    "text",
    [
        '[{"text": "ü😀\\ud83d\\ude00\\n"}, {"text": "b", "n": [-12.5e3, true, null]}]',
        '{"version": 12, "rows": [{"text": "a"}, {"text": "b"}]}',
        '{"rows": [{"text": "a"}, {"text": "b"}], "version": 12345, "notes": ["c"]}',
        '[{"text": "a"}, {"text": nul}]',
        '[{"text": "a"}\n{"text": "b"}]',
        '[{"text": "a"}, {"text": "b"}] 1',
        '[{"text": "a"}, {"text": "b"}',
        "[1234, 5]",
    ],
)
def test_where_a_file_is_cut_into_pieces_changes_nothing(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of every size from 1 give what one piece gives."""

    def outcome() -> object:
        try:
            return [example.text for example in read_examples(path)]
        except DataError as error:
            return str(error)

    path = write(tmp_path / "a.json", text)
    monkeypatch.setattr(json_rows, "_PIECE_CHARACTERS", 1000)
    whole = outcome()
    for size in range(1, len(text)):
        monkeypatch.setattr(json_rows, "_PIECE_CHARACTERS", size)
        assert outcome() == whole


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}', r"a\.jsonl:2: .*the key 'text'"),
        ("a.jsonl", '{"text": "b", "m": {"x": 1, "x": 1}}', r"a\.jsonl:1: .*the key 'x' more"),
        ("a.json", '[{"text": "a"},\n{"text": "b", "text": "c"}]', r"a\.json:2: .*'text' more"),
        ("a.json", '{"text": "b",\n "text": "c"}', r"a\.json:1: .*the key 'text' more"),
        ("a.json", '{"data": [{"text": "a"}],\n"data": [{"text": "b"}]}', "'data' more than once"),
        ("a.csv", "text,,\na,1,2\n", r"a\.csv:2: values in columns without a name \(2, 3\)"),
    ],
)
def test_names_given_twice_are_refused(tmp_path: Path, name: str, content: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_examples(write(tmp_path / name, content))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "a"}\r{"text": "b"}\r'),
        ("a.json", '{"text": "a"}\r{"text": "b"}\r'),
        ("a.json", '\ufeff[{"text": "a"},\r{"text": "b"}]\r'),
        ("a.csv", "text\ra\rb\r"),
    ],
)
def test_files_with_cr_line_ends_have_lines(tmp_path: Path, name: str, content: str) -> None:
    path = write(tmp_path / name, content)
    examples = read_examples(path)
    assert [example.text for example in examples] == ["a", "b"]
    assert examples[1].source in (f"{path}:2", f"{path}:3")


def test_a_pipe_is_called_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "63")
    with pytest.raises(DataError, match=r"63: it is a pipe or a device.*Write it to a file"):
        read_examples(tmp_path / "63")
