"""The stage RL: teach a latent model to stop as early as accuracy allows.

    python -m latent_reasoning.rl --config FILE.. --model NAME --seed N [--digest DIGEST]

reads the rows `rl` and `validation` and the model it starts from, and writes
`results/{experiment}/models/{model}/seed-{seed}/`. A run that was killed resumes from its last
checkpoint.
"""

from __future__ import annotations

from latent_reasoning.rl.build import build
from latent_reasoning.runtime.command import run_stage
from latent_reasoning.training.run import train_model


def main(arguments: list[str] | None = None) -> None:
    """Train one RL model of an experiment and write its folder."""
    train_model("latent_reasoning.rl", __doc__, ("rl",), build, arguments)


if __name__ == "__main__":
    run_stage(main)
