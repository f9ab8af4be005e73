"""What the workflow plans with: values of the command line, names, files written at the start."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from latent_reasoning.analysis.figures import FIGURES
from latent_reasoning.analysis.tables import SUPPLEMENTS
from latent_reasoning.config import PROJECT_ROOT, ConfigError, load, resolve
from latent_reasoning.dag import layout, planning


@pytest.fixture(scope="module")
def paper():
    return load(PROJECT_ROOT / "config" / "paper.yaml")


def test_the_names_of_figures_and_tables_are_those_that_are_made():
    assert tuple(FIGURES) == layout.FIGURES
    assert ("claims", *SUPPLEMENTS) == layout.TABLES


def test_models_are_named_by_their_stage(paper):
    assert (
        planning.models_of(paper, "sft", "rl") == "cot-sft|no-cot-sft|latent-6-rl|latent-6-by-1-rl"
    )
    assert not re.match(planning.models_of(paper, "import"), "")


def test_a_training_reads_the_model_it_starts_from_and_its_teacher(paper):
    parents = {name: planning.parents_of(paper, name) for name in paper.models}
    assert parents["latent-6"] == ["base"]
    assert parents["latent-6-rl"] == ["latent-6"]
    taught = paper.models["latent-6"].model_copy(deep=True)
    taught.distillation.teacher = "cot-sft"
    models = {**paper.models, "taught": taught}
    assert planning.parents_of(paper.model_copy(update={"models": models}), "taught") == [
        "base",
        "cot-sft",
    ]


def test_main_models_are_those_named_else_all_but_the_appendix(paper):
    assert layout.main_models(paper)[0] == "cot-sft"
    assert not set(layout.main_models(paper)) & set(paper.report.appendix)
    report = paper.report.model_copy(update={"main": ["latent-6"]})
    named = paper.model_copy(update={"report": report})
    assert layout.main_models(named) == ["latent-6"]
    digests = [planning.report_digest(e, "main") for e in (paper, named)]
    assert digests[0] != digests[1]
    assert planning.report_digest(paper, "title") == planning.report_digest(named, "title")


LATENT = ["latent-6", "latent-6-by-1", "latent-6-rl", "latent-6-by-1-rl"]


@pytest.mark.parametrize("name", ["paper", "smollm2", "published"])
def test_only_models_that_reason_in_latent_steps_are_looked_into(name):
    experiment = load(PROJECT_ROOT / "config" / f"{name}.yaml")
    assert layout.inside_models(experiment) == LATENT


def test_a_curriculum_without_latent_steps_is_not_looked_into():
    training = {"steps": 900}
    entry = {"stage": "curriculum", "training": training}
    models = {name: entry | {"method": name} for name in ("coconut", "icot")}
    experiment = resolve({"experiment": "x", "models": models}, "x.yaml")
    assert layout.inside_models(experiment) == ["coconut"]


def test_a_results_folder_that_snakemake_cannot_name_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("LATENT_REASONING_RESULTS", str(tmp_path / "{brace}"))
    with pytest.raises(ConfigError, match="brace"):
        planning.shown_results_root()


def test_values_of_the_command_line_lie_over_the_files():
    experiment = planning.load_experiment([], {"seeds": ["3"], "experiment": "other"})
    assert (experiment.seeds, experiment.experiment) == ([3], "other")
    laptop = load(PROJECT_ROOT / "config" / "laptop.yaml")
    assert experiment.models == laptop.models


def test_lists_of_the_command_line_hold_numbers_again():
    given = {"seeds": ["0", "1"], "runtime": {"device": "cpu", "threads": "2"}, "experiment": "x"}
    assert planning.command_line_values(given) == {
        "seeds": [0, 1],
        "runtime": {"device": "cpu", "threads": 2},
        "experiment": "x",
    }
    assert planning.command_line_values({"report": {"main": "null"}}) == {"report": {"main": None}}
    assert planning.command_line_values({"data": {"revision": "2025-11-01"}}) == {
        "data": {"revision": "2025-11-01"}
    }


@pytest.mark.parametrize(
    "text", ["a: b: c", "@home", "[draft", "", "# 1", "010", "1:30", "2025-13-45", ".nan", "*a"]
)
def test_a_text_of_the_command_line_stays_as_it_is(text):
    assert planning.command_line_values({"report": {"title": text}}) == {"report": {"title": text}}


def test_the_resolved_configuration_is_rewritten_only_where_it_differs(tmp_path: Path):
    experiment = load(PROJECT_ROOT / "config" / "test.yaml")
    path = tmp_path / "results" / "test" / "config.yaml"
    planning.write_config(experiment, path)
    written = path.stat().st_mtime_ns
    planning.write_config(experiment, path)
    assert path.stat().st_mtime_ns == written
    path.write_bytes(path.read_bytes().replace(b"experiment", b"\x8a", 1))
    planning.write_config(experiment, path)
    assert load(path) == experiment


def test_files_dated_in_the_future_are_dated_now_and_others_left(tmp_path):
    for name, date in (("past", 1000.0), ("future", time.time() + 86400)):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (date, date))
    assert planning.clamp_future_mtimes(tmp_path) == 1
    assert (tmp_path / "past").stat().st_mtime == 1000.0
    assert (tmp_path / "future").stat().st_mtime <= time.time()
    assert planning.clamp_future_mtimes(tmp_path) == 0


def test_a_file_that_vanishes_while_dates_are_read_is_passed_over(tmp_path, monkeypatch):
    for name in ("gone", "future"):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (2**32, 2**32))
    asked, stat = [], Path.stat

    def stat_of_what_vanishes(path: Path, **options: bool) -> os.stat_result:
        asked.append(path.name)
        if asked.count("gone") > 2:  # after the look at the link, and one at the file
            (tmp_path / "gone").unlink(missing_ok=True)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", stat_of_what_vanishes)
    planning.clamp_future_mtimes(tmp_path)
    assert (tmp_path / "future").stat().st_mtime <= time.time()
