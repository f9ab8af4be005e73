"""The configuration: strict types, clear errors, defaults, and which keys a result depends on."""

from __future__ import annotations

import copy
import datetime
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from latent_reasoning.config import (
    PROJECT_ROOT,
    ConfigError,
    Experiment,
    Section,
    dump,
    dump_yaml,
    expand_path,
    load,
    merge,
    resolve,
    schema_of_experiment,
)
from tools import config_docs

CONFIG = PROJECT_ROOT / "config"
EXPERIMENTS = [
    ["laptop.yaml"],
    ["laptop.yaml", "laptop-3seeds.yaml"],
    ["laptop.yaml", "laptop-estimators.yaml"],
    ["test.yaml"],
    ["paper.yaml"],
    ["smollm2.yaml"],
    ["smollm2.yaml", "smollm2-cpu.yaml"],
    ["published.yaml"],
    ["paper.yaml", "h100.yaml"],
]
SMALLEST = {
    "experiment": "small",
    "models": {
        "sft": {"stage": "sft", "training": {"steps": 3}},
        "latent": {"stage": "latent_sft", "training": {"steps": 3}},
        "rl": {"stage": "rl", "from": "latent", "training": {"steps": 3}},
    },
}


def changed(key: str, value: Any) -> dict[str, Any]:
    """The smallest configuration with one dotted key set."""
    out: dict[str, Any] = copy.deepcopy(SMALLEST)
    *sections, last = key.split(".")
    section = out
    for name in sections:
        section = section.setdefault(name, {})
    section[last] = value
    return out


def error_of(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(raw, "small.yaml")
    return str(caught.value)


def shipped(names: list[str]) -> Experiment:
    return load([CONFIG / name for name in names])


# ------------------------------------------------------------------------------------- types

WRONG_TYPES = [
    ("models.sft.training.steps", "3", "integer"),
    ("models.sft.training.steps", 3.0, "integer"),
    ("models.sft.training.steps", True, "integer"),
    ("models.sft.training.steps", "3e4", "integer"),
    ("models.sft.training.learning_rate", True, "number"),
    ("models.sft.training.learning_rate", "fast", "number"),
    ("models.sft.training.learning_rate", float("nan"), "finite"),
    ("models.sft.training.learning_rate", float("inf"), "finite"),
    ("models.sft.training.betas", [0.9, "x"], "number"),
    ("models.sft.training.betas", [0.9], "required"),
    ("models.sft.training.betas", 0.9, "tuple"),
    ("models.sft.lora", {"r": 2.5}, "integer"),
    ("models.sft.lora", {"target_modules": "q_proj"}, "list"),
    ("models.latent.distillation", {"block_range": [0, 1.5]}, "integer"),
    ("data.natural_language", "no way", "boolean"),
    ("data.natural_language", 1, "boolean"),
    ("data.revision", datetime.date(2025, 11, 1), "string"),
    ("data.revision", 123, "string"),
    ("data.extra_tests", ["svamp"], "dictionary"),
    ("seeds", 0, "list"),
    ("seeds", ["0"], "integer"),
    ("model", None, "dictionary"),
]


@pytest.mark.parametrize(("key", "value", "word"), WRONG_TYPES, ids=str)
def test_a_value_of_another_type_is_refused_with_file_key_and_value(key, value, word):
    message = error_of(changed(key, value))
    assert message.startswith(f"small.yaml: {key}")
    assert word in message


@pytest.mark.parametrize(
    ("text", "number"), [("1e-4", 1e-4), ("8E-4", 8e-4), ("2.5e+1", 25.0), (".5e-1", 0.05)]
)
def test_a_number_with_an_exponent_is_a_number(text, number):
    raw = yaml.safe_load(f"learning_rate: {text}")
    experiment = resolve(
        changed("models.sft.training", {"steps": 1, **raw}),
        "small.yaml",
    )
    assert experiment.models["sft"].training.learning_rate == number


def test_text_that_looks_like_a_number_stays_text_where_text_is_asked_for():
    assert resolve(changed("data.revision", "12e4"), "small.yaml").data.revision == "12e4"


def test_a_whole_number_may_stand_for_a_real_one():
    weight = resolve(changed("models.sft.training.weight_decay", 1), "small.yaml")
    assert weight.models["sft"].training.weight_decay == 1.0


# ------------------------------------------------------------------------- keys and combinations

REFUSED = [
    ("learning_rate", 1, "learning_rate: unknown key; allowed here: base, data, evaluation"),
    ("data.sources", "x", "data.sources: unknown key; allowed here: augmentation"),
    ("models.sft.lr", 1, "models.sft.lr: unknown key; allowed here: form, from, lora"),
    ("models.sft.start", "base", "models.sft.start: unknown key"),
    (
        "models.sft.training.lr",
        1,
        "models.sft.training.lr: unknown key; allowed here: accumulation",
    ),
    ("models.rl.reward", {"size": 1}, "models.rl.reward.size: unknown key; allowed here: accuracy"),
    ("stages.rl", {"size": 1}, "stages: rl.size: unknown key; allowed here: epsilon"),
    ("stages.sft", {"rl": 1}, "stages: sft.rl: unknown key"),
    ("experiment", "../x", "experiment: String should match pattern"),
    ("experiment", "a b", "experiment: String should match pattern"),
    ("models.Bad_name", {"stage": "sft"}, "models.Bad_name.[key]: String should match"),
    ("models.base", {"stage": "import", "path": "x"}, "models.base: the name is taken"),
    ("models.x", {"stage": "train"}, "'sft', 'latent_sft', 'rl', 'import'"),
    ("models.x", 3, "models.x: a model is a mapping"),
    ("models.sft.training.steps", -1, "greater than or equal to 0, not -1"),
    ("models.sft.training.learning_rate", 0, "greater than 0, not 0"),
    ("models.sft.training.schedule", "cos", "'cosine', 'linear' or 'constant', not 'cos'"),
    ("models.sft.from", "nobody", "models.sft.from: 'nobody' is neither base nor one of latent"),
    ("models.sft.from", "sft", "goes in a circle: sft"),
    ("models.rl.from", "sft", "models.rl.from: RL starts from a latent_sft, rl or import model"),
    ("models.rl.from", "base", "RL starts from"),
    ("models.rl.group_size", 1, "greater than or equal to 2"),
    ("models.latent.latent_steps", {"min": 7, "max": 6}, "min = 7 is above max = 6"),
    ("models.latent.distillation", {"teacher": "rl"}, "neither self nor an sft model of form cot"),
    ("models.latent.distillation", {"traces": "teacher"}, "needs distillation.teacher to name"),
    ("models.latent.teacher_texts", {"full": 0}, "all shares are 0"),
    ("models.latent.distillation", {"block_range": [1, 0]}, "the first block, 1, comes after"),
    ("models.latent.distillation", {"block_range": [0, 99]}, "block 99 is not there"),
    ("models.rl.max_latent_steps", 39, "leave no token of max_new_tokens: 40 for the answer"),
    ("models.sft.from", "latent", "token SFT starts from a plain language model"),
    ("models.x", {"stage": "import"}, "give either path (hub id or folder) or from: base"),
    (
        "model.recurrent_filter",
        "mlp",
        "'none', 'MLP', 'linear', 'linear_ln', 'linear_ECF' or 'SRE'",
    ),
    ("data.source", "local", "source: local needs path"),
    ("data.source", "hub", "source: hub needs hub_id"),
    ("data.sft_share", 1.0, "data.sft_share: 1.0 leaves no rows for the RL model 'rl'"),
    ("data.generated", {"max_steps": 3}, "step_weights has 5 values for max_steps = 3"),
    ("data.generated", {"modulus": 13}, "less than or equal to 12, not 13"),
    ("data.extra_tests", {"test": "x"}, "names of splits cannot name another test set: test"),
    ("data.extra_tests", {"a/b": "x"}, "String should match pattern"),
    ("base.source", "gguf", "source: gguf needs path"),
    ("base.architecture", {"num_attention_heads": 5}, "no multiple of twice num_attention_heads"),
    ("base.architecture", {"num_key_value_heads": 3}, "no multiple of num_key_value_heads"),
    ("evaluation.datasets", ["svamp"], "'svamp' is not among test, validation"),
    ("report.main", ["nobody"], "report.main: 'nobody' is not in models"),
    ("report.appendix", ["nobody"], "report.appendix: 'nobody' is not in models"),
    ("report.rl_from", {"sft": "nobody"}, "report.rl_from: 'nobody' is not in models"),
    ("report.rl_from", {"rl": "latent"}, "report.rl_from: 'rl' is of stage rl, and says itself"),
    ("seeds", [], "seeds: List should have at least 1 item"),
    ("seeds", [1, 1], "a seed stands twice"),
    ("models", {}, "models: Dictionary should have at least 1 item"),
]


@pytest.mark.parametrize(("key", "value", "words"), REFUSED, ids=lambda v: str(v)[:40])
def test_what_cannot_be_run_is_refused_with_what_is_allowed(key, value, words):
    message = error_of(changed(key, value))
    assert "small.yaml: " in message
    assert words in message


def test_an_exponent_is_a_number_in_the_reward_too():
    experiment = resolve(changed("models.rl.reward", {"bonus": "1e-1"}), "small.yaml")
    assert experiment.models["rl"].reward.bonus == 0.1


def test_scratch_needs_generated_text():
    raw = changed("data", {"source": "local", "path": "rows"})
    assert "base.source: scratch trains on generated text" in error_of(raw)


def test_every_mistake_is_told_at_once():
    raw = changed("data.sources", "x")
    raw["runtime"] = {"threads": 0}
    assert [line.split(":")[1].strip() for line in error_of(raw).splitlines()] == [
        "data.sources",
        "runtime.threads",
    ]


def test_a_key_that_is_no_text_is_refused():
    assert "Keys should be strings, not 7" in error_of({**SMALLEST, 7: 1})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("experiment: [", ": line 1, column"),
        ("- a\n- b\n", "is a mapping of keys, not ['a', 'b']"),
        ("", "is a mapping of keys, not None"),
        ("experiment: a\nexperiment: b\n", "line 2, column 1 the key 'experiment' stands twice"),
        ("a: !!python/object/apply:os.system [ls]\n", "line 1, column 4"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused_with_its_name(tmp_path, text, words):
    path = tmp_path / "broken.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such configuration file"):
        load(tmp_path / "nowhere.yaml")


# ------------------------------------------------------------------------- merging and defaults


def test_a_later_file_overrides_key_by_key_and_replaces_lists():
    below = {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    assert merge(below, {"a": {"c": [3]}, "e": 2}) == {"a": {"b": 1, "c": [3]}, "d": 1, "e": 2}
    assert below == {"a": {"b": 1, "c": [1, 2]}, "d": 1}


def test_an_entry_goes_before_its_stages_defaults_and_the_section_model():
    raw = changed("stages.latent_sft", {"shift_target": False, "training": {"batch_size": 4}})
    raw["model"] = {"recurrent_filter": "SRE", "detach_stop_head": True}
    raw["models"]["latent"]["model"] = {"detach_stop_head": False}
    raw["models"]["latent"]["training"]["batch_size"] = 8
    latent = resolve(raw, "small.yaml").models["latent"]
    assert latent.shift_target is False
    assert latent.training.batch_size == 8
    assert latent.model.recurrent_filter == "SRE"
    assert latent.model.detach_stop_head is False


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
    for section in Section.__subclasses__():
        for key, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{key} has no description"
            assert f"| `{field.alias or key}` |" in tables, f"{section.__name__}.{key}"


# ------------------------------------------------------------------------ the experiments' values


def test_paper_yaml_holds_the_papers_values():
    paper = shipped(["paper.yaml"])
    assert paper.data.hub_id == "whynlp/gsm8k-aug"
    assert paper.base.hub_id == "meta-llama/Llama-3.2-1B-Instruct"
    assert (paper.data.sft_share, paper.data.split_seed, paper.data.max_tokens) == (0.85, 42, 512)
    assert (paper.data.prompt.training, paper.data.prompt.evaluation) == ("Question: ", "")
    assert paper.model.recurrent_filter == "MLP"
    assert paper.model.allow_rethinking is True
    for name, rate in (("cot-sft", 1e-4), ("no-cot-sft", 1e-4), ("latent-6", 8e-4), ("codi", 8e-4)):
        entry = paper.models[name]
        training = entry.training
        assert (entry.lora.r, entry.lora.alpha, entry.lora.dropout) == (128, 32, 0.1)
        assert (training.learning_rate, training.schedule) == (rate, "cosine")
        assert (training.warmup_steps, training.batch_size, training.steps) == (900, 128, 30000)
        assert (training.weight_decay, training.max_grad_norm) == (0.1, 2.0)
        assert (training.betas, training.eps) == ((0.9, 0.999), 1e-8)
        assert (training.validate_every, training.select) == (200, "best")
    six, by_one = paper.models["latent-6"].latent_steps, paper.models["latent-6-by-1"].latent_steps
    assert (six.factor, six.min, six.max) == (0, 6, 6)
    assert (by_one.factor, by_one.bias, by_one.min, by_one.max) == (1, 5, None, 10)
    assert paper.models["latent-6"].distillation.codi_weight == 20
    assert paper.models["latent-6"].shift_target is True
    rl = paper.models["latent-6-rl"]
    assert (rl.lora.r, rl.lora.alpha, rl.lora.dropout) == (32, 32, 0.1)
    assert (rl.group_size, rl.training.batch_size, rl.group_size * rl.training.batch_size) == (
        16,
        8,
        128,
    )
    assert (rl.training.steps, rl.training.learning_rate, rl.training.warmup_steps) == (
        60000,
        1e-5,
        1000,
    )
    assert (rl.training.weight_decay, rl.kl_weight, rl.max_new_tokens) == (1e-3, 1e-3, 40)
    assert (rl.training.max_grad_norm, rl.temperature, rl.max_prompt_tokens) == (1.0, 1.0, 100)
    assert (rl.reward.penalty, rl.reward.bonus, rl.reward.accuracy_requirement) == (1e-4, 0.1, 1.0)
    assert (rl.loss, rl.epsilon, rl.iterations) == ("bnpo", 0.2, 1)
    assert paper.evaluation.max_new_tokens == 512
    assert paper.runtime.precision == "bfloat16"


def test_paper_yaml_holds_the_appendixs_five_variants():
    paper = shipped(["paper.yaml"])
    distances = {
        name: (
            paper.models[name].distillation.codi_weight,
            paper.models[name].distillation.meaned_weight,
            paper.models[name].distillation.block_range,
            paper.models[name].drop_last_step,
        )
        for name in paper.report.appendix
    }
    assert distances == {
        "codi": (20, 0, None, True),
        "codi-intermediate": (20, 0, (3, 12), True),
        "meaned": (0, 20, None, False),
        "meaned-intermediate": (0, 20, (3, 12), False),
        "meaned-codi": (20, 20, None, True),
    }
    for name in paper.report.appendix:
        entry = paper.models[name]
        assert entry.model.detach_stop_head is True
        assert entry.model.allow_rethinking is True
        assert (entry.mask_latent_labels, entry.forced_steps, entry.rows) == (True, 6, "all")


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
    for key in ("hub_id", "prompt", "special_token_text"):
        assert getattr(published.data, key) == getattr(paper.data, key)
    assert published.report.rl_from == {
        name: paper.models[name].start for name in ("latent-6-rl", "latent-6-by-1-rl")
    }


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


# ------------------------------------------------------------------------------------- paths


def test_a_path_starts_at_the_project_and_may_hold_a_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("LATENT_REASONING_DATA", str(tmp_path))
    assert expand_path("${LATENT_REASONING_DATA}/rows") == tmp_path / "rows"
    assert expand_path("some/rows") == PROJECT_ROOT / "some" / "rows"
    assert expand_path("/some/rows") == Path("/some/rows")


def test_a_variable_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("LATENT_REASONING_DATA", raising=False)
    with pytest.raises(ConfigError, match="needs the environment variable LATENT_REASONING_DATA"):
        expand_path("${LATENT_REASONING_DATA}/rows")
