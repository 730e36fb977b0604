"""Train the character GPT, or adapt a trained one with LoRA, driven by environment variables.

    python training.py                                    # the base, on English prose
    USE_LORA=True LORA_RANK=16 LORA_ALPHA=32.0 LORA_DROPOUT=0.1 python training.py
    USE_LORA=True TEST_MODE=True python training.py       # a small one, under 30 seconds
    COMPARE=True python training.py                       # LoRA and full fine-tuning, compared

LORA_USAGE.md explains every variable. Exits with 2 and one message when something is wrong.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lora.distributed.ranks import is_one_of_several
from lora.errors import ConfigError, Interrupted, LoraError
from lora.runs.progress import never_raising
from lora.runs.record import DataRecord, ParameterCount, RunRecord, RunResult
from lora.terminal import end_output, print_note, printable_answer, report_crashes
from models.classic_settings import AUTO, ClassicSettings, notes, read_settings

if TYPE_CHECKING:
    from lora.compare import CompareResult
    from lora.device import DeviceChoice
    from lora.runs.directory import Run
    from lora.training.job import TrainResult
    from lora.training.step_runner import StepRunner
    from models.bigram_lm_v2 import BigramLanguageModel
    from models.char_text import Text


def main() -> int:
    """Run what the environment asks for; return the exit code."""
    report_crashes()
    try:
        if is_one_of_several():
            raise ConfigError(
                "Cannot run training.py in several processes: the character model trains in one. "
                "Start it without torchrun; lora finetune trains in several."
            )
        settings = read_settings(os.environ)
        # A reader that is gone must not end a run before its model is saved.
        with contextlib.redirect_stdout(never_raising(sys.stdout)):
            if settings.compare:
                compare_classic(settings)
            else:
                run_classic(settings)
    except Interrupted as stopped:
        print_note(f"training.py: {stopped}")
        return stopped.exit_code
    except LoraError as error:
        print_note(f"training.py: {error}")
        return 2
    except KeyboardInterrupt:
        print_note("training.py: interrupted; the last checkpoint is kept")
        return 130
    finally:
        end_output()
    return 0


def run_classic(settings: ClassicSettings) -> Run:
    """Train a base from random weights, or fine-tune a base with LoRA or in full.

    Returns the run, whose directory holds the results.
    """
    from lora.device import choose_device

    choice = choose_device(settings.device, settings.precision)
    for line in [f"device: {choice.reason}", *notes(settings)]:
        print(line)
    if not settings.adapts:
        from models.char_text import read_text

        text = read_text(settings.data_path, None, adapts=False)
        return train_base(settings, text, choice, settings.run_name or "base")
    base_folder = find_base(settings, choice)
    return adapt(settings, base_folder, choice)


def compare_classic(settings: ClassicSettings) -> CompareResult:
    """Fine-tune the base with LoRA and in full on the same batches, and print a comparison."""
    from rich.console import Console

    from lora.compare import compare
    from lora.compare.factory import FactoryTarget
    from lora.compare.table import print_comparison
    from lora.device import choose_device
    from lora.report import report_on
    from lora.runs.progress import RichProgress
    from models.char_compare import CharFactory, char_config

    config = char_config(settings)
    choice = choose_device(settings.device, settings.precision)
    for line in [f"device: {choice.reason}", *notes(settings)]:
        print(line)
    target = FactoryTarget(CharFactory(settings, find_base(settings, choice)))
    done = compare(target, config, RichProgress)
    page = report_on(done.folder, RichProgress("report").message)
    print_comparison(done.comparison, Console(highlight=False))
    print(f"everything is in {done.folder}")
    if page is not None:
        print(f"report: {page}")
    return done


def find_base(settings: ClassicSettings, choice: DeviceChoice) -> Path:
    """Return the directory (or `.pt` file) of the base; without one, train it on prose first."""
    if settings.base_checkpoint not in ("", AUTO):
        path = Path(settings.base_checkpoint)
        if not path.exists():
            raise ConfigError(
                f"Cannot use BASE_CHECKPOINT={settings.base_checkpoint}: it does not exist. "
                "Allowed: a run directory of training.py, its model directory, or a .pt file with "
                "a state dict. Unset it to train a base on prose first."
            )
        inside = path / "model"
        return inside if inside.is_dir() else path
    from models.char_text import read_text

    run_folder = Path(settings.output_dir) / settings.auto_base_name
    if (run_folder / "model" / "config.json").is_file():
        print(f"base: reusing {run_folder}")
        return run_folder / "model"
    print("base: none given, and LoRA on random weights is meaningless; training one on prose")
    prose = settings.for_base()
    run = train_base(prose, read_text("", None, adapts=False), choice, settings.auto_base_name)
    return run.folder / "model"


def train_base(settings: ClassicSettings, text: Text, choice: DeviceChoice, name: str) -> Run:
    """Train a new model on `text` and save it with its vocabulary."""
    import torch

    from models.bigram_lm_v2 import BigramLanguageModel

    torch.manual_seed(settings.seed)
    model = BigramLanguageModel(
        vocab_size=text.tokenizer.vocab_size,
        n_embd=settings.n_embd,
        n_head=settings.n_head,
        n_layer=settings.n_layer,
        block_size=settings.block_size,
        dropout=settings.dropout,
    ).to(choice.device)
    run, result = train_on(settings, model, text, choice, name, base=None)
    save_model(run, model, text, result)
    return run


def adapt(settings: ClassicSettings, base_path: Path, choice: DeviceChoice) -> Run:
    """Fine-tune the base with LoRA or in full, and save the adapter or the model."""
    import torch

    from models.char_text import load_base

    base, text = load_base(settings, base_path)
    torch.manual_seed(settings.seed)
    if not settings.use_lora:
        model = base.to(choice.device)
        run, result = train_on(settings, model, text, choice, "full", base=base_path)
        save_model(run, model, text, result)
        return run
    return adapt_with_lora(settings, base, base_path, text, choice)


def adapt_with_lora(
    settings: ClassicSettings,
    base: BigramLanguageModel,
    base_path: Path,
    text: Text,
    choice: DeviceChoice,
) -> Run:
    """Train LoRA on `base`, save the adapter, and check that loading it gives the same loss."""
    from lora.adapters.save_load import save_adapter
    from models.bigram_lm_v2_lora import BigramLanguageModelLoRA

    model = BigramLanguageModelLoRA.from_base(
        base,
        lora_rank=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        train_embeddings=settings.train_embeddings,
        seed=settings.seed,
    ).to(choice.device)
    if note := outweighs(model, base):
        print(note)
    name = f"lora-r{settings.lora_rank}"
    run, result = train_on(settings, model, text, choice, name, base=base_path)
    folder = run.folder / "adapter"
    save_adapter(model, folder, base_name=base_path.name)
    check_reloaded(settings, base_path, folder, text, choice, result.saved_eval_loss)
    sizes = {"adapter": folder_bytes(folder), "base": folder_bytes(base_path)}
    finish(run, result, sizes, count_parameters(model, base))
    return run


def outweighs(model: BigramLanguageModel, base: BigramLanguageModel) -> str | None:
    """Return a note if the adapter trains at least as many parameters as the base has."""
    counts = count_parameters(model, base)
    if counts.trainable < counts.base:
        return None
    return (
        f"note: the adapter trains {counts.trainable:,} parameters and the base has "
        f"{counts.base:,}: at this rank LoRA saves nothing over full fine-tuning. Try a lower "
        "LORA_RANK."
    )


def save_model(run: Run, model: BigramLanguageModel, text: Text, result: TrainResult) -> None:
    """Save a model with its vocabulary, and finish its run."""
    from models.bigram_lm_v2 import save_bigram

    save_bigram(model, run.folder / "model")
    text.tokenizer.save(run.folder / "model" / "vocab.json")
    sizes = {"model": folder_bytes(run.folder / "model")}
    finish(run, result, sizes, count_parameters(model, model))


def count_parameters(model: BigramLanguageModel, base: BigramLanguageModel) -> ParameterCount:
    """Return the number of trainable parameters, and that of the base."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return ParameterCount(trainable, base=sum(p.numel() for p in base.parameters()))


def train_on(
    settings: ClassicSettings,
    model: BigramLanguageModel,
    text: Text,
    choice: DeviceChoice,
    name: str,
    *,
    base: Path | None,
) -> tuple[Run, TrainResult]:
    """Train `model` on `text`; return the open run and the result."""
    from lora.data.sequences.blocks import BlockStream, check_length, ordered_blocks
    from lora.runs.directory import create_run
    from lora.runs.progress import RichProgress
    from lora.training.job import TrainingJob
    from lora.training.trainer import train
    from models.char_text import EVAL_TOKENS

    # Check the input before the run directory is created.
    check_length(text.validation, model.block_size, "the validation text")
    rows = settings.train_config().micro_batch_size
    stream = BlockStream(text.train, model.block_size, rows, settings.seed, choice.device)
    show_parameters(model, settings.use_lora)
    run = create_run(Path(settings.output_dir), settings.run_name or name)
    run.write_run_record(describe_run(settings, text, choice, base))
    show_sample(run, model, text, choice, "before")
    job = TrainingJob(
        model=model,
        steps=build_steps(settings, model, choice, trains_base=base is None),
        stream=stream,
        eval_batches=lambda: ordered_blocks(
            text.validation, model.block_size, settings.batch_size, EVAL_TOKENS, choice.device
        ),
        train_config=settings.train_config(),
        run_config=settings.run_config(),
        run=run,
        choice=choice,
        progress=RichProgress(name),
    )
    print(f"{name}: {settings.steps} steps on {text.described}, learning rate {settings.rate:g}")
    result = train(job)
    show_sample(run, model, text, choice, "after")
    return run, result


def describe_run(
    settings: ClassicSettings, text: Text, choice: DeviceChoice, base: Path | None
) -> RunRecord:
    """Return what run.json holds."""
    is_lora = settings.use_lora and base is not None
    return RunRecord(
        kind="character",
        method="lora" if is_lora else "full",
        base=str(base) if base else None,
        device=choice.reason,
        learning_rate=settings.rate,
        settings=asdict(settings),
        data=DataRecord(source=text.described),
    )


def build_steps(
    settings: ClassicSettings,
    model: BigramLanguageModel,
    choice: DeviceChoice,
    *,
    trains_base: bool,
) -> StepRunner:
    """Return the step runner: the hand-written step where it can train `model`, never for a base.

    A base is trained without importing LoRA's code, which the hand-written step needs.
    """
    config = settings.train_config()
    if trains_base:
        from lora.training.plain_step import PlainStepRunner
        from models.bigram_lm_v2 import bigram_loss

        return PlainStepRunner(model, bigram_loss, choice, config)
    from models.char_step import char_steps

    return char_steps(model, choice, config, print)


def check_reloaded(
    settings: ClassicSettings,
    base_path: Path,
    adapter: Path,
    text: Text,
    choice: DeviceChoice,
    expected: float,
) -> None:
    """Load the saved adapter onto the base: the validation loss must be equal to the last digit.

    Raises AdapterError if it is not.
    """
    from lora.adapters.save_load import load_adapter
    from lora.data.sequences.blocks import ordered_blocks
    from lora.errors import AdapterError
    from lora.training.plain_step import evaluate
    from models.bigram_lm_v2 import bigram_loss
    from models.char_text import EVAL_TOKENS, load_base

    model, _ = load_base(settings, base_path)
    load_adapter(model.to(choice.device), adapter)
    blocks = ordered_blocks(
        text.validation, model.block_size, settings.batch_size, EVAL_TOKENS, choice.device
    )
    loss = evaluate(model, blocks, bigram_loss, choice.autocast)
    if loss != expected:
        raise AdapterError(
            f"Cannot trust the adapter {adapter}: loaded again it gives a validation loss of "
            f"{loss!r}, not {expected!r} as before it was saved. Do not use it; report this."
        )
    print(f"adapter loaded again: validation loss {loss:.6f}, the same to the last digit")


def show_parameters(model: BigramLanguageModel, use_lora: bool) -> None:
    """Print the numbers of trainable and frozen parameters."""
    if not use_lora:  # plain training imports no LoRA code
        print(f"parameters: all {sum(p.numel() for p in model.parameters()):,} train")
        return
    from rich.console import Console

    from lora.lora_module import count_lora_parameters
    from lora.report import parameter_table

    Console().print(parameter_table(count_lora_parameters(model)))


def show_sample(
    run: Run, model: BigramLanguageModel, text: Text, choice: DeviceChoice, when: str
) -> None:
    """Generate a text, print it and store it in samples.json."""
    from lora.runs.disk import read_json
    from models.char_text import write_sample

    written = write_sample(model, text, choice.device)
    path = run.folder / "samples.json"
    kept = read_json(path) if path.is_file() else {}
    run.write_json("samples.json", {**kept, when: written})
    print(f"--- sample {when} training ---\n{printable_answer(written)}\n---")


def finish(
    run: Run, result: TrainResult, sizes: dict[str, int], parameters: ParameterCount
) -> None:
    """Write the result, the picture and the report, and print the summary."""
    from lora.report import draw_loss_curves, report_on
    from lora.training.outcome import describe_saved

    run.write_result(RunResult(**vars(result), stored_bytes=sizes, parameters=parameters))
    rows = run.read_metrics()
    draw_loss_curves([(run.folder.name, rows)], run.folder / "loss.png", title=run.folder.name)
    first = next(row.eval_loss for row in rows if row.eval_loss is not None)
    step_ms = 1000 * result.train_s / max(1, result.steps)
    print(
        f"validation loss {first:.4f} -> {result.eval_loss:.4f} nats in {result.steps} steps, "
        f"{result.train_s:.1f} s ({step_ms:.1f} ms per step), "
        f"peak memory {result.peak_memory_bytes / 1e6:.0f} MB"
    )
    print(f"saved: {describe_saved(result)}, validation loss {result.saved_eval_loss:.4f}")
    for name, size in sizes.items():
        print(f"{name}: {size / 1e3:,.0f} kB on disk")
    if "adapter" in sizes:
        print(f"the adapter is {sizes['adapter'] / sizes['base']:.1%} of the base's size")
    print(f"everything is in {run.folder}")
    page = report_on(run.folder, print)
    if page is not None:
        print(f"report: {page}")
    run.close()


def folder_bytes(path: Path) -> int:
    """Return the bytes of the tensors in a model's or adapter's directory (or of one file)."""
    files = list(path.glob("*.safetensors")) if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


if __name__ == "__main__":
    sys.exit(main())
