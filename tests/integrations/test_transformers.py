"""transformers models answer the same through jit_kernel_fa3 as through eager attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from jit_kernel.integrations import transformers as client  # noqa: E402
from tests.support import case_run  # noqa: E402

client.register()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are quicker on one thread."""
    with case_run.one_thread():
        yield


SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
NEAR = {"rtol": 1e-4, "atol": 1e-5}


def twins(model: type, config: Any) -> tuple[Any, Any]:
    """The same random weights twice: eager, and through jit_kernel."""
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    eager = model(config).eval()
    for name, parameter in eager.named_parameters():
        if parameter.dim() > 1 or "sinks" in name:
            torch.nn.init.normal_(parameter, std=0.08 if parameter.dim() > 1 else 1.0)
    ours = model(type(config).from_dict({**config.to_dict(), "attn_implementation": client.NAME})).eval()
    ours.set_attn_implementation(client.NAME)
    ours.load_state_dict(eager.state_dict())
    assert eager.config._attn_implementation == "eager"
    assert ours.config._attn_implementation == client.NAME
    return eager, ours


def llama(**changes: Any) -> tuple[Any, Any]:
    config = transformers.LlamaConfig(**{**SMALL, "num_key_value_heads": 2, **changes})
    return twins(transformers.LlamaForCausalLM, config)


def tokens(*lengths: int, side: str = "left", seed: int = 1) -> dict[str, torch.Tensor]:
    """A padded batch of random tokens."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 300, (len(lengths), max(lengths)), generator=random)
    mask = torch.ones_like(ids)
    for row, n in enumerate(lengths):
        padding = slice(0, max(lengths) - n) if side == "left" else slice(n, max(lengths))
        ids[row, padding], mask[row, padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of jit_kernel's functions, as the client calls them."""
    made: list[str] = []
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
        function = getattr(client, name)

        def counted(*args: Any, function: Any = function, name: str = name, **kwargs: Any) -> Any:
            made.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(client, name, counted)
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
    config = transformers.Gemma2Config(
        **SMALL, num_key_value_heads=4, head_dim=24, sliding_window=6, attn_logit_softcapping=3.0,
        query_pre_attn_scalar=24, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    eager, ours = twins(transformers.Gemma2ForCausalLM, config)
    batch = tokens(23, 9, 16, side=side)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(ours(**batch).logits[real], eager(**batch).logits[real], **NEAR)
    if side == "left":
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
        assert torch.equal(ours.generate(**batch, **options), eager.generate(**batch, **options))


@torch.no_grad()
def test_sinks() -> None:
    config = transformers.GptOssConfig(
        **{**SMALL, "num_hidden_layers": 2}, num_key_value_heads=2, head_dim=16, num_local_experts=2,
        num_experts_per_tok=1, sliding_window=5, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    eager, ours = twins(transformers.GptOssForCausalLM, config)
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
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]), "use_cache": False}, "packed_sequence"),
        ({"output_attentions": True}, "output_attentions"),
        ({"alibi": torch.ones(8)}, "alibi"),
    ],
    ids=["custom mask", "packed sequences", "attention weights", "something unknown"],
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


@torch.no_grad()
def test_a_window_over_padding_between_tokens_is_refused() -> None:
    _, windowed = twins(
        transformers.MistralForCausalLM,
        transformers.MistralConfig(**SMALL, num_key_value_heads=4, sliding_window=4),
    )
    batch = tokens(12)
    batch["attention_mask"][0, 4:7] = 0
    with pytest.raises(NotImplementedError, match="padding between tokens"):
        windowed(**batch)


def test_dropout_is_refused_and_a_forward_pass_has_gradients() -> None:
    eager, ours = llama(attention_dropout=0.1)
    found, expected = (
        torch.autograd.grad(model(**tokens(8)).logits.square().mean(), model.model.layers[0].self_attn.q_proj.weight)[0]
        for model in (ours, eager)
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="dropout is 0"):
        ours.train()(**tokens(8))
