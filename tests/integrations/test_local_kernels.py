"""The kernel folder that LOCAL_KERNELS names: loaded by Hugging Face's package `kernels`, without a network."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from jit_kernel import config, flash_attn_varlen_func  # noqa: E402
from jit_kernel.integrations import counters, local_kernels  # noqa: E402
from tests.support.hf_models import FAMILIES, greedy, small_cache, tokens, with_attention  # noqa: E402

HUB = "kernels-community/vllm-flash-attn3"


def test_the_command_prints_a_line_for_the_shell(tmp_path: Any) -> None:
    """What a shell makes of the line names three times the folder, which has every variant."""
    command = f'eval "$({sys.executable} -m jit_kernel local-kernels)" && printf %s "$LOCAL_KERNELS"'
    environment = {**os.environ, "PYTHONPATH": str(config.package_dir().parent)}
    found = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, check=True)
    pairs = dict(entry.split("=") for entry in found.stdout.decode().split(":"))
    assert tuple(pairs) == local_kernels.NAMES
    assert set(pairs.values()) == {str(local_kernels.folder())}
    for backend in ("cpu", "cuda"):
        variant = local_kernels.folder() / "build" / f"torch-{backend}"
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["backend"]["type"] == backend and (variant / "__init__.py").exists()


def test_a_path_that_the_variable_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(local_kernels, "__file__", str(tmp_path / "a:b" / "__init__.py"))
    with pytest.raises(ValueError, match="a:b; LOCAL_KERNELS cannot name"):
        local_kernels.variable()


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """The module that `kernels` finds under one of the names."""
    kernels = pytest.importorskip("kernels")
    monkeypatch.setenv("LOCAL_KERNELS", local_kernels.variable())
    return kernels.get_kernel(getattr(request, "param", HUB), version=1)


Q = torch.randn(7, 4, 16, generator=torch.Generator().manual_seed(0))
CU = torch.tensor([0, 3, 7], dtype=torch.int32)
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


@pytest.mark.parametrize("kernel", local_kernels.NAMES, indirect=True)
def test_each_name_gives_our_functions(kernel: Any) -> None:
    """With the arguments that transformers looks for, and those that it hands over: 0-dim lengths, no dropout."""
    parameters = inspect.signature(kernel.flash_attn_varlen_func).parameters
    assert {"s_aux", "page_table", "dropout_p", "deterministic", "window_size", "softcap"} <= set(parameters)
    assert {"cache_seqlens", "page_table"} <= set(inspect.signature(kernel.flash_attn_with_kvcache).parameters)
    counters.clear()
    longest = torch.tensor(4)
    out = kernel.flash_attn_varlen_func(
        Q, Q, Q, cu_seqlens_q=CU, cu_seqlens_k=CU, max_seqlen_q=longest, max_seqlen_k=longest, causal=True, s_aux=SINKS,
        dropout_p=0.0, deterministic=False,
    )  # fmt: skip
    assert torch.equal(out, flash_attn_varlen_func(Q, Q, Q, CU, CU, 4, 4, causal=True, sinks=SINKS))
    assert counters.read()["LOCAL_KERNELS"] == {"served": 1, "passed_on": {}}


def test_calls_as_diffusers_and_sglang_make_them(kernel: Any) -> None:
    dense = Q[None]
    out, lse = kernel.flash_attn_func(
        q=dense, k=dense, v=dense, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
        v_descale=None, window_size=(-1, -1), softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=True,
    )  # fmt: skip
    assert out.shape == dense.shape and lse.shape == (1, 4, 7)
    cache = torch.zeros(1, 16, 4, 16)
    cache[:, :7] = dense
    found = kernel.flash_attn_with_kvcache(
        dense[:, -1:], cache, cache, *[None] * 5, torch.tensor([7], dtype=torch.int32), *[None] * 10, None, True,
        (-1, -1), None, 0.0, True, None, 0, None, sm_margin=0, only_qv=False, return_softmax_lse=False, sinks=None,
        out=None,
    )  # fmt: skip
    torch.testing.assert_close(found, kernel.flash_attn_func(dense[:, -1:], dense, dense, causal=True))


def test_bad_arguments_are_refused_by_name(kernel: Any) -> None:
    with pytest.raises(NotImplementedError, match=r"dropout_p is 0\.1"):
        kernel.flash_attn_func(Q[None], Q[None], Q[None], dropout_p=0.1)
    with pytest.raises(ValueError, match=r"s_aux is .* beside sinks"):
        kernel.flash_attn_func(Q[None], Q[None], Q[None], s_aux=SINKS, sinks=SINKS)
    with pytest.raises(TypeError, match="10 arguments by position"):
        kernel.flash_attn_varlen_func(Q, Q, Q, CU, CU, 4, 4, None, None, None)
    with pytest.raises(TypeError, match="alibi_slopes"):
        kernel.flash_attn_func(Q[None], Q[None], Q[None], alibi_slopes=SINKS)


@pytest.mark.skipif(
    importlib.util.find_spec("jit_kernel.integrations.flash_attn_interface") is None, reason="no module of FA3's yet"
)
def test_diffusers_finds_the_passes_of_fa3(kernel: Any) -> None:
    diffusers = pytest.importorskip("diffusers")
    dispatch = diffusers.models.attention_dispatch
    backend = dispatch.AttentionBackendName._FLASH_3_HUB
    dispatch._maybe_download_kernel_for_backend(backend)
    registered = dispatch._HUB_KERNELS_REGISTRY[backend]
    assert registered.kernel_fn is kernel.flash_attn_func
    assert registered.wrapped_forward_fn is kernel.flash_attn_interface._flash_attn_forward


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    if not transformers.utils.is_kernels_available():
        pytest.skip("the installed kernels is none that this transformers takes")
    monkeypatch.setenv("LOCAL_KERNELS", local_kernels.variable())


@torch.no_grad()
@pytest.mark.hosts
@pytest.mark.parametrize("family", FAMILIES)
def test_continuous_batching(family: str, hub: None) -> None:
    """generate_batch's tokens are those that eager attention generates for each prompt."""
    eager, _ = FAMILIES[family]()
    model = with_attention(type(eager), eager.config, HUB)
    model.load_state_dict(eager.state_dict())
    prompts = [tokens(n, seed=n)["input_ids"][0].tolist() for n in (5, 17, 30, 9)]
    expected = [eager.generate(torch.tensor([p]), **greedy(12))[0, len(p) :].tolist() for p in prompts]
    options = transformers.GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = model.generate_batch(prompts, generation_config=options, continuous_batching_config=small_cache())
    assert sorted(request.generated_tokens for request in found.values()) == sorted(expected)


@torch.no_grad()
@pytest.mark.hosts
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_a_compiled_model(family: str, hub: None) -> None:
    """In bf16: transformers warns of float32 there, and torch.compile cannot trace its warning."""
    eager, _ = FAMILIES[family]()
    model = with_attention(type(eager), eager.config, HUB)
    model.load_state_dict(eager.state_dict())
    model.bfloat16()
    torch._dynamo.reset()
    batch = {"input_ids": tokens(24, 24)["input_ids"]}
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch).logits
    torch.testing.assert_close(found, model(**batch).logits)
