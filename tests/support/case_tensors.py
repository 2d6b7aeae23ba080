"""From a Plan to tensors: `build(plan)` makes the arguments of a call, and the same as plain sequences.

Every byte that must not matter is NaN: outputs, unused pages, rows past a length, the gaps between strided rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.support import reference
from tests.support.case_maker import Maker, raw
from tests.support.cases import FP8, KVCACHE, VARLEN, Plan

WILD = (2**31 - 1, -(2**31), -1, 1 << 20)  # page numbers where none may be read


@dataclass
class Case:
    """A call ready to be made: its arguments, the same as plain sequences, and where each sequence's rows lie."""

    plan: Plan
    arguments: dict[str, Any]
    problem: reference.Problem
    out_rows: list[tuple]  # index of a sequence's rows in out
    lse_rows: list[tuple]  # and in lse
    appended: list[tuple[str, tuple, Tensor, bool]] = field(default_factory=list)  # argument, where, what, rotated
    slots: Callable[[int, int, int], tuple] = lambda i, a, b: ()  # where tokens a to b of sequence i's keys lie

    def describe(self) -> str:
        """The plan and the arguments as text, for a person who has to reproduce a failure."""
        lines = [f"case_tensors.build({self.plan!r})"]
        for name, value in self.arguments.items():
            if isinstance(value, Tensor):
                value = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} strides {value.stride()}"
            lines.append(f"  {name}: {value}")
        return "\n".join(lines)


def put(x: Tensor, where: tuple, what: Tensor) -> None:
    raw(x)[where] = raw(what.contiguous())


def build(plan: Plan) -> Case:
    """The tensors of a plan, on its device; the same numbers for the same plan."""
    maker = Maker(plan)
    arguments: dict[str, Any] = {}
    queries, out_rows, lse_rows = _place_queries(maker, arguments)
    keys = _place_keys(maker, arguments)
    descales = _descales(maker, arguments)
    scales = _token_scales(maker, arguments)
    appended, queries = _append(maker, arguments, keys, queries, scales)
    sinks = None
    if plan.sinks:
        dtype = torch.float32 if plan.sinks == "float32" else plan.dtype
        sinks = arguments["sinks"] = maker.normal(plan.hq, dtype=dtype, factor=2.0)
    masks = _draft_masks(maker, arguments, out_rows)
    sequences = [
        reference.Sequence(
            q=q, k=k, v=v, qv=qv, draft_mask=masks[i], **{name: value[i] for name, value in (descales | scales).items()}
        )
        for i, ((q, qv), (k, v)) in enumerate(zip(queries, keys, strict=True))
    ]
    problem = reference.Problem(
        sequences, plan.softmax_scale, plan.causal, plan.window_size, plan.attention_chunk or 0, plan.softcap, sinks,
        plan.only_qv,
    )  # fmt: skip
    _scalars(maker, arguments)
    return Case(plan, arguments, problem, out_rows, lse_rows, appended, maker.slots)


def _gaps(maker: Maker, lengths: tuple[int, ...], spare: bool) -> list[int]:
    """Room for each sequence: its length, and when spare some rows more."""
    return [n + (maker.roll(6) if spare else 0) for n in lengths]


def _starts(rooms: list[int] | tuple[int, ...]) -> list[int]:
    return [0, *itertools.accumulate(rooms)]


def _place_queries(maker: Maker, arguments: dict[str, Any]) -> tuple[list, list[tuple], list[tuple]]:
    plan = maker.plan
    rooms = _gaps(maker, plan.lengths_q, plan.seqused_q)
    starts = _starts(rooms)
    if plan.q_layout == "ragged":
        lead: tuple[int, ...] = (starts[-1] + plan.tail,)
        arguments["cu_seqlens_q"] = maker.ints(starts)
        rows: list[tuple] = [(slice(a, a + n),) for a, n in zip(starts, plan.lengths_q, strict=False)]
        lse_rows: list[tuple] = [(slice(None), *row) for row in rows]
    else:
        lead = (maker.batch, max(rooms))
        rows = [(i, slice(0, n)) for i, n in enumerate(plan.lengths_q)]
        lse_rows = [(i, slice(None), slice(0, n)) for i, n in enumerate(plan.lengths_q)]
        if plan.function == VARLEN:
            arguments["cu_seqlens_q"] = None
    if plan.seqused_q:
        arguments["seqused_q"] = maker.ints(plan.lengths_q)
    if plan.function != "flash_attn_func" and plan.max_seqlen != "none":
        arguments["max_seqlen_q"] = max(rooms) + (7 if plan.max_seqlen == "loose" else 0)
    q = arguments["q"] = maker.poisoned(*lead, plan.hq, plan.d, strided=plan.strides)
    qv = maker.poisoned(*lead, plan.hq, plan.dv, strided=plan.strides) if plan.qv else None
    if qv is not None:
        arguments["qv"] = qv
    queries = []
    for row, n in zip(rows, plan.lengths_q, strict=True):
        one = maker.normal(n, plan.hq, plan.d, factor=plan.magnitude)
        put(q, row, one)
        one_qv = maker.normal(n, plan.hq, plan.dv, factor=plan.magnitude) if qv is not None else None
        if qv is not None and one_qv is not None:
            put(qv, row, one_qv)
        queries.append((one, one_qv))
    if plan.out:
        dtype = torch.bfloat16 if plan.dtype == FP8 else plan.dtype
        arguments["out"] = maker.poisoned(*lead, plan.hq, plan.dv, dtype=dtype, strided=plan.out == "strided")
    return queries, rows, lse_rows


def _place_keys(maker: Maker, arguments: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Put the keys that are there before the call; record where later tokens go in maker.slots."""
    plan = maker.plan
    new = plan.lengths_new or (0,) * maker.batch
    ends = tuple(n + m for n, m in zip(plan.lengths_k, new, strict=True))
    suffix = "_cache" if plan.function == KVCACHE else ""
    if plan.k_layout == "ragged":
        starts = _starts(_gaps(maker, plan.lengths_k, bool(plan.used_k)))
        arguments["cu_seqlens_k"] = maker.ints(starts)
        lead: tuple[int, ...] = (starts[-1] + plan.tail,)
        maker.slots = lambda i, a, b: (torch.arange(starts[i] + a, starts[i] + b),)
        room = max(_gaps(maker, plan.lengths_k, False))
    else:
        if plan.function == VARLEN:
            arguments["cu_seqlens_k"] = None
        rows = max(plan.cache_rows, maker.batch)
        picked = list(range(maker.batch))
        if plan.cache_rows:
            picked = torch.randperm(rows, generator=maker.random)[: maker.batch].tolist()
            arguments["cache_batch_idx"] = maker.ints(picked)
        room = max(ends) + (maker.roll(9) if plan.used_k else 0)
        lead = _paged(maker, arguments, rows, picked, ends) if plan.page_size else (rows, room)
        if not plan.page_size:
            maker.slots = lambda i, a, b: (torch.full((b - a,), picked[i]), torch.arange(a, b))
    if plan.used_k:
        lengths = plan.lengths_k[0] if plan.used_k == "int" else maker.ints(plan.lengths_k)
        arguments["cache_seqlens" if plan.function == KVCACHE else "seqused_k"] = lengths
    if plan.function == VARLEN and plan.max_seqlen != "none":
        arguments["max_seqlen_k"] = max(room, *plan.lengths_k) + (5 if plan.max_seqlen == "loose" else 0)
    k, v = _key_memory(maker, lead)
    arguments["k" + suffix], arguments["v" + suffix] = k, v
    skipped = plan.leftpad or (0,) * maker.batch
    if plan.leftpad is not None:
        arguments["cache_leftpad"] = maker.ints(plan.leftpad)
    keys = []
    for i, (pad, n) in enumerate(zip(skipped, plan.lengths_k, strict=True)):
        one = [maker.normal(n - pad, plan.hk, size, dtype=plan.key_dtype) for size in (plan.d, plan.dv)]
        put(k, maker.slots(i, pad, n), one[0])
        put(v, maker.slots(i, pad, n), one[1])
        keys.append((one[0], one[1]))
    return keys


def _key_memory(maker: Maker, lead: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    plan = maker.plan
    if plan.strides and plan.d % plan.stride_step == 0 and maker.roll(4) == 0:  # one memory for both
        both = maker.poisoned(*lead, plan.hk, plan.d + plan.dv, dtype=plan.key_dtype)
        return both[..., : plan.d], both[..., plan.d :]
    return (
        maker.poisoned(*lead, plan.hk, plan.d, dtype=plan.key_dtype, strided=plan.strides),
        maker.poisoned(*lead, plan.hk, plan.dv, dtype=plan.key_dtype, strided=plan.strides),
    )


def _paged(maker: Maker, arguments: dict[str, Any], rows: int, picked: list[int], ends: tuple[int, ...]) -> tuple:
    """Shuffled pages with some to spare, and a table whose unused entries point nowhere."""
    plan = maker.plan
    size = plan.page_size
    counts = [-(-n // size) for n in ends]
    pages = sum(counts) + maker.roll(4) + 1
    order = torch.randperm(pages, generator=maker.random).tolist()
    width = max(*counts, 1) + maker.roll(3)
    table = torch.tensor([[WILD[(r + c) % len(WILD)] for c in range(width)] for r in range(rows)], dtype=torch.int64)
    for i, count in enumerate(counts):
        first = plan.leftpad[i] // size if plan.leftpad else 0
        table[picked[i], first:count] = torch.tensor([order.pop() for _ in range(first, count)], dtype=torch.int64)
    arguments["page_table"] = table.to(torch.int32).to(plan.device)

    def slots(i: int, a: int, b: int) -> tuple[Tensor, Tensor]:
        token = torch.arange(a, b)
        return table[picked[i], token // size], token % size

    maker.slots = slots
    return pages, size


def _append(
    maker: Maker, arguments: dict[str, Any], keys: list, queries: list, scales: dict[str, list[Tensor]]
) -> tuple[list, list]:
    """New tokens, rotated where the plan says so, at the end of each sequence's keys; queries are rotated, too."""
    plan = maker.plan
    if plan.lengths_new is None:
        return [], queries
    starts = _starts(plan.lengths_new)
    ragged = plan.new_layout == "ragged"
    if ragged:
        arguments["cu_seqlens_k_new"] = maker.ints(starts)
    lead = (starts[-1] + plan.tail,) if ragged else (maker.batch, plan.lengths_new[0])
    dtype = plan.key_dtype if plan.stored else plan.dtype
    k = arguments["k"] = maker.poisoned(*lead, plan.hk, plan.d, dtype=dtype, strided=plan.strides)
    v = arguments["v"] = maker.poisoned(*lead, plan.hk, plan.dv, dtype=dtype, strided=plan.strides)
    first = _rotary_tables(maker, arguments) if plan.rotary_dim else None
    appended, rotated = [], list(queries)
    for i, n in enumerate(plan.lengths_new):
        new_k, new_v = (maker.normal(n, plan.hk, size, dtype=dtype) for size in (plan.d, plan.dv))
        where = (slice(starts[i], starts[i + 1]),) if ragged else (i,)
        put(k, where, new_k)
        put(v, where, new_v)
        if first is not None:
            new_k = _rotate(plan, arguments, new_k, first[i] + torch.arange(n), rounded=plan.kv_dtype is None)
            query, qv = queries[i]
            advances = plan.causal or max(plan.window_size) >= 0 or bool(plan.attention_chunk)
            steps = torch.arange(len(query)) if advances else torch.zeros(len(query), dtype=torch.int64)
            rotated[i] = _rotate(plan, arguments, query, first[i] + steps), qv
        if plan.kv_dtype is not None and not plan.stored:
            new_k, new_v = (
                reference.quantised(x, _factors(arguments, scales, letter, i, n, plan.hk))
                for letter, x in (("k", new_k), ("v", new_v))
            )
        slots = maker.slots(i, plan.lengths_k[i], plan.lengths_k[i] + n)
        appended += [("k_cache", slots, new_k, first is not None), ("v_cache", slots, new_v, False)]
        keys[i] = _joined(keys[i][0], new_k), _joined(keys[i][1], new_v)
    return appended, rotated


def _joined(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([raw(a), raw(b)]).view(a.dtype)


def _rotary_tables(maker: Maker, arguments: dict[str, Any]) -> list[int]:
    """cos and sin of random angles, and the first position of each sequence."""
    plan = maker.plan
    first = list(plan.lengths_k)
    if plan.rotary_seqlens:
        first = [maker.roll(40) for _ in first]
        arguments["rotary_seqlens"] = maker.ints(first)
    longest = max(*plan.lengths_q, *(plan.lengths_new or ()))
    angles = torch.rand(max(first) + longest + 1, plan.rotary_dim // 2, generator=maker.random) * 6.28
    arguments["rotary_cos"] = angles.cos().to(plan.dtype).to(plan.device)
    arguments["rotary_sin"] = angles.sin().to(plan.dtype).to(plan.device)
    arguments["rotary_interleaved"] = plan.rotary_interleaved
    return first


def _rotate(plan: Plan, arguments: dict[str, Any], x: Tensor, positions: Tensor, *, rounded: bool = True) -> Tensor:
    rotate = reference.rotate if rounded else reference.turned
    return rotate(x, arguments["rotary_cos"], arguments["rotary_sin"], positions.to(plan.device),
                  interleaved=plan.rotary_interleaved)  # fmt: skip


def _factors(
    arguments: dict[str, Any], scales: dict[str, list[Tensor]], letter: str, i: int, new: int, heads: int
) -> Tensor:
    """What sequence i's new keys or values are divided by, (new, hk)."""
    descale, scale = arguments.get(f"{letter}_descale"), scales.get(f"{letter}_scale")
    factor = torch.ones(new, heads, device=arguments["q"].device)
    if descale is not None:
        factor = factor * descale[i]
    return factor if scale is None else factor * scale[i][len(scale[i]) - new :]


def _descales(maker: Maker, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """(b, hk) float32 factors, or one factor seen by all."""
    plan = maker.plan
    made = {}
    for letter in plan.descales:
        shape = (1, 1) if plan.descale_expanded else (maker.batch, plan.hk)
        values = 0.5 + torch.rand(*shape, generator=maker.random)
        made[f"{letter}_descale"] = values.to(plan.device).expand(maker.batch, plan.hk)
    arguments.update(made)
    return made


def _token_scales(maker: Maker, arguments: dict[str, Any]) -> dict[str, list[Tensor]]:
    """Of each sequence, (sk, hk) float32, new keys included; NaN where there is no token."""
    plan = maker.plan
    made: dict[str, list[Tensor]] = {}
    new, skipped = plan.lengths_new or (0,) * maker.batch, plan.leftpad or (0,) * maker.batch
    for letter in plan.token_scales:
        keys = arguments[letter + ("_cache" if plan.function == KVCACHE else "")]
        scale = maker.poisoned(*keys.shape[:-1], dtype=torch.float32)
        if plan.strides:  # heads outside of tokens
            scale = scale.transpose(-1, -2).contiguous().transpose(-1, -2)
        made[f"{letter}_scale"] = []
        for i, (pad, n, more) in enumerate(zip(skipped, plan.lengths_k, new, strict=True)):
            one = 0.5 + torch.rand(n + more - pad, plan.hk, generator=maker.random)
            put(scale, maker.slots(i, pad, n + more), one.to(plan.device))
            made[f"{letter}_scale"].append(one.to(plan.device))
        arguments[f"{letter}_scale"] = scale
    return made


def _draft_masks(maker: Maker, arguments: dict[str, Any], rows: list[tuple]) -> list[Tensor | None]:
    """A row for each row of q; each sequence's rows have bits of their own density, and some rows none or all."""
    plan, words = maker.plan, maker.plan.draft_words
    if not words:
        return [None] * len(rows)
    lead = arguments["q"].shape[:-2]
    wide = torch.randint(-(2**31), 2**31, (*lead, words + (3 if plan.strides else 0)), generator=maker.random)
    bits = torch.rand(*lead, words, 32, generator=maker.random)
    density = torch.tensor([0.0, 0.05, 0.5, 0.5, 0.9, 1.0])
    kept = bits < density[torch.randint(len(density), lead, generator=maker.random)][..., None, None]
    numbers = (kept.long() << torch.arange(32)).sum(-1)
    first = 2 if plan.strides else 0
    wide[..., first : first + words] = numbers - (numbers >> 31 << 32)
    mask = wide.to(torch.int32).to(plan.device)[..., first : first + words]
    arguments["draft_mask"] = mask.flatten(0, -2)
    return [mask[row] for row in rows]


def _scalars(maker: Maker, arguments: dict[str, Any]) -> None:
    plan = maker.plan
    defaults = {"softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0, "attention_chunk": 0,
                "pack_gqa": None, "num_splits": None, "only_qv": False, "deterministic": False}  # fmt: skip
    for name, default in defaults.items():
        if getattr(plan, name) != default:
            arguments[name] = getattr(plan, name)
    arguments["return_softmax_lse"] = plan.return_lse
