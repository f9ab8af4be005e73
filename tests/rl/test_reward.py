"""The relative-length reward: verdicts, the accuracy requirement, groups."""

import pytest

from latent_reasoning.config import Reward
from latent_reasoning.data.rows import DataError
from latent_reasoning.rl.reward import Verdict, Verdicts, judge, label_number
from latent_reasoning.rl.reward import rewards as tensor_rewards

PAPER = Reward(penalty=1e-4, bonus=1e-1, accuracy_requirement=1.0)


def rewards(groups: str, verdicts: list[Verdict], settings: Reward) -> list[float]:
    return tensor_rewards(groups, Verdicts.of(verdicts), settings).tolist()


def correct(*lengths: int) -> list[Verdict]:
    return [Verdict(well_formatted=True, correct=True, length=length) for length in lengths]


def wrong(*lengths: int) -> list[Verdict]:
    return [Verdict(well_formatted=True, correct=False, length=length) for length in lengths]


BADLY_FORMATTED = Verdict(well_formatted=False, correct=False, length=9)


def completion(latent_steps: int, answer: str) -> str:
    return "<|CONTINUE|>" * latent_steps + "<|STOP|> The answer is: " + answer


class TestJudge:
    def test_length_counts_start_continue_and_stop(self):
        verdict = judge("What?<START>", completion(3, "5<|eot_id|>"), "5")
        assert verdict == Verdict(well_formatted=True, correct=True, length=5)

    def test_latent_tokens_inside_the_answer_count_too(self):
        assert judge("What?<START>", completion(1, "<|CONTINUE|> 5"), "5").length == 4

    def test_a_right_number_in_a_bad_format_is_not_correct(self):
        verdict = judge("What?<START>", "<|CONTINUE|><|STOP|>so The answer is: 5", "5")
        assert verdict == Verdict(well_formatted=False, correct=False, length=3)

    def test_two_prefixes_are_badly_formatted(self):
        text = completion(1, "5 The answer is: 5")
        assert judge("What?<START>", text, "5") == Verdict(False, False, 3)

    def test_thousands_separators_do_not_matter(self):
        assert judge("<START>", completion(0, "1,200 apples"), "1200").correct

    def test_a_wrong_number_is_wrong(self):
        assert judge("<START>", completion(0, "6"), "5") == Verdict(True, False, 2)


class TestLabelNumber:
    def test_reads_the_first_number(self):
        assert label_number("1,200", "row 3") == 1200.0

    def test_refuses_a_label_without_a_number_and_names_the_row(self):
        with pytest.raises(DataError, match="rl-17"):
            label_number("nan", "rl-17")


class TestRewards:
    def test_a_solved_prompt_is_pushed_shorter(self):
        assert rewards("aaa", correct(3, 5, 7), PAPER) == pytest.approx(
            [1 + 0.5e-4, 1.0, 1 - 0.5e-4], abs=1e-12
        )

    def test_an_unsolved_prompt_is_pushed_longer_over_its_correct_samples_alone(self):
        verdicts = [*correct(4, 8), *wrong(30)]
        assert rewards("aaa", verdicts, PAPER) == pytest.approx([0.95, 1.05, 0.0])

    def test_bad_format_earns_minus_one(self):
        assert rewards("aa", [BADLY_FORMATTED, *correct(4)], PAPER) == [-1.0, 1.0]

    def test_equal_lengths_have_no_length_term(self):
        assert rewards("aaa", correct(8, 8, 8), PAPER) == [1.0, 1.0, 1.0]

    def test_nothing_correct_gives_zeros(self):
        assert rewards("aa", wrong(3, 4), PAPER) == [0.0, 0.0]

    @pytest.mark.parametrize(
        ("requirement", "solved"),
        [(None, True), (0.5, True), (0.75, False), (1, False), (2, True), (3, False)],
    )
    def test_requirement_is_a_share_up_to_one_and_a_count_above(self, requirement, solved):
        settings = Reward(penalty=0.2, bonus=0.4, accuracy_requirement=requirement)
        verdicts = [*correct(4, 6), *wrong(5, 5)]
        shift = -0.1 if solved else 0.2
        assert rewards("aaaa", verdicts, settings) == pytest.approx([1 - shift, 1 + shift, 0, 0])

    def test_a_null_bonus_gives_no_term_below_the_requirement(self):
        settings = Reward(penalty=0.2, bonus=None, accuracy_requirement=1.0)
        assert rewards("aaa", [*correct(4, 6), *wrong(5)], settings) == [1.0, 1.0, 0.0]

    def test_interleaved_prompts_form_their_own_groups(self):
        verdicts = [v for pair in zip(correct(3, 5), correct(4, 40), strict=True) for v in pair]
        both = rewards("abab", verdicts, PAPER)
        assert both[0::2] == rewards("aa", correct(3, 5), PAPER)
        assert both[1::2] == rewards("aa", correct(4, 40), PAPER)

    def test_a_prompt_that_occurs_twice_pools_its_samples(self):
        assert rewards("aaaa", [*correct(4, 8), *wrong(5, 5)], PAPER)[:2] == pytest.approx(
            [0.95, 1.05]
        )
