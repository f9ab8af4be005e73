"""Where a text that a model writes first holds a marker, told from its tokens alone.

A marker (` The answer is:`) may be split into tokens in many ways, and a token may hold more than
its end. What decides is therefore the text so far, of which only one number is kept for each row:
how many characters of the marker its end agrees with. A table says how a token changes it, so that
nothing is decoded and no device waits.

M characters of the marker, V tokens, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from latent_reasoning.data.context import decode, read_pieces
from latent_reasoning.data.rows import DataError
from latent_reasoning.data.sequences import ANSWER_WORDS, COLON


def marker_table(texts: Sequence[str], marker: str) -> Tensor:
    """What progress `i` towards `marker` becomes after a token: int16 `(M + 1, V)`.

    `texts` (V,) are the tokens' texts. Progress M means that the marker has been written, and
    stays. Raises `ValueError` for an empty marker.
    """
    if not marker:
        raise ValueError("the marker is empty")
    table = torch.zeros(len(marker) + 1, len(texts), dtype=torch.int16)
    table[-1] = len(marker)
    of_text: dict[str, list[int]] = {}
    for token, text in enumerate(texts):
        of_text.setdefault(text, []).append(token)
    for text, tokens in of_text.items():
        if text and not set(marker) & set(text):
            continue
        column = [_progress(marker[:read] + text, marker) for read in range(len(marker))]
        table[:-1, tokens] = torch.tensor(column, dtype=torch.int16)[:, None]
    return table


def _progress(text: str, marker: str) -> int:
    """Length of the longest end of `text` that begins the marker; all of it once it is there."""
    if marker in text:
        return len(marker)
    lengths = range(min(len(marker), len(text)), -1, -1)
    return next(length for length in lengths if text.endswith(marker[:length]))


def answer_marker_table(tokenizer: PreTrainedTokenizerBase, tokens: int) -> Tensor:
    """The table of ` The answer is:` for a model with an embedding of `tokens` rows.

    Raises `DataError` where the marker as it is taught would not be seen.
    """
    known = min(tokens, len(tokenizer))
    texts = [decode(tokenizer, [token]) for token in range(known)] + [""] * (tokens - known)
    table = marker_table(texts, ANSWER_WORDS + COLON)
    taught = [token for ids in read_pieces(tokenizer, [ANSWER_WORDS, COLON]) for token in ids]
    progress = progress_after(table, torch.zeros(1, dtype=torch.long), torch.tensor([taught]))
    if int(progress) < len(table) - 1:
        raise DataError(
            f"the tokenizer writes {ANSWER_WORDS + COLON!r} in tokens whose texts are not that "
            "text one after the other: where thinking ends cannot be told; use another base model"
        )
    return table


def progress_after(table: Tensor, progress: Tensor, tokens: Tensor) -> Tensor:
    """Progress `(R,)` of rows after they have written `tokens` `(R, T)`."""
    for column in tokens.unbind(1):
        progress = table[progress, column].long()
    return progress
