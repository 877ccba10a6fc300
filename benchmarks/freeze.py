"""What MIFO's freezing costs in an SFT phase.

Time against one RL step's training, memory a parameter, and bytes communicated:

    OMP_NUM_THREADS=1 python benchmarks/freeze.py [--rows 64] [--sft-steps 1]

Its time does not depend on the tokens, an RL step's does: --rows (responses of about 200 tokens)
says against what it is held.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import step

sys.path.remove(str(Path(__file__).parent))  # `freeze` is to be the module, not this script


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=64, help="responses of the RL step")
    parser.add_argument("--sft-steps", type=int, default=1, help="optimizer steps of an SFT phase")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    os.environ.update(step.ALONE)
    import mifo
    import torch.distributed as dist

    seconds, sent = {"freeze": 0.0}, 0

    def timed(module, name: str) -> None:
        call = getattr(module, name)

        def wrapped(*given):
            start = time.perf_counter()
            result = call(*given)
            seconds["freeze"] += time.perf_counter() - start
            return result

        setattr(module, name, wrapped)

    def counted(tensor, **options):
        nonlocal sent
        sent += tensor.numel() * tensor.element_size()
        return reduce(tensor, **options)

    reduce, dist.all_reduce = dist.all_reduce, counted
    timed(mifo, "begin_sft")
    timed(mifo.freeze, "zero_frozen_gradients")
    timed(mifo.freeze, "restore_frozen")
    with tempfile.TemporaryDirectory() as folder:
        step.make_model(folder)
        rows = step.rows(args.rows)
        run = step.our_run(folder, rows, "--micro-tokens", 4096, "--sft-batch", 2)
        samples = step.responses(run, rows)
        run.state.sft_queue, phases, updates = [], [], []
        for _ in range(args.rounds):
            start = time.perf_counter()
            mifo.rl_update(run, samples)
            updates.append(time.perf_counter() - start)
            seconds["freeze"], sent = 0.0, 0
            mifo.begin_sft(run, list(range(2 * args.sft_steps)))
            while run.state.sft_queue:
                mifo.sft_step(run)
            phases.append(seconds["freeze"])
    n = sum(p.numel() for p in run.policy.parameters())
    held = sum(t.numel() * t.element_size() for t in run.importance + run.anchor)
    phase, update = statistics.median(phases), statistics.median(updates)
    tokens = sum(len(p) + len(r) for p, r, _ in rows)
    print(f"{n:,} parameters; RL step of {tokens:,} tokens; {args.sft_steps} SFT steps a phase")
    share = phase / update
    print(f"time of a phase  {phase:8.3f} s of {update:.2f} s: {share:.1%}; target: at most 5 %")
    print(f"memory           {held / n:8.1f} B a parameter; target: at most 6")
    print("                 (in host memory by --offload-importance)")
    print(f"communicated     {sent / 2**20:8.2f} MiB a phase; target: at most 1 MB (0.95 MiB)")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
