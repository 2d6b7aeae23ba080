"""What this machine has for compilers: processors and memory, as far as a container's limits leave them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jit_kernel.device import cpu_count

_ROOT = Path("/")


@dataclass(frozen=True)
class Memory:
    """Bytes that this process and its neighbours may have at most, and bytes that are free now."""

    limit: int
    free: int


def processors(root: Path = _ROOT) -> int:
    """Processors that this process may keep busy: its affinity and its control groups' quotas, at least one."""
    most = float(cpu_count())
    for folder in _groups(root, "cpu"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            most = min(most, int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError):
            own = int((folder / "cpu.cfs_quota_us").read_text())
            most = min(most, own / int((folder / "cpu.cfs_period_us").read_text()) if own > 0 else most)
    return max(1, math.floor(most))


def memory(root: Path = _ROOT) -> Memory | None:
    """The tightest limit of the machine and of every control group around this process; None where none is told."""
    found = [*_machine(root), *filter(None, map(_group, _groups(root, "memory")))]
    if not found:
        return None
    return Memory(min(each.limit for each in found), min(each.free for each in found))


def _machine(root: Path) -> Iterator[Memory]:
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = (root / "proc" / "meminfo").read_text().splitlines()
        values = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        yield Memory(values["MemTotal"], values["MemAvailable"])


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control groups for a controller, of version 1 and 2, from its own to the top."""
    with contextlib.suppress(OSError):
        for line in (root / "proc" / "self" / "cgroup").read_text().splitlines():
            _, names, place = line.split(":", 2)
            if names and controller not in names.split(","):
                continue
            top = root / "sys" / "fs" / "cgroup" / (controller if names else "")
            folder = top / place.lstrip("/")
            while folder != top:
                yield folder  # without a namespace of its own a container names a folder that it cannot see
                folder = folder.parent
            yield top


def _group(folder: Path) -> Memory | None:
    """A group's limit, and what is left of it: pages of files that were not used lately can be had at once."""
    for limit_name, used_name, idle_name in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):
            limit = int((folder / limit_name).read_text())  # "max" is no number: no limit
            idle = 0
            for line in (folder / "memory.stat").read_text().splitlines():
                if line.startswith(f"{idle_name} "):
                    idle = int(line.split()[1])
            return Memory(limit, limit - int((folder / used_name).read_text()) + idle)
    return None
