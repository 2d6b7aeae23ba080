"""What traces or transforms a program: the torch operator in its graph, or a refusal by name; never a constant."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import jit_kernel
from tests.support import valid_calls
from tests.support.odd_tensors import BASES, to
from tests.support.valid_calls import FUNCTIONS, Call

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
each_device = pytest.mark.parametrize("device", DEVICES)
each_base = pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _plain_calls_passed_before():
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for base in BASES:
            FUNCTIONS[base](**to(device, base()))


def tensors_of(call: Call) -> dict[str, Tensor]:
    return {name: value for name, value in call.items() if isinstance(value, Tensor)}


def program(base: Callable[[], Call], call: Call) -> Callable[..., tuple[Tensor, ...]]:
    """The call as a function of its tensors in their order; its results, and what it was given."""
    names = list(tensors_of(call))

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        found = FUNCTIONS[base](**call | dict(zip(names, tensors, strict=True)))
        return found if isinstance(found, tuple) else (found,)

    return run


def other(call: Call) -> Call:
    """The same call with other floating-point numbers."""
    torch.manual_seed(1)
    return {
        name: torch.randn(value.shape).to(value) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in call.items()
    }


def clones(call: Call) -> list[Tensor]:
    return [value.clone() for value in tensors_of(call).values()]


def serves_other_inputs(traced: Callable[..., Any], base: Callable[[], Call], call: Call) -> None:
    """The traced program gives what an eager call gives, and writes what it writes, for numbers it has not seen."""
    given = other(call)
    expected_inputs, inputs = clones(given), clones(given)
    expected = program(base, call)(*expected_inputs)
    found = traced(*inputs)
    for a, b in zip((*found, *inputs), (*expected, *expected_inputs), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def operators_in(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if str(node.target).startswith("jit_kernel.")]


@each_device
@each_base
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_fake_tensors_give_fake_results(inside, base, device):
    call = to(device, base())
    expected = program(base, call)(*clones(call))
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(value) for value in tensors_of(call).values()]
    if inside:
        with mode:
            found = program(base, call)(*fakes)
    else:
        found = program(base, call)(*fakes)
    for a, b in zip(found, expected, strict=True):
        assert isinstance(a, FakeTensor)
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def test_fake_tensors_of_a_gpu_need_none():
    with FakeTensorMode():
        q = torch.empty(2, 5, 4, 64, dtype=torch.bfloat16, device="cuda")
        found = jit_kernel.flash_attn_func(q, q, q, return_softmax_lse=True)
    assert [(each.device.type, each.shape) for each in found] == [("cuda", (2, 5, 4, 64)), ("cuda", (2, 4, 5))]


@each_device
@each_base
def test_real_tensors_under_a_fake_mode_are_refused_by_name(base, device):
    call = to(device, base())
    first = next(iter(tensors_of(call)))
    with FakeTensorMode(), pytest.raises(TypeError, match=f"^{first} is no FakeTensor"):
        FUNCTIONS[base](**call)


MODES = {"real": {}, "fake": {"tracing_mode": "fake"}, "symbolic": {"tracing_mode": "symbolic"}}
MODES["before dispatch"] = {"pre_dispatch": True}


@each_device
@each_base
@pytest.mark.parametrize("mode", MODES)
def test_make_fx_records_the_operator(mode, base, device):
    call = to(device, base())
    traced = make_fx(program(base, call), **MODES[mode])(*clones(call))
    assert len(operators_in(traced.graph)) == 1
    serves_other_inputs(traced, base, call)


@each_device
@each_base
def test_jit_trace_records_the_operator(base, device):
    """Tracing runs the call once, as it runs every operator; the program that it makes runs it each time."""
    call = to(device, base())
    example, eager = clones(call), clones(call)
    program(base, call)(*eager)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(program(base, call), tuple(example), check_trace=False)
    for a, b in zip(example, eager, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), "an append happened otherwise than once"
    assert str(traced.graph).count("jit_kernel::") == 1
    serves_other_inputs(traced, base, call)


class Module(torch.nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *tensors: Tensor) -> Any:
        return self.run(*tensors)


@each_device
@each_base
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export_records_the_operator(strict, base, device):
    call = to(device, base())
    exported = torch.export.export(Module(program(base, call)), tuple(clones(call)), strict=strict)
    assert len(operators_in(exported.graph)) == 1
    serves_other_inputs(exported.module(), base, call)


def _vmap(run: Callable[..., Any], value: Tensor) -> Any:
    return torch.vmap(run)(value[None])


def _jvp(run: Callable[..., Any], value: Tensor) -> Any:
    return torch.func.jvp(run, (value,), (torch.ones_like(value),))


def _grad(run: Callable[..., Any], value: Tensor) -> Any:
    return torch.func.grad(lambda x: run(x).float().sum())(value)


def _functionalize(run: Callable[..., Any], value: Tensor) -> Any:
    return torch.func.functionalize(run)(value)


def _traced_functionalize(run: Callable[..., Any], value: Tensor) -> Any:
    return make_fx(torch.func.functionalize(run))(value)


TRANSFORMS = {
    _vmap: "torch.vmap",
    _jvp: "torch.func",
    _grad: "(torch.func|requires grad)",
    _functionalize: "torch.func.functionalize",
    _traced_functionalize: "torch.func.functionalize",
}


def of_argument(base: Callable[[], Call], call: Call, name: str) -> Callable[[Tensor], Tensor]:
    """The call as a function of one argument."""

    def run(x: Tensor) -> Tensor:
        found = FUNCTIONS[base](**call | {name: x})
        return found[0] if isinstance(found, tuple) else found

    return run


@each_device
@each_base
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: transform.__name__[1:])
def test_transforms_are_refused_by_name(transform, base, device):
    call = to(device, base())
    for name, value in tensors_of(call).items():
        if value.is_floating_point() or transform not in (_jvp, _grad):
            with pytest.raises(NotImplementedError, match=f"^{name} .*{TRANSFORMS[transform]}"):
                transform(of_argument(base, call, name), value)


@each_device
def test_a_call_that_a_transform_does_not_reach_is_served(device):
    call = to(device, valid_calls.dense()) | {"out": None}
    expected = jit_kernel.flash_attn_func(**call)
    shift = torch.ones(3, *expected.shape, dtype=expected.dtype, device=device)

    def shifted(x: Tensor) -> Tensor:
        return x + jit_kernel.flash_attn_func(**call)

    assert torch.equal(torch.vmap(shifted)(shift), shift + expected)
    assert torch.equal(torch.func.functionalize(shifted)(shift), shift + expected)
    found, tangent = torch.func.jvp(shifted, (shift,), (shift,))
    assert torch.equal(found, shift + expected)
    assert torch.equal(tangent, shift)
    found = torch.func.grad(lambda x: (x * jit_kernel.flash_attn_func(**call)).sum())(shift[0])
    assert torch.equal(found, expected)
    # A product inside is wrapped, too, though nothing is differentiated through it.
    found = torch.func.grad(lambda x: (x * jit_kernel.flash_attn_func(**call | {"q": call["q"] * 1})).sum())(shift[0])
    assert torch.equal(found, expected)
    traced = make_fx(torch.vmap(shifted))(shift)
    assert operators_in(traced.graph) == ["jit_kernel.dense.default"]
    assert torch.equal(traced(shift * 2), shift * 2 + expected)


@each_device
@pytest.mark.parametrize("operator", ["dense", "merge_state"])
def test_operators_refuse_derivatives(operator, device):
    """Whoever calls an operator by itself loses none in silence."""
    base = valid_calls.dense if operator == "dense" else valid_calls.merge
    call = to(device, base())
    name = next(iter(call))

    def run(x: Tensor) -> Tensor:
        return getattr(torch.ops.jit_kernel, operator)(**call | {name: x, **({"out": None} if "out" in call else {})})[
            0
        ]

    plain = run(call[name])
    if operator == "dense":  # torch.func takes apart the function, not the operator
        assert run(call[name].clone().requires_grad_()).requires_grad
    else:
        with pytest.raises(NotImplementedError, match=f"^{name} requires grad"):
            run(call[name].clone().requires_grad_())
    with pytest.raises(NotImplementedError, match=f"^{name} requires grad"):
        _grad(run, call[name])
    for no_grad in (True, False):
        with torch.set_grad_enabled(not no_grad), pytest.raises(NotImplementedError, match=f"^{name} .*tangent"):
            _jvp(run, call[name])
        with torch.set_grad_enabled(not no_grad), forward_ad.dual_level():
            dual = forward_ad.make_dual(call[name], torch.ones_like(call[name]))
            with pytest.raises(NotImplementedError, match=f"^{name} .*tangent"):
                run(dual)
    assert torch.equal(run(call[name]), plain)


@each_device
@each_base
def test_functions_behind_the_mapping_refuse_to_be_traced(base, device):
    call = to(device, base())
    function = jit_kernel._load_fa3_kernels(device)[FUNCTIONS[base].__name__]
    before = clones(call)

    def run(*tensors: Tensor) -> Any:
        return function(**call | dict(zip(tensors_of(call), tensors, strict=True)))

    with pytest.raises(NotImplementedError, match="cannot be traced"):
        make_fx(run)(*tensors_of(call).values())
    with pytest.raises(NotImplementedError, match="cannot be traced"):
        torch.jit.trace(run, tuple(tensors_of(call).values()), check_trace=False)
    for a, b in zip(clones(call), before, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), "it was written"
