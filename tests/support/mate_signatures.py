"""The signatures of MATE's wrapper in each of its versions."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch

DATA = Path(__file__).parents[1] / "data"


VERSIONS = ("0.1.3", "0.2.0", "0.2.1", "0.2.2")


def wrapper_signatures(version: str) -> dict[str, inspect.Signature]:
    """The recorded signatures of a version's wrapper, by function."""
    peers = json.loads((DATA / "peer_signatures.json").read_text())
    key = next(k for k in peers if k.startswith(f"mate v{version} wrappers/flash-attention"))
    return {name: _signature(parameters) for name, parameters in peers[key].items()}


def _signature(parameters: list[dict[str, str]]) -> inspect.Signature:
    def default(text: str) -> Any:
        return torch.bfloat16 if text == "torch.bfloat16" else eval(text, {}, {})

    return inspect.Signature(
        [
            inspect.Parameter(
                p["name"],
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=default(p["default"]) if "default" in p else inspect.Parameter.empty,
            )
            for p in parameters
        ]
    )
