"""sglang's functions on jit_kernel: every call that sglang makes is answered rightly, and the plug-in replaces them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import jit_kernel
from jit_kernel import config
from jit_kernel.integrations import counters, sglang
from tests.support import engine_calls, engine_packages
from tests.support.engine_packages import SGLANG_BACKEND, SGLANG_FUNCTIONS, SGLANG_KERNEL
from tests.support.valid_calls import ints

CALLS = engine_calls.calls(engine_calls.SGLANG)
each_call = pytest.mark.parametrize("record", CALLS, ids=[f"{n}: {x['where']}" for n, x in enumerate(CALLS)])
KVCACHE, VARLEN = "flash_attn_with_kvcache", "flash_attn_varlen_func"


def named(part: str) -> Any:
    """The first record whose place is named so."""
    return next(record for record in CALLS if part in record["where"])


def attend(record: Any, **changes: Any) -> tuple[Any, engine_calls.Made]:
    call = engine_calls.made(record, sglang.get_scheduler_metadata)
    return getattr(sglang, record["function"])(**call.arguments | changes), call


@pytest.mark.parametrize("name", [KVCACHE, VARLEN, "get_scheduler_metadata"])
def test_signatures(name):
    """sglang's names, order and defaults."""
    ours = inspect.signature(getattr(sglang, name)).parameters.values()
    shown = [(p.name, None if p.default is p.empty else repr(p.default)) for p in ours]
    assert shown == engine_calls.signature(engine_calls.SGLANG, name)


@each_call
def test_calls(record):
    result, call = attend(record)
    assert engine_calls.judged(result, call) <= 1
    if call.arguments.get("out") is not None:
        assert (result[0] if isinstance(result, tuple) else result) is call.arguments["out"]


@each_call
def test_lengths_of_64_bits(record):
    """And offsets: sglang has both."""
    call = engine_calls.made(record, sglang.get_scheduler_metadata)
    wide = {
        name: value.long()
        for name, value in call.arguments.items()
        if isinstance(value, torch.Tensor) and value.dtype == torch.int32 and name != "scheduler_metadata"
    }
    assert wide or record["kind"] == "dense"
    result = getattr(sglang, record["function"])(**call.arguments | wide)
    assert engine_calls.judged(result, call) <= 1


@pytest.mark.parametrize("change", [{"window_size": (3, 0)}, {"softcap": 2.0}, {"softmax_scale": 0.2}], ids=str)
def test_another_call_is_told_apart(change):
    """The judge of the calls above sees it when a window, a softcap or the scale is not taken."""
    result, call = attend(named("forward_decode"), **change)
    assert engine_calls.judged(result, call) > 1


ABSENT = ("score_mod", "aux_tensors", "sfq", "sfk", "sfv", "rel_bias", "rel_bias_prep_cache", "mask_mod")


@pytest.mark.parametrize("place", ["forward_extend, pages", "dots_hybrid"])
def test_neutral_values_and_others(place):
    record = named(place)
    result, call = attend(record, **dict.fromkeys(ABSENT), ver=3)
    assert engine_calls.judged(result, call) <= 1
    for name, value in zip(ABSENT, (max, [call], 1.0, call, "x", torch.ones(1), {}, max), strict=True):
        with pytest.raises(NotImplementedError, match=f"^{name} of {record['function']} is .* must be None"):
            attend(record, **{name: value})
    with pytest.raises(NotImplementedError, match=r"ver is 4 \(int\); it must be 3"):
        attend(record, ver=4)


def test_a_bound_of_the_keys_is_an_integer():
    with pytest.raises(TypeError, match=r"max_seqlen_k is 2\.5"):
        attend(named("static length"), max_seqlen_k=2.5)


def test_queries_are_absent_with_only_qv_alone():
    with pytest.raises(TypeError, match="q is None"):
        attend(named("_forward_fa3"), q=None)
    with pytest.raises(ValueError, match="k_cache is None; it must be given without only_qv"):
        attend(named("no rope"), only_qv=False)
    with pytest.raises(TypeError, match="q is None"):
        attend(named("no rope"), qv=None)


@pytest.mark.parametrize("name", ["cu_seqlens_k", "seqused_q"])
def test_plans_are_for_calls_over_a_cache(name):
    call = engine_calls.made(named("forward_decode"), sglang.get_scheduler_metadata)
    with pytest.raises(NotImplementedError, match=f"{name} of get_scheduler_metadata"):
        sglang.get_scheduler_metadata(**call.plan | {name: torch.zeros(4, dtype=torch.int32)})


@pytest.mark.parametrize(
    "where", ["forward_extend, softcap", "forward_extend, sliding window", "forward_extend, pages"]
)
def test_one_plan_serves_every_layer_of_a_step(where):
    """Made without a window or softcap for a longer context, it serves layers that have one."""
    sizes = dict.fromkeys(("max_seqlen_k",), 1 << 20) | {"max_seqlen_q": 5}
    planned = engine_calls.made(named("forward_decode"), sglang.get_scheduler_metadata).plan
    record = named(where)
    call = engine_calls.made(record)
    of_call = {name: call.arguments[name] for name in ("cache_seqlens", "cu_seqlens_q")}
    plan = sglang.get_scheduler_metadata(**planned | sizes | of_call | {"page_size": record["sizes"]["page_size"]})
    result = sglang.flash_attn_with_kvcache(**call.arguments, scheduler_metadata=plan)
    assert engine_calls.judged(result, call) <= 1


@pytest.mark.parametrize("options", [{}, {"seqused_q": ints(2, 1, 4)}, {"softcap": 4.0}], ids=str)
def test_inputs_that_require_grad(options):
    """sglang's own tests pass them: the gradients are jit_kernel's."""
    call = engine_calls.made(named("dots_hybrid")).arguments
    wanted = sglang.flash_attn_varlen_func(**call, **options)
    leaves = {name: call[name].requires_grad_() for name in "qkv"}
    out, lse = sglang.flash_attn_varlen_func(**call | leaves, **options, return_softmax_lse=True)
    assert torch.equal(out, wanted) and out.requires_grad and not lse.requires_grad
    out.sum().backward()
    ours = {name: call[name] for name in call if name != "ver"} | options
    grads = torch.autograd.grad(jit_kernel.flash_attn_varlen_func(**ours).sum(), leaves.values())
    assert all(map(torch.equal, grads, (leaf.grad for leaf in leaves.values())))


@pytest.mark.parametrize("function", ["flash_attn_varlen_func", "flash_attn_with_kvcache"])
def test_beside_sinks_or_out_nothing_is_differentiated(function):
    """As sglang's own functions, which have no backward pass; half of its own tests of varlen are such calls."""
    call = engine_calls.made(next(record for record in CALLS if record["function"].endswith(function))).arguments
    call = {name: value for name, value in call.items() if name not in ("sinks", "out")}
    attend = getattr(sglang, function)
    sinks = torch.randn(call["q"].shape[-2], dtype=call["q"].dtype)
    for given in ({"sinks": sinks}, {"out": torch.empty_like(call["q"])}):
        wanted = attend(**call, **given).clone()
        result = attend(**call | {"q": call["q"].detach().requires_grad_()}, **given)
        assert torch.equal(result, wanted)
        assert not result.requires_grad


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[None]:
    engine_packages.write_sglang(tmp_path)
    with engine_packages.importable(tmp_path):
        yield
        sglang.deactivate()


def functions() -> dict[str, Any]:
    """Every reference that the engine's modules hold, by module and name."""
    modules = {name: importlib.import_module(name) for name in (SGLANG_FUNCTIONS, SGLANG_KERNEL, SGLANG_BACKEND)}
    return {
        f"{place}.{name}": value
        for place, module in modules.items()
        for name, value in vars(module).items()
        if callable(value)
    }


def test_the_plug_in_replaces_what_sglang_calls(engine):
    before = functions()
    assert len(before) == 8
    sglang.activate()
    sglang.activate()
    record = named("forward_extend, pages")
    call = engine_calls.made(record)
    counters.clear()
    for place, function in functions().items():
        assert function is not before[place], place
        if place.endswith((KVCACHE, "name")):
            assert engine_calls.judged(function(**call.arguments), call) <= 1
    assert counters.read()["sglang"] == {"served": 4, "passed_on": {}}
    sglang.deactivate()
    assert functions() == before
    assert sglang.flash_attn_with_kvcache.__module__ == sglang.__name__


def test_another_version_goes_on_to_sglangs_own_function(engine):
    sglang.activate()
    counters.clear()
    call = engine_calls.made(named("forward_extend, pages")).arguments
    backend = importlib.import_module(SGLANG_BACKEND)
    assert backend.flash_attn_with_kvcache(**call | {"ver": 4}) == f"{SGLANG_FUNCTIONS}.{KVCACHE}"
    assert counters.read()["sglang"] == {"served": 0, "passed_on": {"ver=4": 1}}


@pytest.mark.parametrize(("asked", "replaced"), [("", False), ("vllm", False), ("sglang", True)])
def test_the_entry_point_does_nothing_unasked(engine, monkeypatch, asked, replaced):
    before = functions()
    monkeypatch.setenv("JIT_KERNEL_PLUGINS", asked)
    config.reload()
    try:
        engine_packages.entry_point("sglang.srt.plugins")()
    finally:
        monkeypatch.undo()
        config.reload()
    assert (functions() != before) == replaced


def test_an_engine_without_these_functions_is_left_as_it_is(engine):
    kernel = importlib.import_module(SGLANG_KERNEL)
    del kernel.get_scheduler_metadata
    before = functions()
    with pytest.raises(RuntimeError, match=r"cannot replace sgl_kernel.flash_attn.get_scheduler_metadata of sglang"):
        sglang.activate()
    assert functions() == before
