"""A package of somebody else's, installed from its own wheel, compiles, keeps, warms, explains and runs its kernels."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from jit_kernel import config, jit
from jit_kernel.device import Target, cpu_target
from jit_kernel.engine import nvrtc
from tests.support import children, outsider

pytestmark = pytest.mark.skipif(nvrtc.find() is None, reason="no NVRTC")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return outsider.installed(tmp_path_factory.mktemp("outsider"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that has the launcher, which other tests need too, and nothing else."""
    store = tmp_path_factory.mktemp("store")
    entry = jit.build(jit.LAUNCHER, Target.parse(outsider.TARGET))
    shutil.copytree(entry, store / entry.relative_to(config.cache_dir()))
    return store


def test_an_installed_package_has_kernels_of_its_own(site, store, tmp_path):
    """One story, as every step needs the one before; each process is a new one."""
    pytest.importorskip("triton")
    environment = {"JIT_KERNEL_CACHE_DIR": str(store), "JIT_KERNEL_LOG": "quiet"}

    def started(*work):
        return children.Child(outsider.within, str(site), *work, environment=environment, scratch=tmp_path)

    def did(*work):
        outcome = started(*work).outcome()
        assert outcome.error == "", outcome
        return outcome.result

    # Two processes that want the same kernels at the same time: each is compiled once.
    both = [started(outsider.warm_device_code) for _ in range(2)]
    done = [child.outcome() for child in both]
    assert sorted(done[0].result + done[1].result) == ["elsewhere/fill", "elsewhere/scale"], done

    # The rest is compiled without a GPU, and then nothing is missing.
    gpu, host = ("--target", outsider.TARGET), ("--target", str(cpu_target()))
    status, compiled, _ = did(outsider.warm_up, *gpu, *host)
    assert (status, compiled) == (0, ["elsewhere/host", "elsewhere/twice"])
    status, compiled, listed = did(outsider.warm_up, *gpu, *host, "--list")
    assert (status, compiled) == (0, []) and listed.count("stored ") == 5 and "missing" not in listed
    assert did(outsider.call_on_host) == (True, [])
    status, explained = did(outsider.explain, "--device", outsider.TARGET)
    assert status == 0 and explained.count(": stored in ") == 4

    # An edit of a header, or of a module that the Triton kernel imports, is a reason for what includes it alone.
    package = site / "elsewhere"
    for file in (package / "csrc" / "common" / "factor.cuh", package / "factor.py"):
        file.write_text(file.read_text() + "\n")
    status, explained = did(outsider.explain, "--device", outsider.TARGET)
    missing = [line for line in explained.splitlines() if ": missing: " in line]
    assert status == 1 and len(missing) == 2, explained
    assert missing[0].startswith("elsewhere/scale") and missing[0].endswith("since the last build: common/factor.cuh")
    assert missing[1].startswith("elsewhere/twice") and missing[1].endswith("since the last build: elsewhere/factor.py")
    assert did(outsider.warm_device_code) == ["elsewhere/scale"]

    # Where the folder lies does not count.
    moved = shutil.copytree(site, tmp_path / "moved")
    site = moved
    assert did(outsider.warm_device_code) == []


def test_what_a_module_must_be_to_be_warmed(capsys):
    from jit_kernel import warmup

    for module, word in (("no_such_module", "cannot be imported"), ("json", "declares no kernel")):
        with pytest.raises(SystemExit):
            warmup.main(["--module", module, "--target", "cuda:sm_90a", "--list"])
        assert word in capsys.readouterr().err
