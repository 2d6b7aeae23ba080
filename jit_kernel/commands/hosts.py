"""`python -m jit_kernel hosts`: the programs that can run on jit_kernel, the line for each, and what it cannot do.

No host is imported: versions are those that the installed packages' metadata tells. Calls are those that programs have
counted under JIT_KERNEL_COUNTERS=FILE, shown by `hosts --counters FILE`. A program can print the same of itself:

    from jit_kernel.commands import hosts
    print(hosts.text(hosts.report()))
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jit_kernel import config
from jit_kernel.integrations import counters

_HERE = "jit_kernel.integrations."


@dataclass(frozen=True)
class Host:
    """name: as counters have it. package: what must be installed. tested: the versions that the tests have run with, or
    (`read_only`) whose calls were recorded and are answered. write: the lines for a shell or a program."""

    name: str
    title: str
    package: str
    tested: str
    write: tuple[str, ...]
    cannot: tuple[str, ...]
    read_only: bool = False


# The one place that says which versions are tested: raise it after the tests pass with a new one.
HOSTS = (
    Host(
        "sdpa", "torch's SDPA", "torch", ">=2.10,<2.15",
        ("from jit_kernel.integrations import sdpa", "sdpa.activate()"),
        ("dropout, masks that are no lengths, other dtypes: passed on to torch's own kernel",
         "gradients of gradients"),
    ),
    Host(
        "flash_attn_interface", "FlashAttention-3's module", "torch", ">=2.10,<2.15",
        ("from jit_kernel.integrations import flash_attn_interface", "flash_attn_interface.install()"),
        ("processes that have loaded FlashAttention-3's own extension",
         "gradients with qv, page_table or e4m3"),
    ),
    Host(
        "LOCAL_KERNELS", "LOCAL_KERNELS: FlashAttention-3 of the hub, in transformers, diffusers, sglang", "kernels",
        ">=0.14,<0.18",
        ('eval "$(python -m jit_kernel local-kernels)"',),
        ("dropout", "an installation whose path has a colon or a quote in it"),
    ),
    Host(
        "transformers", "Hugging Face transformers", "transformers", ">=5.4,<5.25",
        ("from jit_kernel.integrations import transformers as jit_kernel_transformers",
         "jit_kernel_transformers.register()",
         'AutoModelForCausalLM.from_pretrained(path, attn_implementation="jit_kernel_fa3")'),
        ("dropout in training, gradients with softcap or sinks through other masks than causal ones and windows",
         "models that compute their attention themselves (Bloom, Falcon, MPT, MPNet, DeBERTa)",
         "attention weights, position biases, masks of four dimensions"),
    ),
    Host(
        "diffusers", "Hugging Face diffusers", "diffusers", ">=0.35,<0.43",
        ("from jit_kernel.integrations.diffusers import register", "register()",
         'pipeline.transformer.set_attention_backend("jit_kernel")'),
        ("layers that never ask the dispatcher (Stable Diffusion 1 to 3, AutoencoderKL): sdpa.activate() serves them",
         "dropout, masks that hide other keys from each query, float32 on a GPU: passed on to torch's SDPA",
         "the environment variable DIFFUSERS_ATTN_BACKEND, which is read before register()"),
    ),
    Host(
        "sglang", "sglang", "sglang", "==0.5.23",
        ("JIT_KERNEL_PLUGINS=sglang python -m sglang.launch_server --model-path MODEL --attention-backend fa3",),
        ("FlashAttention-4's functions (ver=4): passed on to sglang",),
        read_only=True,
    ),
    Host(
        "vllm", "vLLM", "vllm", "==0.33.0",
        ("JIT_KERNEL_PLUGINS=vllm vllm serve MODEL --attention-backend FLASH_ATTN",),
        ("FlashAttention-4's functions (fa_version=4): passed on to vLLM",
         "alibi, dropout, context parallelism inside the function"),
        read_only=True,
    ),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; answers with its exit status: 1 where the file of counters cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m jit_kernel hosts", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--counters", type=Path, metavar="FILE", help="show the calls that programs under JIT_KERNEL_COUNTERS=FILE made"
    )
    options = parser.parse_args(argv)
    try:
        facts = report(options.counters)
    except (OSError, ValueError) as error:
        print(f"--counters is {str(options.counters)!r}, which cannot be read: {error}", file=sys.stderr)
        return 1
    print(json.dumps(facts, indent=1) if options.json else text(facts))
    return 0


def report(counters_file: Path | None = None) -> dict[str, Any]:
    """Everything that the command knows, as plain data; calls are this process's, or those of a file of counters.

    Raises OSError or ValueError where the file cannot be read.
    """
    ended = None if counters_file is None else counters.read_file(counters_file)
    calls = counters.read() if ended is None else counters.total(ended)
    processes = None if ended is None else [{**each, "hosts": sorted(each["hosts"])} for each in ended]
    return {
        "hosts": [_host(each, calls) for each in HOSTS],
        "counters": None if counters_file is None else str(counters_file),
        "processes": processes,
    }


def _host(host: Host, calls: Mapping[str, counters.Counts]) -> dict[str, Any]:
    version = _version(host.package)
    return {
        "host": host.name,
        "title": host.title,
        "package": host.package,
        "version": version,
        "tested": None if version is None else is_tested(host, version),
        "tested_versions": host.tested,
        "tested_how": "its calls recorded and answered" if host.read_only else "run with it",
        "active": is_active(host),
        "write": list(host.write),
        "calls": calls.get(host.name, counters.Counts(served=0, passed_on={})),
        "cannot": list(host.cannot),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_tested(host: Host, version: str) -> bool:
    """Whether a version of the host's package is one of the tested ones; local parts (+cu130) do not count."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        public = Version(version).public
    except InvalidVersion:
        return False
    return SpecifierSet(host.tested).contains(public, prereleases=True)


def is_active(host: Host) -> bool:
    """Whether the host runs on jit_kernel in this process: by its environment, or by a call that it has made."""
    if host.name == "LOCAL_KERNELS":
        return str(config.package_dir() / "integrations" / "local_kernels") in config.local_kernels()
    module = sys.modules.get(_HERE + host.name)
    return host.name in config.plugins() or (module is not None and bool(module.is_active()))


def text(facts: Mapping[str, Any]) -> str:
    """The report for a person."""
    lines: list[str] = []
    for each in facts["hosts"]:
        lines += [f"{each['title']}: {_installed(each)}, {'active' if each['active'] else 'not active'} here"]
        lines += [f"  write   {line}" for line in each["write"]]
        lines += [f"  calls   {line}" for line in _calls(each["calls"])]
        lines += [f"  cannot  {line}" for line in each["cannot"]]
        lines.append("")
    if facts["processes"] is None:
        lines.append(
            "Calls are this process's. Programs under JIT_KERNEL_COUNTERS=FILE add theirs to a file, when they"
        )
        lines.append("end: python -m jit_kernel hosts --counters FILE")
    else:
        number = len(facts["processes"])
        lines.append(f"Calls are those of {number} process{'' if number == 1 else 'es'} in {facts['counters']}")
        lines += [
            f"  {each['ended']}  process {each['process']}  {each['program']}: {', '.join(each['hosts'])}"
            for each in facts["processes"]
        ]
    return "\n".join(lines)


def _installed(each: Mapping[str, Any]) -> str:
    if each["version"] is None:
        return f"{each['package']} is not installed (tested: {each['tested_versions']}: {each['tested_how']})"
    tested = "tested" if each["tested"] else "not tested"
    return f"{each['package']} {each['version']}, {tested} ({each['tested_versions']}: {each['tested_how']})"


def _calls(calls: counters.Counts) -> list[str]:
    if not calls["served"] and not calls["passed_on"]:
        return []
    passed_on = [f"{number} passed on: {reason}" for reason, number in sorted(calls["passed_on"].items())]
    return [f"{calls['served']} served", *passed_on]
