"""What a call did, and whether it may: `judge(drawn)` makes the call and gives a Verdict.

A call is answered rightly, or refused by an error that names an argument with nothing written. Everything else is a
fault: "unnamed" (an error that does not help), "refused" (a call that must be served), "written" (memory that changed
before an error, or outside of what a call may write), "wrong" (an answer that is not what the arguments mean), "left"
(a state of torch's that the call changed for what comes after it).
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import jit_kernel
from jit_kernel import flash_attention_v3
from tests.fuzz import answers, kinds
from tests.fuzz.drawing import Drawn
from tests.fuzz.kinds import CANNOT, MODES, TRANSFORMS, Made, Surroundings
from tests.fuzz.reading import MeaninglessError, UnjudgedError, overlaps_itself

CUDA_ERROR = 71  # status of a process that a CUDA error ends
ANSWERED, REFUSED = "answered", "refused by name"
FAULTS = ("crash", "hang", "unnamed", "refused", "written", "wrong", "left")


@dataclass(frozen=True)
class Verdict:
    what: str  # ANSWERED, REFUSED or one of FAULTS
    text: str = ""
    judged: bool = True  # False: answered, and the contract leaves open with what


GRADIENTS = ("requires grad", "inner of a graph", "parameter of a model", "of grad")
DERIVATIVES = (*GRADIENTS, "of jvp", "dual")


class FaultError(Exception):
    """A fault of the call under test."""

    def __init__(self, what: str, text: str) -> None:
        super().__init__(text)
        self.what = what


# What torch or a library beneath us says of itself, which tells a user nothing about the call.
FOREIGN = re.compile(
    r"INTERNAL ASSERT|please (file|report)|report a bug|\.tolist\(\) is not|CapturedTrace|Exception raised from|c10::"
    r"|\bat::|aten::|argument \d+ is not|vtable|\.cpp:\d+|object has no attribute|missing \d+ required|Backtrace"
    r"|Boolean value of Tensor|Cannot access data pointer|storage of size 0|doesn't have storage"
)
RULED_OUT = re.compile(r"can't allocate memory|not enough memory|bad_alloc|allocat")


@contextmanager
def surroundings(name: str) -> Iterator[None]:
    """Modes of torch that a caller may have set."""
    with ExitStack() as stack:
        if name == "no grad":
            stack.enter_context(torch.no_grad())
        elif name == "inference":
            stack.enter_context(torch.inference_mode())
        elif name == "meta device":
            stack.enter_context(torch.device("meta"))
        elif name == "float64 default":
            torch.set_default_dtype(torch.float64)
            stack.callback(torch.set_default_dtype, torch.float32)
        elif name == "autocast":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        elif name == "function mode":
            stack.enter_context(torch.overrides.BaseTorchFunctionMode())
        elif name == "dispatch mode":
            stack.enter_context(_Passing())
        elif name == "deterministic":
            torch.use_deterministic_algorithms(True)
            stack.callback(torch.use_deterministic_algorithms, False)
        yield


class _Passing(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return function(*args, **(kwargs or {}))


def _has_memory(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout is torch.strided and x.device.type != "meta" and not x.is_quantized


class Snapshot:
    """All memory behind some tensors, as it was."""

    def __init__(self, tensors: list[Any]) -> None:
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.add(tensors)

    def add(self, tensors: list[Any]) -> None:
        for x in tensors:
            if _has_memory(x):
                storage = x.untyped_storage()
                if storage.data_ptr() not in self.before and storage.nbytes():
                    memory = torch.empty(0, dtype=torch.uint8, device=x.device).set_(storage)
                    self.before[storage.data_ptr()] = memory, memory.to("cpu", copy=True)

    def copy_of(self, x: Any) -> Any:
        """A tensor as it was, on the CPU in memory of its own; other values as they are."""
        if not _has_memory(x):
            return x
        kept = self.before.get(x.untyped_storage().data_ptr())
        if kept is None:
            return x.cpu()
        empty = torch.empty(0, dtype=x.dtype, device="cpu")  # whatever the default device is
        return empty.set_(kept[1].untyped_storage(), x.storage_offset(), x.shape, x.stride())

    def forget(self, tensors: tuple[Tensor, ...]) -> None:
        for x in tensors:
            self.before.pop(x.untyped_storage().data_ptr(), None)

    def changed(self) -> bool:
        return any(not torch.equal(now.cpu(), before) for now, before in self.before.values())


def judge(drawn: Drawn) -> Verdict:
    """Make one call and say what it did. A crash or a hang is seen from outside alone."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _judge(drawn)
    except FaultError as fault:
        return Verdict(fault.what, str(fault))


def _judge(drawn: Drawn) -> Verdict:
    function = getattr(jit_kernel, drawn.function)
    with ExitStack() as stack:
        around = Surroundings(stack)
        if drawn.warm:
            _warm(function, drawn)
        snapshot = Snapshot(list(drawn.arguments.values()))
        made = _make_kinds(drawn, around)
        given = {name: made[name].given if name in made else value for name, value in drawn.arguments.items()}
        plain = {name: made[name].means if name in made else value for name, value in drawn.arguments.items()}
        with kinds.outside():
            snapshot.add([*plain.values(), *(x for each in made.values() for x in (*each.memory, *each.kept))])
            before = {name: snapshot.copy_of(value) for name, value in plain.items()}
        torch.set_num_threads(drawn.threads)
        error: Exception | None = None
        state = kinds.state_of_torch()
        try:
            with surroundings(drawn.surroundings):
                result = _WAYS[drawn.way](function, given)
                if drawn.device != "cpu":
                    torch.cuda.synchronize()
        except Exception as raised:
            error = raised
            if "CUDA error" in str(raised):  # the device answers nothing any more
                print(raised, file=sys.stderr, flush=True)
                os._exit(CUDA_ERROR)
        finally:
            torch.set_num_threads(1)
        left = [what for what, now in kinds.state_of_torch().items() if now != state[what]]
        if left:
            raise FaultError("left", f"changed for what comes after it: {', '.join(left)}; {error!r:.200}")
        if error is None:
            found = _read(result, drawn, made, given)
    if error is not None:
        return _of_error(error, drawn, made, snapshot)
    return _of_answer(found, drawn, made, given, before, snapshot)


def _on_device(copy: Any, x: Any) -> Any:
    return copy.to(x.device) if isinstance(copy, Tensor) else copy


def _traced(trace: Callable[..., Any]) -> Callable[[Any, dict[str, Any]], Any]:
    """A call that is traced with other numbers in its tensors, and what was traced run with the given ones."""

    def run(function: Any, given: dict[str, Any]) -> Any:
        names = [name for name, value in given.items() if isinstance(value, Tensor)]
        copies = Snapshot([given[name] for name in names])
        others = [_on_device(copies.copy_of(given[name]), given[name]) for name in names]
        for x in others:
            if x.is_floating_point() and x.element_size() > 1 and not overlaps_itself(x):
                x.mul_(0.5)

        def of_tensors(*tensors: Tensor) -> Any:
            return function(**given | dict(zip(names, tensors, strict=True)))

        return trace(of_tensors, others)(*(given[name] for name in names))

    return run


_WAYS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "call": lambda function, given: function(**given),
    "make_fx": _traced(lambda f, others: make_fx(f)(*others)),
    "jit trace": _traced(lambda f, others: torch.jit.trace(f, tuple(others), check_trace=False, strict=False)),
}


def _warm(function: Any, drawn: Drawn) -> None:
    """A plain call of the same shapes, on copies."""
    copies = Snapshot(list(drawn.plain.values()))
    with torch.no_grad():
        function(**{name: _on_device(copies.copy_of(value), value) for name, value in drawn.plain.items()})


def _order(named: tuple[str, kinds.Kind]) -> int:
    return next((place for place, names in ((1, TRANSFORMS), (2, MODES)) if named[1].name in names), 0)


def _make_kinds(drawn: Drawn, around: Surroundings) -> dict[str, Made]:
    made = {}
    for name, kind in sorted(drawn.kinds, key=_order):
        value = drawn.arguments[name]
        if type(value) is not Tensor or value.numel() > 2**20:
            continue
        try:
            made[name] = kind.make(around, value)
        except (*CANNOT, RecursionError, UserWarning):
            continue  # torch has no such tensor
    return made


def _must(drawn: Drawn, made: dict[str, Made]) -> str:
    """What the kinds and the surroundings leave open for a call."""
    musts = {_must_as(name, kind, drawn) for name, kind in drawn.kinds if name in made}
    if "refuse" in musts:
        return "refuse"
    return "serve" if drawn.must_serve and musts <= {"serve"} else "either"


def _must_as(name: str, kind: kinds.Kind, drawn: Drawn) -> str:
    """What an argument's kind leaves open. Most calls have gradients: `_read` looks for them."""
    nobody_asks = drawn.surroundings in ("no grad", "inference")
    may_have = (
        kind.name in GRADIENTS and name in ("q", "k", "v", "sinks") and drawn.function != "flash_attn_with_kvcache"
    )
    return "either" if may_have or (nobody_asks and kind.name in DERIVATIVES) else kind.must


def _of_error(error: Exception, drawn: Drawn, made: dict[str, Made], snapshot: Snapshot) -> Verdict:
    text = f"{type(error).__name__}: {error}"
    if snapshot.changed():
        raise FaultError("written", f"memory changed before {text:.300}")
    parameters = inspect.signature(getattr(flash_attention_v3, drawn.function)).parameters
    kind = type(error)
    ours = kind in (TypeError, ValueError, NotImplementedError) or kind.__module__.startswith("jit_kernel")
    named = re.search(rf"(?<![\w.'])({'|'.join(parameters)}|head sizes?)(?!\w)", str(error))
    if not ours and RULED_OUT.search(str(error)) and _is_large(drawn):
        return Verdict(REFUSED, text)
    if not ours or not named or FOREIGN.search(str(error)):
        raise FaultError("unnamed", text)
    declined = drawn.device != "cpu" and isinstance(error, NotImplementedError)
    if _must(drawn, made) == "serve" and not declined:
        raise FaultError("refused", text)
    return Verdict(REFUSED, text)


def _is_large(drawn: Drawn) -> bool:
    """Whether the result of a call with sizes that exist may not fit into memory."""
    tensors = [x for x in drawn.arguments.values() if isinstance(x, Tensor)]
    return any(x.numel() > 2**28 for x in tensors) and all(size < 2**31 for x in tensors for size in x.shape)


def _read(result: Any, drawn: Drawn, made: dict[str, Made], given: dict[str, Any]) -> tuple[Any, ...]:
    """The values of a result, and of what it may have written, while the surroundings are still open."""
    parts = result if isinstance(result, tuple) else (result,)
    if not all(isinstance(x, Tensor) for x in parts):
        raise FaultError("wrong", f"the result is {result!r:.200}")
    asks = [name for name, kind in drawn.kinds if name in made and kind.name in ("dual", "of jvp")]
    if asks and drawn.surroundings not in ("no grad", "inference"):
        for x in parts:
            if x.is_floating_point() and fwAD._current_level >= 0 and fwAD.unpack_dual(x).tangent is None:
                raise FaultError("wrong", f"the tangent of {asks[0]} was dropped in silence")
    asks = [name for name, kind in drawn.kinds if name in made and kind.name in GRADIENTS]
    if asks and drawn.surroundings not in ("no grad", "inference") and not parts[0].requires_grad:
        raise FaultError("wrong", f"the gradient of {asks[0]} was dropped in silence")
    if _must(drawn, made) == "refuse":
        which = [f"{name} as {kind.name}" for name, kind in drawn.kinds if name in made and kind.must == "refuse"]
        raise FaultError("wrong", f"answered a call that must be refused: {', '.join(which)}")
    try:
        with kinds.outside():
            return isinstance(result, tuple), *_read_outside(parts, made, given)
    except (*CANNOT, RecursionError) as error:
        raise FaultError("wrong", f"a result that cannot be read: {type(error).__name__}: {error}") from error


def _read_outside(parts: tuple[Tensor, ...], made: dict[str, Made], given: dict[str, Any]) -> tuple[Any, ...]:
    read = [None if (value := kinds.values(x)) is None else value.cpu() for x in parts]
    written = {}
    for name in ("out", "k_cache", "v_cache"):
        if isinstance(given.get(name), Tensor):
            value = kinds.values(given[name]) if name in made else given[name]
            written[name] = None if value is None else value.cpu()
    shapes = [(tuple(x.shape), x.dtype) for x in parts]
    return read, shapes, written, [_is_out(x, given.get("out")) for x in parts]


def _is_out(x: Tensor, out: Any) -> bool:
    """Whether a result is the given out; what a tracer returns is another object over the same memory."""
    plain = isinstance(out, Tensor) and out.layout is torch.strided and type(x) is type(out) is Tensor
    return x is out or (plain and x.data_ptr() == out.data_ptr() and x.stride() == out.stride())


def _of_answer(
    found: tuple[Any, ...], drawn: Drawn, made: dict[str, Made], given: dict[str, Any], before: dict[str, Any],
    snapshot: Snapshot,
) -> Verdict:  # fmt: skip
    try:
        if any(each.means is None for each in made.values()):
            if any(value is not None for value in found[1]):
                raise FaultError("wrong", "an answer with values to a call without")
            return Verdict(ANSWERED, "shapes alone", judged=False)
        answers.check(drawn.function, before, found, snapshot, made)
    except MeaninglessError as why:
        raise FaultError("wrong", f"answered a call without meaning: {why}") from why
    except UnjudgedError as why:
        return Verdict(ANSWERED, str(why), judged=False)
    except AssertionError as wrong:
        raise FaultError("wrong", str(wrong)) from wrong
    return Verdict(ANSWERED)
