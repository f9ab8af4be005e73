# What the rules share: the configuration, the names of files, tracked params and resources.
# What needs no Snakemake is in src/latent_reasoning/dag/. Parsing touches no file.

import os
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from latent_reasoning.config import PROJECT_ROOT, ConfigError, is_local
from latent_reasoning.dag import fingerprints, planning
from latent_reasoning.dag.changes import changed_keys
from latent_reasoning.dag.cost import base_need, describe, evaluation_need, training_need
from latent_reasoning.dag.digests import science_digest
from latent_reasoning.dag.layout import (
    EVALUATION_FILES,
    FIGURES,
    RIVALS_FIGURES,
    RIVALS_TABLES,
    SPLITS,
    TABLES,
    Layout,
    inside_models,
    main_models,
    probe_rows,
    results_root,
)
from latent_reasoning.runtime.files import check_writable, explain
from latent_reasoning.runtime.signals import relay_signals


def command_line():
    """Configuration files, `--config` values and cores of the call, and whether it is the first.

    The only use of Snakemake's internals. Its documented way, a `configfile:` and `config`, is a
    trap: a `--configfile` is merged deeply over the directive's file, so that keys of laptop.yaml
    would leak into every other experiment. `workflow.cores` fails where the cores are not given, as
    on a cluster. A job that is run by another Snakemake (on a cluster) is not the main process.
    """
    return (
        workflow.overwrite_configfiles,
        workflow.config_settings.config,
        workflow.resource_settings.cores or 1,
        workflow.is_main_process,
    )


def model_input(name, seed):
    """A model as an input: its digest counts, not the time stamp of the folder."""
    return [str(LAYOUT.model_digest(name, seed)), ancient(str(LAYOUT.model(name, seed)))]


def parents(wildcards):
    """Folders of the models that a training reads."""
    names = planning.parents_of(EXPERIMENT, wildcards.model)
    return [file for name in names for file in model_input(name, wildcards.seed)]


def trained(models):
    """The models, with every seed."""
    return [
        file for model in models for seed in EXPERIMENT.seeds for file in model_input(model, seed)
    ]


def rows(*splits):
    """Rows as an input: their digest counts, not the time stamp of the large file."""
    digests = [str(LAYOUT.data_digest(split)) for split in splits]
    return digests + [ancient(str(LAYOUT.data(split))) for split in splits]


def training_rows(wildcards):
    """Rows that a supervised training reads: SFT's share or all, and those it is selected by."""
    everything = EXPERIMENT.models[wildcards.model].rows == "all"
    return rows("sft", *(["rl"] if everything else []), "validation")


def evaluations(models):
    """Files of the evaluations of the models, on every data set and with every seed."""
    return [
        LAYOUT.evaluation(model, seed, dataset) / file
        for model in models
        for seed in EXPERIMENT.seeds
        for dataset in EXPERIMENT.evaluation.datasets
        for file in EVALUATION_FILES
    ]


def content(fingerprint, *names):
    """The digest of raw files from outside, by one of the functions of fingerprints.py."""
    try:
        return fingerprint(EXPERIMENT, *names)
    except ConfigError as error:
        raise WorkflowError(str(error)) from None


def made(wildcards):
    """Whether a model is finished."""
    return LAYOUT.model_digest(wildcards.model, wildcards.seed).exists()


def memory_mb(need, processes=1):
    """Memory asked of the scheduler: as configured, else as planned; a share for each process."""
    return (RUNTIME.memory_mb or need.host_mb) * processes


def minutes(need):
    return RUNTIME.runtime_minutes or need.minutes


def log_file(*parts):
    return LAYOUT.folder.joinpath("logs", *parts).with_suffix(".log")


def benchmark_file(*parts):
    return LAYOUT.benchmarks.joinpath(*parts).with_suffix(".tsv")


def announce():
    """Before anything runs, also in a dry run: what it costs, and which keys make it run again."""
    for line in [describe(EXPERIMENT, MAIN), *changed_keys(EXPERIMENT, LAYOUT)]:
        if line:
            print(line, file=sys.stderr)
    # Snakemake itself fails where it cannot lock its folder, and does not say what to do.
    if LAYOUT.folder.exists() and not os.access(LAYOUT.folder, os.W_OK):
        explain_disk()


def prepare_results():
    """Before the first job, with Snakemake's lock held: the configuration that the stages read."""
    try:
        check_writable(LAYOUT.folder)
        planning.write_config(EXPERIMENT, LAYOUT.config)
    except OSError as error:
        raise WorkflowError(explain(error)) from None
    ahead = planning.clamp_future_mtimes(LAYOUT.folder)
    if ahead:
        print(f"warning: {ahead} files were dated in the future: now dated now", file=sys.stderr)


def explain_disk():
    """Say why the folder takes no files: on a full disk the failed jobs' logs may be empty."""
    try:
        check_writable(LAYOUT.folder)
    except OSError as error:
        print(f"error: {explain(error)}", file=sys.stderr)


CONFIG_FILES, CONFIG_VALUES, CORES, IS_MAIN_PROCESS = command_line()
try:
    EXPERIMENT = planning.load_experiment(CONFIG_FILES, CONFIG_VALUES)
    RESULTS = planning.shown_results_root()
except ConfigError as error:
    raise WorkflowError(str(error)) from None

LAYOUT = Layout.of(EXPERIMENT, RESULTS)
CONFIG = str(LAYOUT.config)
BASE = LAYOUT.base("{seed}")
BASE_DIGEST = LAYOUT.model_digest("base", "{seed}")
MODEL = LAYOUT.model("{model}", "{seed}")
MODEL_DIGEST = LAYOUT.model_digest("{model}", "{seed}")
EVALUATION = LAYOUT.evaluation("{model}", "{seed}", "{dataset}")
TRACKING_STORE = str(LAYOUT.folder / "tracking.ready")
APPENDIX = EXPERIMENT.report.appendix
MAIN = main_models(EXPERIMENT)
RIVALS = planning.rival_models(EXPERIMENT)
RUNTIME = EXPERIMENT.runtime
GPU = 0 if RUNTIME.device == "cpu" else 1
GPU_MODEL = RUNTIME.gpu_model if GPU and RUNTIME.gpu_model else ""
# A training whose time budget is used up exits with 75; tried again, it resumes from its checkpoint.
# Without a budget the profile's `retries` count.
TRAINING_RETRIES = 20 if RUNTIME.time_budget_minutes else None

# The stages run with the interpreter that runs Snakemake, write where the rules expect it, and end
# with the Snakemake that started them. Trainings take the shell's place (`exec`), so that a signal
# to the job reaches them: a shell would die of it, the job count as ended, and the training be
# killed before its checkpoint is written.
shell.prefix(
    f'set -euo pipefail; export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH" '
    f"PYTHONUNBUFFERED=1 LATENT_REASONING_RESULTS={shlex.quote(str(results_root()))} "
    "LATENT_REASONING_WORKFLOW=$PPID; "
)


wildcard_constraints:
    model="|".join(EXPERIMENT.models),
    seed=r"\d+",
    dataset=r"[a-z0-9_-]+",


if IS_MAIN_PROCESS:
    announce()
else:
    relay_signals()
