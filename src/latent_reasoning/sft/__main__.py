"""The stages sft and latent_sft: fine-tune one model of the configuration.

    python -m latent_reasoning.sft --config FILE.. --model NAME --seed N [--digest DIGEST]

reads the rows `sft` and `validation` and the model it starts from, and writes
`results/{experiment}/models/{model}/seed-{seed}/`. A run that was killed resumes from its last
checkpoint.
"""

from __future__ import annotations

from latent_reasoning.runtime.command import run_stage
from latent_reasoning.sft.start import build
from latent_reasoning.training.run import train_model


def main(arguments: list[str] | None = None) -> None:
    """Fine-tune one model of an experiment and write its folder."""
    train_model("latent_reasoning.sft", __doc__, ("sft", "latent_sft"), build, arguments)


if __name__ == "__main__":
    run_stage(main)
