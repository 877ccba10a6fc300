"""Memory, time and communication of MIFO's steps: computed, not measured.

    python benchmarks/plan.py --gpus 8 --recipe recipes/qwen2.5-math-7b.toml [flags of mifo.py]
    python benchmarks/plan.py [--tokens 3000] [--flops 989e12] [--bandwidth 3.35e12]

The first prints what fills one GPU's memory in a run of these settings, with the arithmetic, and
whether it may not suffice. It reads the model's configuration alone: offline, give a folder that
holds its config.json by --model.

The second prints a table of 1.5B, 7B and 32B on 8, 64 and 512 GPUs, by default H100 SXM. An RL step
is of 128 questions, or of 16 a GPU, with 8 responses each. Assumed: a mean response of --tokens and
a longest one of 8,192; 45 % of the matmul peak in training and 60 % of the memory bandwidth in
decoding; 300 GB/s of NVLink within a node of 8, and 40 GB/s a GPU between nodes. Activations are
recomputed. The model is sharded over as few nodes as hold it (--replicas).
"""

import argparse
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mifo
import torch
import transformers

GIB = 2**30
GPU_GIB = 79.0  # what a card of "80 GB" has to give
ALLOWANCE = 3 * GIB  # CUDA context, NCCL's buffers, CUDA graphs, which a sleeping engine keeps
ENGINE_WORK = 3.5 * GIB  # vLLM's activations of 16,384 tokens, logits; beside weights and KV cache
VOCABULARY_TILE = 1024  # entries of losses.token_logprobs' chunk

# --------------------------------------------------------------------------------------------------
# The memory of one GPU. A row is (what, bytes, arithmetic).

Row = tuple[str, float, str]


@dataclass
class Shape:
    """Sizes of a model of Qwen2's blocks."""

    parameters: int
    block: int  # parameters of one block
    root: int  # parameters outside the blocks: embeddings, last norm, head
    layers: int
    width: int
    inner: int
    heads: int
    kv: int  # width of the keys, and of the values
    vocab: int

    @classmethod
    def of(cls, config, trust_remote_code: bool = False) -> "Shape":
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code
            )
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        parameters, layers = count_parameters(model), mifo.layers_of(model)
        return cls(
            parameters=parameters,
            block=count_parameters(layers[0]),
            root=parameters - count_parameters(layers),
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            inner=getattr(config, "intermediate_size", 4 * config.hidden_size),
            heads=heads,
            kv=getattr(config, "num_key_value_heads", heads) * head_dim,
            vocab=config.vocab_size,
        )


def count_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def memory_plan(cfg: mifo.Config, config, world: int, gpu_gib: float) -> list[tuple]:
    """(what, GiB, arithmetic) of one GPU of `gpu_gib`, in bfloat16 on `world` ranks, with vLLM.

    Computed, not measured, for Qwen2's blocks. A phase's rows need not peak together, so its sum is
    an upper bound. Raises ValueError if the KV cache would not hold one response of full length.
    """
    shape = Shape.of(config, cfg.trust_remote_code)
    shards = world // cfg.replicas
    held = held_rows(cfg, shape, shards)
    once = cfg.gather_once == "on"
    if cfg.gather_once == "auto":
        once = world > 1 and mifo.whole_is_little(shape.parameters, gpu_gib * GIB)
    training = training_rows(cfg, shape, shards, once)
    sampling = sampling_rows(cfg, shape, gpu_gib)
    rows = [
        *held,
        total("held always", held, "the rows above"),
        *training,
        total("TRAINING", held + training, f"of {gpu_gib:.1f} GiB, the engine asleep"),
        *sampling,
        total(
            "SAMPLING",
            held + sampling,
            f"of {gpu_gib:.1f} GiB, the optimizers' state beside the engine",
        ),
        *host_rows(cfg, shape, shards),
    ]
    return [(what, size / GIB, arithmetic) for what, size, arithmetic in rows]


def total(what: str, rows: list[Row], arithmetic: str) -> Row:
    return what, sum(size for _, size, _ in rows), arithmetic


def sharded(what: str, size: int, shape: Shape, shards: int) -> Row:
    """A row of `size` bytes a parameter, shared out over the shards."""
    n = shape.parameters
    return what, size * n / shards, f"{size} B x {n:,} parameters / {shards}"


def held_rows(cfg: mifo.Config, shape: Shape, shards: int) -> list[Row]:
    """What stays on the GPU from step to step."""
    rows = [sharded("weights, float32", 4, shape, shards)]
    if cfg.schedule != "sft":
        rows.append(sharded("AdamW of RL, two moments", 8, shape, shards))
    if cfg.schedule != "rl":
        rows.append(sharded("AdamW of SFT, two moments", 8, shape, shards))
    if mifo.freezes(cfg) and not cfg.offload_importance:
        rows.append(sharded("importance map and anchor", 8, shape, shards))
    if cfg.kl_coef > 0:
        rows.append(sharded("reference model, float32", 4, shape, shards))
    if cfg.pear != "off":
        rows.append(sharded("PEAR's behaviour model, float32", 4, shape, shards))
    estimate = "CUDA context, NCCL, what a sleeping engine keeps: an estimate"
    return [*rows, ("allowance", ALLOWANCE, estimate)]


def training_rows(cfg: mifo.Config, shape: Shape, shards: int, once: bool) -> list[Row]:
    """What an optimizer step takes beside what is held; once: with --gather-once."""
    n, block, root = shape.parameters, shape.block, shape.root
    rows = [sharded("gradients, float32", 4, shape, shards)]
    if once:
        whole = f"B x {n:,} parameters: --gather-once"
        rows += [
            ("gradients not yet reduced, float32", 4 * n, f"4 {whole}"),
            ("weights gathered", 2 * n, f"2 {whole}"),
        ]
    if mifo.freezes(cfg):
        largest = shape.vocab * shape.width / shards  # the embeddings
        arithmetic = f"(1 + 4) B x {shape.vocab:,} x {shape.width:,} / {shards}"
        rows.append(("mask and importance of one tensor", 5 * largest, arithmetic))
    if not once:
        arithmetic = f"2 x 2 B x {block:,}: the one at work and the next"
        rows.append(("two layers gathered", 4 * block, arithmetic))
    arithmetic = f"(2 + 4) B x {block:,}: bfloat16, and float32 to be reduced"
    rows.append(("a layer's gradients", 6 * block, arithmetic))
    if not once:
        rows.append(("embeddings and head gathered", 2 * root, f"2 B x {root:,}"))
    rows.append(("their gradients", 6 * root, f"(2 + 4) B x {root:,}"))
    return rows + activation_rows(cfg, shape)


def activation_rows(cfg: mifo.Config, shape: Shape) -> list[Row]:
    """What the largest micro-batch's forward and backward pass keep."""
    tokens = max(cfg.micro_tokens, cfg.max_prompt + cfg.max_response)
    width, inner, layers = shape.width, shape.inner, shape.layers
    heads, kv = shape.heads, shape.kv
    # What a Qwen2 block keeps of a token for its backward pass: of each of its two norms 4 + 2 +
    # 2 B (the input in float32, the output before and after its weight) and a factor of 4 B; 2 B
    # each of query, key, value, attention's output, the gate before and after SiLU, up, and their
    # product; and 4 B a head of attention's own.
    block = 20 * width + 4 * kv + 4 * heads + 8 * inner + 8
    block_text = f"(20 x {width:,} + 4 x {kv:,} + 4 x {heads} + 8 x {inner:,} + 8) B"
    tokens_text = f"{tokens:,} tokens"
    if cfg.activation_checkpointing:
        inputs = f"2 B x {width:,} x {layers} layers x {tokens_text}"
        once = f"{block_text} x {tokens_text}"
        rows = [
            ("activations kept", 2 * width * layers * tokens, inputs),
            ("activations of a layer, recomputed", block * tokens, once),
        ]
    else:
        arithmetic = f"{block_text} x {layers} layers x {tokens_text}"
        rows = [("activations", block * layers * tokens, arithmetic)]
    mlp = f"3 x 2 B x {inner:,} x {tokens_text}"
    hidden = f"(8 + 6) B x {width:,} x {tokens_text}: kept, and gradients"
    tile = f"(4 + 4 + 2) B x {VOCABULARY_TILE:,} entries of the vocabulary x {tokens_text}"
    return rows + [
        ("gradients of a layer's activations", 6 * inner * tokens, mlp),
        ("last norm and hidden states", 14 * width * tokens, hidden),
        ("a tile of the logits", 10 * VOCABULARY_TILE * tokens, tile),
    ]


def sampling_rows(cfg: mifo.Config, shape: Shape, gpu_gib: float) -> list[Row]:
    """What the engine takes beside what is held: all of its share of the GPU."""
    n, length = shape.parameters, cfg.max_prompt + cfg.max_response
    position = 4 * shape.layers * shape.kv  # bytes of a token's keys and values
    share = cfg.gpu_memory_utilization * gpu_gib * GIB
    cache = share - 2 * n - ENGINE_WORK
    if cache < position * length:
        raise ValueError(
            f"--gpu-memory-utilization {cfg.gpu_memory_utilization}: beside its weights the engine "
            f"would have {cache / GIB:.1f} GiB for its KV cache, and one response takes "
            f"{position * length / GIB:.1f}"
        )
    tokens = cache / position
    arithmetic = (
        f"the rest of {share / GIB:.1f} GiB: 4 B x {shape.layers} layers x {shape.kv:,} x "
        f"{int(tokens):,} tokens, {tokens / length:.1f} responses of full length"
    )
    return [
        ("engine's weights, bfloat16", 2 * n, f"2 B x {n:,}"),
        ("engine's activations", ENGINE_WORK, "an estimate"),
        ("KV cache", cache, arithmetic),
    ]


def host_rows(cfg: mifo.Config, shape: Shape, shards: int) -> list[Row]:
    n = shape.parameters
    at_start = f"4 B x {n:,}: each rank reads all weights"
    rows = [("host memory of a rank, at the start", 4 * n, at_start)]
    if mifo.freezes(cfg) and cfg.offload_importance:
        later = f"8 B x {n:,} / {shards}: importance map and anchor"
        rows.append(("host memory of a rank, from then on", 8 * n / shards, later))
    return rows


def show_memory(plan: list[tuple], world: int, gpu_gib: float) -> str:
    """The plan as a table, and whether both phases fit."""
    lines = [f"memory of one GPU in GiB, {world} ranks, in bfloat16; computed, not measured"]
    lines += [f"  {what:39} {size:7.2f}  {arithmetic}" for what, size, arithmetic in plan]
    phases = {what: size for what, size, _ in plan if what in ("TRAINING", "SAMPLING")}
    over = []
    for what, size in phases.items():
        if size > gpu_gib:
            over.append(f"{what} needs up to {size:.1f} GiB of {gpu_gib:.1f}")
    verdict = "memory may not suffice: " + "; ".join(over) if over else "memory suffices"
    return "\n".join([*lines, "", verdict])


def memory_of_settings(argv: list[str], world: int, gpu_gib: float) -> str:
    os.environ["WORLD_SIZE"] = str(world)  # the ranks that parse_config checks the settings for
    cfg = mifo.parse_config(argv)
    if not cfg.model:
        raise ValueError("--gpus goes with --recipe, or with --model and --data")
    try:
        config = transformers.AutoConfig.from_pretrained(
            cfg.model, trust_remote_code=cfg.trust_remote_code
        )
    except (OSError, ValueError) as problem:
        reason = str(problem).splitlines()[0]
        raise ValueError(f"--model {cfg.model}: not a model's folder or Hub id: {reason}") from None
    return show_memory(memory_plan(cfg, config, world, gpu_gib), world, gpu_gib)


# --------------------------------------------------------------------------------------------------
# The scaling table

QWEN = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "vocab_size", "tie_word_embeddings")  # fmt: skip
MODELS = {
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
}
SIZES = [(8, 128), (64, 128), (64, 1024), (512, 128), (512, 8192)]  # GPUs, questions
NODE, NVLINK, NETWORK = 8, 300e9, 40e9  # GPUs; bytes a second
LONGEST, PROMPT, MICRO = 8192, 200, 16384  # tokens
COLUMNS = [
    "model", "GPUs", "questions", "`--replicas`", "engine's share", "training, GiB",
    "sampling, GiB", "decoding, s", "training, s", "gathers and reductions, s", "weight push, s",
]  # fmt: skip


def scaling_table(args) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for name, sizes in MODELS.items():
        settings = dict(zip(QWEN, sizes), max_position_embeddings=16384)
        config = transformers.Qwen2Config(**settings)
        for world, questions in SIZES:
            lines.append(scaling_row(args, name, config, world, questions))
    return "\n".join(lines)


def scaling_row(args, name: str, config, world: int, questions: int) -> str:
    found = first_that_fits(config, world, args.gib)
    if found is None:
        return f"| {name} | {world} | {questions} | | | does not fit | | | | | |"
    replicas, share, plan = found
    n = matrix_parameters(config)
    layers, width, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    responses, shards = 8 * questions / world, world // replicas
    tokens = responses * (args.tokens + PROMPT)  # that this GPU trains on

    cache = 4 * layers * config.num_key_value_heads * width // heads  # bytes of a token's KV
    weights_read = LONGEST * 2 * n  # all of them, at each token of the longest response
    cache_read = responses * args.tokens**2 / 2 * cache
    decoding = (weights_read + cache_read) / (0.6 * args.bandwidth)

    products = tokens * 8 * n  # forward twice, backward
    attention = 4 * tokens * args.tokens * width * layers
    training = (products + attention) / (0.45 * args.flops)

    # A micro-batch gathers bfloat16 weights twice and reduces float32 gradients once; the copies
    # all-reduce theirs in a ring.
    link = NVLINK if shards <= NODE else NETWORK
    micro_batches = math.ceil(tokens / MICRO)
    gathered = 8 * n * micro_batches * (shards - 1) / shards
    between = 8 * n / shards * (replicas - 1) / replicas * micro_batches
    traffic = gathered / link + between / NETWORK
    push = 2 * n * (shards - 1) / shards / link
    return (
        f"| {name} | {world} | {questions} | {replicas} | {share} | {plan['TRAINING']:.0f} "
        f"| {plan['SAMPLING']:.0f} | {decoding:.0f} | {training:.1f} | {traffic:.1f} | {push:.2f} |"
    )


def matrix_parameters(config) -> int:
    """Parameters of the matrices alone, a tied head once."""
    width, heads = config.hidden_size, config.num_attention_heads
    kv = config.num_key_value_heads * width // heads
    block = width * (2 * width + 2 * kv) + 3 * width * config.intermediate_size
    embeddings = 1 if config.tie_word_embeddings else 2
    return config.num_hidden_layers * block + embeddings * config.vocab_size * width


def first_that_fits(config, world: int, gib: float) -> tuple[int, float, dict] | None:
    """(replicas, engine's share, {what: GiB}): as many copies of the model as fit, or None."""
    for replicas in (64, 8, 1):
        if world // replicas < NODE:
            continue
        for share in (0.5, 0.7, 0.9):
            cfg = mifo.Config(
                replicas=replicas,
                activation_checkpointing=True,
                gpu_memory_utilization=share,
                micro_tokens=MICRO,
            )
            try:
                plan = {what: size for what, size, _ in memory_plan(cfg, config, world, gib)}
            except ValueError:  # the engine has no room for one response
                continue
            if max(plan["TRAINING"], plan["SAMPLING"]) <= gib:
                return replicas, share, plan
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="plan.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, default=0, help="ranks of the run whose memory to plan")
    parser.add_argument("--gib", type=float, default=GPU_GIB, help="memory of a GPU [%(default)s]")
    for name, value, meaning in (
        ("tokens", 3000, "mean length of a response"),
        ("flops", 989e12, "the GPU's matmul peak a second"),
        ("bandwidth", 3.35e12, "the GPU's memory bandwidth, bytes a second"),
    ):
        parser.add_argument(f"--{name}", type=float, default=value, help=f"{meaning} [{value:g}]")
    args, settings = parser.parse_known_args()
    try:
        if args.gpus < 0 or not args.gib > 0:
            raise ValueError(f"--gpus {args.gpus} and --gib {args.gib} must be above 0")
        if settings and not args.gpus:
            raise ValueError(f"{settings[0]}: settings of a run go with --gpus")
        print(
            memory_of_settings(settings, args.gpus, args.gib) if args.gpus else scaling_table(args)
        )
    except ValueError as problem:
        print(f"plan.py: error: {problem}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
