"""The attention calls of serving engines, recorded in data/engine_calls.json, made into tensors and judged.

A record names a function of the engine's, every argument that the engine gives it, and where the call stands. A tensor
is {"tensor": its shape by names, "dtype": ..., "holds": what its numbers mean}; "slice_of" says that it is a view of
wider rows. {"is": ...} is a number of the call, anything else the value itself. "kind" says what the queries are:
"decode" (one a sequence), "extend" (some, over a cache), "prefill" (as many as keys), "context" (over other keys),
"dense".
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.reference import FP8, Problem, Sequence, check

RECORDS = json.loads((Path(__file__).parents[1] / "data" / "engine_calls.json").read_text())
SGLANG, VLLM = RECORDS
QUERIES = {"decode": (1, 1, 1), "extend": (3, 1, 5), "prefill": (7, 5, 12), "context": (3, 1, 5), "dense": (5, 5, 5)}
KEYS = {"decode": (5, 37, 18), "extend": (5, 37, 18), "prefill": (7, 5, 12), "context": (9, 30, 14), "dense": (9, 9, 9)}
OTHER_KEYS = (40, 5, 23)  # of a replay: lengths in the same memory
LONGEST = 40  # the bound of cached keys that the host knows
SCALE = 0.11
DESCALE = 0.625
NO_PAGE = 1 << 30
Arguments = dict[str, Any]


def signature(engine: str, function: str) -> list[tuple[str, str | None]]:
    """Names and defaults of an engine's function, in order."""
    return [(each["name"], each.get("default")) for each in RECORDS[engine]["signatures"][function]]


def calls(engine: str) -> list[Any]:
    return [record | {"engine": engine} for record in RECORDS[engine]["calls"]]


def asks_for_more(record: Any) -> bool:
    """Whether a call needs what no GPU implementation serves yet: qv without a cache, or e4m3."""
    named = record["arguments"]
    has_qv = named.get("qv") is not None or named.get("q_v") is not None
    has_cache = "v_cache" in named or named.get("page_table", named.get("block_table")) is not None
    return (has_qv and not has_cache) or named.get("v_cache", named.get("v"))["dtype"] == "float8_e4m3fn"


@dataclass
class Made:
    """One call: its arguments, those of its plan, and what it means."""

    arguments: Arguments
    problem: Problem
    plan: Arguments = field(default_factory=dict)


class Maker:
    """Tensors for one record. Rows of a cache that no sequence holds are NaN, entries without a page name none."""

    def __init__(self, record: Any, device: str, keys: tuple[int, ...] | None, seed: int) -> None:
        self.record, self.device = record, device
        self.random = torch.Generator().manual_seed(seed)
        kind, sizes = record["kind"], record["sizes"]
        self.q_lengths, self.k_lengths = QUERIES[kind], keys or KEYS[kind]
        b, page_size = len(self.q_lengths), sizes.get("page_size", 16)
        d = sizes.get("d", 64)
        self.max_pages = -(-LONGEST // page_size)
        self.sizes = {
            "b": b, "b+1": b + 1, "hq": sizes.get("hq", 4), "hk": sizes.get("hk", 2), "d": d, "dv": sizes.get("dv", d),
            "page_size": page_size, "max_pages": self.max_pages, "pages": b * self.max_pages + 3,
            "total_q": sum(self.q_lengths), "total_k": sum(self.k_lengths), "sq": self.q_lengths[0],
            "sk": self.k_lengths[0],
        }  # fmt: skip
        self.cached = kind in ("decode", "extend")
        self.table = torch.randperm(self.sizes["pages"], generator=self.random)[: b * self.max_pages].view(b, -1)
        given = record["arguments"]
        keys_of = given.get("k_cache", given.get("k"))
        values_of = given.get("v_cache", given.get("v"))
        self.dtype = FP8 if values_of["dtype"] == "float8_e4m3fn" else torch.bfloat16
        hk, dv = self.sizes["hk"], self.sizes["dv"]
        self.keys = [self.normal(n, hk, d) for n in self.k_lengths]
        self.values = [self.normal(n, hk, dv) for n in self.k_lengths]
        self.places = {id(keys_of): self.keys, id(values_of): self.values}
        self.q = self.normal(self.sizes["total_q"], self.sizes["hq"], d)
        self.qv = self.normal(self.sizes["total_q"], self.sizes["hq"], dv)
        self.rows: dict[str, Tensor] = {}  # the wider rows that several tensors are slices of

    def normal(self, *shape: int) -> Tensor:
        """Numbers on the CPU, rounded to the inputs' dtype."""
        return torch.randn(shape, generator=self.random).to(self.dtype)

    def value(self, name: str, given: Any) -> Any:
        """An argument of the call, by the record."""
        if isinstance(given, list):
            return tuple(given) if self.record["engine"] == SGLANG else list(given)
        if not isinstance(given, dict):
            return given
        return self.number(given["is"]) if "is" in given else self.tensor(name, given)

    def number(self, what: str) -> Any:
        longest_k = LONGEST if self.cached else max(self.k_lengths)
        numbers = {"longest q": max(self.q_lengths), "longest k": longest_k, "softmax scale": SCALE}
        numbers |= {"dtype of the cache": self.dtype}
        return numbers[what] if what in numbers else self.sizes[what]

    def tensor(self, name: str, given: Any) -> Tensor:
        shape = tuple(self.sizes[each] for each in given["tensor"])
        holds = given["holds"]
        if holds == "numbers":
            return self.numbers(name, given, shape)
        if holds == "memory":
            return torch.full(shape, torch.nan, dtype=torch.bfloat16, device=self.device)
        if holds == "logits":
            return torch.randn(shape, generator=self.random).bfloat16().to(self.device)
        if holds == "one scale, expanded":
            return torch.tensor(DESCALE, device=self.device).expand(shape)
        if holds != "pages":
            return self.lengths(holds).int().to(self.device)
        room = 5 if "slice_of" in given else 0
        wide = torch.full((shape[0], shape[1] + room), NO_PAGE, dtype=torch.int32, device=self.device)
        wide[:, : shape[1]] = self.pages().to(self.device)
        return wide[:, : shape[1]]

    def lengths(self, holds: str) -> Tensor:
        counts = self.q_lengths if holds == "offsets of q" else self.k_lengths
        numbers = torch.tensor(counts)
        return numbers if holds == "cached keys" else torch.cat([torch.zeros(1, dtype=torch.int64), numbers.cumsum(0)])

    def pages(self) -> Tensor:
        table = self.table.clone()
        used = torch.tensor([-(-n // self.sizes["page_size"]) for n in self.k_lengths])
        table[torch.arange(self.max_pages)[None] >= used[:, None]] = NO_PAGE
        return table

    def numbers(self, name: str, given: Any, shape: tuple[int, ...]) -> Tensor:
        rows = self.places.get(id(given))
        if rows is None:
            flat = self.qv if name in ("qv", "q_v") else self.q
            return self.sliced(given, shape, lambda view: view.copy_(flat.view(shape)))
        if not self.cached:
            return torch.cat(rows).view(shape).to(self.device)

        def fill(view: Tensor) -> None:
            size = self.sizes["page_size"]
            for pages, numbers in zip(self.table, rows, strict=True):
                at = torch.arange(numbers.shape[0])
                view[pages[at // size].to(view.device), (at % size).to(view.device)] = numbers.to(view.device)

        return self.sliced(given, shape, fill)

    def sliced(self, given: Any, shape: tuple[int, ...], fill: Callable[[Tensor], Any]) -> Tensor:
        """A tensor of its own, or the part of shared wider rows that the record says, filled."""
        of, d, dv = given.get("slice_of"), self.sizes["d"], self.sizes["dv"]
        lead = shape[:-1]
        if of == "keys beside values":
            lead = (lead[0], lead[2], lead[1])  # heads before rows of a page
        if of is not None and of not in self.rows:
            self.rows[of] = torch.full((*lead, d + dv), torch.nan).to(self.dtype).to(self.device)
        if of is None:
            view = torch.full(shape, torch.nan).to(self.dtype).to(self.device)
        elif of == "keys beside values":
            parts = self.rows[of].transpose(1, 2).split([d, dv], dim=-1)
            view = parts[0] if given["tensor"][-1] == "d" else parts[1]
        else:  # values, or their part of the queries, first
            view = self.rows[of][..., dv:] if given["tensor"][-1] == "d" else self.rows[of][..., :dv]
        fill(view)
        return view

    def problem(self, arguments: Arguments) -> Problem:
        """What the call means, in plain numbers."""
        has_qv = arguments.get("qv", arguments.get("q_v")) is not None
        descale = None
        if self.dtype == FP8:
            descale = torch.full((self.sizes["hk"],), DESCALE, device=self.device)
        queries = zip(self.q.split(self.q_lengths), self.qv.split(self.q_lengths), self.keys, self.values, strict=True)
        q_descale = descale if arguments.get("q_descale") is not None else None
        sequences = [
            Sequence(q.to(self.device), k.to(self.device), v.to(self.device), qv.to(self.device) if has_qv else None,
                     q_descale, descale, descale)
            for q, qv, k, v in queries
        ]  # fmt: skip
        return Problem(
            sequences,
            softmax_scale=arguments.get("softmax_scale"),
            causal=arguments.get("causal", False),
            window_size=tuple(arguments.get("window_size") or (-1, -1)),
            softcap=arguments.get("softcap", 0.0),
            sinks=arguments.get("sinks", arguments.get("s_aux")),
            only_qv=arguments.get("only_qv", False),
        )


def made(
    record: Any,
    planner: Callable[..., Tensor] | None = None,
    device: str = "cpu",
    keys: tuple[int, ...] | None = None,
    seed: int = 0,
) -> Made:
    """A record's call. planner: the engine's get_scheduler_metadata, for calls that a plan was made for."""
    maker = Maker(record, device, keys, seed)
    named = {name: value for name, value in record["arguments"].items() if value != {"is": "plan"}}
    arguments = {name: maker.value(name, value) for name, value in named.items()}
    found = Made(arguments, maker.problem(arguments))
    if "plan" in record and planner is not None:
        found.plan = {name: maker.value(name, value) for name, value in record["plan"].items()}
        arguments["scheduler_metadata"] = in_a_buffer(planner(**found.plan), maker.sizes["b"])
    return found


def in_a_buffer(plan: Tensor, batch: int) -> Tensor:
    """The plan as engines keep it: at the front of memory for the largest batch, of FlashAttention-3's length."""
    assert plan.shape[0] <= 1 + -(-batch // 4) * 4 * 4
    buffer = torch.zeros(1 + 64 * 4, dtype=torch.int32, device=plan.device)
    buffer[: plan.shape[0]] = plan
    return buffer[: plan.shape[0]]


def judged(result: Any, call: Made) -> float:
    """The worst share of the limits of the numeric rule; lse is judged where it was returned."""
    out, *rest = result if isinstance(result, tuple) else (result,)
    counts = [s.q.shape[0] for s in call.problem.sequences]
    lses = None
    if out.dim() == 4:
        outs = list(out)
        lses = list(rest[0]) if rest else None
    else:
        outs = list(out.split(counts))
        lses = list(rest[0].split(counts, dim=1)) if rest else None
    return check(outs, lses, call.problem).worst
