"""RL as a task: exact over micro-batches, the reference policy, several updates, resuming."""

import pytest
import torch

from latent_reasoning.config import ConfigError, Lora, RlModel, Runtime, Training
from latent_reasoning.model.lora import attach_lora
from latent_reasoning.rl import reward
from latent_reasoning.rl.prompts import rl_prompts
from latent_reasoning.rl.scoring import loss_mask, score_completions
from latent_reasoning.rl.task import AdaptiveLengthTask
from latent_reasoning.runtime.graphs import Sizes
from latent_reasoning.runtime.memory import OutOfMemoryError
from latent_reasoning.training.gradients import (
    Backward,
    CapturedBackward,
    accumulate_gradients,
)
from tests.rl.conftest import generated_rows, latent_tokenizer, special_ids
from tests.runtime.trainings import half_are_right


@pytest.fixture(scope="module")
def tokenizer():
    return latent_tokenizer(3)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    rows, _ = generated_rows(6, 0, max_steps=2, modulus=3)
    return rl_prompts(rows, tokenizer, prefix="Question: ", max_prompt_tokens=None)


@pytest.fixture
def build(reasoner, tokenizer, prompts, monkeypatch):
    """A task on a random model, whose answers are never right: every second one is called so."""
    monkeypatch.setattr(reward, "judge_sample", half_are_right)

    def task(
        lora: bool = False, runtime: Runtime | None = None, device: str = "cpu", **settings
    ) -> AdaptiveLengthTask:
        model = reasoner(vocabulary=len(tokenizer), special=special_ids(tokenizer)).to(device)
        if lora:
            attach_lora(model, Lora(r=2, alpha=4, dropout=0.0, target_modules=["q_proj", "o_proj"]))
            model.double()
        entry = RlModel(
            **{"from": "latent"},
            group_size=4,
            max_new_tokens=5,
            training=Training(steps=4, batch_size=4, learning_rate=1e-3, validate_every=6),
            **{"max_latent_steps": 3} | settings,
        )
        runtime = runtime or Runtime(checkpoint_every=2)
        return AdaptiveLengthTask(
            "rl", model, tokenizer, prompts, entry, runtime, seed=0, validate=dict
        )

    return task


def perturb(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter += 0.1 * noise.to(parameter)


def gradients(task: AdaptiveLengthTask, step: int) -> tuple[dict, dict]:
    task.model.zero_grad()
    values = accumulate_gradients(task.model, task, step)
    return values, {n: p.grad.clone() for n, p in task.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("kind", "lora", "estimator"),
    [
        ("bnpo", False, "sampled"),
        ("bnpo", True, "exact"),
        ("grpo", True, "sampled"),
        ("grpo", False, "exact"),
        ("dr_grpo", False, "sampled"),
        ("dr_grpo", True, "exact"),
    ],
)
def test_micro_batches_change_neither_loss_nor_gradient(build, kind, lora, estimator):
    results = []
    for size in (None, 1, 3):
        runtime = Runtime(micro_batch_size=size, checkpoint_every=2)
        task = build(lora=lora, runtime=runtime, loss=kind, kl_weight=0.5, estimator=estimator)
        perturb(task.model)
        results.append(gradients(task, step=1))
    whole, whole_gradients = results[0]
    assert whole["kl"] > 1e-3
    assert 0 < whole["rollout_accuracy"] < 1
    for values, parts in results[1:]:
        assert values["loss"] == pytest.approx(whole["loss"], rel=1e-6)
        for name in ("reward", "reasoning_tokens", "all_correct_share", "distinct_share"):
            assert values[name] == pytest.approx(whole[name], rel=1e-6)
        for name, gradient in whole_gradients.items():
            error = (parts[name] - gradient).norm()
            assert error <= 1e-9 * max(1.0, gradient.norm().item()), name


@pytest.mark.parametrize("lora", [False, True])
def test_the_reference_stays_the_start_model(build, lora):
    task = build(lora=lora, kl_weight=0.5)
    assert gradients(task, step=0)[0]["kl"] == pytest.approx(0, abs=1e-12)
    before = task.micro_batches(0)[0].reference
    perturb(task.model)
    rollout = task.micro_batches(0)[0].rollout
    assert torch.equal(task.reference_log_probs(rollout), before)
    assert gradients(task, step=1)[0]["kl"] > 1e-3


def test_no_reference_is_computed_without_kl(build):
    task = build(kl_weight=0.0)
    assert task.start_model is None
    assert task.micro_batches(0)[0].reference is None
    assert "kl" not in gradients(task, step=0)[0]


@pytest.mark.parametrize("estimator", ["sampled", "exact"])
def test_a_task_that_starts_at_a_later_step_draws_what_the_first_one_drew(build, estimator):
    first, second = (build(estimator=estimator) for _ in range(2))
    first.micro_batches(0)
    again, afresh = (task.micro_batches(3)[0].rollout for task in (first, second))
    assert again.prompts == afresh.prompts
    assert again.completions == afresh.completions
    assert first.micro_batches(2)[0].rollout.completions != again.completions


def test_out_of_memory_goes_on_as_with_half_the_micro_batch_from_the_start(build, monkeypatch):
    task = build(kl_weight=0.5)
    halved = build(kl_weight=0.5, runtime=Runtime(micro_batch_size=2, checkpoint_every=2))
    for each in (task, halved):
        perturb(each.model)

    def score(model, prompts, *arguments):
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return score_completions(model, prompts, *arguments)

    monkeypatch.setattr("latent_reasoning.rl.task.score_completions", score)
    with pytest.raises(OutOfMemoryError, match=r"Tried to allocate 2.00 GiB"):
        gradients(task, step=1)
    task.plan.micro_batch_size //= 2
    (values, parts), (expected, expected_parts) = gradients(task, 1), gradients(halved, 1)
    assert values == expected
    for name, gradient in expected_parts.items():
        assert torch.equal(parts[name], gradient), name


def test_after_a_rollback_other_prompts_and_samples_are_drawn(build):
    task, again = build(), build()
    before = task.micro_batches(1)[0].rollout
    task.plan.reorder(rollbacks=1)
    after = task.micro_batches(1)[0].rollout
    assert after.prompts != before.prompts
    assert task._draws(1)[0][0, 0, 0] != again._draws(1)[0][0, 0, 0]
    task.plan.reorder(rollbacks=0)
    assert task.micro_batches(1)[0].rollout.completions == before.completions


@pytest.mark.parametrize("estimator", ["sampled", "exact"])
def test_iterations_update_on_the_same_samples_with_their_first_log_probabilities(build, estimator):
    task = build(iterations=2, kl_weight=0.0, epsilon=0.05, estimator=estimator)
    first, _ = gradients(task, step=0)
    batch = task.micro_batches(0)[0]
    assert task.micro_batches(1)[0] is batch
    assert first["clip_share"] == 0
    # Sum of advantages over tokens: the ratio is exactly 1.
    mask = loss_mask(batch.rollout.completions, task.model.settings)
    tokens = mask.sum(1) * batch.rollout.weights
    expected = -(batch.advantages * tokens).sum() / tokens.sum()
    assert first["loss"] == pytest.approx(expected.item(), rel=1e-6)
    perturb(task.model)
    second, _ = gradients(task, step=1)
    assert second["clip_share"] > 0.05
    assert second["loss"] != pytest.approx(first["loss"], abs=1e-3)
    assert task.micro_batches(2)[0].rollout is not batch.rollout


@pytest.mark.parametrize("estimator", ["sampled", "exact"])
def test_sampling_runs_along_the_trajectory_that_the_gradient_runs_through(build, estimator):
    task = build(kl_weight=0.0, estimator=estimator)
    calls = []
    task.model.base.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    (batch,) = task.micro_batches(0)
    assert batch.trajectory.hidden[-1].requires_grad
    sampling_calls = len(calls)
    task.loss(batch)
    assert len(calls) - sampling_calls == 1
    assert batch.trajectory is None


@pytest.mark.parametrize("size", [None, 2])
def test_the_gradient_is_the_same_where_each_sample_has_a_row_of_its_own(build, size):
    task = build(runtime=Runtime(micro_batch_size=size))
    perturb(task.model)
    expected_values, expected = gradients(task, step=0)
    task = build(runtime=Runtime(micro_batch_size=size))
    perturb(task.model)
    task.model.captured.when = "always"
    values, found = gradients(task, step=0)
    assert [batch.trajectory for batch in task.micro_batches(0)] == [None] * (2 if size else 1)
    assert values == pytest.approx(expected_values, rel=1e-9)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-7, atol=1e-10), name


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
        ),
    ],
)
@pytest.mark.parametrize(
    ("lora", "size", "kind"), [(True, None, "bnpo"), (False, 3, "grpo"), (True, 1, "dr_grpo")]
)
def test_captured_updates_have_the_gradients_of_eager_ones(build, lora, size, kind, device):
    results = []
    steps = (0, 0, 0, 1)  # a shape is captured when it is met again, and then repeated
    for few_shapes in (False, True):
        runtime = Runtime(micro_batch_size=size, checkpoint_every=2)
        task = build(lora=lora, runtime=runtime, device=device, loss=kind, kl_weight=0.5)
        perturb(task.model)
        task.model.sizes = Sizes() if few_shapes else None
        backward = Backward(task)
        if few_shapes:
            backward = CapturedBackward(task, task.model.device, print)
        for step in steps:
            task._sampled = (-1, 0, task.plan.micro_batch_size)  # samples and scores anew
            backward.zero_gradients()
            values = accumulate_gradients(task.model, task, step, 1.0, backward)
            own = {n: p.grad.clone() for n, p in task.model.named_parameters() if p.requires_grad}
            results.append((few_shapes, values, own))
    assert any(task.planned(batch) is not None for batch in task.micro_batches(1))
    assert backward.shapes() > 0
    assert len(task._reference) > 0
    pairs = zip(results[: len(steps)], results[len(steps) :], strict=True)
    for (_, values, own), (_, other_values, other) in pairs:
        assert other_values == pytest.approx(values, rel=1e-8, abs=1e-11)
        for name, gradient in own.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("bound", [2, None])
def test_the_bound_on_latent_steps_is_the_entry_s_whatever_the_model_had(build, bound):
    task = build(max_latent_steps=bound)
    assert task.model.settings.max_latent_steps == bound
    assert task.start_model.settings.max_latent_steps == bound


def test_samples_cannot_lie_between_checkpoint_and_update(build):
    with pytest.raises(ConfigError, match=r"runtime\.checkpoint_every: 200 .*rl\.iterations"):
        build(iterations=3, runtime=Runtime(checkpoint_every=200))


@pytest.mark.parametrize("cuda_graphs", ["auto", "always"])
@pytest.mark.parametrize(("size", "lora"), [(None, False), (1, False), (1, True)])
def test_mixed_precision_loses_no_gradient(build, size, lora, cuda_graphs):
    """Autocast reuses casts of weights: one made while sampling, or under the reference policy,
    must not cut off the gradient."""
    task = build(runtime=Runtime(micro_batch_size=size), kl_weight=0.5, lora=lora)
    perturb(task.model)
    task.model.float()
    for module in task.model.adapter.reference.values() if lora else ():
        if module is not None:
            module.float()
    task.model.captured.when = cuda_graphs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, mixed = gradients(task, step=0)
    batches = task.micro_batches(0)
    task.model.zero_grad()
    for batch in batches:
        output = task.loss(batch)
        (output.loss * output.weight / sum(b.rollout.weights.sum() for b in batches)).backward()
    parameters = dict(task.model.named_parameters())
    for name, gradient in mixed.items():
        exact = parameters[name].grad
        alike = torch.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0)
        assert alike > 0.95, name
