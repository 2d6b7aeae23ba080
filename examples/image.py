"""An image from a tiny Flux pipeline of diffusers, by torch's SDPA and by jit_kernel, on the CPU or a CUDA GPU.

The weights are random, from a seed: nothing is fetched, and the picture shows nothing. Both ways begin with the same
noise, in turns. With jit_kernel the transformer's attention goes by diffusers' dispatcher, the autoencoder's, which
never asks it, by SDPA. The program writes both pictures side by side into a PNG, prints the times and the difference,
and ends with status 1 where a colour differs by more than rounding can explain.

    pip install '.[diffusers,transformers]'
    python examples/image.py --size 256 --out image.png
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.models.attention_dispatch import attention_backend
from diffusers.utils import logging
from PIL import Image
from torch import Tensor

from jit_kernel.integrations import counters, sdpa
from jit_kernel.integrations import diffusers as jit_kernel_diffusers

STEPS, PASSES = 4, 3
WAYS = ("sdpa", "jit_kernel")
# How far two colours of 0 to 255 may be apart, and which share of them may differ: in fp32 only values that lie between
# two levels, where a softmax scale that is off by 2 % changes 12 %; in bf16 rounding errors grow from layer to layer.
LIMITS = {torch.float32: (1, 0.01), torch.bfloat16: (12, 1.0)}


def main() -> int:
    """Make the image both ways, compare; 0 when they agree."""
    options = parsed()
    logging.set_verbosity_error()
    pipeline, embeddings = made(options.device, options.dtype)
    jit_kernel_diffusers.register()
    tokens = (options.size // pipeline.vae_scale_factor // 2) ** 2
    print(f"Flux with random weights, {options.size} x {options.size}, {tokens} tokens, {options.dtype} on "
          f"{options.device}, {STEPS} steps")  # fmt: skip
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    images: dict[str, Tensor] = {}
    for turn in range(PASSES + 1):
        for way in WAYS if turn % 2 else reversed(WAYS):
            with attention_of(way):
                began = time.perf_counter()
                images[way] = drawn(pipeline, embeddings, options.size)
            if turn:  # the first one compiles, or loads
                seconds[way].append(time.perf_counter() - began)
    for way in WAYS:
        print(f"  {way:12s}{statistics.median(seconds[way]) * 1e3:10.1f} ms an image")
    for host, counts in counters.read().items():
        print(f"calls of {host} served: {counts['served']}, passed on: {counts['passed_on'] or 'none'}")
    levels = [(images[way].clamp(0, 1) * 255).round().to(torch.uint8) for way in WAYS]
    Image.fromarray(torch.cat(levels, dim=1).numpy()).save(options.out)
    apart = (levels[0].int() - levels[1].int()).abs()
    largest, differing = int(apart.max()), float((apart > 0).float().mean())
    most, share = LIMITS[options.dtype]
    print(f"{options.out}: left by sdpa, right by jit_kernel")
    print(f"colours differ by {largest} of 255 at most, must be {most} or less")
    print(f"{differing:.2%} of them differ, must be {share:.0%} or less")
    return 0 if largest <= most and differing <= share else 1


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 on the CPU, bfloat16 on a GPU")
    parser.add_argument("--size", type=int, default=256, help="pixels on each side, a multiple of 8")
    parser.add_argument("--out", default="image.png")
    options = parser.parse_args()
    if options.size < 8 or options.size % 8:
        parser.error(f"--size is {options.size}; it must be a positive multiple of 8")
    options.dtype = getattr(torch, options.dtype or ("bfloat16" if options.device == "cuda" else "float32"))
    return options


def made(device: str, dtype: torch.dtype) -> tuple[FluxPipeline, dict[str, Tensor]]:
    """The pipeline, and two embeddings in place of an encoded prompt."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=64, num_attention_heads=4,
        joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    for parameter in transformer.parameters():  # larger than a model begins with, so that attention shows
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    autoencoder = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(16, 32, 64), norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.36, shift_factor=0.12,
    )  # fmt: skip
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=autoencoder, transformer=transformer, text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    embeddings = {"prompt_embeds": torch.randn(1, 32, 64), "pooled_prompt_embeds": torch.randn(1, 64)}
    embeddings = {name: each.to(device, dtype) for name, each in embeddings.items()}
    return pipeline.to(device, dtype), embeddings


@contextmanager
def attention_of(way: str) -> Iterator[None]:
    """Everything that is drawn inside computes its attention this way."""
    if way == "sdpa":
        with attention_backend("native"):
            yield
    else:
        with attention_backend(jit_kernel_diffusers.NAME), sdpa.active():
            yield


def drawn(pipeline: FluxPipeline, embeddings: dict[str, Tensor], size: int) -> Tensor:
    """(size, size, 3) float32 on the CPU, colours in [0, 1]."""
    images = pipeline(
        **embeddings, height=size, width=size, num_inference_steps=STEPS, guidance_scale=1.0, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    return images[0].permute(1, 2, 0).float().cpu()


if __name__ == "__main__":
    sys.exit(main())
