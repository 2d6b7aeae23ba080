"""Continuous batching with transformers' generate_batch: requests of different lengths, beside torch's SDPA.

usage: python examples/serve.py [--device cpu|cuda] [--requests 16] [--new-tokens 32] [--layers 4] [--preload PROFILE]

A small random Llama answers the same requests twice, with attn_implementation "sdpa" and with jit_kernel's; each is a
model of its own with the same weights. The program prints tokens per second of either, and ends with status 1 where a
token differs, or where a kernel was compiled or loaded after --preload. Nothing is fetched.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import jit_kernel
from jit_kernel import jit
from jit_kernel.integrations import counters
from jit_kernel.integrations import transformers as client

NAMES = ("sdpa", client.FLASH_NAME)  # generate_batch wants "flash" in the name of what is not its own


def main() -> int:
    """Serve the requests with both; 0 when every token is the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--preload", metavar="PROFILE", help="be ready first: what JIT_KERNEL_RECORD wrote is loaded")
    options = parser.parse_args()
    if options.preload:
        print(f"ready: {jit_kernel.preload(options.preload)}")
        jit_kernel.seal()
    known = len(jit.events())
    client.register()
    logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    lengths = [20 + 37 * (number * 7 % min(options.requests, 50)) for number in range(options.requests)]
    random = torch.Generator().manual_seed(1)
    requests = [torch.randint(3, 1000, (n,), generator=random).tolist() for n in lengths]
    print(f"{options.requests} requests of {min(lengths)} to {max(lengths)} tokens on {options.device}")
    weights = model_of("sdpa", options).state_dict()
    answers = {}
    for name in NAMES:
        model = model_of(name, options)
        model.load_state_dict(weights)
        serve(model, requests[:2], 4)  # compiles, or loads
        counters.clear()
        answers[name], seconds = serve(model, requests, options.new_tokens)
        told = "" if name == "sdpa" else f"   {counters.read()['transformers']['served']} calls of jit_kernel"
        print(f"  {name:18s}{options.requests * options.new_tokens / seconds:8.1f} tokens/s{told}")
    same = answers[NAMES[0]] == answers[NAMES[1]]
    print("every token is the same" if same else "tokens differ")
    after = jit.events()[known:]
    if options.preload:
        print(f"{len(after)} kernels were compiled or loaded after ready")
    return 0 if same and not (options.preload and after) else 1


def model_of(name: str, options: argparse.Namespace) -> Any:
    """A random Llama with grouped heads, of an attention implementation; float32 on a CPU, so that no tie decides."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=1024, num_hidden_layers=options.layers,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, pad_token_id=0,
        bos_token_id=1, eos_token_id=None, attn_implementation=name,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.to(options.device, torch.float32 if options.device == "cpu" else torch.bfloat16)


def serve(model: Any, requests: list[list[int]], new_tokens: int) -> tuple[list[list[int]], float]:
    """The new tokens of each request, in order, and the seconds that all took together."""
    greedy = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    pages = sum(-(-(len(request) + new_tokens) // 64) for request in requests)
    settings = ContinuousBatchingConfig(  # else the cache takes what memory is free
        page_size=64, num_blocks=min(2 * pages, 1024), max_batch_tokens=2048, auto_switch_to_flash=False
    )
    began = time.perf_counter()
    found = model.generate_batch(
        requests, generation_config=greedy, continuous_batching_config=settings, progress_bar=False
    )
    seconds = time.perf_counter() - began
    by_prompt = {tuple(answer.prompt_ids): list(answer.generated_tokens) for answer in found.values()}
    return [by_prompt[tuple(request)] for request in requests], seconds


if __name__ == "__main__":
    sys.exit(main())
