"""The fuzzer finds what it looks for: a fault that was planted in a public function is reported, by its kind."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C import _functorch as functorch

import jit_kernel
from tests.fuzz import answers, bases, calls, drawing, meaning, oracle, workers
from tests.fuzz.kinds import KINDS
from tests.support import case_tensors, cases
from tests.support.cases import DENSE, FP8, KVCACHE

Function = Callable[..., Any]
REAL: dict[str, Function] = {name: getattr(jit_kernel, name) for name in (DENSE, KVCACHE, "merge_state")}


def a_call(wanted: Callable[[drawing.Drawn], bool]) -> drawing.Drawn:
    """The first call of seed 0 that has something, left unchanged."""
    for index in range(5000):
        drawn = drawing.draw(0, index, keep=())
        if wanted(drawn):
            return dataclasses.replace(drawn, warm=False, threads=1)
    raise AssertionError("no such call was drawn")


def a_dense_call() -> drawing.Drawn:
    def suits(drawn: drawing.Drawn) -> bool:
        q = drawn.arguments.get("q")
        plain = drawn.function == DENSE and q.numel() > 100 and q.dtype != FP8
        return bool(plain and "out" in drawn.arguments and drawn.arguments["k"].shape[1] > 1)

    return a_call(suits)


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[Function, str], None]:
    """Put a function in the place of a public one."""
    return lambda function, name=DENSE: monkeypatch.setattr(jit_kernel, name, function)


def alone(drawn: drawing.Drawn, limit: float = 600) -> workers.Report:
    def make(_: int) -> tuple[str, str, dict[str, Any]]:
        verdict = oracle.judge(drawn)
        return verdict.what, verdict.text, {}

    return workers.alone(make, drawn.index, limit=limit)


def test_a_right_call_is_answered():
    assert oracle.judge(a_dense_call()).what == oracle.ANSWERED


def test_calls_mean_what_their_plans_say():
    """The reading of arguments, written from the contract, agrees with the generator that laid them out."""
    for seed in range(150):
        case = case_tensors.build(cases.draw(seed, bases.SPACE))
        read = meaning.attention(case.plan.function, case.arguments)
        assert read.problem.softmax_scale == case.problem.softmax_scale
        assert (read.out_rows, read.lse_rows) == (case.out_rows, case.lse_rows), seed
        for ours, theirs in zip(read.problem.sequences, case.problem.sequences, strict=True):
            for name in ("q", "k", "v", "qv", "q_descale", "k_descale", "v_descale"):
                a, b = getattr(ours, name), getattr(theirs, name)
                assert (a is None) == (b is None) and (a is None or answers.same_bits(a, b)), (seed, name)
        assert not any(bool(taint.any()) for taint in read.tainted)


def test_a_crash(plant):
    plant(lambda **_: ctypes.string_at(0))
    report = alone(a_dense_call())
    assert (report.what, report.text) == ("crash", "SIGSEGV")


def test_an_exit(plant):
    plant(lambda **_: os._exit(3))
    assert alone(a_dense_call()).what == "crash"


def test_a_hang(plant):
    plant(lambda **_: signal.pause())
    assert alone(a_dense_call(), limit=0.5).what == "hang"


def test_a_run_goes_on_behind_a_crash_and_names_its_call(plant):
    def crashes(**given: Any) -> Any:
        return ctypes.string_at(0) if given.get("softcap") == 50.0 else REAL[DENSE](**given)

    plant(crashes)
    said: list[str] = []
    options = calls.Options(seed=3, without=[*KINDS, *drawing.SURROUNDINGS, "make_fx", "jit trace"], most_threads=1)
    total = calls.run(options, calls=30, say=said.append)
    assert total.counts["crash"] > 0
    assert sum(total.counts[what] for what in (oracle.ANSWERED, oracle.REFUSED, *oracle.FAULTS)) == 30
    first = next(reports[0] for key, reports in total.faults.items() if key[0] == "crash")
    assert any(line.startswith(f"crash 3:{first.index} ") for line in said)
    assert workers.alone(calls.maker(options), first.index, limit=600).what == "crash"


def raising(error: Exception) -> Function:
    def function(**_: Any) -> None:
        raise error

    return function


@pytest.mark.parametrize(
    "error",
    [
        ValueError("the shapes do not fit"),
        RuntimeError("q is wrong"),
        KeyError("q"),
        IndexError("q"),
        TypeError(".tolist() is not supported for tensor subclasses; q"),
        ValueError("q INTERNAL ASSERT FAILED at TensorImpl.h:1, please report a bug to PyTorch"),
        TypeError("argument 28 is not a number; softcap"),
        AssertionError("q"),
    ],
    ids=repr,
)
def test_an_error_that_does_not_help(plant, error):
    plant(raising(error))
    assert oracle.judge(a_dense_call()).what == "unnamed"


def test_a_valid_call_that_is_refused(plant):
    plant(raising(ValueError("q has shape (1,); it must be another")))
    drawn = a_dense_call()
    assert oracle.judge(drawn).what == "refused"
    assert oracle.judge(dataclasses.replace(drawn, must_serve=False)).what == oracle.REFUSED


@pytest.mark.parametrize("name", ["q", "out"])
def test_memory_that_is_written_before_an_error(plant, name):
    def writes(**given: Any) -> None:
        given[name].view(-1)[0] = 3.0 if given[name].is_contiguous() else given[name].zero_()
        raise ValueError("k is too short")

    plant(writes)
    assert oracle.judge(dataclasses.replace(a_dense_call(), must_serve=False)).what == "written"


def broken(change: Callable[[Any, dict[str, Any]], Any]) -> Function:
    def function(**given: Any) -> Any:
        return change(REAL[DENSE](**given), given)

    return function


def _of_out(result: Any) -> Tensor:
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


def _one_row(result: Any, given: dict[str, Any]) -> Any:
    _of_out(result)[0, -1, -1] *= 1.1
    return result


def _behind(result: Any, given: dict[str, Any]) -> Any:
    memory = torch.empty(0, dtype=torch.uint8).set_(given["out"].untyped_storage())
    memory[-3] = 1
    return result


def _another_out(result: Any, given: dict[str, Any]) -> Any:
    return (_of_out(result).clone(), result[1]) if isinstance(result, tuple) else result.clone()


def _an_input(result: Any, given: dict[str, Any]) -> Any:
    given["k"][0, 0, 0, 0] += 1
    return result


CHANGES = [
    _one_row,
    _behind,
    _another_out,
    _an_input,
    lambda result, given: None,
    lambda result, given: (_of_out(result), *given["q"].unbind()),
    lambda result, given: _of_out(result).double(),
    lambda result, given: _of_out(result)[:, :1],
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_wrong_answer(plant, change):
    plant(broken(change))
    assert oracle.judge(a_dense_call()).what == "wrong"


def test_a_call_without_meaning_that_is_answered(plant):
    drawn = a_dense_call()
    real = drawn.arguments | {}
    plant(lambda **_: REAL[DENSE](**real))
    for change in ({"num_splits": -1}, {"softcap": -1.0}, {"k": real["v"][:, :, :, :1]}, {"causal": "yes"}):
        changed = dataclasses.replace(drawn, arguments=real | change, must_serve=False)
        assert oracle.judge(changed).what == "wrong", change


def _as(drawn: drawing.Drawn, name: str, kind: str) -> drawing.Drawn:
    return dataclasses.replace(drawn, kinds=[(name, KINDS[kind])])


def without(name: str, change: Callable[[Tensor], Tensor]) -> Function:
    """The function as it would be if it did not see what a tensor is."""
    return lambda **given: REAL[DENSE](**given | {name: change(given[name])})


def test_a_sign_that_is_ignored(plant):
    drawn = a_dense_call()
    plant(without("v", lambda v: torch.empty(0, dtype=v.dtype).set_(v.untyped_storage(), v.storage_offset(), v.shape,
                                                                    v.stride())))  # fmt: skip
    assert oracle.judge(_as(drawn, "v", "neg view")).what == "wrong"


def test_a_derivative_that_is_dropped(plant):
    plant(without("q", lambda q: torch.empty_like(q).copy_(q).detach()))
    assert oracle.judge(_as(a_dense_call(), "q", "requires grad")).what == "wrong"
    assert oracle.judge(_as(a_dense_call(), "q", "dual")).what == "wrong"


def test_a_tensor_that_torch_func_differentiates_is_one(plant):
    """Not a plain leaf, which is served: the call is refused, and was counted as wrong where it was not."""
    drawn = _as(a_dense_call(), "v", "of grad")
    assert oracle.judge(drawn).what == oracle.REFUSED and not drawn.arguments["v"].requires_grad
    plant(without("v", lambda v: functorch.get_unwrapped(v)))
    assert oracle.judge(drawn).what == "wrong"


def test_an_append_that_goes_elsewhere(plant):
    drawn = a_call(lambda it: it.function == KVCACHE and "k" in it.arguments and it.arguments["k"].numel() > 0)

    def appends(**given: Any) -> Any:
        result = REAL[KVCACHE](**given)
        given["v_cache"].view(torch.uint8).bitwise_xor_(1)
        return result

    assert oracle.judge(drawn).what == oracle.ANSWERED
    plant(appends, KVCACHE)
    assert oracle.judge(drawn).what == "wrong"


def test_a_state_of_torch_that_is_left_changed(plant):
    plant(lambda **given: (torch.use_deterministic_algorithms(True), REAL[DENSE](**given))[1])
    assert alone(a_dense_call()).what == "left"


def test_a_merge_with_the_wrong_weights(plant):
    drawn = a_call(lambda it: it.function == "merge_state" and bool(it.arguments["lse_a"].isfinite().all())
                   and it.arguments["out_a"].numel() > 8)  # fmt: skip
    assert oracle.judge(drawn).what == oracle.ANSWERED
    plant(lambda **given: REAL["merge_state"](**given | {"lse_a": given["lse_a"] + 1}), "merge_state")
    assert oracle.judge(drawn).what == "wrong"
