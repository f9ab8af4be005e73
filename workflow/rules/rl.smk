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
    conda:
        "../../environment.yml"
    threads: RUNTIME.threads
    resources:
        gpu=GPU,
        gpu_model=GPU_MODEL,
        mem_mb=memory_of(training_need),
        runtime=minutes_of(training_need),
    params:
        config=CONFIG,
        digest=science("model"),
    message:
        "RL: {wildcards.model}, seed {wildcards.seed}"
    shell:
        "python -m latent_reasoning.rl --config {params.config:q} --digest {params.digest} "
        "--model {wildcards.model} --seed {wildcards.seed} > {log:q} 2>&1"
