"""Prompts of RL, verdicts on completions, and the numbers of a step."""

import pytest
import torch

from latent_reasoning.config import Reward
from latent_reasoning.data.dial.problems import generate_splits
from latent_reasoning.data.dial.tokenizer import build_tokenizer, generated_texts
from latent_reasoning.data.rows import DataError, Row
from latent_reasoning.data.sequences import SPECIAL_TOKENS
from latent_reasoning.rl.groups import Prompt, judge_completions, reward_groups, rl_prompts
from latent_reasoning.rl.reward import Verdict
from latent_reasoning.rl.rollouts import Completion, Rollout

QUESTION = "Ada's dial runs 0 to 6. Monday plus 6. It starts at 5. Where does it end?"


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = build_tokenizer(generated_texts(7))
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    return tokenizer


def rows(*answers: str, question: str = QUESTION) -> list[Row]:
    return [Row(f"rl-{i}", question, None, answer) for i, answer in enumerate(answers)]


class TestPrompts:
    def test_end_in_start_and_keep_negative_answers(self, tokenizer):
        (prompt,) = rl_prompts(rows("-3"), tokenizer, prefix="Question: ", max_prompt_tokens=None)
        assert prompt.ids[-1] == tokenizer.convert_tokens_to_ids("<START>")
        assert prompt.text == f"Question: {QUESTION}<START>"
        assert prompt.label == "-3"

    def test_longer_than_the_limit_are_dropped(self, tokenizer):
        both = [*rows("1"), *rows("2", question="Ada's dial runs. " + QUESTION)]
        length = len(rl_prompts(both[:1], tokenizer, prefix="", max_prompt_tokens=None)[0].ids)
        kept = rl_prompts(both, tokenizer, prefix="", max_prompt_tokens=length)
        assert [prompt.label for prompt in kept] == ["1"]

    def test_none_left_is_an_error_that_names_the_limit(self, tokenizer):
        with pytest.raises(DataError, match=r"all 2 prompts .* max_prompt_tokens: 3"):
            rl_prompts(rows("1", "2"), tokenizer, prefix="", max_prompt_tokens=3)

    def test_an_answer_without_a_number_is_refused_with_its_row(self, tokenizer):
        with pytest.raises(DataError, match=r"row rl-1: .*'nan'"):
            rl_prompts(rows("1", "nan"), tokenizer, prefix="", max_prompt_tokens=None)


def completion(tokenizer, prompt: int, text: str, count: int = 1) -> Completion:
    return Completion(prompt, tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), count)


def test_completions_are_judged_as_the_text_they_decode_to(tokenizer):
    prompts = [Prompt([], "Q<START>", "5"), Prompt([], "Q<START>", "3")]
    completions = [
        completion(tokenizer, 0, "<|CONTINUE|><|STOP|> The answer is: 5<|eot_id|>"),
        completion(tokenizer, 1, "<|STOP|> The answer is: 5<|eot_id|>"),
        completion(tokenizer, 1, "<|CONTINUE|><|CONTINUE|><|STOP|> plus The answer is: 3"),
    ]
    rollout = Rollout([[], []], completions, torch.tensor([[0, 0], [1, 2]]))
    assert judge_completions(rollout, prompts, tokenizer) == [
        Verdict(well_formatted=True, correct=True, length=3),
        Verdict(well_formatted=True, correct=False, length=2),
        Verdict(well_formatted=False, correct=False, length=4),
    ]


def test_samples_are_rewarded_in_their_groups_and_advantages_go_to_completions():
    solved = Rollout(
        [[1]], [Completion(0, (1,), 2), Completion(0, (2,))], torch.tensor([[0, 1, 0]])
    )
    mixed = Rollout([[2]], [Completion(0, (3,)), Completion(0, (4,), 2)], torch.tensor([[1, 0, 1]]))
    verdicts = [
        [Verdict(True, True, 3), Verdict(True, True, 6)],
        [Verdict(True, True, 4), Verdict(False, False, 5)],
    ]
    (first, second), means = reward_groups([solved, mixed], verdicts, [0, 1], Reward())
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
    verdicts = [Verdict(True, True, 3), Verdict(True, False, 5), Verdict(False, False, 5)]
    (values,), means = reward_groups([rollout], [verdicts], ["q"], Reward())
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
    verdicts = [Verdict(True, True, 3), Verdict(True, True, 5), *[Verdict(True, False, 4)] * 2]
    (values,), _ = reward_groups([both], [verdicts], ["q", "q"], Reward())
    # As a whole the question is unsolved in both groups: the longer one earns more.
    assert values.tolist() == pytest.approx(
        [-0.05 / (0.1 / 2**0.5 + 1e-4) * s for s in (1, -1, 0, 0)]
    )


def test_one_question_in_two_micro_batches_pools_its_samples():
    once = Rollout([[1]], [Completion(0, (1,)), Completion(0, (2,))], torch.tensor([[0, 1]]))
    right, wrong = [Verdict(True, True, n) for n in (3, 5)], [Verdict(True, False, 4)] * 2
    _, apart = reward_groups([once, once], [right, wrong], [0, 1], Reward())
    (pooled, _), means = reward_groups([once, once], [right, wrong], [0, 0], Reward())
    # Unsolved as a whole: the longer of the two right ones earns more.
    assert pooled[0] < 0 < pooled[1]
    assert means["reward"] == pytest.approx(apart["reward"])


def test_generated_rows_fit_the_default_limit(tokenizer):
    made = generate_splits(20, 0, 0, max_steps=5, step_weights=[1] * 5, modulus=7, seed=0)["train"]
    kept = rl_prompts(
        [Row(f"rl-{i}", row["question"], None, row["answer"]) for i, row in enumerate(made)],
        tokenizer,
        prefix="Question: ",
        max_prompt_tokens=100,
    )
    assert len(kept) == 20
