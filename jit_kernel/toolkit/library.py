"""Libraries of host code: C++ functions over tvm-ffi's tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jit_kernel.device import Target, cpu_target
from jit_kernel.engine import build, memory
from jit_kernel.engine.sources import Sources
from jit_kernel.engine.spec import KernelSpec, Scalar
from jit_kernel.toolkit.cuda import spec_of
from jit_kernel.toolkit.devices import Device, target_of

# Masked scores are -inf, so never -ffast-math. A library's threads outlive a dropped module: nodelete.
_FLAGS = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-pthread", "-Wl,-z,nodelete")
_HEADERS = "#include <tvm/ffi/container/tensor.h>\n#include <tvm/ffi/function.h>\n"
_NAME = re.compile(r"[A-Za-z_]\w*")


class Library:
    """A shared library for the host: each of its exports is an attribute, compiled or loaded when first asked for.

    The functions take what their C++ parameters say, by position: tensors (`tvm::ffi::TensorView`), ints, floats,
    bools; TypeError names a wrong one by its position.
    """

    def __init__(self, spec: KernelSpec, exports: tuple[str, ...], device: Device) -> None:
        self.spec = spec
        self._exports = exports
        self._target = target_of(device, "cpu")

    @property
    def target(self) -> Target:
        """What it is compiled for."""
        return self._target or cpu_target()

    def serves(self, target: Target) -> bool:
        """Whether it can be compiled for a target."""
        return target.vendor == "cpu" and self._target in (None, target)

    def load(self) -> Any:
        """The library as a tvm_ffi.Module: compiled where the store does not have it."""
        return memory.load(self.spec, self.target)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_") or name not in self._exports:
            raise AttributeError(f"{self.spec} exports {', '.join(self._exports)}, and no {name}")
        function: Callable[..., Any] = self.load()[name]
        setattr(self, name, function)
        return function

    def jobs(self, target: Target) -> list[KernelSpec]:
        """What has to be in the store for `target`."""
        return [self.spec]

    def is_stored(self) -> bool:
        """Whether the first call compiles nothing."""
        return build.is_stored(self.spec, self.target)

    def __repr__(self) -> str:
        return f"<{self.spec} for {self.target}>"


def library(
    sources: Sources | None,
    file: str,
    *,
    exports: Sequence[str] | Mapping[str, str],
    device: Device = None,
    flags: Sequence[str] = _FLAGS,
    variant: Mapping[str, Scalar] | None = None,
) -> Library:
    """Functions of a C++ header as a library, compiled by g++ or clang++ for this machine's processor.

    sources: where the file lies; None for jit_kernel's own. exports: the functions; a mapping gives them other names:
    {"scale_bf16": "scale<jit_kernel::bf16>"}. One that ends in ")" is a macro of the file that exports functions
    itself. device: "cpu:native" or another target of a CPU; None for this machine's. flags: for the compiler, beside
    -O3 and the target's. variant: what lists and explanations call it; without one, the exports.
    """
    if isinstance(exports, str):
        raise TypeError(f"exports is {exports!r}; it must be a list of functions")
    named = dict(exports) if isinstance(exports, Mapping) else {each: each for each in exports}
    lines, names = [], []
    for name, function in named.items():
        if name.endswith(")"):
            lines.append(name)
            continue
        if not _NAME.fullmatch(name):
            raise ValueError(f"exports has {name!r}; it must be a function's name: give one to a template's instance")
        # By way of a pointer: the commas of template arguments would part a macro's.
        lines.append(f"static constexpr auto* jit_kernel_{name} = &{function};")
        lines.append(f"TVM_FFI_DLL_EXPORT_TYPED_FUNC({name}, jit_kernel_{name});")
        names.append(name)
    if not lines:
        raise ValueError("exports is empty; it must name at least one function")
    unit = "\n".join([f'{_HEADERS if names else ""}#include "{file}"', *lines, ""])
    spec = spec_of(sources, file, unit, "host", variant or {"exports": " ".join(named)}, flags)
    return Library(spec, tuple(names), device)
