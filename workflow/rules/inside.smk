# Seeing inside the chain: files and figures of each latent model, and their page.

INSIDE = LAYOUT.inside("{model}", "{seed}", "{dataset}")
# Only what draws and writes: the study's own code counts by RECIPE.
INSIDE_PAGE_CODE = sorted(
    planning.shown(PROJECT_ROOT / "src/latent_reasoning/inside" / name)
    for name in ("page.py", "page.html.jinja", "findings.py")
)


rule look_inside:
    input:
        model=lambda wildcards: model_input(wildcards.model, wildcards.seed),
        rows=lambda wildcards: rows(wildcards.dataset, probe_rows(wildcards.dataset)),
    output:
        directory(INSIDE),
    log:
        log_file("inside", "{model}", "seed-{seed}", "{dataset}"),
    benchmark:
        benchmark_file("inside", "{model}", "seed-{seed}", "{dataset}")
    conda:
        "../../environment.yml"
    threads: RUNTIME.threads
    resources:
        gpu=GPU,
        gpu_model=GPU_MODEL,
        mem_mb=lambda wildcards: memory_mb(evaluation_need(EXPERIMENT, wildcards.model)),
        runtime=lambda wildcards: minutes(evaluation_need(EXPERIMENT, wildcards.model)),
    params:
        config=CONFIG,
        digest=lambda wildcards: science_digest(EXPERIMENT, "inside", wildcards.model),
    message:
        "Looking inside {wildcards.model}, seed {wildcards.seed}, on {wildcards.dataset}"
    shell:
        "python -m latent_reasoning.inside --config {params.config:q} --digest {params.digest} "
        "--model {wildcards.model} --seed {wildcards.seed} --dataset {wildcards.dataset} "
        "> {log:q} 2>&1"


rule inside_page:
    input:
        studies=[
            LAYOUT.inside(model, seed, dataset)
            for model in inside_models(EXPERIMENT)
            for seed in EXPERIMENT.seeds
            for dataset in EXPERIMENT.inside.datasets
        ],
        code=INSIDE_PAGE_CODE,
    output:
        report(LAYOUT.inside_page, caption="../report/inside.rst", category="Page"),
    log:
        log_file("inside_page"),
    benchmark:
        benchmark_file("inside_page")
    conda:
        "../../environment.yml"
    params:
        title=f"{EXPERIMENT.report.title}: inside the chain",
    message:
        "Writing the page {output}"
    shell:
        "python -m latent_reasoning.inside.page --title {params.title:q} --output {output:q} "
        "{input.studies:q} > {log:q} 2>&1"
