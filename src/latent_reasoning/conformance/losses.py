"""Cases of `losses/`: distillation losses, whole losses with gradients, AdamW, schedule, LoRA."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latent_reasoning.config import Distillation, LatentSftModel, Runtime, Training
from latent_reasoning.conformance.cases import Case, Skip, check_equal, check_known
from latent_reasoning.model.folder import load
from latent_reasoning.model.lora import load_adapter, merge_lora
from latent_reasoning.model.published import our_name
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.runtime.parallel import ALONE
from latent_reasoning.sft.distillation import distillation_losses, summarise_states
from latent_reasoning.sft.latent_sft import (
    STUDENT_LOSS,
    TEACHER_LOSS,
    LatentBatch,
    LatentSftTask,
    latent_sft_losses,
)
from latent_reasoning.training.batches import BatchPlan
from latent_reasoning.training.checkpoints import CheckpointStore, parameter_names
from latent_reasoning.training.loop import Trainer
from latent_reasoning.training.metrics import read_metrics
from latent_reasoning.training.optimiser import decay_groups, learning_rate
from latent_reasoning.training.text import cross_entropy

FIXED_RELATIVE = 1e-5
COMPONENT_ABSOLUTE = 2e-4
GRADIENT_RELATIVE = 1e-3
# Relative to the step's total loss and to each parameter's norm. Three AdamW steps amplify
# rounding: an element whose gradient is near zero moves by the learning rate in whichever direction
# rounding points, so that one part in ten million in the weights may move the third loss by 1 %.
STEP_LOSS_RELATIVE = 1e-3
PARAMETER_RELATIVE = 5e-4
PERTURBATION = 1e-7
PERTURBED_RUNS = 3
MERGED_ABSOLUTE = 1e-5
RATE_RELATIVE = 1e-9

OUR_COMPONENTS = {
    "teacher_ce_loss": TEACHER_LOSS,
    "student_ce_loss": STUDENT_LOSS,
    "codi_loss": "codi_loss",
    "mean_reasoning_loss": "meaned_loss",
}
TOTAL = "total_loss"
DISTILLATION_KEYS = {"codi_weight", "meaned_weight", "block_range", "distance", "normalise"}
SCHEDULE_KEY = re.compile(r"(cosine|linear|constant)_warmup(\d+)_(\d+)_lr_used_at_step_index.*")
INFORMATION = {"notes", "checks", "note"}


def cases(folder: Path) -> Iterator[Case]:
    """Every case of the folder, named `losses/expected.json/kind/..`."""
    expected_file = folder / "expected.json"
    content = (
        json.loads(expected_file.read_text(encoding="utf-8")) if expected_file.exists() else {}
    )
    kinds: dict[str, Callable[[Path, Any], Iterator[tuple[str, Callable[[], None]]]]] = {
        "fixed_states": _fixed_states,
        "total_loss": _each(_total_loss),
        "optimizer_trajectory": _optimizer_trajectory,
        "weight_decay_groups": _each(_decay_groups),
        "lora": _each(_lora),
    }
    for kind, entries in content.items():
        name = f"losses/expected.json/{kind}"
        if kind in INFORMATION:
            continue
        if kind in kinds:
            for key, run in kinds[kind](folder, entries):
                yield Case(f"{name}/{key}", run)
        elif match := SCHEDULE_KEY.fullmatch(kind):
            for rate, values in entries.items():
                yield Case(f"{name}/{rate}", partial(_schedule, match, float(rate), values))
        else:
            yield Case(name, partial(_fail, "kind of case not understood"))
    for path in _unread_files(folder, content):
        yield Case(f"losses/{path.name}", partial(_fail, "no case of expected.json reads it"))


def _each(check: Callable[[Path, str, Any], None]):
    def pairs(folder: Path, entries: Mapping[str, Any]) -> Iterator[tuple[str, Callable]]:
        for key, entry in entries.items():
            yield key, partial(check, folder, key, entry)

    return pairs


def _fail(reason: str) -> None:
    raise AssertionError(reason)


def _unread_files(folder: Path, content: Mapping[str, Any]) -> list[Path]:
    """Files and folders that `expected.json` mentions nowhere."""
    text = json.dumps(content)
    read = {"expected.json"}
    read |= {"fixed_states.npz"} if "fixed_states" in content else set()
    trajectory = "optimizer_trajectory" in content
    read |= {path.name for path in folder.glob("params_after_*.npz")} if trajectory else set()
    # Gradients of an adapter stand beside it, named like it.
    read |= {f"lora_grads_{name}.npz" for name in content.get("lora", {})}
    return [p for p in sorted(folder.iterdir()) if p.name not in read and f'"{p.name}"' not in text]


# ---------------------------------------------------------------------------------- fixed states


def _fixed_states(folder: Path, entries: Mapping[str, Any]) -> Iterator[tuple[str, Callable]]:
    for key, entry in entries.items():
        yield key, partial(_fixed_state, folder, key, entry)
    arrays = _arrays(folder / "fixed_states.npz")
    known = {_gradient_key(key) for key in entries} | {
        *("t_hs", "s_hs", "reasoning_map", "latent_continue_map"),
        *("target_token_map", "latent_target_token_map"),
    }
    for name in sorted(set(arrays) - known):
        yield f"fixed_states.npz/{name}", partial(_fail, "array not understood")


def _gradient_key(key: str) -> str:
    return "grad_s_hs_" + key.replace("/", "_")


def _fixed_state(folder: Path, key: str, entry: Mapping[str, Any]) -> None:
    check_known(
        entry, {"loss_components", "sum", "grad_norm_per_hidden_state", "settings"}, "entry"
    )
    settings = _distillation(entry["settings"])
    arrays = _arrays(folder / "fixed_states.npz")
    student_states = arrays["s_hs"].requires_grad_()
    summaries = [
        _summary(arrays["t_hs"], arrays["target_token_map"], arrays["reasoning_map"], settings),
        _summary(
            student_states,
            arrays["latent_target_token_map"],
            arrays["latent_continue_map"],
            settings,
        ),
    ]
    losses = distillation_losses(*summaries, settings)
    total = sum(losses.values())
    _check_components(losses | {TOTAL: total}, entry["loss_components"], relative=FIXED_RELATIVE)
    _check_near(total.item(), entry["sum"], "the sum", relative=FIXED_RELATIVE)
    total.backward()
    norms = student_states.grad.flatten(1).norm(dim=1).tolist()
    for layer, (own, expected) in enumerate(
        zip(norms, entry["grad_norm_per_hidden_state"], strict=True)
    ):
        _check_near(own, expected, f"gradient norm of state {layer}", relative=FIXED_RELATIVE)
    if _gradient_key(key) in arrays:
        expected = arrays[_gradient_key(key)]
        _check_distance(student_states.grad, expected, "gradient of states", FIXED_RELATIVE)


def _summary(states: Tensor, target_map: Tensor, span_map: Tensor, settings: Distillation):
    selected = target_map | span_map
    chosen = [layer[selected] for layer in states]
    return summarise_states(chosen, selected, target_map, span_map, settings.block_range)


# ------------------------------------------------------------------------------------ whole loss


def _total_loss(folder: Path, key: str, entry: Mapping[str, Any]) -> None:
    check_known(
        entry,
        {
            *("checkpoint", "loss_components", "total_grad_norm", "grad_norms"),
            *("params_with_no_grad", "batch", "grads", "settings"),
        },
        "entry",
    )
    model = _model(folder, entry["checkpoint"])
    distillation = _configured(model, entry["settings"])
    losses = _losses(model, _arrays(folder / entry["batch"]), distillation)
    _check_components(losses, entry["loss_components"], absolute=COMPONENT_ABSOLUTE)
    losses[TOTAL].backward()
    gradients = _gradients(model)
    _check_gradients(gradients, _arrays(folder / entry["grads"]), our_name)
    for name in entry["params_with_no_grad"]:
        check_equal(gradients[our_name(name)].norm().item(), 0.0, f"gradient norm of {name}")
    for name, expected in entry["grad_norms"].items():
        own = gradients[our_name(name)].norm().item()
        _check_near(own, expected, f"gradient norm of {name}", relative=GRADIENT_RELATIVE)
    _check_total_norm(gradients, entry)


def _losses(
    model: LatentReasoner, batch: dict[str, Tensor], distillation: Distillation
) -> dict[str, Tensor]:
    """The loss parts of a recorded batch and their total; the teacher's alone on plain text."""
    if "latent_input_ids" in batch:
        losses = latent_sft_losses(model, batch, distillation)
    else:
        output = model(batch["input_ids"], batch["attention_mask"])
        losses = {TEACHER_LOSS: cross_entropy(model, output, batch["labels"])}
    return losses | {TOTAL: sum(losses.values())}


# ------------------------------------------------------------------------------------- optimiser


def _optimizer_trajectory(
    folder: Path, entry: Mapping[str, Any]
) -> Iterator[tuple[str, Callable[[], None]]]:
    for size, expected in entry["by_micro_batch_size"].items():
        yield f"by_micro_batch_size/{size}", partial(_adamw, folder, entry, int(size), expected)


class _RecordedTask(LatentSftTask):
    """The latent SFT task on one recorded batch, the same at each step, in its own order."""

    def __init__(self, model: LatentReasoner, batches: list[LatentBatch], entry: LatentSftModel):
        self.name, self.model, self.entry = "recorded", model, entry
        self.batches = batches
        self.teacher_states = None
        self.processes = ALONE
        rows = [1] * entry.training.batch_size
        self.plan = BatchPlan(rows, entry.training, Runtime(), seed=0, name=self.name)

    def micro_batches(self, step: int) -> list[LatentBatch]:
        return self.batches

    def validate(self) -> dict[str, float]:
        return {}


def _adamw(folder: Path, entry: Mapping[str, Any], size: int, expected: Mapping[str, Any]) -> None:
    check_known(
        entry,
        {
            *("checkpoint", "batch", "lr", "weight_decay", "max_grad_norm", "betas", "eps", "note"),
            *("by_micro_batch_size", "settings"),
        },
        "entry",
    )
    check_known(expected, {"loss_components_steps_1_to_3", "param_norms_after_3_steps"}, "entry")
    recorded = _recorded_trajectory(expected)
    stored = _stored_parameters(folder, entry, size, len(expected["loss_components_steps_1_to_3"]))
    run = partial(_trajectory, folder, entry, size, expected, stored)
    own = run()
    check_equal(sorted(own), sorted({*recorded, *(f"distance of {n}" for n in stored)}), "values")
    far = {name for name, value in own.items() if _excess(name, value, recorded, stored) > 0}
    # A value beyond its tolerance is compared with what rounding alone does to it here.
    perturbed = [run(perturbation=seed) for seed in range(PERTURBED_RUNS)] if far else []
    for name in sorted(far):
        rounding = max(abs(other[name] - own[name]) for other in perturbed)
        if _excess(name, own[name], recorded, stored) > 2 * rounding:
            raise AssertionError(
                f"{name} is {own[name]!r}, expected {recorded.get(name, 0.0)!r} (rounding moves "
                f"it by {rounding:.2g})"
            )


def _recorded_trajectory(expected: Mapping[str, Any]) -> dict[str, float]:
    """Every recorded number of a trajectory by name."""
    values = {}
    for step, components in enumerate(expected["loss_components_steps_1_to_3"], start=1):
        check_known(components, {*OUR_COMPONENTS, TOTAL}, "loss_components")
        values |= {f"step {step}, {name}": value for name, value in components.items()}
    norms = expected["param_norms_after_3_steps"]
    return values | {f"norm of {our_name(name)}": norm for name, norm in norms.items()}


def _stored_parameters(
    folder: Path, entry: Mapping[str, Any], size: int, steps: int
) -> dict[str, Tensor]:
    """Parameters after the last step, recorded for the whole batch at once only."""
    file = folder / f"params_after_{steps}_adamw_steps.npz"
    if size != len(_arrays(folder / entry["batch"])["input_ids"]) or not file.exists():
        return {}
    return {our_name(name): tensor for name, tensor in _arrays(file).items()}


def _excess(
    name: str, value: float, recorded: Mapping[str, float], stored: Mapping[str, Tensor]
) -> float:
    """By how much a value of a trajectory is beyond its tolerance; negative where it is not."""
    if name.startswith("distance of "):
        tensor = stored[name.removeprefix("distance of ")]
        return value - PARAMETER_RELATIVE * tensor.norm().item()
    difference = abs(value - recorded[name])
    if name.startswith("norm of "):
        return difference - PARAMETER_RELATIVE * abs(recorded[name])
    step, _, _ = name.partition(",")
    if step == "step 1":
        return difference - COMPONENT_ABSOLUTE
    return difference - STEP_LOSS_RELATIVE * recorded[f"{step}, {TOTAL}"]


def _trajectory(
    folder: Path,
    entry: Mapping[str, Any],
    size: int,
    expected: Mapping[str, Any],
    stored: Mapping[str, Tensor],
    perturbation: int | None = None,
) -> dict[str, float]:
    """The same numbers from the project's training loop.

    `perturbation` seeds a change of the weights by one part in ten million beforehand.
    """
    recorded = expected["loss_components_steps_1_to_3"]
    tensors = _arrays(folder / entry["batch"])
    rows = len(tensors["input_ids"])
    training = Training(
        steps=len(recorded),
        batch_size=rows,
        learning_rate=entry["lr"],
        schedule="constant",
        weight_decay=entry["weight_decay"],
        betas=tuple(entry["betas"]),
        eps=entry["eps"],
        max_grad_norm=entry["max_grad_norm"],
    )
    model = _model(folder, entry["checkpoint"])
    distillation = _configured(model, entry.get("settings") or {"codi_weight": 20})
    if perturbation is not None:
        _perturb(model, perturbation)
    batches = [
        LatentBatch(
            {name: tensor[first : first + size] for name, tensor in tensors.items()},
            list(range(first, min(first + size, rows))),
            scale={},
        )
        for first in range(0, rows, size)
    ]
    task = _RecordedTask(
        model, batches, LatentSftModel(distillation=distillation, training=training)
    )
    with tempfile.TemporaryDirectory() as temporary:
        store = CheckpointStore(Path(temporary) / "checkpoints", "recorded", lambda line: None)
        runtime = Runtime(device="cpu", precision="float32")
        result = Trainer(task, training, runtime, store, seed=0, log_every=1).run()
        steps = read_metrics(result.metrics)
    values = {}
    for own, components in zip(steps, recorded, strict=True):
        for name in components:
            ours = "loss" if name == TOTAL else OUR_COMPONENTS[name]
            values[f"step {own['step']}, {name}"] = own[ours]
    parameters = {name: parameter.detach() for parameter, name in parameter_names(model).items()}
    for name in expected["param_norms_after_3_steps"]:
        values[f"norm of {our_name(name)}"] = parameters[our_name(name)].norm().item()
    for name, tensor in stored.items():
        values[f"distance of {name}"] = (parameters[name] - tensor).norm().item()
    return values


def _perturb(model: LatentReasoner, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + PERTURBATION * torch.randn(parameter.shape, generator=generator))


def _decay_groups(folder: Path, key: str, entry: Mapping[str, Any]) -> None:
    check_known(entry, {"decay", "no_decay", "checkpoint"}, "entry")
    model = _model(folder, entry.get("checkpoint", f"forward/ckpt/{key}"))
    _check_decay(model, entry, our_name)


def _check_decay(
    model: LatentReasoner, entry: Mapping[str, Any], rename: Callable[[str], str]
) -> None:
    decayed, undecayed = decay_groups(model)
    check_equal(sorted(decayed), sorted(map(rename, entry.get("decay", []))), "decayed")
    check_equal(sorted(undecayed), sorted(map(rename, entry.get("no_decay", []))), "not decayed")


def _schedule(match: re.Match[str], peak: float, values: Mapping[str, float]) -> None:
    rate = learning_rate(
        Training(
            schedule=match[1], warmup_steps=int(match[2]), steps=int(match[3]), learning_rate=peak
        )
    )
    for step, expected in values.items():
        _check_near(rate(int(step)), expected, f"rate at {step}", relative=RATE_RELATIVE)


# ------------------------------------------------------------------------------------------ LoRA


def _lora(folder: Path, key: str, entry: Mapping[str, Any]) -> None:
    check_known(
        entry,
        {
            *("base_checkpoint", "adapter", "merged_checkpoint", "batch", "lora_config"),
            *("eval_mode", "loss_components", "merged_loss_components", "trainable"),
            *("trainable_without_grad", "grad_norms", "grads", "settings", "total_grad_norm"),
            *("decay", "no_decay"),
        },
        "entry",
    )
    check_equal(entry.get("eval_mode", True), True, "eval_mode")
    batch = _arrays(folder / entry["batch"])
    model = _model(folder, entry["base_checkpoint"])
    distillation = _configured(model, entry.get("settings") or {"codi_weight": 20})
    load_adapter(model, _present(folder / entry["adapter"]))
    model.eval()
    _check_lora_settings(model, entry["lora_config"])
    losses = _losses(model, batch, distillation)
    _check_components(losses, entry["loss_components"], absolute=COMPONENT_ABSOLUTE)
    losses[TOTAL].backward()
    trained = {name: parameter for parameter, name in parameter_names(model).items()}
    shapes = {name: list(parameter.shape) for name, parameter in trained.items()}
    expected_shapes = {_adapter_name(name): shape for name, shape in entry["trainable"].items()}
    check_equal(shapes, expected_shapes, "trained parameters")
    _check_decay(model, entry, _adapter_name)
    gradients = _gradients(model)
    for name in entry["trainable_without_grad"]:
        check_equal(gradients[_adapter_name(name)].norm().item(), 0.0, f"gradient norm of {name}")
    stored = folder / entry.get("grads", f"lora_grads_{key}.npz")
    _check_gradients(gradients, _arrays(stored), _adapter_name)
    for name, norm in entry["grad_norms"].items():
        own = gradients[_adapter_name(name)].norm().item()
        _check_near(own, norm, f"gradient norm of {name}", relative=GRADIENT_RELATIVE)
    _check_total_norm(gradients, entry)
    merge_lora(model)
    merged = _model(folder, str(Path(folder.name) / entry["merged_checkpoint"]))
    weights, expected_weights = dict(model.named_parameters()), dict(merged.named_parameters())
    check_equal(sorted(weights), sorted(expected_weights), "merged parameters")
    for name, tensor in weights.items():
        difference = (tensor - expected_weights[name]).abs().max().item()
        _check_near(difference, 0.0, f"difference of merged {name}", absolute=MERGED_ABSOLUTE)
    for candidate in (model, merged):
        losses = _losses(candidate, batch, distillation)
        _check_components(losses, entry["merged_loss_components"], absolute=COMPONENT_ABSOLUTE)


def _check_lora_settings(model: LatentReasoner, settings: Mapping[str, Any]) -> None:
    lora = model.adapter.lora
    own = {
        "target_modules": sorted(lora.target_modules),
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
    }
    check_known(settings, {*own, "modules_to_save"}, "lora_config")
    expected = {**settings, "target_modules": sorted(settings["target_modules"])}
    expected.pop("modules_to_save", None)
    check_equal(own, expected, "the adapter's settings")


def _adapter_name(name: str) -> str:
    """Our name of a parameter of the public code's peft model."""
    plain = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
    return our_name(plain)


# ---------------------------------------------------------------------------------------- shared


def _gradients(model: LatentReasoner) -> dict[str, Tensor]:
    """Gradient of each trained parameter; zero where the loss does not reach it."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for parameter, name in parameter_names(model).items()
    }


def _check_total_norm(gradients: Mapping[str, Tensor], entry: Mapping[str, Any]) -> None:
    if "total_grad_norm" in entry:
        total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
        _check_near(total, entry["total_grad_norm"], "gradient norm", relative=GRADIENT_RELATIVE)


def _configured(model: LatentReasoner, settings: Mapping[str, Any]) -> Distillation:
    """Apply the settings of the stop head to `model`; returns those of the distillation."""
    settings = dict(settings)
    own = model.settings
    model.settings = dataclasses.replace(
        own,
        detach_stop_head=bool(settings.pop("detach_stop_head", own.detach_stop_head)),
        stop_head_temperature=settings.pop("binary_head_temp", own.stop_head_temperature),
    )
    return _distillation(settings)


def _distillation(settings: Mapping[str, Any]) -> Distillation:
    check_known(settings, DISTILLATION_KEYS, "settings")
    given = {name: value for name, value in settings.items() if value is not None}
    if "normalise" in settings:
        given["normalise"] = settings["normalise"] or "none"
    for weight in ("codi_weight", "meaned_weight"):
        # `true` stands for a weight of one.
        given[weight] = float(given.get(weight, 0))
    return Distillation(**given)


def _present(path: Path) -> Path:
    if not path.exists():
        raise Skip(f"{path.name} is not in this folder")
    return path


def _model(folder: Path, checkpoint: str) -> LatentReasoner:
    """A checkpoint by its path from the folder that holds `losses/`, every parameter trained."""
    return load(_present(folder.parent / checkpoint), device="cpu").requires_grad_(True)


def _arrays(path: Path) -> dict[str, Tensor]:
    with np.load(_present(path), allow_pickle=False) as stored:
        return {name: torch.from_numpy(stored[name].copy()) for name in stored.files}


def _check_components(
    losses: Mapping[str, Tensor],
    expected: Mapping[str, float],
    *,
    relative: float = 0.0,
    absolute: float = 0.0,
) -> None:
    """Each recorded part equals ours, and we have no part besides."""
    check_known(expected, {*OUR_COMPONENTS, TOTAL}, "loss_components")
    names = {OUR_COMPONENTS.get(name, name) for name in expected} | {TOTAL}
    check_equal(sorted({*losses}), sorted(names), "loss components")
    for name, value in expected.items():
        own = losses[OUR_COMPONENTS.get(name, name)].item()
        _check_near(own, value, name, relative=relative, absolute=absolute)


def _check_near(
    own: float, expected: float, what: str, *, relative: float = 0.0, absolute: float = 0.0
) -> None:
    if not abs(own - expected) <= relative * abs(expected) + absolute:
        raise AssertionError(f"{what} is {own!r}, expected {expected!r}")


def _check_gradients(
    own: Mapping[str, Tensor], expected: Mapping[str, Tensor], rename: Callable[[str], str]
) -> None:
    """All gradients, each by the norm of its difference (they reach 600: never elementwise)."""
    renamed = {rename(name): gradient for name, gradient in expected.items()}
    check_equal(sorted(own), sorted(renamed), "parameters with a gradient")
    for name, gradient in own.items():
        _check_distance(gradient, renamed[name], f"gradient of {name}", GRADIENT_RELATIVE)


def _check_distance(own: Tensor, expected: Tensor, what: str, relative: float) -> None:
    """The norm of the difference, relative to the expected norm."""
    distance, norm = (own - expected).norm().item(), expected.norm().item()
    if not distance <= relative * norm:
        raise AssertionError(f"{what} differs by {distance:.3g} at a norm of {norm:.3g}")
