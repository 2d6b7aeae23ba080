"""The rings of the Hopper prefill kernel as a model that needs no GPU: does a run end, or do all parts wait?

Producer, scheduler and consumers of one block are generators that follow producer.cuh, tile_scheduler.cuh and
consumer.cuh step by step: each yields what it waits for, and goes on once that is true. Nothing that became true turns
false before the one that waits for it has gone on, so a deadlock of one order of steps is a deadlock of every order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

CLAIM_BLOCKS = 2  # kClaimBlocks
TILE_SLOTS = 2  # kTileSlots

Wait = Callable[[], bool]
Steps = Iterator[Wait]


@dataclass(frozen=True)
class Kernel:
    """What decides how the rings are used: a tile's schedule, and how many blocks a warpgroup may skip."""

    warpgroups: int
    stages: int
    stages_q: int
    overlap: bool
    queries_in_registers: bool
    most_first: int
    most_last: int
    clears: bool = False  # a tile's first values are waited for early, as on cached keys
    stages_loaded: int = 0  # of values that are loaded and then transposed into the ring of values, as of e4m3
    tells_late: bool = False  # a stage is told of when the next one has been asked for, as where rows are copied

    def share(self, blocks: int, begin: int, end: int) -> tuple[int, int, int]:
        """Blocks that a warpgroup skips first, works on and skips last; it sees those from begin to end of a tile's.

        open_tile's arithmetic; blocks are walked from the last to the first.
        """
        own_end = min(blocks, max(1, blocks - self.most_first, end))
        own_begin = max(0, min(own_end - 1, self.most_last, begin))
        return blocks - own_end, own_end - own_begin, own_begin


@dataclass(frozen=True)
class Tile:
    """Blocks of keys of a tile, and which of them each warpgroup sees: [begin, end), which may lie outside."""

    blocks: int
    seen: tuple[tuple[int, int], ...]


class Ring:
    """Stages that one part fills and each of its readers empties, in order."""

    def __init__(self, stages: int, readers: int) -> None:
        self._stages = stages
        self._emptied = [0] * readers
        self.copied = 0  # stages that are full, or will be once their copies are waited for
        self.filled = 0  # of these, stages that the readers know of

    def has_room(self) -> bool:
        """Whether every reader has emptied the stage that is filled next."""
        return self.copied - min(self._emptied) < self._stages

    def fill(self) -> Steps:
        """Wait for room, then fill."""
        yield self.has_room
        self.copied += 1
        self.filled += 1

    def holds(self, reader: int) -> bool:
        """Whether the stage that the reader empties next is full."""
        return self.filled > self._emptied[reader]

    def empty(self, reader: int) -> None:
        """Give a stage back."""
        self._emptied[reader] += 1

    def skip(self, reader: int, count: int) -> Steps:
        """Wait for stages and give them back unread."""
        for _ in range(count):
            yield lambda: self.holds(reader)
            self.empty(reader)


class Block:
    """One thread block: its rings, and its parts as steps."""

    def __init__(self, kernel: Kernel, tiles: Sequence[Tile]) -> None:
        self.kernel, self.tiles = kernel, tiles
        self.keys = Ring(kernel.stages, kernel.warpgroups)
        self.values = Ring(kernel.stages, kernel.warpgroups)
        self.queries = [Ring(kernel.stages_q, 1) for _ in range(kernel.warpgroups)]
        # The readers behind the consumers are the producer and the transposer, which the values are loaded for.
        self.slots = Ring(TILE_SLOTS, kernel.warpgroups + (2 if kernel.stages_loaded else 1))
        self.loaded = Ring(kernel.stages_loaded, 1) if kernel.stages_loaded else self.values
        self.claims = 0
        self.untold: Ring | None = None

    def parts(self) -> dict[str, Steps]:
        """Every part of the block by its name."""
        consumers = {f"consumer {w}": self._consumer(w) for w in range(self.kernel.warpgroups)}
        transposer = {"transposer": self._transposer()} if self.kernel.stages_loaded else {}
        return {"scheduler": self._scheduler(), "producer": self._producer(), **transposer, **consumers}

    def _scheduler(self) -> Steps:
        for number in range(len(self.tiles)):
            yield from self.slots.fill()
            yield lambda number=number: self.claims > number  # type: ignore[misc]
        yield from self.slots.fill()  # which says that there are no more

    def _tell(self) -> None:
        if self.untold is not None:
            self.untold.filled += 1
        self.untold = None

    def _wait(self, ready: Wait) -> Steps:
        """The loader's wait: before one that takes time it tells of what it has copied."""
        if not ready():
            self._tell()
            yield ready

    def _load(self, ring: Ring) -> Steps:
        """CachedProducer's load_k and load_v, or Producer's."""
        if not self.kernel.tells_late:
            yield from ring.fill()
            return
        yield from self._wait(ring.has_room)
        ring.copied += 1
        self._tell()
        self.untold = ring

    def _producer(self) -> Steps:
        yield lambda: True
        for number, tile in enumerate(self.tiles):
            yield from self._wait(lambda number=number: self.slots.filled > number)  # type: ignore[misc]
            yield from self._load(self.keys)
            if number > 0 and self.kernel.stages_q == 1:
                yield from self._load(self.loaded)  # the last ones of the tile before
            for ring in self.queries:
                yield from self._wait(ring.has_room)
                yield from ring.fill()
            if number > 0 and self.kernel.stages_q > 1:
                yield from self._load(self.loaded)
            claim_at = min(tile.blocks - 2, CLAIM_BLOCKS)
            self.claims += claim_at < 0
            for block in range(tile.blocks - 2, -1, -1):
                self.claims += block == claim_at
                yield from self._load(self.keys)
                yield from self._load(self.loaded)
            self.slots.empty(self.kernel.warpgroups)
        yield from self._load(self.loaded)
        self._tell()

    def _transposer(self) -> Steps:
        """fp8_transposer.cuh: its warps go together, so one stands for them."""
        yield lambda: True
        for number, tile in enumerate(self.tiles):
            yield lambda number=number: self.slots.filled > number  # type: ignore[misc]
            for _ in range(tile.blocks):
                yield lambda: self.loaded.holds(0)
                yield from self.values.fill()
                self.loaded.empty(0)
            self.slots.empty(self.kernel.warpgroups + 1)

    def _consumer(self, w: int) -> Steps:
        shares = [self.kernel.share(tile.blocks, *tile.seen[w]) for tile in self.tiles]
        yield lambda: self.slots.filled > 0
        yield from self._wait_queries(w, shares[0][0])
        for number, (skipped_first, own, skipped_last) in enumerate(shares):
            yield from self.values.skip(w, skipped_first)
            yield from self._run(w, own)
            yield lambda: self.values.holds(w)
            yield from self.keys.skip(w, skipped_last)
            yield lambda number=number: self.slots.filled > number + 1  # type: ignore[misc]
            if number + 1 < len(shares):
                yield from self._wait_queries(w, shares[number + 1][0])
            self.values.empty(w)
            self.slots.empty(w)
            yield from self.values.skip(w, skipped_last)

    def _wait_queries(self, w: int, skipped_first: int) -> Steps:
        yield lambda: self.queries[w].holds(0)
        if self.kernel.queries_in_registers:
            self.queries[w].empty(0)
        yield from self.keys.skip(w, skipped_first)
        yield lambda: self.keys.holds(w)

    def _run(self, w: int, own: int) -> Steps:
        """All blocks of a warpgroup but the output of the last one: run_overlapped or run_in_turn."""
        for block in range(own):
            self.keys.empty(w)
            last = block == own - 1
            if last and not self.kernel.queries_in_registers:
                self.queries[w].empty(0)
            if self.kernel.overlap and block > 0:
                self.values.empty(w)  # of the block before
            if last:
                return
            if self.kernel.clears and block == 0:
                yield lambda: self.values.holds(w)
            if self.kernel.overlap:
                yield lambda: self.keys.holds(w)
                yield lambda: self.values.holds(w)
            else:
                yield lambda: self.values.holds(w)
                yield lambda: self.keys.holds(w)
                self.values.empty(w)


def stuck(kernel: Kernel, tiles: Sequence[Tile], choose: Callable[[list[str]], str]) -> list[str]:
    """The parts that wait without end, none where the run ends. `choose` says which of those that can go on does so."""
    parts = Block(kernel, tiles).parts()
    waiting = {name: next(steps) for name, steps in parts.items()}
    while waiting:
        ready = [name for name, wait in waiting.items() if wait()]
        if not ready:
            return list(waiting)
        name = choose(ready)
        wait = next(parts[name], None)
        if wait is None:
            del waiting[name]
        else:
            waiting[name] = wait
    return []
