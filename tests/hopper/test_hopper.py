"""The Hopper kernels without a GPU: the compiler's report, the variants, and the calls that are served."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections import Counter

import pytest
import torch

import jit_kernel
from jit_kernel.device import Target
from jit_kernel.engine import nvrtc
from jit_kernel.fa3 import call as calls
from jit_kernel.fa3 import hopper
from jit_kernel.fa3.call import Call
from jit_kernel.fa3.decision import Accepted, Rejected
from jit_kernel.fa3.features import Features
from jit_kernel.fa3.hopper import kernels as hopper_kernels
from jit_kernel.fa3.hopper import prefill
from jit_kernel.jit import KernelSpec
from tests.support.hopper_variants import NAMED, NAMED_CACHED, NAMED_FP8, NAMED_MLA, TARGET, compile_spec

FP8 = torch.float8_e4m3fn
CALL = Features(
    dtype="bf16",
    kv_dtype="bf16",
    head_dim=128,
    head_dim_v=128,
    group=4,
    cache=False,
    aligned=True,
    ragged_q=True,
    ragged_k=True,
    page_size=0,
    seqused_q=False,
    seqused_k=False,
    append=False,
    ragged_append=False,
    rotary=False,
    cache_batch_idx=False,
    cache_leftpad=False,
    causal=True,
    window=False,
    chunk=False,
    softcap=False,
    qv=False,
    only_qv=False,
    descale=False,
    sinks=False,
    lse=False,
    split=False,
    metadata=False,
)


@pytest.mark.parametrize("fields", NAMED, ids=str)
def test_a_variant_compiles_without_spills_or_serialised_products(fields: tuple[str, int, int, bool, bool]) -> None:
    compiles_well(hopper_kernels.forward_spec(*fields))


@pytest.mark.parametrize(("head_dim", "masked", "prepared"), NAMED_FP8)
def test_a_kernel_in_e4m3_compiles_as_well(head_dim: int, masked: bool, prepared: bool) -> None:
    compiles_well(hopper_kernels.fp8_spec(head_dim, head_dim, masked, prepared))


@pytest.mark.parametrize("head_dim", hopper_kernels.PREPARED_HEAD_DIMS)
def test_the_kernel_that_prepares_values_compiles_as_well(head_dim: int) -> None:
    compiles_well(hopper_kernels.prepare_spec(head_dim))


@pytest.mark.parametrize("fields", NAMED_CACHED, ids=str)
def test_a_kernel_on_cached_keys_compiles_as_well(fields: tuple[str, int, int]) -> None:
    compiles_well(hopper_kernels.cached_spec(*fields))


@pytest.mark.parametrize("fields", NAMED_MLA, ids=str)
def test_an_mla_kernel_compiles_as_well(fields: tuple[str, int, int]) -> None:
    compiles_well(hopper_kernels.mla_spec(*fields))


def compiles_well(spec: KernelSpec) -> None:
    image, log = compile_spec(spec)
    assert image[:4] == b"\x7fELF"
    assert re.findall(r"\bC75\d\d\b.*", log) == []
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log) == [("0", "0")]


def test_a_source_that_does_not_compile_raises_with_the_compilers_message() -> None:
    with pytest.raises(nvrtc.NvrtcError, match="no storage class") as caught:
        nvrtc.compile_cubin("wrong", name="wrong.cu", architecture="sm_90a", include_dirs=[])
    assert "wrong.cu(1)" in caught.value.log


def test_the_whole_space_has_no_more_kernels_than_are_counted_here() -> None:
    specs = hopper.all_variants(TARGET)
    assert len(specs) == len(set(specs))
    counted = Counter(str(dict(spec.variant)["function"]) for spec in specs)
    expected = {"launcher": 1, "forward": 48, "forward_fp8": 8, "forward_cached": 12, "decode": 44, "append": 5}
    assert counted == {**expected, "mla": 18, "prepare_values": 1, "backward": 12, "widen": 1}
    assert {spec.route for spec in specs} == {"host", "cuda"}
    assert hopper.all_variants(Target("cuda", "sm_100")) == []


def dense_fp8(rows: int, d: int, dv: int, heads: int = 1, **change: object) -> Call:
    """A call in e4m3 with one key head and as many keys as query rows; no memory is touched."""
    q, k, v = (torch.empty(1, rows, n, size, dtype=FP8, device="meta") for n, size in ((heads, d), (1, d), (1, dv)))
    names = inspect.signature(jit_kernel.flash_attn_func).parameters
    given = {name: p.default for name, p in names.items() if p.default is not inspect.Parameter.empty}
    return Call(*calls.of(calls.DENSE, {**given, "q": q, "k": k, "v": v, **change}))


@pytest.mark.parametrize(
    ("call", "prepares"),
    [
        (dense_fp8(4096, 256, 256), True),
        (dense_fp8(4095, 256, 256), False),
        (dense_fp8(2048, 208, 16, heads=2), True),
        (dense_fp8(16384, 256, 256, causal=True), True),
        (dense_fp8(16383, 256, 256, causal=True), False),
        (dense_fp8(20_000, 256, 256, window_size=(4096, 0)), False),
        (dense_fp8(20_000, 256, 256, window_size=(-1, 64)), True),
        (dense_fp8(20_000, 256, 256, attention_chunk=4096), False),
        (dense_fp8(20_000, 128, 128), False),
    ],
)
def test_values_are_transposed_before_where_that_was_faster(call: Call, prepares: bool) -> None:
    assert prefill.prepares(call) is prepares


def test_a_ragged_call_counts_the_mean_of_its_query_rows() -> None:
    q = torch.empty(16_384, 1, 256, dtype=FP8, device="meta")
    for batch, prepares in ((4, True), (5, False)):
        call = dense_fp8(1, 256, 256)
        call.q, call.cu_seqlens_q = q, torch.empty(batch + 1, dtype=torch.int32, device="meta")
        assert prefill.prepares(call) is prepares


@pytest.mark.parametrize("d", range(8, 257, 8))
def test_every_multiple_of_8_has_a_kernel_that_warm_up_compiles(d: int) -> None:
    specs = set(hopper.all_variants(TARGET))
    for dv in range(8, 257, 8):
        features = dataclasses.replace(CALL, head_dim=d, head_dim_v=dv)
        assert isinstance(hopper.decide(TARGET, features), Accepted)
        assert hopper.variant(TARGET, features, {}) in specs
        e4m3 = dataclasses.replace(features, dtype="e4m3", kv_dtype="e4m3", descale=True, softcap=True)
        decision = hopper.decide(TARGET, e4m3)
        if d % 16 or dv % 16:
            assert isinstance(decision, Rejected)
            assert "multiples of 16" in decision.reason
        else:
            assert isinstance(decision, Accepted)
            for rows in (1, 20_000):
                assert hopper.variant(TARGET, e4m3, dense_fp8(rows, d, dv)) in specs


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "e4m3", "kv_dtype": "e4m3", "qv": True}, "qv"),
        ({"dtype": "fp32"}, "dtype fp32"),
        ({"head_dim": 100}, "multiples of 8"),
        ({"head_dim_v": 264}, "up to 256"),
        ({"aligned": False}, "16 bytes"),
        ({"page_size": 64}, "page_table"),
        ({"append": True}, "new keys"),
        ({"qv": True}, "qv"),
        ({"descale": True}, "q_descale"),
        ({"split": True}, "num_splits"),
        ({"cache_leftpad": True}, "cache_leftpad"),
        ({"draft_mask": True}, "draft_mask"),
    ],
)
def test_what_is_not_claimed_goes_on_without_a_warning(change: dict[str, object], reason: str) -> None:
    decision = hopper.decide(TARGET, dataclasses.replace(CALL, **change))  # type: ignore[arg-type]
    assert isinstance(decision, Rejected)
    assert reason in decision.reason
    assert not decision.claimed


LATENT = dataclasses.replace(CALL, head_dim=64, head_dim_v=512, cache=True, ragged_k=False, page_size=64, qv=True)


def test_qv_is_served_over_a_cache_and_there_alone() -> None:
    assert isinstance(hopper.decide(TARGET, LATENT), Accepted)
    assert isinstance(
        hopper.decide(TARGET, dataclasses.replace(LATENT, only_qv=True, split=True, sinks=True)), Accepted
    )
    e4m3 = {"dtype": "e4m3", "kv_dtype": "e4m3"}
    for change in ({"kv_dtype": "e4m3"}, e4m3):
        given = {**change, "draft_mask": True, "descale": True, "deterministic": True, "only_qv": True, "softcap": True}
        assert isinstance(hopper.decide(TARGET, dataclasses.replace(LATENT, **given)), Accepted)  # type: ignore[arg-type]
    for change, reason in (
        ({"aligned": False}, "16 bytes"),
        ({"descale": True}, "q_descale"),
        ({"cache": False, "page_size": 0}, "qv"),
        ({"cache": False, "page_size": 0, **e4m3}, "qv"),
        ({"kv_dtype": "e4m3", "token_scales": True}, "k_scale and v_scale"),
        ({"token_scales": True, **e4m3}, "k_scale and v_scale"),
        ({"append": True, **e4m3}, "new keys and values"),
    ):
        decision = hopper.decide(TARGET, dataclasses.replace(LATENT, **change))  # type: ignore[arg-type]
        assert isinstance(decision, Rejected)
        assert reason in decision.reason
        assert not decision.claimed


@pytest.mark.parametrize(
    ("tokens", "heads", "change", "rows"),
    [
        (1, 16, {}, 16),
        (2, 16, {}, 32),
        (3, 16, {}, 64),
        (1, 128, {}, 64),
        (1, 16, {"num_splits": 1}, 64),
        (1, 16, {"deterministic": True}, 64),
    ],
)
def test_the_rows_of_a_tile_are_the_least_that_hold_a_sequence(
    tokens: int, heads: int, change: dict[str, object], rows: int
) -> None:
    """But where a sequence's bits must not depend on how many tokens the others have."""
    x = torch.zeros(2, tokens, heads, 64, dtype=torch.bfloat16)
    cache = torch.zeros(2, 128, 1, 576, dtype=torch.bfloat16)
    fields = {"q": x, "k": cache[..., 512:], "v": cache[..., :512], "qv": torch.zeros(2, tokens, heads, 512)}
    given = {**fields, "num_splits": 0, "max_seqlen_q": tokens, **change}
    call = Call(calls.KVCACHE, **dict(zip(calls.FIELDS[1:], calls.DEFAULTS[1:], strict=True)) | {
        "softmax_scale": None, "causal": True, "window_size": (-1, -1), "attention_chunk": 0, "softcap": 0.0,
        "return_softmax_lse": False, "out": None, "sinks": None, "q_descale": None, "k_descale": None,
        "v_descale": None, "pack_gqa": None, "sm_margin": 0,
    } | given)  # type: ignore[arg-type]  # fmt: skip
    for k in (cache, cache.to(FP8)):
        call.k, call.v = k[..., 512:], k[..., :512]
        spec = hopper.variant(TARGET, LATENT, call)
        assert dict(spec.variant)["rows"] == rows
        assert ("cache" in dict(spec.variant)) is (k is not cache)
        assert spec in hopper.all_variants(TARGET)


MIXED = dataclasses.replace(CALL, kv_dtype="e4m3", cache=True, ragged_k=False, group=8)


@pytest.mark.parametrize(
    "change",
    [
        {"descale": True, "token_scales": True},
        {"page_size": 1, "draft_mask": True, "softcap": True, "sinks": True, "window": True, "deterministic": True},
        {"append": True, "rotary": True, "ragged_append": True, "cache_batch_idx": True, "cache_leftpad": True},
        {"group": 64, "split": True},
        {"head_dim": 256, "head_dim_v": 16, "group": 32},
        {"many_rows": True, "widens": True, "group": 71, "descale": True, "split": True},
    ],
    ids=str,
)
def test_an_e4m3_cache_is_served_with_every_feature_of_caches(change: dict[str, object]) -> None:
    decision = hopper.decide(TARGET, dataclasses.replace(MIXED, **change))  # type: ignore[arg-type]
    assert isinstance(decision, Accepted), decision
    e4m3 = dataclasses.replace(MIXED, dtype="e4m3", **change)  # type: ignore[arg-type]  # by the same kernels
    assert isinstance(hopper.decide(TARGET, e4m3), Accepted)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cache": False}, "q in bf16 with k and v in e4m3: its kernels take one dtype without a cache"),
        ({"head_dim": 72}, "q in bf16 with k and v in e4m3, head sizes 72/128: the copy engine moves multiples of 16"),
        ({"dtype": "fp16", "token_scales": True}, "k_scale and v_scale: weights times scales are rounded to fp16"),
        ({"group": 71}, "71 query heads for a key head: its tiles have 64"),
        ({"head_dim": 256, "group": 33}, "33 query heads for a key head: its tiles have 32"),
        ({"many_rows": True}, "q in bf16 with k and v in e4m3, more than 64 query rows: it makes 16 bits of the cache"),
        ({"dtype": "e4m3", "many_rows": True}, "in at most 2 GiB, without k_scale, v_scale and deterministic"),
        ({"many_rows": True, "widens": True, "head_dim": 72}, "the copy engine moves multiples of 16 bytes"),
        ({"kv_dtype": "bf16", "descale": True}, "q_descale"),
        ({"dtype": "e4m3", "head_dim": 72}, "head sizes 72/128: of e4m3 the copy engine moves multiples of 16"),
        ({"dtype": "e4m3", "group": 71}, "q, k and v in e4m3, 71 query heads for a key head: its tiles have 64"),
    ],
    ids=str,
)
def test_what_is_not_claimed_of_an_e4m3_cache_is_refused_by_name(change: dict[str, object], reason: str) -> None:
    decision = hopper.decide(TARGET, dataclasses.replace(MIXED, **change))  # type: ignore[arg-type]
    assert isinstance(decision, Rejected)
    assert reason in decision.reason
    assert not decision.claimed


@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_100", "sm_120"])
def test_other_architectures_are_not_served(architecture: str) -> None:
    assert isinstance(hopper.supports(Target("cuda", architecture)), Rejected)
    assert isinstance(hopper.supports(TARGET), Accepted)


def test_selecting_by_size_finds_the_kernel_that_pads_it() -> None:
    prefill = hopper_kernels.forward_spec("bf16", 64, 64, False, False)
    few_rows = hopper_kernels.decode_spec("bf16", 64, 8)
    latent = hopper_kernels.mla_spec("bf16", 256, 16)
    for spec, field, wanted, found in (
        (prefill, "head_dim", "72", "96"),
        (prefill, "head_dim_v", "130", "192"),
        (prefill, "dtype", "bf16", "bf16"),
        (hopper_kernels.fp8_spec(64, 48, True, False), "head_dim", "96", "128"),
        (few_rows, "head_dim", "72", "128"),
        (few_rows, "head_dim", "257", "257"),
        (few_rows, "rows", "9", "16"),
        (few_rows, "rows", "many", "many"),
        (latent, "head_dim_v", "260", "512"),
        (latent, "rows", "17", "32"),
        (latent, "rows", "65", "65"),
        (latent, "dtype", "fp16", "fp16"),
        (hopper_kernels.mla_spec("e4m3", 512, 16), "dtype", "bf16", "e4m3"),
        (hopper_kernels.fp8_spec(64, 48, True, False), "dtype", "bf16", "bf16"),
    ):
        assert hopper.canonical(spec, field, wanted) == found
