"""Answers a second that one worker checks.

    python benchmarks/checker.py MATH500.jsonl      # rows with an `answer`

Ordinary: each gold answer boxed, other questions' gold answers boxed, and the answer rewritten so
that no string comparison can tell. Hostile: one in a hundred of them comes from faults_checker.py.
Every line has a fresh worker.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval as evaluation
from faults_checker import hostile_answers

golds = [json.loads(line)["answer"] for line in Path(sys.argv[1]).open()]
wrong = [golds[i:] + golds[:i] for i in (1, 2, 3, 4)]
groups = {"right": golds, "wrong": wrong[0], "rewritten": [f"0 + {gold}" for gold in golds]}
mix = []
for answers in zip(*groups.values(), *wrong[1:]):
    mix += answers
groups["ordinary mix"] = mix
groups["1 % hostile"] = mix.copy()
hostile, share = hostile_answers(), len(mix) // 100
for i in range(share):
    groups["1 % hostile"][100 * i + 99] = hostile[i * len(hostile) // share]
for name, answers in groups.items():
    gold = [g for g in golds for _ in range(len(answers) // len(golds))]
    responses = [f"So the answer is $\\boxed{{{a}}}$." for a in answers]
    with evaluation.Checker() as checker:
        checker.check([r"\boxed{x+1}"], ["x+2"], ["math"])  # starts the worker
        start = time.perf_counter()
        verdicts = checker.check(responses, gold, ["math"] * len(answers))
        seconds = time.perf_counter() - start
    counts = {v: verdicts.count(v) for v in evaluation.VERDICTS if v in verdicts}
    print(f"{name:>13}: {len(answers) / seconds:7.0f} answers/s  {counts}", flush=True)
