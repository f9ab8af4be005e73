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
        model=models_of("rl"),
    retries: TRAINING_RETRIES
    conda:
        "../../environment.yml"
    threads: RUNTIME.threads * RUNTIME.processes
    resources:
        gpu=GPU * RUNTIME.processes,
        gpu_model=GPU_MODEL,
        nodes=1,  # of a cluster: the processes of a training share a host
        mem_mb=memory_of(training_need, RUNTIME.processes),
        runtime=minutes_of(training_need),
    params:
        config=CONFIG,
        digest=science("model"),
    message:
        "RL: {wildcards.model}, seed {wildcards.seed}"
    shell:
        "exec python -m latent_reasoning.rl --config {params.config:q} --digest {params.digest} "
        "--model {wildcards.model} --seed {wildcards.seed} > {log:q} 2>&1"
