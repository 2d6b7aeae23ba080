"""Masks of transformers: packed sequences, padding anywhere, masks that models bring, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import operator
from collections.abc import Iterator
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers.masking_utils import (  # noqa: E402
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
    sliding_window_causal_mask_function,
)

from jit_kernel.integrations import transformers as client  # noqa: E402
from jit_kernel.integrations.transformers import masks, recognise  # noqa: E402
from jit_kernel.integrations.transformers.layouts import pack, pack_traced  # noqa: E402
from tests.support import case_run  # noqa: E402
from tests.support.hf_models import FAMILIES, NEAR, SMALL, greedy, llama, tokens  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are quicker on one thread."""
    with case_run.one_thread():
        yield


LENGTHS = (3, 14, 8)


def packed() -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Sequences of LENGTHS, each alone and all of them in one row."""
    alone = [tokens(n, seed=n)["input_ids"] for n in LENGTHS]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return alone, {"input_ids": torch.cat(alone, dim=1), "position_ids": positions}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_unpacked(family: str) -> None:
    """What position_ids tell of sequences in one row: none sees another."""
    eager, ours = FAMILIES[family]()
    alone, together = packed()
    found = ours(**together, use_cache=False).logits
    torch.testing.assert_close(found, eager(**together, use_cache=False).logits, **NEAR)
    if family != "gpt_oss":  # which makes its masks without position_ids: there cu_seq_lens alone packs
        expected = torch.cat([ours(input_ids=ids).logits for ids in alone], dim=1)
        torch.testing.assert_close(found, expected, **NEAR)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True], ids=["no cache", "cache"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_collator_that_packs(family: str, use_cache: bool) -> None:
    """DataCollatorWithFlattening's cu_seq_lens: right beside a mask that knows of no packing, too."""
    _, ours = FAMILIES[family]()
    alone, _ = packed()
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=True)
    batch = collate([{"input_ids": ids[0].tolist(), "labels": ids[0].tolist()} for ids in alone])
    batch.pop("labels")
    assert {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q"} <= set(batch)
    expected = torch.cat([ours(input_ids=ids).logits for ids in alone], dim=1)
    torch.testing.assert_close(ours(**batch, use_cache=use_cache).logits, expected, **NEAR)


class NoValueRead(TorchDispatchMode):
    """Refuses what waits for the device: a CUDA graph that is being captured would be lost."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"{function} reads a value")
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("with_ends", [False, True], ids=["positions", "cu_seq_lens"])
def test_packed_sequences_of_a_capture(with_ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No value is read while a CUDA graph is captured; no bits are made where cu_seq_lens say as much."""
    sequence = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]
    function = and_masks(causal_mask_function, packed_sequence_mask_function(sequence))
    rows = sum(LENGTHS)
    q, k, v = (torch.randn(1, heads, rows, 16) for heads in (4, 2, 2))
    expected, _ = client.attention(torch.nn.Module(), q, k, v, client.make_mask(1, rows, rows, mask_function=function))
    monkeypatch.setattr(masks, "is_capturing", lambda device: True)
    with NoValueRead():
        mask = client.make_mask(1, rows, rows, mask_function=function)
        assert mask.later is not None and mask.bits is None
        assert mask.later().bits is not None and mask.later() is mask.later()
    ends = {}
    if with_ends:
        mask = dataclasses.replace(mask, later=functools.partial(pytest.fail, "bits were made"))
        cu = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
        ends = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 14, "max_length_k": 14}
    found, _ = client.attention(torch.nn.Module(), q, k, v, mask, **ends)
    torch.testing.assert_close(found, expected, **NEAR)


@torch.no_grad()
def test_packing_beside_padding_is_refused() -> None:
    _, ours = llama()
    cu = torch.tensor([0, 4, 11, 14, 22], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q stands beside an attention_mask"):
        ours(**tokens(4, 11), cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=11, max_length_k=11)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_right_padding_generates_what_eager_generates(family: str) -> None:
    """generate() reads the first token from a row of padding, and padding then stands between tokens.

    So little padding that every row of it sees a token through the window; one that sees none gets 0, as from SDPA.
    """
    eager, ours = FAMILIES[family]()
    batch = tokens(14, 17, 13, side="right")
    found, expected = ours(**batch).logits, eager(**batch).logits
    torch.testing.assert_close(found, expected, **NEAR)  # at every position
    assert torch.equal(ours.generate(**batch, **greedy(12)), eager.generate(**batch, **greedy(12)))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_anywhere(family: str) -> None:
    """Between tokens, under a window too; on both sides; a row of nothing but padding."""
    eager, ours = FAMILIES[family]()
    batch = tokens(12, 12, 12)
    batch["attention_mask"][0, 4:7] = 0
    batch["attention_mask"][1, :2] = 0
    batch["attention_mask"][1, 9:] = 0
    batch["position_ids"] = torch.arange(12).expand(3, 12)
    real = batch["attention_mask"].bool()
    found, expected = ours(**batch).logits, eager(**batch).logits
    torch.testing.assert_close(found[real], expected[real], **NEAR)
    batch["attention_mask"][2] = 0
    assert bool(ours(**batch).logits.isfinite().all())


@torch.no_grad()
def test_a_mask_of_the_models_own() -> None:
    """Blocks that see each other whole (images among text) are no mask of FlashAttention's: bits serve them."""
    create = transformers.masking_utils.create_causal_mask
    if "block_sequence_ids" not in inspect.signature(create).parameters:
        pytest.skip("this transformers has no blocks")
    eager, ours = llama()
    blocks = torch.tensor([[-1, -1, 0, 0, 0, -1, 1, 1, -1]])
    ids = tokens(9)["input_ids"]

    def logits(model: Any) -> torch.Tensor:
        embeds = model.get_input_embeddings()(ids)
        config = model.config
        mask = create(config, embeds, torch.ones_like(ids), None, block_sequence_ids=blocks)
        return model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits

    torch.testing.assert_close(logits(ours), logits(eager), **NEAR)
    assert not torch.allclose(logits(ours), ours(input_ids=ids).logits, atol=1e-3)


class EveryOther:
    """A mask function that is an object."""

    def __call__(self, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & ((query - key) % 2 == 0)


def near(far: int, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return (key <= query) & (query - key < far)


@pytest.mark.parametrize(
    ("function", "visible"),
    [
        (functools.partial(near, 3), lambda q, k: k <= q and q - k < 3),
        (EveryOther(), lambda q, k: k <= q and (q - k) % 2 == 0),
        (lambda b, h, q, k: k <= q, lambda q, k: k <= q),
    ],
    ids=["partial", "object", "lambda"],
)
def test_any_mask_function(function: Any, visible: Any) -> None:
    mask = client.make_mask(batch_size=2, q_length=5, kv_length=9, q_offset=4, mask_function=function)
    seen = torch.tensor([[visible(q, k) for k in range(9)] for q in range(4, 9)])
    assert mask.bits is not None and torch.equal(mask.bits, pack(seen.expand(2, 5, 9), 1))


def test_what_is_no_mask_function_is_refused() -> None:
    for function, named in ((operator.index, "index"), (lambda b, h, q, k: q - k, "torch.int64"), (print, "print")):
        with pytest.raises(TypeError, match=named):
            client.make_mask(batch_size=1, q_length=4, kv_length=4, mask_function=function)


def test_bits_and_settings_say_the_same() -> None:
    """A window known by its function and by its values."""
    known = recognise.recognise(sliding_window_causal_mask_function(3), False)
    assert (known.causal, known.window_size, known.known) == (True, (2, -1), True)
    sizes = {"batch_size": 1, "q_length": 6, "kv_length": 6, "q_offset": 0, "kv_offset": 0, "device": "cpu"}
    seen = recognise.evaluate(sliding_window_causal_mask_function(3), sizes, False)[0, 0]
    rows, columns = torch.arange(6)[:, None], torch.arange(6)
    assert torch.equal(seen, (columns <= rows) & (rows - columns <= 2))
    assert recognise.recognise(causal_mask_function, False) == recognise.Kind(causal=True)


@pytest.mark.parametrize("function", [pack, pack_traced])
def test_the_last_bit_is_the_last_keys(function: Any) -> None:
    seen = torch.zeros(2, 1, 35, dtype=torch.bool)
    seen[1, 0, 34] = seen[1, 0, 0] = True
    assert function(seen, 2).tolist() == [[0, 0], [1 << 29, -(1 << 31)]]


TINY = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
WITHOUT_BACKEND = {
    "MPNet": TINY,
    "Bloom": {"vocab_size": 99, "hidden_size": 32, "n_layer": 1, "n_head": 2},
    "Mpt": {"vocab_size": 99, "d_model": 32, "n_layers": 1, "n_heads": 2},
    "Falcon": TINY,
    "DebertaV2": TINY,
}


@pytest.mark.parametrize("family", WITHOUT_BACKEND)
def test_a_model_without_attention_backends_is_refused(family: str) -> None:
    client.register()
    config = getattr(transformers, f"{family}Config")(**WITHOUT_BACKEND[family])
    config._attn_implementation = client.NAME
    with pytest.raises(NotImplementedError, match=f"{family}Model computes its attention itself"):
        getattr(transformers, f"{family}Model")(config)


@torch.no_grad()
def test_a_bias_on_the_scores_is_refused() -> None:
    """BEiT adds it to the mask, T5 hands it to attention; before 5.14 neither takes a backend."""
    client.register()
    beit = transformers.BeitConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8,
        use_relative_position_bias=True,
    )  # fmt: skip
    beit._attn_implementation = client.NAME
    alone = r"computes its attention\s+itself"
    with pytest.raises(NotImplementedError, match=alone):
        transformers.BeitModel(beit).eval()(pixel_values=torch.zeros(1, 3, 32, 32))
    t5 = transformers.T5Config(vocab_size=99, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2)
    t5._attn_implementation = client.NAME
    ids = tokens(5)["input_ids"] % 99
    with pytest.raises(NotImplementedError, match=rf"position_bias, of shape \(1, 2, 5, 5\)|{alone}"):
        transformers.T5Model(t5).eval()(input_ids=ids, decoder_input_ids=ids)


def test_a_mask_is_no_tensor() -> None:
    mask = masks.Mask(1, 1)
    for use in (lambda: mask + 1, lambda: 1.0 - mask, lambda: mask[:, :, :, :1], lambda: mask.to("cpu"), lambda: ~mask):
        with pytest.raises(NotImplementedError, match="takes no attention backend"):
            use()
    assert not hasattr(mask, "dtype") and not hasattr(mask, "__len__")


def test_dropout_is_refused_by_name() -> None:
    _, ours = llama(attention_dropout=0.1)
    with torch.no_grad(), pytest.raises(NotImplementedError, match=r"dropout is 0\.1.*attention_dropout"):
        ours.train()(**tokens(8))


def test_unregister_leaves_transformers_as_it_was() -> None:
    client.unregister()
    choose = transformers.PreTrainedModel._check_and_adjust_attn_implementation
    functions = dict(transformers.AttentionInterface._global_mapping)
    made = dict(transformers.AttentionMaskInterface._global_mapping)
    client.register()
    client.register()
    assert client.NAME in transformers.AttentionInterface._global_mapping
    client.unregister()
    assert transformers.PreTrainedModel._check_and_adjust_attn_implementation is choose
    assert dict(transformers.AttentionInterface._global_mapping) == functions
    assert dict(transformers.AttentionMaskInterface._global_mapping) == made
    config = transformers.LlamaConfig(**SMALL)
    config._attn_implementation = client.NAME
    with pytest.raises(ValueError, match=client.NAME):
        transformers.LlamaForCausalLM(config)
