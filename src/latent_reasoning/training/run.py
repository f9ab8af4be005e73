"""One training as a stage runs it: its inputs, its place on disk, its run in MLflow, its model.

What is trained is a stage's own part: a function that builds the model, its tokenizer and its task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import Experiment, Training, digest, load
from latent_reasoning.dag.digests import check_digest
from latent_reasoning.dag.fingerprints import fingerprint, write_model_digest
from latent_reasoning.dag.layout import Layout
from latent_reasoning.dag.planning import parents_of
from latent_reasoning.data.rows import DataError, Row, read_rows
from latent_reasoning.data.sequences import apply_special_token_policy
from latent_reasoning.evaluation.evaluator import EvaluationSettings, validate
from latent_reasoning.model.card import Origin, card_text
from latent_reasoning.model.folder import write_model
from latent_reasoning.model.frozen import hold_frozen
from latent_reasoning.model.lora import merge_lora, save_adapter
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.step_decoder import detach_step_decoder
from latent_reasoning.runtime import seeds
from latent_reasoning.runtime.command import entry_of, parser
from latent_reasoning.runtime.device import Machine, held_precision, join_machine
from latent_reasoning.runtime.files import (
    atomic_directory,
    sha256_of,
    write_json,
    write_text_atomically,
)
from latent_reasoning.runtime.launch import launch_processes
from latent_reasoning.runtime.signals import StopRequest, TrainingInterruptedError, stop_request
from latent_reasoning.runtime.tracking import Tracker, open_tracker
from latent_reasoning.training.checkpoints import CheckpointStore, claim_checkpoint_folder
from latent_reasoning.training.divergence import describe
from latent_reasoning.training.loop import Trainer, TrainResult
from latent_reasoning.training.metrics import write_training_csv
from latent_reasoning.training.task import Task

Build = Callable[["TrainingRun"], tuple[LatentReasoner, PreTrainedTokenizerBase, Task]]
"""Makes what a run trains: the model before training, its tokenizer and its task."""


def train_model(
    package: str,
    description: str | None,
    stages: tuple[str, ...],
    build: Build,
    arguments: list[str] | None,
) -> None:
    """The command of a `package` that trains models of `stages`: train one, write its folder."""
    options = parser(description, model=True).parse_args(arguments)
    experiment = load(options.config)
    entry_of(experiment, options.model, *stages)
    digest = check_digest(experiment, "model", options.digest, options.model)
    launch_processes(package, arguments, experiment.runtime)
    machine = join_machine(experiment.runtime)
    run = TrainingRun(experiment, options.model, options.seed, digest, machine)
    folder = run.complete(build)
    run.processes.print(f"{options.model}: written to {folder}")


@dataclass
class TrainingRun:
    """A model of the configuration, or the base model (`base`), being trained with one seed.

    `parents` holds, by name, the folder of the model it starts from, then that of its teacher;
    `splits` the files of rows it learns from; `data_digests` the SHA-256 of each file it reads.
    Raises `DataError` where the rows are missing.
    """

    experiment: Experiment
    name: str
    seed: int
    config_digest: str
    machine: Machine

    def __post_init__(self) -> None:
        self.device, self.processes = self.machine
        self.layout = Layout.of(self.experiment)
        models: dict[str, Any] = self.experiment.models
        self.entry = models.get(self.name)
        self.stage = self.entry.stage if self.entry else "base"
        self.training: Training = (self.entry or self.experiment.base).training
        self.parent = self.entry.start if self.entry else None
        parents = parents_of(self.experiment, self.name) if self.entry else []
        self.parents = {parent: self.layout.model(parent, self.seed) for parent in parents}
        own = "rl" if self.stage in ("rl", "policy") else "sft"
        # Where SFT's share is everything, RL's file is empty.
        more = getattr(self.entry, "rows", None) == "all" and self.experiment.data.sft_share < 1
        self.splits = ("sft", "rl") if more else (own,)
        self.data_digests = {
            split: _digest_of_rows(self.layout.data(split))
            for split in (*self.splits, "validation")
        }

    def complete(self, build: Build) -> Path:
        """Build the model, train it and write its folder, which is returned.

        Signals are noted and the time budget counts from before `build`, which may take long where
        a frozen teacher reads all rows.
        """
        with stop_request(self.experiment.runtime.time_budget_minutes) as stop:
            self.seed_weights()
            model, tokenizer, task = build(self)
            hold_frozen(model, held_precision(self.experiment.runtime.precision, self.device))
            result = self.train(task, stop)
        detach_step_decoder(model)
        return self.save(model, tokenizer, result)

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
        *,
        longest_completion: int,
        beginning: Callable[[], list[int] | None] = lambda: None,
    ) -> Callable[[], dict[str, float]]:
        """The greedy validation of a task, on the first `validation_rows` rows.

        A completion may be twice as long as the longest one trained on: longer ones only repeat
        themselves, and would cost time. `beginning` gives ids that every completion has to begin
        with at present, a latent run; None: all is as in the evaluation.
        """
        rows = self.rows("validation", tokenizer)[: self.training.validation_rows]
        settings = EvaluationSettings(
            prefix=self.experiment.data.prompt.evaluation,
            max_new_tokens=2 * longest_completion,
            batch_size=self.experiment.runtime.evaluation_batch_size,
            forced_steps=getattr(self.entry, "forced_steps", None),
            number_rule=self.experiment.data.number_rule,
        )

        def validation() -> dict[str, float]:
            ids = beginning()
            if ids is None:
                return validate(model, tokenizer, rows, settings, self.processes)
            free, begun = replace(settings, forced_steps=None), [ids] * len(rows)
            return validate(model, tokenizer, rows, free, self.processes, begun)

        return validation

    def train(self, task: Task, stop: StopRequest) -> TrainResult:
        """Train, or resume where a killed run stopped, and report to MLflow.

        A signal or the time budget ends it with `TrainingInterruptedError`; a second Ctrl-C does so
        at once, with `KeyboardInterrupt`.
        """
        folder = self.claim_checkpoint_folder()
        tracker, status = self._tracker(folder), "FAILED"
        try:
            result = Trainer(
                task,
                self.training,
                self.experiment.runtime,
                CheckpointStore(folder, self.digest, self.processes.print),
                self.seed,
                tracker=tracker,
                log_every=self.experiment.tracking.log_every,
                stop=stop,
            ).run()
            status = "FINISHED"
            return result
        except TrainingInterruptedError:
            status = "KILLED"
            raise
        finally:
            tracker.close(status)
            if status == "KILLED":  # the launcher ends all processes as soon as one has ended
                self.processes.wait()

    def _tracker(self, checkpoints: Path) -> Tracker:
        """The run in MLflow; only the first process reports."""
        if not self.processes.is_main:
            return Tracker()
        return open_tracker(
            self.experiment,
            model=self.name,
            seed=self.seed,
            stage=self.stage,
            digest=self.config_digest,
            checkpoints=checkpoints,
            parent=self.layout.checkpoints(self.parent, self.seed) if self.parent else None,
        )

    def save(
        self, model: LatentReasoner, tokenizer: PreTrainedTokenizerBase, result: TrainResult
    ) -> Path:
        """Write the model folder, its adapter merged; `save: adapter` keeps the adapter there too.

        The first process writes and all others wait; this is the end of a training.
        """
        folder = self.layout.model(self.name, self.seed)
        if self.processes.is_main:
            card = self._card(result)
            keep_adapter = getattr(self.entry, "save", None) == "adapter"
            with atomic_directory(folder) as temporary:
                if keep_adapter and model.adapter is not None:
                    save_adapter(model, temporary / "adapter", self.parent)
                merge_lora(model)
                write_model(model, tokenizer, temporary)
                write_json(temporary / "card.json", card)
                write_text_atomically(temporary / "README.md", card_text(card))
                write_training_csv(result.metrics, temporary / "training.csv")
            write_model_digest(folder, self.layout.model_digest(self.name, self.seed))
        self.processes.finish()
        return folder

    def _card(self, result: TrainResult) -> dict[str, Any]:
        origin = Origin(
            self.experiment, self.name, self.stage, self.seed, self.parent, self.config_digest
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
