"""transformers models on an NVIDIA GPU through jit_kernel: eager's answers in bf16, compiled and batched, too."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from jit_kernel.integrations import transformers as client  # noqa: E402
from tests.support.hf_models import FAMILIES, greedy, llama, mistral, tokens  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def on_gpu(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def in_bf16(models: tuple[Any, Any]) -> tuple[Any, Any, Any]:
    """(eager in bf16, ours in bf16, eager in float32 with the same weights)."""
    eager, ours = (model.cuda().bfloat16() for model in models)
    return eager, ours, copy.deepcopy(eager).float()


HOLES = tokens(40, 40, 40)
HOLES["attention_mask"][0, 5:9] = 0
PACKED = {
    "input_ids": tokens(40)["input_ids"],
    "position_ids": torch.cat([torch.arange(17), torch.arange(23)])[None],
    "use_cache": False,
}
BATCHES = {
    "plain": {"input_ids": tokens(40, 40)["input_ids"]},
    "left padded": tokens(40, 17, 9),
    "right padded": tokens(40, 37, 38, side="right"),
    "holes": HOLES,
    "packed": PACKED,
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family: str, batch: str) -> None:
    """No further from float32 than twice eager's own bf16, over the rows of tokens."""
    eager, ours, exact = in_bf16(FAMILIES[family]())
    given = on_gpu(BATCHES[batch])
    real = given["attention_mask"].bool() if "attention_mask" in given else torch.ones_like(given["input_ids"]).bool()
    found, base, ref = (model(**given).logits.float()[real] for model in (ours, eager, exact))
    assert float((found - ref).norm()) <= 2 * float((base - ref).norm()) + 2**-7 * float(ref.norm())


@pytest.mark.parametrize("lengths", [(9, 9), (4, 11)], ids=["plain", "left padded"])
@pytest.mark.parametrize("build", [llama, mistral])
def test_a_static_cache_with_a_compiled_step(build: Any, lengths: tuple[int, ...]) -> None:
    """The same tokens, compiled whole, as step by step."""
    _, ours, _ = in_bf16(build())
    batch = on_gpu(tokens(*lengths))
    options = greedy(12, cache_implementation="static")
    expected = ours.generate(**batch, **options, disable_compile=True)
    ours.forward = torch.compile(ours.forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(ours.generate(**batch, **options, disable_compile=True), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_continuous_batching(family: str) -> None:
    """Each request gets the token that it gets alone, where eager's own error in bf16 leaves one the likeliest."""
    eager, ours, exact = in_bf16(FAMILIES[family]())
    prompts = [tokens(n, seed=n)["input_ids"][0].tolist() for n in (5, 17, 30, 9)]
    ours.set_attn_implementation(client.FLASH_NAME)
    options = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # Asynchronous batching (5.23) rewrites its pinned buffers while warming up, before their copies have run: on a GPU
    # that others use, too, its own gather is then out of bounds, in 3 of 3 processes within 3 calls; so 0 of 25.
    settings = transformers.ContinuousBatchingConfig(
        page_size=16, num_blocks=64, max_batch_tokens=256, use_async_batching=False
    )
    found = ours.generate_batch(prompts, generation_config=options, continuous_batching_config=settings)
    answers = {tuple(answer.prompt_ids): answer.generated_tokens for answer in found.values()}
    clear = 0
    for prompt in prompts:
        answer = answers[tuple(prompt)]
        assert len(answer) == 4
        ids = torch.tensor([prompt + answer[:-1]]).cuda()
        wanted, base = (model(input_ids=ids).logits[0, len(prompt) - 1 :].float() for model in (exact, eager))
        for logits, error, token in zip(wanted, (base - wanted).abs().amax(dim=-1), answer, strict=True):
            best = logits.topk(2)
            is_clear = bool(best.values[0] - best.values[1] > 2 * error)
            clear += is_clear
            assert token == int(best.indices[0]) or not is_clear
            assert float(best.values[0] - logits[token]) <= 4 * float(error)
    assert clear >= 4
