"""Every code block of docs/python.md runs, in order, on tiny models; and the ways to that page."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lora
from lora.cli import main
from lora.errors import ConfigError, LoraError, ModelError, TargetError, UnknownSettingError
from lora.finetune.own_model import NOT_HERE
from lora.runs.progress import NoProgress
from lora.training.checkpoint import list_checkpoints
from tests.integration.conftest import make_tokenizer

transformers = pytest.importorskip("transformers")
PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def build_neox(folder: Path) -> None:
    """Write a GPT-NeoX of two blocks, which no decoder of ours knows, with its tokenizer."""
    tokenizer = make_tokenizer()
    tokenizer.save(folder)
    config = transformers.GPTNeoXConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    transformers.GPTNeoXForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def neox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("neox") / "my-model"
    build_neox(folder)
    return folder


@pytest.fixture
def work(
    tmp_path: Path,
    neox: Path,
    tiny_folder: Path,
    orders_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The directory that the page's code runs in."""
    (tmp_path / "my-model").symlink_to(neox)
    (tmp_path / "my-llama").symlink_to(tiny_folder)
    (tmp_path / "orders.jsonl").symlink_to(orders_file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_runs(work: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) >= 6
    (work / "page.py").write_text("\n".join(blocks), encoding="utf-8")
    found = runpy.run_path(str(work / "page.py"))
    assert found["done"].result.best_eval_loss < found["done"].result.start_eval_loss
    assert not torch.equal(found["base"], found["adapted"])
    again = transformers.AutoModelForCausalLM.from_pretrained("merged-model", dtype=torch.float32)
    with torch.no_grad():
        logits = again(**found["prompt"]).logits
    torch.testing.assert_close(logits, found["adapted"], rtol=1e-4, atol=1e-4)
    assert (work / "merged" / "config.json").is_file()
    assert (work / "orders.gguf").is_file()


def load(neox: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(neox, dtype=torch.float32)
    return lora.apply_lora(model, lora.LoRAConfig(rank=2, init_seed=0))


class Messages(NoProgress):
    """Keeps the messages."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def message(self, message: str) -> None:
        self.heard.append(message)


SETTINGS: dict[str, Any] = {"steps": 4, "batch_size": 2, "max_length": 128, "save_every_steps": 2}


def test_a_run_of_a_model_in_memory_resumes_to_the_bit(work: Path, neox: Path) -> None:
    whole = lora.train(load(neox), neox, "orders.jsonl", name="whole", **SETTINGS)
    lora.train(load(neox), neox, "orders.jsonl", name="cut", **{**SETTINGS, "steps": 4})
    shutil.rmtree(list_checkpoints(work / "runs" / "cut" / "checkpoints")[-1])
    said = Messages()
    cut = lora.train(load(neox), neox, "orders.jsonl", said, name="cut", resume=True, **SETTINGS)
    assert "resuming after step 2 of 4" in said.heard
    name = "adapter_model.safetensors"
    assert (cut.saved / name).read_bytes() == (whole.saved / name).read_bytes()
    assert (cut.saved / "tokenizer.json").is_file()
    assert (cut.folder / "result.json").is_file()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own
def test_the_adapter_names_its_base_and_peft_opens_it(work: Path, neox: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load(neox)
    done = lora.train(model, neox, "orders.jsonl", name="x", **SETTINGS)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(done.saved)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(input_ids=ids).logits, model.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": 1e-3}, "here it is 'learning_rate'"),
        ({"rank": 4}, "it is a setting of LoRAConfig"),
        ({"gradient_accumulation": 2, "micro_batches": 4}, "is the former name of"),
        ({"eval_data": "orders.jsonl", "eval_fraction": 0.2}, "eval_fraction=0.2: nothing is spl"),
        ({"schedule": "constant", "min_rate_fraction": 0.2}, "min_rate_fraction=0.2: the schedu"),
        ({"whole_rate_fraction": 0.1}, "whole_rate_fraction=0.1: it is for modules"),
        ({"patience": 2, "eval_fraction": 0}, "patience=2.*no validation data"),
        *(({name: 1}, f"Cannot train with {name}=") for name in NOT_HERE),
    ],
)
def test_a_setting_that_means_nothing_here_is_refused(
    work: Path, neox: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        lora.train(load(neox), neox, "orders.jsonl", **settings)
    assert not (work / "runs").exists()


def test_what_cannot_train_is_refused_before_anything_is_written(work: Path, neox: Path) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(neox)
    with pytest.raises(TargetError, match="has no LoRA"):
        lora.train(plain, neox, "orders.jsonl")
    frozen = load(neox).requires_grad_(False)
    with pytest.raises(ConfigError, match="none of its parameters has requires_grad"):
        lora.train(frozen, neox, "orders.jsonl")
    own = lora.apply_lora(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    with pytest.raises(ModelError, match="Cannot use a Sequential as a language model"):
        lora.train(own, neox, "orders.jsonl")
    with pytest.raises(ModelError, match="Cannot use a int as tokenizer"):
        lora.train(load(neox), 3, "orders.jsonl")
    with pytest.raises(UnknownSettingError):
        lora.train(load(neox), neox, "orders.jsonl", nothing=1)
    assert not (work / "runs").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["finetune", "--data", "missing.jsonl"],
        ["sweep", "--data", "missing.jsonl", "--rank", "2,4"],
        ["eval", "missing.jsonl"],
    ],
)
def test_an_unknown_architecture_is_refused_before_the_data_are_read(
    work: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    unknown(work)
    assert main([*command, "--model", "unknown"]) == 2
    message = capsys.readouterr().err
    assert "this 'gpt_neo_x' model" in message
    assert "Did you mean 'gpt_neox'?" in message
    assert "install -U transformers" in message
    assert "missing.jsonl" not in message


def unknown(work: Path) -> None:
    """Write a model whose architecture nobody knows."""
    folder = Path(shutil.copytree(work / "my-model", work / "unknown"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "gpt_neo_x", "architectures": ["GPTNeoXXForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))


def test_python_refuses_it_in_the_same_words(work: Path) -> None:
    unknown(work)
    refused: list[Callable[[], object]] = [
        lambda: lora.finetune("missing.jsonl", model="unknown"),
        lambda: lora.load_model("unknown"),
        lambda: lora.export("x.gguf", model="unknown"),
    ]
    for call in refused:
        with pytest.raises(LoraError, match=r"this 'gpt_neo_x' model"):
            call()
