"""The stage prepare_data.

    python -m latent_reasoning.data --config FILE.. [--digest DIGEST]

writes `results/{experiment}/data/`: `sft.jsonl`, `rl.jsonl`, `validation.jsonl`, `test.jsonl`, a
`.sha256` beside each, and `summary.json`. After that,

    python -m latent_reasoning.data --config FILE.. --dataset NAME

does the same for one of `data.extra_tests` (its summary is `NAME.summary.json`).
"""

from __future__ import annotations

import time
from pathlib import Path

from latent_reasoning import config
from latent_reasoning.dag.digests import check_digest, science
from latent_reasoning.dag.layout import Layout
from latent_reasoning.data.prepare import (
    Prepared,
    prepare,
    prepare_test_set,
    questions_of,
    write,
)
from latent_reasoning.data.rows import read_rows
from latent_reasoning.runtime.command import parser, run_stage


def main(arguments: list[str] | None = None) -> None:
    """Prepare the rows of one experiment, or of one of its extra test sets."""
    command = parser(__doc__ or "")
    command.add_argument("--dataset", metavar="NAME", help="one of data.extra_tests")
    options = command.parse_args(arguments)
    experiment = config.load(options.config)
    check_digest(experiment, "test_set" if options.dataset else "data", options.digest)
    layout = Layout.of(experiment)
    start = time.monotonic()
    if options.dataset:
        prepared = _test_set(experiment, options.dataset, layout)
        summary = layout.test_set_summary(options.dataset)
    else:
        prepared = prepare(experiment.data, log=_log)
        prepared.summary["science"] = science(experiment, "data")
        summary = layout.data_summary
    write(prepared, layout, summary)
    for name, split in prepared.summary["splits"].items():
        dropped = ", ".join(f"{count} {reason}" for reason, count in split["dropped"].items())
        print(f"{name}: {split['rows']} rows" + (f", dropped {dropped}" if dropped else ""))
    print(f"written to {summary.parent} in {time.monotonic() - start:.1f} s")


def _test_set(experiment: config.Experiment, name: str, layout: Layout) -> Prepared:
    known = experiment.data.extra_tests
    if name not in known:
        raise config.ConfigError(
            f"data.extra_tests: {name!r} is not among {', '.join(known) or 'them: there are none'}"
        )
    trained = [read_rows(file) for file in _training_files(layout)]
    return prepare_test_set(experiment.data, name, questions_of(*trained), log=_log)


def _training_files(layout: Layout) -> list[Path]:
    """The prepared training rows; RL's share is empty if SFT gets everything."""
    files = [layout.data("sft"), layout.data("rl")]
    return [file for file in files if not file.is_file() or file.stat().st_size]


def _log(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    run_stage(main)
