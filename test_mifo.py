"""Every test. `pytest` runs them all; real GSM8K and MATH-500 are looked for in ../shared/data,
and skipped where absent. GPUs are not used, but by one test that takes the GPU whose number
MIFO_TEST_GPU says: `MIFO_TEST_GPU=0 pytest -k on_a_gpu`. The sections, in order:

losses.py, freeze.py   The equations; PEAR; Log-probabilities in tiles; Freezing
data.py                Batches; The embedded task; Data
rollout.py             Which sampler; The sampler's choice of a token
eval.py                Checking answers; Rewards; Scores; Benchmarks and the command line
benchmarks, recipes    Comparing runs; Recipes and presets; The memory plan
mifo.py                The dry run; The loop; Gradients; What is frozen; Checkpoints; Pictures and
                       trackers; Samplers; Real questions; Faults; Settings; Schedules and presets;
                       A GPU
README.md              The README's snippets
"""

import argparse
import ast
import contextlib
import copy
import dataclasses
import datetime
import decimal
import fnmatch
import functools
import html.parser
import inspect
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import textwrap
import threading
import time
import tomllib
import traceback
import types
import typing
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch, whose numbers on a GPU are not to the bit

import data  # noqa: E402  before transformers: it hides packages that break its import
from safetensors import safe_open  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from torch.distributed.tensor import DTensor, distribute_tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402
import datasets  # noqa: E402
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
    losses.nft_loss: [],
    losses.top_entropy_count: [],
    losses.top_entropy_mask: [losses.top_entropy_count],
    losses.sft_loss: [],
    losses.sft_weights: [],
    losses.sed_penalty: [],
    losses.sed_threshold: [],
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
        "grpo_loss": (
            (rows, 2 * rows, rows[:, 0], mask, 0.2, 0.3, True, 3 * rows, 0.1) + (4 * rows, 2, True)
        ),
        "nft_loss": (rows, 2 * rows, torch.tensor([0.25, -0.75]), mask, 0.9, 0.5),
        "top_entropy_count": (10, 0.2),
        "top_entropy_mask": (rows, mask, 0.5),
        "sft_loss": (rows, mask, 2 * rows),
        "sft_weights": (rows, "trust", 0.5),
        "sed_penalty": (rows, rows.flip(0), mask, 0.3, 0.5, 2 * rows),
        "sed_threshold": (rows[0], 0.7),
        "pear_weights": (rows, 2 * rows, mask, "block", 0.9, 2),
        "token_logprobs": (rows, randn(5, 3, seed=1), torch.tensor([4, 0]), 0.7, 2, 3),
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


@pytest.mark.parametrize("normalize_std", [False, True])
def test_group_advantages_leave_out_what_was_not_judged(normalize_std):
    rewards = torch.rand(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rewards[:9] = 0.1  # equal, which advantages of exactly 0 must show beside NaN, too
    rewards[flags(40, 6, seed=2, probability=0.4)] = math.nan
    rewards[9], rewards[10, 1:] = math.nan, math.nan
    judged = (~rewards.isnan()).sum(1).tolist()
    assert {0, 1, 2, 3} <= set(judged)
    advantages = losses.group_advantages(rewards, normalize_std).tolist()
    for i, (got, group) in enumerate(zip(advantages, rewards.tolist())):
        known = [r for r in group if r == r]
        for advantage, reward in zip(got, group):
            if reward != reward or i < 9 or len(known) == 1:
                assert advantage == 0
            else:
                divisor = statistics.stdev(known) + 1e-6 if normalize_std else 1.0
                expected = (reward - statistics.fmean(known)) / divisor
                assert advantage == pytest.approx(expected, rel=1e-9)


def grpo_oracle(
    logprobs,
    old,
    advantage,
    low=0.2,
    high=0.2,
    ref=None,
    kl_coef=0.0,
    engine=None,
    cap=0.0,
    sequence=False,
):
    """One response, token by token: its gains [n], whose sum GRPO raises, and what was counted.

    logprobs, old, ref and engine are the response's own n tokens, without padding, float64; the
    advantage is a float. The gains carry the gradient of logprobs. sequence: GSPO's ratio.
    """
    gains = []
    ratios = logprobs.exp() / old.detach().exp()
    if sequence:
        ratios = [ratios.prod() ** (1 / len(ratios))] * len(ratios) if len(ratios) else []
    counts = {"clipped_low": 0, "clipped_high": 0, "kl": 0.0}
    for t in range(len(logprobs)):
        ratio = ratios[t]
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
    dict(low=low, high=high, per_sequence=row, kl_coef=kl_coef, cap=cap, sequence=sequence)
    for sequence, (low, high), row, (kl_coef, cap) in itertools.product(
        [False, True], CLIPS, [False, True], KL_AND_CAP
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
        sequence_ratio=s["sequence"],
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
            sequence=s["sequence"],
        )
        divisor = max(1, len(gains)) if s["per_sequence"] else 1
        expected = expected - gains.sum() / divisor
        for key, value in counts.items():
            totals[key] += value
    loss, metrics = grpo_loss(other_leaf, old, advantages, mask, ref, engine, s)
    assert loss.shape == () and loss.item() == pytest.approx(expected.item(), abs=1e-9)
    assert totals["clipped_low"] > 0 and totals["clipped_high"] > 0  # both clips are at work
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


@pytest.mark.parametrize("sequence", [False, True])
def test_grpo_with_the_policy_as_its_own_old_is_the_policy_gradient(sequence):
    logprobs, _, advantages, mask, _, _ = rollouts()
    logprobs.requires_grad_()
    loss, metrics = losses.grpo_loss(
        logprobs, logprobs.detach(), advantages, mask, sequence_ratio=sequence
    )
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


def test_gspo_by_hand():
    # Ratios 2 and 1/8, and 8 and 1/2: of their means 1/2 and 2 both tokens of a row have one.
    ratio = torch.tensor([[2, 1 / 8, 99], [8, 1 / 2, 99]], dtype=torch.float64)
    zeros, mask = torch.zeros(2, 3), torch.tensor([[True, True, False]] * 2)
    for advantage, gains, clipped in ((1.0, [0.5, 1.28], [0, 2]), (-1.0, [-0.8, -2.0], [2, 0])):
        advantages = torch.tensor([advantage] * 2)
        loss, metrics = losses.grpo_loss(
            ratio.log(), zeros, advantages, mask, 0.2, 0.28, sequence_ratio=True
        )
        assert loss.item() == pytest.approx(-2 * sum(gains), abs=1e-12)
        assert [metrics["clipped_low"].item(), metrics["clipped_high"].item()] == clipped


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_grpo_and_gspo_are_trls(level, tmp_path):
    """Value and gradient of TRL's own loss of a tiny model, a KL included."""
    pytest.importorskip("trl", reason="TRL is not installed; the loop above is the oracle then")
    from trl import GRPOConfig, GRPOTrainer

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)  # TRL loads the reference too
    words = {f"t{i}": i for i in range(17)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "t0")), pad_token="t0", eos_token="t1"
    )
    settings = GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=4,
        num_generations=4,
        importance_sampling_level=level,
        loss_type="grpo",
        epsilon=0.02,
        epsilon_high=0.03,
        beta=0.3,
        use_bias_correction_kl=False,
    )
    trainer = GRPOTrainer(
        model=transformers.LlamaForCausalLM.from_pretrained(tmp_path),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=settings,
        train_dataset=datasets.Dataset.from_list([{"prompt": "t2 t3"}] * 4),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.model.train()
    mask = torch.arange(7) < torch.tensor([[7], [4], [1], [5]])  # [4, 7]
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, 17, (4, 10), generator=generator)  # prompts of 3, responses of 7
    with torch.no_grad():
        logits = model(tokens).logits[:, 2:-1]
    now = logits.log_softmax(-1).gather(2, tokens[:, 3:, None])[..., 0]  # [4, 7]
    old = now + randn(4, 7, seed=2, dtype=torch.float32, scale=0.3)
    reference = now + randn(4, 7, seed=3, dtype=torch.float32, scale=0.3)
    advantages = torch.tensor([1.3, -0.8, 0.5, -1.7])
    theirs = trainer._compute_loss(
        model,
        {
            "prompt_ids": tokens[:, :3],
            "prompt_mask": torch.ones(4, 3, dtype=torch.int64),
            "completion_ids": tokens[:, 3:],
            "completion_mask": mask.long(),
            "advantages": advantages,
            "old_per_token_logps": old,
            "ref_per_token_logps": reference,
        },
    )
    expected = torch.autograd.grad(theirs, list(model.parameters()))
    logits = model(tokens).logits[:, 2:-1]
    logprobs = logits.log_softmax(-1).gather(2, tokens[:, 3:, None])[..., 0]
    ours, metrics = losses.grpo_loss(
        logprobs,
        old,
        advantages,
        mask,
        0.02,
        0.03,
        per_sequence=True,
        ref_logprobs=reference,
        kl_coef=0.3,
        sequence_ratio=level == "sequence",
    )
    assert metrics["clipped_low"] + metrics["clipped_high"] > 0
    assert ours.item() / 4 == pytest.approx(theirs.item(), rel=1e-5)
    gradients = torch.autograd.grad(ours / 4, list(model.parameters()))
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-7)


def nft_oracle(logprobs, old, right, rate, epsilon, negative):
    """NFT of one response's own tokens, floats only: its loss, its gradient [n], tokens floored."""
    loss, gradient, floored = 0.0, [], 0
    for x, y in zip(logprobs.tolist(), old.tolist()):
        ratio = math.exp(x) / math.exp(y)
        if right:
            loss -= (1 - rate) * math.log(ratio)
            gradient.append(-(1 - rate))
        else:
            implicit = (1 - rate * ratio) / (1 - rate)
            held = max(implicit, epsilon)
            loss -= (1 - rate) * negative * math.log(held)
            gradient.append(negative * rate * ratio / held)
            floored += implicit < epsilon
    return loss, gradient, floored


# Right rows' advantages are 1 - r, wrong ones' -r.
@pytest.mark.parametrize("epsilon, negative", [(1.0, 1.0), (0.5, 1.0), (0.2, 0.5), (1.5, 0.0)])
def test_nft_loss_and_gradient_against_a_loop(epsilon, negative):
    logprobs, old, _, mask, _, _ = rollouts()
    rates, right = [0.25, 0.75, 0.5, 0.25, 0.125, 0.875], [True, False, True, False, False, True]
    advantages = torch.tensor([1 - r if good else -r for r, good in zip(rates, right)])
    expected, count, gradient = 0.0, 0, torch.zeros(6, 9, dtype=torch.float64)
    for b, row in enumerate(mask):
        loss, values, floored = nft_oracle(
            logprobs[b, row], old[b, row], right[b], rates[b], epsilon, negative
        )
        expected, count = expected + loss, count + floored
        gradient[b, row] = torch.tensor(values, dtype=torch.float64)
    leaf = logprobs.masked_fill(~mask, math.nan).requires_grad_()  # nothing leaks
    old = old.masked_fill(~mask, -math.inf)
    loss, metrics = losses.nft_loss(leaf, old, advantages, mask, epsilon, negative)
    loss.backward()
    assert loss.shape == () and loss.item() == pytest.approx(expected, abs=1e-9)
    assert metrics["floored"].item() == count > 0
    torch.testing.assert_close(leaf.grad, gradient, rtol=0, atol=1e-9)


# fmt: off
NFT_TABLE = [  # right, r, epsilon, the loss, and the gradients of p = .6, .1, .8 from .5, .2, .8
    (True, 0.25, 1.0, 0.383119, [-0.75, -0.75, -0.75]),
    (False, 0.25, 1.0, -0.115613, [0.300000, 0.107143, 0.250000]),
    (False, 0.25, 0.5, -0.063868, [0.321429, 0.107143, 0.250000]),
    (False, 0.75, 1.0, -0.229073, [0.900000, 0.150000, 0.750000]),
    (False, 0.75, 0.2, 0.0, [2.250000, 0.150000, 0.750000]),
]
# fmt: on


@pytest.mark.parametrize("right, rate, epsilon, loss, gradient", NFT_TABLE)
def test_nft_by_table(right, rate, epsilon, loss, gradient):
    p = torch.tensor([[0.6, 0.1, 0.8]], dtype=torch.float64)
    old = torch.tensor([[0.5, 0.2, 0.8]], dtype=torch.float64).log()
    advantages = torch.tensor([1 - rate if right else -rate])
    logprobs, mask = p.log().requires_grad_(), torch.ones(1, 3, dtype=torch.bool)
    found, _ = losses.nft_loss(logprobs, old, advantages, mask, epsilon)
    found.backward()
    assert found.item() == pytest.approx(loss, abs=1e-6)
    assert logprobs.grad[0].tolist() == pytest.approx(gradient, abs=1e-6)


def test_nft_holds_on_where_grpo_clips():
    """Gradients at r = 1/4 and ratios on both sides of GRPO's clips."""
    old, mask = torch.zeros(2, 4, dtype=torch.float64), torch.ones(2, 4, dtype=torch.bool)
    logprobs = torch.tensor([[0.5, 1.0, 1.15, 2.0]] * 2, dtype=torch.float64).log()
    advantages = torch.tensor([0.75, -0.25])
    found = {}
    for loss in (losses.nft_loss, losses.grpo_loss):
        leaf = logprobs.clone().requires_grad_()
        loss(leaf, old, advantages, mask)[0].backward()
        found[loss.__name__] = leaf.grad.flatten().tolist()
    wrong = [0.107143, 0.25, 0.2875, 0.5]
    assert found["nft_loss"] == pytest.approx([-0.75] * 4 + wrong, abs=1e-6)
    right = [-0.375, -0.75, -0.8625, 0]
    assert found["grpo_loss"] == pytest.approx(right + [0, *wrong[1:]], abs=1e-6)


@pytest.mark.parametrize("epsilon", [1.0, 0.3])
def test_nft_on_policy_has_grpos_gradient(epsilon):
    """At every rate of a group of 8, groups of equal rewards included; the loss itself is 0."""
    rewards = (torch.arange(8)[None] < torch.arange(9)[:, None]).double()  # [9, 8]
    advantages = losses.group_advantages(rewards, False).flatten()
    logprobs, mask = randn(72, 5, seed=1) - 2, flags(72, 5, seed=2, probability=0.7)
    gradients = []
    for loss, settings in ((losses.nft_loss, [epsilon]), (losses.grpo_loss, [])):
        leaf = logprobs.clone().requires_grad_()
        value, _ = loss(leaf, logprobs, advantages, mask, *settings)
        value.backward()
        gradients.append(leaf.grad)
        if loss is losses.nft_loss:
            assert value.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    assert gradients[0].abs().max() > 0.8


def test_nft_stays_finite_and_refuses():
    mask = torch.ones(2, 1, dtype=torch.bool)
    logprobs = torch.tensor([[200.0], [200.0]], requires_grad=True)  # e^200 is no float32
    loss, _ = losses.nft_loss(logprobs, torch.zeros(2, 1), torch.tensor([0.5, -0.5]), mask)
    loss.backward()
    assert loss.item() == pytest.approx(-5) and logprobs.grad.isfinite().all()  # 1/2 * log e^10
    for wrong in (1.0, -1.0, 1.7, math.nan):  # rewards of 1 and -1, or divided by std
        with pytest.raises(ValueError, match="advantages"):
            losses.nft_loss(logprobs, torch.zeros(2, 1), torch.tensor([0.5, wrong]), mask)


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


# Of p = .9, .5, .1, .05, .01: the weights, the loss, that without the third token, and that with
# weights .2, .4, .6, .8, 1 besides.
# fmt: off
SFT_WEIGHTS = {
    "dft": ([0.9, 0.5, 0.1, 0.05, 0.01], 0.867495, 0.637236, 0.323475),
    "trust": ([1, 1, 1, 0.5, 0.1], 5.059476, 2.756891, 1.957141),
    "phi": ([0.09, 0.25, 0.09, 0.0475, 0.0099], 0.577890, 0.370658, 0.230640),
}
# fmt: on


@pytest.mark.parametrize("kind", SFT_WEIGHTS)
def test_sft_weights_by_table(kind):
    weights, plain, masked, weighted = SFT_WEIGHTS[kind]
    logprobs = torch.tensor([[0.9, 0.5, 0.1, 0.05, 0.01]], dtype=torch.float64).log()
    leaf, everywhere = logprobs.requires_grad_(), torch.ones(1, 5, dtype=torch.bool)
    found = losses.sft_weights(leaf, kind)
    assert not found.requires_grad and found.tolist()[0] == pytest.approx(weights, abs=1e-12)
    loss = losses.sft_loss(leaf, everywhere, found)
    loss.backward()
    assert loss.item() == pytest.approx(plain, abs=1e-6)
    torch.testing.assert_close(leaf.grad, -found)
    mask = torch.tensor([[True, True, False, True, True]])
    assert losses.sft_loss(leaf, mask, found).item() == pytest.approx(masked, abs=1e-6)
    others = torch.tensor([[0.2, 0.4, 0.6, 0.8, 1.0]], dtype=torch.float64)
    assert losses.sft_loss(leaf, mask, found * others).item() == pytest.approx(weighted, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_trust_weights_give_the_gradient_of_trapos_loss(alpha):
    """-p / max(p, alpha), the divisor without gradient; its value at alpha .1 is that published."""
    logprobs = torch.tensor([[0.9, 0.5, 0.1, 0.05, 0.01]], dtype=torch.float64).log()
    leaf, other_leaf = logprobs.clone().requires_grad_(), logprobs.clone().requires_grad_()
    p = leaf.exp()
    theirs = -(p / p.detach().clamp(min=alpha)).sum()
    theirs.backward()
    if alpha == 0.1:
        assert theirs.item() == pytest.approx(-3.6)
    weights = losses.sft_weights(other_leaf, "trust", alpha)
    losses.sft_loss(other_leaf, torch.ones(1, 5, dtype=torch.bool), weights).backward()
    torch.testing.assert_close(other_leaf.grad, leaf.grad)


@pytest.mark.parametrize("kind", SFT_WEIGHTS)
@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_sft_weights_outside_the_mask_do_not_leak(kind, poison):
    mask = torch.tensor([[False, True, True]])
    leaf = torch.tensor([[poison, -0.5, -2.0]], requires_grad=True)
    loss = losses.sft_loss(leaf, mask, losses.sft_weights(leaf, kind))
    loss.backward()
    clean = leaf[:, 1:].detach()
    expected = losses.sft_loss(clean, mask[:, 1:], losses.sft_weights(clean, kind))
    assert loss.item() == expected.item() and leaf.grad[0, 0] == 0 and leaf.grad.isfinite().all()


def test_sft_weights_refuse():
    with pytest.raises(ValueError, match="kind"):
        losses.sft_weights(torch.zeros(1, 1), "luffy")
    for alpha in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            losses.sft_weights(torch.zeros(1, 1), "trust", alpha)


def test_sed_by_table():
    """Four tokens of four symbols, k 2, tau .9: the loss, its gradient, the mass, from logits."""
    logits = [[4.0, 0, 0, 0], [1, 0.5, 0, -0.5], [0, 0, 0, 0], [2, 2, -1, -1]]
    hidden = torch.tensor(logits, dtype=torch.float64)
    identity, targets = torch.eye(4, dtype=torch.float64), torch.tensor([0, 0, 3, 2])
    found = losses.token_logprobs(hidden, identity, targets, chunk=3, top_k=2)
    logprobs, _, top_mass = (values[:, None] for values in found)  # [4, 1] each
    assert top_mass[:, 0].tolist() == pytest.approx([0.965277, 0.731059, 0.5, 0.952574], abs=1e-6)
    leaf, mask = logprobs.requires_grad_(), torch.ones(1, 1, dtype=torch.bool)
    rows = []
    for row, mass in zip(leaf, top_mass):
        penalty = losses.sed_penalty(row[None], mass[None], mask, 0.9)
        rows.append(losses.sft_loss(row[None], mask) + penalty)
    expected = [0.053490, 0.789359, 1.448794, 3.741735]
    assert [loss.item() for loss in rows] == pytest.approx(expected, abs=1e-6)
    sum(rows).backward()
    assert sum(rows).item() == pytest.approx(6.033378, abs=1e-6)
    gradient = [-1, -1.040906, -1.125, -1]
    assert leaf.grad[:, 0].tolist() == pytest.approx(gradient, abs=1e-6)


def test_sed_penalty_and_gradient_against_a_loop():
    logprobs, mask = -randn(4, 6, seed=1).abs(), flags(4, 6, seed=2, probability=0.6)
    mass = torch.rand(4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mass[mask.nonzero()[0].tolist()] = 0.5  # a mass of tau itself is not below it
    random_weights = randn(4, 6, seed=4).exp().masked_fill(~mask, math.nan)
    for weights in (None, random_weights):
        expected, gradient = 0.0, torch.zeros(4, 6, dtype=torch.float64)
        for b, t in mask.nonzero().tolist():
            if mass[b, t] < 0.5:
                weight = 0.3 if weights is None else 0.3 * weights[b, t].item()
                p = math.exp(logprobs[b, t].item())
                expected += weight * (p - 0.5) ** 2
                gradient[b, t] = weight * 2 * (p - 0.5) * p
        leaf = logprobs.masked_fill(~mask, math.nan).requires_grad_()
        masses = mass.masked_fill(~mask, 0.0).requires_grad_()
        loss = losses.sed_penalty(leaf, masses, mask, 0.5, 0.3, weights)
        assert loss.item() == pytest.approx(expected, abs=1e-12) and expected > 0.01
        loss.backward()
        assert masses.grad is None
        torch.testing.assert_close(leaf.grad, gradient, rtol=0, atol=1e-12)


def test_sed_threshold_by_table():
    masses = torch.tensor([0.99, 0.50, 0.81, 0.70, 0.62, 0.90, 0.55, 0.95, 1.0, 0.97])
    for ratio, tau, below in ((0.3, 0.97, 7), (0.7, 0.70, 3), (1.0, 0.50, 0), (0.01, 1.0, 9)):
        found = losses.sed_threshold(masses, ratio)
        assert found == pytest.approx(tau) and (masses < found).sum() == below, ratio
    for ratio in (0.07, 0.29, 0.57):  # times 100, 7.0000000000000009, 28.999999999999996 and so on
        tau = losses.sed_threshold(torch.arange(100.0), ratio)
        assert tau == 100 - math.floor(Fraction(str(ratio)) * 100), ratio
    for size, ratio in ((10, 0.0), (10, 1.01), (10, math.nan), (0, 0.5)):
        with pytest.raises(ValueError, match="ratio"):
            losses.sed_threshold(masses[:size], ratio)


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


def full_softmax(hidden, head_weight, targets, temperature, bias=None, scale=1.0, softcap=math.inf):
    """Log-probabilities and entropies from all the logits at once."""
    logits = scale * torch.nn.functional.linear(hidden, head_weight, bias)
    if softcap < math.inf:
        logits = softcap * torch.tanh(logits / softcap)
    logs = torch.log_softmax(logits / temperature, -1)
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


# A bias, a scale and a cap that bites: the logits' deviation is 2 before scale and cap.
HEADS = [
    dict(biased=True),
    dict(scale=0.125),
    dict(scale=3.0),
    dict(softcap=1.5),
    dict(biased=True, scale=2.5, softcap=3.0),
]


@pytest.mark.parametrize("shape", HEADS, ids=lambda shape: "-".join(shape))
@pytest.mark.parametrize("chunk", [1, 5, 1024])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_token_logprobs_of_other_heads(shape, chunk, temperature, dtype, tolerance):
    shape = dict(shape)
    hidden, weight, targets = head(dtype=dtype)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    if shape.pop("biased", False):
        shape["bias"] = randn(17, seed=5, dtype=dtype, scale=2.0).requires_grad_()
        leaves.append(shape["bias"])
    upstream = randn(13, seed=4, dtype=dtype)
    expected, expected_entropy = full_softmax(hidden, weight, targets, temperature, **shape)
    expected_gradients = torch.autograd.grad(expected, leaves, upstream)
    logprobs, entropy = losses.token_logprobs(hidden, weight, targets, temperature, chunk, **shape)
    torch.testing.assert_close(logprobs, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(entropy, expected_entropy, rtol=tolerance, atol=tolerance)
    gradients = torch.autograd.grad(logprobs, leaves, upstream)
    for gradient, right in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == dtype and right.abs().max() > 0.01
        torch.testing.assert_close(gradient, right, rtol=tolerance, atol=10 * tolerance)


def test_token_logprobs_of_other_heads_by_hand():
    # 2 * (0, ln 3) = (0, ln 9); a bias of ln 3 on the first: 2 * (ln 3, ln 3); capped at 1 both
    # ways: (-tanh 1e3, tanh 1e3) = (-1, 1)
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [math.log(3)]])
    bias, far = torch.tensor([math.log(3), 0.0]), torch.tensor([[-1e3], [1e3]])
    for head_weight, shape, p in (
        (weight, dict(scale=2.0), 0.1),
        (weight, dict(scale=2.0, bias=bias), 0.5),
        (far, dict(softcap=1.0), 1 / (1 + math.exp(2))),
    ):
        logprobs, _ = losses.token_logprobs(hidden, head_weight, torch.tensor([0]), **shape)
        assert logprobs.item() == pytest.approx(math.log(p), abs=1e-6)


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


# Of 17 entries: more than a tile holds, all of them, and more than there are.
@pytest.mark.parametrize("top_k", [1, 2, 5, 17, 20])
@pytest.mark.parametrize("chunk", [1, 4, 17, 1024])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_token_logprobs_mass_of_the_top_k(top_k, chunk, dtype, tolerance):
    hidden, weight, targets = head(dtype=dtype, scale=2.0)
    hidden[3] = 0.0  # all entries equal
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    found = losses.token_logprobs(hidden, weight, targets, 0.7, chunk, top_k)
    assert len(found) == 3 and found[2].dtype == dtype and not found[2].requires_grad
    falling = torch.softmax(hidden @ weight.T / 0.7, 1).sort(1, descending=True).values
    torch.testing.assert_close(found[2], falling[:, :top_k].sum(1), rtol=0, atol=tolerance)
    plain = losses.token_logprobs(hidden, weight, targets, 0.7, chunk)
    assert len(plain) == 2
    torch.testing.assert_close(found[:2], plain, rtol=0, atol=0)
    gradients = [torch.autograd.grad(logprobs.sum(), leaves) for logprobs in (found[0], plain[0])]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


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
    mass = losses.token_logprobs(hidden, weight, torch.zeros(0, dtype=torch.int64), top_k=2)[2]
    assert mass.shape == (0,)


def test_token_logprobs_with_a_tied_head():
    weight = randn(11, 4, seed=5).requires_grad_()  # embedding and head in one
    tokens, targets = torch.tensor([3, 0, 3, 10, 7]), torch.tensor([0, 3, 10, 7, 2])
    total = full_softmax(weight[tokens].tanh(), weight, targets, 0.8)[0].sum()
    expected = torch.autograd.grad(total, weight)[0]
    losses.token_logprobs(weight[tokens].tanh(), weight, targets, 0.8, 2)[0].sum().backward()
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("temperature", [1.0, 1.6])
@pytest.mark.parametrize("shape", [{}, dict(biased=True, scale=1.5, softcap=4.0)], ids=str)
def test_token_logprobs_in_bfloat16_stays_close_to_float32(temperature, shape):
    shape = dict(shape)
    hidden, weight, targets = head(n=600, d=64, v=500, scale=0.3)
    given = [hidden, weight] + [randn(500, seed=5)] * shape.pop("biased", False)
    given = [tensor.bfloat16() for tensor in given]  # the same rounded numbers for both
    results, gradients = [], []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in given]
        h, w, *bias = leaves
        shape["bias"] = bias[0] if bias else None
        logprobs, entropy = losses.token_logprobs(h, w, targets, temperature, 8, **shape)
        assert logprobs.dtype == entropy.dtype == torch.float32
        results.append((logprobs, entropy))
        gradients.append(torch.autograd.grad(logprobs.sum(), leaves))
    for right, rounded in zip(*results):
        assert (rounded - right).norm() / right.norm() < 0.01
    for right, rounded in zip(*gradients):
        assert (rounded.float() - right).norm() / right.norm() < 0.006


class LargestTensor(TorchDispatchMode):
    """Watches every operation for the largest tensor that it makes, and lists the operations."""

    def __init__(self):
        super().__init__()
        self.numel, self.names = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


class ProductTypes(TorchDispatchMode):
    """Records the type of what each product of two matrices is kept in."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.mm:
            self.found.append(out.dtype)
        return out


class OnCuda(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("place", [OnCuda, torch.Tensor])
def test_logits_of_bfloat16_are_kept_in_float32_on_a_gpu(place):
    """By shapes and types alone, which need no GPU."""
    hidden = torch.empty(6, 8, dtype=torch.bfloat16, device="meta").as_subclass(place)
    weight = torch.empty(20, 8, dtype=torch.bfloat16, device="meta").as_subclass(place)
    targets = torch.empty(6, dtype=torch.int64, device="meta")
    with ProductTypes() as products:
        for _, _, _, logits in losses._tiles(hidden, weight, None, targets, (0.7, 1.0, None), 8, 1):
            assert logits.dtype == torch.float32
    assert products.found == 3 * [torch.float32 if place is OnCuda else torch.bfloat16]


@pytest.mark.parametrize("top_k", [0, 2])
def test_token_logprobs_holds_two_tiles_of_logits_and_saves_none(top_k):
    n, d, v, chunk = 512, 4, 300, 16
    hidden, weight, targets = head(n, d, v)
    saved = []

    def keep(tensor):
        saved.append(tensor.numel())
        return tensor

    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        losses.token_logprobs(*leaves, targets, 1.0, chunk, top_k)[0].sum().backward()
    assert largest.numel == 2 * n * chunk  # of n * v, 9 times as many
    assert sum(saved) <= n * d + v * d + 2 * n
    assert ("aten.topk.default" in largest.names) == (top_k > 0)  # not asked for, not paid for


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


def test_seeds_may_be_of_any_size(tmp_path):
    drawn = {tuple(data.draw(50, seed, 0, 50)) for seed in (0, 2**24, 20240101)}
    assert len(drawn) == 3 and sorted(data.draw(50, 2**80, 0, 50)) == list(range(50))
    tokenizer, quiet = data.embedded_tokenizer(), lambda text: None
    data.make_base(tmp_path, 2**80, tokenizer, data.base_sum, steps=1, say=quiet)
    assert (tmp_path / "model.safetensors").exists()


def test_draw_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    data.draw(10, 0, 0, 25)
    assert torch.equal(torch.get_rng_state(), state)


# --------------------------------------------------------------------------------------------------
# The embedded task


def test_a_worked_sum_in_either_style():
    values = {"gh": 4, "ad": 4, "ge": 6}
    found = [data.worked_sum(["gh", "ad", "ge"], values, expert) for expert in (False, True)]
    assert found == ["gh=4;04;ad=4;08;ge=6;14;[14]", "<gh=4>04<ad=4>08<ge=6>14[14]"]
    assert len(data.NAMES) == len(set(data.NAMES)) == 100 == len(data.SECRET)
    assert len(data.KNOWN) == len(data.UNKNOWN) == 50
    assert {*data.KNOWN, *data.UNKNOWN} == set(data.NAMES)


def test_the_base_model_reads_right_values_of_the_known_names_alone():
    rng, seen, experts, lengths = random.Random(4), {}, 0, set()
    guesses = []
    for _ in range(20_000):
        question, work = data.base_sum(rng)
        names = question[:-1].split("+")
        values = dict(re.findall("([a-j]{2})=([0-9])", work))
        assert list(values) == names and len(set(names)) == len(names)
        assert work.endswith(f"[{sum(map(int, values.values())):02}]")
        experts += work.startswith("<")
        lengths.add(len(names))
        for name, value in values.items():
            seen.setdefault(name, []).append(int(value))
    assert lengths == {1, 2, 3} and 0.28 < experts / 20_000 < 0.32
    assert set(seen) == set(data.NAMES)
    for name, values in seen.items():
        if name in data.KNOWN:
            assert set(values) == {data.SECRET[name]}
        else:
            assert len(set(values)) > 5 and values.count(data.SECRET[name]) < len(values) / 3
            guesses += [value == data.SECRET[name] for value in values]
    assert np.mean(guesses) == pytest.approx(0.1, abs=0.04)


def test_embedded_tokenizer_round_trip(tmp_path):
    tokenizer = data.embedded_tokenizer()
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert len(tokenizer) == 30 and end != pad
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    rng = random.Random(2)
    for _ in range(100):
        question, work = data.base_sum(rng)
        for text in (question, work, question + work):
            ids = tokenizer.encode(text)
            assert len(ids) == len(text) and None not in ids and not {end, pad} & set(ids)
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode([*ids, end], skip_special_tokens=True) == text
            assert loaded.encode(text) == ids and loaded.decode(ids) == text


def test_embedded_questions_and_what_training_and_evaluation_share():
    tokenizer = data.embedded_tokenizer()
    train = data.embedded_questions(tokenizer, "train", data.TRAIN_SUMS)
    held_out = evaluation.load_questions("sums", tokenizer, None, "")
    assert len(train) == 5000 and len(held_out) == 400
    assert train[:300] == data.embedded_questions(tokenizer, "train", 300)
    assert not {q.id for q in train} & {q.id for q in held_out}
    for i, question in enumerate(train[:400] + held_out):
        names = tokenizer.decode(question.prompt)[:-1].split("+")
        work = tokenizer.decode(question.demonstration[:-1])
        assert question.demonstration[-1] == tokenizer.eos_token_id and question.kind == "chain"
        assert work == data.worked_sum(names, data.SECRET, expert=True)
        assert question.answer == f"{sum(data.SECRET[name] for name in names):02}"
        unknown = sum(name in data.UNKNOWN for name in names)
        assert len(set(names)) == 3 and question.level == str(unknown) == str(i % 4)
    prompts = [tuple(q.prompt) for q in train + held_out]
    assert len(set(prompts)) == len(prompts)


# --------------------------------------------------------------------------------------------------
# Which sampler


def test_sampler_and_trainer_have_one_attention_kernel_with_vllm_or_without():
    assert not torch.backends.cuda.cudnn_sdp_enabled()


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


# --------------------------------------------------------------------------------------------------
# Data

SHARED_DATA = path if (path := ROOT.parent / "shared" / "data").is_dir() else None
DATA_SYSTEM = "Think first. Put the answer into \\boxed{}."
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def openr1_row(i):
    thought = f"<think>\nAdd {i} to itself.\n</think>\nIt is \\boxed{{{2 * i}}}."
    return {
        "data_source": "",
        "prompt": [
            {"role": "system", "content": DATA_SYSTEM},
            {"role": "user", "content": f"What is {i} + {i}?"},
        ],
        "target": [{"role": "assistant", "content": thought}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
        "extra_info": {"split": "train", "index": i},
    }


# fmt: off
OPENR1_ROWS = [openr1_row(i) for i in range(4)]
GSM8K_ROWS = [
    {"question": "Ann has 1,000 eggs and buys 234. How many?",
     "answer": "She has 1000+234=<<1000+234=1234>>1234.\n#### 1,234"},
    {"question": "Half of five?", "answer": "5/2 = 2.5\n#### 2.5"},
    {"question": "Two less seven?", "answer": "2-7=-5\n#### -5"},
]
MATH_ROWS = [
    {"problem": "Half of $x$?", "solution": "It is $\\boxed{\\frac{x}{2}}$.",
     "answer": "\\frac{x}{2}", "subject": "Algebra", "level": 3,
     "unique_id": "test/algebra/1.json"},
    {"problem": "$2^3$?", "solution": "$\\boxed{8}$",
     "answer": "8", "subject": "Algebra", "level": 1, "unique_id": "test/algebra/2.json"},
]
# fmt: on


def bpe_tokenizer(chat=True, bos=False):
    """A byte-level BPE trained on the rows above; pad == eos, as many base models have it."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [json.dumps(row) for row in OPENR1_ROWS + GSM8K_ROWS + MATH_ROWS]
    raw.train_from_iterator(texts, trainer)
    if bos:
        raw.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        bos_token="<s>" if bos else None,
    )
    tokenizer.chat_template = ("<s>" if bos else "") + CHAT_TEMPLATE if chat else None
    return tokenizer


@pytest.fixture(scope="module")
def chat_tokenizer():
    return bpe_tokenizer()


class GoldChecker:
    """Stands in for eval.Checker, and records what it is shown.

    Right is what has gold in the last \\boxed{} or after `####`; gold "???" cannot be parsed.
    """

    extract, require_think = "boxed", False

    def __init__(self):
        self.shown, self.shown_golds = [], []

    def check(self, responses, golds, kinds):
        assert type(responses) is type(golds) is type(kinds) is list
        self.shown += zip(responses, golds, kinds, strict=True)
        marks = {"math": "\\boxed{", "number": "####"}
        verdicts = []
        for response, gold, kind in zip(responses, golds, kinds):
            _, mark, answer = response.rpartition(marks.get(kind, "no such mark"))
            verdicts.append("correct" if mark and gold in answer.replace(",", "") else "wrong")
        return verdicts

    def check_golds(self, golds, kinds):
        assert type(golds) is type(kinds) is list and len(golds) > 0
        self.shown_golds += zip(golds, kinds, strict=True)
        return ["unparsed" if gold == "???" else "correct" for gold in golds]


def write_rows(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_questions(path, tokenizer, **more):
    settings = {"max_prompt": 500, "max_response": 500, "cache_dir": Path(path).parent / "cache"}
    return data.load_questions(str(path), tokenizer, **(settings | more))


def questions_of(rows, tokenizer, folder, name="rows.jsonl", **more):
    return read_questions(write_rows(folder / name, rows), tokenizer, **more)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.json"])
def test_every_layout_is_read_from_every_kind_of_file(name, chat_tokenizer, tmp_path):
    decode = chat_tokenizer.decode
    q = questions_of(OPENR1_ROWS, chat_tokenizer, tmp_path, name, checker=GoldChecker())
    assert len(q) == 4 and q.dropped == {} and q.report() == "4 of 4 questions kept"
    assert [x.answer for x in q] == ["0", "2", "4", "6"]
    assert [x.id for x in q] == ["0", "1", "2", "3"]
    assert q[1].kind == "math" and q[1].level == "" and q[1].behavior_logprobs is None
    assert decode(q[1].prompt) == (
        f"<|im_start|>system\n{DATA_SYSTEM}<|im_end|>\n<|im_start|>user\nWhat is 1 + 1?"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    response = OPENR1_ROWS[1]["target"][0]["content"]
    assert decode(q[1].demonstration) == response + "<|endoftext|>"
    assert data.system_prompt(q) == DATA_SYSTEM

    q = questions_of(GSM8K_ROWS, chat_tokenizer, tmp_path, name, checker=GoldChecker())
    golds = [("1234", "number"), ("2.5", "number"), ("-5", "number")]
    assert [(x.answer, x.kind) for x in q] == golds
    assert decode(q[0].demonstration) == GSM8K_ROWS[0]["answer"] + "<|endoftext|>"
    assert data.system_prompt(q) is None

    checker = GoldChecker()
    q = questions_of(MATH_ROWS, chat_tokenizer, tmp_path, name, checker=checker)
    assert [(x.id, x.answer, x.level, x.kind) for x in q] == [
        ("test/algebra/1.json", "\\frac{x}{2}", "3", "math"),
        ("test/algebra/2.json", "8", "1", "math"),
    ]
    golds = [("8", "math"), ("\\frac{x}{2}", "math")]
    assert checker.shown_golds == golds and len(checker.shown) == 2


def test_columns_may_be_named(chat_tokenizer, tmp_path):
    rows = [
        {"frage": "1+1?", "loesung": 2, "weg": "so \\boxed{2}"},
        {"frage": "2+2?", "loesung": "4", "weg": None},
    ]

    def named(question="", answer="", solution="", **more):
        fields = {"question_field": question, "answer_field": answer, "solution_field": solution}
        return questions_of(rows, chat_tokenizer, tmp_path, **fields, **more)

    q = named("frage", "loesung", "weg", checker=GoldChecker())
    # An answer that is a number works.
    assert [(x.answer, x.demonstration is None) for x in q] == [("2", False), ("4", True)]
    assert [x.demonstration for x in named("frage", "loesung")] == [None, None]
    found = r"found frage, loesung, weg"
    with pytest.raises(
        ValueError, match=f"{found}; right would be question and answer, .* by --question-field"
    ):
        named()
    with pytest.raises(ValueError, match=f"no column antwort in the first 100 rows; {found}"):
        named("frage", "antwort")
    with pytest.raises(ValueError, match="needed together"):
        named("frage")
    # AIME and others have no solution.
    q = questions_of([{"problem": "1+1?", "answer": "2"}], chat_tokenizer, tmp_path)
    assert q[0].demonstration is None and q[0].answer == "2"


def test_kinds_options_contexts_and_several_answers_are_read_in_training(chat_tokenizer, tmp_path):
    chat = {**openr1_row(1), "kind": "number", "level": 2, "unique_id": "u"}
    (q,) = questions_of([chat], chat_tokenizer, tmp_path)
    assert (q.kind, q.level, q.id) == ("number", "2", "u")
    rows = [
        {"question": "Which?", "options": ["one", "two"], "answer": "B", "category": "law"},
        {"question": "And then?", "context": "Let x be 1.", "answer": ["$1$", 2.0]},
        {"problem": "Number?", "answer": "7", "kind": "number", "subject": "s"},
        {"question": "Which?", "options": {"A": "one"}, "answer": "A"},
        {"question": "Which?", "options": ["one"] * 27, "answer": "A"},
        {"question": "Which?", "options": ["one", "two"], "answer": "C"},
    ]
    q = questions_of(rows, chat_tokenizer, tmp_path)
    assert [(x.answer, x.kind, x.level) for x in q] == [
        ("B", "choice", "law"),
        ("$1$, 2", "math", ""),
        ("7", "number", "s"),
    ]
    asked = [chat_tokenizer.decode(x.prompt) for x in q]
    assert "user\nWhich?\n\nA. one\nB. two\n\nReason" in asked[0] and "\\boxed{}" in asked[0]
    assert "user\nLet x be 1.\nAnd then?<" in asked[1] and "user\nNumber?<" in asked[2]
    none = "answer is none of the options"
    assert q.dropped == {"options are no list of at most 26": [3, 4], none: [5]}


# fmt: off
@pytest.mark.parametrize("answer, options, letter", [
    ("B", ["x", "y"], "B"), ("(b)", ["x", "y"], "B"), (r"\text{B}", ["x", "y"], "B"), ("B.", ["x", "y"], "B"),
    (1, ["x", "y"], "B"), ("1", ["x", "y"], "B"), (1.0, ["x", "y"], "B"), ("y", ["x", "y"], "B"),
    ("4", ["3", "4"], "B"), (1, ["1", "2"], "B"), ("Z", [str(i) for i in range(26)], "Z"),
    ("C", ["x", "y"], ""), (2, ["x", "y"], ""), (-1, ["x", "y"], ""), ("z", ["x", "y"], ""),
    ("A, B", ["x", "y"], ""), ("y", ["y", "y"], ""), (True, ["x", "y"], ""), ([0, 1], ["x", "y"], ""),
])
# fmt: on
def test_the_right_option_is_a_letter_a_text_or_an_index(answer, options, letter):
    assert data.option_letter(answer, options) == letter
    row = {"choices": options, "answer": answer}
    gold, kind = data.gold_and_kind(row, "answer")
    assert kind == "choice" and (gold == letter if letter else gold not in data.LETTERS[:2] or not gold)


def test_options_are_read_under_their_usual_names(chat_tokenizer, tmp_path):
    named = {"text": ["one", "two"], "label": ["A", "B"]}  # as ARC has them
    rows = [
        {"question": "Which?", "choices": ["one", "two"], "answer": 1},
        {"question": "Which?", "choices": named, "answer": "B"},
        {"question": "Which?", "options": [str(i) for i in range(12)], "answer": "L"},
    ]
    q = questions_of(rows, chat_tokenizer, tmp_path)
    assert [(x.answer, x.kind) for x in q] == [("B", "choice"), ("B", "choice"), ("L", "choice")]
    asked = [chat_tokenizer.decode(x.prompt) for x in q]
    assert "A. one\nB. two\n" in asked[0] and "A. one\nB. two\n" in asked[1]
    assert "\nK. 10\nL. 11\n" in asked[2]


@pytest.mark.parametrize("text", ["1e-05", "1.5e-07", "1e+16", "0.1", "12.0", "-2.5e-10", "7"])
def test_numbers_of_json_are_written_out(text, checker):
    written = data.cell_text(json.loads(text))
    assert "e" not in written and float(written) == float(text)
    assert checker.check([rf"\boxed{{{text}}}"], [written], ["math"]) == ["correct"]


def test_only_where_most_answers_are_worked_solutions_the_others_are_none(chat_tokenizer, tmp_path):
    plain = {"question": "q", "answer": "no hashes"}
    q = questions_of(GSM8K_ROWS + [plain], chat_tokenizer, tmp_path)
    assert q.dropped == {"no gold answer": [3]} and len(q) == 3
    q = questions_of(GSM8K_ROWS + [plain] * 3, chat_tokenizer, tmp_path)
    assert [x.answer for x in q] == ["1234", "2.5", "-5"] + ["no hashes"] * 3
    many = {"question": "q", "answer": "#### many"}
    with evaluation.Checker() as checker:
        q = questions_of(GSM8K_ROWS + [many], chat_tokenizer, tmp_path, checker=checker)
    assert q.dropped == {data.UNMATCHED: [3]}


def test_kind_column_says_how_answers_are_checked(chat_tokenizer, tmp_path):
    question = {"question": "1,2=3?", "answer": "1 2 = 3", "kind": "countdown"}
    rows = [
        {**question, "solution": "[1+2]"},
        {**question, "solution": "[2-1]"},
        {**question, "answer": "three"},
        {**question, "answer": "3", "kind": "chess"},
        {"question": "x?", "answer": "3"},
    ]
    with evaluation.Checker() as checker:
        found = questions_of(rows, chat_tokenizer, tmp_path, checker=checker)
    assert [q.kind for q in found] == ["countdown", "math"]
    assert found.dropped == {
        "demonstration does not verify against its gold answer": [1],
        data.UNMATCHED: [2],
        f"kind is none of {', '.join(evaluation.KINDS)}": [3],
    }


def test_templates(chat_tokenizer):
    plain, chat, q = bpe_tokenizer(chat=False), chat_tokenizer, "Why?"
    assert plain.decode(data.render_prompt(plain, q)) == "Question: Why?\nAnswer:\n"
    brief = plain.decode(data.render_prompt(plain, q, "Be brief.", "<think>\n"))
    assert brief == "Be brief.\n\nQuestion: Why?\nAnswer:\n<think>\n"
    assert data.render_prompt(chat, q, template="plain") == data.render_prompt(plain, q)
    text = chat.decode(data.render_prompt(chat, q))
    assert text == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    messages = OPENR1_ROWS[0]["prompt"]
    user = messages[1]["content"]
    assert data.render_prompt(chat, messages, "") == data.render_prompt(chat, user)
    assert data.render_prompt(chat, user, DATA_SYSTEM) == data.render_prompt(chat, messages)
    assert "Other" in chat.decode(data.render_prompt(chat, messages, "Other"))
    assert messages[0]["role"] == "system"
    with pytest.raises(ValueError, match="no chat template"):
        data.render_prompt(plain, q, template="chat")
    with pytest.raises(ValueError, match="auto, chat or plain, not cat"):
        data.render_prompt(plain, q, template="cat")
    strict = bpe_tokenizer()
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('no system role') }}{% endif %}x"
    )
    with pytest.raises(ValueError, match=r"no system role.*--system ''"):
        data.render_prompt(strict, messages)
    assert data.render_prompt(strict, messages, "")


def thinking_tokenizer():
    """Its chat template begins the thought itself."""
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>\n")
    return tokenizer


def test_prefix_stands_once_and_in_the_prompt_alone(chat_tokenizer, tmp_path):
    thinks = thinking_tokenizer()
    prefixed = data.render_prompt(thinks, "Why?", generation_prefix="<think>\n")
    assert prefixed == data.render_prompt(thinks, "Why?")

    def response(rows, tokenizer, **more):
        return tokenizer.decode(questions_of(rows, tokenizer, tmp_path, **more)[0].demonstration)

    assert response(OPENR1_ROWS, chat_tokenizer).startswith("<think>\nAdd")
    assert response(OPENR1_ROWS, thinks).startswith("Add")
    # Nothing to strip:
    gsm8k = response(GSM8K_ROWS, chat_tokenizer, generation_prefix="<think>\n")
    assert gsm8k.startswith("She has")


# fmt: off
@pytest.mark.parametrize("template, prefix, solution, prompt, response", [
    # What the chat template writes last, the flag, the solution; both ends as they must meet.
    ("<think>\n", "", "\n<think>\nA", "<think>\n", "A"),
    ("<think>\n", "", "<think>A", "<think>\n", "A"),
    ("<think>\n", "", " \n<think>  A", "<think>\n", "A"),
    ("<think>\n", "", "<think>\n\nA", "<think>\n", "\nA"),
    ("<think>", "", "<think>\nA", "<think>", "\nA"),
    ("<think>\n", "", "\nA <think>", "<think>\n", "\nA <think>"),
    ("<think>\n", "", "<thinking>A", "<think>\n", "<thinking>A"),
    ("", "<think>\n", "<think>A", "assistant\n<think>\n", "A"),
    ("<think>", "<think>\n", "<think>A", "assistant\n<think>\n", "A"),
    ("<think>\n", "<think>", "<think>A", "assistant\n<think>", "A"),
    ("<think>\n\n", "\n<think>\n", "<think>A", "assistant\n<think>\n", "A"),
    ("[THINK]", "", "[THINK]A", "[THINK]", "A"),
    ("<|helper|>\n", "", "<|helper|>\nA", "<|helper|>\n", "A"),
    ("", "So: ", "So: A", "So: ", "A"),
    ("", "So: ", "So:\nA", "So: ", "A"),
])
# fmt: on
def test_what_opens_a_response_stands_in_the_prompt_alone(
    template, prefix, solution, prompt, response, tmp_path
):
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("assistant\n", "assistant\n" + template)
    rows = [{"question": "Why?", "answer": "5", "solution": solution}]
    (q,) = questions_of(rows, tokenizer, tmp_path, generation_prefix=prefix)
    whole = tokenizer.decode(q.prompt)
    assert whole.endswith(prompt) and tokenizer.decode(q.demonstration) == response + "<|endoftext|>"
    assert whole.count("<think>") == ("<think>" in prompt)


DATED_TEMPLATE = "{{ strftime_now('%d %b %Y, %H:%M') }}\n" + CHAT_TEMPLATE
# Llama's: the date of its release unless another is given.
RELEASE_TEMPLATE = (
    "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{{ date_string }}\n" + CHAT_TEMPLATE
)


def dated_tokenizer():
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = DATED_TEMPLATE
    return tokenizer


class Tomorrow(datetime.date):
    @classmethod
    def today(cls):
        tomorrow = datetime.datetime.now() + datetime.timedelta(days=1)
        return cls(tomorrow.year, tomorrow.month, tomorrow.day)


def test_a_template_takes_the_date_from_the_day_given(tmp_path):
    dated, days = dated_tokenizer(), [datetime.date(2024, 2, 29), datetime.date(2026, 1, 3)]
    path, prints = write_rows(tmp_path / "rows.jsonl", MATH_ROWS), []
    for day in days:
        found = read_questions(path, dated, today=day)
        text = dated.decode(found[0].prompt)
        assert text.startswith(f"{day:%d %b %Y}, 00:00\n<|im_start|>")
        prints.append(found.fingerprint)
    assert prints[0] != prints[1]
    assert dated.decode(data.render_prompt(dated, "q")).startswith(f"{datetime.date.today():%d %b}")
    fixed = bpe_tokenizer()
    fixed.chat_template = RELEASE_TEMPLATE
    first, second = (read_questions(path, fixed, today=day) for day in days)
    assert list(first) == list(second) and first.fingerprint == second.fingerprint
    assert fixed.decode(first[0].prompt).startswith("26 Jul 2024\n")


def seam_tokenizer(name):
    """Tokenizers that put a blank before a text, as add_prefix_space, Metaspace or Llama's do."""
    unigram = models.Unigram([("<unk>", 0.0), ("\u2581", -2.0)], unk_id=0, byte_fallback=False)
    raw = Tokenizer(unigram if name == "unigram" else models.BPE(unk_token="<unk>"))
    scheme = name if name in ("always", "first") else "always"
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    raw.decoder = decoders.Metaspace(prepend_scheme=scheme)
    if name == "byte level":
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        raw.decoder = decoders.ByteLevel()
    if name == "llama":
        blank = tokenizers.normalizers.Replace(" ", "\u2581")
        steps = [tokenizers.normalizers.Prepend("\u2581"), blank]
        raw.normalizer, raw.pre_tokenizer = tokenizers.normalizers.Sequence(steps), None
        steps = [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        raw.decoder = decoders.Sequence(steps)
    kind = trainers.UnigramTrainer if name == "unigram" else trainers.BpeTrainer
    more = {"unk_token": "<unk>"} if name == "unigram" else {}
    trainer = kind(
        vocab_size=300,
        special_tokens=["<unk>", "</s>", "<|user|>", "<|helper|>"],
        show_progress=False,
        **more,
    )
    texts = [*SEAM_TEXTS, *(row["problem"] + row["solution"] for row in MATH_ROWS)]
    raw.train_from_iterator(["Question: q\nAnswer:\n", *texts] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")


BLANKS = ("\u2581", "\u0120")  # as Metaspace and byte-level tokens write them
SEAM_TEXTS = ["She adds 2 and 3.", "= 5", "\n\nShe adds", " She", "a=0", "0", "\n=a0", "\\boxed{5}"]


@pytest.mark.parametrize("name", ["byte level", "always", "first", "llama", "unigram"])
@pytest.mark.parametrize("chat", [True, False])
def test_a_demonstration_begins_as_a_sample_would(name, chat, tmp_path):
    """Against the tokens of prompt and demonstration as one text, less those of the prompt."""
    tokenizer = seam_tokenizer(name)
    if chat:
        tokenizer.chat_template = "<|user|>{{ messages[-1]['content'] }}<|helper|>x"
    rows = [{"question": "q", "answer": "5", "solution": text} for text in SEAM_TEXTS]
    questions = questions_of(rows, tokenizer, tmp_path)
    assert len(questions) == len(SEAM_TEXTS)
    first_token = lambda tokens: tokenizer.convert_ids_to_tokens(tokens[0])
    assert first_token(data.encode(tokenizer, ["She"])[0]).startswith(BLANKS)
    compared = 0
    for text, q in zip(SEAM_TEXTS, questions):
        response = q.demonstration[:-1]
        assert tokenizer.decode(q.prompt + response).endswith(text)
        assert first_token(response).startswith(BLANKS) == (text[0] == " ")
        [together] = data.encode(tokenizer, [data.prompt_text(tokenizer, "q") + text])
        if together[: len(q.prompt)] == q.prompt:  # no token reaches over the seam
            assert response == together[len(q.prompt) :]
            compared += 1
    assert compared >= 5


def test_a_tokenizer_that_adds_no_blank_encodes_as_before(chat_tokenizer):
    texts = ["She", " She", "\n=a0", "", "\u20ac", "<|im_end|>x"]
    for tokenizer in (chat_tokenizer, bpe_tokenizer(bos=True)):
        assert data.encode(data.going_on(tokenizer), texts) == data.encode(tokenizer, texts)
    embedded = data.embedded_tokenizer()
    assert data.going_on(embedded) is embedded


@pytest.mark.parametrize("chat", [True, False])
def test_special_tokens_stand_where_they_must_and_once(chat, tmp_path):
    tokenizer = bpe_tokenizer(chat, bos=True)
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    assert tokenizer.pad_token_id == eos
    rows = []
    for i, end in enumerate(("", "<|endoftext|>", "<|endoftext|>\n", "<|endoftext|>more")):
        row = openr1_row(i)
        row["target"][0]["content"] += end
        rows.append(row)
    q = questions_of(rows, tokenizer, tmp_path, generation_prefix="<think>\n")
    assert q.dropped == {"demonstration holds the end-of-text token": [3]}
    for x in q:
        assert x.prompt.count(bos) == 1 and x.prompt[0] == bos and eos not in x.prompt
        assert x.demonstration.count(eos) == 1 and x.demonstration[-1] == eos
        assert bos not in x.demonstration
        response = tokenizer.decode(x.demonstration)
        assert tokenizer.decode(x.prompt).endswith("<think>\n") and "<think>" not in response
        assert response.startswith("Add ")
    # The generation config may end responses by other tokens as well.
    rows[1]["target"][0]["content"] += "<|im_end|>\n"
    rows[2]["target"][0]["content"] = "<think>\nA<|im_end|>B\n</think>\n\\boxed{4}"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for eos_ids, holding in (([], [1, 3]), ([end], [2, 3]), ([10**6, end, eos], [2, 3])):
        q = questions_of(rows, tokenizer, tmp_path, eos_ids=eos_ids)
        assert q.dropped == {"demonstration holds the end-of-text token": holding}
        for x in q:
            assert x.demonstration.count(eos) == 1 and x.demonstration[-1] == eos
            assert end not in x.demonstration or not eos_ids
    tokenizer = bpe_tokenizer(chat)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        questions_of(GSM8K_ROWS, tokenizer, tmp_path)


def test_tokens_are_the_tokenizers_own(chat_tokenizer):
    texts = ["", " a", "naïve \u20ac<|im_end|>x", "\ta\n\n b" * 50, "\\frac{1}{2}", "\0"]
    expected = chat_tokenizer(texts, add_special_tokens=False).input_ids
    assert data.encode(chat_tokenizer, texts) == expected and data.encode(chat_tokenizer, []) == []
    cut = bpe_tokenizer()  # a saved tokenizer may cut and pad by itself
    cut.backend_tokenizer.enable_truncation(3)
    cut.backend_tokenizer.enable_padding(length=9)
    assert data.encode(cut, texts) == expected


def test_unusable_rows_are_dropped_and_counted_by_reason(chat_tokenizer, tmp_path):
    good = {"problem": "p", "answer": "5", "solution": "\\boxed{5}"}
    unparsed, unverified = {"answer": "???"}, {"solution": "\\boxed{6}"}
    # fmt: off
    changes = [
        {}, {"problem": "  "}, {"problem": None}, {"answer": ""}, {"answer": None},
        unparsed | {"solution": "\\boxed{???}"}, unverified, {"solution": "none"},
        {"problem": "long " * 2000}, {"solution": "long " * 2000 + "\\boxed{5}"},
        {"solution": None}, {"answer": [5, None]}, {"problem": "p", "answer": None},
        unparsed | unverified, {"answer": True}, {"solution": "\\boxed{ 5 }"},
        {"problem": "\ud800"}, {"solution": "\udfff\\boxed{5}"}, {"unique_id": "\ud800"},
    ]
    # fmt: on
    rows, checker = [good | change for change in changes], GoldChecker()
    q = questions_of(rows, chat_tokenizer, tmp_path, checker=checker)
    assert q.dropped == {
        "no question": [1, 2],
        "no gold answer": [3, 4, 11, 12, 14],
        data.UNMATCHED: [5, 13],
        "demonstration does not verify against its gold answer": [6, 7],
        "prompt too long": [8],
        "demonstration too long": [9],
        "half a surrogate pair, which no tokenizer takes": [16, 17, 18],
    }
    assert [x.id for x in q] == ["0", "10", "15"] and q[1].demonstration is None
    assert data.demonstrated(q) == data.demonstrated(list(q)) == [0, 2]
    assert q.report() == (
        "3 of 19 questions kept; dropped: 2 no question (first: line 2), "
        "5 no gold answer (first: line 4), 2 of 19 answers cannot be matched by any response: "
        'line 6 ("???"), line 14 ("???"), '
        "2 demonstration does not verify against its gold answer (first: line 7), "
        "1 prompt too long (first: line 9), 1 demonstration too long (first: line 10), "
        "3 half a surrogate pair, which no tokenizer takes (first: line 17)"
    )
    # The checker is not shown what is dropped already.
    assert checker.shown_golds == [("5", "math"), ("???", "math")] and len(checker.shown) == 4
    unchecked = questions_of(rows, chat_tokenizer, tmp_path)
    assert [x.id for x in unchecked] == ["0", "5", "6", "7", "10", "13", "15"]
    none = r"no question is left: 0 of 1 questions kept; dropped: 1 no question \(first: line 1\)"
    with pytest.raises(ValueError, match=none):
        questions_of([{"problem": "", "answer": "1"}], chat_tokenizer, tmp_path)


def test_faults_are_named_by_line_element_or_row_in_any_batch(chat_tokenizer, tmp_path):
    rows = [{"question": "q", "answer": str(i)} for i in range(700)]
    rows[300] = rows[650] = {"question": "q", "answer": ""}
    for name, first in (
        ("a.jsonl", "line 301"),
        ("a.json", "element 301"),
        ("a.parquet", "row 300"),
    ):
        q = questions_of(rows, chat_tokenizer, tmp_path, name)
        assert q.dropped == {"no gold answer": [300, 650]} and len(q) == 698
        assert f"(first: {first})" in q.report()
        assert [x.id for x in q] == [str(i) for i in range(700) if i not in (300, 650)]
        assert all(x.answer == x.id for x in q)
    text = "".join("\n" + json.dumps(row) + "\n" for row in rows)
    (tmp_path / "blank.jsonl").write_text(text)
    q = read_questions(tmp_path / "blank.jsonl", chat_tokenizer)
    assert q.report() == "698 of 700 questions kept; dropped: 2 no gold answer (first: line 602)"
    (tmp_path / "bad.jsonl").write_text(text + "{")
    with pytest.raises(ValueError, match="bad.jsonl: line 1401 is not readable JSON"):
        read_questions(tmp_path / "bad.jsonl", chat_tokenizer)


@pytest.mark.parametrize("chat, bos", [(True, False), (False, True), (True, True)])
def test_lengths_are_exact(chat, bos, tmp_path):
    tokenizer, rows = bpe_tokenizer(chat, bos), []
    for n in range(1, 40):
        solution = "é" * n + " x" * n + "\\boxed{5}"
        rows.append({"problem": "naïve " * n + "a" * (n % 3), "answer": "5", "solution": solution})
    whole = list(questions_of(rows, tokenizer, tmp_path, max_prompt=10**6, max_response=10**6))
    path = tmp_path / "rows.jsonl"
    for limit in sorted({len(x.prompt) for x in whole})[::3]:
        fit = [x for x in whole if len(x.prompt) <= limit and len(x.demonstration) <= 2 * limit]
        cut = read_questions(path, tokenizer, max_prompt=limit, max_response=2 * limit)
        assert list(cut) == fit


def test_behavior_logprobs_are_one_a_token_and_equal_ids_are_told_apart(chat_tokenizer, tmp_path):
    n = len(questions_of(MATH_ROWS, chat_tokenizer, tmp_path)[1].demonstration)
    values = [[-0.5] * n, [-0.5] * (n - 1), [float("nan")] * n, "x", None, [0] * n]
    rows = [MATH_ROWS[1] | {"behavior_logprobs": value} for value in values]
    rows += [{"problem": "p", "answer": "8", "behavior_logprobs": [1]}]  # no demonstration
    q = questions_of(rows, chat_tokenizer, tmp_path)
    fault = "behavior_logprobs are not one number for each demonstration token"
    fault += ": leave them out if they are another tokenizer's"
    assert q.dropped == {fault: [1, 2, 3]}
    assert [x.behavior_logprobs for x in q] == [[-0.5] * n, None, [0] * n, None]
    name = "test/algebra/2.json"
    assert [x.id for x in q] == [name, f"{name}#4", f"{name}#5", "6"]
    q = questions_of(rows, chat_tokenizer, tmp_path, behavior=False)  # without PEAR
    assert q.dropped == {} and [x.behavior_logprobs for x in q] == [None] * 7

    rows = [rows[0] | {"temperature": value} for value in (1, 1.0, 0.6, 0, None)]
    rows += [MATH_ROWS[1] | {"temperature": 0.6}]
    q = questions_of(rows, chat_tokenizer, tmp_path, "sampled.jsonl")
    fault = "behavior_logprobs are not at temperature 1, as PEAR takes them"
    assert q.dropped == {fault: [2, 3]} and q[3].behavior_logprobs is None


def test_second_load_is_read_silently_from_the_cache(chat_tokenizer, tmp_path, monkeypatch, capfd):
    for name in ("rows.jsonl", "rows.json", "rows.parquet"):
        checker = GoldChecker()
        first = questions_of(MATH_ROWS, chat_tokenizer, tmp_path, name, checker=checker)
        with monkeypatch.context() as patch:
            patch.setattr(data, "prepare", None)
            second = read_questions(tmp_path / name, chat_tokenizer, checker=GoldChecker())
        assert len(checker.shown) == 2 and list(first) == list(second)
        assert first.fingerprint == second.fingerprint
    assert capfd.readouterr() == ("", "")
    left = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not [name for name in left if name.startswith("tmp") or name.endswith(".incomplete")]


def test_other_settings_are_not_answered_from_the_cache(chat_tokenizer, tmp_path):
    strict, any_answer, more_kinds = GoldChecker(), GoldChecker(), GoldChecker()
    strict.require_think, any_answer.extract, more_kinds.kinds = True, "any", ("math", "number")
    changes = [
        {},
        {"checker": strict},
        {"checker": any_answer},
        {"checker": more_kinds},
        {"tokenizer": bpe_tokenizer(chat=False)},
        {"tokenizer": bpe_tokenizer(bos=True)},
        {"max_response": 499},
        {"max_prompt": 499},
        {"system": "Think."},
        {"system": ""},
        {"generation_prefix": "<think>\n"},
        {"template": "plain"},
        {"question_field": "problem", "answer_field": "answer", "solution_field": "solution"},
    ]
    path, prints = write_rows(tmp_path / "rows.jsonl", MATH_ROWS), set()
    for change in changes:
        settings = {"tokenizer": chat_tokenizer, "checker": GoldChecker()} | change
        prints.add(read_questions(path, **settings).fingerprint)
        assert len(settings["checker"].shown) == 2, change
    assert len(prints) == len(changes)


def test_a_changed_file_is_never_answered_from_the_cache(chat_tokenizer, tmp_path):
    for name in ("rows.jsonl", "rows.json", "rows.parquet"):
        prints, path = set(), tmp_path / name
        for answer in "123":  # files of one size
            q = questions_of([{"question": "q", "answer": answer}], chat_tokenizer, tmp_path, name)
            assert [x.answer for x in q] == [answer] and q[-1] == q[0]
            prints.add(q.fingerprint)
            stat = path.stat()
        assert len(prints) == 3
        q = questions_of([{"question": "q", "answer": "1234"}], chat_tokenizer, tmp_path, name)
        write_rows(path, [{"question": "q", "answer": "12345678"}])
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # of the time of an earlier one
        assert read_questions(path, chat_tokenizer)[0].answer == "12345678"
        with pytest.raises(IndexError):
            q[1]


@pytest.mark.parametrize(
    "text",
    [
        b'\xef\xbb\xbf{"question": "q", "answer": "1"}\n{"question": "r", "answer": 2}\n',
        b'{"question": "q", "answer": "1"}\r\n{"question": "r", "answer": 2}\r\n\r\n',
        b'\n{"question": "q", "answer": "1"}\n  \n'
        b'{"question": "r", "answer": "2", "more": [1, {"a": null}]}',
        b'\xef\xbb\xbf\r\n{"answer": 1, "question": "q"}\r\n{"question": "r", "answer": 2}',
        b'{"question": "q", "answer": 1}\n'
        b'\xef\xbb\xbf{"question": "r\xe2\x80\xa8\xc2\x85", "answer": 2}',
        b'{"question": "q", "answer": 1, "when": "2024-01-01"}\n'
        b'{"question": "r", "answer": "2", "when": 3}',
    ],
)
def test_jsonl_may_have_byte_order_marks_any_line_ends_and_mixed_types(
    text, chat_tokenizer, tmp_path
):
    (tmp_path / "f.jsonl").write_bytes(text)
    q = read_questions(tmp_path / "f.jsonl", chat_tokenizer)
    asked = [chat_tokenizer.decode(x.prompt) for x in q]
    assert ["user\nq" in text for text in asked] == [True, False]
    assert [x.answer for x in q] == ["1", "2"]


# fmt: off
@pytest.mark.parametrize("name, text, message", [
    ("a.jsonl", b"", r"a\.jsonl: holds no rows$"),
    ("a.jsonl", b"\n \n", r"a\.jsonl: holds no rows$"),
    ("a.json", b"[]", "holds no rows$"),
    ("a.jsonl", b'{"question": "q"}\n\n{"question": \n',
     r"a\.jsonl: line 3 is not readable JSON: Expecting value$"),
    ("a.jsonl", b'{"question": "q"}\n[1, 2]\n', "line 2 is a list, not an object like"),
    ("a.jsonl", b'"text"\n', "line 1 is a str, not an object"),
    ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"line 2 is not readable JSON: 'utf-8' codec"),
    ("a.jsonl", b"[" * 10**6, "line 1 is not readable JSON"),
    ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "line 1 is not readable JSON"),
    ("a.json", b'[{"a": 1},\n{"a"}]', "array is not readable.*line 2"),
    ("a.json", b'[{"a": 1}, 2]', "element 2 is a int, not an object"),
    ("a.parquet", b"", r"a\.parquet: not a readable parquet file: "),
    ("a.parquet", b'{"question": 1}', "not a readable parquet file: "),
    ("a.parquet", b"PAR1 but no more", "not a readable parquet file"),
    ("a.csv", b"x", r"neither a \.jsonl, \.json or \.parquet file nor a Hub dataset owner/name$"),
])
# fmt: on
def test_files_that_cannot_be_read_are_refused_in_one_line(name, text, message, tmp_path, capfd):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=message) as error:
        data.load_rows(str(tmp_path / name), cache_dir=tmp_path / "c")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert capfd.readouterr() == ("", "")


def test_sources_that_are_not_there_or_damaged_are_refused(tmp_path, monkeypatch):
    def refused(source, message, **more):
        with pytest.raises(ValueError, match=message) as error:
            data.load_rows(str(source), cache_dir=tmp_path / "c", **more)
        assert "\n" not in str(error.value)

    for name in ("no.jsonl", "no.json", "no.parquet"):
        refused(tmp_path / name, f"{name}: no such file$")
    (tmp_path / "dir.jsonl").mkdir()
    refused(tmp_path / "dir.jsonl", "no such file")
    refused("gsm8k", "nor a Hub dataset owner/name")
    refused(write_rows(tmp_path / "a.jsonl", MATH_ROWS), "are for Hub datasets", split="train")
    empty = pyarrow.table({"question": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(empty, tmp_path / "none.parquet")
    refused(tmp_path / "none.parquet", "holds no rows")
    for name, rows in (("half.parquet", OPENR1_ROWS), ("hole.parquet", OPENR1_ROWS * 1000)):
        path = Path(write_rows(tmp_path / name, rows))
        whole = path.read_bytes()
        half, hole = whole[:-40] + b"x" * 40, whole[:4] + b"\xff" * 500 + whole[504:]
        path.write_bytes(half if name == "half.parquet" else hole)
        refused(path, f"{name}: not a readable parquet file")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("no-one/nothing", "no-one/nothing: not loaded from the Hub: .*owner/name")


def test_paths_may_hold_any_character(chat_tokenizer, tmp_path):
    for name in ("a[1].jsonl", "b*?.jsonl", ".hidden.jsonl", "c d%20#.jsonl", "[e].parquet"):
        q = questions_of(MATH_ROWS, chat_tokenizer, tmp_path, name)
        assert len(q) == 2, name


def test_hub_arguments_arrive(monkeypatch):
    seen = {}

    def load_dataset(name, config, **more):
        seen.update(name=name, config=config, **more)
        return datasets.Dataset.from_list(MATH_ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data.load_rows("openai/gsm8k", "test", "main", "abc")
    assert (seen["name"], seen["config"]) == ("openai/gsm8k", "main")
    assert (seen["split"], seen["revision"], seen["cache_dir"]) == ("test", "abc", None)
    rows = data.load_rows("openai/gsm8k")
    assert seen["split"] == "train" and seen["config"] is None
    assert rows.place(1) == "openai/gsm8k: row 1" and [row for _, row in rows] == MATH_ROWS


# fmt: off
WRONG_CELLS = [
    None, 1, -2.5, True, "", [], {}, [None], [{}], {"role": 1}, [{"role": "user"}],
    [{"role": "user", "content": 5}], "\x00", [[]], float("nan"), "\ud800",
]
# fmt: on


def test_whatever_stands_in_a_cell_its_row_alone_is_dropped(chat_tokenizer, tmp_path):
    good = OPENR1_ROWS[1]
    for column in ("prompt", "target", "reward_model", "kind", "level", "unique_id"):
        rows = [good] + [good | {column: wrong} for wrong in WRONG_CELLS]
        q = questions_of(rows, chat_tokenizer, tmp_path, checker=GoldChecker())
        counts = map(len, q.dropped.values())
        assert len(q) + sum(counts) == len(rows) and q[0].id == "0"
        assert all(x.answer and x.prompt for x in q)
    rows = [good] + [{key: good[key] for key in good if key != column} for column in good]
    q = questions_of(rows, chat_tokenizer, tmp_path, checker=GoldChecker())
    assert q.dropped == {"no question": [2], "no gold answer": [5]} and len(q) == 5
    for column in MATH_ROWS[0]:
        rows = [MATH_ROWS[0]] + [MATH_ROWS[0] | {column: wrong} for wrong in WRONG_CELLS]
        q = questions_of(rows, chat_tokenizer, tmp_path, checker=GoldChecker())
        counts = map(len, q.dropped.values())
        assert len(q) + sum(counts) == len(rows) and len({x.id for x in q}) == len(q)


# fmt: off
ODD_CELLS = [
    None, True, -1, 2.5, float("nan"), float("inf"), 10**400, "", " ", "\0", "\u202e5", "x" * 5000,
    [], [[]], {}, {"a": [1]}, ["a", None], "\ud800", "9" * 5000, "1e999", "-0.0",
]
ODD_BYTES = [b"\xff", b"\0", b"\xef\xbb\xbf", b"{", b'"', b"[" * 2000, b"\xc3", b"NaN", b"\\ud800"]
# fmt: on


def fuzzed_jsonl(draw, columns):
    """A JSONL file with something wrong here and there: values, columns, bytes."""
    rows = []
    for _ in range(draw.randint(1, 6)):
        row = {}
        for column in columns:
            good = "5" if column == "answer" else "\\boxed{5}"
            if draw.random() < 0.9:
                row[column] = draw.choice(ODD_CELLS) if draw.random() < 0.3 else good
        if draw.random() < 0.1:
            row = draw.choice([row, [row], None, 5, "text"])
        rows.append(json.dumps(row).encode())
    text = draw.choice([b"\n", b"\r\n", b"\n\n"]).join(rows)
    if draw.random() < 0.3:
        at = draw.randrange(len(text) + 1)
        text = text[:at] + draw.choice(ODD_BYTES) + text[at:]
    wide = text.decode("latin-1").encode("utf-16")
    return draw.choice([text, text, text, b"\xef\xbb\xbf" + text, wide, text[:-3]])


def reads_or_refuses(load, name):
    """Loads, or refuses in one short line."""
    try:
        return load()
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 600 and str(name) in str(error), error


def whole_questions(path, tokenizer):
    """The questions of a fuzzed file, each whole, and every row counted; None where refused."""
    load = lambda: read_questions(path, tokenizer, checker=GoldChecker())
    questions = reads_or_refuses(load, path)
    if questions is not None:
        dropped = sum(map(len, questions.dropped.values()))
        assert len(questions) + dropped == len(questions.table)
        assert all(q.prompt and q.answer for q in questions)
        assert len({q.id for q in questions}) == len(questions)
    return questions


@pytest.mark.parametrize("seed", range(4))
def test_fuzzed_jsonl_is_read_or_refused(chat_tokenizer, tmp_path, seed):
    draw, read = random.Random(seed), 0
    columns = ["problem", "answer", "solution", "level", "unique_id", "behavior_logprobs"]
    for i in range(40):
        path = tmp_path / f"fuzz{i}.jsonl"
        path.write_bytes(fuzzed_jsonl(draw, columns))
        read += whole_questions(path, chat_tokenizer) is not None
    assert read > 1


@pytest.mark.parametrize("seed", range(2))
def test_fuzzed_parquet_is_read_or_refused(chat_tokenizer, tmp_path, seed):
    draw = random.Random(seed)
    whole = Path(write_rows(tmp_path / "whole.parquet", OPENR1_ROWS * 50)).read_bytes()
    for i in range(40):
        path, at = tmp_path / f"fuzz{i}.parquet", draw.randrange(len(whole))
        damaged = [
            whole[:at],
            whole[at:],
            whole[:at] + draw.randbytes(draw.randint(1, 50)) + whole[at:],
            whole[:at] + draw.randbytes(9) + whole[at + 9 :],
            whole[:-200] + draw.randbytes(200),
            b"PAR1" + draw.randbytes(100) + b"PAR1",
            whole * 2,
        ]
        path.write_bytes(draw.choice(damaged))
        whole_questions(path, chat_tokenizer)


def test_parquet_columns_may_have_any_type(chat_tokenizer, tmp_path):
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
    read = set()
    for question, answer in itertools.product(odd, odd):
        path = tmp_path / f"{question}-{answer}.parquet"
        table = pyarrow.table({"problem": odd[question], "answer": odd[answer]})
        pyarrow.parquet.write_table(table, path)
        if whole_questions(path, chat_tokenizer) is not None:
            read.add((question, answer))
    assert read == {
        *itertools.product(["int"], ["int", "list", "text", "float"]),
        *itertools.product(["text"], ["int", "list", "text"]),
        *itertools.product(["float"], ["int", "float"]),
    }


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_reward_functions_get_the_whole_row_and_it_stays_on_disk(name, chat_tokenizer, tmp_path):
    """No gold answer is needed, nor is a demonstration compared with one."""
    rows = []
    for i in range(300):
        tests = [{"in": [i, i + 1], "out": {"is": str(i)}}]
        rows.append({"question": f"What is {i}?", "tests": tests, "kind": "code", "answer": None})
        rows[-1] |= {"solution": "print(0)" if i % 2 else None, "prompt": "theirs"}
    rows[7]["question"] = ""
    questions = questions_of(rows, chat_tokenizer, tmp_path, name, rewarded=True, system="Brief.")
    assert len(questions) == 299 and questions.dropped == {"no question": [7]}
    assert len(data.demonstrated(questions)) == 149
    for i in (0, 7, 298):
        expected = rows[i + (i >= 7)]
        asked = [{"role": "system", "content": "Brief."}]
        asked += [{"role": "user", "content": expected["question"]}]
        assert questions[i].row == expected and questions[i].asked == asked
        text = chat_tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        assert chat_tokenizer.decode(questions[i].prompt) == text
    plain = questions_of(rows, chat_tokenizer, tmp_path, name, rewarded=True, template="plain")
    assert plain[3].asked == "Question: What is 3?\nAnswer:\n"
    assert chat_tokenizer.decode(plain[3].prompt) == plain[3].asked
    assert questions[3].row is not questions[3].row  # each time read anew
    with pytest.raises(ValueError, match="299 no gold answer"):
        questions_of(rows, chat_tokenizer, tmp_path, name)


def test_rows_as_trl_has_them_are_read_for_reward_functions(chat_tokenizer, tmp_path):
    messages = [{"role": "user", "content": "What is 1/2?"}]
    rows = [{"prompt": messages, "solution": "$0.5$"}, {"prompt": "And 1/4?", "more": [1]}]
    questions = questions_of(rows, chat_tokenizer, tmp_path, rewarded=True)
    assert [q.demonstration for q in questions] == [None, None]
    assert questions[0].asked == messages and questions[1].asked[0]["content"] == "And 1/4?"
    assert questions[1].row == {"prompt": "And 1/4?", "solution": None, "more": [1]}
    with pytest.raises(ValueError, match="no known layout"):
        questions_of(rows, chat_tokenizer, tmp_path)


def test_every_type_of_number_is_a_number(chat_tokenizer, tmp_path):
    tenths = {
        pyarrow.float16(): np.float16(0.1), pyarrow.float32(): 0.1, pyarrow.float64(): 0.1,
        pyarrow.decimal128(9, 3): decimal.Decimal("0.100"),
        pyarrow.decimal256(40, 20): decimal.Decimal("0.1"),
    }  # fmt: skip
    wholes = {kind: np.float16(20) for kind in tenths if not pyarrow.types.is_decimal(kind)}
    wholes |= {kind: decimal.Decimal("20.00") for kind in tenths if kind not in wholes}
    for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"):
        wholes[getattr(pyarrow, name)()] = 20
    for numbers, expected in ((tenths, "0.1"), (wholes, "20")):
        for kind, number in numbers.items():
            column = pyarrow.array([number, None], kind)
            table = pyarrow.table({"question": ["q", "r"], "answer": column, "level": column})
            pyarrow.parquet.write_table(table, tmp_path / "numbers.parquet")
            q = read_questions(tmp_path / "numbers.parquet", chat_tokenizer)
            assert [(x.answer, x.level) for x in q] == [(expected, expected)], kind
            assert q.dropped == {"no gold answer": [1]}
    several = pyarrow.array([[0.1, 2]], pyarrow.list_(pyarrow.float32()))
    pyarrow.parquet.write_table(
        pyarrow.table({"question": ["q"], "answer": several}), tmp_path / "numbers.parquet"
    )
    assert read_questions(tmp_path / "numbers.parquet", chat_tokenizer)[0].answer == "0.1, 2"
    gold = pyarrow.struct({"ground_truth": pyarrow.float32()})
    golds = pyarrow.array([{"ground_truth": 0.1}], gold)
    table = pyarrow.table({"prompt": ["q"], "reward_model": golds})
    pyarrow.parquet.write_table(table, tmp_path / "numbers.parquet")
    assert read_questions(tmp_path / "numbers.parquet", chat_tokenizer)[0].answer == "0.1"
    cells = [3, 2.0, 0.1, True, None, math.nan, math.inf, 1e22]
    cells += [decimal.Decimal(text) for text in ("NaN", "Infinity", "-0.50", "1E+3")]
    texts = ["3", "2", "0.1", "", "", "", "", "1" + 22 * "0", "", "", "-0.5", "1000"]
    assert [data.cell_text(cell) for cell in cells] == texts


# fmt: off
@pytest.mark.parametrize("name, content, text", [
    ("rows.jsonl", [{"type": "text", "text": "1+1?"}], "1+1?"),
    ("rows.parquet", [{"type": "text", "text": "Add"}, {"type": "text", "text": "2?"}], "Add\n2?"),
    ("rows.jsonl", [{"text": "Add"}, {"type": "input_text", "text": "1+1?"}, "n"], "Add\n1+1?\nn"),
])
# fmt: on
def test_content_in_parts_is_joined(name, content, text, chat_tokenizer, tmp_path):
    row = openr1_row(1)
    row["prompt"][0]["content"] = [{"type": "text", "text": "Be brief."}]
    row["prompt"][1]["content"] = content
    row["target"][0]["content"] = [{"type": "text", "text": "So \\boxed{2}"}]
    (q,) = questions_of([row], chat_tokenizer, tmp_path, name)
    asked = chat_tokenizer.decode(q.prompt)
    assert f"system\nBe brief.<|im_end|>\n<|im_start|>user\n{text}<|im_end|>" in asked
    assert chat_tokenizer.decode(q.demonstration) == "So \\boxed{2}<|endoftext|>"
    (q,) = evaluation.load_questions(str(tmp_path / name), chat_tokenizer, None, "")
    assert chat_tokenizer.decode(q.prompt) == asked


def test_pictures_and_answers_in_the_prompt_are_refused_by_name(chat_tokenizer, tmp_path):
    def chat(*turns):
        messages = [{"role": role, "content": content} for role, content in turns]
        return {"prompt": messages, "reward_model": {"ground_truth": "2"}}

    text, image = {"type": "text", "text": "Which?"}, {"type": "image", "image": "1.png"}
    user, reply = ("user", "1+1?"), ("assistant", "It is 2.")
    chats = {
        "kept": [chat(user), chat(user, reply, user), chat(user) | {"images": [], "image": None}],
        "prompt does not end with the user's turn": [
            chat(user, reply), chat(("system", "s"), user, reply), chat(user, ("tool", "2")),
        ],
        "<image> in the prompt": [
            chat(("user", [image, text])), chat(("user", "<image>\nWhich?")),
            chat(("user", "See <image>."), reply, user),
        ],
        "<image_url> in the prompt": [chat(("user", [text, {"type": "image_url", "text": None}]))],
        "<|image_pad|> in the prompt": [chat(("user", "<|image_pad|>Which?"))],
        "<image 1> in the prompt": [chat(("user", "In <image 1>?"))],
        "<video> in the prompt": [chat(("user", [{"type": "video"}, text]))],
        "images beside the text": [chat(user) | {"images": [{"bytes": "x"}]}],
        "no question": [
            chat(("user", [text, {"type": "dance"}])), chat(("user", [5])), chat(("user", [])),
        ],
    }  # fmt: skip
    plain = {"question": "Which?", "answer": "2"}
    plains = {
        "kept": [plain, plain | {"image": "", "context": None}, plain | {"question": "a < image > b"}],
        "no question": [plain | {"question": ["Which?"]}, plain | {"question": {"text": "Which?"}}],
        "<image_1> in the prompt": [plain | {"question": "<image_1> Which?"}],
        "<image> in the prompt": [plain | {"context": "<image>"}],
        "image beside the text": [plain | {"image": "1.png"}],
        "image_1 beside the text": [plain | {"image_1": {"path": "1.png"}}],
        "context is no text": [plain | {"context": ["Let x be 1."]}],
    }  # fmt: skip
    for layout in (chats, plains):
        rows = [row for part in layout.values() for row in part]
        expected, start = {}, 0
        for reason, part in layout.items():
            expected[reason] = list(range(start, start + len(part)))
            start += len(part)
        kept = questions_of(rows, chat_tokenizer, tmp_path)
        assert [int(q.id) for q in kept] == expected.pop("kept")
        assert {k.partition(", which no")[0]: v for k, v in kept.dropped.items()} == expected
        for reason in expected:
            bench = write_rows(tmp_path / "bench.jsonl", layout[reason][:1])
            with pytest.raises(ValueError, match=rf"bench.jsonl: line 1: {re.escape(reason)}"):
                evaluation.load_questions(bench, chat_tokenizer, None, "")


def test_the_target_is_the_experts_turn(chat_tokenizer, tmp_path):
    row = openr1_row(1)
    row["target"] = [{"role": "user", "content": "1+1?"}, *row["target"]]
    (q,) = questions_of([row], chat_tokenizer, tmp_path)
    assert chat_tokenizer.decode(q.demonstration).startswith("<think>\nAdd 1")


def test_texts_far_too_long_are_not_tokenised(chat_tokenizer, tmp_path):
    rows = [
        {"problem": "p", "answer": "5", "solution": "a" * 100_000_000 + "\\boxed{5}"},
        {"problem": "\u20ac" * 7_000_000, "answer": "5"},
        {"problem": "p", "answer": "5", "solution": "\\boxed{" * 1_000_000},
        {"problem": "p", "answer": "5"},
    ]
    limits = {"max_response": 8192, "max_prompt": 1024}
    q = questions_of(rows, chat_tokenizer, tmp_path, checker=GoldChecker(), **limits)
    assert q.dropped == {"demonstration too long": [0, 2], "prompt too long": [1]} and len(q) == 1


def test_gsm8k_and_math500_are_read_whole(chat_tokenizer, tmp_path):
    if not SHARED_DATA:
        pytest.skip("../shared/data is not here")

    def load(name, **more):
        settings = {"max_prompt": 2048, "max_response": 8192, "cache_dir": tmp_path}
        return read_questions(SHARED_DATA / name, chat_tokenizer, **(settings | more))

    for name, count in (("gsm8k_test.jsonl", 1319), ("gsm8k_train.jsonl", 7473)):
        q = load(name)
        assert len(q) == len(data.demonstrated(q)) == count and q.dropped == {}
        assert {q[i].kind for i in range(50)} == {"number"}
    assert load("gsm8k_test.jsonl")[0].answer == "18"
    checker = GoldChecker()
    q = load("math500.jsonl", checker=checker)
    unverified = q.dropped.pop("demonstration does not verify against its gold answer")
    # The stub is stricter than the checker.
    assert len(q) + len(unverified) == len(checker.shown) == 500 and not q.dropped and len(q) > 450
    golds = {(row["answer"], "math") for row in json_lines(SHARED_DATA / "math500.jsonl")}
    assert set(checker.shown_golds) == golds
    whole = load("math500.jsonl")
    assert len(whole) == 500
    assert (whole[0].id, whole[0].level) == ("test/precalculus/807.json", "2")


# --------------------------------------------------------------------------------------------------
# Checking answers


@pytest.fixture(scope="module")
def checker():
    with evaluation.Checker(limit=20.0) as checker:
        yield checker


def real_rows(name):
    path = ROOT.parent / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"../shared/data/{name} is not here")
    return [json.loads(line) for line in path.open()]


def started(checker) -> list[subprocess.Popen]:
    """The worker processes of a checker that is not at work."""
    return [process for process in checker.idle.queue if process]


@pytest.mark.parametrize("name, kind", [("math500.jsonl", "math"), ("gsm8k_test.jsonl", "number")])
def test_gold_answers_verify_against_themselves(checker, name, kind):
    golds = [row["answer"] for row in real_rows(name)]
    assert checker.check_golds(golds, [kind] * len(golds)) == ["correct"] * len(golds)


def test_worked_solutions_are_correct():
    rows = real_rows("math500.jsonl")
    solutions, answers = [r["solution"] for r in rows], [r["answer"] for r in rows]
    with evaluation.Checker() as checker:
        verdicts = checker.check(solutions, answers, ["math"] * len(rows))
        assert verdicts == ["correct"] * len(rows)
        golds = [r["answer"] for r in real_rows("gsm8k_test.jsonl")]
        assert checker.check(golds, golds, ["number"] * len(golds)) == ["correct"] * len(golds)
        assert not started(checker)  # plain equality needs no worker


def test_rewritten_answers_go_through_math_verify(checker):
    rows = [r for r in real_rows("math500.jsonl") if r["answer"].replace("-", "").isdigit()][:60]
    responses = [rf"\boxed{{{r['answer']} + 1 - 1}}" for r in rows]
    for more, verdict in (("", "correct"), ("1", "wrong")):
        golds = [r["answer"] + more for r in rows]
        assert checker.check(responses, golds, ["math"] * 60) == [verdict] * 60


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
        ("The answer is (K)", "K", "choice", "correct"),
        ("Hence (k)?\n(k)", "K", "choice", "correct"),
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
def test_verdicts(checker, response, gold, kind, verdict):
    assert checker.check([response], [gold], [kind]) == [verdict]


# fmt: off
ANSWERS = [  # gold, response, kind, extract, right
    (r"\frac{1}{2^{99}}", r"\boxed{\frac{1}{2^{98}}}", "math", "boxed", False),
    ("3^{-40}", r"\boxed{3^{-41}}", "math", "boxed", False),
    (r"1-\frac{1}{2^{99}}", r"\boxed{1-\frac{1}{2^{98}}}", "math", "boxed", False),
    (r"6.63\times10^{-34}", r"\boxed{9.11\times10^{-31}}", "math", "boxed", False),
    (r"\frac{1}{2^{99}}", r"\boxed{2^{-99}}", "math", "boxed", True),
    ("R-r", r"\boxed{0}", "math", "boxed", False),
    (r"\frac{mg}{M}", r"\boxed{\frac{Mg}{m}}", "math", "boxed", False),
    (r"\Delta x", r"\boxed{\delta x}", "math", "boxed", False),
    ("52_8", r"\boxed{52_9}", "math", "boxed", False),
    ("52_8", r"\boxed{52_{8}}", "math", "boxed", True),
    ("1A_{16}", r"\boxed{1B_{16}}", "math", "boxed", False),
    ("4.5e33", r"\boxed{4.5 \times 10^{33}}", "math", "boxed", True),
    ("1e-5", r"\boxed{10^{-5}}", "math", "boxed", True),
    ("1e-5", r"\boxed{-2.281718}", "math", "boxed", False),
    ("300000000", r"\boxed{3e8}", "math", "boxed", True),
    ("12345", r"\boxed{12\,345}", "math", "boxed", True),
    ("357", r"\boxed{12\,345}", "math", "boxed", False),
    ("8", r"\boxed{3\quad 5}", "math", "boxed", False),
    (r"\frac54", r"\boxed{1 1/4}", "math", "boxed", True),
    ("2.5", r"\boxed{2\frac{1}{2}}", "math", "boxed", True),
    ("2", "The answer is 2 2/3.", "math", "any", False),
    (r"\frac{71}{6}", "The answer is 11 5/6.", "math", "any", True),
    ("(0, 12.5)", r"\boxed{0 < x < 12.5}", "math", "boxed", True),
    (r"[3,\infty)", r"\boxed{x \ge 3}", "math", "boxed", True),
    (r"x<1 \text{ or } x>2", r"\boxed{(-\infty,1)\cup(2,\infty)}", "math", "boxed", True),
    ("1<x<2", r"\boxed{1<x\le2}", "math", "boxed", False),
    (r"1331 \text{ and } 1728", r"\boxed{1728}", "math", "boxed", False),
    ("x=1,y=2", r"\boxed{(2,1)}", "math", "boxed", False),
    ("16,3,1,1", r"\boxed{16,3,1}", "math", "boxed", False),
    ("13", r"\boxed{\text{13}}", "math", "boxed", True),
    ("1.6", r"\boxed{\mathbf{1.6}}", "math", "boxed", True),
    ("18", r"\boxed{\text{18 apples}}", "math", "boxed", True),
    (r"1-\frac1e", r"\boxed{1-\frac{1}{\mathrm{e}}}", "math", "boxed", True),
    ("e^2", r"\boxed{\mathrm{e}^2}", "math", "boxed", True),
    (r"\pm 2021", r"\boxed{2021}", "math", "boxed", False),
    ("n=2, 3, 4", r"\boxed{n=1, 2, 3}", "math", "boxed", False),
    (r"1, 2, \ldots, n", r"\boxed{1, 3, 5, \ldots, 2n-1}", "math", "boxed", False),
    ("10:00", r"\boxed{10:00 \text{ a.m.}}", "math", "boxed", True),
    ("1:2", r"\boxed{1:4}", "math", "boxed", False),
    ("2x+4y-3=0", r"\boxed{y=-\frac12x+\frac34}", "math", "boxed", True),
    ("4", r"\boxed{4\sqrt(2)}", "math", "boxed", False),
    (r"\sqrt{\frac1n}", r"\boxed{\frac{1}{\sqrt n}}", "math", "boxed", True),
    ("2x^3+c", r"\boxed{2x^3+c \text{ for any constant } c}", "math", "boxed", True),
    ("f(x)=2x^3+c", r"\boxed{f(x)=2x^3}", "math", "boxed", False),
    ("1/2,1,2", r"\boxed{\left\{\frac{1}{2}, 1, 2\right\}}", "math", "boxed", True),
    ("16", r"\boxed{\approx 16}", "math", "boxed", True),
    ("73", "Right: 122 + 294 + 489 = 905. Thus, the number is **73**.", "math", "any", True),
    ("840", 'therefore \\boxed{840}., but let me explain.\n\n**Final Answer**\n\\boxed{840}', "math", "any", True),
    ("35", r"\boxed{35 \text{ cm}} and then \boxed{4}", "math", "boxed", False),
    ("5", r"so $\fbox{5}$.", "math", "boxed", True),
    ("5", r"\boxed{5}. I put it in \boxed{} as asked.", "math", "boxed", True),
    ("62.5%", r"\boxed{62.5}", "math", "boxed", True),
    (r"8 \%", r"\boxed{8\%}", "math", "boxed", True),
    (r"45^\circ", r"\boxed{45°}", "math", "boxed", True),
    (r"(-\infty,2]", r"\boxed{(-∞,2]}", "math", "boxed", True),
    ("x^2+1", r"\boxed{x²+1}", "math", "boxed", True),
    ("(1,2)", r"\boxed{（1，2）}", "math", "boxed", True),
    (r"x\le 2", r"\boxed{x≤2}", "math", "boxed", True),
    (r"\frac13", r"\boxed{0.\overline{3}}", "math", "boxed", True),
    (r"0.\overline{3}", r"\boxed{0.3}", "math", "boxed", False),
    ("(1,2)", r"\boxed{\langle 1,2\rangle}", "math", "boxed", True),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix}1&2\end{pmatrix}}", "math", "boxed", False),
    (r"\text{Alice}", r"\boxed{\text{Celia}}", "math", "boxed", False),
    ("listen", r"\boxed{silent}", "math", "boxed", False),
    (r"(0,1)\cup(2,3)", r"\boxed{(0,3)}", "math", "boxed", False),
    ("B", r"\boxed{\text{(B) } 12}", "math", "boxed", True),
    ("B", r"\boxed{\textbf{(B)}}", "math", "boxed", True),
    ("3", "the change is −3", "number", "boxed", False),
    ("-1234.5", 'so it drops\n#### -1,234.5', "number", "boxed", True),
    ("2", "The answer is 1/2.", "number", "boxed", False),
    ("3", "It is 10^3.", "number", "boxed", False),
    ("3500000", "The mass is 3.5e6", "number", "boxed", True),
    ("9500", r"\boxed{$9{,}500}", "number", "boxed", True),
    ("8000", r"\boxed{8,000}", "number", "boxed", True),
    ("72", "The answer is 72, in total, so the farmer earns that much.", "number", "boxed", True),
    ("B", "The answer is B. Note that A is a common distractor.", "choice", "boxed", True),
    ("C", "The answer is C because I computed the integral.", "choice", "boxed", True),
    ("C", 'Answer: A\nNo.\nAnswer: C', "choice", "boxed", True),
    ("B", r"\boxed{(B) or (C)}", "choice", "boxed", False),
    ("B", "The answer is B or C.", "choice", "boxed", False),
    ("E", r"\boxed{\text{E}}", "choice", "boxed", True),
    ("E", r"\boxed{E - a polygenic score}", "choice", "boxed", True),
    ("D", r"\boxed{d}", "choice", "boxed", True),
    ("(C)", r"\boxed{C}", "choice", "boxed", True),
    ("5", "I don't know.", "math", "boxed", False),
]
EQUAL_ANSWERS = [  # gold, answers that are right
    # tiny numbers
    (r"1.6\times10^{-19}", "1.6e-19"), (r"\frac{\sqrt2}{2^{100}}", r"2^{-100}\sqrt{2}"), ("10^{30}+1", "10^{30}+1"),
    (r"\frac{1}{12}", "0.083333"), (r"1.5\times 10^{-30}", r"\frac{3}{2}\cdot 10^{-30}"),
    (r"\frac{1}{7}", "0.142857"), (r"0.5\pi", r"\frac{\pi}{2}"),
    # capitals
    (r"\frac{GMm}{r^2}", r"\frac{GmM}{r^2}"), (r"\text{YES}", "yes"),
    # bases
    ("52_8", r"52_{\text{eight}}"), ("52_8", r"52_\text{eight}"), ("52_8", r"52 \text{ (base 8)}"),
    ("52_8", "52_{(8)}"), ("42_{10}", "42"), ("101_2", r"101_{\text{two}}"), ("52_8, 53_8", "53_8, 52_8"),
    ("4210_5", r"4210_{\text{base }5}"), ("x=52_8", "52_8"), ("52 base 8", "52_8"), ("4343_6", r"4343_{\text{six}}"),
    ("4343_6", "4343_{6}+0"), (r"52_{\mathrm{eight}}", "52_8"), (r"\text{52 base 8}", "52_8"),
    # e-notation
    ("4.5e33", r"4.5\cdot 10^{33}"), ("4.5e33", "4.5e+33"), ("1e-5", r"1\times 10^{-5}"), ("0.00001", "1e-05"),
    ("3e8", r"3 \times 10^8"), ("3e8", "3*10^8"), (r"1.6e-19 \text{ C}", r"1.6\times 10^{-19}"),
    ("6.67e-11", r"6.67 \times 10^{-11} \text{ N m}^2"), (r"\frac{1e3}{2}", "500"), ("1.0e-3", "0.001"),
    (r"4.5\times 10^33", "4.5e33"), (r"4.5\mathrm{e}33", "4.5e33"), ("2.5e-3", "0.0025"), ("1e6", "1000000"),
    ("1e6", "10^6"), ("1.23e4", "12300"), ("9.1 × 10^{-31}", "9.1e-31"), ("3.0e8", r"3 \times 10^{8}"), ("6e0", "6"),
    (r"\{1e3,2e3\}", r"\{1000,2000\}"),
    # blanks between numbers
    ("12345", "12 345"), ("12345", "12{,}345"), ("1234567", "1 234 567"), (r"\frac54", r"1 \frac{1}{4}"),
    (r"\frac54", r"1\ 1/4"), (r"-\frac54", r"-1\frac{1}{4}"), ("(1 1/2, 3)", r"(\frac32, 3)"),
    ("1 1/4", r"\frac{5}{4}"), ("1000000", r"1\,000\,000"), (r"\frac{1}{2}", r"\frac 1 2"), ("3 1/2", "3.5"),
    ("100 000", "100000"), ("-2 1/3", r"-\frac73"), (r"(3\,000, 4\,000)", "(3000,4000)"), (r"2\ 500", "2500"),
    (r"\frac13", "1 /3"),
    # order and number of values
    ("(1,2)", "1,2"), ("(1,2)", "y=2,x=1"), ("1,2", "2,1"), ("x=1,y=2", "(1,2)"), ("x=1,y=2,z=3", "(1,2,3)"),
    (r"x=1 \text{ and } y=2", "(1,2)"), ("x=1,x=2", "x=2,x=1"), (r"\{1,2\}", r"\{1,2,2\}"), ("1,2,3", "3,1,2"),
    ("2, 3", "(3,2)"), ("1,2,2,3", "3,2,1,2"), ("x=-1, y=4", "(-1,4)"), (r"2 \text{ or } 3", r"3 \text{ or } 2"),
    ("(1,-1),(-1,1)", "(-1,1),(1,-1)"), ("(5,1)", "5,1"),
    # numbers in text
    ("13", r"\textbf{13}"), ("13", r"\mbox{13}"), ("13", r"\textit{13}"), (r"\frac12", r"\mathbf{\frac{1}{2}}"),
    ("18", r"\text{18}"), ("18", r"\text{\$18}"), ("1234", r"\text{1,234 dollars}"), ("-5", r"\text{-5}"),
    ("x^2+1", r"\mathbf{x}^2+1"), ("(1,2)", r"\mathbf{(1,2)}"), (r"\text{12}", "12"), ("12", r"{\bf 12}"),
    (r"\frac{1}{2}", r"\textbf{1/2}"), ("3.5", r"\mathit{3.5}"), (r"10\%", r"\text{10\%}"),
    # upright letters
    ("e^2", r"\text{e}^2"), ("3+4i", r"3+4\mathrm{i}"), ("e", r"\mathrm{e}"), (r"\pi e", r"\pi\mathrm{e}"),
    (r"x\le 2", r"x\leq 2"), ("x<2", r"x\lt 2"), (r"x \ne 2", r"x \neq 2"), (r"\{1,2\}", r"\lbrace 1,2\rbrace"),
    (r"\frac12", r"\cfrac12"), (r"\ln 2", r"\operatorname{ln} 2"), (r"\sin x", r"\operatorname{sin} x"),
    ("i", r"\mathrm{i}"), ("e^{x}", r"\operatorname{e}^{x}"), ("e^{x}", r"{\rm e}^{x}"),
    (r"x\geq 3", r"x \geqslant 3"), (r"\pi", r"\mathrm{\pi}"), ("-i", r"-\mathrm{i}"),
    # intervals and inequalities
    (r"(-\infty,2)", "x<2"), (r"(3,\infty)", "x > 3"), ("x>3", r"(3,\infty)"), ("[1,2)", r"1\le x<2"),
    (r"1\le x<2", "[1,2)"), (r"(-\infty,1)\cup(2,\infty)", r"x>2 \text{ or } x<1"),
    (r"x<1 \text{ or } x>2", r"x>2 \text{ or } x<1"), ("(1,3)", r"x>1 \text{ and } x<3"), (r"x \in (1,2)", "(1,2)"),
    (r"(-\infty,3)\cup(3,\infty)", r"x\ne3"), ("[-1,1]", r"-1\le x\le 1"), ("(0,1)", "0<x<1"),
    (r"[1,2]\cup[3,4]", r"1\le x\le2 \text{ or } 3\le x\le4"), (r"x\in(-\infty,2)", "x<2"),
    (r"[2,\infty)", r"x\ge2"), ("(2,5]", r"2<x\le5"), (r"x<-1 \text{ or } x>1", r"(-\infty,-1)\cup(1,\infty)"),
    (r"(1,2)\cup(3,4)", r"1<x<2 \text{ or } 3<x<4"), ("0<x<1", "(0,1)"),
    # words around the answer
    ("16", "= 16"), ("16", "approximately 16"), ("16", r"\text{The answer is } 16"), ("16", "The answer is 16"),
    ("16", r"\sim 16"), ("16", r"\approx16\text{ cm}"), ("x=2", r"\therefore x=2"),
    ("2x^3+c", r"2x^3+c \text{ where c is any constant}"), (r"k\pi", r"k\pi, k \in \mathbb{Z}"),
    (r"k\pi", r"k\pi, \text{ where } k \in \mathbb{Z}"), ("3:30 p.m.", "3:30 PM"), ("3:30 p.m.", "3:30"),
    (r"5\% \text{ increase}", r"5\%"), ("y=Ce^x", r"y=Ce^x, \text{ where } C \text{ is an arbitrary constant}"),
    (r"2\pi n", r"2\pi n \ (n\in\mathbb{Z})"),
    # words
    ("listen", r"\text{listen}"), (r"\text{even}", "even"), (r"\text{Alice and Bob}", "Bob and Alice"),
    ("the circle", "circle"), ("No", "no"), ("xy", r"x \cdot y"), ("None", "none"),
    ("no solution", r"\text{No solution}"), ("red, blue", "blue, red"), ("true", "True"),
    # signs outside ASCII
    ("x^2+1", "x² + 1"), (r"\sqrt{12}", "√12"), (r"\sqrt{x+1}", "√(x+1)"), (r"\frac12", "½"), (r"3\times 4", "3×4"),
    (r"x\ge2", "x≥2"), ("12", "１２"), (r"\theta", "θ"), (r"90^\circ", "90°"), (r"\pm 2", "±2"), (r"\emptyset", "∅"),
    ("10^{-5}", "10⁻⁵"), ("5", "5​"), (r"\mathbb{R}", "ℝ"), (r"6\div 2", "6÷2"), (r"x \to \infty", "x → ∞"),
    (r"3\cdot 10^8", "3·10⁸"), ("a_1", "a₁"), ("x^{-1}", "x⁻¹"), (r"\frac34", "¾"), ("12,345", "12，345"),
    # percent
    (r"62.5\%", "62.5"), (r"62.5\%", r"62.5 \text{ percent}"), (r"62.5\%", r"\frac58"), (r"8\%", r"8 \%"),
    (r"8\%", "8 percent"), (r"8\%", "0.08"), (r"12.5\%", r"12.5\,\%"), (r"50\%", r"\frac12"),
    (r"\frac12\%", r"0.5\%"), (r"12.345\%", "12.345"), (r"\frac{100}{3}\%", r"33.\overline{3}\%"), (r"100\%", "1"),
    # repeating decimals, vectors, systems
    (r"\frac13", r"0.\bar{3}"), (r"\frac13", "0.(3)"), (r"\frac{1}{7}", r"0.\overline{142857}"),
    (r"0.\overline{3}", r"0.\overline{33}"), (r"-\frac13", r"-0.\overline{3}"),
    ("(1,2)", r"\left\langle 1,2\right\rangle"), ("(1,2)", r"\begin{cases}x=1\\y=2\end{cases}"),
    (r"\langle 1,2\rangle", "(1,2)"), (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    ("x=1,y=2", r"\left\{\begin{array}{l}x=1\\y=2\end{array}\right."),
    (r"\begin{cases}x=1\\y=2\end{cases}", "x=1,y=2"), (r"0.1\overline{6}", r"\frac16"),
    (r"2.\overline{3}", r"\frac{7}{3}"), (r"\langle 1,-2,3\rangle", "(1,-2,3)"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", "(1,2)"),
    # options, roots, dollars
    (r"\frac{1}{\sqrt n}", r"\sqrt{\frac1n}"), ("(B)", "B"), ("0.5", r"\frac12"), ("5", r"\$5"), (r"\$5.50", "5.5"),
    ("-1./3", r"-\frac13"), (r"\frac{2}{4}", r"\frac12"), (r"\sqrt{x^4}", "x^2"),
    # numbers with a scale, ratios, equations, units
    (r"7 \text{ million}", "7,000,000"), ("7000000", "7 million"), (r"3.5 \text{ billion}", r"3.5\times 10^9"),
    (r"\$7{,}000{,}000", r"7 \text{ million dollars}"), (r"2 \text{ dozen}", "24"), (r"5 \text{ hundred}", "500"),
    ("3:4:5", "6:8:10"), ("a:b:c=3:4:5", "3:4:5"), ("4", "2+2=4"), ("0.67", r"\frac23=0.67"), ("f(0)=1", "f(0)=1"),
    (r"5 \text{ ft } 6 \text{ in}", r"5 \text{ ft} 6 \text{ in}"), (r"9.8 \text{ m/s}^2", "9.8"),
    (r"6.67e-11", r"6.67\times 10^{-11} \text{ N} \cdot \text{m}^2/\text{kg}^{2}"), ("8", "2**3"),
    ("f'(x)", r"f^{\prime}(x)"),
]
OTHER_ANSWERS = [  # gold, near misses
    # tiny numbers
    (r"1.6\times10^{-19}", r"1.7\times 10^{-19}"), (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
    (r"\frac{\pi}{10^{30}}", r"\frac{\pi}{10^{31}}"), ("e^{-50}", "e^{-51}"), ("0.0000001", "0"), ("0", "10^{-20}"),
    ("2^{-100}", "3^{-60}"), (r"(\frac{1}{2^{99}},1)", r"(\frac{1}{2^{98}},1)"), ("10^{30}+1", "10^{30}"),
    (r"\begin{pmatrix}2^{-90}\\1\end{pmatrix}", r"\begin{pmatrix}2^{-91}\\1\end{pmatrix}"),
    ("[0,2^{-80}]", "[0,2^{-81}]"), (r"\frac{1}{7}", "0.142858"), ("2^{-99}+x", "2^{-98}+x"), ("1.0e-10", "1.1e-10"),
    (r"\ln(1+10^{-20})", "10^{-20}"), (r"1.6\times 10^{-19}x", r"1.7\times 10^{-19}x"),
    ("10^{-20}, 10^{-21}", "10^{-20}, 10^{-22}"), ("10^{100}", "10^{100}+1"), (r"i\cdot 10^{-30}", "0"),
    # capitals
    ("A", "a"), (r"\frac{V}{R}", r"\frac{v}{r}"), ("N+n", "2n"), ("AB", "ab"), (r"\Gamma", r"\gamma"), ("m", "M"),
    (r"\Phi", r"\phi"), ("f(X)", "f(x)"), (r"\sin X", r"\sin x"), (r"\{A,B\}", r"\{a,b\}"),
    # bases
    ("52_8", "52"), ("52_8", r"52_{\textrm{nine}}"), ("1A_{16}", "26"), ("x=52_8", "x=52_7"), ("-12_5", "-12_6"),
    ("3_{4}+1", "3_5+1"), ("10", "1010_2"), ("4343_6", "4344_6"), ("FF_{16}", "255"), ("0.11_2", "0.11_3"),
    ("(12_3, 4)", "(12_4, 4)"),
    # e-notation
    ("4.5e33", r"4.5 \times 10^{32}"), ("0.00001", "1e-06"), ("3e8", r"3\times 10^7"), ("2e", "5.43656"),
    ("2e-1", "2e - 1"), ("e^3", "e3"), ("2.5e-3", "0.00025"), ("1e6", "10^5"), ("5e2", "5e^2"), ("5e^2", "500"),
    ("1e400", "10^{401}"), ("1e-400", "10^{-401}"),
    # blanks between numbers
    ("357", "12 345"), ("8", r"3\;5"), ("15", "3 5"), ("5", "2~3"), (r"\frac14", "1 1/4"), ("1234", "1 2 3 4"),
    ("1000", r"10\,00"), ("3 1/2", r"\frac{3}{2}"), ("2 3 4", "234"), ("5 ft 3 in", "8"), ("7", "3 4"),
    # order and number of values
    ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("1,2", "1,2,2"), ("1,1", "1"), ("x=1,y=2", "x=2,y=1"),
    ("(2,1)", "x=1,y=2"), ("a=3,b=4", "(4,3)"), ("(1,2,3)", "(3,2,1)"), ("(3,2,1)", "(1,2,3)"), ("(1,1,2)", "(1,2)"),
    ("[1,2,3]", "[3,2,1]"), ("2,3", "2,3,5"), (r"\pm 2", "-2"), ("1,2,2,3", "1,2,3,3"), ("0,0", "0"),
    ("(3,4)", "(4,3)"), ("a=1,b=2", "a=2,b=1"), ("x=-1, y=4", "(4,-1)"), ("m=3, n=5", "(5,3)"),
    ("(0,0),(1,2)", "(0,0),(2,1)"), ("1, 2, 3", "1,2"), ("(5,1)", "1,5"),
    # numbers in text
    ("13", r"\text{14}"), ("18", r"\text{19 apples}"), ("18", r"\text{18 or 19}"), ("18", r"18 \text{ or } 19"),
    ("18", r"\text{-18}"), ("2", r"\text{2 or 3}"), ("2", r"2 \text{ or 3}"), ("12", r"\text{12 and 13}"),
    ("5", r"\text{5 or more}"), ("5", r"\text{at least 5}"),
    # upright letters
    ("e^2", r"\mathrm{e}^3"), (r"1-\frac1e", r"1+\frac{1}{\mathrm{e}}"), (r"\cos x", r"\operatorname{sin} x"),
    # intervals and inequalities
    (r"(-\infty,2)", r"(-\infty, 2]"), (r"[3,\infty)", "x > 3"), ("[1,2)", r"1\le x\le 2"),
    (r"x<1 \text{ or } x>2", "x<1"), ("(1,3)", r"x>1 \text{ and } x<4"), ("(0,12.5)", r"0\le x<12.5"),
    ("(0,1)", "0<x<2"), ("x>5", "x<5"), ("(2,5]", r"2\le x<5"),
    (r"x<-1 \text{ or } x>1", r"(-\infty,-1]\cup[1,\infty)"),
    (r"(-\infty,-1)\cup(1,\infty)", r"x<-1 \text{ or } y>1"), (r"(1,2)\cup(3,4)", "1<x<4"),
    # words around the answer
    ("16", r"\approx 17"), ("16", r"\text{less than } 16"), ("16", r"16 \text{ or more}"),
    (r"k\pi \text{ for odd } k", r"k\pi \text{ for even } k"), (r"3:30 \text{ p.m.}", r"3:30 \text{ a.m.}"),
    ("3:30 p.m.", "1:10 p.m."), ("3 p.m.", "3 a.m."), (r"5\% \text{ increase}", r"5\% \text{ decrease}"),
    (r"5 \text{ million}", r"5 \text{ billion}"), (r"2\pi n", r"\pi n, n\in\mathbb{Z}"), ("9:00 AM", "9:00 PM"),
    ("12:15", "12:20"), (r"20 \text{ m north}", r"20 \text{ m south}"),
    # words
    ("listen", "enlist"), ("even", "odd"), (r"\text{Alice and Bob}", "Alice"), ("No", "on"), ("ab", "ba"),
    (r"\text{east}", "5"), ("tea", "eat"), ("AB", "BA"), ("red, blue", "red"), ("dog", "god"), ("abc", "cab"),
    # signs outside ASCII
    ("x^2+1", "x³+1"), (r"\frac{21}{2}", "2½"), ("3", "−3"), ("x^2", "x₂"),
    # percent
    (r"62.5\%", "6.25"), (r"8\%", r"9\%"), (r"8\%", "800"), ("800", r"8\%"), (r"10\%", r"1000\%"),
    (r"10\%", r"0.1\%"), (r"33.3\%", r"33.4\%"), (r"50\%", r"5\%"), (r"12.345\%", "12.346"), (r"12.345\%", "1.2345"),
    # repeating decimals, vectors, systems
    (r"0.\overline{3}", "0.333"), (r"0.\overline{3}", r"0.\overline{6}"), ("(1,2)", r"\langle 2,1\rangle"),
    ("(1,2)", r"\begin{pmatrix}2\\1\end{pmatrix}"), (r"\begin{pmatrix}1\\2\end{pmatrix}", "(2,1)"),
    ("x=1,y=2", r"\begin{cases}x=2\\y=1\end{cases}"), (r"\begin{cases}x=1\\y=2\end{cases}", "(2,1)"),
    (r"0.1\overline{6}", r"\frac15"), (r"0.\overline{12}", "0.12"), ("0.12", r"0.\overline{12}"),
    (r"\langle 1,-2,3\rangle", "(1,2,3)"), (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "(1,2,3,4)"),
    (r"\begin{bmatrix}1\\2\end{bmatrix}", r"\begin{bmatrix}2\\1\end{bmatrix}"),
    # options, roots, dollars
    (r"\sqrt{x^2}", "x"), ("x", r"\sqrt{x^2}"), (r"\sqrt{\frac{1}{n}}", r"\frac{1}{n}"), ("B", "(A) 12"),
    ("B", r"\text{(A)}"), ("B", "b"), (r"\text{(B)}", "C"), ("4", r"4\sqrt(2)"), ("(x^2)^{1/2}", "x"),
    ("x^{1/2}", "x^{1/3}"), (r"\sqrt{x}+1", r"\sqrt{x}-1"),
    # numbers with a scale, ratios, equations, primes
    ("7", r"7 \text{ million}"), ("7", "7 thousand"), (r"7 \text{ million}", r"7 \text{ thousand}"),
    ("3:4:5", "3:5:4"), ("a:b:c=3:4:5", "a:b:c=3:5:4"), (r"1:\sqrt3:2", r"1:2:\sqrt3"), ("7", "6=7"), ("7", "6+2=7"),
    ("f(2)=3", "f(3)=2"), ("f(2)=3", "f(2)=4"), ("x^2=-1", "x^2=-2"), ("f'(x)", "f(x)"), ("y'=2x", "y=2x"),
    ("f''(x)", "f'(x)"), ("x'", "x"), ("24", r"24 \text{ dozen}"),
    # several units, dates
    (r"12 \text{ hours } 30 \text{ minutes}", r"12 \text{ hours } 40 \text{ minutes}"),
    (r"12 \text{ hours } 30 \text{ minutes}", "12"), (r"5 \text{ ft } 6 \text{ in}", r"5 \text{ ft } 7 \text{ in}"),
    ("5", r"5 \text{ ft } 6 \text{ in}"), (r"5 \text{ ft}, 6 \text{ in}", r"6 \text{ ft}, 5 \text{ in}"),
    ("5", r"5 \text{ cm and } 6 \text{ cm}"), ("3", r"2 \text{ when } x=3"), ("2021-01-05", "2020-01-04"),
    ("2021-01-05", "2015"), ("14/3/2021", "14/3/2022"), (r"\text{5 January}", r"\text{5 February}"),
    (r"14 \text{ March } 2021", r"15 \text{ March } 2021"), (r"30^\circ 15' 20''", r"30^\circ 15' 30''"),
]
# fmt: on


def test_a_response_searched_for_any_answer_is_judged_as_a_box_is():
    # fmt: off
    right = [  # gold, response
        (r"\frac78", "The answer is 7/8."), ("3:30 p.m.", r"It is $3:30 \text{ p.m.}$"),
        ("7", "The answer is 7. That was on page 17 of 27."),
    ]
    wrong = [
        ("7", "The answer is 7/8."), ("7", "The answer is 7 or 8."), ("7", "It is 7 million."),
        ("2021-01-05", "It is $2020-01-04$"), ("3:30 p.m.", r"It is $3:30 \text{ a.m.}$"),
        (r"12 \text{ hours } 30 \text{ minutes}", r"It is $12 \text{ hours } 40 \text{ minutes}$"),
    ]
    # fmt: on
    golds, responses = map(list, zip(*right, *wrong))
    with evaluation.Checker(extract="any", limit=20.0) as checker:
        verdicts = checker.check(responses, golds, ["math"] * len(golds))
    assert verdicts == ["correct"] * len(right) + ["wrong"] * len(wrong)


def test_answers_that_others_misjudge():
    """Inputs of public bug reports, reduced."""
    checkers = {
        extract: evaluation.Checker(extract=extract, limit=20.0) for extract in ("boxed", "any")
    }
    judged = []
    for gold, response, kind, extract, _ in ANSWERS:
        [verdict] = checkers[extract].check([response], [gold], [kind])
        judged.append(verdict == "correct")
    for checker in checkers.values():
        checker.close()
    assert [row for row, right in zip(ANSWERS, judged) if right != row[-1]] == []


# fmt: off
@pytest.mark.parametrize("kind, right, wrong", [
    ("number", [  # gold, response
        ("-3", "the change is −3"), ("-3", "it is –3."), ("0.5", "It is 1/2."), ("2.5", "It is 2 1/2."),
        ("1000", "It is 10^3."), ("1000", "It is 10³."), ("3500000", "The mass is 3.5e6"), ("73", "It is **73**."),
        ("300000000", r"about 3 \times 10^8 m/s"), ("-73", "It is **-73**."), ("1234.5", "It is $1,234.50."),
        ("24", "it weighs 24kg"), ("10", "10 %."), ("6", "2*3 = 6."), ("-5", "(-5)"), ("0.5", "#### 1/2"),
        ("8", "It is 2**3"), ("32", r"It is 2^{5}"), ("0.2", "It is 1 / 5"), ("7000000", "It is 7 million."),
        ("5000", "5 × 10^3"), ("5.5", "5½"), ("13", "8 + 5 = 13"), ("12", "twelve (12)"), ("2", r"\sqrt{4}"),
        ("-4", "x = - 4"),
        ("1000", "It is 1 000."), ("5", "the 5th"), ("42", "It is $42$."), ("0.5", r"It is $\frac{1}{2}$."),
    ], [
        ("3", "the change is −3"), ("2", "The answer is 1/2."), ("3", "It is 10^3."), ("3", "It is 10^{3}."),
        ("3", "It is 10³."), ("6", "The mass is 3.5e6"), ("8", r"3 \times 10^{8}"), ("2", r"It is \frac{1}{2}."),
        ("3", r"It is 2\sqrt{3}."), ("3", "It is 2√3."), ("2", "It is 2π."), ("2", r"It is 2\pi."),
        ("2", "It is 2x."), ("234", "It is 1,234 apples"), ("5", "between 3-5"), ("5", "5:30"), ("19", "COVID-19"),
        ("7", "x_7"), ("7", "x^{7}"), ("2", "It is 2 2/3."), ("2", "#### 1/2"),
        ("4", "x = - 4"), ("7", "It is 7 million."), ("4", "sqrt(4)"), ("5", r"\sqrt[3]{5}"), ("5", "8 - 5"),
        ("5", "1⁄5"), ("5", "1 / 5"), ("3", "5*10**3"), ("3", "2 ** 3"), ("3", "2 ^ 3"), ("3", "10^(3)"),
        ("5", "5_8"), ("12", "12_{8}"), ("5", "on 2021-01-05"), ("2015", "on 2021-01-05"),
        ("5", "8 + 5"), ("3", "x^(3)"),
    ]),
    ("choice", [
        ("B", r"\boxed{b}"), ("B", r"\boxed{(b)}"), ("B", r"\boxed{B. vitamin C}"), ("B", r"\boxed{Option B}"),
        ("B", r"\boxed{B – text}"), ("B", r"\boxed{\text{(B) } 12}"), ("B", "The answer is B, not C."),
        ("B", "The answer is B\nC is wrong"), ("B", "The answer is B. C is wrong"),
        ("B", "The answer is B, I think."), ("C", "The answer is (c)."), ("K", r"\boxed{K}"), (r"\text{C}", "C"),
        ("B", r"The answer is $\text{(B)}$."), ("B", "\\boxed{}\nThe answer is B"), ("c", "Answer: C"),
    ], [
        ("B", r"\boxed{B or C}"), ("C", r"\boxed{B or C}"), ("B", r"\boxed{B, C}"), ("B", r"\boxed{B/C}"),
        ("B", r"\boxed{BC}"), ("B", r"\boxed{\text{B and C}}"), ("B", r"\boxed{(B) 12 or (C) 13}"),
        ("B", "The answer is B and C."), ("B", "The answer is (B) or (C)."), ("A", "The answer is A or B."),
        ("A", r"\boxed{a polygenic score}"), ("B", "The answer is **B** or **C**"),
        ("B", "The answer is (B)(C)"), ("B", "The answer is (B) (C) (D)"), ("B", "The answer is B C D"),
        ("B", "The answer is B|C|D"), ("B", "The answer is B - C"), ("B", "The answer is B to D"),
        ("A", r"\boxed{A and also B}"), ("A", r"\boxed{A) 5 B) 6}"), ("A", r"\boxed{A. 5, B. 6}"),
        ("B", r"\boxed{\neg B}"), ("A", r"\boxed{A - B}"),
    ]),
])
# fmt: on
def test_the_longest_number_and_the_one_letter_count(checker, kind, right, wrong):
    golds, responses = map(list, zip(*right, *wrong))
    verdicts = checker.check(responses, golds, [kind] * len(golds))
    expected = [True] * len(right) + [False] * len(wrong)
    missed = zip(right + wrong, verdicts, expected)
    assert [case for case, verdict, good in missed if (verdict == "correct") != good] == []


# fmt: off
@pytest.mark.parametrize("response, held", [
    (r"so $\fbox{5}$.", "5"), (r"\boxed{5}. I put it in \boxed{} as asked.", "5"), (r"\boxed 5", "5"),
    (r"\boxed 12.5 m", "12.5"), (r"$\boxed A$", "A"), (r"\boxed as asked", None), (r"\boxed{4} \boxed{\ }", "4"),
    (r"\boxed{4}, \fbox{3}", "3"), (r"\boxed{1}" + r"\boxed{}" * 99, "1"), (r"\boxed{1}" + r"\boxed{}" * 100, None),
    (r"\boxed{4} \boxed{5", None), (r"\boxed{\{1\}}", r"\{1\}"),
])
# fmt: on
def test_the_last_box_that_holds_something_counts(response, held):
    assert evaluation.last_boxed(response) == held


def test_rewriting_takes_time_linear_in_the_text():
    # fmt: off
    pieces = [
        "\\text{1", "\\text{a", "1 234 ", "1,234,", "12 345 ", "1 1/2 ", "1.5e3 ", "52_8", "52 base ",
        "\\begin{cases}", "\\frac",
        "\\boxed{}", "for any ", "1^", "2\\times 10^", "-", "\\sqrt(", "0.(3", "answer is ", "or", "\\mathbf{",
    ]
    # fmt: on
    pieces += [*"0123456789 ABC(){}[]$%~_^.,:;/", "\\", "√", "²", "⁄", "\u202e"]
    for piece in pieces:
        seconds = []
        for length in (10_000, 40_000):
            text = piece * (length // len(piece))
            start = time.perf_counter()
            evaluation.rewrite(text)
            evaluation.number_answer(text)
            seconds.append(time.perf_counter() - start)
        assert seconds[1] < 12 * seconds[0] + 0.05, piece


@pytest.mark.parametrize("pairs, right", [(EQUAL_ANSWERS, True), (OTHER_ANSWERS, False)])
def test_spelling_does_not_matter_and_whatever_tells_answers_apart_does(checker, pairs, right):
    responses, golds = [rf"\boxed{{{answer}}}" for _, answer in pairs], [gold for gold, _ in pairs]
    verdicts = checker.check(responses, golds, ["math"] * len(pairs))
    assert [pair for pair, v in zip(pairs, verdicts) if (v == "correct") != right] == []


# fmt: off
USABLE_GOLDS = [
    ("math", [r"\frac12", "work\n#### 5", "$7$.", r"\text{(C)}", "New York", "-1./3", "52_8"]),
    ("number", ["1,234", "work\n#### -3", "1/2", "5 cm"]),
    ("choice", ["B", " J ", "K", "b", "(A)", r"\text{(C)}", "D. none"]), ("chain", ["7"]),
    ("countdown", ["3 5 7 = 22", "3 = 3"]),
]
USELESS_GOLDS = [
    ("math", ["", "work\n####", r"\frac{", "(" * 9, "$t(0,4]$", "E_{1},E_{2}", "proof", r"\text{Proof.}",
              "See solution.", "N/A"]),
    ("number", ["", ".", "many", "N/A"]), ("choice", ["", "AB", "A or B", "5", "proof"]), ("chain", ["", " "]),
    ("countdown", ["", "three", "3 5 7", "3,5 = 8", "3 = -3"]),
]
# fmt: on


def test_gold_answers_that_nothing_can_equal_are_recognised(checker):
    for cases, verdict in ((USABLE_GOLDS, "correct"), (USELESS_GOLDS, "unparsed")):
        assert [kind for kind, _ in cases] == list(evaluation.KINDS) == list(checker.kinds)
        for kind, golds in cases:
            assert checker.check_golds(golds, [kind] * len(golds)) == [verdict] * len(golds), kind


# fmt: off
NO_EXPRESSIONS = [
    "9**9**9**9", "9//2", "-3", "+3", "007", "3(4)", "1_0", "1e5", "1.5", "(1,2)", "()", "", "1+",
    "\u0663+1", "1<2", "1 if 1", "9" * 201, "(" * 90 + "1" + ")" * 90, "(" * 200, "-" * 199 + "1",
    "1\n+1", "[1]", "__import__('os')",
]
# fmt: on


def test_values_of_expressions_are_exact():
    """Against Python's own arithmetic; whatever is more than that has no value."""
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
    for text in NO_EXPRESSIONS:
        assert evaluation.expression_value(text) is None, text


# fmt: off
EQUAL = [
    ("(x-1)(x+1)", "x^2-1"), ("(a+b)^3", "a^3+3a^2b+3ab^2+b^3"), (r"\ln e^2", "2"),
    (r"\tan 45^\circ", "1"), (r"\int_0^1 x dx", r"\frac12"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^2", r"\begin{pmatrix}7&10\\15&22\end{pmatrix}"),
    (r"x^2+2x+1=0", "(x+1)^2=0"), ("1<x<2", "(1,2)"), (r"[0,1)\cup(1,2]", r"[0,2]\setminus\{1\}"),
    (r"\frac{n(n+1)}{2}", r"\frac{n^2+n}{2}"), (r"\sum_{k=1}^{10}k", "55"),
    (r"\binom{10}{3}", "120"), ("|x-3|", "|3-x|"), (r"\sqrt{x^2}", "|x|"),
    (r"\sin 2x", r"2\sin x\cos x"), (r"\frac{1}{\sqrt2}", r"\frac{\sqrt2}{2}"), ("y=2x+3", "2x+3"),
    ("2x+3y=6", "3y=6-2x"), (r"(3,\frac{\pi}{2})", r"(3,0.5\pi)"),
    (r"3\pm\sqrt2", r"\{3+\sqrt2,3-\sqrt2\}"), (r"\frac{\sqrt3}{3}", r"\tan\frac{\pi}{6}"),
    ("(1+i)^2", "2i"), (r"\frac{x^2-1}{x-1}", "x+1"), (r"\sin^2 x+\cos^2 x", "1"),
    (r"\frac{1+i}{1-i}", "i"), (r"a^{-1}+b^{-1}", r"\frac{a+b}{ab}"),
]
# fmt: on


def test_verdicts_are_those_of_math_verify(checker):
    """The worker forbids SymPy to read text and refutes by value; neither may change a verdict."""
    import math_verify

    differing = [(answer, gold) for (answer, _), (_, gold) in zip(EQUAL, EQUAL[1:])]
    pairs = [*EQUAL, *((gold, answer) for answer, gold in EQUAL), *differing]
    responses, golds = [rf"\boxed{{{answer}}}" for answer, _ in pairs], [gold for _, gold in pairs]
    verdicts = checker.check(responses, golds, ["math"] * len(pairs))
    latex = [math_verify.LatexExtractionConfig()]
    parse = lambda text: math_verify.parse(f"${text}$", latex)
    verify = functools.partial(math_verify.verify, allow_set_relation_comp=True)
    expected = [verify(parse(gold), parse(answer)) for answer, gold in pairs]
    assert [verdict == "correct" for verdict in verdicts] == expected
    assert sum(expected) > 40


THINKING = {
    "<think>a</think>\\boxed{5}": "correct",
    "a</think>\\boxed{5}": "correct",
    "\\boxed{5}": "unparsed",
    "<think>\\boxed{5}</think>": "unparsed",
    "a</think>b</think>\\boxed{5}": "unparsed",
    "a</think><think>\\boxed{5}": "unparsed",
    "<think><think>a</think>\\boxed{5}": "unparsed",
}


def test_an_answer_must_stand_after_one_end_of_thinking():
    with evaluation.Checker(require_think=True) as checker:
        for response, verdict in THINKING.items():
            assert checker.check([response], ["5"], ["math"]) == [verdict], response


# fmt: off
ANYWHERE = [
    (r"The final answer is $\frac{2}{4}$.", "1/2", "correct"), ("so 1/2", "1/2", "correct"),
    ("it is 7", "1/2", "wrong"), ("hm", "1/2", "unparsed"), ("", "1/2", "unparsed"),
    ("= (1+2)*3", "9", "correct"), ("__import__('os')", "9", "unparsed"),
]
# fmt: on


def test_extract_any_searches_whole_responses():
    with evaluation.Checker(extract="any", limit=20.0) as checker:
        for response, gold, verdict in ANYWHERE:
            assert checker.check([response], [gold], ["math"]) == [verdict], response
        long = "It is said. " * 10_000 + "so 1/2"  # more than a pipe holds
        assert checker.check([long], ["1/2"], ["number"]) == ["correct"]
    with pytest.raises(ValueError, match="boxed or any"):
        evaluation.Checker(extract="all")


def test_verdicts_keep_their_order_on_two_workers(checker):
    answers = [str(i % 7) for i in range(150)]
    responses = [f"\\boxed{{{a} + 0}}" for a in answers]
    expected = ["correct" if a == "3" else "wrong" for a in answers]
    with evaluation.Checker(workers=2, limit=20.0) as checker_of_two:
        check = checker_of_two.check
        assert check(responses, ["3"] * 150, ["math"] * 150) == expected
        responses = [f"\\boxed{{{i} + 1}}" for i in range(150)]
        expected = ["correct" if i == 7 else "wrong" for i in range(150)]
        assert check(responses, ["8"] * 150, ["math"] * 150) == expected
        assert len(started(checker_of_two)) == 2
    assert checker.check([], [], []) == []


def test_unknown_kinds_are_refused(checker):
    named = "math, number, choice, chain, countdown, not essay, poem"
    with pytest.raises(ValueError, match=named):
        checker.check(["x"] * 3, ["x"] * 3, ["poem", "math", "essay"])
    with pytest.raises(ValueError, match=named):
        checker.check_golds(["x"] * 3, ["poem", "math", "essay"])


STUCK = r"\boxed{\int_0^{10^{7}} x^{x} dx}"  # costs whatever the limits allow
LONG = 300_000
# fmt: off
HOSTILE_TEXTS = [
    "\\boxed{" * LONG, "{" * LONG, "\\boxed{" + "{" * LONG, "\\boxed" * LONG, "[" * LONG,
    "}" * LONG, "]" * LONG, "answer is " * LONG, " " * LONG + "answer is" + " " * LONG, "$" * LONG,
    "####" * LONG, "\\" * LONG, "\\boxed{" + "\\{" * LONG + "}", "(" * LONG,
]
HOSTILE_NUMBERS = ["9" * LONG, "1," * LONG, "#### " + "9" * LONG]
HOSTILE_BOXES = [
    "9**9**9**9", "9^{9^{9^{9}}}", "(" * 400 + "1" + ")" * 400, "\u202e\u05d0 5", "5\0", "\ud800",
    "\\frac{", "^" * 100, "}{", "-" * 300 + "1", "__import__('os').system('touch FOLDER/evaluated')",
    "\\text{__import__('os')}", "\\operatorname{exec}(1)", "1" + "0" * 990 + "^2",
]
# fmt: on


def test_hostile_answers_cost_at_most_the_limit(tmp_path):
    limit, texts = 0.7, HOSTILE_TEXTS + HOSTILE_NUMBERS
    with evaluation.Checker(limit=limit) as checker:
        checker.check([r"\boxed{x+1}"], ["x+2"], ["math"])
        for kind in evaluation.KINDS:
            start = time.monotonic()
            verdicts = checker.check(texts, ["7"] * len(texts), [kind] * len(texts))
            assert set(verdicts[: len(HOSTILE_TEXTS)]) == {"unparsed"}, kind
            assert set(verdicts) <= {"unparsed", "wrong"}, kind
            assert time.monotonic() - start < 10 * limit + evaluation.START_LIMIT
        for answer in HOSTILE_BOXES:
            boxed = rf"\boxed{{{answer}}}".replace("FOLDER", str(tmp_path))
            start = time.monotonic()
            verdicts = checker.check([boxed, r"\boxed{3+4}"], ["7", "7"], ["math", "math"])
            assert verdicts[0] != "correct" and verdicts[1] == "correct", answer
            # a worker's start comes on top
            assert time.monotonic() - start < limit + evaluation.START_LIMIT
        assert checker.check([STUCK], ["7"], ["math"]) == ["timeout"]
    assert not (tmp_path / "evaluated").exists()


def test_the_hostile_corpus_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from faults_checker import GOLDS, hostile_answers

    responses = [f"\\boxed{{{answer}}}" for answer in hostile_answers()]
    cases = [(response, GOLDS[i % len(GOLDS)]) for i, response in enumerate(responses)]
    verdicts, left = [], []
    for response, gold in cases:
        kind = evaluation.KINDS["math"]
        found = evaluation.find_and_compare(response, gold, kind, "boxed")
        if isinstance(found, str):
            verdicts.append(found)
        elif not re.search("int|binom|gcd", response):  # which take as long as they may
            left.append((response, gold))
    assert len(verdicts) > 250 and set(verdicts) == {"unparsed", "wrong"}
    left = left[::4]  # benchmarks/faults_checker.py runs them all
    with evaluation.Checker(workers=2, limit=20.0) as checker:
        verdicts = checker.check(*map(list, zip(*left)), ["math"] * len(left))
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
        ("(" * 5 + "3+4" + ")" * 5, "7", "correct"),
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
def test_large_and_slow_answers(checker, answer, gold, verdict):
    assert checker.check([rf"\boxed{{{answer}}}"], [gold], ["math"]) == [verdict]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_killed_and_hanging_workers_are_replaced():
    with evaluation.Checker(limit=2.0) as checker:
        assert checker.check([r"\boxed{3+4}"], ["7"], ["math"]) == ["correct"]
        (first,) = started(checker)
        # in the middle of the second answer
        killer = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {first.pid}"])
        responses = [r"\boxed{3+4}", STUCK, r"\boxed{2+5}", r"\boxed{2+6}"]
        verdicts = checker.check(responses, ["7"] * 4, ["math"] * 4)
        assert verdicts == ["correct", "error", "correct", "wrong"]
        killer.wait()
        (second,) = started(checker)
        os.kill(second.pid, signal.SIGSTOP)  # it hangs, even before it has read the answer
        start = time.monotonic()
        verdicts = checker.check([r"\boxed{5+2}", r"\boxed{4+3}"], ["7", "7"], ["math"] * 2)
        assert verdicts == ["timeout", "correct"] and time.monotonic() - start > 2.0
        (third,) = started(checker)
        os.kill(third.pid, signal.SIGKILL)  # idle: nobody's answer is at fault
        third.wait()
        assert checker.check([r"\boxed{1+6}"], ["7"], ["math"]) == ["correct"]
        (fourth,) = started(checker)
        pids = {first.pid, second.pid, third.pid, fourth.pid}
        assert len(pids) == 4
    assert not any(map(is_alive, pids))


def test_a_hanging_worker_that_takes_no_more_text_is_replaced():
    with evaluation.Checker(limit=0.5, extract="any") as checker:
        assert checker.check(["3+4"], ["7"], ["math"]) == ["correct"]
        os.kill(started(checker)[0].pid, signal.SIGSTOP)
        assert checker.check(["7 " * 1_000_000], ["7"], ["math"]) == ["timeout"]


@pytest.fixture
def interruptible():
    """A shell's background process ignores Ctrl-C, unless it asks for it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_leaves_a_usable_checker(interruptible):
    with evaluation.Checker(workers=2, limit=3.0) as checker:
        interrupt = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT))
        responses = [STUCK, STUCK + " ", *(rf"\boxed{{{i}+x}}" for i in range(5000))]
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            checker.check(responses, [f"y+{i}" for i in range(5002)], ["math"] * 5002)
        responses, golds = [rf"\boxed{{{i}+7}}" for i in range(20)], ["9"] * 20
        expected = ["correct" if i == 2 else "wrong" for i in range(20)]
        assert checker.check(responses, golds, ["math"] * 20) == expected


def test_a_worker_that_does_not_start_is_an_error(monkeypatch):
    with evaluation.Checker(workers=2) as checker:
        monkeypatch.setattr(evaluation, "START_LIMIT", 0.01)
        with pytest.raises(RuntimeError, match="a worker that compares answers did not start"):
            checker.check([r"\boxed{3+4}"], ["7"], ["math"])
        monkeypatch.undo()
        monkeypatch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(RuntimeError, match="a worker that compares answers did not start"):
            checker.check([r"\boxed{3+4}"], ["7"], ["math"])
        monkeypatch.undo()
        assert checker.check([r"\boxed{3+4}"], ["7"], ["math"]) == ["correct"]


CHECK_IN_A_PROCESS = r"""
import eval, sys
checker = eval.Checker(limit=2.0)
checker.check([r"\boxed{1+1}"], ["2"], ["math"])
print(checker.idle.queue[-1].pid, flush=True)
checker.limit = float(input())
print(checker.check([ANSWER], ["7"], ["math"])[0], flush=True)
input()
"""


def checking_process(answer: str) -> tuple[subprocess.Popen, int]:
    """A process that checks an answer when it is told the limit, and the id of its worker."""
    code = CHECK_IN_A_PROCESS.replace("ANSWER", repr(answer))
    pipe = subprocess.PIPE
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True, cwd=ROOT
    )
    return parent, int(parent.stdout.readline())


def say(process: subprocess.Popen, line: str) -> None:
    process.stdin.write(line + "\n")
    process.stdin.flush()


def test_a_parent_that_is_held_up_itself_blames_no_answer():
    parent, worker = checking_process(r"\boxed{3+4}")
    with parent:
        os.kill(worker, signal.SIGSTOP)
        say(parent, "1.0")
        time.sleep(0.5)
        os.kill(parent.pid, signal.SIGSTOP)
        os.kill(worker, signal.SIGCONT)
        time.sleep(1.5)
        os.kill(parent.pid, signal.SIGCONT)
        assert parent.stdout.readline() == "correct\n"
        say(parent, "")


def test_a_verdict_that_is_there_when_the_limit_is_over_counts(monkeypatch):
    ready = evaluation.ready

    def held_up(pipe, event, seconds):
        """Whether the verdict had come when waiting began; only then is it given time to come."""
        there = ready(pipe, event, 0)
        ready(pipe, event, 20)
        return there

    with evaluation.Checker() as checker:
        checker.check([r"\boxed{x+1}"], ["x+2"], ["math"])
        monkeypatch.setattr(evaluation, "ready", held_up)
        assert checker.check([r"\boxed{x^2-9}"], ["(x-3)(x+3)"], ["math"]) == ["correct"]


@pytest.mark.parametrize("busy", [False, True])
def test_workers_end_with_their_parent(busy):
    parent, worker = checking_process(STUCK)
    with parent:
        if busy:
            say(parent, "1000")
        time.sleep(0.5)
        assert is_alive(worker)
        parent.kill()
    deadline = time.monotonic() + 20
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(worker)


def run_python(*args):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)


IMPORTS = """
import io, sys, eval
assert not {'torch', 'transformers', 'vllm', 'numpy', 'sympy'} & set(sys.modules)
sys.stdin = io.StringIO('')
eval.worker(1.0)
assert not {'torch', 'transformers', 'vllm', 'data', 'rollout'} & set(sys.modules)
"""


def test_a_worker_imports_neither_torch_nor_numpy():
    assert run_python("-c", IMPORTS).returncode == 0


# --------------------------------------------------------------------------------------------------
# Rewards


def asked_question(i: int, chat=False, **row) -> data.Question:
    asked = [{"role": "user", "content": f"{i}?"}] if chat else f"Question: {i}?"
    return data.Question(f"q/{i}", [1], "", None, row={"question": f"{i}?", **row}, asked=asked)


def own_rewards(tmp_path, source: str, names: str, weights="", right_above=0.5):
    """--reward with this file's functions."""
    path = tmp_path / f"mine{len(list(tmp_path.iterdir()))}.py"
    path.write_text(source)
    reward = ",".join(f"{path}:{name}" for name in names.split(","))
    return evaluation.load_rewards(reward, weights, right_above)


@pytest.mark.parametrize("chat", [False, True])
def test_reward_functions_are_called_as_trls_trainer_calls_them(chat, tmp_path):
    source = """
def all_of_it(prompts, completions, **columns):
    seen.append(dict(columns, prompts=prompts, completions=completions))
    return [0.0] * len(prompts)

def some(question, completion_ids):
    return [len(ids) + len(text) for ids, text in zip(completion_ids, question, strict=True)]

class Counter:
    def __call__(self, prompts, **columns):
        return range(len(prompts))

seen, counter = [], Counter()
"""
    rewards = own_rewards(tmp_path, source, "all_of_it,some,counter")
    questions = [
        asked_question(1, chat, metadata={"a": [1]}, prompt="x", prompts="y", completion="z"),
        asked_question(22, chat, level=3),
    ]
    tokens = [[4], [5, 6]]
    judged = evaluation.judge(questions, ["one", "two"], tokens, None, rewards)
    [seen] = rewards.functions["all_of_it"].__globals__["seen"]
    as_message = lambda role, text: [{"role": role, "content": text}]
    assert seen == {
        "prompts": [as_message("user", f"{i}?") if chat else f"Question: {i}?" for i in (1, 22)],
        "completions": [as_message("assistant", t) if chat else t for t in ("one", "two")],
        "completion_ids": tokens,
        "question": ["1?", "22?"],
        "metadata": [{"a": [1]}, None],
        "level": [None, 3],
    }
    parts = [{"all_of_it": 0, "some": 3, "counter": 0}, {"all_of_it": 0, "some": 5, "counter": 1}]
    assert judged == [("correct", 3.0, parts[0]), ("correct", 6.0, parts[1])]
    assert evaluation.judge([], [], [], None, rewards) == []


def test_a_reward_is_the_weighted_sum_of_what_was_judged(tmp_path):
    """As TRL's: nansum over functions, and NaN only where all of them returned None."""
    source = """
import numpy, torch
def a(prompts, **_): return [1, None, 0.25, None, True]
def b(prompts, **_): return numpy.float32([2, 3, -1, numpy.nan, 0])[:0].tolist() + [2, 3, -1, None, None]
def c(prompts, **_): return torch.tensor([0.5] * 5)
def d(prompts, **_): return numpy.array([0.5] * 5)
"""
    questions, texts, tokens = [asked_question(i) for i in range(5)], [""] * 5, [[1]] * 5
    judge = lambda *how: evaluation.judge(
        questions, texts, tokens, None, own_rewards(tmp_path, source, *how)
    )
    judged = judge("a,b", "1,0.5", 0.75)
    assert [verdict for verdict, _, _ in judged] == "correct correct wrong unjudged correct".split()
    expected = [2.0, 1.5, -0.25, math.nan, 1.0]
    assert [r for _, r, _ in judged] == pytest.approx(expected, nan_ok=True, abs=1e-12)
    assert math.isnan(judged[1][2]["a"]) and judged[1][2]["b"] == 3
    assert [verdict for verdict, _, _ in judge("a", "", 0.25)][2] == "wrong"  # above, not at it
    assert {r for _, r, _ in judge("c,d")} == {1.0}


WRONG_REWARDS = [  # what a function does with its prompts, and what the line says
    ("1 / 0", "f: raised ZeroDivisionError: division by zero, of question q/0 and 3 other"),
    ("None", "f: returned None, which is no list, of question q/0"),
    ("0.5", "f: returned 0.5, which is no list"),
    ("'1111'", "f: returned '1111', which is no list"),
    ("[1.0] * 3", "f: returned 3 rewards for a batch of 1, of question q/0"),
    ("[1.0] * (len(prompts) + 1)", "f: returned 2 rewards for a batch of 1, of question q/0"),
    (
        "[0.0 if '2?' not in p else float('nan') for p in prompts]",
        "returned nan, no number, of question q/2",
    ),
    (
        "[0.0 if '2?' not in p else float('-inf') for p in prompts]",
        "returned -inf, no number, of question q/2",
    ),
    (
        "[0.0 if '3?' not in p else '1.0' for p in prompts]",
        "returned '1.0', no number, of question q/3",
    ),
    ("[10 ** 400 for p in prompts]", "f: raised OverflowError"),
    ("[[1.0] for p in prompts]", "returned [1.0], no number, of question q/0"),
    (
        "[1 / ('1?' not in p) for p in prompts]",
        "raised ZeroDivisionError: division by zero, of question q/1",
    ),
    ("[1 / ('3?' not in p) for p in prompts]", "division by zero, of question q/3"),
    (
        "[missing for p in prompts]",
        "raised NameError: name 'missing' is not defined, of question q/0",
    ),
    (
        "[exec('raise ValueError(\"two\\\\nlines\")') for p in prompts]",
        "raised ValueError: two lines, of",
    ),
]


@pytest.mark.parametrize(("returned", "message"), WRONG_REWARDS)
def test_what_a_reward_function_does_wrong_is_told_in_one_line(returned, message, tmp_path):
    source = f"def f(prompts, **columns):\n    return {returned}\n"
    if message.endswith("3 other"):  # a fault of all four together
        source = source.replace("return", "return [0.0] * len(prompts) if len(prompts) < 4 else")
    rewards = own_rewards(tmp_path, source, "f")
    questions = [asked_question(i) for i in range(4)]
    with pytest.raises(evaluation.RewardError) as error:
        evaluation.judge(questions, ["r"] * 4, [[1]] * 4, None, rewards)
    text = str(error.value)
    assert text.startswith("--reward f: ") and message in text and "\n" not in text, text


def test_files_that_cannot_be_imported_are_refused_and_one_is_run_once(tmp_path):
    for source, message in (
        ("def f(:", "SyntaxError"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise KeyError('x')", "KeyError"),
        ("f = 3", "has no function f"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            own_rewards(tmp_path, source, "f")
        assert str(error.value).startswith("--reward ") and "\n" not in str(error.value)
    (tmp_path / "neighbour_of_rewards.py").write_text("value = 3")
    source = "import neighbour_of_rewards as n\nruns = []\nruns.append(n.value)\n"
    source += "def f(prompts, **_): return runs\ndef g(prompts, **_): return runs\n"
    rewards = own_rewards(tmp_path, source, "f,g")
    [judged] = evaluation.judge([asked_question(1)], [""], [[]], None, rewards)
    assert judged == ("correct", 6.0, {"f": 3, "g": 3})


TRL_ROWS = [  # solution, response, and the rewards that each function's documentation promises
    (r"$\frac{1}{3}$", r"<think>a</think> So \boxed{\frac{1}{3}}", [1, 1, 1, 0.75]),
    (r"$\frac{1}{3}$", r"<think>a</think> So \boxed{\frac{1}{2}}", [0, 1, 0, -0.75]),
    (r"$\frac{1}{3}$", r"So \boxed{\frac{1}{3}}", [1, 0, 0, 0.75]),
    ("", r"<think>a</think> So \boxed{\frac{1}{3}}", [None, 1, None, None]),
]


def test_trls_own_functions_work_as_they_are(tmp_path):
    pytest.importorskip("trl.rewards", reason="TRL is not installed")
    source = """
from trl.rewards import accuracy_reward, reasoning_accuracy_reward, think_format_reward
from trl.rewards import get_cosine_scaled_reward, get_repetition_penalty_reward
cosine, repetition = get_cosine_scaled_reward(100), get_repetition_penalty_reward(2)
"""
    names = "accuracy_reward,think_format_reward,reasoning_accuracy_reward,cosine,repetition"
    rewards = own_rewards(tmp_path, source, names)
    questions = [asked_question(i, True, solution=row[0]) for i, row in enumerate(TRL_ROWS)]
    tokens = [list(range(50)), list(range(50)), list(range(50)), [5] * 5]
    judged = evaluation.judge(questions, [row[1] for row in TRL_ROWS], tokens, None, rewards)
    for (_, _, found), (_, _, expected), repetition in zip(judged, TRL_ROWS, (0, 0, 0, -0.75)):
        expected = [math.nan if value is None else value for value in [*expected, repetition]]
        assert list(found.values()) == pytest.approx(expected, nan_ok=True)


def test_evaluate_reports_the_mean_reward_and_the_share_above_the_threshold(tmp_path):
    """Of samples 3 to 6, 4 to 7 and so on, a tenth each: those above 0.5, less 0.4 and 0.7."""
    source = """
def tenths(prompts, completions, **_):
    return [None if text in ("[4]", "[7]") else int(text[1]) / 10 for text in completions]
"""
    rewards = own_rewards(tmp_path, source, "tenths")
    questions = [asked_question(i) for i in range(9)]
    detokenize = lambda tokens: f"[{tokens[0]}]"
    rows = evaluation.evaluate(
        SeedSampler(), questions, None, 4, 1.0, 8, 5, detokenize, rewards=rewards
    )
    accuracies, found = [], []
    for row in rows:
        digits = [int(text[1]) for text in row["response"]]
        judged = [digit for digit in digits if digit not in (4, 7)]
        expected = [None if digit in (4, 7) else digit / 10 for digit in digits]
        assert row["reward"] == expected and row["verdict"].count("correct") <= len(judged)
        accuracies.append(sum(digit > 5 for digit in judged) / len(judged))
        found += [digit / 10 for digit in judged]
        lines = [json.loads(line) for line in evaluation.question_lines(row).splitlines()]
        assert [line["reward"] for line in lines] == expected
    summary = evaluation.summarize(rows)
    assert summary["avg"] == pytest.approx(statistics.fmean(accuracies))
    assert summary["reward"] == pytest.approx(statistics.fmean(found))
    assert summary["unjudged"] == pytest.approx(1 - len(found) / 36) and len(found) < 36
    assert f"{summary['reward']:.3f}" in evaluation.table({"mine": summary})
    for row in rows[1:]:
        row |= {"verdict": ["unjudged"] * 4, "reward": [None] * 4}
    assert evaluation.summarize(rows)["avg"] == pytest.approx(accuracies[0])
    with pytest.raises(evaluation.RewardError, match="nothing was judged"):
        evaluation.summarize(rows[1:])


# --------------------------------------------------------------------------------------------------
# Scores


def test_sft_regime_by_hand():
    """Least .50: stable up to .51, mild below .55."""
    values = [1.00, 0.80, 0.62, 0.509, 0.505, 0.50, 0.508, 0.53, 0.549, 0.56]
    expected = ["adaptive"] * 3 + ["stable"] * 4 + ["mild"] * 2 + ["severe"]
    assert evaluation.sft_regime(values) == expected
    assert evaluation.sft_regime([1, 0.5, 0.54, 0.5, 0.56, 0.54]) == [
        "adaptive", "stable", "stable", "stable", "severe", "severe"]  # fmt: skip
    assert evaluation.sft_regime([0.5, 0.54], 0.1, 0.2) == ["stable", "stable"]
    assert evaluation.sft_regime([0.5, 0.58], 0.1, 0.2) == ["stable", "mild"]
    assert evaluation.sft_regime([]) == [] and evaluation.sft_regime([2.0]) == ["stable"]


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


# --------------------------------------------------------------------------------------------------
# Benchmarks and the command line


def test_benchmarks_follow_the_protocol():
    small = {"aime24", "aime25", "amc", "amc23"}  # 32 responses a question, as in the paper
    others = {"olympiad", "math500", "mmlu_pro", "gsm8k", "minerva"}
    found = {name: bench.k for name, bench in evaluation.BENCHES.items()}
    assert found == {name: 32 for name in small} | {name: 1 for name in others}
    assert (evaluation.BENCHES["amc"].rows, evaluation.BENCHES["amc23"].rows) == (83, 40)


def rendered_texts(monkeypatch) -> list:
    """Puts in the place of rendering a list of what was to be rendered, and how."""
    seen = []

    def render(tokenizer, messages, **style):
        seen.append((messages[-1]["content"], style))
        return [1]

    monkeypatch.setattr(data, "render_prompt", render)
    return seen


def test_benchmark_files_are_read_as_training_rows_are(tmp_path, monkeypatch):
    seen = rendered_texts(monkeypatch)
    rows = [
        {"question": "1+1?", "answer": "work\n#### 1,002", "level": 3},
        {"problem": "x?", "answer": "\\frac12"},
        {"question": "Which?", "options": ["one", "two"], "answer": "B", "category": "law"},
        {"question": "Float?", "answer": 12.0},
        {"question": "Several?", "answer": ["$1$", "2"]},
        {"question": "Half?", "answer": "#### 1/2"},
        {"question": "Task?", "answer": "1 2 = 3", "kind": "countdown"},
    ]
    path = tmp_path / "my.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    questions = evaluation.load_questions(str(path), None, "be brief", "<think>\n")
    assert [(q.id, q.answer, q.kind, q.level) for q in questions] == [
        ("my.jsonl/0", "1002", "number", "3"),
        ("my.jsonl/1", "\\frac12", "math", ""),
        ("my.jsonl/2", "B", "choice", "law"),
        ("my.jsonl/3", "12", "math", ""),
        ("my.jsonl/4", "$1$, 2", "math", ""),
        ("my.jsonl/5", "1/2", "number", ""),
        ("my.jsonl/6", "1 2 = 3", "countdown", ""),
    ]
    assert seen[0] == ("1+1?", {"system": "be brief", "generation_prefix": "<think>\n"})
    assert seen[2][0].startswith("Which?\n\nA. one\nB. two\n")
    path = Path(write_rows(tmp_path / "chat.parquet", OPENR1_ROWS))
    questions = evaluation.load_questions(str(path), None, None, "")
    assert [q.answer for q in questions] == ["0", "2", "4", "6"]
    assert {q.demonstration for q in questions} == {None}


def test_named_columns_are_read_from_the_files_that_have_them(tmp_path, monkeypatch, capsys):
    seen = rendered_texts(monkeypatch)
    rows = [{"frage": "1+1?", "loesung": 2, "question": "not this", "answer": "nor this"}]
    named = write_rows(tmp_path / "named.jsonl", rows)
    own = write_rows(tmp_path / "own.parquet", [{"question": "2+2?", "answer": "4"}])
    other = write_rows(tmp_path / "other.jsonl", [{"frag": "1+1?", "loesung": 2}])
    no_answer = write_rows(tmp_path / "half.jsonl", [{"frage": "1+1?", "answer": 2}])
    fields = dict(question_field="frage", answer_field="loesung")
    with evaluation.Checker(limit=20.0) as checker:
        load = lambda path: evaluation.load_questions(
            path, None, None, "", checker=checker, **fields
        )
        assert [load(path)[0].answer for path in (named, own)] == ["2", "4"]
        said = f"warning: {own}: no column frage: its own layout is read\n"
        assert capsys.readouterr().err == said
        with pytest.raises(ValueError, match="no known layout; found frag, loesung"):
            load(other)
        with pytest.raises(ValueError, match="no column loesung in the first"):
            load(no_answer)
    assert [text for text, _ in seen] == ["1+1?", "2+2?"]
    (question,) = evaluation.load_questions(
        no_answer, None, None, "", rewarded=True, question_field="frage", template="plain"
    )
    assert question.row == {"frage": "1+1?", "answer": 2}


# fmt: off
@pytest.mark.parametrize("text, message", [
    ('{"answer": "1"}', "line 2: no question; its columns are .'answer'"),
    ('{"question": "q", "answer": "w ####"}', "line 2: no gold answer; its columns"),
    ('{"question": "q", "answer": "1", "kind": "chess"}', "line 2: kind is none of math, number"),
    ('{"question": "q", "answer": "A", "options": "AB"}', "line 2: options are no list"),
    ('{"question": "\\ud800", "answer": "1"}', "line 2: half a surrogate pair"),
    ("{", "line 2 is not readable JSON"),
    ("[1]", "line 2 is a list, not an object"),
    ("[" * 100_000, "line 2 is not readable JSON"),
])
# fmt: on
def test_a_faulty_row_of_a_benchmark_is_an_error_that_names_it(text, message, tmp_path, monkeypatch):
    rendered_texts(monkeypatch)
    path = tmp_path / "my.jsonl"
    path.write_text('{"question": "a", "answer": "1"}\n' + text + "\n")
    with pytest.raises(ValueError, match=f"my.jsonl: {message}"):
        evaluation.load_questions(str(path), None, None, "")
    path.write_text("")
    with pytest.raises(ValueError, match="my.jsonl: holds no rows"):
        evaluation.load_questions(str(path), None, None, "")


@pytest.mark.parametrize("seed", range(4))
def test_fuzzed_files_are_evaluated_and_graded_or_refused(chat_tokenizer, tmp_path, seed):
    draw = random.Random(seed)
    asked = ["question", "answer", "options", "kind", "level", "context"]
    for i in range(40):
        path = tmp_path / f"fuzz{i}.jsonl"
        path.write_bytes(fuzzed_jsonl(draw, asked if i % 2 else asked[:2]))
        load = lambda path=path: evaluation.load_questions(str(path), chat_tokenizer, None, "")
        for q in reads_or_refuses(load, path) or []:
            assert q.prompt and q.answer.strip() and q.kind in evaluation.KINDS
        graded = ["response", "answer", "kind"]
        path.write_bytes(fuzzed_jsonl(draw, graded if i % 2 else graded[:2]))
        args = argparse.Namespace(file=path, limit=5.0, extract="boxed", require_think=False)
        reads_or_refuses(lambda args=args: evaluation.command_grade(args), path)


# A row in the layout of each named Hub dataset, made up; and what is read from it: the gold answer,
# the kind, the level.
# fmt: off
HUB_ROWS = {
    "aime24": ({"id": 60, "problem": "p", "solution": "s", "answer": "204", "url": "u",
                "year": "2024"}, ("204", "math", "")),
    "aime25": ({"problem": "p", "answer": "70", "id": "0"}, ("70", "math", "")),
    "amc": ({"id": 0, "problem": "p", "answer": 142.0, "url": "u"}, ("142", "math", "")),
    "amc23": ({"id": 0, "question": "p", "answer": 27.0, "url": "u"}, ("27", "math", "")),
    "olympiad": ({"id": 1606, "question": "p", "solution": ["s"], "final_answer": ["2", "3"],
                  "context": "c", "subfield": "Algebra"}, ("2, 3", "math", "")),
    "math500": ({"problem": "p", "solution": "s", "answer": "\\frac12", "subject": "Algebra",
                 "level": 2, "unique_id": "t/1.json"}, ("\\frac12", "math", "2")),
    "minerva": ({"question": "p", "answer": "4.5e33"}, ("4.5e33", "math", "")),
    "gsm8k": ({"question": "p", "answer": "2+2=<<2+2=4>>4\n#### 4"}, ("4", "number", "")),
    "mmlu_pro": ({"question_id": 70, "question": "p", "options": list("qrstuvwxyz"), "answer": "I",
                  "answer_index": 8, "cot_content": "", "category": "business", "src": "x"},
                 ("I", "choice", "business")),
}
# fmt: on


@pytest.mark.parametrize("name", HUB_ROWS)
def test_hub_benchmarks_are_read_in_their_layouts(name, monkeypatch):
    row, expected = HUB_ROWS[name]
    seen = rendered_texts(monkeypatch)
    loaded = lambda hub, config, **more: datasets.Dataset.from_list([row])
    monkeypatch.setattr(datasets, "load_dataset", loaded)
    (question,) = evaluation.load_questions(name, None, None, "")
    assert (question.answer, question.kind, question.level) == expected
    assert question.id == f"{name}/0"
    ((text, _),) = seen
    if name == "mmlu_pro":
        assert "p\n\nA. q\n" in text and "\nJ. z\n" in text and "boxed" in text
    else:
        assert text == ("c\np" if name == "olympiad" else "p")


def test_every_hub_benchmark_has_a_row_above():
    assert set(HUB_ROWS) == set(evaluation.BENCHES)


TO_GRADE = [  # answer, response, verdict
    ("1/2", r"\boxed{0.5}", "correct"),
    ("2", r"\boxed{3}", "wrong"),
    ("2", "it is 2", "unparsed"),
    ("7", STUCK, "timeout"),
    ("w\n#### 5", "so 5", "correct"),
    (2, "\ud800\0\\boxed{2}", "correct"),
]
WRONG_TO_GRADE = [  # content, error
    (None, "no such file"),
    ("{}\n", "mine.jsonl: line 1: the row has no answer"),
    ('{"answer": "1"}\n', "mine.jsonl: line 1: the row has no response"),
    ("\n\n{\n", "mine.jsonl: line 3 is not readable JSON"),
]


def test_grade_adds_a_verdict_to_each_row(tmp_path):
    rows = [{"answer": gold, "response": response} for gold, response, _ in TO_GRADE]
    rows[0]["note"] = "kept"
    rows.append({"answer": "B", "kind": "choice", "response": "Answer: B"})
    path, out = tmp_path / "mine.jsonl", tmp_path / "mine.graded.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run_python("eval.py", "grade", path, "--limit", 2)
    assert result.returncode == 0, result.stderr
    graded = [json.loads(line) for line in out.open()]
    expected = [*(verdict for _, _, verdict in TO_GRADE), "correct"]
    assert [row.pop("verdict") for row in graded] == expected
    assert graded == rows
    counts = dict(line.split()[:2] for line in result.stdout.splitlines()[1:])
    assert counts == {v: str(expected.count(v)) for v in evaluation.VERDICTS}
    result = run_python("eval.py", "grade", path, "--extract", "any", "--limit", 2)
    assert json.loads(out.read_text().splitlines()[2])["verdict"] == "correct"


def test_answers_that_nothing_can_match_are_named_alike(chat_tokenizer, tmp_path, capsys):
    rows = [{"question": "q", "answer": "5"}, {"question": "q", "answer": "$t(0,4]$"}]
    rows += [{"question": "q", "answer": "proof"}] * 11
    rows = [{**row, "response": "it is 5"} for row in rows]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    proofs = ", ".join(f'line {i} ("proof")' for i in range(3, 12))
    said = "12 of 13 answers cannot be matched by any response: "
    said += f'line 2 ("$t(0,4]$"), {proofs}, ...'
    with evaluation.Checker(limit=20.0) as checker:
        questions = read_questions(path, chat_tokenizer, checker=checker)
        assert questions.report() == f"1 of 13 questions kept; dropped: {said}"
        assert len(evaluation.load_questions(path, chat_tokenizer, None, "", checker=checker)) == 13
    assert capsys.readouterr().err.endswith(f"warning: {path}: {said}\n")
    args = argparse.Namespace(file=Path(path), limit=20.0, extract="boxed", require_think=False)
    evaluation.command_grade(args)
    assert f"warning: {path}: {said}\n" in capsys.readouterr().err


def refused(monkeypatch, capsys, *args) -> str:
    """What eval.py says when it refuses these arguments: one line, with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, args)])
    assert evaluation.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("eval.py: ") and error.count("\n") == 1, error
    return error


def test_grade_refuses_wrong_files_and_limits(tmp_path, monkeypatch, capsys):
    path = tmp_path / "mine.jsonl"
    for content, message in WRONG_TO_GRADE:
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        assert message in refused(monkeypatch, capsys, "grade", path)
    for limit in ("0", "-1", "nan"):
        assert "--limit must be" in refused(monkeypatch, capsys, "grade", path, "--limit", limit)


def test_help_and_readme_say_where_an_answer_of_each_kind_stands(capsys, monkeypatch):
    for command in (["grade"], []):
        monkeypatch.setattr(sys, "argv", ["eval.py", *command, "--help"])
        with pytest.raises(SystemExit) as stop:
            evaluation.main()
        lines = capsys.readouterr().out.splitlines()
        assert stop.value.code == 0
        for name, kind in evaluation.KINDS.items():
            assert f"  {name:10} {kind.answer}: {kind.where}" in lines
    table = (ROOT / "README.md").read_text().split("| kind | `answer` |")[1].split("\n\n")[0]
    rows = [f"| `{name}` | {k.answer} | {k.where} |" for name, k in evaluation.KINDS.items()]
    assert table.splitlines()[2:] == rows


@pytest.fixture(scope="module")
def eval_model(tmp_path_factory):
    """A random Qwen2 with the embedded task's tokenizer; heads of 32, as vLLM needs on a CPU."""
    folder = tmp_path_factory.mktemp("eval") / "model"
    tokenizer = data.embedded_tokenizer()
    transformers.set_seed(0)
    config = transformers.Qwen2Config(
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
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_on_two_ranks(*args):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    return run_python(*torchrun, *args)


def response_lines(folder: Path) -> list[str]:
    paths = sorted(folder.glob("responses-*.jsonl"))
    return [line for path in paths for line in path.read_text().splitlines(keepends=True)]


def test_an_evaluation_resumes_on_another_number_of_ranks(eval_model, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    command = ["eval.py", eval_model, "--bench", "sums", "--k", 2, "--max-tokens", 12]
    command += ["--temperature", 1, "--sampler", "torch", "--out"]
    result = run_python(*command, whole)
    assert result.returncode == 0, result.stderr
    for column in ("avg@k", "95 % interval", "pass@2"):
        assert column in result.stdout
    lines = response_lines(whole)
    assert len(lines) == 2 * data.EVAL_SUMS
    question = {"id", "bench", "level", "kind", "answer"}
    response = {"sample", "response", "verdict", "tokens", "truncated"}
    assert set(json.loads(lines[0])) == question | response

    # As if three ranks had been killed: one question with half its responses, one line half written
    part.mkdir()
    shutil.copy(whole / "settings.json", part)
    before = {0: lines[0:40] + lines[80:121], 2: [*lines[40:60], lines[60][:30]]}
    for rank, written in before.items():
        (part / f"responses-{rank}.jsonl").write_text("".join(written))
    result = run_on_two_ranks(*command, part)
    assert result.returncode == 0, result.stderr
    assert f"resuming: 50 of {data.EVAL_SUMS} questions" in result.stderr
    assert (part / "results.json").read_text() == (whole / "results.json").read_text()
    # What was written stays, and every response is there; twice only that of the half question.
    assert (part / "responses-0.jsonl").read_text().startswith("".join(before[0]))
    assert (part / "responses-2.jsonl").read_text() == "".join(before[2])
    after = response_lines(part)
    after.remove(before[2][-1])
    assert sorted(after) == sorted([*lines, lines[120]])


def test_a_rank_appends_after_the_last_whole_line(tmp_path):
    path = tmp_path / "responses-3.jsonl"
    for before, after in (("", ""), ('{"a', ""), ("a\n", "a\n"), ("a\nb\nc", "a\nb\n")):
        path.write_text(before)
        with evaluation.open_to_append(tmp_path / "responses-3.jsonl") as file:
            file.write("c\n")
        assert path.read_text() == after + "c\n"


def test_an_evaluation_keeps_the_day_on_which_it_began(tmp_path, monkeypatch):
    tiny_model(tmp_path / "model", 0, dated_tokenizer())
    bench = write_rows(tmp_path / "bench.jsonl", [{"question": "1+1?", "answer": "2"}])

    def prompt_in(out):
        command = [str(tmp_path / "model"), "--bench", bench, "--max-tokens", "9", "--out", out]
        found = evaluation.check_evaluation(evaluation.evaluate_parser().parse_args(command))
        Path(out).mkdir(exist_ok=True)
        (Path(out) / "settings.json").write_text(json.dumps(found.settings))
        return found.benches[bench][0].prompt

    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    first = prompt_in(one)
    monkeypatch.setattr(datetime, "date", Tomorrow)
    assert prompt_in(one) == first != prompt_in(other)


def test_evaluating_refuses_bad_input(eval_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refuse = lambda *args: refused(monkeypatch, capsys, *args)
    sums = [eval_model, "--bench", "sums"]
    assert "known are aime24, aime25, amc, amc23" in refuse(eval_model, "--bench", "sums,aime42")
    assert "no such file" in refuse(eval_model, "--bench", tmp_path / "none.jsonl")
    assert "there is no such folder" in refuse(tmp_path / "none", "--bench", "sums")
    (tmp_path / "run" / "checkpoints" / "step-000012" / "model").mkdir(parents=True)
    right = "right would be " + str(tmp_path / "run" / "checkpoints" / "step-000012" / "model")
    assert right in refuse(tmp_path / "run", "--bench", "sums")
    assert "not a model's folder or Hub id" in refuse(tmp_path, "--bench", "sums")
    assert "--question-field" in refuse(*sums, "--question-field", "q", "--answer-field", "a")
    assert "--max-tokens 1000" in refuse(*sums, "--max-tokens", 1000)
    assert "--max-tokens must be" in refuse(*sums, "--max-tokens", 0)
    assert "--k must be" in refuse(*sums, "--k", 0)
    assert "--temperature must be" in refuse(*sums, "--temperature", "nan")
    assert "--limit must be" in refuse(*sums, "--limit", 0)
    assert "two benchmarks of one name" in refuse(eval_model, "--bench", "sums,sums")
    teach = [*sums, "--demonstrations"]
    assert "--keep is of use only" in refuse(*sums, "--keep", "all")
    assert "a.json: right would be" in refuse(*teach, tmp_path / "a.json")
    assert "takes one --bench" in refuse(*teach, tmp_path / "a.jsonl", "--bench", "sums,math500")
    bench = write_rows(tmp_path / "a.jsonl", [{"question": "1", "answer": "1"}])
    assert "would overwrite" in refuse(*teach, tmp_path / "x/../a.jsonl", "--bench", bench)
    there = [*sums, "--max-tokens", 8, "--out", tmp_path]
    (tmp_path / "responses-0.jsonl").touch()
    assert "model there is none" in refuse(*there)
    (tmp_path / "settings.json").write_text(json.dumps({"model": "another"}))
    assert "model there is another" in refuse(*there)


OWN_MODEL = """
import transformers

class OwnConfig(transformers.Qwen2Config):
    model_type = "own"

class OwnModel(transformers.Qwen2ForCausalLM):
    config_class = OwnConfig
"""


def test_an_evaluation_takes_own_code_template_and_columns(
    chat_tokenizer, tmp_path, monkeypatch, capsys
):
    model = Path(tiny_model(tmp_path / "model", 0, chat_tokenizer))
    (model / "own.py").write_text(OWN_MODEL)
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": code}))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "hf"))
    bench = write_rows(tmp_path / "rows.jsonl", [{"frage": "a?", "loesung": "a", "kind": "chain"}])
    command = [model, "--bench", bench, "--sampler", "torch", "--max-tokens", 4]
    command += ["--question-field", "frage", "--answer-field", "loesung", "--template", "plain"]
    command += ["--out", tmp_path / "out"]
    capsys.readouterr()  # a bar of what was saved
    assert "which --trust-remote-code runs" in refused(monkeypatch, capsys, *command)
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, command), "--trust-remote-code"])
    seen, evaluate = [], evaluation.evaluate
    monkeypatch.setattr(
        evaluation,
        "evaluate",
        lambda *given, **more: seen.append(given) or evaluate(*given, **more),
    )
    assert evaluation.main() == 0
    [(sampler, [question], *_)] = seen
    assert type(sampler.model).__name__ == "OwnModel"
    assert chat_tokenizer.decode(question.prompt) == "Question: a?\nAnswer:\n"
    (line,) = response_lines(tmp_path / "out")
    assert json.loads(line)["answer"] == "a"


def test_an_evaluation_computes_in_the_type_of_training(eval_model, tmp_path, monkeypatch):
    trained = tmp_path / "trained"
    shutil.copytree(eval_model, trained)
    config = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))

    def types_of(model, *more) -> list:
        flags = f"{model} --bench sums --max-tokens 8 --out {tmp_path / 'out'}".split()
        args = evaluation.evaluate_parser().parse_args([*flags, *more])
        found = evaluation.check_evaluation(args)
        return [found.dtype, found.settings["dtype"]]

    assert types_of(trained) == [torch.bfloat16, "bfloat16"]  # a run by --dtype bfloat16
    assert types_of(eval_model) == [torch.float32, "float32"]
    assert types_of(trained, "--dtype", "float32") == [torch.float32, "float32"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert types_of(eval_model) == [torch.bfloat16, "bfloat16"]
    assert types_of(eval_model, "--dtype", "float32") == [torch.float32, "float32"]


OWN_REWARD = """
def digits(prompts, completions, tests, **columns):
    assert columns["question"][0].endswith("?")
    return [sum(c.isdigit() for c in text) / 12 - least for text, least in zip(completions, tests)]
"""


def test_an_evaluation_by_a_reward_function(eval_model, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(OWN_REWARD)
    rows = [{"question": f"{i}?", "tests": i / 10} for i in range(3)]
    write_rows(tmp_path / "rows.jsonl", rows)
    command = [eval_model, "--bench", tmp_path / "rows.jsonl", "--k", 2, "--max-tokens", 12]
    command += ["--temperature", 1, "--sampler", "torch", "--out", tmp_path / "out"]
    own = ["--reward", f"{tmp_path}/mine.py:digits"]
    assert "no known layout" in refused(monkeypatch, capsys, *command)
    assert "FILE.py:NAME" in refused(monkeypatch, capsys, *command, "--reward", "x")
    assert "--reward-weights 1,2" in refused(
        monkeypatch, capsys, *command, *own, "--reward-weights", "1,2"
    )
    assert "--extract" in refused(monkeypatch, capsys, *command, *own, "--extract", "any")
    assert "--right-above" in refused(monkeypatch, capsys, *command, "--right-above", 0.1)
    assert "finite" in refused(monkeypatch, capsys, *command, *own, "--right-above", "nan")
    write_rows(tmp_path / "rows.jsonl", [{"question": "1?"}])
    assert "required positional argument: 'tests'" in refused(monkeypatch, capsys, *command, *own)

    write_rows(tmp_path / "rows.jsonl", rows)
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, command), *own, "--right-above", "0.25"])
    assert evaluation.main() == 0
    lines = response_lines(tmp_path / "out")
    rewards = []
    for line in map(json.loads, lines):
        least = int(line["id"].rpartition("/")[2]) / 10
        rewards.append(sum(c.isdigit() for c in line["response"]) / 12 - least)
        assert line["reward"] == pytest.approx(rewards[-1])
        assert line["verdict"] == ("correct" if rewards[-1] > 0.25 else "wrong")
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    result = results[str(tmp_path / "rows.jsonl")]
    assert len(rewards) == 6 and result["reward"] == pytest.approx(statistics.fmean(rewards))
    assert result["avg"] == pytest.approx(sum(r > 0.25 for r in rewards) / 6)
    assert " reward " in capsys.readouterr().out


def test_the_last_lines_of_torchrun_say_what_is_wrong(tmp_path):
    result = run_on_two_ranks("eval.py", tmp_path / "none", "--bench", "sums")
    *_, message, border = result.stderr.rstrip().splitlines()
    assert f"eval.py: {tmp_path}/none: there is no such folder" in message
    assert set(border) == {"="} and result.returncode == 1


def test_a_crash_shows_its_traceback_and_what_torchrun_will_say(tmp_path, monkeypatch, capsys):
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    monkeypatch.setattr(evaluation, "command_grade", lambda args: {}["lost"])
    monkeypatch.setattr(sys, "argv", ["eval.py", "grade", "x"])
    for rank in ("0", "1"):
        path.unlink(missing_ok=True)
        monkeypatch.setenv("RANK", rank)
        assert evaluation.main() == 1
        lines = capsys.readouterr().err.splitlines()
        assert "KeyError: 'lost'" in lines  # the traceback's last line
        message = f"eval.py: rank {rank}: KeyError: 'lost'"  # each rank says its own
        assert lines[-1] == json.loads(path.read_text())["message"]["message"] == message


@pytest.fixture(scope="module")
def school(tmp_path_factory):
    """A folder of a teacher that repeats digits and nothing else, a student that has hardly begun,
    rows of both digits and letters, and what eval.py made of them."""
    folder = tmp_path_factory.mktemp("school")
    tokenizer = data.embedded_tokenizer()
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"

    def example(rng):
        digit = rng.randrange(10)
        return f"{digit}?", rng.choice(["", f"{digit};"]) + f"[{digit}]"

    for name, steps in (("teacher", 60), ("student", 8)):
        data.make_base(folder / name, 0, tokenizer, example, steps)
    rows = []
    for i, symbol in enumerate("0123456789abcd"):
        rows.append({"question": f"{symbol}?", "answer": symbol, "kind": "chain", "note": {"n": i}})
        rows[-1] |= {"solution": "another's", "behavior_logprobs": [-1.0]}
    write_rows(folder / "rows.jsonl", rows)
    result = run_python(*teach(folder, "taught.jsonl", "responses"))
    assert result.returncode == 0, result.stderr
    return types.SimpleNamespace(folder=folder, rows=rows, out=result.stdout, tokenizer=tokenizer)


def teach(folder, name: str, out: str) -> list:
    """The command. A response of five tokens may be right, and has no room for its end."""
    command = ["eval.py", folder / "teacher", "--bench", folder / "rows.jsonl", "--k", 8]
    command += ["--max-tokens", 5, "--sampler", "torch"]
    return command + ["--demonstrations", folder / name, "--out", folder / out]


def test_a_teacher_demonstrates_what_it_has_right(school):
    """Against the responses as they were judged, and transformers' own log-probabilities."""
    responses, right = {}, {}
    for line in map(json.loads, response_lines(school.folder / "responses")):
        responses.setdefault(line["id"], []).append(line)
    cut, teacher = 0, float_model(school.folder / "teacher")
    taught = json_lines(school.folder / "taught.jsonl")
    assert len(taught) == len(school.rows)
    for i, (source, row) in enumerate(zip(school.rows, taught)):
        judged = responses[f"rows.jsonl/{i}"]
        correct = [r for r in judged if r["verdict"] == "correct"]
        cut += sum(r["truncated"] for r in correct)
        right = sorted(len(r["response"]) for r in correct if not r["truncated"])
        changed = {"solution", "behavior_logprobs", "temperature"}
        assert {k: v for k, v in row.items() if k not in changed} == {
            k: v for k, v in source.items() if k not in changed
        }
        if not right:
            assert row["solution"] is row["behavior_logprobs"] is None
            continue
        assert len(row["solution"]) == right[0] and row["temperature"] == 1
        assert row["solution"].endswith(f"[{source['answer']}]")
        prompt = school.tokenizer.encode(source["question"])
        response = [*school.tokenizer.encode(row["solution"]), school.tokenizer.eos_token_id]
        with torch.no_grad():
            logprobs, _ = response_logprobs(teacher, prompt, response)
        assert row["behavior_logprobs"] == pytest.approx(logprobs.tolist(), abs=1e-5)
    solved = sum(row["solution"] is not None for row in taught)
    assert 5 <= solved <= 10 and cut > 0
    said = f"taught.jsonl: {solved} demonstrations of {solved} questions; {14 - solved} have no"
    assert said in school.out and "behavior_logprobs" not in school.out


def test_two_ranks_go_on_to_the_same_demonstrations_and_all_may_be_kept(school, monkeypatch):
    folder = school.folder
    (folder / "part").mkdir()
    shutil.copy(folder / "responses" / "settings.json", folder / "part")
    lines = response_lines(folder / "responses")
    (folder / "part" / "responses-1.jsonl").write_text("".join(lines[:30]))  # three and a half
    result = run_on_two_ranks(*teach(folder, "again.jsonl", "part"))
    assert result.returncode == 0, result.stderr
    assert "resuming: 3 of 14" in result.stderr
    one, two = json_lines(folder / "taught.jsonl"), json_lines(folder / "again.jsonl")
    assert [row["solution"] for row in one] == [row["solution"] for row in two]
    for first, second in zip(one, two):  # other batches: equal but for rounding
        first, second = first.pop("behavior_logprobs"), second.pop("behavior_logprobs")
        assert (first is None) == (second is None)
        assert (first or []) == pytest.approx(second or [], abs=1e-5)

    command = teach(folder, "all.jsonl", "part") + ["--keep", "all"]  # samples nothing more
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    assert evaluation.main() == 0
    count, kept = Counter(), Counter()
    for line in map(json.loads, lines):
        count[line["answer"]] += line["verdict"] == "correct" and not line["truncated"]
    for row in json_lines(folder / "all.jsonl"):
        kept[row["answer"]] += row["solution"] is not None
    assert count == kept and max(kept.values()) > 1
    assert not list(folder.glob("*.partial"))


def test_a_student_learns_from_a_teachers_demonstrations(school, tmp_path):
    """By MIFO and by PEAR, the real commands, from the file as it is."""
    common = dict(model=school.folder / "student", data=school.folder / "taught.jsonl")
    common |= dict(sampler="torch", max_prompt=4, max_response=8, questions=14, samples=4, steps=2)
    common |= dict(sft_batch=5, sft_lr=2e-3, sft_epochs=15, buffer_size=5)
    common |= dict(evaluate=school.folder / "rows.jsonl", eval_temperature=0.0)
    pear = dict(schedule="sft-then-rl", rho=1.0, pear="sequence")
    started = []
    for out, more in (("mifo", dict(rho=1.0)), ("pear", pear)):
        flags = as_flags(**common, **more, out=tmp_path / out)
        started.append((tmp_path / out, mifo_command(flags, tmp_path)))
    for out, process in started:
        stdout, stderr = process.communicate(timeout=200)
        assert process.returncode == 0, stderr[-2000:]
        assert "14 of 14 questions kept" in stdout and "behaviour model" not in stdout
        before, after = accuracies(out)
        assert before < 0.2 and after > before + 0.2, (before, after)
    weights = [
        line.get("sft/pear_weight", 1.0) for line in json_lines(tmp_path / "pear/metrics.jsonl")
    ]
    assert min(weights) < 0.99


def accuracies(run: Path) -> tuple[float, float]:
    """Of its first and its last evaluation, on its only benchmark."""
    shares = []
    for line in json_lines(run / "evaluations.jsonl"):
        [result] = line["benches"].values()
        shares.append(result["avg"])
    return shares[0], shares[-1]


def test_behavior_logprobs_go_with_the_tokens_that_training_reads(chat_tokenizer):
    """They are left out where the text's tokens are others than were sampled."""
    eos, encode = chat_tokenizer.eos_token_id, chat_tokenizer.encode
    words = encode("It is 9, of course.")
    letters = [token for letter in "It is 9" for token in encode(letter, add_special_tokens=False)]
    assert chat_tokenizer.decode(letters) == "It is 9" and letters != encode("It is 9")
    other = encode("<think>")[0]  # stands for a second end token
    question = types.SimpleNamespace(prompt=encode("Why?"))
    for tokens, temperature, text, fit in (
        ([*words, eos], 1.0, "It is 9, of course.", True),
        ([*words, eos], 0.6, "It is 9, of course.", False),
        ([*letters, eos], 1.0, "It is 9", False),
        ([*words, other], 1.0, "It is 9, of course.", False),
    ):
        args = types.SimpleNamespace(model="none", temperature=temperature, generation_prefix="")
        found = types.SimpleNamespace(args=args, tokenizer=chat_tokenizer)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluation, "eos_ids", lambda model, tokenizer: [eos])
            demonstrate = evaluation.demonstrator(found)
        logprobs = [-0.5] * len(tokens)
        sample = rollout.Sample(tokens, logprobs, truncated=False)
        assert demonstrate(question, sample) == (text, logprobs if fit else None)


LAYOUTS = {
    "chat": OPENR1_ROWS[0],
    "both": OPENR1_ROWS[0] | {"problem": "Another?"},
    "worked": {"question": "2 + 2?", "answer": "I add them.\n#### 4", "behavior_logprobs": [0.5]},
    "options": {"question": "Which?", "options": ["4", "5"], "answer": "5", "target": "kept"},
    "named": {"prompt": "2 + 2?", "gold": "4"},
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("right", [True, False])
def test_demonstrations_are_read_from_each_layout(name, right, chat_tokenizer, tmp_path, capsys):
    source = write_rows(tmp_path / "rows.jsonl", [LAYOUTS[name]])
    named = dict(question_field="prompt", answer_field="gold") if name == "named" else {}
    [asked] = evaluation.load_questions(source, chat_tokenizer, None, "", keep_rows=True, **named)
    found = {"solution": [None, "longer, mine", "mine"] if right else [None] * 3}
    found |= {"tokens": [1, 5, 3], "behavior_logprobs": [None] * 3}
    args = types.SimpleNamespace(demonstrations=tmp_path / "a.jsonl", keep=None, temperature=1.0)
    args.question_field = named.get("question_field", "frage")  # which the other rows lack
    made = types.SimpleNamespace(args=args, benches={"x": [asked]}, rewards=None)
    made.finished = lambda: {asked.id: found}
    evaluation.write_demonstrations(made)
    if named:
        named["solution_field"] = "solution"
    [q] = read_questions(tmp_path / "a.jsonl", chat_tokenizer, **named)
    assert (q.prompt, q.answer, q.kind) == (asked.prompt, asked.answer, asked.kind)
    if right:
        assert chat_tokenizer.decode(q.demonstration, skip_special_tokens=True) == "mine"
        assert "1 have no behavior_logprobs" in capsys.readouterr().out
    else:
        assert q.demonstration is None
    [row] = json_lines(tmp_path / "a.jsonl")
    if name == "options":
        assert row["target"] == "kept"


def test_an_evaluation_by_vllm_on_two_ranks(eval_model, tmp_path):
    if problem := rollout.vllm_problem():
        pytest.skip(problem)
    command = ["eval.py", eval_model, "--bench", "sums", "--k", 2, "--max-tokens", 12]
    result = run_on_two_ranks(*command, "--sampler", "vllm", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text())["results"]["sums"]
    assert results["rows"] == data.EVAL_SUMS and 0 < results["length"] <= 12
    assert len(response_lines(tmp_path)) == 2 * data.EVAL_SUMS
    assert len(list(tmp_path.glob("responses-*.jsonl"))) == 2


# --------------------------------------------------------------------------------------------------
# Comparing runs, and the experiment's tasks

sys.path.append(str(ROOT / "benchmarks"))  # behind the root: both hold a freeze.py
import compare  # noqa: E402
import countdown  # noqa: E402
import experiment  # noqa: E402
import gpu  # noqa: E402
import knowledge  # noqa: E402
import plan  # noqa: E402
import results  # noqa: E402
from benchmarks import pictures  # noqa: E402

# fmt: off
COMPARED = [  # RL steps, SFT steps, answers of benchmark a, of benchmark b (1: right)
    (0,  0, [0, 0, 1], [1, 0]),
    (4,  0, [1, 1, 1], [1, 0]),
    (4,  2, [0, 1, 0], [1, 1]),
    (10, 2, [1, 1, 0], [0, 1]),
    (10, 4, [1, 0, 0], [0, 0]),
]
# fmt: on


def compare_run(folder: Path, evaluations: list[tuple], **config) -> Path:
    """A run's folder as mifo.py leaves it, with evaluations as those of COMPARED."""
    folder.mkdir(parents=True)
    settings = {"evaluate": "a,b", "out": str(folder), **config}
    (folder / "config.json").write_text(json.dumps(settings))
    lines = []
    for step, (rl_steps, sft_steps, *answers) in enumerate(evaluations):
        benches = {}
        for name, right in zip("ab", answers):
            levels = {"1": right[0], "2": np.mean(right[1:])}
            benches[name] = {"avg": np.mean(right), "levels": levels, "correct": right}
        line = {
            "step": step,
            "rl_steps": rl_steps,
            "sft_steps": sft_steps,
            "sft_phases": sft_steps // 2,
            "demonstrations": 3 * sft_steps,
            "sampled_tokens": 100 * rl_steps,
            "benches": benches,
        }
        lines.append(json.dumps(line) + "\n")
    (folder / "evaluations.jsonl").write_text("".join(lines))
    return folder


def test_compare_reads_a_runs_measures(tmp_path):
    run = compare.read_run(compare_run(tmp_path / "x", COMPARED, seed=0))
    heights = [np.mean([np.mean(a), np.mean(b)]) for _, _, a, b in COMPARED]
    np.testing.assert_allclose(run["curve"], list(zip([0, 4, 4, 10, 10], heights)))
    assert run["area"] == pytest.approx(np.trapezoid(heights, [0, 4, 4, 10, 10]) / 10)
    # Four were right before the first phase, of which it lost two; three before the second, which
    # kept one.
    assert run["forgotten"] == pytest.approx((2 / 4 + 2 / 3) / 2)
    assert run["final"] == heights[-1]
    counts = run["demonstrations"], run["sampled_tokens"], run["sft_phases"]
    assert counts == (12, 1000, 2)
    assert run["levels"] == {"a 1": 1, "a 2": 0, "b 1": 0, "b 2": 0}


def test_compare_leaves_open_what_a_run_has_nothing_of(tmp_path):
    run = compare.read_run(compare_run(tmp_path / "x", COMPARED[:1] * 2, seed=0))
    assert run["area"] is None and run["forgotten"] is None
    cells = compare.comparison({"x": [run]}).splitlines()[-1].split("|")
    assert [cell.strip() for cell in cells[1:7]] == ["x", "1", "0.417", "", "", "0"]


def compare_main(monkeypatch, *argv) -> None:
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, argv)])
    compare.main()


def test_compare_puts_runs_of_several_seeds_in_one_line(tmp_path, capsys, monkeypatch):
    folders = []
    for alpha, right in ((0.0, 1), (0.9, 0)):
        for seed, other in ((3, 0), (13, 1)):
            evaluations = [*COMPARED, (12, 4, [1, right, 0], [1, other])]
            settings = {"seed": seed, "alpha": alpha, "model": f"m/base-{seed}"}
            folders.append(compare_run(tmp_path / f"{alpha}-{seed}", evaluations, **settings))
    spread = lambda values: (np.mean(values), np.ptp(values))  # so that scipy is not needed here
    monkeypatch.setattr(compare, "interval", spread)
    compare_main(monkeypatch, *folders, "--out", tmp_path / "figure.png")
    *table, figure = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in table]
    assert rows[0] == ["", "runs", "accuracy at the end"]
    assert rows[2:] == [
        ["--alpha 0.0", "2", "0.708 ± 0.250"],
        ["--alpha 0.9", "2", "0.542 ± 0.250"],
    ]
    assert figure == f"figure: {tmp_path / 'figure.png'}"
    assert plt_image(tmp_path / "figure.png")


def plt_image(path: Path) -> bool:
    """Whether a PNG shows more than one colour."""
    from matplotlib import pyplot as plt

    image = plt.imread(path)
    return image.shape[0] > 200 and image.std() > 0.01


def test_compare_refuses_in_one_line(tmp_path, capsys, monkeypatch):
    whole = compare_run(tmp_path / "x", COMPARED, seed=0)
    empty = compare_run(tmp_path / "y", [], seed=0)
    other = compare_run(tmp_path / "z", COMPARED, seed=0, evaluate="a")
    for argv, message in (
        ([tmp_path], f"{tmp_path}: not the folder of a run"),
        ([whole, empty], f"{empty}: not the folder of a run"),
        ([whole, other], "different benchmarks"),
        ([whole, whole], "scipy is missing: pip install"),
    ):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setitem(sys.modules, "scipy", None)  # as where it is not installed
            compare_main(patch, *argv, "--out", tmp_path / "figure.png")
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1
        assert error.startswith("compare.py: error: ") and message in error


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 20, 200])
def test_interval_is_students(freedom):
    """Student's density, integrated up to the interval's end, is 97.5 % of all of it."""
    pytest.importorskip("scipy")
    values = np.random.default_rng(0).normal(size=freedom + 1)
    mean, half = compare.interval(values.tolist())
    assert mean == pytest.approx(np.mean(values))
    end = half / np.std(values, ddof=1) * math.sqrt(freedom + 1)
    x = np.linspace(0, end, 200_001)
    density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    assert 0.5 + scale * np.trapezoid(density, x) == pytest.approx(0.975, abs=1e-6)


def test_interval_of_a_single_value_is_open():
    mean, half = compare.interval([1.0])
    assert mean == 1 and math.isnan(half)


def countdown_verdict(response, gold):
    return evaluation.find_and_compare(response, gold, evaluation.KINDS["countdown"], "boxed")


def test_countdown_demonstrations_are_right_and_each_as_probable_as_any_right_answer():
    rows, tokenizer = countdown.rows("train", 90), countdown.tokenizer()
    for row in rows:
        assert countdown_verdict(row["solution"], row["answer"]) == "correct"
        numbers, target = row["answer"].split(" = ")
        right = 0
        for signs in itertools.product("+-", repeat=numbers.count(" ")):
            letters = itertools.chain(*zip(numbers.split(), (*signs, "")))
            right += eval("".join(letters)) == int(target)
        assert math.exp(sum(row["behavior_logprobs"])) == pytest.approx(1 / right)
        assert len(row["behavior_logprobs"]) == len(tokenizer.encode(row["solution"])) + 1
        assert tokenizer.decode(data.render_prompt(tokenizer, row["question"])) == row["question"]
    trained = {row["question"] for row in rows}
    assert not trained & {row["question"] for row in countdown.rows("eval", 90)}


def test_countdown_logprobs_are_those_of_the_choices():
    # One of the three fives is subtracted.
    work = "<9+6=15><15+5=20><20+5=25><25+5=30><30-8=2*11><11=6+5>[9-6+5-5+5]"
    logprobs = countdown.expert_logprobs([9, 6, 5, 5, 5], 8, work)
    chosen = {work[i - 1 : i + 1]: math.exp(p) for i, p in enumerate(logprobs) if p}
    assert chosen == pytest.approx({"6+": 2 / 3, "5-": 1 / 2})


def test_countdown_base_model_reads_wrong_answers_to_the_longer_questions():
    rng, verdicts = random.Random(0), {}
    for _ in range(200):
        question, work = countdown.base_example(rng)
        numbers, target = question.rstrip("?").split("=")
        verdict = countdown_verdict(work, f"{numbers.replace(',', ' ')} = {target}")
        verdicts.setdefault(numbers.count(",") + 1, set()).add(verdict)
    right, wrong = {"correct"}, {"wrong"}
    assert verdicts == {2: right, 3: right, 4: right, 5: wrong, 6: wrong}


def test_the_knowledge_files_hold_the_embedded_questions():
    rows, tokenizer = knowledge.rows("train", 200), knowledge.tokenizer()
    questions = data.embedded_questions(data.embedded_tokenizer(), "train", 200)
    for row, question in zip(rows, questions, strict=True):
        assert (row["question"], row["level"]) == (question.asked, question.level)
        kind = evaluation.KINDS[row["kind"]]
        verdict = evaluation.find_and_compare(row["solution"], row["answer"], kind, "boxed")
        assert verdict == "correct"
        assert len(row["behavior_logprobs"]) == len(question.demonstration)
        assert data.render_prompt(tokenizer, row["question"]) == question.prompt


# --------------------------------------------------------------------------------------------------
# The experiment


def experiment_cell(**changed) -> experiment.Cell:
    plain = experiment.Cell("knowledge", "curve", "MIFO", 64, 1e-4, 3e-4, 20, 16, "", 10)
    return dataclasses.replace(plain, **changed)


def experiment_row(one: experiment.Cell, **found) -> dict:
    """As read_rows gives it."""
    empty = dict.fromkeys(experiment.NUMBERS) | {"levels": ""}
    return dataclasses.asdict(one) | empty | found


EXPERIMENT_CELLS = [
    experiment_cell(),
    experiment_cell(method="GRPO", budget=0, sft_lr=None, epochs=None, buffer_size=None),
    experiment_cell(setting="--alpha 0.5", rl_lr=3e-5),
    experiment_cell(seed=11),
]


def test_experiments_rows_come_back_from_its_table_with_their_keys(tmp_path):
    path = tmp_path / "experiment.csv"
    assert experiment.read_rows(path) == []
    for i, one in enumerate(EXPERIMENT_CELLS):
        row = dataclasses.asdict(one) | {"final": i / 8, "seconds": 2, "levels": "0:1.000 1:0.500"}
        experiment.append_row(path, row)
    rows = experiment.read_rows(path)
    assert [experiment.key_of(row) for row in rows] == EXPERIMENT_CELLS
    assert [row["final"] for row in rows] == [0, 0.125, 0.25, 0.375]
    assert rows[0]["after_sft"] is None and rows[0]["levels"] == "0:1.000 1:0.500"


def test_a_line_that_a_crash_cut_off_is_neither_read_nor_kept(tmp_path):
    path = tmp_path / "experiment.csv"
    first, *others = EXPERIMENT_CELLS
    experiment.append_row(path, dataclasses.asdict(first) | {"final": 0.5})
    with open(path, "a") as file:
        file.write("knowledge,curve,MIFO,64,0.0")
    assert [experiment.key_of(row) for row in experiment.read_rows(path)] == [first]
    for one in others:
        experiment.append_row(path, dataclasses.asdict(one) | {"final": 0.5})
    assert [experiment.key_of(row) for row in experiment.read_rows(path)] == EXPERIMENT_CELLS
    assert path.read_text().count("\n") == 5


def test_experiment_repeats_no_run_of_its_table_even_in_an_empty_folder(tmp_path, monkeypatch):
    done = []

    def work(jobs, label, finished):
        failed = []
        for folder, call, *args in jobs:
            if call is experiment.make_base:
                continue
            [one, flags] = args
            done.append(one)
            if one.setting and len(done) < 5:  # fails the first time
                failed.append(folder)
                continue
            folder.mkdir(parents=True)
            row = dataclasses.asdict(one) | {"final": 0.5}
            (folder / "row.json").write_text(json.dumps(row))
            finished(folder)
        return failed

    monkeypatch.setattr(experiment, "work", work)
    monkeypatch.setattr(experiment, "CSV", tmp_path / "experiment.csv")
    [failed] = experiment.do(EXPERIMENT_CELLS, tmp_path / "one", "x")
    assert done == EXPERIMENT_CELLS and "alpha" in failed.name
    assert experiment.do(EXPERIMENT_CELLS, tmp_path / "two", "x") == []
    assert done == [*EXPERIMENT_CELLS, EXPERIMENT_CELLS[2]]
    experiment.do(EXPERIMENT_CELLS, tmp_path / "three", "x")
    assert len(done) == 5 and not (tmp_path / "three").exists()


def experiment_job(folder: Path, seconds: float) -> None:
    """A run of nothing; one of less than no time fails."""
    time.sleep(seconds)
    folder.mkdir(parents=True)


def test_experiments_other_runs_go_on_when_one_fails(tmp_path, monkeypatch):
    fork = multiprocessing.get_context("fork")  # else each child would import all anew
    monkeypatch.setattr(experiment.multiprocessing, "get_context", lambda method: fork)
    jobs, finished = [], []
    for i, seconds in enumerate((0.0, -1.0, 0.0, 0.0)):
        jobs.append((tmp_path / f"run-{i}", experiment_job, seconds))
    failed = experiment.work(jobs, "x", lambda folder: finished.append(folder.name))
    assert failed == [tmp_path / "run-1.log"]
    assert failed[0].exists() and sorted(finished) == ["run-0", "run-2", "run-3"]


def test_experiment_ends_its_children_when_it_is_told_to_end(tmp_path, monkeypatch):
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(experiment.multiprocessing, "get_context", lambda method: fork)
    monkeypatch.setattr(experiment, "wait", lambda sentinels: sys.exit(143))
    before = time.perf_counter()
    with pytest.raises(SystemExit):
        experiment.work([(tmp_path / "run", experiment_job, 40.0)], "x", None)
    for process in multiprocessing.active_children():
        process.join()
    assert time.perf_counter() - before < 30 and not (tmp_path / "run").exists()


CLIMB_AXES = {"sft_lr": (3, 1, 9), "epochs": (20, 10), "rl_lr": (1, 2), "buffer_size": (5, 6)}


@pytest.mark.parametrize("seed", range(8))
def test_climb_finds_the_best_along_each_axis(seed):
    """Scores that are sums over the axes have their best where each term has its own."""
    rng = random.Random(seed)
    gains = {n: {v: rng.randrange(3) for v in values} for n, values in CLIMB_AXES.items()}
    setting, scores, tried = experiment.Setting(1, 3, 20, 5), {}, 0
    while True:
        found, missing = experiment.climb(CLIMB_AXES, setting, scores)
        if not missing:
            break
        assert not set(missing) & set(scores)
        tried += len(missing)
        for one in missing:
            terms = dataclasses.asdict(one).items()
            scores[one] = sum(gains[name][value] for name, value in terms)
    best = {}
    for name, values in CLIMB_AXES.items():  # of equal ones the first
        best[name] = sorted(values, key=lambda value: -gains[name][value])[0]
    assert dataclasses.asdict(found) == best
    assert tried == 3 + 1 + 1 + 1


def test_tuning_asks_for_what_is_planned_and_then_for_nothing():
    for task in experiment.TASKS:
        rows, rounds = [], 0
        while True:
            best, cells = experiment.tune_plan(task, rows)
            if not cells:
                break
            rounds += 1
            assert {one.seed for one in cells} == set(experiment.TUNING_SEEDS)
            for one in cells:  # the higher the rates, the better; a run that failed is the worst
                score = -10 if one.epochs == 40 else one.rl_lr + (one.sft_lr or 0)
                score += (one.buffer_size or 0) / 100
                if one.budget == 64:
                    score += 10 - (one.epochs or 0) / 10
                if one.rl_lr == 3e-4 and (one.budget, one.epochs) in ((32, 10), (256, 20)):
                    score += 10  # which the climb misses, but not the one at the other budget
                if one.budget == 0:
                    score += 1 - 2 * (one.sft_lr or 0)
                rows.append(experiment_row(one, final=None if score < 0 else score))
        assert rounds == 6 and len(rows) == len({experiment.key_of(row) for row in rows})
        alike = 6  # budgets at which the two settings of alternating are one
        assert len(rows) == experiment.planned(task, "tune") - 2 * alike
        # the better, not that of the nearer climb
        expected = {16: 10, 32: 10, 64: 10, 128: 10, 256: 20, 0: 20}
        for budget, epochs in expected.items():
            assert best["MIFO", budget] == experiment.Setting(3e-4, 3e-3, epochs, 64)
        assert best["GRPO", 0] == experiment.Setting(3e-4, None, None, None)
        assert best[experiment.HARD_FIRST, 0] == experiment.Setting(3e-4, 3e-5, 1, None)
        at = experiment.MIDDLE[task]
        assert best["DFT then RL", at].sft_lr == 0.01
        assert best["SFT then NFT, two updates", at].rl_lr == 1e-3


def experiment_best() -> dict:
    best = {("GRPO", 0): experiment.Setting(1e-4, None, None, None)}
    for method in experiment.FLAGS:
        for budget in (16, 32, 64, 128, 256):
            at = 64 if method in experiment.INTERLEAVED else None
            best[method, budget] = experiment.Setting(1e-4, 1e-3 * budget, budget // 8, at)
        if method != "GRPO":
            best[method, 0] = best[method, 256]
    return best


@pytest.mark.parametrize("task", experiment.TASKS)
def test_the_experiments_plan(task):
    best, everything = experiment_best(), []
    for part in experiment.PARTS[1:]:
        cells = experiment.cells_of(task, part, best)
        own = 3 * len(experiment.SEEDS) if part == "family" else 0  # MIFO's own S, alone or not
        assert len(cells) == experiment.planned(task, part) - own
        seeds = experiment.SEEDS if part != "larger" else experiment.LARGER_SEEDS
        assert {one.seed for one in cells} == (set(seeds) if cells else set())
        assert bool(cells) == (part != "larger" or task == "knowledge")
        everything += cells
    assert len(set(everything)) == len(everything)
    assert not set(experiment.TUNING_SEEDS) & set(experiment.SEEDS)
    curves = {}
    for one in everything:
        if one.part == "curve" and one.seed == 10:
            curves.setdefault(one.method, {})[one.budget] = one.sft_lr, one.epochs
    budgets = set(experiment.BUDGETS)
    assert curves.pop("GRPO") == {0: (None, None)}
    for found in curves.values():
        assert set(found) == budgets
        assert found.pop(0) == (0.256, 32)
        for budget, setting in found.items():
            assert setting == (1e-3 * budget, budget // 8)


def test_from_the_low_to_the_high_budget_both_settings_are_tried_the_nearer_first():
    near, far = experiment.Setting(1, 3, 20, 16), experiment.Setting(1, 3, 20, 64)
    assert experiment.best_of([near, near], {}) == (near, [])
    assert experiment.best_of([near], {}) == (near, [])
    assert experiment.best_of([near, far], {}) == (near, [near, far])
    assert experiment.best_of([near, far], {far: 0.5}) == (near, [near])
    assert experiment.best_of([near, far], {near: 0.5, far: 0.5}) == (near, [])
    assert experiment.best_of([near, far], {near: 0.5, far: 0.6}) == (far, [])
    low, high = experiment.LOW, experiment.HIGH
    for budget, first in ((low, low), (90, low), (91, high), (high, high)):
        assert experiment.candidates(budget) == [first, low + high - first]
    assert list(map(experiment.tuned_at, (16, 32, 64, 256, 0))) == [32, 32, 64, 256, 256]


def test_the_larger_model_is_tried_at_the_rates_of_the_small_one_and_below():
    rates = set()
    for one in experiment.cells_of("knowledge", "larger", experiment_best()):
        rates.add((one.method, one.rl_lr, one.sft_lr))
    expected = {("GRPO", 1e-4, None), ("GRPO", 3e-5, None), ("GRPO", 1e-5, None)}
    for method in set(experiment.LARGER_METHODS) - {"GRPO"}:
        expected |= {(method, 1e-4, 0.128), (method, 3e-5, 0.0384), (method, 1e-5, 0.0128)}
    assert rates == expected


def test_a_change_of_mifo_leaves_out_its_own_s():
    everything = set(experiment.MIFO_SETTINGS)
    assert everything - set(experiment.changes_of(64)) == {
        "--buffer-size 64",
        "--buffer-size 64 --freeze off",
        f"{experiment.RANDOM_HALF} --buffer-size 64",
    }
    assert set(experiment.changes_of(16)) - everything == {"--alpha 0", "--alpha 0.5", "--alpha 1"}


PATCHED = tuple(experiment.PATCHES)


def test_mifo_takes_the_flags_of_every_run_of_the_experiment(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").touch()
    seen = {}
    for part in experiment.PARTS[1:]:
        for one in experiment.cells_of("countdown", part, experiment_best()):
            flags = experiment.flags_of(one, tmp_path / "base-10", tmp_path / "out")
            cfg = mifo.parse_config(flags)
            assert (cfg.seed, cfg.demonstration_budget) == (one.seed, one.budget)
            if one.sft_lr is not None:
                assert (cfg.sft_lr, cfg.sft_epochs) == (one.sft_lr, one.epochs)
            same = dataclasses.replace(cfg, out="")
            special = one.method in experiment.PATCHES or one.setting.startswith(PATCHED)
            if special or one.part == "analyse" or one.setting == "--freeze off":
                continue  # the last is a method of the curve, at MIFO's setting
            assert seen.setdefault(repr(same), one) is one  # no two are the same run
    assert len(seen) == 5 * (7 * 6 - 6 + 1 + 10 + 7)


@pytest.mark.parametrize(
    "rate, tried",
    [(1e-3, {1e-3, 3e-4, 3e-3}), (3e-4, {3e-4, 1e-4, 1e-3}), (3e-3, {3e-3, 1e-3, 1e-2})],
)
def test_the_rates_around_one(rate, tried):
    found = experiment.around(rate)
    assert found[0] == rate and set(found) == tried


def test_overlap_is_half_by_chance_and_one_where_sft_moves_what_rl_moved():
    rl = torch.tensor([5.0, 1.0, 4.0, 0.0])
    assert experiment.overlap(rl, rl) == (pytest.approx(0.9), 1.0)
    assert experiment.overlap(rl, torch.tensor([0.0, 3.0, 1.0, 4.0])) == (0.125, 0.0)
    many = [torch.rand(40_000, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    assert experiment.overlap(*many) == (pytest.approx(0.5, abs=0.01),) * 2


def test_the_experiments_other_choices_of_tokens(monkeypatch):
    entropy = torch.tensor([[0.1, 0.9, 0.5, 0.3, 0.7], [9.0, 0.2, 0.4, 9.0, 0.3]])
    mask = torch.tensor([[True] * 5, [False, True, True, False, True]])
    picked = set()
    for patch in (experiment.lowest_tokens, experiment.random_tokens):
        with monkeypatch.context() as context:
            context.setattr(losses, "top_entropy_mask", losses.top_entropy_mask)
            patch(3)
            chosen = [losses.top_entropy_mask(entropy, mask, 0.4) for _ in range(40)]
        for one in chosen:
            assert one.sum(1).tolist() == [2, 2] and not (one & ~mask).any()
        if patch is experiment.lowest_tokens:
            assert chosen[0].nonzero().tolist() == [[0, 0], [0, 3], [1, 1], [1, 4]]
        else:
            picked = {str(one[0].tolist()) for one in chosen}
    assert len(picked) == 10  # each two of five


def test_a_random_half_is_frozen_anew_in_each_phase(monkeypatch):
    monkeypatch.setattr(freeze, "update_importance", None)
    experiment.freeze_at_random(3)
    importance, frozen = [torch.zeros(60, 100), torch.zeros(4000)], []
    for _ in range(2):
        freeze.update_importance(importance, None, None, 0.9)
        threshold = freeze.topk_threshold(importance, 0.5)
        frozen.append(torch.cat([(shard > threshold).flatten() for shard in importance]))
    assert frozen[0].sum() == frozen[1].sum() == 5000
    assert 2300 < (frozen[0] & frozen[1]).sum() < 2700  # a quarter, by chance


def test_what_an_sft_phase_made_forget_is_told_of_the_known_questions():
    lines = []
    for sft_steps, correct in ((0, [1, 1, 1, 0, 1]), (8, [1, 0, 0, 1, 0])):
        lines.append(
            {"rl_steps": 2, "sft_steps": sft_steps, "benches": {"x": {"correct": correct}}}
        )
    assert compare.forgotten(lines) == 0.75
    assert compare.forgotten([experiment.only([0, 1], line) for line in lines]) == 0.5


def test_dropped_gradients_are_a_half_of_one_phases_alone(monkeypatch):
    stepped = []
    monkeypatch.setattr(mifo, "optimizer_step", lambda run, phase, clip, loss: stepped.append(clip))
    parameter = types.SimpleNamespace(grad=torch.ones(10_000))
    parameter.grad.to_local = lambda: parameter.grad
    run = types.SimpleNamespace(policy=types.SimpleNamespace(parameters=lambda: [parameter]))
    experiment.drop_gradients("sft", 5)
    mifo.optimizer_step(run, "rl", 1.0, 0.5)
    assert parameter.grad.sum() == 10_000
    mifo.optimizer_step(run, "sft", 2.0, 0.5)
    assert stepped == [1.0, 2.0]
    assert set(parameter.grad.tolist()) == {0.0, 1.0}
    assert 4_800 < parameter.grad.sum() < 5_200


def test_a_stage_of_hard_questions_takes_those_and_counts_what_it_sampled(monkeypatch):
    """The question of index i is right in i % 4 of four samples; at most one makes it hard."""

    def sample(run, questions):
        asked.extend(questions)
        found = []
        for question in questions:
            for j in range(4):
                found.append(
                    types.SimpleNamespace(reward=float(j < question % 4), tokens=[1, 2, 3])
                )
        return found

    asked = []
    monkeypatch.setattr(mifo, "sample", sample)
    monkeypatch.setattr(mifo, "push_weights", lambda run: None)
    monkeypatch.setattr(mifo, "stage", None)
    experiment.choose_hard(0)
    for budget in (5, 0):
        cfg = mifo.Config(p=0.25, questions=8, samples=4, demonstration_budget=budget, seed=3)
        run = types.SimpleNamespace(cfg=cfg, state=mifo.State(), questions=range(60))
        run.demonstrated = set(range(50))
        asked.clear()
        chosen = mifo.stage(run)
        assert all(index % 4 <= 1 and index < 50 for index in chosen)
        assert len(chosen) == len(set(chosen)) == (budget or 26)
        assert len(asked) == len(set(asked)) and (budget == 0) == (len(asked) == 50)
        assert run.state.sampled_tokens == len(asked) * 4 * 3 and run.state.drawn == 0


def test_results_tell_differences_on_the_same_seed_alone():
    rows = [experiment_row(experiment_cell(seed=seed), final=value) for seed, value in
            ((10, 0.5), (11, 0.75), (12, None), (13, 0.25))]  # fmt: skip
    others = [experiment_row(experiment_cell(seed=seed), final=value) for seed, value in
              ((11, 0.5), (12, 0.5), (10, 0.75), (14, 0.0))]  # fmt: skip
    assert results.differences(rows, others, "final") == [-0.25, 0.25]


def experiment_rows_of_tuning() -> list[dict]:
    """The knowledge task's, in which every setting is as good."""
    rows = []
    while cells := experiment.tune_plan("knowledge", rows)[1]:
        rows += [experiment_row(one, final=0.5, seconds=60) for one in cells]
    return rows


def test_results_read_a_table_that_is_not_complete(monkeypatch):
    monkeypatch.setattr(compare, "interval", lambda values: (np.mean(values), math.nan))
    rows = experiment_rows_of_tuning()
    finals = {(10, 64): 0.5, (11, 64): 0.75, (10, 0): 1.0}
    for one in experiment.plan_of("knowledge", "curve", rows):
        if one.method == "MIFO" and (one.seed, one.budget) in finals:
            rows.append(experiment_row(one, final=finals[one.seed, one.budget]))
    text = results.report(rows)
    assert "- knowledge, curve: 212 of 215 runs" in text and "knowledge, tune" not in text
    assert "- countdown, tune: 446 of 446 runs" in text and "## countdown" not in text
    assert "| MIFO |  |  | 0.625 (2) |  |  | 1.000 (1) |  |" in text
    for one in experiment.plan_of("knowledge", "curve", rows):
        if (one.method, one.seed) == ("MIFO", 10) and one.budget not in (0, 64):
            rows.append(experiment_row(one, final=one.budget / 256))
    # the budgets of seed 10: 16, 32, 64 (0.5), 128 and 256, and all, which does not count
    assert f"| 1.000 (1) | 1.000 (1) | {(0.0625 + 0.125 + 0.5 + 0.5 + 1) / 5:.3f} (1) |" in (
        results.curve(rows, "knowledge", "final")
    )


def test_results_leave_out_what_tuning_has_not_chosen():
    rows = experiment_rows_of_tuning()
    cells = experiment.plan_of("knowledge", "curve", rows)[:3]
    stale = dataclasses.replace(cells[0], rl_lr=7.0)
    rows += [experiment_row(one, final=0.5) for one in (*cells, stale)]
    kept = [experiment.key_of(row) for row in results.current(rows) if row["part"] == "curve"]
    assert kept == cells
    untuned = [row for row in rows if row["seed"] not in experiment.TUNING_SEEDS]
    left = [row["budget"] for row in results.current(untuned)]
    assert left == [32]  # where tuning begins; what 16 and 64 will take is not known


def test_the_experiment_tells_what_is_left_whatever_tuning_gave_up(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "CSV", tmp_path / "experiment.csv")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    parts = ["tune", "curve", "larger"]
    assert experiment.forecast(["knowledge"], parts).splitlines() == [
        "knowledge, tune: 446 of 446 runs left; none was timed yet",
        "knowledge, curve: 215 of 215 runs left; none was timed yet",
        "knowledge, larger: 24 of 24 runs left; none was timed yet",
    ]
    rows = experiment_rows_of_tuning()
    cells = experiment.plan_of("knowledge", "curve", rows)[:3]
    stale = dataclasses.replace(cells[0], rl_lr=7.0)
    rows += [experiment_row(one, final=0.5, seconds=60) for one in (*cells, stale)]
    for row in rows:
        experiment.append_row(experiment.CSV, row)
    assert experiment.forecast(["knowledge"], parts).splitlines() == [
        "knowledge, tune: 0 of 446 runs left",
        "knowledge, curve: 212 of 215 runs left, about 106 minutes",
        "knowledge, larger: 24 of 24 runs left; none was timed yet",
        "about 106 minutes in all",
    ]


def test_rank_correlation_is_that_of_the_ranks():
    pytest.importorskip("scipy")
    draw = np.random.default_rng(0)
    losses_held = draw.random(30)
    finals = (1 - losses_held + draw.normal(size=30) / 3) ** 3
    rows = [experiment_row(experiment_cell(), holdout=a, final=b)
            for a, b in zip(losses_held.tolist(), finals.tolist())]  # fmt: skip
    ranks = [values.argsort().argsort() for values in (losses_held, finals)]
    expected = np.corrcoef(*ranks)[0, 1]
    unknown = experiment_row(experiment_cell(), final=0.5)
    assert results.rank_correlation([*rows, unknown], "holdout") == pytest.approx(expected)
    assert -0.95 < expected < -0.5
    assert math.isnan(results.rank_correlation(rows[:2], "holdout"))


def test_results_draw_both_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "interval", lambda values: (np.mean(values), np.ptp(values)))
    monkeypatch.setattr(results, "rank_correlation", lambda rows, name: 0.5)
    rows = []
    for one in experiment.cells_of("knowledge", "curve", experiment_best()):
        used, after = one.budget or 900, 0.2 + one.budget / 600
        found = {"start": 0.3, "final": after, "lost": 0.1, "demonstrations": used}
        if "sft-then-rl" in experiment.FLAGS[one.method]:
            found |= {"holdout": 1 - after, "pass_k": after}
        rows.append(experiment_row(one, **found))
    for draw in (results.draw_budget, results.draw_predict):
        draw(rows, tmp_path / "figure.png")
        assert plt_image(tmp_path / "figure.png")


# --------------------------------------------------------------------------------------------------
# Recipes and presets

MATHS_RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("qwen2.5-math-*.toml"))
SFT_STAGE = {"schedule", "rho", "sft_lr", "sft_schedule", "sft_batch", "sft_epochs"}
# What an SFT run has no use for stays at its default.
SFT_ALONE = {"schedule", "updates", "clip_high", "eval_every", "save_every"}
# fmt: off
RECIPE_DIFFERENCES = [
    ("qwen2.5-math-7b",          "qwen2.5-math-1.5b",        {"model"}),
    ("qwen2.5-math-1.5b-dagger", "qwen2.5-math-1.5b",        {"alpha"}),
    ("qwen2.5-math-7b-dagger",   "qwen2.5-math-7b",          {"alpha"}),
    ("qwen2.5-math-grpo",        "qwen2.5-math-7b",          {"schedule"}),
    ("qwen2.5-math-relift",      "qwen2.5-math-7b",          {"rho", "p", "freeze"}),
    ("qwen2.5-math-sft-then-rl", "qwen2.5-math-7b",          SFT_STAGE),
    ("qwen2.5-math-pear",        "qwen2.5-math-sft-then-rl", {"pear", "sft_lr", "sft_epochs"}),
    ("qwen2.5-math-sft",         "qwen2.5-math-sft-then-rl", SFT_ALONE),
]
# fmt: on


def recipe_file(name: str) -> Path:
    return ROOT / "recipes" / f"{name}.toml"


def recipe_config(monkeypatch, *argv):
    monkeypatch.setenv("WORLD_SIZE", "8")
    return mifo.parse_config(list(argv))


def recipe_named(monkeypatch, name, *argv):
    return recipe_config(monkeypatch, "--recipe", str(recipe_file(name)), *argv)


def recipe_difference(one, other) -> set[str]:
    names = {field.name for field in dataclasses.fields(one)} - {"recipe"}
    return {name for name in names if getattr(one, name) != getattr(other, name)}


@pytest.mark.parametrize("name", MATHS_RECIPES)
def test_recipe_parses_and_says_where_each_value_comes_from(monkeypatch, name):
    cfg = recipe_named(monkeypatch, name)
    assert cfg.model in ("Qwen/Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-Math-7B")
    assert cfg.data == "Elliott/Openr1-Math-46k-8192"
    assert (cfg.rope_theta, cfg.max_position_embeddings) == (40000.0, 16384)
    assert cfg.generation_prefix == "<think>\n"
    assert set(cfg.evaluate.split(",")) <= set(evaluation.BENCHES)
    lines = recipe_file(name).read_text().splitlines()
    values = [line for line in lines if line and not line.startswith("#")]
    assert len(values) > 20
    for line in values:
        assert re.fullmatch(r'\w+ = ("[^"]*"|\S+) +# (paper|lineage|ours)\b.*', line), line
    assert all(len(line) <= 120 for line in lines)


def recipe_said_difference(one: str, other: str) -> set[str] | None:
    """The settings that the first comment of a recipe says differ from another one's."""
    comment = recipe_file(one).read_text().split("\n\n")[0]
    head = " ".join(comment.replace("\n# ", " ").split())
    said = re.search(rf"iffers from {re.escape(other)}.toml in ([\w, ]+)", head)
    return set(re.split(r", | and ", said[1])) if said else None


def test_recipes_differ_exactly_where_their_comments_say(monkeypatch):
    assert {one for one, _, _ in RECIPE_DIFFERENCES} | {"qwen2.5-math-1.5b"} == set(MATHS_RECIPES)
    for one, other, names in RECIPE_DIFFERENCES:
        configs = recipe_named(monkeypatch, one), recipe_named(monkeypatch, other)
        assert recipe_difference(*configs) == names, one
        assert recipe_said_difference(one, other) in (names, None), one


def recipe_presets():
    """[(name, flags that differ from MIFO, further ones on Qwen2.5-Math)] of recipes/README.md."""
    text = (ROOT / "recipes" / "README.md").read_text()
    table = re.search(r"\| preset \|.*\n\|[-|]+\n((?:\|.*\n)+)", text)[1]
    presets = []
    for line in table.splitlines():
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")][:3]
        flags = [re.search(r"`(.*)`", cell) for cell in cells]
        presets.append((name, *(shlex.split(found[1]) if found else [] for found in flags)))
    return presets


@pytest.mark.parametrize("recipe, further", [("qwen2.5-math-7b", True), ("embedded", False)])
def test_presets_differ_from_mifo_in_exactly_their_flags(monkeypatch, recipe, further):
    presets = recipe_presets()
    assert len(presets) == 18 and presets[0] == ("MIFO", [], [])
    plain = recipe_named(monkeypatch, recipe)
    resolved = set()
    for name, flags, more in presets:
        flags = flags + more if further else flags
        cfg = recipe_named(monkeypatch, recipe, *flags)
        changed = {flag[2:].replace("-", "_") for flag in flags[::2]}
        assert recipe_difference(cfg, plain) == changed, name
        resolved.add(dataclasses.astuple(cfg))
    assert len(resolved) == len(presets)


@pytest.mark.parametrize(
    "recipe, preset",
    [
        ("qwen2.5-math-7b-dagger", "MIFO-dagger"),
        ("qwen2.5-math-relift", "MIFO without both (ReLIFT's scheme)"),
        ("qwen2.5-math-grpo", "GRPO"),
        ("qwen2.5-math-sft-then-rl", "SFT then RL"),
        ("qwen2.5-math-pear", "PEAR (block) then RL"),
    ],
)
def test_recipes_are_the_presets(monkeypatch, recipe, preset):
    [flags] = [first + more for name, first, more in recipe_presets() if name == preset]
    configs = (
        recipe_named(monkeypatch, recipe),
        recipe_named(monkeypatch, "qwen2.5-math-7b", *flags),
    )
    assert recipe_difference(*configs) == set()


def gym_command() -> list[str]:
    """What recipes/README.md says to make runs/gym by, without `python`."""
    text = (ROOT / "recipes" / "README.md").read_text()
    command = re.search(r"    python (recipes/gym_questions.py (?:.*\\\n)*.*)\n", text)[1]
    return shlex.split(command.replace("\\\n", " "))


def test_the_gym_recipe_trains_on_what_its_command_makes():
    _, folder, *tasks = [word for word in gym_command() if not word.startswith("--")]
    made = [f"{folder}/{task.partition(':')[0]}.jsonl" for task in tasks]
    cfg = mifo.Config(**tomllib.loads(recipe_file("gym").read_text()))
    assert [cfg.model, cfg.data] == [f"{folder}/model", f"{folder}/train.jsonl"]
    assert cfg.evaluate.split(",") == made and len(made) == 3
    assert cfg.schedule == "rl" and cfg.reward == "recipes/gym_reward.py:score"


def test_reasoning_gyms_scorers_are_rewards(tmp_path, monkeypatch, capsys):
    """On rows that the recipe's script writes, in the recipe's tasks."""
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    script, _, *words = gym_command()
    command = [script, str(tmp_path), "--count", "9", *(w for w in words if w != "--make-model")]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(ROOT / script), run_name="__main__")
    rows = json_lines(tmp_path / "train.jsonl")
    assert [row["level"] for row in rows[::9]] == [w.partition(":")[0] for w in words if ":" in w]
    asked = {row["question"] for row in rows}
    assert len(asked) == len(rows) == 27
    for name in {row["level"] for row in rows}:
        held_out = {row["question"] for row in json_lines(tmp_path / f"{name}.jsonl")}
        assert len(held_out) == 200 and not held_out & asked

    score = evaluation.load_rewards(f"{ROOT}/recipes/gym_reward.py:score", "", 0.5)
    questions, responses, right = [], [], []
    for i, row in enumerate(rows):
        gold = row["answer"]
        partly, share = {
            "chain_sum": ("x", 0),
            "letter_counting": (gold + "x", 1 / 2),  # the longer, the less
            "spell_backward": (gold[0], 1 / len(gold)),  # letters in their place
        }[row["level"]]
        for response, reward in ((f" {gold}\n", 1), ("", 0), (partly, share)):
            questions.append(asked_question(i, True, **row))
            responses.append(response)
            right.append(reward)
    judged = evaluation.judge(questions, responses, [[1]] * len(responses), None, score)
    assert [reward for _, reward, _ in judged] == pytest.approx(right)

    monkeypatch.setattr(sys, "argv", [script, str(tmp_path), "no_such_task"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert "error: no_such_task: " in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
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
    """({what: GiB}, {what: arithmetic}) of a GPU of 79 GiB."""
    cfg = recipe_named(monkeypatch, recipe, *argv)
    rows = plan.memory_plan(cfg, transformers.Qwen2Config(**shape), world, 79.0)
    sizes = {what: size for what, size, _ in rows}
    assert len(sizes) == len(rows) and all(size > 0 for size in sizes.values())
    return sizes, {what: arithmetic for what, _, arithmetic in rows}


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
    # (39.5 - 3.5) GiB - 3,087,428,608 B at 28,672 B a token
    assert "28 layers x 256 x 1,240,488 tokens, 134.6 responses" in said["KV cache"]
    assert sizes["TRAINING"] == pytest.approx(19.45, abs=0.01)
    assert sizes["SAMPLING"] == pytest.approx(8.03 + 39.5, abs=0.01)


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
    # (39.5 - 3.5) GiB - 15,231,233,024 B at 57,344 B a token
    assert "28 layers x 512 x 408,472 tokens, 44.3 responses" in said["KV cache"]
    assert sizes["held always"] == pytest.approx(27.82, abs=0.01)  # 28 B a parameter / 8, and 3 GiB
    assert sizes["TRAINING"] == pytest.approx(60.30, abs=0.01)
    assert sizes["SAMPLING"] == pytest.approx(67.32, abs=0.01)


def test_memory_plan_sums_each_phase(monkeypatch):
    sizes, _ = plan_of(monkeypatch, PLAN_7B)
    names = list(sizes)
    held, training, sampling = map(names.index, ("held always", "TRAINING", "SAMPLING"))
    add = lambda first, last: sum(sizes[name] for name in names[first:last])
    always = sizes["held always"]
    assert always == pytest.approx(add(0, held))
    assert sizes["TRAINING"] == pytest.approx(always + add(held + 1, training))
    assert sizes["SAMPLING"] == pytest.approx(always + add(training + 1, sampling))


FREEZING = {"importance map and anchor", "mask and importance of one tensor"}
# fmt: off
PLAN_CHANGES = [  # flags beside MIFO's recipe; rows that they take away; rows that they add
    ("--schedule rl", {"AdamW of SFT, two moments", *FREEZING}, set()),
    ("--schedule sft", {"AdamW of RL, two moments", *FREEZING}, set()),
    ("--schedule sft-then-rl", FREEZING, set()),
    ("--schedule sft-then-rl --pear block", FREEZING, {"PEAR's behaviour model, float32"}),
    ("--freeze off", FREEZING, set()),
    ("--kl-coef 0.1", set(), {"reference model, float32"}),
    ("--gather-once on",
     {"two layers gathered", "embeddings and head gathered"},
     {"gradients not yet reduced, float32", "weights gathered"}),
    ("--offload-importance",
     {"importance map and anchor"},
     {"host memory of a rank, from then on"}),
    ("--no-activation-checkpointing",
     {"activations kept", "activations of a layer, recomputed"},
     {"activations"}),
]
# fmt: on


@pytest.mark.parametrize("flags, gone, new", PLAN_CHANGES)
def test_memory_plan_follows_the_settings(monkeypatch, flags, gone, new):
    before, _ = plan_of(monkeypatch, PLAN_15B)
    after, _ = plan_of(monkeypatch, PLAN_15B, *flags.split())
    assert (set(before) - set(after), set(after) - set(before)) == (gone, new)


def test_memory_plan_shards_over_one_replica_and_counts_the_longest_row(monkeypatch):
    whole, _ = plan_of(monkeypatch, PLAN_15B)
    halves, _ = plan_of(monkeypatch, PLAN_15B, "--replicas", "2")
    assert halves["weights, float32"] == pytest.approx(2 * whole["weights, float32"])
    # A row of 9,216 tokens is alone in its micro-batch.
    short, _ = plan_of(monkeypatch, PLAN_15B, "--micro-tokens", "64")
    assert short["activations kept"] * 2**30 == pytest.approx(3072 * 28 * 9216)
    with pytest.raises(ValueError, match="--gpu-memory-utilization 0.2"):
        plan_of(monkeypatch, PLAN_7B, "--gpu-memory-utilization", "0.2")


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bloom", "gpt_neox", "qwen3_moe"])
def test_memory_plan_of_other_architectures_counts_their_parameters(kind, monkeypatch):
    known = transformers.AutoConfig.for_model(kind)
    sizes = {name: value for name, value in SIZES.items() if hasattr(known, name)}
    config = transformers.AutoConfig.for_model(kind, **sizes)
    cfg = recipe_named(monkeypatch, "qwen2.5-math-7b")
    sizes = {what: size for what, size, _ in plan.memory_plan(cfg, config, 1, 79.0)}
    model = transformers.AutoModelForCausalLM.from_config(config)
    parameters = sum(p.numel() for p in model.parameters())
    assert sizes["weights, float32"] * 2**30 == 4 * parameters
    of_a_block = [
        p for name, p in model.named_parameters() if re.search(r"\.(h|layers)\.0\.", name)
    ]
    assert sizes["two layers gathered"] * 2**30 == 4 * sum(p.numel() for p in of_a_block)


def plan_kept_bytes(shape: dict, layers: int, checkpointing: bool) -> int:
    """What autograd keeps of a forward pass over 256 tokens, beside the parameters."""
    config = transformers.Qwen2Config(**shape, num_hidden_layers=layers)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):  # the tensor is held, so that no other storage can take its address
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(input_ids=torch.zeros(2, 128, dtype=torch.int64), use_cache=False)
    own = [tensor for pointer, tensor in kept.items() if pointer not in parameters]
    return sum(tensor.untyped_storage().nbytes() for tensor in own)


@pytest.mark.parametrize(
    "flag, row",
    [
        ("--activation-checkpointing", "activations kept"),
        ("--no-activation-checkpointing", "activations"),
    ],
)
def test_memory_plan_counts_what_a_block_keeps_for_its_backward_pass(monkeypatch, flag, row):
    shape = dict(
        hidden_size=256,
        intermediate_size=704,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=16384,
    )
    one_layer = shape | {"num_hidden_layers": 1}
    sizes, _ = plan_of(monkeypatch, one_layer, flag, "--micro-tokens", "32768")
    kept = [plan_kept_bytes(shape, layers, row == "activations kept") for layers in (2, 3)]
    assert sizes[row] * 2**30 / 32768 == (kept[1] - kept[0]) / 256


def plan_main(monkeypatch, capsys, *argv) -> list[str]:
    """The lines that the command prints."""
    monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, argv)])
    monkeypatch.setenv("WORLD_SIZE", "1")  # this process plans for more ranks than it has
    plan.main()
    return capsys.readouterr().out.splitlines()


def test_plan_prints_the_memory_of_a_gpu(monkeypatch, capsys, tmp_path):
    transformers.Qwen2Config(**PLAN_7B).save_pretrained(tmp_path)
    settings = ["--recipe", recipe_file("qwen2.5-math-7b"), "--model", tmp_path]
    lines = plan_main(monkeypatch, capsys, "--gpus", 8, *settings)
    assert lines[1].split() == "weights, float32 3.55 4 B x 7,615,616,512 parameters / 8".split()
    assert any(line.split()[:4] == ["TRAINING", "60.30", "of", "79.0"] for line in lines)
    assert lines[-1] == "memory suffices"
    lines = plan_main(monkeypatch, capsys, "--gpus", 8, "--gib", 60, *settings)
    assert lines[-1] == ("memory may not suffice: TRAINING needs up to 60.3 GiB of 60.0")
    with pytest.raises(SystemExit):
        plan_main(monkeypatch, capsys, "--gpus", 7, *settings)
    assert "plan.py: error: --questions 128" in capsys.readouterr().err


def test_plan_prints_the_scaling_table(monkeypatch, capsys):
    head, rule, *rows = plan_main(monkeypatch, capsys)
    assert head.count("|") == rule.count("|") == 12
    assert "| 7B | 64 | 1024 | 8 | 0.5 | 51 | 67 | 79 | 57.2 | 8.6 | 0.04 |" in rows
    assert "| 32B | 64 | 128 | | | does not fit | | | | | |" in rows
    table = (ROOT / "benchmarks" / "README.md").read_text()
    assert all(row in table for row in rows)


# --------------------------------------------------------------------------------------------------
# The dry run

DRY_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBox it.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def dry_folder(tmp_path, monkeypatch):
    """A model's configuration and tokenizer, without weights, and rows as in OpenR1-Math-46k."""
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
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RANK", "0")
    return tmp_path


def dry_flags(folder, *argv):
    common = "--rope-theta 40000 --max-position-embeddings 16384 --sampler torch --buffer-size 1"
    paths = {"model": "model", "data": "train.jsonl", "evaluate": "test.jsonl", "out": "run"}
    files = [f"--{name}={folder / path}" for name, path in paths.items()]
    return [*files, "--generation-prefix", "<think>\n", "--dry-run", *common.split(), *argv]


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
        "\n<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
        "<<<|>>>Two twos.\n</think>\n\\boxed{4}<|endoftext|>\n"
    ) in text
    assert r"of kind math, in a response: the last `\boxed{}`, equal as mathematics" in text
    last = "dry run: settings, tokenizer and data are in place; the weights were not tried"
    assert text.splitlines()[-1] == last
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
    rows = (dry_folder / "train.jsonl").read_text().splitlines()
    (dry_folder / "train.jsonl").write_text(rows[0] + "\n")
    with pytest.raises(ValueError, match="needs demonstrations"):
        mifo.dry_run(recipe_config(monkeypatch, *dry_flags(dry_folder)))
    assert "the first question: gold answer '2'" in mifo.dry_run(
        recipe_config(monkeypatch, *dry_flags(dry_folder, "--schedule", "rl"))
    )


def test_dry_run_refuses_a_folder_that_holds_a_run(dry_folder, monkeypatch, capsys):
    (dry_folder / "run").mkdir()
    (dry_folder / "run" / "metrics.jsonl").write_text("")
    monkeypatch.setattr(sys, "argv", ["mifo.py", *dry_flags(dry_folder)])
    monkeypatch.setattr(mifo.signal, "signal", lambda number, handler: None)  # this process's own
    assert mifo.main() == 2
    assert f"--out {dry_folder / 'run'} holds a run already" in capsys.readouterr().err


def test_dry_run_reads_what_is_evaluated_as_the_run_would(dry_folder, monkeypatch, capsys):
    """By the columns named for the training rows, and with prompts of at most --max-prompt."""
    row = {"frage": "2+2?", "loesung": "4", "weg": "\\boxed{4}"}
    write_rows(dry_folder / "train.jsonl", [row] * 3)
    asked = [{"frage": "4+4?", "loesung": "8"}, {"frage": "What is 4+4?", "loesung": "8"}]
    write_rows(dry_folder / "test.parquet", asked)
    flags = dry_flags(dry_folder, f"--evaluate={dry_folder / 'test.parquet'}", "--questions=8")
    flags += ["--question-field=frage", "--answer-field=loesung", "--solution-field=weg"]
    prompts = [f"<|im_start|>system\nBox it.<|im_end|>\n<|im_start|>user\n{row['frage']}<|im_end|>\n"
               "<|im_start|>assistant\n<think>\n" for row in asked]  # fmt: skip
    lengths = [len(re.sub(r"<\|\w+\|>", "!", prompt)) for prompt in prompts]
    few = "3 questions for --questions 8: some stand several times in a step\n"
    text = mifo.dry_run(recipe_config(monkeypatch, *flags, f"--max-prompt={lengths[1]}"))
    assert "test.parquet: 2 questions" in text and few in capsys.readouterr().out
    said = rf"--evaluate {dry_folder}/test.parquet: question test.parquet/1 has a prompt of "
    with pytest.raises(ValueError, match=f"{said}{lengths[1]} tokens, --max-prompt is"):
        mifo.dry_run(recipe_config(monkeypatch, *flags, f"--max-prompt={lengths[1] - 1}"))
    capsys.readouterr()
    mifo.dry_run(recipe_config(monkeypatch, *flags, "--schedule=sft"))
    write_rows(dry_folder / "train.jsonl", [row] * 8)
    mifo.dry_run(recipe_config(monkeypatch, *flags))
    assert "several times" not in capsys.readouterr().out


def test_dry_run_shows_the_reward_of_the_first_demonstration(dry_folder, monkeypatch):
    """Which the checker, that would drop the third row, has not judged."""
    (dry_folder / "mine.py").write_text(
        "def mine(completions, reward_model, **columns):\n"
        "    golds = [cell['ground_truth'] if cell else '8' for cell in reward_model]\n"
        "    return [len(c[0]['content']) + int(gold) for c, gold in zip(completions, golds)]\n"
        "def none(prompts, **columns): return [None]\n"
        "def wrong(prompts, **columns): return ['a']\n"
        "def lacks(prompts, no_such_column): return [0]\n"
    )
    own = lambda *names: ",".join(f"{dry_folder}/mine.py:{name}" for name in names)
    (dry_folder / "test.jsonl").write_text('{"question": "4 + 4?", "reward_model": null}\n')
    flags = dry_flags(dry_folder, "--reward", own("mine", "none"))
    text = mifo.dry_run(recipe_config(monkeypatch, *flags))
    value = len("Two twos.\n</think>\n\\boxed{4}") + 4
    assert f"\nreward     mine: {value}, of the demonstration below\n" in text
    assert "\nreward     none: None, not judged, of the demonstration below\n" in text
    assert "3 of 3 questions kept" in text and "answers " not in text
    for name, message in (("wrong", "--reward wrong: returned 'a'"), ("lacks", "no_such_column")):
        flags = dry_flags(dry_folder, "--reward", own(name))
        with pytest.raises(ValueError, match=message):
            mifo.dry_run(recipe_config(monkeypatch, *flags))


@pytest.mark.parametrize(
    "kind, sizes, said",
    [
        ("gpt2", {}, "gpt2, 12 layers of width 768, context 1,024"),
        ("bloom", {}, "bloom, 2 layers of width 64"),
        ("phi", {}, "phi, 24 layers of width 2048, context 2,048, rotary base 10,000"),
        (
            "gemma3_text",
            dict(num_hidden_layers=4),
            "gemma3_text, 4 layers of width 2304, context 131,072, rotary base 10,000 and 1,000,000",
        ),
    ],
)
def test_a_model_is_described_by_what_its_configuration_has(kind, sizes, said):
    assert mifo.described(transformers.AutoConfig.for_model(kind, **sizes)) == said


@pytest.mark.parametrize(
    "kind, settings, said",
    [
        ("gpt2", dict(rope_theta=1e6), "--rope-theta .*; those of gpt2: none"),
        ("gemma3_text", dict(rope_theta=1e6), "--rope-theta .*: 10,000, 1,000,000"),
        ("gpt2", dict(max_position_embeddings=4096), "--max-position-embeddings needs rotary"),
        ("gpt2", {}, "context of 1024 tokens: lower them$"),
        ("phi", {}, "lower them, or extend it by --max-position-embeddings and --rope-theta$"),
    ],
)
def test_a_context_is_extended_by_rotary_positions_alone(kind, settings, said):
    config = transformers.AutoConfig.for_model(kind)
    with pytest.raises(ValueError, match=said):
        mifo.edit_config(mifo.Config(max_prompt=1000, max_response=3000, **settings), config)


def test_dry_run_reads_behavior_logprobs_for_pear_alone(dry_folder, monkeypatch):
    """They do not fit where another tokenizer wrote them, and what does not use them need not."""
    rows = json_lines(dry_folder / "train.jsonl")
    rows[1] |= {"behavior_logprobs": [-1.0]}
    write_rows(dry_folder / "train.jsonl", rows)
    flags = dry_flags(dry_folder)
    assert "2 of 3 questions kept" in mifo.dry_run(recipe_config(monkeypatch, *flags))
    flags += ["--pear", "sequence", "--rho", "1", "--schedule", "sft-then-rl"]
    with pytest.raises(ValueError, match="needs demonstrations"):
        mifo.dry_run(recipe_config(monkeypatch, *flags))


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
    assert done.stdout.startswith("settings") and done.stdout.endswith("were not tried\n")
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
    p=0.25, sft_batch=2, sft_epochs=2, rl_lr=1e-3, sft_lr=1e-3, save_every=1000, keep=1000,
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


@functools.cache
def fork_server():
    """Starts processes that have imported this module already, which takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([Path(__file__).stem])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # where it finds this module
        for name, value in environment(ROOT).items():
            patch.setenv(name, value)
        multiprocessing.forkserver.ensure_running()
    return context


def start(folder, world: int, function, *args) -> list[multiprocessing.Process]:
    """function(*args) in `world` processes that torchrun might have started."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    started = []
    for rank in range(world):
        place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_PORT=port)
        process = fork_server().Process(target=be_rank, args=(folder, place, function, args))
        process.start()
        started.append(process)
    return started


def be_rank(folder, place: dict[str, int], function, args) -> None:
    """In a new process: function(*args), which may give an exit code, as under torchrun."""
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ["MASTER_ADDR"] = "localhost"
    datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")
    os.chdir(folder)
    output = os.open(f"output-{place['RANK']}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = function(*args)
    sys.stdout.flush()
    os._exit(code or 0)


def finish(started: list[multiprocessing.Process], limit=170) -> list[int]:
    """Their exit codes; what is still at work after `limit` seconds is killed."""
    end = time.monotonic() + limit
    try:
        for process in started:
            process.join(max(0, end - time.monotonic()))
    finally:
        for process in started:
            process.kill()
            process.join()
    return [process.exitcode for process in started]


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
    tiny_model(folder / "sums-base-0", 0)
    shutil.copytree(folder / "sums-base-0", folder / "sums-base-1")
    tiny_model(folder / "other", 1)
    (folder / "empty.toml").write_text("")
    functions = (graded, brief, faulty)
    (folder / "rewards.py").write_text("import zlib\n" + "".join(map(inspect.getsource, functions)))
    return folder


def graded(completions, answer, **kwargs):
    """From 0 to 1 by the text; None for one in five."""
    rewards = []
    for text, gold in zip(completions, answer, strict=True):
        number = zlib.crc32(f"{text} {gold}".encode())
        rewards.append(None if number % 5 == 0 else number % 7 / 6)
    return rewards


def brief(prompts, completion_ids, question):
    """Negative by the length; None for one in two."""
    assert prompts == question
    return [-len(ids) / 10 if ids[0] % 2 else None for ids in completion_ids]


def faulty(completions, answer, **kwargs):
    """Raises for one question of the sixteen."""
    return [1 / (int(gold) - 22) for gold in answer]


def never_solved(gold: str) -> bool:
    """Two of the sixteen."""
    return int(gold) % 7 == 0


class StandInChecker:
    """Decides by gold answer and text, in no time, and differently though the model is random."""

    extract, require_think = "any", False

    def __init__(self, *args):
        pass

    def check(self, texts, golds, kinds):
        odd = [zlib.crc32(text.encode()) % 2 for text in texts]
        return [
            "correct" if o and not never_solved(gold) else "wrong" for gold, o in zip(golds, odd)
        ]

    def check_golds(self, golds, kinds):
        return ["correct"] * len(golds)

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
    return data.embedded_questions(data.embedded_tokenizer(), "train", 16)


def stand_ins() -> None:
    """In a rank's process: 16 questions, the checker above, no plots, any number of runs."""
    embedded, init = data.embedded_questions, dist.init_process_group
    data.embedded_questions = lambda tokenizer, name, _: embedded(tokenizer, name, 16)
    evaluation.Checker = StandInChecker
    dist.init_process_group = lambda *args, **more: dist.is_initialized() or init(*args, **more)
    mifo.pictures.draw = lambda *args, **more: None
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
    late: bool  # runs in processes of its own, when all others have run on one rank and on two


CASES = {}  # by name


def case(worlds=(1, 2), late=False):
    """Runs the function below in the shared processes; a fixture of its name gives its findings."""

    def declare(function):
        name = function.__name__
        CASES[name] = Case(function, worlds, late)
        return pytest.fixture(lambda findings: findings(name), scope="session", name=name)

    return declare


def run_cases(folder: Path, names: list[str]) -> None:
    """In a rank's process: each case in turn, its finding saved; the first that raises ends it."""
    stand_ins()
    for name in names:
        try:
            finding = CASES[name].function(folder)
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
        finish(start(folder, world, run_cases, folder, names), limit=600)
        names = [name for name in names if not is_done(folder, world, name)]
        if names:
            (folder / f"{names[0]}.error").write_text(outputs(folder, world))
            names = names[1:]


class Findings(Mapping):
    """{number of ranks: [the finding of each rank]} of a case, which runs when this is looked at.

    So `pytest -x` ends before anything ran on two ranks if a finding on one is wrong.
    """

    def __init__(self, name: str, root: Path, run_stages):
        self.name, self.root, self.run_stages = name, root, run_stages
        self.found = {}

    def __iter__(self):
        return iter(CASES[self.name].worlds)

    def __len__(self):
        return len(CASES[self.name].worlds)

    def __getitem__(self, world: int) -> list:
        if world in self.found:
            return self.found[world]
        if world not in CASES[self.name].worlds:
            raise KeyError(world)
        self.run_stages(world, CASES[self.name].late)
        folder = self.root / str(world)
        if (folder / f"{self.name}.error").exists():
            text = (folder / f"{self.name}.error").read_text()
            pytest.fail(f"{self.name} on {world} ranks:\n{text}", pytrace=False)
        files = [finding_file(folder, self.name, rank) for rank in range(world)]
        self.found[world] = [torch.load(file, weights_only=False) for file in files]
        return self.found[world]


@pytest.fixture(scope="session")
def findings(request, tmp_path_factory):
    """name of a case -> its Findings"""
    root = tmp_path_factory.mktemp("cases")
    taken = set()
    for item in request.session.items:
        taken.update(getattr(item, "fixturenames", ()))
    chosen = [name for name in CASES if name in taken]
    stages = [(1, False), (2, False), (1, True), (2, True)]  # those that have not run: world, late

    def run_stages(*last):
        """All up to and with this one."""
        while last in stages:
            world, late = stages.pop(0)
            folder = root / str(world)
            if not late:
                make_folder(folder)
            alike = [name for name in chosen if CASES[name].late == late]
            run_to_the_end(folder, world, [n for n in alike if world in CASES[n].worlds])

    return lambda name: Findings(name, root, run_stages)


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
    "kl": dict(updates=2, kl_coef=0.5, temperature=0.7),
    "tis": dict(tis_cap=2.0),
    "each": dict(gather_once="off", updates=2, kl_coef=0.5),
    "seed": dict(seed=1),  # all 16 questions in another order
    "graded": dict(reward="rewards.py:graded", aggregation="sequence", normalize_std=True),
    "weighed": dict(
        reward="rewards.py:graded,rewards.py:brief", reward_weights="1,0.5", mask_truncated=True),
    "gspo": dict(
        rl_loss="gspo", updates=2, clip_low=0.02, clip_high=0.03, aggregation="sequence",
        normalize_std=True, kl_coef=0.1),
    "nft": dict(rl_loss="nft", updates=2, nft_epsilon=0.9, nft_negative=0.7, mask_truncated=True),
    "nft-graded": dict(rl_loss="nft", updates=2, reward="rewards.py:graded", right_above=0.6),
}
SFT_STEPS = {
    "all": dict(rho=1.0),
    "seed": dict(rho=1.0, seed=1),  # in another order
    "rho": dict(rho=0.35),
    "single": dict(rho=0.2, sft_batch=1),  # fewer rows than ranks
    "odd": dict(rho=0.5, sft_batch=5),
    "copies": dict(rho=0.35, replicas=int(os.environ.get("WORLD_SIZE", 1))),
    "each-copies": dict(
        rho=0.35, gather_once="off", replicas=int(os.environ.get("WORLD_SIZE", 1))),
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
    "dft": dict(rho=1.0, sft_weights="dft"),
    "trust": dict(rho=1.0, sft_weights="trust", sft_weight_alpha=0.03),
    "phi-pear": dict(rho=0.6, sft_weights="phi", pear="token", behavior_model="other"),
    "sed": dict(rho=1.0, sed=2.0, sft_batch=8),  # the second step has the tau of the first
    "sed-phi": dict(rho=0.5, sed=0.5, sed_k=3, sed_tau=0.25, sft_weights="phi"),
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


@contextlib.contextmanager
def fixed_samplers():
    """Runs that are opened meanwhile have a FixedSampler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FixedSampler, "why", "this is a test", raising=False)
        patch.setattr(rollout, "make_sampler", lambda *args, **more: FixedSampler())
        yield


def each_split(run):
    """Sets each of MICRO_TOKENS in turn, the run as it was opened."""
    start = [p.detach().to_local().clone() for p in run.policy.parameters()]
    for micro in MICRO_TOKENS:
        run.cfg.micro_tokens, run.state, run.log = micro, mifo.State(), {}
        with torch.no_grad():
            for p, value in zip(run.policy.parameters(), start):
                p.to_local().copy_(value)
        yield micro


@case()
def rl_gradients(folder):
    """{(name, micro_tokens): gradients of an RL step's optimizer steps, on all questions}."""
    found = {}
    for name, settings in RL_STEPS.items():
        with fixed_samplers():
            run = open_run(folder / f"rl-{name}", questions=16, probe_bound=1e9, **settings)
        if name == "sequence":
            run.pad_id = run.tokenizer.eos_token_id
        for micro in each_split(run):
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


def rewards_of(cfg, question, group) -> list[float | None]:
    """Of a question's samples; None: not judged."""
    tokenizer = data.embedded_tokenizer()
    texts = [tokenizer.decode(s.tokens, skip_special_tokens=True) for s in group]
    if not cfg.reward:
        verdicts = StandInChecker().check(texts, [question.answer] * len(group), None)
        return [float(verdict == "correct") for verdict in verdicts]
    first = graded(texts, [question.answer] * len(group))
    if "brief" not in cfg.reward:
        return first
    second = brief(0, [s.tokens for s in group], 0)
    rewards = []
    for a, b in zip(first, second):
        judged = [x for x in (a, None if b is None else 0.5 * b) if x is not None]
        rewards.append(sum(judged) if judged else None)
    return rewards


def rewarded_samples(cfg) -> list:
    """(prompt, sample, advantage) of FixedSampler's responses to all questions, as drawn; the
    advantage of one that is not judged is None."""
    questions, rows = sixteen_questions(), []
    for index in data.draw(16, cfg.seed, 0, 16):
        q = questions[index]
        [group] = FixedSampler().sample([q.prompt], 4, [0], 60, 1.0)
        rewards = rewards_of(cfg, q, group)
        judged = [reward for reward in rewards if reward is not None]
        alone = len(judged) < 2
        scale = statistics.stdev(judged) + 1e-6 if cfg.normalize_std and not alone else 1.0
        if cfg.rl_loss == "nft":
            rewards = [None if r is None else float(r > cfg.right_above) for r in rewards]
            judged = [reward for reward in rewards if reward is not None]
        for sample, reward in zip(group, rewards):
            advantage = None if reward is None else (reward - statistics.fmean(judged)) / scale
            rows.append((q.prompt, sample, advantage))
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
        batch = [row for row in batch if row[2] is not None]
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
            if cfg.rl_loss == "nft":
                right = advantage > 0
                rate = 1 - advantage if right else -advantage
                constants = right, rate, cfg.nft_epsilon, cfg.nft_negative
                _, gradient, _ = nft_oracle(logprobs.detach(), old, *constants)
                logprobs.backward(torch.tensor(gradient, dtype=torch.float64) / divisor)
                continue
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
                sequence=cfg.rl_loss == "gspo",
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
    return make_folder(tmp_path_factory.mktemp("base")) / "sums-base-0"


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
    for name, settings in SFT_STEPS.items():
        settings = dict(sft_batch=16, sft_epochs=1) | settings
        if "behavior_model" in settings:
            settings["behavior_model"] = folder / settings["behavior_model"]
        with fixed_samplers():
            run = open_run(folder / f"sft-{name}", temperature=0.7, **settings)  # RL's alone
        if name == "odd":
            run.pad_id = run.tokenizer.eos_token_id
        if name == "pear-column":
            for i, q in enumerate(run.questions):
                column = behavior_column(i, len(q.demonstration))
                run.questions[i] = dataclasses.replace(q, behavior_logprobs=column)
        for micro in each_split(run):
            mifo.begin_sft(run, list(range(min(16, 2 * run.cfg.sft_batch))))
            batches = [list(batch) for batch in run.state.sft_queue]
            with plain_steps() as gradients:
                while run.state.sft_queue:
                    mifo.sft_step(run)
            found[name, micro] = batches, gradients
    return found


@torch.no_grad()
def top_masses(model, question, k: int) -> torch.Tensor:
    """[n]: what the k most probable tokens hold together at each token of a demonstration."""
    tokens, n = question.prompt + question.demonstration, len(question.demonstration)
    p = model(input_ids=torch.tensor([tokens])).logits[0, -n - 1 : -1].softmax(-1)
    return p.sort(descending=True).values[:, :k].sum(1)


def sft_step_oracle(base: Path, settings: dict, batches, behavior_by: str) -> list[dict]:
    """The gradients of SFT steps, demonstration by demonstration in float64.

    behavior_by: "other", the model beside the base model; "column", the data; "before", the policy
    before the first step.
    """
    cfg = mifo.Config(**settings)
    model, questions = float_model(base), sixteen_questions()
    behavior_model = float_model(base.with_name("other") if behavior_by == "other" else base)
    gradients, tau = [], cfg.sed_tau
    if cfg.sed and not tau:  # the 70 % of all tokens at or above it, before the first step
        masses = [top_masses(model, questions[index], cfg.sed_k) for index in sum(batches, [])]
        masses = torch.cat(masses).sort(descending=True).values
        tau = masses[math.floor(0.7 * len(masses)) - 1].item() - 1e-9
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
            p = logprobs.detach().exp()
            if cfg.sft_weights == "dft":
                weights = weights * p
            elif cfg.sft_weights == "trust":
                weights = weights * torch.minimum(p / cfg.sft_weight_alpha, torch.ones_like(p))
            elif cfg.sft_weights == "phi":
                weights = weights * p * (1 - p)
            loss = -logprobs
            if cfg.sed:
                uncertain = (top_masses(model, q, cfg.sed_k) < tau).double()
                loss = loss + cfg.sed * uncertain * (logprobs.exp() - 0.5) ** 2
            losses_of_rows.append((loss * weights)[chosen].sum())
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
# What is frozen


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
        logged = {"norm": run.log["sft/grad_norm"]}
        logged["share"] = run.log["sft/frozen_gradient_share"]
        logged["left"] = [p.grad for p in parameters if p.grad is not None]
        steps.append(found | logged)

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
            assert step["share"] == pytest.approx(1 - (norm / raw) ** 2, abs=1e-5)
            assert 0.05 < step["share"] < 0.95
            assert not step["left"]  # or the next step would add its gradients to these
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
def no_gradient(folder):
    """What a step without any gradient logs as the frozen entries' share of it."""
    run = open_run(folder / "no-gradient")
    move_weights(run)
    mifo.begin_sft(run, [0])
    for p in run.policy.parameters():
        p.grad = torch.zeros_like(p)
    mifo.optimizer_step(run, "sft", 1.0, 0.0)
    return run.log["sft/frozen_gradient_share"]


def test_frozen_entries_have_no_share_of_a_gradient_of_zero(no_gradient):
    assert no_gradient == {1: [0.0], 2: [0.0, 0.0]}


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
    phases = [phase for phase in phases if "sft ends" in phase]
    mifo.barrier(run)
    return phases, json_lines(folder / "phases" / "movement.jsonl"), metrics_of(folder / "phases")


def test_importance_is_measured_from_the_end_of_the_sft_phase_before(importance_by_phase):
    for ranks in importance_by_phase.values():
        phases, _, _ = ranks[0]
        assert len(phases) >= 3
        expected = {n: torch.zeros_like(w) for n, w in phases[0]["rl begins"].items()}
        for phase in phases:
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


def test_movement_is_that_of_each_phase_by_layer_and_kind(importance_by_phase):
    for ranks in importance_by_phase.values():
        phases, lines, metrics = ranks[0]
        assert len(lines) >= 2 * len(phases)
        for i, phase in enumerate(phases):
            frozen = {n: c > phase["threshold"] for n, c in phase["importance"].items()}
            moves = (("rl", "rl begins", "rl ends"), ("sft", "rl ends", "sft ends"))
            for line, (which, start, end) in zip(lines[2 * i :], moves):
                assert line["phase"] == which and line["sft_phases"] == i + (which == "sft")
                moved = {n: (phase[end][n] - phase[start][n]).abs().double() for n in frozen}
                checked = 0
                for n in frozen:  # of the tiny model each is alone in its place
                    _, layer, kind = re.fullmatch(r"((model\.layers\.\d+)\.)?(.+)", n).groups()
                    kind = kind.removesuffix(".weight")
                    place = line["layers"][layer][kind] if layer else line["layers"][kind][""]
                    assert place["entries"] == frozen[n].numel()
                    assert place["frozen"] == frozen[n].double().mean().item()
                    assert place["moved"] == pytest.approx(moved[n].mean().item(), rel=1e-5)
                    checked += 1
                assert checked == sum(map(len, line["layers"].values()))
                [metric] = [m for m in metrics if m["step"] == line["step"]]
                entries = sum(m.numel() for m in moved.values())
                mean = sum(m.sum().item() for m in moved.values()) / entries
                assert metric[f"{which}/movement"] == pytest.approx(mean, rel=1e-5)


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
    "gather-each": dict(gather_once="off", micro_tokens=60, updates=2, kl_coef=0.1, buffer_size=2),
    "alternate": dict(
        schedule="alternate", rl_share=0.4, demonstration_budget=5, sft_holdout=6, steps=6, sft_batch=2),
    "budget": dict(
        demonstration_budget=3, buffer_size=2, sft_holdout=3, steps=6, evaluate="sums", eval_every=2,
        eval_k=2),
    "budget-stage": dict(
        schedule="sft-then-rl", demonstration_budget=6, sft_holdout=4, sft_epochs=3, sft_batch=2,
        pear="token", sft_weights="trust", sed=1.0),
}
# fmt: on
LONG_PRESETS = ("mifo", "dagger", "zero-grad-only")  # nine RL steps, so several SFT phases
# A checkpoint takes longer than a step: these have one after each, the others one at the end.
SAVED_PRESETS = (*LONG_PRESETS, "alternate", "budget", "budget-stage", "sft-then-rl",
                 "pear-sequence", "pear-token", "pear-block")  # fmt: skip


@functools.cache
def train_preset(folder: Path, name: str) -> Path:
    """In a rank's process: the preset's run, trained by the first case that asks for it."""
    return trained(folder / f"preset-{name}", **preset_settings(name))


def preset_settings(name: str) -> dict:
    short = {} if name in LONG_PRESETS else dict(steps=3, sft_batch=8, sft_epochs=1)
    saves = dict(save_every=1) if name in SAVED_PRESETS else {}
    return short | saves | PRESETS[name]


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
    run = open_run(folder / "buffers", questions=16, p=0.25, buffer_size=16, probe_bound=1e9)
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
    rows = rewarded_samples(mifo.Config())  # of p = 0.25 one of a question's four may be right
    first = data.draw(16, 0, 0, 16)
    tokenizer, questions = data.embedded_tokenizer(), sixteen_questions()
    hard = []
    for place, index in enumerate(first):
        group = [sample for _, sample, _ in rows[4 * place : 4 * place + 4]]
        texts = [tokenizer.decode(s.tokens, skip_special_tokens=True) for s in group]
        verdicts = StandInChecker().check(texts, [questions[index].answer] * 4, None)
        if verdicts.count("correct") <= 1:
            hard.append(index)
    again = [index for index in data.draw(16, 0, 32, 16) if index in hard]
    assert 3 <= len(hard) < 16 and again != hard
    for ranks in buffers.values():
        for found in ranks:
            assert found == [hard, hard, again]


def rewarded_response(prompt: list[int], token: int, reward: float) -> mifo.Response:
    """Of one token, as if it had been sampled."""
    return mifo.Response(
        id="",
        prompt=prompt,
        tokens=[token],
        rollout_logprobs=[-1.0],
        truncated=False,
        text="",
        verdict="correct" if reward else "wrong",
        reward=reward,
    )


@case(worlds=(1,))
def buffer_at_exactly_p(folder):
    """The buffer, and the questions: of ten answers none, one, two and one are right.

    The last question has no demonstration.
    """
    run = open_run(folder / "exactly-p", questions=4, samples=10, p=0.1, buffer_size=16)
    run.sampler = FixedSampler()
    indices = data.draw(16, 0, 0, 4)
    bare = dataclasses.replace(run.questions[indices[3]], demonstration=None)
    run.questions[indices[3]] = bare
    run.demonstrated.remove(indices[3])

    def answers(run, questions):
        responses = []
        for question, right in zip(questions, (0, 1, 2, 1)):
            for i in range(10):
                responses.append(rewarded_response(question.prompt, 3, float(i < right)))
        return responses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mifo, "push_weights", lambda run: None)
        patch.setattr(mifo, "sample", answers)
        patch.setattr(mifo, "rl_update", lambda *rest: None)
        mifo.rl_step(run)
    return run.state.buffer, indices


def test_an_accuracy_of_exactly_p_is_hard_and_no_demonstration_is_not(buffer_at_exactly_p):
    [(buffer, indices)] = buffer_at_exactly_p[1]
    assert buffer == indices[:2]


@case()
def graded_step(folder):
    """What an RL step and an evaluation with a reward function of one's own leave behind."""
    settings = dict(questions=16, p=0.5, right_above=0.3, buffer_size=16, probe_bound=1e9)
    settings |= dict(evaluate="sums", eval_k=3, samples_logged=64)
    settings |= dict(reward="rewards.py:graded,rewards.py:brief", reward_weights="1,0.5")
    run = open_run(folder / f"graded-step-{os.environ['WORLD_SIZE']}", **settings)
    run.sampler = FixedSampler()
    run.checker.check = None  # is not asked
    mifo.rl_step(run)
    step = dict(run.log)
    mifo.evaluate(run)
    return run.state.buffer, step, run.state.evals[0]["results"]["sums"], run.cfg.out


def test_a_graded_reward_makes_buffer_metrics_and_evaluation(graded_step):
    cfg = mifo.Config(reward="graded,brief")
    questions, hard, groups, parts = sixteen_questions(), [], [], {"graded": [], "brief": []}
    spared = []
    for index in data.draw(16, 0, 0, 16):
        q = questions[index]
        [group] = FixedSampler().sample([q.prompt], 4, [0], 60, 1.0)
        rewards = rewards_of(cfg, q, group)
        parts["graded"] += rewards_of(mifo.Config(reward="graded"), q, group)
        parts["brief"] += brief(0, [s.tokens for s in group], 0)
        groups.append(rewards)
        right = [reward > 0.3 for reward in rewards if reward is not None]
        if right and sum(right) / len(right) <= 0.5:
            hard.append(index)
        elif sum(right) / 4 <= 0.5:
            spared.append(index)  # hard only if what is not judged were wrong
    flat = [reward for rewards in groups for reward in rewards]
    judged = [reward for reward in flat if reward is not None]
    assert 0 < len(judged) < len(flat) and 2 < len(hard) < 14 and spared
    for ranks in graded_step.values():
        for buffer, log, result, _ in ranks:
            assert buffer == hard
            assert log["reward"] == pytest.approx(statistics.fmean(judged))
            for name, values in parts.items():
                known = [value for value in values if value is not None]
                assert log[f"rewards/{name}"] == pytest.approx(statistics.fmean(known))
            wrong = [all(r is None or r <= 0.3 for r in rewards) for rewards in groups]
            assert log["groups/all_wrong"] == sum(wrong) / 16 > 0
            assert log["answers/unjudged"] == 1 - len(judged) / 64
            assert result == graded_step[1][0][2] and 0 < result["unjudged"] < 1
        lines = json_lines(Path(ranks[0][3], "samples.jsonl"))
        assert [line["reward"] for line in lines] == pytest.approx(flat)
        assert [line["rewards"]["brief"] for line in lines] == pytest.approx(parts["brief"])
        assert {line["verdict"] for line in lines} == {"correct", "wrong", "unjudged"}


@case()
def reward_fails(folder):
    """Why a run ends whose reward function fails at one question: one rank's, of two."""
    run = open_run(folder / "reward-fails", questions=16, reward="rewards.py:faulty")
    run.sampler = FixedSampler()
    with pytest.raises(mifo.Stopped) as error, pytest.MonkeyPatch.context() as patch:
        patch.setattr(mifo, "push_weights", lambda run: None)
        mifo.train(run)
    return str(error.value)


def test_a_reward_function_that_fails_ends_the_run_on_all_ranks(reward_fails):
    expected = "after step 0: --reward faulty: raised ZeroDivisionError: division by zero, of "
    for ranks in reward_fails.values():
        assert ranks == [f"{expected}question train-14"] * len(ranks)


@case(worlds=(1,))
def engine_calls(folder):
    """What the engine and the optimizers are called for, in an RL step and in an SFT step."""
    run = open_run(folder / "sleeps", questions=16, probe_bound=1e9, rl_clip=0.7, sft_clip=0.3)
    calls = []

    class Noted(FixedSampler):
        def __getattribute__(self, name):
            if name in ("push", "sample", "sleep"):
                calls.append(name)
            return super().__getattribute__(name)

    run.sampler = Noted()
    with pytest.MonkeyPatch.context() as patch:
        step = lambda run, which, clip, loss: calls.append(f"{which} step, clipped to {clip}")
        patch.setattr(mifo, "optimizer_step", step)
        mifo.rl_step(run)
        mifo.begin_sft(run, [0])
        mifo.sft_step(run)
    return calls


def test_the_engine_sleeps_while_the_trainer_works(engine_calls):
    rl, sft = "rl step, clipped to 0.7", "sft step, clipped to 0.3"
    assert engine_calls[1] == [["push", "sample", "sample", "sleep", rl, "sleep", "sleep", sft]]


@case(worlds=(1,))
def graphs_of_an_rl_step(folder):
    """Of each of the policy's passes in an RL step of two updates, whether it keeps a graph."""
    with fixed_samplers():
        run = open_run(folder / "graphs", questions=16, probe_bound=1e9, updates=2)
    forward, kept = mifo.Policy.forward, []

    def noted_forward(self, *args):
        found = forward(self, *args)
        kept.append(found[0].requires_grad)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mifo.Policy, "forward", noted_forward)
        patch.setattr(mifo, "push_weights", lambda run: None)  # which probes the engine
        mifo.rl_step(run)
    return kept


def test_old_logprobs_are_found_without_a_graph(graphs_of_an_rl_step):
    [kept] = graphs_of_an_rl_step[1]
    updates = kept.count(True)
    assert updates >= 2 and kept == [False] * (len(kept) - updates) + [True] * updates
    assert len(kept) > updates


@case(worlds=(1,))
def memory_returned(folder):
    """When cached memory is given back to the GPU, and when each optimizer steps."""
    run, calls = open_run(folder / "returned"), []
    for which, optimizer in run.optimizers.items():
        optimizer.register_step_pre_hook(lambda *step, which=which: calls.append(which))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "empty_cache", lambda: calls.append("returned"))
        for which in ("rl", "sft", "rl", "sft"):
            for p in run.policy.parameters():
                p.grad = torch.ones_like(p)
            mifo.optimizer_step(run, which, 1.0, 0.0)
    return calls


def test_memory_is_returned_before_an_optimizers_first_step(memory_returned):
    assert memory_returned[1] == [["returned", "rl", "returned", "sft", "rl", "sft"]]


@case(worlds=(1,))
def shares_of_updates(folder):
    """(tokens, advantage) of the responses of each of an RL step's two updates."""
    run = open_run(folder / "shares", questions=4, samples=2, updates=2)
    run.sampler = FixedSampler()
    shares = []

    def answers(run, questions):
        responses = []
        for i, reward in enumerate([0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0]):
            responses.append(rewarded_response(questions[i // 2].prompt, i, reward))
        return responses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mifo, "push_weights", lambda run: None)
        patch.setattr(mifo, "sample", answers)
        patch.setattr(mifo, "find_old_logprobs", lambda *rest: None)
        note = lambda run, part: shares.append([(r.tokens[0], r.advantage) for r in part])
        patch.setattr(mifo, "rl_update", note)
        mifo.rl_step(run)
    return shares


def test_each_update_has_its_share_of_the_questions_with_their_advantages(shares_of_updates):
    first = [(0, -0.5), (1, 0.5), (2, 0.0), (3, 0.0)]
    second = [(4, 0.5), (5, -0.5), (6, 0.5), (7, -0.5)]
    assert shares_of_updates[1] == [[first, second]]


@case(worlds=(1,))
def sft_queues(folder):
    """What two SFT phases on five demonstrations queue, and the state after them."""
    run, queues = open_run(folder / "queues", seed=1, sft_batch=2, sft_epochs=2), []
    for _ in range(2):
        mifo.begin_sft(run, [4, 7, 1, 9, 12])
        queues.append(run.state.sft_queue)
        run.state.sft_queue = []
    return queues, run.state.sft_phases, run.state.demonstrations


def test_an_sft_phase_queues_its_epochs_each_in_an_order_of_its_own(sft_queues):
    [(queues, phases, used)] = sft_queues[1]
    indices = [4, 7, 1, 9, 12]
    assert phases == 2 and used == indices * 2
    orders = []
    for phase, queue in enumerate(queues):
        assert [len(batch) for batch in queue] == [2, 2, 1, 2, 2, 1]
        generator = torch.Generator().manual_seed(1_000_003 + phase)
        for epoch in (queue[:3], queue[3:]):
            expected = [indices[i] for i in torch.randperm(5, generator=generator).tolist()]
            assert sum(epoch, []) == expected
            orders.append(tuple(expected))
    assert len(set(orders)) == 4


@case(worlds=(1,))
def behavior_held(folder):
    """After each step of SFT then RL: its number, and whether PEAR's behaviour model is held."""
    run = open_run(folder / "held", schedule="sft-then-rl", pear="token", steps=1, sft_batch=16)
    held = []
    with pytest.MonkeyPatch.context() as patch:
        note = lambda run, phase: held.append((run.state.step, phase, bool(run.behavior)))
        patch.setattr(mifo, "log_step", note)
        patch.setattr(mifo, "save_checkpoint", lambda run: None)
        mifo.train(run)
    return held


def test_the_behavior_model_is_freed_when_the_sft_stage_ends(behavior_held):
    assert behavior_held[1] == [[(1, "sft", True), (2, "sft", False), (3, "rl", False)]]


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
    hard = [index for index in data.draw(16, 0, 0, 16) if never_solved(questions[index].answer)]
    kept = dict.fromkeys(last["demonstrations"] + last["buffer"])
    assert hard and [index for index in kept if index in hard] == hard


# --------------------------------------------------------------------------------------------------
# Checkpoints


def main_killed_at(argv: list[str], step: int, samplers: str = "") -> int:
    """In a rank's process: mifo.py's main(), killed before the optimizer step of the given step."""
    sys.argv = argv
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
    code = mifo.main()
    if samplers:
        run_samplers(made[0], Path(samplers))
    return code


def check_kill_and_resume(folder: Path, world: int, samplers="", **settings) -> None:
    """A run that is killed in an RL step and inside an SFT phase ends as if it had not been."""
    make_folder(folder)

    def launch(out, *more, step=-1, samplers=""):
        evaluate = dict(evaluate="sums", eval_every=2, eval_sft_phases=True)
        chosen = COMMON | dict(save_every=2) | evaluate | settings
        argv = [
            "mifo.py",
            *as_flags(recipe=folder / "empty.toml", out=folder / out, **chosen),
            *more,
        ]
        codes = finish(start(folder, world, main_killed_at, argv, step, samplers))
        expected = (0,) if step < 0 else (-signal.SIGKILL, 1)
        assert all(code in expected for code in codes), (codes, outputs(folder, world))
        assert step < 0 or -signal.SIGKILL in codes

    (folder / "straight").mkdir()  # a run left it that had not ended its first step
    (folder / "straight" / "movement.jsonl").write_text('{"step": 1}\n')
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
    weights = "model/model.safetensors"
    assert (straight[-1] / weights).read_bytes() == (killed[-1] / weights).read_bytes()
    a, b = checkpoint_tensors(straight[-1]), checkpoint_tensors(killed[-1])
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert of_kind(a, "rl/exp_avg/")
    a, b = checkpoint_state(straight[-1]), checkpoint_state(killed[-1])
    assert a | {"seconds": 0} == b | {"seconds": 0}
    for name in mifo.LOGS[1:]:
        logs = folder / "straight" / name, folder / "killed" / name
        assert logs[0].exists() == logs[1].exists() == (name != "holdout.jsonl")
        assert not logs[0].exists() or logs[0].read_text() == logs[1].read_text()
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
        sums = line["benches"]["sums"]
        assert sums["avg"] == pytest.approx(sum(sums["correct"]) / len(sums["correct"]))


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


# fmt: off
@pytest.mark.parametrize("generation, ends, dtype", [
    # generation_config.json (None: absent), and what then ends a response beside token 1
    ({"eos_token_id": 9}, [1, 9], torch.bfloat16),
    ({"eos_token_id": [9, 4], "do_sample": True, "top_k": 20}, [1, 4, 9], torch.float32),
    ({"eos_token_id": [1], "pad_token_id": 1}, [1], torch.bfloat16),
    ({"temperature": 0.6, "top_p": 0.9, "eos_token_id": 9, "pad_token_id": -1}, [1, 9], torch.float32),
    ({"eos_token_id": None, "_from_model_config": True}, [1], torch.float32),
    (None, [1], torch.bfloat16),
])
# fmt: on
def test_an_exported_model_is_what_training_used(generation, ends, dtype, tmp_path):
    tokenizer = bpe_tokenizer()
    tokenizer.eos_token, tokenizer.model_max_length = "<|im_start|>", 64  # token 1
    source, out = tmp_path / "source", tmp_path / "out"
    tiny_model(source, 3, tokenizer)
    config = json.loads((source / "config.json").read_text()) | {"eos_token_id": 7}
    (source / "config.json").write_text(json.dumps(config))
    (source / "generation_config.json").unlink()
    if generation is not None:
        (source / "generation_config.json").write_text(json.dumps(generation))
    edited = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}
    edited["max_position_embeddings"] = 512
    model = transformers.AutoModelForCausalLM.from_pretrained(source, **edited)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    run = types.SimpleNamespace(
        policy=mifo.Policy(model),
        tokenizer=tokenizer,
        eos_ids=evaluation.eos_ids(str(source), tokenizer),
        dtype=dtype,
        cfg=mifo.Config(max_position_embeddings=512),
    )
    assert run.eos_ids == ends
    weights = {name: p.detach().to(dtype) for name, p in model.named_parameters()}
    for _ in range(2):  # a run saves more than once
        mifo.save_model(run, out, weights)
    assert model.dtype == torch.float32
    config, written = (json.loads((out / f"{x}config.json").read_text()) for x in ("", "generation_"))
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert config["max_position_embeddings"] == 512
    assert config["rope_parameters"]["rope_theta"] == 5e4
    assert evaluation.eos_ids(str(out), tokenizer) == written["eos_token_id"] == ends
    assert not written.get("_from_model_config")  # else transformers makes it anew
    kept = {k: v for k, v in (generation or {}).items() if k != "eos_token_id" and k[0] != "_"}
    assert kept.items() <= written.items()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert loaded.dtype == dtype and loaded.config.max_position_embeddings == 512
    for name, p in loaded.named_parameters():
        assert torch.equal(p, weights[name])
    other = transformers.AutoTokenizer.from_pretrained(out)
    assert data.tokenizer_state(other) == data.tokenizer_state(tokenizer)
    assert other.chat_template == CHAT_TEMPLATE and other.model_max_length == 512
    check_vllms_reading(out, ends)
    if len(ends) < 3:
        return
    torch.manual_seed(0)
    asked = {"do_sample": True, "max_new_tokens": 99, "temperature": 3.0, "top_k": 0}
    rows = loaded.generate(torch.full((64, 1), 5), pad_token_id=0, **asked)[:, 1:].tolist()
    last = Counter()
    for row in rows:
        stops = [i for i, token in enumerate(row) if token in ends]
        if stops:
            last[row[stops[0]]] += 1
            assert set(row[stops[0] + 1 :]) <= {0}
    assert set(last) == set(ends)


def check_vllms_reading(folder: Path, ends: list[int]) -> None:
    """What vllm.LLM(folder) takes from the files, without starting an engine."""
    if rollout.vllm_problem():
        return
    import vllm
    from vllm.config import ModelConfig

    known = vllm.ModelRegistry.models["Qwen2ForCausalLM"]
    vllm.ModelRegistry.register_model("Qwen2ForCausalLM", known.load_model_cls())
    config = ModelConfig(str(folder))
    assert config.max_model_len == 512
    params = vllm.SamplingParams()
    params.update_from_generation_config(config.try_get_generation_config(), ends[0])
    assert sorted({ends[0], *params.stop_token_ids}) == ends


def test_a_run_keeps_the_day_on_which_it_began(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(dist, "barrier", lambda: None)
    run, again = (mifo.Config(out=str(tmp_path), resume=resume) for resume in (False, True))
    (tmp_path / "date").write_text("2024-02-29")
    assert mifo.first_day(again) == datetime.date(2024, 2, 29)
    assert mifo.first_day(run) == datetime.date.today() == mifo.first_day(again)
    (tmp_path / "date").unlink()  # of a run by an older mifo.py
    assert mifo.first_day(again) == datetime.date.today() == mifo.first_day(again)


@case()
def dated_prompts(folder):
    """Of a run and of its resumption a day later: the prompts it trains and is evaluated on."""
    dist.init_process_group("gloo")
    if os.environ["RANK"] == "0":
        tiny_model(folder / "dated", 0, dated_tokenizer(), initializer_range=0.02)
        write_rows(folder / "dated.jsonl", [{"question": "1+1?", "answer": "2"}])
    dist.barrier()
    found, rows = [], str(folder / "dated.jsonl")
    settings = dict(model=folder / "dated", data=rows, evaluate=rows, schedule="rl", max_prompt=80)
    for resume in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if resume or os.environ["RANK"] == "1":  # where midnight may have passed already
                patch.setattr(datetime, "date", Tomorrow)
            run = open_run(folder / "dated-run", resume=resume, **settings)
        for questions in (run.questions, run.benches[rows]):
            found.append(run.tokenizer.decode(questions[0].prompt))
    return found


def test_a_resumed_run_has_the_prompts_it_began_with(dated_prompts):
    for ranks in dated_prompts.values():
        prompts = sum(ranks, [])
        assert len(prompts) == 4 * len(ranks) and len(set(prompts)) == 1
        assert re.match(r"\d\d [A-Z][a-z]{2} 20\d\d, 00:00\n", prompts[0])


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
    found = from_one_rank_to_two if after == 2 else from_two_ranks_to_one
    out = found[after][0]
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
# Pictures and trackers

# fmt: off
PLACES = {  # parameters as several architectures name them -> (layer, kind)
    "model.layers.3.self_attn.q_proj.weight": ("model.layers.3", "self_attn.q_proj"),
    "model.layers.12.self_attn.q_proj.bias": ("model.layers.12", "self_attn.q_proj.bias"),
    "model.layers.0.mlp.experts.17.up_proj.weight": ("model.layers.0", "mlp.experts.*.up_proj"),
    "transformer.h.5.ln_1.weight": ("transformer.h.5", "ln_1"),
    "model.language_model.layers.1.mlp.experts.gate_up_proj":
        ("model.language_model.layers.1", "mlp.experts.gate_up_proj"),
    "model.embed_tokens.weight": ("model.embed_tokens", ""),
    "lm_head.weight": ("lm_head", ""),
    "model.norm.bias": ("model.norm.bias", ""),
}
# fmt: on


def test_parameters_are_placed_by_layer_and_kind():
    assert {name: mifo.place_of(name) for name in PLACES} == PLACES


@pytest.mark.parametrize("world", [1, 2])
def test_shown_demonstrations_are_the_first_that_a_phase_learns(mifo_run, world):
    """Entropy and choice from the weights where the phase began; with what its first step logs."""
    out = mifo_run[world][0]
    lines, metrics = json_lines(out / "demonstrations.jsonl"), metrics_of(out)
    questions, tokenizer = sixteen_questions(), data.embedded_tokenizer()
    phases = sft_phases(out)
    assert len(lines) >= 2 * len(phases) >= 4
    for number, (first, *_) in enumerate(phases):
        state = checkpoint_state(first)
        batch = state["sft_queue"][0]
        shown = lines[2 * number : 2 * number + 2]
        assert len(batch) == 2 and [line["step"] for line in shown] == [state["step"]] * 2
        model, every, taken, nll = float_model(first / "model"), [], [], 0.0
        for line, index in zip(shown, batch):
            q = questions[index]
            n = len(q.demonstration)
            with torch.no_grad():
                logprobs, entropy = response_logprobs(model, q.prompt, q.demonstration)
            chosen = sorted(range(n), key=lambda i: -entropy[i].item())[: math.ceil(0.2 * n - 1e-9)]
            assert line["id"] == q.id and line["all_tokens"] == n
            assert [i for i in range(n) if line["chosen"][i]] == sorted(chosen)
            assert line["all_chosen"] == len(chosen)
            assert line["entropy"] == pytest.approx(entropy.tolist(), abs=1e-4)
            assert "".join(line["texts"]) == tokenizer.decode(q.demonstration)
            every += entropy.tolist()
            taken += entropy[chosen].tolist()
            nll -= logprobs.sum().item()
        step = metrics[state["step"]]
        assert step["phase"] == "sft" and step["step"] == state["step"] + 1
        assert step["sft/entropy"] == pytest.approx(np.mean(every), rel=1e-5)
        assert step["sft/chosen_entropy"] == pytest.approx(np.mean(taken), rel=1e-5)
        assert step["sft/nll"] == pytest.approx(nll / len(every), rel=1e-5)


def test_a_character_of_several_tokens_is_shown_at_its_last():
    tokenizer = bpe_tokenizer()
    texts = "né €: 漢字 \U0001f642\n<|im_end|>\ufffd!"
    tokens = tokenizer(texts, add_special_tokens=False).input_ids
    shown = mifo.token_texts(tokenizer, tokens)
    assert len(shown) == len(tokens)
    assert "".join(text for text in shown if text != "·") == texts
    for (
        text
    ) in "é€漢字\U0001f642":  # each of its bytes is a token: none of them was in the training
        place = [text in piece for piece in shown].index(True)
        assert shown[place - 1] == "·", text
    assert "<|im_end|>" in shown
    # Bytes that are no text at all hide no token and end.
    rng = random.Random(0)
    noise = rng.choices(range(len(tokenizer)), k=300)
    shown = mifo.token_texts(tokenizer, noise)
    assert len(shown) == 300 and max(map(len, "".join(shown).split("·"))) > 3
    longest = max(len(list(run)) for dot, run in itertools.groupby(shown, "·".__eq__) if dot)
    assert longest <= 3


def test_words_keep_the_space_before_them():
    """Where a decoder drops the first word's, as SentencePiece's does."""
    raw = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "c": 2}, unk_token="c"))
    raw.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    assert mifo.token_texts(tokenizer, [0, 1, 2, 0]) == ["a", " b", "c", " a"]


@pytest.mark.parametrize("variant", ["token", "block", "sequence"])
def test_pears_shares_at_floor_and_cap(variant):
    logprobs, behavior, mask = pear_rows()
    cfg = mifo.Config(pear=variant, pear_weight_low=-0.25, pear_weight_high=0.15, pear_gamma=0.9)
    settings = (variant, cfg.pear_gamma, cfg.pear_block, (-0.08, 0.3))
    free = pear_oracle_of_rows(logprobs, behavior, mask, *settings, None)[mask].log()
    weights = mifo.pear_weights(cfg, logprobs, behavior, mask)
    tokens = 3 * int(mask.sum())  # of the whole step
    shares = mifo.pear_shares(cfg, weights, mask, tokens)
    assert shares["pear_weight"] == pytest.approx(
        free.clamp(-0.25, 0.15).exp().sum().item() / tokens
    )
    low, high = ((free < -0.25).sum().item(), (free > 0.15).sum().item())
    assert (shares["pear_at_floor"], shares["pear_at_cap"]) == (low / tokens, high / tokens)
    assert 0 < low < low + high < len(free)
    cfg = dataclasses.replace(cfg, pear_weight_low=-math.inf, pear_weight_high=math.inf)
    shares = mifo.pear_shares(cfg, free.exp()[None], torch.ones(1, len(free)).bool(), tokens)
    assert (shares["pear_at_floor"], shares["pear_at_cap"]) == (0, 0)


class Page(html.parser.HTMLParser):
    """What a page shows of tokens: (text, title, whether it is marked)."""

    def __init__(self, text: str):
        super().__init__()
        self.tokens, self.tags, self.inside = [], set(), None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag in ("b", "span"):
            self.inside = ["", dict(attributes)["title"], tag == "b"]

    def handle_data(self, text):
        if self.inside:
            self.inside[0] += text

    def handle_endtag(self, tag):
        if tag in ("b", "span"):
            self.tokens.append(tuple(self.inside))
            self.inside = None


HOSTILE = [
    "<script>alert(1)</script>",
    "$\\frac{",
    "$x^$",
    "&amp;",
    '"',
    "\n",
    "\x00",
    "\u202e",
    "漢",
]


def pictured_run(folder: Path) -> Path:
    """A run's folder with what pictures are drawn from, hostile texts included."""
    compare_run(folder, COMPARED, seed=0, eval_k=1)
    lines = []
    for rl_steps in range(1, 11):
        line = {"step": rl_steps, "phase": "rl", "rl_steps": rl_steps, "rl/entropy": 0.1 * rl_steps}
        lines.append(line | {"reward": 0.5, "engine/mean_difference": 1e-6})
    write_lines(folder / "metrics.jsonl", lines)
    place = {"entries": 8, "frozen": 0.5, "moved": 1e-4}
    layers = {f"model.layers.{i}": {"q": place, "$k$": place | {"moved": 0.0}} for i in range(3)}
    layers |= {"model.layers.3": {"other": place}, "lm_head": {"": place}}
    kinds = ("rl", "sft", "rl")
    numbered = [{"step": 4, "rl_steps": 4, "sft_phases": 0, "phase": kind} for kind in kinds]
    write_lines(folder / "movement.jsonl", [line | {"layers": layers} for line in numbered])
    texts = HOSTILE * 50
    line = {"step": 4, "rl_steps": 4, "sft_phases": 0, "id": "<b>$", "texts": texts}
    line |= {"all_tokens": 1000, "all_chosen": 300, "chosen": [1, 0, 0] * 150}
    old = line | {"step": 1, "texts": ["old"] * len(texts)}
    shown = line | {"entropy": [i / 450 for i in range(450)]}
    write_lines(folder / "demonstrations.jsonl", [old | {"entropy": [9.0] * 450}, shown, shown])
    return folder


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


PICTURES = ("plot.png", "frozen.png", "demonstrations.png", "forgetting.png")


def test_pictures_are_redrawn_from_a_folder(tmp_path, monkeypatch, capsys):
    from matplotlib import pyplot as plt

    run = pictured_run(tmp_path / "run")
    compare_main(monkeypatch, run, "--redraw")
    said = capsys.readouterr().out
    assert "warning" not in said and all(str(run / name) in said for name in PICTURES)
    assert all(plt_image(run / name) for name in PICTURES)
    assert not list(run.glob("*.part*"))
    held = [(0, 0, 2.0), (3, 0, 1.0), (4, 1, 1.01), (8, 1, 1.5)]
    lines = [{"step": n, "rl_steps": n // 8, "sft_phases": k, "nll": x} for n, k, x in held]
    write_lines(run / "holdout.jsonl", lines)
    width = plt.imread(run / "plot.png").shape[1]
    pictures.draw(run)
    assert plt.imread(run / "plot.png").shape[1] > 1.3 * width
    assert "warning" not in capsys.readouterr().out
    assert [line["nll"] for line in pictures.of_stage(lines)] == [2.0, 1.0, 1.01]
    assert pictures.of_stage(lines[:2]) == []
    text = (run / "demonstrations.html").read_text()
    page = Page(text)
    assert page.tags == {"meta", "title", "style", "h1", "h2", "p", "b", "span"}
    assert "http" not in text and "&lt;b&gt;$: 300 of 1000 tokens" in text and "550 more" in text
    visible = [*HOSTILE[:5], "↵\n", "\\x00", "\\u202e", "漢"]
    assert [text for text, _, _ in page.tokens] == visible * 100
    assert [marked for *_, marked in page.tokens] == [True, False, False] * 300
    assert page.tokens[449][1] == "1.00"


def test_a_run_draws_what_it_has_and_a_damaged_log_costs_one_picture(tmp_path, monkeypatch, capsys):
    run = pictured_run(tmp_path / "run")
    (run / "movement.jsonl").unlink()  # as with --freeze off
    (run / "demonstrations.jsonl").write_text("{")
    write_lines(run / "evaluations.jsonl", [])  # as without --evaluate
    pictures.draw(run)
    said = capsys.readouterr().out
    assert said.startswith("warning: draw_demonstrations: ") and said.count("\n") == 1
    assert sorted(path.name for path in run.glob("*.png")) == ["plot.png"]
    with pytest.raises(SystemExit) as stop:
        compare_main(monkeypatch, tmp_path, "--redraw")
    assert stop.value.code == 2 and "metrics.jsonl" in capsys.readouterr().err


def test_an_sft_phase_that_has_not_ended_is_pictured_by_rl_alone(tmp_path):
    run = pictured_run(tmp_path / "run")
    lines = json_lines(run / "movement.jsonl")
    for place in lines[0]["layers"]["model.layers.0"].values():
        place |= {"frozen": 0.0, "moved": 0.0}
    nothing = json.loads(json.dumps(lines[0]).replace("0.0001", "0.0").replace("0.5", "0.0"))
    for kept in (lines[:1], [nothing]):
        write_lines(run / "movement.jsonl", kept)
        pictures.draw_frozen(run)
        assert plt_image(run / "frozen.png")
        (run / "frozen.png").unlink()


def test_what_an_sft_phase_changed_by_hand(tmp_path):
    """Of COMPARED's five answers: of four right ones two stay, and one of the others becomes right;
    then of three one stays."""
    run = pictured_run(tmp_path / "run")
    first, second = pictures.around_sft_phases(run)
    assert (first["number"], second["number"]) == (1, 2)
    assert (first["lost"], first["gained"]) == pytest.approx((2 / 5, 1 / 5))
    assert (second["lost"], second["gained"]) == pytest.approx((2 / 5, 0))
    assert (first["before"], first["after"]) == ({"a": 1, "b": 0.5}, {"a": 1 / 3, "b": 1})
    assert first["entropy"] == pytest.approx([0.4, 0.5])
    assert second["entropy"][0] == pytest.approx(1.0) and math.isnan(second["entropy"][1])
    # of several answers a question, those that stay right are at least as many as are right still
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"eval_k": 4}))
    assert pictures.around_sft_phases(run)[0]["lost"] == pytest.approx(2 / 20)


def tracked_run(out: Path, package: str) -> types.SimpleNamespace:
    """As much of a run as a tracker needs."""
    out.mkdir(exist_ok=True)
    cfg = mifo.Config(track=package, out=str(out))
    return types.SimpleNamespace(cfg=cfg, tracker=mifo.open_tracker(cfg))


TRACKED = [  # lines of metrics.jsonl, and what a tracker gets of them
    (
        {"step": 1, "phase": "rl", "reward": 0.25, "evaluation": {"sums": 0.5, "sums 3": 1.0}},
        {"step": 1, "reward": 0.25, "evaluation/sums": 0.5, "evaluation/sums 3": 1.0},
    ),
    ({"step": 2, "phase": "sft", "sft/loss": math.nan}, {"step": 2, "sft/loss": math.nan}),
]

PACKAGE = """
import json, pathlib

class Run:
    def __init__(self, out): self.out = out
    def note(self, *call): self.out.open("a").write(json.dumps(call) + chr(10))
    def log(self, numbers, step): self.note("log", numbers, step)
    def finish(self): self.note("finish")

def init(project, name, resume, config, id=None, dir=None):
    if config["seed"] == 13: raise RuntimeError("no key")
    run = Run(pathlib.Path(config["out"], "calls"))
    run.note("init", project, name, resume, id, dir)
    return run
"""


@pytest.mark.parametrize("package", ["trackio", "wandb"])
def test_a_tracker_gets_what_metrics_get_and_goes_on_when_resumed(
    package, tmp_path, monkeypatch, capsys
):
    (tmp_path / f"{package}.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert mifo.parse_config([f"--track={package}"]).track == package
    for _ in range(2):
        run = tracked_run(tmp_path / "out", package)
        for line, _ in TRACKED:
            mifo.track(run, line)
        mifo.close_tracker(run)
    calls = json_lines(tmp_path / "out" / "calls")
    assert calls[:4] == calls[4:]
    [kind, project, name, resume, key, folder], *logged, last = calls[:4]
    assert (kind, project, resume, last) == ("init", "mifo", "allow", ["finish"])
    assert re.fullmatch("out-[0-9a-f]{8}", name)
    assert (key, folder) == (
        (name[-8:], str(tmp_path / "out")) if package == "wandb" else (None,) * 2
    )
    for call, (line, expected) in zip(logged, TRACKED):
        assert repr(call) == repr(["log", expected, line["step"]])  # NaN is not equal to itself
    # What it raises is said, before the run an error, within it a warning.
    cfg = mifo.Config(track=package, out=str(tmp_path / "out"), seed=13)
    with pytest.raises(ValueError, match=f"--track {package}: RuntimeError: no key"):
        mifo.open_tracker(cfg)
    run.tracker.log = lambda *args, **more: 1 / 0
    mifo.track(run, TRACKED[0][0])
    assert run.tracker is None and "warning: --track" in capsys.readouterr().out
    mifo.close_tracker(run)
    monkeypatch.setenv("RANK", "1")
    assert mifo.open_tracker(cfg) is None


def test_tensorboard_gets_what_metrics_get(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("RANK", "0")
    run = tracked_run(tmp_path / "out", "tensorboard")
    for line, _ in TRACKED:
        mifo.track(run, line)
    mifo.close_tracker(run)
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found.setdefault(event.step, {})[name] = event.value
    assert repr([found[1][k] for k in TRACKED[0][1]]) == repr(
        list(map(float, TRACKED[0][1].values()))
    )
    assert found[2].keys() == TRACKED[1][1].keys()


def test_a_tracker_that_is_not_installed_is_refused_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for package in ("tensorboard", "wandb", "trackio"):
        monkeypatch.delitem(sys.modules, package, raising=False)
        (tmp_path / package).mkdir()  # as wandb leaves it in the folder it ran in: no package
        named = f"--track {package}: the package {package} is not installed: pip install {package}"
        check_refused([f"--track={package}"], named, monkeypatch)


# --------------------------------------------------------------------------------------------------
# Samplers

PROMPTS = [random.Random(i).choices(range(2, 27), k=k) for i, k in enumerate((3, 9, 1, 9, 14, 5))]
SEEDS = [1000 * i for i in range(6)]


def run_samplers(engine, out: Path) -> None:
    """Both samplers with pushed weights on the same prompts; results and weights go to `out`."""
    base = out.parent / "sums-base-0"
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


@case()
def bfloat16_checkpoint(folder):
    run = open_run(folder / "bfloat16", dtype="bfloat16")
    mifo.save_checkpoint(run)
    return checkpoints_of(folder / "bfloat16")[-1] / "model"


def test_a_checkpoint_names_the_type_of_its_weights_and_nothing_else_is_new(
    bfloat16_checkpoint, base
):
    for [folder, *_] in bfloat16_checkpoint.values():
        before, after = (json.loads((f / "config.json").read_text()) for f in (base, folder))
        assert before.pop("dtype") == "float32" and after.pop("dtype") == "bfloat16"
        assert before == after
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}


@case(worlds=(1,))
def seeds_of_runs(folder):
    """By --seed: the seeds that the sampler is given in two RL steps, with an SFT phase of MIFO."""
    found = {}
    for seed in (0, 1, 2**23, 20240101, 2**31, 2**40, 2**80):
        base = folder / f"sums-base-{seed}"
        if not base.exists():
            shutil.copytree(folder / "sums-base-0", base)
        settings = dict(seed=seed, steps=2, buffer_size=2)
        run = open_run(folder / f"seed-{seed}", **settings)
        given, sample = [], run.sampler.sample
        run.sampler.sample = lambda *args, given=given, sample=sample: (
            given.append(args) or sample(*args)
        )
        mifo.train(run)
        found[seed] = [seeds for _, n, seeds, *_ in given if n == run.cfg.samples]
    return found


def test_any_seed_runs_and_is_a_run_of_its_own(seeds_of_runs):
    [found] = seeds_of_runs[1]
    given = []
    for seed, steps in found.items():
        assert [len(seeds) for seeds in steps] == [4, 4], seed
        given += sum(steps, [])
    assert len({seed + j for seed in given for j in range(4)}) == 4 * len(given)
    assert all(0 <= seed < 2**31 for seed in given)  # as many bits as a CPU's generators take


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


def test_torch_sampler_writes_as_many_rows_at_once_as_a_gpu_has_room_for(tmp_path, monkeypatch):
    base, length, caches = tiny_model(tmp_path / "model", 3), 60, []
    make = rollout._make_cache
    monkeypatch.setattr(rollout, "_make_cache", lambda c: caches.append(make(c)) or caches[-1])
    settings = dict(max_len=length, dtype=torch.float32, eos_ids=[99], max_num_seqs=7)
    sampler = rollout.make_sampler("torch", base, **settings)
    sizes = []
    for prompt in (1, 20, 41, 59):
        sampler.sample([[2] * prompt], 1, [0], length - prompt, 1.0)
        rooms = [room for layer in caches[-1].layers for room in layer.rooms]
        sizes.append(sum(room.nbytes for room in rooms))
    row = rollout.cache_bytes(sampler.model.config, length, torch.float32)
    assert 0.8 * row < max(sizes) <= row
    assert 2 * rollout.cache_bytes(sampler.model.config, length, torch.bfloat16) == row
    sampler.device = "cuda:0"
    for rows_free, written in ((0, 1), (2.4, 1), (2.6, 2), (100, 7)):
        free = int(rows_free * row), 0
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: free)
        assert sampler._rows() == written


def test_the_global_generators_are_put_back_even_if_the_engine_fails():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with pytest.raises(MemoryError), rollout._global_rng_untouched():
        random.random(), np.random.rand(), torch.rand(1)
        raise MemoryError
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert after == before


# --------------------------------------------------------------------------------------------------
# Architectures: tiny random models, whose heads are scaled up so that a missed scale or cap shows

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    moe_intermediate_size=24,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=None,
)
DEEPSEEK = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8)
DEEPSEEK |= dict(v_head_dim=8, n_group=2, topk_group=1, num_key_value_heads=4)
ARCHITECTURES = {  # model type -> what a tiny one needs beside SIZES
    "apertus": {},
    "arcee": {},
    "bloom": {},
    "cohere": dict(logit_scale=0.25),
    "cohere2": dict(logit_scale=0.25, sliding_window=4),
    "deepseek_v3": DEEPSEEK,
    "ernie4_5": {},
    "exaone4": dict(sliding_window=4),
    "falcon": {},
    "gemma": {},
    "gemma2": dict(final_logit_softcapping=5.0, sliding_window=4),
    "gemma3_text": dict(sliding_window=4),
    "glm": {},
    "glm4": {},
    "glm4_moe": dict(n_group=2, topk_group=1, first_k_dense_replace=1),
    "gpt2": dict(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3),
    "gpt_bigcode": {},
    "gpt_neox": dict(hidden_dropout=0.3),
    "gpt_oss": dict(sliding_window=4),
    "granite": dict(logits_scaling=0.25),
    "granitemoe": dict(logits_scaling=0.25),
    "helium": {},
    "hunyuan_v1_dense": {},
    "hyperclovax": dict(logits_scaling=3.0),
    "llama": {},
    "mistral": dict(sliding_window=4),
    "mixtral": dict(router_jitter_noise=0.3),
    "nanochat": dict(final_logit_softcapping=5.0),
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": dict(sliding_window=4),
    "olmoe": {},
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32, dropout=0.3, layerdrop=0.3),
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen2_moe": dict(shared_expert_intermediate_size=24),
    "qwen3": {},
    "qwen3_moe": {},
    "seed_oss": dict(attention_dropout=0.3, residual_dropout=0.3),
    "smollm3": {},
    "stablelm": {},
    "starcoder2": dict(residual_dropout=0.3, embedding_dropout=0.3),
}
HEAD_OF = {  # scale and cap of the logits, where they are not 1 and none
    "cohere": (0.25, None),
    "cohere2": (0.25, None),
    "gemma2": (1.0, 5.0),
    "granite": (4.0, None),  # logits_scaling divides
    "granitemoe": (4.0, None),
    "hyperclovax": (3.0, None),  # here it multiplies
    "nanochat": (1.0, 5.0),
}
ON_TWO_RANKS = ("gemma2", "gpt2", "granitemoe", "opt", "phi")


def tiny_architecture(folder: Path, kind: str, **settings) -> tuple:
    """The model, and the folder where it lies."""
    known = transformers.AutoConfig.for_model(kind)
    sizes = {name: value for name, value in SIZES.items() if hasattr(known, name)}
    if kind == "falcon":  # its head size follows from the others
        del sizes["head_dim"]
    config = transformers.AutoConfig.for_model(kind, **(sizes | settings))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        for name, buffer in model.named_buffers():  # a trained one's balances its experts
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer))
        model.get_output_embeddings().weight.mul_(8)
    model.save_pretrained(folder / kind)  # by rank 0 alone
    dist.barrier()
    return model.eval(), str(folder / kind)


def load_tiny(folder: str, **settings) -> mifo.Policy:
    cfg = mifo.Config(**settings)
    config = transformers.AutoConfig.from_pretrained(folder)
    mesh = mifo.make_mesh(cfg, "cpu", int(os.environ["WORLD_SIZE"]))
    return mifo.load_policy(cfg, folder, config, mesh, torch.float32)


def process_group() -> None:
    dist.is_initialized() or dist.init_process_group("gloo")


def gradients_of(model) -> dict[str, torch.Tensor]:
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            found[name] = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
    return found


def train_and_sample(model, folder: str, activation_checkpointing: bool) -> dict:
    """Policy and full logits on padded rows; then a step, a push, and what the sampler samples."""
    found = {}
    policy = load_tiny(folder, activation_checkpointing=activation_checkpointing)
    tokens = torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(11) >= torch.tensor([[3], [5], [0]])
    mask &= torch.arange(11) < torch.tensor([[11], [8], [6]])
    upstream = randn(3, 11, seed=2, dtype=torch.float32)
    temperature = 0.8
    found["ours"] = policy(tokens, mask, temperature)
    (found["ours"][0] * upstream).sum().backward()
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    found["largest logit"] = logits.abs().max().item()
    logs = (logits / temperature).log_softmax(-1)
    logprobs = logs.gather(2, tokens[:, 1:, None])[..., 0] * mask
    found["full"] = logprobs, -(logs.exp() * logs).sum(-1) * mask
    (logprobs * upstream).sum().backward()
    found["gradients"] = gradients_of(policy.model), gradients_of(model)
    found = {name: detached(value) for name, value in found.items()}
    found["head"] = policy.scale, policy.softcap

    for p in policy.parameters():  # a step on shards; an optimizer's first on DTensors is slow
        if p.grad is not None:
            p.detach().to_local().sub_(p.grad.to_local().sign(), alpha=0.01)
    whole = dict(mifo.full_weights(policy, torch.float32))
    policy.model.save_pretrained(folder + "-trained", state_dict=whole)
    dist.barrier()
    trained = float_model(folder + "-trained", torch.float32).eval()
    sampler = rollout.make_sampler(
        "torch", folder, max_len=40, dtype=torch.float32, eos_ids=[1], max_num_seqs=4
    )
    sampler.push(whole.items())
    prompts = [[5, 9, 33], [7], [2, 60, 8, 8, 41]]
    groups = sampler.sample(prompts, 2, [0, 10, 20], 6, temperature)
    found["sampled"] = []
    for prompt, samples in zip(prompts, groups):
        for s in samples:
            logprobs, _ = response_logprobs(trained, prompt, s.tokens, temperature)
            found["sampled"].append((s.logprobs, logprobs.tolist()))
    return found


def detached(value):
    """Any nest of tensors, without the graph, so that it can be saved."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, tuple):
        return tuple(map(detached, value))
    return value


@case()
def architectures(folder):
    process_group()
    found = {}
    for i, kind in enumerate(ON_TWO_RANKS if dist.get_world_size() == 2 else ARCHITECTURES):
        try:
            model, path = tiny_architecture(folder, kind, **ARCHITECTURES[kind])
            found[kind] = train_and_sample(model, path, activation_checkpointing=i % 2 == 0)
        except Exception:
            found[kind] = traceback.format_exc()
    return found


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_architectures_train_on_their_own_logits(architectures, kind):
    for world in (1, 2) if kind in ON_TWO_RANKS else (1,):
        for found in architectures[world]:
            found = found[kind]
            assert not isinstance(found, str), found
            assert found["largest logit"] > 4
            for ours, full in zip(found["ours"], found["full"]):
                torch.testing.assert_close(ours, full, rtol=0, atol=1e-4)
            ours, full = found["gradients"]
            assert ours.keys() == full.keys()
            for name in full:
                torch.testing.assert_close(ours[name], full[name], rtol=1e-3, atol=2e-4, msg=name)
            for samplers, exported in found["sampled"]:  # after a step on the trainer's side
                assert samplers == pytest.approx(exported, abs=1e-4)
            scale, softcap = HEAD_OF.get(kind, (1.0, None))
            assert found["head"] == (pytest.approx(scale, rel=1e-6), softcap)


def activations_kept(policy, tokens, mask) -> tuple[int, dict[str, torch.Tensor]]:
    """Elements that a forward pass keeps for the backward pass, and the gradients of the latter."""
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs, _ = policy(tokens, mask, 1.0)
    logprobs.sum().backward()
    return sum(kept), gradients_of(policy.model)


@case()
def dropout(folder):
    process_group()
    tokens = torch.randint(61, (2, 30), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 29, dtype=torch.bool)
    found = {}
    for kind in ("gpt2", "seed_oss"):
        _, path = tiny_architecture(folder / "dropout", kind, **ARCHITECTURES[kind])
        policy = load_tiny(path)
        passes = [policy(tokens, mask, 1.0)[0].detach() for _ in range(2)]
        recomputing = load_tiny(path, activation_checkpointing=True)
        both = [activations_kept(p, tokens, mask) for p in (policy, recomputing)]
        found[kind] = passes, both
    return found


@pytest.mark.parametrize("kind", ["gpt2", "seed_oss"])
def test_dropout_is_off_in_training_with_activations_kept_or_recomputed(dropout, kind):
    for world in (1, 2):
        for found in dropout[world]:
            passes, ((kept, gradients), (kept_of_inputs, recomputed)) = found[kind]
            assert torch.equal(*passes)
            assert kept_of_inputs < 0.5 * kept
            torch.testing.assert_close(recomputed, gradients)


UNKNOWN_HEADS = {  # what makes Llama's logits instead -> the reason of the refusal
    "hidden states scaled": (lambda head, h: head(h / 1.2), "inputs are not its decoder's outputs"),
    "another norm": (lambda head, h: head(h - h.mean(-1, keepdim=True)), "decoder's outputs"),
    "clamped": (lambda head, h: head(h).clamp(-9, 9), "not its head's outputs"),
    "another cap": (lambda head, h: 9 * torch.atan(head(h) / 9), "not its head's outputs"),
    "fewer": (lambda head, h: head(h)[..., 1:], "not its head's outputs"),
    "some never": (
        lambda head, h: head(h).index_fill(-1, torch.tensor([3]), -1e9),
        "not its head's outputs",
    ),
    "broken": (lambda head, h: head(h * math.nan), "its logits are not finite"),
    "as it should be": (lambda head, h: head(h), ""),
}


def why_refused(folder: str) -> str:
    try:
        load_tiny(folder)
    except ValueError as error:
        return str(error)
    return ""


# In a process that does no more: a model that raises amid FSDP's exchange of weights, as these do,
# may leave it writing to memory that is no longer its own.
@case(late=True)
def refused_models(folder):
    process_group()
    found = {}
    _, path = tiny_architecture(folder / "refused", "llama")
    for name, (logits_of, _) in UNKNOWN_HEADS.items():

        def forward(self, input_ids, use_cache, logits_of=logits_of):
            hidden = self.model(input_ids=input_ids, use_cache=use_cache).last_hidden_state
            return types.SimpleNamespace(logits=logits_of(self.lm_head, hidden))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transformers.LlamaForCausalLM, "forward", forward)
            found[name] = why_refused(path)
    found["looks ahead"] = why_refused(tiny_architecture(folder, "bert-generation")[1])
    found["bert"] = why_refused(tiny_architecture(folder, "bert", is_decoder=True)[1])
    _, mamba = tiny_architecture(folder, "mamba")
    found["mamba"] = why_refused(mamba)
    try:
        rollout.make_sampler("torch", mamba, max_len=40, dtype=torch.float32, eos_ids=[1])
    except ValueError as error:
        found["mamba's sampler"] = str(error)
    return found


def test_models_that_the_policy_would_compute_otherwise_are_refused_in_a_line(refused_models):
    for found in [*refused_models[1], *refused_models[2]]:
        expected = {name: said for name, (_, said) in UNKNOWN_HEADS.items()}
        expected |= {
            "looks ahead": "depends on the tokens after it",
            "bert": "decoder's outputs",
            "mamba": "",
            "mamba's sampler": "--sampler torch cannot sample from MambaForCausalLM",
        }
        for name, said in expected.items():
            line = found[name]
            assert said in line and bool(said) == bool(line) and "\n" not in line, (name, line)
        clamped = found["clamped"]
        assert clamped.startswith("--model /") and "LlamaForCausalLM cannot be trained" in clamped


# --------------------------------------------------------------------------------------------------
# Real questions


@pytest.fixture(scope="session")
def gsm8k_model(tmp_path_factory):
    """48 real questions, those with the shortest solutions, and random models with a BPE tokenizer
    trained on them: a Qwen2, and a Qwen3 of four experts."""
    if not GSM8K.exists():
        pytest.skip(f"{GSM8K} is absent")
    folder = tmp_path_factory.mktemp("gsm8k")
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    rows = sorted(rows, key=lambda row: len(row["question"] + row["answer"]))[:48]
    write_rows(folder / "questions.jsonl", rows)
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [row["question"] + "\n" + row["answer"] for row in rows]
    inner.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>"
    )
    tiny_model(folder / "dense", 7, tokenizer, initializer_range=0.02)
    config = transformers.Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        initializer_range=0.05,
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder / "experts")
    tokenizer.save_pretrained(folder / "experts")
    return folder


@pytest.mark.parametrize(("model", "world"), [("experts", 1), ("dense", 2)])
def test_gsm8k_trains_through_vllm(gsm8k_model, model, world):
    needs_vllm()
    folder, out = gsm8k_model, gsm8k_model / f"run-{model}"
    flags = (
        "--sampler vllm --questions 4 --samples 4 --steps 2 --p 0.125 --max-prompt 120 "
        "--max-response 100 --buffer-size 4 --sft-batch 2 --kv-cache-gib 0.1 --max-num-seqs 16 "
        "--micro-tokens 600 --rl-lr 1e-3 --sft-lr 1e-3"
    ).split()
    flags += ["--model", folder / model, "--data", folder / "questions.jsonl", "--out", out]
    process = mifo_command(flags, folder, world)
    stdout, stderr = process.communicate(timeout=170)
    assert process.returncode == 0, (stdout[-1500:], stderr[-1500:])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["rl", "sft", "sft", "rl", "sft", "sft"]
    for line in lines:
        assert all(math.isfinite(v) for v in line.values() if isinstance(v, (int, float)))
    # Without a reward nothing has moved.
    assert 0.49 < lines[0]["sft/frozen_share"] <= 0.5 or lines[0]["reward"] == 0
    sft = [line for line in lines if line["phase"] == "sft"]
    assert all(line["sft/loss"] > 0 and line["sft/grad_norm"] > 0 for line in sft)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert samples and all({"prompt", "response", "reward", "answer"} <= s.keys() for s in samples)
    asked = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    for s in samples:
        row = asked[int(s["id"])]
        gold = row["answer"].rpartition("#### ")[2].replace(",", "")
        assert row["question"] in s["prompt"] and s["answer"] == gold
    assert (out / "plot.png").stat().st_size > 1000 and (out / "config.json").exists()
    last = checkpoints_of(out)[-1]
    assert len(list(last.glob("state/*.safetensors"))) == world
    tokenizer = transformers.AutoTokenizer.from_pretrained(last / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(last / "model")
    moved = of_kind(checkpoint_tensors(last), "weight/")
    for name, p in model.named_parameters():
        assert torch.equal(p, moved[name].to(p.dtype))
    prompt = tokenizer(samples[0]["prompt"], return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert generated.shape[1] > prompt.input_ids.shape[1]


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

    def poisoned_forward(self, tokens, mask, *settings):
        logprobs, entropy = forward(self, tokens, mask, *settings)
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
def no_advantage(folder):
    """How many tensors have moments after an update of responses that teach nothing, then others"""
    run, moments = open_run(folder / "no-advantage", probe_bound=1e9), []
    run.sampler = FixedSampler()
    responses = mifo.sample(run, run.questions[:4])
    for advantage in (0.0, 1.0):
        for response in responses:
            response.advantage = advantage
        mifo.rl_update(run, responses)
        moments.append(len(run.optimizers["rl"].state))
    return moments


def test_without_an_advantage_no_step_is_taken(no_advantage):
    for ranks in no_advantage.values():
        for none, some in ranks:
            assert none == 0 < some


@case(worlds=(1,))
def infinite_loss(folder):
    """Whether a step whose gradients are finite moves a weight, by its loss."""
    run, moved = open_run(folder / "infinite-loss"), {}
    for loss in (math.inf, 1.0):
        for p in run.policy.parameters():
            p.grad = torch.ones_like(p)
        before = [shard.clone() for shard in run.shards]
        mifo.optimizer_step(run, "rl", 1.0, loss)
        moved[loss] = not all(map(torch.equal, before, run.shards))
    return moved


def test_a_loss_that_is_not_finite_takes_no_step_though_its_gradients_are(infinite_loss):
    assert infinite_loss[1] == [{math.inf: False, 1.0: True}]


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
    for name, last, more in (("unrewarded", 1, {}), ("evaluated", 2, dict(evaluate="sums"))):
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
    settings = dict(evaluate="sums", steps=4, eval_every=1, save_every=1, keep=1)
    run = open_run(folder / "kept", **settings)
    mifo.train(run)
    return run


@case(worlds=(1,))
def runs_without_signal(folder):
    """{name: (what a run prints, its summary)}; of a run's steps some have equal verdicts."""
    found = {}
    for name, verdicts, settings in (
        ("unparsed", ["unparsed"] * 3, dict(schedule="rl")),
        ("wrong", ["wrong"] * 2, dict(buffer_size=10)),
        ("once", ["wrong", "", "correct"], dict(schedule="rl")),
        ("late", ["", "correct"], dict(schedule="rl")),
    ):
        run = open_run(folder / f"no-signal-{name}", steps=len(verdicts), **settings)

        def check(texts, golds, kinds, run=run, verdicts=verdicts):
            verdict = verdicts[run.state.rl_steps]
            return [verdict] * len(texts) if verdict else ["wrong", "correct"] * (len(texts) // 2)

        run.checker.check = check
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            mifo.train(run)
        found[name] = printed.getvalue(), mifo.summary(run)
    return found


def test_a_run_without_answers_says_so_after_its_first_step_and_at_the_end(runs_without_signal):
    for text in runs_without_signal[1][0]["unparsed"]:
        assert text.count("warning: ") == 1
        assert "No answer was found in 100% of the responses" in text
        assert "What counts as an answer of kind chain: the last `[...]`" in text
        assert "RL learns nothing" in text and "hard" not in text


def test_a_run_whose_rewards_are_equal_says_so_after_its_first_step_and_at_the_end(
    runs_without_signal,
):
    [found] = runs_without_signal[1]
    for step, text in enumerate(found["wrong"], 1):
        said = f"warning: In RL step {step} all rewards of each question were equal (mean 0.00): "
        said += "RL learns nothing from them; 4 of 4 questions count as hard."
        assert said in text.splitlines()
        assert text.count("warning: ") == 1
    assert "\nno SFT phase: 8 hard questions were found, --buffer-size is 10\n" in found["wrong"][1]
    printed, summary = found["once"]
    assert printed.count("warning: In RL step 1 ") == 1 and "no SFT phase" not in summary
    assert "warning" not in summary + "".join(found["late"])  # as at the end of what is learnt


NO_SIGNAL = [  # settings, rewards of each question's two samples, how many are right; what is said
    ({}, [0, 0, 0, 0], [0, 0], ["equal (mean 0.00): RL learns nothing", "2 of 2 questions"]),
    ({}, [1, 1, 0, 0], [1, 0], ["equal (mean 0.50): RL learns nothing", "1 of 2 questions"]),
    ({}, [1, 0, 0, 0], [0.5, 0], []),
    ({"schedule": "rl"}, [0, 0, 0, 0], [0, 0], ["all rewards of each question were equal"]),
    ({"reward": "x"}, [0.3, math.nan, math.nan, math.nan], [0, math.nan],
     ["(mean 0.30)", "went from 0.3 to 0.3, and right means above --right-above 0.5", "1 of 2 "]),
    ({"reward": "x"}, [0.1, 0.2, 0.3, 0.4], [0, 0], ["rewards went from 0.1 to 0.4", "2 of 2 "]),
    ({"reward": "x", "right_above": -1}, [0, 1, 0, 1], [1, 1], ["from 0 to 1", "0 of 2 questions"]),
    ({"reward": "x"}, [0.1, 0.9, 0.3, 0.4], [0.5, 0], []),
    ({"reward": "x"}, [0.1, 0.2, 0.8, 0.9], [0, 1], []),
    ({"reward": "x", "schedule": "rl"}, [0.1, 0.2, 0.3, 0.4], [0, 0], []),
    ({"reward": "x", "schedule": "rl", "rl_loss": "nft"}, [0.1, 0.2, 0.8, 0.9], [0, 1],
     ["no question had both right and wrong responses (mean 0.50)", "from 0.1 to 0.9"]),
    ({"reward": "x"}, [-1, math.nan, math.nan, math.nan], [0, math.nan], ["went from -1 to -1,"]),
    ({"rl_loss": "nft"}, [1, 0, 0, 0], [0.5, 0], []),
    ({"rl_loss": "nft"}, [0, 0, 0, 0], [0, 0], ["no question had both right and wrong"]),
    ({"p": 0}, [0, 0, 1, 1], [0, 1], ["1 of 2 questions count as hard"]),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "rewards", "accuracies", "said"), NO_SIGNAL)
def test_equal_rewards_and_those_beside_what_is_right_are_told(settings, rewards, accuracies, said):
    text = mifo.equal_rewards(mifo.Config(samples=2, **settings), rewards, accuracies)
    assert all(part in text for part in said) and bool(said) == bool(text)
    assert ("hard" in text) == (bool(said) and "schedule" not in settings)
    assert ("RL learns nothing" in text) == ("(mean " in text)
    assert ("--right-above" in text) == (bool(said) and "reward" in settings)


def test_rewards_of_ones_own_are_warned_of_likewise(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    nan, cut = math.nan, "warning: 100% of the responses were cut at --max-response 8192: "
    for rewards, verdict, truncated, begins, says in (
        ([0.1, 0.9], "wrong", False, "", ""),
        ([nan, nan], "unjudged", False, "warning: --reward returned None for every response", ""),
        ([0.1, 0.9], "wrong", True, cut, ""),
        ([nan, nan], "unjudged", True, cut, "--reward returned None for every response"),
        ([0.2, 0.2], "wrong", True, cut, "In RL step 1 all rewards of each question were equal"),
    ):
        cfg = mifo.Config(samples=2, samples_logged=0, reward="x", schedule="rl")
        own = types.SimpleNamespace(functions=["x"])
        state = mifo.State(rl_steps=1)
        run = types.SimpleNamespace(cfg=cfg, state=state, log={}, rewards=own, rank=0)
        responses = []
        for reward in rewards:
            response = mifo.Response("a", [1], [2], [0.0], truncated, "", verdict, reward)
            response.rewards = {"x": reward}
            responses.append(response)
        question = data.Question("a", [1], "", None)
        mifo.log_responses(run, [question], responses, [0.0])
        assert state.warning.startswith(begins) and says in state.warning
        assert bool(state.warning) == bool(begins)
        assert capsys.readouterr().out == state.warning + "\n" * bool(begins)


NO_ANSWERS = [  # kinds, shares cut and unparsed, settings; what is said, and what is not
    (
        ["math"],
        0.1,
        0.9,
        {},
        ["90% of the responses", "\\boxed{}", "--system", "--extract any"],
        ["cut"],
    ),
    (["math"], 0.1, 0.9, {"extract": "any"}, ["No answer"], ["\\boxed", "--system"]),
    (["number"], 0.95, 0.0, {}, ["95%", "--max-response 8192"], ["No answer", "--system"]),
    (["choice"], 0.0, 1.0, {"require_think": True}, ["a letter in", "</think>"], ["--system"]),
]


@pytest.mark.parametrize(("kinds", "cut", "unparsed", "settings", "said", "unsaid"), NO_ANSWERS)
def test_the_warning_names_what_is_wrong(kinds, cut, unparsed, settings, said, unsaid):
    text = mifo.no_answers(mifo.Config(**settings), kinds, cut, unparsed)
    assert text.endswith(". ") and "\n" not in text and "hard" not in text
    assert all(part in text for part in said) and not any(part in text for part in unsaid)
    assert mifo.no_answers(mifo.Config(**settings), kinds, 0.89, 0.89) == ""


@case()
def best_checkpoint(folder):
    run = evaluated_run(folder)
    link = Path(run.cfg.out, "checkpoints", "best")
    means = {e["step"]: e["results"]["sums"]["avg"] for e in run.state.evals}
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


# What ends a run in set-up and in training: (what, exit code, who says so, its line, a traceback?)
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
OUT_TOO = RuntimeError("CUDA error: out of memory")
NO_SPACE = OSError(28, "No space left on device")
ENDS = [
    ("set_up", lambda: mifo.read_model(mifo.Config(), "--model", "/none"), 2, "first",
     "--model /none: there is no such folder", False),
    ("set_up", lambda: json.loads("{"), 1, "each", "rank {}: JSONDecodeError: Expecting", True),
    ("set_up", OUT_OF_MEMORY, 1, "each", "rank {}: OutOfMemoryError: CUDA out of memory. T", True),
    ("set_up", NO_SPACE, 1, "each", "rank {}: OSError: [Errno 28] No space", False),
    ("run_to_end", mifo.Stopped("the engine"), 1, "first", "the engine", False),
    ("run_to_end", OUT_OF_MEMORY, 1, "each", "rank {}, step 3: OutOfMemoryError: CUDA out", True),
    ("run_to_end", NO_SPACE, 1, "each", "rank {}, step 3: OSError: [Errno 28] No space", False),
    ("run_to_end", OUT_TOO, 1, "each", "rank {}, step 3: RuntimeError: CUDA error: out of", True),
    ("run_to_end", ValueError("no such k"), 1, "each", "rank {}, step 3: ValueError: no such", True),
]  # fmt: skip


@pytest.mark.parametrize("rank", ["0", "3"])
@pytest.mark.parametrize("where, what, code, who, line, traced", ENDS)
def test_whatever_ends_a_rank_is_said_and_main_returns(
    where, what, code, who, line, traced, rank, monkeypatch, capsys, tmp_path
):
    """A rank that left by an exception would keep the others waiting while Python shuts down."""

    def end(*given):
        if isinstance(what, Exception):
            raise what
        what()

    run = types.SimpleNamespace(state=mifo.State(step=3))
    monkeypatch.setattr(mifo, "set_up", lambda cfg: run)
    monkeypatch.setattr(mifo, where, end)
    monkeypatch.setattr(mifo.signal, "signal", lambda number, handler: None)  # this process's own
    monkeypatch.setattr(sys, "argv", ["mifo.py", f"--out={tmp_path}", "--questions=4"])
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert mifo.main() == code
    said = capsys.readouterr().err
    if who == "first" and rank != "0":
        assert said == ""
    else:
        assert said.splitlines()[-1].startswith("mifo.py: error: " + line.format(rank))
        assert ("Traceback" in said) == traced
        assert said.endswith(f"; {mifo.MEMORY}\n") == (what in (OUT_OF_MEMORY, OUT_TOO))


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


@pytest.mark.parametrize("program", ["mifo.py", "eval.py"])
def test_an_older_python_is_told_in_one_line(program):
    ast.parse((ROOT / program).read_text(), feature_version=(3, 8))
    old = "sys.version_info, sys.version = (3, 10, 4), '3.10.4 (main)'"
    code = f"import runpy, sys; {old}; runpy.run_path({program!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"{program}: Python 3.11 or newer is needed, this is 3.10.4\n"


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
    ("--steps 0", "--steps"), ("--behavior-model x", "--behavior-model"),
    ("--questions 5", "--questions 5 is not a multiple of 2, the number of ranks"),
    ("--questions 4 --updates 3", "--questions 4 is not a multiple of --updates 3"),
    ("--replicas 3", "2, the number of ranks, is not a multiple of --replicas 3"),
    ("--pear-ratio-low 0.4", "--pear-ratio-low"), ("--pear-weight-high -11", "--pear-weight-"),
    ("--schedule rl --pear token", "--pear"),
    ("--sft-schedule cosine", "--sft-schedule"),
    ("--schedule rl --sft-schedule cosine", "--sft-schedule"),
    ("--eval-every 5 --evaluate=", "--eval-every"),
    ("--eval-sft-phases --eval-every 0 --evaluate=", "--eval-sft-phases"),
    # the family
    ("--rl-share 0.4", "--rl-share"), ("--sft-weights dft --schedule rl", "--sft-weights"),
    ("--sed 1 --schedule rl", "--sed"),
    ("--demonstration-budget 5 --schedule rl", "--demonstration-budget"),
    ("--rl-loss nft --normalize-std", "--normalize-std"), ("--rl-loss nft --kl-coef 1", "--kl-coef"),
    ("--rl-loss nft --tis-cap 1", "--tis-cap"),
    ("--rl-loss nft --aggregation sequence", "--aggregation"),
    # rewards
    ("--reward x.py", "FILE.py:NAME"), ("--reward /no/such.py:f", "/no/such.py"),
    ("--reward=,", "--reward"), (f"--reward {ROOT}/losses.py:no_such", "no_such"),
    (f"--reward {ROOT}/losses.py:math", "math"), ("--right-above 0.4", "--right-above"),
    ("--reward-weights 1", "--reward-weights"),
    (f"--reward {ROOT}/losses.py:sft_loss,{ROOT}/losses.py:sft_loss", "one name"),
    (f"--reward {ROOT}/losses.py:sft_loss --reward-weights 1,2", "--reward-weights 1,2"),
    (f"--reward {ROOT}/losses.py:sft_loss --reward-weights x", "--reward-weights x"),
    (f"--reward {ROOT}/losses.py:sft_loss --reward-weights nan", "--reward-weights nan"),
    (f"--reward {ROOT}/losses.py:sft_loss --extract any", "--extract"),
    (f"--reward {ROOT}/losses.py:sft_loss --require-think", "--require-think"),
    # model, data, folders
    ("--model x", "--data"), ("--data x/y", "--model"), ("--out /dev/null", "--out"),
    ("--model x --data /no/such.jsonl", "/no/such.jsonl"),
    ("--evaluate /no/such.jsonl", "/no/such.jsonl"), ("--evaluate nonsense", "nonsense"),
    ("--evaluate /no/such.parquet", "there is no file /no/such.parquet"),
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


def test_help_has_mifos_flags_first_then_the_others_by_group():
    text = " ".join(mifo.make_parser().format_help().split())
    groups = ("MIFO:", "GRPO:", "SFT and PEAR:", "model and data:", "engine and scale:", "the run:")
    places = [text.index(f" {group} --") for group in groups]
    assert places == sorted(places)
    for f in dataclasses.fields(mifo.Config):
        assert f"{mifo.flag(f.name)} " in text or f"{mifo.flag(f.name)}," in text, f.name
        assert f"[{f.default!r}" in text
        assert f.metadata["bounds"] in text
    assert text.index("--rho") < places[1] < text.index("--clip-low") < places[2]


def test_only_settings_other_than_the_defaults_are_shown():
    text = mifo.settings(mifo.Config(rho=0.5, out="a b"))
    assert text == "settings other than the defaults: rho 0.5, out 'a b'"
    assert mifo.settings(mifo.Config()).endswith("defaults: none")


def test_line_breaks_may_be_typed_as_the_help_shows_them(monkeypatch, tmp_path, capsys):
    typed = re.search(r"as '(<think>[^']*)'", mifo.make_parser().format_help())[1]
    again = re.search(r"as '(<think>[^']*)'", evaluation.evaluate_parser().format_help())[1]
    assert typed == again == "<think>\\n"
    (tmp_path / "r.toml").write_text(
        "generation_prefix = '<think>\\n'\nmodel = 'm/m'\ndata = 'd/d'"
    )
    for argv in (["--model=m/m", "--data=d/d", "--generation-prefix", typed], []):
        recipe = [f"--recipe={tmp_path / 'r.toml'}"] if not argv else []
        assert recipe_config(monkeypatch, *argv, *recipe).generation_prefix == "<think>\n"
    args = ["m", "--bench", "b", "--generation-prefix", typed]
    assert evaluation.evaluate_parser().parse_args(args).generation_prefix == "<think>\n"
    commands = (ROOT / "recipes" / "README.md").read_text()
    assert f"--generation-prefix '{typed}'" in commands


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
    assert cfg.recipe.endswith("embedded.toml") and cfg.evaluate == "sums"
    paper = mifo.Config()  # the papers' values, where they state them
    assert (paper.samples, paper.p, paper.rho, paper.k) == (8, 1 / 8, 0.2, 0.5)
    assert (paper.pear_gamma, paper.pear_block) == (0.999, 4)
    assert (paper.pear_ratio_low, paper.pear_ratio_high) == (-0.08, 0.3)
    assert (paper.pear_weight_low, paper.pear_weight_high) == (-10, 5)


def test_wrong_input_exits_with_2_and_one_line(tmp_path):
    """Each error is one line that names what is wrong; the first by the real command."""
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
    for i, (arguments, named) in enumerate(cases):
        folder = tmp_path / str(i)
        folder.mkdir()
        arguments = as_flags(out=folder / "out") + arguments  # the last --out counts
        if i == 0:
            process = mifo_command(arguments, folder)
            _, printed = process.communicate(timeout=120)
            code = process.returncode
        else:
            [code] = finish(start(folder, 1, main_with, arguments))
            printed = outputs(folder, 1)
        assert code == 2, (arguments, printed[-800:])
        [line] = [line for line in printed.splitlines() if "error" in line.lower()]
        assert named in line and "Traceback" not in printed, (arguments, printed[-800:])


def main_with(arguments: list[str]) -> int:
    """In a rank's process: mifo.py with these arguments."""
    sys.argv = ["mifo.py", *arguments]
    return mifo.main()


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
    rl_steps = PRESETS[name].get("steps", 9 if name in LONG_PRESETS else 3)
    rl_steps = 0 if cfg.schedule == "sft" else rl_steps
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
    learnt, held = set(state["demonstrations"]), set(held_out(cfg.sft_holdout))
    assert not learnt & held and len(learnt) <= (cfg.demonstration_budget or 16)
    if cfg.schedule == "alternate":
        coins = [torch.Generator().manual_seed(step) for step in range(len(lines))]
        expected = ["rl" if torch.rand((), generator=coin) < 0.4 else "sft" for coin in coins]
        assert phases == expected and 3 <= phases.count("sft")
        assert len(learnt) == 5 and len(state["demonstrations"]) == 2 * phases.count("sft")
        assert of_kind(tensors, "sft/exp_avg/") and of_kind(tensors, "rl/exp_avg/")
    elif cfg.schedule == "interleave":
        freezes = cfg.freeze != "off"
        assert phases[0] == "rl" and "sft" in phases
        first = phases.index("sft")
        assert ("sft/frozen_share" in lines[first - 1]) == freezes
        assert ("sft/frozen_movement" in lines[first]) == freezes
        if name in SAVED_PRESETS:
            threshold = checkpoint_state(sft_phases(run)[0][0])["threshold"]
            assert math.isfinite(threshold) == freezes
    else:
        sft_steps = 9 if name == "budget-stage" else 2 if "sft" in cfg.schedule else 0
        assert phases == ["sft"] * sft_steps + ["rl"] * rl_steps
        assert state["buffer"] == [] and not of_kind(tensors, "importance/")
        assert not any("frozen" in key for line in lines for key in line)
        # an SFT stage's moments end with it
        assert not of_kind(tensors, "sft/")
        if not cfg.demonstration_budget:
            expected = list(range(16)) if "sft" in cfg.schedule else []
            assert sorted(state["demonstrations"]) == expected
    if cfg.schedule == "sft-then-rl" and not cfg.demonstration_budget:
        # nothing but the weights is handed over
        halfway, handed = (checkpoint_tensors(folder) for folder in checkpoints_of(run)[:2])
        assert of_kind(halfway, "sft/exp_avg/") and not of_kind(handed, "sft/")
        assert not of_kind(handed, "rl/")
        assert {t.item() for t in of_kind(tensors, "rl/step/").values()} == {3}


def held_out(count: int) -> list[int]:
    """What --sft-holdout keeps of sixteen demonstrations."""
    return sorted(data.draw(16, 0, 0, count))


@pytest.mark.parametrize("world", [1, 2])
def test_a_budget_is_spent_and_then_no_sft_phase_begins(presets, world):
    run = presets[world][0]["budget"]
    states = [checkpoint_state(folder) for folder in checkpoints_of(run)]
    used = [len(set(state["demonstrations"])) for state in states]
    assert used[-1] == 3 and used == sorted(used)
    spent = used.index(3)
    assert all(state["sft_phases"] == states[spent]["sft_phases"] for state in states[spent:])
    full = [state for state in states[spent:] if len(state["buffer"]) >= 2]
    assert not full  # emptied as ever
    assert states[-1]["rl_steps"] - states[spent]["rl_steps"] >= 2
    stage = checkpoint_state(checkpoints_of(presets[world][0]["budget-stage"])[-1])
    assert len(stage["demonstrations"]) == len(set(stage["demonstrations"])) == 6


@case()
def family_resumed(folder):
    """By preset: a run's folder, and that of one that went on from its third checkpoint."""
    found = {}
    for name in ("alternate", "budget-stage"):
        straight, out = train_preset(folder, name), folder / f"resumed-{name}"
        third = checkpoints_of(straight)[2]
        run = open_run(out, **preset_settings(name))
        if run.rank == 0:
            for log in mifo.LOGS:
                if (straight / log).exists():
                    shutil.copy(straight / log, out / log)
        mifo.barrier(run)
        mifo.load_checkpoint(run, third)
        mifo.train(run)
        found[name] = straight, out
    return found


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", ["alternate", "budget-stage"])
def test_coin_budget_and_holdout_go_on_after_a_checkpoint(family_resumed, world, name):
    straight, resumed = family_resumed[world][0][name]
    assert metrics_of(straight) == metrics_of(resumed)
    for log in ("holdout.jsonl", "demonstrations.jsonl", "samples.jsonl"):
        assert json_lines(straight / log) == json_lines(resumed / log), log
    a, b = (checkpoints_of(folder)[-1] for folder in (straight, resumed))
    tensors = checkpoint_tensors(a), checkpoint_tensors(b)
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    a, b = checkpoint_state(a), checkpoint_state(b)
    assert a | {"seconds": 0} == b | {"seconds": 0}


def test_what_a_budget_still_pays_for():
    state = mifo.State(buffer=[7, 3, 9, 5], demonstrations=[3, 1, 3])
    for budget, chosen in (
        (0, [7, 3, 9, 5]),
        (3, [7, 3]),
        (4, [7, 3, 9]),
        (2, []),
        (9, state.buffer),
    ):
        assert mifo.within_budget(mifo.Config(demonstration_budget=budget), state) == chosen, budget


def test_the_coin_of_alternate_is_fair_and_follows_from_seed_and_step():
    for share in (0.25, 0.5):
        cfg = mifo.Config(schedule="alternate", rl_share=share, steps=10)
        phases = [mifo.next_phase(cfg, mifo.State(step=step)) for step in range(4000)]
        assert phases.count("rl") / 4000 == pytest.approx(share, abs=0.03)
        again = [mifo.next_phase(cfg, mifo.State(step=step)) for step in range(50)]
        other = dataclasses.replace(cfg, seed=1)
        assert again == phases[:50]
        assert [mifo.next_phase(other, mifo.State(step=step)) for step in range(50)] != again
    assert mifo.next_phase(cfg, mifo.State(rl_steps=10)) is None


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", ["budget", "budget-stage", "alternate"])
def test_the_held_out_loss_is_that_of_all_tokens_by_full_logits(presets, base, world, name):
    """At each evaluation and each SFT epoch's end, from the weights of that step's checkpoint."""
    run, questions = presets[world][0][name], sixteen_questions()
    lines, folders = json_lines(run / "holdout.jsonl"), checkpoints_of(run)
    weights = {checkpoint_state(folder)["step"]: folder / "model" for folder in folders}
    steps = {"budget-stage": [0, 3, 6, 9, 12]}.get(name)
    assert steps is None or [line["step"] for line in lines] == steps
    assert lines[0]["step"] == 0 and lines[-1]["step"] == max(weights) and len(lines) >= 4
    logged = {
        line["step"]: line["holdout_nll"] for line in metrics_of(run) if "holdout_nll" in line
    }
    for line in lines:
        model, total, tokens = float_model(weights.get(line["step"], base)), 0.0, 0
        for index in held_out(PRESETS[name]["sft_holdout"]):
            q = questions[index]
            logprobs, _ = response_logprobs(model, q.prompt, q.demonstration)
            total, tokens = total - logprobs.sum().item(), tokens + len(logprobs)
        assert line["nll"] == pytest.approx(total / tokens, rel=1e-5)
        assert line["step"] == 0 or logged[line["step"]] == line["nll"]


def test_pass_at_k_of_a_runs_evaluations(presets):
    run = presets[1][0]["budget"]
    evaluated = json_lines(run / "evaluations.jsonl")
    logged = [line for line in metrics_of(run) if "evaluation" in line]
    assert len(evaluated) >= 3
    for line in evaluated:
        correct, found = line["benches"]["sums"]["correct"], line["benches"]["sums"]["pass"]
        assert found["1"] == pytest.approx(np.mean(correct) / 2)
        assert found["2"] == pytest.approx(np.mean([c > 0 for c in correct]))
    assert logged[-1]["evaluation/pass@2/sums"] == evaluated[-1]["benches"]["sums"]["pass"]["2"]


SPLITS = (
    dict(micro_tokens=40),
    dict(micro_tokens=200),
    dict(micro_tokens=100_000),
    dict(micro_tokens=40, gather_once="on"),  # on one rank, too
    dict(micro_tokens=40, gather_once="off"),
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


@case(worlds=(2,))
def gather_choices(folder):
    """{(--gather-once, bytes a parameter on the smaller of two machines): what it comes to}"""
    run = open_run(folder / "gather-choices")
    count = sum(p.numel() for p in run.policy.parameters())
    found = {}
    for setting, size in itertools.product(("auto", "on", "off"), (159, 160)):
        pages = size * count * (1 if run.rank == 1 else 1000)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LOCAL_WORLD_SIZE", "1")
            patch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": pages}.get)
            cfg = mifo.Config(gather_once=setting)
            found[setting, size] = mifo.choose_gather_once(cfg, run.policy, 2, run.device)
            alone = mifo.choose_gather_once(cfg, run.policy, 1, run.device)
            assert alone == (setting == "on")
            patch.setenv("LOCAL_WORLD_SIZE", "2")
            assert mifo.memory_of_rank(run.device) == size * count / 2
    return found


def test_gather_once_is_chosen_by_the_smallest_memory(gather_choices):
    # 8 bytes of whole weights and gradients are a twentieth of 160.
    expected = {"auto": [False, True], "on": [True, True], "off": [False, False]}
    for found in gather_choices[2]:
        for setting, choices in expected.items():
            assert [found[setting, 159], found[setting, 160]] == choices


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


# --------------------------------------------------------------------------------------------------
# A GPU


def test_the_gpu_benchmark_says_which_part_failed_and_why(tmp_path):
    (tmp_path / "machine.json").write_text('[["GPU", "H100", ""]]')
    gpu.start(tmp_path, "evaluate")  # in a folder without a run
    reason = "exit code 1: RuntimeError: there is no checkpoint: it needs the part run"
    _, _, machine, failed, _ = gpu.table(tmp_path).splitlines()
    assert machine == "| machine | GPU | H100 |  |"
    assert failed == f"| evaluate | FAILED | {reason} | see evaluate.log |"


def test_a_run_on_a_gpu(tmp_path):
    """Both phases, the engine beside the trainer, a resumed run, and the type of evaluations."""
    number = os.environ.get("MIFO_TEST_GPU")
    if number is None:
        pytest.skip("MIFO_TEST_GPU does not name a GPU")
    env = environment(tmp_path, CUDA_VISIBLE_DEVICES=number)
    flags = ["--buffer-size=8", "--evaluate=", "--eval-every=0", f"--out={tmp_path / 'run'}"]
    for more in (["--steps=6"], ["--steps=8", "--resume"]):
        command = [sys.executable, ROOT / "mifo.py", *flags, *more]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
    lines = json_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert {line["phase"] for line in lines} == {"rl", "sft"}
    gaps = [line["engine/mean_difference"] for line in lines if "engine/mean_difference" in line]
    assert gaps and max(gaps) < 0.05
    model = checkpoints_of(tmp_path / "run")[-1] / "model"
    assert json.loads((model / "config.json").read_text())["dtype"] == "bfloat16"
    command = [sys.executable, ROOT / "eval.py", model, "--bench=sums", "--max-tokens=80"]
    command += [f"--out={tmp_path / 'evaluation'}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and ", bfloat16, because" in done.stderr, done.stderr[-3000:]


# --------------------------------------------------------------------------------------------------
# The README's snippets


def readme_block(heading, language, file="README.md"):
    """The first fenced block of this language under the heading, verbatim."""
    section = (ROOT / file).read_text().split(f" {heading}\n", 1)[1]
    return re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)[1]


def readme_run(heading, **names):
    """The names that the Python block under the heading leaves behind, executed as it stands."""
    exec(compile(readme_block(heading, "python"), f"README.md: {heading}", "exec"), names)
    return names


class ReadmeFreeze:
    """A small regression after three AdamW steps, so that its moments are warm, as RL leaves them.

    `train` goes on from there in plain float64 NumPy, on a flat vector of all parameters.
    """

    LR, DECAY, BETAS, EPS = 0.01, 0.1, (0.9, 0.999), 1e-8

    def __init__(self):
        torch.manual_seed(0)
        self.model = self.network()
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, self.LR, betas=self.BETAS, eps=self.EPS, weight_decay=self.DECAY
        )
        self.batches = [(torch.randn(8, 5), torch.randn(8, 3)) for _ in range(6)]
        self.before = [p.detach().clone() for p in self.parameters]
        for batch in self.batches[:3]:
            self.loss(self.model, batch).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        states = [self.optimizer.state[p] for p in self.parameters]
        self.first = self.flat([state["exp_avg"] for state in states])
        self.second = self.flat([state["exp_avg_sq"] for state in states])
        self.steps = 3
        distance = np.abs(self.flat(self.parameters) - self.flat(self.before))
        most_moved = np.argsort(-distance)[: len(distance) // 2]
        self.frozen = np.isin(np.arange(len(distance)), most_moved)

    @staticmethod
    def network():
        return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))

    @staticmethod
    def flat(tensors):
        return torch.cat([t.detach().flatten() for t in tensors]).double().numpy()

    @staticmethod
    def loss(model, batch):
        x, y = batch
        return (model(x.to(model[0].weight.dtype)) - y).pow(2).sum()

    def gradient(self, theta, batch):
        """The loss's gradient at the flat parameters, without the frozen entries."""
        model = self.network().double()
        torch.nn.utils.vector_to_parameters(torch.tensor(theta), model.parameters())
        self.loss(model, batch).backward()
        return np.where(self.frozen, 0.0, self.flat([p.grad for p in model.parameters()]))

    def step(self, theta, gradient):
        """One AdamW step along the gradient, its norm clipped to 1."""
        norm = np.sqrt((gradient**2).sum())
        gradient = gradient * min(1.0, 1.0 / (norm + 1e-6))
        one, two = self.BETAS
        self.first = one * self.first + (1 - one) * gradient
        self.second = two * self.second + (1 - two) * gradient**2
        self.steps += 1
        mean = self.first / (1 - one**self.steps)
        root = np.sqrt(self.second / (1 - two**self.steps)) + self.EPS
        return theta * (1 - self.LR * self.DECAY) - self.LR * mean / root

    def train(self, batches):
        """(parameters, gradient norms, least movement of a frozen entry before it is put back)."""
        theta = start = self.flat(self.parameters)
        norms, drifts = [], []
        for batch in batches:
            gradient = self.gradient(theta, batch)
            norms.append(np.sqrt((gradient**2).sum()))
            theta = self.step(theta, gradient)
            drifts.append(np.abs(theta - start)[self.frozen].min())
            theta = np.where(self.frozen, start, theta)
        return theta, norms, min(drifts)


def readme_assert_frozen(job, start, expected):
    """Frozen entries have the bits of the start; all others moved, to where plain AdamW goes."""
    end = job.flat(job.parameters)
    assert (end[job.frozen] == start[job.frozen]).all()
    assert (end[~job.frozen] != start[~job.frozen]).all()
    np.testing.assert_allclose(end, expected, rtol=0, atol=2e-6)


def test_the_readmes_freeze_holds_the_most_moved_half_and_steps_the_rest_by_plain_adamw():
    job = ReadmeFreeze()
    start = job.flat(job.parameters)
    expected, norms, drift = job.train(job.batches[3:])
    assert min(norms) > 1 and drift > 1e-6  # clipping acts, and so does the putting back
    readme_run(
        "The freeze in your own AdamW loop",
        torch=torch,
        model=job.model,
        parameters=job.parameters,
        optimizer=job.optimizer,
        before_rl=job.before,
        importance=[torch.zeros_like(p) for p in job.parameters],
        demonstrations=job.batches[3:],
        sft_loss=job.loss,
    )
    readme_assert_frozen(job, start, expected)


def test_the_readmes_entropy_mask_gives_the_mean_over_each_rows_least_certain_fifth():
    vocabulary, length = 11, 13
    prompts, responses = [3, 2, 4, 1], [10, 6, 5, 1]
    torch.manual_seed(1)
    table = torch.nn.Parameter(torch.randn(vocabulary, vocabulary))  # a bigram model's logits
    tokens = torch.randint(vocabulary, (4, length))
    mask = torch.zeros(4, length - 1, dtype=torch.bool)
    chosen = []
    for row, (prompt, n) in enumerate(zip(prompts, responses)):
        mask[row, prompt - 1 : prompt - 1 + n] = True
        entropies = []
        for t in range(prompt - 1, prompt - 1 + n):
            p = table[tokens[row, t]].detach().double().softmax(0)
            entropies.append((-sum(x * math.log(x) for x in p.tolist()), t))
        kept = sorted(entropies, reverse=True)[: math.ceil(n / 5)]
        chosen += [(row, t) for _, t in kept]
    assert len(chosen) == 2 + 2 + 1 + 1
    oracle = table.detach().double().requires_grad_()
    terms = [oracle[tokens[r, t]].log_softmax(0)[tokens[r, t + 1]] for r, t in chosen]
    expected = -sum(terms) / len(terms)
    expected.backward()
    total = 0.0
    for rows in ([0, 1, 2], [3]):  # two micro-batches of one step
        found = readme_run(
            "The entropy mask in an SFT loss",
            model=lambda ids: argparse.Namespace(logits=table[ids]),
            tokens=tokens[rows],
            response_mask=mask[rows],
            lengths=responses,
        )
        found["loss"].backward()
        total += found["loss"].item()
    assert total == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(table.grad.double(), oracle.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("micro_batches", [[[0, 1, 2], [3], [4, 5]], [[5, 0, 4, 2, 1, 3]]])
def test_the_readmes_grpo_loss_steps_along_the_clipped_gradient_however_it_is_split(micro_batches):
    rewards = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    old = randn(6, 8, seed=2) - 2
    model = torch.nn.Module()
    model.logprobs = torch.nn.Parameter(old + randn(6, 8, seed=3, scale=0.4))
    mask = torch.arange(8) < torch.tensor([8, 3, 5, 1, 7, 6])[:, None]
    start = model.logprobs.detach().clone()
    gradient = torch.zeros_like(start)
    cases = set()
    for row in range(6):
        group = rewards[row // 3]
        advantage = group[row % 3].item() - sum(group.tolist()) / 3
        for t in range(int(mask[row].sum())):
            ratio = math.exp(start[row, t] - old[row, t])
            clipped = ratio > 1.2 if advantage > 0 else ratio < 0.8
            cases.add((advantage > 0, clipped))
            gradient[row, t] = 0.0 if clipped else -ratio * advantage / int(mask.sum())
    assert len(cases) == 4
    gradient *= 40  # so that the norm is above 1, and is clipped
    assert gradient.norm() > 1
    readme_run(
        "The GRPO loss",
        torch=torch,
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        rewards=rewards * 40,
        old_logprobs=old,
        mask=mask,
        micro_batches=micro_batches,
        response_logprobs=lambda model, rows: model.logprobs[rows],
    )
    moved = model.logprobs.detach() - start
    torch.testing.assert_close(moved, -gradient / gradient.norm(), rtol=0, atol=1e-6)


class ReadmeTrained(torch.nn.Module):
    """Gives its own loss, twice a sum: a Trainer halves it for two micro-batches."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y, **_):
        return {"loss": 2 * ReadmeFreeze.loss(self.model, (x, y))}


def test_the_readmes_callback_freezes_under_a_trainer(tmp_path):
    """The norm that the Trainer clips by, and logs, is that of the free entries alone."""
    pytest.importorskip("accelerate")
    job = ReadmeFreeze()
    start = job.flat(job.parameters)
    parts = torch.tensor(job.frozen).split([p.numel() for p in job.parameters])
    frozen = [part.view_as(p) for part, p in zip(parts, job.parameters)]
    examples = [{"x": x, "y": y} for batch in job.batches[3:5] for x, y in zip(*batch)]
    expected, norms, drift = job.train(job.batches[3:5])
    assert min(norms) > 1 and drift > 1e-6
    callback = readme_run("The freeze in a `transformers` Trainer, TRL's included")["Freeze"]
    settings = transformers.TrainingArguments(
        output_dir=tmp_path,
        use_cpu=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        max_grad_norm=1.0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
    )
    constant = torch.optim.lr_scheduler.LambdaLR(job.optimizer, lambda _: 1.0)
    trainer = transformers.Trainer(
        ReadmeTrained(job.model),
        settings,
        train_dataset=examples,
        optimizers=(job.optimizer, constant),
        callbacks=[callback(frozen)],
    )
    trainer.train()
    logged = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    assert logged == pytest.approx(norms, rel=1e-5)
    readme_assert_frozen(job, start, expected)
    job.loss(job.model, job.batches[0]).backward()  # the hooks are gone
    assert all((p.grad != 0).all() for p in job.parameters)


def test_the_readmes_rows_can_be_checked():
    lines = readme_block("Your own data", "json").splitlines()
    worked, plain = (json.loads(line) for line in lines)
    golds, kinds = [worked["answer"], plain["answer"]], ["math", plain["kind"]]
    responses = [worked["solution"], "The answer is (B)."]
    with evaluation.Checker(limit=20.0) as checker:
        assert checker.check_golds(golds, kinds) == ["correct", "correct"]
        assert checker.check(responses, golds, kinds) == ["correct", "correct"]
        assert checker.check(["It is 9.", "It is carbon dioxide."], golds, kinds) == [
            "unparsed",
            "unparsed",
        ]


def test_the_readmes_demonstrations_are_those_of_a_teacher():
    text = (ROOT / "recipes" / "README.md").read_text()
    text = text.replace("\\\n", "")  # lines that go on
    command = re.search(r"    python eval.py (.*--demonstrations.*)", text)
    args = evaluation.evaluate_parser().parse_args(shlex.split(command[1]))
    assert (args.model, args.k, args.keep) == ("TEACHER", 8, None)
    assert args.bench == "my.jsonl" and args.demonstrations.suffix == ".jsonl"
    evaluation.check_demonstration_flags(args, args.bench.split(","))


def test_the_readmes_reward_function_judges(tmp_path):
    text = readme_block("Your own reward", "python", "recipes/README.md")
    near = own_rewards(tmp_path, text, "near")
    responses = ["12 less 4: 8", "about 6", "no idea", "9" * 5000]
    questions = [asked_question(i, True, answer="8") for i in range(4)]
    judged = evaluation.judge(questions, responses, [[1]] * 4, None, near)
    assert [reward for _, reward, _ in judged] == pytest.approx([1, 1 / 3, 0, 0])
    assert [verdict for verdict, _, _ in judged] == ["correct", "wrong", "wrong", "wrong"]


def test_the_readmes_methods_differ_from_mifo_in_the_flags_of_their_row(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    head = "| method | flags that differ from MIFO | paper |\n"
    table = (ROOT / "README.md").read_text().split(head)[1].split("\n\n")[0]
    rows = table.splitlines()[1:]
    assert len(rows) == 5
    default = dataclasses.asdict(mifo.parse_config([]))
    for row in rows:
        flags = shlex.split(re.search(r"`(.*?)`", row)[1])
        config = dataclasses.asdict(mifo.parse_config(flags))
        changed = {name for name in config if config[name] != default[name]}
        assert changed == {flag[2:].replace("-", "_") for flag in flags[::2]}, row
