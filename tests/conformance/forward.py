"""Cases of `forward/`: published checkpoints, logits, hidden states, loss, legal sequences."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from latent_reasoning.model.folder import load, load_tokenizer, write_model
from latent_reasoning.model.published import our_name, published_name
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.training.text import cross_entropy
from tests.conformance.checks import Check, Checks, Tolerance
from tests.conformance.recording import Record, Vectors

INFORMATION = {"notes", "checks", "error"}
STATE = Tolerance(absolute=3e-4)
LOSS = Tolerance(absolute=1e-5)


def _saving(vectors: Vectors, name: str) -> Checks:
    """Our own folder holds the same model, to the last bit, and a tokenizer that fits it."""
    model = vectors.model(name)
    with tempfile.TemporaryDirectory() as folder:
        write_model(model, load_tokenizer(vectors.folder(name)), Path(folder))
        again = load(folder, device="cpu")
        load_tokenizer(folder)
    yield Check(f"{name}/saved_and_loaded", again.settings, model.settings)
    yield Check(f"{name}/saved_and_loaded", again.state_dict(), model.state_dict())


def _names(vectors: Vectors, name: str, shapes: Record, variant: str) -> Checks:
    """Our parameters, under their published names, and back."""
    # A tied matrix once.
    parameters = dict(vectors.model(f"forward/ckpt/{variant}").named_parameters())
    own = {published_name(key): list(value.shape) for key, value in parameters.items()}
    yield Check(name, own, shapes)
    yield Check(name, {*parameters}, {our_name(key) for key in shapes})


@torch.no_grad()
def _batches(vectors: Vectors, name: str) -> Checks:
    """Logits, hidden states and loss of each batch of a variant's file; not those at padding."""
    arrays, model = vectors.file(name), vectors.model(f"forward/ckpt/{Path(name).stem}")
    for batch in sorted({key.partition("_")[0] for key in arrays}):
        ids, mask = arrays[f"{batch}_input_ids"], arrays[f"{batch}_attention_mask"]
        output, read = model(ids, mask, output_hidden_states=True), mask.bool()
        if f"{batch}_logits" in arrays:
            logits = model.full_logits(output)[read]
            yield Check(f"{name}/{batch}/logits", logits, arrays[f"{batch}_logits"][read], STATE)
        if f"{batch}_hidden_states" in arrays:
            own = [layer[read] for layer in (*output.hidden_states, output.last_hidden)]
            recorded = [layer[read] for layer in arrays[f"{batch}_hidden_states"]]
            yield Check(f"{name}/{batch}/hidden_states", own, [*recorded, recorded[-1]], STATE)
        if f"{batch}_loss" in arrays:
            loss = cross_entropy(model, output, arrays[f"{batch}_labels"])
            yield Check(f"{name}/{batch}/loss", loss, arrays[f"{batch}_loss"], LOSS)


def _legality(vectors: Vectors, name: str, entries: list[Record]) -> Checks:
    """What is legal does not depend on the weights: each checkpoint has to agree."""
    for checkpoint in vectors.names("forward/ckpt/*"):
        model = vectors.model(checkpoint)
        for entry in entries:
            case = f"{name}/{Path(checkpoint).name}/{entry['name']}"
            own = _finite_logits(model, entry["input_ids"])
            finite = entry.get("n_finite_logits_per_position")
            yield Check(case, own is not None, entry["ok"], what="acceptance")
            yield Check(case, own, finite if entry["ok"] else own, what="finite logits")


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
    "forward/ckpt/*": _saving,
    "forward/*.npz": _batches,
    "forward/expected.json": {"state_dict_keys/(.+)": _names, "legality": _legality},
}
