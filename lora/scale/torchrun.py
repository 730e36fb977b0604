"""A Bash script that starts a run with torchrun, on one machine or on several."""

from __future__ import annotations

import shlex
import sys

from lora.distributed.launch import SAVE_S
from lora.scale.run import ScaledRun
from lora.scale.shell import command, comment, flags_array

PORT = 29400
"""Of the machine where the processes of several machines meet; torchrun's own default."""


def torchrun_file(run: ScaledRun, file_name: str) -> str:
    """Return the script `file_name` that starts `run` on each of its machines."""
    parts = [
        "#!/usr/bin/env bash",
        *_usage(run, shlex.quote(file_name)),
        comment(run.made_by),
        "set -euo pipefail",
        f"cd -- {shlex.quote(str(run.directory))}",
        *python_lines(),
        *([] if run.nodes == 1 else _address(shlex.quote(file_name))),
        "",
        flags_array(run.settings),
    ]
    if run.nodes == 1:
        parts += ["", *resume_lines(run)]
    started = command('exec "$python" -m torch.distributed.run', *launch_lines(run, _meeting(run)))
    return "\n".join([*parts, "", f'{started} "$@"', ""])


def python_lines() -> list[str]:
    """Return what chooses the Python, and the time that torchrun leaves a run for its last save."""
    return [
        f"python=${{PYTHON:-{shlex.quote(sys.executable)}}}  # with lora-lm, on every machine",
        f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={SAVE_S}  # seconds to save the state when stopped",
    ]


def resume_lines(run: ScaledRun) -> list[str]:
    """Return what continues the run where it has begun already."""
    if run.settings.get("resume"):
        return []
    return [
        "# Started again, the run continues from its newest checkpoint.",
        f"if [[ -e {shlex.quote(str(run.record))} ]]; then flags+=(--resume); fi",
    ]


def launch_lines(run: ScaledRun, meeting: str) -> list[str]:
    """Return what follows torchrun: sizes, where its processes meet, and what they run."""
    return [
        f"--nnodes={run.nodes} --nproc-per-node={run.devices} --max-restarts={run.max_restarts}",
        meeting,
        '-m lora finetune "${flags[@]}"',
    ]


def _usage(run: ScaledRun, file_name: str) -> list[str]:
    if run.nodes == 1:
        return [
            f"# Starts the run on this machine, with {run.devices} processes:",
            "#",
            f"#     bash {file_name}",
            "#",
            "# Flags of lora finetune that are not below can follow.",
        ]
    return [
        f"# Starts the run on {run.nodes} machines, with {run.devices} processes on each. On every",
        "# machine, with the name or address of one of them:",
        "#",
        f"#     HEAD=node1 bash {file_name}",
        "#",
        "# Flags of lora finetune that are not below can follow, the same on all: --resume",
        "# continues the run.",
        "# Data and model are at the same paths everywhere. Rank 0 writes the run directory: it is",
        "# on the machine whose name sorts first.",
    ]


def _address(file_name: str) -> list[str]:
    return [
        f"head=${{HEAD:?Name one of the machines, as in HEAD=node1 bash {file_name}}}",
        f"port=${{PORT:-{PORT}}}  # free on that machine, and open to the others",
    ]


def _meeting(run: ScaledRun) -> str:
    if run.nodes == 1:
        return "--standalone"
    return f'--rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id={run.job_name}'
