"""How long a large file of demonstrations takes to load, and how much memory of its own that costs.

    python benchmarks/loading.py --rows 46000 --format jsonl

Writes rows in the layout of OpenR1-Math-46k (8,000 tokens of made-up reasoning each, every fourth
gold answer no plain number) to --dir, loads them twice in fresh processes, and deletes them. The
first load tokenises and checks every row, the second reads the outcome. `anonymous` is the
process's own memory, without the pages of memory-mapped files.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data  # before transformers: it hides packages that break its import
import eval as evaluation
import pyarrow
import pyarrow.parquet
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = (
    "we have that the sum of each term is so let x be an integer then wait check again therefore "
    "since if $x^2+1$ $\\frac{a}{b}$ $n-1$ \\sqrt{3} 12 7 100 \\cdot + = angle triangle divided by "
    "modulo hence"
).split()


def made_up_row(i: int, thought: str) -> dict:
    gold = str(i) if i % 4 else f"{i} \\sqrt{{2}}"
    text = f"<think>\n{thought}\n</think>\nThe answer is $\\boxed{{{gold}}}$."
    return {
        "data_source": "",
        "prompt": [
            {"role": "system", "content": "Think, then answer in \\boxed{}."},
            {"role": "user", "content": f"What is {i} times one?"},
        ],
        "target": [{"role": "assistant", "content": text}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": gold},
        "extra_info": {"index": i},
    }


def batches(rows: int, chars: int):
    rng = random.Random(0)
    paragraphs = [" ".join(rng.choices(WORDS, k=rng.randint(20, 120))) for _ in range(5000)]
    for start in range(0, rows, 500):
        batch = []
        for i in range(start, min(start + 500, rows)):
            thought = "\n\n".join(rng.choices(paragraphs, k=chars // 80))[:chars]
            batch.append(made_up_row(i, thought))
        yield batch


def write(path: Path, rows: int, chars: int, row_group: int) -> None:
    if path.suffix == ".jsonl":
        with path.open("w") as lines:
            for batch in batches(rows, chars):
                lines.writelines(json.dumps(row) + "\n" for row in batch)
        return
    tables = [pyarrow.Table.from_pylist(batch) for batch in batches(rows, chars)]
    pyarrow.parquet.write_table(pyarrow.concat_tables(tables), path, row_group_size=row_group)


def anonymous_mb() -> float:
    """This process's own memory in MB (Anonymous of smaps_rollup; not known but on Linux)."""
    if not Path("/proc/self/smaps_rollup").exists():
        return float("nan")
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return int(rollup.split("Anonymous:")[1].split()[0]) / 1024


def measure(path: str, folder: str, tokenizer_file: str, max_response: int) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=tokenizer_file, eos_token="<|endoftext|>")
    start, done = anonymous_mb(), threading.Event()
    seen = [start]

    def watch():
        while not done.wait(0.05):
            seen.append(anonymous_mb())

    threading.Thread(target=watch, daemon=True).start()
    times = [time.perf_counter()]
    rows = data.load_rows(path, cache_dir=folder)
    times.append(time.perf_counter())
    with evaluation.Checker(evaluation.checker_workers(1)) as checker:
        questions = data.load_questions(
            path,
            tokenizer,
            max_prompt=1024,
            max_response=max_response,
            cache_dir=folder,
            checker=checker,
        )
    times.append(time.perf_counter())
    lengths = [len(questions[i].demonstration) for i in range(min(20, len(questions)))]
    times.append(time.perf_counter())
    done.set()
    reading, preparing, indexing = (after - before for before, after in zip(times, times[1:]))
    print(
        f"rows {len(rows.table)}: reading {reading:.2f} s, questions {preparing:.2f} s, "
        f"{len(lengths)} of them {indexing:.2f} s ({sum(lengths) / len(lengths):.0f} tokens each); "
        f"anonymous {start:.0f} MB before, peak {max(seen):.0f} MB; {questions.report()}",
        flush=True,
    )


def train_tokenizer(file: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    tokenizer.save(str(file))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=46000)
    parser.add_argument("--chars", type=int, default=25500, help="characters of a demonstration")
    parser.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl")
    parser.add_argument("--row-group", type=int, default=500, help="rows of a parquet row group")
    parser.add_argument("--max-response", type=int, default=8192)
    parser.add_argument("--dir", help="where the file goes (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        path, tokenizer_file = Path(folder) / f"rows.{args.format}", Path(folder) / "tokenizer.json"
        write(path, args.rows, args.chars, args.row_group)
        train_tokenizer(tokenizer_file)
        print(f"{path.stat().st_size / 1e9:.2f} GB of {args.format}", flush=True)
        command = [sys.executable, __file__, "--measure", path, folder, tokenizer_file]
        for run in ("first", "second"):
            print(run, end=" load: ", flush=True)
            subprocess.run([*command, str(args.max_response)], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:5], int(sys.argv[5]))
    else:
        main()
