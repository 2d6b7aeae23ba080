"""What an entry of the store is called by, and why it is not there.

What an artifact depends on stands in its key: the unit's text, the bytes of every file that it includes or imports,
directly or not, the flags, the target and tvm-ffi's version. The compiler's identity is a second name beside the
key, so that an image without a compiler still finds what another built, and a new compiler gets an entry of its own.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from jit_kernel import config
from jit_kernel.device import Target
from jit_kernel.engine import closure, compiler, identity, progress
from jit_kernel.engine.entry import Entry, Miss
from jit_kernel.engine.spec import KernelSpec
from jit_kernel.engine.store import Store


@dataclass(frozen=True)
class Wanted:
    """A kernel that is asked for, its key, what the key was made of, and the compiler's identity or what it lacks."""

    spec: KernelSpec
    target: Target
    key: str
    inputs: dict[str, str]
    compiler: str | compiler.CompilerNotFoundError

    def find(self, store: Store) -> Entry | Miss:
        """The entry of the present compiler; where none works, any compiler's."""
        present = self.compiler if isinstance(self.compiler, str) else None
        return store.lookup(self.spec.kernel, str(self.target), self.key, present)


def wanted_of(spec: KernelSpec, target: Target, store: Store) -> Wanted:
    """A kernel with its key and the compiler's identity."""
    return Wanted(spec, target, *key_of(spec, target), identity.present(spec.route, store))


def key_of(spec: KernelSpec, target: Target) -> tuple[str, dict[str, str]]:
    """The key of an artifact and the inputs that it was made of, each with its sha256."""
    import tvm_ffi

    inputs = {"unit": hashlib.sha256(spec.unit.encode()).hexdigest()}
    inputs |= closure.files_of(spec.unit, spec.route, spec.kernel, str(config.kernel_sources_dir()), spec.sources)
    inputs["flags"] = " ".join(compiler.flags(spec.route, target, spec.flags))
    inputs["target"] = str(target)
    inputs["tvm-ffi"] = tvm_ffi.__version__
    text = json.dumps([spec.kernel, spec.route, *filter(None, [spec.entry]), sorted(inputs.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:32], inputs


def why_missed(wanted: Wanted, store: Store) -> str | None:
    """What changed since the newest entry of the same variant, for the event and the log."""
    spec, inputs = wanted.spec, wanted.inputs
    same = [
        manifest
        for _, manifest in store.manifests(store.root / spec.kernel / str(wanted.target))
        if manifest.get("variant") == dict(spec.variant) and isinstance(manifest.get("inputs"), dict)
    ]
    if not same:
        return None
    old = max(same, key=lambda manifest: str(manifest.get("created")))["inputs"]
    changed = sorted(name for name in {*old, *inputs} if old.get(name) != inputs.get(name))
    reason = f"changed since the last build: {', '.join(changed) if changed else 'the compiler'}"
    progress.say(f"{spec}: {reason}", "debug")
    return reason
