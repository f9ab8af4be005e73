"""The released weights of other latent methods: CODI, Coconut, and SIM-CoT on either.

A folder holds `config.json` and the tokenizer of the base model, as its authors publish it, and the
released weights as `model.safetensors` (pickled ones are to be converted first):

    codi       codi.[base_model.model.]{name}, prj.1, prj.3, prj.ln; LoRA factors beside base layers
    coconut    base_causallm.{name}, embedding.weight

or the base's own names with the projection in `projection.safetensors` (`1.weight`, ..). Modules of
SIM-CoT that only train (`decoder`, `pj_in`, `pj_out`, `expainable_llm`) are left out. Both methods
append three rows to the vocabulary, whose tokens the tokenizer does not have yet. The scale of LoRA
is in no weight: peft's `adapter_config.json` has to lie beside them.

Sources: arXiv 2502.21074, 2412.06769, 2509.20317 and their public code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from latent_reasoning.data.sequences import CONTINUE, END, START, STOP
from latent_reasoning.model.base_files import WEIGHTS, base_of_tensors, existing, read_weights
from latent_reasoning.model.folder import prepare_tokenizer, read_tokenizer
from latent_reasoning.model.lora import ADAPTER_SETTINGS, UNSUPPORTED
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import LatentSettings
from latent_reasoning.model.settings_file import read_json
from latent_reasoning.model.tensors import (
    CheckpointError,
    load_tensors,
    raise_problems,
    read_tensors,
)

RivalFormat = Literal["codi", "coconut"]

PROJECTION = "projection.safetensors"
TOKENS = {"codi": ("<|pad|>", START, END, CONTINUE, STOP), "coconut": (START, END, CONTINUE, STOP)}
"""What each format's rows after the base's vocabulary stand for; the tokens after the third have no
row in the released weights: they are never read, and no stop decision is taken."""
ANSWER_TEXT = {"codi": "The answer is:", "coconut": "###"}
QUESTION_END = {"codi": "", "coconut": "\n"}
"""The public forms of a row: what stands before the answer and after the question."""
RELEASED_ROWS = 3
LEFT_OUT = re.compile(r"(decoder|pj_in|pj_out|expainable_llm)\.|embedding\.weight$")
BASE_PREFIX = re.compile(r"^(codi\.(base_model\.model\.)?|base_causallm\.)")
FILTER_NAMES = {"prj.1.": "input_layer.", "prj.3.": "output_layer.", "prj.ln.": "norm."}
TABLES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")


def load_rival(
    path: str | Path, form: RivalFormat
) -> tuple[LatentReasoner, PreTrainedTokenizerBase]:
    """A released model of another method and its tokenizer, on the CPU, in float32.

    Its number of latent steps has to be forced. Raises `CheckpointError`.
    """
    folder = Path(path)
    file = folder / WEIGHTS
    base_tensors, own = _sorted_out(folder, form)
    table = next((t for name, t in base_tensors.items() if name.endswith(TABLES)), None)
    if table is None:
        raise CheckpointError(f"{file}: holds no input embeddings under a name of {form}'s format")
    first = len(table) - RELEASED_ROWS
    config = read_json(existing(folder, "config.json")) | {"vocab_size": len(table)}
    merged = _merged(base_tensors, folder, transposed=config["model_type"] == "gpt2")
    base = base_of_tensors(folder, config, merged)
    tokens = TOKENS[form]
    base.resize_token_embeddings(first + len(tokens), mean_resizing=False)
    with torch.no_grad():
        for rows in {base.get_input_embeddings().weight, base.get_output_embeddings().weight}:
            rows[len(table) :] = rows[:first].mean(0)
    ids = {token: first + place for place, token in enumerate(tokens)}
    width = own["input_layer.weight"].shape[0] if "input_layer.weight" in own else None
    settings = LatentSettings(
        start_id=ids[START],
        end_id=ids[END],
        continue_id=ids[CONTINUE],
        stop_id=ids[STOP],
        recurrent_filter="projection" if own else "none",
        filter_width=width,
        filter_norm=not own or "norm.weight" in own,
        prompt_suffix=QUESTION_END[form],
        answer_text=ANSWER_TEXT[form],
    )
    model = LatentReasoner(base, settings)
    load_tensors(model.recurrent_filter, own, set(model.recurrent_filter.state_dict()), file)
    return model.eval(), _tokenizer(folder, tokens, first)


def _sorted_out(folder: Path, form: RivalFormat) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The base's weights by its own names, LoRA factors included, and the projection's by ours."""
    tensors = read_weights(folder)
    if (folder / PROJECTION).is_file():
        tensors |= {f"prj.{n}": t for n, t in read_tensors(folder / PROJECTION).items()}
    base, own = {}, {}
    for name, tensor in tensors.items():
        if LEFT_OUT.match(name):
            continue
        kind = next((prefix for prefix in FILTER_NAMES if name.startswith(prefix)), None)
        if kind is not None and form == "codi":
            own[FILTER_NAMES[kind] + name.removeprefix(kind)] = tensor
        else:
            base[BASE_PREFIX.sub("", name)] = tensor
    return base, own


def _merged(tensors: dict[str, Tensor], folder: Path, *, transposed: bool) -> dict[str, Tensor]:
    """The base's weights with the LoRA factors among them folded in: W + alpha / r * B A; GPT-2
    keeps its matrices `transposed`."""
    tensors = {name.replace(".default.", "."): tensor for name, tensor in tensors.items()}
    factors = {name for name in tensors if ".lora_A." in name or ".lora_B." in name}
    merged = {
        name.replace(".base_layer.", "."): tensor.float()
        for name, tensor in tensors.items()
        if name not in factors
    }
    if not factors:
        return merged
    rank, scale = _rank_and_scale(folder)
    stems = sorted({re.sub(r"\.lora_[AB]\.weight$", "", name) for name in factors})
    parts = [[f"{stem}.{part}weight" for part in ("", "lora_A.", "lora_B.")] for stem in stems]
    missing = {name for names in parts for name in names} - {*merged, *factors}
    raise_problems({"missing": sorted(missing)}, folder / WEIGHTS)
    for name, first, second in parts:
        down, up = tensors[first].float(), tensors[second].float()
        if len(down) != rank:
            raise CheckpointError(
                f"{folder / ADAPTER_SETTINGS}: r = {rank}, but {first} has rank {len(down)}"
            )
        product = scale * (up @ down)
        merged[name] += product.T if transposed else product
    return merged


def _rank_and_scale(folder: Path) -> tuple[int, float]:
    """The rank of the LoRA factors of a release, and alpha / rank, by which they count."""
    file = folder / ADAPTER_SETTINGS
    adapter = read_json(file) if file.is_file() else {}
    if not {"r", "lora_alpha"} <= set(adapter):
        raise CheckpointError(
            f"{folder}: its weights hold LoRA factors, whose scale they do not; write r and "
            'lora_alpha of the training into adapter_config.json there, such as {"r": 128, '
            '"lora_alpha": 32}'
        )
    if changed := [key for key in UNSUPPORTED if adapter.get(key)]:
        raise CheckpointError(f"{file}: only plain LoRA is supported, not {', '.join(changed)}")
    return adapter["r"], adapter["lora_alpha"] / adapter["r"]


def _tokenizer(folder: Path, tokens: tuple[str, ...], first: int) -> PreTrainedTokenizerBase:
    tokenizer = read_tokenizer(folder)
    size = max(tokenizer.get_vocab().values()) + 1
    if size != first:
        raise CheckpointError(
            f"{folder}: the tokenizer has {size} tokens, but the weights {first} rows before those "
            f"that were added; put the base model's own tokenizer there, without added tokens"
        )
    added = [AddedToken(token, normalized=False, special=True) for token in tokens]
    tokenizer.add_tokens(added, special_tokens=True)
    prepare_tokenizer(tokenizer, folder)
    return tokenizer
