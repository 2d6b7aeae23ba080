"""The calls that hopper_serving.py times: a serving engine's decode, verify and chunked prefill.

Figures that were recorded before stand here with where they come from: peers, and a probe's kernel that only read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Limit:
    """What a cell must show: a field of its line, the value it must not exceed, and the one to aim for."""

    field: str
    at_least: float
    aim: float


@dataclass(frozen=True)
class Peer:
    """The best peer's recorded time, the median of repeated runs on an H200 whose copy ran at `copy` GB/s."""

    name: str
    ms: float
    copy: int


@dataclass(frozen=True)
class Cell:
    """Attention of `queries` tokens at the end of `context` cached ones, causal, bf16, in shuffled pages.

    context: of every sequence, or the mean of lognormal lengths. tree: the query tokens are a tree of drafts.
    goal: the name under which a result is looked up later. probe_ms: the probe's pure read of the same pages.
    twin: the cell whose time `over_twin` is in units of.
    latent: columns of the values, which are keys as well (qv): MLA, in one buffer with head_dim rotated columns.
    deterministic: as the argument; the same call without it is timed beside it, and `over_free` is in units of that.
    mixed: the cache is in e4m3, with a factor of each sequence and head, or, "tokens", of each token and head besides;
    Hopper's time over the same numbers in bf16 is beside it, and `times_bf16` says how many times faster this is.
    fp8: q is in e4m3 as well, with a factor of each sequence and key head.
    """

    name: str
    batch: int
    context: int
    heads: int = 32
    kv_heads: int = 8
    queries: int = 1
    head_dim: int = 128
    page: int = 64
    lognormal: bool = False
    tree: bool = False
    function: str = "flash_attn_with_kvcache"
    goal: str | None = None
    limits: tuple[Limit, ...] = ()
    peer: Peer | None = None
    probe_ms: float | None = None
    twin: str | None = None
    latent: int = 0
    deterministic: bool = False
    mixed: str = ""
    fp8: bool = False

    @property
    def is_read_bound(self) -> bool:
        """Whether reading the cache takes longer than the products: then the pure read is its limit."""
        return self.queries * self.heads < 128 if self.latent else self.queries <= 16

    def lengths(self) -> list[int]:
        """Keys of each sequence, the same at every call."""
        if not self.lognormal:
            return [self.context] * self.batch
        dice = torch.Generator().manual_seed(0)
        raw = torch.exp(torch.randn(self.batch, generator=dice)).clamp(max=8.0)  # no sequence is most of the batch
        return (raw * (self.context / raw.mean())).clamp(min=16).round().int().tolist()

    def kv_bytes(self) -> int:
        """Bytes of keys and values, and of the factors of tokens, that the call must read."""
        if self.latent:
            return sum(self.lengths()) * self.kv_heads * (self.latent + self.head_dim) * (1 if self.mixed else 2)
        of_row = self.head_dim * (1 if self.mixed else 2) + (4 if self.mixed == "tokens" else 0)
        return sum(self.lengths()) * self.kv_heads * 2 * of_row

    def operations(self) -> int:
        """2 * q * keys * hq * (columns of keys + of values) for each sequence; the mask's triangle is not taken off."""
        columns = 2 * self.latent + self.head_dim if self.latent else 2 * self.head_dim
        return 2 * self.queries * sum(self.lengths()) * self.heads * columns

    def facts(self) -> dict[str, object]:
        """Its sizes, for its line."""
        facts: dict[str, object] = {
            "case": self.name, "function": self.function, "batch": self.batch, "queries": self.queries,
            "context": self.context, "heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim,
            "page_size": self.page, "dtype": "float8_e4m3fn" if self.fp8 else "bfloat16",
        }  # fmt: skip
        if self.latent:
            facts["head_dim_v"] = self.latent
        if self.mixed:
            facts |= {"cache_dtype": "float8_e4m3fn", "factors": self.mixed}
        if self.lognormal:
            lengths = self.lengths()
            facts |= {
                "lengths": "lognormal",
                "mean_length": round(sum(lengths) / len(lengths)),
                "longest": max(lengths),
            }
        return facts


FLASHINFER_05 = "FlashInfer 0.5.3, recorded 2026-11-20"
FLASHINFER_07 = "FlashInfer 0.7.4, recorded 2026-11-29"
FA3 = "FA3 0251105a, recorded 2026-11-20"
COPY_20, COPY_29 = 4249, 4275  # GB/s of the copy in those two runs


def _ms(at_least: float, aim: float) -> tuple[Limit, ...]:
    return (Limit("hopper_ms", at_least, aim),)


def _decode() -> list[Cell]:
    """32/8 heads, d 128, in pages of 64, of 16 and of 1."""
    pages_of_64 = [
        Cell("decode 1x1k", 1, 1024, probe_ms=0.0070,
             limits=(Limit("hopper_ms", 0.0095, 0.0085), Limit("hopper_graph_ms", 0.0050, 0.0045))),
        Cell("decode 1x8k", 1, 8192, goal="decode 1x8k", limits=_ms(0.0180, 0.0165), probe_ms=0.0152,
             peer=Peer(FLASHINFER_05, 0.0247, COPY_20)),
        Cell("decode 16x8k", 16, 8192, goal="decode 16x8k", limits=_ms(0.137, 0.134), probe_ms=0.1322,
             peer=Peer(FLASHINFER_05, 0.1401, COPY_20)),
        Cell("decode 128x4k", 128, 4096, goal="decode 128x4k", limits=_ms(0.493, 0.486), probe_ms=0.4816,
             peer=Peer(FLASHINFER_05, 0.4931, COPY_20)),
        Cell("decode 64x32k", 64, 32768, goal="decode 64x32k", limits=_ms(1.905, 1.887), probe_ms=1.878,
             peer=Peer(FLASHINFER_05, 1.8988, COPY_20)),
    ]  # fmt: skip
    cells = list(pages_of_64)
    peers = {16: (FLASHINFER_07, COPY_29, (0.0262, 0.1438, 0.5078, 1.9573)),
             1: (FLASHINFER_05, COPY_20, (0.0259, 0.1420, 0.5074, 1.9536))}  # fmt: skip
    for page, at_least, aim in ((16, 1.015, 1.01), (1, 1.04, 1.03)):
        name, copy, times = peers[page]
        for cell, ms in zip(pages_of_64[1:], times, strict=True):
            cells.append(
                replace(cell, name=f"{cell.name} page {page}", page=page, goal=None, probe_ms=None, twin=cell.name,
                        limits=(Limit("over_twin", at_least, aim),), peer=Peer(name, ms, copy))
            )  # fmt: skip
    return cells


def _verify() -> list[Cell]:
    """32 x 8k, 64/8 heads: one query token, drafts in a row, drafts in a tree."""
    cells = [
        Cell("verify q1", 32, 8192, heads=64, limits=_ms(0.256, 0.254), probe_ms=0.248,
             peer=Peer(FLASHINFER_05, 0.2572, COPY_20)),
        Cell("verify q4", 32, 8192, heads=64, queries=4, limits=_ms(0.262, 0.259), probe_ms=0.248,
             peer=Peer(FA3, 0.2749, COPY_20)),
        Cell("verify q8", 32, 8192, heads=64, queries=8, goal="verify q8", limits=_ms(0.269, 0.266), probe_ms=0.248,
             peer=Peer(FA3, 0.2857, COPY_20)),
        Cell("verify q16", 32, 8192, heads=64, queries=16, limits=_ms(0.29, 0.29), probe_ms=0.248,
             peer=Peer(FA3, 0.3047, COPY_20)),
    ]  # fmt: skip
    trees = [
        replace(cell, name=f"{cell.name} tree", tree=True, goal=None, peer=None, probe_ms=None, twin=cell.name,
                limits=(Limit("over_twin", 1.03, 1.02),))
        for cell in cells[1:]
    ]  # fmt: skip
    ragged = replace(cells[2], name="verify q8 varlen", function="flash_attn_varlen_func", goal=None, twin="verify q8",
                     limits=())  # fmt: skip
    return [*cells, *trees, ragged]


def _shapes() -> list[Cell]:
    """Lengths, head sizes and groups that are held against the pure read of their own pages."""
    near = (Limit("over_pure_read", 1.06, 1.03),)
    return [
        Cell("lognormal", 64, 4096, lognormal=True, limits=(Limit("over_pure_read", 1.08, 1.05),)),
        Cell("shape d 64", 64, 8192, head_dim=64, limits=near),
        Cell("shape d 256", 64, 8192, head_dim=256, limits=near),
        Cell("shape MHA 16 heads", 64, 8192, heads=16, kv_heads=16, limits=near),
        Cell("shape group 16", 64, 8192, heads=32, kv_heads=2, limits=near),
    ]


def _fixed() -> list[Cell]:
    """Splits of fixed key ranges, beside free ones."""
    free = [*(cell for cell in _decode() if cell.page == 64), *_verify()[:3], *_shapes()]
    limits = (Limit("over_free", 1.03, 1.02),)
    return [
        replace(cell, name=f"fixed {cell.name}", deterministic=True, goal=None, peer=None, probe_ms=None, limits=limits)
        for cell in free
    ]


def _mixed() -> list[Cell]:
    """bf16 queries over an e4m3 cache: factors of sequences, and once of tokens. Some with queries in e4m3 as well."""
    goals = {"1x8k": 0.0142, "16x8k": 0.080, "128x4k": 0.260, "64x32k": 0.985}
    cells = []
    for name, ms in goals.items():
        plain = next(cell for cell in _decode() if cell.name == f"decode {name}")
        cells.append(replace(plain, name=f"mixed {name}", mixed="sequences", goal=f"mixed {name}", limits=_ms(ms, ms),
                             peer=None, probe_ms=None))  # fmt: skip
    long = cells[-1]
    cells.append(replace(long, name="mixed 64x32k page 1", page=1, goal=None, twin=long.name,
                         limits=(Limit("over_twin", 1.06, 1.06),)))  # fmt: skip
    cells.append(replace(long, name="mixed 64x32k tokens", mixed="tokens", goal=None, limits=(), twin=long.name))
    for queries in (1, 2, 4, 8):
        plain = next(cell for cell in _verify() if cell.queries == 4)
        cells.append(replace(plain, name=f"mixed verify q{queries}", queries=queries, mixed="sequences", limits=(),
                             peer=None, probe_ms=None))  # fmt: skip
    for d in (64, 256):
        cells.append(Cell(f"mixed d {d}", 64, 8192, head_dim=d, mixed="sequences"))
    chunk = next(cell for cell in _chunks() if cell.name == "chunk 256")
    cells.append(replace(chunk, name="mixed chunk 256", mixed="sequences", goal=None, limits=(), peer=None))
    prefill = next(cell for cell in _chunks() if cell.name == "chunk 4x2048")
    cells.append(replace(prefill, name="mixed chunk 4x2048", mixed="sequences", limits=(), peer=None))
    names = ("mixed 64x32k", "mixed verify q8", "mixed chunk 256", "mixed chunk 4x2048")
    in_fp8 = [
        replace(cell, name=cell.name.replace("mixed", "fp8"), fp8=True, goal=None, limits=(), twin=cell.name)
        for cell in cells
        if cell.name in names
    ]
    return cells + in_fp8


def _chunks() -> list[Cell]:
    """Chunked prefill: many query tokens at the end of a long context."""
    cells = [
        Cell("chunk 256", 1, 131072, heads=8, kv_heads=1, queries=256, goal="chunk 256", limits=_ms(0.235, 0.222),
             peer=Peer(FA3, 0.2422, COPY_20)),
        Cell("chunk 1024", 1, 131072, heads=8, kv_heads=1, queries=1024, limits=_ms(0.98, 0.90),
             peer=Peer(FA3, 1.0315, COPY_20)),
        Cell("chunk 512", 1, 32768, queries=512, limits=_ms(0.46, 0.46), peer=Peer(FA3, 0.4697, COPY_20)),
        Cell("chunk 4x2048", 4, 8192, queries=2048, limits=_ms(1.64, 1.64), peer=Peer(FLASHINFER_07, 1.6689, COPY_29)),
    ]  # fmt: skip
    ragged = replace(cells[2], name="chunk 512 varlen", function="flash_attn_varlen_func", twin="chunk 512", limits=())
    return [*cells, ragged]


def _latent() -> list[Cell]:
    """MLA over pages of 64: 128 heads are bound by products, 16 by reading 1,152 bytes a token."""
    cell = Cell("mla 128", 64, 8192, heads=128, kv_heads=1, head_dim=64, latent=512)
    few = replace(cell, name="mla 16", heads=16, limits=(Limit("over_pure_read", 1.11, 1.06),))
    return [
        replace(cell, goal="mla 128", limits=(Limit("hopper_ms", 0.2434, 0.225),)),  # 600, 650 TFLOP/s
        replace(cell, name="mla 64", heads=64),
        few,
        replace(few, name="mla 16 q4", queries=4, twin="mla 16", limits=(Limit("over_twin", 1.1, 1.05),)),
        replace(few, name="mla 16 page 1", page=1, twin="mla 16", limits=()),
        replace(cell, name="mla 1x32k", batch=1, context=32768, limits=_ms(0.040, 0.035)),
        *(replace(cell, name=f"mixed mla {heads}", heads=heads, mixed="sequences") for heads in (128, 64, 16)),
        replace(few, name="mixed mla 16 page 1", page=1, mixed="sequences", twin="mixed mla 16", limits=()),
    ]


# A twin stands before the cells that are measured against it.
CELLS = {cell.name: cell for cell in (*_decode(), *_verify(), *_shapes(), *_chunks(), *_latent(), *_fixed(), *_mixed())}
QUICK = ("decode 1x8k", "decode 16x8k", "decode 16x8k page 1", "verify q8", "chunk 256")
# Microseconds from Python call to return of a paged decode call with `out` given: the GPU's time is not in it.
HOST = "host time"
HOST_LIMIT = Limit("hopper_us", 12.0, 9.0)


def chosen(words: list[str]) -> list[str]:
    """Names of cells and HOST, in their order: a word is a name, else the beginning of names.

    Raises ValueError for a word that is neither.
    """
    names = [*CELLS, HOST]
    found: set[str] = set()
    for word in words:
        fitting = [word] if word in names else [name for name in names if name.startswith(word)]
        if not fitting:
            raise ValueError(f"{word!r} is not the beginning of a cell's name; the cells are {', '.join(names)}")
        found.update(fitting)
    return [name for name in names if name in found]
