"""What an entry of the store is called by.

What an artifact depends on stands in its key: the unit's text, the bytes of every file that it includes or imports,
directly or not, the flags, the target and tvm-ffi's version. The compiler's identity is a second name beside the
key, so that an image without a compiler still finds what another built, and a new compiler gets an entry of its own.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field

from jit_kernel import config
from jit_kernel.device import Target
from jit_kernel.engine import closure, compiler, identity
from jit_kernel.engine.spec import KernelSpec
from jit_kernel.engine.store import Store


@dataclass(frozen=True)
class Wanted:
    """A kernel that is asked for, its key, what the key was made of, and the store that knows compilers."""

    spec: KernelSpec
    target: Target
    key: str
    inputs: dict[str, str]
    store: Store
    _asked: list[str | compiler.CompilerNotFoundError] = field(default_factory=list, repr=False, compare=False)

    @property
    def place(self) -> str:
        """The target's name in the store."""
        return str(self.target)

    @property
    def compiler(self) -> str | compiler.CompilerNotFoundError:
        """The present compiler's identity, which a compiler may have to be started for, or the error that says so."""
        # functools.cached_property has one lock for all instances up to Python 3.11, which a forked child finds held.
        if not self._asked:
            self._asked.append(identity.present(self.spec.route, self.store))
        return self._asked[0]

    def compiler_seen(self) -> str | None:
        """The same, if it is known without starting one."""
        return identity.seen(self.spec.route, self.store)

    def compiler_asked(self) -> str | None:
        """The same; None where no compiler works."""
        return self.compiler if isinstance(self.compiler, str) else None


def wanted_of(spec: KernelSpec, target: Target, store: Store) -> Wanted:
    """A kernel with its key; `store` is the one that knows compilers."""
    return Wanted(spec, target, *key_of(spec, target), store)


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
