"""What comes after training over nf4: the same loss in evaluation, answers, chats, other values."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import lora
from lora.adapters.apply import disabled_adapter
from lora.adapters.bases.unpack import unpack_base
from lora.cli import main
from lora.config import BaseWeights
from lora.decoder.quantised.base import base_kind, quantised_modules
from lora.errors import ConfigError
from lora.finetune import FinetuneResult
from lora.inference import base_weights
from lora.pretrained.hf_weights import load_decoder
from lora.runs.disk import read_json

IDS = torch.randint(3, 300, (1, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def done(tiny_folder: Path, orders_file: Path, tmp_path_factory: Any) -> FinetuneResult:
    settings: dict[str, Any] = {"steps": 4, "batch_size": 2, "rank": 4, "max_length": 128}
    return lora.finetune(
        str(orders_file),
        model=str(tiny_folder),
        out=str(tmp_path_factory.mktemp("runs")),
        name="nf4",
        eval_data=str(orders_file),
        base_dtype="nf4",
        nf4_block=32,
        save="last",
        **settings,
    )


def test_evaluation_gives_the_validation_loss_of_training(
    done: FinetuneResult, orders_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        model, tokenizer = lora.load_model(adapter=done.saved, device="cpu")
    assert caplog.messages == []
    assert base_kind(model) is None  # unpacked
    loss = lora.evaluate(model, tokenizer, orders_file).scores.loss
    assert loss == pytest.approx(done.result.eval_loss, rel=1e-6)
    packed, _ = lora.load_model(adapter=done.saved, device="cpu", base_dtype="nf4")
    assert {m.block for m in quantised_modules(packed).values()} == {32}  # type: ignore[attr-defined]
    assert lora.evaluate(packed, tokenizer, orders_file).scores.loss == pytest.approx(
        loss, rel=1e-6
    )
    # What is compared with the adapter has its values too.
    coded = load_decoder(read_base(done), base=BaseWeights(base_dtype="nf4", nf4_block=32))
    with torch.no_grad(), disabled_adapter(model):
        torch.testing.assert_close(model(IDS), coded(IDS))


def read_base(done: FinetuneResult) -> Path:
    return Path(read_json(done.saved / "adapter_config.json")["base_model_name_or_path"])


def test_other_values_are_taken_on_request_and_said(
    done: FinetuneResult, orders_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        model, tokenizer = lora.load_model(adapter=done.saved, device="cpu", base_dtype="original")
    assert "trained over a base in nf4 (blocks of 32" in " ".join(caplog.messages)
    loss = lora.evaluate(model, tokenizer, orders_file).scores.loss
    assert loss != pytest.approx(done.result.eval_loss, rel=1e-6)
    with pytest.raises(ConfigError, match=r"base_dtype='origin'.*Allowed: auto.*mean 'original'"):
        lora.load_model(adapter=done.saved, base_dtype="origin")  # type: ignore[arg-type]


def test_a_base_that_would_not_fit_stays_packed(
    done: FinetuneResult, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(base_weights, "MEMORY_FRACTION", 1e-9)
    with caplog.at_level(logging.WARNING):
        model, tokenizer = lora.load_model(adapter=done.saved, device="cpu")
    assert base_kind(model) == "nf4"
    assert "stays packed in nf4: unpacked it would take 0.0 GB" in " ".join(caplog.messages)
    assert isinstance(lora.generate(model, tokenizer, "3 lamps", max_new_tokens=2), str)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_it_takes_unpacked_is_known_from_the_packed_model(
    tiny_folder: Path, kind: Any
) -> None:
    base = BaseWeights(kind, nf4_embeddings=kind == "nf4")
    packed = load_decoder(tiny_folder, base=base)
    n_values = sum(p.numel() for p in load_decoder(tiny_folder).parameters())
    assert base_weights.unpacked_bytes(packed, torch.bfloat16) == 2 * n_values


def test_commands_take_the_word(
    done: FinetuneResult,
    orders_file: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    flags = ["--adapter", str(done.saved), "--device", "cpu"]
    losses = {}
    for word in ("auto", "original"):
        assert main(["eval", str(orders_file), *flags, "--base-dtype", word, "--json"]) == 0
        losses[word] = json.loads(capsys.readouterr().out)["adapter"]["loss"]
        assert ("logits differ" in " ".join(caplog.messages)) == (word == "original")
    assert losses["auto"] == pytest.approx(done.result.eval_loss, rel=1e-6)
    assert losses["original"] != losses["auto"]
    assert (
        main(["generate", "3 lamps", *flags, "--base-dtype", "nf4", "--max-new-tokens", "2"]) == 0
    )


def test_a_checkpoint_and_a_continued_run_name_the_base_too(
    done: FinetuneResult, orders_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        lora.load_model(adapter=f"{done.folder}@last", device="cpu")
        settings: dict[str, Any] = {"steps": 1, "batch_size": 2, "max_length": 128}
        settings |= {"from_adapter": done.saved, "out": str(done.folder.parent)}
        lora.finetune(str(orders_file), name="same", base_dtype="nf4", nf4_block=32, **settings)
        lora.finetune(str(orders_file), name="auto", **settings)
        assert "trained over" not in " ".join(caplog.messages)
        lora.finetune(str(orders_file), name="plain", base_dtype="original", **settings)
    assert "trained over a base in nf4 (blocks of 32" in " ".join(caplog.messages)


@pytest.mark.parametrize("is_packed", [True, False])
def test_a_model_in_memory_trains_over_nf4_and_names_it(
    done: FinetuneResult, tiny_folder: Path, orders_file: Path, tmp_path: Path, is_packed: bool
) -> None:
    model, tokenizer = lora.load_model(tiny_folder, device="cpu", base_dtype="nf4")
    if not is_packed:
        unpack_base(model, torch.float32)
    lora.apply_lora(model, lora.LoRAConfig(rank=2, init_seed=0))
    own = lora.train(
        model, tokenizer, str(orders_file), steps=2, batch_size=2, max_length=64, out=tmp_path
    )
    record = read_json(own.folder / "run.json")
    assert (record["base_dtype"], record["nf4"]["nf4_block"]) == ("nf4", 64)
    again, _ = lora.load_model(tiny_folder, adapter=own.saved, device="cpu")
    assert again.known_quantisation is not None
    with torch.no_grad():
        torch.testing.assert_close(again(IDS), model.eval()(IDS))


def test_tables_in_nf4_go_through_a_whole_run(
    tiny_folder: Path, orders_file: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"steps": 2, "batch_size": 2, "rank": 4, "max_length": 128}
    done = lora.finetune(
        str(orders_file),
        model=str(tiny_folder),
        out=str(tmp_path),
        name="tables",
        eval_data=str(orders_file),
        base_dtype="nf4",
        nf4_embeddings=True,
        **settings,
    )
    for word in ("auto", "nf4"):
        model, tokenizer = lora.load_model(adapter=done.saved, device="cpu", base_dtype=word)
        assert (base_kind(model) is None) == (word == "auto")
        loss = lora.evaluate(model, tokenizer, orders_file).scores.loss
        assert loss == pytest.approx(done.result.eval_loss, rel=1e-6)
    assert isinstance(lora.generate(model, tokenizer, "3 lamps", max_new_tokens=2), str)


def test_transformers_answers_with_the_same_values(
    done: FinetuneResult, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("transformers")
    with caplog.at_level(logging.WARNING):
        native, _ = lora.load_model(adapter=done.saved, device="cpu")
        theirs, _ = lora.load_model(adapter=done.saved, device="cpu", implementation="transformers")
    assert caplog.messages == []
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS), native(IDS), rtol=1e-4, atol=1e-5)
