"""DiffusionAttention: dense attention without a cache, on the backend that `select_backend` chose."""

from __future__ import annotations

import torch
from torch import Tensor

from jit_kernel import flash_attention_v3
from jit_kernel.attention.backend import resolved_device
from jit_kernel.attention.dense import sage
from jit_kernel.attention.dense.selection import select_backend


class DiffusionAttention:
    """Attention of q (b, sq, hq, d) over k, v (b, sk, hk, d), as an image or video model calls it.

    backend: "fa", "sage", "sdpa" or None for the best; `selection` tells what is taken and why. causal: the last
    query sees every key, each one before it one less. Nothing is written to the inputs, whatever the backend.
    """

    def __init__(
        self,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        backend: str | None = None,
        *,
        causal: bool = False,
        softmax_scale: float | None = None,
        strict: bool = False,
    ) -> None:
        self.selection = select_backend(backend, head_size, dtype, device, strict)
        self.device = resolved_device(device)
        self.head_size, self.dtype = head_size, dtype
        self.causal, self.softmax_scale = causal, softmax_scale
        found = sage.find() if self.selection.backend == "sage" else None
        self._sage = found if isinstance(found, sage.Sage) else None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, return_softmax_lse: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(b, sq, hq, d) in q's dtype, with return_softmax_lse also lse (b, hq, sq) where the backend has one."""
        self._check(q, k, v)
        if self._sage is not None:
            return self._sage(q, k, v, self.causal, self.softmax_scale, return_softmax_lse)
        if self.selection.backend == "fa":
            result: Tensor | tuple[Tensor, Tensor] = flash_attention_v3.flash_attn_func(
                q,
                k,
                v,
                softmax_scale=self.softmax_scale,
                causal=self.causal,
                return_softmax_lse=return_softmax_lse,
            )
            return result
        if return_softmax_lse:
            raise NotImplementedError("return_softmax_lse: torch's scaled_dot_product_attention has no lse to return")
        return self._sdpa(q, k, v)

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.dim() != 4 or x.shape[-1] != self.head_size:
                raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be (b, s, heads, {self.head_size})")
            if x.dtype != self.dtype or x.device.type != self.device.type:
                raise ValueError(
                    f"{name} is {str(x.dtype)[6:]} on {x.device}; the backend was chosen for {str(self.dtype)[6:]} "
                    f"on {self.device.type}"
                )
        if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2] % k.shape[2]:
            raise ValueError(
                f"q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; k and v must agree, the "
                "batches too, and q's heads must be a multiple of k's"
            )

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sq, sk = q.shape[1], k.shape[1]
        mask = None
        if self.causal and sq != sk:  # torch's is_causal is aligned to the top left
            mask = torch.ones(sq, sk, dtype=torch.bool, device=q.device).tril(sk - sq)
        out = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=self.causal and mask is None,
            scale=self.softmax_scale,
            enable_gqa=q.shape[2] != k.shape[2],
        ).transpose(1, 2)
        # A row of the mask without a key gives NaN in some of torch's kernels; here it gives 0.
        return out.nan_to_num(nan=0.0) if mask is not None and sq > sk else out
