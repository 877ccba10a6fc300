"""Responses through rollout.py's VLLMSampler against bare vllm.LLM.generate: the same requests.

    OMP_NUM_THREADS=1 python benchmarks/rollouts.py [--repeats 5]

The engines take turns, and take turns in going first. The bare one has vLLM's own settings but for
those without which it does not run here (no compilation, no split prefill on a CPU) and for
log-probabilities at the sampling temperature, which training needs. No prompt fills a block of 128,
so neither finds a prefix in its cache.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: F401  before transformers: it hides packages that break its import
import rollout
import torch
import transformers

N, TOKENS = 2, 64
SHAPES = {
    "0.8M": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 384,
        "vocab_size": 64,
    },
    "25M": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "intermediate_size": 1408,
        "vocab_size": 4096,
    },
    "150M": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "vocab_size": 65536,
    },
}


def shape(name: str, **more) -> transformers.Qwen2Config:
    """One of SHAPES, with two key-value heads and tied embeddings."""
    sizes = {"num_key_value_heads": 2, "tie_word_embeddings": True, **SHAPES[name]}
    return transformers.Qwen2Config(**sizes, **more)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = shape("25M", initializer_range=0.05, max_position_embeddings=512)
    prompts = [torch.randint(4000, (4 + i % 29,)).tolist() for i in range(64)]
    with tempfile.TemporaryDirectory() as folder:
        transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
        ours = rollout.make_sampler(
            "vllm", folder, max_len=256, dtype=torch.float32, eos_ids=[4095], max_num_seqs=128
        )
        import vllm

        bare = vllm.LLM(
            model=folder,
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=256,
            max_num_seqs=128,
            kv_cache_memory_bytes=2**29,
            enforce_eager=True,
            enable_chunked_prefill=False,
            max_num_batched_tokens=8192,
            logprobs_mode="processed_logprobs",
        )
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    params = [
        vllm.SamplingParams(
            n=N,
            seed=10 * i,
            max_tokens=TOKENS,
            temperature=1.0,
            logprobs=0,
            detokenize=False,
            ignore_eos=True,
            stop_token_ids=[4095],
        )
        for i in range(len(prompts))
    ]
    rates = {"bare": [], "ours": []}  # tokens a second
    for i in range(args.repeats + 1):
        for key in sorted(rates, reverse=i % 2 == 1):  # who goes first alternates
            start = time.perf_counter()
            if key == "bare":
                outputs = bare.generate(requests, params, use_tqdm=False)
                tokens = sum(len(o.token_ids) for output in outputs for o in output.outputs)
            else:
                groups = ours.sample(prompts, N, [10 * j for j in range(len(prompts))], TOKENS, 1.0)
                tokens = sum(len(s.tokens) for group in groups for s in group)
            rates[key].append(tokens / (time.perf_counter() - start))
    bare_rates, our_rates = (values[1:] for values in rates.values())  # the first round warms up
    ratio = statistics.median(a / b for a, b in zip(our_rates, bare_rates))
    print(f"tokens a second, median of {args.repeats}")
    print(f"bare vllm.LLM.generate {statistics.median(bare_rates):.0f}")
    print(f"ours {statistics.median(our_rates):.0f}, ratio {ratio:.3f} (target: at least 0.97)")


if __name__ == "__main__":
    main()
