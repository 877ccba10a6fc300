"""An optimizer step (forward, backward, update) of GRPO or SFT: TRL's trainers and ours.

    OMP_NUM_THREADS=1 python benchmarks/step.py {grpo,sft} [--ranks 2] [--checkpointing]

Both get the same batch of uneven lengths. Each side runs its own loop (TRL: train() on prepared
samples; ours: rl_update and sft_step) in processes of its own, in turn. Needs trl.
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
SIZE = {
    "vocab_size": 16384,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
ALONE = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "0",
}


def rows(count: int) -> list[tuple[list[int], list[int], float]]:
    """(prompt, response, advantage): 20 to 120 tokens, and log-normally many up to 1,024."""
    draw, found = random.Random(0), []
    for _ in range(count // GROUP):
        prompt = draw.choices(range(10, 16000), k=draw.randint(20, 120))
        for _ in range(GROUP):
            length = max(8, min(1024, round(draw.lognormvariate(4.9, 0.9))))
            response = draw.choices(range(10, 16000), k=length)
            found.append((prompt, response, draw.choice([-1.0, -0.5, 0.25, 1.0])))
    return found


def make_model(folder: str, **config) -> None:
    import torch

    import data
    import transformers

    tokenizer = data.embedded_tokenizer()
    torch.manual_seed(0)
    shape = transformers.Qwen2Config(
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **(SIZE | config),
    )
    transformers.Qwen2ForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    question = {"question": "1+1?", "answer": "2", "solution": "\\boxed{2}"}
    Path(folder, "questions.jsonl").write_text((json.dumps(question) + "\n") * GROUP)


def memory(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) * 1024


class Meter:
    """Seconds of each step, and the peak of resident memory above that before the first."""

    def __init__(self):
        self.before, self.seconds = memory("VmRSS"), []
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present

    def start(self):
        self.began = time.perf_counter()

    def stop(self):
        self.seconds.append(time.perf_counter() - self.began)

    def report(self, losses: list[float], norms: list[float]) -> str:
        found = {"seconds": self.seconds[1:], "memory": memory("VmHWM") - self.before}
        return json.dumps(found | {"losses": losses, "norms": norms})


# --------------------------------------------------------------------------------------------------
# Ours


def our_run(folder: str, batch: list, *flags):
    """A Run as main() makes it; its questions are the batch's, all of them in each SFT step."""
    import data
    import mifo

    settings = {
        "model": folder,
        "data": f"{folder}/questions.jsonl",
        "out": f"{folder}/out",
        "sampler": "torch",
        "max-prompt": 128,
        "max-response": 1024,
        "questions": 16,
        "sft-batch": len(batch),
        "buffer-size": GROUP,
        "probe-bound": 100,  # the samples' log-probabilities are made up
        "rl-lr": LR,
        "sft-lr": LR,
    }
    argv = [f"--{name}={value}" for name, value in settings.items()]
    Path(folder, "out").mkdir(exist_ok=True)  # as mifo.py's lock_folder does
    run = mifo.set_up(mifo.parse_config([*argv, *map(str, flags)]))
    run.questions = [
        data.Question(str(i), prompt, "", response) for i, (prompt, response, _) in enumerate(batch)
    ]
    run.state.sft_queue = [list(range(len(batch)))] * 100
    return run


def responses(run, batch: list) -> list:
    """The batch's rows as if they had been sampled and rewarded."""
    import mifo

    found = []
    for question, (prompt, response, advantage) in zip(run.questions, batch):
        found.append(
            mifo.Response(
                id=question.id,
                prompt=prompt,
                tokens=response,
                rollout_logprobs=[-9.7] * len(response),
                truncated=False,
                text="",
                verdict="correct",
                reward=1.0,
                advantage=advantage,
            )
        )
    return found


def our_step(run, which: str, samples: list) -> None:
    """One optimizer step: "rl" on the samples, or "sft" on the next demonstrations."""
    import mifo

    if which == "rl":
        mifo.rl_update(run, samples)
    else:
        mifo.sft_step(run)


def ours(args, batch: list) -> str:
    which = "rl" if args.what == "grpo" else "sft"
    micro = args.micro_tokens or default_micro_tokens(batch, args)
    checkpointing = "--activation-checkpointing"
    if not args.checkpointing:
        checkpointing = "--no-activation-checkpointing"
    flags = ["--freeze", "off", "--rho", 1, "--micro-tokens", micro, *args.flags.split()]
    run = our_run(args.folder, batch, *flags, checkpointing)
    samples, losses, norms, meter = responses(run, batch), [], [], Meter()
    for _ in range(STEPS):
        meter.start()
        our_step(run, which, samples)
        meter.stop()
        losses.append(run.log[f"{which}/loss"])
        norms.append(run.log[f"{which}/grad_norm"])
    return meter.report(losses, norms)


def default_micro_tokens(batch: list, args) -> int:
    """The peer's own micro-batch: the rows that it takes at once, each as long as the longest."""
    return args.per_device * (max(len(p) for p, _, _ in batch) + max(len(r) for _, r, _ in batch))


# --------------------------------------------------------------------------------------------------
# TRL


def trl(args, batch: list) -> str:
    import datasets
    import torch

    import data  # noqa: F401, before transformers: it hides packages that break its import
    import transformers

    datasets.config.TORCHCODEC_AVAILABLE = False  # hidden as well
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32)
    losses, norms, meters = [], [], []

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, *a, **k):
            meters.append(Meter())

        def on_step_begin(self, *a, **k):
            meters[0].start()

        def on_step_end(self, *a, **k):
            meters[0].stop()

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
    make = trl_sft if args.what == "sft" else trl_grpo
    make(args, batch, model, common, processing_class=tokenizer, callbacks=[Watch()]).train()
    return meters[0].report(losses, norms)


def trl_sft(args, batch: list, model, common: dict, **more):
    import datasets
    from trl import SFTConfig, SFTTrainer

    rows = []
    for prompt, response, _ in batch:
        mask = [0] * len(prompt) + [1] * len(response)
        rows.append({"input_ids": prompt + response, "completion_mask": mask})
    config = SFTConfig(max_length=None, completion_only_loss=True, **common)
    return SFTTrainer(model, config, train_dataset=datasets.Dataset.from_list(rows), **more)


def trl_grpo(args, batch: list, model, common: dict, **more):
    """A GRPOTrainer whose samples are this rank's share of the batch."""
    import datasets
    import torch
    from trl import GRPOConfig, GRPOTrainer

    rank = int(os.environ.get("RANK", 0))
    share = batch[rank * len(batch) // args.ranks : (rank + 1) * len(batch) // args.ranks]
    prompts, prompt_mask = padded([prompt for prompt, _, _ in share], left=True)
    completions, mask = padded([response for _, response, _ in share], left=False)
    prepared = {
        "prompt_ids": prompts,
        "prompt_mask": prompt_mask,
        "completion_ids": completions,
        "completion_mask": mask,
        "advantages": torch.tensor([advantage for _, _, advantage in share]),
        "num_items_in_batch": torch.tensor(sum(len(response) for _, response, _ in batch)),
    }

    class Prepared(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            return dict(prepared)

    return Prepared(
        model,
        lambda completions, **k: [0.0] * len(completions),
        GRPOConfig(num_generations=GROUP, max_completion_length=1024, **common),
        train_dataset=datasets.Dataset.from_list([{"prompt": "1+1?"}] * len(batch)),
        **more,
    )


def padded(parts: list[list[int]], left: bool):
    """(token ids, mask), each [B, T], padded on the left or on the right."""
    import torch

    width = max(map(len, parts))
    ids, mask = [], []
    for part in parts:
        empty, full = [0] * (width - len(part)), [1] * len(part)
        ids.append(empty + part if left else part + empty)
        mask.append(empty + full if left else full + empty)
    return torch.tensor(ids), torch.tensor(mask)


# --------------------------------------------------------------------------------------------------
# Both, side by side


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


def measure(args) -> dict[str, list]:
    """{side: [each round's [report of each rank]]}"""
    results = {"trl": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder)
        for _ in range(args.rounds):
            for side in results:
                launch([__file__, *sys.argv[1:], "--side", side, "--folder", folder], args.ranks)
                reports = []
                for rank in range(args.ranks):
                    path = Path(folder, f"{side}-{rank}.json")
                    reports.append(json.loads(path.read_text()))
                    path.unlink()
                results[side].append(reports)
    return results


def relative_difference(key: str, results: dict[str, list]) -> float:
    """The largest of the steps, on the first rank in the first round."""
    theirs, our = (results[side][0][0][key] for side in ("trl", "ours"))
    return max(abs(a - b) / max(abs(a), 1e-3) for a, b in zip(theirs, our))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=["grpo", "sft"])
    add("--ranks", type=int, default=1)
    add("--rows", type=int, default=16, help="of the batch, over all ranks")
    add("--per-device", type=int, default=8, help="rows of TRL's micro-batch (its default)")
    meaning = "of a micro-batch of ours; 0: as many as one of TRL's has padded"
    add("--micro-tokens", type=int, default=0, help=meaning)
    add("--checkpointing", action="store_true", help="recompute activations, on both sides")
    add("--flags", default="", help="more of ours, in one string")
    add("--rounds", type=int, default=2)
    add("--side", choices=["trl", "ours"], help=argparse.SUPPRESS)
    add("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return worker(args)
    results = measure(args)
    lengths = [len(prompt) + len(response) for prompt, response, _ in rows(args.rows)]
    speed, peak = {}, {}
    for side, rounds in results.items():
        seconds = statistics.median(s for reports in rounds for s in reports[0]["seconds"])
        memory = statistics.median(max(r["memory"] for r in reports) for reports in rounds)
        speed[side], peak[side] = sum(lengths) / seconds, memory / 2**20
    least = 2.0 if args.what == "grpo" else 1.5
    print(
        f"{args.what}: {args.rows} rows, {sum(lengths):,} tokens, the longest {max(lengths):,}; "
        f"ranks {args.ranks}; checkpointing {'on' if args.checkpointing else 'off'}"
    )
    print(f"{'':24}{'TRL':>10}{'ours':>10}{'ratio':>8}  target")
    for what, found, target in (
        ("tokens a second", speed, f"at least {least}"),
        ("peak memory, MiB", peak, "at most 0.6"),
    ):
        theirs, our = found["trl"], found["ours"]
        print(f"{what:24}{theirs:10.0f}{our:10.0f}{our / theirs:8.2f}  {target}")
    losses, norms = (relative_difference(key, results) for key in ("losses", "norms"))
    print(f"largest relative difference over {STEPS} steps: loss {losses:.1e}, norm {norms:.1e}")


if __name__ == "__main__":
    main()
