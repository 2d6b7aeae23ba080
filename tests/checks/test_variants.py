"""The kernels that are compiled ahead: all of a target, or those that a user names."""

from __future__ import annotations

import pytest

from jit_kernel.device import Target, cpu_target
from jit_kernel.fa3 import cpu, dispatch
from jit_kernel.fa3.decision import Accepted


def test_selecting_variants():
    target = cpu_target()
    everything = dispatch.all_variants(target)
    assert {dict(spec.variant).get("dtype") for spec in everything} == {"fp32", "bf16", "fp16", "e4m3", None}
    chosen = dispatch.select_variants(target, {"head_dim": "96", "dtype": "bf16"})
    assert cpu.kernels.forward_spec("bf16") in chosen
    assert not {cpu.kernels.forward_spec(dtype) for dtype in ("fp32", "fp16", "e4m3")} & set(chosen)
    with pytest.raises(ValueError, match="has a field 'color'"):
        dispatch.select_variants(target, {"color": "red"})


def test_hopper_stands_before_portable_and_both_are_compiled_ahead():
    target = Target.parse("cuda:sm_90a")
    assert dispatch.candidates(target) == ("hopper", "portable")
    assert isinstance(dispatch.supports("hopper", target), Accepted)
    kernels = [spec.kernel for spec in dispatch.all_variants(target)]
    assert list(dict.fromkeys(kernels)) == ["flash_attention_v3/hopper", "launcher", "flash_attention_v3/portable"]
