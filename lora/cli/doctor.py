"""`lora doctor`: is this machine ready, and if not, why."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict
from pathlib import Path


def doctor(*, out: Path = Path("runs"), json: bool = False) -> int:
    """Look at versions, device, kernels, memory and disk, and try a training step and a save.

    Examples:

        lora doctor
        lora doctor --json

    Takes seconds and leaves nothing behind. Exits with 0 if all is well, else with 1.

    Parameters
    ----------
    out
        Folder that holds the runs: its disk is looked at.
    json
        Print what was found as one JSON object.
    """
    from lora.doctor import examine

    checks = examine(out)
    is_well = all(check.is_well for check in checks)
    if json:
        found = {"is_well": is_well, "checks": [asdict(check) for check in checks]}
        print(json_format.dumps(found))
        return 0 if is_well else 1
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{'ok' if check.is_well else '!!'}  {check.name:<{width}}  {check.seen}")
        if not check.is_well:
            print(f"    {'':<{width}}  {check.advice}")
    n_ill = sum(not check.is_well for check in checks)
    print("all is well" if is_well else f"not well: {n_ill} of {len(checks)}")
    return 0 if is_well else 1
