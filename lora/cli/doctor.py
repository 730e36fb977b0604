"""`lora doctor`: check this machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lora.cli.flags.from_fields import OUTPUT
from lora.cli.flags.shared import Json
from lora.runs.typed_json import json_text
from lora.terminal import print_line

Out = Annotated[
    Path, Parameter(group=OUTPUT, help="Directory for run directories; its disk is checked.")
]


def doctor(*, out: Out = Path("runs"), json: Json = False) -> int:
    """Check packages, device, kernels, memory and disk; train and save a tiny model.

    For example:

        lora doctor
        lora doctor --json

    Takes seconds and leaves no files behind. The exit code is 0 if every check
    passes, else 1.
    """
    from lora.doctor import examine

    checks = examine(out)
    is_well = all(check.is_well for check in checks)
    if json:
        found = {"is_well": is_well, "checks": [asdict(check) for check in checks]}
        print(json_text(found))
        return 0 if is_well else 1
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = "!!" if not check.is_well else "--" if check.is_missing else "ok"
        print_line(f"{mark}  {check.name:<{width}}  {check.seen}")
        if mark != "ok" and check.advice:
            print_line(f"    {'':<{width}}  {check.advice}")
    n_ill = sum(not check.is_well for check in checks)
    n_missing = sum(check.is_missing for check in checks)
    missing = f"; optional and missing or too old (--): {n_missing}" if n_missing else ""
    passed = "all checks passed" if is_well else f"{n_ill} of {len(checks)} checks failed"
    print_line(f"{passed}{missing}")
    return 0 if is_well else 1
