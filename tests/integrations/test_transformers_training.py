"""Gradients of transformers models through jit_kernel: eager's, for masks that FlashAttention has and for others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from jit_kernel.integrations import counters  # noqa: E402
from tests.support import case_run  # noqa: E402
from tests.support.hf_models import NEAR, SMALL, gemma2, gpt_oss, llama, mistral, tokens, twins  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are quicker on one thread."""
    with case_run.one_thread():
        yield


def holes() -> dict[str, Any]:
    batch = tokens(24, 24, 24)
    batch["attention_mask"][0, 4:7] = 0
    return batch


PACKED = {
    "input_ids": tokens(24)["input_ids"],
    "position_ids": torch.cat([torch.arange(10), torch.arange(14)])[None],
    "use_cache": False,
}
BATCHES: dict[str, dict[str, Any]] = {
    "plain": {"input_ids": tokens(24, 24)["input_ids"]},
    "left padded": tokens(24, 17, 9),
    "right padded": tokens(24, 17, 9, side="right"),
    "packed": PACKED,
    "holes": holes(),
}


def labels_of(batch: dict[str, Any]) -> torch.Tensor:
    """The tokens that are to be foretold from tokens: none from padding, which in front of a sequence sees no key."""
    labels = batch["input_ids"].clone()
    if "attention_mask" in batch:
        mask = batch["attention_mask"]
        before = torch.nn.functional.pad(mask[:, :-1], (1, 0))
        labels[(mask == 0) | (before == 0)] = -100
    return labels


def gradients(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch, labels=labels_of(batch)).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) > 10
    for name, grad in expected.items():
        # A key's bias moves every score of a row alike: its gradient is 0 but for rounding.
        near = 1e-4 * max(float(grad.abs().max()), 1e-2)
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=near, msg=name)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("build", [llama, mistral])
def test_every_parameter_gets_eagers_gradient(build: Any, batch: str) -> None:
    """In a forward pass without no_grad, with the model in eval() as it was made."""
    eager, ours = build()
    counters.clear()
    found, expected = gradients(ours, BATCHES[batch]), gradients(eager, BATCHES[batch])
    same_gradients(found, expected)
    passed = counters.read()["transformers"]["passed_on"]
    by_sdpa = batch == "holes" or (batch == "right padded" and build is mistral)
    assert sum(passed.values()) == (2 if by_sdpa else 0)  # told, for each layer


def test_an_encoder_gets_eagers_gradient() -> None:
    eager, ours = twins(transformers.BertForMaskedLM, transformers.BertConfig(**SMALL))
    batch = tokens(24, 17, 9, side="right")
    same_gradients(gradients(ours, batch), gradients(eager, batch))


@pytest.mark.parametrize("build", [gemma2, gpt_oss], ids=["softcap", "sinks"])
def test_softcap_and_sinks_get_eagers_gradients(build: Any) -> None:
    eager, ours = build()
    same_gradients(gradients(ours, BATCHES["plain"]), gradients(eager, BATCHES["plain"]))


@pytest.mark.parametrize(("build", "named"), [(gemma2, "softcap"), (gpt_oss, "sinks")])
def test_gradients_that_nothing_has_are_refused_by_name(build: Any, named: str) -> None:
    """Through a mask that is neither causal nor a window the layer goes to torch's SDPA, which has neither."""
    _, ours = build()
    with pytest.raises(NotImplementedError, match=named):
        ours(**BATCHES["holes"])


@pytest.mark.hosts
def test_a_lora_fine_tune_has_eagers_losses() -> None:
    peft = pytest.importorskip("peft")
    eager, ours = llama()
    batch = tokens(24, 17, 9, side="right")
    labels = labels_of(batch)
    losses: list[list[float]] = []
    for model in (eager, ours):
        torch.manual_seed(1)
        adapters = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj", "o_proj"])
        tuned = peft.get_peft_model(model, adapters).train()
        optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(20):
            optimizer.zero_grad()
            loss = tuned(**batch, labels=labels).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0] - 0.5  # it learns
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-3


def test_gradients_of_a_compiled_model() -> None:
    eager, ours = llama()
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    batch = BATCHES["plain"]
    compiled(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    expected = gradients(eager, batch)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], **{**NEAR, "rtol": 1e-3}, msg=name)
