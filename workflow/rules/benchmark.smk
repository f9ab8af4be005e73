# How fast the package is against the naive way, on one thread, and how its cost grows; measured anew
# when the code changes.

BENCHMARKS = RESULTS / "benchmarks"
BENCHMARK_CODE = sorted(
    planning.shown(file)
    for folder in ("benchmarks", "src/latent_reasoning")
    for file in (PROJECT_ROOT / folder).rglob("*.py")
)


rule benchmark:
    input:
        code=BENCHMARK_CODE,
    output:
        summary=multiext(str(BENCHMARKS / "summary"), ".csv", ".png", ".svg"),
        scaling=multiext(str(BENCHMARKS / "scaling"), ".csv", ".png", ".svg"),
    log:
        BENCHMARKS / "benchmark.log",
    benchmark:
        BENCHMARKS / "benchmark.tsv"
    conda:
        "../../environment.yml"
    threads: CORES  # nothing may run beside what is timed
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        project=planning.shown(PROJECT_ROOT),
    message:
        "Timing the package against the naive paths: {output.summary[0]}, {output.scaling[0]}"
    shell:
        "export PYTHONPATH={params.project:q}${{PYTHONPATH:+:$PYTHONPATH}}; "
        "python -m benchmarks --output {output.summary[0]:q} 2> {log:q}; "
        "python -m benchmarks.scaling --output {output.scaling[0]:q} 2>> {log:q}"
