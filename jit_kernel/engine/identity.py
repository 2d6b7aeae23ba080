"""Which compiler is installed here: the second name of an entry, beside its key."""

from __future__ import annotations

import contextlib
import hashlib
import os

from jit_kernel.engine import compiler
from jit_kernel.engine.store import Store

_identities: dict[str, str] = {}


def of(found: compiler.Found, store: Store | None) -> str:
    """The version that a compiler states; it is started only where neither this process nor the store has seen it."""
    fingerprint = compiler.fingerprint(found)
    known = _identities.get(fingerprint)
    if known is None:
        known = store.recall_compiler(fingerprint) if store else None
        if known is None:
            known = compiler.identify(found)
            if store:
                store.remember_compiler(fingerprint, known)
        _identities[fingerprint] = known
    return known


def present(route: str, store: Store) -> str | compiler.CompilerNotFoundError:
    """The short identity of the compiler that is installed here; without one that works, the error that says so.

    The C library counts as part of it: a library built against a newer one does not load on an older one.
    """
    try:
        version = of(compiler.require(route), store)
    except compiler.CompilerNotFoundError as error:
        return error
    return _short(version, route)


def seen(route: str, store: Store) -> str | None:
    """The same as far as this process or the store knows it: no compiler is started, and nothing is written."""
    try:
        fingerprint = compiler.fingerprint(compiler.require(route))
    except compiler.CompilerNotFoundError:
        return None
    version = _identities.get(fingerprint) or store.recall_compiler(fingerprint)
    return None if version is None else _short(version, route)


def _short(version: str, route: str) -> str:
    with contextlib.suppress(ValueError, OSError, AttributeError):
        version += f"\n{os.confstr('CS_GNU_LIBC_VERSION')}" if route == "host" else ""
    return hashlib.sha256(version.encode()).hexdigest()[:8]
