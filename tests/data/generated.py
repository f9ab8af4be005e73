"""Rows of the generated problems, as the stages read them."""

from __future__ import annotations

from latent_reasoning.data.dial.problems import generate_splits
from latent_reasoning.data.rows import Row


def generated_rows(count: int, split: str = "train") -> list[Row]:
    """Problems of 1 to 3 steps on a dial of 7, with ids of `split`."""
    made = generate_splits(count, 0, 0, max_steps=3, step_weights=[1] * 3, modulus=7, seed=0)
    return [
        Row(f"{split}-{i}", row["question"], tuple(row["steps"]), row["answer"])
        for i, row in enumerate(made["train"])
    ]
