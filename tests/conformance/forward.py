"""Cases of `forward/`: published checkpoints, logits, hidden states, loss, legal sequences."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import torch

from latent_reasoning.model.folder import load, load_tokenizer, write_model
from latent_reasoning.model.published import our_name, published_name
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.training.text import Labels, cross_entropy
from tests.conformance.checks import Check, Checks, Tolerance
from tests.conformance.recording import Record, Vectors

INFORMATION = {"notes", "checks", "error"}
STATE = Tolerance(absolute=3e-4)
LOSS = Tolerance(absolute=1e-5)
CHECKPOINT = r"forward/ckpt/([^/]+)"


def _saving(vectors: Vectors, name: str, _: str) -> Checks:
    """Our own folder holds the same model, to the last bit, and a tokenizer that fits it."""
    model, part = vectors.model(name), "saved_and_loaded"
    with tempfile.TemporaryDirectory() as folder:
        write_model(model, load_tokenizer(vectors.folder(name)), Path(folder))
        again = load(folder, device="cpu")
        load_tokenizer(folder)
    yield Check(again.settings, model.settings, part=part)
    yield Check(again.state_dict(), model.state_dict(), part=part)


def _names(vectors: Vectors, shapes: Record, variant: str) -> Checks:
    """Our parameters, a tied matrix once, under their published names, and back."""
    parameters = dict(vectors.model(f"forward/ckpt/{variant}").named_parameters())
    yield Check({published_name(key): list(p.shape) for key, p in parameters.items()}, shapes)
    yield Check({*parameters}, {our_name(key) for key in shapes})


@torch.no_grad()
def _batch(vectors: Vectors, mask: torch.Tensor, variant: str, batch: str) -> Checks:
    """Logits, hidden states and loss of a batch of a variant's file; not those at padding."""
    arrays, model = vectors.file(f"forward/{variant}.npz"), vectors.model(f"forward/ckpt/{variant}")
    output = model(arrays[f"{batch}_input_ids"], mask, output_hidden_states=True)
    read = mask.bool()
    if f"{batch}_logits" in arrays:
        expected = arrays[f"{batch}_logits"][read]
        yield Check(model.full_logits(output)[read], expected, STATE, "logits")
    if f"{batch}_hidden_states" in arrays:
        own = [layer[read] for layer in (*output.hidden_states, output.last_hidden)]
        states = [layer[read] for layer in arrays[f"{batch}_hidden_states"]]
        yield Check(own, [*states, states[-1]], STATE, "hidden_states")
    if f"{batch}_loss" in arrays:
        loss = cross_entropy(
            model, output, Labels.of(arrays[f"{batch}_labels"], output.kinds, model.settings)
        )
        yield Check(loss, arrays[f"{batch}_loss"], LOSS, "loss")


def _legality(vectors: Vectors, entries: list[Record]) -> Checks:
    """What is legal does not depend on the weights: each checkpoint has to agree."""
    for checkpoint in filter(re.compile(CHECKPOINT).fullmatch, vectors.paths):
        model = vectors.model(checkpoint)
        for entry in entries:
            own = _finite_logits(model, entry["input_ids"])
            finite = entry.get("n_finite_logits_per_position")
            expected = [entry["ok"], finite if entry["ok"] else own]
            part = f"{Path(checkpoint).name}/{entry['name']}"
            yield Check([own is not None, own], expected, part=part)


@torch.no_grad()
def _finite_logits(model: LatentReasoner, ids: list[int]) -> list[int] | None:
    """The number of finite logits at each position; None where the sequence is refused."""
    input_ids = torch.tensor([ids])
    try:
        output = model(input_ids, torch.ones_like(input_ids))
    except ValueError:
        return None
    return model.full_logits(output)[0].isfinite().sum(-1).tolist()


READERS = {
    CHECKPOINT: {"": _saving},
    r"forward/([^/]+)\.npz": {"(.+)_attention_mask": _batch},
    r"forward/expected\.json": {"state_dict_keys/(.+)": _names, "legality": _legality},
}
