"""Which tensors share memory: exactly, gaps between rows included.

Slices of one buffer lie between each other's rows and share nothing, as q, k and v of one qkv buffer do, so that equal
ranges of addresses are no answer. Whether two strided tensors touch one address is a linear equation in whole numbers
with bounds. The strides of slices nest, and the search for a solution ends after a few steps; one that takes more than
_MOST_STEPS counts as shared.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

from torch import Tensor

_MOST_STEPS = 20_000

Term = tuple[int, int]  # a coefficient, at least 1, and the most that its variable may be, at least 1


def extent(tensor: Tensor) -> int:
    """How many bytes lie between a tensor's first byte and the end of its last element; 0 for an empty one."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def share(one: Tensor, other: Tensor) -> bool:
    """Whether some byte belongs to both tensors."""
    start, begin = one.data_ptr(), other.data_ptr()
    return start < begin + extent(other) and begin < start + extent(one) and overlap(one, other)


def overlap(one: Tensor, other: Tensor) -> bool:
    """The same of two tensors whose ranges of addresses meet, so that neither is empty."""
    return _touch(other.data_ptr() - one.data_ptr(), _bytes_of(one), _bytes_of(other))


def share_storage(one: Tensor, other: Tensor) -> bool:
    """The same of tensors of one storage, whose addresses need not exist: those of fake tensors do not."""
    if one.untyped_storage()._cdata != other.untyped_storage()._cdata:
        return False
    distance = other.storage_offset() * other.element_size() - one.storage_offset() * one.element_size()
    meet = distance < extent(one) and -distance < extent(other)
    return meet and _touch(distance, _bytes_of(one), _bytes_of(other))


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of a tensor share memory, as in an expanded one."""
    reach = 0
    steps = [(s, n - 1) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]
    if tensor.numel() == 0:
        return False
    for stride, most in sorted(steps):
        if stride <= reach:
            break
        reach += stride * most
    else:
        return False  # each step leaves everything before it behind, as in any slice of a dense tensor
    if any(stride == 0 for stride, _ in steps):
        return True
    # Differences of two indices, from -most to most, shifted to start at 0: two solutions, one of them no difference.
    terms = tuple((stride, 2 * most) for stride, most in steps)
    return _count(terms, sum(stride * most for stride, most in steps), 2) > 1


def _bytes_of(tensor: Tensor) -> tuple[Term, ...]:
    """A tensor's bytes as an offset from its first: the sum of coefficient times variable."""
    size = tensor.element_size()
    steps = [(s * size, n - 1) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1 and s > 0]
    if size > 1:
        steps.append((1, size - 1))
    return tuple(steps)


@functools.lru_cache(maxsize=4096)
def _touch(distance: int, one: tuple[Term, ...], other: tuple[Term, ...]) -> bool:
    """Whether a byte of `one` is a byte of `other`, which starts `distance` bytes later."""
    # sum(one) = distance + sum(other): each variable of `other` counts from its end instead, so that all add up.
    target = distance + sum(coefficient * most for coefficient, most in other)
    return _count((*one, *other), target, 1) > 0


def _count(terms: Sequence[Term], target: int, enough: int) -> int:
    """How many solutions sum(coefficient * variable) = target has, counted up to `enough`.

    Variables with one coefficient count as one variable, which is right for `enough` = 1 and, of distinct strides, for
    2. A search that takes too long counts as `enough`.
    """
    merged: dict[int, int] = {}
    for coefficient, most in terms:
        merged[coefficient] = merged.get(coefficient, 0) + most
    ordered = sorted(merged.items(), reverse=True)
    if enough > 1 and len(merged) < len(terms):
        return enough  # two equal strides: an index may move along one and back along the other
    found = 0
    steps = _solutions(ordered, target)
    for number, solved in enumerate(steps):
        found += solved
        if found >= enough or number >= _MOST_STEPS:
            return enough
    return found


def _solutions(terms: list[tuple[int, int]], target: int) -> Iterator[bool]:
    """Each step of a search from the largest coefficient down; True where it ends in a solution."""
    rests = [0] * (len(terms) + 1)  # what the variables from here on can reach
    divisors = [0] * (len(terms) + 1)
    for place in range(len(terms) - 1, -1, -1):
        coefficient, most = terms[place]
        rests[place] = rests[place + 1] + coefficient * most
        divisors[place] = math.gcd(divisors[place + 1], coefficient)
    waiting = [(0, target)]
    while waiting:
        place, left = waiting.pop()
        if left == 0 and place == len(terms):
            yield True
            continue
        yield False
        if place == len(terms) or not 0 <= left <= rests[place] or left % divisors[place]:
            continue
        coefficient, most = terms[place]
        lowest = max(0, -(-(left - rests[place + 1]) // coefficient))
        highest = min(most, left // coefficient)
        # More than the steps that are taken need not wait: strides that do not nest may leave millions.
        values = range(lowest, min(highest, lowest + _MOST_STEPS) + 1)
        waiting.extend((place + 1, left - coefficient * value) for value in values)
