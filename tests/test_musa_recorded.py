"""The double of MATE agrees with MATE's recorded answers, and none of our own calls lands on an answer that raises."""

from __future__ import annotations

import collections
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import recorded_calls
import torch
from mate_double import Mate
from torch import Tensor

CALLS = recorded_calls.load()


def answer_of(record: dict[str, Any]) -> dict[str, Any]:
    """What the double answers, in the form of the record."""
    mate = Mate("0.2.2")
    arguments = {name: recorded_calls.decoded(value) for name, value in record["kwargs"].items()}
    try:
        result = mate.functions[record["function"]](**arguments)
    except Exception as error:
        return {"raises": type(error).__name__}
    parts = result if isinstance(result, tuple) else (result,)
    call = mate.calls[-1]
    answer: dict[str, Any] = {
        "result": {
            "kind": "tuple" if isinstance(result, tuple) else "tensor",
            "shapes": [list(part.shape) for part in parts],
            "dtypes": [str(part.dtype).removeprefix("torch.") for part in parts],
        },
        "path": call.path,
    }
    return answer | ({"compiled_for": call.compiled_for} if call.path == "jit" else {})


def test_the_double_gives_every_recorded_answer() -> None:
    assert len(CALLS) == 800
    different = []
    for number, record in enumerate(CALLS):
        wanted = {name: value for name, value in record.items() if name not in ("function", "kwargs")}
        found = answer_of(record)
        if found != wanted:
            different.append((number, wanted, found))
    assert not different, f"{len(different)} of 800 differ, first {different[0]}"


@pytest.fixture(scope="module")
def outcomes() -> list[str]:
    return recorded_calls.outcomes(asserts=True)


def test_no_call_of_ours_makes_mate_raise(outcomes: list[str], say: list[str]) -> None:
    """An assert, an AttributeError or a TypeError of MATE's would have left recorded_calls.outcomes."""
    counted = collections.Counter(outcomes)
    say.append(f"800 recorded calls through our functions: {dict(counted)}")
    assert counted["served"] >= 400
    assert counted["ValueError"] >= 50
    assert counted["NotImplementedError"] >= 50


def test_what_mate_refuses_or_misreads_is_refused_or_mended(outcomes: list[str]) -> None:
    """What MATE answered with an assert we serve only where it is mended; what it answered wrongly we refuse."""
    mended = collections.Counter()
    for record, outcome in zip(CALLS, outcomes, strict=True):
        arguments = record["kwargs"]
        d = arguments["q"]["tensor"][-1]
        if d > 512 or "k_descale" in arguments or arguments.get("only_qv"):
            assert outcome != "served", record
        if "raises" in record and outcome == "served":
            reasons = {
                "sinks": arguments.get("sinks") is not None,
                "window": arguments.get("window_size") == [-1, 0],
                "out": arguments.get("out") is not None,
                "only_qv=False": arguments.get("only_qv") is False,
                "int cache_seqlens": isinstance(arguments.get("cache_seqlens"), int),
                "maximum": arguments.get("max_seqlen_q") is None,
            }
            assert any(reasons.values()), record
            mended.update(name for name, holds in reasons.items() if holds)
    assert mended["sinks"]
    assert mended["window"]
    assert mended["out"]


def test_outcomes_are_the_same_without_asserts(outcomes: list[str]) -> None:
    """Under python -O MATE's checks are gone; ours are no asserts."""
    made = subprocess.run(
        [sys.executable, "-O", str(Path(__file__).with_name("recorded_calls.py"))],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
        env={**__import__("os").environ, "PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parent}"},
    )
    assert made.returncode == 0, made.stderr[-2000:]
    answer = json.loads(made.stdout.splitlines()[-1])
    assert answer["optimised"] == 1
    assert answer["outcomes"] == outcomes


def test_a_failed_assert_of_mates_reaches_the_user_as_our_error() -> None:
    from jit_kernel.fa3 import musa_mate

    def asserting(**arguments: object) -> Tensor:
        raise AssertionError("headdim")

    mate = musa_mate.Mate((0, 2, 2), asserting, asserting, asserting)
    with pytest.raises(RuntimeError, match=r"MATE 0\.2\.2 refused the call with an assertion: headdim"):
        musa_mate.call(mate, mate.flash_attn_varlen_func, torch.device("cpu"), {})
