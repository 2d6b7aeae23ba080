"""Vectors of floats mean the same with each instruction set, NaN among their numbers too."""

from __future__ import annotations

import pytest
import torch

from jit_kernel import jit
from jit_kernel.device import Target, cpu_target

ONES = ["x86-64", "x86-64-v3", "x86-64-v4"]  # each runs what those before it run
SOURCES = jit.Sources(
    text={
        "vectors.h": """
#include "jit_kernel/cpu/simd.h"
#include <tvm/ffi/container/tensor.h>
namespace simd = jit_kernel::simd;
// The larger of a and b, and 2^a.
inline void vectors(tvm::ffi::TensorView a, tvm::ffi::TensorView b, tvm::ffi::TensorView larger,
                    tvm::ffi::TensorView power) {
  const auto at = [](tvm::ffi::TensorView x) { return static_cast<float*>(x.data_ptr()); };
  for (int64_t i = 0; i < a.numel(); i += simd::kLanes) {
    const simd::Vec x = simd::load(at(a) + i);
    simd::store(at(larger) + i, simd::max(x, simd::load(at(b) + i)));
    simd::store(at(power) + i, simd::exp2<6>(x));
  }
}
"""
    },
    name="tests",
)


def targets() -> list[str]:
    """This machine's own target and the plainer ones, whose vectors are narrower."""
    here = cpu_target()
    names = ONES[: ONES.index(here.architecture)] if here.architecture in ONES else []
    return [*(f"cpu:{name}" for name in names), str(here)]


@pytest.mark.parametrize("target", targets())
def test_the_larger_is_the_second_where_one_is_nan_and_a_power_of_nan_is_nan(target: str) -> None:
    spec = jit.library(SOURCES, "vectors.h", exports=["vectors"]).spec
    values = torch.tensor([float("nan"), -float("inf"), -200.0, -1.5, 0.0, 1.0, 100.0, float("nan")])
    a, b = (each.contiguous() for each in torch.meshgrid(values, values, indexing="ij"))
    larger, power = torch.empty_like(a), torch.empty_like(a)
    jit.load(spec, Target.parse(target))["vectors"](a, b, larger, power)
    wanted = torch.where(a.isnan() | b.isnan(), b, a.maximum(b))
    torch.testing.assert_close(larger, wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(power, a.double().exp2().float(), rtol=1e-6, atol=1e-37, equal_nan=True)
