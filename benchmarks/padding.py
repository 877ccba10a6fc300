"""Share of padding in the micro-batches of data.pack, on log-normal lengths up to 8,192 tokens.

python benchmarks/padding.py
"""

import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import torch


def share(rows: int, budget: int, world: int, seed: int) -> float:
    """Of all tokens in the micro-batches, those that are padding; lengths have a median of 2,500
    and a spread of e^0.8."""
    normal = torch.randn(rows, generator=torch.Generator().manual_seed(seed))
    lengths = (math.log(2500) + 0.8 * normal).exp().clamp(64, 8192).long().tolist()
    padded = 0
    for part in data.pack(lengths, budget, world):
        padded += len(part) * max((lengths[i] for i in part), default=0)
    return 1 - sum(lengths) / padded


print("rows  tokens a micro-batch  ranks  padding: median and largest of 20 batches   target: 5 %")
for rows in (128, 1024):
    for budget in (16384, 32768):
        for world in (1, 8):
            shares = [share(rows, budget, world, seed) for seed in range(20)]
            print(
                f"{rows:4}{budget:22,}{world:7}  {statistics.median(shares):8.1%}{max(shares):8.1%}"
            )
