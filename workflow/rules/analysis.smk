# Evaluations -> tables -> figures -> the page. These rules are quick and read only results/.

# Their code is an input: an edited figure is drawn again.
ANALYSIS_CODE = sorted(
    planning.shown(file) for file in PROJECT_ROOT.glob("src/latent_reasoning/analysis/*.py")
)
# The page's template and captions are its code too.
PAGE_TEXTS = sorted(
    planning.shown(file)
    for pattern in ("src/latent_reasoning/analysis/*.jinja", "workflow/report/*.rst")
    for file in PROJECT_ROOT.glob(pattern)
)


rule tables:
    input:
        evaluations=evaluations(MAIN),
        code=ANALYSIS_CODE,
    output:
        main=[
            report(
                LAYOUT.tables / "main.csv",
                caption="../report/main_table.rst",
                category="Tables",
            ),
            LAYOUT.tables / "main.md",
            LAYOUT.tables / "main.tex",
        ],
        others=[
            report(
                LAYOUT.tables / f"{name}.csv",
                caption=f"../report/{name}_table.rst",
                category="Tables",
            )
            for name in TABLES
        ],
    log:
        log_file("tables"),
    benchmark:
        benchmark_file("tables")
    conda:
        "../../environment.yml"
    params:
        config=CONFIG,
        what="tables",
        report=planning.report_digest(EXPERIMENT, "main", "published", "rl_from", "claims"),
    message:
        "Writing the tables"
    shell:
        "python -m latent_reasoning.analysis {params.what} --config {params.config:q} "
        "> {log:q} 2>&1"


use rule tables as appendix_tables with:
    input:
        evaluations=evaluations(APPENDIX),
        code=ANALYSIS_CODE,
    output:
        report(
            LAYOUT.tables / "appendix.csv",
            caption="../report/appendix_table.rst",
            category="Tables",
        ),
        LAYOUT.tables / "appendix.md",
        LAYOUT.tables / "appendix.tex",
    log:
        log_file("appendix_tables"),
    benchmark:
        benchmark_file("appendix_tables")
    params:
        what="appendix",
        report=planning.report_digest(EXPERIMENT, "appendix", "published", "rl_from"),
    message:
        "Writing the appendix's table"


use rule tables as ablations_table with:
    input:
        evaluations=evaluations(planning.ablation_models(EXPERIMENT)),
        code=ANALYSIS_CODE,
    output:
        report(
            LAYOUT.tables / "ablations.csv",
            caption="../report/ablations_table.rst",
            category="Tables",
        ),
        report(
            LAYOUT.figures / "ablations.svg",
            caption="../report/ablations.rst",
            category="Figures",
        ),
        LAYOUT.figures / "ablations.png",
    log:
        log_file("ablations"),
    benchmark:
        benchmark_file("ablations")
    params:
        what="ablations",
        report=planning.report_digest(EXPERIMENT, "ablations"),
    message:
        "Writing the ablations' table and figure"


use rule tables as tuning_table with:
    input:
        evaluations=[
            LAYOUT.evaluation(model, EXPERIMENT.seeds[0], "validation") / file
            for model in planning.trial_models(EXPERIMENT)
            for file in EVALUATION_FILES
        ],
        code=ANALYSIS_CODE,
    output:
        report(
            LAYOUT.tables / "rivals_tuning.csv",
            caption="../report/rivals_tuning_table.rst",
            category="Tables",
        ),
    log:
        log_file("tuning"),
    benchmark:
        benchmark_file("tuning")
    params:
        what="tuning",
        report=planning.report_digest(EXPERIMENT, "rivals"),
    message:
        "Writing the table of the tuning trials"


use rule tables as rivals_table with:
    input:
        evaluations=evaluations(RIVALS),
        timings=[LAYOUT.timing(model) for model in RIVALS],
        models=trained(RIVALS),
        rows=rows("sft") if RIVALS else [],
        code=ANALYSIS_CODE,
    output:
        [
            report(
                LAYOUT.tables / f"{name}.csv",
                caption=f"../report/{name}_table.rst",
                category="Tables",
            )
            for name in RIVALS_TABLES
        ],
        LAYOUT.tables / "rivals.md",
        LAYOUT.tables / "rivals.tex",
        [
            report(
                LAYOUT.figures / f"{name}.svg",
                caption=f"../report/{name}.rst",
                category="Figures",
            )
            for name in RIVALS_FIGURES
        ],
        [LAYOUT.figures / f"{name}.png" for name in RIVALS_FIGURES],
    log:
        log_file("rivals"),
    benchmark:
        benchmark_file("rivals")
    params:
        what="rivals",
        report=planning.report_digest(EXPERIMENT, "rivals"),
    message:
        "Writing the rivals' tables and figures"


use rule tables as figures with:
    input:
        evaluations=evaluations(MAIN),
        models=trained(MAIN),
        code=ANALYSIS_CODE,
    output:
        svg=[
            report(
                LAYOUT.figures / f"{name}.svg",
                caption=f"../report/{name}.rst",
                category="Figures",
            )
            for name in FIGURES
        ],
        png=[LAYOUT.figures / f"{name}.png" for name in FIGURES],
    log:
        log_file("figures"),
    benchmark:
        benchmark_file("figures")
    params:
        what="figures",
        report=planning.report_digest(EXPERIMENT, "main", "rl_from"),
    message:
        "Drawing the figures"


use rule tables as report with:
    input:
        tables=rules.tables.output,
        figures=rules.figures.output,
        rivals=[*rules.tuning_table.output, *rules.rivals_table.output] if RIVALS else [],
        data=LAYOUT.data_summary,
        code=[*ANALYSIS_CODE, *PAGE_TEXTS],
    output:
        report(LAYOUT.report, caption="../report/report.rst", category="Page"),
    log:
        log_file("report"),
    benchmark:
        benchmark_file("report")
    params:
        what="report",
        report=planning.report_digest(
            EXPERIMENT,
            "title",
            "notes",
            "main",
            "published",
            "rl_from",
            "claims",
            *(["rivals"] if RIVALS else []),
        ),
    message:
        "Writing the page {output}"
