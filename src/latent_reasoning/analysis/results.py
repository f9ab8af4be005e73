"""Reading an experiment's files under `results/`: evaluations and training curves.

Tables, figures and the report read results through this module only. A missing file is a
`MissingResultError` that names the file and the command that makes it, a damaged file a
`DamagedResultError`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas

from latent_reasoning.config import Experiment, SftModel, UserError
from latent_reasoning.dag.layout import Layout, main_models
from latent_reasoning.dag.planning import shown
from latent_reasoning.runtime.files import changed_files


class MissingResultError(UserError, RuntimeError):
    """A file that an earlier stage makes is missing."""


class DamagedResultError(UserError, RuntimeError):
    """A file differs from what an earlier stage wrote."""


@dataclass(frozen=True)
class Pair:
    """A model and the reference model that it is compared with, row by row."""

    model: str
    reference: str


@dataclass(frozen=True)
class Results:
    """The evaluated models of one experiment, in the order of the main table."""

    experiment: Experiment
    layout: Layout
    models: list[str]

    @classmethod
    def of(cls, experiment: Experiment, *, appendix: bool = False) -> Results:
        """The main models of an experiment, or those of its appendix."""
        models = experiment.report.appendix if appendix else main_models(experiment)
        return cls(experiment, Layout.of(experiment), models)

    @property
    def seeds(self) -> list[int]:
        return self.experiment.seeds

    @property
    def datasets(self) -> list[str]:
        return self.experiment.evaluation.datasets

    def stage(self, model: str) -> str:
        """The stage that makes a model: sft, latent_sft, rl or import."""
        return self.experiment.models[model].stage

    def parent(self, model: str) -> str:
        """The model that training started from, or `base`; for imported RL, by `report.rl_from`."""
        imported_from = self.experiment.report.rl_from.get(model)
        return imported_from or self.experiment.models[model].start or "base"

    def no_reasoning_models(self) -> list[str]:
        """Models of the table that were trained to answer at once."""
        entries = {model: self.experiment.models[model] for model in self.models}
        return [m for m, e in entries.items() if isinstance(e, SftModel) and e.form == "no_cot"]

    def rl_pairs(self) -> list[Pair]:
        """RL models of the table with the model each started from, imported ones included."""
        imported = self.experiment.report.rl_from
        rl = [name for name in self.models if self.stage(name) == "rl" or name in imported]
        return [Pair(name, self.parent(name)) for name in rl if self.parent(name) in self.models]

    def no_reasoning_pairs(self) -> list[Pair]:
        """Latent SFT models of the table against those that answer at once."""
        latent = [name for name in self.models if self.stage(name) == "latent_sft"]
        return [
            Pair(name, reference) for name in latent for reference in self.no_reasoning_models()
        ]

    def control_pairs(self) -> list[Pair]:
        """RL models against the latent SFT models that went on from the same start without RL."""
        controls = [m for m in self.models if self.stage(m) == "latent_sft"]
        return [
            Pair(pair.model, control)
            for pair in self.rl_pairs()
            for control in controls
            if self.parent(control) == pair.reference
        ]

    # ------------------------------------------------------------------------------ files

    def summary(self, model: str, seed: int, dataset: str) -> dict:
        """`summary.json` of an evaluation."""
        return json.loads(self._file(model, seed, dataset, "summary.json").read_text("utf-8"))

    def predictions(self, model: str, seed: int, dataset: str) -> pandas.DataFrame:
        """`predictions.parquet` of an evaluation, one row per example."""
        return pandas.read_parquet(self._file(model, seed, dataset, "predictions.parquet"))

    def pooled_predictions(self, model: str, dataset: str) -> pandas.DataFrame:
        """The predictions of all seeds, with a column `seed`."""
        frames = [self.predictions(model, s, dataset).assign(seed=s) for s in self.seeds]
        return pandas.concat(frames, ignore_index=True)

    def forced(self, model: str, seed: int, dataset: str) -> pandas.DataFrame:
        """`forced.csv` of an evaluation: accuracy at every forced number of latent steps."""
        return pandas.read_csv(self._file(model, seed, dataset, "forced.csv"))

    def data_summary(self) -> dict:
        """`data/summary.json`: numbers of rows and dropped rows of each split."""
        path = self.layout.data_summary
        if not path.is_file():
            raise MissingResultError(f"no {path}; make it with: snakemake {shown(path)}")
        with _refusing_damage(path):
            return json.loads(path.read_text("utf-8"))

    def training(self, model: str, seed: int) -> pandas.DataFrame | None:
        """`training.csv` of a model; None for a model that was not trained here."""
        if self.stage(model) == "import":
            return None
        path = self.layout.model(model, seed) / "training.csv"
        if not path.is_file():
            raise MissingResultError(
                f"no training curve of {model}, seed {seed} ({path}); the model is made by: "
                f"snakemake {shown(self.layout.model(model, seed))}"
            )
        with _refusing_damage(path):
            return pandas.read_csv(path)

    def _file(self, model: str, seed: int, dataset: str, name: str) -> Path:
        folder = self.layout.evaluation(model, seed, dataset)
        path = folder / name
        if not path.is_file():
            raise MissingResultError(
                f"no evaluation of {model}, seed {seed}, on {dataset} ({path}); make it with: "
                f"snakemake {shown(path)}"
            )
        if changed_files(folder, path.name):
            raise DamagedResultError(_damaged(path, "its SHA-256 is another"))
        return path


def _damaged(path: Path, problem: object) -> str:
    return f"{path}: damaged or edited ({problem}); delete it and run: snakemake {shown(path)}"


@contextlib.contextmanager
def _refusing_damage(path: Path) -> Iterator[None]:
    """Turn an error of decoding into a `DamagedResultError` that names the file."""
    try:
        yield
    except ValueError as error:
        raise DamagedResultError(_damaged(path, error)) from None
