"""Warm-up for MUSA: MATE's own modules, selected, listed and built, alone and beside other targets."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from jit_kernel import config, jit, warmup
from jit_kernel.fa3.musa import prebuild as musa_prewarm
from tests.support.musa_device import write_distribution, write_package

FMHA = """
def get_fmha_fwd_aot_configs(level):
    return [
        {"head_dim_qk": d, "head_dim_vo": dv, "is_causal": c, "is_local": False, "paged_kv": p, "element": "bf16",
         "head_ratio": r, "has_metadata": m, "has_softcap": False, "is_packgqa": True}
        for d, dv in ((128, 128), (192, 128), (256, 256)) for c in (False, True) for p in (False, True)
        for r in (1, 4) for m in (False, True)
    ]
def get_fmha_metadata_aot_configs(level):
    return [{"is_causal": c, "is_local": False, "is_packgqa": True, "head_ratio": r} for c in (0, 1) for r in (1, 4)]
def get_fmha_fwd_combine_aot_configs(level):
    return [{"element": "mutlass::bfloat16_t", "max_splits": n} for n in (16, 32)]
"""
JIT = """
built = []
def prewarm_modules(**configs):
    import os
    assert os.environ["MATE_MUSA_ARCH_LIST"] == "3.1"
    if "include_mla" in configs:
        raise RuntimeError("mcc: error")
    built.append(configs)
"""


@pytest.fixture
def build_host(site, tmp_path: Path, monkeypatch) -> None:
    """MATE and a compiler, no device."""

    def write(folder: Path) -> None:
        write_package(folder, "mate", mha_interface="")
        write_package(folder / "mate", "jit", __init__=JIT)
        (folder / "mate" / "jit" / "attention").mkdir()
        (folder / "mate" / "jit" / "attention" / "__init__.py").write_text("")
        write_package(folder / "mate" / "jit" / "attention", "fmha", __init__=FMHA)
        write_distribution(folder, "mate", "0.2.2")
        write_distribution(folder, "apache-tvm-ffi", "0.1.9.post2+musa.1")

    mcc = tmp_path / "mcc"
    mcc.write_text("#!/bin/sh\n")
    mcc.chmod(0o755)
    monkeypatch.setenv("MATE_MCC", str(mcc))
    monkeypatch.delenv("MATE_MUSA_ARCH_LIST", raising=False)
    site(write)
    yield

    os.environ.pop("MATE_MUSA_ARCH_LIST", None)


def test_prewarm_builds_the_selected_modules_of_mates(build_host) -> None:
    outcome = musa_prewarm.prewarm({"head_dim": "96", "dtype": "fp16", "group": "8", "causal": "1"})
    import mate.jit  # the double's

    forward, metadata, combine = (next(iter(configs.values())) for configs in mate.jit.built[:3])
    assert {config["head_dim_qk"] for config in forward} == {128}
    assert {config["element"] for config in forward} == {"mutlass::half_t"}
    assert {config["head_ratio"] for config in forward + metadata} == {8}
    assert {config["is_causal"] for config in forward} == {True}
    assert {config["element"] for config in combine} == {"mutlass::half_t"}
    assert len(forward) == 4  # paged or not, with metadata or not; the two head ratios became one
    assert [(name, error) for name, _, error in outcome][-1] == ("MLA decode", "RuntimeError: mcc: error")
    assert [error for _, _, error in outcome[:-1]] == [None] * 4


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ({"tile": "64"}, "no such field; it must be one of head_dim"),
        ({"dtype": "fp32"}, "it must be one of bf16, fp16"),
        ({"causal": "maybe"}, "it must be 0 or 1"),
        ({"head_dim": "1024"}, "MATE serves head sizes up to 512"),
        ({"group": "many"}, "it must be a number of at least 1"),
        ({"head_dim": "512"}, "MATE lists no forward module"),
    ],
)
def test_prewarm_refuses_what_it_cannot_select(build_host, select: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        musa_prewarm.prewarm(select)


def test_prewarm_says_what_is_missing() -> None:
    with pytest.raises(
        NotImplementedError, match="building MATE's modules needs, and this is missing:\n  MATE: missing"
    ):
        musa_prewarm.prewarm({})


def test_the_oldest_mate_cannot_be_prewarmed(site, build_host) -> None:
    def write(folder: Path) -> None:
        write_package(folder, "mate", mha_interface="")
        write_distribution(folder, "mate", "0.1.3")

    site(write)
    with pytest.raises(NotImplementedError, match=r"MATE 0\.1\.3 has no way to build its modules ahead"):
        musa_prewarm.prewarm({})


BOTH = ("--target", "cpu:native", "--target", "musa:mp_31", "--select", "dtype=bf16", "head_dim=128")


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An empty store, and instead of compilations of ours the list of their targets."""
    made: list[str] = []
    monkeypatch.setenv("JIT_KERNEL_CACHE_DIR", str(tmp_path / "store"))
    config.reload()
    monkeypatch.setattr(jit, "build", lambda spec, target: made.append(str(target)))
    yield made
    monkeypatch.undo()
    config.reload()


def built() -> list[dict[str, object]]:
    """What MATE's double was asked to build."""
    import mate.jit  # the double's

    return mate.jit.built


def test_every_target_is_compiled(build_host, compiled, capsys) -> None:
    """The double's MLA modules fail; all else of both targets is made."""
    assert warmup.main([*BOTH, "--json"]) == 1
    outcome = json.loads(capsys.readouterr().out)
    assert set(compiled) == {record["target"] for record in outcome["compiled"]} - {"musa:mp_31"} != set()
    assert len(built()) == 4
    made = [record["variant"]["modules"] for record in outcome["compiled"] if record["kernel"] == "mate"]
    assert made[1:] == ["metadata modules", "combine modules", "launcher of the prebuilt kernels"]
    (failed,) = outcome["failed"]
    assert failed["target"] == "musa:mp_31" and failed["error"] == "RuntimeError: mcc: error"


@pytest.mark.parametrize("flag", ["--list", "--dry-run"])
def test_nothing_is_compiled_to_list(build_host, compiled, capsys, flag: str) -> None:
    assert warmup.main([*BOTH, flag]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("missing cpu:") for line in lines)
    assert "unknown musa:mp_31 MATE's MLA decode" in lines
    assert warmup.main([*BOTH, flag, "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert {record["target"].partition(":")[0] for record in records} == {"cpu", "musa"}
    assert {record["stored"] for record in records if record["kernel"] == "mate"} == {None}
    assert compiled == [] and built() == []


def test_jobs_reach_mate(build_host, compiled, capsys) -> None:
    warmup.main([*BOTH, "--jobs", "3"])
    assert [configs["jobs"] for configs in built()] == [3] * 4
    assert "FAILED MATE's MLA decode for musa:mp_31:\nRuntimeError: mcc: error" in capsys.readouterr().err


def test_a_target_whose_software_is_missing_stops_no_other(compiled, capsys) -> None:
    assert warmup.main([*BOTH, "--list"]) == 1
    listed = capsys.readouterr()
    assert "missing cpu:" in listed.out and "musa:mp_31: building MATE's modules needs" in listed.err
    assert compiled == []
    assert warmup.main([*BOTH, "--json"]) == 1
    outcome = json.loads(capsys.readouterr().out)
    assert compiled and len(outcome["compiled"]) == len(compiled)
    assert [record["target"] for record in outcome["failed"]] == ["musa:mp_31"]


def test_an_older_chip_is_refused(build_host, compiled, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        warmup.main(["--target", "musa:mp_22", "--list"])
    assert caught.value.code == 2
    assert "target is musa:mp_22: no implementation serves it; MATE needs mp_31" in capsys.readouterr().err


def test_a_target_named_twice_is_one_target(build_host, compiled, capsys) -> None:
    warmup.main([*BOTH, "--list", "--json"])
    once = json.loads(capsys.readouterr().out)
    warmup.main([*BOTH, *BOTH[:4], "--list", "--json"])
    assert json.loads(capsys.readouterr().out) == once
