"""What `--select field=value ...` asks for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable


def selections(items: Iterable[str]) -> list[dict[str, str]]:
    """What `--select` asks for: a mapping for every choice among a field's values. ValueError for no field=value."""
    fields: dict[str, list[str]] = {}
    for item in items:
        field, equals, value = item.partition("=")
        if not (field and equals and value):
            raise ValueError(f"--select is {item!r}; it must be field=value")
        fields.setdefault(field, []).append(value)
    return [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]
