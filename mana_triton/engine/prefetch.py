"""Background threads: one that reads ahead, and several that work on items at the same time."""

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class StallTimes:
    """Seconds that the two ends of a queue waited for each other."""

    for_room: float = 0.0  # the producer
    for_items: float = 0.0  # the consumer


class _Finished(Exception):
    """Marks the end of the items in a queue."""


def prefetch(
    items: Iterable[T], depth: int = 4, stalls: StallTimes | None = None
) -> Generator[T, None, None]:
    """Iterate in a background thread, at most `depth` items ahead.

    An exception of the iterable is raised here, after the items before it. Closing this iterator
    stops the thread and closes the iterable.

    Args:
        items: what to iterate over.
        depth: items that may wait in the queue.
        stalls: waiting times are added to it.
    """
    ready: queue.Queue = queue.Queue(depth)
    stopped, stalls = threading.Event(), stalls or StallTimes()
    arguments = iter(items), ready, stopped, stalls
    thread = threading.Thread(target=_produce, args=arguments, daemon=True)
    thread.start()
    try:
        while True:
            started = time.perf_counter()
            item, error = ready.get()
            stalls.for_items += time.perf_counter() - started
            if error is not None:
                if isinstance(error, _Finished):
                    return
                raise error
            yield item
    finally:
        stopped.set()
        while thread.is_alive():  # it may be waiting for room in the queue
            with contextlib.suppress(queue.Empty):
                ready.get_nowait()
            thread.join(0.01)


def _produce(
    items: Iterator, ready: queue.Queue, stopped: threading.Event, stalls: StallTimes
) -> None:
    try:
        for item in items:
            started = time.perf_counter()
            ready.put((item, None))
            stalls.for_room += time.perf_counter() - started
            if stopped.is_set():
                break
    except BaseException as error:  # raised again in the consumer's thread
        ready.put((None, error))
    else:
        ready.put((None, _Finished()))
    finally:
        if isinstance(items, Generator):
            items.close()


def parallel_map(
    function: Callable[[T], R], items: Iterable[T], workers: int
) -> Generator[R, None, None]:
    """Map in `workers` threads that share PyTorch's threads; results are in order.

    Items are taken in the caller's thread while the workers are busy; at most `workers` results
    are pending while the next item is taken. An exception of `items` is raised after the results
    before it. One worker is the caller's own thread.
    """
    if workers == 1:
        yield from map(function, items)
        return
    threads = torch.get_num_threads()
    running: deque[Future[R]] = deque()
    failures: list[Exception] = []

    def until_failure() -> Iterator[T]:
        try:
            yield from items
        except Exception as error:
            failures.append(error)

    with ThreadPoolExecutor(workers) as pool:
        _share_threads(pool, workers, threads)
        try:
            for item in until_failure():
                running.append(pool.submit(function, item))
                if len(running) > workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
    if failures:
        raise failures[0]


def _share_threads(pool: ThreadPoolExecutor, workers: int, threads: int) -> None:
    """Give each worker of the pool its share of PyTorch's threads."""
    started = threading.Barrier(workers + 1)
    try:
        for _ in range(workers):
            pool.submit(_set_threads, max(threads // workers, 1), started)
        started.wait()
    except BaseException:
        started.abort()  # nobody waits for a worker that could not start
        raise
    # the number is per thread, but a new thread copies it from whichever thread set it last
    torch.set_num_threads(threads)


def _set_threads(number: int, started: threading.Barrier) -> None:
    torch.get_num_threads()  # the first call in a thread would overwrite what is set before it
    torch.set_num_threads(number)
    started.wait()
