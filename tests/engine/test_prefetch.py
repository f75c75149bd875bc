"""Background threads: order, errors, laziness and shutdown."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from mana_triton.engine.prefetch import StallTimes, parallel_map, prefetch


class Source:
    """Numbers that count how far they were read, and notice when they are closed."""

    def __init__(self, fail_at: int | None = None):
        self.read, self.fail_at = 0, fail_at
        self.threads: set[threading.Thread] = set()
        self.closed = threading.Event()

    def __iter__(self) -> Iterator[int]:
        try:
            for number in range(1000):
                self.threads.add(threading.current_thread())
                if number == self.fail_at:
                    raise OSError(f"no number {number}")
                self.read += 1
                yield number
        finally:
            self.closed.set()

    def has_stopped(self) -> bool:
        return not any(thread.is_alive() for thread in self.threads)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "timeout"
        time.sleep(0.005)


@pytest.mark.parametrize("depth", [1, 4])
def test_prefetch_keeps_the_order(depth):
    source = Source()
    assert list(prefetch(source, depth)) == list(range(1000))
    assert list(prefetch([], depth)) == []
    assert threading.current_thread() not in source.threads
    assert source.has_stopped()


def test_stall_times_belong_to_the_side_that_waits():
    slow, stalls = 0.05, [StallTimes(), StallTimes()]

    def source():
        for n in range(6):
            time.sleep(slow)
            yield n

    list(prefetch(source(), 1, stalls[0]))
    for _ in prefetch(iter(range(6)), 1, stalls[1]):
        time.sleep(slow)
    assert stalls[0].for_items > 4 * slow > stalls[0].for_room
    assert stalls[1].for_room > 2 * slow > stalls[1].for_items


def test_prefetch_raises_an_error_after_the_items_before_it():
    source, got = Source(7), []
    with pytest.raises(OSError, match="no number 7"):
        for number in prefetch(source):
            got.append(number)
    assert got == list(range(7))
    assert source.has_stopped()


@pytest.mark.parametrize("depth", [1, 3])
def test_prefetch_depth_is_bounded(depth):
    source = Source()
    numbers = prefetch(source, depth)
    assert source.read == 0
    for taken in range(1, 4):
        next(numbers)
        # `depth` are in the queue, and the thread holds one more
        wait_for(lambda: source.read >= taken + depth)  # noqa: B023
        time.sleep(0.05)
        assert source.read <= taken + depth + 1
    numbers.close()


def test_closing_prefetch_stops_its_thread_and_the_source():
    source = Source()
    generator = iter(source)  # held here, so that it is not closed by being collected
    numbers = prefetch(generator, 2)
    assert list(itertools.islice(numbers, 5)) == list(range(5))
    numbers.close()
    assert source.closed.is_set()
    assert source.read < 1000
    assert source.has_stopped()


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_parallel_map_keeps_the_order(workers):
    def slow(x: int) -> int:
        time.sleep(0.002 * (3 - x % 3))
        return x * x

    assert list(parallel_map(slow, range(20), workers)) == [x * x for x in range(20)]


@pytest.mark.parametrize("workers", [1, 3])
def test_parallel_map_gives_results_before_an_error(workers):
    got = []
    with pytest.raises(OSError, match="no number 7"):
        for x in parallel_map(lambda x: x, Source(7), workers):
            got.append(x)
    assert got == list(range(7))


def test_parallel_map_workers_share_the_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        shares = parallel_map(lambda _: torch.get_num_threads(), range(6), 2)
        assert set(shares) == {2}
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_closing_parallel_map_stops_its_threads():
    running = threading.active_count()
    results = parallel_map(lambda x: x, iter(Source()), 3)
    next(results)
    assert threading.active_count() == running + 3
    results.close()
    assert threading.active_count() == running
