import threading
import time
from collections.abc import Sequence

import pytest

from lora.data.sequences.prefetch import Prefetcher
from lora.data.tokenizers.subword import TextTokenizer
from lora.errors import DataError


def test_results_come_in_their_order_in_the_callers_thread() -> None:
    taken: list[tuple[int, int, int]] = []

    def work(texts: Sequence[str]) -> tuple[int, int]:
        time.sleep(0.002 * (len(texts) % 3))
        return len(texts), threading.get_ident()

    with Prefetcher(work) as prefetcher:
        for n_texts in range(7):
            prefetcher.put(
                ["a"] * n_texts, lambda found: taken.append((*found, threading.get_ident()))
            )
    assert [n_texts for n_texts, _, _ in taken] == list(range(7))
    assert {taker for _, _, taker in taken} == {threading.get_ident()}
    assert threading.get_ident() not in {worker for _, worker, _ in taken}


def test_the_next_batch_is_submitted_before_a_result_is_consumed() -> None:
    begun, seen = [threading.Event() for _ in range(3)], []

    def work(texts: Sequence[str]) -> int:
        begun[int(texts[0])].set()
        return int(texts[0])

    def take(number: int) -> None:
        seen.append(number == 2 or begun[number + 1].wait(5))

    with Prefetcher(work) as prefetcher:
        for number in range(3):
            prefetcher.put([str(number)], take)
    assert seen == [True, True, True]


def test_at_most_two_batches_wait() -> None:
    n_put = n_taken = most = 0

    def take(result: str) -> None:
        nonlocal n_taken, most
        most, n_taken = max(most, n_put - n_taken), n_taken + 1

    with Prefetcher(lambda texts: texts[0]) as prefetcher:
        for _ in range(20):
            n_put += 1
            prefetcher.put(["x"], take)
    assert (n_taken, most) == (20, 2)


def test_what_the_work_raises_comes_out_of_the_end(tokenizer: TextTokenizer) -> None:
    with (
        pytest.raises(DataError, match="character 1 is a lone surrogate"),
        Prefetcher(tokenizer.encode_fast) as prefetcher,
    ):
        prefetcher.put(["a\ud800"], lambda found: pytest.fail("there is no result"))


def test_what_the_work_raises_comes_out_of_put(tokenizer: TextTokenizer) -> None:
    taken: list[int] = []
    with Prefetcher(tokenizer.encode_fast) as prefetcher:
        prefetcher.put(["\udfff"], lambda found: taken.append(0))
        with pytest.raises(DataError, match="character 0 is a lone surrogate"):
            prefetcher.put(["b"], lambda found: taken.append(1))
    assert taken == [1]


def test_an_error_of_the_caller_ends_the_thread_and_consumes_nothing_more() -> None:
    n_threads, taken = threading.active_count(), []

    def fail_between() -> None:
        with Prefetcher(len) as prefetcher:
            prefetcher.put(["a"], taken.append)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail_between()
    assert taken == []
    assert threading.active_count() == n_threads
