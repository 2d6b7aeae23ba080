"""transformers' generate_batch (continuous batching) through jit_kernel: requests of any length in one ragged call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from jit_kernel.integrations import transformers as client  # noqa: E402
from tests.support import case_run  # noqa: E402
from tests.support.hf_models import FAMILIES, greedy, tokens  # noqa: E402


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
    found = ours.generate_batch(prompts, generation_config=options)
    assert sorted(request.generated_tokens for request in found.values()) == sorted(expected)
    assert ours.config._attn_implementation == client.FLASH_NAME
    assert len(made) >= 2 * 12 and max(call["sequences"] for call in made) == len(prompts)
    windows = {call["window_size"] for call in made}
    assert windows == {"llama": {(-1, -1)}, "mistral": {(5, 0)}, "gemma2": {(5, 0), (-1, -1)},
                       "gpt_oss": {(4, 0), (-1, -1)}}[family]  # fmt: skip


def test_the_plain_name_is_refused_by_transformers() -> None:
    """It wants "flash" in the name: the other name of the same attention has it."""
    _, ours = FAMILIES["llama"]()
    settings = transformers.ContinuousBatchingConfig(auto_switch_to_flash=False)
    with pytest.raises(ValueError, match=f"{client.NAME} is not supported for continuous batching"):
        ours.generate_batch([[3, 4, 5]], continuous_batching_config=settings)
