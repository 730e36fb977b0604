"""Which run the processes continue that torchrun --max-restarts starts again."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora.config import RunConfig
from lora.distributed.one_run import resumes
from lora.distributed.world import ALONE
from lora.errors import ConfigError


def test_a_restart_resumes_the_run_that_it_began_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def ask(name: str | None, restart: int, resume: bool = False) -> bool:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
        return resumes(RunConfig(out=tmp_path, name=name), resume, ALONE, said.append)

    assert not ask(None, 0)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ConfigError, match="without a name"):
        ask(None, 0)
    assert not ask("x", 0)
    assert not ask("x", 1)  # the first attempt ended before it had a run directory
    (tmp_path / "x").mkdir()
    assert not ask("x", 0)
    (tmp_path / "x" / "run.json").touch()
    assert said == []
    assert ask("x", 2)
    assert said == [f"restart 2 of 3: resuming {tmp_path / 'x'}"]
    with pytest.raises(ConfigError, match=r"it exists, .* another --name, or --resume"):
        ask("x", 0)
    assert ask("x", 0, resume=True)
