"""The equations of GRPO, MIFO's SFT loss and PEAR, as pure functions on tensors.

Every function stands alone (it needs torch and nothing else), holds one equation, and returns sums rather than means: the
caller divides by a count taken over the whole optimizer step and over all ranks, so that no split into micro-batches or
ranks can change the result.

B rows, T positions, N tokens, V vocabulary, D hidden size, Q questions, G samples of a question. Logs are natural.
"""

import math

import torch
from torch import Tensor


def _tiles(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    temperature: float,
    chunk: int,
    copies: int = 1,
):
    """The logits, `chunk` vocabulary entries at a time: which entries, where and whether each target is among them, logits.

    The logits [N, chunk] and `copies` - 1 more tensors like it lie in buffers that every tile reuses: fresh memory for each
    would cost a CPU more than the arithmetic on it.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    buffers = hidden.new_empty(copies, len(hidden) * min(chunk, len(head_weight)), dtype=dtype)
    for start in range(0, len(head_weight), chunk):
        part = slice(start, start + chunk)
        weight = head_weight[part]  # [chunk, D]
        tiles = [
            b[: len(hidden) * len(weight)].view(len(hidden), len(weight)) for b in buffers
        ]  # [N, chunk] each
        if hidden.dtype == dtype:
            torch.addmm(
                hidden.new_zeros(()), hidden, weight.T, beta=0, alpha=1 / temperature, out=tiles[0]
            )
        else:
            tiles[0].copy_(hidden @ weight.T).div_(temperature)
        at = targets[:, None] - start  # [N, 1]
        yield part, at.clamp(0, len(weight) - 1), (at >= 0) & (at < len(weight)), *tiles


class _TokenLogprobs(torch.autograd.Function):
    """Logits live for one tile of the vocabulary only: they are made again in the backward pass instead of being kept.

    Four products of [N, D] and [V, D] are thus needed where full logits need three. A tile holds all N tokens, so that each
    row of the head's gradient is one product, summed within it, and neither copied nor added up.
    """

    @staticmethod
    def forward(ctx, hidden, head_weight, targets, temperature, chunk):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        peak = hidden.new_full(
            (len(hidden), 1), -math.inf, dtype=dtype
        )  # [N, 1] of the logits z seen so far: their largest,
        total, moment, picked = (
            torch.zeros_like(peak) for _ in range(3)
        )  # sum e^(z-peak), sum e^(z-peak) z, the target's
        for _, at, inside, logits, weights in _tiles(
            hidden, head_weight, targets, temperature, chunk, copies=2
        ):
            picked += logits.gather(1, at) * inside
            higher = torch.maximum(peak, logits.amax(1, keepdim=True))
            decay = (peak - higher).exp_()
            torch.sub(logits, higher, out=weights).exp_()
            total = total * decay + weights.sum(1, keepdim=True)
            moment = moment * decay + weights.mul_(logits).sum(1, keepdim=True)
            peak = higher
        log_z = peak + total.log()
        entropy = (log_z - moment / total)[:, 0]
        ctx.save_for_backward(hidden, head_weight, targets, log_z)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return (picked - log_z)[:, 0], entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, head_weight, targets, log_z = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=log_z.dtype)  # full precision over the tiles
        grad_weight = torch.empty_like(head_weight) if ctx.needs_input_grad[1] else None
        grad = grad[:, None] / ctx.temperature  # [N, 1]
        for part, at, inside, logits in _tiles(
            hidden, head_weight, targets, ctx.temperature, ctx.chunk
        ):
            d_logits = logits.sub_(log_z).exp_().mul_(-grad)  # grad * (onehot - p) / temperature
            d_logits = d_logits.scatter_add_(1, at, grad * inside).to(hidden.dtype)
            if hidden.dtype == grad_hidden.dtype:
                grad_hidden.addmm_(d_logits, head_weight[part])
            else:
                grad_hidden += d_logits @ head_weight[part]
            if grad_weight is not None:
                torch.mm(d_logits.T, hidden, out=grad_weight[part])
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    chunk: int = 1024,
):
    """log softmax(hidden @ head_weight.T / temperature) at the targets, and that softmax's entropy, in one pass.

    hidden [N, D] and head_weight [V, D] in one floating type, targets [N] int64; logits exist for `chunk` vocabulary entries
    at a time, so that the memory is 2 * chunk / V of that of all logits (3 * chunk / V for bfloat16 inputs), and none is kept
    for the backward pass. Returns (logprobs [N], entropy [N]) in nats, float32 (float64 for float64 inputs); only logprobs
    carry a gradient.
    """
    return _TokenLogprobs.apply(hidden, head_weight, targets, temperature, chunk)


def group_advantages(rewards: Tensor, normalize_std: bool) -> Tensor:
    """A_i = r_i - mean(r), over the G samples of a question; with normalize_std divided by (std(r) + 1e-6).

    rewards [Q, G] -> [Q, G]. The standard deviation is the unbiased one (GRPO, arXiv 2402.03300; without it: Dr. GRPO,
    arXiv 2503.20783). A group whose rewards are all equal gets exactly 0.
    """
    advantages = rewards - rewards.mean(1, keepdim=True)
    if normalize_std:
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-6)
    return advantages.masked_fill((rewards == rewards[:, :1]).all(1, keepdim=True), 0.0)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    per_sequence: bool = False,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    rollout_logprobs: Tensor | None = None,
    tis_cap: float = 0.0,
):
    """-sum_t w_t * [min(ratio_t * A, clip(ratio_t, 1 - clip_low, 1 + clip_high) * A) - kl_coef * KL_t], ratio = pi / pi_old.

    logprobs, old_logprobs, ref_logprobs, rollout_logprobs [B, T]; advantages [B]; mask [B, T] bool, True on response tokens.
    KL_t = exp(ref - logp) - (ref - logp) - 1 (the k3 estimate, never negative). With tis_cap > 0, the clipped term is
    weighted by min(pi_old / pi_rollout, tis_cap), which corrects for an engine whose probabilities are not the trainer's.
    Returns (scalar, metrics: sums over tokens). What the caller divides by makes the aggregation:
      the global number of tokens: token level (DAPO, arXiv 2503.14476);
      per_sequence=True (w_t = 1 / row's length) and the global number of rows: mean of per-sequence means (GRPO);
      the global number of rows times a constant length: Dr. GRPO.
    """
    ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0).exp()  # [B, T]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    advantages = advantages[:, None]
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    metrics = {
        "clipped_low": (mask & (ratio < 1 - clip_low) & (advantages < 0)).sum(),
        "clipped_high": (mask & (ratio > 1 + clip_high) & (advantages > 0)).sum(),
    }
    if rollout_logprobs is not None and tis_cap > 0:
        gain = (
            gain
            * (old_logprobs - rollout_logprobs)
            .masked_fill(~mask, 0.0)
            .exp()
            .clamp(max=tis_cap)
            .detach()
        )
    if ref_logprobs is not None:
        log_ratio = (ref_logprobs - logprobs).masked_fill(~mask, 0.0)
        kl = log_ratio.exp() - log_ratio - 1
        gain = gain - kl_coef * kl
        metrics["kl"] = kl.detach().sum()
    weights = mask.to(gain.dtype)
    if per_sequence:
        weights = weights / mask.sum(1, keepdim=True).clamp(min=1)
    return -(gain * weights).sum(), metrics


def top_entropy_count(n: int, rho: float) -> int:
    """ceil(rho * n), forgiving rho * n its rounding (0.07 * 100 is 7); at least 1 of any tokens."""
    return min(n, max(1, math.ceil(rho * n - 1e-9)))


def top_entropy_mask(entropy: Tensor, mask: Tensor, rho: float) -> Tensor:
    """The ceil(rho * n) tokens of highest entropy among the n masked-in tokens of each row; of equals, the earlier token.

    entropy [B, T], mask [B, T] bool -> [B, T] bool. A row with no token gets none, any other at least one (MIFO,
    arXiv 2510.04454, "high-entropy tokens"). Raises ValueError if rho is outside (0, 1].
    """
    if not 0 < rho <= 1:
        raise ValueError(f"rho must be in (0, 1], not {rho}")
    counts = (
        (mask.sum(1, keepdim=True).double() * rho - 1e-9).ceil().clamp(min=1)
    )  # [B, 1]; as top_entropy_count
    order = (
        entropy.masked_fill(~mask, -math.inf).sort(dim=1, descending=True, stable=True).indices
    )  # [B, T]
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return (rank < counts) & mask


def sft_loss(logprobs: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """-sum_t w_t * log pi(y_t | y_<t) over the masked-in tokens; the caller divides by their global number.

    logprobs [B, T], mask [B, T] bool, weights [B, T] (PEAR's; 1 without) -> scalar.
    """
    nll = -logprobs.masked_fill(~mask, 0.0)
    return (nll if weights is None else nll * weights).sum()


def pear_weights(
    logprobs: Tensor,
    behavior_logprobs: Tensor,
    mask: Tensor,
    variant: str,
    gamma: float = 0.999,
    block: int = 4,
    ratio_range: tuple[float, float] | None = (-0.08, 0.3),
    weight_range: tuple[float, float] | None = (-10.0, 5.0),
) -> Tensor:
    """Weights of the SFT loss that favour what the policy would go on to write itself (PEAR, arXiv 2602.01058).

    With d_t = logprobs - behavior_logprobs of the t-th of a row's n response tokens, clipped to ratio_range:
      sequence: log w_t = sum of all d_j
      token:    log w_t = (n - t) * log(gamma) + sum of d_j over j > t
      block:    log w_t = that of the last token of t's block of `block` tokens (the last block may be shorter)
    then clipped to weight_range. Both ranges are in log space, and None switches one off.

    logprobs, behavior_logprobs [B, T]; mask [B, T] bool -> [B, T], 0 outside the mask, without gradient. n is the row's own
    count of masked-in tokens, never the padded length. Raises ValueError on an unknown variant, gamma outside (0, 1] or
    block below 1.
    """
    if variant not in ("sequence", "token", "block"):
        raise ValueError(f"variant must be sequence, token or block, not {variant!r}")
    if not 0 < gamma <= 1 or block < 1:
        raise ValueError(f"gamma must be in (0, 1] and block at least 1, not {gamma} and {block}")
    d = (logprobs - behavior_logprobs).detach()
    if ratio_range is not None:
        d = d.clamp(*ratio_range)
    d = d.masked_fill(~mask, 0.0)
    n = mask.sum(1, keepdim=True)  # [B, 1]
    t = mask.cumsum(1)  # [B, T]; 1 for a row's first response token
    if variant == "sequence":
        log_weights = d.sum(1, keepdim=True).expand_as(d)
    else:
        suffix = (
            torch.nn.functional.pad(d, (0, 1)).flip(1).cumsum(1).flip(1)[:, 1:]
        )  # sum of d_j over j > t
        log_weights = (n - t) * math.log(gamma) + suffix
    if variant == "block":
        end = torch.minimum(
            ((t + block - 1) // block) * block, n
        )  # [B, T]; t of the last token of the block
        at = torch.where(mask, t, 0)  # slot 0 collects what is masked out
        by_t = torch.zeros(len(d), d.shape[1] + 1, dtype=d.dtype, device=d.device).scatter_(
            1, at, log_weights
        )
        log_weights = by_t.gather(1, end)
    if weight_range is not None:
        log_weights = log_weights.clamp(*weight_range)
    return log_weights.exp().masked_fill(~mask, 0.0)
