"""Compile ahead: `python -m jit_kernel.warmup`, so that no call has to wait for a compiler.

No GPU is needed to compile for one: `--target cuda:sm_90a` works on a machine that has only the wheels.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from jit_kernel import config, jit
from jit_kernel.device import Target, cpu_count, detect_device, device_target
from jit_kernel.engine import compiler, progress
from jit_kernel.engine.store import CacheError
from jit_kernel.fa3 import dispatch
from jit_kernel.jit import KernelSpec

# One compilation of the CPU kernel peaks under this; jobs are limited so that all of them fit in memory.
BYTES_PER_JOB = 1_500_000_000


@dataclass(frozen=True)
class Job:
    """One kernel to have in the store, and whether it is there already."""

    spec: KernelSpec
    target: Target
    stored: bool

    def record(self) -> dict[str, object]:
        """The job as plain data."""
        return {
            "kernel": self.spec.kernel,
            "target": str(self.target),
            "variant": dict(self.spec.variant),
            "stored": self.stored,
        }


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


def default_jobs() -> int:
    """As many compilations at a time as there are processors and as fit in the memory that is free."""
    try:
        pages = os.sysconf("SC_AVPHYS_PAGES")
        fit = pages * os.sysconf("SC_PAGE_SIZE") // BYTES_PER_JOB
    except (ValueError, OSError):
        fit = cpu_count()
    return max(1, min(cpu_count(), int(fit)))


def _compile_all(jobs: list[Job], workers: int, bar: bool) -> dict[Job, str]:
    """Compile what is not stored; answers with the error of each job that failed."""
    failed: dict[Job, str] = {}
    done = 0
    with ThreadPoolExecutor(max_workers=workers) as pool, progress.hushed():
        futures: dict[Future[tuple[object, float]], Job] = {pool.submit(_timed, job): job for job in jobs}
        for future in as_completed(futures):
            job, done = futures[future], done + 1
            try:
                _, seconds = future.result()
                line = f"{job.spec} for {job.target} in {seconds:.1f} s"
            except (compiler.CompileError, compiler.CompilerNotFoundError, CacheError) as error:
                failed[job] = str(error)
                line = f"{job.spec} for {job.target} FAILED"
            _show(line, done, len(jobs), bar)
    if bar and jobs:
        sys.stderr.write("\n")
    return failed


def _timed(job: Job) -> tuple[object, float]:
    started = time.perf_counter()
    return jit.build(job.spec, job.target), time.perf_counter() - started


def _show(line: str, done: int, total: int, bar: bool) -> None:
    if not bar:
        print(f"[{done}/{total}] {line}", file=sys.stderr, flush=True)
        return
    filled = 30 * done // total
    sys.stderr.write(f"\r\033[K[{'#' * filled}{'.' * (30 - filled)}] {done}/{total} {line}"[:160])
    sys.stderr.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jit_kernel.warmup", description="Compile kernels ahead of use.")
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="VENDOR:ARCH",
        help="what to compile for, for example cpu:native, cuda:sm_90a or musa:mp_31; may be repeated; "
        "without it, the device that is present",
    )
    parser.add_argument(
        "--select",
        action="append",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="only the variants that serve this, for example head_dim=128 dtype=bf16",
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="compilations at a time (default: what memory allows)")
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
    select: dict[str, str] = {}
    for item in (item for group in options.select for item in group):
        field, equals, value = item.partition("=")
        if not (field and equals and value):
            parser.error(f"--select is {item!r}; it must be field=value")
        select[field] = value
    try:
        targets = [Target.parse(text) for text in options.target] or [device_target(detect_device())]
        if any(target.vendor == "musa" for target in targets):
            return _prewarm_musa(select, options.json)
        jobs = [
            Job(spec, target, jit.is_stored(spec, target)) for target in targets for spec in specs_of(target, select)
        ]
    except (ValueError, CacheError) as error:
        parser.error(str(error))
    return _run(jobs, options)


def _run(jobs: list[Job], options: argparse.Namespace) -> int:
    missing = [job for job in jobs if not job.stored]
    if options.list or options.dry_run:
        shown = jobs if options.list else missing
        if options.json:
            print(json.dumps([job.record() for job in shown], indent=1))
        else:
            for job in shown:
                print(f"{'stored ' if job.stored else 'missing'} {job.target} {job.spec}")
            print(f"{len(missing)} of {len(jobs)} kernels to compile", file=sys.stderr)
        return 0
    started = time.perf_counter()
    bar = sys.stderr.isatty() and not options.json and config.log_level() != "quiet"
    failed = _compile_all(missing, options.jobs or default_jobs(), bar)
    seconds = time.perf_counter() - started
    if options.json:
        outcome = {
            "compiled": [job.record() for job in missing if job not in failed],
            "stored": [job.record() for job in jobs if job.stored],
            "failed": [{**job.record(), "error": error} for job, error in failed.items()],
            "seconds": round(seconds, 3),
        }
        print(json.dumps(outcome, indent=1))
    else:
        for job, error in failed.items():
            print(f"FAILED {job.spec} for {job.target}:\n{error}\n", file=sys.stderr)
        print(
            f"{len(missing) - len(failed)} compiled, {len(jobs) - len(missing)} already stored, {len(failed)} failed "
            f"in {seconds:.1f} s; the store is {config.cache_dir()}"
        )
    return 1 if failed else 0


def _prewarm_musa(select: dict[str, str], as_json: bool) -> int:
    from jit_kernel.fa3 import musa

    try:
        outcome = musa.prewarm(select)
    except (NotImplementedError, RuntimeError) as failure:
        print(failure, file=sys.stderr)
        return 1
    if as_json:
        records = [{"module": name, "seconds": seconds, "error": error} for name, seconds, error in outcome]
        print(json.dumps(records, indent=1))
    else:
        for name, seconds, error in outcome:
            print(f"{name}: {error or f'{seconds:.1f} s'}")
    return 1 if any(error for _, _, error in outcome) else 0


if __name__ == "__main__":
    sys.exit(main())
