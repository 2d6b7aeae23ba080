"""What the toolkit refuses, and how it says so: names, positions, files and lines."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jit_kernel import config, jit
from jit_kernel.device import Target
from jit_kernel.engine import closure, cuda_entry, nvrtc, wanted
from jit_kernel.toolkit import operators, shapes
from tests.support import outsider, shared_numbers

GPU = "cuda:sm_90a"
TEXT = """
#include "inner/types.cuh"
template <class T>
__global__ void __launch_bounds__(256)
    every(const T* x, /* a comment, */ void* bytes, float by, double d, bool on, signed char c, unsigned short h,
          unsigned u, Long l, unsigned long long w, const int* __restrict__ index,
          const __grid_constant__ Pair pair) {
  if (on) *(float*)bytes = by + d + c + h + u + l + w + index[0] + (float)x[0] + pair.b;
}
extern "C" __global__ void plain(float* x) { x[0] = 1; }
__global__ void broken(float* x) {
  x[0] = missing;
}
"""
TYPES = "#pragma once\nusing Long = long;\nstruct Pair { int a, b, c; };\n"
SOURCES = jit.Sources(text={"every.cuh": TEXT.replace("missing", "0"), "inner/types.cuh": TYPES})
BROKEN = jit.Sources(text={"every.cuh": TEXT, "inner/types.cuh": TYPES})
needs_nvrtc = pytest.mark.skipif(nvrtc.find() is None, reason="no NVRTC")


@pytest.fixture(scope="module")
def every() -> dict[str, Any]:
    kernel = jit.cuda(SOURCES, "every.cuh", entry="every<__nv_bfloat16>", device=GPU)
    return jit.load_cubin(kernel.spec, kernel.target).metadata


@needs_nvrtc
def test_the_compiler_says_what_the_parameters_are(every):
    assert every["types"] == "ppfd?bHIlLpx" and every["elements"] == "b*--------i-"
    assert every["sizes"] == [8, 8, 4, 8, 1, 1, 2, 4, 8, 8, 8, 12]
    assert every["arguments"] == ["x", "bytes", "by", "d", "on", "c", "h", "u", "l", "w", "index", "pair"]
    kernel = jit.cuda(SOURCES, "every.cuh", entry="plain", device=GPU)
    made = jit.load_cubin(kernel.spec, kernel.target)
    assert (made.metadata["name"], made.metadata["types"], made.metadata["elements"]) == ("plain", "p", "f")
    # As nvcc leaves it, which tells no symbol: found by its name among all kernels of the cubin.
    assert cuda_entry.metadata(made.image, "", "plain", [])["name"] == "plain"
    with pytest.raises(cuda_entry.EntryError, match=r"holds 0 kernels of the name other \(.*plain"):
        cuda_entry.metadata(made.image, "", "other", [])
    assert cuda_entry.metadata(made.image, "", "plain", ["__global__ void plain(int a, int b);"])["arguments"] == [""]


WRONG = {
    "x, is a float; it must be a bfloat16 tensor": (0, 1.0),
    "x, is a tensor that is not on CUDA": (0, torch.zeros(1, dtype=torch.bfloat16)),
    "bytes, is an int; it must be a tensor": (1, 7),
    "by, is None; it must be a float": (2, None),
    "d, is a bool; it must be a float": (3, True),
    "on, is an int; it must be a bool": (4, 1),
    "c, is 128, an int that 8 bits cannot hold": (5, 128),
    "h, is -1, an int that unsigned 16 bits cannot hold": (6, -1),
    "u, is 4294967296, an int that unsigned 32 bits cannot hold": (7, 1 << 32),
    "l, is a float; it must be an int": (8, 1.0),
    "w, is -1, which is negative": (9, -1),
    "index, is a bool; it must be an int32 tensor": (10, False),
    "pair, is an int; it must be bytes of length 12": (11, 5),
    "pair, is 3 bytes; it must be bytes of length 12": (11, b"abc"),
    "pair, is 13 bytes; it must be bytes of length 12": (11, bytes(13)),
}


@needs_nvrtc
def test_a_wrong_argument_is_named_before_anything_is_launched(every):
    launcher = jit.load(jit.LAUNCHER, Target.parse(GPU))
    sizes = ",".join(map(str, every["sizes"]))
    given = (every["name"], every["types"], every["elements"], sizes, ",".join(every["arguments"]), every["title"])
    handle = launcher["load_entry"](b"no cubin", *given)
    right = (None, None, 1, 2.0, True, -128, 65535, 2**32 - 1, -(2**63), 2**63 - 1, None, bytes(12))
    for words, (place, value) in WRONG.items():
        arguments = [*right[:place], value, *right[place + 1 :]]
        with pytest.raises(TypeError, match=re.escape(f"every<__nv_bfloat16>: argument {place}, {words}")):
            launcher["launch_entry"](handle, 1, 0, *arguments)
    with pytest.raises(TypeError, match="11 kernel arguments; it must be 12: x,bytes,by,"):
        launcher["launch_entry"](handle, 1, 0, *right[:-1])
    with pytest.raises(TypeError, match="no argument is a tensor"):
        launcher["launch_entry"](handle, 1, 0, *right)
    assert launcher["launch_entry"](handle, 0, 0, *right) is None  # no blocks
    with pytest.raises(ValueError, match="97 parameters; at most 96"):
        launcher["load_entry"](b"", "k", "p" * 97, "", "", "", "k")


@needs_nvrtc
def test_a_compilers_error_is_the_users_own_file_and_line(tmp_path, monkeypatch):
    monkeypatch.setenv("JIT_KERNEL_CACHE_DIR", str(tmp_path))
    config.reload()
    try:
        wrong = {
            r'^every.cuh\(12\): error: identifier "missing" is undefined': (BROKEN, "plain"),
            r'^unit.cu\(\d\): error: identifier "nothing" is undefined': (SOURCES, "nothing<float>"),
        }
        for words, (sources, entry) in wrong.items():
            with pytest.raises(jit.CompileError) as caught:
                jit.build(jit.cuda(sources, "every.cuh", entry=entry, device=GPU).spec, Target.parse(GPU))
            assert re.search(words, str(caught.value), re.MULTILINE), caught.value
        kept = next((tmp_path / ".failed").glob("*/sources/inner/types.cuh"))
        assert kept.read_text() == TYPES
    finally:
        monkeypatch.undo()
        config.reload()


REFUSED = {
    r"takes a folder or text=; it got none": lambda: jit.Sources(),
    r"takes a folder or text=; it got both": lambda: jit.Sources(".", text={}),
    r"folder is '/no/such'; it must be a folder": lambda: jit.Sources("/no/such"),
    r"text has a file named '../a.h'": lambda: jit.Sources(text={"../a.h": ""}),
    r"text\['a.h'\] is of type bytes": lambda: jit.Sources(text={"a.h": b""}),  # type: ignore[dict-item]
    r"name is 'a/b'": lambda: jit.Sources(text={"a.h": ""}, name="a/b"),
    r"file is 'a.cuh'; it must be a file of the texts every.cuh": lambda: jit.cuda(SOURCES, "a.cuh", entry="f"),
    r"flags has '-I/usr'": lambda: jit.cuda(SOURCES, "every.cuh", entry="plain", flags=["-I/usr"]),
    r"flags is '-O3'; it must be a list": lambda: jit.cuda(SOURCES, "every.cuh", entry="plain", flags="-O3"),
    r"device is 'cpu'; it must be of cuda": lambda: jit.cuda(SOURCES, "every.cuh", entry="plain", device="cpu"),
    r"device is 'cuda:0'; it must be of cpu": lambda: jit.library(SOURCES, "every.cuh", exports=["f"], device="cuda:0"),
    r"exports is 'f'": lambda: jit.library(SOURCES, "every.cuh", exports="f"),
    r"exports is empty": lambda: jit.library(SOURCES, "every.cuh", exports=[]),
    r"exports has 'f<int>'; .* give one": lambda: jit.library(SOURCES, "every.cuh", exports=["f<int>"]),
    r"torch.complex64 has no C\+\+ type on cuda": lambda: jit.ctype(torch.complex64),
    r"torch.float8_e5m2 has no C\+\+ type on cpu": lambda: jit.ctype(torch.zeros(1, dtype=torch.float8_e5m2)),
    r"function is .*lambda.* at the top level": lambda: jit.triton(lambda x: x, signature={}),
    r"function is 'no.such:f'; it must be module:function": lambda: jit.triton("nosuch:f", signature={}),
    r"function is 'a.py:f'; it must be file.py": lambda: jit.triton("a.py:f", sources=SOURCES, signature={}),
    r"constants is .*; each must be": lambda: jit.triton("json:dumps", signature={}, constants={"A": torch.float16}),
    r"declare: 7 is no kernel": lambda: jit.declare(7),
    r"name is 'scaled'; it must be namespace::name": lambda: jit.operator("scaled", len, fake=len),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_refused_at_once(words):
    with pytest.raises((TypeError, ValueError), match=words.replace("no.such", "nosuch")):
        REFUSED[words]()


def test_a_text_includes_nothing_that_no_key_covers(tmp_path):
    (tmp_path / "other.h").write_text("")
    for path in (str(tmp_path / "other.h"), f"../../../../../../..{tmp_path}/other.h"):
        sources = jit.Sources(text={"folder/a.cuh": f'#include "{path}"\n'})
        kernel = jit.cuda(sources, "folder/a.cuh", entry="f", device=GPU)
        with pytest.raises(closure.ClosureError, match="lies outside the kernel sources"):
            jit.is_stored(kernel.spec, kernel.target)


SHAPES = {
    r"grid is 1.5; it must be an int": lambda: shapes.pack_grid(1.5),  # type: ignore[arg-type]
    r"grid is \(1, 2, 3, 4\)": lambda: shapes.pack_grid((1, 2, 3, 4)),
    r"grid is -1; each must be at least 0": lambda: shapes.pack_grid(-1),
    r"grid is \(1, 65536\); its y must be under": lambda: shapes.pack_grid((1, 65536)),
    r"block is 0; each must be at least 1": lambda: shapes.pack_shape(0, 0, 1, False, False),
    r"block is \(32, 64\); it must have at most 1024": lambda: shapes.pack_shape((32, 64), 0, 1, False, False),
    r"block is \(1, 1, 65\); .* 64 along z": lambda: shapes.pack_shape((1, 1, 65), 0, 1, False, False),
    r"cluster is 17; it must have at most 16": lambda: shapes.pack_shape(1, 0, 17, False, False),
    r"shared_bytes is -1; it must be 0 to": lambda: shapes.pack_shape(1, -1, 1, False, False),
    r"shared_bytes is 1.0; it must be an int": lambda: shapes.pack_shape(1, 1.0, 1, False, False),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("words", SHAPES)
def test_what_no_launch_can_have(words):
    with pytest.raises((TypeError, ValueError), match=words):
        SHAPES[words]()


def test_python_packs_a_launch_as_the_launcher_unpacks_it():
    text = (shared_numbers.INCLUDE / "launch_shape.h").read_text(encoding="utf-8")
    grid, shape = (
        text.partition(f"{name}(int64_t packed) {{")[2].partition("}")[0] for name in ("grid_of", "shape_of")
    )
    read = re.compile(r"(\w+(?:\.\w)?) = fields\.next\((\d+)\)( \+ 1)?(?: != 0)?;")

    def unpacked(body: str, packed: int) -> dict[str, int]:
        values = {}
        for name, bits, more in read.findall(body):
            values[name], packed = (packed & (1 << int(bits)) - 1) + bool(more), packed >> int(bits)
        assert packed == 0
        return values

    assert unpacked(grid, shapes.pack_grid((2**31 - 1, 65535, 7))) == {
        "grid.x": 2**31 - 1,
        "grid.y": 65535,
        "grid.z": 7,
    }
    assert shapes.pack_grid(5) == 5 and shapes.pack_grid((3, 0)) == 0
    found = unpacked(shape, shapes.pack_shape((8, 4, 2), 232448, (2, 3, 1), True, False))
    assert list(found.values()) == [8, 4, 2, 232448, 2, 3, 1, True, False]
    found = unpacked(shape, shapes.pack_shape((1, 1024), 0, 16, False, True))
    assert list(found.values()) == [1, 1024, 1, 0, 16, 1, 1, False, True]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_a_launch_says_so():
    with pytest.raises(NotImplementedError, match="no such device is present"):
        jit.cuda(SOURCES, "every.cuh", entry="plain")[1, 32](None)
    with pytest.raises(TypeError, match=r"\[5\] is no shape; it must be \[grid, block\]"):
        jit.cuda(SOURCES, "every.cuh", entry="plain")[5]


def test_ctype_is_of_a_tensors_device():
    x = torch.zeros(1, dtype=torch.bfloat16)
    assert jit.ctype(x) == "jit_kernel::bf16" and jit.ctype(x.dtype) == "__nv_bfloat16"
    assert jit.ctype(torch.float32, "cpu") == "float"


def test_a_function_and_its_name_are_the_same_triton_kernel():
    given = {"signature": {"package": "*fp32"}, "constants": {"N": 4, "SCALE": 0.5}}
    kernel = jit.triton(outsider.warm_up, **given)
    assert kernel.spec == jit.triton("tests.support.outsider:warm_up", **given).spec
    assert kernel.spec.kernel == "tests/warm_up" and dict(kernel.spec.variant)["SCALE"] == "0.5"
    _, inputs = wanted.key_of(kernel.spec, Target.parse(GPU))
    assert {"tests/support/outsider.py", "tests/__init__.py"} <= set(inputs)
    assert not any(name.startswith(("torch/", "jit_kernel/")) for name in inputs)


class Seen(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(str(func))
        return func(*args, **(kwargs or {}))


def test_an_operator_is_used_only_while_something_compiles(monkeypatch):
    """With a double of torch's answer; the page's own program asks torch.compile itself."""

    def doubled(x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(x * 2)

    call = jit.operator("jit_kernel_tests::doubled", doubled, fake=lambda x, out: None, mutates=["out"])
    x, out = torch.ones(3), torch.zeros(3)
    schema = torch.ops.jit_kernel_tests.doubled.default._schema
    assert str(schema) == "jit_kernel_tests::doubled(Tensor x, Tensor(a1!) out) -> ()"
    for compiling in (False, True):
        monkeypatch.setattr(operators, "is_compiling", lambda answer=compiling: answer)
        out.zero_()
        with Seen() as seen:
            call(x, out)
        assert torch.equal(out, x * 2)
        assert ("jit_kernel_tests.doubled.default" in seen.operators) == compiling
