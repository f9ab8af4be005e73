"""A stage ends with the Snakemake that started it, also where that one was killed outright.

Otherwise the stage would go on alone, and the next Snakemake would start it a second time beside
itself, in the same folders.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading

VARIABLE = "LATENT_REASONING_WORKFLOW"
"""The process id of Snakemake, set by the rules; by hand there is none."""


def end_with_workflow() -> None:
    """From now on send this process SIGTERM once its Snakemake is gone (on Linux).

    A training answers SIGTERM with a checkpoint; every other stage just ends.
    """
    workflow = os.environ.get(VARIABLE, "")
    # In a process namespace of its own, a shell's parent is process 0 or 1, which stays.
    if workflow.isdecimal() and int(workflow) > 1 and hasattr(os, "pidfd_open"):
        threading.Thread(target=_watch, args=(int(workflow),), daemon=True).start()


def _watch(workflow: int) -> None:
    try:
        descriptor = os.pidfd_open(workflow)
    except ProcessLookupError:
        pass  # it went while this process was still importing
    except OSError:
        return  # not allowed or not known here
    else:
        select.select([descriptor], [], [])
    print("Snakemake is gone: ending too; start it again to go on", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
