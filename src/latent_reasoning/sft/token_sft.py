"""Token SFT: the model learns to write its steps and the answer (CoT), or the answer (No-CoT)."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import Data, SftModel
from latent_reasoning.data.rows import DataError, Row
from latent_reasoning.data.sequences import PlainExample, encode_plain_rows, within_limit


def token_sft_examples(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, entry: SftModel, data: Data
) -> list[PlainExample]:
    """The rows as text of the entry's form, those above the token limit left out."""
    examples = encode_plain_rows(
        rows,
        tokenizer,
        form=entry.form,
        prefix=data.prompt.training,
        natural_language=data.natural_language,
    )
    kept = [example for example in examples if within_limit(example, data.max_tokens)]
    if not kept:
        raise DataError(
            f"all {len(examples)} rows are longer than data.max_tokens: {data.max_tokens} allows"
        )
    return kept
