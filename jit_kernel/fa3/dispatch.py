"""Which implementation serves a call: the best one for the device first, decided once per kind of call.

An implementation is a module of this folder with
    NAME                        its name here, in JIT_KERNEL_IMPLEMENTATION and in every text
    supports(target)            Accepted or Rejected for a device as a whole (architecture, versions)
    decide(target, features)    Accepted or Rejected for one kind of call on a device that it supports
    KERNELS                     the public functions it has, keyword-only, by name; values arrive checked:
                                attention_chunk, max_seqlen_*, softmax_scale and cache_seqlens are resolved
    prepare(device)             compiles or loads what the device needs before any variant (a launcher)
    all_variants(target)        what warm-up compiles for a target, as jit.KernelSpec with named fields
    canonical(field, value)     the value of a variant's field that serves a user's value ("96" -> "128")
    variant(target, features, call)   the kernel that serves a call, for `why`; an implementation without kernels of
                                its own has none
    plain_attend(...)           may be there: the result of a call without its rare arguments, which nobody checked, or
                                None where it has a mistake or asks for more than this serves
    shortcut(function, chosen)  may be there in the first candidate: `chosen` for the calls that it would get anyway,
                                without the cost of asking
It imports neither another implementation nor this module; it is imported when its device is first used.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from jit_kernel import config
from jit_kernel.device import Target
from jit_kernel.fa3.features import Accepted, Decision, Features, Rejected, refusal
from jit_kernel.jit import KernelSpec

log = logging.getLogger("jit_kernel")

# By vendor, best first.
CANDIDATES = {"cpu": ("cpu",), "cuda": ("hopper", "portable"), "musa": ("musa",)}

# These raise for a call that they do not serve, so alone on a device they need no dispatcher: 5 us a call.
REFUSE_THEMSELVES = ("cpu", "portable", "musa")

_said: set[tuple[str, str]] = set()
_said_guard = threading.Lock()


@dataclass(frozen=True)
class Choice:
    """The implementation that serves a kind of call, or None, and what each candidate answered."""

    name: str | None
    decisions: tuple[tuple[str, Decision], ...]


def implementation(name: str) -> ModuleType | None:
    """The module of an implementation, imported at the first question; None if this version lacks it."""
    module = f"jit_kernel.fa3.{name}"
    if importlib.util.find_spec(module) is None:
        return None
    return importlib.import_module(module)


def supports(name: str, target: Target) -> Decision:
    """Whether an implementation serves a target at all."""
    module = implementation(name)
    if module is None:
        return Rejected(f"this version of jit_kernel has no jit_kernel/fa3/{name}.py", claimed=False)
    decision: Decision = module.supports(target)
    return decision


def candidates(target: Target) -> tuple[str, ...]:
    """The names of the implementations that may serve a target, best first.

    Raises NotImplementedError when JIT_KERNEL_IMPLEMENTATION names one that never serves its vendor.
    """
    names = CANDIDATES[target.vendor]
    forced = config.implementation()
    if forced is None:
        return names
    if forced not in names:
        raise NotImplementedError(
            f"JIT_KERNEL_IMPLEMENTATION is {forced!r}, which does not serve {target}; "
            f"it must be one of {', '.join(names)}, or unset"
        )
    return (forced,)


def supporting(target: Target) -> tuple[tuple[str, Decision], ...]:
    """Every candidate for a target and whether it serves the target at all, best first."""
    return tuple((name, supports(name, target)) for name in candidates(target))


def choose(target: Target, features: Features, function: str, *, ask_all: bool = False) -> Choice:
    """Ask the candidates, best first, until one accepts; with `ask_all` the rest answer too."""
    name = None
    decisions: list[tuple[str, Decision]] = []
    for candidate in candidates(target):
        if name is not None and not ask_all:
            break
        decision = supports(candidate, target)
        if isinstance(decision, Accepted):
            module = importlib.import_module(f"jit_kernel.fa3.{candidate}")
            if function in module.KERNELS:
                decision = module.decide(target, features)
            else:
                decision = Rejected(f"it has no {function}", claimed=False)
        decisions.append((candidate, decision))
        if name is None and isinstance(decision, Accepted):
            name = candidate
    return Choice(name, tuple(decisions))


def resolve(target: Target, features: Features, function: str) -> Callable[..., object]:
    """The function that serves a kind of call.

    Raises NotImplementedError when no implementation accepts it, and under JIT_KERNEL_STRICT=1 when one
    that claims every feature of the call rejects it and another would take it.
    """
    choice = choose(target, features, function)
    what = f"{function} on {target} with {features.used()}"
    if choice.name is None:
        raise refusal(what, choice.decisions)
    for name, decision in choice.decisions:
        if isinstance(decision, Rejected) and decision.claimed:
            text = f"{name} does not serve {what}: {decision.reason}; {choice.name} would take it"
            if config.strict():
                raise NotImplementedError(f"{text} (JIT_KERNEL_STRICT is set)")
            _warn_once(name, decision.reason, f"{text[: text.rindex(';')]}; {choice.name} takes it")
    module = importlib.import_module(f"jit_kernel.fa3.{choice.name}")
    function_: Callable[..., object] = module.KERNELS[function]
    return function_


def _warn_once(name: str, reason: str, text: str) -> None:
    with _said_guard:
        if (name, reason) in _said:
            return
        _said.add((name, reason))
    log.warning(text)


def kernels(device: str, target: Target) -> Mapping[str, Callable[..., object]]:
    """The functions that serve a device, after what the device needs was compiled or loaded.

    Raises NotImplementedError with every candidate's reason when none serves it.
    """
    answers = supporting(target)
    names = [name for name, decision in answers if isinstance(decision, Accepted)]
    if not names:
        raise refusal(f"device {device!r} ({target})", answers)
    modules = [importlib.import_module(f"jit_kernel.fa3.{name}") for name in names]
    for module in modules:
        module.prepare(device)
    if len(modules) == 1 and modules[0].NAME in REFUSE_THEMSELVES:
        only: Mapping[str, Callable[..., object]] = modules[0].KERNELS
        return only
    from jit_kernel.fa3.seam import Dispatcher

    return Dispatcher(target, modules).kernels()


def plain_attend(target: Target) -> Callable[..., Any] | None:
    """plain_attend of the implementation that serves a target alone; None where several do, or it has none."""
    names = [name for name, decision in supporting(target) if isinstance(decision, Accepted)]
    module = implementation(names[0]) if len(names) == 1 else None
    attend: Callable[..., Any] | None = getattr(module, "plain_attend", None)
    return attend


def all_variants(target: Target) -> list[KernelSpec]:
    """Every kernel that warm-up compiles for a target, of each implementation that has any for it."""
    return [spec for name in candidates(target) for spec in _variants_of(name, target)]


def select_variants(target: Target, wanted: Mapping[str, str]) -> list[KernelSpec]:
    """The kernels of `all_variants` that serve the wanted values of their named fields.

    head_dim=96 selects the kernel that serves a head size of 96, whatever its own field says.
    Raises ValueError for a field that no kernel has.
    """
    found = []
    known: set[str] = set()
    for name in candidates(target):
        specs = list(_variants_of(name, target))
        known.update(field for spec in specs for field, _ in spec.variant)
        module = implementation(name)
        if module is not None:
            serving = {field: module.canonical(field, value) for field, value in wanted.items()}
            found += [spec for spec in specs if _serves(spec, serving)]
    for field in wanted:
        if field not in known:
            raise ValueError(f"no kernel for {target} has a field {field!r}; it must be one of {sorted(known)}")
    return found


def _variants_of(name: str, target: Target) -> Iterable[KernelSpec]:
    module = implementation(name)
    if module is None or isinstance(supports(name, target), Rejected):
        return []
    variants: Iterable[KernelSpec] = module.all_variants(target)
    return variants


def _serves(spec: KernelSpec, wanted: Mapping[str, str]) -> bool:
    fields = {field: str(value) for field, value in spec.variant}
    return all(fields.get(field, value) == value for field, value in wanted.items())
