"""The signature of a pack: HMAC-SHA256 by a key that both sides have, from the environment or a file.

Python's standard library has no public-key signatures; a key that signs is one that can forge, so it belongs only where
packs are made and unpacked, never into an image.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

from jit_kernel import config
from jit_kernel.engine import ownership

_LEAST_BYTES, _MOST_BYTES = 32, 4096


def key() -> bytes | None:
    """The key that JIT_KERNEL_PACK_KEY gives, None without one. Raises CacheError for a file that cannot be used."""
    chosen = config.settings().pack_key
    if not chosen:
        return None
    if chosen.startswith("hex:"):
        return bytes.fromhex(chosen[4:])
    path = Path(chosen)
    ownership.check_file(path, "key file")
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            data = file.read(_MOST_BYTES + 1).strip()
    except OSError as error:
        raise ownership.CacheError(f"JIT_KERNEL_PACK_KEY is {chosen!r}, which cannot be read: {error}") from error
    if not _LEAST_BYTES <= len(data) <= _MOST_BYTES:
        raise ownership.CacheError(
            f"JIT_KERNEL_PACK_KEY is {chosen!r}, a file of {len(data)} bytes; it must have {_LEAST_BYTES} to "
            f"{_MOST_BYTES}, for example from: openssl rand -hex 32"
        )
    return data


def of(secret: bytes, data: bytes) -> str:
    """The signature of some bytes, in hex."""
    return hmac.new(secret, data, hashlib.sha256).hexdigest()


def is_right(secret: bytes, data: bytes, signature: str) -> bool:
    """Whether a signature is that of these bytes; how far it is right cannot be told by the time that this takes."""
    return hmac.compare_digest(of(secret, data).encode(), signature.encode(errors="replace"))
