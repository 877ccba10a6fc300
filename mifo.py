"""MIFO: train a reasoning model by GRPO, interleaved with SFT on the questions that GRPO cannot solve (arXiv 2510.04454).

    torchrun --standalone mifo.py                                                  # the embedded task, in minutes on a CPU
    torchrun --standalone --nproc-per-node 8 mifo.py --recipe recipes/qwen2.5-math-1.5b.toml
    torchrun ... mifo.py ... --resume                                              # go on after the last checkpoint

One step is either an RL step (sample, check, update) or an SFT step (one optimizer step on demonstrations). The state of a
run says which comes next, and a checkpoint may fall between any two, so an SFT phase can be interrupted like anything else.
"""

import argparse
import ctypes
import dataclasses
import datetime
import faulthandler
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import tomllib
import typing
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # as torchrun does for several ranks: threads that spin starve each other

import numpy as np

import data  # before transformers: it hides packages that break its import
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import eval as evaluation
import freeze
import losses
import rollout

ROOT = Path(__file__).parent
GPU_GIB = 79.0  # what a card of "80 GB" has to give
ALLOWANCE = (
    3 * 2**30
)  # bytes a rank: CUDA context, NCCL's buffers, CUDA graphs, which a sleeping engine keeps
ENGINE_WORK = 2 * 2**30  # bytes: vLLM's activations and logits, beside its weights and KV cache
SKIPS = 3  # steps in a row that are skipped for numbers that are not finite, before the run ends


def option(default, meaning: str):
    return field(default=default, metadata={"help": meaning})


@dataclass
class Config:
    # the run
    recipe: str = option(
        "",
        "TOML file of defaults for the flags below; without it and without --model: the embedded task's",
    )
    out: str = option(
        "runs/default",
        "folder of the run: metrics.jsonl, samples.jsonl, evaluations.jsonl, plot.png, checkpoints",
    )
    dry_run: int = option(
        0,
        "ranks to plan for: check everything short of loading weights, print the memory a GPU takes, and exit",
    )
    resume: bool = option(False, "go on after the newest checkpoint in --out")
    seed: int = option(0, "of sampling, the order of questions, and the embedded task's base model")
    schedule: Literal["interleave", "rl", "sft", "sft-then-rl"] = option(
        "interleave",
        "MIFO's interleaving; or GRPO alone; SFT on all demonstrations alone; that and then GRPO",
    )
    steps: int = option(500, "RL steps")
    save_every: int = option(
        50, "steps, RL and SFT alike, between checkpoints; one more is written at the end"
    )
    keep: int = option(2, "newest checkpoints kept, beside the one with the best evaluation")
    eval_every: int = option(0, "RL steps between evaluations; 0: only before and after training")
    eval_sft_phases: bool = option(
        False, "evaluate just before and just after each SFT phase, too: what does it make forget?"
    )
    samples_logged: int = option(4, "responses written to samples.jsonl at each RL step")
    step_limit: float = option(
        120.0,
        "minutes; if a step and its evaluation take longer, each rank prints where it is and the "
        "run ends; 0: no limit",
    )
    # model and data
    model: str = option(
        "", "Hub id or folder of the model to train; empty: the embedded task's base model"
    )
    data: str = option("", "Hub dataset id, JSONL or parquet file; empty: the embedded task")
    split: str = option("", "of a Hub dataset [train]")
    data_config: str = option("", "of a Hub dataset that has several")
    revision: str = option("", "of a Hub dataset: branch, tag or commit")
    question_field: str = option("", "column of questions, where the layout is not a known one")
    answer_field: str = option("", "column of gold answers, likewise")
    solution_field: str = option("", "column of demonstrations, likewise")
    template: Literal["auto", "chat", "plain"] = option(
        "auto", "the tokenizer's chat template, or plain text; auto: chat if it has one"
    )
    system: str = option("data", "system prompt: a text; data: as the data has it; none: dropped")
    generation_prefix: str = option(
        "", "ends each prompt, and is cut from demonstrations that begin with it: '<think>\\n'"
    )
    rope_theta: float = option(
        0.0, "rotary base to set in the model's configuration, to extend its context; 0: as it is"
    )
    max_position_embeddings: int = option(
        0, "context length to set in the model's configuration; 0: as it is"
    )
    evaluate: str = option(
        "",
        "what to evaluate on: eval.py's benchmark names, or JSONL files, by commas; empty: nothing",
    )
    eval_k: int = option(1, "responses per question in evaluations")
    eval_temperature: float = option(0.6, "of sampling in evaluations; 0: greedy")
    extract: Literal["boxed", "any"] = option(
        "boxed", "where a maths answer is looked for: the last \\boxed{}; anywhere"
    )
    require_think: bool = option(False, "an answer counts only after one closing </think>")
    check_limit: float = option(
        5.0, "seconds for checking one answer, after which it counts as timeout"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "of compute; auto: bfloat16 on GPUs. Weights stay float32"
    )
    max_prompt: int = option(1024, "tokens; questions with longer prompts are dropped")
    max_response: int = option(8192, "tokens, of samples and of demonstrations")
    # RL: GRPO
    questions: int = option(128, "questions per RL step, over all ranks")
    samples: int = option(8, "G, responses sampled per question")
    updates: int = option(1, "optimizer steps per RL step; each takes its share of the questions")
    temperature: float = option(1.0, "of sampling, and of the log-probabilities in the RL loss")
    normalize_std: bool = option(False, "divide a group's advantages by its standard deviation")
    clip_low: float = option(0.2, "the ratio is clipped below 1 - clip_low")
    clip_high: float = option(0.2, "the ratio is clipped above 1 + clip_high")
    aggregation: Literal["token", "sequence", "constant"] = option(
        "token",
        "mean over all tokens; mean of each response's mean; sum over responses / max_response (Dr. GRPO)",
    )
    kl_coef: float = option(
        0.0, "weight of the KL to the initial model; 0: no reference model is held"
    )
    tis_cap: float = option(
        0.0, "cap of the importance weight pi_trainer / pi_engine; 0: no such weight"
    )
    mask_truncated: bool = option(False, "responses cut at max_response carry no loss")
    rl_lr: float = option(1e-6, "learning rate of RL's AdamW")
    rl_clip: float = option(1.0, "gradient norm that RL's gradients are clipped to")
    # SFT
    sft_lr: float = option(1e-6, "learning rate of SFT's AdamW")
    sft_clip: float = option(1.0, "gradient norm that SFT's gradients are clipped to")
    sft_batch: int = option(128, "demonstrations per SFT step, over all ranks")
    sft_epochs: int = option(1, "passes over the demonstrations of an SFT phase or stage")
    sft_schedule: Literal["constant", "cosine"] = option(
        "constant",
        "learning rate over an SFT stage: constant; 10 % warm-up, then a cosine down to a tenth",
    )
    pear: Literal["off", "sequence", "token", "block"] = option(
        "off", "PEAR's weights on the SFT loss (arXiv 2602.01058)"
    )
    pear_gamma: float = option(0.999, "PEAR's discount per token")
    pear_block: int = option(4, "PEAR's block length, tokens")
    pear_ratio_range: str = option(
        "-0.08,0.3", "log of a token's probability ratio is clipped to this; off: not clipped"
    )
    pear_weight_range: str = option("-10,5", "log of a weight is clipped to this; off: not clipped")
    behavior_model: str = option(
        "",
        "Hub id or folder of the model that wrote the demonstrations, for PEAR; empty: the data's "
        "behavior_logprobs, or where it has none those of the policy before training",
    )
    rho: float = option(
        0.2,
        "share of each demonstration's tokens, those of highest entropy, that SFT learns; 1: all",
    )
    # MIFO
    p: float = option(
        0.125,
        "a question whose samples are right at most at this rate goes to the hard-question buffer",
    )
    buffer_size: int = option(
        128, "S: an SFT phase starts when the buffer holds this many questions"
    )
    freeze: Literal["strict", "zero-grad-only", "off"] = option(
        "strict",
        "during SFT the parameters that RL moved most: stay bit for bit; get zero gradients only; train on",
    )
    k: float = option(0.5, "share of all parameters that is frozen")
    alpha: float = option(
        0.9,
        "decay of the importance map from one RL phase to the next; 0 (dagger): only the last counts",
    )
    # AdamW, both
    beta1: float = option(0.9, "of AdamW")
    beta2: float = option(0.999, "of AdamW")
    weight_decay: float = option(0.01, "of AdamW, both RL's and SFT's")
    # engine and scale
    sampler: Literal["auto", "vllm", "torch"] = option(
        "auto", "auto: vLLM where it can run, else plain PyTorch"
    )
    max_num_seqs: int = option(256, "responses that the sampler writes at once, per rank")
    kv_cache_gib: float = option(0.5, "vLLM's KV cache on a CPU, GiB per rank")
    gpu_memory_utilization: float = option(0.5, "vLLM's share of the GPU's memory while it samples")
    probe_bound: float = option(
        0.0,
        "the run stops if engine and trainer log-probabilities differ by more, on average, on a "
        "probe; 0: 0.001 in float32, 0.15 in bfloat16",
    )
    micro_tokens: int = option(32768, "padded tokens in a micro-batch, per rank")
    replicas: int = option(
        1, "copies of the sharded model (HSDP); 1: sharded over all ranks (FSDP)"
    )
    activation_checkpointing: bool = option(False, "recompute activations in the backward pass")
    gather_once: bool = option(
        False,
        "gather weights and reduce gradients over the ranks once a step, not once a micro-batch: "
        "less traffic, for 6 bytes a parameter on every rank, 8 in float32",
    )
    offload_importance: bool = option(
        False, "keep MIFO's importance map and anchor, 8 bytes a parameter, in host memory"
    )
    trust_remote_code: bool = option(False, "run Python code that comes with the model")


# What may differ when a run is resumed: how far it goes, what it writes, and what changes rounding and random numbers only.
MAY_CHANGE = {
    "recipe",
    "out",
    "dry_run",
    "resume",
    "steps",
    "save_every",
    "keep",
    "eval_every",
    "eval_sft_phases",
    "samples_logged",
    "step_limit",
    "check_limit",
    "sampler",
    "max_num_seqs",
    "kv_cache_gib",
    "gpu_memory_utilization",
    "probe_bound",
    "micro_tokens",
    "replicas",
    "activation_checkpointing",
    "gather_once",
    "offload_importance",
    "trust_remote_code",
}


class Stopped(Exception):
    """Why a run cannot go on, in a line; raised on all ranks alike."""


def parse_config(argv: list[str]) -> Config:
    """Defaults, then the recipe's values, then the flags. Raises ValueError with one line that names what is wrong."""

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise ValueError(message)

    parser = Parser(
        prog="mifo.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    types = typing.get_type_hints(Config)
    for f in dataclasses.fields(Config):
        flag, meaning = (
            "--" + f.name.replace("_", "-"),
            f"{f.metadata['help']} [{f.default!r}]".replace("%", "%%"),
        )
        if types[f.name] is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=meaning
            )
        else:
            choices = typing.get_args(types[f.name]) or None
            parser.add_argument(
                flag,
                type=str if choices else types[f.name],
                choices=choices,
                help=meaning,
                default=argparse.SUPPRESS,
                metavar=None if choices else f.name.upper(),
            )
    parser._negative_number_matcher = re.compile(
        r"-\d"
    )  # a range may begin with a minus: -0.08,0.3
    flags = vars(parser.parse_args(argv))
    recipe = flags.get("recipe") or (
        "" if "model" in flags or "data" in flags else str(ROOT / "recipes" / "embedded.toml")
    )
    values = {}
    if recipe:
        if not Path(recipe).is_file():
            raise ValueError(f"--recipe: there is no file {recipe}")
        try:
            values = tomllib.loads(Path(recipe).read_text())
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"--recipe {recipe}: not valid TOML: {error}") from None
        for name, value in values.items():
            if name not in types or name == "recipe":
                raise ValueError(f"--recipe {recipe}: unknown setting {name!r}")
            choices = typing.get_args(types[name])
            if types[name] is float and type(value) is int:
                values[name] = value = float(value)
            if (choices and value not in choices) or (
                not choices and type(value) is not types[name]
            ):
                raise ValueError(
                    f"--recipe {recipe}: {name} = {value!r} should be "
                    f"{'one of ' + ', '.join(choices) if choices else types[name].__name__}"
                )
    cfg = Config(**{**values, **flags, "recipe": recipe})
    check_config(cfg, cfg.dry_run or int(os.environ["WORLD_SIZE"]))
    return cfg


def check_config(cfg: Config, world: int) -> None:
    """Raises ValueError, naming the flag, for every setting that can be refused before anything is loaded."""

    def must(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(message)

    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if isinstance(value, float):
            must(
                math.isfinite(value),
                f"--{f.name.replace('_', '-')} must be a finite number, not {value}",
            )
    for name in (
        "keep",
        "max_prompt",
        "max_response",
        "questions",
        "updates",
        "sft_batch",
        "sft_epochs",
        "buffer_size",
        "max_num_seqs",
        "micro_tokens",
        "replicas",
        "save_every",
        "eval_k",
        "pear_block",
    ):
        must(
            getattr(cfg, name) >= 1,
            f"--{name.replace('_', '-')} must be at least 1, not {getattr(cfg, name)}",
        )
    must(
        cfg.samples >= 2,
        f"--samples must be at least 2 (advantages compare the samples of a question), not {cfg.samples}",
    )
    for name in (
        "dry_run",
        "steps",
        "eval_every",
        "samples_logged",
        "kl_coef",
        "tis_cap",
        "clip_low",
        "clip_high",
        "weight_decay",
        "seed",
        "rope_theta",
        "max_position_embeddings",
        "eval_temperature",
        "probe_bound",
        "step_limit",
    ):
        must(
            getattr(cfg, name) >= 0,
            f"--{name.replace('_', '-')} must not be negative, not {getattr(cfg, name)}",
        )
    for name in (
        "temperature",
        "rl_lr",
        "sft_lr",
        "rl_clip",
        "sft_clip",
        "kv_cache_gib",
        "check_limit",
    ):
        must(
            getattr(cfg, name) > 0,
            f"--{name.replace('_', '-')} must be above 0, not {getattr(cfg, name)}",
        )
    for name in ("rho", "k", "pear_gamma", "gpu_memory_utilization"):
        must(
            0 < getattr(cfg, name) <= 1,
            f"--{name.replace('_', '-')} must be in (0, 1], not {getattr(cfg, name)}",
        )
    for name in ("alpha", "p"):
        must(0 <= getattr(cfg, name) <= 1, f"--{name} must be in [0, 1], not {getattr(cfg, name)}")
    for name in ("beta1", "beta2"):
        must(0 <= getattr(cfg, name) < 1, f"--{name} must be in [0, 1), not {getattr(cfg, name)}")
    must(not Path(cfg.out).exists() or Path(cfg.out).is_dir(), f"--out {cfg.out} is not a folder")
    must(cfg.clip_low < 1, f"--clip-low must be below 1, not {cfg.clip_low}")
    must(
        cfg.questions % world == 0,
        f"--questions {cfg.questions} does not divide by the {world} ranks",
    )
    must(
        cfg.questions % cfg.updates == 0,
        f"--questions {cfg.questions} does not divide by --updates {cfg.updates}",
    )
    must(world % cfg.replicas == 0, f"--replicas {cfg.replicas} does not divide the {world} ranks")
    must(
        bool(cfg.model) == bool(cfg.data),
        "--model and --data go together: give both, or neither for the embedded task",
    )
    must(
        cfg.schedule == "sft" or cfg.steps > 0,
        f"--steps must be at least 1 with --schedule {cfg.schedule}",
    )
    must(
        cfg.behavior_model == "" or cfg.pear != "off", "--behavior-model is of use only with --pear"
    )
    for name in ("pear_ratio_range", "pear_weight_range"):
        parse_range(name, getattr(cfg, name))
    must(
        cfg.sft_schedule == "constant" or cfg.schedule in ("sft", "sft-then-rl"),
        f"--sft-schedule {cfg.sft_schedule} is for an SFT stage, which --schedule {cfg.schedule} does not have",
    )
    must(
        cfg.pear == "off" or cfg.schedule != "rl",
        f"--pear {cfg.pear} weighs SFT, which --schedule rl does not do",
    )
    must(
        cfg.eval_every == 0 or bool(cfg.evaluate),
        f"--eval-every {cfg.eval_every} needs --evaluate: what to evaluate on",
    )
    must(
        not cfg.eval_sft_phases or bool(cfg.evaluate),
        "--eval-sft-phases needs --evaluate: what to evaluate on",
    )
    for name in (
        "split",
        "data_config",
        "revision",
        "question_field",
        "answer_field",
        "solution_field",
        "system",
        "generation_prefix",
        "template",
    ):
        must(
            bool(cfg.data) or getattr(cfg, name) == getattr(Config, name),
            f"--{name.replace('_', '-')} goes with --data; the embedded task has its own",
        )
    for flag, path in [
        ("--data", cfg.data),
        *(("--evaluate", name) for name in cfg.evaluate.split(",")),
    ]:
        must(
            not path.endswith((".jsonl", ".json", ".parquet")) or Path(path).is_file(),
            f"{flag}: there is no file {path}",
        )
        must(
            flag == "--data"
            or path in ("", "chain", *evaluation.BENCHES)
            or path.endswith((".jsonl", ".json")),
            f"--evaluate: {path!r} is neither a JSONL file nor one of {', '.join(evaluation.BENCHES)}, chain",
        )


def parse_range(name: str, text: str) -> tuple[float, float] | None:
    """ "-10,5" -> (-10.0, 5.0), "off" -> None. Raises ValueError naming the flag."""
    try:
        low, high = (None, None) if text == "off" else map(float, text.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if text != "off" and not low < high:
        raise ValueError(
            f"--{name.replace('_', '-')} must be two numbers LOW,HIGH or off, not {text!r}"
        )
    return None if text == "off" else (low, high)


# ---------------------------------------------------------------------------------------------------------------------
# The policy


class Policy(nn.Module):
    """A causal language model whose forward pass gives log-probabilities and entropies of the response tokens only."""

    def __init__(self, model: transformers.PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """tokens [B, T], mask [B, T-1] (True where the next token counts) -> logprobs, entropy [B, T-1], 0 elsewhere."""
        hidden = self.model.model(
            input_ids=tokens[:, :-1], use_cache=False
        ).last_hidden_state  # [B, T-1, D]
        logprobs, entropy = losses.token_logprobs(
            hidden[mask], self.model.lm_head.weight, tokens[:, 1:][mask], temperature
        )  # [N], [N]
        empty = torch.zeros(mask.shape, dtype=logprobs.dtype, device=mask.device)
        return empty.masked_scatter(mask, logprobs), empty.masked_scatter(mask, entropy)


def load_policy(cfg: Config, model_dir: str, config, mesh, dtype: torch.dtype) -> Policy:
    """float32 weights sharded over the mesh's shards by FSDP2, one unit a layer, copied over its replicas; `dtype` computes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, config=config, dtype=torch.float32, trust_remote_code=cfg.trust_remote_code
    )
    if cfg.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(model).train()
    mesh = mesh if cfg.replicas > 1 else mesh["shard"]
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=mixed)
    # A root left unsharded by a forward pass without a backward pass would hide its shards from whoever asks next.
    fully_shard(policy, mesh=mesh, mp_policy=mixed, reshard_after_forward=True)
    model.to(mesh.device_type)  # buffers
    return policy


def full_weights(policy: Policy, dtype: torch.dtype):
    """(name, tensor) of each whole parameter in turn, as the model's files name them. Collective: all ranks iterate."""
    for name, parameter in policy.model.named_parameters():
        yield name, parameter.detach().to(dtype).full_tensor()


# ---------------------------------------------------------------------------------------------------------------------
# A run: what is fixed, and the state that moves and is checkpointed


@dataclass
class State:
    step: int = 0  # steps done, RL and SFT
    rl_steps: int = 0
    sft_steps: int = 0
    sft_phases: int = 0
    drawn: int = 0  # questions drawn from the stream so far
    buffer: list[int] = field(
        default_factory=list
    )  # hard questions, by their place in the data, in the order they came
    sft_queue: list[list[int]] = field(
        default_factory=list
    )  # what the current SFT phase has still to do, by batches
    threshold: float = math.inf  # importance above it is frozen in the current SFT phase
    skipped: int = 0  # optimizer steps not taken, because a number was not finite
    skips_in_a_row: int = 0
    demonstrations: list[int] = field(
        default_factory=list
    )  # every question whose demonstration was used
    sampled_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # by phase of work
    evals: list[dict] = field(default_factory=list)


@dataclass
class Run:
    cfg: Config
    rank: int
    world: int
    device: torch.device
    mesh: object
    dtype: torch.dtype
    tokenizer: object
    questions: typing.Sequence[data.Question]
    benches: dict[str, list[data.Question]]  # to evaluate on
    policy: Policy
    reference: Policy | None
    optimizers: dict[str, torch.optim.AdamW]  # "rl", "sft"
    sampler: (
        rollout.VLLMSampler | rollout.TorchSampler | None
    )  # None where nothing is to be sampled
    checker: evaluation.Checker
    state: State
    importance: list[
        Tensor
    ]  # C, this rank's shards, in the order of the parameters; empty where nothing is ever frozen
    anchor: list[Tensor]  # the parameters at the start of the current phase, RL or SFT; likewise
    behavior: "BehaviorLogprobs | None" = None
    pushed_at: int = -1  # the step whose weights the sampler holds
    log: dict = field(default_factory=dict)  # of the current step, for metrics.jsonl
    signal: int = 0  # that asked this rank to stop

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


def gather(run: Run, item: list) -> list:
    """All ranks' lists, interleaved: rank r's i-th entry comes at place i * world + r."""
    if run.world == 1:
        return item
    parts = [None] * run.world
    dist.all_gather_object(parts, item)
    return [part[i] for i in range(len(parts[0])) for part in parts if i < len(part)]


def total(run: Run, values: dict[str, float]) -> dict[str, float]:
    """Sums over all ranks; a key that begins with max/ takes the largest."""
    if run.world == 1:
        return values
    parts = [None] * run.world
    dist.all_gather_object(parts, values)
    return {
        key: (max if key.startswith("max/") else sum)(part[key] for part in parts) for key in values
    }


def micro_batches(run: Run, pairs: list[tuple[list[int], list[int]]], **extras):
    """This rank's micro-batches of (prompt, response) pairs, on its device; "rows" holds the places of their rows in pairs.

    Every rank gets the same number of them, if need be empty ones, as FSDP's collectives demand.
    """
    lengths = [len(prompt) + len(response) for prompt, response in pairs]
    parts = data.pack(lengths, run.cfg.micro_tokens, run.world)
    rounds = [parts[i : i + run.world] for i in range(0, len(parts), run.world)]
    # Forth and back over the ranks: of a round, the first micro-batch has the longest rows, and so the most work.
    parts = [group[run.rank if i % 2 == 0 else -1 - run.rank] for i, group in enumerate(rounds)]
    for i, rows in enumerate(parts, 1):
        last = i == len(parts) or not run.cfg.gather_once
        run.policy.set_requires_gradient_sync(last)
        run.policy.set_reshard_after_backward(last)
        run.policy.set_reshard_after_forward(
            last and not (run.cfg.gather_once and torch.is_grad_enabled())
        )
        batch = data.collate(
            [pairs[i] for i in rows] or [([0], [0])],
            run.tokenizer.pad_token_id or 0,
            **{key: [values[i] for i in rows] or [None] for key, values in extras.items()},
        )
        if not rows:
            batch["mask"][:] = False
        yield {key: value.to(run.device) for key, value in batch.items()} | {"rows": rows}
    run.policy.set_reshard_after_forward(
        True
    )  # as load_policy has it, for forward passes elsewhere


def frozen(run: Run) -> Iterator[Tensor]:
    """The masks of this SFT phase, bool, one parameter's at a time: kept, they would cost a byte a parameter."""
    return ((c > run.state.threshold).to(run.device, non_blocking=True) for c in run.importance)


def optimizer_step(
    run: Run, which: Literal["rl", "sft"], clip: float, loss: float, suspects: list[str]
) -> None:
    """Clip, step, zero; in an SFT phase with frozen parameters, around a step that leaves them bit-identical.

    If the loss, which is that of all ranks, or a gradient is not finite, no rank takes the step. suspects are the ids of this
    rank's questions whose loss was not finite.
    """
    parameters = list(run.policy.parameters())
    freezing = which == "sft" and run.state.threshold < math.inf
    if freezing:
        freeze.zero_frozen_gradients((p.grad.to_local() for p in parameters), frozen(run))
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    run.log[f"{which}/grad_norm"] = norm.item()
    if not math.isfinite(norm.item()) or not math.isfinite(loss):
        skip_step(run, loss, suspects)
    else:
        run.state.skips_in_a_row = 0
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        run.optimizers[which].step()
    run.optimizers[which].zero_grad()
    if freezing:
        after = freeze.restore_frozen if run.cfg.freeze == "strict" else freeze.largest_movement
        moved = after(run.shards, frozen(run), run.anchor)
        run.log["sft/frozen_movement"] = total(run, {"max/moved": moved})["max/moved"]


def not_finite(ids: list[str], logprobs: Tensor, loss: float) -> list[str]:
    """Those of a micro-batch's questions whose log-probabilities [B, T-1] made its loss infinite or NaN."""
    if math.isfinite(loss):
        return []
    return [i for i, row in zip(ids, logprobs) if not row.isfinite().all()]


def skip_step(run: Run, loss: float, suspects: list[str]) -> None:
    """Counts and reports a step that is not taken; raises Stopped if it is the last of too many in a row."""
    state = run.state
    state.skipped += 1
    state.skips_in_a_row += 1
    run.log["skipped"] = state.skipped
    names = [
        name
        for name, p in run.policy.model.named_parameters()
        if p.grad is not None and not p.grad.to_local().isfinite().all()
    ]
    found = gather(run, [(names, suspects)])
    names = list(dict.fromkeys(name for part, _ in found for name in part))
    ids = list(dict.fromkeys(i for _, part in found for i in part))
    text = (
        f"step {state.step + 1}: the loss is {loss:.3g}; not finite: the gradients of {len(names)} tensors"
        f"{', the first ' + names[0] if names else ''}; the loss of questions {', '.join(ids[:8]) or '(none alone)'}"
    )
    say(f"skipped {text}")
    if state.skips_in_a_row >= SKIPS:
        raise Stopped(f"{SKIPS} steps in a row were skipped; {text}")


# ---------------------------------------------------------------------------------------------------------------------
# RL


@dataclass
class Response:
    place: int  # of its question in the data
    question: data.Question  # less its demonstration
    demonstrated: bool  # whether it had one
    tokens: list[int]
    rollout_logprobs: list[float]
    truncated: bool
    text: str
    verdict: str
    advantage: float = 0.0
    old_logprobs: list[float] | None = None


def sample(run: Run, places: list[int]) -> list[Response]:
    """cfg.samples checked responses to each question, in the order of places on every rank; the ranks share the work."""
    cfg, mine = run.cfg, range(run.rank, len(places), run.world)
    questions = [run.questions[places[i]] for i in mine]
    seeds = [
        (cfg.seed << 40) + (run.state.drawn + i) * cfg.samples for i in mine
    ]  # no seed is ever used twice
    with run.timed("sample"):
        groups = run.sampler.sample(
            [q.prompt for q in questions], cfg.samples, seeds, cfg.max_response, cfg.temperature
        )
    with run.timed("check"):
        texts = [
            run.tokenizer.decode(s.tokens, skip_special_tokens=True)
            for group in groups
            for s in group
        ]
        asked = [q for q in questions for _ in range(cfg.samples)]
        told = iter(
            zip(texts, run.checker.check(texts, [q.answer for q in asked], [q.kind for q in asked]))
        )
        bare = [
            dataclasses.replace(q, demonstration=None, behavior_logprobs=None) for q in questions
        ]  # long, not needed here
        groups = [
            [
                Response(
                    places[i],
                    b,
                    q.demonstration is not None,
                    s.tokens,
                    s.logprobs,
                    s.truncated,
                    *next(told),
                )
                for s in group
            ]
            for i, q, b, group in zip(mine, questions, bare, groups)
        ]
    with run.timed("gather"):
        return [response for group in gather(run, groups) for response in group]


def rl_step(run: Run) -> None:
    """Sample, check, keep the hard questions, and take cfg.updates optimizer steps of GRPO."""
    cfg, state = run.cfg, run.state
    push(run, later=run.pushed_at >= 0)
    places = data.draw(len(run.questions), cfg.seed, state.drawn, cfg.questions)
    batch = sample(run, places)
    rewards = torch.tensor([r.verdict == "correct" for r in batch], dtype=torch.float32).view(
        -1, cfg.samples
    )  # [Q, G]
    for response, advantage in zip(
        batch, losses.group_advantages(rewards, cfg.normalize_std).flatten().tolist()
    ):
        response.advantage = advantage
    if not rows_with_gradient(cfg, batch):
        probe(run)  # else rl_update compares the samples themselves
    run.sampler.sleep()
    if cfg.schedule == "interleave":
        keep_hard(state.buffer, batch[:: cfg.samples], rewards.mean(1).tolist(), cfg.p)
    with run.timed("rl"):
        if cfg.updates > 1:
            old_logprobs(run, batch)
        size = len(batch) // cfg.updates
        for i in range(0, len(batch), size):
            rl_update(run, batch[i : i + size])
    state.drawn += cfg.questions
    state.rl_steps += 1
    state.sampled_tokens += sum(len(r.tokens) for r in batch)
    log_responses(run, batch, rewards)


def keep_hard(buffer: list[int], firsts: list[Response], accuracies: list[float], p: float) -> None:
    """Appends the places of questions answered right at a rate of at most p: each once, and only if it has a demonstration.

    firsts holds one response to each question, in the order of the batch, which is the same on all ranks.
    """
    for response, accuracy in zip(firsts, accuracies, strict=True):
        if accuracy <= p and response.demonstrated and response.place not in buffer:
            buffer.append(response.place)


def rows_with_gradient(cfg: Config, batch: list[Response]) -> list[Response]:
    """What the loss is made of: an advantage of 0 gives no gradient, so those groups are not even computed."""
    return [r for r in batch if r.advantage != 0 and not (cfg.mask_truncated and r.truncated)]


@torch.no_grad()
def old_logprobs(run: Run, batch: list[Response]) -> None:
    """pi_old by the trainer itself, for when the policy moves while the batch is still in use."""
    rows = rows_with_gradient(run.cfg, batch)
    mine = {}
    for part in micro_batches(run, [(r.question.prompt, r.tokens) for r in rows]):
        logprobs, _ = run.policy(part["tokens"], part["mask"], run.cfg.temperature)
        for i, row in enumerate(part["rows"]):
            mine[row] = logprobs[i][part["mask"][i]].tolist()
    for found in gather(run, [mine]):
        for row, values in found.items():
            rows[row].old_logprobs = values


def rl_update(run: Run, batch: list[Response]) -> None:
    """One optimizer step of GRPO; the loss is divided by a count over the whole batch, on all ranks."""
    cfg = run.cfg
    counted = [r for r in batch if not (cfg.mask_truncated and r.truncated)]
    divisor = {
        "token": sum(len(r.tokens) for r in counted),
        "sequence": len(counted),
        "constant": len(counted) * cfg.max_response,
    }[cfg.aggregation]
    rows = rows_with_gradient(cfg, batch)
    if not rows:
        return
    sums, suspects = Counter(), []
    for part in micro_batches(
        run,
        [(r.question.prompt, r.tokens) for r in rows],
        old=[r.old_logprobs for r in rows],
        rollout=[r.rollout_logprobs for r in rows],
    ):
        mask = part["mask"]  # [B, T-1]
        advantages = torch.tensor(
            [rows[i].advantage for i in part["rows"]] or [0.0], device=run.device
        )  # [B]
        reference = None
        if run.reference is not None:
            with torch.no_grad():
                reference, _ = run.reference(part["tokens"], mask, cfg.temperature)
        logprobs, entropy = run.policy(part["tokens"], mask, cfg.temperature)
        old = part["old"] if cfg.updates > 1 else logprobs.detach()
        loss, metrics = losses.grpo_loss(
            logprobs,
            old,
            advantages,
            mask,
            cfg.clip_low,
            cfg.clip_high,
            cfg.aggregation == "sequence",
            reference,
            cfg.kl_coef,
            part["rollout"],
            cfg.tis_cap,
        )
        (loss * run.world / divisor).backward()  # FSDP averages the gradients over the ranks
        suspects += not_finite([rows[i].question.id for i in part["rows"]], logprobs, loss.item())
        gap = (old - part["rollout"]).masked_fill(~mask, 0.0).abs()
        for key, value in {
            **metrics,
            "loss": loss.detach(),
            "entropy": entropy.sum(),
            "gap": gap.sum(),
            "tokens": mask.sum(),
        }.items():
            sums[key] += value.item()
        sums["max/gap"] = max(sums["max/gap"], gap.max().item())
    sums = total(run, sums)
    tokens = sums.pop("tokens")
    run.log["rl/loss"] = sums.pop("loss") / divisor
    run.log["engine/max_difference"] = sums.pop("max/gap")
    run.log["engine/mean_difference"] = sums.pop("gap") / tokens
    if math.isfinite(run.log["rl/loss"]):
        check_engine(run, run.log["engine/mean_difference"], "the sampled tokens")
    optimizer_step(run, "rl", cfg.rl_clip, run.log["rl/loss"], suspects)
    run.log |= {f"rl/{key}": value / tokens for key, value in sums.items()}


# ---------------------------------------------------------------------------------------------------------------------
# SFT


def begin_sft_phase(run: Run, places: list[int]) -> None:
    """Queues the demonstrations of `places`; in MIFO's interleaving, fixes which parameters the phase must not move."""
    cfg, state = run.cfg, run.state
    if freezes(cfg):
        with run.timed("freeze"):
            freeze.update_importance(run.importance, run.anchor, run.shards, cfg.alpha)
            group = run.mesh.get_group("shard")
            state.threshold = freeze.topk_threshold(run.importance, cfg.k, group)
            counts = total(
                run,
                {
                    "frozen": sum(f.count_nonzero().item() for f in frozen(run)),
                    "all": sum(c.numel() for c in run.importance),
                },
            )
            run.log["sft/frozen_share"] = counts["frozen"] / counts["all"]
    set_anchor(run)
    generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + state.sft_phases)
    for _ in range(cfg.sft_epochs):
        order = [places[i] for i in torch.randperm(len(places), generator=generator).tolist()]
        state.sft_queue += [
            order[i : i + cfg.sft_batch] for i in range(0, len(order), cfg.sft_batch)
        ]
    state.sft_phases += 1
    state.demonstrations += places


def sft_step(run: Run) -> None:
    """One optimizer step on the next batch of the queue, on the rho highest-entropy tokens of each demonstration."""
    cfg, state = run.cfg, run.state
    if run.sampler is not None:
        run.sampler.sleep()
    set_sft_lr(run)
    places, sums, suspects = state.sft_queue.pop(0), Counter(loss=0.0), []
    with run.timed("sft"):
        questions = gather(
            run, [run.questions[place] for place in places[run.rank :: run.world]]
        )  # tokenised in shares
        known = [
            (place, q) for place, q in zip(places, questions) if q.demonstration is not None
        ]  # the others are too long
        run.log["sft/too_long"] = len(questions) - len(known)
        questions = [q for _, q in known]
        pairs = [(q.prompt, q.demonstration) for q in questions]
        behavior = [run.behavior.of(place, q) if run.behavior else None for place, q in known]
        divisor = sum(losses.top_entropy_count(len(response), cfg.rho) for _, response in pairs)
        for part in micro_batches(run, pairs, behavior=behavior):
            logprobs, entropy = run.policy(part["tokens"], part["mask"], 1.0)  # [B, T-1]
            weights = None
            if cfg.pear != "off":
                ranges = (
                    parse_range(name, getattr(cfg, name))
                    for name in ("pear_ratio_range", "pear_weight_range")
                )
                weights = losses.pear_weights(
                    logprobs,
                    part["behavior"],
                    part["mask"],
                    cfg.pear,
                    cfg.pear_gamma,
                    cfg.pear_block,
                    *ranges,
                )
                sums["pear_weight"] += weights.sum().item() / sum(
                    len(response) for _, response in pairs
                )
            loss = losses.sft_loss(
                logprobs, losses.top_entropy_mask(entropy, part["mask"], cfg.rho), weights
            )
            (loss * run.world / divisor).backward()
            sums["loss"] += loss.item() / divisor
            suspects += not_finite([questions[i].id for i in part["rows"]], logprobs, loss.item())
        sums = total(run, sums)
        optimizer_step(run, "sft", cfg.sft_clip, sums["loss"], suspects)
    run.log |= {f"sft/{key}": value for key, value in sums.items()}
    state.sft_steps += 1
    if not state.sft_queue:
        state.threshold = math.inf
        set_anchor(run)  # the next RL phase starts here
        if cfg.schedule != "interleave":
            run.optimizers[
                "sft"
            ].state.clear()  # the stage is over: nothing but the weights is handed over


def set_sft_lr(run: Run) -> None:
    """An SFT stage's learning rate at its current step: constant, or warm-up and cosine over the whole stage."""
    lr, state = run.cfg.sft_lr, run.state
    if run.cfg.sft_schedule == "cosine":
        done = state.sft_steps / (state.sft_steps + len(state.sft_queue))  # share of the stage
        lr *= done / 0.1 if done < 0.1 else 0.55 + 0.45 * math.cos(math.pi * (done - 0.1) / 0.9)
    run.optimizers["sft"].param_groups[0]["lr"] = lr


class BehaviorLogprobs:
    """Log-probabilities of the demonstrations under the model that wrote them, on disk: float32, one file a rank.

    Beside each file stands a list of (place in the data, first number, count), written after the numbers themselves, so
    that what an interrupted run has finished is known and is not computed again.
    """

    def __init__(self, folder: Path):
        self.folder, self.found = folder, {}
        for path in sorted(folder.glob("*.index")):
            numbers = path.with_suffix(".f32").stat().st_size // 4
            for line in path.read_text().splitlines():
                place, first, count = map(int, line.split(","))
                if first + count <= numbers:
                    self.found[place] = (path.with_suffix(".f32"), first, count)

    def of(self, place: int, question: data.Question) -> list[float]:
        if question.behavior_logprobs is not None:
            return question.behavior_logprobs
        path, first, count = self.found[place]
        return np.fromfile(path, np.float32, count, offset=4 * first).tolist()


def find_behavior(run: Run) -> None:
    """Fills run.behavior: from the data where it has them, else by --behavior-model, else by the policy as it is now."""
    cfg = run.cfg
    folder = Path(cfg.out, "behavior")
    meta = {
        "model": cfg.behavior_model or "the policy before training",
        "data": getattr(run.questions, "fingerprint", "embedded"),
    }
    if (folder / "meta.json").exists() and json.loads((folder / "meta.json").read_text()) != meta:
        raise ValueError(
            f"{folder} holds log-probabilities by another model or of other data: remove it, or give another --out"
        )
    barrier(run)
    if run.rank == 0:
        folder.mkdir(exist_ok=True)
        (folder / "meta.json").write_text(json.dumps(meta))
    barrier(run)
    known = BehaviorLogprobs(folder)
    todo = [place for place in data.demonstrated(run.questions) if place not in known.found]
    barrier(run)  # all have read what there is before anyone writes
    mine = folder / f"{run.rank:05d}.f32"
    # A line whose numbers were cut off would seem right again as soon as others are written in their place.
    write_whole(
        mine.with_suffix(".index"),
        "".join(
            f"{place},{first},{count}\n"
            for place, (path, first, count) in known.found.items()
            if path == mine
        ),
    )
    with (
        run.timed("behavior"),
        open(mine, "ab") as numbers,
        open(mine.with_suffix(".index"), "a") as index,
        torch.no_grad(),
    ):
        numbers.truncate(numbers.tell() // 4 * 4)
        model = None
        for i in range(0, len(todo), 64 * run.world):
            places = todo[i : i + 64 * run.world]
            questions = gather(
                run, [run.questions[place] for place in places[run.rank :: run.world]]
            )
            missing = [
                (p, q)
                for p, q in zip(places, questions)
                if q.demonstration and q.behavior_logprobs is None
            ]
            if missing and model is None:
                say(
                    f"PEAR: behaviour log-probabilities of {len(todo)} demonstrations by {meta['model']}"
                )
                model = (
                    run.policy
                    if not cfg.behavior_model
                    else load_policy(
                        cfg,
                        cfg.behavior_model,
                        transformers.AutoConfig.from_pretrained(
                            cfg.behavior_model, trust_remote_code=cfg.trust_remote_code
                        ),
                        run.mesh,
                        run.dtype,
                    )
                )
            for part in (
                micro_batches(run, [(q.prompt, q.demonstration) for _, q in missing])
                if missing
                else ()
            ):
                logprobs, _ = model(part["tokens"], part["mask"], 1.0)
                for row, values in zip(
                    part["rows"], (lp[m] for lp, m in zip(logprobs, part["mask"]))
                ):
                    first = numbers.tell() // 4
                    numbers.write(values.float().cpu().numpy().tobytes())
                    numbers.flush()
                    index.write(f"{missing[row][0]},{first},{len(values)}\n")
                    index.flush()
    barrier(run)
    run.behavior = BehaviorLogprobs(folder)


def check_behavior_model(cfg: Config, policy_tokenizer) -> None:
    """Raises ValueError if it cannot be found or its tokenizer is another than the policy's: nothing could be compared by token."""
    name = cfg.behavior_model
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, trust_remote_code=cfg.trust_remote_code
        )
        transformers.AutoConfig.from_pretrained(name, trust_remote_code=cfg.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--behavior-model {name}: not a model's folder or Hub id: {str(error).splitlines()[0]}"
        ) from None
    if tokenizer.get_vocab() != policy_tokenizer.get_vocab():
        raise ValueError(
            f"--behavior-model {name} has another tokenizer than --model; PEAR compares the two token by token"
        )


def set_anchor(run: Run) -> None:
    if run.anchor:
        for kept, now in zip(run.anchor, run.shards, strict=True):
            kept.copy_(now)


def freezes(cfg: Config) -> bool:
    """Whether the run keeps an importance map and an anchor at all."""
    return cfg.schedule == "interleave" and cfg.freeze != "off"


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def train(run: Run) -> int:
    """Runs to the end, or until a signal asks to stop: then to the end of the step. Returns the signal's number or 0."""
    cfg, state = run.cfg, run.state
    progress, stop = Progress(run), 0
    catch_signals(run)
    watch(cfg)
    if state.step == 0:
        evaluate(run)
        if cfg.schedule in ("sft", "sft-then-rl"):
            begin_sft_phase(run, data.demonstrated(run.questions))
    while not stop and (state.sft_queue or (state.rl_steps < cfg.steps and cfg.schedule != "sft")):
        watch(cfg)
        start = time.perf_counter()
        phase = "sft" if state.sft_queue else "rl"
        if phase == "sft":
            sft_step(run)
        else:
            rl_step(run)
            if cfg.schedule == "interleave" and len(state.buffer) >= cfg.buffer_size:
                begin_sft_phase(run, state.buffer)
                state.buffer = []
        state.step += 1
        last = not (state.sft_queue or (state.rl_steps < cfg.steps and cfg.schedule != "sft"))
        edge = bool(state.sft_queue) == (
            phase == "rl"
        )  # of an SFT phase: begins after this step, or ended with it
        due = phase == "rl" and cfg.eval_every and state.rl_steps % cfg.eval_every == 0
        if last or due or (cfg.eval_sft_phases and edge):
            evaluate(run)
        state.seconds["all"] = state.seconds.get("all", 0.0) + time.perf_counter() - start
        progress.step(phase)
        stop = total(run, {"max/signal": run.signal})["max/signal"]
        if last or stop or state.step % cfg.save_every == 0 or best_step(state) == state.step:
            save_checkpoint(run)
    faulthandler.cancel_dump_traceback_later()
    progress.close()
    return stop


def watch(cfg: Config) -> None:
    """Gives this rank --step-limit from now on; if it then is not done, it prints where each thread is, and exits."""
    if cfg.step_limit:
        faulthandler.dump_traceback_later(60 * cfg.step_limit, exit=True)


def catch_signals(run: Run) -> None:
    """The first SIGTERM or Ctrl-C asks the run to stop after its step, the second ends it at once."""

    def handle(number, frame):
        if run.signal:
            os._exit(128 + number)
        run.signal = number
        if run.rank == 0:  # not by print, which the signal may have interrupted
            os.write(
                2,
                f"{signal.Signals(number).name}: the run ends after this step and a checkpoint; once more: now\n".encode(),
            )

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)


def push(run: Run, later: bool = False) -> None:
    """Gives the sampler the current weights, if it has not got them, and probes it at once unless the caller checks it later."""
    if run.pushed_at == run.state.step:
        return
    with run.timed("push"):
        run.sampler.push(full_weights(run.policy, run.dtype))
    run.pushed_at = run.state.step
    if not later:
        probe(run)


def probe(run: Run) -> None:
    """Checks on one short response that the sampler computes what the trainer does."""
    with run.timed("probe"):
        prompt = run.questions[0].prompt
        [[response]] = run.sampler.sample(
            [prompt], 1, [run.cfg.seed], min(16, run.cfg.max_response), 1.0
        )
        batch = data.collate([(prompt, response.tokens)], 0, engine=[response.logprobs])
        batch = {key: value.to(run.device) for key, value in batch.items()}
        with torch.no_grad():
            logprobs, _ = run.policy(batch["tokens"], batch["mask"], 1.0)
        gap = (logprobs - batch["engine"])[batch["mask"]].abs().mean().item()
        gap = total(run, {"max/gap": gap})["max/gap"]
    run.log["engine/probe_difference"] = gap
    check_engine(run, gap, "a probe after the weights were pushed")


def check_engine(run: Run, gap: float, where: str) -> None:
    """Raises Stopped if the engine's log-probabilities are not the trainer's."""
    bound = run.cfg.probe_bound or (1e-3 if run.dtype == torch.float32 else 0.15)
    if not gap <= bound:
        raise Stopped(
            f"{run.sampler.name} and the trainer differ by {gap:.3g} in a token's log-probability, on average over "
            f"{where}, above the bound of {bound} (--probe-bound): the engine does not hold the trainer's weights"
        )


def evaluate(run: Run) -> None:
    """Samples answers to each benchmark's questions; adds their summaries to the state and to evaluations.jsonl."""
    if not run.benches:
        return
    push(run)
    cfg, results, correct = run.cfg, {}, {}
    with run.timed("evaluate"):
        for name, questions in run.benches.items():
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
            )
            rows = gather(run, rows)
            results[name] = evaluation.summarize(rows)
            correct[name] = [row["verdict"].count("correct") for row in rows]
    log_evaluation(run, results, correct)
    run.state.evals.append(
        {"step": run.state.step, "rl_steps": run.state.rl_steps, "results": results}
    )
    run.log["evaluation/rl_steps"] = run.state.rl_steps
    run.log["evaluation"] = {name: result["avg"] for name, result in results.items()} | {
        f"{name} {level}": part["avg"]
        for name, result in results.items()
        for level, part in result["levels"].items()
        if len(result["levels"]) > 1
    }


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves behind


def log_responses(run: Run, batch: list[Response], rewards: Tensor) -> None:
    """The RL step's metrics, and a few of its responses for samples.jsonl."""
    cfg, verdicts = run.cfg, Counter(r.verdict for r in batch)
    run.log |= {
        "reward": rewards.mean().item(),
        "groups/all_wrong": (rewards.sum(1) == 0).float().mean().item(),
        "groups/all_right": (rewards.sum(1) == cfg.samples).float().mean().item(),
        "response_tokens": sum(len(r.tokens) for r in batch) / len(batch),
        "truncated": sum(r.truncated for r in batch) / len(batch),
    }
    run.log |= {f"answers/{v}": verdicts[v] / len(batch) for v in evaluation.VERDICTS}
    if run.rank == 0:
        with open(Path(cfg.out, "samples.jsonl"), "a") as file:
            for response in batch[:: max(1, len(batch) // max(1, cfg.samples_logged))][
                : cfg.samples_logged
            ]:
                file.write(
                    json.dumps(
                        {
                            "step": run.state.step + 1,
                            "id": response.question.id,
                            "prompt": run.tokenizer.decode(response.question.prompt),
                            "response": response.text,
                            "answer": response.question.answer,
                            "verdict": response.verdict,
                            "reward": float(response.verdict == "correct"),
                            "truncated": response.truncated,
                        }
                    )
                    + "\n"
                )


def log_evaluation(run: Run, results: dict[str, dict], correct: dict[str, list[int]]) -> None:
    """The line of evaluations.jsonl that eval.py compares runs by; correct: of eval_k answers to each question in turn."""
    state = run.state
    if run.rank == 0:
        benches = {
            name: {
                "avg": result["avg"],
                "levels": {level: part["avg"] for level, part in result["levels"].items()},
                "correct": correct[name],
            }
            for name, result in results.items()
        }
        with open(Path(run.cfg.out, "evaluations.jsonl"), "a" if state.step else "w") as file:
            file.write(
                json.dumps(
                    {
                        **{
                            key: getattr(state, key)
                            for key in (
                                "step",
                                "rl_steps",
                                "sft_steps",
                                "sft_phases",
                                "sampled_tokens",
                            )
                        },
                        "demonstrations": len(state.demonstrations),
                        "benches": benches,
                    }
                )
                + "\n"
            )


class Progress:
    """One live line in a terminal, plain lines elsewhere; and the step's line in metrics.jsonl. Rank 0 alone speaks."""

    def __init__(self, run: Run):
        self.run, self.bar, self.reward, self.plotted = run, None, 0.0, time.perf_counter()
        if run.rank == 0 and sys.stderr.isatty():
            self.bar = tqdm(
                total=run.cfg.steps, initial=run.state.rl_steps, unit="step", dynamic_ncols=True
            )

    def step(self, phase: str) -> None:
        run, state = self.run, self.run.state
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
        with open(Path(run.cfg.out, "metrics.jsonl"), "a") as file:
            file.write(json.dumps(line) + "\n")
        self.reward = line.get("reward", self.reward)
        if (
            time.perf_counter() - self.plotted > 300
        ):  # drawing takes longer than a small model's step
            plot(run.cfg.out)
            self.plotted = time.perf_counter()
        text = (
            f"{phase.upper():3} reward {self.reward:.2f}  buffer {len(state.buffer)}/{run.cfg.buffer_size}  "
            f"SFT phases {state.sft_phases}"
        )
        if self.bar is not None:
            self.bar.set_description(text, refresh=False)
            self.bar.update(state.rl_steps - self.bar.n)
        elif phase == "rl" and (state.rl_steps % 10 == 0 or state.rl_steps == run.cfg.steps):
            say(f"step {state.rl_steps}/{run.cfg.steps}  {text}  {state.seconds['all']:.0f} s")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.run.rank == 0:
            plot(self.run.cfg.out)


def plot(out: str) -> None:
    """plot.png from metrics.jsonl: reward with the SFT phases, accuracy by level, lengths, and engine against trainer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    rl, sft = ([line for line in lines if line["phase"] == phase] for phase in ("rl", "sft"))
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    curves = [
        (
            "reward and hard questions",
            [
                ("reward", "mean reward"),
                ("groups/all_wrong", "questions never solved"),
                ("groups/all_right", "questions always solved"),
            ],
        ),
        ("response length, tokens", [("response_tokens", "mean")]),
        (
            "|engine - trainer| log-probability",
            [("engine/mean_difference", "mean"), ("engine/max_difference", "largest")],
        ),
    ]
    for axis, (title, keys) in zip((axes[0, 0], axes[1, 0], axes[1, 1]), curves):
        for key, label in keys:
            points = [(line["rl_steps"], line[key]) for line in rl if key in line]
            axis.plot(*zip(*points) if points else ([], []), label=label)
        axis.set(title=title, xlabel="RL step")
    for step in sorted({line["rl_steps"] for line in sft}):
        axes[0, 0].axvline(step, color="0.85", zorder=0, label="_")
    axes[0, 0].plot([], [], color="0.85", label="SFT phase")
    axes[1, 1].set_yscale("log")
    evals = [line for line in lines if "evaluation" in line]
    for key in sorted({key for line in evals for key in line["evaluation"]}):
        points = [
            (line["evaluation/rl_steps"], line["evaluation"][key])
            for line in evals
            if key in line["evaluation"]
        ]
        axes[0, 1].plot(*zip(*points), marker="o", markersize=3, label=key)
    axes[0, 1].set(title="accuracy", xlabel="RL step", ylim=(-0.02, 1.02))
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.savefig(Path(out, "plot.part.png"), dpi=110)
    plt.close(figure)
    Path(out, "plot.part.png").replace(Path(out, "plot.png"))


def say(*lines: str) -> None:
    """Prints on rank 0."""
    if int(os.environ["RANK"]) == 0:
        print(*lines, sep="\n", flush=True)


def summary(run: Run) -> str:
    """The table at the end of a run."""
    state, lines = run.state, []
    if state.evals:
        lines.append(f"{'accuracy':16} before   after")
        for name, after in state.evals[-1]["results"].items():
            before = state.evals[0]["results"][name]
            lines += [f"{name:16} {before['avg']:6.3f}  {after['avg']:6.3f}"]
            if len(after["levels"]) > 1:
                lines += [
                    f"  level {level:8} {before['levels'][level]['avg']:6.3f}  {result['avg']:6.3f}"
                    for level, result in after["levels"].items()
                ]
    if "behavior" in state.seconds:
        share = state.seconds["behavior"] / max(state.seconds.get("sft", 0.0), 1e-9)
        lines += ["", f"PEAR's behaviour log-probabilities took {share:.0%} of the time of SFT"]
    used = state.demonstrations
    seconds = sorted(state.seconds.items(), key=lambda item: -item[1])
    lines += [
        "",
        f"RL steps {state.rl_steps}, SFT phases {state.sft_phases} ({state.sft_steps} steps), demonstrations used "
        f"{len(used):,} ({len(set(used)):,} different), tokens sampled {state.sampled_tokens:,}",
        "seconds: " + ", ".join(f"{phase} {value:.1f}" for phase, value in seconds),
    ]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints. One folder each, whole as soon as it has its name:
#   model/                              the weights in Hugging Face format, with tokenizer and generation config
#   shard-00000-of-00002.safetensors    rank 0's rows of every float32 tensor: weights, both optimizers, importance, anchor
#   state.json                          State and Config
#   SHA256SUMS                          of all these files, as `sha256sum -c` reads it


def row_range(rows: int, rank: int, world: int) -> tuple[int, int]:
    """The rows of a tensor that FSDP2 gives to a rank: equal chunks, rounded up."""
    chunk = math.ceil(rows / world)
    return min(rank * chunk, rows), min((rank + 1) * chunk, rows)


def shard_tensors(run: Run) -> dict[str, Tensor]:
    """Everything that a checkpoint holds per parameter, by name; this rank's shards."""
    tensors = {}
    for i, (name, parameter) in enumerate(run.policy.model.named_parameters()):
        tensors[f"weight/{name}"] = parameter.detach().to_local()
        if run.importance:
            tensors |= {f"importance/{name}": run.importance[i], f"anchor/{name}": run.anchor[i]}
        for which, optimizer in run.optimizers.items():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{which}/{key}/{name}"] = (
                    value.to_local() if isinstance(value, DTensor) else value
                )
    return tensors


def save_checkpoint(run: Run) -> None:
    """Writes the state as a whole or not at all. Raises Stopped on all ranks if one of them cannot write."""
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
                part.mkdir(parents=True)
        whole = {
            name: tensor.cpu()
            for name, tensor in full_weights(run.policy, run.dtype)
            if run.rank == 0
        }
        shard, shards = run.mesh.get_local_rank("shard"), run.mesh["shard"].size()
        written, sums = [], []
        with together(run):
            if run.mesh.get_local_rank("replica") == 0:
                tensors = {
                    name: tensor.cpu().contiguous() for name, tensor in shard_tensors(run).items()
                }
                written.append(part / f"shard-{shard:05d}-of-{shards:05d}.safetensors")
                save_file(tensors | {"rng": torch.get_rng_state()}, written[0])
            if run.rank == 0:
                run.policy.model.save_pretrained(part / "model", state_dict=whole)
                run.tokenizer.save_pretrained(part / "model")
                (part / "state.json").write_text(
                    json.dumps(
                        {
                            "state": asdict(run.state),
                            "config": asdict(cfg),
                            "shards": shards,
                            "data": getattr(run.questions, "fingerprint", ""),
                        }
                    )
                )
                written += [part / "state.json", *part.glob("model/*")]
            for file in written:
                sync(file)
                sums.append(f"{digest(file)}  {file.relative_to(part)}\n")
        sums = gather(run, ["".join(sums)])
        with together(run):
            if run.rank == 0:
                (part / "SHA256SUMS").write_text("".join(sums))
                for path in (
                    part / "SHA256SUMS",
                    part / "model",
                    part,
                    *Path(cfg.out).glob("*.jsonl"),
                ):
                    sync(path)
                part.rename(folder)
                sync(folder.parent)
                best = f"step-{best_step(run.state):06d}"
                if best == folder.name:
                    folder.with_name("best.partial").symlink_to(best)
                    folder.with_name("best.partial").replace(folder.with_name("best"))
                for old in checkpoints(cfg.out)[: -cfg.keep]:
                    if old.name != best:
                        shutil.rmtree(old.rename(old.with_suffix(".partial")))


def best_step(state: State) -> int:
    """The step, after the start, whose evaluation has the highest mean over the benchmarks, the first if several; else 0."""

    def mean(evaluated: dict) -> float:
        return sum(result["avg"] for result in evaluated["results"].values()) / len(
            evaluated["results"]
        )

    return max((e for e in state.evals if e["step"]), key=mean, default={"step": 0})["step"]


@contextmanager
def together(run: Run):
    """All ranks' writing, and a barrier: what fails on one raises Stopped on all, so that none waits for it in vain."""
    problem = ""
    try:
        yield
    except (OSError, SafetensorError) as error:
        problem = str(error)
    if problems := [text for text in gather(run, [problem]) if text]:
        left = checkpoints(run.cfg.out)
        raise Stopped(
            f"step {run.state.step}: the checkpoint could not be written: {problems[0]}; "
            + (f"the last is {left[-1]}" if left else "there is none")
        )


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
    """The newest checkpoint whose files are as they were written; damaged ones are renamed on the way to it.

    The ranks share the reading. Raises ValueError if there is none.
    """
    for folder in reversed(checkpoints(run.cfg.out)):
        found = []
        try:
            lines = (folder / "SHA256SUMS").read_text().splitlines()
            for value, name in (line.split("  ", 1) for line in lines[run.rank :: run.world]):
                if digest(folder / name) != value:
                    found.append(f"{name} is not as it was written")
        except (OSError, ValueError) as error:
            found.append(str(error))
        problems = gather(run, [found])
        if not any(problems):
            return folder
        say(
            f"{folder} is damaged ({next(filter(None, problems))[0]}): renamed to {folder.name}.damaged"
        )
        if run.rank == 0:
            folder.rename(folder.with_suffix(".damaged"))
        barrier(run)
    raise ValueError(f"--resume: no checkpoint in {Path(run.cfg.out, 'checkpoints')} is whole")


def load_checkpoint(run: Run, folder: Path) -> None:
    """Restores everything, from any number of shards to any number of ranks; cuts the logs back to the checkpoint's step."""
    saved = json.loads((folder / "state.json").read_text())
    if saved["data"] != getattr(run.questions, "fingerprint", ""):
        raise ValueError(
            f"--data {run.cfg.data}: other questions than those that the run in --out {run.cfg.out} began with"
        )
    run.state = State(**saved["state"])
    files = [
        safe_open(folder / f"shard-{i:05d}-of-{saved['shards']:05d}.safetensors", "pt")
        for i in range(saved["shards"])
    ]
    keys = set(files[0].keys())
    shard, shards = run.mesh.get_local_rank("shard"), run.mesh["shard"].size()

    def rows(key: str, shape: torch.Size) -> Tensor:
        start, stop = row_range(shape[0], shard, shards)
        parts = []
        for i, file in enumerate(files):
            first, last = row_range(shape[0], i, len(files))
            if max(start, first) < min(stop, last):
                parts.append(
                    file.get_slice(key)[max(start, first) - first : min(stop, last) - first]
                )
        return torch.cat(parts) if parts else torch.empty(0, *shape[1:])

    with torch.no_grad():
        for i, (name, p) in enumerate(run.policy.model.named_parameters()):
            p.to_local().copy_(rows(f"weight/{name}", p.shape))
            if run.importance:
                run.importance[i].copy_(rows(f"importance/{name}", p.shape))
                run.anchor[i].copy_(rows(f"anchor/{name}", p.shape))
            for which, optimizer in run.optimizers.items():
                if f"{which}/step/{name}" in keys:
                    moments = {
                        key: DTensor.from_local(
                            rows(f"{which}/{key}/{name}", p.shape).to(run.device),
                            p.device_mesh,
                            p.placements,
                            shape=p.shape,
                            stride=p.stride(),
                        )
                        for key in ("exp_avg", "exp_avg_sq")
                    }
                    optimizer.state[p] = {
                        "step": files[0].get_tensor(f"{which}/step/{name}").to(run.device),
                        **moments,
                    }
    if shard < len(files):
        torch.set_rng_state(files[shard].get_tensor("rng"))
    if run.rank == 0:
        for name in ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl"):
            path = Path(run.cfg.out, name)
            kept = (
                [
                    line
                    for line in path.read_text().splitlines(keepends=True)
                    if line.endswith("\n") and json.loads(line)["step"] <= run.state.step
                ]
                if path.exists()
                else []
            )
            write_whole(path, "".join(kept))


def barrier(run: Run) -> None:
    if run.world > 1:
        dist.barrier()


# ---------------------------------------------------------------------------------------------------------------------


def set_up(cfg: Config) -> Run:
    """Loads everything that a run needs, cheapest checks first. Raises ValueError with one line on what the user can mend."""
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # How long a rank may wait is --step-limit's to say, and nobody's while the data is checked, by rank 0 alone.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(days=7)
    )
    mesh = init_device_mesh(
        device.type, (cfg.replicas, world // cfg.replicas), mesh_dim_names=("replica", "shard")
    )
    dtype = (
        getattr(torch, cfg.dtype)
        if cfg.dtype != "auto"
        else torch.bfloat16
        if cuda
        else torch.float32
    )

    model_dir, config, tokenizer, config_edits = open_model(cfg, rank)
    checker = evaluation.Checker(
        evaluation.checker_workers(world), cfg.check_limit, cfg.extract, cfg.require_think
    )
    questions, benches = load_data(cfg, rank, tokenizer, checker)

    policy = load_policy(cfg, model_dir, config, mesh, dtype)
    reference = (
        load_policy(cfg, model_dir, config, mesh, dtype).requires_grad_(False)
        if cfg.kl_coef > 0
        else None
    )
    optimizers = {
        which: torch.optim.AdamW(
            policy.parameters(),
            lr,
            (cfg.beta1, cfg.beta2),
            weight_decay=cfg.weight_decay,
            fused=True,
        )
        for which, lr in (("rl", cfg.rl_lr), ("sft", cfg.sft_lr))
    }
    sampler = None
    if cfg.schedule != "sft" or benches:
        sampler = rollout.make_sampler(
            cfg.sampler,
            model_dir,
            max_len=cfg.max_prompt + cfg.max_response,
            dtype=dtype,
            eos_ids=evaluation.eos_ids(model_dir, tokenizer),
            seed=cfg.seed,
            max_num_seqs=cfg.max_num_seqs,
            kv_cache_gib=cfg.kv_cache_gib,
            gpu_memory_utilization=cfg.gpu_memory_utilization,
            trust_remote_code=cfg.trust_remote_code,
            config_edits=config_edits,
        )
        say(f"sampler: {sampler.name}, because {sampler.why}")
    shards = [p.detach().to_local() for p in policy.parameters()] if freezes(cfg) else []
    kept = [torch.empty_like(s, device="cpu" if cfg.offload_importance else device) for s in shards]
    torch.manual_seed(cfg.seed * 1_000_003 + rank)  # of dropout, where a model has it
    return Run(
        cfg,
        rank,
        world,
        device,
        mesh,
        dtype,
        tokenizer,
        questions,
        benches,
        policy,
        reference,
        optimizers,
        sampler,
        checker,
        State(),
        [torch.zeros_like(k) for k in kept],
        [k.copy_(s) for k, s in zip(kept, shards)],
    )


def open_model(cfg: Config, rank: int):
    """(folder or Hub id, configuration, tokenizer, edits for the engine); makes the embedded task's base model first."""
    model_dir = cfg.model or str(Path(cfg.out).parent / f"embedded-base-{cfg.seed}")
    if not cfg.model and not Path(model_dir, "tokenizer.json").exists():
        dist.barrier()
        if rank == 0:
            say(f"making the embedded task's base model in {model_dir}")
            part = Path(f"{model_dir}.{os.getpid()}.partial")  # another run may be making it too
            data.make_base(part, cfg.seed, data.embedded_tokenizer(), data.base_chain, say=say)
            if Path(model_dir).exists():
                shutil.rmtree(part)
            else:
                part.rename(model_dir)
        dist.barrier()
    try:
        config = transformers.AutoConfig.from_pretrained(
            model_dir, trust_remote_code=cfg.trust_remote_code
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            model_dir, trust_remote_code=cfg.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model {model_dir}: not a model's folder or Hub id: {str(error).splitlines()[0]}"
        ) from None
    if cfg.behavior_model:
        check_behavior_model(cfg, tokenizer)
    return model_dir, config, tokenizer, edit_config(cfg, config)


def edit_config(cfg: Config, config) -> dict:
    """Sets the model's context by --rope-theta and --max-position-embeddings, and checks that prompt and response fit in it.

    Returns what was set, for the engine, which reads the configuration by itself.
    """
    edits = {}
    if cfg.rope_theta:
        edits["rope_parameters"] = {**config.rope_parameters, "rope_theta": cfg.rope_theta}
    if cfg.max_position_embeddings:
        edits["max_position_embeddings"] = cfg.max_position_embeddings
    for name, value in edits.items():
        setattr(config, name, value)
    context = getattr(config, "max_position_embeddings", math.inf)
    if cfg.max_prompt + cfg.max_response > context:
        raise ValueError(
            f"--max-prompt {cfg.max_prompt} and --max-response {cfg.max_response} do not fit in the model's "
            f"context of {context} tokens: lower them, or extend it by --max-position-embeddings and --rope-theta"
        )
    return edits


def load_data(cfg: Config, rank: int, tokenizer, checker):
    """The questions to train on, and those of each benchmark to evaluate on."""
    if not cfg.data:
        questions = data.embedded_questions(tokenizer, "train", data.TRAIN_TERMS, 5000)
    else:
        system = {"data": None, "none": ""}.get(cfg.system, cfg.system)
        for turn in (0, 1):  # rank 0 checks the rows and remembers the outcome, the others read it
            if (rank == 0) == (turn == 0):
                questions = data.load_questions(
                    cfg.data,
                    tokenizer,
                    max_prompt=cfg.max_prompt,
                    max_response=cfg.max_response,
                    checker=checker,
                    question_field=cfg.question_field or None,
                    answer_field=cfg.answer_field or None,
                    solution_field=cfg.solution_field or None,
                    system=system,
                    generation_prefix=cfg.generation_prefix,
                    template=cfg.template,
                    split=cfg.split or None,
                    config=cfg.data_config or None,
                    revision=cfg.revision or None,
                )
            dist.barrier()
        say(f"{cfg.data}: {questions.report()}")
    most = len(data.demonstrated(questions))
    if not most and cfg.schedule != "rl":
        raise ValueError(
            f"--schedule {cfg.schedule} needs demonstrations, and no question of --data {cfg.data} has one"
        )
    if cfg.schedule == "interleave" and cfg.buffer_size > most:
        raise ValueError(
            f"--buffer-size {cfg.buffer_size} would never be reached: {most} questions have a demonstration"
        )
    system = (
        data.system_prompt(questions)
        if cfg.data and cfg.system == "data"
        else None
        if cfg.system == "none"
        else cfg.system
    )
    return questions, {
        name: evaluation.load_questions(name, tokenizer, system, cfg.generation_prefix)
        for name in cfg.evaluate.split(",")
        if name
    }


def memory_plan(cfg: Config, config, world: int, gpu_gib: float) -> list[tuple[str, float, str]]:
    """(what, GiB, arithmetic) of the memory of one GPU of `gpu_gib`, computing in bfloat16 on `world` ranks, with vLLM.

    Computed, not measured, for Qwen2's blocks. A phase's rows need not peak together, so its sum is an upper bound.
    Raises ValueError if the KV cache would not hold one response of full length.
    """
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, trust_remote_code=cfg.trust_remote_code
        )
    n, layer, root = (
        sum(p.numel() for p in part.parameters()) for part in (model, model.model.layers[0], model)
    )
    root -= sum(p.numel() for p in model.model.layers.parameters())
    layers, width, inner, heads = (
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
    )
    kv = config.num_key_value_heads * (getattr(config, "head_dim", None) or width // heads)
    vocab, shards, length = (
        config.vocab_size,
        world // cfg.replicas,
        cfg.max_prompt + cfg.max_response,
    )
    tokens = max(cfg.micro_tokens, length)  # of a micro-batch
    frozen, checkpointed, once = freezes(cfg), cfg.activation_checkpointing, cfg.gather_once
    # What a Qwen2 block keeps of a token for its backward pass: of each of its two norms 4 + 2 + 2 B (the input in float32,
    # the output before and after its weight) and a factor of 4 B; 2 B each of query, key, value, attention's output, the
    # gate before and after SiLU, up, and their product; and 4 B a head of attention's own.
    block = 20 * width + 4 * kv + 4 * heads + 8 * inner + 8
    block_text = f"(20 x {width:,} + 4 x {kv:,} + 4 x {heads} + 8 x {inner:,} + 8) B"

    def sharded(bytes_of: dict[str, int]) -> list:
        return [
            (what, size * n / shards, f"{size} B x {n:,} parameters / {shards}")
            for what, size in bytes_of.items()
        ]

    held = sharded(
        {
            "weights, float32": 4,
            "AdamW of RL, two moments": 8 * (cfg.schedule != "sft"),
            "AdamW of SFT, two moments": 8 * (cfg.schedule != "rl"),
            "importance map and anchor": 8 * (frozen and not cfg.offload_importance),
            "reference model, float32": 4 * (cfg.kl_coef > 0),
        }
    )
    held.append(
        ("allowance", ALLOWANCE, "CUDA context, NCCL, what a sleeping engine keeps: an estimate")
    )
    training = sharded({"gradients, float32": 4}) + [
        (
            "gradients not yet reduced, float32",
            4 * n * once,
            f"4 B x {n:,} parameters: --gather-once",
        ),
        ("weights gathered", 2 * n * once, f"2 B x {n:,} parameters: --gather-once"),
        (
            "mask and importance of one tensor",
            5 * vocab * width / shards * frozen,
            f"(1 + 4) B x {vocab:,} x {width:,} / {shards}",
        ),
        (
            "two layers gathered",
            4 * layer * (not once),
            f"2 x 2 B x {layer:,}: the one at work and the next",
        ),
        (
            "a layer's gradients",
            6 * layer,
            f"(2 + 4) B x {layer:,}: bfloat16, and float32 to be reduced",
        ),
        ("embeddings and head gathered", 2 * root * (not once), f"2 B x {root:,}"),
        ("their gradients", 6 * root, f"(2 + 4) B x {root:,}"),
        (
            "activations kept",
            2 * width * layers * tokens * checkpointed,
            f"2 B x {width:,} x {layers} layers x {tokens:,} tokens",
        ),
        (
            "activations of a layer, recomputed",
            block * tokens * checkpointed,
            f"{block_text} x {tokens:,} tokens",
        ),
        (
            "activations",
            block * layers * tokens * (not checkpointed),
            f"{block_text} x {layers} layers x {tokens:,} tokens",
        ),
        (
            "gradients of a layer's activations",
            6 * inner * tokens,
            f"3 x 2 B x {inner:,} x {tokens:,} tokens",
        ),
        (
            "last norm and hidden states",
            14 * width * tokens,
            f"(8 + 6) B x {width:,} x {tokens:,} tokens: kept, and gradients",
        ),
        (
            "a tile of the logits",
            10 * 1024 * tokens,
            f"(4 + 4 + 2) B x 1,024 entries of the vocabulary x {tokens:,} tokens",
        ),
    ]
    position = 4 * layers * kv  # bytes of a token's keys and values
    share = cfg.gpu_memory_utilization * gpu_gib * 2**30
    cache = share - 2 * n - ENGINE_WORK
    if cache < position * length:
        raise ValueError(
            f"--gpu-memory-utilization {cfg.gpu_memory_utilization}: beside its weights the engine would have "
            f"{cache / 2**30:.1f} GiB for its KV cache, and one response takes {position * length / 2**30:.1f}"
        )
    sampling = [
        ("engine's weights, bfloat16", 2 * n, f"2 B x {n:,}"),
        ("engine's activations", ENGINE_WORK, "an estimate"),
        (
            "KV cache",
            cache,
            f"the rest of {share / 2**30:.1f} GiB: 4 B x {layers} layers x {kv:,} x "
            f"{int(cache / position):,} tokens, {cache / position / length:.1f} responses of full length",
        ),
    ]
    host = [
        ("host memory of a rank, at the start", 4 * n, f"4 B x {n:,}: each rank reads all weights")
    ]
    if frozen and cfg.offload_importance:
        host += [
            (
                "host memory of a rank, from then on",
                8 * n / shards,
                f"8 B x {n:,} / {shards}: importance map and anchor",
            )
        ]
    sums = [
        [(what, sum(size for _, size, _ in parts), text)]
        for what, parts, text in (
            ("held always", held, "the rows above"),
            ("TRAINING", held + training, f"of {gpu_gib:.1f} GiB, the engine asleep"),
            (
                "SAMPLING",
                held + sampling,
                f"of {gpu_gib:.1f} GiB, the optimizers' state beside the engine",
            ),
        )
    ]
    plan = held + sums[0] + training + sums[1] + sampling + sums[2] + host
    return [(what, size / 2**30, text) for what, size, text in plan if size]


def dry_run(cfg: Config) -> str:
    """Resolves model, tokenizer, data and benchmarks as a run on cfg.dry_run ranks would, and says what it found.

    Raises ValueError like set_up. Needs no GPU, and no rank but this one.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model_dir, config, tokenizer, _ = open_model(cfg, 0)
        with evaluation.Checker(
            evaluation.checker_workers(1), cfg.check_limit, cfg.extract, cfg.require_think
        ) as checker:
            questions, benches = load_data(cfg, 0, tokenizer, checker)
    finally:
        dist.destroy_process_group()
    places = data.demonstrated(questions)
    question = questions[places[0] if places else 0]
    prompt, response = (
        tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for ids in (question.prompt, question.demonstration or [])
    )
    ends = " or ".join(
        repr(tokenizer.decode([i])) for i in evaluation.eos_ids(model_dir, tokenizer)
    )
    report = (
        questions.report()
        if isinstance(questions, data.Questions)
        else f"{len(questions)} questions"
    )
    problem = "asked for" if cfg.sampler == "torch" else rollout.vllm_problem()
    gpu_gib = (
        torch.cuda.get_device_properties(0).total_memory / 2**30
        if torch.cuda.is_available()
        else GPU_GIB
    )
    plan = memory_plan(cfg, config, cfg.dry_run, gpu_gib)
    over = [
        f"{what} needs up to {size:.1f} GiB of {gpu_gib:.1f}"
        for what, size, _ in plan
        if what in ("TRAINING", "SAMPLING") and size > gpu_gib
    ]
    return "\n".join(
        [
            f"model      {model_dir}: {config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size}, context "
            f"{config.max_position_embeddings:,}, rotary base {config.rope_parameters['rope_theta']:,.0f}; its weights were not read",
            f"tokenizer  {type(tokenizer).__name__}, {len(tokenizer):,} tokens, "
            f"{'with' if tokenizer.chat_template else 'without'} a chat template; a response ends with {ends}",
            f"sampler    on this machine {'PyTorch: ' + problem if problem else 'vLLM'}",
            f"data       {cfg.data or 'the embedded task'}: {report}; {len(places):,} with a demonstration",
            *(f"evaluate   {name}: {len(bench):,} questions" for name, bench in benches.items()),
            "",
            f"the first question{' that has a demonstration' if places else ''}: gold answer {question.answer!r}, prompt of "
            f"{len(question.prompt):,} tokens, response of {len(question.demonstration or []):,}; they meet at <<<|>>>",
            prompt + "<<<|>>>" + response,
            "",
            f"memory of one GPU in GiB, {cfg.dry_run} ranks, computing in bfloat16; computed, not measured",
            *(f"  {what:39} {size:7.2f}  {text}" for what, size, text in plan),
            "",
            "dry run: memory may not suffice: " + "; ".join(over)
            if over
            else "dry run: all is in place; nothing was trained",
        ]
    )


def main() -> None:
    alone = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }
    os.environ.update(
        {name: os.environ.get(name, value) for name, value in alone.items()}
    )  # without torchrun: one rank
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(
            1, signal.SIGKILL
        )  # PR_SET_PDEATHSIG: a rank does not outlive torchrun, keeping its GPU
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training begins there is nothing to save
    try:
        cfg = parse_config(sys.argv[1:])
        found = open_folder(cfg)
        say(describe(cfg))
        if cfg.dry_run:
            return say("", dry_run(cfg))
        lock = lock_folder(cfg)  # noqa: F841  held as long as this file is open
        transformers.utils.logging.disable_progress_bar()
        run = set_up(cfg)
        if cfg.pear != "off":
            find_behavior(run)
        if found:
            load_checkpoint(run, newest_whole(run))
    except ValueError as error:
        if os.environ["RANK"] == "0":
            print(f"mifo.py: error: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    if run.rank == 0:
        write_whole(Path(cfg.out, "config.json"), json.dumps(asdict(cfg), indent=1))
    try:
        if found and run.state.evals and run.state.evals[-1]["step"] == run.state.step:
            push(run)  # an uninterrupted run's sampler holds these weights since the evaluation
            run.log.clear()
        stop = train(run)
    except Stopped as error:
        if run.rank == 0:
            print(f"mifo.py: error: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    except OSError as error:  # of a rank's own
        print(
            f"mifo.py: error: rank {run.rank}, step {run.state.step}: {error}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
    if stop:
        say(
            f"stopped by {signal.Signals(stop).name} after step {run.state.step}; "
            f"--resume goes on from {checkpoints(cfg.out)[-1]}"
        )
        sys.stdout.flush()
        os._exit(128 + stop)
    say(
        "",
        summary(run),
        "",
        f"model: {checkpoints(cfg.out)[-1] / 'model'}   plot: {Path(cfg.out, 'plot.png')}",
    )
    run.checker.close()
    barrier(run)


def open_folder(cfg: Config) -> bool:
    """Whether there is a run to go on with in --out. Raises ValueError if that is not what the flags say."""
    out = Path(cfg.out)
    if not cfg.resume:
        if (out / "metrics.jsonl").exists():
            raise ValueError(
                f"--out {cfg.out} holds a run already: continue it by --resume, or give another folder"
            )
        return False
    if not checkpoints(cfg.out):
        raise ValueError(f"--resume: there is no checkpoint in {out / 'checkpoints'}")
    try:
        before = json.loads((out / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--resume: {out / 'config.json'}: {error}") from None
    changed = {
        name: (before.get(name), value)
        for name, value in asdict(cfg).items()
        if before.get(name) != value
    }
    refused = [
        f"--{name.replace('_', '-')} was {old!r} and is {new!r}"
        for name, (old, new) in changed.items()
        if name not in MAY_CHANGE
    ]
    if refused:
        raise ValueError(
            f"--resume: {'; '.join(refused)}: this would be another run. Start one from its weights by --model "
            f"{checkpoints(cfg.out)[-1] / 'model'}, or give the values it began with"
        )
    taken = [
        f"{name} {old!r} -> {new!r}" for name, (old, new) in changed.items() if name != "resume"
    ]
    say(*[f"changed since the run began: {', '.join(taken)}"] * bool(taken))
    return True


def lock_folder(cfg: Config):
    """Makes --out and holds its lock, on rank 0, until this process ends. Raises ValueError if it is another's."""
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


def write_whole(path: Path, text: str) -> None:
    """The file has either its old text or the new one, whenever this is interrupted."""
    path.with_suffix(".partial").write_text(text)
    path.with_suffix(".partial").replace(path)


def describe(cfg: Config) -> str:
    """The resolved settings in three columns, those that are not the defaults marked."""
    values = [(f.name, getattr(cfg, f.name), f.default) for f in dataclasses.fields(cfg)]
    cells = [
        f"{' ' if value == default else '*'}{name} = {value!r}" for name, value, default in values
    ]
    rows = math.ceil(len(cells) / 3)
    columns = [cells[i : i + rows] for i in range(0, len(cells), rows)]
    width = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(column[i].ljust(w) for column, w in zip(columns, width) if i < len(column))
        for i in range(rows)
    ]
    return "\n".join(["settings (* differs from the default)", *(line.rstrip() for line in lines)])


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(
        0
    )  # where Python ends a process that still has a process group, gloo at times aborts it if a peer has ended
