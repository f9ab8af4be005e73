"""What the workflow plans with, without Snakemake; `workflow/rules/common.smk` connects the two.

Functions that are called while a Snakefile is parsed change no file: a dry run leaves everything as
it is. `write_config` and `clamp_future_mtimes` are for the start of a run.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latent_reasoning.config import (
    PROJECT_ROOT,
    ConfigError,
    Experiment,
    digest,
    dump_yaml,
    merge,
    plain_value,
    read,
    resolve,
)
from latent_reasoning.dag.digests import teacher_of
from latent_reasoning.dag.layout import main_models, results_root
from latent_reasoning.runtime.files import write_text_atomically

DEFAULT_CONFIG = PROJECT_ROOT / "config" / "laptop.yaml"


def shown(path: Path) -> Path:
    """A path, relative to the working directory if it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def load_experiment(files: Sequence[Path], values: Mapping[str, Any]) -> Experiment:
    """The experiment of the configuration files (default: laptop), with `--config` over them."""
    names = [str(shown(Path(file))) for file in files or [DEFAULT_CONFIG]]
    raw = merge(read(names), command_line_values(values))
    return resolve(raw, ", ".join([*names, *(["--config"] if values else [])]))


def command_line_values(value: Any) -> Any:
    """Values of Snakemake's `--config key=value`, whose lists and mappings hold text alone."""
    if isinstance(value, Mapping):
        return {key: command_line_values(item) for key, item in value.items()}
    if isinstance(value, list):
        return [command_line_values(item) for item in value]
    return plain_value(value) if isinstance(value, str) else value


def shown_results_root() -> Path:
    """`results_root()` as the start of file names; `ConfigError` if Snakemake cannot use it."""
    root = results_root()
    if set("{}\n") & set(str(root)):
        raise ConfigError(
            f"LATENT_REASONING_RESULTS: {root}: Snakemake would take a brace for a wildcard, and "
            "has no line breaks in names; choose another folder"
        )
    return shown(root)


# ------------------------------------------------------------------------- inputs and parameters


def models_of(experiment: Experiment, *stages: str) -> str:
    """Regular expression of the models that one of the stages makes; matches nothing for none."""
    names = [name for name, entry in experiment.models.items() if entry.stage in stages]
    return "|".join(names) or "(?!)"


def parents_of(experiment: Experiment, model: str) -> list[str]:
    """The models that a training reads: the one it starts from, its frozen teacher, and the base
    that its step decoder begins as."""
    entry = experiment.models[model]
    decodes = getattr(entry, "step_decoder", None) is not None
    names = (entry.start, teacher_of(entry), "base" if decodes else None)
    return list(dict.fromkeys(name for name in names if name is not None))


def report_digest(experiment: Experiment, *keys: str) -> str:
    """The digest of the keys of the section `report` that a table, figure or page shows.

    `main` counts with its default filled in, so that the order of `models` counts too.
    """
    section = experiment.report.model_dump(mode="json") | {"main": main_models(experiment)}
    return digest([section[key] for key in keys])


def ablation_models(experiment: Experiment) -> list[str]:
    """The models of `report.ablations` and the RL models that start from them."""
    models = list(experiment.report.ablations.values())
    starts = {name: entry.start for name, entry in experiment.models.items() if entry.stage == "rl"}
    return models + [name for name, start in starts.items() if start in models]


def rival_models(experiment: Experiment) -> list[str]:
    """The models of `report.rivals` and its references, each once."""
    rivals = experiment.report.rivals
    return list(dict.fromkeys([*rivals.models, *rivals.references]))


def trial_models(experiment: Experiment) -> list[str]:
    """The tuning trials that did not fail."""
    rivals = experiment.report.rivals
    return [name for names in rivals.trials.values() for name in names if name not in rivals.failed]


# ------------------------------------------------------------------------- at the start of a run


def write_config(experiment: Experiment, path: Path) -> None:
    """Write the full configuration atomically if it differs from the file's content, which may be
    damaged."""
    text = dump_yaml(experiment)
    if not path.is_file() or path.read_bytes() != text.encode():
        write_text_atomically(path, text)


def clamp_future_mtimes(folder: Path) -> int:
    """Set modification times that lie in the future to now; returns the number of those found.

    They come from a clock that was ahead, and Snakemake fails every job whose input is newer than
    its fresh output.
    """
    now, found = time.time(), 0
    for parent, _, names in os.walk(folder):
        for path in (Path(parent), *(Path(parent, name) for name in names)):
            with contextlib.suppress(OSError):  # gone, as what a training writes, or not ours
                if not path.is_symlink() and path.stat().st_mtime > now:
                    os.utime(path, (now, now))
                    found += 1
    return found
