# Evaluations -> tables -> figures -> the page. These rules are quick and read only results/.


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
    threads: 1
    resources:
        gpu=0,
        mem_mb=2000,
        runtime=30,
    params:
        config=CONFIG,
        report=report_digest("main", "published", "rl_from"),
    message:
        "Writing the tables"
    shell:
        "python -m latent_reasoning.analysis tables --config {params.config:q} > {log:q} 2>&1"


rule appendix_tables:
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
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=2000,
        runtime=30,
    params:
        config=CONFIG,
        report=report_digest("appendix", "published"),
    message:
        "Writing the appendix's table"
    shell:
        "python -m latent_reasoning.analysis appendix --config {params.config:q} " "> {log:q} 2>&1"


rule figures:
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
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=2000,
        runtime=30,
    params:
        config=CONFIG,
        report=report_digest("main", "rl_from"),
    message:
        "Drawing the figures"
    shell:
        "python -m latent_reasoning.analysis figures --config {params.config:q} > {log:q} 2>&1"


rule report:
    input:
        tables=rules.tables.output,
        figures=rules.figures.output,
        data=LAYOUT.data_summary,
        code=ANALYSIS_CODE,
    output:
        report(LAYOUT.report, caption="../report/report.rst", category="Page"),
    log:
        log_file("report"),
    benchmark:
        benchmark_file("report")
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=2000,
        runtime=30,
    params:
        config=CONFIG,
        report=report_digest("title", "notes", "main", "published", "rl_from"),
    message:
        "Writing the page {output}"
    shell:
        "python -m latent_reasoning.analysis report --config {params.config:q} > {log:q} 2>&1"
