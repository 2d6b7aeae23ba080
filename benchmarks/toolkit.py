"""What the toolkit costs: a small CUDA kernel's first call, a warm process's, and the host time of a call.

    python benchmarks/toolkit.py

Cold: a fresh process whose store holds the launcher alone, or nothing. Warm: one whose store holds both. Each is the
median of processes, from the kernel's making to the end of its first launch; torch is imported and the GPU's context
is there before. Host time: of one call with 4 tensors and 2 scalars, the least of many rounds of calls, beside
tvm-ffi's bare call of an empty C++ function, torch.cuda._compile_kernel, a Triton launch and torch.add.

Without a GPU the first calls end before the driver would come, and a double stands in its place for the host time: then
the lines have `driver` none, and the peers that need a GPU are left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import record

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

TEXT = """
__global__ void small(const float* x, const float* weight, const float* rest, float* out, float eps, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = x[i] * weight[i] + rest[i] + eps;
}
"""
NOTHING = """
#include "jit_kernel/host/ffi_arguments.h"
inline void nothing(jit_kernel::FfiArguments& arguments) {
  for (int i = 0; i < 4; ++i) arguments.tensor();
  arguments.number();
  arguments.integer();
}
"""
TARGET = "cuda:sm_90a"  # without a GPU
GOALS = {"launcher stored": 0.5, "nothing stored": 2.5, "all stored": 0.010}  # seconds
GOAL_US = 6.0
ROUNDS, CALLS = 60, 200
SIZE = 256


def small_kernel() -> Any:
    """The kernel, for the GPU that is here or one that need not be."""
    import torch

    from jit_kernel import jit

    sources = jit.Sources(text={"small.cuh": TEXT}, name="benchmark")
    return jit.cuda(sources, "small.cuh", entry="small", device=None if torch.cuda.is_available() else TARGET)


def first_call() -> None:
    """In a process of its own: print the seconds of a first call and what was compiled."""
    import torch
    import tvm_ffi  # noqa: F401  (so that it is not timed)

    from jit_kernel import jit
    from jit_kernel.engine import cubin

    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    x, weight, rest = (torch.randn(SIZE, device=device) for _ in range(3))
    out = torch.empty_like(x)
    if on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    kernel = small_kernel()
    if on_gpu:
        kernel[1, SIZE](x, weight, rest, out, 0.5, SIZE)
        torch.cuda.synchronize()
    else:
        cubin.kernels_of(0, kernel.target)  # begins to compile the launcher, if need be
        jit.load_cubin(kernel.spec, kernel.target)
        jit.load(jit.LAUNCHER, kernel.target)
    seconds = time.perf_counter() - began
    if on_gpu and not torch.allclose(out, x * weight + rest + 0.5, atol=1e-5):  # a sum may be all but nothing
        raise RuntimeError("the kernel's answer is wrong")
    compiled = [event.spec.kernel for event in jit.events() if event.action == "compiled"]
    print(json.dumps({"seconds": seconds, "compiled": compiled}))


def first_calls(repeats: int) -> Iterator[dict[str, Any]]:
    """The lines of the three stores."""
    from jit_kernel import jit

    expected = {"launcher stored": 1, "nothing stored": 2, "all stored": 0}
    with tempfile.TemporaryDirectory() as folder:
        full = Path(folder) / "full"
        _in_store(full)
        for case, goal in GOALS.items():
            seconds = []
            for index in range(repeats):
                store = Path(folder) / f"{case.split()[0]}{index}"
                if case == "all stored":
                    store = full
                elif case == "launcher stored":
                    shutil.copytree(full / jit.LAUNCHER.kernel, store / jit.LAUNCHER.kernel)
                made = _in_store(store)
                if len(made["compiled"]) != expected[case]:
                    raise RuntimeError(f"{case}: it compiled {made['compiled']}")
                seconds.append(made["seconds"])
            value = statistics.median(seconds)
            yield {"case": "first call", "store": case, "goal": f"<= {goal} s", "value": round(value, 4)}


def _in_store(store: Path) -> dict[str, Any]:
    store.mkdir(exist_ok=True, mode=0o700)
    environment = {**os.environ, "JIT_KERNEL_CACHE_DIR": str(store), "JIT_KERNEL_LOG": "quiet", "PYTHONPATH": _path()}
    done = subprocess.run(
        [sys.executable, __file__, "--first-call"], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    made: dict[str, Any] = json.loads(done.stdout)
    return made


def _path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))


def least_us(call: Callable[[], object], settle: Callable[[], object]) -> float:
    """The least microseconds of a call over the rounds; between them the GPU empties its queue."""
    for _ in range(CALLS):
        call()
    best = float("inf")
    for _ in range(ROUNDS):
        settle()
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, (time.perf_counter() - began) / CALLS)
    settle()
    return best * 1e6


def host_times(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of one call's host time."""
    import torch

    from jit_kernel import jit

    host = jit.Sources(text={"nothing.h": NOTHING}, name="benchmark")
    library = jit.library(host, "nothing.h", exports=["JIT_KERNEL_EXPORT(nothing, 6, nothing)"])
    nothing = library.load()["nothing"]
    kernel = small_kernel()
    jit.warm([kernel])
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    x, weight, rest = (torch.randn(SIZE, device=device) for _ in range(3))
    out = torch.empty_like(x)
    settle: Callable[[], object] = torch.cuda.synchronize if on_gpu else lambda: None
    given: list[Any] = [x, weight, rest, out]
    if not on_gpu:
        from tests.support import driver_double

        torch.cuda.is_current_stream_capturing = lambda: False
        driver_double.Driver(str(driver_double.built(folder)))
        given = [driver_double.on_cuda(4096 * (i + 1), 2, 32) for i in range(4)]
    a, b, c, d = given
    launch = kernel[1, SIZE]
    calls: dict[str, Callable[[], object]] = {
        "jit.cuda": lambda: kernel[1, SIZE](a, b, c, d, 0.5, SIZE),
        "jit.cuda, the launch kept": lambda: launch(a, b, c, d, 0.5, SIZE),
        "tvm-ffi's bare call": lambda: nothing(a, b, c, d, 0.5, SIZE),
        "torch.add": lambda: torch.add(x, weight, out=out),
    }
    # The peers last: what one of them lacks on a machine costs no line of ours.
    for name, call in itertools.chain(calls.items(), _peers(a, b, c, d) if on_gpu else ()):
        line = {"case": "host time", "call": name, "value": round(least_us(call, settle), 3), "unit": "us"}
        yield {**line, "goal": f"<= {GOAL_US} us"} if name == "jit.cuda" else line


def _peers(a: Any, b: Any, c: Any, d: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    """The same call by Triton's and torch's own ways to a kernel."""
    import torch
    from toolkit_triton import small

    yield "Triton", lambda: small[(1,)](a, b, c, d, 0.5, SIZE, BLOCK=SIZE)
    # It passes every float as a double.
    text = TEXT.replace("__global__", 'extern "C" __global__').replace("float eps", "double eps")
    compiled = torch.cuda._compile_kernel(text, "small")
    yield "torch.cuda._compile_kernel", lambda: compiled((1, 1, 1), (SIZE, 1, 1), [a, b, c, d, 0.5, SIZE])


def main() -> int:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first-call", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=5, help="processes of each store")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="the folder of the results")
    options = parser.parse_args()
    if options.first_call:
        first_call()
        return 0
    import torch

    on_gpu = torch.cuda.is_available()

    def lines() -> Iterator[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            for made in (first_calls(options.repeats), host_times(Path(folder))):
                for line in made:
                    line |= {} if on_gpu else {"driver": None}
                    print(json.dumps(line), flush=True)
                    yield line

    print(record.write("toolkit", lines(), "cuda:0" if on_gpu else "cpu", options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
