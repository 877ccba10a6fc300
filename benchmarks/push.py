"""Seconds of VLLMSampler.push beside one copy of the same weights at memcpy speed.

    python benchmarks/push.py [--repeats 7] [--model 0.8M]

Random Qwen2 weights, tied embeddings, one rank, float32 tensors as the trainer holds them. The copy
goes from tensors to tensors that exist already. Needs vLLM; bfloat16 engines take the same tensors
and convert them.
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

transformers.utils.logging.disable_progress_bar()
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--repeats", type=int, default=7)
parser.add_argument("--model", default="25M", choices=SHAPES)
parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
args = parser.parse_args()

torch.manual_seed(0)
config = shape(args.model, max_position_embeddings=256)
model = transformers.Qwen2ForCausalLM(config)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    sampler = rollout.make_sampler(
        "vllm", folder, max_len=128, dtype=getattr(torch, args.dtype), eos_ids=[0], max_num_seqs=8
    )
weights = [
    (name, p.detach().to("cuda" if sampler.cuda else "cpu")) for name, p in model.named_parameters()
]
copies = [torch.empty_like(w) for _, w in weights]
wait = torch.cuda.synchronize if sampler.cuda else lambda: None
seconds = {"copy": [], "push": []}
for i in range(args.repeats + 1):
    for key in seconds:
        start = time.perf_counter()
        if key == "push":
            sampler.push(weights)
        else:
            for target, (_, weight) in zip(copies, weights):
                target.copy_(weight)
        wait()
        if i:  # the first of each also touches fresh memory
            seconds[key].append(time.perf_counter() - start)
gib = sum(weight.nbytes for _, weight in weights) / 2**30
copy, push = (statistics.median(times) for times in seconds.values())
head = f"{'model':>6} {'engine':>9} {'GiB':>6} {'copy ms':>8} {'push ms':>8} {'ratio':>6}"
print(f"{head}  at most 3.00")
milliseconds = f"{1e3 * copy:8.2f} {1e3 * push:8.2f}"
print(f"{args.model:>6} {args.dtype:>9} {gib:6.3f} {milliseconds} {push / copy:6.2f}")
