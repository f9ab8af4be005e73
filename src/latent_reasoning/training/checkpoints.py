"""What a training needs to resume after a kill: whole, verified checkpoints on disk.

A checkpoint is a folder `step-N/` that appears under its name only when it is complete and on the
disk. It holds the trained weights and the optimiser's state as safetensors, and `state.json` with
the digest of the configuration that made it, the SHA-256 of each file and a checksum of its own. No
random state is stored: the training loop derives random numbers from (seed, step, rollbacks).

These checkpoints are kept: the last two, those that a diverging training may go back to, namely the
last two from before its trouble and the last validated one (before the first validation, the
starting weights in `start/`), and the best one as of each of them. A damaged checkpoint is set
aside with a warning and the one before it is used; the folder of another configuration is set aside
as a whole. Only one process trains in a folder: it holds the lock of the file `lock` in it.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latent_reasoning.config import UserError
from latent_reasoning.config import digest as digest_of
from latent_reasoning.runtime.files import (
    atomic_directory,
    first_line,
    sha256_of,
    try_lock,
    write_json,
)
from latent_reasoning.training.divergence import GuardState

WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
OWNER = "digest.json"
LOCK = "lock"
START = "start"
KEPT = 2

Log = Callable[[str], None]


class DamagedCheckpointError(UserError, RuntimeError):
    """A checkpoint differs from what was written."""


class FolderInUseError(UserError, RuntimeError):
    """Another process trains in this folder of checkpoints."""


@dataclass
class Progress:
    """How far a training has come.

    `window` holds the sums of the metrics over the `window_steps` steps since they were last
    logged, so that a resumed training logs the same means. `guard` is the memory of the guard.
    `micro_batch_size` is the size that memory sufficed for, where it is less than configured.
    `stage` is the curriculum's at the last step, where the task has one.
    """

    step: int = 0
    best_step: int | None = None
    best_accuracy: float | None = None
    best_length: float | None = None
    finished: bool = False
    window: dict[str, float] = field(default_factory=dict)
    window_steps: int = 0
    guard: GuardState = field(default_factory=GuardState)
    micro_batch_size: int | None = None
    stage: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.guard, dict):  # as read from a checkpoint
            self.guard = GuardState(**self.guard)


def claim_checkpoint_folder(folder: Path, digest: str, log: Log) -> None:
    """Claim `folder` for the training with digest `digest` for as long as this process lives; a
    folder of another configuration is set aside.

    Raises `FolderInUseError` where another process trains there.
    """
    _lock(folder)
    owner = _read_owner(folder)
    if owner != digest and any(entry.name != LOCK for entry in folder.iterdir()):
        aside = _free_name(folder, "stale")
        folder.rename(aside)
        log(
            f"warning: {folder} holds the training of another configuration (digest {owner}, now "
            f"{digest}); moved to {aside.name}, starting afresh"
        )
        _lock(folder)
    if owner != digest:
        write_json(folder / OWNER, {"digest": digest})
    for unfinished in folder.glob(".st*.tmp"):  # left by a kill
        shutil.rmtree(unfinished)


def _lock(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if try_lock(folder / LOCK, f"process {os.getpid()} on {socket.gethostname()}") is None:
        raise FolderInUseError(
            f"{folder} is being trained by {first_line((folder / LOCK).read_text())}: wait for it "
            "or end it, then run again"
        )


class CheckpointStore:
    """The checkpoints of one training, in a folder claimed by `claim_checkpoint_folder`."""

    def __init__(self, folder: Path, digest: str, log: Log) -> None:
        self.folder = folder
        self.digest = digest
        self.log = log

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Write the checkpoint of `progress.step` (0: the start) and delete those not kept."""
        names = parameter_names(model)
        with atomic_directory(self._path(progress.step)) as temporary:
            save_file(trained_tensors(model), temporary / WEIGHTS)
            save_file(_optimizer_tensors(optimizer, names), temporary / OPTIMIZER)
            state = {
                "digest": self.digest,
                "threads": torch.get_num_threads(),
                "progress": asdict(progress),
                "sha256": {name: sha256_of(temporary / name) for name in (WEIGHTS, OPTIMIZER)},
            }
            _write_state(state, temporary / STATE)
        for step in set(self.steps()) - self._kept(progress):
            shutil.rmtree(self._path(step))

    def _kept(self, progress: Progress) -> set[int | None]:
        steps, guard = self.steps(), progress.guard
        good = [step for step in steps if guard.bad_since is None or step < guard.bad_since]
        validated = [step for step in steps if step <= guard.validated_step]
        kept = {*steps[-KEPT:], *good[-KEPT:], *validated[-1:], progress.best_step}
        return kept | {self._best_as_of(step) for step in kept if step is not None}

    def _best_as_of(self, step: int) -> int | None:
        """The best step that checkpoint `step` knows of: selection needs it after going back."""
        try:
            state = json.loads((self._path(step) / STATE).read_text(encoding="utf-8"))
            return state["progress"]["best_step"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def restart_from(self, progress: Progress) -> None:
        """Store `progress` in the checkpoint of its step, and delete all later checkpoints."""
        path = self._path(progress.step) / STATE
        state = self._read_state(progress.step)
        _write_state({**state, "progress": asdict(progress)}, path)
        for step in self.steps():
            if step > progress.step:
                shutil.rmtree(self._path(step))

    def resume(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, until: int | None = None
    ) -> Progress | None:
        """Load the newest undamaged checkpoint, of step `until` at most where given, into model and
        optimiser; None where there is none."""
        for step in reversed(self.steps()):
            if until is not None and step > until:
                continue
            try:
                progress = self._load(step, model, optimizer)
            except DamagedCheckpointError as error:
                self._set_aside(step, error, "an earlier one is used")
                continue
            self._check_best(progress)
            return progress
        return None

    def load_weights(self, step: int, model: nn.Module) -> None:
        """Load the trained weights of checkpoint `step` into the model."""
        self._read_state(step)
        _assign(model, self._read(step, WEIGHTS))

    def steps(self) -> list[int]:
        """Steps of the available checkpoints, ascending; 0 is the start."""
        names = (path.name.removeprefix("step-") for path in self.folder.glob("step-*"))
        start = [0] if (self.folder / START).exists() else []
        return start + sorted(int(name) for name in names if name.isdigit())

    def _path(self, step: int) -> Path:
        return self.folder / (f"step-{step}" if step else START)

    def _load(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        state = self._read_state(step)
        if state["threads"] != torch.get_num_threads():
            self.log(
                f"warning: checkpoint {step} was made with {state['threads']} threads, now "
                f"{torch.get_num_threads()}: results may differ in the last digits"
            )
        weights, moments = self._read(step, WEIGHTS), self._read(step, OPTIMIZER)
        _assign(model, weights)
        _load_optimizer(optimizer, moments, parameter_names(model))
        return Progress(**state["progress"])

    def _read_state(self, step: int) -> dict:
        """`state.json` of a checkpoint, after comparing its files with their digests."""
        path = self._path(step) / STATE
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            if state.pop("checksum") != digest_of(state):
                raise DamagedCheckpointError(f"{path} is damaged")
            for name, expected in state["sha256"].items():
                if sha256_of(path.with_name(name)) != expected:
                    raise DamagedCheckpointError(f"{path.with_name(name)} is damaged or truncated")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpointError(f"{path} cannot be read: {error}") from None
        return state

    def _read(self, step: int, name: str) -> dict[str, Tensor]:
        try:
            return load_file(self._path(step) / name)
        except (OSError, SafetensorError) as error:
            raise DamagedCheckpointError(f"{self._path(step) / name}: {error}") from None

    def _check_best(self, progress: Progress) -> None:
        """Forget a best checkpoint that is damaged or missing: selection starts again from here."""
        if progress.best_step in (None, progress.step):
            return
        try:
            self._read_state(progress.best_step)
        except DamagedCheckpointError as error:
            self._set_aside(progress.best_step, error, "the selection of the best starts again")
            progress.best_step = progress.best_accuracy = progress.best_length = None

    def _set_aside(self, step: int, error: DamagedCheckpointError, then: str) -> None:
        path = self._path(step)
        if path.exists():
            path.rename(_free_name(path, "damaged"))
        self.log(f"warning: checkpoint {step} is set aside, {then}: {error}")


def parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Names of the trained parameters; tied parameters have one name."""
    return {
        parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters and stored buffers: all that training changes in a model."""
    stored = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in stored}
    parameters = {name: parameter for parameter, name in parameter_names(model).items()}
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in (parameters | buffers).items()
    }


def _write_state(state: dict, path: Path) -> None:
    write_json(path, {**state, "checksum": digest_of(state)})


def _assign(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    targets = dict(model.named_parameters()) | dict(model.named_buffers())
    expected = trained_tensors(model).keys()
    if tensors.keys() != expected:
        different = sorted(tensors.keys() ^ expected)
        raise DamagedCheckpointError(
            f"the checkpoint's weights are of another model: {different[:3]}"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            targets[name].copy_(tensor)


def _optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str]
) -> dict[str, Tensor]:
    """The optimiser's tensors as `{parameter name}/{moment}`."""
    return {
        f"{names[parameter]}/{key}": value.detach().cpu().contiguous()
        for parameter, moments in optimizer.state.items()
        for key, value in moments.items()
    }


def _load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], names: dict[nn.Parameter, str]
) -> None:
    by_name = {name: parameter for parameter, name in names.items()}
    optimizer.state.clear()
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        parameter = by_name[name]
        optimizer.state[parameter][key] = tensor.to(parameter.device)


def _read_owner(folder: Path) -> str | None:
    """Digest of the configuration that a folder belongs to; None where it is unknown."""
    try:
        return json.loads((folder / OWNER).read_text(encoding="utf-8"))["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _free_name(path: Path, word: str) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.name}.{word}-{number}")).exists():
        number += 1
    return candidate
