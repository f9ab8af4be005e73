"""What the stages' command lines share: their arguments and their errors."""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

from latent_reasoning.config import ConfigError, Experiment, UserError
from latent_reasoning.runtime.files import explain, first_line
from latent_reasoning.runtime.rank import launched, rank
from latent_reasoning.runtime.signals import TrainingInterruptedError, end_with_workflow

TRACKING_THREAD = "tracking"
"""The name of the thread that sends to the tracking store (`tracking.py`)."""

ENDED_EARLY = os.EX_TEMPFAIL
"""Exit code 75: ended early with a checkpoint, from which the same command resumes."""


def described(description: str | None) -> argparse.ArgumentParser:
    """A command line whose help begins with a module's docstring as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def parser(
    description: str, *, model: bool = False, dataset: bool = False
) -> argparse.ArgumentParser:
    """The arguments of a stage: `--config FILE [--model NAME --seed N] [--dataset D]`."""
    arguments = described(description)
    arguments.add_argument(
        "--config",
        nargs="+",
        required=True,
        metavar="FILE",
        help="configuration; a later file overrides an earlier one",
    )
    arguments.add_argument(
        "--digest", help="refuse to run if the stage's own keys have another digest"
    )
    if model:
        arguments.add_argument("--model", required=True, metavar="NAME", help="entry of models")
        arguments.add_argument("--seed", type=count, default=0, help="seed of the training")
    if dataset:
        arguments.add_argument("--dataset", default="test", help="split or extra test set")
    return arguments


def names_path(arguments: list[str] | None) -> bool:
    """Whether a command line takes a model by `--path`, and not from an experiment."""
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--path", nargs="?", const="")
    return chooser.parse_known_args(arguments)[0].path is not None


def count(text: str) -> int:
    """An argument that is a whole number from 0 on, of 64 bits like a seed."""
    return _whole_number(text, 0, 2**63 - 1)


def positive(text: str) -> int:
    """An argument that is a whole number from 1 to a thousand million."""
    return _whole_number(text, 1, 10**9)


def _whole_number(text: str, least: int, most: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not a whole number") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"{text} is below {least}")
    if value > most:
        raise argparse.ArgumentTypeError(f"{text:.80} is above {most}")
    return value


def entry_of(experiment: Experiment, model: str, *stages: str):
    """The entry `model` of `models`; `ConfigError` if it is missing or of another stage."""
    if model not in experiment.models:
        raise ConfigError(
            f"models: {model!r} is not in the configuration; it has {', '.join(experiment.models)}"
        )
    entry = experiment.models[model]
    if stages and entry.stage not in stages:
        raise ConfigError(
            f"models.{model}.stage: is {entry.stage}, but this command makes {' or '.join(stages)}"
        )
    return entry


def run_stage(main: Callable[[list[str] | None], None]) -> None:
    """Run a stage's `main`; an error that a user can mend becomes one clear line and exit 2.

    A training that ended early with a checkpoint says so in one line, and exits with 75.
    """
    gc.freeze()  # modules stay: no later collection looks at them
    gc.enable()  # see the package's __init__
    end_with_workflow()
    _write_any_text()
    try:
        _check_arguments(sys.argv[1:])
        main(None)
        if _store_is_waited_for():
            _leave(0)
    except TrainingInterruptedError as interruption:
        if rank() == 0:
            print(interruption, file=sys.stderr)
        _leave(ENDED_EARLY)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _leave(128 + signal.SIGINT)
    except Exception as error:
        text = _for_the_user(error)
        if text is None:
            if not launched():
                raise
            traceback.print_exc()
            _leave(1)
        with contextlib.suppress(OSError):  # the log may lie on the disk that is full
            print(f"error: {text}", file=sys.stderr)
        _leave(2)


def _write_any_text() -> None:
    """Have the console write what its encoding lacks as escapes, so that no result is lost."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _check_arguments(arguments: list[str]) -> None:
    """Refuse bytes that are no text in the terminal's encoding: no tokenizer could read them."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"the argument {argument!a} is not valid {sys.getfilesystemencoding()}: give "
                "it in the encoding of this terminal"
            ) from None


def _leave(code: int) -> NoReturn:
    """Exit; at once where Python's shutdown may hang or abort.

    That is so in one of several processes, whose connections to the others are still open, and
    where a thread still waits for the tracking store: the result is written, and the job must not
    look as if it had failed.
    """
    if launched() or _store_is_waited_for():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _store_is_waited_for() -> bool:
    return any(thread.name == TRACKING_THREAD for thread in threading.enumerate())


def _for_the_user(error: Exception) -> str | None:
    """The message of an error of the project, the file system or the memory; None for any other."""
    if isinstance(error, OSError):
        return explain(error)
    if isinstance(error, UserError):
        return str(error)
    from latent_reasoning.runtime.memory import is_out_of_memory  # torch: seconds to import

    if is_out_of_memory(error):
        return (
            f"out of memory ({first_line(error)}): lower runtime.micro_batch_size or "
            "runtime.evaluation_batch_size, or give the job more memory"
        )
    return None
