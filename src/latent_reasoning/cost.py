"""A rough estimate of what an experiment costs, made from its configuration before anything runs.

Training costs 6 floating-point operations a weight and token (4 with LoRA, whose frozen weights
get no gradient), generation 2. The assumed rates are effective ones: a latent model of the paper
(30,000 steps of 128 examples on a model of 1.24e9 weights, 26 hours on two A100) needed 3e13
operations a second and GPU, a tenth of the card's peak; the laptop experiment reaches 2e10 a CPU
thread. Expect the truth within a factor of three.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from latent_reasoning.config import (
    Architecture,
    ConfigError,
    Experiment,
    Lora,
    ModelEntry,
    RlModel,
    Training,
    expand_path,
)

GPU_RATE = 3e13
"""Effective training operations a second on one A100."""
THREAD_RATE = 2e10
"""The same on one CPU thread."""
DECODING_SHARE = 0.1
"""Generation reaches this share of the training rate: it is bound by memory."""
QUESTION_TOKENS = 60
REASONING_TOKENS = 60
ANSWER_TOKENS = 10
LATENT_TOKENS = 8
VALIDATION_ROWS = 500
TEST_ROWS = 1319
UNKNOWN_WEIGHTS = 1e9
"""Assumed size of a model whose name does not tell it."""
CHECKPOINTS = 3
"""The last two and the best."""
ADAM_BYTES = 12
"""Bytes a trained weight in a checkpoint: float32 weight and two moments."""


@dataclass(frozen=True)
class Cost:
    """Hours on one device and bytes on disk; finished results are not subtracted."""

    hours: float
    bytes: float


def describe(experiment: Experiment, main: list[str]) -> str:
    """One line on the cost of the models `main`, and of all; empty where it is below an hour."""
    part, whole = estimate(experiment, main), estimate(experiment, list(experiment.models))
    if whole.hours < 1:
        return ""
    appendix = (
        "" if len(main) == len(experiment.models) else f" (with the appendix: {_readable(whole)})"
    )
    device = "one A100" if _on_gpu(experiment) else f"{experiment.runtime.threads} CPU thread(s)"
    return (
        f"{experiment.experiment}: from nothing, roughly {_readable(part)}{appendix} on {device}, "
        f"for a model of {base_weights(experiment):.2g} weights and {len(experiment.seeds)} "
        "seed(s); the assumptions stand in src/latent_reasoning/cost.py"
    )


def estimate(experiment: Experiment, models: list[str]) -> Cost:
    """The cost of the base model and of some models, their evaluations included, for all seeds."""
    weights = base_weights(experiment)
    scratch = experiment.base.source == "scratch"
    operations = 0.0
    size = 4 * weights
    if scratch:
        operations += _sft_operations(experiment.base.training, 6 * weights, weights)
        size += CHECKPOINTS * ADAM_BYTES * weights
    for name in models:
        entry = experiment.models[name]
        operations += _training_operations(entry, weights)
        operations += _evaluation_operations(experiment, weights)
        size += 4 * weights + _checkpoint_bytes(entry, weights)
    rate = GPU_RATE if _on_gpu(experiment) else THREAD_RATE * experiment.runtime.threads
    seeds = len(experiment.seeds)
    return Cost(hours=seeds * operations / rate / 3600, bytes=seeds * size)


def _on_gpu(experiment: Experiment) -> bool:
    return experiment.runtime.device != "cpu"


def _readable(cost: Cost) -> str:
    return f"{cost.hours:,.0f} hours and {cost.bytes / 1e9:,.0f} GB"


def base_weights(experiment: Experiment) -> float:
    """Number of weights: counted for `scratch`, else read off the name (`1B`, `135M`)."""
    base = experiment.base
    if base.source == "scratch":
        return float(llama_weights(base.architecture, vocabulary=128))
    names = [base.hub_id or ""]
    if base.path:
        names.append(_file_name(base.path))
    for name in names:
        match = re.search(r"(\d+(?:\.\d+)?)([BM])(?![a-z])", name, re.IGNORECASE)
        if match:
            return float(match[1]) * {"B": 1e9, "M": 1e6}[match[2].upper()]
    return UNKNOWN_WEIGHTS


def llama_weights(architecture: Architecture, vocabulary: int) -> int:
    """Weights of a Llama: embeddings, attention, gated MLP and norms."""
    d = architecture.hidden_size
    head = d // architecture.num_attention_heads
    attention = 2 * d * d + 2 * d * head * architecture.num_key_value_heads
    block = attention + 3 * d * architecture.intermediate_size + 2 * d
    embeddings = vocabulary * d * (1 if architecture.tie_word_embeddings else 2)
    return embeddings + architecture.num_hidden_layers * block + d


def _file_name(path: str) -> str:
    try:
        return Path(expand_path(path)).name
    except ConfigError:
        return path


def _training_operations(entry: ModelEntry, weights: float) -> float:
    """Operations of one training, its validations included."""
    if entry.stage == "import":
        return 0.0
    a_token = (6 if entry.lora is None else 4) * weights
    if entry.stage == "rl":
        return _rl_operations(entry, a_token, weights)
    if entry.stage == "latent_sft":  # the teacher's pass and the student's
        student = QUESTION_TOKENS + LATENT_TOKENS + ANSWER_TOKENS
        extra = entry.training.steps * entry.training.batch_size * student * a_token
        return extra + _sft_operations(entry.training, a_token, weights)
    return _sft_operations(entry.training, a_token, weights)


def _sft_operations(training: Training, a_token: float, weights: float) -> float:
    tokens = QUESTION_TOKENS + REASONING_TOKENS + ANSWER_TOKENS
    updates = training.steps * training.batch_size * tokens * a_token
    return updates + _validation_operations(training, weights)


def _rl_operations(entry: RlModel, a_token: float, weights: float) -> float:
    """Samples of a prompt share its question and latent steps; each has an answer of its own."""
    shared = QUESTION_TOKENS + LATENT_TOKENS
    own = entry.group_size * ANSWER_TOKENS
    prompts = entry.training.steps * entry.training.batch_size
    scored = prompts * (shared + own) * (a_token + 2 * weights)
    sampled = prompts * own * 2 * weights / DECODING_SHARE
    return scored + sampled + _validation_operations(entry.training, weights)


def _validation_operations(training: Training, weights: float) -> float:
    rows = training.validation_rows or VALIDATION_ROWS
    return training.steps // training.validate_every * rows * _decoding_operations(weights)


def _evaluation_operations(experiment: Experiment, weights: float) -> float:
    """The adaptive evaluation and one for each forced number of steps."""
    limit = experiment.data.limits.test or math.inf
    generated = experiment.data.source == "generated"
    rows = min(experiment.data.generated.test if generated else TEST_ROWS, limit)
    passes = 1 + (experiment.evaluation.max_forced_steps + 1)
    datasets = len(experiment.evaluation.datasets)
    return datasets * passes * rows * _decoding_operations(weights)


def _decoding_operations(weights: float) -> float:
    """Operations, at the training rate's worth, of answering one question."""
    return 2 * weights * (QUESTION_TOKENS + (REASONING_TOKENS + ANSWER_TOKENS) / DECODING_SHARE)


def _checkpoint_bytes(entry: ModelEntry, weights: float) -> float:
    if entry.stage == "import":
        return 0.0
    return CHECKPOINTS * ADAM_BYTES * _trained_weights(entry.lora, weights)


def _trained_weights(lora: Lora | None, weights: float) -> float:
    """An adapter of rank 128 on a Llama of 1.24e9 weights has 9e7, and grows as its width."""
    if lora is None:
        return weights
    return min(weights, 9e7 * lora.r / 128 * math.sqrt(weights / 1.24e9))
