"""jit_kernel's functions as a kernel of Hugging Face's hub; jit_kernel/integrations/local_kernels says the rest."""

from jit_kernel.integrations.local_kernels import *  # noqa: F403
from jit_kernel.integrations.local_kernels import __getattr__ as __getattr__
