"""Exchange between the ranks of a torch.distributed group: what every form of context parallelism stands on.

A `Transport` publishes a rank's tensors and brings those of others, by name:

- `peers`: CUDA memory of the ranks of one host, mapped into each other; copy engines bring it, no multiprocessor
  takes part (peers.py);
- `nccl`, `mccl`, `gloo`: sends and receipts of the group's own backend.

Tensors travel as bytes, which every backend takes for every dtype, straight from the rank that they come from: a rank
that waits for another knows which one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from jit_kernel.attention.parallel import peers
from jit_kernel.attention.parallel.failures import failure_of

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "musa": "mccl"}
# Multiprocessors that an attention call leaves to a backend whose exchange runs on them.
_MARGIN = 8


def backend_name(device: torch.device | str) -> str:
    """The torch.distributed backend for a device: gloo, nccl or mccl (torchada maps nccl to mccl by itself)."""
    kind = torch.device(device).type if isinstance(device, torch.device) else device.partition(":")[0]
    if kind not in BACKENDS:
        raise ValueError(f"device is {str(device)!r}; it must be one of {', '.join(BACKENDS)}")
    return BACKENDS[kind]


class Pending(Protocol):
    """What was asked for."""

    def wait(self) -> None:
        """The current stream waits until it is there, the host only with gloo. Raises RankError."""


class Published(Protocol):
    """A rank's tensors while others may read them."""

    def ask(self, to: int, sent: Sequence[Tensor], of: int, offset: int, into: Sequence[Tensor]) -> Pending:
        """Bring what rank `of` of the group sends here, and let rank `to` have `sent`, parts of what was published.

        offset: where it lies in what `of` published, in bytes. into: contiguous, one part after another. Every rank
        asks in the same order, each for whom it is the one to send to.
        """


class Transport(Protocol):
    """One way between the ranks of a group."""

    @property
    def name(self) -> str: ...

    @property
    def reason(self) -> str:
        """Why this way and not a better one."""

    @property
    def sm_margin(self) -> int:
        """The multiprocessors that an attention call leaves it while it runs."""

    def publish(self, tensors: Sequence[Tensor], capacity: int) -> Published:
        """Offer tensors, one after another in memory; capacity: the most bytes that any rank of the group offers."""


@dataclass(frozen=True)
class Collective:
    """Sends and receipts of the group's backend."""

    group: dist.ProcessGroup
    name: str
    reason: str
    sm_margin: int

    def publish(self, tensors: Sequence[Tensor], capacity: int) -> Published:
        return _Sent(self.group)


class _Sent:
    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def ask(self, to: int, sent: Sequence[Tensor], of: int, offset: int, into: Sequence[Tensor]) -> Pending:
        return _Messages(self._group, to, sent, of, into)


class _Messages:
    def __init__(
        self, group: dist.ProcessGroup, to: int, sent: Sequence[Tensor], of: int, into: Sequence[Tensor]
    ) -> None:
        self._peers = [dist.get_global_rank(group, rank) for rank in (of, to)]
        self._kept = [x.contiguous() for x in sent]  # until they have left
        receipts = [dist.P2POp(dist.irecv, as_bytes(x), self._peers[0], group) for x in into if x.numel()]
        sends = [dist.P2POp(dist.isend, as_bytes(x), self._peers[1], group) for x in self._kept if x.numel()]
        self._requests: list[Any] = []
        self._receipts = len(receipts)
        if receipts or sends:
            try:
                self._requests = dist.batch_isend_irecv([*receipts, *sends])
            except RuntimeError as error:  # a connection that broke before
                raise failure_of(self._peers[0], error) from error

    def wait(self) -> None:
        for at, request in enumerate(self._requests):
            try:
                request.wait()
            except RuntimeError as error:
                raise failure_of(self._peers[0 if at < self._receipts else 1], error) from error


def as_bytes(x: Tensor) -> Tensor:
    """A contiguous tensor's memory, (bytes,) uint8."""
    return x.reshape(-1).view(torch.uint8)


_chosen: WeakKeyDictionary[dist.ProcessGroup, dict[torch.device, Transport]] = WeakKeyDictionary()


def transport_of(group: dist.ProcessGroup | None, device: torch.device) -> Transport:
    """The group's way on a device, chosen once; all ranks of the group must ask for it together the first time."""
    group = group or dist.group.WORLD
    need_group(group)
    known, device = _chosen.setdefault(group, {}), _indexed(device)  # type: ignore[arg-type]
    if device not in known:
        known[device] = _choose(group, device)  # type: ignore[arg-type]
    return known[device]


def _indexed(device: torch.device) -> torch.device:
    """A device by the name that its tensors give it."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def need_group(group: dist.ProcessGroup | None) -> None:
    """Raise RuntimeError where there is no process group."""
    if group is None:
        raise RuntimeError("context parallelism needs torch.distributed.init_process_group() first")


def use(group: dist.ProcessGroup | None, device: torch.device, name: str) -> Transport:
    """Take a way by name, "peers" or "collective", from now on. Every rank of the group must call it."""
    if name not in ("peers", "collective"):
        raise ValueError(f"name is {name!r}; it must be 'peers' or 'collective'")
    group = group or dist.group.WORLD
    need_group(group)
    device = _indexed(device)
    make = peers.connect if name == "peers" else _asked_for
    transport: Transport = make(group, device)  # type: ignore[arg-type]
    _chosen.setdefault(group, {})[device] = transport  # type: ignore[arg-type]
    return transport


def _choose(group: dist.ProcessGroup, device: torch.device) -> Transport:
    if dist.get_world_size(group) == 1:
        return _collective(group, device, "a rank alone has nobody to exchange with")
    if device.type != "cuda":
        return _collective(group, device, f"a group on {device.type} has no copy engines between its ranks")
    reason = peers.why_not(group, device)
    if reason is not None:
        return _collective(group, device, reason)
    try:
        return peers.connect(group, device)
    except peers.NotMappedError as error:  # on every rank alike
        return _collective(group, device, str(error))


def _asked_for(group: dist.ProcessGroup, device: torch.device) -> Transport:
    return _collective(group, device, "it was asked for")


def _collective(group: dist.ProcessGroup, device: torch.device, reason: str) -> Transport:
    name = str(dist.get_backend(group)) if device.type == "cpu" else backend_name(device)
    return Collective(group, name, reason, 0 if device.type == "cpu" else _MARGIN)


def swap_all(
    transport: Transport, group: dist.ProcessGroup | None, sent: Sequence[Tensor], offsets: Sequence[int],
    into: Sequence[Tensor], capacity: int,
) -> None:  # fmt: skip
    """Every rank's part for every other: sent[j] goes to rank j, into[j] comes from rank j, which sends it from byte
    offsets[j] of its own parts. All parts contiguous."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    into[rank].copy_(sent[rank])
    published = transport.publish(sent, capacity)
    under_way = []
    for step in range(1, size):
        to, of = (rank + step) % size, (rank - step) % size
        under_way.append(published.ask(to, [sent[to]], of, offsets[of], [into[of]]))
    for pending in under_way:
        pending.wait()


def gather(x: Tensor, rows: Sequence[int], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Every rank's x, of `rows` rows each."""
    parts = [x.new_empty((n, *x.shape[1:])) for n in rows]
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    whole = x.contiguous()
    capacity = max(rows) * math.prod(x.shape[1:]) * x.element_size()
    published = transport_of(group, x.device).publish([whole], capacity)
    parts[rank].copy_(whole)
    under_way = [
        published.ask((rank + step) % size, [whole], (rank - step) % size, 0, [parts[(rank - step) % size]])
        for step in range(1, size)
    ]
    for pending in under_way:
        pending.wait()
    return parts


def returned(parts: Sequence[Tensor], rows: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """What every rank has for this one, added in float32 by rank: parts[r], of rows[r] rows, goes to rank r."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    row = math.prod(parts[rank].shape[1:]) * parts[rank].element_size()
    into = [torch.empty_like(parts[rank]) for _ in range(size)]
    offsets = [sum(rows[:rank]) * row] * size
    swap_all(transport_of(group, parts[rank].device), group, parts, offsets, into, sum(rows) * row)
    whole = into[0].float()
    for part in into[1:]:
        whole += part
    return whole.to(parts[rank].dtype)
