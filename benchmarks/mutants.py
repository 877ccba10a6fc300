"""Would a test notice? One line is broken at a time, and the tests that concern it must fail.

    python benchmarks/mutants.py [--only FILE] [--list] [--jobs 2]

Each mutant is applied to a copy of the tree, in which the tests that its group names then run: on
one rank, if without a mutant they pass so, and after surviving that on two as well. The survivors
are printed last; there must be none. A mutant whose old text does not occur exactly once in its
file is refused, and so is a group of tests that fails without any mutant.
"""

import argparse
import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OWN = (ROOT, ROOT / "benchmarks")
LIMIT = 600  # seconds a run of tests may take; a mutant that hangs has been noticed
PROCESSES = multiprocessing.get_context("forkserver")
# The imports take longer than most of the tests.
PROCESSES.set_forkserver_preload(
    ["torch", "torch.distributed.checkpoint", "datasets", "math_verify", "pytest"]
)

# file -> groups of (what pytest -k takes, mutants); a mutant is the old text of a line and the new.
# fmt: off
MUTANTS = {
    "losses.py": [
        ("group_advantages", [
            ("rewards - rewards.nanmean(1, keepdim=True)", "rewards - rewards.nanmean()"),
            ("rewards - rewards.nanmean(1, keepdim=True)", "rewards - rewards.mean(1, keepdim=True)"),
            ("rewards - rewards.nanmean(1, keepdim=True)", "rewards.nanmean(1, keepdim=True) - rewards"),
            ("freedom = judged.sum(1, keepdim=True) - 1", "freedom = judged.sum(1, keepdim=True)"),
            ("freedom = judged.sum(1, keepdim=True) - 1", "freedom = rewards.shape[1] - 1"),
            ("(variance.sqrt() + 1e-6)", "(variance.sqrt() + 1e-5)"),
            ("    if normalize_std:", "    if not normalize_std:"),
            ("masked_fill(all_equal | ~judged, 0.0)", "masked_fill(~judged, 0.0)"),
            ("masked_fill(all_equal | ~judged, 0.0)", "masked_fill(all_equal, 0.0)"),
            ("((rewards == one) | ~judged).all(", "(rewards == one).all("),
        ]),
        ("test_grpo or test_gspo", [
            ("ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0)  #",
             "ratio = (old_logprobs - logprobs).masked_fill(~mask, 0.0)  #"),
            ("ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0)  #",
             "ratio = (logprobs - old_logprobs)  #"),
            ("    if sequence_ratio:", "    if not sequence_ratio:"),
            ("(log_ratio.sum(1, keepdim=True) / lengths)", "(log_ratio.sum(1, keepdim=True))"),
            ("(log_ratio.sum(1, keepdim=True) / lengths)", "(log_ratio.mean(1, keepdim=True))"),
            ("(log_ratio.sum(1, keepdim=True) / lengths)",
             "(log_ratio.sum(1, keepdim=True) / lengths).detach()"),
            ("clamp(1 - clip_low, 1 + clip_high)", "clamp(1 - clip_high, 1 + clip_low)"),
            ("clamp(1 - clip_low, 1 + clip_high)", "clamp(max=1 + clip_high)"),
            ("gain = torch.minimum(", "gain = torch.maximum("),
            ("torch.minimum(ratio * advantages, clipped * advantages)", "clipped * advantages"),
            ("1 - clip_low) & (advantages < 0)", "1 - clip_low) & (advantages > 0)"),
            ("1 + clip_high) & (advantages > 0)", "1 + clip_high) & (advantages >= 0)"),
            ("rollout_logprobs is not None and tis_cap > 0:", "rollout_logprobs is not None:"),
            ("(old_logprobs - rollout_logprobs)", "(rollout_logprobs - old_logprobs)"),
            ("engine_ratio.clamp(max=tis_cap)", "engine_ratio.clamp(min=tis_cap)"),
            ("engine_ratio.clamp(max=tis_cap).detach()", "engine_ratio.clamp(max=tis_cap)"),
            ("(ref_logprobs - logprobs)", "(logprobs - ref_logprobs)"),
            ("log_ref.exp() - log_ref - 1", "log_ref.exp() - 1"),
            ("gain = gain - kl_coef * kl", "gain = gain + kl_coef * kl"),
            ("kl.detach().sum()", "kl.sum()"),
            ("    if per_sequence:", "    if not per_sequence:"),
            ("        weights = weights / lengths", "        weights = weights / mask.shape[1]"),
            ("mask.sum(1, keepdim=True).clamp(min=1)", "mask.sum(1, keepdim=True)"),
            ("return -(gain * weights).sum()", "return (gain * weights).sum()"),
            ("return -(gain * weights).sum()", "return -gain.sum()"),
            ("return -(gain * weights).sum()", "return -(gain * weights).mean()"),
        ]),
        ("test_nft", [
            ("if not (advantages.abs() < 1).all():", "if not (advantages.abs() <= 1).all():"),
            ("if not (advantages.abs() < 1).all():", "if (advantages.abs() >= 1).any():"),
            ("right = advantages > 0", "right = advantages < 0"),
            ("right, 1 - advantages, -advantages)", "right, advantages, -advantages)"),
            ("right, 1 - advantages, -advantages)", "right, 1 - advantages, 1 + advantages)"),
            ("masked_fill(~mask, 0.0).clamp(max=10.0)", "clamp(max=10.0)"),
            ("masked_fill(~mask, 0.0).clamp(max=10.0)", "masked_fill(~mask, 0.0)"),
            ("(1 - r * log_ratio.exp()) / (1 - r)", "1 - r * log_ratio.exp()"),
            ("x.detach().clamp(min=epsilon) + (x - x.detach())", "x.clamp(min=epsilon)"),
            ("x.detach().clamp(min=epsilon) + (x - x.detach())", "x.clamp(min=1e-6)"),
            ("gain = (1 - r) * torch.where", "gain = torch.where"),
            ("torch.where(right, log_ratio, negative * c.log())",
             "torch.where(right, log_ratio, c.log())"),
            ("return -(gain * mask).sum()", "return (gain * mask).sum()"),
            ("(mask & ~right & (x < epsilon))", "(mask & (x < epsilon))"),
            ("(mask & ~right & (x < epsilon))", "(~right & (x < epsilon))"),
        ]),
        ("top_entropy", [
            ("math.ceil(rho * n - 1e-9)", "math.ceil(rho * n)"),
            ("math.ceil(rho * n - 1e-9)", "math.floor(rho * n + 1e-9)"),
            ("max(1, math.ceil(rho * n - 1e-9))", "math.ceil(rho * n - 1e-9)"),
            ("return min(n, max(1, ", "return max(0, max(1, "),
            ("for n in mask.sum(1).tolist()", "for n in [mask.shape[1]] * len(mask)"),
            ("entropy.masked_fill(~mask, -math.inf)", "entropy.masked_fill(~mask, math.inf)"),
            ("descending=True, stable=True", "descending=False, stable=True"),
            ("entropy.sort(dim=1, descending=True, stable=True)", "entropy.flip(1).sort(dim=1)"),
            ("rank = order.argsort(dim=1)", "rank = order"),
            ("return rank < counts", "return rank <= counts"),
            ("if not 0 < rho <= 1:", "if not 0 <= rho <= 1:"),
        ]),
        ("sft_loss", [
            ("nll = -logprobs.masked_fill(~mask, 0.0)", "nll = logprobs.masked_fill(~mask, 0.0)"),
            ("nll = -logprobs.masked_fill(~mask, 0.0)", "nll = -logprobs"),
            ("nll = nll * weights.masked", "nll = nll / weights.masked"),
            ("return nll.sum()", "return nll.mean()"),
        ]),
        ("sft_weights or trust_weights", [
            ("nll * weights.masked_fill(~mask, 0.0)", "nll * weights"),
            ("p = logprobs.detach().exp()", "p = logprobs.exp()"),
            ("        return p\n", "        return 1 - p\n"),
            ("(p / alpha).clamp(max=1.0)", "p / alpha"),
            ("(p / alpha).clamp(max=1.0)", "(p / 0.1).clamp(max=1.0)"),
            ("return p * (1 - p)", "return p * p"),
            ("alpha: float = 0.1)", "alpha: float = 0.2)"),
            ("if not 0 < alpha <= 1:", "if not 0 <= alpha <= 1:"),
        ]),
        ("test_sed", [
            ("mask & (top_mass < tau)", "mask & (top_mass > tau)"),
            ("mask & (top_mass < tau)", "mask & (top_mass <= tau)"),
            ("logprobs.masked_fill(~uncertain, 0.0).exp()", "logprobs.exp()"),
            ("strength * (logprobs", "(logprobs"),
            (".exp() - 0.5).square()", ".exp() - 0.5).abs()"),
            (".exp() - 0.5).square()", ".exp()).square()"),
            ("        penalty = penalty * weights", "        pass"),
            ("penalty.masked_fill(~uncertain, 0.0).sum()", "penalty.sum()"),
            ("max(1, math.floor(ratio", "max(0, math.floor(ratio"),
            ("len(top_mass) + 1e-9)", "len(top_mass))"),
            ("top_mass.sort(descending=True)", "top_mass.sort()"),
            ("if not 0 < ratio <= 1 or", "if not 0 <= ratio <= 1 or"),
        ]),
        ("test_pear", [
            ("(logprobs - behavior_logprobs).detach()", "(behavior_logprobs - logprobs).detach()"),
            ("(logprobs - behavior_logprobs).detach()", "logprobs - behavior_logprobs"),
            ("d = d.clamp(*ratio_range)", "d = d.clamp(max=ratio_range[1])"),
            ("    d = d.masked_fill(~mask, 0.0)", "    d = d.nan_to_num(0.0)"),
            ("    n = mask.sum(1, keepdim=True)", "    n = (mask | True).sum(1, keepdim=True)"),
            ("d.sum(1, keepdim=True).expand_as(d)", "d.flip(1).cumsum(1).flip(1)"),
            ("torch.nn.functional.pad(d[:, 1:], (0, 1))", "d"),
            ("shifted.flip(1).cumsum(1).flip(1)", "shifted.cumsum(1)"),
            ("(n - t) * math.log(gamma) + suffix", "suffix"),
            ("(n - t) * math.log(gamma) + suffix", "(n - t + 1) * math.log(gamma) + suffix"),
            ("(n - t) * math.log(gamma) + suffix", "(t - n) * math.log(gamma) + suffix"),
            ("(t + block - 1) // block", "(t + block) // block"),
            ("torch.minimum(block_number * block, n)", "torch.minimum(block_number, n)"),
            ("by_t.gather(1, last)", "by_t.gather(1, t)"),
            ("clamp(*weight_range)", "clamp(max=weight_range[1])"),
            ("log_weights.exp().masked_fill(~mask, 0.0)", "log_weights.exp()"),
            ("gamma: float = 0.999,", "gamma: float = 0.99,"),
            ("block: int = 4,", "block: int = 5,"),
            ("= (-0.08, 0.3),", "= (-0.3, 0.08),"),
            ("= (-10.0, 5.0),", "= (-5.0, 10.0),"),
        ]),
        ("token_logprobs", [
            ("torch.cat([top, best], 1).topk(top_k)", "best.topk(top_k)"),
            ("logits.topk(min(top_k, logits.shape[1]))", "logits.topk(top_k)"),
            ("(top - log_z).exp().sum(1)", "top.exp().sum(1)"),
            ("return found if top_k > 0 else found[:2]", "return found"),
            ("            if top_k > 0:\n", "            if True:\n"),
            ("scale / (temperature if softcap", "scale * (temperature if softcap"),
            ("beta=0, alpha=factor, out", "beta=0, alpha=1, out"),
            ("copy_(hidden @ weight.T).mul_(factor)", "copy_(hidden @ weight.T)"),
            ("add_(bias[part], alpha=factor)", "add_(bias[part])"),
            ("mul_(softcap / temperature)", "mul_(softcap)"),
            ("((temperature / softcap) ** 2)", "(1 / softcap**2)"),
            ("d_logits.mul_(slope)", "pass"),
            ("grad_bias[part] = d_logits.sum(0)", "grad_bias[part] = d_logits.mean(0)"),
            ("logits.gather(1, column) * inside", "logits.gather(1, column)"),
            ("decay = (peak - higher).exp_()", "decay = (higher - peak).exp_()"),
            ("total = total * decay +", "total = total +"),
            ("moment = moment * decay +", "moment = moment +"),
            ("            peak = higher", "            pass"),
            ("(log_z - moment / total)", "(log_z + moment / total)"),
            ("        ctx.mark_non_differentiable(entropy, top_mass)", "        pass"),
            ("mark_non_differentiable(entropy, top_mass)", "mark_non_differentiable(entropy)"),
            ("return (picked - log_z)", "return (log_z - picked)"),
            ("mul_(-grad)", "mul_(grad)"),
            ("grad[:, None] * scale / temperature", "grad[:, None] * scale"),
            ("grad[:, None] * scale / temperature", "grad[:, None] / temperature"),
            ("scatter_add_(1, column, grad * inside)", "scatter_add_(1, column, grad)"),
            ("grad_hidden.addmm_(d_logits,", "grad_hidden.addmm_(-d_logits,"),
            ("grad_hidden += d_logits", "grad_hidden = d_logits"),
            ("dtype=log_z.dtype)  # full", "dtype=hidden.dtype)  # full"),
            ("column = targets[:, None] - start", "column = targets[:, None]"),
            ("(column >= 0) & (column < width)", "(column > 0) & (column < width)"),
            ("(column >= 0) & (column < width)", "(column >= 0) & (column <= width)"),
        ]),
        ("kept_in_float32", [("out_dtype=dtype, out=tiles[0])", "out=hidden.new_empty(n, width))")]),
    ],
    "freeze.py": [
        ("update_importance", [
            ("c.mul_(alpha).add_(", "c.add_("),
            ("c.mul_(alpha).add_(", "c.mul_(1 - alpha).add_("),
            ("- old).abs_())", "- old))"),
        ]),
        ("topk_threshold and not ten_million", [
            ("if not 0 < fraction <= 1:", "if not 0 <= fraction <= 1:"),
            ("t.abs().flatten()", "t.flatten()"),
            ("(cumulated <= index).sum()", "(cumulated < index).sum()"),
            ("int(cumulated[higher_bins - 1])", "int(cumulated[higher_bins])"),
            ("index -= int(cumulated[higher_bins - 1])", "pass"),
            ("len(counts) - 1 - higher_bins", "len(counts) - 2 - higher_bins"),
            ("torch.where(bits > infinity,", "torch.where(bits >= infinity,"),
            ("math.floor(fraction * n + 1e-9)", "math.floor(fraction * n)"),
            ("math.floor(fraction * n + 1e-9)", "math.ceil(fraction * n)"),
            ("    if k >= n:", "    if k > n:"),
            ("find(upper, k)", "find(upper, k - 1)"),
            ("bits[bits >> 16 == high] & 0xFFFF", "bits & 0xFFFF"),
        ]),
        ("topk_threshold and ten_million", [
            ("dist.all_reduce(counts, group=group)", "pass"),
        ]),
        ("test_a_frozen or warm_moments or leak or largest_movement or freezing_example", [
            ("g.mul_(~f)", "g.mul_(f)"),
            ("g.mul_(~f)", "g.masked_fill_(f, 0.0)"),
            ("        if g is not None:", "        if True:"),
            ("torch.where(f, a.to(", "torch.where(~f, a.to("),
            ("(held - p).abs_().max()", "(held - p).max()"),
            ("torch.maximum(moved.to(p.device), (held", "torch.minimum(moved.to(p.device), (held"),
            ("        if p.numel() > 0:", "        if True:"),
            ("        if restore:", "        if not restore:"),
            ("anchor, restore=True)", "anchor, restore=False)"),
            ("anchor, restore=False)", "anchor, restore=True)"),
        ]),
        ("freezing_example", [  # the usage example is code, too
            ("        update_importance(importance, anchor, parameters,", "        dict("),
            ("zero_frozen_gradients((p.grad for p in parameters), frozen)", "pass"),
            ("    restore_frozen(parameters, frozen, anchor)", "    pass"),
            ("parameters]  # what SFT must not change", "parameters] and anchor"),
            ("parameters]  # the weights before the next RL phase", "parameters] and anchor"),
        ]),
    ],
    "mifo.py": [
        ("architectures_train or dropout_is or would_compute", [  # Policy, load_policy, check_logits
            ("            bias=head.bias,", "            bias=None,"),
            ("            scale=self.scale,", "            scale=1.0,"),
            ("            softcap=self.softcap,", "            softcap=None,"),
            ("policy = Policy(model).eval()", "policy = Policy(model).train()"),
            ("layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)", "pass"),
            ("(logits[0, 0, 0] / known[0]).item()", "1.0"),
            ("limit if limit < 0.5 * policy.scale * known[1] else None", "None"),
            ("if not logits[1].isfinite().all():", "if False:"),
            ("tokens[0, :9] = tokens[1, :9]", "tokens[:] = tokens[1]"),
            ("if logits[0].shape != expected.shape or not", "if not"),
            ("logits[0].shape != expected.shape or not torch.allclose(logits[0], expected, rtol=1e-4)",
             "logits[0].shape != expected.shape"),
            ("if not (logprobs[1] - own_logprobs).abs().mean() <= bound", "if False"),
            ("        if not isinstance(tensor, DTensor):", "        if False:"),
        ]),
        ("gradients_of_an_rl_step or second_update or order_of_rl or without_a_graph", [  # rl_update, Policy
            ('"token": sum(len(r.tokens) for r in counted)', '"token": len(counted)'),
            ('"sequence": len(counted),', '"sequence": len(responses),'),
            ("len(counted) * cfg.max_response", "len(counted)"),
            ("advantages[row] = chosen[index].advantage", "advantages[row] = chosen[row].advantage"),
            ("part.old if cfg.updates > 1 else logprobs.detach()", "logprobs.detach()"),
            ('per_sequence=cfg.aggregation == "sequence"', "per_sequence=False"),
            ("cfg.clip_low,\n                cfg.clip_high,",
             "cfg.clip_high,\n                cfg.clip_low,"),
            ('sequence_ratio=cfg.rl_loss == "gspo"', "sequence_ratio=False"),
            ('if cfg.rl_loss == "nft":', 'if cfg.rl_loss == "gspo":'),
            ("cfg.nft_epsilon, cfg.nft_negative", "cfg.nft_negative, cfg.nft_epsilon"),
            ('graded = right if cfg.rl_loss == "nft" else rewards', "graded = rewards"),
            ("ref_logprobs=reference", "ref_logprobs=None"),
            ("frozen_logprobs(run.reference, part, cfg.temperature)", "frozen_logprobs(run.reference, part, 1.0)"),
            ("kl_coef=cfg.kl_coef", "kl_coef=0.0"),
            ("rollout_logprobs=part.rollout", "rollout_logprobs=None"),
            ("tis_cap=cfg.tis_cap", "tis_cap=0.0"),
            ("(loss * run.world / divisor).backward()", "(loss / divisor).backward()"),
            ("(loss * run.world / divisor).backward()", "(loss * run.world).backward()"),
            ("run.policy(part.tokens, part.mask, cfg.temperature)  # [B, T-1] each",
             "run.policy(part.tokens, part.mask, 1.0)"),
            ("return response.advantage != 0 and counts", "return counts"),
            ("counted = [r for r in responses if counts(cfg, r)]", "counted = responses"),
            (" or cfg.mask_truncated and response.truncated)", ")"),
            ("not (math.isnan(response.reward) or ", "not ("),
            ("            find_old_logprobs(run, responses)", "            pass"),
            ("@torch.no_grad()\ndef find_old_logprobs", "def find_old_logprobs"),
            ("last=i + 1 == len(rounds)", "last=False"),
            ("values[j] for j in indices]", "values[0] for j in indices]"),
            ("inputs, targets = tokens[:, :-1], tokens[:, 1:]", "inputs = targets = tokens[:, 1:]"),
            ("empty.masked_scatter(mask, values) for values in found",
             "empty.masked_scatter(mask, values) for values in found[::-1]"),
        ]),
        ("gradients_of_sft_steps or behavior_logprobs or order_of_demonstrations", [  # sft_step
            ('            batch["mask"][:] = False', "            pass"),
            ("losses.top_entropy_count(n, cfg.rho) for n in lengths", "n for n in lengths"),
            ("run.policy(part.tokens, part.mask, 1.0, top_k)",
             "run.policy(part.tokens, part.mask, cfg.temperature, top_k)"),
            ("weights = weights * losses.sft_weights(", "weights = losses.sft_weights("),
            ("alpha = cfg.sft_weight_alpha", "alpha = 0.1"),
            ("loss = loss + penalty", "loss = penalty"),
            ("tau, cfg.sed, weights)", "tau, cfg.sed)"),
            ("top_k = cfg.sed_k if", "top_k = 2 if"),
            ("if cfg.sed > 0 and state.sft_phases == 0:", "if False:"),
            ("cfg.sed_tau or find_sed_tau(run, indices)", "find_sed_tau(run, indices)"),
            ("losses.top_entropy_mask(entropy, part.mask, cfg.rho)", "part.mask"),
            ("losses.sft_loss(logprobs, selected, weights)", "losses.sft_loss(logprobs, selected)"),
            ("losses.sft_loss(logprobs, selected, weights)", "losses.sft_loss(logprobs, part.mask)"),
            ("(loss * run.world / count).backward()", "(loss / count).backward()"),
            ("(loss * run.world / count).backward()", "(loss * run.world).backward()"),
            ("torch.where(known, part.behavior, frozen_logprobs(run.behavior, part, 1.0))", "part.behavior"),
            ("torch.where(known, part.behavior, frozen", "torch.where(~known, part.behavior, frozen"),
            ("frozen_logprobs(run.behavior, part, 1.0)", "frozen_logprobs(run.policy, part, 1.0)"),
            ("        cfg.pear_gamma,", "        1.0,"),
            ("        cfg.pear_block,", "        1,"),
            ("ratio_range = (cfg.pear_ratio_low, cfg.pear_ratio_high)", "ratio_range = None"),
            ("weight_range = (cfg.pear_weight_low, cfg.pear_weight_high)", "weight_range = None"),
        ]),
        ("gather_once_is_chosen or however_it_is_split", [
            ("return 8 * parameters <= memory / 20", "return 8 * parameters < memory / 20"),
            ("return 8 * parameters <= memory / 20", "return 4 * parameters <= memory / 20"),
            ("dist.ReduceOp.MIN", "dist.ReduceOp.MAX"),
            ('os.sysconf("SC_PHYS_PAGES") / here', 'os.sysconf("SC_PHYS_PAGES")'),
            ('cfg.gather_once != "auto" or world == 1', 'cfg.gather_once != "auto"'),
            ("run.policy.set_requires_gradient_sync(last)", "run.policy.set_requires_gradient_sync(False)"),
        ]),
        ("movement_is_that or shown_demonstrations", [  # log_movement, log_demonstrations
            ('        log_movement(run, "rl")', "        pass"),
            ('    log_movement(run, "sft")', "    pass"),
            ("    log_demonstrations(run)", "    pass"),
            ("(now.to(then.device) - then).abs_()", "(now.to(then.device) - then)"),
            ('"moved": moved / entries}', '"moved": moved}'),
            ('sums["nll"] -= logprobs.sum().item() / sum(lengths)',
             'sums["nll"] -= logprobs.sum().item() / count'),
            ("entropy.sum().item() / sum(lengths)", "entropy.sum().item() / count"),
            ("entropy[selected].sum().item() / count", "entropy.sum().item() / count"),
            ("run.state.sft_queue[0][:SHOWN]", "run.state.sft_queue[-1][:SHOWN]"),
            ("top_entropy_mask(entropy, part.mask, run.cfg.rho)", "top_entropy_mask(entropy, part.mask, 1)"),
        ]),
        ("pears_shares or are_placed", [
            ("for part in parts[end:]]", "for part in parts[end - 1 :]]"),
            ("(logs < cfg.pear_weight_low + rounding)", "(logs < cfg.pear_weight_low)"),
            ("(logs > cfg.pear_weight_high - rounding)", "(logs > cfg.pear_weight_high)"),
        ]),
        ("test_preset or budget or coin or held_out or pass_at", [
            ("            begin_sft(run, stage(run))", "            begin_sft(run, sorted(run.demonstrated))"),
            ("if chosen := within_budget(cfg, state):", "if chosen := state.buffer:"),
            ("begin_sft(run, next_demonstrations(run))", "begin_sft(run, stage(run)[: cfg.sft_batch])"),
            ("        elif phase == \"sft\" and len(state.sft_queue) % state.steps_per_sft_epoch == 0:",
             "        elif False:"),
            ("len(state.sft_queue) // cfg.sft_epochs", "len(state.sft_queue)"),
            ("generator_of(cfg.seed, state.step)", "generator_of(cfg.seed, 0)"),
            ("coin < cfg.rl_share else", "coin > cfg.rl_share else"),
            ("accuracy <= cfg.p and index in run.demonstrated", "accuracy <= cfg.p"),
            ("if index in used or len(used) < budget:", "if len(used) < budget:"),
            ("    if len(used) < budget:\n        for", "    if True:\n        for"),
            ("demonstrated=set(demonstrated) - set(holdout)", "demonstrated=set(demonstrated)"),
            ('["nll"] / tokens', '["nll"]'),
        ]),
        ("behavior_logprobs_for_pear_alone", [  # load_data
            ('behavior=cfg.pear != "off"', "behavior=True"),
            ('behavior=cfg.pear != "off"', "behavior=False"),
        ]),
        ("cosine_down", [  # sft_learning_rate
            ('["lr"] = sft_learning_rate(cfg, state)', '["lr"] = cfg.sft_lr'),
            ("    state.sft_steps += 1", "    pass"),
            ("state.sft_steps + 1 + len(state.sft_queue)", "state.sft_steps + len(state.sft_queue)"),
            ("if done < 0.1:", "if done < 0.2:"),
            ("0.55 + 0.45 * math.cos", "0.5 + 0.5 * math.cos"),
        ]),
        ("importance_is_measured or frozen_entries_stay or what_is_frozen or threshold_does "
         "or zero_gradients_alone or sft_moments or no_share_of", [  # begin_sft, end_sft, optimizer_step
            ("set_anchor(run)  # the first RL phase starts from these weights", "pass"),
            ("run.anchor, run.shards, cfg.alpha)", "run.anchor, run.shards, 1.0)"),
            ("            freeze.update_importance(run", "            (lambda *rest: None)(run"),
            ("topk_threshold(run.importance, cfg.k, group)",
             "topk_threshold(run.importance, 1 - cfg.k, group)"),
            ("topk_threshold(run.importance, cfg.k, group)",
             "topk_threshold(run.importance, cfg.k)"),
            ("        set_anchor(run)  # what optimizer_step puts frozen entries back to",
             "        pass"),
            ("    run.state.threshold = math.inf", "    pass"),
            ("    set_anchor(run)  # from here", "    # from here"),
            ("        freeze.zero_frozen_gradients(local_gradients(parameters), frozen_masks(run))",
             "        pass"),
            ("nn.utils.clip_grads_with_norm_(parameters, clip, norm)", "pass"),
            ("        run.optimizers[which].step()", "        pass"),
            ("    run.optimizers[which].zero_grad()", "    pass"),
            ("        whole_norm = gradient_norm(parameters).item()\n", "        whole_norm = 2.0\n"),
            ("(norm.item() / whole_norm) ** 2", "norm.item() / whole_norm"),
            ("** 2 if whole_norm else 1.0", "** 2 if whole_norm else 0.0"),
            ('= 1 - free  #', '= free  #'),
            ('strict = run.cfg.freeze == "strict"', 'strict = run.cfg.freeze != "strict"'),
            ("non_blocking=True) > run.state.threshold", "non_blocking=True) >= run.state.threshold"),
            ("non_blocking=True) > run.state.threshold", "non_blocking=True) < run.state.threshold"),
            ("if run.cfg.schedule in STAGED:  #", "if True:  #"),
            ('return cfg.schedule == "interleave" and cfg.freeze != "off"',
             'return cfg.schedule == "interleave" and cfg.freeze == "strict"'),
        ]),
        ("questions_and_buffer or hard_question or exactly_p or engine_sleeps or its_share "
         "or behavior_model_is_freed or queues_its_epochs or graded_reward", [  # rl_step, train
            ("if cfg.schedule in STAGED:\n            begin_sft", 'if cfg.schedule == "sft":\n            begin_sft'),
            (">= cfg.buffer_size:", "> cfg.buffer_size:"),
            ("                state.buffer = []", "                pass"),
            ("                end_sft(run)", "                pass"),
            ("        state.step += 1", "        state.step += 2"),
            ("cfg.seed, state.drawn, cfg.questions)", "cfg.seed, 0, cfg.questions)"),
            ("    state.drawn += cfg.questions", "    pass"),
            ("hard = accuracy <= cfg.p", "hard = accuracy < cfg.p"),
            ("hard = accuracy <= cfg.p", "hard = accuracy >= cfg.p"),
            ("if hard and index not in state.buffer:", "if hard:"),
            ("rewards.view(-1, cfg.samples)", "rewards.view(cfg.samples, -1).T"),
            ("(rewards > cfg.right_above).double()", "(rewards > cfg.right_above).float()"),
            ("(rewards > cfg.right_above)", "(rewards > 0.5)"),
            (".masked_fill(rewards.isnan(), math.nan)", ""),
            ("advantages.flatten().tolist()", "advantages.T.flatten().tolist()"),
            ("    run.sampler.sleep()  # the engine", "    # the engine"),
            ("        run.sampler.sleep()\n    questions = [run.questions[index] for index in state",
             "        pass\n    questions = [run.questions[index] for index in state"),
            ("responses[start : start + size]", "responses[:size]"),
            ("for _ in range(cfg.sft_epochs):", "for _ in range(1):"),
            ("generator_of(cfg.seed, state.sft_phases)", "generator_of(cfg.seed, 0)"),
            ("shuffled[start : start + cfg.sft_batch]", "shuffled[start:]"),
            ("    state.sft_phases += 1", "    pass"),
            ("    state.demonstrations += indices", "    pass"),
            ('optimizer_step(run, "rl", cfg.rl_clip, loss)',
             'optimizer_step(run, "rl", cfg.sft_clip, loss)'),
            ('optimizer_step(run, "sft", cfg.sft_clip,', 'optimizer_step(run, "sft", cfg.rl_clip,'),
            ("        run.behavior = None", "        pass"),
        ]),
        ("names_the_type or memory_is_returned", [
            ("model.config.dtype = run.dtype", "pass"),
            ("            torch.cuda.empty_cache()", "            pass"),
            ("if not run.optimizers[which].state:", "if True:"),
        ]),
        ("not_finite or skipped or drifts or where_no_update_would_see_it or do_not_arrive", [
            ("    push_weights(run)\n    indices", "    indices"),
            ("        probe_engine(run)  # no update", "        pass  # no update"),
            ('check_engine(run, mean_gap, "the sampled tokens")', "pass"),
            ("if math.isfinite(loss) and math.isfinite(norm.item()):",
             "if math.isfinite(norm.item()):"),
            ("if math.isfinite(loss) and math.isfinite(norm.item()):", "if math.isfinite(loss):"),
            ("        run.state.skips_in_a_row = 0", "        pass"),
            ("        skip_step(run, loss)", "        pass"),
        ]),
        ("no_step_is_taken", [
            ("    if not chosen:", "    if False:"),
        ]),
        ("test_preset", [  # trains them all
            ("if stop or following is None or", "if stop or"),
            ('if cfg.schedule == "sft" or state.rl_steps >= cfg.steps:', "if state.rl_steps >= cfg.steps:"),
            ("    state.rl_steps += 1", "    state.rl_steps += 2"),
            ('run.optimizers["sft"].state.clear()', "pass"),
        ]),
        ("any_seed", [
            ("question_seed(cfg.seed, str(run.state.drawn + i))", "question_seed(cfg.seed, str(i))"),
            ("question_seed(cfg.seed, str(run.state.drawn + i))", "question_seed(0, str(run.state.drawn + i))"),
            ("1, [run.cfg.seed % 2**63], limit", "1, [run.cfg.seed], limit"),
        ]),
        ("exported_model or keeps_the_day", [
            ("    generation.eos_token_id = run.eos_ids", "    pass"),
            ("    generation._from_model_config = False", "    pass"),
            ("model.generation_config = transformers.GenerationConfig()", "pass"),
            ("    tokenizer.model_max_length = longest", "    pass"),
            ("not (cfg.resume and path.exists()):", "True:"),
            ("not (cfg.resume and path.exists()):", "not path.exists():"),
        ]),
        ("equal_rewards", [
            ("lowest >= highest).all()", "lowest >= highest).any()"),
            ("rewards.isnan(), math.inf)", "rewards.isnan(), 0.0)"),
            ("rewards.isnan(), -math.inf)", "rewards.isnan(), 0.0)"),
            ("set(judged) <= {0, 1}", "set(judged) == {0, 1}"),
            ("set(judged) in ({0}, {1})", "set(judged) <= {0, 1}"),
            ("sum(accuracy <= cfg.p for", "sum(accuracy < cfg.p for"),
        ]),
        ("rewards_are_equal", [  # log_responses, summary
            ("elif state.rl_steps == 1 or state.warning:", "else:"),
            ('if run.cfg.schedule == "interleave" and state.sft_phases == 0:', "if state.sft_phases == 0:"),
        ]),
        ("what_is_evaluated or holds_a_run", [  # load_data, main
            ("if len(longest.prompt) > cfg.max_prompt:", "if False:"),
            ("if len(longest.prompt) > cfg.max_prompt:", "if len(longest.prompt) >= cfg.max_prompt:"),
            ("max(benches[name], key=lambda question: len(question.prompt))", "benches[name][0]"),
            ('if cfg.schedule != "sft" and len(questions) < cfg.questions:', "if len(questions) < cfg.questions:"),
            ('if cfg.schedule != "sft" and len(questions) < cfg.questions:',
             'if cfg.schedule != "sft" and len(questions) <= cfg.questions:'),
            ("found = open_folder(cfg)", "found = not cfg.dry_run and open_folder(cfg)"),
        ]),
        ("killed_and_resumed_on_two_ranks", [  # what is evaluated and saved
            ("        evaluate(run)\n        if cfg.schedule", "        if cfg.schedule"),
            ("        if evaluation_due(cfg, state, phase, following):", "        if False:"),
        ]),
    ],
    "data.py": [
        ("behavior_logprobs_are_one", [  # prepare
            ("example.demonstration is None or not behavior:", "example.demonstration is None:"),
            ("example.temperature not in (None, 1)", "example.temperature is not None"),
            ("example.temperature not in (None, 1)", "False"),
        ]),
        ("test_draw", [
            ("divmod(start + len(indices), length)", "divmod(start, length)"),
            ("generator_of(seed, epoch)", "generator_of(seed, 0)"),
            ("(seed * 1_000_003 + n) % 2**63", "n % 2**63"),
            ("[first : first + count - len(indices)]", "[: count - len(indices)]"),
        ]),
        ("test_collate", [
            ("torch.full((len(rows), width), pad_id)", "torch.full((len(rows), width), 0)"),
            ("slice(len(prompt) - 1, length - 1)", "slice(len(prompt), length)"),
            ("slice(len(prompt) - 1, length - 1)", "slice(0, length - 1)"),
            ("slice(len(prompt) - 1, length - 1)", "slice(len(prompt) - 1, length)"),
            ("torch.tensor(prompt + response)", "torch.tensor(response + prompt)"),
            ("if values[i] is not None:", "if values[i] is None:"),
        ]),
        ("test_pack", [
            ("index: (-lengths[index], index)", "index: (lengths[index], index)"),
            ("* (len(parts[-1]) + 1) <= cap", "* len(parts[-1]) <= cap"),
            ("* (len(parts[-1]) + 1) <= cap", "* (len(parts[-1]) + 1) < cap"),
            ("math.ceil(needed / world) * world", "needed"),
            ("max(len(cut(budget)), 1)", "len(cut(budget))"),
        ]),
        ("teacher_demonstrates or demonstrations_are_read or all_may_be_kept or logprobs_go", [
            ('"reward_model" in columns or not plain', "not plain"),
        ]),
        ("any_size", [
            ("(seed * 1_000_003 + n) % 2**63", "seed * 1_000_003 + n"),
            ("torch.manual_seed(seed % 2**63)", "torch.manual_seed(seed)"),
        ]),
        ("opens_a_response or special_tokens", [
            ("before, begun = prompt.rstrip(), solution.lstrip()", "before, begun = prompt, solution"),
            ("rest.removeprefix(blank) if rest.startswith(blank) else rest.lstrip()", "rest.lstrip()"),
            ("rest.removeprefix(blank) if rest.startswith(blank) else rest.lstrip()", "rest"),
            ("if opening and text.rstrip().endswith(opening):", "if False:"),
            ("elif not set(eos_ids).isdisjoint(tokens):", "elif tokenizer.eos_token_id in tokens:"),
            ("*(decode(tokenizer, [end]) for end in eos_ids)", ""),
        ]),
        ("takes_the_date", [
            ("tokenize=False, strftime_now=clock.strftime", "tokenize=False"),
            ("style if writes_date else style[:-1]", "style[:-1]"),
            ("style if writes_date else style[:-1]", "style"),
        ]),
        ("begins_as_a_sample", [
            ("encode_within(continued, solutions", "encode_within(tokenizer, solutions"),
            ('"(always|first)"', '"(always)"'),
            ('"(always|first)"', '"(first)"'),
            ("""'"prepend":""')""", """'"prepend":"\u2581"')"""),
            ("""'"add_prefix_space":false')""", """'"add_prefix_space":true')"""),
        ]),
        ("type_of_number or in_parts or pictures_and or experts_turn", [
            ("name: as_stored(cell, features[name])", "name: cell"),
            ("[as_stored(part, feature.feature) for part in cell]", "cell"),
            ("return {name: as_stored(part, feature[name])", "return {name: part"),
            ('text.rstrip("0").rstrip(".") if', 'text.rstrip(".") if'),
            ("isinstance(value, (float, Decimal)) and", "isinstance(value, float) and"),
            ('if question["role"] != "user":', "if False:"),
            ('target[-1]["content"] if target', 'target[0]["content"] if target'),
            ("if PICTURES.fullmatch(name) and value]", "if PICTURES.fullmatch(name)]"),
            ('return "\\n".join(texts)\n\n\ndef prompt_messages', 'return "".join(texts)\n\n\ndef prompt_messages'),
        ]),
    ],
    "rollout.py": [
        ("test_pick", [
            ("(logits / temperature).log_softmax(-1)", "(logits * temperature).log_softmax(-1)"),
            ("logits.argmax(-1)", "logits.argmin(-1)"),
            ("logprobs.sort(dim=-1, descending=True)", "logprobs.sort(dim=-1)"),
            ("probs.cumsum(-1) - probs >= top_p", "probs.cumsum(-1) >= top_p"),
            ("torch.zeros_like(dropped).scatter_(1, order, dropped)", "dropped"),
            ("(dropped, -torch.inf).log_softmax(-1)", "(dropped, -torch.inf)"),
            ("noise * cdf[:, -1]", "1 - noise"),
            ("right=True", "right=False"),
            ("tokens.clamp(max=logits.shape[1] - 1)", "tokens"),
        ]),
        ("one_attention_kernel or gpu_has_room or global_generators", [
            ("torch.backends.cuda.enable_cudnn_sdp(False)", "pass"),
            ("return max(1, min(self.max_num_seqs, ", "return max(0, min(self.max_num_seqs, "),
            ("return max(1, min(self.max_num_seqs, ", "return max(1, max(self.max_num_seqs, "),
            ("positions = length + length // 2 + 32", "positions = length"),
            ("    finally:\n        random", "    except ZeroDivisionError:\n        random"),
        ]),
    ],
    "benchmarks/pictures.py": [
        ("phase_changed", [  # around_sft_phases
            ("kept = sum(map(min, then, now))", "kept = sum(now)"),
            ("(sum(now) - kept) / answers", "(sum(then) - kept) / answers"),
            ("answers += eval_k * len(", "answers += len("),
        ]),
    ],
    "benchmarks/experiment.py": [
        ("experiments_rows or cut_off_is_neither or repeats_no_run or go_on_when_one or ends_its_children", [
            ("whole = text[: text.rfind(\"\\n\") + 1]\n    rows", "whole = text\n    rows"),
            ("if file.tell() == 0:", "if True:"),
            ('if name in ("budget", "epochs", "buffer_size", "seed"):', 'if name in ("budget", "seed"):'),
            ("left = [one for one in cells if one not in done]", "left = cells"),
            ("return work(jobs, label, finished) if jobs else []",
             "work(jobs, label, finished)\n    return []"),
            ("failed.append(log)", "sys.exit(1)"),
            ("            process.kill()", "            pass"),
        ]),
        ("climb or tuning_asks or both_settings or experiments_plan or flags_of_every_run or rates_around", [
            ("max(different, key=scores.get)", "min(different, key=scores.get)"),
            ("max(different, key=scores.get)", "max(different[::-1], key=scores.get)"),
            ("missing = [one for one in different if one not in scores]", "missing = []"),
            ("missing = [one for one in different if one not in scores]",
             "missing = [one for one in different if one]"),
            ('-math.inf if row["final"] is None', 'math.inf if row["final"] is None'),
            ('if place == (task, "tune", method, budget):', "if True:"),
            ("min(max(budget, LOW), HIGH) if budget else HIGH", "min(max(budget, LOW), HIGH)"),
            ("abs(math.log(budget / at))", "abs(budget - at)"),
            ("own[method, at] for at in", "best[method, at] for at in"),
            ("((LOW, HIGH, 0) if STAGE in FLAGS[method] else (LOW, HIGH))", "(LOW, HIGH)"),
            ("return RATES[i], RATES[i - 1], RATES[i + 1]",
             "return RATES[i], RATES[i - 2], RATES[i + 1]"),
            ("(10, 11, 12, 13, 14), (20, 21)", "(10, 11, 12, 13, 14), (20, 10)"),
            ('flags += f" --demonstration-budget {one.budget}"', "pass"),
        ]),
        ("overlap_is or other_choices or random_half or dropped_gradients or stage_of_hard", [
            ("(sft[half].sum() / sft.sum())", "(sft[top].sum() / sft.sum())"),
            ("movement.topk(len(movement) // 2)", "(-movement).topk(len(movement) // 2)"),
            ("lambda entropy, generator: -entropy", "lambda entropy, generator: entropy"),
            ("torch.rand(entropy.shape, generator=generator), seed)", "entropy, seed)"),
            ("        if phase == which:", "        if phase != which:"),
            ("if rate <= cfg.p]", "if rate < cfg.p]"),
            ("state.drawn = 0  #", "pass  #"),
            ("return sorted(chosen[:wanted])", "return sorted(chosen)"),
            ("indices = sorted(run.demonstrated)", "indices = list(range(len(run.questions)))"),
        ]),
    ],
    "benchmarks/results.py": [
        ("test_results or rank_correlation", [
            ('if row[name] is not None and row["seed"] in other:', 'if row["seed"] in other:'),
            ('row[name] - other[row["seed"]]', 'other[row["seed"]] - row[name]'),
            ("if experiment.key_of(row) in plan]", "]"),
            ("len(pairs) < 3", "len(pairs) < 2"),
            ('f"{compare.cell(found, count)} ({len(found)})"', 'f"{compare.cell(found, count)} (5)"'),
            ("            if left:", "            if not left:"),
        ]),
    ],
    "eval.py": [
        ("appends_after_the_last or cut_off_is_neither", [
            ("    os.truncate(path, len(whole + newline))", "    pass"),
        ]),
        ("named_columns or own_code_template or read_from_each_layout or ends_a_rank", [
            ("if question_field and question_field not in rows", "if question_field in rows"),
            ("question_field, answer_field, rewarded=rewarded)", "rewarded=rewarded)"),
            ("                template=args.template,\n", ""),
            ("        trust_remote_code=args.trust_remote_code,\n", ""),
            ("data.is_chat(row) and args.question_field not in row", "data.is_chat(row)"),
            ('if memory and "out of memory" in str(error):', "if memory:"),
        ]),
        ("teacher_demonstrates or demonstrations_are_read or all_may_be_kept or logprobs_go", [
            ('verdict == "correct" and not sample.truncated', 'verdict == "correct"'),
            ('verdict == "correct" and not sample.truncated', "not sample.truncated"),
            ("args.temperature == 1 and read == sample.tokens", "read == sample.tokens"),
            ("args.temperature == 1 and read == sample.tokens", "args.temperature == 1"),
            ("[text])[0] + [tokenizer.eos_token_id]", "[text])[0] + sample.tokens[-1:]"),
            ('key=lambda j: found["tokens"][j])[:1]', 'key=lambda j: -found["tokens"][j])[:1]'),
            ('            if args.keep != "all":', "            if True:"),
            ('{column: None, "behavior_logprobs": None}', "{column: None}"),
            ('{column: None, "behavior_logprobs": None}', '{"behavior_logprobs": None}'),
            ('"kind": question.kind}', "}"),
        ]),
        ("called_as_trls or weighted_sum or told_in_one_line or run_once or mean_reward", [
            ("for w, v in zip(rewards.weights, values) if not math.isnan(v)]",
             "for w, v in zip(rewards.weights, values)]"),
            ("reward = sum(terms) if terms else math.nan", "reward = sum(terms)"),
            ("reward > rewards.right_above", "reward >= rewards.right_above"),
            ('known.pop(name, None)', 'pass'),
            ("if len(rewards) == len(samples):", "if True:"),
            ("        if None not in rewards:", "        if True:"),
            ("        call_reward(name, function, samples[half:])", "        pass"),
            ("return number if math.isfinite(number) else None", "return number"),
            ('row["verdict"].count("unjudged")\n', '0\n'),
        ]),
        ("spelling or longest", [
            ("return abs(a - b) <= max(abs(a), abs(b)) / 100_000", "return True"),
            ("ConversionConfig(lowercase_symbols=False)", "ConversionConfig()"),
            ("return near(a, b, 1e-13 if decimal else 1e-80)", "return near(a, b, 1e-5)"),
            ("if (solutions := sympy.solve(equation, symbols)) == []:",
             "if (solutions := sympy.solve(equation, symbols)) is None:"),
            ("return abs(left - right) > 0.05 * max(abs(left), abs(right))", "return False"),
            ("if DATE.fullmatch(text) or COMPOUND.search(EXPONENT.sub(\"\", text)):",
             "if DATE.fullmatch(text):"),
            ("{whole * under + over}", "{whole + over}"),
            ("return letter if not second or letter in second.groups() else None", "return letter"),
        ]),
        ("pass_at_k", [
            ("if not (0 <= c <= n and 1 <= k <= n):", "if not (0 <= c and 1 <= k <= n):"),
            ("if not (0 <= c <= n and 1 <= k <= n):", "if not (0 <= c <= n and 0 <= k <= n):"),
            ("1.0 - math.prod(", "math.prod("),
            ("(n - c - i) / (n - i)", "(n - c) / (n - i)"),
            ("(n - c - i) / (n - i)", "(n - c - i) / n"),
            ("for i in range(k))", "for i in range(1, k))"),
        ]),
        ("type_of_training or ends_a_rank", [
            ("torch.bfloat16 if torch.cuda.is_available() else config", "config"),
            ('"dtype": str(dtype).removeprefix("torch.")', '"dtype": args.dtype'),
            ("isinstance(error, refusal) and Path(raised_in)", "Path(raised_in)"),
            ("Path(raised_in).resolve().parent == here", "True"),
            ('if not refused or rank == "0":', 'if rank == "0":'),
            ("if not isinstance(error, (OSError, RewardError)):", "if isinstance(error, OSError):"),
        ]),
    ],
}
# fmt: on


def copy_tree(folder: str, ranks: int) -> Path:
    """A copy whose tests run on up to this many ranks."""
    skipped = shutil.ignore_patterns(".git", "runs", "assets", "*.egg-info")
    tree = Path(shutil.copytree(ROOT, Path(folder, "tree"), ignore=skipped))
    if ranks == 1:
        tests = tree / "test_mifo.py"
        replace(tests, "Case(function, worlds, late)", "Case(function, {1} & {*worlds}, late)")
        replace(tests, "raise KeyError(world)", "pytest.skip('on two ranks')")
    return tree


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{path.name}: occurs {text.count(old)} times: {old!r}"
    path.write_text(text.replace(old, new))


def unbroken(expression: str, ranks: int) -> str:
    """What becomes of these tests without a mutant."""
    with tempfile.TemporaryDirectory() as folder:
        return run_tests(copy_tree(folder, ranks), expression)


def in_child(tree: Path, expression: str) -> None:
    """The tests, in a process that has imported what they need, but nothing of the tree."""
    os.setsid()  # so that what the tests start ends with them
    os.chdir(tree)
    output = os.open(tree / "output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in OWN]
    sys.dont_write_bytecode = True
    import pytest

    # fmt: off
    code = pytest.main(["-q", "-x", "-p", "no:cacheprovider",
                        "--assert=plain",  # half the time: no rewriting of the whole file
                        "test_mifo.py", "-k", expression])
    # fmt: on
    sys.stdout.flush()
    os._exit(int(code))


def run_tests(tree: Path, expression: str) -> str:
    """passed, failed, hung, or what went wrong with pytest itself."""
    process = PROCESSES.Process(target=in_child, args=(tree, expression))
    process.start()
    process.join(LIMIT)
    code = process.exitcode
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if code is None:
        return "hung"
    if code in (0, 1):
        return "passed" if code == 0 else "failed"
    return f"pytest ended with {code}: {(tree / 'output.txt').read_text()[-300:]}"


def check(file: str, old: str, new: str, expression: str, on_one_rank: bool) -> tuple[str, str]:
    """A line to print, and killed, survived or refused."""
    start = time.perf_counter()
    for ranks in (1, 2) if on_one_rank else (2,):
        with tempfile.TemporaryDirectory() as folder:
            tree = copy_tree(folder, ranks)
            replace(tree / file, old, new)
            result = run_tests(tree, expression)
        if result != "passed":
            break
    known = {"passed": "survived", "failed": "killed", "hung": "killed"}
    outcome = known.get(result, "refused")
    why = f"{time.perf_counter() - start:.0f} s" if outcome != "refused" else result
    return f"{outcome:8}  {file}: {old.strip()}  ->  {new.strip()}  ({why})", outcome


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=MUTANTS, metavar="FILE", help=", ".join(MUTANTS))
    parser.add_argument("--list", action="store_true", help="show the table and run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    args = parser.parse_args()
    mutants, expressions = [], []
    for file in [args.only] if args.only else MUTANTS:
        for expression, pairs in MUTANTS[file]:
            expressions.append(expression)
            mutants += [(file, old, new, expression) for old, new in pairs]
    stale = 0
    for file, old, _, _ in mutants:
        found = (ROOT / file).read_text().count(old)
        if found != 1:
            print(f"{file}: occurs {found} times, not once: {old!r}")
            stale += 1
    if stale:
        return 2
    if args.list:
        for file, old, new, expression in mutants:
            print(f"{file}  [{expression}]  {old.strip()}  ->  {new.strip()}")
        print(f"{len(mutants)} mutants")
        return 0

    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    survivors = []
    with ThreadPoolExecutor(args.jobs) as pool:
        on_one_rank = dict(zip(expressions, pool.map(lambda e: unbroken(e, 1), expressions)))
        on_two = [e for e in expressions if on_one_rank[e] != "passed"]
        for expression, result in zip(on_two, pool.map(lambda e: unbroken(e, 2), on_two)):
            if result != "passed":
                print(f"without a mutant the tests {expression} should pass, but: {result}")
                return 1
        run = lambda mutant: check(*mutant, on_one_rank[mutant[-1]] == "passed")
        for line, outcome in pool.map(run, mutants):
            print(line, flush=True)
            if outcome != "killed":
                survivors.append(line)
    print(f"\n{len(mutants)} mutants, {len(survivors)} not killed")
    for line in survivors:
        print(line)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
