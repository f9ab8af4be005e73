# Greedy evaluation of a model on a data set: adaptive, and at every forced number of latent steps.


rule evaluate:
    input:
        model=lambda wildcards: model_input(wildcards.model, wildcards.seed),
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
        gpu_model=GPU_MODEL,
        mem_mb=lambda wildcards: memory_mb(evaluation_need(EXPERIMENT, wildcards.model)),
        runtime=lambda wildcards: minutes(evaluation_need(EXPERIMENT, wildcards.model)),
    params:
        config=CONFIG,
        digest=lambda wildcards: science_digest(EXPERIMENT, "evaluation", wildcards.model),
    message:
        "Evaluating {wildcards.model}, seed {wildcards.seed}, on {wildcards.dataset}"
    shell:
        "python -m latent_reasoning.evaluation --config {params.config:q} --digest {params.digest} "
        "--model {wildcards.model} --seed {wildcards.seed} --dataset {wildcards.dataset} "
        "> {log:q} 2>&1"


rule time_rows:
    input:
        model=lambda wildcards: model_input(wildcards.model, EXPERIMENT.seeds[0]),
        rows=lambda wildcards: rows(EXPERIMENT.evaluation.datasets[0]),
    output:
        LAYOUT.timing("{model}"),
    log:
        log_file("timings", "{model}"),
    benchmark:
        benchmark_file("timings", "{model}")
    conda:
        "../../environment.yml"
    threads: max(CORES, RUNTIME.threads)  # nothing may run beside what is timed
    resources:
        gpu=GPU,
        gpu_model=GPU_MODEL,
        mem_mb=lambda wildcards: memory_mb(evaluation_need(EXPERIMENT, wildcards.model)),
        runtime=lambda wildcards: minutes(evaluation_need(EXPERIMENT, wildcards.model)),
    params:
        config=CONFIG,
        seed=EXPERIMENT.seeds[0],
        digest=lambda wildcards: science_digest(EXPERIMENT, "evaluation", wildcards.model),
    message:
        "Timing a row of {wildcards.model}"
    shell:
        "python -m latent_reasoning.evaluation.timing --config {params.config:q} "
        "--digest {params.digest} --model {wildcards.model} --seed {params.seed} > {log:q} 2>&1"
