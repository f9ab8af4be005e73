"""The command line of the stage analysis."""

import pandas
import pytest

from latent_reasoning.analysis.__main__ import main
from latent_reasoning.analysis.results import DamagedResultError
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
        f"appendix.{e}" for e in ("csv", "md", "tex")
    }
    table = pandas.read_csv(folder / "appendix.csv")
    assert list(table["model"]) == ["latent-6-by-1", "latent-6-by-1-rl"]


@pytest.mark.parametrize("name", ["summary.json", "predictions.parquet", "forced.csv"])
def test_a_damaged_evaluation_is_refused_by_name(config, results_root, name):
    file = next(results_root.glob(f"synthetic/evaluations/latent-6/*/*/{name}"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedResultError, match=f"{name}: damaged or edited.*delete it and run"):
        main(["tables", "--config", str(config)])


def test_a_damaged_summary_of_the_data_is_refused_by_name(config, results_root):
    (results_root / "synthetic" / "data" / "summary.json").write_text('{"splits": {')
    with pytest.raises(DamagedResultError, match=r"summary\.json: damaged or edited"):
        main(["report", "--config", str(config)])
