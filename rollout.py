"""Sampling: vLLM inside the rank's own process, and a plain PyTorch sampler where vLLM cannot run.

Both take prompts as token ids and return token ids with the log-probability of each at the sampling
temperature; both get new weights by `push`, tensor by tensor. Everything that knows an engine
stands in this file. Its last section makes the PyTorch sampler faster and may be skipped.
"""

import importlib.util
import logging
import os
import platform
import random
import sys
import warnings
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import data  # noqa: F401  before transformers and vllm: it hides packages that break their import
import transformers

# vLLM's import switches cuDNN's attention off for the whole process. Off without vLLM as well, so
# that trainer and sampler use one kernel wherever they run, and no plan is built for each shape.
torch.backends.cuda.enable_cudnn_sdp(False)


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
    """The sampler of this rank: vllm, torch, or auto (vLLM where it can run).

    The sampler's .name and .why say which it is and why. max_len counts prompt and response.
    kv_cache_gib sizes vLLM's cache on a CPU, gpu_memory_utilization its share of a GPU.
    config_edits are set in the model's configuration. Under torchrun, call it after the process
    group is initialised. Raises ValueError if kind is vllm and vLLM cannot run, or if the PyTorch
    sampler cannot sample from the model.
    """
    problem = None if kind == "torch" else vllm_problem()
    if kind == "vllm" and problem:
        raise ValueError(f"--sampler vllm: {problem}; --sampler torch works anywhere")
    common = dict(
        model_dir=model_dir,
        max_len=max_len,
        dtype=dtype,
        eos_ids=eos_ids,
        max_num_seqs=max_num_seqs,
        trust_remote_code=trust_remote_code,
        config_edits=config_edits or {},
    )
    if kind == "torch" or problem:
        sampler = TorchSampler(**common)
        sampler.why = problem or "asked for"
    else:
        sampler = VLLMSampler(
            **common,
            seed=seed,
            kv_cache_gib=kv_cache_gib,
            gpu_memory_utilization=gpu_memory_utilization,
        )
        sampler.why = "asked for" if kind == "vllm" else "it is installed and runs on this machine"
    return sampler


def vllm_problem() -> str | None:
    """Why vLLM cannot run here, or None if it can."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    cuda = torch.cuda.is_available()
    x86_linux = sys.platform == "linux" and platform.machine() == "x86_64"
    # Looked up before vLLM is imported: an instruction that is missing kills the process.
    if x86_linux and not cuda and "avx2" not in _cpu_flags():
        return "vLLM's CPU build needs a processor with AVX2, which this one lacks"
    _vllm_environment()
    try:
        from vllm.platforms import current_platform

        if cuda:
            fits = current_platform.is_cuda_alike()
        else:
            fits = current_platform.is_cpu() and sys.platform == "linux"
        if fits:
            from vllm import LLM  # noqa: F401  imports the engine itself
    except Exception as error:  # whatever it is, the PyTorch sampler does without vLLM
        reason = str(error).strip().partition("\n")[0]
        return f"importing vLLM failed ({type(error).__name__}: {reason})"
    if fits:
        return None
    name = type(current_platform).__name__
    return f"the installed vLLM is not built for this machine (its platform here: {name})"


def _cpu_flags() -> set[str]:
    """The instruction sets of this processor, as Linux names them; empty where it does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return set(value.split())
    return set()


def _vllm_environment() -> None:
    # The engine in this process, where weights can be handed over.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    if not torch.cuda.is_available():
        # It would compile only a CPU sampling kernel: 20 s, and no faster after.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        # It says that Triton has no CPU backend, and before vLLM's own logging level counts.
        logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)


# --------------------------------------------------------------------------------------------------
# vLLM


class VLLMSampler:
    def __init__(
        self,
        *,
        model_dir,
        max_len,
        dtype,
        eos_ids,
        max_num_seqs,
        trust_remote_code,
        config_edits,
        seed,
        kv_cache_gib,
        gpu_memory_utilization,
    ):
        _vllm_environment()
        import vllm

        config = transformers.AutoConfig.from_pretrained(
            model_dir, trust_remote_code=trust_remote_code
        )
        for architecture in config.architectures or []:
            # Registering the class itself spares vLLM a subprocess that inspects it, without
            # data.py's precaution.
            known = vllm.ModelRegistry.models.get(architecture)
            if known is not None:
                vllm.ModelRegistry.register_model(architecture, known.load_model_cls())
        self.cuda = torch.cuda.is_available()
        self.asleep = False
        if self.cuda:
            config_edits = config_edits | {"head_dtype": "float32"}  # logits as the trainer's
            settings = {"gpu_memory_utilization": gpu_memory_utilization}
        else:
            # On a CPU a seeded request whose prefill is split over two engine steps crashes
            # vLLM 0.32: no prefill is split.
            settings = {
                "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),
                "enforce_eager": True,
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(max_len, 8192),
            }
        with _global_rng_untouched(), _cpu_engine_patches():
            self.llm = vllm.LLM(
                model=model_dir,
                skip_tokenizer_init=True,
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=max_len,
                max_num_seqs=max_num_seqs,
                seed=seed % 2**32,  # numpy's generator takes no larger one
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
        self.eos_ids = list(eos_ids)
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
        """n responses to each prompt; the j-th depends on its prompt's seed + j.

        What else is in the batch changes log-probabilities in their last bits only.
        """
        import vllm

        params = [
            vllm.SamplingParams(
                n=n,
                seed=seed,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                logprobs=0,  # the sampled token's alone
                flat_logprobs=True,  # as one list of floats: no objects for each token
                detokenize=False,
                ignore_eos=True,
                stop_token_ids=self.eos_ids,
            )
            for seed in seeds
        ]
        # A prefix cached by an earlier call would change the arithmetic of this one in its last
        # bits.
        self.llm.reset_prefix_cache()
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        with _global_rng_untouched():
            outputs = self.llm.generate(requests, params, use_tqdm=False)
        return [[_sample_of(c) for c in output.outputs] for output in outputs]

    def sleep(self) -> None:
        """Gives the GPU's memory to the trainer; weights and cache, stale by then, are dropped."""
        if self.cuda and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over the trainer's weights, one tensor at a time.

        The KV cache wakes only after them, so that both fit.
        """
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        if self.cuda:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        else:  # a reload would first make all tensors anew
            self.llm.apply_model(lambda model: _load(model, weights))
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept prefixes that the weights before these have written")


def _load(model, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Weights into vLLM's model on a CPU, and into the packed copies that it multiplies by."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    model.load_weights(weights)
    for layer in model.modules():
        if getattr(layer, "packed", False):
            dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(layer)


def _sample_of(completion) -> Sample:
    tokens, logprobs = list(completion.token_ids), completion.logprobs.logprobs
    return Sample(tokens, logprobs, truncated=completion.finish_reason == "length")


@contextmanager
def _global_rng_untouched():
    """vLLM reseeds the global generators when it starts and draws from them when it samples."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(cuda)


@contextmanager
def _cpu_engine_patches():
    """What vLLM 0.32 must not do on a CPU, in a process that trains as well."""

    def pack(layer, remove_weight: bool) -> None:
        """vLLM would leave packed copies of the weights alone, which nothing can be loaded into."""
        layer.packed = layer.weight.ndim == 2  # else a convolution's, which it packs in place
        if layer.packed:
            dispatch(layer, remove_weight=False)
        else:
            layer.cpu_linear = torch.nn.functional.linear

    def leave_memory(nodes) -> None:
        """vLLM would bind all memory of this process to one NUMA node, with a warning."""

    from vllm.model_executor.layers import utils

    dispatch = utils.dispatch_cpu_unquantized_gemm
    bind = "init_cpu_memory_env"  # an operator of vLLM's CPU build only, hence create
    with (
        mock.patch.object(utils, "dispatch_cpu_unquantized_gemm", pack),
        mock.patch.object(torch.ops._C, bind, leave_memory, create=True),
    ):
        yield


# --------------------------------------------------------------------------------------------------
# PyTorch


def pick(logits: Tensor, temperature: float, top_p: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row by inverse CDF, and its log-probability under the distribution sampled from.

    logits [R, V] float32, noise [R] uniform in [0, 1) -> (tokens [R], logprobs [R]). Temperature 0
    takes the most probable token, with its log-probability at temperature 1. top_p < 1 keeps the
    fewest most probable tokens that reach top_p.
    """
    if temperature == 0:
        logprobs = logits.log_softmax(-1)
        tokens = logits.argmax(-1)
        return tokens, logprobs.gather(1, tokens[:, None])[:, 0]
    logprobs = (logits / temperature).log_softmax(-1)
    if top_p < 1:
        sorted_logprobs, order = logprobs.sort(dim=-1, descending=True)
        probs = sorted_logprobs.exp()
        dropped = probs.cumsum(-1) - probs >= top_p  # what stands before a token already suffices
        dropped = torch.zeros_like(dropped).scatter_(1, order, dropped)  # in the vocabulary's order
        logprobs = logprobs.masked_fill(dropped, -torch.inf).log_softmax(-1)
    cdf = logprobs.exp().cumsum(-1)
    target = (noise * cdf[:, -1])[:, None]  # the last entry is 1 but for rounding
    tokens = torch.searchsorted(cdf, target, right=True)[:, 0]
    tokens = tokens.clamp(max=logits.shape[1] - 1)  # NaN is found past the end
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


class TorchSampler:
    """Batched decoding with a KV cache.

    Each prompt is prefilled once for its n responses, and finished rows are dropped.
    """

    def __init__(
        self, *, model_dir, max_len, dtype, eos_ids, max_num_seqs, trust_remote_code, config_edits
    ):
        if torch.cuda.is_available():
            self.device = f"cuda:{torch.cuda.current_device()}"
        elif torch.backends.mps.is_available():
            self.device = "mps"
        else:
            self.device = "cpu"
        config = transformers.AutoConfig.from_pretrained(
            model_dir, trust_remote_code=trust_remote_code
        )
        for name, value in config_edits.items():
            setattr(config, name, value)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            model_dir, config=config, dtype=dtype, trust_remote_code=trust_remote_code
        )
        self.model = model.to(self.device).eval()
        if self.model.config._attn_implementation == "sdpa":
            _register_grouped_attention()
            self.model.set_attn_implementation("grouped")
        if self.device == "cpu" and dtype == torch.float32:
            _transpose_weights(self.model)
        self.eos = torch.tensor(list(eos_ids), device=self.device)
        self.name = f"torch ({self.device})"
        self.max_len, self.max_num_seqs = 8, 4
        try:  # not every model has a cache that can be padded, repeated and cut
            self.sample([[0], [0, 0]], 2, [0, 0], 3, 1.0)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"--sampler torch cannot sample from {type(model).__name__} ({reason}); "
                "--sampler vllm may"
            ) from None
        self.max_len, self.max_num_seqs = max_len, max_num_seqs

    def sample(
        self,
        prompts: list[list[int]],
        n: int,
        seeds: list[int],
        max_tokens: int,
        temperature: float,
        top_p: float = 1.0,
    ) -> list[list[Sample]]:
        """n responses to each prompt; the j-th depends on its prompt's seed + j.

        What else is in the batch changes log-probabilities in their last bits only.
        """
        results: list[list[Sample]] = [[] for _ in prompts]
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # least padding
        size = max(1, self._rows() // n)
        for start in range(0, len(by_length), size):
            indices = by_length[start : start + size]
            part = [prompts[i] for i in indices]
            part_seeds = [seeds[i] for i in indices]
            groups = self._decode(part, n, part_seeds, max_tokens, temperature, top_p)
            for i, samples in zip(indices, groups):
                results[i] = samples
        return results

    def _rows(self) -> int:
        """How many responses are written at once: on a GPU, as many as its free memory holds."""
        if not self.device.startswith("cuda"):
            return self.max_num_seqs
        torch.cuda.empty_cache()
        free = 0.8 * torch.cuda.mem_get_info()[0]  # the rest is for activations and logits
        row = cache_bytes(self.model.config, self.max_len, self.model.dtype)
        return max(1, min(self.max_num_seqs, int(free / row)))

    @torch.inference_mode()
    def _decode(self, prompts, n, seeds, max_tokens, temperature, top_p) -> list[list[Sample]]:
        longest = max(map(len, prompts))
        max_tokens = min(max_tokens, self.max_len - longest)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        attention = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            # Padded on the left, so that the last column is everyone's last token.
            ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            attention[i, longest - len(prompt) :] = 1
        ids, attention = ids.to(self.device), attention.to(self.device)
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        cache = _make_cache(self.model.config)
        logits = self.model(
            input_ids=ids,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]  # [len(prompts), V]
        cache.batch_repeat_interleave(n)
        logits = logits.repeat_interleave(n, 0)  # [R, V]
        position = positions[:, -1:].repeat_interleave(n, 0)  # [R, 1]
        attention = torch.nn.functional.pad(attention, (0, max_tokens), value=1)
        attention = attention.repeat_interleave(n, 0)  # [R, longest + max_tokens]
        if self.device == "cpu":
            attention = _added_to_scores(attention, logits.dtype, self.model.config, cache)

        # One uniform number a token, drawn from each response's own generator, makes it independent
        # of the batch.
        noise = []
        for seed in seeds:
            for j in range(n):
                generator = torch.Generator().manual_seed(seed + j)
                noise.append(torch.rand(max_tokens, generator=generator))
        noise = torch.stack(noise).to(self.device)  # [R, max_tokens]
        total = len(noise)
        tokens = torch.zeros(total, max_tokens, dtype=torch.int64, device=self.device)
        logprobs = torch.zeros(total, max_tokens, device=self.device)
        rows = torch.arange(total, device=self.device)  # which responses are still being written
        done = torch.zeros(total, dtype=torch.bool, device=self.device)  # of these, which ended
        look = 2 if self.device == "cpu" else 8  # steps: looking costs a wait for the device
        for t in range(max_tokens):
            token, logprob = pick(logits.float(), temperature, top_p, noise[rows, t])
            tokens[rows, t], logprobs[rows, t] = token, logprob
            done |= torch.isin(token, self.eos)
            if t % look == look - 1 and done.any():
                left = (~done).nonzero()[:, 0]
                if len(left) == 0:
                    break
                # The last rows move to where rows have ended; the others stay where they are.
                keep = torch.arange(len(left), device=self.device)
                keep[done[: len(left)]] = left[left >= len(left)]
                rows, token, position, done = rows[keep], token[keep], position[keep], done[keep]
                attention = attention[keep]
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
        samples = []
        for i, (response, values) in enumerate(zip(tokens.tolist(), logprobs.tolist())):
            length = first[i] + 1 if ended[i] else max_tokens
            samples.append(Sample(response[:length], values[:length], truncated=not ended[i]))
        return [samples[i : i + n] for i in range(0, total, n)]

    def sleep(self) -> None:
        pass

    @torch.no_grad()
    def push(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        held = self.model.state_dict()
        for name, tensor in weights:
            held[name].copy_(tensor)


# --------------------------------------------------------------------------------------------------
# What makes the PyTorch sampler faster, mostly on a CPU. Skip it at first reading:
# nothing below changes what is sampled.


def _transpose_weights(model) -> None:
    """Few rows are multiplied faster by weights stored transposed."""
    for module in model.modules():
        head = module is model.get_output_embeddings()
        if isinstance(module, torch.nn.Linear) and not head:
            module.weight.data = module.weight.data.T.contiguous().T


def cache_bytes(config, length: int, dtype: torch.dtype) -> int:
    """Of the rooms below, the most that a response takes whose prompt and tokens are `length`."""
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    positions = length + length // 2 + 32  # as _RoomyLayer makes them
    return 2 * config.num_hidden_layers * kv_heads * head_size * positions * dtype.itemsize


def _make_cache(config) -> transformers.DynamicCache:
    cache = transformers.DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        if (
            type(layer) is transformers.cache_utils.DynamicLayer
        ):  # others keep a sliding window, say
            cache.layers[i] = _RoomyLayer()
    return cache


class _RoomyLayer(transformers.cache_utils.DynamicLayer):
    """Keys and values [R, heads, T, head size] at the start of larger buffers, the `rooms`.

    New ones are written where there is room, and none is moved.
    """

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
            self.rooms = self.keys, self.values
        old = self.keys.shape[2]
        new = old + key_states.shape[2]
        if new > self.rooms[0].shape[2]:
            self._move(self.keys, self.values, new + new // 2 + 32)
        for room, states in zip(self.rooms, (key_states, value_states)):
            room[:, :, old:new] = states
        self._set_length(new)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats):
        keys = self.keys.repeat_interleave(repeats, 0)
        values = self.values.repeat_interleave(repeats, 0)
        self._move(keys, values, self.rooms[0].shape[2])

    def batch_select_indices(self, indices):
        stay = torch.arange(len(indices), device=indices.device)
        moved = (indices != stay).nonzero()[:, 0]
        for held in (self.keys, self.values):
            held[moved] = held[indices[moved]]
        length = self.keys.shape[2]
        self.rooms = tuple(room[: len(indices)] for room in self.rooms)
        self._set_length(length)

    def _move(self, keys, values, size: int) -> None:
        """Into new rooms for `size` positions."""
        length = keys.shape[2]
        rooms = []
        for held in (keys, values):
            room = held.new_empty(*held.shape[:2], size, held.shape[3])
            room[:, :, :length] = held
            rooms.append(room)
        self.rooms = tuple(rooms)
        self._set_length(length)

    def _set_length(self, length: int) -> None:
        self.keys, self.values = (room[:, :, :length] for room in self.rooms)


def grouped_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """transformers' SDPA, except in decoding: query heads that share a key head are its rows.

    So no key is copied for each. query [R, H, t, d]; key, value [R, K, T, d] with H a multiple of K
    -> ([R, t, H, d], None).
    """
    if query.shape[2] != 1 or kwargs.get("position_bias") is not None:
        sdpa = transformers.AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    rows = query.reshape(len(query), key.shape[1], -1, query.shape[3])  # [R, K, H / K, d]
    out = torch.nn.functional.scaled_dot_product_attention(
        rows, key, value, attention_mask, scale=scaling
    )
    return out.reshape(len(query), 1, -1, value.shape[3]), None


def _register_grouped_attention() -> None:
    """Not on import of this file: transformers' interfaces take two seconds to load."""
    transformers.AttentionInterface.register("grouped", grouped_attention)
    transformers.AttentionMaskInterface.register("grouped", transformers.masking_utils.sdpa_mask)


def _added_to_scores(attention: Tensor, dtype: torch.dtype, config, cache) -> Tensor:
    """The mask [R, T] as what is added to the scores [R, 1, 1, T], if all layers can use that.

    Made once a batch; transformers would make it, and each layer's SDPA convert it, at each token.
    """
    roomy = all(type(layer) is _RoomyLayer for layer in cache.layers)
    if config._attn_implementation != "grouped" or not roomy:
        return attention
    return (1 - attention)[:, None, None].to(dtype) * torch.finfo(dtype).min
