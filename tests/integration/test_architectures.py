"""Every tiny architecture through the loop and through the commands, from data to merged model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lora
from lora.pretrained.transformers_models.quiet import quiet
from lora.training.checkpoint import list_checkpoints
from tests.integration.conftest import make_tokenizer
from tests.pretrained.tiny_models import ARCHITECTURES, FURTHER, tiny_transformers

transformers = pytest.importorskip("transformers")

QUICK = ("falcon", "mixtral", "mamba")
"""Changes a linear's output in place; has experts; has no attention."""
SETTINGS: dict[str, Any] = {
    "steps": 6,
    "batch_size": 2,
    "max_length": 128,
    "save_every_steps": 3,
    "eval_every_steps": 3,
}


def base(name: str) -> Any:
    own = [k for k in ("n_positions", "max_seq_len") if k in (ARCHITECTURES | FURTHER)[name]]
    positions = dict.fromkeys(own or ["max_position_embeddings"], 128)
    return tiny_transformers(name, vocab_size=400, **positions)


def adapted(name: str) -> Any:
    return lora.apply_lora(base(name), lora.LoRAConfig(rank=2, dropout=0.1, init_seed=0))


def slow_but(*quick: str) -> list[Any]:
    names = ARCHITECTURES | FURTHER
    return [pytest.param(n, marks=[] if n in quick else [pytest.mark.slow]) for n in names]


@pytest.mark.parametrize("name", slow_but(*QUICK))
def test_a_run_resumes_to_the_byte(name: str, orders_file: Path, tmp_path: Path) -> None:
    tokenizer, kept = make_tokenizer(), {}
    for resume in (False, True):
        run = lora.train(
            adapted(name), tokenizer, orders_file, out=tmp_path, name="x", resume=resume, **SETTINGS
        )
        files = [run.saved / "adapter_model.safetensors", run.folder / "metrics.jsonl"]
        kept[resume] = [path.read_bytes() for path in files]
        assert run.result.best_eval_loss < run.result.start_eval_loss
        shutil.rmtree(list_checkpoints(run.folder / "checkpoints")[-1])
    assert kept[True] == kept[False]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("name", slow_but("gpt_oss"))
def test_every_command_takes_it(name: str, orders_file: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder, merged = tmp_path / "base", tmp_path / "merged"
    with quiet():
        base(name).save_pretrained(folder)
    make_tokenizer().save(folder)
    settings = SETTINGS | {"rank": 2, "steps": 3, "save_every_steps": 2, "eval_every_steps": 3}
    job: dict[str, Any] = {"model": str(folder), "out": str(tmp_path), "name": "x", **settings}
    run = lora.finetune(str(orders_file), **job)
    wanted = (run.saved / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(list_checkpoints(run.folder / "checkpoints")[-1])
    lora.finetune(str(orders_file), resume=True, **job)
    assert (run.saved / "adapter_model.safetensors").read_bytes() == wanted

    model, tokenizer = lora.load_model(adapter=run.saved, device="cpu")
    answer = lora.generate(model, tokenizer, "3 lamps", max_new_tokens=4)
    learned = lora.evaluate(model, tokenizer, orders_file).scores.loss
    with lora.disabled_adapter(model):
        assert learned < lora.evaluate(model, tokenizer, orders_file).scores.loss
    lora.merge(run.saved, merged)
    plain, same = lora.load_model(merged, device="cpu")
    assert lora.generate(plain, same, "3 lamps", max_new_tokens=4) == answer
    load = transformers.AutoModelForCausalLM.from_pretrained
    ids = torch.tensor([[5, 9, 300, 7, 20, 41]])
    with torch.no_grad(), quiet():
        logits = [model(ids), plain(ids), load(merged)(ids).logits]
        logits.append(peft.PeftModel.from_pretrained(load(folder), run.saved)(ids).logits)
    for other in logits[1:]:
        assert (other - logits[0]).norm() <= 1e-4 * logits[0].norm()
