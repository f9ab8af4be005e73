"""LoRA around a latent reasoner: attach, switch off, save, load, merge.

The base model's weights are frozen and low-rank adapters are trained instead; the latent modules
(recurrent filter, special tokens' rows) are trained in full beside them (docs/method.md, section
3), but for special rows that `lora.train_special_rows` keeps. A copy of the initial latent modules
is kept, so that with the adapter off the model is exactly the one it started from: the reference
policy of RL.

An adapter's files use peft's format and the published parameter names (`published.py`).
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from peft import LoraConfig, TaskType, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from latent_reasoning.config import ConfigError, Lora
from latent_reasoning.model.bases import experts_in_one_tensor
from latent_reasoning.model.frozen import restore_frozen
from latent_reasoning.model.published import PUBLISHED_BASE, our_name, published_name
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import Adapter
from latent_reasoning.model.settings_file import read_json
from latent_reasoning.model.tensors import CheckpointError, load_tensors, read_tensors

ADAPTER_SETTINGS = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
PEFT_NAME = ".default"
"""peft's name of the only adapter: part of its parameters' names in a module but not in a file."""

LATENT_MODULES = ("recurrent_filter", "special_rows")
UNSUPPORTED = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias")
"""Keys of peft's settings that change the arithmetic: an adapter that sets one is refused."""


def attach_lora(model: LatentReasoner, lora: Lora) -> None:
    """Freeze the base model and put adapters into its linear modules, in place.

    The special tokens' rows become modules of their own. The first factors are random: seed first.
    Raises `ConfigError` where `lora.target_modules` names a module that the base lacks.
    """
    if model.adapter is not None:
        raise ValueError("the model has an adapter already: merge it first")
    _check_targets(model, lora)
    if model.settings is not None:
        model.move_special_rows("modules")
    reference = {name: _frozen_copy(getattr(model, name)) for name in LATENT_MODULES}
    inject_adapter_in_model(_peft_settings(model, lora), model.base)
    if model.special_rows is not None:
        model.special_rows.requires_grad_(lora.train_special_rows)
    model.train(model.training)  # the new dropout modules start in train mode
    model.adapter = Adapter(lora, reference)


def merge_lora(model: LatentReasoner) -> None:
    """Fold adapters and special rows into the weights, in place; the model has no adapter then."""
    if model.adapter is None:
        return
    restore_frozen(model)
    for name, layer in _lora_layers(model):
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.base.get_submodule(parent), child, layer.get_base_layer())
    if model.settings is not None:
        model.move_special_rows("embedding")
    model.adapter = None
    model.requires_grad_(True)


@contextlib.contextmanager
def adapter_disabled(model: LatentReasoner) -> Iterator[None]:
    """The model as it was when the adapter was attached: the reference policy, without dropout."""
    if model.adapter is None:
        raise ValueError("the model has no adapter to switch off")
    trained = {name: getattr(model, name) for name in LATENT_MODULES}
    was_training = model.training
    model.eval()
    for _, layer in _lora_layers(model):
        layer.enable_adapters(False)
    for name, module in model.adapter.reference.items():
        setattr(model, name, module)
    try:
        yield
    finally:
        for name, module in trained.items():
            setattr(model, name, module)
        for _, layer in _lora_layers(model):
            layer.enable_adapters(True)
        model.train(was_training)


def save_adapter(model: LatentReasoner, folder: Path, parent: str | None) -> None:
    """Write the attached adapter into a folder, in peft's format.

    That of a plain language model loads in peft itself: `PeftModel.from_pretrained(base, folder)`.
    """
    if model.adapter is None:
        raise ValueError("the model has no adapter to save")
    folder.mkdir(parents=True, exist_ok=True)
    settings = _peft_settings(model, model.adapter.lora).to_dict()
    settings |= {
        "base_model_name_or_path": parent,
        "inference_mode": True,
        "target_modules": sorted(model.adapter.lora.target_modules),
        "modules_to_save": [name for name in LATENT_MODULES if getattr(model, name)] or None,
    }
    text = json.dumps(settings, indent=2, sort_keys=True, default=str)
    (folder / ADAPTER_SETTINGS).write_text(text + "\n", encoding="utf-8")
    tensors = {
        adapter_file_name(name, model): tensor.detach().contiguous()
        for name, tensor in _adapter_state(model).items()
    }
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def load_adapter(model: LatentReasoner, folder: str | Path) -> None:
    """Attach the adapter of a folder in peft's format, with its weights.

    Listed `modules_to_save` that the model does not have are ignored. Raises `CheckpointError`.
    """
    folder = Path(folder)
    file = folder / ADAPTER_WEIGHTS
    for needed in (folder / ADAPTER_SETTINGS, file):
        if not needed.is_file():
            raise CheckpointError(f"{needed}: missing; an adapter folder holds both files")
    lora = _read_lora(folder / ADAPTER_SETTINGS)
    tensors = {_module_name(name, model): tensor for name, tensor in read_tensors(file).items()}
    attach_lora(model, lora)
    load_tensors(model, tensors, set(_adapter_state(model)), file)


def adapter_file_name(name: str, model: LatentReasoner) -> str:
    """Name in an adapter's file of a parameter.

    After peft's prefix, that is its name in the base of a plain model, as in peft, and its
    published name in a latent one.
    """
    name = name.replace(PEFT_NAME, "")
    return PEFT_PREFIX + (
        name.removeprefix("base.") if model.settings is None else published_name(name)
    )


def _module_name(name: str, model: LatentReasoner) -> str:
    """The inverse of `adapter_file_name`; published names of a plain model are read too."""
    name = name.removeprefix(PEFT_PREFIX)
    is_own = model.settings is None and not name.startswith(PUBLISHED_BASE)
    ours = f"base.{name}" if is_own else our_name(name)
    for factor in ("lora_A", "lora_B"):
        ours = ours.replace(f".{factor}.", f".{factor}{PEFT_NAME}.")
    return ours


def _adapter_state(model: LatentReasoner) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("base.") or ".lora_" in name
    }


def _peft_settings(model: LatentReasoner, lora: Lora) -> LoraConfig:
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.base.modules()),
    )


def _read_lora(file: Path) -> Lora:
    settings = read_json(file)
    try:
        changed = [key for key in UNSUPPORTED if settings.get(key)]
        if settings.get("init_lora_weights") not in (None, True, False, "gaussian"):
            changed.append("init_lora_weights")  # it may have changed the base's own weights
        if isinstance(settings["target_modules"], str):
            raise ValueError("target_modules is a pattern; list the names of the modules instead")
        if settings.get("peft_type") != "LORA" or changed or settings.get("bias") != "none":
            raise ValueError(f"only plain LoRA is supported, not {', '.join(changed) or 'this'}")
        return Lora(
            r=settings["r"],
            alpha=settings["lora_alpha"],
            dropout=settings["lora_dropout"],
            target_modules=sorted(settings["target_modules"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: not an adapter that can be read: {error}") from error


def linear_modules(base: PreTrainedModel) -> set[str]:
    """Last parts of the names of the base's linear modules: what `lora.target_modules` may name."""
    return {
        name.rsplit(".", 1)[-1]
        for name, module in base.base_model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def unreached_experts(base: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Those of `names` that experts' weights in one tensor bear too, and such a tensor's name."""
    together = experts_in_one_tensor(base)
    parts = {name: name.removesuffix("_proj") for name in names}
    return {name: together[part] for name, part in parts.items() if part in together}


def _check_targets(model: LatentReasoner, lora: Lora) -> None:
    unreached = unreached_experts(model.base, lora.target_modules)
    if unreached:
        raise ConfigError(
            f"lora.target_modules: {', '.join(unreached)}: {type(model.base).__name__} keeps the "
            f"weights of its experts in one tensor ({next(iter(unreached.values()))}), which LoRA "
            "does not reach; name modules of the attention alone, or train without lora"
        )
    linear = linear_modules(model.base)
    unknown = [name for name in lora.target_modules if name not in linear]
    if unknown:
        raise ConfigError(
            f"lora.target_modules: {', '.join(unknown)} not in {type(model.base).__name__}; its "
            f"linear modules are {', '.join(sorted(linear))}"
        )


def _lora_layers(model: LatentReasoner) -> list[tuple[str, LoraLayer]]:
    return [
        (n, module) for n, module in model.base.named_modules() if isinstance(module, LoraLayer)
    ]


def _frozen_copy(module: nn.Module | None) -> nn.Module | None:
    with torch.no_grad():
        copied = copy.deepcopy(module)
    return None if copied is None else copied.requires_grad_(False).eval()
