"""The stage prepare_data.

    python -m latent_reasoning.data --config FILE.. [--digest DIGEST]

writes `results/{experiment}/data/`: `sft.jsonl`, `rl.jsonl`, `validation.jsonl`, `test.jsonl`, one
file for each of `data.extra_tests`, a `.sha256` beside each, and `summary.json`.
"""

from __future__ import annotations

import time

from latent_reasoning import config
from latent_reasoning.command import parser, run_stage
from latent_reasoning.data.prepare import prepare, write
from latent_reasoning.paths import Layout


def main(arguments: list[str] | None = None) -> None:
    """Prepare the rows of one experiment."""
    options = parser(__doc__ or "").parse_args(arguments)
    experiment = config.load(options.config)
    config.check_digest(experiment, "data", options.digest)
    start = time.monotonic()
    prepared = prepare(experiment.data, log=lambda line: print(line, flush=True))
    layout = Layout.of(experiment)
    write(prepared, layout)
    for name, split in prepared.summary["splits"].items():
        dropped = ", ".join(f"{count} {reason}" for reason, count in split["dropped"].items())
        print(f"{name}: {split['rows']} rows" + (f", dropped {dropped}" if dropped else ""))
    print(f"written to {layout.data_summary.parent} in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    run_stage(main)
