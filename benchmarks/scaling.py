"""Two ranks beside one, one thread each, for the training phase; and what a step costs against its size, over 16-fold ranges.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py {ranks,sizes}

`ranks` takes its steps without and with --gather-once in turn, on one rank, on two, and on two processes that share nothing:
what those do together is the most that two ranks could on this machine.
`sizes` draws assets/scaling.png; the slope is that of log(seconds) against log(size), 1 for linear.
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
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
SCALES = [1, 2, 4, 8, 16]


def batch(questions: int, samples: int, length: int) -> list:
    """Rows as step.rows makes them, of equal lengths."""
    draw = random.Random(0)
    return [
        (
            draw.choices(range(10, 4000), k=32),
            draw.choices(range(10, 4000), k=length),
            1.0 if i % 2 else -1.0,
        )
        for _ in range(questions)
        for i in range(samples)
    ]


def seconds(run, which: str, rows: list, repeats: int) -> float:
    """Median time of an optimizer step on the rows, after one that is not counted."""
    import mifo

    found, samples = [], step.responses(run, rows)
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        mifo.rl_update(run, samples) if which == "rl" else mifo.sft_step(run)
        found.append(time.perf_counter() - begun)
    return statistics.median(found[1:])


def alternating(run, rows: list, steps: int) -> dict[str, list[float]]:
    """Seconds of each optimizer step, without and with --gather-once in turn, after a first of each that is not counted."""
    import mifo

    found, samples = {}, step.responses(run, rows)
    for _ in range(steps + 1):
        for which in ("rl", "sft"):
            for once in (False, True):
                run.cfg.gather_once = once
                begun = time.perf_counter()
                mifo.rl_update(run, samples) if which == "rl" else mifo.sft_step(run)
                found.setdefault(which + " --gather-once" * once, []).append(
                    time.perf_counter() - begun
                )
    return {key: times[1:] for key, times in found.items()}


def sizes(folder: str) -> dict[str, list]:
    """{what: [(size, seconds) over SCALES]} of RL's optimizer step, or SFT's."""
    plan = {
        "tokens a response": lambda n: ("rl", batch(2, 8, 31 * n), 4),
        "questions": lambda n: ("rl", batch(2 * n, 8, 48), 4),
        "samples a question (G)": lambda n: ("rl", batch(8, 2 * n, 48), 4),
        "layers": lambda n: ("rl", batch(4, 8, 48), 2 * n),
        "demonstrations of an SFT step": lambda n: ("sft", batch(16 * n, 1, 48), 4),
    }
    found = {}
    for what, make in plan.items():
        for n in SCALES:
            which, rows, layers = make(n)
            model = f"{folder}/layers-{layers}"
            if not Path(model).exists():
                step.make_model(
                    model,
                    vocab_size=4096,
                    hidden_size=128,
                    intermediate_size=352,
                    num_hidden_layers=layers,
                )
            run = step.our_run(model, rows, "--freeze", "off", "--micro-tokens", 4096)
            size = {"t": 31, "q": 2, "s": 2, "l": 2, "d": 16}[what[0]] * n
            if what == "layers":
                size = sum(p.numel() for p in run.policy.model.model.layers.parameters())
            found.setdefault(what, []).append((size, seconds(run, which, rows, 3)))
            run.checker.close()
            dist.destroy_process_group()
    found["parameters of the layers"] = found.pop("layers")
    return found


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["ranks", "sizes"])
    parser.add_argument("--rows", type=int, default=32, help="of the batch, over all ranks")
    parser.add_argument("--micro-tokens", type=int, default=4096, help="of a micro-batch")
    parser.add_argument(
        "--flags", default="", help="more of ours for the two ranks, in one string: --replicas 2"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--steps", type=int, default=3, help="counted in each process, of each kind"
    )
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:  # one rank of one measurement
        rows = step.rows(args.rows)
        run = step.our_run(
            args.folder,
            rows,
            "--freeze",
            "off",
            "--micro-tokens",
            args.micro_tokens,
            *args.flags.split(),
        )
        found = alternating(run, rows, args.steps)
        if run.rank == 0:
            Path(args.folder, "found.json").write_text(json.dumps(found))
        sys.stdout.flush()
        os._exit(0)
    with tempfile.TemporaryDirectory() as folder:
        if args.what == "sizes":
            os.environ.update(step.ALONE)
            found = sizes(folder)
            plot(found)
            print(f"{'cost against':32}{'from':>12}{'to':>12}{'seconds':>9}{'to':>9}{'slope':>8}")
            for what, points in found.items():
                (x, y), (last, end) = points[0], points[-1]
                print(f"{what:32}{x:12,}{last:12,}{y:9.3f}{end:9.3f}{slope(points):8.2f}")
            sys.stdout.flush()
            os._exit(0)
        step.make_model(folder)
        command = [__file__, *sys.argv[1:], "--flags=", "--folder", folder]
        found = {"one": {}, "two": {}, "apart": {}}
        for _ in range(args.rounds):
            for name, times in found.items():
                if name == "two":
                    step.launch([*command, f"--flags={args.flags}"], 2)
                else:
                    with (
                        ThreadPoolExecutor() as pool
                    ):  # apart: two at once that share nothing, each with all rows
                        list(pool.map(step.launch, [command] * (1 + (name == "apart")), (1, 1)))
                for key, more in json.loads(Path(folder, "found.json").read_text()).items():
                    times.setdefault(key, []).extend(more)
    print(
        f"{args.rows} rows; seconds of an optimizer step (medians of {args.rounds * args.steps}) on one rank, on two, and on one "
        "while another does the same"
    )
    print(
        f"{'':20}{'one':>8}{'two':>8}{'apart':>8}  one / two, target: 1.7   2 one / apart, the machine's own"
    )
    for key in found["one"]:
        one, two, apart = (statistics.median(times[key]) for times in found.values())
        print(f"{key:20}{one:8.2f}{two:8.2f}{apart:8.2f}{one / two:11.2f}{2 * one / apart:25.2f}")


if __name__ == "__main__":
    main()
