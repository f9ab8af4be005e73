"""How the cost grows is measured along every axis, written as a table and drawn."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest

from benchmarks import scaling
from benchmarks.figures import draw_scaling, draw_summary
from benchmarks.inputs import SHAPES, Shape
from benchmarks.measure import Figure
from benchmarks.scaling import AXES, BASE, Axis, Point, main
from benchmarks.workloads import WORKLOADS

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


def _same(shape: Shape, value: int) -> Shape:
    return shape


def test_the_axes_vary_one_thing_each_through_the_same_base():
    for axes in AXES.values():
        for name, axis in axes.items():
            shapes = [axis.of(BASE, value) for value in axis.values]
            assert BASE in shapes, name
            assert len(set(shapes)) == len(axis.values), name


def test_twelve_steps_are_learned_and_sampled_before_an_answer_of_nine_tokens():
    shape = AXES["grpo_step"]["latent_steps"].of(BASE, 12)
    assert (shape.steps, shape.sampled_steps, shape.rollout_tokens) == (12, 12, 22)


def test_the_width_keeps_the_size_of_the_heads():
    shape = AXES["latent_sft"]["hidden_size"].of(BASE, 128)
    assert shape == BASE
    assert (shape.heads, shape.key_value_heads) == (4, 2)
    assert shape.intermediate_size == SHAPES["h128"].intermediate_size


def test_the_command_writes_and_draws_every_point(monkeypatch, tmp_path):
    measured: list[str] = []

    def memory(workload: str, build: object) -> Figure:
        measured.append(workload)
        return Figure(workload, "peak_memory_mib", 400.0, 300.0)

    steps = replace(AXES["latent_sft"]["latent_steps"], values=(0, 6))
    batch = Axis((2, 4), AXES["latent_sft"]["batch"].of)
    group = Axis((2, 3), AXES["grpo_step"]["group_size"].of)
    axes = {
        "latent_sft": {"latent_steps": steps, "batch": batch},
        "grpo_step": {"group_size": group, "hidden_size": Axis((8,), _same)},
    }
    monkeypatch.setattr(scaling, "BASE", TINY)
    monkeypatch.setattr(scaling, "AXES", axes)
    monkeypatch.setattr(scaling, "memory_figure", memory)
    main(["--repetitions", "1", "--output", str(tmp_path / "scaling.csv")])
    with (tmp_path / "scaling.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["workload", "axis", "value", "metric", "naive", "fast", "ratio"]
    points = [(row["workload"], row["axis"], row["value"]) for row in rows[::2]]
    assert points == [
        ("latent_sft", "latent_steps", "0"),
        ("latent_sft", "latent_steps", "6"),
        ("latent_sft", "batch", "2"),
        ("latent_sft", "batch", "4"),
        ("grpo_step", "group_size", "2"),
        ("grpo_step", "group_size", "3"),
        ("grpo_step", "hidden_size", "8"),
    ]
    assert {row["metric"] for row in rows} == {"seconds", "peak_memory_mib"}
    # The base is one of the points of every axis, and measured once.
    assert measured == ["latent_sft"] * 3 + ["grpo_step"] * 2
    assert rows[2]["naive"] == rows[4]["naive"]
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    assert (tmp_path / "scaling.svg").stat().st_size > 10_000


def test_the_drawing_has_a_panel_for_each_axis_with_the_ratios_at_its_ends():
    points = [
        Point(axis, value, Figure(workload, "seconds", 8.0 * value, 2.0 * value))
        for workload, axes in AXES.items()
        for axis in axes
        for value in (1, 2)
    ]
    panels = draw_scaling(points).axes
    assert [axes.get_xlabel() for axes in panels[:4]] == [
        "latent steps",
        "batch",
        "question tokens",
        "hidden size",
    ]
    for axes in panels:
        assert [text.get_text() for text in axes.texts] == ["4.0×", "4.0×"]
        assert [line.get_ydata().tolist() for line in axes.lines] == [[8, 16], [2, 4]]


def test_the_summary_is_drawn_with_a_bar_for_each_ratio():
    figures = [Figure(name, "seconds", 6.0, 2.0) for name in WORKLOADS]
    figures += [Figure("latent_sft", "gflop", 5.0, 1.0), Figure("latent_sft", "seconds_min", 1, 1)]
    (axes,) = draw_summary(figures).axes
    assert sorted(text.get_text() for text in axes.texts) == ["3.0×"] * 8 + ["5.0×"]
    assert len(axes.get_yticklabels()) == 8
    widths = [patch.get_width() for patch in axes.patches]
    assert widths == pytest.approx([3.0] * 8 + [5.0])
