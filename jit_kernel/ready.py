"""Ready before the first request: the kernels of a profile, compiled, checked or loaded.

A profile is what JIT_KERNEL_RECORD wrote. A kernel that attention lists, or that jit_kernel.ops or somebody's package
declares, is taken as it is declared now; of any other the profile's own line is what is compiled.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch

from jit_kernel import flash_attention_v3, jit
from jit_kernel.device import Target, device_target
from jit_kernel.engine import build, compiler, cubin, memory, record, seal
from jit_kernel.engine.progress import warn_once
from jit_kernel.engine.store import CacheError
from jit_kernel.fa3 import dispatch
from jit_kernel.fa3.features import DTYPE_NAMES
from jit_kernel.jit import KernelSpec
from jit_kernel.toolkit import declared

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
    listed = functools.cache(_listed)
    return [
        (_as_now(spec, listed(_lister_of(spec), target)), target)
        for spec, target in found
        if not targets or target in targets
    ]


_OPS = "jit_kernel.ops"


def _lister_of(spec: KernelSpec) -> str:
    """The module that may declare a kernel: "" for attention, "-" where nobody is known to."""
    if spec.sources is not None:
        return spec.sources.package or "-"
    return _OPS if spec.kernel.startswith("ops/") else ""


def _listed(lister: str, target: Target) -> list[KernelSpec]:
    """What a module declares for a target, or attention lists."""
    if lister == "-" or target.vendor == "musa":  # MATE's are no kernels of ours
        return []
    if not lister:
        return [cubin.LAUNCHER, *dispatch.select_variants(target, {})]
    try:
        importlib.import_module(lister)
    except ImportError as error:
        warn_once(f"{lister} cannot be imported ({error}); its kernels are taken as the profile has them")
    return declared.known(lister, target)


def _as_now(spec: KernelSpec, listed: Sequence[KernelSpec]) -> KernelSpec:
    """The kernel of the same name and variant that is listed, if it is one."""
    same = [each for each in listed if (each.kernel, each.variant) == (spec.kernel, spec.variant)]
    return same[0] if len(same) == 1 else spec


def preload(profile: str | os.PathLike[str]) -> Preloaded:
    """Load every kernel of a profile that this machine's devices can run, so that no request waits for one.

    Kernels of a GPU are put on it; those of attention on the CPU are called once with numbers of no meaning.
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
    for spec, target in mine:
        if spec.route != "host":
            cubin.ready(here[target].index, target, spec)
        elif spec.kernel == "flash_attention_v3/cpu":
            _rehearse(dict(spec.variant))
    return Preloaded(
        loaded=len(mine),
        compiled=jit.stats()["compiled"] - before,
        skipped=len(kernels) - len(mine),
        seconds=time.perf_counter() - started,
    )


def _rehearse(fields: Mapping[str, object]) -> None:
    """Make the first calls of a CPU kernel here: the first takes 1.4 ms more than the next (library code that is read
    for the first time, scratch memory and threads that are made, torch's own first operations)."""
    dtypes = [dtype for dtype, name in DTYPE_NAMES.items() if name == fields.get("dtype")]
    if fields.get("function") != "forward" or "kv_dtype" in fields or not dtypes:
        return
    with torch.no_grad():
        q, k = (torch.ones(1, 128, heads, 64, device="cpu").to(dtypes[0]) for heads in (8, 2))
        numbers: tuple[list[Any], ...] = ([0, 128], [128], [[0, 1]])
        starts, lengths, pages = (torch.tensor(each, dtype=torch.int32, device="cpu") for each in numbers)
        cached, kept = k.view(2, 64, 2, 64), []
        for _ in range(2):  # the results together, as a server holds some: torch's next ones take memory that is there
            kept.append(flash_attention_v3.flash_attn_func(q, k, k, causal=True))
            kept.append(
                flash_attention_v3.flash_attn_varlen_func(q[0], k[0], k[0], starts, starts, 128, 128, causal=True)
            )
            flash_attention_v3.flash_attn_with_kvcache(
                q[:, :1], cached, cached, cache_seqlens=lengths, page_table=pages, causal=True
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
