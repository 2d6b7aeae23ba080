"""The way of an unchecked call that needs neither the checks nor the dispatch; `dispatch` sets it, `seam` takes it.

It stands apart from both so that an import of the public functions imports neither.
"""

from __future__ import annotations

from collections.abc import Callable

from jit_kernel.fa3.call import Arguments, Result

# The function of the implementation that looks at the arguments itself, once its device is loaded: the CPU's alone.
try_unchecked: Callable[[Arguments], Result | None] | None = None
