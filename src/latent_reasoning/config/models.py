"""What is trained: the base model, the latent reasoner, the entries of `models` by their stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from latent_reasoning.config.distillation import Distillation, StepDecoder
from latent_reasoning.config.fields import (
    IMPORTANT,
    NOT_SCIENCE,
    Count,
    NonNegative,
    Positive,
    PositiveInt,
    Section,
    Share,
    ShareBelowOne,
    check_source,
    only_when,
)

FOR_MIXTURE = only_when("recurrent_filter", "mixture")
FROM_SCRATCH = only_when("source", "scratch")
PROJECTION = only_when("recurrent_filter", "projection")
WITH_WIDTH = only_when("recurrent_filter", "projection", "gaussian")
GAUSSIAN = only_when("recurrent_filter", "gaussian")
FROM_ELSEWHERE = only_when("source", "local", "gguf", "hub")
SCRATCH_TEXTS = {"full": 0.4, "results_only": 0.3, "drop_last": 0.15, "truncated": 0.15}


class Training(Section):
    """One optimisation run."""

    steps: Annotated[Count, IMPORTANT]
    """Optimiser steps."""
    batch_size: Annotated[PositiveInt, IMPORTANT] = 64
    """Examples (RL: prompts) per optimiser step, over all micro-batches."""
    learning_rate: Annotated[Positive, IMPORTANT] = 1e-3
    """Peak learning rate."""
    filter_learning_rate: Positive | None = None
    """Peak learning rate of the recurrent filter, which then has no weight decay; null: that of all
    other weights. A filter without weights (`none`, `SRE`) has none to train."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after warm-up: cosine or linear to 0, or none."""
    learning_rate_floor: Share = 0.0
    """Share of the peak that the cosine ends at (the paper: 0)."""
    warmup_steps: Count = 0
    """Linear warm-up from 0."""
    weight_decay: NonNegative = 0.1
    """Not applied to norms, biases and the special tokens' own modules."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = Field((0.9, 0.999), strict=False)
    """AdamW betas."""
    eps: Positive = 1e-8
    """AdamW epsilon."""
    max_grad_norm: Positive = 1.0
    """Gradient clipping by global norm."""
    accumulation: Literal["examples", "tokens"] = "examples"
    """Micro-batches are weighted by examples (as in the public code: the loss then depends on the
    micro-batch size) or by labels (token-exact). RL is always token-exact."""
    validate_every: PositiveInt = 200
    """Steps between validations."""
    validation_rows: PositiveInt | None = None
    """Number of validation rows used during training, the first ones; null: all."""
    select: Literal["best", "last"] = "best"
    """Keep the checkpoint of best validation accuracy, or the last."""
    stop_at_accuracy: Share | None = None
    """End early once validation accuracy reaches this."""

    @model_validator(mode="after")
    def _floor_of_a_cosine(self) -> Training:
        if self.learning_rate_floor and self.schedule != "cosine":
            raise ValueError(
                f"learning_rate_floor: {self.learning_rate_floor} belongs to schedule: cosine, not "
                f"to {self.schedule}"
            )
        return self


class Lora(Section):
    """Low-rank adaptation; the latent modules are trained in full."""

    r: Annotated[PositiveInt, IMPORTANT] = 128
    """Rank."""
    alpha: Positive = 32
    """Scaling numerator."""
    dropout: Share = 0.1
    """Dropout on the adapter's input."""
    target_modules: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"], min_length=1
    )
    """Names of the linear modules that get an adapter."""
    train_special_rows: bool = True
    """The special tokens' rows are trained beside the adapter; false (as published for CODI): they
    stay as they began."""


class Architecture(Section):
    """A causal LM trained from scratch. A GPT-2 has learned positions (no `rope_theta`) and as many
    key-value heads as heads."""

    family: Literal["llama", "gpt2"] = "llama"
    """Architecture of its blocks."""
    hidden_size: PositiveInt = 64
    """Width d."""
    intermediate_size: PositiveInt = 128
    """Width of the MLP."""
    num_hidden_layers: PositiveInt = 2
    """Blocks."""
    num_attention_heads: PositiveInt = 4
    """Attention heads."""
    num_key_value_heads: PositiveInt = 4
    """Key-value heads."""
    max_position_embeddings: PositiveInt = 512
    """Longest sequence."""
    tie_word_embeddings: bool = True
    """One matrix for input and output."""
    rope_theta: Positive = 10000.0
    """Base of the rotary position embedding."""
    initializer_range: Positive = 0.02
    """Std of the random initial weights."""

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
        if self.family == "gpt2" and self.num_attention_heads != self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads = {self.num_key_value_heads}: a gpt2 has as many as "
                f"num_attention_heads = {self.num_attention_heads}"
            )
        return self


class ReasoningMix(Section):
    """Shares of the styles of reasoning text, normalised to sum to one."""

    full: NonNegative = 1.0
    """All steps, as equations."""
    results_only: NonNegative = 0.0
    """`Results:` and the intermediate values."""
    drop_last: NonNegative = 0.0
    """All steps but the last."""
    truncated: NonNegative = 0.0
    """The first steps, a random number of them."""
    results_only_drop_last: NonNegative = 0.0
    """`drop_last`, results alone."""
    results_only_truncated: NonNegative = 0.0
    """`truncated`, results alone."""
    results_only_waiting: NonNegative = 0.0
    """Results alone, the last one repeated a random number of times."""

    @model_validator(mode="after")
    def _not_empty(self) -> ReasoningMix:
        if sum(self.model_dump().values()) <= 0:
            raise ValueError("all shares are 0: at least one style of text is needed")
        return self


class Base(Section):
    """The model everything starts from."""

    source: Annotated[Literal["scratch", "local", "gguf", "hub"], IMPORTANT] = "scratch"
    """`scratch` trains a tiny Llama or GPT-2 on generated text; `local` reads a Hugging Face
    folder; `gguf` a GGUF file; `hub` a model id."""
    path: Annotated[str | None, NOT_SCIENCE, IMPORTANT] = None
    """Folder (`local`) or file (`gguf`). May hold ${LATENT_REASONING_BASE}; a relative path starts
    at the project root."""
    hub_id: Annotated[str | None, FROM_ELSEWHERE, IMPORTANT] = None
    """Model id of the `hub` source."""
    revision: Annotated[str | None, FROM_ELSEWHERE] = None
    """Pinned commit of the `hub` source (`tools.pin_revisions` finds it)."""
    licence: Annotated[str | None, NOT_SCIENCE] = None
    """Licence of the weights, for the model's card."""
    architecture: Annotated[Architecture, FROM_SCRATCH] = Field(default_factory=Architecture)
    """Shape, for `scratch`."""
    texts: Annotated[ReasoningMix, FROM_SCRATCH] = Field(
        default_factory=lambda: ReasoningMix(**SCRATCH_TEXTS)
    )
    """Styles of the text, for `scratch`."""
    any_opening: Annotated[Share, FROM_SCRATCH] = 0.0
    """Share of the terse texts that open with any word of the vocabulary instead of ` Results:`: a
    pretrained model has seen many openings. For `scratch`."""
    training: Annotated[Training, FROM_SCRATCH] = Field(
        default_factory=lambda: Training(steps=2000, learning_rate=3e-3, betas=(0.9, 0.98))
    )
    """Optimisation, for `scratch`."""

    @model_validator(mode="after")
    def _source_is_complete(self) -> Base:
        check_source(self.source, self.path, self.hub_id)
        return self


class Model(Section):
    """The latent reasoner around the base model."""

    recurrent_filter: Annotated[
        Literal[
            "none",
            "MLP",
            "linear",
            "linear_ln",
            "linear_ECF",
            "SRE",
            "projection",
            "gaussian",
            "mixture",
            "attention",
            "pause",
        ],
        IMPORTANT,
    ] = "MLP"
    """What turns a hidden state into the next input embedding; `projection` is CODI's, `gaussian`
    CoLaR's, `mixture` is `SRE` cut to a few words, `attention` attends to all states so far, and
    `pause` is a learnt vector instead. `linear`, `linear_ln` and `linear_ECF`: fidelity only."""
    mixture_size: Annotated[PositiveInt | None, FOR_MIXTURE] = 10
    """Words in the filter `mixture`; null: all."""
    mixture_temperature: Annotated[Positive, FOR_MIXTURE] = 1.0
    """Divides the logits of the filter `mixture`."""
    filter_width: Annotated[PositiveInt | None, WITH_WIDTH] = None
    """Inner width of the filter; null: that of the model."""
    filter_norm: Annotated[bool, PROJECTION] = True
    """The filter ends with a LayerNorm."""
    deterministic_latents: Annotated[bool, GAUSSIAN] = False
    """The filter has no std to sample with."""
    stop_rule: Literal["head", "marker", "fixed"] = "head"
    """What decides to stop: the two-way stop head, or the language-model head by STOP's probability
    against all other words; `fixed`: nothing, the number of latent steps is one for all."""
    stop_head_temperature: Positive | None = None
    """Divides the two stop logits; null: 1."""
    detach_stop_head: bool = False
    """No gradient from the stop head into the hidden states."""
    allow_rethinking: bool = False
    """START may be sampled after STOP (the public code: true)."""
    start_token_from: str | None = None
    """Text whose first token's embedding initialises START; null: the mean row."""
    end_token_from: str | None = None
    """The same for END, which the model reads in STOP's place."""


class LatentSteps(Section):
    """n = min(max, max(min, factor * k + bias)) latent steps for k reasoning steps."""

    factor: int = 0
    """c: latent steps for each reasoning step."""
    bias: int = 0
    """b: latent steps added to those."""
    min: Count | None = 6
    """Least n; null: no bound."""
    max: Count | None = 6
    """Largest n; null: no bound."""

    @model_validator(mode="after")
    def _in_order(self) -> LatentSteps:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min = {self.min} is above max = {self.max}")
        return self


class TrainedModel(Section):
    """What the entries of all stages that train have in common."""

    stage: str
    """The stage that makes the model."""
    start: Annotated[str, IMPORTANT] = Field("base", alias="from")
    """`base` or the name of another model."""
    training: Training
    """Optimisation."""
    lora: Annotated[Lora | None, IMPORTANT] = None
    """null: full fine-tuning."""
    save: Literal["merged", "adapter"] = "merged"
    """Merge the adapter into the weights; `adapter` also keeps it in a folder of its own."""

    @model_validator(mode="after")
    def _adapter_to_save(self) -> TrainedModel:
        if self.save == "adapter" and self.lora is None:
            raise ValueError("save: adapter keeps the adapter of lora, but lora is null")
        return self


class SupervisedModel(TrainedModel):
    """What the entries of the two SFT stages have in common."""

    rows: Literal["sft", "all"] = "sft"
    """SFT's share of the train rows, or all of them (the appendix)."""

    @model_validator(mode="after")
    def _one_state(self) -> SupervisedModel:
        model = getattr(self, "model", None)
        if getattr(model, "recurrent_filter", None) != "attention":
            return self
        for key, none in (("filter_warm_start", "0"), ("step_decoder", "null")):
            if getattr(self, key, None):
                raise ValueError(
                    f"{key}: the filter attention reads more than one state; set it to {none}"
                )
        return self


class SftModel(SupervisedModel):
    """Token SFT: chain of thought, or the answer alone."""

    stage: Literal["sft"] = "sft"
    """Token SFT."""
    form: Literal["cot", "no_cot"] = "cot"
    """With or without the steps."""


class LatentSftModel(SupervisedModel):
    """Latent SFT by self-distillation."""

    stage: Literal["latent_sft"] = "latent_sft"
    """Latent SFT."""
    model: Model = Field(default_factory=Model)
    """Overrides the section `model`."""
    latent_steps: Annotated[LatentSteps, IMPORTANT] = Field(default_factory=LatentSteps)
    """Latent steps of a training example."""
    distillation: Distillation = Field(default_factory=Distillation)
    """Distillation loss and teacher."""
    drop_last_step: bool = True
    """The teacher's text drops its last step."""
    shift_target: bool = True
    """The target token is the one after `:`, not `:` itself."""
    mask_latent_labels: bool = False
    """The student learns only the answer."""
    learn_start: bool = False
    """START is a label too (the public code)."""
    stop_label_smoothing: Share = 0.0
    """Probability mass moved from each stop label to the other decision."""
    random_readout: Share = 0.0
    """Share of the rows that answer after a random number of latent steps (no fewer than the
    teacher's steps), with unchanged stop labels."""
    filter_warm_start: Count = 0
    """Steps in which a new filter first learns to do what `SRE` does, without labels; 0: none."""
    step_decoder: StepDecoder | None = None
    """A second model that learns to write each step from its latent input (SIM-CoT); null: none."""
    teacher_texts: ReasoningMix = Field(default_factory=ReasoningMix)
    """Styles of the teacher's reasoning."""
    forced_steps: Count | None = None
    """Validate and evaluate with this number of latent steps (the appendix: 6); null: adaptive."""

    @model_validator(mode="after")
    def _nothing_to_stop(self) -> LatentSftModel:
        steps = self.latent_steps
        if self.model.stop_rule == "fixed" and not (
            self.mask_latent_labels and steps.min is not None and steps.min == steps.max
        ):
            raise ValueError(
                "model.stop_rule: fixed needs one number of latent steps (latent_steps.min = max), "
                "and mask_latent_labels: true, for there is no decision to learn"
            )
        return self
