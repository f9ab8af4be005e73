"""The plain Hugging Face model in a folder, read strictly by transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from latent_reasoning.model import published
from latent_reasoning.model.bases import (
    ATTENTION_KEYS,
    UnsupportedBaseError,
    check_config,
    without_mask_buffers,
)
from latent_reasoning.model.settings_file import read_json
from latent_reasoning.model.tensors import (
    REMEDY,
    CheckpointError,
    check_readable,
    raise_problems,
    read_tensors,
)
from latent_reasoning.runtime.files import first_line

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
UNREAD_KEYS = ("model_type", "architectures", "torch_dtype")
"""Keys of a published `config.json` that are read by themselves or not at all."""


def load_base(folder: Path) -> PreTrainedModel:
    """Read the plain Hugging Face model of a folder, strictly, in float32."""
    content = _checked(read_json(existing(folder, "config.json")), folder)
    for file in weight_files(folder):
        check_readable(file)
    options: dict[str, Any] = {"trust_remote_code": False, "dtype": torch.float32}
    with _errors_named(folder):
        if any(key in content for key in ATTENTION_KEYS):
            options["config"] = _config_without_kernel(folder)
        return _from_pretrained(AutoModelForCausalLM, folder, folder, **options)


def base_of_tensors(
    folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]
) -> PreTrainedModel:
    """The plain model of a folder's `config` with these weights in float32, strictly; errors name
    `folder`."""
    plain = {
        key: value
        for key, value in _checked(dict(config), folder).items()
        if key not in (published.SETTINGS_KEY, *UNREAD_KEYS, *ATTENTION_KEYS)
    }
    with _errors_named(folder):
        own = AutoConfig.for_model(config["model_type"], **plain)
        options = {"config": own, "state_dict": tensors, "dtype": torch.float32}
        return _from_pretrained(MODEL_FOR_CAUSAL_LM_MAPPING[type(own)], folder, None, **options)


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hide transformers' progress bars: loading and saving are quick, and bars fill the logs."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _checked(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    try:
        check_config(config)
    except UnsupportedBaseError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    return config


def _config_without_kernel(folder: Path) -> PreTrainedConfig:
    """The configuration of a folder without its choice of an attention kernel."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config._attn_implementation = None
    return config


@contextlib.contextmanager
def _errors_named(folder: Path) -> Iterator[None]:
    """Errors of transformers as `CheckpointError`s that name the weights of `folder`."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"{folder / WEIGHTS}: the weights do not fit config.json ({first_line(error)}); "
            f"{REMEDY}"
        ) from error


def _from_pretrained(
    architecture: Any, folder: Path, source: Path | None, **options: Any
) -> PreTrainedModel:
    """Load by transformers, made strict, from a `source` or the options alone; errors name the
    `folder`."""
    with without_progress_bars():
        model, report = architecture.from_pretrained(
            source,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    problems = {
        "missing": sorted(report["missing_keys"]),
        "unexpected": sorted(without_mask_buffers(report["unexpected_keys"])),
        "misshapen": sorted(str(key) for key in report["mismatched_keys"]),
    }
    raise_problems(problems, folder / WEIGHTS)
    return model


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder's base model: one, or several parts where it is missing."""
    if not (folder / WEIGHTS).exists() and (folder / WEIGHTS_INDEX).exists():
        parts = set(read_json(folder / WEIGHTS_INDEX).get("weight_map", {}).values())
        return [existing(folder, part) for part in sorted(parts)]
    if not (folder / WEIGHTS).exists() and list(folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder}: holds pickled weights (.bin) only, which are never loaded; convert them "
            "to safetensors"
        )
    return [existing(folder, WEIGHTS)]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of `weight_files`."""
    return {name: t for file in weight_files(folder) for name, t in read_tensors(file).items()}


def existing(folder: Path, name: str) -> Path:
    """A file of a model folder; `CheckpointError` where it is missing."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such model folder")
    if not (folder / name).is_file():
        if (folder / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{folder}: holds an adapter alone; merge it into the model that it was trained on "
                "and save the whole model"
            )
        raise CheckpointError(f"{folder / name}: missing; {REMEDY}")
    return folder / name
