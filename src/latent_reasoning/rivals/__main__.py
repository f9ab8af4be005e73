"""The stages of other methods: train one model, or decode one that is there in another way.

    python -m latent_reasoning.rivals --config FILE.. --model NAME --seed N [--digest DIGEST]

reads the rows and the model that it starts from, and writes
`results/{experiment}/models/{model}/seed-{seed}/`. A training that was killed resumes from its last
checkpoint. docs/rivals.md describes the methods.
"""

from __future__ import annotations

from latent_reasoning.config import load
from latent_reasoning.dag.digests import check_digest
from latent_reasoning.rivals.build import STAGES, build
from latent_reasoning.rivals.decode import decode_model
from latent_reasoning.runtime.command import entry_of, parser, run_stage
from latent_reasoning.training.run import train_model


def main(arguments: list[str] | None = None) -> None:
    """Make one model by another method and write its folder."""
    options = parser(__doc__, model=True).parse_args(arguments)
    experiment = load(options.config)
    if entry_of(experiment, options.model, "decode", *STAGES).stage != "decode":
        train_model("latent_reasoning.rivals", __doc__, STAGES, build, arguments)
        return
    digest = check_digest(experiment, "model", options.digest, options.model)
    folder = decode_model(experiment, options.model, options.seed, digest)
    print(f"{options.model}: written to {folder}")


if __name__ == "__main__":
    run_stage(main)
