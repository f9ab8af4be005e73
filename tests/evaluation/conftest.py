"""A tiny latent model and a tiny plain one, with the tokenizer of the generated problems."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import Model
from latent_reasoning.data.dial.tokenizer import build_tokenizer, generated_texts
from latent_reasoning.data.rows import Row
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.special_tokens import make_latent
from tests.data.generated import generated_rows
from tests.model.models import build_base


@pytest.fixture
def rows() -> list[Row]:
    """Six generated problems of 1 to 3 steps, the last without steps."""
    rows = generated_rows(6, "test")
    return [*rows[:-1], replace(rows[-1], steps=None)]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(generated_texts(7))


@pytest.fixture
def plain(tokenizer) -> LatentReasoner:
    """A random language model, which cannot think."""
    return LatentReasoner(build_base(vocabulary=len(tokenizer)).float(), None).eval()


@pytest.fixture
def latent(tokenizer) -> LatentReasoner:
    """A random latent reasoner; the tokenizer gets the special tokens."""
    base = build_base(vocabulary=len(tokenizer)).float()
    return make_latent(base, tokenizer, Model()).eval()
