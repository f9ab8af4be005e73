"""What the training of a model cost, that of the models it started from included.

Operations are estimated by `dag.cost` at the mean lengths of this experiment's own rows. The base
model, which all have in common, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy
from safetensors import safe_open

from latent_reasoning.analysis.results import MissingResultError, Results
from latent_reasoning.config import DecodeModel, ImportModel
from latent_reasoning.dag.cost import Lengths, first_stage_steps, size_of, training_operations
from latent_reasoning.dag.planning import parents_of, shown
from latent_reasoning.data.rows import read_rows
from latent_reasoning.data.sequences import encode_plain_rows, reasoning_text

ROWS = 1000
"""Rows, the first of SFT's, whose mean lengths are taken."""


@dataclass(frozen=True)
class TrainingCost:
    """`examples` that were read (for a policy: prompts that were asked), `operations`, and the
    number of weights that the last training changed."""

    examples: int
    operations: float
    trained_parameters: int


def training_costs(results: Results) -> dict[str, TrainingCost]:
    """The cost of each of the models, by name."""
    lengths = mean_lengths(results)
    return {model: training_cost(results, model, lengths) for model in results.models}


def training_cost(results: Results, model: str, lengths: Lengths) -> TrainingCost:
    """The cost of a model on rows of these lengths, with all that it was made from."""
    experiment, examples, operations = results.experiment, 0, 0.0
    for name in with_ancestors(results, model):
        entry = experiment.models[name]
        if not isinstance(entry, ImportModel | DecodeModel):
            steps = entry.training.steps + first_stage_steps(entry)
            # A policy's updates on the same samples ask once.
            asked = -(-steps // getattr(entry, "iterations", 1))
            examples += asked * entry.training.batch_size
            operations += training_operations(experiment, entry, lengths)
    return TrainingCost(examples, operations, _trained_parameters(results, model))


def with_ancestors(results: Results, model: str) -> list[str]:
    """A model, those it starts from and their frozen teachers, each once; the base left out."""
    found, wanted = [], [model]
    while wanted:
        name = wanted.pop()
        if name != "base" and name not in found:
            found.append(name)
            wanted += parents_of(results.experiment, name)
    return found


def mean_lengths(results: Results) -> Lengths:
    """The mean lengths in tokens of the experiment's rows for SFT."""
    from latent_reasoning.model.folder import load_tokenizer  # torch: seconds to import

    path, data = results.layout.data("sft"), results.experiment.data
    if not path.is_file():
        raise MissingResultError(f"no {path}; make it with: snakemake {shown(path)}")
    rows = read_rows(path)[:ROWS]
    tokenizer = load_tokenizer(results.layout.base(results.seeds[0]))

    def means(drop_last_step: bool) -> numpy.ndarray:
        texts = [
            reasoning_text(
                row, natural_language=data.natural_language, drop_last_step=drop_last_step
            )
            for row in rows
        ]
        examples = encode_plain_rows(rows, tokenizer, prefix=data.prompt.training, reasonings=texts)
        pieces = [(e.question_length, e.reasoning_length, len(e.input_ids)) for e in examples]
        return numpy.mean(pieces, axis=0)

    question, reasoning, whole = means(drop_last_step=False)
    cut = means(drop_last_step=True)[1]
    return Lengths(question, reasoning, cut, answer=whole - question - reasoning)


def _trained_parameters(results: Results, model: str) -> int:
    """Weights that the last training changed: its adapter and the modules beside the base, or all.

    Modules that are left out of the finished model (SIM-CoT's decoder) are not counted."""
    entry = results.experiment.models[model]
    while isinstance(entry, DecodeModel):
        if entry.start == "base":
            return 0
        model, entry = entry.start, results.experiment.models[entry.start]
    if isinstance(entry, ImportModel):
        return 0
    folder = results.layout.model(model, results.seeds[0])
    files = sorted(folder.glob("*.safetensors"))
    beside = [file for file in files if not file.name.startswith("model")]
    own = sum(_numbers_in(file, but="marker_table") for file in beside)
    if entry.lora is not None:
        return size_of(results.experiment).adapter_weights(entry.lora) + own
    return own + sum(_numbers_in(file) for file in files if file.name.startswith("model"))


def _numbers_in(file: Path, but: str = "") -> int:
    """How many numbers a safetensors file holds, those of the tensor `but` left out."""
    with safe_open(file, framework="numpy") as tensors:
        shapes = (tensors.get_slice(name).get_shape() for name in tensors.keys() if name != but)  # noqa: SIM118
        return sum(int(numpy.prod(shape)) for shape in shapes)
