"""The typed configuration: one source for defaults, checks, the JSON schema and the documentation.

An experiment is one YAML file (a second may override it). `load` merges the files, fills every
default, checks everything and returns an `Experiment`; anything wrong is a `ConfigError` that names
the file, the key and what is allowed. Which keys a result depends on is said in `science.py`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

PROJECT_ROOT = Path(__file__).resolve().parents[3]
"""Relative paths of a configuration start here (the folder that holds the Snakefile)."""

NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
DatasetName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


def _with_exponent(value: Any) -> Any:
    """Read `1e-4` as a number: YAML 1.1 takes it for text where the mantissa has no point."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        return float(value)
    return value


Number = Annotated[float, BeforeValidator(_with_exponent)]
Share = Annotated[float, Field(ge=0, le=1), BeforeValidator(_with_exponent)]
Positive = Annotated[float, Field(gt=0), BeforeValidator(_with_exponent)]
NonNegative = Annotated[float, Field(ge=0), BeforeValidator(_with_exponent)]


class UserError(Exception):
    """What a user can mend: the message says in one line what, where and what to do."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot be run; the message names file, key and what is allowed."""


class Section(BaseModel):
    """A mapping of the configuration: unknown keys are refused, and no value changes its type."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, validate_default=True
    )


# --------------------------------------------------------------------------------------- data


class GeneratedData(Section):
    """Word problems made by the project, in GSM8K-Aug form (`data/generator.py`)."""

    train: PositiveInt = Field(24000, description="Rows of the training split.")
    validation: PositiveInt = Field(500, description="Rows of the validation split.")
    test: PositiveInt = Field(2000, description="Rows of the test split.")
    max_steps: PositiveInt = Field(5, description="Longest chain of operations.")
    step_weights: list[Positive] = Field(
        [2, 3, 3, 2, 1], description="Relative frequency of 1, 2, .. `max_steps` operations."
    )
    modulus: Annotated[int, Field(ge=3, le=12)] = Field(
        7, description="Positions of the dial: values are 0 .. modulus - 1."
    )
    seed: Count = Field(0, description="Seed of the generator.")

    @model_validator(mode="after")
    def _weights_match(self) -> GeneratedData:
        if len(self.step_weights) != self.max_steps:
            raise ValueError(
                f"step_weights has {len(self.step_weights)} values for max_steps = "
                f"{self.max_steps}: give one weight for each number of steps"
            )
        return self


class Augmentation(Section):
    """Extra training rows made from those at hand; validation and test are never augmented."""

    method: Literal["none", "numeric_perturbation"] = Field(
        "none",
        description="`numeric_perturbation` replaces the numbers that occur in both question and "
        "steps, recomputes the chain and keeps clean results.",
    )
    copies: PositiveInt = Field(1, description="Perturbed copies tried for each training row.")
    seed: Count = Field(0, description="Seed of the perturbation.")


class Prompt(Section):
    """What stands before the question."""

    training: str = Field("Question: ", description="Prefix of the question in training text.")
    evaluation: str = Field(
        "Question: ",
        description="Prefix in evaluation and RL prompts; the public code uses none.",
    )


class RowLimits(Section):
    """Take only the first rows of a split; null takes all."""

    train: PositiveInt | None = Field(None, description="First rows of train, before the split.")
    validation: PositiveInt | None = Field(None, description="First rows of validation.")
    test: PositiveInt | None = Field(None, description="First rows of test.")


class Data(Section):
    """Raw rows, their filter, split and form."""

    source: Literal["generated", "local", "hub"] = Field(
        "generated",
        description="`generated` makes rows; `local` reads a folder with train, validation and "
        "test as .jsonl or .parquet; `hub` reads a Hugging Face dataset.",
    )
    path: str | None = Field(
        None,
        description="Folder of the `local` source. May hold ${LATENT_REASONING_DATA}; a relative "
        "path starts at the project root.",
    )
    hub_id: str | None = Field(None, description="Dataset id of the `hub` source.")
    revision: str | None = Field(None, description="Pinned revision of the `hub` source.")
    licence: str | None = Field(None, description="Licence of the rows, for the models' cards.")
    generated: GeneratedData = Field(
        default_factory=GeneratedData, description="Settings of the `generated` source."
    )
    natural_language: bool = Field(
        False, description="Steps are sentences: a space goes before each (GSM8K-Aug-NL)."
    )
    prompt: Prompt = Field(default_factory=Prompt, description="Prefixes of the question.")
    sft_share: Annotated[Share, Field(gt=0)] = Field(
        0.85, description="Share of the shuffled train rows given to SFT; the rest is RL's."
    )
    split_seed: Count = Field(42, description="Seed of that shuffle.")
    drop_negative_for_sft: bool = Field(
        True, description="Latent SFT drops rows with a negative answer."
    )
    max_tokens: PositiveInt = Field(
        512,
        description="SFT drops rows of more tokens than this, less four separators (so 508).",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="A malformed row stops the stage, or is skipped and counted."
    )
    special_token_text: Literal["error", "skip", "escape", "keep"] = Field(
        "error",
        description="Literal special-token text in a question: refuse, skip the row, break it up "
        "with a space, or read it as the token, as the public code does.",
    )
    augmentation: Augmentation = Field(
        default_factory=Augmentation, description="Extra training rows."
    )
    limits: RowLimits = Field(default_factory=RowLimits, description="Take only the first rows.")
    extra_tests: dict[DatasetName, str] = Field(
        default_factory=dict,
        description="More test sets: name -> file of JSON lines with question and answer "
        "(`${LATENT_REASONING_DATA}` allowed).",
    )

    @field_validator("extra_tests")
    @classmethod
    def _reserved(cls, value: dict[str, str]) -> dict[str, str]:
        taken = sorted(set(value) & {"sft", "rl", "train", "validation", "test", "summary"})
        if taken:
            raise ValueError(f"names of splits cannot name another test set: {', '.join(taken)}")
        return value

    @model_validator(mode="after")
    def _source_is_complete(self) -> Data:
        if self.source == "local" and not self.path:
            raise ValueError("source: local needs path (a folder with train, validation, test)")
        if self.source == "hub" and not self.hub_id:
            raise ValueError("source: hub needs hub_id (or source: local with path)")
        return self


# ----------------------------------------------------------------------------------- training


class Training(Section):
    """One optimisation run."""

    steps: Count = Field(..., description="Optimiser steps.")
    batch_size: PositiveInt = Field(
        64, description="Examples (RL: prompts) an optimiser step, over all micro-batches."
    )
    learning_rate: Positive = Field(1e-3, description="Peak learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Decay after warm-up: cosine or linear to 0, or none."
    )
    learning_rate_floor: Share = Field(
        0.0, description="Share of the peak that the cosine ends at (the paper: 0)."
    )
    warmup_steps: Count = Field(0, description="Linear warm-up from 0.")
    weight_decay: NonNegative = Field(
        0.1, description="Not applied to norms, biases and the special tokens' own modules."
    )
    betas: tuple[Share, Share] = Field((0.9, 0.999), strict=False, description="AdamW betas.")
    eps: Positive = Field(1e-8, description="AdamW epsilon.")
    max_grad_norm: Positive = Field(1.0, description="Gradient clipping by global norm.")
    accumulation: Literal["examples", "tokens"] = Field(
        "examples",
        description="Micro-batches are weighted by examples (the public code: the loss then "
        "depends on the micro-batch) or by labels (token-exact). RL is always token-exact.",
    )
    validate_every: PositiveInt = Field(200, description="Steps between validations.")
    validation_rows: PositiveInt | None = Field(
        None, description="First rows of validation used during training; null: all."
    )
    select: Literal["best", "last"] = Field(
        "best", description="Keep the checkpoint of best validation accuracy, or the last."
    )
    stop_at_accuracy: Share | None = Field(
        None, description="End early once validation accuracy reaches this."
    )

    @model_validator(mode="after")
    def _floor_of_a_cosine(self) -> Training:
        if self.learning_rate_floor and self.schedule != "cosine":
            raise ValueError(
                f"learning_rate_floor: {self.learning_rate_floor} belongs to schedule: cosine, not "
                f"to {self.schedule}"
            )
        return self


class Lora(Section):
    """Low-rank adaptation; the latent modules are trained in full beside it."""

    r: PositiveInt = Field(128, description="Rank.")
    alpha: Positive = Field(32, description="Scaling numerator.")
    dropout: Share = Field(0.1, description="Dropout on the adapter's input.")
    target_modules: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"],
        description="Names of the linear modules that get an adapter.",
    )


# --------------------------------------------------------------------------------- base model


class Architecture(Section):
    """A causal LM trained from scratch (a Llama)."""

    hidden_size: PositiveInt = Field(64, description="Width d.")
    intermediate_size: PositiveInt = Field(128, description="Width of the MLP.")
    num_hidden_layers: PositiveInt = Field(2, description="Blocks.")
    num_attention_heads: PositiveInt = Field(4, description="Attention heads.")
    num_key_value_heads: PositiveInt = Field(4, description="Key-value heads.")
    max_position_embeddings: PositiveInt = Field(512, description="Longest sequence.")
    tie_word_embeddings: bool = Field(True, description="One matrix for input and output.")
    rope_theta: Positive = Field(10000.0, description="Base of the rotary position embedding.")
    initializer_range: Positive = Field(0.02, description="Std of the random initial weights.")

    @model_validator(mode="after")
    def _heads_fit(self) -> Architecture:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size = {self.hidden_size} is no multiple of twice num_attention_heads = "
                f"{self.num_attention_heads} (rotary embeddings need heads of even width)"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        return self


class ReasoningMix(Section):
    """Shares of the styles of reasoning text (they are normalised to sum to one)."""

    full: NonNegative = Field(1.0, description="All steps, as equations.")
    results_only: NonNegative = Field(0.0, description="`Results:` and the intermediate values.")
    drop_last: NonNegative = Field(0.0, description="All steps but the last.")
    truncated: NonNegative = Field(0.0, description="A random number of first steps.")
    results_only_drop_last: NonNegative = Field(0.0, description="`drop_last`, results alone.")
    results_only_truncated: NonNegative = Field(0.0, description="`truncated`, results alone.")
    results_only_waiting: NonNegative = Field(
        0.0, description="Results alone, the last one repeated a random number of times."
    )

    @model_validator(mode="after")
    def _not_empty(self) -> ReasoningMix:
        if sum(self.model_dump().values()) <= 0:
            raise ValueError("all shares are 0: at least one style of text is needed")
        return self


class Base(Section):
    """The model everything starts from."""

    source: Literal["scratch", "local", "gguf", "hub"] = Field(
        "scratch",
        description="`scratch` trains a tiny Llama on generated text; `local` reads a Hugging "
        "Face folder; `gguf` a GGUF file; `hub` a model id.",
    )
    path: str | None = Field(
        None,
        description="Folder (`local`) or file (`gguf`). May hold ${LATENT_REASONING_BASE}; a "
        "relative path starts at the project root.",
    )
    hub_id: str | None = Field(None, description="Model id of the `hub` source.")
    revision: str | None = Field(None, description="Pinned revision of the `hub` source.")
    licence: str | None = Field(None, description="Licence of the weights, for the model's card.")
    architecture: Architecture = Field(
        default_factory=Architecture, description="Shape, for `scratch`."
    )
    texts: ReasoningMix = Field(
        default_factory=lambda: ReasoningMix(
            full=0.4, results_only=0.3, drop_last=0.15, truncated=0.15
        ),
        description="Styles of the text, for `scratch`.",
    )
    training: Training = Field(
        default_factory=lambda: Training(steps=2000, learning_rate=3e-3, betas=(0.9, 0.98)),
        description="Optimisation, for `scratch`.",
    )

    @model_validator(mode="after")
    def _source_is_complete(self) -> Base:
        if self.source in ("local", "gguf") and not self.path:
            raise ValueError(f"source: {self.source} needs path")
        if self.source == "hub" and not self.hub_id:
            raise ValueError("source: hub needs hub_id (or source: local with path)")
        return self


# -------------------------------------------------------------------------------------- model


class Model(Section):
    """The latent reasoner around the base model."""

    recurrent_filter: Literal["none", "MLP", "linear", "linear_ln", "linear_ECF", "SRE"] = Field(
        "MLP", description="What turns a hidden state into the next input embedding."
    )
    stop_head_temperature: Positive | None = Field(
        None, description="Divides the two stop logits; null: 1."
    )
    detach_stop_head: bool = Field(
        False, description="No gradient from the stop head into the hidden states."
    )
    allow_rethinking: bool = Field(
        False, description="START may be sampled after STOP (the public code: true)."
    )
    start_token_from: str | None = Field(
        None,
        description="Text whose first token's embedding initialises START; null: the mean row.",
    )
    end_token_from: str | None = Field(
        None,
        description="The same for END, which the model reads where it stops.",
    )


# ------------------------------------------------------------------------------------- models


class LatentSteps(Section):
    """n = min(max, max(min, factor * k + bias)) latent steps for k reasoning steps."""

    factor: int = Field(0, description="c: latent steps for each reasoning step.")
    bias: int = Field(0, description="b: latent steps beside those.")
    min: Count | None = Field(6, description="Least n; null: no bound.")
    max: Count | None = Field(6, description="Largest n; null: no bound.")

    @model_validator(mode="after")
    def _in_order(self) -> LatentSteps:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min = {self.min} is above max = {self.max}")
        return self


class Distillation(Section):
    """Distances between teacher and student states."""

    codi_weight: NonNegative = Field(20.0, description="Weight at the target token; 0: off.")
    meaned_weight: NonNegative = Field(
        0.0, description="Weight of the distance of mean reasoning states; 0: off."
    )
    block_range: Annotated[tuple[Count, Count], Field(strict=False)] | None = Field(
        None, description="First and last block compared (0-based, inclusive); null: all."
    )
    distance: Literal["smooth_l1", "l1", "l2"] = Field("smooth_l1", description="Elementwise loss.")
    normalise: Literal["layerwise_std", "std", "none"] = Field(
        "layerwise_std",
        description="Divide by the std of the teacher's states of each block, "
        "of all blocks, or not at all.",
    )
    teacher: str = Field(
        "self",
        description="`self`: one set of weights is both; or the name of an `sft` model with "
        "form cot, frozen, whose target states are computed once.",
    )
    traces: Literal["data", "teacher"] = Field(
        "data",
        description="The reasoning the teacher reads: the data's steps, or its own traces, kept "
        "only where their answer is right.",
    )

    @model_validator(mode="after")
    def _range_in_order(self) -> Distillation:
        if self.block_range is not None and self.block_range[0] > self.block_range[1]:
            first, last = self.block_range
            raise ValueError(f"block_range: the first block, {first}, comes after the last, {last}")
        return self


class SftModel(Section):
    """Token SFT: chain of thought, or the answer alone."""

    stage: Literal["sft"] = Field("sft", description="Token SFT.")
    start: str = Field("base", alias="from", description="`base` or the name of another model.")
    rows: Literal["sft", "all"] = Field(
        "sft", description="SFT's share of the train rows, or all of them (the appendix)."
    )
    form: Literal["cot", "no_cot"] = Field("cot", description="With or without the steps.")
    training: Training = Field(..., description="Optimisation.")
    lora: Lora | None = Field(None, description="null: full fine-tuning.")
    save: Literal["merged", "adapter"] = Field(
        "merged", description="Merge the adapter into the weights, or keep it beside them too."
    )


class LatentSftModel(Section):
    """Latent SFT by self-distillation."""

    stage: Literal["latent_sft"] = Field("latent_sft", description="Latent SFT.")
    start: str = Field("base", alias="from", description="`base` or the name of another model.")
    rows: Literal["sft", "all"] = Field(
        "sft", description="SFT's share of the train rows, or all of them (the appendix)."
    )
    model: Model = Field(default_factory=Model, description="Overrides the section `model`.")
    latent_steps: LatentSteps = Field(
        default_factory=LatentSteps, description="Latent steps of a training example."
    )
    distillation: Distillation = Field(
        default_factory=Distillation, description="Distillation loss and teacher."
    )
    drop_last_step: bool = Field(True, description="The teacher's text drops its last step.")
    shift_target: bool = Field(True, description="Target token: the one after `:`, not `:`.")
    mask_latent_labels: bool = Field(False, description="The student learns only the answer.")
    learn_start: bool = Field(False, description="START is a label too (the public code).")
    stop_label_smoothing: Share = Field(
        0.0, description="Mass moved to the other of the two stop decisions."
    )
    random_readout: Share = Field(
        0.0,
        description="Share of the rows that answer after a random number of their latent steps "
        "(at least as many as the teacher's text has), their stop labels unchanged.",
    )
    teacher_texts: ReasoningMix = Field(
        default_factory=ReasoningMix, description="Styles of the teacher's reasoning."
    )
    forced_steps: Count | None = Field(
        None, description="Evaluate with this many latent steps (the appendix: 6); null: adaptive."
    )
    training: Training = Field(..., description="Optimisation.")
    lora: Lora | None = Field(None, description="null: full fine-tuning.")
    save: Literal["merged", "adapter"] = Field(
        "merged", description="Merge the adapter into the weights, or keep it beside them too."
    )


class Reward(Section):
    """Reward of a sample."""

    penalty: NonNegative = Field(
        1e-4, description="Size of the length penalty where the group meets the requirement."
    )
    bonus: Number | None = Field(
        1e-1, description="Coefficient below the requirement (longer earns more); null: no term."
    )
    accuracy_requirement: NonNegative | None = Field(
        1.0,
        description="Correct samples asked of a group: <= 1 a share, > 1 a count; null: always "
        "the penalty.",
    )


class RlModel(Section):
    """Adaptive length by GRPO."""

    stage: Literal["rl"] = Field("rl", description="Adaptive-length RL.")
    start: str = Field(..., alias="from", description="The latent model it starts from.")
    estimator: Literal["sampled", "exact"] = Field(
        "sampled",
        description="Stop lengths of the gradient: one drawn for each sample, or the average over "
        "all of them by their known distribution.",
    )
    group_size: Annotated[int, Field(ge=2)] = Field(16, description="Samples a prompt.")
    temperature: Positive = Field(1.0, description="Sampling temperature.")
    max_new_tokens: PositiveInt = Field(40, description="Longest completion.")
    max_latent_steps: PositiveInt | None = Field(
        None, description="STOP is forced here, outside the loss; null: bounded by the tokens."
    )
    max_prompt_tokens: PositiveInt | None = Field(
        100, description="Longer prompts are dropped; null: none."
    )
    reward: Reward = Field(default_factory=Reward, description="Reward.")
    loss: Literal["bnpo", "grpo", "dr_grpo"] = Field("bnpo", description="Token aggregation.")
    epsilon: Positive = Field(0.2, description="Clipping range of the ratio.")
    iterations: PositiveInt = Field(1, description="Updates on the same samples.")
    kl_weight: NonNegative = Field(1e-3, description="beta: weight of the KL to the start model.")
    training: Training = Field(..., description="Optimisation; a batch counts prompts.")
    lora: Lora | None = Field(None, description="null: full fine-tuning.")
    save: Literal["merged", "adapter"] = Field(
        "merged", description="Merge the adapter into the weights, or keep it beside them too."
    )


class ImportModel(Section):
    """A model trained elsewhere: a folder in our format, the published format, or plain HF."""

    stage: Literal["import"] = Field("import", description="Bring in a trained model.")
    start: Literal["base"] | None = Field(
        None, alias="from", description="`base`: the untrained base model, for reference."
    )
    path: str | None = Field(
        None, description="Hub id or folder (`${LATENT_REASONING_BASE}` allowed)."
    )
    revision: str | None = Field(None, description="Pinned revision of a hub id.")
    licence: str | None = Field(
        None, description="Licence of the weights, for the model's card; `from: base` has its own."
    )
    forced_steps: Count | None = Field(
        None, description="Evaluate with this many latent steps; null: adaptive."
    )

    @model_validator(mode="after")
    def _one_source(self) -> ImportModel:
        if (self.path is None) == (self.start is None):
            raise ValueError("give either path (hub id or folder) or from: base")
        return self


ModelEntry = Annotated[
    SftModel | LatentSftModel | RlModel | ImportModel, Field(discriminator="stage")
]


# ----------------------------------------------------------------- evaluation, runtime, report


class Evaluation(Section):
    """Greedy evaluation of whole splits."""

    datasets: list[DatasetName] = Field(
        ["test"], description="`test`, `validation` and names of `data.extra_tests`."
    )
    max_new_tokens: PositiveInt = Field(512, description="Longest completion.")
    max_forced_steps: Count = Field(
        8, description="Accuracy is measured at every forced n from 0 to this."
    )
    forced_rows: PositiveInt | None = Field(
        None, description="First rows of the split used for forced n; null: all."
    )


class Guard(Section):
    """A training that diverges goes back to its last good checkpoint, and on with other data."""

    enabled: bool = Field(
        True,
        description="false: a loss or gradient that is not finite ends the training, and nothing "
        "else is looked at.",
    )
    window: Annotated[int, Field(ge=20)] = Field(
        200,
        description="Healthy steps whose 95 % quantiles of loss and gradient norm are the usual; "
        "a quarter of them must be there.",
    )
    factor: Annotated[float, Field(gt=1), BeforeValidator(_with_exponent)] = Field(
        3.0, description="So many times the usual is bad; gradients below clipping never are."
    )
    patience: PositiveInt = Field(10, description="So many bad steps in a row are a divergence.")
    collapse: Share = Field(
        0.5,
        description="So is a validation accuracy below this share of the best one, if the rows "
        "are enough to tell it from chance.",
    )
    rollbacks: Count = Field(2, description="Rollbacks with nothing but another data order.")
    slower_rollbacks: Count = Field(
        2, description="Rollbacks after those, each to half the learning rate; then it gives up."
    )


class Runtime(Section):
    """How, not what: none of these keys retrains anything."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where tensors live.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Autocast on cuda; auto: bfloat16 where the GPU has it."
    )
    threads: PositiveInt = Field(1, description="Torch threads of one process.")
    processes: PositiveInt = Field(
        1, description="Processes of one training, a GPU each, which share every step's batch."
    )
    micro_batch_size: PositiveInt | None = Field(
        None, description="Examples (RL: prompts) a forward; null: a process's share of the batch."
    )
    evaluation_batch_size: PositiveInt = Field(64, description="Prompts a generation batch.")
    checkpoint_every: PositiveInt = Field(200, description="Steps between resumable checkpoints.")
    gpu_model: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+$")] | None = Field(
        None,
        description="The type of GPU to ask a cluster for, as it names it; one with `h100` in its "
        "name is planned for as such, any other and null (no type asked for) as an A100.",
    )
    memory_mb: PositiveInt | None = Field(
        4000,
        description="Memory asked of the scheduler, a process; null: as "
        "`latent_reasoning.dag.cost` plans.",
    )
    runtime_minutes: PositiveInt | None = Field(
        60,
        description="Time asked of the scheduler, a job; null: twice what "
        "`latent_reasoning.dag.cost` estimates, in whole hours.",
    )
    time_budget_minutes: Positive | None = Field(
        None,
        description="After so long a training ends with a checkpoint and exit code 75, and the "
        "workflow starts it again to go on. Choose it well below `runtime_minutes`.",
    )
    guard: Guard = Field(default_factory=Guard, description="What to do about divergence.")


class Tracking(Section):
    """MLflow."""

    enabled: bool = Field(True, description="Log runs to MLflow.")
    uri: str = Field(
        "sqlite:///results/mlflow.db",
        description="Store; the environment's MLFLOW_TRACKING_URI goes first.",
    )
    log_every: PositiveInt = Field(10, description="Steps between logged metrics.")


class Published(Section):
    """A published figure that stands beside ours."""

    accuracy: Share | None = Field(None, description="Share of correct answers.")
    tokens: NonNegative | None = Field(None, description="Mean reasoning tokens.")


class Report(Section):
    """What the page says; none of these keys retrains or re-evaluates anything."""

    title: str = Field("Adaptive latent reasoning", description="Title of the page.")
    notes: list[str] = Field(
        default_factory=list, description="Departures from the paper, a line each."
    )
    main: list[Name] | None = Field(
        None, description="Models of the main table, in order; null: all but the appendix."
    )
    appendix: list[Name] = Field(
        default_factory=list, description="Models trained by the target `appendix` only."
    )
    rl_from: dict[Name, Name] = Field(
        default_factory=dict,
        description="For imported models: the RL model and the one that its RL started from, so "
        "that they are compared as if trained here.",
    )
    published: dict[Name, Published] = Field(
        default_factory=dict,
        description="Published `accuracy` (a share) and `tokens` by model name.",
    )


class Stages(Section):
    """Defaults of the entries of `models`, by stage; an entry's own keys go first."""

    sft: dict[str, Any] = Field(default_factory=dict, description="Defaults of `sft` models.")
    latent_sft: dict[str, Any] = Field(
        default_factory=dict, description="Defaults of `latent_sft` models."
    )
    rl: dict[str, Any] = Field(default_factory=dict, description="Defaults of `rl` models.")

    @model_validator(mode="after")
    def _known_keys(self) -> Stages:
        for stage, entry in (("sft", SftModel), ("latent_sft", LatentSftModel), ("rl", RlModel)):
            allowed = {field.alias or name for name, field in entry.model_fields.items()}
            unknown = sorted(set(getattr(self, stage)) - allowed)
            if unknown:
                raise ValueError(
                    f"{stage}.{unknown[0]}: unknown key; allowed here: {', '.join(sorted(allowed))}"
                )
        return self


class Experiment(Section):
    """One experiment: a YAML file of `config/`, with every default filled in."""

    experiment: Name = Field(..., description="Its folder under results/.")
    seeds: list[Count] = Field([0], min_length=1, description="Every training runs once a seed.")
    data: Data = Field(default_factory=Data, description="Rows.")
    base: Base = Field(default_factory=Base, description="The model everything starts from.")
    model: Model = Field(default_factory=Model, description="The latent reasoner.")
    stages: Stages = Field(default_factory=Stages, description="Defaults of `models` by stage.")
    models: dict[Name, ModelEntry] = Field(
        ..., min_length=1, description="The only list of what is trained."
    )
    evaluation: Evaluation = Field(default_factory=Evaluation, description="Evaluation.")
    runtime: Runtime = Field(default_factory=Runtime, description="How it runs.")
    tracking: Tracking = Field(default_factory=Tracking, description="MLflow.")
    report: Report = Field(default_factory=Report, description="Tables, figures and page.")

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: list[int]) -> list[int]:
        if len(set(value)) != len(value):
            raise ValueError(f"a seed stands twice in {value}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        for name, entry in self.models.items():
            self._check_entry(name, entry)
        for dataset in self.evaluation.datasets:
            known = ["test", "validation", *self.data.extra_tests]
            if dataset not in known:
                raise ValueError(
                    f"evaluation.datasets: {dataset!r} is not among {', '.join(known)}"
                )
        for key in ("main", "appendix"):
            for name in getattr(self.report, key) or []:
                if name not in self.models:
                    raise ValueError(f"report.{key}: {name!r} is not in models")
        for name, start in self.report.rl_from.items():
            self._check_comparison(name, start)
        if self.base.source == "scratch" and self.data.source != "generated":
            raise ValueError(
                "base.source: scratch trains on generated text and needs data.source: generated"
            )
        return self

    def _check_comparison(self, name: str, start: str) -> None:
        for model in (name, start):
            if model not in self.models:
                raise ValueError(f"report.rl_from: {model!r} is not in models")
        if self.models[name].stage != "import":
            raise ValueError(
                f"report.rl_from: {name!r} is of stage {self.models[name].stage}, and says itself "
                "what it starts from; only imported models stand here"
            )

    def _check_entry(self, name: str, entry: Any) -> None:
        if name == "base":
            raise ValueError("models.base: the name is taken by the base model; choose another")
        seen = [name]
        start = entry.start
        while start not in (None, "base"):
            if start not in self.models:
                raise ValueError(
                    f"models.{seen[-1]}.from: {start!r} is neither base nor one of "
                    f"{', '.join(sorted(self.models))}"
                )
            if start in seen:
                raise ValueError(f"models.{name}.from: goes in a circle: {' -> '.join(seen)}")
            seen.append(start)
            start = self.models[start].start
        starts_from = None if entry.start in (None, "base") else self.models[entry.start]
        if entry.stage == "sft" and getattr(starts_from, "stage", None) in ("latent_sft", "rl"):
            raise ValueError(
                f"models.{name}.from: token SFT starts from a plain language model, not from "
                f"{entry.start!r}, which reasons in latent steps"
            )
        if entry.stage == "rl":
            if (entry.max_latent_steps or 0) + 2 > entry.max_new_tokens:
                raise ValueError(
                    f"models.{name}.max_latent_steps: {entry.max_latent_steps} steps and STOP "
                    f"leave no token of max_new_tokens: {entry.max_new_tokens} for the answer"
                )
            parent = None if entry.start == "base" else self.models[entry.start]
            if parent is None or parent.stage not in ("latent_sft", "rl", "import"):
                raise ValueError(
                    f"models.{name}.from: RL starts from a latent_sft, rl or import model, not "
                    f"from {entry.start!r}"
                )
            if self.data.sft_share == 1.0:
                raise ValueError(
                    f"data.sft_share: 1.0 leaves no rows for the RL model {name!r}; take less"
                )
        if entry.stage == "latent_sft":
            compared = entry.distillation.block_range
            blocks = self.base.architecture.num_hidden_layers
            if self.base.source == "scratch" and compared is not None and compared[1] >= blocks:
                raise ValueError(
                    f"models.{name}.distillation.block_range: block {compared[1]} is not there; "
                    f"the base has {blocks}, counted from 0"
                )
            teacher = entry.distillation.teacher
            if teacher != "self":
                teacher_entry = self.models.get(teacher)
                if getattr(teacher_entry, "form", None) != "cot":
                    raise ValueError(
                        f"models.{name}.distillation.teacher: {teacher!r} is neither self nor an "
                        "sft model of form cot"
                    )
            elif entry.distillation.traces == "teacher":
                raise ValueError(
                    f"models.{name}.distillation.traces: teacher needs distillation.teacher to "
                    "name an sft model"
                )


# ------------------------------------------------------------------------------------- loading


def load(files: str | Path | list[str | Path]) -> Experiment:
    """Read one or more YAML files, later ones over earlier ones, into a checked `Experiment`.

    Raises `ConfigError` naming the file, the key and what is allowed.
    """
    files = [files] if isinstance(files, str | Path) else files
    return resolve(read(files), ", ".join(str(file) for file in files))


def read(files: Sequence[str | Path]) -> dict[str, Any]:
    """The content of YAML files, later ones merged over earlier ones, as it stands there."""
    merged: dict[str, Any] = {}
    for file in files:
        merged = merge(merged, _read(Path(file)))
    return merged


def resolve(raw: dict[str, Any], file: str) -> Experiment:
    """Check a configuration given as a mapping; `file` names it in errors."""
    raw = _with_stage_defaults(copy.deepcopy(raw), file)
    try:
        return Experiment.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_explain(error, file)) from None


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge two mappings deeply; `above` goes first, lists and scalars replace."""
    out = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = merge(out[key], value)
        else:
            out[key] = value
    return out


def dump(experiment: Experiment) -> dict[str, Any]:
    """The full configuration, every default filled in, as plain values in the file's own keys."""
    return experiment.model_dump(mode="json", by_alias=True)


def dump_yaml(experiment: Experiment) -> str:
    """`dump` as YAML text, loadable by `load`."""
    return yaml.safe_dump(dump(experiment), sort_keys=False, allow_unicode=True, width=100)


def expand_path(text: str) -> Path:
    """A path of the configuration: `${VARIABLE}` filled in, relative to the project root.

    Raises `ConfigError` where a variable is not set.
    """
    missing = [name for name in re.findall(r"\$\{(\w+)\}", text) if name not in os.environ]
    if missing:
        raise ConfigError(
            f"the path {text!r} needs the environment variable {missing[0]}, which is not set"
        )
    path = Path(re.sub(r"\$\{(\w+)\}", lambda match: os.environ[match[1]], text)).expanduser()
    return path if path.is_absolute() else PROJECT_ROOT / path


def is_local(path: str) -> bool:
    """Whether an imported model's `path` is a folder, there or not, and no hub id."""
    written_as_a_path = path.startswith((".", "/", "~", "$")) or path.count("/") > 1
    return written_as_a_path or expand_path(path).is_dir()


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key may stand only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key_node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key!s:.80} is not text: write it in quotes",
                    problem_mark=key_node.start_mark,
                )
            if isinstance(key, str) and key_node.tag != "tag:yaml.org,2002:merge" and key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key!r} stands twice", problem_mark=key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else None)
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[str, Any]:
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.load(text, _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        problem = f"holds the character {chr(error.character)!r}, which YAML does not allow"
        raise ConfigError(f"{path}: line {line} {problem}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise ConfigError(f"{path}:{where} {problem}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys, not {content!r:.80}")
    return content


def _with_stage_defaults(raw: dict[str, Any], file: str) -> dict[str, Any]:
    """Fill each entry of `models` from `stages` and, for latent SFT, the section `model`."""
    models = raw.get("models")
    stages = raw.get("stages") or {}
    if not isinstance(models, dict) or not isinstance(stages, dict):
        return raw
    filled: dict[str, Any] = {}
    for name, entry in models.items():
        if not isinstance(entry, dict):
            raise ConfigError(f"{file}: models.{name}: a model is a mapping, not {entry!r:.60}")
        stage = entry.get("stage")
        defaults = stages.get(stage) if isinstance(stage, str) else None
        entry = merge(defaults if isinstance(defaults, dict) else {}, entry)
        if entry.get("stage") == "latent_sft" and isinstance(raw.get("model"), dict):
            own = entry.get("model")
            entry["model"] = merge(raw["model"], own if isinstance(own, dict) else {})
        filled[name] = entry
    return {**raw, "models": filled}


def _explain(error: ValidationError, file: str) -> str:
    """One line a problem: file, key, what is wrong, what is allowed."""
    lines = []
    for problem in error.errors():
        stages = ("sft", "latent_sft", "rl", "import")
        location = list(problem["loc"])
        if len(location) > 2 and location[0] == "models" and location[2] in stages:
            del location[2]
        key = ".".join(str(part) for part in location)
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = f"unknown key; allowed here: {', '.join(_allowed_keys(problem['loc']))}"
        elif problem["type"] == "missing":
            message = "is required"
        elif "input" in problem and not isinstance(problem["input"], dict | BaseModel):
            message = f"{message}, not {problem['input']!r:.80}"
        lines.append(f"{file}: {key}: {message}" if key else f"{file}: {message}")
    return "\n".join(lines)


def _allowed_keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys of the section that holds an unknown one."""
    schema = schema_of_experiment()
    definitions = schema["$defs"]
    node: dict[str, Any] = schema
    for part in location[:-1]:
        node = _follow(node, definitions, part)
    return sorted(_dereference(node, definitions).get("properties", {}))


def _dereference(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node or "anyOf" in node or "allOf" in node:
        if "$ref" in node:
            node = definitions[node["$ref"].rsplit("/", 1)[1]]
        else:
            options = node.get("anyOf") or node["allOf"]
            node = next((option for option in options if "$ref" in option), {})
    return node


def _follow(node: dict[str, Any], definitions: dict[str, Any], part: int | str) -> dict[str, Any]:
    if isinstance(node.get("discriminator"), dict):
        mapping = node["discriminator"]["mapping"]
        return {"$ref": mapping[part]} if part in mapping else {}
    node = _dereference(node, definitions)
    properties = node.get("properties", {})
    if part in properties:
        return properties[part]
    extra = node.get("additionalProperties")
    if not isinstance(extra, dict):
        pattern = node.get("patternProperties") or {}
        extra = next(iter(pattern.values()), {})
    return extra


def schema_of_experiment() -> dict[str, Any]:
    """The JSON schema of a resolved configuration (`workflow/schemas/config.schema.json`)."""
    return Experiment.model_json_schema(by_alias=True)


# -------------------------------------------------------------------------------------- digests


def canonical(value: Any) -> str:
    """Sorted, compact JSON: equal content gives equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of `canonical(value)`."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]
