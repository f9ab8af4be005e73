"""Advantages, the clipped loss in its three forms, KL, and weights for equal samples."""

import math

import pytest
import torch

from latent_reasoning.rl.grpo import advantages, kl_per_token, policy_loss

KINDS = ["bnpo", "grpo", "dr_grpo"]
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])
SETTINGS = {"epsilon": 0.2, "kl_weight": 0.0, "max_completion_length": 5}


def tensor(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


class TestAdvantages:
    def test_are_standardised_within_each_group(self):
        values = advantages(tensor(0.0, 1.0, 2.0, 5.0, 5.0, 8.0), 3)
        std = math.sqrt(3)
        expected = [-1 / 1.0001, 0, 1 / 1.0001]
        expected += [-1 / (std + 1e-4), -1 / (std + 1e-4), 2 / (std + 1e-4)]
        assert values.tolist() == pytest.approx(expected)

    def test_of_an_all_correct_group_stay_small(self):
        rewards = 1 + 1e-4 * (torch.arange(8, dtype=torch.float64) - 3.5) / 7
        assert advantages(rewards, 8).abs().max().item() == pytest.approx(0.5e-4 / 1.34993e-4, 1e-4)

    def test_of_equal_rewards_are_zero(self):
        assert advantages(tensor(1.0, 1.0), 2).tolist() == [0.0, 0.0]

    def test_unscaled_only_subtract_the_mean(self):
        assert advantages(tensor(1.0, 3.0), 2, scale=False).tolist() == [-1.0, 1.0]


class TestPolicyLoss:
    @pytest.mark.parametrize(
        ("kind", "loss"),
        [
            ("bnpo", -(3 * 1.0 + 1 * -2.0) / 4),
            ("grpo", -(1.0 + -2.0) / 2),
            ("dr_grpo", -(3 * 1.0 + 1 * -2.0) / (2 * 5)),
        ],
    )
    def test_averages_tokens_as_its_kind_says(self, kind, loss):
        value = policy_loss(
            tensor([-1, -2, -3], [-1, 0, 0]), tensor(1.0, -2.0), MASK, kind=kind, **SETTINGS
        )
        assert value.loss.item() == pytest.approx(loss)

    def test_gradient_without_old_log_probs_is_the_policy_gradient(self):
        log_probs = tensor([-1, -2, -3], [-1, 0, 0]).requires_grad_()
        policy_loss(log_probs, tensor(1.0, -2.0), MASK, kind="bnpo", **SETTINGS).loss.backward()
        assert torch.equal(log_probs.grad, tensor([-0.25, -0.25, -0.25], [0.5, 0, 0]))

    def test_clipped_tokens_have_no_gradient_and_are_counted(self):
        log_probs = torch.log(tensor([1.5, 1.0, 0.7], [0.5, 1, 1])).requires_grad_()
        result = policy_loss(
            log_probs,
            tensor(1.0, -1.0),
            MASK,
            kind="bnpo",
            old_log_probs=torch.zeros(2, 3, dtype=torch.float64),
            **SETTINGS,
        )
        result.loss.backward()
        # ratio 1.5 with a positive and 0.5 with a negative advantage are clipped, 0.7 is not
        assert result.loss.item() == pytest.approx(-(1.2 + 1.0 + 0.7 - 0.8) / 4)
        assert log_probs.grad.tolist()[0] == pytest.approx([0, -0.25, -0.7 / 4])
        assert log_probs.grad.tolist()[1] == [0, 0, 0]
        assert (result.clip_low.item(), result.clip_high.item()) == (0.25, 0.25)

    def test_kl_is_added_with_its_weight(self):
        reference = tensor([-1, -1, -3], [-1, 0, 0])
        result = policy_loss(
            tensor([-1, -2, -3], [-1, 0, 0]),
            tensor(0.0, 0.0),
            MASK,
            kind="bnpo",
            reference=reference,
            **{**SETTINGS, "kl_weight": 0.5},
        )
        kl = (math.e - 1 - 1) / 4
        assert result.kl.item() == pytest.approx(kl)
        assert result.loss.item() == pytest.approx(0.5 * kl)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_weight_stands_for_that_many_equal_samples(self, kind):
        generator = torch.Generator().manual_seed(0)
        log_probs, old, reference = (
            -torch.rand(2, 3, generator=generator, dtype=torch.float64) for _ in range(3)
        )
        advantage, settings = tensor(0.7, -0.4), {**SETTINGS, "kl_weight": 0.1, "kind": kind}
        once, each = (log_probs.clone().requires_grad_() for _ in range(2))
        weighted = policy_loss(
            once,
            advantage,
            MASK,
            weights=tensor(3.0, 1.0),
            old_log_probs=old,
            reference=reference,
            **settings,
        )
        rows = [0, 0, 0, 1]
        repeated = policy_loss(
            each[rows],
            advantage[rows],
            MASK[rows],
            old_log_probs=old[rows],
            reference=reference[rows],
            **settings,
        )
        weighted.loss.backward()
        repeated.loss.backward()
        assert weighted.loss.item() == pytest.approx(repeated.loss.item(), rel=1e-12)
        assert torch.allclose(once.grad, each.grad, rtol=1e-12, atol=0)
        assert weighted.kl.item() == pytest.approx(repeated.kl.item(), rel=1e-12)
        assert weighted.denominator == repeated.denominator

    @pytest.mark.parametrize("kind", KINDS)
    def test_micro_batches_add_up_to_the_whole_batch(self, kind):
        log_probs, advantage = tensor([-1, -2, -3], [-1, 0, 0]), tensor(1.0, -2.0)
        whole = policy_loss(log_probs, advantage, MASK, kind=kind, **SETTINGS)
        parts = [
            policy_loss(
                log_probs[i : i + 1], advantage[i : i + 1], MASK[i : i + 1], kind=kind, **SETTINGS
            )
            for i in range(2)
        ]
        numerator = sum(part.numerator.item() for part in parts)
        assert numerator / sum(part.denominator for part in parts) == pytest.approx(
            whole.loss.item()
        )


def test_kl_estimator_is_zero_for_equal_policies_and_never_negative():
    values = kl_per_token(tensor(-1.0, -1.0, -1.0), tensor(-1.0, -0.5, -2.0))
    assert values.tolist() == pytest.approx([0, math.exp(0.5) - 1.5, math.exp(-1)])
