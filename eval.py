"""Checks answers in killable workers; evaluates a model on benchmarks; grades responses from elsewhere; compares runs.

    python eval.py MODEL --bench aime24,aime25,amc,olympiad,math500,mmlu_pro          # the paper's table, one row of it
    torchrun --standalone --nproc-per-node 8 eval.py MODEL --bench math500 --k 4      # questions split over the ranks
    python eval.py MODEL --bench my.jsonl --out DIR                                   # rows of question and answer
    python eval.py grade FILE.jsonl --extract any                                     # rows of answer and response
    python eval.py compare RUN RUN ...                                                # folders of mifo.py's runs

An answer is found in a response by string search, here, and compared with the gold answer by Math-Verify, in processes
that import nothing but this file and Math-Verify, and that are killed and replaced when they take too long.
"""

import argparse
import ast
import datetime
import hashlib
import json
import logging
import math
import operator
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

VERDICTS = ("correct", "wrong", "unparsed", "timeout", "error")
KINDS = ("math", "number", "choice", "chain", "countdown")

# ---------------------------------------------------------------------------------------------------------------------
# Finding the answer in a response. Linear in the response's length, all of it, since it runs in the trainer's process.

MAX_ANSWER = 1000  # characters: 20 times MATH-500's longest gold answer; longer ones are no answers, and slow to parse
MAX_NESTING = (
    10  # of brackets, for the same reasons: 2 in MATH-500's gold answers, 5 in its worked solutions
)
REPEATS = re.compile(
    r"(\D.{0,11}?)\1{19}", re.DOTALL
)  # no answer says the same 20 times over, but for digits
BOX = re.compile(r"\\boxed\s{0,4}\{")
BRACES = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace does not count
NUMBER = re.compile(
    r"(?:(?<![\w.)])-)?(?<![\w.])\$?"  # a minus after an operand is no sign
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)
PLAIN_NUMBER = re.compile(r"([-+]?)((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)")
FRACTION = re.compile(
    r"([-+]?)(?:\\[dt]?frac(?:\{([0-9]+)\}|([0-9]))(?:\{([0-9]+)\}|([0-9]))|([0-9]+)/([0-9]+))"
)
WORDS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\s?\{([^{}\\]*)\}")
# A and I are also words: bare, they are answers only where the sentence ends.
LETTER = r"(?:\(([A-J])\)|([AI])(?=\**\s{0,4}(?:[.,;:)}\]$*\n]|$))|([B-HJ])(?![\w'+-]))"
ANSWER_IS = re.compile(
    r"(?i:answer|option|choice)\**(?i:\s{1,4}is\b|\s{0,4}:)[\s:*]{0,6}(?i:(?:option|choice)\s)?"
    rf"[*$\\(\[]{{0,4}}(?:(?:text|textbf|mathrm|mathbf)\{{)?(?:{LETTER})"
)
LAST_LETTER = re.compile(r"[\s*$(\[]{0,8}([A-J])[\s*$).\]]{0,8}")
BOXED_LETTER = re.compile(r"\(([A-J])\)|([A-J])(?=[.):]|$)")


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed{} holds; of nested ones the innermost. None: there is none, it is not closed, or too long.

    There is no falling back from a box that the token limit has cut off to an earlier one.
    """
    end = len(text)
    while (start := text.rfind("\\boxed", 0, end)) >= 0:
        opening = BOX.match(text, start)
        if opening:
            depth = 1
            for token in BRACES.finditer(text, opening.end(), opening.end() + MAX_ANSWER + 1):
                depth += {"{": 1, "}": -1}.get(token.group(), 0)
                if depth == 0:
                    return text[opening.end() : token.start()]
            return None
        end = start
    return None


def number_answer(text: str) -> str | None:
    r"""The last \boxed{}, else what stands after the last `####`, else the last plain number."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    _, marker, rest = text.rpartition("####")
    if marker:
        first = NUMBER.search(rest.partition("\n")[0])
        return first.group() if first else None
    numbers = NUMBER.findall(text)
    return numbers[-1] if numbers else None


def choice_answer(text: str) -> str | None:
    r"""A letter A to J: boxed (`\boxed{C. text}`, too), else the last "answer is (C)", else alone on the last line."""
    boxed = last_boxed(text)
    if boxed is not None:
        found = BOXED_LETTER.match(re.sub(r"\\[a-z]+|[{}$*\s\\]", "", boxed))
    else:
        found = None
        for found in ANSWER_IS.finditer(text):
            pass
        found = found or LAST_LETTER.fullmatch(text.rstrip()[-40:].rpartition("\n")[2])
    return next(filter(None, found.groups())) if found else None


def chain_answer(text: str) -> str | None:
    """What the last [...] holds, which is where the embedded task's worked answers have theirs."""
    start = text.rfind("[", 0, text.rfind("]") + 1)
    return text[start + 1 : text.find("]", start)] if start >= 0 else None


ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def expression_value(text: str) -> Fraction | None:
    """The exact value of + - * / and brackets over whole numbers; None if the text is anything else, or divides by zero.

    The text is parsed, never evaluated.
    """

    def value(node) -> Fraction:
        match node:
            case ast.Constant(int(number)):
                return Fraction(number)
            case ast.BinOp(left, sign, right) if type(sign) in ARITHMETIC:
                return ARITHMETIC[type(sign)](value(left), value(right))
        raise ValueError

    if len(text) > 200 or not re.fullmatch(r"[0-9+*/() -]+", text) or nesting(text) > MAX_NESTING:
        return None
    try:
        return value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def countdown_verdict(response: str, gold: str) -> str:
    r"""Of Countdown: the last \boxed{}, else the last [...], must use each number once and have the target as its value.

    gold: the numbers and the target, as `3 5 7 = 22`.
    """
    answer = last_boxed(response) or chain_answer(response) or ""
    value = expression_value(answer)
    if value is None:
        return "unparsed"
    numbers, target = (
        [int(number) for number in re.findall("[0-9]+", side)] for side in (gold.split("="))
    )
    used = sorted(int(number) for number in re.findall("[0-9]+", answer))
    return "correct" if used == sorted(numbers) and value == target[0] else "wrong"


def normalise(answer: str) -> str:
    """On one line, without dollar signs and the punctuation of the sentence around it."""
    return re.sub(
        r"(?<![\\.,;:\s])[.,;:\s]+$", "", " ".join(re.sub(r"(?<!\\)\$", "", answer).split())
    )


def as_number(answer: str) -> Fraction | None:
    r"""A plain number or fraction, with thousands commas or an escaped dollar sign; None for all else (units, \%)."""
    text = answer.replace("\\$", "").replace("{,}", ",").replace("\\!", "").strip()
    if len(text) > MAX_ANSWER:
        return None
    if plain := PLAIN_NUMBER.fullmatch(text):
        return Fraction(plain[1] + plain[2].replace(",", "").rstrip("."))
    if fraction := FRACTION.fullmatch(text):
        over, under = filter(None, fraction.groups()[1:])
        return Fraction(int(fraction[1] + over), int(under)) if int(under) else None
    return None


def nesting(answer: str) -> int:
    """How deep brackets of any kind stand in one another; unclosed ones count."""
    steps = [1 if bracket in "([{" else -1 for bracket in re.findall(r"[][(){}]", answer)]
    return max(accumulate(steps, initial=0))


def settle(
    response: str, gold: str, kind: str, extract: str, require_think: bool
) -> str | tuple[str, str, str]:
    """The verdict where plain comparison can tell it, or what a worker has to compare: (how, answer, gold)."""
    if require_think:
        thought, *rest = response.split("</think>")
        if len(rest) != 1 or thought.count("<think>") > 1 or "<think>" in rest[0]:
            return "unparsed"
        response = rest[0]
    if kind in ("chain", "choice"):
        answer = chain_answer(response) if kind == "chain" else choice_answer(response)
        return "unparsed" if answer is None else "correct" if answer == gold.strip() else "wrong"
    if kind == "countdown":
        return countdown_verdict(response, gold)
    gold = normalise(gold.rpartition("####")[2])
    if extract == "any":
        return ("any", response, gold) if response.strip() else "unparsed"
    answer = normalise((last_boxed(response) if kind == "math" else number_answer(response)) or "")
    if not answer or len(answer) > MAX_ANSWER:
        return "unparsed"
    if answer == gold:
        return "correct"
    numbers = as_number(answer), as_number(gold)
    if None not in numbers:
        if numbers[0] == numbers[1]:
            return "correct"
        if "." not in answer + gold:  # decimals are rounded before they are compared
            return "wrong"
    words = WORDS.fullmatch(gold)  # math-verify reads `east` without \text as e*a*s*t
    if words and WORDS.sub(r"\1", answer).strip().casefold() == words[1].strip().casefold() != "":
        return "correct"
    if nesting(answer) > MAX_NESTING or REPEATS.search(answer):
        return "unparsed"
    return ("boxed", answer, gold)


# ---------------------------------------------------------------------------------------------------------------------
# The worker: this file run as a program of its own, so that it neither shares nor imports anything of the trainer's.
# One JSON line in is a batch of [how, answer, gold]; one line out is the verdict on one of them.

WORKER_MEMORY = 1 << 30  # bytes of address space; a worker takes 0.1 GiB
CPU_LIMIT = 1.0  # seconds of computing an answer, several times the slowest ordinary one; exceeding it is a timeout, too
# One of each kind, none of them an answer of MATH-500 or GSM8K: what is measured there must not have been parsed before.
WARM_UP = (
    r"\frac{47\sqrt{83}}{59}",
    "u^2 - 89uw + 97",
    "(-173, 211]",
    r"u = 61 \cdot 73",
    r"\text{warm}",
    r"479\pi",
    "307,-311",
    r"283^\circ",
    r"[167,173) \cup (179,\infty)",
    r"\begin{pmatrix} 181 \\ -191 \end{pmatrix}",
    r"(193, \frac{\pi}{197})",
    r"199 \pm \sqrt{223}",
    "227+229i",
    r"23.3 \text{ units}",
    r"239\sqrt{241}",
)
LARGEST = 10_000  # exponents, arguments of factorials and bounds of sums up to here are evaluated


def size(expression) -> float:
    """Roughly the absolute value of a SymPy expression, its variables taken as 1, found without evaluating anything.

    Raises ArithmeticError where evaluating would take numbers of much more than LARGEST digits, or as many terms.
    """
    import sympy

    parts = [
        size(part)
        for part in (
            expression.flat() if isinstance(expression, sympy.MatrixBase) else expression.args
        )
    ]
    try:
        if isinstance(expression, (sympy.Number, sympy.NumberSymbol)):
            return abs(float(expression))
        if isinstance(expression, (sympy.Add, sympy.Mul)):
            return sum(parts) if expression.is_Add else math.prod(parts)
        if isinstance(expression, (sympy.Pow, sympy.exp, sympy.MatPow)):
            base, exponent = parts if len(parts) == 2 else (math.e, *parts)
            if exponent > LARGEST:
                raise ArithmeticError("exponent too large")
            return (
                base ** (-exponent if expression.args[-1].could_extract_minus_sign() else exponent)
                if base
                else 0.0
            )
        if isinstance(
            expression,
            (
                sympy.factorial,
                sympy.factorial2,
                sympy.binomial,
                sympy.gamma,
                sympy.Sum,
                sympy.Product,
            ),
        ):
            if max(parts) > LARGEST:
                raise ArithmeticError("too many factors or terms")
            return math.gamma(max(parts) + 1)
    except OverflowError:
        return math.inf
    return max(parts, default=1.0)


def too_large(expression) -> bool:
    try:
        size(expression)
    except (ArithmeticError, RecursionError):
        return True
    return False


def worker(limit: float) -> None:
    import resource
    import math_verify.parser  # and not at the top: whoever imports this file need not wait for SymPy
    import sympy.parsing.sympy_parser
    import sympy.physics.units

    logging.disable(logging.CRITICAL)
    parse, verify = math_verify.parse, math_verify.verify
    latex = [math_verify.LatexExtractionConfig()]
    either = [math_verify.LatexExtractionConfig(), math_verify.ExprExtractionConfig()]

    def plain_number(text: str, *_, **__):
        if not re.fullmatch(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)", text):
            raise ValueError("model output is never evaluated")
        return sympy.Float(text) if "." in text else sympy.Integer(text)

    # SymPy turns text into Python and evaluates it, even in sympy.Number("12"). All it needs here is to read numbers;
    # the plain arithmetic that Math-Verify finds in a response is read as LaTeX instead.
    sympy.parsing.sympy_parser.parse_expr = sympy.parsing.sympy_parser.eval_expr = plain_number
    math_verify.parser.parse_expr_cached = lambda text: math_verify.parser.parse_latex_cached(
        text.replace("**", "^")
    )
    simplified_to_zero = math_verify.grader.sympy_symbolic_eq

    def differ(a, b) -> bool:
        try:
            symbols = sorted(a.free_symbols | b.free_symbols, key=str)
            point = {symbol: sympy.Rational(7 * i + 3, 11) for i, symbol in enumerate(symbols)}
            a, b = (complex(x.subs(point).evalf()) for x in (a, b))
            return 1e-6 < abs(a - b) / (1 + abs(a)) < math.inf
        except Exception:  # no numbers: only simplifying can tell
            return False

    # Simplifying is slow at showing that two expressions differ, which their values at one point can do at once.
    math_verify.grader.sympy_symbolic_eq = lambda a, b: (
        not differ(a, b) and simplified_to_zero(a, b)
    )
    allowed = resource.getrlimit(resource.RLIMIT_AS)[1]
    if sys.platform == "linux" and not 0 <= allowed < WORKER_MEMORY:
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, allowed))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    @lru_cache(4096)
    def parse_latex(text: str) -> list:
        if re.fullmatch("-?[0-9]+", text):  # as most gold answers are
            return [sympy.Integer(text)]
        return parse(f"${text}$", latex, parsing_timeout=None)

    def compare(how: str, answer: str, gold: str) -> str:
        golds = parse_latex(gold)
        found = parse(answer, either, parsing_timeout=None) if how == "any" else parse_latex(answer)
        # What is too large to be evaluated can still be right by its form.
        found = [f for f in found if isinstance(f, str) or f in golds or not too_large(f)]
        golds = [g for g in golds if isinstance(g, str) or g in found or not too_large(g)]
        failed = False
        understood = any(not isinstance(f, str) for f in found)  # and not only cut out
        if how == "gold" and not understood:
            return "unparsed"
        for g in golds:
            for f in found:
                try:
                    if verify(g, f, timeout_seconds=None, raise_on_error=True):
                        return "correct"
                except Exception:
                    failed = True
        return "unparsed" if not understood else "error" if failed else "wrong"

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever a library prints is no verdict
    os.dup2(1, 2)
    for text in WARM_UP:  # the parser is slow on the first of each kind
        parse(f"${text}$", latex, parsing_timeout=None)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        for how, answer, gold in json.loads(line):
            # Ends this process by SIGPROF, even within native code, on a busy machine no sooner, and with the parent gone.
            signal.setitimer(signal.ITIMER_PROF, min(limit, CPU_LIMIT))
            print(compare(how, answer, gold), file=replies, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Their keeper

START_LIMIT = 120.0  # seconds for a worker's imports, about one on an idle machine
BATCH = 32  # answers a message


@dataclass(eq=False)
class Worker:
    process: subprocess.Popen
    deadline: float = 0.0
    ready: bool = False
    jobs: deque = field(
        default_factory=deque
    )  # handed over and not answered yet; it is at work on the first
    outbox: bytes = b""
    inbox: bytes = b""

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Checker:
    r"""Verdicts on responses: correct, wrong, unparsed (no answer found or understood), timeout, error.

    kinds: math (the last \boxed{}), number (or `#### N`, or the last plain number), choice (A to J), chain (the
    embedded task's last [...]), countdown (an expression, by countdown_verdict). What plain comparison can tell is settled
    here; all else goes to Math-Verify in a worker, started when first needed. extract="any" has Math-Verify search whole
    responses of the kinds math and number. require_think: exactly one </think>, and the answer after it; a response
    without is unparsed.

    limit is wall-clock seconds an answer, of which CPU_LIMIT may be spent computing: a worker that exceeds either is
    killed and replaced and its answer a timeout; the answer of a worker that dies is an error. Math-Verify's own limits
    are off, since they cannot stop native code. Answers too deep, repetitive or large to be evaluated are unparsed.

    Known of Math-Verify 0.9 and left so: `10\%` equals both `10` and `0.1`, whichever of them is gold; units are dropped;
    `x=5` and `5` are one; `2,3`, `3,2` and `2 \text{ or } 3` are one; numbers equal to six decimals are equal where one is
    written as a decimal.
    """

    def __init__(
        self,
        workers: int = 1,
        limit: float = 5.0,
        extract: str = "boxed",
        require_think: bool = False,
    ):
        if extract not in ("boxed", "any"):
            raise ValueError(f"extract must be boxed or any, not {extract!r}")
        if workers < 1 or not limit > 0:
            raise ValueError(
                f"a checker needs at least one worker and a limit above 0 s, not {workers} and {limit}"
            )
        self.workers, self.limit, self.extract, self.require_think = (
            workers,
            limit,
            extract,
            require_think,
        )
        self.pool: list[Worker] = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        while self.pool:
            self.pool.pop().end()

    def check(self, responses: list[str], golds: list[str], kinds: list[str]) -> list[str]:
        """One verdict a response, in their order. Equal answers to equal golds are compared once."""
        if unknown := set(kinds) - set(KINDS):
            raise ValueError(
                f"kind of answer must be one of {', '.join(KINDS)}, not {', '.join(sorted(unknown))}"
            )
        settled = [
            settle(*row, self.extract, self.require_think)
            for row in zip(responses, golds, kinds, strict=True)
        ]
        verdicts = self._compare(list(dict.fromkeys(s for s in settled if s not in VERDICTS)))
        return [verdicts.get(s, s) for s in settled]

    def check_golds(self, golds: list[str], kinds: list[str]) -> list[str]:
        """`correct` for the gold answers that can be got at all: those that Math-Verify understands and finds equal to
        themselves, letters A to J, `3 5 7 = 22` for countdown, and for chains whatever is not empty."""
        jobs = []
        for gold, kind in zip(golds, kinds, strict=True):
            text = normalise(gold.rpartition("####")[2])
            good = {
                "choice": re.fullmatch("[A-J]", text),
                "chain": text,
                "countdown": re.fullmatch("[0-9]+( [0-9]+)* = [0-9]+", text),
            }
            jobs.append(
                ("gold", text, text)
                if kind not in good and text
                else "correct"
                if good.get(kind)
                else "unparsed"
            )
        verdicts = self._compare(list(dict.fromkeys(job for job in jobs if job not in VERDICTS)))
        return [verdicts.get(job, job) for job in jobs]

    def _compare(self, jobs: list[tuple[str, str, str]]) -> dict[tuple[str, str, str], str]:
        for w in [
            w for w in self.pool if w.jobs or w.process.poll() is not None
        ]:  # left by an interrupt, or died idle
            self.pool.remove(w)
            w.end()
        waiting, verdicts = deque(jobs), {}
        while len(verdicts) < len(jobs):
            self._hand_out(waiting)
            now = time.monotonic()
            busy = {w.process.stdout.fileno(): w for w in self.pool if w.jobs}
            poll = select.poll()
            for descriptor, w in busy.items():
                poll.register(descriptor, select.POLLIN)
                if w.outbox:
                    poll.register(w.process.stdin.fileno(), select.POLLOUT)
            events = dict(poll.poll(1000 * max(0.0, min(w.deadline for w in busy.values()) - now)))
            for descriptor, w in busy.items():
                if w.outbox and w.process.stdin.fileno() in events:
                    try:
                        w.outbox = w.outbox[os.write(w.process.stdin.fileno(), w.outbox) :]
                    except BrokenPipeError:  # it has died, which its stdout will tell
                        w.outbox = b""
                if descriptor in events:
                    received = os.read(descriptor, 1 << 16)
                    if not received:
                        self._replace(w, "error", waiting, verdicts)
                        continue
                    *lines, w.inbox = (w.inbox + received).split(b"\n")
                    for line in lines:
                        if w.ready:
                            verdicts[w.jobs.popleft()] = line.decode()
                        w.ready, w.deadline = True, time.monotonic() + self.limit
                elif (
                    w.deadline < now
                ):  # judged by the time before looking: a parent held up itself blames nobody
                    self._replace(w, "timeout", waiting, verdicts)
        return verdicts

    def _hand_out(self, waiting: deque) -> None:
        while waiting and (len(self.pool) < self.workers or not all(w.jobs for w in self.pool)):
            w = next((w for w in self.pool if not w.jobs), None)
            if w is None:
                command, pipe = (
                    [sys.executable, __file__, "--worker", str(self.limit)],
                    subprocess.PIPE,
                )
                w = Worker(
                    subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)
                )
                os.set_blocking(w.process.stdin.fileno(), False)
                self.pool.append(w)
            share = math.ceil(len(waiting) / self.workers)
            w.jobs.extend(waiting.popleft() for _ in range(min(BATCH, share)))
            w.outbox = json.dumps(list(w.jobs)).encode() + b"\n"
            w.deadline = time.monotonic() + (self.limit if w.ready else START_LIMIT)

    def _replace(self, w: Worker, verdict: str, waiting: deque, verdicts: dict) -> None:
        self.pool.remove(w)
        w.end()
        if w.process.returncode == -signal.SIGPROF:
            verdict = "timeout"
        if not w.ready:
            raise RuntimeError(
                "a worker that compares answers did not start; if it died, its message stands above"
            )
        verdicts[w.jobs.popleft()] = verdict
        waiting.extendleft(reversed(w.jobs))


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): the unbiased chance that one of k samples is correct, of n of which c are.

    Chen et al. 2021, arXiv 2107.03374, equation 1. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1.0 - math.prod((n - c - i) / (n - i) for i in range(k))


def avg_at_k(
    scores: list[float], seed: int = 0, resamples: int = 2000
) -> tuple[float, float, float]:
    """Mean of the questions' accuracies [Q] with the bounds of its 95 % bootstrap interval over questions."""
    import numpy as np

    scores, rng = np.asarray(scores, dtype=np.float64), np.random.default_rng(seed)
    means = [scores[rng.integers(len(scores), size=len(scores))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(scores.mean()), float(low), float(high)


def question_seed(seed: int, question_id: str) -> int:
    """Depends on nothing else, so that neither order, world size nor resuming changes what is sampled. 31 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{question_id}".encode()).digest()[:4], "big") >> 1


def evaluate(
    sampler,
    questions: list,
    checker: Checker,
    k: int,
    temperature: float,
    max_tokens: int,
    seed: int,
    detokenize,
    rank: int = 0,
    world: int = 1,
) -> list[dict]:
    """Samples k responses to each of this rank's questions (every world-th) and checks them; one row a question.

    detokenize: list of token ids -> str. No rank waits for another; to summarise, gather the rows of all.
    """
    questions = questions[rank::world]
    if not questions:
        return []
    seeds = [question_seed(seed, q.id) for q in questions]
    groups = sampler.sample([q.prompt for q in questions], k, seeds, max_tokens, temperature)
    responses = [detokenize(s.tokens) for group in groups for s in group]
    verdicts = checker.check(
        responses,
        [q.answer for q in questions for _ in range(k)],
        [q.kind for q in questions for _ in range(k)],
    )
    return [
        {
            "id": q.id,
            "level": q.level,
            "kind": q.kind,
            "answer": q.answer,
            "response": responses[i * k : (i + 1) * k],
            "verdict": verdicts[i * k : (i + 1) * k],
            "tokens": [len(s.tokens) for s in group],
            "truncated": [s.truncated for s in group],
        }
        for i, (q, group) in enumerate(zip(questions, groups))
    ]


def summarize(rows: list[dict]) -> dict:
    """avg@k with its interval, unbiased pass@1, 2, 4 .. k, mean length, shares of truncation and of each verdict."""
    if not rows:
        raise ValueError("no questions to summarise")
    k = min(len(row["verdict"]) for row in rows)
    correct = [row["verdict"].count("correct") for row in rows]
    average, low, high = avg_at_k([c / len(row["verdict"]) for c, row in zip(correct, rows)])
    flat = {
        key: [value for row in rows for value in row[key]]
        for key in ("verdict", "tokens", "truncated")
    }
    shares = Counter(flat["verdict"])
    levels: dict[str, list[float]] = {}
    for c, row in zip(correct, rows):
        levels.setdefault(str(row["level"]), []).append(c / len(row["verdict"]))
    return {
        "rows": len(rows),
        "k": k,
        "avg": average,
        "low": low,
        "high": high,
        "pass": {
            j: sum(pass_at_k(len(row["verdict"]), c, j) for c, row in zip(correct, rows))
            / len(rows)
            for j in sorted({1 << i for i in range(k.bit_length())} | {k})
        },
        "length": sum(flat["tokens"]) / len(flat["tokens"]),
        "truncated": sum(flat["truncated"]) / len(flat["truncated"]),
        **{verdict: shares[verdict] / len(flat["verdict"]) for verdict in VERDICTS},
        "levels": {
            level: {"rows": len(s), "avg": sum(s) / len(s)} for level, s in sorted(levels.items())
        },
    }


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks


@dataclass(frozen=True)
class Bench:
    hub: str
    rows: int  # as many as the Hub shows; another number is a warning in the table
    k: int = 1  # the paper's protocol: avg@32 on the small sets, pass@1 on the others
    split: str = "test"
    config: str = ""
    question: str = ""  # the columns' names, where data.py does not know the layout
    answer: str = ""


BENCHES = {
    "aime24": Bench("HuggingFaceH4/aime_2024", rows=30, k=32, split="train"),
    "aime25": Bench("math-ai/aime25", rows=30, k=32),
    # Two sets are called AMC: LUFFY's and ReLIFT's (AMC 12 of 2022 and 2023, made into integer
    # answers), and Qwen's.
    "amc": Bench("AI-MO/aimo-validation-amc", rows=83, k=32, split="train"),
    "amc23": Bench("math-ai/amc23", rows=40, k=32),
    # Open-ended, text only, English. LUFFY's and ReLIFT's copy has 675 rows.
    "olympiad": Bench(
        "Hothan/OlympiadBench",
        rows=674,
        split="train",
        config="OE_TO_maths_en_COMP",
        question="question",
        answer="final_answer",
    ),
    "math500": Bench("HuggingFaceH4/MATH-500", rows=500),
    "minerva": Bench("math-ai/minervamath", rows=272),
    "gsm8k": Bench("openai/gsm8k", rows=1319, config="main"),
    "mmlu_pro": Bench("TIGER-Lab/MMLU-Pro", rows=12032),
}
CHAINS = 1000  # questions of `chain`, the embedded task's benchmark


def load_questions(name: str, tokenizer, system: str | None, generation_prefix: str) -> list:
    """A benchmark's questions, ready to sample from. name: one of BENCHES, `chain`, or a file.

    Rows are read as data.row_reader reads training rows, less their demonstrations; a row that
    cannot be used is an error.
    """
    import data

    if name == "chain":
        questions = data.embedded_questions(tokenizer, "eval", data.EVAL_TERMS, CHAINS)
        for i, question in enumerate(questions):
            question.id = f"chain/{i}"
        return questions
    if name in BENCHES:
        bench = BENCHES[name]
        rows = data.load_rows(bench.hub, bench.split, bench.config)
        read = data.row_reader(rows, bench.question, bench.answer)
    elif Path(name).suffix in data.FILES:
        rows = data.load_rows(name)
        read = data.row_reader(rows)
    else:
        known = f"{', '.join(BENCHES)}, chain, and {', '.join(data.FILES)} files"
        raise ValueError(f"--bench {name}: unknown; known are {known}")
    questions = []
    for index, row in rows:
        example = read(index, row)
        if fault := data.example_fault(example, KINDS):
            raise ValueError(f"{rows.place(index)}: {fault}; its columns are {list(row)!s:.200}")
        questions.append(
            data.Question(
                id=f"{Path(name).name}/{len(questions)}",
                prompt=data.render_prompt(
                    tokenizer, example.messages, system=system, generation_prefix=generation_prefix
                ),
                answer=example.answer,
                demonstration=None,
                level=example.level,
                kind=example.kind,
            )
        )
    return questions


# ---------------------------------------------------------------------------------------------------------------------
# The folder of an evaluation: settings.json, responses.jsonl (one line a response), results.json; while it runs also
# a responses.rankN.jsonl of each rank.

CHUNK = 1024  # responses sampled at a time and a rank: what an interruption costs at most


def dump(row: dict) -> str:
    """A question's row as JSON lines, one a response. ASCII, so that any string a model can make survives."""
    fixed = {
        "bench": row["id"].rpartition("/")[0],
        **{key: row[key] for key in ("id", "level", "kind", "answer")},
    }
    columns = {key: row[key] for key in ("response", "verdict", "tokens", "truncated")}
    return "".join(
        json.dumps({**fixed, "sample": j, **{key: values[j] for key, values in columns.items()}})
        + "\n"
        for j in range(len(row["verdict"]))
    )


def load_finished(folder: Path, k_of: dict[str, int]) -> dict[str, dict]:
    """Rows of the questions that have all their responses, by id; a half-written last line is left out."""
    parts: dict[str, dict[int, dict]] = {}
    for path in [folder / "responses.jsonl", *sorted(folder.glob("responses.rank*.jsonl"))]:
        if path.exists():
            with path.open() as file:
                for line in file:
                    if line.endswith("\n"):
                        part = json.loads(line)
                        parts.setdefault(part["id"], {})[part["sample"]] = part
    rows = {}
    for name, samples in parts.items():
        if name in k_of and all(j in samples for j in range(k_of[name])):
            ordered = [samples[j] for j in range(k_of[name])]
            rows[name] = ordered[0] | {
                key: [part[key] for part in ordered]
                for key in ("response", "verdict", "tokens", "truncated")
            }
    return rows


def consolidate(folder: Path, k_of: dict[str, int]) -> None:
    """Moves the finished questions of all ranks into responses.jsonl, in the benchmarks' order."""
    rows = load_finished(folder, k_of)
    with (folder / "responses.tmp").open("w") as file:
        file.writelines(dump(rows[name]) for name in k_of if name in rows)
    os.replace(folder / "responses.tmp", folder / "responses.jsonl")
    for path in folder.glob("responses.rank*.jsonl"):
        path.unlink()


def table(results: dict[str, dict]) -> str:
    """The printed table: shares in percent, one line a benchmark, then its levels if there are not too many."""
    ks = sorted({k for result in results.values() for k in result["pass"]})
    lines = [
        [
            "bench",
            "rows",
            "k",
            "avg@k",
            "95 % interval",
            *(f"pass@{k}" for k in ks),
            "length",
            "truncated",
            "unparsed",
        ]
    ]
    for name, r in results.items():
        lines.append(
            [
                name,
                str(r["rows"]),
                str(r["k"]),
                f"{r['avg']:.1%}",
                f"{r['low']:.1%} .. {r['high']:.1%}",
                *(f"{r['pass'][k]:.1%}" if k in r["pass"] else "" for k in ks),
                f"{r['length']:.0f}",
                f"{r['truncated']:.1%}",
                f"{r['unparsed']:.1%}",
            ]
        )
        if 1 < len(r["levels"]) <= 20:
            lines += [
                [f"  {level}", str(s["rows"]), "", f"{s['avg']:.1%}"]
                for level, s in r["levels"].items()
            ]
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(lines[0]))]
    text = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    ]
    for name, r in results.items():
        expected = BENCHES[name].rows if name in BENCHES else r["rows"]
        if r["rows"] != expected:
            text.append(f"warning: {name} has {r['rows']} rows, not the {expected} it is known for")
        if r["timeout"] or r["error"]:
            text.append(
                f"note: {r['timeout']:.2%} of {name}'s answers timed out, {r['error']:.2%} ended in an error"
            )
    return "\n".join(text)


# ---------------------------------------------------------------------------------------------------------------------
# Comparing runs of mifo.py, by their config.json and evaluations.jsonl

# Student's t: 97.5 % of the distribution with 1, 2, 3 .. degrees of freedom lie below these
T = (
    12.71,
    4.30,
    3.18,
    2.78,
    2.57,
    2.45,
    2.36,
    2.31,
    2.26,
    2.23,
    2.20,
    2.18,
    2.16,
    2.14,
    2.13,
    2.12,
    2.11,
    2.10,
    2.09,
    2.09,
)
MEASURES = {
    "final": "accuracy at the end",
    "area": "mean accuracy over the RL steps",
    "forgotten": "forgotten in an SFT phase",
    "demonstrations": "demonstrations used",
    "sampled_tokens": "tokens sampled",
}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval by Student's t; NaN for a single value."""
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return mean, math.nan
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, (T[n - 2] if n - 2 < len(T) else 1.96 + 2.5 / (n - 1)) * deviation / math.sqrt(n)


def read_run(folder: Path) -> dict:
    """A run's settings ("config") and measures: MEASURES, sft_phases, "levels" {name: accuracy at the end}, and
    "curve" [(RL step, accuracy)].

    Accuracy is the mean over the benchmarks. area is the curve's mean height by the trapezoid rule; forgotten the mean over
    the SFT phases of the share of what was right just before a phase that no longer is just after, if both were evaluated
    (--eval-sft-phases). Either is None where a run has nothing of the kind. Raises ValueError, naming the folder.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        lines = [
            json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()
        ]
        last = lines[-1]
    except (OSError, ValueError, IndexError) as problem:
        raise ValueError(
            f"{folder}: not the folder of a run with evaluations (mifo.py --evaluate): {problem}"
        ) from None
    curve = [
        (
            line["rl_steps"],
            sum(bench["avg"] for bench in line["benches"].values()) / len(line["benches"]),
        )
        for line in lines
    ]
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in zip(curve, curve[1:]))
    forgotten = []
    for before, after in zip(lines, lines[1:]):
        if before["rl_steps"] == after["rl_steps"] and before["sft_steps"] < after["sft_steps"]:
            pairs = [
                pair
                for name in before["benches"]
                for pair in zip(
                    before["benches"][name]["correct"], after["benches"][name]["correct"]
                )
            ]
            right = sum(b for b, _ in pairs)
            forgotten += [1 - sum(map(min, pairs)) / right] if right else []
    levels = {
        f"{name} {level}" if len(last["benches"]) > 1 else level: accuracy
        for name, bench in last["benches"].items()
        for level, accuracy in bench["levels"].items()
    }
    return {
        "config": config,
        "final": curve[-1][1],
        "levels": levels if len(levels) > 1 else {},
        "curve": curve,
        "area": area / curve[-1][0] if curve[-1][0] else None,
        "forgotten": sum(forgotten) / len(forgotten) if forgotten else None,
        **{key: last[key] for key in ("sft_phases", "demonstrations", "sampled_tokens")},
    }


def labels(configs: list[dict]) -> list[str]:
    """For each run the settings in which any of them differ, less its seed, its folder, and the seed within a path."""

    def plain(config: dict) -> dict:
        seed = re.compile(rf"(?<![0-9]){config['seed']}(?![0-9])")
        return {
            key: seed.sub("SEED", value) if isinstance(value, str) else value
            for key, value in config.items()
            if key not in ("seed", "out", "resume")
        }

    rows = [plain(config) for config in configs]
    differing = [key for key in rows[0] if len({row.get(key) for row in rows}) > 1]
    return [
        " ".join(f"--{key.replace('_', '-')} {row.get(key)}" for key in differing) or "all alike"
        for row in rows
    ]


def comparison(groups: dict[str, list[dict]]) -> str:
    """A Markdown table: a line a group of runs (read_run), mean ± half the 95 % interval over them."""
    levels = list(
        dict.fromkeys(level for runs in groups.values() for run in runs for level in run["levels"])
    )
    columns = {**{key: [] for key in MEASURES}, **{level: [] for level in levels}}
    for runs in groups.values():
        for key, cells in columns.items():
            values = [run["levels"].get(key) if key in levels else run[key] for run in runs]
            values = [value for value in values if value is not None]
            mean, half = interval(values) if values else (math.nan, math.nan)
            form = ",.0f" if key in ("demonstrations", "sampled_tokens") else ".3f"
            cells.append(
                ""
                if math.isnan(mean)
                else f"{mean:{form}}" + ("" if math.isnan(half) else f" ± {half:{form}}")
            )
    head = ["", "runs", *(MEASURES.get(key, f"level {key}") for key in columns)]
    body = [
        [name, str(len(runs)), *(cells[i] for cells in columns.values())]
        for i, (name, runs) in enumerate(groups.items())
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *body]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
        for line in lines
    )


def draw_comparison(groups: dict[str, list[dict]], path: Path, title: str = "") -> None:
    """Curves of the mean accuracy, of few groups with its range; accuracy at the end and forgetting of each run, with mean and
    95 % interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1,
        3,
        figsize=(15, 2.2 + 0.32 * max(6, len(groups))),
        layout="constrained",
        gridspec_kw={"width_ratios": [1.6, 1, 1]},
    )
    colours = plt.get_cmap("tab20")
    for i, (name, runs) in enumerate(groups.items()):
        colour = colours(i % 20)
        steps = sorted({step for run in runs for step, _ in run["curve"]})
        latest = [
            dict(run["curve"]) for run in runs
        ]  # of several evaluations at an RL step, the last
        steps = [step for step in steps if all(step in run for run in latest)]
        heights = [[run[step] for run in latest] for step in steps]
        style = {"color": colour, "linestyle": "-" if i % 2 == 0 else "--", "label": name}
        axes[0].plot(
            steps, [sum(h) / len(h) for h in heights], marker="" if len(steps) > 1 else "o", **style
        )
        if len(runs) > 1 and len(groups) <= 4:
            axes[0].fill_between(
                steps, [min(h) for h in heights], [max(h) for h in heights], color=colour, alpha=0.1
            )
        for axis, key in zip(axes[1:], ("final", "forgotten")):
            values = [run[key] for run in runs if run[key] is not None]
            if values:
                mean, half = interval(values)
                axis.plot(values, [i] * len(values), "o", color=colour, alpha=0.5, markersize=4)
                axis.errorbar(
                    [mean],
                    [i],
                    xerr=[0 if math.isnan(half) else half],
                    fmt="|",
                    color="black",
                    capsize=3,
                )
    axes[0].set(
        xlabel="RL step",
        title="accuracy, mean of the runs" + ", and their range" * (len(groups) <= 4),
    )
    axes[1].set(
        title=MEASURES["final"],
        yticks=range(len(groups)),
        yticklabels=groups,
        ylim=(len(groups) - 0.5, -0.5),
    )
    axes[2].set(
        title=MEASURES["forgotten"],
        yticks=range(len(groups)),
        yticklabels=[],
        ylim=(len(groups) - 0.5, -0.5),
    )
    for axis in axes:
        axis.grid(alpha=0.3)
    for i, label in enumerate(axes[1].get_yticklabels()):
        label.set_color(colours(i % 20))
    if len(groups) <= 12:
        axes[0].legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def command_compare(args) -> None:
    runs = [read_run(folder) for folder in args.runs]
    if len({tuple(run["config"]["evaluate"].split(",")) for run in runs}) > 1:
        raise ValueError("these runs were evaluated on different benchmarks (--evaluate)")
    groups: dict[str, list[dict]] = {}
    for run, label in zip(runs, labels([run["config"] for run in runs])):
        groups.setdefault(label, []).append(run)
    print(comparison(groups))
    draw_comparison(groups, args.out)
    print(f"figure: {args.out}")


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def read_graded(path: Path) -> tuple[list[dict], list[str], list[str]]:
    """(rows, gold answers, kinds) of a file of answers and responses; responses may be no valid
    Unicode. Raises ValueError at the first row that cannot be graded."""
    import data

    rows, golds, kinds = [], [], []
    with tempfile.TemporaryDirectory() as cache:
        source = data.load_rows(str(path), cache_dir=cache)
        for index, row in source:
            gold, kind = data.gold_and_kind(row, "answer")
            fault = ""
            if not gold:
                fault = "the row has no answer"
            elif not isinstance(row.get("response"), str):
                fault = "the row has no response (a string)"
            elif kind not in KINDS:
                fault = f"kind is none of {', '.join(KINDS)}"
            if fault:
                place, columns = source.place(index), str(list(row))
                raise ValueError(f"{place}: {fault}; its columns are {columns:.200}")
            rows.append(row)
            golds.append(gold)
            kinds.append(kind)
    return rows, golds, kinds


def command_grade(args) -> None:
    rows, golds, kinds = read_graded(args.file)
    counts: Counter = Counter()
    out = args.file.with_suffix(".graded.jsonl")
    with (
        Checker(checker_workers(1), args.limit, args.extract, args.require_think) as checker,
        out.open("w") as file,
    ):
        for start in progress(range(0, len(rows), CHUNK), "grading"):
            part = slice(start, start + CHUNK)
            verdicts = checker.check(
                [row["response"] for row in rows[part]], golds[part], kinds[part]
            )
            counts.update(verdicts)
            file.writelines(
                json.dumps({**row, "verdict": v}) + "\n" for row, v in zip(rows[part], verdicts)
            )
    print(f"{out}: {len(rows)} rows")
    for verdict in VERDICTS:
        print(f"{verdict:>10} {counts[verdict]:>8} {counts[verdict] / max(1, len(rows)):>7.1%}")


def checker_workers(world: int) -> int:
    return min(8, max(1, (os.cpu_count() or 1) // world))


def progress(items, label: str):
    """A bar on a terminal; elsewhere a plain line every tenth of the way."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, desc=label)
        return
    for i, item in enumerate(items):
        yield item
        if (i + 1) * 10 // len(items) > i * 10 // len(items):
            print(f"{label}: {i + 1}/{len(items)}", file=sys.stderr, flush=True)


def command_evaluate(args, rank: int, world: int) -> None:
    import data  # noqa: F401  before transformers: it hides packages that break its import
    import torch
    import torch.distributed as dist
    import transformers
    import rollout

    names = args.bench.split(",")
    if len({Path(name).name for name in names}) < len(names):
        raise ValueError(f"--bench {args.bench}: two benchmarks of one name")
    least_of = {
        "--k": (args.k, 1),
        "--max-tokens": (args.max_tokens, 1),
        "--temperature": (args.temperature, 0),
    }
    for flag, (value, least) in least_of.items():
        if value is not None and not value >= least:
            raise ValueError(f"{flag} must be at least {least}, not {value}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        config = transformers.AutoConfig.from_pretrained(args.model)
    except (OSError, ValueError) as problem:
        raise ValueError(
            f"{args.model}: not a model folder or Hub id: {str(problem).splitlines()[0]}"
        ) from None
    benches = {
        name: load_questions(name, tokenizer, args.system, args.generation_prefix) for name in names
    }
    ks = {name: args.k or (BENCHES[name].k if name in BENCHES else 1) for name in names}
    everything = [q for questions in benches.values() for q in questions]
    max_len = max(len(q.prompt) for q in everything) + args.max_tokens
    if max_len > (context := getattr(config, "max_position_embeddings", max_len)):
        raise ValueError(
            f"--max-tokens {args.max_tokens}: with the longest prompt that is {max_len} tokens, but the "
            f"model's context is {context}; at most {context - max_len + args.max_tokens} fit"
        )

    name = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
    weights = [
        [p.name, p.stat().st_size, p.stat().st_mtime_ns]
        for p in sorted(Path(args.model).glob("*.safetensors"))
    ]
    prompts = hashlib.sha256(
        repr([(q.id, q.prompt, q.answer) for q in everything]).encode()
    ).hexdigest()
    settings = (
        {"model": name, "weights": weights, "questions": prompts}
        | {key: value for key, value in vars(args).items() if key != "model"}
        | {"k": list(ks.values())}
    )
    folder = settings.pop("out") or Path("evaluations") / Path(name).name
    unknown = {} if any(folder.glob("responses*.jsonl")) else settings
    before = (
        json.loads((folder / "settings.json").read_text())
        if (folder / "settings.json").exists()
        else unknown
    )
    if changed := [key for key in settings if settings[key] != before.get(key)]:
        old, new = (str(x[changed[0]]) if changed[0] in x else "none" for x in (before, settings))
        raise ValueError(
            f"--out {folder} holds another evaluation: its {', '.join(changed)} differ ({changed[0]} "
            f"there is {old:.80}, here {new:.80}); give another folder"
        )

    if "RANK" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Ranks finish hours apart when their responses differ in length.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            timeout=datetime.timedelta(days=7),
        )
    wait = (lambda: dist.all_reduce(torch.zeros(1))) if world > 1 else (lambda: None)
    wait()  # every rank has read settings.json
    k_of = {q.id: ks[name] for name, questions in benches.items() for q in questions}
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(json.dumps(settings, indent=1))
        consolidate(folder, k_of)
    wait()
    finished = set(load_finished(folder, k_of))
    wait()  # every rank has read the same responses.jsonl
    if finished and rank == 0:
        print(
            f"resuming: {len(finished)} of {len(everything)} questions are finished",
            file=sys.stderr,
        )

    if len(finished) < len(everything):
        dtype = (
            getattr(torch, args.dtype) if args.dtype != "auto" else config.dtype or torch.float32
        )
        sampler = rollout.make_sampler(
            args.sampler,
            args.model,
            max_len=max_len,
            dtype=dtype,
            seed=args.seed,
            eos_ids=eos_ids(args.model, tokenizer),
            gpu_memory_utilization=0.85,
        )
        if rank == 0:
            print(f"sampler: {sampler.name}, because {sampler.why}", file=sys.stderr)
        detokenize = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)
        with (
            Checker(
                checker_workers(world), args.limit, args.extract, args.require_think
            ) as checker,
            (folder / f"responses.rank{rank}.jsonl").open("a") as file,
        ):
            for name, questions in benches.items():
                mine = [q for q in questions if q.id not in finished][rank::world]
                size = max(1, CHUNK // ks[name])
                starts = range(0, len(mine), size)
                for start in progress(starts, name) if rank == 0 else starts:
                    rows = evaluate(
                        sampler,
                        mine[start : start + size],
                        checker,
                        ks[name],
                        args.temperature,
                        args.max_tokens,
                        args.seed,
                        detokenize,
                    )
                    file.writelines(map(dump, rows))
                    file.flush()
    wait()
    if rank == 0:
        consolidate(folder, k_of)
        rows = load_finished(folder, k_of)
        results = {
            name: summarize([rows[q.id] for q in questions]) for name, questions in benches.items()
        }
        (folder / "results.json").write_text(
            json.dumps({"settings": settings, "results": results}, indent=1)
        )
        print(table(results))
        print(f"written to {folder}", flush=True)
    wait()


def eos_ids(model: str, tokenizer) -> list[int]:
    """Every token that ends a response: chat models name several in their generation config."""
    import transformers

    ids = {tokenizer.eos_token_id}
    try:
        named = transformers.GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # a base model need not have one
        named = None
    return sorted((ids | set(named if isinstance(named, list) else [named])) - {None})


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return worker(float(sys.argv[2]))
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    checking = argparse.ArgumentParser(add_help=False)
    checking.add_argument(
        "--extract",
        choices=("boxed", "any"),
        default="boxed",
        help=r"boxed: the last \boxed{} alone; any: Math-Verify's own search over the response",
    )
    checking.add_argument(
        "--limit",
        type=float,
        default=5.0,
        help=f"wall-clock seconds an answer (and {CPU_LIMIT:g} s of computing)",
    )
    checking.add_argument(
        "--require-think", action="store_true", help="the answer must stand after the one </think>"
    )
    command = sys.argv[1] if sys.argv[1:2] in (["grade"], ["compare"]) else ""
    if command == "compare":
        parser = argparse.ArgumentParser(
            prog="eval.py compare",
            description=(
                "Prints a table and draws a figure of finished runs; those that differ in seed alone are one line of it."
            ),
        )
        parser.add_argument(
            "runs", type=Path, nargs="+", help="folders of mifo.py's runs (--out) with --evaluate"
        )
        parser.add_argument(
            "--out", type=Path, default=Path("compare.png"), help="the figure [compare.png]"
        )
        run = command_compare
    elif command == "grade":
        parser = argparse.ArgumentParser(
            prog="eval.py grade",
            parents=[checking],
            description=("Adds a verdict to rows of answer and response, in FILE.graded.jsonl."),
        )
        parser.add_argument(
            "file", type=Path, help="JSON lines with `answer` (gold) and `response`"
        )
        run = command_grade
    else:
        parser = argparse.ArgumentParser(
            prog="eval.py",
            parents=[checking],
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("model", help="folder or Hub id")
        parser.add_argument(
            "--bench",
            required=True,
            help=f"comma-separated: {', '.join(BENCHES)}, chain, or JSONL files of question and answer",
        )
        parser.add_argument(
            "--k", type=int, help="responses a question; default: 32 for AIME and AMC, else 1"
        )
        parser.add_argument("--temperature", type=float, default=0.6)
        parser.add_argument("--max-tokens", type=int, default=8192, help="of a response")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument(
            "--system",
            help=r"system message, as 'Reason step by step, and put your final answer in "
            r"\boxed{}.'; default: none, or the chat template's own",
        )
        parser.add_argument(
            "--generation-prefix", default="", help=r"put at each prompt's end, as $'<think>\n'"
        )
        parser.add_argument("--sampler", choices=("auto", "vllm", "torch"), default="auto")
        parser.add_argument(
            "--dtype",
            choices=("auto", "float32", "bfloat16", "float16"),
            default="auto",
            help="auto: the checkpoint's",
        )
        parser.add_argument(
            "--out", type=Path, help="folder of responses and results; default: evaluations/MODEL"
        )
        run = lambda args: command_evaluate(args, rank, world)
    args = parser.parse_args(sys.argv[2:] if command else None)
    try:
        if command != "compare" and not args.limit > 0:
            raise ValueError(f"--limit must be above 0 seconds, not {args.limit}")
        run(args)
    except ValueError as problem:
        if rank == 0:
            print(f"eval.py: {problem}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    if "RANK" in os.environ:
        os._exit(
            0
        )  # where Python ends a process that still has a process group, gloo at times aborts it if a peer has ended
