"""A pack for a GPU that need not be here, and an image without compilers that serves from it on one.

`python -m tests.support.gpu_pack build FOLDER` compiles and packs on any machine with NVRTC, Triton and g++; `serve
FOLDER` and `cold FOLDER` run where the GPU is, with no more than torch, tvm-ffi and the pack (`cold`: NVRTC, and the
launchers that a platform wheel has in it). tests/engine/test_shipped_gpu.py runs all three.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import jit_kernel
from jit_kernel import jit, ops, ready
from jit_kernel.commands import cache
from jit_kernel.commands.why import explain
from jit_kernel.device import Target
from jit_kernel.engine import cubin, record
from jit_kernel.fa3 import dispatch
from jit_kernel.ops import launch
from jit_kernel.ops.rms_norm import FEW

TARGET = Target("cuda", "sm_90a")
_SOURCE = "template <class T> __global__ void twice(const T* x, T* out, int n) {\n  " \
    "const int i = blockIdx.x * blockDim.x + threadIdx.x;\n  if (i < n) out[i] = x[i] * T(2);\n}\n"  # fmt: skip
TWICE = jit.cuda(jit.Sources(text={"twice.cuh": _SOURCE}, name="own"), "twice.cuh", entry="twice<float>")


def attention(name: str, device: str) -> tuple[str, dict[str, Any]]:
    """A public function and its arguments: Hopper's prefill and decode, and what portable alone serves."""
    torch.manual_seed(len(name))
    q, k, v = (torch.randn(2, 300, heads, 128).bfloat16().to(device) for heads in (8, 2, 2))
    if name == "decode":
        used = torch.tensor([300, 17], dtype=torch.int32, device=device)
        return "flash_attn_with_kvcache", {"q": q[:, :1], "k_cache": k, "v_cache": v, "cache_seqlens": used}
    return "flash_attn_func", {"q": q, "k": k, "v": v, "causal": True, "num_splits": 1 + (name == "portable")}


ATTENTION = ("prefill", "decode", "portable")


def kernels() -> list[jit.KernelSpec]:
    """What the calls need for the GPU, as `why` names it, and the launchers."""
    listed = {str(spec): spec for spec in dispatch.select_variants(TARGET, {})}
    found = [spec for spec in listed.values() if ("function", "launcher") in spec.variant]
    for name in ATTENTION:
        function, arguments = attention(name, "cpu")
        chosen = explain(function, device=str(TARGET), **arguments)
        assert chosen.implementation == ("portable" if name == "portable" else "hopper"), chosen
        found.append(listed[str(chosen.kernel)])
    found += [spec for spec in listed.values() if _joins(dict(spec.variant))]
    return list(dict.fromkeys([*found, cubin.LAUNCHER, _op().spec, TWICE.spec]))


def _joins(fields: dict[str, Any]) -> bool:
    """Whether a kernel joins the parts of the split call that portable serves."""
    return {
        "function": "combine",
        "dtype": "bf16",
        "head_dim_v": 128,
        "aligned": True,
        "splits": 2,
    }.items() <= fields.items()


def _op() -> jit.Kernel:
    """The instance of rms_norm that `others` calls."""
    x = torch.empty(33, 512, dtype=torch.bfloat16)
    _, kept = launch.block_of(512 // 8, x.shape[0], few=FEW)
    return launch.cuda_kernel("rms_norm", launch.entry("rms_norm", x.dtype, x.dtype, x.dtype, False, True, kept),
                              str(TARGET))  # fmt: skip


def build(folder: Path) -> None:
    """Compile, and write the profile, the pack, and a store of the launchers alone."""
    specs = kernels()
    (folder / "profile").write_text("".join(
        json.dumps({**record._plain(spec), "target": str(TARGET)}, sort_keys=True) + "\n" for spec in specs
    ))  # fmt: skip
    places = [(jit.build(spec, TARGET), spec) for spec in specs]
    assert cache.main(["pack", str(folder / "kernels.pack"), "--profile", str(folder / "profile")]) == 0
    for place, spec in places:
        if spec.route == "host":
            shutil.copytree(place, folder / "launchers" / spec.kernel / str(TARGET) / place.name, dirs_exist_ok=True)


def _exact(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    parts = [each.transpose(0, 1)[None].double() for each in (q, k, v)]
    return scaled_dot_product_attention(*parts, is_causal=causal, enable_gqa=True)[0].transpose(0, 1)


def attended(name: str) -> float:
    """The largest error of a call on the GPU."""
    function, arguments = attention(name, "cuda")
    out = getattr(jit_kernel, function)(**arguments)
    lengths = arguments["cache_seqlens"].tolist() if name == "decode" else [300, 300]
    keys, values = (arguments.get(each, arguments.get(f"{each}_cache")) for each in "kv")
    errors = []
    for i, length in enumerate(lengths):
        exact = _exact(arguments["q"][i], keys[i, :length], values[i, :length], name != "decode")
        errors.append(float((out[i].double() - exact).abs().max()))
    return max(errors)


def others() -> dict[str, float]:
    """The errors of an operator and of a kernel of somebody's own."""
    x = torch.randn(33, 512, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(512, device="cuda", dtype=torch.bfloat16)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    y, out = torch.randn(1000, device="cuda"), torch.empty(1000, device="cuda")
    TWICE[4, 256](y, out, 1000)
    return {"op": float((ops.rms_norm(x, weight).double() - exact).abs().max()),
            "own": float((out - 2 * y).abs().max())}  # fmt: skip


def serve(folder: Path) -> dict[str, Any]:
    """Unpack, seal, preload and call; the errors, and what was compiled or loaded behind preload()."""
    sys.modules["triton"] = None  # type: ignore[assignment]
    assert cache.main(["unpack", str(folder / "kernels.pack")]) == 0
    jit.seal()
    done = ready.preload(folder / "profile")
    known = len(jit.events())
    put: list[str] = []
    real: Callable[..., int] = cubin.DeviceKernels.put_on_device
    on_device = {spec for family in cubin._families.values() for spec in family._on_device}

    def watched(self: cubin.DeviceKernels, spec: jit.KernelSpec) -> int:
        put.extend([] if spec in on_device else [str(spec)])
        return real(self, spec)

    cubin.DeviceKernels.put_on_device = watched  # type: ignore[method-assign]
    errors = {name: attended(name) for name in ATTENTION} | others()
    torch.cuda.synchronize()
    after = [f"{event.action} {event.spec}" for event in jit.events()[known:]]
    return {"errors": errors, "loaded": done["loaded"], "compiled": jit.stats()["compiled"], "after": after, "put": put}


def cold(folder: Path) -> dict[str, Any]:
    """Nothing in the store but a wheel's launchers, no host compiler: NVRTC compiles what it is asked for."""
    sys.modules["triton"] = None  # type: ignore[assignment]
    errors = {"decode": attended("decode")} | others()
    torch.cuda.synchronize()
    compiled = [event.spec.route for event in jit.events() if event.action == "compiled"]
    return {"errors": errors, "compiled": compiled}


def main() -> None:
    """Run one of the three."""
    folder = Path(sys.argv[2]).absolute()
    print(json.dumps({"build": build, "serve": serve, "cold": cold}[sys.argv[1]](folder)))


if __name__ == "__main__":
    main()
