"""What all waves of a sweep share: the frozen base, data, sizes, intervals, run directory."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lora.config import SavedWeights
from lora.data.sequences.batches import TokenSequences
from lora.device import DeviceChoice
from lora.distributed.world import ALONE, World
from lora.runs.directory import Run
from lora.runs.disk import disk_error
from lora.sweep.grid import Candidate
from lora.sweep.progress import SweepProgress

CANDIDATES = "candidates"
"""Directory of the candidates' own run directories."""


@dataclass(frozen=True)
class SweepContext:
    """What all waves of a sweep share."""

    candidates: tuple[Candidate, ...]
    model: nn.Module
    """The frozen base, without adapters."""
    train: TokenSequences
    validation: TokenSequences
    micro_batch_size: int
    """Sequences in a micro-batch of one candidate, B."""
    micro_batches: int
    """Micro-batches in an optimizer step."""
    eval_every_steps: int
    save_every_steps: int
    choice: DeviceChoice
    run: Run
    progress: SweepProgress
    save: SavedWeights = "best"
    """Which weights of a candidate become its adapter."""
    memory_plan: str = ""
    """How many candidates were planned to fit, in words: quoted if memory runs out."""
    fast: bool = True
    """Take the fastest step that can train the candidates; false: the plain one."""
    world: World = ALONE
    """The processes that share the candidates."""


def candidate_run(run: Run, candidate: Candidate) -> Run:
    """Return the candidate's own run directory, made if it is not there.

    Raises CheckpointError if the disk refuses.
    """
    folder = run.folder / CANDIDATES / candidate.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(folder, error) from error
    return Run(folder, on_trouble=run.on_trouble)
