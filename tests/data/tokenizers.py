"""Small imitations of the field's tokenizers, trained on the spot on texts of our form."""

from __future__ import annotations

import functools
import itertools

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from latent_reasoning.data.sequences import SPECIAL_TOKENS

TEXTS = [
    f"Question: Ann has {a} pens, and gets {b}. How many?<<{a}+{b}={a + b}>> The answer is: {a + b}"
    for a, b in itertools.product(range(30), range(30))
] + ["<<600*30/4-1.5=4,498.5>> It falls by 5.5? Half of 600 boxes cost $18. -3.5\nThe answer"]
METASPACE = "▁"
ADDING_SPACES = ("llama-2", "metaspace-first", "metaspace-always", "byte-level-prefix", "unigram")
"""Those that put a space before every text; the others add nothing."""
KINDS = ("gpt-2", "gemma", *ADDING_SPACES)
REFUSED = ("words", "lower-case")


def imitation(kind: str, *, latent: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of one of the kinds, with BOS (not GPT-2's), EOS and unknown token."""
    return _with_special_tokens(Tokenizer.from_str(_trained(kind)), latent)


@functools.cache
def _trained(kind: str) -> str:
    special = ["<unk>", "<s>", "</s>"]
    model: models.Model = models.BPE(unk_token="<unk>")
    trainer: trainers.Trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special)
    if kind == "unigram":
        model = models.Unigram()
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    elif kind == "words":
        model = models.WordLevel(unk_token="<unk>")
        trainer = trainers.WordLevelTrainer(vocab_size=5000, special_tokens=special)
    tokenizer = Tokenizer(model)
    _set_up(tokenizer, kind)
    tokenizer.train_from_iterator(TEXTS, trainer)
    if kind == "llama-2":
        tokenizer.pre_tokenizer = None  # Llama 2 merges over whole texts; training needs words
    if kind != "gpt-2":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return tokenizer.to_str()


def _set_up(tokenizer: Tokenizer, kind: str) -> None:
    spaces = [decoders.Replace(METASPACE, " "), decoders.Fuse()]
    stripping = decoders.Sequence([*spaces, decoders.Strip(" ", 1, 0)])
    if kind in ("gpt-2", "byte-level-prefix", "lower-case"):
        prefix = kind == "byte-level-prefix"
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        tokenizer.decoder = decoders.ByteLevel()
        if kind == "lower-case":
            tokenizer.normalizer = normalizers.Lowercase()
    elif kind == "words":
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    elif kind == "llama-2":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(METASPACE), normalizers.Replace(" ", METASPACE)]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Split(METASPACE, "merged_with_next")
        tokenizer.decoder = stripping
    else:
        scheme = {"metaspace-first": "first", "gemma": "never"}.get(kind, "always")
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(METASPACE, prepend_scheme=scheme)
        tokenizer.decoder = decoders.Sequence(spaces) if kind == "gemma" else stripping


def _with_special_tokens(tokenizer: Tokenizer, latent: bool) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    if latent:
        tokens = [AddedToken(text, normalized=False, special=True) for text in SPECIAL_TOKENS]
        fast.add_tokens(tokens, special_tokens=True)
    return fast
