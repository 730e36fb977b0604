"""What the processes of a run tell of long waits, and how hopeless ones end."""

from __future__ import annotations

import json
import time

import pytest
import torch.distributed as dist

from lora.distributed.errors import GO_ON
from lora.distributed.start import WAIT_VARIABLE
from lora.distributed.store import ERROR, STATE
from lora.distributed.watch import WaitLimits, Watch
from lora.errors import LostProcessError
from lora.settings.peers import find_peer


class Heard:
    """A watch of one rank among three on a store in memory, with what it says and how it ends."""

    def __init__(self, rank: int, store: dist.HashStore) -> None:
        self.said: list[str] = []
        self.codes: list[int] = []
        limits = WaitLimits(post_s=0.0)
        self.watch = Watch(rank, 3, store, limits, self.said.append, self.codes.append)

    def wait_since(self, seconds: float, what: str) -> None:
        """Look as if it had waited for so long."""
        with self.watch.waits(what):
            began = self.watch._doing
            self.watch._doing = type(began)(what, time.time() - seconds, is_waiting=True)
            self.watch.look()


def post(store: dist.HashStore, rank: int, what: str, ago_s: float, **more: object) -> None:
    now = time.time()
    content = {"what": what, "since_s": now - ago_s, "is_waiting": False, "posted_s": now, **more}
    store.set(f"{STATE}/{rank}", json.dumps(content))


def test_a_long_wait_is_told_with_what_each_rank_does() -> None:
    store = dist.HashStore()
    heard = Heard(0, store)
    post(store, 1, "the gradients of step 6", 58)
    post(store, 2, "the gradients of step 7", 61, is_waiting=True)
    heard.wait_since(10, "the gradients of step 7")
    assert heard.said == []
    heard.wait_since(60, "the gradients of step 7")
    assert heard.said == [
        "rank 0 has waited 60 s for the gradients of step 7. Rank 1: busy for 58 s, after the "
        "gradients of step 6. The same: 1 other rank."
    ]
    post(store, 1, "the gradients of step 6", 118, posted_s=time.time() - 57)
    heard.wait_since(121, "the gradients of step 7")
    assert heard.said[1].endswith("Rank 1: not heard from for 57 s. The same: 1 other rank.")
    assert heard.codes == []


def test_the_lowest_rank_that_waits_tells() -> None:
    store = dist.HashStore()
    other = Heard(1, store)
    post(store, 0, "a sum", 61, is_waiting=True, posted_s=time.time() + 10)
    other.wait_since(60, "a sum")
    assert other.said == []


@pytest.mark.parametrize(
    ("waited_s", "silent_s", "failure", "why"),
    [
        (31, 0, "Cannot read examples.", "Rank 1 has failed: Cannot read examples."),
        (301, 301, None, "Rank 1 counts as gone."),
        (1801, 0, None, "That is the limit, 1800 s."),
    ],
)
def test_a_hopeless_wait_ends_with_the_reason(
    waited_s: float, silent_s: float, failure: str | None, why: str
) -> None:
    store = dist.HashStore()
    heard = Heard(0, store)
    post(store, 1, "the start", waited_s, posted_s=time.time() - silent_s)
    if failure:
        store.set(f"{ERROR}/1", failure)
    heard.wait_since(waited_s, "a sum")
    assert heard.codes == [2]
    (said,) = heard.said
    assert said.startswith(f"rank 0 has waited {waited_s} s for a sum. Rank 1: ")
    assert said.endswith(f"{why} All processes end. {GO_ON}")


def test_a_broken_connection_is_an_error_that_says_what_was_waited_for() -> None:
    watch = Heard(0, dist.HashStore()).watch
    text = "[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:7."
    with (
        pytest.raises(LostProcessError, match=r"has ended, while .* for the gradients of step 3"),
        watch.waits("the gradients of step 3"),
    ):
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="out of memory"), watch.waits("a sum"):
        raise RuntimeError("CUDA out of memory")


def test_the_limit_is_the_one_that_the_answer_to_ddp_timeout_names() -> None:
    peer = find_peer("ddp_timeout")
    assert peer is not None
    assert f"{WaitLimits().total_s:.0f} s" in peer.because
    assert WAIT_VARIABLE in peer.because
