"""PEFT with transformers' Trainer under the faults that our own tests inject.

    python benchmarks/faults_peft.py --out benchmarks/results/faults_peft.jsonl

A minute or two on two cores: a random Llama of two blocks, LoRA of rank 4, checkpoints every five
steps, used as documented (Trainer(...).train(resume_from_checkpoint=True)). Prints a JSON line per
fault: what was done, the outcome, and whether the user learns of it (`told`). Needs lora-lm[bench].
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STEPS, SAVE_EVERY = 30, 5
VOCAB, LENGTH = 64, 32
Row = dict[str, Any]


def build_base(seed: int = 1) -> Any:
    """Return a random Llama of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCAB,
            max_position_embeddings=64,
        )
    )


def train(folder: Path, settings: argparse.Namespace) -> None:
    """Run or resume Trainer in this process; prints each logged loss."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class PrintProgress(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            print(f"step {state.global_step}", flush=True)
            time.sleep(settings.pause_s)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}):
                print(f"loss {logs['loss']}", flush=True)

    base = build_base()
    if settings.nan:
        with torch.no_grad():
            base.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    torch.manual_seed(2)
    model = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear")
    )
    draw = torch.Generator().manual_seed(settings.data_seed)
    rows = torch.randint(0, VOCAB, (200, LENGTH), generator=draw).tolist()
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=SAVE_EVERY,
        save_total_limit=2,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=settings.rate,
        seed=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model=model, args=args, train_dataset=dataset, callbacks=[PrintProgress()])
    if settings.max_file_bytes:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (settings.max_file_bytes,) * 2)
    trainer.train(resume_from_checkpoint=True if settings.resume else None)
    model.save_pretrained(folder / "adapter")


class Child:
    """A run of Trainer in a subprocess."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.folder = folder
        number = len(list(folder.parent.glob(f"{folder.name}.*.log")))
        self.log = folder.with_name(f"{folder.name}.{number}.log")
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--child", str(folder), *words],
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def wait_for(self, is_due: Callable[[], bool]) -> bool:
        """Return whether `is_due` became true before the process ended."""
        while self.process.poll() is None:
            if is_due():
                return True
            time.sleep(0.0002)
        return False

    def end(self, number: int | None = None) -> int:
        """Send a signal, if any, and return the exit code."""
        if number is not None:
            self.process.send_signal(number)
        return self.process.wait(timeout=300)

    def message(self) -> str:
        """Return the last line of output that is not progress."""
        lines = [x for x in self.log.read_text(errors="replace").splitlines() if x.strip()]
        messages = [line for line in lines if not line.startswith(("step ", "loss "))]
        return messages[-1].strip()[:300] if messages else ""

    def numbers(self, word: str) -> list[str]:
        """Return the value after `word` on each line that starts with it."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line.split()[1] for line in lines if line.startswith(f"{word} ")]


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the adapter that a run saved."""
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


def compare(one: Path, other: Path) -> Row:
    """Return whether two runs ended with the same adapter, and their largest difference."""
    a, b = adapter_of(one), adapter_of(other)
    largest = max(float((a[name] - b[name]).abs().max()) for name in a)
    return {"same_bytes": largest == 0.0, "largest_difference": largest}


def last_complete(folder: Path) -> int:
    """Return the step of the newest checkpoint that has its trainer_state.json, or 0."""
    found = [
        int(p.parent.name.split("-")[1]) for p in folder.glob("checkpoint-*/trainer_state.json")
    ]
    return max(found, default=0)


def killed_in_a_step(work: Path, whole: Path) -> Row:
    """SIGKILL after step 13, then resume_from_checkpoint=True."""
    folder = work / "killed-step"
    child = Child(folder, "--pause-s", "0.05")
    child.wait_for(lambda: "13" in child.numbers("step"))
    child.end(signal.SIGKILL)
    again = Child(folder, "--resume")
    code = again.end()
    found = {"resume_exit_code": code, "steps_repeated": 13 - last_complete_before(again)}
    if code:
        return {**found, "outcome": "the resume fails", "message": again.message(), "told": True}
    same = compare(folder, whole)
    how = "ends with the same bytes" if same["same_bytes"] else "ends with other weights"
    return {**found, **same, "outcome": f"resumes and {how}", "told": same["same_bytes"]}


def last_complete_before(child: Child) -> int:
    """Return the step from which a resumed run continued."""
    steps = child.numbers("step")
    return int(steps[0]) - 1 if steps else 0


def killed_in_a_save(work: Path, whole: Path) -> Row:
    """SIGKILL while a checkpoint lacks its trainer_state.json; repeated until that is hit."""
    for attempt in range(8):
        folder = work / f"killed-save-{attempt}"
        child = Child(folder)

        def is_saving(folder: Path = folder) -> bool:
            return any(
                (path / "adapter_model.safetensors").exists()
                and not (path / "trainer_state.json").exists()
                for path in folder.glob("checkpoint-1*")
            )

        if not child.wait_for(is_saving):
            continue
        child.end(signal.SIGKILL)
        whole_before = last_complete(folder)
        broken = [
            p.name for p in folder.glob("checkpoint-*") if not (p / "trainer_state.json").exists()
        ]
        if not broken:
            continue
        again = Child(folder, "--resume")
        code = again.end()
        found = {"half_checkpoint": broken, "older_whole_checkpoint": whole_before}
        if code:
            outcome = "the resume fails on the half checkpoint; the older whole one is not taken"
            return {
                **found,
                "resume_exit_code": code,
                "outcome": outcome,
                "message": again.message(),
                "told": True,
            }
        first = last_complete_before(again)
        same = compare(folder, whole)
        how = "the same bytes" if same["same_bytes"] else "other weights"
        outcome = f"goes on from step {first} and ends with {how}"
        return {**found, **same, "outcome": outcome, "told": same["same_bytes"]}
    return {"outcome": "no attempt hit a save", "told": False}


def stopped(work: Path, whole: Path) -> Row:
    """SIGTERM after step 13."""
    folder = work / "stopped"
    child = Child(folder, "--pause-s", "0.05")
    child.wait_for(lambda: "13" in child.numbers("step"))
    code = child.end(signal.SIGTERM)
    saved = last_complete(folder)
    outcome = f"ends at once; newest checkpoint is step {saved}: {13 - saved} steps are lost"
    return {"exit_code": code, "outcome": outcome, "told": False}


def resumed_otherwise(work: Path, whole: Path) -> Row:
    """SIGKILL after step 13, then a resume with a tenth of the learning rate and other data."""
    folder = work / "otherwise"
    child = Child(folder, "--pause-s", "0.05")
    child.wait_for(lambda: "13" in child.numbers("step"))
    child.end(signal.SIGKILL)
    again = Child(folder, "--resume", "--rate", "5e-4", "--data-seed", "33")
    code = again.end()
    if code:
        return {"outcome": "refused", "message": again.message(), "told": True}
    words = [line for line in again.log.read_text().splitlines() if "match" in line.lower()]
    outcome = f"goes on with the new data {'with a line' if words else 'without a word'}"
    return {"outcome": outcome, "message": (words or [""])[0][:300], "told": bool(words)}


def nan_weight(work: Path, whole: Path) -> Row:
    """One weight of the base is NaN."""
    folder = work / "nan"
    child = Child(folder, "--nan")
    code = child.end()
    losses = child.numbers("loss")
    found = {"exit_code": code, "losses_shown": sorted(set(losses))[:4], "steps": len(losses)}
    if code:
        return {**found, "outcome": "the run stops", "message": child.message(), "told": True}
    bad = sum(not bool(torch.isfinite(t).all()) for t in adapter_of(folder).values())
    outcome = (
        f"trains all {len(losses)} steps, exits 0 and saves an adapter with {bad} of "
        f"{len(adapter_of(folder))} tensors not finite"
    )
    return {**found, "outcome": outcome, "told": "nan" in losses}


def full_disk(work: Path, whole: Path) -> Row:
    """No file may grow beyond 64 kB (RLIMIT_FSIZE), as on a full disk; then resume."""
    folder = work / "full"
    child = Child(folder, "--max-file-bytes", "65536")
    code = child.end()
    steps = child.numbers("step")
    left = sorted(p.name for p in folder.glob("checkpoint-*"))
    again = Child(folder, "--resume")
    resumed = again.end()
    outcome = (
        f"{'dies' if code else 'goes on'} at the first save, step {steps[-1] if steps else 0} of "
        f"{STEPS}; leaves {left or 'nothing'}; with room again the resume "
        f"{'fails' if resumed else 'works'}"
    )
    return {
        "exit_code": code,
        "outcome": outcome,
        "message": child.message(),
        "resume_message": again.message() if resumed else "",
        "told": code != 0,
    }


def two_at_once(work: Path, whole: Path) -> Row:
    """A second run with the same output_dir while the first is running."""
    folder = work / "twice"
    first = Child(folder, "--pause-s", "0.05")
    first.wait_for(lambda: "6" in first.numbers("step"))
    second = Child(folder, "--pause-s", "0.05")
    codes = [first.end(), second.end()]
    messages = [run.message() for run, code in zip((first, second), codes, strict=True) if code]
    both = codes == [0, 0]
    outcome = "both run and write over each other's checkpoints" if both else "one of them fails"
    return {"exit_codes": codes, "outcome": outcome, "messages": messages, "told": not both}


def load_damaged(work: Path, whole: Path, damage: Callable[[Path], None], seed: int = 1) -> Row:
    """Load a damaged copy of the adapter through PeftModel.from_pretrained."""
    from peft import PeftModel
    from safetensors import SafetensorError

    folder = work / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole / "adapter", folder)
    damage(folder)
    ids = torch.arange(LENGTH)[None]
    good = PeftModel.from_pretrained(build_base(), str(whole / "adapter")).eval()(ids).logits
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            model = PeftModel.from_pretrained(build_base(seed), str(folder)).eval()
            logits = model(ids).logits
        except (RuntimeError, OSError, ValueError, KeyError, SafetensorError) as error:
            return {"outcome": "refused", "message": message_of(error), "told": True}
    odd = (FutureWarning, DeprecationWarning)  # of their own code, not of the adapter
    words = [str(w.message).splitlines()[0][:200] for w in told if not issubclass(w.category, odd)]
    same = bool(torch.equal(logits, good))
    how = "with a warning" if words else "without a word"
    outcome = f"loads {how}; logits {'unchanged' if same else 'differ'}"
    return {"outcome": outcome, "warnings": words[:2], "told": bool(words)}


def message_of(error: Exception) -> str:
    """Return an error's type and first line."""
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300]


def without_a_key(folder: Path) -> None:
    """Changes the adapter in `folder`: one lora_B is removed."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[next(name for name in tensors if "lora_B" in name)]
    save_file(tensors, path, {"format": "pt"})


def cut_in_half(folder: Path) -> None:
    """Changes the adapter in `folder`: its file is cut in half."""
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(folder: Path) -> None:
    """Changes the adapter in `folder`: one exponent bit of the last value is flipped."""
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x08
    path.write_bytes(data)


FAULTS: dict[str, Callable[[Path, Path], Row]] = {
    "kill -9 in a step": killed_in_a_step,
    "kill -9 in a save": killed_in_a_save,
    "SIGTERM": stopped,
    "resume with another rate and other data": resumed_otherwise,
    "NaN in a weight": nan_weight,
    "no room on the disk": full_disk,
    "two runs in one folder": two_at_once,
    "a key missing in the adapter": lambda w, g: load_damaged(w, g, without_a_key),
    "adapter file cut short": lambda w, g: load_damaged(w, g, cut_in_half),
    "a bit flipped in the adapter": lambda w, g: load_damaged(w, g, flip_a_bit),
    "adapter on another base": lambda w, g: load_damaged(w, g, lambda folder: None, seed=7),
}


def main() -> int:
    """Inject every fault, or run as the subprocess that suffers it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--nan", action="store_true")
    parser.add_argument("--max-file-bytes", type=int, default=0)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--data-seed", type=int, default=3)
    parser.add_argument("--pause-s", type=float, default=0.0)
    args = parser.parse_args()
    if args.child is not None:
        train(args.child, args)
        return 0
    versions = {
        n: importlib.metadata.version(n) for n in ("peft", "transformers", "accelerate", "torch")
    }
    lines = [{"versions": versions, "steps": STEPS, "save_every_steps": SAVE_EVERY}]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        whole = work / "whole"
        if Child(whole).end():
            raise SystemExit("the undisturbed run failed: " + (work / "whole.0.log").read_text())
        for fault, inject in FAULTS.items():
            row = json.dumps({"fault": fault, **inject(work, whole)}).replace(name, "WORK")
            lines.append(json.loads(row))
            print(row, flush=True)
    if args.out is not None:
        args.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
