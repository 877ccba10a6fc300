"""Where the wall time of the default run's loop goes: what is not sampling, training, evaluating.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py [--out FOLDER] [more flags of mifo.py]

Starting up (imports, the base model, the engine) is outside the loop, and printed by itself. The
loop ends when all is written and drawn.
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


def main() -> None:
    if "--help" in sys.argv:
        sys.exit(__doc__)
    if "--out" not in sys.argv:
        sys.argv += ["--out", f"{tempfile.mkdtemp()}/run"]
    os.environ.update(step.ALONE)
    import mifo

    train, draw = mifo.train, mifo.pictures.draw
    start, seconds = 0.0, {"draw": 0.0}

    def timed_train(run):
        nonlocal start
        start = time.perf_counter()
        stop = train(run)
        seconds.update(run.state.seconds)
        return stop

    def timed_draw(*args):
        begun = time.perf_counter()
        draw(*args)
        seconds["draw"] += time.perf_counter() - begun

    mifo.train, mifo.pictures.draw = timed_train, timed_draw
    if code := mifo.main():
        os._exit(code)
    loop = time.perf_counter() - start
    seconds.pop("all")  # what run.state.seconds says of the whole steps
    seconds["rest"] = loop - sum(seconds.values())
    print(f"\nstart-up {start - BEGUN:.1f} s, loop {loop:.1f} s")
    for name, value in sorted(seconds.items(), key=lambda item: (item[0] not in WORK, -item[1])):
        print(f"{name:10}{value:8.2f} s{value / loop:8.1%}{'' if name in WORK else '  overhead'}")
    work = sum(seconds.get(name, 0.0) for name in WORK)
    print(f"overhead  {loop - work:8.2f} s{1 - work / loop:8.1%}  target: at most 5 %")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
