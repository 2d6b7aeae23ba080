"""The Hopper decode kernels without a GPU: the compiler's report, and which calls over a cache come to them."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch

from jit_kernel import flash_attention_v3 as fa3
from jit_kernel.fa3 import call as calls
from jit_kernel.fa3 import hopper
from jit_kernel.fa3.call import Call
from jit_kernel.fa3.features import features_of
from jit_kernel.fa3.hopper import kernels as hopper_kernels
from tests.support import cases, decode_on_gpu, shared_numbers
from tests.support.hopper_variants import TARGET, compile_spec

LAUNCH = shared_numbers.HOPPER / "launch" / "decode_launch.h"
TILES = [
    (dtype, d, rows)
    for d in hopper_kernels.DECODE_HEAD_DIMS
    for rows in hopper_kernels.DECODE_ROWS
    for dtype in hopper_kernels.DTYPES
    if rows <= hopper_kernels.DECODE_MOST_ROWS[d]
    # Both dtypes where registers are scarce.
    and (dtype == "bf16" or rows == hopper_kernels.DECODE_MOST_ROWS[d])
]


@pytest.mark.parametrize("mixed", [False, True], ids=["cache of 16 bits", "cache in e4m3"])
@pytest.mark.parametrize("fields", TILES, ids=str)
def test_a_tile_compiles_without_spills_or_serialised_products(fields: tuple[str, int, int], mixed: bool) -> None:
    image, log = compile_spec(hopper_kernels.decode_spec(*fields, mixed=mixed))
    assert image[:4] == b"\x7fELF"
    assert re.findall(r"\bC75\d\d\b.*", log) == []
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log) == [("0", "0")]


def test_the_space_has_every_kind_of_call() -> None:
    """What test_decode_gpu.py draws from."""
    counted = cases.coverage(decode_on_gpu.plans(0, 500))
    for feature in ("keys paged", "keys dense", "append", "new_ragged", "rotary", "batch_idx", "leftpad", "seqused_q"):
        assert counted[feature] > 10, feature
    for feature in ("causal", "window", "chunk", "softcap", "sinks", "out", "strides", "ragged", "empty", "large"):
        assert counted[feature] > 10, feature


def call_of(rows: int, d: int = 128, dv: int = 128, dtype: torch.dtype = torch.bfloat16, **given: Any) -> Call:
    """A call of flash_attn_with_kvcache with so many query tokens of 8 heads, over 2 key heads."""
    parameters = inspect.signature(fa3.flash_attn_with_kvcache).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    q, k, v = (torch.zeros(2, *shape, dtype=dtype) for shape in ((rows, 8, d), (64, 2, d), (64, 2, dv)))
    given = {"max_seqlen_q": rows, "softmax_scale": 1.0, "cache_seqlens": torch.tensor([3, 64]), **given}
    return Call(*calls.of(calls.KVCACHE, defaults | {"q": q, "k_cache": k, "v_cache": v} | given))


@pytest.mark.parametrize(
    ("rows", "sizes", "given", "key"),
    [
        (1, (128, 128), {}, (128, 8)),
        (2, (40, 64), {}, (64, 8)),
        (3, (64, 72), {}, (128, 16)),
        (16, (128, 128), {}, (128, 64)),
        (17, (128, 128), {}, None),
        (8, (256, 256), {}, (256, 32)),
        (9, (256, 256), {}, None),
        (9, (192, 128), {}, None),
        (1, (128, 128), {"num_splits": 1}, None),
        (1, (128, 128), {"num_splits": 5}, (128, 8)),
        (1, (128, 128), {"num_splits": 1, "deterministic": True}, None),
        (1, (128, 128), {"deterministic": True}, (128, 8)),
    ],
    ids=str,
)
def test_few_rows_over_a_cache_have_a_decode_kernel(
    rows: int, sizes: tuple[int, int], given: dict[str, Any], key: tuple[int, int] | None
) -> None:
    found = hopper.decode.key_of(call_of(rows, *sizes, **given))
    assert found == (None if key is None else (torch.bfloat16, *key, False))
    if found is not None:
        assert hopper.decode.spec_of(found) in set(hopper_kernels.all_specs())


class KernelsDouble:
    """Stands for a GPU's loaded kernels: what the launcher's `decode` answers, one call after the other."""

    def __init__(self, *answers: int) -> None:
        self.handles: dict[object, int] = {(torch.bfloat16, 128, 8, False): 7}
        self.answers = list(answers)
        self.launched: list[tuple[Any, ...]] = []

    def load(self, key: object, spec: object) -> int:
        self.handles[key] = 9
        return 9

    def decode(self, *arguments: Any) -> int:
        self.launched.append(arguments)
        return self.answers.pop(0)

    def partial_floats(
        self, handle: int, heads_k: int, batch: int, rows_k: int, sm_margin: int, fixed_ranges: bool
    ) -> int:
        assert (heads_k, batch, rows_k) == (2, 2, 64)
        return 13 if fixed_ranges else 11


LAUNCHED, NEEDS_ROOM, UNALIGNED = 1, 2, 0


@pytest.mark.parametrize(
    ("answers", "call", "results"),
    [
        ([LAUNCHED], call_of(1), True),
        ([NEEDS_ROOM, LAUNCHED], call_of(1), True),
        ([NEEDS_ROOM, LAUNCHED], call_of(1, deterministic=True), True),
        ([UNALIGNED], call_of(1), False),
        ([], call_of(1, dtype=torch.float16), False),
    ],
    ids=["launched", "captured", "captured with fixed ranges", "unaligned", "not loaded"],
)
def test_a_known_kernel_is_launched_or_nothing_is(
    answers: list[int], call: Call, results: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    double = KernelsDouble(*answers)
    monkeypatch.setattr(hopper_kernels, "kernels_of", lambda device: double)
    found = hopper.try_known(call)
    assert (found is not None) is results
    assert double.answers == []
    if NEEDS_ROOM in answers:
        place = shared_numbers.parameters(LAUNCH, "decode").index("partials")
        assert [arguments[place] is None for arguments in double.launched] == [True, False]
        assert double.launched[1][place].numel() == (13 if call.deterministic else 11)
        fixed = shared_numbers.parameters(LAUNCH, "decode").index("fixed_ranges")
        assert [arguments[fixed] for arguments in double.launched] == [call.deterministic] * 2
    assert all(arguments[-1] is True for arguments in double.launched)  # the launcher looks at addresses


def test_a_kernel_that_is_not_loaded_is_loaded_by_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    double = KernelsDouble(LAUNCHED)
    monkeypatch.setattr(hopper_kernels, "kernels_of", lambda device: double)
    assert hopper.attend(call_of(1, dtype=torch.float16)) is not None
    assert double.launched[0][0] == 9
    assert double.launched[0][-1] is False


def test_what_the_launcher_declines_is_an_error_by_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_kernels, "kernels_of", lambda device: KernelsDouble(UNALIGNED))
    with pytest.raises(RuntimeError, match="did not launch"):
        hopper.attend(call_of(1))


def test_without_a_query_row_nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    double = KernelsDouble()
    monkeypatch.setattr(hopper_kernels, "kernels_of", lambda device: double)
    out, lse = hopper.attend(call_of(0, dtype=torch.float16, return_softmax_lse=True))
    assert out.shape == (2, 0, 8, 128)
    assert lse.shape == (2, 8, 0)
    assert double.handles.keys() == {(torch.bfloat16, 128, 8, False)}


def test_the_answers_are_the_launchers() -> None:
    text = LAUNCH.read_text(encoding="utf-8")
    assert f"kUnaligned = {UNALIGNED}, kLaunched = {LAUNCHED}, kNeedsRoom = {NEEDS_ROOM};" in text
    assert (hopper.decode._LAUNCHED, hopper.decode._NEEDS_ROOM) == (LAUNCHED, NEEDS_ROOM)


def test_a_cache_in_e4m3_has_one_kernel_for_queries_in_bf16_and_in_e4m3() -> None:
    keys = []
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        call = call_of(3)
        call.q, call.k, call.v = call.q.to(dtype), *(x.to(torch.float8_e4m3fn) for x in (call.k, call.v))
        keys.append(hopper.decode.key_of(call))
        variant = hopper.variant(TARGET, features_of(call), call)
        assert variant == hopper_kernels.decode_spec("bf16", 128, 16, mixed=True)
    assert keys[0] == keys[1] == (torch.bfloat16, 128, 16, True)
