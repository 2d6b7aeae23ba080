"""What a launch hands to the driver, whose place a double takes: values, shapes, ways; and what a capture refuses."""

from __future__ import annotations

import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from jit_kernel import config, jit
from jit_kernel.device import Target
from jit_kernel.engine import nvrtc
from tests.support import children, driver_double

pytestmark = [
    pytest.mark.skipif(nvrtc.find() is None, reason="no NVRTC"),
    pytest.mark.skipif(shutil.which("g++") is None or sys.byteorder != "little", reason="no g++"),
]
GPU = "cuda:sm_90a"
TEXT = """
struct Pair { int a, b; };
template <class T>
__global__ void every(const T* x, float* out, void* bytes, float by, double d, bool on, signed char c,
                      unsigned short h, unsigned u, long long l, const __grid_constant__ Pair pair) {
  if (on) out[0] = by + d + c + h + u + l + pair.a;
}
"""
ADD = """
def add(x, n, on, BLOCK):
    tl.store(x + tl.arange(0, BLOCK), n)

import triton.language as tl
add.__annotations__["BLOCK"] = tl.constexpr
"""


def launched(driver: str, folder: str) -> dict[str, Any]:
    """In a process with the double: what each launch handed over, and what was refused."""
    capturing = True
    torch.cuda.is_current_stream_capturing = lambda: capturing
    sources = jit.Sources(text={"every.cuh": TEXT})
    kernel = jit.cuda(sources, "every.cuh", entry="every<__nv_bfloat16>", device=GPU)
    found: dict[str, Any] = {}
    try:
        kernel[1, 32]
    except RuntimeError as error:
        found["cold in a capture"] = str(error)
    (Path(folder) / "add.py").write_text(ADD, encoding="utf-8")
    signature = {"x": "*bf16", "n": "i64", "on": "i1"}
    add = jit.triton("add.py:add", sources=jit.Sources(folder), signature=signature, constants={"BLOCK": 64},
                     num_warps=2, target=GPU)  # fmt: skip
    jit.warm([kernel, add])  # now they are stored, and a capture takes them
    double = driver_double.Driver(driver)
    x, out = driver_double.on_cuda(0x10000, 4, 16), driver_double.on_cuda(0x20000, 2, 32)
    double.last.values_read = 11
    kernel[(5, 6, 7), (8, 4, 2), 1000](x, out, None, 1.5, -2, True, -3, 65535, 2**32 - 1, -(2**40), b"a struct")
    capturing = False
    found["values"] = bytes(double.last.values)[:88]
    found["plain"] = [*double.last.shape, *double.last.cluster, double.last.cooperative, double.last.programmatic]
    found["symbol"], found["loads"] = double.symbol, double.last.loads

    arguments = (x, None, None, 1.0, 2.0, False, 0, 0, 0, 0, bytes(8))
    for shared in (100_000, 60_000, 200_000):
        kernel[1, 32, shared](*arguments)
    found["most shared"] = double.last.most_shared
    for name, ways in (("early", {"programmatic": True}), ("together", {"cooperative": True}), ("16", {"cluster": 16})):
        kernel.launch(32, 256, **ways)(*arguments)
        last = double.last
        found[name] = [*last.shape, *last.cluster, last.cooperative, last.programmatic, last.non_portable]
    found["same launch"] = kernel[1, 32, 100_000] is kernel[1, 32, 100_000]
    before = double.last.launches
    kernel[(0, 3), 32](*arguments)
    found["of no blocks"] = double.last.launches - before
    for name, wrong in (
        ("elsewhere", (x, driver_double.on_cuda(0x20000, 2, 32, device=1), *arguments[2:])),
        ("dtype", (out, *arguments[1:])),
    ):
        try:
            kernel[1, 32](*wrong)
        except TypeError as error:
            found[name] = str(error)
    found["loads at the end"], found["refused launches"] = double.last.loads, double.last.launches - before

    double.last.values_read = 5
    add[9](x, 77, True)
    found["triton"] = struct.unpack("5Q", bytes(double.last.values)[:40]), [*double.last.shape]
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("double")
    entry = jit.build(jit.LAUNCHER, Target.parse(GPU))  # other tests need it too
    shutil.copytree(entry, folder / "store" / entry.relative_to(config.cache_dir()))
    (folder / "triton").mkdir()
    environment: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(folder / "store"), "JIT_KERNEL_LOG": "quiet"}
    work = (launched, str(driver_double.built(folder)), str(folder / "triton"))
    outcome = children.run(*work, environment=environment, scratch=folder)
    assert outcome.error == "", outcome
    result: dict[str, Any] = outcome.result
    return result


def test_every_argument_arrives_as_its_parameter_has_it(found):
    values = found["values"]
    assert struct.unpack("3Q", values[:24]) == (0x10000, 0x20000, 0)
    assert struct.unpack("f", values[24:28]) == (1.5,) and struct.unpack("d", values[32:40]) == (-2.0,)
    assert values[40] == 1 and struct.unpack("b", values[48:49]) == (-3,)
    assert struct.unpack("H", values[56:58]) == (65535,) and struct.unpack("I", values[64:68]) == (2**32 - 1,)
    assert struct.unpack("q", values[72:80]) == (-(2**40),)
    assert values[80:88] == b"a struct"
    assert found["symbol"].startswith("_Z5everyI13__nv_bfloat16E")


def test_every_shape_and_way_arrives(found):
    assert found["plain"] == [5, 6, 7, 8, 4, 2, 1000, 1, 1, 1, 0, 0]
    assert found["early"] == [32, 1, 1, 256, 1, 1, 0, 1, 1, 1, 0, 1, 0]
    assert found["together"] == [32, 1, 1, 256, 1, 1, 0, 1, 1, 1, 1, 0, 0]
    assert found["16"] == [32, 1, 1, 256, 1, 1, 0, 16, 1, 1, 0, 0, 1]
    assert found["most shared"] == 200_000
    assert found["same launch"] and found["of no blocks"] == 0


def test_a_kernel_is_loaded_once_and_nothing_wrong_is_launched(found):
    assert (found["loads"], found["loads at the end"], found["refused launches"]) == (1, 1, 0)
    assert "argument 1, out, is a tensor on cuda:1, and the first is on cuda:0" in found["elsewhere"]
    assert "argument 0, x, is a tensor of float32; it must be a bfloat16 tensor" in found["dtype"]


def test_a_capture_refuses_what_would_have_to_be_compiled(found):
    words = found["cold in a capture"]
    assert "text/every (entry=every<__nv_bfloat16>) would have to be compiled while a CUDA graph" in words
    assert "have it compiled by jit_kernel.jit.warm first" in words


def test_a_triton_kernel_gets_its_arguments_and_two_null_pointers(found):
    values, shape = found["triton"]
    assert values[0] == 0x10000 and values[1] == 77 and values[2] & 0xFF == 1 and values[3:] == (0, 0)
    assert shape[:6] == [9, 1, 1, 64, 1, 1]
