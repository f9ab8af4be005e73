"""What an experiment costs, from its configuration: hours, memory and disk of every job.

    python -m latent_reasoning.dag.cost --config config/paper.yaml [config/h100.yaml]

Work is counted as the floating-point operations that are executed, and as the passes through the
model that follow one another: a pass over few tokens (a latent step, a decoded token) takes the
time of its kernels' launch, however few operations it has. A card then takes

    seconds = operations / (share of peak * peak) + passes * PASS_SECONDS

The share of peak is the one number that is fitted: to the published hours of one latent SFT, with
the operations of the public implementation's way (`shared=False`: batches padded to their longest
row, teacher and student as two full readings, logits at every position, each sample of RL on a row
of its own). Its hours of RL are then a prediction that can be checked. The package's own way
(`shared=True`) reads a question once, no padding, and one trajectory a prompt. Nothing here was
measured on a GPU: expect hours within a factor of two, memory within a half.

docs/paper-scale.md shows the figures for the paper; the workflow asks the scheduler for them where
`runtime.memory_mb` and `runtime.runtime_minutes` are null.
"""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from latent_reasoning.config import (
    Architecture,
    ConfigError,
    Experiment,
    LatentSftModel,
    Lora,
    ModelEntry,
    RlModel,
    SftModel,
    Training,
    expand_path,
    load,
)
from latent_reasoning.runtime.command import run_stage

# --------------------------------------------------------------------------------- assumptions

PASS_SECONDS = 0.02
"""A forward or backward pass over few tokens: some 1,000 kernels, started one by one."""
THREAD_RATE = 2e10
"""Operations a second that the laptop experiment reaches on one CPU thread."""
H100_SHARE = 0.7
"""The H100's share of its own peak, relative to the A100's: memory is only 1.6 times as fast."""
MARGIN = 2.0
"""Time asked of the scheduler, over the estimate."""

QUESTION, REASONING, CUT_REASONING, ANSWER = 58, 22, 15, 7
"""Mean tokens, `CUT_REASONING` without the last step. Counted on GSM8K's 6,973 train rows in
GSM8K-Aug form with Llama 3's pre-tokeniser pattern, which splits a little less than the tokenizer.
"""
LONGEST_COT, LONGEST_TEACHER, LONGEST_QUESTION = 168, 161, 126
"""Longest of 64 rows (a GPU's share of the paper's batch): what padding makes of every row."""
PROMPT, LONGEST_PROMPT = 56, 82
"""Mean of RL's prompts (at most 100 tokens), and the longest of 8."""
STRAY_COLUMNS = 3
"""Answers differ in length, and so, padded on the left, do the columns of their latent steps."""
LATENT_STEPS = 6
DISTINCT = 6
"""Distinct completions among a prompt's 16 samples."""
LONGEST_COMPLETION = {"cot": 128, "no_cot": 32, "latent": 48}
"""Tokens until the last row of a validation batch has ended."""
VALIDATION_ROWS, TEST_ROWS = 500, 1319

ACTIVATION = {"hidden": 35, "intermediate": 8}
"""Bytes that autograd keeps for a token and block, by width, under bfloat16 autocast: counted with
saved-tensor hooks (tests/test_cost.py)."""
ADAPTER_ACTIVATION = {"hidden": 8, "intermediate": 4, "rank": 14}
"""The same for LoRA on all seven projections."""
LOGIT_BYTES = 10
"""A logit in bfloat16, its float32 copy and gradient."""
ADAM_BYTES = 16
"""A trained weight: float32 weight, gradient and two moments."""
CUDA_GIB = 2.0
"""The CUDA context and what the allocator cannot use."""
HOST_MB, HOST_COPIES, ROW_BYTES = 6000, 3, 4096
"""Host memory: the process, copies of the float32 weights while loading, a row."""
CHECKPOINTS = 3
"""The last two and the best."""


@dataclass(frozen=True)
class Shape:
    """A Llama's shape."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool = True

    @property
    def key_value_width(self) -> int:
        return self.hidden // self.heads * self.key_value_heads

    @property
    def block_weights(self) -> int:
        """Weights of all matrices in the blocks: what every token is multiplied with."""
        attention = 2 * self.hidden * (self.hidden + self.key_value_width)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def weights(self) -> int:
        """All weights, embeddings and norms included."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.block_weights + embeddings + (2 * self.layers + 1) * self.hidden

    def adapter_weights(self, lora: Lora | None) -> int:
        """Weights of an adapter on all seven projections."""
        if lora is None:
            return 0
        ends = 4 * self.hidden + 2 * (self.hidden + self.key_value_width)
        return lora.r * self.layers * (ends + 3 * (self.hidden + self.intermediate))


SHAPES = {
    "llama-3.2-1b": Shape(2048, 8192, 16, 32, 8, 128_256),
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 49_152),
}
"""By the beginning of a model's name."""
UNKNOWN = SHAPES["llama-3.2-1b"]
"""Assumed of a model whose name tells nothing."""


@dataclass(frozen=True)
class Device:
    """What a job runs on: operations a second, effective ones, and memory."""

    name: str
    rate: float
    pass_seconds: float
    memory_gib: float

    def hours(self, work: Work) -> float:
        """How long some work takes."""
        return (work.operations / self.rate + work.passes * self.pass_seconds) / 3600


@dataclass(frozen=True)
class Work:
    """Executed floating-point operations, and passes that follow one another."""

    operations: float = 0.0
    passes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.passes + other.passes)

    def __mul__(self, times: float) -> Work:
        return Work(self.operations * times, self.passes * times)


@dataclass(frozen=True)
class Need:
    """What one job needs of one device; disk in bytes."""

    work: Work
    hours: float
    gpu_gib: float
    host_mb: int
    disk: float

    @property
    def minutes(self) -> int:
        """Time to ask for: the estimate with its margin, in whole hours."""
        return 60 * math.ceil(MARGIN * self.hours)


# ------------------------------------------------------------------------------------- devices

A100_PEAK, H100_PEAK = 312e12, 989e12
"""Dense bfloat16 operations a second, from the data sheets."""
PUBLISHED_SFT_HOURS, PUBLISHED_SFT_GPUS = 26.0, 2
PUBLISHED_RL_HOURS = 60.0


def a100() -> Device:
    """An A100 with 80 GB."""
    return Device("A100-80", A100_PEAK * published_share(), PASS_SECONDS, 80.0)


def h100() -> Device:
    """An H100 with 80 GB."""
    return Device("H100", H100_PEAK * H100_SHARE * published_share(), PASS_SECONDS, 80.0)


def device_of(experiment: Experiment) -> Device:
    """What the jobs of an experiment run on."""
    runtime = experiment.runtime
    if runtime.device == "cpu":
        name = f"{runtime.threads} CPU thread(s)"
        return Device(name, THREAD_RATE * runtime.threads, 0.0, math.inf)
    return h100() if "h100" in (runtime.gpu_model or "").lower() else a100()


@cache
def published_share() -> float:
    """The share of an A100's peak at which the published latent SFT ran.

    26 hours on two cards for 30,000 steps of 128 examples, worked as the public code does.
    """
    shape, training = SHAPES["llama-3.2-1b"], Training(steps=30_000, batch_size=64)
    entry = LatentSftModel(training=training, lora=Lora())
    work = training_work(shape, entry, micro_batch=64, shared=False)
    seconds = 3600 * PUBLISHED_SFT_HOURS - work.passes * PASS_SECONDS
    return work.operations / seconds / A100_PEAK


# ---------------------------------------------------------------------------------------- work


def reading(
    shape: Shape, lora: Lora | None, tokens: float, keys: float, logits: float, *, train: bool
) -> float:
    """Operations of reading tokens that see `keys` others each, with logits at some of them.

    Two a weight and token forward. Backward, as many for the gradient of the activations, and
    again for that of the weights, which frozen ones do not get.
    """
    matrices = 2 * shape.block_weights * tokens + 2 * shape.hidden * shape.vocabulary * logits
    adapter = 2 * shape.adapter_weights(lora) * tokens
    attention = 4 * shape.layers * shape.hidden * tokens * keys
    if not train:
        return matrices + adapter + attention
    return (3 if lora is None else 2) * matrices + 3 * (adapter + attention)


def decoding(
    shape: Shape, lora: Lora | None, *, rows: float, batch: float, prompt: float, new: float
) -> Work:
    """Greedy decoding in batches: each lasts until its longest row has `new` tokens."""
    keys = prompt + new / 2
    operations = reading(shape, lora, rows * prompt, prompt / 2, 0, train=False)
    operations += reading(shape, lora, rows * new, keys, rows * new, train=False)
    return Work(operations, math.ceil(rows / batch) * (new + 1))


def training_work(
    shape: Shape, entry: ModelEntry, *, micro_batch: int | None, shared: bool
) -> Work:
    """A whole training with its validations; `shared` as the package does it, else as published."""
    training = entry.training
    if entry.stage == "rl":
        step = rl_step(shape, entry, shared=shared)
    else:
        size = min(micro_batch or training.batch_size, training.batch_size)
        step_of = latent_step if entry.stage == "latent_sft" else token_step
        step = step_of(shape, entry, size, shared=shared) * (training.batch_size / size)
    rows = training.validation_rows or VALIDATION_ROWS
    validations = training.steps // training.validate_every
    return step * training.steps + answering(shape, entry, rows) * validations


def token_step(shape: Shape, entry: SftModel, rows: int, *, shared: bool) -> Work:
    """Forward and backward of one micro-batch of token SFT."""
    own = (REASONING if entry.form == "cot" else 0) + ANSWER
    tokens = QUESTION + own if shared else LONGEST_COT - (0 if entry.form == "cot" else REASONING)
    logits = own if shared else tokens
    train = reading(shape, entry.lora, rows * tokens, tokens / 2, rows * logits, train=True)
    return Work(train, passes=2)


def latent_step(shape: Shape, entry: LatentSftModel, rows: int, *, shared: bool) -> Work:
    """Forward and backward of one micro-batch of latent SFT: teacher and student."""
    reasoning = CUT_REASONING if entry.drop_last_step else REASONING
    teacher, student = reasoning + ANSWER, latent_steps(entry) + 2 + ANSWER
    columns = latent_steps(entry)
    if shared:
        tokens, logits, passes = QUESTION + teacher + student, teacher + student, columns + 3
    else:
        tokens = LONGEST_TEACHER + LONGEST_QUESTION + student
        logits, passes = tokens, columns + STRAY_COLUMNS + 3
    train = reading(shape, entry.lora, rows * tokens, QUESTION, rows * logits, train=True)
    return Work(train, 2 * passes)


def latent_steps(entry: LatentSftModel) -> int:
    """Latent steps of a mean row of three steps."""
    steps = entry.latent_steps
    n = steps.factor * 3 + steps.bias
    n = n if steps.min is None else max(steps.min, n)
    return n if steps.max is None else min(steps.max, n)


def rl_step(shape: Shape, entry: RlModel, *, shared: bool) -> Work:
    """One step of GRPO: rollout, scores under policy and reference, gradient."""
    prompts, new = entry.training.batch_size, entry.max_new_tokens
    think = LATENT_STEPS + 2
    if shared:
        rows, prompt, own = prompts * min(DISTINCT, entry.group_size), PROMPT, ANSWER
        tokens, scoring = prompts * (prompt + think) + rows * own, think + 2
        sampled = tokens
    else:
        rows, prompt, own = prompts * entry.group_size, LONGEST_PROMPT, new
        tokens, scoring = rows * (prompt + own), think + STRAY_COLUMNS + 2
        sampled = rows * (prompt + new)
    logits = rows * own
    read = [
        reading(shape, entry.lora, sampled, prompt, logits, train=False),
        reading(shape, None, tokens, prompt, logits, train=False),
        reading(shape, entry.lora, tokens, prompt, logits, train=True),
    ]
    return Work(sum(read), passes=new + 1 + 3 * scoring)


def answering(shape: Shape, entry: ModelEntry, rows: int, batch: int = 128) -> Work:
    """Greedy answers of a trained model to some questions."""
    form = getattr(entry, "form", "latent")
    new = LONGEST_COMPLETION[form]
    return decoding(
        shape, getattr(entry, "lora", None), rows=rows, batch=batch, prompt=QUESTION, new=new
    )


def evaluation_work(experiment: Experiment, entry: ModelEntry, shape: Shape) -> Work:
    """The evaluation of a model on all data sets: adaptive, and at every forced length."""
    limit = experiment.data.limits.test or math.inf
    generated = experiment.data.source == "generated"
    rows = int(min(experiment.data.generated.test if generated else TEST_ROWS, limit))
    batch = experiment.runtime.evaluation_batch_size
    merged = {"rows": rows, "batch": batch, "prompt": QUESTION + LATENT_STEPS, "new": 2 * ANSWER}
    forced = decoding(shape, None, **merged) * (experiment.evaluation.max_forced_steps + 1)
    adaptive = answering(shape, entry.model_copy(update={"lora": None}), rows, batch)
    return (adaptive + forced) * len(experiment.evaluation.datasets)


# -------------------------------------------------------------------------------------- memory


def training_memory(shape: Shape, entry: ModelEntry, micro_batch: int | None) -> float:
    """GiB on the GPU at the peak of a training step, as the package does it."""
    trained = shape.adapter_weights(entry.lora) or shape.weights
    frozen = 0 if entry.lora is None else shape.weights
    size = min(micro_batch or entry.training.batch_size, entry.training.batch_size)
    if entry.stage == "rl":
        rows = size * min(DISTINCT, entry.group_size)
        tokens = size * (PROMPT + LATENT_STEPS + 2) + rows * ANSWER
        passes, logits = LATENT_STEPS + 4, rows * ANSWER
        frozen += shape.weights if entry.lora is None else 0  # the reference policy
    elif entry.stage == "latent_sft":
        own = CUT_REASONING + latent_steps(entry) + 2 + 2 * ANSWER
        tokens, passes, logits = size * (QUESTION + own), latent_steps(entry) + 3, size * own
    else:
        own = REASONING + ANSWER
        tokens, passes, logits = size * (QUESTION + own), 1, size * own
    # A frozen weight's bfloat16 copy is made anew in every pass, and kept for its backward.
    copies = 2 * shape.block_weights * (1 if entry.lora is None else passes)
    cached = 4 * shape.layers * shape.key_value_width * tokens
    activations = shape.layers * tokens * activation_bytes(shape, entry.lora)
    logit_bytes = logits * shape.vocabulary * LOGIT_BYTES
    weights = 4 * frozen + ADAM_BYTES * trained
    return CUDA_GIB + (weights + copies + cached + activations + logit_bytes) / 2**30


def activation_bytes(shape: Shape, lora: Lora | None) -> float:
    """Bytes kept for the backward pass, a token and block."""
    kept = ACTIVATION["hidden"] * shape.hidden + ACTIVATION["intermediate"] * shape.intermediate
    if lora is not None:
        adapter = ADAPTER_ACTIVATION
        kept += adapter["hidden"] * shape.hidden + adapter["intermediate"] * shape.intermediate
        kept += adapter["rank"] * lora.r
    return kept


def evaluation_memory(shape: Shape, batch: int, new_tokens: int) -> float:
    """GiB on the GPU while decoding: weights, their copies, the cache and one column of logits."""
    cached = 4 * shape.layers * shape.key_value_width * batch * (QUESTION + new_tokens)
    logits = batch * shape.vocabulary * LOGIT_BYTES
    return CUDA_GIB + (4 * shape.weights + 2 * shape.block_weights + cached + logits) / 2**30


def host_memory(experiment: Experiment, shape: Shape) -> int:
    """MB of host memory of a job that holds a model, in whole 4,000."""
    weights = HOST_COPIES * 4 * shape.weights / 1e6
    rows = 400_000 * ROW_BYTES / 1e6 if experiment.data.source == "hub" else 0
    return 4000 * math.ceil((HOST_MB + weights + rows) / 4000)


# ---------------------------------------------------------------------------------------- needs


def training_need(experiment: Experiment, model: str, device: Device | None = None) -> Need:
    """What the job that makes a model needs, for one seed."""
    shape, device = shape_of(experiment), device or device_of(experiment)
    entry, host = experiment.models[model], host_memory(experiment, shape)
    disk = 4.0 * shape.weights
    if entry.stage == "import":
        return Need(Work(), 0.1, 0.0, host, disk)
    micro = experiment.runtime.micro_batch_size
    work = training_work(shape, entry, micro_batch=micro, shared=True)
    trained = shape.adapter_weights(entry.lora) or shape.weights
    disk += CHECKPOINTS * (ADAM_BYTES - 4) * trained
    memory = training_memory(shape, entry, micro or entry.training.batch_size)
    return Need(work, device.hours(work), memory, host, disk)


def evaluation_need(experiment: Experiment, model: str, device: Device | None = None) -> Need:
    """What the evaluations of a model need, all data sets together, for one seed."""
    shape, device = shape_of(experiment), device or device_of(experiment)
    work = evaluation_work(experiment, experiment.models[model], shape)
    batch, new = experiment.runtime.evaluation_batch_size, experiment.evaluation.max_new_tokens
    memory = evaluation_memory(shape, batch, new)
    return Need(work, device.hours(work), memory, host_memory(experiment, shape), 0.0)


def longest_evaluation(experiment: Experiment, device: Device) -> Need:
    """What the evaluation of the model that takes longest needs."""
    needs = [evaluation_need(experiment, name, device) for name in experiment.models]
    return max(needs, key=lambda need: need.hours)


def base_need(experiment: Experiment, device: Device | None = None) -> Need:
    """What the job that makes or fetches the base model needs, for one seed."""
    shape, device = shape_of(experiment), device or device_of(experiment)
    host = host_memory(experiment, shape)
    if experiment.base.source != "scratch":
        return Need(Work(), 0.5, 0.0, host, 4.0 * shape.weights)
    entry = SftModel(training=experiment.base.training)
    work = training_work(shape, entry, micro_batch=None, shared=True)
    disk = (4 + CHECKPOINTS * (ADAM_BYTES - 4)) * shape.weights
    memory = training_memory(shape, entry, experiment.runtime.micro_batch_size)
    return Need(work, device.hours(work), memory, host, disk)


# ------------------------------------------------------------------------------- an experiment


@dataclass(frozen=True)
class Cost:
    """Hours on one device and bytes on disk; finished results are not subtracted."""

    hours: float
    bytes: float


def estimate(experiment: Experiment, models: list[str]) -> Cost:
    """The cost of the base model and of some models, their evaluations included, for all seeds."""
    needs = [base_need(experiment)]
    for name in models:
        needs += [training_need(experiment, name), evaluation_need(experiment, name)]
    seeds = len(experiment.seeds)
    return Cost(seeds * sum(n.hours for n in needs), seeds * sum(n.disk for n in needs))


def describe(experiment: Experiment, main: list[str]) -> str:
    """One line on the cost of the models `main`, and of all; empty below three hours."""
    part, whole = estimate(experiment, main), estimate(experiment, list(experiment.models))
    if whole.hours < 3:
        return ""
    appendix = (
        "" if len(main) == len(experiment.models) else f" (with the appendix: {_readable(whole)})"
    )
    return (
        f"{experiment.experiment}: from nothing, roughly {_readable(part)}{appendix} on one "
        f"{device_of(experiment).name}, for a model of {shape_of(experiment).weights:.2g} weights "
        f"and {len(experiment.seeds)} seed(s); python -m latent_reasoning.dag.cost tells each job"
    )


def _readable(cost: Cost) -> str:
    return f"{cost.hours:,.0f} hours and {cost.bytes / 1e9:,.0f} GB"


def shape_of(experiment: Experiment) -> Shape:
    """The base model's shape: of `scratch` as configured, of others by their name and size."""
    base = experiment.base
    if base.source == "scratch":
        return scratch_shape(base.architecture, vocabulary=128)
    names = [base.hub_id or "", *([_file_name(base.path)] if base.path else [])]
    for name in (name.split("/")[-1].lower() for name in names):
        for beginning, shape in SHAPES.items():
            if name.startswith(beginning):
                return shape
    for name in names:
        match = re.search(r"(\d+(?:\.\d+)?)([BM])(?![a-z])", name, re.IGNORECASE)
        if match:
            return _scaled(float(match[1]) * {"B": 1e9, "M": 1e6}[match[2].upper()])
    return UNKNOWN


def scratch_shape(architecture: Architecture, vocabulary: int) -> Shape:
    """The shape of a model trained from scratch."""
    return Shape(
        hidden=architecture.hidden_size,
        intermediate=architecture.intermediate_size,
        layers=architecture.num_hidden_layers,
        heads=architecture.num_attention_heads,
        key_value_heads=architecture.num_key_value_heads,
        vocabulary=vocabulary,
        tied=architecture.tie_word_embeddings,
    )


def _scaled(weights: float) -> Shape:
    """A model as deep as the unknown one, its widths made to hold about so many weights."""
    head = UNKNOWN.hidden // UNKNOWN.heads
    heads = max(UNKNOWN.heads * math.sqrt(weights / UNKNOWN.weights) // 4 * 4, 4)
    hidden = int(heads) * head
    return Shape(
        hidden, 4 * hidden, UNKNOWN.layers, int(heads), int(heads) // 4, UNKNOWN.vocabulary
    )


def _file_name(path: str) -> str:
    try:
        return Path(expand_path(path)).name
    except ConfigError:
        return path


# --------------------------------------------------------------------------------------- tables


def job_table(experiment: Experiment, devices: list[Device]) -> str:
    """Every job of an experiment and seed, in Markdown: memory, hours, and what is asked for."""
    hours = [f"hours, {device.name}" for device in devices]
    asked = [f"asked, {device.name}" for device in devices]
    lines = [
        _row("job", "GPU GiB", "host MB", *hours, *asked),
        _row("---", *["---:"] * (2 + 2 * len(devices))),
    ]
    jobs = [("base_model", lambda device: base_need(experiment, device))]
    for name, entry in experiment.models.items():
        rule = "import_model" if entry.stage == "import" else entry.stage
        jobs.append((f"{rule} {name}", lambda d, name=name: training_need(experiment, name, d)))
    jobs.append(("evaluate, the longest", lambda device: longest_evaluation(experiment, device)))
    for job, need_on in jobs:
        needs = [need_on(device) for device in devices]
        gpu = f"{needs[0].gpu_gib:.0f}" if needs[0].gpu_gib else "0"
        shown = [_hours(need.hours) for need in needs]
        limits = [f"{need.minutes // 60} h" for need in needs]
        lines.append(_row(job, gpu, f"{needs[0].host_mb:,}", *shown, *limits))
    return "\n".join(lines)


def check_table() -> str:
    """The published hours beside what the formulas say of the public code's way."""
    shape, card = SHAPES["llama-3.2-1b"], a100()
    sft = LatentSftModel(training=Training(steps=30_000, batch_size=64), lora=Lora())
    rl = RlModel(
        **{"from": "latent-6"}, training=Training(steps=60_000, batch_size=8), lora=Lora(r=32)
    )
    lines = [
        _row("run", "published", "by the formulas, the public way", "EFLOP", "passes a step"),
        _row("---", "---", "---", "---:", "---:"),
    ]
    for name, published, entry, micro in (
        ("latent SFT, each of 2 A100", f"{PUBLISHED_SFT_HOURS:.0f} h (just under)", sft, 64),
        ("RL, one A100", f"about {PUBLISHED_RL_HOURS:.0f} h", rl, None),
    ):
        work = training_work(shape, entry, micro_batch=micro, shared=False)
        fitted = " (fitted)" if entry is sft else " (predicted)"
        passes = work.passes / entry.training.steps
        hours = _hours(card.hours(work)) + " h" + fitted
        lines.append(_row(name, published, hours, _exa(work), f"{passes:.0f}"))
    return "\n".join(lines)


def ratio_table() -> str:
    """Executed operations of a step, the public way against the package's."""
    shape = SHAPES["llama-3.2-1b"]
    training = Training(steps=1, batch_size=64)
    latent = LatentSftModel(training=training, lora=Lora())
    token = SftModel(training=training, lora=Lora())
    rl = RlModel(**{"from": "latent"}, training=Training(steps=1, batch_size=8), lora=Lora(r=32))
    steps = {
        "latent SFT": [latent_step(shape, latent, 64, shared=s) for s in (False, True)],
        "CoT SFT": [token_step(shape, token, 64, shared=s) for s in (False, True)],
        "GRPO": [rl_step(shape, rl, shared=s) for s in (False, True)],
    }
    lines = [
        _row("step", "public, TFLOP", "ours, TFLOP", "ratio", "passes, public", "passes, ours"),
        _row("---", *["---:"] * 5),
    ]
    for name, (naive, fast) in steps.items():
        ratio = naive.operations / fast.operations
        tera = [f"{work.operations / 1e12:,.1f}" for work in (naive, fast)]
        lines.append(_row(name, *tera, f"{ratio:.1f}", f"{naive.passes:.0f}", f"{fast.passes:.0f}"))
    return "\n".join(lines)


def memory_table(experiment: Experiment, models: list[str], sizes: list[int]) -> str:
    """GPU memory of trainings by the size of the micro-batch; RL's step has only eight prompts."""
    shape = shape_of(experiment)
    lines = [
        _row("GPU GiB at a micro-batch of", *map(str, sizes)),
        _row("---", *["---:"] * len(sizes)),
    ]
    for name in models:
        entry = experiment.models[name]
        lines.append(_row(name, *(f"{training_memory(shape, entry, size):.0f}" for size in sizes)))
    return "\n".join(lines)


MEMORY_SHOWN = ("cot-sft", "latent-6", "latent-6-by-1", "latent-6-rl")
MICRO_BATCHES = [8, 16, 32, 64, 128]


def scale_tables(experiment: Experiment) -> str:
    """The generated part of docs/paper-scale.md."""
    shape = shape_of(experiment)
    cards = [a100(), h100()]
    rates = "; ".join(
        f"{card.name} {card.rate / 1e12:.0f} TFLOP/s ({share:.1%} of {peak / 1e12:.0f})"
        for card, peak in zip(cards, (A100_PEAK, H100_PEAK), strict=True)
        for share in [card.rate / peak]
    )
    lora = experiment.stages.latent_sft.get("lora") or {}
    adapter = shape.adapter_weights(Lora(**lora))
    parts = [
        f"Weights {shape.weights / 1e9:.3f}e9, {shape.block_weights / 1e9:.3f}e9 of them in the "
        f"blocks' matrices; adapter of rank {lora.get('r', 0)} {adapter / 1e6:.0f}e6. Effective "
        f"rates: {rates}. A pass over few tokens: {1000 * PASS_SECONDS:.0f} ms.",
        "### The published hours",
        check_table(),
        "### A step, as published and here",
        ratio_table(),
        "### Every job",
        job_table(experiment, cards),
        "### GPU memory by micro-batch",
        memory_table(experiment, list(MEMORY_SHOWN), MICRO_BATCHES),
    ]
    return "\n\n".join(parts)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _hours(hours: float) -> str:
    if hours < 0.1:
        return "< 0.1"
    return f"{hours:.1f}" if hours < 10 else f"{hours:.0f}"


def _exa(work: Work) -> str:
    return f"{work.operations / 1e18:,.1f}"


def main(arguments: list[str] | None = None) -> None:
    """Print the table of an experiment's jobs on its own device, and their sum."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--config", nargs="+", required=True, metavar="FILE")
    experiment = load(options.parse_args(arguments).config)
    print(job_table(experiment, [device_of(experiment)]))
    whole = estimate(experiment, list(experiment.models))
    models, seeds = len(experiment.models), len(experiment.seeds)
    print(f"\n{models} models, {seeds} seed(s), one after another: roughly {_readable(whole)}")


if __name__ == "__main__":
    run_stage(main)
