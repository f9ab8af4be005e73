"""`config/published.yaml`: eleven releases through import, evaluation and analysis.

The releases are stand-ins: tiny random models in the published format, and plain ones.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas
import pytest
import torch
import yaml
from safetensors.torch import load_file

from latent_reasoning.analysis.__main__ import main as analyse
from latent_reasoning.base.__main__ import main as bring_in
from latent_reasoning.config import PROJECT_ROOT, ConfigError, Model, load
from latent_reasoning.data.__main__ import main as prepare
from latent_reasoning.data.dial.problems import generate_splits
from latent_reasoning.data.dial.tokenizer import build_tokenizer, generated_texts
from latent_reasoning.evaluation.__main__ import main as evaluate
from latent_reasoning.model import folder as checkpoints
from latent_reasoning.model.published import published_name
from latent_reasoning.model.special_tokens import make_latent
from tests.model.models import build_base, to_published_format

CONFIG = PROJECT_ROOT / "config" / "published.yaml"
PLAIN = ("cot-sft", "no-cot-sft")
ROWS = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stand-in releases, rows, and the configuration that names them."""
    folder = tmp_path_factory.mktemp("published")
    write_rows(folder / "rows")
    content = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    content["data"] |= {"source": "local", "path": str(folder / "rows")}
    content["evaluation"] |= {"max_new_tokens": 8, "max_forced_steps": 2}
    content["runtime"] |= {"device": "cpu", "threads": 1}
    content["tracking"] = {"enabled": False}
    for name, entry in content["models"].items():
        entry["path"] = str(folder / "releases" / name)
        write_release(folder / "releases" / name, latent=name not in PLAIN)
    (folder / "published.yaml").write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
    return folder


def write_rows(folder: Path) -> None:
    folder.mkdir()
    splits = generate_splits(
        train=8, validation=2, test=ROWS, max_steps=2, step_weights=[1, 1], modulus=7, seed=0
    )
    for name, rows in splits.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def write_release(folder: Path, *, latent: bool) -> None:
    """A model folder as the authors' code saves it; a plain one as transformers does."""
    tokenizer = build_tokenizer(generated_texts(7))
    base = build_base(vocabulary=len(tokenizer)).float()
    if latent:
        model = make_latent(base, tokenizer, Model(detach_stop_head=True))
        checkpoints.save(model, tokenizer, folder, {})
        to_published_format(folder, model)
    else:
        base.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def results(world: Path) -> Path:
    """Everything that the workflow's rules leave, made by the stages themselves."""
    config = ["--config", str(world / "published.yaml")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENT_REASONING_RESULTS", str(world / "results"))
        prepare(config)
        for name in load(world / "published.yaml").models:
            bring_in([*config, "--model", name])
            evaluate([*config, "--model", name])
        for what in ("tables", "appendix", "figures", "report"):
            analyse([what, *config])
    return world / "results" / "published"


def test_eleven_releases_are_evaluated_and_stand_in_the_tables(results):
    main = pandas.read_csv(results / "tables" / "main.csv")
    appendix = pandas.read_csv(results / "tables" / "appendix.csv")
    assert [len(main), len(appendix)] == [6, 5]
    assert set(main["n"]) | set(appendix["n"]) == {ROWS}
    published = main.set_index("model")["published_accuracy"].dropna().to_dict()
    assert published == {"latent-6": 0.4973, "latent-6-rl": 0.5011}
    assert set(appendix["reasoning_tokens"]) == {8.0}  # six forced steps, START and STOP


def test_rl_releases_are_compared_with_those_they_started_from(results):
    paired = pandas.read_csv(results / "tables" / "paired.csv")
    pairs = set(zip(paired["model"], paired["reference"], strict=True))
    assert pairs == {("latent-6-rl", "latent-6"), ("latent-6-by-1-rl", "latent-6-by-1")}
    changes = pandas.read_csv(results / "tables" / "main.csv").set_index("model")["tokens_vs_sft"]
    assert changes["latent-6-rl"] == 0.0  # the stand-ins are alike
    assert pandas.isna(changes["latent-6"])


def test_figures_and_page_are_made_without_any_training(results):
    assert (results / "figures" / "accuracy_vs_tokens.png").stat().st_size > 1000
    page = (results / "report.html").read_text(encoding="utf-8")
    assert "released weights" in page


def test_an_imported_release_is_whole_and_says_where_it_comes_from(world, results):
    folder = results / "models" / "latent-6" / "seed-0"
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    assert card["parent"] == str(world / "releases" / "latent-6")
    assert card["licence"]["weights"] == "llama3.2"
    model = checkpoints.load(folder, "cpu")
    assert model.settings.allow_rethinking
    assert model.settings.detach_stop_head
    theirs = load_file(world / "releases" / "latent-6" / "model.safetensors")
    own = {published_name(n): p for n, p in model.named_parameters()}
    assert all(torch.equal(tensor, own[name]) for name, tensor in theirs.items())


def test_a_release_that_is_not_there_is_asked_for_with_its_folder(world, monkeypatch):
    monkeypatch.setenv("LATENT_REASONING_RESULTS", str(world / "other"))
    missing = r"models\.latent-6\.path: .*releases/latent-6: no such folder; download the model"
    with pytest.raises(ConfigError, match=missing):
        bring_in(["--config", str(CONFIG), "--model", "latent-6"])


def test_an_adapter_alone_is_refused_with_what_is_missing(world, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENT_REASONING_RESULTS", str(tmp_path / "results"))
    release = tmp_path / "adapter"
    release.mkdir()
    shutil.copy(world / "releases" / "latent-6" / "config.json", release / "adapter_config.json")
    content = yaml.safe_load((world / "published.yaml").read_text(encoding="utf-8"))
    content["models"]["latent-6"]["path"] = str(release)
    file = tmp_path / "published.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(checkpoints.CheckpointError, match="an adapter alone"):
        bring_in(["--config", str(file), "--model", "latent-6"])
