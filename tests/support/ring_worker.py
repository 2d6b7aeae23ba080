"""One rank of the distributed tests: random cases of every form of context parallelism, held against the numeric rule.

Every rank draws the same cases from the same seeds. The worst share of each form is written to a file by rank 0, or the
error of a rank to its own.
"""

from __future__ import annotations

import itertools
import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from random import Random

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from jit_kernel.attention import AttentionLayer, Prefix, backend_name, context_attention, plan_context, ring_attention
from jit_kernel.attention.parallel import exchange as communication
from jit_kernel.attention.parallel import zigzag
from jit_kernel.attention.parallel.choice import FORMS
from tests.support import backward, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Case = tuple[list[int], AttentionLayer, reference.Problem, tuple[Tensor, Tensor, Tensor], Prefix | None]


# Of the whole, 300 cases for each number of processes, `make test` runs a part.
CASES = int(os.environ.get("JIT_KERNEL_TEST_CASES", "0"))


def spawned(body: Callable[..., None], world_size: int, *arguments: object, folder: Path) -> None:
    """Run `body(rank, world_size, store, *arguments, folder)` in so many processes; the first error is raised."""
    context = multiprocessing.spawn(
        body, (world_size, str(folder / "store"), *arguments, str(folder)), nprocs=world_size, join=False
    )
    try:
        ended = False
        while not ended:  # join() returns as soon as one process has ended
            ended = context.join(timeout=300)
    except Exception as error:
        output = "\n".join(path.read_text() for path in sorted(folder.glob("rank*.txt")))
        raise AssertionError(output or str(error)) from error


def case(seed: int, form: str = "ring", heads: int = 1, dtypes: list[torch.dtype] = DTYPES) -> Case:
    """Lengths of packed sequences, the layer, the exact problem, q, k, v of the whole, and a prefix that all ranks
    hold. heads: what the numbers of query heads must be a multiple of."""
    dice, random = Random(seed), torch.Generator().manual_seed(seed)
    lengths = [dice.choice([0, 1, dice.randint(2, 70)]) for _ in range(dice.choice([1, 1, 2, 3]))]
    lengths[0] = lengths[0] or 33
    dtype, hk = dice.choice(dtypes), dice.choice([1, 2])
    hq = hk * dice.choice([1, 2, 4])
    if hq % heads:
        hq = heads
    hk = hk if hq % hk == 0 and (hk % heads == 0 or heads % hk == 0) else 1
    q, k, v = (torch.randn(sum(lengths), h, 64, generator=random).to(dtype) for h in (hq, hk, hk))
    layer = AttentionLayer(
        causal=dice.random() < 0.7,
        softcap=dice.choice([0.0, 0.0, 4.0]),
        sinks=torch.randn(hq, generator=random) if dice.random() < 0.3 else None,
    )
    windowed = dice.random() < 0.4 and (form == "all_to_all" or (form == "all_gather" and layer.causal))
    if windowed:
        layer = replace(layer, window_size=(dice.randint(0, 40), 0 if layer.causal else dice.randint(0, 9)))
    before = None if windowed or dice.random() < 0.6 else _prefix(dice, random, lengths, hk, dtype)
    problem = reference.Problem(
        _sequences(lengths, q, k, v, before),
        causal=layer.causal, window_size=layer.window_size, softcap=layer.softcap, sinks=layer.sinks,
    )  # fmt: skip
    return lengths, layer, problem, (q, k, v), before


def _prefix(dice: Random, random: torch.Generator, lengths: list[int], hk: int, dtype: torch.dtype) -> Prefix:
    shared = dice.random() < 0.3
    used = [dice.randint(0, 50) for _ in range(1 if shared else len(lengths))]
    k, v = (torch.randn(len(used), 50, hk, 64, generator=random).to(dtype) for _ in "kv")
    return Prefix(k, v, torch.tensor(used, dtype=torch.int32))


def _sequences(lengths: list[int], q: Tensor, k: Tensor, v: Tensor, before: Prefix | None) -> list[reference.Sequence]:
    sequences, at = [], 0
    for i, n in enumerate(lengths):
        keys, values = k[at : at + n], v[at : at + n]
        if before is not None:
            row = i if before.k_cache.shape[0] > 1 or len(lengths) == 1 else 0
            used = int(before.cache_seqlens[row])
            keys, values = (
                torch.cat([before.k_cache[row, :used], keys]),
                torch.cat([before.v_cache[row, :used], values]),
            )
        sequences.append(reference.Sequence(q[at : at + n], keys, values))
        at += n
    return sequences


def judged(out: Tensor, lse: Tensor, lengths: list[int], problem: reference.Problem) -> float:
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    rows = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    shares = reference.check([out[r] for r in rows], [lse[:, r] for r in rows], problem)
    if not shares.worst <= 1.0:
        raise AssertionError(f"lengths {lengths}: {shares}")
    return shares.worst


def attend(seed: int, device: torch.device) -> tuple[str, float]:
    """One case in one form on all ranks; (form, worst share), the share on rank 0. Twice: the bits must be equal."""
    size = dist.get_world_size()
    form = FORMS[seed % len(FORMS)]
    inner = {"all_to_all": size, "two_level": next(n for n in (2, 3, 1) if size % n == 0)}.get(form, 1)
    dtypes = DTYPES if device.type == "cpu" else DTYPES[1:]
    lengths, layer, problem, whole, before = case(seed, form, inner, dtypes)
    layer = replace(layer, sinks=None if layer.sinks is None else layer.sinks.to(device))
    if before is not None:
        before = Prefix(*(x.to(device) for x in (before.k_cache, before.v_cache, before.cache_seqlens)))
    heads = whole[0].shape[1], whole[1].shape[1]
    plan = plan_context(lengths, layer, heads, 64, device, form=form, inner=inner)
    parts = [plan.shard(x.to(device)) for x in whole]
    out, lse = context_attention(*parts, plan, layer, prefix=before, return_softmax_lse=True)
    again, lse_again = context_attention(*parts, plan, layer, prefix=before, return_softmax_lse=True)
    if not (torch.equal(out, again) and torch.equal(lse, lse_again)):
        raise AssertionError(f"seed {seed}, {form}: two runs differ")
    rows = zigzag.rows_of(lengths, size, plan.inner)
    outs, lses = (communication.gather(x, rows, None) for x in (out, lse.t().contiguous()))
    if dist.get_rank() != 0:
        return form, 0.0
    found = plan.unshard(outs).cpu(), plan.unshard(lses).t().cpu()
    try:
        return form, judged(*found, lengths, problem)
    except AssertionError as error:
        raise AssertionError(f"seed {seed}, {form}, inner {inner}, {layer}, prefix {before}: {error}") from error


def differentiate(seed: int, device: torch.device) -> tuple[str, float]:
    """The gradients of one case without a prefix in one form on all ranks; (form, worst share), on rank 0."""
    size = dist.get_world_size()
    form = FORMS[seed % len(FORMS)]
    inner = {"all_to_all": size, "two_level": next(n for n in (2, 3, 1) if size % n == 0)}.get(form, 1)
    dtypes = DTYPES if device.type == "cpu" else DTYPES[1:]
    lengths, layer, problem, whole, _ = case(seed, form, inner, dtypes)
    problem = replace(problem, sequences=_sequences(lengths, *whole, None))
    random = torch.Generator().manual_seed(seed)
    g = torch.randn(whole[0].shape, generator=random).to(whole[0].dtype)
    g_lse = torch.randn(whole[0].shape[1::-1], generator=random).t() if seed % 2 else None
    sinks = None if layer.sinks is None else layer.sinks.to(device).requires_grad_()
    layer = replace(layer, sinks=sinks)
    heads = whole[0].shape[1], whole[1].shape[1]
    plan = plan_context(lengths, layer, heads, 64, device, form=form, inner=inner)
    parts = [plan.shard(x.to(device)).requires_grad_() for x in whole]
    out, lse = context_attention(*parts, plan, layer, return_softmax_lse=True)
    results, of = [out], [plan.shard(g.to(device))]
    if g_lse is not None:
        results, of = [out, lse], [*of, plan.shard(g_lse.to(device)).t()]
    found = torch.autograd.grad(results, [*parts, *([] if sinks is None else [sinks])], of)
    rows = zigzag.rows_of(lengths, size, plan.inner)
    grads = [plan.unshard(communication.gather(x, rows, None)).cpu() for x in found[:3]]
    of_sinks = None
    if sinks is not None:  # every rank has its queries' part
        of_sinks = torch.stack(communication.gather(found[3][None], [1] * size, None)).sum((0, 1)).cpu()
    if dist.get_rank() != 0:
        return form, 0.0
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    cut = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    share, where = backward.check(
        [backward.Grads(*(x[r] for x in grads), of_sinks) for r in cut], problem,
        [g[r] for r in cut], [None if g_lse is None else g_lse[r].t() for r in cut],
    )  # fmt: skip
    if not share <= 1.0:
        raise AssertionError(f"seed {seed}, {form}, inner {inner}, lengths {lengths}, {layer}: {share} at {where}")
    return form, share


def run(
    rank: int, world_size: int, store: str, cases: int, folder: str, body: Callable[..., tuple[str, float]] = attend
) -> None:
    """The body of one process."""
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            backend_name("cpu"),
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=600),
        )
        worst = dict.fromkeys(FORMS, 0.0)
        fail_and_go_on()
        for seed in range(cases):
            form, share = body(seed, torch.device("cpu"))
            worst[form] = max(worst[form], share)
        dist.barrier()
        if rank == 0:
            Path(folder, "worst.json").write_text(json.dumps(worst))
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"rank{rank}.txt").write_text(traceback.format_exc())
        raise


def fail_and_go_on() -> None:
    """An error that a rank makes by itself, in the middle of a ring, leaves the group usable; cases come after."""
    lengths, layer = [40], AttentionLayer()
    x = zigzag.shard(torch.ones(40, 2, 64), lengths, dist.get_rank(), dist.get_world_size())
    cache = torch.ones(1, 4, 2, 64)
    of_wrong_dtype = Prefix(cache, cache, torch.tensor([4.0]))
    try:
        ring_attention(x, x, x, lengths, layer, prefix=of_wrong_dtype)
    except (TypeError, ValueError) as error:
        if "cache_seqlens" not in str(error):
            raise
    else:
        raise AssertionError("cache_seqlens of float32 was taken")


def run_gradients(rank: int, world_size: int, store: str, cases: int, folder: str) -> None:
    """The same for gradients."""
    run(rank, world_size, store, cases, folder, differentiate)


def run_without(rank: int, world_size: int, store: str, form: str, how: str, folder: str) -> None:
    """One rank of a group whose rank 1 dies, or comes too late, in a second call; the others write what they raise."""
    torch.set_num_threads(1)
    dist.init_process_group(
        backend_name("cpu"), init_method=f"file://{store}", rank=rank, world_size=world_size,
        timeout=timedelta(seconds=3),
    )  # fmt: skip
    layer, lengths = AttentionLayer(), [64]
    plan = plan_context(lengths, layer, (4, 4), 64, torch.device("cpu"), form=form, inner=2)
    x = plan.shard(torch.ones(64, 4, 64))
    context_attention(x, x, x, plan, layer)
    dist.barrier()
    if rank == 1:
        if how == "dies":
            os._exit(0)
        others = [Path(folder, f"rank{other}.txt") for other in range(world_size) if other != 1]
        for _ in range(600):
            if all(other.exists() for other in others):
                Path(folder, "rank1.txt").write_text("was there")
                break
            time.sleep(0.1)
        os._exit(0)
    try:
        context_attention(x, x, x, plan, layer)
        found = "nothing was raised"
    except BaseException as error:
        found = f"{type(error).__name__} {getattr(error, 'rank', None)}: {error}"
    Path(folder, f"rank{rank}.txt").write_text(found)
    if how != "dies":  # a connection that closes would tell the others before their time is up
        for _ in range(600):
            if len(list(Path(folder).glob("rank*.txt"))) >= world_size - 1:
                break
            time.sleep(0.1)
    os._exit(0)  # a group that lost a rank is not taken down in order
