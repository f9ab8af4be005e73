"""Which keys each stage depends on: the whole schema, key by key, and the record of defaults."""

from __future__ import annotations

import copy
import json
import random
from functools import cache
from typing import Any

import pytest
import yaml

from latent_reasoning.config import (
    ENTRIES,
    PROJECT_ROOT,
    ConfigError,
    Experiment,
    SftModel,
    dump,
    load,
    resolve,
)
from latent_reasoning.config.fields import OnlyWhen, fields_of, section_in
from latent_reasoning.dag import digests
from latent_reasoning.dag.digests import Key, check_digest, departures, keys_of, science_digest
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
        "curriculum": {
            **{"stage": "curriculum", "training": {"steps": 500}, "lora": {}},
            "steps_per_stage": 2,
        },
        "forced": {"stage": "teacher_forced", "training": {"steps": 3}, "lora": {}},
        "policy": {"stage": "policy", "from": "latent", "training": {"steps": 3}, "lora": {}},
        "decode": {"stage": "decode", "from": "sft"},
    },
}
HUB = {
    **SCRATCH,
    "experiment": "hub",
    "data": {**SCRATCH["data"], "source": "hub", "hub_id": "someone/rows"},
    "base": {"source": "hub", "hub_id": "someone/a-base", "training": {"steps": 3}},
}

NAMES = {
    **{"sft": "sft", "latent_sft": "latent", "rl": "rl"},
    **{"curriculum": "curriculum", "teacher_forced": "forced", "policy": "policy"},
}

# ------------------------------------------------------------------------- what each key changes

ROWS = {"data"}
RIVALS = {"curriculum", "forced", "policy", "decode"}
BASE = {"base", "sft", "latent", "rl", "other"} | RIVALS
TRAINED = BASE - {"base"}
LATENT = {"latent", "rl", "other", "curriculum", "forced", "policy"}
NOTHING: set[str] = set()

# What follows a key: rows (`data`), the base model, the models of `SCRATCH` by name. Evaluations
# follow their models, what is seen inside follows them, and Snakemake all the rest. A section
# stands for its keys, unless they stand here themselves: what is new in the schema is science of
# its section until this table says more.
EFFECTS: dict[str, set[str]] = {
    "data": ROWS,
    **dict.fromkeys(["data.path", "data.licence", "data.extra_tests"], NOTHING),
    **dict.fromkeys(["data.expected_rows", "data.hub_id", "data.hub_config"], NOTHING),
    "data.revision": NOTHING,
    "data.source": ROWS | BASE,
    "data.number_rule": ROWS | BASE | {"evaluation of import"},
    "data.natural_language": TRAINED,
    "data.drop_negative_for_sft": LATENT,
    "data.max_tokens": BASE,
    "data.special_token_text": BASE | {"evaluation of import"},
    "data.prompt.training": BASE,
    "data.prompt.evaluation": BASE | {"import"},
    "base": BASE,
    **dict.fromkeys(["base.path", "base.licence", "base.hub_id", "base.revision"], NOTHING),
    "models.sft": {"sft", "decode"},
    "models.latent_sft": {"latent", "rl", "policy"},
    "models.rl": {"rl"},
    "models.curriculum": {"curriculum"},
    "models.teacher_forced": {"forced"},
    "models.policy": {"policy"},
    "models.decode": {"decode"},
    "models.decode.forced_steps": {"evaluation of decode"},
    "models.import": {"import"},
    "models.import.licence": NOTHING,
    "models.import.forced_steps": {"evaluation of import"},
    "evaluation": {"evaluation"},
    "evaluation.datasets": NOTHING,
    "inside": {"inside"},
    **dict.fromkeys(["inside.models", "inside.datasets"], NOTHING),
    **dict.fromkeys(["runtime", "tracking", "report"], NOTHING),
}
# Where rows and the base come from the hub, these differ.
FROM_HUB: dict[str, set[str]] = {
    **dict.fromkeys(["data.hub_id", "data.hub_config", "data.revision"], ROWS),
    **dict.fromkeys(["base.hub_id", "base.revision"], BASE),
    **dict.fromkeys(["data.prompt.training", "data.max_tokens"], TRAINED),
    "data.special_token_text": TRAINED | {"evaluation of import"},
    "data.number_rule": ROWS | TRAINED | {"evaluation of import"},
    **dict.fromkeys(["data.generated", "base.texts", "base.training"], NOTHING),
    **dict.fromkeys(["base.architecture", "base.any_opening"], NOTHING),
}

GGUF = {"base.source": "gguf", "base.path": "base.gguf"}
# Values that have to agree with others: what is set beside the key, or instead of it.
WITH: dict[str, dict[str, Any]] = {
    "data.source": {"data.source": "local", "data.path": "rows", **GGUF},
    "data.generated.max_steps": {"data.generated": {"max_steps": 2, "step_weights": [1, 1]}},
    "data.augmentation.method": {"data.augmentation.method": "none"},
    "base.source": GGUF,
    "base.texts": {"base.texts": {"full": 1.0}},
    "models.sft.from": {"models.sft.from": "import"},
    "models.latent_sft.from": {"models.latent.from": "other"},
    "models.rl.from": {"models.rl.from": "other"},
    "models.curriculum.from": {"models.curriculum.from": "sft"},
    "models.teacher_forced.from": {"models.forced.from": "sft"},
    "models.policy.from": {"models.policy.from": "sft"},
    "models.decode.from": {"models.decode.from": "other"},
    "models.import.from": {"models.import": {"stage": "import", "from": "base"}},
    "models.import.format": {"models.import.format": "codi", "models.import.forced_steps": 6},
    "models.latent_sft.step_decoder": {"models.latent.step_decoder": {}},
    "models.curriculum.step_decoder": {"models.curriculum.step_decoder": {}},
    "models.curriculum.training": {"models.curriculum.training.steps": 600},
    "models.curriculum.model": {"models.curriculum.model": {"start_token_from": "<<"}},
    "models.teacher_forced.colar.speed_text": {"models.forced.colar.speed_text": " at {speed}"},
    "models.latent_sft.distillation.teacher": {"models.latent.distillation.teacher": "sft"},
    "models.latent_sft.distillation.traces": {
        "models.latent.distillation": {"teacher": "sft", "traces": "teacher"}
    },
    "models.teacher_forced.csft.teacher": {
        "models.forced.method": "csft",
        "models.forced.csft.teacher": "sft",
    },
    "inside.models": {"inside.models": ["latent"]},
    "report.ablations": {"report.ablations": {"the recipe": "latent"}},
    "report.rl_from": {"report.rl_from": {"import": "sft"}},
    "report.rivals.failed": {"report.rivals": {"trials": {"a": ["sft"]}, "failed": {"sft": "why"}}},
    "report.rivals.lines": {"report.rivals": {"models": ["sft"], "lines": {"a": ["sft"]}}},
    "report.rivals.published": {
        "report.rivals": {"models": ["sft"], "published": {"sft": {"GPT-2": 0.5}}}
    },
    **{f"models.{stage}.lora": {f"models.{name}.lora": None} for stage, name in NAMES.items()},
}
# Values that are tried, in this order, until the configuration takes one.
VALUES = (
    *(4, 128, 8, 2, 0.25, 0.75, True, False, "another", ["o_proj"], [0.5, 0.75], [1, 1], [1] * 5),
    *({"steps": 7}, {"svamp": "svamp.jsonl"}, {"sft": {"accuracy": 0.5}}, ["validation"], ["sft"]),
    *("best", "last", "linear", "tokens", "none", "adapter", "all", "no_cot", "l1", "exact"),
    *("grpo", "skip", "cpu", "float32", "public", "no_thought", "csft", "mts", "latentseek"),
    *("marker", "mean", "nll", "own", "root", "encoder", "oracle", {"sft": ["sft"]}),
    *("right", "gpt2"),
)


def schema_keys() -> list[Key]:
    """Every key below the experiment's own, those of an entry of `models` by its stage."""
    sections = {f"models.{stage}": entry for stage, entry in ENTRIES.items()}
    for name, field in Experiment.model_fields.items():
        section = section_in(field.annotation)
        if section is not None and name not in ("model", "stages"):  # they are defaults of models
            sections[name] = section
    keys = [key for name in sections for key in keys_of(sections[name], name, frozenset())]
    return [key for key in keys if not key.name.endswith(".stage")]


KEYS = {key.name: key for key in schema_keys()}


def effect_of(key: str, hub: bool = False) -> set[str]:
    """What follows a key: the entry of the table that names it, or the section around it."""
    effects = EFFECTS | FROM_HUB if hub else EFFECTS
    while key not in effects:
        key = key.rpartition(".")[0]
    return effects[key]


def test_the_table_of_effects_names_keys_of_the_schema():
    names = {*KEYS, *(name.rpartition(".")[0] for name in KEYS)}
    names |= {name.rpartition(".")[0] for name in names} - {""}
    assert not sorted({*EFFECTS, *FROM_HUB, *WITH} - names)
    assert len(KEYS) > 180


# Only what reads rows and the base differs between the two.
@pytest.mark.parametrize(
    ("key", "raw"),
    [(key, SCRATCH) for key in KEYS] + [(k, HUB) for k in KEYS if k.startswith(("data", "base"))],
    ids=lambda value: value if isinstance(value, str) else value["experiment"],
)
def test_a_key_changes_the_results_that_depend_on_it_and_no_other(key, raw):
    after = digests_of(changed(raw, key))
    found = {name for name, digest in unchanged(raw["experiment"]).items() if digest != after[name]}
    assert found == with_evaluations(effect_of(key, hub=raw is HUB)), (
        f"{key}: if this is meant, say so in EFFECTS of tests/dag/test_digests.py; if not, mark "
        "the key where it is defined (science_for, NOT_SCIENCE). Then run make docs to record it"
    )


@cache
def unchanged(name: str) -> dict[str, str]:
    return digests_of(resolve(HUB if name == "hub" else SCRATCH, "a.yaml"))


def digests_of(experiment: Experiment) -> dict[str, str]:
    """The digest of every result of an experiment."""
    models = {name: science_digest(experiment, "model", name) for name in experiment.models}
    evaluations = {
        f"{stage} of {name}": science_digest(experiment, stage, name)
        for stage in ("evaluation", "inside")
        for name in experiment.models
    }
    other = {stage: science_digest(experiment, stage) for stage in ("data", "base")}
    return models | evaluations | other


def with_evaluations(results: set[str]) -> set[str]:
    """The results, the evaluations of the models among them, and what is seen inside them;
    `evaluation` and `inside` stand for all."""
    models = set(SCRATCH["models"])
    evaluated = models if "evaluation" in results else results & models
    results = results | {f"evaluation of {model}" for model in evaluated}
    seen = {m for m in models if "inside" in results or f"evaluation of {m}" in results}
    return results - {"evaluation", "inside"} | {f"inside of {model}" for model in seen}


def changed(raw: dict[str, Any], key: str) -> Experiment:
    """The experiment with another, allowed value of one key of the schema."""
    if key in WITH:
        return resolve(with_values(raw, WITH[key]), "b.yaml")
    attribute = key.split(".")
    # The schema's keys go by the stage of an entry, the file's by its name.
    if attribute[0] == "models":
        attribute[1] = NAMES.get(attribute[1], attribute[1])
    name = ".".join(attribute)
    if attribute[0] == "models":
        raw = with_values(raw, conditions(key, name))
    before = dump(resolve(raw, "a.yaml"))
    for value in VALUES:
        try:
            experiment = resolve(with_values(raw, {name: value}), "b.yaml")
        except ConfigError:
            continue
        if dump(experiment) != before:
            return experiment
    raise AssertionError(
        f"{key}: no value of VALUES fits; add one, or say in WITH what goes with it"
    )


def conditions(key: str, name: str) -> dict[str, Any]:
    """What a key of an entry counts with: values of other keys, by their names in the file."""
    parts, names, found = key.split(".")[2:], name.split(".")[:2], {}
    section = ENTRIES[key.split(".")[1]]
    for part in parts:
        field = next(field for alias, _, field in fields_of(section) if alias == part)
        marks = [mark for mark in field.metadata if isinstance(mark, OnlyWhen)]
        found |= {".".join([*names, mark.key]): min(mark.values) for mark in marks}
        names.append(part)
        section = section_in(field.annotation)
    return found


def with_values(raw: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the values of dotted keys set."""
    out: dict[str, Any] = copy.deepcopy(raw)
    for name, value in values.items():
        *sections, last = name.split(".")
        node = out
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return out


# --------------------------------------------------------------------------------------- digests


def test_a_default_written_out_is_the_same_as_one_left_out():
    for raw in (SCRATCH, HUB):
        experiment = resolve(raw, "short.yaml")
        written = yaml.safe_load(yaml.safe_dump(dump(experiment)))
        assert digests_of(resolve(written, "long.yaml")) == digests_of(experiment)


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
    experiment = changed(SCRATCH, "models.latent_sft.distillation.teacher")
    chain = digests.science(experiment, "model", "rl")["models"]
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
        ("sft", {"sft", "decode"}),
        ("latent_sft", {"latent", "rl", "other", "policy"}),
        ("rl", {"rl"}),
        ("import", {"import"}),
        ("evaluation", {"evaluation"}),
        ("inside", {"inside"}),
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
    scientific = {key for key in KEYS if effect_of(key) or effect_of(key, hub=True)}
    stages = {f"models.{stage}.stage" for stage in ENTRIES}
    assert set(recorded()["defaults"]) == scientific | stages


def test_a_changed_default_is_refused_until_the_recipe_is_raised():
    older = recorded()
    older["defaults"]["models.rl.epsilon"] = 0.1
    with pytest.raises(ConfigError) as caught:
        digests.defaults_text(older)
    assert str(caught.value).startswith("the default of models.rl.epsilon was 0.1 and is now 0.2")
    assert "Raise RECIPE['rl'] in src/latent_reasoning/dag/digests.py" in str(caught.value)
    older["recipe"] = {**older["recipe"], "rl": 0}
    assert '"models.rl.epsilon": 0.2' in digests.defaults_text(older)


def test_a_new_key_is_recorded_and_a_removed_one_forgotten():
    older = recorded()
    del older["defaults"]["models.rl.loss"]
    older["defaults"]["models.rl.obsolete"] = 1
    assert digests.defaults_text(older) == config_docs.DEFAULTS.read_text(encoding="utf-8")
