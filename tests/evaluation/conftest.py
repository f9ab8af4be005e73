"""A tiny latent model and a tiny plain one, with the tokenizer of the generated problems."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from latent_reasoning.config import Model
from latent_reasoning.data.dial.problems import generate_splits
from latent_reasoning.data.dial.tokenizer import build_tokenizer, generated_texts
from latent_reasoning.data.rows import Row
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.special_tokens import make_latent


@pytest.fixture
def rows() -> list[Row]:
    """Six generated problems of 1 to 3 steps, the last without steps."""
    made = generate_splits(
        train=1, validation=1, test=6, max_steps=3, step_weights=[1, 1, 1], modulus=7, seed=0
    )["test"]
    rows = [
        Row(f"test-{i}", row["question"], tuple(row["steps"]), row["answer"])
        for i, row in enumerate(made)
    ]
    return [*rows[:-1], Row("test-5", rows[-1].question, None, rows[-1].answer)]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(generated_texts(7))


@pytest.fixture
def plain(tokenizer) -> LatentReasoner:
    """A random language model, which cannot think."""
    return LatentReasoner(_base(tokenizer), None).eval()


@pytest.fixture
def latent(tokenizer) -> LatentReasoner:
    """A random latent reasoner; the tokenizer gets the special tokens."""
    return make_latent(_base(tokenizer), tokenizer, Model()).eval()


def _base(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=True,
        )
    )
