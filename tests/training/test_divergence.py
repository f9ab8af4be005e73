"""Trainings that diverge: they go back, resume with other data, get slower, and give up."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from latent_reasoning.config import Guard
from latent_reasoning.model.card import card_text
from latent_reasoning.runtime.signals import StopRequest, TrainingInterruptedError
from latent_reasoning.training.divergence import DivergenceError, DivergenceGuard, GuardState
from latent_reasoning.training.metrics import ProgressLines, read_metrics
from tests.training.tiny_training import (
    TinyTask,
    assert_bitwise_equal,
    nan_at,
    run,
    settings,
    tiny_model,
    weights,
)

GUARD = Guard()


class RecordingTracker:
    def __init__(self) -> None:
        self.values: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, values: dict[str, float], step: int = 0) -> None:
        self.values.append((step, values))


def nan_until(rollbacks_needed: int, at: int):
    """A fault that ends once the training has gone back often enough."""
    return lambda step, rollbacks: math.nan if step == at and rollbacks < rollbacks_needed else 1.0


def losses_of(metrics: Path, name: str = "loss") -> dict[int, float]:
    """What was logged of each step's loss, or of another value that is logged with it."""
    return {row["step"]: row[name] for row in read_metrics(metrics) if "loss" in row}


# ---------------------------------------------------------------------------- back, and on again


def test_a_nan_goes_back_to_the_last_good_checkpoint_and_resumes_with_other_data(tmp_path, log):
    tracker, model, untouched = RecordingTracker(), tiny_model(), tiny_model()
    task = TinyTask(model, fault=nan_until(1, at=7))
    result = run(tmp_path / "c", task, settings(), guard=GUARD, log=log, tracker=tracker)
    reason = "loss is nan at step 8"
    back = {"from_step": 7, "to_step": 6, "reason": reason, "learning_rate_factor": 1.0}
    assert result.rollbacks == [back]
    assert f"warning: tiny: diverged: step 7 back to 6: {reason}" in log
    assert result.steps_run == 8
    assert all(torch.isfinite(tensor).all() for tensor in weights(model).values())
    rows = read_metrics(result.metrics)
    assert {"step": 6, "rollbacks": 1} in rows
    assert [row["step"] for row in rows] == [2, 4, 6, 6, 8]
    assert (6, {"rollbacks": 1}) in tracker.values
    # The same steps with the same order up to step 6 and another one after it.
    run(tmp_path / "d", TinyTask(untouched), settings(), guard=GUARD, log=log)
    assert not torch.equal(untouched[3].weight, model[3].weight)
    losses = [losses_of(tmp_path / name / "metrics.jsonl") for name in "cd"]
    assert losses[0][6] == losses[1][6]
    assert losses[0][8] != losses[1][8]


def test_the_time_left_is_that_of_the_steps_after_going_back(tmp_path, monkeypatch):
    begun, original = [], ProgressLines.__init__

    def begin(self, name, steps, first_step, log):
        begun.append(first_step)
        original(self, name, steps, first_step, log)

    monkeypatch.setattr(ProgressLines, "__init__", begin)
    run(tmp_path / "c", TinyTask(tiny_model(), fault=nan_until(1, at=7)), settings(), guard=GUARD)
    assert begun == [0, 6]


def test_going_back_to_before_the_best_weights_keeps_the_best_of_until_then(tmp_path, log):
    task = TinyTask(tiny_model(), fault=nan_until(1, at=4), accuracies=[0.8, 0.9, 0.5, 0.5, 0.5])
    result = run(tmp_path / "c", task, settings(), guard=GUARD, log=log, checkpoint_every=1)
    assert [entry["to_step"] for entry in result.rollbacks] == [3]
    assert (result.step, result.validation_accuracy) == (2, 0.8)
    assert not any("set aside" in line for line in log)


def test_the_guard_changes_nothing_in_a_healthy_training(tmp_path, log):
    guarded, unguarded = tiny_model(), tiny_model()
    options = {"training": settings(steps=100), "checkpoint_every": 50, "log": log}
    run(tmp_path / "a", TinyTask(guarded), guard=GUARD, **options)
    run(tmp_path / "b", TinyTask(unguarded), **options)
    assert_bitwise_equal(weights(guarded), weights(unguarded))
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in "ab"]
    assert metrics[0] == metrics[1]
    assert not any("diverged" in line for line in log)


def test_trouble_before_the_first_checkpoint_goes_back_to_the_start(tmp_path, log):
    task, order = TinyTask(tiny_model(), fault=nan_until(1, at=0)), TinyTask(tiny_model())
    result = run(tmp_path / "c", task, settings(), guard=GUARD, log=log)
    assert [entry["to_step"] for entry in result.rollbacks] == [0]
    order.plan.reorder = lambda rollbacks: None
    order.plan.rollbacks = 1
    run(tmp_path / "d", order, settings(), log=log)
    steps = [losses_of(tmp_path / name / "metrics.jsonl")[2] for name in "cd"]
    assert steps[0] == pytest.approx(steps[1], rel=0.2)
    assert steps[0] != steps[1]  # dropout differs, too
    assert result.steps_run == 8


def test_the_start_is_kept_until_a_later_checkpoint_was_validated(tmp_path, log):
    task = TinyTask(tiny_model(), accuracies=[0.5, 0.5])
    stop, training = StopRequest(budget_minutes=1e-9), settings(validate_every=4)
    for _ in range(3):
        with pytest.raises(TrainingInterruptedError):
            run(tmp_path / "c", task, training, guard=GUARD, log=log, stop=stop)
    assert (tmp_path / "c" / "start" / "state.json").is_file()
    run(tmp_path / "c", task, training, guard=GUARD, log=log)
    assert not (tmp_path / "c" / "start").exists()


# ------------------------------------------------------------------------- slower, and giving up


def test_further_rollbacks_halve_the_learning_rate_each_and_then_it_gives_up(tmp_path, log):
    task = TinyTask(tiny_model(), fault=nan_at(6))
    with pytest.raises(DivergenceError) as caught:
        run(tmp_path / "c", task, settings(), guard=GUARD, log=log)
    told = "loss is nan at step 7"
    assert str(caught.value) == (
        f"tiny: {told}: the training diverged again after 4 rollbacks "
        f"(step 6 back to 3: {told}; step 6 back to 3: {told}; "
        f"step 6 back to 3, learning rate x 0.5: {told}; "
        f"step 6 back to 3, learning rate x 0.25: {told}). "
        "Lower its learning rate or change the seed: it then starts afresh"
    )


def test_a_rollback_at_a_lower_learning_rate_trains_with_it(tmp_path, log):
    training = settings(schedule="constant", warmup_steps=0)
    task = TinyTask(tiny_model(), fault=nan_until(2, at=6))
    guard = Guard(rollbacks=1)
    result = run(tmp_path / "c", task, training, guard=guard, log=log, checkpoint_every=2)
    assert [entry["learning_rate_factor"] for entry in result.rollbacks] == [1.0, 0.5]
    rates = losses_of(result.metrics, "learning_rate")
    assert rates == pytest.approx({2: 0.01, 4: 0.01, 6: 0.005, 8: 0.005})


def test_switched_off_it_only_refuses_what_is_not_finite(tmp_path, log):
    off = Guard(enabled=False)
    with pytest.raises(DivergenceError, match=r"nan at step 7: the training diverged\. Lower"):
        run(tmp_path / "c", TinyTask(tiny_model(), fault=nan_at(6)), settings(), guard=off, log=log)
    assert not (tmp_path / "c" / "start").exists()
    task = TinyTask(tiny_model(), fault=spike_at(60), accuracies=[0.9, 0.0], validation_rows=200)
    training = settings(steps=100, validate_every=50)
    assert run(tmp_path / "d", task, training, guard=off, log=log).steps_run == 100


# --------------------------------------------------------------------------------- what is trouble


def spike_at(first: int, length: int = 100, rollbacks_needed: int = 99):
    """A fault: the loss is 1000 times what it should be for some steps."""
    return lambda step, rollbacks: (
        1000.0 if first <= step < first + length and rollbacks < rollbacks_needed else 1.0
    )


NOISE = [0.01 if step % 2 else -0.01 for step in range(100)]
CALM = [0.5] * 200


@pytest.mark.parametrize(
    ("losses", "norms", "first"),
    [
        pytest.param([1.0] * 64 + [1e3] * 9 + [1.0] * 127, CALM, None, id="a spike passes"),
        pytest.param([1.0] * 64 + [1e3] * 136, CALM, 73, id="ten bad steps in a row"),
        pytest.param([1.0] * 200, [1e-6] * 100 + [0.9] * 100, None, id="gradient not clipped"),
        pytest.param([1.0] * 200, [1e-6] * 100 + [3.1] * 100, 109, id="gradient clipped"),
        pytest.param([*NOISE, *([5.0] * 100)], CALM, None, id="a loss that has been negative"),
        pytest.param([0.01] * 100 + [5.0] * 100, CALM, 109, id="a loss that never was negative"),
        pytest.param([1.0] * 40 + [50.0] * 60, CALM[:100], None, id="too few to compare with"),
    ],
)
def test_ten_steps_in_a_row_far_above_the_usual_are_trouble(losses, norms, first):
    guard, state = DivergenceGuard(GUARD, max_grad_norm=1.0), GuardState()
    values = [
        {"loss": loss, "gradient_norm": norm} for loss, norm in zip(losses, norms, strict=True)
    ]
    found = [s for s, v in enumerate(values) if guard.judge_step(state, s, v) is not None]
    assert (found[0] if found else None) == first


def test_a_collapse_of_validation_accuracy_goes_back_to_the_last_healthy_one(tmp_path, log):
    task = TinyTask(tiny_model(), accuracies=[0.5, 0.8, 0.1, 0.85, 0.9], validation_rows=200)
    result = run(tmp_path / "c", task, settings(), guard=GUARD, log=log)
    assert [(entry["from_step"], entry["to_step"]) for entry in result.rollbacks] == [(6, 4)]
    assert result.rollbacks[0]["reason"] == "validation accuracy fell from 0.8 to 0.1 at step 6"
    assert (result.step, result.validation_accuracy) == (8, 0.9)
    assert "validation_rows" not in result.metrics.read_text()


@pytest.mark.parametrize(
    ("best", "accuracy", "rows", "trouble"),
    [
        (0.8, 0.1, 200, True),
        (0.2, 0.05, 200, True),
        (0.2, 0.05, 20, False),
        (0.25, 0.0, 4, False),
        (0.8, 0.5, 5000, False),
        (0.8, 0.0, None, False),
        (0.0, 0.0, 200, False),
    ],
)
def test_a_collapse_needs_rows_enough_to_tell_it_from_chance(best, accuracy, rows, trouble):
    guard, state = DivergenceGuard(GUARD, max_grad_norm=1.0), GuardState()
    assert guard.judge_validation(state, 10, best, rows) is None
    found = guard.judge_validation(state, 20, accuracy, rows)
    assert (found is not None) == trouble
    if trouble:
        assert found.good_until == 10


# ------------------------------------------------------------------------- kills, cards, the order


def test_rollbacks_survive_a_kill(tmp_path, log):
    """Interrupted after the rollback and again before the end: the same bits, the same history."""

    whole, pieces = (TinyTask(tiny_model(), fault=nan_until(3, at=6)) for _ in range(2))
    expected = run(tmp_path / "a", whole, settings(), guard=GUARD, log=log)
    for _ in range(20):
        try:
            stop = StopRequest(budget_minutes=1e-9)
            result = run(tmp_path / "b", pieces, settings(), guard=GUARD, log=log, stop=stop)
            break
        except TrainingInterruptedError:
            pass
    assert len(expected.rollbacks) == len(result.rollbacks) == 3
    # Each try left a checkpoint of its own: the way back is shorter.
    assert [entry["to_step"] for entry in expected.rollbacks] == [3, 3, 3]
    assert [entry["to_step"] for entry in result.rollbacks] == [5, 5, 5]
    state = json.loads((tmp_path / "b" / "step-8" / "state.json").read_text())
    assert state["progress"]["guard"]["rollbacks"] == result.rollbacks


class StopAfter:
    """A request to stop that comes in step `step` (from 0) of a task."""

    def __init__(self, task: TinyTask, step: int) -> None:
        self.task, self.step = task, step

    @property
    def reason(self) -> str | None:
        return "it is time" if self.task.last_step == self.step else None


def test_a_training_interrupted_among_bad_steps_still_goes_back_to_before_them(tmp_path, log):
    fault, training = spike_at(64, rollbacks_needed=1), settings(steps=100)
    for step in (66, 69):
        task = TinyTask(tiny_model(), fault=fault)
        stop = StopAfter(task, step)
        with pytest.raises(TrainingInterruptedError, match=f"from step {step + 1} of 100"):
            run(tmp_path / "c", task, training, guard=GUARD, log=log, checkpoint_every=1, stop=stop)
    task = TinyTask(tiny_model(), fault=fault)
    result = run(tmp_path / "c", task, training, guard=GUARD, log=log, checkpoint_every=1)
    (rollback,) = result.rollbacks
    assert (rollback["from_step"], rollback["to_step"]) == (73, 63)
    assert rollback["reason"].startswith("loss is ")
    assert rollback["reason"].endswith(" is usual at step 74, after 10 such steps")


def test_a_rollback_whose_checkpoint_is_damaged_takes_the_one_before(tmp_path, log):
    class Damaging(TinyTask):
        def micro_batches(self, step):
            if step == 7 and not self.plan.rollbacks:
                path = tmp_path / "c" / "step-6" / "weights.safetensors"
                path.write_bytes(path.read_bytes()[:-1])
            return super().micro_batches(step)

    task = Damaging(tiny_model(), fault=nan_until(1, at=7))
    result = run(tmp_path / "c", task, settings(), guard=GUARD, log=log)
    assert [entry["to_step"] for entry in result.rollbacks] == [3]
    assert any(line.startswith("warning: checkpoint 6 is set aside") for line in log)


def test_the_models_card_tells_of_rollbacks():
    card = {"model": "m", "rollbacks": ["step 7 back to 6: loss is nan at step 8"]}
    text = card_text(card)
    assert "The training diverged and went back:\n\n- step 7 back to 6: loss is nan" in text
    assert "Rollbacks" not in card_text({"model": "m", "rollbacks": []})
