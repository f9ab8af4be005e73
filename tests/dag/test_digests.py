"""Which keys each stage depends on: the whole schema, key by key, and the record of defaults."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from latent_reasoning.config import (
    PROJECT_ROOT,
    ConfigError,
    Experiment,
    ImportModel,
    LatentSftModel,
    Report,
    RlModel,
    Runtime,
    SftModel,
    Tracking,
    dump,
    load,
    merge,
    resolve,
    schema_of_experiment,
)
from latent_reasoning.dag import digests
from latent_reasoning.dag.digests import check_digest, departures, keys_of, science_digest
from tools import config_docs

SCRATCH = {
    "experiment": "scratch",
    "data": {"augmentation": {"method": "numeric_perturbation"}},
    "base": {"training": {"steps": 3}},
    "models": {
        "sft": {"stage": "sft", "training": {"steps": 3}, "lora": {}},
        "latent": {"stage": "latent_sft", "training": {"steps": 3}, "lora": {}},
        "rl": {"stage": "rl", "from": "latent", "training": {"steps": 3}, "lora": {}},
        "import": {"stage": "import", "path": "someone/a-model"},
        "other": {"stage": "latent_sft", "training": {"steps": 3}},
    },
}
HUB = {
    **SCRATCH,
    "experiment": "hub",
    "data": {**SCRATCH["data"], "source": "hub", "hub_id": "someone/rows"},
    "base": {"source": "hub", "hub_id": "someone/a-base", "training": {"steps": 3}},
}

SCHEMA = schema_of_experiment()

# ------------------------------------------------------------------------- what each key changes

ROWS = {"data"}
BASE = {"base", "sft", "latent", "rl", "other"}
TRAINED = BASE - {"base"}
LATENT = {"latent", "rl", "other"}
NOTHING: set[str] = set()
OWN = {
    "models.sft": {"sft"},
    "models.latent_sft": {"latent", "rl"},
    "models.rl": {"rl"},
    "models.import": {"import"},
}


def keys(section: str, names: str, effect: set[str]) -> dict[str, set[str]]:
    return {f"{section}.{name}": effect for name in names.split()}


TRAINING = (
    "steps batch_size learning_rate schedule learning_rate_floor warmup_steps weight_decay betas "
    "eps max_grad_norm accumulation validate_every validation_rows select stop_at_accuracy"
)
LORA = "r alpha dropout target_modules"
TEXTS = (
    "full results_only drop_last truncated results_only_drop_last results_only_truncated "
    "results_only_waiting"
)


def trained(stage: str, names: str) -> dict[str, set[str]]:
    """Keys of an entry that is trained: the model, and those that start from it."""
    section, effect = f"models.{stage}", OWN[f"models.{stage}"]
    return {
        **keys(section, f"training lora rows from save {names}", effect),
        **keys(f"{section}.training", TRAINING, effect),
        **keys(f"{section}.lora", LORA, effect),
    }


# Every key of the schema, and the results whose digest follows it: rows (`data`), the base model,
# the models of `SCRATCH` by name. Evaluations follow their models, and Snakemake all the rest.
EFFECTS: dict[str, set[str]] = {
    **keys("data", "sft_share split_seed on_bad_row", ROWS),
    **keys("data.generated", "train validation test modulus seed", ROWS),
    **keys("data.generated", "max_steps step_weights", ROWS),
    **keys("data.augmentation", "method copies seed", ROWS),
    **keys("data.limits", "train validation test", ROWS),
    **keys("data", "path licence extra_tests hub_id revision", NOTHING),
    **keys("data", "natural_language", TRAINED),
    "data.max_tokens": BASE,
    "data.special_token_text": BASE | {"evaluation of import"},
    **keys("data", "drop_negative_for_sft", LATENT),
    "data.prompt.training": BASE,
    "data.prompt.evaluation": BASE | {"import"},
    "data.source": ROWS | BASE,
    **keys("base", "path licence hub_id revision", NOTHING),
    **keys("base", "source texts training", BASE),
    **keys("base.architecture", "hidden_size intermediate_size num_hidden_layers", BASE),
    **keys("base.architecture", "num_attention_heads num_key_value_heads", BASE),
    **keys("base.architecture", "max_position_embeddings tie_word_embeddings", BASE),
    **keys("base.architecture", "rope_theta initializer_range", BASE),
    **keys("base.texts", TEXTS, BASE),
    **keys("base.training", TRAINING, BASE),
    **trained("sft", "form"),
    **trained("latent_sft", "drop_last_step shift_target mask_latent_labels learn_start"),
    **trained("latent_sft", "stop_label_smoothing random_readout"),
    **keys("models.latent_sft.model", "recurrent_filter stop_head_temperature", LATENT - {"other"}),
    **keys("models.latent_sft.model", "detach_stop_head allow_rethinking", LATENT - {"other"}),
    **keys("models.latent_sft.model", "start_token_from end_token_from", LATENT - {"other"}),
    **keys("models.latent_sft.latent_steps", "factor bias min max", OWN["models.latent_sft"]),
    **keys("models.latent_sft.distillation", "codi_weight meaned_weight", OWN["models.latent_sft"]),
    **keys("models.latent_sft.distillation", "block_range distance", OWN["models.latent_sft"]),
    **keys("models.latent_sft.distillation", "normalise teacher traces", OWN["models.latent_sft"]),
    **keys("models.latent_sft.teacher_texts", TEXTS, OWN["models.latent_sft"]),
    **{
        key: {"rl"}
        for key in trained(
            "rl",
            "estimator group_size temperature max_new_tokens max_latent_steps max_prompt_tokens "
            "loss epsilon iterations kl_weight",
        )
        if key != "models.rl.rows"
    },
    **keys("models.rl.reward", "penalty bonus accuracy_requirement", {"rl"}),
    **keys("models.import", "path revision from", {"import"}),
    **keys("models.import", "licence", NOTHING),
    **keys("evaluation", "max_new_tokens max_forced_steps forced_rows", {"evaluation"}),
    **keys("evaluation", "datasets", NOTHING),
    "models.latent_sft.forced_steps": {"evaluation of latent"},
    "models.import.forced_steps": {"evaluation of import"},
}
# Where rows and the base come from the hub, these differ.
FROM_HUB: dict[str, set[str]] = {
    "data.hub_id": ROWS,
    "data.revision": ROWS,
    "base.hub_id": BASE,
    "base.revision": BASE,
    "data.prompt.training": TRAINED,
    "data.max_tokens": TRAINED,
    "data.special_token_text": TRAINED | {"evaluation of import"},
    **{key: NOTHING for key in EFFECTS if key.startswith("data.generated.")},
    **{key: NOTHING for key in EFFECTS if key.startswith(("base.texts", "base.training"))},
    **{key: NOTHING for key in EFFECTS if key.startswith("base.architecture.")},
}
# Sections of which no key is science, whatever comes to stand there.
NEVER = {"runtime": Runtime, "tracking": Tracking, "report": Report}
CONSTANT = {f"{section}.stage" for section in OWN}

# Values that have to agree with others: what is set beside the key.
WITH: dict[str, dict[str, Any]] = {
    "data.source": {"data.source": "local", "data.path": "rows", "base.source": "gguf"}
    | {"base.path": "base.gguf"},
    "data.generated.max_steps": {"data.generated": {"max_steps": 2, "step_weights": [1, 1]}},
    "data.generated.step_weights": {"data.generated.step_weights": [1, 1, 1, 1, 1]},
    "data.augmentation.method": {"data.augmentation.method": "none"},
    "data.extra_tests": {"data.extra_tests": {"svamp": "svamp.jsonl"}},
    "base.source": {"base.source": "gguf", "base.path": "base.gguf"},
    "base.texts": {"base.texts": {"full": 1.0}},
    "base.training": {"base.training": {"steps": 7}},
    "base.architecture.hidden_size": {"base.architecture.hidden_size": 128},
    "base.architecture.num_attention_heads": {"base.architecture.num_attention_heads": 8},
    "base.architecture.num_key_value_heads": {"base.architecture.num_key_value_heads": 2},
    "models.sft.from": {"models.sft.from": "import"},
    "models.latent_sft.from": {"models.latent_sft.from": "other"},
    "models.rl.from": {"models.rl.from": "other"},
    "models.import.from": {"models.import": {"stage": "import", "from": "base"}},
    "models.latent_sft.distillation.teacher": {"models.latent_sft.distillation.teacher": "sft"},
    "models.latent_sft.distillation.block_range": {
        "models.latent_sft.distillation.block_range": [0, 1]
    },
    "models.latent_sft.latent_steps.min": {"models.latent_sft.latent_steps.min": 5},
    "models.rl.max_latent_steps": {"models.rl.max_latent_steps": 12},
    "evaluation.datasets": {"evaluation.datasets": ["validation"]},
    "report.rl_from": {"report.rl_from": {"import": "sft"}},
    **{f"models.{s}.lora": {f"models.{s}.lora": None} for s in ("sft", "latent_sft", "rl")},
    **{
        f"models.{s}.training": {f"models.{s}.training": {"steps": 7}}
        for s in ("sft", "latent_sft", "rl")
    },
    # Teacher's traces need a teacher, and so do not stand alone.
    "models.latent_sft.distillation.traces": {
        "models.latent_sft.distillation": {"teacher": "sft", "traces": "teacher"}
    },
    **{
        f"{training}.learning_rate_floor": {f"{training}.learning_rate_floor": 0.5}
        for training in ("base.training", *(f"{model}.training" for model in OWN))
    },
}


def schema_keys() -> Iterator[str]:
    """Every key below the experiment's own."""
    entries = {
        "sft": SftModel,
        "latent_sft": LatentSftModel,
        "rl": RlModel,
        "import": ImportModel,
    }
    for name, section in entries.items():
        yield from (key.name for key in keys_of(section, f"models.{name}"))
    for name, field in Experiment.model_fields.items():
        if name not in ("models", "model", "stages"):  # the last two are defaults of models
            section = digests.section_in(field.annotation)
            if section is not None:
                yield from (key.name for key in keys_of(section, name))


KEYS = [key for key in schema_keys() if key.split(".")[0] not in NEVER and key not in CONSTANT]


def test_every_key_of_the_schema_says_what_it_changes():
    undeclared = [key for key in KEYS if key not in EFFECTS]
    assert not undeclared, (
        f"{', '.join(undeclared)}: new in the schema. Say in EFFECTS of tests/dag/test_digests.py "
        "which results follow the key; where none does, leave it out of the digests by "
        "NOT_SCIENCE in src/latent_reasoning/dag/digests.py. Then run make docs to record it"
    )
    gone = sorted(set(EFFECTS) - set(KEYS))
    assert not gone, f"{', '.join(gone)}: no longer in the schema; take out of EFFECTS"


@pytest.mark.parametrize("raw", [SCRATCH, HUB], ids=["scratch", "hub"])
@pytest.mark.parametrize("key", KEYS)
def test_a_key_changes_the_results_that_depend_on_it_and_no_other(key, raw):
    own = FROM_HUB if raw is HUB else {}
    expected = own.get(key, EFFECTS[key])
    before, after = (
        digests_of(resolve(raw, "a.yaml")),
        digests_of(resolve(changed(raw, key), "b.yaml")),
    )
    assert {name for name in before if before[name] != after[name]} == with_evaluations(expected)


@pytest.mark.parametrize("section", NEVER)
def test_no_key_of_how_it_runs_or_looks_is_science(section):
    before = digests_of(resolve(SCRATCH, "a.yaml"))
    names = [key.name for key in keys_of(NEVER[section], section)]
    assert len(names) >= 3
    for name in names:
        assert digests_of(resolve(changed(SCRATCH, name), "b.yaml")) == before, name


def digests_of(experiment: Experiment) -> dict[str, str]:
    """The digest of every result of an experiment."""
    models = {name: science_digest(experiment, "model", name) for name in experiment.models}
    evaluations = {
        f"evaluation of {name}": science_digest(experiment, "evaluation", name)
        for name in experiment.models
    }
    other = {stage: science_digest(experiment, stage) for stage in ("data", "base")}
    return models | evaluations | other


def with_evaluations(results: set[str]) -> set[str]:
    """The results, and the evaluations of the models among them; `evaluation` stands for all."""
    models = set(SCRATCH["models"])
    evaluated = models if "evaluation" in results else results & models
    return results - {"evaluation"} | {f"evaluation of {model}" for model in evaluated}


def changed(raw: dict[str, Any], key: str) -> dict[str, Any]:
    """The configuration with another, allowed value of one dotted key."""
    changes = WITH.get(key) or {key: another(key)}
    out: dict[str, Any] = copy.deepcopy(raw)
    for name, value in changes.items():
        # The schema's keys go by the stage of an entry, the file's by its name.
        *sections, last = name.replace("models.latent_sft", "models.latent").split(".")
        node = out
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return out


def another(key: str) -> Any:
    """A value of a key that is not its default, made from its JSON schema."""
    schema = SCHEMA
    node: dict[str, Any] = schema
    section, *rest = key.split(".")
    if section == "models":
        stage, *rest = rest
        (entry,) = schema["properties"]["models"]["patternProperties"].values()
        node = _resolved({"$ref": entry["discriminator"]["mapping"][stage]}, schema)
    else:
        node = _resolved(schema["properties"][section], schema)
    for part in rest[:-1]:
        node = _resolved(node["properties"][part], schema)
    wanted = node["properties"][rest[-1]]
    return _value(_resolved(wanted, schema), wanted.get("default"))


def _resolved(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Without references; of several options, the first that is not null."""
    while "$ref" in node or "anyOf" in node:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
        else:
            node = next(option for option in node["anyOf"] if option.get("type") != "null")
    return node


def _value(schema: dict[str, Any], default: Any) -> Any:
    kind = schema.get("type")
    if "enum" in schema:
        return next(value for value in schema["enum"] if value != default)
    if kind == "boolean":
        return not default
    if kind == "integer":
        return 1 + (3 if default is None else default)
    if kind == "number":
        return default + 1 if (default or 0) >= 1 else 0.25 if default == 0.5 else 0.5
    if kind == "string":
        return "another"
    if kind == "array" and "prefixItems" in schema:
        return [0.5, 0.75]
    if kind == "array":
        return ["o_proj"] if "modules" in schema.get("description", "") or default else []
    return {"sft": {"accuracy": 0.5}}  # the one mapping: report.published


# --------------------------------------------------------------------------------------- digests


def test_a_default_written_out_is_the_same_as_one_left_out():
    for raw in (SCRATCH, HUB):
        experiment = resolve(raw, "short.yaml")
        written = yaml.safe_load(yaml.safe_dump(dump(experiment)))
        assert digests_of(resolve(written, "long.yaml")) == digests_of(experiment)


@pytest.mark.parametrize("name", ["laptop", "smollm2", "paper", "test"])
def test_the_resolved_file_of_a_shipped_experiment_has_its_digests(name, tmp_path):
    experiment = load(PROJECT_ROOT / "config" / f"{name}.yaml")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(dump(experiment)), encoding="utf-8")
    assert digests_of(load(path)) == digests_of(experiment)


def test_the_order_of_keys_and_of_files_that_agree_changes_nothing(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(yaml.safe_dump({**SCRATCH, "seeds": [1]}), encoding="utf-8")
    second.write_text("evaluation: {max_new_tokens: 99}  # a comment\n", encoding="utf-8")
    expected = digests_of(load([first, second]))
    assert digests_of(load([second, first])) == expected
    shuffled = list({**SCRATCH, "evaluation": {"max_new_tokens": 99}}.items())
    random.Random(0).shuffle(shuffled)
    assert digests_of(resolve(dict(shuffled), "c.yaml")) == expected


def test_settings_of_copies_that_are_not_made_are_no_science():
    plain = {**SCRATCH, "data": {}}
    without = {**SCRATCH, "data": {"augmentation": {"copies": 9, "seed": 9}}}
    assert digests_of(resolve(without, "x.yaml")) == digests_of(resolve(plain, "y.yaml"))


def test_a_section_that_may_be_absent_counts_by_being_there():
    entry = SftModel(training={"steps": 1})
    assert departures(entry) == {"training": {"steps": 1}}
    with_adapter = SftModel(training={"steps": 1}, lora={})
    assert departures(with_adapter) == {"training": {"steps": 1}, "lora": {}}


def test_models_of_two_stages_with_the_same_keys_differ():
    entries = {"a": {"stage": "sft", "training": {"steps": 3}}}
    entries["b"] = {**entries["a"], "stage": "latent_sft"}
    experiment = resolve({"experiment": "x", "models": entries}, "x.yaml")
    chains = [digests.science(experiment, "model", name)["models"] for name in ("a", "b")]
    assert chains[0]["a"] != chains[1]["b"]


def test_science_ignores_how_it_runs_and_where_files_lie():
    experiment = load(PROJECT_ROOT / "config" / "test.yaml")
    other = resolve(
        merge(
            dump(experiment),
            {
                "runtime": {"device": "auto", "threads": 4, "micro_batch_size": 2},
                "tracking": {"enabled": False},
                "report": {"title": "Another"},
                "base": {"path": "elsewhere", "licence": "MIT-0"},
            },
        ),
        "other.yaml",
    )
    assert digests_of(other) == digests_of(experiment)


def test_an_imported_folder_counts_by_its_content_and_a_hub_id_by_its_name(tmp_path):
    def of(path: str) -> str:
        entries = {"theirs": {"stage": "import", "path": path}}
        return science_digest(
            resolve({"experiment": "x", "models": entries}, "x"), "model", "theirs"
        )

    (tmp_path / "there").mkdir()
    assert of(str(tmp_path / "there")) == of("./elsewhere") == of("${FOLDER}/theirs")
    assert of("someone/a-model") != of("someone/another")
    assert of("someone/a-model") != of("./elsewhere")


def test_science_of_a_model_holds_its_ancestors_and_no_other_model():
    experiment = load(PROJECT_ROOT / "config" / "test.yaml")
    chain = digests.science(experiment, "model", "latent-6-rl")["models"]
    assert set(chain) == {"latent-6", "latent-6-rl"}


def test_science_of_a_student_holds_its_frozen_teacher():
    raw = changed(SCRATCH, "models.latent_sft.distillation.teacher")
    chain = digests.science(resolve(raw, "small.yaml"), "model", "rl")["models"]
    assert set(chain) == {"latent", "rl", "sft"}


def test_swapped_values_change_the_digest():
    pair = ({"epsilon": 0.3, "kl_weight": 0.1}, {"epsilon": 0.1, "kl_weight": 0.3})
    raws = [{**SCRATCH, "stages": {"rl": values}} for values in pair]
    assert len({science_digest(resolve(raw, "x.yaml"), "model", "rl") for raw in raws}) == 2


def test_a_file_that_changed_after_planning_is_refused():
    experiment = load(PROJECT_ROOT / "config" / "test.yaml")
    planned = science_digest(experiment, "model", "cot-sft")
    assert check_digest(experiment, "model", planned, "cot-sft") == planned
    with pytest.raises(ConfigError, match="the file changed after the workflow started"):
        check_digest(experiment, "model", "0" * 16, "cot-sft")


def test_an_unknown_model_is_named_with_those_there_are():
    with pytest.raises(ConfigError, match=r"'nobody' is not in the configuration; it has sft,"):
        digests.science(resolve(SCRATCH, "small.yaml"), "model", "nobody")


# ---------------------------------------------------------------------------------------- recipe


@pytest.mark.parametrize(
    ("stage", "results"),
    [
        ("data", {"data", "import"} | BASE),
        ("base", BASE),
        ("sft", {"sft"}),
        ("latent_sft", LATENT),
        ("rl", {"rl"}),
        ("import", {"import"}),
        ("evaluation", {"evaluation"}),
    ],
)
def test_a_stages_recipe_runs_it_again_and_what_depends_on_it(monkeypatch, stage, results):
    experiment = resolve(SCRATCH, "x.yaml")
    before = digests_of(experiment)
    monkeypatch.setitem(digests.RECIPE, stage, 99)
    after = digests_of(experiment)
    assert {name for name in before if before[name] != after[name]} == with_evaluations(results)


# -------------------------------------------------------------------------------------- defaults


def recorded() -> dict[str, Any]:
    return json.loads(config_docs.DEFAULTS.read_text(encoding="utf-8"))


def test_the_recorded_defaults_are_those_of_the_schema():
    text = config_docs.DEFAULTS.read_text(encoding="utf-8")
    assert digests.defaults_text(recorded()) == text, "run make docs"


def test_every_scientific_key_is_recorded_and_no_other():
    scientific = {key for key in KEYS if EFFECTS[key] or FROM_HUB.get(key)} | CONSTANT
    assert set(recorded()["defaults"]) == scientific


def test_a_changed_default_is_refused_until_the_recipe_is_raised(monkeypatch, capsys):
    older = recorded()
    older["defaults"]["models.rl.epsilon"] = 0.1
    with pytest.raises(ConfigError) as caught:
        digests.defaults_text(older)
    assert str(caught.value).startswith("the default of models.rl.epsilon was 0.1 and is now 0.2")
    assert "Raise RECIPE['rl'] in src/latent_reasoning/dag/digests.py" in str(caught.value)
    older["recipe"] = {**older["recipe"], "rl": 0}
    assert '"models.rl.epsilon": 0.2' in digests.defaults_text(older)


def test_the_check_names_a_default_that_changed_silently(monkeypatch, tmp_path, capsys):
    older = recorded()
    older["defaults"]["data.sft_share"] = 0.5
    file = tmp_path / "defaults.json"
    file.write_text(json.dumps(older), encoding="utf-8")
    monkeypatch.setattr(config_docs, "DEFAULTS", file)
    assert config_docs.main(["--check"]) == 1
    assert "error: the default of data.sft_share was 0.5 and is now 0.85" in capsys.readouterr().err


def test_a_new_key_is_recorded_and_a_removed_one_forgotten():
    older = recorded()
    del older["defaults"]["models.rl.loss"]
    older["defaults"]["models.rl.obsolete"] = 1
    assert digests.defaults_text(older) == config_docs.DEFAULTS.read_text(encoding="utf-8")
