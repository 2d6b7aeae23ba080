"""Platform wheels: the plain wheel with launchers compiled into it, so that a CUDA image needs no compiler.

usage: python tools/platform_wheel.py dist/jit_kernel-0.1.0-py3-none-any.whl [--target cuda:sm_90a ...] [--out dist]
                                      [--cross "aarch64=python -m ziglang c++ -target aarch64-linux-gnu.2.17"]

The launchers are compiled from the wheel's own sources, packed and unpacked (so that nothing of this machine is in it)
and put into `jit_kernel/kernel_cache`, which an installed package has as its last layer. The wheel's tag is manylinux
with the newest version of the C library that a launcher asks for. --cross: one more wheel, for another machine, whose
launchers that compiler makes of the same units.
"""

from __future__ import annotations

import argparse
import base64
import functools
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TARGETS = ("cuda:sm_80", "cuda:sm_86", "cuda:sm_89", "cuda:sm_90a", "cuda:sm_100", "cuda:sm_120")
CACHE = "jit_kernel/kernel_cache"
ELF_MACHINES = {"x86_64": 62, "aarch64": 183}
# Of clang, as ziglang has it: no sanitizer, no names but the exported ones, and tvm-ffi's functions, which are there
# when a launcher is loaded, may be missing.
CROSS_FLAGS = ("-fno-sanitize=undefined", "-Wl,-s", "-Wl,-z,undefs", "-Wl,--no-as-needed")
_EPOCH = (1980, 1, 1, 0, 0, 0)


def main() -> int:
    """Compile, write the wheel, print its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--target", action="append", default=[])
    parser.add_argument("--out", type=Path, default=Path("dist"))
    parser.add_argument("--cross", action="append", default=[], metavar="MACHINE=COMPILER")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jit_kernel-wheel-") as folder:
        site = Path(folder, "site")
        with zipfile.ZipFile(options.wheel) as archive:
            archive.extractall(site)
        store = compiled(site, Path(folder), options.target or TARGETS)
        options.out.mkdir(parents=True, exist_ok=True)
        print(with_layer(options.wheel, store, options.out))
        for machine, _, compiler in (each.partition("=") for each in options.cross):
            other = crossed(store, site, Path(folder, machine), machine, compiler)
            print(with_layer(options.wheel, other, options.out, machine))
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


def crossed(store: Path, site: Path, folder: Path, machine: str, compiler: str) -> Path:
    """The same store, its libraries compiled for another machine. Ends the program where one is not as it must be."""
    if machine not in ELF_MACHINES:
        raise SystemExit(f"--cross is {machine}={compiler}; the machine must be one of {', '.join(ELF_MACHINES)}")
    found = folder / "store"
    shutil.copytree(store, found)

    @functools.cache
    def library(unit: bytes, flags: str) -> bytes:
        return compiled_for(unit, flags, site, folder, compiler)

    for place in sorted(found.rglob("manifest.json")):
        manifest, path = json.loads(place.read_text()), place.with_name("kernel.so")
        data = library(place.with_name("unit.cpp").read_bytes(), manifest["inputs"]["flags"])
        is_for, wanted = struct.unpack_from("<H", data, 18)[0], ELF_MACHINES[machine]
        if is_for != wanted:
            raise SystemExit(f"{compiler} made a library for ELF machine {is_for}; it must be {wanted}, {machine}")
        lost = exports_of(path.read_bytes()) - exports_of(data)
        if lost:
            raise SystemExit(f"{compiler} made a library without {', '.join(sorted(lost))}")
        path.chmod(0o644)
        path.write_bytes(data)
        manifest["files"]["kernel.so"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest["command"] = shlex.join([*shlex.split(compiler), *manifest["inputs"]["flags"].split(), *CROSS_FLAGS])
        manifest["compiler"] = {"name": "clang++", "path": "", "version": compiler}
        place.chmod(0o644)
        place.write_text(json.dumps(manifest, indent=1))
    return found


def compiled_for(unit: bytes, flags: str, site: Path, folder: Path, compiler: str) -> bytes:
    """A unit's library, by a compiler for another machine, beside an empty library that stands for tvm-ffi's."""
    import tvm_ffi.libinfo

    sources = site / "jit_kernel" / "kernel_sources"
    includes = [f"-I{each}" for each in (sources, sources / "include", *tvm_ffi.libinfo.include_paths())]
    (folder / "unit.cpp").write_bytes(unit)
    (folder / "empty.cpp").write_text("")
    words = shlex.split(compiler)
    stub = ("-shared", "-nostdlib", "-Wl,-soname,libtvm_ffi.so", "empty.cpp", "-o", "libtvm_ffi.so")
    subprocess.run([*words, *stub], cwd=folder, check=True)
    library = ("unit.cpp", "-o", "kernel.so", "-L.", *CROSS_FLAGS, "-ltvm_ffi")
    subprocess.run([*words, *flags.split(), *includes, *library], cwd=folder, check=True)
    return (folder / "kernel.so").read_bytes()


def exports_of(library: bytes) -> set[str]:
    """The functions for tvm-ffi that a library's dynamic symbols define."""
    from jit_kernel.engine import artifact

    names = (name.decode() for name in artifact.defined(library))
    return {name for name in names if name.startswith("__tvm_ffi_")}


def with_layer(wheel: Path, store: Path, out: Path, machine: str = platform.machine()) -> Path:
    """Write the wheel again, with the entries of a store in it, under the tag that their libraries ask for."""
    entries = {
        f"{CACHE}/{path.relative_to(store).as_posix()}": path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(store).parts)
    }
    if not entries:
        raise SystemExit(f"{store} holds no entry to put into the wheel")
    tag = f"py3-none-{platform_of(entries, machine)}"
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


def platform_of(entries: dict[str, bytes], machine: str) -> str:
    """The manylinux tag of some libraries: the newest symbol version of the C library that one of them names."""
    libraries = [data for name, data in entries.items() if name.endswith(".so")]
    minors = [int(minor) for data in libraries for minor in re.findall(rb"\0GLIBC_2\.(\d+)(?=[.\0])", data)]
    return f"manylinux_2_{max(minors, default=17)}_{machine}"


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


if __name__ == "__main__":
    sys.exit(main())
