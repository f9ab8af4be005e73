"""The stages base and import: make the model that everything starts from, or import a trained one.

    python -m latent_reasoning.base --config FILE.. [--seed N]
    python -m latent_reasoning.base --config FILE.. --model NAME [--seed N]

The first makes the base model: trained from scratch on generated text, or read from a folder, a
GGUF file or the hub. The second imports a model of stage `import`. Both write a model folder.
"""

from __future__ import annotations

import torch

from latent_reasoning.base import scratch
from latent_reasoning.base.sources import obtain_base, obtain_import
from latent_reasoning.config import Experiment
from latent_reasoning.config import load as load_experiment
from latent_reasoning.dag.digests import check_digest
from latent_reasoning.dag.fingerprints import write_model_digest
from latent_reasoning.dag.layout import Layout
from latent_reasoning.model.card import Origin
from latent_reasoning.model.folder import load, load_tokenizer, save
from latent_reasoning.model.self_check import check_model
from latent_reasoning.model.special_tokens import check_tokenizer
from latent_reasoning.runtime.command import count, entry_of, parser, run_stage
from latent_reasoning.runtime.launch import launch_processes


def main(arguments: list[str] | None = None) -> None:
    """Make the base model of an experiment, or import one of its models."""
    command = parser(__doc__)
    command.add_argument("--model", metavar="NAME", help="entry of models, of stage import")
    command.add_argument("--seed", type=count, default=0, help="seed of the training")
    options = command.parse_args(arguments)
    experiment = load_experiment(options.config)
    layout = Layout.of(experiment)
    torch.set_num_threads(experiment.runtime.threads)
    if options.model is not None:
        digest = check_digest(experiment, "model", options.digest, options.model)
        import_model(experiment, options.model, options.seed, layout, digest)
        return
    digest = check_digest(experiment, "base", options.digest)
    if experiment.base.source == "scratch":
        launch_processes("latent_reasoning.base", arguments, experiment.runtime)
        scratch.run(experiment, options.seed, digest)
    else:
        bring_base(experiment, options.seed, layout, digest)


def bring_base(experiment: Experiment, seed: int, layout: Layout, digest: str) -> None:
    """Read the base model from its configured source, and write its folder."""
    base = experiment.base
    model, tokenizer = obtain_base(base)
    check_tokenizer(tokenizer, model.base)
    check_model(model)
    parent = base.hub_id if base.source == "hub" else base.path
    origin = Origin(experiment, "base", "base", seed, parent, digest)
    card = origin.card_of_published(model, base.licence)
    save(model, tokenizer, layout.base(seed), card)
    write_model_digest(layout.base(seed), layout.model_digest("base", seed))


def import_model(experiment: Experiment, name: str, seed: int, layout: Layout, digest: str) -> None:
    """Import the model `name`, trained elsewhere or the base itself, and write its folder."""
    entry = entry_of(experiment, name, "import")
    if entry.start == "base":
        folder = layout.base(seed)
        model, tokenizer = load(folder, "cpu"), load_tokenizer(folder)
    else:
        model, tokenizer = obtain_import(name, entry)
        check_tokenizer(tokenizer, model.base)
        check_model(model)
    origin = Origin(experiment, name, "import", seed, entry.start or entry.path, digest)
    licence = experiment.base.licence if entry.start == "base" else entry.licence
    card = origin.card_of_published(model, licence)
    save(model, tokenizer, layout.model(name, seed), card)
    write_model_digest(layout.model(name, seed), layout.model_digest(name, seed))


if __name__ == "__main__":
    run_stage(main)
