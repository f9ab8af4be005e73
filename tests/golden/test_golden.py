"""The recorded digests are those of today, and changed numbers do not pass in silence."""

from __future__ import annotations

import pytest

from latent_reasoning.config import PROJECT_ROOT
from latent_reasoning.dag.digests import RECIPE
from latent_reasoning.runtime import seeds
from tests.golden import golden


def test_the_digests_of_all_shipped_configurations_are_the_recorded_ones():
    recorded = golden.read("digests")
    found = golden.science_digests()
    assert set(found) == set(recorded["digests"])
    for name, digests in recorded["digests"].items():
        assert found[name] == digests, name


def test_every_recording_is_one_of_todays_recipes():
    for name in ("test", "curves", "laptop", "digests"):
        assert golden.read(name)["recipe"].items() <= RECIPE.items(), f"{name}.json: make golden"


def test_changed_numbers_are_refused_until_a_recipe_is_raised():
    recorded = {"recipe": dict(RECIPE)}
    golden.check_recipes(recorded, [])
    with pytest.raises(ValueError, match=r"Raise the recipe of the stage that changed"):
        golden.check_recipes(recorded, ["models/latent-6/seed-0/model.safetensors"])
    golden.check_recipes({"recipe": RECIPE | {"rl": RECIPE["rl"] - 1}}, ["models/rl"])


def test_a_curve_that_departs_is_named_with_its_step():
    recorded = {"long-rl": [1.0, 0.5]}
    assert golden.curve_differences(recorded, {"long-rl": [1.00001, 0.50002]}) == []
    assert golden.curve_differences(recorded, {"long-rl": [1.0, 0.51]}) == [
        "long-rl: loss 0.51 instead of 0.5 at step 2"
    ]
    assert golden.curve_differences(recorded, {}) == ["long-rl: 0 steps instead of 2"]


def test_a_finished_laptop_experiment_has_the_published_weights():
    recorded = golden.read("laptop")
    found = golden.laptop_sums(PROJECT_ROOT / "results" / "laptop")
    if len(found) < len(recorded["sums"]):
        pytest.skip("no finished laptop experiment in results/laptop (make reproduce)")
    if recorded["machine"] != golden.machine():
        pytest.skip(f"recorded with {recorded['machine']}, here {golden.machine()}")
    assert golden.differences(recorded["sums"], found) == []


SEEDS = {
    seeds.INITIAL_WEIGHTS.format(model="latent-6"): 1451129633059476758,
    seeds.DATA_ORDER.format(model="latent-6"): 4910426746627991280,
    seeds.STEP.format(model="latent-6", step=3): 4361678752560099234,
    seeds.ROLLOUTS.format(model="latent-6-rl", round=2): 3485699165091939927,
    seeds.STOP_LENGTHS.format(model="latent-6-rl", round=2): 5964492550423058005,
    seeds.TEXT_STYLE.format(row="train-5"): 8307928026657709694,
    seeds.RANDOM_READOUT.format(row="train-5"): 160754932663240340,
}


def test_the_texts_that_seeds_hang_on_are_frozen():
    found = {purpose: seeds.seed_for(7, purpose) for purpose in SEEDS}
    assert found == SEEDS
