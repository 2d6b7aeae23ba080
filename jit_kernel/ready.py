"""Ready before the first request: the kernels of a profile, compiled, checked or loaded.

A profile is what JIT_KERNEL_RECORD wrote. A kernel that the package itself lists is taken as the package has it now; of
any other the profile's own line is what is compiled.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TypedDict

import torch

from jit_kernel import flash_attention_v3, jit
from jit_kernel.device import Target, device_target
from jit_kernel.engine import build, compiler, memory, record, seal
from jit_kernel.engine.store import CacheError
from jit_kernel.fa3 import dispatch
from jit_kernel.jit import KernelSpec

Kernel = tuple[KernelSpec, Target]


class Preloaded(TypedDict):
    """What preload() did: kernels that are loaded now, those of them that it compiled, those that other machines
    need, and the seconds."""

    loaded: int
    compiled: int
    skipped: int
    seconds: float


def kernels_of(profile: str | os.PathLike[str], targets: Collection[Target] = ()) -> list[Kernel]:
    """The kernels of a profile for some targets, or for all.

    Raises record.ProfileError for a file that is none, CacheError for one that another user may change, ValueError for
    a target of which it holds nothing.
    """
    path = Path(profile).absolute()
    found = record.read(path)
    there = {target for _, target in found}
    for target in targets:
        if target not in there:
            raise ValueError(f"target is {target}; profile {path} has {', '.join(sorted(map(str, there)))}")
    listed = {target: _listed(target) for target in there}
    return [
        (spec if spec.sources else listed[target].get((spec.kernel, spec.variant), spec), target)
        for spec, target in found
        if not targets or target in targets
    ]


def _listed(target: Target) -> dict[tuple[str, object], KernelSpec]:
    """The kernels that the package lists for a target, by name and variant."""
    if target.vendor == "musa":  # MATE's, which are no kernels of ours
        return {}
    return {(spec.kernel, spec.variant): spec for spec in dispatch.select_variants(target, {})}


def preload(profile: str | os.PathLike[str]) -> Preloaded:
    """Load every kernel of a profile that this machine's devices can run, so that no request waits for one.

    What is not stored is compiled, unless the process is sealed: then it is a jit.SealedError. Raises what jit.load
    raises, record.ProfileError, CacheError, and ValueError where the profile holds nothing for this machine.
    """
    started = time.perf_counter()
    kernels = kernels_of(profile)
    here = _present()
    mine = [kernel for kernel in kernels if kernel[1] in here]
    if not mine:
        theirs = sorted({str(target) for _, target in kernels})
        raise ValueError(
            f"profile {profile} is for {', '.join(theirs)}; this machine has {', '.join(sorted(map(str, here)))}"
        )
    before = jit.stats()["compiled"]
    for spec, target in mine:
        _load(spec, target)
    importlib.import_module("jit_kernel.fa3.checks.call")  # 20 ms of the first call that is not a plain one
    for target in {target for _, target in mine}:  # what else a first call would choose, or load
        flash_attention_v3._load_fa3_kernels(here[target])
    return Preloaded(
        loaded=len(mine),
        compiled=jit.stats()["compiled"] - before,
        skipped=len(kernels) - len(mine),
        seconds=time.perf_counter() - started,
    )


def check(kernels: Sequence[Kernel]) -> dict[Kernel, str]:
    """Load every kernel without compiling or launching anything; answers with why each that cannot be loaded cannot.

    A launcher for a GPU that is not here is verified and not loaded, as it wants the driver's library. Seals the
    process.
    """
    failed: dict[Kernel, str] = {}
    for spec, target in kernels:
        place, why = build.why(spec, target)
        if not place:
            failed[spec, target] = f"it would be compiled: {why}"
    seal.seal()
    here = _present()
    for spec, target in kernels:
        if (spec, target) in failed:
            continue
        try:
            if target in here or target.vendor == "cpu":
                _load(spec, target)
            else:
                build.obtain(spec, target)
        except (compiler.CompilerError, CacheError) as error:
            failed[spec, target] = str(error)
    return failed


def report(kernels: Sequence[Kernel], as_json: bool) -> int:
    """Check the kernels and print which cannot be loaded; the exit status of `warmup --check`."""
    failed = check(kernels)
    if as_json:
        errors = [
            {"kernel": spec.kernel, "target": str(target), "variant": dict(spec.variant), "error": error}
            for (spec, target), error in failed.items()
        ]
        print(json.dumps({"ready": len(kernels) - len(errors), "failed": errors}, indent=1))
    else:
        for (spec, target), error in failed.items():
            print(f"NOT READY {spec} for {target}: {error}")
        print(f"{len(kernels) - len(failed)} of {len(kernels)} kernels are ready; nothing was compiled")
    return 1 if failed else 0


def _load(spec: KernelSpec, target: Target) -> None:
    if spec.route == "host":
        memory.load(spec, target)
    else:
        memory.load_cubin(spec, target)


def _present() -> dict[Target, torch.device]:
    """The targets of this process's devices: the CPU, and the current GPU, as a rank of many has one of its own."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda", torch.cuda.current_device()))
    return {device_target(device): device for device in devices}
