"""The exact estimator: lengths, answers, and that the sampled gradient has the same mean."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from latent_reasoning.config import Reward
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.trajectory import Trajectory
from latent_reasoning.rl.exact import (
    draw_stratified,
    sample_all_lengths,
    survival_probabilities,
)
from latent_reasoning.rl.grpo import advantages, policy_loss
from latent_reasoning.rl.reward import Outcome, Outcomes, reward_groups, rewards
from latent_reasoning.rl.rollouts import (
    Completion,
    Rollout,
    SamplingSettings,
    draw_uniforms,
    sample,
)
from latent_reasoning.rl.scoring import loss_mask, score_completions
from tests.rl.conftest import CONTINUE, EOS, PROMPTS, STOP


class TestStopDraws:
    def test_a_sample_has_one_draw_in_each_part_of_the_unit_interval(self):
        draws = draw_stratified(3, 5, seed=1, groups=8)
        assert draws.shape == (3, 8, 5)
        parts = (draws * 8).floor().sort(dim=1).values
        assert torch.equal(parts, torch.arange(8.0).double()[:, None].expand(3, 8, 5))

    def test_equal_seeds_give_equal_draws(self):
        assert torch.equal(draw_stratified(2, 4, seed=3), draw_stratified(2, 4, seed=3))
        assert not torch.equal(draw_stratified(2, 4, seed=3), draw_stratified(2, 4, seed=4))

    def test_the_samples_of_a_group_are_uncorrelated(self):
        draws = draw_stratified(200, 2, seed=0, groups=16)
        pairs = draws.flatten(0, 1).T
        assert abs(torch.corrcoef(pairs)[0, 1].item()) < 4 / pairs.shape[1] ** 0.5


class TestStopDistribution:
    @pytest.mark.parametrize(("max_latent_steps", "longest"), [(3, 3), (None, 6), (6, 6), (20, 6)])
    def test_is_the_product_of_the_decisions_and_sums_to_one(
        self, reasoner, max_latent_steps, longest
    ):
        model = reasoner(max_latent_steps=max_latent_steps)
        settings = SamplingSettings(0.8, 6, EOS)
        trajectory = Trajectory.begin(model, PROMPTS)
        survival = survival_probabilities(model, trajectory, settings)
        assert survival.shape == (3, longest)
        continues, stops = trajectory.decision_log_probs(model, 0.8).detach().exp().unbind(-1)
        one, none = torch.ones(3, 1).double(), torch.zeros(3, 1).double()
        distribution = -torch.cat([one, survival, none], dim=1).diff(dim=1)
        assert distribution.sum(1).tolist() == pytest.approx([1, 1, 1], abs=1e-12)
        for n in range(longest):
            by_hand = continues[:, :n].prod(1) * stops[:, n]
            assert distribution[:, n].tolist() == pytest.approx(by_hand.tolist(), abs=1e-12)
        forced = continues[:, :longest].prod(1)
        assert distribution[:, longest].tolist() == pytest.approx(forced.tolist(), abs=1e-12)

    def test_no_step_is_taken_that_is_too_unlikely_for_all_prompts(self, reasoner):
        model = reasoner()
        settings = SamplingSettings(1.0, 20, EOS)
        whole = survival_probabilities(model, Trajectory.begin(model, PROMPTS), settings)
        trajectory = Trajectory.begin(model, PROMPTS)
        cut = survival_probabilities(model, trajectory, settings, negligible=0.01)
        assert trajectory.steps + 1 == cut.shape[1] < whole.shape[1]
        assert torch.equal(cut, whole[:, : cut.shape[1]])
        assert cut[:, -1].max() <= 0.01 < cut[:, -2].max()


@pytest.mark.parametrize(
    ("max_latent_steps", "allow_rethinking"), [(3, False), (None, False), (2, True)]
)
def test_a_sample_answers_at_each_length_what_it_would_have_answered_there(
    reasoner, max_latent_steps, allow_rethinking
):
    """Draws that continue n times and then stop make the sampled estimator say the same."""
    model = reasoner(allow_rethinking=allow_rethinking, max_latent_steps=max_latent_steps)
    settings = SamplingSettings(1.0, 7, EOS)
    uniforms, draws = draw_uniforms(3, 4, 7, seed=5), draw_stratified(3, 4, seed=6, groups=16)
    rollout, trajectory = sample_all_lengths(model, PROMPTS, uniforms, draws, settings)
    survival = survival_probabilities(model, Trajectory.begin(model, PROMPTS), settings)
    steps = (draws[..., None] < survival[:, None, None]).sum(-1)
    assert rollout.groups == 16
    assert rollout.sample_completion.shape == (3, 16 * 4)
    assert trajectory.steps == min(steps.max().item(), 6)
    for group, of_group in enumerate(rollout.sample_completion.view(3, 16, 4).unbind(1)):
        forced = uniforms.clone()
        positions = torch.arange(7)
        own = steps[:, group, :, None]
        forced[(positions < own).expand_as(forced)] = 0.0
        forced[(positions == own).expand_as(forced)] = 1 - 2**-24
        expected, _ = sample(model, PROMPTS, forced, settings)
        for prompt in range(3):
            ours, theirs = of_group[prompt].tolist(), expected.sample_completion[prompt].tolist()
            assert [rollout.completions[i] for i in ours] == [
                Completion(prompt, expected.completions[j].ids, rollout.completions[i].count)
                for i, j in zip(ours, theirs, strict=True)
            ]
    assert rollout.weights.sum() == 3 * 16 * 4


GROUP = 3


def outcome(ids: tuple[int, ...]) -> Outcome:
    """Some completions are badly formatted, of the others two in three are right."""
    steps = ids.index(STOP)
    return Outcome(ids[-1] != 4, ids[-1] != 4 and (sum(ids) + steps) % 3 > 0, steps + 2)


@dataclass
class Enumeration:
    """All completions that a model can give to one prompt, in groups of three.

    `gradients` (U, D) are those of each completion's log-probability over T; `exact` (D,) is the
    gradient of the expected loss `dr_grpo`: `-sum p(x) A(x) grad log p(x) / T`, with A(x) the mean
    advantage of x over all pairs of other samples.
    """

    model: LatentReasoner
    settings: SamplingSettings
    completions: list[Completion]
    probabilities: Tensor
    gradients: Tensor
    exact: Tensor

    def coefficients(self, rollout: Rollout) -> Tensor:
        """The loss of each prompt's groups has the gradient `coefficients @ gradients`: (P, U)."""
        outcomes = [outcome(c.ids) for c in rollout.completions]
        questions = range(len(rollout.prompts))
        (values,), _ = reward_groups([rollout], [outcomes], questions, Reward())
        place = {completion.ids: index for index, completion in enumerate(self.completions)}
        out = torch.zeros(len(rollout.prompts), len(self.completions), dtype=torch.float64)
        for completion, value in zip(rollout.completions, values.tolist(), strict=True):
            out[completion.prompt, place[completion.ids]] = -value * completion.count
        return out / rollout.sample_completion.shape[1]


@pytest.fixture
def enumeration(reasoner) -> Enumeration:
    model, settings = reasoner(max_latent_steps=2), SamplingSettings(1.0, 3, EOS)
    answers = [(t,) for t in range(8)]
    pairs = [(s, t) for s in range(8) for t in range(8) if s != EOS] + [(EOS,)]
    every = [(STOP, *pair) for pair in pairs]
    every += [(CONTINUE, STOP, *answer) for answer in answers] + [(CONTINUE, CONTINUE, STOP)]
    completions = [Completion(0, ids) for ids in every]
    mask = loss_mask(completions, model.settings)
    log_probs = (score_completions(model, PROMPTS[:1], completions, settings) * mask).sum(1)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = [
        torch.autograd.grad(value / 3, weights, retain_graph=True, materialize_grads=True)
        for value in log_probs
    ]
    gradients = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    probabilities = log_probs.detach().exp()
    groups = torch.cartesian_prod(*[torch.arange(len(every))] * GROUP)
    outcomes = Outcomes.of([outcome(ids) for ids in every]).at(groups.T)
    values = advantages(rewards(["q"] * GROUP, outcomes, Reward()).T.flatten(), GROUP)
    first, chance = values.view(-1, GROUP)[:, 0], probabilities[groups].prod(1)
    earned = torch.zeros(len(every)).double().index_add(0, groups[:, 0], first * chance)
    exact = -earned @ gradients
    return Enumeration(model, settings, completions, probabilities, gradients, exact)


def test_the_means_of_both_gradients_are_the_exact_one(enumeration):
    """Against the sum over all groups of three; the exact estimator varies much less."""
    model, settings = enumeration.model, enumeration.settings
    assert enumeration.probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    repeats = 2500
    prompts, uniforms = PROMPTS[:1] * repeats, draw_uniforms(repeats, GROUP, 3, seed=11)
    draws = draw_stratified(repeats, GROUP, seed=12, groups=8)
    with torch.no_grad():
        rollouts = {
            "sampled": sample(model, prompts, uniforms, settings)[0],
            "exact": sample_all_lengths(model, prompts, uniforms, draws, settings)[0],
        }
    generator = torch.Generator().manual_seed(0)
    size = enumeration.gradients.shape[1]
    directions = torch.randn(size, 6, generator=generator, dtype=torch.float64)
    variance = {}
    for name, rollout in rollouts.items():
        made = enumeration.coefficients(rollout) @ enumeration.gradients
        error = made.mean(0) - enumeration.exact
        variance[name] = made.var(0).sum().item()
        # Expected: the variance over the number of groups. A wrong weight would be far off.
        assert (error @ error).item() < 2 * variance[name] / repeats
        z = error @ directions / ((made @ directions).std(0) / repeats**0.5)
        assert z.abs().max().item() < 4, name
    # Answers are as random as can be here, and remain so: 0.37 were measured.
    assert variance["exact"] < 0.45 * variance["sampled"]


def test_the_loss_has_the_gradient_that_its_weights_and_advantages_say(enumeration):
    model, settings = enumeration.model, enumeration.settings
    rollout, trajectory = sample_all_lengths(
        model,
        PROMPTS[:1],
        draw_uniforms(1, GROUP, 3, seed=3),
        draw_stratified(1, GROUP, seed=4),
        settings,
    )
    outcomes = [outcome(c.ids) for c in rollout.completions]
    (values,), _ = reward_groups([rollout], [outcomes], ["q"], Reward())
    loss = policy_loss(
        score_completions(model, PROMPTS[:1], rollout.completions, settings, trajectory),
        values,
        loss_mask(rollout.completions, model.settings),
        kind="dr_grpo",
        epsilon=0.2,
        kl_weight=0.0,
        max_completion_length=3,
        weights=rollout.weights,
    ).loss
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts = torch.autograd.grad(loss, weights, materialize_grads=True)
    actual = torch.cat([part.flatten() for part in parts])
    expected = enumeration.coefficients(rollout)[0] @ enumeration.gradients
    assert (actual - expected).norm() <= 1e-12 * expected.norm()
