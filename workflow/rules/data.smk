# Raw rows -> filtered, split rows, each split with a digest that the later rules compare.


rule prepare_data:
    output:
        rows=[LAYOUT.data(split) for split in SPLITS],
        digests=[LAYOUT.data_digest(split) for split in SPLITS],
        summary=LAYOUT.data_summary,
    log:
        log_file("prepare_data"),
    benchmark:
        benchmark_file("prepare_data")
    retries: 3 if EXPERIMENT.data.source == "hub" else None
    conda:
        "../../environment.yml"
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        config=CONFIG,
        digest=science_digest(EXPERIMENT, "data"),
        content=lambda wildcards: content(fingerprints.content_of_rows),
    message:
        "Preparing the rows of {EXPERIMENT.experiment}"
    shell:
        "python -m latent_reasoning.data --config {params.config:q} --digest {params.digest} "
        "> {log:q} 2>&1"


rule prepare_test_set:
    input:
        rows("sft", "rl"),  # to count the questions that stand there too
    output:
        rows=LAYOUT.data("{dataset}"),
        digest=LAYOUT.data_digest("{dataset}"),
        summary=LAYOUT.test_set_summary("{dataset}"),
    log:
        log_file("prepare_test_set", "{dataset}"),
    benchmark:
        benchmark_file("prepare_test_set", "{dataset}")
    wildcard_constraints:
        dataset="|".join(EXPERIMENT.data.extra_tests) or "(?!)",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        config=CONFIG,
        digest=science_digest(EXPERIMENT, "test_set"),
        content=lambda wildcards: content(fingerprints.content_of_test_set, wildcards.dataset),
    message:
        "Preparing the test set {wildcards.dataset}"
    shell:
        "python -m latent_reasoning.data --config {params.config:q} --digest {params.digest} "
        "--dataset {wildcards.dataset} > {log:q} 2>&1"


rule tracking_store:
    output:
        touch(TRACKING_STORE),
    log:
        log_file("tracking_store"),
    benchmark:
        benchmark_file("tracking_store")
    conda:
        "../../environment.yml"
    params:
        config=CONFIG,
    message:
        "Creating the tracking store, so that parallel trainings find it"
    shell:
        "python -m latent_reasoning.runtime.tracking --config {params.config:q} > {log:q} 2>&1"
