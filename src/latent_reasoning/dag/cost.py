"""What an experiment costs, estimated from its configuration: hours, memory and disk of every job.

    python -m latent_reasoning.dag.cost --config config/paper.yaml [config/h100.yaml]

A job executes its floating-point operations in successive passes through the model. A pass over few
tokens (a latent step, a decoded token) takes as long as starting its kernels, however few its
operations:

    seconds = operations / rate + passes * pass_seconds

Only products with weights are counted, two operations per weight and token; attention, a few per
cent at these lengths, is left out. The A100's rate is fitted to the published hours of one latent
SFT, that of an H100 to steps measured on an H200 (docs/paper-scale.md). Hours and memory may be
wrong by a factor of two. The workflow asks the scheduler for them where `runtime` states none.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from latent_reasoning.config import (
    CurriculumModel,
    DecodeModel,
    Experiment,
    ImportModel,
    LatentSftModel,
    Lora,
    ModelEntry,
    PolicyModel,
    RivalPolicyModel,
    SftModel,
    TeacherForcedModel,
    load,
)
from latent_reasoning.runtime.command import run_stage

REASONING_STEPS, LATENT_STEPS = 3, 6
"""Mean reasoning steps of a row; latent steps that RL's policy and an evaluation take."""
DISTINCT = 6
"""Distinct completions among a prompt's 16 samples."""
LONGEST_COMPLETION = {"cot": 128, "no_cot": 32, "latent": 48}
"""Tokens until the last row of a validation batch has ended."""
VALIDATION_ROWS, VALIDATION_BATCH, TEST_ROWS = 500, 128, 1319

ADAM_BYTES, LOGIT_BYTES = 16, 10
"""Bytes of a trained weight, its gradient and moments; of a logit, its copy and gradient."""
ADAPTER_KEEPS = 1.7
"""With adapters autograd keeps more, as measured on one H200: inputs cast to float32, dropout's."""
CUDA_GIB, HOST_MB, HOST_COPIES, HUB_ROWS_MB = 2.0, 6000, 3, 1640
"""The CUDA context and what the allocator cannot use; on the host a process, copies of float32
weights while loading, and GSM8K-Aug's rows."""
CHECKPOINTS = 3
"""Checkpoints on disk: the last two and the best."""
MARGIN = 2.0
"""Ratio of the time asked of the scheduler to the estimate."""


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a row's pieces; `cut_reasoning` is without the last step."""

    question: float
    reasoning: float
    cut_reasoning: float
    answer: float


GSM8K = Lengths(question=58, reasoning=22, cut_reasoning=15, answer=7)
"""Counted on GSM8K's 6,973 train rows in GSM8K-Aug form with Llama 3's pre-tokeniser pattern, which
splits a little less than the tokenizer."""

Supervised = SftModel | LatentSftModel | CurriculumModel | TeacherForcedModel
Trained = Supervised | PolicyModel


@dataclass(frozen=True)
class ModelSize:
    """The widths of a Llama, or of a GPT-2, whose MLP has no gate: two matrices."""

    hidden: int
    intermediate: int
    layers: int
    key_values: int
    vocabulary: int
    mlp_matrices: int = 3

    @property
    def block_weights(self) -> int:
        """Weights of all matrices in the blocks, which multiply every token."""
        attention = 2 * self.hidden * (self.hidden + self.key_values)
        return self.layers * (attention + self.mlp_matrices * self.hidden * self.intermediate)

    @property
    def weights(self) -> int:
        """All weights of a model with tied embeddings, norms included."""
        return self.block_weights + (self.vocabulary + 2 * self.layers + 1) * self.hidden

    def adapter_weights(self, lora: Lora | None) -> int:
        """Weights of an adapter on modules of a Llama or a GPT-2; any other counts as the MLP's."""
        d, key, mlp = self.hidden, self.hidden + self.key_values, self.hidden + self.intermediate
        ends = {"q_proj": 2 * d, "k_proj": key, "v_proj": key, "o_proj": 2 * d, "c_attn": 4 * d}
        ends["c_proj"] = 2 * d + mlp  # two modules of a block
        names = lora.target_modules if lora else []
        return self.layers * sum(lora.r * ends.get(name, mlp) for name in names)

    def operations(self, tokens: float, logits: float, lora: Lora | None, *, train: bool) -> float:
        """Operations of a forward with `logits` of its tokens, and of its backward if `train`.

        Two per weight and token; the backward takes as many for the activations' gradient, and
        again for the weights' gradient, which frozen weights do not have.
        """
        base = 2 * (self.block_weights * tokens + self.hidden * self.vocabulary * logits)
        adapter = 2 * self.adapter_weights(lora) * tokens
        if not train:
            return base + adapter
        return (2 if lora else 3) * base + 3 * adapter


SIZES = {
    "llama-3.2-1b": ModelSize(2048, 8192, 16, 512, 128_256),
    "smollm2-135m": ModelSize(576, 1536, 30, 192, 49_152),
}
"""Sizes by the beginning of a model's name."""
UNKNOWN = SIZES["llama-3.2-1b"]
"""Assumed for any other name, its widths scaled if the name holds a size such as `3b`."""


def size_of(experiment: Experiment) -> ModelSize:
    """The base model's size: as configured for `scratch`, else judged by the model's name."""
    base = experiment.base
    if base.source == "scratch":
        shape = base.architecture
        key_values = shape.hidden_size * shape.num_key_value_heads // shape.num_attention_heads
        own = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers, key_values
        return ModelSize(*own, vocabulary=128, mlp_matrices=2 if shape.family == "gpt2" else 3)
    path = Path(os.path.expandvars(base.hub_id if base.source == "hub" else base.path))
    path = path.parent.parent if path.parent.name == "snapshots" else path
    name = path.name.rpartition("--")[2].lower()  # the hub's cache: models--org--name/snapshots/..
    for beginning, size in SIZES.items():
        if name.startswith(beginning):
            return size
    number = re.search(r"(\d+(?:\.\d+)?)([bm])(?![a-z])", name)
    if number is None:
        return UNKNOWN
    weights = float(number[1]) * {"b": 1e9, "m": 1e6}[number[2]]
    widths = ("hidden", "intermediate", "key_values")
    ratio = math.sqrt(weights / UNKNOWN.weights)
    return replace(UNKNOWN, **{name: round(ratio * getattr(UNKNOWN, name)) for name in widths})


@dataclass(frozen=True)
class Device:
    """What a job runs on: the operations per second that it reaches, and a small pass's seconds."""

    name: str
    rate: float
    pass_seconds: float

    def hours(self, operations: float, passes: float) -> float:
        """The hours that `operations` in `passes` take."""
        return (operations / self.rate + passes * self.pass_seconds) / 3600


A100 = Device("A100-80", 41e12, 0.02)
"""13 % of 312 TFLOP/s: the published latent SFT, as in the public code, then takes 26 hours."""
H100 = Device("H100", 127e12, 0.01)
"""Measured with captured steps on an H200, which has an H100's processor and faster memory: CoT SFT
gives the rate, latent SFT the seconds of a pass (docs/paper-scale.md)."""
THREAD_RATE = 2e10
"""Operations per second that the laptop experiment reaches on one CPU thread."""


def device_of(experiment: Experiment) -> Device:
    """What the jobs of an experiment run on."""
    runtime = experiment.runtime
    if runtime.device == "cpu":
        return Device(f"{runtime.threads} CPU thread(s)", THREAD_RATE * runtime.threads, 0.0)
    return H100 if "h100" in (runtime.gpu_model or "").lower() else A100


@dataclass(frozen=True)
class Need:
    """What one job needs of one device, for one seed; disk in bytes."""

    hours: float
    gpu_gib: float
    host_mb: int
    disk: float

    @property
    def minutes(self) -> int:
        """Time to ask for: the estimate with its margin, in whole hours."""
        return 60 * max(1, math.ceil(MARGIN * self.hours))


def base_need(experiment: Experiment) -> Need:
    """What the job that makes or fetches the base model needs."""
    if experiment.base.source == "scratch":
        return _training_need(experiment, SftModel(training=experiment.base.training))
    return Need(0.5, 0.0, _host_mb(experiment), 4 * size_of(experiment).weights)


def training_need(experiment: Experiment, model: str) -> Need:
    """What the job that makes a model needs."""
    entry = experiment.models[model]
    if isinstance(entry, ImportModel | DecodeModel):
        return Need(0.1, 0.0, _host_mb(experiment), 4 * size_of(experiment).weights)
    return _training_need(experiment, entry)


def _training_need(experiment: Experiment, entry: Trained) -> Need:
    """What a training with its validations needs."""
    size, device = size_of(experiment), device_of(experiment)
    training, lora = entry.training, entry.lora
    rows = min(experiment.runtime.micro_batch_size or training.batch_size, training.batch_size)
    tokens, logits, passes = _micro_batch(entry, rows)
    decoded, following = _decoded_tokens(entry, rows), 2.0 * passes
    operations = _step_operations(size, entry, tokens, logits, decoded)
    if isinstance(entry, PolicyModel):
        following += (entry.max_new_tokens + 1 + passes) / entry.iterations
    validated = training.validation_rows or VALIDATION_ROWS
    validation = _decoding(device, size, validated, VALIDATION_BATCH, _longest(entry))
    steps = training.steps + 2 * first_stage_steps(entry)
    hours = steps * training.batch_size / rows * device.hours(operations, following)
    hours += training.steps // training.validate_every * validation

    trained = size.adapter_weights(lora) or size.weights
    # Frozen blocks are held in bfloat16; of trained ones autocast keeps a copy in it.
    has_reference = lora or isinstance(entry, PolicyModel)
    frozen = 4 * (size.weights - size.block_weights) if has_reference else 0
    blocks = 2 * size.block_weights
    # Autograd keeps these bytes for each token and block (counted with saved-tensor hooks).
    kept = size.layers * tokens * (43 * size.hidden + 12 * size.intermediate)
    kept = round(ADAPTER_KEEPS * kept) if lora else kept
    if decoded:  # by a second model, trained in full
        trained += size.weights
        blocks *= 2
        kept += size.layers * decoded * (43 * size.hidden + 12 * size.intermediate)
        logits += decoded
    held = ADAM_BYTES * trained + frozen + blocks + kept + LOGIT_BYTES * logits * size.vocabulary
    disk = 4 * size.weights + CHECKPOINTS * (ADAM_BYTES - 4) * trained
    return Need(hours, CUDA_GIB + held / 2**30, _host_mb(experiment), disk)


def training_operations(experiment: Experiment, entry: Trained, lengths: Lengths) -> float:
    """The operations of a training's steps on rows of these lengths, its validations left out.

    A step decoder's and an encoder's are included. A curriculum counts as if all its text stayed.
    """
    training, size = entry.training, size_of(experiment)
    tokens, logits, _ = _micro_batch(entry, training.batch_size, lengths)
    decoded = _decoded_tokens(entry, training.batch_size, lengths)
    operations = _step_operations(size, entry, tokens, logits, decoded)
    # A row passes the encoder and the decoder that reads its latents.
    return (training.steps + 2 * first_stage_steps(entry)) * operations


def first_stage_steps(entry: Trained) -> int:
    """The steps of Latent-SFT's encoder, which is trained first, in three runs; 0 without it."""
    if isinstance(entry, TeacherForcedModel) and entry.method == "latent_sft":
        return entry.latent_sft.first_stage_steps
    return 0


def _step_operations(
    size: ModelSize, entry: Trained, tokens: float, logits: float, decoded: float
) -> float:
    """The operations of learning from `tokens` tokens, and from `decoded` ones by a step decoder;
    for one that samples also of its rollout and a reference's scores, once for all its updates."""
    operations = size.operations(tokens, logits, entry.lora, train=True)
    if isinstance(entry, PolicyModel) and getattr(entry, "method", None) != "pondernet":
        for scored in (entry.lora, None) if entry.kl_weight else (entry.lora,):
            operations += size.operations(tokens, logits, scored, train=False) / entry.iterations
    return operations + size.operations(decoded, decoded, None, train=True)


def _decoded_tokens(entry: Trained, rows: int, lengths: Lengths = GSM8K) -> float:
    """Latent inputs and tokens of their steps that a step decoder reads; 0 without one."""
    decodes = getattr(entry, "step_decoder", None) is not None
    return rows * (lengths.reasoning + LATENT_STEPS) if decodes else 0.0


def _micro_batch(entry: Trained, rows: int, lengths: Lengths = GSM8K) -> tuple[float, float, int]:
    """Tokens, logits and successive passes of a forward."""
    question, answer = lengths.question, lengths.answer
    if isinstance(entry, RivalPolicyModel) and entry.method == "pondernet":
        # One trajectory, an answer after each of its steps.
        steps = entry.max_latent_steps or LATENT_STEPS
        answers = (steps + 1) * answer
        return rows * (question + steps + 2 + answers), rows * answers, steps + 4
    if isinstance(entry, RivalPolicyModel):  # HRPO reads a question once for all its samples
        hrpo, group = entry.method == "hrpo", entry.group_size
        answers = group * ((lengths.reasoning if hrpo else LATENT_STEPS + 2) + answer)
        questions = question if hrpo else group * question
        return rows * (questions + answers), rows * answers, LATENT_STEPS + 4
    if isinstance(entry, PolicyModel):
        answers = answer * min(DISTINCT, entry.group_size)
        return rows * (question + LATENT_STEPS + 2 + answers), rows * answers, LATENT_STEPS + 4
    if entry.stage == "latent_sft":
        wanted = entry.latent_steps
        steps = max(wanted.factor * REASONING_STEPS + wanted.bias, wanted.min or 0)
        steps = steps if wanted.max is None else min(steps, wanted.max)
        teacher = (lengths.cut_reasoning if entry.drop_last_step else lengths.reasoning) + answer
        learned, passes = teacher + steps + 2 + answer, steps + 3
    elif entry.stage == "curriculum":
        latent = LATENT_STEPS + 2 if entry.has_latents else 0
        learned, passes = lengths.reasoning + latent + answer, latent or 1
    elif entry.stage == "teacher_forced":
        learned, passes = lengths.reasoning + answer, 1
    else:
        learned, passes = (lengths.reasoning if entry.form == "cot" else 0) + answer, 1
    return rows * (question + learned), rows * learned, passes


def evaluation_need(experiment: Experiment, model: str) -> Need:
    """What the evaluations of a model need, adaptive and forced, on all data sets together."""
    size, device = size_of(experiment), device_of(experiment)
    data, settings = experiment.data, experiment.evaluation
    rows = data.generated.test if data.source == "generated" else TEST_ROWS
    rows, batch = min(rows, data.limits.test or rows), experiment.runtime.evaluation_batch_size
    forced = _decoding(device, size, rows, batch, LATENT_STEPS + 2 * GSM8K.answer)
    hours = _decoding(device, size, rows, batch, _longest(experiment.models[model]))
    hours += forced * (settings.max_forced_steps + 1)
    memory = CUDA_GIB + (6 * size.weights + batch * size.vocabulary * LOGIT_BYTES) / 2**30
    return Need(hours * len(settings.datasets), memory, _host_mb(experiment), 0)


def _decoding(device: Device, size: ModelSize, rows: int, batch: int, new: float) -> float:
    """Hours of greedy decoding in batches, each until its longest row has `new` tokens."""
    operations = size.operations(rows * (GSM8K.question + new), rows * new, None, train=False)
    return device.hours(operations, math.ceil(rows / batch) * (new + 1))


def _longest(entry: ModelEntry | PolicyModel) -> int:
    return LONGEST_COMPLETION[getattr(entry, "form", "latent")]


def _host_mb(experiment: Experiment) -> int:
    """Memory of a process that holds a model, in multiples of 4,000 MB."""
    weights = HOST_COPIES * 4 * size_of(experiment).weights / 1e6
    rows = HUB_ROWS_MB if experiment.data.source == "hub" else 0
    return 4000 * math.ceil((HOST_MB + weights + rows) / 4000)


def total(experiment: Experiment, models: list[str]) -> tuple[float, str]:
    """Hours of the base model, models and evaluations for all seeds; in words, with disk."""
    needs = [base_need(experiment)]
    for name in models:
        needs += [training_need(experiment, name), evaluation_need(experiment, name)]
    seeds = len(experiment.seeds)
    hours, disk = seeds * sum(n.hours for n in needs), seeds * sum(n.disk for n in needs)
    return hours, f"{hours:,.0f} hours and {disk / 1e9:,.0f} GB"


def describe(experiment: Experiment, main: list[str]) -> str:
    """One line on the cost of the models `main`, and of all; empty below three hours."""
    hours, whole = total(experiment, list(experiment.models))
    if hours < 3:
        return ""
    appendix = "" if len(main) == len(experiment.models) else f" (with the appendix: {whole})"
    return (
        f"{experiment.experiment}: from nothing, roughly {total(experiment, main)[1]}{appendix} "
        f"on one {device_of(experiment).name}, for a model of {size_of(experiment).weights:.2g} "
        f"weights and {len(experiment.seeds)} seed(s); python -m latent_reasoning.dag.cost lists "
        "each job"
    )


def main(arguments: list[str] | None = None) -> None:
    """Print a table of an experiment's jobs on its own device, for one seed, and their sum."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--config", nargs="+", required=True, metavar="FILE")
    experiment = load(options.parse_args(arguments).config)
    needs = {"base_model": base_need(experiment)}
    for name, entry in experiment.models.items():
        rule = "import_model" if entry.stage == "import" else entry.stage
        needs[f"{rule} {name}"] = training_need(experiment, name)
    evaluations = [evaluation_need(experiment, name) for name in experiment.models]
    needs["evaluate, the longest"] = max(evaluations, key=lambda need: need.hours)
    print(f"| job | GPU GiB | host MB | hours, {device_of(experiment).name} | asked |")
    print("| --- | ---: | ---: | ---: | ---: |")
    on_gpu = experiment.runtime.device != "cpu"
    for job, need in needs.items():
        gpu = f"{need.gpu_gib:.0f}" if on_gpu else "0"
        hours = "< 0.1" if need.hours < 0.1 else f"{need.hours:.1f}"
        print(f"| {job} | {gpu} | {need.host_mb:,} | {hours} | {need.minutes // 60} h |")
    models, seeds = len(experiment.models), len(experiment.seeds)
    whole = total(experiment, list(experiment.models))[1]
    print(f"\n{models} models, {seeds} seed(s), one after another: roughly {whole}")


if __name__ == "__main__":
    run_stage(main)
