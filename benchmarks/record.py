"""One JSON line per measurement: what was measured, where, with which versions, at which commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def circumstances(device: str = "cpu") -> dict[str, Any]:
    """Date, commit, device and versions of a run on `device` ("cpu" or "cuda:0")."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        # The variable is for a machine that has the files without their history.
        "commit": os.environ.get("JIT_KERNEL_COMMIT") or commit_of(RESULTS.parents[1]),
        "device": _cpu_name() if device == "cpu" else _gpu_name(device),
        "python": platform.python_version(),
    }
    for name in ("torch", "apache-tvm-ffi", "triton"):
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = None
    if device != "cpu":
        import torch

        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
        facts["driver"] = _printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return facts


def write(name: str, lines: Iterable[dict[str, Any]], device: str = "cpu", folder: Path = RESULTS) -> Path:
    """Append the measurements to results/<name>.jsonl, each with the circumstances of the run.

    Each is in the file before the next is asked for: of a run that fails, lines that an iterator gave before are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    common = circumstances(device)
    with path.open("a", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps({**common, **line}) + "\n")
            file.flush()
    return path


def latest(name: str, folder: Path = RESULTS, **fields: object) -> list[dict[str, Any]]:
    """The measurements recorded together last under `name`, of those with these fields."""
    path = folder / f"{name}.jsonl"
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if fields.items() <= {name: line.get(name) for name in fields}.items()]
    return [line for line in lines if line["date"] == lines[-1]["date"]]


def commit_of(checkout: Path) -> str | None:
    """The short name of a checkout's commit, marked where the package or the kernels differ from it."""
    commit = _printed("git", "rev-parse", "--short", "HEAD", folder=checkout)
    changed = _printed("git", "status", "--porcelain", "--", "jit_kernel", "kernel_sources", folder=checkout)
    return f"{commit}+changes" if commit and changed else commit


def commit_before(checkout: Path) -> str | None:
    """The same of a checkout that is measured beside this one; JIT_KERNEL_BEFORE_COMMIT where it has no history."""
    return os.environ.get("JIT_KERNEL_BEFORE_COMMIT") or commit_of(checkout)


def _printed(*command: str, folder: Path = RESULTS.parent) -> str | None:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip().splitlines()[0] if answer.stdout.strip() else None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor()
    return platform.processor()


def _gpu_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device)
