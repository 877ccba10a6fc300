"""Faults brought about on purpose in runs of the embedded task, and what became of the runs.

python benchmarks/faults.py                      # all of it, and hostile answers afterwards
python benchmarks/faults.py kill [--kills 30]    # kill -9 at random moments, resumed, bit for bit
python benchmarks/faults.py long [--steps 2000]  # two long runs of one seed at once: memory, time
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import astuple, dataclass
from pathlib import Path

import psutil  # vllm needs it too
import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SMALL = (
    "--questions 8 --samples 4 --steps 10 --buffer-size 6 --sft-batch 4 --sft-epochs 1 "
    "--eval-every 3 --save-every 4 --max-num-seqs 64 --kv-cache-gib 0.1"
).split()
LONG = (
    "--questions 4 --samples 4 --max-response 40 --buffer-size 16 --sft-batch 4 --sft-epochs 1 "
    "--evaluate= --eval-every 0 --max-num-seqs 16"
).split()
# fmt: off
PLACES = {  # where: between which of its calls, and at most how many seconds after the call
    "sampling":       (8, 20, 0.3),
    "optimizer step": (4, 9,  0.01),
    "SFT step":       (2, 4,  0.1),
    "checkpoint":     (2, 3,  0.1),
    "evaluation":     (2, 4,  0.2),
    "metrics":        (4, 9,  0.002),
}
# fmt: on


@dataclass
class Fault:
    """A kill at the call-th time that a rank comes to a place, `delay` seconds later."""

    place: str
    call: int
    delay: float
    rank: int
    whole: int  # 1: all ranks die, with their launcher; 0: this one alone

    @classmethod
    def read(cls, texts: list[str]) -> "Fault":
        place, call, delay, rank, whole = texts
        return cls(
            place=place, call=int(call), delay=float(delay), rank=int(rank), whole=int(whole)
        )


def child(fault: Fault, argv: list[str]) -> None:
    """mifo.py's main(), with the fault in it."""
    import mifo
    import rollout

    sampler = rollout.VLLMSampler if "vllm" in argv else rollout.TorchSampler
    owner, name = {
        "sampling": (sampler, "sample"),
        "optimizer step": (mifo, "optimizer_step"),
        "SFT step": (mifo, "sft_step"),
        "metrics": (mifo, "log_step"),
        "checkpoint": (mifo, "save_checkpoint"),
        "evaluation": (mifo, "evaluate"),
    }[fault.place]
    real, calls = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == fault.call and int(os.environ["RANK"]) == fault.rank:
            victim = os.getppid() if fault.whole else os.getpid()
            threading.Timer(fault.delay, os.kill, (victim, signal.SIGKILL)).start()
        return real(*args, **kwargs)

    setattr(owner, name, counted)
    sys.argv = ["mifo.py", *argv]
    code = mifo.main()
    sys.stdout.flush()
    os._exit(code)


# --------------------------------------------------------------------------------------------------
# Runs


def launch(out: Path, world: int, sampler: str, *more, fault: Fault | None = None):
    """The process of torchrun; what it prints goes to out.log."""
    command = [str(ROOT / "mifo.py")]
    if fault is not None:
        command = [__file__, "child", *map(str, astuple(fault))]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    flags = ["--out", str(out), "--sampler", sampler, *map(str, more)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(out.with_suffix(".log"), "a") as log:
        return subprocess.Popen(
            [sys.executable, *torchrun, *command, *flags], stdout=log, stderr=log, env=env
        )


def finish(process: subprocess.Popen, out: Path) -> None:
    if process.wait(600):
        log = out.with_suffix(".log").read_text()
        sys.exit(f"{out}: exit code {process.returncode}\n{log[-2000:]}")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def count_steps(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def checkpoints(out: Path) -> list[Path]:
    """The complete ones, oldest first."""
    return sorted((out / "checkpoints").glob("step-*[0-9]"))


def result(out: Path) -> dict:
    """Everything that a run leaves and that the clock does not decide; tensors bit for bit."""

    def clean(item: dict) -> dict:
        return {key: value for key, value in item.items() if "seconds" not in key}

    lines = read_lines(out / "metrics.jsonl")
    steps = list(range(1, len(lines) + 1))
    assert [line["step"] for line in lines] == steps, f"{out}: a step is missing or there twice"
    last = checkpoints(out)[-1]
    tensors = {}
    for path in [*last.glob("state/*.safetensors"), *last.glob("model/*.safetensors")]:
        with safe_open(path, "pt") as file:  # tensors may come in another order in the file
            for name in file.keys():
                values = file.get_tensor(name).contiguous().view(-1).view(torch.uint8)
                tensors[f"{path.name}/{name}"] = hashlib.sha256(
                    values.numpy().tobytes()
                ).hexdigest()
    assert len({name.split("/")[0] for name in tensors}) > 1, f"{last}: state/ or model/ is empty"
    return {
        "metrics": [clean(line) for line in lines],
        "samples": (out / "samples.jsonl").read_text(),
        "tensors": tensors,
        "state": clean(json.loads((last / "state.json").read_text())["state"]),
    }


# --------------------------------------------------------------------------------------------------
# kill -9 at random moments


def kill(folder: Path, kills: int, seed: int) -> None:
    questions = folder / "questions.jsonl"
    rows = [{"question": f"{i}+{i}", "answer": str(2 * i)} for i in range(10, 42)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [*SMALL, "--evaluate", questions]
    rng, whole_runs = random.Random(seed), {}
    head = f"{'killed in':15} {'who':10} {'sampler':8} ranks  at step  resumed from  bit-identical"
    print(head, flush=True)
    for i in range(kills):
        sampler, world = ("vllm", 1) if i % 3 == 2 else ("torch", 2)
        if (sampler, world) not in whole_runs:
            out = folder / f"whole-{sampler}-{world}"
            finish(launch(out, world, sampler, *flags), out)
            whole_runs[sampler, world] = result(out)
        whole = rng.random() < 0.5
        place = list(PLACES)[i % len(PLACES)]
        first, last, longest = PLACES[place]
        fault = Fault(
            place=place,
            call=rng.randint(first, last),
            delay=rng.uniform(0, longest),
            rank=rng.randrange(world),
            whole=int(whole),
        )
        out = folder / f"killed-{i:02d}"
        run_into(fault, out, world, sampler, flags)
        steps, kept = count_steps(out), checkpoints(out)
        if kept:
            finish(launch(out, world, sampler, *flags, "--resume"), out)
        else:  # killed before the first checkpoint: there is nothing to resume
            shutil.rmtree(out)
            finish(launch(out, world, sampler, *flags), out)
        same = result(out) == whole_runs[sampler, world]
        who, source = "all ranks" if whole else "one rank", kept[-1].name if kept else "the start"
        print(
            f"{place:15} {who:10} {sampler:8} {world:5} {steps:8}  {source:13} "
            f"{'yes' if same else 'NO'}",
            flush=True,
        )
        if not same:
            sys.exit(f"{out} differs from the uninterrupted run")
        shutil.rmtree(out)


def run_into(fault: Fault, out: Path, world: int, sampler: str, flags: list) -> None:
    """Starts a run and waits until the fault has ended it and all its processes."""
    process = launch(out, world, sampler, *flags, fault=fault)
    family = psutil.Process(process.pid).children(recursive=True)
    code = process.wait(300)
    psutil.wait_procs(family, 60)
    if not code:
        sys.exit(f"{out}: was not killed: {fault}")


# --------------------------------------------------------------------------------------------------
# Two long runs


def long(folder: Path, steps: int) -> None:
    """Two runs of one seed at the same time."""
    flags = [*LONG, "--steps", steps, "--save-every", steps // 4]
    outs = [folder / "long-a", folder / "long-b"]
    processes = [launch(out, 1, "torch", *flags) for out in outs]
    memory = {out: [] for out in outs}  # (steps done, MiB of all its processes)
    while any(process.poll() is None for process in processes):
        for out, process in zip(outs, processes):
            mebibytes = resident(process)
            if mebibytes and (out / "metrics.jsonl").exists():
                memory[out].append((count_steps(out), mebibytes))
        time.sleep(2)
    for out, process in zip(outs, processes):
        finish(process, out)
        report_growth(out, memory[out])
        report_sizes(out)
    same = result(outs[0]) == result(outs[1])
    print(f"the two are bit-identical: {'yes' if same else 'NO'}")


def resident(process: subprocess.Popen) -> float:
    """MiB of the process and all below it; 0 once it has ended."""
    if process.poll() is not None:
        return 0.0
    try:
        parent = psutil.Process(process.pid)
        family = [parent, *parent.children(recursive=True)]
        return sum(one.memory_info().rss for one in family) / 2**20
    except psutil.NoSuchProcess:
        return 0.0


def report_growth(out: Path, memory: list[tuple]) -> None:
    """Memory and time of an RL step, in the second quarter of the run and in the last."""
    lines = read_lines(out / "metrics.jsonl")
    seconds = []  # of each RL step
    for line in lines:
        if line["phase"] == "rl":
            seconds.append(sum(v for key, v in line.items() if key.startswith("seconds/")))
    end, quarter = lines[-1]["step"], len(seconds) // 4
    early = statistics.median(size for step, size in memory if end / 4 <= step < end / 2)
    late = statistics.median(size for step, size in memory if step >= 3 * end / 4)
    before = statistics.median(seconds[quarter : 2 * quarter])
    after = statistics.median(seconds[-quarter:])
    print(f"{out.name}: {len(seconds)} RL steps, {len(lines) - len(seconds)} SFT steps")
    print(f"  memory {early:.0f} MiB, at the end {late:.0f} MiB ({late / early - 1:+.2%})")
    print(f"  median RL step {before:.3f} s, at the end {after:.3f} s")


def report_sizes(out: Path) -> None:
    totals = []
    for folder in checkpoints(out):
        totals.append(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    logs = [f"{path.name} {path.stat().st_size}" for path in sorted(out.glob("*.jsonl"))]
    print(f"  bytes of its checkpoints, oldest first: {', '.join(map(str, totals))}")
    print(f"  bytes of its logs: {', '.join(logs)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("kill", "long", "all"), default="all")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    folder = ROOT / "runs" / "faults"
    parser.add_argument("--out", type=Path, default=folder, help="emptied but for the base model")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for path in args.out.iterdir():
        if path.is_file():
            path.unlink()
        elif not path.name.startswith("sums-base"):
            shutil.rmtree(path)
    if args.what in ("kill", "all"):
        kill(args.out, args.kills, args.seed)
    if args.what in ("long", "all"):
        long(args.out, args.steps)
    if args.what == "all":
        subprocess.run([sys.executable, Path(__file__).with_name("faults_checker.py")], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(Fault.read(sys.argv[2:7]), sys.argv[7:])
    main()
