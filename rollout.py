"""Sampling: vLLM inside the rank's own process, and a plain PyTorch sampler where vLLM cannot run.

Both take prompts as token ids and return token ids with the log-probability of each at the sampling temperature; both get
new weights by `push`, tensor by tensor. Everything that knows an engine stands in this file.
"""

import importlib.util
import os
import random
import sys
import warnings
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import data  # noqa: F401  before transformers and vllm: it hides packages that break their import
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward


@dataclass
class Sample:
    tokens: list[int]  # response ids, with the end-of-text token if it ended by itself
    logprobs: list[float]  # of each token, at the sampling temperature
    truncated: bool  # stopped by the token limit


def make_sampler(
    kind: str,
    model_dir: str,
    *,
    max_len: int,
    dtype: torch.dtype,
    eos_ids: list[int],
    seed: int = 0,
    max_num_seqs: int = 256,
    kv_cache_gib: float = 0.5,
    gpu_memory_utilization: float = 0.5,
    trust_remote_code: bool = False,
    config_edits: dict | None = None,
):
    """The sampler of this rank: kind is vllm, torch, or auto (vLLM where it can run); .name and .why say which and why.

    max_len counts prompt and response. kv_cache_gib sizes vLLM's cache on a CPU, gpu_memory_utilization its share of a GPU.
    config_edits are set in the model's configuration. Under torchrun, call it after the process group is initialised.
    Raises ValueError if kind is vllm and vLLM cannot run.
    """
    problem = vllm_problem() if kind != "torch" else None
    if kind == "vllm" and problem:
        raise ValueError(f"--sampler vllm: {problem}; --sampler torch works anywhere")
    if kind == "torch" or problem:
        sampler = TorchSampler(
            model_dir, max_len, dtype, eos_ids, max_num_seqs, trust_remote_code, config_edits or {}
        )
        sampler.why = "asked for" if kind == "torch" else problem
    else:
        sampler = VLLMSampler(
            model_dir,
            max_len,
            dtype,
            eos_ids,
            seed,
            max_num_seqs,
            kv_cache_gib,
            gpu_memory_utilization,
            trust_remote_code,
            config_edits or {},
        )
        sampler.why = "asked for" if kind == "vllm" else "it is installed and runs on this machine"
    return sampler


def vllm_problem() -> str | None:
    """Why vLLM cannot run here, or None if it can."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    _vllm_environment()
    from vllm.platforms import current_platform

    if torch.cuda.is_available() and current_platform.is_cuda_alike():
        return None
    if not torch.cuda.is_available() and current_platform.is_cpu() and sys.platform == "linux":
        return None
    return f"the installed vLLM is not built for this machine (its platform here: {type(current_platform).__name__})"


def _vllm_environment() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = (
        "0"  # the engine in this process, where weights can be handed over
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    if not torch.cuda.is_available():
        os.environ.setdefault(
            "TORCHDYNAMO_DISABLE", "1"
        )  # compiles only a CPU sampling kernel: 20 s, no faster after


@contextmanager
def _global_rng_untouched():
    """vLLM reseeds the global generators when it starts and draws from them when it samples."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if cuda:
        torch.cuda.set_rng_state_all(cuda)


def _keep_weight(layer, remove_weight: bool) -> None:
    """On a CPU vLLM 0.32 multiplies by packed copies of the weights, which every push would make anew."""
    layer.cpu_linear = torch.nn.functional.linear


class VLLMSampler:
    def __init__(
        self,
        model_dir,
        max_len,
        dtype,
        eos_ids,
        seed,
        max_num_seqs,
        kv_cache_gib,
        gpu_memory_utilization,
        trust_remote_code,
        config_edits,
    ):
        _vllm_environment()
        import vllm

        config = transformers.AutoConfig.from_pretrained(
            model_dir, trust_remote_code=trust_remote_code
        )
        for architecture in config.architectures or []:
            # Registering the class itself spares vLLM a subprocess that inspects it, without data.py's precaution.
            known = vllm.ModelRegistry.models.get(architecture)
            if known is not None:
                vllm.ModelRegistry.register_model(architecture, known.load_model_cls())
        self.cuda = torch.cuda.is_available()
        self.asleep = False
        # On a CPU a seeded request whose prefill is split over two engine steps crashes vLLM 0.32: no prefill is split.
        settings = (
            {"gpu_memory_utilization": gpu_memory_utilization}
            if self.cuda
            else {
                "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),
                "enforce_eager": True,
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(max_len, 8192),
            }
        )
        unpacked = mock.patch(
            "vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm", _keep_weight
        )
        with _global_rng_untouched(), unpacked:
            self.llm = vllm.LLM(
                model=model_dir,
                skip_tokenizer_init=True,
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=max_len,
                max_num_seqs=max_num_seqs,
                seed=seed,
                logprobs_mode="processed_logprobs",
                enable_prefix_caching=True,
                hf_overrides=config_edits,
                use_tqdm_on_load=False,
                enable_sleep_mode=self.cuda,
                trust_remote_code=trust_remote_code,
                disable_log_stats=True,
                distributed_executor_backend="external_launcher" if "RANK" in os.environ else None,
                **settings,
            )
        self.params = lambda **kwargs: vllm.SamplingParams(
            logprobs=0, detokenize=False, ignore_eos=True, stop_token_ids=list(eos_ids), **kwargs
        )
        self.name = f"vllm {vllm.__version__}"

    def sample(
        self,
        prompts: list[list[int]],
        n: int,
        seeds: list[int],
        max_tokens: int,
        temperature: float,
        top_p: float = 1.0,
    ) -> list[list[Sample]]:
        """n responses to each prompt; the j-th of a prompt depends on its seed + j, whatever else is in the batch."""
        params = [
            self.params(n=n, seed=seed, max_tokens=max_tokens, temperature=temperature, top_p=top_p)
            for seed in seeds
        ]
        # A prefix cached by an earlier call would change the arithmetic of this one in its last bits.
        self.llm.reset_prefix_cache()
        with _global_rng_untouched():
            outputs = self.llm.generate(
                [{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False
            )
        return [
            [
                Sample(
                    list(c.token_ids),
                    [next(iter(d.values())).logprob for d in c.logprobs],
                    c.finish_reason == "length",
                )
                for c in output.outputs
            ]
            for output in outputs
        ]

    def sleep(self) -> None:
        """Gives the GPU's memory to the trainer; weights and cache are dropped, since both are stale after the update."""
        if self.cuda and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over the trainer's weights, one tensor at a time. The KV cache wakes only after them, so both fit."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        if self.cuda:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        else:  # a reload would first make all tensors anew
            self.llm.apply_model(lambda model: model.load_weights(weights))
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        self.llm.reset_prefix_cache()


class _RoomyLayer(transformers.cache_utils.DynamicLayer):
    """Keys and values [R, heads, T, head size] at the start of larger buffers: new ones are written, none moved."""

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
            self.rooms = self.keys, self.values
        old, new = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if new > self.rooms[0].shape[2]:
            self._move(lambda held: held, new + new // 2 + 32)
        for room, states in zip(self.rooms, (key_states, value_states)):
            room[:, :, old:new] = states
        self.keys, self.values = (room[:, :, :new] for room in self.rooms)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats):
        self._move(lambda held: held.repeat_interleave(repeats, 0), self.rooms[0].shape[2])

    def batch_select_indices(self, indices):
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[
            :, 0
        ]  # the others stay in place
        for held in (self.keys, self.values):
            held[moved] = held[indices[moved]]
        self.rooms = tuple(room[: len(indices)] for room in self.rooms)
        self.keys, self.values = self.keys[: len(indices)], self.values[: len(indices)]

    def _move(self, change, size):
        held = [change(tensor) for tensor in (self.keys, self.values)]
        self.rooms = tuple(h.new_empty(*h.shape[:2], size, h.shape[3]) for h in held)
        for room, h in zip(self.rooms, held):
            room[:, :, : h.shape[2]] = h
        self.keys, self.values = (room[:, :, : h.shape[2]] for room, h in zip(self.rooms, held))


def grouped_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """transformers' SDPA, but query heads that share a key head are its rows when decoding, so that no key is copied for each.

    query [R, H, t, d]; key, value [R, K, T, d] with H a multiple of K -> ([R, t, H, d], None).
    """
    if query.shape[2] != 1 or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    rows = query.reshape(len(query), key.shape[1], -1, query.shape[3])  # [R, K, H / K, d]
    out = torch.nn.functional.scaled_dot_product_attention(
        rows, key, value, attention_mask, scale=scaling
    )
    return out.reshape(len(query), 1, -1, value.shape[3]), None


transformers.AttentionInterface.register("grouped", grouped_attention)
transformers.AttentionMaskInterface.register("grouped", transformers.masking_utils.sdpa_mask)


class TorchSampler:
    """Batched decoding with a KV cache: each prompt is prefilled once for its n responses, and finished rows are dropped."""

    def __init__(
        self, model_dir, max_len, dtype, eos_ids, max_num_seqs, trust_remote_code, config_edits
    ):
        self.device = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
        if self.device == "cuda":
            self.device = f"cuda:{torch.cuda.current_device()}"
        config = transformers.AutoConfig.from_pretrained(
            model_dir, trust_remote_code=trust_remote_code
        )
        for name, value in config_edits.items():
            setattr(config, name, value)
        self.model = (
            transformers.AutoModelForCausalLM.from_pretrained(
                model_dir, config=config, dtype=dtype, trust_remote_code=trust_remote_code
            )
            .to(self.device)
            .eval()
        )
        if self.model.config._attn_implementation == "sdpa":
            self.model.set_attn_implementation("grouped")
        if (
            self.device == "cpu" and dtype == torch.float32
        ):  # few rows are multiplied faster by weights stored transposed
            for module in self.model.modules():
                if (
                    isinstance(module, torch.nn.Linear)
                    and module is not self.model.get_output_embeddings()
                ):
                    module.weight.data = module.weight.data.T.contiguous().T
        self.max_len, self.max_num_seqs = max_len, max_num_seqs
        self.eos = torch.tensor(list(eos_ids), device=self.device)
        self.name = f"torch ({self.device})"

    def sample(
        self,
        prompts: list[list[int]],
        n: int,
        seeds: list[int],
        max_tokens: int,
        temperature: float,
        top_p: float = 1.0,
    ) -> list[list[Sample]]:
        """n responses to each prompt; the j-th of a prompt depends on its seed + j, whatever else is in the batch."""
        results: list[list[Sample]] = [[] for _ in prompts]
        order = sorted(
            range(len(prompts)), key=lambda i: len(prompts[i])
        )  # prompts of a length need no padding
        size = max(1, self.max_num_seqs // n)
        for start in range(0, len(order), size):
            part = order[start : start + size]
            for i, samples in zip(
                part,
                self._decode(
                    [prompts[i] for i in part],
                    n,
                    [seeds[i] for i in part],
                    max_tokens,
                    temperature,
                    top_p,
                ),
            ):
                results[i] = samples
        return results

    @torch.inference_mode()
    def _decode(self, prompts, n, seeds, max_tokens, temperature, top_p) -> list[list[Sample]]:
        longest = max(map(len, prompts))
        max_tokens = min(max_tokens, self.max_len - longest)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        attention = torch.zeros_like(ids)
        for i, prompt in enumerate(
            prompts
        ):  # padded on the left, so that the last column is everyone's last token
            ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            attention[i, longest - len(prompt) :] = 1
        ids, attention = ids.to(self.device), attention.to(self.device)
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        cache = transformers.DynamicCache(config=self.model.config)
        plain = transformers.cache_utils.DynamicLayer  # others keep a sliding window, say
        cache.layers = [_RoomyLayer() if type(layer) is plain else layer for layer in cache.layers]
        logits = self.model(
            input_ids=ids,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]  # [len(prompts), V]
        cache.batch_repeat_interleave(n)
        logits, position = (
            logits.repeat_interleave(n, 0),
            positions[:, -1:].repeat_interleave(n, 0),
        )  # [R, V], [R, 1]
        attention = torch.nn.functional.pad(attention, (0, max_tokens), value=1).repeat_interleave(
            n, 0
        )
        grouped = self.model.config._attn_implementation == "grouped"
        if (
            self.device == "cpu"
            and grouped
            and all(type(layer) is _RoomyLayer for layer in cache.layers)
        ):
            # What is added to the scores, made once: transformers would make it, and SDPA convert it in each layer, anew.
            attention = (1 - attention)[:, None, None].to(logits.dtype) * torch.finfo(
                logits.dtype
            ).min  # [R, 1, 1, T]
        # One uniform number a token, drawn from each response's own generator, makes it independent of the batch.
        noise = torch.stack(
            [
                torch.rand(max_tokens, generator=torch.Generator().manual_seed(seed + j))
                for seed in seeds
                for j in range(n)
            ]
        ).to(self.device)  # [R, max_tokens]
        total = len(noise)
        tokens = torch.zeros(total, max_tokens, dtype=torch.int64, device=self.device)
        logprobs = torch.zeros(total, max_tokens, device=self.device)
        rows = torch.arange(total, device=self.device)  # which responses are still being written
        done = torch.zeros(
            total, dtype=torch.bool, device=self.device
        )  # of these rows, which have ended
        look = 2 if self.device == "cpu" else 8  # steps: looking costs a wait for the device
        for t in range(max_tokens):
            token, logprob = pick(logits.float(), temperature, top_p, noise[rows, t])
            tokens[rows, t], logprobs[rows, t] = token, logprob
            done |= torch.isin(token, self.eos)
            if t % look == look - 1 and done.any():
                left = (~done).nonzero()[:, 0]
                if len(left) == 0:
                    break
                keep = torch.arange(len(left), device=self.device)
                keep[done[: len(left)]] = left[
                    left >= len(left)
                ]  # the last rows move into the places of those that ended
                rows, token, attention, position, done = (
                    x[keep] for x in (rows, token, attention, position, done)
                )
                cache.batch_select_indices(keep)
            if t + 1 < max_tokens:
                position = position + 1
                logits = self.model(
                    input_ids=token[:, None],
                    attention_mask=attention[..., : longest + t + 1],
                    position_ids=position,
                    past_key_values=cache,
                    use_cache=True,
                ).logits[:, -1]
        stops = torch.isin(tokens, self.eos)
        ended, first = stops.any(1).tolist(), stops.int().argmax(1).tolist()
        samples = [
            Sample(tok[: i + 1], lp[: i + 1], False) if end else Sample(tok, lp, True)
            for tok, lp, end, i in zip(tokens.tolist(), logprobs.tolist(), ended, first)
        ]
        return [samples[i : i + n] for i in range(0, total, n)]

    def sleep(self) -> None:
        pass

    @torch.no_grad()
    def push(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        parameters = dict(self.model.named_parameters())
        for name, tensor in weights:
            parameters[name].copy_(tensor)


def pick(logits: Tensor, temperature: float, top_p: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row by inverse CDF, and its log-probability under the distribution sampled from.

    logits [R, V] float32, noise [R] uniform in [0, 1) -> (tokens [R], logprobs [R]). Temperature 0 takes the most probable
    token, with its log-probability at temperature 1. top_p < 1 keeps the fewest most probable tokens that reach top_p.
    """
    if temperature == 0:
        logprobs = logits.log_softmax(-1)
        best = logits.argmax(-1)
        return best, logprobs.gather(1, best[:, None])[:, 0]
    logprobs = (logits / temperature).log_softmax(-1)
    if top_p < 1:
        sorted_logprobs, order = logprobs.sort(dim=-1, descending=True)
        probs = sorted_logprobs.exp()
        dropped = probs.cumsum(-1) - probs >= top_p  # what stands before a token already suffices
        logprobs = logprobs.masked_fill(
            torch.zeros_like(dropped).scatter_(1, order, dropped), -torch.inf
        ).log_softmax(-1)
    cdf = logprobs.exp().cumsum(-1)
    tokens = torch.searchsorted(cdf, (noise * cdf[:, -1])[:, None], right=True)[:, 0].clamp(
        max=logits.shape[1] - 1
    )
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]
