"""One GPU's launcher and the kernels that it launches: host code in one library, device code in cubins."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import torch

from jit_kernel.device import Target, is_capturing
from jit_kernel.engine import build as builds
from jit_kernel.engine import events, memory
from jit_kernel.engine.memory import Cubin
from jit_kernel.engine.spec import Event, KernelSpec


def launcher_of(kernel: str) -> KernelSpec:
    """The launcher that knows no kernel, as an entry of a kernel's folder: the GPU target's warm-up builds it there."""
    # -O1 takes 2.8 s of a slow processor where -O3 takes 3.7; a launch is as fast.
    unit, variant = '#include "jit_kernel/cuda/cubin_launcher.cpp"\n', (("function", "launcher"),)
    return KernelSpec(kernel, unit, "host", variant, ("-O1",))


LAUNCHER = launcher_of("launcher")


# The kernels of a GPU by its number and their folder.
_families: dict[tuple[int, str], DeviceKernels] = {}


class DeviceKernels:
    """The kernels of one GPU: compiled or loaded at first use, then a handle of the launcher's.

    folder: of the kernels, if it is not the launcher's own.
    compiles_under_capture: whether a kernel may be compiled while the current stream is captured into a graph.

    The launcher exports `prepare(device) -> multiprocessors`, `load_kernel(image, ...) -> handle` and what launches.
    """

    compiles_under_capture = False

    def __init__(self, index: int, target: Target, launcher: KernelSpec, folder: str = "") -> None:
        self.target = target
        self.handles: dict[tuple[Any, ...], int] = {}
        self._on_device: dict[KernelSpec, int] = {}
        _families[index, folder or launcher.kernel] = self
        self._index = index
        self._launcher_spec = launcher
        self._functions: Any = None
        self._multiprocessors = 0
        if not builds.is_stored(launcher, target):
            # Two seconds of g++ beside the first kernel's compilation: a call that needs the launcher waits for it.
            threading.Thread(target=self._build_launcher, name="jit_kernel-launcher", daemon=True).start()

    def _build_launcher(self) -> None:
        with contextlib.suppress(Exception):  # the call that needs the launcher asks again and gets the error
            memory.load(self._launcher_spec, self.target)

    def _launcher(self) -> Any:
        if self._functions is None:
            functions = memory.load(self._launcher_spec, self.target)
            self._multiprocessors = int(functions["prepare"](self._index))
            self._keep(functions)
            self._functions = functions
        return self._functions

    def _keep(self, functions: Any) -> None:
        """For a subclass: what it calls of the launcher's functions, which are there before the first handle is."""

    def _load_function(self, spec: KernelSpec) -> str:
        """Which of the launcher's functions takes a kernel."""
        return "load_kernel"

    def _load_arguments(self, spec: KernelSpec, cubin: Cubin) -> tuple[Any, ...]:
        """What that function takes behind the image: for the generic launcher, what Triton says of its cubin."""
        launch = cubin.metadata
        return launch["name"], launch["types"], launch["threads"], launch["shared"]

    @property
    def multiprocessors(self) -> int:
        """How many multiprocessors the device has."""
        self._launcher()
        return self._multiprocessors

    def load(self, key: tuple[Any, ...], spec: KernelSpec) -> int:
        """The handle of a variant, compiled if need be, under `key` from then on.

        Raises what `jit.load` raises, and RuntimeError when it would take a compiler while the current stream is
        being captured.
        """
        handle = self.handles[key] = self.put_on_device(spec)
        return handle

    def put_on_device(self, spec: KernelSpec) -> int:
        """The handle of a variant, whatever calls name it by. Raises what `load` raises."""
        if spec in self._on_device:
            return self._on_device[spec]
        if not self.compiles_under_capture:
            self._refuse_to_compile_under_capture(spec)
        cubin = memory.load_cubin(spec, self.target)
        handle = int(self._launcher()[self._load_function(spec)](cubin.image, *self._load_arguments(spec, cubin)))
        self._on_device[spec] = handle
        return handle

    def _warmed_by(self) -> str:
        """What compiles its kernels ahead, for a message."""
        return f"run `python -m jit_kernel.warmup --target {self.target}`"

    def _refuse_to_compile_under_capture(self, spec: KernelSpec) -> None:
        if not is_capturing(torch.device("cuda", self._index)):
            return
        missing = [str(each) for each in (self._launcher_spec, spec) if not builds.is_stored(each, self.target)]
        if missing:
            events.post(Event(spec, self.target, "refused", 0.0, "a graph is being captured"))
            raise RuntimeError(
                f"{' and '.join(missing)} would have to be compiled while a CUDA graph is being captured; "
                f"{self._warmed_by()} first, or make the call once before the capture"
            )


class EntryKernels(DeviceKernels):
    """The kernels of one GPU that say themselves what their parameters are: jit.cuda's and jit.triton's."""

    def __init__(self, index: int, target: Target) -> None:
        super().__init__(index, target, LAUNCHER)

    def _keep(self, functions: Any) -> None:
        self.launch_entry = functions["launch_entry"]

    def _warmed_by(self) -> str:
        return "have it compiled by jit_kernel.jit.warm"

    def _load_function(self, spec: KernelSpec) -> str:
        return "load_entry"

    def _load_arguments(self, spec: KernelSpec, cubin: Cubin) -> tuple[Any, ...]:
        made = cubin.metadata
        title = made.get("title", made["name"])
        sizes = ",".join(map(str, made.get("sizes", ())))
        return made["name"], made["types"], made["elements"], sizes, ",".join(made["arguments"]), title


_devices: dict[tuple[int, Target], EntryKernels] = {}


def kernels_of(index: int, target: Target) -> EntryKernels:
    """The kernels of a GPU for a target, the same at every call."""
    found = _devices.get((index, target))
    return found if found is not None else _devices.setdefault((index, target), EntryKernels(index, target))


def ready(index: int, target: Target, spec: KernelSpec) -> None:
    """Put a kernel on a GPU, so that its first launch loads nothing. Raises what `DeviceKernels.load` raises.

    Nothing is done for one of a family that does not serve this GPU here: no call will launch it.
    """
    family = _families.get((index, spec.kernel))
    if family is None and (spec.sources is not None or spec.entry):
        family = kernels_of(index, target)
    if family is not None:
        family.put_on_device(spec)
