"""Detection: each part of the stack present, absent, foreign or failing, and what is said of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import jit_kernel.flash_attention_v3 as fa3
from jit_kernel import device
from jit_kernel import moore_threads as musa
from jit_kernel.fa3.musa import mate as musa_mate
from jit_kernel.fa3.seam import FUNCTIONS as CPU
from tests.support.musa_device import RUNTIME, machine, to_musa, write_distribution, write_package, write_stack


def whole(folder: Path) -> None:
    write_stack(folder, "0.2.2")


def test_this_machine_has_no_musa() -> None:
    report = musa.probe(refresh=True)
    assert not report.usable
    assert not device.is_musa()
    assert device.get_device_capability("musa:0") is None
    assert {part.name for part in report.missing} >= {"torch_musa", "MUSA device", "MATE", "MATE wrapper"}
    with pytest.raises(NotImplementedError, match="torch_musa: missing"):
        musa_mate.load()


def test_a_whole_stack(site) -> None:
    report = site(whole)
    assert report.usable
    assert not report.missing
    assert (report.torch_musa.version, report.device.version) == ("2.7.1", "mp_31")
    assert report.mate.version == "0.2.2+mu436"
    assert device.is_musa()
    assert device.detect_device() == "musa"
    assert device.get_device_capability() == device.get_device_capability("musa:1") == (3, 1)
    assert device.get_device_capability("musa:2") is None
    assert str(device.device_target("musa:0")) == "musa:mp_31"
    assert fa3._is_fa3_supported()
    assert fa3._is_fa3_supported("musa:1")


@pytest.mark.parametrize("capability", [(2, 1), (2, 2)])
def test_older_chips_are_recognised_by_their_capability(site, capability: tuple[int, int]) -> None:
    site(whole)
    RUNTIME.capability = capability
    report = musa.probe(refresh=True)
    assert f"capability {capability} is below (3, 1)" in str(report.device)
    assert device.get_device_capability("musa:0") == capability
    assert not device.is_musa()
    assert not fa3._is_fa3_supported("musa:0")


def test_support_is_remembered_for_each_device_alone(site) -> None:
    site(whole)
    assert fa3._is_fa3_supported("musa:0")
    assert not fa3._is_fa3_supported("musa:7")
    assert fa3._is_fa3_supported("cpu")


def test_no_device_and_a_failing_runtime_are_reasons(site) -> None:
    site(whole)
    RUNTIME.devices = 0
    assert "no device is visible" in musa.probe(refresh=True).device.reason
    RUNTIME.devices, RUNTIME.failure = 2, RuntimeError("cannot re-initialize in a forked process")
    report = musa.probe(refresh=True)
    assert "the runtime failed with RuntimeError: cannot re-initialize" in report.device.reason
    assert device.get_device_capability("musa:0") is None


def test_torch_musa_that_fails_at_import_is_reported(site) -> None:
    report = site(lambda folder: write_package(folder, "torch_musa", __init__="raise OSError('libmusart.so')"))
    assert "import failed with OSError: libmusart.so" in report.torch_musa.reason


def test_a_torch_musa_without_musa_is_reported(site) -> None:
    report = site(lambda folder: write_package(folder, "torch_musa", __init__="__version__ = '2.7.0'"))
    assert "torch.version.musa is not set" in report.torch_musa.reason


def test_the_unrelated_mate_is_named(site) -> None:
    """PyPI's `mate` 0.2.0 has the very version that engines ask for."""

    def write(folder: Path) -> None:
        write_package(folder, "mate", matchers="")
        write_distribution(folder, "mate", "0.2.0")

    report = site(write)
    assert not report.mate.usable
    assert "the unrelated one (unittest matchers)" in str(report.mate)
    with pytest.raises(NotImplementedError, match="unittest matchers"):
        musa_mate.load()


def test_versions_are_compared_as_numbers(site) -> None:
    assert musa.release("12.10") > musa.release("12.3")
    assert musa.release("9.2") < musa.release("12.3")
    assert musa.release("0.2.2+mu436") == (0, 2, 2)

    def write(folder: Path) -> None:
        write_package(folder, "mate", mha_interface="")
        write_distribution(folder, "mate", "0.10.0")

    assert "its call contract is known for 0.1.3, 0.2.0, 0.2.1, 0.2.2 only" in site(write).mate.reason


def test_dao_ailabs_flash_attn_3_is_not_mates_wrapper(site) -> None:
    def write(folder: Path) -> None:
        whole(folder)
        write_package(folder, "flash_attn_3", _C="", interface="")

    assert "is Dao-AILab's flash-attention, not MATE's wrapper" in site(write).wrapper.reason


def test_a_foreign_flash_attn_interface_is_named(site) -> None:
    def write(folder: Path) -> None:
        write_package(folder, "mate", mha_interface="")
        write_distribution(folder, "mate", "0.2.2")
        (folder / "flash_attn_interface.py").write_text("")

    assert "flash_attn_interface at" in site(write).wrapper.reason


def test_flash_attention_2_is_not_mates_old_wrapper(site) -> None:
    def write(folder: Path) -> None:
        write_package(folder, "mate", mha_interface="")
        write_distribution(folder, "mate", "0.1.3")
        write_package(folder, "flash_attn", flash_attn_interface="")

    assert "is Dao-AILab's flash-attention" in site(write).wrapper.reason


def test_mates_runtime_error_at_import_is_our_error(site) -> None:
    def write(folder: Path) -> None:
        whole(folder)
        text = "raise RuntimeError('no MUSA device to take the architecture from')"
        write_package(folder, "flash_attn_3", interface=text)

    site(write)
    with pytest.raises(NotImplementedError, match=r"failed with RuntimeError: no MUSA device.*ARCH_LIST=3\.1"):
        musa_mate.load()


def test_pypis_tvm_ffi_is_not_the_fork(site) -> None:
    def write(folder: Path) -> None:
        whole(folder)
        for info in folder.glob("apache_tvm_ffi*"):
            (info / "METADATA").write_text("Metadata-Version: 2.1\nName: apache-tvm-ffi\nVersion: 0.1.15\n")
            info.rename(folder / "apache_tvm_ffi-0.1.15.dist-info")

    report = site(write)
    assert "MATE needs MooreThreads' fork" in str(report.tvm_ffi)
    assert report.usable
    assert not fa3._is_fa3_supported("musa:0")


def test_torchada_is_imported_only_with_a_device(site) -> None:
    """Without one its import changes the environment, and its is_patched() says True."""

    def write(folder: Path) -> None:
        text = "import os\nos.environ['TORCHADA_WAS_HERE'] = '1'\ndef is_patched():\n    return True\n"
        write_package(folder, "torchada", __init__=text)

    report = site(write)
    assert "not imported: there is no usable device" in report.torchada.reason
    assert "torchada" not in sys.modules
    assert not device.is_musa()


def test_torchada_that_fails_at_import_is_reported_and_nothing_else_stops(site) -> None:
    def write(folder: Path) -> None:
        whole(folder)
        write_package(folder, "torchada", __init__="raise RuntimeError('No MUSA device')")

    report = site(write)
    assert "import failed with RuntimeError: No MUSA device" in report.torchada.reason
    assert fa3._is_fa3_supported("musa:0")


def test_a_stub_module_without_a_spec_is_no_accident(site) -> None:
    """torchada leaves such a module behind: find_spec of it raises ValueError."""
    import types

    sys.modules["torch_musa"] = types.ModuleType("torch_musa")
    try:
        assert not musa.probe(refresh=True).torch_musa.usable
    finally:
        del sys.modules["torch_musa"]


def test_toolkit_and_compiler_are_found_and_old_ones_refused(site, tmp_path: Path, monkeypatch) -> None:
    root = tmp_path / "toolkit"
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "mcc").write_text("#!/bin/sh\n")
    (root / "bin" / "mcc").chmod(0o755)
    (root / "version.json").write_text(json.dumps({"musa": {"version": "4.2.0"}}))
    monkeypatch.setenv("MUSA_HOME", str(root))
    report = site(whole)
    assert report.mcc.version == str(root / "bin" / "mcc")
    assert "MATE needs 4.3.6 or newer" in report.toolkit.reason
    (root / "version.json").write_text(json.dumps({"musa": {"version": "5.0.1"}}))
    assert musa.probe(refresh=True).toolkit.version == "5.0.1"


def test_chunks_need_a_new_toolkit(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MUSA_HOME", str(tmp_path))
    (tmp_path / "version.json").write_text('{"musa": "5.0.9"}')
    with machine(tmp_path / "site", CPU):
        q = to_musa(torch.zeros(1, 8, 2, 64).bfloat16())
        with pytest.raises(NotImplementedError, match=r"attention_chunk: MATE needs the MUSA toolkit 5\.1\.0"):
            fa3.flash_attn_func(q, q, q, causal=True, attention_chunk=4)
        (tmp_path / "version.json").write_text('{"musa": "5.1.0"}')
        musa.probe(refresh=True)
        from jit_kernel.fa3 import musa as implementation

        implementation._reasons.clear()
        assert fa3.flash_attn_func(q, q, q, causal=True, attention_chunk=4).shape == q.shape


def test_probing_imports_no_torch() -> None:
    code = "import sys; from jit_kernel import moore_threads; moore_threads.probe(); print('torch' in sys.modules)"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.strip() == "False"
