"""`python -m jit_kernel doctor`: what is here, what was chosen and why, and what each device can run."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from typing import Any

import jit_kernel
from jit_kernel import config, moore_threads
from jit_kernel.device import Target, cpu_target, device_target, get_device_capability
from jit_kernel.engine import compiler
from jit_kernel.engine.entry import size_of
from jit_kernel.engine.store import CacheError, Store
from jit_kernel.fa3 import dispatch
from jit_kernel.fa3.decision import Decision, Rejected

_PACKAGES = (
    *("torch", "apache-tvm-ffi", "triton", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"),
    *("nvidia-cuda-runtime", "nvidia-cuda-crt", "torchada", "transformers"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; answers with its exit status, 0."""
    parser = argparse.ArgumentParser(
        prog="python -m jit_kernel doctor", description="Devices, compilers, versions, cache and implementations."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    facts = report()
    print(json.dumps(facts, indent=1) if options.json else text(facts))
    return 0


def report() -> dict[str, Any]:
    """Everything that doctor knows, as plain data. Compilers are asked for their version; nothing is written."""
    return {
        "versions": _versions(),
        "devices": _devices(),
        "musa": {part.name: str(part) for part in moore_threads.probe().parts},
        "compilers": {route: _compilers(route) for route in compiler.ROUTES},
        "cache": _cache(),
        "implementations": _implementations(),
        "settings": config.given_settings(),
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"jit_kernel": jit_kernel.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _devices() -> dict[str, dict[str, Any]]:
    import torch

    devices: dict[str, dict[str, Any]] = {
        "cpu": {"target": str(cpu_target()), "name": platform.processor() or platform.machine()}
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            name = f"cuda:{index}"
            devices[name] = {
                "target": str(device_target(name)),
                "name": torch.cuda.get_device_name(index),
                "capability": get_device_capability(name),
            }
            others = [other for other in range(torch.cuda.device_count()) if other != index]
            if others:  # whose memory context parallelism maps; from elsewhere NCCL brings it
                devices[name]["peers"] = [o for o in others if torch.cuda.can_device_access_peer(index, o)]
    if moore_threads.probe().usable:
        devices["musa"] = {"target": str(device_target("musa")), "capability": get_device_capability("musa")}
    return devices


def _compilers(route: str) -> list[dict[str, Any]]:
    """Every compiler of a route; the one that is taken comes first."""
    try:
        chosen = compiler.find(route)
        found = compiler.host_compilers() if route == "host" else [chosen] if chosen else []
    except compiler.CompilerNotFoundError as error:
        return [{"chosen": False, "problem": str(error)}]
    if not found:
        try:
            compiler.require(route)
        except compiler.CompilerNotFoundError as error:
            return [{"chosen": False, "problem": str(error)}]
    described = []
    for each in found:
        try:
            version = compiler.identify(each).splitlines()[0]
        except compiler.CompilerNotFoundError as error:
            version = f"unusable: {error}"
        reason = each.reason if each == found[0] else f"{found[0].name} is taken first"
        described.append(
            {
                "chosen": each == found[0],
                "name": each.name,
                "path": str(each.path),
                "version": version,
                "reason": reason,
            }
        )
    return described


def _cache() -> dict[str, Any]:
    store = Store(config.cache_dir())
    state: dict[str, Any] = {"folder": str(store.root), "exists": os.path.isdir(store.root)}
    try:
        store.check()
    except CacheError as error:
        return {**state, "problem": str(error)}
    sizes = [size_of(folder) for folder, _ in store.manifests()]
    state["entries"] = len(sizes)
    state["bytes"] = sum(sizes)
    state["limit"] = config.settings().cache_limit
    state["layers"] = [str(layer) for layer in config.cache_layers()]
    place = store.root
    while not os.path.exists(place):
        place = place.parent
    state["writable"] = os.access(place, os.W_OK | os.X_OK)
    return state


def _implementations() -> dict[str, dict[str, str]]:
    """For each device that is present, what every implementation for it answers."""
    targets: dict[str, Target] = {name: device_target(name) for name in _devices()}
    answers: dict[str, dict[str, str]] = {}
    for name, target in targets.items():
        answers[name] = {
            implementation: _answer(dispatch.supports(implementation, target))
            for implementation in config.IMPLEMENTATIONS[target.vendor]
        }
    for vendor in config.IMPLEMENTATIONS:
        if not any(target.vendor == vendor for target in targets.values()):
            absent = f"Rejected: no {vendor} device is present"
            answers[vendor] = dict.fromkeys(config.IMPLEMENTATIONS[vendor], absent)
    return answers


def _answer(decision: Decision) -> str:
    return f"Rejected: {decision.reason}" if isinstance(decision, Rejected) else "Accepted"


def text(facts: dict[str, Any]) -> str:
    """The report for a person."""
    lines = ["versions"]
    lines += [f"  {name:24} {version or 'not installed'}" for name, version in facts["versions"].items()]
    lines.append("devices")
    for name, device in facts["devices"].items():
        lines.append(f"  {name:8} {device['target']}  {device.get('name', '')}".rstrip())
    lines.append("compilers (the first of a route is taken)")
    for route, found in facts["compilers"].items():
        for each in found:
            if "problem" in each:
                lines.append(f"  {route:8} none: {each['problem']}")
            else:
                lines.append(f"  {route:8} {each['path']}: {each['version']} ({each['reason']})")
    lines.append("implementations")
    for device, answers in facts["implementations"].items():
        lines += [f"  {device:8} {name:10} {answer}" for name, answer in answers.items()]
    lines.append("Moore Threads software")
    lines += [f"  {part}" for part in facts["musa"].values()]
    lines.append("cache")
    lines += [f"  {key:10} {value}" for key, value in facts["cache"].items()]
    lines.append("settings")
    lines += [f"  {key}={value}" for key, value in facts["settings"].items()] or ["  none set"]
    return "\n".join(lines)
