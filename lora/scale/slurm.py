"""A Slurm batch script: torchrun on each machine; before the time limit the run saves its state.

Slurm's `--signal=B:USR1@600` reaches this script alone, which then sends SIGTERM to the run, waits
for its last save and puts the job back into the queue. Started again, it continues the run. See
slurm.schedmd.com/sbatch.html.
"""

from __future__ import annotations

import shlex

from lora.scale.run import ScaledRun
from lora.scale.shell import command, comment, flags_array
from lora.scale.torchrun import launch_lines, python_lines, resume_lines

WARNING_S = 600
"""Before the time limit, for a last save; Slurm may be a minute early."""
CPUS_PER_DEVICE = 8
FIRST_PORT, N_PORTS = 20_000, 10_000
"""Jobs that share a machine meet at different ports."""


def slurm_file(run: ScaledRun, file_name: str) -> str:
    """Return the batch script `file_name` that starts `run`."""
    port = f"$((SLURM_JOB_ID % {N_PORTS} + {FIRST_PORT}))"
    meeting = f'--rdzv-backend=c10d --rdzv-endpoint="$head:{port}" --rdzv-id="$SLURM_JOB_ID"'
    step = command(
        # Not one of the processes is killed because another ended: rank 0 may be saving.
        "srun --kill-on-bad-exit=0 --wait=0",
        '"$python" -m torch.distributed.run',
        *launch_lines(run, meeting),
    )
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *_directives(run),
            "#",
            f"# Submit with: sbatch {shlex.quote(file_name)}",
            "# Options of the site go before the file: sbatch --partition=… --account=… --time=…",
            comment(run.made_by),
            "set -euo pipefail",
            f"cd -- {shlex.quote(str(run.directory))}  # on a file system that all machines share",
            *python_lines(),
            "if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then",
            "  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not inherit it",
            "fi",
            'hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")',
            "head=${hosts%%$'\\n'*}",
            "",
            flags_array(run.settings),
            "",
            *resume_lines(run),
            "",
            "is_stopping=",
            "stop() {  # the time limit is near: the run saves its state and ends",
            "  is_stopping=1",
            '  scancel --signal=TERM "$SLURM_JOB_ID" || true',
            "}",
            "trap stop USR1",
            "",
            f"{step} &",
            "step=$!",
            "code=0",
            'wait "$step" || code=$?',
            "if [[ -n $is_stopping ]]; then  # the signal ended the wait, not the run",
            "  code=0",
            '  wait "$step" || code=$?',
            "  if [[ $code -ne 0 ]]; then",
            '    scontrol requeue "$SLURM_JOB_ID"',
            "  fi",
            "fi",
            'exit "$code"',
            "",
        ]
    )


def _directives(run: ScaledRun) -> list[str]:
    n_cpus = run.devices * CPUS_PER_DEVICE
    lines = [
        f"#SBATCH --job-name={run.job_name}",
        f"#SBATCH --nodes={run.nodes}",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --cpus-per-task={n_cpus if run.uses_gpus else run.devices}",
    ]
    if run.uses_gpus:
        kind = "" if run.gpu is None else f"{run.gpu}:"
        lines.append(f"#SBATCH --gpus-per-node={kind}{run.devices}")
    return [
        *lines,
        f"#SBATCH --signal=B:USR1@{WARNING_S}",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --output=%x-%j.log",
    ]
