"""Processes that train one model together, as torchrun starts them.

Each takes its share of every batch. Process 0 alone validates, saves and logs. Without torchrun
there is one process, and nothing here does anything.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# the others wait while process 0 decodes or validates; torchrun ends them if it dies
TIMEOUT = timedelta(days=1)


class Processes:
    """The processes of a run: how many, and which one this is."""

    def __init__(self):
        self.started = dist.is_torchelastic_launched()
        if self.started and not dist.is_initialized():
            # gradients by NCCL on GPUs, decisions by gloo, so that no GPU is waited for
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=TIMEOUT)
        self.rank = dist.get_rank() if self.started else 0
        self.count = dist.get_world_size() if self.started else 1
        self.local_rank = (
            dist.get_node_local_rank()  # pyright: ignore[reportPrivateImportUsage]
            if self.started
            else 0
        )

    def share(self, batch: int) -> range:
        """This process's samples of a batch."""
        size = batch // self.count
        return range(self.rank * size, (self.rank + 1) * size)

    @contextmanager
    def first_of_node(self) -> Iterator[None]:
        """One process of each machine does what is inside before the others do."""
        if self.local_rank:
            self.any()
        yield
        if not self.local_rank:
            self.any()

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether a process raised it; waits for all processes."""
        if self.count == 1:
            return list(flags)
        votes = torch.tensor([False, *flags], dtype=torch.uint8)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return votes[1:].bool().tolist()

    def average(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its mean over the processes.

        DistributedDataParallel orders its sums by when gradients are ready, so that a resumed run
        would differ in the last bits, and with gloo its threads sometimes never end.
        """
        if self.count == 1:
            return
        flat = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(flat)
        parts = (flat / self.count).split([x.numel() for x in tensors])
        for x, mean in zip(tensors, parts, strict=True):
            x.copy_(mean.view_as(x))

    def leave(self) -> None:
        """After the last collective operation of the run."""
        if self.started:
            self.any()
            dist.destroy_process_group()
