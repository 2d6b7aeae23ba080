"""The Hopper kernels of one GPU, loaded and ready to be launched."""

from __future__ import annotations

from typing import Any

from jit_kernel import jit
from jit_kernel.device import Target
from jit_kernel.fa3.hopper import known
from jit_kernel.jit import Cubin, KernelSpec

FOLDER = "flash_attention_v3/hopper"
# Host code, kept with the GPU target whose warm-up builds it.
LAUNCHER = KernelSpec(
    FOLDER, '#include "flash_attention_v3/hopper/launch/launcher.cpp"\n', "host", (("function", "launcher"),)
)
# As kernels and as the launcher's functions: prefill on cached keys, and in e4m3.
CACHED, FP8 = "forward_cached", "forward_fp8"
# The launcher's function for a cache in e4m3 that is made 16 bits first, and prefill behind it.
WIDENED = "forward_widened"


def _is_plain(spec: KernelSpec) -> bool:
    """Whether a variant itself says how it is launched; of the others the launcher has a table."""
    return "threads" in dict(spec.variant)


class DeviceKernels(jit.DeviceKernels):
    """The kernels of one GPU; `forward`, `forward_fp8`, `forward_cached`, `decode`, `mla`, `append` and `backward`
    launch them."""

    def __init__(self, index: int, target: Target) -> None:
        super().__init__(index, target, LAUNCHER)

    def _keep(self, functions: Any) -> None:
        self.forward = functions["forward"]  # type: ignore[method-assign]
        self.forward_fp8 = functions[FP8]  # type: ignore[method-assign]
        self.append = functions["append"]  # type: ignore[method-assign]
        self.decode = functions["decode"]  # type: ignore[method-assign]
        self.mla = functions["mla"]  # type: ignore[method-assign]
        self.forward_cached = functions[CACHED]  # type: ignore[method-assign]
        self.forward_widened = functions[WIDENED]  # type: ignore[method-assign]
        known.serve(functions["known_decode"])

    def forward(self, *arguments: object) -> bool:
        """What `forward` is until the launcher is loaded."""
        return bool(self._launcher()["forward"](*arguments))

    def forward_fp8(self, *arguments: object) -> bool:
        """As `forward`, in e4m3."""
        return bool(self._launcher()[FP8](*arguments))

    def forward_cached(self, *arguments: object) -> bool:
        """As `forward`, on cached keys."""
        return bool(self._launcher()[CACHED](*arguments))

    def forward_widened(self, *arguments: object) -> bool:
        """As `forward_cached`, of a cache in e4m3."""
        return bool(self._launcher()[WIDENED](*arguments))

    def append(self, *arguments: object) -> bool:
        """As `forward`."""
        return bool(self._launcher()["append"](*arguments))

    def decode(self, *arguments: object) -> int:
        """As `forward`, with an answer of three."""
        return int(self._launcher()["decode"](*arguments))

    def mla(self, *arguments: object) -> int:
        """As `decode`."""
        return int(self._launcher()["mla"](*arguments))

    def mla_partial_floats(self, handle: int, tiles: int, batch: int, sm_margin: int) -> int:
        """As `partial_floats`, of an MLA kernel; tiles: of query rows of one sequence, of all key heads."""
        return int(self._launcher()["mla_partial_floats"](handle, self._index, tiles, batch, sm_margin))

    def backward(self, *arguments: object) -> None:
        """The backward kernels of a variant, one after the other."""
        self._launcher()["backward"](*arguments)

    def backward_room(self, handle: int, length: int, batch: int, ragged: bool) -> tuple[int, int, int, int]:
        """For `length` rows of queries: their tiles, and of one tile the numbers that it needs, rows and parts."""
        launcher = self._launcher()
        tile_floats, rows, parts = (int(launcher["backward_tile"](handle, i)) for i in range(3))
        return int(launcher["backward_tiles"](handle, length, batch, ragged)), tile_floats, rows, parts

    def partial_floats(
        self, handle: int, heads_k: int, tiles: int, rows_k: int, sm_margin: int, fixed_ranges: bool
    ) -> int:
        """How many numbers a launch of a decode kernel needs for the partial results of cut sequences."""
        partial_floats = self._launcher()["partial_floats"]
        return int(partial_floats(handle, self._index, heads_k, tiles, rows_k, sm_margin, fixed_ranges))

    def _load_function(self, spec: KernelSpec) -> str:
        if _is_plain(spec):
            return "load_plain"
        function = dict(spec.variant)["function"]
        return f"load_{function}" if function in ("decode", "mla", "backward") else "load_kernel"

    def _load_arguments(self, spec: KernelSpec, cubin: Cubin) -> tuple[Any, ...]:
        fields = dict(spec.variant)
        if _is_plain(spec):
            return fields["function"], fields["threads"], fields["shared_bytes"]
        if fields["function"] == "decode":
            return fields["dtype"] == "bf16", "cache" in fields, fields["head_dim"], fields["rows"], self._index
        if fields["function"] == "backward":
            return (fields["head_dim"],)
        if fields["function"] == "mla":
            return "cache" in fields, fields["head_dim_v"], fields["rows"]
        cached, fp8 = fields["function"] == CACHED, fields["function"] == FP8
        head_dim_v = fields["head_dim" if fp8 else "head_dim_v"]
        return fields["head_dim"], head_dim_v, cached or fields["masked"], cached, fp8, fields.get("prepared", False)
