"""The policy loss: equal samples, micro-batches, KL; tests/conformance has its recorded numbers."""

import math

import pytest
import torch

from latent_reasoning.rl.grpo import kl_per_token, policy_loss

KINDS = ["bnpo", "grpo", "dr_grpo"]
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])
SETTINGS = {"epsilon": 0.2, "kl_weight": 0.0, "max_completion_length": 5}


def tensor(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


class TestPolicyLoss:
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
