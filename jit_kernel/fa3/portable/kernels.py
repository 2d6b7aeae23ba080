"""The portable kernels as things to compile, to load and to launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from jit_kernel import jit
from jit_kernel.device import Target
from jit_kernel.engine import triton_compiler
from jit_kernel.fa3.decision import Rejected, refusal
from jit_kernel.fa3.portable import tiles as portable_tiles
from jit_kernel.fa3.portable.tiles import padded
from jit_kernel.jit import KernelSpec

Scalar = str | int | bool

FOLDER = "flash_attention_v3/portable"
LAUNCHER = jit.LAUNCHER
DTYPES = ("bf16", "fp16", "e4m3")
# What warm-up compiles; any other pair up to 512 compiles at its first call.
WARM_HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))

MAX_HEAD_DIM = 512
_LEAST_NATIVE = 89  # the compute capability from which the matrix unit multiplies e4m3
_PIECE = 16  # bytes of a load
_BYTES = {"bf16": 2, "fp16": 2, "e4m3": 1}

APPEND_ROWS = 16
COMBINE_SPLITS = (2, 8, 32)  # partials in flight at once: a row's loads then wait for memory once, not eight times


def unserved(dtype: str, head_dim: int, head_dim_v: int) -> str | None:
    """Why no kernel here serves a dtype and head sizes; None when one does."""
    if dtype not in DTYPES:
        return f"dtype {dtype}: it serves bf16, fp16 and e4m3"
    if max(head_dim, head_dim_v) > MAX_HEAD_DIM:
        return f"head sizes {head_dim}/{head_dim_v}: it serves head sizes up to {MAX_HEAD_DIM}"
    return None


def combine_rows(head_dim_v: int, splits: int) -> int:
    """Rows of a combine tile: `splits` of them take 32 registers (8) or 64 (2) of each of 128 threads.

    Many splits have few rows, which so meet as many multiprocessors as there are: a row of 128 takes 32 registers (32).
    """
    return max(1, {2: 4096, 8: 512, 32: 128}[splits] // padded(head_dim_v))


def result_of(dtype: str) -> str:
    """The dtype of the result of queries of `dtype`."""
    return "bf16" if dtype == "e4m3" else dtype


def unit(dtype: str, aligned: bool) -> int:
    """How many elements a stride counts in: 16 bytes where every row is aligned to them."""
    return _PIECE // _BYTES[dtype] if aligned else 1


def is_native(architecture: str) -> bool:
    """Whether a device has e4m3 as a type."""
    return triton_compiler.capability(architecture) >= _LEAST_NATIVE


def forward_spec(
    architecture: str,
    dtype: str,
    head_dim: int,
    head_dim_v: int,
    kind: str,
    paged: bool,
    local: bool,
    softcap: bool,
    aligned: bool,
    draft: bool = False,
    kv_dtype: str | None = None,
    qv: int = 0,
    token_scales: bool = False,
    whole: bool = False,
) -> KernelSpec:
    """The attention kernel of one variant; `kind` names its tile, `qv` is 1 with qv and 2 with it alone.

    whole: pages hold a whole number of tiles, and there is no left padding.
    """
    kv_dtype, native = kv_dtype or dtype, is_native(architecture)
    tile = portable_tiles.tile(architecture, head_dim, head_dim_v, kind, qv, kv_dtype)
    constants = {
        **forward_constants(dtype, kv_dtype, head_dim, head_dim_v, aligned),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "PAGED": paged + whole,
        "LEAD": tile.lead,
        "LOCAL": local,
        "SOFTCAP": softcap,
        "DRAFT": draft,
        "QV": qv,
        "TOKEN_SCALES": token_scales,
        "NATIVE": native,
        "STAGED": native and not portable_tiles.has_tensor_memory(architecture),
        "INTERPRETED": False,
    }
    variant: dict[str, Scalar] = {
        "function": "forward",
        "dtype": dtype,
        "kv_dtype": kv_dtype,
        "head_dim": head_dim,
        "head_dim_v": head_dim_v,
        "tile": kind,
        "paged": paged,
        "local": local,
        "softcap": softcap,
        "aligned": aligned,
        "draft": draft,
        "qv": qv,
        "token_scales": token_scales,
        "whole": whole,
    }
    e4m3 = "fp8e4nv" if native else "u8"
    types = {name: e4m3 if each == "e4m3" else each for name, each in (("query", dtype), ("cache", kv_dtype))}
    return _spec("forward", variant, types | {"element": result_of(dtype)}, constants, tile.num_warps, tile.num_stages)


def forward_constants(dtype: str, kv_dtype: str, head_dim: int, head_dim_v: int, aligned: bool) -> dict[str, int]:
    """The constants of an attention kernel that its dtypes and sizes settle."""
    least = 32 if dtype == "e4m3" else 16  # of the matrix unit, along a sum
    return {
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "HEAD_DIM_PADDED": max(least, padded(head_dim)),
        "HEAD_DIM_V_PADDED": padded(head_dim_v),
        "QUERY_E4M3": dtype == "e4m3",
        "CACHE_E4M3": kv_dtype == "e4m3",
        "STRIDE_UNIT": unit(result_of(dtype), aligned),
        "QUERY_UNIT": unit(dtype, aligned),
        "CACHE_UNIT": unit(kv_dtype, aligned),
    }


def combine_spec(
    partial: str, dtype: str, head_dim_v: int, aligned: bool, splits: int, sinks: str | None = None
) -> KernelSpec:
    """The kernel that joins partial results of dtype `partial` into rows of `dtype`, `splits` of them at once.

    sinks: the dtype of queries and of sinks that are not float32, where it is not that of the result.
    """
    constants = {
        "HEAD_DIM_V": head_dim_v,
        "HEAD_DIM_V_PADDED": padded(head_dim_v),
        "BLOCK_M": combine_rows(head_dim_v, splits),
        "BLOCK_SPLITS": splits,
        "STRIDE_UNIT": 8 if aligned else 1,
    }
    variant: dict[str, Scalar] = {
        "function": "combine",
        "partial": partial,
        "dtype": dtype,
        "head_dim_v": head_dim_v,
        "aligned": aligned,
        "splits": splits,
        "sinks": sinks or dtype,
    }
    types = {"element": dtype, "partial": partial, "sinks": _as_bytes(sinks or dtype)}
    return _spec("combine", variant, types, constants, 4, 1)


def append_spec(
    dtype: str, head_dim: int, head_dim_v: int, aligned: bool, kv_dtype: str | None = None, new: str | None = None
) -> KernelSpec:
    """The kernel that puts new keys and values of dtype `new` into the cache and rotates queries."""
    kv_dtype, new = kv_dtype or dtype, new or dtype
    constants = append_constants(dtype, head_dim, head_dim_v, aligned, kv_dtype, new)
    variant: dict[str, Scalar] = {
        "function": "append",
        "dtype": dtype,
        "kv_dtype": kv_dtype,
        "new": new,
        "head_dim": head_dim,
        "head_dim_v": head_dim_v,
        "aligned": aligned,
    }
    types = {name: _as_bytes(each) for name, each in (("query", dtype), ("cache", kv_dtype), ("new", new))}
    return _spec("append", variant, types, constants, 4, 1)


def append_constants(
    dtype: str, head_dim: int, head_dim_v: int, aligned: bool, kv_dtype: str, new: str
) -> dict[str, int]:
    """All constants of an append kernel."""
    return {
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "HEAD_DIM_PADDED": padded(head_dim),
        "HEAD_DIM_V_PADDED": padded(head_dim_v),
        "BLOCK_M": APPEND_ROWS,
        "QUANTISE": kv_dtype != new,
        "QUERY_UNIT": unit(dtype, aligned),
        "NEW_UNIT": unit(new, aligned),
        "CACHE_UNIT": unit(kv_dtype, aligned),
    }


def _as_bytes(dtype: str) -> str:
    return "u8" if dtype == "e4m3" else dtype


_MAKERS: dict[str, Callable[..., KernelSpec]] = {
    "forward": forward_spec,
    "combine": combine_spec,
    "append": append_spec,
}


def _spec(
    function: str,
    variant: dict[str, Scalar],
    types: dict[str, str],
    constants: dict[str, int],
    num_warps: int,
    num_stages: int,
) -> KernelSpec:
    aligned = constants.get("STRIDE_UNIT", constants.get("CACHE_UNIT", 1)) > 1
    return jit.triton(
        f"{FOLDER}/{function}.py:{function}",
        signature=None,
        types=types,
        constants=constants,
        aligned=None if aligned else (),
        num_warps=num_warps,
        num_stages=num_stages,
        variant=variant,
    ).spec


def all_specs(target: Target) -> Iterator[KernelSpec]:
    """What warm-up compiles for a GPU: the launcher, and each kernel of the usual head sizes on aligned rows."""
    yield LAUNCHER
    for dtype in ("bf16", "fp16"):
        for head_dim, head_dim_v in WARM_HEAD_DIMS:
            for kind in ("prefill", *portable_tiles.ROWS):
                for bits in range(8):
                    flags = (bool(bits & 1), bool(bits & 2), bool(bits & 4))
                    yield forward_spec(target.architecture, dtype, head_dim, head_dim_v, kind, *flags, True)
            # Trees of draft tokens over pages: 20 beside 240. Dense caches and softcap compile at the first call.
            for kind in ("decode", "draft"):
                yield forward_spec(
                    target.architecture, dtype, head_dim, head_dim_v, kind, True, True, False, True, True
                )
            yield append_spec(dtype, head_dim, head_dim_v, True)
        for head_dim_v in sorted({pair[1] for pair in WARM_HEAD_DIMS}):
            for splits in COMBINE_SPLITS:
                yield combine_spec("fp32", dtype, head_dim_v, True, splits)
            yield combine_spec(dtype, dtype, head_dim_v, True, COMBINE_SPLITS[0])  # merge_state's
    yield from _serving_specs(target.architecture)


def _serving_specs(architecture: str) -> Iterator[KernelSpec]:
    """Absorbed MLA in bf16 over pages, e4m3 of head size 128, and a cache of it beside bf16; without a window."""
    plain, paged = (False, False, False, True), (True, False, False, True)
    for kind in ("prefill", *portable_tiles.ROWS):
        yield forward_spec(architecture, "bf16", 64, 512, kind, *paged, qv=1, whole=True)
        for dtype in ("e4m3", "bf16"):
            yield forward_spec(architecture, dtype, 128, 128, kind, *paged, kv_dtype="e4m3")
    yield forward_spec(architecture, "e4m3", 128, 128, "prefill", *plain)
    for splits in COMBINE_SPLITS:
        yield combine_spec("fp32", "bf16", 512, True, splits)
        yield combine_spec("fp32", "bf16", 128, True, splits, "e4m3")
    yield append_spec("bf16", 64, 512, True)
    yield append_spec("bf16", 128, 128, True, "e4m3", "bf16")


class DeviceKernels(jit.DeviceKernels):
    """The kernels of one GPU, and the plans made for its calls.

    `launch` takes a handle, a grid, tensors and scalars, and launches on the tensors' current stream.
    """

    compiles_under_capture = True  # Triton compiles in a process of its own, which touches no stream

    def __init__(self, index: int, target: Target) -> None:
        super().__init__(index, target, LAUNCHER, FOLDER)
        self.plans: dict[object, Any] = {}

    def _keep(self, functions: Any) -> None:
        self.launch = functions["launch"]  # type: ignore[method-assign]

    def launch(self, *arguments: object) -> None:
        """What `launch` is until the launcher is loaded: a call may name it before it asks for a handle."""
        self._launcher()["launch"](*arguments)

    def handle(self, key: tuple[Any, ...]) -> int:
        """The handle of a variant; `key` is the function's name and its spec's arguments."""
        handle = self.handles.get(key)
        if handle is None:
            reason = None if key[0] == "combine" else unserved(*key[1:4])
            if reason is not None:
                raise refusal(f"this call on {self.target}", [("portable", Rejected(reason, claimed=False))])
            spec = _MAKERS[key[0]](*((self.target.architecture,) if key[0] == "forward" else ()), *key[1:])
            handle = self.load(key, spec)
        return handle
