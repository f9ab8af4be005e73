"""Small tokenizers whose ids can be read by eye: one token a character, plus what a test adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from latent_reasoning.data.sequences import SPECIAL_TOKENS

BOS, EOS = "<|begin|>", "<|end|>"


def build(
    merges: Sequence[tuple[str, str]] = (), *, adds_bos: bool = True, latent: bool = True
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the given merges; ids 0 and 1 are BOS and EOS.

    `adds_bos` false is GPT-2's way: no token is put before a text. `latent` adds the four special
    tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [BOS, EOS, *alphabet, *("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(
        models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=list(merges))
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, 0)]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)
    if latent:
        fast.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    return fast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build()


@pytest.fixture(scope="session")
def build_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return build
