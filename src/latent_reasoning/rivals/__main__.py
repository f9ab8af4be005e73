"""The stages of other methods: train one model, or decode one that is there in another way.

    python -m latent_reasoning.rivals --config FILE.. --model NAME --seed N [--digest DIGEST]

reads the rows and the model that it starts from, and writes
`results/{experiment}/models/{model}/seed-{seed}/`. A training that was killed resumes from its last
checkpoint. docs/rivals.md describes the methods.
"""

from __future__ import annotations

from latent_reasoning.rivals.build import STAGES, build
from latent_reasoning.runtime.command import run_stage
from latent_reasoning.training.run import train_model


def main(arguments: list[str] | None = None) -> None:
    """Make one model by another method and write its folder."""
    train_model("latent_reasoning.rivals", __doc__, STAGES, build, arguments)


if __name__ == "__main__":
    run_stage(main)
