"""Text in context: the ids of a piece of text that stands within a longer one, and their text.

Many tokenizers put a space before every text (Llama 2, Mistral, Phi-3: SentencePiece's prefix), and
take the first space away in decoding. `:` alone would then be read as ` :`, and what comes after a
prompt would lose its first space. With such a tokenizer a piece is read and decoded behind a guard:
a short text that no token joins to what follows, whose own ids and text are cut off again.
Tokenizers that add nothing (GPT-2, Llama 3, Qwen, Gemma) read and decode pieces as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from latent_reasoning.data.rows import DataError

if TYPE_CHECKING:  # seconds to import, and the stage prepare_data has no tokenizer
    from transformers import PreTrainedTokenizerBase

GUARDS = ("", "0", "a", ")", "\n")
"""Texts that may stand before a piece, in the order they are tried; the first is no guard."""

PROBES = (" The answer is", ":", " 0")
"""Pieces that must decode to what they are, side by side, behind the guard."""

ROWS_PER_CALL = 8192
"""Texts tokenised at once: bounds the memory of the tokenizer's own output."""


@dataclass(frozen=True)
class _Guard:
    """The guard's text, its ids where it begins a text, and what those decode to."""

    text: str
    ids: list[int]
    decoded: str


_GUARD_OF: WeakKeyDictionary[PreTrainedTokenizerBase, _Guard] = WeakKeyDictionary()


def read_pieces(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[list[int]]:
    """Ids of texts that stand within a sequence, each tokenised apart: no token crosses a border.

    Raises:
        DataError: a text that the tokenizer cannot read, or joins to whatever stands before it.
    """
    guard = _guard_of(tokenizer)
    if not guard.text:
        yield from read_whole(tokenizer, texts)
        return
    texts = list(texts)
    behind = read_whole(tokenizer, (guard.text + text for text in texts))
    for text, ids in zip(texts, behind, strict=True):
        own = _cut(guard, ids)
        yield _behind_another(tokenizer, text) if own is None else own


def read_whole(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[list[int]]:
    """Ids of texts that begin a sequence, as the tokenizer itself reads a text; no BOS, no EOS.

    Raises:
        DataError: a text that the tokenizer cannot read.
    """
    texts = iter(texts)
    while part := list(islice(texts, ROWS_PER_CALL)):
        try:
            encoded = tokenizer(
                part, add_special_tokens=False, return_attention_mask=False, verbose=False
            )
        except Exception as error:  # tokenizers raises plain Exceptions
            raise DataError(
                f"the tokenizer {name_of(tokenizer)} cannot read a text: {error}"
            ) from error
        yield from encoded["input_ids"]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of ids that stand within a sequence, special tokens and spaces kept.

    Some tokenizers tidy spaces away by default, which can join the digits of a number.
    """
    guard = _guard_of(tokenizer)
    if not guard.text:
        return _decode(tokenizer, ids)
    return _decode(tokenizer, [*guard.ids, *ids]).removeprefix(guard.decoded)


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's folder or hub id, quoted, for messages."""
    return repr(tokenizer.name_or_path or type(tokenizer).__name__)


def _guard_of(tokenizer: PreTrainedTokenizerBase) -> _Guard:
    """The first guard that keeps the probes; none where none does: `round_trip` refuses these."""
    guard = _GUARD_OF.get(tokenizer)
    if guard is None:
        helpful = (_guard(tokenizer, text) for text in GUARDS if _keeps_probes(tokenizer, text))
        guard = _GUARD_OF[tokenizer] = next(helpful, _Guard("", [], ""))
    return guard


def _guard(tokenizer: PreTrainedTokenizerBase, text: str) -> _Guard:
    (ids,) = read_whole(tokenizer, [text])
    return _Guard(text, ids, _decode(tokenizer, ids))


def _keeps_probes(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    try:
        guard = _guard(tokenizer, text)
        behind = read_whole(tokenizer, [text + probe for probe in PROBES])
        pieces = [_cut(guard, ids) for ids in behind]
    except DataError:
        return False
    if None in pieces:
        return False
    joined = [*guard.ids, *(index for piece in pieces for index in piece or ())]
    return _decode(tokenizer, joined) == guard.decoded + "".join(PROBES)


def _cut(guard: _Guard, ids: list[int]) -> list[int] | None:
    """The ids after the guard's; None where a token joins the guard to what follows."""
    length = len(guard.ids)
    return ids[length:] if ids[:length] == guard.ids else None


def _behind_another(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    for guard in (_guard(tokenizer, other) for other in GUARDS[1:]):
        (ids,) = read_whole(tokenizer, [guard.text + text])
        own = _cut(guard, ids)
        if own is not None and _decode(tokenizer, ids).removeprefix(guard.decoded) == text:
            return own
    raise DataError(
        f"the tokenizer {name_of(tokenizer)} joins {text[:40]!r} to whatever stands before it: it "
        "cannot be taught as a piece of its own"
    )


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
