"""The four special tokens, added to a language model (docs/method.md, section 3)."""

from __future__ import annotations

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from latent_reasoning.config import ConfigError, Model
from latent_reasoning.data.context import name_of, read_pieces
from latent_reasoning.data.round_trip import check_round_trip
from latent_reasoning.data.rows import DataError
from latent_reasoning.data.sequences import (
    END,
    SPECIAL_TOKENS,
    START,
    SpecialTokens,
    beginning,
    missing_special_tokens,
    special_token_ids,
)
from latent_reasoning.model.bases import scaled_rows
from latent_reasoning.model.gaussian import GaussianHead
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import LatentSettings

VOCABULARY_MULTIPLE = 128
"""The number of rows of the embedding matrices is padded to a multiple of this."""


def add_special_tokens(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    start_token_from: str | None = None,
    end_token_from: str | None = None,
    multiple: int = VOCABULARY_MULTIPLE,
) -> SpecialTokens:
    """Add START, END, CONTINUE and STOP to tokenizer and matrices, in place; returns their ids.

    Every new row, padding rows included, is the mean of the earlier tokens' rows (conformance note
    13). `start_token_from` copies the row of a text's first token to START, `end_token_from` to
    END. A token that the tokenizer has already keeps its row. The matrices' rows are padded to a
    `multiple`.

    Raises:
        ConfigError: a text without tokens, or a row to copy for a token that has one.
        DataError: the tokenizer gives a new token an id that another token has.
    """
    missing = missing_special_tokens(tokenizer)
    sources = {START: ("start", start_token_from), END: ("end", end_token_from)}
    copied = {
        token: _first_token(tokenizer, text, f"model.{key}_token_from", token in missing)
        for token, (key, text) in sources.items()
    }
    used = set(tokenizer.get_vocab().values())
    matrix_rows = base.get_input_embeddings().weight.shape[0]
    # Ids may have gaps, and a tokenizer may have more tokens than the matrix has rows.
    before = min(max(used) + 1, matrix_rows)
    add_latent_tokens(tokenizer)
    ids = special_token_ids(tokenizer)
    new = {tokenizer.convert_tokens_to_ids(token) for token in missing}
    if len(new) < len(missing) or new & used:
        raise DataError(
            f"the tokenizer {name_of(tokenizer)} gives {', '.join(missing)} ids that other tokens "
            "have: its ids have gaps; renumber its vocabulary"
        )
    needed = max(*used, *new) + 1
    if not missing and needed <= matrix_rows:
        return ids
    rows = -(-max(needed, matrix_rows) // multiple) * multiple
    base.resize_token_embeddings(rows, mean_resizing=False)
    output = base.get_output_embeddings()
    copies = {ids.start: copied[START], ids.end: copied[END]}
    for parameter in (base.get_input_embeddings().weight, output.weight, output.bias):
        if parameter is not None:
            _fill_new_rows(parameter, before, copies)
    return ids


def add_latent_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Add START, END, CONTINUE and STOP to a tokenizer alone, in place."""
    tokens = [AddedToken(text, normalized=False, special=True) for text in SPECIAL_TOKENS]
    tokenizer.add_tokens(tokens, special_tokens=True)


@torch.no_grad()
def _fill_new_rows(parameter: Tensor, before: int, copied: dict[int, int | None]) -> None:
    """Fill later rows with the mean of the first `before`, or from the row `copied` names."""
    parameter[before:] = parameter[:before].mean(0)
    for row, source in copied.items():
        if source is not None:
            parameter[row] = parameter[source]


def _first_token(
    tokenizer: PreTrainedTokenizerBase, text: str | None, key: str, is_new: bool
) -> int | None:
    """Id of the first token of a text, None for no text; errors name `key`."""
    if text is None:
        return None
    if not is_new:
        raise ConfigError(f"{key}: the tokenizer has this token already, with a row of its own")
    (ids,) = read_pieces(tokenizer, [text])
    if not ids:
        raise ConfigError(f"{key}: the tokenizer reads {text!r} as no token at all")
    if ids[0] == tokenizer.unk_token_id and text != tokenizer.unk_token:
        raise ConfigError(
            f"{key}: the tokenizer reads {text!r} as the unknown token {tokenizer.unk_token}; "
            "choose a text that it knows"
        )
    return ids[0]


def make_latent(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Model
) -> LatentReasoner:
    """A latent reasoner around `base` with the configuration section `model`.

    The special tokens are added to `base` and `tokenizer` in place.
    """
    embedding_std = scaled_rows(base, base.get_input_embeddings().weight.detach()).std()
    ids = add_special_tokens(base, tokenizer, settings.start_token_from, settings.end_token_from)
    is_mixture = settings.recurrent_filter == "mixture"
    model = LatentReasoner(
        base,
        LatentSettings(
            start_id=ids.start,
            end_id=ids.end,
            continue_id=ids.continue_,
            stop_id=ids.stop,
            recurrent_filter=settings.recurrent_filter,
            filter_width=settings.filter_width,
            filter_norm=settings.filter_norm,
            deterministic_latents=settings.deterministic_latents,
            stop_rule=settings.stop_rule,
            mixture_size=settings.mixture_size if is_mixture else None,
            mixture_temperature=settings.mixture_temperature if is_mixture else 1.0,
            stop_head_temperature=settings.stop_head_temperature,
            detach_stop_head=settings.detach_stop_head,
            allow_rethinking=settings.allow_rethinking,
        ),
    )
    if isinstance(model.recurrent_filter, GaussianHead):
        model.recurrent_filter.embedding_std.copy_(embedding_std)  # the new rows are mean ones
    return model


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, base: PreTrainedModel) -> None:
    """Check that the tokenizer fits the model and that what it is taught is judged right.

    Tokens beyond the matrix of `base` may only be special ones, which texts do not hold; where the
    padding token is one of them, EOS pads instead, in place (padding is masked).

    Raises:
        DataError: the tokenizer is another model's, or does not keep text.
    """
    rows = base.get_input_embeddings().weight.shape[0]
    special = set(tokenizer.all_special_ids) | {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    written = {tokenizer.eos_token_id, *beginning(tokenizer)}
    beyond = [i for i in tokenizer.get_vocab().values() if i >= rows and i not in special - written]
    if beyond:
        token = tokenizer.convert_ids_to_tokens(min(beyond))
        raise DataError(
            f"the tokenizer {name_of(tokenizer)} has {len(beyond)} tokens beyond the model's "
            f"{rows} embeddings, such as {token!r} (id {min(beyond)}): it is another model's"
        )
    if tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    check_round_trip(tokenizer)
