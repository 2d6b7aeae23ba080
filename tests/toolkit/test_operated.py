"""Somebody's own kernels are recorded, packed, served from a layer and refused when sealed, as jit_kernel's own are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
import torch

from jit_kernel import config, jit, ready, warmup
from jit_kernel.commands import cache, why
from jit_kernel.device import Target
from jit_kernel.engine import build, memory, nvrtc, record, seal
from jit_kernel.engine.entry import sha256_of
from jit_kernel.ops import launch
from tests.support import children

TARGET = Target("cuda", "sm_90a")
HEADER = "#pragma once\ntemplate <class T> __global__ void fill(T* out, T value) { *out = value; }\n"


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Settings of one test, and a process that is not sealed when it ends."""
    yield monkeypatch
    monkeypatch.undo()
    config.reload()


def settle(given: pytest.MonkeyPatch, **settings: object) -> None:
    for name, value in settings.items():
        given.setenv(f"JIT_KERNEL_{name}", str(value))
    config.reload()


@pytest.mark.skipif(nvrtc.find() is None, reason="no NVRTC")
def test_own_kernels_are_recorded_packed_layered_and_sealed(tmp_path, given, capsys):
    folder, profile, pack = tmp_path / "csrc", tmp_path / "profile", tmp_path / "kernels.pack"
    folder.mkdir()
    (folder / "fill.cuh").write_text(HEADER)
    kernels = [
        jit.cuda(sources, "fill.cuh", entry="fill<float>", device=str(TARGET)).spec
        for sources in (jit.Sources(folder, name="own"), jit.Sources(text={"fill.cuh": HEADER}, name="told"))
    ]
    wanted = [(spec, TARGET) for spec in kernels]
    settle(given, CACHE_DIR=tmp_path / "built", RECORD=profile)
    for spec in kernels:
        assert memory.load_cubin(spec, TARGET).metadata["types"]
    assert ready.kernels_of(profile) == record.read(profile) == wanted
    assert cache.main(["pack", str(pack), "--profile", str(profile)]) == 0
    given.delenv("JIT_KERNEL_RECORD")

    # Another machine: the pack in a layer, an empty store above it, nothing that may compile.
    settle(given, CACHE_DIR=tmp_path / "layer")
    assert cache.main(["unpack", str(pack)]) == 0
    settle(given, CACHE_DIR=tmp_path / "empty", CACHE_LAYERS=tmp_path / "layer")
    assert all(job.stored for job in warmup.plan_of_profile(str(profile), ()).jobs)
    given.setattr(seal, "_sealed", True)
    assert [build.obtain(*each).layer for each in wanted] == [str(tmp_path / "layer")] * 2
    assert [event.action for event in jit.events()[-2:]] == ["loaded"] * 2

    # An edit of a source is a refusal that says what changed and what to run.
    (folder / "fill.cuh").write_text(HEADER + "\n")
    says = "is not compiled (changed since the last build: fill.cuh), and this process is sealed; warm it up with: "
    command = (
        f"python -m jit_kernel.warmup --module MODULE --target {TARGET} --select 'entry=fill<float>', where MODULE"
    )
    with pytest.raises(jit.SealedError, match=re.escape(says + command)):
        build.obtain(kernels[0], TARGET)
    assert jit.events()[-1].action == "refused" and jit.events()[-1].spec == kernels[0]
    capsys.readouterr()


def built() -> str:
    """The sha256 of an operator's cubin, whose source has constants of its own."""
    kernel = launch.cuda_kernel("store_kv", launch.entry("store_kv", torch.bfloat16, torch.bfloat16, True), str(TARGET))
    return sha256_of(memory.load_cubin(kernel.spec, TARGET).image)


@pytest.mark.skipif(nvrtc.find() is None, reason="no NVRTC")
def test_two_builds_of_a_kernel_are_byte_equal(tmp_path):
    """In two processes and two stores, as the builds of a pack are."""
    found = [
        children.run(built, environment={"JIT_KERNEL_CACHE_DIR": str(tmp_path / name)}, scratch=tmp_path).result
        for name in ("one", "two")
    ]
    assert found[0] and found[0] == found[1]


@pytest.mark.skipif(nvrtc.find() is None, reason="no NVRTC")
def test_both_commands_say_why_a_declared_kernel_is_not_stored(tmp_path, given, capsys):
    """`cache why --module` and `why --module` look into layers and name what differs."""
    (tmp_path / "operated_kernels.py").write_text(
        f"from jit_kernel import jit\ntext = {{'fill.cuh': {HEADER!r}}}\n"
        "sources = jit.Sources(text=text, name='said')\n"
        "jit.declare(jit.cuda(sources, 'fill.cuh', entry='fill<int>'))\n"
    )
    given.syspath_prepend(str(tmp_path))
    other = jit.Sources(text={"fill.cuh": HEADER + "\n"}, name="said")
    settle(given, CACHE_DIR=tmp_path / "layer")
    jit.build(jit.cuda(other, "fill.cuh", entry="fill<int>", device=str(TARGET)).spec, TARGET)
    settle(given, CACHE_DIR=tmp_path / "empty", CACHE_LAYERS=tmp_path / "layer")
    asked = ["--module", "operated_kernels"]
    assert cache.main(["why", *asked, "--target", str(TARGET), "--select", "entry=fill<int>"]) == 1
    assert why.main([*asked, "--device", str(TARGET)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "said/fill" in line]
    assert len(lines) == 2 and all(line.endswith("changed since the last build: fill.cuh") for line in lines), lines


def test_sources_in_a_profile_that_are_refused(tmp_path):
    spec = jit.KernelSpec("own/fill", "", "cuda", sources=jit.Sources(tmp_path, name="own"), entry="fill")
    line, profile = {**record._plain(spec), "target": str(TARGET)}, tmp_path / "profile"
    for change, words in (
        ({"sources": {"folder": str(tmp_path / "gone"), "name": "own"}}, "gone'; it must be a folder that is there"),
        ({"sources": {"folder": "csrc", "name": "own"}}, "the folder 'csrc'; it must be an absolute path"),
        ({"sources": {"folder": str(tmp_path), "name": "../own"}}, "name is '../own'"),
        ({"sources": {"text": {"../up.cuh": ""}, "name": "own"}}, "a file named '../up.cuh'"),
        ({"sources": {"text": {"a.py": ""}, "name": "own"}, "route": "triton"}, "it must be a folder for triton"),
        ({"sources": "csrc"}, "sources is 'csrc'"),
        ({"entry": 3}, "entry is of type int"),
    ):
        profile.write_text(json.dumps({**line, **change}) + "\n")
        with pytest.raises(record.ProfileError, match=re.escape(words)):
            ready.kernels_of(profile)
    profile.write_text(json.dumps(line) + "\n")
    assert ready.kernels_of(profile) == [(spec, TARGET)]


def test_a_sealed_error_names_the_module_to_warm():
    """The ops' module for an operator; none for the launcher, which attention's warm-up compiles as well."""
    spec = jit.cuda(None, "ops/rms_norm.h", entry="x", device=str(TARGET)).spec
    assert seal.warmup_command(spec, TARGET).startswith("python -m jit_kernel.warmup --module jit_kernel.ops --target ")
    for target in (TARGET, Target("cuda", "sm_80")):
        assert seal.warmup_command(jit.LAUNCHER, target).endswith(f" --target {target} --select function=launcher")
        assert jit.LAUNCHER in warmup.specs_of(target, {"function": "launcher"})


def test_a_library_does_not_know_its_folder(tmp_path):
    """Two places of one source compile to the same bytes: __FILE__ names the sources, not this machine's folder."""
    made = []
    for name in ("here", "there"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.h").write_text(
            "inline int a() { return sizeof(__FILE__) + __FILE__[0]; }\ninline auto* f = __FILE__;\n"
        )
        unit = '#include "a.h"\nextern "C" __attribute__((visibility("default"))) '
        unit += "int __tvm_ffi_a(void*, const void*, int, void*) { return a() + f[1]; }\n"
        spec = jit.KernelSpec("own/a", unit, "host", sources=jit.Sources(folder, name="own"))
        with pytest.MonkeyPatch.context() as given:
            settle(given, CACHE_DIR=tmp_path / f"store-{name}")
            (image,) = jit.build(spec, Target("cpu", "x86-64")).glob("kernel.so")
            made.append(image.read_bytes())
    config.reload()
    assert made[0] == made[1] and b"own/a.h" in made[0]
