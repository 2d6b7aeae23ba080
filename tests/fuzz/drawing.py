"""A random call from a seed and an index: `draw(seed, index)`; the same call on any machine, whatever came before.

A call is a valid one with changes in order (tests/fuzz/changes.py), then tensors of some kind in some places
(tests/fuzz/kinds.py), made in some surroundings, cold or after a plain call of the same shapes. Every step has a random
source of its own, so that leaving one out leaves the others as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor

from jit_kernel import flash_attention_v3
from tests.fuzz import bases, changes
from tests.fuzz.kinds import KINDS, Kind

SURROUNDINGS = ("grad", "no grad", "inference", "meta device", "float64 default", "autocast", "function mode",
                "dispatch mode", "deterministic")  # fmt: skip


@dataclass
class Drawn:
    """A call and what is known of it. `steps` says how it came to be, one line each."""

    seed: int
    index: int
    function: str
    arguments: dict[str, Any]
    plain: dict[str, Any]  # the call before it was changed
    steps: list[str] = field(default_factory=list)
    kinds: list[tuple[str, Kind]] = field(default_factory=list)  # argument and the kind of tensor it becomes
    surroundings: str = "grad"
    way: str = "call"  # call | make_fx | jit trace: traced with other numbers, then run with these
    warm: bool = False
    must_serve: bool = True
    threads: int = 1
    device: str = "cpu"

    @property
    def place(self) -> str:
        return f"{self.seed}:{self.index}"


def draw(
    seed: int, index: int, *, without: Collection[str] = (), keep: Collection[int] | None = None, guarded: bool = True,
    device: str = "cpu",
) -> Drawn:  # fmt: skip
    """The call of this seed and index. `without` names kinds, changes or surroundings that are left out; `keep` the
    steps that stay, all by default."""
    random = Random(f"{seed}:{index}")
    function, arguments = bases.draw(random, guarded=guarded, device=device)
    drawn = Drawn(seed, index, function, dict(arguments), dict(arguments), warm=random.random() < 0.4, device=device)
    drawn.must_serve = device == "cpu" or "scheduler_metadata" not in arguments  # made on the CPU
    drawn.threads = random.choice((1, 1, 2, 3))
    mood = random.choices(("valid", "extreme", "malformed", "kinds"), (20, 15, 38, 27))[0]
    steps: list[tuple[str, int]] = []
    if mood == "extreme":
        steps += [("valid change", i) for i in range(random.randint(1, 2))]
    if mood == "malformed":
        steps += [("change", i) for i in range(random.choice((1, 1, 1, 2, 3)))]
    if mood == "kinds" or random.random() < 0.1:
        steps += [("kind", i) for i in range(random.choice((1, 1, 1, 2)))]
    if mood in ("valid", "extreme") and random.random() < 0.15:
        steps.append(("way", 0))
    if random.random() < 0.35:
        steps.append(("surroundings", 0))
    for number, (what, i) in enumerate(steps):
        if keep is None or number in keep:
            _STEPS[what](drawn, Random(f"{seed}:{index}:{what}:{i}"), without, number)
    return drawn


def _names(drawn: Drawn, random: Random, *, tensors: bool) -> str:
    """An argument: mostly one that the call has."""
    given = [name for name, value in drawn.arguments.items() if isinstance(value, Tensor) or not tensors]
    if given and (tensors or random.random() < 0.7):
        return random.choice(given)
    return random.choice(list(inspect.signature(getattr(flash_attention_v3, drawn.function)).parameters))


def _change(drawn: Drawn, random: Random, without: Collection[str], number: int) -> None:
    made, name, change = None, "", changes.scalar
    for _ in range(8):
        change = random.choices(list(changes.CHANGES), list(changes.CHANGES.values()))[0]
        name = _names(drawn, random, tensors=change is not changes.scalar)
        torch.manual_seed(random.getrandbits(40))
        try:
            made = change(random, drawn.arguments, name)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError, KeyError):
            made = None  # torch has no such tensor
        if made is not None:
            break
    if made is None or change.__name__ in without:
        return
    drawn.arguments.update(made)
    drawn.must_serve = False
    drawn.steps.append(f"{number} {change.__name__} of {name}: {_shown(made[name])}")


def _valid_change(drawn: Drawn, random: Random, without: Collection[str], number: int) -> None:
    change = random.choices(list(changes.VALID), list(changes.VALID.values()))[0]
    name = _names(drawn, random, tensors=True)
    torch.manual_seed(random.getrandbits(40))
    made = change(random, drawn.arguments, name)
    if made is not None and change.__name__ not in without:
        drawn.arguments.update(made)
        drawn.steps.append(f"{number} {change.__name__} of {name}")


def _kind(drawn: Drawn, random: Random, without: Collection[str], number: int) -> None:
    kind = KINDS[random.choice(list(KINDS))]
    tensors = [name for name, value in drawn.arguments.items() if isinstance(value, Tensor)]
    if not tensors or kind.name in without:
        return
    names = tensors if random.random() < 0.35 else [random.choice(tensors)]
    names = [name for name in names if name not in dict(drawn.kinds)]
    drawn.kinds += [(name, kind) for name in names]
    drawn.steps.append(f"{number} kind {kind.name}: {', '.join(names)}")


def _surroundings(drawn: Drawn, random: Random, without: Collection[str], number: int) -> None:
    chosen = random.choice(SURROUNDINGS)
    if chosen not in without:
        drawn.surroundings = chosen
        drawn.steps.append(f"{number} surroundings {chosen}")


def _way(drawn: Drawn, random: Random, without: Collection[str], number: int) -> None:
    chosen = random.choice(("make_fx", "jit trace"))
    if chosen not in without and not drawn.kinds:
        drawn.way, drawn.must_serve = chosen, False
        drawn.steps.append(f"{number} by {chosen}")


_STEPS = {"change": _change, "valid change": _valid_change, "kind": _kind, "way": _way, "surroundings": _surroundings}


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        where = "" if value.device.type == "cpu" else f" on {value.device}"
        numbers = f" {value.tolist()}" if value.numel() <= 8 and value.dtype == torch.int32 and not where else ""
        return f"{str(value.dtype)[6:]} {tuple(value.shape)} strides {value.stride()}{numbers}{where}"
    if isinstance(value, (tuple, list)) and any(isinstance(each, Tensor) for each in value):
        return f"{type(value).__name__} of {', '.join(map(_shown, value))}"  # not repr: it copies a giant tensor
    return f"{value!r:.80} ({type(value).__name__})"


def describe(drawn: Drawn) -> str:
    """The call for a person who has to repeat it."""
    kinds = dict(drawn.kinds)
    state = "warm" if drawn.warm else "cold"
    lines = [f"{drawn.function}, {state}, {drawn.way}, {drawn.surroundings}, {drawn.threads} threads"]
    for name, value in drawn.arguments.items():
        lines.append(f"  {name} = {_shown(value)}" + (f" as {kinds[name].name}" if name in kinds else ""))
    return "\n".join(lines + [f"  step {step}" for step in drawn.steps])
