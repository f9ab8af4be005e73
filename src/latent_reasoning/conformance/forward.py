"""Cases of `forward/`: published checkpoints, logits, hidden states, loss, legal sequences."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latent_reasoning.conformance.cases import Case, Skip, check_equal, check_known
from latent_reasoning.model.folder import load, load_tokenizer, write_model
from latent_reasoning.model.published import our_name, published_name
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.training.text import cross_entropy

STATE_ABSOLUTE = 3e-4
LOSS_ABSOLUTE = 1e-5
ARRAYS = {"input_ids", "attention_mask", "labels", "logits", "hidden_states", "loss"}
INFORMATION = {"notes", "checks"}
LEGALITY_KEYS = {"name", "input_ids", "ok", "error", "n_finite_logits_per_position"}


def cases(folder: Path) -> Iterator[Case]:
    """Every case of the folder, named `forward/file/..`."""
    checkpoints = {path.name: path for path in sorted((folder / "ckpt").glob("*"))}
    for name, path in checkpoints.items():
        yield Case(f"forward/ckpt/{name}/saved_and_loaded", partial(_check_saving, path))
    for path in sorted(folder.iterdir()):
        if path.suffix == ".npz":
            yield from _batch_cases(path, checkpoints.get(path.stem))
        elif path.name == "expected.json":
            yield from _expected_cases(path, checkpoints)
        elif path.name != "ckpt":
            yield Case(f"forward/{path.name}", partial(_fail, "file not understood"))


def _fail(why: str) -> None:
    raise AssertionError(why)


def _skip(why: str) -> None:
    raise Skip(why)


def _expected_cases(path: Path, checkpoints: dict[str, Path]) -> Iterator[Case]:
    content = json.loads(path.read_text(encoding="utf-8"))
    for kind, entries in content.items():
        name = f"forward/expected.json/{kind}"
        if kind == "state_dict_keys":
            for variant, shapes in entries.items():
                if variant in checkpoints:
                    run: Callable[[], None] = partial(_check_names, checkpoints[variant], shapes)
                else:
                    run = partial(_skip, f"no checkpoint ckpt/{variant}")
                yield Case(f"{name}/{variant}", run)
        elif kind == "legality":
            # What is legal does not depend on the weights: each checkpoint has to agree.
            for variant, checkpoint in checkpoints.items():
                for entry in entries:
                    yield Case(
                        f"{name}/{variant}/{entry['name']}",
                        partial(_check_legality, checkpoint, entry),
                    )
        elif kind not in INFORMATION:
            yield Case(name, partial(_fail, "kind of case not understood"))


def _batch_cases(path: Path, checkpoint: Path | None) -> Iterator[Case]:
    """Logits, hidden states and loss of each batch of a variant's file."""
    name = f"forward/{path.name}"
    with np.load(path) as file:
        keys = sorted(file.files)
    batches = sorted({key.split("_", 1)[0] for key in keys})
    if checkpoint is None:
        yield Case(name, partial(_skip, f"no checkpoint ckpt/{path.stem}"))
        return
    checks = {"logits": _check_logits, "hidden_states": _check_hidden_states, "loss": _check_loss}
    for batch in batches:
        arrays = {key.split("_", 1)[1] for key in keys if key.startswith(f"{batch}_")}
        unknown = sorted(arrays - ARRAYS)
        if unknown:
            why = f"arrays not understood: {', '.join(unknown)}"
            yield Case(f"{name}/{batch}", partial(_fail, why))
        for what, check in checks.items():
            if what in arrays:
                yield Case(f"{name}/{batch}/{what}", partial(check, path, batch, checkpoint))


# ------------------------------------------------------------------------------------ checkpoints


@cache
def _model(checkpoint: Path) -> LatentReasoner:
    return load(checkpoint, device="cpu")


def _check_names(checkpoint: Path, shapes: dict[str, list[int]]) -> None:
    """Our parameters, under their published names, and back."""
    model = _model(checkpoint)
    own = {
        published_name(name): list(parameter.shape)
        for name, parameter in model.named_parameters()  # a tied matrix once
    }
    check_equal(own, shapes, "parameter shapes by published name")
    check_equal({our_name(name) for name in shapes}, set(dict(model.named_parameters())), "names")


def _check_saving(checkpoint: Path) -> None:
    """Our own folder holds the same model, to the last bit, and a tokenizer that fits it."""
    model = _model(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        write_model(model, load_tokenizer(checkpoint), Path(folder))
        again = load(folder, device="cpu")
        load_tokenizer(folder)
    check_equal(again.settings, model.settings, "settings")
    state, expected = again.state_dict(), model.state_dict()
    check_equal(sorted(state), sorted(expected), "parameters")
    changed = [name for name, tensor in state.items() if not torch.equal(tensor, expected[name])]
    check_equal(changed, [], "parameters that changed")


# ---------------------------------------------------------------------------------------- batches


@cache
def _arrays(path: Path) -> dict[str, Tensor]:
    with np.load(path) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@cache
def _forward(path: Path, batch: str, checkpoint: Path):
    arrays = _arrays(path)
    model = _model(checkpoint)
    with torch.no_grad():
        return model(
            arrays[f"{batch}_input_ids"],
            arrays[f"{batch}_attention_mask"],
            output_hidden_states=True,
        )


def _check_logits(path: Path, batch: str, checkpoint: Path) -> None:
    with torch.no_grad():
        logits = _model(checkpoint).full_logits(_forward(path, batch, checkpoint))
    read = _arrays(path)[f"{batch}_attention_mask"].bool()
    _check_close(logits[read], _arrays(path)[f"{batch}_logits"][read], "logits")


def _check_hidden_states(path: Path, batch: str, checkpoint: Path) -> None:
    output = _forward(path, batch, checkpoint)
    expected = _arrays(path)[f"{batch}_hidden_states"]
    read = _arrays(path)[f"{batch}_attention_mask"].bool()
    check_equal(len(output.hidden_states), len(expected), "number of layers")
    for layer, (own, recorded) in enumerate(zip(output.hidden_states, expected, strict=True)):
        _check_close(own[read], recorded[read], f"hidden states of layer {layer}")
    _check_close(output.last_hidden[read], expected[-1][read], "last hidden state")


def _check_loss(path: Path, batch: str, checkpoint: Path) -> None:
    arrays = _arrays(path)
    with torch.no_grad():
        output = _forward(path, batch, checkpoint)
        loss = cross_entropy(_model(checkpoint), output, arrays[f"{batch}_labels"])
    difference = abs(loss.item() - arrays[f"{batch}_loss"].item())
    if not difference <= LOSS_ABSOLUTE:
        raise AssertionError(f"the loss differs by {difference:.2e} (allowed {LOSS_ABSOLUTE:.0e})")


def _check_close(own: Tensor, expected: Tensor, what: str) -> None:
    """The same shape, the same pattern of -inf, finite values within `STATE_ABSOLUTE`."""
    check_equal(tuple(own.shape), tuple(expected.shape), f"shape of {what}")
    finite = expected.isfinite()
    if not torch.equal(own.isfinite(), finite):
        raise AssertionError(f"{what}: -inf at other places than recorded")
    difference = (own[finite] - expected[finite]).abs().max().item()
    if not difference <= STATE_ABSOLUTE:
        raise AssertionError(f"{what} differ by {difference:.2e} (allowed {STATE_ABSOLUTE:.0e})")


# --------------------------------------------------------------------------------------- legality


def _check_legality(checkpoint: Path, entry: dict[str, Any]) -> None:
    check_known(entry, LEGALITY_KEYS, "entry")
    model = _model(checkpoint)
    input_ids = torch.tensor([entry["input_ids"]])
    try:
        with torch.no_grad():
            output = model(input_ids, torch.ones_like(input_ids))
            finite = model.full_logits(output)[0].isfinite().sum(-1).tolist()
    except ValueError as error:
        if entry["ok"]:
            raise AssertionError(f"a legal sequence is refused: {error}") from error
        return
    check_equal(True, entry["ok"], "whether the sequence is accepted")
    check_equal(finite, entry["n_finite_logits_per_position"], "finite logits at each position")
