"""A function as a torch operator, which torch.compile keeps in its graph as one node."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch.compiler import is_compiling

_libraries: dict[str, Any] = {}  # they live as long as their operators


def operator(
    name: str, function: Callable[..., Any], *, fake: Callable[..., Any], mutates: Iterable[str] = ()
) -> Callable[..., Any]:
    """`function`, which becomes the torch operator `name` ("mine::rms_norm") while it is compiled or traced.

    Outside of torch.compile a call is the function's own, 0.1 us later. Its annotations give the operator's schema;
    `mutates` names the tensors that it writes. `fake` makes empty results from tensors without numbers. Raises
    ValueError for a name without a namespace or an annotation that no schema has.
    """
    namespace, colons, bare = name.partition("::")
    if not (colons and namespace.isidentifier() and bare.isidentifier()):
        raise ValueError(f"name is {name!r}; it must be namespace::name")
    schema = torch.library.infer_schema(function, mutates_args=tuple(mutates))
    library: Any = torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
    _libraries[name] = library
    library.define(f"{bare}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(bare, function, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=library)
    traced = getattr(getattr(torch.ops, namespace), bare)

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return traced(*arguments, **named) if is_compiling() else function(*arguments, **named)

    return call
