"""The shipped experiments, and what is generated from the schema, are as they should be."""

from __future__ import annotations

import re

import jsonschema
import pytest
import yaml

from latent_reasoning.config import (
    PROJECT_ROOT,
    Experiment,
    PolicyModel,
    Section,
    SupervisedModel,
    dump,
    dump_yaml,
    load,
    merge,
    schema_of_experiment,
)
from latent_reasoning.config.fields import fields_of
from tools import config_docs

CONFIG = PROJECT_ROOT / "config"
SRE = ["laptop.yaml", "laptop-sre.yaml"]
RIVALS = [*SRE, "rivals.yaml"]
RIVALS_HARD = [*SRE, "laptop-hard.yaml", "rivals.yaml", "rivals-hard.yaml"]
EXPERIMENTS = [
    ["laptop.yaml"],
    ["laptop.yaml", "laptop-5seeds.yaml"],
    ["laptop.yaml", "laptop-hard.yaml"],
    ["laptop.yaml", "laptop-ablations.yaml"],
    ["laptop.yaml", "laptop-gpt2.yaml"],
    SRE,
    [*SRE, "laptop-estimators.yaml"],
    RIVALS,
    RIVALS_HARD,
    ["smollm2.yaml", "rivals-smollm2.yaml"],
    ["smollm2.yaml", "rivals-smollm2.yaml", "smollm2-cpu.yaml"],
    ["paper.yaml", "rivals-paper.yaml"],
    ["test.yaml"],
    ["paper.yaml"],
    ["smollm2.yaml"],
    ["smollm2.yaml", "smollm2-cpu.yaml"],
    ["published.yaml"],
    ["paper.yaml", "h100.yaml"],
]


def shipped(names: list[str]) -> Experiment:
    return load([CONFIG / name for name in names])


@pytest.mark.parametrize("names", EXPERIMENTS, ids="+".join)
def test_a_shipped_experiment_resolves_and_survives_its_own_dump(names, tmp_path):
    experiment = shipped(names)
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(experiment), encoding="utf-8")
    assert load(path) == experiment


@pytest.mark.parametrize("names", EXPERIMENTS, ids="+".join)
def test_the_schema_accepts_shipped_experiments(names):
    jsonschema.validate(dump(shipped(names)), schema_of_experiment())


def test_the_schema_refuses_unknown_keys_and_wrong_types():
    schema = schema_of_experiment()
    plain = dump(shipped(["test.yaml"]))
    for key, value in (("learning_rate", 1), ("seeds", ["0"]), ("models", {})):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**plain, key: value}, schema)
    plain["models"]["latent-6"]["training"]["lr"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(plain, schema)


# ----------------------------------------------------------------------------- generated files


def test_every_generated_file_is_current():
    for path, text in config_docs.wanted_files().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run make docs"


def test_every_key_has_a_description_in_the_readme():
    tables = config_docs.tables()
    sections = Section.__subclasses__()
    for section in sections:
        sections.extend(section.__subclasses__())
        for key, _, field in fields_of(section):
            assert field.description, f"{section.__name__}.{key} has no description"
            assert re.search(rf"\| `{key}`( ★)? \|", tables), f"{section.__name__}.{key}"


def test_a_table_marks_the_first_keys_and_tells_whose_a_value_is():
    rows = {
        "`split_seed` | whole number >= 0 | `42` | code |",
        "`learning_rate` ★ | number > 0 | `0.001` | paper |",
        "`random_readout` | number >= 0, <= 1 | `0.0` | ours |",
        "`loss` | `bnpo`, `grpo`, `dr_grpo` | `bnpo` | trl |",
        "`data` | section | as below |  |",
    }
    tables = config_docs.tables()
    assert [row for row in rows if row not in tables] == []
    assert 20 <= tables.count("★") <= 60


def test_the_readmes_recipes_can_be_run(tmp_path):
    text = (CONFIG / "README.md").read_text(encoding="utf-8")
    recipes = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(recipes) == 3
    for recipe, below in zip(recipes, ("paper", "smollm2", "laptop"), strict=True):
        file = tmp_path / "recipe.yaml"
        file.write_text(recipe, encoding="utf-8")
        assert load([CONFIG / f"{below}.yaml", file])


# ------------------------------------------------------------------------ the experiments' values

PAPER = """
data:
  {hub_id: whynlp/gsm8k-aug, sft_share: 0.85, split_seed: 42, max_tokens: 512}
base: {hub_id: meta-llama/Llama-3.2-1B-Instruct}
model: {recurrent_filter: MLP, allow_rethinking: true}
models:
  cot-sft: &sft
    lora: {r: 128, alpha: 32, dropout: 0.1}
    training: &training
      {learning_rate: 1.0e-4, schedule: cosine, warmup_steps: 900, batch_size: 128, steps: 30000,
       weight_decay: 0.1, max_grad_norm: 2.0, betas: [0.9, 0.999], eps: 1.0e-8,
       validate_every: 200, select: best}
  no-cot-sft: *sft
  latent-6: &latent
    <<: *sft
    training: {<<: *training, learning_rate: 8.0e-4}
    latent_steps: {factor: 0, bias: 0, min: 6, max: 6}
    distillation: {codi_weight: 20}
    shift_target: true
  codi: *latent
  latent-6-by-1: {<<: *latent, latent_steps: {factor: 1, bias: 5, min: null, max: 10}}
  latent-6-rl:
    lora: {r: 32, alpha: 32, dropout: 0.1}
    training:
      {batch_size: 8, steps: 60000, learning_rate: 1.0e-5, warmup_steps: 1000, weight_decay: 1.0e-3,
       max_grad_norm: 1.0}
    reward: {penalty: 1.0e-4, bonus: 0.1, accuracy_requirement: 1.0}
    group_size: 16
    kl_weight: 1.0e-3
    max_new_tokens: 40
    temperature: 1.0
    max_prompt_tokens: 100
    loss: bnpo
    epsilon: 0.2
    iterations: 1
evaluation: {max_new_tokens: 512}
runtime: {precision: bfloat16}
"""


def test_paper_yaml_holds_the_papers_values():
    values = dump(shipped(["paper.yaml"]))
    assert merge(values, yaml.safe_load(PAPER)) == values
    assert values["data"]["prompt"] == {"training": "Question: ", "evaluation": ""}
    assert values["data"]["expected_rows"] == {"train": 385620, "validation": 500, "test": 1319}


def test_paper_yaml_holds_the_appendixs_five_variants():
    paper = shipped(["paper.yaml"])
    distances = {}
    for name in paper.report.appendix:
        entry, loss = paper.models[name], paper.models[name].distillation
        weights = (loss.codi_weight, loss.meaned_weight)
        distances[name] = (*weights, loss.block_range, entry.drop_last_step)
        assert entry.model.detach_stop_head is True
        assert entry.model.allow_rethinking is True
        assert (entry.mask_latent_labels, entry.forced_steps, entry.rows) == (True, 6, "all")
    assert distances == {
        "codi": (20, 0, None, True),
        "codi-intermediate": (20, 0, (3, 12), True),
        "meaned": (0, 20, None, False),
        "meaned-intermediate": (0, 20, (3, 12), False),
        "meaned-codi": (20, 20, None, True),
    }


@pytest.mark.parametrize("names", [["laptop.yaml"], ["paper.yaml"], ["smollm2.yaml"]], ids=str)
def test_the_six_models_and_the_published_figures_are_there(names):
    experiment = shipped(names)
    six = {"cot-sft", "no-cot-sft", "latent-6", "latent-6-by-1", "latent-6-rl", "latent-6-by-1-rl"}
    assert six <= set(experiment.models) - set(experiment.report.appendix)
    published = {
        name: (value.accuracy, value.tokens) for name, value in experiment.report.published.items()
    }
    assert published == {"latent-6": (0.4973, 8.0), "latent-6-rl": (0.5011, 3.76)}


def test_published_yaml_imports_the_papers_eleven_models_and_evaluates_them_alike():
    paper, published = shipped(["paper.yaml"]), shipped(["published.yaml"])
    assert list(published.models) == list(paper.models)
    assert {entry.stage for entry in published.models.values()} == {"import"}
    for name, entry in published.models.items():
        assert entry.path == f"./releases/{name}"
        assert entry.forced_steps == getattr(paper.models[name], "forced_steps", None)
    assert published.report.appendix == paper.report.appendix
    assert published.report.published == paper.report.published
    for key in ("datasets", "max_new_tokens", "max_forced_steps"):
        assert getattr(published.evaluation, key) == getattr(paper.evaluation, key)
    for key in ("hub_id", "prompt", "number_rule", "special_token_text"):
        assert getattr(published.data, key) == getattr(paper.data, key)
    assert published.report.rl_from == {
        name: paper.models[name].start for name in ("latent-6-rl", "latent-6-by-1-rl")
    }


def test_the_rivals_learn_from_equally_many_examples_in_every_size():
    """Those of one training: a method that needs another start pays for it beside."""
    for names in (RIVALS, RIVALS_HARD, ["smollm2.yaml", "rivals-smollm2.yaml"]):
        experiment = shipped(names)
        read = {
            name: entry.training.steps * entry.training.batch_size
            for name, entry in experiment.models.items()
            if name in experiment.report.rivals.models and isinstance(entry, SupervisedModel)
        }
        asked = {
            name: entry.training.steps * entry.training.batch_size
            for name, entry in experiment.models.items()
            if name in experiment.report.rivals.models and isinstance(entry, PolicyModel)
        }
        assert len(read) > 3
        assert set(read.values()) == {read["cot-sft"]}, read
        assert set(asked.values()) == {asked["latent-6-rl"]}, asked
        kept = {entry.training.select for name, entry in experiment.models.items() if name in read}
        assert kept == {"best"}
        assert {"latent-6-rl", "cot-sft"} == set(experiment.report.rivals.references)


def test_every_method_has_a_published_setting_and_equally_many_trials():
    trials = shipped(RIVALS).report.rivals.trials
    for method, names in trials.items():
        assert names[0] == method, "the first trial has the published settings"


def test_every_setting_of_paper_yaml_names_its_source():
    lines = (CONFIG / "paper.yaml").read_text(encoding="utf-8").splitlines()
    settings = lines[lines.index("data:") : lines.index("report:")]
    value = re.compile(r"^ +[a-z_0-9-]+: (&[a-z]+ )?[^&*#\s]|^ +\[")
    valued = [line for line in settings if value.match(line) and "stage: latent_sft" not in line]
    assert len(valued) > 80
    tags = ("# [paper]", "# [code]", "# [trl]", "# [ours]")
    above = "target_modules: &projections  # [paper]"
    assert above in "\n".join(settings)
    untold = [line for line in valued if not any(tag in line for tag in tags)]
    assert untold == ["        [q_proj, k_proj, v_proj, o_proj, up_proj, down_proj, gate_proj]"]
