"""Model folders: complete Hugging Face folders plus what makes the model a latent reasoner.

    model.safetensors, config.json, tokenizer ..   what plain transformers reads
    latent.json, latent.safetensors                settings; recurrent filter and special rows
    gate.json, gate.safetensors; seek.json         of a gated token reasoner; of one that seeks
    SHA256SUMS                                     digests of the above, checked on loading
    card.json, README.md                           where it comes from
    adapter/                                       the LoRA adapter, where it is kept

Loading is strict: a missing, unexpected or misshapen tensor, or a damaged file, is a
`CheckpointError`. Weights come from safetensors alone and no remote code is run. Folders in the
published format (`published.py`) and plain Hugging Face folders are read too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from latent_reasoning.data.rows import DataError
from latent_reasoning.data.sequences import SPECIAL_TOKENS, special_token_ids
from latent_reasoning.model import published, published_colar
from latent_reasoning.model.base_files import (
    WEIGHTS,
    base_of_tensors,
    existing,
    load_base,
    read_weights,
    without_progress_bars,
)
from latent_reasoning.model.card import card_text
from latent_reasoning.model.gated import GATE_SETTINGS, GatedReasoner, read_gate, write_gate
from latent_reasoning.model.latentseek import SEEK_SETTINGS, SeekingReasoner, SeekSettings
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import LatentSettings
from latent_reasoning.model.settings_file import (
    LATENT_SETTINGS,
    read_as,
    read_json,
    read_latent_settings,
    settings_content,
)
from latent_reasoning.model.soft_thinking import SOFT_THINKING, SoftThinker, SoftThinking
from latent_reasoning.model.tensors import (
    REMEDY,
    CheckpointError,
    load_tensors,
    own_state,
    read_tensors,
)
from latent_reasoning.runtime.device import resolve_device
from latent_reasoning.runtime.files import (
    SUMS,
    atomic_directory,
    changed_files,
    first_line,
    write_json,
    write_sums,
    write_text_atomically,
)

LATENT_WEIGHTS = "latent.safetensors"


# ------------------------------------------------------------------------------------------- save


def save(
    model: LatentReasoner,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    card: Mapping[str, Any],
) -> None:
    """Write a model folder; it replaces `folder` only when it is complete.

    An adapter must be merged first (`lora.merge_lora`).
    """
    with atomic_directory(Path(folder)) as temporary:
        write_model(model, tokenizer, temporary)
        write_json(temporary / "card.json", dict(card))
        write_text_atomically(temporary / "README.md", card_text(card))


def write_model(model: LatentReasoner, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights, settings and tokenizer into an existing folder."""
    if model.adapter is not None:
        raise ValueError("merge the adapter before saving the model")
    with without_progress_bars():
        model.base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if model.settings is not None:
        write_json(folder / LATENT_SETTINGS, settings_content(model.settings))
        save_file(own_state(model), folder / LATENT_WEIGHTS, metadata={"format": "pt"})
    if isinstance(model, GatedReasoner):
        write_gate(model, folder)
    if isinstance(model, SeekingReasoner):
        write_json(folder / SEEK_SETTINGS, dataclasses.asdict(model.seek_settings))
    if isinstance(model, SoftThinker):
        write_json(folder / SOFT_THINKING, dataclasses.asdict(model.how))
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes files that only their owner can read
    write_sums(folder)


# ------------------------------------------------------------------------------------------- load


def load(path: str | Path, device: str = "auto") -> LatentReasoner:
    """Read a model folder: ours, the published format, or a plain Hugging Face model.

    A plain model has `settings` None and cannot think. The model is in eval mode, its weights in
    float32 whatever the file holds: `runtime.device.autocast` computes in bfloat16. Raises
    `CheckpointError`.
    """
    folder = Path(path)
    config = read_json(existing(folder, "config.json"))
    if published.is_published(config):
        model = _load_published(folder, config)
    elif published_colar.is_colar(folder):
        base, tokenizer = load_base(folder), read_tokenizer(folder, as_released=True)
        model = published_colar.read_colar(folder, base, tokenizer)
    elif (folder / LATENT_SETTINGS).exists():
        settings = read_latent_settings(folder / LATENT_SETTINGS)
        model = _reasoner(load_base(folder), settings, folder / LATENT_SETTINGS)
        file = existing(folder, LATENT_WEIGHTS)
        load_tensors(model, read_tensors(file), set(own_state(model)), file)
    elif (folder / GATE_SETTINGS).exists():
        model = read_gate(load_base(folder), folder)
    elif (folder / SEEK_SETTINGS).exists():
        seek = read_as(SeekSettings, folder / SEEK_SETTINGS)
        model = SeekingReasoner(load_base(folder), seek)
    elif (folder / SOFT_THINKING).exists():
        model = SoftThinker(load_base(folder), read_as(SoftThinking, folder / SOFT_THINKING))
    else:
        model = _reasoner(load_base(folder), None, folder / "config.json")
    _check_unchanged(folder)
    return model.to(resolve_device(device)).eval()


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, as `prepare_tokenizer` leaves it.

    Raises `CheckpointError` where it is missing, or lacks EOS or the special tokens of a latent
    model.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such model folder")
    tokenizer = read_tokenizer(folder)
    prepare_tokenizer(tokenizer, folder)
    settings = read_settings(folder)
    if settings is not None:
        _check_special_tokens(tokenizer, settings, folder)
    _check_unchanged(folder, "*[!s]")  # all but .safetensors, which `load` checks
    return tokenizer


def read_tokenizer(folder: Path, *, as_released: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; CoLaR's has no latent tokens `as_released`.

    Raises `CheckpointError` where it cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises plain Exceptions
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be read ({first_line(error)}); a model folder needs "
            "tokenizer.json and tokenizer_config.json"
        ) from error
    if published_colar.is_colar(folder) and not as_released:
        published_colar.prepare_colar_tokenizer(tokenizer)
    return tokenizer


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, source: Path) -> None:
    """Pad on the left, with EOS where there is no padding token; in place.

    Raises `CheckpointError`, naming the `source`, where there is no EOS: no text would end.
    """
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"{source}: its tokenizer has no EOS token, without which no answer ends; name one as "
            "eos_token in tokenizer_config.json"
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def read_settings(path: str | Path) -> LatentSettings | None:
    """The latent settings of a model folder, None for a plain language model."""
    folder = Path(path)
    config_file = existing(folder, "config.json")
    config = read_json(config_file)
    if published.is_published(config):
        return _published_settings(config, config_file)
    if published_colar.is_colar(folder):
        return published_colar.colar_settings(folder, read_tokenizer(folder))
    file = folder / LATENT_SETTINGS
    return read_latent_settings(file) if file.exists() else None


# --------------------------------------------------------------------------------------- internal


def _load_published(folder: Path, config: dict[str, Any]) -> LatentReasoner:
    settings = _published_settings(config, folder / "config.json")
    of_base, own = {}, {}
    for published_name, tensor in read_weights(folder).items():
        name = published.our_name(published_name)
        if name.startswith("base."):
            of_base[name.removeprefix("base.")] = tensor
        else:
            own[name] = tensor
    base = base_of_tensors(folder, config, of_base)
    model = _reasoner(base, settings, folder / "config.json")
    load_tensors(model, own, set(own_state(model)), folder / WEIGHTS)
    return model


def _published_settings(config: dict[str, Any], file: Path) -> LatentSettings:
    try:
        return published.read_settings(config[published.SETTINGS_KEY])
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None


def _reasoner(base: PreTrainedModel, settings: LatentSettings | None, file: Path) -> LatentReasoner:
    try:
        return LatentReasoner(base, settings)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None


def _check_unchanged(folder: Path, pattern: str = "*") -> None:
    """Compare a model folder with the digests in it: damage within a tensor is otherwise silent."""
    changed = changed_files(folder, pattern)
    if changed:
        names = ", ".join(str(file) for file in changed)
        raise CheckpointError(
            f"{names}: damaged or edited since it was written ({SUMS} has another digest); "
            f"{REMEDY}. If the edit is meant, delete {SUMS}"
        )


def _check_special_tokens(
    tokenizer: PreTrainedTokenizerBase, settings: LatentSettings, folder: Path
) -> None:
    try:
        ids = special_token_ids(tokenizer)
    except DataError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    own = (settings.start_id, settings.end_id, settings.continue_id, settings.stop_id)
    read = (ids.start, ids.end, ids.continue_, ids.stop)
    if own != read:
        pairs = ", ".join(
            f"{token} {theirs} instead of {ours}"
            for token, ours, theirs in zip(SPECIAL_TOKENS, own, read, strict=True)
            if ours != theirs
        )
        raise CheckpointError(
            f"{folder}: the tokenizer's ids are not the model's ({pairs}); copy the tokenizer "
            "that was saved with the model"
        )
