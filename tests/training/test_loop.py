"""The training loop: optimiser, accumulation, schedule, selection, checkpoints, resume."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from latent_reasoning.config import Guard
from latent_reasoning.runtime.signals import TrainingInterruptedError
from latent_reasoning.training.checkpoints import FolderInUseError
from latent_reasoning.training.divergence import DivergenceError
from latent_reasoning.training.gradients import accumulate_gradients
from latent_reasoning.training.metrics import read_metrics, write_training_csv
from latent_reasoning.training.optimiser import build_optimizer, decay_groups, learning_rate
from tests.training.tiny_training import (
    TinyPlan,
    TinyTask,
    assert_bitwise_equal,
    nan_at,
    out_of_time,
    run,
    settings,
    tiny_model,
    weights,
)

# ------------------------------------------------------------------------------- optimiser, steps


def test_matrices_and_embeddings_are_decayed_but_norms_biases_and_special_rows_are_not():
    model = tiny_model()
    model.add_module("special_rows", nn.ModuleDict({"start": nn.Embedding(1, 8)}))
    model.add_module("frozen", nn.Linear(2, 2).requires_grad_(False))
    model.add_module("tied", model[0])
    decayed, undecayed = decay_groups(model)
    assert decayed == ["0.weight", "3.weight"]
    assert undecayed == ["1.weight", "1.bias", "3.bias", "special_rows.start.weight"]
    optimizer = build_optimizer(model, settings(weight_decay=0.3))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 4]


def test_a_filter_with_a_rate_of_its_own_follows_the_schedule_without_weight_decay(
    tmp_path, monkeypatch
):
    model = tiny_model()
    model.add_module("recurrent_filter", nn.Linear(3, 3))
    training = settings(learning_rate=5e-4, filter_learning_rate=5e-3, weight_decay=0.3)
    rates, original = [], torch.optim.AdamW.step

    def step(self):
        rates.append([group["lr"] for group in self.param_groups])
        assert [len(group["params"]) for group in self.param_groups] == [2, 3, 2]
        assert [group["weight_decay"] for group in self.param_groups] == [0.3, 0.0, 0.0]
        return original(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run(tmp_path / "c", TinyTask(model), training)
    expected = learning_rate(training)
    assert rates == [
        pytest.approx([expected(n), expected(n), 10 * expected(n)]) for n in range(len(rates))
    ]


def test_linear_and_constant_schedules_have_the_same_warmup():
    linear = learning_rate(settings(steps=12, schedule="linear", learning_rate=1.0))
    constant = learning_rate(settings(steps=12, schedule="constant", learning_rate=1.0))
    assert [linear(step) for step in (0, 1, 2, 7, 12)] == [0.0, 0.5, 1.0, 0.5, 0.0]
    assert [constant(step) for step in (0, 1, 2, 7, 12)] == [0.0, 0.5, 1.0, 1.0, 1.0]


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    gradients, losses = [], []
    for size in (4, 3, 1):
        model = tiny_model().eval()
        values = accumulate_gradients(model, TinyTask(model, plan=TinyPlan(size)), step=5)
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        losses.append(values["loss"])
        assert values["double_loss"] == pytest.approx(2 * values["loss"])
    for other in gradients[1:]:
        for expected, actual in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(actual, expected)
    assert losses[1:] == pytest.approx([losses[0]] * 2)


def test_gradient_is_clipped_to_its_norm(tmp_path):
    model = tiny_model()
    seen = []
    original = torch.optim.AdamW.step

    def step(self, *arguments):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        seen.append(float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt()))
        return original(self, *arguments)

    torch.optim.AdamW.step = step
    try:
        run(tmp_path / "c", TinyTask(model), settings(steps=3, max_grad_norm=1e-3))
    finally:
        torch.optim.AdamW.step = original
    assert seen == pytest.approx([1e-3] * 3, rel=1e-3)


# ------------------------------------------------------------------------------------- selection


@pytest.mark.parametrize(
    ("accuracies", "lengths", "changes", "step", "steps_run"),
    [
        pytest.param([0.1, 0.9, 0.5, 0.9], [], {}, 4, 8, id="the first of the best"),
        pytest.param([0.9, 0.9, 0.9, 0.8], [8.0, 4.0, 6.0, 3.0], {}, 4, 8, id="then the shortest"),
        pytest.param([0.9, 0.1, 0.1, 0.2], [], {"select": "last"}, 8, 8, id="the last"),
        pytest.param([0.5, 1.0], [], {"stop_at_accuracy": 0.99}, 4, 4, id="accurate enough"),
    ],
)
def test_the_selected_weights_are_returned(tmp_path, accuracies, lengths, changes, step, steps_run):
    model, expected = tiny_model(), accuracies[step // 2 - 1]
    task = TinyTask(model, accuracies=[*accuracies], lengths=[*lengths])
    result = run(tmp_path / "c", task, settings(**changes))
    assert (result.step, result.steps_run) == (step, steps_run)
    assert result.validation_accuracy == expected
    assert (result.selection == "the last step (8)") == ("select" in changes)
    assert_bitwise_equal(weights_of_step(tmp_path / "c", step), weights(model))
    if lengths:
        assert result.validation_reasoning_tokens == lengths[step // 2 - 1]


def test_an_accuracy_that_was_to_end_a_training_and_was_not_reached_is_said(tmp_path):
    said = {}
    for last in (0.6, 0.9):
        log: list[str] = []
        task = TinyTask(tiny_model(), accuracies=[0.5, 0.6, 0.7, last])
        run(tmp_path / str(last), task, settings(stop_at_accuracy=0.9, select="last"), log=log)
        said[last] = [line for line in log if "warning" in line]
    (warning,) = said[0.6]
    assert "below stop_at_accuracy 0.9: validation accuracy 0.6" in warning
    assert not said[0.9]


def weights_of_step(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"step-{step}" / "weights.safetensors")


def test_zero_steps_return_the_model_as_it_was(tmp_path):
    model = tiny_model()
    before = weights(model)
    result = run(tmp_path / "c", TinyTask(model), settings(steps=0))
    assert result.steps_run == 0
    assert_bitwise_equal(weights(model), before)


# ------------------------------------------------------------------------------ metrics, progress


def test_metrics_are_means_since_the_last_line_and_make_a_table(tmp_path):
    task = TinyTask(tiny_model(), accuracies=[0.25, 0.5, 0.75, 1.0])
    result = run(tmp_path / "c", task)
    rows = read_metrics(result.metrics)
    assert [row["step"] for row in rows] == [2, 2, 4, 4, 6, 6, 8, 8]
    assert rows[0]["double_loss"] == pytest.approx(2 * rows[0]["loss"])
    assert rows[0]["learning_rate"] == pytest.approx((0.0 + 0.005) / 2)
    write_training_csv(result.metrics, tmp_path / "training.csv")
    lines = (tmp_path / "training.csv").read_text().splitlines()
    assert lines[0] == "step,loss,double_loss,gradient_norm,learning_rate,validation_accuracy"
    assert [line.split(",")[0] for line in lines[1:]] == ["2", "4", "6", "8"]
    assert lines[4].endswith(",1.0")


def test_progress_lines_say_loss_accuracy_length_and_time_left(tmp_path, log):
    task = TinyTask(tiny_model(), accuracies=[0.5] * 4, lengths=[7.5] * 4)
    run(tmp_path / "c", task, log=log)
    assert log[1].startswith("tiny  step 2/8  loss ")
    assert re.search(r"  accuracy 0\.5  reasoning tokens 7\.5  0:00:\d\d left$", log[1])


def test_a_progress_line_before_the_first_logged_loss_has_none(tmp_path, log):
    task = TinyTask(tiny_model(), accuracies=[0.5] * 8)
    run(tmp_path / "c", task, settings(validate_every=1), log=log)
    assert log[0].startswith("tiny  step 1/8  accuracy 0.5  ")


def test_the_order_of_the_data_is_drawn_once(tmp_path):
    task, drawn = TinyTask(tiny_model()), []
    task.plan.reorder = drawn.append
    run(tmp_path / "c", task)
    assert drawn == [0]


# ------------------------------------------------------------------------------ checkpoint, resume


def test_the_last_two_checkpoints_and_the_best_are_kept(tmp_path):
    task = TinyTask(tiny_model(), accuracies=[0.9, 0.1, 0.2, 0.3])
    run(tmp_path / "c", task, checkpoint_every=1)
    kept = sorted(path.name for path in (tmp_path / "c").glob("step-*"))
    assert kept == ["step-2", "step-7", "step-8"]


def interrupted(folder: Path) -> None:
    """A training that ended by an error in step 6 and left the checkpoints of steps 2 to 5."""
    task = TinyTask(tiny_model(), accuracies=[0.5, 0.6, 0.4, 0.5], fault=nan_at(5))
    with pytest.raises(DivergenceError):
        run(folder, task, checkpoint_every=1)


def finished(folder: Path, accuracies: list[float], log: list[str] | None = None):
    model = tiny_model()
    with torch.no_grad():
        model[3].weight.zero_()
    result = run(folder, TinyTask(model, accuracies=accuracies), log=log)
    return weights(model), result


def test_a_resumed_training_is_bitwise_the_uninterrupted_one(tmp_path, log):
    model = tiny_model()
    task = TinyTask(model, accuracies=[0.5, 0.6, 0.4, 0.5])
    whole = run(tmp_path / "a", task)
    interrupted(tmp_path / "b")
    resumed, result = finished(tmp_path / "b", [0.4, 0.5], log)
    assert "tiny: resumes after step 5" in log
    assert_bitwise_equal(resumed, weights(model))
    assert result.step == whole.step == 4
    assert result.metrics.read_text() == whole.metrics.read_text()
    assert_bitwise_equal(
        load_file(tmp_path / "a" / "step-8" / "optimizer.safetensors"),
        load_file(tmp_path / "b" / "step-8" / "optimizer.safetensors"),
    )


def test_a_finished_training_is_not_repeated(tmp_path):
    model = tiny_model()
    run(tmp_path / "c", TinyTask(model, accuracies=[0.1, 0.9, 0.5, 0.5]))
    again = tiny_model()
    task = TinyTask(again)
    result = run(tmp_path / "c", task)
    assert (task.last_step, task.validations, result.step) == (-1, 0, 4)
    assert_bitwise_equal(weights(again), weights(model))


def truncate(content: bytes) -> bytes:
    return content[:-20]


def flip_a_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path, log, name, damage):
    model = tiny_model()
    run(tmp_path / "a", TinyTask(model, accuracies=[0.5, 0.6, 0.4, 0.5]))
    interrupted(tmp_path / "b")
    damaged = tmp_path / "b" / "step-5" / name
    damaged.write_bytes(damage(damaged.read_bytes()))
    resumed, _ = finished(tmp_path / "b", [0.4, 0.5], log)
    assert "tiny: resumes after step 4" in log
    assert any(line.startswith("warning: checkpoint 5 is set aside") for line in log)
    assert (tmp_path / "b" / "step-5.damaged-1").is_dir()
    assert_bitwise_equal(resumed, weights(model))


def test_a_lost_best_checkpoint_starts_the_selection_again(tmp_path):
    interrupted(tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "step-4")
    _, result = finished(tmp_path / "c", [0.4, 0.5])
    assert (result.step, result.validation_accuracy) == (8, 0.5)


def test_the_best_before_a_damaged_best_is_selected(tmp_path, log):
    task = TinyTask(tiny_model(), accuracies=[0.8, 0.9], fault=nan_at(4))
    with pytest.raises(DivergenceError):
        run(tmp_path / "c", task, checkpoint_every=1)
    damaged = tmp_path / "c" / "step-4" / "weights.safetensors"
    damaged.write_bytes(truncate(damaged.read_bytes()))
    result = run(tmp_path / "c", TinyTask(tiny_model(), accuracies=[0.5] * 3), log=log)
    assert "tiny: resumes after step 3" in log
    assert (result.step, result.validation_accuracy) == (2, 0.8)


def test_where_the_last_weights_are_selected_no_checkpoint_of_a_validation_is_missed(tmp_path, log):
    training = settings(select="last")
    task = TinyTask(tiny_model(), accuracies=[0.5, 0.6], fault=nan_at(5))
    with pytest.raises(DivergenceError):
        run(tmp_path / "c", task, training)
    result = run(tmp_path / "c", TinyTask(tiny_model(), accuracies=[0.1] * 3), training, log=log)
    assert "tiny: resumes after step 3" in log
    assert not any("set aside" in line for line in log)
    assert (result.step, result.validation_accuracy) == (8, 0.1)


def test_checkpoints_of_another_configuration_are_set_aside(tmp_path, log):
    interrupted(tmp_path / "c")
    model = tiny_model()
    result = run(tmp_path / "c", TinyTask(model), digest="b", log=log)
    assert result.steps_run == 8
    assert not any("resumes after" in line for line in log)
    assert any("another configuration (digest a, now b)" in line for line in log)
    assert (tmp_path / "c.stale-1" / "step-5").is_dir()


KILLED = """
import sys
import torch
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from tests.training.tiny_training import TinyTask, run, settings, tiny_model
torch.set_num_threads(1)
task = TinyTask(tiny_model(), seconds_a_step=0.2)
run(Path(sys.argv[1]), task, settings(steps=60, validate_every=60))
"""


def test_a_folder_in_training_is_refused_and_after_sigkill_resumed_to_the_bit(tmp_path, log):
    torch.set_num_threads(1)
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    deadline = time.monotonic() + 300
    while not list(folder.glob("step-*/state.json")):
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for digest in "ab":
        with pytest.raises(FolderInUseError) as refusal:
            run(folder, TinyTask(tiny_model()), digest=digest)
    assert str(refusal.value) == (
        f"{folder} is being trained by process {process.pid} on {socket.gethostname()}: wait for "
        "it or end it, then run again"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["killed"]
    assert process.poll() is None
    process.kill()
    process.wait()
    training = settings(steps=60, validate_every=60)
    resumed, whole = tiny_model(), tiny_model()
    run(folder, TinyTask(resumed), training, log=log)
    assert any("resumes after step" in line for line in log)
    run(tmp_path / "whole", TinyTask(whole), training, log=log)
    assert_bitwise_equal(weights(resumed), weights(whole))
    metrics = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]
    assert metrics == sorted(set(metrics))
    assert len(metrics) == 30


def test_a_checkpoint_that_cannot_be_written_is_a_plain_error(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    from latent_reasoning.training import checkpoints

    def full(tensors, path):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*step-3'"):
        run(tmp_path / "c", TinyTask(tiny_model()))
    assert list((tmp_path / "c").glob("*step*")) == []


# ------------------------------------------------------------------------------------- curriculum


@dataclass
class TwoSteps:
    """A curriculum of stages of two steps."""

    resets_optimizer: bool = True

    def stage(self, step: int) -> int:
        return step // 2


def test_a_new_stage_begins_with_a_new_optimiser_also_after_a_resume(tmp_path, monkeypatch):
    moments, original = [], torch.optim.AdamW.step

    def step(self):
        moments.append(len(self.state))
        return original(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)

    def task(**settings) -> TinyTask:
        task = TinyTask(tiny_model())
        task.curriculum = TwoSteps(**settings)
        return task

    whole = task()
    run(tmp_path / "whole", whole, settings(steps=6))
    assert moments == [0, 5, 0, 5, 0, 5]
    moments.clear()
    for _ in range(5):
        with pytest.raises(TrainingInterruptedError):
            run(tmp_path / "cut", task(), settings(steps=6), stop=out_of_time())
    cut = task()
    run(tmp_path / "cut", cut, settings(steps=6))
    assert moments == [0, 5, 0, 5, 0, 5]
    assert_bitwise_equal(weights(whole.model), weights(cut.model))
    moments.clear()
    run(tmp_path / "kept", task(resets_optimizer=False), settings(steps=6))
    assert moments == [0, 5, 5, 5, 5, 5]


def test_a_new_stage_may_have_another_loss_without_being_a_divergence(tmp_path):
    def loss(step: int, rollbacks: int) -> float:
        return 1.0 if step < 60 else 100.0

    training = settings(steps=90, learning_rate=1e-6, max_grad_norm=1e-3)
    task = TinyTask(tiny_model(), fault=loss)
    with pytest.raises(DivergenceError):
        run(tmp_path / "plain", task, training, guard=Guard(rollbacks=0))
    task = TinyTask(tiny_model(), fault=loss)
    task.curriculum = SimpleNamespace(stage=lambda step: step // 60, resets_optimizer=False)
    assert run(tmp_path / "staged", task, training, guard=Guard(rollbacks=0)).rollbacks == []
