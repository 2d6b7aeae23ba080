"""transformers on a GPU: prefill and decode through jit_kernel beside transformers' own attention, and their tokens.

    python benchmarks/transformers_gpu.py [--only llama mistral gemma2] [--rounds 5] [--device cuda|cpu] [--dry-run]

Random models of 8 layers in bf16: a Llama with grouped heads, a Mistral with a window, a Gemma2 with window and
softcap; 8 prompts of 2,048 tokens, 64 new ones. The peer is "sdpa", and for Gemma2, whose softcap transformers' sdpa
refuses, "eager". Each implementation has a model with a config object of its own, and the same weights; prefill and
decode take turns with the peer's, and the medians stand in the line.

Tokens are compared on one sequence: the peer's greedy tokens are fed to the peer, to ours and to the peer with the
same weights in float32. A step is clear where float32's two likeliest logits are further apart than twice the peer's
largest error from float32: there the peer's token is float32's, and ours must be. The other steps are ties in bf16,
where either token is right; the line counts both. --device cpu runs the same program on small sizes.
Appends JSON lines to benchmarks/results/transformers_gpu.jsonl.

A machine without a network wants these wheels (transformers 5.23.0), most of them pure Python: transformers,
huggingface_hub, tqdm, packaging, filelock, fsspec, typer, click, annotated_doc, httpx2, httpcore2, h11, anyio, idna,
truststore, pydantic, annotated_types, typing_inspection, rich, shellingham, markdown_it_py, mdurl, pygments,
typing_extensions; and binary ones: tokenizers, safetensors, hf_xet (abi3, any Python); regex, pyyaml, pydantic_core,
numpy (for this Python).
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import record  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from jit_kernel.integrations import counters  # noqa: E402
from jit_kernel.integrations import transformers as client  # noqa: E402

Line = dict[str, Any]
LARGE = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 8192, "num_hidden_layers": 8,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
SMALL = {
    "vocab_size": 500, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip
WINDOWS = ["sliding_attention", "full_attention"]
# By name: the configuration, what it has beside the sizes, and the peer.
MODELS: dict[str, tuple[str, Callable[[int, int], Line], str]] = {
    "llama": ("LlamaConfig", lambda layers, window: {}, "sdpa"),
    "mistral": ("MistralConfig", lambda layers, window: {"sliding_window": window}, "sdpa"),
    "gemma2": (
        "Gemma2Config",
        lambda layers, window: {
            "sliding_window": window, "layer_types": WINDOWS * (layers // 2), "attn_logit_softcapping": 50.0,
            "query_pre_attn_scalar": 128,
        },
        "eager",
    ),
}  # fmt: skip


def main() -> None:
    """Measure each model, print a table and append it to results/transformers_gpu.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dry-run", action="store_true", help="print, and write nothing")
    parser.add_argument("--folder", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    client.register()
    lines = []
    for name in options.only:
        line = measure(name, options.device, options.rounds)
        lines.append(line)
        ratios = f"prefill {line['prefill_ratio']:.2f} x, decode {line['decode_ratio']:.2f} x {line['peer']}"
        same = "tokens equal" if line["tokens_equal"] else f"{line['clear_tokens_that_differ']} TOKENS DIFFER"
        same += f" in {line['clear_steps']} clear steps of {line['steps']}, {line['ties_that_differ']} in ties"
        same += f"; logits {line['logits_error_ratio']:.2f} of the peer's error"
        print(f"{name}: {ratios}; {same}")
    if not options.dry_run:
        print(record.write("transformers_gpu", lines, "cuda:0" if options.device == "cuda" else "cpu", options.folder))


def measure(name: str, device: str, rounds: int) -> Line:
    """One model, through jit_kernel and through its peer."""
    sizes = dict(LARGE if device == "cuda" else SMALL)
    batch, prompt, steps, window = (8, 2048, 64, 1024) if device == "cuda" else (2, 96, 8, 32)
    peer = MODELS[name][2]
    models = {each: model_of(name, each, sizes, window, prompt + steps, device) for each in (peer, client.NAME)}
    models[client.NAME].load_state_dict(models[peer].state_dict())
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(3, sizes["vocab_size"], (batch, prompt), generator=random).to(device)
    tokens, peer_logits = generate(models[peer], ids, steps)  # also compiles, or loads
    counters.clear()
    _, our_logits = generate(models[client.NAME], ids, steps, tokens)
    served = counters.read()["transformers"]
    if served["served"] != sizes["num_hidden_layers"] * steps or served["passed_on"]:
        raise RuntimeError(f"{name}: {served} calls; jit_kernel must serve every layer of every step")
    times: dict[str, dict[str, list[float]]] = {each: {"prefill": [], "decode": []} for each in models}
    for turn in range(rounds):
        for each in models if turn % 2 else reversed(models):
            for part, seconds in timed(models[each], ids, steps).items():
                times[each][part].append(seconds)
    line: Line = {"case": name, "peer": peer, "transformers": transformers.__version__, "batch": batch,
                  "prompt": prompt, "new_tokens": steps, "window": window if name != "llama" else None,
                  **{key: sizes[key] for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")},
                  "head_dim": sizes["head_dim"], "dtype": "bfloat16"}  # fmt: skip
    for part in ("prefill", "decode"):
        ours, theirs = (statistics.median(times[each][part]) for each in (client.NAME, peer))
        line |= {f"{part}_ms": ours * 1e3, f"{part}_peer_ms": theirs * 1e3, f"{part}_ratio": theirs / ours}
    del models[client.NAME]
    _, exact = generate(copy.deepcopy(models.pop(peer)).float(), ids, steps, tokens)
    return line | judged(peer_logits, our_logits, exact)


def model_of(name: str, implementation: str, sizes: Line, window: int, longest: int, device: str) -> Any:
    """A random model with a config object of its own."""
    config_name, others, _ = MODELS[name]
    config = getattr(transformers, config_name)(
        **sizes, **others(sizes["num_hidden_layers"], window), max_position_embeddings=longest, pad_token_id=0,
        bos_token_id=1, eos_token_id=None, tie_word_embeddings=False, attn_implementation=implementation,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    model = model.to(torch.bfloat16).eval()
    if model.config._attn_implementation != implementation:
        raise RuntimeError(f"the model took {model.config._attn_implementation}, not {implementation}")
    return model


def generate(
    model: Any, ids: torch.Tensor, steps: int, given: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(b, steps) greedy tokens, and the (b, steps, vocabulary) logits that chose them.

    given: (b, steps) tokens to go on with, step by step, in place of the model's own.
    """
    tokens, logits, cache, following = [], [], None, ids
    for step in range(steps):
        found = model(input_ids=following, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, chosen = found.past_key_values, found.logits[:, -1:].argmax(dim=-1)
        following = chosen if given is None else given[:, step : step + 1]
        tokens.append(chosen)
        logits.append(found.logits[:, -1].float())
    return torch.cat(tokens, dim=1), torch.stack(logits, dim=1)


def timed(model: Any, ids: torch.Tensor, steps: int) -> dict[str, float]:
    """Seconds of the prompt's forward pass, and of a step behind it."""
    settle(ids)
    began = time.perf_counter()
    found = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    settle(ids)
    first = time.perf_counter()
    for _ in range(steps):
        following = found.logits[:, -1:].argmax(dim=-1)
        found = model(input_ids=following, past_key_values=found.past_key_values, use_cache=True, logits_to_keep=1)
    settle(ids)
    return {"prefill": first - began, "decode": (time.perf_counter() - first) / steps}


def settle(tensor: torch.Tensor) -> None:
    """Wait for the device."""
    if tensor.device.type == "cuda":
        torch.cuda.synchronize()


def judged(peer: torch.Tensor, ours: torch.Tensor, exact: torch.Tensor) -> Line:
    """Tokens and errors of logits (b, steps, vocabulary) of the same tokens: the peer's, ours, and float32's.

    A step is clear where exact's two largest are further apart than twice the peer's largest error: no error of that
    size, up in one and down in the other, makes another token the likeliest.
    """
    best = exact.topk(2, dim=-1).values
    clear = best[..., 0] - best[..., 1] > 2 * (peer - exact).abs().amax(dim=-1)
    differ = ours.argmax(dim=-1) != exact.argmax(dim=-1)
    our_error, peer_error = (float((each - exact).double().square().mean().sqrt()) for each in (ours, peer))
    return {
        "steps": clear.numel(),
        "clear_steps": int(clear.sum()),
        "tokens_equal": bool(clear.any()) and not bool((differ & clear).any()),
        "clear_tokens_that_differ": int((differ & clear).sum()),
        "ties_that_differ": int((differ & ~clear).sum()),
        "peer_ties_that_differ": int(((peer.argmax(dim=-1) != exact.argmax(dim=-1)) & ~clear).sum()),
        "logits_error": our_error,
        "peer_logits_error": peer_error,
        "logits_error_ratio": our_error / peer_error,
        "logits_deviation": float(exact.std()),
    }


if __name__ == "__main__":
    main()
