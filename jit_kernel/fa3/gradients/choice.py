"""Which implementation serves a backward pass: the best one for the device first, and why not the others."""

from __future__ import annotations

from types import ModuleType

from jit_kernel import config
from jit_kernel.device import Target, device_target
from jit_kernel.engine.progress import warn_once
from jit_kernel.fa3 import dispatch
from jit_kernel.fa3.decision import Accepted, Decision, Rejected, refusal
from jit_kernel.fa3.dispatch import Choice
from jit_kernel.fa3.gradients import cuda
from jit_kernel.fa3.gradients.call import Backward, Gradients

TORCH = "torch"  # FlashAttention 2 in torch, on CUDA
# By vendor, best first. On a CPU torch's own operator is faster in no case (benchmarks/results/gradients.jsonl).
CANDIDATES = {"cpu": ("cpu",), "cuda": ("hopper", "portable", TORCH), "musa": ("musa",)}


def _module(name: str) -> ModuleType | None:
    return cuda if name == TORCH else dispatch.backward_of(name)


def _names(target: Target) -> tuple[str, ...]:
    """The candidates for a target; of one that JIT_KERNEL_IMPLEMENTATION names, that one and what is not ours."""
    ours = dispatch.candidates(target)
    return tuple(name for name in CANDIDATES[target.vendor] if name in ours or name == TORCH)


def decide(name: str, target: Target, call: Backward) -> Decision:
    """What one candidate says of a backward pass."""
    module = _module(name)
    if module is None:
        return Rejected("it has no backward pass", claimed=False)
    if name != TORCH:
        supported = dispatch.supports(name, target)
        if isinstance(supported, Rejected):
            return supported
    elif isinstance(dispatch.supports("portable", target), Rejected):  # FlashAttention 2 has the same bound
        return Rejected("it serves NVIDIA GPUs of compute capability 8.0 and newer", claimed=False)
    decision: Decision = module.decide(call)
    return decision


def choose(target: Target, call: Backward, *, ask_all: bool = False) -> Choice:
    """Ask the candidates, best first, until one accepts; with `ask_all` the rest answer too."""
    chosen = None
    decisions: list[tuple[str, Decision]] = []
    for name in _names(target):
        if chosen is not None and not ask_all:
            break
        decisions.append((name, decide(name, target, call)))
        if chosen is None and isinstance(decisions[-1][1], Accepted):
            chosen = name
    return Choice(chosen, tuple(decisions))


def described(call: Backward) -> str:
    """A backward pass in an error text."""
    sizes = f"{call.q.shape[-1]}/{call.v.shape[-1]}"
    return f"the backward pass on {call.q.device} of {str(call.q.dtype)[6:]} with head sizes {sizes}"


def gradients(call: Backward) -> Gradients:
    """The gradients of a backward pass, by the implementation that serves it.

    Raises NotImplementedError with every candidate's reason when none accepts it, and under JIT_KERNEL_STRICT=1 when
    one that claims all that the call uses rejects it and another would take it; else that is one WARNING.
    """
    choice = served(call)
    for name, decision in choice.decisions:
        if isinstance(decision, Rejected) and decision.claimed:
            text = f"{name} does not serve {described(call)}: {decision.reason}"
            if config.strict():
                raise NotImplementedError(f"{text}; {choice.name} would take it (JIT_KERNEL_STRICT is set)")
            warn_once(f"{text}; {choice.name} takes it", ("backward", name, decision.reason))
    module = _module(choice.name or "")
    if module is None:  # a choice has a name, and a module
        raise refusal(described(call), choice.decisions)
    found: Gradients = module.gradients(call)
    return found


def served(call: Backward) -> Choice:
    """The choice for a backward pass. Raises NotImplementedError, with every reason, where there is none."""
    choice = choose(device_target(call.q.device), call)
    if choice.name is None:
        raise refusal(described(call), choice.decisions)
    return choice
