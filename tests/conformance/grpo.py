"""Cases of `grpo/`: advantages and losses on synthetic log-probabilities, and whole recorded steps.

A recorded step (`e2e_*`) goes through the project's own path: verdicts and rewards of the decoded
completions, advantages, completions grouped as a rollout, scored in one pass on the shared
trajectory (those that think again by a forward of their own), loss and gradients.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import torch
from torch import Tensor

from latent_reasoning.config import Reward
from latent_reasoning.model.lora import adapter_disabled, load_adapter
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.rl.grpo import PolicyLoss, advantages, policy_loss
from latent_reasoning.rl.reward import Outcomes, answer_is_right, judge_sample, rewards
from latent_reasoning.rl.rollouts import Rollout, SamplingSettings, collect
from latent_reasoning.rl.scoring import loss_mask, score_completions
from tests.conformance.checks import Check, Checks, Tolerance, guarded
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


def _scaled(vectors: Vectors, name: str) -> Checks:
    """The advantages of a file of synthetic rewards, with and without the division by the std."""
    arrays, kind = vectors.file(name), name.removeprefix("grpo/").removesuffix(".npz")
    entries = vectors.file("grpo/expected.json")[kind].values()
    sizes = {entry["rewards"]: entry["num_generations"] for entry in entries}
    for key in [key for key in arrays if key.startswith("advantages_")]:
        source = key.removeprefix("advantages_").removeprefix("noscale_")
        values, scale = arrays[f"rewards_{source}"], "_noscale_" not in key
        own = advantages(values, sizes[source], scale=scale)
        yield Check(f"{name}/{key}", own, arrays[key], CLOSE)


def _advantages(vectors: Vectors, name: str, entry: Record) -> Checks:
    values = torch.tensor(entry["rewards"])
    yield Check(name, advantages(values, len(values)), entry["advantages"], CLOSE)


def _synthetic(vectors: Vectors, name: str, entry: Record, kind: str) -> Checks:
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
    yield Check(name, result.loss, entry["loss"], CLOSE, "loss")
    yield Check(name, log_probs.grad.norm(), entry["grad_norm_wrt_logps"], NORM, "gradient norm")
    gradient = arrays.get(f"grad_{entry['loss_type']}_old_{old}")
    # Recorded for these rewards and this weight of the KL alone.
    if gradient is not None and (entry["rewards"], entry["beta"]) == ("mixed", 0.001):
        yield Check(name, log_probs.grad, gradient, GRADIENT, "gradient")
    low, high = result.clip_low, result.clip_high
    for key, own in (
        ("kl", result.kl),
        ("clip_ratio/low_mean", low),
        ("clip_ratio/low_min", low),
        ("clip_ratio/high_mean", high),
        ("clip_ratio/high_max", high),
        ("clip_ratio/region_mean", low + high),
    ):
        yield Check(name, own, entry["metrics"].get(key, own), CLOSE, key)


# --------------------------------------------------------------------------------- recorded steps


def _step(vectors: Vectors, name: str, entry: Record, key: str) -> Checks:
    """One optimiser step of the public code: N samples, in blocks of G a prompt."""
    step = _RecordedStep(vectors, entry, key)
    yield Check(f"{name}/settings", entry["old_per_token_logps_is_None"], True)
    yield from guarded(f"{name}/verdicts", step.check_verdicts, name)
    own, case = advantages(step.arrays["rewards"], step.size), f"{name}/advantages"
    yield Check(case, own, step.arrays["advantages"], CLOSE)
    yield Check(case, own, entry["advantages"], CLOSE)
    yield from step.check_log_probs("ref_per_token_logps", "reference")
    yield from step.check_log_probs("ref_per_token_logps", "adapter", "/adapter_off")
    yield from step.check_log_probs("policy_per_token_logps", "adapter")
    for kind, loss in entry["loss"].items():
        yield from step.check_loss(f"{name}/loss/{kind}", "adapter", kind, loss)
    yield from step.check_gradients("lora", "adapter")
    yield from step.check_log_probs("policy_per_token_logps_merged", "merged")
    for key in [key for key in entry if key.startswith("loss_merged_")]:
        kind = key.removeprefix("loss_merged_")
        yield from step.check_loss(f"{name}/{key}", "merged", kind, entry[key])
    yield from step.check_gradients("merged_fullparam", "merged")


class _RecordedStep:
    """The samples of a step, and what its policies make of them."""

    def __init__(self, vectors: Vectors, entry: Record, key: str) -> None:
        self.vectors, self.entry, self.file = vectors, entry, f"grpo/{key}"
        self.arrays, self.size = vectors.file(f"{self.file}.npz"), entry["num_generations"]
        self.rollout = self._rollout(self.size)
        self.sampling = SamplingSettings(
            temperature=entry["temperature"],
            max_new_tokens=entry["max_completion_length"],
            # Only sampling reads it; these samples are recorded.
            eos_id=-1,
        )

    def _rollout(self, size: int) -> Rollout:
        """The recorded samples, grouped as our own sampling groups them."""
        ids, mask = self.arrays["prompt_ids"], self.arrays["prompt_mask"].bool()
        prompts = [row[read].tolist() for row, read in zip(ids, mask, strict=True)]
        groups = prompts[::size]
        if prompts != [prompt for prompt in groups for _ in range(size)]:
            raise ValueError("the prompts are not in blocks of num_generations")
        completions = self.arrays["completion_ids"].view(len(groups), size, -1)
        lengths = self.arrays["completion_mask"].sum(1).view(len(groups), size)
        return collect(groups, completions, lengths)

    def check_verdicts(self, name: str) -> Checks:
        """The verdicts on the decoded completions, and their rewards."""
        size, recorded = self.size, self.entry["rewards_per_func"]
        prompts, labels = (
            [value for value in self.entry[key] for _ in range(size)]
            for key in ("prompts", "labels")
        )
        texts = self.entry["decoded_completions"]
        samples = zip(prompts, texts, labels, strict=True)
        verdicts = Outcomes.of([judge_sample(*sample, "public") for sample in samples])
        # Of these shares the last one alone counts a right number in a badly formatted answer.
        right = torch.tensor(
            [answer_is_right(*pair, "public") for pair in zip(texts, labels, strict=True)]
        )
        groups = verdicts.correct.view(-1, size)
        all_right, some_right, some_number_right = (
            share.double().mean().item()
            for share in (groups.all(1), groups.any(1), right.view(-1, size).any(1))
        )
        for key, own in (
            ("SimpleFormatRewarder", verdicts.well_formatted),
            ("SimpleAccuracyRewarder", verdicts.correct),
            ("SimpleLatentLengthRewarder", verdicts.length),
            ("AllGensCorrectProportion", [all_right] * len(prompts)),
            ("SomeGensCorrectProportion", [some_right - all_right] * len(prompts)),
            ("AllGensWrongProportion", [1 - some_number_right] * len(prompts)),
        ):
            yield Check(f"{name}/verdicts", own, recorded.get(key, own), what=key)
        own = rewards([i // size for i in range(len(prompts))], verdicts, Reward())
        yield Check(f"{name}/rewards", own, recorded["RelativeLengthRewarder"], REWARD)
        weights = dict(zip(recorded, self.entry["reward_weights"], strict=True))
        if not any(weight for key, weight in weights.items() if key != "RelativeLengthRewarder"):
            yield Check(f"{name}/rewards", own, self.arrays["rewards"], REWARD)

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
        return score_completions(
            model, self.rollout.prompts, self.rollout.completions, self.sampling
        )

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

    def check_log_probs(self, array: str, variant: str, suffix: str = "") -> Checks:
        """Those recorded in `array`, where it is; with a suffix the adapter is off."""
        if array not in self.arrays:
            return
        model = self.policy(variant)
        with torch.no_grad(), adapter_disabled(model) if suffix else nullcontext():
            own = self.scores(model)[self.rollout.sample_completion.flatten()]
        mask = self.arrays["completion_mask"].bool()
        own, expected = own[mask[:, : own.shape[1]]], self.arrays[array][mask]
        yield Check(f"{self.file}.npz/{array}{suffix}", own, expected, LOG_PROB)

    def check_loss(self, name: str, variant: str, kind: str, expected: float) -> Checks:
        result = self.loss(self.policy(variant), kind)
        yield Check(name, result.loss, expected, LOG_PROB, "loss")
        recorded = self.entry["kl_metric"] if self.entry["beta"] else result.kl
        yield Check(name, result.kl, recorded, KL, "KL")

    def check_gradients(self, infix: str, variant: str) -> Checks:
        """Those of each kind of loss that a file holds."""
        start = f"{self.file}_{infix}_grads_"
        for name in self.vectors.names(f"{start}*.npz"):
            model, recorded = self.policy(variant), self.vectors.file(name)
            self.loss(model, name.removeprefix(start).removesuffix(".npz")).loss.backward()
            own = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
            expected = {adapter_name(key): recorded[key] for key in recorded}
            yield Check(name, own, expected, GRADIENT)


READERS = {
    "grpo/synthetic*.npz": _scaled,
    "grpo/expected.json": {
        "(synthetic.*)/.+": _synthetic,
        "advantages.*": _advantages,
        "(e2e.*)": _step,
    },
}
