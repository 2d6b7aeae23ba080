"""`python -m jit_kernel why`: which implementation and kernel serve a call, and why the others do not.

    python -m jit_kernel why --q bf16[2,4096,32,128] --k bf16[2,4096,8,128] --causal --device cuda:0

Every argument of the public functions is an option: a tensor as dtype[shape], a bool as a flag, window_size as
left,right. With --backward the answer is about the call's backward pass. `why --module my.package` says of each kernel
that a module declares where it is stored, or which change would compile it. `why --ranks 4 --lengths 32768 --heads 32,8
--head-dim 128 --causal` says which form of context parallelism serves so many ranks. Nothing is compiled or run.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from jit_kernel import flash_attention_v3
from jit_kernel.commands import ranks
from jit_kernel.device import Target, detect_device, device_target
from jit_kernel.engine import build
from jit_kernel.engine.store import CacheError
from jit_kernel.fa3 import call as calls
from jit_kernel.fa3 import dispatch, gradients, torch_operators
from jit_kernel.fa3.call import Call
from jit_kernel.fa3.checks import shapes
from jit_kernel.fa3.checks.call import check_numbers
from jit_kernel.fa3.decision import Accepted, Decision
from jit_kernel.fa3.features import Features, features_of
from jit_kernel.fa3.gradients import choice, operator
from jit_kernel.toolkit import declared

_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "e4m3": torch.float8_e4m3fn,
    "i32": torch.int32,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "flash_attn_func": flash_attention_v3.flash_attn_func,
    "flash_attn_varlen_func": flash_attention_v3.flash_attn_varlen_func,
    "flash_attn_with_kvcache": flash_attention_v3.flash_attn_with_kvcache,
}


@dataclass(frozen=True)
class Explanation:
    """What would happen to a call. `implementation` and `kernel` are None where there is none."""

    function: str
    target: Target
    features: Features
    implementation: str | None
    kernel: str | None
    decisions: tuple[tuple[str, Decision], ...]

    def __str__(self) -> str:
        lines = [f"{self.function} on {self.target} with {self.features.used()}"]
        for name, decision in self.decisions:
            if not isinstance(decision, Accepted):
                lines.append(f"  {name}: rejected: {decision.reason}")
            elif name == self.implementation:
                lines.append(f"  {name}: serves it" + (f", kernel {self.kernel}" if self.kernel else ""))
            else:
                lines.append(f"  {name}: would serve it too")
        if self.implementation is None:
            lines.append("  nothing serves it")
        return "\n".join(lines)

    def record(self) -> dict[str, object]:
        """The same as plain data."""
        decisions = {
            name: "Accepted" if isinstance(decision, Accepted) else f"Rejected: {decision.reason}"
            for name, decision in self.decisions
        }
        return {
            "function": self.function,
            "target": str(self.target),
            "features": asdict(self.features),
            "implementation": self.implementation,
            "kernel": self.kernel,
            "decisions": decisions,
        }


def explain(function: str, *args: Any, device: torch.device | str | Target | None = None, **kwargs: Any) -> Explanation:
    """Which implementation and kernel serve a call of a public attention function, given its arguments.

    Tensors may be on the meta device: their numbers are not read. `device` is a device, a target ("cuda:sm_90a" asks
    about one that need not be present) or None: q's device, for meta tensors the detected one. Raises what the call
    itself would raise for its shapes, and ValueError for an unknown function or device.
    """
    call = _call_of(function, *args, **kwargs)
    if device is None:
        device = detect_device() if call.q.device.type == "meta" else call.q.device
    target = _target(device)
    features = features_of(call)
    choice = dispatch.choose(target, features, function, ask_all=True)
    kernel = None
    if choice.name is not None:
        find = getattr(dispatch.implementation(choice.name), "variant", None)
        kernel = None if find is None else str(find(target, features, call))
    return Explanation(function, target, features, choice.name, kernel, choice.decisions)


def explain_backward(
    function: str, *args: Any, device: torch.device | str | Target | None = None, **kwargs: Any
) -> Explanation:
    """The same of the backward pass of a call whose q, k, v and, where given, sinks require grad.

    Raises NotImplementedError, by name, for what no backward pass serves.
    """
    call = _call_of(function, *args, **kwargs)
    if device is None:
        device = detect_device() if call.q.device.type == "meta" else call.q.device
    target = _target(device)
    named = {name: getattr(call, field) for name, field in torch_operators.fields_of(function)}
    asking = {**named, "q": call.q.detach().requires_grad_()} if call.q.is_floating_point() else named
    with torch.enable_grad():
        gradients.refuse_unserved(function, asking)
    found = choice.choose(target, operator.backward_of(named), ask_all=True)
    return Explanation(f"the backward pass of {function}", target, features_of(call), found.name, None, found.decisions)


def _call_of(function: str, *args: Any, **kwargs: Any) -> Call:
    """The call with its defaults, checked but for the numbers in tensors."""
    if function not in _FUNCTIONS:
        raise ValueError(f"function is {function!r}; it must be one of {', '.join(_FUNCTIONS)}")
    bound = inspect.signature(_FUNCTIONS[function]).bind(*args, **kwargs)
    bound.apply_defaults()
    call = Call(*calls.of(function, bound.arguments))
    shapes.check(call)
    check_numbers(call)
    return call


def _target(device: torch.device | str | Target) -> Target:
    if isinstance(device, Target):
        return device
    text = str(device)
    if re.fullmatch(r"(cpu|cuda|musa)(:\d+)?", text):
        return device_target(text)
    try:
        return Target.parse(text)
    except ValueError as error:
        raise ValueError(f"device is {text!r}; it must be a device, as cuda:0, or a target: {error}") from error


def _tensor(text: str) -> Tensor:
    match = re.fullmatch(r"(\w+)\[(\d+(?:,\d+)*)\]", text.replace(" ", ""))
    if match is None or match[1] not in _DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} must be dtype[shape], dtype one of {', '.join(_DTYPES)}")
    return torch.empty([int(size) for size in match[2].split(",")], dtype=_DTYPES[match[1]], device="meta")


def _pair(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"\(?(-?\d+),\s*(-?\d+)\)?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} must be left,right")
    return int(match[1]), int(match[2])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jit_kernel why",
        description="Which implementation serves a call, and why the others do not.",
        epilog="`why --ranks N --help`: which form of context parallelism serves N ranks.",
    )
    parser.add_argument("--function", choices=_FUNCTIONS, help="the function; without it, the one that fits")
    parser.add_argument("--device", help="a device (cuda:0) or a target (cuda:sm_90a); without it, the detected device")
    parser.add_argument("--backward", action="store_true", help="explain the call's backward pass")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--module", help="explain the kernels that a module declares: stored, or why not")
    options: dict[str, str] = {}
    for function in _FUNCTIONS.values():
        for parameter in inspect.signature(function).parameters.values():
            options.setdefault(parameter.name, str(parameter.annotation))
    for name, annotation in options.items():
        flag = "--" + name.replace("_", "-")
        if annotation.startswith("Tensor"):
            parser.add_argument(flag, dest=name, type=_tensor, metavar="DTYPE[SHAPE]")
        elif annotation.startswith("bool"):
            parser.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, default=None)
        elif annotation.startswith("tuple"):
            parser.add_argument(flag, dest=name, type=_pair, metavar="LEFT,RIGHT")
        else:
            kind = float if annotation.startswith("float") else int
            parser.add_argument(flag, dest=name, type=kind, metavar=kind.__name__.upper())
    return parser


def _fitting(given: dict[str, Any]) -> str:
    """The function that takes all that was given: the cache's if there is one, the dense one where it suffices."""
    if "k_cache" in given:
        return "flash_attn_with_kvcache"
    dense = inspect.signature(_FUNCTIONS["flash_attn_func"]).parameters
    return "flash_attn_func" if all(name in dense for name in given) else "flash_attn_varlen_func"


def _explain_module(module: str, device: str | None, as_json: bool) -> int:
    """Say of every kernel that a module declares whether it is stored: 0 if all are."""
    try:
        target = _target(device if device is not None else detect_device())
        states = [(str(spec), build.why(spec, target)) for spec in declared.specs_of(module, target)]
    except (ValueError, NotImplementedError, CacheError) as error:
        print(f"python -m jit_kernel why: {error}", file=sys.stderr)
        return 2
    found = {name: f"stored in {place}" if place else f"missing: {reason}" for name, (place, reason) in states}
    lines = [f"{name} for {target}: {state}" for name, state in found.items()]
    print(json.dumps({"target": str(target), "kernels": found}, indent=1) if as_json else "\n".join(lines))
    return 0 if all(state.startswith("stored") for state in found.values()) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; answers with its exit status: 0 served, 1 not served, 2 a wrong argument."""
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word.partition("=")[0] == "--ranks" for word in words):
        return ranks.main(words)
    options = vars(_parser().parse_args(words))
    taken = ("function", "device", "json", "module", "backward")
    function, device, as_json, module, backward = (options.pop(name) for name in taken)
    if module is not None:
        return _explain_module(module, device, as_json)
    given = {name: value for name, value in options.items() if value is not None}
    function = function or _fitting(given)
    for keys, values in (("k_cache", "v_cache"), ("k", "v")):
        if keys in given:
            given.setdefault(values, given[keys])
    if function == "flash_attn_varlen_func":
        given = {"cu_seqlens_q": None, "cu_seqlens_k": None, **given}
    try:
        found = (explain_backward if backward else explain)(function, device=device, **given)
    except (TypeError, ValueError, NotImplementedError) as error:
        print(f"python -m jit_kernel why: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found.record(), indent=1) if as_json else found)
    return 0 if found.implementation else 1
