"""Replay the recorded vectors of the public implementation through the project's own code paths.

    python -m latent_reasoning.conformance DIR

prints one line a case, `PASS name`, `FAIL name: why` or `SKIP name: why`, and last
`N passed, M failed, K skipped`. It exits with 1 on any failure, and when no case is found or a file
of the folder is not understood.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from latent_reasoning.conformance import data, forward, generation, grpo, losses, rewards
from latent_reasoning.conformance.cases import Case, Skip

FOLDERS = {
    "data": (data.cases,),
    "forward": (forward.cases,),
    "losses": (losses.cases,),
    "generation": (generation.cases,),
    "rewards": (rewards.cases,),
    "grpo": (grpo.cases,),
    "bench": (generation.bench_cases,),
}
INFORMATION = {"README.md", "MANIFEST.json"}


def cases(directory: Path) -> Iterator[Case]:
    """Every case of a folder of vectors; a file that nothing reads is a failing case."""
    for path in sorted(directory.iterdir()):
        if path.is_dir() and path.name in FOLDERS:
            for source in FOLDERS[path.name]:
                yield from _guarded(source, path)
        elif path.name not in INFORMATION:
            yield Case(path.name, _not_understood)


def _guarded(source, path: Path) -> Iterator[Case]:
    """Cases of one folder; a file that cannot be read becomes a failing case, not the end."""
    try:
        yield from source(path)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"

        def fail() -> None:
            raise AssertionError(f"the folder could not be read on: {reason}")

        yield Case(f"{path.name}/..", fail)


def _not_understood() -> None:
    raise AssertionError("file not understood: no kind of case has this name")


def run(case: Case, verbose: bool) -> tuple[str, str]:
    """Verdict (PASS, FAIL or SKIP) and reason of one case."""
    try:
        case.run()
    except Skip as skip:
        return "SKIP", str(skip)
    except Exception as error:
        if verbose:
            traceback.print_exc()
        reason = str(error) if isinstance(error, AssertionError) else repr(error)
        return "FAIL", " ".join(reason.split()) or type(error).__name__
    return "PASS", ""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("directory", type=Path, help="folder of vectors")
    arguments.add_argument("--verbose", action="store_true", help="traceback of each failure")
    options = arguments.parse_args()
    if not options.directory.is_dir():
        sys.exit(f"error: {options.directory}: no such folder of vectors")
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    for case in cases(options.directory):
        verdict, reason = run(case, options.verbose)
        counts[verdict] += 1
        print(f"{verdict} {case.name}" + (f": {reason}" if reason else ""), flush=True)
    print(f"{counts['PASS']} passed, {counts['FAIL']} failed, {counts['SKIP']} skipped")
    if counts["FAIL"] or not counts["PASS"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
