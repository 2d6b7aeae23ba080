"""What a call appends to its cache, how it turns and quantises it, and the scales of what is there."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.places import Places
from tests.fuzz.reading import UnjudgedError, dense, flag, need, numbers, offsets, window
from tests.support import reference
from tests.support.cases import DENSE, FP8, KVCACHE


class Appending(Places):
    """The new keys and values of a call, and the factors that stored ones have."""

    def _append(self, queries: list) -> tuple[list[tuple[str, tuple, Tensor, bool]], list]:
        new_k, new_v = (self.get("k"), self.get("v")) if self.function == KVCACHE else (None, None)
        if new_k is None:
            need(new_v is None or self.function != KVCACHE, "v without k")
            need(self.get("rotary_cos") is None, "rotary without new keys")
            return [], queries
        need(new_v is not None and self.get(self.used_name) is not None, "k without v or without cache_seqlens")
        ragged = self.get("cu_seqlens_k_new") is not None
        mixed, turns = self.k.dtype != self.q.dtype, self.get("rotary_cos") is not None
        dense("k", new_k, None, (self.q.dtype,) if turns else (self.k.dtype, self.q.dtype))
        for name, new, size in (("k", new_k, self.d), ("v", new_v, self.dv)):
            dense(name, new, 3 if ragged else 4, (new_k.dtype,))
            need(new.shape[-2:] == (self.hk, size) and (ragged or new.shape[0] == self.batch), f"{name}'s shape")
        need(new_k.shape[:-1] == new_v.shape[:-1], "new k and v differ")
        if ragged:
            starts = offsets("cu_seqlens_k_new", self.get("cu_seqlens_k_new"), self.batch, new_k.shape[0])
            rows: list[Any] = [slice(a, b) for a, b in itertools.pairwise(starts)]
        else:
            rows = list(range(self.batch))
        turn = self._rotation()
        appended, rotated, written = [], list(queries), []
        for i, row in enumerate(rows):
            keys, worth = new_k[row], new_v[row]
            n = len(keys)
            need(self.old[i] + n <= self.rooms[i], f"no room for {n} keys")
            self.k_lengths[i] += n
            if turn is not None:
                keys = turn(keys, i, n, True)
                rotated[i] = turn(queries[i][0], i, len(queries[i][0]), False), queries[i][1]
            at = torch.arange(self.old[i], self.old[i] + n)
            slots = self.slots(i, at)
            need(all(bool(((at >= 0) & (at < size)).all()) for at, size in zip(slots, self.k.shape, strict=False)),
                 "new keys go to a page that is none")  # fmt: skip
            if mixed and new_k.dtype != FP8:
                keys, worth = (
                    reference.quantised(x, self._factors(letter, i, at))
                    for letter, x in zip("kv", (keys, worth), strict=True)
                )
            written += list(zip(*(at.tolist() for at in slots), strict=True))
            # A quotient that is no number has any sign, and one next to a tie may round the other way.
            near = mixed and new_k.dtype != FP8
            appended += [("k_cache", slots, keys, near or turn is not None), ("v_cache", slots, worth, near)]
        if len(set(written)) != len(written):
            raise UnjudgedError("two sequences append to one place")
        self.written = set(written)
        return appended, rotated

    def _rotation(self) -> Callable[[Tensor, int, int, bool], Tensor] | None:
        cos, sin = self.get("rotary_cos"), self.get("rotary_sin")
        if cos is None:
            need(sin is None, "rotary_sin without rotary_cos")
            return None
        cos, sin = dense("rotary_cos", cos, 2, (self.q.dtype,)), dense("rotary_sin", sin, 2, (self.q.dtype,))
        need(cos.shape == sin.shape and cos.shape[1] > 0 and 2 * cos.shape[1] <= self.d, "rotary tables' shape")
        need(cos.shape[1] % 8 == 0, "rotary_dim is no multiple of 16")
        starts = self.old
        if self.get("rotary_seqlens") is not None:
            starts = numbers("rotary_seqlens", self.get("rotary_seqlens"), self.batch)
        masked = (flag("causal", self.get("causal")) or max(window(self.get("window_size"))) >= 0
                  or bool(self.get("attention_chunk")))  # fmt: skip
        interleaved = flag("rotary_interleaved", self.get("rotary_interleaved"))

        def turn(x: Tensor, i: int, n: int, is_key: bool) -> Tensor:
            steps = torch.arange(n) if is_key or masked else torch.zeros(n, dtype=torch.int64)
            last = starts[i] + (int(steps[-1]) if n else 0)
            need(starts[i] >= 0 and (n == 0 or last < cos.shape[0]), f"position {last} of {cos.shape[0]}")
            rotate = reference.turned if is_key and self.k.dtype != self.q.dtype else reference.rotate
            return rotate(x, cos, sin, steps + starts[i], interleaved=interleaved)

        return turn

    def _descales(self, i: int) -> dict[str, Tensor]:
        found = {}
        for name in ("q_descale", "k_descale", "v_descale"):
            value = self.get(name)
            if value is not None:
                if (self.q if name == "q_descale" else self.k).dtype != FP8:
                    continue  # not read
                tensor = dense(name, value, 2, (torch.float32,))
                need(tuple(tensor.shape) == (self.batch, self.hk), f"{name} has shape {tuple(tensor.shape)}")
                found[name] = tensor[i]
        return found

    def _token_scale(self, letter: str) -> Tensor | None:
        value = None if self.function == DENSE else self.get(f"{letter}_scale")
        if value is None:
            return None
        need(self.k.dtype == FP8, f"{letter}_scale beside {self.k.dtype}")
        scale = dense(f"{letter}_scale", value, self.k.dim() - 1, (torch.float32,))
        need(scale.shape == self.k.shape[:-1], f"{letter}_scale has shape {tuple(scale.shape)}")
        return scale

    def _factors(self, letter: str, i: int, at: Tensor) -> Tensor:
        """What new keys or values are divided by, (n, hk)."""
        factor, scale = torch.ones(len(at), self.hk), self._token_scale(letter)
        descale = self._descales(i).get(f"{letter}_descale")
        factor = factor if descale is None else factor * descale
        return factor if scale is None else factor * scale[self.slots(i, at)]

    def _token_scales(self, i: int) -> dict[str, Tensor]:
        """Of every key of a sequence; 1 where it lies in a page that is none."""
        found = {}
        for letter in "kv":
            scale = self._token_scale(letter)
            if scale is not None:
                at = torch.arange(self.pads[i], self.k_lengths[i])
                places, bad = self.slots(i, at), torch.zeros(len(at), dtype=torch.bool)
                for place, size in zip(places, scale.shape, strict=False):
                    bad |= (place < 0) | (place >= size)
                picked = scale[tuple(place.masked_fill(bad, 0) for place in places)] if scale.numel() else None
                found[f"{letter}_scale"] = (
                    torch.ones(len(at), self.hk) if picked is None else picked.masked_fill(bad[:, None], 1.0)
                )
        return found
