r"""Checks answers in killable workers; evaluates a model on benchmarks; grades other responses.

    python eval.py MODEL --bench aime24,aime25,amc,olympiad,math500,mmlu_pro      # paper's table
    torchrun --standalone --nproc-per-node 8 eval.py MODEL --bench math500 --k 4  # on eight ranks
    python eval.py MODEL --bench my.jsonl --out DIR     # rows of question and answer
    python eval.py MODEL --bench my.jsonl --reward my.py:f  # judged by a function of one's own
    python eval.py TEACHER --bench my.jsonl --k 8 --demonstrations taught.jsonl  # for mifo.py
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
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

VERDICTS = ("correct", "wrong", "unparsed", "timeout", "error")


@dataclass(frozen=True)
class Kind:
    """A kind of answer. Training, evaluation, `grade`, --help and the README's table go by this."""

    answer: str  # what a gold answer is, in words
    where: str  # in a response the answer stands, in words
    find: Callable[[str], str | None]  # response -> answer, None if there is none
    # A row's gold answer -> as it is compared, None if nothing can equal it; Math-Verify, where it
    # compares, must understand it, too.
    gold: Callable[[str], str | None]
    compare: Callable[[str, str], str] | None = None  # (answer, gold) -> verdict; None: Math-Verify


# The functions stand below, hence the lambdas.
KINDS = {
    "math": Kind(
        "a number or a formula",
        r"the last `\boxed{}`, equal as mathematics",
        lambda response: last_boxed(response),
        lambda gold: math_gold(gold),
    ),
    "number": Kind(
        "a number",
        r"the last `\boxed{}`, else after the last `####`, else the last number",
        lambda response: number_answer(response),
        lambda gold: math_gold(gold) if re.search("[0-9]", gold) else None,
    ),
    "choice": Kind(
        "a letter, A to Z",
        r"a letter in `\boxed{}`, else after `answer is`, else alone on the last line",
        lambda response: choice_answer(response),
        lambda gold: boxed_letter(gold),
        lambda answer, gold: compare_text(answer, gold),
    ),
    "chain": Kind(
        "any text",
        "the last `[...]`, as in the embedded task",
        lambda response: chain_answer(response),
        lambda gold: gold.strip() or None,
        lambda answer, gold: compare_text(answer, gold),
    ),
    "countdown": Kind(
        "numbers and target, `3 5 7 = 22`",
        r"an expression in `\boxed{}`, else in `[...]`, that uses each number once",
        lambda response: last_boxed(response) or chain_answer(response),
        lambda gold: gold if re.fullmatch("[0-9]+( [0-9]+)* = [0-9]+", gold) else None,
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
# A box without braces holds a number, or a letter alone.
BOX = re.compile(r"\\(?:boxed|fbox)\s{0,4}(?:(\{)|([-+]?\.?[0-9][0-9.,/]*|[A-Za-z](?=[\s$.,)]*$)))")
BOXES = 100  # of which all but the first are empty: as far back as a filled one is looked for
EMPTY = re.compile(r"(?:[\s~${}]|\\[,;:! ]|\\text)*")
BRACES = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace does not count
# The longest piece of prose that reads as a number, such as -1,234.5 or 2 2/3 or 3.5e6 or 10^{-3}
# or 2√3 or 62.5%: what it is worth, comparing must tell. Nothing in it is tried a second time
# (?> and ++), and none begins within a word, a power or a formula.
GROUPED = r"[0-9]{1,3}(?:(?:,[0-9]{3})++|(?: [0-9]{3})++)(?![0-9])"  # 1,234 or 1 234
DIGITS = rf"(?>(?:{GROUPED}|[0-9]++)(?:\.[0-9]++)?|\.[0-9]++)"
GROUP = r"\{[^{}\n]{1,40}\}"
POWER = rf" ?\^ ?(?:{GROUP}|\([^()\n]{{1,40}}\)|-?[0-9]++)"
ROOT = rf"\\?sqrt(?:\[[0-9]\])?(?:{GROUP}|\([^()\n]{{1,40}}\))"
ATOM = (
    rf"(?>{DIGITS}|{POWER}|_(?:{GROUP}|[0-9]++)|\\[dt]?frac{GROUP}{GROUP}|{ROOT}|\\pi\b"
    r"|[π√½¼¾⅓⅔⁰¹²³⁴-⁹⁻])"
)
JOIN = (
    r"(?>\*\*| \*\* |\s?(?:\\times|\\cdot|[×·*]|x(?= ?10\^))\s?-?| ?[-+−–/⁄] ?|:"
    r"|[eE][-+]?(?=[0-9])| (?=[0-9]{1,4}/[0-9]))?"
)
SCALES = {"hundred": r"10^{2}", "thousand": r"10^{3}", "million": r"10^{6}", "billion": r"10^{9}"}
SCALES |= {"trillion": r"10^{12}", "dozen": "12"}
SCALE = rf"(?i:({'|'.join(SCALES)})s?)\b"
NUMBER = re.compile(
    rf"(?:(?<![\w.)}}^/+−-])[-−–+]|(?<=[=:] )[-−–] |(?<![\w.^/+−-])(?<![\^_}}]\{{)(?<![\w^]\())\\?\$?"
    rf"{ATOM}(?:{JOIN}{ATOM})*+(?:\s?\\?%|[A-Za-z](?!\w)| {SCALE})?"
)
PLAIN_NUMBER = re.compile(
    r"([-+]?)((?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
)
POWER_OF_TEN = re.compile(
    r"([-+]?)\{?(?:([0-9]+(?:\.[0-9]*)?|\.[0-9]+) ?\\times ?)?"
    r"10 ?\^ ?(?:\{ ?(-?[0-9]{1,3}) ?\}|([0-9]{1,3}))\}?"
)
FRACTION = re.compile(
    r"([-+]?)(?:\\[dt]?frac(?:\{([0-9]+)\}|([0-9]))(?:\{([0-9]+)\}|([0-9]))|([0-9]+)/([0-9]+))"
)
# A and I are also words: bare, they are answers only where the sentence ends.
LETTER = r"([B-HJ-Z](?![\w'+-])|[AI](?=\**\s{0,4}(?:[.,;:)}\]$*\n]|$|or\b|and\b)))"
ANSWER_IS = re.compile(
    r"(?i:answer|option|choice)\**(?i:\s{1,4}is\b|\s{0,4}:)[\s:*]{0,6}(?i:(?:option|choice)\s)?"
    rf"[*$\\(\[]{{0,4}}(?:(?:text|textbf|mathrm|mathbf)\{{\(?)?(?:(?<=\()([A-Za-z])(?=\))|{LETTER})"
)
LAST_LETTER = re.compile(r"[\s*$(\[]{0,8}([A-Z])[\s*$).\]]{0,8}|\(([a-z])\)[\s.]{0,4}")
BOXED_LETTER = re.compile(
    r"(?i:(?:the )?(?:correct )?(?:answer|option|choice)(?: is)?:? )?"
    r"(?:[(\[] ?([A-Za-z]) ?[)\]]|([A-Za-z])(?= ?[.,;:/&)\]]| -+ | (?:or|and)\b|$))"
)
# What joins a second letter to the first, or that it stands beside it
SECOND = re.compile(
    rf"[\s*$)}}\]]{{0,6}}(?:,? ?(?:or|and|to|through)\b(?: also)?|[,/&;+|–-])[\s*$(\[]{{0,6}}{LETTER}"
    rf"|[ *$)}}\]]{{0,6}}[ *$(\[]{{1,6}}{LETTER}(?=[*$)}}\]]{{0,4}}(?: ?[(\[]?[A-Z]\b|[.\n]|$))"
)
NEGATION = re.compile(r"\\(?:neg|lnot|not)\b")
OPTION = re.compile(r"(?<!\w)([A-Z])(?:\)|\. (?=[-0-9(]))")  # (A) 5, B) 6 or C. 7


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed{} (or \fbox{}) holds; of nested ones the innermost. Empty ones are
    passed over.

    None: there is none, it is not closed, or it is too long. There is no falling back from a box
    that the token limit has cut off to an earlier one.
    """
    for opening in reversed(deque(BOX.finditer(text), maxlen=BOXES)):
        if opening[2]:
            return opening[2]
        depth, held = 1, None
        for token in BRACES.finditer(text, opening.end(), opening.end() + MAX_ANSWER + 1):
            depth += {"{": 1, "}": -1}.get(token.group(), 0)
            if depth == 0:
                held = text[opening.end() : token.start()]
                break
        if held is None or not EMPTY.fullmatch(held):
            return held
    return None


def number_answer(text: str) -> str | None:
    r"""The last \boxed{}, else what stands after the last `####`, else the last number."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    _, marker, rest = text.rpartition("####")
    if marker:
        first = NUMBER.search(rest.partition("\n")[0])
        return first.group() if first else None
    last = deque(NUMBER.finditer(text), maxlen=1)
    return last[0].group() if last else None


def choice_answer(text: str) -> str | None:
    r"""A letter: boxed (`\boxed{C. text}`, too), else the last "answer is (C)", else alone on the
    last line. Two different letters are no answer."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed_letter(boxed)
    if last := deque(ANSWER_IS.finditer(text), maxlen=1):
        return only_letter(last[0])
    found = LAST_LETTER.fullmatch(text.rstrip()[-40:].rpartition("\n")[2])
    return only_letter(found) if found else None


def boxed_letter(text: str) -> str | None:
    r"""C of `(C)`, `c`, `\text{(C) } 12` and `C - a polygenic score`; None of `B or C`."""
    plain = re.sub(r"\\[a-zA-Z]+|\\.|[{}$*~]", " ", text[:MAX_ANSWER])
    found = BOXED_LETTER.match(" ".join(re.sub("[–—]", "-", plain).split()))
    letter = only_letter(found) if found and not NEGATION.search(text) else None
    return None if set(OPTION.findall(" ".join(plain.split()))) - {letter} else letter


def only_letter(found: re.Match) -> str | None:
    """The letter found, as a capital; None if another one is joined to it."""
    letter = found[found.lastindex].upper()
    second = SECOND.match(found.string, found.end())
    return letter if not second or letter in second.groups() else None


def chain_answer(text: str) -> str | None:
    """What the last [...] holds, where the embedded task's worked answers have theirs."""
    start = text.rfind("[", 0, text.rfind("]") + 1)
    return text[start + 1 : text.find("]", start)] if start >= 0 else None


# --------------------------------------------------------------------------------------------------
# Rewriting: what can be written in several ways is written in one, in gold answers and in responses
# alike, before anything is compared. Each step takes time linear in the text.

# fmt: off
GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau " \
        "upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
SIGNS = {
    "−": "-", "–": "-", "—": "-", "⁻": "-", "₋": "-", "∗": "*", "∣": "|", "′": "'", "、": ",", "。": ".",
    "°": r"^\circ ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",
    **dict(zip("×·⋅÷±∓→≤⩽≥⩾≠≈∞∪∩∈∉∅∖…⟨⟩⌊⌋⌈⌉∧∨ϕ", (rf"\{name} " for name in (
        "times cdot cdot div pm mp to le le ge ge ne approx infty cup cap in notin emptyset setminus ldots "
        "langle rangle lfloor rfloor lceil rceil land lor phi").split()))),
    **dict(zip("αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ", (rf"\{name} " for name in GREEK.split()))),
}
# fmt: on
SUPERSCRIPTS, SUBSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙ"


def in_ascii(text: str) -> str:
    r"""Signs as LaTeX: x² ≤ 2½ as x^{2} \le 2 \frac{1}{2}; full-width forms as plain ones."""
    for runs, mark in ((SUPERSCRIPTS, "^"), (SUBSCRIPTS, "_")):
        text = re.sub(f"([{runs}]+)", rf"{mark}{{\1}}", text)
    text = re.sub("√ ?([0-9]+|[A-Za-z])", r"\\sqrt{\1}", text).replace("√", r"\sqrt")
    text = unicodedata.normalize("NFKC", text.translate(str.maketrans(SIGNS)))
    text = "".join(c for c in text if c.isascii() or unicodedata.category(c) != "Cf")
    return re.sub("([0-9])\u2044([0-9]+)", r" \\frac{\1}{\2}", text)  # ½ in NFKC


def number_out_of_text(found: re.Match) -> str:
    r"""\text{18 apples} as 18\text{ apples}, \text{2 or 3} as 2 or 3."""
    number, rest = found.groups()
    if not rest.strip() or re.search("[0-9]", rest):
        return number + rest
    return rf"{number}\text{{{rest}}}"


BASES = dict(
    zip("two three four five six seven eight nine ten eleven twelve".split(), range(2, 13))
)
BASES |= {"sixteen": 16}


def with_base(found: re.Match) -> str:
    """52_8, 52_{eight} and 52 (base 8) as N_{52b8}: of a symbol nothing is dropped."""
    opening, digits, closing, *bases = found.groups()
    base = "".join(filter(None, bases))
    base = BASES.get(base) or int(base)
    if not (digits.replace(".", "").isdigit() or base > 10) or len(opening) < len(
        closing
    ):  # as 2a_1
        return found[0]
    number = digits if base == 10 else f"N_{{{digits.upper()}b{base}}}"
    return number if closing else opening + number


def power_of_ten(found: re.Match) -> str:
    """4.5e3 as 4500, 1e-5 as 0.00001."""
    if abs(int(found[1] or found[2])) > MAX_ANSWER // 2:
        return found[0]
    return f"{Decimal(re.sub('[{}]', '', found[0])):f}"


def scaled(found: re.Match) -> str:
    r"""7 \text{ million dollars} as 7 \times 10^{6}\text{ dollars}."""
    scale, rest = found[1] or found[3], found[2]
    unit = rf"\text{{{rest}}}" if rest and rest.strip() else ""
    return rf" \times {SCALES[scale.lower()]}{unit}"


def times_power(found: re.Match) -> str:
    r"""Of 4.5 x 10^+33 the part after 4.5 as \times 10^{33}."""
    return rf" \times 10^{{{int(found[1] or found[2])}}}"


def mixed_number(found: re.Match) -> str:
    r"""1 1/4 as \frac{5}{4}; 3 7/2 is none."""
    whole, over, under = (int(part.replace(",", "")) for part in found.groups() if part)
    return rf"\frac{{{whole * under + over}}}{{{under}}}" if over < under else found[0]


def repeating(found: re.Match) -> str:
    r"""0.1\overline{6} as \frac{15}{90}."""
    whole, fixed, *again = (part or "" for part in found.groups())
    again = "".join(again)
    ninths = "9" * len(again) + "0" * len(fixed)
    return rf"\frac{{{int(whole + fixed + again) - int('0' + whole + fixed)}}}{{{ninths}}}"


def system(found: re.Match) -> str:
    r"""\begin{cases} x=1 \\ y=2 \end{cases} as x=1 , y=2."""
    return re.sub(r",? *\\\\(?:\[[^]]*\])?", ",", found[2].strip().removesuffix("\\\\"))


FONT = r"\\(?:math(?:rm|bf|it|sf)|text(?:rm|bf|it|normal)?|mbox|boldsymbol|bm|operatorname) ?"
BOLD = r"\\(?:math(?:bf|it|sf)|boldsymbol|bm) ?"
END = "(?![A-Za-z])"  # of a command's name
PRIME = r"'|\\prime"  # of y' and f''(x), which Math-Verify would drop
FUNCTION = "(arc(?:sin|cos|tan)|sinh?|cosh?|tanh?|cot|sec|csc|ln|log|exp|max|min|gcd|lcm|det)"
BASE = rf"([0-9]{{1,2}}|{'|'.join(BASES)})"
DECIMAL = r"(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)"
# In this order: what is rewritten, and as what. Nothing is tried twice at one place (++, *+), or
# only within bounds.
# fmt: off
REWRITINGS = (
    # blanks and signs: 12\,345  12{,}345  \tfrac12  x \leqslant 2  \langle 1,2 \rangle
    (rf"(?<!\\)\\[,;: ]|~|\\q?quad{END}", " "),
    (r"(?<!\\)\\! *+", ""),
    (r"(?<=[0-9])\{,\}(?=[0-9])", ","),
    (r"(?<=[0-9)]) ?\*\* ?(-?[0-9]++)", r"^{\1}"),
    (rf"\\[dtc]frac{END}", r"\\frac"),
    (r"\\frac ?([0-9]) ?([0-9])", r"\\frac{\1}{\2}"),
    (r"\\?\bsqrt ?\(([^()]*+)\)", r"\\sqrt{\1}"),
    (rf"\\l(?:eqslant|eq){END}", r"\\le"),
    (rf"\\g(?:eqslant|eq){END}", r"\\ge"),
    (rf"\\l(?:angle|paren){END}", "("),
    (rf"\\r(?:angle|paren){END}", ")"),
    (rf"\\([lr])brace{END}", lambda found: r"\{" if found[1] == "l" else r"\}"),
    (rf"\\varnothing{END}", r"\\emptyset"),
    # letters: 4.5\mathrm{e}33  \mathrm{e}^2  \pi\mathrm{e}  {\rm e}  \operatorname{sin}  \mathbf{v}
    (rf"(?<=[0-9]) ?{FONT}\{{([eE])\}} ?(?=\{{?[-+]?[0-9])", r"\1"),
    (rf"{FONT}{FUNCTION}{END}|{FONT}\{{ ?{FUNCTION} ?\}}", lambda found: rf"\{found[1] or found[2]} "),
    (rf"(?<=[A-Za-z])({FONT}\{{ ?[ei] ?\}})", r" \1"),
    (rf"{FONT}(?:\{{ ?([ei]) ?\}}|([ei])\b)", r"\1\2"),
    (r"\{ ?\\(?:rm|bf|it) ([A-Za-z0-9.]++) ?\}", r"{\1}"),
    (r"(?<=[0-9]) (?=i\b)", ""),
    (rf"{BOLD}\{{ ?([A-Za-z]) ?\}}", r" \1"),
    (r"(?<=[A-Za-z])('{1,3}|\^ ?\{? ?(?:\\prime ?){1,3}\}?)(?![A-Za-z'])",
     lambda found: f"_{{{'p' * len(re.findall(PRIME, found[0]))}}}"),
    # text around mathematics: \mathbf{(1,2)}  \text{18 apples}  2 \text{ or 3}
    (rf"{BOLD}\{{((?:[^A-Za-z{{}}]|[A-Za-z][^A-Za-z{{}}])[^{{}}]*+)\}}", r"\1"),
    (rf"{BOLD}(?=\{{ ?[-\\(\[0-9])", ""),
    (rf"{FONT}\{{ ?([-+]?(?:\\?\$)?[0-9][0-9.,:/]*+(?: ?\\?%)?)([^{{}}]*+)\}}", number_out_of_text),
    (rf"{FONT}\{{((?: ?or | ?and )[^{{}}]*[0-9][^{{}}]*+)\}}", r" \1 "),
    # numbers: 12 345  52_{\text{eight}}  52 (base 8)  4.5e33  3 x 10^8  1 1/4  0.\overline{3}  8 \%
    (r"(?<![\w.,^])(?<![0-9] )[0-9]{1,3}(?: [0-9]{3})++(?![A-Za-z0-9/]| [0-9])",
     lambda found: found[0].replace(" ", "")),
    (rf"(?<=[0-9A-F)])_ ?{FONT}\{{([^{{}}]*+)\}}", r"_{\1}"),
    (rf"(?<=[0-9A-F)])_ ?\{{ ?{FONT}\{{([^{{}}]*+)\}} ?\}}", r"_{\1}"),
    (rf"{FONT}\{{ ?([^{{}}]*\bbase\b[^{{}}]*+)\}}", r" \1"),
    (rf"(?<![\w.\\])(\(?)((?=[A-F]*+[0-9])[0-9A-F]++(?:\.[0-9A-F]++)?|[0-9][0-9a-f]*+)(\)?) {{0,2}}(?:"
     rf"_ ?\{{[ (]{{0,2}}(?:base[ -]{{0,2}})?{BASE}[ )]{{0,2}}\}}|_ ?([0-9]{{1,2}})"
     rf"|\( ?(?:in )?base[ -]{{0,2}}{BASE}\b ?\)|(?:in )?base[ -]{{0,2}}{BASE}\b)", with_base),
    (rf"(?<![\w.\\]){DECIMAL}[eE](?:\{{([-+]?[0-9]{{1,9}})\}}|([-+]?[0-9]{{1,9}}))(?!\w|\.[0-9])", power_of_ten),
    (r"(?<=[0-9]) ?(?:[x*]|\\cdot|\\times) ?10 ?\^ ?(?:\{ ?([-+]?[0-9]{1,8}) ?\}|([-+]?[0-9]{1,8}))(?![0-9])",
     times_power),
    (rf"(?<=[0-9}}]) ?(?:{FONT}\{{ ?{SCALE}([^{{}}]*+)\}}|\b{SCALE})", scaled),
    (r"(?<![\w.^\\/])(?<![0-9] )([0-9]{1,3}(?:,[0-9]{3}){1,6}+|[0-9]{1,9})"
     r"(?: ([0-9]{1,9}) ?/ ?([0-9]{1,9})| ?\\frac ?\{ ?([0-9]{1,9}) ?\} ?\{ ?([0-9]{1,9}) ?\})(?![\w]|\.[0-9])",
     mixed_number),
    (r"(?<![\w.])([0-9]++)\.([0-9]*+)(?:\\(?:overline|bar|dot) ?(?:\{([0-9]++)\}|([0-9]))|\(([0-9]++)\))(?![0-9])",
     repeating),
    (r"(?<! ) *+(?:\\%|%|\\text ?\{ ?percent ?\}|\bpercent\b)", r"\\%"),
    (r"(?<=[0-9])\.(?= ?[/)*+^])", ""),
    # systems: \begin{cases} x=1 \\ y=2 \end{cases}
    (r"(?:\\left ?\\\{ ?)?\\begin\{(cases|array|aligned|gathered)\}(?:\{[lcr|]{1,9}\})?([^&]{0,400}?)"
     r"\\end\{\1\}(?: ?\\right ?\.)?", system),
)
# fmt: on
REWRITINGS = tuple((re.compile(old), new) for old, new in REWRITINGS)


def rewrite(text: str) -> str:
    """What two texts that mean the same have in common, as far as that is spelling."""
    if text.isascii() and text.isdigit():  # as most answers are
        return text
    text = text if text.isascii() else in_ascii(text)
    for old, new in REWRITINGS:
        text = old.sub(new, text)
    return text


LEAD_IN = re.compile(
    r"(?:(?:=|\\(?:approx|sim|simeq|therefore)(?![A-Za-z])) ?|(?:\\text ?\{ ?)?(?i:(?:the |final |correct )*"
    r"(?:answer|approximately|approx\.?|about|roughly|around)\b(?: is)?:?)(?: ?\})? ?)+"
)
# No number and no sign of comparison may stand in it, for they tell answers apart.
QUALIFIER = re.compile(
    r"(?:(?:\\text ?\{ ?,? ?)?\b(?:for (?:any|all|some|every|each|an)|where|with)\b"
    r"(?:[ ,{}()]|\\text\b|\\in\b|\\mathbb ?\{Z\}|\b(?:any|arbitrary|constants?|integers?|integration"
    r"|is|are|an?|in|numbers?|of|real|the|[A-Za-z])\b)*+|\(?\b[a-z] ?\\in ?\\mathbb ?\{?Z\}? ?\)?)$"
)
HALF_DAY = re.compile(r"(?<=[0-9]) ?(?:\\text ?\{ ?)?(?i:[ap](?:m|\. ?m))\.? ?\}?$")


def without_words(answer: str) -> str:
    r"""16 of `\approx 16`, 2x+c of `2x+c \text{ for any constant } c`, 3:30 of `3:30 p.m.`."""
    answer = answer[lead.end() :] if (lead := LEAD_IN.match(answer)) else answer
    for ending in (QUALIFIER, HALF_DAY):
        if (found := ending.search(answer)) and found.start():
            answer = answer[: found.start()].rstrip(" ,;")
    return answer


def ratio(answer: str) -> str:
    r"""3:4:5 as (\frac{3}{5},\frac{4}{5}), for it is not 3/4/5."""
    *terms, last = answer.rpartition("=")[2].split(":")
    if len(terms) < 2 or "," in answer or not last:
        return answer
    fractions = [rf"\frac{{{term}}}{{{last}}}" for term in terms]
    return f"({','.join(fractions)})"


def plain_text(answer: str) -> str:
    """Without text commands and braces."""
    return " ".join(re.sub(FONT + r"(?=\{)|[{}]", "", answer).split())


@lru_cache(4096)  # the samples of a question often give one answer
def normalise(answer: str) -> str:
    """An answer rewritten, on one line, without the words and the punctuation around it."""
    line = " ".join(re.sub(r"(?<!\\)(?:\$|\\[\[\]()])", "", rewrite(answer)).split())
    return ratio(re.sub(r"(?<![\\.,;:\s])[.,;:\s]+$", "", without_words(line)))


def normalise_gold(gold: str) -> str:
    """A worked solution's gold answer stands after its last ####."""
    return normalise(gold.rpartition("####")[2])


# fmt: off
PLACEHOLDERS = {
    "", "proof", "see proof", "see solution", "see the solution", "see explanation", "see below", "see above",
    "not found", "notfound", "no answer", "answer not found", "unknown", "omitted", "incomplete", "n/a", "null",
    "nan", "tbd", "?", "-",
}
# fmt: on


def math_gold(gold: str) -> str | None:
    """The gold answer to be compared; None of placeholders, which are no answers."""
    gold = normalise_gold(gold)
    return None if plain_text(gold).casefold().strip(" .") in PLACEHOLDERS else gold


# Of which two, one in each answer, make them different, for all that is dropped as a unit.
# fmt: off
OPPOSITES = tuple(set(group.split()) for group in (
    "am pm", "north south east west", "increase decrease", "increased decreased", "more less", "up down",
    "profit loss", "gain loss", "left right", "clockwise counterclockwise anticlockwise", "ad bc",
    "january february march april may june july august september october november december",
    "monday tuesday wednesday thursday friday saturday sunday", "odd even", "positive negative", "maximum minimum",
    "integer real rational natural complex", "integers reals",
))
# fmt: on


BOUNDS = re.compile(
    r"(?<!\\)\b(?:or (?:more|less|fewer|greater|higher|lower)|at (?:least|most)|not"
    r"|(?:more|less|fewer|greater|smaller) than)\b"
)


def opposed(answer: str, gold: str) -> bool:
    """As 3:30 p.m. and 3:30 a.m., an increase and a decrease."""
    one, other = (set(re.findall("[a-z]+", t.lower().replace(".", ""))) for t in (answer, gold))
    for group in OPPOSITES:
        if one & group and other & group and one & group != other & group:
            return True
    return False


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
    r"""A plain number, a power of ten or a fraction, with thousands commas or a dollar sign; None
    for all else (units, \%)."""
    text = re.sub(r"\\?\$", "", answer).strip()
    text = text[1:-1] if re.fullmatch(r"\{[^{}]*\}", text) else text
    if len(text) > MAX_ANSWER:
        return None
    if plain := PLAIN_NUMBER.fullmatch(text):
        return Fraction(plain[1] + plain[2].replace(",", "").rstrip("."))
    if power := POWER_OF_TEN.fullmatch(text):
        return Fraction(power[1] + (power[2] or "1")) * Fraction(10) ** int(power[3] or power[4])
    if fraction := FRACTION.fullmatch(text):
        over, under = filter(None, fraction.groups()[1:])
        return Fraction(int(fraction[1] + over), int(under)) if int(under) else None
    return None


def same_number(a: Fraction, b: Fraction, rounded: bool) -> bool:
    """rounded: one of them is written as a decimal. Then six decimals decide; and five digits, for
    0.0000001 is not 0.0000002."""
    if rounded and round(a, 6) == round(b, 6):
        return abs(a - b) <= max(abs(a), abs(b)) / 100_000
    return a == b


def compare_numbers(answer: str, gold: str) -> str | None:
    r"""The verdict on two plain numbers, of which one or both may be percentages: 10\% is 10 and
    0.1."""
    percents = [text.endswith(r"\%") for text in (answer, gold)]
    a, g = (as_number(text.removesuffix(r"\%")) for text in (answer, gold))
    if a is None or g is None:
        return None
    rounded = "." in answer + gold
    same = same_number(a, g, rounded)
    if percents[0] != percents[1]:
        a, g = (n / 100 if percent else n for n, percent in zip((a, g), percents))
        same = same or same_number(a, g, rounded)
    return "correct" if same else "wrong"


# Runs of letters that are no words
FORMULAS = set(
    "and arccos arcsin arctan cos cosh cot csc exp gcd inf infinity lcm ln log max min mod or pi sec "
    "sin sinh sqrt tan tanh".split()
)


@lru_cache(4096)
def words(answer: str) -> list[str]:
    r"""The words of an answer that is nothing else, sorted where `and` joins them: [alice, bob] of
    \text{Bob and Alice}; [] of a formula."""
    plain = re.sub(r"^(?:the|an?) (?=[a-z]{2})", "", plain_text(answer), flags=re.IGNORECASE)
    if not re.fullmatch(r"[A-Za-z][A-Za-z .,;'-]*", plain):
        return []
    if not set(re.findall("[a-z]{2,}", plain.casefold())) - FORMULAS:
        return []
    return sorted(re.split(r" ?(?:[,;]|\band\b|\bor\b) ?", plain))


def compare_words(answer: str, gold: str) -> str | None:
    """Math-Verify would read them as products of their letters. In short ones, which may be such
    products, capitals count: mg is not Mg, but yes is Yes."""
    given, wanted = words(answer), words(gold)
    if not wanted:
        return None
    short = len("".join(wanted)) < 4
    if not given:  # ab, and it is a \\cdot b; east, and it is 0 + \\text{east}
        return None if short or wanted[0] in plain_text(answer) else "wrong"
    fold = str.casefold
    if short and "\\text" not in gold:
        fold = lambda word: word[0].lower() + word[1:] if len(word) > 2 or word == "No" else word
    return "correct" if list(map(fold, given)) == list(map(fold, wanted)) else "wrong"


def compare_letters(answer: str, gold: str) -> str | None:
    r"""An option's letter, in brackets on one side: \text{(B)} and B; B and (B) 12."""
    letter = re.fullmatch(r"\(?([A-Z])\)?", plain_text(gold)) if len(gold) < 20 else None
    if letter and ("(" in gold or re.match(r"\([A-Z]\)(?: |$)", plain_text(answer))):
        return compare_text(boxed_letter(answer) or "", letter[1])
    return None


CLOCK = re.compile("0?([0-9]{1,2})(?::([0-9]{2}))?")
DATE = re.compile(r"[0-9]{4}([-/])[0-9]{1,2}\1[0-9]{1,2}|[0-9]{1,2}([-/])[0-9]{1,2}\2[0-9]{4}")
# 5 \text{ ft } 6 \text{ in}, of which Math-Verify would read the 5 alone
COMPOUND = re.compile(rf"[0-9}}] ?{FONT}\{{(?! ?(?:or|and)\b)[^{{}}]*\}}.*[0-9]")
EXPONENT = re.compile(r"[\^_] ?\{?[-+]?[0-9]+\}?")  # of a unit, such as m/s^2


def compare_in_parts(answer: str, gold: str) -> str | None:
    """Dates, and quantities in several units, are equal part by part."""
    for text in (answer, gold):
        if DATE.fullmatch(text) or COMPOUND.search(EXPONENT.sub("", text)):
            return compare_text(
                *(plain_text(t).casefold().replace(" ", "") for t in (answer, gold))
            )
    return None


def compare_times(answer: str, gold: str) -> str | None:
    """3:30 and 1:10, which as ratios would be one; 3 and 3:00."""
    times = CLOCK.fullmatch(answer), CLOCK.fullmatch(gold)
    if ":" not in answer + gold or not all(times):
        return None
    hours, minutes = ([time[part] or "00" for time in times] for part in (1, 2))
    return "correct" if hours[0] == hours[1] and minutes[0] == minutes[1] else "wrong"


ADJACENT = re.compile(r"(?<![\w.^])[0-9.]+ +\.?[0-9]")  # two numbers with nothing between


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
    for compare in (
        compare_numbers,
        compare_times,
        compare_in_parts,
        compare_letters,
        compare_words,
    ):
        if verdict := compare(answer, gold):
            return verdict
    if nesting(answer) > MAX_NESTING or REPEATS.search(answer) or ADJACENT.search(answer):
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
        answer, gold = kind.find(response), kind.gold(gold)
        return "unparsed" if answer is None or gold is None else kind.compare(answer, gold)
    written, gold = gold.rpartition("####")[2], normalise_gold(gold)
    if extract == "any" and len(BOX.findall(response)) != 1:
        last = response.rstrip().rpartition("\n")[2]
        if not last:
            return "unparsed"
        return "wrong" if opposed(last[-MAX_ANSWER:], written) else ("any", response, gold)
    found = kind.find(response) or ""
    answer = normalise(found)
    bounds = [set(BOUNDS.findall(text)) for text in (found, written)]
    if answer and (bounds[0] != bounds[1] or opposed(found, written)):
        return "wrong"
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

    Known and left so: `10\%` equals both `10` and `0.1`, whichever of them is gold; units are
    dropped, and so is a.m. where the other does not say p.m.; `x=5` and `5` are one; `2,3`, `3,2`
    and `2 \text{ or } 3` are one; numbers equal to six decimals and five digits are equal where one
    is written as a decimal.
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
            gold = KINDS[kind].gold(gold)
            if gold is None:
                found.append("unparsed")
            elif KINDS[kind].compare or as_number(gold) is not None or words(gold):
                found.append("correct")  # it takes no Math-Verify
            else:
                found.append(("gold", gold, gold))
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
    read_as_written()
    compare_by_value()
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
        answer = rewrite(answer)
        found = math_verify.parse(answer, either, parsing_timeout=None)
        cut = whole_number(found[-1], answer) if found and isinstance(found[-1], str) else ""
        if (verdict := compare_plainly(normalise(cut), gold)) in ("correct", "wrong"):
            return verdict
        if found and cut != found[-1]:
            found = parse_latex(normalise(cut))
    else:
        found = parse_latex(answer)
    # What is too large to be evaluated can still be right by its form.
    found = [f for f in found if isinstance(f, str) or f in golds or not too_large(f)]
    golds = [g for g in golds if isinstance(g, str) or g in found or not too_large(g)]
    if how == "boxed":
        found = [f for f in found if f in golds or not false_equation(f)]
    understood = any(not isinstance(f, str) for f in found)  # and not only cut out
    if how == "gold" and not understood:
        return "unparsed"
    failed, braces = False, r"\{" in gold
    options = dict(timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True)
    for g in golds:
        for f in found:
            try:
                pair = in_order(g, f) if braces else with_repeats(*in_order(g, f))
                if math_verify.verify(*pair, **options):
                    return "correct"
            except Exception:
                failed = True
    if not understood:
        return "unparsed"
    return "error" if failed else "wrong"


NUMBERS = re.compile(rf"{NUMBER.pattern}(?: or {NUMBER.pattern}){{0,4}}")


def whole_number(cut: str, text: str) -> str:
    """The number of which Math-Verify has cut out a piece of the text: 7/8, or `7 or 8`, for 7."""
    numbers = [found.group() for found in NUMBERS.finditer(text)]
    if cut in numbers:
        return cut
    piece = re.compile(rf"(?<![0-9.,]){re.escape(cut)}(?![0-9])")
    return deque([cut, *filter(piece.search, numbers)], maxlen=1)[0]


def false_equation(expression) -> bool:
    """Of 6+2=7 Math-Verify would take the 7. Rounding, as in 2/3=0.67, is none."""
    import sympy

    if not isinstance(expression, sympy.Eq):
        return False
    try:
        left, right = (complex(side.evalf()) for side in expression.args)
    except Exception:  # no numbers
        return False
    return abs(left - right) > 0.05 * max(abs(left), abs(right))


OR = re.compile(r"\\text ?\{ ?or ?\}|\\lor\b|\\vee\b|\bor\b")
AND = re.compile(r"\\text ?\{ ?and ?\}|\\land\b|\\wedge\b|\band\b")


@lru_cache(4096)
def parse_latex(text: str) -> list:
    """What Math-Verify reads in the text, after the set of x < 1 or x > 2 where that is one."""
    import math_verify
    import sympy

    if re.fullmatch("-?[0-9]+", text):  # as most gold answers are
        return [sympy.Integer(text)]
    latex, read = [math_verify.LatexExtractionConfig()], []
    if re.search(r"[<>]|\\[lg]e\b", text):
        for word, join in ((OR, sympy.Union), (AND, sympy.Intersection)):
            parts = word.split(text)
            if 1 < len(parts) < 6:
                read += joined_set([parse_latex(part)[:1] for part in parts], join)
    return read + math_verify.parse(f"${text}$", latex, parsing_timeout=None)


def joined_set(parts: list, join) -> list:
    """What x < 1 and x > 2 are together, in a list; [] where the parts are no inequalities or
    intervals of one variable."""
    import sympy
    from math_verify.grader import is_equation, is_relation, unwrap_fcs

    sets, symbols = [], set()
    for [part] in filter(None, parts):
        if not isinstance(part, str) and is_relation(part) and not is_equation(part):
            symbols |= part.free_symbols
            if len(symbols) > 1:
                return []
            try:
                part = unwrap_fcs(part).as_set()
            except Exception:  # SymPy cannot solve it
                return []
        if not isinstance(part, sympy.Set):
            return []
        sets.append(part)
    return [join(*sets)] if len(sets) == len(parts) else []


def with_repeats(gold, found) -> tuple:
    """Sets drop repeats, and a bare list has none to drop: 16,3,1,1 is not 16,3,1. Of pairs and
    intervals they may be dropped."""
    import sympy
    from math_verify.grader import sort_key

    lists = []
    for expression in (gold, found):
        values = expression.rhs if isinstance(expression, sympy.Eq) else expression
        lists.append(list(getattr(values, "_unsorted_args", [values])))
    values = lists[0] + lists[1]
    if any(isinstance(value, (str, sympy.Set, sympy.Tuple)) for value in values):
        return gold, found
    if all(len(set(map(str, part))) == len(part) for part in lists if len(part) > 1):
        return gold, found
    return tuple(sympy.Tuple(*sorted(values, key=sort_key)) for values in lists)


def in_order(gold, found) -> tuple:
    """Both as points, where one is a vector or a list of assignments and the other has an order:
    x=1,y=2 is (1,2) and not (2,1)."""
    import sympy

    def assigned(expression):
        """The values of x=1,y=2; None of all else."""
        parts = list(getattr(expression, "_unsorted_args", ()))
        if len(parts) < 2 or not all(isinstance(part, sympy.Eq) for part in parts):
            return None
        names = [str(part.lhs) for part in parts]
        if len(set(names)) < len(names):
            return None
        if set(names) <= set("xyz"):
            parts.sort(key=lambda part: str(part.lhs))
        return sympy.Tuple(*(part.rhs for part in parts))

    def point(expression):
        if isinstance(expression, sympy.MatrixBase) and 1 in expression.shape:
            return sympy.Tuple(*expression.flat())
        if isinstance(expression, sympy.Interval) and expression.is_open:
            return sympy.Tuple(expression.start, expression.end)
        if isinstance(expression, sympy.FiniteSet):
            return sympy.Tuple(*getattr(expression, "_unsorted_args", expression.args))
        return expression if isinstance(expression, sympy.Tuple) else None

    vectors = [isinstance(expression, sympy.MatrixBase) for expression in (gold, found)]
    values = [assigned(gold), assigned(found)]
    if vectors[0] == vectors[1] and (values[0] is None) == (values[1] is None):
        return gold, found
    points = values[0] or point(gold), values[1] or point(found)
    return points if None not in points else (gold, found)


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


def read_as_written() -> None:
    """Capitals are no small letters, and 3 5 is no number."""
    import math_verify.grader
    import math_verify.parser
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

    config = ConversionConfig(lowercase_symbols=False)

    def read(latex: str, **options):
        if ADJACENT.search(latex):
            raise ValueError("two numbers with nothing between")
        # Both Gammas would be Euler's constant.
        latex = re.sub(r"\\Gamma\b(?! ?(?:\\left)? ?\()", "G_{amma}", latex)
        return latex2sympy(latex, **options, conversion_config=config)

    def same_symbols(gold, found) -> bool:
        r"""A word is the product of its letters, for \text{abc} is read as one symbol."""
        names = []
        for expression in (gold, found):
            letters = expression.args if isinstance(expression, sympy.Mul) else (expression,)
            names.append("".join("e" if part == sympy.E else str(part) for part in letters))
        return names[0] == names[1] or math_verify.grader.sympy_symbolic_eq(gold, found)

    math_verify.parser.latex2sympy = read
    math_verify.grader.sympy_compare_symbols = same_symbols


def compare_by_value() -> None:
    """Numbers are compared exactly where they are exact, else relative to the larger one. And
    simplifying is slow at showing that two expressions differ, which their values at one point can
    do at once."""
    import math_verify.grader
    import sympy

    simplified_to_zero = math_verify.grader.sympy_symbolic_eq
    by_math_verify = math_verify.grader.sympy_numeric_eq

    def values(a, b, *signs: int) -> list[complex]:
        """Of both at a point where nothing is special; the symbols' signs in turn."""
        symbols = sorted(a.free_symbols | b.free_symbols, key=str)
        point = {}
        for i, symbol in enumerate(symbols):
            point[symbol] = signs[i % len(signs)] * sympy.Rational(7 * i + 3, 11)
        return [complex(expression.subs(point).evalf()) for expression in (a, b)]

    def near(a, b, tolerance: float) -> bool:
        larger = max(abs(a.evalf(20)), abs(b.evalf(20)))
        return larger < math.inf and bool(abs((a - b).evalf(20)) <= larger * tolerance)

    def agree(a, b) -> bool:
        """As 0.1x + 0.2x and 0.3x, but for rounding."""
        for signs in (1,), (1, -1):
            x, y = values(a, b, *signs)
            if abs(x - y) > 1e-12 * max(abs(x), abs(y)):
                return False
        return True

    def differ(a, b) -> bool:
        try:
            x, y = values(a, b, 1)
            return 1e-6 < abs(x - y) / (1 + abs(x)) < math.inf
        except Exception:  # no numbers: only simplifying can tell
            return False

    def equal_where_real(a, b) -> bool:
        r"""As \sqrt{1/n} and 1/\sqrt{n}, which no simplifying of real symbols shows to be equal. At
        points of other signs both must be real and equal, or neither."""
        try:
            symbols = a.free_symbols | b.free_symbols
            if not any(power.exp.is_integer is False for power in (a - b).atoms(sympy.Pow)):
                return False
            for signs in (-1, 1), (1, -1), (-1,):
                x, y = values(a, b, *signs)
                real = [abs(value.imag) <= 1e-9 * abs(value) for value in (x, y)]
                if real[0] != real[1] or real[0] and abs(x - y) > 1e-9 * abs(x):
                    return False
            positive = {symbol: sympy.Dummy(positive=True) for symbol in symbols}
            return bool(symbols) and simplified_to_zero(a.subs(positive), b.subs(positive))
        except Exception:
            return False

    def equal(a, b) -> bool:
        return not differ(a, b) and (simplified_to_zero(a, b) or equal_where_real(a, b))

    def numbers_equal(a, b, decimals: int, digits: int) -> bool:
        if isinstance(a, sympy.MatrixBase) or isinstance(b, sympy.MatrixBase):
            return by_math_verify(a, b, decimals, digits)
        decimal, number = a.has(sympy.Float) or b.has(sympy.Float), a.is_Number or b.is_Number
        try:
            if a.free_symbols or b.free_symbols:
                return agree(a, b) if decimal else bool((a - b).evalf(digits) == 0)
            if number and not (decimal and near(a, b, 1e-5)):
                return not decimal and by_math_verify(a, b, decimals, digits)
            if number:
                return by_math_verify(a, b, decimals, digits)
            a, b = a.doit(), b.doit()
            if a.is_Rational and b.is_Rational:
                return a == b
            return near(a, b, 1e-13 if decimal else 1e-80)
        except Exception:  # no numbers: only simplifying can tell
            return False

    def solve(equation, symbols):
        """Two equations without a solution are not therefore equal."""
        if (solutions := sympy.solve(equation, symbols)) == []:
            raise ValueError("no solution")
        return solutions

    math_verify.grader.sympy_symbolic_eq = equal
    math_verify.grader.sympy_numeric_eq = numbers_equal
    math_verify.grader.solve = solve


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
    demonstrate: Callable | None = None,
) -> list[dict]:
    """Samples k responses to each of this rank's questions (every world-th) and judges them.

    Returns a row a question. No rank waits for another; to summarise, gather the rows of all.
    demonstrate: (question, sample) -> (solution, behavior_logprobs) of a right response that was
    not truncated; None for all others.
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
        if demonstrate:
            shown = []
            for sample, verdict in zip(group, row["verdict"]):
                usable = verdict == "correct" and not sample.truncated
                shown.append(demonstrate(q, sample) if usable else (None, None))
            row["solution"], row["behavior_logprobs"] = map(list, zip(*shown))
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


def load_questions(
    name: str,
    tokenizer,
    system: str | None,
    generation_prefix: str,
    rewarded: bool = False,
    checker: Checker | None = None,
    keep_rows: bool = False,
    question_field: str = "",
    answer_field: str = "",
    **style,
) -> list:
    """A benchmark's questions, ready to sample from. name: one of BENCHES, `sums` (the embedded
    task's), or a file.

    system, generation_prefix and style (template, today) are those of data.render_prompt.

    Rows are read as data.row_reader reads training rows, less their demonstrations; a row that
    cannot be used is an error. rewarded: for reward functions, as in data.load_questions. With a
    checker it is said which gold answers nothing can equal. keep_rows: a question comes with its
    row even so. question_field, answer_field: a file's columns, as for data.row_reader; a file
    without the first is read by its own layout, for it may be another than the training rows'.
    """
    import data

    style |= {"system": system, "generation_prefix": generation_prefix}
    if name == "sums":
        questions = data.embedded_questions(tokenizer, "eval", data.EVAL_SUMS)
        for i, question in enumerate(questions):
            question.id = f"sums/{i}"
        return questions
    if name in BENCHES:
        bench = BENCHES[name]
        rows = data.load_rows(bench.hub, bench.split, bench.config)
        read = data.row_reader(rows, bench.question, bench.answer, rewarded=rewarded)
    elif Path(name).suffix in data.FILES:
        rows = data.load_rows(name)
        if question_field and question_field not in rows.columns:
            if checker:
                say_warning(f"{name}: no column {question_field}: its own layout is read")
            question_field = answer_field = ""
        read = data.row_reader(rows, question_field, answer_field, rewarded=rewarded)
    else:
        known = f"{', '.join(BENCHES)}, sums, and {', '.join(data.FILES)} files"
        raise ValueError(f"--bench {name}: unknown; known are {known}")
    questions, names = [], []
    for index, row in rows:
        example = read(index, row)
        names.append(rows.name(index))
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
        if rewarded or keep_rows:
            questions[-1].row = rows.row(index)
        if rewarded:
            questions[-1].asked = data.asked(tokenizer, example.messages, **style)
    if checker and not rewarded:
        golds, kinds = [q.answer for q in questions], [q.kind for q in questions]
        say_unmatched(name, checker, golds, kinds, names)
    return questions


def say_unmatched(
    source: str, checker: Checker, golds: list[str], kinds: list[str], names: list[str]
) -> None:
    """Warns of gold answers that nothing can equal, which count against a model otherwise."""
    import data

    unmatched = []
    for gold, name, verdict in zip(golds, names, checker.check_golds(golds, kinds)):
        if verdict != "correct":
            unmatched.append((name, gold))
    if unmatched:
        say_warning(f"{source}: {data.name_unmatched(unmatched, len(golds))}")


def say_warning(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------
# The folder of an evaluation: settings.json, of each rank a responses-RANK.jsonl that only grows
# (one line a response), and results.json.

CHUNK = 1024  # responses sampled at a time and a rank: what an interruption costs at most
# reward: with --reward; the last two: with --demonstrations, null where none is made of it
OF_A_RESPONSE = ("response", "verdict", "reward", "tokens", "truncated")
OF_A_RESPONSE += ("solution", "behavior_logprobs")


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


def open_to_append(path: Path):
    """Opened for appending after the last whole line; the rest of it a killed process left."""
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
        if args.demonstrations:
            args.demonstrations.parent.mkdir(parents=True, exist_ok=True)
    wait()  # there is a folder to write to
    run_evaluation(evaluation, set(finished), rank, world)
    wait()  # every rank has written its responses
    if rank == 0:
        report(evaluation)
        if args.demonstrations:
            write_demonstrations(evaluation)


def check_evaluation(args) -> Evaluation:
    """Reads the questions. Raises ValueError for whatever can be known to be wrong by now."""
    import torch

    names = args.bench.split(",")
    if args.temperature is None:
        args.temperature = 1.0 if args.demonstrations else 0.6
    check_demonstration_flags(args, names)
    if len({Path(name).name for name in names}) < len(names):
        raise ValueError(f"--bench {args.bench}: two benchmarks of one name")
    for flag, least in (("k", 1), ("max_tokens", 1), ("temperature", 0)):
        value = getattr(args, flag)
        if value is not None and not value >= least:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least {least}, not {value}")
    if (args.question_field or args.answer_field) and not any(Path(n).suffix for n in names):
        raise ValueError(
            f"--question-field and --answer-field are for files, and --bench {args.bench} names none"
        )
    check_reward_flags(args)
    rewards = load_rewards(args.reward, args.reward_weights, args.right_above)
    config, tokenizer = read_model(args.model, args.trust_remote_code)
    folder = args.out or Path("evaluations") / Path(args.model).resolve().name
    today = first_day(folder)
    benches, ks = {}, {}
    first = os.environ.get("RANK", "0") == "0"  # the others need not say it, too
    with Checker(checker_workers(1), args.limit) as checker:
        for name in names:
            benches[name] = load_questions(
                name,
                tokenizer,
                args.system,
                args.generation_prefix,
                rewarded=rewards is not None,
                question_field=args.question_field,
                answer_field=args.answer_field,
                template=args.template,
                today=today,
                checker=checker if first else None,
                keep_rows=args.demonstrations is not None,
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


def check_demonstration_flags(args, names: list[str]) -> None:
    out = args.demonstrations
    if out is None:
        if args.keep:
            raise ValueError("--keep is of use only with --demonstrations")
        return
    if out.suffix != ".jsonl" or out.is_dir():
        raise ValueError(f"--demonstrations {out}: right would be the name of a .jsonl file")
    if len(names) > 1:
        raise ValueError("--demonstrations takes one --bench: rows of several differ in columns")
    if Path(names[0]).resolve() == out.resolve():
        raise ValueError(f"--demonstrations {out} would overwrite the --bench it is made of")


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
    no_matter = ("model", "out", "demonstrations", "keep", "trust_remote_code")
    flags = {key: value for key, value in vars(args).items() if key not in no_matter}
    flags["demonstrations"] = args.demonstrations is not None
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
        trust_remote_code=args.trust_remote_code,
    )
    if rank == 0:
        dtype = evaluation.settings["dtype"]
        print(f"sampler: {sampler.name}, {dtype}, because {sampler.why}", file=sys.stderr)
    detokenize = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)
    demonstrate = demonstrator(evaluation) if args.demonstrations else None
    checker = Checker(checker_workers(world), args.limit, args.extract, args.require_think)
    with checker, open_to_append(evaluation.folder / f"responses-{rank}.jsonl") as file:
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
                    demonstrate=demonstrate,
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


def demonstrator(evaluation: Evaluation) -> Callable:
    """The function (question, sample) -> (solution, behavior_logprobs) of this evaluation.

    The log-probabilities are left out unless they are at temperature 1, as PEAR takes them, and
    training finds the very tokens that were sampled in the solution's text (data.prepare).
    """
    import data

    args, tokenizer = evaluation.args, evaluation.tokenizer
    ends, continued = eos_ids(args.model, tokenizer), data.going_on(tokenizer)

    def demonstrate(question, sample) -> tuple[str, list[float] | None]:
        solution = data.decode(tokenizer, sample.tokens[:-1])
        prompt = data.decode(tokenizer, question.prompt)
        text = data.response_text(tokenizer, solution, prompt, args.generation_prefix, ends)
        read = data.encode(continued, [text])[0] + [tokenizer.eos_token_id]
        usable = args.temperature == 1 and read == sample.tokens
        return solution, sample.logprobs if usable else None

    return demonstrate


def write_demonstrations(evaluation: Evaluation) -> None:
    """The rows of the questions with the shortest right response to each as their solution, or with
    --keep all a row for each right one. Written whole or not at all."""
    import data

    args, [questions] = evaluation.args, evaluation.benches.values()
    finished, count = evaluation.finished(), Counter()
    part = args.demonstrations.with_suffix(".partial")
    with part.open("w") as file:
        for question in questions:
            found = finished[question.id]
            right = [j for j, solution in enumerate(found["solution"]) if solution]
            if args.keep != "all":
                right = sorted(right, key=lambda j: found["tokens"][j])[:1]
            count["solved"] += bool(right)
            row = dict(question.row)
            chat = data.is_chat(row) and args.question_field not in row
            column = "target" if chat else "solution"
            row |= {column: None, "behavior_logprobs": None}  # were of another's solution
            if evaluation.rewards is None:  # whose functions want these as they are
                row |= {"answer": question.answer, "kind": question.kind}
            for j in right or [None]:
                if j is not None:
                    text = found["solution"][j]
                    row[column] = [{"role": "assistant", "content": text}] if chat else text
                    row["behavior_logprobs"] = found["behavior_logprobs"][j]
                    row["temperature"] = args.temperature
                    count["rows"] += 1
                    count["bare"] += row["behavior_logprobs"] is None
                file.write(json.dumps(row, default=str) + "\n")
    part.replace(args.demonstrations)
    print(
        f"{args.demonstrations}: {count['rows']} demonstrations of {count['solved']} questions; "
        f"{len(questions) - count['solved']} have no right response, and stay without one"
    )
    if args.temperature != 1:
        print(f"no behavior_logprobs: PEAR takes them at temperature 1, not {args.temperature:g}")
    elif count["bare"]:
        print(f"{count['bare']} have no behavior_logprobs: their text is read as other tokens")


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
        reason = f"not a model's folder or Hub id: {str(problem).splitlines()[0]}"
        if "trust_remote_code" in str(problem):
            reason = "it comes with Python code, which --trust-remote-code runs"
        raise ValueError(f"{name}: {reason}") from None
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


def read_graded(path: Path) -> tuple[list[dict], list[str], list[str], list[str]]:
    """(rows, gold answers, kinds, names of the rows) of a file of answers and responses; responses
    may be no valid Unicode. Raises ValueError at the first row that cannot be graded."""
    import data

    rows, golds, kinds, names = [], [], [], []
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
            names.append(source.name(index))
    return rows, golds, kinds, names


def command_grade(args) -> None:
    rows, golds, kinds, names = read_graded(args.file)
    counts: Counter = Counter()
    out = args.file.with_suffix(".graded.jsonl")
    checker = Checker(checker_workers(1), args.limit, args.extract, args.require_think)
    with checker, out.open("w") as file:
        say_unmatched(str(args.file), checker, golds, kinds, names)
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
    named = f"comma-separated: {known}, sums, or JSONL or parquet files"
    add("--bench", required=True, help=named)
    column = "a file's column of questions, where the layout is not a known one"
    add("--question-field", default="", help=column)
    add("--answer-field", default="", help="and of gold answers")
    add("--k", type=int, help="responses a question; default: 32 for AIME and AMC, else 1")
    add("--temperature", type=float, help="default: 0.6, with --demonstrations 1, as PEAR wants it")
    add("--max-tokens", type=int, default=8192, help="of a response")
    add("--seed", type=int, default=0)
    add(
        "--system",
        help="system message, as 'Reason step by step, and put your final answer in "
        r"\boxed{}.'; default: the rows' own, if any, else the chat template's",
    )
    styles = "the tokenizer's chat template, or plain text; auto: chat if it has one"
    add("--template", choices=("auto", "chat", "plain"), default="auto", help=styles)
    prefix = r"ends each prompt, as '<think>\n'"
    add("--generation-prefix", default="", type=line_breaks, help=prefix)
    code = "run Python code that comes with the model"
    add("--trust-remote-code", action="store_true", help=code)
    add("--sampler", choices=("auto", "vllm", "torch"), default="auto")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    meaning = "auto: bfloat16 on GPUs, as in training; elsewhere the checkpoint's"
    add("--dtype", choices=dtypes, default="auto", help=meaning)
    add("--out", type=Path, help="folder of responses and results; default: evaluations/MODEL")
    taught = "FILE.jsonl of the bench's rows, for training: right responses are their solutions"
    add("--demonstrations", type=Path, metavar="FILE.jsonl", help=taught)
    add("--keep", choices=("shortest", "all"), help="which right responses; default: shortest")
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
    kinds = [f"  {name:10} {kind.answer}: {kind.where}" for name, kind in KINDS.items()]
    parser.epilog = "\n".join(["each kind of answer, and where it stands in a response:", *kinds])


def fail(
    program: str, error: Exception, refusal: type, code: int, place: str = "", memory: str = ""
) -> int:
    """Says in a line what is wrong, and returns the exit code: `code` for a refusal, else 1.

    A refusal is an error of that type raised by these files: all ranks have it, and rank 0 says it.
    Any other may be a rank's own: each says it with its number and, if it is neither the system's
    nor a reward function's, with a traceback. memory: what helps where a GPU's is spent.

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
        if memory and "out of memory" in str(error):  # torch's own type, CUDA's, and vLLM's
            message += f"; {memory}"
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
