"""How long a large file of demonstrations takes to load, and how much memory of its own that costs.

    python benchmarks/loading.py --rows 46000 --format jsonl

Writes rows in the layout of OpenR1-Math-46k (8,000 tokens of made-up reasoning each, every fourth gold answer no plain
number) to --dir, measures in fresh processes, and deletes them. The first load counts the tokens of as many
demonstrations as data.COUNTED_CHARS says, unless --max-response is above --chars. `anonymous` is the process's own memory, without the pages of
memory-mapped files.
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
WORDS = (
    "we have that the sum of each term is so let x be an integer then wait check again therefore since if "
    "$x^2+1$ $\\frac{a}{b}$ $n-1$ \\sqrt{3} 12 7 100 \\cdot + = angle triangle divided by modulo hence"
).split()


def write(path: Path, rows: int, chars: int) -> None:
    import pyarrow
    import pyarrow.parquet

    draw, writer, batch = random.Random(0), None, []
    paragraphs = [" ".join(draw.choices(WORDS, k=draw.randint(20, 120))) for _ in range(5000)]
    with path.with_suffix(".jsonl").open("w") as lines:
        for i in range(rows):
            thought = "\n\n".join(draw.choices(paragraphs, k=chars // 80))[:chars]
            gold = str(i) if i % 4 else f"{i} \\sqrt{{2}}"
            text = f"<think>\n{thought}\n</think>\nThe answer is $\\boxed{{{gold}}}$."
            prompt = [
                {"role": "system", "content": "Think, then answer in \\boxed{}."},
                {"role": "user", "content": f"What is {i} times one?"},
            ]
            batch.append(
                {
                    "data_source": "",
                    "prompt": prompt,
                    "target": [{"role": "assistant", "content": text}],
                    "ability": "math",
                    "reward_model": {"style": "rule", "ground_truth": gold},
                    "extra_info": {"index": i},
                }
            )
            if len(batch) == 500 or i + 1 == rows:
                table = pyarrow.Table.from_pylist(batch)
                if path.suffix == ".parquet":
                    writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema)
                    writer.write_table(table)
                else:
                    lines.writelines(json.dumps(row) + "\n" for row in batch)
                batch = []
    if writer:
        writer.close()
        path.with_suffix(".jsonl").unlink()


def anonymous_mb() -> float:
    """This process's own memory in MB (Anonymous of smaps_rollup; not known but on Linux)."""
    if not Path("/proc/self/smaps_rollup").exists():
        return float("nan")
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return int(rollup.split("Anonymous:")[1].split()[0]) / 1024


def measure(path: str, folder: str, tokenizer_file: str, max_response: int) -> None:
    import data
    import eval
    from transformers import PreTrainedTokenizerFast

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
    with eval.Checker(eval.checker_workers(1)) as checker:
        questions = data.load_questions(
            path,
            tokenizer,
            max_prompt=1024,
            max_response=max_response,
            cache_dir=folder,
            checker=checker,
        )
    times.append(time.perf_counter())
    tokens = sum(len(questions[i].demonstration) for i in range(min(20, len(questions)))) / min(
        20, len(questions)
    )
    times.append(time.perf_counter())
    done.set()
    print(
        f"rows {len(rows)}: reading {times[1] - times[0]:.2f} s, questions {times[2] - times[1]:.2f} s, "
        f"20 of them tokenised {times[3] - times[2]:.2f} s ({tokens:.0f} tokens each); "
        f"anonymous {start:.0f} MB before, peak {max(seen):.0f} MB; {questions.report()}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=46000)
    parser.add_argument(
        "--chars", type=int, default=25500, help="length of a demonstration in characters"
    )
    parser.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl")
    parser.add_argument("--max-response", type=int, default=8192)
    parser.add_argument("--dir", help="where the file goes (default: a temporary folder)")
    args = parser.parse_args()
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        path, tokenizer_file = (
            Path(folder) / f"rows.{args.format}",
            str(Path(folder) / "tokenizer.json"),
        )
        write(path, args.rows, args.chars)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.train_from_iterator(
            [" ".join(WORDS)],
            trainers.BpeTrainer(
                vocab_size=1000,
                special_tokens=["<|endoftext|>"],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            ),
        )
        tokenizer.save(tokenizer_file)
        print(f"{path.stat().st_size / 1e9:.2f} GB of {args.format}", flush=True)
        for run in ("first", "second"):
            print(run, end=" load: ", flush=True)
            subprocess.run(
                [
                    sys.executable,
                    __file__,
                    "--measure",
                    str(path),
                    folder,
                    tokenizer_file,
                    str(args.max_response),
                ],
                check=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:5], int(sys.argv[5]))
    else:
        main()
