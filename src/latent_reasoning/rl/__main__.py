"""The stage RL: teach a latent model to stop as early as accuracy allows.

    python -m latent_reasoning.rl --config FILE.. --model NAME --seed N [--digest DIGEST]

reads the rows `rl` and `validation` and the model it starts from, and writes
`results/{experiment}/models/{model}/seed-{seed}/`. A run that was killed resumes from its last
checkpoint.
"""

from __future__ import annotations

from latent_reasoning.config import load
from latent_reasoning.dag.digests import check_digest
from latent_reasoning.rl.build import build
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
    model, tokenizer, task = build(run, entry)
    result = run.train(task, entry.training)
    folder = run.save(model, tokenizer, result, keep_adapter=entry.save == "adapter")
    run.processes.print(f"{options.model}: written to {folder}")


if __name__ == "__main__":
    run_stage(main)
