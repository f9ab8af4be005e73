# The model everything starts from, and models that were trained elsewhere.


rule base_model:
    input:
        tracking=ancient(TRACKING_STORE) if LAYOUT.base_has_seeds else [],
        rows=rows("sft", "validation") if LAYOUT.base_has_seeds else [],
    output:
        folder=directory(BASE),
        digest=BASE_DIGEST,
    log:
        log_file("base_model", BASE.name),
    benchmark:
        benchmark_file("base_model", BASE.name)
    retries: 3 if EXPERIMENT.base.source == "hub" else 0
    conda:
        "../../environment.yml"
    threads: RUNTIME.threads
    resources:
        gpu=GPU if LAYOUT.base_has_seeds else 0,
        gpu_model=GPU_MODEL if LAYOUT.base_has_seeds else "",
        mem_mb=memory_of(base_need),
        runtime=minutes_of(base_need),
    params:
        config=CONFIG,
        digest=science("base"),
        content=content(planning.content_of_base),
        seed="{seed}" if LAYOUT.base_has_seeds else 0,
    message:
        "Making the base model ({EXPERIMENT.base.source}): {output.folder}"
    shell:
        "python -m latent_reasoning.model --config {params.config:q} --digest {params.digest} "
        "--seed {params.seed} > {log:q} 2>&1"


rule import_model:
    input:
        parents=parents,
    output:
        folder=directory(MODEL),
        digest=MODEL_DIGEST,
    log:
        log_file("import_model", "{model}", "seed-{seed}"),
    benchmark:
        benchmark_file("import_model", "{model}", "seed-{seed}")
    wildcard_constraints:
        model=models_of("import"),
    retries: 3 if IMPORTS_FROM_HUB else 0
    conda:
        "../../environment.yml"
    threads: RUNTIME.threads
    resources:
        gpu=0,
        mem_mb=memory_of(training_need),
        runtime=minutes_of(training_need),
    params:
        config=CONFIG,
        digest=science("model"),
        content=content(planning.content_of_model, "model"),
    message:
        "Bringing in {wildcards.model}"
    shell:
        "python -m latent_reasoning.model --config {params.config:q} --digest {params.digest} "
        "--model {wildcards.model} --seed {wildcards.seed} > {log:q} 2>&1"
