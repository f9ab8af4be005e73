"""Strict reading of tensors: missing, unexpected or misshapen ones and damaged files are errors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from latent_reasoning.config import UserError
from latent_reasoning.runtime.files import first_line

REMEDY = "restore the file, or delete the folder and run the stage that makes it again"


class CheckpointError(UserError, ValueError):
    """A model folder cannot be used; the message names the file, the problem and the remedy."""


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; `CheckpointError` where it is damaged."""
    check_readable(file)
    return load_file(file)


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a reasoner that are not its base's, to be saved or loaded."""
    return {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith("base.")
    }


def load_tensors(
    module: nn.Module, tensors: Mapping[str, Tensor], expected: set[str], file: Path
) -> None:
    """Load exactly the parameters and buffers `expected`; `CheckpointError` on any difference."""
    own = module.state_dict()
    problems = {
        "missing": sorted(expected - set(tensors)),
        "unexpected": sorted(set(tensors) - expected),
        "misshapen": [
            f"{name} {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}"
            for name in sorted(expected & set(tensors))
            if tensors[name].shape != own[name].shape
        ],
    }
    raise_problems(problems, file)
    with torch.no_grad():
        for name in expected:
            own[name].copy_(tensors[name])


def raise_problems(problems: Mapping[str, list[str]], file: Path) -> None:
    found = {kind: names for kind, names in problems.items() if names}
    if not found:
        return
    text = "; ".join(
        f"{len(names)} {kind} tensors: {', '.join(names[:5])}" + (", .." if len(names) > 5 else "")
        for kind, names in found.items()
    )
    raise CheckpointError(f"{file}: {text}; {REMEDY}")


def check_readable(file: Path) -> None:
    """Raise `CheckpointError` where a safetensors file is damaged or truncated."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: damaged or truncated safetensors file ({first_line(error)}); {REMEDY}"
        ) from error
