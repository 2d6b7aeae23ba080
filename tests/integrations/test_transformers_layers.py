"""make_mask and attention against the mask function's own values in float64: every kind, offset and padding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import masking_utils as utils  # noqa: E402

from jit_kernel.integrations import transformers as client  # noqa: E402
from tests.support import case_run  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small calls are quicker on one thread."""
    with case_run.one_thread(), torch.no_grad():
        yield


BATCH, HEADS, SIZE = 3, 2, 16
# (queries, keys that the cache has room for, position of the first query, of the first key)
PLACES = {
    "prompt": (12, 12, 0, 0),
    "step": (1, 12, 11, 0),
    "part of a prompt": (5, 12, 7, 0),
    "static prompt": (8, 20, 0, 0),
    "static step": (1, 20, 11, 0),
    "window's cache": (2, 8, 10, 4),
    "before the last keys": (5, 12, 3, 0),
}
PADDINGS = ("none", "left", "right", "holes", "both")


def padding(kind: str, tokens: int) -> torch.Tensor | None:
    """(b, tokens): 0 where a token is padding, in all rows but the last."""
    if kind == "none":
        return None
    mask = torch.ones(BATCH, tokens, dtype=torch.bool)
    mask[0, : 3 if kind in ("left", "both") else 0] = False
    mask[1, : 1 if kind in ("left", "both") else 0] = False
    if kind in ("right", "both"):
        mask[0, -2:] = False
        mask[1, -1:] = False
    if kind == "holes":
        mask[0, 2:5] = False
        mask[1, 1] = False
    return mask


def functions(tokens: int, kind: str) -> dict[str, Any]:
    real = padding(kind, tokens)
    left = torch.zeros(BATCH, dtype=torch.long) if real is None else real.int().argmax(dim=1)
    return {
        "causal": utils.causal_mask_function,
        "window": utils.sliding_window_causal_mask_function(5),
        "chunk": utils.chunked_causal_mask_function(4, left),
        "window and chunk": utils.and_masks(
            utils.sliding_window_causal_mask_function(3), utils.chunked_overlay(4, left)
        ),
        "bidirectional": utils.bidirectional_mask_function,
        "bidirectional window": utils.sliding_window_bidirectional_mask_function(2),
        "every other": utils.and_masks(utils.bidirectional_mask_function, lambda b, h, q, k: (q - k) % 2 == 0),
        "prefix": utils.or_masks(utils.causal_mask_function, lambda b, h, q, k: k < 3),
    }


def inputs(queries: int, room: int) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(7)
    q = torch.randn(BATCH, HEADS * 2, queries, SIZE, generator=random)
    return q, *(torch.randn(BATCH, HEADS, room, SIZE, generator=random) for _ in range(2))


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """(b, sq, hq, d) in float64; 0 in rows that see no key."""
    k, v = (x.double().repeat_interleave(2, dim=1) for x in (k, v))
    scores = (q.double() @ k.transpose(-1, -2) / SIZE**0.5).masked_fill(~seen, float("-inf"))
    return (scores.softmax(dim=-1).nan_to_num(0.0) @ v).transpose(1, 2)


BOTH_WAYS = ("bidirectional", "bidirectional window", "every other")
CASES = [
    (name, place, kind)
    for name, place, kind in itertools.product(functions(12, "none"), PLACES, PADDINGS)
    if not (place == "window's cache" and name not in ("window", "chunk"))  # the one whose first keys are gone
    and not (name in BOTH_WAYS and place.startswith("static"))  # whose room would be seen
    and not (name == "bidirectional window" and kind != "none")  # where rows of padding are 0
]


def case(name: str, place: str, kind: str) -> tuple[dict[str, Any], torch.Tensor]:
    """What make_mask is asked, and which keys are seen: (b, 1, queries, room)."""
    queries, room, q_offset, kv_offset = PLACES[place]
    tokens = q_offset + queries
    function, real = functions(tokens, kind)[name], padding(kind, tokens)
    sizes = {"batch_size": BATCH, "q_length": queries, "kv_length": room, "kv_offset": kv_offset, "device": "cpu"}
    asked = {**sizes, "q_offset": q_offset, "mask_function": function, "attention_mask": real}
    return asked, utils.sdpa_mask(**asked, allow_is_causal_skip=False)


@pytest.mark.parametrize(("name", "place", "kind"), CASES)
def test_what_is_seen_is_attended_to(name: str, place: str, kind: str) -> None:
    """With the first query's position as a number, and as a tensor as static caches have it."""
    asked, seen = case(name, place, kind)
    q, k, v = inputs(asked["q_length"], asked["kv_length"])
    wanted = expected(q, k, v, seen)
    for q_offset in (asked["q_offset"], torch.tensor(asked["q_offset"])):
        mask = client.make_mask(**{**asked, "q_offset": q_offset})
        found, _ = client.attention(torch.nn.Module(), q, k, v, mask)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["none", "left", "holes"])
@pytest.mark.parametrize("name", ["causal", "window", "chunk"])
def test_a_traced_mask_with_the_position_in_a_tensor(name: str, kind: str) -> None:
    """One program for every position: what it traced is no number of the example."""
    torch._dynamo.reset()

    def layer(q_offset: torch.Tensor, real: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        function = {
            "causal": utils.causal_mask_function,
            "window": utils.sliding_window_causal_mask_function(5),
            "chunk": utils.chunked_causal_mask_function(4, torch.zeros(BATCH, dtype=torch.long)),
        }[name]
        mask = client.make_mask(BATCH, 1, 20, q_offset, 0, function, real, allow_is_causal_skip=True, device="cpu")
        return client.attention(torch.nn.Module(), q, k, v, mask)[0]

    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    q, k, v = inputs(1, 20)
    for position in (11, 6):
        real = padding(kind, 12)
        real = None if real is None else real.logical_and(torch.arange(12) <= position)
        found = compiled(torch.tensor(position), real, q, k, v)
        asked, _ = case(name, "static step", "none")
        seen = utils.sdpa_mask(**{**asked, "q_offset": position, "attention_mask": real}, allow_is_causal_skip=False)
        torch.testing.assert_close(found.double(), expected(q, k, v, seen), rtol=1e-5, atol=1e-6)


def test_a_step_of_a_static_cache_holds_no_number_that_the_next_one_changes() -> None:
    """So that a graph, of torch.compile or of CUDA, serves every step."""
    for real in (None, padding("left", 12), padding("holes", 12)):
        mask = client.make_mask(BATCH, 1, 20, torch.tensor(11), attention_mask=real)
        assert mask.keys == 20 and mask.lengths is not None and mask.lengths.tolist() == [12] * BATCH
