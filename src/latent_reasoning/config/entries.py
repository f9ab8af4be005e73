"""The entries of `models`, by the stage that makes them."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from latent_reasoning.config.fields import NOT_SCIENCE, Count, Section, science_for
from latent_reasoning.config.models import LatentSftModel, SftModel
from latent_reasoning.config.policies import RlModel
from latent_reasoning.config.rivals import (
    CurriculumModel,
    DecodeModel,
    RivalPolicyModel,
    TeacherForcedModel,
)


class ImportModel(Section):
    """A model trained elsewhere: a folder in our format, the published format, or plain HF."""

    stage: Literal["import"] = "import"
    """Bring in a trained model."""
    start: Literal["base"] | None = Field(None, alias="from")
    """`base`: the untrained base model, for reference."""
    path: str | None = None
    """Hub id or folder (`${LATENT_REASONING_BASE}` allowed)."""
    revision: str | None = None
    """Pinned revision of a hub id."""
    format: Literal["auto", "codi", "coconut"] = "auto"
    """`auto`: our folders, the published format of the paper, plain HF; or the released weights of
    CODI or Coconut, those of SIM-CoT on either included."""
    licence: Annotated[str | None, NOT_SCIENCE] = None
    """Licence of the weights, for the model's card; `from: base` has its own."""
    forced_steps: Annotated[Count | None, science_for("evaluation")] = None
    """Evaluate with this number of latent steps; null: adaptive."""

    @model_validator(mode="after")
    def _one_source(self) -> ImportModel:
        if (self.path is None) == (self.start is None):
            raise ValueError("give either path (hub id or folder) or from: base")
        return self

    @model_validator(mode="after")
    def _steps_where_none_decides(self) -> ImportModel:
        if self.format != "auto" and self.forced_steps is None:
            raise ValueError(
                f"format: {self.format} has no decision to stop: set forced_steps (published: 6)"
            )
        return self


ModelEntry = Annotated[
    SftModel
    | LatentSftModel
    | RlModel
    | ImportModel
    | CurriculumModel
    | TeacherForcedModel
    | RivalPolicyModel
    | DecodeModel,
    Field(discriminator="stage"),
]

ENTRIES: dict[str, type[Section]] = {
    entry.model_fields["stage"].default: entry for entry in get_args(get_args(ModelEntry)[0])
}
"""The section of an entry of `models`, by its stage."""

WITH_MODEL = ("latent_sft", "curriculum", "teacher_forced")
"""The stages that make a latent reasoner, whose entries override the section `model`."""

RIVAL_STAGES = ("curriculum", "teacher_forced", "policy", "decode")
"""The stages of other methods, which the command `latent_reasoning.rivals` runs."""
