"""The experiment: MIFO, its ablations, PEAR and the baselines on two small tasks, tuned alike and
over seeds; and the MIFO paper's analyses.

    python benchmarks/experiment.py [--out FOLDER] [--parts tune,final,sweep,analyse] [--tasks ...]

As many runs at once as there are cores, each a mifo.py on one of them with the PyTorch sampler.
Runs that are done are not repeated, so an interrupted experiment goes on with the same command.
Every run's row goes to benchmarks/experiment.csv, the figures to assets/, the tables to standard
output. Tasks: `chain`, the embedded one, and `countdown` (countdown.py).

1. tune: each method on its own over the same learning rates: SFT's at the middle one of RL, then
   RL's at the best one of SFT; all on one tuning seed, the better two on the next if there is one.
   The score is accuracy at the end plus its mean over the RL steps.
2. final: each method at its best learning rates on SEEDS, which no choice has seen, with an
   evaluation around each SFT phase.
3. sweep: rho, k, alpha and S around MIFO's tuned setting, on SWEEP_SEEDS.
4. analyse: how far SFT and RL move the parameters, what dropping half of each gradient or of the
   finished update costs, and how much SFT's movement overlaps with RL's.
"""

import argparse
import csv
import itertools
import json
import multiprocessing
import os
import shutil
import sys
from multiprocessing.connection import wait
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import compare
import countdown
import data
import eval as evaluation
import mifo
import rollout
import step
import torch
import transformers
from safetensors.torch import load_file
from tqdm import tqdm

evaluation.CHAINS = 500  # half of them, for there are many evaluations
ROOT = Path(__file__).resolve().parents[1]
SEEDS, SWEEP_SEEDS = (10, 11, 12, 13, 14), (10, 11, 12)
TUNING_SEEDS = {"chain": (20, 21), "countdown": (20,)}  # a run of countdown takes longer
RL_LR, SFT_LR = (3e-5, 1e-4, 3e-4), (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
STAGE = "--schedule sft-then-rl --rho 1 --sft-epochs 1 --sft-batch 64 --sft-schedule cosine"
METHODS = {
    "MIFO": "",
    "MIFO-dagger": "--alpha 0",
    "MIFO without freezing": "--freeze off",
    "MIFO without entropy selection": "--rho 1",
    "MIFO without both (ReLIFT's scheme)": "--freeze off --rho 1",
    "GRPO": "--schedule rl",
    "SFT": STAGE.replace("sft-then-rl", "sft"),
    "SFT then RL": STAGE,
    **{
        f"PEAR ({variant}) then RL": f"{STAGE} --pear {variant}"
        for variant in ("sequence", "token", "block")
    },
}
SWEEPS = {"rho": (0.1, 0.5, 1.0), "k": (0.25, 0.75), "alpha": (0.0, 1.0), "buffer_size": (16, 128)}
COMMON = (
    "--questions 32 --sft-batch 16 --sft-epochs 3 --buffer-size 64 --eval-temperature 0 "
    "--micro-tokens 4096 --sampler torch --save-every 100000"
)
PLAIN = "MIFO without both (ReLIFT's scheme)"
NUMBERS = ["final", "area", "forgotten", "sft_phases", "demonstrations", "sampled_tokens"]
COLUMNS = ["task", "part", "method", "rl_lr", "sft_lr", "setting", "seed", *NUMBERS, "levels"]


def task_flags(out: Path, task: str, seed: int) -> str:
    if task == "chain":
        return "--steps 30 --evaluate chain --max-prompt 24 --max-response 80"
    folder = out / "countdown"
    return (
        f"--steps 20 --model {folder}/base-{seed} --data {folder}/train.jsonl "
        f"--evaluate {folder}/eval.jsonl --max-prompt 24 --max-response 88"
    )


# --------------------------------------------------------------------------------------------------
# Runs, each in a process of its own


def base_folder(out: Path, task: str, seed: int) -> Path:
    return out / task / f"base-{seed}"


def make_base(folder: Path, task: str, seed: int) -> None:
    if task == "countdown":
        countdown.make(folder.parent, seed)
    else:
        part = folder.with_suffix(".partial")
        data.make_base(part, seed, data.embedded_tokenizer(), data.base_chain)
        part.rename(folder)


def train(folder: Path, flags: str, drop: int = 0, keep_model: bool = False) -> None:
    """mifo.py with these flags. drop: seed of which half of each gradient is zeroed; 0: none is."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if "--data" not in flags:
        make_the_expert_certain()
    if drop:
        drop_gradients(drop)
    overlaps = watch_overlap()
    sys.argv = ["mifo.py", *flags.split(), "--out", str(folder)]
    if code := mifo.main():
        sys.exit(code)
    checkpoints = folder / "checkpoints"
    if keep_model:
        last = sorted(checkpoints.glob("step-*[0-9]"))[-1]
        shutil.move(last / "model", folder / "model")
    shutil.rmtree(checkpoints)
    (folder / "overlap.json").write_text(json.dumps(overlaps))
    (folder / "done").touch()


def make_the_expert_certain() -> None:
    """The chains' expert is a program that has no choice: log-probabilities of 0, for PEAR."""
    embedded_questions = data.embedded_questions

    def certain(*args):
        questions = embedded_questions(*args)
        for question in questions:
            question.behavior_logprobs = [0.0] * len(question.demonstration)
        return questions

    data.embedded_questions = certain


def drop_gradients(seed: int) -> None:
    optimizer_step, generator = mifo.optimizer_step, torch.Generator().manual_seed(seed)

    def dropping(run, *args):
        for parameter in run.policy.parameters():
            grad = parameter.grad.to_local()
            grad *= torch.rand(grad.shape, generator=generator) < 0.5
        optimizer_step(run, *args)

    mifo.optimizer_step = dropping


def watch_overlap() -> list[dict]:
    """Wraps mifo.py's SFT phases; the list gets one entry for each that follows RL steps.

    An entry says how much of SFT's movement ("movement"), and of the half of the entries that SFT
    moves most ("top"), lies in the half that the RL phase before it moved most.
    """
    found, held = [], {}
    set_up, begin_sft, end_sft = mifo.set_up, mifo.begin_sft, mifo.end_sft

    def weights(run) -> torch.Tensor:
        return torch.cat([shard.flatten() for shard in run.shards])  # a copy

    def starting(cfg):
        run = set_up(cfg)
        held["start"] = weights(run)
        return run

    def beginning(run, indices):
        now = weights(run)
        held["rl"] = (now - held["start"]).abs()
        held["start"] = now
        begin_sft(run, indices)

    def ending(run):
        end_sft(run)
        now, rl = weights(run), held["rl"]
        sft = (now - held["start"]).abs()
        held["start"] = now
        if rl.any():
            half, top = most_moved_half(rl), most_moved_half(sft)
            movement = sft[half].sum() / sft.sum()
            found.append({"movement": movement.item(), "top": top[half].float().mean().item()})

    mifo.set_up, mifo.begin_sft, mifo.end_sft = starting, beginning, ending
    return found


def most_moved_half(movement: torch.Tensor) -> torch.Tensor:
    """A mask of the half of the entries with the largest values."""
    mask = torch.zeros_like(movement, dtype=torch.bool)
    mask[movement.topk(len(movement) // 2).indices] = True
    return mask


def drop_update(folder: Path, base: Path, trained: Path, flags: str) -> None:
    """How far the model moved from its base; its accuracy with the update and with halves of it."""
    before, after = (load_file(path / "model.safetensors") for path in (base, trained))
    moved = torch.cat([(after[name] - before[name]).abs().flatten() for name in before])
    norm = torch.cat([weight.flatten() for weight in before.values()]).norm()
    cfg = mifo.parse_config([*flags.split(), "--out", str(folder)])
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    sampler = rollout.make_sampler(
        "torch",
        str(base),
        max_len=cfg.max_prompt + cfg.max_response,
        dtype=torch.float32,
        eos_ids=evaluation.eos_ids(str(base), tokenizer),
    )
    questions = evaluation.load_questions(cfg.evaluate, tokenizer, None, "")
    decode = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)
    accuracies = []
    with evaluation.Checker() as checker:
        for seed in range(4):  # 0: all of the update
            sampler.push(mixed(before, after, seed).items())
            rows = evaluation.evaluate(
                sampler, questions, checker, 1, 0.0, cfg.max_response, 0, decode
            )
            accuracies.append(evaluation.summarize(rows)["avg"])
    result = {
        "norm": (moved.norm() / norm).item(),
        "share": (moved > 1e-3).float().mean().item(),
        "whole": accuracies[0],
        "half": sum(accuracies[1:]) / 3,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "done").touch()


def mixed(before: dict, after: dict, seed: int) -> dict[str, torch.Tensor]:
    """The weights after training, a random half of their entries put back; seed 0: none of them."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, old in before.items():
        keep = torch.rand(old.shape, generator=generator) < (0.5 if seed else 1.0)
        weights[name] = torch.where(keep, after[name], old)
    return weights


def child(log: Path, call, args) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    os.environ.update(step.ALONE)
    call(*args)
    sys.stdout.flush()
    os._exit(0)


def work(jobs: list[tuple], label: str) -> None:
    """Does the jobs (folder, function, its further arguments) that are not done, one a core."""
    waiting = []
    for job in {job[0]: job for job in jobs}.values():
        done = (job[0] / "done").exists() or (job[0] / "model.safetensors").exists()
        if not done:
            waiting.append(job)
    context, running = multiprocessing.get_context("forkserver"), {}
    context.set_forkserver_preload(["mifo", "countdown"])
    interval = 0 if sys.stderr.isatty() else 60
    for _ in tqdm(range(len(waiting)), desc=label, unit="run", mininterval=interval):
        while waiting and len(running) < os.cpu_count():
            folder, call, *args = waiting.pop(0)
            log = folder.with_name(folder.name + ".log")
            process = context.Process(target=child, args=(log, call, (folder, *args)))
            process.start()
            running[process.sentinel] = process, log
        for sentinel in wait(list(running))[:1]:
            process, log = running.pop(sentinel)
            process.join()
            if process.exitcode:
                text = log.read_text()[-2000:]
                sys.exit(f"experiment.py: {log}: exit code {process.exitcode}\n{text}")


# --------------------------------------------------------------------------------------------------
# The parts. A cell is (method, learning rates of RL and SFT, further flags).


def job(out: Path, task: str, part: str, cell: tuple, seed: int, **more) -> tuple:
    """(folder, train, flags, drop, keep_model), for work; `more` are the last two."""
    method, rates, setting = cell
    drop = more.get("drop", 0)
    parts = [
        method.split(" (ReL")[0].replace(" ", "_"),
        *(f"{rate:g}" for rate in rates if rate),
        setting.strip("-").replace(" ", "="),
        "dropped" if drop else "",
        str(seed),
    ]
    folder = out / task / part / "-".join(filter(None, parts))
    flags = f"{COMMON} {task_flags(out, task, seed)} {METHODS[method]} {setting} --seed {seed}"
    for flag, rate in zip(("--rl-lr", "--sft-lr"), rates):
        flags += f" {flag} {rate}" if rate else ""
    flags += " --eval-every 15" if part == "tune" else " --eval-every 5 --eval-sft-phases"
    return folder, train, flags, drop, more.get("keep_model", False)


def row(task: str, part: str, cell: tuple, seed: int, run: dict) -> dict:
    """A line of experiment.csv."""
    method, (rl_lr, sft_lr), setting = cell
    found = dict(zip(COLUMNS, (task, part, method, rl_lr, sft_lr, setting, seed)))
    for key in NUMBERS:
        value = run.get(key)
        found[key] = round(value, 4) if isinstance(value, float) else value
    levels = run.get("levels", {})
    found["levels"] = " ".join(f"{level}:{accuracy:.3f}" for level, accuracy in levels.items())
    return found


def tune(out: Path, task: str, rows: list[dict]) -> dict[str, tuple]:
    """The best learning rates (RL's, SFT's) of each method; None where it has no such phase.

    Along each axis all values are tried on the first of the tuning seeds, and the better two of
    them on the next. Only what is better replaces the middle one: many SFT rates end at an accuracy
    of 1, and the lowest of these would be a poor choice.
    """
    best = {}
    for method, flags in METHODS.items():
        rl_lr = None if "--schedule sft " in flags else RL_LR[1]
        sft_lr = None if "--schedule rl" in flags else SFT_LR[2]
        best[method] = rl_lr, sft_lr
    runs = {}
    for axis, values in ((1, SFT_LR), (0, RL_LR)):
        left = {method: along(axis, values, rates) for method, rates in best.items()}
        for n, seed in enumerate(TUNING_SEEDS[task], 1):
            jobs = {}
            for method in METHODS:
                for rates in left[method]:
                    cell = method, rates, ""
                    jobs[method, rates, seed] = job(out, task, "tune", cell, seed)
            what = ("RL", "SFT")[axis]
            work(list(jobs.values()), f"{task}: tuning {what}'s learning rate, seed {seed}")
            runs |= {key: compare.read_run(folder) for key, (folder, *_) in jobs.items()}
            for method, tried in left.items():
                seeds = TUNING_SEEDS[task][:n]
                scores = {rates: score(runs, method, rates, seeds) for rates in tried}
                left[method] = sorted(tried, key=scores.get, reverse=True)[:2]
        best = {method: tried[0] for method, tried in left.items()}
    for (method, rates, seed), run in sorted(runs.items(), key=str):
        rows.append(row(task, "tune", (method, rates, ""), seed, run))
    return best


def along(axis: int, values: tuple, rates: tuple) -> list[tuple]:
    """The rates, and after them those with each other value on this axis.

    along(0, (1, 2), (2, 9)) -> [(2, 9), (1, 9)]; along(0, (1, 2), (None, 9)) -> [(None, 9)]
    """
    tried = [rates]
    for value in values if rates[axis] else ():
        other = (value, rates[1]) if axis == 0 else (rates[0], value)
        if other not in tried:
            tried.append(other)
    return tried


def score(runs: dict, method: str, rates: tuple, seeds: tuple) -> float:
    total = 0.0
    for seed in seeds:
        run = runs[method, rates, seed]
        total += run["final"] + (run["final"] if run["area"] is None else run["area"])
    return total


def groups_of(
    out: Path, task: str, part: str, cells: dict[str, tuple], seeds: tuple, rows: list[dict]
) -> dict[str, list]:
    """{name: measures (compare.read_run) of its cell's run on each seed}"""
    jobs = {}
    for seed in seeds:
        for name, cell in cells.items():
            jobs[name, seed] = job(out, task, part, cell, seed)
    work(list(jobs.values()), f"{task}: {part}")
    groups = {}
    for name, cell in cells.items():
        groups[name] = [compare.read_run(jobs[name, seed][0]) for seed in seeds]
        for seed, run in zip(seeds, groups[name]):
            rows.append(row(task, part, cell, seed, run))
    return groups


def analyse(out: Path, task: str, best: dict[str, tuple], rows: list[dict]) -> str:
    """The paper's analyses of update size and redundancy, and of overlap, as Markdown."""
    lines = [
        "| | change of the weights, relative | share moved by over 0.001 | accuracy "
        "| half of each gradient dropped | half of the update dropped |",
        "| --- " * 6 + "|",
    ]
    for method in ("SFT", "GRPO"):
        columns = halves(out, task, method, best[method], rows)
        lines.append(f"| {method} | " + " | ".join(map(show, columns)) + " |")
    return "\n".join([*lines, *overlap(out, task, best)])


def halves(out: Path, task: str, method: str, rates: tuple, rows: list[dict]) -> list[list]:
    """A method's columns in the table of analyse, each over SEEDS."""
    cell = method, rates, ""
    whole, dropped, half = [], [], []
    for seed in SEEDS:
        whole.append(job(out, task, "analyse", cell, seed, keep_model=True))
        dropped.append(job(out, task, "analyse", cell, seed, keep_model=True, drop=seed))
        folder, _, flags, *_ = whole[-1]
        base, result = base_folder(out, task, seed), folder.with_name(folder.name + "-half")
        half.append((result, drop_update, base, folder / "model", flags))
    work([*whole, *dropped], f"{task}: {method}")
    work(half, f"{task}: half of {method}'s update")
    found = [json.loads((folder / "result.json").read_text()) for folder, *_ in half]
    drops = [compare.read_run(folder) for folder, *_ in dropped]
    settings = {
        "": [compare.read_run(folder) for folder, *_ in whole],
        "half of each gradient dropped": drops,
        "half of the update dropped": [{"final": one["half"]} for one in found],
    }
    for setting, runs in settings.items():
        for seed, run in zip(SEEDS, runs):
            rows.append(row(task, "analyse", (method, rates, setting), seed, run))
    columns = [[one[key] for one in found] for key in ("norm", "share", "whole")]
    return [*columns, [run["final"] for run in drops], [one["half"] for one in found]]


def overlap(out: Path, task: str, best: dict[str, tuple]) -> list[str]:
    """How SFT's movement overlaps with RL's where nothing is frozen; means over phases and runs."""
    movement, top = [], []
    for seed in SEEDS:
        folder, *_ = job(out, task, "final", (PLAIN, best[PLAIN], ""), seed)
        phases = json.loads((folder / "overlap.json").read_text())
        if phases:
            movement.append(sum(phase["movement"] for phase in phases) / len(phases))
            top.append(sum(phase["top"] for phase in phases) / len(phases))
    if not movement:
        return []
    text = (
        f"{PLAIN}: of SFT's movement {show(movement)}, and of the half that it moves most "
        f"{show(top)}, lie in the half that the RL phase before it moved most (0.5 if unrelated); "
        f"{len(movement)} runs."
    )
    return ["", text]


def paired(groups: dict[str, list[dict]]) -> str:
    """Each method less MIFO on the same seed, and so from the same base model, as Markdown."""
    lines = [
        "| less MIFO | accuracy at the end | mean accuracy over the RL steps |",
        "| --- | --- | --- |",
    ]
    for name, runs in groups.items():
        cells = []
        for key in ("final", "area"):
            pairs = [(run[key], other[key]) for run, other in zip(runs, groups["MIFO"])]
            gains = [value - other for value, other in pairs if value is not None]
            cells.append(show(gains) if gains else "")
        if name != "MIFO":
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def show(values: list[float]) -> str:
    """Mean ± half the 95 % interval."""
    return "{:.3f} ± {:.3f}".format(*compare.interval(values))


def prepare(out: Path, task: str) -> None:
    """The base models; those of the chains where mifo.py looks for them, too."""
    seeds = (*TUNING_SEEDS[task], *SEEDS)
    jobs = [(base_folder(out, task, seed), make_base, task, seed) for seed in seeds]
    work(jobs, f"{task}: base models")
    if task != "chain":
        return
    for part, seed in itertools.product(("tune", "final", "sweep", "analyse"), seeds):
        link = out / task / part / f"embedded-base-{seed}"
        link.parent.mkdir(exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(Path("..") / f"base-{seed}")


def experiment(out: Path, task: str, parts: list[str], rows: list[dict]) -> list[str]:
    """All parts on one task: its tables, as Markdown."""
    prepare(out, task)
    best = tune(out, task, rows)
    text = [
        f"\n## {task}\n",
        "| method | RL learning rate | SFT learning rate |",
        "| --- | --- | --- |",
    ]
    for method, (rl_lr, sft_lr) in best.items():
        text.append(f"| {method} | {rl_lr or ''} | {sft_lr or ''} |")
    if "final" not in parts:
        return text
    cells = {method: (method, best[method], "") for method in METHODS}
    groups = groups_of(out, task, "final", cells, SEEDS, rows)
    text += ["", compare.comparison(groups), "", paired(groups)]
    compare.draw_comparison(groups, ROOT / "assets" / f"experiment-{task}.png", task)
    if "sweep" in parts:
        cells = {}
        for name, values in SWEEPS.items():
            for value in values:
                setting = f"--{name.replace('_', '-')} {value:g}"
                cells[f"{name} {value:g}"] = "MIFO", best["MIFO"], setting
        swept = groups_of(out, task, "sweep", cells, SWEEP_SEEDS, rows)
        centre = {"MIFO": groups["MIFO"][: len(SWEEP_SEEDS)]}
        text += ["", compare.comparison(centre | swept)]
    if "analyse" in parts:
        text += ["", analyse(out, task, best, rows)]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/experiment"))
    meaning = "the first is always done; the last two need final"
    parser.add_argument("--parts", default="tune,final,sweep,analyse", help=meaning)
    parser.add_argument("--tasks", default="chain,countdown")
    args = parser.parse_args()
    rows = []
    for task in args.tasks.split(","):
        text = experiment(args.out, task, args.parts.split(","), rows)
        with open(Path(__file__).with_suffix(".csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        print(*text, sep="\n", flush=True)


if __name__ == "__main__":
    main()
