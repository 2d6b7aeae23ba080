"""The code in docs/hosts.md runs as it stands there: a section's blocks one after the other, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from jit_kernel.integrations import counters, local_kernels  # noqa: E402
from jit_kernel.integrations import transformers as client  # noqa: E402
from tests.support.hf_models import SMALL, tokens  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "hosts.md"


def blocks(heading: str) -> list[str]:
    """The Python blocks of a section."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def run(heading: str, names: dict[str, Any]) -> dict[str, Any]:
    for block in blocks(heading):
        exec(compile(block, str(PAGE), "exec"), names)
    return names


@torch.no_grad()
def test_transformers(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    greedy = transformers.GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    prompts = [tokens(n, seed=n)["input_ids"][0].tolist() for n in (5, 9)]
    counters.clear()
    names = run("transformers", {"path": tmp_path, "prompts": prompts, "greedy": greedy})
    assert names["model"].config._attn_implementation == client.FLASH_NAME
    assert [len(answer.generated_tokens) for answer in names["answers"].values()] == [3, 3]
    assert counters.read()["transformers"]["served"] >= 2 * 3


def test_local_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("kernels")
    monkeypatch.setenv("LOCAL_KERNELS", local_kernels.variable())
    q = torch.randn(7, 4, 16)
    names = run("LOCAL_KERNELS", {"q": q, "k": q, "v": q, "cu": torch.tensor([0, 3, 7], dtype=torch.int32)})
    assert names["out"].shape == q.shape


def test_the_models_that_the_page_says_take_no_backend() -> None:
    named = re.search(r"take no backend \(([^)]*)\)", PAGE.read_text(encoding="utf-8"))
    assert named is not None
    for name in named[1].replace("MPT", "Mpt").replace("DeBERTa", "DebertaV2").split(", "):
        assert not getattr(transformers, f"{name}PreTrainedModel")._can_set_attn_implementation()
