"""The page: complete, self-contained, and honest about what was not reached."""

import re
from html.parser import HTMLParser

import pandas
import pytest

from latent_reasoning.analysis import report
from latent_reasoning.analysis.environment import environment, job_times
from latent_reasoning.analysis.figures import FIGURES
from latent_reasoning.analysis.results import MissingResultError
from latent_reasoning.analysis.tables import SUPPLEMENTS
from latent_reasoning.config import LatentSteps


@pytest.fixture
def page_of(drawn, tmp_path):
    """The page of some results, with the figures of others."""

    def write(results):
        report.write_report(results, drawn, tmp_path / "report.html")
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return write


@pytest.fixture
def page(page_of, three_seeds):
    return page_of(three_seeds)


class Checker(HTMLParser):
    """Collects what a page would fetch, and tags that do not match."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self):
        super().__init__()
        self.sources, self.open, self.unmatched = [], [], []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unmatched.append(tag)


def test_the_page_fetches_nothing_and_its_tags_match(page):
    checker = Checker()
    checker.feed(page)
    assert len(checker.sources) == len(FIGURES)
    assert all(source.startswith("data:image/svg+xml;base64,") for source in checker.sources)
    assert (checker.open, checker.unmatched) == ([], [])
    assert "url(" not in page


def test_the_page_has_every_part_and_published_figures_beside_ours(page):
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        *("What is claimed", "Verdicts", "Results", "Figures", "What was run"),
        *("Departures from the paper", "Environment", "How to reproduce it"),
    ]
    assert "14 of 14 claims are reached" in page
    assert "The base model is trained from scratch on generated text." in page
    row = re.search(r"<td>latent-6-rl</td><td>test</td>.*?</tr>", page).group()
    assert "50.11" in row
    assert "3.76" in row


def test_a_claim_that_is_not_reached_is_called_so(written, page_of, change_summary):
    results = written(0)
    change_summary(results, "latent-6-rl", reasoning_tokens_mean=7.0)
    page = page_of(results)
    assert "13 of 14 claims are reached" in page
    assert page.count("not reached") == 1
    assert "8.00 to 7.00 tokens, -12.5 %" in page


def test_an_experiment_without_latent_models_still_has_a_page(written, page_of):
    results = written(0, report={"main": ["cot-sft"], "title": "Words <only>"})
    page = page_of(results)
    assert "none of the claims applies" in page
    assert "Words &lt;only&gt;" in page


def test_a_missing_figure_is_named_with_the_command_that_makes_it(three_seeds, tmp_path):
    with pytest.raises(MissingResultError, match="accuracy_vs_tokens"):
        report.write_report(three_seeds, tmp_path, tmp_path / "report.html")


def test_every_figure_and_table_has_its_caption():
    names = [*FIGURES, *(f"{n}_table" for n in ("main", "appendix", "claims", *SUPPLEMENTS))]
    for name in [*names, "workflow", "report"]:
        assert len(report.caption(name)) > 60


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "6 latent steps"),
        ({"factor": 0, "bias": 4, "min": None, "max": None}, "4 latent steps"),
        (
            {"factor": 1, "bias": 5, "min": None, "max": 10},
            "5 latent steps + 1 a reasoning step, at most 10",
        ),
        (
            {"factor": 1, "bias": 0, "min": 3, "max": None},
            "0 latent steps + 1 a reasoning step, at least 3",
        ),
    ],
)
def test_latent_steps_are_told_in_words(settings, text):
    assert report.describe_steps(LatentSteps(**settings)) == text


def test_the_environment_names_code_machine_and_versions(three_seeds):
    facts = environment(three_seeds.experiment)
    assert re.fullmatch("[0-9a-f]{16}", facts["Configuration digest"])
    assert {"Commit", "Processor", "Python", "torch", "transformers"} <= set(facts)


def test_the_page_says_which_tests_take_all_seeds_together(page):
    assert "but for the tests at each number of steps, which take the rows of all seeds" in page


def test_job_times_are_read_from_the_workflows_own_measurements(written):
    results = written(0)
    folder = results.layout.benchmarks / "sft"
    folder.mkdir(parents=True)
    pandas.DataFrame({"s": [61.5], "h:m:s": ["0:01:01"], "max_rss": ["-"]}).to_csv(
        folder / "cot-sft.tsv", sep="\t", index=False
    )
    (row,) = job_times(results.layout).to_dict("records")
    assert (row["job"], row["seconds"]) == ("sft/cot-sft", 61.5)
    assert pandas.isna(row["megabytes"])
