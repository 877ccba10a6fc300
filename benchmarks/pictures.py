"""The pictures of a run, from the logs in its folder: mifo.py draws them, compare.py redraws them.

plot.png            reward, accuracy, lengths, engine against trainer; with --sft-holdout its loss
frozen.png          what MIFO holds still, and what RL and SFT move, by layer and kind of matrix
demonstrations.*    which tokens SFT learns
forgetting.png      accuracy around each SFT phase
"""

import html
import json
import math
import unicodedata
import warnings
from pathlib import Path

import eval as evaluation

PANELS = (  # of plot.png, beside the accuracy: title, and the metrics drawn with their labels
    (
        "reward and hard questions",
        {
            "reward": "mean reward",
            "groups/all_wrong": "questions never solved",
            "groups/all_right": "questions always solved",
        },
    ),
    ("response length, tokens", {"response_tokens": "mean"}),
    (
        "|engine - trainer| log-probability",
        {"engine/mean_difference": "mean", "engine/max_difference": "largest"},
    ),
)


def draw(out: str) -> None:
    """A run's pictures from the logs in its folder. One that cannot be drawn ends no run."""
    for picture in (plot, draw_frozen, draw_demonstrations, draw_forgetting):
        try:
            with warnings.catch_warnings(action="ignore"):  # of characters that no font has
                picture(out)
        except Exception as error:
            print(f"warning: {picture.__name__}: {type(error).__name__}: {error}", flush=True)


def read_log(out: str, name: str) -> list[dict]:
    path = Path(out, name)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def save_figure(figure, path: Path) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=110)
    pyplot().close(figure)
    part.replace(path)


def plot(out: str) -> None:
    """plot.png from metrics.jsonl: PANELS, and the accuracy of each evaluation by level."""
    plt = pyplot()

    def line_of(axis, lines, metric, label, step="rl_steps", **style):
        points = [(line[step], line[metric]) for line in lines if metric in line]
        axis.plot([x for x, _ in points], [y for _, y in points], label=label, **style)

    lines, held = read_log(out, "metrics.jsonl"), read_log(out, "holdout.jsonl")
    size = (2, 3) if held else (2, 2)
    figure, axes = plt.subplots(*size, figsize=(5.5 * size[1], 7), layout="constrained")
    reward, accuracy, lengths, engine = axes[:, :2].flat
    if held:
        draw_holdout(axes[0, 2], held)
        axes[1, 2].set_axis_off()
    for axis, (title, metrics) in zip((reward, lengths, engine), PANELS):
        for metric, label in metrics.items():
            line_of(axis, [line for line in lines if line["phase"] == "rl"], metric, label)
        axis.set(title=title, xlabel="RL step")
    for step in sorted({line["rl_steps"] for line in lines if line["phase"] == "sft"}):
        reward.axvline(step, color="0.85", zorder=0, label="_")
    reward.plot([], [], color="0.85", label="SFT phase")
    engine.set_yscale("log")
    evaluated = [
        {"rl_steps": line["evaluation/rl_steps"], **line["evaluation"]}
        for line in lines
        if "evaluation" in line
    ]
    for name in sorted({name for line in evaluated for name in line} - {"rl_steps"}):
        line_of(accuracy, evaluated, name, name, marker="o", markersize=3)
    accuracy.set(title="accuracy", xlabel="RL step", ylim=(-0.02, 1.02))
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    save_figure(figure, Path(out, "plot.png"))


def draw_holdout(axis, lines: list[dict]) -> None:
    """The held-out demonstrations' loss, with what each moment of an SFT stage is called."""
    steps, values = [line["step"] for line in lines], [line["nll"] for line in lines]
    axis.plot(steps, values, color="0.7", label="_")
    named = regimes_of(lines)
    named += [""] * (len(lines) - len(named))
    for i, name in enumerate(("adaptive", "stable", "mild", "severe", "")):
        of_it = [k for k, regime in enumerate(named) if regime == name]
        if of_it:
            points = [steps[k] for k in of_it], [values[k] for k in of_it]
            axis.plot(*points, "o", color=f"C{i}", label=name or "_")
    axis.set(title="loss of held-out demonstrations, nats a token", xlabel="step, RL or SFT")


def regimes_of(lines: list[dict]) -> list[str]:
    """What the losses of a run's SFT stage are called; [] of a run without one."""
    return evaluation.sft_regime([line["nll"] for line in of_stage(lines)])


def of_stage(lines: list[dict]) -> list[dict]:
    """Those lines of holdout.jsonl that lie in a run's SFT stage: before any RL, if SFT came."""
    before = [line for line in lines if line["rl_steps"] == 0]
    return before if before[-1]["sft_phases"] else []


def draw_frozen(out: str) -> None:
    """frozen.png from movement.jsonl: of the last SFT phase that ended the frozen share of each
    layer and kind of matrix, and how far the RL phase before it and itself moved them."""
    lines = read_log(out, "movement.jsonl")
    if len(lines) > 1 and lines[-1]["phase"] == "rl":  # the SFT phase after it has not ended
        lines.pop()
    if not lines:
        return
    rl, *sft = lines[-2:]  # without an SFT line as yet: RL's alone
    layers = rl["layers"]
    alone = [layer for layer, kinds in layers.items() if list(kinds) == [""]]  # embeddings, head
    rows = [layer for layer in layers if layer not in alone]
    kinds = list(dict.fromkeys(kind for row in rows for kind in layers[row])) or [""]
    gap = [""] if rows and alone else []
    labels = rows + gap + alone

    def grid(line: dict, what: str) -> list[list[float]]:
        """[row][kind]; what stands alone has one value in the whole row, and a gap before it."""
        table = []
        for label in labels:
            row, nothing = line["layers"].get(label, {}), {what: math.nan}
            names = [""] * len(kinds) if label in alone else kinds
            table.append([row.get(name, nothing)[what] for name in names])
        return table

    def mean(line: dict, what: str) -> float:
        places = [place for row in line["layers"].values() for place in row.values()]
        total = sum(place["entries"] * place[what] for place in places)
        return total / sum(place["entries"] for place in places)

    panels = [("frozen in the SFT phase", rl, "frozen"), ("moved by RL before it", rl, "moved")]
    panels += [("moved by SFT", line, "moved") for line in sft]
    plt = pyplot()
    from matplotlib import colors

    size = (1.5 + len(panels) * max(2.5, 0.4 * len(kinds)), 3.2 + 0.22 * len(labels))
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", sharey=True)
    for axis, (title, line, what) in zip(axes, panels):
        whole = mean(line, what)
        if what == "frozen":  # white: as much as of the whole model
            centre = min(max(whole, 1e-6), 1 - 1e-6)
            scale = {"cmap": "RdBu_r", "norm": colors.TwoSlopeNorm(centre, 0, 1)}
        else:  # grey: nothing has moved
            scale = {"cmap": "viridis", "norm": "log" if whole > 0 else None}
        image = axis.imshow(grid(line, what), aspect="auto", **scale)
        axis.set(title=f"{title}: {whole:.2g}", facecolor="0.85")
        axis.set_xticks(range(len(kinds)), kinds, rotation=90, fontsize=8, parse_math=False)
        named = [i for i, label in enumerate(labels) if label]
        axis.set_yticks(named, filter(None, labels), fontsize=8, parse_math=False)
        bar = figure.colorbar(image, ax=axis)
        if what == "moved":
            bar.set_ticks(image.get_clim(), labels=[f"{end:.1e}" for end in image.get_clim()])
            bar.minorticks_off()
    figure.suptitle(
        f"SFT phase {rl['sft_phases'] + 1}, after RL step {rl['rl_steps']}", fontsize=10
    )
    save_figure(figure, Path(out, "frozen.png"))


def visible(text: str) -> str:
    """Every character as one that can be seen, but for the space: a line's end is an arrow."""
    shown = []
    for c in text.replace("\n", "↵"):
        shown.append(c if c.isprintable() else c.encode("unicode_escape").decode())
    return "".join(shown)


PAGE = """<!doctype html>
<meta charset="utf-8"><title>What SFT learns</title>
<style>
body {{ font: 15px/1.9 monospace; max-width: 60em; margin: 2em auto }}
p {{ white-space: pre-wrap; overflow-wrap: anywhere }}
b {{ border-bottom: 3px solid #06c }}
</style>
<h1>What SFT learns</h1>
<p>Demonstrations of SFT phase {phase}. The darker a token, the less certain the model was of it
before the phase: by its entropy, up to {top:.2f} nats. Point at a token to read it. SFT learns the
bold, underlined ones.</p>
"""


def draw_demonstrations(out: str) -> None:
    """demonstrations.html and .png from demonstrations.jsonl: those of the last SFT phase."""
    lines = read_log(out, "demonstrations.jsonl")
    if not lines:
        return
    lines = [line for line in lines if line["step"] == lines[-1]["step"]]
    phase = lines[0]["sft_phases"] + 1
    top = max(max(line["entropy"], default=0.0) for line in lines) or 1.0
    page = PAGE.format(phase=phase, top=top)
    for line in lines:
        title = f"{line['id']}: {line['all_chosen']} of {line['all_tokens']} tokens"
        page += f"<h2>{html.escape(visible(title))}</h2>\n<p>"
        for text, entropy, chosen in zip(line["texts"], line["entropy"], line["chosen"]):
            mark = "b" if chosen else "span"
            colour = f"rgba(240,120,0,{0.8 * entropy / top:.2f})"
            page += f'<{mark} style="background:{colour}" title="{entropy:.2f}">'
            page += html.escape(visible(text)).replace("↵", "↵\n") + f"</{mark}>"
        left = line["all_tokens"] - len(line["texts"])
        page += f" … {left:,} more</p>\n" if left else "</p>\n"
    part = Path(out, "demonstrations.html.part")
    part.write_text(page)
    part.replace(Path(out, "demonstrations.html"))
    explained = f"SFT phase {phase}. Darker: higher entropy before it, up to {top:.2f} nats; "
    draw_tokens(lines, top, explained + "underlined: chosen", Path(out, "demonstrations.png"))


def draw_tokens(lines: list[dict], top: float, title: str, path: Path) -> None:
    """The tokens of lines of demonstrations.jsonl in their columns, a letter a column."""
    width, most = 100, 14  # columns, and rows of a demonstration
    places, row = [], 0  # (row, column, columns, text, entropy, chosen)
    for line in lines:
        places.append((row, 0, 0, visible(line["id"])[:width], 0.0, 0))
        row, column, end = row + 1, 0, row + most
        for text, *rest in zip(line["texts"], line["entropy"], line["chosen"]):
            text = visible(text)[:width]
            wide = [unicodedata.east_asian_width(letter) in "WF" for letter in text]
            columns = len(text) + sum(wide)
            if column + columns > width:
                row, column = row + 1, 0
            if row > end:
                break
            places.append((row, column, columns, text, *rest))
            row, column = (row + 1, 0) if text.endswith("↵") else (row, column + columns)
        row = min(row, end) + 2

    plt = pyplot()
    size = 9  # points; a letter of the font is 0.602 of it wide
    figure = plt.figure(figsize=((width + 2) * 0.602 * size / 72, (row + 1.5) * 1.5 * size / 72))
    axis = figure.add_axes((0, 0, 1, 1), xlim=(-1, width + 1), ylim=(row - 0.5, -2))
    axis.set_axis_off()
    text = dict(fontsize=size, family="monospace", va="center", parse_math=False)
    axis.text(0, -1.2, title, **text | {"family": "sans-serif"})
    rows, starts, columns, texts, entropies, chosen = zip(*places)
    shades = [(0.94, 0.47, 0.0, min(1.0, 0.8 * entropy / top)) for entropy in entropies]
    axis.barh(rows, columns, 0.95, starts, color=shades)
    for y, x, n, word, _, is_chosen in places:
        axis.text(x, y, word, **text, weight="bold" if is_chosen or n == 0 else "normal")
        if is_chosen:
            axis.plot([x + 0.1, x + n - 0.1], [y + 0.45] * 2, color="#0066cc", linewidth=2)
    save_figure(figure, path)


def around_sft_phases(out: str) -> list[dict]:
    """What each SFT phase that was evaluated before and after changed, the phases in order.

    Shares of all answers: "before", "after" {benchmark: right}, "lost" and "gained" over all of
    them; "entropy": of a sampled token in the RL steps before and after, NaN if there is none.
    """
    eval_k = json.loads(Path(out, "config.json").read_text())["eval_k"]
    entropies = {}
    for line in read_log(out, "metrics.jsonl"):
        if "rl/entropy" in line:
            entropies[line["rl_steps"]] = line["rl/entropy"]
    phases, lines = [], read_log(out, "evaluations.jsonl")
    for before, after in zip(lines, lines[1:]):
        rl_steps = before["rl_steps"]
        if after["rl_steps"] != rl_steps or after["sft_steps"] == before["sft_steps"]:
            continue
        then, now, answers = [], [], 0
        for name, bench in before["benches"].items():
            then += bench["correct"]
            now += after["benches"][name]["correct"]
            answers += eval_k * len(bench["correct"])
        kept = sum(map(min, then, now))
        phase = {
            "number": after["sft_phases"],
            "entropy": [entropies.get(rl_steps, math.nan), entropies.get(rl_steps + 1, math.nan)],
            "lost": (sum(then) - kept) / answers,
            "gained": (sum(now) - kept) / answers,
        }
        for when, line in (("before", before), ("after", after)):
            phase[when] = {name: bench["avg"] for name, bench in line["benches"].items()}
        phases.append(phase)
    return phases


def draw_forgetting(out: str) -> None:
    """forgetting.png: what around_sft_phases finds."""
    phases = around_sft_phases(out)
    if not phases:
        return
    figure, axes = pyplot().subplots(1, 3, figsize=(13, 4), layout="constrained")
    accuracy, exchanged, entropy = axes
    numbers = [phase["number"] for phase in phases]

    def path(axis, pairs: list, label: str, colour: str) -> None:
        """Each phase's two values joined by a line, and dots across the RL phases between."""
        xs = [x for number in numbers for x in (number - 0.2, number + 0.2)]
        ys = [y for pair in pairs for y in pair]
        axis.plot(xs, ys, ":", color=colour, alpha=0.5)
        for i in range(0, len(xs), 2):
            axis.plot(xs[i : i + 2], ys[i : i + 2], "-", color=colour, linewidth=2)
            axis.plot(xs[i], ys[i], "o", color=colour, markerfacecolor="white")
        axis.plot(xs[1::2], ys[1::2], "o", color=colour, label=label)

    for i, name in enumerate(phases[0]["before"]):
        pairs = [(phase["before"][name], phase["after"][name]) for phase in phases]
        path(accuracy, pairs, name, f"C{i}")
    for sign, what, colour in ((1, "gained", "C2"), (-1, "lost", "C3")):
        shares = [sign * phase[what] for phase in phases]
        exchanged.bar(numbers, shares, 0.4, color=colour, label=what, zorder=2)
    exchanged.axhline(0, color="black", linewidth=0.8)
    path(entropy, [phase["entropy"] for phase in phases], "of a sampled token", "C4")
    accuracy.set(title="accuracy before (hollow) and after (full)", ylim=(-0.02, 1.02))
    exchanged.set(title="right answers gained and lost, share of all")
    entropy.set(title="entropy in the RL step before and after, nats")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set(xlabel="SFT phase")
        axis.xaxis.get_major_locator().set_params(integer=True)
        for label in axis.legend(fontsize=8).get_texts():
            label.set_parse_math(False)
    save_figure(figure, Path(out, "forgetting.png"))
