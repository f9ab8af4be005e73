"""Tables, figures and the report of an experiment, from the files under `results/`.

    python -m latent_reasoning.analysis {tables|appendix|ablations|tuning|rivals|figures|report} \\
        --config FILE..

`tables` and `appendix` write the tables of the main models and of `report.appendix`, `ablations`
the table and the figure of `report.ablations`, `tuning` and `rivals` those of `report.rivals`.
"""

from __future__ import annotations

import argparse

import matplotlib

from latent_reasoning.analysis.ablations import ablations_figure, ablations_table
from latent_reasoning.analysis.claims import claims_table
from latent_reasoning.analysis.figures import write_figures
from latent_reasoning.analysis.report import write_report
from latent_reasoning.analysis.results import Results
from latent_reasoning.analysis.rival_figures import RIVAL_FIGURES
from latent_reasoning.analysis.rivals import (
    RIVALS_TEXTS,
    readable_rivals,
    rivals_paired,
    rivals_table,
    tuning_table,
)
from latent_reasoning.analysis.style import STYLE, save
from latent_reasoning.analysis.tables import (
    latex_of,
    main_table,
    markdown,
    markdown_of,
    write_csv,
    write_main_table,
    write_tables,
)
from latent_reasoning.config import digest, dump, load
from latent_reasoning.runtime.command import run_stage
from latent_reasoning.runtime.files import write_text_atomically
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


def make_tuning(results: Results) -> None:
    """Write and print the table of the rivals' tuning trials."""
    table = tuning_table(results)
    write_csv(table, results.layout.tables / "rivals_tuning.csv")
    print(table.to_string(index=False))


def make_rivals(results: Results) -> None:
    """Write the rivals' tables and draw their figures."""
    table, folder = rivals_table(results), results.layout.tables
    texts = readable_rivals(table)
    markdown_text = "\n".join(markdown_of(text, RIVALS_TEXTS) for text in texts)
    write_csv(table, folder / "rivals.csv")
    write_text_atomically(folder / "rivals.md", markdown_text)
    write_text_atomically(
        folder / "rivals.tex", "\n".join(latex_of(text, RIVALS_TEXTS) for text in texts)
    )
    write_csv(rivals_paired(results), folder / "rivals_paired.csv")
    with matplotlib.rc_context(STYLE):
        for name, draw in RIVAL_FIGURES.items():
            save(draw(results, table), results.layout.figures, name)
    print(markdown_text)


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
    "tuning": make_tuning,
    "rivals": make_rivals,
    "figures": make_figures,
    "report": make_report,
}


if __name__ == "__main__":
    run_stage(main)
