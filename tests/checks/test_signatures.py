"""The public signatures: drop-in for their peers', and the same behind every mapping of functions."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

import jit_kernel
from jit_kernel.fa3 import seam

PEERS = json.loads((Path(__file__).parents[1] / "data" / "peer_signatures.json").read_text())
FA3 = PEERS["flash-attention hopper/flash_attn_interface.py @0251105a"]
SGLANG = PEERS["sglang jit_kernel/flash_attention_v3.py @0ba3cdd4"]
MAPPED = (
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "flash_attn_func",
    "get_scheduler_metadata",
    "flash_attn_combine",
    "merge_state",
)
OURS = {
    "flash_attn_varlen_func": "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, "
    "seqused_q=None, seqused_k=None, page_table=None, softmax_scale=None, causal=False, qv=None, q_descale=None, "
    "k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, "
    "pack_gqa=None, only_qv=False, sm_margin=0, return_softmax_lse=False, sinks=None, out=None, draft_mask=None, "
    "k_scale=None, v_scale=None",
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, "
    "cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, "
    "softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, "
    "rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None, only_qv=False, sm_margin=0, "
    "return_softmax_lse=False, sinks=None, out=None, draft_mask=None, deterministic=False, "
    "k_scale=None, v_scale=None",
    "flash_attn_func": "q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, "
    "v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, "
    "deterministic=False, sm_margin=0, return_softmax_lse=False, sinks=None, out=None",
    "flash_attn_combine": "out_partial, lse_partial, out=None, out_dtype=None",
    "merge_state": "out_a, lse_a, out_b, lse_b",
    "_is_fa3_supported": "device=None",
    "_load_fa3_kernels": "device=None",
}


def parameters(function) -> list[tuple[str, str | None]]:
    """Names and defaults, in order."""
    return [
        (p.name, None if p.default is p.empty else repr(p.default))
        for p in inspect.signature(function).parameters.values()
    ]


def of_peer(peer: dict, function: str) -> list[tuple[str, str | None]]:
    return [(p["name"], p.get("default")) for p in peer[function]]


@pytest.mark.parametrize("name", OURS)
def test_public_signature(name):
    function = getattr(jit_kernel, name)
    shown = ", ".join(p if default is None else f"{p}={default}" for p, default in parameters(function))
    assert shown == OURS[name]
    kinds = {p.kind for p in inspect.signature(function).parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


@pytest.mark.parametrize("name", ["flash_attn_varlen_func", "flash_attn_with_kvcache"])
def test_drop_in_for_sglang(name):
    """The same names in the same order and the same defaults, but for attention_chunk: 0, and None counts as 0.

    Behind them comes what sglang's have not.
    """
    theirs = [(p, "0" if p == "attention_chunk" else default) for p, default in of_peer(SGLANG, name)]
    more = [("draft_mask", "None")]
    if name == "flash_attn_with_kvcache":
        more.append(("deterministic", "False"))
    more += [("k_scale", "None"), ("v_scale", "None")]
    assert parameters(getattr(jit_kernel, name)) == [*theirs, *more]


@pytest.mark.parametrize(
    ("name", "last"), [("flash_attn_varlen_func", 8), ("flash_attn_with_kvcache", 27), ("flash_attn_func", 15)]
)
def test_positions_of_fa3(name, last):
    ours = [p for p, _ in parameters(getattr(jit_kernel, name))]
    assert ours[: last + 1] == [p for p, _ in of_peer(FA3, name)][: last + 1]


def test_scheduler_metadata_is_fa3s():
    assert parameters(jit_kernel.get_scheduler_metadata) == of_peer(FA3, "get_scheduler_metadata")


def signatures(functions) -> dict[str, list[tuple[str, str | None]]]:
    for name, function in functions.items():
        kinds = {p.kind for p in inspect.signature(function).parameters.values()}
        assert kinds == {inspect.Parameter.KEYWORD_ONLY}, f"{name} takes positional arguments or **kwargs"
        assert not {"__signature__", "__wrapped__"} & vars(function).keys(), f"{name} has a forged signature"
    return {name: parameters(function) for name, function in functions.items()}


def test_the_functions_behind_the_mapping_have_the_public_signatures():
    """They stand once, in seam.py, so the signatures of a CUDA and of a MUSA device are the same ones."""
    assert tuple(seam.FUNCTIONS) == MAPPED
    for name, found in signatures(seam.FUNCTIONS).items():
        assert found == parameters(getattr(jit_kernel, name)), name


def test_annotations_are_the_public_ones():
    for name, function in seam.FUNCTIONS.items():
        ours = inspect.signature(function).parameters.values()
        public = inspect.signature(getattr(jit_kernel, name)).parameters.values()
        assert [p.annotation for p in ours] == [p.annotation for p in public], name


def test_mapping_of_this_machine():
    functions = jit_kernel._load_fa3_kernels()
    assert functions is seam.FUNCTIONS
    with pytest.raises(TypeError):
        functions["merge_state"] = print  # type: ignore[index]
