"""A SkyPilot task: machines, what is copied to them, the installation, and torchrun on each.

Field names are those of docs.skypilot.co/en/latest/reference/yaml-spec.html; the variables of a
node are on its page of distributed jobs.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora.distributed.launch import SAVE_S
from lora.scale.run import ScaledRun
from lora.scale.shell import command, comment, flags_array
from lora.scale.torchrun import PORT, launch_lines, resume_lines

if TYPE_CHECKING:
    import yaml

PYTHON_VERSION = "3.12"
HOME, ENVIRONMENT, SOURCE = "~/lora-run", "~/lora-env", "~/lora-lm"
"""On the machines: where the run starts, the virtual environment, and the package's source."""
EXTRAS = "[data,hub,track]"
INPUTS = ("data", "eval_data", "model", "from_adapter", "chat_template")
"""Settings that may name a file or directory of this machine."""


@dataclass(frozen=True)
class Package:
    """Where the machines get lora-lm and its default model from."""

    origin: Path | str
    """A directory of this machine, or what pip takes: lora-lm==0.1.0."""
    default_model: str
    """pip's words for the model of a run that names none."""


def skypilot_file(run: ScaledRun, file_name: str, package: Package) -> str:
    """Return the task file `file_name` that starts `run`."""
    mounts, run = _with_mounts(run)
    if isinstance(package.origin, Path):
        mounts = {SOURCE: str(package.origin)} | mounts
    resources: dict[str, Any] = {"accelerators": f"{run.gpu}:{run.devices}"}
    if run.max_restarts:
        resources["job_recovery"] = {"max_restarts_on_errors": run.max_restarts}
    task: dict[str, Any] = {
        "name": run.job_name,
        "num_nodes": run.nodes,
        "resources": resources,
        "file_mounts": mounts,
        "setup": _setup(package, needs_default="model" not in run.settings),
        "run": _run(run),
    }
    head = [*_usage(run, shlex.quote(file_name)), comment(run.made_by)]
    return "\n".join([*head, _yaml({key: value for key, value in task.items() if value})])


def missing_inputs(run: ScaledRun) -> list[str]:
    """Return the files that `run` names and that are not here; names on a hub are none."""
    given = [_split(run, str(run.settings[name]))[0] for name in INPUTS if name in run.settings]
    is_hub = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)*")
    return [t for t in given if not (run.directory / t).exists() and not is_hub.fullmatch(t)]


def _usage(run: ScaledRun, file_name: str) -> list[str]:
    runs = run.out if run.out.is_absolute() else Path(HOME) / run.out
    results = shlex.quote(str(runs / run.name).removeprefix("~/"))
    return [
        "# On a cluster of your own, whose head node keeps the run directory:",
        "#",
        f"#     sky launch -c {run.job_name} {file_name}",
        f"#     rsync -Pavz {run.job_name}:{results} .",
        "#",
        f"# As a managed job, which is started again after a failure: sky jobs launch {file_name}",
        "# Its machines are gone afterwards, so keep the runs in a bucket or on a volume. Under",
        f"# file_mounts: {runs}: {{name: my-bucket, mode: MOUNT_CACHED}}",
    ]


def _split(run: ScaledRun, text: str) -> tuple[str, str]:
    """Return what `text` names without the checkpoint of a run (runs/x@500), and the checkpoint."""
    path, mark, step = text.rpartition("@")
    if not mark or (run.directory / text).exists():
        return text, ""
    return path, mark + step


def _with_mounts(run: ScaledRun) -> tuple[dict[str, str], ScaledRun]:
    """Return what is copied to the machines, and the run with the paths that it has there."""
    mounts: dict[str, str] = {}
    settings = dict(run.settings)
    for name in INPUTS:
        given, checkpoint = _split(run, str(settings.get(name, "")))
        here = run.directory / given
        if not given or not here.exists():
            continue
        there = os.path.normpath(given)
        if there.startswith(".."):  # above the directory of the run: at its own path
            there = os.path.abspath(here)
        settings[name] = there + checkpoint
        mounts[there if os.path.isabs(there) else f"{HOME}/{there}"] = os.path.abspath(here)
    return mounts, replace(run, settings=settings)


def _setup(package: Package, *, needs_default: bool) -> str:
    wanted = f'"$HOME/{SOURCE[2:]}{EXTRAS}"'
    if isinstance(package.origin, str):
        wanted = shlex.quote(package.origin.replace("lora-lm", f"lora-lm{EXTRAS}", 1))
    lines = [
        f"[ -d {ENVIRONMENT} ] || uv venv --python {PYTHON_VERSION} {ENVIRONMENT}",
        f"source {ENVIRONMENT}/bin/activate",
        "uv pip install torch  # first and alone, so that it is the build for this machine",
        f"uv pip install {wanted}",
    ]
    if needs_default:
        lines.append(f"uv pip install {package.default_model}")
    return "\n".join([*lines, ""])


def _run(run: ScaledRun) -> str:
    # Several nodes are started again by SkyPilot, all of them.
    launched = run if run.nodes == 1 else replace(run, max_restarts=0)
    lines = [
        f"source {ENVIRONMENT}/bin/activate",
        f"mkdir -p {HOME}; cd {HOME} || exit",
        f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={SAVE_S}  # seconds to save the state when stopped",
        flags_array(run.settings),
        *resume_lines(run),
        command("torchrun", *launch_lines(launched, _meeting(run))),
        "",
    ]
    return "\n".join(lines)


def _meeting(run: ScaledRun) -> str:
    if run.nodes == 1:
        return "--standalone"
    # By their ranks, so that rank 0, which writes the run directory, is on the head node.
    address = "--master-addr=\"${SKYPILOT_NODE_IPS%%$'\\n'*}\""
    return f'--node-rank="$SKYPILOT_NODE_RANK" {address} --master-port={PORT}'


def _yaml(task: Mapping[str, Any]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Texts of several lines as blocks."""

    def block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        style = "|" if "\n" in text else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, block)
    return yaml.dump(dict(task), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000)
