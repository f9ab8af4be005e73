"""Tiny models of three architectures, and the slow, obvious forward they are held against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from latent_reasoning.data.examples import LatentExample, PlainExample, StudentExample
from latent_reasoning.data.sequences import SPECIAL_TOKENS
from latent_reasoning.model.published import SETTINGS_KEY, published_name
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import LatentSettings

VOCABULARY = 40
HIDDEN = 16
EOS = 1
START, END, CONTINUE, STOP = 30, 31, 32, 33
IDS = {"start_id": START, "end_id": END, "continue_id": CONTINUE, "stop_id": STOP}
ANSWER = [" The answer is", ":", " 0"]
ARCHITECTURES = ("llama", "gpt2", "qwen2")


def build_base(
    architecture: str = "llama", tied: bool = True, vocabulary: int = VOCABULARY
) -> PreTrainedModel:
    """A random two-block model in float64, its weights large enough that states differ."""
    torch.manual_seed(0)
    common = {
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": EOS,
        "pad_token_id": None,
    }
    if architecture == "gpt2":
        config = GPT2Config(n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64, **common)
        return GPT2LMHeadModel(config).double().eval()
    shape = {
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    if architecture == "qwen2":
        base: PreTrainedModel = Qwen2ForCausalLM(Qwen2Config(**shape, **common))
    else:
        base = LlamaForCausalLM(LlamaConfig(**shape, **common))
    _norms_in_float64(base)
    return base.double().eval()


def _norms_in_float64(base: PreTrainedModel) -> None:
    """transformers' RMSNorm computes in float32, which would hide small errors of gradients."""
    for name, module in list(base.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, child = name.rpartition(".")
            norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon)
            setattr(base.get_submodule(parent), child, norm)


def build_reasoner(
    architecture: str = "llama", tied: bool = True, modules: bool = False, **settings
) -> LatentReasoner:
    """A latent reasoner around `build_base`; `modules` keeps the special rows in their own."""
    base = build_base(architecture, tied)
    torch.manual_seed(1)
    model = LatentReasoner(base, LatentSettings(**IDS, **settings)).eval()
    if modules:
        model.move_special_rows("modules")
    return model


def latent_example(
    question: list[int],
    reasoning: list[int],
    steps: int,
    special: tuple[int, int, int] = (START, CONTINUE, STOP),
) -> LatentExample:
    """The target token is the first one after the reasoning."""
    answer, start = [15, 16, 17, EOS], len(question)
    begin, step, stop = special
    latent = [begin, *[step] * steps, stop]
    teacher = np.array([*question, *reasoning, *answer], dtype=np.int32)
    student = np.array([*question, *latent, *answer], dtype=np.int32)
    return LatentExample(
        PlainExample(teacher, start, len(reasoning), start, start + len(reasoning)),
        StudentExample(student, start, len(latent), start + 1, start + len(latent)),
    )


def to_published_format(folder: Path, model: LatentReasoner, **changes: Any) -> None:
    """Rewrite a saved model's folder in the published format; `changes` go to its settings."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = ["LatentThinkingModel"]
    settings = model.settings
    config[SETTINGS_KEY] = {
        "start_token_id": settings.start_id,
        "end_token_id": settings.end_id,
        "continue_token_id": settings.continue_id,
        "stop_token_id": settings.stop_id,
        "recurrent_filter_mode": "MLP",
        "binary_head_temp": None,
        "detach_binary_head_inputs": settings.detach_stop_head,
        "lora_mode": model.special_rows is not None,
        "add_latent_to_end": False,
        "disable_something": True,
        "debug_mode": False,
        "unused_token_ids": [34],
    } | changes
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    state = {published_name(n): p.detach().clone() for n, p in model.named_parameters()}
    save_file(state, folder / "model.safetensors")
    for name in ("latent.json", "latent.safetensors", "SHA256SUMS", "card.json", "README.md"):
        (folder / name).unlink()


def build_tokenizer(special: bool = True, words: int = 28) -> PreTrainedTokenizerFast:
    """Words `w0`, `w1`, .. are the tokens after BOS and EOS; the special ones come last.

    The last words are those of an answer, ` The answer is`, `:` and ` 0`, which keep their spaces.
    """
    texts = [f"w{i}" for i in range(words - len(ANSWER))] + ANSWER
    vocabulary = {"<bos>": 0, "<eos>": EOS, **{text: i + 2 for i, text in enumerate(texts)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    kept = Regex("|".join([*ANSWER, r"[^\s:]+"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(kept, behavior="removed", invert=True)
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        unk_token="w0",
    )
    if special:
        fast.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    return fast


def pad(rows: list[list[int]], side: str = "left") -> tuple[Tensor, Tensor]:
    """Ids and mask `(B, T)` of rows padded on one side."""
    width = max(len(row) for row in rows)
    ids, masks = [], []
    for row in rows:
        fill = [EOS] * (width - len(row))
        zeros, ones = [0] * len(fill), [1] * len(row)
        ids.append(fill + row if side == "left" else row + fill)
        masks.append(zeros + ones if side == "left" else ones + zeros)
    return torch.tensor(ids), torch.tensor(masks)


def slow_hidden_states(model: LatentReasoner, ids: list[int]) -> list[Tensor]:
    """States of one row without padding, cache or batching: L + 1 tensors `(T, d)`.

    The whole sequence so far is read again for every latent step.
    """
    inputs: list[Tensor] = []
    for token in ids:
        if token == CONTINUE:
            inputs.append(model.latent_input(_read(model, inputs)[-1][-1]))
        else:
            inputs.append(model.embed(torch.tensor(token)))
    return _read(model, inputs)


def _read(model: LatentReasoner, inputs: list[Tensor]) -> list[Tensor]:
    output = model.base(
        inputs_embeds=torch.stack(inputs).unsqueeze(0), output_hidden_states=True, use_cache=False
    )
    return [states[0] for states in output.hidden_states]


@torch.no_grad()
def slow_greedy(model: LatentReasoner, prompt: list[int], max_new_tokens: int) -> list[int]:
    """Greedy completion of one prompt, the whole sequence read again for every token."""
    ids, bound = list(prompt), model.settings.max_latent_steps
    for _ in range(max_new_tokens):
        input_ids = torch.tensor([ids])
        output = model(input_ids, torch.ones_like(input_ids))
        token = int(model.full_logits(output)[0, -1].argmax())
        if token == CONTINUE and bound and ids[-bound:] == [CONTINUE] * bound:
            token = STOP
        ids.append(token)
        if token == EOS:
            break
    return ids[len(prompt) :]
