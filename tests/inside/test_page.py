"""Files, findings, figures and the page of a study, and the stage by hand."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import matplotlib
import numpy
import pandas
import pytest
from matplotlib.figure import Figure

from latent_reasoning.analysis.style import STYLE, save
from latent_reasoning.config import UserError
from latent_reasoning.data.rows import Row, row_lines
from latent_reasoning.data.sequences import START
from latent_reasoning.inside.__main__ import main
from latent_reasoning.inside.drawing import heat_map
from latent_reasoning.inside.figures import LATENT_FIGURES
from latent_reasoning.inside.findings import findings
from latent_reasoning.inside.page import write_page
from latent_reasoning.inside.space_figures import SPACE_FIGURES
from latent_reasoning.inside.study import LONG, Options, study_latent
from latent_reasoning.model.folder import write_model
from latent_reasoning.model.reasoner import LatentReasoner
from tests.inside.conftest import rows, tiny_subject
from tests.model.models import build_base, build_tokenizer


def test_a_study_has_every_table_figure_and_finding(study, study_folder):
    figures = {file.stem for file in (study_folder / "figures").glob("*.png")}
    assert figures == {*LATENT_FIGURES, *SPACE_FIGURES}
    found = pandas.read_csv(study_folder / "findings.csv")
    assert set("ABCEFG") <= set(found["analysis"])
    words = pandas.read_parquet(study_folder / "words.parquet")
    made = sum(2 + 1 for _ in range(24))
    assert len(words) <= 10 * made
    examples = json.loads((study_folder / "examples.json").read_text())
    assert len(examples) == 20
    assert len(examples[0]["steps"]) == examples[0]["stops"] + 1
    assert len(examples[0]["steps"][0]["blocks"]) == 3


def test_equal_tables_give_equal_figures(study, study_folder, tmp_path):
    draws = LATENT_FIGURES | SPACE_FIGURES
    for name in ("lens", "norms", "signals"):
        with matplotlib.rc_context(STYLE):
            figure = draws[name](study.tables, study.summary)
        save(figure, tmp_path, name, formats=("png",))
        file = f"{name}.png"
        assert (tmp_path / file).read_bytes() == (study_folder / "figures" / file).read_bytes()


def test_the_page_holds_everything_and_fetches_nothing(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/webp;base64,") == len(LATENT_FIGURES) + len(SPACE_FIGURES)
    assert "https://" not in text
    assert "http://" not in text
    assert "A. Reading the latents" in text


def page_of_seeds(study_folder, tmp_path, lines):
    """The text of a page of seeds 3, 4, .., each with one finding."""
    folders = [tmp_path / f"seed-{seed}" for seed, _ in enumerate(lines, 3)]
    for seed, (folder, line) in enumerate(zip(folders, lines, strict=True), 3):
        shutil.copytree(study_folder, folder, ignore=shutil.ignore_patterns("figures"))
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps(summary | {"seed": seed}))
        table = pandas.DataFrame([line], columns=[*line, "low", "high", "control"])
        table.to_csv(folder / "findings.csv", index=False)
    write_page(folders, tmp_path / "page.html", "")
    return re.sub(r"<.*?>", "", (tmp_path / "page.html").read_text())


def test_the_comparison_says_of_how_many_rows_and_seeds_its_means_are(study_folder, tmp_path):
    line = {"analysis": "A", "finding": "follows", "unit": "share"}
    numbers = [(1.0, 3), (0.5, 1), (numpy.nan, 0)]
    text = page_of_seeds(study_folder, tmp_path, [line | {"value": v, "n": n} for v, n in numbers])
    assert "75.0 % (n = 1 to 3, 2 of 3 seeds)" in text


def test_a_large_heat_map_names_its_rows_and_columns_too():
    table = pandas.DataFrame(numpy.zeros((10, 2)), index=range(1, 11), columns=["all", 1])
    axes = Figure().subplots()
    heat_map(axes, table, "", "", "")
    assert [label.get_text() for label in axes.get_yticklabels()] == [str(i) for i in range(1, 11)]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["all", "1"]


def test_a_finding_names_the_seeds_that_have_it(study_folder, tmp_path):
    words = ["AUC (2 wrong)", "AUC (1 wrong)", "AUC (1 wrong)"]
    lines = [
        {"analysis": "H", "finding": finding, "value": seed / 10, "n": 24, "unit": "AUC"}
        for seed, finding in enumerate(words, 3)
    ]
    text = page_of_seeds(study_folder, tmp_path, lines)
    assert "AUC (2 wrong): seed 3: 0.3, n = 24." in text
    assert "AUC (1 wrong): seed 4: 0.4, n = 24; seed 5: 0.5, n = 24." in text


def test_a_folder_that_is_no_study_is_refused(tmp_path):
    with pytest.raises(UserError, match="no study"):
        write_page([tmp_path], tmp_path / "page.html", "")


def test_a_latent_folder_by_hand(tmp_path, capsys):
    subject = tiny_subject()
    write_model(subject.model.float(), subject.tokenizer, tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(row_lines(rows(60))))
    arguments = ["--path", f"{tmp_path / 'model'}", "--data", f"{data}", "--limit", "30"]
    arguments += ["--forced-steps", "1"]
    main([*arguments, "--output", f"{tmp_path / 'out'}", "--max-steps", "3", "--sample", "5"])
    assert "30 rows in" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["training_rows"] == 30
    assert summary["steps_mean"] == 1
    assert (tmp_path / "out" / "inside.html").is_file()


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_plain_folder_by_hand_on_a_text_file(architecture, tmp_path):
    model = LatentReasoner(build_base(architecture).float(), None)
    write_model(model, build_tokenizer(special=False), tmp_path / "model")
    data = tmp_path / "text.txt"
    data.write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9\n\nw3 w4 w3 w4 w3 w4 w3\n" * 8)
    arguments = ["--path", f"{tmp_path / 'model'}", "--data", f"{data}", "--sample", "4"]
    main([*arguments, "--output", f"{tmp_path / 'out'}"])
    found = pandas.read_csv(tmp_path / "out" / "findings.csv")
    assert set(found["analysis"]) == {"E", "F"}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["n"] == 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A latent and a plain model."""
    folder, subject = tmp_path_factory.mktemp("models"), tiny_subject()
    write_model(subject.model.float(), subject.tokenizer, folder / "latent")
    plain = LatentReasoner(build_base().float(), None)
    write_model(plain, build_tokenizer(special=False), folder / "plain")
    return folder


def test_rows_that_leave_none_for_the_probes_are_refused_before_the_study(folders, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(row_lines(rows(20))))
    options = ["--path", f"{folders / 'latent'}", "--data", f"{data}"]
    with pytest.raises(UserError, match=r"20 rows, .* 500: give a smaller"):
        main([*options, "--output", f"{tmp_path / 'out'}"])


def test_rows_with_special_token_text_are_counted(folders, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(row_lines([Row("a", f"w1{START}", None, "3")])))
    options = ["--path", f"{folders / 'latent'}", "--data", f"{data}"]
    with pytest.raises(UserError, match="all 1 rows hold special-token text"):
        main([*options, "--output", f"{tmp_path / 'out'}"])
    assert "1 rows with special-token text are skipped" in capsys.readouterr().out


def test_a_text_in_another_encoding_is_refused(folders, tmp_path):
    data = tmp_path / "text.txt"
    data.write_bytes("w1 w2 \u00e9".encode("latin-1"))
    options = ["--path", f"{folders / 'plain'}", "--data", f"{data}"]
    with pytest.raises(UserError, match="is no UTF-8 text"):
        main([*options, "--output", f"{tmp_path / 'out'}"])


def test_an_output_folder_with_other_files_is_refused_and_kept(folders, tmp_path):
    options = ["--path", f"{folders / 'plain'}", "--data", f"{tmp_path / 'text.txt'}"]
    with pytest.raises(UserError, match="holds other files"):
        main([*options, "--output", f"{folders / 'plain'}"])
    assert (folders / "plain" / "config.json").is_file()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        main([*options, "--output", f"{tmp_path / 'file'}"])


@pytest.mark.parametrize("case", ["some without equations", "none with", "few rows", "no steps"])
def test_findings_and_figures_of_unusual_rows(case, tmp_path):
    """Rows that state no equations count among all rows alone; every figure says what it lacks."""
    tested, most = rows(12), 2
    if case == "some without equations":
        tested[::2] = [replace(row, steps=None) for row in tested[::2]]
    elif case == "none with":
        tested = [replace(row, steps=None) for row in tested]
    elif case == "few rows":
        tested = tested[:6]
    else:
        most = 0
    study = study_latent(tiny_subject(), tested, rows(24, 24), Options(sample=12, most=most))
    for name in LONG:
        study.tables[name].to_parquet(tmp_path / name, index=False)
    found = findings(study.tables, study.summary)
    assert not found["finding"].duplicated().any()
    assert len(study.tables["latents"]) == len(tested) + study.tables["need"]["stops"].sum()
    draws = LATENT_FIGURES | SPACE_FIGURES
    for name in ("lens", "errors", "interventions", "counterfactual", "signals", "depth", "skips"):
        draws[name](study.tables, study.summary)
    for name in ("depth", "skips", "forced", "signal_areas"):
        table = study.tables[name]
        keys = ["group", "measure", "where", "skipped", "block", "operations", "steps", "signal"]
        assert not table.duplicated([key for key in keys if key in table]).any()


def test_steps_needed_and_taken_are_those_of_the_same_rows():
    steps = pandas.array([1, 0, None], dtype="Int64")
    needed = pandas.DataFrame({"needed": steps, "stops": [2, 1, 9]})
    forced = pandas.DataFrame({"operations": [0], "steps": [0], "accuracy": [0.5]})
    bars = LATENT_FIGURES["need"]({"need": needed, "forced": forced}, {}).axes[1]
    assert [bar.get_height() for bar in bars.patches] == [1, 1, 1, 1]
    assert bars.get_legend_handles_labels()[1] == ["needed, mean 0.50", "stops, mean 1.50"]
    assert "n = 2" in bars.get_title(loc="left") + bars.get_title()
