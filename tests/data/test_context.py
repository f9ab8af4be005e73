"""Pieces of text in their context, with tokenizers that put a space before every text."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from latent_reasoning.config import LatentSteps
from latent_reasoning.data.answers import is_well_formatted, judge
from latent_reasoning.data.context import decode, read_pieces, read_whole
from latent_reasoning.data.round_trip import ROWS, check_answers, check_round_trip
from latent_reasoning.data.rows import DataError, Row
from latent_reasoning.data.sequences import (
    encode_latent_rows,
    encode_plain_rows,
    encode_prompts,
    reasoning_text,
)
from tests.data.tokenizers import ADDING_SPACES, KINDS, REFUSED, imitation

PIECES = [" The answer is", ":", " -3", " 18,000", "<<1+2=3>>", "12", "", " Half of 3 is 1.5."]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_side_by_side_are_the_text_that_they_came_from(kind) -> None:
    tokenizer = imitation(kind)
    pieces = list(read_pieces(tokenizer, PIECES))
    for text, ids in zip(PIECES, pieces, strict=True):
        assert decode(tokenizer, ids) == text
    joined = [index for ids in pieces for index in ids]
    assert decode(tokenizer, joined) == "".join(PIECES)


@pytest.mark.parametrize("kind", KINDS)
def test_only_tokenizers_that_add_a_space_read_a_piece_otherwise_than_a_text(kind) -> None:
    """The ids of all others are those of the public code, to which the recorded vectors hold us."""
    tokenizer = imitation(kind)
    alone = tokenizer(PIECES, add_special_tokens=False)["input_ids"]
    assert (list(read_pieces(tokenizer, PIECES)) != alone) == (kind in ADDING_SPACES)


@pytest.mark.parametrize("kind", ADDING_SPACES)
def test_a_piece_that_joins_one_guard_is_read_behind_another(kind) -> None:
    """A digit joins the first guard, which is a digit too."""
    tokenizer = imitation(kind)
    (ids,) = read_pieces(tokenizer, ["0 pens"])
    assert decode(tokenizer, ids) == "0 pens"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_taught_is_judged_right_in_every_form(kind) -> None:
    tokenizer = imitation(kind, latent=True)
    check_round_trip(tokenizer)
    for row in ROWS:
        reasoning = reasoning_text(row)
        (plain,) = encode_plain_rows([row], tokenizer, prefix="", reasonings=[reasoning])
        text = decode(tokenizer, plain.input_ids[plain.question_length : -1].tolist())
        assert text == f"{reasoning} The answer is: {row.answer}"
        assert judge(row.answer, text, "text").correct
        (latent,) = encode_latent_rows(
            [row],
            tokenizer,
            prefix="",
            reasonings=[reasoning],
            steps=LatentSteps(min=2, max=2),
            drop_last_step=False,
            shift_target=True,
            mask_latent_labels=False,
            learn_start=True,
        )
        student = latent.student
        text = decode(tokenizer, student.input_ids[student.question_length + 1 : -1].tolist())
        assert text == f"<|CONTINUE|><|CONTINUE|><|STOP|> The answer is: {row.answer}"
        assert judge(row.answer, text, "latent").correct
        assert is_well_formatted(text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_forced_prompt_is_the_beginning_of_the_training_text(kind) -> None:
    tokenizer, row = imitation(kind), ROWS[1]
    (example,) = encode_plain_rows([row], tokenizer, prefix="Question: ", reasonings=[""])
    (prompt,) = encode_prompts([row], tokenizer, prefix="Question: ", latent=False, forced_steps=0)
    assert example.input_ids.tolist()[: len(prompt)] == prompt
    (question,) = encode_prompts([row], tokenizer, prefix="Question: ", latent=False)
    assert question == tokenizer(f"Question: {row.question}")["input_ids"]


@pytest.mark.parametrize(
    ("kind", "read"),
    [("words", " The answer is: 0' and gives 'The answer is : 0"), ("lower-case", "the answer is")],
)
def test_a_tokenizer_that_does_not_keep_text_is_refused_in_one_line(kind, read) -> None:
    assert kind in REFUSED
    with pytest.raises(DataError, match=f"{read}.*would be judged wrong") as refusal:
        check_round_trip(imitation(kind))
    assert "\n" not in str(refusal.value)


def test_a_tokenizer_that_drops_or_cannot_read_a_text_is_refused() -> None:
    letters = {letter: index for index, letter in enumerate("</s> Theanwri:")}
    dropping = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(letters, [])), eos_token="<"
    )
    with pytest.raises(DataError, match=r"reads ' The answer is: 0' and gives '.*' back"):
        check_round_trip(dropping)
    failing = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
    with pytest.raises(DataError, match="cannot read a text"):
        list(read_whole(failing, ["b"]))


def with_characters(text: str, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the characters of `text`, which drops all others without a word."""
    characters = {token: i for i, token in enumerate(["</s>", *dict.fromkeys(text)])}
    tokenizer = Tokenizer(models.BPE(characters, []))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **special)


def test_a_tokenizer_made_for_few_texts_is_refused_with_the_first_answer_that_it_lacks() -> None:
    tokenizer = with_characters(" The answer is:13<>+=", unk_token="</s>", bos_token="</s>")
    check_round_trip(tokenizer)
    rows = [Row("a", "?", (), "31"), Row("b", "?", (), "1301")]
    check_answers(tokenizer, rows[:1])
    with pytest.raises(DataError, match=r"row b: .* of the answer '1301', and reads ' 131'"):
        check_answers(tokenizer, rows)
    with pytest.raises(DataError, match=r"reads ' The answer is: 0' and gives ' The answer is: '"):
        check_round_trip(with_characters(" The answer is:"))


def test_a_tokenizer_whose_unknown_token_is_eos_is_tried_with_all_rows() -> None:
    """As GPT-2's and OPT's: EOS at the end of each text does not mean an unknown word."""
    tokenizer = imitation("gpt-2")
    tokenizer.unk_token = tokenizer.bos_token = tokenizer.eos_token
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("<<1", "<1<")
    with pytest.raises(DataError, match=r"reads '<<1\+2=3>>.* gives '<1<\+2=3>>"):
        check_round_trip(tokenizer)


def test_the_real_tokenizer_of_mistral_is_judged_right(tmp_path) -> None:
    """`pip install mistral-common sentencepiece` brings it; elsewhere imitations stand for it."""
    package = pytest.importorskip("mistral_common")
    pytest.importorskip("sentencepiece")
    file = Path(package.__file__).parent / "data" / "tokenizer.model.v1"
    shutil.copy(file, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}'
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    check_round_trip(tokenizer)
    assert tokenizer.convert_ids_to_tokens(next(read_pieces(tokenizer, [":"]))) == [":"]
