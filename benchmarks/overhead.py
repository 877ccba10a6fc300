"""Where the wall time of the default run's loop goes: what is not sampling, training, evaluating.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py [--out FOLDER] [more flags of mifo.py]

Starting up is outside the loop, and printed by itself, each of its parts with its seconds; beside
them the evaluation before the first step, which is in the loop. The loop ends when all is written
and drawn.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

BEGUN = time.perf_counter()
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import step  # noqa: E402

WORK = ("sample", "rl", "sft", "evaluate")
STARTING = {  # function of the start-up -> what it does
    "parse_config": "flags and recipe are read and checked",
    "open_model": "the base model is made or found, and its tokenizer read",
    "load_data": "questions and benchmarks are made, their answers checked",
    "load_policy": "the weights are read and sharded",
    "make_sampler": "vLLM is imported and the engine built",
}


def timed(module, name: str, seconds: dict[str, float]) -> None:
    """From now on seconds[name] sums up what the module's function takes."""
    function = getattr(module, name)
    seconds[name] = 0.0

    def watched(*args, **more):
        begun = time.perf_counter()
        try:
            return function(*args, **more)
        finally:
            seconds[name] += time.perf_counter() - begun

    setattr(module, name, watched)


def main() -> None:
    if "--help" in sys.argv:
        sys.exit(__doc__)
    if "--out" not in sys.argv:
        sys.argv += ["--out", f"{tempfile.mkdtemp()}/run"]
    os.environ.update(step.ALONE)
    import mifo
    import rollout

    starting = {"imports": time.perf_counter() - BEGUN}
    for name in STARTING:
        timed(rollout if name == "make_sampler" else mifo, name, starting)
    train, rl_step, start, first, seconds = mifo.train, mifo.rl_step, 0.0, 0.0, {}
    timed(mifo.pictures, "draw", seconds)

    def timed_train(run):
        nonlocal start
        start = time.perf_counter()
        stop = train(run)
        seconds.update(run.state.seconds)
        return stop

    def first_step(run):
        nonlocal first
        first = time.perf_counter()
        mifo.rl_step = rl_step
        rl_step(run)

    mifo.train, mifo.rl_step = timed_train, first_step
    if code := mifo.main():
        os._exit(code)
    loop = time.perf_counter() - start
    seconds.pop("all")  # what run.state.seconds says of the whole steps
    seconds["rest"] = loop - sum(seconds.values())
    starting["rest"] = start - BEGUN - sum(starting.values())
    starting["evaluation"] = first - start
    print(
        f"\nstart-up {start - BEGUN:.1f} s, first step after {first - BEGUN:.1f} s, loop {loop:.1f} s"
    )
    for name, value in starting.items():
        print(f"{name:13}{value:6.2f} s  {STARTING.get(name, '')}".rstrip())
    for name, value in sorted(seconds.items(), key=lambda item: (item[0] not in WORK, -item[1])):
        print(f"{name:10}{value:8.2f} s{value / loop:8.1%}{'' if name in WORK else '  overhead'}")
    work = sum(seconds.get(name, 0.0) for name in WORK)
    print(f"overhead  {loop - work:8.2f} s{1 - work / loop:8.1%}  target: at most 5 %")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
