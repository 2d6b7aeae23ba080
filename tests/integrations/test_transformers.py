"""transformers models answer the same through jit_kernel_fa3 as through eager attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from jit_kernel.integrations.transformers import Mask, layers  # noqa: E402
from tests.support import case_run  # noqa: E402
from tests.support.hf_models import NEAR, SMALL, gemma2, gpt_oss, llama, tokens, twins  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are quicker on one thread."""
    with case_run.one_thread():
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of jit_kernel's functions, as the client calls them."""
    made: list[str] = []
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
        function = getattr(layers, name)

        def counted(*args: Any, function: Any = function, name: str = name, **kwargs: Any) -> Any:
            made.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(layers, name, counted)
    return made


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(11,), (9, 9), (3, 14, 8)], ids=["one", "batch", "left padded"])
def test_llama_generates_the_same_tokens(lengths: tuple[int, ...], calls: list[str]) -> None:
    eager, ours = llama()
    batch = tokens(*lengths)
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    expected, found = eager.generate(**batch, **options), ours.generate(**batch, **options)
    assert found.shape[1] == max(lengths) + 64
    assert torch.equal(found, expected)
    assert len(found[0, -64:].unique()) > 4  # the model does not repeat one token
    prefill = "flash_attn_varlen_func" if len(set(lengths)) > 1 else "flash_attn_func"
    assert calls == [prefill] * 2 + ["flash_attn_with_kvcache"] * 2 * 63


@torch.no_grad()
def test_a_step_over_a_whole_cache_gives_no_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number would cost a tensor in every layer, and the way to a kernel that Python does not check."""
    lengths: list[Any] = []
    function = layers.flash_attn_with_kvcache

    def remembered(*args: Any, cache_seqlens: Any, **named: Any) -> Any:
        lengths.append(cache_seqlens)
        return function(*args, cache_seqlens=cache_seqlens, **named)

    monkeypatch.setattr(layers, "flash_attn_with_kvcache", remembered)
    _, ours = llama()
    ours.generate(**tokens(9), max_new_tokens=4, do_sample=False)
    assert lengths == [None] * 2 * 3
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 8, 16)
    with pytest.raises(ValueError, match=r"cache_seqlens is 9; it must be between 0 and 8"):
        layers.attention(ours, q, k, k, Mask(1, 9, causal=True))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_llama_logits_of_a_padded_batch(side: str) -> None:
    eager, ours = llama()
    batch = tokens(5, 17, 1, side=side)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(ours(**batch).logits[real], eager(**batch).logits[real], **NEAR)


@torch.no_grad()
def test_a_prompt_in_two_parts() -> None:
    """The second part sees the first through the cache."""
    eager, ours = llama()
    ids = tokens(20)["input_ids"]
    first = ours(input_ids=ids[:, :12], use_cache=True)
    second = ours(input_ids=ids[:, 12:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, eager(input_ids=ids).logits[:, 12:], **NEAR)


@torch.no_grad()
def test_padding_between_tokens() -> None:
    eager, ours = llama()
    batch = tokens(12, 12)
    batch["attention_mask"][0, 4:7] = 0
    real = batch["attention_mask"].bool()
    positions = {"position_ids": torch.arange(12).expand(2, 12)}
    found, expected = ours(**batch, **positions).logits, eager(**batch, **positions).logits
    torch.testing.assert_close(found[real], expected[real], **NEAR)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_bert_agrees_at_every_position(side: str, calls: list[str]) -> None:
    """Padding's own rows, too: a mean over all positions stays what it was."""
    eager, ours = twins(transformers.BertModel, transformers.BertConfig(**SMALL))
    batch = tokens(7, 30, 2, side=side)
    found, expected = ours(**batch).last_hidden_state, eager(**batch).last_hidden_state
    torch.testing.assert_close(found, expected, **NEAR)
    assert calls == ["flash_attn_varlen_func"] * 2


@torch.no_grad()
def test_an_encoder_and_a_decoder_that_looks_at_it() -> None:
    """Cross attention: as many queries as keys, and only the keys are padded."""
    config = transformers.BartConfig(
        vocab_size=300, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=64,
    )  # fmt: skip
    eager, ours = twins(transformers.BartModel, config)
    batch = tokens(6, 13, 9, side="right")
    batch["decoder_input_ids"] = tokens(13, 13, 13, seed=2)["input_ids"]
    found, expected = ours(**batch).last_hidden_state, eager(**batch).last_hidden_state
    torch.testing.assert_close(found, expected, **NEAR)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_sliding_window_and_softcap(side: str) -> None:
    eager, ours = gemma2()
    batch = tokens(23, 9, 16, side=side)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(ours(**batch).logits[real], eager(**batch).logits[real], **NEAR)
    if side == "left":
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
        assert torch.equal(ours.generate(**batch, **options), eager.generate(**batch, **options))


@torch.no_grad()
def test_sinks() -> None:
    eager, ours = gpt_oss()
    batch = tokens(21, 10)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(ours(**batch).logits[real], eager(**batch).logits[real], **NEAR)


@torch.no_grad()
def test_a_vision_encoder_that_makes_no_mask() -> None:
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=32, patch_size=8
    )
    eager, ours = twins(transformers.ViTModel, config)
    image = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    torch.testing.assert_close(ours(**image).last_hidden_state, eager(**image).last_hidden_state, **NEAR)


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attention_mask": torch.ones(1, 1, 8, 8)}, "mask of (1, 1, 8, 8)"),
        ({"output_attentions": True}, "output_attentions"),
        ({"alibi": torch.ones(8)}, "alibi"),
    ],
    ids=["custom mask", "attention weights", "something unknown"],
)
def test_what_cannot_be_honoured_is_refused(change: dict[str, Any], named: str) -> None:
    _, ours = llama()
    with pytest.raises(NotImplementedError) as error:
        ours(input_ids=tokens(8)["input_ids"], **change)
    assert named in str(error.value)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(9,), (4, 11)], ids=["one", "left padded"])
def test_a_static_cache(lengths: tuple[int, ...]) -> None:
    """Its room for tokens to come is no part of the keys."""
    eager, ours = llama()
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "cache_implementation": "static"}
    batch = tokens(*lengths)
    assert torch.equal(ours.generate(**batch, **options), eager.generate(**batch, **options))
