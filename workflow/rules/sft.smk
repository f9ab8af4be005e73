# Supervised fine-tuning. Checkpoints lie outside the declared outputs: a killed job goes on from them.


rule sft:
    input:
        tracking=ancient(TRACKING_STORE),
        rows=training_rows,
        parents=parents,
    output:
        directory(MODEL),
    log:
        log_file("sft", "{model}", "seed-{seed}"),
    benchmark:
        benchmark_file("sft", "{model}", "seed-{seed}")
    wildcard_constraints:
        model=models_of("sft"),
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
        content=content(planning.content_of_model, "model"),
    message:
        "Token SFT: {wildcards.model}, seed {wildcards.seed}"
    shell:
        "exec python -m latent_reasoning.sft --config {params.config} --digest {params.digest} "
        "--model {wildcards.model} --seed {wildcards.seed} > {log} 2>&1"


use rule sft as latent_sft with:
    log:
        log_file("latent_sft", "{model}", "seed-{seed}"),
    benchmark:
        benchmark_file("latent_sft", "{model}", "seed-{seed}")
    wildcard_constraints:
        model=models_of("latent_sft"),
    message:
        "Latent SFT: {wildcards.model}, seed {wildcards.seed}"
