# What the rules share: the configuration, the names of files, tracked params and resources.

import os
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from latent_reasoning.dag import fingerprints
from latent_reasoning.config import (
    PROJECT_ROOT,
    ConfigError,
    digest,
    is_local,
    merge,
    read,
    resolve,
)
from latent_reasoning.dag.cost import base_need, describe, evaluation_need, training_need
from latent_reasoning.runtime.files import check_writable, explain
from latent_reasoning.dag.layout import Layout, results_root
from latent_reasoning.dag.digests import science_digest
from latent_reasoning.runtime.signals import relay_signals


def shown(path):
    """A path relative to the working directory where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def load_experiment():
    """The configuration files of the command line (default: laptop), then `--config` values."""
    default = PROJECT_ROOT / "config" / "laptop.yaml"
    files = [str(shown(file)) for file in workflow.overwrite_configfiles or [default]]
    overrides = fingerprints.command_line_values(workflow.config_settings.config)
    raw = merge(read(files), overrides)
    return resolve(raw, ", ".join([*files, *(["--config"] if overrides else [])]))


def models_of(*stages):
    """Regular expression of the models that one of the stages makes; matches nothing for none."""
    names = [name for name, entry in EXPERIMENT.models.items() if entry.stage in stages]
    return "|".join(names) or "(?!)"


def science(stage):
    """The digest of the keys that a stage's result depends on, as a function of wildcards."""
    return lambda wildcards: science_digest(EXPERIMENT, stage, getattr(wildcards, "model", None))


def report_digest(*keys):
    """The digest of the keys of the section `report` that a table, figure or page shows.

    `main` counts as resolved: without it, the order of `models` is that of the rows.
    """
    section = EXPERIMENT.report.model_dump(mode="json") | {"main": MAIN}
    return digest([section[key] for key in keys])


def content(function, *names):
    """The digest of raw files from outside, as a function of wildcards; see fingerprints.py."""

    def of(wildcards):
        try:
            return function(EXPERIMENT, *(getattr(wildcards, name) for name in names))
        except ConfigError as error:
            raise WorkflowError(str(error)) from None

    return of


def rows(*splits):
    """Rows as an input: their digest counts, not the time stamp of the large file."""
    digests = [str(LAYOUT.data_digest(split)) for split in splits]
    return digests + [ancient(str(LAYOUT.data(split))) for split in splits]


def training_rows(wildcards):
    """Rows that a supervised training reads: SFT's share or all, and those it is selected by."""
    everything = EXPERIMENT.models[wildcards.model].rows == "all"
    return rows("sft", *(["rl"] if everything else []), "validation")


def model_input(name, seed):
    """A model as an input: its digest counts, not the time stamp of the folder."""
    return [str(LAYOUT.model_digest(name, seed)), ancient(str(LAYOUT.model(name, seed)))]


def parents(wildcards):
    """Folders of the models that a stage reads: where it starts, and its frozen teacher."""
    entry = EXPERIMENT.models[wildcards.model]
    names = [entry.start] if entry.start else []
    if entry.stage == "latent_sft" and entry.distillation.teacher != "self":
        names.append(entry.distillation.teacher)
    return [file for name in names for file in model_input(name, wildcards.seed)]


def trained(models):
    """The models, with every seed."""
    return [
        file for model in models for seed in EXPERIMENT.seeds for file in model_input(model, seed)
    ]


def evaluations(models):
    """Files of the evaluations of the models, on every data set and with every seed."""
    return [
        LAYOUT.evaluation(model, seed, dataset) / file
        for model in models
        for seed in EXPERIMENT.seeds
        for dataset in EXPERIMENT.evaluation.datasets
        for file in EVALUATION_FILES
    ]


def log_file(*parts):
    return LAYOUT.folder.joinpath("logs", *parts).with_suffix(".log")


def benchmark_file(*parts):
    return LAYOUT.benchmarks.joinpath(*parts).with_suffix(".tsv")


def asked(need_of, key, configured):
    """What a job asks the scheduler for: as configured, else as planned for its model."""
    if configured is not None:
        return configured

    def of(wildcards):
        model = [wildcards.model] if "model" in wildcards.keys() else []
        return getattr(need_of(EXPERIMENT, *model), key)

    return of


def memory_of(need_of, processes=1):
    """A job's memory; each of its processes needs that of one card's share."""
    one = asked(need_of, "host_mb", RUNTIME.memory_mb)
    return (lambda wildcards: one(wildcards) * processes) if callable(one) else one * processes


def minutes_of(need_of):
    return asked(need_of, "minutes", RUNTIME.runtime_minutes)


def write_config():
    """Write the resolved configuration that the stages read."""
    try:
        fingerprints.write_config(EXPERIMENT, LAYOUT.config)
    except OSError as error:
        raise WorkflowError(explain(error)) from None


def prepare_results():
    """Before the first job: a folder that takes no files is said once, and by its name."""
    try:
        check_writable(LAYOUT.folder)
    except OSError as error:
        raise WorkflowError(explain(error)) from None
    write_config()


def explain_disk():
    """Say why the folder takes no files: on a full disk the failed jobs' logs may be empty."""
    try:
        check_writable(LAYOUT.folder)
    except OSError as error:
        print(f"error: {explain(error)}", file=sys.stderr)


def plan():
    """Write the resolved configuration, and say what a costly experiment costs."""
    # Another run that holds the lock reads the file; ours, once it has the lock, writes it again.
    if not any(Path(".snakemake/locks").glob("*")):
        write_config()
        ahead = fingerprints.forget_future(LAYOUT.folder)
        if ahead:
            print(
                f"warning: {ahead} files were dated in the future: now dated now", file=sys.stderr
            )
    if LAYOUT.folder.exists() and not os.access(LAYOUT.folder, os.W_OK):
        explain_disk()
    cost = describe(EXPERIMENT, MAIN)
    if cost:
        print(cost, file=sys.stderr)


try:
    EXPERIMENT = load_experiment()
except ConfigError as error:
    raise WorkflowError(str(error)) from None

if set("{}\n") & set(str(results_root())):
    raise WorkflowError(
        f"LATENT_REASONING_RESULTS: {results_root()}: Snakemake would take a brace for a wildcard, "
        "and has no line breaks in names; choose another folder"
    )

LAYOUT = Layout.of(EXPERIMENT, shown(results_root()))
CONFIG = str(LAYOUT.config)
BASE = LAYOUT.base("{seed}")
BASE_DIGEST = LAYOUT.model_digest("base", "{seed}")
MODEL = LAYOUT.model("{model}", "{seed}")
MODEL_DIGEST = LAYOUT.model_digest("{model}", "{seed}")
EVALUATION = LAYOUT.evaluation("{model}", "{seed}", "{dataset}")
TRACKING_STORE = str(LAYOUT.folder / "tracking.ready")
EVALUATION_FILES = ["summary.json", "predictions.parquet", "forced.csv", "by_steps.csv"]
APPENDIX = EXPERIMENT.report.appendix
MAIN = EXPERIMENT.report.main or [model for model in EXPERIMENT.models if model not in APPENDIX]
TABLES = ["claims", "paired", "length", "by_steps", "by_tokens", "forced"]
FIGURES = [
    "accuracy_vs_tokens",
    "length_distribution",
    "length_by_steps",
    "accuracy_forced",
    "training_curves",
]
# The quick rules take their code as an input: an edited figure is drawn again.
ANALYSIS_CODE = sorted(
    shown(file) for file in PROJECT_ROOT.glob("src/latent_reasoning/analysis/*.py")
)
SPLITS = ["sft", "rl", "validation", "test"]
IMPORTED = [entry.path for entry in EXPERIMENT.models.values() if entry.stage == "import"]
IMPORTS_FROM_HUB = any(path and not is_local(path) for path in IMPORTED)
RUNTIME = EXPERIMENT.runtime
GPU = 0 if RUNTIME.device == "cpu" else 1
GPU_MODEL = RUNTIME.gpu_model if GPU and RUNTIME.gpu_model else ""
# A training whose time budget is used up exits with 75; tried again, it goes on from its checkpoint.
# Without a budget the profile's `retries` count.
TRAINING_RETRIES = 20 if RUNTIME.time_budget_minutes else None

# The stages run with the interpreter that runs Snakemake, and write where the rules expect it.
# Trainings take the shell's place (`exec`), so that a signal to the job reaches them: a shell would
# die of it, the job count as ended, and the training be killed before its checkpoint is written.
shell.prefix(
    f'set -euo pipefail; export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH" '
    f"PYTHONUNBUFFERED=1 LATENT_REASONING_RESULTS={shlex.quote(str(results_root()))} "
    "LATENT_REASONING_WORKFLOW=$PPID; "
)


wildcard_constraints:
    model=models_of("sft", "latent_sft", "rl", "import"),
    seed=r"\d+",
    dataset=r"[a-z0-9_-]+",


if workflow.is_main_process:
    plan()
else:
    relay_signals()
