"""The relative-length reward: outcomes, the requirement, groups; recorded in tests/conformance."""

import pytest
import torch

from latent_reasoning.config import Reward
from latent_reasoning.rl.prompts import RlPrompt
from latent_reasoning.rl.reward import (
    Outcome,
    Outcomes,
    judge_completions,
    judge_sample,
    reward_groups,
)
from latent_reasoning.rl.reward import rewards as tensor_rewards
from latent_reasoning.rl.rollouts import Completion, Rollout
from tests.rl.conftest import latent_tokenizer

PAPER = Reward(penalty=1e-4, bonus=1e-1, accuracy_requirement=1.0)


def rewards(groups: str, outcomes: list[Outcome], settings: Reward) -> list[float]:
    return tensor_rewards(groups, Outcomes.of(outcomes), settings).tolist()


def correct(*lengths: int) -> list[Outcome]:
    return [Outcome(well_formatted=True, correct=True, length=length) for length in lengths]


def wrong(*lengths: int) -> list[Outcome]:
    return [Outcome(well_formatted=True, correct=False, length=length) for length in lengths]


BADLY_FORMATTED = Outcome(well_formatted=False, correct=False, length=9)


def completion(latent_steps: int, answer: str) -> str:
    return "<|CONTINUE|>" * latent_steps + "<|STOP|> The answer is: " + answer


@pytest.mark.parametrize(
    ("text", "label", "outcome"),
    [
        (completion(3, "5<|eot_id|>"), "5", Outcome(True, True, 5)),
        # Latent tokens inside the answer count too; thousands separators do not matter.
        (completion(1, "<|CONTINUE|> 5"), "5", Outcome(True, True, 4)),
        (completion(0, "1,200 apples"), "1200", Outcome(True, True, 2)),
        (completion(0, "6"), "5", Outcome(True, False, 2)),
        (completion(0, "-$5."), "-5", Outcome(True, True, 2)),
        ("<|CONTINUE|> <|STOP|>\n The answer is: 5", "5", Outcome(True, True, 3)),
        # A right number in a bad format is not correct; nor is one after two prefixes.
        ("<|CONTINUE|><|STOP|>so The answer is: 5", "5", Outcome(False, False, 3)),
        (completion(1, "5 The answer is: 5"), "5", Outcome(False, False, 3)),
    ],
)
def test_a_sample_is_judged_by_format_number_and_latent_tokens(text, label, outcome):
    assert judge_sample("What?<START>", text, label) == outcome


class TestRewards:
    def test_a_solved_prompt_is_pushed_shorter(self):
        assert rewards("aaa", correct(3, 5, 7), PAPER) == pytest.approx(
            [1 + 0.5e-4, 1.0, 1 - 0.5e-4], abs=1e-12
        )

    def test_an_unsolved_prompt_is_pushed_longer_over_its_correct_samples_alone(self):
        outcomes = [*correct(4, 8), *wrong(30)]
        assert rewards("aaa", outcomes, PAPER) == pytest.approx([0.95, 1.05, 0.0])

    def test_bad_format_earns_minus_one(self):
        assert rewards("aa", [BADLY_FORMATTED, *correct(4)], PAPER) == [-1.0, 1.0]

    @pytest.mark.parametrize(
        ("requirement", "solved"),
        [(None, True), (0.5, True), (0.75, False), (1, False), (2, True), (3, False)],
    )
    def test_requirement_is_a_share_up_to_one_and_a_count_above(self, requirement, solved):
        settings = Reward(penalty=0.2, bonus=0.4, accuracy_requirement=requirement)
        outcomes = [*correct(4, 6), *wrong(5, 5)]
        shift = -0.1 if solved else 0.2
        assert rewards("aaaa", outcomes, settings) == pytest.approx([1 - shift, 1 + shift, 0, 0])


def encoded(tokenizer, prompt: int, text: str, count: int = 1) -> Completion:
    return Completion(prompt, tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), count)


@pytest.mark.parametrize(("rule", "right"), [("exact", True), ("public", False)])
def test_completions_are_judged_by_their_prompts_number_rule(rule, right):
    tokenizer = latent_tokenizer(7)
    completions = [encoded(tokenizer, 0, "<|STOP|> The answer is: 5")]
    rollout = Rollout([[]], completions, torch.tensor([[0]]))
    (outcome,) = judge_completions(rollout, [RlPrompt([], "", "0.5e1", rule)], tokenizer)
    assert outcome.correct is right


def test_completions_are_judged_as_the_text_they_decode_to():
    tokenizer = latent_tokenizer(7)
    prompts = [RlPrompt([], "Q<START>", "5"), RlPrompt([], "Q<START>", "3")]
    completions = [
        encoded(tokenizer, 0, "<|CONTINUE|><|STOP|> The answer is: 5<|eot_id|>"),
        encoded(tokenizer, 1, "<|STOP|> The answer is: 5<|eot_id|>"),
        encoded(tokenizer, 1, "<|CONTINUE|><|CONTINUE|><|STOP|> plus The answer is: 3"),
    ]
    rollout = Rollout([[], []], completions, torch.tensor([[0, 0], [1, 2]]))
    assert judge_completions(rollout, prompts, tokenizer) == [
        Outcome(well_formatted=True, correct=True, length=3),
        Outcome(well_formatted=True, correct=False, length=2),
        Outcome(well_formatted=False, correct=False, length=4),
    ]


def test_samples_are_rewarded_in_their_groups_and_advantages_go_to_completions():
    solved = Rollout(
        [[1]], [Completion(0, (1,), 2), Completion(0, (2,))], torch.tensor([[0, 1, 0]])
    )
    mixed = Rollout([[2]], [Completion(0, (3,)), Completion(0, (4,), 2)], torch.tensor([[1, 0, 1]]))
    outcomes = [
        [Outcome(True, True, 3), Outcome(True, True, 6)],
        [Outcome(True, True, 4), Outcome(False, False, 5)],
    ]
    (first, second), means = reward_groups([solved, mixed], outcomes, [0, 1], Reward())
    # Rewards 1 + 1e-4 / 3 (twice) and 1 - 2e-4 / 3; std 1e-4 / sqrt(3).
    std = 1e-4 / 3**0.5
    expected = [1e-4 / 3 / (std + 1e-4), -2e-4 / 3 / (std + 1e-4)]
    assert first.tolist() == pytest.approx(expected, rel=1e-9)
    # Rewards -1 (twice) and 1: mean -1/3, std 2 / sqrt(3).
    std = 2 / 3**0.5
    assert second.tolist() == pytest.approx([4 / 3 / (std + 1e-4), -2 / 3 / (std + 1e-4)])
    assert means == pytest.approx(
        {
            "reward": (3 + 1 - 2) / 6,
            "reasoning_tokens": (3 + 6 + 3 + 5 + 4 + 5) / 6,
            "rollout_accuracy": 4 / 6,
            "badly_formatted_share": 2 / 6,
            "all_correct_share": 0.5,
            "distinct_share": 4 / 6,
        }
    )


def test_a_completion_of_several_groups_has_its_mean_advantage():
    completions = [Completion(0, (1,), 3), Completion(0, (2,), 2), Completion(0, (3,), 1)]
    # Groups (1, 1), (1, 2) and (3, 2).
    rollout = Rollout([[1]], completions, torch.tensor([[0, 0, 0, 1, 2, 1]]), groups=3)
    outcomes = [Outcome(True, True, 3), Outcome(True, False, 5), Outcome(False, False, 5)]
    (values,), means = reward_groups([rollout], [outcomes], ["q"], Reward())
    # Two groups differ by 1 within: advantages of +-0.5 over (sqrt(0.5) + 1e-4).
    one = 0.5 / (0.5**0.5 + 1e-4)
    assert values.tolist() == pytest.approx([one / 3, (-one + one) / 2, -one], abs=1e-12)
    assert means == pytest.approx(
        {
            "reward": (3 - 1) / 6,
            "reasoning_tokens": (3 * 3 + 3 * 5) / 6,
            "rollout_accuracy": 0.5,
            "badly_formatted_share": 1 / 6,
            "all_correct_share": 1 / 3,
            "distinct_share": 3 / 2,
        }
    )


def test_a_question_that_occurs_twice_pools_its_groups_one_by_one():
    completions = [Completion(p, (n,), 2) for p in (0, 1) for n in (1, 2)]
    samples = torch.tensor([[0, 1, 0, 1], [2, 3, 3, 2]])
    both = Rollout([[1], [1]], completions, samples, groups=2)
    outcomes = [Outcome(True, True, 3), Outcome(True, True, 5), *[Outcome(True, False, 4)] * 2]
    (values,), _ = reward_groups([both], [outcomes], ["q", "q"], Reward())
    # As a whole the question is unsolved in both groups: the longer one earns more.
    assert values.tolist() == pytest.approx(
        [-0.05 / (0.1 / 2**0.5 + 1e-4) * s for s in (1, -1, 0, 0)]
    )


def test_one_question_in_two_micro_batches_pools_its_samples():
    once = Rollout([[1]], [Completion(0, (1,)), Completion(0, (2,))], torch.tensor([[0, 1]]))
    right, wrong = [Outcome(True, True, n) for n in (3, 5)], [Outcome(True, False, 4)] * 2
    _, apart = reward_groups([once, once], [right, wrong], [0, 1], Reward())
    (pooled, _), means = reward_groups([once, once], [right, wrong], [0, 0], Reward())
    # Unsolved as a whole: the longer of the two right ones earns more.
    assert pooled[0] < 0 < pooled[1]
    assert means["reward"] == pytest.approx(apart["reward"])
