"""Tokens a second of rollout.TorchSampler beside transformers' generate: python benchmarks/sampling.py [--repeats 3].

Random Qwen2 weights, distinct prompts of 4 to 32 tokens, greedy; `uneven` ends a response at any of many tokens, `even`
never before the limit. Both get the same requests in one batch, and must return the same tokens.
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
from rollouts import SHAPES

transformers.utils.logging.disable_progress_bar()

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--repeats", type=int, default=3)
parser.add_argument("--tokens", type=int, default=256)
parser.add_argument("--rows", type=int, nargs="+", default=[64, 256])
parser.add_argument("--models", nargs="+", default=["0.8M", "25M"], choices=SHAPES)
args = parser.parse_args()

print(
    f"{'model':>6} {'rows':>4} {'ends':>6} {'mean length':>11} {'generate/s':>10} {'ours/s':>8} {'ratio':>6}  to reach 2.00"
)
for name in args.models:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        tie_word_embeddings=True,
        initializer_range=0.1,
        max_position_embeddings=1024,
        **SHAPES[name],
    )
    with tempfile.TemporaryDirectory() as folder:
        transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
        for rows in args.rows:
            draw = torch.Generator().manual_seed(rows)
            lengths = torch.randint(4, 33, (rows,), generator=draw).tolist()
            prompts = [
                torch.randint(config.vocab_size, (length,), generator=draw).tolist()
                for length in lengths
            ]
            longest = max(map(len, prompts))
            ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
            attention = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
            for ends, eos in (
                ("uneven", list(range(1, config.vocab_size, 64))),
                ("even", [config.vocab_size]),
            ):
                sampler = rollout.make_sampler(
                    "torch",
                    folder,
                    max_len=longest + args.tokens,
                    dtype=torch.float32,
                    eos_ids=eos,
                    max_num_seqs=rows,
                )
                peer = (
                    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
                    .to(sampler.device)
                    .eval()
                )
                seconds, outputs = {"generate": [], "ours": []}, {}
                for _ in range(args.repeats):
                    start = time.perf_counter()
                    out = peer.generate(
                        input_ids=ids.to(sampler.device),
                        attention_mask=attention.to(sampler.device),
                        max_new_tokens=args.tokens,
                        do_sample=False,
                        eos_token_id=eos,
                        pad_token_id=0,
                    )
                    outputs["generate"] = out[:, longest:].tolist()
                    seconds["generate"].append(time.perf_counter() - start)
                    start = time.perf_counter()
                    outputs["ours"] = [
                        s.tokens for [s] in sampler.sample(prompts, 1, [0] * rows, args.tokens, 0.0)
                    ]
                    seconds["ours"].append(time.perf_counter() - start)
                same = sum(theirs[: len(ours)] == ours for theirs, ours in zip(*outputs.values()))
                if same < rows:
                    print(f"{rows - same} of {rows} responses differ", file=sys.stderr)
                count = sum(map(len, outputs["ours"]))
                rate = {key: count / statistics.median(value) for key, value in seconds.items()}
                ratio = statistics.median(
                    a / b for a, b in zip(seconds["generate"], seconds["ours"])
                )
                print(
                    f"{name:>6} {rows:4} {ends:>6} {count / rows:11.1f} {rate['generate']:10.0f} "
                    f"{rate['ours']:8.0f} {ratio:6.2f}",
                    flush=True,
                )
