"""What the arguments of an attention call mean: `attention(function, arguments)` gives plain sequences.

It is written from the public contract alone and looks at the arguments only, so that a call which was changed in any
way can be judged. Arguments that mean nothing raise `MeaninglessError`: a call with them must not be answered.
"""

from __future__ import annotations

import inspect
import itertools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from jit_kernel import flash_attention_v3
from tests.support import reference
from tests.support.case_tensors import raw
from tests.support.cases import DENSE, FP8, KVCACHE

INT32_MAX = 2**31 - 1
INTEGERS = (torch.int32, torch.int64)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MOST_WORK = 3e7  # products of one score matrix; beyond it the reference takes too long


class MeaninglessError(Exception):
    """The arguments have no meaning by the contract."""


class UnjudgedError(Exception):
    """The arguments have a meaning that is too large to compute, or that the contract leaves open."""


@dataclass
class Meaning:
    """What a call must give: sequences, where their rows lie in out and lse, and what is appended."""

    problem: reference.Problem
    q_shape: tuple[int, ...]
    dv: int
    dtype: torch.dtype
    out_rows: list[tuple]
    lse_rows: list[tuple]
    with_lse: bool
    appended: list[tuple[str, tuple, Tensor, bool]] = field(default_factory=list)
    tainted: list[Tensor] = field(default_factory=list)  # (hq, sq), rows that see a number that is not finite


def need(holds: bool, what: str) -> None:
    if not holds:
        raise MeaninglessError(what)


def whole(name: str, value: Any, low: int, high: int = INT32_MAX) -> int:
    """An int, or what stands for one."""
    try:
        number = operator.index(value)
    except TypeError:
        raise MeaninglessError(f"{name} is {value!r}") from None
    need(low <= number <= high, f"{name} is {number}, not between {low} and {high}")
    return number


def flag(name: str, value: Any) -> bool:
    text = isinstance(value, (str, bytes, list, tuple, dict)) or value is None
    need(not text, f"{name} is {value!r}")
    return bool(value)


def real(name: str, value: Any) -> float:
    text = isinstance(value, (str, bytes, complex)) or value is None
    need(not text, f"{name} is {value!r}")
    try:
        number = float(value)
    except (TypeError, OverflowError, RuntimeError, ValueError):
        raise MeaninglessError(f"{name} is {value!r}") from None
    need(math.isfinite(number), f"{name} is {number}")
    return number


def window(value: Any) -> tuple[int, int]:
    if value is None:
        return -1, -1
    need(not isinstance(value, (str, bytes)), "window_size is text")
    try:
        pair = list(value)
    except TypeError:
        raise MeaninglessError(f"window_size is {value!r}") from None
    need(len(pair) == 2, f"window_size has {len(pair)} numbers")
    left, right = (-1 if bound is None else whole("window_size", bound, -1) for bound in pair)
    return left, right


def dense(name: str, value: Any, dims: int | None = None, dtypes: tuple[torch.dtype, ...] = ()) -> Tensor:
    need(isinstance(value, Tensor), f"{name} is a {type(value).__name__}")
    need(dims is None or value.dim() == dims, f"{name} has {value.dim()} dimensions")
    need(not dtypes or value.dtype in dtypes, f"{name} has dtype {value.dtype}")
    need(all(size <= INT32_MAX for size in value.shape), f"{name} has shape {tuple(value.shape)}")
    return value


def numbers(name: str, value: Any, count: int | None) -> list[int]:
    tensor = dense(name, value, 1, INTEGERS)
    need(count is None or tensor.shape[0] == count, f"{name} has {tensor.shape[0]} numbers, not {count}")
    found: list[int] = tensor.tolist()
    return found


def offsets(name: str, value: Any, batch: int | None, rows: int) -> list[int]:
    found = numbers(name, value, None if batch is None else batch + 1)
    need(len(found) >= 1 and found[0] == 0, f"{name} does not start at 0")
    need(all(a <= b for a, b in itertools.pairwise(found)), f"{name} decreases")
    need(found[-1] <= rows, f"{name} ends at {found[-1]} of {rows}")
    return found


def limited(name: str, value: Any, lengths: list[int]) -> list[int]:
    if value is None:
        return lengths
    found = numbers(name, value, len(lengths))
    need(all(0 <= n <= most for n, most in zip(found, lengths, strict=True)), f"{name} is {found} of {lengths}")
    return found


def addresses(x: Tensor) -> Tensor:
    """Where every element lies, in bytes."""
    at = torch.tensor(x.storage_offset(), device="cpu")
    for size, stride in zip(x.shape, x.stride(), strict=True):
        at = at[..., None] + torch.arange(size, device="cpu") * stride
    return x.untyped_storage().data_ptr() + at.flatten() * x.element_size()


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have an element's first byte in common."""
    if 0 in (a.numel(), b.numel()) or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    if max(a.numel(), b.numel()) > 2**22:
        raise UnjudgedError("too large to look for an overlap")
    return bool(torch.isin(addresses(a), addresses(b)).any())


def overlaps_itself(x: Tensor) -> bool:
    if x.numel() > 2**22:
        return any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True))
    return bool(addresses(x).unique().numel() != x.numel())


def defaults_of(function: str) -> dict[str, Any]:
    parameters = inspect.signature(getattr(flash_attention_v3, function)).parameters.values()
    return {p.name: None if p.default is p.empty else p.default for p in parameters}


def attention(function: str, given: dict[str, Any]) -> Meaning:
    """The meaning of one call of an attention function."""
    return _Reader(function, {**defaults_of(function), **given}).read()


class _Reader:
    def __init__(self, function: str, arguments: dict[str, Any]) -> None:
        self.function, self.a = function, arguments
        of_cache = function == KVCACHE
        self.k_name, self.v_name = ("k_cache", "v_cache") if of_cache else ("k", "v")
        self.used_name = "cache_seqlens" if of_cache else "seqused_k"

    def get(self, name: str) -> Any:
        return self.a.get(name)

    def read(self) -> Meaning:
        v, new = self.get(self.v_name), self.get("k") if self.function == KVCACHE else None
        if self.get("only_qv") is True and self.get(self.k_name) is None and new is None and isinstance(v, Tensor):
            self.a[self.k_name] = v[..., : self.a["q"].shape[-1]]  # no key is read: any stand for them
        self._tensors()
        settings = self._settings()
        out_rows, lse_rows, queries = self._queries()
        self._place_keys()
        appended, rotated = self._append(queries)
        problem = reference.Problem([], **settings)
        self._maximum("max_seqlen_q", self.q_lengths)
        self._maximum("max_seqlen_k", self.k_lengths)
        sequences, tainted, masks = [], [], self._draft_masks(out_rows)
        for i, (q, qv) in enumerate(rotated):
            work = q.shape[0] * q.shape[1] * (self.k_lengths[i] + len(q)) * (self.d + self.dv)
            if work > MOST_WORK:
                raise UnjudgedError("too large")
            k, v, bad = self._keys(i, appended)
            s = reference.Sequence(q, k, v, qv, draft_mask=masks[i], **self._descales(i), **self._token_scales(i))
            clean, taint = _cleaned(s, problem, bad)
            sequences.append(clean)
            tainted.append(taint)
        problem = reference.Problem(sequences, **settings)
        self._shared_memory()
        dtype = torch.bfloat16 if self.q.dtype == FP8 else self.q.dtype
        lse = flag("return_softmax_lse", self.get("return_softmax_lse"))
        return Meaning(problem, tuple(self.q.shape), self.dv, dtype, out_rows, lse_rows, lse, appended, tainted)

    def _tensors(self) -> None:
        ragged = self.get("cu_seqlens_q") is not None
        q = self.q = dense("q", self.get("q"), 3 if ragged else 4, (*FLOATS, FP8))
        paged = self.get("page_table") is not None
        self.ragged_k = self.get("cu_seqlens_k") is not None
        need(not (paged and self.ragged_k), "pages and cu_seqlens_k")
        dims = 3 if self.ragged_k else 4
        dtypes = (q.dtype,) if q.dtype in (FP8, torch.float32) else (q.dtype, FP8)
        k = self.k = dense(self.k_name, self.get(self.k_name), dims, dtypes)
        v = self.v = dense(self.v_name, self.get(self.v_name), dims, (k.dtype,))
        need(k.shape[:-1] == v.shape[:-1], "k and v differ")
        self.hq, self.d, self.hk, self.dv = q.shape[-2], q.shape[-1], k.shape[-2], v.shape[-1]
        need(min(self.hq, self.d, self.hk, self.dv) > 0, "no heads or no head size")
        need(self.hq % self.hk == 0 and k.shape[-1] == self.d, "heads do not fit")
        out = self.get("out")
        if out is not None:
            dense("out", out)
            need(tuple(out.shape) == (*q.shape[:-1], self.dv), f"out has shape {tuple(out.shape)}")
            need(out.dtype == (torch.bfloat16 if q.dtype == FP8 else q.dtype), f"out has dtype {out.dtype}")

    def _settings(self) -> dict[str, Any]:
        scale, cap = self.get("softmax_scale"), real("softcap", self.get("softcap"))
        scale = None if scale is None else real("softmax_scale", scale)
        need(scale is None or scale > 0, f"softmax_scale is {scale}")
        need(cap >= 0, f"softcap is {cap}")
        chunk = self.get("attention_chunk")
        whole("num_splits", self.get("num_splits"), 0, 256)
        whole("sm_margin", self.get("sm_margin"), 0)
        for name in ("pack_gqa", "deterministic", "rotary_interleaved"):
            if self.get(name) is not None:
                flag(name, self.get(name))
        sinks = self.get("sinks")
        if sinks is not None:
            sinks = dense("sinks", sinks, 1, (torch.float32, self.q.dtype))
            need(sinks.shape[0] == self.hq, "sinks has another length")
        only_qv = flag("only_qv", self.get("only_qv") or False)
        need(not only_qv or self.get("qv") is not None, "only_qv without qv")
        return {
            "softmax_scale": scale,
            "causal": flag("causal", self.get("causal")),
            "window_size": window(self.get("window_size")),
            "attention_chunk": 0 if chunk is None else whole("attention_chunk", chunk, 0),
            "softcap": cap,
            "sinks": sinks,
            "only_qv": only_qv,
        }

    def _queries(self) -> tuple[list[tuple], list[tuple], list[tuple[Tensor, Tensor | None]]]:
        q, qv = self.q, self.get("qv")
        if qv is not None:
            qv = dense("qv", qv, q.dim(), (q.dtype,))
            need(tuple(qv.shape) == (*q.shape[:-1], self.dv), "qv has another shape")
            need(self.d == 64 and self.dv in (256, 512), "qv with these head sizes")
        if self.get("cu_seqlens_q") is not None:
            starts = offsets("cu_seqlens_q", self.get("cu_seqlens_q"), None, q.shape[0])
            lengths = [b - a for a, b in itertools.pairwise(starts)]
            self.q_lengths = limited("seqused_q", self.get("seqused_q"), lengths)
            rows: list[tuple] = [(slice(a, a + n),) for a, n in zip(starts, self.q_lengths, strict=False)]
            lse_rows: list[tuple] = [(slice(None), *row) for row in rows]
        else:
            if q.shape[0] > 4096:
                raise UnjudgedError("too many sequences")
            self.q_lengths = limited("seqused_q", self.get("seqused_q"), [q.shape[1]] * q.shape[0])
            rows = [(i, slice(0, n)) for i, n in enumerate(self.q_lengths)]
            lse_rows = [(i, slice(None), slice(0, n)) for i, n in enumerate(self.q_lengths)]
        self.batch = len(self.q_lengths)
        return rows, lse_rows, [(q[row], None if qv is None else qv[row]) for row in rows]

    def _place_keys(self) -> None:
        """The length of each sequence before the call, left padding included, and where its tokens lie."""
        k, used = self.k, self.get(self.used_name)
        table, picked = self.get("page_table"), list(range(self.batch))
        self.slots: Callable[[int, Tensor], tuple[Tensor, ...]]
        if self.ragged_k:
            starts = offsets("cu_seqlens_k", self.get("cu_seqlens_k"), self.batch, k.shape[0])
            self.rooms = [b - a for a, b in itertools.pairwise(starts)]
            self.slots = lambda i, at: (at + starts[i],)
        else:
            rows = k.shape[0]
            if table is not None:
                table = dense("page_table", table, 2, INTEGERS).long()
                need(used is not None and k.shape[1] > 0, "pages without lengths or without tokens")
                rows, size = table.shape[0], k.shape[1]
                self.slots = lambda i, at: (table[picked[i], at // size], at % size)
            else:
                self.slots = lambda i, at: (torch.full_like(at, picked[i]), at)
            if self.get("cache_batch_idx") is not None:
                picked = numbers("cache_batch_idx", self.get("cache_batch_idx"), self.batch)
                need(all(0 <= row < rows for row in picked), f"cache_batch_idx is {picked} of {rows}")
                need(self.get("k") is None or self.function != KVCACHE or len(set(picked)) == len(picked),
                     "two sequences append to one row")  # fmt: skip
            else:
                need(rows == self.batch, f"{rows} rows for {self.batch} sequences")
            self.rooms = [k.shape[1] * (1 if table is None else table.shape[1])] * self.batch
        if used is not None and not isinstance(used, Tensor):
            used = torch.tensor([whole(self.used_name, used, 0)] * self.batch, dtype=torch.int64)
        elif isinstance(used, Tensor) and used.dim() == 0 and self.function == KVCACHE:
            used = used.expand(self.batch)
        self.old = limited(self.used_name, used, self.rooms)
        pads = self.get("cache_leftpad")
        self.pads = [0] * self.batch if pads is None else limited("cache_leftpad", pads, self.old)
        self.k_lengths = list(self.old)

    def _append(self, queries: list) -> tuple[list[tuple[str, tuple, Tensor, bool]], list]:
        new_k, new_v = (self.get("k"), self.get("v")) if self.function == KVCACHE else (None, None)
        if new_k is None:
            need(new_v is None or self.function != KVCACHE, "v without k")
            need(self.get("rotary_cos") is None, "rotary without new keys")
            return [], queries
        need(new_v is not None and self.get(self.used_name) is not None, "k without v or without cache_seqlens")
        ragged = self.get("cu_seqlens_k_new") is not None
        mixed, turns = self.k.dtype != self.q.dtype, self.get("rotary_cos") is not None
        dense("k", new_k, None, (self.q.dtype,) if turns else (self.k.dtype, self.q.dtype))
        for name, new, size in (("k", new_k, self.d), ("v", new_v, self.dv)):
            dense(name, new, 3 if ragged else 4, (new_k.dtype,))
            need(new.shape[-2:] == (self.hk, size) and (ragged or new.shape[0] == self.batch), f"{name}'s shape")
        need(new_k.shape[:-1] == new_v.shape[:-1], "new k and v differ")
        if ragged:
            starts = offsets("cu_seqlens_k_new", self.get("cu_seqlens_k_new"), self.batch, new_k.shape[0])
            rows: list[Any] = [slice(a, b) for a, b in itertools.pairwise(starts)]
        else:
            rows = list(range(self.batch))
        turn = self._rotation()
        appended, rotated, written = [], list(queries), []
        for i, row in enumerate(rows):
            keys, worth = new_k[row], new_v[row]
            n = len(keys)
            need(self.old[i] + n <= self.rooms[i], f"no room for {n} keys")
            self.k_lengths[i] += n
            if turn is not None:
                keys = turn(keys, i, n, True)
                rotated[i] = turn(queries[i][0], i, len(queries[i][0]), False), queries[i][1]
            at = torch.arange(self.old[i], self.old[i] + n)
            slots = self.slots(i, at)
            need(all(bool(((at >= 0) & (at < size)).all()) for at, size in zip(slots, self.k.shape, strict=False)),
                 "new keys go to a page that is none")  # fmt: skip
            if mixed and new_k.dtype != FP8:
                keys, worth = (
                    reference.quantised(x, self._factors(letter, i, at))
                    for letter, x in zip("kv", (keys, worth), strict=True)
                )
            written += list(zip(*(at.tolist() for at in slots), strict=True))
            # A quotient that is no number has any sign, and one next to a tie may round the other way.
            near = mixed and new_k.dtype != FP8
            appended += [("k_cache", slots, keys, near or turn is not None), ("v_cache", slots, worth, near)]
        if len(set(written)) != len(written):
            raise UnjudgedError("two sequences append to one place")
        self.written = set(written)
        return appended, rotated

    def _rotation(self) -> Callable[[Tensor, int, int, bool], Tensor] | None:
        cos, sin = self.get("rotary_cos"), self.get("rotary_sin")
        if cos is None:
            need(sin is None, "rotary_sin without rotary_cos")
            return None
        cos, sin = dense("rotary_cos", cos, 2, (self.q.dtype,)), dense("rotary_sin", sin, 2, (self.q.dtype,))
        need(cos.shape == sin.shape and cos.shape[1] > 0 and 2 * cos.shape[1] <= self.d, "rotary tables' shape")
        need(cos.shape[1] % 8 == 0, "rotary_dim is no multiple of 16")
        starts = self.old
        if self.get("rotary_seqlens") is not None:
            starts = numbers("rotary_seqlens", self.get("rotary_seqlens"), self.batch)
        masked = (flag("causal", self.get("causal")) or max(window(self.get("window_size"))) >= 0
                  or bool(self.get("attention_chunk")))  # fmt: skip
        interleaved = flag("rotary_interleaved", self.get("rotary_interleaved"))

        def turn(x: Tensor, i: int, n: int, is_key: bool) -> Tensor:
            steps = torch.arange(n) if is_key or masked else torch.zeros(n, dtype=torch.int64)
            last = starts[i] + (int(steps[-1]) if n else 0)
            need(starts[i] >= 0 and (n == 0 or last < cos.shape[0]), f"position {last} of {cos.shape[0]}")
            rotate = reference.turned if is_key and self.k.dtype != self.q.dtype else reference.rotate
            return rotate(x, cos, sin, steps + starts[i], interleaved=interleaved)

        return turn

    def _keys(self, i: int, appended: list) -> tuple[Tensor, Tensor, Tensor]:
        """The keys and values of a sequence, and which of them lie in a page that is none."""
        at = torch.arange(self.pads[i], self.old[i])
        places = self.slots(i, at)
        lead = self.k.shape[:-2]
        bad = torch.zeros(len(at), dtype=torch.bool)
        for place, size in zip(places, lead, strict=True):
            bad |= (place < 0) | (place >= size)
        places = tuple(place.masked_fill(bad, 0) for place in places)
        if appended and self.written.intersection(zip(*(place.tolist() for place in places), strict=True)):
            raise UnjudgedError("a sequence reads what another appends")
        k, v = (raw(x)[places].view(x.dtype) if at.numel() else x.new_zeros((0, *x.shape[-2:]))
                for x in (self.k, self.v))  # fmt: skip
        if appended:
            new_k, new_v = appended[2 * i][2], appended[2 * i + 1][2]
            k, v = (torch.cat([raw(old), raw(new)]).view(old.dtype) for old, new in ((k, new_k), (v, new_v)))
            bad = torch.cat([bad, torch.zeros(len(new_k), dtype=torch.bool)])
        return k, v, bad

    def _descales(self, i: int) -> dict[str, Tensor]:
        found = {}
        for name in ("q_descale", "k_descale", "v_descale"):
            value = self.get(name)
            if value is not None:
                if (self.q if name == "q_descale" else self.k).dtype != FP8:
                    continue  # not read
                tensor = dense(name, value, 2, (torch.float32,))
                need(tuple(tensor.shape) == (self.batch, self.hk), f"{name} has shape {tuple(tensor.shape)}")
                found[name] = tensor[i]
        return found

    def _token_scale(self, letter: str) -> Tensor | None:
        value = None if self.function == DENSE else self.get(f"{letter}_scale")
        if value is None:
            return None
        need(self.k.dtype == FP8, f"{letter}_scale beside {self.k.dtype}")
        scale = dense(f"{letter}_scale", value, self.k.dim() - 1, (torch.float32,))
        need(scale.shape == self.k.shape[:-1], f"{letter}_scale has shape {tuple(scale.shape)}")
        return scale

    def _factors(self, letter: str, i: int, at: Tensor) -> Tensor:
        """What new keys or values are divided by, (n, hk)."""
        factor, scale = torch.ones(len(at), self.hk), self._token_scale(letter)
        descale = self._descales(i).get(f"{letter}_descale")
        factor = factor if descale is None else factor * descale
        return factor if scale is None else factor * scale[self.slots(i, at)]

    def _token_scales(self, i: int) -> dict[str, Tensor]:
        """Of every key of a sequence; 1 where it lies in a page that is none."""
        found = {}
        for letter in "kv":
            scale = self._token_scale(letter)
            if scale is not None:
                at = torch.arange(self.pads[i], self.k_lengths[i])
                places, bad = self.slots(i, at), torch.zeros(len(at), dtype=torch.bool)
                for place, size in zip(places, scale.shape, strict=False):
                    bad |= (place < 0) | (place >= size)
                picked = scale[tuple(place.masked_fill(bad, 0) for place in places)] if scale.numel() else None
                found[f"{letter}_scale"] = (
                    torch.ones(len(at), self.hk) if picked is None else picked.masked_fill(bad[:, None], 1.0)
                )
        return found

    def _draft_masks(self, rows: list[tuple]) -> list[Tensor | None]:
        """A sequence's rows of the draft mask, which has one for each row of q."""
        mask, lead = self.get("draft_mask"), self.q.shape[:-2]
        if mask is None or self.function == DENSE:
            return [None] * self.batch
        mask = dense("draft_mask", mask, 2, (torch.int32,))
        need(mask.shape[0] == math.prod(lead) and mask.shape[1] > 0, f"draft_mask has shape {tuple(mask.shape)}")
        if mask.shape[1] > 2**20:
            raise UnjudgedError("too many words")
        return [mask.unflatten(0, lead)[row] for row in rows]

    def _maximum(self, name: str, lengths: list[int]) -> None:
        if self.function != DENSE and self.get(name) is not None:
            whole(name, self.get(name), max(lengths, default=0))

    def _shared_memory(self) -> None:
        """What is written must be memory of its own."""
        out, appends = self.get("out"), self.function == KVCACHE and self.get("k") is not None
        inputs = ["q", "qv", "draft_mask", "k_scale", "v_scale", self.k_name, self.v_name]
        inputs += ["k", "v"] if appends else []
        pairs = [("out", name) for name in inputs] if out is not None else []
        if appends:
            pairs += [
                ("k_cache", "v_cache"),
                *itertools.product(("k_cache", "v_cache"), ("k", "v", "q", "qv", "k_scale", "v_scale")),
            ]
        for written in {name for name, _ in pairs}:
            need(not overlaps_itself(self.get(written)), f"{written} overlaps itself")
        for written, other in pairs:
            if self.get(other) is not None:
                need(not overlap(self.get(written), self.get(other)), f"{written} overlaps {other}")


def _cleaned(s: reference.Sequence, problem: reference.Problem, bad: Tensor) -> tuple[reference.Sequence, Tensor]:
    """The sequence with zeros in place of numbers that are not finite, and (hq, sq): the rows that see one."""
    hq, hk = s.q.shape[1], s.k.shape[1]

    if not all(d is None or bool(d.isfinite().all()) for d in (s.q_descale, s.k_descale, s.v_descale)):
        raise UnjudgedError("a descale is not finite")

    def finite(x: Tensor) -> Tensor:
        return x.float().isfinite().all(-1)

    keys = ~(finite(s.k) & finite(s.v)).T  # (hk, sk)
    for scale in (s.k_scale, s.v_scale):
        if scale is not None:
            keys = keys | ~scale.isfinite().T
    _need_room(s)
    rows = ~finite(s.q).T  # (hq, sq)
    if s.qv is not None:
        rows = rows | ~finite(s.qv).T
    if not bool(keys.any()) and not bool(rows.any()) and not bool(bad.any()):
        sink = None if problem.sinks is None else ~problem.sinks.float().isfinite()
        taint = rows if sink is None else rows | sink[:, None]
        return s, taint
    seen = reference.seen_by(s, problem)
    need(not bool((seen & bad[None]).any()), "a query sees a key in a page that is none")
    tainted = (seen.float() @ keys.float().T).T.bool()  # (hk, sq)
    taint = rows | tainted.repeat_interleave(hq // hk, dim=0)
    if problem.sinks is not None:
        taint = taint | ~problem.sinks.float().isfinite()[:, None]

    def clean(x: Tensor) -> Tensor:
        return x.float().nan_to_num(0.0, 0.0, 0.0).to(x.dtype)

    scales = {name: value.nan_to_num(1.0, 1.0, 1.0) for name in ("k_scale", "v_scale")
              if (value := getattr(s, name)) is not None}  # fmt: skip
    return replace(
        s, **scales, q=clean(s.q), k=clean(s.k), v=clean(s.v), qv=None if s.qv is None else clean(s.qv)
    ), taint


def _need_room(s: reference.Sequence) -> None:
    """Keys and values that q's dtype has no room for, once they are dequantised, are as unlike them as it likes."""
    if s.k.dtype == FP8 and s.q.dtype != FP8:
        both = [x.float().nan_to_num(0.0, 0.0, 0.0) for x in (s.k, s.v)]
        clean = replace(s, k=both[0].to(FP8), v=both[1].to(FP8))
        cached = reference.as_cached(clean)
        largest = torch.finfo(s.q.dtype).max
        for x, scale in ((cached.k, s.k_scale), (cached.v, s.v_scale)):
            kept = x if scale is None else x[scale.isfinite()]
            if not bool((kept.float().abs() <= largest).all()):
                raise UnjudgedError("a dequantised number overflows")
