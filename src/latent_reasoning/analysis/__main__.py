"""Tables, figures and the report of an experiment, from the files under `results/`.

    python -m latent_reasoning.analysis {tables|appendix|ablations|figures|report} --config FILE..

`tables` and `appendix` write the tables of the main models and of `report.appendix`, `ablations`
the table and the figure of `report.ablations`.
"""

from __future__ import annotations

import argparse

import matplotlib

from latent_reasoning.analysis.ablations import ablations_figure, ablations_table
from latent_reasoning.analysis.claims import claims_table
from latent_reasoning.analysis.figures import write_figures
from latent_reasoning.analysis.report import write_report
from latent_reasoning.analysis.results import Results
from latent_reasoning.analysis.style import STYLE, save
from latent_reasoning.analysis.tables import (
    main_table,
    markdown,
    write_csv,
    write_main_table,
    write_tables,
)
from latent_reasoning.config import digest, dump, load
from latent_reasoning.runtime.command import run_stage
from latent_reasoning.runtime.tracking import open_tracker


def main(argv: list[str] | None = None) -> None:
    """Make the output that the first argument names."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("what", choices=MAKERS, help="what to make")
    arguments.add_argument("--config", nargs="+", required=True, metavar="FILE")
    options = arguments.parse_args(argv)
    results = Results.of(load(options.config), appendix=options.what == "appendix")
    MAKERS[options.what](results)


def make_tables(results: Results) -> None:
    """Write every table of the main models, and print the main table."""
    write_tables(results, results.layout.tables)
    write_csv(claims_table(results), results.layout.tables / "claims.csv")
    print(markdown(main_table(results)))


def make_appendix(results: Results) -> None:
    """Write and print the main table of the appendix's models."""
    write_main_table(results, results.layout.tables, "appendix")
    print(markdown(main_table(results)))


def make_ablations(results: Results) -> None:
    """Write the table of the ablations and draw their figure."""
    table, layout = ablations_table(results), results.layout
    write_csv(table, layout.tables / "ablations.csv")
    with matplotlib.rc_context(STYLE):
        save(ablations_figure(results), layout.figures, "ablations")
    print(table.to_string(index=False))


def make_figures(results: Results) -> None:
    """Draw every figure, and log the PNG files to tracking."""
    write_figures(results, results.layout.figures)
    experiment = results.experiment
    tracker = open_tracker(
        experiment,
        model="all",
        seed=results.seeds[0],
        stage="figures",
        digest=digest(dump(experiment)),
    )
    for path in sorted(results.layout.figures.glob("*.png")):
        tracker.log_artifact(path)
    tracker.close()


def make_report(results: Results) -> None:
    """Write the report page; the figures must have been drawn."""
    write_report(results, results.layout.figures, results.layout.report)


MAKERS = {
    "tables": make_tables,
    "appendix": make_appendix,
    "ablations": make_ablations,
    "figures": make_figures,
    "report": make_report,
}


if __name__ == "__main__":
    run_stage(main)
