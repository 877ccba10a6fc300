"""Compares finished runs of mifo.py: prints a Markdown table and draws a figure of them.

    python benchmarks/compare.py RUN RUN ... [--out compare.png]
    python benchmarks/compare.py RUN RUN ... --redraw      # each run's own pictures, in its folder

RUN is a run's folder (its --out), made with --evaluate. Runs that differ in seed alone are one line
of the table: their mean and half the 95 % interval. What an SFT phase made forget is known only of
runs with --eval-sft-phases.
"""

import argparse
import json
import math
import re
import statistics
import sys
from pathlib import Path

MEASURES = {
    "final": "accuracy at the end",
    "area": "mean accuracy over the RL steps",
    "forgotten": "forgotten in an SFT phase",
    "demonstrations": "demonstrations used",
    "sampled_tokens": "tokens sampled",
}
COUNTS = ("demonstrations", "sampled_tokens")  # shown without decimals


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval by Student's t; NaN for a single value."""
    n = len(values)
    mean = statistics.fmean(values)
    if n == 1:
        return mean, math.nan
    from scipy import stats

    quantile = float(stats.t.ppf(0.975, n - 1))
    return mean, quantile * statistics.stdev(values) / math.sqrt(n)


# --------------------------------------------------------------------------------------------------
# Reading runs


def read_run(folder: Path) -> dict:
    """A run's settings ("config"), its MEASURES and more, from config.json and evaluations.jsonl.

    Accuracy is the mean over the benchmarks. "curve" is [(RL step, accuracy)], "area" its mean
    height by the trapezoid rule, "levels" {name: accuracy at the end}. "forgotten" is the mean over
    the SFT phases of the share of what was right just before a phase and no longer is just after,
    over the phases that have both evaluations. "area" and "forgotten" are None where a run has
    nothing of the kind. Raises ValueError, naming the folder.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        text = (folder / "evaluations.jsonl").read_text()
        evaluations = [json.loads(line) for line in text.splitlines()]
        last = evaluations[-1]
    except (OSError, ValueError, IndexError) as problem:
        raise ValueError(
            f"{folder}: not the folder of a run with evaluations (mifo.py --evaluate): {problem}"
        ) from None
    curve = [(line["rl_steps"], accuracy(line)) for line in evaluations]
    return {
        "config": config,
        "final": curve[-1][1],
        "levels": levels_of(last),
        "curve": curve,
        "area": area(curve),
        "forgotten": forgotten(evaluations),
        "sft_phases": last["sft_phases"],
        "demonstrations": last["demonstrations"],
        "sampled_tokens": last["sampled_tokens"],
    }


def accuracy(evaluation: dict) -> float:
    return statistics.fmean(bench["avg"] for bench in evaluation["benches"].values())


def area(curve: list[tuple[int, float]]) -> float | None:
    last_step = curve[-1][0]
    if last_step == 0:
        return None
    total = 0.0
    for (step, height), (next_step, next_height) in zip(curve, curve[1:]):
        total += (next_step - step) * (height + next_height) / 2
    return total / last_step


def forgotten(evaluations: list[dict]) -> float | None:
    shares = []
    for before, after in zip(evaluations, evaluations[1:]):
        same_rl_step = before["rl_steps"] == after["rl_steps"]
        if not same_rl_step or before["sft_steps"] == after["sft_steps"]:
            continue  # no SFT phase, or RL steps as well, lie between the two
        right = kept = 0
        for name, bench in before["benches"].items():
            now = after["benches"][name]["correct"]  # of eval_k answers to each question in turn
            right += sum(bench["correct"])
            kept += sum(map(min, bench["correct"], now))
        if right:
            shares.append(1 - kept / right)
    return statistics.fmean(shares) if shares else None


def levels_of(evaluation: dict) -> dict[str, float]:
    """{level: accuracy}, the benchmark's name before it where there are several; {} if just one."""
    levels = {}
    for name, bench in evaluation["benches"].items():
        for level, value in bench["levels"].items():
            levels[f"{name} {level}" if len(evaluation["benches"]) > 1 else level] = value
    return levels if len(levels) > 1 else {}


def labels(configs: list[dict]) -> list[str]:
    """For each run the settings in which any of them differ, as flags.

    Left out are its seed, its folder, and the seed within a path.
    """
    plain = []
    for config in configs:
        seed = re.compile(rf"(?<![0-9]){config['seed']}(?![0-9])")
        settings = {}
        for key, value in config.items():
            if key not in ("seed", "out", "resume"):
                settings[key] = seed.sub("SEED", value) if isinstance(value, str) else value
        plain.append(settings)
    differing = []
    for key in plain[0]:
        if len({settings.get(key) for settings in plain}) > 1:
            differing.append(key)
    texts = []
    for settings in plain:
        flags = [f"--{key.replace('_', '-')} {settings.get(key)}" for key in differing]
        texts.append(" ".join(flags) or "all alike")
    return texts


# --------------------------------------------------------------------------------------------------
# Showing them


def comparison(groups: dict[str, list[dict]]) -> str:
    """A Markdown table of {name: runs as read_run gives them}: mean ± half the 95 % interval."""
    levels = {}  # a dict keeps the order in which they were met
    for runs in groups.values():
        for run in runs:
            levels |= dict.fromkeys(run["levels"])
    rows = [["", "runs", *MEASURES.values(), *(f"level {level}" for level in levels)]]
    for name, runs in groups.items():
        cells = [cell([run[key] for run in runs], key in COUNTS) for key in MEASURES]
        cells += [cell([run["levels"].get(level) for run in runs]) for level in levels]
        rows.append([name, str(len(runs)), *cells])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |"
        for row in rows
    )


def cell(values: list[float | None], count: bool = False) -> str:
    """Mean ± half the interval of the values that are known; empty if none is."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean, half = interval(known)
    form = ",.0f" if count else ".3f"
    return f"{mean:{form}}" if math.isnan(half) else f"{mean:{form}} ± {half:{form}}"


def draw_comparison(groups: dict[str, list[dict]], path: Path, title: str = "") -> None:
    """Mean accuracy over the RL steps, of few groups with its range; each run's end and forgetting,
    with mean and 95 % interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = plt.get_cmap("tab20")
    figure, (curves, ends, losses) = plt.subplots(
        1,
        3,
        figsize=(15, 2.2 + 0.32 * max(6, len(groups))),
        layout="constrained",
        gridspec_kw={"width_ratios": [1.6, 1, 1]},
    )
    for i, (name, runs) in enumerate(groups.items()):
        colour = colours(i % 20)
        latest = [dict(run["curve"]) for run in runs]  # of several at an RL step, the last
        steps = sorted(set(latest[0]).intersection(*latest))
        heights = [[run[step] for run in latest] for step in steps]
        means = [statistics.fmean(values) for values in heights]
        marker = "" if len(steps) > 1 else "o"
        dashes = "-" if i % 2 == 0 else "--"
        curves.plot(steps, means, color=colour, linestyle=dashes, marker=marker, label=name)
        if len(runs) > 1 and len(groups) <= 4:
            lowest, highest = list(map(min, heights)), list(map(max, heights))
            curves.fill_between(steps, lowest, highest, color=colour, alpha=0.1)
        for axis, key in ((ends, "final"), (losses, "forgotten")):
            values = [run[key] for run in runs if run[key] is not None]
            if values:
                mean, half = interval(values)
                bar = [0 if math.isnan(half) else half]
                axis.plot(values, [i] * len(values), "o", color=colour, alpha=0.5, markersize=4)
                axis.errorbar([mean], [i], xerr=bar, fmt="|", color="black", capsize=3)
    ranges = ", and their range" if len(groups) <= 4 else ""
    curves.set(xlabel="RL step", title=f"accuracy, mean of the runs{ranges}")
    rows, top_first = range(len(groups)), (len(groups) - 0.5, -0.5)
    ends.set(title=MEASURES["final"], yticks=rows, yticklabels=groups, ylim=top_first)
    losses.set(title=MEASURES["forgotten"], yticks=rows, yticklabels=[], ylim=top_first)
    for axis in (curves, ends, losses):
        axis.grid(alpha=0.3)
    for i, label in enumerate(ends.get_yticklabels()):
        label.set_color(colours(i % 20))
    if len(groups) <= 12:
        curves.legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def compare(folders: list[Path], figure: Path) -> None:
    runs = [read_run(folder) for folder in folders]
    if len({run["config"]["evaluate"] for run in runs}) > 1:
        raise ValueError("these runs were evaluated on different benchmarks (--evaluate)")
    groups: dict[str, list[dict]] = {}
    for run, label in zip(runs, labels([run["config"] for run in runs])):
        groups.setdefault(label, []).append(run)
    print(comparison(groups))
    draw_comparison(groups, figure)
    print(f"figure: {figure}")


def redraw(folders: list[Path]) -> None:
    for folder in folders:
        if not (folder / "metrics.jsonl").exists():
            raise ValueError(f"{folder}: not the folder of a run: it has no metrics.jsonl")
    sys.path.append(str(Path(__file__).resolve().parents[1]))  # for eval.py, which it imports
    import pictures

    for folder in folders:
        pictures.draw(folder)
        print(f"drawn: {', '.join(sorted(map(str, folder.glob('*.png'))))}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("compare.png"), help="the figure")
    parser.add_argument(
        "--redraw",
        action="store_true",
        help="only draw each run's own pictures anew, in its folder",
    )
    args = parser.parse_args()
    try:
        redraw(args.runs) if args.redraw else compare(args.runs, args.out)
    except ModuleNotFoundError as problem:
        text = f"{problem.name} is missing: pip install -r requirements-cpu.txt "
        text += "-r benchmarks/requirements.txt"
    except (ValueError, OSError) as problem:
        text = str(problem)
    else:
        return
    print(f"compare.py: error: {text}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
