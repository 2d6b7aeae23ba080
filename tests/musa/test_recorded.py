"""The double of MATE agrees with MATE's recorded answers, and none of our own calls lands on an answer that raises."""

from __future__ import annotations

import collections
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import recorded_calls
from tests.support.mate_double import Mate

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
    """What MATE answered with an assert we serve only where it is mended; what it answered wrongly we refuse.

    Descales are of 16-bit keys here, beside which they are not read: they go to no kernel.
    """
    mended = collections.Counter()
    for record, outcome in zip(CALLS, outcomes, strict=True):
        arguments = record["kwargs"]
        d = arguments["q"]["tensor"][-1]
        if d > 512 or arguments.get("only_qv"):
            assert outcome != "served", record
        if "raises" in record and outcome == "served":
            reasons = {
                "sinks": arguments.get("sinks") is not None,
                "window": arguments.get("window_size") == [-1, 0],
                "out": arguments.get("out") is not None,
                "only_qv=False": arguments.get("only_qv") is False,
                "int cache_seqlens": isinstance(arguments.get("cache_seqlens"), int),
                "64-bit indices": any(isinstance(x, dict) and x.get("dtype") == "int64" for x in arguments.values()),
                "maximum": arguments.get("max_seqlen_q") is None,
                # recorded_calls puts metadata of our own making in the place of a buffer that is too short
                "metadata": arguments.get("scheduler_metadata") is not None,
            }
            assert any(reasons.values()), record
            mended.update(name for name, holds in reasons.items() if holds)
    assert mended["sinks"]
    assert mended["window"]
    assert mended["out"]
    assert mended["int cache_seqlens"]
    assert mended["64-bit indices"]


def _dtype(arguments: dict[str, Any], name: str) -> str | None:
    tensor = arguments.get(name)
    return None if tensor is None else tensor["dtype"]


def test_what_mate_serves_and_honours_we_serve(outcomes: list[str]) -> None:
    """Refusals of calls that MATE answered have a reason that we name, and nothing else is refused."""
    for record, outcome in zip(CALLS, outcomes, strict=True):
        if "raises" in record or outcome == "served":
            continue
        a, d = record["kwargs"], record["kwargs"]["q"]["tensor"][-1]
        mla_extras = ("softcap", "window_size", "attention_chunk", "sinks", "k", "cache_leftpad", "cache_batch_idx")
        reasons = {
            "rounded down": d > 512,
            "splits beyond the combine": a.get("num_splits", 0) > 128,
            "sinks in another dtype than q's": a.get("sinks") is not None,
            "strided last dimension": any(isinstance(x, dict) and x.get("contiguous") is False for x in a.values()),
            "ignored by MLA": a.get("qv") is not None and any(a.get(name) for name in mla_extras),
            "int64 that MATE's prebuilt path does not look at": _dtype(a, "cu_seqlens_q") == "int64",
            "out of another dtype than q's": _dtype(a, "out") not in (None, a["q"]["dtype"]),
            "MLA without pages of 64": a.get("qv") is not None and a["k_cache"]["tensor"][1] != 64,
        }
        assert any(reasons.values()), (outcome, record)


def test_outcomes_are_the_same_without_asserts(outcomes: list[str]) -> None:
    """Under python -O MATE's checks are gone; ours are no asserts."""
    made = subprocess.run(
        [sys.executable, "-O", "-m", "tests.support.recorded_calls"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**__import__("os").environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert made.returncode == 0, made.stderr[-2000:]
    answer = json.loads(made.stdout.splitlines()[-1])
    assert answer["optimised"] == 1
    assert answer["outcomes"] == outcomes


def test_a_failed_assert_of_mates_reaches_the_user_as_our_error() -> None:
    from jit_kernel.fa3.musa import mate as musa_mate

    def asserting(**arguments: object) -> Tensor:
        raise AssertionError("headdim")

    mate = musa_mate.Mate((0, 2, 2), asserting, asserting, asserting)
    with pytest.raises(RuntimeError, match=r"MATE 0\.2\.2 refused the call with an assertion: headdim"):
        musa_mate.call(mate, mate.flash_attn_varlen_func, torch.device("cpu"), {})
