"""What makes other libraries call jit_kernel. Nothing here is imported unless asked for by name."""
