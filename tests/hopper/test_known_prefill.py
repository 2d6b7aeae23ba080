"""Which calls of prefill pass by the dispatcher, to a kernel that was launched before."""

from __future__ import annotations

import inspect
import types

import pytest
import torch

import jit_kernel
from jit_kernel.fa3 import call as calls
from jit_kernel.fa3 import dispatch, hopper
from jit_kernel.fa3.call import Call
from jit_kernel.fa3.decision import Accepted
from tests.support.hopper_variants import TARGET

FP8 = torch.float8_e4m3fn


class KernelsDouble:
    """Stands for a GPU's loaded kernels: one variant is there, and `forward` says whether rows are aligned."""

    def __init__(self, aligned: bool) -> None:
        self.handles = {(torch.bfloat16, 64, 64, True, False): 7, (FP8, 64, 64, True, False): 8}
        self.launched: list[tuple[object, ...]] = []
        self.aligned = aligned

    def forward(self, *arguments: object) -> bool:
        assert arguments[-1] is True, "the launcher must check addresses: no other code has"
        if self.aligned:
            self.launched.append(arguments)
        return self.aligned

    forward_fp8 = forward


@pytest.mark.parametrize(
    ("change", "aligned", "launched"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"causal": False}, True, False),
        ({"softcap": 5.0}, True, False),
        ({"num_splits": 2}, True, False),
        ({"page_table": torch.zeros(1, 1, dtype=torch.int32)}, True, False),
        ({"qv": torch.zeros(3, 2, 64)}, True, False),
        *[({f"{name}_descale": torch.ones(1, 2)}, True, False) for name in "qkv"],
        *[({"dtype": FP8, f"{name}_descale": torch.ones(1, 2)}, True, True) for name in "qkv"],
        ({"dtype": FP8, "softcap": 5.0}, True, True),
        ({"dtype": FP8}, False, False),
        ({"dtype": FP8, "qv": torch.zeros(3, 2, 64)}, True, False),
    ],
)
def test_only_a_known_kind_of_call_passes_by_the_dispatcher(
    change: dict[str, object], aligned: bool, launched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = KernelsDouble(aligned)
    monkeypatch.setattr(hopper.kernels, "kernels_of", lambda device: kernels)
    asked: list[Call] = []
    double = types.SimpleNamespace(
        NAME="next", attend=asked.append, decide=lambda target, features: Accepted(),
        supports=hopper.supports, FUNCTIONS=hopper.FUNCTIONS,
    )  # fmt: skip
    monkeypatch.setattr(dispatch, "candidates", lambda target: ("next",))
    monkeypatch.setattr(dispatch, "implementation", lambda name: double)
    made = dispatch.Dispatcher(TARGET, (hopper, double))  # type: ignore[arg-type]
    x, cu = torch.zeros(3, 2, 64, dtype=change.get("dtype", torch.bfloat16)), torch.tensor([0, 3], dtype=torch.int32)
    given: dict[str, object] = {"q": x, "k": x, "v": x, "cu_seqlens_q": cu, "cu_seqlens_k": cu, "causal": True}
    names = inspect.signature(jit_kernel.flash_attn_varlen_func).parameters
    defaults = {name: p.default for name, p in names.items() if p.default is not inspect.Parameter.empty}
    change = {name: value for name, value in change.items() if name != "dtype"}
    call = Call(*calls.of(calls.VARLEN, {**defaults, **given, **change}))
    result = made.attend(call)
    if launched:
        assert not asked
        assert isinstance(result, torch.Tensor)
        assert result.shape == x.shape
        handles = (8, 0) if x.dtype is FP8 else (7,)  # the second one's is of the kernel that prepares values
        assert kernels.launched[0][: len(handles) + 3] == (*handles, x, x, x)
    else:
        assert not kernels.launched
        assert asked == [call]
