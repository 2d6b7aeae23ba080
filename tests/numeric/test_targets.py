"""The CPU kernels as other machines compile them: AVX-512 with and without bf16, AVX2, plain C++."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import jit_kernel.flash_attention_v3 as fa3
from jit_kernel import device
from jit_kernel.device import Target, cpu_target
from jit_kernel.fa3 import cpu
from jit_kernel.fa3.cpu import known as cpu_plain
from tests.support import case_run, cases, hidden

FUNCTIONS = {name: getattr(fa3, name) for name in (cases.VARLEN, cases.KVCACHE, cases.DENSE)}
CASES = 60
PLAINER = ["x86-64", "x86-64-v3", "x86-64-v4"]  # each runs what those before it run


def plainer_targets() -> list[str]:
    """Targets other than this machine's own that it can run, with fewer instructions each."""
    here = cpu_target()
    if here.architecture not in PLAINER:
        return ["cpu:generic"]
    fewer = [f"cpu:{name}" for name in PLAINER[: PLAINER.index(here.architecture) + 1]]
    if "amxbf16" in here.features:
        fewer.append(f"cpu:{here.architecture}+avx512bf16+avx512vnni")
    return [name for name in fewer if name != str(here)]


@pytest.fixture(params=plainer_targets())
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    """A target that this machine can run, in the place of its own."""
    wanted = Target.parse(request.param)
    monkeypatch.setattr(cpu, "cpu_target", lambda: wanted)
    monkeypatch.setattr(cpu, "_forwards", {})
    monkeypatch.setattr(cpu, "_combines", {})
    monkeypatch.setattr(cpu_plain, "_libraries", {})
    return wanted


@pytest.mark.parametrize("dtype", cases.CPU.dtypes, ids=str)
def test_random_cases_on_another_target(target: Target, dtype: torch.dtype, say: list[str]) -> None:
    space = cases.Space(f"{target}", dtypes=(dtype,), features=cases.CPU.features)
    worst = max(case_run.judge(cases.draw(seed, space), FUNCTIONS).worst for seed in range(CASES))
    assert sum(hidden.differ(hidden.draw(seed, space), FUNCTIONS) > 0 for seed in range(CASES // 2)) > CASES // 4
    assert cpu._forwards  # loaded anew, for this target
    say.append(f"{target} {str(dtype).removeprefix('torch.')}: {CASES} random cases, worst share {worst:.3f}")


@pytest.mark.parametrize(
    ("vendor", "more", "target"),
    [
        ("AuthenticAMD", (), "cpu:x86-64-v4+avx512bf16"),
        ("AuthenticAMD", ("avx512_vnni",), "cpu:x86-64-v4+avx512bf16+avx512vnni"),
        ("GenuineIntel", (), "cpu:x86-64-v4"),
        ("GenuineIntel", ("avx512_vnni",), "cpu:x86-64-v4+avx512vnni"),
        ("GenuineIntel", ("amx_bf16", "amx_tile"), "cpu:x86-64-v4+amxbf16+avx512bf16"),
        ("GenuineIntel", ("amx_bf16", "amx_tile", "avx512_vnni"), "cpu:x86-64-v4+amxbf16+avx512bf16+avx512vnni"),
        (
            "GenuineIntel",
            ("amx_bf16", "amx_tile", "amx_fp16", "avx512_vnni"),
            "cpu:x86-64-v4+amxbf16+avx512bf16",
        ),
    ],
)
def test_the_target_names_what_pays(
    vendor: str, more: tuple[str, ...], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = frozenset((vendor, *device._V4, "avx512_bf16", *more))
    monkeypatch.setattr(device, "_cpu", None)
    monkeypatch.setattr(device, "_machine", lambda: "x86-64")
    monkeypatch.setattr(device, "_cpu_flags", lambda: flags)
    assert str(device.cpu_target()) == target
