"""Exchange by copy engines: every rank of a host maps the others' memory and brings what it needs from there.

A rank publishes its tensors in one of two slots of an allocation of its own, and tells each other rank by a word in
that rank's memory. A rank that wants them waits for the word in a stream of its own, copies, and tells the publisher
that it is done, which the publisher waits for before the slot's next use, two calls later. Words count calls; streams
wait for them and write them by themselves. So nothing of the exchange runs on a multiprocessor, the host waits for
nobody, and whoever waits knows for whom.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jit_kernel.attention.parallel import driver
from jit_kernel.attention.parallel.failures import failure_of

_SLOTS = 2
_ALIGNED = 256
_DEFAULT_TIMEOUT = 600.0
_EXIT_SECONDS = 5.0
_log = logging.getLogger("jit_kernel")


def why_not(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Why the group's ranks cannot map each other's memory, None where they can. A collective of the group."""
    found: list[Any] = [None] * dist.get_world_size(group)
    index = torch.cuda.current_device() if device.index is None else device.index
    dist.all_gather_object(found, (socket.gethostname(), str(torch.cuda.get_device_properties(index).uuid)), group)
    hosts = sorted({host for host, _ in found})
    if len(hosts) > 1:
        return f"the ranks are on {len(hosts)} hosts, whose memory cannot be mapped"
    seen = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    lacking: str | None = None
    for rank, (_, uuid) in enumerate(found):
        other = seen.get(uuid)
        if other is None:
            lacking = f"the GPU of rank {rank} is not visible to every rank"
        elif other != index and not torch.cuda.can_device_access_peer(index, other):
            lacking = f"a GPU has no access to the memory of rank {rank}'s"
    reasons: list[str | None] = [None] * len(found)
    dist.all_gather_object(reasons, lacking, group)
    return next((reason for reason in reasons if reason is not None), None)


class NotMappedError(RuntimeError):
    """A rank could not map another's memory. Every rank of the group raises it."""


def connect(group: dist.ProcessGroup, device: torch.device) -> Peers:
    """Map every rank's words into every other. A collective of the group. Raises NotMappedError."""
    return Peers(group, device)


class Peers:
    """The transport of one group on one host."""

    name = "peers"
    reason = "the ranks map each other's memory; copy engines bring it"
    sm_margin = 0

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.calls = 0
        self._capacity = 0
        self._slots: list[int] = []  # of every rank, mapped here
        with torch.cuda.device(device):
            # Of every rank: words [0, size) count what others have published, [size, 2 size) what they have taken.
            self.words = self._mapped(2 * 4 * self.size)
            self.stream = torch.cuda.Stream(priority=-1)  # type: ignore[no-untyped-call]
            self._last: torch.cuda.Event | None = None
            self.watch = _Watch(self)
        atexit.register(_wait_for_readers, weakref.ref(self))

    def _mapped(self, count: int) -> list[int]:
        """`count` bytes of every rank: of this one new, of the others mapped. All ranks come here together."""
        own, handles = 0, [None] * self.size
        try:
            own = driver.allocate(count)
        except RuntimeError:
            torch.cuda.empty_cache()  # what torch keeps and does not use
            with contextlib.suppress(RuntimeError):  # told below, to every rank
                own = driver.allocate(count)
        dist.all_gather_object(handles, driver.handle_of(own) if own else None, self.group)
        found, problem = [own] * self.size, None if own else f"rank {self.rank} has no {count} bytes of GPU memory"
        for rank, handle in enumerate(handles):
            if rank != self.rank and handle is not None and problem is None:
                try:
                    found[rank] = driver.open_handle(handle)
                except RuntimeError as error:
                    problem = f"rank {self.rank} cannot map the memory of rank {rank}: {error}"
        problems: list[str | None] = [None] * self.size
        dist.all_gather_object(problems, problem, self.group)
        told = next((each for each in problems if each is not None), None)
        if told is not None:
            raise NotMappedError(told)
        return found

    def publish(self, tensors: Sequence[Tensor], capacity: int) -> _Slot:
        """See exchange.Transport."""
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "context parallelism by peers' copies counts its calls, so a CUDA graph cannot hold it: call "
                "exchange.use(group, device, 'collective') on every rank before the capture"
            )
        with torch.cuda.device(self.device):
            if capacity > self._capacity or not self._slots:
                self._grow(capacity)
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            if size > self._capacity:
                raise ValueError(f"{size} bytes are published; the ranks agreed on {capacity} at most")
            self.calls += 1
            now = torch.cuda.current_stream(self.device)
            if self._last is not None:  # calls of several streams are told to the others in their order
                now.wait_event(self._last)
            slot = _Slot(self, tensors)
            self._last = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._last.record(now)
            return slot

    def _grow(self, capacity: int) -> None:
        """New slots, of a size that every rank finds by itself; all ranks come here in the same call."""
        torch.cuda.synchronize(self.device)
        dist.barrier(self.group)  # nobody reads the old ones
        for rank, address in enumerate(self._slots):
            if rank != self.rank:
                driver.close_handle(address)
        if self._slots:
            dist.barrier(self.group)  # nobody maps them
            driver.free(self._slots[self.rank])
            self._slots = []
        self._capacity = max(1, -(-capacity // _ALIGNED)) * _ALIGNED
        self._slots = self._mapped(_SLOTS * self._capacity)

    def slot_of(self, rank: int, call: int) -> int:
        """Where a rank's slot for a call lies."""
        return self._slots[rank] + (call % _SLOTS) * self._capacity

    def published(self, of: int, to: int) -> int:
        """The word, in rank `to`'s memory, that counts what rank `of` has published."""
        return self.words[to] + 4 * of

    def taken(self, of: int, to: int) -> int:
        """The word, in rank `of`'s memory, that counts what rank `to` has taken from it."""
        return self.words[of] + 4 * (self.size + to)


class _Slot:
    """One call's tensors of this rank, while others take them."""

    def __init__(self, ways: Peers, tensors: Sequence[Tensor]) -> None:
        self._ways, self._call = ways, ways.calls
        now = torch.cuda.current_stream(ways.device)
        for other in range(ways.size):
            if other != ways.rank:
                driver.wait_for(ways.taken(ways.rank, other), self._call - _SLOTS, now)
        at = ways.slot_of(ways.rank, self._call)
        for tensor in tensors:
            count = tensor.numel() * tensor.element_size()
            driver.copy(at, tensor.contiguous().data_ptr(), count, now)
            at += count
        for other in range(ways.size):
            if other != ways.rank:
                driver.write(ways.published(ways.rank, other), self._call, now)

    def ask(self, to: int, sent: Sequence[Tensor], of: int, offset: int, into: Sequence[Tensor]) -> _Pull:
        """See exchange.Published; every other rank is asked once in a call."""
        return _Pull(self._ways, self._call, of, offset, into)


class _Pull:
    def __init__(self, ways: Peers, call: int, of: int, offset: int, into: Sequence[Tensor]) -> None:
        # `into` may be memory that kernels of the present stream have just left.
        ways.stream.wait_stream(torch.cuda.current_stream(ways.device))
        driver.wait_for(ways.published(of, ways.rank), call, ways.stream)
        at = ways.slot_of(of, call) + offset
        for tensor in into:
            count = tensor.numel() * tensor.element_size()
            driver.copy(tensor.data_ptr(), at, count, ways.stream)
            tensor.record_stream(ways.stream)
            at += count
        driver.write(ways.taken(of, ways.rank), call, ways.stream)
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._arrived.record(ways.stream)
        self._device = ways.device
        ways.watch.expect(call, self._arrived)

    def wait(self) -> None:
        """The current stream waits for the copies."""
        torch.cuda.current_stream(self._device).wait_event(self._arrived)


class _Watch:
    """Ends the process where a rank does not come: a stream that waits for a word can be told nothing else.

    NCCL's own watchdog does the same. The line that it logs names the ranks.
    """

    def __init__(self, ways: Peers) -> None:
        self._ways = weakref.ref(ways)
        self._timeout = timeout_of(ways.group)
        self._waiting: list[tuple[int, torch.cuda.Event, float]] = []
        self._lock = threading.Lock()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._thread: threading.Thread | None = None

    def expect(self, call: int, arrived: torch.cuda.Event) -> None:
        """Something of a call is under way."""
        with self._lock:
            self._waiting.append((call, arrived, time.monotonic() + self._timeout))
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, name="jit_kernel peers", daemon=True)
            self._thread.start()

    def _look(self) -> None:
        ways = self._ways()
        if ways is None:
            return
        torch.cuda.set_device(ways.device)
        driver.spare_captures()
        del ways
        while True:
            time.sleep(min(0.1, self._timeout / 4))
            ways = self._ways()
            if ways is None:
                return
            with self._lock:
                self._waiting = [each for each in self._waiting if not each[1].query()]  # type: ignore[no-untyped-call]
                late = [call for call, _, end in self._waiting if time.monotonic() > end]
            if late:
                self._end(ways, late[0])
            del ways

    def _end(self, ways: Peers, call: int) -> None:
        text = "an exchange between ranks did not end"
        try:
            text = str(failure_of(self._missing(ways, call), TimeoutError(f"nothing within {self._timeout:g} s")))
        finally:
            _log.critical("%s; this process ends, because its stream cannot", text)
            logging.shutdown()
            sys.stderr.flush()
            os.abort()

    def _missing(self, ways: Peers, call: int) -> int:
        """The global rank that published too few calls, or took too few."""
        words = driver.read_words(ways.words[ways.rank], 2 * ways.size, self._stream)
        counts = {r: min(words[r], words[ways.size + r] + _SLOTS) for r in range(ways.size) if r != ways.rank}
        rank = min(counts, key=lambda r: (min(counts[r], call), r))
        return dist.get_global_rank(ways.group, rank)


def _wait_for_readers(found: weakref.ref[Peers]) -> None:
    """Before a process ends: others may still copy from its memory, which would go with it."""
    ways = found()
    end = time.monotonic() + _EXIT_SECONDS
    while ways is not None and time.monotonic() < end:
        stream = torch.cuda.Stream(ways.device)  # type: ignore[no-untyped-call]
        words = driver.read_words(ways.words[ways.rank], 2 * ways.size, stream)[ways.size :]
        if all(word >= ways.calls for rank, word in enumerate(words) if rank != ways.rank):
            return
        time.sleep(0.02)


def timeout_of(group: dist.ProcessGroup) -> float:
    """The group's timeout in seconds."""
    try:
        backend = group._get_backend(torch.device("cpu"))
    except RuntimeError:
        try:
            backend = group._get_backend(torch.device("cuda"))
        except RuntimeError:
            return _DEFAULT_TIMEOUT
    timeout = getattr(getattr(backend, "options", None), "_timeout", None)
    return _DEFAULT_TIMEOUT if timeout is None else float(timeout.total_seconds())
