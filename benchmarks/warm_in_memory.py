"""100 variants warmed under a memory limit of 2 GiB: how many failed or were killed, and the most that they took.

Run as root: a control group (version 1 or 2) with the real limit is made for the warm-up and removed behind it. The
variants are three of the CPU (1 GB each), all that jit_kernel.ops declares for a GPU, and portable attention's, for a
GPU that need not be here. How many compile at a time is the warm-up's own choice.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record

ROOT = Path(__file__).resolve().parent.parent
LIMIT, VARIANTS = 2 << 30, 100
GROUPS = Path("/sys/fs/cgroup")

PROFILE = """
import itertools, sys
from jit_kernel.device import Target, cpu_target
from jit_kernel.engine import record
from jit_kernel.fa3.portable import kernels
from jit_kernel.fa3 import dispatch
from jit_kernel.toolkit import declared
gpu = Target("cuda", "sm_90a")
large = dispatch.select_variants(cpu_target(), {"function": "forward"})[:3]
found = dict.fromkeys((spec, cpu_target()) for spec in large)
found |= dict.fromkeys((spec, gpu) for spec in declared.specs_of("jit_kernel.ops", gpu))
found |= dict.fromkeys((spec, gpu) for spec in kernels.all_specs(gpu))
for spec, target in itertools.islice(found, int(sys.argv[1])):
    record.note(spec, target)
"""


class Group:
    """A control group with a limit on memory."""

    def __init__(self, name: str, limit: int) -> None:
        self.old = (GROUPS / "memory").is_dir()
        self.folder = (GROUPS / "memory" if self.old else GROUPS) / name
        self.folder.mkdir()
        self._file("memory.limit_in_bytes" if self.old else "memory.max").write_text(str(limit))
        swap = self._file("memory.memsw.limit_in_bytes" if self.old else "memory.swap.max")
        if swap.exists():
            swap.write_text(str(limit) if self.old else "0")

    def _file(self, name: str) -> Path:
        return self.folder / name

    def join(self) -> None:
        """Put this process into it."""
        self._file("cgroup.procs").write_text(str(os.getpid()))

    def number(self, file: str, name: str) -> int:
        """A number of one of its files; 0 where it is not told."""
        words = [line.split() for line in self._file(file).read_text().splitlines()]
        return next((int(value) for key, value in words if key == name), 0)

    def taken(self) -> int:
        """The bytes of its processes, without the pages of files, which the system takes back at need."""
        return self.number("memory.stat", "total_rss" if self.old else "anon")

    def killed(self) -> int:
        """How many of its processes the system ended for want of memory."""
        return self.number("memory.oom_control" if self.old else "memory.events", "oom_kill")

    def compilers(self) -> int:
        """How many C++ compilers run in it."""
        names = []
        for process in self._file("cgroup.procs").read_text().split():
            try:
                names.append(Path("/proc", process, "comm").read_text().strip())
            except OSError:
                continue
        return names.count("cc1plus")


def warm(folder: str, group: Group) -> dict[str, Any]:
    """Warm the profile in the group; what came of it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JIT_KERNEL_LOG": "quiet"}
    profile = f"{folder}/profile"
    subprocess.run([sys.executable, "-c", PROFILE, str(VARIANTS)], check=True,
                   env={**environment, "JIT_KERNEL_RECORD": profile})  # fmt: skip
    command = [sys.executable, "-m", "jit_kernel.warmup", "--profile", profile, "--json"]
    started, most, compilers = time.perf_counter(), 0, 0
    with open(f"{folder}/out", "w+") as out:
        running = subprocess.Popen(command, env={**environment, "JIT_KERNEL_CACHE_DIR": f"{folder}/store"}, stdout=out,
                                   preexec_fn=group.join)  # fmt: skip
        while running.poll() is None:
            most, compilers = max(most, group.taken()), max(compilers, group.compilers())
            time.sleep(0.2)
        out.seek(0)
        found = json.load(out)
    return {
        "case": "warm-up under a memory limit",
        "limit_bytes": LIMIT,
        "compiled": len(found["compiled"]),
        "failed": len(found["failed"]),
        "killed": group.killed(),
        "most_bytes": most,
        "most_cc1plus": compilers,
        "seconds": round(time.perf_counter() - started, 1),
        "goal": f"{VARIANTS} compiled, none killed",
    }


def main() -> None:
    """Measure, print and append to results/store.jsonl."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    group = Group(f"jit_kernel-{os.getpid()}", LIMIT)
    try:
        with tempfile.TemporaryDirectory() as folder:
            line = warm(folder, group)
    finally:
        group.folder.rmdir()
    print(", ".join(f"{key} {value}" for key, value in line.items()))
    print(f"written to {record.write('store', [line])}")


if __name__ == "__main__":
    main()
