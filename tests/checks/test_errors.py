"""Malformed calls: each raises the documented error, names the argument and writes nothing."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jit_kernel import config
from jit_kernel.fa3 import call as calls
from jit_kernel.fa3 import header
from jit_kernel.fa3.call import Call
from jit_kernel.fa3.checks import call as arguments
from jit_kernel.fa3.checks import combine as combine_arguments
from jit_kernel.fa3.checks import forms
from jit_kernel.fa3.checks import indices as index_checks
from jit_kernel.fa3.checks import metadata as metadata_checks
from jit_kernel.fa3.checks import shapes as attention_shapes
from jit_kernel.fa3.checks import values as argument_shapes
from jit_kernel.fa3.checks.values import GradientError
from tests.support import valid_calls
from tests.support.malformed_calls import CASES, INDEX_CASES, Malformed
from tests.support.valid_calls import FUNCTIONS

CHECKS = (argument_shapes, arguments, attention_shapes, combine_arguments, forms, index_checks, metadata_checks, header)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _every_library_is_loaded():
    """So that what checks plain calls in Python's place sees the malformed ones."""
    for base, function in FUNCTIONS.items():
        function(**base())


def _bytes(tensor: Tensor) -> bytes | None:
    """All of the memory behind a tensor, gaps included; None where there is none to read."""
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        return None
    storage = tensor.detach().untyped_storage().cpu()
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes()


def kind(error: Exception | None) -> type:
    """The class that the docstrings name: a GradientError is the NotImplementedError of inputs that require grad."""
    return NotImplementedError if type(error) is GradientError else type(error)


def _provoke(case: Malformed, call: dict) -> Exception:
    function = FUNCTIONS[case.base]
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as caught:
        function(**call)
    return caught.value


@pytest.mark.parametrize("base", FUNCTIONS, ids=lambda base: base.__name__)
def test_the_calls_are_valid_before_they_are_malformed(base):
    FUNCTIONS[base](**base())


def test_there_are_enough():
    assert len(CASES) >= 200
    assert len({str(case) for case in CASES}) >= 200


@pytest.mark.parametrize("case", CASES, ids=str)
def test_malformed_call(case):
    call = case.make()
    before = {name: _bytes(value) for name, value in call.items() if isinstance(value, Tensor)}
    error = _provoke(case, call)
    assert kind(error) is case.error, f"{type(error).__name__}: {error}"
    assert case.named in str(error)
    assert case.says in str(error)
    for name, memory in before.items():
        assert _bytes(call[name]) == memory, f"{name} was written"


def test_errors_do_not_depend_on_earlier_calls():
    """A call whose shapes passed before is still checked for its numbers, types and indices."""
    for base, function in FUNCTIONS.items():
        function(**base())
    for case in CASES:
        assert kind(_provoke(case, case.make())) is case.error, str(case)


PAGE_CASES = [case for case in INDEX_CASES if case.named.startswith("page_table[")]


def _refusal_of_pages(case: Malformed) -> ValueError:
    """The error of a page table that is not on the CPU, whose kernel looks for itself."""
    function = FUNCTIONS[case.base]
    bound = inspect.signature(function).bind(**case.make())
    bound.apply_defaults()
    call = Call(*calls.of(function.__name__, bound.arguments))
    facts = attention_shapes.check(call)
    with pytest.raises(ValueError, match="page_table") as caught:
        index_checks.check(call, dataclasses.replace(facts, on_host=False))
    return caught.value


@pytest.mark.parametrize("case", PAGE_CASES, ids=str)
def test_pages_are_refused_with_the_same_text_everywhere(case):
    assert str(_refusal_of_pages(case)) == str(_provoke(case, case.make()))


def _raises(path: Path) -> set[int]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.lineno for node in ast.walk(tree) if isinstance(node, ast.Raise)}


def test_every_message_of_the_checks_was_seen():
    seen: set[tuple[str, int]] = set()
    for error in (*(_provoke(case, case.make()) for case in CASES), *map(_refusal_of_pages, PAGE_CASES)):
        traceback = error.__traceback__
        while traceback is not None:
            seen.add((traceback.tb_frame.f_code.co_filename, traceback.tb_lineno))
            traceback = traceback.tb_next
    seen_lines = {(Path(name).name, line) for name, line in seen}
    for module in CHECKS:
        path = Path(module.__file__)
        missing = [line for line in sorted(_raises(path)) if (path.name, line) not in seen_lines]
        assert not missing, f"{path.name}: no test provokes the errors of lines {missing}"


def test_offsets_of_new_keys_mean_nothing_without_them():
    """A serving engine passes cu_seqlens_k_new with every call, as FA3 lets it."""
    call, function = valid_calls.planned(), FUNCTIONS[valid_calls.planned]
    expected = function(**call).clone()
    assert torch.equal(function(**call | {"cu_seqlens_k_new": valid_calls.ints(0, 4, 17)}), expected)


def test_attention_chunk_none_counts_as_zero():
    call, function = valid_calls.dense(), FUNCTIONS[valid_calls.dense]
    expected = function(**call).clone()
    assert torch.equal(function(**call | {"attention_chunk": None}), expected)


def test_int_cache_seqlens_is_expanded_to_the_batch():
    call = valid_calls.planned() | {"scheduler_metadata": None, "cache_seqlens": valid_calls.ints(9, 9)}
    function = FUNCTIONS[valid_calls.planned]
    expected = function(**call).clone()
    assert torch.equal(function(**call | {"cache_seqlens": 9}), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("case", INDEX_CASES, ids=str)
def test_index_tensors_of_a_gpu_are_checked_when_asked(case, monkeypatch):
    monkeypatch.setenv("JIT_KERNEL_CHECK_INDICES", "1")
    config.reload()
    try:
        call = {
            name: value.bfloat16().cuda() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in case.make().items()
        }
        call = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in call.items()}
        before = {name: _bytes(value) for name, value in call.items() if isinstance(value, Tensor)}
        error = _provoke(case, call)
        assert kind(error) is case.error
        assert case.named in str(error)
        assert case.says in str(error)
        assert all(_bytes(call[name]) == memory for name, memory in before.items())
    finally:
        monkeypatch.undo()
        config.reload()
