"""Record the golden numbers: `python -m tests.golden [--laptop results/laptop]` (see golden.py)."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.golden import golden
from tests.workflow.workflow_tools import TEST_CONFIG, long_trainings, snakemake


def main() -> int:
    """Run the test experiment and record what it gives; exit code 1 where that is refused."""
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument("--laptop", type=Path, help="a finished laptop experiment of seed 0")
    options = command.parse_args()
    try:
        golden.record("digests", "digests", golden.science_digests())
        if options.laptop:
            golden.record("laptop", "sums", golden.laptop_sums(options.laptop))
        with tempfile.TemporaryDirectory() as folder:
            _run(Path(folder), TEST_CONFIG, "all", "appendix")
            _run(Path(folder), *long_trainings(Path(folder)))
            results = Path(folder) / "results" / "test"
            golden.record("test", "sums", golden.result_sums(results))
            golden.record("curves", "curves", golden.loss_curves(results))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(folder: Path, config: Path, *targets: str) -> None:
    result = snakemake(folder, "--configfile", config, "--", *targets)
    if result.returncode:
        raise ValueError(result.stdout + result.stderr)


if __name__ == "__main__":
    sys.exit(main())
