"""How benchmarks/transformers_gpu.py judges tokens: on the peer's sequence, at the steps that bf16 leaves clear."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("transformers")

from jit_kernel import config

BENCHMARKS = config.package_dir().parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import transformers_gpu  # noqa: E402

from jit_kernel.integrations import transformers as client  # noqa: E402
from jit_kernel.integrations.transformers import layers  # noqa: E402


def measured() -> transformers_gpu.Line:
    """The Llama of the CPU's sizes, one round."""
    client.register()
    with torch.no_grad():
        return transformers_gpu.measure("llama", "cpu", 1)


def test_a_measurement_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right attention has the tokens of every clear step; attention of another scale has not."""
    line = measured()
    assert line["tokens_equal"] and line["clear_tokens_that_differ"] == 0
    assert line["steps"] == 16 and line["clear_steps"] > 4
    assert 0 < line["peer_logits_error"] < 0.05 * line["logits_deviation"]
    assert line["logits_error_ratio"] < 1.5
    for name in ("flash_attn_func", "flash_attn_with_kvcache"):
        function = getattr(layers, name)
        monkeypatch.setattr(layers, name, lambda *args, function=function, **named: 0.7 * function(*args, **named))
    wrong = measured()
    assert not wrong["tokens_equal"] and wrong["logits_error_ratio"] > 2


def test_ties_and_clear_steps() -> None:
    exact = torch.tensor([[[5.0, 1.0, 0.0], [2.0, 1.75, 0.0], [0.0, 3.0, 1.0]]])
    peer = exact + torch.tensor([0.25, -0.125, 0.0])
    swapped = exact[..., [1, 0, 2]]
    tie = torch.cat([exact[:, :1], swapped[:, 1:2], exact[:, 2:]], dim=1)
    assert transformers_gpu.judged(peer, tie, exact).items() >= {
        "steps": 3, "clear_steps": 2, "tokens_equal": True, "ties_that_differ": 1, "peer_ties_that_differ": 0,
    }.items()  # fmt: skip
    clear = torch.cat([swapped[:, :1], exact[:, 1:]], dim=1)
    found = transformers_gpu.judged(peer, clear, exact)
    assert (found["tokens_equal"], found["clear_tokens_that_differ"], found["ties_that_differ"]) == (False, 1, 0)
    assert not transformers_gpu.judged(peer + 9 * (peer - exact), exact, exact)["tokens_equal"]  # no step is clear
