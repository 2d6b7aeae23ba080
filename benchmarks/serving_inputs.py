"""The tensors of a cell, the call of ours on them, and whether a result is right."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from serving_cells import Cell

from jit_kernel import flash_attention_v3

# Of a row's norm, in float32: rounding to bf16 makes 0.0025. One wrong key of 8,192 makes 0.0156, a wrong page more.
MOST_ERROR = 0.01
DRAFT_BITS = 32  # of a word of draft_mask, whose bits are the last keys


@dataclass(frozen=True)
class Inputs:
    """q (b, sq, hq, d); caches (pages, page, hk, d); page_table (b, most pages), whose unused entries are 0.

    factors: of a cache in e4m3, by the names of the public functions.
    """

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    page_table: torch.Tensor
    lengths: torch.Tensor
    draft_mask: torch.Tensor | None
    out: torch.Tensor
    qv: torch.Tensor | None = None  # (b, sq, hq, dv): v_cache has dv columns, both caches are slices of one buffer
    factors: dict[str, torch.Tensor] = field(default_factory=dict)


def make(cell: Cell, device: str) -> Inputs:
    """Random tensors of a cell, the same at every call; pages lie in random order."""
    dice = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=dice, device=device, dtype=torch.bfloat16)

    lengths = cell.lengths()
    pages = [-(-length // cell.page) for length in lengths]
    order = torch.randperm(sum(pages), generator=dice, device=device).int()
    table = torch.zeros((cell.batch, max(pages)), dtype=torch.int32, device=device)
    used = torch.arange(max(pages), device=device) < torch.tensor(pages, device=device)[:, None]
    table[used] = order
    counts = torch.tensor(lengths, dtype=torch.int32, device=device)
    factors = {}
    if cell.latent:
        width = cell.latent + cell.head_dim
        qv, q = normal(cell.batch, cell.queries, cell.heads, width).split((cell.latent, cell.head_dim), dim=-1)
        buffer = normal(sum(pages), cell.page, cell.kv_heads, width)
        if cell.mixed:
            buffer = buffer.to(torch.float8_e4m3fn)
            factors = {f"{letter}_descale": torch.ones(cell.batch, 1, device=device) for letter in "kv"}
        v_cache, k_cache = buffer.split((cell.latent, cell.head_dim), -1)
        out = torch.empty_like(qv, memory_format=torch.contiguous_format)
        return Inputs(q, k_cache, v_cache, table, counts, None, out, qv, factors)
    k_cache, v_cache = (normal(sum(pages), cell.page, cell.kv_heads, cell.head_dim) for _ in "kv")
    if cell.mixed:
        k_cache, v_cache = (x.to(torch.float8_e4m3fn) for x in (k_cache, v_cache))
        shapes = {"descale": (cell.batch, cell.kv_heads)}
        if cell.mixed == "tokens":
            shapes["scale"] = tuple(k_cache.shape[:-1])
        for name, shape in shapes.items():
            for letter in "qkv" if cell.fp8 and name == "descale" else "kv":
                factors[f"{letter}_{name}"] = 0.5 + torch.rand(shape, generator=dice, device=device)
    q = normal(cell.batch, cell.queries, cell.heads, cell.head_dim)
    out = torch.empty_like(q)
    if cell.fp8:
        q = q.to(torch.float8_e4m3fn)
    mask = tree_mask(cell.batch, cell.queries).to(device) if cell.tree else None
    return Inputs(q, k_cache, v_cache, table, counts, mask, out, factors=factors)


def in_bf16(inputs: Inputs) -> Inputs:
    """The same queries and cache in bf16, without factors; the result has memory of its own."""
    q, k, v = inputs.q.bfloat16(), inputs.k_cache.bfloat16(), inputs.v_cache.bfloat16()
    return replace(inputs, q=q, k_cache=k, v_cache=v, out=torch.empty_like(inputs.out), factors={})


def tree_mask(batch: int, queries: int) -> torch.Tensor:
    """(batch * queries, 1) int32: drafts are a sequence's last keys; each sees itself, its ancestors, and all before.

    A draft's parent is a random one before it, or the context.
    """
    if queries > DRAFT_BITS:
        raise ValueError(f"{queries} drafts; a word holds {DRAFT_BITS}")
    dice = random.Random(0)
    rows = []
    for _ in range(batch):
        older = (1 << (DRAFT_BITS - queries)) - 1
        seen: list[int] = []
        for i in range(queries):
            parent = dice.randrange(-1, i)
            seen.append((seen[parent] if parent >= 0 else older) | 1 << (DRAFT_BITS - queries + i))
        rows += seen
    signed = [row - (1 << DRAFT_BITS) if row >> (DRAFT_BITS - 1) else row for row in rows]
    return torch.tensor(signed, dtype=torch.int32)[:, None]


def missing(cell: Cell) -> str | None:
    """Why a cell cannot be called at all, None when it can."""
    parameters = inspect.signature(getattr(flash_attention_v3, cell.function)).parameters
    return f"{cell.function} has no draft_mask" if cell.tree and "draft_mask" not in parameters else None


def read_caches(cell: Cell, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """What the pure read reads: the caches, or of one buffer two others that have its bytes together."""
    if not cell.latent:
        return inputs.k_cache, inputs.v_cache
    shape = (*inputs.v_cache.shape[:3], (cell.latent + cell.head_dim) // 2)
    k_cache, v_cache = (torch.randn(shape, device=inputs.q.device).to(inputs.v_cache.dtype) for _ in "kv")
    return k_cache, v_cache


def our_call(cell: Cell, inputs: Inputs) -> Callable[[], torch.Tensor]:
    """The public function on the cell's tensors, `out` given, the number of splits left to it."""
    function = getattr(flash_attention_v3, cell.function)
    options: dict[str, object] = {"page_table": inputs.page_table, "causal": True, "num_splits": 0}
    if inputs.draft_mask is not None:
        options["draft_mask"] = inputs.draft_mask
    options |= inputs.factors
    if cell.deterministic:
        options["deterministic"] = True
    if inputs.qv is not None:
        options["qv"] = inputs.qv
    if cell.function == "flash_attn_with_kvcache":
        q, k, v, out, lengths = inputs.q, inputs.k_cache, inputs.v_cache, inputs.out, inputs.lengths
        return lambda: function(q, k, v, cache_seqlens=lengths, out=out, **options)
    flat_q, flat_out = inputs.q.flatten(0, 1), inputs.out.flatten(0, 1)
    starts = torch.arange(cell.batch + 1, dtype=torch.int32, device=flat_q.device) * cell.queries
    longest = max(cell.lengths())

    def ragged() -> torch.Tensor:
        return function(
            flat_q, inputs.k_cache, inputs.v_cache, starts, None, cell.queries, longest, seqused_k=inputs.lengths,
            out=flat_out, **options,
        )  # fmt: skip

    return ragged


def tokens_of(inputs: Inputs, letter: str, sequence: int, pages: torch.Tensor) -> torch.Tensor:
    """(tokens, hk, d) float32: what a cache's pages stand for."""
    cache = inputs.k_cache if letter == "k" else inputs.v_cache
    raw = cache.view(torch.uint8) if cache.element_size() == 1 else cache  # e4m3 has no indexing on every torch
    tokens = raw[pages].view(cache.dtype).flatten(0, 1).float()
    descale, scale = inputs.factors.get(f"{letter}_descale"), inputs.factors.get(f"{letter}_scale")
    if descale is not None:
        tokens *= descale[sequence, None, :, None]
    return tokens if scale is None else tokens * scale[pages].flatten(0, 1)[..., None]


def reference(cell: Cell, inputs: Inputs, sequence: int, tokens: list[int]) -> torch.Tensor:
    """(tokens, hq, d): the formula in float32 for some query tokens of a sequence."""
    length = int(inputs.lengths[sequence])
    pages = inputs.page_table[sequence, : -(-length // cell.page)].long()
    k, v = (tokens_of(inputs, letter, sequence, pages)[:length] for letter in "kv")
    group = cell.heads // cell.kv_heads
    q = inputs.q[sequence].float()[tokens].unflatten(1, (cell.kv_heads, group))
    scores = torch.einsum("thgd,nhd->hgtn", q, k)
    if inputs.qv is not None:
        qv = inputs.qv[sequence, tokens].float().unflatten(1, (cell.kv_heads, group))
        scores += torch.einsum("thgd,nhd->hgtn", qv, v)
    q_descale = inputs.factors.get("q_descale")
    if q_descale is not None:
        scores *= q_descale[sequence, :, None, None, None]
    scores /= math.sqrt(cell.head_dim + cell.latent)
    rows = torch.tensor(tokens, device=q.device)
    seen = torch.arange(length, device=q.device) <= (length - cell.queries + rows)[:, None]
    if inputs.draft_mask is not None:
        words = inputs.draft_mask[sequence * cell.queries + rows].long()
        seen[:, -DRAFT_BITS:] &= (words >> torch.arange(DRAFT_BITS, device=q.device) & 1).bool()
    weights = torch.softmax(scores.masked_fill(~seen, -math.inf), dim=-1)
    return torch.einsum("hgtn,nhd->thgd", weights, v).flatten(1, 2)


def fault(cell: Cell, inputs: Inputs, result: torch.Tensor) -> str | None:
    """Where some rows of a result are wrong, of the first, the last and two other sequences; None if they are right."""
    dice = random.Random(0)
    sequences = {0, cell.batch - 1, *(dice.randrange(cell.batch) for _ in range(2))}
    tokens = sorted({0, cell.queries // 2, cell.queries - 1})
    rows = result.view(cell.batch, cell.queries, cell.heads, cell.latent or cell.head_dim)
    for sequence in sorted(sequences):
        right = reference(cell, inputs, sequence, tokens)
        errors = (rows[sequence, tokens].float() - right).norm(dim=-1) / right.norm(dim=-1)
        errors = errors.flatten().nan_to_num(nan=math.inf)
        worst = int(errors.argmax())
        error = float(errors[worst])
        if error > MOST_ERROR:
            token, head = tokens[worst // cell.heads], worst % cell.heads
            return f"relative error {error:.4f} at sequence {sequence}, token {token}, head {head}"
    return None


def fault_of(cell: Cell, inputs: Inputs, call: Callable[[], torch.Tensor]) -> str | None:
    """The same for what a call writes into an output that held NaN."""
    inputs.out.fill_(math.nan)
    return fault(cell, inputs, call())
