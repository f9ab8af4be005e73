"""The four special tokens, added to a language model (docs/method.md, section 3)."""

from __future__ import annotations

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from latent_reasoning.config import ConfigError, Model
from latent_reasoning.data.sequences import SPECIAL_TOKENS, SpecialTokens, special_token_ids
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import LatentSettings

VOCABULARY_MULTIPLE = 128
"""The number of rows of the embedding matrices is padded to a multiple of this."""


def add_special_tokens(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    start_token_from: str | None = None,
    end_token_from: str | None = None,
) -> SpecialTokens:
    """Add START, END, CONTINUE and STOP to tokenizer and matrices, in place; returns their ids.

    Every new row, padding rows included, is the mean of the earlier tokens' rows (conformance note
    13). `start_token_from` copies the row of a text's first token to START, `end_token_from` to
    END. If the tokenizer has all four tokens already, nothing changes. Raises `ConfigError` for a
    text without tokens.
    """
    before = len(tokenizer)
    copied = {
        "start": _first_token(tokenizer, start_token_from, "model.start_token_from"),
        "end": _first_token(tokenizer, end_token_from, "model.end_token_from"),
    }
    tokens = [AddedToken(text, normalized=False, special=True) for text in SPECIAL_TOKENS]
    added = tokenizer.add_tokens(tokens, special_tokens=True)
    ids = special_token_ids(tokenizer)
    if not added:
        return ids
    rows = max(len(tokenizer), base.get_input_embeddings().weight.shape[0])
    rows = -(-rows // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    base.resize_token_embeddings(rows, mean_resizing=False)
    output = base.get_output_embeddings()
    for parameter in (base.get_input_embeddings().weight, output.weight, output.bias):
        if parameter is not None:
            _fill_new_rows(parameter, before, {getattr(ids, t): row for t, row in copied.items()})
    return ids


@torch.no_grad()
def _fill_new_rows(parameter: Tensor, before: int, copied: dict[int, int | None]) -> None:
    """Fill later rows with the mean of the first `before`, or from the row `copied` names."""
    parameter[before:] = parameter[:before].mean(0)
    for row, source in copied.items():
        if source is not None:
            parameter[row] = parameter[source]


def _first_token(tokenizer: PreTrainedTokenizerBase, text: str | None, key: str) -> int | None:
    """Id of the first token of a text, None for no text; errors name `key`."""
    if text is None:
        return None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigError(f"{key}: the tokenizer reads {text!r} as no token at all")
    return ids[0]


def make_latent(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Model
) -> LatentReasoner:
    """A latent reasoner around `base` with the configuration section `model`.

    The special tokens are added to `base` and `tokenizer` in place.
    """
    ids = add_special_tokens(base, tokenizer, settings.start_token_from, settings.end_token_from)
    return LatentReasoner(
        base,
        LatentSettings(
            start_id=ids.start,
            end_id=ids.end,
            continue_id=ids.continue_,
            stop_id=ids.stop,
            recurrent_filter=settings.recurrent_filter,
            stop_head_temperature=settings.stop_head_temperature,
            detach_stop_head=settings.detach_stop_head,
            allow_rethinking=settings.allow_rethinking,
        ),
    )
