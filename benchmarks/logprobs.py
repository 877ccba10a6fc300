"""Memory and time of losses.token_logprobs with gradient.

    python benchmarks/logprobs.py [--memory-tokens N] [--time-tokens N]

Beside full logits in PyTorch, the four products of matrices alone, and the logits that Liger's
chunking rule keeps (its kernels need a GPU). Memory is the peak resident memory of a fresh process
beyond inputs and the gradients they get.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import losses
import torch

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--memory-tokens", type=int, default=8192)
parser.add_argument("--time-tokens", type=int, default=8192)
parser.add_argument(
    "--time-vocabulary",
    type=int,
    default=151_936,
    help="less saves time: every product is linear in it",
)
parser.add_argument("--repeats", type=int, default=3)
parser.add_argument(
    "--skip-full", action="store_true", help="full logits need five times their size"
)
parser.add_argument("--one", help=argparse.SUPPRESS)
args = parser.parse_args()
D, V = 1536, 151_936


def inputs(n, v):
    torch.manual_seed(0)
    hidden = torch.randn(n, D).requires_grad_()
    head = torch.empty(v, D).normal_(std=0.05).requires_grad_()
    return hidden, head, torch.randint(v, (n,)), torch.randn(n)


def full(hidden, head, targets):
    logprobs = (hidden @ head.T).log_softmax(-1)  # [N, V]
    with torch.no_grad():
        entropy = -(logprobs.exp().mul_(logprobs)).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy


def products(hidden, head, chunk=1024):
    """What the kernel must multiply, nothing else: logits twice, and from them both gradients."""
    tile = torch.empty(len(hidden), chunk)
    grad_hidden, grad_head = torch.zeros_like(hidden), torch.empty_like(head)
    for start in range(0, len(head), chunk):
        part = head[start : start + chunk]
        out = tile.view(-1)[: len(hidden) * len(part)].view(len(hidden), len(part))
        torch.mm(hidden, part.T, out=out)
        torch.mm(hidden, part.T, out=out)
        grad_hidden.addmm_(out, part)
        torch.mm(out.T, hidden, out=grad_head[start : start + chunk])


def peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if args.one:
    hidden, head, targets, grad = inputs(args.memory_tokens, V)
    small = torch.randn(8, 4).requires_grad_()
    losses.token_logprobs(small, torch.randn(9, 4), targets[:8] % 9)[0].sum().backward()  # loads
    before = peak() + hidden.nbytes + head.nbytes
    function = full if args.one == "full" else losses.token_logprobs
    logprobs, entropy = function(hidden, head, targets)
    logprobs.backward(grad)
    print(json.dumps(peak() - before))
    sys.exit()

n = args.memory_tokens
logits = 4 * n * V
memory = {}
for name in ["ours"] if args.skip_full else ["ours", "full"]:
    out = subprocess.run(
        [sys.executable, __file__, "--one", name, "--memory-tokens", str(n)],
        capture_output=True,
        text=True,
    )
    memory[name] = int(out.stdout) if out.returncode == 0 else math.nan
liger = 4 * V * 2 ** math.ceil(math.log2(math.ceil(n / math.ceil(V / D))))
all_logits = memory.get("full", math.nan)
print(
    f"extra peak memory, {n} tokens, MB: ours {memory['ours'] / 1e6:.0f}"
    f" | full logits {all_logits / 1e6:.0f}, one matrix of logits {logits / 1e6:.0f}"
    f" ({logits / memory['ours']:.0f} times ours, to reach 30)"
    f" | Liger's chunk by its rule {liger / 1e6:.0f}",
    flush=True,
)

hidden, head, targets, grad = inputs(args.time_tokens, args.time_vocabulary)
seconds = {"products": [], "ours": []}
for i in range(args.repeats + 1):
    for name in seconds:
        hidden.grad = head.grad = None
        start = time.perf_counter()
        if name == "products":
            with torch.no_grad():
                products(hidden, head)
        else:
            losses.token_logprobs(hidden, head, targets)[0].backward(grad)
        if i:
            seconds[name].append(time.perf_counter() - start)
alone, ours = (statistics.median(s) for s in seconds.values())
ratio = statistics.median(b / a for a, b in zip(*seconds.values()))
print(
    f"seconds, {args.time_tokens} tokens, vocabulary {args.time_vocabulary}:"
    f" products alone {alone:.2f}, ours {ours:.2f}, ratio {ratio:.3f} (at most 1.15)"
)
