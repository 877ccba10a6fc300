"""Countdown in the small, experiment.py's second task: reach a target with each of some numbers.

    python benchmarks/countdown.py FOLDER [--seed 0]

Each number is used once, with + or -. Makes FOLDER/base-SEED, a model of 0.5 M parameters, and
FOLDER/train.jsonl and FOLDER/eval.jsonl, for mifo.py's --model, --data and --evaluate. Many
expressions reach a target, so an answer is checked by its value, not compared with a gold one.

    question           7,6,3,2=8?
    base's style       [7+6-3-2]
    expert's style     <7+6=13><13+3=16><16+2=18><18-8=2*5><5=3+2>[7+6-3-2]

The expert adds all numbers, halves what that is too much, and finds numbers with this sum to
subtract. The base model has read right answers in either style for two to four numbers, and for
five and six expressions that miss the target.
"""

import argparse
import functools
import itertools
import json
import math
import os
import random
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import transformers

BASE_NUMBERS, WRONG_NUMBERS, NUMBERS = (2, 3, 4), (5, 6), (4, 5, 6)
BASE_STEPS, EXPERT_SHARE, WRONG_SHARE, TARGETS = 1600, 0.5, 0.15, range(1, 100)
TRAIN, EVAL = 5000, 300  # questions


def value(numbers: list[int], signs: tuple[int, ...]) -> int:
    return numbers[0] + sum(sign * number for sign, number in zip(signs, numbers[1:]))


def answer(numbers: list[int], signs: tuple[int, ...], expert: bool) -> str:
    """The worked answer with these signs before all numbers but the first, in one of the styles."""
    expression = str(numbers[0])
    for sign, number in zip(signs, numbers[1:]):
        expression += f"{'+' if sign > 0 else '-'}{number}"
    if not expert:
        return f"[{expression}]"
    total, work = numbers[0], ""
    for number in numbers[1:]:
        work += f"<{total}+{number}={total + number}>"
        total += number
    target = value(numbers, signs)
    half = (total - target) // 2
    subtracted = "+".join(str(n) for sign, n in zip(signs, numbers[1:]) if sign < 0) or "0"
    return f"{work}<{total}-{target}=2*{half}><{half}={subtracted}>[{expression}]"


def example(rng: random.Random, count: int) -> tuple[list[int], tuple[int, ...]]:
    """Random numbers and signs with a value among TARGETS."""
    while True:
        numbers = sorted((rng.randrange(1, 10) for _ in range(count)), reverse=True)
        signs = tuple(rng.choice((1, -1)) for _ in numbers[1:])
        if value(numbers, signs) in TARGETS:
            return numbers, signs


def expert_logprobs(numbers: list[int], target: int, response: str) -> list[float]:
    """Of each character of the expert's response, and of its end.

    The expert takes any right answer alike. So a character's probability is the share, of the right
    answers that begin as this one before it, that go on with it.
    """
    right = []
    for signs in itertools.product((1, -1), repeat=len(numbers) - 1):
        if value(numbers, signs) == target:
            right.append(answer(numbers, signs, True))
    alike = []  # how many begin with the first i characters
    for i in range(len(response) + 1):
        alike.append(sum(text.startswith(response[:i]) for text in right))
    return [math.log(after / before) for before, after in zip(alike, alike[1:])] + [0.0]


def question(numbers: list[int], target: int) -> str:
    return f"{','.join(map(str, numbers))}={target}?"


def base_example(rng: random.Random) -> tuple[str, str]:
    wrong = rng.random() < WRONG_SHARE
    numbers, signs = example(rng, rng.choice(WRONG_NUMBERS if wrong else BASE_NUMBERS))
    target = value(numbers, signs)
    while wrong and target == value(numbers, signs):
        target = rng.choice(TARGETS)
    expert = not wrong and rng.random() < EXPERT_SHARE
    return question(numbers, target), answer(numbers, signs, expert)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a character; the chat template is the question itself."""
    return data.character_tokenizer("0123456789+-*=,?<>[]", "{{ messages[-1]['content'] }}")


def rows(name: str, count: int) -> list[dict]:
    """`count` questions with as many numbers as NUMBERS says, in turn.

    A fifth of all questions, by checksum, is for the set named eval.
    """
    rng, found = random.Random(name), []
    while len(found) < count:
        level = NUMBERS[len(found) % len(NUMBERS)]
        numbers, signs = example(rng, level)
        target = value(numbers, signs)
        text, solution = question(numbers, target), answer(numbers, signs, True)
        held_out = zlib.crc32(text.encode()) % 5 == 0
        if held_out == (name == "eval"):
            row = {
                "question": text,
                "answer": f"{' '.join(map(str, numbers))} = {target}",
                "solution": solution,
                "kind": "countdown",
                "behavior_logprobs": expert_logprobs(numbers, target, solution),
                "level": str(level),
            }
            found.append(row)
    return found


def make(folder: Path, seed: int, say=print) -> Path:
    """The task's files and the base model of this seed, whose folder is returned."""
    counts = {"train": TRAIN, "eval": EVAL}
    model = {"tokenizer": tokenizer(), "example": base_example, "steps": BASE_STEPS}
    make_base = functools.partial(data.make_base, **model, say=say)
    return make_task(folder, seed, counts, rows, make_base)


def make_task(folder: Path, seed: int, counts: dict[str, int], rows, make_base) -> Path:
    """Files of counts' rows(name, count), and a base model by make_base(its folder, seed), whose
    folder is returned. What is there already is left as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in counts.items():
        if not (folder / f"{name}.jsonl").exists():
            part = folder / f"{name}.{os.getpid()}.partial"
            part.write_text("".join(json.dumps(row) + "\n" for row in rows(name, count)))
            part.replace(folder / f"{name}.jsonl")
    base = folder / f"base-{seed}"
    if not base.exists():
        part = folder / f"base-{seed}.{os.getpid()}.partial"
        make_base(part, seed)
        part.rename(base)
    return base


def command(make, description: str) -> None:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(make(args.folder, args.seed))


if __name__ == "__main__":
    command(make, __doc__)
