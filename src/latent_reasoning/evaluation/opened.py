"""A trained model of an experiment, opened for evaluation with the rows that it answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import Experiment
from latent_reasoning.dag.layout import Layout
from latent_reasoning.data.rows import Row, read_rows
from latent_reasoning.evaluation.evaluator import EvaluationSettings
from latent_reasoning.evaluation.folder import without_special_text
from latent_reasoning.model.folder import load, load_tokenizer
from latent_reasoning.model.frozen import hold_frozen
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.runtime.device import held_precision, resolve_device, resolve_precision
from latent_reasoning.runtime.gpus import take_gpus


@dataclass(frozen=True)
class Opened:
    """A model in memory, its rows, and how it is evaluated."""

    model: LatentReasoner
    tokenizer: PreTrainedTokenizerBase
    rows: list[Row]
    settings: EvaluationSettings
    precision: torch.dtype


def open_model(experiment: Experiment, name: str, seed: int, dataset: str) -> Opened:
    """Read a model of an experiment and a data set, on the device that the experiment names."""
    layout, section, runtime = Layout.of(experiment), experiment.evaluation, experiment.runtime
    torch.set_num_threads(runtime.threads)
    take_gpus(runtime.device)
    device = resolve_device(runtime.device)
    folder = layout.model(name, seed)
    tokenizer = load_tokenizer(folder)
    file = layout.data(dataset)
    policy = experiment.data.special_token_text
    rows = without_special_text(read_rows(file), tokenizer, policy, file)
    settings = EvaluationSettings(
        prefix=experiment.data.prompt.evaluation,
        max_new_tokens=section.max_new_tokens,
        batch_size=runtime.evaluation_batch_size,
        forced_steps=getattr(experiment.models[name], "forced_steps", None),
        max_forced_steps=section.max_forced_steps,
        forced_rows=section.forced_rows,
        number_rule=experiment.data.number_rule,
    )
    model, precision = load(folder, device.type), resolve_precision(runtime.precision, device)
    hold_frozen(model.requires_grad_(False), held_precision(runtime.precision, device))
    model.captured.when = runtime.cuda_graphs
    return Opened(model, tokenizer, rows, settings, precision)
