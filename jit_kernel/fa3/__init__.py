"""The FlashAttention-3 kernel family: its argument checks, its implementations and the choice among them."""
