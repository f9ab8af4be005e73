"""PonderNet's loss against its definition, and the stage on tiny models."""

import math

import pandas
import pytest
import torch
import yaml

from latent_reasoning.config import ConfigError, load
from latent_reasoning.dag.layout import Layout
from latent_reasoning.data.rows import row_lines
from latent_reasoning.model.folder import load as load_model
from latent_reasoning.model.folder import save
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import LatentSettings
from latent_reasoning.rivals.__main__ import main
from latent_reasoning.rivals.pondernet import PonderTask, geometric_prior, ponder
from tests.model.models import build_base, pad
from tests.rl.conftest import generated_rows, latent_tokenizer, special_ids


def test_the_prior_is_a_geometric_distribution_cut_at_the_bound():
    prior = geometric_prior(0.25, 3).exp()
    weights = torch.tensor([0.25 * 0.75**n for n in range(4)])
    assert torch.allclose(prior, weights / weights.sum())


def test_the_loss_is_the_expected_one_and_the_divergence_from_the_prior():
    prior = geometric_prior(0.4, 2).double()
    stops = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]]).double()
    losses = torch.tensor([[3.0, 2.0, 1.0], [0.5, 0.1, 0.0]]).double()
    own = ponder(stops.log(), losses, prior, 0.7)
    expected = (stops * losses).sum(1).mean().item()
    divergence = sum(
        p * (math.log(p) - q)
        for row in stops.tolist()
        for p, q in zip(row, prior.tolist(), strict=True)
    )
    assert own.loss.item() == pytest.approx(expected + 0.7 * divergence / 2)
    assert own.expected_steps.item() == pytest.approx((1.1 + 0.5) / 2)
    same = ponder(prior.expand(2, 3), losses, prior, 0.7)
    assert same.divergence.item() == pytest.approx(0, abs=1e-12)


TRAINING = {"steps": 3, "batch_size": 4, "validate_every": 3, "select": "last"}
POLICY = {"stage": "policy", "method": "pondernet", "from": "latent", "training": TRAINING}
EXPERIMENT = {
    "experiment": "tiny",
    "data": {"generated": {"max_steps": 2, "step_weights": [1, 1], "modulus": 3}},
    "tracking": {"enabled": False, "log_every": 1},
    "runtime": {"device": "cpu", "micro_batch_size": 3},
    "models": {
        "latent": {"stage": "latent_sft", "training": {"steps": 1}},
        "pondered": POLICY | {"max_latent_steps": 3, "max_new_tokens": 8},
        "unbounded": POLICY,
        "twice": POLICY | {"max_latent_steps": 3, "iterations": 3},
    },
}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_stage_scores_every_number_of_steps_and_trains(architecture, tmp_path, monkeypatch):
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(EXPERIMENT))
    tokenizer = latent_tokenizer(3)
    monkeypatch.setenv("LATENT_REASONING_RESULTS", str(tmp_path / "results"))
    layout = Layout.of(load(config))
    layout.data("rl").parent.mkdir(parents=True)
    made = generated_rows(8, 3, max_steps=2, modulus=3)
    for split, rows in zip(("rl", "validation"), made, strict=True):
        layout.data(split).write_text("".join(row_lines(rows)))
    base = build_base(architecture, vocabulary=len(tokenizer))
    parent = LatentReasoner(base, LatentSettings(*special_ids(tokenizer))).float()
    save(parent, tokenizer, layout.model("latent", 0), card={"model": "latent"})
    scores, seen = PonderTask.scores, []

    def checked(self, chosen):
        log_stops, losses = scores(self, chosen)
        seen.append((log_stops.detach(), losses.detach()))
        if len(seen) == 1:
            self.model.eval()
            for row, index in enumerate(chosen):
                check(self, index, log_stops[row], losses[row])
            self.model.train()
        return log_stops, losses

    def check(self, index, log_stops, losses):
        special, answer = self.model.settings, self.answers[index]
        stop = 0.0
        for n in range(4):
            sequence = [*self.prompts[index].ids, *[special.continue_id] * n, special.stop_id]
            sequence += answer
            input_ids, mask = pad([sequence])
            output = self.model(input_ids, mask)
            places = torch.arange(len(sequence) - len(answer) - 1, len(sequence) - 1)
            logits = self.model.full_logits(output)[0, places].log_softmax(-1)
            expected = -logits.gather(-1, torch.tensor(answer)[:, None]).mean()
            assert losses[n].item() == pytest.approx(expected.item(), rel=1e-4)
            decision = self.model.stop_logits(output.last_hidden[0, places[0] - 1]).log_softmax(-1)
            own = stop + (decision[1].item() if n < 3 else 0.0)
            assert log_stops[n].item() == pytest.approx(own, rel=1e-3, abs=1e-5)
            stop += decision[0].item()

    monkeypatch.setattr(PonderTask, "scores", checked)
    arguments = ["--config", str(config), "--seed", "0", "--model"]
    main([*arguments, "pondered"])
    assert all(torch.allclose(s.exp().sum(1), torch.ones(len(s)), atol=1e-4) for s, _ in seen)
    trained = load_model(layout.model("pondered", 0), device="cpu")
    assert trained.settings.max_latent_steps == 3
    assert any(
        not torch.equal(own, other)
        for own, other in zip(trained.parameters(), parent.parameters(), strict=True)
    )
    curves = pandas.read_csv(layout.model("pondered", 0) / "training.csv")
    assert curves["reasoning_tokens"].dropna().between(2, 5).all()
    with pytest.raises(ConfigError, match=r"models.unbounded.max_latent_steps"):
        main([*arguments, "unbounded"])
    with pytest.raises(ConfigError, match=r"models.twice.iterations: 3, but method: pondernet"):
        main([*arguments, "twice"])
