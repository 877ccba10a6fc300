"""MIFO's freeze: the parameters that RL has moved most stay where they are during an SFT phase.

Around a plain AdamW loop (`model`, `optimizer`, which is SFT's own, `rl_step`, `sft_batches` and
`sft_loss` are yours):

    parameters = [p for p in model.parameters() if p.requires_grad]  # all that the optimizer has
    importance = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]  # C, for good
    anchor = [p.detach().clone() for p in parameters]  # the weights before the RL phase
    for phase in range(3):
        rl_step()  # as many as you like
        update_importance(importance, anchor, parameters, alpha=0.9)
        threshold = topk_threshold(importance, fraction=0.5)
        frozen = [c > threshold for c in importance]
        anchor = [p.detach().clone() for p in parameters]  # what SFT must not change
        for batch in sft_batches():
            optimizer.zero_grad()
            sft_loss(batch).backward()
            zero_frozen_gradients((p.grad for p in parameters), frozen)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            restore_frozen(parameters, frozen, anchor)
        anchor = [p.detach().clone() for p in parameters]  # the weights before the next RL phase

The order matters:
1. After the RL phase: C first (it needs the weights from before the phase), then the threshold,
   then the anchor of the SFT phase.
2. In each SFT step: backward, zero the frozen gradients, clip (so that the norm is the free
   entries' alone), step, put the frozen entries back. Zero gradients alone do not hold a parameter:
   AdamW's moments and its weight decay move it still.
3. After the SFT phase: a new anchor, so that C counts what RL moves and not what SFT has moved.

Which tensors to pass:
- One list of the parameters that are trained, in one order, for everything. One that is not (LoRA's
  base, a group with a learning rate of 0) has C = 0 but counts among "all entries": leave it out.
  A threshold of 0.0 means that no more entries have moved than may be frozen: all of them are. A
  tied parameter must be listed once, as model.parameters() does.
- Two optimizers over the same parameters, one for RL and one for SFT. With one, what SFT left in
  its moments would move weights in the next RL phase, and C would count that as RL's.
- Weights in float32. In bfloat16 most of RL's movement is lost to rounding, and with it C.
- Sharded by fully_shard (FSDP2): p.to_local(), p.grad.to_local() or None, and to topk_threshold the
  process group over which the parameters are sharded.
- FSDP1: the flat parameters, that is each rank's shards, with use_orig_params=False; their padding
  counts as entries of C = 0. Clip by model.clip_grad_norm_: a shard's norm is not the model's.
- Masks must lie where the gradients do; importance and anchor may lie on another device, such as
  the CPU, if frozen is made as [(c > threshold).to(p.device) ...].
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
    """C <- alpha * C + |theta_after - theta_before|, elementwise and in place.

    MIFO, arXiv 2510.04454. before and after are the parameters around one RL phase; the three lists
    run in parallel, tensors of equal shape. importance is float32, whatever the parameters are.
    """
    for c, old, new in zip(importance, before, after, strict=True):
        c.mul_(alpha).add_((new.to(c.device) - old).abs_())


@torch.no_grad()
def topk_threshold(tensors: list[Tensor], fraction: float, group=None) -> float:
    """The value above which the top `fraction` of all |entries| lies, over all ranks of `group`.

    Exact: with n entries in all and K = floor(fraction * n) it is the (K + 1)-th largest |entry|,
    so that `abs > threshold` selects K entries, or fewer by those that tie with the threshold. If
    K = n it is -inf.
      tensors  [[3, -1], [0, -7]] and [5, 2]: 7 5 3 2 1 0 in order of size
      fraction 0.5 -> 2.0    K = 3: 7, 5 and 3 are larger
      fraction 0.4 -> 3.0    K = 2: 7 and 5 are larger

    float32 tensors of any shapes, empty ones allowed. The bits of a non-negative float order as
    integers, so two histograms, of the upper 15 and then of the lower 16 bits, find the value:
    0.75 MiB all-reduced, whatever n is. Collective: every rank of `group` must call it (None: no
    communication, this rank alone). Raises ValueError if fraction is outside (0, 1], there is no
    entry, a tensor is not float32, or an entry is NaN.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"the fraction must be in (0, 1], not {fraction}")
    if any(t.dtype != torch.float32 for t in tensors):
        raise ValueError("topk_threshold takes float32 tensors")

    def histogram(bins: int, bin_of) -> Tensor:
        counts = torch.zeros(bins, dtype=torch.int64)
        for t in tensors:
            bits = t.abs().flatten().view(torch.int32)
            counts += torch.bincount(bin_of(bits), minlength=bins).cpu()
        if group is not None:
            # A group of both backends, "cpu:gloo,cuda:nccl", takes the CPU's.
            device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
            counts = counts.to(device)
            dist.all_reduce(counts, group=group)
        return counts.cpu()

    def find(counts: Tensor, index: int) -> tuple[int, int]:
        """The bin that holds the index-th largest entry (from 0), and that entry's index in it."""
        cumulated = counts.flip(0).cumsum(0)  # entries in the highest 1, 2, .. bins
        higher_bins = int((cumulated <= index).sum())
        if higher_bins > 0:
            index -= int(cumulated[higher_bins - 1])
        return len(counts) - 1 - higher_bins, index

    infinity = 0x7F800000  # the bits above it are NaNs'; they get a bin of their own
    nan_bin = 0x7FFF
    upper = histogram(1 << 15, lambda bits: torch.where(bits > infinity, nan_bin, bits >> 16))
    n = int(upper.sum())
    if n == 0:
        raise ValueError("topk_threshold needs at least one entry")
    if int(upper[nan_bin]) > 0:
        raise ValueError("topk_threshold found a NaN")
    k = math.floor(fraction * n + 1e-9)  # forgiving the product its rounding: 0.29 * 100 is 29
    if k >= n:
        return -math.inf
    high, index = find(upper, k)
    lower = histogram(1 << 16, lambda bits: bits[bits >> 16 == high] & 0xFFFF)
    low, _ = find(lower, index)
    return torch.tensor(high << 16 | low, dtype=torch.int32).view(torch.float32).item()


@torch.no_grad()
def zero_frozen_gradients(gradients: Iterable[Tensor | None], frozen: Iterable[Tensor]) -> None:
    """g <- 0 where frozen (bool), in place; a parameter without gradient (None) is passed over.

    Call it before the gradients are clipped, or their norm counts entries that will not move. Here
    and below `frozen` may be a generator, so that one parameter's mask exists at a time. A gradient
    that is not finite stays so: it is to be noticed, frozen or not.
    """
    for g, f in zip(gradients, frozen, strict=True):
        if g is not None:
            g.mul_(~f)


@torch.no_grad()
def restore_frozen(
    parameters: Iterable[Tensor], frozen: Iterable[Tensor], anchor: Iterable[Tensor]
) -> float:
    """theta <- anchor where frozen, bit for bit, in place, after the optimizer's step.

    Returns the largest |theta - anchor| found there before. The anchor may lie on another device
    than the parameters. To copy it, take _compare_frozen along.
    """
    return _compare_frozen(parameters, frozen, anchor, restore=True)


@torch.no_grad()
def largest_movement(
    parameters: Iterable[Tensor], frozen: Iterable[Tensor], anchor: Iterable[Tensor]
) -> float:
    """max |theta - anchor| over the frozen entries, 0.0 if there are none; changes nothing.

    To copy it, take _compare_frozen along.
    """
    return _compare_frozen(parameters, frozen, anchor, restore=False)


def _compare_frozen(parameters, frozen, anchor, restore: bool) -> float:
    moved = torch.zeros(())
    for p, f, a in zip(parameters, frozen, anchor, strict=True):
        held = torch.where(f, a.to(p.device, non_blocking=True), p)
        if p.numel() > 0:
            moved = torch.maximum(moved.to(p.device), (held - p).abs_().max())
        if restore:
            p.copy_(held)
    return moved.item()
