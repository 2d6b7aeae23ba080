"""The serving benchmark without a GPU: its cells, its pure read, what it takes for right, and its lines."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jit_kernel import config, jit
from jit_kernel.device import Target
from jit_kernel.engine import compiler

BENCHMARKS = config.package_dir().parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import hopper_serving  # noqa: E402
import pure_read  # noqa: E402
import serving_cells  # noqa: E402
import serving_inputs  # noqa: E402
import serving_peers  # noqa: E402
from serving_cells import CELLS, Cell  # noqa: E402
from serving_timing import Competitor  # noqa: E402

SMALL = Cell("small", 3, 200, heads=8, kv_heads=2, queries=4, head_dim=64, page=16)


def test_cells_can_be_called_and_twins_stand_before_those_measured_against_them() -> None:
    seen: set[str] = set()
    for name, cell in CELLS.items():
        assert name == cell.name
        assert cell.heads % cell.kv_heads == 0
        assert min(cell.lengths()) >= cell.queries
        assert cell.twin is None or cell.twin in seen
        seen.add(name)
    goals = {cell.goal for cell in CELLS.values()} - {None}
    decodes = {f"decode {each}" for each in ("1x8k", "16x8k", "128x4k", "64x32k")}
    mixed = {each.replace("decode", "mixed") for each in decodes}
    assert goals == {*decodes, *mixed, "verify q8", "chunk 256", "mla 128"}
    lengths = CELLS["lognormal"].lengths()
    assert len(lengths) == 64 and 3900 < sum(lengths) / 64 < 4200 and len(set(lengths)) > 50


def test_words_choose_cells() -> None:
    both = hopper_serving.options_of(["--only", "verify q8", "shape"]).cells
    assert both == ["verify q8", "shape d 64", "shape d 256", "shape MHA 16 heads", "shape group 16"]
    assert hopper_serving.options_of([]).cells == [*CELLS, serving_cells.HOST]
    quick = hopper_serving.options_of(["--quick"])
    assert (len(quick.cells), quick.rounds, quick.peers) == (5, 1, [])
    assert {*serving_cells.QUICK} <= {*CELLS}


@pytest.mark.parametrize("wrong", [["--only", "nothing"], ["--rounds", "0"], ["--peers", "cudnn"]])
def test_wrong_options_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        hopper_serving.options_of(wrong)
    assert f"argument {wrong[0]}" in capsys.readouterr().err


def test_the_pure_read_compiles_for_hopper() -> None:
    made = jit.load_cubin(pure_read.spec(), Target("cuda", "sm_90a"))
    log = (made.path.parent / "compile.log").read_text(encoding="utf-8")
    assert pure_read.NAME.encode() in made.image
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", log) == [("0", "0", "0")]
    assert "warning" not in log


# Walks the work as the kernel does, and prints what each block, warp and turn reads.
WALK = """
#include <cstdio>
#include <cstdlib>
#include "pure_read.cuh"
int main(int, char** words) {
  const pure_read::Work work{atoi(words[1]), atoi(words[2]), atoi(words[3]), atoi(words[4]), atoi(words[5])};
  const int rows = atoi(words[6]), last_rows = atoi(words[7]);
  printf("%d %d %d\\n", pure_read::kWarps, pure_read::kWarps * pure_read::kRingBytes, work.stages() * work.piece_bytes);
  for (int block = 0; block < work.blocks; ++block)
    for (int warp = 0; warp < pure_read::kWarps; ++warp)
      for (int turn = 0; turn < work.turns(warp, block); ++turn) {
        const int piece = work.piece(turn, warp, block), unit = work.unit_of(piece);
        const int bytes = work.bytes_of(piece, unit + 1 < work.units ? rows : last_rows);
        printf("%d %d %d %d\\n", unit, work.is_value(piece), work.begin_of(piece), bytes);
      }
}
"""


@pytest.fixture(scope="module")
def walker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("walk")
    (folder / "walk.cpp").write_text(WALK, encoding="utf-8")
    flags = ["-std=c++17", "-D__host__=", "-D__device__=", f"-I{BENCHMARKS}", "walk.cpp", "-o", "walk"]
    subprocess.run([*compiler.require("host").command, *flags], cwd=folder, check=True)
    return folder / "walk"


@pytest.mark.parametrize(
    ("pages", "page_size", "heads", "head_dim", "last_rows", "blocks"),
    [(5, 64, 8, 128, 64, 132), (37, 16, 8, 128, 3, 12), (300, 1, 8, 128, 1, 7), (3, 64, 1, 128, 1, 132),
     (2, 64, 16, 256, 63, 5), (9, 3, 2, 72, 2, 1)],
)  # fmt: skip
def test_every_byte_of_the_pages_is_read_once(
    pages: int, page_size: int, heads: int, head_dim: int, last_rows: int, blocks: int, walker: Path
) -> None:
    caches = [torch.zeros(pages, page_size, heads, head_dim, dtype=torch.bfloat16) for _ in "kv"]
    units = torch.zeros(pages, 2, dtype=torch.int32)
    numbers = pure_read.launch_arguments(units, *caches)
    words = [str(each) for each in (*numbers, blocks, page_size, last_rows)]
    first, *walked = subprocess.run([walker, *words], capture_output=True, text=True, check=True).stdout.splitlines()
    warps, ring, in_flight = map(int, first.split())
    assert (warps, ring) == (pure_read.WARPS, pure_read.RING_BYTES)
    assert in_flight <= ring // warps
    row_bytes, page_bytes, piece_bytes = numbers[1:]
    read = torch.zeros(pages, 2, page_bytes, dtype=torch.int32)
    for line in walked:
        unit, is_value, begin, size = map(int, line.split())
        assert size % 16 == 0 and size <= piece_bytes
        read[unit, is_value, begin : begin + size] += 1
    expected = torch.ones_like(read)
    expected[-1, :, last_rows * row_bytes :] = 0
    assert torch.equal(read, expected)


def test_units_are_the_pages_that_hold_keys() -> None:
    table = torch.tensor([[4, 2, 0], [3, 0, 0], [1, 5, 6]])
    lengths = torch.tensor([17, 16, 48])
    units = pure_read.units_of(table, lengths, 16)
    assert units.tolist() == [[4, 16], [2, 1], [3, 16], [1, 16], [5, 16], [6, 16]]
    assert pure_read.in_order(units)[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    k, v = (torch.randn(7, 16, 2, 8, dtype=torch.bfloat16) for _ in "kv")
    right = sum(int(x[page, :rows].view(torch.int32).sum()) for x in (k, v) for page, rows in units.tolist()) % 2**32
    assert pure_read.sum_of_words(units, k, v) == right
    with pytest.raises(ValueError, match="multiple of 16"):
        pure_read.launch_arguments(units, k[..., :2].contiguous(), v[..., :2].contiguous())


@pytest.mark.parametrize(("mixed", "fp8"), [("", False), ("sequences", False), ("tokens", False), ("sequences", True)])
@pytest.mark.parametrize("function", ["flash_attn_with_kvcache", "flash_attn_varlen_func"])
def test_a_right_result_is_right_and_a_wrong_page_is_wrong(function: str, mixed: str, fp8: bool) -> None:
    cell = replace(SMALL, function=function, mixed=mixed, fp8=fp8)
    inputs = serving_inputs.make(cell, "cpu")
    call = serving_inputs.our_call(cell, inputs)
    assert serving_inputs.fault_of(cell, inputs, call) is None
    table = inputs.page_table.clone()
    table[2, 7] = table[0, 0]
    wrong = serving_inputs.our_call(cell, replace(inputs, page_table=table))
    assert "sequence 2, token" in str(serving_inputs.fault_of(cell, inputs, wrong))
    unwritten = serving_inputs.fault_of(cell, inputs, lambda: inputs.out)
    assert unwritten == "relative error inf at sequence 0, token 0, head 0"


def test_a_draft_sees_its_ancestors_and_what_stands_before_all() -> None:
    mask = serving_inputs.tree_mask(5, 8)
    assert mask.shape == (40, 1) and mask.dtype == torch.int32
    bits = mask.long() >> torch.arange(32) & 1
    for rows in bits.view(5, 8, 32).bool():
        drafts = rows[:, 24:]
        assert rows[:, :24].all() and drafts.diagonal().all() and not drafts.triu(1).any()
        for i in range(8):  # what an ancestor sees, its descendant sees too
            assert all(not (drafts[j] & ~drafts[i]).any() for j in range(8) if drafts[i, j])
    drafts_seen = bits.view(5, 8, 32)[:, :, 24:].sum(dim=-1)
    assert drafts_seen.max() > 2  # some have an ancestor that has one,
    assert drafts_seen.sum() < 5 * 36  # and not all are chains


@pytest.mark.parametrize("mixed", ["", "sequences"])
def test_a_cell_of_one_latent_buffer_is_called_and_judged(mixed: str) -> None:
    cell = replace(SMALL, kv_heads=1, latent=256, mixed=mixed)
    inputs = serving_inputs.make(cell, "cpu")
    assert inputs.k_cache.untyped_storage().data_ptr() == inputs.v_cache.untyped_storage().data_ptr()
    call = serving_inputs.our_call(cell, inputs)
    assert serving_inputs.fault_of(cell, inputs, call) is None
    without = replace(inputs, qv=torch.zeros_like(inputs.qv))  # type: ignore[arg-type]
    assert "relative error" in str(serving_inputs.fault(cell, without, call()))
    reads = serving_inputs.read_caches(cell, inputs)
    of_page = sum(x[0].numel() for x in reads)
    assert of_page == inputs.k_cache[0].numel() + inputs.v_cache[0].numel()
    assert {x.dtype for x in reads} == {inputs.k_cache.dtype}
    assert cell.kv_bytes() == sum(cell.lengths()) * inputs.k_cache.element_size() * of_page // cell.page
    assert serving_peers.calls(["flashinfer", "fa3"], cell, inputs) == {}


def test_the_reference_hides_what_the_tree_hides() -> None:
    cell = replace(SMALL, tree=True)
    inputs = serving_inputs.make(cell, "cpu")
    assert inputs.draft_mask is not None
    chain = torch.full_like(inputs.draft_mask, -1)
    tokens = [0, 3]
    plain = serving_inputs.reference(SMALL, replace(inputs, draft_mask=None), 1, tokens)
    assert torch.equal(serving_inputs.reference(cell, replace(inputs, draft_mask=chain), 1, tokens), plain)
    one = chain.clone()
    one[1 * 4 + 3] = ~(1 << 29)  # the fourth draft does not see the second
    hidden = serving_inputs.reference(cell, replace(inputs, draft_mask=one), 1, tokens)
    page, row = divmod(200 - 3, 16)
    inputs.v_cache[inputs.page_table[1, page], row] += 1000
    far = serving_inputs.reference(cell, replace(inputs, draft_mask=one), 1, tokens)
    assert torch.equal(far, hidden) and not torch.equal(hidden[1], plain[1])


def test_peers_get_the_same_pages() -> None:
    lengths = [160, 1, 200]
    inputs = replace(serving_inputs.make(SMALL, "cpu"), lengths=torch.tensor(lengths, dtype=torch.int32))
    starts, pages, last = serving_peers.page_lists(SMALL, inputs)
    assert starts.tolist() == [0, 10, 11, 24] and last.tolist() == [16, 1, 8]
    for i in range(3):
        own = pages[starts[i] : starts[i + 1]].tolist()
        assert own == inputs.page_table[i, : len(own)].tolist()
    assert serving_peers.importable(["fa3"]).keys() <= {"fa3"}


def test_a_line_says_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    cell, earlier = CELLS["decode 16x8k"], {}
    times = {"hopper_ms": 0.1355, "portable_ms": 0.152, "pure_read_ms": 0.1322}
    line = hopper_serving.compared(cell, cell.facts() | times, 4249.0, earlier)
    assert (line["goal"], line["value"]) == ("decode 16x8k", 0.1355)
    assert line["over_pure_read"] == 1.025 and line["peer_ms"] == 0.1401 and "recorded" in line["peer"]
    assert line["shows"] == [
        {"field": "hopper_ms", "value": 0.1355, "at_least": 0.137, "aim": 0.134, "meets": "at least"}
    ]
    paged = CELLS["decode 16x8k page 1"]
    other = hopper_serving.compared(paged, paged.facts() | {"hopper_ms": 0.1423, "fa3_ms": 0.15}, 4000.0, earlier)
    assert other["peer"] == "fa3, same run" and "goal" not in other
    assert [each["meets"] for each in other["shows"]] == ["no"]
    slow = hopper_serving.compared(cell, cell.facts() | {"hopper_ms": 0.139, "pure_read_ms": 0.1355}, 4200.0, earlier)
    assert slow["peer_ms"] == round(0.1401 * 4249 / 4200, 5)
    assert slow["shows"][0]["at_least_by_pure_read"] == round(0.137 * 1.025, 5)
    refused = {"case": "verify q4", "hopper_refused": "it has no flash_attn_with_kvcache", "shows": []}
    rows = hopper_serving.table([{"case": "copy"}, line, other, refused]).splitlines()
    assert len(rows) == 4 and rows[1].startswith("decode 16x8k ") and rows[3].endswith("refused")
    json.dumps([line, other, slow])


class ReadsDouble:
    """Stands for the pure read on a GPU."""

    def check(self, units: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
        assert pure_read.sum_of_words(units, k_cache, v_cache) >= 0

    def reader(self, *tensors: torch.Tensor) -> Callable[[], None]:
        pure_read.launch_arguments(*tensors)
        return lambda: None


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The benchmark on the CPU: its calls are made and judged; times are made up."""
    make = serving_inputs.make

    def compete(competitors: dict[str, Competitor], rounds: int) -> dict[str, list[float]]:
        for competitor in competitors.values():
            competitor.run()
        return {name: [1.0, 2.0, 4.0][:rounds] for name in competitors}

    monkeypatch.setenv("JIT_KERNEL_IMPLEMENTATION", "cpu")  # and put back what stands there now
    monkeypatch.setattr(hopper_serving, "OURS", ("hopper", "cpu"))
    monkeypatch.setattr(hopper_serving, "compete", compete)
    monkeypatch.setattr(hopper_serving, "in_graph", lambda call: call)
    monkeypatch.setattr(hopper_serving, "copy_rate", lambda: 4249.0)
    monkeypatch.setattr(hopper_serving, "host_us", lambda competitors: dict.fromkeys(competitors, 8.0))
    monkeypatch.setattr(pure_read, "PureRead", ReadsDouble)
    monkeypatch.setattr(serving_inputs, "make", lambda cell, device: make(cell, "cpu"))
    monkeypatch.setattr(hopper_serving.record, "circumstances", lambda device: {"device": device})
    cells = {each.name: each for each in (replace(SMALL, goal="decode 1x8k"), replace(SMALL, name="tree", tree=True))}
    monkeypatch.setattr(serving_cells, "CELLS", cells)
    monkeypatch.setattr(hopper_serving, "CELLS", cells)
    yield monkeypatch
    monkeypatch.undo()
    config.reload()


def test_a_run_writes_its_lines(
    without_gpu: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hopper_serving.main(["--check", "--folder", str(tmp_path)]) == 0
    copy, small, tree, host = map(json.loads, (tmp_path / "hopper_serving.jsonl").read_text().splitlines())
    assert copy["gbytes_per_s"] == 4249 and copy["device"] == "cuda:0"
    assert "does not serve cpu" in small["hopper_refused"]
    assert (small["cpu_ms"], small["cpu_range"], small["pure_read_linear_ms"]) == (2.0, [1.0, 4.0], 2.0)
    assert small["cpu_graph_ms"] == small["pure_read_graph_ms"] == 2.0
    assert small["cpu_gbytes_per_s"] == round(small["batch"] * 200 * 2 * 64 * 4 / 2.0 / 1e6)
    assert ("skipped" in tree) == (serving_inputs.missing(serving_cells.CELLS["tree"]) is not None)
    assert host["cpu_us"] == 8.0 and host["checked"] is False
    assert capsys.readouterr().out.splitlines()[-3].startswith("small ")


def test_what_is_wrong_is_not_timed_and_what_fails_does_not_end_the_run(
    without_gpu: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_gpu.setattr(serving_inputs, "our_call", lambda cell, inputs: lambda: inputs.out)
    without_gpu.setattr(hopper_serving, "host_us", lambda competitors: {}["absent"])
    without_gpu.setattr(hopper_serving, "OURS", ("cpu",))
    assert hopper_serving.main(["--check", "--only", "small", "host", "--folder", str(tmp_path)]) == 1
    _, small, host = map(json.loads, (tmp_path / "hopper_serving.jsonl").read_text().splitlines())
    assert "cpu_ms" not in small and "cpu_graph_ms" not in small and small["pure_read_ms"] == 2.0
    assert small["cpu_wrong"].startswith("relative error inf") and "cpu_graph_wrong" in small
    assert host["failed"] == "KeyError: 'absent'"
