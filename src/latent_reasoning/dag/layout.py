"""Where everything of an experiment lies under `results/`: the DAG's file names, in one place."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from latent_reasoning.config import PROJECT_ROOT, Experiment, ModelEntry

SPLITS = ("sft", "rl", "validation", "test")
"""What raw rows are split into; extra test sets stand beside them."""
EVALUATION_FILES = ("summary.json", "predictions.parquet", "forced.csv", "by_steps.csv")
TABLES = ("claims", "paired", "length", "by_steps", "by_tokens", "forced", "compute")
"""Tables beside the main one, by file name."""
RIVALS_TABLES = ("rivals", "rivals_paired")
RIVALS_FIGURES = ("rivals", "rivals_curves")
"""What compares the methods of `report.rivals`; `rivals` is a table in three formats."""
FIGURES = (
    "accuracy_vs_tokens",
    "length_distribution",
    "length_by_steps",
    "accuracy_forced",
    "accuracy_vs_compute",
    "training_curves",
)


def results_root() -> Path:
    """`results/` of the project, or the environment's LATENT_REASONING_RESULTS."""
    override = os.environ.get("LATENT_REASONING_RESULTS")
    return Path(override).resolve() if override else PROJECT_ROOT / "results"


def main_models(experiment: Experiment) -> list[str]:
    """The models of the main tables and figures: `report.main`, or all but the appendix's."""
    report = experiment.report
    return report.main or [name for name in experiment.models if name not in report.appendix]


def inside_models(experiment: Experiment) -> list[str]:
    """The models that are looked into: `inside.models`, or the latent ones of the main tables."""
    names = main_models(experiment)
    return experiment.inside.models or [n for n in names if not is_plain(experiment.models[n])]


def is_plain(entry: ModelEntry) -> bool:
    """Whether an entry makes a plain language model; an imported folder is taken for a latent one,
    as is what starts from a model."""
    from_base = entry.stage == "import" and entry.start == "base"
    return entry.stage == "sft" or from_base or not getattr(entry, "has_latents", True)


def probe_rows(dataset: str) -> str:
    """The split whose rows train the probes that are tested on a data set."""
    return "sft" if dataset == "validation" else "validation"


@dataclass(frozen=True)
class Layout:
    """The folders and files of one experiment."""

    folder: Path
    base_has_seeds: bool

    @classmethod
    def of(cls, experiment: Experiment, root: Path | None = None) -> Layout:
        """The layout of an experiment under `root` (default: `results_root()`)."""
        scratch = experiment.base.source == "scratch"
        return cls((root or results_root()) / experiment.experiment, base_has_seeds=scratch)

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    def data(self, split: str) -> Path:
        """Rows of a split (sft, rl, validation, test or an extra test set), as JSON lines."""
        return self.folder / "data" / f"{split}.jsonl"

    def data_digest(self, split: str) -> Path:
        """A small file with the SHA-256 of the split's rows: what the DAG compares."""
        return self.folder / "data" / f"{split}.sha256"

    @property
    def data_summary(self) -> Path:
        return self.folder / "data" / "summary.json"

    def test_set_summary(self, name: str) -> Path:
        """Rows and dropped rows of an extra test set."""
        return self.folder / "data" / f"{name}.summary.json"

    def base(self, seed: int) -> Path:
        """The base model: one for each seed if it is trained from scratch."""
        base = self.folder / "base"
        return base / f"seed-{seed}" if self.base_has_seeds else base

    def model(self, model: str, seed: int) -> Path:
        """A trained model; `base` names the base model."""
        if model == "base":
            return self.base(seed)
        return self.folder / "models" / model / f"seed-{seed}"

    def model_digest(self, model: str, seed: int) -> Path:
        """A small file with the digest of the model's weights: what the DAG compares."""
        folder = self.model(model, seed)
        return folder.with_name(f"{folder.name}.sha256")

    def checkpoints(self, model: str, seed: int) -> Path:
        """Resumable state of a training, outside every declared output."""
        return self.folder / "checkpoints" / model / f"seed-{seed}"

    def evaluation(self, model: str, seed: int, dataset: str) -> Path:
        return self.folder / "evaluations" / model / f"seed-{seed}" / dataset

    def timing(self, model: str) -> Path:
        """How long a row takes a model of the first seed, measured with nothing beside it."""
        return self.folder / "timings" / f"{model}.json"

    def inside(self, model: str, seed: int, dataset: str) -> Path:
        """What was seen inside a model's chains on the rows of a data set."""
        return self.folder / "inside" / model / f"seed-{seed}" / dataset

    @property
    def inside_page(self) -> Path:
        return self.folder / "inside.html"

    @property
    def tables(self) -> Path:
        return self.folder / "tables"

    @property
    def figures(self) -> Path:
        return self.folder / "figures"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @property
    def benchmarks(self) -> Path:
        """Snakemake's wall time and memory of each job."""
        return self.folder / "benchmarks"
