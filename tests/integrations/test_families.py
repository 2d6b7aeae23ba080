"""Families of transformers answer through jit_kernel what they answer eagerly: by register(), LOCAL_KERNELS and SDPA.

Logits are judged by the numeric rule, against the same model in float64. A few families run in make test, all of them
in make test-hosts.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers.utils import is_kernels_available  # noqa: E402

from jit_kernel.integrations import counters, local_kernels, sdpa  # noqa: E402
from jit_kernel.integrations.torch_sdpa import behind  # noqa: E402
from jit_kernel.integrations.transformers import layers  # noqa: E402
from tests.support import case_run  # noqa: E402
from tests.support.hf_families import DECODERS, ENCODERS  # noqa: E402
from tests.support.hf_models import greedy, tokens, twins, with_attention  # noqa: E402

FEW = {"Llama", "Gemma2", "DeepseekV3", "Bert", "Whisper"}
HUB = "kernels-community/vllm-flash-attn3"
# Why a way has no such family: what transformers itself says, or does.
WITHOUT = {
    ("SDPA", "Gemma2"): "transformers' sdpa has no softcap",
    ("SDPA", "GptOss"): "transformers' sdpa has no sinks",
    ("LOCAL_KERNELS", "GPT2"): "transformers looks for a torch.nn.Linear in a float32 layer, which has none",
}
# What torch's SDPA computes on another way than the one that jit_kernel stands behind.
NOT_REACHED = {
    ("SDPA", "DeepseekV3"): "heads of q and v differ in size",
    ("SDPA", "CLIPText"): "a mask that is neither causal nor lengths",
}


def cases(families: dict[str, Any]) -> list[Any]:
    return [
        pytest.param(way, family, marks=() if way == "register" and family in FEW else pytest.mark.hosts)
        for way in ("register", "LOCAL_KERNELS", "SDPA")
        for family in families
        if (way, family) not in WITHOUT
    ]


@pytest.fixture
def through(monkeypatch: pytest.MonkeyPatch) -> Any:
    """By way: the same model through jit_kernel, in a context in which it runs."""

    @contextlib.contextmanager
    def make(way: str, eager: Any, ours: Any) -> Iterator[Any]:
        if way == "register":
            yield ours
            return
        if way == "LOCAL_KERNELS":
            if not is_kernels_available():
                pytest.skip("the installed kernels is none that this transformers takes")
            if not eager._supports_flash_attn:
                pytest.skip("transformers has no FlashAttention for this family")
            monkeypatch.setenv("LOCAL_KERNELS", local_kernels.variable())
        model = with_attention(type(eager), eager.config, HUB if way == "LOCAL_KERNELS" else "sdpa")
        model.load_state_dict(eager.state_dict())
        with contextlib.nullcontext() if way == "LOCAL_KERNELS" else sdpa.active():
            yield model

    return make


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are quicker on one thread."""
    with case_run.one_thread(), torch.no_grad():
        yield


def exact(eager: Any) -> Any:
    """The model in float64, on plain matrix products."""
    model = copy.deepcopy(eager).double()
    model.set_experts_implementation("eager")
    return model


def worst_share(ours: torch.Tensor, base: torch.Tensor, ref: torch.Tensor) -> float:
    """Of the numeric rule's limit for float32, over the rows."""
    ours, base, ref = ours.double(), base.double(), ref.double()
    limit = 2 * (base - ref).norm(dim=-1) + 2 * 2**-20 * ref.norm(dim=-1)
    return float(((ours - ref).norm(dim=-1) / limit).max())


def calls(way: str) -> int:
    """How many calls jit_kernel has served."""
    host = {"register": layers.HOST, "LOCAL_KERNELS": local_kernels.HOST, "SDPA": behind.HOST}[way]
    return counters.read().get(host, {"served": 0})["served"]


@pytest.mark.parametrize(("way", "family"), cases(DECODERS))
def test_a_decoder(way: str, family: str, through: Any, say: list[str]) -> None:
    """Logits of a padded batch, and 32 greedy tokens behind prompts padded on the left."""
    config = getattr(transformers, f"{family}Config")(**DECODERS[family])
    eager, registered = twins(transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)
    batch = tokens(14, 17, 13, side="right")
    real = batch["attention_mask"].bool()
    base, ref = eager(**batch).logits, exact(eager)(**batch).logits
    prompts = tokens(9, 17, 4)
    expected = eager.generate(**prompts, **greedy(32))
    counters.clear()
    with through(way, eager, registered) as ours:
        logits, found = ours(**batch).logits, ours.generate(**prompts, **greedy(32))
    assert calls(way) > 0 or (way, family) in NOT_REACHED
    share = worst_share(logits[real], base[real], ref[real])
    say.append(f"{family} by {way}: {share:.2f} of the limit")
    assert share <= 1
    assert torch.equal(found, expected) and len(expected[0, 17:].unique()) > 1


@pytest.mark.parametrize(("way", "family"), cases(ENCODERS))
def test_an_encoder(way: str, family: str, through: Any, say: list[str]) -> None:
    model, config, settings, make_batch = ENCODERS[family]
    eager, registered = twins(getattr(transformers, model), getattr(transformers, config)(**settings))
    batch = make_batch()
    doubled = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    base, ref = eager(**batch)[0], exact(eager)(**doubled)[0]
    counters.clear()
    with through(way, eager, registered) as ours:
        found = ours(**batch)[0]
    assert calls(way) > 0 or (way, family) in NOT_REACHED
    if "attention_mask" in batch and (way == "LOCAL_KERNELS" or family == "ModernBert"):  # rows of padding are 0 there
        real = batch["attention_mask"].bool()
        found, base, ref = found[real], base[real], ref[real]
    share = worst_share(found, base, ref)
    say.append(f"{family} by {way}: {share:.2f} of the limit")
    assert share <= 1
