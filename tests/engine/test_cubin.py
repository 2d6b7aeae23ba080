"""One GPU's launcher and kernels, with doubles of the compiled things: what is compiled when, and what is refused."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from jit_kernel import jit
from jit_kernel.device import Target
from jit_kernel.engine import build, cubin, memory
from jit_kernel.engine.build import KernelSpec
from jit_kernel.fa3.hopper import kernels as hopper_kernels
from jit_kernel.fa3.hopper import known
from jit_kernel.fa3.hopper import loaded as hopper_loaded
from jit_kernel.fa3.portable import kernels as portable_kernels

TARGET = Target("cuda", "sm_90a")
MAKERS = {
    "hopper": (hopper_loaded.DeviceKernels, hopper_kernels.forward_spec("bf16", 64, 64, False, False)),
    "portable": (portable_kernels.DeviceKernels, portable_kernels.combine_spec("fp32", "bf16", 64, True, 2)),
}


class Compiled:
    """Double of memory and store: a launcher of Python functions, cubins of no code, and what was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stored: set[str] = set()
        self.launchers: list[KernelSpec] = []
        self.cubins: list[KernelSpec] = []
        self.prepared: list[int] = []
        self.loaded: list[tuple[Any, ...]] = []
        self.threads: list[str] = []
        self.capturing = False
        self.failure: Exception | None = None
        monkeypatch.setattr(build, "is_stored", lambda spec, target: spec.route in self.stored)
        monkeypatch.setattr(known, "_decode", None)  # so that what a launcher gives is taken back
        monkeypatch.setattr(memory, "load", self._load)
        monkeypatch.setattr(memory, "load_cubin", self._load_cubin)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)

    def _load(self, spec: KernelSpec, target: Target) -> dict[str, Any]:
        self.threads.append(threading.current_thread().name)
        self.launchers.append(spec)
        if self.failure is not None:
            raise self.failure
        loading = {"load_kernel": self._load_kernel, "load_plain": self._load_plain}
        names = ("forward", "forward_fp8", "forward_cached", "forward_widened", "append", "decode", "mla", "launch")
        launching = {name: name for name in names}
        return {"prepare": self._prepare, **loading, **launching, "known_decode": self._known_decode}

    def _known_decode(self, *arguments: Any) -> int:
        return 0  # declined

    def _prepare(self, index: int) -> int:
        self.prepared.append(index)
        return 132

    def _load_kernel(self, *arguments: Any) -> int:
        self.loaded.append(arguments)
        return len(self.loaded) + 6

    def _load_plain(self, *arguments: Any) -> int:
        return self._load_kernel("plain", *arguments)

    def _load_cubin(self, spec: KernelSpec, target: Target) -> memory.Cubin:
        self.cubins.append(spec)
        return memory.Cubin(b"image", {"name": "k", "types": "pi", "threads": 128, "shared": 64}, Path())


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    return Compiled(monkeypatch)


def threads_end() -> None:
    for thread in threading.enumerate():
        if thread.name == "jit_kernel-launcher":
            thread.join()


@pytest.mark.parametrize("name", MAKERS)
def test_a_kernel_is_loaded_under_its_key_by_a_launcher_that_is_prepared_once(name: str, compiled: Compiled) -> None:
    compiled.stored = {"host", "cuda", "triton"}
    maker, spec = MAKERS[name]
    kernels = maker(3, TARGET)
    assert kernels.multiprocessors == 132
    assert kernels.load(("a",), spec) == 7
    assert kernels.load(("b",), spec) == 7
    assert kernels.handles == {("a",): 7, ("b",): 7}
    assert compiled.prepared == [3]
    assert len(compiled.launchers) == 1
    expected = (64, 64, False, False, False, False) if name == "hopper" else ("k", "pi", 128, 64)
    assert compiled.loaded == [(b"image", *expected)]
    assert kernels.forward == "forward" if name == "hopper" else kernels.launch == "launch"


def test_a_variant_that_says_how_it_is_launched_needs_no_table_of_the_launchers(compiled: Compiled) -> None:
    variant = (("function", "fill"), ("dtype", "bf16"), ("threads", 128), ("shared_bytes", 64))
    kernels = hopper_loaded.DeviceKernels(0, TARGET)
    assert kernels.load(("a",), KernelSpec(hopper_kernels.FOLDER, "unit", "cuda", variant)) == 7
    assert compiled.loaded == [("plain", b"image", "fill", 128, 64)]


@pytest.mark.parametrize("name", MAKERS)
def test_a_launcher_that_is_not_stored_is_compiled_in_a_thread_at_once(name: str, compiled: Compiled) -> None:
    MAKERS[name][0](0, TARGET)
    threads_end()
    assert compiled.threads == ["jit_kernel-launcher"]
    compiled.stored = {"host"}
    MAKERS[name][0](0, TARGET)
    threads_end()
    assert len(compiled.threads) == 1


def test_the_call_that_needs_a_launcher_gets_its_error(compiled: Compiled) -> None:
    compiled.failure = RuntimeError("no g++ here")
    kernels = cubin.DeviceKernels(0, TARGET, cubin.launcher_of("somebody/elses"))
    threads_end()
    with pytest.raises(RuntimeError, match=r"no g\+\+ here"):
        kernels.load(("a",), MAKERS["portable"][1])
    assert kernels.handles == {}
    compiled.failure = None
    assert kernels.load(("a",), MAKERS["portable"][1]) == 7


def test_triton_compiles_under_capture(compiled: Compiled) -> None:
    """In a process of its own, which touches no stream: a first call may be captured."""
    compiled.capturing, compiled.stored = True, set()
    maker, spec = MAKERS["portable"]
    assert maker(0, TARGET).load(("a",), spec) == 7


@pytest.mark.parametrize("stored", [set(), {"host"}, {"cuda", "triton"}, {"host", "cuda", "triton"}])
def test_nothing_of_hoppers_is_compiled_under_capture(stored: set[str], compiled: Compiled) -> None:
    compiled.capturing, compiled.stored = True, stored
    maker, spec = MAKERS["hopper"]
    kernels = maker(0, TARGET)
    threads_end()
    if stored == {"host", "cuda", "triton"}:
        assert kernels.load(("a",), spec) == 7
        return
    with pytest.raises(RuntimeError, match=re.escape("python -m jit_kernel.warmup --target cuda:sm_90a")) as caught:
        kernels.load(("a",), spec)
    assert "while a CUDA graph is being captured" in str(caught.value)
    assert jit.events()[-1].action == "refused" and jit.events()[-1].reason == "a graph is being captured"
    assert ("function=launcher" in str(caught.value)) == ("host" not in stored)
    assert (str(spec) in str(caught.value)) == (spec.route not in stored)
    assert compiled.cubins == []
    assert compiled.loaded == []
    assert kernels.handles == {}


def test_a_kernel_that_is_made_ready_is_put_on_the_device_once(monkeypatch):
    """By preload(), before any call has named it; one of a family that does not serve this GPU is left alone."""
    put: list[bytes] = []

    class Family(cubin.DeviceKernels):
        compiles_under_capture = True

        def _launcher(self) -> Any:
            return {"load_kernel": lambda image: put.append(image) or len(put)}

        def _load_arguments(self, spec: jit.KernelSpec, made: jit.Cubin) -> tuple[Any, ...]:
            return ()

    target = Target("cuda", "sm_80")
    monkeypatch.setattr(cubin, "_families", {})
    monkeypatch.setattr(cubin.builds, "is_stored", lambda spec, target: True)
    monkeypatch.setattr(cubin.memory, "load_cubin", lambda spec, target: jit.Cubin(spec.unit.encode(), {}, Path()))
    family = Family(7, target, jit.KernelSpec("family", "", "host"))
    first, second = (jit.KernelSpec("family", unit, "cuda") for unit in ("one", "two"))
    cubin.ready(7, target, first)
    assert put == [b"one"] and family.load(("a",), first) == family.load(("b",), first) == 1 and put == [b"one"]
    assert family.load(("c",), second) == 2 and family.handles == {("a",): 1, ("b",): 1, ("c",): 2}
    cubin.ready(7, target, jit.KernelSpec("another", "", "cuda"))
    cubin.ready(8, target, first)
    assert len(put) == 2
