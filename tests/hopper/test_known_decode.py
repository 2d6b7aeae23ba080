"""Decode calls that the Hopper launcher checks itself, without a GPU: the launcher compiled for the CPU's tensors.

It must launch what the checked way launches, to the last bit of the parameters, and decline what the checks refuse.
"""

from __future__ import annotations

import dataclasses
import itertools
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from jit_kernel.device import Target
from jit_kernel.engine import compiler
from jit_kernel.fa3 import call as calls
from jit_kernel.fa3 import hopper
from jit_kernel.fa3.call import result_dtype
from jit_kernel.fa3.checks import call as checks
from jit_kernel.fa3.checks import shapes
from jit_kernel.fa3.decision import Rejected
from jit_kernel.fa3.features import features_of
from jit_kernel.fa3.hopper import decode, known
from tests.support import case_tensors, cases, decode_double, odd_tensors
from tests.support.decode_double import OnHost, fields, halved
from tests.support.malformed_calls import CASES, Malformed
from tests.support.valid_calls import FUNCTIONS, Call, ints, plain_cache, plain_paged_cache

SPACE = decode_double.space("known decode")
TARGET = Target("cuda", "sm_90a")


@pytest.fixture(scope="module")
def double() -> OnHost:
    try:
        compiler.require("host")
    except compiler.CompilerNotFoundError as error:
        pytest.skip(str(error))
    return OnHost()


@pytest.fixture(autouse=True)
def on_host(double: OnHost, monkeypatch: pytest.MonkeyPatch) -> OnHost:
    """The double in place of the launcher, and checks that read the values of no index tensor, as on a GPU."""
    torch.manual_seed(0)
    for name in ("_decode", "_asks_first", "_asks_for_more"):
        monkeypatch.setattr(known, name, getattr(known, name))
    known.serve(double.known_decode)
    monkeypatch.setattr(decode.kernels, "kernels_of", lambda device: double)
    check = shapes.check
    monkeypatch.setattr(shapes, "check", lambda call: dataclasses.replace(check(call), on_host=False))
    monkeypatch.setattr(checks, "_passed", {})
    return double


def taken(arguments: Call, double: OnHost) -> bool:
    """Whether the launcher takes an unchecked call; if so it launches once, else not at all."""
    before = double.launches()
    result = known.try_unchecked(fields(arguments))
    assert double.launches() == before + (result is not None)
    return result is not None


def served() -> Call:
    """A call with every argument that may come with it."""
    call = halved(plain_paged_cache())
    call |= {"out": torch.zeros(3, 4, 32).bfloat16(), "sinks": torch.randn(4), "window_size": (3, 1), "softcap": 8.0}
    call |= {"cu_seqlens_k_new": ints(0, 1, 2), "scheduler_metadata": torch.zeros(40).int(), "pack_gqa": True}
    return call | {"softmax_scale": 0.3, "attention_chunk": 7, "causal": True, "sm_margin": 3, "num_splits": 4,
                   "deterministic": True}  # fmt: skip


BASES: dict[str, Callable[[], Call]] = {
    "dense": lambda: halved(plain_cache()),
    "paged": lambda: halved(plain_paged_cache()) | {"out": torch.zeros(3, 4, 32).bfloat16()},
    "all": served,
}
each_base = pytest.mark.parametrize("base", BASES)


@each_base
def test_the_calls_that_are_malformed_are_served(base: str, on_host: OnHost) -> None:
    assert taken(BASES[base](), on_host)


def parameters(way: Callable[[], Any], double: OnHost) -> bytes:
    """What one launch of a way gives its kernel."""
    before = double.launches()
    assert way() is not None
    assert double.launches() == before + 1
    return bytes(double.parameters())


def test_random_calls_are_launched_as_by_the_checked_way(on_host: OnHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """All parameters and the grid; a result or lse that nobody gave lies in the same memory for both."""
    used: list[cases.Plan] = []
    rows: set[int] = set()
    for seed in range(1300):
        plan = cases.draw(seed, SPACE)
        arguments = case_tensors.build(plan).arguments
        call = checks.checked(fields(arguments))
        key = decode.key_of(call)
        if key is None or isinstance(arguments.get("cache_seqlens"), int) or 0 in call.q.shape or not plan.lengths_q:
            continue
        if plan.key_dtype is cases.FP8 and isinstance(hopper.decide(TARGET, features_of(call)), Rejected):
            continue  # rows of e4m3 that begin at no multiple of 16 bytes
        if plan.sinks == "inputs" and plan.dtype is cases.FP8:
            assert not taken(arguments, on_host)  # Python makes float32 of them
            continue
        if plan.key_dtype is cases.FP8 and calls.widens(call):
            assert not taken(arguments, on_host)  # prefill's, on rows made 16 bits
            continue
        out = torch.empty(*call.q.shape[:-1], call.v.shape[-1], dtype=result_dtype(call.q.dtype))
        lse = torch.empty(call.q.shape[:-1])
        lse = lse.transpose(-1, -2).contiguous()
        with monkeypatch.context() as patch:
            for module, name, made in (
                (known, "empty_like", out), (known, "empty", lse), (decode.calls, "new_result", out),
            ):  # fmt: skip
                patch.setattr(module, name, lambda *_, made=made, **__: made)
            patch.setattr(decode.calls, "new_lse", lambda call, lse=lse: lse if call.return_softmax_lse else None)
            expected = parameters(lambda call=call, key=key: decode.attend(call, key, only_known=True), on_host)
            found = parameters(lambda a=arguments: known.try_unchecked(fields(a)), on_host)
        assert found == expected, plan
        used.append(plan)
        rows.add(key[2])
    assert len(used) > 500
    assert rows == {8, 16, 32, 64}
    counted = cases.coverage(used)
    assert counted["float8_e4m3fn"] > 50
    for feature in decode_double.FEATURES - {"hot", "large"}:
        assert counted[feature] > 10, feature


def error_of(call: Callable[[], Any]) -> str:
    """What it raises of the checks' errors, empty where it raises none."""
    try:
        call()
    except (TypeError, ValueError, NotImplementedError) as error:
        return str(error)
    return ""


def assert_declined(arguments: Call, refused: str, double: OnHost) -> None:
    """Nothing is launched; of window_size the error is the one that the checks raise."""
    before, results = double.launches(), []
    raised = error_of(lambda: results.append(known.try_unchecked(fields(arguments))))
    assert double.launches() == before
    assert raised == refused if "window_size" in raised else (raised, results) == ("", [None])


KVCACHE = {base for base, function in FUNCTIONS.items() if function.__name__ == "flash_attn_with_kvcache"}


@pytest.mark.parametrize("case", [case for case in CASES if case.base in KVCACHE], ids=str)
def test_what_the_checks_refuse_is_declined(case: Malformed, on_host: OnHost) -> None:
    """On a GPU they refuse what shapes, types and numbers say, and read no index."""
    arguments = halved(case.make())
    refused = error_of(lambda: checks.checked(fields(arguments)))
    if not refused:
        pytest.skip("on a GPU only the kernel could see it")
    assert_declined(arguments, refused, on_host)


def odd() -> Iterator[tuple[str, str, str]]:
    kinds = (*odd_tensors.REFUSED, "negated", "wrapped", "named", "gradient", "dual", "nested")
    yield from (
        (base, name, kind)
        for base, make in BASES.items()
        for name, value in make().items()
        if isinstance(value, Tensor)
        for kind in kinds
        if value.is_floating_point() or kind not in ("gradient", "dual", "nested")
    )


@pytest.mark.parametrize(("base", "name", "kind"), list(odd()))
def test_tensors_that_are_no_plain_memory_are_declined(base: str, name: str, kind: str, on_host: OnHost) -> None:
    arguments = BASES[base]()
    x = arguments[name]
    if kind in odd_tensors.REFUSED:
        arguments[name] = odd_tensors.REFUSED[kind][1](x)
    elif kind == "negated":
        arguments[name] = odd_tensors.negated(x)
    elif kind == "wrapped":
        arguments[name] = odd_tensors.Wrapped(x)
    elif kind == "named":
        arguments[name] = x.as_subclass(odd_tensors.Named)
    elif kind == "gradient":
        arguments[name] = x.requires_grad_()
    elif kind == "nested":
        arguments[name] = torch.nested.nested_tensor(list(x.float())) if x.dim() > 1 else x.to_sparse()
    else:
        with forward_ad.dual_level():
            arguments[name] = forward_ad.make_dual(x, torch.zeros_like(x))
            assert not taken(arguments, on_host)
        return
    unread = name in ("cu_seqlens_k_new", "scheduler_metadata") and kind == "negated"
    assert taken(arguments, on_host) is unread


def _own(name: str, made: Callable[[Tensor], Any]) -> Callable[[Call], Call]:
    return lambda call: call | {name: made(call[name])}


def half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def _inside(name: str, of: str) -> Callable[[Call], Call]:
    """`name` in the memory that `of` begins with."""

    def change(call: Call) -> Call:
        x = call[name]
        memory = call[of] if call[of].numel() * call[of].element_size() >= x.numel() * 2 else torch.zeros(4096)
        shared = torch.empty(0, dtype=x.dtype).set_(memory.untyped_storage())
        return call | {name: shared[: x.numel()].view(x.shape), of: memory if memory is call[of] else memory[:4]}

    return change


# Of the call with all arguments.
DECLINED: dict[str, Callable[[Call], Call]] = {
    "an int for all lengths": lambda call: call | {"cache_seqlens": 5},
    "lengths of another dtype": _own("cache_seqlens", lambda t: t.long()),
    "a table of another dtype": _own("page_table", lambda t: t.long()),
    "no splits": lambda call: call | {"num_splits": 1},
    "too many splits": lambda call: call | {"num_splits": 257},
    "a bool for splits": lambda call: call | {"num_splits": True},
    "softcap as an int": lambda call: call | {"softcap": 8},
    "only_qv as a number": lambda call: call | {"only_qv": 0},
    "pack_gqa as a number": lambda call: call | {"pack_gqa": 1},
    "rotary_interleaved as a number": lambda call: call | {"rotary_interleaved": 1},
    "an array": _own("cache_seqlens", lambda t: t.numpy()),
    "cache_batch_idx": lambda call: call | {"cache_batch_idx": ints(1, 0)},
    "cache_leftpad": lambda call: call | {"cache_leftpad": ints(0, 0)},
    "draft_mask": lambda call: call | {"draft_mask": ints(1, 2, 3)[:, None]},
    "descale": lambda call: call | {"k_descale": torch.ones(2, 2)},
    "qv": lambda call: call | {"qv": torch.zeros(3, 4, 32).bfloat16()},
    "new keys": lambda call: call | {"k": torch.zeros(2, 2, 32).bfloat16(), "v": torch.zeros(2, 2, 32).bfloat16()},
    "more rows than any kernel has": lambda call: call | {"max_seqlen_q": 33},
    "a negative bound": lambda call: call | {"max_seqlen_q": -1},
    "a bound that no int32 holds": lambda call: call | {"max_seqlen_q": 2**31},
    "rows that are not aligned": _own("q", lambda t: torch.zeros(3, 4, 36).bfloat16()[..., :32]),
    "an address that is not aligned": _own("out", lambda t: torch.zeros(3 * 4 * 32 + 1).bfloat16()[1:].view(3, 4, 32)),
    "no out for another head size": lambda call: call | {"out": None, "v_cache": torch.zeros(8, 4, 2, 16).bfloat16()},
    "heads that are no multiple": lambda call: call | {"q": half(3, 3, 32), "out": None, "sinks": None},
    "keys of another head size": _own("k_cache", lambda t: half(8, 4, 2, 40)),
    "values in smaller pages": _own("v_cache", lambda t: half(8, 3, 2, 32)),
    "fewer values": _own("v_cache", lambda t: t[:7]),
    "values of one head": _own("v_cache", lambda t: t[:, :, :1]),
    "out of another head size": _own("out", lambda t: half(3, 4, 40)),
    "out of fewer rows": _own("out", lambda t: t[:2]),
    "a head size that is no multiple of 8": lambda call: (
        call | {"q": half(3, 4, 40)[..., :36], "k_cache": half(8, 4, 2, 40)[..., :36]}
    ),
    "values whose head size is none": lambda call: (
        call | {"v_cache": half(8, 4, 2, 40)[..., :36], "out": half(3, 4, 40)[..., :36]}
    ),
    "head sizes above 256": lambda call: call | {"q": half(3, 4, 264), "k_cache": half(8, 4, 2, 264)},
    "lengths with gaps": _own("cache_seqlens", lambda t: ints(7, 0, 5, 0)[::2]),
    "a table with gaps in its rows": _own("page_table", lambda t: ints(*range(8)).view(2, 4)[:, ::2]),
    "too many lengths": _own("cache_seqlens", lambda t: ints(7, 5, 1)),
    "metadata in rows": _own("scheduler_metadata", lambda t: t.view(2, 20)),
    "a dense cache for more sequences": lambda call: call | {"page_table": None},
    "fp32": _own("q", lambda t: t.float()),
    "keys in fp16": _own("k_cache", lambda t: t.half()),
    "sinks in fp16": _own("sinks", lambda t: t.half()),
    "sinks with gaps": _own("sinks", lambda t: torch.zeros(8)[::2]),
    "too few sinks": _own("sinks", lambda t: t[:2]),
    "metadata in floats": _own("scheduler_metadata", lambda t: t.float()),
    "too many offsets": _own("cu_seqlens_k_new", lambda t: ints(0, 1, 2, 3)),
    "out is expanded": _own("out", lambda t: t[:1].expand(3, 4, 32)),
    "out is q": lambda call: call | {"out": call["q"]},
    "out lies in the keys": _inside("out", "k_cache"),
    "out lies in the values": _inside("out", "v_cache"),
    "the lengths lie in out": lambda call: call | {"cache_seqlens": call["out"].view(-1).view(torch.int32)[5:7]},
    "the table lies in out": lambda call: (
        call | {"page_table": call["out"].view(-1).view(torch.int32)[-4:].view(2, 2)}
    ),
    "the sinks lie in out": lambda call: call | {"sinks": call["out"].view(-1).view(torch.float32)[:4]},
    "the offsets lie in out": lambda call: (
        call | {"cu_seqlens_q": call["out"].view(-1).view(torch.int32)[:3]}
    ),
    "metadata lies in out": lambda call: call | {"scheduler_metadata": call["out"].view(-1).view(torch.int32)},
    "a table that is too wide": lambda call: call | {"page_table": ints(0).expand(2, 2**30)},
    "no keys at all": lambda call: call | {"k_cache": call["k_cache"][:0], "v_cache": call["v_cache"][:0]},
}  # fmt: skip


@pytest.mark.parametrize("name", DECLINED)
def test_what_is_declined(name: str, on_host: OnHost) -> None:
    assert not taken(DECLINED[name](served()), on_host)


ALSO_SERVED: dict[str, Callable[[Call], Call]] = {
    "a list for a window": lambda call: call | {"window_size": [3, None]},
    "no chunk": lambda call: call | {"attention_chunk": None},
    "sinks as a parameter": _own("sinks", lambda t: Parameter(t, requires_grad=False)),
    "sinks in the inputs' dtype": _own("sinks", Tensor.bfloat16),
    "rows of a table with gaps": _own("page_table", lambda t: torch.zeros(2, 5).int()[:, :2]),
    "out with gaps": _own("out", lambda t: torch.zeros(3, 4, 64).bfloat16()[..., :32]),
    "no out": lambda call: call | {"out": None, "return_softmax_lse": True},
    "no bound": lambda call: call | {"max_seqlen_q": None},
}


@pytest.mark.parametrize("name", ALSO_SERVED)
def test_what_is_served_besides(name: str, on_host: OnHost) -> None:
    assert taken(ALSO_SERVED[name](served()), on_host)


def test_a_bound_below_qs_own_length_is_declined_and_refused(on_host: OnHost) -> None:
    """Without cu_seqlens_q no index has to be read to know it; a kernel for fewer rows would leave some out."""
    for longest, expected in ((1, False), (2, True), (16, True), (17, True), (32, True), (33, False)):
        assert taken(BASES["dense"]() | {"max_seqlen_q": longest}, on_host) is expected, longest
    for below in (0, 1):
        with pytest.raises(ValueError, match=f"max_seqlen_q is {below}; it must be between 2 and"):
            checks.checked(fields(BASES["dense"]() | {"max_seqlen_q": below}))


def test_gradients_are_declined_in_grad_mode_alone(on_host: OnHost) -> None:
    arguments = served()
    arguments["sinks"].requires_grad_()
    assert not taken(arguments, on_host)
    with torch.no_grad():
        assert taken(arguments, on_host)


def test_a_captured_launch_that_needs_room_is_declined(on_host: OnHost) -> None:
    """Of four sequences and key heads or more a cluster each takes one, and merges without room."""
    of_clusters = BASES["dense"]()
    one = of_clusters | {name: of_clusters[name][:1] for name in ("q", "k_cache", "v_cache", "cache_seqlens", "out")}
    assert taken(one, on_host)
    on_host.set_capturing(True)
    try:
        assert not taken(one, on_host)
        assert taken(of_clusters, on_host)
    finally:
        on_host.set_capturing(False)


def test_a_kernel_that_is_not_loaded_is_declined(on_host: OnHost) -> None:
    """The double has those of one device alone; before any is loaded there is no launcher."""
    known.serve(lambda *_: 0)
    assert not taken(served(), on_host)
    known._decode = None
    assert not taken(served(), on_host)


def test_of_a_low_address_torch_is_asked(on_host: OnHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the address of a tensor without memory, its offset into none, may lie."""
    flag = 0x40  # MAP_32BIT of Linux on x86
    memory = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flag)
    low = torch.frombuffer(memory, dtype=torch.bfloat16)[: 3 * 4 * 32].view(3, 4, 32)
    if low.data_ptr() >= 1 << 44:
        pytest.skip("this machine maps no memory so low")
    asked: list[object] = []
    monkeypatch.setattr(known, "all_in_memory", lambda tensors: asked.append(tensors) or True)
    assert taken(served(), on_host)
    assert not asked
    assert taken(served() | {"q": low}, on_host)
    assert len(asked) == 1
    assert taken(served() | {"q": low}, on_host)
    monkeypatch.setattr(known, "all_in_memory", lambda tensors: False)
    assert not taken(served() | {"q": low}, on_host)


def test_only_calls_of_a_cache_are_asked_for(on_host: OnHost) -> None:
    arguments = fields(served())
    assert known.try_unchecked(arguments) is not None
    for function in ("flash_attn_varlen_func", "flash_attn_func"):
        assert known.try_unchecked((function, *arguments[1:])) is None


def test_every_argument_of_another_type_is_declined(on_host: OnHost) -> None:
    """Whatever stands in an argument's place: nothing is launched, and nothing but window_size raises."""
    things = ("text", object(), 1.5, True, [1, 2], torch.zeros(2), torch.zeros(()), 10**400, float("nan"), b"")
    arguments = served()
    for name, thing in itertools.product(decode_double._PARAMETERS, things):
        changed = arguments | {name: thing}
        refused = error_of(lambda call=changed: checks.checked(fields(call)))
        if refused:
            assert_declined(changed, refused, on_host)
