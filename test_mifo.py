"""Every test. `pytest` runs them all.

Real GSM8K and MATH-500 are looked for in ../shared/data, and skipped where absent.
"""

import argparse
import copy
import dataclasses
import inspect
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import textwrap
import time
import types
import zlib
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402  before transformers: it hides packages that break its import
from safetensors.torch import load_file  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402
import numpy as np  # noqa: E402
import pyarrow  # noqa: E402
import pyarrow.parquet  # noqa: E402
import pytest  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
import eval as evaluation  # noqa: E402
import freeze  # noqa: E402
import losses  # noqa: E402
import mifo  # noqa: E402
import rollout  # noqa: E402

# --------------------------------------------------------------------------------------------------
# The equations, against plain loops, full softmax and values worked out by hand


def randn(*shape, seed=0, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def flags(*shape, seed, probability):
    """A random bool tensor."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < probability


COPIED_ALONG = {  # function -> what its docstring says to copy along
    losses.group_advantages: [],
    losses.grpo_loss: [],
    losses.top_entropy_count: [],
    losses.top_entropy_mask: [losses.top_entropy_count],
    losses.sft_loss: [],
    losses.pear_weights: [],
    losses.token_logprobs: [losses._TokenLogprobs, losses._tiles],
    freeze.update_importance: [],
    freeze.topk_threshold: [],
    freeze.zero_frozen_gradients: [],
    freeze.restore_frozen: [freeze._compare_frozen],
    freeze.largest_movement: [freeze._compare_frozen],
}


@pytest.mark.parametrize("function", COPIED_ALONG, ids=lambda f: f.__name__)
def test_every_equation_works_when_copied_alone(function):
    rows, mask = randn(2, 3), torch.tensor([[True, True, False], [True, True, True]])
    floats = [randn(4, 2, dtype=torch.float32)]
    arguments = {
        "group_advantages": (rows, True),
        "grpo_loss": (rows, 2 * rows, rows[:, 0], mask, 0.2, 0.3, True, 3 * rows, 0.1, 4 * rows, 2),
        "top_entropy_count": (10, 0.2),
        "top_entropy_mask": (rows, mask, 0.5),
        "sft_loss": (rows, mask, 2 * rows),
        "pear_weights": (rows, 2 * rows, mask, "block", 0.9, 2),
        "token_logprobs": (rows, randn(5, 3, seed=1), torch.tensor([4, 0]), 0.7, 2),
        "topk_threshold": (floats, 0.5),
        "zero_frozen_gradients": (floats, [floats[0] > 0]),
        "update_importance": (floats, [floats[0] + 1], [floats[0] + 2], 0.5),
        "restore_frozen": (floats, [floats[0] > 0], [floats[0] + 1]),
        "largest_movement": (floats, [floats[0] > 0], [floats[0] + 1]),
    }[function.__name__]
    copied = {"math": math, "torch": torch, "Tensor": torch.Tensor, "Iterable": Iterable}
    for part in [*COPIED_ALONG[function], function]:
        exec(inspect.getsource(part), copied)
    results = []
    for call in (function, copied[function.__name__]):
        given = copy.deepcopy(arguments)  # some of them write to their arguments
        tensors = [value for value in given if not isinstance(value, str)]
        results.append([call(*given), *tensors])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0, equal_nan=True)


def test_group_advantages_by_hand():
    """verl's compute_grpo_outcome_advantage on groups (1, 0) and (1, 1)."""
    rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert losses.group_advantages(rewards, False).tolist() == [[0.5, -0.5], [0.0, 0.0]]
    expected = 0.5 / (math.sqrt(0.5) + 1e-6)  # the unbiased deviation of (1, 0) is sqrt(1/2)
    assert expected == pytest.approx(0.7071, abs=1e-4)
    got = losses.group_advantages(rewards.double(), True)
    assert got.flatten().tolist() == pytest.approx([expected, -expected, 0, 0], abs=1e-12)


@pytest.mark.parametrize("normalize_std", [False, True])
def test_group_advantages_against_a_loop(normalize_std):
    rewards = torch.rand(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards[1] = (rewards[1] > 0.5).double()
    rewards[2] *= 1e-6  # a spread of the size of what is added to the standard deviation
    advantages = losses.group_advantages(rewards, normalize_std).tolist()
    for got, group in zip(advantages, rewards.tolist()):
        divisor = statistics.stdev(group) + 1e-6 if normalize_std else 1.0
        mean = statistics.fmean(group)
        expected = [(r - mean) / divisor for r in group]
        assert got == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("normalize_std", [False, True])
def test_group_advantages_of_equal_rewards_are_exactly_zero(normalize_std):
    values = [0.1, 0.7, 1.0, 0.0, -3.3, 1e-8, 1e8, 1 / 3]
    for size in (2, 3, 5, 8, 11):
        rewards = torch.tensor(values)[:, None].repeat(1, size)
        advantages = losses.group_advantages(rewards, normalize_std)
        assert advantages.shape == rewards.shape and advantages.eq(0).all(), size


def grpo_oracle(
    logprobs, old, advantage, low=0.2, high=0.2, ref=None, kl_coef=0.0, engine=None, cap=0.0
):
    """One response, token by token: its gains [n], whose sum GRPO raises, and what was counted.

    logprobs, old, ref and engine are the response's own n tokens, without padding, float64; the
    advantage is a float. The gains carry the gradient of logprobs.
    """
    gains = []
    counts = {"clipped_low": 0, "clipped_high": 0, "kl": 0.0}
    for t in range(len(logprobs)):
        ratio = torch.exp(logprobs[t] - old[t].item())
        if advantage >= 0:  # only a rise of a good token and a fall of a bad one are cut off
            gain = advantage * ratio.clamp(max=1 + high)
            counts["clipped_high"] += int(advantage > 0 and ratio > 1 + high)
        else:
            gain = advantage * ratio.clamp(min=1 - low)
            counts["clipped_low"] += int(ratio < 1 - low)
        if engine is not None and cap > 0:
            gain = gain * min(math.exp(old[t].item() - engine[t].item()), cap)
        if ref is not None:
            q = torch.exp(ref[t].item() - logprobs[t])
            kl = q - torch.log(q) - 1
            counts["kl"] += kl.item()
            gain = gain - kl_coef * kl
        gains.append(gain)
    return torch.stack(gains) if gains else logprobs.new_zeros(0), counts


def rollouts():
    """Both signs of advantage; log-ratios far beyond both clips; row 2 empty, row 5 one token."""
    mask = flags(6, 9, seed=1, probability=0.7)
    mask[2] = False
    mask[5] = torch.arange(9) == 3
    old = randn(6, 9, seed=2, scale=0.5) - 2
    logprobs = old + randn(6, 9, seed=3, scale=0.7)
    ref = old + randn(6, 9, seed=4, scale=0.5)
    engine = old + randn(6, 9, seed=5, scale=0.7)
    advantages = torch.tensor([1.3, -0.8, 0.5, -1.7, 0.0, 0.6], dtype=torch.float64)
    return logprobs, old, advantages, mask, ref, engine


CLIPS, KL_AND_CAP = [(0.2, 0.2), (0.1, 0.4)], [(0.0, 0.0), (0.3, 0.0), (0.0, 1.4), (0.3, 1.4)]
GRPO_SETTINGS = [
    dict(low=low, high=high, per_sequence=per_sequence, kl_coef=kl_coef, cap=cap)
    for (low, high), per_sequence, (kl_coef, cap) in itertools.product(
        CLIPS, [False, True], KL_AND_CAP
    )
]


def setting_id(s):
    return "-".join(map(str, s.values()))


def grpo_loss(logprobs, old, advantages, mask, ref, engine, s):
    return losses.grpo_loss(
        logprobs,
        old,
        advantages,
        mask,
        clip_low=s["low"],
        clip_high=s["high"],
        per_sequence=s["per_sequence"],
        ref_logprobs=ref if s["kl_coef"] else None,
        kl_coef=s["kl_coef"],
        rollout_logprobs=engine if s["cap"] else None,
        tis_cap=s["cap"],
    )


@pytest.mark.parametrize("s", GRPO_SETTINGS, ids=setting_id)
def test_grpo_loss_and_gradient_against_a_loop(s):
    logprobs, old, advantages, mask, ref, engine = rollouts()
    leaf, other_leaf = logprobs.clone().requires_grad_(), logprobs.clone().requires_grad_()
    expected, totals = 0.0, {"clipped_low": 0, "clipped_high": 0, "kl": 0.0}
    for b in range(6):
        row = mask[b]
        gains, counts = grpo_oracle(
            leaf[b, row],
            old[b, row],
            advantages[b].item(),
            low=s["low"],
            high=s["high"],
            ref=ref[b, row] if s["kl_coef"] else None,
            kl_coef=s["kl_coef"],
            engine=engine[b, row],
            cap=s["cap"],
        )
        divisor = max(1, len(gains)) if s["per_sequence"] else 1
        expected = expected - gains.sum() / divisor
        for key, value in counts.items():
            totals[key] += value
    loss, metrics = grpo_loss(other_leaf, old, advantages, mask, ref, engine, s)
    assert loss.shape == () and loss.item() == pytest.approx(expected.item(), abs=1e-9)
    assert totals["clipped_low"] >= 2 and totals["clipped_high"] >= 2  # both clips are at work
    assert ("kl" in metrics) == (s["kl_coef"] > 0)
    for key, value in metrics.items():
        assert value.item() == pytest.approx(totals[key], abs=1e-9), key
        assert not value.requires_grad
    expected.backward()
    loss.backward()
    torch.testing.assert_close(other_leaf.grad, leaf.grad, rtol=0, atol=1e-9)


@pytest.mark.parametrize("s", GRPO_SETTINGS[3::4], ids=setting_id)
def test_grpo_gradient_by_finite_differences(s):
    logprobs, old, advantages, mask, ref, engine = rollouts()
    loss = lambda x: grpo_loss(x, old, advantages, mask, ref, engine, s)[0]
    assert torch.autograd.gradcheck(loss, logprobs.requires_grad_())


def test_grpo_loss_by_hand():
    # One token a row, ratio 1.5 or 0.5 and advantage 1 or -1:
    # min(1.5, 1.28); min(-1.5, -1.28); min(0.5, 0.8); min(-0.5, -0.8).
    ratio = torch.tensor([[1.5], [1.5], [0.5], [0.5]], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    zero, one, mask = torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1, dtype=torch.bool)
    for row, gain in enumerate([1.28, -1.5, 0.5, -0.8]):
        loss, metrics = losses.grpo_loss(
            ratio[row : row + 1].log(), zero, advantages[row : row + 1], mask, 0.2, 0.28
        )
        assert loss.item() == pytest.approx(-gain, abs=1e-12)
        assert metrics["clipped_high"].item() == int(row == 0)
        assert metrics["clipped_low"].item() == int(row == 3)
    # k3 at pi_ref / pi = 2: 2 - ln 2 - 1; the ratio stands at 1
    ref = torch.tensor([[math.log(2)]])
    loss, metrics = losses.grpo_loss(zero, zero, one, mask, ref_logprobs=ref, kl_coef=0.1)
    assert metrics["kl"].item() == pytest.approx(1 - math.log(2), abs=1e-6)
    assert loss.item() == pytest.approx(-1 + 0.1 * (1 - math.log(2)), abs=1e-6)
    # pi_old / pi_engine = 3, capped at 2; and 0.5, which is not raised; and no weight with cap 0
    for quotient, cap, weight in ((3.0, 2.0, 2.0), (0.5, 2.0, 0.5), (3.0, 0.0, 1.0)):
        engine = torch.tensor([[-math.log(quotient)]])
        loss, _ = losses.grpo_loss(zero, zero, one, mask, tis_cap=cap, rollout_logprobs=engine)
        assert loss.item() == pytest.approx(-weight, abs=1e-6)


def verl_agg_loss(rows, mode, horizon):
    """verl's agg_loss of the tokens' losses, a list a row."""
    if mode == "token-mean":
        return sum(map(sum, rows)) / sum(map(len, rows))
    if mode == "seq-mean-token-mean":
        return statistics.fmean(sum(row) / len(row) for row in rows)
    assert mode == "seq-mean-token-sum-norm"
    return statistics.fmean(sum(row) / horizon for row in rows)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_grpo_aggregations_are_verls(mode):
    kept = [0, 1, 3, 4, 5]  # verl has no empty rows
    logprobs, old, advantages, mask = (t[kept] for t in rollouts()[:4])
    rows = []
    for b in range(5):
        gains, _ = grpo_oracle(logprobs[b, mask[b]], old[b, mask[b]], advantages[b].item())
        rows.append((-gains).tolist())
    per_sequence = mode == "seq-mean-token-mean"
    total, _ = losses.grpo_loss(logprobs, old, advantages, mask, per_sequence=per_sequence)
    divisors = {
        "token-mean": int(mask.sum()),
        "seq-mean-token-mean": 5,
        "seq-mean-token-sum-norm": 5 * 8192,
    }
    expected = verl_agg_loss(rows, mode, 8192)
    assert total.item() / divisors[mode] == pytest.approx(expected, rel=1e-6)


def test_grpo_tis_weight_is_detached():
    logprobs, old, advantages, mask, _, engine = rollouts()
    for leaf in (logprobs, old, engine):
        leaf.requires_grad_()
    loss, _ = losses.grpo_loss(
        logprobs, old, advantages, mask, rollout_logprobs=engine, tis_cap=1.4
    )
    loss.backward()
    assert engine.grad is None or engine.grad.eq(0).all()
    torch.testing.assert_close(old.grad, -logprobs.grad)  # old acts through the ratio alone
    assert logprobs.grad[mask].abs().max() > 0.1


def test_grpo_with_the_policy_as_its_own_old_is_the_policy_gradient():
    logprobs, _, advantages, mask, _, _ = rollouts()
    logprobs.requires_grad_()
    loss, metrics = losses.grpo_loss(logprobs, logprobs.detach(), advantages, mask)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, -advantages[:, None] * mask)
    assert loss.item() == pytest.approx(-(advantages * mask.sum(1)).sum().item())
    assert metrics["clipped_low"].item() == metrics["clipped_high"].item() == 0


@pytest.mark.parametrize("s", GRPO_SETTINGS[3::4], ids=setting_id)
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_grpo_masked_positions_do_not_leak(s, poison):
    logprobs, old, advantages, mask, ref, engine = rollouts()
    clean = logprobs.clone().requires_grad_()
    expected, expected_metrics = grpo_loss(clean, old, advantages, mask, ref, engine, s)
    expected.backward()
    logprobs, old, ref, engine = (
        t.masked_fill(~mask, poison) for t in (logprobs, old, ref, engine)
    )
    logprobs.requires_grad_()
    loss, metrics = grpo_loss(logprobs, old, advantages, mask, ref, engine, s)
    loss.backward()
    assert loss.item() == expected.item() and metrics == expected_metrics
    assert torch.equal(logprobs.grad, clean.grad) and logprobs.grad[~mask].eq(0).all()


@pytest.mark.parametrize("per_sequence", [False, True])
def test_grpo_of_empty_rows_only_is_zero(per_sequence):
    logprobs = torch.full((3, 4), -1.0, requires_grad=True)
    zeros, mask = torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.bool)
    loss, metrics = losses.grpo_loss(
        logprobs, zeros, torch.ones(3), mask, per_sequence=per_sequence, ref_logprobs=zeros
    )
    loss.backward()
    assert loss.item() == 0 and logprobs.grad.eq(0).all()
    assert set(metrics) == {"clipped_low", "clipped_high", "kl"}
    assert all(value.item() == 0 for value in metrics.values())


@pytest.mark.parametrize("s", GRPO_SETTINGS[3::4], ids=setting_id)
def test_grpo_gradient_adds_up_over_any_split_of_rows_and_any_padding(s):
    logprobs, old, advantages, mask, ref, engine = rollouts()
    whole = logprobs.clone().requires_grad_()
    loss, metrics = grpo_loss(whole, old, advantages, mask, ref, engine, s)
    loss.backward()
    expected = {"loss": loss.item()} | {key: value.item() for key, value in metrics.items()}
    for split in ([[0], [1], [2], [3], [4], [5]], [[5, 1, 2], [4, 0, 3]], [[3], [0, 5, 4, 2, 1]]):
        leaf = logprobs.clone().requires_grad_()
        sums = dict.fromkeys(expected, 0.0)
        for i, rows in enumerate(split):
            part_mask, part, part_old, part_ref, part_engine = (
                torch.nn.functional.pad(t[rows], (i, 2)) for t in (mask, leaf, old, ref, engine)
            )
            loss, metrics = grpo_loss(
                part, part_old, advantages[rows], part_mask, part_ref, part_engine, s
            )
            loss.backward()
            sums["loss"] += loss.item()
            for key, value in metrics.items():
                sums[key] += value.item()
        torch.testing.assert_close(leaf.grad, whole.grad, rtol=0, atol=1e-12)
        assert sums == pytest.approx(expected, abs=1e-11)


def exact_count(n, rho):
    """ceil(rho n) of the decimal fraction that rho stands for."""
    return math.ceil(Fraction(str(rho)) * n)


def test_top_entropy_count_is_exact():
    assert 0.07 * 100 > 7 and losses.top_entropy_count(100, 0.07) == 7
    assert losses.top_entropy_count(15, 0.2) == 3
    for rho in [i / 100 for i in range(1, 101)] + [0.125, 0.001, 0.999]:
        for n in [*range(300), 1000, 4096, 8191, 8192, 100000]:
            assert losses.top_entropy_count(n, rho) == exact_count(n, rho), (n, rho)


# fmt: off
RHOS = [0.01, 0.07, 0.1, 0.14, 0.2, 0.28, 0.29, 0.3, 0.55, 0.57, 0.7, 0.999, 1.0]
# fmt: on


@pytest.mark.parametrize("rho", RHOS)
def test_top_entropy_mask_takes_exactly_ceil_of_rho_n(rho):
    mask = torch.arange(150)[None] < torch.arange(151)[:, None]  # row n has n tokens
    random_entropy = torch.rand(151, 150, generator=torch.Generator().manual_seed(0))
    for entropy in (random_entropy, torch.zeros(151, 150)):
        taken = losses.top_entropy_mask(entropy, mask, rho).sum(1).tolist()
        assert taken == [exact_count(n, rho) for n in range(151)]
        assert taken == [losses.top_entropy_count(n, rho) for n in range(151)]


@pytest.mark.parametrize("rho", [0.05, 0.2, 0.5, 1.0])
def test_top_entropy_mask_against_a_sort_with_ties_and_gaps(rho):
    generator = torch.Generator().manual_seed(int(100 * rho))
    mask = torch.rand(40, 31, generator=generator) < torch.linspace(0, 1, 40)[:, None]
    entropy = torch.randint(0, 5, (40, 31), generator=generator).float()  # many ties
    entropy[~mask] = 100.0  # masked-out tokens would win
    entropy[::3] = entropy[::3].masked_fill(~mask[::3], math.nan)
    got = losses.top_entropy_mask(entropy, mask, rho)
    assert got.dtype == torch.bool and got.shape == mask.shape and not (got & ~mask).any()
    for row, chosen, inside in zip(entropy.tolist(), got.tolist(), mask.tolist()):
        positions = [t for t in range(31) if inside[t]]
        best = sorted(positions, key=lambda t: (-row[t], t))[: exact_count(len(positions), rho)]
        assert [t for t in range(31) if chosen[t]] == sorted(best)


def test_top_entropy_mask_by_hand():
    entropy = torch.tensor([[9.0, 0.1, 0.7, 0.2, 0.7], [9.0, 0.3, 0.4, 0.5, 9.0]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 1, 0]]).bool()
    got = losses.top_entropy_mask(entropy, mask, 0.5)  # the docstring's example
    assert got.int().tolist() == [[0, 0, 1, 0, 1], [0, 0, 1, 1, 0]]
    # nine of ten entropies are 0: a quantile rule with >= takes all ten
    entropy, mask = torch.zeros(1, 10), torch.ones(1, 10, dtype=torch.bool)
    assert losses.top_entropy_mask(entropy, mask, 0.2).nonzero()[:, 1].tolist() == [0, 1]
    entropy[0, 6] = 1.0
    assert losses.top_entropy_mask(entropy, mask, 0.2).nonzero()[:, 1].tolist() == [0, 6]


def test_top_entropy_mask_of_single_tokens_and_empty_rows():
    mask = torch.tensor([[False, False, True, False], [False] * 4])  # one token, and none
    entropy = torch.tensor([[9.0, 9.0, 0.0, 9.0]] * 2)
    for rho in (1e-12, 1e-6, 0.2, 1.0):
        assert torch.equal(losses.top_entropy_mask(entropy, mask, rho), mask), rho
        assert losses.top_entropy_count(1, rho) == 1 and losses.top_entropy_count(0, rho) == 0
    empty = torch.zeros(2, 0)
    assert losses.top_entropy_mask(empty, empty.bool(), 0.2).shape == (2, 0)


@pytest.mark.parametrize("rho", [0.0, -0.1, 1.0001, math.nan])
def test_top_entropy_mask_refuses(rho):
    with pytest.raises(ValueError, match="rho"):
        losses.top_entropy_mask(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), rho)


def test_sft_loss_and_gradient_against_a_loop():
    logprobs, mask = randn(4, 6, seed=1) - 3, flags(4, 6, seed=2, probability=0.6)
    mask[1] = False
    ones = torch.ones(4, 6, dtype=torch.float64)
    random_weights = randn(4, 6, seed=3).exp()
    for given, weights in ((None, ones), (random_weights, random_weights)):
        leaf = logprobs.masked_fill(~mask, -math.inf).requires_grad_()
        expected = 0.0
        for b, t in mask.nonzero().tolist():
            expected -= weights[b, t].item() * logprobs[b, t].item()
        loss = losses.sft_loss(leaf, mask, given)
        assert loss.item() == pytest.approx(expected, abs=1e-12)
        loss.backward()
        assert torch.equal(leaf.grad, -weights * mask)


# --------------------------------------------------------------------------------------------------
# PEAR


def pear_oracle(logprobs, behavior, variant, gamma, block, ratio_range, weight_range):
    """PEAR's weights [n] of one response's own n tokens, by a double loop, in logs and float64."""
    d = []
    for x, y in zip(logprobs.tolist(), behavior.tolist()):
        low, high = ratio_range or (-math.inf, math.inf)
        d.append(min(max(x - y, low), high))
    n, weights = len(d), []
    for t in range(1, n + 1):
        log_weight = 0.0
        if variant == "sequence":
            for j in range(1, n + 1):
                log_weight += d[j - 1]
        else:
            end = t
            while variant == "block" and end % block and end < n:
                end += 1
            for j in range(end + 1, n + 1):
                log_weight += d[j - 1]
            log_weight += (n - end) * math.log(gamma)
        if weight_range is not None:
            log_weight = min(max(log_weight, weight_range[0]), weight_range[1])
        weights.append(math.exp(log_weight))
    return torch.tensor(weights, dtype=torch.float64)


def pear_oracle_of_rows(logprobs, behavior, mask, *settings):
    """pear_oracle of each row's masked-in tokens, 0 elsewhere: [B, T]."""
    weights = torch.zeros(mask.shape, dtype=torch.float64)
    for b, row in enumerate(mask):
        weights[b, row] = pear_oracle(logprobs[b, row], behavior[b, row], *settings)
    return weights


def pear_rows(width=14):
    """Prompts on the left, padding on the right, both masked out and not numbers; one row empty."""
    mask = torch.zeros(7, width, dtype=torch.bool)
    spans = [(0, width), (3, width), (2, width - 5), (5, 6), (4, 4), (1, 10), (width - 3, width)]
    for row, (start, stop) in enumerate(spans):
        mask[row, start:stop] = True
    logprobs = randn(7, width, seed=6, scale=0.4) - 1
    behavior = randn(7, width, seed=7, scale=0.4) - 1
    return logprobs.masked_fill(~mask, math.nan), behavior.masked_fill(~mask, -math.inf), mask


# fmt: off
VARIANTS = ["sequence", "token", "block"]
VARIANTS_AND_BLOCKS = [("sequence", 4), ("token", 4), ("block", 1), ("block", 2), ("block", 3),
                       ("block", 4), ("block", 5), ("block", 14), ("block", 99)]
RANGES = [(None, None), ((-0.08, 0.3), (-10.0, 5.0)), ((-0.3, 0.1), None), (None, (-0.5, 0.7))]
# fmt: on


@pytest.mark.parametrize("variant, block", VARIANTS_AND_BLOCKS)
@pytest.mark.parametrize("gamma", [1.0, 0.999, 0.8])
@pytest.mark.parametrize("ratio_range, weight_range", RANGES)
def test_pear_weights_against_a_double_loop(variant, block, gamma, ratio_range, weight_range):
    settings = (variant, gamma, block, ratio_range, weight_range)
    got = losses.pear_weights(*pear_rows(), *settings)
    expected = pear_oracle_of_rows(*pear_rows(), *settings)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_pear_weights_with_random_masks(variant):
    generator = torch.Generator().manual_seed(8)
    share = torch.rand(30, 1, generator=generator)
    mask = torch.rand(30, 23, generator=generator) < share  # gaps: t counts response tokens only
    rows = randn(30, 23, seed=9, scale=0.3), randn(30, 23, seed=10, scale=0.3), mask
    settings = (variant, 0.97, 4, (-0.2, 0.3), (-1.0, 1.5))
    got, expected = losses.pear_weights(*rows, *settings), pear_oracle_of_rows(*rows, *settings)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_pear_weights_by_hand():
    # d = ln 2, ln 3, ln 5 and gamma 1/2: sequence 2 * 3 * 5; token 1/4 * 15, 1/2 * 5 and 1; in
    # blocks of two the second token's for the first two. Then the docstring's example.
    cases = [
        ([2, 3, 5], 0.5, {"sequence": [30] * 3, "token": [3.75, 2.5, 1], "block": [2.5, 2.5, 1]}),
        (
            [2, 3, 5, 2, 3],
            1.0,
            {"sequence": [180] * 5, "token": [90, 30, 6, 3, 1], "block": [30, 30, 3, 3, 1]},
        ),
    ]
    for ratios, gamma, expected in cases:
        n = len(ratios)
        logprobs = torch.tensor([[8, *ratios, 8]]).log()  # the ends are masked out
        mask = torch.tensor([[False, *[True] * n, False]])
        zeros = torch.zeros(1, n + 2)
        for variant, weights in expected.items():
            got = losses.pear_weights(logprobs, zeros, mask, variant, gamma, 2, None, None)
            assert got[0].tolist() == pytest.approx([0, *weights, 0], rel=1e-5), variant


def test_pear_defaults_are_the_papers():
    expected = pear_oracle_of_rows(*pear_rows(), "block", 0.999, 4, (-0.08, 0.3), (-10.0, 5.0))
    torch.testing.assert_close(losses.pear_weights(*pear_rows(), "block"), expected)
    # thirty times d = 1 or -1: both bounds of both ranges are at work
    d = torch.tensor([[1.0] * 30, [-1.0] * 30], dtype=torch.float64)
    everywhere = torch.ones(2, 30, dtype=torch.bool)
    got = losses.pear_weights(d, torch.zeros_like(d), everywhere, "sequence")
    assert got[:, 0].tolist() == pytest.approx([math.exp(5), math.exp(-30 * 0.08)])
    got = losses.pear_weights(d, torch.zeros_like(d), everywhere, "sequence", ratio_range=None)
    assert got[:, 0].tolist() == pytest.approx([math.exp(5), math.exp(-10)])


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_pear_blocks_of_one_are_the_token_variant(gamma):
    blocks = losses.pear_weights(*pear_rows(), "block", gamma, 1)
    assert torch.equal(blocks, losses.pear_weights(*pear_rows(), "token", gamma))


@pytest.mark.parametrize("variant", VARIANTS)
def test_pear_weights_are_one_where_both_policies_agree(variant):
    logprobs, _, mask = pear_rows()
    weights = losses.pear_weights(logprobs, logprobs.clone(), mask, variant, 1.0)
    assert torch.equal(weights, mask.double())


@pytest.mark.parametrize("variant", VARIANTS)
def test_pear_weights_carry_no_gradient_and_ignore_padding(variant):
    rows = pear_rows()
    rows[0].requires_grad_()
    rows[1].requires_grad_()
    got = losses.pear_weights(*rows, variant, 0.9)
    assert not got.requires_grad and torch.isfinite(got).all() and got[~rows[2]].eq(0).all()
    wider = [torch.nn.functional.pad(t.detach(), (3, 40)) for t in rows]
    padded = losses.pear_weights(*wider, variant, 0.9)[:, 3:-40]
    torch.testing.assert_close(padded, got, rtol=1e-6, atol=0)


def test_pear_is_not_the_ports():
    """The padded length in the exponent, and the weight itself clipped to [0.1, 10], differ."""
    logprobs, behavior, mask = pear_rows()
    d = (logprobs - behavior).masked_fill(~mask, 0.0)
    got = losses.pear_weights(logprobs, behavior, mask, "token", 0.9, 4, None, None)
    padded = torch.zeros(7, 14, dtype=torch.float64)
    for b, t in mask.nonzero().tolist():
        padded[b, t] = 0.9 ** (14 - 1 - t) * d[b, t + 1 :].sum().exp()  # T the padded length
    full = mask.all(1)
    torch.testing.assert_close(got[full], padded[full])  # where nothing is padded the two agree,
    ratios = (got[2] / padded[2])[mask[2]].tolist()  # and row 2 ends 5 early
    assert ratios == pytest.approx([0.9**-5] * 7, rel=1e-5)
    # d = 0.3 or -0.3 thirty times: suffixes from exp(8.7) to exp(-8.7), of which bounds of -10 and
    # 5 cut some
    d = torch.tensor([[0.3] * 30, [-0.3] * 30], dtype=torch.float64)
    everywhere = torch.ones(2, 30, dtype=torch.bool)
    got = losses.pear_weights(d, torch.zeros_like(d), everywhere, "token", 1.0, 4, None)
    assert got[0, 0].item() == pytest.approx(math.exp(5))
    assert got[1, 0].item() == pytest.approx(math.exp(-8.7))
    assert got[0, 20].item() == pytest.approx(math.exp(2.7))
    assert got.max() > 10 and got.min() < 0.1


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ratio_range", [(-0.08, 0.3), None])
@pytest.mark.parametrize("extreme", [1e4, 1e30, math.inf])
def test_pear_extreme_ratios_stay_finite_and_local(variant, ratio_range, extreme):
    """A token of ratio 0 weighs down those before it, and leaves those after it, in float32 too."""
    mask = torch.tensor([[False] + [True] * 9 + [False]])
    logprobs = torch.tensor([[0.0, 0.25, -extreme, 0.5, -0.25, 1.0, 0.125, -0.5, 0.75, 0.25, 0.0]])
    settings = (variant, 0.999, 4, ratio_range, (-10.0, 5.0))
    for d in (logprobs, -logprobs):  # and one of ratio infinity
        rows = d, torch.zeros(1, 11), mask
        expected = pear_oracle_of_rows(*rows, *settings).float()
        torch.testing.assert_close(
            losses.pear_weights(*rows, *settings), expected, rtol=1e-4, atol=0
        )


def test_pear_refuses():
    with pytest.raises(ValueError, match="variant"):
        losses.pear_weights(*pear_rows(), "suffix")
    for gamma in (0.0, 1.01, -1.0):
        with pytest.raises(ValueError, match="gamma"):
            losses.pear_weights(*pear_rows(), "token", gamma)
    with pytest.raises(ValueError, match="block"):
        losses.pear_weights(*pear_rows(), "block", 0.9, 0)


# --------------------------------------------------------------------------------------------------
# Log-probabilities in tiles of the vocabulary


def head(n=13, d=5, v=17, dtype=torch.float64, scale=1.0):
    """hidden [n, d], head_weight [v, d] and targets [n]."""
    targets = torch.randint(v, (n,), generator=torch.Generator().manual_seed(3))
    hidden = randn(n, d, seed=1, dtype=dtype, scale=scale)
    return hidden, randn(v, d, seed=2, dtype=dtype), targets


def full_softmax(hidden, head_weight, targets, temperature):
    """Log-probabilities and entropies from all the logits at once."""
    logs = torch.log_softmax(hidden @ head_weight.T / temperature, -1)
    return logs[torch.arange(len(targets)), targets], -(logs.exp() * logs).sum(-1)


# Of 17 entries: one a tile, tiles that do not divide them, all in one, and a larger tile.
@pytest.mark.parametrize("chunk", [1, 4, 5, 17, 1024])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_token_logprobs_equal_the_full_softmax(chunk, temperature, dtype, tolerance):
    hidden, weight, targets = head(dtype=dtype)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    upstream = randn(13, seed=4, dtype=dtype)
    expected, expected_entropy = full_softmax(hidden, weight, targets, temperature)
    expected_gradients = torch.autograd.grad(expected, leaves, upstream)
    logprobs, entropy = losses.token_logprobs(hidden, weight, targets, temperature, chunk)
    assert logprobs.shape == entropy.shape == (13,) and logprobs.dtype == entropy.dtype == dtype
    assert logprobs.requires_grad and not entropy.requires_grad
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=tolerance)
    gradients = torch.autograd.grad(logprobs, leaves, upstream)
    for gradient, right in zip(gradients, expected_gradients):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, right, rtol=0, atol=10 * tolerance)


def test_token_logprobs_by_hand():
    # logits (0, ln 3): probabilities 1/4 and 3/4; at temperature 1/2 logits (0, ln 9): 1/10, 9/10
    hidden, weight = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [math.log(3)]])
    for temperature, p in ((1.0, 0.25), (0.5, 0.1)):
        targets = torch.tensor([0, 1])
        logprobs, entropy = losses.token_logprobs(hidden, weight, targets, temperature)
        logs = [math.log(p), math.log(1 - p)]
        assert logprobs.tolist() == pytest.approx(logs, abs=1e-6)
        expected = -p * logs[0] - (1 - p) * logs[1]
        assert entropy.tolist() == pytest.approx([expected, expected], abs=1e-6)


@pytest.mark.parametrize("scale", [50.0, 1e3])
def test_token_logprobs_of_large_logits_stay_finite(scale):
    hidden, weight, targets = head(dtype=torch.float32, scale=scale)
    logprobs, entropy = losses.token_logprobs(hidden, weight, targets, chunk=4)
    expected, expected_entropy = full_softmax(
        hidden.double(), weight.double(), targets, temperature=1.0
    )
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("temperature, chunk", [(1.0, 3), (0.7, 4), (1.3, 100)])
def test_token_logprobs_gradient_by_finite_differences(temperature, chunk):
    hidden, weight, targets = head(n=7, d=3, v=6)
    logprobs = lambda h, w: losses.token_logprobs(h, w, targets, temperature, chunk)[0]
    assert torch.autograd.gradcheck(logprobs, (hidden.requires_grad_(), weight.requires_grad_()))


def test_token_logprobs_entropy_carries_no_gradient_and_steals_none():
    hidden, weight, targets = head()
    hidden.requires_grad_()
    logprobs, entropy = losses.token_logprobs(hidden, weight, targets, chunk=4)
    total = full_softmax(hidden, weight, targets, 1.0)[0].sum()
    expected = torch.autograd.grad(total, hidden)[0]
    with pytest.raises(RuntimeError, match="does not require grad"):
        entropy.sum().backward()
    (logprobs.sum() + 100 * entropy.sum()).backward()
    torch.testing.assert_close(hidden.grad, expected)


def test_token_logprobs_of_no_token():
    """A rank without work still takes part in the backward pass."""
    hidden, weight = torch.zeros(0, 5, requires_grad=True), torch.ones(7, 5, requires_grad=True)
    logprobs, entropy = losses.token_logprobs(hidden, weight, torch.zeros(0, dtype=torch.int64))
    logprobs.sum().backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert hidden.grad.shape == (0, 5) and weight.grad.eq(0).all()


def test_token_logprobs_with_a_tied_head():
    weight = randn(11, 4, seed=5).requires_grad_()  # embedding and head in one
    tokens, targets = torch.tensor([3, 0, 3, 10, 7]), torch.tensor([0, 3, 10, 7, 2])
    total = full_softmax(weight[tokens].tanh(), weight, targets, 0.8)[0].sum()
    expected = torch.autograd.grad(total, weight)[0]
    losses.token_logprobs(weight[tokens].tanh(), weight, targets, 0.8, 2)[0].sum().backward()
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_token_logprobs_in_bfloat16_stays_close_to_float32(temperature):
    hidden, weight, targets = head(n=600, d=64, v=500, scale=0.3)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()  # the same rounded numbers for both
    results, gradients = [], []
    for dtype in (torch.float32, torch.bfloat16):
        h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        logprobs, entropy = losses.token_logprobs(h, w, targets, temperature, 8)
        assert logprobs.dtype == entropy.dtype == torch.float32
        results.append((logprobs, entropy))
        gradients.append(torch.autograd.grad(logprobs.sum(), (h, w)))
    for right, rounded in zip(*results):
        assert (rounded - right).norm() / right.norm() < 0.01
    for right, rounded in zip(*gradients):
        assert (rounded.float() - right).norm() / right.norm() < 0.006


class LargestTensor(TorchDispatchMode):
    """Watches every operation for the largest tensor that it makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_token_logprobs_holds_two_tiles_of_logits_and_saves_none():
    n, d, v, chunk = 512, 4, 300, 16
    hidden, weight, targets = head(n, d, v)
    saved = []

    def keep(tensor):
        saved.append(tensor.numel())
        return tensor

    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        losses.token_logprobs(*leaves, targets, 1.0, chunk)[0].sum().backward()
    assert largest.numel == 2 * n * chunk  # of n * v, 9 times as many
    assert sum(saved) <= n * d + v * d + 2 * n


# --------------------------------------------------------------------------------------------------
# Freezing


def example_of(docstring):
    """The code of a docstring: its lines that are indented by four."""
    lines = [line for line in docstring.splitlines() if line.startswith("    ") or not line]
    return textwrap.dedent("\n".join(lines))


def toy_training():
    """What the docstring's example takes as given, and a record of the weights on the way."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(4)))  # never gets a gradient
    model.register_parameter("fixed", torch.nn.Parameter(torch.ones(2), requires_grad=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = lambda: [p.detach().clone() for p in trained]
    seen = [weights()]  # at the start, then before and after each SFT phase

    def rl_step():
        optimizer.zero_grad()
        for p in model[0].weight, model[2].weight:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()

    def sft_batches():
        seen.append(weights())
        for _ in range(4):
            yield torch.randn(8, 6, generator=generator)
        seen.append(weights())

    def sft_loss(batch):
        return 30 * (model(batch) - 2).square().mean()  # large enough to be clipped

    return dict(
        model=model,
        optimizer=optimizer,
        rl_step=rl_step,
        sft_batches=sft_batches,
        sft_loss=sft_loss,
        seen=seen,
    )


def around_sft(seen, phase):
    """The trained weights before and after an SFT phase, each in one vector."""
    before, after = seen[1 + 2 * phase], seen[2 + 2 * phase]
    return torch.cat([p.flatten() for p in before]), torch.cat([p.flatten() for p in after])


def test_the_freezing_example_of_the_docstring():
    toy = toy_training()
    exec(example_of(freeze.__doc__), {"torch": torch, **vars(freeze), **toy})

    # The same protocol by hand: every entry in one vector, a sorted threshold, masked updates.
    hand = toy_training()
    parameters = [p for p in hand["model"].parameters() if p.requires_grad]
    vector = lambda: torch.cat([p.detach().flatten() for p in parameters])
    importance, before, masks = torch.zeros(len(vector())), vector(), []
    for _ in range(3):
        hand["rl_step"]()
        importance = 0.9 * importance + (vector() - before).abs()
        largest = importance.sort(descending=True).values
        frozen = importance > largest[len(largest) // 2]
        masks.append(frozen)
        start = vector()
        for batch in hand["sft_batches"]():
            hand["optimizer"].zero_grad()
            hand["sft_loss"](batch).backward()
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            gradient = torch.cat([g.flatten() for g in gradients])
            gradient[frozen] = 0.0
            assert gradient.norm() > 1
            gradient = gradient / gradient.norm()
            for p, g in zip(parameters, gradient.split([p.numel() for p in parameters])):
                if p.grad is not None:
                    p.grad = g.view_as(p)
            hand["optimizer"].step()
            after = torch.where(frozen, start, vector())
            torch.nn.utils.vector_to_parameters(after, parameters)
        before = vector()

    assert len(toy["seen"]) == len(hand["seen"]) == 7
    for got, right in zip(toy["seen"], hand["seen"]):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-6)
    for phase, frozen in enumerate(masks):
        start, end = around_sft(toy["seen"], phase)
        assert 20 < frozen.sum() <= len(frozen) // 2
        assert torch.equal(start.view(torch.int32)[frozen], end.view(torch.int32)[frozen])
        free = ~frozen
        free[:4] = False  # no gradient and no decay reach the unused parameter
        assert (start != end)[free].all()


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
def test_update_importance_against_a_loop(alpha):
    shapes = [(3, 4), (5,), (), (0, 2)]
    phases = []
    for phase in range(4):
        phases.append([randn(*s, seed=10 * phase + i).float() for i, s in enumerate(shapes)])
    untouched = copy.deepcopy(phases)
    importance = [torch.zeros(shape) for shape in shapes]
    expected = [[0.0] * t.numel() for t in importance]
    for old, new in itertools.pairwise(phases):
        assert freeze.update_importance(importance, old, new, alpha) is None
        for values, a, b in zip(expected, old, new):
            for i, (x, y) in enumerate(zip(a.flatten().tolist(), b.flatten().tolist())):
                values[i] = alpha * values[i] + abs(y - x)
    for values, c in zip(expected, importance):
        assert c.flatten().tolist() == pytest.approx(values, abs=1e-6)
    torch.testing.assert_close(phases, untouched, rtol=0, atol=0)  # neither is written to
    with pytest.raises(ValueError):
        freeze.update_importance(importance, phases[0], phases[1][:-1], alpha)


def sorted_threshold(tensors, fraction):
    """The (K + 1)-th largest |entry| by a full sort."""
    values = torch.cat([t.flatten() for t in tensors]).abs().sort(descending=True).values
    k = math.floor(Fraction(str(fraction)) * len(values))
    return values[k].item() if k < len(values) else -math.inf


def check_threshold(tensors, fraction):
    threshold = freeze.topk_threshold(tensors, fraction)
    assert threshold == sorted_threshold(tensors, fraction)
    values = torch.cat([t.flatten() for t in tensors]).abs()
    k = math.floor(Fraction(str(fraction)) * len(values))
    frozen, ties = int((values > threshold).sum()), int((values == threshold).sum())
    assert frozen <= k < frozen + ties or frozen == k == len(values)  # K to within the tie class


def floats_of(bits):
    return torch.as_tensor(bits, dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize("fraction", [1e-6, 0.1, 0.29, 0.5, 0.9, 0.99, 1.0])
def test_topk_threshold_in_odd_cases(fraction):
    normal = randn(1001, dtype=torch.float32)
    ties = torch.tensor([1.0, -1.0, 2.0, 2.0, -2.0, 0.5]).repeat(50)
    close = floats_of(torch.arange(70000) + 0x3F7F0000)  # neighbours, across several upper halves
    cases = {
        "normal": normal,
        "one": normal[:1],
        "zeros": torch.zeros(10),
        "many zeros": torch.cat([normal, torch.zeros(3000), -torch.zeros(7)]),
        "ties": ties,
        "all equal": torch.full((77,), -0.25),
        "denormals": torch.cat([floats_of(torch.arange(1, 500)), normal[:100] * 1e-40]),
        "infinite": torch.cat([normal, torch.tensor([math.inf, -math.inf] * 80)]),
        "close": close.flip(0),
    }
    for values in cases.values():
        check_threshold([values], fraction)
    shapes = [normal[:1000].view(10, 100).T, torch.zeros(0), torch.zeros(3, 0), ties[3]]
    check_threshold([*shapes, close[:77].view(7, 11)], fraction)


def test_topk_threshold_by_hand():
    values = [torch.tensor([[3.0, -1.0], [0.0, -7.0]]), torch.tensor([5.0, 2.0])]  # 7 5 3 2 1 0
    expected = {0.5: 2.0, 0.4: 3.0, 1 / 6: 5.0, 0.1: 7.0, 0.99: 0.0, 1.0: -math.inf}
    for fraction, threshold in expected.items():
        assert freeze.topk_threshold(values, fraction) == threshold
    smallest = 2.0**-149  # of float32, above 0
    assert freeze.topk_threshold([torch.tensor([smallest, 0.0])], 0.5) == 0.0
    assert freeze.topk_threshold([torch.tensor([smallest, 0.0])], 0.1) == smallest
    # 0.29 * 100 is 28.999999999999996
    assert freeze.topk_threshold([torch.arange(100, dtype=torch.float32)], 0.29) == 70.0


def test_topk_threshold_refuses():
    good = torch.ones(3)
    for fraction in (0.0, -0.5, 1.1, math.nan):
        with pytest.raises(ValueError, match="fraction"):
            freeze.topk_threshold([good], fraction)
    for dtype in (torch.float64, torch.bfloat16, torch.int32):
        with pytest.raises(ValueError, match="float32"):
            freeze.topk_threshold([good, good.to(dtype)], 0.5)
    for empty in ([], [torch.zeros(0)]):
        with pytest.raises(ValueError, match="entry"):
            freeze.topk_threshold(empty, 0.5)
    # quiet, all ones, negative, and one only in its lower half
    for bits in (0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001):
        with pytest.raises(ValueError, match="NaN"):
            freeze.topk_threshold([good, torch.cat([good, floats_of([bits])])], 0.5)


TOPK_ON_TWO_RANKS = """
import json, math, os, sys
import torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import freeze
rank = int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
group, results = dist.group.WORLD, []
big = torch.randn(10_000_000, generator=torch.Generator().manual_seed(0))
big[::3] = 0.0
big[1::7] = 0.5
small = torch.randn(1000, generator=torch.Generator().manual_seed(1))

def shards(values, cut):
    mine = values[:cut] if rank == 0 else values[cut:]
    return [mine[: len(mine) // 3].clone(), torch.zeros(0), mine[len(mine) // 3 :].clone()]

cases = [(big, 6_543_210, [0.3]), (small, 0, [0.01, 0.5, 1.0]), (small, 1000, [0.5])]
for values, cut, fractions in cases + [(torch.full((9,), 2.0), 4, [0.5])]:
    for fraction in fractions:
        results.append(freeze.topk_threshold(shards(values, cut), fraction, group))
for tensors in ([torch.tensor([math.nan if rank else 1.0])], [torch.zeros(0)]):
    try:
        freeze.topk_threshold(tensors, 0.5, group)
    except ValueError as error:
        results.append(str(error))
alone = small[:400] if rank == 0 else 3 * small[400:]
results.append(freeze.topk_threshold([alone], 0.5))  # no group: nothing is communicated
print(json.dumps(results))
sys.stdout.flush()
os._exit(0)  # gloo at times aborts a process that ends by itself, if its peer has ended before
"""


def test_topk_threshold_on_ten_million_values_and_on_two_ranks(tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(TOPK_ON_TWO_RANKS)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in ("0", "1"):
        command = [sys.executable, script, ROOT, tmp_path / "meeting", rank]
        pipe = subprocess.PIPE
        ranks.append(
            subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
        )
    big = torch.randn(10_000_000, generator=torch.Generator().manual_seed(0))
    big[::3] = 0.0
    big[1::7] = 0.5
    small = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    ordered = big.abs().sort(descending=True).values
    # the second-largest, an ordinary value, and two within ties: 0.5 and 0
    for fraction in (1e-7, 0.3, 0.47, 0.9):
        right = ordered[round(fraction * 10_000_000)].item()
        assert freeze.topk_threshold(list(big.view(4, -1)), fraction) == right
    expected = [ordered[3_000_000].item()]
    expected += [sorted_threshold([small], fraction) for fraction in (0.01, 0.5, 1.0, 0.5)]
    expected.append(2.0)
    try:
        outputs = [process.communicate(timeout=120) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for rank, (out, err) in enumerate(outputs):
        assert ranks[rank].returncode == 0, err[-2000:]
        *numbers, nan, empty, alone = json.loads(out.splitlines()[-1])
        assert numbers == expected
        assert "NaN" in nan and "entry" in empty  # on both ranks, though one of them holds the NaN
        assert alone == sorted_threshold([small[:400] if rank == 0 else 3 * small[400:]], 0.5)


def entries(tensors, chosen):
    """The chosen entries of all tensors, as floats."""
    return torch.cat([t.detach()[c] for t, c in zip(tensors, chosen)]).tolist()


def frozen_training(steps, strict, weight_decay=0.1, warm=3):
    """AdamW whose moments are warm when the freeze begins.

    Returns parameters, masks, anchor, and two lists of pairs, one a step: the clipped norm and that
    of the free entries by hand; what freeze.py says of the frozen entries' movement and a loop.
    """
    generator = torch.Generator().manual_seed(5)
    draw = lambda like: torch.randn(like.shape, generator=generator)
    parameters = [torch.nn.Parameter(draw(torch.empty(s))) for s in ((20, 30), (50,), (0, 3))]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=weight_decay)
    for _ in range(warm):
        for p in parameters:
            p.grad = draw(p)
        optimizer.step()
    # Multiplying by a mask would lose signs of zeros; these entries are frozen.
    odd = torch.tensor([0.0, -0.0, -0.0, 1e-42, -1e-42]).repeat(4)
    parameters[1].data[:20] = odd
    anchor = [p.detach().clone() for p in parameters]
    frozen = [torch.rand(p.shape, generator=generator) < 0.5 for p in parameters]
    frozen[1][:20] = True
    norms, movements = [], []
    for _ in range(steps):
        for p in parameters:
            p.grad = draw(p)
        free = entries([p.grad for p in parameters], [~f for f in frozen])
        freeze.zero_frozen_gradients((p.grad for p in parameters), (f for f in frozen))
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        norms.append((norm, math.sqrt(sum(g * g for g in free))))
        optimizer.step()
        pairs = zip(entries(parameters, frozen), entries(anchor, frozen))
        by_loop = max(abs(x - y) for x, y in pairs)
        after = freeze.restore_frozen if strict else freeze.largest_movement
        moved = after((p.detach() for p in parameters), (f for f in frozen), anchor)
        movements.append((moved, by_loop))
    return parameters, frozen, anchor, norms, movements


def same_bits(parameters, frozen, anchor):
    return all(
        torch.equal(p.detach().view(torch.int32)[f], a.view(torch.int32)[f])
        for p, f, a in zip(parameters, frozen, anchor)
    )


def test_frozen_entries_stay_bit_for_bit_under_warm_moments_and_weight_decay():
    parameters, frozen, anchor, norms, movements = frozen_training(5, strict=True)
    assert same_bits(parameters, frozen, anchor)
    for p, f, a in zip(parameters, frozen, anchor):
        assert (p.detach() != a)[~f].all()  # and all others move
    for norm, free in norms:
        assert norm == pytest.approx(free, rel=1e-5)  # the norm is that of the free entries alone
    for moved, by_loop in movements:
        assert moved == pytest.approx(by_loop, rel=1e-4) and moved > 1e-4  # what was undone


def test_a_frozen_gradient_that_is_not_finite_is_noticed():
    gradient = torch.tensor([math.nan, math.inf, 3.0, 4.0])
    freeze.zero_frozen_gradients([gradient], [torch.tensor([True, True, True, False])])
    assert gradient[:2].isnan().all() and gradient[2:].tolist() == [0.0, 4.0]


def test_a_frozen_parameter_without_gradient_is_passed_over():
    gradient, frozen = torch.ones(3), torch.tensor([True, False, True])
    freeze.zero_frozen_gradients([None, gradient], [torch.ones(2).bool(), frozen])
    assert gradient.tolist() == [0.0, 1.0, 0.0]


def test_zero_gradients_alone_leak():
    parameters, frozen, anchor, _, movements = frozen_training(5, strict=False)
    assert not same_bits(parameters, frozen, anchor)
    for moved, by_loop in movements:
        assert moved == pytest.approx(by_loop, rel=1e-4) and moved > 1e-4
    assert movements[-1][0] > movements[0][0]
    # with neither moments nor weight decay there is nothing to leak
    cold = frozen_training(5, strict=False, weight_decay=0.0, warm=0)
    parameters, frozen, anchor, _, movements = cold
    assert same_bits(parameters, frozen, anchor)
    assert {moved for moved, _ in movements} == {0.0}


def test_largest_movement_looks_at_frozen_entries_only():
    p = [torch.tensor([1.0, 2.0]), torch.tensor([5.0]), torch.tensor([1.0])]
    a = [torch.tensor([1.0, 2.5]), torch.tensor([-4.0]), torch.tensor([1.0])]
    masks = lambda *rows: [torch.tensor(row, dtype=torch.bool) for row in rows]
    none = masks([0, 0], [0], [0])
    assert freeze.largest_movement(p, none, a) == 0.0 == freeze.restore_frozen(p, none, a)
    assert freeze.largest_movement(p, masks([1, 1], [0], [1]), a) == 0.5
    assert freeze.largest_movement(p, masks([1, 0], [1], [1]), a) == 9.0
    assert [t.tolist() for t in p] == [[1.0, 2.0], [5.0], [1.0]]
    assert freeze.restore_frozen(p, masks([0, 1], [0], [1]), a) == 0.5
    assert [t.tolist() for t in p] == [[1.0, 2.5], [5.0], [1.0]]


# --------------------------------------------------------------------------------------------------
# Batches


# 7: also the end-of-text token of every response; 9: also an ordinary token
@pytest.mark.parametrize("pad_id", [0, 7, 9])
def test_collate(pad_id):
    rows = [([1, 2, 3], [4, 5, 7]), ([9], [7]), ([1, 2, 3, 4, 5, 6], [7]), ([8, 7], [9, 7, 7, 9])]
    values = [[-0.1, -0.2, -0.3], [-1.0], None, [-5.0, -6.0, -7.0, -8.0]]
    batch = data.collate(rows, pad_id, behavior=values)
    assert set(batch) == {"tokens", "mask", "behavior"}
    assert {key: tuple(t.shape) for key, t in batch.items()} == {
        "tokens": (4, 7),
        "mask": (4, 6),
        "behavior": (4, 6),
    }
    assert batch["tokens"].dtype == torch.int64
    assert batch["mask"].dtype == torch.bool and batch["behavior"].dtype == torch.float32
    for i, (prompt, response) in enumerate(rows):
        whole = prompt + response
        assert batch["tokens"][i].tolist() == whole + [pad_id] * (7 - len(whole))
        for t in range(6):  # position t predicts token t + 1
            k = t + 1 - len(prompt)
            inside = 0 <= k < len(response)
            assert batch["mask"][i, t].item() == inside
            right = values[i][k] if inside and values[i] else 0.0
            assert batch["behavior"][i, t].item() == pytest.approx(right)
        assert batch["tokens"][i, 1:][batch["mask"][i]].tolist() == response
    plain = data.collate(rows[1:2], pad_id)
    assert {key: t.tolist() for key, t in plain.items()} == {"tokens": [[9, 7]], "mask": [[True]]}


def packed(lengths, budget, world):
    """pack's result, after the checks that hold for every input."""
    parts = data.pack(lengths, budget, world)
    assert sorted(itertools.chain(*parts)) == list(range(len(lengths)))  # every row once
    assert len(parts) % world == 0 and len(parts) > 0
    for part in parts:
        assert len(part) <= 1 or len(part) * max(lengths[i] for i in part) <= budget
    assert parts == data.pack(list(lengths), budget, world)
    return parts


@pytest.mark.parametrize("world", [1, 2, 8])
def test_pack_on_log_normal_lengths(world):
    for seed in range(3):
        rng = random.Random(seed)
        lengths = [max(16, min(8192, round(rng.lognormvariate(7.3, 0.8)))) for _ in range(512)]
        parts = packed(lengths, 32768, world)
        padded = [len(part) * max((lengths[i] for i in part), default=0) for part in parts]
        assert 1 - sum(lengths) / sum(padded) <= 0.05
        # All ranks wait for the largest micro-batch of a round, so rounds should be even: what is
        # waited for is little.
        rounds = [padded[i : i + world] for i in range(0, len(padded), world)]
        assert sum(max(r) * world for r in rounds) / sum(padded) <= 1.12
        assert max(padded) / (sum(padded) / len(padded)) <= 1.12
        # Few: as many as sorted rows need that fill each micro-batch as far as the budget goes,
        # rounded up.
        needed = size = longest = 0
        for length in sorted(lengths, reverse=True):
            if size == 0 or longest * (size + 1) > 32768:
                needed, size, longest = needed + 1, 0, length
            size += 1
        assert len(parts) == math.ceil(needed / world) * world


def test_pack_on_small_and_odd_inputs():
    rng = random.Random(0)
    for _ in range(300):
        lengths = [rng.randrange(1, rng.choice([3, 20, 90])) for _ in range(rng.randrange(0, 30))]
        packed(lengths, rng.choice([1, 10, 50, 1000]), rng.choice([1, 2, 3, 8]))
    assert packed([], 100, 3) == [[], [], []]
    # fewer rows than ranks: each alone, the others empty
    assert sorted(map(len, packed([5, 9], 100, 4))) == [0, 0, 1, 1]
    # both ranks work although one micro-batch could hold all
    assert sorted(map(len, packed([50] * 10, 1000, 2))) == [5, 5]
    # longer than the budget: alone
    assert sorted(packed([500, 10, 10, 700, 10], 100, 1), key=len) == [[3], [0], [1, 2, 4]]
    # exactly the budget fits
    assert packed([4, 4], 8, 1) == [[0, 1]]
    lengths = [8, 3, 5, 1]
    longest = [max(lengths[i] for i in part) for part in packed(lengths, 8, 1)]
    assert longest == [8, 5, 3]


@pytest.mark.parametrize("length", [1, 7, 64])
def test_draw_is_a_stream_of_permutations_however_it_is_cut(length):
    whole = data.draw(length, 5, 0, 4 * length + 3)
    assert len(whole) == 4 * length + 3 and data.draw(length, 5, 3, 0) == []
    passes = [whole[i : i + length] for i in range(0, 4 * length, length)]
    assert all(sorted(p) == list(range(length)) for p in passes)
    for size in (1, 2, 5, length, 2 * length + 1):
        cut = []
        for start in range(0, len(whole), size):
            cut += data.draw(length, 5, start, min(size, len(whole) - start))
        assert cut == whole
    if length == 64:
        assert len({tuple(p) for p in passes}) == 4 and passes[0] != sorted(passes[0])
        others = {tuple(data.draw(length, seed, 0, length)) for seed in range(20)}
        assert len(others) == 20 and data.draw(length, 6, 0, length) != passes[1]


def test_draw_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    data.draw(10, 0, 0, 25)
    assert torch.equal(torch.get_rng_state(), state)


# --------------------------------------------------------------------------------------------------
# The embedded task


@pytest.mark.parametrize("expert", [False, True])
def test_chain_works_its_answer_out_rightly(expert):
    rng, first = random.Random(1), set()
    for i in range(600):
        terms = 2 + i % 7
        question, work, result = data.chain(rng, terms, expert)
        assert question[-1] == "?" and question[:2].isdigit()
        assert len(question) == 2 + 2 * (terms - 1) + 1
        value, steps = int(question[:2]), []
        first.add(value)
        for k in range(terms - 1):
            letter, digit = question[2 + 2 * k : 4 + 2 * k]
            assert letter == "abcdefgh"[k] and digit in "123456789"
            after = (value + int(digit)) % 100
            step = f"{value:02d}{letter}{digit}"
            steps.append(f"<{step}>{after:02d}" if expert else f"{step}={after:02d};")
            value = after
        assert work == "".join(steps) + f"[{value:02d}]" and result == f"{value:02d}"
    assert len(first) > 90
    question, other = (data.chain(random.Random(3), 5, style)[0] for style in (expert, not expert))
    assert question == other  # style alone differs


def test_embedded_tokenizer_round_trip(tmp_path):
    tokenizer = data.embedded_tokenizer()
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert len(tokenizer) == 27 and end != pad
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    rng = random.Random(2)
    for i in range(100):
        question, work, _ = data.chain(rng, 2 + i % 7, i % 2 == 0)
        for text in (question, work, question + work):
            ids = tokenizer.encode(text)
            assert len(ids) == len(text) and None not in ids and not {end, pad} & set(ids)
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode([*ids, end], skip_special_tokens=True) == text
            assert loaded.encode(text) == ids and loaded.decode(ids) == text


def test_embedded_questions_and_what_training_and_evaluation_share():
    tokenizer = data.embedded_tokenizer()
    train = data.embedded_questions(tokenizer, "train", data.TRAIN_TERMS, 5000)
    held_out = evaluation.load_questions("chain", tokenizer, None, "")
    assert train[:300] == data.embedded_questions(tokenizer, "train", data.TRAIN_TERMS, 300)
    ids = {q.id for q in train}
    assert len(ids) == 5000 and not ids & {q.id for q in held_out}
    for i, question in enumerate(train[:200]):
        text = tokenizer.decode(question.prompt)
        work = tokenizer.decode(question.demonstration[:-1])
        assert question.demonstration[-1] == tokenizer.eos_token_id and question.kind == "chain"
        assert work.startswith("<" + text[:4]) and work.endswith(f"[{question.answer}]")
        terms = data.TRAIN_TERMS[i % len(data.TRAIN_TERMS)]
        assert question.level == str(terms) == str(len(text) // 2)
    prompts = {tuple(q.prompt) for q in train}
    assert not any(tuple(question.prompt) in prompts for question in held_out)


# --------------------------------------------------------------------------------------------------
# Which sampler


@pytest.fixture
def x86_without_gpu(monkeypatch):
    """Linux on an x86 processor, vLLM installed but not yet imported."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(rollout.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(rollout.importlib.util, "find_spec", lambda name: object())
    for name in list(sys.modules):
        if name == "vllm" or name.startswith("vllm."):
            monkeypatch.delitem(sys.modules, name)


class FailingImport:
    """First among the importers; fails as a library does that this machine cannot load."""

    def __init__(self, error):
        self.error = error

    def find_spec(self, name, path=None, target=None):
        if name == "vllm":
            raise self.error


@pytest.mark.parametrize("error", [ImportError, RuntimeError, OSError])
def test_an_import_of_vllm_that_fails_is_the_reason(x86_without_gpu, monkeypatch, error):
    raised = error("libnuma.so.1: cannot open shared object file\nsecond line")
    monkeypatch.setattr(sys, "meta_path", [FailingImport(raised), *sys.meta_path])
    monkeypatch.setattr(rollout, "_cpu_flags", lambda: {"fpu", "avx2"})
    problem = rollout.vllm_problem()
    assert error.__name__ in problem and "libnuma.so.1" in problem and "second" not in problem
    monkeypatch.setattr(rollout, "TorchSampler", lambda **given: types.SimpleNamespace(**given))
    settings = dict(max_len=8, dtype=torch.float32, eos_ids=[1])
    sampler = rollout.make_sampler("auto", "model", **settings)
    assert sampler.why == problem and sampler.model_dir == "model"
    assert rollout.make_sampler("torch", "model", **settings).why == "asked for"
    with pytest.raises(ValueError, match="libnuma"):
        rollout.make_sampler("vllm", "model", **settings)


def test_without_avx2_vllm_is_not_even_imported(x86_without_gpu, monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [FailingImport(OSError("killed")), *sys.meta_path])
    monkeypatch.setattr(rollout, "_cpu_flags", lambda: {"fpu", "sse4_2", "avx"})
    problem = rollout.vllm_problem()
    assert "AVX2" in problem and "killed" not in problem
    monkeypatch.setattr(rollout.platform, "machine", lambda: "aarch64")  # knows no AVX at all
    assert "AVX2" not in rollout.vllm_problem()
    monkeypatch.setattr(rollout.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # the CUDA build needs none
    assert "AVX2" not in rollout.vllm_problem()


def test_the_processors_instruction_sets_are_those_that_linux_names(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nvmx flags\t: tsc\nflags\t\t: fpu avx avx2\n\nprocessor: 1\n"
    )
    monkeypatch.setattr(rollout, "Path", lambda name: {"/proc/cpuinfo": cpuinfo}[name])
    assert rollout._cpu_flags() == {"fpu", "avx", "avx2"}
    cpuinfo.unlink()
    assert rollout._cpu_flags() == set()


# --------------------------------------------------------------------------------------------------
# The sampler's choice of a token


def nucleus(logits, temperature, top_p):
    """{token: probability} of what top-p leaves, renormalised, by a loop."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    probs = [w / sum(weights) for w in weights]
    kept, reached = [], 0.0
    for token in sorted(range(len(probs)), key=lambda i: (-probs[i], i)):
        if top_p < 1 and reached >= top_p:
            break
        kept.append(token)
        reached += probs[token]
    return {token: probs[token] / reached for token in kept}


# fmt: off
TEMPERATURES_AND_TOP_P = [(1.0, 1.0), (0.6, 1.0), (1.7, 1.0), (1.0, 0.9), (0.6, 0.5), (1.0, 1e-6),
                          (2.0, 0.999)]
# fmt: on


@pytest.mark.parametrize("temperature, top_p", TEMPERATURES_AND_TOP_P)
def test_pick_follows_the_softmax_of_its_nucleus(temperature, top_p):
    size, logits = 20000, randn(3, 24, seed=11, dtype=torch.float32, scale=1.5)
    noise = (torch.arange(size) + 0.5) / size  # an even grid: counts can be off by rounding only
    for row in logits:
        expected = nucleus(row.tolist(), temperature, top_p)
        tokens, logprobs = rollout.pick(row.expand(size, -1), temperature, top_p, noise)
        counts = torch.bincount(tokens, minlength=24).tolist()
        assert set(tokens.tolist()) <= set(expected)
        for token in range(24):
            assert abs(counts[token] - size * expected.get(token, 0.0)) <= 1.5, token
        right = [math.log(expected[token]) for token in tokens.tolist()]
        assert logprobs.tolist() == pytest.approx(right, abs=1e-5)


def test_pick_by_independent_noise_passes_a_chi_square_test():
    logits = randn(12, seed=12, dtype=torch.float32)
    noise = torch.rand(50000, generator=torch.Generator().manual_seed(0))
    tokens, _ = rollout.pick(logits.expand(50000, -1), 0.8, 1.0, noise)
    counts = torch.bincount(tokens, minlength=12)
    probs = nucleus(logits.tolist(), 0.8, 1.0)
    expected = 50000 * torch.tensor([probs[token] for token in range(12)])
    # 11 degrees of freedom: exceeded once in a thousand
    assert ((counts - expected) ** 2 / expected).sum().item() < 31.3


def test_pick_inverts_the_cumulated_distribution():
    """Small noise takes the first tokens of the vocabulary, large noise the last."""
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log().expand(6, -1)
    noise = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 0.999])
    assert rollout.pick(logits, 1.0, 1.0, noise)[0].tolist() == [0, 0, 1, 1, 2, 2]


def test_pick_rows_are_independent_and_never_impossible():
    logits = randn(5, 9, seed=13, dtype=torch.float32)
    logits[:, [0, 4, 8]] = -math.inf  # the first, one within, the last
    for noise in (0.0, 0.3, 1 - 2**-24):  # the ends of torch.rand's range
        for top_p in (1.0, 0.8):
            tokens, logprobs = rollout.pick(logits, 1.0, top_p, torch.full((5,), noise))
            assert torch.isfinite(logprobs).all() and not set(tokens.tolist()) & {0, 4, 8}
    noise = torch.rand(5, generator=torch.Generator().manual_seed(1))
    tokens, logprobs = rollout.pick(logits, 0.9, 0.8, noise)
    for i in range(5):
        token, logprob = rollout.pick(logits[i : i + 1], 0.9, 0.8, noise[i : i + 1])
        assert token.item() == tokens[i].item()
        assert logprob.item() == pytest.approx(logprobs[i].item(), abs=1e-6)


def test_pick_of_logits_that_are_not_numbers_stays_in_the_vocabulary():
    tokens, logprobs = rollout.pick(torch.full((2, 5), math.nan), 1.0, 1.0, torch.rand(2))
    assert set(tokens.tolist()) <= set(range(5)) and logprobs.isnan().all()


def test_pick_at_temperature_zero_is_greedy():
    logits = randn(6, 9, seed=14, dtype=torch.float32)
    tokens, logprobs = rollout.pick(logits, 0, 0.5, torch.rand(6))
    for row, token, logprob in zip(logits.tolist(), tokens.tolist(), logprobs.tolist()):
        assert token == max(range(9), key=row.__getitem__)
        assert logprob == pytest.approx(math.log(nucleus(row, 1.0, 1.0)[token]), abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Data

DATA_SHARED = path if (path := ROOT.parent / "shared" / "data").is_dir() else None
DATA_SYSTEM = "Think first. Put the answer into \\boxed{}."
DATA_OPENR1 = [
    {
        "data_source": "",
        "prompt": [
            {"role": "system", "content": DATA_SYSTEM},
            {"role": "user", "content": f"What is {i} + {i}?"},
        ],
        "target": [
            {
                "role": "assistant",
                "content": f"<think>\nAdd {i} to itself.\n</think>\nIt is \\boxed{{{2 * i}}}.",
            }
        ],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
        "extra_info": {"split": "train", "index": i},
    }
    for i in range(4)
]
DATA_GSM8K = [
    {
        "question": "Ann has 1,000 eggs and buys 234. How many?",
        "answer": "She has 1000+234=<<1000+234=1234>>1234.\n#### 1,234",
    },
    {"question": "Half of five?", "answer": "5/2 = 2.5\n#### 2.5"},
    {"question": "Two less seven?", "answer": "2-7=-5\n#### -5"},
]
DATA_MATH = [
    {
        "problem": "Half of $x$?",
        "solution": "It is $\\boxed{\\frac{x}{2}}$.",
        "answer": "\\frac{x}{2}",
        "subject": "Algebra",
        "level": 3,
        "unique_id": "test/algebra/1.json",
    },
    {
        "problem": "$2^3$?",
        "solution": "$\\boxed{8}$",
        "answer": "8",
        "subject": "Algebra",
        "level": 1,
        "unique_id": "test/algebra/2.json",
    },
]
DATA_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def data_tokenizer(chat=True, bos=False):
    """A byte-level BPE trained on the rows above; pad == eos, as many base models have it."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        [json.dumps(r) for r in DATA_OPENR1 + DATA_GSM8K + DATA_MATH],
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    if bos:
        from tokenizers.processors import TemplateProcessing

        raw.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        bos_token="<s>" if bos else None,
    )
    tokenizer.chat_template = ("<s>" if bos else "") + DATA_CHAT if chat else None
    return tokenizer


@pytest.fixture(scope="module")
def data_tok():
    return data_tokenizer()


class data_Check:
    """Stands in for eval.Checker: right if gold is in the last \\boxed{} or after `####`; gold "???" cannot be parsed."""

    extract, require_think = "boxed", False

    def __init__(self):
        self.asked, self.asked_golds = [], []

    def check(self, responses, golds, kinds):
        assert type(responses) is type(golds) is type(kinds) is list and len(responses) == len(
            golds
        ) == len(kinds)
        self.asked += zip(responses, golds, kinds)
        marks = {"math": "\\boxed{", "number": "####"}
        return [
            "correct" if k in marks and g in r.rpartition(marks[k])[2].replace(",", "") else "wrong"
            for r, g, k in zip(responses, golds, kinds)
        ]

    def check_golds(self, golds, kinds):
        assert type(golds) is type(kinds) is list and len(golds) == len(kinds) > 0
        self.asked_golds += zip(golds, kinds)
        return ["unparsed" if g == "???" else "correct" for g in golds]


def data_write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def data_load(rows, tokenizer, tmp_path, name="rows.jsonl", **more):
    more = {"max_prompt": 500, "max_response": 500, "cache_dir": tmp_path / "cache", **more}
    return data.load_questions(data_write(tmp_path / name, rows), tokenizer, **more)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.json"])
def test_data_layouts(name, data_tok, tmp_path):
    q = data_load(DATA_OPENR1, data_tok, tmp_path, name, checker=data_Check())
    assert len(q) == 4 and q.dropped == {} and q.report() == "4 of 4 questions kept"
    assert [x.answer for x in q] == ["0", "2", "4", "6"] and [x.id for x in q] == [
        "0",
        "1",
        "2",
        "3",
    ]
    assert q[1].kind == "math" and q[1].level == "" and q[1].behavior_logprobs is None
    assert data_tok.decode(q[1].prompt) == (
        f"<|im_start|>system\n{DATA_SYSTEM}<|im_end|>\n<|im_start|>user\nWhat is 1 + 1?"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (
        data_tok.decode(q[1].demonstration)
        == DATA_OPENR1[1]["target"][0]["content"] + "<|endoftext|>"
    )
    q = data_load(DATA_GSM8K, data_tok, tmp_path, name, checker=data_Check())
    assert [(x.answer, x.kind) for x in q] == [
        ("1234", "number"),
        ("2.5", "number"),
        ("-5", "number"),
    ]
    assert data_tok.decode(q[0].demonstration) == DATA_GSM8K[0]["answer"] + "<|endoftext|>"
    check = data_Check()
    q = data_load(DATA_MATH, data_tok, tmp_path, name, checker=check)
    assert [(x.id, x.answer, x.level, x.kind) for x in q] == [
        ("test/algebra/1.json", "\\frac{x}{2}", "3", "math"),
        ("test/algebra/2.json", "8", "1", "math"),
    ]
    assert (
        check.asked_golds == [("\\frac{x}{2}", "math")] and len(check.asked) == 2
    )  # 8 needs no parsing


def test_data_named_fields(data_tok, tmp_path):
    rows = [
        {"frage": "1+1?", "loesung": 2, "weg": "so \\boxed{2}"},
        {"frage": "2+2?", "loesung": "4", "weg": None},
    ]
    q = data_load(
        rows,
        data_tok,
        tmp_path,
        question_field="frage",
        answer_field="loesung",
        solution_field="weg",
        checker=data_Check(),
    )
    assert [(x.answer, x.demonstration is None) for x in q] == [
        ("2", False),
        ("4", True),
    ]  # an answer that is a number works
    q = data_load(rows, data_tok, tmp_path, question_field="frage", answer_field="loesung")
    assert [x.demonstration for x in q] == [None, None]
    with pytest.raises(
        ValueError, match=r"found frage, loesung, weg; name the columns by --question-field"
    ):
        data_load(rows, data_tok, tmp_path)
    with pytest.raises(ValueError, match=r"no column antwort; found frage, loesung, weg"):
        data_load(rows, data_tok, tmp_path, question_field="frage", answer_field="antwort")
    with pytest.raises(ValueError, match="needed together"):
        data_load(rows, data_tok, tmp_path, question_field="frage")
    q = data_load(
        [{"problem": "1+1?", "answer": "2"}], data_tok, tmp_path
    )  # AIME and others: no solution
    assert q[0].demonstration is None and q[0].answer == "2"


def test_data_templates(data_tok, tmp_path):
    plain, chat = data_tokenizer(chat=False), data_tok
    q = "Why?"
    assert plain.decode(data.render_prompt(plain, q)) == "Question: Why?\nAnswer:\n"
    assert (
        plain.decode(data.render_prompt(plain, q, "Be brief.", "<think>\n"))
        == "Be brief.\n\nQuestion: Why?\nAnswer:\n<think>\n"
    )
    assert data.render_prompt(chat, q, template="plain") == data.render_prompt(plain, q)
    assert (
        chat.decode(data.render_prompt(chat, q))
        == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    messages = DATA_OPENR1[0]["prompt"]
    assert data.render_prompt(chat, messages, "") == data.render_prompt(
        chat, messages[1]["content"]
    )
    assert data.render_prompt(chat, messages[1]["content"], DATA_SYSTEM) == data.render_prompt(
        chat, messages
    )
    assert (
        "Other" in chat.decode(data.render_prompt(chat, messages, "Other"))
        and messages[0]["role"] == "system"
    )
    with pytest.raises(ValueError, match="no chat template"):
        data.render_prompt(plain, q, template="chat")
    with pytest.raises(ValueError, match="auto, chat or plain, not cat"):
        data.render_prompt(plain, q, template="cat")
    strict = data_tokenizer()
    strict.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    with pytest.raises(ValueError, match=r"no system role.*--system ''"):
        data.render_prompt(strict, messages)
    assert data.render_prompt(strict, messages, "")
    thinks = data_tokenizer()  # a template that writes <think> itself gets no second one
    thinks.chat_template = DATA_CHAT.replace("assistant\n", "assistant\n<think>\n")
    assert data.render_prompt(thinks, q, generation_prefix="<think>\n") == data.render_prompt(
        thinks, q
    )


@pytest.mark.parametrize("chat", [True, False])
def test_data_special_tokens(chat, tmp_path):
    tokenizer = data_tokenizer(chat, bos=True)
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    assert tokenizer.pad_token_id == eos
    rows = [
        dict(r, target=[{"role": "assistant", "content": r["target"][0]["content"] + end}])
        for r, end in zip(
            DATA_OPENR1, ("", "<|endoftext|>", "<|endoftext|>\n", "<|endoftext|>more")
        )
    ]
    q = data_load(rows, tokenizer, tmp_path, generation_prefix="<think>\n")
    assert q.dropped == {"demonstration holds the end-of-text token": 1}
    for x in q:
        assert x.prompt.count(bos) == 1 and x.prompt[0] == bos and eos not in x.prompt
        assert (
            x.demonstration.count(eos) == 1
            and x.demonstration[-1] == eos
            and bos not in x.demonstration
        )
        assert tokenizer.decode(x.prompt).endswith(
            "<think>\n"
        ) and "<think>" not in tokenizer.decode(x.demonstration)
        assert tokenizer.decode(x.demonstration).startswith("Add ")
    tokenizer = data_tokenizer(chat)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        data_load(DATA_GSM8K, tokenizer, tmp_path)


def test_data_prefix_only_where_the_prompt_has_it(data_tok, tmp_path):
    assert data_tok.decode(data_load(DATA_OPENR1, data_tok, tmp_path)[0].demonstration).startswith(
        "<think>\nAdd"
    )
    thinks = data_tokenizer()
    thinks.chat_template = DATA_CHAT.replace("assistant\n", "assistant\n<think>\n")
    assert thinks.decode(data_load(DATA_OPENR1, thinks, tmp_path)[0].demonstration).startswith(
        "Add"
    )
    gsm = data_load(
        DATA_GSM8K, data_tok, tmp_path, generation_prefix="<think>\n"
    )  # nothing to strip
    assert data_tok.decode(gsm[0].demonstration).startswith("She has")


def test_data_drops(data_tok, tmp_path):
    good = {"problem": "p", "answer": "5", "solution": "\\boxed{5}"}
    rows = [
        good,
        {**good, "problem": "  "},
        {**good, "problem": None},
        {**good, "answer": ""},
        {**good, "answer": None},
        {**good, "answer": "???", "solution": "\\boxed{???}"},
        {**good, "solution": "\\boxed{6}"},
        {**good, "solution": "none"},
        {**good, "problem": "long " * 2000},
        {**good, "solution": "long " * 2000 + "\\boxed{5}"},
        {**good, "solution": None},
        {**good, "answer": [5]},
        {"problem": "p"},
        {**good, "answer": "???", "solution": "\\boxed{6}"},
        {**good, "answer": True},
        {**good, "solution": "\\boxed{ 5 }"},
    ]
    check = data_Check()
    q = data_load(rows, data_tok, tmp_path, checker=check)
    assert q.dropped_rows == {
        "no question": [1, 2],
        "no gold answer": [3, 4, 11, 12, 14],
        "prompt too long": [8],
        "gold answer cannot be parsed": [5, 13],
        "demonstration too long": [9],
        "demonstration does not verify against its gold answer": [6, 7],
    }
    assert [x.id for x in q] == ["0", "10", "15"] and q[1].demonstration is None
    assert q.report() == (
        "3 of 16 questions kept; dropped: 2 no question (first: row 1), 5 no gold answer (first: row 3), "
        "2 gold answer cannot be parsed (first: row 5), "
        "2 demonstration does not verify against its gold answer (first: row 6), "
        "1 prompt too long (first: row 8), 1 demonstration too long (first: row 9)"
    )
    assert (
        check.asked_golds == [("???", "math")] and len(check.asked) == 4
    )  # what is dropped already is not asked
    assert (
        len(data_load(rows, data_tok, tmp_path, checker=None)) == 7
    )  # nothing verified: 5, 6, 7 and 13 stay
    gsm = data_load(
        DATA_GSM8K
        + [{"question": "q", "answer": "no hashes"}, {"question": "q", "answer": "#### many"}],
        data_tok,
        tmp_path,
    )
    assert gsm.dropped == {"no gold answer": 1, "gold answer cannot be parsed": 1} and len(gsm) == 3
    with pytest.raises(
        ValueError,
        match=r"no question is left: 0 of 1 questions kept; dropped: 1 no question \(first: row 0\)",
    ):
        data_load([{"problem": "", "answer": "1"}], data_tok, tmp_path)


@pytest.mark.parametrize("chat, bos", [(True, False), (False, True), (True, True)])
def test_data_lengths_are_exact(chat, bos, tmp_path):
    tokenizer = data_tokenizer(chat, bos)
    rows = [
        {
            "problem": "naïve " * n + "a" * (n % 3),
            "answer": "5",
            "solution": "é" * n + " x" * n + "\\boxed{5}",
        }
        for n in range(1, 40)
    ]
    whole = data_load(rows, tokenizer, tmp_path, max_prompt=10**6, max_response=10**6)
    for limit in {len(x.prompt) for x in whole}:
        cut = data_load(rows, tokenizer, tmp_path, max_prompt=limit, max_response=2 * limit)
        assert [x.id for x in cut] == [
            x.id for x in whole if len(x.prompt) <= limit and len(x.demonstration) <= 2 * limit
        ]
    short = [
        {"problem": "p", "answer": "5", "solution": "z" * n} for n in range(1, 30)
    ]  # ASCII, where length may decide
    whole = data_load(short, tokenizer, tmp_path)
    cut = data_load(short, tokenizer, tmp_path, max_response=15)
    assert [x.id for x in cut] == [x.id for x in whole if len(x.demonstration) <= 15]


def test_data_behavior_logprobs(data_tok, tmp_path):
    n = len(data_load(DATA_MATH, data_tok, tmp_path)[1].demonstration)
    rows = [
        dict(DATA_MATH[1], behavior_logprobs=v)
        for v in ([-0.5] * n, [-0.5] * (n - 1), [float("nan")] * n, "x", None, [0] * n)
    ]
    q = data_load(rows, data_tok, tmp_path)
    assert q.dropped == {"behavior_logprobs are not one number for each demonstration token": 3}
    assert [x.behavior_logprobs for x in q] == [[-0.5] * n, None, [0] * n]
    assert [x.id for x in q] == [
        "test/algebra/2.json",
        "test/algebra/2.json#4",
        "test/algebra/2.json#5",
    ]  # duplicate ids told apart


def test_data_cache(data_tok, tmp_path):
    check = data_Check()
    first = data_load(DATA_MATH, data_tok, tmp_path, checker=check)
    asked = len(check.asked)
    second = data.load_questions(
        str(tmp_path / "rows.jsonl"),
        data_tok,
        max_prompt=500,
        max_response=500,
        checker=check,
        cache_dir=tmp_path / "cache",
    )
    assert (
        asked
        and len(check.asked) == asked
        and list(first) == list(second)
        and first.fingerprint == second.fingerprint
    )
    assert not [
        f for f in os.listdir(tmp_path / "cache") if not f.endswith(".json")
    ]  # nothing half-written

    class Other(data_Check):
        require_think = True

    strict = Other()
    data_load(DATA_MATH, data_tok, tmp_path, checker=strict)
    assert strict.asked  # another way of checking is not answered from the cache
    third = data.load_questions(
        str(tmp_path / "rows.jsonl"),
        data_tok,
        max_prompt=500,
        max_response=499,
        checker=check,
        cache_dir=tmp_path / "cache",
    )
    assert (
        len(check.asked) > asked and third.fingerprint != first.fingerprint
    )  # other settings are checked anew
    other = data_tokenizer(chat=False)
    before = len(check.asked)
    data_load(DATA_MATH, other, tmp_path, checker=check)
    assert len(check.asked) > before
    q = data_load(DATA_MATH[:1], data_tok, tmp_path, checker=check)  # another file of the same name
    assert len(q) == 1 and q[-1] == q[0] and list(q) == [q[0]]
    with pytest.raises(IndexError):
        q[1]


@pytest.mark.parametrize(
    "text",
    [
        b'\xef\xbb\xbf{"question": "q", "answer": "1"}\n{"question": "r", "answer": 2}\n',
        b'{"question": "q", "answer": "1"}\r\n{"question": "r", "answer": 2}\r\n\r\n',
        b'\n{"question": "q", "answer": "1"}\n  \n{"question": "r", "answer": "2", "more": [1, {"a": null}]}',
        b'\xef\xbb\xbf\r\n{"answer": 1, "question": "q"}\r\n{"question": "r", "answer": 2}',
    ],
)
def test_data_jsonl_forms(text, data_tok, tmp_path):
    (tmp_path / "f.jsonl").write_bytes(text)
    q = data.load_questions(
        str(tmp_path / "f.jsonl"),
        data_tok,
        max_prompt=99,
        max_response=99,
        cache_dir=tmp_path / "c",
    )
    assert [(x.answer, data_tok.decode(x.prompt).count("user\nq")) for x in q] == [
        ("1", 1),
        ("2", 0),
    ]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", b"", r"a\.jsonl: holds no rows$"),
        ("a.jsonl", b"\n \n", r"a\.jsonl: holds no rows$"),
        ("a.json", b"[]", "holds no rows$"),
        (
            "a.jsonl",
            b'{"question": "q"}\n\n{"question": \n',
            r"a\.jsonl: line 3 is not readable JSON: Expecting value$",
        ),
        ("a.jsonl", b'{"question": "q"}\n[1, 2]\n', r"line 2 is a list, not an object like"),
        ("a.jsonl", b'"text"\n', r"line 1 is a str, not an object"),
        ("a.jsonl", b'{"a": "\xff"}\n', r"line 1 is not readable JSON"),
        ("a.jsonl", b'{"a": "\\ud800"}\n', r"line 1 is not readable JSON: 'utf-8' codec"),
        ("a.jsonl", b"[" * 10**6, "line 1 is not readable JSON"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "line 1 is not readable JSON"),
        ("a.json", b'[{"a": 1},\n{"a"}]', "array is not readable.*line 2"),
        ("a.json", b'[{"a": 1}, 2]', r"element 2 is a int, not an object"),
        ("a.parquet", b"", r"a\.parquet: not a readable parquet file: "),
        ("a.parquet", b'{"question": 1}', "not a readable parquet file: "),
        ("a.parquet", b"PAR1 but no more", "not a readable parquet file"),
        (
            "a.csv",
            b"x",
            r"neither a \.jsonl, \.json or \.parquet file nor a Hub dataset owner/name$",
        ),
    ],
)
def test_data_file_errors(name, text, message, tmp_path):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=message) as error:
        data.load_rows(str(tmp_path / name), cache_dir=tmp_path / "c")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_data_source_errors(tmp_path, monkeypatch):
    for name in ("no.jsonl", "no.json", "no.parquet"):
        with pytest.raises(ValueError, match=f"{name}: no such file$"):
            data.load_rows(str(tmp_path / name))
    (tmp_path / "dir.jsonl").mkdir()
    with pytest.raises(ValueError, match="no such file"):
        data.load_rows(str(tmp_path / "dir.jsonl"))
    with pytest.raises(ValueError, match="nor a Hub dataset owner/name"):
        data.load_rows("gsm8k")
    with pytest.raises(ValueError, match="are for Hub datasets"):
        data.load_rows(data_write(tmp_path / "a.jsonl", DATA_MATH), split="train")
    pyarrow.parquet.write_table(
        pyarrow.table({"question": pyarrow.array([], pyarrow.string())}), tmp_path / "none.parquet"
    )
    with pytest.raises(ValueError, match="holds no rows"):
        data.load_rows(str(tmp_path / "none.parquet"), cache_dir=tmp_path / "c")
    path = Path(data_write(tmp_path / "half.parquet", DATA_OPENR1))
    path.write_bytes(path.read_bytes()[:-40] + b"x" * 40)
    with pytest.raises(ValueError, match="half.parquet: not a readable parquet file"):
        data.load_rows(str(path), cache_dir=tmp_path / "c")
    path = Path(data_write(tmp_path / "hole.parquet", DATA_OPENR1 * 1000))
    path.write_bytes(path.read_bytes()[:4] + b"\xff" * 500 + path.read_bytes()[504:])
    with pytest.raises(ValueError, match="hole.parquet: not a readable parquet file"):
        data.load_rows(str(path), cache_dir=tmp_path / "c")
    monkeypatch.setattr(data.datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match="no-one/nothing: not loaded from the Hub: .*owner/name"
    ) as error:
        data.load_rows("no-one/nothing", cache_dir=tmp_path / "c")
    assert "\n" not in str(error.value)


def test_data_hub_arguments(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        data.datasets,
        "load_dataset",
        lambda name, config, **more: seen.update(name=name, config=config, **more) or [1],
    )
    data.load_rows("openai/gsm8k", "test", "main", "abc")
    assert seen == {
        "name": "openai/gsm8k",
        "config": "main",
        "split": "test",
        "revision": "abc",
        "cache_dir": None,
    }
    data.load_rows("openai/gsm8k")
    assert seen["split"] == "train"


def test_data_wrong_types(data_tok, tmp_path):
    """Whatever stands in a cell, a row is dropped and counted, and its neighbours are kept."""
    wrong = [
        None,
        1,
        -2.5,
        True,
        "",
        [],
        {},
        [None],
        [{}],
        {"role": 1},
        [{"role": "user"}],
        [{"role": "user", "content": 5}],
        "\x00",
        [[]],
        float("nan"),
    ]
    good = DATA_OPENR1[1]
    rows = [good] + [
        {**good, column: w} for column in ("prompt", "target", "reward_model") for w in wrong
    ]
    rows += [{k: v for k, v in good.items() if k != column} for column in good]
    q = data_load(rows, data_tok, tmp_path, checker=data_Check())
    assert (
        len(q) + sum(q.dropped.values()) == len(rows)
        and q[0].id == "0"
        and set(q.dropped)
        <= {
            "no question",
            "no gold answer",
            "demonstration does not verify against its gold answer",
        }
    )
    assert all(x.answer and x.prompt for x in q)
    rows = [DATA_MATH[0]] + [{**DATA_MATH[0], column: w} for column in DATA_MATH[0] for w in wrong]
    q = data_load(rows, data_tok, tmp_path, checker=data_Check())
    assert len(q) + sum(q.dropped.values()) == len(rows) and len({x.id for x in q}) == len(q)


DATA_ODD = [
    None,
    True,
    -1,
    2.5,
    float("nan"),
    float("inf"),
    10**400,
    "",
    " ",
    "\0",
    "\u202e5",
    "x" * 5000,
    [],
    [[]],
    {},
    {"a": [1]},
    ["a", None],
    "\ud800",
    "9" * 5000,
    "1e999",
    "-0.0",
]


def data_fuzzed(draw, columns):
    """A JSONL file with something wrong here and there: values, columns, bytes."""
    rows = []
    for _ in range(draw.randint(1, 6)):
        row = {
            c: draw.choice(DATA_ODD)
            if draw.random() < 0.3
            else "\\boxed{5}"
            if c != "answer"
            else "5"
            for c in columns
            if draw.random() < 0.9
        }
        if draw.random() < 0.1:
            row = draw.choice([row, [row], None, 5, "text"])
        rows.append(json.dumps(row).encode())
    text = draw.choice([b"\n", b"\r\n", b"\n\n"]).join(rows)
    if draw.random() < 0.3:
        at = draw.randrange(len(text) + 1)
        text = (
            text[:at]
            + draw.choice(
                [
                    b"\xff",
                    b"\0",
                    b"\xef\xbb\xbf",
                    b"{",
                    b'"',
                    b"[" * 2000,
                    b"\xc3",
                    b"NaN",
                    b"\\ud800",
                ]
            )
            + text[at:]
        )
    return draw.choice(
        [
            text,
            text,
            text,
            b"\xef\xbb\xbf" + text,
            text.decode("latin-1").encode("utf-16"),
            text[:-3],
        ]
    )


def data_reads(load, name):
    """Loads, or refuses in one short line."""
    try:
        return load()
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 600 and str(name) in str(error), error


@pytest.mark.parametrize("seed", range(4))
def test_data_fuzzed_jsonl(data_tok, tmp_path, seed):
    draw, read = random.Random(seed), 0
    for i in range(40):
        path = tmp_path / f"fuzz{i}.jsonl"
        path.write_bytes(
            data_fuzzed(
                draw, ["problem", "answer", "solution", "level", "unique_id", "behavior_logprobs"]
            )
        )
        questions = data_reads(
            lambda: data.load_questions(
                str(path),
                data_tok,
                max_prompt=500,
                max_response=500,
                cache_dir=tmp_path / "c",
                checker=data_Check(),
            ),
            path,
        )
        if questions is not None:
            assert len(questions) + sum(questions.dropped.values()) == len(questions.rows)
            assert all(q.prompt and q.answer for q in questions) and len(
                {q.id for q in questions}
            ) == len(questions)
            read += 1
    assert read > 1


@pytest.mark.parametrize("seed", range(2))
def test_data_fuzzed_parquet(data_tok, tmp_path, seed):
    draw = random.Random(seed)
    whole = Path(data_write(tmp_path / "whole.parquet", DATA_OPENR1 * 50)).read_bytes()
    for i in range(40):
        path, at = tmp_path / f"fuzz{i}.parquet", draw.randrange(len(whole))
        path.write_bytes(
            draw.choice(
                [
                    whole[:at],
                    whole[at:],
                    whole[:at] + draw.randbytes(draw.randint(1, 50)) + whole[at:],
                    whole[:at] + draw.randbytes(9) + whole[at + 9 :],
                    whole[:-200] + draw.randbytes(200),
                    b"PAR1" + draw.randbytes(100) + b"PAR1",
                    whole * 2,
                ]
            )
        )
        questions = data_reads(
            lambda: data.load_questions(
                str(path),
                data_tok,
                max_prompt=500,
                max_response=500,
                cache_dir=tmp_path / "c",
                checker=data_Check(),
            ),
            path,
        )
        assert questions is None or len(questions) + sum(questions.dropped.values()) == len(
            questions.rows
        )
    odd = {
        "int": [1, 2],
        "bytes": [b"a", b"5"],
        "time": pyarrow.array([1, 2], pyarrow.timestamp("s")),
        "null": [None, None],
        "list": [[1], []],
        "struct": [{"a": 1}, None],
        "text": ["5", None],
        "float": [float("nan"), 5.0],
    }
    for question, answer in itertools.product(odd, odd):
        path = tmp_path / f"{question}-{answer}.parquet"
        pyarrow.parquet.write_table(
            pyarrow.table({"problem": odd[question], "answer": odd[answer]}), path
        )
        questions = data_reads(
            lambda: data.load_questions(
                str(path),
                data_tok,
                max_prompt=500,
                max_response=500,
                cache_dir=tmp_path / "c",
                checker=data_Check(),
            ),
            path,
        )
        assert questions is None or [q.answer for q in questions if q.prompt]


def test_data_long_line(data_tok, tmp_path):
    """A 100 MB line costs no tokenising, and a text in the tokenizer's worst case none beyond the limit's reach."""
    rows = [
        {"problem": "p", "answer": "5", "solution": "a" * 100_000_000 + "\\boxed{5}"},
        {"problem": "\u20ac" * 7_000_000, "answer": "5"},
        {"problem": "p", "answer": "5", "solution": "\\boxed{" * 1_000_000},
        {"problem": "p", "answer": "5"},
    ]
    q = data_load(
        rows, data_tok, tmp_path, max_response=8192, max_prompt=1024, checker=data_Check()
    )
    assert q.dropped == {"demonstration too long": 2, "prompt too long": 1} and len(q) == 1


def test_data_counts_tokens_at_first_use_beyond_a_bound(data_tok, tmp_path, monkeypatch):
    solutions = ["\u20ac" * n + "\\boxed{5}" for n in (10, 60, 10, 60, 50_000)] + ["\\boxed{5}"]
    rows = [{"problem": f"p{i}", "answer": "5", "solution": s} for i, s in enumerate(solutions)] + [
        {"problem": "q", "answer": "5"}
    ]
    length = len(data._encode(data_tok, [solutions[0]])[0]) + 1
    limit = length + 20
    assert (
        len(data._encode(data_tok, [solutions[1]])[0]) > limit
    )  # as the last but one, which its characters alone tell
    exact = data_load(rows, data_tok, tmp_path, max_response=limit, checker=data_Check())
    assert exact.open == 0 and exact.dropped == {"demonstration too long": 3} and len(exact) == 4
    monkeypatch.setattr(data, "COUNTED_CHARS", len(solutions[0]) + len(solutions[1]))
    (tmp_path / "later").mkdir()
    later = data_load(rows, data_tok, tmp_path / "later", max_response=limit, checker=data_Check())
    assert (
        later.dropped_rows["demonstration too long"][0] == 1
        and "of 2 demonstrations" in later.report()
        and later.open == 2
    )
    found = {q.id: q.demonstration for q in later}
    assert (
        found["0"] == exact[0].demonstration
        and len(found["2"]) == length
        and found["3"] is None
        and found["6"] is None
    )
    assert data.demonstrated(later) == [k for k, i in enumerate(later.kept) if i != 6]


def test_data_gsm8k_and_math500(data_tok, tmp_path):
    if not DATA_SHARED:
        pytest.skip("../shared/data is not here")
    q = data.load_questions(
        str(DATA_SHARED / "gsm8k_test.jsonl"),
        data_tok,
        max_prompt=1024,
        max_response=2048,
        cache_dir=tmp_path,
    )
    assert (
        len(q) == 1319
        and q.dropped == {}
        and q[0].answer == "18"
        and {q[i].kind for i in range(50)} == {"number"}
    )
    train = data.load_questions(
        str(DATA_SHARED / "gsm8k_train.jsonl"),
        data_tok,
        max_prompt=1024,
        max_response=2048,
        cache_dir=tmp_path,
    )
    assert len(train) == 7473 and train.dropped == {}
    check = data_Check()
    q = data.load_questions(
        str(DATA_SHARED / "math500.jsonl"),
        data_tok,
        max_prompt=2048,
        max_response=8192,
        checker=check,
        cache_dir=tmp_path,
    )
    assert (
        len(q) + sum(q.dropped.values()) == 500 and len(q) > 450
    )  # the stub is stricter than the checker
    assert len(check.asked) == len(q) + q.dropped.get(
        "demonstration does not verify against its gold answer", 0
    )
    whole = data.load_questions(
        str(DATA_SHARED / "math500.jsonl"),
        data_tok,
        max_prompt=2048,
        max_response=8192,
        cache_dir=tmp_path,
    )
    assert (
        len(whole) == 500 and whole[0].id == "test/precalculus/807.json" and whole[0].level == "2"
    )
    assert len(check.asked_golds) == 129  # plain numbers and fractions are not parsed again


# ---------------------------------------------------------------------------------------------------------------------
# Checking answers


@pytest.fixture(scope="module")
def eval_checker():
    with evaluation.Checker(limit=20.0) as checker:
        yield checker


def eval_real(name):
    path = ROOT.parent / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"../shared/data/{name} is not here")
    return [json.loads(line) for line in path.open()]


def eval_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def eval_run(*args):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True, env=env, cwd=ROOT
    )


EVAL_STUCK = r"\boxed{\int_0^{10^{7}} x^{x} dx}"  # costs whatever the limits allow
# Gold answers of MATH-500 and GSM8K that Math-Verify cannot find equal to themselves: none.
EVAL_EXCEPTIONS = set()


@pytest.mark.parametrize("name, kind", [("math500.jsonl", "math"), ("gsm8k_test.jsonl", "number")])
def test_eval_gold_answers_verify_against_themselves(eval_checker, name, kind):
    golds = [row["answer"] for row in eval_real(name)]
    verdicts = eval_checker.check_golds(golds, [kind] * len(golds))
    assert {
        gold for gold, verdict in zip(golds, verdicts) if verdict != "correct"
    } == EVAL_EXCEPTIONS


def test_eval_worked_solutions_are_correct():
    rows = eval_real("math500.jsonl")
    with evaluation.Checker() as checker:
        verdicts = checker.check(
            [r["solution"] for r in rows], [r["answer"] for r in rows], ["math"] * len(rows)
        )
        assert verdicts == ["correct"] * len(rows)
        golds = [r["answer"] for r in eval_real("gsm8k_test.jsonl")]
        assert checker.check(golds, golds, ["number"] * len(golds)) == ["correct"] * len(golds)
        assert checker.pool == []  # plain equality starts no worker


def test_eval_rewritten_answers_go_through_math_verify(eval_checker):
    rows = [r for r in eval_real("math500.jsonl") if r["answer"].replace("-", "").isdigit()][:60]
    responses = [rf"\boxed{{{r['answer']} + 1 - 1}}" for r in rows]
    assert (
        eval_checker.check(responses, [r["answer"] for r in rows], ["math"] * 60)
        == ["correct"] * 60
    )
    assert (
        eval_checker.check(responses, [r["answer"] + "1" for r in rows], ["math"] * 60)
        == ["wrong"] * 60
    )


@pytest.mark.parametrize(
    "response, gold, kind, verdict",
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", "math", "correct"),
        (r"\boxed{1}, no: \boxed{2}", "2", "math", "correct"),
        (r"\boxed{1}, no: \boxed{2}", "1", "math", "wrong"),
        (r"\boxed{x = \boxed{3}}", "3", "math", "correct"),
        (r"\boxed{\left\{ 1, 2 \right.}", "5", "math", "unparsed"),
        (r"\boxed{5} as I said in \boxed", "5", "math", "correct"),
        (r"\boxed{5}, or rather \boxed{6", "5", "math", "unparsed"),  # cut off
        ("5", "5", "math", "unparsed"),
        (r"\boxed{}", "5", "math", "unparsed"),
        (r"\boxed{" + "1" * 2000 + "}", "5", "math", "unparsed"),
        (r"\boxed{\dfrac{3}{4}}", r"\frac34", "math", "correct"),
        (r"\boxed{east}", r"\text{east}", "math", "correct"),
        (r"\boxed{\text{East}}", r"\text{east}", "math", "correct"),
        (r"\boxed{\text{west}}", r"\text{east}", "math", "wrong"),
        (r"\boxed{1,234}", "1234", "math", "correct"),
        (r"\boxed{(3,1)}", "(2,1)", "math", "wrong"),
        (r"\boxed{10^{-9}}", "0", "math", "wrong"),
        (r"\boxed{$7$.}", "7", "math", "correct"),
        # what Math-Verify does and Checker's docstring says
        (r"\boxed{10\%}", "10", "math", "correct"),
        (r"\boxed{10}", r"10\%", "math", "correct"),
        (r"\boxed{0.1}", r"10\%", "math", "correct"),
        (r"\boxed{10}", "0.1", "math", "wrong"),
        (r"\boxed{5\text{ cm}}", "5", "math", "correct"),
        (r"\boxed{x=5}", "5", "math", "correct"),
        (r"\boxed{3 \text{ or } 2}", "2,3", "math", "correct"),
        (r"\boxed{2,3}", r"2 \text{ or } 3", "math", "correct"),
        (r"\boxed{0.3333333}", r"\frac13", "math", "correct"),
        (r"\boxed{0.333}", r"\frac13", "math", "wrong"),
        # numbers
        ("work 1 2\n#### 1,234\nand 5 more", "w\n#### 1234", "number", "correct"),
        ("so it is 12 or 13.", "#### 13", "number", "correct"),
        ("10-3", "-3", "number", "wrong"),  # a minus between operands is no sign
        ("it is -3", "-3", "number", "correct"),
        ("the pair (3,4)", "4", "number", "correct"),
        ("it costs $1,250.50.", "1250.5", "number", "correct"),
        ("see x12", "12", "number", "unparsed"),
        (r"\boxed{\$18.00} #### 19", "18", "number", "correct"),
        ("-0.50", "-.5", "number", "correct"),
        ("none", "3", "number", "unparsed"),
        # choices
        ("The answer is (C).", "C", "choice", "correct"),
        ("ANSWER: C", "C", "choice", "correct"),
        ("**Answer:** **D**", "D", "choice", "correct"),
        ("Answer: A. So B is out", "A", "choice", "correct"),
        (r"the correct answer is $\text{J}$", "J", "choice", "correct"),
        ("The answer is option (B), since", "B", "choice", "correct"),
        ("the answer is E because", "E", "choice", "correct"),
        (r"\boxed{A. text}", "A", "choice", "correct"),
        (r"\boxed{\textbf{(B)}\ 12}", "B", "choice", "correct"),
        (r"\boxed{12}, the answer is C", "C", "choice", "unparsed"),
        ("Hence:\n\n(H)\n", "H", "choice", "correct"),
        ("A train leaves. I think so. The answer is I do not know", "I", "choice", "unparsed"),
        ("The answer is A train", "A", "choice", "unparsed"),
        ("The answer is Berlin", "B", "choice", "unparsed"),
        ("Answer: B-trees", "B", "choice", "unparsed"),
        ("Option A is wrong and B too", "A", "choice", "unparsed"),
        ("The answer is (K)", "K", "choice", "unparsed"),
        # chains
        ("3+8=11;11-4=7;[7]", "7", "chain", "correct"),
        ("[7];[8]", "7", "chain", "wrong"),
        ("[7]]", "7", "chain", "correct"),
        ("[07]", "7", "chain", "wrong"),
        ("3+8=11", "11", "chain", "unparsed"),
        ("]7[", "7", "chain", "unparsed"),
        # Countdown
        ("<7-3=4><4+2=6>[7-3+2]", "7 3 2 = 6", "countdown", "correct"),
        (r"so \boxed{(2 + 3) * 7}", "7 3 2 = 35", "countdown", "correct"),
        ("[7/2*3]", "7 3 2 = 10", "countdown", "wrong"),  # 10.5
        ("[8/3*3/8]", "8 8 3 3 = 1", "countdown", "correct"),  # exactly
        ("[7-3+2-2]", "7 3 2 = 4", "countdown", "wrong"),  # one number twice
        ("[7-3]", "7 3 2 = 4", "countdown", "wrong"),
        ("[4+2]", "7 3 2 = 6", "countdown", "wrong"),
        ("[73-2]", "7 3 2 = 71", "countdown", "wrong"),
        ("[7-3+2=6]", "7 3 2 = 6", "countdown", "unparsed"),
        ("[7/(3-3)]", "7 3 3 = 7", "countdown", "unparsed"),
        ("7-3+2", "7 3 2 = 6", "countdown", "unparsed"),
    ],
)
def test_eval_verdicts(eval_checker, response, gold, kind, verdict):
    assert eval_checker.check([response], [gold], [kind]) == [verdict]


def test_eval_expression_values():
    """Against Python's own arithmetic, on expressions made here; whatever is more than that has no value."""
    rng = random.Random(0)

    def make(depth: int) -> str:
        if depth == 0 or rng.random() < 0.2:
            return str(rng.randrange(100))
        text = rng.choice([" ", ""]).join([make(depth - 1), rng.choice("+-*/"), make(depth - 1)])
        return f"({text})" if rng.random() < 0.5 else text

    values = []
    for text in (make(4) for _ in range(300)):
        try:
            values.append(eval(re.sub("([0-9]+)", r"Fraction(\1)", text)))
        except ZeroDivisionError:
            values.append(None)
        assert evaluation.expression_value(text) == (values[-1] if len(text) <= 200 else None), text
    assert sum(value is not None for value in values) > 250
    for text in (
        "9**9**9**9",
        "9//2",
        "-3",
        "+3",
        "007",
        "3(4)",
        "1_0",
        "1e5",
        "1.5",
        "(1,2)",
        "()",
        "",
        "1+",
        "\u0663+1",
        "1<2",
        "1 if 1",
        "9" * 201,
        "(" * 90 + "1" + ")" * 90,
        "(" * 200,
        "-" * 199 + "1",
        "1\n+1",
        "[1]",
        "__import__('os')",
    ):
        assert evaluation.expression_value(text) is None, text


def test_eval_agrees_with_math_verify(eval_checker):
    """The worker forbids SymPy to read text and refutes by value; neither may change a verdict."""
    import math_verify

    latex = [math_verify.LatexExtractionConfig()]
    equal = [
        ("(x-1)(x+1)", "x^2-1"),
        ("(a+b)^3", "a^3+3a^2b+3ab^2+b^3"),
        (r"\ln e^2", "2"),
        (r"\tan 45^\circ", "1"),
        (r"\int_0^1 x dx", r"\frac12"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^2", r"\begin{pmatrix}7&10\\15&22\end{pmatrix}"),
        (r"x^2+2x+1=0", "(x+1)^2=0"),
        ("1<x<2", "(1,2)"),
        (r"[0,1)\cup(1,2]", r"[0,2]\setminus\{1\}"),
        (r"\frac{n(n+1)}{2}", r"\frac{n^2+n}{2}"),
        (r"\sum_{k=1}^{10}k", "55"),
        (r"\binom{10}{3}", "120"),
        ("|x-3|", "|3-x|"),
        (r"\sqrt{x^2}", "|x|"),
        (r"\sin 2x", r"2\sin x\cos x"),
        (r"\frac{1}{\sqrt2}", r"\frac{\sqrt2}{2}"),
        ("y=2x+3", "2x+3"),
        ("2x+3y=6", "3y=6-2x"),
        (r"(3,\frac{\pi}{2})", r"(3,0.5\pi)"),
        (r"3\pm\sqrt2", r"\{3+\sqrt2,3-\sqrt2\}"),
        (r"\frac{\sqrt3}{3}", r"\tan\frac{\pi}{6}"),
        ("(1+i)^2", "2i"),
        (r"\frac{x^2-1}{x-1}", "x+1"),
        (r"\sin^2 x+\cos^2 x", "1"),
        (r"\frac{1+i}{1-i}", "i"),
        (r"a^{-1}+b^{-1}", r"\frac{a+b}{ab}"),
    ]
    pairs = (
        equal
        + [(gold, answer) for answer, gold in equal]
        + [(a, g) for (a, _), (_, g) in zip(equal, equal[1:])]
    )
    verdicts = eval_checker.check(
        [rf"\boxed{{{a}}}" for a, _ in pairs], [g for _, g in pairs], ["math"] * len(pairs)
    )
    expected = [
        math_verify.verify(math_verify.parse(f"${g}$", latex), math_verify.parse(f"${a}$", latex))
        for a, g in pairs
    ]
    assert [v == "correct" for v in verdicts] == expected
    assert sum(expected) > 40


def test_eval_think_requirement():
    with evaluation.Checker(require_think=True) as checker:
        cases = {
            "<think>a</think>\\boxed{5}": "correct",
            "a</think>\\boxed{5}": "correct",
            "\\boxed{5}": "unparsed",
            "<think>\\boxed{5}</think>": "unparsed",
            "a</think>b</think>\\boxed{5}": "unparsed",
            "a</think><think>\\boxed{5}": "unparsed",
            "<think><think>a</think>\\boxed{5}": "unparsed",
        }
        assert checker.check(list(cases), ["5"] * len(cases), ["math"] * len(cases)) == list(
            cases.values()
        )


def test_eval_extract_any():
    with evaluation.Checker(extract="any", limit=20.0) as checker:
        responses = [
            "The final answer is $\\frac{2}{4}$.",
            "so 1/2",
            "it is 7",
            "hm",
            "",
            "= (1+2)*3",
            "__import__('os')",
        ]
        assert checker.check(responses, ["1/2"] * 5 + ["9"] * 2, ["math"] * 7) == [
            "correct",
            "correct",
            "wrong",
            "unparsed",
            "unparsed",
            "correct",
            "unparsed",
        ]
    with pytest.raises(ValueError, match="boxed or any"):
        evaluation.Checker(extract="all")


def test_eval_order_and_kinds(eval_checker):
    answers = [str(i % 7) for i in range(150)]
    responses = [f"\\boxed{{{a} + 0}}" for a in answers]
    expected = ["correct" if a == "3" else "wrong" for a in answers]
    with evaluation.Checker(workers=2, limit=20.0) as checker:
        assert checker.check(responses, ["3"] * 150, ["math"] * 150) == expected
        many = [f"\\boxed{{{i} + 1}}" for i in range(150)]
        assert checker.check(many, ["8"] * 150, ["math"] * 150) == [
            "correct" if i == 7 else "wrong" for i in range(150)
        ]
        assert len(checker.pool) == 2
    assert eval_checker.check([], [], []) == []
    with pytest.raises(ValueError, match="math, number, choice, chain, countdown"):
        eval_checker.check(["x"], ["x"], ["essay"])


def test_eval_hostile_answers_cost_at_most_the_limit(tmp_path):
    limit = 0.7
    long = 300_000
    text = [
        "\\boxed{" * long,
        "{" * long,
        "\\boxed{" + "{" * long,
        "\\boxed" * long,
        "[" * long,
        "}" * long,
        "]" * long,
        "answer is " * long,
        " " * long + "answer is" + " " * long,
        "$" * long,
        "####" * long,
        "\\" * long,
        "\\boxed{" + "\\{" * long + "}",
        "(" * long,
    ]
    numeric = ["9" * long, "1," * long, "#### " + "9" * long]
    boxed = [
        "9**9**9**9",
        "9^{9^{9^{9}}}",
        "(" * 400 + "1" + ")" * 400,
        "\u202e\u05d0 5",
        "5\0",
        "\ud800",
        "\\frac{",
        "^" * 100,
        "}{",
        "-" * 300 + "1",
        f"__import__('os').system('touch {tmp_path}/evaluated')",
        "\\text{__import__('os')}",
        "\\operatorname{exec}(1)",
        "1" + "0" * 990 + "^2",
    ]
    with evaluation.Checker(limit=limit) as checker:
        checker.check([r"\boxed{x+1}"], ["x+2"], ["math"])
        for kind in evaluation.KINDS:
            start = time.monotonic()
            verdicts = checker.check(
                text + numeric, ["7"] * len(text + numeric), [kind] * len(text + numeric)
            )
            assert set(verdicts[: len(text)]) == {"unparsed"}, kind
            assert set(verdicts) <= {"unparsed", "wrong"}, kind
            assert time.monotonic() - start < 10 * limit + evaluation.START_LIMIT
        for answer in boxed:
            start = time.monotonic()
            verdict, after = checker.check(
                [rf"\boxed{{{answer}}}", r"\boxed{3+4}"], ["7", "7"], ["math", "math"]
            )
            assert verdict != "correct" and after == "correct", answer
            assert (
                time.monotonic() - start < limit + evaluation.START_LIMIT
            )  # a worker's start comes on top
        assert checker.check([EVAL_STUCK], ["7"], ["math"]) == ["timeout"]
    assert not (tmp_path / "evaluated").exists()


def test_eval_hostile_corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from faults_checker import GOLDS, hostile_answers

    responses = [f"\\boxed{{{answer}}}" for answer in hostile_answers()]
    golds = [GOLDS[i % len(GOLDS)] for i in range(len(responses))]
    settled = [evaluation.settle(r, g, "math", "boxed", False) for r, g in zip(responses, golds)]
    refused = [i for i, verdict in enumerate(settled) if isinstance(verdict, str)]
    assert len(refused) > 250 and {settled[i] for i in refused} == {"unparsed"}
    # A quarter of the rest, less those that take as long as they may: benchmarks/faults_checker.py runs them all.
    rest = [
        i
        for i in range(len(responses))
        if i not in set(refused) and not re.search("int|binom|gcd", responses[i])
    ][::4]
    with evaluation.Checker(workers=2, limit=20.0) as checker:
        verdicts = checker.check(
            [responses[i] for i in rest], [golds[i] for i in rest], ["math"] * len(rest)
        )
        assert set(verdicts) <= {"wrong", "unparsed", "timeout"} and verdicts.count("timeout") < 10
        assert checker.check([r"\boxed{3+4}"], ["7"], ["math"]) == ["correct"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "answer, gold, verdict",
    [
        ("10^{10^{9}}", "7", "unparsed"),
        ("((9!)!)!", "7", "unparsed"),
        (r"\sum_{k=1}^{10^{12}} k^k", "7", "unparsed"),
        (r"2^{-10^{9}}", "0", "unparsed"),
        ("(1+i)^{10^{30}}", "1", "unparsed"),
        (r"e^{e^{10^{9}}}", "7", "unparsed"),
        (
            r"\begin{pmatrix} 1 & 1 \\ 0 & 1 \end{pmatrix}^{10^{9}}",
            r"\begin{pmatrix} 1 & 1 \\ 0 & 1 \end{pmatrix}",
            "unparsed",
        ),
        ("2 ^ {2^{2004}}", "2^{2^{2004}}", "correct"),
        ("7", "2^{2^{2004}}", "wrong"),  # too large, but the form tells
        (r"\frac{10^{1000}}{10^{999}}", "10", "correct"),
        ("2^{2025}", "2^{2024} + 2^{2024}", "correct"),
        ("50!", r"50 \cdot 49!", "correct"),
        ("2^{2025} + 1", "2^{2025}", "wrong"),
        ("(" * 9 + "3+4" + ")" * 9, "7", "correct"),
        ("(" * 11 + "3+4" + ")" * 11, "7", "unparsed"),
        ("1" * 30 + "+0", "1" * 30, "correct"),
        ("x" + "+x" * 25, "26x", "unparsed"),
        # expressions that differ are told apart by value, equal ones are simplified
        (r"\sqrt{5+2\sqrt{6}}", r"\sqrt{2}+\sqrt{3}", "correct"),
        (r"\sqrt{5+2\sqrt{6}}", r"\sqrt{2}+\sqrt{3.0001}", "wrong"),
        (r"\sin^2 x + \cos^2 x + y", "y + 1", "correct"),
        (r"\sin^2 x - \cos^2 x + y", "y + 1", "wrong"),
        ("(a+b)^3", "a^3+b^3", "wrong"),
        (r"\frac{x^2-1}{x-1}", "x + 1", "correct"),
        ("10^{-9}x", "0", "wrong"),
        # plain fractions
        (r"\frac{6}{4}", r"\dfrac{3}{2}", "correct"),
        ("6/4", r"\frac32", "correct"),
        (r"-\frac{1}{2}", "-1/2", "correct"),
        (r"\frac{1}{3}", "0.3333333", "correct"),
        (r"\frac{2}{3}", r"\frac{3}{2}", "wrong"),
        (r"\frac{1}{0}", "1", "wrong"),
        ("0/5", "0", "correct"),
    ],
)
def test_eval_large_and_slow_answers(eval_checker, answer, gold, verdict):
    assert eval_checker.check([rf"\boxed{{{answer}}}"], [gold], ["math"]) == [verdict]


def test_eval_killed_and_hanging_workers_are_replaced():
    with evaluation.Checker(limit=2.0) as checker:
        assert checker.check([r"\boxed{3+4}"], ["7"], ["math"]) == ["correct"]
        first = checker.pool[0].process.pid
        killer = subprocess.Popen(
            ["sh", "-c", f"sleep 0.5; kill -9 {first}"]
        )  # in the middle of the second answer
        responses = [r"\boxed{3+4}", EVAL_STUCK, r"\boxed{2+5}", r"\boxed{2+6}"]
        assert checker.check(responses, ["7"] * 4, ["math"] * 4) == [
            "correct",
            "error",
            "correct",
            "wrong",
        ]
        killer.wait()
        second = checker.pool[0].process.pid
        os.kill(second, signal.SIGSTOP)  # hangs, even before it has read its batch
        start = time.monotonic()
        assert checker.check([r"\boxed{5+2}", r"\boxed{4+3}"], ["7", "7"], ["math"] * 2) == [
            "timeout",
            "correct",
        ]
        assert time.monotonic() - start > 2.0
        third = checker.pool[0].process.pid
        os.kill(third, signal.SIGKILL)  # idle: nobody's answer is at fault
        checker.pool[0].process.wait()
        assert checker.check([r"\boxed{1+6}"], ["7"], ["math"]) == ["correct"]
        checker.pool[0].jobs.append(("boxed", "1", "2"))  # as an interrupt of check leaves it
        assert checker.check([r"\boxed{8-1}"], ["7"], ["math"]) == ["correct"]
        pids = {first, second, third, checker.pool[0].process.pid}
        assert len(pids) == 4
    assert not any(map(eval_alive, pids))


def test_eval_workers_end_with_their_parent():
    code = (
        "import eval as e, sys\nc = e.Checker(limit=1.0)\nc.check([r'\\boxed{1+1}'], ['2'], ['math'])\n"
        "print(c.pool[0].process.pid, flush=True)\n%s"
    )
    busy = f"c.limit = 1000.0\nc.check([{EVAL_STUCK!r}], ['2'], ['math'])"
    for rest in ("import time; time.sleep(60)", busy):
        parent = subprocess.Popen(
            [sys.executable, "-c", code % rest], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        worker = int(parent.stdout.readline())
        time.sleep(0.5)
        assert eval_alive(worker)
        parent.kill()
        parent.wait()
        parent.stdout.close()
        deadline = time.monotonic() + 20
        while eval_alive(worker) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not eval_alive(worker)


def test_eval_worker_imports_neither_torch_nor_numpy():
    code = (
        "import sys, eval\nassert not {'torch', 'transformers', 'vllm', 'numpy', 'sympy'} & set(sys.modules)\n"
        "import io\nsys.stdin = io.StringIO('')\neval.worker(1.0)\n"
        "assert not {'torch', 'transformers', 'vllm', 'data', 'rollout'} & set(sys.modules)"
    )
    assert eval_run("-c", code).returncode == 0


# --------------------------------------------------------------------------------------------------
# Scores


def test_pass_at_k_is_the_mean_over_all_subsets():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
                expected = sum(map(max, subsets)) / len(subsets)
                assert evaluation.pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)
    assert [round(evaluation.pass_at_k(8, c, 4), 6) for c in (0, 1, 4, 8)] == [0, 0.5, 0.985714, 1]
    for wrong in ((4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)):
        with pytest.raises(ValueError):
            evaluation.pass_at_k(*wrong)


def test_avg_at_k_brackets_the_mean_as_the_normal_approximation_does():
    rng = random.Random(0)
    scores = [rng.random() < 0.3 for _ in range(400)]
    mean, low, high = evaluation.avg_at_k(scores)
    assert (mean, low, high) == evaluation.avg_at_k(scores)
    half = 1.96 * (mean * (1 - mean) / 400) ** 0.5
    assert mean == pytest.approx(sum(scores) / 400)
    assert low == pytest.approx(mean - half, abs=0.01)
    assert high == pytest.approx(mean + half, abs=0.01)
    assert evaluation.avg_at_k([0.5] * 3) == (0.5, 0.5, 0.5)


class SeedSampler:
    """Answers `[seed % 10]`, so that what is sampled shows the seed."""

    def sample(self, prompts, n, seeds, max_tokens, temperature, top_p=1.0):
        groups = []
        for seed in seeds:
            samples = [rollout.Sample([(seed + j) % 10], [0.0], truncated=j == 0) for j in range(n)]
            groups.append(samples)
        return groups


def test_evaluate_does_not_depend_on_order_or_world():
    questions = []
    for i in range(23):
        questions.append(data.Question(f"q/{i}", [1], str(i % 10), None, str(i % 2), "chain"))
    detokenize = lambda tokens: f"[{tokens[0]}]"

    def run(questions, rank=0, world=1, seed=5):
        rows = evaluation.evaluate(
            SeedSampler(), questions, checker, 4, 1.0, 8, seed, detokenize, rank, world
        )
        return {row["id"]: row for row in rows}

    with evaluation.Checker() as checker:
        whole = run(questions)
        parts = {}
        for rank in range(3):
            parts |= run(questions[::-1], rank, 3)
        assert whole == parts and len(whole) == 23
        assert whole != run(questions, seed=6)
    summary = evaluation.summarize(list(whole.values()))
    correct = [row["verdict"].count("correct") for row in whole.values()]
    assert summary["rows"] == 23 and summary["k"] == 4 and list(summary["pass"]) == [1, 2, 4]
    assert summary["avg"] == pytest.approx(sum(correct) / 92) == pytest.approx(summary["pass"][1])
    assert summary["pass"][4] == pytest.approx(sum(c > 0 for c in correct) / 23)
    assert summary["truncated"] == 0.25 and summary["length"] == 1
    assert summary["correct"] + summary["wrong"] == 1
    assert {level: v["rows"] for level, v in summary["levels"].items()} == {"0": 12, "1": 11}
    text = evaluation.table({"amc": summary})
    assert "warning: amc has 23 rows, not the 83" in text and "pass@4" in text


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks and the command line


def test_eval_benchmarks_follow_the_protocol():
    assert set(evaluation.BENCHES) == {
        "aime24",
        "aime25",
        "amc",
        "amc23",
        "olympiad",
        "math500",
        "mmlu_pro",
        "gsm8k",
        "minerva",
    }
    assert {name for name, bench in evaluation.BENCHES.items() if bench.k == 32} == {
        "aime24",
        "aime25",
        "amc",
        "amc23",
    }
    assert {bench.k for bench in evaluation.BENCHES.values()} == {1, 32}
    assert (evaluation.BENCHES["amc"].rows, evaluation.BENCHES["amc23"].rows) == (83, 40)


def test_eval_local_questions(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        data, "render_prompt", lambda t, text, **kw: seen.append((text, kw)) or [1], raising=False
    )
    rows = [
        {"question": "1+1?", "answer": "work\n#### 1,002", "level": 3},
        {"problem": "x?", "answer": "\\frac12"},
        {"question": "Which?", "options": ["one", "two"], "answer": "B", "category": "law"},
        {"question": "Float?", "answer": 12.0},
        {"question": "Several?", "answer": ["$1$", "2"]},
    ]
    path = tmp_path / "my.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    questions = evaluation.load_questions(str(path), None, "be brief", "<think>\n")
    assert [(q.id, q.answer, q.kind, q.level) for q in questions] == [
        ("my.jsonl/0", "1,002", "number", "3"),
        ("my.jsonl/1", "\\frac12", "math", ""),
        ("my.jsonl/2", "B", "choice", "law"),
        ("my.jsonl/3", "12", "math", ""),
        ("my.jsonl/4", "$1$, 2", "math", ""),
    ]
    assert seen[0] == ("1+1?", {"system": "be brief", "generation_prefix": "<think>\n"})
    assert seen[2][0].startswith("Which?\n\nA. one\nB. two\n")
    good = json.dumps({"question": "a", "answer": "1"}) + "\n"
    for text, message in [
        (good + '{"answer": "1"}\n', ":2: the row has no question or problem"),
        ("", "no rows"),
        (good + "{\n", ":2: not a line of JSON"),
        ("[1]\n", ":1: a row must be"),
        ("[" * 100_000, ":1: not a line of JSON"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            evaluation.load_questions(str(path), None, None, "")


@pytest.mark.parametrize("seed", range(4))
def test_eval_fuzzed_files(data_tok, tmp_path, seed):
    draw = random.Random(seed)
    for i in range(40):
        path = tmp_path / f"fuzz{i}.jsonl"
        path.write_bytes(
            data_fuzzed(
                draw,
                ["question", "answer", "options", "kind", "level", "context"]
                if i % 2
                else ["question", "answer"],
            )
        )
        questions = data_reads(
            lambda: evaluation.load_questions(str(path), data_tok, None, ""), path
        )
        assert questions is None or all(
            q.prompt and q.answer.strip() and q.kind in evaluation.KINDS for q in questions
        )
        path.write_bytes(
            data_fuzzed(draw, ["response", "answer", "kind"] if i % 2 else ["response", "answer"])
        )
        args = argparse.Namespace(file=path, limit=5.0, extract="boxed", require_think=False)
        data_reads(lambda: evaluation.command_grade(args), path)


def test_eval_hub_layouts(tmp_path, monkeypatch):
    """Rows in the layout of each named Hub dataset, made up."""
    layouts = {
        "aime24": {
            "id": 60,
            "problem": "p",
            "solution": "s",
            "answer": "204",
            "url": "u",
            "year": "2024",
        },
        "aime25": {"problem": "p", "answer": "70", "id": "0"},
        "amc": {"id": 0, "problem": "p", "answer": 142.0, "url": "u"},
        "amc23": {"id": 0, "question": "p", "answer": 27.0, "url": "u"},
        "olympiad": {
            "id": 1606,
            "question": "p",
            "solution": ["s"],
            "final_answer": ["2", "3"],
            "context": "c",
            "subfield": "Algebra",
        },
        "math500": {
            "problem": "p",
            "solution": "s",
            "answer": "\\frac12",
            "subject": "Algebra",
            "level": 2,
            "unique_id": "t/1.json",
        },
        "minerva": {"question": "p", "answer": "4.5e33"},
        "gsm8k": {"question": "p", "answer": "2+2=<<2+2=4>>4\n#### 4"},
        "mmlu_pro": {
            "question_id": 70,
            "question": "p",
            "options": list("qrstuvwxyz"),
            "answer": "I",
            "answer_index": 8,
            "cot_content": "",
            "category": "business",
            "src": "x",
        },
    }
    expected = {
        "aime24": "204",
        "aime25": "70",
        "amc": "142",
        "amc23": "27",
        "olympiad": "2, 3",
        "math500": "\\frac12",
        "minerva": "4.5e33",
        "gsm8k": "4",
        "mmlu_pro": "I",
    }
    import datasets

    prompts = {}
    render = lambda tokenizer, text, **kw: prompts.setdefault(name, text) and [1]
    monkeypatch.setattr(data, "render_prompt", render, raising=False)
    for name, row in layouts.items():
        monkeypatch.setattr(datasets, "load_dataset", lambda hub, config, split: [row])
        (question,) = evaluation.load_questions(name, None, None, "")
        assert question.answer == expected[name] and question.kind == evaluation.BENCHES[name].kind
        assert question.level == {"math500": "2", "mmlu_pro": "business"}.get(name, "")
    assert prompts["olympiad"] == "c\np"
    assert (
        "\nA. q\n" in prompts["mmlu_pro"]
        and "\nJ. z\n" in prompts["mmlu_pro"]
        and "boxed" in prompts["mmlu_pro"]
    )


def compare_run(folder: Path, lines: list[tuple], **config) -> Path:
    """A run's folder as mifo.py leaves it; lines are (rl_steps, sft_steps, answers of bench a, of bench b)."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"evaluate": "a,b", "out": str(folder), **config})
    )
    (folder / "evaluations.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "step": i,
                    "rl_steps": rl,
                    "sft_steps": sft,
                    "sft_phases": sft // 2,
                    "demonstrations": 3 * sft,
                    "sampled_tokens": 100 * rl,
                    "benches": {
                        name: {
                            "avg": np.mean(right),
                            "levels": {"1": right[0], "2": np.mean(right[1:])},
                            "correct": right,
                        }
                        for name, right in (("a", a), ("b", b))
                    },
                }
            )
            + "\n"
            for i, (rl, sft, a, b) in enumerate(lines)
        )
    )
    return folder


def test_eval_compare(tmp_path, capsys, monkeypatch):
    lines = [
        (0, 0, [0, 0, 1], [1, 0]),
        (4, 0, [1, 1, 1], [1, 0]),
        (4, 2, [0, 1, 0], [1, 1]),
        (10, 2, [1, 1, 0], [0, 1]),
        (10, 4, [1, 0, 0], [0, 0]),
    ]
    run = evaluation.read_run(compare_run(tmp_path / "x", lines, seed=0))
    heights = [np.mean([np.mean(a), np.mean(b)]) for _, _, a, b in lines]
    np.testing.assert_allclose(
        run["curve"], [(rl, height) for (rl, *_), height in zip(lines, heights)]
    )
    assert run["area"] == pytest.approx(np.trapezoid(heights, [0, 4, 4, 10, 10]) / 10)
    # four were right before the first phase, of which two were lost; three before the second, which kept one
    assert run["forgotten"] == pytest.approx((2 / 4 + 2 / 3) / 2)
    assert run["final"] == heights[-1] and (
        run["demonstrations"],
        run["sampled_tokens"],
        run["sft_phases"],
    ) == (12, 1000, 2)
    assert run["levels"] == {"a 1": 1, "a 2": 0, "b 1": 0, "b 2": 0}
    bare = evaluation.read_run(compare_run(tmp_path / "y", lines[:1] * 2, seed=0))
    assert bare["area"] is None and bare["forgotten"] is None
    folders = [
        compare_run(
            tmp_path / f"{alpha}-{seed}",
            [*lines, (12, 4, [1, right, 0], [1, 0])],
            seed=seed,
            alpha=alpha,
            model=f"m/base-{seed}",
        )
        for alpha, right in ((0.0, 1), (0.9, 0))
        for seed in (3, 13)
    ]
    monkeypatch.setattr(
        sys,
        "argv",
        ["eval.py", "compare", *map(str, folders), "--out", str(tmp_path / "figure.png")],
    )
    evaluation.main()
    table = capsys.readouterr().out.splitlines()
    rows = {
        cells[1].strip(): [cell.strip() for cell in cells[2:]]
        for cells in (line.split("|") for line in table[:-1])
    }
    assert rows["--alpha 0.0"][:2] == ["2", "0.583 ± 0.000"] and rows["--alpha 0.9"][:2] == [
        "2",
        "0.417 ± 0.000",
    ]
    assert plt_image(tmp_path / "figure.png")
    for broken in (tmp_path, compare_run(tmp_path / "z", [], seed=0)):
        monkeypatch.setattr(sys, "argv", ["eval.py", "compare", str(broken)])
        with pytest.raises(SystemExit) as stop:
            evaluation.main()
        assert (
            stop.value.code == 2
            and f"eval.py: {broken}: not the folder of a run" in capsys.readouterr().err
        )


def plt_image(path: Path) -> bool:
    """Whether a PNG shows more than one colour."""
    from matplotlib import pyplot as plt

    image = plt.imread(path)
    return image.shape[0] > 200 and image.std() > 0.01


def test_eval_interval_is_students():
    """The covered share of its density, integrated: 97.5 % below each tabulated value."""
    for freedom, value in [
        *enumerate(evaluation.T, 1),
        (25, 1.96 + 2.5 / 25),
        (200, 1.96 + 2.5 / 200),
    ]:
        x = np.linspace(0, value, 200_001)
        density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(
            freedom * math.pi
        )
        assert 0.5 + scale * np.trapezoid(density, x) == pytest.approx(0.975, abs=3e-4), freedom
    mean, half = evaluation.interval([1.0, 2.0, 3.0, 6.0])
    assert mean == 3 and half == pytest.approx(3.18 * np.std([1, 2, 3, 6], ddof=1) / 2)
    assert evaluation.interval([1.0])[0] == 1 and math.isnan(evaluation.interval([1.0])[1])


def test_countdown_task(monkeypatch):
    """Demonstrations are right, each as probable as any right answer; the base reads wrong ones for the longer questions."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import countdown

    rows, tokenizer = countdown.rows("train", 90), countdown.tokenizer()
    for row in rows:
        assert evaluation.countdown_verdict(row["solution"], row["answer"]) == "correct"
        numbers, target = row["answer"].split(" = ")
        signs = itertools.product("+-", repeat=numbers.count(" "))
        right = sum(
            eval("".join(itertools.chain(*zip(numbers.split(), (*s, ""))))) == int(target)
            for s in signs
        )
        assert math.exp(sum(row["behavior_logprobs"])) == pytest.approx(1 / right)
        assert len(row["behavior_logprobs"]) == len(tokenizer.encode(row["solution"])) + 1
        assert tokenizer.decode(data.render_prompt(tokenizer, row["question"])) == row["question"]
    assert not {row["question"] for row in rows} & {
        row["question"] for row in countdown.rows("eval", 90)
    }
    work = "<9+6=15><15+5=20><20+5=25><25+5=30><30-8=2*11><11=6+5>[9-6+5-5+5]"  # one of the three fives is subtracted
    found = countdown.expert_logprobs([9, 6, 5, 5, 5], 8, work)
    assert {work[i - 1 : i + 1]: math.exp(p) for i, p in enumerate(found) if p} == pytest.approx(
        {"6+": 2 / 3, "5-": 1 / 2}
    )
    rng, verdicts = random.Random(0), {}
    for _ in range(200):
        question, work = countdown.base_example(rng)
        numbers, target = question.rstrip("?").split("=")
        verdict = evaluation.countdown_verdict(work, f"{numbers.replace(',', ' ')} = {target}")
        verdicts.setdefault(numbers.count(",") + 1, set()).add(verdict)
    assert verdicts == {2: {"correct"}, 3: {"correct"}, 4: {"correct"}, 5: {"wrong"}, 6: {"wrong"}}


def test_data_kind_column(data_tok, tmp_path):
    rows = [
        {"question": "1,2=3?", "answer": "1 2 = 3", "solution": "[1+2]", "kind": "countdown"},
        {"question": "1,2=3?", "answer": "1 2 = 3", "solution": "[2-1]", "kind": "countdown"},
        {"question": "1,2=3?", "answer": "three", "kind": "countdown"},
        {"question": "1,2=3?", "answer": "3", "kind": "chess"},
        {"question": "x?", "answer": "3"},
    ]
    (tmp_path / "k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with evaluation.Checker() as checker:
        found = data.load_questions(
            str(tmp_path / "k.jsonl"),
            data_tok,
            max_prompt=99,
            max_response=99,
            checker=checker,
            cache_dir=tmp_path,
        )
    assert [q.kind for q in found] == ["countdown", "math"]
    assert found.dropped_rows == {
        "demonstration does not verify against its gold answer": [1],
        "gold answer cannot be parsed": [2],
        "kind is none of math, number, choice, countdown": [3],
    }


def test_eval_grade_command(tmp_path):
    rows = [
        {"answer": "1/2", "response": r"\boxed{0.5}", "note": "kept"},
        {"answer": "2", "response": r"\boxed{3}"},
        {"answer": "2", "response": "it is 2"},
        {"answer": "7", "response": EVAL_STUCK},
        {"answer": "w\n#### 5", "response": "so 5"},
        {"answer": "B", "kind": "choice", "response": "Answer: B"},
        {"answer": 2, "response": "\ud800\0\\boxed{2}"},
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = eval_run("eval.py", "grade", path, "--limit", 2)
    assert result.returncode == 0, result.stderr
    graded = [json.loads(line) for line in (tmp_path / "mine.graded.jsonl").open()]
    assert [row.pop("verdict") for row in graded] == [
        "correct",
        "wrong",
        "unparsed",
        "timeout",
        "correct",
        "correct",
        "correct",
    ]
    assert graded == rows
    assert {tuple(line.split()[:2]) for line in result.stdout.splitlines()[1:]} == {
        ("correct", "4"),
        ("wrong", "1"),
        ("unparsed", "1"),
        ("timeout", "1"),
        ("error", "0"),
    }
    result = eval_run("eval.py", "grade", path, "--extract", "any", "--limit", 2)
    assert (
        json.loads((tmp_path / "mine.graded.jsonl").read_text().splitlines()[2])["verdict"]
        == "correct"
    )
    for content, message in [
        (None, "no such file"),
        ("{}\n", "mine.jsonl:1: the row has no answer"),
        ('{"answer": "1"}\n', "mine.jsonl:1: the row has no response"),
        ("\n\n{\n", "mine.jsonl:3: not"),
    ]:
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        result = eval_run("eval.py", "grade", path)
        assert (
            result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1
        ), result.stderr


@pytest.fixture(scope="module")
def eval_model(tmp_path_factory):
    """A random Qwen2 with the embedded task's tokenizer; heads of 32, as vLLM needs on a CPU."""
    folder = tmp_path_factory.mktemp("eval") / "model"
    tokenizer = data.embedded_tokenizer()
    transformers.set_seed(0)
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_eval_resumes_on_another_number_of_ranks(eval_model, tmp_path):
    command = [
        "eval.py",
        eval_model,
        "--bench",
        "chain",
        "--k",
        2,
        "--max-tokens",
        12,
        "--temperature",
        1,
        "--sampler",
        "torch",
    ]
    result = eval_run(*command, "--out", tmp_path / "whole")
    assert result.returncode == 0, result.stderr
    assert (
        "avg@k" in result.stdout and "95 % interval" in result.stdout and "pass@2" in result.stdout
    )
    whole = (tmp_path / "whole" / "responses.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 2 * evaluation.CHAINS
    assert set(json.loads(lines[0])) == {
        "id",
        "bench",
        "level",
        "kind",
        "answer",
        "sample",
        "response",
        "verdict",
        "tokens",
        "truncated",
    }

    # As if killed: two ranks' files, one question with half its responses, one line half written.
    part = tmp_path / "part"
    part.mkdir()
    (part / "settings.json").write_text((tmp_path / "whole" / "settings.json").read_text())
    (part / "responses.rank0.jsonl").write_text("".join(lines[0:40] + lines[80:121]))
    (part / "responses.rank1.jsonl").write_text("".join(lines[40:60]) + lines[60][:30])
    result = eval_run(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        2,
        *command,
        "--out",
        part,
    )
    assert result.returncode == 0, result.stderr
    assert f"resuming: 50 of {evaluation.CHAINS} questions" in result.stderr
    assert (part / "responses.jsonl").read_text() == whole
    assert (part / "results.json").read_text() == (tmp_path / "whole" / "results.json").read_text()
    assert sorted(p.name for p in part.iterdir()) == [
        "responses.jsonl",
        "results.json",
        "settings.json",
    ]


def test_eval_refuses_bad_input(eval_model, tmp_path, monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, args)])
        with pytest.raises(SystemExit) as exit:
            evaluation.main()
        error = capsys.readouterr().err
        assert exit.value.code == 2 and error.count("\n") == 1, error
        return error

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "known are aime24, aime25, amc, amc23" in run(eval_model, "--bench", "chain,aime42")
    assert "no such file" in run(eval_model, "--bench", tmp_path / "none.jsonl")
    assert "not a model folder" in run(tmp_path / "none", "--bench", "chain")
    assert "--max-tokens 1000" in run(eval_model, "--bench", "chain", "--max-tokens", 1000)
    assert "--k must be" in run(eval_model, "--bench", "chain", "--k", 0)
    assert "two benchmarks of one name" in run(eval_model, "--bench", "chain,chain")
    (tmp_path / "responses.jsonl").touch()
    assert "model there is none" in run(
        eval_model, "--bench", "chain", "--max-tokens", 8, "--out", tmp_path
    )
    (tmp_path / "settings.json").write_text(json.dumps({"model": "another"}))
    assert "model there is another" in run(
        eval_model, "--bench", "chain", "--max-tokens", 8, "--out", tmp_path
    )


def test_eval_with_vllm_on_two_ranks(eval_model, tmp_path):
    import rollout

    if problem := rollout.vllm_problem():
        pytest.skip(problem)
    result = eval_run(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        2,
        "eval.py",
        eval_model,
        "--bench",
        "chain",
        "--k",
        2,
        "--max-tokens",
        12,
        "--sampler",
        "vllm",
        "--out",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text())["results"]["chain"]
    assert results["rows"] == evaluation.CHAINS and 0 < results["length"] <= 12
    assert len((tmp_path / "responses.jsonl").read_text().splitlines()) == 2 * evaluation.CHAINS


# ---------------------------------------------------------------------------------------------------------------------
# Recipes and presets

MATHS_RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("qwen2.5-math-*.toml"))
SFT_STAGE = {"schedule", "rho", "sft_lr", "sft_schedule", "sft_batch", "sft_epochs"}
RECIPE_DIFFERENCES = [
    ("qwen2.5-math-7b", "qwen2.5-math-1.5b", {"model"}),
    ("qwen2.5-math-1.5b-dagger", "qwen2.5-math-1.5b", {"alpha"}),
    ("qwen2.5-math-7b-dagger", "qwen2.5-math-7b", {"alpha"}),
    ("qwen2.5-math-grpo", "qwen2.5-math-7b", {"schedule"}),
    ("qwen2.5-math-relift", "qwen2.5-math-7b", {"rho", "p", "freeze"}),
    ("qwen2.5-math-sft-then-rl", "qwen2.5-math-7b", SFT_STAGE),
    ("qwen2.5-math-pear", "qwen2.5-math-sft-then-rl", {"pear", "sft_lr", "sft_epochs"}),
    # What an SFT run has no use for stays at its default.
    (
        "qwen2.5-math-sft",
        "qwen2.5-math-sft-then-rl",
        {"schedule", "updates", "clip_high", "eval_every", "save_every"},
    ),
]


def recipe_config(monkeypatch, *argv):
    monkeypatch.setenv("WORLD_SIZE", "8")
    return mifo.parse_config(list(argv))


def recipe_named(monkeypatch, name, *argv):
    return recipe_config(monkeypatch, "--recipe", str(ROOT / "recipes" / f"{name}.toml"), *argv)


def recipe_difference(one, other):
    return {
        f.name for f in dataclasses.fields(one) if getattr(one, f.name) != getattr(other, f.name)
    } - {"recipe"}


@pytest.mark.parametrize("name", MATHS_RECIPES)
def test_recipe_parses_and_says_where_each_value_comes_from(monkeypatch, name):
    cfg = recipe_named(monkeypatch, name)
    assert (
        cfg.model in ("Qwen/Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-Math-7B")
        and cfg.data == "Elliott/Openr1-Math-46k-8192"
    )
    assert (cfg.rope_theta, cfg.max_position_embeddings, cfg.generation_prefix) == (
        40000.0,
        16384,
        "<think>\n",
    )
    assert set(cfg.evaluate.split(",")) <= set(evaluation.BENCHES)
    lines = (ROOT / "recipes" / f"{name}.toml").read_text().splitlines()
    values = [line for line in lines if line and not line.startswith("#")]
    assert len(values) > 20
    for line in values:
        assert re.fullmatch(r'\w+ = ("[^"]*"|\S+) +# (paper|lineage|ours)\b.*', line), line
    assert all(len(line) <= 120 for line in lines)


def test_recipes_differ_exactly_where_their_comments_say(monkeypatch):
    assert {one for one, _, _ in RECIPE_DIFFERENCES} | {"qwen2.5-math-1.5b"} == set(MATHS_RECIPES)
    for one, other, names in RECIPE_DIFFERENCES:
        assert (
            recipe_difference(recipe_named(monkeypatch, one), recipe_named(monkeypatch, other))
            == names
        ), one
        head = " ".join(
            (ROOT / "recipes" / f"{one}.toml")
            .read_text()
            .split("\n\n")[0]
            .replace("\n# ", " ")
            .split()
        )
        said = re.search(rf"iffers from {re.escape(other)}.toml in ([\w, ]+)", head)
        if said:
            assert set(re.split(r", | and ", said[1])) == names, one


def recipe_presets():
    """[(name, flags that differ from MIFO, further ones on Qwen2.5-Math)] of the README's table."""
    text = (ROOT / "README.md").read_text()
    table = re.search(r"\| preset \|.*\n\|[-|]+\n((?:\|.*\n)+)", text)[1]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [
        (name, *(shlex.split((re.search(r"`(.*)`", cell) or ["", ""])[1]) for cell in flags))
        for name, *flags in cells
    ]


def test_presets_differ_from_mifo_in_exactly_the_flags_of_the_readme(monkeypatch):
    presets = recipe_presets()
    assert len(presets) == 11 and presets[0] == ("MIFO", [], [])
    for base, further in (
        (ROOT / "recipes" / "qwen2.5-math-7b.toml", True),
        (ROOT / "recipes" / "embedded.toml", False),
    ):
        mifo_config = recipe_config(monkeypatch, "--recipe", str(base))
        resolved = []
        for name, flags, more in presets:
            flags = flags + (more if further else [])
            cfg = recipe_config(monkeypatch, "--recipe", str(base), *flags)
            assert recipe_difference(cfg, mifo_config) == {
                f[2:].replace("-", "_") for f in flags[::2]
            }, name
            resolved.append(dataclasses.astuple(cfg))
        assert len(set(resolved)) == len(presets)


def test_recipes_are_the_presets_of_the_readme(monkeypatch):
    flags = {name: first + more for name, first, more in recipe_presets()}
    for recipe, preset in (
        ("dagger", "MIFO-dagger"),
        ("relift", "MIFO without both (ReLIFT's scheme)"),
        ("grpo", "GRPO"),
        ("sft-then-rl", "SFT then RL"),
        ("pear", "PEAR (block) then RL"),
    ):
        file = "qwen2.5-math-7b-dagger" if recipe == "dagger" else f"qwen2.5-math-{recipe}"
        assert (
            recipe_difference(
                recipe_named(monkeypatch, file),
                recipe_named(monkeypatch, "qwen2.5-math-7b", *flags[preset]),
            )
            == set()
        ), recipe


# ---------------------------------------------------------------------------------------------------------------------
# The memory plan, against numbers worked out by hand from the published shapes of Qwen2.5-Math

PLAN_15B = dict(
    hidden_size=1536,
    num_hidden_layers=28,
    intermediate_size=8960,
    vocab_size=151936,
    num_attention_heads=12,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    max_position_embeddings=16384,
)
PLAN_7B = dict(
    hidden_size=3584,
    num_hidden_layers=28,
    intermediate_size=18944,
    vocab_size=152064,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
    max_position_embeddings=16384,
)


def plan_of(monkeypatch, shape, *argv, recipe="qwen2.5-math-7b", world=8):
    plan = mifo.memory_plan(
        recipe_named(monkeypatch, recipe, *argv), transformers.Qwen2Config(**shape), world, 79.0
    )
    sizes = {what: size for what, size, _ in plan}
    assert len(sizes) == len(plan) and all(size > 0 for size in sizes.values())
    return sizes, {what: arithmetic for what, _, arithmetic in plan}


def test_memory_plan_of_1_5b_by_hand(monkeypatch):
    sizes, said = plan_of(monkeypatch, PLAN_15B, recipe="qwen2.5-math-1.5b")
    # 151,936 x 1,536 + 28 x 46,797,824 + 1,536 = 1,543,714,304 parameters, 192,964,288 a rank
    expected = {
        "weights, float32": 771_857_152,
        "gradients, float32": 771_857_152,
        "AdamW of RL, two moments": 1_543_714_304,
        "AdamW of SFT, two moments": 1_543_714_304,
        "importance map and anchor": 1_543_714_304,
        "mask and importance of one tensor": 145_858_560,
        "two layers gathered": 187_191_296,
        "a layer's gradients": 280_786_944,
        "embeddings and head gathered": 466_750_464,
        "their gradients": 1_400_251_392,
        "activations kept": 2_818_572_288,  # 3,072 x 28 x 32,768
        "activations of a layer, recomputed": 103_480 * 32_768,
        "gradients of a layer's activations": 53_760 * 32_768,
        "last norm and hidden states": 21_504 * 32_768,
        "a tile of the logits": 335_544_320,
        "engine's weights, bfloat16": 3_087_428_608,
        "host memory of a rank, at the start": 6_174_857_216,
    }
    for what, size in expected.items():
        assert sizes[what] * 2**30 == pytest.approx(size, rel=1e-9), what
    # (39.5 - 2) GiB - 3,087,428,608 B at 28,672 B a token
    assert "28 layers x 256 x 1,296,661 tokens, 140.7 responses" in said["KV cache"]
    assert sizes["TRAINING"] == pytest.approx(19.45, abs=0.01) and sizes[
        "SAMPLING"
    ] == pytest.approx(8.03 + 39.5, abs=0.01)


def test_memory_plan_of_7b_by_hand(monkeypatch):
    sizes, said = plan_of(monkeypatch, PLAN_7B)
    # 2 x 152,064 x 3,584 + 28 x 233,057,792 + 3,584 = 7,615,616,512 parameters, 951,952,064 a rank
    expected = {
        "weights, float32": 3_807_808_256,
        "AdamW of SFT, two moments": 7_615_616_512,
        "embeddings and head gathered": 2_179_996_672,
        "activations of a layer, recomputed": 225_400 * 32_768,
        "engine's weights, bfloat16": 15_231_233_024,
    }
    for what, size in expected.items():
        assert sizes[what] * 2**30 == pytest.approx(size, rel=1e-9), what
    # (39.5 - 2) GiB - 15,231,233,024 B at 57,344 B a token
    assert "28 layers x 512 x 436,559 tokens, 47.4 responses" in said["KV cache"]
    assert sizes["held always"] == pytest.approx(27.82, abs=0.01)  # 28 B a parameter / 8, and 3 GiB
    assert sizes["TRAINING"] == pytest.approx(60.30, abs=0.01) and sizes[
        "SAMPLING"
    ] == pytest.approx(67.32, abs=0.01)


def test_memory_plan_sums_each_phase(monkeypatch):
    sizes, _ = plan_of(monkeypatch, PLAN_7B)
    names = list(sizes)
    held, training, sampling = (
        names.index(name) for name in ("held always", "TRAINING", "SAMPLING")
    )
    assert sizes["held always"] == pytest.approx(sum(sizes[name] for name in names[:held]))
    assert sizes["TRAINING"] == pytest.approx(
        sizes["held always"] + sum(sizes[name] for name in names[held + 1 : training])
    )
    assert sizes["SAMPLING"] == pytest.approx(
        sizes["held always"] + sum(sizes[name] for name in names[training + 1 : sampling])
    )


FREEZING = {"importance map and anchor", "mask and importance of one tensor"}


@pytest.mark.parametrize(
    "argv, gone, new",
    [
        (["--schedule", "rl"], {"AdamW of SFT, two moments", *FREEZING}, set()),
        (["--schedule", "sft"], {"AdamW of RL, two moments", *FREEZING}, set()),
        (["--schedule", "sft-then-rl"], FREEZING, set()),
        (["--freeze", "off"], FREEZING, set()),
        (["--kl-coef", "0.1"], set(), {"reference model, float32"}),
        (
            ["--gather-once"],
            {"two layers gathered", "embeddings and head gathered"},
            {"gradients not yet reduced, float32", "weights gathered"},
        ),
        (
            ["--offload-importance"],
            {"importance map and anchor"},
            {"host memory of a rank, from then on"},
        ),
        (
            ["--no-activation-checkpointing"],
            {"activations kept", "activations of a layer, recomputed"},
            {"activations"},
        ),
    ],
)
def test_memory_plan_follows_the_settings(monkeypatch, argv, gone, new):
    before, _ = plan_of(monkeypatch, PLAN_15B)
    after, _ = plan_of(monkeypatch, PLAN_15B, *argv)
    assert (set(before) - set(after), set(after) - set(before)) == (gone, new)


def test_memory_plan_shards_over_one_replica_and_counts_the_longest_row(monkeypatch):
    whole, _ = plan_of(monkeypatch, PLAN_15B)
    halves, _ = plan_of(monkeypatch, PLAN_15B, "--replicas", "2")
    assert halves["weights, float32"] == pytest.approx(2 * whole["weights, float32"])
    short, _ = plan_of(
        monkeypatch, PLAN_15B, "--micro-tokens", "64"
    )  # a row of 9,216 tokens is alone in its micro-batch
    assert short["activations kept"] * 2**30 == pytest.approx(3072 * 28 * 9216)
    with pytest.raises(ValueError, match="--gpu-memory-utilization 0.2"):
        plan_of(monkeypatch, PLAN_7B, "--gpu-memory-utilization", "0.2")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_plan_counts_what_a_block_keeps_for_its_backward_pass(monkeypatch, checkpointing):
    def kept_bytes(layers):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.Qwen2Config(**{**shape, "num_hidden_layers": layers}), dtype=torch.bfloat16
        ).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept = {}

        def pack(tensor):  # the tensor is held, so that no other storage can take its address
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.model(input_ids=torch.zeros(2, 128, dtype=torch.int64), use_cache=False)
        return sum(
            t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in parameters
        )

    shape = dict(
        hidden_size=256,
        intermediate_size=704,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_hidden_layers=1,
        vocab_size=64,
        max_position_embeddings=16384,
    )
    flag = "--activation-checkpointing" if checkpointing else "--no-activation-checkpointing"
    sizes, _ = plan_of(monkeypatch, shape, flag, "--micro-tokens", "32768")
    planned = sizes["activations kept" if checkpointing else "activations"] * 2**30 / 32768
    assert planned == (kept_bytes(3) - kept_bytes(2)) / 256


# ---------------------------------------------------------------------------------------------------------------------
# The dry run

DRY_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBox it.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def dry_folder(tmp_path, monkeypatch):
    """A model's configuration and tokenizer, without any weights, and data in the layout of OpenR1-Math-46k."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, [])
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=DRY_TEMPLATE,
    )
    tokenizer.save_pretrained(tmp_path / "model")
    transformers.Qwen2Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(tmp_path / "model")
    rows = [
        {
            "prompt": [
                {"role": "system", "content": "Think."},
                {"role": "user", "content": f"What is {a} + {a}?"},
            ],
            "target": target,
            "ability": "math",
            "data_source": "",
            "reward_model": {"style": "rule", "ground_truth": str(2 * a)},
            "extra_info": {"split": "train", "index": a},
        }
        for a, target in (
            (1, None),
            (2, [{"role": "assistant", "content": "<think>\nTwo twos.\n</think>\n\\boxed{4}"}]),
            (3, [{"role": "assistant", "content": "<think>\nWrong.\n</think>\n\\boxed{7}"}]),
        )
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text(
        json.dumps({"question": "What is 4 + 4?", "answer": "8"}) + "\n"
    )
    monkeypatch.setattr(data.datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RANK", "0")
    return tmp_path


def dry_flags(folder, *argv):
    return [
        "--model",
        str(folder / "model"),
        "--data",
        str(folder / "train.jsonl"),
        "--evaluate",
        str(folder / "test.jsonl"),
        "--out",
        str(folder / "run"),
        "--generation-prefix",
        "<think>\n",
        "--rope-theta",
        "40000",
        "--max-position-embeddings",
        "16384",
        "--sampler",
        "torch",
        "--dry-run",
        "8",
        "--buffer-size",
        "1",
        *argv,
    ]


def test_dry_run_shows_everything_short_of_the_weights(dry_folder, monkeypatch):
    text = mifo.dry_run(recipe_config(monkeypatch, *dry_flags(dry_folder)))
    assert "qwen2, 2 layers of width 64, context 16,384, rotary base 40,000" in text
    assert (
        "2 of 3 questions kept" in text
        and "1 demonstration does not verify" in text
        and "1 with a demonstration" in text
    )
    assert "test.jsonl: 1 questions" in text and "ends with '<|endoftext|>'" in text
    assert (
        "\n<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n<think>\n"
        "<<<|>>>Two twos.\n</think>\n\\boxed{4}<|endoftext|>\n"
    ) in text
    assert (
        "parameters / 8" in text
        and text.splitlines()[-1] == "dry run: all is in place; nothing was trained"
    )
    assert not (dry_folder / "run").exists() and not torch.distributed.is_initialized()


def test_dry_run_drops_the_system_prompt_as_the_run_would(dry_folder, monkeypatch):
    text = mifo.dry_run(recipe_config(monkeypatch, *dry_flags(dry_folder, "--system", "none")))
    assert (
        "<|im_start|>system\nBox it.<|im_end|>\n<|im_start|>user\nWhat is 2 + 2?" in text
        and "Think." not in text
    )


def test_dry_run_refuses_what_a_run_would_refuse(dry_folder, monkeypatch):
    for argv, message in (
        (["--max-position-embeddings", "0"], "do not fit in the model's context of 4096"),
        (["--model", str(dry_folder)], "not a model's folder"),
        (["--solution-field", "target"], "--question-field and --answer-field"),
    ):
        with pytest.raises(ValueError, match=message):
            mifo.dry_run(recipe_config(monkeypatch, *dry_flags(dry_folder, *argv)))
        assert not torch.distributed.is_initialized()
    with pytest.raises(ValueError, match="--questions 12 does not divide by the 8 ranks"):
        recipe_config(monkeypatch, *dry_flags(dry_folder, "--questions", "12"))
    monkeypatch.setenv("WORLD_SIZE", "1")  # one process plans for eight
    with pytest.raises(ValueError, match="--questions 12 does not divide by the 8 ranks"):
        mifo.parse_config(dry_flags(dry_folder, "--questions", "12"))
    rows = (dry_folder / "train.jsonl").read_text().splitlines()
    (dry_folder / "train.jsonl").write_text(rows[0] + "\n")
    with pytest.raises(ValueError, match="needs demonstrations"):
        mifo.dry_run(recipe_config(monkeypatch, *dry_flags(dry_folder)))
    assert "the first question: gold answer '2'" in mifo.dry_run(
        recipe_config(monkeypatch, *dry_flags(dry_folder, "--schedule", "rl"))
    )


def test_dry_run_says_when_memory_may_not_suffice(dry_folder, monkeypatch):
    text = mifo.dry_run(
        recipe_config(monkeypatch, *dry_flags(dry_folder, "--micro-tokens", "400000000"))
    )
    assert text.splitlines()[-1].startswith(
        "dry run: memory may not suffice: TRAINING needs up to "
    )


def test_dry_run_as_a_command(dry_folder):
    environment = {
        **os.environ,
        "HF_HOME": str(dry_folder / "home"),
        "HF_DATASETS_CACHE": str(dry_folder / "cache"),
    }
    environment = {
        key: value
        for key, value in environment.items()
        if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "mifo.py"), *dry_flags(dry_folder)],
        env=environment,
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("settings") and done.stdout.rstrip().endswith(
        "nothing was trained"
    )
    assert not (dry_folder / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The loop

# Tests of the training loop: gradients, freezing, checkpoints, samplers, real data, bad settings, presets.
#
# What needs a process group or an engine runs in a few subprocesses, each of which does much and leaves its results in a
# folder (`loop_job`, `loop_main`); the tests then look at those. A deterministic checker stands in where rewards must vary
# although the model is random: a third of the questions is never solved, the rest by the parity of a checksum.

GSM8K = ROOT.resolve().parent / "shared" / "data" / "gsm8k_train.jsonl"
LOOP_EOS = [
    1,
    9,
]  # end-of-text tokens of the tiny model's generation config; 1 is the tokenizer's own
LOOP_FLAGS = (
    "--sampler torch --max-prompt 24 --max-response 60 --questions 4 --samples 4 --steps 9 --buffer-size 5 --p 0.25 "
    "--sft-batch 2 --sft-epochs 2 --rl-lr 1e-3 --sft-lr 1e-3 --save-every 1 --keep 1000 --kv-cache-gib 0.05 "
    "--max-num-seqs 32 --dtype float32"
).split()


def loop_environment(folder, **more) -> dict:
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    return env | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_DATASETS_CACHE": str(Path(folder, "cache")),
        "PYTHONWARNINGS": "ignore",
        **more,
    }


def loop_start(folder, world: int, call: str) -> list[subprocess.Popen]:
    """`call` of this module, in `world` processes that torchrun might have started."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import {Path(__file__).stem} as t; t.{call}; t.os._exit(0)"
    started = []
    for rank in range(world):
        env = loop_environment(
            folder,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world),
            MASTER_ADDR="localhost",
            MASTER_PORT=port,
        )
        with open(Path(folder, f"output-{rank}.txt"), "w") as output:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-c", code], env=env, stdout=output, stderr=output, cwd=folder
                )
            )
    return started


def loop_wait(started: list[subprocess.Popen], folder, expected=(0,), limit=170) -> None:
    try:
        codes = [process.wait(limit) for process in started]
    finally:
        for process in started:
            process.kill()
    tails = [Path(folder, f"output-{rank}.txt").read_text()[-1500:] for rank in range(len(started))]
    assert all(code in expected for code in codes), (codes, *tails)


def loop_command(arguments, folder, world=1):
    """The real command, by torchrun for more than one rank -> (exit code, stdout, stderr)."""
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        if world > 1
        else []
    )
    return subprocess.Popen(
        [sys.executable, *torchrun, str(ROOT / "mifo.py"), *map(str, arguments)],
        text=True,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=loop_environment(folder),
    )


def loop_model(folder, seed: int, tokenizer=None, **config) -> str:
    """A random Qwen2 of 2 layers with lively weights (and biases), saved with its tokenizer."""
    tokenizer = tokenizer or data.embedded_tokenizer()
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
    } | config
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=len(tokenizer),
            num_hidden_layers=2,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **settings,
        )
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.03 * torch.randn_like(p))
    model.generation_config.eos_token_id = LOOP_EOS
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class LoopChecker:
    """Decides by gold answer and text alone, in no time, so that rewards vary although the model is random."""

    extract, require_think = "any", False

    def __init__(self, *args):
        pass

    def check(self, texts, golds, kinds):
        return [
            "correct" if int(gold) % 3 and zlib.crc32(text.encode()) % 2 else "wrong"
            for text, gold in zip(texts, golds)
        ]

    def close(self):
        pass


class LoopSampler:
    """Responses that depend on the prompt alone."""

    name = "fixed"

    def sample(self, prompts, n, seeds, max_tokens, temperature, top_p=1.0):
        import rollout

        groups = []
        for prompt in prompts:
            rng = random.Random(str(prompt))
            tokens = [rng.choices(range(2, 27), k=rng.randint(1, 14)) for _ in range(n)]
            groups.append(
                [
                    rollout.Sample(t, [-0.5 - 3 * rng.random() for _ in t], rng.random() < 0.3)
                    for t in tokens
                ]
            )
        return groups

    def push(self, weights):
        for _ in weights:
            pass

    def sleep(self):
        pass


def loop_questions(count=16, name="train") -> list:
    return data.embedded_questions(data.embedded_tokenizer(), name, data.TRAIN_TERMS, count)


def loop_patch():
    """The loop on 16 questions, with the checker above, any number of times in a process."""
    import eval as evaluation
    import mifo

    embedded, init = data.embedded_questions, dist.init_process_group
    data.embedded_questions = lambda tokenizer, name, terms, count: embedded(
        tokenizer, name, terms, 16
    )
    evaluation.Checker = LoopChecker
    dist.init_process_group = lambda *args, **kwargs: (
        None if dist.is_initialized() else init(*args, **kwargs)
    )
    mifo.plot = lambda *args, **kwargs: None
    return mifo


def loop_run(mifo, out, flags):
    """A Run as main() makes it, its settings given by LOOP_FLAGS and then flags."""
    empty = Path(out).parent / f"empty-{os.environ['RANK']}.toml"
    empty.write_text("")
    cfg = mifo.parse_config(
        ["--recipe", str(empty), "--out", str(out), *LOOP_FLAGS, *map(str, flags)]
    )
    Path(out).mkdir(parents=True, exist_ok=True)
    run = mifo.set_up(cfg)
    if cfg.pear != "off":
        mifo.find_behavior(run)
    return run


def loop_full(parameter) -> torch.Tensor:
    return (
        parameter.full_tensor().detach().clone()
        if hasattr(parameter, "full_tensor")
        else parameter.detach().clone()
    )


# ---------------------------------------------------------------------------------------------------------------------
# Gradients

LOOP_RL = {  # flags beside the common ones; what is compared with the oracle, whatever --micro-tokens
    "token": [],
    "sequence": ["--aggregation", "sequence"],
    "constant": ["--aggregation", "constant", "--normalize-std"],
    "truncated": ["--mask-truncated", "--temperature", "0.7"],
    "truncated-sequence": ["--mask-truncated", "--aggregation", "sequence"],
    "updates": ["--updates", "2", "--clip-low", "0.1", "--clip-high", "0.15"],
    "kl": ["--updates", "2", "--kl-coef", "0.5"],
    "tis": ["--tis-cap", "2"],
    "once": ["--gather-once", "--updates", "2", "--kl-coef", "0.5"],
    "seed": ["--seed", "1"],  # all 16 questions in another order
}
LOOP_SFT = {
    "all": ["--rho", "1"],
    "rho": ["--rho", "0.35"],
    "single": ["--rho", "0.2", "--sft-batch", "1"],  # fewer rows than ranks
    "odd": ["--rho", "0.5", "--sft-batch", "5"],
    "once-copies": [
        "--rho",
        "0.35",
        "--gather-once",
        "--replicas",
        os.environ.get("WORLD_SIZE", "1"),
    ],
    "pear-sequence": ["--rho", "1", "--pear", "sequence"],
    "pear-token": [
        "--rho",
        "0.5",
        "--pear",
        "token",
        "--pear-gamma",
        "0.9",
        "--pear-ratio-range",
        "off",
    ],
    "pear-block": [
        "--rho",
        "1",
        "--pear",
        "block",
        "--pear-gamma",
        "0.9",
        "--pear-block",
        "3",
        "--pear-weight-range=-0.5,0.5",
    ],
}
LOOP_SGD = 0.5  # learning rate of the plain gradient step that stands in for AdamW, for a second update off the old policy


def loop_gradients(mifo, folder, micro) -> dict:
    """{case: gradients of each optimizer step}, by the loop's own rl_step and sft_step."""
    found, caught, step = {}, [], mifo.optimizer_step

    def catch(run, which, clip, loss, suspects):
        caught.append({name: loop_full(p.grad) for name, p in run.policy.model.named_parameters()})
        with torch.no_grad():
            for p in run.policy.parameters():
                p.to_local().sub_(LOOP_SGD * p.grad.to_local())
        run.optimizers[which].zero_grad()

    mifo.optimizer_step = catch
    for name, flags in LOOP_RL.items():
        run = loop_run(
            mifo,
            folder / f"rl-{name}",
            ["--questions", 16, "--probe-bound", 1e9, *flags, "--micro-tokens", micro],
        )
        run.sampler = LoopSampler()
        if name == "sequence":
            run.tokenizer.pad_token = run.tokenizer.eos_token
        caught.clear()
        mifo.rl_step(run)
        found[f"rl-{name}"] = list(caught)
    for name, flags in LOOP_SFT.items():
        pear = ["--behavior-model", folder / "other"] if "--pear" in flags else []
        run = loop_run(
            mifo,
            folder / f"sft-{name}-{micro}",
            ["--sft-batch", 16, *flags, *pear, "--micro-tokens", micro],
        )
        run.sampler = LoopSampler()
        if name == "odd":
            run.tokenizer.pad_token = run.tokenizer.eos_token
        caught.clear()
        places = list(range(16))
        mifo.begin_sft_phase(run, places[: run.cfg.sft_batch])
        mifo.sft_step(run)
        found[f"sft-{name}"] = list(caught)
    mifo.optimizer_step = step
    return found


def loop_row(model, prompt, response, temperature=1.0):
    """Log-probabilities and entropies of one response, from transformers' full logits, without padding."""
    logits = (
        model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        / temperature
    )
    logp = torch.log(torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True))
    return logp[torch.arange(len(response)), response], -(logp.exp() * logp).sum(-1)


def loop_rl_oracle(folder, flags) -> list[dict]:
    option = dict(
        zip(
            *[
                iter(
                    [
                        f
                        for f in flags
                        if f not in ("--normalize-std", "--mask-truncated", "--gather-once")
                    ]
                )
            ]
            * 2
        )
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "embedded-base-0", dtype=torch.float64
    )
    initial = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "embedded-base-0", dtype=torch.float64
    )
    questions, tokenizer, temperature = (
        loop_questions(),
        data.embedded_tokenizer(),
        float(option.get("--temperature", 1)),
    )
    low, high, rows = (
        float(option.get("--clip-low", 0.2)),
        float(option.get("--clip-high", 0.2)),
        [],
    )
    for place in data.draw(16, int(option.get("--seed", 0)), 0, 16):
        q = questions[place]
        [group] = LoopSampler().sample([q.prompt], 4, [0], 60, 1.0)
        texts = [tokenizer.decode(s.tokens, skip_special_tokens=True) for s in group]
        rewards = [float(v == "correct") for v in LoopChecker().check(texts, [q.answer] * 4, None)]
        mean = sum(rewards) / 4
        std = (
            math.sqrt(sum((r - mean) ** 2 for r in rewards) / 3) + 1e-6
            if "--normalize-std" in flags
            else 1.0
        )
        rows += [(q.prompt, s, (r - mean) / std) for s, r in zip(group, rewards)]
    updates, gradients = int(option.get("--updates", 1)), []
    with torch.no_grad():
        old = [
            loop_row(model, prompt, s.tokens, temperature)[0] if advantage else None
            for prompt, s, advantage in rows
        ]
    for u in range(updates):
        part = [i for i in range(len(rows)) if i * updates // len(rows) == u]
        part = [i for i in part if not ("--mask-truncated" in flags and rows[i][1].truncated)]
        loss = 0.0
        for i in part:
            prompt, s, advantage = rows[i]
            if advantage == 0:
                continue  # a group without variance carries no gradient, and is counted
            logp, _ = loop_row(model, prompt, s.tokens, temperature)
            ratio = torch.exp(logp - old[i])
            gain = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
            if "--tis-cap" in option:
                gain = gain * torch.exp(
                    old[i] - torch.tensor(s.logprobs, dtype=torch.float64)
                ).clamp(max=float(option["--tis-cap"]))
            if "--kl-coef" in option:
                with torch.no_grad():
                    reference, _ = loop_row(initial, prompt, s.tokens, temperature)
                gain = gain - float(option["--kl-coef"]) * (
                    torch.exp(reference - logp) - (reference - logp) - 1
                )
            loss = (
                loss
                - {
                    "token": gain.sum() / sum(len(rows[j][1].tokens) for j in part),
                    "sequence": gain.mean() / len(part),
                    "constant": gain.sum() / (len(part) * 60),
                }[option.get("--aggregation", "token")]
            )
        model.zero_grad()
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(LOOP_SGD * p.grad)
    return gradients


def loop_sft_oracle(folder, flags) -> list[dict]:
    option = dict(zip(*[iter([f for f in flags if "=" not in f and f != "--gather-once"])] * 2))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "embedded-base-0", dtype=torch.float64
    )
    other = transformers.AutoModelForCausalLM.from_pretrained(folder / "other", dtype=torch.float64)
    size, rho, loss, count = int(option.get("--sft-batch", 16)), float(option["--rho"]), 0.0, 0
    places = torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist()
    for q in [loop_questions()[place] for place in places]:
        logp, entropy = loop_row(model, q.prompt, q.demonstration)
        n = len(q.demonstration)
        chosen = entropy.argsort(descending=True)[: math.ceil(rho * n - 1e-9)]
        weights = torch.ones(n, dtype=torch.float64)
        option |= dict(f.split("=") for f in flags if "=" in f)
        if "--pear" in option:
            d = (logp - loop_row(other, q.prompt, q.demonstration)[0]).tolist()
            if option.get("--pear-ratio-range") != "off":
                d = [min(max(x, -0.08), 0.3) for x in d]
            low, high = map(float, option.get("--pear-weight-range", "-10,5").split(","))
            gamma, block = (
                float(option.get("--pear-gamma", 0.999)),
                int(option.get("--pear-block", 4)),
            )
            for t in range(n):
                e = {"sequence": -1, "token": t, "block": min(t // block * block + block, n) - 1}[
                    option["--pear"]
                ]
                log_w = sum(d[e + 1 :]) + (
                    0.0 if option["--pear"] == "sequence" else (n - 1 - e) * math.log(gamma)
                )
                weights[t] = math.exp(min(max(log_w, low), high))
        loss = loss - (logp * weights)[chosen].sum()
        count += len(chosen)
    (loss / count).backward()
    return [{name: p.grad for name, p in model.named_parameters()}]


def loop_distance(a: dict, b: dict) -> float:
    """Largest difference of two sets of tensors, relative to the largest entry."""
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a) / max(
        t.abs().max().item() for t in b.values()
    )


# ---------------------------------------------------------------------------------------------------------------------
# The job: everything on the plain sampler, in one process on one rank and in two on two

LOOP_PRESETS = {
    "grpo": ["--schedule", "rl"],
    "sft": ["--schedule", "sft"],
    "sft-then-rl": ["--schedule", "sft-then-rl"],
    "without-freezing": ["--freeze", "off", "--buffer-size", "2"],
    "without-selection": ["--rho", "1", "--buffer-size", "2"],
    "without-both": ["--freeze", "off", "--rho", "1", "--buffer-size", "2"],
    "dagger": ["--alpha", "0", "--steps", "9", "--offload-importance"],
    "zero-grad-only": ["--freeze", "zero-grad-only", "--steps", "9"],
    "pear-sequence": ["--schedule", "sft-then-rl", "--pear", "sequence"],
    "pear-token": ["--schedule", "sft-then-rl", "--pear", "token"],
    "pear-block": ["--schedule", "sft-then-rl", "--pear", "block"],
    "pear-mifo": ["--pear", "token", "--buffer-size", "2"],
    "gather-once": [
        "--gather-once",
        "--micro-tokens",
        "60",
        "--updates",
        "2",
        "--kl-coef",
        "0.1",
        "--buffer-size",
        "2",
    ],
}
LOOP_PRESETS_2 = tuple(LOOP_PRESETS)
LOOP_SFT_SAME = [
    "--schedule",
    "sft",
    "--sft-epochs",
    2,
    "--sft-batch",
    6,
    "--sft-lr",
    3e-5,
    "--rho",
    1,
    "--save-every",
    100,
]


def loop_elsewhere(source: str, out: str) -> None:
    """Continues a run from its fifth checkpoint, in another folder and on as many ranks as there are here."""
    source, out = Path(source), Path(out)
    half = loop_checkpoints(source)[4]
    if os.environ["RANK"] == "0":
        shutil.copytree(half, out / "checkpoints" / half.name)
        for name in ("metrics.jsonl", "samples.jsonl"):
            shutil.copy(source / name, out / name)
    run = loop_run(loop_patch(), out, [])
    mifo.load_checkpoint(run, out / "checkpoints" / half.name)
    mifo.train(run)


def loop_job(folder: str) -> None:
    folder, mifo = Path(folder), loop_patch()
    import rollout

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found = {}
    for micro in (30, 130, 100_000):
        found[f"gradients-{micro}"] = loop_gradients(mifo, folder, micro)

    # the same weights, moved by the same noise: the same threshold on any number of ranks
    run = loop_run(mifo, folder / "threshold", ["--k", 0.3])
    with torch.no_grad():
        for i, p in enumerate(run.policy.parameters()):
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 1e-3
            noise[torch.rand(p.shape, generator=torch.Generator().manual_seed(100 + i)) < 0.5] = 0.0
            start, stop = mifo.row_range(p.shape[0], rank, world)
            p.to_local().add_(noise[start:stop])
    mifo.begin_sft_phase(run, [0])
    found["threshold"] = run.state.threshold, run.log["sft/frozen_share"]

    # a demonstration that proves too long is left out of its step
    for name, places in (("with", range(6)), ("without", (0, 1, 2, 4, 5))):
        run = loop_run(mifo, folder / f"long-{name}", ["--schedule", "sft", "--sft-batch", 6])
        run.questions[3] = dataclasses.replace(run.questions[3], demonstration=None)
        mifo.begin_sft_phase(run, [])
        run.state.sft_queue = [list(places)]
        mifo.sft_step(run)
        found[f"too long {name}"] = (
            [loop_full(p) for p in run.policy.parameters()],
            run.log["sft/too_long"],
        )

    mifo.train(loop_run(mifo, folder / "loop", []))  # MIFO itself
    for name in LOOP_PRESETS if world == 1 else LOOP_PRESETS_2:
        out = folder / f"preset-{name}"
        mifo.train(
            loop_run(
                mifo, out, ["--steps", 3, "--sft-batch", 8, "--sft-epochs", 1, *LOOP_PRESETS[name]]
            )
        )
    for micro in (40, 200, 100_000):
        mifo.train(
            loop_run(mifo, folder / f"sft-same-{micro}", [*LOOP_SFT_SAME, "--micro-tokens", micro])
        )
    mifo.train(
        loop_run(
            mifo, folder / "sft-same-once", [*LOOP_SFT_SAME, "--micro-tokens", 40, "--gather-once"]
        )
    )

    # a checkpoint of one rank, continued on two
    if world == 2:
        loop_elsewhere(folder.parent / "one" / "loop", folder / "grown")

    # behaviour log-probabilities: computed, cut off in the middle of a number, completed
    out = folder / "behavior"
    flags = [
        "--schedule",
        "sft",
        "--pear",
        "token",
        "--behavior-model",
        folder / "other",
        "--micro-tokens",
        100,
    ]
    loop_run(mifo, out, flags)
    dist.barrier()
    if rank == 0:
        shutil.copytree(out / "behavior", folder / "behavior-first")
        for path in (out / "behavior").glob("*.f32"):
            os.truncate(path, path.stat().st_size - 5 * 4 + 1)
    dist.barrier()
    asked, real = [], mifo.Policy.forward
    mifo.Policy.forward = lambda self, tokens, mask, temperature: (
        asked.append(mask.any(1).sum().item()) or real(self, tokens, mask, temperature)
    )
    run = loop_run(mifo, out, flags)
    mifo.Policy.forward = real
    found["behavior"] = {place: run.behavior.of(place, q) for place, q in enumerate(run.questions)}
    found["behavior again"] = sum(asked)

    if world == 1:  # weights that do not arrive
        push, rollout.TorchSampler.push = (
            rollout.TorchSampler.push,
            lambda self, weights: [None for _ in weights] and None,
        )
        with pytest.raises(mifo.Stopped) as error:
            mifo.train(
                loop_run(mifo, folder / "sabotaged", ["--rl-lr", 0.1, "--probe-bound", 0.05])
            )
        found["sabotaged"] = str(error.value)
        rollout.TorchSampler.push = push
    torch.save(found, folder / f"found-{rank}.pt")


@pytest.fixture(scope="session")
def loop_folder(tmp_path_factory):
    """The results of loop_job in one/ and two/."""
    folder = tmp_path_factory.mktemp("loop")
    for name, world in (("one", 1), ("two", 2)):
        (folder / name).mkdir()
        loop_model(folder / name / "embedded-base-0", 0)
        shutil.copytree(folder / name / "embedded-base-0", folder / name / "embedded-base-1")
        loop_model(folder / name / "other", 1)
        loop_wait(
            loop_start(folder / name, world, f"loop_job({str(folder / name)!r})"), folder / name
        )
    return folder


@pytest.fixture(scope="session")
def loop_found(loop_folder):
    return {
        world: [
            torch.load(loop_folder / name / f"found-{rank}.pt", weights_only=False)
            for rank in range(world)
        ]
        for name, world in (("one", 1), ("two", 2))
    }


def loop_checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))


def loop_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds, whole: its shards' rows on top of each other."""
    shards = [load_file(path) for path in sorted(checkpoint.glob("shard-*"))]
    return {
        key: torch.cat([s[key] for s in shards]) if shards[0][key].ndim else shards[0][key]
        for key in shards[0]
        if key != "rng"
    }


def loop_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "state.json").read_text())["state"]


def loop_metrics(run: Path) -> list[dict]:
    """metrics.jsonl without what only the clock decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            k: v
            for k, v in line.items()
            if "second" not in k and "per_s" not in k and "time" not in k
        }
        for line in lines
    ]


def loop_part(tensors: dict, kind: str) -> dict:
    return {key.removeprefix(kind): t for key, t in tensors.items() if key.startswith(kind)}


@pytest.mark.parametrize(
    "name", [f"rl-{name}" for name in LOOP_RL] + [f"sft-{name}" for name in LOOP_SFT]
)
def test_gradient_of_a_step(loop_folder, loop_found, name):
    """Any split, padding and order, one rank or two: the gradient of the explicit formula, row by row in float64."""
    flags = (LOOP_RL | LOOP_SFT)[name.partition("-")[2]]
    oracle = (loop_rl_oracle if name.startswith("rl") else loop_sft_oracle)(
        loop_folder / "one", flags
    )
    whole = loop_found[1][0]["gradients-100000"][name]  # in one micro-batch
    for world, ranks in loop_found.items():
        for rank in ranks:
            for micro in (30, 130, 100_000):
                gradients = rank[f"gradients-{micro}"][name]
                assert len(gradients) == len(oracle)
                for gradient, same, expected in zip(gradients, whole, oracle):
                    assert loop_distance(gradient, same) < 1e-6, (world, micro)
                    assert loop_distance(gradient, expected) < 2e-6, (
                        world,
                        micro,
                    )  # float32's own rounding
    if name in ("rl-updates", "rl-kl"):
        assert loop_distance(oracle[0], oracle[1]) > 0.1


def test_order_of_rows_does_not_matter(loop_found):
    for ranks in loop_found.values():
        assert (
            loop_distance(
                ranks[0]["gradients-130"]["rl-seed"][0], ranks[0]["gradients-30"]["rl-token"][0]
            )
            < 1e-6
        )


# ---------------------------------------------------------------------------------------------------------------------
# Freezing


def test_threshold_does_not_depend_on_ranks(loop_folder, loop_found):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        loop_folder / "one" / "embedded-base-0", dtype=torch.float32
    )
    moved = []
    for i, p in enumerate(model.parameters()):
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 1e-3
        noise[torch.rand(p.shape, generator=torch.Generator().manual_seed(100 + i)) < 0.5] = 0.0
        moved.append(((p.detach() + noise) - p.detach()).abs().flatten())
    moved = torch.cat(moved).sort(descending=True).values
    k = math.floor(0.3 * len(moved))
    for ranks in loop_found.values():
        for found in ranks:
            threshold, share = found["threshold"]
            assert threshold == moved[k].item()
            assert share == (moved > moved[k]).sum().item() / len(moved)


def loop_phases(run: Path) -> list[list[Path]]:
    """The checkpoints of each SFT phase, from the one at its start (the RL step that triggers it) to its last step's."""
    phases, folders = [], loop_checkpoints(run)
    for before, folder in zip(folders, folders[1:]):
        if loop_state(folder)["sft_steps"] > loop_state(before)["sft_steps"]:
            if loop_state(before)["sft_phases"] > len(phases):
                phases.append([before])
            phases[-1].append(folder)
    return [phase for phase in phases if not loop_state(phase[-1])["sft_queue"]]


@pytest.mark.parametrize(
    ("world", "name", "alpha"),
    [
        ("one", "loop", 0.9),
        ("two", "loop", 0.9),
        ("one", "preset-dagger", 0.0),
        ("two", "preset-dagger", 0.0),
    ],
)
def test_frozen_entries_stay_and_the_rest_moves(loop_folder, world, name, alpha):
    """The importance map follows the weights between checkpoints; what it freezes stays bit for bit, moments warm or cold."""
    run = loop_folder / world / name
    phases = loop_phases(run)
    assert len(phases) >= 2
    before = transformers.AutoModelForCausalLM.from_pretrained(
        loop_folder / world / "embedded-base-0", dtype=torch.float32
    )
    before, c, warm = {n: p.detach() for n, p in before.named_parameters()}, None, 0
    lines = {line["step"]: line for line in loop_metrics(run)}
    for phase in phases:
        assert (
            all(math.isfinite(loop_state(f)["threshold"]) for f in phase[:-1])
            and loop_state(phase[-1])["threshold"] == math.inf
        )
        first = loop_tensors(phase[0])
        start, importance = loop_part(first, "weight/"), loop_part(first, "importance/")
        c = {n: (alpha * c[n] if c else 0) + (start[n] - before[n]).abs() for n in start}
        for n in c:
            torch.testing.assert_close(importance[n], c[n], rtol=1e-5, atol=1e-12)
        values = torch.cat([t.flatten() for t in importance.values()]).sort(descending=True).values
        k, threshold = math.floor(0.5 * len(values)), loop_state(phase[0])["threshold"]
        assert threshold == values[k].item()
        frozen = {n: t > threshold for n, t in importance.items()}
        count = sum(f.sum().item() for f in frozen.values())
        assert k - (values == threshold).sum().item() < count <= k
        assert lines[loop_state(phase[0])["step"]]["sft/frozen_share"] == pytest.approx(
            count / len(values)
        )
        for folder in phase[1:]:
            now = loop_part(loop_tensors(folder), "weight/")
            for n in now:
                assert torch.equal(now[n][frozen[n]], start[n][frozen[n]]), (folder, n)
        free = torch.cat([(now[n] != start[n])[~frozen[n]] for n in now])
        assert free.float().mean() > 0.95
        moments = loop_part(first, "sft/exp_avg/")
        warm += any((moments[n][frozen[n]] != 0).any() for n in moments)
        before = now
    assert warm  # a later phase froze entries that the optimizer would have moved
    assert all(
        line["sft/frozen_movement"] > 0
        for line in lines.values()
        if line["phase"] == "sft" and line["sft_phases"] > 1
    )


def test_zero_gradients_alone_do_not_hold_a_parameter(loop_folder):
    run = loop_folder / "one" / "preset-zero-grad-only"
    phases = loop_phases(run)
    assert len(phases) >= 2
    lines = [
        line for line in loop_metrics(run) if line["phase"] == "sft" and line["sft_phases"] == 2
    ]
    start, end = loop_tensors(phases[1][0]), loop_tensors(phases[1][-1])
    threshold = loop_state(phases[1][0])["threshold"]
    moved = max(
        ((end["weight/" + n] - start["weight/" + n]).abs() * (c > threshold)).max().item()
        for n, c in loop_part(start, "importance/").items()
    )
    assert lines[-1]["sft/frozen_movement"] == pytest.approx(moved) and moved > 1e-5


def test_questions_and_buffer_do_not_depend_on_ranks(loop_folder):
    one, two = (loop_checkpoints(loop_folder / world / "loop") for world in ("one", "two"))
    assert [f.name for f in one] == [f.name for f in two]
    questions = loop_questions()
    for a, b in zip(map(loop_state, one), map(loop_state, two)):
        for key in (
            "step",
            "rl_steps",
            "sft_steps",
            "sft_phases",
            "drawn",
            "buffer",
            "sft_queue",
            "demonstrations",
            "sampled_tokens",
        ):
            assert a[key] == b[key], key
        assert len(a["buffer"]) == len(set(a["buffer"]))
        assert len(a["buffer"]) < 5
    ids = [
        [
            (r["step"], r["id"], r["response"])
            for r in map(json.loads, open(loop_folder / w / "loop" / "samples.jsonl"))
        ]
        for w in ("one", "two")
    ]
    assert ids[0] == ids[1]
    # every question that is never solved has been kept, in the order of the stream
    drawn = data.draw(16, 0, 0, 16)
    hard = [place for place in drawn if int(questions[place].answer) % 3 == 0]
    kept = loop_state(one[-1])["demonstrations"] + loop_state(one[-1])["buffer"]
    assert hard and [place for place in dict.fromkeys(kept) if place in hard] == hard


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def loop_main(kill_at: int, samplers: str = "") -> None:
    """mifo.py's main() by its own command line; dies by SIGKILL in the optimizer step of the kill_at-th step."""
    mifo = loop_patch()
    import rollout

    taken, step, make = [], mifo.optimizer_step, rollout.make_sampler

    def dying_step(run, which, *rest):
        if run.state.step + 1 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        step(run, which, *rest)

    def make_sampler(*args, **kwargs):
        taken.append(make(*args, **kwargs))
        return taken[0]

    mifo.optimizer_step, rollout.make_sampler = dying_step, make_sampler
    mifo.main()
    if samplers:
        loop_samplers(taken[0], Path(samplers))


def loop_resume(folder: Path, world: int, flags: list[str], samplers="") -> None:
    """An uninterrupted run and one that is killed twice, in an RL step and inside an SFT phase: the same to the last bit."""
    loop_model(folder / "embedded-base-0", 0)
    (folder / "empty.toml").write_text("")

    def launch(out, kill_at=-1, resume=False, samplers="", expected=(0,)):
        argv = [
            "mifo.py",
            "--recipe",
            str(folder / "empty.toml"),
            "--out",
            str(folder / out),
            *LOOP_FLAGS,
            "--save-every",
            "2",
            "--evaluate",
            "chain",
            "--eval-every",
            "2",
            "--eval-sft-phases",
            *flags,
            *["--resume"] * resume,
        ]
        call = f"sys.argv = {argv!r}; t.loop_main({kill_at}, {samplers!r})"
        loop_wait(loop_start(folder, world, f"sys.argv = {argv!r}; " + call), folder, expected)

    launch("straight", samplers=samplers)
    lines = [{}, *loop_metrics(folder / "straight")]  # lines[s]: of step s
    at = [line.get("phase") for line in lines]
    # the checkpoint before the killed step lies two steps back, in the same phase; if possible right after an evaluation
    in_rl = max(
        (s for s in range(4, len(at), 2) if at[s - 2 : s + 1] == ["rl"] * 3),
        key=lambda s: "evaluation" in lines[s - 2] and "evaluation" not in lines[s - 1],
    )
    in_sft = next(s for s in range(4, len(at), 2) if at[s - 2 : s + 1] == ["sft"] * 3)
    for i, s in enumerate(sorted((in_rl, in_sft))):
        launch(
            "killed",
            s,
            resume=i > 0,
            expected=(-signal.SIGKILL, 1) if world > 1 else (-signal.SIGKILL,),
        )
        assert loop_state(loop_checkpoints(folder / "killed")[-1])["step"] == s - 2
        assert len(loop_metrics(folder / "killed")) == s - 1
    launch("killed", resume=True)
    straight, killed = (loop_checkpoints(folder / out) for out in ("straight", "killed"))
    assert [f.name for f in straight] == [f.name for f in killed]
    for path in [*straight[-1].glob("shard-*"), straight[-1] / "model" / "model.safetensors"]:
        a, b = load_file(path), load_file(killed[-1] / path.relative_to(straight[-1]))
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), key
    assert any(key.startswith("rl/exp_avg/") for key in loop_tensors(straight[-1]))
    a, b = loop_state(straight[-1]), loop_state(killed[-1])
    assert {k: v for k, v in a.items() if k != "seconds"} == {
        k: v for k, v in b.items() if k != "seconds"
    }
    for name in ("samples.jsonl", "evaluations.jsonl"):
        assert (folder / "straight" / name).read_text() == (folder / "killed" / name).read_text()
    loop_check_evaluations(folder / "straight")
    metrics = [loop_metrics(folder / out) for out in ("straight", "killed")]
    assert [line["step"] for line in metrics[1]] == list(range(1, len(metrics[0]) + 1))
    for a, b in zip(*metrics):
        assert a == b


def loop_check_evaluations(out: Path) -> None:
    """evaluations.jsonl has one line before the first step, at every second RL step, around each SFT phase and at the end."""
    metrics, lines = (
        loop_metrics(out),
        [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()],
    )
    phases = [line["phase"] for line in metrics] + ["end"]
    edges = {
        i + 1
        for i, pair in enumerate(zip(phases, phases[1:]))
        if pair in (("rl", "sft"), ("sft", "rl"), ("sft", "end"))
    }
    even = {line["step"] for line in metrics if line["phase"] == "rl" and line["rl_steps"] % 2 == 0}
    assert [line["step"] for line in lines] == sorted({0, len(metrics)} | edges | even) and len(
        edges
    ) >= 2
    for line in lines:
        done = metrics[: line["step"]]
        assert line["rl_steps"] == sum(m["phase"] == "rl" for m in done)
        assert line["sft_steps"] == sum(m["phase"] == "sft" for m in done)
        chain = line["benches"]["chain"]
        assert chain["avg"] == pytest.approx(sum(chain["correct"]) / len(chain["correct"]))


@pytest.fixture(scope="session")
def loop_vllm_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("loop-vllm")


def loop_needs_vllm():
    import rollout

    if problem := rollout.vllm_problem():
        pytest.skip(problem)


def test_killed_and_resumed_through_vllm(loop_vllm_folder):
    loop_needs_vllm()
    loop_resume(
        loop_vllm_folder, 1, ["--sampler", "vllm"], samplers=str(loop_vllm_folder / "samplers")
    )


def test_killed_and_resumed_on_two_ranks(tmp_path):
    loop_resume(tmp_path, 2, [])


@pytest.mark.parametrize("world", [1, 2])
def test_demonstrations_that_prove_too_long_are_left_out(loop_found, world):
    for rank in loop_found[world]:
        (a, left_out), (b, none) = rank["too long with"], rank["too long without"]
        assert (left_out, none) == (1, 0)
        assert all(torch.allclose(x, y, rtol=0, atol=1e-7) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("before", "after", "out"), [(1, 2, "two/grown"), (2, 1, "one/shrunk")])
def test_resumed_on_another_number_of_ranks(loop_folder, before, after, out):
    """Not bit for bit (sums are rounded in another order), but the same course and nearly the same weights."""
    straight, out = loop_folder / ("one", "two")[before - 1] / "loop", loop_folder / out
    if not out.exists():
        loop_wait(
            loop_start(out.parent, after, f"loop_elsewhere({str(straight)!r}, {str(out)!r})"),
            out.parent,
        )
    whole, resumed = loop_checkpoints(straight)[-1], loop_checkpoints(out)[-1]
    assert whole.name == resumed.name
    assert (
        len(list(whole.glob("shard-*"))) == before and len(list(resumed.glob("shard-*"))) == after
    )
    a, b = loop_tensors(whole), loop_tensors(resumed)
    assert a.keys() == b.keys()
    moved = loop_distance(
        loop_part(a, "weight/"), loop_part(loop_tensors(loop_checkpoints(straight)[4]), "weight/")
    )
    assert loop_distance(loop_part(b, "weight/"), loop_part(a, "weight/")) < 0.02 * moved
    assert loop_distance(loop_part(b, "importance/"), loop_part(a, "importance/")) < 0.02
    assert all(a[key] == b[key] for key in a if "/step/" in key)
    lines = [loop_metrics(straight), loop_metrics(out)]
    assert [(x["step"], x["phase"], x["buffer"]) for x in lines[0]] == [
        (x["step"], x["phase"], x["buffer"]) for x in lines[1]
    ]
    assert lines[0][:5] == lines[1][:5]


# ---------------------------------------------------------------------------------------------------------------------
# Samplers

LOOP_PROMPTS = [
    random.Random(i).choices(range(2, 27), k=k) for i, k in enumerate((3, 9, 1, 9, 14, 5))
]
LOOP_SEEDS = [1000 * i for i in range(6)]


def loop_samplers(engine, out: Path) -> None:
    """Both samplers, with weights that were pushed, on the same prompts; results and weights go to `out`."""
    import rollout

    base = out.parent / "embedded-base-0"
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(out / "pushed")
    plain = rollout.make_sampler(
        "torch", str(base), max_len=84, dtype=torch.float32, eos_ids=LOOP_EOS, max_num_seqs=32
    )
    found = {}
    for name, sampler in (("vllm", engine), ("torch", plain)):
        sampler.sample(
            LOOP_PROMPTS, 1, LOOP_SEEDS, 4, 0.0
        )  # fills a prefix cache with the old weights' keys
        sampler.push((n, p.detach()) for n, p in model.named_parameters())
        state = torch.get_rng_state()
        found[name] = {
            "greedy": sampler.sample(LOOP_PROMPTS, 1, LOOP_SEEDS, 30, 0.0),
            "sampled": sampler.sample(LOOP_PROMPTS, 8, LOOP_SEEDS, 40, 0.7),
            "again": sampler.sample(LOOP_PROMPTS, 8, LOOP_SEEDS, 40, 0.7),
            "reversed": sampler.sample(LOOP_PROMPTS[::-1], 8, LOOP_SEEDS[::-1], 40, 0.7)[::-1],
            "alone": [
                sampler.sample([p], 8, [s], 40, 0.7)[0]
                for p, s in zip(LOOP_PROMPTS[:2], LOOP_SEEDS)
            ],
            "other seeds": sampler.sample(LOOP_PROMPTS, 8, [s + 100 for s in LOOP_SEEDS], 40, 0.7),
        }
        assert torch.equal(state, torch.get_rng_state())
    torch.save(found, out / "found.pt")


@pytest.fixture(scope="session")
def loop_sampled(loop_vllm_folder, request):
    if not (loop_vllm_folder / "samplers" / "found.pt").exists():
        pytest.skip("needs the run of test_killed_and_resumed_through_vllm")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        loop_vllm_folder / "samplers" / "pushed", dtype=torch.float32
    )
    return torch.load(loop_vllm_folder / "samplers" / "found.pt", weights_only=False), model


def loop_agrees(model, prompt, sample, temperature, limit) -> None:
    """A response against transformers' own forward pass, on this row alone, and against its limit and end-of-text."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + sample.tokens])).logits[
            0, len(prompt) - 1 : -1
        ]
    if temperature == 0:
        assert logits.argmax(-1).tolist() == sample.tokens
    logprobs = (logits / (temperature or 1)).log_softmax(-1)[
        torch.arange(len(sample.tokens)), sample.tokens
    ]
    assert (logprobs - torch.tensor(sample.logprobs)).abs().max() < 1e-4
    assert len(sample.tokens) == len(sample.logprobs) and not set(sample.tokens[:-1]) & set(
        LOOP_EOS
    )
    assert sample.truncated == (sample.tokens[-1] not in LOOP_EOS)
    assert len(sample.tokens) == limit if sample.truncated else len(sample.tokens) <= limit


@pytest.mark.parametrize("name", ["vllm", "torch"])
def test_sampler_computes_what_transformers_does(loop_sampled, name):
    found, model = loop_sampled
    for i, prompt in enumerate(LOOP_PROMPTS):
        loop_agrees(model, prompt, found[name]["greedy"][i][0], 0, 30)
        for sample in found[name]["sampled"][i]:
            loop_agrees(model, prompt, sample, 0.7, 40)
    samples = [s for group in found[name]["sampled"] for s in group]
    assert {s.tokens[-1] for s in samples} >= set(
        LOOP_EOS
    )  # each of the end-of-text tokens has ended a response


@pytest.mark.parametrize("name", ["vllm", "torch"])
def test_sampler_depends_on_the_seed_alone(loop_sampled, name):
    found = {
        key: [[s.tokens for s in group] for group in groups]
        for key, groups in loop_sampled[0][name].items()
    }
    assert found["sampled"] == found["again"] == found["reversed"]
    assert found["alone"] == found["sampled"][:2]
    assert found["sampled"] != found["other seeds"]
    assert all(len({tuple(t) for t in group}) > 1 for group in found["sampled"])


def test_samplers_agree(loop_sampled):
    for [a], [b] in zip(loop_sampled[0]["vllm"]["greedy"], loop_sampled[0]["torch"]["greedy"]):
        assert a.tokens == b.tokens and a.truncated == b.truncated
        assert max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs)) < 1e-4


def test_torch_sampler_drops_rows_without_changing_any(tmp_path):
    """Against a sampler that never ends a row, and a batch of one; end-of-text may be the id that pads on the left."""
    import rollout

    base = loop_model(tmp_path / "model", 3)
    make = lambda eos, **more: rollout.make_sampler(
        "torch", base, max_len=60, dtype=torch.float32, eos_ids=eos, **more
    )
    endless = make([99], max_num_seqs=512).sample(LOOP_PROMPTS, 8, LOOP_SEEDS, 40, 1.0)
    for eos in ([1, 9], [0], [4, 20, 26]):
        groups = make(eos, max_num_seqs=512).sample(LOOP_PROMPTS, 8, LOOP_SEEDS, 40, 1.0)
        narrow = make(eos, max_num_seqs=1).sample(LOOP_PROMPTS, 8, LOOP_SEEDS, 40, 1.0)
        lengths = set()
        for group, whole, small in zip(groups, endless, narrow):
            for s, w, t in zip(group, whole, small):
                stop = next((i + 1 for i, token in enumerate(w.tokens) if token in eos), 40)
                assert s.tokens == w.tokens[:stop] == t.tokens
                assert s.truncated == t.truncated == (w.tokens[stop - 1] not in eos)
                assert max(abs(a - b) for a, b in zip(s.logprobs, w.logprobs)) < 1e-5
                lengths.add(stop)
        assert len(lengths) > 5 and min(lengths) < 8


def test_probe_stops_a_run_whose_weights_do_not_arrive(loop_found):
    message = loop_found[1][0]["sabotaged"]
    assert (
        "--probe-bound" in message
        and "0.05" in message
        and "does not hold the trainer's weights" in message
        and "torch" in message
    )


# ---------------------------------------------------------------------------------------------------------------------
# Real questions


@pytest.fixture(scope="session")
def loop_gsm8k(tmp_path_factory):
    """48 real questions, those with the shortest solutions, and a random Qwen2 with a BPE tokenizer trained on them."""
    if not GSM8K.exists():
        pytest.skip(f"{GSM8K} is absent")
    import tokenizers

    folder = tmp_path_factory.mktemp("gsm8k")
    rows = sorted(
        map(json.loads, GSM8K.read_text().splitlines()),
        key=lambda r: len(r["question"] + r["answer"]),
    )[:48]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.train_from_iterator(
        [row["question"] + "\n" + row["answer"] for row in rows],
        tokenizers.trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<pad>", "<eos>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>"
    )
    loop_model(folder / "model", 7, tokenizer, initializer_range=0.02)
    return folder


@pytest.mark.parametrize("world", [1, 2])
def test_gsm8k_trains_through_vllm(loop_gsm8k, world):
    loop_needs_vllm()
    folder, out = loop_gsm8k, loop_gsm8k / f"run-{world}"
    process = loop_command(
        [
            "--model",
            folder / "model",
            "--data",
            folder / "questions.jsonl",
            "--out",
            out,
            "--sampler",
            "vllm",
            "--questions",
            4,
            "--samples",
            4,
            "--steps",
            2,
            "--buffer-size",
            4,
            "--sft-batch",
            2,
            "--p",
            0.125,
            "--max-prompt",
            120,
            "--max-response",
            100,
            "--kv-cache-gib",
            0.1,
            "--max-num-seqs",
            16,
            "--micro-tokens",
            600,
            "--rl-lr",
            1e-3,
            "--sft-lr",
            1e-3,
        ],
        folder,
        world,
    )
    stdout, stderr = process.communicate(timeout=170)
    assert process.returncode == 0, (stdout[-1500:], stderr[-1500:])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["rl", "sft", "sft", "rl", "sft", "sft"]
    assert all(
        math.isfinite(v) for line in lines for v in line.values() if isinstance(v, (int, float))
    )
    assert (
        0.49 < lines[0]["sft/frozen_share"] <= 0.5 or lines[0]["reward"] == 0
    )  # without a reward nothing has moved
    sft = [line for line in lines if line["phase"] == "sft"]
    assert all(line["sft/loss"] > 0 and line["sft/grad_norm"] > 0 for line in sft)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert samples and all({"prompt", "response", "reward", "answer"} <= s.keys() for s in samples)
    asked = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    for s in samples:
        row = asked[int(s["id"])]
        assert row["question"] in s["prompt"] and s["answer"] == row["answer"].rpartition("#### ")[
            2
        ].replace(",", "")
    assert (out / "plot.png").stat().st_size > 1000 and (out / "config.json").exists()
    last = loop_checkpoints(out)[-1]
    assert len(list(last.glob("shard-*"))) == world
    tokenizer = transformers.AutoTokenizer.from_pretrained(last / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(last / "model")
    moved = loop_part(loop_tensors(last), "weight/")
    for name, p in model.named_parameters():
        assert torch.equal(p, moved[name].to(p.dtype))
    prompt = tokenizer(samples[0]["prompt"], return_tensors="pt")
    assert (
        model.generate(**prompt, max_new_tokens=5, do_sample=False).shape[1]
        > prompt.input_ids.shape[1]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Faults

FAULT_CHECKPOINTS = ["--save-every", "1", "--keep", "1"]


def fault_weights(run) -> list[torch.Tensor]:
    return [s.clone() for s in run.shards]


def fault_run(mifo, found, name, run, poison, spoiled) -> None:
    """Trains a run whose Policy.forward is spoiled by `poison` where spoiled(phase, state); notes what became of it:
    by optimizer step (its number, phase, whether it was spoiled, whether weights moved, skips in a row)."""
    real, step, steps, now = mifo.Policy.forward, mifo.optimizer_step, [], {}

    def forward(self, tokens, mask, temperature):
        logprobs, entropy = real(self, tokens, mask, temperature)
        now["phase"] = "sft" if run.state.step in sft_steps else "rl"
        now["spoiled"] = spoiled(now["phase"], run.state)
        return (
            poison(tokens, logprobs, now["phase"])
            if now["spoiled"] and torch.is_grad_enabled()
            else logprobs
        ), entropy

    def noting(run, *rest):
        before = fault_weights(run)
        step(run, *rest)
        moved = any(not torch.equal(a, b) for a, b in zip(before, run.shards))
        steps.append(
            (run.state.step + 1, now["phase"], now["spoiled"], moved, run.state.skips_in_a_row)
        )

    sft_steps, real_sft_step = set(), mifo.sft_step
    mifo.sft_step = lambda run: sft_steps.add(run.state.step) or real_sft_step(run)
    mifo.Policy.forward, mifo.optimizer_step = forward, noting
    try:
        mifo.train(run)
        error = ""
    except mifo.Stopped as stopped:
        error = str(stopped)
    mifo.Policy.forward, mifo.optimizer_step, mifo.sft_step = real, step, real_sft_step
    found[name] = {"error": error, "steps": steps, "skipped": run.state.skipped}


def fault_job(folder: str) -> None:
    """Every fault that can be brought about inside a process; a rank notes in found-RANK.pt what it saw."""
    folder, mifo, found = Path(folder), loop_patch(), {}
    import resource
    import rollout

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def spoil_one(tokens, logprobs, phase):
        """The first question of the data has log-probabilities that are not numbers; in SFT the first of each batch."""
        rows = [
            row[: len(victim)].tolist() == victim or (phase == "sft" and i == 0)
            for i, row in enumerate(tokens)
        ]
        return torch.where(torch.tensor(rows)[:, None], logprobs * math.nan, logprobs)

    def spoil_gradient(tokens, logprobs, phase):  # finite forwards, not finite backwards
        return logprobs + (logprobs - logprobs.detach()) * torch.tensor(3e38) * 3e38

    flags = ["--questions", 16, "--steps", 6, "--probe-bound", 10]
    run = loop_run(mifo, folder / "skip", flags)
    victim = run.questions[0].prompt
    fault_run(
        mifo,
        found,
        "skip",
        run,
        spoil_one,
        lambda phase, state: state.rl_steps == 1 if phase == "rl" else state.sft_steps == 1,
    )
    for name, poison in (("stop", spoil_one), ("gradient", spoil_gradient)):
        fault_run(
            mifo,
            found,
            name,
            loop_run(mifo, folder / name, flags),
            poison,
            lambda phase, state: state.step > 0,
        )

    # an engine whose log-probabilities drift, which the probe of one response does not see
    run, sample = (
        loop_run(mifo, folder / "drift", ["--probe-bound", 0.01]),
        rollout.TorchSampler.sample,
    )

    def drifting(self, prompts, n, *rest, **more):
        groups = sample(self, prompts, n, *rest, **more)
        if n > 1 and run.state.step == 1:
            groups = [
                [dataclasses.replace(s, logprobs=[lp - 0.5 for lp in s.logprobs]) for s in group]
                for group in groups
            ]
        return groups

    rollout.TorchSampler.sample = drifting
    fault_run(mifo, found, "drift", run, None, lambda *_: False)
    rollout.TorchSampler.sample = sample

    # weights that stop arriving: noticed without any advantage, and before an evaluation
    push = rollout.TorchSampler.push
    for name, more in (("unrewarded", []), ("evaluated", ["--evaluate", "chain"])):
        run = loop_run(
            mifo,
            folder / name,
            ["--schedule", "rl", "--probe-bound", 0.01, "--rl-lr", 0.1, "--steps", 2, *more],
        )
        late = {"unrewarded": 1, "evaluated": 2}[name]

        def stale(self, weights):
            push(self, weights if run.state.step < late else [])
            return [None for _ in weights]

        if name == "unrewarded":
            check = run.checker.check
            run.checker.check = lambda texts, *rest: (
                check(texts, *rest) if run.state.step == 0 else ["wrong"] * len(texts)
            )
        rollout.TorchSampler.push = stale
        fault_run(mifo, found, name, run, None, lambda *_: False)
    rollout.TorchSampler.push = push

    # the best evaluation's checkpoint outlives the newest
    run = loop_run(
        mifo,
        folder / "best",
        ["--evaluate", "chain", "--steps", 4, "--eval-every", 1, *FAULT_CHECKPOINTS],
    )
    mifo.train(run)
    found["evals"] = [(e["step"], e["results"]["chain"]["avg"]) for e in run.state.evals]

    # a disk that is full, for one of the ranks
    saved = run.state.step
    run.state.step += 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == world - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    with pytest.raises(mifo.Stopped) as error:
        mifo.save_checkpoint(run)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    found["full"] = str(error.value), mifo.newest_whole(run).name, saved
    mifo.save_checkpoint(run)
    found["space again"] = mifo.newest_whole(run).name, saved + 1

    # checkpoints that are not as they were written
    good = folder / "best" / "checkpoints" / f"step-{run.state.step:06d}"
    found["damage"] = {}
    for name in sorted(str(path.relative_to(good)) for path in good.rglob("*") if path.is_file()):
        for damage in ("flipped", "cut", "gone"):
            copy = good.with_name(f"step-{run.state.step + 1:06d}")
            if rank == 0:
                shutil.copytree(good, copy)
                content = bytearray((copy / name).read_bytes())
                if damage == "flipped":
                    content[len(content) // 2] ^= 16
                (copy / name).write_bytes(
                    content[: len(content) // 2] if damage == "cut" else content
                )
                if damage == "gone":
                    (copy / name).unlink()
            mifo.barrier(run)
            whole = mifo.newest_whole(run)
            found["damage"][name, damage] = (
                whole.name,
                good.name,
                copy.with_suffix(".damaged").exists(),
            )
            mifo.barrier(run)
            if rank == 0:
                shutil.rmtree(copy.with_suffix(".damaged"), ignore_errors=True)
            mifo.barrier(run)
    torch.save(found, folder / f"found-{rank}.pt")


@pytest.fixture(scope="session", params=[1, 2], ids=["one", "two"])
def fault_found(request, tmp_path_factory):
    parent = tmp_path_factory.mktemp("faults")
    loop_model(parent / "job" / "embedded-base-0", 0)
    folder = parent / "job"
    loop_wait(loop_start(folder, request.param, f"fault_job({str(folder)!r})"), folder)
    found = [
        torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(request.param)
    ]
    return folder, found, (folder / "output-0.txt").read_text()


def test_a_step_with_numbers_that_are_not_finite_is_skipped_on_all_ranks(fault_found):
    folder, found, printed = fault_found
    for rank in found:
        assert rank["skip"]["error"] == "" and rank["skip"]["skipped"] == 2
        assert {phase for _, phase, spoiled, *_ in rank["skip"]["steps"] if spoiled} == {
            "rl",
            "sft",
        }
        for step, _, spoiled, moved, in_a_row in rank["skip"]["steps"]:
            assert moved != spoiled and (in_a_row > 0) == spoiled, step
    skipped = [step for step, _, spoiled, *_ in found[0]["skip"]["steps"] if spoiled]
    assert [line["step"] for line in loop_metrics(folder / "skip") if "skipped" in line] == skipped
    first = data.embedded_questions(data.embedded_tokenizer(), "train", data.TRAIN_TERMS, 16)[0].id
    assert "the loss is nan" in printed and f"the loss of questions {first}\n" in printed


def test_a_run_ends_after_a_few_skipped_steps_in_a_row(fault_found):
    _, found, _ = fault_found
    for rank in found:
        for name in ("stop", "gradient"):
            error = rank[name]["error"]
            assert (
                error.startswith("3 steps in a row were skipped; step 4: ")
                and "model.embed_tokens.weight" in error
            ), error
            assert [row[3:] for row in rank[name]["steps"]] == [
                (True, 0),
                (False, 1),
                (False, 2),
            ]  # the next raises
        assert (
            "loss is nan" in rank["stop"]["error"] and "(none alone)" in rank["gradient"]["error"]
        )


def test_an_engine_that_drifts_is_stopped_before_the_step(fault_found):
    _, found, _ = fault_found
    for rank in found:
        assert (
            "differ by 0.5 in a token's log-probability, on average over the sampled tokens"
            in rank["drift"]["error"]
        )
        assert [step for step, *_ in rank["drift"]["steps"]] == [1]


@pytest.mark.parametrize("name, steps", [("unrewarded", [1]), ("evaluated", [1, 2])])
def test_weights_that_do_not_arrive_are_noticed_where_no_update_would_see_it(
    fault_found, name, steps
):
    _, found, _ = fault_found
    for rank in found:
        assert "on average over a probe after the weights were pushed" in rank[name]["error"]
        assert [step for step, *_ in rank[name]["steps"]] == steps


def test_the_best_checkpoint_is_kept(fault_found):
    folder, found, _ = fault_found
    evals = found[0]["evals"][1:]
    best = max(evals, key=lambda e: e[1])[0]
    assert (folder / "best" / "checkpoints" / "best").resolve().name == f"step-{best:06d}"
    assert mifo.best_step(mifo.State()) == 0


def test_a_full_disk_leaves_the_last_checkpoint(fault_found):
    folder, found, _ = fault_found
    for rank in found:
        error, newest, saved = rank["full"]
        assert (
            newest == f"step-{saved:06d}"
            and f"the last is {folder / 'best' / 'checkpoints' / newest}" in error
        )
        assert (
            f"step {saved + 1}: the checkpoint could not be written" in error and "\n" not in error
        )
        newest, saved = rank["space again"]
        assert newest == f"step-{saved:06d}"


def test_damaged_checkpoints_are_recognised_and_named(fault_found):
    _, found, printed = fault_found
    for rank in found:
        assert {name for name, _ in rank["damage"]} >= {
            "state.json",
            "SHA256SUMS",
            "model/model.safetensors",
            "model/config.json",
            "shard-00000-of-0000%d.safetensors" % len(found),
        }
        for case, (whole, good, set_aside) in rank["damage"].items():
            assert whole == good and set_aside, case
    assert "is damaged (state.json is not as it was written): renamed to step-" in printed


@pytest.fixture(scope="module")
def fault_long(tmp_path_factory):
    """A folder with a base model, and the command of a run in it that never ends by itself."""
    folder = tmp_path_factory.mktemp("signals")
    loop_model(folder / "embedded-base-0", 0)
    (folder / "empty.toml").write_text("")
    return folder, lambda out, *more: [
        "--recipe",
        folder / "empty.toml",
        "--out",
        folder / out,
        *LOOP_FLAGS,
        "--steps",
        100_000,
        "--save-every",
        100_000,
        "--keep",
        2,
        *more,
    ]


def fault_started(process, out) -> list:
    """Waits for the run's first steps; the processes that it consists of."""
    import psutil

    end = time.monotonic() + 100
    while (
        not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < 3
    ):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1][-1500:]
        time.sleep(0.1)
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def fault_ends(process, family, seconds) -> tuple[str, str]:
    import psutil

    output = process.communicate(timeout=seconds)
    alive = psutil.wait_procs(family, timeout=seconds)[1]
    assert not alive, alive
    return output


@pytest.mark.parametrize(("number", "world"), [(signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_a_signal_ends_a_run_with_a_checkpoint(fault_long, number, world):
    folder, command = fault_long
    out = folder / f"signal-{world}"
    process = loop_command(command(out.name), folder, world)
    family = fault_started(process, out)
    process.send_signal(number)
    stdout, stderr = fault_ends(process, family, 60)
    assert process.returncode == (143 if world == 1 else 1), stderr[-1500:]
    steps = len(loop_metrics(out)) if world == 2 else loop_state(loop_checkpoints(out)[-1])["step"]
    assert (
        f"stopped by {signal.Signals(number).name} after step {steps}; --resume goes on from"
        in stdout
    )
    assert loop_checkpoints(out)[-1].name == f"step-{steps:06d}"
    if world == 1:
        assert "Traceback" not in stderr
        done = loop_command(command(out.name, "--resume", "--steps", 1), folder)
        stdout, stderr = done.communicate(timeout=60)
        assert done.returncode == 0 and "steps 100000 -> 1" in stdout, (
            stdout[-800:],
            stderr[-800:],
        )


@pytest.mark.parametrize(
    "how", ["interrupted twice", "torchrun killed", "a rank killed", "a rank stalled"]
)
def test_a_broken_run_ends_whole_and_soon(fault_long, how, monkeypatch):
    import psutil

    folder, command = fault_long
    out = folder / how.replace(" ", "-")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3")
    process = loop_command(command(out.name, "--step-limit", 0.1), folder, 2)
    family = fault_started(process, out)
    ranks = [p for p in family if "RANK" in p.environ() and "--worker" not in p.cmdline()]
    assert len(ranks) == 2
    if how == "interrupted twice":
        for p in ranks:  # so that neither ends by itself
            p.suspend()
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    elif how == "torchrun killed":
        process.kill()
    elif how == "a rank killed":
        ranks[1].kill()
    else:
        ranks[1].suspend()
        psutil.wait_procs(ranks[:1], timeout=20)
        ranks[1].resume()  # or torchrun waits for half a minute before it kills it
    _, stderr = fault_ends(process, family, 30)
    assert process.returncode != 0
    if how == "a rank stalled":
        assert "Timeout (0:00:06)!" in stderr and "mifo.py" in stderr and "Thread" in stderr, (
            stderr[-3000:]
        )
    if how == "a rank killed":
        assert "SIGKILL" in stderr or "-9" in stderr, stderr[-2000:]


def test_two_runs_do_not_write_to_one_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    cfg = mifo.Config(out=str(tmp_path / "run"))
    lock = mifo.lock_folder(cfg)
    with pytest.raises(ValueError, match="another run is at work there"):
        mifo.lock_folder(cfg)
    lock.close()
    mifo.lock_folder(cfg).close()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--out .*cannot be written to"):
        mifo.lock_folder(mifo.Config(out=str(tmp_path / "file" / "run")))


def test_resume_takes_harmless_settings_and_refuses_others_by_name(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    cfg = mifo.Config(out=str(tmp_path), resume=True)
    with pytest.raises(ValueError, match="--resume: there is no checkpoint"):
        mifo.open_folder(cfg)
    (tmp_path / "checkpoints" / "step-000007").mkdir(parents=True)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json"):
        mifo.open_folder(cfg)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(cfg)))
    assert mifo.open_folder(cfg)
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.name in ("out", "resume"):
            continue
        other = (
            (not value)
            if isinstance(value, bool)
            else value + "x"
            if isinstance(value, str)
            else value + 1
        )
        changed = dataclasses.replace(cfg, **{field.name: other})
        if field.name in mifo.MAY_CHANGE:
            assert mifo.open_folder(changed)
            assert f"{field.name} {value!r} -> {other!r}" in capsys.readouterr().out
        else:
            with pytest.raises(ValueError) as error:
                mifo.open_folder(changed)
            assert f"--{field.name.replace('_', '-')} was {value!r} and is {other!r}" in str(
                error.value
            )


def test_nothing_is_fetched_by_importing():
    code = (
        "import socket, sys\ndef refuse(*args): raise SystemExit(f'the network was asked for {args[1:]}')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\nimport mifo, eval, rollout, data"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-800:]


# ---------------------------------------------------------------------------------------------------------------------
# Settings

LOOP_WRONG = [
    ("--bogus 1", "--bogus"),
    ("--step 3", "--step"),
    ("--steps x", "--steps"),
    ("--steps -1", "--steps"),
    ("--steps 0", "--steps"),
    ("--questions 0", "--questions"),
    ("--questions -4", "--questions"),
    ("--questions 5", "--questions 5"),
    ("--samples 1", "--samples"),
    ("--samples 0", "--samples"),
    ("--updates 0", "--updates"),
    ("--updates 3", "--updates 3"),
    ("--sft-batch 0", "--sft-batch"),
    ("--sft-epochs 0", "--sft-epochs"),
    ("--buffer-size 0", "--buffer-size"),
    ("--max-prompt 0", "--max-prompt"),
    ("--max-response -1", "--max-response"),
    ("--micro-tokens 0", "--micro-tokens"),
    ("--max-num-seqs 0", "--max-num-seqs"),
    ("--save-every 0", "--save-every"),
    ("--keep 0", "--keep"),
    ("--eval-every -1", "--eval-every"),
    ("--eval-k 0", "--eval-k"),
    ("--rho 0", "--rho"),
    ("--rho 1.5", "--rho"),
    ("--rho nan", "--rho"),
    ("--k 0", "--k"),
    ("--k 1.01", "--k"),
    ("--k -0.5", "--k"),
    ("--alpha -0.1", "--alpha"),
    ("--alpha 1.1", "--alpha"),
    ("--p -1", "--p"),
    ("--p 2", "--p"),
    ("--temperature 0", "--temperature"),
    ("--temperature inf", "--temperature"),
    ("--rl-lr 0", "--rl-lr"),
    ("--sft-lr -1", "--sft-lr"),
    ("--rl-clip 0", "--rl-clip"),
    ("--sft-clip nan", "--sft-clip"),
    ("--clip-low 1", "--clip-low"),
    ("--clip-high -0.1", "--clip-high"),
    ("--beta1 1", "--beta1"),
    ("--beta2 1.5", "--beta2"),
    ("--weight-decay -1", "--weight-decay"),
    ("--kl-coef -1", "--kl-coef"),
    ("--tis-cap -1", "--tis-cap"),
    ("--schedule mifo", "--schedule"),
    ("--freeze maybe", "--freeze"),
    ("--aggregation mean", "--aggregation"),
    ("--sampler sglang", "--sampler"),
    ("--pear on", "--pear"),
    ("--dtype float16", "--dtype"),
    ("--replicas 3", "--replicas 3"),
    ("--replicas 0", "--replicas"),
    ("--pear-gamma 0", "--pear-gamma"),
    ("--pear-block 0", "--pear-block"),
    ("--pear-ratio-range 0.3,-0.08", "--pear-ratio-range"),
    ("--pear-weight-range 5", "--pear-weight-range"),
    ("--behavior-model x", "--behavior-model"),
    ("--model x", "--data"),
    ("--data x/y", "--model"),
    ("--split train", "--split"),
    ("--model x --data /no/such.jsonl", "/no/such.jsonl"),
    ("--evaluate /no/such.jsonl", "/no/such.jsonl"),
    ("--evaluate nonsense", "nonsense"),
    ("--recipe /no/such.toml", "/no/such.toml"),
    ("--seed -1", "--seed"),
    ("--gpu-memory-utilization 1.5", "--gpu-memory-utilization"),
    ("--kv-cache-gib 0", "--kv-cache-gib"),
    ("--probe-bound -1", "--probe-bound"),
    ("--check-limit 0", "--check-limit"),
    ("--dry-run -1", "--dry-run"),
    ("--samples-logged -1", "--samples-logged"),
    ("--step-limit -1", "--step-limit"),
    ("--step-limit nan", "--step-limit"),
    ("--rope-theta -1", "--rope-theta"),
    ("--eval-temperature -0.5", "--eval-temperature"),
    ("--max-position-embeddings -1", "--max-position-embeddings"),
    ("--data-config x", "--data-config"),
    ("--revision x", "--revision"),
    ("--question-field x", "--question-field"),
    ("--answer-field x", "--answer-field"),
    ("--solution-field x", "--solution-field"),
    ("--template chat", "--template"),
    ("--template jinja", "--template"),
    ("--system none", "--system"),
    ("--generation-prefix x", "--generation-prefix"),
    ("--extract last", "--extract"),
    ("--out /dev/null", "--out"),
    ("--sft-schedule cosine", "--sft-schedule"),
    ("--schedule rl --sft-schedule cosine", "--sft-schedule"),
    ("--sft-schedule linear", "--sft-schedule"),
    ("--schedule rl --pear token", "--pear"),
    ("--eval-every 5 --evaluate=", "--eval-every"),
    ("--eval-sft-phases --eval-every 0 --evaluate=", "--eval-sft-phases"),
    *(
        (f"--{name}=1", f"--{name}")
        for name in (
            "resume",
            "normalize-std",
            "mask-truncated",
            "require-think",
            "activation-checkpointing",
            "gather-once",
            "offload-importance",
            "trust-remote-code",
        )
    ),
]


def test_every_flag_has_a_wrong_value():
    named = " ".join(flags for flags, _ in LOOP_WRONG)
    assert [
        f.name
        for f in dataclasses.fields(mifo.Config)
        if f"--{f.name.replace('_', '-')}" not in named
    ] == []


@pytest.mark.parametrize(("flags", "named"), LOOP_WRONG, ids=[flags for flags, _ in LOOP_WRONG])
def test_wrong_settings_are_refused_by_name(flags, named, monkeypatch):
    import mifo

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError) as error:
        mifo.parse_config(flags.split())
    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("bogus = 1", "bogus"),
        ("steps = 'many'", "steps"),
        ("steps = 1.5", "steps"),
        ("freeze = 'maybe'", "freeze"),
        ("steps =", "TOML"),
        ("rho = 2", "rho"),
        ("resume = 1", "resume"),
        ("recipe = 'x.toml'", "recipe"),
    ],
)
def test_wrong_recipes_are_refused_by_name(text, named, tmp_path, monkeypatch):
    import mifo

    monkeypatch.setenv("WORLD_SIZE", "1")
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(ValueError, match=named):
        mifo.parse_config(["--recipe", str(tmp_path / "r.toml")])


@pytest.mark.parametrize("name", ["pear_ratio_range", "pear_weight_range"])
def test_ranges_may_begin_with_a_minus(name, monkeypatch):
    import mifo

    monkeypatch.setenv("WORLD_SIZE", "1")
    flag = f"--{name.replace('_', '-')}"
    assert getattr(mifo.parse_config([flag, "-0.08,0.3", "--steps", "3"]), name) == "-0.08,0.3"
    assert getattr(mifo.parse_config([f"{flag}=-5,-1.5"]), name) == "-5,-1.5"


def test_defaults_then_recipe_then_flags(tmp_path, monkeypatch):
    import mifo

    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "r.toml").write_text("steps = 7\nrl_lr = 1\nfreeze = 'off'\n")
    cfg = mifo.parse_config(["--recipe", str(tmp_path / "r.toml"), "--steps", "9"])
    assert (cfg.steps, cfg.rl_lr, cfg.freeze, cfg.samples) == (9, 1.0, "off", 8)
    assert isinstance(cfg.rl_lr, float)
    shown = mifo.describe(cfg)
    assert (
        "*steps = 9" in shown
        and "*freeze = 'off'" in shown
        and " samples = 8" in shown
        and "*samples" not in shown
    )
    cfg = mifo.parse_config([])
    assert cfg.recipe.endswith("embedded.toml") and cfg.evaluate == "chain"
    paper = mifo.Config()  # the paper's values, where it states them
    assert (paper.samples, paper.p, paper.rho, paper.k) == (8, 1 / 8, 0.2, 0.5)
    assert (
        paper.pear_gamma,
        paper.pear_block,
        paper.pear_ratio_range,
        paper.pear_weight_range,
    ) == (0.999, 4, "-0.08,0.3", "-10,5")


def test_wrong_input_exits_with_2_and_one_line(tmp_path):
    """The real command: each error is one line on stderr that names what is wrong."""
    model = loop_model(tmp_path / "model", 0)
    other = loop_model(
        tmp_path / "other",
        0,
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=data.embedded_tokenizer().backend_tokenizer,
            pad_token="<pad>",
            eos_token="<eos>",
            additional_special_tokens=["<x>"],
        ),
    )
    (tmp_path / "good.jsonl").write_text(
        '{"question": "1", "answer": "2", "solution": "\\\\boxed{2}"}\n' * 3
    )
    (tmp_path / "bare.jsonl").write_text('{"question": "1", "answer": "2"}\n' * 3)
    (tmp_path / "bad.jsonl").write_text(
        '{"question": "1", "answer": "2"}\n\n{"question": "1", "answer": 2\n'
    )
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").write_text("")
    common = [
        "--model",
        model,
        "--sampler",
        "torch",
        "--max-prompt",
        30,
        "--max-response",
        20,
        "--questions",
        1,
        "--steps",
        1,
        "--template",
        "plain",
        "--buffer-size",
        1,
    ]
    cases = [
        (["--bogus", 1], "--bogus"),
        ([*common, "--data", tmp_path / "bad.jsonl"], "line 3"),
        ([*common, "--data", tmp_path / "good.jsonl", "--max-response", 300], "--max-response 300"),
        (
            [
                *common,
                "--data",
                tmp_path / "good.jsonl",
                "--schedule",
                "sft",
                "--pear",
                "token",
                "--out",
                tmp_path / "wrong",
                "--behavior-model",
                other,
            ],
            "--behavior-model",
        ),
        ([*common, "--data", tmp_path / "good.jsonl", "--out", tmp_path / "old"], "--resume"),
        ([*common, "--data", tmp_path / "bare.jsonl", "--schedule", "sft"], "--schedule sft"),
    ]
    for i in range(0, len(cases), 3):
        started = [
            loop_command(
                [*case[0], *["--out", tmp_path / str(i + j)] * ("--out" not in case[0])], tmp_path
            )
            for j, case in enumerate(cases[i : i + 3])
        ]
        for process, (arguments, named) in zip(started, cases[i : i + 3]):
            _, stderr = process.communicate(timeout=120)
            lines = [line for line in stderr.splitlines() if "error" in line.lower()]
            assert process.returncode == 2, (arguments, stderr[-800:])
            assert len(lines) == 1 and named in lines[0] and "Traceback" not in stderr, (
                arguments,
                stderr[-800:],
            )


# ---------------------------------------------------------------------------------------------------------------------
# Schedules and presets


@pytest.mark.parametrize(
    ("world", "name"), [("one", n) for n in LOOP_PRESETS] + [("two", n) for n in LOOP_PRESETS_2]
)
def test_preset(loop_folder, world, name):
    run = loop_folder / world / f"preset-{name}"
    lines, flags = loop_metrics(run), LOOP_PRESETS[name]
    phases = [line["phase"] for line in lines]
    schedule = dict(zip(flags, flags[1:])).get("--schedule", "interleave")
    steps = 9 if "--steps" in flags else 3
    assert phases.count("rl") == (0 if schedule == "sft" else steps)
    assert all(
        math.isfinite(v) for line in lines for v in line.values() if isinstance(v, (int, float))
    )
    assert all(
        ("rl/loss" in line) == (line["phase"] == "rl")
        for line in lines
        if "rl/grad_norm" in line or line["phase"] == "sft"
    )
    assert all(
        math.isfinite(line["sft/loss"]) and line["sft/grad_norm"] > 0
        for line in lines
        if line["phase"] == "sft"
    )
    last = loop_checkpoints(run)[-1]
    state, tensors = loop_state(last), loop_tensors(last)
    assert state["step"] == len(lines) and not state["sft_queue"]
    if schedule == "interleave":
        assert "sft" in phases[phases.index("rl") :] and phases[0] == "rl"
        assert ("sft/frozen_movement" in lines[phases.index("sft")]) == ("off" not in flags)
        assert math.isfinite(loop_state(loop_phases(run)[0][0])["threshold"]) == (
            "off" not in flags
        )
    else:
        assert phases == ["sft"] * (schedule != "rl") * 2 + ["rl"] * (schedule != "sft") * steps
        assert state["buffer"] == [] and all(
            not c.any() for c in loop_part(tensors, "importance/").values()
        )
        assert not any("frozen" in key for line in lines for key in line)
    if schedule == "rl":
        assert not any(key.startswith("sft/") for key in tensors) and state["demonstrations"] == []
    if schedule.startswith("sft"):
        assert sorted(state["demonstrations"]) == list(range(16))
    if schedule == "sft-then-rl":  # nothing but the weights is handed over
        handed = loop_checkpoints(run)[1]
        assert not any(key.startswith("rl/") for key in loop_tensors(handed))
        moments = [k for k in tensors if k.startswith("sft/exp_avg")]
        assert all(torch.equal(tensors[k], loop_tensors(handed)[k]) for k in moments)
        assert {t.item() for t in loop_part(tensors, "rl/step/").values()} == {3.0}
    assert ("sft/pear_weight" in lines[phases.index("sft")] if "sft" in phases else True) == (
        "--pear" in flags or "sft" not in phases
    )


def test_sft_gives_the_same_weights_however_it_is_split(loop_folder):
    runs = [
        loop_folder / world / f"sft-same-{micro}"
        for world in ("one", "two")
        for micro in (40, 200, 100_000, "once")
    ]
    weights = [loop_part(loop_tensors(loop_checkpoints(run)[-1]), "weight/") for run in runs]
    base = transformers.AutoModelForCausalLM.from_pretrained(
        loop_folder / "one" / "embedded-base-0", dtype=torch.float32
    )
    moved = max((weights[0][n] - p.detach()).abs().max().item() for n, p in base.named_parameters())
    assert moved > 1e-4
    for other in weights[1:]:
        for name in other:
            torch.testing.assert_close(other[name], weights[0][name], rtol=0, atol=1e-6)


def test_behavior_logprobs_are_the_behavior_models(loop_folder, loop_found):
    """Computed once, and after an interruption only what is missing; both ranks read the same."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        loop_folder / "one" / "other", dtype=torch.float64
    )
    expected = [loop_row(model, q.prompt, q.demonstration)[0].detach() for q in loop_questions()]
    for world, ranks in loop_found.items():
        for found in ranks:
            assert len(found["behavior"]) == 16
            for place, values in found["behavior"].items():
                assert (
                    torch.tensor(values, dtype=torch.float64).sub(expected[place]).abs().max()
                    < 1e-5
                )
        assert (
            sum(found["behavior again"] for found in ranks) == world
        )  # the last row of each file had been cut
