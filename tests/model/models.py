"""Tiny models of three architectures, and the slow, obvious forward they are held against."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from latent_reasoning.model.reasoner import LatentReasoner, LatentSettings

VOCABULARY = 40
START, END, CONTINUE, STOP = 30, 31, 32, 33
SETTINGS = {"start_id": START, "end_id": END, "continue_id": CONTINUE, "stop_id": STOP}
ARCHITECTURES = ("llama", "gpt2", "qwen2")


def build_base(architecture: str = "llama", tied: bool = True) -> PreTrainedModel:
    """A random two-block model in float64; widths are larger than usual so that states differ."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    if architecture == "llama":
        base: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**shape))
    elif architecture == "qwen2":
        base = Qwen2ForCausalLM(Qwen2Config(**shape))
    else:
        base = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=16,
                n_layer=2,
                n_head=4,
                n_positions=64,
                initializer_range=0.3,
                tie_word_embeddings=tied,
                bos_token_id=0,
                eos_token_id=1,
            )
        )
    return base.double().eval()


def build_reasoner(architecture: str = "llama", tied: bool = True, **settings) -> LatentReasoner:
    """A latent reasoner around `build_base`, in float64."""
    base = build_base(architecture, tied)
    torch.manual_seed(1)
    return LatentReasoner(base, LatentSettings(**SETTINGS, **settings)).eval()


def pad(rows: list[list[int]], side: str = "left") -> tuple[Tensor, Tensor]:
    """Ids and mask of rows padded on one side with an ordinary token."""
    width = max(len(row) for row in rows)
    ids, mask = [], []
    for row in rows:
        fill, ones = [1] * (width - len(row)), [1] * len(row)
        zeros = [0] * (width - len(row))
        ids.append(fill + row if side == "left" else row + fill)
        mask.append(zeros + ones if side == "left" else ones + zeros)
    return torch.tensor(ids), torch.tensor(mask)


def slow_hidden_states(model: LatentReasoner, ids: list[int]) -> list[Tensor]:
    """States of one row without padding, cache or batching: L + 1 tensors `(T, d)`.

    The whole sequence so far is recomputed for every latent step.
    """
    rows: list[Tensor] = []
    for token in ids:
        if token == CONTINUE:
            last = _plain_pass(model, rows)[-1][-1]
            rows.append(model.latent_input(last))
        else:
            rows.append(model.embed(torch.tensor(token)))
    return _plain_pass(model, rows)


def _plain_pass(model: LatentReasoner, rows: list[Tensor]) -> list[Tensor]:
    output = model.base(
        inputs_embeds=torch.stack(rows).unsqueeze(0), output_hidden_states=True, use_cache=False
    )
    return [states[0] for states in output.hidden_states]
