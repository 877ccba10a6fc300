"""Hostile answers through the checker: time an answer, wrong verdicts, memory over many answers.

    python benchmarks/faults_checker.py --answers 100000 --hostile 0.01 --workers 2

Prints the verdicts on the whole corpus and its slowest answers, then checks --answers of them, of
which a share of --hostile is drawn from the corpus and the rest are ordinary sums, while the memory
of parent and workers is watched.
"""

import argparse
import random
import string
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval as evaluation

# fmt: off
GOLDS = (
    "271828183", r"\frac{371}{913}", r"(37,\infty)", "x^2+73x+191", r"\{173,239\}", r"x=61",
    r"17\sqrt{59}", r"\begin{pmatrix} 31 \\ -43 \end{pmatrix}", r"\text{neither}", "(5,-7,11)",
    r"37 + 41i", r"\frac{\pi}{173}",
)
TOKENS = [
    *r"0 1 2 7 9 x y i e + - * / ^ _ = < > ( ) [ ] { } | ! , . ; : % & ~ # $".split(),
    " ", r"\{", r"\}", r"\\",
    *r"\frac \sqrt \sum \prod \int \lim \log \sin \left( \right) \left[ \right. \cup \cap".split(),
    *r"\infty \pi \text{ \mathbb{R} \begin{pmatrix} \end{pmatrix} \binom \cdot \pm \le \in".split(),
    *r"\boxed{ \circ \dots \overline{ \operatorname{ ^{ _{ } {{ }} ^{10^{9}} 999999 \%".split(),
    *r"\not \! \mod \gcd( \lfloor \rceil \bmod \to \emptyset \setminus".split(),
]
TOWERS = ("2", "9", "10", "x", r"\pi", "0.5", "(-3)", "i", r"\frac{7}{3}")
LARGE = [
    *(f"10^{{{k}}}" for k in (3, 5, 7, 9, 12, 100)),
    "999999999", "10^{10^{9}}", "123456789123456789",
]
WITH_LARGE = [
    "2^{%s}", "2^{-%s}", r"(\frac{3}{2})^{%s}", r"\left(1+10^{-9}\right)^{%s}", "1.0000001^{%s}",
    "(1+i)^{%s}", "(x+1)^{%s}", r"\sqrt[%s]{2}", r"(\sqrt{2}+\sqrt{3})^{%s}", "%s!", "(%s)!!",
    "((%s)!)!", r"\binom{%s}{77777}", r"\binom{2\cdot %s}{500}",
    r"\sum_{k=1}^{%s} k^k", r"\sum_{k=1}^{%s} \frac{1}{k}", r"\prod_{k=1}^{%s} (k+x)",
    r"\int_0^{%s} x^{x} dx", r"\lim_{x \to %s} x^x", r"\sin(%s)", r"\log(%s)",
    r"\tan(\tan(\tan(%s)))", "e^{e^{%s}}", r"\lfloor \pi^{%s} \rfloor", r"7^{%s} \bmod 13",
    r"\gcd(%s, 2^{9999})", r"%s\%%", r"%s^\circ",
    r"[1, %s] \cap \mathbb{Z}", r"\{1, 2, \dots, %s\}", "x^{%s}+x+1=0", "x^{%s} < 5",
    r"\log_{%s} 2^{x^{x}}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}^{%s}",
    r"\begin{vmatrix} x & %s \\ 3 & x \end{vmatrix}", r"f(%s)", r"0.\overline{%s}", r"\sqrt{%s}",
    r"\frac{1}{2^{%s}}", r"\cos^{%s} x",
]
NESTED = [
    ("(", ")"), ("[", "]"), ("{", "}"), (r"\{", r"\}"), (r"\left(", r"\right)"),
    (r"\frac{1}{", "}"), (r"\sqrt{", "}"), ("|", "|"), ("-", ""), ("2^{", "}"),
    (r"\text{", "}"), (r"\sin(", ")"), ("", "!"), ("", r"\%"), (r"\log ", ""),
    ("1+(", ")"), ("x_{", "}"), ("f(", ")"), (r"\lfloor ", r"\rfloor "), (r"\overline{", "}"),
]
JOINED = [
    ("x", "+"), ("1", ","), ("x", "="), ("x", "<"), ("(0,1)", r"\cup"), ("9", r"\cdot "),
    ("x", "^"), ("1", "/"), (r"\pm 1", ""), ("(x+y)", ""), (r"\sqrt{2}", "+"), ("a", ""),
    ("1", "&"), ("1", r"\\"), ("x", "!"), ("", r"\frac"), (r"\sin", ""),
]
ODD = [
    "__import__('os').system('touch evaluated')", "exec('while 1: pass')",
    "().__class__.__bases__[0].__subclasses__()", r"\text{__import__('os').abort()}",
    r"\operatorname{exit}(0)", "lambda: 0", "open('evaluated','w')", "os._exit(0)", "f''",
    "correct", '"correct"\n"correct"', "\ncorrect\n", "True", "None", "nan", "NaN", r"\infty",
    "-oo", "zoo", "inf", "1e999999999", "0/0", r"\frac{0}{0}", r"\frac{1}{0}", "0^0", r"\emptyset",
    r"\{\}", "()", r"\%", "$", "$$", r"\$", r"\\", "?", r"\input{/etc/passwd}", r"\def\x{\x\x}\x",
    r"\newcommand{\a}{\a\a}\a", r"\loop\iftrue\repeat", "\\boxed" * 100, "\u202e7\u202c",
    "\u200f\u05d0\u05d15", "5\0", "\0" * 500, "\ud800", "\udfff\ud800", "\ufeff1", "\uff17",
    "\u0667", "\u2467", "x\u0301" * 300, "\u200b" * 900, "\U0001f600" * 200, "\x1b[2J",
    "\r\n" * 300, "\t" * 999, "\x07\x08\x7f", "".join(map(chr, range(32))), "\u2028\u2029\x85",
    "2\u00b2\u00b3", "\u221a\u221a2",
]
REPEATED = [
    "(", "{", "}", "9", "\\", "\\boxed{", "\\boxed", "\\boxed{}", "\0", " ", "$", "answer is ",
    "####", "1,", "\\{", "\u202e", "<think>",
]
# fmt: on


def tower(base: str, height: int) -> str:
    return base if height == 1 else f"{base}^{{{tower(base, height - 1)}}}"


def hostile_answers() -> list[str]:
    """What a model, or somebody, might put into a box to stop, break or fool the checker.

    Always the same 853.
    """
    draw = random.Random(0)
    found = [tower(base, height) for base in TOWERS for height in (3, 4, 5, 6, 30)]
    found += ["**".join("9" * k) for k in (2, 3, 4, 9)]
    found += ["^".join("9" * k) for k in (3, 4, 9, 100)]
    for large in LARGE:
        found += [form % large for form in WITH_LARGE]
    for k in (20, 60, 150, 400):
        found += [left * k + "1" + right * k for left, right in NESTED]
        found += [separator.join([item] * k) for item, separator in JOINED]
        found.append(",".join(map(str, range(k))))
        found.append("+".join(rf"\sqrt{{{i}}}" for i in range(k)))
        found.append(" ".join(string.ascii_letters[:k]))
        found.append("".join(f"(x-{i})" for i in range(k)))
        found.append(r"\cup".join(f"({2 * i},{2 * i + 1})" for i in range(k)))
        rows = r"\\".join(["x&x&x&x&x&x&x&x&x"] * (k // 9))
        found.append(rf"\begin{{pmatrix}}{rows}\end{{pmatrix}}^{{-1}}")
    found += ODD
    found += ["".join(draw.choices(TOKENS, k=draw.randint(1, 40))) for _ in range(150)]
    for _ in range(60):  # slips of the pen
        gold, at = draw.choice(GOLDS), draw.randrange(3)
        slip = draw.choice(TOKENS) * draw.randint(1, 30)
        found.append(gold[:at] + slip + gold[at + draw.randint(1, 3) :] + draw.choice(TOKENS))
    return list(dict.fromkeys(found))


def hostile_responses() -> list[str]:
    """The answers boxed, and responses that are hostile as a whole."""
    whole = [piece * (10_000_000 // len(piece)) for piece in REPEATED]
    whole.append(f"\\boxed{{{'{' * 5_000_000}{'}' * 5_000_000}}}")
    whole.append("x" * 10_000_000 + "\\boxed{10^{10^{9}}}")
    whole.append("\\boxed{" + "1" * 10_000_000 + "}")
    return [f"Hence \\boxed{{{answer}}}." for answer in hostile_answers()] + whole


def memory_mb(pid) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def ordinary(i: int) -> tuple[str, str, str]:
    """(response, gold, verdict): never the same twice, half of them right.

    Plain comparison can tell none of them; one in 21 takes SymPy ten times as long as the others.
    """
    a, b, right = i, i % 97 + 2, i % 2 == 0
    off = 0 if right else 1
    sums = [
        (rf"\frac{{{a}}}{{{b}}} + 1", rf"\frac{{{a + b + off}}}{{{b}}}"),
        (rf"{a}+{b}", str(a + b + off)),
    ]
    slow = [
        (rf"x^2 - {a}x + {b}", rf"{b} + x^2 - {a + off}x"),
        (rf"({a}, {b})", rf"\left({a + off}, {b}\right)"),
    ]
    answer, gold = (20 * sums + slow)[i // 2 % 42]
    return f"So \\boxed{{{answer}}}", gold, "correct" if right else "wrong"


def check_corpus(responses: list[str], workers: int) -> None:
    """One at a time, with the time that each takes."""
    verdicts, slowest = [], []
    with evaluation.Checker(workers) as checker:
        for i, response in enumerate(responses):
            checker.check([r"\boxed{x+1}"], ["x+2"], ["math"])  # no worker's start in what follows
            start = time.perf_counter()
            verdicts += checker.check([response], [GOLDS[i % len(GOLDS)]], ["math"])
            slowest.append((time.perf_counter() - start, response[:60]))
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in evaluation.VERDICTS)
    print(f"{len(responses)} hostile answers: {counts}")
    for seconds, response in sorted(slowest, reverse=True)[:5]:
        print(f"  {seconds:.2f} s {ascii(response)}")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--answers", type=int, default=100_000)
    parser.add_argument("--hostile", type=float, default=0.01, help="share of hostile ones")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    responses = hostile_responses()
    check_corpus(responses, args.workers)

    draw, memory, wrongly, disagree = random.Random(1), [], [], 0
    count = {verdict: 0 for verdict in evaluation.VERDICTS}
    with evaluation.Checker(args.workers) as checker:
        start = time.perf_counter()
        for first in range(0, args.answers, 1000):
            rows = []
            for i in range(first, min(first + 1000, args.answers)):
                if draw.random() < args.hostile:
                    rows.append((draw.choice(responses), GOLDS[i % len(GOLDS)], None))
                else:
                    rows.append(ordinary(i))
            texts, golds, expected = map(list, zip(*rows))
            verdicts = checker.check(texts, golds, ["math"] * len(rows))
            for verdict, text, gold, right in zip(verdicts, texts, golds, expected):
                count[verdict] += 1
                disagree += right not in (None, verdict)
                if right is None and verdict == "correct":
                    wrongly.append((text[:60], gold))
            workers = [process for process in checker.idle.queue if process]
            largest = max((memory_mb(process.pid) for process in workers), default=0.0)
            memory.append((memory_mb("self"), largest))
        seconds = time.perf_counter() - start
    rate = f"{args.answers / seconds:.0f}/s, {args.workers} workers"
    print(f"{args.answers} answers in {seconds:.0f} s ({rate}): {count}")
    print(f"ordinary ones judged otherwise than expected: {disagree}")
    for share in (0.1, 0.25, 0.5, 0.75, 1):
        here, largest = memory[max(0, int(len(memory) * share) - 1)]
        after = f"  memory after {share:4.0%}"
        print(f"{after}: this process {here:.0f} MB, largest worker {largest:.0f} MB")
    print(f"hostile answers judged correct: {len(wrongly)} {wrongly[:3]}")
    sys.exit(bool(wrongly or disagree))


if __name__ == "__main__":
    main()
