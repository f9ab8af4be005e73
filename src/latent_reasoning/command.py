"""What the stages' command lines share: their arguments and their errors."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable

from latent_reasoning.config import ConfigError, Experiment
from latent_reasoning.disk import explain
from latent_reasoning.workflow_watch import end_with_workflow


class StageError(RuntimeError):
    """Something a user can mend; the message says what, where and what to do."""


def parser(
    description: str, *, model: bool = False, dataset: bool = False
) -> argparse.ArgumentParser:
    """The arguments of a stage: `--config FILE [--model NAME --seed N] [--dataset D]`."""
    arguments = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument(
        "--config",
        nargs="+",
        required=True,
        metavar="FILE",
        help="configuration; a later file overrides an earlier one",
    )
    arguments.add_argument(
        "--digest", help="refuse to run where the stage's own keys have another digest"
    )
    if model:
        arguments.add_argument("--model", required=True, metavar="NAME", help="entry of models")
        arguments.add_argument("--seed", type=int, default=0, help="seed of the training")
    if dataset:
        arguments.add_argument("--dataset", default="test", help="split or extra test set")
    return arguments


def entry_of(experiment: Experiment, model: str, *stages: str):
    """The entry `model` of `models`; `ConfigError` where it is missing or of another stage."""
    if model not in experiment.models:
        raise ConfigError(
            f"models: {model!r} is not in the configuration; it has {', '.join(experiment.models)}"
        )
    entry = experiment.models[model]
    if stages and entry.stage not in stages:
        raise ConfigError(
            f"models.{model}.stage: is {entry.stage}, but this command trains {' or '.join(stages)}"
        )
    return entry


def run_stage(main: Callable[[list[str] | None], None]) -> None:
    """Run a stage's `main`; an error that a user can mend becomes one clear line and exit 2."""
    end_with_workflow()
    try:
        main(None)
    except (ValueError, RuntimeError, OSError) as error:
        if not _is_for_the_user(error):
            raise
        told = explain(error) if isinstance(error, OSError) else error
        with contextlib.suppress(OSError):  # the log may lie on the disk that is full
            print(f"error: {told}", file=sys.stderr)
        sys.exit(2)


def _is_for_the_user(error: Exception) -> bool:
    """Errors of the project's own classes, and of the file system."""
    own = type(error).__module__.startswith("latent_reasoning")
    return own or isinstance(error, OSError)
