"""LatentSeek: rows are sought apart, rewards, evaluation with it, the vectors."""

import pytest
import torch
import yaml

from latent_reasoning.config import ConfigError, load
from latent_reasoning.dag.layout import Layout
from latent_reasoning.data.dial.tokenizer import build_tokenizer, generated_texts
from latent_reasoning.data.rows import DataError
from latent_reasoning.evaluation.ask import main as ask
from latent_reasoning.evaluation.evaluator import EvaluationSettings, evaluate
from latent_reasoning.evaluation.latentseek import Seeking, _Rewards, confidence, verifiers_reward
from latent_reasoning.model.folder import load as load_model
from latent_reasoning.model.folder import save
from latent_reasoning.model.generation import generate
from latent_reasoning.model.latentseek import (
    Search,
    SeekingReasoner,
    SeekSettings,
    answer_states,
)
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import LatentSettings
from latent_reasoning.rivals.__main__ import main
from tests.model.models import build_base
from tests.rl.conftest import generated_rows, latent_tokenizer, special_ids

EOS = 1
PROMPTS = [[3, 4], [5, 2, 2], [2, 7, 6, 3]]
ANSWERS = [[4, 5, 6, 7, 8, 9, 10, 11], [2, 2, 3, 3, 9, 1], [5, 6, 1]]


def model(architecture: str = "llama", **settings) -> SeekingReasoner:
    return SeekingReasoner(build_base(architecture), SeekSettings(**settings)).eval()


def seek(one: SeekingReasoner, rows: list[int]) -> tuple[list, list]:
    """Search from given answers for one that holds few even tokens."""

    def write(texts: list[list[int]]) -> list[list[int]]:
        written = generate(one, texts, max_new_tokens=6, eos_id=EOS, batch_size=4)
        return [generation.ids for generation in written]

    def reward(_: list[int], answers: list[list[int]]) -> torch.Tensor:
        return torch.tensor([-sum(t % 2 == 0 for t in a) / len(a) for a in answers])

    prompts, answers = ([all_[row] for row in rows] for all_ in (PROMPTS, ANSWERS))
    search = Search(one, prompts, answers, one.seek_settings, write, reward)
    return search.run(), search.history


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_rows_are_sought_as_each_alone(architecture):
    one = model(architecture, share=0.5, learning_rate=0.5, steps=4)
    answers, history = seek(one, [0, 1, 2])
    assert [len(own) for own in history] != [1, 1, 1]
    assert answers != ANSWERS
    for row in range(3):
        alone, own = seek(one, [row])
        assert alone[0] == answers[row]
        assert own[0] == pytest.approx(history[row])


def test_states_are_those_that_choose_the_answer():
    one = model()
    greedy = [g.ids for g in generate(one, PROMPTS, max_new_tokens=9, eos_id=EOS, batch_size=3)]
    for states, ids in zip(answer_states(one, PROMPTS, greedy), greedy, strict=True):
        kinds = torch.ones(len(ids), dtype=torch.long)
        assert one.logits(states, kinds).argmax(-1).tolist() == ids


def test_a_reward_above_the_threshold_or_a_short_answer_changes_nothing():
    one = model(share=0.5, threshold=-1.1)
    assert seek(one, [0, 1])[0] == ANSWERS[:2]
    one = model(share=0.1)
    answers, history = seek(one, [2])
    assert (answers, len(history[0])) == ([ANSWERS[2]], 1)


def test_confidence_is_the_mean_log_probability():
    one = model()
    own = confidence(one, PROMPTS, ANSWERS)
    for prompt, answer, value in zip(PROMPTS, ANSWERS, own.tolist(), strict=True):
        ids = torch.tensor([[*prompt, *answer]])
        logits = one.base(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logits.gather(-1, torch.tensor(answer)[:, None]).mean().item()
        assert value == pytest.approx(expected)


def test_verifiers_reward_is_minus_the_share_that_fails():
    approved = torch.tensor([[True, True, False, False], [True] * 4, [False] * 4])
    assert verifiers_reward(approved).tolist() == [-0.5, 0, -1]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(generated_texts(3))


def seeking(tokenizer, count: int, **settings) -> Seeking:
    rows, _ = generated_rows(count, 0, max_steps=2, modulus=3)
    base = build_base(vocabulary=len(tokenizer))
    one = SeekingReasoner(base, SeekSettings(**settings)).eval()
    prompts = list(tokenizer([row.question for row in rows])["input_ids"])
    return Seeking(one, tokenizer, rows, prompts, 12, 4, "exact")


def ids_of(tokenizer, text: str) -> list[int]:
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def test_the_oracle_knows_the_label_and_the_verifier_what_samples_say(tokenizer):
    rows = seeking(tokenizer, 2).rows
    right = ids_of(tokenizer, f" The answer is: {rows[0].answer}")
    wrong = ids_of(tokenizer, f" The answer is: {(int(rows[0].answer) + 1) % 3}")
    none = ids_of(tokenizer, " The answer is")
    answers = [right, wrong, none, [*right, *wrong]]
    oracle = _Rewards(seeking(tokenizer, 2, reward="oracle"), 0, [])
    assert oracle([0] * 4, answers).tolist() == [0, -1, -1, 0]
    verdicts = [[rows[0].answer, None, rows[0].answer, str((int(rows[0].answer) + 1) % 3)]]
    verifier = _Rewards(seeking(tokenizer, 2, reward="verifier", samples=4), 0, verdicts)
    assert verifier([0] * 4, answers).tolist() == [-0.5, -0.75, -1, -0.5]


def test_verifiers_do_not_depend_on_the_batch(tokenizer):
    both = seeking(tokenizer, 2, reward="verifier", samples=3, temperature=0.3)
    together = _Rewards.of(both, 0, 2).verdicts
    assert [_Rewards.of(both, row, 1).verdicts[0] for row in range(2)] == together


@pytest.mark.parametrize("reward", ["confidence", "verifier", "oracle"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_evaluation_seeks(tokenizer, reward, architecture):
    rows, _ = generated_rows(5, 0, max_steps=2, modulus=3)
    base = build_base(architecture, vocabulary=len(tokenizer))
    settings = SeekSettings(reward=reward, share=0.5, learning_rate=1.0, steps=2, samples=2)
    how = EvaluationSettings(prefix="", max_new_tokens=8, batch_size=2, max_forced_steps=2)
    sought = evaluate(SeekingReasoner(base, settings), tokenizer, rows, how)
    greedy = evaluate(LatentReasoner(base, None), tokenizer, rows, how)
    assert [p.completion for p in sought.predictions] != [p.completion for p in greedy.predictions]
    own = 2 if reward == "verifier" else 0
    assert {p.searched for p in sought.predictions} <= {own, own + 1, own + 2}
    assert any(p.searched > own for p in sought.predictions)
    assert sought.frame()["searched"].sum() == sum(p.searched for p in sought.predictions)
    assert "searched" not in greedy.frame()
    # With the answer's words forced there is nothing to seek.
    assert sought.forced == greedy.forced


def test_the_stage_links_the_parent_and_evaluation_seeks_with_its_settings(
    tokenizer, tmp_path, monkeypatch
):
    config = tmp_path / "tiny.yaml"
    content = {
        "experiment": "tiny",
        "data": {"generated": {"max_steps": 2, "step_weights": [1, 1], "modulus": 3}},
        "tracking": {"enabled": False},
        "runtime": {"device": "cpu"},
        "models": {
            "cot": {"stage": "sft", "training": {"steps": 1}},
            "latent": {"stage": "latent_sft", "training": {"steps": 1}},
            "sought": {
                "stage": "decode",
                "method": "latentseek",
                "from": "cot",
                "seek": {"reward": "oracle", "share": 0.5, "steps": 3},
            },
            "latent-sought": {"stage": "decode", "method": "latentseek", "from": "latent"},
        },
    }
    config.write_text(yaml.safe_dump(content))
    monkeypatch.setenv("LATENT_REASONING_RESULTS", str(tmp_path / "results"))
    layout = Layout.of(load(config))
    base = build_base(vocabulary=len(tokenizer)).float()
    save(LatentReasoner(base, None), tokenizer, layout.model("cot", 0), card={"model": "cot"})
    latent = latent_tokenizer(3)
    around = LatentReasoner(
        build_base(vocabulary=len(latent)).float(), LatentSettings(*special_ids(latent))
    )
    save(around, latent, layout.model("latent", 0), card={"model": "latent"})
    arguments = ["--config", str(config), "--seed", "0", "--model"]
    main([*arguments, "sought"])
    made = load_model(layout.model("sought", 0), device="cpu")
    assert made.seek_settings == SeekSettings(reward="oracle", share=0.5, steps=3)
    for name, tensor in made.base.state_dict().items():
        assert torch.equal(tensor, base.state_dict()[name])
    with pytest.raises(DataError, match="oracle"):
        ask([str(layout.model("sought", 0)), "Where does it end?", "--device", "cpu"])
    with pytest.raises(ConfigError, match=r"models.latent-sought.from"):
        main([*arguments, "latent-sought"])
