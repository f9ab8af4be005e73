"""Both paths of every workload do the same work, and the summary says how they compare."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.inputs import SFT_LENGTHS, SHAPES, Inputs, build_inputs
from benchmarks.measure import (
    PATHS,
    Figure,
    as_csv,
    as_table,
    peak_memory_mib,
    time_workload,
)
from benchmarks.workloads import WORKLOADS, Workload, build_workloads
from latent_reasoning.data.collation import collate_latent

TINY = replace(
    SHAPES["h128"],
    hidden_size=8,
    intermediate_size=8,
    layers=1,
    heads=2,
    key_value_heads=1,
    rows=4,
    grpo_prompts=2,
)


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return build_inputs(TINY)


def test_generated_batches_have_the_recorded_shapes():
    batch = collate_latent(build_inputs(replace(TINY, rows=32)).sft, 1)
    assert batch["input_ids"].shape == (32, 336)
    assert batch["latent_input_ids"].shape == (32, 328)
    assert int(batch["attention_mask"].sum()) == 4450
    assert int((batch["latent_labels"] != -100).sum()) == 500
    assert int(batch["latent_continue_map"].any(0).sum()) == 8
    assert len(SFT_LENGTHS) == 32


@pytest.mark.parametrize("name", WORKLOADS)
def test_both_paths_count_the_same_real_tokens(inputs, name):
    (workload,) = build_workloads(inputs, [name])
    own, other = workload.naive(0), workload.fast(0)
    if name == "grpo_step":
        # The task draws from its own seed: the samples differ, the prompts do not.
        prompts = 16 * sum(map(len, inputs.grpo))
        assert {prompts < tokens <= prompts + 32 * 40 for tokens in (own, other)} == {True}
    else:
        assert own == other > 0


def test_paths_run_in_turn_and_the_warm_up_is_not_timed():
    order = []

    def run(path: str, repetition: int) -> int:
        order.append((path, repetition))
        return 6

    workload = Workload(
        "work", 3, lambda repetition: run("naive", repetition), lambda r: run("fast", r)
    )
    figures = {figure.metric: figure for figure in time_workload(workload, repetitions=2)}
    assert order == [(path, n) for n in range(3) for path in ("naive", "fast")]
    seconds, low, high = (figures[m] for m in ("seconds", "seconds_min", "seconds_max"))
    assert low.naive <= seconds.naive <= high.naive
    assert figures["examples_per_second"].fast == pytest.approx(3 / seconds.fast)
    assert figures["examples_per_second"].ratio == pytest.approx(seconds.ratio)


def test_the_ratio_says_how_many_times_better_the_fast_path_is():
    figures = [
        Figure("work", "seconds", naive=4.0, fast=0.5),
        Figure("work", "examples_per_second", naive=8.0, fast=64.0, more_is_better=True),
    ]
    rows = list(csv.reader(io.StringIO(as_csv(figures))))
    assert rows == [
        ["workload", "metric", "naive", "fast", "ratio"],
        ["work", "seconds", "4", "0.5", "8"],
        ["work", "examples_per_second", "8", "64", "8"],
    ]
    assert "8.00x" in as_table(figures)


@pytest.fixture
def tiny_command(monkeypatch, tmp_path) -> list[str]:
    """Arguments that run the command in this process on a tiny shape and generated batches."""
    monkeypatch.setitem(SHAPES, "h128", TINY)
    return ["--conformance", str(tmp_path)]


def test_the_command_writes_the_summary(tiny_command, tmp_path):
    output = tmp_path / "summary.csv"
    names = ["cot_sft", "evaluation_adaptive"]
    main([*tiny_command, "--workloads", *names, "--repetitions", "1", "--output", str(output)])
    with output.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert list(dict.fromkeys(row["workload"] for row in rows)) == names
    for row in rows:
        naive, fast, ratio = (float(row[column]) for column in ("naive", "fast", "ratio"))
        better = fast / naive if row["metric"].endswith("_per_second") else naive / fast
        assert ratio == pytest.approx(better, rel=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_a_process_for_memory_runs_one_path_and_prints_its_peak(tiny_command, capsys, path):
    main([*tiny_command, "--memory-of", "latent_sft", path])
    assert float(capsys.readouterr().out) > 100


def test_the_peak_of_memory_stays_when_it_is_freed():
    before = peak_memory_mib()
    block = torch.ones(2**28, dtype=torch.uint8)
    del block
    assert peak_memory_mib() >= before
    assert peak_memory_mib() > 256
