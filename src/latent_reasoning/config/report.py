"""The section `report`: what the page shows, and which models the targets compare."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from latent_reasoning.config.fields import DISTINCT, Name, NonNegative, Section, Share

Models = Annotated[list[Name], DISTINCT]

TRIALS = 6
"""Most tuning trials of a method: every method has the same chance."""


class Published(Section):
    """Published figures of a model, shown beside ours."""

    accuracy: Share | None = None
    """Share of correct answers."""
    tokens: NonNegative | None = None
    """Mean reasoning tokens."""


class Claims(Section):
    """What the report asks of an experiment; fixed before it is run."""

    points_above_no_reasoning: Share = 0.2
    """Least gain in accuracy of latent SFT over answering at once."""
    shortening: Share = 0.5
    """Least share of the reasoning tokens that RL saves."""
    points_lost: Share = 0.01
    """Largest loss of accuracy by RL, over all rows."""
    points_lost_by_steps: Share = 0.03
    """Largest loss of accuracy by RL, over the rows of each number of reasoning steps."""
    correlation: Share = 0.8
    """Least correlation of length and reasoning steps after RL."""
    points_below_without_steps: Share = 0.2
    """Least loss of accuracy of a latent model that has to answer after 0 steps."""


class Rivals(Section):
    """Methods compared on equal terms: the targets `tuning` and `rivals`, which train them."""

    models: Models = Field(default_factory=list)
    """Models of the table, in order."""
    references: Models = Field(default_factory=list)
    """Models that each of them is compared with, row by row."""
    trials: Annotated[
        dict[Name, list[Name]], BeforeValidator(lambda value: {} if value is None else value)
    ] = Field(default_factory=dict)
    """Models that were tried for a method, at most six, by the method's name; the first has the
    published settings. They are trained with the first seed and judged by the validation rows.
    Null: none, also where an earlier file has some."""
    failed: dict[Name, str] = Field(default_factory=dict)
    """Trials whose training failed, and why: the tuning table names them, no target trains them."""
    lines: dict[str, list[Name]] = Field(default_factory=dict)
    """Models that a line of the figures joins, such as one at several speeds, by what differs;
    those that are not in the table are left out."""
    published: dict[Name, dict[str, Share]] = Field(default_factory=dict)
    """Published accuracies (shares) of a model's method, by whom and on which base."""

    @model_validator(mode="after")
    def _complete(self) -> Rivals:
        for method, names in self.trials.items():
            if not 0 < len(names) <= TRIALS:
                raise ValueError(
                    f"trials.{method}: {len(names)} trials; each method has 1 to {TRIALS}"
                )
        tried = _all(self.trials)
        twice = sorted({name for name in tried if tried.count(name) > 1})
        if twice:
            raise ValueError(f"trials: {twice[0]!r} is a trial of two methods, or twice of one")
        for name in self.failed:
            if name not in tried:
                raise ValueError(f"failed: {name!r} is no trial")
            if name in self.models:
                raise ValueError(f"models: {name!r} has failed; take it out of the table")
        return self

    def named(self) -> list[str]:
        """Every model that the section names."""
        trials, lines = _all(self.trials), _all(self.lines)
        return [*self.models, *self.references, *trials, *lines, *self.published]


def _all(lists: dict[str, list[str]]) -> list[str]:
    return [name for names in lists.values() for name in names]


class Report(Section):
    """What the page shows; none of these keys retrains or re-evaluates anything."""

    title: str = "Adaptive latent reasoning"
    """Title of the page."""
    notes: list[str] = Field(default_factory=list)
    """Departures from the paper, one per line."""
    main: Annotated[list[Name], Field(min_length=1), DISTINCT] | None = None
    """Models of the main table, in order; null: all but the appendix."""
    appendix: Models = Field(default_factory=list)
    """Models trained by the target `appendix` only."""
    ablations: dict[str, Name] = Field(default_factory=dict)
    """Models of the target `ablations`, which trains them: what is changed in words, and the latent
    SFT model so changed; the RL models that start from it belong to it. The first is the recipe."""
    rivals: Rivals = Field(default_factory=Rivals)
    """Methods compared on equal terms."""
    claims: Claims = Field(default_factory=Claims)
    """Thresholds of the claims."""
    rl_from: dict[Name, Name] = Field(default_factory=dict)
    """For imported models: an RL model and the model that its RL started from, which are compared
    as if trained here."""
    published: dict[Name, Published] = Field(default_factory=dict)
    """Published `accuracy` (a share) and `tokens` by model name."""
