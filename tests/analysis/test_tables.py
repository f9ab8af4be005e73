"""The tables: columns of the contract, aggregation over seeds, pairs, printed forms."""

import math

import pandas
import pytest

from latent_reasoning.analysis import tables
from latent_reasoning.evaluation.metrics import wilson_interval

CONTRACT = [
    *("model", "dataset", "seeds", "n", "accuracy", "accuracy_ci95_low", "accuracy_ci95_high"),
    *("reasoning_tokens", "tokens_vs_sft", "published_accuracy", "published_tokens"),
    "accuracy_seed_std",
]


@pytest.fixture(scope="module")
def main(three_seeds):
    return tables.main_table(three_seeds).set_index("model", drop=False)


def test_main_table_has_the_columns_of_the_contract_and_a_row_a_model(main, three_seeds):
    assert list(main.columns) == CONTRACT
    assert list(main["model"]) == list(three_seeds.experiment.models)
    assert set(main["n"]) == {400}  # of one seed
    assert set(main["seeds"]) == {3}


def test_accuracy_its_spread_and_its_interval_are_those_of_all_seeds(main, three_seeds):
    summaries = [three_seeds.summary("no-cot-sft", seed, "test") for seed in range(3)]
    of_seeds = [summary["accuracy"] for summary in summaries]
    mean = sum(of_seeds) / 3
    row = main.loc["no-cot-sft"]
    assert row["accuracy"] == pytest.approx(mean)
    spread = math.sqrt(sum((a - mean) ** 2 for a in of_seeds) / 2)
    assert row["accuracy_seed_std"] == pytest.approx(spread)
    pooled = wilson_interval(sum(summary["correct"] for summary in summaries), 1200)
    assert (row["accuracy_ci95_low"], row["accuracy_ci95_high"]) == pytest.approx(pooled)


def test_tokens_vs_sft_compares_an_rl_model_with_its_start_and_no_other(main):
    after, before = main.loc["latent-6-rl"], main.loc["latent-6"]
    expected = after["reasoning_tokens"] / before["reasoning_tokens"] - 1
    assert after["tokens_vs_sft"] == pytest.approx(expected)
    assert main.loc[["cot-sft", "latent-6", "latent-6-by-1"], "tokens_vs_sft"].isna().all()


def test_published_figures_are_fractions_beside_the_test_split_only(written):
    table = tables.main_table(written(0, evaluation={"datasets": ["test", "validation"]}))
    published = table.set_index(["model", "dataset"])["published_accuracy"]
    assert published["latent-6", "test"] == 0.4973
    assert pandas.isna(published["latent-6", "validation"])
    assert pandas.isna(published["cot-sft", "test"])
    assert table["accuracy_seed_std"].isna().all()  # one seed has no spread


def test_paired_table_pairs_rl_with_its_start_and_latent_with_no_reasoning(three_seeds):
    paired = tables.paired_table(three_seeds)
    pairs = paired[["model", "reference"]].drop_duplicates().to_numpy().tolist()
    assert pairs == [
        ["latent-6-rl", "latent-6"],
        ["latent-6-by-1-rl", "latent-6-by-1"],
        ["latent-6", "no-cot-sft"],
        ["latent-6-by-1", "no-cot-sft"],
    ]
    assert list(paired["seed"]) == [0, 1, 2] * 4
    right = paired["both_right"] + paired["only_model"]
    accuracies = [
        three_seeds.summary(m, s, "test")["correct"]
        for m, s in zip(paired["model"], paired["seed"], strict=True)
    ]
    assert list(right) == accuracies


def test_length_correlates_with_steps_after_rl_and_is_empty_where_constant(three_seeds):
    table = tables.length_table(three_seeds).set_index(["model", "seed"])
    assert table.loc[("latent-6-by-1", 0), "pearson_r_steps"] == pytest.approx(1.0)
    assert 0.8 < table.loc[("latent-6-rl", 1), "pearson_r_steps"] < 1
    assert pandas.isna(table.loc[("latent-6", 2), "pearson_r_steps"])
    assert (table["badly_formatted"] == 1).all()


def test_grouped_tables_count_every_row_of_every_seed_once(three_seeds):
    for table in (tables.steps_table(three_seeds), tables.tokens_table(three_seeds)):
        assert set(table.groupby("model")["n"].sum()) == {1200}


def test_forced_table_pools_the_seeds(three_seeds):
    table = tables.forced_table(three_seeds).set_index(["model", "latent_steps"])
    correct = [three_seeds.forced("latent-6", s, "test")["correct"][4] for s in range(3)]
    assert table.loc[("latent-6", 4), "accuracy"] == pytest.approx(sum(correct) / 1200)
    assert list(table.loc["cot-sft"].index) == [0]


def test_markdown_prints_per_cent_and_leaves_out_empty_columns(written, main):
    assert "Std over seeds" in tables.markdown(main)
    text = tables.markdown(tables.main_table(written(0)))
    head, rule, *body = text.splitlines()
    assert "Seeds" not in head
    assert set(rule) <= set("|-: ")
    assert len(body) == 6
    assert len({len(line) for line in text.splitlines()}) == 1
    latent = next(line for line in body if line.startswith("| latent-6 "))
    assert "| 49.73 |" in " ".join(latent.split())


def test_latex_escapes_per_cent_and_underscores(main):
    text = tables.latex(main.assign(dataset="gsm_hard"))
    assert r"Accuracy \%" in text
    assert r"gsm\_hard" in text
    assert text.count(r"\\") == 7


def test_write_tables_leaves_every_declared_file(three_seeds, tmp_path):
    tables.write_tables(three_seeds, tmp_path)
    expected = {"main.csv", "main.md", "main.tex"} | {f"{n}.csv" for n in tables.SUPPLEMENTS}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert list(pandas.read_csv(tmp_path / "main.csv").columns) == CONTRACT
