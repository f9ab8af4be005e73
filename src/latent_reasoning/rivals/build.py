"""Which module makes what a rival's training needs, by its stage and method."""

from __future__ import annotations

from importlib import import_module

from transformers import PreTrainedTokenizerBase

from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.training.run import TrainingRun
from latent_reasoning.training.task import Task

BUILDERS = {
    "curriculum": dict.fromkeys(("coconut", "pause", "no_thought", "icot"), "curriculum"),
    "teacher_forced": {"colar": "colar_sft", "latent_sft": "latent_sft", "csft": "csft"},
    "policy": {
        "hrpo": "gated_policy",
        "colar": "colar_rl",
        "mts": "mts",
        "pondernet": "pondernet",
    },
}
"""By stage and method: the module below `latent_reasoning.rivals` whose `build` makes it."""

STAGES = tuple(BUILDERS)
"""The stages that train."""


def build(run: TrainingRun) -> tuple[LatentReasoner, PreTrainedTokenizerBase, Task]:
    """The model of `run` before training, its tokenizer and its task.

    Raises `ConfigError` where it cannot start from its parent, `DataError` where no row is left.
    """
    module = BUILDERS[run.stage][run.entry.method]
    return import_module(f"latent_reasoning.rivals.{module}").build(run)
