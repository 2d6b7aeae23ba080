"""Attention without a cache: the choice of implementation, SageAttention, diffusion models."""
