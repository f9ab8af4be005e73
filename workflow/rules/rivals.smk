# Other published methods: their trainings, and other ways to decode a model that is there.


rule curriculum:
    input:
        tracking=ancient(TRACKING_STORE),
        rows=training_rows,
        parents=parents,
    output:
        folder=directory(MODEL),
        digest=MODEL_DIGEST,
    log:
        log_file("curriculum", "{model}", "seed-{seed}"),
    benchmark:
        benchmark_file("curriculum", "{model}", "seed-{seed}")
    wildcard_constraints:
        model=planning.models_of(EXPERIMENT, "curriculum"),
    priority: 2  # others may start from its model
    retries: TRAINING_RETRIES
    conda:
        "../../environment.yml"
    threads: RUNTIME.threads * RUNTIME.processes
    resources:
        gpu=GPU * RUNTIME.processes,
        gpu_model=GPU_MODEL,
        nodes=1,  # of a cluster: the processes of a training share a host
        mem_mb=lambda wildcards: memory_mb(
            training_need(EXPERIMENT, wildcards.model), RUNTIME.processes
        ),
        runtime=lambda wildcards: minutes(training_need(EXPERIMENT, wildcards.model)),
    params:
        config=CONFIG,
        digest=lambda wildcards: science_digest(EXPERIMENT, "model", wildcards.model),
        content=lambda wildcards: content(fingerprints.content_of_model, wildcards.model),
    message:
        "Curriculum: {wildcards.model}, seed {wildcards.seed}"
    shell:
        "exec python -m latent_reasoning.rivals --config {params.config:q} "
        "--digest {params.digest} --model {wildcards.model} --seed {wildcards.seed} "
        "> {log:q} 2>&1"


use rule curriculum as teacher_forced with:
    log:
        log_file("teacher_forced", "{model}", "seed-{seed}"),
    benchmark:
        benchmark_file("teacher_forced", "{model}", "seed-{seed}")
    wildcard_constraints:
        model=planning.models_of(EXPERIMENT, "teacher_forced"),
    message:
        "Teacher-forced SFT: {wildcards.model}, seed {wildcards.seed}"


use rule curriculum as policy with:
    input:
        tracking=ancient(TRACKING_STORE),
        rows=rows("rl", "validation"),
        parents=parents,
    log:
        log_file("policy", "{model}", "seed-{seed}"),
    benchmark:
        benchmark_file("policy", "{model}", "seed-{seed}")
    wildcard_constraints:
        model=planning.models_of(EXPERIMENT, "policy"),
    message:
        "RL of another policy: {wildcards.model}, seed {wildcards.seed}"


use rule curriculum as decode with:
    input:
        parents=parents,
    log:
        log_file("decode", "{model}", "seed-{seed}"),
    benchmark:
        benchmark_file("decode", "{model}", "seed-{seed}")
    wildcard_constraints:
        model=planning.models_of(EXPERIMENT, "decode"),
    priority: 0
    threads: RUNTIME.threads
    resources:
        gpu=0,
        mem_mb=lambda wildcards: memory_mb(training_need(EXPERIMENT, wildcards.model)),
        runtime=lambda wildcards: minutes(training_need(EXPERIMENT, wildcards.model)),
    message:
        "Another way to decode: {wildcards.model}, seed {wildcards.seed}"
