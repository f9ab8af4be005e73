"""When a training diverges: what counts as trouble, and how often it may be rolled back.

Trouble is

- a loss or a gradient norm that is not finite;
- a loss or a gradient norm far above its own recent quantile, for many steps in a row. Single
  spikes are no trouble, because clipping handles them. Nor is a gradient below the clipping norm,
  or any loss where a recent one was negative, as a policy gradient's may be: it is no error;
- a validation accuracy that collapsed by more than chance explains.

On trouble the training loop goes back to the last checkpoint from before the trouble began, and
resumes with another data order. After `runtime.guard.rollbacks` rollbacks, each further one also
halves the learning rate; after `SLOWER_ROLLBACKS` of those, the training fails. The paper's authors
restart diverged runs from the last good checkpoint by hand (docs/method.md, section 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from latent_reasoning.config import Guard, UserError

WINDOW = 200
"""Number of recent healthy steps; quantiles of their losses and norms are the reference."""
LEAST_SHARE = 0.25
"""Nothing is judged until this share of the window is filled."""
QUANTILE = 0.95
FACTOR = 3.0
"""A step above this multiple of the reference is bad."""
PATIENCE = 10
"""This number of consecutive bad steps is a divergence."""
COLLAPSE = 0.5
"""A validation accuracy below this share of the best one is a collapse, if it is significant."""
SIGNIFICANT = 4.0
"""A drop of accuracy by more than this number of standard errors is significant."""
SLOWER_ROLLBACKS = 2
RATE_FACTOR = 0.5


class DivergenceError(UserError, RuntimeError):
    """Training cannot continue: it diverged, and rollbacks did not help."""


@dataclass(frozen=True)
class Trouble:
    """What is wrong, in words; checkpoints up to step `good_until` are from before it."""

    reason: str
    good_until: int


@dataclass
class GuardState:
    """What the guard remembers; it is part of a checkpoint.

    `losses` and `gradient_norms` are those of the last healthy steps. `bad_since` is the first step
    (from 0) of the current series of bad steps. `validated_step` is the last step whose validation
    showed no trouble. `rollbacks` describes all rollbacks, oldest first.
    """

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    bad_since: int | None = None
    best_accuracy: float | None = None
    validated_step: int = 0
    rollbacks: list[dict[str, Any]] = field(default_factory=list)


class DivergenceGuard:
    """Judges steps and validations of one training; its only memory is the `GuardState`."""

    def __init__(self, settings: Guard, max_grad_norm: float) -> None:
        self.settings = settings
        self.max_grad_norm = max_grad_norm

    def judge_step(self, state: GuardState, step: int, values: dict[str, float]) -> Trouble | None:
        """Judge `loss` and `gradient_norm` of optimiser step `step` (from 0)."""
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(values[name]):
                first = step if state.bad_since is None else state.bad_since
                reason = f"{name} is {values[name]} at step {step + 1}"
                return Trouble(reason, max(first - 1, 0))
        if not self.settings.enabled:
            return None
        far = self._far_above(state, values)
        if far is None:
            state.bad_since = None
            state.losses = [*state.losses, values["loss"]][-WINDOW:]
            state.gradient_norms = [*state.gradient_norms, values["gradient_norm"]][-WINDOW:]
            return None
        if state.bad_since is None:
            state.bad_since = step
        if step - state.bad_since + 1 < PATIENCE:
            return None
        reason = f"{far} at step {step + 1}, after {PATIENCE} such steps"
        return Trouble(reason, max(state.bad_since - 1, 0))

    def judge_validation(
        self, state: GuardState, step: int, accuracy: float | None, rows: float | None
    ) -> Trouble | None:
        """Judge the accuracy on `rows` rows after `step` steps; None is not judged."""
        if accuracy is None or not self.settings.enabled:
            return None
        best = state.best_accuracy
        if best is not None and rows and accuracy < COLLAPSE * best:
            error = math.sqrt((best * (1 - best) + accuracy * (1 - accuracy)) / rows)
            if best - accuracy > SIGNIFICANT * error:
                reason = f"validation accuracy fell from {best:.4g} to {accuracy:.4g}"
                return Trouble(f"{reason} at step {step}", state.validated_step)
        state.best_accuracy = accuracy if best is None else max(best, accuracy)
        state.validated_step = step
        return None

    def forget(self, state: GuardState) -> None:
        """Begin anew to learn what is usual: what is trained has changed."""
        state.losses, state.gradient_norms, state.bad_since = [], [], None

    def rate_factor(self, rollbacks: int) -> float:
        """The learning rate's factor: 1 until `runtime.guard.rollbacks` rollbacks did not help."""
        return RATE_FACTOR ** max(0, rollbacks - self.settings.rollbacks)

    def record(self, state: GuardState, trouble: Trouble, step: int, to_step: int) -> list[dict]:
        """The history with the new rollback, from step `step` to step `to_step`."""
        entry = {
            "from_step": step,
            "to_step": to_step,
            "reason": trouble.reason,
            "learning_rate_factor": self.rate_factor(len(state.rollbacks) + 1),
        }
        return [*state.rollbacks, entry]

    def check_patience(self, name: str, state: GuardState, trouble: Trouble) -> None:
        """Raise `DivergenceError`, with the history, where no rollback is left."""
        allowed = self.settings.rollbacks + SLOWER_ROLLBACKS
        if self.settings.enabled and len(state.rollbacks) < allowed:
            return
        tried = "; ".join(describe(entry) for entry in state.rollbacks)
        tried = f" again after {len(state.rollbacks)} rollbacks ({tried})" if tried else ""
        raise DivergenceError(
            f"{name}: {trouble.reason}: the training diverged{tried}. "
            "Lower its learning rate or change the seed: it then starts afresh"
        )

    def _far_above(self, state: GuardState, values: dict[str, float]) -> str | None:
        """Whether the loss or the gradient norm is far above its quantile: which, in words."""
        if len(state.losses) < LEAST_SHARE * WINDOW:
            return None
        usual_loss = _quantile(state.losses) if min(state.losses) > 0 else math.inf
        usual_norm = max(_quantile(state.gradient_norms), self.max_grad_norm)
        for name, usual in (("loss", usual_loss), ("gradient_norm", usual_norm)):
            if values[name] > FACTOR * usual:
                return f"{name} is {values[name]:.4g} where {usual:.4g} is usual"
        return None


def describe(rollback: dict[str, Any]) -> str:
    """One rollback in words."""
    factor = rollback["learning_rate_factor"]
    rate = f", learning rate x {factor:g}" if factor != 1 else ""
    return f"step {rollback['from_step']} back to {rollback['to_step']}{rate}: {rollback['reason']}"


def _quantile(values: list[float]) -> float:
    return sorted(values)[int(QUANTILE * (len(values) - 1))]
