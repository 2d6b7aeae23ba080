"""Our functions over every version of MATE: random calls against the numeric rule, signatures, MLA decode, metadata."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import jit_kernel.flash_attention_v3 as fa3
from jit_kernel import config
from jit_kernel.device import Target
from jit_kernel.fa3 import call as calls
from jit_kernel.fa3 import musa
from jit_kernel.fa3.call import Call
from jit_kernel.fa3.decision import Accepted
from jit_kernel.fa3.features import features_of
from jit_kernel.fa3.seam import FUNCTIONS as CPU
from tests.support import case_run, case_tensors, cases, reference
from tests.support.mate_signatures import VERSIONS, wrapper_signatures
from tests.support.musa_calls import decode_call, metadata_of
from tests.support.musa_device import Machine, machine, on_musa, to_musa

NAMES = (cases.VARLEN, cases.KVCACHE, cases.DENSE)
FUNCTIONS = {name: on_musa(name) for name in NAMES}
# MATE computes in half precision, in its own pairs of head sizes, without qv (but MLA decode) and fp8; rows behind the
# last sequence are whatever its own buffer held.
NEVER = frozenset(("qv", "only_qv", "descale_expanded", "odd_head_size", "tail", "draft_mask", "deterministic"))
SINCE = {"0.2.0": ("append", "new_ragged"), "0.2.1": ("rotary", "batch_idx", "leftpad"), "0.2.2": ("chunk",)}
COUNTS = {"0.2.2": 300, "0.2.1": 60, "0.2.0": 60, "0.1.3": 60}


def space(version: str) -> cases.Space:
    missing = {name for since, names in SINCE.items() if version < since for name in names}
    return dataclasses.replace(
        cases.CPU,
        name=f"musa {version}",
        dtypes=(torch.bfloat16, torch.float16),
        head_dims=((64, 64), (128, 128), (192, 128), (192, 192), (256, 256), (80, 80), (512, 512)),
        any_head_dim=0,
        features=cases.FEATURES - NEVER - missing,
        lengths=(24, 80, 200),
    )


@pytest.fixture(params=VERSIONS)
def stack(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machine]:
    with machine(tmp_path / "site", CPU, request.param) as found:
        yield found


@pytest.fixture
def newest(tmp_path: Path) -> Iterator[Machine]:
    with machine(tmp_path / "site", CPU) as found:
        yield found


def test_random_calls_obey_the_numeric_rule(stack: Machine, say: list[str]) -> None:
    served, refused, worst, signatures = 0, 0, 0.0, wrapper_signatures(stack.version)
    for seed in range(COUNTS[stack.version]):
        plan = cases.draw(seed, space(stack.version))
        with case_run.one_thread():
            case = case_tensors.build(plan)
        if stack.version == "0.1.3" and plan.function == cases.VARLEN and plan.k_layout == "paged":
            with pytest.raises(NotImplementedError, match=r"page_table is there since 0\.2\.0"):
                FUNCTIONS[plan.function](**case.arguments)
            refused += 1
            continue
        outs, lses = case_run.run(case, FUNCTIONS)
        with case_run.one_thread():
            shares = reference.check(outs, lses, case.problem)
        assert shares.worst <= 1.0, f"{shares}\n{case.describe()}"
        served, worst = served + 1, max(worst, shares.worst)
    assert served >= COUNTS[stack.version] // 2
    for name, arguments in stack.given:
        signatures[name].bind(**arguments)
    assert not any(stack.grad_enabled)
    paths = {call.path for call in stack.mate.calls}
    assert paths == {"jit", "mubin"}
    say.append(f"MATE {stack.version}: {served} calls served, {refused} refused, worst share {worst:.2f}")


def test_calls_made_for_the_oldest_version_bind_to_all(tmp_path: Path) -> None:
    with machine(tmp_path / "site", CPU, "0.1.3") as oldest:
        for seed in range(40):
            plan = cases.draw(seed, space("0.1.3"))
            if plan.k_layout != "paged" or plan.function != cases.VARLEN:
                case_run.run(case_tensors.build(plan), FUNCTIONS)
        assert len(oldest.given) >= 30
        for version in VERSIONS:
            signatures = wrapper_signatures(version)
            for name, arguments in oldest.given:
                signatures[name].bind(**arguments)


@pytest.mark.parametrize(
    ("feature", "arguments"),
    [
        ("new k and v", {"new": True}),
        ("rotary_cos", {"new": True, "rotary": True}),
        ("cache_batch_idx", {"batch_idx": True}),
        ("cache_leftpad", {"leftpad": True}),
        ("attention_chunk", {"attention_chunk": 3}),
    ],
)
def test_versions_without_a_feature_say_so(stack: Machine, feature: str, arguments: dict[str, object]) -> None:
    call = decode_call(batch=2, sq=3, keys=9)
    if arguments.get("new"):
        call |= {"k": call["k_cache"][:, :3].clone(), "v": call["v_cache"][:, :3].clone()}
    if arguments.get("rotary"):
        call |= {"rotary_cos": torch.ones(16, 8, dtype=call["q"].dtype)}
        call |= {"rotary_sin": torch.zeros(16, 8, dtype=call["q"].dtype)}
    if arguments.get("batch_idx"):
        call |= {"cache_batch_idx": torch.tensor([1, 0], dtype=torch.int32)}
    if arguments.get("leftpad"):
        call |= {"cache_leftpad": torch.tensor([1, 2], dtype=torch.int32)}
    call |= {"attention_chunk": arguments.get("attention_chunk", 0)}
    since = {"new k and v": "0.2.0", "attention_chunk": "0.2.2"}.get(feature, "0.2.1")
    if arguments.get("new") and stack.version < "0.2.0":
        feature = "new k and v"
        since = "0.2.0"
    if stack.version < since:
        with pytest.raises(NotImplementedError, match=f"{feature}: MATE has it since {since}, this is {stack.version}"):
            FUNCTIONS[cases.KVCACHE](**call)
    else:
        assert FUNCTIONS[cases.KVCACHE](**call).isfinite().all()


def mla_call(ragged: bool) -> tuple[dict[str, object], reference.Problem]:
    """MLA decode in its absorbed form: pages of 64, q of 64, values of 512."""
    random = torch.Generator().manual_seed(3)
    lengths, rows = [70, 3, 129], [2, 2, 2]
    pages, table = 9, torch.tensor([[4, 1, 0], [7, 0, 0], [2, 3, 8]], dtype=torch.int32)
    k = torch.randn(pages, 64, 1, 64, generator=random).bfloat16()
    v = torch.randn(pages, 64, 1, 512, generator=random).bfloat16()
    q = torch.randn(sum(rows), 16, 64, generator=random).bfloat16()
    qv = torch.randn(sum(rows), 16, 512, generator=random).bfloat16()
    sequences = []
    for i, n in enumerate(lengths):
        gathered = [x[table[i].long()].flatten(0, 1)[:n] for x in (k, v)]
        sequences.append(reference.Sequence(q[2 * i : 2 * i + 2], *gathered, qv[2 * i : 2 * i + 2]))
    call: dict[str, object] = {"k_cache": k, "v_cache": v, "page_table": table, "causal": True}
    call |= {"cache_seqlens": torch.tensor(lengths, dtype=torch.int32), "return_softmax_lse": True}
    if ragged:
        call |= {"q": q, "qv": qv, "max_seqlen_q": 2, "cu_seqlens_q": torch.tensor([0, 2, 4, 6], dtype=torch.int32)}
    else:
        call |= {"q": q.reshape(3, 2, 16, 64), "qv": qv.reshape(3, 2, 16, 512)}
    return call, reference.Problem(sequences, causal=True)


@pytest.mark.parametrize("ragged", [True, False])
def test_mla_decode(newest: Machine, ragged: bool) -> None:
    call, problem = mla_call(ragged)
    out, lse = FUNCTIONS[cases.KVCACHE](**call)
    assert newest.mate.calls[-1].path == "mla"
    assert lse.shape == ((16, 6) if ragged else (3, 16, 2))  # not MATE's (b, sq, hq)
    if not ragged:
        out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
    outs, lses = [out[2 * i : 2 * i + 2] for i in range(3)], [lse[:, 2 * i : 2 * i + 2] for i in range(3)]
    assert reference.check(outs, lses, problem).worst <= 1.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window_size", (5, 0)),
        ("softcap", 2.0),
        ("sinks", torch.zeros(16)),
        ("attention_chunk", 8),
        ("cache_leftpad", torch.zeros(3, dtype=torch.int32)),
        ("cache_batch_idx", torch.arange(3, dtype=torch.int32)),
    ],
)
def test_mla_decode_refuses_what_mate_ignores(newest: Machine, name: str, value: object) -> None:
    with pytest.raises(NotImplementedError, match=f"{name} with qv: MATE's MLA decode ignores it"):
        FUNCTIONS[cases.KVCACHE](**mla_call(True)[0], **{name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float32}, "fp32: MATE computes in bf16 and fp16 only"),
        ({"d": 576, "dv": 512}, "576/512: MATE rounds sizes above 512 down to 512"),
        ({"d": 128, "dv": 64}, "128/64: MATE rounds up to 128/64 and serves 64/64, 128/128"),
        ({"num_splits": 129}, "num_splits is 129; on musa it must be at most 128"),
    ],
)
def test_refusals(newest: Machine, change: dict[str, object], message: str) -> None:
    d, dv = change.get("d", 64), change.get("dv", 64)
    dtype = change.get("dtype", torch.bfloat16)
    q, k = (torch.zeros(1, 4, 2, d, dtype=dtype) for _ in "qk")
    more = {"num_splits": change["num_splits"]} if "num_splits" in change else {}
    with pytest.raises((NotImplementedError, ValueError), match=message):
        FUNCTIONS[cases.DENSE](q=q, k=k, v=torch.zeros(1, 4, 2, dv, dtype=dtype), **more)


def test_fp8_and_descales_are_refused(newest: Machine) -> None:
    q = torch.zeros(1, 4, 2, 64).to(torch.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match="e4m3: MATE computes in bf16 and fp16 only"):
        FUNCTIONS[cases.DENSE](q=q, k=q, v=q, k_descale=torch.ones(1, 2))


def test_decide_agrees_with_the_call(newest: Machine) -> None:
    """Dispatch and `why` get the same decision as a call."""
    target = Target("musa", "mp_31")
    for seed in range(150):
        plan = cases.draw(seed, dataclasses.replace(cases.CPU, lengths=(8, 12, 16)))
        case = case_tensors.build(plan)
        parameters = inspect.signature(getattr(fa3, plan.function)).parameters.values()
        arguments = {parameter.name: parameter.default for parameter in parameters} | case.arguments
        call = Call(*calls.of(plan.function, arguments))
        call.attention_chunk = call.attention_chunk or 0
        accepted = isinstance(musa.decide(target, features_of(call)), Accepted)
        try:
            FUNCTIONS[plan.function](**case.arguments)
        except NotImplementedError:
            # The dense and ragged functions take no qv at all, which their features do not tell.
            assert not accepted or plan.qv, case.describe()
        else:
            assert accepted, case.describe()


def test_metadata_belongs_to_its_call(newest: Machine) -> None:
    """Made for another batch it is refused by its length; made for this one it is used."""
    call = decode_call(batch=4, sq=1, keys=40)
    metadata = metadata_of(call)
    assert metadata.shape == (24 + 8 * 4,)
    kvcache = getattr(fa3, cases.KVCACHE)
    with_it = kvcache(**to_musa(call), scheduler_metadata=metadata)
    assert newest.mate.calls[-1].compiled_for["has_metadata"]
    assert torch.equal(with_it.inner, kvcache(**to_musa(call)).inner)
    smaller = {name: x[:2] if isinstance(x, torch.Tensor) else x for name, x in call.items()}
    with pytest.raises(ValueError, match=r"on musa it must be \(40,\) for 2 sequences"):
        kvcache(**to_musa(smaller), scheduler_metadata=metadata)


def test_windows_take_metadata_that_knows_of_them_or_none(stack: Machine) -> None:
    """Before 0.2.1 MATE's metadata counted without windows: the double refuses it in a call with one."""
    call = decode_call(batch=2, sq=1, keys=40)
    metadata = metadata_of(call, causal=False, window_size=(8, 0))
    call |= {"causal": False, "window_size": (8, 0)}
    out = getattr(fa3, cases.KVCACHE)(**to_musa(call), scheduler_metadata=metadata)
    assert torch.equal(out.inner, CPU[cases.KVCACHE](**call, softmax_scale=1 / 8))
    assert stack.mate.calls[-1].compiled_for["has_metadata"] == (stack.version >= "0.2.1")
    assert len(stack.kernels.issued) == (stack.version >= "0.2.1")


def test_empty_calls(newest: Machine) -> None:
    """No keys: 0 and -inf, or the sink; no queries: nothing. MATE's prebuilt kernels refuse both."""
    q, none = torch.ones(3, 2, 64).bfloat16(), torch.zeros(0, 2, 64).bfloat16()
    cu, zero = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([0, 0], dtype=torch.int32)
    call = {"q": q, "k": none, "v": none, "cu_seqlens_q": cu, "cu_seqlens_k": zero, "max_seqlen_q": 3}
    call |= {"max_seqlen_k": 0, "return_softmax_lse": True}
    out, lse = FUNCTIONS[cases.VARLEN](**call)
    assert not out.count_nonzero()
    assert (lse == -math.inf).all()
    out, lse = FUNCTIONS[cases.VARLEN](**call, sinks=torch.tensor([0.5, 1.0]))
    assert not out.count_nonzero()
    assert lse.tolist() == [[0.5] * 3, [1.0] * 3]
    out = FUNCTIONS[cases.VARLEN](**call | {"q": none, "cu_seqlens_q": zero, "return_softmax_lse": False})
    assert out.shape == (0, 2, 64)


@pytest.mark.parametrize("name", ["flash_attn_combine", "merge_state"])
def test_combining_agrees_with_the_cpu(newest: Machine, name: str) -> None:
    random = torch.Generator().manual_seed(1)
    parts, lse = torch.randn(3, 7, 4, 64, generator=random), torch.randn(3, 7, 4, generator=random) * 3
    lse[0, :2], lse[:, 5], parts[0, :2] = -math.inf, -math.inf, math.nan
    if name == "flash_attn_combine":
        arguments = {"out_partial": parts, "lse_partial": lse}
    else:
        by_head = [x.t().contiguous() for x in (lse[0], lse[1])]
        arguments = {"out_a": parts[0], "lse_a": by_head[0], "out_b": parts[1], "lse_b": by_head[1]}
    ours, cpu = on_musa(name)(**arguments), getattr(fa3, name)(**arguments)
    for mine, theirs in zip(ours, cpu, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_checked_metadata_names_the_parameter_that_differs(newest: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """JIT_KERNEL_CHECK_INDICES=1 compares the header, which costs a synchronisation."""
    call = decode_call(batch=2, sq=1, keys=40)
    monkeypatch.setenv("JIT_KERNEL_CHECK_INDICES", "1")
    config.reload()
    kvcache = getattr(fa3, cases.KVCACHE)
    try:
        kvcache(**to_musa(call), scheduler_metadata=metadata_of(call))
        for change, parameter in (({"causal": False}, "causal = 0"), ({"num_heads_q": 8}, "num_heads_q = 8")):
            with pytest.raises(ValueError, match=f"scheduler_metadata was made with {parameter}"):
                kvcache(**to_musa(call), scheduler_metadata=metadata_of(call, **change))
        with pytest.raises(ValueError, match="max_seqlen_k = 4096; it must be at most 47"):
            kvcache(**to_musa(call), scheduler_metadata=metadata_of(call, max_seqlen_k=4096))
    finally:
        monkeypatch.undo()
        config.reload()
