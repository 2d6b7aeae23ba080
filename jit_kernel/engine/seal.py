"""No compilation from here on: a server that has warmed up says so, and learns of a kernel that it forgot by an error.

A sealed process starts no compiler, not even for its version, so what another compiler made serves it too.
"""

from __future__ import annotations

import shlex
import sys

from jit_kernel import config
from jit_kernel.device import Target
from jit_kernel.engine import events
from jit_kernel.engine.installed import CompilerError
from jit_kernel.engine.spec import Event, KernelSpec

_sealed = False


class SealedError(CompilerError):
    """A kernel would have to be compiled in a sealed process; the message names call, variant and warm-up command."""


def seal() -> None:
    """Make every later compilation of this process, and of children that it forks, a SealedError."""
    global _sealed
    _sealed = True


def is_sealed() -> bool:
    """Whether seal() was called, or JIT_KERNEL_SEALED is set."""
    return _sealed or config.settings().sealed


def refusal(spec: KernelSpec, target: Target, key: str, reason: str, seconds: float) -> SealedError:
    """The error for a kernel that is not stored; it is an event, too."""
    events.post(Event(spec, target, "refused", seconds, f"sealed: {reason}", key=key))
    command = warmup_command(spec, target)
    where = ", where MODULE declares it (jit_kernel.jit.declare)" if " MODULE " in command else ""
    return SealedError(
        f"{_call()} needs {spec} for {target}, which is not compiled ({reason}), and this process is sealed; warm it "
        f"up with: {command}{where}"
    )


def warmup_command(spec: KernelSpec, target: Target) -> str:
    """The command that compiles a variant ahead, and perhaps others that have fields of the same values.

    Of a kernel that no warm-up of attention lists it names the module that declares it: MODULE for somebody else's.
    """
    if spec.sources is not None:
        module = " --module MODULE"
    else:
        module = " --module jit_kernel.ops" if spec.kernel.startswith("ops/") else ""
    fields = " ".join(shlex.quote(f"{name}={value}") for name, value in spec.variant)
    return f"python -m jit_kernel.warmup{module} --target {target}" + (f" --select {fields}" if fields else "")


def _call() -> str:
    """The outermost function of ours that is running, and the line that called it."""
    frame, ours = sys._getframe(1), None
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name == "jit_kernel" or name.startswith("jit_kernel."):
            ours = frame
        frame = frame.f_back  # type: ignore[assignment]
    if ours is None or ours.f_back is None:
        return "a call"
    return f"{ours.f_code.co_name}, called at {ours.f_back.f_code.co_filename}:{ours.f_back.f_lineno},"
