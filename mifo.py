"""MIFO: GRPO interleaved with SFT on the questions that GRPO cannot solve (arXiv 2510.04454).

    torchrun --standalone mifo.py                            # a toy task, minutes on two CPU cores
    torchrun --standalone --nproc-per-node 8 mifo.py --recipe recipes/qwen2.5-math-1.5b.toml
    torchrun ... mifo.py ... --resume                        # go on after the last checkpoint

The method, in the order of the functions below; equations are numbered as in the README (11 to 14
in recipes/README.md):
  train           one pass is one RL step or one SFT step
  rl_step         sample G responses a question, reward them (the checker: 1 or 0), remember the
                  hard questions
  rl_update       one optimizer step of GRPO
  begin_sft       at S hard questions: what RL has moved most is frozen
  sft_step        one optimizer step on the highest-entropy tokens of demonstrations
  end_sft         thaw; the next RL phase begins
  optimizer_step  clip and step; what is frozen stays as it is, bit for bit
Below the banner "Plumbing" stand first Run and Response, what a run holds; then what the steps call
and what any FSDP trainer needs. Skip that at first reading.

Left out, to keep this short: tensor parallelism, asynchronous sampling, LoRA, a reward model.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):
    sys.stderr.write(f"mifo.py: Python 3.11 or newer is needed, this is {sys.version.split()[0]}\n")
    sys.exit(2)

import argparse
import ctypes
import dataclasses
import datetime
import faulthandler
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import secrets
import shutil
import signal
import textwrap
import time
import tomllib
import typing
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # or several ranks starve each other

import data  # before transformers: some packages break its import, and data hides them
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import eval as evaluation
import freeze
import losses
import rollout
from benchmarks import pictures

ROOT = Path(__file__).parent
# Schedules with one SFT stage, on all demonstrations; MIFO has SFT phases, one a full buffer.
STAGED = ("sft", "sft-then-rl")
SKIPS = 3  # steps in a row that are skipped for numbers that are not finite, before the run ends

# --------------------------------------------------------------------------------------------------
# Settings


def option(group: str, default, meaning: str, bounds: str = "", may_change: bool = False):
    """A flag: --help prints it in its group, and what is out of bounds is refused.

    may_change: on --resume, too, for it changes how far or how fast a run goes, not what it learns.
    """
    known = {"group": group, "help": meaning, "bounds": bounds, "may_change": may_change}
    return field(default=default, metadata=known)


MIFO, GRPO, SFT = "MIFO", "GRPO", "SFT and PEAR"  # groups of --help


# fmt: off
@dataclass
class Settings:
    """The method's. Config, below the banner, adds those of its neighbours and of the machinery."""

    p: float = option(MIFO, 0.125, "a question whose samples are right at most at this rate is hard", "[0, 1]")
    buffer_size: int = option(MIFO, 128, "S: an SFT phase starts at this many hard questions", "[1, inf)")
    rho: float = option(MIFO, 0.2, "share of a demonstration's tokens, by entropy, that SFT learns; 1: all", "(0, 1]")
    k: float = option(MIFO, 0.5, "share of all parameters, by importance, that an SFT phase freezes", "(0, 1]")
    alpha: float = option(MIFO, 0.9, "decay of the importance map between RL phases; 0: MIFO-dagger", "[0, 1]")
    freeze: Literal["strict", "zero-grad-only", "off"] = option(
        MIFO, "strict", "frozen parameters: stay bit for bit; get zero gradients only; are not frozen")
    schedule: Literal["interleave", "rl", "sft", "sft-then-rl", "alternate"] = option(
        MIFO, "interleave", "interleave: MIFO; rl: GRPO alone; sft: SFT on all demonstrations; sft-then-rl: that, "
        "then GRPO; alternate: an RL or an SFT step by a coin. Only interleave takes --p, --buffer-size, --k, --alpha "
        "and --freeze")
    rl_share: float = option(MIFO, 0.5, "chance of an RL step in --schedule alternate", "(0, 1)")
    demonstration_budget: int = option(
        MIFO, 0, "after this many different demonstrations no SFT phase begins; 0: no limit", "[0, inf)")

    steps: int = option(GRPO, 500, "RL steps", "[0, inf)", may_change=True)
    questions: int = option(GRPO, 128, "questions per RL step, over all ranks", "[1, inf)")
    samples: int = option(GRPO, 8, "G, responses sampled per question, whose rewards are compared", "[2, inf)")
    updates: int = option(GRPO, 1, "optimizer steps per RL step; each takes its share of the questions", "[1, inf)")
    temperature: float = option(GRPO, 1.0, "of sampling, and of the log-probabilities in the loss", "(0, inf)")
    normalize_std: bool = option(GRPO, False, "divide a group's advantages by its standard deviation")
    clip_low: float = option(GRPO, 0.2, "the ratio is clipped below 1 - clip_low", "[0, 1)")
    clip_high: float = option(GRPO, 0.2, "the ratio is clipped above 1 + clip_high", "[0, inf)")
    aggregation: Literal["token", "sequence", "constant"] = option(
        GRPO, "token", "mean over tokens; mean of each response's mean; sum / (responses * max_response) (Dr. GRPO)")
    kl_coef: float = option(GRPO, 0.0, "weight of the KL to the initial model; 0: no such model is held", "[0, inf)")
    tis_cap: float = option(GRPO, 0.0, "cap of the importance weight pi_trainer / pi_engine; 0: no weight", "[0, inf)")
    mask_truncated: bool = option(GRPO, False, "responses cut at max_response carry no loss")
    rl_lr: float = option(GRPO, 1e-6, "learning rate of RL's AdamW", "(0, inf)")
    rl_clip: float = option(GRPO, 1.0, "norm that RL's gradients are clipped to", "(0, inf)")

    sft_lr: float = option(SFT, 1e-6, "learning rate of SFT's AdamW", "(0, inf)")
    sft_clip: float = option(SFT, 1.0, "norm that SFT's gradients are clipped to", "(0, inf)")
    sft_batch: int = option(SFT, 128, "demonstrations per SFT step, over all ranks", "[1, inf)")
    sft_epochs: int = option(SFT, 1, "passes over the demonstrations of a phase or stage", "[1, inf)")
    sft_schedule: Literal["constant", "cosine"] = option(
        SFT, "constant", "rate over an SFT stage: constant; 10 % warm-up, then a cosine to a tenth")
    sft_holdout: int = option(SFT, 0, "demonstrations that are never learnt, but whose loss is measured", "[0, inf)")
# fmt: on


# --------------------------------------------------------------------------------------------------
# The method


@dataclass
class State:
    """What moves while a run goes on; a checkpoint's state.json."""

    step: int = 0  # steps done, RL and SFT
    rl_steps: int = 0
    sft_steps: int = 0
    sft_phases: int = 0
    drawn: int = 0  # questions drawn from the stream so far
    buffer: list[int] = field(default_factory=list)  # hard questions by index, as they came
    sft_queue: list[list[int]] = field(default_factory=list)  # batches that SFT has still to learn
    steps_per_sft_epoch: int = 0  # of this SFT phase
    threshold: float = math.inf  # importance above it is frozen; inf: nothing is
    sed_tau: float = 0.0  # SED-SFT's threshold, given or found
    skipped: int = 0  # optimizer steps not taken, because a number was not finite
    skips_in_a_row: int = 0
    demonstrations: list[int] = field(default_factory=list)  # all that were used
    sampled_tokens: int = 0  # of RL's responses
    warning: str = ""  # of the last RL step, if it can have taught nothing
    seconds: dict[str, float] = field(default_factory=dict)  # by phase of work
    evals: list[dict] = field(default_factory=list)  # each evaluation's accuracies


def train(run: Run) -> int:
    """To the end of the schedule. A checkpoint may fall between any two passes: all that goes on
    is in State, the weights, both optimizers, the importance map and its anchor.

    Returns the number of the signal that ended it early, or 0.
    """
    cfg, state = run.cfg, run.state
    if state.step == 0:
        set_anchor(run)  # the first RL phase starts from these weights
        evaluate(run)
        if cfg.schedule in STAGED:
            begin_sft(run, stage(run))
    while phase := next_phase(cfg, state):
        start_clock(run)
        if phase == "rl":
            rl_step(run)
            if cfg.schedule == "interleave" and len(state.buffer) >= cfg.buffer_size:
                if chosen := within_budget(cfg, state):
                    begin_sft(run, chosen)
                state.buffer = []  # though the budget be spent: it shows how many are hard
        else:
            if not state.sft_queue:  # --schedule alternate: an SFT phase is one batch
                begin_sft(run, next_demonstrations(run))
            sft_step(run)
            if not state.sft_queue:
                end_sft(run)
        state.step += 1
        following = next_phase(cfg, state)
        if evaluation_due(cfg, state, phase, following):
            evaluate(run)
        elif phase == "sft" and len(state.sft_queue) % state.steps_per_sft_epoch == 0:
            measure_holdout(run)  # an epoch has ended
        log_step(run, phase)
        stop = signal_on_any_rank(run)
        if stop or following is None or checkpoint_due(cfg, state):
            save_checkpoint(run)
        if stop:
            return stop
    return 0


def next_phase(cfg: Config, state: State) -> str | None:
    """What the next step is: "sft" while demonstrations are queued, else "rl"; None at the end."""
    if state.sft_queue:
        return "sft"
    if cfg.schedule == "sft" or state.rl_steps >= cfg.steps:
        return None
    if cfg.schedule == "alternate":  # ALRIGHT's coin (arXiv 2410.15483), one for all ranks
        coin = torch.rand((), generator=data.generator_of(cfg.seed, state.step))
        return "rl" if coin < cfg.rl_share else "sft"
    return "rl"


def rl_step(run: Run) -> None:
    """Sample, reward, remember the hard questions, update (equations 1 to 4)."""
    cfg, state = run.cfg, run.state
    push_weights(run)
    indices = data.draw(len(run.questions), cfg.seed, state.drawn, cfg.questions)  # Q of them
    questions = [run.questions[index] for index in indices]  # of this step; run.questions: all
    responses = sample(run, questions)  # Q * G, the same list on every rank
    # NaN: not judged. A question without any judged sample is not hard, for NaN <= p is false.
    # float64, since in float32 an accuracy of 1/10 is more than p = 0.1.
    rewards = torch.tensor([r.reward for r in responses], dtype=torch.float64)
    rewards = rewards.view(-1, cfg.samples)  # [Q, G]
    right = (rewards > cfg.right_above).double().masked_fill(rewards.isnan(), math.nan)  # [Q, G]
    graded = right if cfg.rl_loss == "nft" else rewards  # NFT knows right and wrong only
    advantages = losses.group_advantages(graded, cfg.normalize_std)  # [Q, G]
    accuracies = right.nanmean(1).tolist()  # of each question's judged samples

    if cfg.schedule == "interleave":
        for index, accuracy in zip(indices, accuracies):
            hard = accuracy <= cfg.p and index in run.demonstrated
            if hard and index not in state.buffer:
                state.buffer.append(index)

    for response, advantage in zip(responses, advantages.flatten().tolist()):
        response.advantage = advantage
    if not any(has_gradient(cfg, r) for r in responses):
        probe_engine(run)  # no update will compare the engine with the trainer
    run.sampler.sleep()  # the engine leaves the GPU's memory to the update
    with run.timed("rl"):
        if cfg.updates > 1:  # the policy moves while the batch is still in use
            find_old_logprobs(run, responses)
        size = len(responses) // cfg.updates
        for start in range(0, len(responses), size):
            rl_update(run, responses[start : start + size])
    state.drawn += cfg.questions
    state.rl_steps += 1
    log_responses(run, questions, responses, accuracies)


def rl_update(run: Run, responses: list[Response]) -> None:
    """One optimizer step of RL (equations 3, 13, 14); none if no response has an advantage.

    The loss is a sum, divided by a count over the whole batch and all ranks: no split changes it.
    """
    cfg = run.cfg
    counted = [r for r in responses if counts(cfg, r)]
    divisor = {
        "token": sum(len(r.tokens) for r in counted),
        "sequence": len(counted),
        "constant": len(counted) * cfg.max_response,
    }[cfg.aggregation]
    chosen = [r for r in responses if has_gradient(cfg, r)]
    if not chosen:
        return
    pairs = [(r.prompt, r.tokens) for r in chosen]
    old, engine = [r.old_logprobs for r in chosen], [r.rollout_logprobs for r in chosen]
    sums, largest_gap = Counter(), 0.0
    for part in micro_batches(run, pairs, old=old, rollout=engine):
        advantages = torch.zeros(len(part.tokens), device=run.device)  # [B]
        for row, index in enumerate(part.indices):
            advantages[row] = chosen[index].advantage
        # [B, T-1]; None without --kl-coef
        reference = frozen_logprobs(run.reference, part, cfg.temperature)
        logprobs, entropy = run.policy(part.tokens, part.mask, cfg.temperature)  # [B, T-1] each
        # With one update pi_old is the policy itself: the ratio is 1, and nothing is clipped.
        old_logprobs = part.old if cfg.updates > 1 else logprobs.detach()  # [B, T-1]
        common = logprobs, old_logprobs, advantages, part.mask
        if cfg.rl_loss == "nft":
            loss, metrics = losses.nft_loss(*common, cfg.nft_epsilon, cfg.nft_negative)
        else:
            loss, metrics = losses.grpo_loss(
                *common,
                cfg.clip_low,
                cfg.clip_high,
                per_sequence=cfg.aggregation == "sequence",
                ref_logprobs=reference,
                kl_coef=cfg.kl_coef,
                rollout_logprobs=part.rollout,
                tis_cap=cfg.tis_cap,
                sequence_ratio=cfg.rl_loss == "gspo",
            )
        (loss * run.world / divisor).backward()  # FSDP averages over ranks; the loss is their sum
        report_not_finite(run, loss, logprobs, [chosen[i].id for i in part.indices])
        gap = (old_logprobs - part.rollout).masked_fill(~part.mask, 0.0).abs()  # [B, T-1]
        largest_gap = max(largest_gap, gap.max().item())
        metrics |= {"loss": loss.detach(), "entropy": entropy, "gap": gap, "tokens": part.mask}
        sums.update({name: value.sum().item() for name, value in metrics.items()})  # adds

    sums = sum_over_ranks(run, sums)
    loss = sums.pop("loss") / divisor
    log_update(run, loss, sums, largest_gap)
    optimizer_step(run, "rl", cfg.rl_clip, loss)


def begin_sft(run: Run, indices: list[int]) -> None:
    """Find what is frozen (equations 5 and 6), then queue these demonstrations in batches."""
    cfg, state = run.cfg, run.state
    if run.sampler is not None:
        run.sampler.sleep()
    if freezes(cfg):
        with run.timed("freeze"):
            freeze.update_importance(run.importance, run.anchor, run.shards, cfg.alpha)
            group = run.mesh.get_group("shard")
            state.threshold = freeze.topk_threshold(run.importance, cfg.k, group)
        log_movement(run, "rl")  # from the anchor, so before it is set
        set_anchor(run)  # what optimizer_step puts frozen entries back to
    generator = data.generator_of(cfg.seed, state.sft_phases)
    for _ in range(cfg.sft_epochs):
        order = torch.randperm(len(indices), generator=generator).tolist()
        shuffled = [indices[i] for i in order]
        for start in range(0, len(shuffled), cfg.sft_batch):
            state.sft_queue.append(shuffled[start : start + cfg.sft_batch])
    state.steps_per_sft_epoch = len(state.sft_queue) // cfg.sft_epochs
    log_demonstrations(run)
    if cfg.sed > 0 and state.sft_phases == 0:
        state.sed_tau = cfg.sed_tau or find_sed_tau(run, indices)
    state.sft_phases += 1
    state.demonstrations += indices


def sft_step(run: Run) -> None:
    """One optimizer step on the next batch of demonstrations (equations 7, 8 and 10 to 12)."""
    cfg, state = run.cfg, run.state
    if run.sampler is not None:
        run.sampler.sleep()
    questions = [run.questions[index] for index in state.sft_queue.pop(0)]
    pairs = [(q.prompt, q.demonstration) for q in questions]
    lengths = [len(q.demonstration) for q in questions]
    count = sum(losses.top_entropy_count(n, cfg.rho) for n in lengths)  # over all ranks
    behavior = [q.behavior_logprobs for q in questions]  # of the data, else None
    top_k = cfg.sed_k if cfg.sed > 0 else 0
    sums = Counter(loss=0.0)
    with run.timed("sft"):
        for part in micro_batches(run, pairs, behavior=behavior):
            if cfg.pear != "off":
                author = behavior_logprobs(run, part, behavior)  # [B, T-1]
            # [B, T-1] each; the third with --sed only
            logprobs, entropy, *top_mass = run.policy(part.tokens, part.mask, 1.0, top_k)
            selected = losses.top_entropy_mask(entropy, part.mask, cfg.rho)  # [B, T-1]
            weights = torch.ones_like(logprobs)  # [B, T-1]
            if cfg.pear != "off":
                weights = pear_weights(cfg, logprobs, author, part.mask)
                sums.update(pear_shares(cfg, weights, part.mask, sum(lengths)))  # adds
            if cfg.sft_weights != "off":
                alpha = cfg.sft_weight_alpha
                weights = weights * losses.sft_weights(logprobs, cfg.sft_weights, alpha)
            loss = losses.sft_loss(logprobs, selected, weights)
            if cfg.sed > 0:
                [mass] = top_mass
                tau = state.sed_tau
                penalty = losses.sed_penalty(logprobs, mass, selected, tau, cfg.sed, weights)
                loss = loss + penalty
            (loss * run.world / count).backward()  # as in rl_update
            report_not_finite(run, loss, logprobs, [questions[i].id for i in part.indices])
            sums["loss"] += loss.item() / count
            sums["nll"] -= logprobs.sum().item() / sum(lengths)
            sums["entropy"] += entropy.sum().item() / sum(lengths)
            sums["chosen_entropy"] += entropy[selected].sum().item() / count
        sums = sum_over_ranks(run, sums)
        run.log |= {f"sft/{name}": value for name, value in sums.items()}
        run.optimizers["sft"].param_groups[0]["lr"] = sft_learning_rate(cfg, state)
        optimizer_step(run, "sft", cfg.sft_clip, sums["loss"])
    state.sft_steps += 1


def end_sft(run: Run) -> None:
    """Thaw and start the next RL phase. Over MIFO's phases both optimizers keep their moments."""
    log_movement(run, "sft")
    run.state.threshold = math.inf
    set_anchor(run)  # from here the next RL phase's movement is measured
    if run.cfg.schedule in STAGED:  # the stage is over for good: nothing but weights goes on
        run.optimizers["sft"].state.clear()
        run.behavior = None


def optimizer_step(run: Run, which: Literal["rl", "sft"], clip: float, loss: float) -> None:
    """Clip and step; in an SFT phase around frozen parameters (equation 9).

    loss is that of all ranks. If it or a gradient is not finite, no rank takes the step.
    """
    parameters = list(run.policy.parameters())
    freezing = run.state.threshold < math.inf  # it is infinite outside SFT phases
    if freezing:
        whole_norm = gradient_norm(parameters).item()
        freeze.zero_frozen_gradients(local_gradients(parameters), frozen_masks(run))
    norm = gradient_norm(parameters)
    run.log[f"{which}/grad_norm"] = norm.item()
    if math.isfinite(loss) and math.isfinite(norm.item()):
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        if not run.optimizers[which].state:  # its moments come now: not in gaps of what is cached
            torch.cuda.empty_cache()
        run.optimizers[which].step()
        run.state.skips_in_a_row = 0
    else:
        skip_step(run, loss)
    run.optimizers[which].zero_grad()
    if freezing:
        strict = run.cfg.freeze == "strict"
        measure = freeze.restore_frozen if strict else freeze.largest_movement  # both return it
        moved = measure(run.shards, frozen_masks(run), run.anchor)
        run.log["sft/frozen_movement"] = max_over_ranks(run, moved)  # before it was put back
        free = (norm.item() / whole_norm) ** 2 if whole_norm else 1.0
        run.log["sft/frozen_gradient_share"] = 1 - free  # even gradients: the share that is frozen


def frozen_masks(run: Run) -> Iterator[Tensor]:
    """What is frozen now, one tensor's bool mask at a time: all would be a byte an entry."""
    for c in run.importance:
        yield c.to(run.device, non_blocking=True) > run.state.threshold


def set_anchor(run: Run) -> None:
    """anchor <- theta: where an RL phase starts, and what frozen parameters are held to in SFT."""
    if freezes(run.cfg):
        for kept, now in zip(run.anchor, run.shards, strict=True):
            kept.copy_(now)


def freezes(cfg: Config) -> bool:
    """Whether the run keeps an importance map and an anchor at all."""
    return cfg.schedule == "interleave" and cfg.freeze != "off"


def micro_batches(run: Run, pairs: list[tuple[list[int], list[int]]], **aligned):
    """This rank's share of (prompt, response) pairs, in batches of at most --micro-tokens.

    Each has tokens [B, T], mask [B, T-1], indices (which pairs these are), and for each list in
    aligned one [B, T-1] (data.collate). All ranks get equally many, for FSDP waits for all: some
    may be empty, with B = 1 and nothing in the mask.
    """
    lengths = [len(prompt) + len(response) for prompt, response in pairs]
    parts = data.pack(lengths, run.cfg.micro_tokens, run.world)
    rounds = [parts[i : i + run.world] for i in range(0, len(parts), run.world)]
    for i, group in enumerate(rounds):
        # A round's first micro-batch has the most work: the ranks take it in turns.
        indices = group[run.rank] if i % 2 == 0 else group[-1 - run.rank]
        exchange_at_last(run, last=i + 1 == len(rounds))
        if indices:
            mine = {name: [values[j] for j in indices] for name, values in aligned.items()}
            batch = data.collate([pairs[j] for j in indices], run.pad_id, **mine)
        else:
            batch = data.collate([([0], [0])], run.pad_id, **{name: [None] for name in aligned})
            batch["mask"][:] = False
        batch = {name: tensor.to(run.device) for name, tensor in batch.items()}
        yield SimpleNamespace(indices=indices, **batch)
    # Else a pass that no backward pass follows would leave all weights gathered.
    run.policy.set_reshard_after_forward(True)


class Policy(nn.Module):
    """A causal language model that gives log-probability and entropy of response tokens only."""

    def __init__(self, model: transformers.PreTrainedModel):
        super().__init__()
        self.model = model
        self.scale, self.softcap = 1.0, None  # of its logits, found by check_logits

    def forward(
        self, tokens: Tensor, mask: Tensor, temperature: float, top_k: int = 0
    ) -> tuple[Tensor, ...]:
        """Equation 1. tokens [B, T], mask [B, T-1], True where the next token counts.

        Returns logprobs, entropy and, with top_k > 0, the mass of the top_k most probable tokens,
        each [B, T-1], 0 outside the mask. Rows are padded on the right, which causal attention
        never sees, so no attention mask is needed.
        """
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        decoder, head = self.model.get_decoder(), self.model.get_output_embeddings()
        hidden = decoder(input_ids=inputs, use_cache=False).last_hidden_state  # [B, T-1, D]
        found = losses.token_logprobs(  # [N] each
            hidden[mask],
            head.weight,
            targets[mask],
            temperature,
            top_k=top_k,
            bias=head.bias,
            scale=self.scale,
            softcap=self.softcap,
        )
        empty = torch.zeros(mask.shape, dtype=found[0].dtype, device=mask.device)
        return tuple(empty.masked_scatter(mask, values) for values in found)


# ==================================================================================================
# Plumbing. First the other settings, Run and Response; then what the steps above call: sampling and
# the engine, micro-batches, demonstrations; then what any trainer has: evaluation, logs,
# checkpoints, set-up, the command line.
# ==================================================================================================

DATA, SCALE, RUN = "model and data", "engine and scale", "the run"  # further groups of --help


# fmt: off
@dataclass
class Config(Settings):
    rl_loss: Literal["grpo", "gspo", "nft"] = option(
        GRPO, "grpo", "GSPO's ratio of whole responses, or NFT; with --updates 1 their gradients are GRPO's")
    nft_epsilon: float = option(GRPO, 1.0, "NFT's floor of a wrong token's ratio", "(0, inf)")
    nft_negative: float = option(GRPO, 1.0, "NFT's weight of wrong responses; 0: rejection fine-tuning", "[0, inf)")
    sft_weights: Literal["off", "dft", "trust", "phi"] = option(
        SFT, "off", "weights by a token's own probability: DFT's (RL after it may gain less), TrSFT's, CHORD-phi's")
    sft_weight_alpha: float = option(SFT, 0.1, "TrSFT's: a token less probable than this weighs less", "(0, 1]")
    sed: float = option(SFT, 0.0, "strength of SED-SFT's penalty, in its paper 1; 0: none", "[0, inf)")
    sed_k: int = option(SFT, 2, "SED: so many of the most probable tokens are summed", "[1, inf)")
    sed_tau: float = option(
        SFT, 0.0, "SED: where that sum is below this, the policy is unsure; 0: found by --sed-ratio", "[0, inf)")
    sed_ratio: float = option(SFT, 0.7, "SED: share of tokens whose sum reaches the found tau before any SFT", "(0, 1]")
    pear: Literal["off", "sequence", "token", "block"] = option(
        SFT, "off", "PEAR's weights on the SFT loss (arXiv 2602.01058)")
    pear_gamma: float = option(SFT, 0.999, "PEAR's discount per token", "(0, 1]")
    pear_block: int = option(SFT, 4, "PEAR's block length, tokens", "[1, inf)")
    pear_ratio_low: float = option(
        SFT, -0.08, "PEAR: a token's log-ratio is clipped below this; =-inf: it is not", "[-inf, inf]")
    pear_ratio_high: float = option(SFT, 0.3, "PEAR: and above this; =inf: it is not", "[-inf, inf]")
    pear_weight_low: float = option(SFT, -10.0, "PEAR: a weight's logarithm is clipped below this", "[-inf, inf]")
    pear_weight_high: float = option(SFT, 5.0, "PEAR: and above this", "[-inf, inf]")
    behavior_model: str = option(
        SFT, "", "model that wrote the demonstrations; empty: the policy before training stands in")

    model: str = option(DATA, "", "Hub id or folder of the model; empty: the embedded task's base model")
    data: str = option(DATA, "", "Hub dataset id, JSONL or parquet file; empty: the embedded task")
    split: str = option(DATA, "", "of a Hub dataset; empty: train")
    data_config: str = option(DATA, "", "of a Hub dataset that has several")
    revision: str = option(DATA, "", "of a Hub dataset: branch, tag or commit")
    question_field: str = option(DATA, "", "column of questions where the layout is not known; in --evaluate, too")
    answer_field: str = option(DATA, "", "column of gold answers, likewise")
    solution_field: str = option(DATA, "", "column of demonstrations, likewise")
    template: Literal["auto", "chat", "plain"] = option(
        DATA, "auto", "the tokenizer's chat template, or plain text; auto: chat if it has one")
    system: str = option(DATA, "data", "system prompt: a text; data: as the data has it; none: dropped")
    generation_prefix: str = option(
        DATA, "", "ends each prompt, and is cut from demonstrations that begin with it, as '<think>\\n'")
    reward: str = option(
        DATA, "", "reward functions in the checker's place, FILE.py:NAME, several by commas, called as TRL does")
    reward_weights: str = option(DATA, "", "of several reward functions, by commas; empty: 1 each")
    right_above: float = option(
        DATA, evaluation.RIGHT_ABOVE, "with a higher reward a response is right, for --p and evaluation", "(-inf, inf)")
    extract: Literal["boxed", "any"] = option(
        DATA, "boxed", "where answers of kind math and number are looked for: the last \\boxed{}; anywhere")
    require_think: bool = option(DATA, False, "an answer counts only after one closing </think>")
    max_prompt: int = option(DATA, 1024, "tokens; questions with longer prompts are dropped", "[1, inf)")
    max_response: int = option(DATA, 8192, "tokens, of samples and of demonstrations", "[1, inf)")
    rope_theta: float = option(DATA, 0.0, "rotary base to set, for a longer context; 0: as it is", "[0, inf)")
    max_position_embeddings: int = option(DATA, 0, "context length to set; 0: as it is", "[0, inf)")
    trust_remote_code: bool = option(DATA, False, "run Python code that comes with the model", may_change=True)

    sampler: Literal["auto", "vllm", "torch"] = option(
        SCALE, "auto", "auto: vLLM where it can run, else plain PyTorch", may_change=True)
    max_num_seqs: int = option(SCALE, 256, "responses written at once, per rank", "[1, inf)", may_change=True)
    kv_cache_gib: float = option(SCALE, 0.5, "vLLM's KV cache on a CPU, GiB a rank", "(0, inf)", may_change=True)
    gpu_memory_utilization: float = option(
        SCALE, 0.5, "vLLM's share of the GPU's memory while it samples", "(0, 1]", may_change=True)
    probe_bound: float = option(
        SCALE, 0.0, "the run stops if engine and trainer log-probabilities differ by more in the mean; "
        "0: 0.001 in float32, 0.15 in bfloat16", "[0, inf)", may_change=True)
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        SCALE, "auto", "of compute; auto: bfloat16 on GPUs, whose float32 attention takes memory "
        "with the square of the length. Weights stay float32")
    micro_tokens: int = option(SCALE, 32768, "padded tokens in a micro-batch, per rank", "[1, inf)", may_change=True)
    replicas: int = option(
        SCALE, 1, "copies of the sharded model (HSDP); 1: sharded over all ranks", "[1, inf)", may_change=True)
    activation_checkpointing: bool = option(
        SCALE, False, "recompute activations in the backward pass", may_change=True)
    gather_once: Literal["auto", "on", "off"] = option(
        SCALE, "auto", "gather weights and reduce gradients once a step, not once a micro-batch: less "
        "traffic, for 6 bytes a parameter on every rank, 8 in float32; auto: where that is little", may_change=True)
    offload_importance: bool = option(
        SCALE, False, "keep importance map and anchor, 8 bytes a parameter, in host memory", may_change=True)
    beta1: float = option(SCALE, 0.9, "of AdamW, both RL's and SFT's", "[0, 1)")
    beta2: float = option(SCALE, 0.999, "of AdamW", "[0, 1)")
    weight_decay: float = option(SCALE, 0.01, "of AdamW", "[0, inf)")

    recipe: str = option(
        RUN, "", "TOML file of flags that come before those given; without it and without --model: the "
        "embedded task's", may_change=True)
    out: str = option(RUN, "runs/default", "folder of the run", may_change=True)
    dry_run: bool = option(RUN, False, "check all but the weights, show the first prompt, and exit", may_change=True)
    resume: bool = option(RUN, False, "go on after the newest checkpoint in --out", may_change=True)
    seed: int = option(RUN, 0, "of sampling, the order of questions, the embedded base model", "[0, inf)")
    save_every: int = option(RUN, 50, "steps between checkpoints; a new best is saved too", "[1, inf)", may_change=True)
    keep: int = option(RUN, 2, "newest checkpoints kept, beside the best one", "[1, inf)", may_change=True)
    evaluate: str = option(RUN, "", "benchmarks of eval.py, JSONL or parquet files, by commas; empty: nothing")
    eval_every: int = option(RUN, 0, "RL steps between evaluations; 0: before and after", "[0, inf)", may_change=True)
    eval_sft_phases: bool = option(RUN, False, "evaluate around each SFT phase: what is forgotten?", may_change=True)
    eval_k: int = option(RUN, 1, "responses per question in evaluations", "[1, inf)")
    eval_temperature: float = option(RUN, 0.6, "of sampling in evaluations; 0: greedy", "[0, inf)")
    track: Literal["off", "tensorboard", "wandb", "trackio"] = option(
        RUN, "off", "a package, if it is installed, that gets what metrics.jsonl gets", may_change=True)
    samples_logged: int = option(RUN, 4, "responses in samples.jsonl per RL step", "[0, inf)", may_change=True)
    check_limit: float = option(RUN, 5.0, "seconds for checking one answer, else timeout", "(0, inf)", may_change=True)
    step_limit: float = option(
        RUN, 120.0, "minutes; if a step and its evaluation take longer, each rank prints where it is and the run "
        "ends; 0: no limit", "[0, inf)", may_change=True)
# fmt: on


@dataclass(kw_only=True)
class Run:
    """Everything that a run works with, on this rank."""

    cfg: Config
    rank: int
    world: int
    device: torch.device
    mesh: object
    map_mesh: object  # of importance and anchor: of CPUs where they are offloaded
    dtype: torch.dtype  # of compute
    gather_once: bool  # what --gather-once came to
    model_dir: str  # of the initial model
    model_config: object
    tokenizer: object
    eos_ids: list[int]  # what ends a response
    pad_id: int
    questions: typing.Sequence[data.Question]
    demonstrated: set[int]  # questions whose demonstrations may be learnt
    holdout: list[int]  # and those whose may not, for --sft-holdout
    benches: dict[str, list[data.Question]]  # to evaluate on
    policy: Policy
    reference: Policy | None  # the initial model, for the KL
    behavior: Policy | None = None  # the demonstrations' author, for PEAR; loaded when asked
    optimizers: dict[str, torch.optim.AdamW]  # "rl", "sft"
    sampler: rollout.VLLMSampler | rollout.TorchSampler | None  # None where nothing is sampled
    checker: evaluation.Checker
    rewards: evaluation.Rewards | None  # judge in the checker's place
    state: State = field(default_factory=State)
    importance: list[Tensor]  # C, this rank's shards; empty where nothing is ever frozen
    anchor: list[Tensor]  # theta at the start of the current phase, RL or SFT; likewise
    pushed_at: int = -1  # the step whose weights the sampler holds
    log: dict = field(default_factory=dict)  # of the current step, for metrics.jsonl
    signal: int = 0  # that asked this rank to stop
    reward: float = 0.0  # of the last RL step, for the line of progress
    clock: float = 0.0  # when the current step began
    plotted: float = 0.0  # when the pictures were drawn last
    bar: tqdm | None = None  # of progress, on a terminal
    tracker: object = None  # of --track, on rank 0

    @contextmanager
    def timed(self, phase: str):
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.state.seconds[phase] = self.state.seconds.get(phase, 0.0) + seconds
        self.log[f"seconds/{phase}"] = self.log.get(f"seconds/{phase}", 0.0) + seconds

    @property
    def shards(self) -> list[Tensor]:
        """This rank's part of each parameter, as plain tensors that share its memory."""
        return [p.detach().to_local() for p in self.policy.parameters()]


@dataclass
class Response:
    id: str  # of its question
    prompt: list[int]
    tokens: list[int]
    rollout_logprobs: list[float]  # the engine's
    truncated: bool
    text: str
    verdict: str
    reward: float  # NaN: not judged
    rewards: dict[str, float] = field(default_factory=dict)  # of each function of --reward
    advantage: float = 0.0
    old_logprobs: list[float] | None = None  # the trainer's before the first of several updates


# --------------------------------------------------------------------------------------------------
# Sampling, and whether the engine computes what the trainer does


def sample(run: Run, questions: list[data.Question]) -> list[Response]:
    """G checked responses to each question, in order, alike on all ranks, which share the work."""
    cfg = run.cfg
    mine = range(run.rank, len(questions), run.world)
    prompts = [questions[i].prompt for i in mine]
    # Hashed: torch's generators take only the lower 32 bits on a CPU, so runs of several --seed
    # would have the same noise. None depends on which rank samples.
    seeds = [evaluation.question_seed(cfg.seed, str(run.state.drawn + i)) for i in mine]
    with run.timed("sample"):
        limit = cfg.max_response
        groups = run.sampler.sample(prompts, cfg.samples, seeds, limit, cfg.temperature)
    with run.timed("check"):
        asked = [questions[i] for i in mine for _ in range(cfg.samples)]
        samples = [s for group in groups for s in group]
        tokens = [s.tokens for s in samples]
        texts = [run.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]
        with stops_all(run):
            judged = evaluation.judge(asked, texts, tokens, run.checker, run.rewards)
        responses = []
        for q, s, text, (verdict, reward, rewards) in zip(asked, samples, texts, judged):
            responses.append(
                Response(
                    id=q.id,
                    prompt=q.prompt,
                    tokens=s.tokens,
                    rollout_logprobs=s.logprobs,
                    truncated=s.truncated,
                    text=text,
                    verdict=verdict,
                    reward=reward,
                    rewards=rewards,
                )
            )
    with run.timed("gather"):
        groups = [responses[i : i + cfg.samples] for i in range(0, len(responses), cfg.samples)]
        return [response for group in gather(run, groups) for response in group]


@contextmanager
def stops_all(run: Run):
    """A reward function's fault on one rank raises Stopped on all."""
    problem = ""
    try:
        yield
    except evaluation.RewardError as error:
        problem = str(error)
    if problems := list(filter(None, gather(run, [problem]))):
        raise Stopped(f"after step {run.state.step}: {problems[0]}")


def counts(cfg: Config, response: Response) -> bool:
    """Whether the loss's divisor counts it."""
    return not (math.isnan(response.reward) or cfg.mask_truncated and response.truncated)


def has_gradient(cfg: Config, response: Response) -> bool:
    """An advantage of 0 gives none, so such responses are not even computed."""
    return response.advantage != 0 and counts(cfg, response)


def stage(run: Run) -> list[int]:
    """What an SFT stage learns: all demonstrations, or --demonstration-budget of them at random."""
    indices = sorted(run.demonstrated)
    count = min(run.cfg.demonstration_budget or len(indices), len(indices))
    return sorted(indices[i] for i in data.draw(len(indices), run.cfg.seed, 0, count))


def next_demonstrations(run: Run) -> list[int]:
    """The next batch of --schedule alternate, from a stream of the stage's demonstrations."""
    cfg, indices = run.cfg, stage(run)
    done = len(run.state.demonstrations)
    return [indices[i] for i in data.draw(len(indices), cfg.seed, done, cfg.sft_batch)]


def within_budget(cfg: Config, state: State) -> list[int]:
    """Of the buffer what --demonstration-budget still pays for, in order; one that was used before
    costs nothing. Empty as soon as the budget is spent."""
    budget, used = cfg.demonstration_budget or math.inf, set(state.demonstrations)
    chosen = []
    if len(used) < budget:
        for index in state.buffer:
            if index in used or len(used) < budget:
                used.add(index)
                chosen.append(index)
    return chosen


@torch.no_grad()
def find_old_logprobs(run: Run, responses: list[Response]) -> None:
    """log pi_old of each token, by the trainer itself."""
    chosen = [r for r in responses if has_gradient(run.cfg, r)]
    mine = {}
    for part in micro_batches(run, [(r.prompt, r.tokens) for r in chosen]):
        logprobs, _ = run.policy(part.tokens, part.mask, run.cfg.temperature)  # [B, T-1]
        for row, index in enumerate(part.indices):
            mine[index] = logprobs[row][part.mask[row]].tolist()
    for found in gather(run, [mine]):
        for index, values in found.items():
            chosen[index].old_logprobs = values


def push_weights(run: Run) -> None:
    """Gives the sampler the current weights, if it has not got them; the first time, checks it."""
    if run.pushed_at == run.state.step:
        return
    first = run.pushed_at < 0
    with run.timed("push"):
        run.sampler.push(full_weights(run.policy, run.dtype))
    run.pushed_at = run.state.step
    if first:
        probe_engine(run)


def full_weights(policy: Policy, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each whole parameter, as the model's files name them. All ranks iterate.

    Last come what is kept beside the parameters: biases of a mixture of experts' router, say.
    """
    for name, parameter in policy.model.named_parameters():
        yield name, parameter.detach().to(dtype).full_tensor()
    for name, tensor in policy.model.state_dict().items():
        if not isinstance(tensor, DTensor):
            yield name, tensor


def probe_engine(run: Run) -> None:
    """Compares the engine with the trainer on one short response."""
    with run.timed("probe"):
        prompt = run.questions[0].prompt
        limit = min(16, run.cfg.max_response)
        [[response]] = run.sampler.sample([prompt], 1, [run.cfg.seed % 2**63], limit, 1.0)
        batch = data.collate([(prompt, response.tokens)], 0, engine=[response.logprobs])
        batch = {name: tensor.to(run.device) for name, tensor in batch.items()}
        with torch.no_grad():
            logprobs, _ = run.policy(batch["tokens"], batch["mask"], 1.0)
        gap = (logprobs - batch["engine"])[batch["mask"]].abs().mean().item()
        gap = max_over_ranks(run, gap)
    run.log["engine/probe_difference"] = gap
    check_engine(run, gap, "a probe after the weights were pushed")


def check_engine(run: Run, gap: float, where: str) -> None:
    """Raises Stopped if the engine's log-probabilities are not the trainer's."""
    bound = run.cfg.probe_bound or (1e-3 if run.dtype == torch.float32 else 0.15)
    if not gap <= bound:
        raise Stopped(
            f"{run.sampler.name} and the trainer differ by {gap:.3g} in a token's log-probability, "
            f"on average over {where}, above the bound of {bound} (--probe-bound): "
            "the engine does not hold the trainer's weights, or does not compute what it does"
        )


# --------------------------------------------------------------------------------------------------
# What the steps call


class Stopped(Exception):
    """Why a run cannot go on, in a line; raised on all ranks alike."""


@torch.no_grad()
def frozen_logprobs(
    model: Policy | None, part: SimpleNamespace, temperature: float
) -> Tensor | None:
    """A frozen model's log-probabilities [B, T-1] of a micro-batch; None without one."""
    return None if model is None else model(part.tokens, part.mask, temperature)[0]


def behavior_logprobs(run: Run, part: SimpleNamespace, given: list) -> Tensor:
    """log pi_beta [B, T-1]: the data's where it has them, else the behaviour model's.

    given: the data's for the whole batch, so that all ranks decide alike to ask the model.
    """
    if None not in given:
        return part.behavior
    if run.behavior is None:
        run.behavior = load_behavior(run)
    known = [given[index] is not None for index in part.indices] or [False]
    known = torch.tensor(known, device=run.device)[:, None]  # [B, 1]
    return torch.where(known, part.behavior, frozen_logprobs(run.behavior, part, 1.0))


def load_behavior(run: Run) -> Policy:
    """The model that wrote the demonstrations, frozen; without one, the policy before training."""
    cfg, config = run.cfg, run.model_config
    name = cfg.behavior_model or run.model_dir
    if cfg.behavior_model:
        remote = cfg.trust_remote_code
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=remote)
    say(f"PEAR: the behaviour model is {cfg.behavior_model or 'the policy before training'}")
    try:
        policy = load_policy(cfg, name, config, run.mesh, run.dtype, "--behavior-model")
    except ValueError as error:
        raise Stopped(str(error)) from None
    return policy.requires_grad_(False)


def pear_weights(cfg: Config, logprobs: Tensor, behavior: Tensor, mask: Tensor) -> Tensor:
    """Equation 10 with the flags' ranges; all [B, T-1]."""
    ratio_range = (cfg.pear_ratio_low, cfg.pear_ratio_high)
    weight_range = (cfg.pear_weight_low, cfg.pear_weight_high)
    return losses.pear_weights(
        logprobs,
        behavior,
        mask,
        cfg.pear,
        cfg.pear_gamma,
        cfg.pear_block,
        ratio_range,
        weight_range,
    )


def pear_shares(cfg: Config, weights: Tensor, mask: Tensor, tokens: int) -> dict[str, float]:
    """Of PEAR's weights [B, T-1] the mean, and the shares that are clipped: this micro-batch's part
    in those over all tokens of the step."""
    logs, rounding = weights[mask].log(), 1e-4
    return {
        "pear_weight": weights.sum().item() / tokens,
        "pear_at_floor": (logs < cfg.pear_weight_low + rounding).sum().item() / tokens,
        "pear_at_cap": (logs > cfg.pear_weight_high - rounding).sum().item() / tokens,
    }


@torch.no_grad()
def find_sed_tau(run: Run, indices: list[int]) -> float:
    """SED's tau by --sed-ratio, from the first hundred demonstrations and the policy as it is."""
    cfg, questions = run.cfg, [run.questions[index] for index in indices[:100]]
    masses = []
    for part in micro_batches(run, [(q.prompt, q.demonstration) for q in questions]):
        *_, top_mass = run.policy(part.tokens, part.mask, 1.0, cfg.sed_k)  # [B, T-1]
        masses += top_mass[part.mask].tolist()
    tau = losses.sed_threshold(torch.tensor(gather(run, masses)), cfg.sed_ratio)
    say(f"SED: tau is {tau:.4g}: {cfg.sed_ratio:g} of the tokens reach it")
    return tau


def sft_learning_rate(cfg: Config, state: State) -> float:
    """Constant, or over the whole stage: 10 % warm-up, then a cosine down to a tenth."""
    if cfg.sft_schedule == "constant":
        return cfg.sft_lr
    done = state.sft_steps / (state.sft_steps + 1 + len(state.sft_queue))  # share of the stage
    if done < 0.1:
        return cfg.sft_lr * done / 0.1
    return cfg.sft_lr * (0.55 + 0.45 * math.cos(math.pi * (done - 0.1) / 0.9))


def gather(run: Run, item: list) -> list:
    """All ranks' lists, interleaved: rank r's i-th entry comes to index i * world + r."""
    if run.world == 1:
        return item
    parts = [None] * run.world
    dist.all_gather_object(parts, item)
    longest = max(len(part) for part in parts)
    return [part[i] for i in range(longest) for part in parts if i < len(part)]


def sum_over_ranks(run: Run, values: dict[str, float]) -> dict[str, float]:
    """Each value's sum; all ranks have the same names."""
    parts = gather(run, [dict(values)])
    return {name: sum(part[name] for part in parts) for name in values}


def max_over_ranks(run: Run, value: float) -> float:
    """NaN if any rank has NaN."""
    return torch.tensor(gather(run, [value]), dtype=torch.float64).max().item()


def barrier(run: Run) -> None:
    if run.world > 1:
        dist.barrier()


def local_gradients(parameters: list[nn.Parameter]) -> list[Tensor | None]:
    """This rank's part of each gradient; None for a parameter that has none."""
    return [None if p.grad is None else p.grad.to_local() for p in parameters]


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Over all parameters and ranks."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def exchange_at_last(run: Run, last: bool) -> None:
    """--gather-once: ranks exchange gradients and weights at a step's last micro-batch only."""
    if run.gather_once:
        run.policy.set_requires_gradient_sync(last)
        run.policy.set_reshard_after_backward(last)
        run.policy.set_reshard_after_forward(last and not torch.is_grad_enabled())


def report_not_finite(run: Run, loss: Tensor, logprobs: Tensor, ids: list[str]) -> None:
    """Names the questions whose log-probabilities [B, T-1] made the loss NaN or infinite."""
    if loss.isfinite():
        return
    found = [name for name, row in zip(ids, logprobs) if not row.isfinite().all()]
    where = ", ".join(found[:8]) or f"none alone, of {len(ids)}"
    here = f"rank {run.rank}, step {run.state.step + 1}"
    print(f"{here}: a loss is {loss.item():.3g}: questions {where}", flush=True)


def skip_step(run: Run, loss: float) -> None:
    """Counts and reports a step that is not taken; raises Stopped at the last of SKIPS in a row."""
    state = run.state
    state.skipped += 1
    state.skips_in_a_row += 1
    run.log["skipped"] = state.skipped
    named = zip(run.policy.model.named_parameters(), local_gradients(list(run.policy.parameters())))
    names = [name for (name, _), g in named if g is not None and not g.isfinite().all()]
    names = list(dict.fromkeys(gather(run, names)))
    text = f"step {state.step + 1}: the loss is {loss:.3g}; {len(names)} gradients are not finite"
    text += f", the first that of {names[0]}" if names else ""
    say(f"skipped {text}")
    if state.skips_in_a_row >= SKIPS:
        raise Stopped(f"{SKIPS} steps in a row were skipped; {text}")


# --------------------------------------------------------------------------------------------------
# What the loop asks


def start_clock(run: Run) -> None:
    """Gives this rank --step-limit from now on: then it prints where each thread is, and exits."""
    run.clock = time.perf_counter()
    if run.cfg.step_limit:
        faulthandler.dump_traceback_later(60 * run.cfg.step_limit, exit=True)


def evaluation_due(cfg: Config, state: State, phase: str, following: str | None) -> bool:
    if following is None:
        return True
    if cfg.eval_sft_phases and phase != following:  # an SFT phase begins, or has ended
        return True
    return phase == "rl" and cfg.eval_every > 0 and state.rl_steps % cfg.eval_every == 0


def checkpoint_due(cfg: Config, state: State) -> bool:
    new_best = best_step(state) == state.step
    return new_best or state.step % cfg.save_every == 0


def signal_on_any_rank(run: Run) -> int:
    return int(max_over_ranks(run, run.signal))


def catch_signals(run: Run) -> None:
    """The first SIGTERM or Ctrl-C ends the run after its step, the second at once."""

    def handle(number, frame):
        if run.signal:
            os._exit(128 + number)
        run.signal = number
        if run.rank == 0:  # not by print, which the signal may have interrupted
            text = f"{signal.Signals(number).name}: the run ends after this step and a checkpoint; "
            os.write(2, (text + "once more: now\n").encode())

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)


# --------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(run: Run) -> None:
    """Samples answers to each benchmark's questions; adds a line to evaluations.jsonl."""
    measure_holdout(run)
    if not run.benches:
        return
    push_weights(run)
    probe_engine(run)
    cfg, state = run.cfg, run.state
    results, correct = {}, {}
    with run.timed("evaluate"):
        for name, questions in run.benches.items():
            with stops_all(run):
                rows = evaluation.evaluate(
                    run.sampler,
                    questions,
                    run.checker,
                    cfg.eval_k,
                    cfg.eval_temperature,
                    cfg.max_response,
                    cfg.seed,
                    lambda tokens: run.tokenizer.decode(tokens, skip_special_tokens=True),
                    run.rank,
                    run.world,
                    run.rewards,
                )
            rows = gather(run, rows)
            with stops_all(run):
                results[name] = evaluation.summarize(rows)
            correct[name] = [row["verdict"].count("correct") for row in rows]
    log_evaluation(run, results, correct)
    state.evals.append({"step": state.step, "rl_steps": state.rl_steps, "results": results})


@torch.no_grad()
def measure_holdout(run: Run) -> None:
    """The mean of -log p over the tokens of --sft-holdout: a line of holdout.jsonl."""
    if not run.holdout:
        return
    if run.sampler is not None:
        run.sampler.sleep()
    questions = [run.questions[index] for index in run.holdout]
    total = 0.0
    with run.timed("evaluate"):
        for part in micro_batches(run, [(q.prompt, q.demonstration) for q in questions]):
            total -= run.policy(part.tokens, part.mask, 1.0)[0].sum().item()
    tokens = sum(len(q.demonstration) for q in questions)
    run.log["holdout_nll"] = sum_over_ranks(run, {"nll": total})["nll"] / tokens
    append_line(run, "holdout.jsonl", {"nll": run.log["holdout_nll"]}, run.state.step)


# --------------------------------------------------------------------------------------------------
# What a run leaves behind


LOGS = (  # a line of each has its step, to which --resume cuts them back
    "metrics.jsonl",
    "samples.jsonl",
    "evaluations.jsonl",
    "holdout.jsonl",
    "movement.jsonl",
    "demonstrations.jsonl",
)


def say(*lines: str) -> None:
    """Prints on rank 0."""
    if int(os.environ["RANK"]) == 0:
        print(*lines, sep="\n", flush=True)


def place_of(name: str) -> tuple[str, str]:
    """(layer, kind) of a parameter: model.layers.3.mlp.up_proj.weight is (model.layers.3,
    mlp.up_proj). Further numbers, as those of experts, become *; without a layer the kind is "".
    """
    parts = name.removesuffix(".weight").split(".")
    end = 1 + next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    kind = ["*" if part.isdigit() else part for part in parts[end:]]
    return ".".join(parts[:end]), ".".join(kind)


@torch.no_grad()
def log_movement(run: Run, phase: Literal["rl", "sft"]) -> None:
    """How far a phase has moved each kind of matrix of each layer, for movement.jsonl.

    To be called where the phase ends, before the anchor moves: at an RL phase's end the threshold
    is already that of the SFT phase that follows. `moved` is the mean |theta - anchor|.
    """
    if not run.importance:
        return
    names = [name for name, _ in run.policy.model.named_parameters()]
    sums = {}
    for name, now, then, mask in zip(names, run.shards, run.anchor, frozen_masks(run)):
        moved = (now.to(then.device) - then).abs_().sum().item()
        found = [now.numel(), mask.count_nonzero().item(), moved]
        place = place_of(name)
        sums[place] = sums.get(place, 0) + torch.tensor(found, dtype=torch.float64)
    sums = sum_over_ranks(run, sums)
    layers = {}
    for (layer, kind), found in sums.items():
        entries, frozen, moved = found.tolist()
        shares = {"frozen": frozen / entries, "moved": moved / entries}
        entries = round(entries) // run.cfg.replicas
        layers.setdefault(layer, {})[kind] = {"entries": entries, **shares}
    entries, frozen, moved = sum(sums.values()).tolist()
    run.log[f"{phase}/movement"] = moved / entries
    if phase == "rl":
        run.log["sft/frozen_share"] = frozen / entries
        if frozen == 0:
            text = "nothing is frozen in this SFT phase, for RL has not moved any parameter yet"
            say(f"warning: {text}")
    append_line(run, "movement.jsonl", {"phase": phase, "layers": layers}, run.state.step + 1)


SHOWN, SHOWN_TOKENS = 2, 400  # demonstrations of each SFT phase that are pictured, and their length


@torch.no_grad()
def log_demonstrations(run: Run) -> None:
    """What an SFT phase will learn from its first demonstrations, for demonstrations.jsonl: each
    token's text and entropy before the phase, and whether it is chosen."""
    questions = [run.questions[index] for index in run.state.sft_queue[0][:SHOWN]]
    found = []
    for part in micro_batches(run, [(q.prompt, q.demonstration) for q in questions]):
        _, entropy = run.policy(part.tokens, part.mask, 1.0)  # [B, T-1]
        chosen = losses.top_entropy_mask(entropy, part.mask, run.cfg.rho)  # [B, T-1]
        for row, mine, values, picked in zip(part.indices, part.mask, entropy, chosen):
            found.append((row, values[mine].tolist(), picked[mine].int().tolist()))
    for row, entropy, chosen in sorted(gather(run, found)):
        tokens = questions[row].demonstration
        line = {
            "id": questions[row].id,
            "all_tokens": len(tokens),
            "all_chosen": sum(chosen),
            "texts": token_texts(run.tokenizer, tokens[:SHOWN_TOKENS]),
            "entropy": [round(value, 4) for value in entropy[:SHOWN_TOKENS]],
            "chosen": chosen[:SHOWN_TOKENS],
        }
        append_line(run, "demonstrations.jsonl", line, run.state.step + 1)


def token_texts(tokenizer, tokens: list[int]) -> list[str]:
    """What each token adds to the text. A character of several tokens stands at its last one; those
    before it are a middle dot each.
      bytes of "né" by three tokens  n, C3, A9 -> ["n", "·", "é"]
    """

    decode = lambda start, end: data.decode(tokenizer, tokens[start:end])
    texts, start, done = [], 0, 0  # text is shown up to `done`; `start` gives it its left neighbour
    for end in range(1, len(tokens) + 1):
        text = decode(start, end)[len(decode(start, done)) :]
        if text.endswith("\ufffd") and end - done < 4 and end < len(tokens):
            texts.append("·")
        else:
            texts.append(text)
            start, done = done, end
    return texts


def append_line(run: Run, name: str, values: dict, step: int) -> None:
    """A line of one of LOGS, on rank 0; step: whose checkpoint is the first that has it."""
    if run.rank != 0:
        return
    state = run.state
    line = {"step": step, "rl_steps": state.rl_steps, "sft_phases": state.sft_phases}
    with open(Path(run.cfg.out, name), "a") as file:
        file.write(json.dumps(line | values) + "\n")


def log_update(run: Run, loss: float, sums: dict[str, float], largest_gap: float) -> None:
    """An RL update's loss, and means over its tokens. Stops the run if the engine is off."""
    tokens = sums.pop("tokens")
    mean_gap = sums.pop("gap") / tokens
    run.log |= {f"rl/{name}": value / tokens for name, value in sums.items()}
    run.log["rl/loss"] = loss
    run.log["engine/max_difference"] = max_over_ranks(run, largest_gap)
    run.log["engine/mean_difference"] = mean_gap
    if math.isfinite(loss):
        check_engine(run, mean_gap, "the sampled tokens")


def log_responses(
    run: Run, questions: list[data.Question], responses: list[Response], accuracies: list[float]
) -> None:
    """The RL step's metrics, and a few of its responses for samples.jsonl."""
    cfg, state, n = run.cfg, run.state, len(responses)
    tokens = sum(len(r.tokens) for r in responses)
    state.sampled_tokens += tokens
    verdicts = Counter(r.verdict for r in responses)
    run.log["reward"] = mean_judged([r.reward for r in responses])
    run.log["groups/all_wrong"] = accuracies.count(0) / len(accuracies)
    run.log["groups/all_right"] = accuracies.count(1) / len(accuracies)
    run.log["response_tokens"] = tokens / n
    run.log["truncated"] = sum(r.truncated for r in responses) / n
    if run.rewards:
        for name in run.rewards.functions:
            run.log[f"rewards/{name}"] = mean_judged([r.rewards[name] for r in responses])
        run.log["answers/correct"] = verdicts["correct"] / n
        run.log["answers/unjudged"] = verdicts["unjudged"] / n
    else:
        run.log |= {f"answers/{verdict}": verdicts[verdict] / n for verdict in evaluation.VERDICTS}
    kinds = sorted({q.kind for q in questions})
    warning = no_answers(cfg, kinds, run.log["truncated"], verdicts["unparsed"] / n)
    if verdicts["unjudged"] == n:
        warning += "--reward returned None for every response: RL learns nothing. "
    elif state.rl_steps == 1 or state.warning:  # later it may be so because all is learnt
        if seen := equal_rewards(cfg, [r.reward for r in responses], accuracies):
            warning += f"In RL step {state.rl_steps} {seen}."
    state.warning = f"warning: {warning.rstrip()}" if warning else ""
    if state.rl_steps == 1 and state.warning:
        say(state.warning)
    if run.rank != 0 or cfg.samples_logged == 0:
        return
    every = max(1, n // cfg.samples_logged)
    with open(Path(cfg.out, "samples.jsonl"), "a") as file:
        for i in range(0, n, every)[: cfg.samples_logged]:
            question, response = questions[i // cfg.samples], responses[i]
            line = {
                "step": state.step + 1,
                "id": response.id,
                "prompt": run.tokenizer.decode(response.prompt),
                "response": response.text,
                "answer": question.answer,
                "verdict": response.verdict,
                "reward": none_for_nan(response.reward),
                "truncated": response.truncated,
            }
            if run.rewards:
                found = response.rewards.items()
                line["rewards"] = {name: none_for_nan(value) for name, value in found}
            file.write(json.dumps(line) + "\n")


def mean_judged(rewards: list[float]) -> float:
    """NaN if none was."""
    return torch.tensor(rewards, dtype=torch.float64).nanmean().item()


def none_for_nan(reward: float) -> float | None:
    return None if math.isnan(reward) else reward


def no_answers(cfg: Config, kinds: list[str], truncated: float, unparsed: float) -> str:
    """What to do, in sentences, if nearly no response of an RL step ended or held an answer."""
    text = ""
    if truncated >= 0.9:
        text += f"{truncated:.0%} of the responses were cut at --max-response {cfg.max_response}: "
        text += "raise it, or see in samples.jsonl why they do not end. "
    if unparsed >= 0.9:
        text += f"No answer was found in {unparsed:.0%} of the responses (see samples.jsonl). "
        for kind in kinds:
            if cfg.extract == "boxed" or kind not in ("math", "number"):
                text += f"What counts as an answer of kind {kind}: {evaluation.KINDS[kind].where}. "
        if cfg.require_think:
            text += "--require-think wants one closing </think> before them. "
        if "math" in kinds and cfg.extract == "boxed":
            text += (
                "Ask for the box by --system 'Put your final answer in \\boxed{}.', take answers from "
                "anywhere by --extract any, or name another kind in a column `kind`. "
            )
    return text


def equal_rewards(cfg: Config, rewards: list[float], accuracies: list[float]) -> str:
    """What was seen, if the rewards of an RL step tell no response to a question from another, or
    if --right-above lies beside all of them; else "". NaN: not judged."""
    rewards = torch.tensor(rewards, dtype=torch.float64).view(-1, cfg.samples)  # [Q, G]
    lowest = rewards.masked_fill(rewards.isnan(), math.inf).amin(1)  # [Q]
    highest = rewards.masked_fill(rewards.isnan(), -math.inf).amax(1)  # [Q]
    judged = [accuracy for accuracy in accuracies if not math.isnan(accuracy)]
    if cfg.rl_loss != "nft":
        equal, what = bool((lowest >= highest).all()), "all rewards of each question were equal"
    else:  # knows right and wrong only
        equal, what = set(judged) <= {0, 1}, "no question had both right and wrong responses"
    interleaves = cfg.schedule == "interleave"
    beside = bool(cfg.reward) and interleaves and set(judged) in ({0}, {1})
    said = []
    if equal:
        said.append(f"{what} (mean {rewards.nanmean().item():.2f}): RL learns nothing from them")
    if cfg.reward and (equal or beside):
        low, high = lowest.min().item(), highest.max().item()
        above = f"right means above --right-above {cfg.right_above:g}"
        said.append(f"rewards went from {low:g} to {high:g}, and {above}")
    if interleaves and (equal or beside):
        hard = sum(accuracy <= cfg.p for accuracy in judged)
        said.append(f"{hard} of {len(accuracies)} questions count as hard")
    return "; ".join(said)


def log_evaluation(run: Run, results: dict[str, dict], correct: dict[str, list[int]]) -> None:
    """The line of evaluations.jsonl; correct: of eval_k answers to each question, how many."""
    state = run.state
    run.log["evaluation/rl_steps"] = state.rl_steps
    run.log["evaluation"] = {}
    benches = {}
    for name, result in results.items():
        levels = {level: part["avg"] for level, part in result["levels"].items()}
        benches[name] = {"avg": result["avg"], "levels": levels, "correct": correct[name]}
        run.log["evaluation"][name] = result["avg"]
        if run.cfg.eval_k > 1:
            benches[name]["pass"] = result["pass"]
            k, passed = list(result["pass"].items())[-1]
            run.log[f"evaluation/pass@{k}/{name}"] = passed
        if "reward" in result:
            benches[name]["reward"] = run.log[f"evaluation/reward/{name}"] = result["reward"]
        if len(levels) > 1:
            by_level = {f"{name} {level}": average for level, average in levels.items()}
            run.log["evaluation"] |= by_level
    if run.rank == 0:
        line = {
            "step": state.step,
            "rl_steps": state.rl_steps,
            "sft_steps": state.sft_steps,
            "sft_phases": state.sft_phases,
            "sampled_tokens": state.sampled_tokens,
            "demonstrations": len(state.demonstrations),
            "benches": benches,
        }
        with open(Path(run.cfg.out, "evaluations.jsonl"), "a") as file:
            file.write(json.dumps(line) + "\n")


def log_step(run: Run, phase: str) -> None:
    """The step's line in metrics.jsonl, the plot every five minutes, and a word on the progress."""
    cfg, state, now = run.cfg, run.state, time.perf_counter()
    state.seconds["all"] = state.seconds.get("all", 0.0) + now - run.clock
    line = {
        "step": state.step,
        "phase": phase,
        "rl_steps": state.rl_steps,
        "sft_phases": state.sft_phases,
        "buffer": len(state.buffer),
        **run.log,
    }
    run.log = {}
    if run.rank != 0:
        return
    with open(Path(cfg.out, "metrics.jsonl"), "a") as file:
        file.write(json.dumps(line) + "\n")
    if run.tracker is not None:
        track(run, line)
    run.reward = line.get("reward", run.reward)
    text = (
        f"{phase.upper():3} reward {run.reward:.2f}  buffer {len(state.buffer)}/{cfg.buffer_size}  "
        f"SFT phases {state.sft_phases}"
    )
    last = not state.sft_queue
    if run.bar is not None:
        run.bar.set_description(text, refresh=False)
        run.bar.update(state.rl_steps - run.bar.n)
    elif phase == "sft" and cfg.schedule in STAGED and (state.sft_steps % 10 == 0 or last):
        of = state.sft_steps + len(state.sft_queue)
        loss, seconds = line["sft/loss"], state.seconds["all"]
        say(f"SFT step {state.sft_steps}/{of}  loss {loss:.3f}  {seconds:.0f} s")
    elif phase == "rl" and (state.rl_steps % 10 == 0 or state.rl_steps == cfg.steps):
        say(f"step {state.rl_steps}/{cfg.steps}  {text}  {state.seconds['all']:.0f} s")
    if now - run.plotted > 300:  # drawing takes longer than a small model's step
        pictures.draw(cfg.out)
        run.plotted = time.perf_counter()


def open_tracker(cfg: Config):
    """What --track names, on rank 0, else None. Raises ValueError if it cannot begin.

    A resumed run goes on as the same run of wandb or trackio: by the name in the file `tracker`.
    """
    if cfg.track == "off" or os.environ["RANK"] != "0":
        return None
    try:
        if cfg.track == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            return SummaryWriter(Path(cfg.out, "tensorboard"))
        mark = Path(cfg.out, "tracker")
        if not mark.exists():
            mark.write_text(f"{mark.resolve().parent.name}-{secrets.token_hex(4)}")
        name = mark.read_text()
        more = {"id": name[-8:], "dir": cfg.out} if cfg.track == "wandb" else {}
        package = importlib.import_module(cfg.track)
        return package.init(project="mifo", name=name, resume="allow", config=asdict(cfg), **more)
    except Exception as error:  # whatever a package of others may raise
        raise ValueError(f"--track {cfg.track}: {type(error).__name__}: {error}") from None


def track(run: Run, line: dict) -> None:
    """The numbers of a line of metrics.jsonl; evaluation's are evaluation/BENCHMARK."""
    numbers = {}
    for name, value in line.items():
        if isinstance(value, dict):
            numbers |= {f"{name}/{key}": number for key, number in value.items()}
        elif not isinstance(value, str):
            numbers[name] = value
    with tracking(run):
        if run.cfg.track == "tensorboard":
            for name, value in numbers.items():
                run.tracker.add_scalar(name, value, line["step"])
        else:
            run.tracker.log(numbers, step=line["step"])


@contextmanager
def tracking(run: Run):
    """What a tracker raises is said, and the run goes on without it."""
    try:
        yield
    except Exception as error:
        say(f"warning: --track {run.cfg.track}: {error}: it gets nothing more, metrics.jsonl does")
        run.tracker = None


def close_tracker(run: Run) -> None:
    if run.tracker is not None:
        with tracking(run):
            run.tracker.close() if run.cfg.track == "tensorboard" else run.tracker.finish()


def summary(run: Run) -> str:
    """The table at the end of a run."""
    state, lines = run.state, []
    if state.evals:
        first, last = state.evals[0]["results"], state.evals[-1]["results"]
        lines.append(f"{'accuracy':16} before   after")
        for name, after in last.items():
            lines.append(f"{name:16} {first[name]['avg']:6.3f}  {after['avg']:6.3f}")
            if run.cfg.eval_k > 1:
                before = list(first[name]["pass"].values())[-1]
                k, passed = list(after["pass"].items())[-1]
                lines.append(f"  {f'pass@{k}':14} {before:6.3f}  {passed:6.3f}")
            if "reward" in after:
                before = first[name]["reward"]
                lines.append(f"  {'mean reward':14} {before:6.3f}  {after['reward']:6.3f}")
            for level, result in after["levels"].items() if len(after["levels"]) > 1 else ():
                before = first[name]["levels"][level]["avg"]
                lines.append(f"  level {level:8} {before:6.3f}  {result['avg']:6.3f}")
    if held := pictures.read_log(run.cfg.out, "holdout.jsonl"):
        lines.append(f"{'holdout loss':16} {held[0]['nll']:6.3f}  {held[-1]['nll']:6.3f}")
        if regimes := pictures.regimes_of(held):
            counts = ", ".join(f"{n} {name}" for name, n in Counter(regimes).items())
            lines.append(f"  the SFT stage ended {regimes[-1]}, of {len(regimes)} values: {counts}")
    used, different = len(state.demonstrations), len(set(state.demonstrations))
    longest_first = sorted(state.seconds.items(), key=lambda item: -item[1])
    lines += [
        "",
        f"RL steps {state.rl_steps}, SFT phases {state.sft_phases} ({state.sft_steps} steps), "
        f"demonstrations used {used:,} ({different:,} different), "
        f"tokens sampled {state.sampled_tokens:,}",
        "seconds: " + ", ".join(f"{phase} {value:.1f}" for phase, value in longest_first),
    ]
    if run.cfg.schedule == "interleave" and state.sft_phases == 0:
        found, size = len(state.buffer), run.cfg.buffer_size
        lines.append(f"no SFT phase: {found} hard questions were found, --buffer-size is {size}")
    if state.warning:
        lines.append(state.warning)
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Checkpoints. One folder each, whole as soon as it has its name:
#   model/       the weights in Hugging Face format, with tokenizer and generation config
#   state/       float32 tensors in shards: weights, optimizers, importance, anchor (safetensors)
#   state.json   State and Config
#   SHA256SUMS   of all these files, as `sha256sum -c` reads it


def checkpoint_tensors(run: Run) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name; they share the run's memory."""

    def sharded(local: Tensor, like: DTensor) -> DTensor:
        shape, stride = like.shape, like.stride()
        return DTensor.from_local(
            local, run.map_mesh, like.placements, run_check=False, shape=shape, stride=stride
        )

    tensors = {}
    for i, (name, p) in enumerate(run.policy.model.named_parameters()):
        tensors[f"weight/{name}"] = p.detach()
        if run.importance:
            tensors[f"importance/{name}"] = sharded(run.importance[i], p)
            tensors[f"anchor/{name}"] = sharded(run.anchor[i], p)
        for which, optimizer in run.optimizers.items():
            for key, value in optimizer.state.get(p, {}).items():
                tensors[f"{which}/{key}/{name}"] = value
    return tensors


def file_of_each(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Which of a rank's files a tensor goes to: about 1 GiB each, for a file is built in memory."""
    files, size = {}, 0
    for name, tensor in tensors.items():
        files[name] = 1 + size // 2**30
        size += (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes
    return files


def save_checkpoint(run: Run) -> None:
    """Writes the state whole or not at all. Raises Stopped on all ranks if one cannot write."""
    cfg = run.cfg
    folder = Path(cfg.out, "checkpoints", f"step-{run.state.step:06d}")
    if folder.exists():
        return
    part = folder.with_suffix(".partial")
    with run.timed("save"):
        with together(run):
            if run.rank == 0:
                for left in folder.parent.glob("*.partial"):
                    shutil.rmtree(left)
                (part / "state").mkdir(parents=True)
        with together(run):
            tensors = checkpoint_tensors(run)
            writer = dcp.HuggingFaceStorageWriter(
                str(part / "state"), file_of_each(tensors), save_distributed=True
            )
            dcp.save(tensors, storage_writer=writer)
        weights = full_weights(run.policy, run.dtype)
        whole = {name: tensor.cpu() for name, tensor in weights if run.rank == 0}
        with together(run):
            if run.rank == 0:
                save_model(run, part / "model", whole)
                state = {"state": asdict(run.state), "config": asdict(cfg)}
                state["data"] = getattr(run.questions, "fingerprint", "")
                (part / "state.json").write_text(json.dumps(state))
        sums = []
        with together(run):
            files = sorted(path for path in part.rglob("*") if path.is_file())
            for file in files[run.rank :: run.world]:
                sync(file)
                sums.append(f"{digest(file)}  {file.relative_to(part)}\n")
        sums = gather(run, sums)
        with together(run):
            if run.rank == 0:
                (part / "SHA256SUMS").write_text("".join(sums))
                logs = Path(cfg.out).glob("*.jsonl")
                for path in (part / "SHA256SUMS", part / "model", part / "state", part, *logs):
                    sync(path)
                part.rename(folder)
                sync(folder.parent)
                remove_old(cfg, run.state)


def save_model(run: Run, folder: Path, weights: dict[str, Tensor]) -> None:
    """The model as transformers and vLLM load it: these weights, and all else as in training."""
    model, tokenizer = run.policy.model, run.tokenizer
    generation = model.generation_config
    model.generation_config = transformers.GenerationConfig()  # as it came, it may be refused
    model.save_pretrained(folder, state_dict=weights)
    model.generation_config = generation
    generation.eos_token_id = run.eos_ids
    generation._from_model_config = False  # or transformers would make it anew
    generation.to_json_file(folder / "generation_config.json")
    model.config.dtype = run.dtype  # save_pretrained writes that of the trainer's weights
    model.config.save_pretrained(folder)
    longest = max(tokenizer.model_max_length, run.cfg.max_position_embeddings)
    tokenizer.model_max_length = longest  # vLLM takes no longer texts
    tokenizer.save_pretrained(folder)


def remove_old(cfg: Config, state: State) -> None:
    """Leaves the newest --keep checkpoints and the best, to which checkpoints/best points."""
    folder = Path(cfg.out, "checkpoints")
    best = f"step-{best_step(state):06d}"
    if best_step(state) == state.step:
        (folder / "best.partial").symlink_to(best)
        (folder / "best.partial").replace(folder / "best")
    for old in checkpoints(cfg.out)[: -cfg.keep]:
        if old.name != best:
            shutil.rmtree(old.rename(old.with_suffix(".partial")))


def best_step(state: State) -> int:
    """The step, after the start, with the highest mean over the benchmarks, the first if several.

    0 if there is none.
    """

    def mean(evaluated: dict) -> float:
        results = evaluated["results"].values()
        return sum(result["avg"] for result in results) / len(results)

    return max((e for e in state.evals if e["step"]), key=mean, default={"step": 0})["step"]


@contextmanager
def together(run: Run):
    """All ranks' writing, and a barrier: what fails on one raises Stopped on all."""
    problem = ""
    try:
        yield
    except (OSError, SafetensorError) as error:
        problem = str(error)
    except dcp.CheckpointException as error:  # of any rank, on all
        problem = str(next(iter(error.failures.values()))[0])
    if problems := [text for text in gather(run, [problem]) if text]:
        left = checkpoints(run.cfg.out)
        last = f"the last is {left[-1]}" if left else "there is none"
        text = f"step {run.state.step}: the checkpoint could not be written: {problems[0]}; {last}"
        raise Stopped(text)


def sync(path: Path) -> None:
    """Onto the disk, so that it outlasts the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints(out: str) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    return sorted(path for path in Path(out, "checkpoints").glob("step-*") if not path.suffix)


def newest_whole(run: Run) -> Path:
    """The newest checkpoint whose files are as they were written; damaged ones are renamed.

    The ranks share the reading. Raises ValueError if there is none.
    """
    for folder in reversed(checkpoints(run.cfg.out)):
        found = []
        try:
            lines = (folder / "SHA256SUMS").read_text().splitlines()
            for line in lines[run.rank :: run.world]:
                expected, name = line.split("  ", 1)
                if digest(folder / name) != expected:
                    found.append(f"{name} is not as it was written")
        except (OSError, ValueError) as error:
            found.append(str(error))
        problems = gather(run, found)
        if not problems:
            return folder
        say(f"{folder} is damaged ({problems[0]}): renamed to {folder.name}.damaged")
        if run.rank == 0:
            folder.rename(folder.with_suffix(".damaged"))
        barrier(run)
    folder = Path(run.cfg.out, "checkpoints")
    raise ValueError(f"--resume: no checkpoint in {folder} is whole")


def load_checkpoint(run: Run, folder: Path) -> None:
    """Restores everything, on any number of ranks; cuts the logs back to the checkpoint's step."""
    saved = json.loads((folder / "state.json").read_text())
    if saved["data"] != getattr(run.questions, "fingerprint", ""):
        raise ValueError(
            f"--data {run.cfg.data}: other questions than those that the run in --out "
            f"{run.cfg.out} began with"
        )
    run.state = State(**saved["state"])
    reader = dcp.HuggingFaceStorageReader(str(folder / "state"))
    names = reader.read_metadata().state_dict_metadata.keys()
    for which, optimizer in run.optimizers.items():
        for name, p in run.policy.model.named_parameters():
            if f"{which}/step/{name}" in names:  # an optimizer that has taken no step has no state
                step = torch.zeros((), device=run.device)
                moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": step, **moments}
    tensors = checkpoint_tensors(run)
    dcp.load(tensors, storage_reader=reader)
    if run.rank == 0:
        for name in LOGS:
            cut_back(Path(run.cfg.out, name), run.state.step)


def cut_back(path: Path, step: int) -> None:
    """Leaves the whole lines of a log up to a step."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    write_whole(path, "".join(kept))


def write_whole(path: Path, text: str) -> None:
    """The file has either its old text or the new one, whenever this is interrupted."""
    path.with_suffix(".partial").write_text(text)
    path.with_suffix(".partial").replace(path)


# --------------------------------------------------------------------------------------------------
# Set-up, cheapest checks first


def set_up(cfg: Config) -> Run:
    """Loads all that a run needs. Raises ValueError with a line on what the user can mend."""
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # --step-limit says how long a rank may wait; while rank 0 checks the data, it is forever.
    backends = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backends, timeout=datetime.timedelta(days=7))
    mesh = make_mesh(cfg, device.type, world)
    dtype = torch.bfloat16 if cuda else torch.float32
    if cfg.dtype != "auto":
        dtype = getattr(torch, cfg.dtype)

    rewards = reward_functions(cfg)
    model_dir, config, tokenizer, config_edits = open_model(cfg, rank)
    workers = evaluation.checker_workers(world)
    checker = evaluation.Checker(workers, cfg.check_limit, cfg.extract, cfg.require_think)
    eos_ids = evaluation.eos_ids(model_dir, tokenizer)
    questions, benches = load_data(cfg, rank, tokenizer, checker, eos_ids, first_day(cfg))
    try_rewards(rewards, questions, benches, tokenizer)

    demonstrated = data.demonstrated(questions)
    # The same with every --seed, as a benchmark is.
    held = data.draw(len(demonstrated), 0, 0, cfg.sft_holdout)
    holdout = sorted(demonstrated[i] for i in held)

    policy = load_policy(cfg, model_dir, config, mesh, dtype)
    reference = None
    if cfg.kl_coef > 0:
        reference = load_policy(cfg, model_dir, config, mesh, dtype).requires_grad_(False)
    optimizers = {}
    for which, lr in (("rl", cfg.rl_lr), ("sft", cfg.sft_lr)):
        optimizers[which] = torch.optim.AdamW(
            policy.parameters(),
            lr,
            (cfg.beta1, cfg.beta2),
            weight_decay=cfg.weight_decay,
            fused=True,
        )
    sampler = None
    if cfg.schedule != "sft" or benches:
        sampler = rollout.make_sampler(
            cfg.sampler,
            model_dir,
            max_len=cfg.max_prompt + cfg.max_response,
            dtype=dtype,
            eos_ids=eos_ids,
            seed=cfg.seed,
            max_num_seqs=cfg.max_num_seqs,
            kv_cache_gib=cfg.kv_cache_gib,
            gpu_memory_utilization=cfg.gpu_memory_utilization,
            trust_remote_code=cfg.trust_remote_code,
            config_edits=config_edits,
        )
        say(f"sampler: {sampler.name}, because {sampler.why}")
    map_mesh = shards_of(cfg, mesh)
    map_device = device
    offloaded = cfg.offload_importance and cuda
    if offloaded:
        map_mesh = shards_of(cfg, make_mesh(cfg, "cpu", world))
        map_device = torch.device("cpu")
    shards = [p.detach().to_local() for p in policy.parameters()] if freezes(cfg) else []
    # Pinned, or each SFT step's copies to the GPU would be slow.
    like = {"device": map_device, "pin_memory": offloaded}
    return Run(
        cfg=cfg,
        rank=rank,
        world=world,
        device=device,
        mesh=mesh,
        map_mesh=map_mesh,
        dtype=dtype,
        gather_once=choose_gather_once(cfg, policy, world, device),
        model_dir=model_dir,
        model_config=config,
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        pad_id=tokenizer.pad_token_id or 0,
        questions=questions,
        demonstrated=set(demonstrated) - set(holdout),
        holdout=holdout,
        benches=benches,
        policy=policy,
        reference=reference,
        optimizers=optimizers,
        sampler=sampler,
        checker=checker,
        rewards=rewards,
        importance=[torch.zeros_like(shard, **like) for shard in shards],
        anchor=[torch.zeros_like(shard, **like) for shard in shards],
    )


def make_mesh(cfg: Config, device: str, world: int):
    shape = (cfg.replicas, world // cfg.replicas)
    return init_device_mesh(device, shape, mesh_dim_names=("replica", "shard"))


def shards_of(cfg: Config, mesh):
    """The mesh that parameters lie on: FSDP's, or with --replicas HSDP's."""
    return mesh if cfg.replicas > 1 else mesh["shard"]


def load_policy(
    cfg: Config, model_dir: str, config, mesh, dtype: torch.dtype, which: str = "--model"
) -> Policy:
    """float32 weights sharded by FSDP2, a unit a layer, copied over replicas; `dtype` computes.

    Raises ValueError naming the flag if this is no model that Policy can compute.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, config=config, dtype=torch.float32, trust_remote_code=cfg.trust_remote_code
    )
    # Without dropout, as the engine samples; transformers' own checkpointing needs train().
    policy = Policy(model).eval()
    mesh = shards_of(cfg, mesh)
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in layers_of(model):
        if cfg.activation_checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        fully_shard(layer, mesh=mesh, mp_policy=mixed)
    # A root left unsharded by a forward pass that no backward pass follows would hide its shards.
    fully_shard(policy, mesh=mesh, mp_policy=mixed, reshard_after_forward=True)
    model.to(mesh.device_type)  # buffers
    try:
        problem = check_logits(policy, dtype)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        line = str(error).strip().partition("\n")[0]
        problem = f"its decoder and head do not run on tokens ({type(error).__name__}: {line})"
    if problem:
        name = type(model).__name__
        raise ValueError(f"{which} {model_dir}: {name} cannot be trained here: {problem}")
    return policy


def layers_of(model) -> nn.ModuleList:
    """The decoder's layers: of all its lists of modules the one with the most parameters."""
    lists = [m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=nn.ModuleList())


@torch.no_grad()
def check_logits(policy: Policy, dtype: torch.dtype) -> str:
    """Why the policy does not compute what its model does; empty if it does.

    In the first of two rows the model gets known numbers as its head's outputs: what becomes of
    them tells policy.scale and policy.softcap. The second row's log-probabilities must then be
    those of the model's own logits.
    """
    model = policy.model
    head = model.get_output_embeddings()
    device = head.weight.device
    vocabulary = min(len(head.weight), len(model.get_input_embeddings().weight))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (2, 17), generator=generator).to(device)
    tokens[0, :9] = tokens[1, :9]  # the rows differ from the middle on
    known = torch.cat([torch.tensor([2.0**-10, 2.0**30]), torch.linspace(-100, 100, 14)])
    known = known.to(device)[:, None]  # [16, 1]

    def give_known(module, args, out):
        return torch.cat([known.expand(1, *out.shape[1:]), out[1:].float()])

    everywhere = torch.ones_like(tokens[:, 1:], dtype=torch.bool)
    policy(tokens, everywhere, 1.0)  # as FSDP's root, before the model inside is called by itself
    policy.unshard()
    with head.register_forward_hook(give_known):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.float()  # [2, 16, V]
    policy.reshard()
    policy.scale = (logits[0, 0, 0] / known[0]).item()  # the small one is not capped
    limit = logits[0, 1, 0].item()  # the large one is
    policy.softcap = limit if limit < 0.5 * policy.scale * known[1] else None
    expected = known * policy.scale
    if policy.softcap is not None:
        expected = policy.softcap * torch.tanh(expected / policy.softcap)
    expected = expected.expand(16, len(head.weight))
    if logits[0].shape != expected.shape or not torch.allclose(logits[0], expected, rtol=1e-4):
        return "its logits are not its head's outputs, nor scaled or soft-capped ones"

    if not logits[1].isfinite().all():
        return "its logits are not finite"
    logprobs, _ = policy(tokens, everywhere, 1.0)  # [2, 16]
    own = logits[1].log_softmax(-1)  # [16, V]
    own_logprobs = own.gather(1, tokens[1, 1:, None])[:, 0]
    bound = 1e-5 + own_logprobs.std() * (1e-3 if dtype == torch.float32 else 0.05)
    if not (logprobs[1] - own_logprobs).abs().mean() <= bound:
        return "its head's inputs are not its decoder's outputs"
    if not (logprobs[0, :8] - logprobs[1, :8]).abs().mean() <= bound:
        return "a token's log-probability depends on the tokens after it"
    return ""


def choose_gather_once(cfg: Config, policy: Policy, world: int, device: torch.device) -> bool:
    if cfg.gather_once != "auto" or world == 1:
        return cfg.gather_once == "on"
    parameters, memory = sum(p.numel() for p in policy.parameters()), memory_of_rank(device)
    once = whole_is_little(parameters, memory)
    say(
        f"--gather-once auto: {'on' if once else 'off'}, for whole weights and gradients would take "
        f"{8 * parameters / memory:.2%} of the {memory / 2**30:.1f} GiB of a rank"
    )
    return once


def memory_of_rank(device: torch.device) -> float:
    """Bytes of its GPU, or its share of the machine's; the least of all ranks, so that they decide
    alike."""
    if device.type == "cuda":
        size = torch.cuda.mem_get_info()[1]
    else:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))  # ranks
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / here
    least = torch.tensor(float(size), dtype=torch.float64)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return least.item()


def whole_is_little(parameters: int, memory: float) -> bool:
    """Whether whole float32 weights and gradients take at most a twentieth of memory (bytes).

    Estimates of what else a step takes are no closer than that; and larger models (above 500M
    parameters on 80 GB) compute so long between two gathers that they would gain little.
    """
    return 8 * parameters <= memory / 20


def open_model(cfg: Config, rank: int):
    """(folder or Hub id, configuration, tokenizer, edits for the engine).

    Makes the embedded task's base model first.
    """
    model_dir = cfg.model or str(Path(cfg.out).parent / f"sums-base-{cfg.seed}")
    if not cfg.model and not Path(model_dir, "tokenizer.json").exists():
        dist.barrier()
        if rank == 0:
            say(f"making the embedded task's base model in {model_dir}")
            part = Path(f"{model_dir}.{os.getpid()}.partial")  # another run may be making it too
            tokenizer = data.embedded_tokenizer()
            data.make_base(part, cfg.seed, tokenizer, data.base_sum, say=say)
            if Path(model_dir).exists():
                shutil.rmtree(part)
            else:
                part.rename(model_dir)
        dist.barrier()
    config, tokenizer = read_model(cfg, "--model", model_dir)
    if cfg.behavior_model:
        _, other = read_model(cfg, "--behavior-model", cfg.behavior_model)
        if other.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"--behavior-model {cfg.behavior_model} has another tokenizer than --model; "
                "PEAR compares the two token by token"
            )
    return model_dir, config, tokenizer, edit_config(cfg, config)


def read_model(cfg: Config, which: str, name: str):
    """(configuration, tokenizer). Raises ValueError naming the flag."""
    try:
        return evaluation.read_model(name, cfg.trust_remote_code)
    except ValueError as error:
        raise ValueError(f"{which} {error}") from None


def edit_config(cfg: Config, config) -> dict:
    """Sets the context by --rope-theta and --max-position-embeddings; prompt and response must fit.

    Returns what was set, for the engine, which reads the configuration by itself.
    """
    edits = {}
    bases = rotary_bases(config)
    if cfg.rope_theta and len(bases) != 1:
        bases = ", ".join(f"{base:,.0f}" for base in bases) or "none"
        raise ValueError(
            f"--rope-theta sets a model's one rotary base; those of {config.model_type}: {bases}"
        )
    if cfg.max_position_embeddings and not bases:
        raise ValueError(
            f"--max-position-embeddings needs rotary positions, and {config.model_type} has others"
        )
    if cfg.rope_theta:
        edits["rope_parameters"] = {**config.rope_parameters, "rope_theta": cfg.rope_theta}
    if cfg.max_position_embeddings:
        edits["max_position_embeddings"] = cfg.max_position_embeddings
    for name, value in edits.items():
        setattr(config, name, value)
    context = getattr(config.get_text_config(), "max_position_embeddings", math.inf)
    if cfg.max_prompt + cfg.max_response > context:
        raise ValueError(
            f"--max-prompt {cfg.max_prompt} and --max-response {cfg.max_response} do not fit in "
            f"the model's context of {context} tokens: lower them"
            + (", or extend it by --max-position-embeddings and --rope-theta" if bases else "")
        )
    return edits


def rotary_bases(config) -> list[float]:
    """Of a model's rotary positions: none where it has others, several where layers differ."""
    found = getattr(config.get_text_config(), "rope_parameters", None) or {}
    parts = [found, *(part for part in found.values() if isinstance(part, dict))]
    return sorted({part["rope_theta"] for part in parts if "rope_theta" in part})


def first_day(cfg: Config) -> datetime.date:
    """When the run in --out began: some chat templates write the date, and a run that goes on must
    have the prompts it began with."""
    path = Path(cfg.out, "date")
    if os.environ["RANK"] == "0" and not (cfg.resume and path.exists()):
        write_whole(path, str(datetime.date.today()))
    dist.barrier()
    return datetime.date.fromisoformat(path.read_text())


def load_data(cfg: Config, rank: int, tokenizer, checker, eos_ids: list[int], today):
    """The questions to train on, and those of each benchmark to evaluate on.

    eos_ids: what ends a response; today: for chat templates that write the date.
    """
    system = {"data": None, "none": ""}.get(cfg.system, cfg.system)
    if not cfg.data:
        questions = data.embedded_questions(tokenizer, "train", data.TRAIN_SUMS)
    else:
        for turn in (0, 1):  # rank 0 checks the rows and remembers the outcome, the others read it
            if (rank == 0) == (turn == 0):
                questions = data.load_questions(
                    cfg.data,
                    tokenizer,
                    max_prompt=cfg.max_prompt,
                    max_response=cfg.max_response,
                    checker=None if cfg.reward else checker,
                    rewarded=bool(cfg.reward),
                    behavior=cfg.pear != "off",
                    question_field=cfg.question_field,
                    answer_field=cfg.answer_field,
                    solution_field=cfg.solution_field,
                    system=system,
                    generation_prefix=cfg.generation_prefix,
                    template=cfg.template,
                    today=today,
                    eos_ids=eos_ids,
                    split=cfg.split,
                    config=cfg.data_config,
                    revision=cfg.revision,
                )
            dist.barrier()
        say(f"{cfg.data}: {questions.report()}")
        if cfg.system == "data":
            system = data.system_prompt(questions)
    if cfg.schedule != "sft" and len(questions) < cfg.questions:
        text = f"{len(questions)} questions for --questions {cfg.questions}"
        say(f"{text}: some stand several times in a step")
    most = len(data.demonstrated(questions)) - cfg.sft_holdout
    if cfg.sft_holdout and most < 1:
        raise ValueError(
            f"--sft-holdout {cfg.sft_holdout} leaves none of the {most + cfg.sft_holdout} "
            "demonstrations to learn from"
        )
    if most == 0 and cfg.schedule != "rl":
        raise ValueError(
            f"--schedule {cfg.schedule} needs demonstrations, and no question of --data {cfg.data} "
            "has one; --schedule rl needs none"
        )
    if cfg.schedule == "interleave" and cfg.buffer_size > most:
        raise ValueError(
            f"--buffer-size {cfg.buffer_size} would never be reached: {most} questions have a "
            "demonstration to learn from; lower it, or train by --schedule rl"
        )
    benches = {}
    for name in filter(None, cfg.evaluate.split(",")):
        benches[name] = evaluation.load_questions(
            name,
            tokenizer,
            system,
            cfg.generation_prefix,
            rewarded=bool(cfg.reward),
            checker=checker if rank == 0 else None,
            question_field=cfg.question_field,
            answer_field=cfg.answer_field,
            template=cfg.template,
            today=today,
        )
        longest = max(benches[name], key=lambda question: len(question.prompt))
        if len(longest.prompt) > cfg.max_prompt:
            raise ValueError(
                f"--evaluate {name}: question {longest.id} has a prompt of {len(longest.prompt)} "
                f"tokens, --max-prompt is {cfg.max_prompt}"
            )
    return questions, benches


def reward_functions(cfg: Config) -> evaluation.Rewards | None:
    return evaluation.load_rewards(cfg.reward, cfg.reward_weights, cfg.right_above)


def shown(questions: typing.Sequence[data.Question]) -> data.Question:
    """The first that has a demonstration, if any has."""
    return questions[(data.demonstrated(questions) or [0])[0]]


def try_rewards(rewards, questions, benches, tokenizer) -> dict[str, float]:
    """Each function's reward of a demonstration. Raises ValueError where one would end the run."""
    if rewards is None:
        return {}
    for bench in benches.values():
        evaluation.try_rewards(rewards, bench[0], tokenizer)
    return evaluation.try_rewards(rewards, shown(questions), tokenizer)


def described(config) -> str:
    config = config.get_text_config()
    text = f"{config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size}"
    if context := getattr(config, "max_position_embeddings", None):
        text += f", context {context:,}"
    if bases := rotary_bases(config):
        text += ", rotary base " + " and ".join(f"{base:,.0f}" for base in bases)
    return text


def dry_run(cfg: Config) -> str:
    """Resolves model, tokenizer, data and benchmarks as a run would, and says what it found.

    Raises ValueError like set_up. Needs no GPU, and no rank but this one.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model_dir, config, tokenizer, _ = open_model(cfg, 0)
        limits = (cfg.check_limit, cfg.extract, cfg.require_think)
        with evaluation.Checker(evaluation.checker_workers(1), *limits) as checker:
            eos_ids = evaluation.eos_ids(model_dir, tokenizer)
            today = datetime.date.today()
            questions, benches = load_data(cfg, 0, tokenizer, checker, eos_ids, today)
        rewards = try_rewards(reward_functions(cfg), questions, benches, tokenizer)
    finally:
        dist.destroy_process_group()

    indices = data.demonstrated(questions)
    question = shown(questions)
    prompt, response = question.prompt, question.demonstration or []
    ends = " or ".join(repr(data.decode(tokenizer, [i])) for i in eos_ids)
    found = questions.report() if cfg.data else f"{len(questions)} questions"
    problem = "asked for" if cfg.sampler == "torch" else rollout.vllm_problem()
    template = "with" if tokenizer.chat_template else "without"
    anywhere = cfg.extract == "any" and question.kind in ("math", "number")
    if cfg.reward:
        of = "the demonstration below" if indices else "an empty response"
        judged = []
        for name, value in rewards.items():
            value = "None, not judged" if math.isnan(value) else f"{value:g}"
            judged.append(f"reward     {name}: {value}, of {of}")
    else:
        place = "anywhere" if anywhere else evaluation.KINDS[question.kind].where
        judged = [f"answers    of kind {question.kind}, in a response: {place}"]
    return "\n".join(
        [
            f"model      {model_dir}: {described(config)}; its weights were not read",
            f"tokenizer  {type(tokenizer).__name__}, {len(tokenizer):,} tokens, {template} a chat "
            f"template; a response ends with {ends}",
            f"sampler    on this machine {'PyTorch: ' + problem if problem else 'vLLM'}",
            f"data       {cfg.data or 'the embedded task'}: {found}; {len(indices):,} with a "
            "demonstration",
            *(f"evaluate   {name}: {len(bench):,} questions" for name, bench in benches.items()),
            *judged,
            "",
            f"the first question{' that has a demonstration' if indices else ''}: gold answer "
            f"{question.answer!r}, prompt of {len(prompt):,} tokens, response of "
            f"{len(response):,}; they meet at <<<|>>>",
            f"{data.decode(tokenizer, prompt)}<<<|>>>{data.decode(tokenizer, response)}",
            "",
            "dry run: settings, tokenizer and data are in place; the weights were not tried",
        ]
    )


# --------------------------------------------------------------------------------------------------
# The command line


def parse_config(argv: list[str]) -> Config:
    """Defaults, then the recipe's flags, then those given. Raises ValueError with one line."""
    parser = make_parser()
    flags = vars(parser.parse_args(argv))
    embedded = "model" not in flags and "data" not in flags
    recipe = flags.get("recipe") or (str(ROOT / "recipes" / "embedded.toml") if embedded else "")
    values = {}
    if recipe:
        try:
            values = vars(parser.parse_args(read_recipe(Path(recipe))))
        except ValueError as error:
            raise ValueError(f"--recipe {recipe}: {error}") from None
    cfg = Config(**{**values, **flags, "recipe": recipe})
    cfg.generation_prefix = evaluation.line_breaks(cfg.generation_prefix)
    check_config(cfg, int(os.environ["WORLD_SIZE"]))
    return cfg


def make_parser() -> argparse.ArgumentParser:
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise ValueError(message)

    parser = Parser(
        "mifo.py",
        usage="torchrun --standalone mifo.py [flags]",
        description=__doc__.partition("The method,")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    types = typing.get_type_hints(Config)
    groups = {}
    for f in dataclasses.fields(Config):
        name = f.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        bounds = f", in {f.metadata['bounds']}" if f.metadata["bounds"] else ""
        known = {
            "default": argparse.SUPPRESS,
            "help": f"{f.metadata['help']} [{f.default!r}{bounds}]".replace("%", "%%"),
        }
        choices = typing.get_args(types[f.name])
        if types[f.name] is bool:
            known["action"] = argparse.BooleanOptionalAction
        elif choices:
            known["choices"] = choices
        else:
            known |= {"type": types[f.name], "metavar": f.name.upper()}
        groups[name].add_argument(flag(f.name), **known)
    return parser


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def read_recipe(path: Path) -> list[str]:
    """A TOML file's settings as flags: steps = 7 is --steps=7, resume = false is --no-resume."""
    try:
        values = tomllib.loads(path.read_text())
    except OSError:
        raise ValueError("there is no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not valid TOML: {error}") from None
    flags = []
    for name, value in values.items():
        if name == "recipe":
            raise ValueError("a recipe cannot name another one")
        if isinstance(value, bool):
            flags.append(flag(name if value else f"no_{name}"))
        else:
            flags.append(f"{flag(name)}={value}")
    return flags


def check_config(cfg: Config, world: int) -> None:
    """Raises ValueError, naming the flag, for all that can be refused before anything is loaded."""
    for f in dataclasses.fields(cfg):
        value, bounds = getattr(cfg, f.name), f.metadata["bounds"]
        if bounds and not within(value, bounds):
            raise ValueError(f"{flag(f.name)} must be in {bounds}, not {value}")

    def must(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(message)

    def divides(name: str, by: int, what: str) -> None:
        value = getattr(cfg, name)
        must(value % by == 0, f"{flag(name)} {value} is not a multiple of {what}")

    out, staged = Path(cfg.out), cfg.schedule in STAGED
    must(not out.exists() or out.is_dir(), f"--out {cfg.out} is not a folder")
    divides("questions", world, f"{world}, the number of ranks")
    divides("questions", cfg.updates, f"--updates {cfg.updates}")
    must(
        world % cfg.replicas == 0,
        f"{world}, the number of ranks, is not a multiple of --replicas {cfg.replicas}",
    )
    must(
        bool(cfg.model) == bool(cfg.data),
        "--model and --data go together: give both, or neither for the embedded task",
    )
    must(
        cfg.schedule == "sft" or cfg.steps > 0,
        f"--steps must be at least 1 with --schedule {cfg.schedule}",
    )
    must(not cfg.behavior_model or cfg.pear != "off", "--behavior-model is of use only with --pear")
    for low, high in (
        ("pear_ratio_low", "pear_ratio_high"),
        ("pear_weight_low", "pear_weight_high"),
    ):
        below = getattr(cfg, low) < getattr(cfg, high)
        must(
            below,
            f"{flag(low)} {getattr(cfg, low)} must be below {flag(high)} {getattr(cfg, high)}",
        )
    must(
        cfg.sft_schedule == "constant" or staged,
        f"--sft-schedule {cfg.sft_schedule} is for an SFT stage, which --schedule {cfg.schedule} "
        "does not have",
    )
    for name in ("pear", "sft_weights", "sed", "demonstration_budget"):
        value = getattr(cfg, name)
        must(
            cfg.schedule != "rl" or value == getattr(Config, name),
            f"{flag(name)} {value} is for SFT, which --schedule rl does not do",
        )
    must(
        cfg.rl_share == Config.rl_share or cfg.schedule == "alternate",
        f"--rl-share {cfg.rl_share} is for --schedule alternate",
    )
    for name, plain in (("normalize_std", False), ("kl_coef", 0.0), ("tis_cap", 0.0)):
        must(
            cfg.rl_loss != "nft" or getattr(cfg, name) == plain,
            f"--rl-loss nft is not defined with {flag(name)}",
        )
    must(
        cfg.rl_loss != "nft" or cfg.aggregation != "sequence",
        "--rl-loss nft is not defined with --aggregation sequence: take token or constant",
    )
    must(
        bool(cfg.evaluate) or cfg.eval_every == 0,
        f"--eval-every {cfg.eval_every} needs --evaluate: what to evaluate on",
    )
    must(
        bool(cfg.evaluate) or not cfg.eval_sft_phases,
        "--eval-sft-phases needs --evaluate: what to evaluate on",
    )
    of_data = "split data_config revision question_field answer_field solution_field system "
    for name in (of_data + "generation_prefix template").split():
        must(
            bool(cfg.data) or getattr(cfg, name) == getattr(Config, name),
            f"{flag(name)} goes with --data; the embedded task has its own",
        )
    package = None if cfg.track == "off" else importlib.util.find_spec(cfg.track)
    must(
        cfg.track == "off" or (package is not None and package.origin is not None),
        f"--track {cfg.track}: the package {cfg.track} is not installed: pip install {cfg.track}",
    )
    check_file("--data", cfg.data)
    evaluation.check_reward_flags(cfg)
    reward_functions(cfg)
    for name in filter(None, cfg.evaluate.split(",")):
        known = name == "sums" or name in evaluation.BENCHES or Path(name).suffix in data.FILES
        benches, files = ", ".join(evaluation.BENCHES), ", ".join(data.FILES)
        must(known, f"--evaluate: {name!r} is none of {benches}, sums, nor a file of {files}")
        check_file("--evaluate", name)


def within(value: float, bounds: str) -> bool:
    """Whether a value lies in an interval: 0 is in "[0, 1)", 1 is not; NaN is in none."""
    low, high = (float(bound) for bound in bounds[1:-1].split(","))
    above = low <= value if bounds[0] == "[" else low < value
    below = value <= high if bounds[-1] == "]" else value < high
    return above and below


def check_file(name: str, path: str) -> None:
    if Path(path).suffix in data.FILES and not Path(path).is_file():
        raise ValueError(f"{name}: there is no file {path}")


def open_folder(cfg: Config) -> bool:
    """Whether --out holds a run to go on with. Raises ValueError if the flags say otherwise."""
    out = Path(cfg.out)
    if not cfg.resume:
        if (out / "metrics.jsonl").exists():
            raise ValueError(
                f"--out {cfg.out} holds a run already: continue it by --resume, or give another "
                "folder"
            )
        return False
    if not checkpoints(cfg.out):
        raise ValueError(f"--resume: there is no checkpoint in {out / 'checkpoints'}")
    try:
        before = json.loads((out / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--resume: {out / 'config.json'}: {error}") from None
    refused, taken = [], []
    for f in dataclasses.fields(cfg):
        old, new = before.get(f.name), getattr(cfg, f.name)
        if old == new:
            continue
        if not f.metadata["may_change"]:
            refused.append(f"{flag(f.name)} was {old!r} and is {new!r}")
        elif f.name != "resume":
            taken.append(f"{f.name} {old!r} -> {new!r}")
    if refused:
        model = checkpoints(cfg.out)[-1] / "model"
        raise ValueError(
            f"--resume: {'; '.join(refused)}: this would be another run. Start one from its "
            f"weights by --model {model}, or give the values it began with"
        )
    if taken:
        say(f"changed since the run began: {', '.join(taken)}")
    return True


def lock_folder(cfg: Config):
    """Makes --out and holds its lock, on rank 0. Raises ValueError if another run has it."""
    if os.environ["RANK"] != "0":
        return None
    try:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        lock = open(Path(cfg.out, "lock"), "w")
    except OSError as error:
        raise ValueError(f"--out {cfg.out}: cannot be written to: {error}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"--out {cfg.out}: another run is at work there") from None
    return lock


def settings(cfg: Config) -> str:
    """Those that differ from the defaults."""
    changed = []
    for f in dataclasses.fields(cfg):
        if getattr(cfg, f.name) != f.default:
            changed.append(f"{f.name} {getattr(cfg, f.name)!r}")
    text = "settings other than the defaults: " + (", ".join(changed) or "none")
    return textwrap.fill(text, 100, subsequent_indent="  ", break_long_words=False)


MEMORY = "lower --micro-tokens or --gpu-memory-utilization, or give --activation-checkpointing"


def main() -> int:
    """The exit code: 0, 1 for a run that could not go on, 2 for wrong input, 128 + a signal."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        os.environ.setdefault(name, "0")  # without torchrun: one rank
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "localhost")
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        death = 1  # PR_SET_PDEATHSIG: a rank does not outlive torchrun, keeping its GPU
        ctypes.CDLL(None).prctl(death, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training begins there is nothing to save
    transformers.utils.logging.disable_progress_bar()
    try:
        cfg = parse_config(sys.argv[1:])
        say(settings(cfg))
        found = open_folder(cfg)
        if cfg.dry_run:
            if os.environ["RANK"] == "0":
                say("", dry_run(cfg))
            return 0
        lock = lock_folder(cfg)  # noqa: F841  held as long as this file is open
        tracker = open_tracker(cfg)
        run = set_up(cfg)
        run.tracker = tracker
        if found:
            load_checkpoint(run, newest_whole(run))
            say(f"resumed after step {run.state.step}: RL step {run.state.rl_steps} of {cfg.steps}")
    except Exception as error:  # out of memory, too: a rank that lingers keeps the others waiting
        return evaluation.fail("mifo.py: error", error, ValueError, 2, memory=MEMORY)
    try:
        stop = run_to_end(run, found)
        last = checkpoints(cfg.out)[-1]
        if stop:
            name = signal.Signals(stop).name
            say(f"stopped by {name} after step {run.state.step}; --resume goes on from {last}")
            return 128 + stop
        say("", summary(run), "", f"model: {last / 'model'}   plot: {Path(cfg.out, 'plot.png')}")
        run.checker.close()
        barrier(run)
        return 0
    except Exception as error:
        step = f", step {run.state.step}"
        return evaluation.fail("mifo.py: error", error, Stopped, 1, step, memory=MEMORY)


def run_to_end(run: Run, resumed: bool) -> int:
    """train() with what surrounds it: signals, the watchdog, the progress bar, the last plot."""
    cfg = run.cfg
    if run.rank == 0:
        write_whole(Path(cfg.out, "config.json"), json.dumps(asdict(cfg), indent=1))
        for name in () if resumed else LOGS:  # of a run that did not live to the end of a step
            Path(cfg.out, name).unlink(missing_ok=True)
        if sys.stderr.isatty():
            done = run.state.rl_steps
            run.bar = tqdm(total=cfg.steps, initial=done, unit="step", dynamic_ncols=True)
    catch_signals(run)
    start_clock(run)
    run.plotted = time.perf_counter()
    if resumed and run.sampler is not None:
        push_weights(run)
        run.log.clear()  # a run that was never interrupted did not do this now
    try:
        stop = train(run)
    finally:  # for main() ends the process where it stands
        close_tracker(run)
    faulthandler.cancel_dump_traceback_later()
    if run.bar is not None:
        run.bar.close()
    if run.rank == 0:
        pictures.draw(cfg.out)
    return stop


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # where Python ends a process with a gloo group, it is at times aborted
