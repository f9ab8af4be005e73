"""CoLaR's released weights: a language model, its latent head, and what else defines it.

    config.json, model.safetensors, tokenizer ..   the language model
    latent_head.safetensors                        the head: fc.0, fc.2, fc.3, mean, log_std
    colar.json                                     ids, templates of texts, the embeddings' std

`###` means START and STOP in one there. Here START and END, which is read in STOP's place, are
copies of its row, and the stop rule is its probability (`stop_rules.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from latent_reasoning.data.context import read_pieces
from latent_reasoning.data.sequences import SpecialTokens, beginning, special_token_ids
from latent_reasoning.model.gaussian import GaussianHead
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import LatentSettings
from latent_reasoning.model.settings_file import read_json
from latent_reasoning.model.special_tokens import add_latent_tokens, add_special_tokens
from latent_reasoning.model.tensors import CheckpointError, load_tensors, read_tensors

COLAR_SETTINGS = "colar.json"
COLAR_HEAD = "latent_head.safetensors"
KEYS = {
    *("embeds_std", "latent_head_intermediate", "deterministic"),
    *("pad_token_id", "eos_token_id", "separator_id", "separator", "step_join"),
    *("question_template", "speed_template", "answer_template"),
}
MODULES = {
    "fc.0": "input_layer",
    "fc.2": "output_layer",
    "fc.3": "norm",
    "mean": "mean",
    "log_std": "log_std",
}
"""Released names of the head's modules, and ours."""
QUESTION = "Question: {}"
"""Begins the released template of questions: `Question: ` is the prefix that is configured."""
MOST_LATENTS = 64
"""Latent steps at most, as in the public code's evaluation on grade-school mathematics."""
SPEED = 5
"""The speed until another is chosen (the stage decode): the highest that was trained."""


def is_colar(folder: Path) -> bool:
    """Whether a folder holds released weights of CoLaR."""
    return (folder / COLAR_SETTINGS).is_file()


def read_colar(
    folder: Path, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> LatentReasoner:
    """The model of a folder around its language model `base`, with its tokenizer as it was read.

    Raises `CheckpointError`.
    """
    released = _released(folder)
    separator = released["separator"]
    if next(read_pieces(tokenizer, [separator])) != [released["separator_id"]]:
        raise CheckpointError(
            f"{folder / COLAR_SETTINGS}: separator {separator!r} is not the token "
            f"{released['separator_id']} of the tokenizer, so that no chain would end"
        )
    ids = add_special_tokens(base, tokenizer, separator, separator, multiple=1)
    model = LatentReasoner(base, _settings(released, ids, folder))
    head = model.recurrent_filter
    assert isinstance(head, GaussianHead)
    file = folder / COLAR_HEAD
    tensors = {our_name(name): tensor for name, tensor in read_tensors(file).items()}
    load_tensors(head, tensors, set(head.state_dict()) - {"embedding_std"}, file)
    head.embedding_std.copy_(torch.tensor(float(released["embeds_std"])))
    return model


def prepare_colar_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the four latent tokens to the tokenizer of released weights, in place; texts begin
    without BOS."""
    add_latent_tokens(tokenizer)
    if beginning(tokenizer):
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)


def colar_settings(folder: Path, tokenizer: PreTrainedTokenizerBase) -> LatentSettings:
    """The latent settings of a folder, whose tokenizer has the four tokens."""
    return _settings(_released(folder), special_token_ids(tokenizer), folder)


def our_name(name: str) -> str:
    """The name in `GaussianHead.state_dict()` of a released parameter of the head."""
    module, _, rest = name.rpartition(".")
    return f"{MODULES.get(module, module)}.{rest}"


def _released(folder: Path) -> dict[str, Any]:
    file = folder / COLAR_SETTINGS
    released = read_json(file)
    if wrong := sorted(set(released) ^ KEYS):
        raise CheckpointError(f"{file}: unknown or missing keys: {', '.join(wrong)}")
    if not released["question_template"].startswith(QUESTION):
        raise CheckpointError(
            f"{file}: question_template: {released['question_template']!r} does not begin with "
            f"{QUESTION!r}, the only form that is known"
        )
    return released


def _settings(released: dict[str, Any], ids: SpecialTokens, folder: Path) -> LatentSettings:
    answer, placed = (released[f"{key}_template"] for key in ("answer", "speed"))
    if not answer.endswith("{}") or placed.count("{}") != 1:
        raise CheckpointError(
            f"{folder / COLAR_SETTINGS}: answer_template has to end with {{}}, and speed_template "
            "to hold it once"
        )
    asked = released["question_template"].removeprefix(QUESTION)
    return LatentSettings(
        start_id=ids.start,
        end_id=ids.end,
        continue_id=ids.continue_,
        stop_id=ids.stop,
        recurrent_filter="gaussian",
        filter_width=released["latent_head_intermediate"],
        deterministic_latents=released["deterministic"],
        max_latent_steps=MOST_LATENTS,
        stop_rule="marker",
        marker_id=released["separator_id"],
        prompt_suffix=asked + placed.replace("{}", "{speed}"),
        speed=SPEED,
        answer_text=answer.removesuffix("{}"),
    )
