"""The stages base and import as commands: the folders they leave, and their errors."""

import json

import pytest
import torch
import yaml

from latent_reasoning.base.__main__ import main
from latent_reasoning.config import ConfigError, digest, load
from latent_reasoning.dag.digests import science_digest
from latent_reasoning.model import folder as checkpoints
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.self_check import SelfCheckError
from latent_reasoning.runtime.files import SUMS
from tests.model.models import build_base, build_reasoner, build_tokenizer


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """A configuration whose base and imported model are local folders."""
    monkeypatch.setenv("LATENT_REASONING_RESULTS", str(tmp_path / "results"))
    base = LatentReasoner(build_base().float(), None)
    checkpoints.save(base, build_tokenizer(special=False), tmp_path / "base", {})
    checkpoints.save(build_reasoner().float(), build_tokenizer(), tmp_path / "theirs", {})
    content = {
        "experiment": "tiny",
        "data": {"source": "local", "path": str(tmp_path), "prompt": {"evaluation": "Q: "}},
        "base": {"source": "local", "path": str(tmp_path / "base"), "licence": "mit"},
        "models": {
            "theirs": {"stage": "import", "path": str(tmp_path / "theirs")},
            "untrained": {"stage": "import", "from": "base"},
        },
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def test_the_base_model_gets_a_folder_and_a_card(experiment):
    file = str(experiment / "tiny.yaml")
    main(["--config", file, "--digest", science_digest(load(file), "base")])
    folder = experiment / "results" / "tiny" / "base"
    card = json.loads((folder / "card.json").read_text())
    assert card["licence"]["weights"] == "mit"
    assert card["prompt_prefix"] == "Q: "
    assert card["config_digest"] == science_digest(load(file), "base") == digest(card["science"])
    state = checkpoints.load(experiment / "base", "cpu").state_dict()
    own = checkpoints.load(folder, "cpu").state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in own.items())


def test_imported_models_get_folders(experiment):
    file = str(experiment / "tiny.yaml")
    main(["--config", file])
    for name, thinks in (("theirs", True), ("untrained", False)):
        main(["--config", file, "--model", name, "--seed", "2"])
        folder = experiment / "results" / "tiny" / "models" / name / "seed-2"
        assert (checkpoints.load(folder, "cpu").settings is not None) == thinks
        card = json.loads((folder / "card.json").read_text())
        assert (card["seed"], card["config_digest"]) == (2, digest(card["science"]))


@pytest.mark.parametrize("options", [[], ["--model", "theirs"]])
def test_a_model_that_is_brought_in_is_tried_first(experiment, options):
    """A Llama that says it scales its logits, and does not."""
    for name in ("base", "theirs"):
        file = experiment / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"logits_scaling": 2.0}))
        (experiment / name / SUMS).unlink()
    with pytest.raises(SelfCheckError, match=r"LlamaForCausalLM fails .*docs/bases\.md"):
        main(["--config", str(experiment / "tiny.yaml"), *options])
    assert not (experiment / "results").exists()


def test_a_configuration_that_changed_since_it_was_planned_is_refused(experiment):
    with pytest.raises(ConfigError, match="the file changed after the workflow started"):
        main(["--config", str(experiment / "tiny.yaml"), "--digest", "0" * 16])
