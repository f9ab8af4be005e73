"""A word-level tokenizer for generated problems, so that the laptop experiment needs no download.

One token is a word, a number, a sign or one of the fixed pieces of the format. Words carry the
space before them, as in GPT-2, so that pieces tokenised apart decode to exactly the text they came
from. Numbers do not: `` 5`` in a sentence and ``5`` in an equation are the same token, because a
tiny model would otherwise learn arithmetic twice. Their space is put back in decoding, except after
a sign or an opening bracket.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from latent_reasoning.data.dial.problems import (
    BEGIN_VERBS,
    DAYS,
    END_VERBS,
    NAMES,
    OBJECTS,
    OPERATION_WORDS,
)
from latent_reasoning.data.dial.styles import RESULTS_PREFIX

BOS_TOKEN = "<|begin_of_text|>"
EOS_TOKEN = "<|eot_id|>"
UNKNOWN_TOKEN = "<|unknown|>"

# Alternatives in the order they are tried: the fixed pieces first, then words, numbers and signs.
TOKEN_PATTERN = (
    rf"{RESULTS_PREFIX}| The answer is|<<\(|\)%\d+=|<<|>>|'s| ?[A-Za-z]+|\d+| ?[^\sA-Za-z\d]|\s"
)


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose vocabulary is every token of ``texts``, in sorted order.

    BOS is ``<|begin_of_text|>``; EOS, also the padding, is ``<|eot_id|>``. It adds neither by
    itself. Words outside the vocabulary become ``<|unknown|>``.
    """
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" (?=\d)"), behavior="removed"),
            pre_tokenizers.Split(Regex(TOKEN_PATTERN), behavior="isolated"),
        ]
    )
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    vocabulary = [BOS_TOKEN, EOS_TOKEN, UNKNOWN_TOKEN, *sorted(words)]
    tokenizer = Tokenizer(
        models.WordLevel(
            {word: index for index, word in enumerate(vocabulary)}, unk_token=UNKNOWN_TOKEN
        )
    )
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex(r"^(?=\d)"), " "),
            decoders.Fuse(),
            decoders.Replace(Regex(r"(?<=[(+*/=-]) (?=\d)"), ""),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=EOS_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def generated_texts(modulus: int) -> list[str]:
    """Texts that hold every token of generated problems with values ``0 .. modulus - 1``.

    The vocabulary is thus a function of ``modulus`` alone, not of the rows that were drawn.
    """
    numbers = " ".join(str(number) for number in range(modulus))
    words = (*OBJECTS, *DAYS, *OPERATION_WORDS.values(), *BEGIN_VERBS, *END_VERBS)
    signs = "".join(OPERATION_WORDS)
    return [
        # The first sentence's day opens the text if no prefix stands before the question.
        *DAYS,
        *(f" {name}'s" for name in NAMES),
        *(f" {word}" for word in words),
        f" {numbers} {modulus} of at. Where does it?",
        f"<<({signs})%{modulus}=>>",
        "Question:",
        f"{RESULTS_PREFIX} The answer is:",
    ]
