"""A tiny generated world: tokenizer, rows, a random base and latent models around it."""

from __future__ import annotations

import pytest
import torch

from latent_reasoning.base.scratch import build_base
from latent_reasoning.config import Architecture, Model
from latent_reasoning.data.dial.problems import generate_splits
from latent_reasoning.data.dial.tokenizer import build_tokenizer, generated_texts
from latent_reasoning.data.rows import Row
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.special_tokens import make_latent

SHAPE = Architecture(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    initializer_range=0.2,
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def rows() -> list[Row]:
    generated = generate_splits(24, 1, 1, max_steps=3, step_weights=[1, 1, 1], modulus=7, seed=0)[
        "train"
    ]
    return [
        Row(f"train-{i}", row["question"], tuple(row["steps"]), row["answer"])
        for i, row in enumerate(generated)
    ]


@pytest.fixture
def tokenizer():
    return build_tokenizer(generated_texts(7))


@pytest.fixture
def base_model(tokenizer) -> LatentReasoner:
    torch.manual_seed(0)
    return LatentReasoner(build_base(SHAPE, tokenizer), None)


@pytest.fixture
def latent_model(tokenizer) -> LatentReasoner:
    torch.manual_seed(0)
    settings = Model(recurrent_filter="MLP", start_token_from=" Results:")
    return make_latent(build_base(SHAPE, tokenizer), tokenizer, settings)
