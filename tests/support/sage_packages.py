"""Stand-ins for the packages that are named sageattention: PyPI's first one, and MATE's."""

from __future__ import annotations

SAGE_1 = """
def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **kwargs):
    import torch
    k -= k.mean(dim=1, keepdim=True)
    assert tensor_layout == "NHD"
    return torch.zeros_like(q)
"""


SAGE_MATE = """
def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False,
             qk_quant_gran="per_thread", qk_quant_dtype="int8", quant_recipe=None, smooth_k=True, fp8_output=False,
             **kwargs):
    from jit_kernel import flash_attention_v3
    assert tensor_layout == "NHD"
    return flash_attention_v3.flash_attn_func(q, k, v, softmax_scale=sm_scale, causal=is_causal,
                                              return_softmax_lse=return_lse)
"""
