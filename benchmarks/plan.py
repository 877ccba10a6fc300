"""Memory, time and communication of MIFO's steps for 1.5B, 7B and 32B on 8, 64 and 512 GPUs: computed, not measured.

    python benchmarks/plan.py [--tokens 3000] [--flops 989e12] [--bandwidth 3.35e12] [--gib 79]     # the defaults: H100 SXM

An RL step is of 128 questions, or of 16 a GPU, with 8 responses each. Assumed: a mean response of --tokens and a longest one of
8,192; 45 % of the matmul peak in training and 60 % of the memory bandwidth in decoding; 300 GB/s of NVLink within a node of 8,
and 40 GB/s a GPU between nodes. Activations are recomputed. The model is sharded over as few nodes as hold it (--replicas).
"""

import argparse
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("WORLD_SIZE", "8")

import mifo
from transformers import Qwen2Config

MODELS = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary, tied
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
}
NODE, NVLINK, NETWORK, PROMPT, MICRO = 8, 300e9, 40e9, 200, 16384


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (("tokens", 3000), ("flops", 989e12), ("bandwidth", 3.35e12), ("gib", 79.0)):
        parser.add_argument(f"--{name}", type=float, default=value)
    args = parser.parse_args()
    print(
        "| model | GPUs | questions | `--replicas` | engine's share | training, GiB | sampling, GiB | decoding, s | training, s "
        "| gathers and reductions, s | weight push, s |\n" + "|---" * 11 + "|"
    )
    for name, (width, inner, layers, heads, kv, vocab, tied) in MODELS.items():
        config = Qwen2Config(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv,
            vocab_size=vocab,
            tie_word_embeddings=tied,
            max_position_embeddings=16384,
        )
        n = (
            layers * (width * (2 * width + 2 * kv * width // heads) + 3 * width * inner)
            + (2 - tied) * vocab * width
        )
        for world, questions in ((8, 128), (64, 128), (64, 1024), (512, 128), (512, 8192)):
            found = next(
                (
                    (replicas, share, plan)
                    for replicas in (64, 8, 1)
                    for share in (0.5, 0.7, 0.9)
                    if (plan := fits(config, world, replicas, share, args.gib))
                ),
                None,
            )
            if found is None:
                print(f"| {name} | {world} | {questions} | | | does not fit | | | | | |")
                continue
            replicas, share, plan = found
            responses, shards = 8 * questions / world, world // replicas
            tokens = responses * (args.tokens + PROMPT)  # that this GPU trains on
            flops = (
                tokens * 8 * n + 4 * tokens * args.tokens * width * layers
            )  # forward twice, backward; attention
            link = NVLINK if shards <= NODE else NETWORK
            micro_batches = math.ceil(tokens / MICRO)
            # A micro-batch gathers bfloat16 weights twice and reduces float32 gradients once; copies all-reduce theirs in a ring.
            gathered = 8 * n * micro_batches * (shards - 1) / shards
            between = 8 * n / shards * (replicas - 1) / replicas * micro_batches
            cache = 4 * layers * kv * width // heads  # bytes of a token's keys and values
            read = (
                8192 * 2 * n + responses * args.tokens**2 / 2 * cache
            )  # weights at each of the longest response's tokens
            print(
                f"| {name} | {world} | {questions} | {replicas} | {share} | {plan['TRAINING']:.0f} | {plan['SAMPLING']:.0f} | "
                f"{read / (0.6 * args.bandwidth):.0f} | {flops / (0.45 * args.flops):.1f} | "
                f"{gathered / link + between / NETWORK:.1f} | {2 * n * (shards - 1) / shards / link:.2f} |"
            )


def fits(config, world: int, replicas: int, share: float, gib: float) -> dict[str, float] | None:
    """memory_plan by name, if both phases fit."""
    if world // replicas < NODE:
        return None
    cfg = mifo.Config(
        replicas=replicas,
        activation_checkpointing=True,
        gpu_memory_utilization=share,
        micro_tokens=MICRO,
    )
    try:
        plan = {what: size for what, size, _ in mifo.memory_plan(cfg, config, world, gib)}
    except ValueError:  # the engine has no room for one response
        return None
    return plan if max(plan["TRAINING"], plan["SAMPLING"]) <= gib else None


if __name__ == "__main__":
    main()
