"""Both paths of every workload do the same work, and the summary says how they compare."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import DEFAULT_WORKLOADS, main
from benchmarks.inputs import SFT_LENGTHS, SHAPES, Inputs, build_inputs, trained_inputs
from benchmarks.measure import (
    PATHS,
    Figure,
    as_csv,
    as_table,
    flop_figures,
    peak_memory_mib,
    peak_of,
    time_workload,
)
from benchmarks.workloads import WORKLOADS, Work, Workload, build_workloads
from latent_reasoning.data.collation import collate_latent
from latent_reasoning.data.rows import Row, row_lines
from latent_reasoning.model.folder import save
from latent_reasoning.runtime.files import write_text_atomically

TINY = replace(
    SHAPES["h128"],
    hidden_size=8,
    intermediate_size=8,
    layers=1,
    heads=2,
    key_value_heads=1,
    rows=4,
    grpo_prompts=2,
    rollout_tokens=12,
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


def test_questions_and_steps_are_as_many_as_asked_for():
    shape = replace(TINY, rows=64, question=40, steps=3)
    inputs = build_inputs(shape)
    lengths = [row.teacher.question_length for row in inputs.sft]
    assert len(lengths) == len(inputs.adaptive) == 64
    assert sum(lengths) / 64 == pytest.approx(40, abs=0.5)
    assert max(lengths) > 2 * 40
    assert sum(map(len, inputs.adaptive)) / 64 == pytest.approx(40, abs=0.5)
    assert {int(row.student.continue_map.sum()) for row in inputs.sft} == {3}


@pytest.mark.parametrize("name", WORKLOADS)
def test_both_paths_read_and_write_the_same(inputs, name):
    (workload,) = build_workloads(inputs, [name])
    own, other = workload.naive(1), workload.fast(1)
    assert own.tokens == other.tokens > 0
    assert list(map(list, own.read)) == list(map(list, other.read))
    assert list(map(list, own.written)) == list(map(list, other.written))


@pytest.mark.parametrize("steps", [0, 4])
def test_every_sample_takes_the_steps_that_are_asked_for(steps):
    inputs = build_inputs(replace(TINY, sampled_steps=steps, group_size=3))
    (workload,) = build_workloads(inputs, ["grpo_step"])
    special = inputs.model.settings
    expected = [special.continue_id] * steps + [special.stop_id]
    for path in PATHS:
        written = getattr(workload, path)(0).written
        assert [list(ids[: steps + 1]) for ids in written] == [expected] * 6


def test_a_whole_evaluation_is_the_adaptive_one_and_the_forced_curve(inputs):
    (workload,) = build_workloads(inputs, ["evaluation"])
    work, special = workload.fast(0), inputs.model.settings
    assert workload.examples == len(work.written) == 12 * 4
    assert work.read[:4] == inputs.adaptive
    forced_steps = [list(ids).count(special.continue_id) for ids in work.read[4:]]
    assert forced_steps == [steps for steps in range(11) for _ in range(4)]
    assert work.read[4 + 4 * 6] == inputs.forced[0]


def test_paths_run_in_turn_and_the_warm_up_is_not_timed():
    order = []

    def run(path: str, repetition: int) -> Work:
        order.append((path, repetition))
        return Work([[1, 2], [3, 4]], [[5], [6]])

    workload = Workload(
        "work",
        3,
        lambda repetition: run("naive", repetition),
        lambda repetition: run("fast", repetition),
        lambda work: 1,
    )
    figures = {figure.metric: figure for figure in time_workload(workload, repetitions=2)}
    assert order == [(path, n) for n in range(3) for path in ("naive", "fast")]
    seconds, low, high = (figures[m] for m in ("seconds", "seconds_min", "seconds_max"))
    assert low.naive <= seconds.naive <= high.naive
    assert figures["examples_per_second"].fast == pytest.approx(3 / seconds.fast)
    assert figures["examples_per_second"].ratio == pytest.approx(seconds.ratio)


def test_flops_are_counted_beside_the_minimum_and_the_answers_compared():
    square = torch.ones(10, 10)

    def run(products: int, written: list[list[int]]) -> Work:
        for _ in range(products):
            square @ square
        return Work([[1], [1]], written)

    workload = Workload(
        "work",
        2,
        lambda repetition: run(4, [[5], [6]]),
        lambda repetition: run(2, [[5], [7]]),
        lambda work: 1000,
    )
    seconds = Figure("work", "seconds", naive=4.0, fast=1.0)
    figures = flop_figures(workload, 0, seconds, peak_tflops=1e-6)
    assert {f.metric: (f.naive, f.fast, f.ratio) for f in figures} == {
        "gflop": pytest.approx((8e-6, 4e-6, 2)),
        "gflop_over_minimum": pytest.approx((8, 4, 2)),
        "gflop_per_second": pytest.approx((2e-6, 4e-6, 2)),
        "share_of_peak": pytest.approx((2e-3, 4e-3, 2)),
        "equal_answers": (2, 1, 0.5),
    }


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
        more_is_better = row["metric"].endswith("_per_second") or row["metric"] == "equal_answers"
        better = fast / naive if more_is_better else naive / fast
        assert ratio == pytest.approx(better, rel=1e-4)


def test_a_process_of_its_own_says_its_peak():
    # It does not hold what this process holds.
    block = torch.ones(2**30, dtype=torch.uint8)
    build = partial(build_inputs, TINY)
    assert 100 < peak_of("latent_sft", "fast", build) < peak_memory_mib() - 700
    del block


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> list[str]:
    """Options that name a latent model's folder, and prepared rows."""
    folder = tmp_path_factory.mktemp("trained")
    model = build_inputs(TINY)
    save(model.model, model.tokenizer, folder / "model", card={"prompt_prefix": "w3 "})
    rows = [Row(f"test-{i}", " ".join(["w5"] * (i + 1)), None, str(i)) for i in range(5)]
    write_text_atomically(folder / "rows.jsonl", "".join(row_lines(rows)))
    return ["--model", str(folder / "model"), "--rows", str(folder / "rows.jsonl")]


def test_a_trained_model_is_measured_on_its_own_rows(trained, tmp_path):
    output = tmp_path / "trained.csv"
    few = ["--repetitions", "1", "--batch-size", "2", "--max-new-tokens", "6"]
    main([*trained, *few, "--output", str(output)])
    with output.open(encoding="utf-8") as stream:
        rows = {(row["workload"], row["metric"]): row for row in csv.DictReader(stream)}
    assert (tmp_path / "trained.png").stat().st_size > 10_000
    assert list(dict.fromkeys(name for name, _ in rows)) == DEFAULT_WORKLOADS["trained"]
    equal = rows["evaluation", "equal_answers"]
    assert (equal["naive"], equal["fast"]) == ("60", "60")
    assert float(rows["evaluation", "gflop_over_minimum"]["fast"]) >= 1
    assert float(rows["grpo_step", "peak_memory_mib"]["fast"]) > 100


def test_a_trained_models_prompts_begin_as_its_card_says(trained):
    inputs = trained_inputs(Path(trained[1]), Path(trained[3]), batch_size=2, max_new_tokens=6)
    start = inputs.model.settings.start_id
    assert inputs.adaptive[:2] == [[3, 5, start], [3, 5, 5, start]]
    assert [prompt.label for prompt in inputs.grpo] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "folder"], "--model and --rows go together"),
        (["--model", "a", "--rows", "b", "--workloads", "cot_sft"], "without SFT batches"),
        (["--repetitions", "0"], "--repetitions: 0 is below 1"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        main(options)
    assert message in capsys.readouterr().err


def test_the_peak_of_memory_stays_when_it_is_freed():
    before = peak_memory_mib()
    block = torch.ones(2**28, dtype=torch.uint8)
    del block
    assert peak_memory_mib() >= before
    assert peak_memory_mib() > 256
