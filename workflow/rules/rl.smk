# Reinforcement learning of when to stop.


rule rl:
    input:
        tracking=ancient(TRACKING_STORE),
        rows=rows("rl", "validation"),
        parents=parents,
    output:
        directory(MODEL),
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
        nodes=1,  # of a cluster: the processes of a training share a host
        mem_mb=RUNTIME.memory_mb * RUNTIME.processes,
        runtime=RUNTIME.runtime_minutes,
    params:
        config=CONFIG,
        digest=science("model"),
    message:
        "RL: {wildcards.model}, seed {wildcards.seed}"
    shell:
        "exec python -m latent_reasoning.rl --config {params.config} --digest {params.digest} "
        "--model {wildcards.model} --seed {wildcards.seed} > {log} 2>&1"
