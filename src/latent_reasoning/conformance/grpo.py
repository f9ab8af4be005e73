"""Cases of `grpo/`: advantages and losses on synthetic log-probabilities, and whole recorded steps.

A recorded step (`e2e_*`) goes through the project's own path: verdicts and rewards of the decoded
completions, advantages, completions grouped as a rollout, scored in one pass on the shared
trajectory (those that think again by a forward of their own), loss and gradients.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latent_reasoning.config import Reward
from latent_reasoning.conformance.cases import Case, Skip, check_equal, check_known
from latent_reasoning.model.folder import load
from latent_reasoning.model.lora import PEFT_PREFIX, adapter_disabled, load_adapter
from latent_reasoning.model.published import our_name
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.rl.grpo import PolicyLoss, advantages, policy_loss
from latent_reasoning.rl.reward import Outcome, Outcomes, judge_sample, rewards
from latent_reasoning.rl.rollouts import Rollout, SamplingSettings, collect
from latent_reasoning.rl.scoring import loss_mask, score_completions

REWARD_TOLERANCE = 1e-6
LOG_PROB_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-4
ABSOLUTE, RELATIVE = 1e-6, 1e-5
"""Synthetic losses and advantages."""

INFORMATION = {"trl_default_loss_type", "trl_defaults", "notes", "checks"}
STEP_INFORMATION = {
    "decoded_completions",
    "old_per_token_logps_is_None",
    "model_training_flag_during_generate",
    "generation_config_passed",
    "lora_grad_norm_bnpo",
    "fullparam_grad_norm_bnpo",
    "grad_norms_lora",
    "grad_norms_full",
    "metrics",
}
"""Keys of a step that are inputs of other comparisons, repeat them, or describe the run."""

GRADIENT_FILES = {"_lora_grads_": "adapter", "_merged_fullparam_grads_": "merged"}


def cases(folder: Path) -> Iterator[Case]:
    """Every case of the folder, named `grpo/expected.json/kind/..` or `grpo/file/..`."""
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    read = {"expected.json"}
    for key, content in expected.items():
        name = f"grpo/expected.json/{key}"
        if key in INFORMATION:
            continue
        if key.startswith("synthetic"):
            read.add(f"{key}.npz")
            yield from _synthetic_cases(folder / f"{key}.npz", name, content)
        elif key.startswith("advantages"):
            yield Case(name, partial(_listed_advantages, content))
        elif key.startswith("e2e"):
            step = RecordedStep(folder, key, content)
            read |= step.files
            yield from _step_cases(step, name)
        else:
            yield Case(name, _not_understood)
    for path in sorted(folder.iterdir()):
        if path.name not in read:
            yield Case(f"grpo/{path.name}", _not_understood)


def _not_understood() -> None:
    raise AssertionError("not understood: no kind of case has this name")


def _check_close(
    actual: Any, expected: Any, what: str, absolute: float, relative: float = 0.0
) -> None:
    actual, expected = (torch.as_tensor(value).double() for value in (actual, expected))
    check_equal(tuple(actual.shape), tuple(expected.shape), f"shape of {what}")
    excess = (actual - expected).abs() - relative * expected.abs()
    # Written so that a NaN fails.
    if not bool((excess <= absolute).all()):
        raise AssertionError(f"{what} is off by {(actual - expected).abs().max().item():.3g}")


def _check_gradient(actual: Tensor | None, expected: Tensor, what: str, tolerance: float) -> None:
    if actual is None:
        raise AssertionError(f"{what} has no gradient")
    check_equal(tuple(actual.shape), tuple(expected.shape), f"shape of {what}")
    error = (actual.double() - expected.double()).norm().item()
    norm = expected.double().norm().item()
    if not error <= tolerance * max(norm, ABSOLUTE):
        raise AssertionError(f"{what} is off by {error:.3g}, with a norm of {norm:.3g}")


# ---------------------------------------------------------------------------------- synthetic


def _synthetic_cases(path: Path, name: str, content: dict[str, Any]) -> Iterator[Case]:
    with np.load(path) as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    used = {"logps", "ref_logps", "old_logps", "completion_mask"}
    group_sizes = {entry["rewards"]: entry["num_generations"] for entry in content.values()}
    for key, array in arrays.items():
        if key.startswith("advantages_"):
            source = "rewards_" + key.removeprefix("advantages_").removeprefix("noscale_")
            used |= {key, source}
            scale = "noscale_" not in key
            group_size = group_sizes.get(source.removeprefix("rewards_"))
            values = arrays.get(source)
            run = partial(_synthetic_advantages, values, group_size, scale, array)
            yield Case(f"grpo/{path.name}/{key}", run)
    for key, entry in content.items():
        gradient = f"grad_{entry.get('loss_type')}_old_{entry.get('old_logps')}"
        used.add(gradient)
        has_gradient = entry.get("rewards") == "mixed" and entry.get("beta") == 0.001
        expected = arrays.get(gradient) if has_gradient else None
        yield Case(f"{name}/{key}", partial(_synthetic_loss, arrays, entry, expected))
    for key in sorted(set(arrays) - used):
        yield Case(f"grpo/{path.name}/{key}", _not_understood)


def _synthetic_advantages(
    values: Tensor | None, group_size: int | None, scale: bool, expected: Tensor
) -> None:
    if values is None or group_size is None:
        raise AssertionError("no rewards, or no number of generations, belong to these advantages")
    ours = advantages(values, group_size, scale=scale)
    _check_close(ours, expected, "advantages", ABSOLUTE, RELATIVE)


def _listed_advantages(entry: dict[str, Any]) -> None:
    check_known(entry, {"rewards", "advantages", "std"}, "case")
    values = torch.tensor(entry["rewards"])
    _check_close(
        advantages(values, len(values)), entry["advantages"], "advantages", ABSOLUTE, RELATIVE
    )


def _synthetic_loss(
    arrays: dict[str, Tensor], entry: dict[str, Any], gradient: Tensor | None
) -> None:
    check_known(
        entry,
        {"rewards", "loss_type", "beta", "old_logps", "epsilon", "max_completion_length"}
        | {"num_generations", "loss", "grad_norm_wrt_logps", "metrics"},
        "case",
    )
    if entry["old_logps"] not in ("none", "given"):
        raise AssertionError(f"old_logps {entry['old_logps']!r} not understood")
    log_probs = arrays["logps"].clone().requires_grad_()
    result = policy_loss(
        log_probs,
        advantages(arrays[f"rewards_{entry['rewards']}"], entry["num_generations"]),
        arrays["completion_mask"],
        kind=entry["loss_type"],
        epsilon=entry["epsilon"],
        kl_weight=entry["beta"],
        max_completion_length=entry["max_completion_length"],
        old_log_probs=arrays["old_logps"] if entry["old_logps"] == "given" else None,
        reference=arrays["ref_logps"] if entry["beta"] else None,
    )
    result.loss.backward()
    _check_close(result.loss.item(), entry["loss"], "loss", ABSOLUTE, RELATIVE)
    norm = log_probs.grad.norm().item()
    _check_close(norm, entry["grad_norm_wrt_logps"], "gradient norm", ABSOLUTE, 1e-4)
    if gradient is not None:
        _check_gradient(log_probs.grad, gradient, "gradient", GRADIENT_TOLERANCE)
    _check_metrics(result, entry["metrics"])


def _check_metrics(result: PolicyLoss, expected: dict[str, float]) -> None:
    low, high = result.clip_low, result.clip_high
    ours = {
        "kl": result.kl,
        "clip_ratio/low_mean": low,
        "clip_ratio/low_min": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/high_max": high,
        "clip_ratio/region_mean": low + high,
    }
    check_known(expected, set(ours), "metrics")
    for key, value in expected.items():
        _check_close(ours[key], value, key, ABSOLUTE, RELATIVE)


# ------------------------------------------------------------------------------- recorded steps


@dataclass
class RecordedStep:
    """One optimiser step of the public code: N samples, in blocks of G a prompt."""

    folder: Path
    key: str
    entry: dict[str, Any]

    @property
    def files(self) -> set[str]:
        """Names in the folder that belong to this step."""
        names = {f"{self.key}.npz", *self.gradient_files}
        return names | {str(self.entry[k]) for k in ("policy_checkpoint_merged", "adapter")}

    @property
    def gradient_files(self) -> dict[str, tuple[str, str]]:
        """File of recorded gradients -> variant of the policy and kind of the loss."""
        found = {}
        for path in sorted(self.folder.glob(f"{self.key}_*.npz")):
            for infix, variant in GRADIENT_FILES.items():
                start, _, kind = path.stem.partition(infix)
                if start == self.key and kind:
                    found[path.name] = (variant, kind)
        return found

    @cached_property
    def arrays(self) -> dict[str, Tensor]:
        with np.load(self.folder / f"{self.key}.npz") as file:
            return {key: torch.from_numpy(file[key]) for key in file.files}

    @property
    def group_size(self) -> int:
        return self.entry["num_generations"]

    @cached_property
    def rollout(self) -> Rollout:
        """The recorded samples, grouped as our own sampling groups them."""
        prompts = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(self.arrays["prompt_ids"], self.arrays["prompt_mask"], strict=True)
        ]
        groups = prompts[:: self.group_size]
        check_equal(prompts, [p for p in groups for _ in range(self.group_size)], "prompts")
        shape = (len(groups), self.group_size, -1)
        lengths = self.arrays["completion_mask"].sum(1)
        return collect(
            groups,
            self.arrays["completion_ids"].view(shape),
            lengths.view(len(groups), self.group_size),
        )

    @property
    def sampling(self) -> SamplingSettings:
        return SamplingSettings(
            temperature=self.entry["temperature"],
            max_new_tokens=self.entry["max_completion_length"],
            # Only sampling reads it; these samples are recorded.
            eos_id=-1,
        )

    @cached_property
    def verdicts(self) -> list[Outcome]:
        texts, labels = self.entry["decoded_completions"], self.entry["labels"]
        return [
            judge_sample(
                self.entry["prompts"][i // self.group_size], text, labels[i // self.group_size]
            )
            for i, text in enumerate(texts)
        ]

    def policy(self, variant: str) -> LatentReasoner:
        """`merged`: all weights trained; `adapter`: the LoRA policy; `reference`: the start."""
        if variant == "merged":
            return self._load(self.folder / self.entry["policy_checkpoint_merged"])
        model = self._load(self.folder.parent / self.entry["base_checkpoint(reference policy)"])
        if variant == "adapter":
            load_adapter(model, self.folder / self.entry["adapter"])
        return model

    def _load(self, folder: Path) -> LatentReasoner:
        if not folder.is_dir():
            raise Skip(f"the checkpoint {folder.name} is not there")
        model = load(folder, device="cpu")
        # The temperature is a setting of the run, whatever the checkpoint was saved with.
        model.settings = dataclasses.replace(
            model.settings, stop_head_temperature=self.entry["binary_head_temp"]
        )
        return model

    def scores(self, model: LatentReasoner) -> Tensor:
        """Log-probabilities of the distinct completions, (U, T)."""
        return score_completions(
            model, self.rollout.prompts, self.rollout.completions, self.sampling
        )

    def loss(self, model: LatentReasoner, kind: str) -> PolicyLoss:
        """The loss of `model` on these samples, with its graph."""
        completions = self.rollout.completions
        sample_of = self.rollout.sample_completion.flatten().tolist()
        first = [sample_of.index(index) for index in range(len(completions))]
        return policy_loss(
            self.scores(model),
            self.arrays["advantages"][first],
            loss_mask(completions, model.settings),
            kind=kind,
            epsilon=self.entry["epsilon"],
            kl_weight=self.entry["beta"],
            max_completion_length=self.entry["max_completion_length"],
            weights=self.rollout.weights,
            reference=self.reference_scores if self.entry["beta"] else None,
        )

    @cached_property
    def reference_scores(self) -> Tensor:
        with torch.no_grad():
            return self.scores(self.policy("reference"))


def _step_cases(step: RecordedStep, name: str) -> Iterator[Case]:
    yield Case(f"{name}/settings", partial(_step_settings, step))
    yield Case(f"{name}/verdicts", partial(_step_verdicts, step))
    yield Case(f"{name}/rewards", partial(_step_rewards, step))
    yield Case(f"{name}/advantages", partial(_step_advantages, step))
    for array, variant, adapter_on in (
        ("ref_per_token_logps", "reference", True),
        ("ref_per_token_logps", "adapter", False),
        ("policy_per_token_logps", "adapter", True),
        ("policy_per_token_logps_merged", "merged", True),
    ):
        run = partial(_step_log_probs, step, array, variant, adapter_on)
        suffix = "" if adapter_on else "/adapter_off"
        yield Case(f"grpo/{step.key}.npz/{array}{suffix}", run)
    for key, value in step.entry.items():
        if key == "loss":
            for kind, loss in value.items():
                yield Case(f"{name}/loss/{kind}", partial(_step_loss, step, "adapter", kind, loss))
        elif key.startswith("loss_merged_"):
            kind = key.removeprefix("loss_merged_")
            yield Case(f"{name}/{key}", partial(_step_loss, step, "merged", kind, value))
    for file, (variant, kind) in step.gradient_files.items():
        yield Case(f"grpo/{file}", partial(_step_gradients, step, file, variant, kind))


def _step_settings(step: RecordedStep) -> None:
    """Every key of the step is either compared, used or known to be information."""
    used = {"base_checkpoint(reference policy)", "policy_checkpoint_merged", "adapter", "prompts"}
    used |= {"binary_head_temp", "beta", "epsilon", "num_generations", "max_completion_length"}
    used |= {"temperature", "labels", "rewards_per_func", "reward_weights", "advantages"}
    used |= {"loss", "kl_metric"} | {k for k in step.entry if k.startswith("loss_merged_")}
    check_known(step.entry, used | STEP_INFORMATION, step.key)
    if not step.entry["old_per_token_logps_is_None"]:
        raise AssertionError("a step with old log-probabilities is not understood")


def _step_verdicts(step: RecordedStep) -> None:
    recorded, size = step.entry["rewards_per_func"], step.group_size
    right = [v.correct for v in step.verdicts]
    groups = [right[i : i + size] for i in range(0, len(right), size)]
    all_right, some_right = (sum(map(test, groups)) / len(groups) for test in (all, any))
    each = len(right)
    ours = {
        "SimpleFormatRewarder": [v.well_formatted for v in step.verdicts],
        "SimpleAccuracyRewarder": right,
        "SimpleLatentLengthRewarder": [v.length for v in step.verdicts],
        "AllGensCorrectProportion": [all_right] * each,
        "SomeGensCorrectProportion": [some_right - all_right] * each,
        "AllGensWrongProportion": [1 - some_right] * each,
    }
    check_known(recorded, {"RelativeLengthRewarder", *ours}, "rewards_per_func")
    for key in set(ours) & set(recorded):
        check_equal([float(value) for value in ours[key]], recorded[key], key)


def _step_rewards(step: RecordedStep) -> None:
    groups = [i // step.group_size for i in range(len(step.verdicts))]
    ours = rewards(groups, Outcomes.of(step.verdicts), Reward())
    recorded = step.entry["rewards_per_func"]["RelativeLengthRewarder"]
    _check_close(ours, recorded, "rewards", REWARD_TOLERANCE)
    others = [
        value
        for name, value in zip(
            step.entry["rewards_per_func"], step.entry["reward_weights"], strict=True
        )
        if name != "RelativeLengthRewarder"
    ]
    if not any(others):
        _check_close(ours, step.arrays["rewards"], "rewards", REWARD_TOLERANCE)


def _step_advantages(step: RecordedStep) -> None:
    ours = advantages(step.arrays["rewards"], step.group_size)
    _check_close(ours, step.arrays["advantages"], "advantages", ABSOLUTE, RELATIVE)
    _check_close(ours, step.entry["advantages"], "advantages", ABSOLUTE, RELATIVE)


def _step_log_probs(step: RecordedStep, array: str, variant: str, adapter_on: bool) -> None:
    model = step.policy(variant)
    with torch.no_grad():
        if adapter_on:
            ours = step.scores(model)
        else:
            with adapter_disabled(model):
                ours = step.scores(model)
    ours = ours[step.rollout.sample_completion.flatten()]
    mask = step.arrays["completion_mask"].bool()
    expected = step.arrays[array][mask]
    _check_close(ours[mask[:, : ours.shape[1]]], expected, array, LOG_PROB_TOLERANCE)


def _step_loss(step: RecordedStep, variant: str, kind: str, expected: float) -> None:
    result = step.loss(step.policy(variant), kind)
    _check_close(result.loss.item(), expected, "loss", LOG_PROB_TOLERANCE)
    if step.entry["beta"]:
        _check_close(result.kl, step.entry["kl_metric"], "KL", 0.0, 1e-3)


def _step_gradients(step: RecordedStep, file: str, variant: str, kind: str) -> None:
    model = step.policy(variant)
    step.loss(model, kind).loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with np.load(step.folder / file) as arrays:
        expected = {_our_name(key): torch.from_numpy(arrays[key]) for key in arrays.files}
    missing = sorted(set(ours) ^ set(expected))
    if missing:
        raise AssertionError(f"gradients on one side only: {', '.join(missing)}")
    for name, gradient in expected.items():
        _check_gradient(ours[name], gradient, name, GRADIENT_TOLERANCE)


def _our_name(recorded: str) -> str:
    """peft's name of a parameter in the public code -> ours."""
    return our_name(recorded.removeprefix(PEFT_PREFIX).replace(".modules_to_save.default", ""))
