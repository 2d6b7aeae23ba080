"""vLLM's functions on jit_kernel: every call that vLLM makes is answered rightly, and the plug-in replaces them."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from jit_kernel import config
from jit_kernel import flash_attention_v3 as public
from jit_kernel.integrations import counters, vllm
from tests.support import engine_calls, engine_packages
from tests.support.engine_packages import VLLM_BACKEND, VLLM_FUNCTIONS

CALLS = engine_calls.calls(engine_calls.VLLM)
each_call = pytest.mark.parametrize("record", CALLS, ids=[f"{n}: {x['where']}" for n, x in enumerate(CALLS)])
FUNCTIONS = tuple(engine_calls.RECORDS[engine_calls.VLLM]["signatures"])


def named(part: str) -> Any:
    """The first record whose place is named so."""
    return next(record for record in CALLS if part in record["where"])


def attend(record: Any, **changes: Any) -> tuple[Any, engine_calls.Made]:
    call = engine_calls.made(record, vllm.get_scheduler_metadata)
    return vllm.flash_attn_varlen_func(**call.arguments | changes), call


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures(name):
    """vLLM's names, order and defaults."""
    ours = inspect.signature(getattr(vllm, name)).parameters.values()
    shown = [(p.name, None if p.default is p.empty else repr(p.default)) for p in ours]
    assert shown == engine_calls.signature(engine_calls.VLLM, name)


@each_call
def test_calls(record):
    result, call = attend(record)
    assert engine_calls.judged(result, call) <= 1
    if call.arguments.get("out") is not None:
        assert (result[0] if isinstance(result, tuple) else result) is call.arguments["out"]


@each_call
def test_lengths_of_64_bits(record):
    call = engine_calls.made(record, vllm.get_scheduler_metadata)
    wide = {
        name: value.long()
        for name, value in call.arguments.items()
        if isinstance(value, torch.Tensor) and value.dtype == torch.int32 and name != "scheduler_metadata"
    }
    assert wide
    assert engine_calls.judged(vllm.flash_attn_varlen_func(**call.arguments | wide), call) <= 1


@pytest.mark.parametrize("change", [{"window_size": [3, 0]}, {"softcap": 2.0}, {"softmax_scale": 0.2}], ids=str)
def test_another_call_is_told_apart(change):
    """The judge of the calls above sees it when a window, a softcap or the scale is not taken."""
    result, call = attend(named("forward, decode"), **change)
    assert engine_calls.judged(result, call) > 1


NEUTRAL = {"dropout_p": 0.0, "deterministic": True, "return_attn_probs": False, "cp_world_size": 1, "cp_rank": 0}
ABSENT = (
    "alibi_slopes", "output_scale", "cp_tot_seqused_k", "mask_mod", "block_sparse_tensors", "aux_tensors",
    "aux_tensor_leading_dims", "dynamic_causal", "gather_kv_indices", "gather_kv_valid_length",
)  # fmt: skip
REFUSED = {"dropout_p": 0.1, "return_attn_probs": True, "cp_world_size": 2, "cp_rank": 1}


@pytest.mark.parametrize("place", ["forward, decode", "turboquant"])
def test_neutral_values(place):
    result, call = attend(named(place), **dict.fromkeys(ABSENT), **NEUTRAL)
    assert engine_calls.judged(result, call) <= 1


@pytest.mark.parametrize("name", [*ABSENT, *REFUSED])
def test_other_values_are_refused_by_name(name):
    with pytest.raises(NotImplementedError, match=f"^{name} of flash_attn_varlen_func is .* must be"):
        attend(named("forward, decode"), **{name: REFUSED.get(name, torch.ones(3))})


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"fa_version": 4}, NotImplementedError, r"fa_version is 4 \(int\); it must be 2 or 3"),
        ({"seqused_k": None}, ValueError, "seqused_k is None; it must be given with block_table"),
        ({"cu_seqlens_k": torch.zeros(4, dtype=torch.int32)}, ValueError, "cu_seqlens_k is .*; it must be None with b"),
        ({"deterministic": 1}, TypeError, "deterministic is 1"),
        ({"block_table": None}, ValueError, "scheduler_metadata is .*; it must be None without block_table"),
        ({"block_table": None, "scheduler_metadata": None, "seqused_k": None}, ValueError, "without cu_seqlens_k"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(changes, error, words):
    with pytest.raises(error, match=words):
        attend(named("forward, decode"), **changes)


def test_the_default_scale_is_vllms():
    """1/sqrt(d), with q_v too, where jit_kernel has 1/sqrt(d + dv)."""
    record = named("flashattn_mla")
    call = engine_calls.made(record, vllm.get_scheduler_metadata)
    wanted = vllm.flash_attn_varlen_func(**call.arguments | {"softmax_scale": 64**-0.5})
    found = vllm.flash_attn_varlen_func(**call.arguments | {"softmax_scale": None})
    assert all(map(torch.equal, wanted, found))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_other_strides_are_copied(name):
    record = named("turboquant")
    call = engine_calls.made(record)
    odd = call.arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert odd.stride(-1) != 1
    assert engine_calls.judged(vllm.flash_attn_varlen_func(**call.arguments | {name: odd}), call) <= 1


def test_supported_versions():
    assert vllm._is_fa3_supported() == (True, None)
    assert [vllm.is_fa_version_supported(version) for version in (2, 3, 4)] == [True, True, False]
    assert vllm.fa_version_unsupported_reason(3) is None
    assert "not those of 4" in str(vllm.fa_version_unsupported_reason(4))
    for function in (vllm.is_fa_version_supported, vllm.fa_version_unsupported_reason):
        with pytest.raises(ValueError, match=r"fa_version is 5 \(int\); it must be 2, 3 or 4"):
            function(5)


def test_the_reason_where_nothing_serves_the_device(monkeypatch):
    """A GPU that is too old for every implementation, as dispatch answers for it."""
    from jit_kernel.device import Target

    monkeypatch.setattr(public, "_is_fa3_supported", lambda: False)
    monkeypatch.setattr(vllm, "detect_device", lambda: "cuda")
    monkeypatch.setattr(vllm, "device_target", lambda device: Target.parse("cuda:sm_75"))
    supported, reason = vllm._is_fa3_supported()
    assert not supported
    assert reason.startswith("jit_kernel does not serve cuda:sm_75: hopper: ") and "; portable: " in reason


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[None]:
    engine_packages.write_vllm(tmp_path)
    with engine_packages.importable(tmp_path):
        yield
        vllm.deactivate()


def functions() -> dict[str, Any]:
    """Every reference that the engine's modules hold, by module and name."""
    modules = {name: importlib.import_module(name) for name in (VLLM_FUNCTIONS, "vllm.vllm_flash_attn", VLLM_BACKEND)}
    return {
        f"{place}.{name}": value
        for place, module in modules.items()
        for name, value in vars(module).items()
        if callable(value)
    }


def test_the_plug_in_replaces_what_vllm_calls(engine):
    before = functions()
    assert len(before) == 11
    vllm.activate()
    vllm.activate()
    call = engine_calls.made(named("forward, decode"), vllm.get_scheduler_metadata)
    counters.clear()
    for place, function in functions().items():
        assert function is not before[place], place
        if place.endswith("flash_attn_varlen_func"):
            assert engine_calls.judged(function(**call.arguments), call) <= 1
        if place.endswith("is_fa_version_supported"):
            assert function(3) is True
        if place.endswith("unsupported_reason"):
            assert function(2) is None
        if place.endswith("_is_fa3_supported"):
            assert function() == (True, None)
    assert counters.read()["vllm"] == {"served": 3, "passed_on": {}}
    vllm.deactivate()
    assert functions() == before
    assert vllm.get_scheduler_metadata.__module__ == vllm.__name__


def test_another_version_goes_on_to_vllms_own_functions(engine):
    vllm.activate()
    counters.clear()
    backend = importlib.import_module(VLLM_BACKEND)
    call = engine_calls.made(named("turboquant")).arguments
    assert backend.flash_attn_varlen_func(**call | {"fa_version": 4}) == f"{VLLM_FUNCTIONS}.flash_attn_varlen_func"
    assert counters.read()["vllm"] == {"served": 0, "passed_on": {"fa_version=4": 1}}
    assert backend.is_fa_version_supported(4) == f"{VLLM_FUNCTIONS}.is_fa_version_supported"
    assert backend.fa_version_unsupported_reason(4) == f"{VLLM_FUNCTIONS}.fa_version_unsupported_reason"


@pytest.mark.parametrize(("asked", "replaced"), [("", False), ("sglang", False), ("sglang,vllm", True)])
def test_the_entry_point_does_nothing_unasked(engine, monkeypatch, asked, replaced):
    before = functions()
    monkeypatch.setenv("JIT_KERNEL_PLUGINS", asked)
    config.reload()
    try:
        engine_packages.entry_point("vllm.general_plugins")()
    finally:
        monkeypatch.undo()
        config.reload()
    assert (functions() != before) == replaced


def test_a_build_without_these_functions_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as where it is not installed
    with pytest.raises(RuntimeError, match=rf"cannot replace {VLLM_FUNCTIONS}.flash_attn_varlen_func of vllm: "):
        vllm.activate()
