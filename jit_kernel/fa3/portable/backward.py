"""The backward pass by portable kernels: one call in, three launches out. Nothing here synchronises.

delta = rowsum(grad_out * out) - grad_lse and the sinks' gradient first; then the gradients of keys and values, a
program for each tile of keys; then those of queries, a program for each tile of rows. Scores are computed in both, so
that no sum crosses programs: every call has the same bits from run to run, whether `deterministic` asks for it or not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jit_kernel.device import Target
from jit_kernel.fa3.decision import Accepted, Decision, Rejected, refusal
from jit_kernel.fa3.features import DTYPE_NAMES
from jit_kernel.fa3.gradients.call import Backward, Gradients
from jit_kernel.fa3.portable import backward_kernels, backward_tiles, forward, planning
from jit_kernel.fa3.portable.backward_kernels import BLOCK_ROWS, DTYPES, MAX_HEAD_DIM, STRIDE_UNIT
from jit_kernel.fa3.portable.kernels import DeviceKernels
from jit_kernel.fa3.portable.planning import Layout
from jit_kernel.jit import KernelSpec

_LEAST_CAPABILITY = (8, 0)
_NARROW = 2**31 // 256  # a wider token stride would overflow the 32-bit offsets inside a tile of at most 128 rows


def decide(call: Backward) -> Decision:
    """bf16 and fp16 with head sizes up to 256 on NVIDIA GPUs of compute capability 8.0 and newer, any mask."""
    q, v = call.q, call.v
    sizes = (q.shape[-1], v.shape[-1])
    reason = None
    if DTYPE_NAMES.get(q.dtype) not in DTYPES:
        reason = f"q is {q.dtype}: its backward kernels serve bf16 and fp16"
    elif max(sizes) > MAX_HEAD_DIM:
        reason = f"q and v have head sizes {sizes[0]}/{sizes[1]}: its backward kernels serve up to {MAX_HEAD_DIM}"
    elif not on_served_device(q.device):
        reason = f"q is on {q.device}: its backward kernels serve NVIDIA GPUs of compute capability 8.0 and newer"
    elif max(x.shape[-2] * _in_pieces(x.shape[-1]) for x in (q, call.k, v, call.out)) >= _NARROW:
        reason = f"q, k, v or out has rows of {_NARROW} elements or more"
    return Accepted() if reason is None else Rejected(reason, claimed=False)


def on_served_device(device: torch.device) -> bool:
    """Whether a device is a GPU that the kernels can be compiled for; "meta" stands for a target that was looked at."""
    if device.type != "cuda":
        return device.type == "meta"
    return torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


def variants(target: Target) -> list[KernelSpec]:
    """What warm-up compiles for a target."""
    return list(backward_kernels.all_specs(target))


def gradients(call: Backward) -> Gradients:
    """The gradients of q, k, v and sinks. Raises NotImplementedError for a call that `decide` rejects."""
    decision = decide(call)
    if isinstance(decision, Rejected):
        raise refusal("this backward pass", [("portable", decision)])
    q, k, v, out, grad_out = (_in_rows(x) for x in (call.q, call.k, call.v, call.out, call.grad_out))
    # Ragged rows may lie before the first sequence, or beyond a max_seqlen that is too small; no kernel writes these.
    new = torch.empty if call.cu_seqlens_q is None else torch.zeros
    grads = [new(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    batch, longest_q, longest_k = _extent(call)
    if batch == 0 or q.shape[-2] == 0 or k.shape[-2] == 0:
        zeros = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (call.q, call.k, call.v)]
        sinks = None if call.sinks is None else torch.zeros(call.sinks.shape, dtype=torch.float32, device=q.device)
        return Gradients(zeros[0], zeros[1], zeros[2], sinks)
    launches = _Launches(call, q, k, v, grad_out, batch)
    grad_sinks = launches.rows(out, longest_q)
    launches.keys(grads[1], grads[2], longest_k)
    launches.queries(grads[0], longest_q)
    grad_q, grad_k, grad_v = (
        grad if grad.shape == of.shape else grad[..., : of.shape[-1]].contiguous()
        for grad, of in zip(grads, (call.q, call.k, call.v), strict=True)
    )
    return Gradients(grad_q, grad_k, grad_v, grad_sinks)


def _in_pieces(head_dim: int) -> int:
    return -(-head_dim // STRIDE_UNIT) * STRIDE_UNIT


def _in_rows(x: Tensor) -> Tensor:
    """A tensor whose rows are pieces of 16 bytes: itself, or a copy of it with zeros behind odd head sizes."""
    head_dim = x.shape[-1]
    if head_dim % STRIDE_UNIT:
        # pad() keeps an order of dimensions like channels_last, where a row's elements do not lie side by side.
        return torch.nn.functional.pad(x, (0, -head_dim % STRIDE_UNIT)).contiguous()
    strides = x.stride()
    # A stride of 0, of an expanded gradient, is one like others; that of a row's elements is 1.
    fits = strides[-1] == 1 and not any(s % STRIDE_UNIT for s in strides[:-1]) and strides[-3] < _NARROW
    return x if fits and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _extent(call: Backward) -> tuple[int, int, int]:
    """Sequences, and an upper bound of the rows and of the keys of each, at least 1 so that zeros are written."""
    starts = call.cu_seqlens_q
    if starts is None:
        return call.q.shape[0], max(1, call.q.shape[1]), max(1, call.k.shape[1])
    return starts.numel() - 1, max(1, call.max_seqlen_q), max(1, call.max_seqlen_k)


def _rows(x: Tensor) -> tuple[int, ...]:
    """Strides of (batch, token, head) in units of 16 bytes."""
    return tuple(stride // STRIDE_UNIT for stride in Layout(tuple(x.shape), x.stride()).rows)


class _Launches:
    """The three launches of one call, whose tensors are all in rows of 16 bytes."""

    def __init__(self, call: Backward, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, batch: int) -> None:
        self._call, self._q, self._k, self._v, self._grad_out, self._batch = call, q, k, v, grad_out, batch
        self._kernels: DeviceKernels = forward.kernels_of(q.device)
        self._dtype = DTYPE_NAMES[q.dtype]
        self._ragged = call.cu_seqlens_q is not None
        self._lse = call.lse.contiguous()
        self._delta = torch.empty_like(self._lse)
        self._lse_strides = (0, q.shape[0]) if self._ragged else (q.shape[2] * q.shape[1], q.shape[1])
        self._lengths = (q.shape[0], k.shape[0]) if self._ragged else (q.shape[1], k.shape[1])
        self._flags = (
            (planning.CU_SEQLENS_Q | planning.CU_SEQLENS_K if self._ragged else 0)
            | (planning.SEQUSED_Q if call.seqused_q is not None else 0)
            | (planning.SEQUSED_K if call.seqused_k is not None else 0)
            | (planning.LSE if call.grad_lse is not None else 0)
            | (planning.SINKS if call.sinks is not None else 0)
            | (planning.SINKS_ARE_FLOAT32 if call.sinks is not None and call.sinks.dtype is torch.float32 else 0)
        )

    def rows(self, out: Tensor, longest: int) -> Tensor | None:
        """delta, and the sinks' gradient."""
        call, heads = self._call, self._q.shape[-2]
        tiles = -(-longest // BLOCK_ROWS)
        parts = None
        if call.sinks is not None:
            parts = torch.empty((self._batch * tiles, heads), dtype=torch.float32, device=out.device)
        self._launch(
            ("backward rows", self._dtype, out.shape[-1]),
            heads * tiles * self._batch, out, self._grad_out, self._lse,
            None if call.grad_lse is None else call.grad_lse.contiguous(), self._delta,
            None if call.sinks is None else call.sinks.contiguous(), parts, call.cu_seqlens_q, call.seqused_q,
            *_rows(out), *_rows(self._grad_out), *self._lse_strides, self._lengths[0], heads, tiles, self._flags,
        )  # fmt: skip
        return None if parts is None else parts.sum(0)

    def keys(self, grad_k: Tensor, grad_v: Tensor, longest: int) -> None:
        """The gradients of keys and values."""
        heads = self._k.shape[-2]
        architecture = self._kernels.target.architecture
        for part in backward_tiles.parts(architecture, self._q.shape[-1], self._v.shape[-1]):
            tiles = -(-longest // self._tile(part).block_n)
            scalars = (self._batch, heads, self._q.shape[-2] // heads, tiles)
            self._main(part, tiles * heads * self._batch, (grad_k, grad_v), scalars)

    def queries(self, grad_q: Tensor, longest: int) -> None:
        """The gradient of queries."""
        heads = self._q.shape[-2]
        tiles = -(-longest // self._tile("queries").block_m)
        scalars = (self._batch, heads, heads // self._k.shape[-2], tiles)
        self._main("queries", tiles * heads * self._batch, (grad_q,), scalars)

    def _tile(self, kernel: str) -> backward_tiles.Tile:
        architecture = self._kernels.target.architecture
        return backward_tiles.tile(architecture, kernel, self._q.shape[-1], self._v.shape[-1])

    def _main(self, kernel: str, programs: int, grads: tuple[Tensor, ...], scalars: tuple[int, ...]) -> None:
        call, inputs = self._call, (self._q, self._k, self._v, self._grad_out)
        strides = (stride for x in (*inputs, *grads) for stride in _rows(x))
        self._launch(
            (f"backward {kernel}", self._dtype, self._q.shape[-1], self._v.shape[-1], call.softcap > 0),
            programs, *inputs, self._lse, self._delta, *grads,
            call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_q, call.seqused_k,
            *strides, *self._lse_strides, *self._lengths, *scalars,
            call.left, call.right, call.attention_chunk, self._flags, float(call.softmax_scale), float(call.softcap),
        )  # fmt: skip

    def _launch(self, key: tuple[Any, ...], programs: int, *arguments: object) -> None:
        handle = self._kernels.handles.get(key)
        if handle is None:
            handle = self._kernels.load(key, self._spec(*key))
        self._kernels.launch(handle, programs, *arguments)

    def _spec(self, name: str, dtype: str, *sizes: Any) -> KernelSpec:
        kernel = name.removeprefix("backward ")
        if kernel == "rows":
            return backward_kernels.rows_spec(dtype, *sizes)
        return backward_kernels.main_spec(kernel, self._kernels.target.architecture, dtype, *sizes)
