"""lm-evaluation-harness runs our models, plain and latent ones, and agrees row by row."""

import json
from argparse import Namespace

import pytest

from latent_reasoning.config import UserError
from latent_reasoning.dag.layout import results_root
from latent_reasoning.data.rows import row_lines
from latent_reasoning.evaluation import harness
from latent_reasoning.evaluation.folder import OpenFolder
from latent_reasoning.evaluation.harness import comparison_text, main
from latent_reasoning.evaluation.records import Prediction
from latent_reasoning.model.folder import write_model


@pytest.fixture
def folders(tmp_path, plain, latent, tokenizer, rows):
    """Folders of a plain and a latent model, and a file of rows."""
    (tmp_path / "rows.jsonl").write_text("".join(row_lines(rows)))
    for name, model in (("plain", plain), ("latent", latent)):
        (tmp_path / name).mkdir()
        write_model(model, tokenizer, tmp_path / name)
    return tmp_path


def called(folders, name, *more):
    main(["--path", str(folders / name), "--data", str(folders / "rows.jsonl"), *more])


@pytest.mark.parametrize("arguments", [("latent",), ("plain",), ("plain", "--backend", "hf")])
def test_the_harness_reads_prompts_completes_and_judges_as_we_do(folders, arguments, capsys):
    pytest.importorskip("lm_eval")
    name, *more = arguments
    output = folders / "comparison.json"
    called(folders, name, *more, "--max-new-tokens", "8", "--output", str(output))
    result = json.loads(output.read_text())
    assert (result["n"], result["other_completions"]) == (6, 0)
    assert result["disagreements"] == []
    assert "verdicts that differ: 0" in capsys.readouterr().out


def test_an_answer_is_read_from_a_completion_of_the_model(folders, latent, tokenizer, monkeypatch):
    """Random models never answer, so the completions are written by hand."""
    pytest.importorskip("lm_eval")
    texts = ["x The answer is: 1 The answer is: 3", " the answer is: $1,200.", "none", "3"]
    monkeypatch.setattr(harness, "generate", lambda *_, **__: [Namespace(ids=t) for t in texts])
    monkeypatch.setattr(harness, "decode", lambda _, text: text)
    opened = OpenFolder(latent, tokenizer, "Question: ", next(latent.parameters()).dtype)
    asked = [harness.Row(str(i), "q", None, "3" if i != 1 else "1200") for i in range(4)]
    samples = harness.run_harness(
        harness.reasoner_lm(opened, 4),
        {},
        asked,
        prefix="Question: ",
        max_new_tokens=8,
        until=tokenizer.eos_token,
        batch_size=4,
        device="cpu",
    )
    assert [sample["exact_match"] for sample in samples] == [1, 1, 0, 0]
    assert samples[0]["arguments"][0][0] == "Question: q"


def test_a_text_ends_before_the_first_of_several_ends_or_of_one():
    assert harness._until("4 pens. Q: and", ["Q:", "."]) == "4 pens"
    assert harness._until("4: Q: and", "Q:") == "4: "


def test_rows_with_special_text_are_left_out_aloud(folders, monkeypatch, capsys):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: name)
    (folders / "rows.jsonl").write_text('{"question": "What is <START>?", "answer": "1"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl: all 1 rows hold special-token text"):
        called(folders, "latent")
    assert "rows.jsonl: 1 rows with special-token text are skipped" in capsys.readouterr().out


def test_each_row_that_is_judged_otherwise_says_why(rows):
    def prediction(completion, extracted, correct, formed=True):
        return Prediction("a", "q", "3", completion, extracted, correct, formed, False, 0, 0, None)

    def sample(text, found, right):
        return {"resps": [[text]], "filtered_resps": [found], "exact_match": float(right)}

    pairs = [
        (sample("A: 3", "3", True), prediction("A: 3", "3", True)),
        (sample("A: 3", "3", True), prediction("A: 4", "4", False)),
        (sample("A: 3.0", "3.0", False), prediction("A: 3.0", "3.0", True)),
        (sample("A: 3", "3", True), prediction("A: 3", None, False, formed=False)),
    ]
    result = harness._compared(rows[:4], *zip(*pairs, strict=True))
    assert (result.harness_correct, result.our_correct, result.other_completions) == (3, 2, 1)
    reasons = [row.why.split(":")[0] for row in result.disagreements]
    assert reasons == [
        "the completions differ",
        "the same completion, whose number is written otherwise",
        "the completion is badly formatted, which the task does not see",
    ]
    assert "verdicts that differ: 3" in comparison_text(result)


def test_what_cannot_be_run_is_refused_in_a_line(folders, monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="lm_eval is not installed: pip install"):
        called(folders, "plain")
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=r"latent reasons in latent steps, which hf does not"):
        called(folders, "latent", "--backend", "hf")


FINISHED = [folder.parent for folder in sorted(results_root().glob("laptop*/models"))]
"""Experiments on the laptop's task whose models are there: none in a fresh checkout."""


@pytest.mark.parametrize(
    ("model", "backend"), [("latent-6-rl", "ours"), ("cot-sft", "ours"), ("cot-sft", "hf")]
)
def test_on_trained_models_all_test_rows_get_the_same_verdict(model, backend, capsys):
    pytest.importorskip("lm_eval")
    models = [m for e in FINISHED for m in sorted((e / "models" / model).glob("seed-[0-9]"))]
    if not models:
        pytest.skip(f"no finished {model} of the laptop's task in {results_root()}")
    data = models[0].parents[2] / "data" / "test.jsonl"
    options = ["--max-new-tokens", "96", "--batch-size", "250", "--backend", backend]
    main(["--path", str(models[0]), "--data", str(data), *options])
    text = capsys.readouterr().out
    assert "completions that differ: 0; verdicts that differ: 0" in text, text
    with capsys.disabled():
        print(f"\n{models[0]}, {backend}\n{text}")
