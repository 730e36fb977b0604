"""`lora finetune`: examples in, an adapter out."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lora.config import (
    BaseDtype,
    DataConfig,
    LoRAConfig,
    MemoryConfig,
    RunConfig,
    TrainConfig,
)
from lora.errors import ConfigError

if TYPE_CHECKING:
    from lora.finetune.job import FinetuneResult

Flat = Parameter(name="*")


def finetune(
    *,
    data: Path,
    model: str | None = None,
    eval_data: Path | None = None,
    full: bool = False,
    from_adapter: Path | None = None,
    resume: bool = False,
    base_dtype: BaseDtype = "auto",
    report: bool = True,
    deterministic: bool = False,
    json: bool = False,
    lora: Annotated[LoRAConfig | None, Flat] = None,
    train: Annotated[TrainConfig | None, Flat] = None,
    data_config: Annotated[DataConfig | None, Flat] = None,
    run: Annotated[RunConfig | None, Flat] = None,
    memory: Annotated[MemoryConfig | None, Flat] = None,
) -> int:
    """Fine-tune a model on examples, through LoRA unless --full is given.

    Examples:

        lora finetune --data orders.jsonl
        lora finetune --model ./llama --data chats.jsonl --rank 16 --steps 500 --name chats
        lora finetune --data orders.jsonl --name orders --resume
        lora finetune --model ./llama-8b --data chats.jsonl --max-length 8192 --memory full

    Examples are chats (messages), prompt and completion, instruction and output, ShareGPT or text,
    in JSONL, JSON, CSV, Parquet or text files. The adapter is in PEFT's format.

    Parameters
    ----------
    data
        File or folder of examples.
    model
        A folder in Hugging Face's layout, a .gguf file or a hub's owner/name; left out, it is
        SmolLM2-135M-Instruct.
    eval_data
        Examples to measure on; left out, some of the data are held out.
    full
        Train all weights instead of LoRA.
    from_adapter
        Go on from this adapter; its rank and targets hold.
    resume
        Go on with the run called --name from its newest checkpoint.
    base_dtype
        How the frozen linears are kept: auto in the products' type, fp8 in eight bits, rounded
        while the model is loaded. fp8 halves their memory; products are in fp8 too, and faster, on
        GPUs of capability 9.0 (H100, H200), and slower than bf16 elsewhere.
    report
        Write report.html, report.json and pictures into the run's folder at the end.
    deterministic
        Repeat to the bit on a GPU too: torch's deterministic algorithms and the plain step, which
        is slower.
    json
        Print the result as one JSON object.
    """
    from lora.data.inspection_view import print_report
    from lora.finetune.job import FinetuneJob
    from lora.finetune.run import finetune as run_job
    from lora.report import report_on
    from lora.runs.progress import RichProgress

    _check_flags(resume and (run is None or run.name is None), full, lora or from_adapter)
    job = FinetuneJob(
        data=data,
        model=model,
        eval_data=eval_data,
        lora=None if full else lora or LoRAConfig(),
        train=train or TrainConfig(),
        data_config=data_config or DataConfig(),
        run=run or RunConfig(),
        memory=memory or MemoryConfig(),
        from_adapter=from_adapter,
        resume=resume,
        base_dtype=base_dtype,
        deterministic=deterministic,
    )
    progress = RichProgress("finetune")  # on standard error: the result alone goes to the other
    done = run_job(
        job,
        progress,
        show_data=lambda report: print_report(report, progress.console, is_compact=True),
    )
    page = report_on(done.folder, progress.message) if report else None
    return _report(done, page, json)


def _check_flags(is_nameless: bool, full: bool, of_lora: object) -> None:
    if is_nameless:
        raise ConfigError("--resume was given without --name: name the run to go on with.")
    if full and of_lora is not None:
        raise ConfigError("--full trains all weights: leave out LoRA's flags and --from-adapter.")


def _report(done: FinetuneResult, page: Path | None, json: bool) -> int:
    result = done.result
    if json:
        found = {"folder": str(done.folder), "saved": str(done.saved), **asdict(result)}
        found["memory"] = done.memory.to_dict()
        found["report"] = None if page is None else str(page)
        print(json_format.dumps(found))
        return 0
    print(
        f"held-out loss {result.eval_loss:.4f} after {result.steps} steps, "
        f"{result.train_s:.0f} s of training, peak memory {result.peak_memory_bytes / 1e9:.2f} GB"
    )
    print(done.memory.describe())
    print(f"saved: {done.saved}")
    if page is not None:
        print(f"report: {page}")
    return 0
