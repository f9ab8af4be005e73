"""The configuration: strict types, clear errors, merging and paths."""

from __future__ import annotations

import copy
import datetime
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from latent_reasoning.config import (
    PROJECT_ROOT,
    ConfigError,
    dump_yaml,
    expand_path,
    is_local,
    load,
    merge,
    read,
    resolve,
)

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


@pytest.mark.parametrize("text", ["010", "-07", "00", "1:30", "190:20:30", "1:30.5", "-1:30"])
def test_numbers_that_yaml_reads_as_octal_or_sexagesimal_are_refused(tmp_path, text):
    path = tmp_path / "odd.yaml"
    path.write_text(f"experiment: odd\nseeds: [{text}]\n")
    with pytest.raises(
        ConfigError, match=rf"line 2, column 9 {re.escape(text)} is no whole number"
    ):
        load(path)
    path.write_text(f"seeds: [0, 0x10, 1_000]\nexperiment: '{text}'")
    assert read([path]) == {"seeds": [0, 16, 1000], "experiment": text}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("9" * 5000, "line 1, column 8 9+ is no int: Exceeds the limit"),
        ("0b_", "line 1, column 8 0b_ is no int"),
        ('!!int "x"', "line 1, column 8 x is no int"),
        ("!!float '.'", r"line 1, column 8 \. is no float"),
        ("!!bool x", "line 1, column 8 x is no bool"),
        ("!!map [1]", "line 1, column 8 expected a mapping node"),
        ("[" * 5000, "nested too deeply"),
    ],
    ids=lambda text: text[:20],
)
def test_yaml_that_its_reader_cannot_construct_is_refused_with_its_place(tmp_path, text, problem):
    path = tmp_path / "odd.yaml"
    path.write_text(f"seeds: {text}\n")
    with pytest.raises(ConfigError, match=rf"odd\.yaml: {problem}"):
        read([path])


@pytest.mark.parametrize(
    ("text", "number"), [("1e-4", 1e-4), ("8E-4", 8e-4), ("2.5e+1", 25.0), (".5e-1", 0.05)]
)
def test_a_number_with_an_exponent_is_a_number(text, number):
    raw = yaml.safe_load(f"learning_rate: {text}")
    experiment = resolve(changed("models.sft.training", {"steps": 1, **raw}), "small.yaml")
    assert experiment.models["sft"].training.learning_rate == number
    reward = resolve(changed("models.rl.reward", {"bonus": text}), "small.yaml").models["rl"].reward
    assert reward.bonus == number


def test_a_share_that_is_neither_none_nor_all_may_have_an_exponent():
    policy = {"stage": "policy", "from": "latent", "method": "pondernet", "training": {"steps": 3}}
    raw = changed("models.ponder", policy | {"ponder": {"rate": "2e-1"}})
    assert resolve(raw, "small.yaml").models["ponder"].ponder.rate == 0.2


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
    ("models.sft.save", "adapter", "save: adapter keeps the adapter of lora, but lora is null"),
    ("models.sft.lora", {"target_modules": []}, "models.sft.lora.target_modules"),
    ("models.sft.start", "base", "models.sft.start: unknown key"),
    ("models.sft.training.lr", 1, "sft.training.lr: unknown key; allowed here: accumulation"),
    ("report.published", {"sft": {"x": 1}}, "published.sft.x: unknown key; allowed here: accuracy"),
    ("runtime.guard", {"gap": 1}, "runtime.guard.gap: unknown key; allowed here: enabled, rollb"),
    (
        "runtime.guard",
        {"window": 9},
        "guard.window: no longer a setting: take the line out (its",
    ),
    ("runtime.guard", {"rollbacks": -1}, "runtime.guard.rollbacks: Input should be greater than"),
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
    ("models.sft.training.betas", [0.9, 1], "training.betas.1: Input should be less than 1, not 1"),
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
    ("models.latent.distillation", {"block_range": [0, 99]}, "block 99 does not exist"),
    ("models.rl.max_latent_steps", 39, "leave no token of max_new_tokens: 40 for the answer"),
    ("models.sft.from", "latent", "token SFT starts from a plain language model"),
    ("models.x", {"stage": "import"}, "give either path (hub id or folder) or from: base"),
    (
        "model.recurrent_filter",
        "mlp",
        "'gaussian', 'mixture', 'attention' or 'pause', not 'mlp'",
    ),
    ("data.source", "local", "source: local needs path"),
    ("data.source", "hub", "source: hub needs hub_id"),
    ("data", {"source": "local", "path": "rows"}, "base.source: scratch trains on generated text"),
    ("data.sft_share", 1.0, "data.sft_share: 1.0 leaves no rows for the RL model 'rl'"),
    ("data.generated", {"max_steps": 3}, "step_weights has 5 values for max_steps = 3"),
    ("data.generated", {"modulus": 13}, "less than or equal to 12, not 13"),
    ("data.extra_tests", {"test": "x"}, "names of splits cannot name another test set: test"),
    ("data.extra_tests", {"a/b": "x"}, "String should match pattern"),
    ("base.source", "gguf", "source: gguf needs path"),
    ("base.architecture", {"num_attention_heads": 5}, "no multiple of twice num_attention_heads"),
    ("base.architecture", {"num_key_value_heads": 3}, "no multiple of num_key_value_heads"),
    ("base.architecture", {"family": "gpt2", "num_key_value_heads": 2}, "a gpt2 has as many as"),
    ("evaluation.datasets", ["svamp"], "'svamp' is not among test, validation"),
    ("evaluation.datasets", [], "evaluation.datasets: List should have at least 1 item"),
    ("inside.datasets", [], "inside.datasets: List should have at least 1 item"),
    ("report.main", [], "report.main: List should have at least 1 item"),
    ("inside.models", [], "inside.models: List should have at least 1 item"),
    ("report.main", ["nobody"], "report.main: 'nobody' is not in models"),
    ("report.appendix", ["nobody"], "report.appendix: 'nobody' is not in models"),
    ("report.rl_from", {"sft": "nobody"}, "report.rl_from: 'nobody' is not in models"),
    ("report.rl_from", {"rl": "latent"}, "report.rl_from: 'rl' is of stage rl, and says itself"),
    ("seeds", [], "seeds: List should have at least 1 item"),
    ("seeds", [1, 1], "seeds: 1 stands twice"),
    ("evaluation.datasets", ["test", "test"], "evaluation.datasets: 'test' stands twice"),
    ("report.main", ["sft", "rl", "sft"], "report.main: 'sft' stands twice"),
    ("report.rivals", {"models": ["rl", "rl"]}, "report.rivals.models: 'rl' stands twice"),
    ("models", {}, "models: Dictionary should have at least 1 item"),
]


@pytest.mark.parametrize(("key", "value", "words"), REFUSED, ids=lambda v: str(v)[:40])
def test_what_cannot_be_run_is_refused_with_what_is_allowed(key, value, words):
    message = error_of(changed(key, value))
    assert "small.yaml: " in message
    assert words in message


def test_every_mistake_is_told_at_once():
    raw = changed("data.sources", "x")
    raw["runtime"] = {"threads": 0}
    keys = [line.split(":")[1].strip() for line in error_of(raw).splitlines()]
    assert keys == ["data.sources", "runtime.threads"]


def test_a_mistake_in_defaults_is_told_once_where_it_was_written():
    raw = changed("stages.rl", {"size": 1, "training": {"betas": [0.9, 1], "stepz": 3}})
    raw["model"] = {"recurrent_filter": "x"}
    raw["models"] |= {
        "other-rl": {"stage": "rl", "from": "latent", "training": {"steps": 1, "stepz": 3}},
        "other": {"stage": "latent_sft", "from": "base", "training": {"steps": 1}},
    }
    keys = sorted(": ".join(line.split(": ")[1:-1]) for line in error_of(raw).splitlines())
    told = [key.removesuffix(": unknown key; allowed here") for key in keys]
    assert told == [
        "model.recurrent_filter",
        "models.other-rl.training.stepz",
        "stages.rl.training.betas.1",
        "stages.rl.training.stepz",
        "stages: rl.size",
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


@pytest.mark.parametrize(
    "value", ["2020-01-01", "!!binary YQ==", ".nan", "!!set {a}", '"\\ud800"', "[1, 2020-01-01]"]
)
def test_a_value_that_a_dump_would_change_is_refused_with_its_line(tmp_path, value):
    path = tmp_path / "odd.yaml"
    path.write_text(
        f"experiment: odd\nstages: {{rl: {{temperature: {value}}}}}\n", encoding="utf-8"
    )
    with pytest.raises(ConfigError, match=r"odd\.yaml: line 2, column \d+ .* is neither text nor"):
        load(path)


def test_a_text_with_any_line_break_survives_the_dump(tmp_path):
    title = "a\x85b\u2028c\nd"
    experiment = resolve(changed("report", {"title": title}), "small.yaml")
    (tmp_path / "dumped.yaml").write_text(dump_yaml(experiment), encoding="utf-8")
    assert load(tmp_path / "dumped.yaml") == experiment
    assert load(tmp_path / "dumped.yaml").report.title == title


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


@pytest.mark.parametrize("own", ["SRE", None, 3])
def test_an_entrys_model_that_is_no_mapping_is_refused_beside_the_section_model(own):
    raw = changed("models.latent.model", own) | {"model": {"recurrent_filter": "MLP"}}
    message = error_of(raw)
    assert "models.latent.model: Input should be a valid dictionary" in message
    assert message.endswith(f"not {own!r}")


def test_a_mapping_that_overrides_a_merged_one_may_be_merged_elsewhere(tmp_path):
    path = tmp_path / "merged.yaml"
    path.write_text(
        "model: {<<: &steady {recurrent_filter: SRE, detach_stop_head: true}}\n"
        "stages: {latent_sft: {model: &own {<<: *steady, recurrent_filter: none}}}\n"
        "base: {<<: *own}\n"
    )
    raw = read([path])
    assert raw["stages"]["latent_sft"]["model"] == raw["base"]
    assert raw["base"] == {"recurrent_filter": "none", "detach_stop_head": True}


# ------------------------------------------------------------------------------------- paths


def test_a_path_starts_at_the_project_and_may_hold_a_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("LATENT_REASONING_DATA", str(tmp_path))
    assert expand_path("${LATENT_REASONING_DATA}/rows") == tmp_path / "rows"
    assert expand_path("some/rows") == PROJECT_ROOT / "some" / "rows"
    assert expand_path("/some/rows") == Path("/some/rows")


def test_the_home_of_nobody_is_refused():
    with pytest.raises(ConfigError, match="'~nobody-here/rows' begins with the home of nobody"):
        expand_path("~nobody-here/rows")


def test_a_path_with_a_variable_is_no_hub_id(monkeypatch):
    monkeypatch.delenv("LATENT_REASONING_BASE", raising=False)
    assert is_local("models/${LATENT_REASONING_BASE}")
    assert not is_local("someone/model")


def test_a_variable_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("LATENT_REASONING_DATA", raising=False)
    with pytest.raises(ConfigError, match="needs the environment variable LATENT_REASONING_DATA"):
        expand_path("${LATENT_REASONING_DATA}/rows")
