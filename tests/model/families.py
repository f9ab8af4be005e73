"""Tiny random models of the families in docs/bases.md, and the slow loop they are held against.

Windows are four tokens wide, so that short rows show them; biases are random, since a fresh model's
are zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import LatentSettings

VOCABULARY, POSITIONS, EOS = 48, 40, 1
START, END, CONTINUE, STOP = 40, 41, 42, 43

COMMON = {
    "vocab_size": VOCABULARY,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "pad_token_id": None,
}
LLAMA = COMMON | {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
GPT2 = COMMON | {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
GEMMA = LLAMA | {"head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 4}
WINDOW = {"sliding_window": 4}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

FAMILIES: dict[str, tuple[str, dict]] = {
    "Llama": ("llama", LLAMA),
    "SmolLM": ("llama", LLAMA | {"tie_word_embeddings": True}),
    "GPT-2": ("gpt2", GPT2),
    "Qwen 2": ("qwen2", LLAMA),
    "Qwen 3": ("qwen3", LLAMA | {"head_dim": 4}),
    "Gemma": ("gemma", LLAMA | {"head_dim": 4}),
    "Gemma 2": (
        "gemma2",
        GEMMA | {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    ),
    "Gemma 3": ("gemma3_text", GEMMA),
    "Mistral": ("mistral", LLAMA | WINDOW),
    "Phi": ("phi", LLAMA),
    "Phi-3": ("phi3", LLAMA | WINDOW | {"pad_token_id": 0}),
    "Pythia": ("gpt_neox", LLAMA),
    "OPT": (
        "opt",
        LLAMA | {"ffn_dim": 24, "init_std": 0.3, "word_embed_proj_dim": 16, "pad_token_id": EOS},
    ),
    "GPT-Neo": (
        "gpt_neo",
        LLAMA
        | {"num_layers": 2, "num_heads": 4, "window_size": 4}
        | {"attention_types": [[["global", "local"], 1]]},
    ),
    "Cohere": ("cohere", LLAMA | {"logit_scale": 0.3}),
    "Granite": ("granite", LLAMA | {"logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    "BLOOM": ("bloom", COMMON | {"hidden_size": 16, "n_layer": 2, "n_head": 4}),
    "MPT": ("mpt", COMMON | {"d_model": 16, "n_layers": 2, "n_heads": 4, "max_seq_len": POSITIONS}),
    "gpt-oss": ("gpt_oss", LLAMA | WINDOW | EXPERTS | {"head_dim": 4}),
}

WITHOUT_CACHE = {
    "Mamba": ("mamba", COMMON | {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "RWKV": ("rwkv", COMMON | {"hidden_size": 16, "num_hidden_layers": 2}),
    "LFM2": ("lfm2", LLAMA | {"layer_types": ["conv", "full_attention"]}),
    "Qwen3-Next": ("qwen3_next", LLAMA | {"head_dim": 4}),
    "Llama 4": ("llama4_text", LLAMA | {"head_dim": 4} | EXPERTS),
}
"""Families that are refused because some of their layers keep no keys and values."""


def build_family(name: str) -> PreTrainedModel:
    """A random model of a family, in eval mode."""
    kind, keys = (FAMILIES | WITHOUT_CACHE)[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **keys)
    base = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in base.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.3)
    return base.eval()


def family_reasoner(name: str, **settings) -> LatentReasoner:
    """A latent reasoner around `build_family`; neither decision of its stop head is certain."""
    base = build_family(name)
    torch.manual_seed(1)
    model = LatentReasoner(base, LatentSettings(START, END, CONTINUE, STOP, **settings)).eval()
    with torch.no_grad():
        head = base.get_output_embeddings()
        head.weight[STOP] = head.weight[CONTINUE] + 0.2 * torch.randn_like(head.weight[STOP])
    return model


def slow_forward(model: LatentReasoner, ids: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """States (T, d) of all layers and logits (T, V) of one row, by transformers' own forward.

    Everything is read again for each latent step: no padding, no cache, no batch. Logits of tokens
    that are impossible at their position are minus infinity.
    """
    base = model.base
    table, inputs = base.get_input_embeddings(), []
    for token in ids:
        if token == CONTINUE:
            read = base.base_model(inputs_embeds=torch.stack(inputs)[None], use_cache=False)
            inputs.append(model.recurrent_filter(read.last_hidden_state[0, -1]))
        else:
            inputs.append(table(torch.tensor(END if token == STOP else token)))
    output = base(
        inputs_embeds=torch.stack(inputs)[None], use_cache=False, output_hidden_states=True
    )
    possible = torch.zeros(len(ids), VOCABULARY, dtype=torch.bool)
    answering = False
    for row, token in zip(possible, ids, strict=True):
        answering |= token == STOP
        if token in (START, CONTINUE):
            row[[CONTINUE, STOP]] = True
        else:
            row[:] = True
            row[[END, CONTINUE, STOP]] = False
            row[START] = not answering
    logits = output.logits[0].masked_fill(~possible, float("-inf"))
    return [states[0] for states in output.hidden_states], logits
