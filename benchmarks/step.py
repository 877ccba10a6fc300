"""One optimizer step (forward, backward, update) of GRPO or SFT: TRL's trainers and ours, on the same batch of uneven lengths.

    OMP_NUM_THREADS=1 python benchmarks/step.py {grpo,sft} [--ranks 2] [--checkpointing]     (needs trl beside our own packages)

Each side runs its own loop (TRL: train() on prepared samples; ours: rl_update and sft_step) in processes of its own, in turn.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
GROUP = 8  # samples of a question
STEPS = 3  # in each process; the first is not timed
LR = 1e-5
SIZE = {"vocab_size": 16384, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
ALONE = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "0",
}


def rows(count: int) -> list[tuple[list[int], list[int], float]]:
    """(prompt, response, advantage): prompts of 20 to 120 tokens, responses log-normal, to 1,024."""
    draw, found = random.Random(0), []
    for _ in range(count // GROUP):
        prompt = draw.choices(range(10, 16000), k=draw.randint(20, 120))
        for _ in range(GROUP):
            length = max(8, min(1024, round(draw.lognormvariate(4.9, 0.9))))
            found.append(
                (
                    prompt,
                    draw.choices(range(10, 16000), k=length),
                    draw.choice([-1.0, -0.5, 0.25, 1.0]),
                )
            )
    return found


def make_model(folder: str, **config) -> None:
    import torch

    import data
    import transformers

    tokenizer = data.embedded_tokenizer()
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **(SIZE | config),
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    question = {"question": "1+1?", "answer": "2", "solution": "\\boxed{2}"}
    Path(folder, "questions.jsonl").write_text((json.dumps(question) + "\n") * GROUP)


def memory(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) * 1024


class Meter:
    """Seconds of each step, and the largest resident set during all of them above the one before the first."""

    def __init__(self):
        self.before, self.seconds = memory("VmRSS"), []
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present

    def start(self):
        self.began = time.perf_counter()

    def stop(self):
        self.seconds.append(time.perf_counter() - self.began)

    def report(self, losses: list[float], norms: list[float]) -> str:
        return json.dumps(
            {
                "seconds": self.seconds[1:],
                "memory": memory("VmHWM") - self.before,
                "losses": losses,
                "norms": norms,
            }
        )


def our_run(folder: str, batch, *flags):
    """A Run of ours as main() makes it; its questions, and a queue of SFT steps on all of them, are those of the batch."""
    import data
    import mifo

    run = mifo.set_up(
        mifo.parse_config(
            list(
                map(
                    str,
                    [
                        "--model",
                        folder,
                        "--data",
                        f"{folder}/questions.jsonl",
                        "--out",
                        f"{folder}/out",
                        "--sampler",
                        "torch",
                        "--max-prompt",
                        128,
                        "--max-response",
                        1024,
                        "--questions",
                        16,
                        "--sft-batch",
                        len(batch),
                        "--buffer-size",
                        GROUP,
                        "--probe-bound",
                        100,  # the samples' log-probabilities are made up
                        "--rl-lr",
                        LR,
                        "--sft-lr",
                        LR,
                        *flags,
                    ],
                )
            )
        )
    )
    run.questions = [
        data.Question(str(i), prompt, "", response) for i, (prompt, response, _) in enumerate(batch)
    ]
    run.state.sft_queue = [list(range(len(batch)))] * 100
    return run


def responses(run, batch) -> list:
    import mifo

    return [
        mifo.Response(
            i,
            run.questions[i],
            False,
            response,
            [-9.7] * len(response),
            False,
            "",
            "correct",
            advantage,
        )
        for i, (_, response, advantage) in enumerate(batch)
    ]


def ours(args, batch) -> str:
    import mifo

    micro = args.micro_tokens or default_micro_tokens(batch, args)
    run = our_run(
        args.folder,
        batch,
        "--freeze",
        "off",
        "--rho",
        1,
        "--micro-tokens",
        micro,
        *args.flags.split(),
        "--activation-checkpointing" if args.checkpointing else "--no-activation-checkpointing",
    )
    samples, losses, norms, which = (
        responses(run, batch),
        [],
        [],
        "rl" if args.what == "grpo" else "sft",
    )
    meter = Meter()
    for _ in range(STEPS):
        meter.start()
        mifo.rl_update(run, samples) if args.what == "grpo" else mifo.sft_step(run)
        meter.stop()
        losses.append(run.log[f"{which}/loss"])
        norms.append(run.log[f"{which}/grad_norm"])
    return meter.report(losses, norms)


def default_micro_tokens(batch, args) -> int:
    """The budget of the peer's own micro-batches: the rows it takes at once, as long as the longest."""
    return args.per_device * (max(len(p) for p, _, _ in batch) + max(len(r) for _, r, _ in batch))


def trl(args, batch) -> str:
    import datasets
    import torch

    import data  # noqa: F401, before transformers: it hides packages that break its import
    import transformers
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    datasets.config.TORCHCODEC_AVAILABLE = False  # hidden as well
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32)
    losses, norms = [], []

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, *a, **k):
            self.meter = Meter()

        def on_step_begin(self, *a, **k):
            self.meter.start()

        def on_step_end(self, *a, **k):
            self.meter.stop()

        def on_log(self, config, state, control, logs, **k):
            if "grad_norm" in logs:
                losses.append(logs["loss"])
                norms.append(logs["grad_norm"])

    common = dict(
        output_dir=f"{args.folder}/trl",
        per_device_train_batch_size=args.per_device,
        max_steps=STEPS,
        learning_rate=LR,
        gradient_accumulation_steps=len(batch) // args.per_device // args.ranks,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_grad_norm=1.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=args.checkpointing,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    watch = Watch()
    if args.what == "sft":
        found = [
            {"input_ids": p + r, "completion_mask": [0] * len(p) + [1] * len(r)}
            for p, r, _ in batch
        ]
        trainer = SFTTrainer(
            model,
            SFTConfig(max_length=None, completion_only_loss=True, **common),
            train_dataset=datasets.Dataset.from_list(found),
            processing_class=tokenizer,
            callbacks=[watch],
        )
    else:
        rank = int(os.environ.get("RANK", 0))
        share = batch[rank * len(batch) // args.ranks : (rank + 1) * len(batch) // args.ranks]

        def padded(parts, left):
            width = max(map(len, parts))
            ids = [
                [0] * (width - len(p)) + p if left else p + [0] * (width - len(p)) for p in parts
            ]
            mask = [
                [0] * (width - len(p)) + [1] * len(p)
                if left
                else [1] * len(p) + [0] * (width - len(p))
                for p in parts
            ]
            return torch.tensor(ids), torch.tensor(mask)

        class Prepared(GRPOTrainer):
            def _generate_and_score_completions(self, inputs):
                prompts, prompt_mask = padded([p for p, _, _ in share], left=True)
                completions, mask = padded([r for _, r, _ in share], left=False)
                return {
                    "prompt_ids": prompts,
                    "prompt_mask": prompt_mask,
                    "completion_ids": completions,
                    "completion_mask": mask,
                    "advantages": torch.tensor([a for _, _, a in share]),
                    "num_items_in_batch": torch.tensor(sum(len(r) for _, r, _ in batch)),
                }

        trainer = Prepared(
            model,
            lambda completions, **k: [0.0] * len(completions),
            GRPOConfig(num_generations=GROUP, max_completion_length=1024, **common),
            callbacks=[watch],
            train_dataset=datasets.Dataset.from_list([{"prompt": "1+1?"}] * len(batch)),
            processing_class=tokenizer,
        )
    trainer.train()
    return watch.meter.report(losses, norms)


def worker(args) -> None:
    out = {"trl": trl, "ours": ours}[args.side](args, rows(args.rows))
    Path(args.folder, f"{args.side}-{os.environ.get('RANK', 0)}.json").write_text(out)
    sys.stdout.flush()
    os._exit(0)


def launch(command: list[str], ranks: int) -> None:
    """Runs a script on one rank, or by torchrun on several; leaves with its output if it fails."""
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        if ranks > 1
        else []
    )
    env = os.environ | {"ACCELERATE_USE_CPU": "true"} | (ALONE if ranks == 1 else {})
    done = subprocess.run(
        [sys.executable, *torchrun, *command], env=env, text=True, capture_output=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-4000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["grpo", "sft"])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rows", type=int, default=16, help="of the batch, over all ranks")
    parser.add_argument(
        "--per-device", type=int, default=8, help="rows of a micro-batch of TRL's (its default)"
    )
    parser.add_argument(
        "--micro-tokens",
        type=int,
        default=0,
        help="of a micro-batch of ours; 0: as many as one of TRL's has padded",
    )
    parser.add_argument(
        "--checkpointing",
        action="store_true",
        help="recompute activations, on both sides (TRL's default)",
    )
    parser.add_argument("--flags", default="", help="more of ours, in one string")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", choices=["trl", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return worker(args)
    results = {"trl": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder)
        for _ in range(args.rounds):
            for side in results:
                launch([__file__, *sys.argv[1:], "--side", side, "--folder", folder], args.ranks)
                found = [Path(folder, f"{side}-{rank}.json") for rank in range(args.ranks)]
                results[side].append([json.loads(path.read_text()) for path in found])
                for path in found:
                    path.unlink()
    batch = rows(args.rows)
    tokens = sum(len(p) + len(r) for p, r, _ in batch)
    speed = {
        side: tokens / statistics.median(s for run in runs for s in run[0]["seconds"])
        for side, runs in results.items()
    }
    peak = {
        side: statistics.median(max(rank["memory"] for rank in run) for run in runs) / 2**20
        for side, runs in results.items()
    }
    far = {
        key: max(
            abs(a - b) / max(abs(a), 1e-3)
            for a, b in zip(results["trl"][0][0][key], results["ours"][0][0][key])
        )
        for key in ("losses", "norms")
    }
    print(
        f"{args.what}: {args.rows} rows, {tokens:,} tokens, the longest row {max(len(p) + len(r) for p, r, _ in batch):,}; ranks "
        f"{args.ranks}; checkpointing {'on' if args.checkpointing else 'off'}"
    )
    print(f"{'':24}{'TRL':>10}{'ours':>10}{'ratio':>8}  target")
    print(
        f"{'tokens a second':24}{speed['trl']:10.0f}{speed['ours']:10.0f}{speed['ours'] / speed['trl']:8.2f}  "
        f"at least {2.0 if args.what == 'grpo' else 1.5}"
    )
    print(
        f"{'peak memory, MiB':24}{peak['trl']:10.0f}{peak['ours']:10.0f}{peak['ours'] / peak['trl']:8.2f}  at most 0.6"
    )
    print(
        f"largest relative difference over {STEPS} steps: loss {far['losses']:.1e}, gradient norm {far['norms']:.1e}"
    )


if __name__ == "__main__":
    main()
