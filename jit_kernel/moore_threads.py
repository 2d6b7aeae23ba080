"""Which parts of the Moore Threads (MUSA) software are installed here, and why a part is not usable.

The chain is torch_musa -> a device of capability (3, 1) or newer -> MATE with its wrapper and its own build of
tvm-ffi. A part is looked for without being imported where that is possible: three of these names are shared with
packages that have nothing to do with MUSA, and MATE's import fails with RuntimeError where there is no device.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from jit_kernel import config

MINIMUM_CAPABILITY = (3, 1)  # Pinghu, MTT S5000: MATE's binaries are mp_31 only
MINIMUM_TORCH_MUSA = (2, 7)
MINIMUM_TOOLKIT = (4, 3, 6)
MATE_VERSIONS = ((0, 1, 3), (0, 2, 0), (0, 2, 1), (0, 2, 2))

INSTALL_TORCH_MUSA = "install torch_musa 2.7 or newer from github.com/MooreThreads/torch_musa"
INSTALL_TORCHADA = "pip install torchada"
INSTALL_MATE = (
    "git clone --recursive https://github.com/MooreThreads/mate.git && cd mate && bash build.sh, "
    "then pip install ./wrappers/flash-attention"
)
INSTALL_TVM_FFI = "pip install git+https://github.com/MooreThreads/tvm-ffi.git@v0.1.9.post2+musa.1"
INSTALL_TOOLKIT = "install the MUSA toolkit 4.3.6 or newer from developer.mthreads.com"


@dataclass(frozen=True)
class Part:
    """One piece of the stack: whether it can be used, its version, and otherwise the reason."""

    name: str
    usable: bool
    version: str | None = None
    reason: str = ""
    install: str = ""

    def __str__(self) -> str:
        head = f"{self.name}: {self.version or ('found' if self.usable else 'missing')}"
        tail = "" if self.usable else f" ({self.reason}{'; ' if self.install else ''}{self.install})"
        return head + tail


@dataclass(frozen=True)
class Report:
    """The whole stack. `usable`: tensors can live on a device that MATE has code for."""

    torch_musa: Part
    device: Part
    torchada: Part
    mate: Part
    wrapper: Part
    tvm_ffi: Part
    toolkit: Part
    mcc: Part

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def usable(self) -> bool:
        return self.torch_musa.usable and self.device.usable

    @property
    def missing(self) -> tuple[Part, ...]:
        """The parts without which no kernel runs, of those that cannot be used (torchada is optional)."""
        needed = (self.torch_musa, self.device, self.mate, self.wrapper, self.tvm_ffi)
        return tuple(part for part in needed if not part.usable)


def release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: "0.2.2+mu436" -> (0, 2, 2). Strings do not compare as versions."""
    match = re.match(r"v?(\d+(?:\.\d+)*)", version)
    return tuple(int(part) for part in match.group(1).split(".")) if match else ()


def _spec(name: str, path: Sequence[str] | None = None) -> importlib.machinery.ModuleSpec | None:
    """The module's spec without importing anything, its parent included; None if there is none."""
    try:
        if path is not None:
            return importlib.machinery.PathFinder.find_spec(name, path)
        return importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):  # ValueError: a stub module without __spec__
        return None


def _has_submodule(package: importlib.machinery.ModuleSpec, name: str) -> bool:
    locations = package.submodule_search_locations
    return locations is not None and _spec(f"{package.name}.{name}", list(locations)) is not None


def _distribution(*names: str) -> str | None:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}"


def _torch_musa() -> Part:
    name = "torch_musa"
    if _spec("torch_musa") is None:
        return Part(name, False, None, "not installed", INSTALL_TORCH_MUSA)
    try:
        module = importlib.import_module("torch_musa")
        import torch
    except Exception as error:  # its import links the driver and can fail with anything
        return Part(name, False, _distribution(name), f"import failed with {_described(error)}")
    version = str(getattr(module, "__version__", None) or _distribution(name) or "unknown")
    # torch_musa sets torch.version.musa when it is imported; a CPU build of torch has no such attribute.
    if getattr(torch.version, "musa", None) is None:
        return Part(name, False, version, "torch.version.musa is not set: not a MUSA build")
    if release(version) and release(version)[:2] < MINIMUM_TORCH_MUSA:
        return Part(name, False, version, "MATE needs 2.7 or newer", INSTALL_TORCH_MUSA)
    return Part(name, True, version)


def _device(torch_musa: Part) -> Part:
    name = "MUSA device"
    if not torch_musa.usable:
        return Part(name, False, None, "torch_musa is not usable")
    try:
        found = _query_capability(None)
    except Exception as error:  # in a forked child the runtime cannot start again
        return Part(name, False, None, f"the runtime failed with {_described(error)}")
    if found is None:
        return Part(name, False, None, "no device is visible (MUSA_VISIBLE_DEVICES, driver)")
    version = f"mp_{found[0]}{found[1]}"
    if found < MINIMUM_CAPABILITY:
        return Part(name, False, version, f"capability {found} is below (3, 1), which MATE needs")
    return Part(name, True, version)


def _torchada(device: Part) -> Part:
    name = "torchada (optional)"
    if _spec("torchada") is None:
        return Part(name, False, None, "not installed", INSTALL_TORCHADA)
    version = _distribution("torchada")
    if not device.usable:
        # Importing it without a device changes the environment and can raise; its is_patched() says True all the same.
        return Part(name, False, version, "not imported: there is no usable device")
    try:
        importlib.import_module("torchada")
    except Exception as error:  # RuntimeError where MATE's own import fails inside it
        return Part(name, False, version, f"import failed with {_described(error)}")
    return Part(name, True, version)


def _mate() -> Part:
    name = "MATE"
    spec = _spec("mate")
    if spec is None:
        return Part(name, False, None, "not installed", INSTALL_MATE)
    version = _distribution("mate")
    if not _has_submodule(spec, "mha_interface"):
        reason = "the installed package `mate` is the unrelated one (unittest matchers): "
        reason += "it has no mate.mha_interface; uninstall it first"
        return Part(name, False, version, reason, INSTALL_MATE)
    if version is None:
        return Part(name, False, None, "mate.mha_interface is present, its version is not", INSTALL_MATE)
    if release(version)[:3] not in MATE_VERSIONS:
        known = ", ".join(".".join(map(str, numbers)) for numbers in MATE_VERSIONS)
        return Part(name, False, version, f"its call contract is known for {known} only")
    return Part(name, True, version)


def wrapper_module(mate_version: str) -> str:
    """The module of MATE's wrapper that a version of MATE installs."""
    return "flash_attn.interface" if release(mate_version) < (0, 2) else "flash_attn_3.interface"


def _wrapper(mate: Part) -> Part:
    name = "MATE wrapper"
    module = wrapper_module(mate.version or "0.2.2")
    package, _, submodule = module.partition(".")
    spec = _spec(package)
    if spec is None:
        stray = _spec("flash_attn_interface")
        reason = f"{module} is not installed"
        if stray is not None:
            reason += f"; flash_attn_interface at {stray.origin} is not MATE's"
        return Part(name, False, None, reason, INSTALL_MATE)
    version = _distribution("flash_attn_3", "mate-flash-attention")
    if _has_submodule(spec, "_C") or not _has_submodule(spec, submodule):
        reason = f"the package {package} at {spec.origin} is Dao-AILab's flash-attention, not MATE's wrapper"
        return Part(name, False, version, reason, INSTALL_MATE)
    if not mate.usable:
        return Part(name, False, version, "MATE is not usable")
    return Part(name, True, version)


def _tvm_ffi(mate: Part) -> Part:
    name = "tvm-ffi (MUSA build)"
    version = _distribution("apache-tvm-ffi")
    if mate.version and release(mate.version) < (0, 2):
        return Part(name, True, version or "not needed by MATE 0.1.3")
    if version is None:
        return Part(name, False, None, "not installed", INSTALL_TVM_FFI)
    if "musa" not in version:
        reason = "this build has no MUSA support; MATE needs MooreThreads' fork"
        return Part(name, False, version, reason, INSTALL_TVM_FFI)
    return Part(name, True, version)


def toolkit_root() -> Path | None:
    """The MUSA toolkit's folder: MUSA_HOME, MUSA_PATH, else /usr/local/musa if it is there."""
    chosen, usual = config.musa_toolkit(), Path("/usr/local/musa")
    return chosen or (usual if usual.is_dir() else None)


def _toolkit() -> Part:
    name, root = "MUSA toolkit", toolkit_root()
    if root is None:
        return Part(name, False, None, "not found (MUSA_HOME, MUSA_PATH, /usr/local/musa)", INSTALL_TOOLKIT)
    version = None
    try:
        found = re.search(r"\d+\.\d+\.\d+", json.dumps(json.loads((root / "version.json").read_text())))
        version = found.group() if found else None
    except (OSError, ValueError):
        pass  # older toolkits have no version.json: their version is unknown
    if version and release(version) < MINIMUM_TOOLKIT:
        return Part(name, False, version, "MATE needs 4.3.6 or newer", INSTALL_TOOLKIT)
    return Part(name, root.is_dir(), version or str(root), f"{root} is no folder", INSTALL_TOOLKIT)


def _mcc() -> Part:
    root = toolkit_root()
    candidates = [config.musa_compiler(), str(root / "bin" / "mcc") if root else None]
    for candidate in (*candidates, shutil.which("mcc")):
        if candidate and os.access(candidate, os.X_OK):
            return Part("mcc", True, candidate)
    return Part("mcc", False, None, "not found (MATE_MCC, the toolkit's bin, PATH)", INSTALL_TOOLKIT)


def capability(index: int | None = None) -> tuple[int, int] | None:
    """(major, minor) of a MUSA device, S5000 being (3, 1); None where torch_musa or the device is absent."""
    if not probe().torch_musa.usable:
        return None
    try:
        return _query_capability(index)
    except Exception:  # the report's device part holds the runtime's error
        return None


def _query_capability(index: int | None) -> tuple[int, int] | None:
    import torch

    module = getattr(torch, "musa", None)
    if module is None or not module.is_available():
        return None
    if index is not None and index >= module.device_count():
        return None
    major, minor = module.get_device_capability(index)
    return int(major), int(minor)


_report: Report | None = None


def probe(*, refresh: bool = False) -> Report:
    """Look at every part once a process; `refresh` looks again. It raises nothing: reasons are in the report."""
    global _report
    if _report is None or refresh:
        torch_musa = _torch_musa()
        device = _device(torch_musa)
        mate = _mate()
        _report = Report(
            torch_musa=torch_musa,
            device=device,
            torchada=_torchada(device),
            mate=mate,
            wrapper=_wrapper(mate),
            tvm_ffi=_tvm_ffi(mate),
            toolkit=_toolkit(),
            mcc=_mcc(),
        )
    return _report
