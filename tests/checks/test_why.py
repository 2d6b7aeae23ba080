"""`explain` and `python -m jit_kernel why`: the implementation and the kernel of a call, and why not another."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from jit_kernel.commands import why
from jit_kernel.device import Target
from jit_kernel.fa3 import cpu, dispatch
from jit_kernel.fa3.decision import Accepted
from tests.support.inputs import tensors

PLAIN = why.explain("flash_attn_func", *(torch.empty(1, 2, 4, 64) for _ in range(3)), device="cpu").features


def test_explain_names_the_kernel_that_the_call_takes():
    q, k, v = tensors(heads=8, kv_heads=2, dtype=torch.bfloat16)
    found = why.explain("flash_attn_func", q, k, v, causal=True)
    assert found.implementation == "cpu"
    assert found.kernel == str(cpu.kernels.forward_spec("bf16"))
    assert found.features == replace(
        PLAIN, dtype="bf16", kv_dtype="bf16", head_dim=32, head_dim_v=32, group=4, causal=True
    )
    assert isinstance(dict(found.decisions)["cpu"], Accepted)
    assert "cpu: serves it, kernel flash_attention_v3/cpu" in str(found)


def test_explain_refuses_what_the_call_would():
    q, k, v = tensors(heads=3, kv_heads=2)
    with pytest.raises(ValueError, match="multiple of k's 2 heads"):
        why.explain("flash_attn_func", q, k, v)
    with pytest.raises(ValueError, match="function is 'attention'"):
        why.explain("attention", q, k, v)


def test_why_command(capsys):
    shapes = ["--q", "bf16[2,4096,32,128]", "--k", "bf16[2,4096,8,128]", "--causal"]
    assert why.main([*shapes, "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "flash_attn_func on cpu:" in text
    assert "bf16 head_dim=128/128 group=4 causal" in text
    assert why.main([*shapes, "--device", "cuda:sm_90a", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["target"] == "cuda:sm_90a"
    assert list(record["decisions"]) == ["hopper", "portable"]
    assert record["decisions"][record["implementation"]] == "Accepted"
    assert why.main(["--q", "fp32[2,4,32,600]", "--k", "fp32[2,4,32,600]", "--device", "cpu"]) == 1
    assert "cpu: rejected: head sizes 600/600" in capsys.readouterr().out


RAGGED = "--q bf16[9,4,64] --k bf16[9,4,64] --cu-seqlens-q i32[3] --cu-seqlens-k i32[3]"


PAGED = "--q bf16[2,1,4,64] --k-cache bf16[8,16,4,64] --page-table i32[2,4] --cache-seqlens i32[2] --no-causal"


@pytest.mark.parametrize(
    ("words", "function", "features"),
    [
        (RAGGED, "flash_attn_varlen_func", {"ragged_q": True, "ragged_k": True, "page_size": 0}),
        (f"{PAGED} --window-size 7,0", "flash_attn_with_kvcache", {"page_size": 16, "window": True, "split": True}),
    ],
)
def test_why_finds_the_function_and_the_features(words, function, features, capsys):
    assert why.main([*words.split(), "--json", "--device", "cpu"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["function"] == function
    assert {name: value for name, value in record["features"].items() if name in features} == features


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--q", "bf16[2,4,3,64]", "--k", "bf16[2,4,2,64]"], "multiple of k's 2 heads"),
        (["--q", "bf16[2,4,2,64]", "--k", "bf16[2,4,2,64]", "--device", "toaster"], "device is 'toaster'"),
        (["--q", "bf16[2,4,2,64]", "--k", "bf16[2,4,2,64]", "--device", "cuda:99"], "no such device is present"),
        (["--k", "bf16[2,4,2,64]"], "missing a required argument: 'q'"),
        (["--q", "int4[2]"], "must be dtype[shape]"),
        (["--window-size", "wide"], "must be left,right"),
    ],
)
def test_why_says_what_is_wrong(words, says, capsys):
    try:
        status = why.main(words)
    except SystemExit as left:  # as argparse leaves
        status = left.code
    assert status == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "kernel"),
    [
        ("--q bf16[2,4096,32,128] --k bf16[2,4096,8,128] --causal", "tile=prefill, paged=False, local=False"),
        (f"{PAGED} --window-size 7,0", "tile=decode, paged=True, local=True"),
    ],
)
def test_why_names_the_variant_of_a_gpu(capsys, words, kernel):
    """The kernel that a call on a GPU would launch, one of those that warm-up compiles for it."""
    assert why.main([*words.split(), "--device", "cuda:sm_80"]) == 0
    text = capsys.readouterr().out
    assert "portable: serves it, kernel flash_attention_v3/portable (function=forward, dtype=bf16" in text
    assert kernel in text
    assert any(str(spec) in text for spec in dispatch.all_variants(Target.parse("cuda:sm_80")))
