"""One question to a model folder."""

import json

import pytest

from latent_reasoning.evaluation import ask
from latent_reasoning.model import folder as checkpoints
from latent_reasoning.model.card import prompt_prefix
from latent_reasoning.model.generation import Generation
from latent_reasoning.model.reasoner import LatentReasoner
from tests.model.models import build_base, build_reasoner, build_tokenizer


@pytest.fixture
def folder(tmp_path):
    card = {"model": "tiny", "prompt_prefix": "w5 "}
    checkpoints.save(build_reasoner().float(), build_tokenizer(), tmp_path / "m", card)
    return tmp_path / "m"


def test_the_answer_the_steps_and_every_stop_probability_are_shown():
    made = [(0.9, 0.1), (0.75, 0.25), (0.2, 0.8)]
    generation = Generation([1, 2], made, latent_steps=2, cut_off=False)
    text = "<|CONTINUE|><|CONTINUE|><|STOP|> The answer is: 1,200<eos>"
    assert ask.answer_text(generation, text, "<eos>", latent=True).splitlines() == [
        "answer: 1200",
        "latent steps: 2",
        "  p(stop) before the first step: 0.1000",
        "  p(stop) after step 1: 0.2500",
        "  p(stop) after step 2: 0.8000",
        "text: The answer is: 1,200",
    ]


def test_a_text_model_shows_its_text_and_a_missing_answer_is_said():
    generation = Generation([1, 2], [], latent_steps=0, cut_off=True)
    assert ask.answer_text(generation, "<<1+1=2>>", "<eos>", latent=False).splitlines() == [
        "answer: none found",
        "text: <<1+1=2>>",
        "(cut off at --max-new-tokens)",
    ]


def test_the_command_answers_with_the_prefix_of_the_models_card(folder, capsys):
    assert prompt_prefix(folder) == "w5 "
    ask.main([str(folder), "w3 w4", "--max-new-tokens", "5", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "answer: none found"
    steps = int(lines[1].removeprefix("latent steps: "))
    assert sum("p(stop)" in line for line in lines) in (steps, steps + 1)


def test_a_plain_folder_answers_too(tmp_path, capsys):
    model = LatentReasoner(build_base().float(), None)
    checkpoints.save(model, build_tokenizer(special=False), tmp_path / "m", {"model": "base"})
    assert prompt_prefix(tmp_path / "m") == "Question: "
    ask.main([str(tmp_path / "m"), "w3", "--max-new-tokens", "3", "--prompt-prefix", ""])
    assert "latent steps" not in capsys.readouterr().out


def test_a_published_checkpoint_is_asked_without_a_prefix(tmp_path):
    config = {"_inserted_LatentThinkingModelSettings": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert prompt_prefix(tmp_path) == ""
