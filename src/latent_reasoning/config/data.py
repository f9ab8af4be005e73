"""The section `data`: where raw rows come from, their filter, split and form."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from latent_reasoning.config.fields import (
    IMPORTANT,
    NOT_SCIENCE,
    Count,
    DatasetName,
    Positive,
    PositiveInt,
    Section,
    Share,
    ShareAboveZero,
    check_source,
    only_when,
    science_for,
)

SUPERVISED = ("sft", "latent_sft", "curriculum", "teacher_forced")
TRAINED = (*SUPERVISED, "rl", "policy")

FROM_HUB = only_when("source", "hub")
WHERE_PERTURBED = only_when("method", "numeric_perturbation")

NumberRule = Literal["exact", "public"]
"""How numbers in answers are read (`data/answers.py`)."""


class GeneratedData(Section):
    """Word problems made by the project, in GSM8K-Aug form (`data/dial/problems.py`)."""

    train: PositiveInt = 24000
    """Rows of the training split."""
    validation: PositiveInt = 500
    """Rows of the validation split."""
    test: PositiveInt = 2000
    """Rows of the test split."""
    max_steps: PositiveInt = 5
    """Longest chain of operations."""
    step_weights: list[Positive] = Field([2, 3, 3, 2, 1])
    """Relative frequency of 1, 2, .. `max_steps` operations."""
    modulus: Annotated[int, Field(ge=3, le=12)] = 7
    """Positions of the dial: values are 0 .. modulus - 1."""
    references: Share = 0.0
    """Probability that an operation, from the third on, takes an earlier day's result instead of a
    number, which makes the problem harder."""
    seed: Count = 0
    """Seed of the generator."""

    @model_validator(mode="after")
    def _weights_match(self) -> GeneratedData:
        if len(self.step_weights) != self.max_steps:
            raise ValueError(
                f"step_weights has {len(self.step_weights)} values for max_steps = "
                f"{self.max_steps}: give one weight for each number of steps"
            )
        return self


class Augmentation(Section):
    """Extra training rows made from the given ones; validation and test are never augmented."""

    method: Literal["none", "numeric_perturbation"] = "none"
    """`numeric_perturbation` replaces the numbers that occur in both question and steps, recomputes
    the chain and keeps clean results."""
    copies: Annotated[PositiveInt, WHERE_PERTURBED] = 1
    """Perturbed copies tried for each training row."""
    seed: Annotated[Count, WHERE_PERTURBED] = 0
    """Seed of the perturbation."""


class Prompt(Section):
    """What stands before the question."""

    training: Annotated[str, science_for("base", *SUPERVISED)] = "Question: "
    """Prefix of the question in training text."""
    evaluation: Annotated[str, science_for("base", *TRAINED, "import", "decode", "evaluation")] = (
        "Question: "
    )
    """Prefix in evaluation and RL prompts; the public code uses none. It is written on every
    model's card."""


class SplitRows(Section):
    """Numbers of rows of the source's splits, before train is cut into SFT's and RL's part."""

    train: PositiveInt | None = None
    """Rows of train; null: all (`limits`) or any number (`expected_rows`)."""
    validation: PositiveInt | None = None
    """Rows of validation."""
    test: PositiveInt | None = None
    """Rows of test."""


class Data(Section):
    """Raw rows, their filter, split and form."""

    source: Annotated[Literal["generated", "local", "hub"], IMPORTANT] = "generated"
    """`generated` makes rows; `local` reads a folder with train, validation and test as .jsonl,
    .json or .parquet; `hub` reads a Hugging Face dataset."""
    path: Annotated[str | None, NOT_SCIENCE, IMPORTANT] = None
    """Folder of the `local` source. May hold ${LATENT_REASONING_DATA}; a relative path starts at
    the project root."""
    hub_id: Annotated[str | None, FROM_HUB] = None
    """Dataset id of the `hub` source."""
    hub_config: Annotated[str | None, FROM_HUB] = None
    """One of that dataset's configurations, such as `main` of GSM8K; null: the default one."""
    revision: Annotated[str | None, FROM_HUB] = None
    """Pinned commit of the `hub` source (`tools.pin_revisions` finds it)."""
    expected_rows: Annotated[SplitRows, NOT_SCIENCE] = Field(default_factory=SplitRows)
    """Numbers of rows that the source must have; other numbers stop the stage. A split that
    `limits` cuts is not checked."""
    licence: Annotated[str | None, NOT_SCIENCE] = None
    """Licence of the rows, for the models' cards."""
    generated: Annotated[GeneratedData, only_when("source", "generated")] = Field(
        default_factory=GeneratedData
    )
    """Settings of the `generated` source."""
    natural_language: Annotated[bool, science_for(*SUPERVISED)] = False
    """Steps are sentences, each preceded by a space (GSM8K-Aug-NL)."""
    prompt: Prompt = Field(default_factory=Prompt)
    """Prefixes of the question."""
    sft_share: Annotated[ShareAboveZero, IMPORTANT] = 0.85
    """Share of the shuffled train rows given to SFT; the rest is RL's."""
    split_seed: Count = 42
    """Seed of that shuffle."""
    drop_negative_for_sft: Annotated[bool, science_for(*SUPERVISED[1:])] = True
    """Latent SFT drops rows with a negative answer."""
    max_tokens: Annotated[PositiveInt, science_for("base", *SUPERVISED)] = 512
    """SFT drops rows with more tokens than this less four separators (512 means 508)."""
    number_rule: Annotated[
        NumberRule, science_for("data", "test_set", "base", *TRAINED, "decode", "evaluation")
    ] = "exact"
    """How numbers are read in answers and completions: `exact` by one grammar
    (`data/numbers.py`), or as the `public` code does, which takes the first digits."""
    on_bad_row: Annotated[Literal["error", "skip"], science_for("data", "test_set")] = "error"
    """A malformed row, or a label that is no number, stops the stage, or is skipped and counted."""
    special_token_text: Annotated[
        Literal["error", "skip", "escape", "keep"],
        science_for("base", *TRAINED, "decode", "evaluation"),
    ] = "error"
    """Literal special-token text in a row: refuse, skip the row, break the text up with a space, or
    read it as the token, as the public code does."""
    augmentation: Augmentation = Field(default_factory=Augmentation)
    """Extra training rows."""
    limits: SplitRows = Field(default_factory=SplitRows)
    """Read only this number of rows of each split, the first ones."""
    extra_tests: Annotated[dict[DatasetName, str], NOT_SCIENCE] = Field(default_factory=dict)
    """More test sets: name -> .jsonl, .json or .parquet file with question and answer
    (`${LATENT_REASONING_DATA}` allowed)."""

    @field_validator("extra_tests")
    @classmethod
    def _reserved(cls, value: dict[str, str]) -> dict[str, str]:
        taken = sorted(set(value) & {"sft", "rl", "train", "validation", "test", "summary"})
        if taken:
            raise ValueError(f"names of splits cannot name another test set: {', '.join(taken)}")
        return value

    @model_validator(mode="after")
    def _source_is_complete(self) -> Data:
        check_source(self.source, self.path, self.hub_id)
        return self
