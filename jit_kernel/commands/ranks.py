"""`python -m jit_kernel why --ranks 4 --lengths 32768 --heads 32,8 --head-dim 128 --causal`: context parallelism.

The form that serves packed sequences over so many ranks, what each was estimated at, and why one cannot serve.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from jit_kernel.attention.metadata import AttentionLayer
from jit_kernel.attention.parallel import choice, zigzag


def main(argv: Sequence[str]) -> int:
    """Run the command; answers with its exit status: 0 served, 1 not served, 2 a wrong argument."""
    parser = argparse.ArgumentParser(prog="python -m jit_kernel why --ranks", description=__doc__)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--lengths", type=_integers, required=True, help="tokens of each sequence, of the whole")
    parser.add_argument("--heads", type=_integers, required=True, help="query heads,key heads")
    parser.add_argument("--head-dim", type=int, required=True)
    parser.add_argument("--inner", type=int, help="neighbouring ranks that share heads inside a ring")
    parser.add_argument("--form", choices=choice.FORMS, help="ask for one form")
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--window-size", type=_integers, default=(-1, -1), metavar="LEFT,RIGHT")
    parser.add_argument("--attention-chunk", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    for name, count in (("heads", 2), ("window_size", 2)):
        if len(getattr(options, name)) != count:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be two numbers")
    layer = AttentionLayer(
        causal=options.causal, window_size=options.window_size, attention_chunk=options.attention_chunk
    )
    try:
        found = choice.choose(
            options.lengths, layer, options.heads, options.head_dim, options.ranks, form=options.form,
            inner=options.inner,
        )  # fmt: skip
        rows = zigzag.rows_of(options.lengths, options.ranks, found.inner)
    except ValueError as error:
        print(f"python -m jit_kernel why: {error}", file=sys.stderr)
        return 2
    except NotImplementedError as error:
        print(f"python -m jit_kernel why: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps({**asdict(found), "tokens": rows}, indent=1))
    else:
        print(found.explain())
        print("  estimates: of H200s that are joined by NVLink")
        print(f"  tokens of a rank: {min(rows)} to {max(rows)}")
    return 0


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(each) for each in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers with commas between them") from error
