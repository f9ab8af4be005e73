"""Tables, figures and the report of an experiment, from the files under `results/`.

python -m latent_reasoning.analysis tables --config config/laptop.yaml [--appendix]
python -m latent_reasoning.analysis figures --config config/laptop.yaml
python -m latent_reasoning.analysis report --config config/laptop.yaml
"""

from __future__ import annotations

import argparse
import sys

from latent_reasoning.analysis.claims import claims_table
from latent_reasoning.analysis.figures import write_figures
from latent_reasoning.analysis.report import write_report
from latent_reasoning.analysis.results import Results
from latent_reasoning.analysis.tables import main_table, markdown, write_csv, write_tables
from latent_reasoning.command import run_stage
from latent_reasoning.config import load


def main(argv: list[str] | None = None) -> None:
    """Make what the first argument names."""
    options = _options(argv)
    experiment = load(options.config)
    results = Results.of(experiment, appendix=options.what == "tables" and options.appendix)
    layout = results.layout
    if options.what == "tables":
        write_tables(results, layout.tables, "appendix" if options.appendix else "main")
        if not options.appendix:
            write_csv(claims_table(results), layout.tables / "claims.csv")
        print(markdown(main_table(results)), file=sys.stderr)
    elif options.what == "figures":
        write_figures(results, layout.figures)
    else:
        write_report(results, layout.figures, layout.report)


def _options(argv: list[str] | None) -> argparse.Namespace:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = arguments.add_subparsers(dest="what", required=True)
    for name in ("tables", "figures", "report"):
        command = commands.add_parser(name)
        command.add_argument("--config", nargs="+", required=True, metavar="FILE")
        if name == "tables":
            command.add_argument(
                "--appendix", action="store_true", help="the models of report.appendix"
            )
    return arguments.parse_args(argv)


if __name__ == "__main__":
    run_stage(main)
