"""What RL starts from: the model, its tokenizer and the task."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import ConfigError, RlModel
from latent_reasoning.data.round_trip import check_round_trip
from latent_reasoning.model.folder import load, load_tokenizer
from latent_reasoning.model.lora import attach_lora
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.rl.prompts import rl_prompts
from latent_reasoning.rl.task import AdaptiveLengthTask
from latent_reasoning.training.run import TrainingRun


def build(
    run: TrainingRun,
) -> tuple[LatentReasoner, PreTrainedTokenizerBase, AdaptiveLengthTask]:
    """The model that RL starts from, with its adapter attached, its tokenizer and the task.

    Raises `ConfigError` for a plain model, `DataError` where its answers would not be judged right.
    """
    entry: RlModel = run.entry
    parent = run.parents[entry.start]
    model, tokenizer = load(parent, run.device.type), load_tokenizer(parent)
    check_round_trip(tokenizer)
    if model.settings is None:
        raise ConfigError(
            f"models.{run.name}.from: {entry.start} is a plain language model, which does not think"
        )
    if entry.lora is not None:
        attach_lora(model, entry.lora)
    prompts = rl_prompts(
        run.training_rows(tokenizer),
        tokenizer,
        prefix=run.experiment.data.prompt.evaluation,
        max_prompt_tokens=entry.max_prompt_tokens,
        number_rule=run.experiment.data.number_rule,
    )
    task = AdaptiveLengthTask(
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
    return model, tokenizer, task
