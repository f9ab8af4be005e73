"""Cases of `losses/`: distillation losses, whole losses with gradients, AdamW, schedule, LoRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from latent_reasoning.config import Distillation, Training
from latent_reasoning.model.lora import PEFT_PREFIX, load_adapter, merge_lora
from latent_reasoning.model.published import our_name
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.runtime.parallel import ALONE
from latent_reasoning.sft.distillation import (
    Compared,
    StateSummary,
    distillation_losses,
    summarise_states,
)
from latent_reasoning.sft.latent_sft import (
    STUDENT_LOSS,
    TEACHER_LOSS,
    LatentReading,
    latent_sft_losses,
)
from latent_reasoning.training.checkpoints import parameter_names
from latent_reasoning.training.gradients import accumulate_gradients
from latent_reasoning.training.optimiser import build_optimizer, decay_groups, learning_rate
from latent_reasoning.training.task import LossOutput
from latent_reasoning.training.text import Labels, cross_entropy
from tests.conformance.checks import Check, Checks, Tolerance, recorded
from tests.conformance.recording import Record, Vectors

INFORMATION = {"notes", "checks", "note", "modules_to_save"}
FIXED = Tolerance(relative=1e-5)
COMPONENT = Tolerance(absolute=2e-4)
# Gradients reach 600: never elementwise.
GRADIENT, GRADIENT_NORM = Tolerance(relative=1e-3, by_norm=True), Tolerance(relative=1e-3)
RATE = Tolerance(relative=1e-9)
MERGED = Tolerance(absolute=1e-5)
# Relative to the step's total loss and to each parameter's norm. Three AdamW steps amplify
# rounding: an element whose gradient is near zero moves by the learning rate in whichever direction
# rounding points, so that one part in ten million in the weights may move the third loss by 1 %.
STEP_LOSS_RELATIVE, PARAMETER_RELATIVE = 1e-3, 5e-4
PERTURBATION, PERTURBED_RUNS = 1e-7, 3

COMPONENTS = {
    TEACHER_LOSS: "teacher_ce_loss",
    STUDENT_LOSS: "student_ce_loss",
    "codi_loss": "codi_loss",
    "meaned_loss": "mean_reasoning_loss",
}
"""Recorded names of our parts of the loss."""
COMPARED = {
    "codi": ("codi_weight",),
    "mean": ("meaned_weight",),
    "both": ("codi_weight", "meaned_weight"),
}
"""What is compared in a recorded gradient, by a word of its name."""
TOTAL = "total_loss"
DEFAULT_SETTINGS = {"codi_weight": 20}
"""Where an entry has none."""


# ------------------------------------------------------------------------------------ whole losses


def _fixed_state(vectors: Vectors, entry: Record) -> Checks:
    """Distillation losses of recorded hidden states, and norms of the student's gradient."""
    losses, states = _fixed_losses(vectors, _distillation(entry["settings"]))
    total = sum(losses.values())
    total.backward()
    own = {
        "loss_components": {COMPONENTS[part]: loss for part, loss in losses.items()},
        "sum": total,
        "grad_norm_per_hidden_state": states.grad.flatten(1).norm(dim=1),
    }
    yield Check(own, {name: entry[name] for name in own}, FIXED)


def _fixed_gradient(
    vectors: Vectors,
    gradient: Tensor,
    compared: str,
    weight: str,
    block_range: str | None,
    distance: str,
    normalise: str,
) -> Checks:
    """The gradient of the recorded states; the array's name says its settings.

    Both distances are on in an array named `both20`, each with the weight 20.
    """
    weights = {part: 1.0 if weight == "True" else float(weight) for part in COMPARED[compared]}
    blocks = None if block_range is None else [int(block) for block in block_range.split("_")]
    settings = {"block_range": blocks, "distance": distance, "normalise": normalise.lower()}
    losses, states = _fixed_losses(vectors, _distillation(settings | weights))
    sum(losses.values()).backward()
    yield Check(states.grad, gradient, FIXED._replace(by_norm=True))


def _fixed_losses(vectors: Vectors, settings: Distillation) -> tuple[dict[str, Tensor], Tensor]:
    """The losses of the recorded states, and the student's states as their leaf."""
    arrays = vectors.file("losses/fixed_states.npz")
    states = arrays["s_hs"].clone().requires_grad_()
    maps = arrays["target_token_map"], arrays["reasoning_map"]
    teacher = _summary(arrays["t_hs"], *maps, settings)
    maps = arrays["latent_target_token_map"], arrays["latent_continue_map"]
    return distillation_losses(teacher, _summary(states, *maps, settings), settings), states


def _summary(
    states: Tensor, target_map: Tensor, span_map: Tensor, settings: Distillation
) -> StateSummary:
    selected = target_map | span_map
    chosen = [layer[selected] for layer in states]
    return summarise_states(chosen, Compared.of(selected, target_map, span_map), settings)


def _total_loss(vectors: Vectors, entry: Record) -> Checks:
    """One batch: all parts of the loss and all parameters' gradients."""
    model = vectors.model(entry["checkpoint"])
    losses = compute_losses(model, _batch(vectors, entry), _configure(model, entry["settings"]))
    yield from _backward(vectors, model, losses, entry, entry["params_with_no_grad"], our_name)


def _batch(vectors: Vectors, entry: Record) -> dict[str, Tensor]:
    return dict(vectors.file(f"losses/{entry['batch']}"))


def compute_losses(
    model: LatentReasoner, batch: dict[str, Tensor], distillation: Distillation
) -> dict[str, Tensor]:
    """The loss parts of a recorded batch and their total, under their recorded names.

    The teacher's alone on plain text.
    """
    if "latent_input_ids" in batch:
        reading = LatentReading.plan(model, batch, distillation)
        losses = latent_sft_losses(model, reading, distillation)
    else:
        output = model(batch["input_ids"], batch["attention_mask"])
        labels = Labels.of(batch["labels"], output.kinds, model.settings)
        losses = {TEACHER_LOSS: cross_entropy(model, output, labels)}
    own = {COMPONENTS[part]: loss for part, loss in losses.items()}
    return own | {TOTAL: sum(losses.values())}


def _backward(
    vectors: Vectors,
    model: LatentReasoner,
    losses: dict[str, Tensor],
    entry: Record,
    zeros: list[str],
    rename: Callable[[str], str],
    file: str = "",
) -> Checks:
    """The losses, all their gradients and norms; `rename` gives our name of a parameter."""
    yield Check(losses, entry["loss_components"], COMPONENT)
    losses[TOTAL].backward()
    # Zero where the loss does not reach a parameter.
    own = {
        key: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for parameter, key in parameter_names(model).items()
    }
    arrays = vectors.file(f"losses/{entry.get('grads', file)}")
    yield Check(own, {rename(key): gradient for key, gradient in arrays.items()}, GRADIENT)
    norms = dict(entry["grad_norms"]) | dict.fromkeys(zeros, 0.0)
    yield Check({key: own[rename(key)].norm() for key in norms}, norms, GRADIENT_NORM)
    total = torch.stack([gradient.norm() for gradient in own.values()]).norm()
    yield recorded({"total_grad_norm": total}, entry, GRADIENT_NORM)


# -------------------------------------------------------------------------------------- optimiser


def _trajectory(vectors: Vectors, entry: Record, size: str) -> Checks:
    """Some steps of AdamW on one batch, in micro-batches of `size`."""
    run = vectors.file("losses/expected.json")["optimizer_trajectory"]
    steps = entry["loss_components_steps_1_to_3"]
    file, stored = f"losses/params_after_{len(steps)}_adamw_steps.npz", {}
    # Recorded for the whole batch at once only.
    if int(size) == len(_batch(vectors, run)["input_ids"]) and file in vectors.paths:
        stored = dict(vectors.file(file))
    # Every recorded number by name, and how far ours may be off.
    expected: dict[tuple[str, ...], tuple[float, float]] = {}
    for step, components in enumerate(steps, start=1):
        allowed = COMPONENT.absolute if step == 1 else STEP_LOSS_RELATIVE * components[TOTAL]
        expected |= {(f"step {step}", key): (loss, allowed) for key, loss in components.items()}
    for key, norm in entry["param_norms_after_3_steps"].items():
        expected["norm", key] = norm, PARAMETER_RELATIVE * norm
    for key, tensor in stored.items():
        expected["distance", key] = 0.0, PARAMETER_RELATIVE * tensor.norm().item()

    def values(perturbation: int | None = None) -> dict[tuple[str, ...], float]:
        losses, parameters = _train(vectors, run, int(size), len(steps), perturbation)
        for what, key in expected.keys() - losses.keys():
            parameter = parameters[our_name(key)]
            distance = parameter - stored[key] if what == "distance" else parameter
            losses[what, key] = distance.norm().item()
        return losses

    own = values()
    yield Check({*own}, {*expected})
    is_far = any(not abs(own[key] - value) <= far for key, (value, far) in expected.items())
    # A value beyond its tolerance is compared with what rounding alone does to it here.
    others = [values(perturbation=seed) for seed in range(PERTURBED_RUNS)] if is_far else []
    for key, (value, allowed) in expected.items():
        rounding = 2 * max((abs(other[key] - own[key]) for other in others), default=0.0)
        yield Check({key: own[key]}, {key: value}, Tolerance(allowed + rounding))


def _train(
    vectors: Vectors, run: Record, size: int, steps: int, perturbation: int | None
) -> tuple[dict[tuple[str, ...], float], dict[str, Tensor]]:
    """Our gradients and optimiser on the same batches at each step: losses and parameters."""
    model, batch = vectors.model(run["checkpoint"]), _batch(vectors, run)
    distillation = _configure(model, run.get("settings") or DEFAULT_SETTINGS)
    if perturbation is not None:
        generator = torch.Generator().manual_seed(perturbation)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.mul_(1 + PERTURBATION * noise)
    settings = {key: run[key] for key in ("weight_decay", "betas", "eps")}
    training = Training(steps=steps, learning_rate=run["lr"], **settings)
    pieces = zip(*(tensor.split(size) for tensor in batch.values()), strict=True)
    batches = [dict(zip(batch, piece, strict=True)) for piece in pieces]

    def loss(batch: dict[str, Tensor]) -> LossOutput:
        losses = compute_losses(model, batch, distillation)
        return LossOutput(losses[TOTAL], len(batch["input_ids"]), losses)

    task = SimpleNamespace(processes=ALONE, micro_batches=lambda step: batches, loss=loss)
    optimizer, losses = build_optimizer(model, training), {}
    for step in range(steps):
        model.zero_grad()
        values = accumulate_gradients(model.train(), task, step)
        clip_grad_norm_(model.parameters(), run["max_grad_norm"])
        optimizer.step()
        names = values.keys() & {TOTAL, *COMPONENTS.values()}
        losses |= {(f"step {step + 1}", key): values[key] for key in names}
    return losses, {name: value.detach() for value, name in parameter_names(model).items()}


def _decay_groups(vectors: Vectors, entry: Record, key: str) -> Checks:
    model = vectors.model(entry.get("checkpoint", f"forward/ckpt/{key}"))
    yield _compare_groups(entry, model, our_name)


def _compare_groups(entry: Record, model: LatentReasoner, rename: Callable[[str], str]) -> Check:
    expected = [sorted(map(rename, entry.get(key, []))) for key in ("decay", "no_decay")]
    return Check([sorted(own) for own in decay_groups(model)], expected)


def _schedule(_: Vectors, entry: Record, kind: str, warmup: str, steps: str, rate: str) -> Checks:
    numbers = {"warmup_steps": int(warmup), "steps": int(steps), "learning_rate": float(rate)}
    own = learning_rate(Training(schedule=kind, **numbers))
    yield Check({step: own(int(step)) for step in entry}, entry, RATE)


# ------------------------------------------------------------------------------------------- LoRA


def _lora(vectors: Vectors, entry: Record, key: str) -> Checks:
    """An adapter: what it trains, its loss and gradients, and the same merged."""
    model = vectors.model(entry["base_checkpoint"])
    distillation = _configure(model, entry.get("settings") or DEFAULT_SETTINGS)
    load_adapter(model, vectors.folder(f"losses/{entry['adapter']}"))
    model.eval()
    yield Check(True, entry.get("eval_mode", True))
    lora, config = model.adapter.lora, entry["lora_config"]
    own = {"r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    yield Check(own, {name: config[name] for name in own})
    yield Check({*lora.target_modules}, {*config["target_modules"]})
    shapes = {name: list(parameter.shape) for parameter, name in parameter_names(model).items()}
    yield Check(shapes, {adapter_name(name): n for name, n in entry["trainable"].items()})
    yield _compare_groups(entry, model, adapter_name)
    losses = compute_losses(model, _batch(vectors, entry), distillation)
    zeros, file = entry["trainable_without_grad"], f"lora_grads_{key}.npz"
    yield from _backward(vectors, model, losses, entry, zeros, adapter_name, file)
    merge_lora(model)
    merged = vectors.model(f"losses/{entry['merged_checkpoint']}")
    yield Check(dict(model.named_parameters()), dict(merged.named_parameters()), MERGED)
    for candidate in (model, merged):
        own = compute_losses(candidate, _batch(vectors, entry), distillation)
        yield Check(own, entry["merged_loss_components"], COMPONENT)


def adapter_name(name: str) -> str:
    """Our name of a parameter of the public code's peft model."""
    return our_name(name.removeprefix(PEFT_PREFIX).replace(".modules_to_save.default", ""))


# --------------------------------------------------------------------------------------- settings


def _configure(model: LatentReasoner, settings: Mapping[str, Any]) -> Distillation:
    """Apply the settings of the stop head to `model`; returns those of the distillation."""
    own = model.settings
    model.settings = dataclasses.replace(
        own,
        detach_stop_head=bool(settings.get("detach_stop_head", own.detach_stop_head)),
        stop_head_temperature=settings.get("binary_head_temp", own.stop_head_temperature),
    )
    return _distillation(settings)


def _distillation(settings: Mapping[str, Any]) -> Distillation:
    """null is the default; no normalisation is null; a weight of `true` stands for one."""
    names = ("codi_weight", "meaned_weight", "block_range", "distance", "normalise")
    given = {key: settings[key] for key in names if settings.get(key) is not None}
    if "normalise" in settings:
        given["normalise"] = settings["normalise"] or "none"
    for weight in ("codi_weight", "meaned_weight"):
        given[weight] = float(given.get(weight, 0))
    return Distillation(**given)


READERS = {
    r"losses/expected\.json": {
        "fixed_states/.+": _fixed_state,
        "total_loss/.+": _total_loss,
        r"optimizer_trajectory/by_micro_batch_size/(\d+)": _trajectory,
        "weight_decay_groups/(.+)": _decay_groups,
        r"(cosine|linear|constant)_warmup(\d+)_(\d+)_lr_used_at_step_index.*/(.+)": _schedule,
        "lora/(.+)": _lora,
    },
    r"losses/fixed_states\.npz": {
        r"grad_s_hs_(codi|mean|both)(True|[\d.]+)(?:_block_(\d+_\d+))?"
        r"_(smooth_l1|l1|l2)_(layerwise_std|std|none|None)": _fixed_gradient,
    },
}
