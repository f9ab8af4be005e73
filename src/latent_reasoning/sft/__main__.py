"""The stages sft and latent_sft: fine-tune one model of the configuration.

    python -m latent_reasoning.sft --config FILE.. --model NAME --seed N [--digest DIGEST]

reads the rows `sft` and `validation` and the model it starts from, and writes
`results/{experiment}/models/{model}/seed-{seed}/`. A run that was killed resumes from its last
checkpoint.
"""

from __future__ import annotations

from latent_reasoning.config import load
from latent_reasoning.dag.digests import check_digest
from latent_reasoning.runtime.command import entry_of, parser, run_stage
from latent_reasoning.runtime.launch import launch_processes
from latent_reasoning.runtime.machine import join_machine
from latent_reasoning.sft.start import build
from latent_reasoning.training.run import TrainingRun


def main(arguments: list[str] | None = None) -> None:
    """Fine-tune one model of an experiment."""
    options = parser(__doc__, model=True).parse_args(arguments)
    experiment = load(options.config)
    entry = entry_of(experiment, options.model, "sft", "latent_sft")
    digest = check_digest(experiment, "model", options.digest, options.model)
    launch_processes("latent_reasoning.sft", arguments, experiment.runtime)
    machine = join_machine(experiment.runtime)
    run = TrainingRun.of(
        experiment, options.model, options.seed, digest, split="sft", machine=machine
    )
    run.seed_weights()
    model, tokenizer, task = build(run, entry)
    result = run.train(task, entry.training)
    folder = run.save(model, tokenizer, result, keep_adapter=entry.save == "adapter")
    run.processes.print(f"{options.model}: written to {folder}")


if __name__ == "__main__":
    run_stage(main)
