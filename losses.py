"""The equations of GRPO, MIFO's SFT loss, PEAR and their neighbours: pure functions on tensors.

Every function holds one equation, with its usual terms, and can be copied alone: it needs torch and
math, and names the function to copy along where there is one. Losses are sums, not means: the
caller divides by a count taken over the whole optimizer step and over all ranks, so that no split
into micro-batches or ranks changes the result.

B rows, T positions, N tokens, V vocabulary, D hidden size, Q questions, G samples of a question.
Logs are natural. The equations come first; the kernel that makes log-probabilities without keeping
the logits stands last.
"""

import math

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, normalize_std: bool) -> Tensor:
    """A_i = r_i - mean(r), over a question's G samples; normalize_std divides by std(r) + 1e-6.

    rewards [Q, G] -> [Q, G]. The standard deviation is the unbiased one (GRPO, arXiv 2402.03300;
    without it: Dr. GRPO, arXiv 2503.20783). A group whose rewards are all equal gets exactly 0.
    NaN is a sample that was not judged: its advantage is 0, and mean and deviation leave it out.
    """
    judged = ~rewards.isnan()  # [Q, G]
    advantages = rewards - rewards.nanmean(1, keepdim=True)
    if normalize_std:
        freedom = judged.sum(1, keepdim=True) - 1
        variance = advantages.square().nansum(1, keepdim=True) / freedom
        advantages = advantages / (variance.sqrt() + 1e-6)
    one = rewards.nanmedian(1, keepdim=True).values  # a reward of the group
    all_equal = ((rewards == one) | ~judged).all(1, keepdim=True)  # [Q, 1]
    # The mean of equal floats may be off by rounding.
    return advantages.masked_fill(all_equal | ~judged, 0.0)


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
    sequence_ratio: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-sum_t w_t * [min(ratio_t * A, clip(ratio_t) * A) - kl_coef * KL_t], the clipped policy loss.

    w_t is 1, or with per_sequence 1 / row's length. ratio = pi / pi_old, clipped to [1 - clip_low,
    1 + clip_high]. logprobs, old_logprobs, ref_logprobs, rollout_logprobs [B, T]; advantages [B];
    mask [B, T] bool, True on responses. KL_t = exp(ref - logp) - (ref - logp) - 1 (the k3 estimate,
    never negative). With tis_cap > 0 the clipped term is weighted by min(pi_old / pi_rollout,
    tis_cap), which corrects for an engine whose probabilities are not the trainer's. Returns
    (scalar, metrics: sums over tokens, of clipped_low, clipped_high and, with ref_logprobs, kl).

    What the caller divides by makes the aggregation:
      the global number of tokens: token level (DAPO, arXiv 2503.14476);
      with per_sequence the global number of rows: each row's mean (GRPO);
      the global number of rows times a constant length: Dr. GRPO.

    sequence_ratio makes it GSPO (arXiv 2507.18071): every token of a row has the row's ratio, the
    geometric mean of its tokens'. Rows are then clipped whole, in the paper at 3e-4 and 4e-4, with
    per_sequence. Where all ratios are 1, the gradient is the same as without (tis_cap aside).
    """
    lengths = mask.sum(1, keepdim=True).clamp(min=1)  # [B, 1]
    # Masked before exp: an inf or NaN outside the mask would reach the gradient as 0 * inf.
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0)  # [B, T]
    if sequence_ratio:
        log_ratio = (log_ratio.sum(1, keepdim=True) / lengths).expand_as(mask)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    advantages = advantages.view(len(mask), 1)  # one a row: [B, T] would not do
    gain = torch.minimum(ratio * advantages, clipped * advantages)  # [B, T]
    metrics = {
        "clipped_low": (mask & (ratio < 1 - clip_low) & (advantages < 0)).sum(),
        "clipped_high": (mask & (ratio > 1 + clip_high) & (advantages > 0)).sum(),
    }
    if rollout_logprobs is not None and tis_cap > 0:
        engine_ratio = (old_logprobs - rollout_logprobs).masked_fill(~mask, 0.0).exp()
        gain = gain * engine_ratio.clamp(max=tis_cap).detach()
    if ref_logprobs is not None:
        log_ref = (ref_logprobs - logprobs).masked_fill(~mask, 0.0)
        kl = log_ref.exp() - log_ref - 1
        gain = gain - kl_coef * kl
        metrics["kl"] = kl.detach().sum()
    weights = mask.to(gain.dtype)
    if per_sequence:
        weights = weights / lengths
    return -(gain * weights).sum(), metrics


def nft_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    epsilon: float = 1.0,
    negative: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-sum_t (1 - r) * [log R_t on right rows, negative * log c_t on wrong ones]: NFT's loss.

    arXiv 2505.18116. R = pi / pi_old, and r is the share of the question's samples that are right.
    pi_old is a mix of right answers (share r) and wrong ones (1 - r). What pi gains on the right
    ones it loses on the wrong ones:
      x_t = (1 - r * R_t) / (1 - r),    c_t = max(x_t, epsilon), with the gradient of x_t
    Where R = 1, the gradient is grpo_loss's, -A a token (if negative is 1, epsilon at most 1), and
    the loss 0. Elsewhere nothing is clipped: right tokens keep their gradient at any R, and that of
    wrong ones fades as R falls.

    logprobs, old_logprobs [B, T]; mask [B, T] bool; advantages [B]: rewards of 1 or 0 minus their
    group's mean, which give r = 1 - A of right rows and -A of wrong ones. Log R is capped at 10, as
    in the authors' code. Returns (scalar, metrics: floored, the number of wrong rows' tokens with
    x_t below epsilon); divide it as grpo_loss. Raises ValueError on an advantage outside (-1, 1).
    """
    if not (advantages.abs() < 1).all():
        raise ValueError("advantages must be rewards of 1 or 0 minus their mean, with no std")
    advantages = advantages.view(len(mask), 1)
    right = advantages > 0  # [B, 1]
    r = torch.where(right, 1 - advantages, -advantages)  # [B, 1]
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0).clamp(max=10.0)  # [B, T]
    x = (1 - r * log_ratio.exp()) / (1 - r)
    c = x.detach().clamp(min=epsilon) + (x - x.detach())  # [B, T]
    gain = (1 - r) * torch.where(right, log_ratio, negative * c.log())
    return -(gain * mask).sum(), {"floored": (mask & ~right & (x < epsilon)).sum()}


def top_entropy_count(n: int, rho: float) -> int:
    """ceil(rho * n) without the error of floats: 0.07 * 100 is 7, not 7.000000000000001. 1 or more.

    Summed over all examples of an optimizer step and all ranks it is what sft_loss is divided by.
    """
    return min(n, max(1, math.ceil(rho * n - 1e-9)))


def top_entropy_mask(entropy: Tensor, mask: Tensor, rho: float) -> Tensor:
    """The ceil(rho * n) tokens of highest entropy among the n masked-in ones of each row.

    entropy [B, T], mask [B, T] bool -> [B, T] bool (MIFO, arXiv 2510.04454). Of equal entropies the
    earlier token is taken. A row with no token gets none, any other at least one. To copy it, take
    top_entropy_count along.
      entropy  [[9.0, 0.1, 0.7, 0.2, 0.7],    mask  [[0, 1, 1, 1, 1],    rho  0.5
                [9.0, 0.3, 0.4, 0.5, 9.0]]           [0, 1, 1, 1, 0]]
      result   [[0, 0, 1, 0, 1],              2 of the 4 tokens: the prompt's 9.0 does not count
                [0, 0, 1, 1, 0]]              2 of the 3 tokens, nor does the padding's

    One row is one example. In a packed or padding-free batch a row holds several: split it into one
    row each first (by the sequences' lengths), or they compete with each other.
    Divide the loss by the sum of top_entropy_count over the whole step and all ranks, not by this
    mask's sum in one micro-batch. Raises ValueError if rho is outside (0, 1].
    """
    if not 0 < rho <= 1:
        raise ValueError(f"rho must be in (0, 1], not {rho}")
    counts = [top_entropy_count(n, rho) for n in mask.sum(1).tolist()]
    counts = torch.tensor(counts, device=entropy.device)[:, None]  # [B, 1]
    entropy = entropy.masked_fill(~mask, -math.inf)
    order = entropy.sort(dim=1, descending=True, stable=True).indices  # [B, T]: rank -> position
    rank = order.argsort(dim=1)  # [B, T]: position -> rank
    return rank < counts  # masked-out tokens rank last


def sft_loss(logprobs: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """-sum_t w_t * log pi(y_t | y_<t) over the masked-in tokens; divide by their global number.

    logprobs [B, T], mask [B, T] bool, weights [B, T] (PEAR's, those of sft_weights, their product;
    1 without) -> scalar.
    """
    nll = -logprobs.masked_fill(~mask, 0.0)
    if weights is not None:
        nll = nll * weights.masked_fill(~mask, 0.0)
    return nll.sum()


def sft_weights(logprobs: Tensor, kind: str, alpha: float = 0.1) -> Tensor:
    """Weights of the SFT loss that count a token less if the policy finds it improbable.

    With p_t = pi(y_t | y_<t):
      dft:    w_t = p_t                     DFT (arXiv 2508.05629)
      trust:  w_t = min(1, p_t / alpha)     TrSFT, of TRAPO (arXiv 2512.17636)
      phi:    w_t = p_t * (1 - p_t)         CHORD-phi (arXiv 2508.11408); less also if p is near 1

    logprobs [B, T] -> [B, T], without gradient. pear_weights may multiply them; the divisor stays
    the number of tokens. TrSFT's authors write its loss as -p / max(p, alpha), p in the divisor
    without gradient: another value, the same gradient. Tokens of high entropy have a small p: after
    top_entropy_mask, dft and phi give far smaller gradients. Raises ValueError on an unknown kind
    or an alpha outside (0, 1].
    """
    if kind not in ("dft", "trust", "phi"):
        raise ValueError(f"kind must be dft, trust or phi, not {kind!r}")
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be in (0, 1], not {alpha}")
    p = logprobs.detach().exp()
    if kind == "dft":
        return p
    if kind == "trust":
        return (p / alpha).clamp(max=1.0)
    return p * (1 - p)


def sed_penalty(
    logprobs: Tensor,
    top_mass: Tensor,
    mask: Tensor,
    tau: float,
    strength: float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    """strength * sum_t M_t * (p_t - 1/2)^2, M_t = 1 where top_mass < tau; SED adds it to sft_loss.

    SED-SFT (arXiv 2602.07464). Where the k most probable tokens hold less than tau together, the
    policy has a choice: there the penalty draws the demonstration's token towards p = 1/2, from
    below and from above. logprobs, top_mass (token_logprobs' for top_k = k) [B, T]; mask [B, T]
    bool; weights [B, T] as sft_loss's -> scalar. No gradient through M. For tau see sed_threshold.

    The authors' code contradicts itself: its loss compares the mass of the top 2 with a tau that,
    unless k is given, was measured on the top 10. Which of them the paper's figures used is not
    known; here give both the same k.
    """
    uncertain = mask & (top_mass < tau)  # [B, T]
    penalty = strength * (logprobs.masked_fill(~uncertain, 0.0).exp() - 0.5).square()  # [B, T]
    if weights is not None:
        penalty = penalty * weights
    return penalty.masked_fill(~uncertain, 0.0).sum()


def sed_threshold(top_mass: Tensor, ratio: float) -> float:
    """tau that the share `ratio` of all tokens reaches: sed_penalty acts on the other 1 - ratio.

    top_mass [N], of the policy before training; SED-SFT (arXiv 2602.07464) takes 100 samples and
    0.7. Of N masses in falling order it is the floor(ratio * N)-th, at least the first. Raises
    ValueError if ratio is outside (0, 1] or there is no mass.
    """
    if not 0 < ratio <= 1 or len(top_mass) == 0:
        raise ValueError(f"ratio must be in (0, 1], of one mass or more, not {ratio}")
    place = max(1, math.floor(ratio * len(top_mass) + 1e-9))  # as in top_entropy_count
    return top_mass.sort(descending=True).values[place - 1].item()


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
    """Weights of the SFT loss that favour what the policy would go on to write itself (PEAR).

    arXiv 2602.01058. With d_t = logprobs - behavior_logprobs of the t-th of a row's n response
    tokens, clipped to ratio_range:
      sequence: log w_t = sum of all d_j
      token:    log w_t = (n - t) * log(gamma) + sum of d_j over j > t
      block:    log w_t = that of the last token of t's block of `block` tokens (the last block of
                a row may be shorter)
    then clipped to weight_range. Both ranges are in log space, and None switches one off. Five
    tokens in blocks of two, gamma 1, nothing clipped:
      d      [ln 2, ln 3, ln 5, ln 2, ln 3]
      token  [90, 30, 6, 3, 1]       block  [30, 30, 3, 3, 1]       sequence  [180] * 5

    behavior_logprobs are those of the same tokens, at temperature 1, under the model that wrote
    them. The defaults of gamma, block and the ranges are the paper's by secondary sources.
    logprobs, behavior_logprobs [B, T]; mask [B, T] bool -> [B, T], 0 outside the mask, without
    gradient. One row is one example, as in top_entropy_mask. n is the row's own count of masked-in
    tokens, never the padded length. Raises ValueError on an unknown variant, gamma outside (0, 1]
    or block below 1.
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
        # Shifted before it is summed, not d subtracted after: inf - inf would be NaN.
        shifted = torch.nn.functional.pad(d[:, 1:], (0, 1))
        suffix = shifted.flip(1).cumsum(1).flip(1)  # [B, T]; sum of d_j over j > t
        log_weights = (n - t) * math.log(gamma) + suffix
    if variant == "block":
        # Column t is response token t's; a masked-out one has the t, and the value, of the last
        # response token before it.
        by_t = log_weights.new_zeros(len(d), d.shape[1] + 1).scatter_(1, t, log_weights)
        block_number = (t + block - 1) // block  # from 1
        last = torch.minimum(block_number * block, n)  # [B, T]; t of the block's last token
        log_weights = by_t.gather(1, last)
    if weight_range is not None:
        log_weights = log_weights.clamp(*weight_range)
    return log_weights.exp().masked_fill(~mask, 0.0)


# --------------------------------------------------------------------------------------------------
# The kernel: log-probability and entropy of each token, a tile of the vocabulary at a time.
# To copy it, take all three of token_logprobs, _TokenLogprobs and _tiles.


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    chunk: int = 1024,
    top_k: int = 0,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, ...]:
    """log softmax(logits / temperature) at the targets, and that softmax's entropy.

    z = scale * (hidden @ head_weight.T + bias) are the logits; softcap * tanh(z / softcap) with a
    soft cap. Phi's head has a bias, Cohere's and Granite's a scale, Gemma 2's a soft cap.

    hidden [N, D], head_weight [V, D] and bias [V] in one floating type, targets [N] int64 ->
    (logprobs [N], entropy [N]) in nats, float32 (float64 for float64 inputs); only logprobs carry a
    gradient. Logits exist for `chunk` vocabulary entries at a time and none is kept for the
    backward pass: the memory is 2 * chunk / V of that of all logits (3 * chunk / V for bfloat16
    inputs). Targets are in [0, V): labels of -100 are not refused, so pick hidden[mask] and
    targets[mask] first.
    With top_k > 0 a third tensor [N] follows: the probability that the top_k most probable tokens
    have together, without gradient.
    """
    scaling = temperature, scale, softcap
    found = _TokenLogprobs.apply(hidden, head_weight, bias, targets, scaling, chunk, top_k)
    return found if top_k > 0 else found[:2]


class _TokenLogprobs(torch.autograd.Function):
    """Logits are made again in the backward pass instead of being kept.

    Four products of [N, D] and [V, D] are thus needed where full logits need three. A tile holds
    all N tokens, so that each row of the head's gradient is one product, summed within it, and
    neither copied nor added up.
    """

    @staticmethod
    def forward(ctx, hidden, head_weight, bias, targets, scaling, chunk, top_k):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        # Of the logits z of the tiles so far, [N, 1] each: the largest, sum of e^(z - peak), sum of
        # e^(z - peak) * z, and the target's.
        peak = hidden.new_full((len(hidden), 1), -math.inf, dtype=dtype)
        total = torch.zeros_like(peak)
        moment = torch.zeros_like(peak)
        picked = torch.zeros_like(peak)
        top = peak.expand(-1, top_k)  # [N, top_k]: the largest logits of the tiles so far
        tiles = _tiles(hidden, head_weight, bias, targets, scaling, chunk, copies=2)
        for _, column, inside, logits, weights in tiles:
            picked += logits.gather(1, column) * inside
            if top_k > 0:
                best = logits.topk(min(top_k, logits.shape[1])).values
                top = torch.cat([top, best], 1).topk(top_k).values
            higher = torch.maximum(peak, logits.amax(1, keepdim=True))
            decay = (peak - higher).exp_()
            torch.sub(logits, higher, out=weights).exp_()
            total = total * decay + weights.sum(1, keepdim=True)
            moment = moment * decay + weights.mul_(logits).sum(1, keepdim=True)
            peak = higher
        log_z = peak + total.log()
        entropy = (log_z - moment / total)[:, 0]
        ctx.save_for_backward(hidden, head_weight, bias, targets, log_z)
        ctx.scaling, ctx.chunk = scaling, chunk
        top_mass = (top - log_z).exp().sum(1)
        ctx.mark_non_differentiable(entropy, top_mass)
        return (picked - log_z)[:, 0], entropy, top_mass

    @staticmethod
    def backward(ctx, grad, *_):
        hidden, head_weight, bias, targets, log_z = ctx.saved_tensors
        temperature, scale, softcap = ctx.scaling
        grad_hidden = torch.zeros_like(hidden, dtype=log_z.dtype)  # full precision over the tiles
        grad_weight = torch.empty_like(head_weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
        grad = grad[:, None] * scale / temperature  # [N, 1], by the head's outputs
        copies = 1 if softcap is None else 2
        tiles = _tiles(hidden, head_weight, bias, targets, ctx.scaling, ctx.chunk, copies)
        for part, column, inside, logits, *more in tiles:
            if softcap is not None:  # the cap's own slope: 1 - tanh^2
                slope = torch.square(logits, out=more[0])
                slope.mul_(-((temperature / softcap) ** 2)).add_(1)
            d_logits = logits.sub_(log_z).exp_().mul_(-grad)
            d_logits.scatter_add_(1, column, grad * inside)  # grad * (onehot - p)
            if softcap is not None:
                d_logits.mul_(slope)
            if grad_bias is not None:
                grad_bias[part] = d_logits.sum(0)
            d_logits = d_logits.to(hidden.dtype)
            if hidden.dtype == grad_hidden.dtype:
                grad_hidden.addmm_(d_logits, head_weight[part])
            else:
                grad_hidden += d_logits @ head_weight[part]
            if grad_weight is not None:
                torch.mm(d_logits.T, hidden, out=grad_weight[part])
        return grad_hidden.to(hidden.dtype), grad_weight, grad_bias, None, None, None, None


def _tiles(hidden, head_weight, bias, targets, scaling, chunk: int, copies: int):
    """The logits, `chunk` vocabulary entries at a time.

    Yields the slice of the vocabulary, each target's column in it, whether the target is in it at
    all, the logits [N, chunk], and `copies` - 1 more tensors like them. All tiles lie in the same
    buffers: fresh memory for each would cost a CPU more than the arithmetic on it.
    """
    temperature, scale, softcap = scaling
    factor = scale / (temperature if softcap is None else softcap)
    n = len(hidden)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    buffers = hidden.new_empty(copies, n * min(chunk, len(head_weight)), dtype=dtype)
    for start in range(0, len(head_weight), chunk):
        part = slice(start, start + chunk)
        weight = head_weight[part]  # [chunk, D]; the last may be shorter
        width = len(weight)
        tiles = [buffer[: n * width].view(n, width) for buffer in buffers]
        if hidden.dtype == dtype:
            zero = hidden.new_zeros(())
            torch.addmm(zero, hidden, weight.T, beta=0, alpha=factor, out=tiles[0])
        elif hidden.is_cuda:  # not rounded to bfloat16 first; CPUs have no such product
            torch.mm(hidden, weight.T, out_dtype=dtype, out=tiles[0]).mul_(factor)
        else:
            tiles[0].copy_(hidden @ weight.T).mul_(factor)
        if bias is not None:
            tiles[0].add_(bias[part], alpha=factor)
        if softcap is not None:
            tiles[0].tanh_().mul_(softcap / temperature)
        column = targets[:, None] - start  # [N, 1]
        inside = (column >= 0) & (column < width)
        yield part, column.clamp(0, width - 1), inside, *tiles
