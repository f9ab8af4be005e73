"""Both paths of every workload do the same work, and the commands write how they compare."""

from __future__ import annotations

import csv
from functools import partial

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.inputs import Inputs, Shape, build_inputs
from benchmarks.measure import Measurement, count_flops, peak_memory_mib, peak_of
from benchmarks.report import as_table
from benchmarks.workloads import WORKLOADS, Work, Workload, build_workloads
from latent_reasoning.data.collation import collate_latent
from latent_reasoning.data.rows import Row, row_lines
from latent_reasoning.model.folder import save
from latent_reasoning.runtime.files import write_text_atomically

TINY = Shape(
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


def test_generated_batches_have_the_shapes_of_the_published_measurements():
    batch = collate_latent(build_inputs(Shape()).sft, 1)
    assert batch["input_ids"].shape == (32, 336)
    assert batch["latent_input_ids"].shape == (32, 328)
    assert int(batch["attention_mask"].sum()) == 4450
    assert int((batch["latent_labels"] != -100).sum()) == 500


@pytest.mark.parametrize("name", WORKLOADS)
def test_both_paths_read_and_write_the_same(inputs, name):
    (workload,) = build_workloads(inputs, [name])
    own, other = workload.naive(1), workload.fast(1)
    assert own.tokens == other.tokens > 0
    assert list(map(list, own.read)) == list(map(list, other.read))
    assert list(map(list, own.written)) == list(map(list, other.written))


def test_products_and_attention_are_counted_and_the_answers_compared():
    square, states = torch.ones(10, 10), torch.ones(2, 4, 6, 8)

    def run_naive(repetition: int) -> Work:
        torch.nn.functional.scaled_dot_product_attention(states, states, states)
        return Work([[1], [1]], [[5], [6]])

    def run_fast(repetition: int) -> Work:
        square @ square
        return Work([[1], [1]], [[5], [7]])

    measured = count_flops(
        Workload("work", 2, run_naive, run_fast), 0, Measurement("work", "seconds", 4.0, 1.0)
    )
    table = as_table(measured).set_index("metric")
    attention, product = 4 * 2 * 4 * 6 * 6 * 8 / 1e9, 2 * 10**3 / 1e9
    assert table.loc["gflop", ["naive", "fast"]].tolist() == [attention, product]
    assert table.loc["gflop_per_second", "ratio"] == pytest.approx(4 * product / attention)
    assert table.loc["equal_answers", ["naive", "fast", "ratio"]].tolist() == [2, 1, 0.5]


def test_a_process_of_its_own_tells_its_peak():
    # It does not hold what this process holds.
    block = torch.ones(2**30, dtype=torch.uint8)
    assert (
        100 < peak_of("latent_sft", "fast", partial(build_inputs, TINY)) < peak_memory_mib() - 700
    )
    del block


def test_the_command_writes_the_summary(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "Shape", lambda: TINY)
    output, names = tmp_path / "summary.csv", ["cot_sft", "evaluation_adaptive"]
    command.main(["--workloads", *names, "--repetitions", "1", "--output", str(output)])
    with output.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["workload", "metric", "naive", "fast", "ratio"]
    assert list(dict.fromkeys(row["workload"] for row in rows)) == names
    for row in rows:
        naive, fast, ratio = (float(row[column]) for column in ("naive", "fast", "ratio"))
        more_is_better = row["metric"].endswith("_per_second") or row["metric"] == "equal_answers"
        assert ratio == pytest.approx(fast / naive if more_is_better else naive / fast, rel=1e-4)


def test_a_trained_model_is_measured_on_its_own_rows(inputs, tmp_path):
    save(inputs.model, inputs.tokenizer, tmp_path / "model", card={"prompt_prefix": "w3 "})
    rows = [Row(f"test-{i}", " ".join(["w5"] * (i + 1)), None, str(i)) for i in range(5)]
    write_text_atomically(tmp_path / "rows.jsonl", "".join(row_lines(rows)))
    source = ["--model", str(tmp_path / "model"), "--rows", str(tmp_path / "rows.jsonl")]
    few = ["--repetitions", "1", "--batch-size", "2", "--max-new-tokens", "6"]
    command.main([*source, *few, "--output", str(tmp_path / "trained.csv")])
    with (tmp_path / "trained.csv").open(encoding="utf-8") as stream:
        table = {(row["workload"], row["metric"]): row for row in csv.DictReader(stream)}
    workloads = list(dict.fromkeys(name for name, _ in table))
    assert workloads == command.DEFAULT_WORKLOADS["trained"]
    equal = table["evaluation", "equal_answers"]
    assert (equal["naive"], equal["fast"]) == ("60", "60")
    assert float(table["grpo_step", "peak_memory_mib"]["fast"]) > 100
    assert (tmp_path / "trained.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "folder"], "--model and --rows go together"),
        (["--model", "a", "--rows", "b", "--workloads", "cot_sft"], "without SFT batches"),
        (["--repetitions", "0"], "--repetitions: 0 is below 1"),
        (["--shape", "tiny", "--micro-batch", "-1"], "--micro-batch: -1 is below 1"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        command.main(options)
    assert message in capsys.readouterr().err
