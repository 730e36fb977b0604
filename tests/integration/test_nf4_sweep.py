"""Sweeps and comparisons over a base in nf4: as alone, resumed, recorded, refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lora.cli import main
from lora.compare import CompareConfig, compare
from lora.compare.decoder_target import DecoderTarget
from lora.compare.sweep_full import sweep_with_full
from lora.config import BaseWeights, DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.data.reading.orders import make_orders
from lora.decoder.decoder import build_decoder
from lora.decoder.families import decoder_config
from lora.errors import CheckpointError, ConfigError, Interrupted
from lora.finetune import FinetuneJob, finetune
from lora.pretrained.hf_weights import save_decoder
from lora.runs.disk import read_json
from lora.runs.read_record import read_metrics, read_run_record
from lora.sweep import SweepJob, sweep
from lora.sweep.grid import Grid
from lora.sweep.progress import NoSweepProgress
from tests.integration.conftest import make_tokenizer
from tests.integration.test_compare import PEFTS_OWN
from tests.integration.test_sweep import Stopping, adapters
from tests.pretrained.quantised.four_bit import write_4bit

TRAIN = TrainConfig(steps=6, batch_size=4)
DATA = DataConfig(max_length=128, packing=False)


@pytest.fixture
def job(tiny_folder: Path, tmp_path: Path) -> SweepJob:
    return SweepJob(
        data=make_orders("train", 24),
        grid=Grid(rank=(2, 4), learning_rate=(5e-3,)),
        model=str(tiny_folder),
        train=TRAIN,
        data_config=DATA,
        run=RunConfig(out=tmp_path, name="sweep", eval_every_steps=3),
        base_dtype="nf4",
        nf4_block=32,
    )


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows are a block of nf4: bitsandbytes' CPU code reads no shorter ones."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    tokenizer = make_tokenizer()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": tokenizer.vocab_size,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    save_decoder(build_decoder(decoder_config(config), seed=1), folder)
    tokenizer.save(folder)
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"nf4_embeddings": True}, marks=pytest.mark.slow),
        pytest.param({"implementation": "transformers"}, marks=pytest.mark.slow),
        pytest.param({"base_dtype": "int8", "nf4_block": 64}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_each_candidate_is_what_finetune_makes_over_the_same_base(
    job: SweepJob, settings: dict[str, Any]
) -> None:
    job = replace(job, **settings)
    done = sweep(job)
    for name, tensors in adapters(done.folder).items():
        record = read_run_record(done.folder / "candidates" / name)
        assert record.base_dtype == job.base_dtype
        assert record.nf4 == (job.base_weights.nf4_settings if job.base_dtype == "nf4" else None)
        assert record.lora is not None
        assert record.train is not None
        alone = finetune(
            FinetuneJob(
                data=job.data, model=job.model, data_config=DATA, **job.base_settings,
                implementation=job.implementation,
                lora=LoRAConfig(**record.lora), train=TrainConfig(**record.train),
                run=RunConfig(out=job.run.out, name=name, eval_every_steps=3, samples=0),
            )
        )  # fmt: skip
        for key, expected in load_file(alone.saved / "adapter_model.safetensors").items():
            assert (tensors[key] - expected).norm() <= 1e-3 * expected.norm(), (name, key)
        assert record.base_fingerprint == read_run_record(alone.folder).base_fingerprint


def test_a_resumed_sweep_ends_with_the_same_bytes(job: SweepJob) -> None:
    whole = sweep(replace(job, run=replace(job.run, name="whole")))
    with pytest.raises(Interrupted):
        sweep(job, Stopping(4))
    for other in ({"base_dtype": "auto", "nf4_block": 64}, {"nf4_block": 64}):
        with pytest.raises(CheckpointError, match="nf4_block: 32 then, 64 now"):
            sweep(replace(job, resume=True, **other))  # type: ignore[arg-type]
    done = sweep(replace(job, resume=True))
    for name in adapters(whole.folder):
        for file in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
            paths = [run.folder / "candidates" / name / file for run in (whole, done)]
            assert paths[0].read_bytes() == paths[1].read_bytes(), file


def test_waves_and_halving_are_as_over_a_plain_base(job: SweepJob) -> None:
    grid = Grid(rank=(2, 4), learning_rate=(5e-3, 1e-2))
    done = sweep(replace(job, grid=grid, halving=True, at_once=3))
    assert [state.status for state in done.candidates].count("stopped") >= 2
    assert done.candidates[0].status == "done"


def test_a_base_that_cannot_be_is_refused(job: SweepJob) -> None:
    with pytest.raises(ConfigError, match="nf4_block=32 with base_dtype='auto'"):
        sweep(replace(job, base_dtype="auto"))
    with pytest.raises(ConfigError, match="base_dtype='fp4'"):
        sweep(replace(job, base_dtype="fp4"))  # type: ignore[arg-type]
    assert not job.run.out.joinpath("sweep").exists()


def test_a_folder_in_4_bits_is_swept_as_it_is_stored(
    job: SweepJob, tiny_folder: Path, tmp_path: Path
) -> None:
    four = tmp_path / "four"
    write_4bit(tiny_folder, four)
    own = replace(job, model=str(four), base_dtype="auto", nf4_block=64)
    own = replace(own, train=replace(TRAIN, steps=1))
    record = read_run_record(sweep(own).folder)
    assert (record.base_dtype, record.nf4) == ("nf4", BaseWeights("nf4").nf4_settings)
    sweep(replace(own, resume=True))  # it is known again
    with pytest.raises(ConfigError, match="Cannot train all weights"):
        sweep_with_full(replace(own, run=replace(own.run, name="full")), NoSweepProgress())
    assert not (tmp_path / "full").exists()
    with pytest.raises(ConfigError, match="Cannot train all weights"):
        replace(target(four), base_dtype="auto").check(("lora", "full"), TRAIN)


def test_the_command_takes_the_base_and_its_record_repeats_it(
    tiny_folder: Path, orders_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"sweep {orders_file} --model {tiny_folder} --rank 2,4 --steps 1 --batch-size 2"
    more = f"--max-length 96 --out {tmp_path} --name s --load-in-4bit --no-nf4-double-quant --json"
    assert main([*command.split(), *more.split()]) == 0
    found = json.loads(capsys.readouterr().out)
    assert Path(found["best"], "adapter_model.safetensors").is_file()
    report = read_json(tmp_path / "s" / "report.json")
    assert "--base-dtype nf4 --no-nf4-double-quant" in report["sweeps"][0]["command"]
    assert main(["sweep", "--name", "s", "--out", str(tmp_path), "--resume", "--no-report"]) == 0
    other = ["--nf4-double-quant"]
    assert main(["sweep", "--name", "s", "--out", str(tmp_path), "--resume", *other]) == 2
    assert "nf4_double_quant: False then, True now" in capsys.readouterr().err


def target(folder: Path) -> DecoderTarget:
    return DecoderTarget(
        data=make_orders("train", 24),
        model=str(folder),
        eval_data=make_orders("validation", 4),
        lora=LoRAConfig(rank=4),
        data_config=DATA,
        base_dtype="nf4",
    )


@PEFTS_OWN
def test_full_fine_tuning_and_peft_s_qlora_beside_lora_over_nf4(
    wide_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    config = CompareConfig(
        train=replace(TRAIN, steps=4),
        run=RunConfig(out=tmp_path, name="run", eval_every_steps=2, samples=0),
        methods=("lora", "full", "peft"),
        isolated=False,
    )
    done = compare(target(wide_folder), config)
    stored = {member.method: member.base_dtype for member in done.comparison.members}
    assert stored == {"lora": "nf4", "full": None, "peft": "nf4"}
    starts = {
        member.method: next(
            row.eval_loss for row in read_metrics(done.folder / member.folder) if row.eval_loss
        )
        for member in done.comparison.members
    }
    # The same values: transformers computes the same loss over bitsandbytes' linears.
    assert starts["peft"] == pytest.approx(starts["lora"], rel=1e-5)
    assert starts["full"] != pytest.approx(starts["lora"], rel=1e-5)
    (note,) = (note for note in done.comparison.notes if "nf4" in note)
    assert note.startswith("LoRA and LoRA, PEFT: over a base in nf4")
    assert f"{starts['lora']:.4f} before training" in note
    other = replace(target(wide_folder), nf4_double_quant=False)
    with pytest.raises(CheckpointError, match=r"base.nf4_double_quant: True then, False now"):
        compare(other, replace(config, resume=True))


@PEFTS_OWN
def test_peft_trains_over_the_values_of_a_folder_in_4_bits(
    wide_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    write_4bit(wide_folder, tmp_path / "four")
    own = replace(target(tmp_path / "four"), base_dtype="auto")
    config = CompareConfig(
        train=replace(TRAIN, steps=1),
        run=RunConfig(out=tmp_path, name="run", eval_every_steps=1, samples=0),
        methods=("lora", "peft"),
        isolated=False,
    )
    done = compare(own, config)
    assert [member.base_dtype for member in done.comparison.members] == ["nf4", "nf4"]
    first = [
        next(row.eval_loss for row in read_metrics(done.folder / member.folder) if row.eval_loss)
        for member in done.comparison.members
    ]
    assert first[1] == pytest.approx(first[0], rel=2e-6)  # bf16 of its config.json is not taken


@pytest.mark.parametrize(
    ("base", "seen"),
    [
        ({"base_dtype": "fp8"}, "it has no base in fp8"),
        ({"base_dtype": "nf4", "nf4_block": 128}, "in blocks of 64, not 128"),
        ({"base_dtype": "nf4", "nf4_embeddings": True}, "leaves the embedding and the output head"),
    ],
)
def test_peft_over_a_base_that_bitsandbytes_has_not_is_refused(
    base: dict[str, object], seen: str, tiny_folder: Path
) -> None:
    pytest.importorskip("peft")
    job = replace(target(tiny_folder), **base)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Cannot compare with PEFT over a base in") as caught:
        job.check(("lora", "full", "peft"), TRAIN)
    assert seen in str(caught.value)
    job.check(("lora", "full"), TRAIN)
