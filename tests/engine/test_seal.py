"""A server that proves it is ready: profiles, seal, check, preload, and what is told of each compilation and load."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from jit_kernel import config, jit, ready, warmup
from jit_kernel.device import Target, cpu_target
from jit_kernel.engine import events, record, seal
from jit_kernel.fa3 import dispatch
from tests.support import children, tiny
from tests.support.compilers import compilations, counting_compiler


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str | None]:
    return {"JIT_KERNEL_CACHE_DIR": str(tmp_path / "store")}


def sealed_calls() -> dict[str, Any]:
    """Call one kernel, seal, call it again and another, whose error is answered."""
    right = tiny.call(2)["right"]
    jit.seal()
    told: list[jit.Event] = []
    end = jit.on_event(told.append)
    right &= tiny.call(2)["right"]
    try:
        tiny.call(3)
    except jit.SealedError as error:
        end()
        return {"right": right, "error": str(error), "events": [event.action for event in told], "stats": jit.stats()}
    raise AssertionError("it was compiled after seal()")


def test_a_sealed_process_compiles_nothing_and_says_what_to_run(tmp_path, environment):
    compiler, starts = counting_compiler(tmp_path / "bin", version="one")
    outcome = children.run(sealed_calls, environment={**environment, "CXX": compiler}, scratch=tmp_path)
    assert outcome.error == "" and outcome.result["right"] and compilations(starts) == 1, outcome
    assert outcome.result["events"] == ["refused"] and outcome.result["stats"]["refused"] == 1
    error = outcome.result["error"]
    assert re.match(rf"load, called at {re.escape(tiny.__file__)}:\d+, needs tiny \(factor=3\) for cpu:", error), error
    assert f"python -m jit_kernel.warmup --target {cpu_target()} --select factor=3" in error
    assert len(tiny.entries(tmp_path / "store")) == 1


def test_a_sealed_process_takes_another_compilers_entry(tmp_path, environment):
    """And starts no compiler to learn that it is another's."""
    first, _ = counting_compiler(tmp_path / "first", version="one")
    second, starts = counting_compiler(tmp_path / "second", version="two")
    assert children.run(tiny.call, environment={**environment, "CXX": first}, scratch=tmp_path).result["compiled"] == 1
    sealed = {**environment, "CXX": second, "JIT_KERNEL_SEALED": "1"}
    outcome = children.run(tiny.call, environment=sealed, scratch=tmp_path)
    assert outcome.error == "" and outcome.result["compiled"] == 0 and starts.read_text() == "", outcome
    outcome = children.run(tiny.call, environment={**environment, "CXX": second}, scratch=tmp_path)
    assert outcome.result["compiled"] == 1


def test_a_sealed_process_does_not_mend_what_is_damaged(tmp_path, environment):
    children.run(tiny.call, environment=environment, scratch=tmp_path)
    (entry,) = tiny.entries(tmp_path / "store")
    os.truncate(entry / "kernel.so", 100)
    outcome = children.run(tiny.call, environment={**environment, "JIT_KERNEL_SEALED": "1"}, scratch=tmp_path)
    assert outcome.error == "SealedError" and "kernel.so has 100 bytes" in outcome.message
    assert tiny.entries(tmp_path / "store") == [entry]


@pytest.mark.parametrize("name", ["cpu:x86-64-v4+avx512vnni", "cpu:aarch64", "cuda:sm_90a", "cuda:sm_80"])
def test_the_command_of_a_sealed_error_warms_every_variant(name):
    """What the error says to run compiles the kernel that it was raised for, for each kernel of a warm-up."""
    target = Target.parse(name)
    specs = dispatch.select_variants(target, {})
    assert specs
    for spec in specs[:: max(1, len(specs) // 40)]:
        words = shlex.split(seal.warmup_command(spec, target))
        assert words[:5] == ["python", "-m", "jit_kernel.warmup", "--target", name]
        select = dict(word.split("=", 1) for word in words[6:])
        assert spec in warmup.specs_of(target, select), words


def two_calls() -> list[bool]:
    return [tiny.call(2)["right"], tiny.call(3)["right"], tiny.call(2)["right"]]


def test_a_profile_holds_each_kernel_once_and_warms_just_those(tmp_path, environment):
    """Two processes write it; another machine's folder is warmed from it, checked, and preloaded."""
    profile = tmp_path / "profile"
    for work in (two_calls, tiny.both):
        outcome = children.run(work, environment={**environment, "JIT_KERNEL_RECORD": str(profile)}, scratch=tmp_path)
        assert outcome.error == "", outcome
    kernels = record.read(profile)
    assert kernels == [(tiny.spec(2), cpu_target()), (tiny.spec(3), cpu_target())]
    assert len(profile.read_text().splitlines()) == 2
    other: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(tmp_path / "other")}
    checked = children.run(check, str(profile), environment=other, scratch=tmp_path)
    assert checked.result[0] == 1 and checked.result[1] == 0, checked
    warmed = children.run(warm, str(profile), environment=other, scratch=tmp_path)
    assert warmed.result == 0 and len(tiny.entries(tmp_path / "other")) == 2, warmed
    checked = children.run(check, str(profile), environment=other, scratch=tmp_path)
    assert checked.result == [0, 0], checked
    sealed = {**other, "JIT_KERNEL_SEALED": "1"}
    outcome = children.run(preload_and_call, str(profile), environment=sealed, scratch=tmp_path)
    assert outcome.error == "" and outcome.result == {"loaded": 2, "compiled": 0, "skipped": 0, "after": 0}, outcome


def warm(profile: str) -> int:
    return warmup.main(["--profile", profile])


def check(profile: str) -> list[int]:
    """The status of `warmup --check`, and how many were compiled."""
    return [warmup.main(["--check", "--profile", profile]), tiny.compiled()]


def preload_and_call(profile: str) -> dict[str, int]:
    """What preload() answers, and how many events the calls behind it made."""
    done = {name: value for name, value in ready.preload(profile).items() if name != "seconds"}
    known = len(jit.events())
    assert all(two_calls())
    return {**done, "after": len(jit.events()) - known}


def test_profiles_that_are_refused(tmp_path):
    profile = tmp_path / "profile"
    with pytest.raises(record.ownership.CacheError, match=r"profile .* cannot be read: No such file"):
        ready.kernels_of(profile)
    profile.write_text("")
    with pytest.raises(record.ProfileError, match="is empty"):
        ready.kernels_of(profile)
    line = {"kernel": "../up", "route": "host", "unit": "", "variant": [], "flags": [], "target": "cpu:x86-64"}
    for change, words in (
        ({}, "kernel is '../up'"),
        ({"kernel": "tiny", "route": "shell"}, "route is 'shell'"),
        ({"kernel": "tiny", "target": "tpu:v5"}, "target is 'tpu:v5'"),
        ({"kernel": "tiny", "variant": [["a", [1]]]}, "variant has"),
        ({"kernel": 7}, "kernel is of type int"),
    ):
        profile.write_text(json.dumps({**line, **change}) + "\n")
        with pytest.raises(record.ProfileError, match=re.escape(words)) as caught:
            ready.kernels_of(profile)
        assert f"{profile}, line 1 is" in str(caught.value)
    profile.write_text(json.dumps({**line, "kernel": "tiny"}) + "\n")
    assert len(ready.kernels_of(profile)) == 1
    with pytest.raises(ValueError, match=r"target is cuda:sm_90a; profile .* has cpu:x86-64"):
        ready.kernels_of(profile, [Target("cuda", "sm_90a")])
    profile.chmod(0o666)
    with pytest.raises(record.ownership.CacheError, match=r"profile .* is refused: .* can be written by other users"):
        ready.kernels_of(profile)


def test_a_profile_is_bounded_and_one_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(record, "_MOST_KERNELS", 3)
    for name, words in (("profile", "holds 3 kernels; no more are added"), ("none/profile", "cannot be written")):
        monkeypatch.setenv("JIT_KERNEL_RECORD", str(tmp_path / name))
        config.reload()
        record._noted.clear()
        with caplog.at_level(logging.WARNING, "jit_kernel"):
            for factor in range(9):
                record.note(tiny.spec(factor), cpu_target())
        assert words in caplog.text
    assert len((tmp_path / "profile").read_text().splitlines()) == 3
    monkeypatch.undo()
    config.reload()


def test_a_kernel_of_the_package_is_taken_as_it_is_now(tmp_path):
    """A profile of an older version names a variant; its unit is the present one, of what nobody lists its own."""
    target = Target("cpu", "x86-64-v3")
    (now, *_) = dispatch.select_variants(target, {"dtype": "fp32", "function": "forward"})
    lines = [{**record._plain(now), "unit": "old", "target": str(target)}]
    lines.append({**record._plain(tiny.spec(5)), "target": str(target)})
    (tmp_path / "profile").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert ready.kernels_of(tmp_path / "profile") == [(now, target), (tiny.spec(5), target)]


def test_hooks_and_the_log(caplog):
    """A hook that raises is logged and does not keep the others from being told."""
    told: list[str] = []

    def bad(event: jit.Event) -> None:
        raise RuntimeError("the monitor is down")

    ends = [jit.on_event(bad), jit.on_event(lambda event: told.append(f"{event.action} {event.key}"))]
    with caplog.at_level(logging.INFO, "jit_kernel"):
        events.post(jit.Event(tiny.spec(2), cpu_target(), "loaded", 0.002, key="abc", layer="/layer"))
    for end in (*ends, *ends):
        end()
    events.post(jit.Event(tiny.spec(2), cpu_target(), "loaded", 0.002, key="def"))
    assert told == ["loaded abc"] and "the monitor is down" in caplog.text
    line = f"hit tiny (factor=2) for {cpu_target()} abc, loaded from /layer in 2.0 ms"
    assert line in [message.getMessage() for message in caplog.records]
    with pytest.raises(TypeError, match="hook is of type int"):
        jit.on_event(3)  # type: ignore[arg-type]
    del events.recorded[-2:]
