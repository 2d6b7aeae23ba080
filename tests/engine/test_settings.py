"""Small values that everything else rests on: targets, settings, the environment of others, warnings."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from jit_kernel import config
from jit_kernel.device import Target, cpu_target
from jit_kernel.engine import progress


@pytest.mark.parametrize(
    "text",
    ["cpu:x86-64", "cpu:x86-64-v3", "cpu:x86-64-v4+amxbf16+avx512bf16", "cpu:aarch64", "cuda:sm_90a", "musa:mp_31"],
)
def test_targets_print_what_they_parse(text):
    assert str(Target.parse(text)) == text


def test_targets_that_are_aliases():
    assert Target.parse("cpu:native") == cpu_target()
    assert Target.parse("cpu:x86-64-v4+avx512bf16+amxbf16").features == ("amxbf16", "avx512bf16")
    assert Target.parse("cpu:generic").features == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sm_90a", "vendor:architecture"),
        ("tpu:v5", "vendor:architecture"),
        ("cuda:90", "'90' is no cuda architecture"),
        ("cpu:x86-64-v4+amx", "'amx' must be one of"),
        ("cuda:sm_90+x", "a cuda target has no features"),
    ],
)
def test_targets_that_are_none(text, words):
    with pytest.raises(ValueError, match="target is") as caught:
        Target.parse(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("JIT_KERNEL_STRICT", "perhaps"),
        ("JIT_KERNEL_IMPLEMENTATION", "fastest"),
        ("JIT_KERNEL_CUDA_COMPILER", "icc"),
        ("JIT_KERNEL_CACHE_DIR", "relative/folder"),
        ("JIT_KERNEL_LOG", "loud"),
        ("JIT_KERNEL_PLUGINS", "vllm,tgi"),
        ("JIT_KERNEL_COUNTERS", "counts.json"),
        ("JIT_KERNEL_CACHE_LAYERS", "relative/folder"),
        ("JIT_KERNEL_CACHE_LIMIT", "much"),
        ("JIT_KERNEL_RECORD", "profile"),
        ("JIT_KERNEL_SEALED", "perhaps"),
        ("JIT_KERNEL_PACK_KEY", "secret"),
    ],
)
def test_a_bad_setting_names_itself(monkeypatch, key, value):
    monkeypatch.setenv(key, value)
    config.reload()
    with pytest.raises(config.ConfigError, match=f"{key} is '{value}'; it must be"):
        config.settings()
    monkeypatch.undo()
    config.reload()


def test_a_bad_key_is_not_shown(monkeypatch):
    monkeypatch.setenv("JIT_KERNEL_PACK_KEY", "hex:abcd")
    config.reload()
    with pytest.raises(config.ConfigError, match="64 hexadecimal digits") as caught:
        config.settings()
    assert "abcd" not in str(caught.value)
    monkeypatch.undo()
    config.reload()


@pytest.mark.parametrize(
    ("value", "names"), [("", ()), ("vllm", ("vllm",)), (" sglang, vllm ,", ("sglang", "vllm"))], ids=str
)
def test_plugins_are_a_list_of_names(monkeypatch, value, names):
    monkeypatch.setenv("JIT_KERNEL_PLUGINS", value)
    config.reload()
    assert config.plugins() == names
    monkeypatch.undo()
    config.reload()


def test_the_variables_of_others_are_read_at_each_question(monkeypatch):
    monkeypatch.setenv("CXX", " clang++ -v ")
    assert config.host_compiler() == "clang++ -v"
    monkeypatch.delenv("CXX")
    assert config.host_compiler() == ""
    monkeypatch.setenv("MUSA_PATH", "/second")
    assert config.musa_toolkit() == Path("/second")
    monkeypatch.setenv("MUSA_HOME", "/first")
    assert config.musa_toolkit() == Path("/first")
    monkeypatch.setenv("JIT_KERNEL_LOG", "loud")
    assert config.given_settings()["JIT_KERNEL_LOG"] == "loud"


def test_a_programs_environment_is_ours_with_changes(monkeypatch):
    monkeypatch.setenv("KEPT", "1")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    child = config.child_environment(without=lambda name: name.startswith("TRITON_"), LC_ALL="C")
    assert child["KEPT"] == "1" and child["LC_ALL"] == "C" and "TRITON_INTERPRET" not in child


def test_mates_architectures_are_the_users_if_named(monkeypatch):
    monkeypatch.setenv("MATE_MUSA_ARCH_LIST", "2.2")
    config.set_mate_architectures("3.1")
    assert config.child_environment()["MATE_MUSA_ARCH_LIST"] == "2.2"


def test_a_warning_is_logged_once_for_each_key(caplog):
    with caplog.at_level(logging.WARNING, "jit_kernel"):
        for text, key in (("a", None), ("a", None), ("b", None), ("c", (1, 2)), ("d", (1, 2)), ("c", (1, 3))):
            progress.warn_once(text, key)
    assert [record.getMessage() for record in caplog.records] == ["a", "b", "c", "c"]
