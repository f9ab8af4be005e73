"""Cases of `grpo/`: advantages and losses on synthetic log-probabilities, and whole recorded steps.

A recorded step (`e2e_*`) goes through the project's own path: verdicts and rewards of the decoded
completions, advantages, completions grouped as a rollout, scored in one pass on the shared
trajectory (those that think again by a forward of their own), loss and gradients.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from latent_reasoning.config import Reward
from latent_reasoning.model.lora import adapter_disabled, load_adapter
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.rl.grpo import PolicyLoss, advantages, policy_loss
from latent_reasoning.rl.reward import Outcomes, answer_is_right, judge_sample, rewards
from latent_reasoning.rl.rollouts import SamplingSettings, collect
from latent_reasoning.rl.scoring import loss_mask, score_completions
from tests.conformance.checks import Check, Checks, Tolerance, recorded
from tests.conformance.losses import adapter_name
from tests.conformance.recording import Record, Vectors

INFORMATION = {
    *("notes", "checks", "std", "trl_default_loss_type", "trl_defaults", "metrics"),
    *("model_training_flag_during_generate", "generation_config_passed", "kl_metric"),
    *("lora_grad_norm_bnpo", "fullparam_grad_norm_bnpo", "grad_norms_lora", "grad_norms_full"),
}
CLOSE = Tolerance(absolute=1e-6, relative=1e-5)
"""Synthetic losses and advantages."""
GRADIENT, NORM = Tolerance(1e-10, 1e-4, by_norm=True), Tolerance(1e-6, 1e-4)
REWARD = Tolerance(absolute=1e-6)
LOG_PROB = Tolerance(absolute=1e-4)
KL = Tolerance(relative=1e-3)


# -------------------------------------------------------------------------------------- synthetic


def _scaled(vectors: Vectors, expected: Tensor, kind: str, unscaled: str, source: str) -> Checks:
    """Advantages of synthetic rewards, with and without the division by the std."""
    entries = vectors.file("grpo/expected.json")[kind].values()
    sizes = {entry["rewards"]: entry["num_generations"] for entry in entries}
    values = vectors.file(f"grpo/{kind}.npz")[f"rewards_{source}"]
    yield Check(advantages(values, sizes[source], scale=not unscaled), expected, CLOSE)


def _advantages(_: Vectors, entry: Record) -> Checks:
    values = torch.tensor(entry["rewards"])
    yield Check(advantages(values, len(values)), entry["advantages"], CLOSE)


def _synthetic(vectors: Vectors, entry: Record, kind: str) -> Checks:
    arrays, old = vectors.file(f"grpo/{kind}.npz"), entry["old_logps"]
    reference = arrays["ref_logps"]
    log_probs = arrays["logps"].clone().requires_grad_()
    result = policy_loss(
        log_probs,
        advantages(arrays[f"rewards_{entry['rewards']}"], entry["num_generations"]),
        arrays["completion_mask"],
        kind=entry["loss_type"],
        epsilon=entry["epsilon"],
        kl_weight=entry["beta"],
        max_completion_length=entry["max_completion_length"],
        old_log_probs={"none": None, "given": arrays["old_logps"]}[old],
        reference=reference if entry["beta"] else None,
    )
    result.loss.backward()
    yield Check(result.loss, entry["loss"], CLOSE)
    yield Check(log_probs.grad.norm(), entry["grad_norm_wrt_logps"], NORM)
    gradient = arrays.get(f"grad_{entry['loss_type']}_old_{old}")
    # Recorded for these rewards and this weight of the KL alone.
    if gradient is not None and (entry["rewards"], entry["beta"]) == ("mixed", 0.001):
        yield Check(log_probs.grad, gradient, GRADIENT)
    low, high = result.clip_low, result.clip_high
    own = {"region_mean": low + high, "low_mean": low, "low_min": low}
    own = {f"clip_ratio/{k}": v for k, v in (own | {"high_mean": high, "high_max": high}).items()}
    yield recorded({"kl": result.kl} | own, entry["metrics"], CLOSE)


# --------------------------------------------------------------------------------- recorded steps


def _step(vectors: Vectors, entry: Record, key: str) -> Checks:
    """One optimiser step of the public code, N samples in blocks of G a prompt: its rewards."""
    arrays, size = vectors.file(f"grpo/{key}.npz"), entry["num_generations"]
    by_function = entry["rewards_per_func"]
    yield Check(entry["old_per_token_logps_is_None"], True, part="settings")
    texts = entry["decoded_completions"]
    prompts, labels = (np.repeat(entry[key], size).tolist() for key in ("prompts", "labels"))
    samples = zip(prompts, texts, labels, strict=True)
    verdicts = Outcomes.of([judge_sample(*sample, "public") for sample in samples])
    # Of these shares the last one alone counts a right number in a badly formatted answer.
    right = torch.tensor(
        [answer_is_right(*pair, "public") for pair in zip(texts, labels, strict=True)]
    )
    groups = verdicts.correct.view(-1, size)
    all_right, some_right, some_number_right = (
        hits.double().mean().item()
        for hits in (groups.all(1), groups.any(1), right.view(-1, size).any(1))
    )
    own = {
        "SimpleFormatRewarder": verdicts.well_formatted,
        "SimpleAccuracyRewarder": verdicts.correct,
        "SimpleLatentLengthRewarder": verdicts.length,
        "AllGensCorrectProportion": [all_right] * len(texts),
        "SomeGensCorrectProportion": [some_right - all_right] * len(texts),
        "AllGensWrongProportion": [1 - some_number_right] * len(texts),
    }
    yield recorded(own, by_function, part="verdicts")
    reward = rewards([i // size for i in range(len(texts))], verdicts, Reward())
    yield Check(reward, by_function["RelativeLengthRewarder"], REWARD, "rewards")
    weights = dict(zip(by_function, entry["reward_weights"], strict=True))
    if not any(weight for key, weight in weights.items() if key != "RelativeLengthRewarder"):
        yield Check(reward, arrays["rewards"], REWARD, "rewards")
    for expected in (arrays["advantages"], entry["advantages"]):
        yield Check(advantages(arrays["rewards"], size), expected, CLOSE, "advantages")


class _Step:
    """The samples of a recorded step, and what its policies make of them."""

    def __init__(self, vectors: Vectors, key: str) -> None:
        self.vectors, self.entry = vectors, vectors.file("grpo/expected.json")[key]
        self.arrays, size = vectors.file(f"grpo/{key}.npz"), self.entry["num_generations"]
        ids, mask = self.arrays["prompt_ids"], self.arrays["prompt_mask"].bool()
        prompts = [row[read].tolist() for row, read in zip(ids, mask, strict=True)]
        groups = prompts[::size]
        if prompts != [prompt for prompt in groups for _ in range(size)]:
            raise ValueError("the prompts are not in blocks of num_generations")
        completions = self.arrays["completion_ids"].view(len(groups), size, -1)
        lengths = self.arrays["completion_mask"].sum(1).view(len(groups), size)
        self.rollout = collect(groups, completions, lengths)

    def policy(self, variant: str) -> LatentReasoner:
        """`merged`: all weights trained; `adapter`: the LoRA policy; `reference`: the start."""
        if variant == "merged":
            model = self.vectors.model(f"grpo/{self.entry['policy_checkpoint_merged']}")
        else:
            model = self.vectors.model(self.entry["base_checkpoint(reference policy)"])
        if variant == "adapter":
            load_adapter(model, self.vectors.folder(f"grpo/{self.entry['adapter']}"))
        # The temperature is a setting of the run, whatever the checkpoint was saved with.
        temperature = self.entry["binary_head_temp"]
        model.settings = dataclasses.replace(model.settings, stop_head_temperature=temperature)
        return model

    def scores(self, model: LatentReasoner) -> Tensor:
        """Log-probabilities of the distinct completions, (U, T)."""
        sampling = SamplingSettings(
            temperature=self.entry["temperature"],
            max_new_tokens=self.entry["max_completion_length"],
            # Only sampling reads it; these samples are recorded.
            eos_id=-1,
        )
        return score_completions(model, self.rollout.prompts, self.rollout.completions, sampling)

    def loss(self, model: LatentReasoner, kind: str) -> PolicyLoss:
        """The loss of `model` on these samples, with its graph."""
        completions, reference = self.rollout.completions, None
        sample_of = self.rollout.sample_completion.flatten().tolist()
        first = [sample_of.index(index) for index in range(len(completions))]
        if self.entry["beta"]:
            with torch.no_grad():
                reference = self.scores(self.policy("reference"))
        return policy_loss(
            self.scores(model),
            self.arrays["advantages"][first],
            loss_mask(completions, model.settings),
            kind=kind,
            epsilon=self.entry["epsilon"],
            kl_weight=self.entry["beta"],
            max_completion_length=self.entry["max_completion_length"],
            weights=self.rollout.weights,
            reference=reference,
        )


def _log_probs(
    vectors: Vectors, expected: Tensor, key: str, whose: str, merged: str | None
) -> Checks:
    """Those of a policy, and the reference's also by the policy with its adapter off."""
    step = _Step(vectors, key)
    variants = {"merged" if merged else "adapter": ""}
    if whose == "ref":
        variants = {"reference": "", "adapter": "adapter_off"}
    for variant, part in variants.items():
        model, mask = step.policy(variant), step.arrays["completion_mask"].bool()
        with torch.no_grad(), adapter_disabled(model) if part else nullcontext():
            own = step.scores(model)[step.rollout.sample_completion.flatten()]
        yield Check(own[mask[:, : own.shape[1]]], expected[mask], LOG_PROB, part)


def _loss(vectors: Vectors, expected: float, key: str, merged: str | None, kind: str) -> Checks:
    step = _Step(vectors, key)
    result = step.loss(step.policy("merged" if merged else "adapter"), kind)
    yield Check(result.loss, expected, LOG_PROB)
    yield Check(result.kl, step.entry["kl_metric"] if step.entry["beta"] else result.kl, KL)


def _gradients(vectors: Vectors, file: str, key: str, variant: str, kind: str) -> Checks:
    step, arrays = _Step(vectors, key), vectors.file(file)
    model = step.policy("adapter" if variant == "lora" else "merged")
    step.loss(model, kind).loss.backward()
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    yield Check(own, {adapter_name(name): arrays[name] for name in arrays}, GRADIENT)


READERS = {
    r"grpo/(synthetic.*)\.npz": {"advantages_(noscale_)?(.+)": _scaled},
    r"grpo/expected\.json": {
        "(synthetic.*)/.+": _synthetic,
        "advantages.*": _advantages,
        "(e2e.*)": _step,
        "(e2e.*)/loss(_merged)?_(.+)": _loss,
        "(e2e.*)/(?:loss)()/(.+)": _loss,
    },
    r"grpo/(e2e.*)\.npz": {"(ref|policy)_per_token_logps(_merged)?": _log_probs},
    r"grpo/(e2e.*)_(lora|merged_fullparam)_grads_(.+)\.npz": {"": _gradients},
}
