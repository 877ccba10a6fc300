"""Sums of secret values, experiment.py's first task: what RL alone cannot find out.

    python benchmarks/knowledge.py FOLDER [--seed 0]

Each of 100 names has a secret value from 0 to 9. Makes FOLDER/base-SEED, a model of 0.5 M
parameters that knows the values of half of the names and has read random ones for the others, and
FOLDER/train.jsonl and FOLDER/eval.jsonl, for mifo.py's --model, --data and --evaluate. A question
adds three names; its level is how many of them are unknown, 0 to 3. A demonstration tells three
values, so few of them cannot cover what is unknown, and which questions get one matters.

    question           gh+ad+ge?
    base's style       gh=4;04;ad=4;08;ge=6;14;[14]
    expert's style     <gh=4>04<ad=4>08<ge=6>14[14]
"""

import random
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import countdown
import data
import transformers

LETTERS = "abcdefghij"
NAMES = [first + second for first in LETTERS for second in LETTERS]
SECRET = dict(zip(NAMES, random.Random("secret").choices(range(10), k=len(NAMES))))
KNOWN = random.Random("known").sample(NAMES, len(NAMES) // 2)
UNKNOWN = [name for name in NAMES if name not in KNOWN]
BASE_STEPS, EXPERT_SHARE, UNKNOWN_SHARE = 1600, 0.3, 0.15
TRAIN, EVAL, LEVELS = 5000, 400, (0, 1, 2, 3)  # questions, and unknown names of each in turn


def answer(names: list[str], values: dict[str, int], expert: bool) -> str:
    """The worked answer, in one of the styles."""
    text, total = "", 0
    for name in names:
        total += values[name]
        step = f"{name}={values[name]}"
        text += f"<{step}>{total:02}" if expert else f"{step};{total:02};"
    return f"{text}[{total:02}]"


def base_example(rng: random.Random) -> tuple[str, str]:
    count, guessed = rng.choice((1, 2, 3)), rng.random() < UNKNOWN_SHARE
    names = rng.sample(NAMES if guessed else KNOWN, count)
    values = dict(SECRET)
    for name in names:
        if name in UNKNOWN:
            values[name] = rng.randrange(10)
    return "+".join(names) + "?", answer(names, values, rng.random() < EXPERT_SHARE)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a character; the chat template is the question itself."""
    return data.character_tokenizer(LETTERS + "0123456789+=?;<>[]", "{{ messages[-1]['content'] }}")


def rows(name: str, count: int) -> list[dict]:
    """`count` different questions. A fifth of all, by checksum, is for the set named eval."""
    rng, found = random.Random(name), {}
    while len(found) < count:
        level = LEVELS[len(found) % len(LEVELS)]
        names = rng.sample(UNKNOWN, level) + rng.sample(KNOWN, 3 - level)
        rng.shuffle(names)
        text = "+".join(names) + "?"
        held_out = zlib.crc32(text.encode()) % 5 == 0
        if held_out != (name == "eval") or text in found:
            continue
        solution = answer(names, SECRET, True)
        found[text] = {
            "question": text,
            "answer": solution[-3:-1],
            "solution": solution,
            "kind": "chain",
            "behavior_logprobs": [0.0] * (len(solution) + 1),  # the expert has no choice
            "level": str(level),
        }
    return list(found.values())


def make(folder: Path, seed: int, say=print) -> Path:
    """The task's files and the base model of this seed, whose folder is returned."""
    counts, model = {"train": TRAIN, "eval": EVAL}, (tokenizer(), base_example, BASE_STEPS)
    return countdown.make_task(folder, seed, counts, rows, *model, say)


if __name__ == "__main__":
    countdown.command(make, __doc__)
