"""Why a kernel is not stored: the entry that is nearest to it, and which parts of the key differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jit_kernel.device import Target
from jit_kernel.engine.spec import KernelSpec
from jit_kernel.engine.store import Store

# Parts of a key whose value says more than that it changed; all others are sums of files, by the file's name.
_TOLD = ("flags", "target", "tvm-ffi")


def why_missed(
    spec: KernelSpec, target: Target, key: str, inputs: Mapping[str, str], stores: Iterable[Store]
) -> str | None:
    """What differs from the nearest entry of the same variant, in words; None where no entry is near.

    The newest of this target comes first, then the newest of any target of the same kernel.
    """
    here: list[dict[str, Any]] = []
    elsewhere: list[dict[str, Any]] = []
    for store in stores:
        for place in _targets(store, spec.kernel):
            for _, manifest in store.manifests(place):
                if manifest.get("variant") == dict(spec.variant) and isinstance(manifest.get("inputs"), dict):
                    (here if place.name == str(target) else elsewhere).append(manifest)
    near = here or elsewhere
    if not near:
        return None
    nearest = max(near, key=lambda manifest: (manifest.get("key") == key, str(manifest.get("created"))))
    if nearest.get("key") == key:
        return f"changed since the last build: the compiler; the stored entry is by {_compiler(nearest)}"
    return f"changed since the last build: {', '.join(_differences(nearest['inputs'], inputs))}"


def _targets(store: Store, kernel: str) -> list[Path]:
    try:
        return sorted(path for path in (store.root / kernel).iterdir() if ":" in path.name)
    except OSError:
        return []


def _differences(old: Mapping[str, Any], new: Mapping[str, str]) -> list[str]:
    """Each part that differs: a file by its name; flags, target and tvm-ffi with both values."""
    found = []
    for name in sorted({*old, *new}):
        if old.get(name) == new.get(name):
            continue
        if name == "flags":
            found.append(_flags(str(old.get(name, "")).split(), str(new.get(name, "")).split()))
        elif name in _TOLD:
            found.append(f"{name} ({old.get(name)} is stored, {new.get(name)} is wanted)")
        else:
            found.append(name + (" (new)" if name not in old else " (gone)" if name not in new else ""))
    return found or ["the kernel's own name, route or entry"]


def _flags(old: list[str], new: list[str]) -> str:
    gone = [f"-{flag}" for flag in old if flag not in new]
    come = [f"+{flag}" for flag in new if flag not in old]
    return f"flags ({' '.join([*gone, *come]) or 'their order'})"


def _compiler(manifest: Mapping[str, Any]) -> str:
    compiler = manifest.get("compiler")
    version = str(compiler.get("version", "")) if isinstance(compiler, dict) else ""
    return version.strip().splitlines()[0] if version.strip() else "another"
