"""Questions of reasoning-gym's tasks as JSON lines, and a small model to train on them.

    pip install reasoning-gym
    python recipes/gym_questions.py FOLDER TASK[:NAME=VALUE,..] .. [--count 3000] [--make-model]

Writes FOLDER/train.jsonl, COUNT questions of each task, and FOLDER/TASK.jsonl, others to evaluate
on. NAME=VALUE are settings of the task. --make-model also makes FOLDER/model, of 0.5 M parameters
and one token a character. It has read the training questions, half of them with the answer to
another: it knows what answers look like, and only half believes the right one.
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import reasoning_gym

EVAL, EVAL_SEED = 200, 10**9  # questions of each task; theirs are seeds that training never reaches
STEPS, WRONG_SHARE = 1000, 0.5  # of the model's training


def rows(task: str, count: int, seed: int, without: set[str]) -> list[dict]:
    """`count` different questions, none of which is in `without`. Raises ValueError."""
    name, _, settings = task.partition(":")
    found, known = {}, {}
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        known[key] = json.loads(value)
    for entry in reasoning_gym.create_dataset(name, size=20 * count, seed=seed, **known):
        if entry["question"] not in without:
            found[entry["question"]] = {
                "question": entry["question"],
                "answer": entry["answer"],
                "solution": entry["answer"],
                "metadata": entry["metadata"],
                "level": name,
            }
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"no more than {len(found)} different questions; lower --count")


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path}: {len(rows)} questions")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("tasks", nargs="+", metavar="TASK")
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--make-model", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    train, texts = {}, []
    for task in args.tasks:
        try:
            held_out = rows(task, EVAL, EVAL_SEED, set())
            train[task] = rows(task, args.count, 0, {row["question"] for row in held_out})
        except (ValueError, TypeError, AssertionError) as error:  # reasoning-gym's, too
            parser.error(f"{task}: {error}")
        write(args.folder / f"{task.partition(':')[0]}.jsonl", held_out)
        texts += [row["question"] + row["answer"] for row in held_out + train[task]]
    write(args.folder / "train.jsonl", [row for found in train.values() for row in found])

    def example(rng: random.Random) -> tuple[str, str]:
        of_one_task = train[rng.choice(args.tasks)]
        row = rng.choice(of_one_task)
        answered = rng.choice(of_one_task) if rng.random() < WRONG_SHARE else row
        return row["question"], answered["answer"]

    if args.make_model:
        data.make_base(
            args.folder / "model",
            0,
            data.character_tokenizer(sorted(set("".join(texts))), "{{ messages[-1]['content'] }}"),
            example,
            STEPS,
        )


if __name__ == "__main__":
    main()
