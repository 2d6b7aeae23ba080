"""What stands behind torch's operators while `jit_kernel.integrations.sdpa` is active, a file a device."""
