"""Which form of context parallelism serves a step, how it was chosen, and the step's plan.

The estimate counts what each form leaves exposed on one node: all-to-all waits for its two exchanges, a ring for what a
step's exchange takes longer than its call, all-gather for everything; a ring and all-gather merge partial results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from jit_kernel.attention.metadata import AttentionLayer
from jit_kernel.attention.parallel import heads as of_heads
from jit_kernel.attention.parallel import zigzag
from jit_kernel.attention.parallel.all_gather import all_gather_attention
from jit_kernel.attention.parallel.all_to_all import all_to_all_attention, two_level_attention
from jit_kernel.attention.parallel.exchange import need_group, transport_of
from jit_kernel.attention.parallel.peers import timeout_of
from jit_kernel.attention.parallel.prefix import Prefix, is_windowed
from jit_kernel.attention.parallel.ring import RingPlan, plan_ring, ring_attention

FORMS = ("ring", "all_to_all", "two_level", "all_gather")
# Of one H200 and its links: the rates that the estimates take. Only their ratios matter.
_FLOPS, _LINK, _MEMORY = 620e12, 350e9, 4.2e12
_STEP = 25e-6  # seconds that a further call and its launch cost


@dataclass(frozen=True)
class Choice:
    """How sequences are shared out. form: one of FORMS; inner: the ranks that share heads, 1 in a ring, all of them in
    all-to-all. seconds: the estimate of each form, on H200s; reasons: why a form cannot serve."""

    form: str
    inner: int
    seconds: dict[str, float]
    reasons: dict[str, str]

    def explain(self) -> str:
        """One line a form: its estimate or why it cannot serve, the chosen one first."""
        lines = [f"{self.form} (ranks that share heads: {self.inner})"]
        for form in FORMS:
            text = self.reasons.get(form) or f"{self.seconds[form] * 1e3:.3f} ms estimated"
            lines.append(f"  {form}: {text}")
        return "\n".join(lines)


@dataclass(frozen=True)
class ContextPlan:
    """What `context_attention` does in every layer of a step."""

    choice: Choice
    lengths: tuple[int, ...]
    group: dist.ProcessGroup | None
    groups: tuple[dist.ProcessGroup, dist.ProcessGroup] | None  # inner and ring of two_level
    ring: RingPlan | None
    device: torch.device
    made_for: tuple[object, ...]  # what of a layer and of its heads the choice depends on

    @property
    def form(self) -> str:
        """One of FORMS."""
        return self.choice.form

    @property
    def inner(self) -> int:
        """The ranks that share heads."""
        return self.choice.inner

    def shard(self, x: Tensor) -> Tensor:
        """This rank's tokens of packed x (total, ...)."""
        size = dist.get_world_size(self.group)
        return zigzag.shard(x, self.lengths, dist.get_rank(self.group), size, self.inner)

    def unshard(self, parts: Sequence[Tensor]) -> Tensor:
        """The packed whole from every rank's tokens, in rank order."""
        return zigzag.unshard(parts, self.lengths, self.inner)

    def explain(self) -> str:
        """The choice, and the way that tensors take between the ranks; all ranks ask together the first time."""
        ways = [transport_of(group, self.device) for group in self.groups or (self.group,)]
        return "\n".join([self.choice.explain(), *(f"  exchange: {way.name}, because {way.reason}" for way in ways)])


def choose(
    lengths: Sequence[int], layer: AttentionLayer, heads: tuple[int, int], head_dim: int, size: int, *,
    form: str | None = None, inner: int | None = None,
) -> Choice:  # fmt: skip
    """The form for packed sequences of `lengths` over `size` ranks. Arguments and errors as `plan_context`."""
    if form is not None and form not in FORMS:
        raise ValueError(f"form is {form!r}; it must be None or one of {', '.join(FORMS)}")
    if not isinstance(layer, AttentionLayer):
        raise TypeError(f"layer is {layer!r}; it must be an AttentionLayer")
    for name, value in (("lengths", lengths), ("heads", heads)):
        if not isinstance(value, Sequence) or not all(isinstance(each, int) and each >= 0 for each in value):
            raise ValueError(f"{name} is {value!r}; it must be a sequence of ints that are at least 0")
    if len(heads) != 2:
        raise ValueError(f"heads is {heads}; it must be two numbers, the heads of q and of k")
    if size < 1:
        raise ValueError(f"the number of ranks is {size}; it must be at least 1")
    if inner is not None and (inner < 1 or size % inner):
        raise ValueError(f"inner is {inner}; it must divide the {size} ranks")
    if min(*heads, head_dim) < 1 or heads[0] % heads[1]:
        raise ValueError(
            f"heads is {heads} and head_dim {head_dim}; the first must be a multiple of the second, all from 1"
        )
    reasons = _reasons(layer, heads, size, inner)
    seconds = _estimates(lengths, layer, heads, head_dim, size, inner or size)
    able = [each for each in FORMS if each not in reasons]
    if form is not None and form not in able:
        raise NotImplementedError(f"form {form!r}: {reasons[form]}")
    if not able:
        raise NotImplementedError("no form serves the layer: " + "; ".join(f"{k}: {v}" for k, v in reasons.items()))
    taken = form or min(able, key=lambda each: (seconds[each], FORMS.index(each)))
    return Choice(taken, {"all_to_all": size, "two_level": inner or 1}.get(taken, 1), seconds, reasons)


def plan_context(
    lengths: Sequence[int],
    layer: AttentionLayer,
    heads: tuple[int, int],
    head_dim: int,
    device: torch.device | str,
    group: dist.ProcessGroup | None = None,
    *,
    form: str | None = None,
    inner: int | None = None,
    groups: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None,
) -> ContextPlan:
    """The plan for packed sequences of `lengths`, of the whole, made alike on every rank of the group.

    heads: (hq, hk) of the whole. form: one of FORMS to take instead of the one with the least estimate. inner: the
    ranks of two_level that share heads, neighbours; two_level is considered where it is given, because it pays where
    ranks are on several hosts. groups: its (inner, ring) groups, which a group of some ranks alone needs given; of all
    ranks they are made here, once, by all. Raises ValueError for a bad argument and NotImplementedError where the form,
    or every form, cannot serve.
    """
    need_group(group or dist.group.WORLD)
    device = torch.device(device)
    choice = choose(lengths, layer, heads, head_dim, dist.get_world_size(group), form=form, inner=inner)
    if choice.form != "two_level":
        groups = None
    elif groups is None:
        groups = _groups(group, choice.inner)
    causal = layer.causal or layer.window_size[1] == 0
    of_ring = groups[1] if groups else group
    ring = plan_ring(lengths, causal, device, of_ring) if choice.form in ("ring", "two_level") else None
    return ContextPlan(choice, tuple(lengths), group, groups, ring, device, _made_for(layer, *heads, head_dim))


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: ContextPlan,
    layer: AttentionLayer | None = None,
    *,
    prefix: Prefix | None = None,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of this rank's queries over every rank's keys, in the plan's form.

    q (tokens, hq, d), k (tokens, hk, d), v (tokens, hk, dv): `plan.shard` of the packed whole. Returns this rank's out,
    with return_softmax_lse also lse (hq, tokens). layer: without one `AttentionLayer()`, which is causal; its mask and
    the heads must be those of the plan, scale, softcap and sinks may be a layer's own. Raises ValueError where they are
    not, and what the form raises.
    """
    layer = layer or AttentionLayer()
    found = _made_for(layer, q.shape[1], k.shape[1], q.shape[-1]) if q.dim() == k.dim() == 3 else ()
    if found and found != plan.made_for:
        raise ValueError(f"plan was made for {plan.made_for}; the call has {found}: {_OF_PLAN}")
    own = {"prefix": prefix, "return_softmax_lse": return_softmax_lse}
    if plan.form == "two_level":
        assert plan.groups is not None
        inner, ring = plan.groups
        return two_level_attention(
            q, k, v, plan.lengths, layer, inner=inner, ring=ring, plan=plan.ring, prefix=prefix,
            return_softmax_lse=return_softmax_lse,
        )  # fmt: skip
    if plan.form == "ring":
        return ring_attention(
            q, k, v, plan.lengths, layer, group=plan.group, plan=plan.ring, prefix=prefix,
            return_softmax_lse=return_softmax_lse,
        )  # fmt: skip
    function = all_to_all_attention if plan.form == "all_to_all" else all_gather_attention
    return function(q, k, v, plan.lengths, layer, group=plan.group, **own)  # type: ignore[arg-type]


_OF_PLAN = "causal, window_size, attention_chunk, heads of q, heads of k, head size of q"


def _made_for(layer: AttentionLayer, hq: int, hk: int, head_dim: int) -> tuple[object, ...]:
    return (layer.causal, tuple(layer.window_size), layer.attention_chunk, hq, hk, head_dim)


def _reasons(layer: AttentionLayer, heads: tuple[int, int], size: int, inner: int | None) -> dict[str, str]:
    """Why a form cannot serve."""
    reasons = {}
    if is_windowed(layer):
        reasons["ring"] = reasons["two_level"] = "a rank's keys are not one run of the sequence, as a window wants them"
        if not (layer.causal or layer.window_size[1] == 0):
            reasons["all_gather"] = "a window without a causal mask has keys to the right of a rank's queries"
    shared = of_heads.why_not(*heads, size)
    if shared is not None:
        reasons["all_to_all"] = shared
    if inner is None:
        reasons.setdefault("two_level", "inner, the ranks that share heads, is not given")
    else:
        shared = of_heads.why_not(*heads, inner)
        if shared is not None:
            reasons.setdefault("two_level", shared)
    return reasons


def _estimates(
    lengths: Sequence[int], layer: AttentionLayer, heads: tuple[int, int], head_dim: int, size: int, inner: int
) -> dict[str, float]:
    """Seconds of each form, by bytes and operations of 16-bit inputs."""
    hq, hk = heads
    tokens = sum(lengths) / size
    half = 0.5 if layer.causal or layer.window_size[1] == 0 else 1.0
    compute = half * sum(4.0 * n * n * hq * head_dim for n in lengths) / size / _FLOPS
    keys = 2 * 2 * tokens * hk * head_dim / _LINK  # a rank's keys and values once
    heads_twice = 2 * tokens * head_dim * (2 * hq + 2 * hk) / _LINK
    result = 2 * tokens * hq * head_dim / _MEMORY

    def ring(ranks: int, keys: float, calls: float) -> float:
        step = compute / ranks
        return compute + (ranks - 1) * (max(0.0, keys - step) + _STEP) + (ranks + 1) * calls

    away = (inner - 1) / inner
    return {
        "ring": ring(size, keys, result),
        "all_to_all": compute + (size - 1) / size * heads_twice + 3 * result,
        "two_level": ring(size // inner, keys, result) + away * heads_twice + 3 * result,
        "all_gather": compute + (size - 1) * keys + 2 * _STEP,
    }


_made: WeakKeyDictionary[dist.ProcessGroup, dict[int, tuple[dist.ProcessGroup, dist.ProcessGroup]]] = (
    WeakKeyDictionary()
)


def _groups(group: dist.ProcessGroup | None, inner: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """(inner, ring) groups of this rank among all ranks, made once, with the timeout and the backend of theirs."""
    world = dist.group.WORLD
    if world is None or (group is not None and group is not world):
        raise ValueError("groups is None; two_level in a group of some ranks must be given its (inner, ring) groups")
    known = _made.setdefault(world, {})
    if inner not in known:
        ranks, me = list(range(dist.get_world_size())), dist.get_rank()
        of_inner = [ranks[first : first + inner] for first in range(0, len(ranks), inner)]
        of_ring = [ranks[place::inner] for place in range(inner)]
        options = {"timeout": timedelta(seconds=timeout_of(world)), "backend": dist.get_backend_config(world)}
        # Every rank makes every group, in one order, as torch.distributed asks.
        made = {tuple(some): dist.new_group(some, **options) for some in (*of_inner, *of_ring)}  # type: ignore[arg-type]
        mine = [made[tuple(some)] for of in (of_inner, of_ring) for some in of if me in some]
        known[inner] = (mine[0], mine[1])
    return known[inner]
