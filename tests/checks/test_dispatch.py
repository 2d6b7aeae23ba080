"""Which implementation serves a call. The second implementation here is a real module in a folder of its own, put
before the CPU's: it hands calls on to the CPU's functions and is choosy about which."""

from __future__ import annotations

import inspect
import itertools
import logging
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import jit_kernel
from jit_kernel import config, flash_attention_v3
from jit_kernel.commands import why
from jit_kernel.device import Target
from jit_kernel.engine import progress
from jit_kernel.fa3 import call as calls
from jit_kernel.fa3 import cpu, dispatch
from jit_kernel.fa3.call import MetadataParameters
from jit_kernel.fa3.checks.call import checked
from jit_kernel.fa3.decision import Accepted, Rejected
from tests.support.inputs import tensors

CHOOSY = """
from jit_kernel.fa3 import cpu
from jit_kernel.fa3.decision import Accepted, Rejected

NAME = "choosy"
FUNCTIONS = cpu.FUNCTIONS
attend, plan, combine = cpu.attend, cpu.plan, cpu.combine  # and no merge
asked, prepared = [], []

def supports(target):
    return Accepted() if target.vendor == "cpu" else Rejected("it serves CPUs", claimed=False)

def decide(target, features):
    asked.append(features)
    if features.dtype != "fp32":
        return Rejected("it claims fp32 alone", claimed=False)
    if features.head_dim > 512:
        return Rejected("its registers hold 512 numbers a row", claimed=False)
    if features.group > 1:
        return Rejected("grouped heads are too much for it today")
    if features.softcap:
        return Rejected("softcap is too much for it today")
    return Accepted()

def prepare(device):
    prepared.append(device)

def all_variants(target):
    return cpu.all_variants(target)[:1]

def canonical(spec, field, value):
    return value
"""

PLAIN = why.explain("flash_attn_func", *(torch.empty(1, 2, 4, 64) for _ in range(3)), device="cpu").features


@pytest.fixture
def choosy(tmp_path, monkeypatch):
    """The choosy implementation before the CPU's, in a process that remembers no earlier decision."""
    import jit_kernel.fa3 as family

    (tmp_path / "choosy.py").write_text(CHOOSY)
    monkeypatch.setattr(family, "__path__", [*family.__path__, str(tmp_path)])
    monkeypatch.setattr(progress, "_warned", set())
    monkeypatch.setattr(config, "IMPLEMENTATIONS", {**config.IMPLEMENTATIONS, "cpu": ("choosy", "cpu")})
    config.reload()
    yield dispatch.implementation("choosy")
    del sys.modules["jit_kernel.fa3.choosy"]
    monkeypatch.undo()
    config.reload()


@pytest.fixture
def setting(monkeypatch):
    """Sets an environment variable that jit_kernel reads again at once."""

    def put(name: str, value: str) -> None:
        monkeypatch.setenv(name, value)
        config.reload()

    yield put
    monkeypatch.undo()
    config.reload()


def by_the_cpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    parameters = inspect.signature(jit_kernel.flash_attn_func).parameters.values()
    arguments = {parameter.name: parameter.default for parameter in parameters}
    found = cpu.attend(checked(calls.of("flash_attn_func", arguments | {"q": q, "k": k, "v": v})))
    assert isinstance(found, torch.Tensor)
    return found


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_the_best_one_that_accepts_serves(choosy, caplog):
    q, k, v = tensors()
    out = jit_kernel.flash_attn_func(q, k, v)
    assert torch.equal(out, by_the_cpu(q, k, v))
    assert len(choosy.asked) == 1
    assert warnings(caplog) == []


def test_a_decision_is_remembered_per_kind_of_call(choosy):
    for length in (5, 6, 7):
        q = torch.randn(2, length, 4, 32)
        jit_kernel.flash_attn_func(q, q, q)
    assert len(choosy.asked) == 1
    jit_kernel.flash_attn_func(q, q, q, causal=True)
    assert len(choosy.asked) == 2
    assert choosy.asked[1] == replace(choosy.asked[0], causal=True)


def test_every_function_reaches_an_implementation(choosy):
    q, k, v = tensors()
    flat, offsets = q[0], torch.tensor([0, 5], dtype=torch.int32)
    out, lse = jit_kernel.flash_attn_varlen_func(flat, flat, flat, offsets, offsets, return_softmax_lse=True)
    lengths = torch.tensor([3], dtype=torch.int32)
    plan = jit_kernel.get_scheduler_metadata(1, 5, 5, 4, 4, 32, lengths, qkv_dtype=torch.float32)
    jit_kernel.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, scheduler_metadata=plan)
    merged, _ = jit_kernel.merge_state(out, lse, out, lse)
    torch.testing.assert_close(merged, out)
    combined, _ = jit_kernel.flash_attn_combine(out[None], lse.T[None])
    torch.testing.assert_close(combined, out)
    assert {(f.ragged_q, f.metadata) for f in choosy.asked} == {(True, False), (False, True)}


def test_a_tracer_changes_nothing(choosy):
    """A debugger looks at the locals of every frame, which up to Python 3.12 writes them anew."""
    q, k, v = tensors()
    expected = jit_kernel.flash_attn_with_kvcache(q, k, v, cache_seqlens=3)

    def trace(frame, event, argument):
        assert frame.f_locals is not None
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        found = jit_kernel.flash_attn_with_kvcache(q, k, v, cache_seqlens=3, attention_chunk=None, window_size=[-1, -1])
    finally:
        sys.settrace(before)
    assert torch.equal(found, expected)


def test_a_claimed_feature_that_is_rejected_warns_once_per_reason(choosy, caplog):
    q, k, v = tensors(heads=8)
    out = jit_kernel.flash_attn_func(q, k, v)
    assert torch.equal(out, by_the_cpu(q, k, v))
    assert len(warnings(caplog)) == 1
    for part in ("choosy does not serve flash_attn_func", "grouped heads", "group=2", "cpu takes it"):
        assert part in warnings(caplog)[0]
    jit_kernel.flash_attn_func(q, k, v, causal=True)
    jit_kernel.flash_attn_varlen_func(q, k, v, None, None)
    assert len(warnings(caplog)) == 1
    jit_kernel.flash_attn_func(*tensors(), softcap=5.0)
    assert len(warnings(caplog)) == 2
    assert "softcap is too much" in warnings(caplog)[1]


def test_what_is_not_claimed_goes_to_the_next_one_without_a_warning(choosy, caplog, setting):
    setting("JIT_KERNEL_STRICT", "1")
    jit_kernel.flash_attn_func(*tensors(dtype=torch.bfloat16))
    assert [f.dtype for f in choosy.asked] == ["bf16"]
    assert warnings(caplog) == []


def test_strict_makes_the_warning_an_error(choosy, caplog, setting):
    setting("JIT_KERNEL_STRICT", "1")
    q, k, v = tensors(heads=8)
    out = torch.full_like(q, torch.nan)
    with pytest.raises(NotImplementedError, match=r"grouped heads.*cpu would take it \(JIT_KERNEL_STRICT is set\)"):
        jit_kernel.flash_attn_func(q, k, v, out=out)
    assert out.isnan().all()
    assert warnings(caplog) == []
    setting("JIT_KERNEL_STRICT", "0")
    jit_kernel.flash_attn_func(q, k, v, out=out)
    assert not out.isnan().any()


def test_when_all_reject_every_reason_is_listed(choosy):
    q, k, v = tensors(d=600)
    with pytest.raises(NotImplementedError) as caught:
        jit_kernel.flash_attn_func(q, k, v)
    text = str(caught.value)
    assert "no implementation serves flash_attn_func" in text
    assert "head_dim=600/600" in text
    assert "choosy: its registers hold 512 numbers a row" in text
    assert "cpu: head sizes 600/600: the CPU kernel serves head sizes up to 512" in text


@pytest.mark.parametrize(("name", "asked"), [("choosy", 1), ("cpu", 0)])
def test_one_implementation_can_be_forced(choosy, setting, name, asked):
    setting("JIT_KERNEL_IMPLEMENTATION", name)
    jit_kernel.flash_attn_func(*tensors())
    assert len(choosy.asked) == asked


def test_a_forced_one_is_never_replaced(choosy, setting):
    setting("JIT_KERNEL_IMPLEMENTATION", "choosy")
    with pytest.raises(NotImplementedError, match="choosy: it claims fp32 alone"):
        jit_kernel.flash_attn_func(*tensors(dtype=torch.bfloat16))


def test_a_forced_one_of_another_device_is_an_error(setting):
    setting("JIT_KERNEL_IMPLEMENTATION", "portable")
    with pytest.raises(NotImplementedError, match="JIT_KERNEL_IMPLEMENTATION is 'portable', which does not serve cpu"):
        jit_kernel.flash_attn_func(*tensors())
    assert not jit_kernel._is_fa3_supported("cpu")
    setting("JIT_KERNEL_IMPLEMENTATION", "cpu")
    assert jit_kernel._is_fa3_supported("cpu")


def test_an_unknown_implementation_is_an_error(setting):
    setting("JIT_KERNEL_IMPLEMENTATION", "quick")
    with pytest.raises(config.ConfigError, match="JIT_KERNEL_IMPLEMENTATION is 'quick'"):
        jit_kernel.flash_attn_func(*tensors())


def test_every_named_implementation_has_its_package():
    for name in itertools.chain.from_iterable(config.IMPLEMENTATIONS.values()):
        module = dispatch.implementation(name)
        assert name == module.NAME
        assert {*module.FUNCTIONS} <= {*calls.FIELD_OF}
        for function in ("supports", "decide", "attend", "prepare", "all_variants", "canonical"):
            assert callable(getattr(module, function)), f"{name} has no {function}"


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_86", "sm_90a", "sm_100", "sm_120"])
def test_cuda_decisions_without_a_gpu(architecture):
    """The real implementations: bf16 is served from sm_80 on, fp32 nowhere, and each says why."""
    target = Target.parse(f"cuda:{architecture}")
    served = dispatch.choose(target, replace(PLAIN, dtype="bf16", kv_dtype="bf16"), "flash_attn_func", ask_all=True)
    assert [name for name, _ in served.decisions] == list(config.IMPLEMENTATIONS["cuda"])
    assert (served.name is None) == (architecture == "sm_75")
    refused = dispatch.choose(target, PLAIN, "flash_attn_func")
    assert refused.name is None
    assert all(isinstance(decision, Rejected) and decision.reason for _, decision in refused.decisions)
    with pytest.raises(NotImplementedError) as caught:
        dispatch.resolve(target, PLAIN, "flash_attn_func")
    assert all(f"{name}: " in str(caught.value) for name in config.IMPLEMENTATIONS["cuda"])


@pytest.mark.parametrize("served", [("e4m3",), ("bf16",), ("e4m3", "bf16"), ()], ids=str)
def test_metadata_for_e4m3_is_for_a_q_of_either_kind(served, monkeypatch):
    """Engines name the cache's dtype; where nothing takes q in e4m3, it is for q in 16 bits over e4m3."""
    parameters = MetadataParameters(1, 1, 8, 4, 2, 64, torch.ones(1, dtype=torch.int32), torch.float8_e4m3fn)
    asked = []

    def choose(target, features, function):
        asked.append(function)
        return dispatch.Choice("one" if features.dtype in served else None, ())

    monkeypatch.setattr(dispatch, "choose", choose)
    found = dispatch.Dispatcher(Target.parse("cpu:generic"), (cpu, cpu))._planned(parameters)
    assert (found.dtype, found.kv_dtype) == ("bf16" if served == ("bf16",) else "e4m3", "e4m3")
    assert set(asked) == {"get_scheduler_metadata"}


def test_devices():
    assert jit_kernel._is_fa3_supported("cpu")
    assert jit_kernel._is_fa3_supported(torch.device("cpu"))
    assert jit_kernel._is_fa3_supported() or torch.cuda.is_available()
    assert not jit_kernel._is_fa3_supported("cuda:99")
    assert not jit_kernel._is_fa3_supported("meta")
    assert not jit_kernel._is_fa3_supported("musa:99")
    with pytest.raises(ValueError, match="device is 'toaster'; it must be"):
        jit_kernel._is_fa3_supported("toaster")
    with pytest.raises(ValueError, match="device is"):
        jit_kernel._load_fa3_kernels(1.5)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match=r"cuda:99.*no such device is present"):
        jit_kernel._load_fa3_kernels("cuda:99")
    with pytest.raises(NotImplementedError, match=r"musa:99.*no such device is present"):
        jit_kernel._load_fa3_kernels("musa:99")
    q = torch.empty(1, 1, 1, 64, device="meta")
    with pytest.raises(NotImplementedError, match=r"meta.*serves cpu, cuda and musa"):
        jit_kernel.flash_attn_func(q, q, q)


def test_kernels_are_loaded_once_per_device_however_many_ask(choosy):
    meeting = threading.Barrier(8)

    def ask(_: int):
        meeting.wait()
        return flash_attention_v3._load_fa3_kernels("cpu")

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert all(answer is answers[0] for answer in answers)
    assert answers[0] is jit_kernel._load_fa3_kernels(torch.device("cpu"))
    assert choosy.prepared == ["cpu"]


@pytest.fixture
def ways(monkeypatch):
    """A way of unchecked calls for each vendor, as an answer; dispatchers are made by `made` and forgotten."""
    answers = {"cpu": object(), "cuda": object()}

    def made(vendor: str) -> None:
        way = types.SimpleNamespace(
            FUNCTIONS=(), attend=None, NAME=vendor, prepare=lambda device: None,
            try_unchecked=lambda arguments: answers[vendor],
        )  # fmt: skip
        monkeypatch.setattr(dispatch, "supporting", lambda target: ((vendor, Accepted()),))
        monkeypatch.setattr(dispatch, "implementation", lambda name: way)
        monkeypatch.setattr(dispatch, "device_target", lambda device: Target(vendor, "any"))
        dispatch.dispatcher(vendor)

    config.reload()
    monkeypatch.setattr(dispatch, "_made", {})
    yield answers, made
    monkeypatch.undo()
    config.reload()


class OnGpu(torch.Tensor):
    """Of which is_cpu must not be asked: a subclass may say what it likes."""


def test_one_way_serves_the_tensors_of_its_device(ways):
    """Before the other device is used, its calls are declined by the way itself."""
    answers, made = ways
    for first in ("cpu", "cuda"):
        made(first)
        assert calls.try_unchecked(("name", torch.zeros(1))) is answers[first]
        config.reload()
        assert calls.try_unchecked is None


def test_two_ways_take_turns_by_the_device_of_q(ways):
    answers, made = ways
    for order in (("cpu", "cuda"), ("cuda", "cpu")):
        for vendor in order:
            made(vendor)
        assert calls.try_unchecked(("name", torch.zeros(1))) is answers["cpu"]
        for q in (torch.zeros(1, device="meta"), None, "text", torch.zeros(1).as_subclass(OnGpu)):
            assert calls.try_unchecked(("name", q)) is answers["cuda"]
        config.reload()
        assert calls.try_unchecked is None
    made("cuda")
    assert calls.try_unchecked(("name", torch.zeros(1))) is answers["cuda"], "a way of other settings is left"


def test_index_values_of_a_gpu_are_left_to_the_checks(ways, monkeypatch):
    answers, made = ways
    monkeypatch.setenv("JIT_KERNEL_CHECK_INDICES", "1")
    config.reload()
    made("cuda")
    assert calls.try_unchecked is None
    made("cpu")
    assert calls.try_unchecked(("name", torch.zeros(1))) is answers["cpu"]
    monkeypatch.delenv("JIT_KERNEL_CHECK_INDICES")
    config.reload()
    made("cuda")
    assert calls.try_unchecked(("name", torch.zeros(1))) is answers["cuda"]
