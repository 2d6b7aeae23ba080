"""A platform wheel: the plain wheel with launchers that this machine compiled, so that a CUDA image needs no compiler.

usage: python tools/platform_wheel.py dist/jit_kernel-0.1.0-py3-none-any.whl [--target cuda:sm_90a ...] [--out dist]

The launchers are compiled from the wheel's own sources, packed and unpacked (so that nothing of this machine is in it)
and put into `jit_kernel/kernel_cache`, which an installed package has as its last layer. The wheel's tag is manylinux
with the newest version of the C library that a launcher asks for; run it on x86-64 and on aarch64 for the two wheels.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TARGETS = ("cuda:sm_80", "cuda:sm_86", "cuda:sm_89", "cuda:sm_90a", "cuda:sm_100", "cuda:sm_120")
CACHE = "jit_kernel/kernel_cache"
_EPOCH = (1980, 1, 1, 0, 0, 0)


def main() -> int:
    """Compile, write the wheel, print its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--target", action="append", default=[])
    parser.add_argument("--out", type=Path, default=Path("dist"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jit_kernel-wheel-") as folder:
        site = Path(folder, "site")
        with zipfile.ZipFile(options.wheel) as archive:
            archive.extractall(site)
        store = compiled(site, Path(folder), options.target or TARGETS)
        options.out.mkdir(parents=True, exist_ok=True)
        print(with_layer(options.wheel, store, options.out))
    return 0


def compiled(site: Path, folder: Path, targets: tuple[str, ...] | list[str]) -> Path:
    """A store of the launchers for some targets, compiled from the package in `site`."""
    words = [word for target in targets for word in ("--target", target)]
    pack = str(folder / "launchers.pack")
    _run(site, folder / "built", "jit_kernel.warmup", *words, "--select", "function=launcher")
    _run(site, folder / "built", "jit_kernel", "cache", "pack", pack)
    _run(site, folder / "store", "jit_kernel", "cache", "unpack", pack)
    return folder / "store"


def _run(site: Path, store: Path, *words: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(site), "JIT_KERNEL_CACHE_DIR": str(store)}
    subprocess.run([sys.executable, "-m", *words], env=environment, cwd=site, check=True)


def with_layer(wheel: Path, store: Path, out: Path) -> Path:
    """Write the wheel again, with the entries of a store in it, under the tag that their libraries ask for."""
    entries = {
        f"{CACHE}/{path.relative_to(store).as_posix()}": path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(store).parts)
    }
    if not entries:
        raise SystemExit(f"{store} holds no entry to put into the wheel")
    tag = f"py3-none-{platform_of(entries)}"
    name = wheel.name.replace("py3-none-any", tag)
    with zipfile.ZipFile(wheel) as archive:
        files = {each: archive.read(each) for each in archive.namelist() if not each.endswith("/")}
    (about,) = [each for each in files if each.endswith(".dist-info/WHEEL")]
    text = files[about].decode().replace("Tag: py3-none-any", f"Tag: {tag}")
    files[about] = text.replace("Root-Is-Purelib: true", "Root-Is-Purelib: false").encode()
    files.update(entries)
    record = about.replace("/WHEEL", "/RECORD")
    files.pop(record)
    lines = [f"{each},sha256={_digest(data)},{len(data)}" for each, data in files.items()]
    files[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    with zipfile.ZipFile(out / name, "w", zipfile.ZIP_DEFLATED) as archive:
        for each, data in files.items():
            member = zipfile.ZipInfo(each, _EPOCH)
            member.external_attr, member.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(member, data)
    return out / name


def platform_of(entries: dict[str, bytes]) -> str:
    """The manylinux tag of some libraries: the newest symbol version of the C library that one of them names."""
    libraries = [data for name, data in entries.items() if name.endswith(".so")]
    minors = [int(minor) for data in libraries for minor in re.findall(rb"\0GLIBC_2\.(\d+)(?=[.\0])", data)]
    return f"manylinux_2_{max(minors, default=17)}_{platform.machine()}"


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


if __name__ == "__main__":
    sys.exit(main())
