"""What an undisturbed run leaves, and how another run's files differ from it.

Weights, rows, predictions and tables are compared to the bit. A few files hold times or drawing
ids; of those it is compared what the times leave, or that they are whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas

NOT_RESULTS = ("checkpoints", "logs", "benchmarks", "config.yaml", "tracking.ready")
DIGESTS = "SHA256SUMS"
"""Beside the results: state, notes and times."""
WHOLE_AT_THE_END = {".svg": b"</svg>", ".html": b"</html>", "compute.png": b"IEND\xaeB`\x82"}
"""Files with times or random ids in them, which are whole where they end like this."""


def final_files(results: Path) -> Iterator[Path]:
    """Every result under its final name; temporary names start with a dot."""
    for path in sorted(results.rglob("*")):
        parts = path.relative_to(results).parts
        hidden = any(part.startswith(".") for part in parts)
        note = parts[0] in NOT_RESULTS or path.name == DIGESTS
        if not note and not hidden and path.is_file():
            yield path


def content(file: Path) -> str:
    """What of a file is the same in every run."""
    data = file.read_bytes()
    end = next((end for name, end in WHOLE_AT_THE_END.items() if file.name.endswith(name)), None)
    if end is not None:
        return "whole" if data.rstrip().endswith(end) else "cut off"
    if file.name == "compute.csv":
        try:
            data = pandas.read_csv(file).drop(columns="milliseconds").to_csv().encode()
        except (ValueError, KeyError):
            return "no table"
    if file.name == "summary.json":
        try:
            values = json.loads(data)
        except ValueError:
            return "no JSON"
        data = json.dumps({k: v for k, v in values.items() if k != "seconds"}).encode()
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Reference:
    """The content of every result by its path below the experiment's folder."""

    files: dict[str, str]

    @classmethod
    def of(cls, results: Path) -> Reference:
        return cls({str(f.relative_to(results)): content(f) for f in final_files(results)})

    def problems(self, results: Path, *, complete: bool = False) -> list[str]:
        """Results that differ, belong to none, or are missing from a folder that has its name.

        `complete` asks for every result; otherwise what is not there yet is no problem.
        """
        found: dict[str, str] = {}
        for file in final_files(results):
            try:
                found[str(file.relative_to(results))] = content(file)
            except FileNotFoundError:  # Snakemake removed it just now
                continue
        problems = [
            f"{name}: {'differs' if name in self.files else 'is no result'}"
            for name, value in found.items()
            if self.files.get(name) != value
        ]
        for name in self.files.keys() - found.keys():
            folder = model_folder(name)
            if complete or (folder and (results / folder).is_dir()):
                problems.append(f"{name}: missing")
        return sorted(problems)


def model_folder(name: str) -> str | None:
    """The model folder that a result is part of: such a folder has its name only when whole."""
    parts = Path(name).parts
    if parts[0] == "models":
        return "/".join(parts[:3])
    return "/".join(parts[:2]) if parts[0] == "base" else None


def leftovers(results: Path) -> list[Path]:
    """Temporary files and folders that nobody will finish."""
    return [path for path in results.rglob(".*") if ".tmp" in path.name]
