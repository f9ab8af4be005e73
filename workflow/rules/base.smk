# The model everything starts from, and models that were trained elsewhere.

IMPORTED = [entry.path for entry in EXPERIMENT.models.values() if entry.stage == "import"]
IMPORTS_FROM_HUB = any(path and not is_local(path) for path in IMPORTED)
# Only one that is trained here is work to share.
BASE_PROCESSES = RUNTIME.processes if LAYOUT.base_has_seeds else 1


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
    priority: 4  # all others wait for it
    retries: 3 if EXPERIMENT.base.source == "hub" else TRAINING_RETRIES
    conda:
        "../../environment.yml"
    threads: RUNTIME.threads * BASE_PROCESSES
    resources:
        gpu=GPU * BASE_PROCESSES if LAYOUT.base_has_seeds else 0,
        gpu_model=GPU_MODEL if LAYOUT.base_has_seeds else "",
        nodes=1,  # of a cluster: the processes of a training share a host
        mem_mb=memory_mb(base_need(EXPERIMENT), BASE_PROCESSES),
        runtime=minutes(base_need(EXPERIMENT)),
    params:
        config=CONFIG,
        digest=science_digest(EXPERIMENT, "base"),
        content=lambda wildcards: content(fingerprints.content_of_base),
        seed="{seed}" if LAYOUT.base_has_seeds else 0,
    message:
        "Making the base model ({EXPERIMENT.base.source}): {output.folder}"
    shell:
        "exec python -m latent_reasoning.base --config {params.config:q} --digest {params.digest} "
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
        model=planning.models_of(EXPERIMENT, "import"),
    priority: 4
    retries: 3 if IMPORTS_FROM_HUB else 0
    conda:
        "../../environment.yml"
    threads: RUNTIME.threads
    resources:
        mem_mb=lambda wildcards: memory_mb(training_need(EXPERIMENT, wildcards.model)),
        runtime=lambda wildcards: minutes(training_need(EXPERIMENT, wildcards.model)),
    params:
        config=CONFIG,
        digest=lambda wildcards: science_digest(EXPERIMENT, "model", wildcards.model),
        content=lambda wildcards: content(
            fingerprints.content_of_model, wildcards.model, made(wildcards)
        ),
    message:
        "Bringing in {wildcards.model}"
    shell:
        "python -m latent_reasoning.base --config {params.config:q} --digest {params.digest} "
        "--model {wildcards.model} --seed {wildcards.seed} > {log:q} 2>&1"
