"""Revisions on the hub are pinned by an overlay; nothing here reaches the hub."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from latent_reasoning.config import PROJECT_ROOT, ConfigError, load
from latent_reasoning.dag.digests import science_digest
from tools import pin_revisions

PAPER = PROJECT_ROOT / "config" / "paper.yaml"
COMMITS = {"whynlp/gsm8k-aug": "d" * 40, "meta-llama/Llama-3.2-1B-Instruct": "b" * 40}


class Hub:
    """Stands in for the hub's client: it knows the commits, or cannot be reached."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.asked = error, []

    def _info(self, kind: str, hub_id: str, revision: str | None) -> Any:
        self.asked.append((kind, hub_id, revision))
        if self.error:
            raise self.error
        return SimpleNamespace(sha=COMMITS.get(hub_id))

    def dataset_info(self, hub_id: str, revision: str | None = None) -> Any:
        return self._info("dataset", hub_id, revision)

    def model_info(self, hub_id: str, revision: str | None = None) -> Any:
        return self._info("model", hub_id, revision)


@pytest.fixture
def hub(monkeypatch) -> Hub:
    hub = Hub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=lambda: hub))
    return hub


def test_the_overlay_pins_data_and_base_of_the_paper_and_changes_nothing_else(
    hub, tmp_path, capsys
):
    output = tmp_path / "pinned.yaml"
    assert pin_revisions.main([str(PAPER), "--output", str(output)]) == 0
    assert yaml.safe_load(output.read_text(encoding="utf-8")) == {
        "data": {"revision": "d" * 40},
        "base": {"revision": "b" * 40},
    }
    assert f"written to {output}" in capsys.readouterr().out
    plain, pinned = load(PAPER), load([PAPER, output])
    assert (pinned.data.revision, pinned.base.revision) == ("d" * 40, "b" * 40)
    assert science_digest(plain, "base") != science_digest(pinned, "base")
    pinned.data.revision = pinned.base.revision = None
    assert pinned == plain


def test_a_branch_that_the_experiment_names_is_the_one_that_is_pinned(hub, tmp_path):
    over = tmp_path / "over.yaml"
    over.write_text("data: {revision: v1}\n", encoding="utf-8")
    pin_revisions.pinned(load([PAPER, over]))
    assert [revision for _, _, revision in hub.asked] == ["v1", None]


def test_a_hub_that_cannot_be_reached_is_said_with_what_to_do_and_no_file_is_written(
    hub, tmp_path, capsys
):
    hub.error = ConnectionError("no route\nto host")
    output = tmp_path / "pinned.yaml"
    assert pin_revisions.main([str(PAPER), "--output", str(output)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: the hub could not be reached, or does not show the dataset")
    assert "no route to host" in message
    assert "https://huggingface.co/datasets/whynlp/gsm8k-aug/commits/main" in message
    assert not output.exists()


def test_a_hub_that_names_no_commit_is_refused(hub, monkeypatch):
    monkeypatch.delitem(COMMITS, "whynlp/gsm8k-aug")
    with pytest.raises(pin_revisions.HubError, match="names no commit of the dataset"):
        pin_revisions.pinned(load(PAPER))


def test_an_experiment_that_reads_nothing_from_the_hub_is_told_so(hub):
    with pytest.raises(ConfigError, match="there is nothing to pin"):
        pin_revisions.pinned(load(PROJECT_ROOT / "config" / "test.yaml"))
    assert hub.asked == []
