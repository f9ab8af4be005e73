"""Files, findings, figures and the page of a study, and the stage by hand."""

from __future__ import annotations

import json

import pandas
import pytest

from latent_reasoning.config import UserError
from latent_reasoning.data.rows import row_lines
from latent_reasoning.inside.__main__ import main
from latent_reasoning.inside.figures import LATENT_FIGURES, draw_all
from latent_reasoning.inside.page import write_page
from latent_reasoning.inside.space_figures import SPACE_FIGURES
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
    draw_all(study.tables, study.summary, tmp_path)
    for name in ("lens", "norms", "signals"):
        file = f"{name}.png"
        assert (tmp_path / file).read_bytes() == (study_folder / "figures" / file).read_bytes()


def test_the_page_holds_everything_and_fetches_nothing(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/webp;base64,") == len(LATENT_FIGURES) + len(SPACE_FIGURES)
    assert "https://" not in text
    assert "http://" not in text
    assert "A. Reading the latents" in text


def test_a_folder_that_is_no_study_is_refused(tmp_path):
    with pytest.raises(UserError, match="no study"):
        write_page([tmp_path], tmp_path / "page.html", "")


def test_a_latent_folder_by_hand(tmp_path, capsys):
    subject = tiny_subject()
    write_model(subject.model.float(), subject.tokenizer, tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(row_lines(rows(60))))
    arguments = ["--path", f"{tmp_path / 'model'}", "--data", f"{data}", "--limit", "30"]
    main([*arguments, "--output", f"{tmp_path / 'out'}", "--max-steps", "3", "--sample", "5"])
    assert "30 rows in" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["training_rows"] == 30
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
