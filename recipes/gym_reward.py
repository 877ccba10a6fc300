"""The reward of reasoning-gym's own scorers, for mifo.py's and eval.py's --reward.

They are another's code. Never train on the tasks whose scorers evaluate what the model writes:
string_insertion, spiral_matrix, binary_matrix and n_queens by eval; countdown, puzzle24,
polynomial_multiplication, simple_integration and intermediate_integration by SymPy's parse_expr.
"""

from functools import lru_cache

from reasoning_gym import get_score_answer_fn

scorer_of = lru_cache(get_score_answer_fn)  # each call makes a data set


def score(completions, question, answer, metadata, **columns):
    rewards = []
    for completion, q, gold, known in zip(completions, question, answer, metadata, strict=True):
        entry = {"question": q, "answer": gold, "metadata": known}
        response = completion[0]["content"].strip()
        rewards.append(scorer_of(known["source_dataset"])(response, entry))
    return rewards
