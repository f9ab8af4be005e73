"""AdamW with decay groups, and the learning rate's schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from latent_reasoning.config import Training
from latent_reasoning.training.checkpoints import parameter_names

FILTER = "recurrent_filter."
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def build_optimizer(
    model: nn.Module, training: Training, rates: Mapping[str, float] | None = None
) -> torch.optim.AdamW:
    """AdamW over the trained parameters, with weight decay as `decay_groups` says.

    A recurrent filter with a learning rate of its own is a group of its own without weight decay,
    and so are the parameters whose names begin as the keys of `rates` say. The key `rate_factor` of
    a group times `learning_rate` is its rate.
    """
    names = {name: parameter for parameter, name in parameter_names(model).items()}
    decayed, undecayed = decay_groups(model)
    own_rates = dict(rates or {})
    if training.filter_learning_rate is not None:
        own_rates[FILTER] = training.filter_learning_rate
    groups: list[dict[str, Any]] = [
        {
            "params": [names[n] for n in group if not n.startswith(tuple(own_rates))],
            "weight_decay": decay,
        }
        for group, decay in ((decayed, training.weight_decay), (undecayed, 0.0))
    ]
    for group in groups:
        group["rate_factor"] = 1.0
    for beginning, own_rate in own_rates.items():
        groups.append(
            {
                "params": [names[n] for n in names if n.startswith(beginning)],
                "weight_decay": 0.0,
                "rate_factor": own_rate / training.learning_rate,
            }
        )
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=training.learning_rate,
        betas=training.betas,
        eps=training.eps,
        fused=True,
    )


def decay_groups(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the trained parameters with and without weight decay.

    Matrices, including embeddings, are decayed. Biases and norms, which are vectors, are not, nor
    are the special tokens' own modules (conformance note 15).
    """
    decayed: list[str] = []
    undecayed: list[str] = []
    for parameter, name in parameter_names(model).items():
        exempt = parameter.ndim < 2 or "special_rows." in name
        (undecayed if exempt else decayed).append(name)
    return decayed, undecayed


def learning_rate(training: Training) -> Callable[[int], float]:
    """The learning rate of update `step` (from 0): transformers' schedules, as a function."""
    unused = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    floor = training.learning_rate_floor
    schedule = get_scheduler(
        "cosine_with_min_lr" if floor else SCHEDULES[training.schedule],
        unused,
        num_warmup_steps=training.warmup_steps,
        num_training_steps=training.steps,
        scheduler_specific_kwargs={"min_lr_rate": floor} if floor else None,
    )
    factor = schedule.lr_lambdas[0]
    return lambda step: training.learning_rate * factor(step)
