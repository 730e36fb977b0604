"""The commands on a tiny model, called as `lora` calls them."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora.cli import main
from lora.cli.chat import _run_command
from lora.compare.decoder_job import DecoderJob, EvaluationConfig
from lora.compare.member import measure_base
from lora.config import DataConfig, RunConfig, TrainConfig
from lora.data.prompting.ask import Asker
from lora.data.tokenizers.subword import load_tokenizer
from lora.inference.loading import load_model
from lora.inference.run_settings import EVALUATION_DATE, read_run_data_settings
from lora.pretrained.hf_weights import load_decoder
from lora.runs.progress import NoProgress

Read = Callable[[], tuple[str, str]]


@pytest.fixture
def read(capsys: pytest.CaptureFixture[str]) -> Read:
    """What was printed since the last time: out, err."""

    def take() -> tuple[str, str]:
        captured = capsys.readouterr()
        return captured.out, captured.err

    return take


@pytest.fixture(scope="module")
def adapter(tiny_folder: Path, orders_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    words = ["finetune", "--model", str(tiny_folder), "--data", str(orders_file), "--rank", "4"]
    words += ["--steps", "6", "--batch-size", "4", "--max-length", "128", "--learning-rate", "0.02"]
    assert main([*words, "--out", str(out), "--name", "run"]) == 0
    return out / "run" / "adapter"


def test_finetune_ends_with_a_report(adapter: Path, orders_file: Path) -> None:
    folder = adapter.parent
    found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    (run,) = found["runs"]
    assert (run["status"], run["method"], run["steps"], run["rank"]) == ("finished", "lora", 6, 4)
    assert 0 < run["trainable_parameters"] < run["total_parameters"]
    assert run["command"].startswith(f"lora finetune --data {orders_file} --model ")
    assert "--rank 4 --steps 6 --batch-size 4" in run["command"]
    assert run["samples"]
    assert "<h1>run</h1>" in (folder / "report.html").read_text(encoding="utf-8")
    assert (folder / "pictures" / "loss_by_time.png").is_file()


def test_finetune_prints_json(
    tiny_folder: Path, orders_file: Path, tmp_path: Path, read: Read
) -> None:
    words = ["finetune", "--model", str(tiny_folder), "--data", str(orders_file), "--json"]
    words += ["--steps", "2", "--batch-size", "2", "--max-length", "128", "--out", str(tmp_path)]
    assert main([*words, "--no-report"]) == 0
    out, err = read()
    found = json.loads(out)  # nothing else is there
    assert found["steps"] == 2
    assert "target fraction" in err
    assert "⟦" in err  # an example, what is learned between marks
    assert Path(found["saved"], "adapter_model.safetensors").is_file()
    assert found["report"] is None
    assert not Path(found["folder"], "report.html").exists()


def test_finetune_takes_a_yaml_file(
    tiny_folder: Path, orders_file: Path, tmp_path: Path, read: Read
) -> None:
    settings = tmp_path / "run.yaml"
    settings.write_text(f"model: {tiny_folder}\nsteps: 1\nbatch_size: 2\nmax_length: 128\n")
    words = ["finetune", "--data", str(orders_file), "--config", str(settings), "--json"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    assert json.loads(read()[0])["steps"] == 1


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (["--resume"], "Name it with --name"),
        (["--full", "--rank", "4"], "Cannot combine --full with LoRA flags"),
        (["--rank", "0"], "rank=0"),
        (["--steps", "many"], "many"),
        (["--rnak", "4"], "Did you mean --rank"),
        (["--precision", "bf16", "--device", "cpu"], "tens of times slower"),
    ],
)
def test_finetune_refuses_with_two_and_leaves_nothing(
    words: list[str], seen: str, tiny_folder: Path, orders_file: Path, tmp_path: Path, read: Read
) -> None:
    start = ["finetune", "--model", str(tiny_folder), "--data", str(orders_file)]
    assert main([*start, "--out", str(tmp_path), *words]) == 2
    assert seen in read()[1]
    assert not list(tmp_path.iterdir())


def test_generate_answers_all_prompts(
    tiny_folder: Path, adapter: Path, tmp_path: Path, read: Read
) -> None:
    asked = tmp_path / "asked.txt"
    asked.write_text("second\n\nthird\n")
    words = ["generate", "first", "--model", str(tiny_folder), "--adapter", str(adapter)]
    words += ["--prompts-file", str(asked), "--max-new-tokens", "5", "--json"]
    assert main(words) == 0
    rows = [json.loads(line) for line in read()[0].splitlines()]
    assert [row["prompt"] for row in rows] == ["first", "second", "third"]
    assert main(["generate", "--model", str(tiny_folder)]) == 2
    assert "Cannot generate: no prompt is given" in read()[1]


def test_eval_shows_base_beside_adapter(
    tiny_folder: Path, adapter: Path, orders_file: Path, read: Read
) -> None:
    words = ["eval", str(orders_file), "--model", str(tiny_folder), "--adapter", str(adapter)]
    assert main([*words, "--answers", "3", "--max-new-tokens", "4", "--json"]) == 0
    found = json.loads(read()[0])
    assert found["adapter"]["loss"] < found["base"]["loss"]
    assert found["adapter"]["n_answers"] == 3
    assert found["adapter"]["valid_json"] == 0.0
    assert main(words) == 0
    assert "perplexity" in read()[0]


def test_eval_takes_the_data_settings_of_the_run_and_tells_what_it_cut(
    tiny_folder: Path, adapter: Path, orders_file: Path, read: Read
) -> None:
    words = ["eval", str(orders_file), "--model", str(tiny_folder), "--adapter", str(adapter)]
    assert main([*words, "--json"]) == 0
    out, err = read()
    as_trained = json.loads(out)["adapter"]
    assert as_trained["max_length"] == 128
    assert f"data settings of the run in {adapter.parent}" in err
    assert main([*words, "--max-length", "128", "--json"]) == 0
    assert json.loads(read()[0])["adapter"] == as_trained
    assert main([*words, "--max-length", "60", "--json"]) == 0
    out, err = read()
    short = json.loads(out)["adapter"]
    assert short["n_cut_examples"] > 0
    said = f"{short['n_cut_examples']} of 40 examples are longer than max_length=60"
    assert f"{said}: {short['n_cut_tokens']:,} tokens are not in the loss" in err
    assert main(["eval", str(orders_file), "--model", str(tiny_folder), "--json"]) == 0
    assert json.loads(read()[0])["base"]["max_length"] == 512


def test_eval_asks_with_the_chat_template_that_is_given(
    tiny_folder: Path, orders_file: Path, tmp_path: Path, read: Read
) -> None:
    template = tmp_path / "other.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    words = ["eval", str(orders_file), "--model", str(tiny_folder), "--learn-on", "all", "--json"]
    assert main(words) == 0
    own = json.loads(read()[0])["base"]["loss"]
    assert main([*words, "--chat-template", str(template)]) == 0
    assert json.loads(read()[0])["base"]["loss"] != own


def test_eval_tells_what_the_data_lose_and_prints_the_date_of_the_run(
    tiny_folder: Path, adapter: Path, tmp_path: Path, read: Read
) -> None:
    run = tmp_path / "run"
    shutil.copytree(adapter.parent, run)
    record = json.loads((run / "run.json").read_text())
    record["data"]["now"] = "2031-02-03T04:05:06"
    (run / "run.json").write_text(json.dumps(record))
    template = tmp_path / "dated.jinja"
    own = load_tokenizer(tiny_folder).chat_template
    template.write_text("{{ strftime_now('%d %B %Y') }}" + str(own))
    data = tmp_path / "data.jsonl"
    messages = [
        {"role": "user", "content": "<image> <|im_end|>"},
        {"role": "assistant", "content": "a", "reasoning_content": "b"},
    ]
    data.write_text(json.dumps({"messages": messages}))
    words = ["eval", str(data), "--model", str(tiny_folder), "--chat-template", str(template)]
    words += ["--allow-dropped-fields", "--answers", "1", "--max-new-tokens", "2", "--json"]
    losses = []
    for more, date in [
        (["--adapter", str(run / "adapter")], "03 February 2031"),
        ([], f"{EVALUATION_DATE:%d %B %Y}"),
    ]:
        assert main([*words, *more]) == 0
        out, err = read()
        losses.append(json.loads(out)["base"]["loss"])
        assert f"prints the date: here {date}" in err
        assert "warning: special tokens are spelt out 1 times" in err
        assert "warning: lost, because the chat template has no place for them: reasoning" in err
        assert "warning: 1 of 1 examples have a placeholder" in err
    assert losses[0] != losses[1]


def test_eval_and_data_name_tokens_without_an_embedding_row(
    tiny_folder: Path, tmp_path: Path, read: Read
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    load_tokenizer(model).with_tokens(["<new>"]).save(model)
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "one <new> two"}')
    for command in ("eval", "data"):
        assert main([command, str(data), "--model", str(model)]) == 2
        said = " ".join(" ".join(read()).split())
        assert "its token '<new>', in" in said
        assert "has the id 400" in said


def test_a_run_that_no_memory_holds_is_refused_before_the_weights_are_loaded(
    tiny_folder: Path,
    orders_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read: Read,
) -> None:
    monkeypatch.setattr("lora.finetune.memory.available_bytes", lambda device: 10**6)
    words = ["finetune", "--model", str(tiny_folder), "--data", str(orders_file)]
    assert main([*words, "--batch-size", "64", "--out", str(tmp_path)]) == 2
    said = read()[1]
    assert "Cannot train: beside its weights the run takes" in said
    assert "GB are free. Most of it: activations and loss of 64 sequences at once" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (["--answers", "-1"], "answers=-1: must be all, 0 (none)"),
        (["--bleu", "--answers", "0"], "there are no answers to score"),
        (["--max-new-tokens", "0"], "max_new_tokens=0"),
    ],
)
def test_eval_refuses_numbers_that_it_cannot_use(
    words: list[str], seen: str, orders_file: Path, read: Read
) -> None:
    assert main(["eval", str(orders_file), *words]) == 2
    assert seen in read()[1]


def test_prompts_are_the_lines_of_a_file_of_any_system(
    tiny_folder: Path, tmp_path: Path, read: Read
) -> None:
    asked = tmp_path / "asked.txt"
    asked.write_bytes("\ufeffone\rtwo\r\n\r\nth\u2028r\fee\nfour".encode())
    words = ["generate", "--model", str(tiny_folder), "--prompts-file", str(asked)]
    assert main([*words, "--max-new-tokens", "1", "--json"]) == 0
    rows = [json.loads(line) for line in read()[0].split("\n") if line]
    assert [row["prompt"] for row in rows] == ["one", "two", "th\u2028r\fee", "four"]


def test_an_adapter_that_cannot_be_loaded_leaves_the_chats_own(
    tiny_folder: Path, adapter: Path, tmp_path: Path, read: Read
) -> None:
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    tensors = load_file(other / "adapter_model.safetensors")
    metadata = {"format": "pt", "lora_lm_base_fingerprint": "of another base"}
    save_file(tensors, other / "adapter_model.safetensors", metadata)
    loaded = load_model(str(tiny_folder), adapter)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        before = loaded.model(tokens)
        asker = Asker()
        after, _, is_new = _run_command(f"/adapter {other}", loaded, asker)
        assert torch.equal(after.model(tokens), before)
        assert (after.tokenizer, is_new) == (loaded.tokenizer, False)
        err = read()[1]
        assert "of another base" in err
        assert "Nothing was switched" in err
        _run_command("/adapter none", loaded, asker)
        assert not torch.equal(loaded.model(tokens), before)
        _run_command(f"/adapter {adapter}", loaded, asker)
        assert torch.equal(loaded.model(tokens), before)


def test_merge_writes_a_model_that_answers_the_same_and_never_over_one(
    tiny_folder: Path, adapter: Path, tmp_path: Path, read: Read
) -> None:
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "merged"
    words = ["merge", str(adapter), str(out), "--model", str(tiny_folder)]
    assert main(words) == 0
    assert "merged 14 layers" in read()[0]
    tokens = torch.arange(20)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        difference = theirs(tokens).logits - load_decoder(out)(tokens)
    assert difference.abs().max() < 1e-4
    assert main(words) == 2
    assert "not empty" in read()[1]


def test_data_shows_what_is_learned_and_exits_two_on_faults(
    tiny_folder: Path, orders_file: Path, tmp_path: Path, read: Read
) -> None:
    assert main(["data", str(orders_file), "--model", str(tiny_folder), "--json"]) == 0
    assert json.loads(read()[0])["n_examples"] == 40
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"a": 1}\n')
    assert main(["data", str(bad), "--model", str(tiny_folder)]) == 2
    assert "bad.jsonl:1" in read()[0].replace("\n", "")


def test_chat_switches_adapters_and_outlives_a_wrong_one(
    tiny_folder: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, read: Read
) -> None:
    said = (
        "hello\n/adapter none\nhello\n/adapter nowhere\n/adapter ~nobody-here/x\n"
        f"/adapter {adapter}\n/what\n/new\n/quit\n"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    words = ["chat", "--model", str(tiny_folder), "--adapter", str(adapter)]
    assert main([*words, "--max-new-tokens", "4", "--temperature", "0"]) == 0
    out, err = read()
    assert len(out.splitlines()) >= 2
    assert "base model" in err
    assert "nowhere" in err
    assert "Cannot load the adapter ~nobody-here/x: the home directory" in err
    assert f"adapter: {adapter}" in err
    assert "Unknown command '/what'" in err


def test_export_writes_gguf_that_is_a_model_again_and_checks_for_vllm(
    tiny_folder: Path, adapter: Path, tmp_path: Path, read: Read
) -> None:
    out = tmp_path / "tiny.gguf"
    words = ["export", str(out), "--model", str(tiny_folder), "--adapter", str(adapter)]
    assert main([*words, "--dtype", "f32"]) == 0
    assert "read back" in read()[0]
    assert out.read_bytes()[:4] == b"GGUF"
    assert main([*words, "--dtype", "f32", "--overwrite", "--json"]) == 0
    found = json.loads(read()[0])
    assert (found["path"], found["size_bytes"]) == (str(out), out.stat().st_size)
    assert 0 <= found["logits_error"] <= found["logits_tolerance"]
    assert max(found["errors"].values()) <= found["tolerance"]
    assert main(["export", "--vllm", "--adapter", str(adapter)]) == 0
    assert "--max-lora-rank 8" in read()[0]
    assert main(["export"]) == 2
    assert main(["export", "--vllm"]) == 2


def test_byte_order_marks_in_any_json_file_change_nothing(
    tiny_folder: Path, adapter: Path, tmp_path: Path, read: Read
) -> None:
    model, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(tiny_folder, model)
    shutil.copytree(adapter.parent, run)
    words = ["generate", "one", "--max-new-tokens", "4"]
    assert main([*words, "--model", str(tiny_folder), "--adapter", str(adapter)]) == 0
    answer = read()[0]
    for folder in (model, run / "adapter"):
        for path in folder.glob("*.json"):
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    path = run / "run.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert main([*words, "--model", str(model), "--adapter", str(run / "adapter")]) == 0
    assert read()[0] == answer
    assert read_run_data_settings(run / "adapter").config.max_length == 128


def test_training_that_diverges_exits_with_one_and_says_why(
    tiny_folder: Path, orders_file: Path, tmp_path: Path, read: Read
) -> None:
    words = ["finetune", "--model", str(tiny_folder), "--data", str(orders_file), "--no-report"]
    words += ["--steps", "8", "--batch-size", "4", "--max-length", "128", "--samples", "0"]
    words += ["--out", str(tmp_path), "--learning-rate", "10", "--full"]
    assert main(words) == 1
    out, err = read()
    assert "best is the start" in out
    assert "what was saved is worse than the model before fine-tuning" in err
    assert "Lower the learning rate (it was 10)" in err
    assert main([*words, "--json"]) == 1
    out, _ = read()
    found = json.loads(out)
    assert found["diverged"] is True
    assert (found["best_step"], found["saved_step"], found["stopped_early"]) == (0, 8, False)
    assert found["start_eval_loss"] == found["best_eval_loss"] < found["saved_eval_loss"]
    kept = json.loads(Path(found["folder"], "result.json").read_text(encoding="utf-8"))
    assert kept["saved_step"] == 8
    assert kept["warnings"] == found["warnings"]


def test_the_base_is_found_from_the_adapter(
    tiny_folder: Path, adapter: Path, orders_file: Path, tmp_path: Path, read: Read
) -> None:
    given = ["generate", "first", "--adapter", str(adapter), "--max-new-tokens", "3"]
    assert main([*given, "--model", str(tiny_folder)]) == 0
    named = read()[0]
    assert main(given) == 0
    out, err = read()
    assert out == named
    assert "model: tiny" in err
    assert main(["eval", str(orders_file), "--adapter", str(adapter)]) == 0
    assert main(["merge", str(adapter), str(tmp_path / "merged")]) == 0
    assert main(["export", str(tmp_path / "tiny.gguf"), "--adapter", str(adapter)]) in (0, 2)
    err = read()[1]
    assert "fingerprint" not in err


def test_another_base_is_refused_with_the_one_to_give(
    tiny_folder: Path, adapter: Path, tmp_path: Path, read: Read
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    tensors = load_file(other / "model.safetensors")
    first = next(iter(tensors))
    tensors[first] = tensors[first] + 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    words = ["--adapter", str(adapter), "--model", str(other)]
    assert main(["generate", "first", *words]) == 2
    assert f"leave --model out, or give --model {tiny_folder}" in read()[1]


def test_sequences_beyond_the_positions_are_named(
    tiny_folder: Path, tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "word " * 600
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps({"text": text + end}) + "\n" for end in "abcd"))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{text}\n{text}\n/quit\n"))
    swept = ["--name", "s", "--out", str(tmp_path), "--eval-fraction", "0.5", "--no-report"]
    for words in (
        ["data", str(data), "--max-length", "1000"],
        ["plan", "--max-length", "1000", "--memory-gb", "0.001"],
        ["generate", text, "--max-new-tokens", "1"],
        ["chat", "--max-new-tokens", "1"],
        ["sweep", str(data), "--max-length", "1000", "--steps", "1", "--rank", "1,2", *swept],
    ):
        assert main([*words, "--model", str(tiny_folder)]) == 0
        assert "the model has 512 positions" in " ".join(" ".join(read()).split())


def test_a_comparison_names_sequences_beyond_the_positions(
    tiny_folder: Path, tmp_path: Path
) -> None:
    class Told(NoProgress):
        lines: ClassVar[list[str]] = []

        def message(self, text: str) -> None:
            self.lines.append(text)

    job = DecoderJob(
        data=[{"text": "word " * 600 + end} for end in "abcd"],
        model=str(tiny_folder),
        data_config=DataConfig(max_length=1000, eval_fraction=0.5),
        evaluation=EvaluationConfig(forgetting_data=[{"text": "a word"}]),
    )
    run = RunConfig(out=tmp_path, device="cpu", samples=0)
    measure_base(job, TrainConfig(steps=1, batch_size=1), run, Told())
    assert any("the model has 512 positions" in line for line in Told.lines)


def test_brackets_and_all_that_ascii_lacks_are_printed_on_a_terminal_of_ascii(
    tiny_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "größe[b].jsonl"
    messages = [
        {"role": "user", "content": "[/INST] [red]é\x1b[2J"},
        {"role": "assistant", "content": "ok"},
    ]
    data.write_text(json.dumps({"messages": messages}))
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    shown = {
        ("data", str(data), "--model", str(tiny_folder), "--special-tokens", "[/INST]"): (
            "[/INST] [red]\\xe9\\x1b[2J"
        ),
        ("doctor", "--out", str(tmp_path)): "all checks passed",
    }
    for words, text in shown.items():
        done = subprocess.run(
            [sys.executable, "-m", "lora", *words],
            env={**os.environ, **ascii_only},
            capture_output=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b""), done
        assert text in done.stdout.decode("ascii")


def test_flags_that_exclude_what_a_run_recorded_are_refused(adapter: Path, read: Read) -> None:
    run = adapter.parent
    words = ["finetune", "--resume", "--name", run.name, "--out", str(run.parent)]
    for flags in (["--full"], ["--from-adapter", str(adapter)]):
        assert main([*words, *flags]) == 2
        assert f"What the run {run.name} recorded counts as given" in read()[1].replace("\n", " ")


def test_a_run_is_resumed_by_its_name_alone(
    tiny_folder: Path, orders_file: Path, tmp_path: Path, read: Read
) -> None:
    words = [
        "--model",
        str(tiny_folder),
        "--rank",
        "3",
        "--targets",
        "q_proj,v_proj",
        "--seed",
        "4",
    ]
    words += ["--steps", "2", "--batch-size", "2", "--max-length", "64", "--samples", "0"]
    named = ["--out", str(tmp_path), "--name", "run"]
    assert main(["finetune", str(orders_file), *words, *named, "--no-report"]) == 0
    before = json.loads((tmp_path / "run" / "run.json").read_text())
    read()
    assert main(["finetune", *named, "--resume", "--steps", "3", "--no-report", "--json"]) == 0
    assert json.loads(read()[0])["steps"] == 3
    after = json.loads((tmp_path / "run" / "run.json").read_text())
    for part in ("lora", "data_config"):
        assert after[part] == before[part]
    assert main(["finetune", *named, "--resume", "--rank", "4"]) == 2
    assert "lora.rank: 3 then, 4 now" in read()[1]
