r"""Checks answers in killable workers; evaluates a model on benchmarks; grades other responses.

    python eval.py MODEL --bench aime24,aime25,amc,olympiad,math500,mmlu_pro      # paper's table
    torchrun --standalone --nproc-per-node 8 eval.py MODEL --bench math500 --k 4  # on eight ranks
    python eval.py MODEL --bench my.jsonl --out DIR     # rows of question and answer
    python eval.py MODEL --bench my.jsonl --reward my.py:f  # judged by a function of one's own
    python eval.py grade FILE.jsonl --extract any       # rows of answer and response

An answer is found in a response by string search, here, and compared with the gold answer by
Math-Verify, in processes that import nothing but this file and Math-Verify, and that are killed
and replaced when they take too long.
"""

import sys

if sys.version_info < (3, 11):
    sys.stderr.write(f"eval.py: Python 3.11 or newer is needed, this is {sys.version.split()[0]}\n")
    sys.exit(2)

import argparse
import ast
import contextlib
import datetime
import hashlib
import importlib.util
import inspect
import json
import logging
import math
import numbers
import operator
import os
import queue
import re
import select
import signal
import subprocess
import tempfile
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

VERDICTS = ("correct", "wrong", "unparsed", "timeout", "error")


@dataclass(frozen=True)
class Kind:
    """A kind of answer: how it is found in a response, which golds are usable, how both compare."""

    where: str  # in a response the answer stands, in words, for --help
    find: Callable[[str], str | None]  # response -> answer, None if there is none
    gold: str  # a regular expression; Math-Verify, where it compares, must understand the gold, too
    compare: Callable[[str, str], str] | None = None  # (answer, gold) -> verdict; None: Math-Verify


# The functions stand below, hence the lambdas.
KINDS = {
    "math": Kind(r"the last \boxed{}", lambda response: last_boxed(response), ".+"),
    "number": Kind(
        r"the last \boxed{}, else after the last ####, else the last plain number",
        lambda response: number_answer(response),
        ".+",
    ),
    "choice": Kind(
        r"a letter A to J in \boxed{}, else after `answer is`, else alone on the last line",
        lambda response: choice_answer(response),
        "[A-J]",
        lambda answer, gold: compare_text(answer, gold),
    ),
    "chain": Kind(
        "the last [...], as in the embedded task",
        lambda response: chain_answer(response),
        ".+",
        lambda answer, gold: compare_text(answer, gold),
    ),
    "countdown": Kind(
        r"an expression in \boxed{}, else in [...]; a gold answer is like `3 5 7 = 22`",
        lambda response: last_boxed(response) or chain_answer(response),
        "[0-9]+( [0-9]+)* = [0-9]+",
        lambda answer, gold: compare_countdown(answer, gold),
    ),
}

# --------------------------------------------------------------------------------------------------
# Finding the answer in a response. Linear in the response's length, all of it, since it runs in the
# trainer's process.

MAX_ANSWER = 1000  # characters: 20 times MATH-500's longest gold answer; longer ones parse slowly
MAX_NESTING = 10  # of brackets: 2 in MATH-500's gold answers, 5 in its worked solutions
# No answer says the same 20 times over, but for digits.
REPEATS = re.compile(r"(\D.{0,11}?)\1{19}", re.DOTALL)
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
    r"""What the last \boxed{} holds; of nested ones the innermost.

    None: there is none, it is not closed, or it is too long. There is no falling back from a box
    that the token limit has cut off to an earlier one.
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
    r"""A letter A to J: boxed (`\boxed{C. text}`, too), else the last "answer is (C)", else alone
    on the last line."""
    boxed = last_boxed(text)
    if boxed is not None:
        found = BOXED_LETTER.match(re.sub(r"\\[a-z]+|[{}$*\s\\]", "", boxed))
    elif last := deque(ANSWER_IS.finditer(text), maxlen=1):
        found = last[0]
    else:
        found = LAST_LETTER.fullmatch(text.rstrip()[-40:].rpartition("\n")[2])
    return found[found.lastindex] if found else None


def chain_answer(text: str) -> str | None:
    """What the last [...] holds, where the embedded task's worked answers have theirs."""
    start = text.rfind("[", 0, text.rfind("]") + 1)
    return text[start + 1 : text.find("]", start)] if start >= 0 else None


def normalise(answer: str) -> str:
    """On one line, without dollar signs and the punctuation of the sentence around it."""
    line = " ".join(re.sub(r"(?<!\\)\$", "", answer).split())
    return re.sub(r"(?<![\\.,;:\s])[.,;:\s]+$", "", line)


def normalise_gold(gold: str) -> str:
    """A worked solution's gold answer stands after its last ####."""
    return normalise(gold.rpartition("####")[2])


# --------------------------------------------------------------------------------------------------
# Comparing it with the gold answer, as far as that needs no Math-Verify


def compare_text(answer: str, gold: str) -> str:
    return "correct" if answer == gold.strip() else "wrong"


ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def expression_value(text: str) -> Fraction | None:
    """The exact value of + - * / and brackets over whole numbers; None if the text is anything
    else, or divides by zero. The text is parsed, never evaluated."""

    def value(node) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            return ARITHMETIC[type(node.op)](value(node.left), value(node.right))
        raise ValueError

    if len(text) > 200 or not re.fullmatch(r"[0-9+*/() -]+", text) or nesting(text) > MAX_NESTING:
        return None
    try:
        return value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def compare_countdown(answer: str, gold: str) -> str:
    """The expression must use each number once and have the target as its value.

    gold: the numbers and the target, as `3 5 7 = 22`.
    """
    value = expression_value(answer)
    if value is None:
        return "unparsed"
    numbers, _, target = gold.partition("=")
    given, used = (sorted(map(int, re.findall("[0-9]+", text))) for text in (numbers, answer))
    targets = [int(number) for number in re.findall("[0-9]+", target)]
    return "correct" if used == given and targets == [value] else "wrong"


def as_number(answer: str) -> Fraction | None:
    r"""A plain number or fraction, with thousands commas or an escaped dollar sign; None for all
    else (units, \%)."""
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


def compare_plainly(answer: str, gold: str) -> str | None:
    """The verdict on mathematics where strings and plain numbers can tell it; None: they cannot."""
    if not answer or len(answer) > MAX_ANSWER:
        return "unparsed"
    if answer == gold:
        return "correct"
    number, gold_number = as_number(answer), as_number(gold)
    if number is not None and gold_number is not None:
        if number == gold_number:
            return "correct"
        if "." not in answer + gold:  # decimals are rounded before they are compared
            return "wrong"
    words = WORDS.fullmatch(gold)  # Math-Verify reads `east` without \text as e*a*s*t
    if words:
        gold_words = words[1].strip().casefold()
        if gold_words and WORDS.sub(r"\1", answer).strip().casefold() == gold_words:
            return "correct"
    if nesting(answer) > MAX_NESTING or REPEATS.search(answer):
        return "unparsed"
    return None


def after_thinking(response: str) -> str | None:
    """What follows the </think>; None unless there is exactly one, and no <think> after it."""
    thought, *rest = response.split("</think>")
    if len(rest) != 1 or thought.count("<think>") > 1 or "<think>" in rest[0]:
        return None
    return rest[0]


Comparison = tuple[str, str, str]  # how (boxed, any or gold), answer, gold: what a worker is asked


def find_and_compare(response: str, gold: str, kind: Kind, extract: str) -> str | Comparison:
    """The verdict, or the comparison that it takes."""
    if kind.compare:
        answer = kind.find(response)
        return "unparsed" if answer is None else kind.compare(answer, gold)
    gold = normalise_gold(gold)
    if extract == "any":
        return ("any", response, gold) if response.strip() else "unparsed"
    answer = normalise(kind.find(response) or "")
    return compare_plainly(answer, gold) or ("boxed", answer, gold)


class Checker:
    r"""Verdicts on responses; `unparsed` are those in which no answer is found or understood.

    KINDS says where the answer of each kind stands. What plain comparison can tell is decided here;
    all else goes to Math-Verify in a worker process, started when first needed. extract="any" has
    Math-Verify search whole responses of the kinds math and number. require_think: exactly one
    </think>, and the answer after it; a response without is unparsed.

    limit is wall-clock seconds an answer, of which CPU_LIMIT may be spent computing: a worker that
    exceeds either is killed and replaced and its answer a timeout; the answer of a worker that dies
    is an error. Math-Verify's own limits are off, since they cannot stop native code. Answers too
    deep, repetitive or large to be evaluated are unparsed.

    Known of Math-Verify 0.9 and left so: `10\%` equals both `10` and `0.1`, whichever of them is
    gold; units are dropped; `x=5` and `5` are one; `2,3`, `3,2` and `2 \text{ or } 3` are one;
    numbers equal to six decimals are equal where one is written as a decimal.
    """

    kinds = tuple(KINDS)

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
                "a checker needs at least one worker and a limit above 0 s, "
                f"not {workers} and {limit}"
            )
        self.workers, self.limit = workers, limit
        self.extract, self.require_think = extract, require_think
        self.idle = queue.LifoQueue()  # the last that was busy is the first to be so again
        for _ in range(workers):
            self.idle.put(None)  # not started yet

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Ends the workers; a later check starts new ones."""
        for process in [self.idle.get() for _ in range(self.workers)]:
            if process:
                end_worker(process)
            self.idle.put(None)

    def check(self, responses: list[str], golds: list[str], kinds: list[str]) -> list[str]:
        """One verdict a response, in their order. Equal comparisons are made once."""
        self._refuse_unknown(kinds)
        found = []
        for response, gold, kind in zip(responses, golds, kinds, strict=True):
            if self.require_think:
                response = after_thinking(response)
            if response is None:
                found.append("unparsed")
            else:
                found.append(find_and_compare(response, gold, KINDS[kind], self.extract))
        return self._compare(found)

    def check_golds(self, golds: list[str], kinds: list[str]) -> list[str]:
        """`correct` for the gold answers that can be got at all: those that look as their kind's
        must and that Math-Verify, where it compares, understands and finds equal to themselves."""
        self._refuse_unknown(kinds)
        found = []
        for gold, kind in zip(golds, kinds, strict=True):
            gold = normalise_gold(gold)
            if not re.fullmatch(KINDS[kind].gold, gold):
                found.append("unparsed")
            else:
                found.append("correct" if KINDS[kind].compare else ("gold", gold, gold))
        return self._compare(found)

    def _refuse_unknown(self, kinds: list[str]) -> None:
        if unknown := sorted(set(kinds) - set(KINDS)):
            raise ValueError(
                f"kind of answer must be one of {', '.join(KINDS)}, not {', '.join(unknown)}"
            )

    def _compare(self, found: list[str | Comparison]) -> list[str]:
        """The verdicts, with those of the workers in place of the comparisons. One thread a worker,
        and only while this runs; interrupted, it waits for the answers that are being compared."""
        comparisons = list(dict.fromkeys(f for f in found if f not in VERDICTS))
        threads = ThreadPoolExecutor(self.workers)
        try:
            verdicts = dict(zip(comparisons, threads.map(self._ask, comparisons)))
        finally:
            threads.shutdown(cancel_futures=True)
        return [verdicts.get(f, f) for f in found]

    def _ask(self, comparison: Comparison) -> str:
        """An idle worker's verdict. The worker ends with its answer if that takes too long."""
        process, verdict = self.idle.get(), None
        try:
            if process and process.poll() is not None:  # it died while it was idle
                end_worker(process)
                process = None
            process = process or start_worker(self.limit)
            verdict = ask_worker(process, comparison, self.limit)
        finally:
            if process and not verdict:
                end_worker(process)
            self.idle.put(process if verdict else None)
        if not verdict:
            late = verdict is None or process.returncode == -signal.SIGPROF
            verdict = "timeout" if late else "error"
        return verdict


START_LIMIT = 120.0  # seconds for a worker's imports, about one on an idle machine


def start_worker(limit: float) -> subprocess.Popen:
    command, pipe = [sys.executable, __file__, "--worker", str(limit)], subprocess.PIPE
    process = subprocess.Popen(command, bufsize=0, stdin=pipe, stdout=pipe, start_new_session=True)
    os.set_blocking(process.stdin.fileno(), False)
    if not receive(process, START_LIMIT):
        end_worker(process)
        raise RuntimeError(
            "a worker that compares answers did not start; if it died, its message stands above"
        )
    return process


def ask_worker(process: subprocess.Popen, comparison: Comparison, limit: float) -> str | None:
    """The worker's verdict; None if it did not come within limit seconds, "" if the worker died."""
    unsent = memoryview(json.dumps(comparison).encode() + b"\n")
    try:
        while unsent and ready(process.stdin, select.POLLOUT, limit):
            unsent = unsent[os.write(process.stdin.fileno(), unsent) :]
    except BrokenPipeError:
        return ""
    return None if unsent else receive(process, limit)


def receive(process: subprocess.Popen, limit: float) -> str | None:
    """The worker's next line; None and "" as in ask_worker."""
    # Once more after the limit: where this process was held up itself, the verdict may be there.
    if ready(process.stdout, select.POLLIN, limit) or ready(process.stdout, select.POLLIN, 0):
        return os.read(process.stdout.fileno(), 100).decode().strip()
    return None


def ready(pipe, event: int, seconds: float) -> bool:
    poll = select.poll()  # and not select.select, which takes no file descriptor above 1023
    poll.register(pipe, event)
    return bool(poll.poll(1000 * seconds))


def end_worker(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


# --------------------------------------------------------------------------------------------------
# The worker: this file run as a program of its own, so that it neither shares nor imports anything
# of the trainer's. One JSON line in is a comparison, one line out its verdict.

WORKER_MEMORY = 1 << 30  # bytes of address space; a worker takes 0.1 GiB
CPU_LIMIT = 1.0  # seconds of computing an answer, several times the slowest ordinary one
# One of each kind, none of them an answer of MATH-500 or GSM8K: what is measured there must not
# have been parsed before.
# fmt: off
WARM_UP = (
    r"\frac{47\sqrt{83}}{59}", "u^2 - 89uw + 97", "(-173, 211]", r"u = 61 \cdot 73",
    r"\text{warm}", r"479\pi", "307,-311", r"283^\circ", r"[167,173) \cup (179,\infty)",
    r"\begin{pmatrix} 181 \\ -191 \end{pmatrix}", r"(193, \frac{\pi}{197})",
    r"199 \pm \sqrt{223}", "227+229i", r"23.3 \text{ units}", r"239\sqrt{241}",
)
# fmt: on
LARGEST = 10_000  # exponents, arguments of factorials and bounds of sums up to here are evaluated


def worker(limit: float) -> None:
    import resource
    import math_verify  # and not at the top: whoever imports this file need not wait for SymPy

    logging.disable(logging.CRITICAL)
    never_evaluate_text()
    refute_by_value()
    allowed = resource.getrlimit(resource.RLIMIT_AS)[1]
    if sys.platform == "linux" and not 0 <= allowed < WORKER_MEMORY:
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, allowed))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever a library prints is no verdict
    os.dup2(1, 2)
    for text in WARM_UP:  # the parser is slow on the first of each kind
        math_verify.parse(f"${text}$", [math_verify.LatexExtractionConfig()], parsing_timeout=None)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        # Ends this process by SIGPROF, even within native code, on a busy machine no sooner, and
        # with the parent gone.
        signal.setitimer(signal.ITIMER_PROF, min(limit, CPU_LIMIT))
        print(compare_by_math_verify(*json.loads(line)), file=replies, flush=True)


def compare_by_math_verify(how: str, answer: str, gold: str) -> str:
    """Math-Verify's verdict. how: boxed, any (the answer stands somewhere in the text), or gold
    (which must be understood to be correct)."""
    import math_verify

    golds = parse_latex(gold)
    if how == "any":
        either = [math_verify.LatexExtractionConfig(), math_verify.ExprExtractionConfig()]
        found = math_verify.parse(answer, either, parsing_timeout=None)
    else:
        found = parse_latex(answer)
    # What is too large to be evaluated can still be right by its form.
    found = [f for f in found if isinstance(f, str) or f in golds or not too_large(f)]
    golds = [g for g in golds if isinstance(g, str) or g in found or not too_large(g)]
    understood = any(not isinstance(f, str) for f in found)  # and not only cut out
    if how == "gold" and not understood:
        return "unparsed"
    failed = False
    for g in golds:
        for f in found:
            try:
                if math_verify.verify(g, f, timeout_seconds=None, raise_on_error=True):
                    return "correct"
            except Exception:
                failed = True
    if not understood:
        return "unparsed"
    return "error" if failed else "wrong"


@lru_cache(4096)
def parse_latex(text: str) -> list:
    import math_verify
    import sympy

    if re.fullmatch("-?[0-9]+", text):  # as most gold answers are
        return [sympy.Integer(text)]
    latex = [math_verify.LatexExtractionConfig()]
    return math_verify.parse(f"${text}$", latex, parsing_timeout=None)


def never_evaluate_text() -> None:
    """SymPy turns text into Python and evaluates it, even in sympy.Number("12"). All it needs here
    is to read numbers; the plain arithmetic that Math-Verify finds in a response is read as LaTeX
    instead."""
    import math_verify.parser
    import sympy.parsing.sympy_parser
    import sympy.physics.units  # or the first answer to be simplified would wait for it

    def plain_number(text: str, *_, **__):
        if not re.fullmatch(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)", text):
            raise ValueError("model output is never evaluated")
        return sympy.Float(text) if "." in text else sympy.Integer(text)

    def parse_plain(text: str):
        return math_verify.parser.parse_latex_cached(text.replace("**", "^"))

    sympy.parsing.sympy_parser.parse_expr = sympy.parsing.sympy_parser.eval_expr = plain_number
    math_verify.parser.parse_expr_cached = parse_plain


def refute_by_value() -> None:
    """Simplifying is slow at showing that two expressions differ, which their values at one point
    can do at once."""
    import math_verify.grader
    import sympy

    simplified_to_zero = math_verify.grader.sympy_symbolic_eq

    def differ(a, b) -> bool:
        try:
            symbols = sorted(a.free_symbols | b.free_symbols, key=str)
            point = {symbol: sympy.Rational(7 * i + 3, 11) for i, symbol in enumerate(symbols)}
            a, b = (complex(x.subs(point).evalf()) for x in (a, b))
            return 1e-6 < abs(a - b) / (1 + abs(a)) < math.inf
        except Exception:  # no numbers: only simplifying can tell
            return False

    def equal(a, b) -> bool:
        return not differ(a, b) and simplified_to_zero(a, b)

    math_verify.grader.sympy_symbolic_eq = equal


def too_large(expression) -> bool:
    try:
        size(expression)
    except (ArithmeticError, RecursionError):
        return True
    return False


def size(expression) -> float:
    """Roughly the absolute value of a SymPy expression, its variables taken as 1, found without
    evaluating anything.

    Raises ArithmeticError where evaluating would take numbers of much more than LARGEST digits, or
    as many terms.
    """
    import sympy
    from sympy import Product, Sum, binomial, factorial, factorial2, gamma

    matrix = isinstance(expression, sympy.MatrixBase)
    parts = [size(part) for part in (expression.flat() if matrix else expression.args)]
    try:
        if isinstance(expression, (sympy.Number, sympy.NumberSymbol)):
            return abs(float(expression))
        if isinstance(expression, (sympy.Add, sympy.Mul)):
            return sum(parts) if expression.is_Add else math.prod(parts)
        if isinstance(expression, (sympy.Pow, sympy.exp, sympy.MatPow)):
            base, exponent = parts if len(parts) == 2 else (math.e, *parts)
            if exponent > LARGEST:
                raise ArithmeticError("exponent too large")
            negative = expression.args[-1].could_extract_minus_sign()
            return base ** (-exponent if negative else exponent) if base else 0.0
        if isinstance(expression, (factorial, factorial2, binomial, gamma, Sum, Product)):
            if max(parts) > LARGEST:
                raise ArithmeticError("too many factors or terms")
            return math.gamma(max(parts) + 1)
    except OverflowError:
        return math.inf
    return max(parts, default=1.0)


# --------------------------------------------------------------------------------------------------
# Rewards: by the checker, or by functions of one's own (--reward)


RIGHT_ABOVE = 0.5  # the default of --right-above


class RewardError(Exception):
    """What a reward function did wrong, in a line. Only the rank that called it knows."""


@dataclass(frozen=True)
class Rewards:
    """The functions of --reward, which judge in the checker's place."""

    functions: dict[str, Callable]  # by name
    weights: list[float]
    right_above: float  # a response whose reward is higher is right


@lru_cache  # so that a file runs once, however often the flags are looked at
def load_rewards(reward: str, weights: str, right_above: float) -> Rewards | None:
    """The functions of --reward `FILE.py:NAME,...` and their --reward-weights; None without any.

    Imports the files. Raises ValueError, one line, naming the flag.
    """
    if not reward:
        return None
    functions, modules = {}, {}
    for text in reward.split(","):
        file, _, name = text.rpartition(":")
        if not file.endswith(".py") or not name:
            raise ValueError(f"--reward {text}: right would be FILE.py:NAME, several by commas")
        if not Path(file).is_file():
            raise ValueError(f"--reward {text}: there is no file {file}")
        if file not in modules:
            modules[file] = import_file(Path(file))
        if not callable(getattr(modules[file], name, None)):
            raise ValueError(f"--reward {text}: {file} has no function {name}")
        if name in functions:
            raise ValueError(f"--reward {reward}: two functions of one name")
        functions[name] = getattr(modules[file], name)
    try:
        given = weights.split(",") if weights else [1] * len(functions)
        parsed = [float(number) for number in given]
    except ValueError:
        parsed = []
    if len(parsed) != len(functions) or not all(map(math.isfinite, parsed)):
        right = f"{len(functions)} finite numbers by commas, one for each function of --reward"
        raise ValueError(f"--reward-weights {weights}: right would be {right}")
    return Rewards(functions, parsed, right_above)


def check_reward_flags(flags) -> None:
    """Raises ValueError for what does not go together of the checker's flags and these."""
    if flags.reward and (flags.extract != "boxed" or flags.require_think):
        raise ValueError(
            "--extract and --require-think are the checker's, in whose place --reward judges"
        )
    if not flags.reward and (flags.reward_weights or flags.right_above != RIGHT_ABOVE):
        raise ValueError("--reward-weights and --right-above are of use only with --reward")
    if not math.isfinite(flags.right_above):
        raise ValueError(f"--right-above must be finite, not {flags.right_above}")


def import_file(path: Path):
    """The file as a module; it may import its neighbours."""
    name = f"reward_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.append(str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"--reward {path}: not importable: {in_a_line(error)}") from None
    return module


def in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


Sample = tuple[object, str, list[int]]  # a data.Question, a response to it, the response's tokens


def judge(questions, responses, tokens, checker, rewards) -> list[tuple[str, float, dict]]:
    """(verdict, reward, rewards by function) of each response to the question beside it.

    The checker's reward is 1 for `correct`, else 0. With Rewards it is the weighted sum of the
    functions that judged the response, NaN if none did; and the verdict is `correct` above
    right_above, else `wrong`, or `unjudged`. Raises RewardError.
    """
    if rewards is None:
        golds, kinds = [q.answer for q in questions], [q.kind for q in questions]
        return [(v, float(v == "correct"), {}) for v in checker.check(responses, golds, kinds)]
    samples = list(zip(questions, responses, tokens, strict=True))
    names, judged = list(rewards.functions), []
    found = [call_reward(name, rewards.functions[name], samples) for name in names]
    for values in zip(*found):
        terms = [w * v for w, v in zip(rewards.weights, values) if not math.isnan(v)]
        reward = sum(terms) if terms else math.nan
        verdict = "correct" if reward > rewards.right_above else "wrong"
        judged.append((verdict if terms else "unjudged", reward, dict(zip(names, values))))
    return judged


def call_reward(name: str, function: Callable, samples: list[Sample]) -> list[float]:
    """A function's reward of each sample; NaN where it returned None. Raises RewardError, which
    names the question where one alone is to blame."""
    if not samples:
        return []
    values, rewards = [], []
    try:
        returned = function(**reward_arguments(function, samples))
        if isinstance(returned, (str, dict)) or not isinstance(returned, Iterable):
            problem = f"returned {returned!r:.80}, which is no list"
        else:
            values = list(returned)
            rewards = [as_reward(value) for value in values]
            problem = f"returned {len(values)} rewards for a batch of {len(samples)}"
    except Exception as error:
        problem = f"raised {in_a_line(error)}"
    if len(rewards) == len(samples):
        if None not in rewards:
            return rewards
        wrong = rewards.index(None)
        samples, problem = samples[wrong : wrong + 1], f"returned {values[wrong]!r:.80}, no number"
    if half := len(samples) // 2:  # one half, alone, may show whose response it was
        call_reward(name, function, samples[:half])
        call_reward(name, function, samples[half:])
    first, many = samples[0][0].id, f" and {len(samples) - 1} other responses" if half else ""
    raise RewardError(f"--reward {name}: {' '.join(problem.split())}, of question {first}{many}")


def reward_arguments(function: Callable, samples: list[Sample]) -> dict[str, list]:
    """What TRL's GRPOTrainer passes to a reward function, all by keyword: prompts, completions,
    completion_ids, and each column of the rows. Prompts and completions are chat messages where the
    prompt is made by a chat template, else texts. Nothing of TRL's trainer is there. A function
    without **kwargs gets what it names.
    """
    prompts, completions = [], []
    for question, response, _ in samples:
        chat = isinstance(question.asked, list)
        prompts.append(question.asked)
        completions.append([{"role": "assistant", "content": response}] if chat else response)
    columns = dict.fromkeys(column for question, _, _ in samples for column in question.row)
    known = {column: [question.row.get(column) for question, _, _ in samples] for column in columns}
    for name in ("prompt", "completion"):
        known.pop(name, None)
    known |= {"prompts": prompts, "completions": completions}
    known["completion_ids"] = [ids for _, _, ids in samples]
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return known
    return {name: values for name, values in known.items() if name in parameters}


def as_reward(value) -> float | None:
    """A finite number, NaN for None, None for anything else; NumPy's and torch's scalars, too."""
    if value is None:
        return math.nan
    value = value.item() if hasattr(value, "item") else value
    number = float(value) if isinstance(value, numbers.Real) else math.nan
    return number if math.isfinite(number) else None


def try_rewards(rewards: Rewards, question, tokenizer) -> dict[str, float]:
    """Each function's reward of a question's demonstration, of an empty response where it has none.

    Raises ValueError for what would end a run later.
    """
    tokens = question.demonstration or []
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    try:
        [(_, _, by_function)] = judge([question], [text], [tokens], None, rewards)
    except RewardError as error:
        raise ValueError(str(error)) from None  # every rank's
    return by_function


# --------------------------------------------------------------------------------------------------
# Scores


def sft_regime(losses: list[float], delta: float = 0.02, delta2: float = 0.1) -> list[str]:
    """What each held-out loss of an SFT stage tells of RL after it (arXiv 2512.11470).

    losses in order, from before the first step on; with L their minimum:
      stable    from the first loss of at most (1 + delta) * L to the last one
      adaptive  before that: SFT has still to teach
      mild      after it, while losses are below (1 + delta2) * L
      severe    from the first one after it that is not: overfitted
    To start RL where it is stable is best by that paper, adaptive and severe cost most. The minimum
    is of the losses given: where they still fall at the end, the end looks stable. [] for [].
    """
    low = min(losses, default=0.0)
    stable = [i for i, loss in enumerate(losses) if loss <= (1 + delta) * low]
    regimes, severe = [], False
    for i, loss in enumerate(losses):
        if i < stable[0]:
            regimes.append("adaptive")
        elif i <= stable[-1]:
            regimes.append("stable")
        else:
            severe = severe or loss >= (1 + delta2) * low
            regimes.append("severe" if severe else "mild")
    return regimes


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): the unbiased chance that one of k samples is correct, of n of which
    c are.

    Chen et al. 2021, arXiv 2107.03374, equation 1. Raises ValueError unless 0 <= c <= n and
    1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1.0 - math.prod((n - c - i) / (n - i) for i in range(k))


def avg_at_k(
    scores: list[float], seed: int = 0, resamples: int = 2000
) -> tuple[float, float, float]:
    """Mean of the questions' accuracies [Q] with the bounds of its 95 % bootstrap interval over
    questions."""
    import numpy as np

    scores, rng = np.asarray(scores, dtype=np.float64), np.random.default_rng(seed)
    means = [scores[rng.integers(len(scores), size=len(scores))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(scores.mean()), float(low), float(high)


def question_seed(seed: int, question_id: str) -> int:
    """Depends on nothing else, so that neither order, world size nor resuming changes what is
    sampled. 31 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{question_id}".encode()).digest()[:4], "big") >> 1


def evaluate(
    sampler,
    questions: list,
    checker: Checker,
    k: int,
    temperature: float,
    max_tokens: int,
    seed: int,
    detokenize: Callable[[list[int]], str],
    rank: int = 0,
    world: int = 1,
    rewards: Rewards | None = None,
) -> list[dict]:
    """Samples k responses to each of this rank's questions (every world-th) and judges them.

    Returns a row a question. No rank waits for another; to summarise, gather the rows of all.
    Raises RewardError.
    """
    questions = questions[rank::world]
    if not questions:
        return []
    seeds = [question_seed(seed, q.id) for q in questions]
    groups = sampler.sample([q.prompt for q in questions], k, seeds, max_tokens, temperature)
    tokens = [sample.tokens for group in groups for sample in group]  # Q * k
    responses = [detokenize(ids) for ids in tokens]
    asked = [q for q in questions for _ in range(k)]
    judged = judge(asked, responses, tokens, checker, rewards)
    rows = []
    for i, (q, group) in enumerate(zip(questions, groups)):
        mine = slice(i * k, (i + 1) * k)
        row = {"id": q.id, "level": q.level, "kind": q.kind, "answer": q.answer}
        row |= {"response": responses[mine], "verdict": [verdict for verdict, _, _ in judged[mine]]}
        if rewards:
            row["reward"] = [None if math.isnan(r) else r for _, r, _ in judged[mine]]
        row["tokens"] = [len(sample.tokens) for sample in group]
        row["truncated"] = [sample.truncated for sample in group]
        rows.append(row)
    return rows


def summarize(rows: list[dict]) -> dict:
    """avg@k with its interval, unbiased pass@1, 2, 4 .. k, mean length, shares of truncation and of
    each verdict; with reward functions also the mean reward.

    What they did not judge counts in lengths and shares alone. Raises RewardError if that is all.
    """
    if not rows:
        raise ValueError("no questions to summarise")
    counts, judged = [], []
    for row in rows:
        n = len(row["verdict"]) - row["verdict"].count("unjudged")
        if n:
            judged.append(row)
            counts.append((n, row["verdict"].count("correct")))
    if not judged:
        raise RewardError("--reward: None for every response to a benchmark: nothing was judged")
    k = min(n for n, _ in counts)
    accuracies = [c / n for n, c in counts]
    average, low, high = avg_at_k(accuracies)
    levels: dict[str, list[float]] = {}
    for accuracy, row in zip(accuracies, judged):
        levels.setdefault(str(row["level"]), []).append(accuracy)
    lengths = [length for row in rows for length in row["tokens"]]
    truncated = [cut for row in rows for cut in row["truncated"]]
    verdicts = Counter(verdict for row in rows for verdict in row["verdict"])
    summary = {"rows": len(rows), "k": k, "avg": average, "low": low, "high": high, "pass": {}}
    for j in sorted({1 << i for i in range(k.bit_length())} | {k}):
        summary["pass"][j] = sum(pass_at_k(n, c, j) for n, c in counts) / len(counts)
    summary["length"] = sum(lengths) / len(lengths)
    summary["truncated"] = sum(truncated) / len(truncated)
    for verdict in VERDICTS:
        summary[verdict] = verdicts[verdict] / verdicts.total()
    if "reward" in rows[0]:
        rewards = [r for row in judged for r in row["reward"] if r is not None]
        summary["reward"] = sum(rewards) / len(rewards)
        summary["unjudged"] = verdicts["unjudged"] / verdicts.total()
    summary["levels"] = {
        level: {"rows": len(s), "avg": sum(s) / len(s)} for level, s in sorted(levels.items())
    }
    return summary


def table(results: dict[str, dict]) -> str:
    """The printed table: shares in percent, one line a benchmark, then its levels if there are not
    too many."""
    ks = sorted(set().union(*(result["pass"] for result in results.values())))
    passes = [f"pass@{k}" for k in ks]
    own = any("reward" in result for result in results.values())
    header = ["bench", "rows", "k", *["reward"] * own, "avg@k", "95 % interval", *passes]
    lines = [[*header, "length", "truncated", "unparsed"]]
    for name, r in results.items():
        line = [name, str(r["rows"]), str(r["k"])]
        line += [f"{r['reward']:.3f}"] if own else []
        line.append(f"{r['avg']:.1%}")
        line.append(f"{r['low']:.1%} .. {r['high']:.1%}")
        line += [f"{r['pass'][k]:.1%}" if k in r["pass"] else "" for k in ks]
        line += [f"{r['length']:.0f}", f"{r['truncated']:.1%}", f"{r['unparsed']:.1%}"]
        lines.append(line)
        if 1 < len(r["levels"]) <= 20:
            for level, s in r["levels"].items():
                lines.append([f"  {level}", str(s["rows"]), "", *[""] * own, f"{s['avg']:.1%}"])
    widths = [0] * len(lines[0])
    for line in lines:
        for i, cell in enumerate(line):
            widths[i] = max(widths[i], len(cell))
    text = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths)]
        cells[0] = line[0].ljust(widths[0])
        text.append("  ".join(cells).rstrip())
    for name, r in results.items():
        if name in BENCHES and r["rows"] != BENCHES[name].rows:
            known = BENCHES[name].rows
            text.append(f"warning: {name} has {r['rows']} rows, not the {known} it is known for")
        if r["timeout"] or r["error"]:
            timeouts, errors = f"{r['timeout']:.2%}", f"{r['error']:.2%}"
            text.append(f"note: {timeouts} of {name}'s answers timed out, {errors} were errors")
    return "\n".join(text)


# --------------------------------------------------------------------------------------------------
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


def load_questions(
    name: str,
    tokenizer,
    system: str | None,
    generation_prefix: str,
    rewarded: bool = False,
    **style,
) -> list:
    """A benchmark's questions, ready to sample from. name: one of BENCHES, `chain`, or a file.

    system, generation_prefix and style (template, today) are those of data.render_prompt.

    Rows are read as data.row_reader reads training rows, less their demonstrations; a row that
    cannot be used is an error. rewarded: for reward functions, as in data.load_questions.
    """
    import data

    style |= {"system": system, "generation_prefix": generation_prefix}
    if name == "chain":
        questions = data.embedded_questions(tokenizer, "eval", data.EVAL_TERMS, CHAINS)
        for i, question in enumerate(questions):
            question.id = f"chain/{i}"
        return questions
    if name in BENCHES:
        bench = BENCHES[name]
        rows = data.load_rows(bench.hub, bench.split, bench.config)
        read = data.row_reader(rows, bench.question, bench.answer, rewarded=rewarded)
    elif Path(name).suffix in data.FILES:
        rows = data.load_rows(name)
        read = data.row_reader(rows, rewarded=rewarded)
    else:
        known = f"{', '.join(BENCHES)}, chain, and {', '.join(data.FILES)} files"
        raise ValueError(f"--bench {name}: unknown; known are {known}")
    questions = []
    for index, row in rows:
        example = read(index, row)
        if fault := data.example_fault(example, () if rewarded else KINDS, rewarded):
            raise ValueError(f"{rows.place(index)}: {fault}; its columns are {list(row)!s:.200}")
        questions.append(
            data.Question(
                id=f"{Path(name).name}/{len(questions)}",
                prompt=data.render_prompt(tokenizer, example.messages, **style),
                answer=example.answer,
                demonstration=None,
                level=example.level,
                kind=example.kind,
            )
        )
        if rewarded:
            questions[-1].row = rows.row(index)
            questions[-1].asked = data.asked(tokenizer, example.messages, **style)
    return questions


# --------------------------------------------------------------------------------------------------
# The folder of an evaluation: settings.json, of each rank a responses-RANK.jsonl that only grows
# (one line a response), and results.json.

CHUNK = 1024  # responses sampled at a time and a rank: what an interruption costs at most
OF_A_RESPONSE = ("response", "verdict", "reward", "tokens", "truncated")  # reward: with --reward


def question_lines(row: dict) -> str:
    """A question's row as JSON lines, one a response. ASCII, so that any string survives."""
    question = {"bench": row["id"].rpartition("/")[0]}
    question |= {key: row[key] for key in ("id", "level", "kind", "answer")}
    lines = []
    for sample in range(len(row["verdict"])):
        response = {key: row[key][sample] for key in OF_A_RESPONSE if key in row}
        lines.append(json.dumps({**question, "sample": sample, **response}) + "\n")
    return "".join(lines)


def finished_questions(folder: Path, ks: dict[str, int]) -> dict[str, dict]:
    """The rows of the questions that have all their responses, whichever ranks wrote them.

    ks: the number of responses to a question, by its id. A half-written last line is left out.
    """
    samples: dict[str, dict[int, dict]] = {}
    for path in sorted(folder.glob("responses-*.jsonl")):
        with path.open() as file:
            for line in file:
                if line.endswith("\n"):
                    response = json.loads(line)
                    samples.setdefault(response["id"], {})[response["sample"]] = response
    rows = {}
    for question_id, k in ks.items():
        if len(samples.get(question_id, {})) == k:
            responses = [samples[question_id][j] for j in range(k)]
            row = {key: responses[0][key] for key in ("id", "level", "kind", "answer")}
            for key in OF_A_RESPONSE:
                if key in responses[0]:
                    row[key] = [response[key] for response in responses]
            rows[question_id] = row
    return rows


def open_responses(folder: Path, rank: int):
    """Opened for appending after the last whole line; the rest of it a killed process left."""
    path = folder / f"responses-{rank}.jsonl"
    path.touch()
    whole, newline, _ = path.read_bytes().rpartition(b"\n")
    os.truncate(path, len(whole + newline))
    return path.open("a")


# --------------------------------------------------------------------------------------------------
# Evaluating a model


@dataclass
class Evaluation:
    """What is known, and has been checked, before any weights are loaded."""

    args: argparse.Namespace
    tokenizer: object
    benches: dict[str, list]  # questions by benchmark
    ks: dict[str, int]  # responses to a question, by benchmark
    max_len: int  # tokens of the longest prompt and its response
    rewards: Rewards | None
    dtype: object  # of the model's weights
    settings: dict  # on which the responses depend
    folder: Path

    def finished(self) -> dict[str, dict]:
        """The rows of the finished questions, by id."""
        ks = {q.id: self.ks[name] for name, questions in self.benches.items() for q in questions}
        return finished_questions(self.folder, ks)


def command_evaluate(args) -> None:
    import data  # noqa: F401  before transformers: it hides packages that break its import
    import torch
    import torch.distributed as dist

    evaluation = check_evaluation(args)
    finished = evaluation.finished()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if "RANK" in os.environ:
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Ranks finish hours apart when their responses differ in length.
        long = datetime.timedelta(days=7)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=long)
    wait = (lambda: dist.all_reduce(torch.zeros(1))) if world > 1 else (lambda: None)
    wait()  # every rank has read the folder
    if rank == 0:
        evaluation.folder.mkdir(parents=True, exist_ok=True)
        settings = json.dumps(evaluation.settings, indent=1)
        (evaluation.folder / "settings.json").write_text(settings)
    wait()  # there is a folder to write to
    run_evaluation(evaluation, set(finished), rank, world)
    wait()  # every rank has written its responses
    if rank == 0:
        report(evaluation)


def check_evaluation(args) -> Evaluation:
    """Reads the questions. Raises ValueError for whatever can be known to be wrong by now."""
    import torch

    names = args.bench.split(",")
    if len({Path(name).name for name in names}) < len(names):
        raise ValueError(f"--bench {args.bench}: two benchmarks of one name")
    for flag, least in (("k", 1), ("max_tokens", 1), ("temperature", 0)):
        value = getattr(args, flag)
        if value is not None and not value >= least:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least {least}, not {value}")
    check_reward_flags(args)
    rewards = load_rewards(args.reward, args.reward_weights, args.right_above)
    config, tokenizer = read_model(args.model)
    folder = args.out or Path("evaluations") / Path(args.model).resolve().name
    today = first_day(folder)
    benches, ks = {}, {}
    for name in names:
        benches[name] = load_questions(
            name,
            tokenizer,
            args.system,
            args.generation_prefix,
            rewarded=rewards is not None,
            today=today,
        )
        if rewards:
            try_rewards(rewards, benches[name][0], tokenizer)
        ks[name] = args.k or (BENCHES[name].k if name in BENCHES else 1)
    longest = max(len(q.prompt) for questions in benches.values() for q in questions)
    max_len = longest + args.max_tokens
    context = getattr(config, "max_position_embeddings", max_len)
    if max_len > context:
        raise ValueError(
            f"--max-tokens {args.max_tokens}: with the longest prompt that is {max_len} tokens, "
            f"but the model's context is {context}; at most {context - longest} fit"
        )
    dtype = torch.bfloat16 if torch.cuda.is_available() else config.dtype or torch.float32
    if args.dtype != "auto":
        dtype = getattr(torch, args.dtype)
    settings = evaluation_settings(args, benches, ks, dtype) | {"date": str(today)}
    check_folder(folder, settings)
    return Evaluation(
        args=args,
        tokenizer=tokenizer,
        benches=benches,
        ks=ks,
        max_len=max_len,
        rewards=rewards,
        dtype=dtype,
        settings=settings,
        folder=folder,
    )


def first_day(folder: Path) -> datetime.date:
    """When the evaluation in the folder began: some chat templates write the date, and one that
    goes on must have the prompts it began with."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        settings = json.loads((folder / "settings.json").read_text())
        return datetime.date.fromisoformat(settings["date"])
    return datetime.date.today()


def evaluation_settings(args, benches: dict[str, list], ks: dict[str, int], dtype) -> dict:
    """All on which the responses depend, as settings.json holds it."""
    folder = Path(args.model)
    weights = []
    for path in sorted(folder.glob("*.safetensors")):
        weights.append([path.name, path.stat().st_size, path.stat().st_mtime_ns])
    prompts = [(q.id, q.prompt, q.answer) for questions in benches.values() for q in questions]
    settings = {
        "model": str(folder.resolve()) if folder.is_dir() else args.model,
        "weights": weights,
        "questions": hashlib.sha256(repr(prompts).encode()).hexdigest(),
    }
    flags = {key: value for key, value in vars(args).items() if key not in ("model", "out")}
    own = {"k": list(ks.values()), "dtype": str(dtype).removeprefix("torch.")}
    return settings | flags | own


def check_folder(folder: Path, settings: dict) -> None:
    """Raises ValueError if the folder holds the responses of another evaluation."""
    path = folder / "settings.json"
    if not path.exists() and not any(folder.glob("responses-*.jsonl")):
        return
    there = json.loads(path.read_text()) if path.exists() else {}
    changed = [key for key, value in settings.items() if there.get(key) != value]
    if changed:
        old, new = there.get(changed[0], "none"), settings[changed[0]]
        raise ValueError(
            f"--out {folder} holds another evaluation: its {', '.join(changed)} differ "
            f"({changed[0]} there is {old!s:.80}, here {new!s:.80}); give another folder"
        )


def run_evaluation(evaluation: Evaluation, finished: set[str], rank: int, world: int) -> None:
    """Samples and checks this rank's share of the questions that are not finished."""
    import rollout

    args, tokenizer = evaluation.args, evaluation.tokenizer
    total = sum(map(len, evaluation.benches.values()))
    if finished and rank == 0:
        print(f"resuming: {len(finished)} of {total} questions are finished", file=sys.stderr)
    if len(finished) == total:
        return
    sampler = rollout.make_sampler(
        args.sampler,
        args.model,
        max_len=evaluation.max_len,
        dtype=evaluation.dtype,
        seed=args.seed,
        eos_ids=eos_ids(args.model, tokenizer),
        gpu_memory_utilization=0.85,
    )
    if rank == 0:
        dtype = evaluation.settings["dtype"]
        print(f"sampler: {sampler.name}, {dtype}, because {sampler.why}", file=sys.stderr)
    detokenize = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)
    checker = Checker(checker_workers(world), args.limit, args.extract, args.require_think)
    with checker, open_responses(evaluation.folder, rank) as file:
        for name, questions in evaluation.benches.items():
            k = evaluation.ks[name]
            mine = [q for q in questions if q.id not in finished][rank::world]
            size = max(1, CHUNK // k)  # questions at a time
            starts = range(0, len(mine), size)
            for start in progress(starts, name) if rank == 0 else starts:
                rows = evaluate(
                    sampler,
                    mine[start : start + size],
                    checker,
                    k,
                    args.temperature,
                    args.max_tokens,
                    args.seed,
                    detokenize,
                    rewards=evaluation.rewards,
                )
                file.writelines(map(question_lines, rows))
                file.flush()


def report(evaluation: Evaluation) -> None:
    """Writes results.json and prints the table."""
    rows = evaluation.finished()
    results = {}
    for name, questions in evaluation.benches.items():
        results[name] = summarize([rows[q.id] for q in questions])
    text = json.dumps({"settings": evaluation.settings, "results": results}, indent=1)
    (evaluation.folder / "results.json").write_text(text)
    print(table(results))
    print(f"written to {evaluation.folder}", flush=True)


def read_model(name: str, trust_remote_code: bool = False):
    """(configuration, tokenizer) of a folder or Hub id. Raises ValueError, one line."""
    import transformers

    folder, remote = Path(name), trust_remote_code
    if trained := sorted(folder.glob("checkpoints/step-*/model")):
        raise ValueError(f"{name}: a run's folder, not a model's; right would be {trained[-1]}")
    if not folder.exists() and (folder.is_absolute() or name.count("/") > 1):
        raise ValueError(f"{name}: there is no such folder")
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=remote)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=remote)
    except (OSError, ValueError) as problem:
        reason = str(problem).splitlines()[0]
        raise ValueError(f"{name}: not a model's folder or Hub id: {reason}") from None
    return config, tokenizer


def eos_ids(model: str, tokenizer) -> list[int]:
    """Every token that ends a response: chat models name several in their generation config."""
    import transformers

    ids = {tokenizer.eos_token_id}
    try:
        named = transformers.GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # a base model need not have one
        named = None
    return sorted((ids | set(named if isinstance(named, list) else [named])) - {None})


def line_breaks(text: str) -> str:
    r"""A flag's text as it is meant: no shell makes a line break of the \n in '<think>\n'."""
    return text.replace(r"\n", "\n")


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


# --------------------------------------------------------------------------------------------------
# The commands


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
    checker = Checker(checker_workers(1), args.limit, args.extract, args.require_think)
    with checker, out.open("w") as file:
        for start in progress(range(0, len(rows), CHUNK), "grading"):
            part = slice(start, start + CHUNK)
            responses = [row["response"] for row in rows[part]]
            verdicts = checker.check(responses, golds[part], kinds[part])
            counts.update(verdicts)
            for row, verdict in zip(rows[part], verdicts):
                file.write(json.dumps({**row, "verdict": verdict}) + "\n")
    print(f"{out}: {len(rows)} rows")
    for verdict in VERDICTS:
        print(f"{verdict:>10} {counts[verdict]:>8} {counts[verdict] / max(1, len(rows)):>7.1%}")


def evaluate_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("model", help="folder or Hub id")
    known = ", ".join(BENCHES)
    add("--bench", required=True, help=f"comma-separated: {known}, chain, or JSONL files")
    add("--k", type=int, help="responses a question; default: 32 for AIME and AMC, else 1")
    add("--temperature", type=float, default=0.6)
    add("--max-tokens", type=int, default=8192, help="of a response")
    add("--seed", type=int, default=0)
    add(
        "--system",
        help="system message, as 'Reason step by step, and put your final answer in "
        r"\boxed{}.'; default: none, or the chat template's own",
    )
    prefix = r"ends each prompt, as '<think>\n'"
    add("--generation-prefix", default="", type=line_breaks, help=prefix)
    add("--sampler", choices=("auto", "vllm", "torch"), default="auto")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    meaning = "auto: bfloat16 on GPUs, as in training; elsewhere the checkpoint's"
    add("--dtype", choices=dtypes, default="auto", help=meaning)
    add("--out", type=Path, help="folder of responses and results; default: evaluations/MODEL")
    add("--reward", default="", help="FILE.py:NAME,..: reward functions in the checker's place")
    add("--reward-weights", default="", help="of several, by commas; default: 1 each")
    above = "a response whose reward is higher is right"
    add("--right-above", type=float, default=RIGHT_ABOVE, help=above)
    add_checker_flags(parser)
    return parser


def grade_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eval.py grade",
        description="Adds a verdict to rows of answer and response, in FILE.graded.jsonl.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    columns = "JSON lines with `answer` (gold) and `response`"
    parser.add_argument("file", type=Path, help=columns)
    add_checker_flags(parser)
    return parser


def add_checker_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--extract",
        choices=("boxed", "any"),
        default="boxed",
        help=r"boxed: the last \boxed{} alone; any: Math-Verify's own search over the response",
    )
    limit = f"wall-clock seconds an answer (and {CPU_LIMIT:g} s of computing)"
    add("--limit", type=float, default=5.0, help=limit)
    think = "the answer must stand after the one </think>"
    add("--require-think", action="store_true", help=think)
    kinds = [f"  {name:10} {kind.where}" for name, kind in KINDS.items()]
    parser.epilog = "\n".join(["where an answer of each kind stands in a response:", *kinds])


def fail(program: str, error: Exception, refusal: type, code: int, place: str = "") -> int:
    """Says in a line what is wrong, and returns the exit code: `code` for a refusal, else 1.

    A refusal is an error of that type raised by these files: all ranks have it, and rank 0 says it.
    Any other may be a rank's own: each says it with its number and, if it is neither the system's
    nor a reward function's, with a traceback.

    Under torchrun that line would not be the last: 25 of torchrun's own follow. It shows at their
    end what a rank has left in its error file (torch.distributed.elastic.multiprocessing.errors).
    """
    rank = os.environ.get("RANK", "0")
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    here = Path(__file__).resolve().parent
    refused = isinstance(error, refusal) and Path(raised_in).resolve().parent == here
    message = f"{program}: {error}"
    if not refused:
        code = 1
        message = f"{program}: rank {rank}{place}: {type(error).__name__}: {error}"
        if not isinstance(error, (OSError, RewardError)):
            traceback.print_exception(error)
    if not refused or rank == "0":
        print(message, file=sys.stderr, flush=True)
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        error = {"message": message, "extraInfo": {"timestamp": int(time.time())}}
        with contextlib.suppress(OSError):  # a full disk may be what there is to report
            Path(error_file).write_text(json.dumps({"message": error}))
    return code


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        worker(float(sys.argv[2]))
        return 0
    grade = sys.argv[1:2] == ["grade"]
    args = grade_parser().parse_args(sys.argv[2:]) if grade else evaluate_parser().parse_args()
    try:
        if not args.limit > 0:
            raise ValueError(f"--limit must be above 0 seconds, not {args.limit}")
        command_grade(args) if grade else command_evaluate(args)
        return 0
    except Exception as error:
        return fail("eval.py", error, ValueError, 2)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    if "RANK" in os.environ:
        # Where Python ends a process that still has a process group, gloo at times aborts it if a
        # peer has ended.
        os._exit(code)
    sys.exit(code)
