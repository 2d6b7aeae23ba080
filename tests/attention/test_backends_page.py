"""docs/backends.md and docs/attention.md against the code."""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Any

import torch

import jit_kernel.flash_attention_v3 as fa3
from jit_kernel import moore_threads as musa
from jit_kernel.attention.dense import sage, selection
from jit_kernel.attention.parallel import exchange as communication
from jit_kernel.device import Target
from jit_kernel.fa3.musa import rules as musa_rules
from tests.support.musa_device import Machine
from tests.support.sage_packages import SAGE_1, SAGE_MATE

DOCS = Path(__file__).parents[2] / "docs"


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
        "fp32, fp8, q in 16 bit over an fp8 cache, descales, k_scale and v_scale, only_qv, draft_mask": [
            {"dtype": "fp32", "kv_dtype": "fp32"},
            {"dtype": "e4m3", "kv_dtype": "e4m3"},
            {"kv_dtype": "e4m3"},
            {"token_scales": True},
            {"descale": True},
            {"only_qv": True},
            {"draft_mask": True},
        ],
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
