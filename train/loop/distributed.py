"""The processes of one run under torchrun: who am I, and what do all of us say together.

A lone process is a world of one, in which each of these is free.  Gradients are averaged here, once
a step and by hand, where DistributedDataParallel would hook into `forward`: RALF's loss runs on the
parts of the network, a discriminator steps between two backward passes, and batches may be added up
before a step.  One flat sum over all of it has a fixed order, so that a run can be repeated bit
for bit.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor


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
        flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.world
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.reshape(tensor.shape))

    def gather(self, values: NDArray[np.generic], device: torch.device) -> NDArray[np.generic]:
        """All processes' rows, rank after rank; they may differ in number."""
        if self.world == 1:
            return values
        lengths = self.total(
            torch.tensor(
                [len(values) if rank == self.rank else 0 for rank in range(self.world)],
                device=device,
            )
        ).tolist()
        padded = np.zeros((max(lengths), *values.shape[1:]), values.dtype)
        padded[: len(values)] = values
        mine = torch.from_numpy(padded).to(device)
        rows = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(rows, mine)
        return np.concatenate(
            [each.cpu().numpy()[:length] for each, length in zip(rows, lengths, strict=True)]
        )

    def gather_text(self, text: str, device: torch.device) -> list[str]:
        """One text of each process."""
        data = np.frombuffer(text.encode(), np.uint8)
        ends = np.cumsum(self.gather(np.array([len(data)]), device))
        together = self.gather(data, device).tobytes()
        starts = [0, *ends[:-1]]
        return [together[a:b].decode() for a, b in zip(starts, ends, strict=True)]


ALONE = Ranks()


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
        # Nobody leaves while another still talks; after an error there is no waiting for anyone.
        dist.barrier()
    finally:
        dist.destroy_process_group()
