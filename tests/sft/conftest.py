"""A tiny generated world: tokenizer, rows, a random base and latent models around it."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import LatentSteps, Model
from latent_reasoning.data.dial.tokenizer import build_tokenizer, generated_texts
from latent_reasoning.data.examples import LatentExample
from latent_reasoning.data.rows import Row
from latent_reasoning.data.sequences import encode_latent_rows, reasoning_text
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.special_tokens import make_latent
from tests.data.generated import generated_rows
from tests.model.models import build_base


def encode(
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    bias: int = 1,
    drop_last_step: bool = True,
    **changes: bool,
) -> list[LatentExample]:
    """Latent examples of as many latent steps as the row has, and `bias` more."""
    options = {"shift_target": False, "mask_latent_labels": False, "learn_start": False}
    return encode_latent_rows(
        rows,
        tokenizer,
        prefix="Question: ",
        reasonings=[reasoning_text(row, drop_last_step=drop_last_step) for row in rows],
        steps=LatentSteps(factor=1, bias=bias, min=None, max=None),
        drop_last_step=drop_last_step,
        **(options | changes),
    )


@pytest.fixture(scope="session")
def rows() -> list[Row]:
    return generated_rows(24)


@pytest.fixture
def tokenizer():
    return build_tokenizer(generated_texts(7))


@pytest.fixture
def base_model(tokenizer) -> LatentReasoner:
    return LatentReasoner(build_base(vocabulary=len(tokenizer)).float(), None)


@pytest.fixture
def latent_model(tokenizer) -> LatentReasoner:
    settings = Model(recurrent_filter="MLP", start_token_from=" Results:")
    return make_latent(build_base(vocabulary=len(tokenizer)).float(), tokenizer, settings)
