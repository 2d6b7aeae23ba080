"""transformers' generate_batch (continuous batching) through jit_kernel: requests of any length in one ragged call."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers.generation.continuous_batching import PagedAttentionCache  # noqa: E402

from jit_kernel.integrations import transformers as client  # noqa: E402
from tests.support import case_run  # noqa: E402
from tests.support.hf_models import FAMILIES, greedy, small_cache, tokens  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are quicker on one thread."""
    with case_run.one_thread(), torch.no_grad():
        yield


def attended(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every ragged call."""
    made: list[dict[str, Any]] = []
    function = client.layers.flash_attn_varlen_func

    def remembered(*args: Any, **named: Any) -> Any:
        made.append({"sequences": args[3].shape[0] - 1, **named})
        return function(*args, **named)

    monkeypatch.setattr(client.layers, "flash_attn_varlen_func", remembered)
    return made


def windows(made: list[dict[str, Any]]) -> set[tuple[int, int]]:
    """The windows of the calls; right of a causal call's token nothing is seen, whether its window says so or not."""
    sizes = {(call["window_size"], call["causal"]) for call in made}
    return {(left, 0 if causal and left >= 0 else right) for (left, right), causal in sizes}


@pytest.mark.parametrize(
    "family",
    [name if name in ("mistral", "gpt_oss") else pytest.param(name, marks=pytest.mark.hosts) for name in FAMILIES],
)
def test_each_request_gets_eagers_tokens(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    eager, ours = FAMILIES[family]()
    prompts = [tokens(n, seed=n)["input_ids"][0].tolist() for n in (5, 17, 30, 9)]
    expected = [eager.generate(torch.tensor([p]), **greedy(12))[0, len(p) :].tolist() for p in prompts]
    ours.set_attn_implementation(client.FLASH_NAME)
    made = attended(monkeypatch)
    options = transformers.GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = ours.generate_batch(prompts, generation_config=options, continuous_batching_config=small_cache())
    assert sorted(request.generated_tokens for request in found.values()) == sorted(expected)
    assert ours.config._attn_implementation == client.FLASH_NAME
    assert len(made) >= 2 * 12 and max(call["sequences"] for call in made) == len(prompts)
    assert windows(made) == {"llama": {(-1, -1)}, "mistral": {(5, 0)}, "gemma2": {(5, 0), (-1, -1)},
                       "gpt_oss": {(4, 0), (-1, -1)}}[family]  # fmt: skip


def test_a_cache_that_attention_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in transformers 5.23, where a model leaves it to the attention function to write its keys to the cache."""
    attention = transformers.models.mistral.modeling_mistral.MistralAttention
    if "cache" in inspect.signature(attention.forward).parameters:  # the model updates the cache itself, from 5.24 on
        update = PagedAttentionCache.update
        left: list[int] = []

        def leave_to_attention(self: Any, key_states: Any, value_states: Any, layer_idx: int, kwargs: Any) -> Any:
            if left and left[-1] == layer_idx:
                left.clear()
                return update(self, key_states, value_states, layer_idx, kwargs)
            left.append(layer_idx)
            kwargs["cache"] = self
            return key_states, value_states

        monkeypatch.setattr(PagedAttentionCache, "update", leave_to_attention)
    test_each_request_gets_eagers_tokens("mistral", monkeypatch)


def test_lengths_by_kind_of_layer_need_a_cache() -> None:
    x, offsets = torch.randn(1, 2, 5, 16), torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(TypeError, match="cache is NoneType; beside a cu_seq_lens_k by kind of layer"):
        client.attention(
            torch.nn.Module(), x, x, x, None, cu_seq_lens_q=offsets, cu_seq_lens_k={"full_attention": offsets}
        )


def test_a_mask_of_bits_beside_packed_sequences_is_refused() -> None:
    x, offsets = torch.randn(1, 2, 5, 16), torch.tensor([0, 2, 5], dtype=torch.int32)
    mask = client.make_mask(1, 5, 5, mask_function=lambda batch, head, q, k: (q + k) % 2 == 0)
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q stands beside a mask that is neither causal"):
        client.attention(torch.nn.Module(), x, x, x, mask, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets)


def test_the_plain_name_is_refused_by_transformers() -> None:
    """It wants "flash" in the name: the other name of the same attention has it."""
    _, ours = FAMILIES["llama"]()
    settings = transformers.ContinuousBatchingConfig(auto_switch_to_flash=False)
    with pytest.raises(ValueError, match=f"{client.NAME} is not supported for continuous batching"):
        ours.generate_batch([[3, 4, 5]], continuous_batching_config=settings)
