"""Two ranks beside one, one thread each, in training; and what a step costs against its size.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py {ranks,sizes}

`ranks` takes its steps with --gather-once on and off in turn, on one rank, on two, and on two
processes that share nothing: what those do together is the most that two ranks could here.
`sizes` goes over 16-fold ranges and draws assets/scaling.png; the slope is that of log(seconds)
against log(size), 1 for linear.
"""

import argparse
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import step
import mifo
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
SCALES = [1, 2, 4, 8, 16]
FLAGS = ("--freeze", "off", "--micro-tokens", 4096)


def batch(questions: int, samples: int, length: int) -> list:
    """Rows as step.rows makes them, of equal lengths."""
    draw, found = random.Random(0), []
    for _ in range(questions):
        for i in range(samples):
            prompt = draw.choices(range(10, 4000), k=32)
            response = draw.choices(range(10, 4000), k=length)
            found.append((prompt, response, 1.0 if i % 2 else -1.0))
    return found


def timed_step(run, which: str, samples: list) -> float:
    begun = time.perf_counter()
    step.our_step(run, which, samples)
    return time.perf_counter() - begun


def alternating(run, rows: list, steps: int) -> dict[str, list[float]]:
    """Seconds of each optimizer step, with --gather-once on (auto's choice here) and off in turn.

    The first of each is not counted.
    """
    found, samples = {}, step.responses(run, rows)
    for _ in range(steps + 1):
        for which in ("rl", "sft"):
            for once in (True, False):
                run.gather_once = once
                name = which if once else f"{which} --gather-once off"
                found.setdefault(name, []).append(timed_step(run, which, samples))
    return {name: seconds[1:] for name, seconds in found.items()}


def sizes(folder: str) -> dict[str, list]:
    """{what: [(size, seconds) over SCALES]} of RL's optimizer step, or SFT's."""
    plan = {  # what: (its size at scale 1, scale -> which step, the rows, the model's layers)
        "tokens a response": (31, lambda n: ("rl", batch(2, 8, 31 * n), 4)),
        "questions": (2, lambda n: ("rl", batch(2 * n, 8, 48), 4)),
        "samples a question (G)": (2, lambda n: ("rl", batch(8, 2 * n, 48), 4)),
        "demonstrations of an SFT step": (16, lambda n: ("sft", batch(16 * n, 1, 48), 4)),
        "parameters of the layers": (0, lambda n: ("rl", batch(4, 8, 48), 2 * n)),
    }
    found = {}
    for what, (unit, make) in plan.items():
        found[what] = []
        for n in SCALES:
            which, rows, layers = make(n)
            run = step.our_run(small_model(folder, layers), rows, *FLAGS)
            samples = step.responses(run, rows)
            seconds = [timed_step(run, which, samples) for _ in range(4)]
            in_layers = sum(p.numel() for p in mifo.layers_of(run.policy.model).parameters())
            found[what].append((unit * n or in_layers, statistics.median(seconds[1:])))
            run.checker.close()
            dist.destroy_process_group()
    return found


def small_model(folder: str, layers: int) -> str:
    model = f"{folder}/layers-{layers}"
    if not Path(model).exists():
        shape = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 352}
        step.make_model(model, num_hidden_layers=layers, **shape)
    return model


def slope(points: list) -> float:
    x, y = ([math.log(point[i]) for point in points] for i in (0, 1))
    mx, my = statistics.mean(x), statistics.mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x)


def plot(found: dict[str, list]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(13, 2.8), layout="constrained", sharey=True)
    for axis, (what, points) in zip(axes, found.items()):
        x, y = zip(*points)
        axis.plot(x, y, "o-", label=f"measured, slope {slope(points):.2f}")
        axis.plot(x, [y[-1] * size / x[-1] for size in x], "--", color="0.6", label="linear")
        axis.set(xscale="log", yscale="log", xlabel=what)
        axis.set_xticks(x, [f"{size / 1e6:.1f}M" if size > 1e5 else str(size) for size in x])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("seconds of a step")
    figure.savefig(ROOT / "assets" / "scaling.png", dpi=80)


def print_sizes() -> None:
    os.environ.update(step.ALONE)
    with tempfile.TemporaryDirectory() as folder:
        found = sizes(folder)
    plot(found)
    print(f"{'cost against':32}{'from':>12}{'to':>12}{'seconds':>9}{'to':>9}{'slope':>8}")
    for what, points in found.items():
        (size, seconds), (largest, longest) = points[0], points[-1]
        cost = f"{seconds:9.3f}{longest:9.3f}{slope(points):8.2f}"
        print(f"{what:32}{size:12,}{largest:12,}{cost}")
    sys.stdout.flush()
    os._exit(0)


def ranks(args) -> None:
    """Prints the seconds of a step on one rank, on two, and on one while another does the same."""
    found = {"one": {}, "two": {}, "apart": {}}
    with tempfile.TemporaryDirectory() as folder:
        step.make_model(folder)
        command = [__file__, *sys.argv[1:], "--flags=", "--folder", folder]
        for _ in range(args.rounds):
            for name, seconds in found.items():
                if name == "two":
                    step.launch([*command, f"--flags={args.flags}"], 2)
                else:
                    processes = 2 if name == "apart" else 1  # each with all rows
                    with ThreadPoolExecutor() as pool:
                        list(pool.map(step.launch, [command] * processes, [1] * processes))
                for key, more in json.loads(Path(folder, "found.json").read_text()).items():
                    seconds.setdefault(key, []).extend(more)
    print(f"{args.rows} rows; seconds of an optimizer step, median of {args.rounds * args.steps}")
    print(
        f"{'':22}{'one':>8}{'two':>8}{'apart':>8}  one / two, target: 1.8   2 one / apart: the most"
    )
    for key in found["one"]:
        one, two, apart = (statistics.median(seconds[key]) for seconds in found.values())
        print(f"{key:22}{one:8.2f}{two:8.2f}{apart:8.2f}{one / two:11.2f}{2 * one / apart:25.2f}")


def rank_of_measurement(args) -> None:
    rows = step.rows(args.rows)
    flags = ("--freeze", "off", "--micro-tokens", args.micro_tokens, *args.flags.split())
    run = step.our_run(args.folder, rows, *flags)
    found = alternating(run, rows, args.steps)
    if run.rank == 0:
        Path(args.folder, "found.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=["ranks", "sizes"])
    add("--rows", type=int, default=32, help="of the batch, over all ranks")
    add("--micro-tokens", type=int, default=4096, help="of a micro-batch")
    add("--flags", default="", help="more of ours for the two ranks, in one string: --replicas 2")
    add("--rounds", type=int, default=2)
    add("--steps", type=int, default=3, help="counted in each process, of each kind")
    add("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        rank_of_measurement(args)
    elif args.what == "sizes":
        print_sizes()
    else:
        ranks(args)


if __name__ == "__main__":
    main()
