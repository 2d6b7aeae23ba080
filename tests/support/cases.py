"""Seeded random calls over the whole argument space: `draw(seed, space)` gives a Plan of plain values.

A Plan says everything about a call but the numbers in its tensors, which `case_tensors.build` makes from its seed. Its
repr is Python, so that a failing case can be pasted and run again. A Space says what an implementation claims, so that
one generator serves every implementation and every device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

import torch

FP8 = torch.float8_e4m3fn
VARLEN, KVCACHE, DENSE = "flash_attn_varlen_func", "flash_attn_with_kvcache", "flash_attn_func"
FEATURES = frozenset(
    {"ragged", "paged", "append", "new_ragged", "rotary", "batch_idx", "leftpad", "qv", "only_qv", "causal", "window"}
    | {"chunk", "softcap", "sinks", "scale", "splits", "seqused_q", "seqused_k", "out", "strides", "groups", "empty"}
    | {"hot", "lse", "descale_expanded", "odd_head_size", "large", "tail", "draft_mask", "deterministic"}
)
# FP8 caches beside a q of 16 bits, scales of tokens, and new keys in the dtype of the cache: of the spaces that say
# so.
FP8_CACHES = frozenset({"mixed", "token_scales", "stored"})


@dataclass(frozen=True)
class Space:
    """What cases may ask for. `head_dims` are (d, dv) pairs drawn often; `any_head_dim` bounds those drawn freely."""

    name: str
    device: str = "cpu"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, FP8)
    head_dims: tuple[tuple[int, int], ...] = ((64, 64), (128, 128), (96, 96), (192, 128), (256, 256))
    any_head_dim: int = 512
    head_dim_step: int = 1
    qv_head_dims: tuple[tuple[int, int], ...] = ((64, 256), (64, 512))
    functions: tuple[str, ...] = (VARLEN, KVCACHE, DENSE)
    features: frozenset[str] = FEATURES
    page_sizes: tuple[int, ...] = (1, 2, 3, 8, 16, 19, 64, 100)
    lengths: tuple[int, int, int] = (24, 130, 700)  # longest of a usual, a larger and a rare large case
    max_heads: int = 8
    max_batch: int = 5
    stride_step: int = 1  # strides and starts of strided tensors are multiples of this many elements


@dataclass(frozen=True)
class Plan:
    """One call. lengths_k counts what the cache holds before the call, left padding included."""

    seed: int
    function: str
    dtype: torch.dtype
    d: int
    dv: int
    hq: int
    hk: int
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    lengths_new: tuple[int, ...] | None = None
    leftpad: tuple[int, ...] | None = None
    q_layout: str = "dense"  # ragged | dense
    k_layout: str = "dense"  # ragged | dense | paged
    new_layout: str = "dense"  # ragged | dense
    page_size: int = 0
    seqused_q: bool = False
    used_k: str = ""  # how seqused_k or cache_seqlens is given: "" | tensor | int
    tail: int = 0  # rows behind the last sequence of ragged tensors
    cache_rows: int = 0  # rows of the cache when cache_batch_idx picks from them
    max_seqlen: str = "exact"  # exact | loose | none
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    attention_chunk: int | None = 0
    softcap: float = 0.0
    softmax_scale: float | None = None
    sinks: str = ""  # "" | float32 | inputs: the dtype they come in
    qv: bool = False
    only_qv: bool = False
    rotary_dim: int = 0
    rotary_interleaved: bool = True
    rotary_seqlens: bool = False
    descales: str = ""  # which of q, k, v
    descale_expanded: bool = False
    draft_words: int = 0  # of each row of a draft mask; 0: there is none
    num_splits: int | None = None
    pack_gqa: bool | None = None
    return_lse: bool = True
    out: str = ""  # "" | contiguous | strided
    strides: bool = False
    magnitude: float = 1.0
    device: str = "cpu"
    stride_step: int = 1
    deterministic: bool = False
    kv_dtype: torch.dtype | None = None  # of k and v where it is not dtype
    token_scales: str = ""  # which of k, v
    stored: bool = False  # new keys and values come in kv_dtype

    @property
    def key_dtype(self) -> torch.dtype:
        """The dtype of the keys and values that are there before the call."""
        return self.kv_dtype or self.dtype

    @property
    def features(self) -> frozenset[str]:
        """The names of FEATURES that this call uses."""
        kept = [n - p for n, p in zip(self.lengths_k, self.leftpad or [0] * len(self.lengths_k), strict=True)]
        used = {
            "ragged": self.q_layout == "ragged",
            "paged": self.k_layout == "paged",
            "append": self.lengths_new is not None,
            "new_ragged": self.lengths_new is not None and self.new_layout == "ragged",
            "rotary": self.rotary_dim > 0,
            "batch_idx": self.cache_rows > 0,
            "leftpad": self.leftpad is not None,
            "qv": self.qv and not self.only_qv,
            "only_qv": self.only_qv,
            "causal": self.causal,
            "window": max(self.window_size) >= 0,
            "chunk": bool(self.attention_chunk),
            "softcap": self.softcap > 0,
            "sinks": bool(self.sinks),
            "scale": self.softmax_scale is not None,
            "splits": self.num_splits not in (None, 1),
            "seqused_q": self.seqused_q,
            "tail": self.tail > 0,
            "seqused_k": bool(self.used_k),
            "out": bool(self.out),
            "strides": self.strides or self.out == "strided",
            "groups": self.hq != self.hk,
            "empty": 0 in self.lengths_q or 0 in kept,
            "hot": self.magnitude != 1.0,
            "lse": self.return_lse,
            "descale_expanded": self.descale_expanded,
            "odd_head_size": self.d % 8 != 0 or self.dv % 8 != 0,
            "draft_mask": self.draft_words > 0,
            "deterministic": self.deterministic,
            "mixed": self.kv_dtype is not None,
            "token_scales": bool(self.token_scales),
            "stored": self.stored,
            "large": max((*self.lengths_q, *self.lengths_k)) > 130,
        }
        return frozenset(name for name, is_used in used.items() if is_used)


class _Dice:
    """A seeded source that never rolls for a feature the space lacks."""

    def __init__(self, seed: int, space: Space) -> None:
        self.random = Random(seed)
        self.space = space

    def has(self, feature: str, probability: float) -> bool:
        assert feature in FEATURES | FP8_CACHES, feature
        roll = self.random.random() < probability
        return roll and feature in self.space.features

    def pick(self, *choices):  # type: ignore[no-untyped-def]
        return self.random.choice(choices)

    def lengths(self, count: int, longest: int, *, uniform: bool, least: int = 0) -> tuple[int, ...]:
        drawn = [self.random.randint(max(least, 1), max(longest, 1)) for _ in range(count)]
        if least == 0:
            drawn = [0 if self.has("empty", 0.02 if uniform else 0.12) else n for n in drawn]
        return tuple(drawn[:1] * count if uniform else drawn)


def draw(seed: int, space: Space) -> Plan:
    """The plan of this seed; the same for the same space, on any machine."""
    dice = _Dice(seed, space)
    function = dice.random.choices(space.functions, [{VARLEN: 5, KVCACHE: 6, DENSE: 2}[f] for f in space.functions])[0]
    dtype = dice.pick(*space.dtypes)
    heads = _heads(dice, function)
    layout = {VARLEN: _varlen, KVCACHE: _kvcache, DENSE: _dense}[function](dice, heads)
    if layout["q_layout"] == "ragged" or layout.get("seqused_q"):
        layout["max_seqlen"] = dice.pick("exact", "loose", "none")
    if dice.has("tail", 0.15) and "ragged" in layout.values():
        layout["tail"] = dice.random.randint(1, 9)
    settings = _settings(dice, dtype, function, max((1, *layout["lengths_k"])))
    if dice.has("scale", 0.25):
        terms = heads["d"] + (heads["dv"] if heads.get("qv") else 0)
        settings["softmax_scale"] = dice.pick(0.5, 1.5, 3.0 if settings["magnitude"] == 1 else 1.0) * terms**-0.5
    if function != DENSE and dice.has("draft_mask", 0.2):
        settings["draft_words"] = dice.pick(1, 1, 2, 3, 5)
    if function == KVCACHE and dice.has("deterministic", 0.3):
        settings["deterministic"] = True
    settings |= _fp8_cache(dice, dtype, function, layout)
    return Plan(seed=seed, function=function, dtype=dtype, device=space.device, stride_step=space.stride_step,
                **heads, **layout, **settings)  # fmt: skip


def _heads(dice: _Dice, function: str) -> dict:
    space = dice.space
    hk = dice.pick(1, 1, 2, 2, 3, 4)
    group = dice.pick(2, 3, 4, 5, 8) if dice.has("groups", 0.6) else 1
    hk = max(1, min(hk, space.max_heads // group))
    group = min(group, space.max_heads)
    made: dict = {"hk": hk, "hq": hk * group}
    only_qv, with_qv = dice.has("only_qv", 0.03), dice.has("qv", 0.05)
    if (only_qv or with_qv) and space.qv_head_dims:
        made["d"], made["dv"] = dice.pick(*space.qv_head_dims)
        return made | {"qv": True, "only_qv": only_qv and function != DENSE}
    made["d"], made["dv"] = dice.pick(*space.head_dims)
    if space.any_head_dim and dice.random.random() < 0.4:
        # below 8 values a row's error is a matter of luck, and the row rule of no use: those have a test of their own
        step = space.head_dim_step if dice.has("odd_head_size", 0.5) else max(8, space.head_dim_step)
        small = dice.pick(64, 64, 160, space.any_head_dim)
        limit = min(small, space.any_head_dim) // step
        made["d"] = step * dice.random.randint(1, limit)
        made["dv"] = step * dice.random.randint(-(-8 // step), limit) if dice.pick(True, False) else max(made["d"], 8)
    return made


def _longest(dice: _Dice) -> int:
    usual, larger, rare = dice.space.lengths
    if dice.has("large", 0.04):
        return rare
    return dice.random.choices([usual, larger], [70, 30])[0]


def _query_longest(dice: _Dice, longest: int) -> int:
    return dice.pick(1, 4, longest, longest, max(1, longest // 2))


def _varlen(dice: _Dice, heads: dict) -> dict:
    batch, longest = dice.random.randint(1, dice.space.max_batch), _longest(dice)
    made: dict = {"q_layout": "ragged" if dice.has("ragged", 0.9) else "dense"}
    made["k_layout"] = "ragged" if "ragged" in dice.space.features else "dense"
    if dice.has("paged", 0.35):
        made["k_layout"] = "paged"
        made["page_size"] = dice.pick(*dice.space.page_sizes)
    elif dice.random.random() < 0.1:
        made["k_layout"] = "dense"
    made["seqused_q"] = dice.has("seqused_q", 0.25)
    if made["k_layout"] == "paged" or dice.has("seqused_k", 0.3):
        made["used_k"] = "tensor"
    uniform_q = made["q_layout"] == "dense" and not made["seqused_q"]
    uniform_k = made["k_layout"] == "dense" and not made.get("used_k")
    made["lengths_q"] = dice.lengths(batch, _query_longest(dice, longest), uniform=uniform_q)
    if dice.random.random() < 0.3 and not uniform_k:  # self attention
        made["lengths_k"] = made["lengths_q"]
    else:
        made["lengths_k"] = dice.lengths(batch, longest, uniform=uniform_k)
    return made


def _dense(dice: _Dice, heads: dict) -> dict:
    batch, longest = dice.random.randint(1, dice.space.max_batch), _longest(dice)
    return {
        "q_layout": "dense",
        "k_layout": "dense",
        "lengths_q": dice.lengths(batch, _query_longest(dice, longest), uniform=True),
        "lengths_k": dice.lengths(batch, longest, uniform=True),
    }


def _kvcache(dice: _Dice, heads: dict) -> dict:
    batch, longest = dice.random.randint(1, dice.space.max_batch), _longest(dice)
    made: dict = {"q_layout": "ragged" if dice.has("ragged", 0.35) else "dense", "k_layout": "dense"}
    if dice.has("paged", 0.5):
        made["k_layout"], made["page_size"] = "paged", dice.pick(*dice.space.page_sizes)
    given = dice.pick("tensor", "tensor", "tensor", "int") if "seqused_k" in dice.space.features else ""
    if made["k_layout"] == "dense" and dice.random.random() < 0.1:
        given = ""
    made["used_k"] = given
    made["lengths_q"] = dice.lengths(batch, _query_longest(dice, longest), uniform=made["q_layout"] == "dense")
    made["lengths_k"] = dice.lengths(batch, longest, uniform=given != "tensor")
    if dice.has("batch_idx", 0.25):
        made["cache_rows"] = batch + dice.random.randint(0, 3)
    if dice.has("leftpad", 0.25):
        made["leftpad"] = tuple(dice.random.randint(0, n) for n in made["lengths_k"])
    if given and dice.has("append", 0.5):
        made["new_layout"] = "ragged" if dice.has("new_ragged", 0.4) else "dense"
        made["lengths_new"] = dice.lengths(batch, dice.pick(1, 5, longest), uniform=made["new_layout"] == "dense",
                                           least=0 if made["new_layout"] == "ragged" else 1)  # fmt: skip
        if dice.has("rotary", 0.5) and heads["d"] >= 16:
            made["rotary_dim"] = 16 * dice.random.randint(1, heads["d"] // 16)
            made["rotary_interleaved"] = dice.pick(True, False)
            made["rotary_seqlens"] = dice.pick(True, False)
    return made


def _settings(dice: _Dice, dtype: torch.dtype, function: str, longest_k: int) -> dict:
    made: dict = {"causal": dice.has("causal", 0.45), "return_lse": dice.has("lse", 0.7)}
    if dice.has("window", 0.3):
        ends = (-1, 0, dice.random.randint(0, 8), dice.random.randint(0, longest_k + 5))
        made["window_size"] = (dice.pick(*ends), dice.pick(*ends))
    if dice.has("chunk", 0.12):
        made["attention_chunk"] = dice.random.randint(1, longest_k + 5)
    elif function != DENSE and dice.random.random() < 0.1:
        made["attention_chunk"] = None
    if dice.has("softcap", 0.2):
        made["softcap"] = dice.pick(1.0, 8.0, 15.0, 50.0)
    if dice.has("sinks", 0.25):
        made["sinks"] = dice.pick("float32", "inputs")
    if dtype == FP8:
        made["descales"] = dice.pick("", "qkv", "qkv", "k", "kv", "qv")
        made["descale_expanded"] = bool(made["descales"]) and dice.has("descale_expanded", 0.3)
    if dice.has("splits", 0.4):
        made["num_splits"] = dice.pick(0, 2, 3, 7)
    elif dice.random.random() < 0.5:
        made["num_splits"] = 1
    if dice.has("out", 0.4):
        made["out"] = "strided" if dice.has("strides", 0.5) else "contiguous"
    made["strides"] = dice.has("strides", 0.4)
    made["pack_gqa"] = dice.pick(None, None, True, False)
    # larger ones make float32 rows of a single key and a sink a matter of luck: a score of -60 has 10 digits to lose
    made["magnitude"] = dice.pick(2.0, 4.0) if dice.has("hot", 0.15) else 1.0
    return made


def _fp8_cache(dice: _Dice, dtype: torch.dtype, function: str, layout: dict) -> dict:
    """What makes keys and values FP8 beside another q, and scales of tokens. The last rolls: they move no others."""
    made: dict = {}
    if dice.has("mixed", 0.5) and dtype in (torch.bfloat16, torch.float16):
        made["kv_dtype"] = FP8
        made["descales"] = dice.pick("", "kv", "kv", "k", "v", "qkv")
        made["descale_expanded"] = bool(made["descales"]) and dice.has("descale_expanded", 0.3)
        made["stored"] = "lengths_new" in layout and "rotary_dim" not in layout and dice.has("stored", 0.75)
    if function != DENSE and dice.has("token_scales", 0.5) and FP8 in (dtype, made.get("kv_dtype")):
        made["token_scales"] = dice.pick("kv", "kv", "k", "v")
    return made


def coverage(plans: Iterable[Plan]) -> Counter[str]:
    """How many plans use each feature, dtype, function and kind of layout."""
    counted: Counter[str] = Counter()
    for plan in plans:
        counted.update(plan.features)
        counted.update([str(plan.dtype).removeprefix("torch."), plan.function, f"keys {plan.k_layout}"])
        counted.update([f"num_splits {plan.num_splits}", f"out {plan.out or 'ours'}"])
    return counted


CPU = Space("cpu", features=FEATURES | FP8_CACHES)
