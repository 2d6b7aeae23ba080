"""Exchange of keys and values between the ranks of a torch.distributed group: gloo, NCCL and MCCL alike.

Tensors travel as bytes, which every backend takes for every dtype, and arrive in buffers of the size that the sender's
share has: shares differ by a few tokens where a sequence does not divide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "musa": "mccl"}


def backend_name(device: torch.device | str) -> str:
    """The torch.distributed backend for a device: gloo, nccl or mccl (torchada maps nccl to mccl by itself)."""
    kind = torch.device(device).type if isinstance(device, torch.device) else device.partition(":")[0]
    if kind not in BACKENDS:
        raise ValueError(f"device is {str(device)!r}; it must be one of {', '.join(BACKENDS)}")
    return BACKENDS[kind]


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


class Exchange:
    """One step of a ring under way: what goes to the next rank and what comes from the one before."""

    def __init__(self, tensors: Sequence[Tensor], rows: int, group: dist.ProcessGroup | None) -> None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        to, of = ((rank + 1) % size, (rank - 1) % size)
        if group is not None:
            to, of = dist.get_global_rank(group, to), dist.get_global_rank(group, of)
        self._sent = [x.contiguous() for x in tensors]  # kept until they have left
        self.received = [x.new_empty((rows, *x.shape[1:])) for x in tensors]
        operations = [dist.P2POp(dist.isend, _bytes(x), to, group) for x in self._sent if x.numel()]
        operations += [dist.P2POp(dist.irecv, x.view(-1).view(torch.uint8), of, group) for x in self.received if rows]
        self._requests: list[Any] = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> list[Tensor]:
        """The received tensors; the current stream waits for them, the host only with gloo."""
        for request in self._requests:
            request.wait()
        return self.received


def gather(x: Tensor, rows: Sequence[int], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Every rank's x, of `rows` rows each; a collective wants equal sizes, so all are padded to the longest."""
    longest = max(rows)
    padded = x.new_zeros((longest, *x.shape[1:]))
    padded[: x.shape[0]] = x
    parts = [torch.empty_like(padded) for _ in rows]
    dist.all_gather([_bytes_of(part) for part in parts], _bytes_of(padded), group=group)
    return [part[:n] for part, n in zip(parts, rows, strict=True)]


def _bytes_of(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)
