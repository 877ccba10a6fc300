"""Tokens a second of rollout.TorchSampler beside transformers' generate.

    python benchmarks/sampling.py [--repeats 3] [--models 0.8M] [--rows 64]

Random Qwen2 weights, distinct prompts of 4 to 32 tokens, greedy; `uneven` ends a response at any of
many tokens, `even` never before the limit. Both get the same requests in one batch, and must return
the same tokens.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: F401  before transformers: it hides packages that break its import
import rollout
import torch
import transformers
from rollouts import SHAPES, shape


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--models", nargs="+", default=["0.8M", "25M"], choices=SHAPES)
    args = parser.parse_args()
    head = f"{'model':>6} {'rows':>4} {'ends':>6} {'mean length':>11} {'generate/s':>10}"
    print(f"{head} {'ours/s':>8} {'ratio':>6}  to reach 2.00")
    for name in args.models:
        torch.manual_seed(0)
        config = shape(name, initializer_range=0.1, max_position_embeddings=1024)
        vocab = config.vocab_size
        ending = {"uneven": list(range(1, vocab, 64)), "even": [vocab]}
        with tempfile.TemporaryDirectory() as folder:
            transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
            for rows in args.rows:
                for ends, eos_ids in ending.items():
                    result = measure(args, folder, random_prompts(rows, vocab), eos_ids)
                    print(f"{name:>6} {rows:4} {ends:>6} {result}", flush=True)


def random_prompts(rows: int, vocab: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(rows)
    lengths = torch.randint(4, 33, (rows,), generator=draw).tolist()
    return [torch.randint(vocab, (length,), generator=draw).tolist() for length in lengths]


def measure(args, folder: str, prompts: list[list[int]], eos_ids: list[int]) -> str:
    """The last four columns: mean length, both rates, their ratio."""
    rows, longest = len(prompts), max(map(len, prompts))
    sampler = rollout.make_sampler(
        "torch",
        folder,
        max_len=longest + args.tokens,
        dtype=torch.float32,
        eos_ids=eos_ids,
        max_num_seqs=rows,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = model.to(sampler.device).eval()
    empty = [longest - len(prompt) for prompt in prompts]  # padding on the left
    ids = torch.tensor([[0] * n + prompt for n, prompt in zip(empty, prompts)])
    mask = torch.tensor([[0] * n + [1] * (longest - n) for n in empty])

    def generate() -> list[list[int]]:
        out = model.generate(
            input_ids=ids.to(sampler.device),
            attention_mask=mask.to(sampler.device),
            max_new_tokens=args.tokens,
            do_sample=False,
            eos_token_id=eos_ids,
            pad_token_id=0,
        )
        return out[:, longest:].tolist()

    def ours() -> list[list[int]]:
        samples = sampler.sample(prompts, 1, [0] * rows, args.tokens, 0.0)
        return [sample.tokens for [sample] in samples]

    theirs_seconds, our_seconds = [], []
    for _ in range(args.repeats):
        start = time.perf_counter()
        theirs = generate()
        middle = time.perf_counter()
        our = ours()
        theirs_seconds.append(middle - start)
        our_seconds.append(time.perf_counter() - middle)
    differing = sum(a[: len(b)] != b for a, b in zip(theirs, our))
    if differing:
        print(f"{differing} of {rows} responses differ", file=sys.stderr)
    count = sum(map(len, our))
    rates = [count / statistics.median(times) for times in (theirs_seconds, our_seconds)]
    ratio = statistics.median(a / b for a, b in zip(theirs_seconds, our_seconds))
    return f"{count / rows:11.1f} {rates[0]:10.0f} {rates[1]:8.0f} {ratio:6.2f}"


if __name__ == "__main__":
    main()
