"""A GPU kernel that Python launches: compiled or loaded at first use, then one call of tvm-ffi's a launch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from jit_kernel.device import Target, device_target
from jit_kernel.engine import build, cubin, memory
from jit_kernel.engine.spec import KernelSpec
from jit_kernel.toolkit.devices import Device, index_of, target_of
from jit_kernel.toolkit.shapes import Size, pack_grid, pack_shape

Launch = Callable[..., None]
_MOST_SHAPES = 1024  # of a kernel are kept, packed: a grid that follows the tokens of a batch has many


class Kernel:
    """A CUDA kernel: `kernel[grid, block, shared_bytes](arguments...)` launches it on the caller's current stream.

    grid, block: an int or up to three of them; shared_bytes: of dynamic shared memory, 0 if left out. The arguments
    go by position: a tensor on CUDA or None for a pointer, else an int, a float or a bool, as the entry's own
    parameters say. The stream is the current one of the first tensor's device. Nothing is compiled before the first
    launch; a launch raises TypeError for an argument, by position and name, ValueError for a shape, and RuntimeError
    where a compiler would have to run while the stream is captured into a graph.
    """

    def __init__(
        self, spec: KernelSpec, device: Device, cluster: Size = 1, cooperative: bool = False, programmatic: bool = False
    ) -> None:
        self.spec = spec
        self._target = target_of(device, "cuda")
        self._index = index_of(device)
        self._ways = cluster, cooperative, programmatic
        self._shapes: dict[Any, Launch] = {}
        self._loaded: tuple[int, Launch, dict[str, Any]] | None = None

    @property
    def target(self) -> Target:
        """What it is compiled for. Raises NotImplementedError where no device was named and none is present."""
        return self._target or device_target(torch.device("cuda", self._present()))

    def serves(self, target: Target) -> bool:
        """Whether it can be compiled for a target."""
        return target.vendor == "cuda" and self._target in (None, target)

    def __getitem__(self, shape: Any) -> Launch:
        try:
            return self._shapes[shape]
        except KeyError:
            return self._keep(shape)

    def _keep(self, shape: Any) -> Launch:
        if not isinstance(shape, tuple) or len(shape) not in (2, 3):
            raise TypeError(f"{self.spec}: [{shape!r}] is no shape; it must be [grid, block] or [grid, block, bytes]")
        return self._kept(shape, self.launch(*shape))

    def _kept(self, shape: Any, launch: Launch) -> Launch:
        if len(self._shapes) >= _MOST_SHAPES:
            self._shapes.clear()
        self._shapes[shape] = launch
        return launch

    def launch(
        self,
        grid: Size,
        block: Size,
        shared_bytes: int = 0,
        *,
        cluster: Size | None = None,
        cooperative: bool | None = None,
        programmatic: bool | None = None,
    ) -> Launch:
        """What `kernel[grid, block, shared_bytes]` is, with other ways to launch than the kernel's own.

        cluster: blocks of a cluster; cooperative: all blocks run at once, for a barrier over the grid; programmatic:
        the blocks may start before the stream's kernel before has ended, and wait by griddepcontrol.wait.
        """
        blocks, together, early = self._ways
        packed = pack_shape(
            block,
            shared_bytes,
            blocks if cluster is None else cluster,
            together if cooperative is None else cooperative,
            early if programmatic is None else programmatic,
        )
        grid_packed = pack_grid(grid)
        handle, function, _ = self._load()
        return partial(function, handle, grid_packed, packed)

    def _present(self) -> int:
        if self._index is not None:
            return self._index
        return torch.cuda.current_device() if torch.cuda.is_available() else 0

    def _load(self) -> tuple[int, Launch, dict[str, Any]]:
        """The handle, what launches it, and the compiler's launch metadata."""
        if self._loaded is None:
            kernels = cubin.kernels_of(self._present(), self.target)
            handle = kernels.handles.get((self.spec,))
            handle = kernels.load((self.spec,), self.spec) if handle is None else handle
            self._loaded = handle, kernels.launch_entry, memory.load_cubin(self.spec, kernels.target).metadata
        return self._loaded

    def jobs(self, target: Target) -> list[KernelSpec]:
        """What has to be in the store for `target`: the kernel and its launcher."""
        return [cubin.LAUNCHER, self.spec]

    def is_stored(self) -> bool:
        """Whether the first launch compiles nothing."""
        return all(build.is_stored(spec, self.target) for spec in self.jobs(self.target))

    def __repr__(self) -> str:
        return f"<{self.spec} for {self._target or 'the present GPU'}>"


class TritonKernel(Kernel):
    """The same of a Triton kernel: `kernel[grid](arguments...)`; its constants are compiled in."""

    def _keep(self, shape: Any) -> Launch:
        return self._kept(shape, self.launch(shape))

    def launch(self, grid: Size) -> Launch:  # type: ignore[override]
        """What `kernel[grid]` is. The threads and the shared memory are Triton's choice."""
        grid_packed = pack_grid(grid)
        handle, function, made = self._load()
        return partial(function, handle, grid_packed, pack_shape(made["threads"], made["shared"], *self._ways))
