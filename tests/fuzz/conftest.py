"""Hostile inputs: what makes them, and what each one may cost.

Every input must end well or in a LoraError with words: within seconds of CPU time, and without
taking memory that the input's own size does not explain.
"""

from __future__ import annotations

import json
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lora.data.tokenizers.subword import TextTokenizer
from lora.decoder.decoder import build_decoder
from lora.decoder.families import decoder_config
from lora.errors import LoraError
from lora.pretrained.hf_weights import save_decoder

QUICK, LONG = 120, 1500
MAX_CPU_S = 8.0
MAX_NEW_BYTES = 600 * 2**20
"""Of address space in one trial: far above what inputs of a few kilobytes need."""

Fuzz = Callable[[st.SearchStrategy[Any], Callable[[Any], object]], None]


class Hung(BaseException):
    """An input took too long; no `except Exception` may hide it."""


@contextmanager
def limits() -> Iterator[None]:
    """Raise Hung after MAX_CPU_S of CPU time; let memory grow by MAX_NEW_BYTES at most."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hung(f"more than {MAX_CPU_S:.0f} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    former = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + MAX_NEW_BYTES
    handler = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (most, former[1]))
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, former)
        signal.signal(signal.SIGPROF, handler)


@pytest.fixture(params=[QUICK, pytest.param(LONG, marks=pytest.mark.slow)], ids=["quick", "long"])
def fuzz(request: pytest.FixtureRequest) -> Fuzz:
    """Return a function that tries a check on many values: all must pass or raise a LoraError.

    The quick run tries the same values each time, the long one others.
    """
    is_quick = request.param == QUICK

    def run(values: st.SearchStrategy[Any], check: Callable[[Any], object]) -> None:
        @settings(
            max_examples=request.param,
            deadline=None,
            database=None,
            derandomize=is_quick,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate, Phase.shrink],
        )
        @given(values)
        def trial(value: Any) -> None:
            with limits():
                try:
                    check(value)
                except LoraError as error:
                    said = str(error)
                else:
                    said = "nothing"
                assert said.strip()

        trial()

    return run


def json_values() -> st.SearchStrategy[Any]:
    """Any JSON value, small, with the odd ones among the likely."""
    odd = st.sampled_from(
        [None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, "", "\x00", "../../x"]
    )
    plain = odd | st.integers(-9, 99) | st.text(max_size=9) | st.floats()
    return st.recursive(
        plain,
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
        ),
        max_leaves=6,
    )


def changed_objects(valid: dict[str, Any], *, most: int = 3) -> st.SearchStrategy[dict[str, Any]]:
    """`valid` with some fields set to any JSON value, and some taken away."""
    fields = st.dictionaries(st.sampled_from(sorted(valid)) | st.text(max_size=9), json_values())
    taken = st.sets(st.sampled_from(sorted(valid)), max_size=1)

    def change(new: dict[str, Any], gone: set[str]) -> dict[str, Any]:
        picked = dict(list(new.items())[:most])
        return {k: v for k, v in {**valid, **picked}.items() if k not in gone}

    return st.builds(change, fields, taken)


def damaged_bytes(valid: bytes, *, begin: int = 0) -> st.SearchStrategy[bytes]:
    """`valid` cut, with bits flipped, bytes put in or overwritten: mostly near its beginning."""
    places = st.integers(begin, max(begin, len(valid) - 1)) | st.integers(
        begin, min(begin + 400, max(begin, len(valid) - 1))
    )
    huge = st.sampled_from(
        [b"\xff" * 8, b"\x00" * 8, b"\xff\xff\xff\x7f", struct.pack("<Q", 2**40)]
    )
    edits = st.one_of(
        st.tuples(st.just("cut"), places, st.just(b"")),
        st.tuples(st.just("flip"), places, st.integers(0, 7).map(lambda bit: bytes([1 << bit]))),
        st.tuples(st.just("put"), places, st.binary(min_size=1, max_size=16)),
        st.tuples(st.just("over"), places, st.binary(min_size=1, max_size=16) | huge),
    )

    def damage(changes: list[tuple[str, int, bytes]]) -> bytes:
        data = bytearray(valid)
        for kind, place, new in changes:
            if kind == "cut":
                del data[place:]
            elif kind == "flip" and place < len(data):
                data[place] ^= new[0]
            elif kind == "put":
                data[place:place] = new
            elif kind == "over":
                data[place : place + len(new)] = new
        return bytes(data)

    return st.lists(edits, min_size=1, max_size=4).map(damage)


def lying_headers(valid: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file whose header tells other names, types, shapes or places."""
    length = struct.unpack("<Q", valid[:8])[0]
    header: dict[str, Any] = json.loads(valid[8 : 8 + length])
    tensors = [name for name in header if name != "__metadata__"]
    sizes = st.sampled_from([0, 1, 2, 7, 2**20, 2**31, 2**40, 2**62, 2**63, 2**64, -1])
    lies = st.one_of(
        st.tuples(st.just("shape"), st.lists(sizes, max_size=4) | json_values()),
        st.tuples(st.just("data_offsets"), st.lists(sizes, max_size=3) | json_values()),
        st.tuples(
            st.just("dtype"), st.sampled_from(["F64", "I8", "BOOL", "F8_E5M2"]) | json_values()
        ),
        st.tuples(st.just("name"), st.text(max_size=20) | st.just("../../x")),
        st.tuples(st.just("gone"), st.none()),
    )

    def tell(told: list[tuple[str, tuple[str, Any]]]) -> bytes:
        changed = {name: dict(value) for name, value in header.items()}
        for name, (what, value) in told:
            if what == "gone":
                changed.pop(name, None)
            elif what == "name" and name in changed:
                changed[value] = changed.pop(name)
            elif name in changed:
                changed[name][what] = value
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + valid[8 + length :]

    return st.lists(st.tuples(st.sampled_from(tensors), lies), min_size=1, max_size=3).map(tell)


@pytest.fixture(scope="session")
def tiny_config() -> dict[str, Any]:
    """The config.json of `tiny_folder`."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 260,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_config: dict[str, Any]) -> Path:
    """A model's folder with a tokenizer of bytes and a chat template."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_decoder(build_decoder(decoder_config(tiny_config), seed=1), folder)
    special = ["<|end|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {word: number for number, word in enumerate([*special, *letters, "ab"])}
    backend = Tokenizer(models.BPE(vocab, [("a", "b")]))
    backend.add_special_tokens(special)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    TextTokenizer(
        backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|end|>",
        chat_template=template,
        stop_ids=(2,),
    ).save(folder)
    return folder


@pytest.fixture(scope="session")
def make() -> dict[str, Callable[..., st.SearchStrategy[Any]]]:
    """The strategies of this file, by name."""
    return {
        "json": json_values,
        "object": changed_objects,
        "bytes": damaged_bytes,
        "header": lying_headers,
    }
