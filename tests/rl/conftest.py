"""Tiny latent reasoners in float64, random enough that every kind of completion is sampled."""

from collections.abc import Callable

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import LatentSettings

VOCABULARY = 12
START, END, CONTINUE, STOP = 8, 9, 10, 11


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
        torch.manual_seed(0)
        base = _base(architecture, tied, vocabulary)
        model = LatentReasoner(base, LatentSettings(*special, **settings))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        if modules:
            model.move_special_rows("modules")
        return model.double().eval()

    return build


def _base(architecture: str, tied: bool, vocabulary: int) -> PreTrainedModel:
    if architecture == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary, n_positions=64, n_embd=16, n_layer=2, n_head=2, n_inner=32
            )
        )
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
        )
    )
    if architecture == "stock llama":
        return llama
    # Llama's own norm computes in float32 whatever the weights are.
    for name, module in list(llama.named_modules()):
        if isinstance(module, LlamaRMSNorm):
            llama.set_submodule(name, torch.nn.RMSNorm(16, eps=1e-6))
    return llama
