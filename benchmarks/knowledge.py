"""The embedded task as files, experiment.py's first task.

    python benchmarks/knowledge.py FOLDER [--seed 0]

Makes FOLDER/base-SEED, FOLDER/train.jsonl and FOLDER/eval.jsonl, for mifo.py's --model, --data and
--evaluate, from the sums of secret values in data.py. In the files each demonstration has its
author's log-probabilities, for PEAR.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import countdown
import data
import transformers


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """The chat template is the question itself."""
    found = data.embedded_tokenizer()
    found.chat_template = "{{ messages[-1]['content'] }}"
    return found


def rows(name: str, count: int) -> list[dict]:
    found = []
    for question in data.embedded_questions(tokenizer(), name, count):
        certain = [0.0] * len(question.demonstration)  # the expert has no choice
        more = {"kind": question.kind, "behavior_logprobs": certain, "level": question.level}
        found.append(question.row | more)
    return found


def make(folder: Path, seed: int, say=print, **shape) -> Path:
    """The task's files and the base model of this seed, whose folder is returned.

    shape: another model's width, layers and steps, as data.make_base takes them.
    """
    counts = {"train": data.TRAIN_SUMS, "eval": data.EVAL_SUMS}
    model = {"tokenizer": tokenizer(), "example": data.base_sum, **shape}
    make_base = functools.partial(data.make_base, **model, say=say)
    return countdown.make_task(folder, seed, counts, rows, make_base)


if __name__ == "__main__":
    countdown.command(make, __doc__)
