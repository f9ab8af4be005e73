"""Shared sampling draws exactly what each sample would draw on its own: the naive oracle."""

import pytest
import torch

from latent_reasoning.rl.rollouts import SamplingSettings, collect, draw_uniforms, sample
from tests.rl.conftest import CONTINUE, EOS, PROMPTS, START, STOP

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
    ),
]


def naive_sample(model, prompt: list[int], uniforms: list[float], settings) -> tuple[int, ...]:
    """One completion, each token from a full forward of the whole sequence."""
    ids: list[int] = []
    steps = 0
    for uniform in uniforms:
        if (prompt + ids)[-1] in (START, CONTINUE) and steps == model.settings.max_latent_steps:
            token = STOP
        else:
            sequence = torch.tensor([prompt + ids])
            output = model(sequence, torch.ones_like(sequence))
            logits = model.full_logits(output)[0, -1].double() / settings.temperature
            if logits[STOP].isfinite():
                token = CONTINUE if uniform < logits.softmax(0)[CONTINUE] else STOP
            else:
                cumulative = logits.softmax(0).cumsum(0)
                token = int((cumulative <= uniform * cumulative[-1]).sum())
        steps = steps + 1 if token == CONTINUE else 0
        ids.append(token)
        if token == EOS:
            break
    return tuple(ids)


@pytest.mark.parametrize(
    ("max_latent_steps", "allow_rethinking", "architecture", "cuda_graphs"),
    [
        (2, False, "llama", "auto"),
        (None, False, "gpt2", "auto"),
        (2, True, "llama", "auto"),
        (None, True, "gpt2", "auto"),
        (2, False, "llama", "always"),
        (2, True, "llama", "always"),
        (None, True, "llama", "always"),
    ],
)
def test_samples_equal_those_drawn_alone(
    reasoner, max_latent_steps, allow_rethinking, architecture, cuda_graphs
):
    model = reasoner(
        architecture=architecture,
        allow_rethinking=allow_rethinking,
        max_latent_steps=max_latent_steps,
    )
    model.captured.when = cuda_graphs
    settings = SamplingSettings(1.0, 9, EOS)
    uniforms = draw_uniforms(3, 10, 9, seed=5)
    rollout, _ = sample(model, PROMPTS, uniforms, settings)
    with torch.no_grad():
        for prompt, group in enumerate(rollout.sample_completion.tolist()):
            for member, index in enumerate(group):
                completion = rollout.completions[index]
                assert completion.prompt == prompt
                draws = uniforms[prompt, member].tolist()
                assert completion.ids == naive_sample(model, PROMPTS[prompt], draws, settings)
    ids = [completion.ids for completion in rollout.completions]
    assert any(START in sample_ids for sample_ids in ids) == allow_rethinking
    assert any(sample_ids[-1] != EOS for sample_ids in ids)
    assert sum(completion.count for completion in rollout.completions) == 30


@pytest.mark.parametrize("temperature", [0.6, 1.3])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_their_own_draw_the_samples_of_shared_rows(reasoner, tied, temperature, device):
    model = reasoner(tied=tied, modules=True, allow_rethinking=True, max_latent_steps=3)
    model.to(device).captured.when = "off"
    settings = SamplingSettings(temperature, 12, EOS)
    draws = [draw_uniforms(3, 16, 12, seed=seed) for seed in range(3)]
    expected = [sample(model, PROMPTS, uniforms, settings)[0] for uniforms in draws]
    model.captured.when = "always"
    for uniforms, shared in zip(draws, expected, strict=True):
        rollout, trajectory = sample(model, PROMPTS, uniforms, settings)
        assert trajectory is None
        assert rollout.prompts == shared.prompts
        assert rollout.completions == shared.completions
        assert torch.equal(rollout.sample_completion, shared.sample_completion)
    # The prompts are read once; the rows take one step a token, and a few until the host looks.
    decoder = model.captured["sampled"]
    assert decoder.shape.rows == 48
    assert decoder.steps <= 3 * 12


def test_the_base_model_is_called_once_a_token_not_once_a_sample(reasoner):
    model = reasoner(max_latent_steps=3)
    settings = SamplingSettings(1.0, 9, EOS)
    rows = []
    model.base.base_model.layers[0].mlp.register_forward_pre_hook(
        lambda _module, arguments: rows.append(arguments[0].shape[:2])
    )
    rollout, trajectory = sample(model, PROMPTS, draw_uniforms(3, 16, 9, seed=1), settings)
    longest_answer = max(len(c.ids) - c.ids.index(STOP) - 1 for c in rollout.completions)
    assert trajectory.steps == max(c.ids.index(STOP) for c in rollout.completions) == 3
    assert rows[:4] == [(3, 5), (3, 1), (3, 1), (3, 1)]
    assert len(rows) == 1 + trajectory.steps + longest_answer
    leaving = {(c.prompt, c.ids.index(STOP)) for c in rollout.completions}
    assert rows[4] == (len(leaving), 1)


@pytest.mark.parametrize(
    ("draw", "steps", "beginning"),
    [(1 - 2**-24, 0, (STOP,)), (0.0, 3, (CONTINUE,) * 4)],
    ids=["stops at once", "never stops"],
)
def test_a_trajectory_is_as_long_as_the_longest_sample(reasoner, draw, steps, beginning):
    """A sample that never stops is cut off without a STOP."""
    draws, settings = torch.full((3, 2, 4), draw), SamplingSettings(1.0, 4, EOS)
    rollout, trajectory = sample(reasoner(), PROMPTS, draws, settings)
    assert trajectory.steps == steps
    assert {completion.ids[: len(beginning)] for completion in rollout.completions} == {beginning}


def test_equal_seeds_draw_equal_numbers_below_one():
    draws = draw_uniforms(4, 8, 16, seed=3)
    assert torch.equal(draws, draw_uniforms(4, 8, 16, seed=3))
    assert not torch.equal(draws, draw_uniforms(4, 8, 16, seed=4))
    assert draws.min().item() >= 0
    assert draws.max().item() < 1


def test_equal_completions_of_a_prompt_are_one_with_a_count():
    ids = torch.tensor([[[7, 1, 0], [7, 1, 5], [7, 7, 7]], [[7, 1, 0], [2, 1, 0], [2, 1, 9]]])
    lengths = torch.tensor([[2, 2, 3], [2, 2, 2]])
    rollout = collect([[4], [5]], ids, lengths)
    assert [(c.prompt, c.ids, c.count) for c in rollout.completions] == [
        (0, (7, 1), 2),
        (0, (7, 7, 7), 1),
        (1, (7, 1), 1),
        (1, (2, 1), 2),
    ]
    assert rollout.sample_completion.tolist() == [[0, 0, 1], [2, 3, 3]]
