"""Train one model with several processes, a GPU each: `accelerate launch` for the workflow.

    python -m latent_reasoning.launch {model|sft|rl} --config FILE.. [--model NAME --seed N ..]

starts the stage `runtime.processes` times over, or once where that is 1. Around accelerate's
launcher, which may as well be used by itself, this

- takes a GPU for each process first (`gpu_slots.py`);
- hands SIGTERM, SIGINT and SIGUSR1 on to the processes, and leaves it to them when to end;
- ends with their exit code, and without a traceback of its own.

Of processes that fail one at a time, the first ends the others.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import psutil

from latent_reasoning.command import run_stage
from latent_reasoning.config import Experiment, load
from latent_reasoning.gpu_slots import TAKEN, take_gpus

STAGES = ("model", "sft", "rl")
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def main(arguments: list[str] | None = None) -> None:
    """Start a stage as its configuration says."""
    command = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("stage", choices=STAGES)
    command.add_argument("--config", nargs="+", required=True, metavar="FILE")
    command.add_argument("--model", metavar="NAME")
    arguments = sys.argv[1:] if arguments is None else arguments
    options, _ = command.parse_known_args(arguments)
    experiment = load(options.config)
    if experiment.runtime.processes == 1 or not _trains(options, experiment):
        module = f"latent_reasoning.{options.stage}"
        os.execv(sys.executable, [sys.executable, "-m", module, *arguments[1:]])
    start_processes(f"latent_reasoning.{options.stage}", arguments[1:], experiment)


def _trains(options: argparse.Namespace, experiment: Experiment) -> bool:
    """The stage `model` also fetches models, which is no work to share."""
    scratch = options.model is None and experiment.base.source == "scratch"
    return options.stage != "model" or scratch


def start_processes(module: str, arguments: list[str], experiment: Experiment) -> NoReturn:
    """Run `module` as several processes on this host and exit with their code."""
    # Seconds to import, and of no use to one process.
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    runtime = experiment.runtime
    gpus = take_gpus(runtime.device, runtime.processes)
    os.environ |= {TAKEN: ",".join(gpus)}
    # The processes talk to one another on this host alone.
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")
    os.environ.setdefault("OMP_NUM_THREADS", str(runtime.threads))
    # Its own answer to a signal is to end the processes after 30 seconds, in the middle of a step.
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for number in PASSED_ON:
        signal.signal(number, _pass_on)
    launcher = launch_command_parser().parse_args(
        [
            *("--multi_gpu", "--num_machines", "1", "--machine_rank", "0"),
            *("--num_processes", str(runtime.processes), "--main_process_port", "0"),
            *("--gpu_ids", "all", "--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--module", module, *arguments),
        ]
    )
    try:
        launch_command(launcher)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        code = failure.exitcode
        sys.exit(code if code > 0 else 128 - code)
    sys.exit(0)


def _pass_on(number: int, frame: FrameType | None) -> None:
    """Hand a signal to the processes; before there are any it ends this one."""
    children = psutil.Process().children()
    if not children:
        sys.exit(128 + number)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(number)


if __name__ == "__main__":
    run_stage(main)
