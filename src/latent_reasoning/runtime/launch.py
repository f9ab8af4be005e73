"""A training as several processes on this host: `accelerate launch`, as the stages need it.

A stage whose configuration says `runtime.processes: N` starts itself again N times. A process that
`accelerate launch` or `torchrun` started already is one of several, whatever their number. Around
accelerate's launcher this module

- takes a GPU for each process first (`gpus.py`);
- has the processes meet in a file and talk over the loopback interface: nobody else can join;
- passes SIGTERM, SIGINT and SIGUSR1 on to the processes, which decide themselves when to end;
- ends with their exit code, and without a traceback of its own.

The first process that fails ends the others.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import psutil

from latent_reasoning.config import Runtime
from latent_reasoning.runtime.gpus import take_gpus
from latent_reasoning.runtime.rank import MEETING, launched
from latent_reasoning.runtime.signals import send_to

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def launch_processes(module: str, arguments: Sequence[str] | None, runtime: Runtime) -> None:
    """Run the stage `module` as `runtime.processes` processes and exit with their code.

    Returns at once if only one is asked for, or if this is one of several. `arguments` are those of
    the stage's `main`: None means the command line's.
    """
    if runtime.processes > 1 and not launched():
        _launch(module, sys.argv[1:] if arguments is None else arguments, runtime)


def _launch(module: str, arguments: Sequence[str], runtime: Runtime) -> NoReturn:
    # Seconds to import, and of no use to one process.
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    take_gpus(runtime.device, runtime.processes)
    # The processes talk to one another on this host alone.
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")
    # Otherwise torch's launcher starts a server for them, which listens on every interface.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(runtime.threads))
    # At a signal torch's launcher would end the processes after 30 seconds, in mid-step.
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for number in PASSED_ON:
        signal.signal(number, _pass_on)
    launcher = launch_command_parser().parse_args(
        [
            *("--multi_gpu", "--num_machines", "1", "--machine_rank", "0"),
            *("--num_processes", str(runtime.processes), "--main_process_port", "0"),
            *("--rdzv_backend", "c10d", "--rdzv_conf", "store_type=file"),
            *("--gpu_ids", "all", "--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--module", module, *arguments),
        ]
    )
    with tempfile.TemporaryDirectory(prefix="latent-reasoning-") as folder:
        launcher.rdzv_endpoint = f"{folder}/launcher"
        os.environ[MEETING] = f"{folder}/processes"
        try:
            launch_command(launcher)
        except ChildFailedError as error:
            sys.exit(_exit_code([failure.exitcode for failure in error.failures.values()]))
    sys.exit(0)


def _exit_code(codes: list[int]) -> int:
    """The code of a process that ended by itself, if any: it may have made the rest crash."""
    own = [code for code in codes if code > 0]
    return own[0] if own else 128 - codes[0]


def _pass_on(number: int, frame: FrameType | None) -> None:
    """Pass a signal on to the processes; before there are any, it ends this one."""
    children = psutil.Process().children()
    if not children:
        sys.exit(128 + number)
    send_to(children, number)
