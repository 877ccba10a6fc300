"""Faults brought about on purpose in runs of the embedded task, and what became of the runs.

python benchmarks/faults.py                       # all of it, and hostile answers (faults_checker.py)
python benchmarks/faults.py kill [--kills 30]     # kill -9 at random moments; each run is resumed and compared bit for bit
python benchmarks/faults.py long [--steps 2000]   # two long runs of one seed at once: memory, time a step, files, equality
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil  # vllm needs it too

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SMALL = (
    "--questions 8 --samples 4 --steps 10 --buffer-size 6 --sft-batch 4 --sft-epochs 1 --eval-every 3 --save-every 4 "
    "--max-num-seqs 64 --kv-cache-gib 0.1"
).split()
PLACES = {  # where: between which of the calls made there it happens, and at most how many seconds after the call
    "sampling": (8, 20, 0.3),
    "optimizer step": (4, 9, 0.01),
    "SFT step": (2, 4, 0.1),
    "checkpoint": (2, 3, 0.1),
    "evaluation": (2, 4, 0.2),
    "metrics": (4, 9, 0.002),
}


def child(place: str, call: int, delay: float, rank: int, whole: bool, argv: list[str]) -> None:
    """mifo.py's main(); at the call-th time that `rank` comes to `place`, and `delay` seconds later, it is killed."""
    import mifo
    import rollout

    owner, name = {
        "sampling": (
            getattr(rollout, "VLLMSampler" if "vllm" in argv else "TorchSampler"),
            "sample",
        ),
        "optimizer step": (mifo, "optimizer_step"),
        "SFT step": (mifo, "sft_step"),
        "metrics": (mifo.Progress, "step"),
        "checkpoint": (mifo, "save_checkpoint"),
        "evaluation": (mifo, "evaluate"),
    }[place]
    real, calls = getattr(owner, name), [0]

    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call and int(os.environ["RANK"]) == rank:
            # the launcher's death is that of all its ranks
            threading.Timer(
                delay, os.kill, (os.getppid() if whole else os.getpid(), signal.SIGKILL)
            ).start()
        return real(*args, **kwargs)

    setattr(owner, name, counted)
    sys.argv = ["mifo.py", *argv]
    mifo.main()
    sys.stdout.flush()
    os._exit(0)


def launch(
    out: Path, world: int, sampler: str, *more, fault: list | None = None
) -> subprocess.Popen:
    flags = ["--out", str(out), "--sampler", sampler, *map(str, more)]
    command = [str(ROOT / "mifo.py")] if fault is None else [__file__, "child", *map(str, fault)]
    with open(out.with_suffix(".log"), "a") as log:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(world),
                *command,
                *flags,
            ],
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def finish(process: subprocess.Popen, out: Path) -> None:
    if process.wait(600):
        sys.exit(
            f"{out}: exit code {process.returncode}\n" + out.with_suffix(".log").read_text()[-2000:]
        )


def result(out: Path) -> dict:
    """Everything that a run leaves and that the clock does not decide."""

    def clean(item):
        return {key: value for key, value in item.items() if "seconds" not in key}

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), (
        f"{out}: a step is missing or there twice"
    )
    last = sorted((out / "checkpoints").glob("step-*"))[-1]
    sums = [
        line
        for line in (last / "SHA256SUMS").read_text().splitlines()
        if not line.endswith("state.json")
    ]
    return {
        "metrics": [clean(line) for line in lines],
        "samples": (out / "samples.jsonl").read_text(),
        "sums": sorted(sums),
        "state": clean(json.loads((last / "state.json").read_text())["state"]),
    }


def kill(folder: Path, kills: int, seed: int) -> None:
    rng, whole_runs, asked = random.Random(seed), {}, folder / "questions.jsonl"
    asked.write_text(
        "".join(
            json.dumps({"question": f"{i}+{i}", "answer": str(2 * i)}) + "\n" for i in range(10, 42)
        )
    )
    flags = [*SMALL, "--evaluate", asked]
    print(
        f"{'killed in':15} {'who':10} {'sampler':8} ranks  at step  resumed from  bit-identical",
        flush=True,
    )
    for i in range(kills):
        sampler, world = ("vllm", 1) if i % 3 == 2 else ("torch", 2)
        if (sampler, world) not in whole_runs:
            out = folder / f"whole-{sampler}-{world}"
            finish(launch(out, world, sampler, *flags), out)
            whole_runs[sampler, world] = result(out)
        place, everyone, out = (
            list(PLACES)[i % len(PLACES)],
            rng.random() < 0.5,
            folder / f"killed-{i:02d}",
        )
        first, last, most = PLACES[place]
        fault = [
            place,
            rng.randint(first, last),
            rng.uniform(0, most),
            rng.randrange(world),
            int(everyone),
        ]
        process = launch(out, world, sampler, *flags, fault=fault)
        family = psutil.Process(process.pid).children(recursive=True)
        code = process.wait(300)
        psutil.wait_procs(family, 60)
        if not code:
            sys.exit(f"{out}: was not killed: {fault}")
        steps = (
            (out / "metrics.jsonl").read_text().count("\n")
            if (out / "metrics.jsonl").exists()
            else 0
        )
        kept = sorted((out / "checkpoints").glob("step-*[0-9]"))
        if not kept:  # killed before the first checkpoint: there is nothing to resume, and the run begins anew
            shutil.rmtree(out)
        finish(launch(out, world, sampler, *flags, *["--resume"] * bool(kept)), out)
        same = result(out) == whole_runs[sampler, world]
        print(
            f"{place:15} {'all ranks' if everyone else 'one rank':10} {sampler:8} {world:5} {steps:8}  "
            f"{kept[-1].name if kept else 'the start':13} {'yes' if same else 'NO'}",
            flush=True,
        )
        if not same:
            sys.exit(f"{out} differs from the uninterrupted run")
        shutil.rmtree(out)


def long(folder: Path, steps: int) -> None:
    """Two runs of one seed at the same time."""
    flags = (
        f"--steps {steps} --questions 4 --samples 4 --max-response 40 --buffer-size 16 --sft-batch 4 --sft-epochs 1 "
        f"--evaluate= --eval-every 0 --save-every {steps // 4} --max-num-seqs 16"
    ).split()
    outs = [folder / "long-a", folder / "long-b"]
    processes = [launch(out, 1, "torch", *flags) for out in outs]
    memory = {out: [] for out in outs}  # (steps done, MiB of all its processes)
    while any(process.poll() is None for process in processes):
        for out, process in zip(outs, processes):
            if process.poll() is None and (out / "metrics.jsonl").exists():
                try:
                    family = [
                        psutil.Process(process.pid),
                        *psutil.Process(process.pid).children(recursive=True),
                    ]
                    size = sum(p.memory_info().rss for p in family) / 2**20
                except psutil.NoSuchProcess:
                    continue
                memory[out].append(((out / "metrics.jsonl").read_text().count("\n"), size))
        time.sleep(2)
    for out, process in zip(outs, processes):
        finish(process, out)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        rl = [
            sum(v for k, v in line.items() if k.startswith("seconds/"))
            for line in lines
            if line["phase"] == "rl"
        ]
        quarter, end = len(rl) // 4, lines[-1]["step"]
        early = statistics.median(size for step, size in memory[out] if end / 4 <= step < end / 2)
        late = statistics.median(size for step, size in memory[out] if step >= 3 * end / 4)
        print(
            f"{out.name}: {len(rl)} RL steps, {len(lines) - len(rl)} SFT steps; memory in the second quarter {early:.0f} MiB, in "
            f"the last {late:.0f} MiB ({late / early - 1:+.2%}); median RL step in the second quarter "
            f"{statistics.median(rl[quarter : 2 * quarter]):.3f} s, in the last {statistics.median(rl[-quarter:]):.3f} s"
        )
        sizes = {
            str(p.relative_to(out)): p.stat().st_size
            for p in out.rglob("*")
            if p.is_file() and not p.is_symlink()
        }
        shards = [
            [size for name, size in sizes.items() if name.startswith(f"checkpoints/{c.name}/")]
            for c in sorted((out / "checkpoints").glob("step-*"))
        ]
        print(
            f"  bytes of its checkpoints, oldest first: {', '.join(str(sum(s)) for s in shards)}; logs: "
            + ", ".join(
                f"{name} {size}"
                for name, size in sorted(sizes.items())
                if re.fullmatch(r"\w+\.jsonl", name)
            )
        )
    print(f"the two are bit-identical: {'yes' if result(outs[0]) == result(outs[1]) else 'NO'}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("kill", "long", "all"), default="all")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "runs" / "faults",
        help="folder; emptied but for the base model",
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for path in args.out.iterdir():
        if path.is_dir() and not path.name.startswith("embedded-base"):
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()
    if args.what in ("kill", "all"):
        kill(args.out, args.kills, args.seed)
    if args.what in ("long", "all"):
        long(args.out, args.steps)
    if args.what == "all":
        subprocess.run([sys.executable, Path(__file__).with_name("faults_checker.py")], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        place, call, delay, rank, whole, *argv = sys.argv[2:]
        child(place, int(call), float(delay), int(rank), bool(int(whole)), argv)
    main()
