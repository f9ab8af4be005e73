"""A tiny generated world: tokenizer, rows, a random base and latent models around it."""

from __future__ import annotations

import pytest

from latent_reasoning.config import Model
from latent_reasoning.data.dial.tokenizer import build_tokenizer, generated_texts
from latent_reasoning.data.rows import Row
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.special_tokens import make_latent
from tests.data.generated import generated_rows
from tests.model.models import build_base


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
