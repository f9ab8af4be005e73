"""One training as a stage runs it: its inputs, its place on disk, its run in MLflow, its model.

`TrainingRun` holds what all training stages do between reading the command line and the training
loop, and after it; what is trained is the stage's own part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import Experiment, LatentSftModel, SftModel, Training, digest
from latent_reasoning.dag.fingerprints import fingerprint, write_model_digest
from latent_reasoning.dag.layout import Layout
from latent_reasoning.data.rows import DataError, Row, read_rows
from latent_reasoning.data.sequences import apply_special_token_policy
from latent_reasoning.evaluation.evaluator import EvaluationSettings, validate
from latent_reasoning.model.card import Origin, card_text
from latent_reasoning.model.folder import write_model
from latent_reasoning.model.lora import merge_lora, save_adapter
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.runtime import seeds
from latent_reasoning.runtime.files import (
    atomic_directory,
    sha256_of,
    write_json,
    write_text_atomically,
)
from latent_reasoning.runtime.machine import Machine
from latent_reasoning.runtime.parallel import OneProcess
from latent_reasoning.runtime.signals import TrainingInterruptedError, stop_request
from latent_reasoning.runtime.tracking import NullTracker, Tracker, open_tracker
from latent_reasoning.training.checkpoints import CheckpointStore, claim_checkpoint_folder
from latent_reasoning.training.divergence import describe
from latent_reasoning.training.loop import Trainer, TrainResult
from latent_reasoning.training.metrics import write_training_csv
from latent_reasoning.training.task import Task


@dataclass
class TrainingRun:
    """A model of the configuration, or the base model, being trained with one seed.

    `parents` holds, by name, the folder of the model it starts from, then that of its teacher;
    `splits` the files of rows it learns from; `data_digests` the SHA-256 of each file it reads.
    """

    experiment: Experiment
    name: str
    stage: str
    seed: int
    config_digest: str
    layout: Layout
    device: torch.device
    processes: OneProcess
    parents: dict[str, Path]
    splits: tuple[str, ...]
    data_digests: dict[str, str]

    @classmethod
    def of(
        cls,
        experiment: Experiment,
        name: str,
        seed: int,
        config_digest: str,
        *,
        split: str,
        machine: Machine,
    ) -> TrainingRun:
        """The run of the model `name`, which learns from `split`, or with `rows: all` from all.

        Raises `DataError` where the rows are missing.
        """
        layout = Layout.of(experiment)
        entry = None if name == "base" else experiment.models[name]
        parents = [] if entry is None else [entry.start]
        if isinstance(entry, LatentSftModel) and entry.distillation.teacher != "self":
            parents.append(entry.distillation.teacher)
        all_rows = isinstance(entry, SftModel | LatentSftModel) and entry.rows == "all"
        splits = ("sft", "rl") if all_rows else (split,)
        return cls(
            experiment=experiment,
            name=name,
            stage="base" if entry is None else entry.stage,
            seed=seed,
            config_digest=config_digest,
            layout=layout,
            device=machine.device,
            processes=machine.processes,
            parents={parent: layout.model(parent, seed) for parent in parents},
            splits=splits,
            data_digests={
                used: _digest_of_rows(layout.data(used)) for used in (*splits, "validation")
            },
        )

    def seed_weights(self) -> None:
        """Seed Python's, NumPy's and torch's generators; to be called before the model is built.

        Initial weights of a base from scratch, the recurrent filter and adapters are random.
        """
        seeds.seed_everything(self.seed, seeds.INITIAL_WEIGHTS.format(model=self.name))

    def training_rows(self, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
        """Rows of all splits that the model learns from."""
        return [row for split in self.splits for row in self.rows(split, tokenizer)]

    def rows(self, split: str, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
        """Rows of a prepared split, with `data.special_token_text` applied."""
        rows = read_rows(self.layout.data(split))
        policy = self.experiment.data.special_token_text
        kept, skipped = apply_special_token_policy(rows, tokenizer, policy)
        if skipped:
            self.processes.print(f"{split}: {skipped} rows with special-token text are skipped")
        if not kept:
            raise DataError(
                f"{self.layout.data(split)}: all {skipped} rows hold special-token text, which "
                "data.special_token_text: skip leaves out; use another policy or other rows"
            )
        return kept

    @cached_property
    def digest(self) -> str:
        """Digest of the configuration and the content of all inputs: checkpoints belong to it."""
        parents = {
            name: fingerprint(str(path), f"the model {name}") for name, path in self.parents.items()
        }
        return digest([self.config_digest, self.data_digests, parents])

    def claim_checkpoint_folder(self) -> Path:
        """Claim the folder of checkpoints; a folder made from other inputs is set aside.

        All processes call this, and the first one claims it for all. Raises `FolderInUseError`
        where another training uses it.
        """
        folder, digest = self.layout.checkpoints(self.name, self.seed), self.digest
        with self.processes.main_first():
            if self.processes.is_main:
                claim_checkpoint_folder(folder, digest, self.processes.print)
        return folder

    def validation(
        self,
        model: LatentReasoner,
        tokenizer: PreTrainedTokenizerBase,
        training: Training,
        *,
        longest_completion: int,
        forced_steps: int | None = None,
    ) -> Callable[[], dict[str, float]]:
        """The greedy validation of a task, on the first `validation_rows` rows.

        A completion may be twice as long as the longest one trained on: longer ones only repeat
        themselves, and would cost time.
        """
        rows = self.rows("validation", tokenizer)[: training.validation_rows]
        settings = EvaluationSettings(
            prefix=self.experiment.data.prompt.evaluation,
            max_new_tokens=2 * longest_completion,
            batch_size=self.experiment.runtime.evaluation_batch_size,
            forced_steps=forced_steps,
            number_rule=self.experiment.data.number_rule,
        )
        return lambda: validate(model, tokenizer, rows, settings, self.processes)

    def train(self, task: Task, training: Training) -> TrainResult:
        """Train, or resume where a killed run stopped, and report to MLflow.

        A signal or the time budget ends it with `TrainingInterruptedError`; a second Ctrl-C does so
        at once, with `KeyboardInterrupt`.
        """
        folder = self.claim_checkpoint_folder()
        store = CheckpointStore(folder, self.digest, self.processes.print)
        tracker = self._tracker(folder)
        runtime = self.experiment.runtime
        status = "FAILED"
        try:
            with stop_request(runtime.time_budget_minutes) as stop:
                result = Trainer(
                    task,
                    training,
                    runtime,
                    store,
                    self.seed,
                    tracker=tracker,
                    log_every=self.experiment.tracking.log_every,
                    stop=stop,
                ).run()
            status = "FINISHED"
            return result
        except TrainingInterruptedError:
            tracker.close("KILLED")
            self.processes.wait()  # the launcher ends all processes as soon as one has ended
            raise
        finally:
            tracker.close(status)

    def _tracker(self, checkpoints: Path) -> Tracker:
        """The run in MLflow; only the first process reports."""
        if not self.processes.is_main:
            return NullTracker()
        parent = next(iter(self.parents), None)
        return open_tracker(
            self.experiment,
            model=self.name,
            seed=self.seed,
            stage=self.stage,
            digest=self.config_digest,
            checkpoints=checkpoints,
            parent=self.layout.checkpoints(parent, self.seed) if parent else None,
        )

    def save(
        self,
        model: LatentReasoner,
        tokenizer: PreTrainedTokenizerBase,
        result: TrainResult,
        *,
        keep_adapter: bool = False,
    ) -> Path:
        """Write the model folder, its adapter merged; `keep_adapter` also writes the adapter there.

        The first process writes and all others wait; this is the end of a training.
        """
        folder = self.layout.model(self.name, self.seed)
        if self.processes.is_main:
            self._write(folder, model, tokenizer, result, keep_adapter)
        self.processes.finish()
        return folder

    def _write(
        self,
        folder: Path,
        model: LatentReasoner,
        tokenizer: PreTrainedTokenizerBase,
        result: TrainResult,
        keep_adapter: bool,
    ) -> None:
        parent = next(iter(self.parents), None)
        card = self._card(parent, result)
        with atomic_directory(folder) as temporary:
            if keep_adapter and model.adapter is not None:
                save_adapter(model, temporary / "adapter", parent)
            merge_lora(model)
            write_model(model, tokenizer, temporary)
            write_json(temporary / "card.json", card)
            write_text_atomically(temporary / "README.md", card_text(card))
            write_training_csv(result.metrics, temporary / "training.csv")
        write_model_digest(folder, self.layout.model_digest(self.name, self.seed))

    def _card(self, parent: str | None, result: TrainResult) -> dict[str, Any]:
        origin = Origin(
            self.experiment, self.name, self.stage, self.seed, parent, self.config_digest
        )
        return origin.card_of_trained(
            data_digests=self.data_digests,
            selection=result.selection,
            metrics={
                "validation_accuracy": result.validation_accuracy,
                "validation_reasoning_tokens": result.validation_reasoning_tokens,
                "step": result.step,
                "steps_run": result.steps_run,
            },
            rollbacks=[describe(rollback) for rollback in result.rollbacks],
        )


def _digest_of_rows(file: Path) -> str:
    if not file.is_file():
        raise DataError(f"{file}: no such file; run the stage that prepares the data first")
    return sha256_of(file)
