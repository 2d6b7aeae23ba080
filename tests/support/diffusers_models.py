"""Tiny random models of diffusers and a pipeline of them, and the numeric rule for what a whole model gives."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from tests.support.reference import ROW_SLACK

Model = tuple[Any, dict[str, Any]]
_OLD = tuple(int(part) for part in diffusers.__version__.split(".")[:2]) < (0, 38)


def flux() -> Model:
    """Flux: text and image in one attention, no mask."""
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 16, 4), "encoder_hidden_states": torch.randn(2, 7, 32),
        "pooled_projections": torch.randn(2, 32), "timestep": torch.ones(2), "img_ids": torch.randn(16, 3),
        "txt_ids": torch.randn(7, 3),
    }  # fmt: skip
    return model.eval(), inputs


def wan() -> Model:
    """Wan: a video model with cross attention, head size 12."""
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=256, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8), "encoder_hidden_states": torch.randn(1, 12, 16),
        "timestep": torch.tensor([5]),
    }  # fmt: skip
    return model.eval(), inputs


def qwen_image(layers: int = 2) -> Model:
    """QwenImage: prompts of 7 and 4 tokens, padded in front of the image; before diffusers 0.38 without a mask."""
    torch.manual_seed(0)
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=layers, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    inputs = {
        "hidden_states": torch.randn(2, 16, 16), "encoder_hidden_states": torch.randn(2, 7, 16),
        "encoder_hidden_states_mask": mask, "timestep": torch.ones(2), "img_shapes": [[(1, 4, 4)]] * 2,
        **({"txt_seq_lens": [7, 4]} if _OLD else {}),
    }  # fmt: skip
    return model.eval(), inputs


def sd3() -> Model:
    """Stable Diffusion 3, whose processors call torch's SDPA themselves."""
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=32, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 7, 32),
        "pooled_projections": torch.randn(2, 64), "timestep": torch.ones(2),
    }  # fmt: skip
    return model.eval(), inputs


def autoencoder() -> Any:
    """AutoencoderKL with attention over the pixels of its middle."""
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        sample_size=32, in_channels=3, out_channels=3, block_out_channels=(8,), layers_per_block=1, latent_channels=1,
        norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035,
    ).eval()  # fmt: skip


def pipeline() -> Model:
    """Flux's whole pipeline for prompts that are encoded already, and what it is called with: 2 steps, 16 x 16."""
    transformer, _ = flux()
    made = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=autoencoder(), transformer=transformer,
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    called = {"prompt_embeds": torch.randn(1, 7, 32), "pooled_prompt_embeds": torch.randn(1, 32), "height": 16,
              "width": 16, "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt"}  # fmt: skip
    return made, called


def in_dtype(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Inputs with their floating-point tensors in another dtype, but for times and positions."""
    kept = ("timestep", "img_ids", "txt_ids")
    return {
        name: each.to(dtype) if isinstance(each, Tensor) and each.is_floating_point() and name not in kept else each
        for name, each in inputs.items()
    }


def share(ours: Tensor, base: Tensor, exact: Tensor) -> float:
    """The numeric rule for a whole tensor: its distance from float64 beside twice that of torch's own, base's, in the
    same dtype, and the same of the largest difference. Above 1 is wrong."""
    ours_error, base_error = ours.double() - exact, base.double() - exact
    whole = ours_error.norm() / (2 * base_error.norm() + 2 * ROW_SLACK[base.dtype] * exact.norm())
    largest = ours_error.abs().max() / (2 * base_error.abs().max() + 1e-5 * exact.abs().max().clamp(min=1))
    return float(torch.stack([whole, largest]).nan_to_num(nan=float("inf")).max())
