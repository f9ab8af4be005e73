"""Which module makes what a rival's training needs, by its stage and method."""

from __future__ import annotations

from importlib import import_module

from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import ConfigError
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.training.run import TrainingRun
from latent_reasoning.training.task import Task

STAGES = ("curriculum", "teacher_forced", "policy")
"""The stages that train."""

BUILDERS: dict[tuple[str, str], str] = {
    ("teacher_forced", "latent_sft"): "latent_sft",
    ("teacher_forced", "csft"): "csft",
    ("policy", "mts"): "mts",
    ("curriculum", "coconut"): "curriculum",
    ("curriculum", "pause"): "curriculum",
    ("curriculum", "no_thought"): "curriculum",
    ("curriculum", "icot"): "curriculum",
    ("teacher_forced", "colar"): "colar_sft",
    ("policy", "colar"): "colar_rl",
    ("policy", "hrpo"): "gated_policy",
    ("policy", "pondernet"): "pondernet",
}
"""By stage and method: the module below `latent_reasoning.rivals` whose `build` makes it."""


def build(run: TrainingRun) -> tuple[LatentReasoner, PreTrainedTokenizerBase, Task]:
    """The model of `run` before training, its tokenizer and its task.

    Raises `ConfigError` where it cannot start from its parent, `DataError` where no row is left.
    """
    module = BUILDERS.get((run.stage, run.entry.method))
    if module is None:
        raise ConfigError(f"models.{run.name}.method: {run.entry.method} is not built yet")
    return import_module(f"latent_reasoning.rivals.{module}").build(run)
