"""Models that no native decoder reads, from the command line: transformers' code runs them."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora
from lora.adapters.save_load import load_adapter
from lora.cli import main
from lora.config import DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.errors import ModelError, UnsupportedModelError
from lora.finetune.job import FinetuneJob
from lora.finetune.run import finetune
from lora.pretrained.load.models import load_language_model
from lora.pretrained.transformers_models.load import load_transformers_model
from lora.runs.disk import read_json
from lora.runs.progress import NoProgress
from tests.integration.conftest import make_tokenizer
from tests.pretrained.tiny_models import ARCHITECTURES, save_tiny_transformers, tiny_multimodal

transformers = pytest.importorskip("transformers")

POSITIONS = ("n_positions", "max_seq_len", "max_position_embeddings")
SHORT = "--max-length 96 --batch-size 4 --steps 3 --device cpu --no-report --samples 0"
TOKENS = torch.arange(3, 15)[None]


def save_model(folder: Path, name: str, **settings: Any) -> Path:
    """Write a tiny model with the tests' tokenizer, and room for long sequences."""
    own = {key: 512 for key in POSITIONS if key in ARCHITECTURES[name]}
    tokenizer = make_tokenizer()
    save_tiny_transformers(name, folder, vocab_size=tokenizer.vocab_size, **own, **settings)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def neox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "neox", "gpt_neox")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str, *words: object) -> int:
    return main([*command.split(), *map(str, words)])


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model = load_transformers_model(folder)
    if adapter is not None:
        load_adapter(model, adapter)
    with torch.no_grad():
        return model(TOKENS)


def test_a_gpt_neox_from_data_to_a_merged_model(
    neox: Path, orders_file: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", orders_file, "--model", neox]
    assert run(f"finetune {SHORT} --learning-rate 0.02 --name run", *given) == 0
    shown = capsys.readouterr()
    assert "no native decoder for 'gpt_neox'" in " ".join(shown.err.split())
    assert "lora merge" in shown.out
    assert "lora export" not in shown.out  # a GGUF file cannot be written
    record = read_json(here / "runs/run/run.json")
    assert (record["implementation"], record["data_config"]["packing"]) == ("transformers", True)
    assert run("generate hello --adapter runs/run --max-new-tokens 3 --device cpu") == 0
    assert "(as in its run)" in capsys.readouterr().err
    assert run("eval --adapter runs/run --json --device cpu", orders_file) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["adapter"]["loss"] < found["base"]["loss"]
    assert run("merge runs/run merged") == 0
    adapted = logits(neox, here / "runs/run/adapter")
    assert (logits(here / "merged") - adapted).abs().max() < 1e-5
    theirs = transformers.AutoModelForCausalLM.from_pretrained(here / "merged")
    with torch.no_grad():
        assert (theirs(TOKENS).logits - adapted).abs().max() < 1e-5
    assert (adapted - logits(neox)).abs().max() > 1e-3
    assert run(f"finetune {SHORT} --from-adapter runs/run --name more", *given) == 0
    capsys.readouterr()
    assert run("export x.gguf --adapter runs/run") == 2
    error = capsys.readouterr().err
    for words in ("this 'gpt_neox' model as GGUF", "llama, mistral", "convert_hf_to_gguf.py"):
        assert words in error
    assert not (here / "x.gguf").exists()


@pytest.mark.parametrize(
    ("name", "implementation"), [("gpt2", "native"), ("gpt2", "transformers"), ("gptj", "auto")]
)
def test_sequences_beyond_the_position_table_are_refused_before_the_weights(
    name: str,
    implementation: str,
    orders_file: Path,
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = save_model(here / name, name)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    config |= {key: 64 for key in POSITIONS if key in config}
    (folder / "config.json").write_text(json.dumps(config))
    given = ["--implementation", implementation, "--data", orders_file, "--model", folder]
    for command in (f"finetune {SHORT}", "sweep --rank 2,4 --max-length 96 --device cpu"):
        assert run(command, *given) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert f"this '{name}' model has position embeddings for 64 only" in error
        assert "Use --max-length 64" in error
        assert not (here / "runs").exists()


def test_a_killed_run_ends_with_the_same_bytes(
    neox: Path, orders_file: Path, tmp_path: Path
) -> None:
    job = FinetuneJob(
        data=orders_file,
        model=str(neox),
        lora=LoRAConfig(rank=2, dropout=0.1),
        train=TrainConfig(steps=6, batch_size=2, learning_rate=2e-2),
        data_config=DataConfig(max_length=96),
        run=RunConfig(out=tmp_path, name="run", eval_every_steps=3, save_every_steps=2),
    )
    whole = finetune(replace(job, run=replace(job.run, out=tmp_path / "whole")))

    class Killed(Exception):
        pass

    class Fragile(NoProgress):
        def step(self, step: int, loss: float, tokens_per_s: float, memory_bytes: int) -> None:
            if step == 5:
                raise Killed

    with pytest.raises(Killed):
        finetune(job, Fragile())
    resumed = finetune(replace(job, resume=True))
    for name in ("metrics.jsonl", "samples.jsonl", "adapter/adapter_model.safetensors"):
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_a_mamba_trains_without_packing_and_chats(
    orders_file: Path,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = ["--data", orders_file, "--model", save_model(here / "mamba", "mamba")]
    assert run(f"finetune {SHORT} --name run --special-tokens <|x|>", *given) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "packing is off for this 'mamba' model: its blocks are recurrent" in shown
    assert "the vocabulary grows from 400 to 401 rows" in shown
    assert read_json(here / "runs/run/run.json")["data_config"]["packing"] is False
    assert run(f"finetune {SHORT} --packing --name other", *given) == 2
    assert "Cannot pack the examples of this 'mamba' model" in capsys.readouterr().err
    assert not (here / "runs/other").exists()
    assert run("eval --adapter runs/run --packing --device cpu", orders_file) == 2
    assert "Cannot pack the examples of this 'mamba' model" in capsys.readouterr().err
    assert run("data --json", orders_file, "--model", here / "mamba") == 0
    assert json.loads(capsys.readouterr().out)["n_rows"] == 40
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n/adapter none\nagain\n/quit\n"))
    assert run("chat --adapter runs/run --max-new-tokens 2 --device cpu") == 0
    assert "base model" in capsys.readouterr().err


def test_a_sweep_trains_the_adapters_that_finetune_does(
    orders_file: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", orders_file, "--model", save_model(here / "falcon", "falcon")]
    words = SHORT.replace("--samples 0", "--learning-rate 0.02")
    assert run(f"sweep {words} --rank 2,4 --name swept", *given) == 0
    assert run(f"finetune {SHORT} --learning-rate 0.02 --rank 4 --name alone", *given) == 0
    assert read_json(here / "runs/swept/run.json")["implementation"] == "transformers"
    (candidate,) = (here / "runs/swept/candidates").glob("*4*")
    name = "adapter/adapter_model.safetensors"
    swept, alone = load_file(candidate / name), load_file(here / "runs/alone" / name)
    assert swept.keys() == alone.keys()
    for key, tensor in alone.items():
        torch.testing.assert_close(swept[key], tensor, atol=2e-4, rtol=1e-3)


def test_all_weights_of_an_opt_train_and_are_compared_with_lora(
    orders_file: Path, here: Path
) -> None:
    from lora.compare.config import CompareConfig
    from lora.compare.decoder_target import DecoderTarget
    from lora.compare.run import compare

    folder = save_model(here / "opt", "opt")
    target = DecoderTarget(orders_file, str(folder), data_config=DataConfig(max_length=96))
    config = CompareConfig(
        train=TrainConfig(steps=2, batch_size=2),
        run=RunConfig(out=here, name="both", samples=1, sample_tokens=2, device="cpu"),
        isolated=False,
    )
    done = compare(target, config)
    losses = {member.method: member.final_eval_loss for member in done.comparison.members}
    assert losses.keys() == {"lora", "full"}
    assert read_json(here / "both/run.json")["implementation"] == "transformers"
    full = here / "both/members/full/model"
    assert read_json(full.parent / "run.json")["implementation"] == "transformers"
    assert not torch.equal(logits(full), logits(folder))
    model, tokenizer = lora.load_model(full)
    assert lora.generate(model, tokenizer, "hello", max_new_tokens=2) is not None
    assert sorted(path.name for path in full.glob("*.safetensors")) == ["model.safetensors"]


def test_a_plan_has_the_weights_of_the_model(
    neox: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("plan --json --max-length 64 --device cpu --model", neox) == 0
    plan = json.loads(capsys.readouterr().out)
    model = load_transformers_model(neox)
    assert plan["full"]["parameters"] == sum(p.numel() for p in model.parameters())


def test_what_only_native_decoders_do_is_refused_by_name(
    neox: Path,
    orders_file: Path,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = ["--data", orders_file, "--model", neox]
    assert run("plan --devices 2 --parallel fsdp --model", neox) == 2
    error = capsys.readouterr().err
    assert "parallel='fsdp'" in error
    assert "with this 'gpt_neox' model: transformers runs it, where each process" in error
    monkeypatch.setattr("lora.cli.launch", lambda *_: pytest.fail("processes were started"))
    assert run(f"finetune {SHORT} --devices 2 --parallel fsdp", *given) == 2
    assert "parallel='fsdp'" in capsys.readouterr().err
    assert run(f"finetune {SHORT} --implementation native", *given) == 2
    assert "there is no native decoder for it" in capsys.readouterr().err
    assert os.listdir(here) == []


def test_a_native_family_runs_by_either_with_the_same_adapter(
    tiny_folder: Path, orders_file: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = FinetuneJob(
        data=orders_file,
        model=str(tiny_folder),
        train=TrainConfig(steps=3, batch_size=2, learning_rate=2e-2),
        data_config=DataConfig(max_length=96),
        run=RunConfig(out=here, name="native", samples=0),
    )
    native = finetune(job)
    other = replace(job, implementation="transformers", run=replace(job.run, name="theirs"))
    theirs = finetune(other)
    assert abs(native.result.eval_loss - theirs.result.eval_loss) < 1e-4
    one, two = (load_file(d.saved / "adapter_model.safetensors") for d in (native, theirs))
    assert one.keys() == two.keys()
    fp8 = (
        finetune(replace(each, base_dtype="fp8", run=replace(job.run, name=f"fp8-{n}")))
        for n, each in enumerate((job, other))
    )
    losses = [done.result.eval_loss for done in fp8]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert abs(losses[0] - native.result.eval_loss) > 1e-4
    assert run("export x.gguf --adapter", theirs.saved) == 0  # a native decoder writes the file
    assert "read back and compared" in capsys.readouterr().out
    with pytest.raises(UnsupportedModelError, match="as GGUF"):
        lora.export("y.gguf", adapter=theirs.saved, implementation="transformers")


def multimodal(folder: Path) -> Path:
    tokenizer = make_tokenizer()
    settings = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 512}
    tiny_multimodal(**settings).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.mark.parametrize("full", [False, True])
def test_of_a_multimodal_model_the_text_part_trains(
    full: bool, orders_file: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = multimodal(here / "gemma3")
    words = f"finetune {SHORT} --name run" + (" --full" if full else "")
    assert run(words, "--data", orders_file, "--model", folder) == 0
    assert "of this multimodal model the text part is used" in " ".join(
        capsys.readouterr().err.split()
    )
    if not full:
        saved = load_file(here / "runs/run/adapter/adapter_model.safetensors")
        assert all(".language_model." in name for name in saved)
        return
    before, after = (load_file(f / "model.safetensors") for f in (folder, here / "runs/run/model"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed
    assert not {name for name in changed if "vision" in name or "projector" in name}


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})


DENSE = "gpt_neox.layers.0.attention.dense.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: edit(f, hidden_size="a"), ["hidden_size", "expected int"]),
        (lambda f: edit(f, vocab_size=500), ["embed_in.weight is (400, 32)", "(500, 32)"]),
        (
            lambda f: edit(f, num_hidden_layers=3),
            ["gpt_neox.layers.2.mlp.dense_h_to_4h.bias is missing"],
        ),
        (
            lambda f: rewrite(f, lambda t: {**t, "extra": torch.zeros(2)}),
            ["extra is not a tensor of this architecture"],
        ),
        (
            lambda f: rewrite(f, lambda t: {n: v for n, v in t.items() if n != DENSE}),
            [f"{DENSE} is missing"],
        ),
        (
            lambda f: rewrite(f, lambda t: {**t, DENSE: t[DENSE].to(torch.float8_e4m3fn)}),
            [f"{DENSE} has dtype F8_E4M3", "unquantised"],
        ),
        (lambda f: edit(f, tie_word_embeddings=True), ["differs from", "tie_word_embeddings"]),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                (f / "model.safetensors").read_bytes()[:9000]
            ),
            ["as safetensors", "download it again"],
        ),
    ],
    ids=["config", "shape", "missing blocks", "extra", "missing", "fp8", "tied", "cut"],
)
def test_weights_that_do_not_fit_are_an_error_and_never_random(
    change: Any, words: list[str], tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "neox", "gpt_neox")
    change(folder)
    with pytest.raises(ModelError) as raised:
        load_language_model(folder)
    for word in words:
        assert word in str(raised.value)


def test_tables_of_older_files_are_not_parameters(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "neox", "gpt_neox")
    old = {"gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9)}
    rewrite(folder, lambda tensors: {**tensors, **old})
    load_language_model(folder)


@pytest.mark.parametrize("is_decoder", [False, True])
def test_a_model_whose_tokens_see_those_after_them_is_refused(
    is_decoder: bool, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 40}
    config = transformers.BertGenerationConfig(
        **sizes, num_attention_heads=2, is_decoder=is_decoder
    )
    transformers.BertGenerationDecoder(config).save_pretrained(tmp_path)
    if is_decoder:
        load_language_model(tmp_path)
        return
    with pytest.raises(ModelError, match=r"tokens see those after them[\s\S]*is_decoder"):
        load_language_model(tmp_path)


def test_a_sweep_on_a_base_with_dropout_of_its_own_is_refused_before_it_is_written(
    orders_file: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", orders_file, "--model", save_model(here / "gpt2", "gpt2", resid_pdrop=0.1)]
    words = SHORT.replace("--samples 0", "--implementation transformers")
    assert run(f"sweep {words} --rank 2,4 --name swept --no-fast", *given) == 2
    assert not (here / "runs").exists()
    assert "dropout to 0 in its config.json" in capsys.readouterr().err


def test_an_adapter_of_another_architecture_is_not_trained_further(
    neox: Path, tiny_folder: Path, orders_file: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama = lora.apply_lora(load_language_model(tiny_folder), LoRAConfig(rank=2))
    lora.save_adapter(llama, here / "adapter", base_name=str(tiny_folder))
    given = ["--data", orders_file, "--model", neox, "--from-adapter", here / "adapter"]
    assert run(f"finetune {SHORT}", *given) == 2
    error = capsys.readouterr().err
    assert "it adapts layers that are not here. Cannot adapt 'model.layers.0." in error
    assert f"leave --model out, or give --model {tiny_folder}" in error
    assert not (here / "runs").exists()
