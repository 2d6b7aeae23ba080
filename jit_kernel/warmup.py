"""Compile ahead: `python -m jit_kernel.warmup`, so that no call has to wait for a compiler.

No GPU is needed to compile for one: `--target cuda:sm_90a` works on a machine that has only the wheels.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from jit_kernel import config, jit, moore_threads, ready
from jit_kernel.commands.selecting import selections
from jit_kernel.device import Target, detect_device, device_target
from jit_kernel.engine import compiler, machine, progress
from jit_kernel.engine.store import CacheError
from jit_kernel.fa3 import dispatch
from jit_kernel.jit import KernelSpec
from jit_kernel.toolkit import declared

if TYPE_CHECKING:
    from jit_kernel.fa3.musa import prebuild


@dataclass(frozen=True)
class Job:
    """One kernel to have in the store, and whether it is there already."""

    spec: KernelSpec
    target: Target
    stored: bool

    def __str__(self) -> str:
        return f"{self.spec} for {self.target}"

    def record(self) -> dict[str, object]:
        """The job as plain data."""
        return {
            "kernel": self.spec.kernel,
            "target": str(self.target),
            "variant": dict(self.spec.variant),
            "stored": self.stored,
        }


@dataclass(frozen=True)
class MateJob:
    """Modules that MATE builds and keeps itself. Whether it has them is not known before it is asked to build them."""

    modules: prebuild.Modules
    target: Target
    stored: None = None

    def __str__(self) -> str:
        return f"MATE's {self.modules.title} for {self.target}"

    def record(self) -> dict[str, object]:
        """The job as plain data, in the form of a Job's."""
        variant = {"modules": self.modules.title}
        return {"kernel": "mate", "target": str(self.target), "variant": variant, "stored": self.stored}


@dataclass(frozen=True)
class Plan:
    """What was asked for: the jobs of every target, and why a target has none."""

    jobs: list[Job | MateJob]
    unserved: dict[Target, str]

    @property
    def missing(self) -> list[Job | MateJob]:
        """What is not known to be stored."""
        return [job for job in self.jobs if not job.stored]


def plan_of(targets: Sequence[Target], selects: Sequence[dict[str, str]], modules: Sequence[str] = ()) -> Plan:
    """The jobs of every target that one of `selects` lets through: of `modules`, or of attention if none is named.

    Raises ValueError as `specs_of` does, CacheError for a store that cannot be used.
    """
    plan = Plan([], {})
    for target in dict.fromkeys(targets):
        if modules or target.vendor != "musa":
            plan.jobs.extend(Job(s, target, jit.is_stored(s, target)) for s in selected(target, selects, modules))
            continue
        major, minor = int(target.architecture[3]), int(target.architecture[4])
        if (major, minor) < moore_threads.MINIMUM_CAPABILITY:
            raise ValueError(f"target is {target}: no implementation serves it; MATE needs mp_31 or newer")
        from jit_kernel.fa3.musa import prebuild

        try:
            plan.jobs.extend(MateJob(each, target) for select in selects for each in prebuild.selected_modules(select))
        except NotImplementedError as error:
            plan.unserved[target] = str(error)
    return plan


def selected(target: Target, selects: Sequence[dict[str, str]], modules: Sequence[str]) -> list[KernelSpec]:
    """The kernels for a target that one of `selects` lets through, each once. Raises ValueError as `specs_of` does."""
    found = (declared_by(modules, target, each) if modules else specs_of(target, each) for each in selects)
    return list(dict.fromkeys(itertools.chain.from_iterable(found)))


def specs_of(target: Target, select: dict[str, str]) -> list[KernelSpec]:
    """Every kernel that calls on `target` may need and that `select` (field: value) lets through.

    Raises ValueError for a field that no variant has or a value that none serves.
    """
    specs = dispatch.select_variants(target, select)
    if not specs:
        raise ValueError(f"target is {target}: no implementation serves it")
    for field, value in select.items():
        if not any(field in dict(spec.variant) for spec in specs):
            raise ValueError(f"--select {field}={value}: no variant for {target} serves it")
    return specs


def declared_by(modules: Sequence[str], target: Target, select: dict[str, str]) -> list[KernelSpec]:
    """Every kernel that modules declare for a target and that `select` lets through. Raises what `specs_of` raises."""
    specs = dict.fromkeys(spec for module in modules for spec in declared.specs_of(module, target))
    chosen = [spec for spec in specs if all(str(dict(spec.variant).get(name)) == each for name, each in select.items())]
    if not chosen:
        raise ValueError(f"--select {select}: no kernel of {', '.join(modules)} for {target} has these values")
    return chosen


def plan_of_profile(profile: str, targets: Sequence[Target]) -> Plan:
    """The jobs of a profile, for some targets or for all that it has. Raises ValueError as `ready.kernels_of` does."""
    kernels = ready.kernels_of(profile, targets)
    return Plan([Job(spec, target, jit.is_stored(spec, target)) for spec, target in kernels], {})


def _compile_all(jobs: Sequence[Job | MateJob], workers: int | None, bar: bool) -> dict[Job | MateJob, str]:
    """Compile every job; answers with the error of each that failed. MATE runs `workers` compilations itself."""
    failed: dict[Job | MateJob, str] = {}
    done = 0

    def finish(job: Job | MateJob, seconds: Callable[[], float]) -> None:
        nonlocal done
        done += 1
        try:
            line = f"{job} in {seconds():.1f} s"
        except (compiler.CompilerError, CacheError, MateError) as error:
            failed[job] = str(error)
            line = f"{job} FAILED"
        _show(line, done, len(jobs), bar)

    with ThreadPoolExecutor(max_workers=workers or machine.processors()) as pool, progress.silenced():
        futures: dict[Future[float], Job] = {pool.submit(_build, job): job for job in jobs if isinstance(job, Job)}
        for future in as_completed(futures):
            finish(futures[future], future.result)
    for job in jobs:
        if isinstance(job, MateJob):
            finish(job, partial(_build_with_mate, job, workers))
    if bar and jobs:
        progress.write("\n")
    return failed


class MateError(RuntimeError):
    """MATE could not build modules of its own."""


def _build(job: Job) -> float:
    started = time.perf_counter()
    jit.build(job.spec, job.target)
    return time.perf_counter() - started


def _build_with_mate(job: MateJob, workers: int | None) -> float:
    started = time.perf_counter()
    try:
        job.modules.build(workers)
    except Exception as error:  # a compiler's failure arrives as MATE raises it
        raise MateError(f"{type(error).__name__}: {error}") from error
    return time.perf_counter() - started


def _show(line: str, done: int, total: int, bar: bool) -> None:
    if not bar:
        progress.write(f"[{done}/{total}] {line}\n")
        return
    filled = 30 * done // total
    progress.write(f"\r\033[K[{'#' * filled}{'.' * (30 - filled)}] {done}/{total} {line}"[:160])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jit_kernel.warmup", description="Compile kernels ahead of use.")
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="VENDOR:ARCH",
        help="what to compile for, as cpu:native, cuda:sm_90a or musa:mp_31; may be repeated; without it, what is here",
    )
    parser.add_argument(
        "--select",
        action="append",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="only the variants that serve this, as head_dim=128 dtype=bf16; a field twice means either value",
    )
    parser.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="MODULE",
        help="compile what this module declares (jit_kernel.jit.declare), instead of attention; may be repeated",
    )
    parser.add_argument("--profile", metavar="FILE", help="only what a run wrote to JIT_KERNEL_RECORD's file")
    parser.add_argument("--check", action="store_true", help="compile nothing; fail unless every kernel can be loaded")
    parser.add_argument("--jobs", type=int, metavar="N", help="compilations at a time (default: what fits here)")
    parser.add_argument("--list", action="store_true", help="list the variants and whether they are stored")
    parser.add_argument("--dry-run", action="store_true", help="say what would be compiled, and compile nothing")
    parser.add_argument("--json", action="store_true", help="print the outcome as one JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; answers with its exit status: 0, 1 when something failed, 2 for a wrong argument."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}; it must be at least 1")
    if options.profile and (options.select or options.module):
        parser.error("--profile names each kernel; it cannot stand beside --select or --module")
    try:
        targets = [Target.parse(text) for text in options.target]
        if options.profile:
            plan = plan_of_profile(options.profile, targets)
        else:
            selects = selections(itertools.chain(*options.select))
            plan = plan_of(targets or [device_target(detect_device())], selects, options.module)
    except (ValueError, CacheError) as error:
        parser.error(str(error))
    if options.list or options.dry_run:
        _print_plan(plan, plan.jobs if options.list else plan.missing, options.json)
        return 1 if plan.unserved else 0
    if options.check:  # MATE's modules are its own to check
        kernels = [(job.spec, job.target) for job in plan.jobs if isinstance(job, Job)]
        return ready.report(kernels, options.json) or int(len(kernels) < len(plan.jobs) or bool(plan.unserved))
    return _run(plan, options)


_STATES = {True: "stored ", False: "missing", None: "unknown"}


def _print_plan(plan: Plan, shown: Sequence[Job | MateJob], as_json: bool) -> None:
    if as_json:
        print(json.dumps([job.record() for job in shown], indent=1))
    else:
        for job in shown:
            name = job.spec if isinstance(job, Job) else f"MATE's {job.modules.title}"
            print(f"{_STATES[job.stored]} {job.target} {name}")
        progress.write(f"{len(plan.missing)} of {len(plan.jobs)} kernels to compile\n")
    for target, reason in plan.unserved.items():
        progress.write(f"{target}: {reason}\n")


def _run(plan: Plan, options: argparse.Namespace) -> int:
    started = time.perf_counter()
    missing = plan.missing
    bar = progress.on_terminal() and not options.json and config.log_level() != "quiet"
    failed = _compile_all(missing, options.jobs, bar)
    seconds = time.perf_counter() - started
    stored = [job for job in plan.jobs if job.stored]
    if options.json:
        errors = [{**job.record(), "error": error} for job, error in failed.items()]
        errors += [{"target": str(target), "error": reason} for target, reason in plan.unserved.items()]
        outcome = {
            "compiled": [job.record() for job in missing if job not in failed],
            "stored": [job.record() for job in stored],
            "failed": errors,
            "seconds": round(seconds, 3),
        }
        print(json.dumps(outcome, indent=1))
    else:
        for job, error in failed.items():
            progress.write(f"FAILED {job}:\n{error}\n\n")
        for target, reason in plan.unserved.items():
            progress.write(f"FAILED {target}:\n{reason}\n\n")
        print(
            f"{len(missing) - len(failed)} compiled, {len(stored)} already stored, "
            f"{len(failed) + len(plan.unserved)} failed in {seconds:.1f} s; the store is {config.cache_dir()}"
        )
    return 1 if failed or plan.unserved else 0


if __name__ == "__main__":
    sys.exit(main())
