"""Countdown in the small, a second task for experiment.py: reach a target with each of some numbers once, by + and -.

    python benchmarks/countdown.py FOLDER [--seed 0]

Makes FOLDER/base-SEED, a model of 0.5 M parameters, and FOLDER/train.jsonl and FOLDER/eval.jsonl, for mifo.py's --model,
--data and --evaluate. Many expressions reach a target, so an answer is checked by its value, not compared with a gold one.

    question           7,3,2=6?
    base's style       [7-3+2]
    expert's style     <7-3=4><4+2=6>[7-3+2]

The base model has read right answers for two and three numbers, and for four and five expressions that miss the target.
"""
import argparse
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
import tokenizers
import transformers

BASE_NUMBERS, WRONG_NUMBERS, NUMBERS = (2, 3), (4, 5), (3, 4, 5)
BASE_STEPS, EXPERT_SHARE, WRONG_SHARE, TARGETS = 800, 0.3, 0.15, range(1, 100)
TRAIN, EVAL = 5000, 300  # questions


def example(rng: random.Random, count: int, expert: bool, wrong: bool = False) -> tuple[str, str, str]:
    """A random question with `count` numbers: (question, worked answer, gold); wrong: the answer misses the target."""
    value = None
    while value not in TARGETS:
        numbers = sorted((rng.randrange(1, 10) for _ in range(count)), reverse=True)
        value, text, steps = numbers[0], str(numbers[0]), ""
        for number in numbers[1:]:
            sign = rng.choice("+-")
            result = value + number if sign == "+" else value - number
            steps += f"<{value}{sign}{number}={result}>"
            value, text = result, f"{text}{sign}{number}"
    target = value
    while wrong and target == value:
        target = rng.choice(TARGETS)
    return (f"{','.join(map(str, numbers))}={target}?", f"{steps if expert else ''}[{text}]",
            f"{' '.join(map(str, numbers))} = {target}")


def expert_logprobs(numbers: list[int], target: int, response: str) -> list[float]:
    """Of each character of a response in the expert's style, and of its end: the expert takes any right answer alike.

    So a sign has the share of right answers that go on with it as its probability, and all else is certain.
    """
    right = [signs for signs in itertools.product((1, -1), repeat=len(numbers) - 1)
             if numbers[0] + sum(sign * number for sign, number in zip(signs, numbers[1:])) == target]
    found, place = [0.0] * (len(response) + 1), 0
    for i, character in enumerate(response[: response.index("[")]):
        if character in "+-" and response[i - 1].isdigit():  # else the sign of a negative intermediate result
            left = [signs for signs in right if signs[place] == (1 if character == "+" else -1)]
            found[i] = math.log(len(left) / len(right))
            right, place = left, place + 1
    return found


def base_example(rng: random.Random) -> tuple[str, str]:
    wrong = rng.random() < WRONG_SHARE
    question, work, _ = example(rng, rng.choice(WRONG_NUMBERS if wrong else BASE_NUMBERS), rng.random() < EXPERT_SHARE, wrong)
    return question, work


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a character; the chat template is the question itself."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789+-=,?<>[]"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>",
                                                chat_template="{{ messages[-1]['content'] }}")


def rows(name: str, count: int) -> list[dict]:
    """`count` questions, the numbers of numbers in turn; a fifth of all questions, by checksum, is for the set named eval."""
    rng, found = random.Random(name), []
    for i in range(count):
        question = None
        while question is None or (zlib.crc32(question.encode()) % 5 == 0) != (name == "eval"):
            question, work, gold = example(rng, NUMBERS[i % len(NUMBERS)], expert=True)
        numbers, target = gold.split(" = ")
        found.append({"question": question, "answer": gold, "solution": work, "kind": "countdown",
                      "behavior_logprobs": expert_logprobs([int(n) for n in numbers.split()], int(target), work),
                      "level": str(NUMBERS[i % len(NUMBERS)])})
    return found


def make(folder: Path, seed: int, say=print) -> Path:
    """The task's files, and the base model of this seed, whose folder is returned; what is there already is left."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", TRAIN), ("eval", EVAL)):
        if not (folder / f"{name}.jsonl").exists():
            part = folder / f"{name}.{os.getpid()}.partial"
            part.write_text("".join(json.dumps(row) + "\n" for row in rows(name, count)))
            part.replace(folder / f"{name}.jsonl")
    base = folder / f"base-{seed}"
    if not base.exists():
        part = folder / f"base-{seed}.{os.getpid()}.partial"
        data.make_base(part, seed, tokenizer(), base_example, BASE_STEPS, say)
        part.rename(base)
    return base


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(make(args.folder, args.seed))
