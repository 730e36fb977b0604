"""Any checkpoint opens as an adapter: by step, best or last; of killed and of old runs too."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora.adapters.save_load import load_adapter
from lora.cli import main
from lora.config import DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.data.reading.orders import make_orders
from lora.data.tokenizers.subword import load_tokenizer
from lora.errors import CheckpointError
from lora.finetune import FinetuneJob, finetune
from lora.inference.checkpoints.find import find_adapter
from lora.inference.checkpoints.listing import list_entries
from lora.inference.run_settings import read_run_data_settings
from lora.pretrained.hf_weights import load_decoder
from lora.runs.disk import read_rows
from lora.runs.progress import NoProgress
from lora.runs.record import SCHEMA_VERSION

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def job(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneJob:
    return FinetuneJob(
        data=make_orders("train", 24),
        model=str(tiny_folder),
        lora=LoRAConfig(rank=4),
        train=TrainConfig(steps=12, batch_size=4, learning_rate=2e-2),
        data_config=DataConfig(max_length=128),
        run=RunConfig(
            out=tmp_path_factory.mktemp("runs"), name="run", eval_every_steps=4, samples=0,
            keep_checkpoints=9, save="last",
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(job: FinetuneJob) -> Path:
    return finetune(job).folder


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, in which no checkpoint was opened yet."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    for adapter in folder.glob("checkpoints/step-*/adapter"):
        shutil.rmtree(adapter)
    return folder


def at(run: Path, word: object) -> str:
    return f"{run}@{word}"


def assert_same_files(one: Path, other: Path) -> None:
    names = [{p.name for p in folder.iterdir()} for folder in (one, other)]
    assert names[0] == names[1]
    for name in names[0]:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_the_last_checkpoint_is_the_adapter_that_was_saved(run: Path) -> None:
    for word in (12, "last"):
        assert_same_files(find_adapter(at(run, word)), run / "adapter")
    assert find_adapter(run) == run / "adapter"
    assert find_adapter(run / "adapter") == run / "adapter"
    assert find_adapter(at(run / "adapter", 12)) == find_adapter(at(run, 12))
    assert find_adapter(run / "checkpoints/step-000008") == find_adapter(at(run, 8))


@pytest.mark.parametrize(
    ("lora", "tokens"),
    [
        (LoRAConfig(rank=2, modules_to_save=("embed_tokens", "norm")), ()),
        (LoRAConfig(rank=2, targets=("q_proj",)), ("<order>", "</order>")),
    ],
)
def test_fully_trained_modules_and_added_tokens_come_along(
    job: FinetuneJob, tmp_path: Path, lora: LoRAConfig, tokens: tuple[str, ...]
) -> None:
    config = replace(job.data_config, special_tokens=tokens)
    own = replace(job, lora=lora, data_config=config, run=replace(job.run, out=tmp_path))
    done = finetune(own)
    assert_same_files(find_adapter(at(done.folder, 12)), done.saved)


def test_an_earlier_checkpoint_loads_and_has_its_own_loss(
    run: Path, job: FinetuneJob, tmp_path: Path
) -> None:
    losses = {
        r["step"]: r["eval_loss"] for r in read_rows(run / "metrics.jsonl") if "eval_loss" in r
    }
    best = min((step for step in losses if step), key=lambda step: losses[step])
    for word, step in ((4, 4), (8, 8), ("best", best)):
        own = replace(job.run, out=tmp_path, name=f"from-{word}")
        train = replace(job.train, steps=1)
        given = Path(at(run, word))
        done = finetune(replace(job, from_adapter=given, lora=None, train=train, run=own))
        assert done.result.start_eval_loss == pytest.approx(losses[step], abs=1e-6)
    settings = read_run_data_settings(find_adapter(at(run, 4)))
    assert settings.source == (run / "run.json").resolve()


def test_a_killed_run_opens_at_its_best(job: FinetuneJob, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    class Fragile(NoProgress):
        def step(self, step: int, *figures: object) -> None:
            if step == 9:
                raise Killed

    own = replace(job, run=replace(job.run, out=tmp_path))
    with pytest.raises(Killed):
        finetune(own, Fragile())
    run = tmp_path / "run"
    assert not (run / "adapter").exists()
    model = load_decoder(Path(str(job.model)))
    load_adapter(model, find_adapter(at(run, "best")))
    resumed = finetune(replace(own, resume=True))
    assert (resumed.folder / "checkpoints" / "step-000008" / "adapter").is_dir() or (
        resumed.folder / "checkpoints" / "step-000004" / "adapter"
    ).is_dir()
    shutil.rmtree(run / "checkpoints" / "start")
    assert find_adapter(at(run, 4)).is_dir()  # made after adapter/, as in an older run directory


def test_an_older_run_without_an_adapter_is_refused(copied: Path) -> None:
    shutil.rmtree(copied / "checkpoints" / "start")
    shutil.rmtree(copied / "adapter")
    with pytest.raises(CheckpointError, match=r"saved no adapter yet. Resume it once"):
        find_adapter(at(copied, 4))


def test_what_is_not_there_is_refused_with_what_is(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5\. Allowed: the steps 4"):
        find_adapter(at(copied, 5))
    with pytest.raises(CheckpointError, match=r"'bset' is no step\. Allowed: .*best, last"):
        find_adapter(at(copied, "bset"))
    plain = tmp_path / "mail@500"
    plain.mkdir()
    assert find_adapter(plain) == plain
    assert find_adapter("nowhere@500") == Path("nowhere@500")
    shutil.rmtree(copied / "checkpoints")
    assert find_adapter(at(copied, "last")) == copied / "adapter"
    with pytest.raises(CheckpointError, match=r"Allowed: what the run saved, .*adapter"):
        find_adapter(at(copied, 4))


def test_a_run_directory_that_cannot_be_written_costs_nothing(copied: Path) -> None:
    (copied / "checkpoints" / "step-000004" / "adapter").write_text("in the way")
    folder = find_adapter(at(copied, 4))
    assert copied not in folder.parents
    assert (folder / WEIGHTS).is_file()
    assert read_run_data_settings(folder).source is not None


def test_a_damaged_checkpoint_is_refused(copied: Path) -> None:
    tensors = copied / "checkpoints" / "step-000004" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        find_adapter(at(copied, 4))
    assert not (tensors.parent / "adapter").exists()


def test_the_command_lists_and_writes(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", str(copied)]) == 0
    out = capsys.readouterr().out
    assert "validation loss" in out
    assert "best" in out
    assert "last, saved" in out
    assert main(["checkpoint", str(copied), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["step"] for entry in found["checkpoints"]] == [4, 8, 12]
    assert sum(entry["is_best"] for entry in found["checkpoints"]) == 1
    assert all(entry["eval_loss"] > 0 for entry in found["checkpoints"])
    target = tmp_path / "written"
    assert main(["checkpoint", at(copied, 12), "--out", str(target)]) == 0
    assert_same_files(target, copied / "adapter")
    assert main(["checkpoint", at(copied, 8), "--out", str(target)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["checkpoint", at(copied, 8), "--out", str(target), "--overwrite"]) == 0
    assert main(["checkpoint", str(copied), "--out", str(tmp_path / "more")]) == 2
    assert main(["checkpoint", str(copied), "--overwrite"]) == 2
    assert "@best" in capsys.readouterr().err
    for missing in (tmp_path, at(tmp_path / "nobody", 8)):
        assert main(["checkpoint", str(missing), "--out", str(tmp_path / "more")]) == 2
        assert "no run directory" in capsys.readouterr().err


def test_commands_open_a_checkpoint_by_its_name(
    run: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(tiny_folder)]
    words = ["generate", "Order for me: two lamps", "--max-new-tokens", "4", *model]
    answers = []
    for adapter in (run, at(run, 12), at(run, "last"), run / "adapter"):
        assert main([*words, "--adapter", str(adapter)]) == 0
        answers.append(capsys.readouterr().out)
    assert len(set(answers)) == 1
    assert main([*words, "--adapter", at(run, 5)]) == 2
    assert "no checkpoint of step 5. Allowed: the steps 4" in capsys.readouterr().err
    assert main(["generate", "hi", "--model", at(run, 8)]) == 2
    assert f"--adapter {at(run, 8)}" in capsys.readouterr().err
    assert main(["merge", at(run, 8), str(tmp_path / "merged"), *model]) == 0
    assert main(["export", str(tmp_path / "a.gguf"), "--adapter", at(run, 8), *model]) == 0


def test_a_checkpoint_of_full_fine_tuning_is_a_model(
    job: FinetuneJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = replace(job.train, steps=4, learning_rate=1e-3)
    done = finetune(replace(job, lora=None, train=train, run=replace(job.run, out=tmp_path)))
    with pytest.raises(CheckpointError, match=r"lora checkpoint .*@4 --out DIRECTORY"):
        find_adapter(at(done.folder, 4))
    target = tmp_path / "written"
    assert main(["checkpoint", at(done.folder, 4), "--out", str(target)]) == 0
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(load_decoder(target)(tokens), load_decoder(done.saved)(tokens))


def test_the_model_of_a_killed_run_has_the_chat_template_that_was_given(
    job: FinetuneJob, tmp_path: Path
) -> None:
    template = "{% for m in messages %}{{ m.role + '> ' + m.content + '\\n' }}{% endfor %}"
    (given := tmp_path / "chat.jinja").write_text(template, encoding="utf-8")
    own = replace(
        job,
        lora=None,
        train=replace(job.train, steps=4, learning_rate=1e-3),
        data_config=replace(job.data_config, chat_template=given, learn_on="all"),
        run=replace(job.run, out=tmp_path),
    )
    done = finetune(own)
    assert load_tokenizer(done.saved).chat_template == template
    shutil.rmtree(done.saved)  # as where the run was killed before its end
    target = tmp_path / "written"
    assert main(["checkpoint", at(done.folder, 4), "--out", str(target)]) == 0
    assert load_tokenizer(target).chat_template == template


@pytest.mark.parametrize(
    ("kind", "saved"), [("sweep", "best"), ("compare", "members/lora/adapter")]
)
def test_a_sweep_and_a_comparison_name_the_adapters_that_they_keep(
    tmp_path: Path, kind: str, saved: str
) -> None:
    (tmp_path / saved).mkdir(parents=True)
    text = json.dumps({"schema_version": SCHEMA_VERSION, "kind": kind})
    (tmp_path / "run.json").write_text(text)
    (tmp_path / "result.json").write_text("{}")  # of another form than that of a single run
    with pytest.raises(CheckpointError, match=f"keeps none of its(.|\n)*{saved}"):
        list_entries(tmp_path)
    with pytest.raises(CheckpointError, match="keeps none of its"):
        find_adapter(at(tmp_path, "best"))
