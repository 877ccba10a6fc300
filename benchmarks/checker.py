"""Answers a second that one worker checks: python benchmarks/checker.py MATH500.jsonl (rows with an `answer`).

Ordinary: each gold answer boxed, another question's gold answer boxed, and the answer rewritten so that no string
comparison can settle it. Hostile: one in a hundred of them never ends and costs the limit.
"""
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import eval as evaluation

golds = [json.loads(line)["answer"] for line in Path(sys.argv[1]).open()]
others = golds[1:] + golds[:1]
groups = {"right": golds, "wrong": others, "rewritten": [f"0 + {gold}" for gold in golds]}
groups["ordinary mix"] = [answers[i] for i in range(len(golds)) for answers in groups.values()]
hostile = r"10^{10^{9}}"
groups["1 % hostile"] = [hostile if i % 100 == 99 else a for i, a in enumerate(groups["ordinary mix"])]
with evaluation.Checker(workers=1, limit=5.0) as checker:
    checker.check([r"\boxed{x+1}"], ["x+2"], ["math"])  # starts the worker
    for name, answers in groups.items():
        gold = [g for g in golds for _ in range(len(answers) // len(golds))]
        start = time.perf_counter()
        responses = [f"So the answer is $\\boxed{{{a}}}$." for a in answers]
        verdicts = checker.check(responses, gold, ["math"] * len(answers))
        seconds = time.perf_counter() - start
        counts = {v: verdicts.count(v) for v in evaluation.VERDICTS if v in verdicts}
        print(f"{name:>13}: {len(answers) / seconds:7.0f} answers/s  {counts}")
