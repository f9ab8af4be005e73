"""The attention source against a slow forward that reads everything again for each step."""

import math

import pytest
import torch
from torch import Tensor

from latent_reasoning.model.generation import generate
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.trajectory import Trajectory
from latent_reasoning.rl.rollouts import SamplingSettings, draw_uniforms, sample
from latent_reasoning.rl.scoring import score_completions
from tests.model.models import (
    ARCHITECTURES,
    CONTINUE,
    EOS,
    START,
    STOP,
    build_reasoner,
    pad,
    slow_greedy,
)

ROWS = [
    [3, 4, 5, START, CONTINUE, CONTINUE, STOP, 7, 8],
    [6, START, CONTINUE, STOP, 9, 2, START, CONTINUE, CONTINUE, CONTINUE, STOP, 3],
    [7, 7, 3, 2, 4, START, STOP, 5],
]


def reasoner(architecture: str = "llama", **settings) -> LatentReasoner:
    """Queries, keys and values are so large that attention is neither flat nor the last state's."""
    model = build_reasoner(architecture, recurrent_filter="attention", **settings)
    torch.manual_seed(2)
    for name in ("query", "key", "value"):
        torch.nn.init.normal_(model.recurrent_filter.get_parameter(f"{name}.weight"), std=0.4)
    return model.double().eval()


def attend(model: LatentReasoner, states: Tensor) -> Tensor:
    """The next input (d,) from all states (T, d), head by head."""
    source = model.recurrent_filter
    queries, keys, values = (
        part(states).unflatten(-1, (source.heads, -1))
        for part in (source.query, source.key, source.value)
    )
    mixed = []
    for head in range(source.heads):
        scores = keys[:, head] @ queries[-1, head] / math.sqrt(queries.shape[-1])
        mixed.append(scores.softmax(0) @ values[:, head])
    return source.norm(source.output(torch.cat(mixed)))


def slow_states(model: LatentReasoner, ids: list[int]) -> Tensor:
    """Final states (T, d) of one row."""
    inputs: list[Tensor] = []
    for token in ids:
        if token == CONTINUE:
            inputs.append(attend(model, _read(model, inputs)))
        else:
            inputs.append(model.embed(torch.tensor(token)))
    return _read(model, inputs)


def _read(model: LatentReasoner, inputs: list[Tensor]) -> Tensor:
    read = model.base(inputs_embeds=torch.stack(inputs)[None], output_hidden_states=True)
    return read.hidden_states[-1][0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_and_gradients_are_those_of_reading_all_again(architecture, side):
    model = reasoner(architecture)
    ids, mask = pad(ROWS, side)
    states = model(ids, mask).last_hidden[mask.bool()]
    expected = torch.cat([slow_states(model, row) for row in ROWS])
    assert torch.allclose(states, expected, atol=1e-10)
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    own, slow = (
        torch.autograd.grad((values * weights).sum(), parameters, allow_unused=True)
        for values in (states, expected)
    )
    for one, other in zip(own, slow, strict=True):
        if other is not None:
            assert torch.allclose(one, other, atol=1e-8)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert own[names.index("recurrent_filter.key.weight")].norm() > 1e-3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_that_continue_a_text_attend_to_it(architecture):
    model = reasoner(architecture)
    ids, mask = pad([row[: row.index(START)] for row in ROWS])
    prefix = model.read_prompts(ids, mask)
    rest, rest_mask = pad([row[row.index(START) :] for row in ROWS], "right")
    states = model(rest, rest_mask, prefix=prefix).last_hidden
    for row, own, read in zip(ROWS, states, rest_mask.bool(), strict=True):
        expected = slow_states(model, row)[row.index(START) :]
        assert torch.allclose(own[read], expected, atol=1e-10)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_written_is_what_the_forward_chooses(architecture):
    model = reasoner(architecture, max_latent_steps=3, allow_rethinking=True)
    prompts = [[3, 4, START], [6, START], [7, 7, 3, 2, START]]
    written = generate(model, prompts, max_new_tokens=12, eos_id=EOS, batch_size=4)
    for prompt, own in zip(prompts, written, strict=True):
        assert own.ids == slow_greedy(model, prompt, 12)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_samples_of_one_trajectory_are_scored_as_each_alone(architecture):
    model = reasoner(architecture, max_latent_steps=4)
    prompts = [[3, 4, START], [6, START]]
    how = SamplingSettings(temperature=2.0, max_new_tokens=8, eos_id=EOS)
    rollout, trajectory = sample(model, prompts, draw_uniforms(2, 6, 8, seed=0), how)
    assert trajectory.steps > 1
    scores = score_completions(model, prompts, rollout.completions, how)
    for row, completion in enumerate(rollout.completions):
        ids = [*prompts[completion.prompt], *completion.ids]
        states = slow_states(model, ids[:-1])[-len(completion.ids) :]
        kinds = model(*pad([ids[:-1]])).kinds[0, -len(completion.ids) :]
        expected = (model.logits(states, kinds).double() / 2.0).log_softmax(-1)
        expected = expected.gather(-1, torch.tensor(completion.ids)[:, None])[:, 0]
        forced = torch.tensor(completion.ids) == STOP
        own = scores[row, : len(completion.ids)]
        assert torch.allclose(own[~forced], expected[~forced], atol=1e-9)


def test_a_row_s_steps_attend_to_no_padding():
    model = reasoner()
    alone = Trajectory.begin(model, [[6, START]])
    beside = Trajectory.begin(model, [[6, START], [3, 4, 5, 6, 7, START]])
    for each in (alone, beside):
        each.extend(model, 3)
    for own, other in zip(alone.hidden, beside.hidden, strict=True):
        assert torch.allclose(own[0], other[0], atol=1e-12)


def test_inputs_begin_as_long_as_embeddings_are():
    model = build_reasoner("llama", recurrent_filter="attention")
    trajectory = Trajectory.begin(model, [[6, 3, START]])
    inputs = model.latent_input(trajectory.hidden[-1], trajectory.state)
    length = model.base.get_input_embeddings().weight.norm(dim=-1).mean()
    assert inputs.norm().item() == pytest.approx(length.item(), rel=1e-3)
