"""A profile that was recorded on one machine names somebody's kernels on another, and the package's present ones."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from jit_kernel import config, jit, ready
from jit_kernel.commands import cache
from jit_kernel.device import Target, cpu_target
from jit_kernel.engine import packages, record
from tests.support import children, outsider

GPU = Target.parse(outsider.TARGET)


def recorded(package: Any) -> tuple[bool, list[str]]:
    """Call the library, and note the GPU's kernels as a run on one would."""
    for kernel in (package.scale, package.fill, package.twice):
        record.note(kernel.spec, GPU)
    return outsider.call_on_host(package)


def packed(site: str, profile: str, pack: str) -> int:
    sys.path.insert(0, site)
    return cache.main(["pack", pack, "--profile", profile, "--target", str(cpu_target())])


def served(site: str, profile: str, pack: str) -> dict[str, Any]:
    """Unpack, seal, preload and call in a process that has imported nothing of the package before."""
    sys.path.insert(0, site)
    assert cache.main(["unpack", pack]) == 0
    jit.seal()
    kernels = ready.kernels_of(profile)
    done = ready.preload(profile)
    known = len(jit.events())
    package = __import__(outsider.NAME)
    right, compiled = outsider.call_on_host(package)
    specs = [package.scale.spec, package.fill.spec, package.twice.spec, package.host.spec]
    return {
        "right": right and not compiled,
        "same": [spec for spec, _ in kernels] == specs,
        "folders": sorted({spec.sources.folder for spec, _ in kernels if spec.sources}),
        "done": (done["loaded"], done["compiled"], done["skipped"]),
        "after": len(jit.events()) - known,
    }


def test_a_profile_names_a_packages_kernels_in_another_place(tmp_path):
    """Recorded with the package in one folder, packed, preloaded and called sealed with the package in another."""
    one, two = (outsider.written(tmp_path / name) for name in ("one", "two"))
    profile, pack = tmp_path / "profile", str(tmp_path / "a.pack")
    built: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(tmp_path / "built")}
    first = children.run(outsider.within, str(one), recorded,
                         environment={**built, "JIT_KERNEL_RECORD": str(profile)}, scratch=tmp_path)  # fmt: skip
    assert first.error == "" and first.result[0], first
    text = profile.read_text()
    assert str(tmp_path) not in text and text.count('"package": "elsewhere"') == 4, text
    other: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(tmp_path / "home"), "PATH": "", "CXX": None}
    made = children.run(packed, str(one), str(profile), pack, environment=built, scratch=tmp_path)
    assert made.error == "" and made.result == 0, made
    outcome = children.run(served, str(two), str(profile), pack, environment=other, scratch=tmp_path)
    assert outcome.error == "" and outcome.result == {
        "right": True, "same": True, "folders": [str(two), str(two / "elsewhere" / "csrc")], "done": (1, 0, 3),
        "after": 0,
    }, outcome  # fmt: skip


def lines_of(folder: Path, changes: list[dict[str, Any]], specs: list[jit.KernelSpec]) -> Path:
    """A profile of specs whose lines were changed."""
    lines = [{**record._plain(spec), "target": str(GPU), **change} for spec, change in zip(specs, changes, strict=True)]
    (folder / "profile").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "profile"


def listed_now(site: str, profile: str) -> list[tuple[str, str]]:
    sys.path.insert(0, site)
    return [(spec.unit, spec.entry) for spec, _ in ready.kernels_of(profile)]


def test_what_a_package_or_ops_declare_is_taken_as_it_is_now(tmp_path):
    """An older version's line names kernel and variant; the unit is the present one's, as of attention's kernels."""
    from jit_kernel import ops
    from jit_kernel.toolkit import declared

    assert ops.__name__ == "jit_kernel.ops"
    site = outsider.written(tmp_path)
    (op,) = (spec for spec in declared.known("jit_kernel.ops", cpu_target()) if spec.kernel == "ops/rms_norm.h")
    own = jit.KernelSpec("elsewhere/fill", "old", "cuda", (("entry", "elsewhere::fill"),), (), None, "fill")
    place = {"package": "elsewhere", "way": "csrc", "name": "elsewhere"}
    changes: list[dict[str, Any]] = [
        {"unit": "old", "target": str(cpu_target())},
        {"sources": place},
        {"sources": place, "variant": [["entry", "gone"]]},
    ]
    profile = lines_of(tmp_path, changes, [op, own, own])
    outcome = children.run(listed_now, str(site), str(profile), environment={}, scratch=tmp_path)
    assert outcome.error == "", outcome
    (unit, _), (now, entry), left = outcome.result
    assert unit == op.unit and "JIT_KERNEL_ENTRY(elsewhere::fill)" in now and entry == "elsewhere::fill"
    assert left == ("old", "fill")


def test_a_package_that_is_not_here_or_has_no_such_folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(outsider.written(tmp_path / "site")))
    spec = jit.KernelSpec("elsewhere/fill", "", "cuda", (), (), None, "fill")
    for package, way, words in (
        ("nowhere_at_all", "csrc", "the package 'nowhere_at_all', which cannot be imported here"),
        ("elsewhere", "gone", "the package 'elsewhere', which has no folder 'gone'"),
        ("elsewhere", "csrc/../../..", "they must be a name and a folder"),
        ("elsewhere", "/etc", "they must be a name and a folder"),
        ("../up", ".", "they must be a name and a folder"),
    ):
        place = {"package": package, "way": way, "name": "elsewhere"}
        profile = lines_of(tmp_path, [{"sources": place}], [spec])
        with pytest.raises(record.ProfileError, match="line 1 is") as caught:
            ready.kernels_of(profile)
        assert words in str(caught.value)


def test_which_package_a_folder_belongs_to(tmp_path):
    """The innermost package that is imported; a folder of none is named by itself."""
    folder = os.path.dirname(os.path.realpath(config.__file__))
    assert packages.name_of(f"{folder}/engine") == ("jit_kernel", "engine")
    assert packages.folder_of("jit_kernel", "engine") == f"{folder}/engine"
    assert packages.name_of(os.path.dirname(folder), "jit_kernel.some.module") == ("jit_kernel", "..")
    assert packages.name_of(str(tmp_path)) is None
    spec = jit.KernelSpec("own/a", "", "cuda", (), (), jit.Sources(tmp_path, name="own"), "a")
    assert record._plain(spec)["sources"] == {"name": "own", "folder": str(tmp_path)}
