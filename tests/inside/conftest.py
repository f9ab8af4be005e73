"""A study of a tiny random latent model, written as the stage writes it."""

from __future__ import annotations

import pytest

from latent_reasoning.data.rows import Row
from latent_reasoning.inside.page import write_page
from latent_reasoning.inside.reasoning import Subject
from latent_reasoning.inside.study import Options, study_latent
from tests.model.models import build_reasoner, build_tokenizer


def rows(count: int, first: int = 0) -> list[Row]:
    """Questions of words, each with a chain of one or two sums."""
    made = []
    for i in range(first, first + count):
        steps = (f"<<{i}+3={i + 3}>>", f"<<{i + 3}+50={i + 53}>>")[: 1 + i % 2]
        words = " ".join(f"w{1 + (i * j) % 19}" for j in range(1, 4 + i % 3))
        made.append(Row(f"test-{i}", words, steps, steps[-1].split("=")[1][:-2]))
    return made


def tiny_subject(architecture: str = "llama") -> Subject:
    """A random model of two blocks that takes two latent steps at most."""
    tokenizer = build_tokenizer()
    model = build_reasoner(architecture, max_latent_steps=2).requires_grad_(False)
    return Subject(model, tokenizer, "", batch=16)


@pytest.fixture(scope="session")
def study():
    return study_latent(tiny_subject(), rows(24), rows(24, 24), Options(sample=8, most=3))


@pytest.fixture(scope="session")
def study_folder(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inside") / "study"
    study.summary |= {"model": "tiny", "seed": 0, "dataset": "test"}
    study.write(folder)
    return folder


@pytest.fixture(scope="session")
def page(study_folder):
    file = study_folder.parent / "inside.html"
    write_page([study_folder], file, "Inside a tiny model")
    return file
