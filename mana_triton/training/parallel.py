"""Processes that train one model together, as torchrun starts them.

Each takes its share of every batch; the gradients are averaged, so that all of them make the same
step from the same weights. Process 0 alone validates, saves and shows. Without torchrun there is
one process, and nothing here does anything.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# the others wait while process 0 decodes or validates; torchrun ends them if it dies
PATIENCE = timedelta(days=1)


class Processes:
    """The processes of a run: how many, and which one this is."""

    def __init__(self):
        self.started = dist.is_torchelastic_launched()
        if self.started and not dist.is_initialized():
            # gradients go by NCCL on GPUs, decisions by gloo, so that no GPU is waited for
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=PATIENCE)
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
        """One process of a machine does what is inside before the others of it do."""
        if self.local_rank:
            self.meet()
        yield
        if not self.local_rank:
            self.meet()

    def average(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its mean over the processes."""
        if self.count == 1:
            return
        flat = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(flat)
        flat /= self.count
        for x, mean in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
            x.copy_(mean.view_as(x))

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether a process raised it."""
        if self.count == 1:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return votes.bool().tolist()

    def leave(self) -> None:
        """After the last collective operation of the run."""
        if self.started:
            self.meet()
            dist.destroy_process_group()

    def meet(self) -> None:
        """Wait for the others."""
        if self.count > 1:
            dist.all_reduce(torch.zeros(1))  # by gloo
