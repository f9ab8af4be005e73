# Adaptive latent reasoning: from raw rows to tables, figures and a page.
#
#   snakemake --cores all                                       the laptop experiment
#   snakemake --cores all --configfile config/paper.yaml        another experiment
#   snakemake -n                                                what would run, and what it costs
#   snakemake --cores all results/laptop/models/latent-6/seed-0 one output by its path
#
# The configuration's keys are in config/README.md; what reruns when is in workflow/README.md.

from snakemake.utils import min_version

min_version("9.13")


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/base.smk"
include: "workflow/rules/sft.smk"
include: "workflow/rules/rl.smk"
include: "workflow/rules/rivals.smk"
include: "workflow/rules/evaluation.smk"
include: "workflow/rules/analysis.smk"
include: "workflow/rules/inside.smk"
include: "workflow/rules/benchmark.smk"


localrules:
    all,
    appendix,
    ablations,
    tuning,
    rivals,
    prepare_test_set,
    tracking_store,
    tables,
    appendix_tables,
    ablations_table,
    tuning_table,
    rivals_table,
    figures,
    report,
    inside,
    inside_page,


rule all:
    default_target: True
    input:
        rules.tables.output,
        rules.figures.output,
        rules.report.output,
    message:
        "{EXPERIMENT.experiment}: done, see {LAYOUT.report}"


rule appendix:
    input:
        rules.appendix_tables.output,
    message:
        "{EXPERIMENT.experiment}: the appendix is done, see {LAYOUT.tables}"


rule inside:
    input:
        rules.inside_page.output,
    message:
        "{EXPERIMENT.experiment}: the chains are looked into, see {LAYOUT.inside_page}"


rule ablations:
    input:
        rules.ablations_table.output,
    message:
        "{EXPERIMENT.experiment}: the ablations are done, see {LAYOUT.tables}"


rule tuning:
    input:
        rules.tuning_table.output,
    message:
        "{EXPERIMENT.experiment}: the trials are done, see {LAYOUT.tables}"


rule rivals:
    input:
        rules.tuning_table.output,
        rules.rivals_table.output,
        rules.report.output,
    message:
        "{EXPERIMENT.experiment}: the rivals are compared, see {LAYOUT.report}"


onstart:
    prepare_results()


onerror:
    explain_disk()
