"""All samples of a prompt in one pass equal each sample scored on its own: the naive oracle."""

import pytest
import torch

from benchmarks import naive
from latent_reasoning.rl.grpo import policy_loss
from latent_reasoning.rl.rollouts import Completion, SamplingSettings, draw_uniforms, sample
from latent_reasoning.rl.scoring import Scoring, loss_mask, score, score_completions
from latent_reasoning.runtime.graphs import Sizes
from tests.rl.conftest import CONTINUE, EOS, PROMPTS, START, STOP

SETTINGS = SamplingSettings(temperature=0.8, max_new_tokens=9, eos_id=EOS)

# Two samples that are equal; answers cut off; stopping at once; cut off while thinking; STOP
# forced after three steps; one that thinks again, twice.
ON_TRAJECTORY = [
    Completion(0, (CONTINUE, STOP, 3, EOS), count=2),
    Completion(0, (CONTINUE, CONTINUE, STOP, 3, 4, 2, 2, 5, 6)),
    Completion(0, (CONTINUE, CONTINUE, CONTINUE, STOP, 3, EOS)),
    Completion(1, (STOP, EOS)),
    Completion(2, (STOP, 4, 4, EOS), count=3),
    Completion(2, (CONTINUE, STOP)),
    Completion(2, (CONTINUE, CONTINUE)),
]
THINKS_AGAIN = [
    Completion(1, (CONTINUE, STOP, 4, START, CONTINUE, STOP, 5, EOS)),
    Completion(1, (STOP, START, STOP, START, CONTINUE, CONTINUE)),
    Completion(2, (CONTINUE, CONTINUE, CONTINUE, STOP, START)),
]


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        ("bnpo", {}),
        ("grpo", {}),
        ("dr_grpo", {}),
        ("bnpo", {"tied": False, "recurrent_filter": "none", "stop_head_temperature": 1.7}),
        ("bnpo", {"recurrent_filter": "SRE", "modules": True}),
        ("bnpo", {"architecture": "gpt2", "detach_stop_head": True}),
    ],
)
@pytest.mark.parametrize("allow_rethinking", [False, True])
def test_loss_and_every_gradient_equal_scoring_each_sample_alone(
    reasoner, variant, allow_rethinking, kind
):
    model = reasoner(allow_rethinking=allow_rethinking, max_latent_steps=3, **variant)
    completions = ON_TRAJECTORY + (THINKS_AGAIN if allow_rethinking else [])
    mask = loss_mask(completions, model.settings)
    advantages = torch.linspace(-1, 1, len(completions), dtype=torch.float64)
    weights = torch.tensor([completion.count for completion in completions])
    noise = torch.Generator().manual_seed(1)
    reference, old = (
        -torch.rand(mask.shape, generator=noise, dtype=torch.float64) for _ in range(2)
    )
    settings = {"kind": kind, "epsilon": 0.2, "kl_weight": 0.3, "max_completion_length": 9}

    fast = policy_loss(
        score_completions(model, PROMPTS, completions, SETTINGS),
        advantages,
        mask,
        weights=weights,
        old_log_probs=old,
        reference=reference,
        **settings,
    )
    fast_gradients = gradients(model, fast.loss)

    each = [i for i, completion in enumerate(completions) for _ in range(completion.count)]
    alone = policy_loss(
        naive.score(model, PROMPTS, [completions[i] for i in each], SETTINGS),
        advantages[each],
        mask[each],
        old_log_probs=old[each],
        reference=reference[each],
        **settings,
    )
    naive_gradients = gradients(model, alone.loss)

    assert fast.loss.item() == pytest.approx(alone.loss.item(), rel=1e-9)
    assert fast.denominator == alone.denominator
    assert fast_gradients.keys() == naive_gradients.keys()
    for name, gradient in naive_gradients.items():
        error = (fast_gradients[name] - gradient).norm()
        assert error <= 1e-9 * max(1.0, gradient.norm().item()), name


def test_the_trajectory_of_sampling_serves_the_update(reasoner):
    model = reasoner(max_latent_steps=3)
    uniforms = draw_uniforms(3, 16, SETTINGS.max_new_tokens, seed=0)
    rollout, trajectory = sample(model, PROMPTS, uniforms, SETTINGS)
    forwards = []
    model.base.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
    reused = score_completions(model, PROMPTS, rollout.completions, SETTINGS, trajectory)
    assert len(forwards) == 1
    afresh = score_completions(model, PROMPTS, rollout.completions, SETTINGS)
    assert torch.equal(reused, afresh)
    weights = torch.rand(afresh.shape, generator=torch.Generator().manual_seed(0)).double()
    ours, theirs = (gradients(model, (weights * values).sum()) for values in (reused, afresh))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_rows_that_only_make_up_the_number_need_no_more_slots_and_change_no_score(reasoner):
    model = reasoner(max_latent_steps=3)
    completions = [
        Completion(prompt, (*[CONTINUE] * steps, STOP, 3, EOS))
        for prompt in range(3)
        for steps in range(3)
    ]
    expected = score_completions(model, PROMPTS, completions, SETTINGS)
    model.sizes = Sizes()
    model.sizes("answers", 20)  # what an earlier step needed
    scoring = Scoring.plan(model, PROMPTS, completions, sizes=model.sizes)
    assert len(scoring.answers.steps) == 24
    assert scoring.answers.order.most == 8  # of 24 rows for 3 prompts
    found = score(model, scoring, SETTINGS.temperature)[: len(completions), : expected.shape[1]]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_probabilities_of_all_completions_sum_to_one(reasoner):
    model = reasoner(max_latent_steps=2)
    settings = SamplingSettings(1.0, max_new_tokens=4, eos_id=EOS)
    words = [token for token in range(8) if token != EOS]

    def answers(tokens: int) -> list[tuple[int, ...]]:
        """Every answer of at most `tokens` tokens: it ends in EOS, or is cut off."""
        if tokens == 0:
            return [()]
        return [(EOS,), *((word, *rest) for word in words for rest in answers(tokens - 1))]

    completions = [
        Completion(0, (*[CONTINUE] * steps, STOP, *answer))
        for steps in range(3)
        for answer in answers(4 - steps - 1)
    ]
    log_probs = score_completions(model, PROMPTS, completions, settings)
    mask = loss_mask(completions, model.settings)
    total = (log_probs * mask).sum(1).exp().sum().item()
    assert total == pytest.approx(1.0, abs=1e-9)


def test_mask_covers_eos_and_cut_off_tokens_but_no_forced_stop(reasoner):
    special = reasoner(max_latent_steps=3).settings
    completions = [
        Completion(0, (CONTINUE, CONTINUE, CONTINUE, STOP, 3, EOS)),
        Completion(0, (CONTINUE, CONTINUE, STOP, 3, 4, 5, 6)),
        Completion(0, (STOP, START, CONTINUE, CONTINUE, CONTINUE, STOP)),
    ]
    assert loss_mask(completions, special).int().tolist() == [
        [1, 1, 1, 0, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 0, 0],
    ]
