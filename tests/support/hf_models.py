"""Tiny random models of transformers, each twice with the same weights: eager, and through jit_kernel."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from jit_kernel.integrations import transformers as client

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


def twins(model: type, config: Any, name: str = client.NAME) -> tuple[Any, Any]:
    """The same random weights twice: eager, and through the attention implementation `name`."""
    client.register()
    torch.manual_seed(0)
    eager = with_attention(model, config, "eager")
    for parameter_name, parameter in eager.named_parameters():
        if parameter.dim() > 1 or "sinks" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.08 if parameter.dim() > 1 else 1.0)
    ours = with_attention(model, config, name)
    ours.load_state_dict(eager.state_dict())
    return eager, ours


def with_attention(model: type, config: Any, name: str) -> Any:
    """A model of its own copy of the config."""
    copy = type(config).from_dict({**config.to_dict(), "attn_implementation": name})
    copy._attn_implementation = name
    made = model(copy).eval()
    made.set_attn_implementation(name)
    assert made.config._attn_implementation == name
    return made


def llama(**changes: Any) -> tuple[Any, Any]:
    config = transformers.LlamaConfig(**{**SMALL, "num_key_value_heads": 2, **changes})
    return twins(transformers.LlamaForCausalLM, config)


def mistral(**changes: Any) -> tuple[Any, Any]:
    """A window of 6 tokens in every layer."""
    config = transformers.MistralConfig(**{**SMALL, "num_key_value_heads": 4, "sliding_window": 6, **changes})
    return twins(transformers.MistralForCausalLM, config)


def gemma2() -> tuple[Any, Any]:
    """A window of 6 tokens in one layer of two, and softcap."""
    config = transformers.Gemma2Config(
        **SMALL, num_key_value_heads=4, head_dim=24, sliding_window=6, attn_logit_softcapping=3.0,
        query_pre_attn_scalar=24, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return twins(transformers.Gemma2ForCausalLM, config)


def gpt_oss() -> tuple[Any, Any]:
    """A window of 5 tokens in one layer of two, and sinks."""
    config = transformers.GptOssConfig(
        **SMALL, num_key_value_heads=2, head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return twins(transformers.GptOssForCausalLM, config)


FAMILIES = {"llama": llama, "mistral": mistral, "gemma2": gemma2, "gpt_oss": gpt_oss}


def tokens(*lengths: int, side: str = "left", seed: int = 1) -> dict[str, torch.Tensor]:
    """A padded batch of random tokens."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 300, (len(lengths), max(lengths)), generator=random)
    mask = torch.ones_like(ids)
    for row, n in enumerate(lengths):
        padding = slice(0, max(lengths) - n) if side == "left" else slice(n, max(lengths))
        ids[row, padding], mask[row, padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def small_cache() -> Any:
    """Settings of continuous batching whose cache holds a few requests; by itself it takes what memory is free."""
    return transformers.ContinuousBatchingConfig(page_size=64, num_blocks=16, max_batch_tokens=256)


def greedy(count: int, **others: Any) -> dict[str, Any]:
    """What generate() is asked for: so many tokens, the likeliest each time."""
    return {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, **others}
