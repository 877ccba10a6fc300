"""Every test. `pytest` runs them all; real GSM8K and MATH-500 are looked for in ../shared/data, and skipped where absent."""

import argparse
import contextlib
import dataclasses
import fnmatch
import functools
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import traceback
import typing
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402  before transformers: it hides packages that break its import
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from torch.distributed.tensor import DTensor, distribute_tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402
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

# ---------------------------------------------------------------------------------------------------------------------
# The equations, against plain loops, full softmax and values worked out by hand


def pure_rand(*shape, seed=0, dtype=torch.float64, scale=1.0):
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        .mul(scale)
        .to(dtype)
    )


def pure_head(n=13, d=5, v=17, dtype=torch.float64, scale=1.0):
    targets = torch.randint(v, (n,), generator=torch.Generator().manual_seed(3))
    return (
        pure_rand(n, d, seed=1, dtype=dtype, scale=scale),
        pure_rand(v, d, seed=2, dtype=dtype),
        targets,
    )


def pure_full_softmax(hidden, head_weight, targets, temperature):
    """Log-probabilities and entropies from all the logits at once."""
    logs = torch.log_softmax(hidden @ head_weight.T / temperature, -1)
    return logs[torch.arange(len(targets)), targets], -(logs.exp() * logs).sum(-1)


@pytest.mark.parametrize(
    "chunk", [1, 4, 5, 17, 1024]
)  # 17 entries: one a tile, tiles that do not divide them, all in one, and a larger tile
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_token_logprobs_equal_the_full_softmax(chunk, temperature, dtype, tolerance):
    hidden, weight, targets = (
        t.requires_grad_() if t.is_floating_point() else t for t in pure_head(dtype=dtype)
    )
    upstream = pure_rand(13, seed=4, dtype=dtype)
    expected, expected_entropy = pure_full_softmax(hidden, weight, targets, temperature)
    gradients = torch.autograd.grad(expected, (hidden, weight), upstream)
    logprobs, entropy = losses.token_logprobs(hidden, weight, targets, temperature, chunk)
    assert logprobs.shape == entropy.shape == (13,) and logprobs.dtype == entropy.dtype == dtype
    assert logprobs.requires_grad and not entropy.requires_grad
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=tolerance)
    for mine, right in zip(torch.autograd.grad(logprobs, (hidden, weight), upstream), gradients):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, right, rtol=0, atol=10 * tolerance)


def test_token_logprobs_by_hand():
    # logits (0, ln 3): probabilities 1/4 and 3/4; at temperature 1/2 logits (0, ln 9): 1/10 and 9/10
    hidden, weight = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [math.log(3)]])
    logprobs, entropy = losses.token_logprobs(hidden, weight, torch.tensor([0, 1]))
    assert logprobs.tolist() == pytest.approx([math.log(0.25), math.log(0.75)], abs=1e-6)
    assert entropy.tolist() == pytest.approx(
        [-0.25 * math.log(0.25) - 0.75 * math.log(0.75)] * 2, abs=1e-6
    )
    logprobs, entropy = losses.token_logprobs(hidden, weight, torch.tensor([0, 1]), 0.5)
    assert logprobs.tolist() == pytest.approx([math.log(0.1), math.log(0.9)], abs=1e-6)
    assert entropy.tolist() == pytest.approx(
        [-0.1 * math.log(0.1) - 0.9 * math.log(0.9)] * 2, abs=1e-6
    )


@pytest.mark.parametrize("temperature, chunk", [(1.0, 3), (0.7, 4), (1.3, 100)])
def test_token_logprobs_gradient_by_finite_differences(temperature, chunk):
    hidden, weight, targets = pure_head(n=7, d=3, v=6)
    assert torch.autograd.gradcheck(
        lambda h, w: losses.token_logprobs(h, w, targets, temperature, chunk)[0],
        (hidden.requires_grad_(), weight.requires_grad_()),
    )


def test_token_logprobs_entropy_carries_no_gradient_and_steals_none():
    hidden, weight, targets = pure_head()
    hidden.requires_grad_()
    logprobs, entropy = losses.token_logprobs(hidden, weight, targets, chunk=4)
    expected = torch.autograd.grad(
        pure_full_softmax(hidden, weight, targets, 1.0)[0].sum(), hidden
    )[0]
    with pytest.raises(RuntimeError, match="does not require grad"):
        entropy.sum().backward()
    (logprobs.sum() + 100 * entropy.sum()).backward()
    torch.testing.assert_close(hidden.grad, expected)


def test_token_logprobs_of_no_token():
    hidden, weight = torch.zeros(0, 5, requires_grad=True), torch.ones(7, 5, requires_grad=True)
    logprobs, entropy = losses.token_logprobs(hidden, weight, torch.zeros(0, dtype=torch.int64))
    logprobs.sum().backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert (
        hidden.grad.shape == (0, 5) and weight.grad.eq(0).all()
    )  # a rank without work still takes part in the backward


def test_token_logprobs_with_a_tied_head():
    weight = pure_rand(11, 4, seed=5).requires_grad_()  # embedding and head in one
    tokens, targets = torch.tensor([3, 0, 3, 10, 7]), torch.tensor([0, 3, 10, 7, 2])
    expected = torch.autograd.grad(
        pure_full_softmax(weight[tokens].tanh(), weight, targets, 0.8)[0].sum(), weight
    )[0]
    losses.token_logprobs(weight[tokens].tanh(), weight, targets, 0.8, 2)[0].sum().backward()
    torch.testing.assert_close(weight.grad, expected)


def test_token_logprobs_in_bfloat16_stays_close_to_float32():
    hidden, weight, targets = pure_head(n=600, d=64, v=50, scale=0.3)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()  # the same rounded numbers for both
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        h, w = (t.to(dtype).requires_grad_() for t in (hidden, weight))
        logprobs, entropy = losses.token_logprobs(h, w, targets, 1.0, 8)
        assert logprobs.dtype == entropy.dtype == torch.float32
        gradients.append(torch.autograd.grad(logprobs.sum(), (h, w)))
    for right, mine in zip(*gradients):
        assert (mine.float() - right).norm() / right.norm() < 0.006


def test_token_logprobs_holds_two_tiles_of_logits_and_saves_none():
    n, d, v, chunk = 512, 4, 300, 16
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest[0] = max(largest[0], out.numel())
            return out

    hidden, weight, targets = pure_head(n, d, v)
    saved = []
    with (
        Watch(),
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t.numel()) or t, lambda t: t
        ),
    ):
        losses.token_logprobs(
            hidden.requires_grad_(), weight.requires_grad_(), targets, 1.0, chunk
        )[0].sum().backward()
    assert largest[0] == 2 * n * chunk  # of n * v, 9 times as many
    assert sum(saved) <= n * d + v * d + 2 * n


def test_group_advantages_by_hand():
    """verl's compute_grpo_outcome_advantage on groups (1, 0) and (1, 1)."""
    rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert losses.group_advantages(rewards, False).flatten().tolist() == [0.5, -0.5, 0.0, 0.0]
    expected = 0.5 / (
        math.sqrt(0.5) + 1e-6
    )  # the unbiased standard deviation of (1, 0) is sqrt(1/2)
    assert expected == pytest.approx(0.7071, abs=1e-4)
    assert losses.group_advantages(rewards.double(), True).flatten().tolist() == pytest.approx(
        [expected, -expected, 0, 0], abs=1e-12
    )


@pytest.mark.parametrize("normalize_std", [False, True])
def test_group_advantages_against_a_loop(normalize_std):
    rewards = torch.rand(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards[1] = (rewards[1] > 0.5).double()
    rewards[2] = (
        rewards[2] * 1e-6
    )  # a spread of the size of the 1e-6 that is added to the standard deviation
    for got, group in zip(
        losses.group_advantages(rewards, normalize_std).tolist(), rewards.tolist()
    ):
        divisor = statistics.stdev(group) + 1e-6 if normalize_std else 1.0
        assert got == pytest.approx(
            [(r - statistics.fmean(group)) / divisor for r in group], rel=1e-9, abs=1e-15
        )


@pytest.mark.parametrize("normalize_std", [False, True])
def test_group_advantages_of_equal_rewards_are_exactly_zero(normalize_std):
    values = [0.1, 0.7, 1.0, 0.0, -3.3, 1e-8, 1e8, 1 / 3]
    for size in (2, 3, 5, 8, 11):
        rewards = torch.tensor(values)[:, None].repeat(1, size)
        advantages = losses.group_advantages(rewards, normalize_std)
        assert advantages.shape == rewards.shape and advantages.eq(0).all(), size


def pure_grpo(
    logprobs,
    old,
    advantages,
    mask,
    low=0.2,
    high=0.2,
    per_sequence=False,
    ref=None,
    kl_coef=0.0,
    engine=None,
    cap=0.0,
):
    """GRPO's loss token by token, and its counts; lists of lists of floats."""
    loss, counts = 0.0, {"clipped_low": 0, "clipped_high": 0, "kl": 0.0}
    for b, row in enumerate(mask):
        for t, counted in enumerate(row):
            if not counted:
                continue
            ratio, a = math.exp(logprobs[b][t] - old[b][t]), advantages[b]
            if a >= 0:  # only a rise of a good token and a fall of a bad one are cut off
                gain = a * min(ratio, 1 + high)
                counts["clipped_high"] += a > 0 and ratio > 1 + high
            else:
                gain = a * max(ratio, 1 - low)
                counts["clipped_low"] += ratio < 1 - low
            if cap:
                gain *= min(math.exp(old[b][t] - engine[b][t]), cap)
            if ref is not None:
                q = math.exp(ref[b][t] - logprobs[b][t])
                counts["kl"] += q - math.log(q) - 1
                gain -= kl_coef * (q - math.log(q) - 1)
            loss -= gain / (sum(row) if per_sequence else 1)
    return loss, counts


def pure_rollouts(dtype=torch.float64):
    """Both signs of advantage; log-ratios well beyond both clips; row 2 is empty, and row 5 has one token."""
    mask = torch.rand(6, 9, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[2], mask[5] = False, torch.arange(9) == 3
    old = pure_rand(6, 9, seed=2, scale=0.5) - 2
    tensors = (
        old + pure_rand(6, 9, seed=3, scale=0.7),
        old,
        torch.tensor([1.3, -0.8, 0.5, -1.7, 0.0, 0.6], dtype=torch.float64),
        old + pure_rand(6, 9, seed=4, scale=0.5),
        old + pure_rand(6, 9, seed=5, scale=0.7),
    )
    logprobs, old, advantages, ref, engine = (t.to(dtype) for t in tensors)
    return logprobs, old, advantages, mask, ref, engine


PURE_GRPO = [
    dict(low=low, high=high, per_sequence=per_sequence, kl_coef=kl, cap=cap)
    for (low, high), per_sequence, (kl, cap) in itertools.product(
        [(0.2, 0.2), (0.1, 0.4)], [False, True], [(0.0, 0.0), (0.3, 0.0), (0.0, 1.4), (0.3, 1.4)]
    )
]


def pure_grpo_loss(logprobs, old, advantages, mask, ref, engine, s):
    return losses.grpo_loss(
        logprobs,
        old,
        advantages,
        mask,
        s["low"],
        s["high"],
        s["per_sequence"],
        ref if s["kl_coef"] else None,
        s["kl_coef"],
        engine if s["cap"] else None,
        s["cap"],
    )


@pytest.mark.parametrize("s", PURE_GRPO, ids=lambda s: "-".join(map(str, s.values())))
def test_grpo_loss_and_gradient_against_a_loop(s):
    logprobs, old, advantages, mask, ref, engine = pure_rollouts()

    def right(logprobs):
        return pure_grpo(
            logprobs,
            old.tolist(),
            advantages.tolist(),
            mask.tolist(),
            ref=ref.tolist() if s["kl_coef"] else None,
            engine=engine.tolist(),
            **s,
        )

    expected, counts = right(logprobs.tolist())
    logprobs.requires_grad_()
    loss, metrics = pure_grpo_loss(logprobs, old, advantages, mask, ref, engine, s)
    assert loss.shape == () and loss.item() == pytest.approx(expected, abs=1e-6)
    assert counts["clipped_low"] >= 2 and counts["clipped_high"] >= 2  # both clips are at work
    for key, value in metrics.items():
        assert value.item() == pytest.approx(counts[key], abs=1e-9), key
    assert ("kl" in metrics) == (s["kl_coef"] > 0) and not any(
        value.requires_grad for value in metrics.values()
    )
    loss.backward()
    values = logprobs.tolist()
    for b, t in itertools.product(range(6), range(9)):  # central differences of the loop
        sides = []
        for step in (1e-6, -1e-6):
            values[b][t] += step
            sides.append(right(values)[0])
            values[b][t] -= step
        assert logprobs.grad[b, t].item() == pytest.approx(
            (sides[0] - sides[1]) / 2e-6, abs=1e-6
        ), (b, t)


def test_grpo_loss_by_hand():
    # one token a row, ratio 1.5 or 0.5 and advantage 1 or -1
    ratio = torch.tensor([[1.5], [1.5], [0.5], [0.5]], dtype=torch.float64)
    advantages, mask = (
        torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64),
        torch.ones(4, 1, dtype=torch.bool),
    )
    for row, gain in enumerate(
        [1.28, -1.5, 0.5, -0.8]
    ):  # min(1.5, 1.28); min(-1.5, -1.28); min(.5, .8); min(-.5, -.8)
        part = slice(row, row + 1)
        loss, metrics = losses.grpo_loss(
            ratio[part].log(), torch.zeros(1, 1), advantages[part], mask[part], 0.2, 0.28
        )
        assert loss.item() == pytest.approx(-gain, abs=1e-12)
        assert (metrics["clipped_high"].item(), metrics["clipped_low"].item()) == (
            int(row == 0),
            int(row == 3),
        )
    # k3 at pi_ref / pi = 2: 2 - ln 2 - 1; the ratio stands at 1
    loss, metrics = losses.grpo_loss(
        torch.zeros(1, 1),
        torch.zeros(1, 1),
        torch.ones(1),
        mask[:1],
        ref_logprobs=torch.tensor([[math.log(2)]]),
        kl_coef=0.1,
    )
    assert metrics["kl"].item() == pytest.approx(1 - math.log(2), abs=1e-6)
    assert loss.item() == pytest.approx(-1 + 0.1 * (1 - math.log(2)), abs=1e-6)
    # pi_old / pi_engine = 3, capped at 2; and 0.5, which is not raised; and no weight at all with cap 0
    for quotient, cap, weight in ((3.0, 2.0, 2.0), (0.5, 2.0, 0.5), (3.0, 0.0, 1.0)):
        loss, _ = losses.grpo_loss(
            torch.zeros(1, 1),
            torch.zeros(1, 1),
            torch.ones(1),
            mask[:1],
            tis_cap=cap,
            rollout_logprobs=torch.tensor([[-math.log(quotient)]]),
        )
        assert loss.item() == pytest.approx(-weight, abs=1e-6)


def pure_agg_loss(matrix, mask, mode, horizon):
    """verl's agg_loss: matrix and mask are lists of lists."""
    rows = [[x for x, m in zip(values, row) if m] for values, row in zip(matrix, mask)]
    if mode == "token-mean":
        return sum(map(sum, rows)) / sum(map(len, rows))
    if mode == "seq-mean-token-mean":
        return statistics.fmean(sum(row) / len(row) for row in rows)
    assert mode == "seq-mean-token-sum-norm"
    return statistics.fmean(sum(row) / horizon for row in rows)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_grpo_aggregations_are_verls(mode):
    logprobs, old, advantages, mask, _, _ = (
        t[[0, 1, 3, 4, 5]] for t in pure_rollouts()
    )  # verl has no empty rows
    matrix = [
        [-min(r * a, min(max(r, 0.8), 1.2) * a) for r in row]
        for row, a in zip((logprobs - old).exp().tolist(), advantages.tolist())
    ]
    total, _ = losses.grpo_loss(
        logprobs, old, advantages, mask, per_sequence=mode == "seq-mean-token-mean"
    )
    divisor = {
        "token-mean": int(mask.sum()),
        "seq-mean-token-mean": 5,
        "seq-mean-token-sum-norm": 5 * 8192,
    }[mode]
    assert total.item() / divisor == pytest.approx(
        pure_agg_loss(matrix, mask.tolist(), mode, 8192), rel=1e-6
    )


def test_grpo_tis_weight_is_detached():
    logprobs, old, advantages, mask, _, engine = (
        t.requires_grad_() if t.is_floating_point() else t for t in pure_rollouts()
    )
    losses.grpo_loss(logprobs, old, advantages, mask, rollout_logprobs=engine, tis_cap=1.4)[
        0
    ].backward()
    assert engine.grad is None or engine.grad.eq(0).all()
    torch.testing.assert_close(old.grad, -logprobs.grad)  # old acts through the ratio alone
    assert logprobs.grad[mask].abs().max() > 0.1


def test_grpo_with_the_policy_as_its_own_old_is_the_policy_gradient():
    logprobs, _, advantages, mask, _, _ = pure_rollouts()
    logprobs.requires_grad_()
    loss, metrics = losses.grpo_loss(logprobs, logprobs.detach(), advantages, mask)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, -advantages[:, None] * mask)
    assert loss.item() == pytest.approx(-(advantages * mask.sum(1)).sum().item())
    assert metrics["clipped_low"].item() == metrics["clipped_high"].item() == 0


@pytest.mark.parametrize("s", PURE_GRPO[3::4], ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_grpo_masked_positions_do_not_leak(s, poison):
    logprobs, old, advantages, mask, ref, engine = pure_rollouts()
    clean = logprobs.clone().requires_grad_()
    expected, expected_metrics = pure_grpo_loss(clean, old, advantages, mask, ref, engine, s)
    expected.backward()
    dirty = [t.masked_fill(~mask, poison) for t in (logprobs, old, ref, engine)]
    dirty[0].requires_grad_()
    loss, metrics = pure_grpo_loss(dirty[0], dirty[1], advantages, mask, *dirty[2:], s)
    loss.backward()
    assert loss.item() == expected.item() and {k: v.item() for k, v in metrics.items()} == {
        k: v.item() for k, v in expected_metrics.items()
    }
    assert torch.equal(dirty[0].grad, clean.grad) and dirty[0].grad[~mask].eq(0).all()


@pytest.mark.parametrize("per_sequence", [False, True])
def test_grpo_of_empty_rows_only_is_zero(per_sequence):
    logprobs = torch.full((3, 4), -1.0, requires_grad=True)
    loss, metrics = losses.grpo_loss(
        logprobs,
        torch.zeros(3, 4),
        torch.ones(3),
        torch.zeros(3, 4, dtype=torch.bool),
        per_sequence=per_sequence,
        ref_logprobs=torch.zeros(3, 4),
        kl_coef=1.0,
    )
    loss.backward()
    assert (
        loss.item() == 0
        and logprobs.grad.eq(0).all()
        and all(value.item() == 0 for value in metrics.values())
    )


@pytest.mark.parametrize("s", PURE_GRPO[3::4], ids=lambda s: "-".join(map(str, s.values())))
def test_grpo_gradient_adds_up_over_any_split_of_rows_and_any_padding(s):
    logprobs, old, advantages, mask, ref, engine = pure_rollouts()
    whole = logprobs.clone().requires_grad_()
    loss, metrics = pure_grpo_loss(whole, old, advantages, mask, ref, engine, s)
    loss.backward()
    for split in ([[0], [1], [2], [3], [4], [5]], [[5, 1, 2], [4, 0, 3]], [[3], [0, 5, 4, 2, 1]]):
        parts = logprobs.clone().requires_grad_()
        sums = {key: 0.0 for key in metrics} | {"loss": 0.0}
        for i, rows in enumerate(split):
            m, *padded = (
                torch.nn.functional.pad(t[rows], (i, 2)) for t in (mask, parts, old, ref, engine)
            )
            part, found = pure_grpo_loss(
                padded[0], padded[1], advantages[rows], m, padded[2], padded[3], s
            )
            part.backward()
            for key, value in {**found, "loss": part}.items():
                sums[key] += value.item()
        torch.testing.assert_close(parts.grad, whole.grad, rtol=0, atol=1e-12)
        assert sums == pytest.approx(
            {"loss": loss.item()} | {key: value.item() for key, value in metrics.items()}, abs=1e-11
        )


def pure_count(n, rho):
    """ceil(rho n) of the decimal fraction that rho stands for."""
    return math.ceil(Fraction(str(rho)) * n)


def test_top_entropy_count_is_exact():
    assert 0.07 * 100 > 7 and losses.top_entropy_count(100, 0.07) == 7
    assert losses.top_entropy_count(15, 0.2) == 3
    for rho in [i / 100 for i in range(1, 101)] + [0.125, 0.001, 0.999]:
        for n in [*range(300), 1000, 4096, 8191, 8192, 100000]:
            assert losses.top_entropy_count(n, rho) == pure_count(n, rho), (n, rho)


@pytest.mark.parametrize(
    "rho", [0.01, 0.07, 0.1, 0.14, 0.2, 0.28, 0.29, 0.3, 0.55, 0.57, 0.7, 0.999, 1.0]
)
def test_top_entropy_mask_takes_exactly_ceil_of_rho_n(rho):
    mask = torch.arange(150)[None] < torch.arange(151)[:, None]  # row n has n tokens
    for entropy in (
        torch.rand(151, 150, generator=torch.Generator().manual_seed(0)),
        torch.zeros(151, 150),
    ):
        taken = losses.top_entropy_mask(entropy, mask, rho).sum(1).tolist()
        assert (
            taken
            == [pure_count(n, rho) for n in range(151)]
            == [losses.top_entropy_count(n, rho) for n in range(151)]
        )


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
        places = [t for t in range(31) if inside[t]]
        best = sorted(places, key=lambda t: (-row[t], t))[: pure_count(len(places), rho)]
        assert [t for t in range(31) if chosen[t]] == sorted(best)


def test_top_entropy_mask_ties_single_tokens_and_empty_rows():
    # nine of ten entropies are 0: a quantile rule with >= takes all ten
    entropy, mask = torch.zeros(1, 10), torch.ones(1, 10, dtype=torch.bool)
    entropy[0, 6] = 1.0
    assert losses.top_entropy_mask(entropy, mask, 0.2).nonzero()[:, 1].tolist() == [0, 6]
    assert losses.top_entropy_mask(torch.zeros(1, 10), mask, 0.2).nonzero()[:, 1].tolist() == [0, 1]
    mask = torch.tensor(
        [[False, False, True, False], [False] * 4]
    )  # a response of one token, and an empty one
    for rho in (1e-12, 1e-6, 0.2, 1.0):
        assert torch.equal(
            losses.top_entropy_mask(torch.tensor([[9.0, 9.0, 0.0, 9.0]] * 2), mask, rho), mask
        ), rho
        assert losses.top_entropy_count(1, rho) == 1 and losses.top_entropy_count(0, rho) == 0
    assert losses.top_entropy_mask(
        torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool), 0.2
    ).shape == (2, 0)


@pytest.mark.parametrize("rho", [0.0, -0.1, 1.0001, math.nan])
def test_top_entropy_mask_refuses(rho):
    with pytest.raises(ValueError, match="rho"):
        losses.top_entropy_mask(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), rho)


def test_sft_loss():
    logprobs, mask = (
        pure_rand(4, 6, seed=1) - 3,
        torch.rand(4, 6, generator=torch.Generator().manual_seed(2)) < 0.6,
    )
    mask[1] = False
    weights = pure_rand(4, 6, seed=3).exp()
    tokens = [(b, t) for b in range(4) for t in range(6) if mask[b, t]]
    for w in (None, weights):
        leaf = logprobs.masked_fill(~mask, -math.inf).requires_grad_()
        loss = losses.sft_loss(leaf, mask, w)
        assert loss.item() == pytest.approx(
            -sum(leaf[b, t].item() * (1.0 if w is None else w[b, t].item()) for b, t in tokens),
            abs=1e-12,
        )
        loss.backward()
        assert torch.equal(leaf.grad, -(torch.ones_like(weights) if w is None else w) * mask)


# ---------------------------------------------------------------------------------------------------------------------
# PEAR


def pure_pear(logprobs, behavior, mask, variant, gamma, block, ratio_range, weight_range):
    """PEAR's weights by a double loop over each row's own tokens, in logs; lists of lists."""
    result = []
    for row, other, inside in zip(logprobs, behavior, mask):
        weights, places = [0.0] * len(row), [t for t, m in enumerate(inside) if m]
        n, d = len(places), []
        for p in places:
            x = row[p] - other[p]
            d.append(x if ratio_range is None else min(max(x, ratio_range[0]), ratio_range[1]))
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
            weights[places[t - 1]] = math.exp(log_weight)
        result.append(weights)
    return result


def pure_pear_rows(dtype=torch.float64, t=14):
    """Prompts on the left and padding on the right, both masked out and not numbers; lengths from 0 to t."""
    mask = torch.zeros(7, t, dtype=torch.bool)
    for row, (start, stop) in enumerate(
        [(0, t), (3, t), (2, t - 5), (5, 6), (4, 4), (1, 10), (t - 3, t)]
    ):
        mask[row, start:stop] = True
    logprobs, behavior = (
        pure_rand(7, t, seed=6, scale=0.4) - 1,
        pure_rand(7, t, seed=7, scale=0.4) - 1,
    )
    return (
        logprobs.masked_fill(~mask, math.nan).to(dtype),
        behavior.masked_fill(~mask, -math.inf).to(dtype),
        mask,
    )


@pytest.mark.parametrize(
    "variant, block",
    [("sequence", 4), ("token", 4), *(("block", b) for b in (1, 2, 3, 4, 5, 14, 99))],
)
@pytest.mark.parametrize("gamma", [1.0, 0.999, 0.8])
@pytest.mark.parametrize(
    "ratio_range, weight_range",
    [(None, None), ((-0.08, 0.3), (-10.0, 5.0)), ((-0.3, 0.1), None), (None, (-0.5, 0.7))],
)
def test_pear_weights_against_a_double_loop(variant, block, gamma, ratio_range, weight_range):
    logprobs, behavior, mask = pure_pear_rows()
    got = losses.pear_weights(
        logprobs, behavior, mask, variant, gamma, block, ratio_range, weight_range
    )
    expected = pure_pear(
        logprobs.tolist(),
        behavior.tolist(),
        mask.tolist(),
        variant,
        gamma,
        block,
        ratio_range,
        weight_range,
    )
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("variant", ["sequence", "token", "block"])
def test_pear_weights_with_random_masks(variant):
    generator = torch.Generator().manual_seed(8)
    mask = torch.rand(30, 23, generator=generator) < torch.rand(
        30, 1, generator=generator
    )  # gaps: t counts response tokens only
    logprobs, behavior = pure_rand(30, 23, seed=9, scale=0.3), pure_rand(30, 23, seed=10, scale=0.3)
    settings = (variant, 0.97, 4, (-0.2, 0.3), (-1.0, 1.5))
    torch.testing.assert_close(
        losses.pear_weights(logprobs, behavior, mask, *settings),
        torch.tensor(
            pure_pear(logprobs.tolist(), behavior.tolist(), mask.tolist(), *settings),
            dtype=torch.float64,
        ),
        rtol=1e-6,
        atol=0,
    )


def test_pear_weights_by_hand():
    # d = ln 2, ln 3, ln 5, gamma 1/2: sequence 30; token (1/4) 15, (1/2) 5, 1; blocks of two: token 2's for 1 and 2
    logprobs, mask = (
        torch.tensor([[9.0, math.log(2), math.log(3), math.log(5), 9.0]]),
        torch.tensor([[False, True, True, True, False]]),
    )
    for variant, expected in (
        ("sequence", [0, 30, 30, 30, 0]),
        ("token", [0, 3.75, 2.5, 1, 0]),
        ("block", [0, 2.5, 2.5, 1, 0]),
    ):
        got = losses.pear_weights(logprobs, torch.zeros(1, 5), mask, variant, 0.5, 2, None, None)
        assert got[0].tolist() == pytest.approx(expected, rel=1e-6), variant


def test_pear_defaults_are_the_papers():
    logprobs, behavior, mask = pure_pear_rows()
    expected = pure_pear(
        logprobs.tolist(),
        behavior.tolist(),
        mask.tolist(),
        "block",
        0.999,
        4,
        (-0.08, 0.3),
        (-10.0, 5.0),
    )
    torch.testing.assert_close(
        losses.pear_weights(logprobs, behavior, mask, "block"),
        torch.tensor(expected, dtype=torch.float64),
    )


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_pear_blocks_of_one_are_the_token_variant(gamma):
    rows = pure_pear_rows()
    assert torch.equal(
        losses.pear_weights(*rows, "block", gamma, 1), losses.pear_weights(*rows, "token", gamma)
    )


@pytest.mark.parametrize("variant", ["sequence", "token", "block"])
def test_pear_weights_are_one_where_both_policies_agree(variant):
    logprobs, _, mask = pure_pear_rows()
    assert torch.equal(
        losses.pear_weights(logprobs, logprobs.clone(), mask, variant, 1.0), mask.double()
    )


@pytest.mark.parametrize("variant", ["sequence", "token", "block"])
def test_pear_weights_carry_no_gradient_and_ignore_padding(variant):
    logprobs, behavior, mask = pure_pear_rows()
    got = losses.pear_weights(
        logprobs.requires_grad_(), behavior.requires_grad_(), mask, variant, 0.9
    )
    assert not got.requires_grad and torch.isfinite(got).all() and got[~mask].eq(0).all()
    wider = [torch.nn.functional.pad(t.detach(), (3, 40)) for t in (logprobs, behavior, mask)]
    torch.testing.assert_close(
        losses.pear_weights(*wider, variant, 0.9)[:, 3:-40], got, rtol=1e-6, atol=0
    )


def test_pear_is_not_the_ports():
    """The padded length in the exponent, and the weight itself clipped to [0.1, 10], give other numbers."""
    logprobs, behavior, mask = pure_pear_rows()
    d = (logprobs - behavior).masked_fill(~mask, 0.0)
    got, padded = (
        losses.pear_weights(logprobs, behavior, mask, "token", 0.9, 4, None, None),
        torch.zeros(7, 14, dtype=torch.float64),
    )
    for b, t in mask.nonzero().tolist():
        padded[b, t] = 0.9 ** (14 - 1 - t) * d[b, t + 1 :].sum().exp()  # T the padded length
    full = mask.all(1)
    torch.testing.assert_close(got[full], padded[full])  # where nothing is padded the two agree,
    assert (got[2] / padded[2])[mask[2]].tolist() == pytest.approx(
        [0.9**-5] * 7, rel=1e-5
    )  # and row 2 ends 5 early
    # d = 0.3 or -0.3 thirty times: suffixes from exp(8.7) to exp(-8.7), of which bounds of -10 and 5 cut some
    d = torch.tensor([[0.3] * 30, [-0.3] * 30], dtype=torch.float64)
    got = losses.pear_weights(
        d, torch.zeros_like(d), torch.ones_like(d, dtype=torch.bool), "token", 1.0, 4, None
    )
    assert got[0, 0].item() == pytest.approx(math.exp(5)) and got[1, 0].item() == pytest.approx(
        math.exp(-8.7)
    )
    assert got.max() > 10 and got.min() < 0.1 and got[0, 20].item() == pytest.approx(math.exp(2.7))


@pytest.mark.parametrize("variant", ["sequence", "token", "block"])
@pytest.mark.parametrize("ratio_range", [(-0.08, 0.3), None])
@pytest.mark.parametrize("extreme", [1e4, 1e30, math.inf])
def test_pear_extreme_ratios_stay_finite_and_local(variant, ratio_range, extreme):
    """A token of ratio 0 weighs down those before it, and leaves those after it as they are, in float32 too."""
    mask = torch.tensor([[False] + [True] * 9 + [False]])
    logprobs = torch.tensor([[0.0, 0.25, -extreme, 0.5, -0.25, 1.0, 0.125, -0.5, 0.75, 0.25, 0.0]])
    behavior = torch.zeros(1, 11)
    settings = (variant, 0.999, 4, ratio_range, (-10.0, 5.0))
    got = losses.pear_weights(logprobs, behavior, mask, *settings)
    expected = torch.tensor(
        pure_pear(logprobs.tolist(), behavior.tolist(), mask.tolist(), *settings)
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)
    up = losses.pear_weights(-logprobs, behavior, mask, *settings)  # and one of ratio infinity
    torch.testing.assert_close(
        up,
        torch.tensor(pure_pear((-logprobs).tolist(), behavior.tolist(), mask.tolist(), *settings)),
        rtol=1e-4,
        atol=0,
    )


def test_pear_refuses():
    rows = pure_pear_rows()
    with pytest.raises(ValueError, match="variant"):
        losses.pear_weights(*rows, "suffix")
    for gamma in (0.0, 1.01, -1.0):
        with pytest.raises(ValueError, match="gamma"):
            losses.pear_weights(*rows, "token", gamma)
    with pytest.raises(ValueError, match="block"):
        losses.pear_weights(*rows, "block", 0.9, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Freezing


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
def test_update_importance_against_a_loop(alpha):
    shapes = [(3, 4), (5,), (), (0, 2)]
    theta = [
        [
            pure_rand(*shape, seed=10 * phase + i, dtype=torch.float32)
            for i, shape in enumerate(shapes)
        ]
        for phase in range(4)
    ]
    before, importance = (
        [[t.clone() for t in phase] for phase in theta],
        [torch.zeros(shape) for shape in shapes],
    )
    expected = [[0.0] * t.numel() for t in importance]
    for old, new in zip(theta, theta[1:]):
        assert freeze.update_importance(importance, old, new, alpha) is None
        for values, a, b in zip(expected, old, new):
            for i, (x, y) in enumerate(zip(a.flatten().tolist(), b.flatten().tolist())):
                values[i] = alpha * values[i] + abs(y - x)
    for values, c in zip(expected, importance):
        assert c.flatten().tolist() == pytest.approx(values, abs=1e-6)
    assert all(
        torch.equal(a, b) for a, b in zip(sum(theta, []), sum(before, []))
    )  # neither is written to
    with pytest.raises(ValueError):
        freeze.update_importance(importance, theta[0], theta[1][:-1], alpha)


def pure_sorted_threshold(tensors, fraction):
    """The (K + 1)-th largest |entry| by a full sort."""
    values = torch.cat([t.flatten() for t in tensors]).abs().sort(descending=True).values
    k = math.floor(Fraction(str(fraction)) * len(values))
    return values[k].item() if k < len(values) else -math.inf


def pure_check_threshold(tensors, fraction):
    threshold = freeze.topk_threshold(tensors, fraction)
    assert threshold == pure_sorted_threshold(tensors, fraction)
    values = torch.cat([t.flatten() for t in tensors]).abs()
    k = math.floor(Fraction(str(fraction)) * len(values))
    frozen, ties = int((values > threshold).sum()), int((values == threshold).sum())
    assert frozen <= k < frozen + ties or frozen == k == len(values)  # K to within the tie class
    return threshold


PURE_DENORMAL = 2.0**-149  # the smallest float32 above 0


@pytest.mark.parametrize("fraction", [1e-6, 0.1, 0.29, 0.5, 0.9, 0.99, 1.0])
def test_topk_threshold_in_odd_cases(fraction):
    normal = pure_rand(1001, dtype=torch.float32)
    zeros = torch.cat([normal, torch.zeros(3000), -torch.zeros(7)])
    ties = torch.tensor([1.0, -1.0, 2.0, 2.0, -2.0, 0.5]).repeat(50)
    denormals = torch.cat(
        [torch.arange(1, 500, dtype=torch.int32).view(torch.float32), normal[:100] * 1e-40]
    )
    infinite = torch.cat([normal, torch.tensor([math.inf, -math.inf] * 80)])
    close = (torch.arange(70000, dtype=torch.int32) + 0x3F7F0000).view(
        torch.float32
    )  # neighbours, across several upper halves
    for values in (
        normal,
        zeros,
        ties,
        denormals,
        infinite,
        close.flip(0),
        torch.full((77,), -0.25),
        torch.zeros(10),
        normal[:1],
    ):
        pure_check_threshold([values], fraction)
    pure_check_threshold(
        [
            normal[:1000].view(10, 100).T,
            torch.zeros(0),
            torch.zeros(3, 0),
            ties[3],
            close[:77].view(7, 11),
        ],
        fraction,
    )


def test_topk_threshold_by_hand():
    values = [torch.tensor([[3.0, -1.0], [0.0, -7.0]]), torch.tensor([5.0, 2.0])]  # 7 5 3 2 1 0
    for fraction, expected in ((0.5, 2.0), (1 / 6, 5.0), (0.1, 7.0), (0.99, 0.0), (1.0, -math.inf)):
        assert freeze.topk_threshold(values, fraction) == expected
    assert freeze.topk_threshold([torch.tensor([PURE_DENORMAL, 0.0])], 0.5) == 0.0
    assert freeze.topk_threshold([torch.tensor([PURE_DENORMAL, 0.0])], 0.1) == PURE_DENORMAL
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
    for bits in (
        0x7FC00000,
        0x7FFFFFFF,
        -1,
        0x7F800001,
    ):  # quiet, all ones, negative, and one only in its lower half
        nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
        with pytest.raises(ValueError, match="NaN"):
            freeze.topk_threshold([good, torch.cat([good, nan])], 0.5)


PURE_TWO_RANKS = """
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
cases = [(big, 6_543_210, [0.3]), (small, 0, [0.01, 0.5, 1.0]), (small, 1000, [0.5]), (torch.full((9,), 2.0), 4, [0.5])]
for values, cut, fractions in cases:
    for fraction in fractions:
        results.append(freeze.topk_threshold(shards(values, cut), fraction, group))
for tensors in ([torch.tensor([math.nan if rank else 1.0])], [torch.zeros(0)]):
    try:
        freeze.topk_threshold(tensors, 0.5, group)
    except ValueError as error:
        results.append(str(error))
alone = freeze.topk_threshold([small[:400] if rank == 0 else 3 * small[400:]], 0.5)  # no group: nothing is communicated
results.append(alone)
print(json.dumps(results))
sys.stdout.flush()
os._exit(0)  # gloo at times aborts a process that ends by itself, if its peer has ended before
"""


def test_topk_threshold_on_ten_million_values_and_on_two_ranks(tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(PURE_TWO_RANKS)
    ranks = [
        subprocess.Popen(
            [sys.executable, script, ROOT, tmp_path / "meeting", str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    big = torch.randn(10_000_000, generator=torch.Generator().manual_seed(0))
    big[::3] = 0.0
    big[1::7] = 0.5
    small = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    ordered = big.abs().sort(descending=True).values
    for fraction in (
        1e-7,
        0.3,
        0.47,
        0.9,
    ):  # the second-largest, an ordinary value, and two within ties: 0.5 and 0
        assert (
            freeze.topk_threshold(list(big.view(4, -1)), fraction)
            == ordered[round(fraction * 10_000_000)].item()
        )
    expected = (
        [ordered[3_000_000].item()]
        + [pure_sorted_threshold([small], f) for f in (0.01, 0.5, 1.0, 0.5)]
        + [2.0]
    )
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
        assert alone == pure_sorted_threshold([small[:400] if rank == 0 else 3 * small[400:]], 0.5)


def pure_training(frozen_steps, mode, weight_decay=0.1, warm=3):
    """AdamW whose moments are warm when the freeze begins. Returns also norms and movements."""
    generator = torch.Generator().manual_seed(5)
    parameters = [
        torch.nn.Parameter(torch.randn(shape, generator=generator))
        for shape in ((20, 30), (50,), (0, 3))
    ]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=weight_decay)

    def draw_gradients():
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)

    for _ in range(warm):
        draw_gradients()
        optimizer.step()
    with torch.no_grad():
        parameters[1][:20] = torch.tensor([0.0, -0.0, -0.0, 1e-42, -1e-42]).repeat(
            4
        )  # multiplying by a mask would lose signs
    anchor = [p.detach().clone() for p in parameters]
    frozen = [torch.rand(p.shape, generator=generator) < 0.5 for p in parameters]
    frozen[1][:20] = True
    norms, movements = [], []
    for _ in range(frozen_steps):
        draw_gradients()
        free = [
            g
            for p, f in zip(parameters, frozen)
            for g, is_frozen in zip(p.grad.flatten().tolist(), f.flatten().tolist())
            if not is_frozen
        ]
        freeze.zero_frozen_gradients((p.grad for p in parameters), (f for f in frozen))
        norms.append(
            (
                torch.nn.utils.clip_grad_norm_(parameters, 1.0).item(),
                math.sqrt(sum(g * g for g in free)),
            )
        )
        optimizer.step()
        loop = max(
            abs(x - y)
            for p, a, f in zip(parameters, anchor, frozen)
            for x, y, is_frozen in zip(
                p.flatten().tolist(), a.flatten().tolist(), f.flatten().tolist()
            )
            if is_frozen
        )
        after = freeze.restore_frozen if mode == "strict" else freeze.largest_movement
        movements.append(
            (after((p.detach() for p in parameters), (f for f in frozen), anchor), loop)
        )
    return parameters, frozen, anchor, norms, movements


def pure_same_bits(parameters, frozen, anchor):
    return all(
        torch.equal(p.detach().view(torch.int32)[f], a.view(torch.int32)[f])
        for p, a, f in zip(parameters, anchor, frozen)
    )


def test_frozen_entries_stay_bit_for_bit_under_warm_moments_and_weight_decay():
    parameters, frozen, anchor, norms, movements = pure_training(5, "strict")
    assert pure_same_bits(parameters, frozen, anchor)
    assert all(
        (p.detach() != a)[~f].all() for p, a, f in zip(parameters, anchor, frozen)
    )  # and all others move
    for norm, free in norms:
        assert norm == pytest.approx(free, rel=1e-5)  # the norm is that of the free entries alone
    for moved, loop in movements:
        assert moved == pytest.approx(loop, rel=1e-4) and moved > 1e-4  # what restoring has undone


def test_a_frozen_gradient_that_is_not_finite_is_noticed():
    gradient = torch.tensor([math.nan, math.inf, 3.0, 4.0])
    freeze.zero_frozen_gradients([gradient], [torch.tensor([True, True, True, False])])
    assert gradient[:2].isnan().all() and gradient[2:].tolist() == [0.0, 4.0]


def test_zero_gradients_alone_leak():
    parameters, frozen, anchor, _, movements = pure_training(5, "zero-grad-only")
    assert not pure_same_bits(parameters, frozen, anchor)
    for moved, loop in movements:
        assert moved == pytest.approx(loop, rel=1e-4) and moved > 1e-4
    assert movements[-1][0] > movements[0][0]
    # with neither moments nor weight decay there is nothing to leak
    parameters, frozen, anchor, _, movements = pure_training(
        5, "zero-grad-only", weight_decay=0.0, warm=0
    )
    assert pure_same_bits(parameters, frozen, anchor) and {moved for moved, _ in movements} == {0.0}


def test_largest_movement_looks_at_frozen_entries_only():
    p, a = (
        [torch.tensor([1.0, 2.0]), torch.tensor([5.0])],
        [torch.tensor([1.0, 2.5]), torch.tensor([-4.0])],
    )
    none = [torch.zeros(2, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)]
    assert freeze.largest_movement(p, none, a) == 0.0 == freeze.restore_frozen(p, none, a)
    assert freeze.largest_movement(p, [torch.tensor([True, True]), none[1]], a) == 0.5
    assert freeze.largest_movement(p, [torch.tensor([True, False]), torch.tensor([True])], a) == 9.0
    assert p[0].tolist() == [1.0, 2.0] and p[1].tolist() == [5.0]
    assert freeze.restore_frozen(p, [torch.tensor([False, True]), none[1]], a) == 0.5
    assert p[0].tolist() == [1.0, 2.5] and p[1].tolist() == [5.0]


# ---------------------------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize(
    "pad_id", [0, 7, 9]
)  # 7: also the end-of-text token of every response; 9: also an ordinary token
def test_collate(pad_id):
    rows = [
        ([1, 2, 3], [4, 5, 7]),
        ([9], [7]),
        ([1, 2, 3, 4, 5, 6], [7]),
        ([8, 7], [9, 7, 7, 9, 7]),
    ]
    values = [[-0.1, -0.2, -0.3], [-1.0], None, [-5.0, -6.0, -7.0, -8.0, -9.0]]
    batch = data.collate(rows, pad_id, behavior=values)
    assert set(batch) == {"tokens", "mask", "behavior"}
    assert batch["tokens"].shape == (4, 7) and batch["mask"].shape == batch["behavior"].shape == (
        4,
        6,
    )
    assert (batch["tokens"].dtype, batch["mask"].dtype, batch["behavior"].dtype) == (
        torch.int64,
        torch.bool,
        torch.float32,
    )
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
    assert (
        set(plain) == {"tokens", "mask"}
        and plain["tokens"].tolist() == [[9, 7]]
        and plain["mask"].tolist() == [[True]]
    )


def pure_packed(lengths, budget, world):
    """pack's result, after the checks that hold for every input."""
    parts = data.pack(lengths, budget, world)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))  # every row once
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
        parts = pure_packed(lengths, 32768, world)
        padded = [len(part) * max((lengths[i] for i in part), default=0) for part in parts]
        assert 1 - sum(lengths) / sum(padded) <= 0.05
        # All ranks wait for the largest micro-batch of a round, so rounds should be even: what is waited for is little.
        rounds = [padded[i : i + world] for i in range(0, len(padded), world)]
        assert sum(max(r) * world for r in rounds) / sum(padded) <= 1.12
        assert max(padded) / (sum(padded) / len(padded)) <= 1.12
        # Few: as many as sorted rows need that fill each micro-batch as far as the budget goes, rounded up.
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
        pure_packed(lengths, rng.choice([1, 10, 50, 1000]), rng.choice([1, 2, 3, 8]))
    assert pure_packed([], 100, 3) == [[], [], []]
    parts = pure_packed([5, 9], 100, 4)  # fewer rows than ranks: each alone, the others empty
    assert sorted(map(len, parts)) == [0, 0, 1, 1]
    assert sorted(map(len, pure_packed([50] * 10, 1000, 2))) == [
        5,
        5,
    ]  # both ranks work although one micro-batch could hold all
    parts = pure_packed([500, 10, 10, 700, 10], 100, 1)  # longer than the budget: alone
    assert sorted(parts, key=len) == [[3], [0], [1, 2, 4]]
    assert [
        max(lengths)
        for lengths in ([[8, 3, 5, 1][i] for i in part] for part in pure_packed([8, 3, 5, 1], 8, 1))
    ] == [8, 5, 3]


@pytest.mark.parametrize("length", [1, 7, 64])
def test_draw_is_a_stream_of_permutations_however_it_is_cut(length):
    whole = data.draw(length, 5, 0, 4 * length + 3)
    assert len(whole) == 4 * length + 3 and data.draw(length, 5, 3, 0) == []
    passes = [whole[i : i + length] for i in range(0, 4 * length, length)]
    assert all(sorted(p) == list(range(length)) for p in passes)
    for size in (1, 2, 5, length, 2 * length + 1):
        cut = [
            place
            for start in range(0, len(whole), size)
            for place in data.draw(length, 5, start, min(size, len(whole) - start))
        ]
        assert cut == whole
    if length == 64:
        assert len({tuple(p) for p in passes}) == 4 and passes[0] != data.draw(length, 6, 0, length)
        assert passes[0] != sorted(passes[0])


def test_draw_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    data.draw(10, 0, 0, 25)
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------------------------------------------------
# The embedded task


@pytest.mark.parametrize("expert", [False, True])
def test_chain_works_its_answer_out_rightly(expert):
    rng, first = random.Random(1), set()
    for i in range(600):
        terms = 2 + i % 7
        question, work, result = data.chain(rng, terms, expert)
        assert (
            question[-1] == "?"
            and question[:2].isdigit()
            and len(question) == 2 + 2 * (terms - 1) + 1
        )
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
    assert (
        data.chain(random.Random(3), 5, expert)[0] == data.chain(random.Random(3), 5, not expert)[0]
    )  # style alone differs


def test_embedded_tokenizer_round_trip(tmp_path):
    tokenizer = data.embedded_tokenizer()
    assert len(tokenizer) == 27 and tokenizer.eos_token_id != tokenizer.pad_token_id
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    rng = random.Random(2)
    for i in range(100):
        question, work, _ = data.chain(rng, 2 + i % 7, i % 2 == 0)
        for text in (question, work, question + work):
            ids = tokenizer.encode(text)
            assert (
                len(ids) == len(text)
                and None not in ids
                and not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)
            )
            assert (
                tokenizer.decode(ids)
                == text
                == tokenizer.decode(ids + [tokenizer.eos_token_id], skip_special_tokens=True)
            )
            assert loaded.encode(text) == ids and loaded.decode(ids) == text


def test_embedded_questions_and_what_training_and_evaluation_share():
    tokenizer = data.embedded_tokenizer()
    train = data.embedded_questions(tokenizer, "train", data.TRAIN_TERMS, 5000)
    held_out = evaluation.load_questions("chain", tokenizer, None, "")
    assert train[:300] == data.embedded_questions(tokenizer, "train", data.TRAIN_TERMS, 300)
    assert len({q.id for q in train}) == 5000 and not {q.id for q in train} & {
        q.id for q in held_out
    }
    for i, question in enumerate(train[:200]):
        text, work = (
            tokenizer.decode(question.prompt),
            tokenizer.decode(question.demonstration[:-1]),
        )
        assert question.demonstration[-1] == tokenizer.eos_token_id and question.kind == "chain"
        assert work.startswith("<" + text[:4]) and work.endswith(f"[{question.answer}]")
        assert (
            question.level
            == str(data.TRAIN_TERMS[i % len(data.TRAIN_TERMS)])
            == str(len(text) // 2)
        )
    prompts = {tuple(q.prompt) for q in train}
    assert not any(tuple(question.prompt) in prompts for question in held_out)


# ---------------------------------------------------------------------------------------------------------------------
# The sampler's choice of a token


def pure_nucleus(logits, temperature, top_p):
    """{token: probability} of what top-p leaves, renormalised, by a loop."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    probs = [w / sum(weights) for w in weights]
    kept, reached = [], 0.0
    for token in sorted(range(len(probs)), key=lambda i: (-probs[i], i)):
        if top_p < 1 and reached >= top_p:
            break
        kept.append(token)
        reached += probs[token]
    return {token: probs[token] / sum(probs[k] for k in kept) for token in kept}


@pytest.mark.parametrize(
    "temperature, top_p",
    [(1.0, 1.0), (0.6, 1.0), (1.7, 1.0), (1.0, 0.9), (0.6, 0.5), (1.0, 1e-6), (2.0, 0.999)],
)
def test_pick_follows_the_softmax_of_its_nucleus(temperature, top_p):
    size, logits = 20000, pure_rand(3, 24, seed=11, dtype=torch.float32, scale=1.5)
    noise = (torch.arange(size) + 0.5) / size  # an even grid: counts can be off by rounding only
    for row in logits:
        expected = pure_nucleus(row.tolist(), temperature, top_p)
        tokens, logprobs = rollout.pick(row.expand(size, -1), temperature, top_p, noise)
        counts = torch.bincount(tokens, minlength=24).tolist()
        assert set(tokens.tolist()) <= set(expected)
        for token in range(24):
            assert abs(counts[token] - size * expected.get(token, 0.0)) <= 1.5, token
        assert logprobs.tolist() == pytest.approx(
            [math.log(expected[t]) for t in tokens.tolist()], abs=1e-5
        )


def test_pick_by_independent_noise_passes_a_chi_square_test():
    logits = pure_rand(12, seed=12, dtype=torch.float32)
    noise = torch.rand(50000, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(
        rollout.pick(logits.expand(50000, -1), 0.8, 1.0, noise)[0], minlength=12
    )
    expected = 50000 * torch.tensor([pure_nucleus(logits.tolist(), 0.8, 1.0)[t] for t in range(12)])
    assert (
        (counts - expected) ** 2 / expected
    ).sum().item() < 31.3  # 11 degrees of freedom: exceeded once in a thousand


def test_pick_rows_are_independent_and_never_impossible():
    logits = pure_rand(5, 9, seed=13, dtype=torch.float32)
    logits[:, [0, 4, 8]] = -math.inf  # the first, one within, the last
    for noise in (0.0, 0.3, 1 - 2**-24):  # the ends of torch.rand's range
        for top_p in (1.0, 0.8):
            tokens, logprobs = rollout.pick(logits, 1.0, top_p, torch.full((5,), noise))
            assert torch.isfinite(logprobs).all() and not set(tokens.tolist()) & {0, 4, 8}
    noise = torch.rand(5, generator=torch.Generator().manual_seed(1))
    tokens, logprobs = rollout.pick(logits, 0.9, 0.8, noise)
    for i in range(5):
        token, logprob = rollout.pick(logits[i : i + 1], 0.9, 0.8, noise[i : i + 1])
        assert token.item() == tokens[i].item() and logprob.item() == pytest.approx(
            logprobs[i].item(), abs=1e-6
        )


def test_pick_at_temperature_zero_is_greedy():
    logits = pure_rand(6, 9, seed=14, dtype=torch.float32)
    tokens, logprobs = rollout.pick(logits, 0, 0.5, torch.rand(6))
    for row, token, logprob in zip(logits.tolist(), tokens.tolist(), logprobs.tolist()):
        assert token == max(range(9), key=row.__getitem__)
        assert logprob == pytest.approx(math.log(pure_nucleus(row, 1.0, 1.0)[token]), abs=1e-5)


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


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def test_eval_pass_at_k_is_the_mean_over_all_subsets():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
                assert evaluation.pass_at_k(n, c, k) == pytest.approx(
                    sum(map(max, subsets)) / len(subsets), abs=1e-12
                )
    assert [round(evaluation.pass_at_k(8, c, 4), 6) for c in (0, 1, 4, 8)] == [0, 0.5, 0.985714, 1]
    for wrong in ((4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)):
        with pytest.raises(ValueError):
            evaluation.pass_at_k(*wrong)


def test_eval_bootstrap_interval():
    rng = random.Random(0)
    scores = [rng.random() < 0.3 for _ in range(400)]
    mean, low, high = evaluation.avg_at_k(scores)
    assert (mean, low, high) == evaluation.avg_at_k(scores)
    half = 1.96 * (mean * (1 - mean) / 400) ** 0.5  # the normal approximation
    assert mean == pytest.approx(sum(scores) / 400)
    assert low == pytest.approx(mean - half, abs=0.01) and high == pytest.approx(
        mean + half, abs=0.01
    )
    assert evaluation.avg_at_k([0.5] * 3) == (0.5, 0.5, 0.5)


class EvalSampler:
    """Answers `[seed % 10]`, so that what is sampled shows the seed."""

    def sample(self, prompts, n, seeds, max_tokens, temperature, top_p=1.0):
        from rollout import Sample

        return [[Sample([(seed + j) % 10], [0.0], j == 0) for j in range(n)] for seed in seeds]


def test_eval_evaluate_does_not_depend_on_order_or_world():
    questions = [
        data.Question(f"q/{i}", [1], str(i % 10), None, str(i % 2), "chain") for i in range(23)
    ]
    run = lambda qs, rank=0, world=1, seed=5: evaluation.evaluate(
        EvalSampler(), qs, checker, 4, 1.0, 8, seed, lambda tokens: f"[{tokens[0]}]", rank, world
    )
    with evaluation.Checker() as checker:
        whole = {row["id"]: row for row in run(questions)}
        parts = {row["id"]: row for rank in range(3) for row in run(questions[::-1], rank, 3)}
        assert whole == parts and len(whole) == 23
        assert whole != {row["id"]: row for row in run(questions, seed=6)}
    summary = evaluation.summarize(list(whole.values()))
    correct = [row["verdict"].count("correct") for row in whole.values()]
    assert summary["rows"] == 23 and summary["k"] == 4 and list(summary["pass"]) == [1, 2, 4]
    assert summary["avg"] == pytest.approx(sum(correct) / 92) == pytest.approx(summary["pass"][1])
    assert summary["pass"][4] == pytest.approx(sum(c > 0 for c in correct) / 23)
    assert (
        summary["truncated"] == 0.25
        and summary["length"] == 1
        and summary["correct"] + summary["wrong"] == 1
    )
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


# --------------------------------------------------------------------------------------------------
# The loop
#
# What needs a process group runs in processes that its tests share: one for one rank, two for two.
# A function under `@case()` runs there, on every rank, and returns its finding. The test below it
# takes an argument of the case's name: {number of ranks: [the finding of each rank]}. Only cases
# that the session's tests take are run. If one raises, its tests fail with its traceback, and the
# others go on in new processes.
#
# There the embedded task has 16 questions, its base model is random, and a checker stands in whose
# verdicts vary all the same: a third of the questions is never solved, the rest by a checksum.

GSM8K = ROOT.resolve().parent / "shared" / "data" / "gsm8k_train.jsonl"
EOS_IDS = [1, 9]  # of the tiny model's generation config; 1 is the tokenizer's own
# fmt: off
COMMON = dict(
    sampler="torch", max_prompt=24, max_response=60, questions=4, samples=4, steps=9, buffer_size=5,
    p=0.25, sft_batch=2, sft_epochs=2, rl_lr=1e-3, sft_lr=1e-3, save_every=1, keep=1000,
    kv_cache_gib=0.05, max_num_seqs=32, dtype="float32",
)
# fmt: on


def as_flags(**settings) -> list[str]:
    """Settings as the command line takes them."""
    result = []
    for name, value in settings.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            result.append(f"--{name}" if value else f"--no-{name}")
        else:
            result.append(f"--{name}={value}")
    return result


def environment(folder, **more) -> dict:
    """This process's environment without a rank and the network, with one thread, and `more`."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    return inherited | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_DATASETS_CACHE": str(Path(folder, "cache")),
        "PYTHONWARNINGS": "ignore",
        **more,
    }


def start(folder, world: int, call: str) -> list[subprocess.Popen]:
    """`call` of this module, in `world` processes that torchrun might have started."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    module = Path(__file__)
    code = f"import sys; sys.path.insert(0, {str(module.parent)!r}); import {module.stem} as t; "
    started = []
    for rank in range(world):
        env = environment(
            folder,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world),
            MASTER_ADDR="localhost",
            MASTER_PORT=port,
        )
        command = [sys.executable, "-c", f"{code}t.{call}; t.os._exit(0)"]
        with open(Path(folder, f"output-{rank}.txt"), "w") as output:
            process = subprocess.Popen(
                command, env=env, stdout=output, stderr=subprocess.STDOUT, cwd=folder
            )
        started.append(process)
    return started


def finish(started: list[subprocess.Popen], limit=170) -> list[int]:
    """Their exit codes; what is still at work after `limit` seconds is killed."""
    end = time.monotonic() + limit
    try:
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0, end - time.monotonic()))
    finally:
        for process in started:
            process.kill()
    return [process.wait() for process in started]


def outputs(folder, world: int) -> str:
    """The end of what each rank printed, for the message of an assertion."""
    return "\n".join(Path(folder, f"output-{i}.txt").read_text()[-4000:] for i in range(world))


def mifo_command(arguments, folder, world=1) -> subprocess.Popen:
    """The real command, by torchrun for more than one rank."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    return subprocess.Popen(
        [sys.executable, *(torchrun if world > 1 else []), ROOT / "mifo.py", *map(str, arguments)],
        text=True,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(folder),
    )


def tiny_model(folder, seed: int, tokenizer=None, initializer_range=0.05) -> str:
    """A random Qwen2 of 2 layers with lively weights (and biases), saved with its tokenizer."""
    tokenizer = tokenizer or data.embedded_tokenizer()
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=initializer_range,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = transformers.Qwen2ForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.03 * torch.randn_like(p))
    model.generation_config.eos_token_id = EOS_IDS
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def float_model(folder, dtype=torch.float64):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def make_folder(folder: Path) -> Path:
    """For runs of the embedded task: base models (the same of both seeds), another, a recipe."""
    tiny_model(folder / "embedded-base-0", 0)
    shutil.copytree(folder / "embedded-base-0", folder / "embedded-base-1")
    tiny_model(folder / "other", 1)
    (folder / "empty.toml").write_text("")
    return folder


class StandInChecker:
    """Decides by gold answer and text, in no time, and differently though the model is random."""

    extract, require_think = "any", False

    def __init__(self, *args):
        pass

    def check(self, texts, golds, kinds):
        odd = [zlib.crc32(text.encode()) % 2 for text in texts]
        return ["correct" if int(gold) % 3 and o else "wrong" for gold, o in zip(golds, odd)]

    def close(self):
        pass


class FixedSampler:
    """Responses, and log-probabilities, that depend on the prompt alone."""

    name = "fixed"

    def sample(self, prompts, n, seeds, max_tokens, temperature, top_p=1.0):
        groups = []
        for prompt in prompts:
            rng = random.Random(str(prompt))
            responses = [rng.choices(range(2, 27), k=rng.randint(1, 14)) for _ in range(n)]
            group = []
            for tokens in responses:
                logprobs = [-0.5 - 3 * rng.random() for _ in tokens]
                group.append(rollout.Sample(tokens, logprobs, rng.random() < 0.3))
            groups.append(group)
        return groups

    def push(self, weights):
        for _ in weights:
            pass

    def sleep(self):
        pass


def sixteen_questions() -> list[data.Question]:
    return data.embedded_questions(data.embedded_tokenizer(), "train", data.TRAIN_TERMS, 16)


def stand_ins() -> None:
    """In a rank's process: 16 questions, the checker above, no plots, any number of runs."""
    embedded, init = data.embedded_questions, dist.init_process_group
    data.embedded_questions = lambda tokenizer, name, terms, _: embedded(tokenizer, name, terms, 16)
    evaluation.Checker = StandInChecker
    dist.init_process_group = lambda *args, **more: dist.is_initialized() or init(*args, **more)
    mifo.plot = lambda *args, **more: None
    transformers.utils.logging.disable_progress_bar()  # a traceback would drown in them


def open_run(out: Path, **settings) -> mifo.Run:
    """A Run as main() makes it, in a folder made by make_folder."""
    out.mkdir(parents=True, exist_ok=True)
    recipe = out.parent / "empty.toml"
    return mifo.set_up(mifo.parse_config(as_flags(recipe=recipe, out=out, **(COMMON | settings))))


def trained(out: Path, **settings) -> Path:
    mifo.train(open_run(out, **settings))
    return out


@dataclasses.dataclass
class Case:
    function: Callable
    worlds: tuple[int, ...]  # numbers of ranks to run it on
    late: bool  # runs on one rank when all others have run on one and on two


CASES = {}  # by name


def case(worlds=(1, 2), late=False):
    """Runs the function below in the shared processes; a fixture of its name gives its findings."""

    def declare(function):
        name = function.__name__
        CASES[name] = Case(function, worlds, late)
        return pytest.fixture(lambda findings: findings(name), scope="session", name=name)

    return declare


def run_cases(folder: str, names: list[str]) -> None:
    """In a rank's process: each case in turn, its finding saved; the first that raises ends it."""
    stand_ins()
    for name in names:
        try:
            finding = CASES[name].function(Path(folder))
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # at once, for the other rank may be waiting
        torch.save(finding, finding_file(folder, name, os.environ["RANK"]))


def finding_file(folder, name: str, rank) -> Path:
    return Path(folder, f"{name}-{rank}.pt")


def is_done(folder: Path, world: int, name: str) -> bool:
    return all(finding_file(folder, name, rank).exists() for rank in range(world))


def run_to_the_end(folder: Path, world: int, names: list[str]) -> None:
    """Runs all these cases; what the ranks print when one raises is left in NAME.error."""
    while names:
        finish(start(folder, world, f"run_cases({str(folder)!r}, {names!r})"), limit=600)
        names = [name for name in names if not is_done(folder, world, name)]
        if names:
            (folder / f"{names[0]}.error").write_text(outputs(folder, world))
            names = names[1:]


@pytest.fixture(scope="session")
def findings(request, tmp_path_factory):
    """name of a case -> {world: finding by rank}, after all cases of this session have run."""
    root = tmp_path_factory.mktemp("cases")
    taken = set()
    for item in request.session.items:
        taken.update(getattr(item, "fixturenames", ()))
    chosen = [name for name in CASES if name in taken]
    for world, late in ((1, False), (2, False), (1, True)):
        folder = root / str(world)
        if not late:
            make_folder(folder)
        now = [name for name in chosen if CASES[name].late == late and world in CASES[name].worlds]
        run_to_the_end(folder, world, now)

    def find(name):
        found = {}
        for world in CASES[name].worlds:
            folder = root / str(world)
            if (folder / f"{name}.error").exists():
                text = (folder / f"{name}.error").read_text()
                pytest.fail(f"{name} on {world} ranks:\n{text}", pytrace=False)
            files = [finding_file(folder, name, rank) for rank in range(world)]
            found[world] = [torch.load(file, weights_only=False) for file in files]
        return found

    return find


def whole(run, shards) -> dict[str, torch.Tensor]:
    """By the parameters' names, tensors that are sharded as the parameters are, put together."""
    tensors = {}
    for (name, p), shard in zip(run.policy.model.named_parameters(), shards, strict=True):
        sharded = DTensor.from_local(
            shard.detach(), p.device_mesh, p.placements, shape=p.shape, stride=p.stride()
        )
        tensors[name] = sharded.full_tensor().clone()
    return tensors


def distance(a: dict, b: dict) -> float:
    """Largest difference of two sets of tensors, relative to the largest entry."""
    assert a.keys() == b.keys()
    largest = max(t.abs().max().item() for t in b.values())
    return max((a[n].double() - b[n].double()).abs().max().item() for n in a) / largest


STATE_FILES = "state/*.safetensors"  # the files of a checkpoint that hold the tensors, one a rank


def checkpoint_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The whole tensors: weight/NAME, importance/NAME, anchor/NAME, rl/exp_avg/NAME, .."""
    parts = {}  # name -> {first row: these rows of it}
    for path in checkpoint.glob(STATE_FILES):
        with safe_open(path, "pt") as file:
            sharding = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for name in file.keys():
                first, *_ = sharding[name]["saved_offsets"] or [0]
                parts.setdefault(name, {})[first] = file.get_tensor(name)
    tensors = {}
    for name, rows in parts.items():
        ordered = [rows[first] for first in sorted(rows)]
        if not name.startswith("rng/"):
            tensors[name] = torch.cat(ordered) if ordered[0].ndim else ordered[0]
    return tensors


def of_kind(tensors: dict, kind: str) -> dict[str, torch.Tensor]:
    """Those of a checkpoint's tensors whose name begins with `kind`, by the rest of the name."""
    return {key.removeprefix(kind): t for key, t in tensors.items() if key.startswith(kind)}


def checkpoint_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "state.json").read_text())["state"]


def checkpoints_of(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-*"))


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics_of(out: Path) -> list[dict]:
    """metrics.jsonl without what only the clock decides."""
    clock = ("second", "per_s", "time")
    lines = []
    for line in json_lines(out / "metrics.jsonl"):
        lines.append({k: v for k, v in line.items() if not any(word in k for word in clock)})
    return lines


# --------------------------------------------------------------------------------------------------
# Gradients

# fmt: off
RL_STEPS = {  # what a step is compared with the oracle in, whatever --micro-tokens
    "token": dict(),
    "sequence": dict(aggregation="sequence"),
    "constant": dict(aggregation="constant", normalize_std=True),
    "truncated": dict(mask_truncated=True, temperature=0.7),
    "truncated-sequence": dict(mask_truncated=True, aggregation="sequence"),
    "updates": dict(updates=2, clip_low=0.1, clip_high=0.15),
    "kl": dict(updates=2, kl_coef=0.5),
    "tis": dict(tis_cap=2.0),
    "once": dict(gather_once=True, updates=2, kl_coef=0.5),
    "seed": dict(seed=1),  # all 16 questions in another order
}
SFT_STEPS = {
    "all": dict(rho=1.0),
    "seed": dict(rho=1.0, seed=1),  # in another order
    "rho": dict(rho=0.35),
    "single": dict(rho=0.2, sft_batch=1),  # fewer rows than ranks
    "odd": dict(rho=0.5, sft_batch=5),
    "once-copies": dict(rho=0.35, gather_once=True, replicas=int(os.environ.get("WORLD_SIZE", 1))),
    "pear-sequence": dict(rho=1.0, pear="sequence", behavior_model="other"),
    "pear-token": dict(
        rho=0.5, pear="token", pear_gamma=0.9, pear_ratio_low=-math.inf, pear_ratio_high=math.inf,
        behavior_model="other",
    ),
    "pear-block": dict(
        rho=1.0, pear="block", pear_gamma=0.9, pear_block=3, pear_weight_low=-0.5,
        pear_weight_high=0.5, behavior_model="other",
    ),
    "pear-column": dict(rho=1.0, pear="token", behavior_model="other"),
    "pear-before": dict(rho=1.0, pear="token", sft_batch=8, pear_gamma=0.9),
}
# fmt: on
MICRO_TOKENS = (30, 130, 100_000)
SGD = 0.5  # learning rate of the plain steps that stand in for AdamW's: far enough to be off-policy


@contextlib.contextmanager
def plain_steps():
    """Optimizer steps are plain gradient descent, and append their gradients to what this gives."""
    gradients = []

    def step(run, which, *rest):
        gradients.append(whole(run, [p.grad.to_local() for p in run.policy.parameters()]))
        with torch.no_grad():
            for p in run.policy.parameters():
                p.to_local().sub_(SGD * p.grad.to_local())
        run.optimizers[which].zero_grad()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mifo, "optimizer_step", step)
        yield gradients


@case()
def rl_gradients(folder):
    """{(name, micro_tokens): gradients of an RL step's optimizer steps, on all questions}."""
    found = {}
    for (name, settings), micro in itertools.product(RL_STEPS.items(), MICRO_TOKENS):
        out = folder / f"rl-{name}-{micro}"
        run = open_run(out, questions=16, probe_bound=1e9, micro_tokens=micro, **settings)
        run.sampler = FixedSampler()
        if name == "sequence":
            run.pad_id = run.tokenizer.eos_token_id
        with plain_steps() as gradients:
            mifo.rl_step(run)
        found[name, micro] = gradients
    return found


def response_logprobs(model, prompt, response, temperature=1.0):
    """A response's log-probabilities and entropies, from transformers' full logits, no padding."""
    tokens = torch.tensor([prompt + response])
    logits = model(input_ids=tokens).logits[0, len(prompt) - 1 : -1] / temperature
    logp = torch.log(torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True))
    return logp[torch.arange(len(response)), response], -(logp.exp() * logp).sum(-1)


def rewarded_samples(cfg) -> list:
    """(prompt, sample, advantage) of FixedSampler's responses to all questions, as drawn."""
    questions, tokenizer, rows = sixteen_questions(), data.embedded_tokenizer(), []
    for index in data.draw(16, cfg.seed, 0, 16):
        q = questions[index]
        [group] = FixedSampler().sample([q.prompt], 4, [0], 60, 1.0)
        texts = [tokenizer.decode(s.tokens, skip_special_tokens=True) for s in group]
        verdicts = StandInChecker().check(texts, [q.answer] * 4, None)
        rewards = [float(verdict == "correct") for verdict in verdicts]
        scale = statistics.stdev(rewards) + 1e-6 if cfg.normalize_std else 1.0
        for sample, reward in zip(group, rewards):
            rows.append((q.prompt, sample, (reward - statistics.mean(rewards)) / scale))
    return rows


def rl_step_oracle(base: Path, settings: dict, old_by="trainer") -> list[dict]:
    """The gradients of an RL step's optimizer steps, response by response in float64.

    old_by may name a wrong source of the old log-probabilities: "engine"; "latest", the policy of
    each optimizer step.
    """
    cfg = mifo.Config(**settings)
    model, initial, rows = float_model(base), float_model(base), rewarded_samples(cfg)
    size, gradients = len(rows) // cfg.updates, []
    for first in range(0, len(rows), size):
        batch = rows[first : first + size]
        batch = [row for row in batch if not (cfg.mask_truncated and row[1].truncated)]
        divisor = {
            "token": sum(len(sample.tokens) for _, sample, _ in batch),
            "sequence": len(batch),
            "constant": len(batch) * 60,
        }[cfg.aggregation]
        model.zero_grad()
        for prompt, sample, advantage in batch:
            if advantage == 0:
                continue  # a group without variance carries no gradient, and is counted
            logprobs, _ = response_logprobs(model, prompt, sample.tokens, cfg.temperature)
            with torch.no_grad():  # the initial policy is that before the first optimizer step
                before, _ = response_logprobs(initial, prompt, sample.tokens, cfg.temperature)
            old = {
                "trainer": before,
                "engine": torch.tensor(sample.logprobs, dtype=torch.float64),
                "latest": logprobs.detach(),
            }[old_by]
            gains, _ = grpo_oracle(
                logprobs,
                old,
                advantage,
                cfg.clip_low,
                cfg.clip_high,
                before if cfg.kl_coef else None,
                cfg.kl_coef,
                torch.tensor(sample.logprobs, dtype=torch.float64),
                cfg.tis_cap,
            )
            gain = gains.mean() if cfg.aggregation == "sequence" else gains.sum()
            (-gain / divisor).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(SGD * p.grad)
    return gradients


def check_gradients(found: dict, name: str, oracle: list[dict]) -> None:
    """Any split, padding and order, one rank or two: the gradients of the explicit formula."""
    undivided = found[1][0][name, MICRO_TOKENS[-1]]
    for world, ranks in found.items():
        for rank, micro in itertools.product(ranks, MICRO_TOKENS):
            gradients = rank[name, micro]
            assert len(gradients) == len(oracle)
            for gradient, same, expected in zip(gradients, undivided, oracle):
                assert distance(gradient, same) < 1e-6, (world, micro)
                assert distance(gradient, expected) < 2e-6, (world, micro)  # float32's rounding


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The base model that every run of the cases begins with, and beside it the other model."""
    return make_folder(tmp_path_factory.mktemp("base")) / "embedded-base-0"


@pytest.mark.parametrize("name", RL_STEPS)
def test_gradients_of_an_rl_step(rl_gradients, base, name):
    check_gradients(rl_gradients, name, rl_step_oracle(base, RL_STEPS[name]))


@pytest.mark.parametrize("wrong", ["engine", "latest"])
def test_the_second_update_is_off_the_trainers_policy_before_the_first(rl_gradients, base, wrong):
    """Neither the engine's log-probabilities nor those of the policy at hand give the same step."""
    first, second = rl_step_oracle(base, RL_STEPS["updates"], wrong)
    right = rl_gradients[1][0]["updates", MICRO_TOKENS[0]]
    assert distance(right[1], second) > 0.01
    assert (distance(right[0], first) > 0.01) == (wrong == "engine")


def test_order_of_rl_rows_does_not_matter(rl_gradients):
    """Another seed draws the questions in another order: other ranks, other micro-batches."""
    assert data.draw(16, 0, 0, 16) != data.draw(16, 1, 0, 16)
    for ranks in rl_gradients.values():
        assert distance(ranks[0]["seed", 130][0], ranks[0]["token", 30][0]) < 1e-6


def behavior_column(index: int, length: int) -> list[float]:
    """What the data gives as behavior_logprobs of a demonstration, in the case "pear-column"."""
    rng = random.Random(index)
    return [-3 * rng.random() for _ in range(length)]


@case()
def sft_gradients(folder):
    """{(name, micro_tokens): (batches, gradients of their steps)}; one step or two."""
    found = {}
    for (name, settings), micro in itertools.product(SFT_STEPS.items(), MICRO_TOKENS):
        settings = dict(sft_batch=16, sft_epochs=1, micro_tokens=micro) | settings
        if "behavior_model" in settings:
            settings["behavior_model"] = folder / settings["behavior_model"]
        run = open_run(folder / f"sft-{name}-{micro}", **settings)
        run.sampler = FixedSampler()
        if name == "odd":
            run.pad_id = run.tokenizer.eos_token_id
        if name == "pear-column":
            for i, q in enumerate(run.questions):
                column = behavior_column(i, len(q.demonstration))
                run.questions[i] = dataclasses.replace(q, behavior_logprobs=column)
        mifo.begin_sft(run, list(range(min(16, 2 * run.cfg.sft_batch))))
        batches = [list(batch) for batch in run.state.sft_queue]
        with plain_steps() as gradients:
            while run.state.sft_queue:
                mifo.sft_step(run)
        found[name, micro] = batches, gradients
    return found


def sft_step_oracle(base: Path, settings: dict, batches, behavior_by: str) -> list[dict]:
    """The gradients of SFT steps, demonstration by demonstration in float64.

    behavior_by: "other", the model beside the base model; "column", the data; "before", the policy
    before the first step.
    """
    cfg = mifo.Config(**settings)
    model, questions = float_model(base), sixteen_questions()
    behavior_model = float_model(base.with_name("other") if behavior_by == "other" else base)
    gradients = []
    for batch in batches:
        losses_of_rows, count = [], 0
        for index in batch:
            q = questions[index]
            n = len(q.demonstration)
            logprobs, entropy = response_logprobs(model, q.prompt, q.demonstration)
            chosen = entropy.argsort(descending=True)[: math.ceil(cfg.rho * n - 1e-9)]
            weights = torch.ones(n, dtype=torch.float64)
            if cfg.pear != "off":
                with torch.no_grad():
                    behavior, _ = response_logprobs(behavior_model, q.prompt, q.demonstration)
                if behavior_by == "column":
                    behavior = torch.tensor(behavior_column(index, n))
                weights = pear_oracle(
                    logprobs,
                    behavior,
                    cfg.pear,
                    cfg.pear_gamma,
                    cfg.pear_block,
                    (cfg.pear_ratio_low, cfg.pear_ratio_high),
                    (cfg.pear_weight_low, cfg.pear_weight_high),
                )
            losses_of_rows.append(-(logprobs * weights)[chosen].sum())
            count += len(chosen)
        model.zero_grad()
        (sum(losses_of_rows) / count).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(SGD * p.grad)
    return gradients


@pytest.mark.parametrize("name", SFT_STEPS)
def test_gradients_of_sft_steps(sft_gradients, base, name):
    """PEAR's weights by --behavior-model, the data's column, or with neither the base model."""
    behavior_by = {"pear-column": "column", "pear-before": "before"}.get(name, "other")
    batches, _ = sft_gradients[1][0][name, 30]
    assert sorted(sum(batches, [])) == list(range(sum(map(len, batches))))
    gradients = {}
    for world, ranks in sft_gradients.items():
        assert all(rank[key][0] == batches for rank in ranks for key in rank if key[0] == name)
        gradients[world] = [{key: value for key, (_, value) in rank.items()} for rank in ranks]
    check_gradients(gradients, name, sft_step_oracle(base, SFT_STEPS[name], batches, behavior_by))


def test_behavior_logprobs_have_one_source(sft_gradients, base):
    """Each of the three would give another gradient, in the second step at the latest."""
    wrong_sources = {"pear-column": "other", "pear-before": "other", "pear-token": "before"}
    for name, wrong in wrong_sources.items():
        batches, gradients = sft_gradients[1][0][name, 30]
        oracle = sft_step_oracle(base, SFT_STEPS[name], batches, wrong)
        assert distance(gradients[-1], oracle[-1]) > 0.01, name
    batches, gradients = sft_gradients[1][0]["pear-before", 30]
    assert len(batches) == 2
    no_difference = SFT_STEPS["pear-before"] | dict(pear_ratio_low=-1e-9, pear_ratio_high=1e-9)
    no_difference = sft_step_oracle(base, no_difference, batches, "before")
    assert distance(gradients[0], no_difference[0]) < 2e-6
    assert distance(gradients[1], no_difference[1]) > 0.01


def test_order_of_demonstrations_does_not_matter(sft_gradients):
    for ranks in sft_gradients.values():
        [batch], [gradient] = ranks[0]["all", 30]
        [other_batch], [other_gradient] = ranks[0]["seed", 130]
        assert batch != other_batch
        assert distance(other_gradient, gradient) < 1e-6


# --------------------------------------------------------------------------------------------------
# Freezing


def noise_like(i: int, shape) -> torch.Tensor:
    """Of the i-th parameter, the same on any number of ranks: half of its entries are exactly 0."""
    noise = 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(i))
    still = torch.rand(shape, generator=torch.Generator().manual_seed(100 + i)) < 0.5
    return noise.masked_fill(still, 0.0)


def move_weights(run) -> None:
    """What an RL phase might do to them, from its start on."""
    mifo.set_anchor(run)
    with torch.no_grad():
        for i, p in enumerate(run.policy.parameters()):
            noise = noise_like(i, p.shape)
            p.add_(distribute_tensor(noise, p.device_mesh, p.placements, src_data_rank=None))


@case()
def frozen_share(folder):
    run = open_run(folder / "threshold", k=0.3)
    move_weights(run)
    mifo.begin_sft(run, [0])
    return run.state.threshold, run.log["sft/frozen_share"]


def test_threshold_does_not_depend_on_ranks(frozen_share, base):
    moved = []
    for i, p in enumerate(float_model(base, torch.float32).parameters()):
        p = p.detach()
        moved.append(((p + noise_like(i, p.shape)) - p).abs().flatten())
    moved = torch.cat(moved).sort(descending=True).values
    k = math.floor(0.3 * len(moved))
    for ranks in frozen_share.values():
        for threshold, share in ranks:
            assert threshold == moved[k].item()
            assert share == (moved > moved[k]).sum().item() / len(moved)


@case()
def frozen_steps(folder):
    """An SFT phase of three steps, its clip tight: what went into each and what came out."""
    run = open_run(folder / "frozen-steps", sft_clip=0.05, sft_batch=2, sft_epochs=1)
    move_weights(run)
    mifo.begin_sft(run, [0, 1, 2, 3, 4, 5])
    start, steps, step = whole(run, run.shards), [], mifo.optimizer_step

    def recorded_step(run, which, *rest):
        parameters = list(run.policy.parameters())
        found = {"gradients": whole(run, [p.grad.to_local() for p in parameters])}
        step(run, which, *rest)
        found["weights"] = whole(run, run.shards)
        for key in ("exp_avg", "exp_avg_sq"):
            moments = [run.optimizers["sft"].state[p][key].to_local() for p in parameters]
            found[key] = whole(run, moments)
        steps.append(found | {"norm": run.log["sft/grad_norm"]})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mifo, "optimizer_step", recorded_step)
        while run.state.sft_queue:
            mifo.sft_step(run)
    return start, whole(run, run.importance), run.state.threshold, steps


def test_what_is_frozen_counts_neither_in_the_clip_nor_in_the_moments(frozen_steps):
    """AdamW on gradients that are 0 where frozen, clipped by their own norm, then restored."""
    for ranks in frozen_steps.values():
        start, importance, threshold, steps = ranks[0]
        assert len(steps) == 3
        free = {n: c <= threshold for n, c in importance.items()}
        weights = {n: torch.nn.Parameter(w.double()) for n, w in start.items()}
        adam = torch.optim.AdamW(weights.values(), 1e-3, (0.9, 0.999), weight_decay=0.01)
        for step in steps:
            gradients = {n: g.double() * free[n] for n, g in step["gradients"].items()}
            norm, raw = (
                math.sqrt(sum((g.double() ** 2).sum().item() for g in them.values()))
                for them in (gradients, step["gradients"])
            )
            assert raw > 1.05 * norm > 1.05 * 0.05  # the clip bites; the frozen would count
            assert step["norm"] == pytest.approx(norm, rel=1e-5)
            for n, w in weights.items():
                w.grad = gradients[n] * 0.05 / (norm + 1e-6)
            adam.step()
            for n, w in weights.items():
                w.data = torch.where(free[n], w.data, start[n].double())
                assert torch.equal(step["weights"][n][~free[n]], start[n][~free[n]])
                for key in ("exp_avg", "exp_avg_sq"):
                    assert not step[key][n][~free[n]].any()
                    expected = adam.state[w][key]
                    assert (step[key][n] - expected).abs().max() <= 1e-4 * expected.abs().max()
                torch.testing.assert_close(step["weights"][n].double(), w.data, rtol=0, atol=1e-6)


@case()
def importance_by_phase(folder):
    """The weights where each RL and SFT phase ends, with importance, anchor and threshold then."""
    run = open_run(folder / "phases", steps=9, buffer_size=3, alpha=0.7)
    begin, end = mifo.begin_sft, mifo.end_sft
    phases = [{"rl begins": whole(run, run.shards)}]

    def recorded_begin(run, indices):
        weights = whole(run, run.shards)
        begin(run, indices)
        phases[-1] |= {
            "rl ends": weights,
            "importance": whole(run, run.importance),
            "anchor": whole(run, run.anchor),
            "threshold": run.state.threshold,
        }

    def recorded_end(run):
        end(run)
        weights = whole(run, run.shards)
        phases[-1] |= {"sft ends": weights, "anchor then": whole(run, run.anchor)}
        phases[-1]["threshold then"] = run.state.threshold
        phases.append({"rl begins": weights})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mifo, "begin_sft", recorded_begin)
        patch.setattr(mifo, "end_sft", recorded_end)
        mifo.train(run)
    return [phase for phase in phases if "sft ends" in phase]


def test_importance_is_measured_from_the_end_of_the_sft_phase_before(importance_by_phase):
    for ranks in importance_by_phase.values():
        assert len(ranks[0]) >= 3
        expected = {n: torch.zeros_like(w) for n, w in ranks[0][0]["rl begins"].items()}
        for phase in ranks[0]:
            for n in expected:
                moved = (phase["rl ends"][n] - phase["rl begins"][n]).abs()
                expected[n] = 0.7 * expected[n] + moved
                torch.testing.assert_close(
                    phase["importance"][n], expected[n], rtol=1e-5, atol=1e-12
                )
                assert torch.equal(phase["anchor"][n], phase["rl ends"][n])
                assert torch.equal(phase["anchor then"][n], phase["sft ends"][n])
            assert phase["threshold"] < phase["threshold then"] == math.inf
            assert distance(phase["sft ends"], phase["rl ends"]) > 1e-3  # or this shows little


# fmt: off
PRESETS = {
    "mifo": dict(),
    "grpo": dict(schedule="rl"),
    "sft": dict(schedule="sft"),
    "sft-then-rl": dict(schedule="sft-then-rl"),
    "without-freezing": dict(freeze="off", buffer_size=2),
    "without-selection": dict(rho=1, buffer_size=2),
    "without-both": dict(freeze="off", rho=1, buffer_size=2),
    "dagger": dict(alpha=0, offload_importance=True),
    "zero-grad-only": dict(freeze="zero-grad-only"),
    "pear-sequence": dict(schedule="sft-then-rl", pear="sequence"),
    "pear-token": dict(schedule="sft-then-rl", pear="token"),
    "pear-block": dict(schedule="sft-then-rl", pear="block"),
    "pear-mifo": dict(pear="token", buffer_size=2),
    "gather-once": dict(gather_once=True, micro_tokens=60, updates=2, kl_coef=0.1, buffer_size=2),
}
# fmt: on
LONG_PRESETS = ("mifo", "dagger", "zero-grad-only")  # nine RL steps, so several SFT phases


@functools.cache
def train_preset(folder: Path, name: str) -> Path:
    """In a rank's process: the preset's run, trained by the first case that asks for it."""
    short = {} if name in LONG_PRESETS else dict(steps=3, sft_batch=8, sft_epochs=1)
    return trained(folder / f"preset-{name}", **(short | PRESETS[name]))


@case()
def mifo_run(folder):
    return train_preset(folder, "mifo")


@case()
def dagger_run(folder):
    return train_preset(folder, "dagger")


def sft_phases(run: Path) -> list[list[Path]]:
    """The checkpoints of each SFT phase, from the RL step's that triggers it to its last step's."""
    phases, folders = [], checkpoints_of(run)
    for before, folder in zip(folders, folders[1:]):
        if checkpoint_state(folder)["sft_steps"] > checkpoint_state(before)["sft_steps"]:
            if checkpoint_state(before)["sft_phases"] > len(phases):
                phases.append([before])
            phases[-1].append(folder)
    return [phase for phase in phases if not checkpoint_state(phase[-1])["sft_queue"]]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("alpha", [0.9, 0.0])
def test_frozen_entries_stay_and_the_rest_moves(mifo_run, dagger_run, base, world, alpha):
    """Importance follows the checkpoints' weights; what it freezes stays, moments warm or cold."""
    run = (mifo_run if alpha else dagger_run)[world][0]
    phases = sft_phases(run)
    assert len(phases) >= 2
    before = {n: p.detach() for n, p in float_model(base, torch.float32).named_parameters()}
    c, warm = {n: 0 for n in before}, 0
    lines = {line["step"]: line for line in metrics_of(run)}
    for phase in phases:
        thresholds = [checkpoint_state(folder)["threshold"] for folder in phase]
        assert all(map(math.isfinite, thresholds[:-1])) and thresholds[-1] == math.inf
        first = checkpoint_tensors(phase[0])
        start, importance = of_kind(first, "weight/"), of_kind(first, "importance/")
        for n in start:
            c[n] = alpha * c[n] + (start[n] - before[n]).abs()
            torch.testing.assert_close(importance[n], c[n], rtol=1e-5, atol=1e-12)
        values = torch.cat([t.flatten() for t in importance.values()]).sort(descending=True).values
        k, threshold = math.floor(0.5 * len(values)), thresholds[0]
        assert threshold == values[k].item()
        frozen = {n: t > threshold for n, t in importance.items()}
        count = sum(f.sum().item() for f in frozen.values())
        assert k - (values == threshold).sum().item() < count <= k
        share = lines[checkpoint_state(phase[0])["step"]]["sft/frozen_share"]
        assert share == pytest.approx(count / len(values))
        for folder in phase[1:]:
            now = of_kind(checkpoint_tensors(folder), "weight/")
            for n in now:
                assert torch.equal(now[n][frozen[n]], start[n][frozen[n]]), (folder, n)
        free = torch.cat([(now[n] != start[n])[~frozen[n]] for n in now])
        assert free.float().mean() > 0.95
        moments = of_kind(first, "sft/exp_avg/")
        warm += any((moments[n][frozen[n]] != 0).any() for n in moments)
        before = now
    assert warm  # a later phase froze entries that the optimizer would have moved
    later = [line for line in lines.values() if line["phase"] == "sft" and line["sft_phases"] > 1]
    assert all(line["sft/frozen_movement"] > 0 for line in later)


@case()
def zero_grad_only_run(folder):
    return train_preset(folder, "zero-grad-only")


def test_zero_gradients_alone_do_not_hold_a_parameter(zero_grad_only_run):
    run = zero_grad_only_run[1][0]
    phases = sft_phases(run)
    assert len(phases) >= 2
    start, end = checkpoint_tensors(phases[1][0]), checkpoint_tensors(phases[1][-1])
    threshold = checkpoint_state(phases[1][0])["threshold"]
    moved = 0.0
    for n, c in of_kind(start, "importance/").items():
        movement = (end["weight/" + n] - start["weight/" + n]).abs()
        moved = max(moved, torch.where(c > threshold, movement, 0.0).max().item())
    lines = metrics_of(run)
    second = [line for line in lines if line["phase"] == "sft" and line["sft_phases"] == 2]
    assert second[-1]["sft/frozen_movement"] == pytest.approx(moved) and moved > 1e-5


def test_sft_moments_outlast_an_interleaved_phase(mifo_run):
    """The SFT optimizer goes on in the next phase where it stopped."""
    for ranks in mifo_run.values():
        last = checkpoints_of(ranks[0])[-1]
        state = checkpoint_state(last)
        assert state["sft_phases"] >= 2
        steps = of_kind(checkpoint_tensors(last), "sft/step/").values()
        assert {t.item() for t in steps} == {state["sft_steps"]}


@case()
def buffers(folder):
    """The buffer after each of two RL steps on the same questions, and of a third after SFT."""
    run = open_run(folder / "buffers", questions=16, p=0, buffer_size=16, probe_bound=1e9)
    run.sampler, found = FixedSampler(), []

    def rl_step():
        mifo.rl_step(run)
        run.state.step += 1
        found.append(list(run.state.buffer))

    rl_step()
    rl_step()
    mifo.begin_sft(run, run.state.buffer)
    run.state.buffer = []
    while run.state.sft_queue:
        mifo.sft_step(run)
    mifo.end_sft(run)
    rl_step()
    return found


def test_a_hard_question_stands_in_the_buffer_once_until_it_is_learnt(buffers):
    rows = rewarded_samples(mifo.Config())  # of p = 0 each of a question's four answers is wrong
    first = data.draw(16, 0, 0, 16)
    tokenizer, questions = data.embedded_tokenizer(), sixteen_questions()
    hard = []
    for place, index in enumerate(first):
        group = [sample for _, sample, _ in rows[4 * place : 4 * place + 4]]
        texts = [tokenizer.decode(s.tokens, skip_special_tokens=True) for s in group]
        if "correct" not in StandInChecker().check(texts, [questions[index].answer] * 4, None):
            hard.append(index)
    again = [index for index in data.draw(16, 0, 32, 16) if index in hard]
    assert len(hard) >= 3 and again != hard
    for ranks in buffers.values():
        for found in ranks:
            assert found == [hard, hard, again]


def test_questions_and_buffer_do_not_depend_on_ranks(mifo_run):
    one, two = (mifo_run[world][0] for world in (1, 2))
    assert [f.name for f in checkpoints_of(one)] == [f.name for f in checkpoints_of(two)]
    for pair in zip(checkpoints_of(one), checkpoints_of(two)):
        a, b = map(checkpoint_state, pair)
        for state in (a, b):
            del state["seconds"], state["threshold"]  # sums are rounded in another order
        assert a == b
        assert len(set(a["buffer"])) == len(a["buffer"]) < 5
    lines = [json_lines(run / "samples.jsonl") for run in (one, two)]
    assert lines[0] == lines[1]
    # every question that is never solved has been kept, in the order of the stream
    questions, last = sixteen_questions(), checkpoint_state(checkpoints_of(one)[-1])
    hard = [index for index in data.draw(16, 0, 0, 16) if int(questions[index].answer) % 3 == 0]
    kept = dict.fromkeys(last["demonstrations"] + last["buffer"])
    assert hard and [index for index in kept if index in hard] == hard


# --------------------------------------------------------------------------------------------------
# Checkpoints


def main_killed_at(step: int, samplers: str = "") -> None:
    """In a rank's process: mifo.py's main(), killed before the optimizer step of the given step."""
    stand_ins()
    made, optimizer_step, make_sampler = [], mifo.optimizer_step, rollout.make_sampler

    def dying_step(run, *rest):
        if run.state.step + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer_step(run, *rest)

    def kept_sampler(*args, **kwargs):
        made.append(make_sampler(*args, **kwargs))
        return made[0]

    mifo.optimizer_step, rollout.make_sampler = dying_step, kept_sampler
    code = mifo.main() or 0
    if samplers:
        run_samplers(made[0], Path(samplers))
    sys.stdout.flush()
    os._exit(code)


def check_kill_and_resume(folder: Path, world: int, samplers="", **settings) -> None:
    """A run that is killed in an RL step and inside an SFT phase ends as if it had not been."""
    make_folder(folder)

    def launch(out, *more, step=-1, samplers=""):
        evaluate = dict(evaluate="chain", eval_every=2, eval_sft_phases=True)
        chosen = COMMON | dict(save_every=2) | evaluate | settings
        argv = [
            "mifo.py",
            *as_flags(recipe=folder / "empty.toml", out=folder / out, **chosen),
            *more,
        ]
        call = f"sys.argv = {argv!r}; t.main_killed_at({step}, {samplers!r})"
        codes = finish(start(folder, world, call))
        expected = (0,) if step < 0 else (-signal.SIGKILL, 1)
        assert all(code in expected for code in codes), (codes, outputs(folder, world))
        assert step < 0 or -signal.SIGKILL in codes

    launch("straight", samplers=samplers)
    lines = [{}, *metrics_of(folder / "straight")]  # lines[s]: of step s
    phases = [line.get("phase") for line in lines]
    # The checkpoint before the killed step lies two steps back, in the same phase; if possible just
    # after an evaluation.
    within = {"rl": [], "sft": []}
    for s in range(4, len(lines), 2):
        if len(set(phases[s - 2 : s + 1])) == 1:
            within[phases[s]].append(s)
    after_evaluation = lambda s: "evaluation" in lines[s - 2] and "evaluation" not in lines[s - 1]
    for s in sorted((max(within["rl"], key=after_evaluation), within["sft"][0])):
        launch("killed", *["--resume"] * (folder / "killed").exists(), step=s)
        assert checkpoint_state(checkpoints_of(folder / "killed")[-1])["step"] == s - 2
        assert len(metrics_of(folder / "killed")) == s - 1
    launch("killed", "--resume")

    straight, killed = (checkpoints_of(folder / out) for out in ("straight", "killed"))
    assert [f.name for f in straight] == [f.name for f in killed]
    files = sorted(path.relative_to(straight[-1]) for path in straight[-1].rglob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        a, b = load_file(straight[-1] / file), load_file(killed[-1] / file)
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), key
    assert of_kind(checkpoint_tensors(straight[-1]), "rl/exp_avg/")
    a, b = checkpoint_state(straight[-1]), checkpoint_state(killed[-1])
    assert a | {"seconds": 0} == b | {"seconds": 0}
    for name in ("samples.jsonl", "evaluations.jsonl"):
        assert (folder / "straight" / name).read_text() == (folder / "killed" / name).read_text()
    check_evaluations(folder / "straight")
    assert [line["step"] for line in lines[1:]] == list(range(1, len(lines)))
    assert metrics_of(folder / "killed") == lines[1:]


def check_evaluations(out: Path) -> None:
    """A line before the first step, at every second RL step, around each SFT phase, at the end."""
    metrics, lines = metrics_of(out), json_lines(out / "evaluations.jsonl")
    phases = [line["phase"] for line in metrics] + ["end"]
    edges = {i for i, phase in enumerate(phases) if i and {phases[i - 1], phase} & {"sft"}}
    edges = {i for i in edges if phases[i - 1] != phases[i]}
    even = {line["step"] for line in metrics if line["phase"] == "rl" and line["rl_steps"] % 2 == 0}
    assert [line["step"] for line in lines] == sorted({0, len(metrics)} | edges | even)
    assert len(edges) >= 2
    for line in lines:
        done = [m["phase"] for m in metrics[: line["step"]]]
        assert (line["rl_steps"], line["sft_steps"]) == (done.count("rl"), done.count("sft"))
        chain = line["benches"]["chain"]
        assert chain["avg"] == pytest.approx(sum(chain["correct"]) / len(chain["correct"]))


@pytest.fixture(scope="session")
def vllm_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm")


def needs_vllm():
    if problem := rollout.vllm_problem():
        pytest.skip(problem)


def test_killed_and_resumed_through_vllm(vllm_folder):
    needs_vllm()
    check_kill_and_resume(vllm_folder, 1, str(vllm_folder / "samplers"), sampler="vllm")


def test_killed_and_resumed_on_two_ranks(tmp_path):
    check_kill_and_resume(tmp_path, 2)


def resume_elsewhere(source: Path, out: Path) -> Path:
    """Continues a run of COMMON's settings from its fifth checkpoint on the ranks of this case."""
    half = checkpoints_of(source)[4]
    if os.environ["RANK"] == "0":
        shutil.copytree(half, out / "checkpoints" / half.name)
        for name in ("metrics.jsonl", "samples.jsonl"):
            shutil.copy(source / name, out / name)
    run = open_run(out)
    mifo.barrier(run)
    mifo.load_checkpoint(run, out / "checkpoints" / half.name)
    mifo.train(run)
    return out


@case(worlds=(2,))
def from_one_rank_to_two(folder):
    return resume_elsewhere(folder.parent / "1" / "preset-mifo", folder / "grown")


@case(worlds=(1,), late=True)
def from_two_ranks_to_one(folder):
    return resume_elsewhere(folder.parent / "2" / "preset-mifo", folder / "shrunk")


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_resumed_on_another_number_of_ranks(
    mifo_run, from_one_rank_to_two, from_two_ranks_to_one, before, after
):
    """Sums are rounded in another order, so: the same course and nearly the same weights."""
    straight = mifo_run[before][0]
    out = (from_one_rank_to_two | from_two_ranks_to_one)[after][0]
    course = checkpoints_of(straight)
    last, resumed = course[-1], checkpoints_of(out)[-1]
    assert last.name == resumed.name
    assert [len(list(f.glob(STATE_FILES))) for f in (last, resumed)] == [before, after]
    a, b = checkpoint_tensors(last), checkpoint_tensors(resumed)
    assert a.keys() == b.keys()
    then, now = of_kind(checkpoint_tensors(course[4]), "weight/"), of_kind(a, "weight/")
    assert distance(of_kind(b, "weight/"), now) < 0.02 * distance(now, then)
    assert distance(of_kind(b, "importance/"), of_kind(a, "importance/")) < 0.02
    assert all(a[key] == b[key] for key in a if "/step/" in key)
    lines = [metrics_of(run) for run in (straight, out)]
    steps = [[(x["step"], x["phase"], x["buffer"]) for x in metrics] for metrics in lines]
    assert steps[0] == steps[1]
    assert lines[0][:5] == lines[1][:5]


# --------------------------------------------------------------------------------------------------
# Samplers

PROMPTS = [random.Random(i).choices(range(2, 27), k=k) for i, k in enumerate((3, 9, 1, 9, 14, 5))]
SEEDS = [1000 * i for i in range(6)]


def run_samplers(engine, out: Path) -> None:
    """Both samplers with pushed weights on the same prompts; results and weights go to `out`."""
    base = out.parent / "embedded-base-0"
    model = float_model(base, torch.float32)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(out / "pushed")
    plain = rollout.make_sampler(
        "torch", str(base), max_len=84, dtype=torch.float32, eos_ids=EOS_IDS, max_num_seqs=32
    )
    found = {}
    for name, sampler in (("vllm", engine), ("torch", plain)):
        sampler.sample(PROMPTS, 1, SEEDS, 4, 0.0)  # fills a prefix cache with the old weights' keys
        sampler.push((n, p.detach()) for n, p in model.named_parameters())
        state = torch.get_rng_state()
        pairs = list(zip(PROMPTS, SEEDS))[:2]
        found[name] = {
            "greedy": sampler.sample(PROMPTS, 1, SEEDS, 30, 0.0),
            "sampled": sampler.sample(PROMPTS, 8, SEEDS, 40, 0.7),
            "again": sampler.sample(PROMPTS, 8, SEEDS, 40, 0.7),
            "reversed": sampler.sample(PROMPTS[::-1], 8, SEEDS[::-1], 40, 0.7)[::-1],
            "alone": [sampler.sample([prompt], 8, [seed], 40, 0.7)[0] for prompt, seed in pairs],
            "other seeds": sampler.sample(PROMPTS, 8, [seed + 100 for seed in SEEDS], 40, 0.7),
        }
        assert torch.equal(state, torch.get_rng_state())
    torch.save(found, out / "found.pt")


@pytest.fixture(scope="session")
def sampled(vllm_folder):
    """What run_samplers found, by sampler, and the model whose weights it pushed."""
    if not (vllm_folder / "samplers" / "found.pt").exists():
        pytest.skip("needs the run of test_killed_and_resumed_through_vllm")
    found = torch.load(vllm_folder / "samplers" / "found.pt", weights_only=False)
    return found, float_model(vllm_folder / "samplers" / "pushed", torch.float32)


def check_sample(model, prompt, sample, temperature, limit) -> None:
    """A response against transformers' own forward pass on this row, its limit and end-of-text."""
    tokens = torch.tensor([prompt + sample.tokens])
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[0, len(prompt) - 1 : -1]
    if temperature == 0:
        assert logits.argmax(-1).tolist() == sample.tokens
    logprobs = (logits / (temperature or 1)).log_softmax(-1)
    logprobs = logprobs[torch.arange(len(sample.tokens)), sample.tokens]
    assert (logprobs - torch.tensor(sample.logprobs)).abs().max() < 1e-4
    assert len(sample.tokens) == len(sample.logprobs) <= limit
    assert not set(sample.tokens[:-1]) & set(EOS_IDS)
    assert sample.truncated == (sample.tokens[-1] not in EOS_IDS)
    assert len(sample.tokens) == limit or not sample.truncated


@pytest.mark.parametrize("name", ["vllm", "torch"])
def test_sampler_computes_what_transformers_does(sampled, name):
    found, model = sampled
    last = set()
    for i, prompt in enumerate(PROMPTS):
        check_sample(model, prompt, found[name]["greedy"][i][0], 0, 30)
        for sample in found[name]["sampled"][i]:
            check_sample(model, prompt, sample, 0.7, 40)
            last.add(sample.tokens[-1])
    assert last >= set(EOS_IDS)  # each of the end-of-text tokens has ended a response


@pytest.mark.parametrize("name", ["vllm", "torch"])
def test_sampler_depends_on_the_seed_alone(sampled, name):
    found = {}
    for key, groups in sampled[0][name].items():
        found[key] = [[s.tokens for s in group] for group in groups]
    assert found["sampled"] == found["again"] == found["reversed"]
    assert found["alone"] == found["sampled"][:2]
    assert found["sampled"] != found["other seeds"]
    for group in found["sampled"]:
        assert any(tokens != group[0] for tokens in group)


def test_samplers_agree(sampled):
    for [a], [b] in zip(sampled[0]["vllm"]["greedy"], sampled[0]["torch"]["greedy"]):
        assert a.tokens == b.tokens and a.truncated == b.truncated
        assert max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs)) < 1e-4


def test_torch_sampler_drops_rows_without_changing_any(tmp_path):
    """Against a sampler that ends no row, and batches of one; token 0 pads on the left, too."""
    base = tiny_model(tmp_path / "model", 3)

    def sample(eos_ids, max_num_seqs=512):
        sampler = rollout.make_sampler(
            "torch",
            base,
            max_len=60,
            dtype=torch.float32,
            eos_ids=eos_ids,
            max_num_seqs=max_num_seqs,
        )
        return sum(sampler.sample(PROMPTS, 8, SEEDS, 40, 1.0), [])

    endless = sample([99])
    for eos_ids in ([1, 9], [0], [4, 20, 26]):
        lengths = set()
        for s, w, t in zip(sample(eos_ids), endless, sample(eos_ids, max_num_seqs=1)):
            ends = [i + 1 for i, token in enumerate(w.tokens) if token in eos_ids]
            stop = ends[0] if ends else 40
            assert s.tokens == w.tokens[:stop] == t.tokens
            assert s.truncated == t.truncated == (w.tokens[stop - 1] not in eos_ids)
            assert max(abs(a - b) for a, b in zip(s.logprobs, w.logprobs)) < 1e-5
            lengths.add(stop)
        assert len(lengths) > 5 and min(lengths) < 8


@case(worlds=(1,))
def weights_never_arrive(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout.TorchSampler, "push", lambda self, weights: list(weights) and None)
        with pytest.raises(mifo.Stopped) as error:
            mifo.train(open_run(folder / "sabotaged", rl_lr=0.1, probe_bound=0.05))
    return str(error.value)


def test_probe_stops_a_run_whose_weights_do_not_arrive(weights_never_arrive):
    [message] = weights_never_arrive[1]
    for part in ("--probe-bound", "0.05", "does not hold the trainer's weights", "torch"):
        assert part in message


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


# --------------------------------------------------------------------------------------------------
# Faults


def watched_training(run, poison=None, when=lambda phase, state: False) -> dict:
    """Trains a run whose log-probabilities go through poison(tokens, logprobs, phase) at times.

    The finding: the text of the Stopped that ended it, and of each optimizer step its number and
    phase, whether it was poisoned, whether weights moved, and the skips in a row after it.
    """
    forward, optimizer_step = mifo.Policy.forward, mifo.optimizer_step
    rl_step, sft_step = mifo.rl_step, mifo.sft_step
    steps, now = [], {}

    def poisoned_forward(self, tokens, mask, temperature):
        logprobs, entropy = forward(self, tokens, mask, temperature)
        now["poisoned"] = when(now.get("phase"), run.state)
        if now["poisoned"] and torch.is_grad_enabled():
            logprobs = poison(tokens, logprobs, now["phase"])
        return logprobs, entropy

    def noted_step(run, *rest):
        before = [s.clone() for s in run.shards]
        optimizer_step(run, *rest)
        moved = any(not torch.equal(a, b) for a, b in zip(before, run.shards))
        number, in_a_row = run.state.step + 1, run.state.skips_in_a_row
        steps.append((number, now["phase"], now["poisoned"], moved, in_a_row))

    error = ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mifo, "rl_step", lambda run: now.update(phase="rl") or rl_step(run))
        patch.setattr(mifo, "sft_step", lambda run: now.update(phase="sft") or sft_step(run))
        patch.setattr(mifo.Policy, "forward", poisoned_forward)
        patch.setattr(mifo, "optimizer_step", noted_step)
        try:
            mifo.train(run)
        except mifo.Stopped as stopped:
            error = str(stopped)
    return {"error": error, "steps": steps, "skipped": run.state.skipped}


def nan_for(victim: list[int]):
    """Poison for rows whose prompt is `victim`; in SFT for the first row of a micro-batch."""

    def poison(tokens, logprobs, phase):
        rows = torch.zeros(len(tokens), 1, dtype=torch.bool)
        for i, row in enumerate(tokens):
            rows[i] = row[: len(victim)].tolist() == victim or (phase == "sft" and i == 0)
        return torch.where(rows, logprobs * math.nan, logprobs)

    return poison


@case()
def skipped_steps(folder):
    """A step of each phase whose loss is NaN, and what was printed meanwhile."""
    run = open_run(folder / "skip", questions=16, steps=6, probe_bound=10)
    second = lambda phase, state: (state.rl_steps if phase == "rl" else state.sft_steps) == 1
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        found = watched_training(run, nan_for(run.questions[0].prompt), second)
    return folder / "skip", found, printed.getvalue()


def test_a_step_with_numbers_that_are_not_finite_is_skipped_on_all_ranks(skipped_steps):
    for ranks in skipped_steps.values():
        for _, found, _ in ranks:
            assert found["error"] == "" and found["skipped"] == 2
            for step, _, poisoned, moved, in_a_row in found["steps"]:
                assert moved != poisoned and (in_a_row > 0) == poisoned, step
            phases = [phase for _, phase, poisoned, *_ in found["steps"] if poisoned]
            assert sorted(phases) == ["rl", "sft"]
        out, found, printed = ranks[0]
        skipped = [step for step, _, poisoned, *_ in found["steps"] if poisoned]
        assert [line["step"] for line in metrics_of(out) if "skipped" in line] == skipped
        named = sixteen_questions()[0].id
        assert "the loss is nan" in printed
        assert any(re.search(rf"question.*\b{named}\b", text) for _, _, text in ranks)


@case()
def steps_skipped_in_a_row(folder):
    """From the second step on the losses, or the gradients of finite losses, are not finite."""

    def spoiled_gradient(tokens, logprobs, phase):
        return logprobs + (logprobs - logprobs.detach()) * torch.tensor(3e38) * 3e38

    settings, found = dict(questions=16, steps=6, probe_bound=10), {}
    for name in ("loss", "gradient"):
        run = open_run(folder / f"stop-{name}", **settings)
        poison = nan_for(run.questions[0].prompt) if name == "loss" else spoiled_gradient
        found[name] = watched_training(run, poison, lambda phase, state: state.step > 0)
    return found


def test_a_run_ends_after_a_few_skipped_steps_in_a_row(steps_skipped_in_a_row):
    for ranks in steps_skipped_in_a_row.values():
        for found in ranks:
            for name in ("loss", "gradient"):
                error = found[name]["error"]
                assert error.startswith("3 steps in a row were skipped; step 4: "), error
                assert "model.embed_tokens.weight" in error
                outcomes = [(moved, in_a_row) for *_, moved, in_a_row in found[name]["steps"]]
                assert outcomes == [(True, 0), (False, 1), (False, 2)]  # the next raises
            assert "loss is nan" in found["loss"]["error"]
            assert "loss is nan" not in found["gradient"]["error"]


@case()
def engine_drifts(folder):
    """After a step the engine's log-probabilities are 0.5 too low, but not the probe's."""
    run, sample = open_run(folder / "drift", probe_bound=0.01), rollout.TorchSampler.sample

    def drifting_sample(self, prompts, n, *rest, **more):
        groups = sample(self, prompts, n, *rest, **more)
        if n > 1 and run.state.step == 1:
            for response in itertools.chain.from_iterable(groups):
                response.logprobs[:] = [logprob - 0.5 for logprob in response.logprobs]
        return groups

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout.TorchSampler, "sample", drifting_sample)
        return watched_training(run)


def test_an_engine_that_drifts_is_stopped_before_the_step(engine_drifts):
    differ = "differ by 0.5 in a token's log-probability, on average over the sampled tokens"
    for ranks in engine_drifts.values():
        for found in ranks:
            assert differ in found["error"]
            assert [step for step, *_ in found["steps"]] == [1]


@case()
def weights_stop_arriving(folder):
    """The sampler keeps its old weights after step 1, without a reward; after 2, then evaluated."""
    push, found = rollout.TorchSampler.push, {}
    for name, last, more in (("unrewarded", 1, {}), ("evaluated", 2, dict(evaluate="chain"))):
        settings = dict(schedule="rl", probe_bound=0.01, rl_lr=0.1, steps=2) | more
        run = open_run(folder / name, **settings)
        check = run.checker.check

        def stale_push(self, weights, run=run, last=last):
            push(self, weights if run.state.step < last else [])
            return [None for _ in weights]

        def unrewarding_check(texts, *rest, run=run, check=check):
            return check(texts, *rest) if run.state.step == 0 else ["wrong"] * len(texts)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rollout.TorchSampler, "push", stale_push)
            if name == "unrewarded":
                patch.setattr(run.checker, "check", unrewarding_check)
            found[name] = watched_training(run)
    return found


@pytest.mark.parametrize(("name", "steps"), [("unrewarded", [1]), ("evaluated", [1, 2])])
def test_weights_that_do_not_arrive_are_noticed_where_no_update_would_see_it(
    weights_stop_arriving, name, steps
):
    for ranks in weights_stop_arriving.values():
        for found in ranks:
            text = "on average over a probe after the weights were pushed"
            assert text in found[name]["error"]
            assert [step for step, *_ in found[name]["steps"]] == steps


@functools.cache
def evaluated_run(folder: Path) -> mifo.Run:
    """In a rank's process: a finished run that kept its newest checkpoint and the best one."""
    settings = dict(evaluate="chain", steps=4, eval_every=1, save_every=1, keep=1)
    run = open_run(folder / "evaluated", **settings)
    mifo.train(run)
    return run


@case()
def best_checkpoint(folder):
    run = evaluated_run(folder)
    link = Path(run.cfg.out, "checkpoints", "best")
    means = {e["step"]: e["results"]["chain"]["avg"] for e in run.state.evals}
    return link.resolve(strict=True).name, means


def test_the_best_checkpoint_is_kept(best_checkpoint):
    for ranks in best_checkpoint.values():
        kept, means = ranks[0]
        best = max(list(means)[1:], key=means.get)  # after the start; of equals the first
        assert len(means) > 4 and kept == f"step-{best:06d}"
    assert mifo.best_step(mifo.State()) == 0


@case()
def full_disk(folder):
    """The last of the ranks may write files of 20,000 bytes at most; later there is space again."""
    run = evaluated_run(folder)
    before = mifo.newest_whole(run)
    run.state.step += 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if run.rank == run.world - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    with pytest.raises(mifo.Stopped) as error:
        mifo.save_checkpoint(run)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    kept = mifo.newest_whole(run)
    mifo.save_checkpoint(run)
    return run.state.step, str(error.value), before, kept, mifo.newest_whole(run)


def test_a_full_disk_leaves_the_last_checkpoint(full_disk):
    for ranks in full_disk.values():
        for step, error, before, kept, after in ranks:
            assert error.startswith(f"step {step}: the checkpoint could not be written: ")
            assert error.endswith(f"the last is {before}") and "\n" not in error
            assert kept == before and after.name == f"step-{step:06d}"


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    if how == "flipped":
        content[middle] ^= 16
        file.write_bytes(content)
    elif how == "cut":
        file.write_bytes(content[:middle])
    else:
        file.unlink()


@case()
def damaged_checkpoints(folder):
    """{(file, how): (newest whole checkpoint, good one, is the other renamed?)}; the output."""
    run = evaluated_run(folder)
    good, found = mifo.newest_whole(run), {}
    files = sorted(str(path.relative_to(good)) for path in good.rglob("*") if path.is_file())
    copy = good.with_name("step-999999")
    set_aside = copy.with_suffix(".damaged")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for name, how in itertools.product(files, ("flipped", "cut", "gone")):
            if run.rank == 0:
                shutil.copytree(good, copy)
                damage(copy / name, how)
            mifo.barrier(run)
            found[name, how] = mifo.newest_whole(run).name, good.name, set_aside.exists()
            mifo.barrier(run)
            if run.rank == 0:
                shutil.rmtree(set_aside, ignore_errors=True)
                shutil.rmtree(copy, ignore_errors=True)
            mifo.barrier(run)
    return found, printed.getvalue()


def test_damaged_checkpoints_are_recognised_and_named(damaged_checkpoints):
    expected = {"state.json", "SHA256SUMS", "model/model.safetensors", "model/config.json"}
    for world, ranks in damaged_checkpoints.items():
        for found, _ in ranks:
            names = {name for name, _ in found}
            assert names >= expected
            assert sum(fnmatch.fnmatch(name, STATE_FILES) for name in names) == world
            for which, (whole, good, set_aside) in found.items():
                assert whole == good and set_aside, which
        printed = ranks[0][1]
        assert "is damaged (state.json is not as it was written): renamed to step-" in printed


@pytest.fixture(scope="module")
def endless_run(tmp_path_factory):
    """A folder with a base model, and the command of a run in it that never ends by itself."""
    folder = make_folder(tmp_path_factory.mktemp("signals"))
    settings = COMMON | dict(steps=100_000, save_every=100_000, keep=2)

    def command(out, **more):
        return as_flags(recipe=folder / "empty.toml", out=folder / out, **(settings | more))

    return folder, command


def processes_of(process, out: Path) -> list[psutil.Process]:
    """Those that the run consists of, after its first steps."""
    end, metrics = time.monotonic() + 100, out / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1][-1500:]
        time.sleep(0.1)
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def check_all_end(process, family, seconds) -> tuple[str, str]:
    """What the run printed, when none of its processes is left."""
    output = process.communicate(timeout=seconds)
    _, alive = psutil.wait_procs(family, timeout=seconds)
    assert not alive, alive
    return output


@pytest.mark.parametrize(("number", "world"), [(signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_a_signal_ends_a_run_with_a_checkpoint(endless_run, number, world):
    folder, command = endless_run
    out = folder / f"signal-{world}"
    process = mifo_command(command(out.name), folder, world)
    family = processes_of(process, out)
    process.send_signal(number)
    stdout, stderr = check_all_end(process, family, 60)
    assert process.returncode == (143 if world == 1 else 1), stderr[-1500:]
    last = checkpoints_of(out)[-1]
    steps = len(metrics_of(out))
    assert last.name == f"step-{steps:06d}" and checkpoint_state(last)["step"] == steps
    name = signal.Signals(number).name
    assert f"stopped by {name} after step {steps}; --resume goes on from" in stdout
    if world == 1:
        assert "Traceback" not in stderr
        done = mifo_command(command(out.name, resume=True, steps=1), folder)
        stdout, stderr = done.communicate(timeout=60)
        assert done.returncode == 0, (stdout[-800:], stderr[-800:])
        assert "steps 100000 -> 1" in stdout


@pytest.mark.parametrize(
    "how", ["interrupted twice", "torchrun killed", "a rank killed", "a rank stalled"]
)
def test_a_broken_run_ends_whole_and_soon(endless_run, how, monkeypatch):
    folder, command = endless_run
    out = folder / how.replace(" ", "-")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3")
    process = mifo_command(command(out.name, step_limit=0.1), folder, 2)
    family = processes_of(process, out)
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
    _, stderr = check_all_end(process, family, 30)
    assert process.returncode != 0
    if how == "a rank stalled":
        for part in ("Timeout (0:00:06)!", "mifo.py", "Thread"):
            assert part in stderr, stderr[-3000:]
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
    may_change = []
    for option in dataclasses.fields(cfg):
        name, value = option.name, getattr(cfg, option.name)
        if name in ("out", "resume"):
            continue
        if isinstance(value, bool):
            other = not value
        else:
            other = value + ("x" if isinstance(value, str) else 1)
        changed = dataclasses.replace(cfg, **{name: other})
        if option.metadata["may_change"]:
            may_change.append(name)
            assert mifo.open_folder(changed)
            assert f"{name} {value!r} -> {other!r}" in capsys.readouterr().out
        else:
            with pytest.raises(ValueError) as error:
                mifo.open_folder(changed)
            flag = f"--{name.replace('_', '-')}"
            assert f"{flag} was {value!r} and is {other!r}" in str(error.value)
    assert {"steps", "save_every", "sampler", "micro_tokens", "replicas"} <= set(may_change)
    assert not {"seed", "data", "samples", "rl_lr", "p", "alpha", "updates"} & set(may_change)


def test_nothing_is_fetched_by_importing():
    code = """
import socket
def refuse(*args):
    raise SystemExit(f"the network was asked for {args[1:]}")
socket.socket.connect = socket.getaddrinfo = refuse
import mifo, eval, rollout, data
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-800:]


# --------------------------------------------------------------------------------------------------
# Settings

TYPES = typing.get_type_hints(mifo.Config)


def flag_of(option: dataclasses.Field) -> str:
    return f"--{option.name.replace('_', '-')}"


def just_outside(bounds: str, kind: type) -> list:
    """What lies next to an interval: of "[1, inf)" and int 0; of "(0, 1]" and float nan, 0.0 and
    1.0000000000000002.
    """
    values = [math.nan] if kind is float else []
    if bounds:
        low, high = map(float, bounds[1:-1].split(","))
        for bound, is_in, away in ((low, bounds[0] == "[", -1), (high, bounds[-1] == "]", 1)):
            if is_in and math.isfinite(bound):
                bound = math.nextafter(bound, away * math.inf) if kind is float else bound + away
            elif is_in or (kind is int and math.isinf(bound)):
                continue  # there is nothing beyond infinity
            values.append(kind(bound))
    return values


def wrong_by_type() -> list[tuple[str, str]]:
    """(flag=value, flag): just out of bounds, of another type, or not among the choices."""
    wrong = []
    for option in dataclasses.fields(mifo.Config):
        flag, kind = flag_of(option), TYPES[option.name]
        if kind is bool:
            values = [1]
        elif kind in (int, float):
            values = ["x", *just_outside(option.metadata["bounds"], kind)]
        else:
            values = ["nonsense"] if typing.get_args(kind) else []
        wrong += [(f"{flag}={value}", flag) for value in values]
    return wrong


# fmt: off
WRONG = [  # flags, on two ranks; what the error names
    ("--bogus 1", "--bogus"), ("--step 3", "--step"), ("--recipe /no/such.toml", "/no/such.toml"),
    # bounds that keep the equations sound: here once more, lest one is forgotten in an option
    ("--samples 1", "--samples"), ("--clip-low 1", "--clip-low"), ("--rho 0", "--rho"),
    ("--k 1.01", "--k"), ("--alpha 1.1", "--alpha"), ("--p 2", "--p"), ("--beta2 1", "--beta2"),
    ("--temperature 0", "--temperature"), ("--pear-gamma 0", "--pear-gamma"),
    # what does not go together
    ("--steps 0", "--steps"), ("--questions 5", "--questions 5"), ("--updates 3", "--updates 3"),
    ("--replicas 3", "--replicas 3"), ("--behavior-model x", "--behavior-model"),
    ("--pear-ratio-low 0.4", "--pear-ratio-low"), ("--pear-weight-high -11", "--pear-weight-"),
    ("--schedule rl --pear token", "--pear"),
    ("--sft-schedule cosine", "--sft-schedule"),
    ("--schedule rl --sft-schedule cosine", "--sft-schedule"),
    ("--eval-every 5 --evaluate=", "--eval-every"),
    ("--eval-sft-phases --eval-every 0 --evaluate=", "--eval-sft-phases"),
    # model, data, folders
    ("--model x", "--data"), ("--data x/y", "--model"), ("--out /dev/null", "--out"),
    ("--model x --data /no/such.jsonl", "/no/such.jsonl"),
    ("--evaluate /no/such.jsonl", "/no/such.jsonl"), ("--evaluate nonsense", "nonsense"),
    # what goes with --data only
    ("--split train", "--split"), ("--data-config x", "--data-config"),
    ("--revision x", "--revision"), ("--question-field x", "--question-field"),
    ("--answer-field x", "--answer-field"), ("--solution-field x", "--solution-field"),
    ("--template chat", "--template"), ("--system none", "--system"),
    ("--generation-prefix x", "--generation-prefix"),
]
# fmt: on


def test_every_flag_has_a_wrong_value():
    named = " ".join(text for text, _ in wrong_by_type() + WRONG)
    for option in dataclasses.fields(mifo.Config):
        assert flag_of(option) in named
        numeric = TYPES[option.name] in (int, float)
        assert not numeric or option.metadata["bounds"], option.name


def check_refused(arguments: list[str], named: str, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError) as error:
        mifo.parse_config(arguments)
    assert named in str(error.value) and "\n" not in str(error.value), arguments


@pytest.mark.parametrize(("text", "named"), WRONG, ids=[text for text, _ in WRONG])
def test_wrong_settings_are_refused_by_name(text, named, monkeypatch):
    check_refused(text.split(), named, monkeypatch)


def test_values_just_out_of_bounds_are_refused_by_name(monkeypatch):
    wrong = wrong_by_type()
    assert len(wrong) > 120
    for text, named in wrong:
        check_refused([text], named, monkeypatch)


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
    (tmp_path / "r.toml").write_text(text)
    check_refused(["--recipe", str(tmp_path / "r.toml")], named, monkeypatch)


def test_numbers_may_be_negative_or_infinite(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    cfg = mifo.parse_config(["--pear-ratio-low", "-0.5", "--pear-weight-low=-inf"])
    assert (cfg.pear_ratio_low, cfg.pear_weight_low) == (-0.5, -math.inf)
    cfg = mifo.parse_config(["--pear-ratio-high", "-0.05", "--pear-weight-high", "inf"])
    assert (cfg.pear_ratio_high, cfg.pear_weight_high) == (-0.05, math.inf)


def test_defaults_then_recipe_then_flags(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "r.toml").write_text("steps = 7\nrl_lr = 1\nfreeze = 'off'\n")
    cfg = mifo.parse_config(["--recipe", str(tmp_path / "r.toml"), "--steps", "9"])
    assert (cfg.steps, cfg.rl_lr, cfg.freeze, cfg.samples) == (9, 1.0, "off", 8)
    assert isinstance(cfg.rl_lr, float)
    cfg = mifo.parse_config([])
    assert cfg.recipe.endswith("embedded.toml") and cfg.evaluate == "chain"
    paper = mifo.Config()  # the papers' values, where they state them
    assert (paper.samples, paper.p, paper.rho, paper.k) == (8, 1 / 8, 0.2, 0.5)
    assert (paper.pear_gamma, paper.pear_block) == (0.999, 4)
    assert (paper.pear_ratio_low, paper.pear_ratio_high) == (-0.08, 0.3)
    assert (paper.pear_weight_low, paper.pear_weight_high) == (-10, 5)


def test_wrong_input_exits_with_2_and_one_line(tmp_path):
    """The real command: each error is one line on stderr that names what is wrong."""
    more_tokens = transformers.PreTrainedTokenizerFast(
        tokenizer_object=data.embedded_tokenizer().backend_tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<x>"],
    )
    model, other = tiny_model(tmp_path / "model", 0), tiny_model(tmp_path / "other", 0, more_tokens)
    good, bare, bad = (tmp_path / f"{name}.jsonl" for name in ("good", "bare", "bad"))
    good.write_text('{"question": "1", "answer": "2", "solution": "\\\\boxed{2}"}\n' * 3)
    bare.write_text('{"question": "1", "answer": "2"}\n' * 3)
    bad.write_text('{"question": "1", "answer": "2"}\n\n{"question": "1", "answer": 2\n')
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").write_text("")
    common = dict(model=model, sampler="torch", max_prompt=30, max_response=20, questions=1)
    common |= dict(steps=1, template="plain", buffer_size=1)
    pear = dict(data=good, schedule="sft", pear="token", behavior_model=other)
    cases = [
        (["--bogus", "1"], "--bogus"),
        (as_flags(**common, data=bad), "line 3"),
        (as_flags(**common | dict(data=good, max_response=300)), "--max-response 300"),
        (as_flags(**common, **pear), "--behavior-model"),
        (as_flags(**common, data=good, out=tmp_path / "old"), "--resume"),
        (as_flags(**common, data=bare, schedule="sft"), "--schedule sft"),
    ]
    for first in range(0, len(cases), 3):
        started = []
        for i, (arguments, _) in enumerate(cases[first : first + 3], first):
            out = as_flags(out=tmp_path / str(i))  # the last --out counts
            started.append(mifo_command(out + arguments, tmp_path))
        for process, (arguments, named) in zip(started, cases[first:]):
            _, stderr = process.communicate(timeout=120)
            assert process.returncode == 2, (arguments, stderr[-800:])
            [line] = [line for line in stderr.splitlines() if "error" in line.lower()]
            assert named in line and "Traceback" not in stderr, (arguments, stderr[-800:])


# --------------------------------------------------------------------------------------------------
# Schedules and presets


@case()
def presets(folder):
    return {name: train_preset(folder, name) for name in PRESETS}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", PRESETS)
def test_preset(presets, world, name):
    run, cfg = presets[world][0][name], mifo.Config(**PRESETS[name])
    lines = metrics_of(run)
    phases = [line["phase"] for line in lines]
    rl_steps = 0 if cfg.schedule == "sft" else 9 if name in LONG_PRESETS else 3
    assert phases.count("rl") == rl_steps
    for line in lines:
        numbers = [value for value in line.values() if isinstance(value, (int, float))]
        assert all(map(math.isfinite, numbers))
        if line["phase"] == "sft":
            assert line["sft/grad_norm"] > 0 and "rl/loss" not in line
            assert ("sft/pear_weight" in line) == (cfg.pear != "off")
        else:
            assert ("rl/loss" in line) == ("rl/grad_norm" in line)
    last = checkpoints_of(run)[-1]
    state, tensors = checkpoint_state(last), checkpoint_tensors(last)
    assert state["step"] == len(lines) and not state["sft_queue"]
    if cfg.schedule == "interleave":
        freezes = cfg.freeze != "off"
        assert phases[0] == "rl" and "sft" in phases
        assert ("sft/frozen_movement" in lines[phases.index("sft")]) == freezes
        threshold = checkpoint_state(sft_phases(run)[0][0])["threshold"]
        assert math.isfinite(threshold) == freezes
    else:
        assert phases == (["sft"] * 2 if "sft" in cfg.schedule else []) + ["rl"] * rl_steps
        assert state["buffer"] == [] and not of_kind(tensors, "importance/")
        assert not any("frozen" in key for line in lines for key in line)
        # an SFT stage's moments end with it
        assert not of_kind(tensors, "sft/")
        expected = list(range(16)) if "sft" in cfg.schedule else []
        assert sorted(state["demonstrations"]) == expected
    if cfg.schedule == "sft-then-rl":  # nothing but the weights is handed over
        halfway, handed = (checkpoint_tensors(folder) for folder in checkpoints_of(run)[:2])
        assert of_kind(halfway, "sft/exp_avg/") and not of_kind(handed, "sft/")
        assert not of_kind(handed, "rl/")
        assert {t.item() for t in of_kind(tensors, "rl/step/").values()} == {3}


SPLITS = (
    dict(micro_tokens=40),
    dict(micro_tokens=200),
    dict(micro_tokens=100_000),
    dict(micro_tokens=40, gather_once=True),
)


@case()
def split_sft_runs(folder):
    """The weights after the same SFT stage, for each of SPLITS."""
    settings = dict(schedule="sft", sft_epochs=2, sft_batch=6, sft_lr=3e-5, rho=1, save_every=100)
    weights = []
    for i, split in enumerate(SPLITS):
        run = open_run(folder / f"split-{i}", **settings, **split)
        mifo.train(run)
        weights.append(whole(run, run.shards))
    return weights


def test_sft_gives_the_same_weights_however_it_is_split(split_sft_runs, base):
    first, *others = split_sft_runs[1][0] + split_sft_runs[2][0]
    initial = {n: p.detach() for n, p in float_model(base, torch.float32).named_parameters()}
    assert max((first[n] - initial[n]).abs().max().item() for n in initial) > 1e-4
    for other in others:
        for n in other:
            torch.testing.assert_close(other[n], first[n], rtol=0, atol=1e-6)


@case(worlds=(1,))
def learning_rates(folder):
    """Those of an SFT stage of 32 steps, which a cosine plans."""
    run = open_run(folder / "cosine", schedule="sft", sft_batch=1, sft_schedule="cosine")
    mifo.begin_sft(run, list(range(16)))
    rates = []
    with pytest.MonkeyPatch.context() as patch:
        note = lambda run, which, *rest: rates.append(run.optimizers[which].param_groups[0]["lr"])
        patch.setattr(mifo, "optimizer_step", note)
        while run.state.sft_queue:
            mifo.sft_step(run)
    return rates


def test_an_sft_stage_warms_up_and_then_follows_a_cosine_down_to_a_tenth(learning_rates):
    [rates] = learning_rates[1]
    assert len(rates) == 32
    for i, rate in enumerate(rates):
        done = i / 32
        turn = math.pi * (done - 0.1) / 0.9
        expected = done / 0.1 if done < 0.1 else 0.1 + 0.9 * (1 + math.cos(turn)) / 2
        assert rate == pytest.approx(1e-3 * expected), i
