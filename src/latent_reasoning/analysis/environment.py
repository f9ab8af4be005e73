"""Where an experiment ran: machine, versions, commit, and the time its jobs took."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import pandas

from latent_reasoning.config import Experiment, digest, dump
from latent_reasoning.dag.layout import Layout
from latent_reasoning.runtime.tracking import git_commit

LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "numpy", "pandas", "snakemake")


def environment(experiment: Experiment) -> dict[str, str]:
    """Facts of this machine and this code, by name."""
    return {
        "Commit": git_commit(),
        "Configuration digest": digest(dump(experiment)),
        "System": f"{platform.system()} {platform.release()} ({platform.machine()})",
        "Processor": f"{_processor()}, {_cores()} cores for this process",
        "Python": platform.python_version(),
        **{name: version for name in LIBRARIES if (version := _version(name))},
    }


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _cores() -> int:
    """Cores that this process may use; macOS, which binds no process to cores, tells them all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def job_times(layout: Layout) -> pandas.DataFrame:
    """`job, seconds, megabytes` (peak memory) of each finished job, as Snakemake measured it.

    Empty where the stages ran by hand. For a job that was killed and resumed, the last part counts.
    """
    rows = []
    for path in sorted(layout.benchmarks.rglob("*.tsv")):
        measured = pandas.read_csv(path, sep="\t", na_values="-").iloc[-1]
        name = str(path.relative_to(layout.benchmarks).with_suffix(""))
        rows.append({"job": name, "seconds": measured["s"], "megabytes": measured["max_rss"]})
    return pandas.DataFrame(rows, columns=["job", "seconds", "megabytes"])
