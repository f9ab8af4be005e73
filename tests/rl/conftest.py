"""Tiny latent reasoners in float64, random enough that every kind of completion is sampled."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from latent_reasoning.data.dial.problems import generate_splits
from latent_reasoning.data.dial.tokenizer import build_tokenizer, generated_texts
from latent_reasoning.data.rows import Row
from latent_reasoning.data.sequences import SPECIAL_TOKENS
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import LatentSettings
from tests.model.models import build_base

VOCABULARY = 12
EOS, START, END, CONTINUE, STOP = 1, 8, 9, 10, 11
PROMPTS = [[3, 4, START], [5, START], [2, 7, 6, 3, START]]


@pytest.fixture
def reasoner() -> Callable[..., LatentReasoner]:
    """Build a model with random weights; keywords go to its latent settings.

    `special` are the ids of START, END, CONTINUE and STOP.
    """

    def build(
        architecture: str = "llama",
        tied: bool = True,
        modules: bool = False,
        vocabulary: int = VOCABULARY,
        special: tuple[int, int, int, int] = (START, END, CONTINUE, STOP),
        **settings,
    ) -> LatentReasoner:
        base = build_base(architecture, tied, vocabulary).float()
        model = LatentReasoner(base, LatentSettings(*special, **settings))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        if modules:
            model.move_special_rows("modules")
        return model.double().eval()

    return build


def latent_tokenizer(modulus: int) -> PreTrainedTokenizerBase:
    """The tokenizer of the generated problems, with the special tokens."""
    tokenizer = build_tokenizer(generated_texts(modulus))
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    return tokenizer


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int, int, int]:
    """Ids of START, END, CONTINUE and STOP."""
    return tuple(tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)))


def generated_rows(train: int, validation: int, **options) -> tuple[list[Row], list[Row]]:
    """Rows of the splits `rl` and `validation`, without steps."""
    steps = options["max_steps"]
    splits = generate_splits(train, validation, 0, step_weights=[1] * steps, seed=0, **options)
    return tuple(
        [
            Row(f"{name}-{i}", row["question"], None, row["answer"])
            for i, row in enumerate(splits[split])
        ]
        for name, split in (("rl", "train"), ("validation", "validation"))
    )
