"""Greedy generation against one that reads everything again for every token."""

import pytest
import torch

from latent_reasoning.model.generation import generate, generate_forced
from latent_reasoning.model.reasoner import LatentReasoner
from tests.model.models import (
    CONTINUE,
    EOS,
    START,
    STOP,
    build_base,
    build_reasoner,
    pad,
    slow_greedy,
)

PROMPTS = [
    [5, 6, 7, START],
    [9, START],
    [2, 3, 4, 8, 9, 10, START, CONTINUE, CONTINUE, STOP, 3],
    [12, 13],
    [3, 4, START, STOP],
    [11, 12, 13, 14, 15, START, CONTINUE],
    [20, START],
]


def completions(model, **options):
    settings = {"max_new_tokens": 12, "eos_id": EOS, "batch_size": 3} | options
    return generate(model, PROMPTS, **settings)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("max_latent_steps", [None, 2])
@pytest.mark.parametrize("modules", [True, False])
def test_batched_completions_are_those_of_each_prompt_alone(
    architecture, max_latent_steps, modules
):
    settings = {"allow_rethinking": True, "max_latent_steps": max_latent_steps}
    model = build_reasoner(architecture, modules=modules, **settings)
    with torch.no_grad():  # so that START is written too
        model.move_special_rows("embedding")
        model.base.get_output_embeddings().weight[START] *= 3
        model.move_special_rows("modules" if modules else "embedding")
    own = completions(model)
    expected = [slow_greedy(model, prompt, 12) for prompt in PROMPTS]
    assert [generation.ids for generation in own] == expected
    assert {START, CONTINUE, STOP} <= {token for generation in own for token in generation.ids}


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_the_batch_size_changes_nothing(batch_size):
    model = build_reasoner()
    expected = [generation.ids for generation in completions(model)]
    assert [g.ids for g in completions(model, batch_size=batch_size)] == expected


def test_stop_probabilities_are_those_of_the_forward_and_counted_once_a_decision():
    model = build_reasoner(max_latent_steps=3)
    (generation,) = generate(model, [[5, 6, START]], max_new_tokens=6, eos_id=EOS, batch_size=1)
    ids = [5, 6, START, *generation.ids]
    decisions = generation.ids.index(STOP) + 1
    assert generation.latent_steps == decisions - 1
    output = model(*pad([ids]))
    expected = model.stop_logits(output.last_hidden[0, 2 : 2 + decisions]).softmax(-1)
    assert torch.tensor(generation.stop_probabilities).shape == (decisions, 2)
    assert torch.allclose(torch.tensor(generation.stop_probabilities), expected.float(), atol=1e-6)


def test_a_completion_without_eos_is_cut_off_and_one_with_eos_ends_there():
    model = build_reasoner()
    with torch.no_grad():
        model.base.get_output_embeddings().weight[EOS] = 0
    cut = completions(model, max_new_tokens=4)
    assert all(generation.cut_off and len(generation.ids) == 4 for generation in cut)
    base = build_base(tied=False)
    with torch.no_grad():
        base.get_output_embeddings().weight.zero_()
    plain = LatentReasoner(base, None)
    (generation,) = generate(plain, [[5, 6]], max_new_tokens=4, eos_id=0, batch_size=1)
    # All logits are equal: the first token, here the end, is taken at once.
    assert (generation.ids, generation.cut_off) == ([0], False)


def test_generation_stays_greedy_where_the_generation_config_samples():
    model = build_reasoner()
    expected = [generation.ids for generation in completions(model)]
    model.base.generation_config.do_sample = True
    model.base.generation_config.temperature = 5.0
    assert [generation.ids for generation in completions(model)] == expected


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_forced_completions_equal_those_of_prompts_with_that_many_steps(architecture, batch_size):
    model = build_reasoner(architecture)
    questions = [[5, 6, 7], [9], [2, 3, 4, 8, 9, 10], [12, 13]]
    settings = {"max_new_tokens": 8, "eos_id": EOS, "batch_size": batch_size}
    ending = [STOP, 3, 4]
    prompts = [[*question, START] for question in questions]
    curve = generate_forced(model, prompts, ending, last=4, **settings)
    for steps, generations in enumerate(curve):
        whole = [[*question, START, *[CONTINUE] * steps, *ending] for question in questions]
        assert generations == generate(model, whole, **settings)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_writing_ends_at_the_last_position_as_at_the_maximum_length(architecture):
    """64 positions, of a table or until the rotation changes; the last token written need not be
    read."""
    model = build_reasoner(architecture)
    if architecture == "llama":
        config = model.base.config
        config.rope_parameters = {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0}
        base = type(model.base)(config).double()
        base.load_state_dict(model.base.state_dict())
        model = LatentReasoner(base, model.settings).eval()
    with torch.no_grad():
        model.base.get_output_embeddings().weight[EOS] = 0
        if architecture == "gpt2":
            model.base.transformer.wpe.weight *= 3
    room = [65 - len(prompt) for prompt in PROMPTS]
    own = completions(model, max_new_tokens=100)
    expected = [slow_greedy(model, prompt, n) for prompt, n in zip(PROMPTS, room, strict=True)]
    assert [generation.ids for generation in own] == expected
    assert any(generation.cut_off for generation in own)
    curve = generate_forced(
        model, PROMPTS[:2], [STOP, 3], last=2, max_new_tokens=100, eos_id=EOS, batch_size=2
    )
    for steps, generations in enumerate(curve):
        for generation, prompt in zip(generations, PROMPTS, strict=False):
            ids = [*prompt, *[CONTINUE] * steps, STOP, 3]
            assert generation.ids == slow_greedy(model, ids, 65 - len(ids))
