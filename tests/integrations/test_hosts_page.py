"""docs/hosts.md: every block of code in it runs, and it names what the command and the code name."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from jit_kernel import config
from jit_kernel.commands import hosts
from jit_kernel.integrations import counters, local_kernels
from tests.support import case_run

PAGE = (Path(__file__).parents[2] / "docs" / "hosts.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part.partition("\n")[2] for part in PAGE.split("\n## ")[1:]}
# The section of each host of the command, in the page's order.
OF_HOST = {
    "sdpa": "torch's SDPA",
    "flash_attn_interface": "FlashAttention-3's module",
    "LOCAL_KERNELS": "LOCAL_KERNELS",
    "transformers": "transformers",
    "diffusers": "diffusers",
    "sglang": "sglang",
    "vllm": "vLLM",
}
# By section: what its Python blocks import.
NEEDED = {"transformers": "transformers", "diffusers": "diffusers", "LOCAL_KERNELS": "kernels"}
UNDO = {
    "sdpa": "deactivate", "flash_attn_interface": "uninstall", "transformers": "unregister",
    "diffusers": "unregister", "sglang": "deactivate", "vllm": "deactivate",
}  # fmt: skip


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", SECTIONS[section], re.MULTILINE | re.DOTALL)


WITH_PYTHON = [section for section in SECTIONS if blocks(section, "python")]
SHELL = [(section, text) for section in SECTIONS for text in blocks(section, "sh")]


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """What the page's blocks made active is undone."""
    counters.clear()
    with case_run.one_thread():
        yield
    for name, undo in UNDO.items():
        module = sys.modules.get(f"jit_kernel.integrations.{name}")
        if module is not None:
            getattr(module, undo)()
            assert not module.is_active()
    counters.clear()


def test_every_block_is_python_or_a_shells() -> None:
    fences = re.findall(r"^```(\w*)$", PAGE, re.MULTILINE)
    assert set(fences[0::2]) == {"python", "sh"} and set(fences[1::2]) == {""}
    run = sum(len(blocks(section, "python")) for section in WITH_PYTHON) + len(SHELL)
    assert run == len(fences) // 2 > 10


def given_by_the_reader(section: str, folder: Path) -> dict[str, Any]:
    """What a section's blocks use and do not make: a checkpoint and prompts, or tensors."""
    if section == "transformers":
        import transformers

        from tests.support.hf_models import SMALL, tokens

        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2)).save_pretrained(folder)
        greedy = transformers.GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
        prompts = [tokens(n, seed=n)["input_ids"][0].tolist() for n in (5, 9)]
        return {"path": folder, "prompts": prompts, "greedy": greedy}
    if section == "LOCAL_KERNELS":
        q = torch.randn(7, 4, 16)
        return {"q": q, "k": q, "v": q, "cu": torch.tensor([0, 3, 7], dtype=torch.int32)}
    return {}


@pytest.mark.parametrize("section", WITH_PYTHON)
def test_python_blocks(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a section one after the other, in one namespace, as a reader would run them."""
    package = NEEDED.get(section)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if section == "LOCAL_KERNELS":  # its shell block
        monkeypatch.setenv("LOCAL_KERNELS", local_kernels.variable())
    namespace = given_by_the_reader(section, tmp_path)
    for text in blocks(section, "python"):
        exec(compile(text, f"docs/hosts.md: {section}", "exec"), namespace)
    host = next((name for name, title in OF_HOST.items() if title == section), None)
    if host not in (None, "sglang", "vllm"):  # there nothing calls
        assert counters.read()[host]["served"] > 0
        assert counters.read()[host]["passed_on"] == {}
    if section == "transformers":
        assert [len(answer.generated_tokens) for answer in namespace["answers"].values()] == [3, 3]


@pytest.mark.parametrize(("section", "text"), SHELL, ids=[f"{section}-{n}" for n, (section, _) in enumerate(SHELL)])
def test_shell_blocks(section: str, text: str, tmp_path: Path) -> None:
    if section in ("sglang", "vLLM"):
        package = section.lower()
        absent = importlib.util.find_spec(package) is None
        pytest.skip(f"{package} is not installed" if absent else "it starts a server for a model of the reader's")
    program = tmp_path / "bin" / "python"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    program.chmod(0o755)
    variables = {
        **os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{config.package_dir().parent}:{os.environ.get('PYTHONPATH', '')}",
        "JIT_KERNEL_CACHE_DIR": str(config.cache_dir()),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-e", "-c", f'{text}\necho "LOCAL_KERNELS=$LOCAL_KERNELS"'],
        cwd=tmp_path, env=variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if "--counters" in text:
        assert "calls   1 served" in done.stdout and "calls   1 passed on: a mask that is no lengths" in done.stdout
    elif "local-kernels" in text:
        assert f"LOCAL_KERNELS=kernels-community/flash-attn3={config.package_dir()}" in done.stdout
    else:
        assert all(host.title in done.stdout for host in hosts.HOSTS)


def test_every_host_has_a_section_in_order_with_its_line() -> None:
    assert [section for section in SECTIONS if section != "The command"] == list(OF_HOST.values())
    assert list(OF_HOST) == [host.name for host in hosts.HOSTS]
    for host in hosts.HOSTS:
        for line in host.write:
            assert line in SECTIONS[OF_HOST[host.name]], f"{host.name}: {line}"
    for name, undo in UNDO.items():
        assert undo in SECTIONS[OF_HOST[name]], f"{name} is undone by {undo}()"


def test_the_oldest_versions_are_the_commands() -> None:
    for name, section in (("sdpa", "torch"), ("LOCAL_KERNELS", "kernels"), ("transformers", "transformers"),
                          ("diffusers", "diffusers")):  # fmt: skip
        (host,) = (each for each in hosts.HOSTS if each.name == name)
        oldest = host.tested.partition(",")[0].removeprefix(">=")
        assert re.search(rf"{section}`? \(?{re.escape(oldest)} or newer", SECTIONS[OF_HOST[name]]), name


def test_the_models_that_the_page_says_take_no_backend() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    named = re.search(r"take no backend \(([^)]*)\)", SECTIONS["transformers"])
    assert named is not None
    for name in named[1].replace("MPT", "Mpt").replace("DeBERTa", "DebertaV2").split(", "):
        assert not getattr(transformers, f"{name}PreTrainedModel")._can_set_attn_implementation()
