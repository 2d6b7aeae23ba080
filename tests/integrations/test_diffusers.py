"""diffusers on jit_kernel: its models and a pipeline beside torch's SDPA, masks, gradients, and the way back."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install '.[diffusers]'")

from diffusers.models import attention_dispatch  # noqa: E402

from jit_kernel.integrations import counters, local_kernels, sdpa  # noqa: E402
from jit_kernel.integrations import diffusers as host  # noqa: E402
from jit_kernel.integrations.diffusers import parallel  # noqa: E402
from tests.support import case_run, diffusers_models, reference  # noqa: E402

NAMES = attention_dispatch.AttentionBackendName
REGISTRY = attention_dispatch._AttentionBackendRegistry
MODELS = {
    "flux": (diffusers_models.flux, 2),
    "wan": (diffusers_models.wan, 4),
    "qwen": (diffusers_models.qwen_image, 2),
}


def state_of_diffusers() -> dict[str, Any]:
    """What register() may change."""
    return {
        "values": [member.value for member in NAMES],
        "names": dir(NAMES),
        "tables": {name: set(value) for name, value in vars(REGISTRY).items() if isinstance(value, (dict, set))},
        "active": REGISTRY._active_backend,
        "choose": diffusers.ModelMixin.set_attention_backend,
    }


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Every test leaves diffusers as it found it."""
    torch.manual_seed(0)
    before = state_of_diffusers()
    counters.clear()
    host.register()
    with case_run.one_thread():
        yield
    host.unregister()
    counters.clear()
    assert state_of_diffusers() == before


def counted() -> tuple[int, dict[str, int]]:
    counts = counters.read().get("diffusers", {"served": 0, "passed_on": {}})
    return counts["served"], counts["passed_on"]


def given(model: Any, inputs: dict[str, Any], backend: str) -> Tensor:
    with attention_dispatch.attention_backend(backend):
        return model(**inputs).sample


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, say: list[str]) -> None:
    make, layers = MODELS[name]
    with torch.no_grad():
        model, inputs = make()
        exact = given(model.double(), diffusers_models.in_dtype(inputs, torch.float64), "native")
        for dtype in (torch.float32, torch.bfloat16):
            model, inputs = make()
            model, inputs = model.to(dtype), diffusers_models.in_dtype(inputs, dtype)
            base = given(model, inputs, "native")
            counters.clear()
            ours = given(model, inputs, host.NAME)
            assert counted() == (layers, {})
            share = diffusers_models.share(ours, base, exact)
            say.append(f"diffusers, {name} in {dtype}: share of the limit {share:.2f}")
            assert 0.0 < share <= 1.0
    assert host.passing_by(model) == {}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_models(name: str) -> None:
    found = {}
    for kind in ("exact", "native", host.NAME):
        model, inputs = MODELS[name][0]()
        if kind == "exact":
            model, inputs = model.double(), diffusers_models.in_dtype(inputs, torch.float64)
        given(model, inputs, host.NAME if kind == host.NAME else "native").square().sum().backward()
        found[kind] = {each: p.grad for each, p in model.named_parameters() if p.grad is not None}
    assert counted()[1] == {}
    assert found["native"].keys() == found[host.NAME].keys()
    whole = {kind: torch.cat([grad.flatten() for grad in grads.values()]) for kind, grads in found.items()}
    assert 0.0 < diffusers_models.share(whole[host.NAME], whole["native"], whole["exact"]) <= 1.0


def test_a_model_traced_whole() -> None:
    """torch.compile with fullgraph: a break in the graph is an error."""
    model, inputs = diffusers_models.qwen_image(layers=1)
    model.set_attention_backend(host.NAME)
    with torch.no_grad():
        traced = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).sample
        assert counters.read()["diffusers"]["passed_on"] == {}
        torch.testing.assert_close(traced, given(model, inputs, "native"), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_attention_traced_whole() -> None:
    q, k, v = (each.requires_grad_() for each in made())
    mask = seen_keys()[:, None, None, :]

    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return host.attend(q, k, v) + host.attend(q, k, v, mask) + host.attend(q, k, v, mask.float().log())

    grads = []
    for function in (torch.compile(both, fullgraph=True, backend="aot_eager"), both):
        out = function(q, k, v)
        grads.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert set(counted()[1]) == {"a mask that hides other keys from each query, or adds numbers"}  # as it was traced
    for traced, plain in zip(*grads, strict=True):
        torch.testing.assert_close(traced, plain, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def made(dtype: torch.dtype = torch.float32, sq: int = 9, sk: int = 20, hk: int = 4, d: int = 32) -> tuple[Tensor, ...]:
    sizes = ((sq, 4), (sk, hk), (sk, hk))
    return tuple(torch.randn(3, rows, heads, d).to(dtype) for rows, heads in sizes)


def seen_keys() -> Tensor:
    """(3, 20) bool: all keys of a sequence, keys in three runs, and one key."""
    seen = torch.ones(3, 20, dtype=torch.bool)
    seen[1, 5:9] = seen[1, 12] = False
    seen[2] = False
    seen[2, 7] = True
    return seen


def as_number(seen: Tensor, hidden: float) -> Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, hidden)


MASKS = {
    "(b, sk)": lambda seen: seen,
    "(b, 1, 1, sk)": lambda seen: seen[:, None, None, :],
    "(b, h, sq, sk)": lambda seen: seen[:, None, None, :].repeat(1, 4, 9, 1),
    "-inf": lambda seen: as_number(seen, -torch.inf)[:, None, None, :].expand(3, 4, 9, 20),
    "least number": lambda seen: as_number(seen, torch.finfo(torch.float32).min)[:, None, None],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_masks_that_hide_keys(mask: str, dtype: torch.dtype) -> None:
    q, k, v = made(dtype)
    seen = seen_keys()
    k, v = (each.masked_fill(~seen[:, :, None, None], torch.nan) for each in (k, v))
    out, lse = attention_dispatch.dispatch_attention_fn(
        q, k, v, attn_mask=MASKS[mask](seen), attention_kwargs={"return_lse": True}, backend=host.NAME
    )
    sequences = [reference.Sequence(q[i], k[i, seen[i]], v[i, seen[i]]) for i in range(3)]
    shares = reference.check(list(out), [each.T for each in lse], reference.Problem(sequences))
    assert shares.worst <= 1.0
    assert counted() == (1, {})


def test_a_sequence_without_keys_gets_zeros() -> None:
    q, k, v = made()
    mask = torch.zeros(3, 1, 1, 20, dtype=torch.bool)
    out, lse = host.attend(q, k, v, mask, return_lse=True)
    assert bool((out == 0).all()) and bool((lse == -torch.inf).all())


def test_gradients_through_a_mask() -> None:
    q, k, v = (each.requires_grad_() for each in made())
    mask = seen_keys()[:, None, None, :]
    exact = [each.detach().double().requires_grad_() for each in (q, k, v)]
    grads = []
    for three, backend in (((q, k, v), host.NAME), ((q, k, v), "native"), (exact, "native")):
        out = attention_dispatch.dispatch_attention_fn(*three, attn_mask=mask, backend=backend)
        grads.append(torch.autograd.grad(out.square().sum(), three))
    assert counted() == (1, {})
    for ours, base, right in zip(*grads, strict=True):
        assert diffusers_models.share(ours, base, right) <= 1.0
    hidden = ~seen_keys()
    assert bool((grads[0][1][hidden] == 0).all()) and bool((grads[0][2][hidden] == 0).all())


@pytest.mark.parametrize(("sq", "sk"), [(12, 12), (7, 12), (12, 7)])
def test_a_causal_mask_is_torchs(sq: int, sk: int) -> None:
    q, k, v = made(sq=sq, sk=sk, hk=2)
    ours = host.attend(q, k, v, is_causal=True, enable_gqa=True)
    base = attention_dispatch.dispatch_attention_fn(q, k, v, is_causal=True, enable_gqa=True, backend="native")
    torch.testing.assert_close(ours, base, rtol=1e-4, atol=1e-5)


def test_a_window_comes_by_attention_kwargs() -> None:
    q, k, v = made(sq=20)
    asked = {"window_size": (3, 2), "return_lse": True}
    out, lse = attention_dispatch.dispatch_attention_fn(q, k, v, attention_kwargs=asked, backend=host.NAME)
    sequences = [reference.Sequence(q[i], k[i], v[i]) for i in range(3)]
    problem = reference.Problem(sequences, window_size=(3, 2))
    assert reference.check(list(out), [each.T for each in lse], problem).worst <= 1.0


def learned() -> dict[str, Any]:
    return {"attn_mask": torch.randn(3, 4, 9, 20).requires_grad_()}


PASSED_ON = {
    "a mask of each query": (made(), {"attn_mask": torch.ones(9, 20).tril(11) > 0}, "a mask that hides other keys"),
    "numbers": (made(), {"attn_mask": torch.randn(3, 1, 1, 20)}, "adds numbers"),
    "gradient": (made(), learned(), "a mask that requires grad"),
    "float64": (made(torch.float64), {}, "dtype float64 on cpu"),
    "head size": (made(d=520), {}, "a head size above 512 on cpu"),
}


@pytest.mark.parametrize("kind", PASSED_ON)
def test_what_goes_on_to_sdpa(kind: str) -> None:
    (q, k, v), named, reason = PASSED_ON[kind]
    ours = host.attend(q, k, v, **named)
    base = attention_dispatch.dispatch_attention_fn(q, k, v, **named, backend="native")
    assert torch.equal(ours, base)
    served, passed_on = counted()
    assert served == 0
    assert len(passed_on) == 1 and reason in next(iter(passed_on))
    with pytest.raises(NotImplementedError, match="return_lse is asked for beside .*" + reason):
        host.attend(q, k, v, **named, return_lse=True)
    with pytest.raises(NotImplementedError, match="window_size is asked for beside .*" + reason):
        host.attend(q, k, v, **named, window_size=(1, 1))


def test_dropout_goes_on_to_sdpa() -> None:
    q, k, v = made()
    torch.manual_seed(1)
    ours = host.attend(q, k, v, dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(ours, attention_dispatch.dispatch_attention_fn(q, k, v, dropout_p=0.5, backend="native"))
    assert counted() == (0, {"dropout": 1})


def test_what_contradicts_itself_is_refused() -> None:
    q, k, v = made()
    with pytest.raises(ValueError, match=r"attn_mask is .* beside is_causal=True"):
        host.attend(q, k, v, seen_keys(), is_causal=True)
    with pytest.raises(NotImplementedError, match="window_size is asked for beside a mask"):
        host.attend(q, k, v, seen_keys(), window_size=(1, 1))
    with pytest.raises(NotImplementedError, match="window_size is asked for beside is_causal"):
        host.attend(q, k, v, is_causal=True, window_size=(1, 1))
    with pytest.raises(ValueError, match=r"value is .*float64.*; it must be as query is"):
        host.need_alike(q, k, v.double())
    assert counted() == (0, {})


def test_old_processors_are_told_and_served_by_sdpa(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = diffusers_models.sd3()
    assert host.passing_by(model) == {"JointAttnProcessor2_0": 2}
    with caplog.at_level("WARNING", logger="jit_kernel"):
        model.set_attention_backend(host.NAME)
    told = [record.getMessage() for record in caplog.records if "SD3Transformer2DModel" in record.getMessage()]
    assert len(told) == 1 and "2 with JointAttnProcessor2_0" in told[0] and "sdpa.activate()" in told[0]
    with torch.no_grad():
        base = model(**inputs).sample
        assert counted() == (0, {})
        with sdpa.active():
            ours = model(**inputs).sample
    assert counters.read()["sdpa"]["served"] == 2
    torch.testing.assert_close(ours, base, rtol=1e-4, atol=1e-5)
    model.set_attention_backend("native")


def test_a_pipelines_image(say: list[str]) -> None:
    """Flux's transformer by the dispatcher, AutoencoderKL by SDPA; the image in [0, 1] beside torch's."""
    images = {}
    for kind in ("exact", "native", host.NAME):
        pipe, called = diffusers_models.pipeline()
        if kind == "exact":
            pipe, called = pipe.to(torch.float64), diffusers_models.in_dtype(called, torch.float64)
        generator, ours = torch.Generator().manual_seed(3), kind == host.NAME
        if ours:
            sdpa.activate()
        try:
            with attention_dispatch.attention_backend(kind if ours else "native"):
                images[kind] = pipe(**called, generator=generator).images
        finally:
            sdpa.deactivate()
    assert counted() == (4, {})
    assert counters.read()["sdpa"] == {"served": 1, "passed_on": {}}
    assert images["native"].std() > 0.01
    share = diffusers_models.share(images[host.NAME], images["native"], images["exact"])
    say.append(f"diffusers, a Flux pipeline's image: share of the limit {share:.2f}")
    assert 0.0 < share <= 1.0


def test_the_name_while_it_is_registered_and_after() -> None:
    host.register()  # a second time changes nothing
    member = NAMES(host.NAME)
    assert isinstance(member, NAMES) and member is NAMES.JIT_KERNEL and pickle.loads(pickle.dumps(member)) is member
    assert member in REGISTRY.list_backends() and list(NAMES).count(member) == 1
    REGISTRY._active_backend = member
    host.unregister()
    assert REGISTRY._active_backend is NAMES.NATIVE
    with pytest.raises(ValueError, match="not a valid AttentionBackendName"):
        NAMES(host.NAME)
    with pytest.raises(ValueError, match="must be one of"):
        diffusers_models.flux()[0].set_attention_backend(host.NAME)
    host.unregister()
    host.register()
    assert NAMES(host.NAME) is NAMES.JIT_KERNEL


class Context:
    """What an autograd.Function gives its passes."""

    saved_tensors: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


@pytest.mark.skipif(not parallel.available(), reason="diffusers before 0.36 has no context parallelism")
def test_the_passes_of_a_ring_and_of_ulysses() -> None:
    """Two parts of the keys, merged as diffusers' ring merges them, are the whole, and so are their gradients; one
    part with a mask is what Ulysses asks for."""
    q, k, v = made(sk=20)
    whole = [each.detach().requires_grad_() for each in (q, k, v)]
    out = host.attend(*whole)
    grad = torch.randn_like(out)
    wanted = torch.autograd.grad(out, whole, grad)
    context: Any = Context()
    parts = []
    for part, first in ((slice(0, 8), True), (slice(8, 20), False)):
        settings = {"return_lse": True, "_save_ctx": first}
        parts.append(parallel.forward(context, q, k[:, part], v[:, part], **settings))
    (a, lse_a), (b, lse_b) = parts
    merged = a - torch.sigmoid(lse_b - lse_a)[..., None] * (a - b)
    torch.testing.assert_close(merged, out, rtol=1e-4, atol=1e-5)
    lse = torch.logaddexp(lse_a, lse_b)
    first = parallel.backward(context, grad, out=merged, lse=lse)
    rest = parallel.backward(context, grad, query=q, key=k[:, 8:], value=v[:, 8:], out=merged, lse=lse)
    found = (first[0] + rest[0], torch.cat([first[1], rest[1]], 1), torch.cat([first[2], rest[2]], 1))
    for ours, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)
    seen = seen_keys()
    base = torch.autograd.grad(host.attend(*whole, seen), whole, grad)
    parallel.forward(context, q, k, v, seen)
    for ours, right in zip(parallel.backward(context, grad), base, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


@pytest.mark.hosts
@pytest.mark.skipif(not parallel.available(), reason="diffusers before 0.36 has no context parallelism")
def test_context_parallelism_on_two_processes(tmp_path: Path) -> None:
    """diffusers' own ring and Ulysses attention on gloo, with gradients, and with a mask where it has one."""
    from tests.support import diffusers_worker

    host.attend(*made(sk=9))  # compiled here, once, and not by each process
    context = multiprocessing.spawn(
        diffusers_worker.run, (2, str(tmp_path / "store"), str(tmp_path)), nprocs=2, join=False
    )
    try:
        while not context.join(timeout=300):  # it returns as soon as one process has ended
            pass
    except Exception as error:
        raise AssertionError(
            "\n".join(path.read_text() for path in tmp_path.glob("rank*.txt")) or str(error)
        ) from error


BY_THE_HUBS_NAME = """
import torch
from jit_kernel.integrations import counters
from tests.support.diffusers_models import flux, qwen_image
with torch.no_grad():
    for make, backend in ((flux, "_flash_3_hub"), (qwen_image, "_flash_3_varlen_hub")):
        model, inputs = make()
        model.set_attention_backend(backend)
        ours = model(**inputs).sample
        model.set_attention_backend("native")
        torch.testing.assert_close(ours, model(**inputs).sample, rtol=1e-4, atol=1e-5)
assert counters.read() == {"LOCAL_KERNELS": {"served": 4, "passed_on": {}}}, counters.read()
"""


@pytest.mark.hosts
def test_flash_attention_3_of_the_hub_by_local_kernels() -> None:
    pytest.importorskip("kernels", reason="kernels is not installed")
    environment = {**os.environ, "LOCAL_KERNELS": local_kernels.variable(), "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", BY_THE_HUBS_NAME], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
def test_on_a_gpu(masked: bool) -> None:
    """Forward and backward beside torch's own, by the numeric rule; what memory held before is NaN."""
    exact = [each.double().requires_grad_() for each in made(torch.bfloat16, sq=70, sk=150, d=64)]
    mask = (torch.arange(150) % 7 < 4).expand(3, 1, 1, 150).clone() if masked else None
    tensors = [each.detach().to("cuda", torch.bfloat16).requires_grad_() for each in exact]
    grad = torch.randn(3, 70, 4, 64).to(torch.bfloat16)
    found = []
    for three, backend in ((tensors, host.NAME), (tensors, "native"), (exact, "native")):
        for _ in range(40):
            torch.full((3, 150, 4, 64), torch.nan, dtype=torch.bfloat16, device="cuda")
        of_it = None if mask is None else mask.to(three[0].device)
        out = attention_dispatch.dispatch_attention_fn(*three, attn_mask=of_it, backend=backend)
        grads = torch.autograd.grad(out, three, grad.to(out))
        found.append([each.cpu() for each in (out.detach(), *grads)])
    assert counted() == (1, {})
    for ours, base, right in zip(*found, strict=True):
        assert diffusers_models.share(ours, base, right) <= 1.0


@pytest.mark.gpu
def test_a_model_on_a_gpu_traced_whole() -> None:
    model, inputs = diffusers_models.qwen_image(layers=1)
    model, inputs = model.to("cuda", torch.bfloat16), diffusers_models.in_dtype(inputs, torch.bfloat16)
    inputs = {name: each.cuda() if isinstance(each, Tensor) else each for name, each in inputs.items()}
    with torch.no_grad():
        base = given(model, inputs, "native")
        model.set_attention_backend(host.NAME)
        plain = model(**inputs).sample
        traced = torch.compile(model, fullgraph=True)(**inputs).sample
    assert counted()[1] == {}
    torch.testing.assert_close(plain, base, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(traced, base, rtol=3e-2, atol=3e-2)
    torch._dynamo.reset()
    model.reset_attention_backend()


@pytest.mark.gpu
def test_float32_on_a_gpu_goes_on_to_sdpa() -> None:
    q, k, v = (each.cuda() for each in made())
    base = attention_dispatch.dispatch_attention_fn(q, k, v, backend="native")
    assert torch.equal(host.attend(q, k, v), base)
    assert counted() == (0, {"dtype float32 on cuda": 1})
