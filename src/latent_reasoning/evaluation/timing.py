"""How long a row takes a model of an experiment, alone and in the evaluation's batches.

    python -m latent_reasoning.evaluation.timing --config FILE.. --model NAME --seed N

writes `results/{experiment}/timings/{model}.json`: `milliseconds_alone` and
`milliseconds_in_batches` a row, of `rows` rows of the first data set and batches of `batch_size`.
The workflow runs nothing beside it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from latent_reasoning.config import load
from latent_reasoning.dag.digests import check_digest
from latent_reasoning.dag.layout import Layout
from latent_reasoning.data.rows import Row
from latent_reasoning.evaluation.evaluator import predict
from latent_reasoning.evaluation.opened import Opened, open_model
from latent_reasoning.runtime.command import parser, run_stage
from latent_reasoning.runtime.device import autocast
from latent_reasoning.runtime.files import write_json
from latent_reasoning.runtime.parallel import OneProcess

ROWS_ALONE = 50
REPEATS = 3
"""Each pass is made this often; the fastest counts, for other work only slows it."""


def main(arguments: list[str] | None = None) -> None:
    """Time a model and write what a row took."""
    options = parser(__doc__, model=True).parse_args(arguments)
    experiment = load(options.config)
    check_digest(experiment, "evaluation", options.digest, options.model)
    dataset = experiment.evaluation.datasets[0]
    measured = time_rows(open_model(experiment, options.model, options.seed, dataset))
    write_json(Layout.of(experiment).timing(options.model), measured)
    print(f"{options.model}: {measured}")


def time_rows(opened: Opened) -> dict[str, float]:
    """The milliseconds of a row, of the first rows alone and of one batch or more together."""
    batch = opened.settings.batch_size
    alone, together = opened.rows[:ROWS_ALONE], opened.rows[: max(batch, ROWS_ALONE)]
    opened.model.eval()
    with autocast(opened.model.device, opened.precision):
        return {
            "milliseconds_alone": _milliseconds(opened, alone, 1),
            "milliseconds_in_batches": _milliseconds(opened, together, batch),
            "rows": len(together),
            "rows_alone": len(alone),
            "batch_size": batch,
        }


def _milliseconds(opened: Opened, rows: Sequence[Row], batch_size: int) -> float:
    """The least milliseconds a row of `REPEATS` passes, after one batch that warms up."""
    settings = replace(opened.settings, batch_size=batch_size)
    predict(opened.model, opened.tokenizer, rows[:batch_size], settings, OneProcess())
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        predict(opened.model, opened.tokenizer, rows, settings, OneProcess())
        seconds.append(time.perf_counter() - start)
    return 1e3 * min(seconds) / len(rows)


if __name__ == "__main__":
    run_stage(main)
