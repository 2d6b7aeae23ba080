"""Draw docs/img/*.png from the last recorded run of each benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import record

matplotlib.use("Agg")
from matplotlib import pyplot as plt

IMAGES = record.RESULTS.parent.parent / "docs" / "img"
OURS, PEER = "#2a6f97", "#b0b0b0"
COLORS = (OURS, "#61a5c2", "#a9d6e5")


def loader(lines: list[dict[str, Any]]) -> None:
    """Seconds of a first call, cold and from the store, on a logarithmic axis."""
    calls = [line for line in lines if line["case"] in ("cold", "loaded")]
    labels = [f"{line['dtype']}\n{line['case']}" for line in calls]
    figure, axes = plt.subplots(figsize=(7, 3.5))
    values = [line["first_call_s"] for line in calls]
    bars = axes.bar(labels, values, color=[OURS if line["case"] == "loaded" else PEER for line in calls])
    axes.bar_label(bars, [f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.1f} s" for value in values])
    axes.set_yscale("log")
    axes.set_ylim(top=2 * max(values))
    axes.set_ylabel("seconds")
    axes.set_title("First call on a CPU: compiled, and loaded by the next process")
    _save(figure, "loader")


def ratios(name: str, key: str, title: str, **fields: object) -> None:
    """How many times faster than the peer each case of a benchmark is; `key` holds the ratio, `fields` choose cases.
    A bar for each target.
    """
    lines = [line for line in record.latest(name, **fields) if line.get(key)]
    if not lines:
        return
    targets = list(dict.fromkeys(line.get("target", "") for line in lines))
    labels = list(dict.fromkeys(_label(line) for line in lines))
    height = 0.8 / len(targets)
    figure, axes = plt.subplots(figsize=(8, (0.15 + 0.2 * len(targets)) * len(labels) + 1.2))
    for i, target in enumerate(targets):
        mine = [line for line in lines if line.get("target", "") == target]
        places = [labels.index(_label(line)) + (i - (len(targets) - 1) / 2) * height for line in mine]
        color = COLORS[i % len(COLORS)]
        bars = axes.barh(places, [line[key] for line in mine], height, color=color, label=target)
        axes.bar_label(bars, [f"{line[key]:.2f}" for line in mine], padding=3, fontsize=8)
    axes.set_yticks(range(len(labels)), labels)
    if len(targets) > 1:
        axes.legend(loc="lower right", fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(right=1.3 * max(line[key] for line in lines))
    axes.invert_yaxis()
    axes.set_xlabel("times the peer's speed")
    axes.set_title(title)
    _save(figure, name)


def _label(line: dict[str, Any]) -> str:
    """A case in a few words."""
    if "head_dim" not in line:
        return str(line["case"])
    mask = "causal" if line.get("causal") else "no mask"
    return f"d {line['head_dim']}, {line.get('length', line.get('seqlen'))}, {mask}"


def _save(figure: Any, name: str) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    path: Path = IMAGES / f"{name}.png"
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"drew {path.relative_to(IMAGES.parent.parent)}")


def main() -> None:
    """Draw what there are results for."""
    lines = record.latest("loader")
    if lines:
        loader(lines)
    ratios("cpu_attention", "ratio", "Attention on a CPU against torch SDPA, same run, equal threads")
    ratios(
        "hopper_prefill",
        "over_cudnn",
        "Hopper prefill on an H200 against cuDNN, bf16, same run",
        case="prefill",
        dtype="torch.bfloat16",
    )
    ratios("portable", "share", "Portable prefill on an H200 against FlashAttention 2 in torch, same run")


if __name__ == "__main__":
    main()
