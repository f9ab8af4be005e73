"""The command line of the stage analysis."""

import pandas
import pytest

from latent_reasoning.analysis.__main__ import main
from latent_reasoning.analysis.results import MissingResultError
from latent_reasoning.config import dump_yaml


@pytest.fixture
def config(written, tmp_path):
    """A configuration file whose results are written; latent-6-by-1 is its appendix."""
    results = written(0, report={"appendix": ["latent-6-by-1", "latent-6-by-1-rl"]})
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(results.experiment))
    return path


def test_tables_figures_and_report_follow_one_another(config, results_root, capsys):
    for what in ("tables", "figures", "report"):
        main([what, "--config", str(config)])
    folder = results_root / "synthetic"
    assert (folder / "report.html").stat().st_size > 100_000
    claims = pandas.read_csv(folder / "tables" / "claims.csv")
    assert set(claims["verdict"]) == {"reached"}
    assert "| latent-6-rl " in capsys.readouterr().out


def test_appendix_writes_a_table_of_its_own(config, results_root):
    main(["appendix", "--config", str(config)])
    folder = results_root / "synthetic" / "tables"
    assert {path.name for path in folder.iterdir()} == {
        "appendix.csv",
        "appendix.md",
        "appendix.tex",
    }
    table = pandas.read_csv(folder / "appendix.csv")
    assert list(table["model"]) == ["latent-6-by-1", "latent-6-by-1-rl"]


def test_tables_without_an_evaluation_say_which_is_missing(config, results_root):
    (results_root / "synthetic/evaluations/latent-6/seed-0/test/summary.json").unlink()
    with pytest.raises(MissingResultError, match="no evaluation of latent-6, seed 0, on test"):
        main(["tables", "--config", str(config)])


def test_an_unknown_subcommand_is_refused(config, capsys):
    with pytest.raises(SystemExit):
        main(["pictures", "--config", str(config)])
    assert "invalid choice: 'pictures'" in capsys.readouterr().err
