"""How the cost grows is measured along every axis, written as a table and drawn."""

from __future__ import annotations

import csv
from dataclasses import replace

from benchmarks import scaling
from benchmarks.measure import Measurement
from benchmarks.scaling import AXES, BASE, main

TINY = replace(
    BASE,
    hidden_size=8,
    intermediate_size=8,
    layers=1,
    heads=2,
    key_value_heads=1,
    rows=2,
    question=6,
    grpo_prompts=1,
    group_size=2,
)


def test_the_axes_vary_one_thing_each_through_the_same_base():
    for axes in AXES.values():
        for name, axis in axes.items():
            shapes = [axis.of(BASE, value) for value in axis.values]
            assert BASE in shapes, name
            assert len(set(shapes)) == len(axis.values), name
    twelve = AXES["grpo_step"]["latent_steps"].of(BASE, 12)
    assert (twelve.steps, twelve.sampled_steps, twelve.rollout_tokens) == (12, 12, 22)


def test_the_command_writes_and_draws_every_point(monkeypatch, tmp_path):
    measured: list[str] = []

    def memory(workload: str, build: object) -> Measurement:
        measured.append(workload)
        return Measurement(workload, "peak_memory_mib", 400.0, 300.0)

    def axis(workload: str, name: str, *values: int) -> scaling.Axis:
        return replace(AXES[workload][name], values=values)

    wanted = {
        "latent_sft": {"latent_steps": (0, 6), "batch": (2, 4)},
        "grpo_step": {"latent_steps": (6,), "group_size": (2, 3)},
    }
    axes = {
        workload: {name: axis(workload, name, *values) for name, values in named.items()}
        for workload, named in wanted.items()
    }
    monkeypatch.setattr(scaling, "BASE", TINY)
    monkeypatch.setattr(scaling, "AXES", axes)
    monkeypatch.setattr(scaling, "measure_memory", memory)
    main(["--repetitions", "1", "--output", str(tmp_path / "scaling.csv")])
    with (tmp_path / "scaling.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["workload", "axis", "value", "metric", "naive", "fast", "ratio"]
    assert [(row["workload"], row["axis"], row["value"]) for row in rows[::2]] == [
        (workload, name, str(value))
        for workload, named in wanted.items()
        for name, values in named.items()
        for value in values
    ]
    assert {row["metric"] for row in rows} == {"seconds", "peak_memory_mib"}
    # The base is a point of every axis, and measured once.
    assert measured == ["latent_sft"] * 3 + ["grpo_step"] * 2
    assert rows[2]["naive"] == rows[4]["naive"]
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    assert (tmp_path / "scaling.svg").stat().st_size > 10_000
