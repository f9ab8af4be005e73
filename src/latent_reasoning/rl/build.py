"""What RL starts from: the model, its tokenizer and the task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import ConfigError, PolicyModel, RlModel
from latent_reasoning.data.round_trip import check_round_trip
from latent_reasoning.model.folder import load, load_tokenizer
from latent_reasoning.model.lora import attach_lora
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.rl.prompts import RlPrompt, rl_prompts
from latent_reasoning.rl.task import AdaptiveLengthTask
from latent_reasoning.training.run import TrainingRun

PolicyTask = TypeVar("PolicyTask")


def build(
    run: TrainingRun,
) -> tuple[LatentReasoner, PreTrainedTokenizerBase, AdaptiveLengthTask]:
    """The model that RL starts from, with its adapter attached, its tokenizer and the task.

    Raises `ConfigError` for a plain model, `DataError` where its answers would not be judged right.
    """
    entry: RlModel = run.entry
    parent = run.parents[entry.start]
    model, tokenizer = load(parent, run.device.type), load_tokenizer(parent)
    if model.settings is None:
        raise ConfigError(
            f"models.{run.name}.from: {entry.start} is a plain language model, which does not think"
        )
    if model.settings.stop_rule == "fixed" and entry.max_latent_steps is None:
        raise ConfigError(
            f"models.{run.name}.max_latent_steps: {entry.start} takes a fixed number of latent "
            f"steps; say which ({model.settings.max_latent_steps} in its own training)"
        )
    return model, tokenizer, policy_task(run, AdaptiveLengthTask, model, tokenizer)


def policy_task(
    run: TrainingRun,
    kind: Callable[..., PolicyTask],
    model: LatentReasoner,
    tokenizer: PreTrainedTokenizerBase,
) -> PolicyTask:
    """The task of some `kind` for a policy that is to be trained, with its adapter attached.

    Raises `ConfigError` where a completion could go past the base's last position, `DataError`
    where its answers would not be judged right.
    """
    check_round_trip(tokenizer)
    entry: PolicyModel = run.entry
    # With the base's own dropout the policy would not even begin as its reference.
    model.base_dropout = False
    if entry.lora is not None:
        attach_lora(model, entry.lora)
    prompts = rl_prompts(
        run.training_rows(tokenizer),
        tokenizer,
        prefix=run.experiment.data.prompt.evaluation,
        max_prompt_tokens=entry.max_prompt_tokens,
        number_rule=run.experiment.data.number_rule,
        suffix="" if model.settings is None else model.settings.suffix,
        latent=model.settings is not None,
    )
    _check_positions(run.name, model, prompts, entry)
    return kind(
        run.name,
        model,
        tokenizer,
        prompts,
        entry,
        run.experiment.runtime,
        seed=run.seed,
        validate=run.validation(model, tokenizer, longest_completion=entry.max_new_tokens),
        processes=run.processes,
    )


def _check_positions(
    name: str, model: LatentReasoner, prompts: Sequence[RlPrompt], entry: PolicyModel
) -> None:
    """Raise `ConfigError` where a completion could go past the base's last position."""
    longest = max((len(prompt.ids) for prompt in prompts), default=0)
    limit = model.position_limit
    if limit is not None and longest + entry.max_new_tokens > limit:
        raise ConfigError(
            f"models.{name}.max_new_tokens: {entry.max_new_tokens} after a prompt of {longest} "
            f"tokens go past the {limit} positions of {type(model.base).__name__}; lower it, or "
            f"models.{name}.max_prompt_tokens"
        )
