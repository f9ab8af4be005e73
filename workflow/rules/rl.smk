# Reinforcement learning of when to stop.


rule rl:
    input:
        tracking=ancient(TRACKING_STORE),
        rows=rows("rl", "validation"),
        parents=parents,
    output:
        folder=directory(MODEL),
        digest=MODEL_DIGEST,
    log:
        log_file("rl", "{model}", "seed-{seed}"),
    benchmark:
        benchmark_file("rl", "{model}", "seed-{seed}")
    wildcard_constraints:
        model=planning.models_of(EXPERIMENT, "rl"),
    priority: 2  # the longest of the last trainings
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
    message:
        "RL: {wildcards.model}, seed {wildcards.seed}"
    shell:
        "exec python -m latent_reasoning.rl --config {params.config:q} --digest {params.digest} "
        "--model {wildcards.model} --seed {wildcards.seed} > {log:q} 2>&1"
