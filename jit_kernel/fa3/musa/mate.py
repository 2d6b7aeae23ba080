"""Access to MATE: its wrapper's functions by version, and how they are called.

They are called by keyword only, under no_grad (its varlen function is an autograd.Function whose backward is for varlen
alone) and under the guard of the inputs' device (its metadata is allocated on the current device). An assert of MATE's
that fails becomes an error of ours; arguments that an assert would have caught are refused before (rules.py),
because python -O removes asserts.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from jit_kernel import config, moore_threads
from jit_kernel.engine.forks import Lock

log = logging.getLogger("jit_kernel")

MAX_SPLITS = 128  # MATE's combine has no kernel for more


@dataclass(frozen=True)
class Mate:
    """One MATE: its version and the three functions that we call."""

    version: tuple[int, ...]
    flash_attn_varlen_func: Callable[..., Any]
    flash_attn_with_kvcache: Callable[..., Any]
    get_scheduler_metadata: Callable[..., Any]

    @property
    def name(self) -> str:
        return "MATE " + ".".join(map(str, self.version))


_mate: Mate | None = None
_guard = Lock()


def load() -> Mate:
    """MATE's functions, imported once a process.

    Raises NotImplementedError that names each missing part, or the exception that its import ended with.
    """
    global _mate
    if _mate is None:
        with _guard:
            if _mate is None:
                _mate = _import()
    return _mate


def _import() -> Mate:
    report = moore_threads.probe()
    if report.missing:
        lines = "\n  ".join(str(part) for part in report.missing)
        raise NotImplementedError(f"attention on musa needs MATE, and this is missing:\n  {lines}")
    version = report.mate.version or ""
    module = moore_threads.wrapper_module(version)
    level = config.mate_log_level()
    if level.isdigit() and int(level) >= 3:
        log.warning(
            "MATE_LOGLEVEL is %s: MATE reads every tensor of every call; from 10 on it writes them to disk", level
        )
    try:
        wrapper = importlib.import_module(module)
    except Exception as error:
        # RuntimeError, not ImportError, where MATE cannot resolve the device's architecture.
        raise NotImplementedError(
            f"attention on musa needs MATE, and the import of {module} failed with {type(error).__name__}: {error}; "
            "on a machine without a device set MATE_MUSA_ARCH_LIST=3.1"
        ) from error
    return Mate(
        moore_threads.release(version)[:3],
        wrapper.flash_attn_varlen_func,
        wrapper.flash_attn_with_kvcache,
        wrapper.get_scheduler_metadata,
    )


def version() -> tuple[int, ...]:
    """The version that is loaded or would be; (0, 2, 2), the newest known, on a machine without MATE."""
    if _mate is not None:
        return _mate.version
    return moore_threads.release(moore_threads.probe().mate.version or "0.2.2")[:3]


def need_splits(num_splits: int) -> None:
    """Raise ValueError for more splits than MATE can combine."""
    if num_splits > MAX_SPLITS:
        raise ValueError(
            f"num_splits is {num_splits}; on musa it must be at most {MAX_SPLITS}, for which MATE has a combine kernel"
        )


def device_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` the current MUSA device; nothing for a device of another kind."""
    if device.type != "musa":
        return nullcontext()
    guard: AbstractContextManager[Any] = torch.musa.device(device)  # type: ignore[attr-defined]
    return guard


def call(mate: Mate, function: Callable[..., Any], device: torch.device, arguments: dict[str, Any]) -> Any:
    """Call one of MATE's functions. Raises RuntimeError for an assert of MATE's that our checks let pass."""
    try:
        with torch.no_grad(), device_guard(device):
            return function(**arguments)
    except AssertionError as error:
        raise RuntimeError(
            f"{mate.name} refused the call with an assertion: {str(error) or 'without a text'}; "
            "jit_kernel should have refused it first, so please report the call"
        ) from error
