"""Compare the cubins of two stores, variant by variant: a change that should not touch device code must not.

    python benchmarks/cubin_equality.py BEFORE AFTER [--append] [--partial]

Each store is a folder that `JIT_KERNEL_CACHE_DIR=FOLDER python -m jit_kernel.warmup --target cuda:sm_90a` filled. Keys
differ from one commit to the next, so entries are matched by kernel, target and variant. Ends with status 1 where a
cubin differs or is missing; with --partial a variant that only BEFORE has is no fault.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import record

ARTIFACT = "kernel.cubin"


@dataclass(frozen=True)
class Comparison:
    """Of one kernel folder and target: how many variants are equal, and which are not."""

    kernel: str
    target: str
    equal: int
    differing: tuple[str, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]

    def line(self, before: Path, after: Path) -> dict[str, object]:
        """The comparison as one recorded measurement."""
        return {
            "what": "cubins equal in two stores",
            "kernel": self.kernel,
            "target": self.target,
            "equal": self.equal,
            "differing": list(self.differing),
            "only_before": len(self.only_before),
            "only_after": len(self.only_after),
            "compilers": sorted(compilers(before) | compilers(after)),
        }


def manifests(store: Path) -> list[tuple[Path, dict[str, object]]]:
    """Every entry of a store that holds a cubin, the oldest first: its folder and its manifest."""
    found = [(path.parent, json.loads(path.read_bytes())) for path in store.rglob("manifest.json")]
    cubins = [(folder, manifest) for folder, manifest in found if (folder / ARTIFACT).exists()]
    return sorted(cubins, key=lambda entry: str(entry[1]["created"]))


def compilers(store: Path) -> set[str]:
    """The versions of the compilers that made a store's cubins."""
    return {str(manifest["compiler"]["version"]) for _, manifest in manifests(store)}  # type: ignore[index]


def hashes(store: Path) -> dict[tuple[str, str], dict[str, str]]:
    """By kernel and target: the sha256 of each variant's newest cubin."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for folder, manifest in manifests(store):
        variant = ", ".join(f"{name}={value}" for name, value in manifest["variant"].items())  # type: ignore[attr-defined]
        group = found.setdefault((str(manifest["kernel"]), str(manifest["target"])), {})
        group[variant] = hashlib.sha256((folder / ARTIFACT).read_bytes()).hexdigest()
    return found


def compare(before: Path, after: Path) -> list[Comparison]:
    """One comparison for each kernel folder and target that either store has."""
    old, new = hashes(before), hashes(after)
    result = []
    for kernel, target in sorted(old.keys() | new.keys()):
        a, b = old.get((kernel, target), {}), new.get((kernel, target), {})
        both = sorted(a.keys() & b.keys())
        differing = tuple(variant for variant in both if a[variant] != b[variant])
        only_before, only_after = tuple(sorted(a.keys() - b.keys())), tuple(sorted(b.keys() - a.keys()))
        result.append(Comparison(kernel, target, len(both) - len(differing), differing, only_before, only_after))
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison and, with --append, record it."""
    parser = argparse.ArgumentParser(description="compare the cubins of two stores, variant by variant")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--append", action="store_true", help="append the outcome to results/cubin_equality.jsonl")
    parser.add_argument("--partial", action="store_true", help="AFTER may lack variants that BEFORE has")
    options = parser.parse_args(argv)
    found = compare(options.before, options.after)
    if not found:
        parser.error("neither store holds a cubin")
    faults = 0
    for each in found:
        compared = each.equal + len(each.differing)
        print(f"{each.kernel} for {each.target}: {each.equal} of {compared} equal", end="")
        print(f", {len(each.only_before)} only before, {len(each.only_after)} only after")
        print(*(f"  differs: {variant}" for variant in each.differing), sep="\n", end="\n" if each.differing else "")
        missing = () if options.partial else each.only_before
        print(*(f"  missing: {variant}" for variant in missing), sep="\n", end="\n" if missing else "")
        faults += len(each.differing) + len(missing)
    if options.append:
        record.write("cubin_equality", [each.line(options.before, options.after) for each in found])
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
