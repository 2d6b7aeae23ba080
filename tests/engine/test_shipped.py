"""What a run recorded is packed, unpacked in another home and sealed: it serves there without any compiler."""

from __future__ import annotations

import os
import runpy
import shutil
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import jit_kernel
from jit_kernel import config, flash_attention_v3, jit, ready, warmup
from jit_kernel.commands import cache
from jit_kernel.device import cpu_target
from jit_kernel.engine import unpack
from jit_kernel.fa3.cpu import kernels
from tests.support import children, tiny

REQUESTS = 1000
ATTENTION = ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")
USER = 12345
BARE: dict[str, str | None] = {"PATH": "", "CXX": None, "JIT_KERNEL_SEALED": "1"}
DEMO = Path(config.package_dir()).parent / "examples" / "first_call.py"


def serve(requests: int) -> dict[str, Any]:
    """Answer requests, each a prefill and a decode step over pages; how many answers are right, and what happened."""
    known, right = len(jit.events()), 0
    generator = torch.Generator().manual_seed(0)
    starts, length = torch.tensor([0, 9], dtype=torch.int32), torch.tensor([9], dtype=torch.int32)
    pages = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    with torch.no_grad():
        for _ in range(requests):
            q, k, v = (torch.randn(9, heads, 16, generator=generator) for heads in (4, 2, 2))
            out = jit_kernel.flash_attn_varlen_func(q, k, v, starts, starts, 9, 9, causal=True)
            paged = [torch.stack([each[3:6], each[6:9], each[0:3]]) for each in (k, v)]
            step = jit_kernel.flash_attn_with_kvcache(
                q[None, 8:], *paged, cache_seqlens=length, page_table=pages, causal=True
            )
            by_head = [each.transpose(0, 1)[None].double() for each in (q, k, v)]
            exact = scaled_dot_product_attention(*by_head, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
            right += torch.allclose(out.double(), exact, atol=1e-5) and torch.allclose(
                step[0].double(), exact[8:], atol=1e-5
            )
    actions = [event.action for event in jit.events()]
    return {"right": right, "compiled": actions.count("compiled"), "after": actions[known:]}


def unpacked_and_served(pack: str, profile: str) -> dict[str, Any]:
    """As in an image without compilers: Triton cannot be imported, PATH is empty, the process is sealed."""
    sys.modules["triton"] = None  # type: ignore[assignment]
    assert cache.main(["unpack", pack]) == 0
    with mock.patch.multiple(flash_attention_v3, **dict.fromkeys(ATTENTION)):  # a check that made a call would raise
        assert warmup.main(["--check", "--profile", profile]) == 0
    done = ready.preload(profile)
    return {**serve(REQUESTS), "loaded": done["loaded"]}


def as_another_user(pack: str) -> Any:
    """Read the demo while its modules can be read, then become the other user."""
    return tiny.as_user(USER, partial(unpacked_and_demonstrated, runpy.run_path(str(DEMO)), pack))


def unpacked_and_demonstrated(demo: dict[str, Any], pack: str) -> dict[str, Any]:
    """The demo's prefill and decode step, as the user that unpacked the pack."""
    assert os.geteuid() == USER and cache.main(["unpack", pack]) == 0
    errors = []
    for name in ("prefill", "decode"):
        ours, _, exact = demo[name]("cpu", torch.float32)
        errors.append(float((ours().double() - exact).abs().max()))
    return {"right": max(errors) < 1e-5, "compiled": tiny.compiled(), "loaded": len(jit.events())}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can reach, which pytest's own are not."""
    path = Path(tempfile.mkdtemp(prefix="jit_kernel-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def shipped(folder: Path) -> tuple[str, str]:
    """A pack and the profile that it was made from: of a run that took its kernel from this checkout's store."""
    jit.build(kernels.forward_spec("fp32"), cpu_target())
    profile, pack = str(folder / "profile"), str(folder / "kernels.pack")
    built: dict[str, str | None] = {
        "JIT_KERNEL_CACHE_DIR": str(folder / "built"), "JIT_KERNEL_CACHE_LAYERS": str(config.cache_dir()),
    }  # fmt: skip
    recorded = children.run(serve, 2, environment={**built, "JIT_KERNEL_RECORD": profile}, scratch=folder)
    assert recorded.error == "" and recorded.result["right"] == 2, recorded
    packed = children.run(cache.main, ["pack", pack, "--profile", profile], environment=built, scratch=folder)
    assert packed.error == "" and packed.result == 0, packed
    for name in (profile, pack):
        os.chmod(name, 0o644)
    return pack, profile


def test_a_server_that_was_made_ready_compiles_and_loads_nothing(folder, shipped):
    environment = {**BARE, "JIT_KERNEL_CACHE_DIR": str(folder / "home" / "store")}
    outcome = children.run(unpacked_and_served, *shipped, environment=environment, scratch=folder)
    assert outcome.error == "", outcome
    assert outcome.result == {"right": REQUESTS, "compiled": 0, "after": [], "loaded": 1}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_the_demo_runs_from_a_pack_in_another_users_home(folder, shipped):
    """Which that user unpacked there: nobody else's folder is written, and nothing is compiled."""
    assert unpack.__name__ in sys.modules  # the other user cannot read this user's modules
    home = folder / "home"
    home.mkdir()
    os.chown(home, USER, USER)
    environment = {**BARE, "HOME": str(home), "JIT_KERNEL_CACHE_DIR": str(home / ".cache" / "jit_kernel")}
    outcome = children.run(as_another_user, shipped[0], environment=environment, scratch=folder)
    assert outcome.error == "" and outcome.result == {"right": True, "compiled": 0, "loaded": 1}, outcome
    owners = {path.stat().st_uid for path in (home / ".cache").rglob("*")}
    assert owners == {USER}
