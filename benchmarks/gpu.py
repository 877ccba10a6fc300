"""One GPU in under an hour: whether each path that only a GPU takes works, and what it costs.

    python benchmarks/gpu.py [--out FOLDER] [--only PART PART ..]

Each part runs in a process of its own, with a limit, and FOLDER/gpu.md is written after each: what
fails is a line in it, and FOLDER/PART.log says why. Without vLLM the PyTorch sampler stands in.
Without a GPU all shapes are tiny: that shows that the script runs, and nothing about a GPU.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import step

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 900  # seconds of a part
Rows = list[tuple[str, str, str]]  # what, what was found, what to expect

HALF_B = {  # Qwen2.5-0.5B's
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
SHORT = ["--steps=6", "--buffer-size=8", "--eval-every=3"]
SHORT_CPU = ["--steps=3", "--buffer-size=8", "--eval-every=0", "--questions=16",
             "--sft-epochs=1", "--max-num-seqs=64", "--kv-cache-gib=0.1"]  # fmt: skip
LONG = ["--steps=4", "--max-response=2048", "--questions=16", "--micro-tokens=16384"]
LONG_CPU = ["--steps=2", "--max-response=64", "--questions=8", "--micro-tokens=4096"]


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def settle() -> None:
    """Waits for the GPU, so that a clock read now counts what it was asked for."""
    import torch

    if on_gpu():
        torch.cuda.synchronize()


def timed(owner, name: str, seconds: dict[str, list[float]], before=lambda: None) -> None:
    """Replaces owner.name by a call that notes its seconds under that name."""
    call = getattr(owner, name)

    def wrapped(*args, **kwargs):
        before()
        settle()
        start = time.perf_counter()
        result = call(*args, **kwargs)
        settle()
        seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result

    setattr(owner, name, wrapped)


def measured(call: Callable) -> tuple[float, float]:
    """Its seconds, and the MiB by which memory peaked above what was held before."""
    import torch

    settle()
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    else:
        held = step.Meter().before  # and sets the peak back
    start = time.perf_counter()
    call()
    settle()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if on_gpu() else step.memory("VmHWM")
    return seconds, (peak - held) / 2**20


def each(values: list[float], form: str) -> str:
    """The median and, of several, the extremes."""
    text = format(statistics.median(values), form)
    if len(values) > 1:
        text += f" ({min(values):{form}} to {max(values):{form}})"
    return text


# --------------------------------------------------------------------------------------------------
# The parts. Each returns its rows of the table.


def machine(out: Path) -> Rows:
    import torch

    import data  # noqa: F401  before transformers: it hides packages that break its import
    import rollout
    import transformers

    rows = [("torch, transformers", f"{torch.__version__}, {transformers.__version__}", "")]
    rows.append(("vLLM", rollout.vllm_problem() or "runs here", ""))
    if on_gpu():
        found = torch.cuda.get_device_properties(0)
        rows.append(("GPU", f"{found.name}, {found.total_memory / 2**30:.0f} GiB", ""))
        rows.append(("cuDNN", str(torch.backends.cudnn.version()), ""))
    cudnn = "on" if torch.backends.cuda.cudnn_sdp_enabled() else "off"
    return rows + [("cuDNN's attention", cudnn, "off, with vLLM or without")]


def train(out: Path, name: str, flags: list[str]) -> Rows:
    """mifo.py's own main(), its engine watched."""
    import torch

    import mifo
    import rollout

    seconds, free = {}, []

    def note_memory() -> None:
        if on_gpu():
            memory = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
            numbers = [*memory, torch.cuda.mem_get_info()[0]]
            free.append(" / ".join(f"{number / 2**30:.2f}" for number in numbers))

    init = rollout.VLLMSampler.__init__

    def watched(self, **given) -> None:
        init(self, **given)
        timed(self.llm, "sleep", seconds)
        timed(self.llm, "wake_up", seconds, before=note_memory)

    rollout.VLLMSampler.__init__ = watched
    timed(rollout, "make_sampler", seconds)
    timed(rollout.VLLMSampler, "push", seconds)
    timed(rollout.TorchSampler, "push", seconds)
    sys.argv = ["mifo.py", f"--out={out / name}", *flags]
    if code := mifo.main():
        raise RuntimeError(f"mifo.py ended with exit code {code}")

    rows: Rows = []
    names = {
        "make_sampler": "the sampler's start",
        "sleep": "sleep",
        "push": "push, its wakes within",
        "wake_up": "a wake, of weights or KV cache",
    }
    for key, what in names.items():
        if key in seconds:
            rows.append((f"{what}, s", each(seconds[key], ".2f"), ""))
    log = (out / f"{name}.log").read_text(errors="replace")
    if captured := re.findall(r"Graph capturing finished in (.*)", log):
        rows.append(("capture of CUDA graphs", captured[-1], ""))
    if free:
        what = "allocated / reserved / free GiB before the {} wake"
        rows.append((what.format("first"), free[0], ""))
        rows.append((what.format("last"), free[-1], "free: no less than the engine's share"))
    if on_gpu():
        peak = torch.cuda.max_memory_allocated() / 2**30
        rows.append(("peak of what torch allocated, GiB", f"{peak:.2f}", ""))
    return rows + found_in_metrics(out / name, "float32" in flags[-1] or not on_gpu())


def found_in_metrics(folder: Path, float32: bool) -> Rows:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    column = lambda name: [line[name] for line in lines if name in line]
    most = "below 0.001" if float32 else "a few 0.01, not growing"
    rows = []
    for name in ("mean", "probe", "max"):
        gaps = column(f"engine/{name}_difference")
        bound = most if name != "max" else ""
        if gaps:
            rows.append((f"engine less trainer, {name}", each(gaps, ".1e"), bound))
    rows.append(("RL steps, SFT steps", f"{len(column('rl/loss'))}, {len(column('sft/loss'))}", ""))
    for name in ("sft/frozen_share", "sft/frozen_movement"):
        if found := column(name):
            expected = "0.5, less what ties" if name == "sft/frozen_share" else "above 0"
            rows.append((name, each(found, ".2g"), expected))
    return rows


def run(out: Path) -> Rows:
    return train(out, "run", SHORT if on_gpu() else SHORT_CPU)


def float32(out: Path) -> Rows:
    return train(out, "float32", [*(SHORT if on_gpu() else SHORT_CPU), "--dtype=float32"])


def torch_sampler(out: Path) -> Rows:
    return train(out, "torch_sampler", [*(SHORT if on_gpu() else SHORT_CPU), "--sampler=torch"])


def memory(out: Path, name: str = "memory") -> Rows:
    """A random model of 0.5B parameters. Its verdicts are made up: every second group has a right
    half, so that there is a gradient, and the others' questions are hard."""
    import mifo

    sample = mifo.sample

    def rewarded(run, questions):
        responses = sample(run, questions)
        for i, response in enumerate(responses):
            right = i % 2 == 0 and i // run.cfg.samples % 2 == 0
            response.verdict = "correct" if right else "wrong"
            response.reward = float(right)
        return responses

    mifo.sample = rewarded
    model = random_model(out)
    more = ["--max-prompt=64", "--buffer-size=4", "--sft-batch=4", "--kv-cache-gib=0.1"]
    given = [f"--model={model}", f"--data={model}/questions.jsonl", *more]
    return train(out, name, [*given, *(LONG if on_gpu() else LONG_CPU)])


def expandable(out: Path) -> Rows:
    """memory() with PYTORCH_ALLOC_CONF=expandable_segments:True, set in main()."""
    return memory(out, "expandable")


def random_model(out: Path) -> str:
    folder = out / "model"
    if not (folder / "questions.jsonl").exists():
        step.make_model(str(folder), **(HALF_B if on_gpu() else {}))
    return str(folder)


def resume(out: Path) -> Rows:
    """Killed after a checkpoint, resumed; stopped by SIGTERM after another one, resumed."""
    folder = out / "resumed"
    flags = [
        *(SHORT if on_gpu() else SHORT_CPU),
        f"--out={folder}",
        "--evaluate=",
        "--eval-every=0",
    ]

    def last() -> Path:
        return max((folder / "checkpoints").glob("step-??????"))

    def stopped_after(checkpoints: int, number: int, *more) -> int:
        command = [sys.executable, ROOT / "mifo.py", *flags, "--save-every=2", *more]
        process = subprocess.Popen(command)
        before = {path.name for path in folder.glob("checkpoints/step-??????")}
        while process.poll() is None:
            now = {path.name for path in folder.glob("checkpoints/step-??????")}
            if len(now - before) >= checkpoints:
                process.send_signal(number)
                break
            time.sleep(0.05)
        return process.wait()

    endless = "--steps=100000"
    killed = stopped_after(1, signal.SIGKILL, endless)
    first = last().name
    ended = stopped_after(1, signal.SIGTERM, endless, "--resume")
    state = json.loads((last() / "state.json").read_text())["state"]
    finished = stopped_after(100, 0, f"--steps={state['rl_steps'] + 2}", "--resume")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    once = "yes" if steps == list(range(1, len(steps) + 1)) else f"no: {steps}"
    return [
        ("killed after its first checkpoint: exit code", f"{killed}, {first}", "-9"),
        ("resumed, then SIGTERM: exit code", f"{ended}, {last().name}", "143"),
        ("resumed to the end: exit code", str(finished), "0"),
        ("each step once in metrics.jsonl", once, "yes"),
    ]


def evaluate(out: Path) -> Rows:
    """eval.py on the last checkpoint of the part `run`, greedy as its own evaluation was."""
    if not (out / "run" / "evaluations.jsonl").exists():
        raise RuntimeError("there is no checkpoint: it needs the part run")
    model = max((out / "run" / "checkpoints").glob("step-??????")) / "model"
    flags = ["--bench=sums", "--k=1", "--max-tokens=80", "--temperature=0"]
    command = [sys.executable, ROOT / "eval.py", model, *flags, f"--out={out / 'evaluation'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout, done.stderr, flush=True)
    if done.returncode:
        raise RuntimeError(f"eval.py ended with exit code {done.returncode}")
    [sampler] = re.findall(r"sampler: (.*), because", done.stderr)
    engine = sorted(set(re.findall(r"dtype=torch\.(\w+)", done.stdout + done.stderr)))
    score = json.loads((out / "evaluation" / "results.json").read_text())["results"]["sums"]["avg"]
    lines = (out / "run" / "evaluations.jsonl").read_text().splitlines()
    own = json.loads(lines[-1])["benches"]["sums"]["avg"]
    dtype = "bfloat16" if on_gpu() else "float32"
    config = json.loads((model / "config.json").read_text())["dtype"]
    return [
        ("eval.py's sampler", f"{sampler}; vLLM says {', '.join(engine) or 'nothing'}", dtype),
        ("the checkpoint's config.json says", config, dtype),
        ("accuracy, beside the run's own", f"{score:.3f}, {own:.3f}", "alike"),
    ]


def updates(out: Path) -> Rows:
    """RL and SFT updates of the random model, and MIFO's freezing around each."""
    import mifo

    batch = step.rows(256 if on_gpu() else 16)
    flags = ["--micro-tokens", 16384 if on_gpu() else 2048]
    job = step.our_run(random_model(out), batch, *flags)
    job.sampler, job.state.sft_queue = None, []
    samples, seconds = step.responses(job, batch), {}
    timed(mifo, "begin_sft", seconds)
    timed(mifo.freeze, "zero_frozen_gradients", seconds)
    timed(mifo.freeze, "restore_frozen", seconds)
    found = {"RL": [], "SFT": []}
    for _ in range(4):
        found["RL"].append(measured(lambda: mifo.rl_update(job, samples)))
        mifo.begin_sft(job, list(range(len(batch))))
        found["SFT"].append(measured(lambda: mifo.sft_step(job)))
        mifo.end_sft(job)
    tokens = sum(len(prompt) + len(response) for prompt, response, _ in batch)
    parameters = sum(p.numel() for p in job.policy.parameters())
    rows = [("parameters; tokens of an update", f"{parameters:,}; {tokens:,}", "")]
    for which, pairs in found.items():
        times = [took for took, _ in pairs[1:]]  # the first also makes the moments
        rows.append((f"{which} update, tokens/s", each([tokens / s for s in times], ",.0f"), ""))
        rows.append(("its peak above what is held, MiB", f"{pairs[-1][1]:,.0f}", ""))
    phase = sum(statistics.median(times[1:]) for times in seconds.values())
    update = statistics.median(took for took, _ in found["RL"][1:])
    return rows + [
        ("freezing, s a phase", f"{phase:.3f}", ""),
        ("beside an RL update of this size", f"{phase / update:.1%}", "at most 5 %"),
    ]


def logprobs(out: Path) -> Rows:
    """Forward and backward of the head: ours, full logits, a compiled cross-entropy."""
    import torch

    import losses

    n, d, v = (8192, 896, 151_936) if on_gpu() else (512, 64, 8192)
    device, dtype = ("cuda", torch.bfloat16) if on_gpu() else ("cpu", torch.float32)
    torch.manual_seed(0)
    hidden = torch.randn(n, d, device=device).to(dtype).requires_grad_()
    head = (0.05 * torch.randn(v, d, device=device)).to(dtype).requires_grad_()
    targets = torch.randint(v, (n,), device=device)

    def full(hidden, head, targets):
        logits = (hidden @ head.T).float()  # [N, V]
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    def cross_entropy(hidden, head, targets):
        logits = (hidden @ head.T).float()
        return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    ways = {
        "ours, with entropy": lambda *given: losses.token_logprobs(*given)[0],
        "full logits": full,
        "compiled cross-entropy": torch.compile(cross_entropy),
    }
    rows = [("tokens x width x vocabulary", f"{n:,} x {d} x {v:,}", "")]
    for name, way in ways.items():
        call = lambda way=way: way(hidden, head, targets).sum().backward()
        try:
            pairs = [measured(call) for _ in range(5)]
        except Exception as error:  # no compiler, or no memory for all logits
            reason = str(error).strip().partition("\n")[0]
            rows.append((name, f"failed: {type(error).__name__}: {reason:.100}", ""))
            continue
        times, peaks = zip(*pairs[1:])  # the first also compiles
        rows.append((f"{name}, ms", each([1000 * s for s in times], ".1f"), ""))
        if on_gpu():  # on a CPU logprobs.py measures it, in fresh processes
            rows.append(("its peak above inputs and gradients, MiB", f"{max(peaks):,.0f}", ""))
    with torch.no_grad():
        some = hidden[:256], head, targets[:256]
        right = full(*(t.float() if t.is_floating_point() else t for t in some))
        error = (losses.token_logprobs(*some)[0] - right).abs().mean().item()
    return rows + [("ours against logits in float32, mean", f"{error:.1e}", "below 0.001")]


PARTS = [machine, run, float32, torch_sampler, memory, expandable, resume, evaluate, updates,
         logprobs]  # fmt: skip

# --------------------------------------------------------------------------------------------------


def table(out: Path) -> str:
    lines = ["| part | what | found | expected |", "|---|---|---|---|"]
    for part in PARTS:
        path = out / f"{part.__name__}.json"
        for what, found, expected in json.loads(path.read_text()) if path.exists() else []:
            lines.append(f"| {part.__name__} | {what} | {found} | {expected} |")
    return "\n".join(lines) + "\n"


def start(out: Path, name: str) -> None:
    """A part in a process of its own, its output in NAME.log, its rows in NAME.json."""
    environment = os.environ | step.ALONE | {"VLLM_LOGGING_LEVEL": "INFO", "HF_HUB_OFFLINE": "1"}
    if name == "expandable":
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    command = [sys.executable, __file__, "--part", name, "--out", str(out)]
    begun = time.perf_counter()
    with (out / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            code = str(process.wait(LIMIT))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = f"none after {LIMIT} s"
    path = out / f"{name}.json"
    rows = json.loads(path.read_text()) if code == "0" else []
    if code != "0":
        lines = (out / f"{name}.log").read_text(errors="replace").strip().splitlines() or [""]
        rows.append(("FAILED", f"exit code {code}: {lines[-1]:.160}", f"see {name}.log"))
    rows.append(("seconds of this part", f"{time.perf_counter() - begun:.0f}", ""))
    path.write_text(json.dumps(rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.__name__ for part in PARTS]
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="a new folder")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help=", ".join(names))
    parser.add_argument("--part", choices=names, help=argparse.SUPPRESS)
    args = parser.parse_args()
    out = args.out.resolve()
    if args.part:
        sys.path.remove(str(Path(__file__).parent))  # `freeze` is to be the module, not the script
        try:
            rows = globals()[args.part](out)
        except Exception:  # out of memory, too; an engine that is shut down may hang
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        (out / f"{args.part}.json").write_text(json.dumps(rows))
        sys.stdout.flush()
        os._exit(0)  # gloo at times aborts a process that ends by itself
    out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        start(out, name)
        (out / "gpu.md").write_text(table(out))
        print(f"{name}: {json.loads((out / f'{name}.json').read_text())}", flush=True)
    print(table(out))


if __name__ == "__main__":
    main()
