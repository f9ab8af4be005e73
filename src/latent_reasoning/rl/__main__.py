"""The stage RL: teach a latent model to stop as early as accuracy allows.

    python -m latent_reasoning.rl --config FILE.. --model NAME --seed N [--digest DIGEST]

reads the rows `rl` and `validation` and the model it starts from, and writes
`results/{experiment}/models/{model}/seed-{seed}/`. A run that was killed goes on from its last
checkpoint.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import ConfigError, RlModel, load
from latent_reasoning.dag.digests import check_digest
from latent_reasoning.model.folder import load as load_model
from latent_reasoning.model.folder import load_tokenizer
from latent_reasoning.model.lora import attach_lora
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.rl.groups import rl_prompts
from latent_reasoning.rl.task import AdaptiveLengthTask
from latent_reasoning.runtime.command import entry_of, parser, run_stage
from latent_reasoning.runtime.launch import launch_processes
from latent_reasoning.runtime.machine import join_machine
from latent_reasoning.training.run import TrainingRun


def main(arguments: list[str] | None = None) -> None:
    """Train one RL model of an experiment and write its folder."""
    options = parser(__doc__, model=True).parse_args(arguments)
    experiment = load(options.config)
    entry = entry_of(experiment, options.model, "rl")
    digest = check_digest(experiment, "model", options.digest, options.model)
    launch_processes("latent_reasoning.rl", arguments, experiment.runtime)
    machine = join_machine(experiment.runtime)
    run = TrainingRun.of(
        experiment, options.model, options.seed, digest, split="rl", machine=machine
    )
    run.seed_weights()
    model, tokenizer, task = start(run, entry)
    result = run.train(task, entry.training)
    folder = run.save(model, tokenizer, result, keep_adapter=entry.save == "adapter")
    run.processes.print(f"{options.model}: written to {folder}")


def start(
    run: TrainingRun, entry: RlModel
) -> tuple[LatentReasoner, PreTrainedTokenizerBase, AdaptiveLengthTask]:
    """The model RL starts from, its adapter attached, and the task."""
    parent = run.parents[entry.start]
    model, tokenizer = load_model(parent, run.device.type), load_tokenizer(parent)
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
    )
    validate = run.validation(
        model, tokenizer, entry.training, longest_completion=entry.max_new_tokens
    )
    task = AdaptiveLengthTask(
        run.name,
        model,
        tokenizer,
        prompts,
        entry,
        run.experiment.runtime,
        seed=run.seed,
        validate=validate,
        processes=run.processes,
    )
    return model, tokenizer, task


if __name__ == "__main__":
    run_stage(main)
