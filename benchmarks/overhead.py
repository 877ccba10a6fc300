"""Where the wall time of the default run's loop goes: all that is neither sampling, forward and backward, nor evaluation.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py [--out FOLDER] [--steps 60] [more flags of mifo.py]

Starting up (imports, the base model, the engine) is outside the loop, and printed by itself.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

BEGUN = time.perf_counter()
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import step

WORK = ("sample", "rl", "sft", "evaluate")


def main() -> None:
    os.environ.update(step.ALONE)
    import mifo

    seconds, train, plot = {}, mifo.train, mifo.plot

    def timed(name: str, call):
        def wrapped(*args):
            start = time.perf_counter()
            call(*args)
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

        return wrapped

    def loop(run):
        seconds["start"] = time.perf_counter() - BEGUN
        timed("loop", train)(run)
        seconds.update(run.state.seconds)

    mifo.train, mifo.plot = loop, timed("plot", plot)
    if "--help" in sys.argv:
        sys.exit(__doc__)
    if "--out" not in sys.argv:
        sys.argv += ["--out", f"{tempfile.mkdtemp()}/run"]
    mifo.main()
    loop, start = seconds.pop("loop"), seconds.pop("start")
    seconds.pop("all")
    seconds["rest"] = loop - sum(seconds.values())
    print(f"\nstart-up {start:.1f} s, loop {loop:.1f} s")
    for name, value in sorted(seconds.items(), key=lambda item: (item[0] not in WORK, -item[1])):
        print(f"{name:10}{value:8.2f} s{value / loop:8.1%}{'' if name in WORK else '  overhead'}")
    share = 1 - sum(seconds.get(name, 0.0) for name in WORK) / loop
    print(f"overhead  {share * loop:8.2f} s{share:8.1%}  target: at most 5 %")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
