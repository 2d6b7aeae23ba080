"""Selection of a backend: messages, fallbacks, SageAttention's packages, and docs/backends.md against the code."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import jit_kernel.flash_attention_v3 as fa3
from jit_kernel import config
from jit_kernel import moore_threads as musa
from jit_kernel.attention import (
    AttentionLayer,
    DiffusionAttention,
    FlashAttentionBackend,
    ForwardMetadata,
    select_backend,
)
from jit_kernel.attention.dense import sage, selection
from jit_kernel.attention.parallel import exchange as communication
from jit_kernel.device import Target
from jit_kernel.engine import progress
from jit_kernel.fa3.musa import rules as musa_rules
from jit_kernel.fa3.seam import FUNCTIONS as CPU
from tests.support.musa_device import Machine, machine, on_path, to_cpu, to_musa, write_distribution, write_package

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True)
def nothing_said() -> Iterator[None]:
    progress._warned.clear()
    yield
    progress._warned.clear()


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Machine]:
    with machine(tmp_path / "site", CPU) as found:
        yield found


# Messages


@pytest.mark.parametrize("version", [4, 2, "3", None])
def test_other_versions_of_flash_attention(version: Any) -> None:
    message = re.escape(
        f"fa_impl_ver is {version!r}; it must be 3 (FlashAttention-3), the only version that exists here"
    )
    with pytest.raises(ValueError, match=message):
        FlashAttentionBackend(fa_impl_ver=version, device="cpu")


def test_an_unknown_backend() -> None:
    with pytest.raises(
        ValueError, match="backend is 'xformers'; it must be one of fa, sage, sdpa, or None for the best"
    ):
        select_backend("xformers", 64, torch.bfloat16, "cpu")


@pytest.mark.parametrize("device", ["musa", "musa:1"])
@pytest.mark.parametrize(
    "ask",
    [
        lambda device: FlashAttentionBackend(device=device),
        lambda device: select_backend(None, 64, torch.bfloat16, device),
        lambda device: DiffusionAttention(64, torch.bfloat16, device, "sdpa"),
    ],
)
def test_musa_where_there_is_none(device: str, ask: Any) -> None:
    with pytest.raises(NotImplementedError) as caught:
        ask(device)
    text = str(caught.value)
    assert f"device is {device!r}, and no Moore Threads GPU can be used here" in text
    for part in (
        "torch_musa: missing (not installed; install torch_musa 2.7",
        "MATE: missing (not installed; git clone",
    ):
        assert part in text


def test_an_unknown_device() -> None:
    with pytest.raises(ValueError, match="device is 'tpu'; it must be cpu, cuda or musa"):
        FlashAttentionBackend(device="tpu")


def test_sage_without_its_package(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        found = select_backend("sage", 64, torch.bfloat16, "cpu")
    assert found.backend == "fa"
    assert found.reasons == (
        "sage: importing sageattention failed with ModuleNotFoundError: No module named 'sageattention'",
    )
    warnings = [record for record in caplog.records if "attention backend 'sage'" in record.getMessage()]
    assert len(warnings) == 1
    assert "'fa' takes its place" in warnings[0].getMessage()
    with pytest.raises(NotImplementedError, match="attention backend 'sage' is not available on cpu"):
        select_backend("sage", 64, torch.bfloat16, "cpu", strict=True)
    monkeypatch.setenv("JIT_KERNEL_STRICT", "1")
    config.reload()
    with pytest.raises(NotImplementedError, match="'sage' is not available"):
        select_backend("sage", 64, torch.bfloat16, "cpu")
    monkeypatch.undo()
    config.reload()


def test_the_install_command_is_for_the_device(stack: Machine, caplog: pytest.LogCaptureFixture) -> None:
    assert select_backend("sage", 64, torch.bfloat16, "musa").backend == "fa"
    assert "to install: git clone --recursive https://github.com/MooreThreads/mate.git && pip install" in caplog.text


def test_what_fa_does_not_serve_falls_to_sdpa(stack: Machine, caplog: pytest.LogCaptureFixture) -> None:
    assert select_backend("fa", 64, torch.float64, "cpu").backend == "sdpa"
    found = select_backend(None, 320, torch.float32, "musa")
    assert found.backend == "sdpa"
    assert "fp32: MATE computes in bf16 and fp16 only" in found.reasons[0]
    assert "'sdpa' takes its place" in caplog.text


def test_the_best_is_no_fallback(caplog: pytest.LogCaptureFixture) -> None:
    found = select_backend(None, 64, torch.bfloat16, "cpu", strict=True)
    assert (found.backend, found.reasons) == ("fa", ())
    assert select_backend("sdpa", 64, torch.bfloat16, "cpu", strict=True).backend == "sdpa"
    assert not caplog.records


# SageAttention's packages

SAGE_1 = """
def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **kwargs):
    import torch
    k -= k.mean(dim=1, keepdim=True)
    assert tensor_layout == "NHD"
    return torch.zeros_like(q)
"""
SAGE_MATE = """
def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False,
             qk_quant_gran="per_thread", qk_quant_dtype="int8", quant_recipe=None, smooth_k=True, fp8_output=False,
             **kwargs):
    from jit_kernel import flash_attention_v3
    assert tensor_layout == "NHD"
    return flash_attention_v3.flash_attn_func(q, k, v, softmax_scale=sm_scale, causal=is_causal,
                                              return_softmax_lse=return_lse)
"""


@pytest.fixture
def install(tmp_path: Path) -> Iterator[Any]:
    entered = []

    def put(text: str, version: str = "1.0.6") -> None:
        folder = tmp_path / f"sage{len(entered)}"
        folder.mkdir()
        write_package(folder, "sageattention", __init__=text)
        write_distribution(folder, "sageattention", version)
        entered.append(on_path(folder))
        entered[-1].__enter__()

    yield put
    for context in reversed(entered):
        context.__exit__(None, None, None)


@pytest.mark.parametrize(
    "error", ["RuntimeError('no MUSA device')", "OSError('libcuda.so.1')", "ImportError('triton')"]
)
def test_any_exception_of_the_import_is_a_reason(install: Any, error: str) -> None:
    install(f"raise {error}")
    found = select_backend("sage", 64, torch.bfloat16, "cpu")
    assert found.backend == "fa"
    assert f"importing sageattention failed with {error.split('(')[0]}" in found.reasons[0]


def test_pypis_package_is_for_cuda_whatever_the_tensor_says(install: Any) -> None:
    """Under torchada a MUSA tensor says is_cuda, and 1.x would take it."""
    install(SAGE_1)
    found = sage.find()
    assert isinstance(found, sage.Sage)
    assert found.flavour == "PyPI 1.x"
    pretending = types.SimpleNamespace(type="musa", is_cuda=True)
    reason = found.rejection(64, torch.bfloat16, pretending)  # type: ignore[arg-type]
    assert reason == "the installed sageattention (PyPI 1.x) is for cuda, not musa"
    cuda = torch.device("cuda", 0)
    assert found.rejection(64, torch.bfloat16, cuda) is None
    assert found.rejection(80, torch.bfloat16, cuda) == "PyPI 1.x serves head sizes 64, 96, 128, not 80"
    assert found.rejection(64, torch.float64, cuda) == "PyPI 1.x serves dtypes float16, bfloat16, float32, not float64"


def test_the_callers_k_stays(install: Any) -> None:
    install(SAGE_1)
    found = sage.find()
    assert isinstance(found, sage.Sage)
    q, k, v = (torch.randn(1, 8, 2, 64) for _ in "qkv")
    before = k.clone()
    found(q, k, v, False, None, False)
    assert torch.equal(k, before)
    found.function(q, k, v, tensor_layout="NHD")
    assert not torch.equal(k, before)  # what the copy protects from


def test_an_lse_that_would_be_swallowed_is_refused(install: Any) -> None:
    install(SAGE_1)
    found = sage.find()
    assert isinstance(found, sage.Sage)
    q = torch.randn(1, 8, 2, 64)
    assert isinstance(found.function(q, q.clone(), q, tensor_layout="NHD", return_lse=True), Tensor)  # swallowed
    with pytest.raises(NotImplementedError, match=r"PyPI 1\.x has no lse to return"):
        found(q, q, q, False, None, True)
    with pytest.raises(NotImplementedError, match="causal and 8 queries for 4 keys: it serves equal lengths only"):
        found(q, q[:, :4], q[:, :4], True, None, False)


def test_later_packages_are_recognised_by_signature_or_version(install: Any) -> None:
    install(SAGE_1.replace("smooth_k=True", "return_lse=False"), "2.2.0")
    found = sage.find()
    assert isinstance(found, sage.Sage)
    assert (found.flavour, found.returns_lse, found.spoils_k) == ("SageAttention 2", True, False)


def test_mates_wrapper_serves_musa(stack: Machine) -> None:
    write_package(stack.folder, "sageattention", __init__=SAGE_MATE)
    q, k, v = (torch.randn(2, 9, 4, 64).bfloat16() for _ in "qkv")
    attention = DiffusionAttention(64, torch.bfloat16, "musa", "sage", causal=True, strict=True)
    assert attention.selection.backend == "sage"
    out, lse = attention(*to_musa((q, k, v)), return_softmax_lse=True)
    expected, expected_lse = fa3.flash_attn_func(q, k, v, causal=True, return_softmax_lse=True)
    assert torch.allclose(to_cpu(out).float(), expected.float(), atol=2e-2)
    assert torch.allclose(to_cpu(lse), expected_lse, atol=1e-3)
    assert select_backend("sage", 256, torch.bfloat16, "musa").backend == "fa"


# DiffusionAttention


@pytest.mark.parametrize("backend", ["fa", "sdpa"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("sq", "sk"), [(9, 9), (5, 12), (12, 5)])
def test_diffusion_attention(backend: str, causal: bool, sq: int, sk: int) -> None:
    q, k, v = torch.randn(2, sq, 4, 64), torch.randn(2, sk, 2, 64), torch.randn(2, sk, 2, 64)
    attention = DiffusionAttention(64, torch.float32, "cpu", backend, causal=causal, softmax_scale=0.2, strict=True)
    expected = fa3.flash_attn_func(q, k, v, softmax_scale=0.2, causal=causal)
    torch.testing.assert_close(attention(q, k, v), expected, rtol=1e-4, atol=1e-5)


def test_diffusion_attention_says_what_is_wrong() -> None:
    attention = DiffusionAttention(64, torch.float32, "cpu", "sdpa")
    q = torch.zeros(1, 4, 2, 64)
    for bad, message in (
        ((q[0], q, q), r"q has shape \(4, 2, 64\)"),
        ((q, q.bfloat16(), q), "k is bfloat16 on cpu; the backend was chosen for float32"),
        ((q, q, q[:, :3]), "k and v must agree"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(*bad)
    with pytest.raises(NotImplementedError, match="has no lse to return"):
        attention(q, q, q, return_softmax_lse=True)


# FlashAttentionBackend


def test_forwards_use_what_was_chosen_not_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that replaces the module's functions later, or another backend, changes nothing."""
    backend = FlashAttentionBackend(device="cpu", plan_ahead=True)
    for name in ("flash_attn_varlen_func", "flash_attn_with_kvcache", "get_scheduler_metadata", "merge_state"):
        monkeypatch.setattr(fa3, name, lambda *args, **kwargs: pytest.fail("the default was called"))
    q, k = torch.randn(6, 4, 64), torch.randn(6, 2, 64)
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    backend.forward_extend(q, k, k, ForwardMetadata(cu, 4))
    cache = torch.randn(2, 9, 2, 64)
    lengths = torch.tensor([4, 9], dtype=torch.int32)
    out = backend.forward_extend(q, None, None, ForwardMetadata(cu, 4, lengths, 9), k_cache=cache, v_cache=cache)
    _, lse = backend.forward_decode(q, cache, cache, ForwardMetadata(cu, 4, lengths, 9), return_softmax_lse=True)
    backend.merge(out, lse, out, lse)


def test_extend_and_decode_are_the_public_functions() -> None:
    backend = FlashAttentionBackend(device="cpu", deterministic=True)
    assert backend.num_splits == 1
    layer = AttentionLayer(window_size=(3, 0), softcap=4.0, sinks=torch.zeros(4), softmax_scale=0.3)
    cu, new = torch.tensor([0, 2, 6], dtype=torch.int32), torch.randn(2, 1, 2, 64)
    q, k, v = torch.randn(6, 4, 64), torch.randn(6, 2, 64), torch.randn(6, 2, 64)
    options = {"causal": True, "window_size": (3, 0), "softcap": 4.0, "sinks": layer.sinks, "softmax_scale": 0.3}
    expected = fa3.flash_attn_varlen_func(q, k, v, cu, cu, 4, 4, **options)
    assert torch.equal(backend.forward_extend(q, k, v, ForwardMetadata(cu, 4), layer), expected)
    caches, lengths = [torch.randn(2, 9, 2, 64) for _ in "kv"], torch.tensor([4, 7], dtype=torch.int32)
    one = torch.randn(2, 1, 4, 64)
    copies = [cache.clone() for cache in caches]
    expected = fa3.flash_attn_with_kvcache(one, *copies, k=new, v=new, cache_seqlens=lengths, num_splits=1, **options)
    metadata = ForwardMetadata(None, 1, lengths, 9)
    assert torch.equal(backend.forward_decode(one, *caches, metadata, layer, k=new, v=new), expected)
    assert all(torch.equal(a, b) for a, b in zip(caches, copies, strict=True))


def test_missing_pieces_are_named() -> None:
    backend, q = FlashAttentionBackend(device="cpu"), torch.zeros(2, 2, 64)
    cu, lengths = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    with pytest.raises(ValueError, match="k and v are None"):
        backend.forward_extend(q, None, None, ForwardMetadata(cu, 2))
    with pytest.raises(ValueError, match="k_cache and v_cache are None"):
        backend.forward_extend(q, q, q, ForwardMetadata(cu, 2, lengths, 2))
    with pytest.raises(ValueError, match="cache_seqlens is None"):
        backend.forward_decode(q, q, q, ForwardMetadata(cu, 2))


# docs/backends.md against the code


def rows_below(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    text = (DOCS / "backends.md").read_text().split(f"## {heading}\n", 1)[1]
    lines = [line for line in text.split("\n## ", 1)[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


NAMED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def sizes_in(text: str) -> set[int]:
    found = {n for a, b in re.findall(r"(\d+) to (\d+)", text) for n in range(int(a), int(b) + 1)}
    return found or {int(n) for n in re.findall(r"\d+", text)}


def test_the_table_of_fallbacks_is_the_codes() -> None:
    documented = {row[0]: tuple(row[1].split(", ")) for row in rows_below("What falls back to what")}
    assert documented == {str(None) if k is None else f'"{k}"': v for k, v in selection.ORDER.items()}


def test_the_table_of_backends_is_the_codes(stack: Machine, install: Any) -> None:
    rows = {(row[0], row[1].split(" (")[0]): row for row in rows_below("Dense attention: fa, sage, sdpa")}
    for device in ("cpu", "musa"):
        row = rows["fa", device]
        dtypes, sizes = {NAMED[name] for name in row[2].split()}, sizes_in(row[3])
        for dtype in (*NAMED.values(), torch.float64):
            for size in (1, 63, 64, 72, 100, 128, 192, 256, 257, 300, 384, 400, 512, 513, 576):
                reason = selection.rejection("fa", size, dtype, torch.device(device))
                assert (reason is None) == (dtype in dtypes and size in sizes), (device, dtype, size, reason)
    for text, version in ((SAGE_1, "1.0.6"), (SAGE_1.replace("smooth_k", "return_lse"), "2.2.0"), (SAGE_MATE, "0.2.2")):
        install(text, version)
        found = sage.find()
        assert isinstance(found, sage.Sage)
        row = rows[f"sage ({found.flavour})", found.device]
        assert {NAMED[name] for name in row[2].split()} == set(found.dtypes)
        for size in range(1, 300):
            served = found.rejection(size, torch.bfloat16, torch.device(found.device)) is None
            assert served == (size in sizes_in(row[3]))
    assert ("sdpa", "cpu, cuda, musa") in rows


def test_the_table_for_cuda_is_the_codes() -> None:
    from jit_kernel.fa3 import portable
    from jit_kernel.fa3.decision import Rejected

    row = next(r for r in rows_below("Dense attention: fa, sage, sdpa") if r[0] == "fa" and r[1].startswith("cuda"))
    dtypes, sizes, target = {NAMED[name] for name in row[2].split()}, sizes_in(row[3]), Target("cuda", "sm_80")
    for dtype in NAMED.values():
        for size in (1, 63, 64, 100, 128, 192, 256, 257, 512):
            features = selection.plain_features_of(size, dtype)
            served = not isinstance(portable.decide(target, features), Rejected)
            assert served == (dtype in dtypes and size in sizes), (dtype, size)


def test_the_table_of_mates_versions_is_the_codes() -> None:
    documented = rows_below("Moore Threads GPUs")
    start = next(i for i, row in enumerate(documented) if row[0].startswith("page_table in"))
    versions = [(0, 1, 3), (0, 2, 0), (0, 2, 1), (0, 2, 2)]
    by_name = {row[0]: [cell == "yes" for cell in row[1:]] for row in documented[start:]}
    base = selection.plain_features_of(128, torch.bfloat16)
    mla = {"qv": True, "head_dim": 64, "head_dim_v": 512, "page_size": 64}
    cases = {
        "new k and v": [{"append": True}],
        "rotary_cos, cache_batch_idx, cache_leftpad": [
            {"append": True, "rotary": True},
            {"cache_batch_idx": True},
            {"cache_leftpad": True},
        ],
        "attention_chunk": [{"chunk": True}],
        "fp32, fp8, descales, only_qv": [{"dtype": "fp32"}, {"dtype": "e4m3"}, {"descale": True}, {"only_qv": True}],
        "qv: MLA decode, q of 64, values of 512, pages of 64 tokens": [mla],
        "window, softcap, chunk, sinks or new keys with qv": [
            mla | {name: True} for name in ("window", "softcap", "chunk", "sinks", "append")
        ],
    }
    for name, changes in cases.items():
        for change in changes:
            features = type(base)(**{**vars(base), **change})
            served = [musa_rules.rejection(version, features) is None for version in versions]
            assert served == by_name[name], (name, change)
    pairs = re.findall(r"(\d+)/(\d+)", next(name for name in by_name if name.startswith("head sizes")))
    assert [(int(d), int(dv)) for d, dv in pairs] == list(musa_rules.HEAD_PAIRS)


def test_the_install_commands_are_the_codes() -> None:
    text = (DOCS / "backends.md").read_text()
    for command in (musa.INSTALL_TVM_FFI, musa.INSTALL_TORCHADA, sage.INSTALL["musa"]):
        assert f"`{command}`" in text
    build, wrapper = musa.INSTALL_MATE.split(", then ")
    assert f"`{build}`, then `{wrapper}`" in text
    for device, name in communication.BACKENDS.items():
        assert f"{device} {name}" in text


def test_the_adapter_in_the_docs_runs() -> None:
    """docs/attention.md's example, with an engine of two layers, against one call."""
    code = re.search(r"```python\n(.*?)```", (DOCS / "attention.md").read_text(), re.DOTALL)
    assert code is not None
    namespace: dict[str, Any] = {}
    exec(code.group(1), namespace)
    lengths, extend = torch.tensor([5, 9], dtype=torch.int32), torch.tensor([2, 4], dtype=torch.int32)
    k, v = torch.randn(2, 8, 4, 2, 64)
    table = torch.tensor([[3, 1, 0], [2, 7, 5]], dtype=torch.int32)
    hidden, seen = torch.randn(6, 4, 64), []
    layers = [
        types.SimpleNamespace(
            tag=tag,
            window_size=window,
            sinks=None,
            k_cache=k,
            v_cache=v,
            write_keys_and_project=lambda hidden, batch: hidden,
            finish=lambda out: seen.append(out) or out,
        )
        for tag, window in (("base", (-1, -1)), ("swa", (3, 0)))
    ]
    batch = types.SimpleNamespace(
        seq_lens=lengths, extend_lens=extend, max_extend_len=4, max_seq_len=9, page_table=table, hidden=hidden
    )
    adapter = namespace["EngineAttention"]("cpu")
    adapter.forward(types.SimpleNamespace(tags=("base", "swa"), layers=layers), batch)
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    q = hidden
    for out, layer in zip(seen, layers, strict=True):
        options = {"causal": True, "window_size": layer.window_size, "cache_seqlens": lengths, "page_table": table}
        expected = fa3.flash_attn_with_kvcache(q, k, v, cu_seqlens_q=cu, max_seqlen_q=4, **options)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        q = out
    batch.extend_lens, batch.hidden = None, hidden[:2]
    adapter.forward(types.SimpleNamespace(tags=("base", "swa"), layers=layers), batch)
