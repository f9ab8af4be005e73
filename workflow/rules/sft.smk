# Supervised fine-tuning. Checkpoints lie outside the declared outputs: a killed job resumes from them.


rule sft:
    input:
        tracking=ancient(TRACKING_STORE),
        rows=training_rows,
        parents=parents,
    output:
        folder=directory(MODEL),
        digest=MODEL_DIGEST,
    log:
        log_file("sft", "{model}", "seed-{seed}"),
    benchmark:
        benchmark_file("sft", "{model}", "seed-{seed}")
    wildcard_constraints:
        model=planning.models_of(EXPERIMENT, "sft"),
    priority: 1  # before evaluations, for which no training waits
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
        "Token SFT: {wildcards.model}, seed {wildcards.seed}"
    shell:
        "exec python -m latent_reasoning.sft --config {params.config:q} --digest {params.digest} "
        "--model {wildcards.model} --seed {wildcards.seed} > {log:q} 2>&1"


use rule sft as latent_sft with:
    log:
        log_file("latent_sft", "{model}", "seed-{seed}"),
    benchmark:
        benchmark_file("latent_sft", "{model}", "seed-{seed}")
    wildcard_constraints:
        model=planning.models_of(EXPERIMENT, "latent_sft"),
    priority: 3  # RL waits for it
    message:
        "Latent SFT: {wildcards.model}, seed {wildcards.seed}"
