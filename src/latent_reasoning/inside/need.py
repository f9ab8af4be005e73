"""C. Need: from which number of steps on the answer is right, and where the model stops.

A row *needs* e steps if its answer is right after e, e + 1, .. up to the n at which it stops by
itself, and not after e - 1: n - e steps are left on the table. A row whose own answer is wrong has
no e.
"""

from __future__ import annotations

import pandas

from latent_reasoning.inside.reasoning import Reasoning
from latent_reasoning.inside.statistics import by_operations, mean_interval, share


def needed_steps(reasoning: Reasoning) -> pandas.DataFrame:
    """`row, id, operations, stops` (n), `needed` (e, <NA> where there is none), a line a row."""
    right = reasoning.forced.pivot(index="row", columns="steps", values="correct")
    needed = []
    for row, own in enumerate(reasoning.steps.tolist()):
        e = own + 1
        while e > 0 and right.loc[row, e - 1]:
            e -= 1
        needed.append(e if e <= own else None)
    return pandas.DataFrame(
        {
            "row": range(len(reasoning.rows)),
            "id": [row.id for row in reasoning.rows],
            "operations": reasoning.operations.numpy(),
            "stops": reasoning.steps.numpy(),
            "needed": pandas.array(needed, dtype="Int64"),
        }
    )


def forced_accuracy(reasoning: Reasoning) -> pandas.DataFrame:
    """Accuracy at every number of steps, over all rows and by K: `operations` (0: all), `steps`."""
    forced = reasoning.forced
    table = forced.assign(operations=reasoning.operations.numpy()[forced["row"].to_numpy()])
    return pandas.DataFrame(
        [
            {"operations": k, "steps": steps, **share(cell["correct"])}
            for k, group in by_operations(table)
            for steps, cell in group.groupby("steps")
        ]
    )


def agreement(needed: pandas.DataFrame) -> dict[str, float]:
    """How the model's own stopping agrees with what its rows need: over the `n` rows with an e, but
    for `steps_mean`, which is over all."""
    known = needed.dropna(subset="needed").astype({"needed": int})
    left = mean_interval(known["stops"] - known["needed"])
    exact = share(known["stops"] == known["needed"])
    several = known["stops"].nunique() > 1 and known["needed"].nunique() > 1
    return {
        "n": len(known),
        "steps_mean": float(needed["stops"].mean()),
        "needed_mean": float(known["needed"].mean()),
        **dict(zip(("left_mean", "left_low", "left_high"), left, strict=True)),
        "exact": exact["accuracy"],
        "exact_low": exact["low"],
        "exact_high": exact["high"],
        "pearson": float(known["stops"].corr(known["needed"])) if several else float("nan"),
    }
