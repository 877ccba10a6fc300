"""The experiment: MIFO, its ablations, PEAR and the baselines on two small tasks, tuned alike and over seeds; and the MIFO
paper's analyses.

    python benchmarks/experiment.py [--out runs/experiment] [--parts tune,final,sweep,analyse] [--tasks chain,countdown]

As many runs at once as there are cores, each a mifo.py on one of them with the PyTorch sampler. Runs that are done are not
repeated, so an interrupted experiment goes on with the same command. Every run's row goes to benchmarks/experiment.csv, the
figures to assets/, the tables to standard output. Tasks: `chain`, the embedded one, and `countdown` (countdown.py).

1. tune: each method on its own over the same learning rates: SFT's at the middle one of RL, then RL's at the best one of SFT;
   all on one tuning seed, the better two on the next if there is one. The score is accuracy at the end plus its mean over
   the RL steps.
2. final: each method at its best learning rates on SEEDS, which no choice has seen, with an evaluation around each SFT phase.
3. sweep: rho, k, alpha and S around MIFO's tuned setting, on SWEEP_SEEDS.
4. analyse: how far SFT and RL move the parameters, what dropping half of each gradient or of the finished update costs, and how
   much SFT's movement overlaps with RL's.
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

import countdown
import data
import mifo
import rollout
import step
import torch
import transformers
from safetensors.torch import load_file
from tqdm import tqdm

evaluation = mifo.evaluation
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
    "--questions 32 --sft-batch 16 --sft-epochs 3 --buffer-size 64 --eval-temperature 0 --micro-tokens 4096 "
    "--sampler torch --save-every 100000"
)
NUMBERS = ["final", "area", "forgotten", "sft_phases", "demonstrations", "sampled_tokens"]
COLUMNS = ["task", "part", "method", "rl_lr", "sft_lr", "setting", "seed", *NUMBERS, "levels"]


def task_flags(out: Path, task: str, seed: int) -> str:
    if task == "chain":
        return "--steps 30 --evaluate chain --max-prompt 24 --max-response 80"
    folder = out / "countdown"
    return (
        f"--steps 20 --model {folder}/base-{seed} --data {folder}/train.jsonl --evaluate {folder}/eval.jsonl "
        "--max-prompt 24 --max-response 88"
    )


# ---------------------------------------------------------------------------------------------------------------------
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
    """mifo.py with these flags. drop: which half of each gradient's entries to zero is drawn with this seed; 0: none."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if "--data" not in flags:  # the chains' expert is a program that has no choice
        questions = data.embedded_questions

        def certain(*args):
            found = questions(*args)
            for question in found:
                question.behavior_logprobs = [0.0] * len(question.demonstration)
            return found

        data.embedded_questions = certain
    if drop:
        take, generator = mifo.optimizer_step, torch.Generator().manual_seed(drop)

        def dropping(run, *args):
            for parameter in run.policy.parameters():
                grad = parameter.grad.to_local()
                grad *= torch.rand(grad.shape, generator=generator) < 0.5
            take(run, *args)

        mifo.optimizer_step = dropping
    measured = watch_overlap()
    sys.argv = ["mifo.py", *flags.split(), "--out", str(folder)]
    mifo.main()
    model = mifo.checkpoints(folder)[-1] / "model"
    if keep_model:
        shutil.move(model, folder / "model")
    shutil.rmtree(folder / "checkpoints")
    (folder / "overlap.json").write_text(json.dumps(measured))
    (folder / "done").touch()


def watch_overlap() -> list[dict]:
    """Wraps mifo.py's SFT phases: for each, how much of SFT's movement lies in the half that the last RL phase moved most."""
    found, held = [], {}
    begin, take, set_up = mifo.begin_sft_phase, mifo.sft_step, mifo.set_up

    def now(run) -> torch.Tensor:
        return torch.cat([shard.flatten() for shard in run.shards])

    def beginning(run, places):
        weights = now(run)
        held["rl"] = (weights - held["start"]).abs()
        held["start"] = weights
        begin(run, places)

    def stepping(run):
        take(run)
        if not run.state.sft_queue:
            sft, rl = (now(run) - held["start"]).abs(), held["rl"]
            if rl.any():
                half = torch.zeros_like(rl, dtype=torch.bool)
                half[rl.topk(len(rl) // 2).indices] = True
                top = torch.zeros_like(half)
                top[sft.topk(len(rl) // 2).indices] = True
                found.append(
                    {
                        "movement": (sft[half].sum() / sft.sum()).item(),
                        "top": top[half].float().mean().item(),
                    }
                )
            held["start"] = now(run)

    def starting(cfg):
        run = set_up(cfg)
        held["start"] = now(run)
        return run

    mifo.begin_sft_phase, mifo.sft_step, mifo.set_up = beginning, stepping, starting
    return found


def drop_update(folder: Path, base: Path, trained: Path, flags: str) -> None:
    """How far the model moved from its base, and its accuracy with the whole update and with random halves of it."""
    before, after = (load_file(path / "model.safetensors") for path in (base, trained))
    moved = torch.cat([(after[name] - before[name]).abs().flatten() for name in before])
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    cfg = mifo.parse_config([*flags.split(), "--out", str(folder)])
    sampler = rollout.make_sampler(
        "torch",
        str(base),
        max_len=cfg.max_prompt + cfg.max_response,
        dtype=torch.float32,
        eos_ids=evaluation.eos_ids(str(base), tokenizer),
    )
    questions = evaluation.load_questions(cfg.evaluate, tokenizer, None, "")
    accuracy = []
    with evaluation.Checker() as checker:
        for seed in range(4):  # 0: all of it
            generator = torch.Generator().manual_seed(seed)
            keep = {
                name: torch.rand(w.shape, generator=generator) < (0.5 if seed else 1.0)
                for name, w in before.items()
            }
            sampler.push(
                (name, torch.where(keep[name], after[name], w)) for name, w in before.items()
            )
            rows = evaluation.evaluate(
                sampler,
                questions,
                checker,
                1,
                0.0,
                cfg.max_response,
                0,
                lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
            )
            accuracy.append(evaluation.summarize(rows)["avg"])
    folder.mkdir(parents=True, exist_ok=True)
    norm = torch.cat([w.flatten() for w in before.values()]).norm()
    (folder / "result.json").write_text(
        json.dumps(
            {
                "norm": (moved.norm() / norm).item(),
                "share": (moved > 1e-3).float().mean().item(),
                "whole": accuracy[0],
                "half": sum(accuracy[1:]) / 3,
            }
        )
    )
    (folder / "done").touch()


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
    """Does the jobs (folder, function, arguments after the folder) that are not done, one a core at a time."""
    waiting = [
        job
        for job in {job[0]: job for job in jobs}.values()
        if not (job[0] / "done").exists() and not (job[0] / "model.safetensors").exists()
    ]
    context, running = multiprocessing.get_context("forkserver"), {}
    context.set_forkserver_preload(["mifo", "countdown"])
    for _ in tqdm(
        range(len(waiting)), desc=label, unit="run", mininterval=0 if sys.stderr.isatty() else 60
    ):
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
                sys.exit(
                    f"experiment.py: {log}: exit code {process.exitcode}\n{log.read_text()[-2000:]}"
                )


# ---------------------------------------------------------------------------------------------------------------------
# The parts


def job(
    out: Path, task: str, part: str, method: str, rates: tuple, seed: int, setting: str = "", **more
) -> tuple:
    name = "-".join(
        filter(
            None,
            [
                method.split(" (ReL")[0].replace(" ", "_"),
                *(f"{rate:g}" for rate in rates if rate),
                setting.strip("-").replace(" ", "="),
                "dropped" * bool(more.get("drop")),
                str(seed),
            ],
        )
    )
    flags = f"{COMMON} {task_flags(out, task, seed)} {METHODS[method]} {setting} --seed {seed}"
    for flag, rate in zip(("--rl-lr", "--sft-lr"), rates):
        flags += f" {flag} {rate}" if rate else ""
    flags += " --eval-every 15" if part == "tune" else " --eval-every 5 --eval-sft-phases"
    return (
        out / task / part / name,
        train,
        flags,
        *((more.get("drop", 0), more.get("keep_model", False)) if more else ()),
    )


def row(
    task: str, part: str, method: str, rates: tuple, seed: int, setting: str, run: dict
) -> dict:
    numbers = {key: run.get(key) for key in NUMBERS}
    return {
        "task": task,
        "part": part,
        "method": method,
        "rl_lr": rates[0],
        "sft_lr": rates[1],
        "setting": setting,
        "seed": seed,
        **{
            key: round(value, 4) if isinstance(value, float) else value
            for key, value in numbers.items()
        },
        "levels": " ".join(
            f"{level}:{accuracy:.3f}" for level, accuracy in run.get("levels", {}).items()
        ),
    }


def tune(out: Path, task: str, rows: list[dict]) -> dict[str, tuple]:
    """The best learning rates (RL's, SFT's) of each method; None where it has no such phase.

    Along each axis all values are tried on the first of the tuning seeds, and the better two of them on the next. Only what is
    better replaces the middle one: many SFT rates end at an accuracy of 1, and the lowest of these would be a poor choice.
    """
    best = {
        method: (
            None if "--schedule sft " in flags else RL_LR[1],
            None if "--schedule rl" in flags else SFT_LR[2],
        )
        for method, flags in METHODS.items()
    }
    runs = {}

    def score(method: str, rates: tuple, seeds: tuple) -> float:
        return sum(
            run["final"] + (run["final"] if run["area"] is None else run["area"])
            for run in (runs[method, rates, seed] for seed in seeds)
        )

    for i, values in ((1, SFT_LR), (0, RL_LR)):
        left = {
            method: list(
                dict.fromkeys(
                    [rates, *((*rates[:i], value, *rates[i + 1 :]) for value in values if rates[i])]
                )
            )
            for method, rates in best.items()
        }
        for n, seed in enumerate(TUNING_SEEDS[task], 1):
            jobs = {
                (method, rates, seed): job(out, task, "tune", method, rates, seed)
                for method in METHODS
                for rates in left[method]
            }
            work(
                list(jobs.values()),
                f"{task}: tuning {('RL', 'SFT')[i]}'s learning rate, seed {seed}",
            )
            runs |= {key: evaluation.read_run(folder) for key, (folder, *_) in jobs.items()}
            left = {
                method: sorted(
                    tried,
                    key=lambda rates: score(method, rates, TUNING_SEEDS[task][:n]),
                    reverse=True,
                )[:2]
                for method, tried in left.items()
            }
        best = {method: tried[0] for method, tried in left.items()}
    rows += [
        row(task, "tune", method, rates, seed, "", run)
        for (method, rates, seed), run in sorted(runs.items(), key=str)
    ]
    return best


def groups_of(
    out: Path, task: str, part: str, cells: dict[str, tuple], seeds: tuple, rows: list[dict]
) -> dict[str, list]:
    """Runs {name: (method, rates, setting)} on all seeds; their measures (read_run) by name."""
    jobs = {
        (name, seed): job(out, task, part, method, rates, seed, setting)
        for seed in seeds
        for name, (method, rates, setting) in cells.items()
    }
    work(list(jobs.values()), f"{task}: {part}")
    groups = {}
    for name, (method, rates, setting) in cells.items():
        groups[name] = [evaluation.read_run(jobs[name, seed][0]) for seed in seeds]
        rows += [
            row(task, part, method, rates, seed, setting, run)
            for seed, run in zip(seeds, groups[name])
        ]
    return groups


def analyse(out: Path, task: str, best: dict[str, tuple], rows: list[dict]) -> str:
    """The paper's analyses of update size and redundancy, and of overlap, as Markdown."""
    lines = [
        "| | change of the weights, relative | share moved by over 0.001 | accuracy | half of each gradient dropped | "
        "half of the update dropped |",
        "| --- " * 6 + "|",
    ]
    for method in ("SFT", "GRPO"):
        whole, dropped = (
            [
                job(
                    out,
                    task,
                    "analyse",
                    method,
                    best[method],
                    seed,
                    keep_model=True,
                    drop=drop and seed,
                )
                for seed in SEEDS
            ]
            for drop in (False, True)
        )
        work([*whole, *dropped], f"{task}: {method}")
        halves = [
            (
                folder.with_name(folder.name + "-half"),
                drop_update,
                base_folder(out, task, seed),
                folder / "model",
                flags,
            )
            for (folder, _, flags, *_), seed in zip(whole, SEEDS)
        ]
        work(halves, f"{task}: half of {method}'s update")
        found = [json.loads((folder / "result.json").read_text()) for folder, *_ in halves]
        drops = [evaluation.read_run(folder) for folder, *_ in dropped]
        cells = [[f[key] for f in found] for key in ("norm", "share", "whole")]
        cells += [[run["final"] for run in drops], [f["half"] for f in found]]
        lines.append(f"| {method} | " + " | ".join(show(cell) for cell in cells) + " |")
        settings = {
            "": [evaluation.read_run(folder) for folder, *_ in whole],
            "half of each gradient dropped": drops,
            "half of the update dropped": [{"final": f["half"]} for f in found],
        }
        rows += [
            row(task, "analyse", method, best[method], seed, setting, run)
            for setting, runs in settings.items()
            for seed, run in zip(SEEDS, runs)
        ]
    plain, means = "MIFO without both (ReLIFT's scheme)", []
    for seed in SEEDS:
        phases = json.loads(
            (job(out, task, "final", plain, best[plain], seed)[0] / "overlap.json").read_text()
        )
        means += (
            [[sum(phase[key] for phase in phases) / len(phases) for key in ("movement", "top")]]
            if phases
            else []
        )
    if means:
        movement, top = (show(list(column)) for column in zip(*means))
        lines += [
            "",
            f"{plain}: of SFT's movement {movement}, and of the half that it moves most {top}, lie in the half that "
            f"the RL phase before it moved most (0.5 if unrelated); {len(means)} runs.",
        ]
    return "\n".join(lines)


def paired(groups: dict[str, list[dict]]) -> str:
    """Each method less MIFO on the same seed, and so from the same base model, as Markdown: mean ± half the 95 % interval."""
    lines = [
        "| less MIFO | accuracy at the end | mean accuracy over the RL steps |",
        "| --- | --- | --- |",
    ]
    for name, runs in groups.items():
        cells = [
            [
                run[key] - other[key]
                for run, other in zip(runs, groups["MIFO"])
                if run[key] is not None
            ]
            for key in ("final", "area")
        ]
        lines += [
            f"| {name} | " + " | ".join(show(cell) if cell else "" for cell in cells) + " |"
        ] * (name != "MIFO")
    return "\n".join(lines)


def show(values: list[float]) -> str:
    return "{:.3f} ± {:.3f}".format(*evaluation.interval(values))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/experiment"))
    parser.add_argument(
        "--parts",
        default="tune,final,sweep,analyse",
        help="the first is always done; the last two need final",
    )
    parser.add_argument("--tasks", default="chain,countdown")
    args = parser.parse_args()
    rows, text = [], []
    for task in args.tasks.split(","):
        seeds = (*TUNING_SEEDS[task], *SEEDS)
        work(
            [(base_folder(args.out, task, seed), make_base, task, seed) for seed in seeds],
            f"{task}: base models",
        )
        for part, seed in itertools.product(
            ("tune", "final", "sweep", "analyse"), seeds if task == "chain" else ()
        ):
            link = args.out / task / part / f"embedded-base-{seed}"  # where mifo.py looks for it
            link.parent.mkdir(exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(Path("..") / f"base-{seed}")
        best = tune(args.out, task, rows)
        text += [
            f"\n## {task}\n",
            "| method | RL learning rate | SFT learning rate |",
            "| --- | --- | --- |",
            *(
                f"| {method} | {best[method][0] or ''} | {best[method][1] or ''} |"
                for method in METHODS
            ),
        ]
        if "final" in args.parts:
            groups = groups_of(
                args.out, task, "final", {m: (m, best[m], "") for m in METHODS}, SEEDS, rows
            )
            text += ["", evaluation.comparison(groups), "", paired(groups)]
            evaluation.draw_comparison(groups, ROOT / "assets" / f"experiment-{task}.png", task)
        if "sweep" in args.parts and "final" in args.parts:
            cells = {
                f"{name} {value:g}": ("MIFO", best["MIFO"], f"--{name.replace('_', '-')} {value:g}")
                for name, values in SWEEPS.items()
                for value in values
            }
            swept = groups_of(args.out, task, "sweep", cells, SWEEP_SEEDS, rows)
            text += [
                "",
                evaluation.comparison({"MIFO": groups["MIFO"][: len(SWEEP_SEEDS)], **swept}),
            ]
        if "analyse" in args.parts and "final" in args.parts:
            text += ["", analyse(args.out, task, best, rows)]
        with open(Path(__file__).with_suffix(".csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        print(*text, sep="\n", flush=True)
        text = []


if __name__ == "__main__":
    main()
