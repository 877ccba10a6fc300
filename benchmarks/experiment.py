"""The experiment: which of MIFO's claims hold when every method may spend as many demonstrations?

    python benchmarks/experiment.py [--parts tune,curve,family,analyse,larger] [--out FOLDER]
                                    [--tasks knowledge,countdown]

As many runs at once as there are cores, each a mifo.py on one of them with the PyTorch sampler. A
finished run's row goes to benchmarks/experiment.csv at once, and a run whose row stands there is
not repeated: after an interruption the same command goes on, also without --out's folder, which
holds base models and logs. Tables and figures of that file: results.py. Tasks: knowledge.py,
countdown.py.

1. tune: each method on its own, over GRID and EPOCHS, one axis after another (SFT's learning rate,
   its epochs, RL's learning rate, S), by the mean accuracy at the end on TUNING_SEEDS; at a low and
   at a high budget of demonstrations. A later value wins only if it scores higher. Each budget from
   the low to the high one then tries both of these settings, and keeps the better. With all
   demonstrations to take, which only SFT stages learn, these make one pass and are tuned anew. The
   methods of FAMILY keep SFT_THEN_RL's epochs and try three rates around its own.
2. curve: each method at each budget, at the setting tuned for it, on SEEDS, which no choice has
   seen and which have a base model each.
3. family: other SFT and RL losses and MIFO's own settings, at one budget between.
4. analyse: what dropping half of SFT's or of RL's gradients, or half of the finished update, costs.
5. larger: on the knowledge task the main methods with a model 20 times as large, at the small
   one's learning rates and at lower ones; two seeds.

Countdown has fewer RL steps, for time.
"""

import argparse
import contextlib
import csv
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import compare
import countdown
import data
import eval as evaluation
import knowledge
import losses
import mifo
import step
import torch
from benchmarks import pictures
from torch import Tensor
from tqdm import tqdm

CSV = Path(__file__).with_suffix(".csv")
PARTS = ("tune", "curve", "family", "analyse", "larger")
TASKS = ("knowledge", "countdown")
SEEDS, TUNING_SEEDS = (10, 11, 12, 13, 14), (20, 21)
BUDGETS = (16, 32, 64, 128, 256, 0)  # 0: all
MIDDLE = {"knowledge": 128, "countdown": 64}  # of family and analyse
LOW, HIGH = 32, 256  # budgets that are tuned at
GRID = {  # the first stands first
    "rl_lr": (1e-4, 3e-5, 3e-4),
    "sft_lr": (1e-3, 3e-4, 3e-3, 1e-4, 3e-5),
    "buffer_size": (16, 64),  # S
}
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # the grid's, and one on each side
EPOCHS = {LOW: (20, 10, 40), HIGH: (10, 5, 20), 0: (1,)}  # by budget
COIN_EPOCHS = (2, 1, 4)  # of the alternating control, whose batches come again and again
KNOWN_LEVEL = {"knowledge": "0", "countdown": "4"}  # whose answers the base model has learnt right
DEMONSTRATIONS = {"knowledge": data.TRAIN_SUMS, "countdown": countdown.TRAIN}
WATCHED = 2  # SFT phases that a run evaluates around, but for tune
PASS_K, PASS_QUESTIONS = 8, 100  # of pass@k after an SFT stage

SFT_THEN_RL, HARD_FIRST = "SFT then RL", "SFT on hard questions, then RL"
STAGE = "--schedule sft-then-rl --rho 1 --sft-schedule cosine --sft-holdout 100"
METHODS = {
    "MIFO": "",
    "MIFO without freezing": "--freeze off",
    "MIFO without entropy selection": "--rho 1",
    "MIFO without both": "--freeze off --rho 1",
    SFT_THEN_RL: STAGE,
    HARD_FIRST: STAGE,
    "alternating": "--schedule alternate --rho 1",
    "GRPO": "--schedule rl",
}
GSPO = "--rl-loss gspo --aggregation sequence --clip-low 3e-4 --clip-high 4e-4"
FAMILY = {
    "DFT then RL": f"{STAGE} --sft-weights dft",
    "TrSFT then RL": f"{STAGE} --sft-weights trust",
    "CHORD-φ then RL": f"{STAGE} --sft-weights phi",
    "SED-SFT then RL": f"{STAGE} --sed 1",
    "PEAR (sequence) then RL": f"{STAGE} --pear sequence",
    "PEAR (token) then RL": f"{STAGE} --pear token",
    "PEAR (block) then RL": f"{STAGE} --pear block",
    "SFT then GRPO, two updates": f"{STAGE} --updates 2",
    "SFT then NFT, two updates": f"{STAGE} --updates 2 --rl-loss nft",
    "SFT then GSPO, two updates": f"{STAGE} --updates 2 {GSPO}",
}
FLAGS = METHODS | FAMILY
INTERLEAVED = [method for method, flags in FLAGS.items() if "--schedule" not in flags]
RANDOM, LOWEST = "a random 20 % of the tokens", "the 20 % of lowest entropy"
RANDOM_HALF = "a random half frozen"
HALF_SFT, HALF_RL = "half of SFT's gradients dropped", "half of RL's gradients dropped"
MIFO_SETTINGS = (
    *("--freeze off", RANDOM_HALF),
    *("--buffer-size 64 --freeze off", f"{RANDOM_HALF} --buffer-size 64"),
    *(RANDOM, LOWEST, "--p 0"),
    *("--buffer-size 16", "--buffer-size 32", "--buffer-size 64", "--buffer-size 128"),
    # S = 16 gives three SFT phases or more, without which α cannot show.
    *("--buffer-size 16 --alpha 0", "--buffer-size 16 --alpha 0.5", "--buffer-size 16 --alpha 1"),
)
LARGER = {"width": 256, "layers": 10, "steps": 800}  # beside 128, 2 and 1,600
LARGER_METHODS = ("MIFO", SFT_THEN_RL, HARD_FIRST, "GRPO")
LARGER_RATES, LARGER_SEEDS = (1, 0.3, 0.1), SEEDS[:2]  # parts of the small model's learning rates
ANALYSED = (
    *((SFT_THEN_RL, ""), (SFT_THEN_RL, HALF_SFT), (SFT_THEN_RL, HALF_RL)),
    *(("GRPO", ""), ("GRPO", HALF_RL)),
)
COMMON = (
    "--questions 32 --sft-batch 16 --eval-temperature 0 "
    "--micro-tokens 4096 --sampler torch --save-every 100000 --samples-logged 0"
)
OF_TASK = {
    "knowledge": "--steps 24 --max-prompt 12 --max-response 48",
    "countdown": "--steps 12 --max-prompt 24 --max-response 88",
}


@dataclass(frozen=True)
class Cell:
    """A run, by all that tells it from the others."""

    task: str
    part: str
    method: str
    budget: int  # demonstrations; 0: all, or none for GRPO
    rl_lr: float
    sft_lr: float | None
    epochs: int | None
    buffer_size: int | None
    setting: str  # a key of PATCHES, or further flags, or both
    seed: int


@dataclass(frozen=True)
class Setting:
    """What is tuned; None where the method has none of it."""

    rl_lr: float
    sft_lr: float | None
    epochs: int | None
    buffer_size: int | None


TUNED = [field.name for field in dataclasses.fields(Setting)]

# A column's unit is a share of 1 unless it says otherwise; empty where a run has nothing of it.
NUMBERS = {
    "start": "accuracy before training",
    "after_sft": "accuracy after the SFT stage",
    "final": "accuracy at the end",
    "area": "mean accuracy over the RL steps",
    "known": "accuracy at the end on the level that the base model knows",
    "lost": "of its right answers on that level before training, those that are wrong at the end",
    "forgotten": "of the right answers on it before an SFT phase, those that are wrong after it",
    "sft_phases": "number of SFT phases",
    "sft_steps": "number of SFT steps",
    "demonstrations": "number of different demonstrations learnt",
    "sampled_tokens": "number of tokens sampled",
    "holdout_start": "held-out loss before training",
    "holdout": "held-out loss after the SFT stage",
    "pass_k": "questions of which one of eight samples is right, after the SFT stage",
    "overlap": "of SFT's movement, what lies in the half of the entries that RL moved most before",
    "overlap_top": "of the half that SFT moves most, what lies in that half",
    "frozen_share": "entries frozen in SFT phases",
    "frozen_gradient_first": "squared SFT gradient that lies on them, in the first SFT phase",
    "frozen_gradient": "the same in the later phases",
    "sft_norm": "SFT's update by the norm of the weights before it",
    "sft_moved": "weights that it moved by over 0.001",
    "sft_half": "accuracy with half of it put back, mean of three halves",
    "rl_norm": "RL's update by the norm of the weights before it",
    "rl_moved": "weights that it moved by over 0.001",
    "rl_half": "accuracy with half of it put back",
    "seconds": "seconds of the run",
}
KEY = [field.name for field in dataclasses.fields(Cell)]
COLUMNS = [*KEY, *NUMBERS, "levels"]


# --------------------------------------------------------------------------------------------------
# The plan: which runs there are


def cell(task, part, method, budget: int, tuned: Setting, seed: int, setting: str = "") -> Cell:
    place = {"task": task, "part": part, "method": method, "budget": budget}
    return Cell(**place, **dataclasses.asdict(tuned), seed=seed, setting=setting)


def budgets_of(method: str, *budgets: int) -> tuple[int, ...]:
    """These, but for GRPO, which takes no demonstrations, a single 0."""
    return (0,) if method == "GRPO" else budgets


def climbed_at(method: str) -> tuple[int, ...]:
    """The budgets at which all its axes are tried; only an SFT stage learns all demonstrations."""
    return budgets_of(method, *((LOW, HIGH, 0) if STAGE in FLAGS[method] else (LOW, HIGH)))


def tuned_at(budget: int) -> int:
    """The budget whose setting it has: its own, but LOW's below LOW, and HIGH's for all (0)."""
    return min(max(budget, LOW), HIGH) if budget else HIGH


def candidates(budget: int) -> list[int]:
    """LOW and HIGH, whose own settings are both tried at a budget, the nearer by ratio first."""
    return sorted((LOW, HIGH), key=lambda at: abs(math.log(budget / at)))


def axes_of(method: str, budget: int) -> dict[str, tuple]:
    """What is tried at a budget of climbed_at(), axis by axis."""
    if method == "GRPO":
        return {"rl_lr": GRID["rl_lr"]}
    epochs = COIN_EPOCHS if method == "alternating" else EPOCHS[budget]
    axes = {"sft_lr": GRID["sft_lr"], "epochs": epochs, "rl_lr": GRID["rl_lr"]}
    return axes | ({"buffer_size": GRID["buffer_size"]} if method in INTERLEAVED else {})


def first_setting(method: str, budget: int) -> Setting:
    """The first value of each axis, and None for what the method has none of."""
    axes = axes_of(method, budget)
    return Setting(*(axes.get(name, [None])[0] for name in TUNED))


def climb(axes: dict[str, tuple], setting: Setting, scores: dict[Setting, float]):
    """The best setting as far as the scores tell, and those that must be tried to go on.

    One axis after another; of equal scores the setting that stands wins, then the earlier value.
    """
    for name, values in axes.items():
        tried = [dataclasses.replace(setting, **{name: value}) for value in values]
        setting, missing = best_of([setting, *tried], scores)
        if missing:
            return setting, missing
    return setting, []


def best_of(settings: list[Setting], scores: dict[Setting, float]):
    """As climb(), but of these settings, of which the first stands; a single one is not tried."""
    different = list(dict.fromkeys(settings))
    if len(different) == 1:
        return settings[0], []
    missing = [one for one in different if one not in scores]
    if missing:
        return settings[0], missing
    return max(different, key=scores.get), []


def around(rate: float) -> tuple[float, ...]:
    """The rate of RATES, the one below it and the one above."""
    i = RATES.index(rate)
    return RATES[i], RATES[i - 1], RATES[i + 1]


def tune_plan(task: str, rows: list[dict]) -> tuple[dict, list[Cell]]:
    """{(method, budget): Setting} as far as the rows tell, and the next runs."""
    best, missing = {}, []

    def keep(method: str, budget: int, found: Setting, untried: list[Setting]) -> None:
        best[method, budget] = found
        missing.extend(tuning_cells(task, method, budget, untried))

    for method in METHODS:
        for budget in climbed_at(method):
            axes, start = axes_of(method, budget), first_setting(method, budget)
            scores = scores_of(task, method, budget, rows)
            keep(method, budget, *climb(axes, start, scores))
    if missing:
        return best, missing
    own = dict(best)
    for method in METHODS:
        if method == "GRPO":
            continue
        for budget in sorted(set(map(tuned_at, BUDGETS))):
            both = [own[method, at] for at in candidates(budget)]
            keep(method, budget, *best_of(both, scores_of(task, method, budget, rows)))
        for budget in BUDGETS:
            best.setdefault((method, budget), best[method, tuned_at(budget)])
    if missing:
        return best, missing
    budget = MIDDLE[task]
    base = best[SFT_THEN_RL, budget]
    for method, flags in FAMILY.items():
        axis = "rl_lr" if "--updates" in flags else "sft_lr"
        scores = scores_of(task, method, budget, rows)
        keep(method, budget, *climb({axis: around(getattr(base, axis))}, base, scores))
    return best, missing


def tuning_cells(task: str, method: str, budget: int, settings: list[Setting]) -> list[Cell]:
    return [
        cell(task, "tune", method, budget, setting, seed)
        for setting in settings
        for seed in TUNING_SEEDS
    ]


def scores_of(task: str, method: str, budget: int, rows: list[dict]) -> dict[Setting, float]:
    """Mean accuracy at the end of each setting tried on all of TUNING_SEEDS.

    -inf for one of which a run failed (no "final").
    """
    finals = {}
    for row in rows:
        place = row["task"], row["part"], row["method"], row["budget"]
        if place == (task, "tune", method, budget):
            setting = Setting(*(row[name] for name in TUNED))
            final = -math.inf if row["final"] is None else row["final"]
            finals.setdefault(setting, []).append(final)
    return {
        setting: statistics.fmean(values)
        for setting, values in finals.items()
        if len(values) == len(TUNING_SEEDS)
    }


def cells_of(task: str, part: str, best: dict) -> list[Cell]:
    """The runs of a part after tune, by seed, so that whole comparisons are there early."""
    places, seeds, shares = [], SEEDS, (1,)
    if part == "curve":
        for method in METHODS:
            places += [(method, budget, "") for budget in budgets_of(method, *BUDGETS)]
    elif part == "family":
        places += [(method, MIDDLE[task], "") for method in FAMILY]
        changes = changes_of(best["MIFO", MIDDLE[task]].buffer_size)
        places += [("MIFO", MIDDLE[task], change) for change in changes]
    elif part == "larger":
        seeds, shares = LARGER_SEEDS, LARGER_RATES
        for method in LARGER_METHODS if task == "knowledge" else ():
            places += [(method, budget, "") for budget in budgets_of(method, MIDDLE[task])]
    else:
        for method, setting in ANALYSED:
            places += [(method, budget, setting) for budget in budgets_of(method, MIDDLE[task])]
    cells = []
    for seed in seeds:
        for share, (method, budget, setting) in itertools.product(shares, places):
            tuned = times(best[method, budget], share)
            cells.append(cell(task, part, method, budget, tuned, seed, setting=setting))
    return cells


def changes_of(buffer_size: int) -> list[str]:
    """MIFO_SETTINGS, less what is MIFO's own S already."""
    own, changes = f"--buffer-size {buffer_size}", {}
    for setting in MIFO_SETTINGS:
        words = setting.replace(own, "").split()
        changes[" ".join(words)] = True
    changes.pop("", None)
    return list(changes)


def times(setting: Setting, share: float) -> Setting:
    """With this share of its learning rates."""
    sft_lr = None if setting.sft_lr is None else float(f"{share * setting.sft_lr:g}")
    rl_lr = float(f"{share * setting.rl_lr:g}")
    return dataclasses.replace(setting, rl_lr=rl_lr, sft_lr=sft_lr)


def plan_of(task: str, part: str, rows: list[dict]) -> list[Cell]:
    """cells_of() at the settings that tuning, as far as the rows tell, has come to."""
    best, _ = tune_plan(task, rows)
    places = [(method, budget) for method in FLAGS for budget in BUDGETS]
    return cells_of(task, part, {place: best.get(place, UNKNOWN) for place in places})


def planned(task: str, part: str) -> int:
    """How many runs a part has; tune and family at most."""
    if part != "tune":
        return len(plan_of(task, part, []))
    both = sum(1 if at in (LOW, HIGH) else 2 for at in set(map(tuned_at, BUDGETS)))
    tried = both * (len(METHODS) - 1)  # not GRPO
    for method in METHODS:
        for budget in climbed_at(method):
            tried += 1 + sum(len(values) - 1 for values in axes_of(method, budget).values())
    return len(TUNING_SEEDS) * (tried + 3 * len(FAMILY))


UNKNOWN = Setting(-1.0, -1.0, -1, -1)  # which no run has


def flags_of(one: Cell, base: Path, out: Path) -> list[str]:
    """Of mifo.py."""
    flags = f"{COMMON} {OF_TASK[one.task]} {FLAGS[one.method]} --seed {one.seed}"
    flags += f" --rl-lr {one.rl_lr:g}"
    if one.sft_lr is not None:
        flags += f" --sft-lr {one.sft_lr:g} --sft-epochs {one.epochs}"
        flags += f" --demonstration-budget {one.budget}"
    if one.buffer_size is not None:
        flags += f" --buffer-size {one.buffer_size}"
    _, dashes, further = one.setting.partition("--")
    flags += f" {dashes}{further}"
    files = {"model": base, "data": base.parent / "train.jsonl"}
    files |= {"evaluate": base.parent / "eval.jsonl", "out": out}
    found = flags.split()
    for name, path in files.items():
        found += [f"--{name}", str(path)]
    return found


# --------------------------------------------------------------------------------------------------
# The table of runs


def read_rows(path: Path) -> list[dict]:
    """Rows with numbers as numbers, and None where nothing stands. [] if there is no such file.

    A last line that was cut off by a crash is left out.
    """
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    rows = []
    for row in csv.DictReader(whole.splitlines()):
        for name in row:
            if name in ("budget", "epochs", "buffer_size", "seed"):
                row[name] = int(row[name]) if row[name] else None
            elif name in NUMBERS or name in ("rl_lr", "sft_lr"):
                row[name] = float(row[name]) if row[name] else None
        rows.append(row)
    return rows


def append_row(path: Path, row: dict) -> None:
    """At once on disk, behind what stands there; a line that a crash cut off is removed."""
    with evaluation.open_to_append(path) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())


def key_of(row: dict) -> Cell:
    return Cell(**{name: row[name] for name in KEY})


# --------------------------------------------------------------------------------------------------
# One run, in a process of its own. mifo.py's functions are wrapped there, never changed on disk.


def train(folder: Path, one: Cell, flags: list[str]) -> None:
    """mifo.py with the cell's flags; its row of the table goes to folder/row.json."""
    started = time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pictures.draw = lambda out: None
    mifo.checkpoint_due = lambda cfg, state: False  # but at the end, where main() wants one
    for key, patch in PATCHES.items():
        if one.method == key or one.setting.startswith(key):
            patch(one.seed)
    seen = watch(one.part)
    sys.argv = ["mifo.py", *flags]
    if code := mifo.main():
        sys.exit(code)
    found = measures(one, folder, seen)
    shutil.rmtree(folder / "checkpoints")
    found["seconds"] = time.perf_counter() - started
    row = dataclasses.asdict(one) | found
    for name in NUMBERS:
        if isinstance(row.get(name), float):
            row[name] = float(f"{row[name]:.4g}")
    print(f"{time.process_time():.1f} s of computing")
    mifo.write_whole(folder / "row.json", json.dumps(row))


def measures(one: Cell, folder: Path, seen: dict) -> dict:
    """The row's NUMBERS and levels, from the run's logs and from what watch() has seen."""
    run, cfg, state = compare.read_run(folder), seen["run"].cfg, seen["run"].state
    lines = pictures.read_log(folder, "evaluations.jsonl")
    metrics = pictures.read_log(folder, "metrics.jsonl")
    [questions] = seen["run"].benches.values()
    known = [i for i, q in enumerate(questions) if q.level == KNOWN_LEVEL[one.task]]
    [first], [last] = (list(lines[i]["benches"].values()) for i in (0, -1))
    right = [i for i in known if first["correct"][i]]
    wrong_now = sum(1 - last["correct"][i] for i in right)
    found = {
        "start": first["avg"],
        "final": run["final"],
        "area": run["area"],
        "known": statistics.fmean(last["correct"][i] for i in known),
        "lost": wrong_now / len(right) if right else None,
        "forgotten": compare.forgotten([only(known, line) for line in lines]),
        "sft_phases": state.sft_phases,
        "sft_steps": state.sft_steps,
        "demonstrations": len(set(state.demonstrations)),
        "sampled_tokens": state.sampled_tokens,
    }
    if cfg.schedule in mifo.STAGED:
        [after] = [line for line in lines if line["sft_steps"] and not line["rl_steps"]]
        [after] = after["benches"].values()
        held = [line["nll"] for line in pictures.read_log(folder, "holdout.jsonl")]
        found |= {"after_sft": after["avg"], "holdout_start": held[0], "holdout": held[1]}
    if seen["overlaps"]:
        found["overlap"], found["overlap_top"] = map(statistics.fmean, zip(*seen["overlaps"]))
    if cfg.schedule == "alternate":  # two evaluations may have several SFT phases between them
        found["forgotten"] = None
    shares, in_first, in_later = [], [], []
    for line in metrics:
        if "sft/frozen_share" in line:
            shares.append(line["sft/frozen_share"])
        if "sft/frozen_gradient_share" in line:
            in_phase = in_first if line["sft_phases"] == 1 else in_later
            in_phase.append(line["sft/frozen_gradient_share"])
    for name, values in (
        ("frozen_share", shares),
        ("frozen_gradient_first", in_first),
        ("frozen_gradient", in_later),
    ):
        found[name] = statistics.fmean(values) if values else None
    levels = " ".join(f"{level}:{value:.3f}" for level, value in run["levels"].items())
    return found | seen["found"] | {"levels": levels}


def only(indices: list[int], evaluation: dict) -> dict:
    """The evaluation, of these questions alone."""
    benches = {}
    for name, bench in evaluation["benches"].items():
        benches[name] = {"correct": [bench["correct"][i] for i in indices]}
    return evaluation | {"benches": benches}


def watch(part: str) -> dict:
    """Wraps mifo.py's phases to evaluate less often and to measure more.

    The dict returned gets "run"; "overlaps": of each SFT phase after RL steps what overlap() gives;
    and "found": but for tune pass@k after an SFT stage, and for analyse what half of each update is
    worth. On the way it keeps weights: "anchor", of the last change of phase, and "whole", of the
    start or, after an SFT stage, its end; and "rl", how far the RL phase has moved each.
    """
    halves, watched = part == "analyse", 0 if part == "tune" else WATCHED
    seen = {"overlaps": [], "found": {}}
    set_up, begin_sft, end_sft, train = mifo.set_up, mifo.begin_sft, mifo.end_sft, mifo.train
    measure_holdout = mifo.measure_holdout

    def setting_up(cfg):
        seen["run"] = run = set_up(cfg)
        seen["anchor"] = seen["whole"] = weights(run)
        return run

    def beginning(run, indices):
        now = weights(run)
        seen["rl"] = (now - seen["anchor"]).abs()
        seen["anchor"] = now
        begin_sft(run, indices)

    def ending(run):
        end_sft(run)
        now = weights(run)
        if seen["rl"].any():
            seen["overlaps"].append(overlap(seen["rl"], (now - seen["anchor"]).abs()))
        seen["anchor"] = now
        if run.cfg.schedule in mifo.STAGED:
            if part != "tune":
                seen["found"]["pass_k"] = pass_k(run)
            if halves:
                seen["found"] |= half_of_update(run, "sft", seen["whole"])
                seen["whole"] = now

    def training(run):
        stop = train(run)
        if halves and not stop:
            seen["found"] |= half_of_update(run, "rl", seen["whole"])
        return stop

    def measuring(run):
        if not run.state.sft_queue:  # not after each epoch
            measure_holdout(run)

    def evaluation_due(cfg, state, phase, following):
        """Around an SFT stage or the first SFT phases, halfway through RL, and at the end."""
        if following is None or cfg.schedule in mifo.STAGED and phase != following:
            return True
        if watched and phase == "rl" and state.rl_steps == cfg.steps // 2:
            return True
        return phase != following and state.sft_phases <= watched

    mifo.set_up, mifo.begin_sft, mifo.end_sft, mifo.train = setting_up, beginning, ending, training
    mifo.measure_holdout, mifo.evaluation_due = measuring, evaluation_due
    return seen


def weights(run) -> Tensor:
    """All of them, in one vector of its own."""
    return torch.cat([shard.flatten() for shard in run.shards])


def overlap(rl: Tensor, sft: Tensor) -> tuple[float, float]:
    """How much of |SFT's movement| lies in the half of the entries that RL moved most, and how much
    of the half that SFT moved most. Both are 0.5 where the two have nothing to do with each other.
    """
    half, top = most_moved_half(rl), most_moved_half(sft)
    return (sft[half].sum() / sft.sum()).item(), top[half].float().mean().item()


def most_moved_half(movement: Tensor) -> Tensor:
    """A mask of the half of the entries with the largest values."""
    mask = torch.zeros_like(movement, dtype=torch.bool)
    mask[movement.topk(len(movement) // 2).indices] = True
    return mask


def pass_k(run) -> float:
    [questions] = run.benches.values()
    result = evaluated(run, questions[:PASS_QUESTIONS], PASS_K, 1.0)
    return result["pass"][PASS_K]


def evaluated(run, questions: list, k: int, temperature: float) -> dict:
    """The summary of evaluating the policy as it stands."""
    run.pushed_at = -1  # the weights may have changed within a step
    mifo.push_weights(run)
    decode = lambda tokens: run.tokenizer.decode(tokens, skip_special_tokens=True)
    limit = run.cfg.max_response
    rows = evaluation.evaluate(
        run.sampler, questions, run.checker, k, temperature, limit, run.cfg.seed, decode
    )
    return evaluation.summarize(rows)


def half_of_update(run, phase: str, before: Tensor) -> dict[str, float]:
    """How far a phase went from the weights before it; accuracy with random halves of it put back.

    The weights are as they were when it returns.
    """
    [questions] = run.benches.values()
    after, accuracies = weights(run), []
    for seed in (1, 2, 3):
        keep = torch.rand(after.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
        load(run, torch.where(keep, after, before))
        accuracies.append(evaluated(run, questions, 1, 0.0)["avg"])
    load(run, after)
    moved = (after - before).abs()
    return {
        f"{phase}_norm": (moved.norm() / before.norm()).item(),
        f"{phase}_moved": (moved > 1e-3).float().mean().item(),
        f"{phase}_half": statistics.fmean(accuracies),
    }


def load(run, vector: Tensor) -> None:
    """weights(), the other way."""
    for shard, part in zip(run.shards, vector.split([shard.numel() for shard in run.shards])):
        shard.copy_(part.view_as(shard))


def choose_hard(seed: int) -> None:
    """An SFT stage on demonstrations of questions that are hard for the base model, by --p.

    Questions come in a random order; each is sampled G times until enough are hard. What that
    samples counts among the run's tokens.
    """

    def stage(run) -> list[int]:
        cfg, state, chosen = run.cfg, run.state, []
        indices = sorted(run.demonstrated)
        order = [indices[i] for i in data.draw(len(indices), cfg.seed, 0, len(indices))]
        wanted = cfg.demonstration_budget or len(order)
        mifo.push_weights(run)
        while order and len(chosen) < wanted:
            block, order = order[: cfg.questions], order[cfg.questions :]
            responses = mifo.sample(run, [run.questions[index] for index in block])
            state.drawn += len(block)  # so that the next block has another noise
            state.sampled_tokens += sum(len(response.tokens) for response in responses)
            rewards = torch.tensor([r.reward for r in responses]).view(-1, cfg.samples)  # [Q, G]
            accuracies = (rewards > cfg.right_above).double().mean(1).tolist()
            chosen += [index for index, rate in zip(block, accuracies) if rate <= cfg.p]
        state.drawn = 0  # RL has the questions of every other method
        return sorted(chosen[:wanted])

    mifo.stage = stage


def choose_tokens(score, seed: int) -> None:
    """SFT learns the tokens of highest score(entropy, generator) in place of the entropy."""
    top_entropy_mask, generator = losses.top_entropy_mask, torch.Generator().manual_seed(seed)

    def mask_of(entropy, mask, rho):
        return top_entropy_mask(score(entropy, generator), mask, rho)

    losses.top_entropy_mask = mask_of


def random_tokens(seed: int) -> None:
    choose_tokens(lambda entropy, generator: torch.rand(entropy.shape, generator=generator), seed)


def lowest_tokens(seed: int) -> None:
    choose_tokens(lambda entropy, generator: -entropy, seed)


def freeze_at_random(seed: int) -> None:
    """Each SFT phase freezes entries at random, whatever RL has moved."""
    generator = torch.Generator().manual_seed(seed)

    def update_importance(importance, *args):
        for shard in importance:
            shard.copy_(torch.rand(shard.shape, generator=generator))

    mifo.freeze.update_importance = update_importance


def drop_gradients(which: str, seed: int) -> None:
    """A random half of each gradient of SFT's or RL's steps is zeroed."""
    optimizer_step, generator = mifo.optimizer_step, torch.Generator().manual_seed(seed)

    def dropping(run, phase, *args):
        if phase == which:
            for parameter in run.policy.parameters():
                grad = parameter.grad.to_local()
                grad *= torch.rand(grad.shape, generator=generator) < 0.5
        optimizer_step(run, phase, *args)

    mifo.optimizer_step = dropping


PATCHES = {  # what no flag does, by method or setting: called with the seed before the run
    HARD_FIRST: choose_hard,
    RANDOM: random_tokens,
    LOWEST: lowest_tokens,
    RANDOM_HALF: freeze_at_random,
    HALF_SFT: lambda seed: drop_gradients("sft", seed),
    HALF_RL: lambda seed: drop_gradients("rl", seed),
}


# --------------------------------------------------------------------------------------------------
# Many at once


def make_base(folder: Path, task: str, seed: int, shape: dict) -> None:
    {"knowledge": knowledge, "countdown": countdown}[task].make(folder.parent, seed, **shape)


def child(log: Path, call, args: tuple) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    os.environ.update(step.ALONE)
    call(*args)


def work(jobs: list[tuple], label: str, finished) -> list[Path]:
    """Does the jobs (folder, function, its further arguments), one a core.

    finished(folder) is called for each as soon as it has ended well. Returns the logs of the
    others. When this process is told to end, those that are running end at once.
    """
    context = multiprocessing.get_context("forkserver")
    waiting, running, failed = list(jobs), {}, []
    # Imported once: it would take longer than a tenth of a run.
    qwen = "transformers.models.qwen2.modeling_qwen2"
    context.set_forkserver_preload(["mifo", "datasets", "transformers.generation.utils", qwen])
    interval = 0 if sys.stderr.isatty() else 60
    try:
        for _ in tqdm(range(len(jobs)), desc=label, unit="run", mininterval=interval):
            while waiting and len(running) < os.cpu_count():
                folder, call, *args = waiting.pop(0)
                log = folder.with_name(folder.name + ".log")
                process = context.Process(target=child, args=(log, call, (folder, *args)))
                process.start()
                running[process.sentinel] = process, folder, log
            sentinel = wait(list(running))[0]
            process, folder, log = running.pop(sentinel)
            process.join()
            if process.exitcode:
                failed.append(log)
            else:
                finished(folder)
    finally:
        for process, *_ in running.values():
            process.kill()
    return failed


def name_of(one: Cell) -> str:
    """A folder's name for a run."""
    tuned = [getattr(one, name) for name in TUNED]
    parts = [one.method, one.budget, *tuned, one.setting, one.seed]
    text = "-".join(str(part) for part in parts if part not in (None, ""))
    return "".join(letter if letter.isalnum() or letter in "-.=" else "_" for letter in text)


def do(cells: list[Cell], out: Path, label: str) -> list[Path]:
    """The runs that are not in CSV, after the base models that they need. Logs of what failed."""
    done = {key_of(row) for row in read_rows(CSV)}
    left = [one for one in cells if one not in done]
    bases, jobs = {}, []
    for one in left:
        larger = one.part == "larger"
        base = out / one.task / ("larger" if larger else "") / f"base-{one.seed}"
        if not base.exists():
            bases[base] = base, make_base, one.task, one.seed, LARGER if larger else {}
        folder = out / one.task / one.part / name_of(one)
        jobs.append((folder, train, one, flags_of(one, base, folder)))
    if bases:
        failed = work(list(bases.values()), f"{label}, base models", lambda folder: None)
        if failed:
            return failed

    def finished(folder: Path) -> None:
        append_row(CSV, json.loads((folder / "row.json").read_text()))

    return work(jobs, label, finished) if jobs else []


def tune(task: str, out: Path) -> tuple[dict, list[Path]]:
    """{(method, budget): Setting}, and the logs of what failed, whose settings are out."""
    failed, broken = [], []
    while True:
        best, cells = tune_plan(task, read_rows(CSV) + broken)
        if not cells:
            return best, failed
        failed += do(cells, out, f"{task}: tune")
        done = {key_of(row) for row in read_rows(CSV)}
        for one in cells:
            if one not in done:
                broken.append(dataclasses.asdict(one) | {"final": None})


def left_of(task: str, part: str, rows: list[dict]) -> int:
    """How many runs of a part are not there; of tune, and before it is done, at most."""
    if part != "tune":
        return len(set(plan_of(task, part, rows)) - set(map(key_of, rows)))
    _, untried = tune_plan(task, rows)
    have = sum((row["task"], row["part"]) == (task, part) for row in rows)
    return max(len(untried), planned(task, part) - have) if untried else 0


def forecast(tasks: list[str], parts: list[str]) -> str:
    """How many runs are left, and about how long they take."""
    rows, lines, total = read_rows(CSV), [], 0.0
    for task in tasks:
        for part in parts:
            of, left = planned(task, part), left_of(task, part, rows)
            if not of:
                continue
            like = [row for row in rows if (row["task"], row["part"]) == (task, part)]
            if not like and part != "larger":  # of which the small model's runs say nothing
                like = [row for row in rows if row["task"] == task] or rows
            text = f"{task}, {part}: {left} of {of} runs left"
            if left and like:
                minutes = left * statistics.fmean(row["seconds"] for row in like) / 60
                minutes /= os.cpu_count()
                total += minutes
                text += f", about {minutes:.0f} minutes"
            elif left:
                text += "; none was timed yet"
            lines.append(text)
    if total:
        lines.append(f"about {total:.0f} minutes in all")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/experiment"))
    parser.add_argument("--parts", default=",".join(PARTS), help="tune is done before any other")
    parser.add_argument("--tasks", default=",".join(TASKS))
    args = parser.parse_args()
    parts, tasks = args.parts.split(","), args.tasks.split(",")
    for given, known, name in ((parts, PARTS, "--parts"), (tasks, TASKS, "--tasks")):
        for word in given:
            if word not in known:
                parser.error(f"{name}: {word!r} is none of {', '.join(known)}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    print(forecast(tasks, ["tune", *(part for part in parts if part != "tune")]), flush=True)
    failed = []
    with contextlib.suppress(KeyboardInterrupt):
        for task in tasks:
            best, logs = tune(task, args.out)
            failed += logs
            for part in PARTS[1:]:
                if part in parts:
                    failed += do(cells_of(task, part, best), args.out, f"{task}: {part}")
        if failed:
            names = ", ".join(map(str, failed))
            print(f"experiment.py: {len(failed)} runs failed: {names}", file=sys.stderr)
        return 1 if failed else 0
    return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
