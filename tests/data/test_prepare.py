"""The stage prepare_data: files, counts by reason, and the promise that nothing leaks."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from latent_reasoning.config import ConfigError, Data, load
from latent_reasoning.dag.digests import science, science_digest
from latent_reasoning.data.__main__ import main
from latent_reasoning.data.prepare import prepare, questions_of, split_positions, trainable
from latent_reasoning.data.rows import DataError, Row, read_rows


def silent(line: str) -> None:
    pass


def write_rows(folder: Path, **splits: list[dict[str, Any]]) -> Data:
    for name, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return Data.model_validate({"source": "local", "path": str(folder)})


def row(question: str, answer: str = "3", steps: Any = ("<<1+2=3>>",)) -> dict[str, Any]:
    return {"question": question, "steps": steps and list(steps), "answer": answer}


@pytest.fixture
def data(tmp_path) -> Data:
    train = [row(f"train {i}?") for i in range(20)]
    train[4] = row("a fraction?", answer="one half")
    train[7] = row("seen  in test?")
    train[9] = row("negative?", answer="-3")
    return write_rows(
        tmp_path,
        train=train,
        validation=[row("validation 0?"), row("half?", answer="1/2 cup")],
        test=[row("seen in\ttest?", steps=None), row("test 1?", steps=())],
    )


def test_the_cut_of_ten_rows_is_that_of_the_public_code() -> None:
    sft, rl = split_positions(10, 0.85, 42)
    assert sft.tolist() == [5, 6, 0, 7, 3, 2, 4, 9]  # round(8.5) is 8: half to even
    assert rl.tolist() == [1, 8]


def test_the_cut_at_full_size_has_the_papers_numbers() -> None:
    sft, rl = split_positions(385_620, 0.85, 42)
    assert (len(sft), len(rl)) == (327_777, 57_843)
    assert sft[:3].tolist() == [371222, 315834, 151618]
    assert rl[-3:].tolist() == [131009, 129997, 75400]


def test_answers_have_to_be_numbers_and_questions_new_whatever_their_white_space() -> None:
    held_out = questions_of([Row("test-0", "How  many\neggs?", None, "1")])
    texts = [("q?", "1,200"), ("q?", "-5"), ("q?", "a 5"), ("q?", ""), ("How many eggs? ", "1")]
    rows = [Row(f"train-{i}", q, (), answer) for i, (q, answer) in enumerate(texts)]
    kept, dropped = trainable(rows, held_out)
    assert [row.id for row in kept] == ["train-0", "train-1"]
    assert dict(dropped) == {"answer_not_a_number": 2, "in_validation_or_test": 1}
    rows = [Row("train-0", "q?", (), answer) for answer in ("1/2", "nan", "3,5")]
    assert [row.answer for row in trainable(rows, set())[0]] == ["1/2"]
    assert [row.answer for row in trainable(rows, set(), "public")[0]] == ["nan", "3,5"]


def test_rows_are_dropped_by_reason_and_everything_adds_up(data) -> None:
    prepared = prepare(data, silent)
    summary = prepared.summary["splits"]
    assert summary["train"] == {"rows": 20, "dropped": {}}
    assert summary["validation"]["answers_not_plain_numbers"] == 1
    assert "answers_not_plain_numbers" not in summary["test"]
    dropped = Counter(summary["sft"]["dropped"]) + Counter(summary["rl"]["dropped"])
    assert dropped == {"answer_not_a_number": 1, "in_validation_or_test": 1}
    rows = {name: len(prepared.splits[name]) for name in ("sft", "rl")}
    assert rows == {name: summary[name]["rows"] for name in rows}
    assert sum(rows.values()) == 18


def test_the_cut_comes_before_the_filters(data) -> None:
    order = np.random.default_rng(42).permutation(20).tolist()
    splits = prepare(data, silent).splits
    assert "-3" in [row.answer for row in splits["sft"] + splits["rl"]]  # for stages that use it
    for name, positions in (("sft", order[:17]), ("rl", order[17:])):
        expected = [f"train-{position}" for position in positions if position not in (4, 7)]
        assert [row.id for row in splits[name]] == expected


def test_validation_and_test_are_kept_as_they_are_and_train_shares_none_of_them(
    data,
) -> None:
    splits = prepare(data, silent).splits
    assert [row.answer for row in splits["validation"]] == ["3", "1/2 cup"]
    assert [row.steps for row in splits["test"]] == [None, ()]
    assert not questions_of(splits["validation"], splits["test"]) & questions_of(
        splits["sft"], splits["rl"]
    )


def test_a_generator_that_leaks_is_refused(monkeypatch) -> None:
    same = [row(f"{i}?") for i in range(4)]
    monkeypatch.setattr(
        "latent_reasoning.data.sources.generate_splits",
        lambda *sizes, **settings: {"train": same, "validation": same, "test": same},
    )
    with pytest.raises(DataError, match="also stand in validation or test"):
        prepare(Data(), silent)


def test_histograms_of_lengths_and_steps(data) -> None:
    summary = prepare(data, silent).summary["splits"]
    assert summary["test"]["steps"] == {"0": 1, "unknown": 1}
    words = {"min": 2, "mean": 2.5, "max": 3, "bin_width": 10, "histogram": {"0": 2}}
    assert summary["test"]["question_words"] == words
    assert summary["validation"]["question_characters"]["max"] == len("validation 0?")


def test_nothing_left_after_the_filters_is_refused_with_the_reasons(tmp_path) -> None:
    data = write_rows(
        tmp_path,
        train=[row("a?", answer="x 1")] * 10,
        validation=[row("v?")],
        test=[row("t?")],
    )
    with pytest.raises(DataError, match=r"split sft has no rows left: .*'answer_not_a_number': 8"):
        prepare(data, silent)


def test_rl_may_be_empty_only_where_sft_gets_everything(tmp_path) -> None:
    data = write_rows(tmp_path, train=[row("a?")] * 3, validation=[row("v?")], test=[row("t?")])
    with pytest.raises(DataError, match="split rl has no rows left"):
        prepare(data, silent)
    everything = data.model_copy(update={"sft_share": 1.0})
    assert prepare(everything, silent).splits["rl"] == []


def test_perturbed_copies_stay_in_their_rows_split(tmp_path) -> None:
    train = [
        row(f"Box {name} has 48 eggs, 13 broken. Whole?", "35", ["<<48-13=35>>"])
        for name in "abcdefghijklmnopqrst"
    ]
    data = write_rows(tmp_path, train=train, validation=[row("v?")], test=[row("t?")])
    augmented = Data.model_validate(
        {**data.model_dump(), "augmentation": {"method": "numeric_perturbation", "copies": 2}}
    )
    prepared = prepare(augmented, silent)
    for name, originals in (("sft", 17), ("rl", 3)):
        rows = prepared.splits[name]
        ids = [row.id for row in rows[:originals]]
        assert all("-copy-" not in row_id for row_id in ids)
        assert {row.id.rsplit("-copy-", 1)[0] for row in rows} == set(ids)
        summary = prepared.summary["splits"][name]
        assert (summary["rows"], summary["perturbed_copies"]) == (3 * originals, 2 * originals)
        assert summary["perturbed_rows"] == originals
    questions = [row.question for rows in prepared.splits.values() for row in rows]
    assert len(set(questions)) == len(questions)


@pytest.fixture
def config_file(tmp_path, data, monkeypatch) -> Path:
    monkeypatch.setenv("LATENT_REASONING_RESULTS", str(tmp_path / "results"))
    path = tmp_path / "config.yaml"
    content = {
        "experiment": "tiny",
        "data": {
            "source": "local",
            "path": data.path,
            "extra_tests": {"extra": str(tmp_path / "extra.jsonl")},
        },
        "base": {"source": "hub", "hub_id": "someone/model"},
        "models": {"base-model": {"stage": "import", "from": "base"}},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_the_stage_writes_rows_digests_and_summary(config_file, tmp_path, capsys) -> None:
    main(["--config", str(config_file)])
    folder = tmp_path / "results" / "tiny" / "data"
    names = {"sft", "rl", "validation", "test"}
    expected = {f"{name}.{kind}" for name in names for kind in ("jsonl", "sha256")}
    assert {path.name for path in folder.iterdir()} == expected | {"summary.json"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["source"] == "local"
    assert summary["science"] == science(load(config_file), "data")
    for name in names:
        digest = hashlib.sha256((folder / f"{name}.jsonl").read_bytes()).hexdigest()
        assert (folder / f"{name}.sha256").read_text() == digest + "\n"
        assert summary["splits"][name]["sha256"] == digest
        assert len(read_rows(folder / f"{name}.jsonl")) == summary["splits"][name]["rows"]
    assert "dropped 1 answer_not_a_number" in capsys.readouterr().out


def test_the_stage_twice_gives_the_same_bytes_but_only_of_what_was_planned(
    config_file, tmp_path
) -> None:
    folder = tmp_path / "results" / "tiny" / "data"
    main(["--config", str(config_file)])
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    main(["--config", str(config_file), "--digest", science_digest(load(config_file), "data")])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    with pytest.raises(ConfigError, match="0123456789abcdef was planned"):
        main(["--config", str(config_file), "--digest", "0123456789abcdef"])


def test_an_extra_test_set_counts_its_questions_in_train_and_changes_nothing_else(
    config_file, tmp_path
) -> None:
    main(["--config", str(config_file)])
    folder = tmp_path / "results" / "tiny" / "data"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rows = [{"question": "train  0?", "answer": "3"}, {"question": "another?", "answer": "4"}]
    (tmp_path / "extra.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["--config", str(config_file), "--dataset", "extra"])
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"extra.jsonl", "extra.sha256", "extra.summary.json"}
    summary = json.loads(after["extra.summary.json"])["splits"]["extra"]
    assert (summary["rows"], summary["questions_also_in_train"]) == (2, 1)
    assert summary["steps"] == {"unknown": 2}
    with pytest.raises(ConfigError, match="'other' is not among extra"):
        main(["--config", str(config_file), "--dataset", "other"])
