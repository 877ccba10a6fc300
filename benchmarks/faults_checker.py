"""Hostile answers through the checker: time an answer, wrong verdicts, memory over many answers.

    python benchmarks/faults_checker.py --answers 100000 --hostile 0.01 --workers 2

Prints the verdicts on the whole corpus and its slowest answers, then checks --answers of them, of which a share of
--hostile is drawn from the corpus and the rest are ordinary sums, while the memory of parent and workers is watched.
"""

import argparse
import random
import string
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval as evaluation

GOLDS = (
    "271828183",
    r"\frac{371}{913}",
    r"(37,\infty)",
    "x^2+73x+191",
    r"\{173,239\}",
    r"x=61",
    r"17\sqrt{59}",
    r"\begin{pmatrix} 31 \\ -43 \end{pmatrix}",
    r"\text{neither}",
    "(5,-7,11)",
    r"37 + 41i",
    r"\frac{\pi}{173}",
)
TOKENS = [
    *r"0 1 2 7 9 x y i e + - * / ^ _ = < > ( ) [ ] { } | ! , . ; : % & ~ # $".split(),
    " ",
    r"\{",
    r"\}",
    r"\\",
    *(
        r"\frac \sqrt \sum \prod \int \lim \log \sin \left( \right) \left[ \right. \cup \cap \infty \pi \text{ \mathbb{R}"
        r" \begin{pmatrix} \end{pmatrix} \binom \cdot \pm \le \in \boxed{ \circ \dots \overline{ \operatorname{ ^{ _{ }"
        r" {{ }} ^{10^{9}} 999999 \% \not \! \mod \gcd( \lfloor \rceil \bmod \to \emptyset \setminus"
    ).split(),
]


def tower(base: str, height: int) -> str:
    return base if height == 1 else f"{base}^{{{tower(base, height - 1)}}}"


def hostile_answers() -> list[str]:
    """What a model, or somebody, might put into a box to stop, break or fool the checker: always the same 853."""
    draw = random.Random(0)
    n = [f"10^{{{k}}}" for k in (3, 5, 7, 9, 12, 100)] + [
        "999999999",
        "10^{10^{9}}",
        "123456789123456789",
    ]
    found = [
        tower(b, h)
        for b in ("2", "9", "10", "x", r"\pi", "0.5", "(-3)", "i", r"\frac{7}{3}")
        for h in (3, 4, 5, 6, 30)
    ]
    found += ["**".join("9" * k) for k in (2, 3, 4, 9)] + [
        "^".join("9" * k) for k in (3, 4, 9, 100)
    ]
    for k in n:
        found += [
            form % k
            for form in (
                "2^{%s}",
                "2^{-%s}",
                r"(\frac{3}{2})^{%s}",
                r"\left(1+10^{-9}\right)^{%s}",
                "1.0000001^{%s}",
                "(1+i)^{%s}",
                "(x+1)^{%s}",
                r"\sqrt[%s]{2}",
                r"(\sqrt{2}+\sqrt{3})^{%s}",
                "%s!",
                "(%s)!!",
                "((%s)!)!",
                r"\binom{%s}{77777}",
                r"\binom{2\cdot %s}{%s}".replace("%s}{%s", "%s}{500"),
                r"\sum_{k=1}^{%s} k^k",
                r"\sum_{k=1}^{%s} \frac{1}{k}",
                r"\prod_{k=1}^{%s} (k+x)",
                r"\int_0^{%s} x^{x} dx",
                r"\lim_{x \to %s} x^x",
                r"\sin(%s)",
                r"\log(%s)",
                r"\tan(\tan(\tan(%s)))",
                "e^{e^{%s}}",
                r"\lfloor \pi^{%s} \rfloor",
                r"7^{%s} \bmod 13",
                r"\gcd(%s, 2^{%s})".replace("2^{%s}", "2^{9999}"),
                r"%s\%%",
                r"%s^\circ",
                r"[1, %s] \cap \mathbb{Z}",
                r"\{1, 2, \dots, %s\}",
                "x^{%s}+x+1=0",
                "x^{%s} < 5",
                r"\log_{%s} 2^{x^{x}}",
                r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}^{%s}",
                r"\begin{vmatrix} x & %s \\ 3 & x \end{vmatrix}",
                r"f(%s)",
                r"0.\overline{%s}",
                r"\sqrt{%s}",
                r"\frac{1}{2^{%s}}",
                r"\cos^{%s} x",
            )
        ]
    for k in (20, 60, 150, 400):
        found += [
            left * k + "1" + right * k
            for left, right in (
                "()",
                "[]",
                ("{", "}"),
                (r"\{", r"\}"),
                (r"\left(", r"\right)"),
                (r"\frac{1}{", "}"),
                (r"\sqrt{", "}"),
                ("|", "|"),
                ("-", ""),
                ("2^{", "}"),
                (r"\text{", "}"),
                (r"\sin(", ")"),
                ("", "!"),
                ("", r"\%"),
                (r"\log ", ""),
                ("1+(", ")"),
                ("x_{", "}"),
                ("f(", ")"),
                (r"\lfloor ", r"\rfloor "),
                (r"\overline{", "}"),
            )
        ]
        found += [
            sep.join([item] * k)
            for item, sep in (
                ("x", "+"),
                ("1", ","),
                ("x", "="),
                ("x", "<"),
                ("(0,1)", r"\cup"),
                ("9", r"\cdot "),
                ("x", "^"),
                ("1", "/"),
                (r"\pm 1", ""),
                ("(x+y)", ""),
                (r"\sqrt{2}", "+"),
                ("a", ""),
                ("1", "&"),
                ("1", r"\\"),
                ("x", "!"),
                ("", r"\frac"),
                (r"\sin", ""),
            )
        ]
        found += [
            ",".join(map(str, range(k))),
            "+".join(rf"\sqrt{{{i}}}" for i in range(k)),
            " ".join(string.ascii_letters[:k]),
            "".join(f"(x-{i})" for i in range(k)),
            r"\cup".join(f"({2 * i},{2 * i + 1})" for i in range(k)),
            r"\begin{pmatrix}"
            + r"\\".join("&".join("x" * 9) for _ in range(k // 9))
            + r"\end{pmatrix}^{-1}",
        ]
    found += [
        "__import__('os').system('touch evaluated')",
        "exec('while 1: pass')",
        "().__class__.__bases__[0].__subclasses__()",
        r"\text{__import__('os').abort()}",
        r"\operatorname{exit}(0)",
        "lambda: 0",
        "open('evaluated','w')",
        "os._exit(0)",
        "f''",
        "correct",
        '"correct"\n"correct"',
        "\ncorrect\n",
        "True",
        "None",
        "nan",
        "NaN",
        r"\infty",
        "-oo",
        "zoo",
        "inf",
        "1e999999999",
        "0/0",
        r"\frac{0}{0}",
        r"\frac{1}{0}",
        "0^0",
        r"\emptyset",
        r"\{\}",
        "()",
        r"\%",
        "$",
        "$$",
        r"\$",
        r"\\",
        "?",
        r"\input{/etc/passwd}",
        r"\def\x{\x\x}\x",
        r"\newcommand{\a}{\a\a}\a",
        r"\loop\iftrue\repeat",
        "\\boxed" * 100,
        "\u202e7\u202c",
        "\u200f\u05d0\u05d15",
        "5\0",
        "\0" * 500,
        "\ud800",
        "\udfff\ud800",
        "\ufeff1",
        "\uff17",
        "\u0667",
        "\u2467",
        "x\u0301" * 300,
        "\u200b" * 900,
        "\U0001f600" * 200,
        "\x1b[2J",
        "\r\n" * 300,
        "\t" * 999,
        "\x07\x08\x7f",
        "".join(map(chr, range(32))),
        "\u2028\u2029\x85",
        "2\u00b2\u00b3",
        "\u221a\u221a2",
    ]
    found += ["".join(draw.choices(TOKENS, k=draw.randint(1, 40))) for _ in range(150)]
    for _ in range(60):  # slips of the pen
        gold, at = draw.choice(GOLDS), draw.randrange(3)
        slip = draw.choice(TOKENS) * draw.randint(1, 30)
        found.append(gold[:at] + slip + gold[at + draw.randint(1, 3) :] + draw.choice(TOKENS))
    return list(dict.fromkeys(found))


def hostile_responses() -> list[str]:
    """The answers boxed, and responses that are hostile as a whole."""
    whole = [
        piece * (10_000_000 // len(piece))
        for piece in (
            "(",
            "{",
            "}",
            "9",
            "\\",
            "\\boxed{",
            "\\boxed",
            "\\boxed{}",
            "\0",
            " ",
            "$",
            "answer is ",
            "####",
            "1,",
            "\\{",
            "\u202e",
            "<think>",
        )
    ]
    whole += [
        f"\\boxed{{{'{' * 5_000_000}{'}' * 5_000_000}}}",
        "x" * 10_000_000 + "\\boxed{10^{10^{9}}}",
        "\\boxed{" + "1" * 10_000_000 + "}",
    ]
    return [f"Hence \\boxed{{{answer}}}." for answer in hostile_answers()] + whole


def memory_mb(pid) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def ordinary(i: int) -> tuple[str, str, str]:
    """(response, gold, verdict): never the same twice, half of them right, none of which plain comparison can settle; one in
    21 of a kind that takes SymPy ten times as long."""
    a, b, right = i, i % 97 + 2, i % 2 == 0
    sums = [
        (rf"\frac{{{a}}}{{{b}}} + 1", rf"\frac{{{a + b + (not right)}}}{{{b}}}"),
        (rf"{a}+{b}", str(a + b + (not right))),
    ]
    slow = [
        (rf"x^2 - {a}x + {b}", rf"{b} + x^2 - {a + (not right)}x"),
        (rf"({a}, {b})", rf"\left({a + (not right)}, {b}\right)"),
    ]
    answer, gold = (20 * sums + slow)[i // 2 % 42]
    return f"So \\boxed{{{answer}}}", gold, "correct" if right else "wrong"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--answers", type=int, default=100_000)
    parser.add_argument("--hostile", type=float, default=0.01, help="share of hostile ones")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    wrongly, slowest = [], []
    responses = hostile_responses()
    with evaluation.Checker(args.workers) as checker:
        verdicts = []
        for i, response in enumerate(responses):
            checker.check([r"\boxed{x+1}"], ["x+2"], ["math"])  # no worker's start in what follows
            start = time.perf_counter()
            verdicts += checker.check([response], [GOLDS[i % len(GOLDS)]], ["math"])
            slowest.append((time.perf_counter() - start, response[:60]))
    print(
        f"{len(responses)} hostile answers: "
        + ", ".join(f"{verdicts.count(v)} {v}" for v in evaluation.VERDICTS)
    )
    for seconds, response in sorted(slowest, reverse=True)[:5]:
        print(f"  {seconds:.2f} s {ascii(response)}")

    draw, memory, disagree, count = random.Random(1), [], 0, {v: 0 for v in evaluation.VERDICTS}
    with evaluation.Checker(args.workers) as checker:
        start = time.perf_counter()
        for first in range(0, args.answers, 1000):
            rows = [
                (draw.choice(responses), GOLDS[i % len(GOLDS)], None)
                if draw.random() < args.hostile
                else ordinary(i)
                for i in range(first, min(first + 1000, args.answers))
            ]
            verdicts = checker.check(
                [r for r, _, _ in rows], [g for _, g, _ in rows], ["math"] * len(rows)
            )
            for verdict, (response, gold, expected) in zip(verdicts, rows):
                count[verdict] += 1
                disagree += expected not in (None, verdict)
                if expected is None and verdict == "correct":
                    wrongly.append((response[:60], gold))
            memory.append((memory_mb("self"), max(memory_mb(w.process.pid) for w in checker.pool)))
        seconds = time.perf_counter() - start
    print(
        f"{args.answers} answers in {seconds:.0f} s ({args.answers / seconds:.0f}/s, {args.workers} workers): {count}, "
        f"{disagree} ordinary ones judged otherwise than expected"
    )
    for share in (0.1, 0.25, 0.5, 0.75, 1):
        here, workers = memory[max(0, int(len(memory) * share) - 1)]
        print(
            f"  memory after {share:4.0%}: this process {here:.0f} MB, largest worker {workers:.0f} MB"
        )
    print(f"hostile answers judged correct: {len(wrongly)} {wrongly[:3]}")
    sys.exit(bool(wrongly or disagree))


if __name__ == "__main__":
    main()
