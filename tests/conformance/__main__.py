"""Replay recorded vectors of the public implementation through the project's own code paths.

    python -m tests.conformance DIR

prints one line a case, `PASS name`, `FAIL name: why` or `SKIP name: why`, and last
`N passed, M failed, K skipped`. It exits with 1 on any failure, and when no case is found or a
file, a key or an array of the folder is not understood.
"""

from __future__ import annotations

import argparse
import re
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import torch

from tests.conformance import data, forward, generation, grpo, losses, rewards
from tests.conformance.checks import Check, Checks, compare, guarded, read
from tests.conformance.recording import Skip, Vectors

AREAS = (data, forward, generation, grpo, losses, rewards)
READERS = {pattern: readers for area in AREAS for pattern, readers in area.READERS.items()}
"""By the pattern of files: what reads them, or what reads their keys."""
INFORMATION = {area.__name__.rpartition(".")[2]: area.INFORMATION for area in AREAS}
"""By the folder's name: keys that describe the run or repeat other values, and need no reader."""
UNNAMED = r"(^data/[^/]+)/expected\.json|(/length_rewards)/cases(?=/)"
"""What the names of cases leave out."""
OTHER_FILES = r"README\.md|MANIFEST\.json|bench/(sft|smol|grpo)_\w+\.npz"
"""Files that hold no case: descriptions, and batches that benchmarks run on."""


def replay(folder: Path, verbose: bool = False) -> Iterator[tuple[str, str, str]]:
    """Name, verdict (PASS, FAIL or SKIP) and reason of each case of a folder.

    `verbose` prints the traceback of each error.
    """
    for name, checks in groupby(_checks(Vectors(folder)), lambda check: check.name):
        yield re.sub(UNNAMED, r"\1\2", name), *_verdict(checks, verbose)


def _checks(vectors: Vectors) -> Checks:
    """Those of every area, and last what no reader has read: files, keys and arrays."""
    skipped = set()
    for pattern, readers in READERS.items():
        for name in vectors.names(pattern):
            for check in guarded(name, read, vectors, name, readers):
                if isinstance(check.actual, Skip):
                    skipped.add(name.partition("/")[0])
                yield check
    for name in vectors.unread(INFORMATION, OTHER_FILES):
        why: Exception = ValueError("not understood: nothing reads it")
        if name.partition("/")[0] in skipped:
            why = Skip("nothing has read it, as cases of its folder were skipped")
        yield Check(name, why, None)


def _verdict(checks: Iterable[Check], verbose: bool) -> tuple[str, str]:
    """The first failure of a case, else the first reason to skip it."""
    failures, skips = [], []
    for check in checks:
        if isinstance(check.actual, Skip):
            skips.append(str(check.actual))
        elif isinstance(check.actual, Exception):
            is_plain = isinstance(check.actual, ValueError)
            failures.append(str(check.actual) if is_plain else repr(check.actual))
            if verbose:
                traceback.print_exception(check.actual)
        elif reason := compare(check.actual, check.expected, check.tolerance, check.what):
            failures.append(reason)
    verdict = "FAIL" if failures else "SKIP" if skips else "PASS"
    return verdict, " ".join(next(iter(failures + skips), "").split())


def main() -> None:
    """Print the verdicts."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("directory", type=Path, help="folder of vectors")
    arguments.add_argument("--verbose", action="store_true", help="traceback of each error")
    options = arguments.parse_args()
    if not options.directory.is_dir():
        sys.exit(f"error: {options.directory}: no such folder of vectors")
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    for name, verdict, reason in replay(options.directory, options.verbose):
        counts[verdict] += 1
        print(f"{verdict} {name}" + (f": {reason}" if reason else ""), flush=True)
    print(f"{counts['PASS']} passed, {counts['FAIL']} failed, {counts['SKIP']} skipped")
    if counts["FAIL"] or not counts["PASS"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
