"""A whole GRPO step (sampling, checking, update): TRL, and ours with each sampler.

    OMP_NUM_THREADS=1 python benchmarks/whole_step.py [--reward mixed] [--ranks 2] [--model 25M]

TRL samples by `generate` and by vLLM in its own process. All take the same questions in the same
order, on the same model, with one reward function: the checker's verdict, as in the default run,
where ours has nothing to compute for questions whose samples get equal rewards; or `mixed`, which
leaves hardly any response without an advantage. The random model of 25M parameters, never right,
needs the latter; it takes 64 samples a step, and its weights hardly move. Each runs its own loop in
processes of its own, in turn. Beside ours stands the least that its responses could cost:
sampling's matrix products and attention alone, and a plain forward and backward pass. Needs trl,
and vllm for two of the four.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import statistics
import sys
import tempfile
import time
import zlib
from pathlib import Path

import step

UNTIMED = 2  # steps of each process, before the timed ones
SIDES = {
    "trl-generate": "TRL, generate",
    "trl-vllm": "TRL, vLLM",
    "torch": "ours, PyTorch",
    "vllm": "ours, vLLM",
}
LARGER = {
    "hidden_size": 512,
    "intermediate_size": 1600,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "tie_word_embeddings": True,
}


def make_model(name: str, folder: str) -> None:
    """The embedded task's base model, or a random one of 25M parameters for the same tokens."""
    import data

    tokenizer = data.embedded_tokenizer()
    if name == "25M":
        step.make_model(folder, vocab_size=len(tokenizer), **LARGER)
    else:
        data.make_base(Path(folder), 0, tokenizer, data.base_sum, say=lambda text: None)


@functools.cache
def checker():
    import eval as evaluation

    return evaluation.Checker()


def verdict(completions: list[str], answer: list[str], **columns) -> list[float]:
    """1 for a right answer. For TRL, and for ours by --reward, as the next."""
    verdicts = checker().check(completions, answer, ["chain"] * len(completions))
    return [float(v == "correct") for v in verdicts]


def mixed(completions: list[str], answer: list[str], **columns) -> list[float]:
    """1 for a right answer, and 1 more by a text's checksum."""
    right = verdict(completions, answer)
    return [r + zlib.crc32(text.encode()) % 2 for r, text in zip(right, completions)]


REWARDS = {"verdict": verdict, "mixed": mixed}


def parsed(args):
    """The run's mifo.Config, by which TRL too is set."""
    import mifo

    settings = {
        "recipe": step.ROOT / "recipes" / "embedded.toml",
        "out": Path(args.folder).parent / f"out-{args.side}",  # beside the model, which is found
        "schedule": "rl",
        "evaluate": "",
        "eval-every": 0,
        "reward": f"{__file__}:{args.reward}",
        "sampler": args.side if args.side in ("torch", "vllm") else "auto",
        "samples-logged": 0,
    }
    if args.model == "25M":  # at a higher rate random rewards would lead each to other lengths
        settings |= {"questions": 8, "rl-lr": 1e-9}
    argv = [f"--{name}={value}" for name, value in settings.items()]
    return mifo.parse_config(argv)


# --------------------------------------------------------------------------------------------------
# Ours


def ours(args) -> dict:
    import mifo

    cfg = parsed(args)
    Path(cfg.out).mkdir(exist_ok=True)
    run = mifo.set_up(cfg)
    found, update, last = {}, mifo.rl_update, []

    def watched(run, responses):
        last[:] = responses
        update(run, responses)

    mifo.rl_update = watched
    for _ in range(UNTIMED + args.steps):
        run.log.clear()
        begun = time.perf_counter()
        mifo.rl_step(run)
        figures = {
            "seconds": time.perf_counter() - begun,
            "sampling": run.log["seconds/sample"],
            "update": run.log["seconds/rl"],
            "tokens": sum(len(r.tokens) for r in last),
            "reward": run.log["reward"],
            "norm": run.log.get("rl/grad_norm", 0.0),  # none if all rewards are equal
        }
        add(found, figures)
        run.state.step += 1
    if args.side == "torch":
        group = lambda i: i // cfg.samples
        mine = [r for i, r in enumerate(last) if group(i) % run.world == run.rank]
        for _ in range(3):
            add(found, {"least sampling": least_sampling(run.sampler.model, mine)})
            add(found, {"least update": least_update(args.folder, cfg, mine)})
    return found


def add(found: dict[str, list], figures: dict[str, float]) -> None:
    for name, value in figures.items():
        found.setdefault(name, []).append(value)


def least_sampling(model, responses: list) -> float:
    """Seconds of the matrix products of each response token, and of its attention to all before it:
    a token of all responses at a time, as they are sampled."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    config, layers = model.config, model.model.layers
    kv, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    prompt = max(len(r.prompt) for r in responses)
    lengths = [len(r.tokens) for r in responses]
    count, longest = len(responses), prompt + max(lengths)
    rooms = torch.randn(len(layers), 2, count, kv, longest, size)  # keys and values
    query = torch.randn(count, kv, config.num_attention_heads // kv, size)
    linears = [[m for m in x.modules() if isinstance(m, torch.nn.Linear)] for x in layers]
    linears[-1].append(model.lm_head)
    inputs = {m.in_features: torch.randn(count, m.in_features) for m in sum(linears, [])}
    begun = time.perf_counter()
    with torch.inference_mode():
        for t in range(max(lengths)):
            rows = sum(length > t for length in lengths)
            for products, (keys, values) in zip(linears, rooms[:, :, :rows, :, : prompt + t + 1]):
                for linear in products:
                    linear(inputs[linear.in_features][:rows])
                scaled_dot_product_attention(query[:rows], keys, values)
    return time.perf_counter() - begun


def least_update(folder: str, cfg, responses: list) -> float:
    """Seconds of transformers' forward and backward pass over those that have an advantage."""
    import torch

    import data
    import mifo
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    pairs = [(r.prompt, r.tokens) for r in responses if mifo.has_gradient(cfg, r)]
    if not pairs:
        return 0.0
    batch = data.collate(pairs, 0)
    tokens, mask = batch["tokens"], batch["mask"]  # [B, T], [B, T-1]
    begun = time.perf_counter()
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[mask], tokens[:, 1:][mask]).backward()
    return time.perf_counter() - begun


# --------------------------------------------------------------------------------------------------
# TRL


def trl(args) -> dict:
    import datasets
    import torch

    import data
    import rollout
    import transformers

    datasets.config.TORCHCODEC_AVAILABLE = False  # it breaks beside a CPU build of torch
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
    rollout._vllm_environment()
    from trl import GRPOConfig, GRPOTrainer
    from trl.generation import vllm_generation

    if args.side == "trl-vllm":  # in float32, as the trainer: vLLM itself would choose bfloat16
        same = {"dtype": "float32", "enforce_eager": True}  # it does not compile on a CPU
        vllm_generation.LLM = functools.partial(vllm_generation.LLM, **same)
    cfg, found = parsed(args), {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder)
    questions = data.embedded_questions(tokenizer, "train", data.TRAIN_SUMS)
    steps = UNTIMED + args.steps
    order = data.draw(len(questions), cfg.seed, 0, cfg.questions * steps)
    rows = [{"prompt": questions[i].asked, "answer": questions[i].answer} for i in order]
    assert tokenizer(rows[0]["prompt"])["input_ids"] == questions[order[0]].prompt
    micro_batch = min(args.per_device, cfg.questions * cfg.samples // args.ranks)

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, *a, **k):
            self.begun = time.perf_counter()

        def on_step_end(self, *a, **k):
            add(found, {"seconds": time.perf_counter() - self.begun})

        def on_log(self, config, state, control, logs, **k):
            if "grad_norm" in logs:
                tokens = logs["completions/mean_length"] * cfg.questions * cfg.samples
                update = found["seconds"][-1] - found["sampling"][-1]
                figures = {"tokens": tokens, "reward": logs["reward"], "norm": logs["grad_norm"]}
                add(found, figures | {"update": update})

    class Timed(GRPOTrainer):
        def _generate(self, prompts):
            begun = time.perf_counter()
            generated = super()._generate(prompts)
            add(found, {"sampling": time.perf_counter() - begun})
            return generated

    config = GRPOConfig(
        output_dir=f"{args.folder}/trl",
        use_vllm=args.side == "trl-vllm",
        vllm_max_model_length=cfg.max_prompt + cfg.max_response,
        vllm_importance_sampling_correction=False,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=cfg.questions * cfg.samples // args.ranks // micro_batch,
        num_generations=cfg.samples,
        max_completion_length=cfg.max_response,
        temperature=cfg.temperature,
        shuffle_dataset=False,
        scale_rewards="none",
        max_steps=steps,
        learning_rate=cfg.rl_lr,
        lr_scheduler_type="constant",
        weight_decay=cfg.weight_decay,
        max_grad_norm=cfg.rl_clip,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32)
    patches = rollout._cpu_engine_patches if args.side == "trl-vllm" else contextlib.nullcontext
    with patches():  # or the engine would take no weights
        trainer = Timed(
            model,
            REWARDS[args.reward],
            config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Watch()],
        )
    trainer.train()
    return found


# --------------------------------------------------------------------------------------------------
# All, side by side


def worker(args) -> None:
    found = trl(args) if args.side.startswith("trl") else ours(args)
    if os.environ["RANK"] == "0":
        Path(args.folder, f"{args.side}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


def measure(args) -> dict[str, dict[str, list]]:
    """{side: {figure: its values in the timed steps of all rounds}} of the first rank."""
    results = {side: {} for side in args.sides}
    with tempfile.TemporaryDirectory() as folder:
        folder = f"{folder}/sums-base-0"  # where mifo.py looks for the embedded task's
        make_model(args.model, folder)
        for _ in range(args.rounds):
            for side, figures in results.items():
                step.launch(
                    [__file__, *sys.argv[1:], "--side", side, "--folder", folder], args.ranks
                )
                found = json.loads(Path(folder, f"{side}.json").read_text())
                for name, values in found.items():
                    figures.setdefault(name, []).extend(values[-args.steps :])
    return results


def mean(values: list[float]) -> str:
    """With its standard error: 0.3004 ± 0.0103."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):.4f} ± {error:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=["default", "25M"], default="default")
    add("--reward", choices=REWARDS, default="verdict")
    add("--ranks", type=int, default=1)
    add("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    add("--per-device", type=int, default=64, help="rows of TRL's micro-batch")
    add("--steps", type=int, default=5, help="timed steps of a round, 2 or more")
    add("--rounds", type=int, default=2, help="of the same steps, in turn")
    add("--side", choices=SIDES, help=argparse.SUPPRESS)
    add("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return worker(args)
    results = measure(args)
    median = lambda side, name: statistics.median(results[side][name])
    print(
        f"{args.model} model, reward {args.reward}, ranks {args.ranks}; "
        f"medians of {args.rounds * args.steps} steps, seconds; means of a round's, ± standard error"
    )
    columns = f"{'step':>8}{'sampling':>10}{'update':>8}{'tokens':>8}"
    print(f"{'':16}{columns}{'reward':>16}{'gradient norm':>18}")
    for side, figures in results.items():
        times = f"{median(side, 'seconds'):8.3f}{median(side, 'sampling'):10.3f}"
        times += f"{median(side, 'update'):8.3f}{median(side, 'tokens'):8.0f}"
        reward, norm = (mean(figures[name][: args.steps]) for name in ("reward", "norm"))
        print(f"{SIDES[side]:16}{times}{reward:>16}{norm:>18}")
    for theirs, our, least in (("trl-generate", "torch", 4.5), ("trl-vllm", "vllm", 2.5)):
        if theirs in results and our in results:
            ratio = median(theirs, "seconds") / median(our, "seconds")
            print(f"{SIDES[our]}: {ratio:.2f} times {SIDES[theirs]}, target: at least {least}")
    for what, target in (("sampling", ", target: at most 1.4"), ("update", "")):
        if "torch" in results:
            taken, limit = median("torch", what), median("torch", f"least {what}")
            line = f"the least for {what}: {limit:.3f}, PyTorch's: {taken:.3f}"
            if limit:  # not in a step without any advantage
                line += f", {taken / limit:.2f} times{target}"
            print(line)


if __name__ == "__main__":
    main()
