"""The experiment's tables, as Markdown, and its figures, from the rows of experiment.csv.

    python benchmarks/results.py

Prints means ± half the 95 % interval, with the number of seeds in brackets; differences are between
runs on the same seed, and so from the same base model. Draws assets/budget.png and
assets/predict.png. It works while the experiment is under way, and says what is missing.
"""

import dataclasses
import math
import statistics
import sys
from pathlib import Path

import compare
import experiment
from benchmarks import pictures
from experiment import FAMILY, HARD_FIRST, KNOWN_LEVEL, METHODS, MIDDLE, SFT_THEN_RL

ASSETS = Path(__file__).resolve().parents[1] / "assets"
COUNTS = ("demonstrations", "sampled_tokens", "sft_phases", "sft_steps")
LINES = {  # of budget.png: colour, marker, line
    "MIFO": ("#d62728", "o", "-"),
    "MIFO without freezing": ("#ff7f0e", "v", "-"),
    "MIFO without entropy selection": ("#e377c2", "^", "-"),
    "MIFO without both": ("#8c564b", "D", "-"),
    SFT_THEN_RL: ("#1f77b4", "s", "--"),
    HARD_FIRST: ("#17becf", "P", "--"),
    "alternating": ("#2ca02c", "X", ":"),
    "GRPO": ("#7f7f7f", "", "-."),
}


# --------------------------------------------------------------------------------------------------
# Choosing rows


def current(rows: list[dict]) -> list[dict]:
    """Without those of settings that tuning, as far as it has come, has given up."""
    kept = [row for row in rows if row["part"] == "tune"]
    for task in experiment.TASKS:
        for part in experiment.PARTS[1:]:
            plan = set(experiment.plan_of(task, part, rows))
            kept += [row for row in rows if experiment.key_of(row) in plan]
    return kept


def where(rows: list[dict], **wanted) -> list[dict]:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def values(rows: list[dict], name: str) -> list[float]:
    return [row[name] for row in rows if row[name] is not None]


def differences(rows: list[dict], others: list[dict], name: str) -> list[float]:
    """Each row's value less the other's on the same seed, where both have one."""
    other = {row["seed"]: row[name] for row in others if row[name] is not None}
    found = []
    for row in rows:
        if row[name] is not None and row["seed"] in other:
            found.append(row[name] - other[row["seed"]])
    return found


def of_curve(rows: list[dict], task: str, method: str, budget: int) -> list[dict]:
    [at] = experiment.budgets_of(method, budget)
    return where(rows, task=task, part="curve", method=method, budget=at)


def named(budget: int) -> str:
    return f"{budget}" if budget else "all"


# --------------------------------------------------------------------------------------------------
# Tables


def table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def show(found: list[float], count: bool = False) -> str:
    """0.812 ± 0.031 (5): mean, half the 95 % interval, and how many; empty if none."""
    return f"{compare.cell(found, count)} ({len(found)})" if found else ""


def missing(rows: list[dict]) -> str:
    lines = []
    for task in experiment.TASKS:
        for part in experiment.PARTS:
            left, of = experiment.left_of(task, part, rows), experiment.planned(task, part)
            if left:
                lines.append(f"- {task}, {part}: {left} of {of} runs")
    return "**Not complete yet.** Left:\n\n" + "\n".join(lines) + "\n" if lines else ""


def tuned(rows: list[dict], task: str) -> str:
    """The settings that were chosen: RL's learning rate, SFT's, its epochs, S."""
    best, left = experiment.tune_plan(task, rows)
    budgets = sorted({budget or math.inf for _, budget in best})  # 0, all, comes last
    lines = {}
    for (method, budget), setting in best.items():
        cells = lines.setdefault(method, dict.fromkeys(budgets, ""))
        known = [value for value in dataclasses.astuple(setting) if value is not None]
        cells[budget or math.inf] = ", ".join(f"{value:g}" for value in known)
    head = ["", *(named(0 if budget == math.inf else budget) for budget in budgets)]
    warning = f"Not final: {len(left)} runs of tuning come next.\n\n" if left else ""
    return warning + table(head, [[method, *cells.values()] for method, cells in lines.items()])


def curve(rows: list[dict], task: str, name: str, less_mifo: bool = False) -> str:
    """A measure of every method at every budget, or what it is less MIFO's on the same seed.

    The last column is the mean over the budgets but all.
    """
    lines = []
    for method in METHODS:
        if less_mifo and method == "MIFO":
            continue
        cells = []
        for budget in (*experiment.BUDGETS, None):
            mine, others = (at_budget(rows, task, one, budget, name) for one in (method, "MIFO"))
            found = differences(mine, others, name) if less_mifo else values(mine, name)
            cells.append(show(found, name in COUNTS))
        if any(cells):
            lines.append([method, *cells])
    return table(["", *map(named, experiment.BUDGETS), "mean of all but the last"], lines)


def at_budget(rows: list[dict], task: str, method: str, budget: int | None, name: str) -> list:
    """of_curve(), or for None one row a seed that has the mean over all budgets but 0."""
    if budget is not None:
        return of_curve(rows, task, method, budget)
    groups = [of_curve(rows, task, method, one) for one in experiment.BUDGETS if one]
    found = []
    for seed in experiment.SEEDS:
        of_seed = [value for mine in groups for value in values(where(mine, seed=seed), name)]
        if len(of_seed) == len(groups):
            found.append({"seed": seed, name: statistics.fmean(of_seed)})
    return found


def at_middle(rows: list[dict], task: str) -> dict[tuple[str, str], list[dict]]:
    """{(method, setting): rows} at the budget of the family, the methods of the curve among them"""
    groups = {(method, ""): of_curve(rows, task, method, MIDDLE[task]) for method in METHODS}
    family = where(rows, task=task, part="family")
    groups |= {(method, ""): where(family, method=method) for method in FAMILY}
    if mifo := groups["MIFO", ""]:
        for change in experiment.changes_of(mifo[0]["buffer_size"]):
            groups["MIFO", change] = where(family, method="MIFO", setting=change)
    return {key: mine for key, mine in groups.items() if mine}


def name_of(method: str, setting: str) -> str:
    shown = f"`{setting}`" if setting.startswith("--") else setting
    return f"{method}, {shown}" if setting else method


def family(rows: list[dict], task: str) -> str:
    """At the middle budget, beside the method that each of them changes."""
    groups = at_middle(rows, task)
    columns = {
        "after_sft": "after SFT",
        "pass_k": "pass@8 after SFT",
        "holdout": "held-out loss after SFT",
        "lost": "lost of what was known",
        "forgotten": "forgotten in an SFT phase",
        "sft_phases": "SFT phases",
        "demonstrations": "demonstrations",
    }
    lines = []
    for (method, setting), mine in groups.items():
        of_mifo = method.startswith("MIFO")
        base = groups.get(("MIFO" if of_mifo else SFT_THEN_RL, ""), [])
        less = [] if mine is base else differences(mine, base, "final")
        cells = [show(values(mine, "final")), show(less)]
        cells += [show(values(mine, name), name in COUNTS) for name in columns]
        lines.append([name_of(method, setting), *cells])
    head = ["", "accuracy at the end", "less MIFO or SFT then RL, same seed", *columns.values()]
    return table(head, lines)


def by_level(rows: list[dict], task: str) -> str:
    lines, levels = [], {}
    for (method, setting), mine in at_middle(rows, task).items():
        found = {}
        for row in mine:
            for pair in row["levels"].split():
                level, accuracy = pair.split(":")
                found.setdefault(level, []).append(float(accuracy))
                levels[level] = True
        cells = [show(found.get(level, [])) for level in levels]
        lines.append([name_of(method, setting), *cells])
    return table(["level", *levels], lines)


def freezing(rows: list[dict], task: str) -> str:
    """Whether SFT moves what RL has moved."""
    columns = ("overlap", "overlap_top", "frozen_share", "frozen_gradient_first", "frozen_gradient")
    lines = []
    for (method, setting), mine in at_middle(rows, task).items():
        if any(values(mine, name) for name in columns):
            cells = [show(values(mine, name)) for name in columns]
            lines.append([name_of(method, setting), *cells])
    head = ["", *(experiment.NUMBERS[name] for name in columns)]
    return table(head, lines)


def halves(rows: list[dict], task: str) -> str:
    columns = {
        "after_sft": "after SFT",
        "sft_half": "half of SFT's update put back",
        "final": "at the end",
        "rl_half": "half of RL's update put back",
    }
    moves = {
        "sft_norm": "SFT's update, by the weights' norm",
        "rl_norm": "RL's",
        "sft_moved": "weights that SFT moved by over 0.001",
        "rl_moved": "RL",
    }
    lines = []
    for method, setting in experiment.ANALYSED:
        mine = where(rows, task=task, part="analyse", method=method, setting=setting)
        whole = where(rows, task=task, part="analyse", method=method, setting="")
        cells = []
        for name in columns:
            cells.append(show(values(mine, name)))
            if name in ("after_sft", "final"):
                cells.append(show(differences(mine, whole, name)) if setting else "")
        cells += [show(values(mine, name)) for name in moves]
        lines.append([name_of(method, setting), *cells])
    head = [""]
    for name, title in columns.items():
        head += [title, "less the whole"] if name in ("after_sft", "final") else [title]
    return table([*head, *moves.values()], lines)


def larger(rows: list[dict], task: str) -> str:
    """The main methods with the larger model, by learning rates, beside the small one's end."""
    groups = {}
    for row in where(rows, task=task, part="larger"):
        groups.setdefault((row["method"], row["rl_lr"], row["sft_lr"]), []).append(row)
    columns = ("start", "after_sft", "final", "lost", "forgotten", "demonstrations")
    lines = []
    for (method, rl_lr, sft_lr), mine in sorted(groups.items(), key=lambda group: group[0][0]):
        seeds = {row["seed"] for row in mine}
        small = of_curve(rows, task, method, MIDDLE[task])
        small = [row for row in small if row["seed"] in seeds]
        cells = [f"{rl_lr:g}", "" if sft_lr is None else f"{sft_lr:g}"]
        cells += [show(values(mine, name), name in COUNTS) for name in columns]
        lines.append([method, *cells, show(values(small, "final"))])
    head = ["", "RL learning rate", "SFT learning rate"]
    head += [experiment.NUMBERS[name] for name in columns]
    return table([*head, "the small model's at the end, same seeds"], lines)


def predicting(rows: list[dict], task: str) -> list[dict]:
    """Runs of an SFT stage and then RL, on the seeds that no choice has seen.

    Without those of two updates, whose SFT stages are those of SFT then RL.
    """
    mine = where(rows, task=task, part="curve") + where(rows, task=task, part="family")
    own = [row for row in mine if "--updates" not in experiment.FLAGS[row["method"]]]
    return [row for row in own if row["holdout"] is not None]


def prediction(rows: list[dict], task: str) -> str:
    """Spearman's rank correlation of what is known after SFT with what RL makes of it."""
    everything = predicting(rows, task)
    same = [row for row in everything if row["budget"] == MIDDLE[task]]
    lines = []
    for name in ("holdout", "pass_k", "after_sft"):
        cells = [f"{rank_correlation(mine, name):.2f} ({len(mine)})" for mine in (everything, same)]
        lines.append([experiment.NUMBERS[name], *cells])
    budget = f"at {MIDDLE[task]} demonstrations"
    return table(["with accuracy at the end", "all runs", budget], lines)


def rank_correlation(rows: list[dict], name: str) -> float:
    """Spearman's, with accuracy at the end; NaN where there are fewer than three runs."""
    pairs = [(row[name], row["final"]) for row in rows if row[name] is not None]
    firsts, finals = [first for first, _ in pairs], [final for _, final in pairs]
    if len(pairs) < 3 or len(set(firsts)) == 1 or len(set(finals)) == 1:
        return math.nan
    from scipy import stats

    return float(stats.spearmanr(firsts, finals).statistic)


def report(rows: list[dict]) -> str:
    """All tables of current() rows, as Markdown."""
    parts = [missing(rows)]
    for task in experiment.TASKS:
        if not where(rows, task=task):
            continue
        level = f"level {KNOWN_LEVEL[task]}"
        start = {row["seed"]: row["start"] for row in where(rows, task=task, part="curve")}
        before = f"Before training: {show(list(start.values()))}\n"
        parts += [f"## {task}\n", before, "### Settings\n", tuned(rows, task)]
        for title, text in (
            ("Accuracy at the end, by demonstrations offered", curve(rows, task, "final")),
            ("The same, less MIFO on the same seed", curve(rows, task, "final", less_mifo=True)),
            (f"Lost of what was known ({level})", curve(rows, task, "lost")),
            ("The same, less MIFO on the same seed", curve(rows, task, "lost", less_mifo=True)),
            (f"Forgotten in an SFT phase ({level})", curve(rows, task, "forgotten")),
            ("Accuracy after the SFT stage", curve(rows, task, "after_sft")),
            ("Mean accuracy over the RL steps", curve(rows, task, "area")),
            ("Different demonstrations learnt", curve(rows, task, "demonstrations")),
            ("SFT steps", curve(rows, task, "sft_steps")),
            ("Tokens sampled", curve(rows, task, "sampled_tokens")),
            (f"The family, at {MIDDLE[task]} demonstrations", family(rows, task)),
            (f"By level, at {MIDDLE[task]} demonstrations", by_level(rows, task)),
            ("What SFT moves beside RL", freezing(rows, task)),
            ("Half of the gradients, half of the update", halves(rows, task)),
            ("What predicts the end", prediction(rows, task)),
        ):
            parts += [f"### {title}\n", text]
        if where(rows, task=task, part="larger"):
            parts += ["### A model 20 times as large\n", larger(rows, task)]
    return "\n".join(parts)


# --------------------------------------------------------------------------------------------------
# Figures


def tasks_with_curve(rows: list[dict]) -> list[str]:
    return [task for task in experiment.TASKS if where(rows, task=task, part="curve")]


def points(rows: list[dict], task: str, method: str, name: str) -> list[tuple]:
    """[(demonstrations learnt, mean, half its interval)] by budget; GRPO has one, at 0."""
    found = []
    for budget in experiment.budgets_of(method, *experiment.BUDGETS):
        mine = of_curve(rows, task, method, budget)
        known = values(mine, name)
        if known:
            mean, half = compare.interval(known)
            used = statistics.fmean(values(mine, "demonstrations"))
            found.append((used, mean, 0.0 if math.isnan(half) else half))
    return found


def draw_budget(rows: list[dict], path: Path) -> None:
    """Accuracy at the end, and below it forgetting, against demonstrations learnt."""
    plt, tasks = pictures.pyplot(), tasks_with_curve(rows)
    size = (6.2 * len(tasks) + 0.4, 8.4)
    figure, axes = plt.subplots(
        2,
        len(tasks),
        figsize=size,
        layout="constrained",
        squeeze=False,
        sharex="col",
        gridspec_kw={"height_ratios": [1.5, 1]},
    )
    for column, task in enumerate(tasks):
        for axis, name in ((axes[0][column], "final"), (axes[1][column], "lost")):
            draw_curves(axis, rows, task, name)
        level = KNOWN_LEVEL[task]
        axes[0][column].set(title=task.capitalize(), ylabel="accuracy at the end")
        start = values(where(rows, task=task, part="curve"), "start")
        axes[0][column].axhline(statistics.fmean(start), color="black", lw=0.8, ls=(0, (1, 3)))
        label = f"right before training and wrong\nat the end, of level {level} (known)"
        axes[1][column].set(xlabel="demonstrations learnt", ylabel=label)
    handles, labels = [], [*LINES, "before training"]
    for colour, marker, line in LINES.values():
        handles.append(plt.Line2D([], [], color=colour, marker=marker, ls=line, ms=6))
    handles.append(plt.Line2D([], [], color="black", lw=0.8, ls=(0, (1, 3))))
    columns = 3 if len(tasks) > 1 else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    pictures.save_figure(figure, path)


def draw_curves(axis, rows: list[dict], task: str, name: str) -> None:
    for i, (method, (colour, marker, line)) in enumerate(LINES.items()):
        found = points(rows, task, method, name)
        if not found:
            continue
        if method == "GRPO":  # learns none, so it has no place on the axis
            [(_, mean, half)] = found
            axis.axhline(mean, color=colour, ls=line, lw=1.6)
            axis.axhspan(mean - half, mean + half, color=colour, alpha=0.15, lw=0)
            continue
        aside = 1.035 ** (i - 3)  # so that the bars of one budget stand side by side
        used, means, bars = zip(*found)
        axis.errorbar(
            [number * aside for number in used],
            means,
            yerr=bars,
            color=colour,
            marker=marker,
            ls=line,
            lw=2.2 if method == "MIFO" else 1.4,
            ms=6,
            elinewidth=1.0,
            capsize=2,
            zorder=3 if method == "MIFO" else 2,
        )
    ticks = [budget or experiment.DEMONSTRATIONS[task] for budget in experiment.BUDGETS]
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlim(ticks[0] / 1.4, ticks[-1] * 1.4)
    low, high = axis.get_ylim()
    axis.set_ylim(max(low, -0.03), min(high, 1.03))
    axis.grid(alpha=0.25)


def draw_predict(rows: list[dict], path: Path) -> None:
    """Held-out loss, and pass@k, after SFT against accuracy after RL, a dot a run."""
    plt = pictures.pyplot()
    tasks = [task for task in experiment.TASKS if predicting(rows, task)]
    figure, axes = plt.subplots(
        len(tasks), 2, figsize=(11, 4.3 * len(tasks) + 1.0), layout="constrained", squeeze=False
    )
    shades, budgets = plt.get_cmap("viridis"), experiment.BUDGETS
    colours = {one: shades(i / len(budgets)) for i, one in enumerate(budgets)}
    kinds = {SFT_THEN_RL: "o", HARD_FIRST: "s"}
    for line, task in zip(axes, tasks):
        for axis, name in zip(line, ("holdout", "pass_k")):
            mine = predicting(rows, task)
            for row in mine:
                marker, colour = kinds.get(row["method"], "^"), colours[row["budget"]]
                axis.plot(row[name], row["final"], marker, color=colour, ms=6, alpha=0.75, mew=0)
            same = [row for row in mine if row["budget"] == MIDDLE[task]]
            rho, rho_same = rank_correlation(mine, name), rank_correlation(same, name)
            text = f"rank correlation {rho:.2f}; at {MIDDLE[task]} demonstrations {rho_same:.2f}"
            axis.set_title(f"{task.capitalize()}: {text}", fontsize=10)
            label = {"holdout": "held-out loss after SFT", "pass_k": "pass@8 after SFT"}[name]
            axis.set(xlabel=label, ylabel="accuracy after RL")
            axis.grid(alpha=0.25)
    handles, labels = [], []
    for label, marker in (*kinds.items(), ("other losses", "^")):
        handles.append(plt.Line2D([], [], color="#555555", marker=marker, ls="", ms=6))
        labels.append(label)
    for budget, colour in colours.items():
        handles.append(plt.Line2D([], [], color=colour, marker="o", ls="", ms=6))
        labels.append(f"{named(budget)} demonstrations")
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    pictures.save_figure(figure, path)


def main() -> int:
    rows = experiment.read_rows(experiment.CSV)
    if not rows:
        print(
            f"results.py: {experiment.CSV} has no runs: experiment.py makes them", file=sys.stderr
        )
        return 2
    rows = current(rows)
    print(report(rows))
    if tasks_with_curve(rows):
        draw_budget(rows, ASSETS / "budget.png")
        print(f"figure: {ASSETS / 'budget.png'}")
    if any(predicting(rows, task) for task in experiment.TASKS):
        draw_predict(rows, ASSETS / "predict.png")
        print(f"figure: {ASSETS / 'predict.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
