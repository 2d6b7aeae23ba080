"""Draw docs/img/*.png from the last whole run of each benchmark: our figure and the peer's beside each other.

Axes are linear and begin at 0; every bar carries its number and unit; the line below says where and when.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import record

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

IMAGES = record.RESULTS.parent.parent / "docs" / "img"
OURS, PEER, BOUND = "#2a6f97", "#b8bec4", "#c1121f"
Line = dict[str, Any]


@dataclass
class Row:
    """One case of a panel: what was measured, our figure, the peer's, and what bounds both."""

    label: str
    ours: float
    peer: float | None = None
    bound: float | None = None


@dataclass
class Panel:
    """Cases that share an axis."""

    title: str
    unit: str
    rows: list[Row]
    peer: str = ""
    bound: str = ""
    digits: int = 0
    less_is_better: bool = False

    @property
    def largest(self) -> float:
        """The largest number on its axis, which panels of one unit share."""
        return max(max(row.ours, row.peer or 0, row.bound or 0) for row in self.rows)


def chart(name: str, title: str, panels: list[Panel], caption: str, width: float = 9.5) -> None:
    """One picture of panels below each other, as high as their rows need."""
    panels = [panel for panel in panels if panel.rows]
    if not panels:
        return
    bars = [sum(1 + (row.peer is not None) for row in panel.rows) + 1.6 for panel in panels]
    height = 0.21 * sum(bars) + 0.62 * len(panels) + 0.9
    figure, places = plt.subplots(
        len(panels), 1, figsize=(width, height), height_ratios=bars, squeeze=False, layout="constrained"
    )
    for axes, panel in zip(places[:, 0], panels, strict=True):
        draw_panel(axes, panel, max(other.largest for other in panels if other.unit == panel.unit))
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel(caption, fontsize=8, color="#444444", x=0.01, ha="left")
    IMAGES.mkdir(parents=True, exist_ok=True)
    path: Path = IMAGES / f"{name}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"drew {path.relative_to(IMAGES.parent.parent)}")


def draw_panel(axes: Any, panel: Panel, largest: float) -> None:
    """Horizontal bars, ours above the peer's; their numbers stand in them, or behind those too short for it."""
    width, at, ticks = 1.12 * largest, 0.0, []

    def bar(y: float, value: float, color: str, more: str = "") -> None:
        axes.barh(y, value, 0.9, color=color)
        is_long = value > 0.32 * width and color == OURS
        where = (
            {"x": value - 0.008 * width, "ha": "right", "color": "white"} if is_long else {"x": value + 0.006 * width}
        )
        axes.text(y=y, s=f"{value:.{panel.digits}f} {panel.unit}{more}", va="center", fontsize=8, **where)

    for row in panel.rows:
        top = at - 0.5
        ratio = f",  {row.ours / row.peer:.2f} times {panel.peer}" if row.peer and not panel.less_is_better else ""
        ticks.append(at + (0.45 if row.peer is not None else 0))
        bar(at, row.ours, OURS, ratio)
        if row.peer is not None:
            at += 0.95
            bar(at, row.peer, PEER)
        if row.bound is not None:
            axes.plot([row.bound] * 2, [top, at + 0.5], color=BOUND, linewidth=1.4)
        at += 1.45
    axes.set_yticks(ticks, [row.label for row in panel.rows], fontsize=8)
    axes.set_ylim(at - 0.7, -0.8)
    axes.set_xlim(0, width)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(panel.unit, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    keys = [Patch(color=OURS, label="jit_kernel")]
    keys += [Patch(color=PEER, label=panel.peer)] * bool(panel.peer)
    keys += [Line2D([], [], color=BOUND, label=panel.bound)] * bool(panel.bound)
    has_key = len(keys) > 1
    axes.set_title(panel.title, fontsize=10, loc="left", pad=20 if has_key else 6)
    if has_key:
        axes.legend(
            handles=keys, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8, frameon=False, borderaxespad=0.1
        )


def caption(line: Line, *more: str) -> str:
    """Where and when a run was made, and with what."""
    day = datetime.datetime.fromisoformat(line["date"].replace("Z", "+00:00"))
    facts = [line["device"], *more, f"torch {line['torch']}", f"commit {line['commit']}", f"{day:%d %B %Y}".lstrip("0")]
    return ", ".join(facts)


def loader() -> None:
    """The first call with an empty and with a filled store, and the smallest call."""
    lines = record.latest("loader")
    if not lines:
        return
    first = {
        state: [Row(line["dtype"], line["first_call_s"] * scale) for line in lines if line["case"] == state]
        for state, scale in (("cold", 1), ("loaded", 1e3))
    }
    small = [Row("b = 1, one token, one head of 64", x["ours_us"], x["torch_sdpa_us"]) for x in lines if "ours_us" in x]
    panels = [
        Panel("First call, empty store: the kernel is compiled", "s", first["cold"], digits=1),
        Panel("First call of the next process: the kernel is loaded", "ms", first["loaded"], digits=1),
        Panel("Smallest call, from Python to return", "µs", small, "torch SDPA", digits=1, less_is_better=True),
    ]
    chart("loader", "What a call costs before its arithmetic, on a CPU (shorter is better)", panels, caption(lines[0]))


def cpu_case(case: str) -> str:
    """ "bf16 decode batch 8 32/8 page 16" in words."""
    dtype, kind, *words = case.split()
    if kind == "prefill":
        tokens, d, *mask = words
        return f"{dtype}, {tokens} tokens, head size {d[1:]}{', causal' if mask else ''}"
    _, batch, heads, *pages = words
    query_heads, kv_heads = heads.split("/")
    layout = f", pages of {pages[1]}" if pages else ""
    return f"{dtype}, batch {batch}, {query_heads} query and {kv_heads} kv heads{layout}"


def cpu_attention() -> None:
    """Prefill in GFLOP/s and decode in GB/s beside torch's SDPA and the machine's own peaks."""
    lines = [line for line in record.latest("cpu_attention") if line.get("ratio")]
    if not lines:
        return
    panels = []
    targets = list(dict.fromkeys(line["target"] for line in lines))
    for target in targets:
        where = f", compiled for {target}" if len(targets) > 1 else ""
        for kind, title, bound in (
            ("prefill", "Prefill, 8 heads, one sequence", "peak of this machine's product instructions, same run"),
            (
                "decode",
                "Decode, one token a sequence, 4096 keys of size 128",
                "reading memory and nothing else, same run",
            ),
        ):
            mine = [line for line in lines if line["target"] == target and kind in line["case"].split()]
            mine.sort(key=lambda line: ("bf16", "fp16", "fp32").index(line["case"].split()[0]))
            rows = [
                Row(cpu_case(x["case"]), x["rate"], x["rate"] / x["ratio"], x["peak_rate"]) for x in mine
            ]  # fmt: skip
            unit, digits = ("GFLOP/s", 0) if kind == "prefill" else ("GB/s", 1)
            panels.append(Panel(f"{title}{where}", unit, rows, "torch SDPA", bound, digits))
    title = "Attention on a CPU and torch's SDPA in the same run (longer is better)"
    chart("cpu_attention", title, panels, caption(lines[0], f"{lines[0]['threads']} threads"))


def prefill_panels(lines: list[Line], ours: str, peer: str, length: str, name: str) -> list[Panel]:
    """A panel for each head size; the arguments name the fields of a line."""
    panels = []
    for size in dict.fromkeys(line["head_dim"] for line in lines):
        rows = [
            Row(f"{x[length]} tokens, {'causal' if x['causal'] else 'no mask'}", x[ours], x[peer])
            for x in lines
            if x["head_dim"] == size
        ]
        panels.append(Panel(f"Prefill, head size {size}", "TFLOP/s", rows, name))
    return panels


def hopper_prefill() -> None:
    """The 18 cells beside cuDNN."""
    lines = record.latest("hopper_prefill", case="prefill", dtype="torch.bfloat16")
    if not lines:
        return
    panels = prefill_panels(lines, "ours_tflops", "cudnn_tflops", "length", "cuDNN")
    major, rest = divmod(lines[0]["cudnn"], 10000)
    where = caption(lines[0], "16384 tokens a call", f"cuDNN {major}.{rest // 100}.{rest % 100}")
    chart("hopper_prefill", "Hopper kernels and cuDNN in the same run, bf16 (longer is better)", panels, where)


def portable() -> None:
    """Prefill beside FlashAttention 2, decode beside a copy of memory."""
    lines = record.latest("portable")
    prefill = [line for line in lines if line["case"] == "prefill"]
    if not prefill:
        return
    panels = prefill_panels(prefill, "tflops", "peer_tflops", "seqlen", "FlashAttention 2")
    copy = next((line["gbytes_per_s"] for line in lines if line["case"] == "copy"), None)
    rows = [
        Row(
            f"batch {x['batch']}, {x['keys']} keys, {x['heads']}/{x['kv_heads']} heads of {x['head_dim']}, "
            f"pages of {x['page_size']}, {x['tokens']} token{'s' * (x['tokens'] > 1)}",
            x["gbytes_per_s"],
            bound=copy,
        )
        for x in lines
        if x["case"] == "decode" and x.get("cache", "bfloat16") == "bfloat16"
    ]
    bound = f"a copy of 2 GiB, read and written, same run: {copy:.0f} GB/s" if copy else ""
    panels.append(Panel("Paged decode: keys and values read", "GB/s", rows, bound=bound))
    title = "Portable kernels and FlashAttention 2 in torch in the same run, bf16 (longer is better)"
    chart("portable", title, panels, caption(lines[0], "prefill of 16384 tokens a call"))


def main() -> None:
    """Draw what there are results for."""
    for draw in (loader, cpu_attention, hopper_prefill, portable):
        draw()


if __name__ == "__main__":
    main()
