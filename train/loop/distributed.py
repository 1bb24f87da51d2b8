"""The processes of one run under torchrun: this process's rank, sums and means over all of them.

One process alone is a world of one; each of these then costs nothing.  Gradients are averaged here,
once a step, and not by DistributedDataParallel.  That hooks into `forward`, but RALF's loss runs on
parts of the network, a discriminator steps between two backward passes, and batches may be added up
before a step.  One flat sum over all gradients has a fixed order, so that a run can be repeated bit
for bit.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's place."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and progress."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes; the tensor itself is left alone."""
        if self.world == 1:
            return values
        summed = values.clone()
        dist.all_reduce(summed)
        return summed

    @torch.no_grad()
    def average_(self, tensors: Iterable[Tensor]) -> None:
        """Put the mean over all processes into each tensor, in one message."""
        if self.world == 1:
            return
        tensors = list(tensors)
        if not tensors:
            return
        # In FP32, so that a sum over many processes loses nothing to half precision.
        flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.world
        for tensor, part in zip(
            tensors, torch.split(flat, [each.numel() for each in tensors]), strict=True
        ):
            tensor.copy_(part.reshape(tensor.shape))

    def gather(self, mine: T) -> list[T]:
        """What each process has, rank after rank."""
        if self.world == 1:
            return [mine]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, mine)
        return found


ALONE = Ranks()


@dataclass(frozen=True)
class Compute:
    """Where and how this process computes its share."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    """Of products; weights stay FP32."""
    ranks: Ranks = ALONE

    def share(self, whole: Iterable[T]) -> Iterator[T]:
        """Every n-th, this process's own: together the processes take each once."""
        return islice(whole, self.ranks.rank, None, self.ranks.world)

    def autocast(self) -> torch.autocast:
        """Products in the dtype; does nothing in FP32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def here() -> Ranks:
    """This process's place in the group it has joined; a world of one where it has joined none."""
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return Ranks(dist.get_rank(), dist.get_world_size())


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the group that torchrun set up in the environment, and leave it at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield here()
        # No process leaves while another still sends; after an error none is waited for.
        dist.barrier()
    finally:
        dist.destroy_process_group()
