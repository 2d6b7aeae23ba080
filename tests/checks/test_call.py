"""The canonical call: every argument arrives under its one name, and what is new is declined until it is claimed."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

import jit_kernel
from jit_kernel import flash_attention_v3, jit
from jit_kernel.device import Target, cpu_target
from jit_kernel.fa3 import call as calls
from jit_kernel.fa3 import cpu, dispatch, features, hopper, portable, seam
from jit_kernel.fa3.call import Call, MetadataParameters
from jit_kernel.fa3.checks.call import checked
from jit_kernel.fa3.cpu import known
from jit_kernel.fa3.decision import Accepted, Rejected
from jit_kernel.fa3.hopper import known as known_decode
from jit_kernel.fa3.musa import rules

ATTENTION = (calls.VARLEN, calls.KVCACHE, calls.DENSE)
HOPPER = Target("cuda", "sm_90a")


def sentinels(function: str) -> dict[str, object]:
    """An object of its own for each argument."""
    return {name: f"<{name}>" for name in inspect.signature(getattr(jit_kernel, function)).parameters}


@pytest.mark.parametrize("function", ATTENTION)
def test_every_argument_arrives_in_its_field(function, monkeypatch):
    """The public function and the keyword-only one put each argument where calls.of, by names, puts it."""
    seen = []
    monkeypatch.setattr(seam, "attend_checked", seen.append)
    given = sentinels(function)
    getattr(jit_kernel, function)(*given.values())
    seam.FUNCTIONS[function](**given)
    expected = calls.of(function, given)
    assert seen[0] == expected[: len(seen[0])]
    assert Call(*seen[0]) == Call(*seen[1]) == Call(*expected)
    named = {calls.FIELD_OF[function].get(name, name) for name in given}
    assert {each.name for each in fields(Call) if str(getattr(Call(*expected), each.name)).startswith("<")} == named


def test_every_parameter_of_the_metadata_arrives(monkeypatch):
    seen = []
    monkeypatch.setattr(seam, "plan", seen.append)
    given = sentinels("get_scheduler_metadata")
    jit_kernel.get_scheduler_metadata(*given.values())
    seam.FUNCTIONS["get_scheduler_metadata"](**given)
    assert seen[0].arguments() == seen[1].arguments() == given


def test_metadata_for_other_numbers_is_another_and_for_other_lengths_is_not():
    lengths = torch.tensor([3], dtype=torch.int32)
    one = MetadataParameters(1, 1, 8, 4, 2, 64, lengths)
    assert one == replace(one, cache_seqlens=lengths + 1)
    assert one != replace(one, max_seqlen_k=9)


def test_names_of_fields_are_the_public_ones_the_other_way_round():
    for function in ATTENTION:
        for name in sentinels(function):
            field = calls.FIELD_OF[function].get(name, name)
            assert calls.NAME_OF[function].get(field, field) == name


def tensor_call() -> tuple[object, ...]:
    q = torch.randn(1, 3, 2, 32)
    arguments = inspect.signature(jit_kernel.flash_attn_with_kvcache).parameters.values()
    given = {p.name: p.default for p in arguments} | {"q": q, "k_cache": q.clone(), "v_cache": q.clone()}
    return calls.of(calls.KVCACHE, given | {"num_splits": 1})


# A value of each argument that asks for its feature.
ASKING: dict[str, object] = {
    "causal": True,
    "window_size": (3, 0),
    "attention_chunk": 4,
    "softcap": 2.0,
    "only_qv": True,
    "return_softmax_lse": True,
    "num_splits": 2,
    "deterministic": True,
}


def with_field(arguments: tuple[object, ...], name: str) -> tuple[object, ...]:
    place = calls.FIELDS.index(name)
    value = ASKING.get(name, torch.zeros(1, dtype=torch.int32))
    return (*arguments[:place], value, *arguments[place + 1 :])


@pytest.mark.parametrize("feature", features.ARGUMENTS)
def test_the_table_agrees_with_the_features_of_a_call(feature):
    """Each argument of the table sets its feature, or belongs to one that does."""
    first, *rest = features.ARGUMENTS[feature]
    arguments = with_field(tensor_call(), first)
    if feature == "ragged_append":
        arguments = with_field(arguments, "k_new")
    found = features.features_of(Call(*arguments))
    assert getattr(found, feature), f"{first} does not set {feature}"
    plain = features.features_of(Call(*tensor_call()))
    assert not getattr(plain, feature)
    for name in rest:
        assert name in calls.FIELDS


@pytest.mark.parametrize("feature", features.ARGUMENTS)
@pytest.mark.parametrize(
    "module", [known, hopper, known_decode, portable, rules], ids=lambda module: module.__name__[15:]
)
def test_a_fast_way_declines_what_is_not_claimed(module, feature):
    """By each argument of each feature, in both forms of a call."""
    claimed = module.CLAIMED
    for name in features.ARGUMENTS[feature]:
        arguments = with_field(tensor_call(), name)
        expected = feature not in claimed
        assert features.asks_for_more(claimed)(Call(*arguments)) is expected, name
        assert features.fields_ask_for_more(claimed, len(calls.FIELDS))(arguments) is expected, name
    assert not features.asks_for_more(claimed)(Call(*tensor_call()))


@pytest.fixture
def new_feature(monkeypatch):
    """A feature that no implementation has heard of, asked for by return_softmax_lse."""
    monkeypatch.setitem(features.ARGUMENTS, "new_feature", ("return_softmax_lse",))
    monkeypatch.setattr(features.Features, "new_feature", True, raising=False)


def never_launch(monkeypatch) -> None:
    """No kernel of Hopper's is launched by either way."""
    for name in ("prefill", "cached", "decode"):
        module = getattr(hopper, name)
        for function in {"attend", "try_attend"} & vars(module).keys():
            monkeypatch.setattr(module, function, lambda *given, **more: pytest.fail("it was launched"))


@pytest.mark.parametrize("function", [calls.DENSE, calls.KVCACHE])
def test_hopper_declines_a_new_feature_by_either_way(function, new_feature, monkeypatch):
    """try_known and decide read one table: no kernel of Hopper's is launched for what is new in it."""
    monkeypatch.setattr(hopper, "_asks_for_more", features.asks_for_more(hopper.CLAIMED))
    monkeypatch.setattr(hopper, "_cache_asks_for_more", features.asks_for_more(hopper.CLAIMED_WITH_CACHE))
    never_launch(monkeypatch)
    q = torch.empty(1, 8, 4, 128, dtype=torch.bfloat16)
    given = dense_arguments(q) if function == calls.DENSE else cache_arguments(q)
    call = checked(calls.of(function, given | {"return_softmax_lse": True}))
    assert hopper.try_known(call) is None
    decision = hopper.decide(HOPPER, features.features_of(call))
    assert isinstance(decision, Rejected)
    assert "return_softmax_lse" in decision.reason


def test_gpus_reject_a_new_feature_until_they_claim_it(new_feature):
    """Each by its own list, so that an argument that is added for one is never ignored by another."""
    plain = features.features_of(Call(*calls.of(calls.DENSE, dense_arguments(torch.empty(1, 8, 4, 128).bfloat16()))))
    for reject in (hopper.decide(HOPPER, plain), portable.decide(HOPPER, plain)):
        assert isinstance(reject, Rejected)
        assert "return_softmax_lse" in reject.reason
    assert "return_softmax_lse" in str(rules.rejection((0, 2, 2), plain))


def test_the_cpus_plain_way_declines_a_new_feature(monkeypatch):
    q = torch.randn(1, 3, 2, 32)
    plain, asking = dense_arguments(q), dense_arguments(q) | {"return_softmax_lse": True}
    jit_kernel.flash_attn_func(q, q, q)
    library = jit.load(cpu.kernels.forward_spec("fp32"), cpu_target())
    known.serve(torch.float32, library)
    assert known.try_unchecked(calls.of(calls.DENSE, asking)) is not None
    with monkeypatch.context() as patch:
        patch.setitem(features.ARGUMENTS, "new_feature", ("return_softmax_lse",))
        known.serve(torch.float32, library)
        assert known.try_unchecked(calls.of(calls.DENSE, asking)) is None
        assert known.try_unchecked(calls.of(calls.DENSE, plain)) is not None
    known.serve(torch.float32, library)


def test_hoppers_known_decode_declines_a_new_feature(monkeypatch):
    """The launcher is not even asked."""
    q = torch.zeros(1, 1, 2, 64, dtype=torch.bfloat16)
    given = {"q": q, "k_cache": q, "v_cache": q, "cache_seqlens": torch.ones(1, dtype=torch.int32), "out": q.clone()}
    names = inspect.signature(flash_attention_v3.flash_attn_with_kvcache).parameters
    defaults = {name: p.default for name, p in names.items() if p.default is not inspect.Parameter.empty}
    plain, asking = (calls.of(calls.KVCACHE, defaults | given | {"return_softmax_lse": lse}) for lse in (False, True))
    for name in ("_decode", "_asks_first", "_asks_for_more"):
        monkeypatch.setattr(known_decode, name, getattr(known_decode, name))
    known_decode.serve(lambda *_: 1)
    assert known_decode.try_unchecked(asking) is not None
    with monkeypatch.context() as patch:
        patch.setitem(features.ARGUMENTS, "new_feature", ("return_softmax_lse",))
        known_decode.serve(lambda *_: 1)
        assert known_decode.try_unchecked(asking) is None
        assert known_decode.try_unchecked(plain) is given["out"]


def dense_arguments(q: Tensor) -> dict[str, object]:
    parameters = inspect.signature(flash_attention_v3.flash_attn_func).parameters.values()
    return {p.name: p.default for p in parameters} | {"q": q, "k": q.clone(), "v": q.clone()}


def cache_arguments(q: Tensor) -> dict[str, object]:
    parameters = inspect.signature(flash_attention_v3.flash_attn_with_kvcache).parameters.values()
    return {p.name: p.default for p in parameters} | {"q": q, "k_cache": q.clone(), "v_cache": q.clone()}


def test_a_forced_implementation_is_asked_for_every_kind_of_call(monkeypatch):
    """Hopper does not refuse by itself, so that alone on a device it is never called without a decision."""
    assert not getattr(hopper, "REFUSES", False)
    made = dispatch.Dispatcher(HOPPER, (hopper,))
    monkeypatch.setattr(dispatch, "candidates", lambda target: ("hopper",))
    never_launch(monkeypatch)
    call = checked(calls.of(calls.DENSE, dense_arguments(torch.empty(1, 8, 4, 128, dtype=torch.bfloat16))))
    call.cache_leftpad = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="cache_leftpad"):
        made.attend(call)
    assert isinstance(dispatch.supports("hopper", HOPPER), Accepted)
