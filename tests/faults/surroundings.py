"""What goes wrong around a run: disk, tracking store, clock, a second Snakemake."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.faults.cases import Case
from tests.faults.damage import check_refusal, check_results, remove
from tests.faults.reference import Reference
from tests.faults.workbench import TRACEBACK, Started, Workbench

DAY, DAYS_AHEAD = 86400, 400
BEFORE, DURING = "before the run", "once a job runs"


def model_of(bench: Workbench) -> str:
    """A latent model of the experiment."""
    return next(n for n, e in bench.experiment["models"].items() if e["stage"] == "latent_sft")


def evaluation_of(bench: Workbench) -> str:
    """The result of evaluating that model."""
    return f"evaluations/{model_of(bench)}/seed-0/test/summary.json"


def forget(bench: Workbench) -> str:
    """Remove that model with its checkpoints, so that it is trained again; returns its target."""
    model = model_of(bench)
    remove(bench.results / "models" / model)
    remove(bench.results / "checkpoints" / model)
    return f"models/{model}/seed-0"


def wait_for_a_job(bench: Workbench, workflow: Started) -> None:
    """Until a stage runs, or Snakemake has ended."""
    while workflow.runs and not any(bench.jobs(workflow)):
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------ disk


def why_no_mounts() -> str:
    """Why this process may not mount anything; nothing where it may."""
    tried = subprocess.run(
        ["unshare", "--mount", "true"], capture_output=True, text=True, check=False
    )
    return tried.stderr.strip() if tried.returncode else ""


@contextlib.contextmanager
def mounted(folder: Path, *mounts: list[str]) -> Iterator[None]:
    """Mounts on `folder`, which is free again at the end."""
    done = 0
    try:
        for arguments in mounts:
            subprocess.run(["mount", *arguments, str(folder)], check=True, capture_output=True)
            done += "remount" not in " ".join(arguments)
        yield
    finally:
        for _ in range(done):
            subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)


def full_disk(
    bench: Workbench, reference: Reference, randomness: random.Random, *, kilobytes: int, when: str
) -> Case:
    """A tmpfs that is full before Snakemake starts or while a training does, and then is not."""
    case = Case("full disk", "latent_sft", f"{kilobytes} KiB left {when}")
    if reason := why_no_mounts():
        case.skipped = f"no mounts here: {reason}"
        return case
    target = forget(bench)
    aside = bench.root.rename(bench.folder / "aside")
    bench.root.mkdir()
    with mounted(bench.root, ["-t", "tmpfs", "-o", "size=64m", "tmpfs"]):
        shutil.copytree(aside, bench.root, symlinks=True, dirs_exist_ok=True)
        if when == BEFORE:
            fill(bench.root / "filler", kilobytes)
        workflow = bench.start("--", bench.path_of(target))
        if when == DURING:
            wait_for_a_job(bench, workflow)
            fill(bench.root / "filler", kilobytes)
        run = bench.finish(workflow)
        check_refusal(case, run, "No space left on device", str(bench.root.name), "free some space")
        case.problems += reference.problems(bench.results)
        (bench.root / "filler").unlink()
        check_results(case, bench, reference, bench.make(target), target)
    return case.finish()


def fill(file: Path, kilobytes: int) -> None:
    """Write until the disk is full, then give back `kilobytes`."""
    with file.open("wb", buffering=0) as stream:
        with contextlib.suppress(OSError):
            while stream.write(bytes(4096)) == 4096:
                pass
        stream.truncate(max(0, stream.tell() - 1024 * kilobytes))


def read_only(bench: Workbench, reference: Reference, randomness: random.Random) -> Case:
    """A results folder that is read-only, and then is not."""
    case = Case("read-only results", "evaluate", "bind mount, remounted read-only")
    if reason := why_no_mounts():
        case.skipped = f"no mounts here: {reason}"
        return case
    target = evaluation_of(bench)
    remove(bench.results / target)
    with mounted(bench.root, ["--bind", str(bench.root)], ["-o", "remount,ro,bind"]):
        run = bench.make(target)
        check_refusal(case, run, "Read-only file system", "results", "make it writable")
    check_results(case, bench, reference, bench.make(target), target)
    return case.finish()


# -------------------------------------------------------------------------------- two Snakemakes


def two_at_once(bench: Workbench, reference: Reference, randomness: random.Random) -> Case:
    """A second Snakemake in the same folder is refused, and the first goes its way."""
    target = evaluation_of(bench)
    case = Case("two Snakemakes at once", "evaluate", target)
    remove(bench.results / target)
    first = bench.start("--", bench.path_of(target))
    wait_for_a_job(bench, first)
    run = bench.make(target)
    case.check(run.returncode != 0, "the second was not refused")
    case.check("lock" in run.output, "the second does not speak of a lock")
    case.check(TRACEBACK not in run.output, "a traceback in the second's output")
    case.check(bench.finish(first).returncode == 0, "the first failed")
    check_results(case, bench, reference, bench.make(target), target)
    return case.finish()


# -------------------------------------------------------------------------------------- tracking


def tracking(
    bench: Workbench, reference: Reference, randomness: random.Random, *, trouble: str
) -> Case:
    """A training continues, to the same weights, without the store it reports to."""
    case = Case("tracking store", "latent_sft", trouble)
    target = forget(bench)
    with STORES[trouble](bench):
        run = bench.make(target)
    log = bench.results / "logs" / "latent_sft" / model_of(bench) / "seed-0.log"
    case.check("MLflow cannot be reached" in log.read_text("utf-8"), "no warning in the log")
    check_results(case, bench, reference, run, target)
    return case.finish()


@contextlib.contextmanager
def server(bench: Workbench, listens: bool) -> Iterator[None]:
    """A store whose port refuses, or takes the connection and never answers."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        if listens:
            port.listen()
        bench.surroundings["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{port.getsockname()[1]}"
        yield


@contextlib.contextmanager
def locked(bench: Workbench) -> Iterator[None]:
    with contextlib.closing(sqlite3.connect(bench.root / "mlflow.db")) as store:
        store.execute("begin exclusive")
        yield


@contextlib.contextmanager
def garbage(bench: Workbench) -> Iterator[None]:
    (bench.root / "mlflow.db").write_bytes(b"this is no database\n" * 500)
    yield


STORES = {
    "server that refuses": partial(server, listens=False),
    "locked sqlite file": locked,
    "server that never answers": partial(server, listens=True),
    "sqlite file overwritten": garbage,
}


# ----------------------------------------------------------------------------------------- clock


def clock_was_ahead(bench: Workbench, reference: Reference, randomness: random.Random) -> Case:
    """Everything so far was made while the clock was ahead; now it has jumped back.

    Done by time stamps: under libfaketime Snakemake itself fails or hangs, whatever the workflow.
    """
    target = evaluation_of(bench)
    case = Case("clock", "evaluate", f"all files made {DAYS_AHEAD:+d} days from now")
    remove(bench.results / target)
    for path in [bench.results, *bench.results.rglob("*")]:
        times = path.stat()
        os.utime(path, (times.st_atime + DAYS_AHEAD * DAY, times.st_mtime + DAYS_AHEAD * DAY))
    check_results(case, bench, reference, bench.make(target), target)
    return case.finish()
