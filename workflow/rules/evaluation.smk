# Greedy evaluation of a model on a data set: adaptive, and at every forced number of latent steps.


rule evaluate:
    input:
        model=MODEL,
        rows=lambda wildcards: rows(wildcards.dataset),
    output:
        [EVALUATION / file for file in EVALUATION_FILES],
    log:
        log_file("evaluate", "{model}", "seed-{seed}", "{dataset}"),
    benchmark:
        benchmark_file("evaluate", "{model}", "seed-{seed}", "{dataset}")
    conda:
        "../../environment.yml"
    threads: RUNTIME.threads
    resources:
        gpu=GPU,
        mem_mb=RUNTIME.memory_mb,
        runtime=RUNTIME.runtime_minutes,
    params:
        config=CONFIG,
        digest=science("evaluation"),
    message:
        "Evaluating {wildcards.model}, seed {wildcards.seed}, on {wildcards.dataset}"
    shell:
        "python -m latent_reasoning.evaluation --config {params.config:q} --digest {params.digest} "
        "--model {wildcards.model} --seed {wildcards.seed} --dataset {wildcards.dataset} "
        "> {log:q} 2>&1"
