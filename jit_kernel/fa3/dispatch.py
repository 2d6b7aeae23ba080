"""Which implementation serves a call: the best one for the device first, decided once per kind of call.

An implementation is a package of this folder with
    NAME                        its name here, in JIT_KERNEL_IMPLEMENTATION and in every text
    FUNCTIONS                   the public attention functions whose calls `attend` takes
    supports(target)            Accepted or Rejected for a device as a whole (architecture, versions)
    decide(target, features)    Accepted or Rejected for one kind of call on a device that it supports
    attend(call)                the result of a checked call that `decide` accepts
    prepare(device)             compiles or loads what the device needs before any variant (a launcher)
    all_variants(target)        what warm-up compiles for a target, as jit.KernelSpec with named fields
    canonical(spec, field, value)   the value of a variant's field that serves a user's value ("96" -> "128")
and, where it has them,
    combine(out_partial, lse_partial, out, lse)
    merge(out_a, lse_a, out_b, lse_b, out, lse)
    plan(parameters)            scheduler metadata for checked parameters
    variant(target, features, call)   the kernel that serves a call, for `why`
    REFUSES                     true where `attend` raises NotImplementedError for what `decide` rejects: alone on a
                                device it is called without a decision, whose features take 5 us to gather
    try_known(call)             the result of a checked call that `decide` would accept, by a faster way, or None: it
                                declines what asks for a feature of the table that `decide` reads (features.ARGUMENTS)
                                and that it does not claim
    try_unchecked(arguments)    the same for the fields of an unchecked call, asked before the checks: it
                                declines whatever they would refuse. One for CPUs and one for GPUs; not asked
                                on a GPU under JIT_KERNEL_CHECK_INDICES=1
Its file backward.py, where it has one, is its backward pass:
    decide(call)                Accepted or Rejected for a gradients.call.Backward
    gradients(call)             the gradients.call.Gradients of one that it accepts
    variants(target)            what warm-up compiles for it
It imports neither another implementation nor this module; it is imported when its device is first used.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jit_kernel import config
from jit_kernel.device import Target, device_target
from jit_kernel.engine.forks import Lock
from jit_kernel.engine.progress import warn_once
from jit_kernel.fa3 import call as calls
from jit_kernel.fa3.call import Arguments, Call, MetadataParameters, Result
from jit_kernel.fa3.decision import Accepted, Decision, Rejected, refusal
from jit_kernel.fa3.features import Features, plain_features, planned_features

if TYPE_CHECKING:
    from jit_kernel.jit import KernelSpec  # the engine is imported with the first implementation: 20 ms


@dataclass(frozen=True)
class Choice:
    """The implementation that serves a kind of call, or None, and what each candidate answered."""

    name: str | None
    decisions: tuple[tuple[str, Decision], ...]


def implementation(name: str) -> ModuleType:
    """The package of an implementation, imported when it is first asked for."""
    return importlib.import_module(f"jit_kernel.fa3.{name}")


def backward_of(name: str) -> ModuleType | None:
    """The backward pass of an implementation, None where it has none."""
    path = f"jit_kernel.fa3.{name}.backward"
    return None if importlib.util.find_spec(path) is None else importlib.import_module(path)


def supports(name: str, target: Target) -> Decision:
    """Whether an implementation serves a target at all."""
    decision: Decision = implementation(name).supports(target)
    return decision


def candidates(target: Target) -> tuple[str, ...]:
    """The names of the implementations that may serve a target, best first.

    Raises NotImplementedError when JIT_KERNEL_IMPLEMENTATION names one that never serves its vendor.
    """
    names = config.IMPLEMENTATIONS[target.vendor]
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


# The module's function that serves a public function.
_SERVING = {"get_scheduler_metadata": "plan", "flash_attn_combine": "combine", "merge_state": "merge"}


def _has(module: ModuleType, function: str) -> bool:
    return hasattr(module, _SERVING[function]) if function in _SERVING else function in module.FUNCTIONS


def choose(target: Target, features: Features, function: str, *, ask_all: bool = False) -> Choice:
    """Ask the candidates, best first, until one accepts; with `ask_all` the rest answer too."""
    name = None
    decisions: list[tuple[str, Decision]] = []
    for candidate in candidates(target):
        if name is not None and not ask_all:
            break
        decision = supports(candidate, target)
        if isinstance(decision, Accepted):
            module = implementation(candidate)
            if _has(module, function):
                decision = module.decide(target, features)
            else:
                decision = Rejected(f"it has no {function}", claimed=False)
        decisions.append((candidate, decision))
        if name is None and isinstance(decision, Accepted):
            name = candidate
    return Choice(name, tuple(decisions))


def resolve(target: Target, features: Features, function: str) -> ModuleType:
    """The implementation that serves a kind of call.

    Raises NotImplementedError when none accepts it, and under JIT_KERNEL_STRICT=1 when one
    that claims every feature of the call rejects it and another would take it.
    """
    choice = choose(target, features, function)
    what = f"{function} on {target} with {features.used()}"
    if choice.name is None:
        raise refusal(what, choice.decisions)
    for name, decision in choice.decisions:
        if isinstance(decision, Rejected) and decision.claimed:
            text = f"{name} does not serve {what}: {decision.reason}"
            if config.strict():
                raise NotImplementedError(f"{text}; {choice.name} would take it (JIT_KERNEL_STRICT is set)")
            warn_once(f"{text}; {choice.name} takes it", (name, decision.reason))
    return implementation(choice.name)


class Dispatcher:
    """The implementations of one device, after what the device needs was compiled or loaded.

    One that is alone and refuses by itself takes every call. Else each call goes to the one chosen for it; what was
    chosen is remembered by a plain tuple of what the call asks for. Calls arrive checked.
    """

    def __init__(self, target: Target, modules: tuple[ModuleType, ...]) -> None:
        self.target = target
        self.modules = modules
        self._chosen: dict[tuple[object, ...], Callable[[Call], Result]] = {}
        first = modules[0]
        self.try_unchecked: Callable[[Arguments], Result | None] | None = getattr(first, "try_unchecked", None)
        self._try_known: Callable[[Call], Result | None] | None = getattr(first, "try_known", None)
        self._known_functions: tuple[str, ...] = first.FUNCTIONS
        self._alone = len(modules) == 1 and getattr(first, "REFUSES", False)
        self.attend: Callable[[Call], Result] = first.attend if self._alone else self._attend

    def _attend(self, call: Call) -> Result:
        if self._try_known is not None and call.function in self._known_functions:
            result = self._try_known(call)
            if result is not None:
                return result
        plain = plain_features(call)
        chosen = self._chosen.get((call.function, plain))
        if chosen is None:
            features = Features(*plain)  # type: ignore[arg-type]
            chosen = resolve(self.target, features, call.function).attend
            self._chosen[call.function, plain] = chosen
        return chosen(call)

    def plan(self, parameters: MetadataParameters) -> torch.Tensor:
        """Scheduler metadata, by the implementation that serves the calls which it is for."""
        if self._alone:
            module = self.modules[0]
        else:
            module = resolve(self.target, self._planned(parameters), "get_scheduler_metadata")
        made: torch.Tensor = module.plan(parameters)
        return made

    def _planned(self, parameters: MetadataParameters) -> Features:
        """What the calls that metadata is for ask for: with qkv_dtype e4m3, q in e4m3 or else in 16 bits."""
        features = planned_features(parameters)
        if features.kv_dtype == "e4m3" and choose(self.target, features, "get_scheduler_metadata").name is None:
            mixed = replace(features, dtype="bf16")
            if choose(self.target, mixed, "get_scheduler_metadata").name is not None:
                return mixed
        return features

    def first_with(self, function: str) -> Callable[..., None]:
        """`combine` or `merge` of the best implementation that has it, by its public function's name."""
        for module in self.modules:
            if _has(module, function):
                found: Callable[..., None] = getattr(module, _SERVING[function])
                return found
        names = ", ".join(module.NAME for module in self.modules)
        raise NotImplementedError(f"no implementation serves {function} on {self.target}: {names} have none")


# By device: the settings that it was made under, and its dispatcher. config.reload() makes new settings.
_made: dict[torch.device | str, tuple[config.Settings, Dispatcher]] = {}
_making = Lock()


def dispatcher(device: torch.device | str) -> Dispatcher:
    """What serves a device; compiles or loads what the device needs when it is first asked for.

    Raises NotImplementedError with every candidate's reason when nothing serves it, and what `jit.load` raises.
    """
    known = _made.get(device)
    if known is not None and known[0] is config.settings():
        return known[1]
    with _making:
        known = _made.get(device)
        settings = config.settings()
        if known is None or known[0] is not settings:
            known = _made[device] = (settings, _new_dispatcher(str(device), device_target(device)))
            _remember_unchecked(known[1], settings)
    return known[1]


def _new_dispatcher(device: str, target: Target) -> Dispatcher:
    answers = supporting(target)
    modules = tuple(implementation(name) for name, decision in answers if isinstance(decision, Accepted))
    if not modules:
        raise refusal(f"device {device!r} ({target})", answers)
    for module in modules:
        module.prepare(device)
    return Dispatcher(target, modules)


# The ways of unchecked calls: by True that of CPUs, by False that of GPUs.
_Way = Callable[[Arguments], Result | None]
_unchecked: dict[bool, _Way] = {}


def _remember_unchecked(made: Dispatcher, settings: config.Settings) -> None:
    of_cpu = made.target.vendor == "cpu"
    # On a GPU what index tensors hold is looked at by the checks alone.
    if made.try_unchecked is None or (settings.check_indices and not of_cpu):
        return
    config.on_reload(_forget_unchecked)
    _unchecked[of_cpu] = made.try_unchecked
    cpus, gpus = _unchecked.get(True), _unchecked.get(False)
    calls.try_unchecked = _by_device(cpus, gpus) if cpus and gpus else made.try_unchecked
    if config.settings() is not settings:  # forgotten since
        _forget_unchecked()


def _by_device(cpus: _Way, gpus: _Way) -> _Way:
    """One way for both: what the device of q has. What is no plain tensor both decline."""

    def try_unchecked(arguments: Arguments) -> Result | None:
        q = arguments[1]
        return cpus(arguments) if q.__class__ is Tensor and q.is_cpu else gpus(arguments)

    return try_unchecked


def _forget_unchecked() -> None:
    calls.try_unchecked = None
    _unchecked.clear()


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
        canonical = implementation(name).canonical
        found += [spec for spec in specs if _serves(spec, canonical, wanted)]
    for field in wanted:
        if field not in known:
            raise ValueError(f"no kernel for {target} has a field {field!r}; it must be one of {sorted(known)}")
    return found


def _variants_of(name: str, target: Target) -> Iterable[KernelSpec]:
    if isinstance(supports(name, target), Rejected):
        return []
    forward: Iterable[KernelSpec] = implementation(name).all_variants(target)
    module = backward_of(name)
    backward: Iterable[KernelSpec] = () if module is None else module.variants(target)
    return dict.fromkeys((*forward, *backward))


def _serves(spec: KernelSpec, canonical: Callable[[KernelSpec, str, str], str], wanted: Mapping[str, str]) -> bool:
    fields = {field: str(value) for field, value in spec.variant}
    return all(field not in fields or fields[field] == canonical(spec, field, value) for field, value in wanted.items())
