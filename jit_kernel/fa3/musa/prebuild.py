"""Warm-up for MUSA: have MATE build its own modules before a server takes requests, or before a graph is captured.

MATE compiles one library for every combination of mask, head ratio, tile, page size, dtype and metadata at the first
call that needs it. Its own list of configurations (`get_*_aot_configs`) is narrowed and built here in one go.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jit_kernel import config, moore_threads
from jit_kernel.fa3.musa import rules

LEVEL = 2  # MATE's own levels: 1 is bf16 prefill and decode, 2 adds windows, softcap, pages and 192/128
DTYPES = {"bf16": "mutlass::bfloat16_t", "fp16": "mutlass::half_t"}
_BOOLS = {
    "causal": "is_causal",
    "window": "is_local",
    "paged": "paged_kv",
    "metadata": "has_metadata",
    "softcap": "has_softcap",
    "pack_gqa": "is_packgqa",
}
FIELDS = ("head_dim", "head_dim_v", "group", "dtype", *_BOOLS)


@dataclass(frozen=True)
class Modules:
    """Modules of one kind that MATE builds in one go: what they are, and the arguments of its function for it."""

    title: str
    arguments: dict[str, Any] = field(hash=False)

    def build(self, jobs: int | None = None) -> None:
        """Have MATE build them, with `jobs` compilations at a time; raises what MATE raises."""
        limit = {} if jobs is None else {"jobs": jobs}
        importlib.import_module("mate.jit").prewarm_modules(**self.arguments, **limit)


def selected_modules(select: Mapping[str, str]) -> list[Modules]:
    """MATE's modules for the selected variants, by kind; nothing is built. Needs mcc and MATE, no device.

    `select` narrows by field: head_dim, head_dim_v, group (query heads per key/value head), dtype (bf16 | fp16),
    causal, window, paged, metadata, softcap, pack_gqa (0 | 1).
    Raises ValueError for an unknown field or value, NotImplementedError that names what is missing.
    """
    wanted = {name: _value(name, text) for name, text in select.items()}
    _need_parts()
    config.set_mate_architectures("3.1")  # MATE asks the device otherwise, and there may be none
    try:
        importlib.import_module("mate.jit")
        fmha = importlib.import_module("mate.jit.attention.fmha")
    except Exception as error:
        raise NotImplementedError(f"importing mate.jit failed with {type(error).__name__}: {error}") from error
    forward = selected(fmha.get_fmha_fwd_aot_configs(LEVEL), wanted)
    if not forward:
        raise ValueError(f"MATE lists no forward module for {dict(select)}")
    metadata = selected(fmha.get_fmha_metadata_aot_configs(LEVEL), wanted)
    combine = selected(fmha.get_fmha_fwd_combine_aot_configs(LEVEL), wanted)
    return [
        Modules(f"{len(forward)} forward modules", {"fmha_fwd_configs": forward}),
        Modules("metadata modules", {"fmha_metadata_configs": metadata}),
        Modules("combine modules", {"fmha_combine_configs": combine}),
        Modules("launcher of the prebuilt kernels", {"include_flash_attention": True}),
        Modules("MLA decode", {"include_mla": True}),
    ]


def prewarm(select: Mapping[str, str]) -> list[tuple[str, float, str | None]]:
    """Build MATE's modules for the selected variants; needs mcc and MATE, no device.

    Returns (title, seconds, error or None) for each kind of module. One that fails does not stop the others.
    Takes and raises what `selected_modules` does.
    """
    return [(modules.title, *_built(modules)) for modules in selected_modules(select)]


def _built(modules: Modules) -> tuple[float, str | None]:
    started = time.perf_counter()
    try:
        modules.build()
    except Exception as error:  # a compiler's failure arrives as MATE raises it
        return time.perf_counter() - started, f"{type(error).__name__}: {error}"
    return time.perf_counter() - started, None


def _need_parts() -> None:
    report = moore_threads.probe()
    lacking = [part for part in (report.mate, report.tvm_ffi, report.mcc) if not part.usable]
    if lacking:
        lines = "\n  ".join(str(part) for part in lacking)
        raise NotImplementedError(f"building MATE's modules needs, and this is missing:\n  {lines}")
    if moore_threads.release(report.mate.version or "") < (0, 2):
        raise NotImplementedError(
            f"MATE {report.mate.version} has no way to build its modules ahead; 0.2.0 and newer have one"
        )


def _value(field: str, text: str) -> str | int | bool:
    if field not in FIELDS:
        raise ValueError(f"--select {field}={text}: no such field; it must be one of {', '.join(FIELDS)}")
    if field == "dtype":
        if text not in DTYPES:
            raise ValueError(f"--select dtype={text}: it must be one of {', '.join(DTYPES)}")
        return DTYPES[text]
    if field in _BOOLS:
        if text.lower() not in ("0", "1", "false", "true"):
            raise ValueError(f"--select {field}={text}: it must be 0 or 1")
        return text.lower() in ("1", "true")
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"--select {field}={text}: it must be a number of at least 1")
    if field == "group":
        return int(text)
    if int(text) > rules.HEAD_SIZES[-1]:
        raise ValueError(f"--select {field}={text}: MATE serves head sizes up to {rules.HEAD_SIZES[-1]}")
    return rules.rounded(int(text))


def selected(configs: list[dict[str, Any]], wanted: Mapping[str, str | int | bool]) -> list[dict[str, Any]]:
    """The configurations that have the wanted values; dtype and group are set, as MATE lists few of them."""
    names = {"head_dim": "head_dim_qk", "head_dim_v": "head_dim_vo", **_BOOLS}
    kept = []
    for each in configs:
        if all(each.get(names[f], value) == value for f, value in wanted.items() if f in names):
            made = dict(each)
            for field, name in (("dtype", "element"), ("group", "head_ratio")):
                if field in wanted and name in made:
                    made[name] = wanted[field]
            if made not in kept:
                kept.append(made)
    return kept
