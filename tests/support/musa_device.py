"""A double of a Moore Threads machine: tensors of device type musa whose numbers lie in CPU memory, a runtime with a
current device, and the packages torch_musa, mate, flash_attn_3 and tvm-ffi as folders on sys.path.

Everything from detection to the caller's result runs as it would there; only the kernels are `mate_kernels.Kernels`.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from jit_kernel import device as device_module
from jit_kernel import flash_attention_v3
from jit_kernel import moore_threads as musa
from jit_kernel.fa3 import dispatch
from jit_kernel.fa3.musa import mate as musa_mate
from tests.support.case_run import one_thread
from tests.support.mate_double import Mate
from tests.support.mate_kernels import Kernels

_MAY_MIX = ("copy_", "_to_copy", "index", "index_put_", "_index_put_impl_")


class MusaTensor(Tensor):
    """A tensor on musa:index; `inner` holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, index: int) -> MusaTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("musa", index),
        )
        made.inner = inner
        return made

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.inner.tolist()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"musa:{self.device.index} {self.inner!r}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        found = [x for x in _tensors((args, kwargs)) if isinstance(x, MusaTensor)]
        name, index = func.overloadpacket.__name__, found[0].device.index
        if name not in _MAY_MIX:
            plain = [x for x in _tensors((args, kwargs)) if not isinstance(x, MusaTensor) and x.dim() > 0]
            if plain or len({x.device.index for x in found}) > 1:
                raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        target = kwargs.pop("device", None)
        if target is not None:
            kwargs["device"] = "cpu"
        result = func(*to_cpu(args), **to_cpu(kwargs))
        written = [a for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if written and len(func._schema.returns) == 1 and func._schema.returns[0].alias_info is not None:
            position = [a.name for a in func._schema.arguments].index(written[0].name)
            return args[position] if position < len(args) else kwargs[written[0].name]
        if target is not None and torch.device(target).type != "musa":
            return result
        return to_musa(result, index if target is None else _index(torch.device(target)))


class _Factories(TorchDispatchMode):
    """Makes what is asked for on musa by calls that have no musa tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        target = kwargs.get("device")
        if target is None or torch.device(target).type != "musa":
            return func(*args, **kwargs)
        if any(isinstance(x, MusaTensor) for x in _tensors((args, kwargs))):
            return func(*args, **kwargs)
        return to_musa(func(*args, **{**kwargs, "device": "cpu"}), _index(torch.device(target)))


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map(lambda x: found.append(x) if isinstance(x, Tensor) else None, tree)
    return found


def to_cpu(tree: Any) -> Any:
    return tree_map(lambda x: x.inner if isinstance(x, MusaTensor) else x, tree)


def to_musa(tree: Any, index: int = 0) -> Any:
    """Tensors as views on musa:index of the same memory."""
    return tree_map(
        lambda x: MusaTensor(x, index) if isinstance(x, Tensor) and not isinstance(x, MusaTensor) else x, tree
    )


def _index(device: torch.device) -> int:
    return RUNTIME.current_device() if device.index is None else device.index


class Runtime(types.ModuleType):
    """torch.musa."""

    def __init__(self) -> None:
        super().__init__("torch.musa")
        self.capability, self.devices, self.capturing = (3, 1), 2, False
        self.failure: Exception | None = None
        self._current = 0

    def is_available(self) -> bool:
        if self.failure is not None:
            raise self.failure
        return self.devices > 0

    def device_count(self) -> int:
        return self.devices

    def current_device(self) -> int:
        return self._current

    def get_device_capability(self, device: object = None) -> tuple[int, int]:
        return self.capability

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """torch.manual_seed reaches every device type that is registered; nothing is random here."""

    def current_stream(self, device: object = None) -> Any:
        return types.SimpleNamespace(musa_stream=17 + self._current)

    @contextlib.contextmanager
    def device(self, device: torch.device | int) -> Iterator[None]:
        before = self._current
        self._current = device if isinstance(device, int) else _index(device)
        try:
            yield
        finally:
            self._current = before


RUNTIME = Runtime()


class Machine:
    """What is installed: `mate` with its `kernels`, and the folder that holds the packages."""

    def __init__(self, folder: Path, version: str, functions: Mapping[str, Callable[..., Any]] | None, asserts: bool):
        self.folder, self.version = folder, version
        self.kernels = Kernels(functions or {}, version=version)
        self.mate = Mate(version, None if functions is None else self.kernels, asserts=asserts)
        self.grad_enabled: list[bool] = []  # at each call of MATE's
        self.given: list[tuple[str, dict[str, Any]]] = []  # function and keywords of each call

    def function(self, name: str) -> Callable[..., Any]:
        """One of MATE's functions for tensors on musa; metadata is made on the current device."""

        def call(*args: Any, **kwargs: Any) -> Any:
            given = _tensors((args, kwargs))
            self.grad_enabled.append(torch.is_grad_enabled())
            self.given.append((name, kwargs))
            for tensor in given:
                if not isinstance(tensor, MusaTensor):
                    raise AssertionError("inputs must be on MUSA device")
            index = RUNTIME.current_device() if name == "get_scheduler_metadata" else given[0].device.index
            self.kernels.launched_on = index
            return to_musa(self.mate.functions[name](*to_cpu(args), **to_cpu(kwargs)), index)

        call.__signature__ = self.mate.functions[name].__signature__  # type: ignore[attr-defined]
        return call


_machine: Machine | None = None


def installed(name: str) -> Callable[..., Any]:
    """What the packages on disk export."""
    assert _machine is not None
    return _machine.function(name)


_FUNCTIONS = "from tests.support.musa_device import installed\n\n\ndef __getattr__(name):\n    return installed(name)\n"
_TORCH_MUSA = """import torch

__version__ = "2.7.1"
torch.version.musa = "4.3.6"
"""


def write_distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def write_package(folder: Path, name: str, **modules: str) -> None:
    """A package `name` with an empty __init__ unless one is given, and other modules by name."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    for module, text in {"__init__": "", **modules}.items():
        (folder / name / f"{module}.py").write_text(text)


def write_stack(folder: Path, version: str) -> None:
    """Every package of a working machine, as MATE's version names them."""
    write_package(folder, "torch_musa", __init__=_TORCH_MUSA)
    write_package(folder, "mate", mha_interface="")
    old = version == "0.1.3"
    write_package(folder, "flash_attn" if old else "flash_attn_3", interface=_FUNCTIONS)
    write_distribution(folder, "mate", f"{version}+mu436")
    write_distribution(folder, "mate-flash-attention" if old else "flash_attn_3", version)
    write_distribution(folder, "apache-tvm-ffi", "0.1.9.post2+musa.1")


def forget() -> None:
    """Drop what the process remembers of devices and packages."""
    for name in [n for n in sys.modules if n.split(".")[0] in _PACKAGES]:
        del sys.modules[name]
    importlib.invalidate_caches()
    if hasattr(torch.version, "musa"):
        del torch.version.musa
    musa._report, musa_mate._mate = None, None
    device_module._targets.clear()
    dispatch._made.clear()
    flash_attention_v3._supported.clear()


_PACKAGES = ("torch_musa", "mate", "flash_attn", "flash_attn_3", "flash_attn_interface", "torchada", "sageattention")


@contextlib.contextmanager
def on_path(folder: Path) -> Iterator[None]:
    """`folder` first on sys.path, and nothing remembered, before and after."""
    name_the_backend()
    sys.path.insert(0, str(folder))
    forget()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        forget()
        RUNTIME.devices = 0  # the name stays with torch for the rest of the process, the machine does not


def name_the_backend() -> None:
    """torch takes a name for its spare device type once a process, as torch_musa gives it."""
    if torch._C._get_privateuse1_backend_name() != "musa":
        torch.utils.backend_registration._setup_privateuseone_for_python_backend("musa", backend_module=RUNTIME)


@contextlib.contextmanager
def machine(
    folder: Path, functions: Mapping[str, Callable[..., Any]] | None, version: str = "0.2.2", *, asserts: bool = True
) -> Iterator[Machine]:
    """A machine with two S5000s and every package; `functions`, by public name, compute; None computes nothing."""
    global _machine
    write_stack(folder, version)
    RUNTIME.__init__()  # type: ignore[misc]
    _machine = Machine(folder, version, functions, asserts)
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="musa") then comes through _Factories
    try:
        with on_path(folder), _Factories(), one_thread():
            yield _machine
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
        _machine = None


def on_musa(name: str) -> Callable[..., Any]:
    """A public function, called with CPU tensors as if they lay on musa:0, and its result as CPU tensors."""

    def call(**arguments: Any) -> Any:
        return to_cpu(getattr(flash_attention_v3, name)(**to_musa(arguments)))

    return call
