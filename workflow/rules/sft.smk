# Supervised fine-tuning. Checkpoints lie outside the declared outputs: a killed job goes on from them.


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
        model=models_of("sft"),
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
        content=content(planning.content_of_model, "model"),
    message:
        "Token SFT: {wildcards.model}, seed {wildcards.seed}"
    shell:
        "python -m latent_reasoning.sft --config {params.config:q} --digest {params.digest} "
        "--model {wildcards.model} --seed {wildcards.seed} > {log:q} 2>&1"


use rule sft as latent_sft with:
    log:
        log_file("latent_sft", "{model}", "seed-{seed}"),
    benchmark:
        benchmark_file("latent_sft", "{model}", "seed-{seed}")
    wildcard_constraints:
        model=models_of("latent_sft"),
    message:
        "Latent SFT: {wildcards.model}, seed {wildcards.seed}"
