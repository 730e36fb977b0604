"""Freed memory stays for the next step, and is given back at the end."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from lora.training.heap import retain_freed_memory

def step():
    tensors = [torch.ones(1_000_000) for _ in range(60)]  # 4 MB each

def faults():
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

outside = faults()
with retain_freed_memory():
    inside = faults()
print(outside, inside)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc of another C library")
def test_steps_inside_take_their_memory_without_page_faults() -> None:
    maps_all = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=maps_all
    )
    outside, inside = map(int, done.stdout.split())
    assert outside > 100_000
    # A few of the 180 tensors may not fit where the last ones lay.
    assert inside < outside / 10


GIVEN_BACK = """
from pathlib import Path
import resource, torch
from lora.training.heap import retain_freed_memory

def held_mb():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6

before = held_mb()
with retain_freed_memory():
    [torch.ones(1_000_000) for _ in range(60)]  # 240 MB, freed at once
    inside = held_mb()
print(inside - before, held_mb() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc of another C library")
def test_what_was_kept_is_given_back_at_the_end() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GIVEN_BACK], capture_output=True, text=True, check=True
    )
    inside_mb, after_mb = map(float, done.stdout.split())
    assert inside_mb > 230
    assert after_mb < 30
