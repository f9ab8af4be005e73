"""What a dry run lists for the shipped experiments, and what the workflow does before any job."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest

from latent_reasoning.config import PROJECT_ROOT, dump_yaml, load
from latent_reasoning.dag.cost import device_of, evaluation_need, training_need
from latent_reasoning.dag.planning import trial_models
from tests.workflow.workflow_tools import (
    environment,
    plan,
    planned_jobs,
    run,
    snakemake,
    with_stand_ins,
)

CONFIG = PROJECT_ROOT / "config"
SIX = ("cot-sft", "no-cot-sft", "latent-6", "latent-6-by-1", "latent-6-rl", "latent-6-by-1-rl")
FIVE = ("codi", "codi-intermediate", "meaned", "meaned-intermediate", "meaned-codi")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder whose `results/` the workflow uses; raw files are small stand-ins."""
    data = tmp_path / "raw"
    for name in ("gsm8k_aug", "ood"):
        (data / name).mkdir(parents=True)
    for name in ("gsm_hard", "svamp", "multiarith"):
        (data / "ood" / f"{name}.jsonl").write_text("{}\n", encoding="utf-8")
    (data / "SmolLM2-135M.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("LATENT_REASONING_DATA", str(data))
    monkeypatch.setenv("LATENT_REASONING_BASE", str(data / "SmolLM2-135M.gguf"))
    monkeypatch.setenv("LATENT_REASONING_RESULTS", str(tmp_path / "results"))
    return tmp_path


def rules(jobs: set[str]) -> Counter[str]:
    return Counter(job.split(":")[0] for job in jobs)


def evaluated(models: tuple[str, ...]) -> set[str]:
    return {f"evaluate:{model}:test:0" for model in models}


def imported(models: tuple[str, ...]) -> set[str]:
    return {f"import_model:{model}:0" for model in models} | evaluated(models)


PAGES = {"tables", "figures", "report"}
PREPARED = {"prepare_data", "tracking_store", "base_model"}


@pytest.mark.parametrize(
    ("config", "targets", "jobs"),
    [
        (
            "paper",
            (),
            {
                *PREPARED,
                *(f"sft:{model}:0" for model in SIX[:2]),
                *(f"latent_sft:{model}:0" for model in SIX[2:4]),
                *(f"rl:{model}:0" for model in SIX[4:]),
                *evaluated(SIX),
                *PAGES,
            },
        ),
        (
            "paper",
            ("appendix",),
            {
                *PREPARED,
                *(f"latent_sft:{model}:0" for model in FIVE),
                *evaluated(FIVE),
                "appendix_tables",
            },
        ),
        ("published", (), {"prepare_data", *imported(SIX), *PAGES}),
        ("published", ("appendix",), {"prepare_data", *imported(FIVE), "appendix_tables"}),
        (
            "laptop",
            ("results/laptop/models/latent-6-rl/seed-0",),
            {
                *("prepare_data", "tracking_store", "base_model:0"),
                *("latent_sft:latent-6:0", "rl:latent-6-rl:0"),
            },
        ),
        (
            "laptop",
            ("inside",),
            {
                *("prepare_data", "tracking_store", "base_model:0"),
                *("latent_sft:latent-6:0", "rl:latent-6-rl:0"),
                *(f"look_inside:{model}:test:0" for model in ("latent-6", "latent-6-rl")),
                "inside_page",
            },
        ),
    ],
)
def test_an_experiment_or_a_target_lists_exactly_its_jobs(folder, config, targets, jobs):
    assert plan(folder, CONFIG / f"{config}.yaml", targets=targets) == jobs


@pytest.mark.parametrize(("overlay", "seeds"), [("laptop-5seeds", 5), ("laptop-sre", 3)])
def test_seeds_multiply_everything_from_the_base_on(folder, overlay, seeds):
    jobs = plan(folder, CONFIG / "laptop.yaml", CONFIG / f"{overlay}.yaml")
    once = {"base_model": 1, "sft": 2, "latent_sft": 2, "rl": 2, "evaluate": 6}
    times = {rule: seeds * count for rule, count in once.items()}
    assert rules(jobs) == times | dict.fromkeys(["prepare_data", "tracking_store", *PAGES], 1)


def test_the_estimators_are_compared_from_one_latent_model_a_seed(folder):
    files = (CONFIG / f"laptop{name}.yaml" for name in ("", "-sre", "-estimators"))
    jobs = plan(folder, *files)
    assert {job for job in jobs if job.startswith(("sft", "latent_sft", "rl"))} == {
        *(f"latent_sft:latent-6:{seed}" for seed in range(3)),
        *(f"rl:{model}:{seed}" for model in ("rl-sampled", "rl-exact") for seed in range(3)),
    }


def test_ablations_train_and_evaluate_each_change_before_and_after_rl(folder):
    files = (CONFIG / f"laptop{name}.yaml" for name in ("", "-ablations"))
    jobs = rules(plan(folder, *files, targets=("ablations",)))
    assert (jobs["latent_sft"], jobs["rl"], jobs["evaluate"]) == (39, 39, 78)
    assert "sft" not in jobs
    assert jobs["ablations_table"] == 1


def test_rivals_are_trained_timed_and_compared_and_their_trials_judged_by_validation(folder):
    over = folder / "over.yaml"
    over.write_text(
        "report: {rivals: {trials: {more: [latent-6-by-1, meaned]}, failed: {meaned: diverged}}}\n",
        encoding="utf-8",
    )
    files = (*(CONFIG / f"{name}.yaml" for name in ("laptop", "laptop-sre", "rivals")), over)
    experiment = load(list(files))
    rivals = set(experiment.report.rivals.models)
    jobs = plan(folder, *files, targets=("rivals",))
    assert {job for job in jobs if job.startswith("time_rows")} == {
        f"time_rows:{model}" for model in rivals
    }
    assert {f"evaluate:{model}:test:{seed}" for model in rivals for seed in range(3)} <= jobs
    trials = {f"evaluate:{model}:validation:0" for model in trial_models(experiment)}
    assert "evaluate:latent-6-by-1:validation:0" in trials
    assert {job for job in jobs if ":validation:" in job} == trials
    assert not any("meaned" in job for job in jobs)
    assert {"rivals_table", "tuning_table", *PAGES} <= jobs
    tuning = plan(folder, *files, targets=("tuning",))
    assert {job for job in tuning if job.startswith("evaluate")} == trials


@pytest.mark.parametrize(
    ("below", "name"),
    [("smollm2", "rivals-smollm2"), ("paper", "rivals-paper")],
)
def test_the_rivals_of_the_larger_experiments_are_planned(folder, below, name):
    files = (CONFIG / f"{below}.yaml", CONFIG / f"{name}.yaml")
    rivals = load(list(files)).report.rivals.models
    jobs = plan(folder, *files, targets=("rivals",))
    assert {f"time_rows:{model}" for model in rivals} <= jobs
    assert rules(jobs)["evaluate"] % (3 * len(rivals)) == 0


def test_the_harder_task_has_the_control_of_rl(folder):
    files = (CONFIG / f"laptop{name}.yaml" for name in ("", "-hard"))
    jobs = plan(folder, *files)
    assert "latent_sft:latent-6-further:0" in jobs
    assert rules(jobs)["evaluate"] == 25


def test_real_rows_and_weights_take_the_same_rules(folder):
    jobs = plan(folder, CONFIG / "smollm2.yaml", CONFIG / "smollm2-cpu.yaml")
    assert rules(jobs)["evaluate"] == 7
    assert "import_model:smollm2-base:0" in jobs
    four = plan(folder, CONFIG / "smollm2.yaml")
    assert rules(four)["evaluate"] == 28
    assert rules(four)["prepare_test_set"] == 3


def test_figures_are_a_target_without_the_page(folder):
    jobs = plan(folder, CONFIG / "laptop.yaml", targets=("figures",))
    assert "report" not in jobs
    assert "figures" in jobs


# ------------------------------------------------------------------------- the configuration


STORE = "results/{}/tracking.ready"
"""A target whose rule is quick: a run for it writes the resolved configuration first."""


def test_an_experiment_resolves_alike_where_there_is_no_laptop_yaml(folder):
    """`configfile:` would merge the default experiment under every other one."""
    project = folder / "project"
    for part in ("src", "workflow", "config"):
        shutil.copytree(PROJECT_ROOT / part, project / part)
    for part in ("Snakefile", "environment.yml"):
        shutil.copy(PROJECT_ROOT / part, project)
    (project / "config" / "laptop.yaml").unlink()
    command = ["-m", "snakemake", "--cores", "1", "--workflow-profile", "none"]
    command += ["--snakefile", with_stand_ins(folder, project)]
    command += ["--configfile", project / "config" / "paper.yaml", "--", STORE.format("paper")]
    result = run(command, folder, environment(folder) | {"PYTHONPATH": str(project / "src")})
    assert result.returncode == 0, result.stderr
    resolved = (folder / "results" / "paper" / "config.yaml").read_text(encoding="utf-8")
    assert resolved == dump_yaml(load(CONFIG / "paper.yaml"))


def test_the_default_experiment_is_the_laptop_and_a_value_is_overridden_by_the_command_line(folder):
    result = snakemake(folder, "-n", "--config", "seeds=[3]", "experiment=other")
    assert result.returncode == 0, result.stderr
    assert "Making the base model (scratch): results/other/base/seed-3" in result.stdout
    assert "Evaluating latent-6-by-1-rl, seed 3" in result.stdout


def test_a_dry_run_touches_nothing_and_a_run_writes_the_configuration_where_it_differs(folder):
    snakefile = with_stand_ins(folder)
    changed = folder / "changed.yaml"
    changed.write_text("seeds: [1]\n", encoding="utf-8")
    target = ["--", STORE.format("test")]

    def call(*arguments: str | Path) -> None:
        result = snakemake(folder, *arguments, snakefile=snakefile)
        assert result.returncode == 0, result.stdout + result.stderr

    call("-n", "--configfile", CONFIG / "test.yaml")
    assert not (folder / "results").exists()
    call("--configfile", CONFIG / "test.yaml", *target)
    file, store = (folder / "results" / "test" / n for n in ("config.yaml", "tracking.ready"))
    assert load(file) == load(CONFIG / "test.yaml")
    before = file.read_text(encoding="utf-8")
    future = time.time() + 86400
    os.utime(file, (future, future))
    call("-n", "--configfile", CONFIG / "test.yaml", changed)
    assert file.read_text(encoding="utf-8") == before
    assert file.stat().st_mtime == pytest.approx(future)
    store.unlink()
    call("--configfile", CONFIG / "test.yaml", changed, *target)
    assert load(file).seeds == [1]
    assert file.stat().st_mtime <= time.time()


def test_a_bad_configuration_stops_with_file_and_key_and_no_traceback(folder):
    bad = folder / "bad.yaml"
    text = (CONFIG / "test.yaml").read_text(encoding="utf-8")
    bad.write_text(text.replace("seeds: [0]", "seed: 0"), encoding="utf-8")
    result = snakemake(folder, "-n", "--configfile", bad)
    assert result.returncode == 1
    assert "bad.yaml: seed: unknown key; allowed here: base, data" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def test_raw_rows_that_are_not_there_stop_the_plan_with_the_key(folder, monkeypatch):
    monkeypatch.setenv("LATENT_REASONING_DATA", str(folder / "nowhere"))
    result = snakemake(folder, "-n", "--configfile", CONFIG / "smollm2.yaml")
    assert result.returncode == 1
    assert "data.path: " in result.stdout
    assert "nowhere/gsm8k_aug: No such file or directory" in result.stdout


def test_an_imported_model_stays_where_the_folder_that_it_came_from_is_gone(folder):
    release, config = folder / "release", folder / "imported.yaml"
    release.mkdir()
    (release / "model.safetensors").write_text("weights", encoding="utf-8")
    config.write_text(
        f"experiment: x\nmodels: {{a: {{stage: import, path: {release}}}}}\n", "utf-8"
    )
    call = ("--configfile", config, "--", "results/x/models/a/seed-0")
    assert snakemake(folder, *call, snakefile=with_stand_ins(folder)).returncode == 0
    shutil.rmtree(release)
    result = snakemake(folder, *call, snakefile=folder / "Snakefile")
    assert result.returncode == 1
    assert f"models.a.path: {release}: No such file or directory" in result.stderr
    assert (folder / "results/x/models/a/seed-0/model.safetensors").exists()


def test_the_page_is_made_again_where_its_template_or_a_caption_changed(folder):
    jobs = {job.rule.name: set(job.input) for job in planned_jobs(folder, CONFIG / "test.yaml")}
    texts = [PROJECT_ROOT / "src/latent_reasoning/analysis/report.html.jinja"]
    texts += (PROJECT_ROOT / "workflow/report").glob("*_table.rst")
    assert len(texts) > 10
    assert {str(text) for text in texts} <= jobs["report"]
    assert not {str(text) for text in texts} & jobs["tables"]


# ------------------------------------------------------------------------------ cost, resources


def test_a_costly_experiment_tells_its_hours_and_disk(folder):
    costly = snakemake(folder, "-n", "--quiet", "--configfile", CONFIG / "paper.yaml")
    assert re.search(r"paper: from nothing, roughly .* hours and .* GB", costly.stderr)


def test_on_the_cpu_no_job_asks_for_a_gpu(folder):
    jobs = planned_jobs(folder, CONFIG / "laptop.yaml")
    assert {job.resources["gpu"] for job in jobs} == {0}


@pytest.mark.parametrize(("overlay", "card"), [(None, "A100-80"), ("h100.yaml", "H100")])
def test_the_papers_jobs_ask_for_what_is_planned_for_the_card(folder, overlay, card):
    configs = [CONFIG / "paper.yaml", *([CONFIG / overlay] if overlay else [])]
    experiment = load(configs)
    device = device_of(experiment)
    assert device.name == card
    for job in planned_jobs(folder, *configs):
        asked, model = job.resources, job.wildcards_dict.get("model")
        if job.rule.name in ("sft", "latent_sft", "rl", "evaluate"):
            need_of = evaluation_need if job.rule.name == "evaluate" else training_need
            need = need_of(experiment, model)
            assert (asked["mem_mb"], asked["runtime"]) == (need.host_mb, need.minutes)
            assert (asked["gpu"], asked["gpu_model"]) == (1, "h100" if overlay else "")
        else:
            assert asked["gpu"] == 0


def test_a_training_of_several_processes_asks_for_a_gpu_each_and_is_no_other_training(folder):
    several = folder / "several.yaml"
    several.write_text("runtime: {processes: 2}\n", encoding="utf-8")
    alone = planned_jobs(folder, CONFIG / "paper.yaml", gpus=4)
    jobs = planned_jobs(folder, CONFIG / "paper.yaml", several, gpus=4)
    trained = {"sft", "latent_sft", "rl"}
    for job in jobs:
        name = job.rule.name
        assert job.resources["gpu"] == (2 if name in trained else name == "evaluate"), name
    rl, rl_alone = (next(j for j in some if j.rule.name == "rl") for some in (jobs, alone))
    assert rl.resources["mem_mb"] == 2 * rl_alone.resources["mem_mb"]
    assert rl.rule.resources["_cores"] == 2 * 8
    params = [sorted((job.rule.name, str(job.params)) for job in some) for some in (jobs, alone)]
    assert params[0] == params[1]  # nothing is trained anew


def test_trainings_that_others_wait_for_come_first_and_evaluations_last(folder):
    jobs = planned_jobs(folder, CONFIG / "laptop.yaml", targets=("all",))
    priority = {job.rule.name: job.rule.priority for job in jobs}
    order = [priority[rule] for rule in ("base_model", "latent_sft", "rl", "sft", "evaluate")]
    assert order == sorted(set(order), reverse=True)


def test_every_rule_has_a_log_a_message_a_benchmark_and_what_is_configured(folder):
    jobs = planned_jobs(folder, CONFIG / "smollm2.yaml", targets=("all",))
    names = {job.rule.name for job in jobs}
    assert len(names) == 12
    for job in jobs:
        rule = job.rule
        assert rule.log, rule.name
        assert rule.message, rule.name
        assert rule.benchmark, rule.name
        assert {"gpu", "mem_mb", "runtime"} <= set(rule.resources), rule.name
    rl = next(job for job in jobs if job.rule.name == "rl")
    assert (rl.resources["mem_mb"], rl.resources["runtime"]) == (16000, 600)
    assert rl.rule.resources["_cores"] == 4
