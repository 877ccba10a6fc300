"""MIFO's freeze: which parameters RL has moved most, and an optimizer step that leaves them where they are.

Every function takes plain tensors. Under FSDP pass each rank's local shards and, to `topk_threshold`, the process group
over which the parameters are sharded; nothing but two small histograms is ever communicated.
"""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def update_importance(
    importance: list[Tensor], before: list[Tensor], after: list[Tensor], alpha: float
) -> None:
    """C <- alpha * C + |theta_after - theta_before|, elementwise and in place (MIFO, arXiv 2510.04454).

    before and after are the parameters around one RL phase; the three lists run in parallel, tensors of equal shape.
    """
    for c, old, new in zip(importance, before, after, strict=True):
        c.mul_(alpha).add_((new.to(c.device) - old).abs_())


@torch.no_grad()
def topk_threshold(tensors: list[Tensor], fraction: float, group=None) -> float:
    """The value above which the top `fraction` of all |entries| lies: exact, over all tensors (and all ranks of `group`).

    With n entries and K = floor(fraction * n) it is the (K + 1)-th largest |entry|, so that `abs > threshold` selects K
    entries, or fewer by those that tie with the threshold: K to within one tie class. If K = n it is -inf.

    float32 tensors of any shapes, empty ones allowed. The bits of a non-negative float order as integers, so two histograms,
    of the upper 15 and then of the lower 16 bits, find the value: 0.75 MiB all-reduced, whatever n is. Collective: every
    rank of `group` must call it (group None and an initialised default process group: no communication, this rank alone).
    Raises ValueError if fraction is outside (0, 1], there is no entry, a tensor is not float32, or an entry is NaN.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"the fraction must be in (0, 1], not {fraction}")
    if any(t.dtype != torch.float32 for t in tensors):
        raise ValueError("topk_threshold takes float32 tensors")

    def histogram(bins: int, bits_of) -> Tensor:
        counts = torch.zeros(bins, dtype=torch.int64)
        for t in tensors:
            counts += torch.bincount(
                bits_of(t.abs().flatten().view(torch.int32)), minlength=bins
            ).cpu()
        if group is not None:
            device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
            counts = counts.to(device)
            dist.all_reduce(counts, group=group)
        return counts.cpu()

    def find(counts: Tensor, rank: int) -> tuple[int, int]:
        """The bin that holds the rank-th largest entry (from 0), and that entry's rank within the bin."""
        above = counts.flip(0).cumsum(0)  # entries in the highest 1, 2, .. bins
        i = int((above <= rank).sum())
        return len(counts) - 1 - i, rank - (int(above[i - 1]) if i else 0)

    infinity = 0x7F800000  # the bits above it are NaNs'; they get a bin of their own
    upper = histogram(1 << 15, lambda bits: torch.where(bits > infinity, 0x7FFF, bits >> 16))
    n = int(upper.sum())
    if n == 0:
        raise ValueError("topk_threshold needs at least one entry")
    if int(upper[0x7FFF]):
        raise ValueError("topk_threshold found a NaN")
    k = math.floor(fraction * n + 1e-9)
    if k >= n:
        return -math.inf
    high, rank = find(upper, k)
    low, _ = find(histogram(1 << 16, lambda bits: bits[bits >> 16 == high] & 0xFFFF), rank)
    return torch.tensor(high << 16 | low, dtype=torch.int32).view(torch.float32).item()


@torch.no_grad()
def zero_frozen_gradients(gradients: Iterable[Tensor], frozen: Iterable[Tensor]) -> None:
    """g <- 0 where frozen (bool), in place. Call it before the gradients' norm is clipped, or that norm is not theirs.

    Here and below `frozen` may be a generator, so that no more than one parameter's mask exists at a time. A gradient that
    is not finite stays so: it is to be noticed, frozen or not.
    """
    for g, f in zip(gradients, frozen, strict=True):
        g.mul_(~f)


@torch.no_grad()
def restore_frozen(
    parameters: Iterable[Tensor], frozen: Iterable[Tensor], anchor: Iterable[Tensor]
) -> float:
    """theta <- anchor where frozen, bit for bit, in place; returns the largest |theta - anchor| found there before.

    Zero gradients alone do not hold a parameter: AdamW's moments from earlier steps and its weight decay move it still.
    The anchor may lie on another device than the parameters.
    """
    return _compare_frozen(parameters, frozen, anchor, restore=True)


@torch.no_grad()
def largest_movement(
    parameters: Iterable[Tensor], frozen: Iterable[Tensor], anchor: Iterable[Tensor]
) -> float:
    """max |theta - anchor| over the frozen entries, 0.0 if there are none."""
    return _compare_frozen(parameters, frozen, anchor, restore=False)


def _compare_frozen(parameters, frozen, anchor, restore: bool) -> float:
    moved = torch.zeros(())
    for p, f, a in zip(parameters, frozen, anchor, strict=True):
        held = torch.where(f, a.to(p.device, non_blocking=True), p)
        if p.numel():
            moved = torch.maximum(moved.to(p.device), (held - p).abs_().max())
        if restore:
            p.copy_(held)
    return moved.item()
