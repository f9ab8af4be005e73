"""A card's figures are written part by part, and those that are there are not measured again."""

from __future__ import annotations

import json

from benchmarks import __main__ as command
from benchmarks import card

PARTS = ["latent_sft", "latent_sft", "cot_sft", "rl_step", "decode_8", "decode_40"]


def test_a_card_is_measured_part_by_part_and_goes_on_where_it_stopped(
    tmp_path, capsys, monkeypatch
):
    file = tmp_path / "card.jsonl"
    options = ["--shape", "tiny", "--device", "cpu", "--repetitions", "1", "--output", str(file)]
    command.main(options)
    lines = file.read_text(encoding="utf-8").splitlines()
    figures = [json.loads(line) for line in lines]
    assert [figure["part"] for figure in figures] == PARTS
    assert [figure["path"] for figure in figures] == ["naive", *["eager"] * 5]
    naive, own = figures[:2]
    assert own["tflop"] < naive["tflop"]
    assert own["published_hours"] == 30_000 * own["seconds"] / 3600
    assert "a decoded token of 4 rows: " in capsys.readouterr().out
    others = [figures[-2] | {"shape": "h128"}, figures[-1] | {"shape": "h128", "seconds": 1e6}]
    lines = [*lines[:-1], *map(json.dumps, others)]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    measured = []
    measure = card.Card.measure
    monkeypatch.setattr(
        card.Card,
        "measure",
        lambda self, part, count: measured.append(part.name) or measure(self, part, count),
    )
    command.main(options)
    assert measured == ["decode_40"]
    milliseconds = float(capsys.readouterr().out.split("a decoded token of 4 rows: ")[1].split()[0])
    assert milliseconds < 1e6  # another shape's figures are in the file too


def test_a_captured_step_is_not_taken_to_do_the_operations_of_the_naive_one(tmp_path):
    file = tmp_path / "card.jsonl"
    options = ["--shape", "tiny", "--device", "cpu", "--repetitions", "1", "--output", str(file)]
    command.main([*options, "--paths", "naive", "captured"])
    figures = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert figures[0]["tflop"] > 0
    assert [figure["tflop"] for figure in figures[1:]] == [None] * 5
