"""A small language model learns a file of Python's standard library on the CPU, with jit_kernel's gradients.

    python examples/finetune.py [--seconds 60] [--picture losses.png]

Twice from the same weights and the same order of batches: once its attention is jit_kernel's, once torch's SDPA. Both
curves should lie on each other; the picture (which wants matplotlib) shows them, the last lines print them.
"""

from __future__ import annotations

import argparse
import textwrap
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jit_kernel

LENGTH, WIDTH, HEADS, LAYERS, BATCH = 128, 128, 4, 2, 8


def by_jit_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q, k, v (b, s, h, d)."""
    out = jit_kernel.flash_attn_func(q, k, v, causal=True)
    assert isinstance(out, Tensor)
    return out


def by_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by torch's SDPA."""
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class Layer(nn.Module):
    """Attention and a wide layer, each beside its input."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = by_jit_kernel
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, HEADS, -1)).unbind(2)
        x = x + self.out(self.attend(q, k, v).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.between(x))))


class Model(nn.Module):
    """Bytes in, the next byte's logits out."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.logits = nn.Linear(WIDTH, 256)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.logits(self.layers(self.tokens(x) + self.places.weight))
        return found


def trained(text: Tensor, *, ours: bool, seconds: float, steps: int | None) -> list[float]:
    """The loss of every step, of as many as fit into the time, or of so many."""
    torch.manual_seed(0)
    model, numbers = Model(), torch.Generator().manual_seed(0)
    for layer in model.layers:
        layer.attend = by_jit_kernel if ours else by_torch
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses: list[float] = []
    end = time.monotonic() + seconds
    while len(losses) < steps if steps is not None else time.monotonic() < end:
        starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=numbers)
        rows = torch.stack([text[start : start + LENGTH + 1] for start in starts.tolist()])
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """Both curves as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for (name, losses), style in zip(curves.items(), ("-", "--"), strict=True):
        axes.plot(losses, style, label=name)
    axes.set(xlabel="step", ylabel="loss, nats a byte", title=f"{LAYERS} layers learn {Path(textwrap.__file__).name}")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train twice, print and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the first training takes")
    parser.add_argument("--picture", type=Path, help="where to write the curves")
    options = parser.parse_args()
    text = torch.frombuffer(bytearray(Path(textwrap.__file__).read_bytes()), dtype=torch.uint8).long()
    trained(text, ours=True, seconds=0.0, steps=1)  # compiles what is not there yet
    ours = trained(text, ours=True, seconds=options.seconds, steps=None)
    theirs = trained(text, ours=False, seconds=0.0, steps=len(ours))
    apart = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    print(f"{len(ours)} steps: loss {ours[0]:.3f} -> {ours[-1]:.3f} by jit_kernel, {theirs[-1]:.3f} by torch's SDPA")
    print(f"at most {apart:.2%} apart")
    if options.picture is not None:
        draw({"jit_kernel": ours, "torch's SDPA": theirs}, options.picture)


if __name__ == "__main__":
    main()
