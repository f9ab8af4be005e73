"""The latent forward against the slow one, the heads, and what is illegal."""

import pytest
import torch
from torch.nn import Dropout

from latent_reasoning.config import Lora, UserError
from latent_reasoning.model import heads, reasoner
from latent_reasoning.model.heads import Targets, target_log_probabilities
from latent_reasoning.model.lora import attach_lora
from latent_reasoning.model.parts import rows_of_similar_length
from latent_reasoning.model.passes import Kind, plan_passes
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import LatentSettings
from tests.model.models import (
    ARCHITECTURES,
    CONTINUE,
    END,
    HIDDEN,
    IDS,
    START,
    STOP,
    VOCABULARY,
    build_base,
    build_reasoner,
    pad,
    slow_hidden_states,
)

FILTERS = ("none", "MLP", "linear", "linear_ln", "linear_ECF", "SRE")
ROWS = [
    [5, 6, 7, START, CONTINUE, CONTINUE, STOP, 8, 9],
    [5, START, STOP, 3],
    [2, 3, 4],
    [4, START, *[CONTINUE] * 4, STOP, 5, 6, START, CONTINUE, STOP, 2],
    [3, 3, 3, 3, START],
    [START, CONTINUE],
    [2, START, CONTINUE, CONTINUE, CONTINUE, STOP],
    [2, START, *[CONTINUE] * 6],
]


def largest_differences(model: LatentReasoner, side: str = "left") -> tuple[float, float]:
    """Largest difference to the slow forward: of states, and of gradients (relative norm)."""
    input_ids, mask = pad(ROWS, side)
    output = model(input_ids, mask, output_hidden_states=True)
    weights = torch.randn(
        *input_ids.shape, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    states, total, slow_total = 0.0, 0.0, 0.0
    for row, ids in enumerate(ROWS):
        read = mask[row].bool()
        for layer, expected in zip(
            output.hidden_states, slow_hidden_states(model, ids), strict=True
        ):
            states = max(states, (layer[row, read] - expected).abs().max().item())
            total = total + (layer[row, read] * weights[row, read]).sum()
            slow_total = slow_total + (expected * weights[row, read]).sum()
    assert torch.equal(output.last_hidden[mask.bool()], output.hidden_states[-1][mask.bool()])
    parameters = list(model.parameters())
    fast = torch.autograd.grad(total, parameters, allow_unused=True)
    slow = torch.autograd.grad(slow_total, parameters, allow_unused=True)
    assert [g is None for g in fast] == [g is None for g in slow]
    gradients = max(
        ((own - expected).norm() / (expected.norm() + 1e-12)).item()
        for own, expected in zip(fast, slow, strict=True)
        if own is not None
    )
    return states, gradients


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pass_cost", [0, reasoner.PASS_COST])
def test_states_and_gradients_are_those_of_a_forward_without_cache_or_batch(
    architecture, side, pass_cost, monkeypatch
):
    """Read in parts of similar length, where a pass costs nothing, and together."""
    monkeypatch.setattr(reasoner, "PASS_COST", pass_cost)
    assert max(largest_differences(build_reasoner(architecture), side)) < 1e-9


def test_parts_hold_rows_of_similar_length_with_little_padding():
    mask = torch.arange(9) >= torch.tensor([[4], [1], [8], [0], [3], [4]])
    parts = rows_of_similar_length(mask, allowance=2)
    assert [rows.tolist() for rows in parts] == [[3, 1], [4, 0, 5], [2]]
    assert [rows.tolist() for rows in rows_of_similar_length(mask, 99)] == [[3, 1, 4, 0, 5, 2]]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_rows_go_on_from_a_prefix_that_was_read_before(architecture):
    model = build_reasoner(architecture)
    prefixes, rests = [[5, 6, 7], [4], [2, 3]], [[9, 2], [4, START, CONTINUE, STOP, 8], [START]]
    prefix = model.read_prompts(*pad(prefixes))
    for _ in range(2):  # the prefix stays as it is
        input_ids, mask = pad(rests)
        output = model(input_ids, mask, prefix=prefix)
        for row, rest in enumerate(rests):
            expected = slow_hidden_states(model, [*prefixes[row], *rest])[-1][-len(rest) :]
            assert torch.allclose(output.last_hidden[row, -len(rest) :], expected, atol=1e-9)


@pytest.mark.parametrize("recurrent_filter", FILTERS)
@pytest.mark.parametrize(("tied", "modules"), [(True, True), (False, False), (False, True)])
def test_every_filter_and_kind_of_special_rows_agrees_with_the_slow_forward(
    recurrent_filter, tied, modules
):
    model = build_reasoner("llama", tied, modules, recurrent_filter=recurrent_filter)
    assert max(largest_differences(model)) < 1e-9


@pytest.mark.parametrize("recurrent_filter", ["MLP", "SRE"])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_in_modules_give_the_logits_of_rows_in_the_matrices(tied, recurrent_filter):
    model = build_reasoner(tied=tied, recurrent_filter=recurrent_filter)
    if not tied:
        # Rows that the sequences never use are not kept in modules.
        with torch.no_grad():
            model.base.get_input_embeddings().weight[[CONTINUE, STOP]] = 0
            model.base.get_output_embeddings().weight[END] = 0
    expected = all_logits(model)
    model.move_special_rows("modules")
    assert model.base.get_input_embeddings().weight[[START, END, CONTINUE, STOP]].norm() == 0
    assert model.base.get_output_embeddings().weight[[START, END, CONTINUE, STOP]].norm() == 0
    assert torch.allclose(all_logits(model), expected, atol=1e-12)
    model.move_special_rows("embedding")
    assert torch.allclose(all_logits(model), expected, atol=1e-12)


def all_logits(model: LatentReasoner) -> torch.Tensor:
    return model.full_logits(model(*pad(ROWS))).nan_to_num()


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        ([[2, 3, 4], [5, 6]], [2]),
        ([[2, START, *[CONTINUE] * 6, STOP, 7]] * 2, [2] * 7),
        ([[2, 3, 4], [5, START, CONTINUE, STOP, 6], [7, START]], [3, 1]),
    ],
)
def test_text_is_one_pass_latent_6_seven_and_finished_rows_take_no_part(rows, sizes):
    passes = plan_passes(*pad(rows), LatentSettings(**IDS)).passes
    assert [len(step.mask) for step in passes] == sizes


def test_hidden_states_at_chosen_positions_are_those_of_the_whole_batch():
    model = build_reasoner()
    input_ids, mask = pad(ROWS)
    chosen = torch.zeros_like(mask).bool()
    chosen[0, -1] = chosen[3, 6] = chosen[3, -3] = True
    whole = model(input_ids, mask, output_hidden_states=True)
    some = model(input_ids, mask, output_hidden_states=True, hidden_at=chosen)
    assert len(some.hidden_states) == 3
    for own, expected in zip(some.hidden_states, whole.hidden_states, strict=True):
        assert torch.equal(own, expected[chosen])


@pytest.mark.parametrize(
    ("ids", "problem"),
    [
        ([2, CONTINUE, 3], "need START"),
        ([2, STOP], "need START"),
        ([CONTINUE], "need START"),
        ([2, START, START], "only CONTINUE or STOP"),
        ([2, START, CONTINUE, 3], "only CONTINUE or STOP"),
        ([2, START, STOP, STOP], "need START"),
        ([2, END, 3], "END is never part"),
    ],
)
def test_illegal_sequences_are_refused_with_row_and_position(ids, problem):
    with pytest.raises(ValueError, match=f"row 1, position .*{problem}"):
        build_reasoner()(*pad([[2, 3, 4, 5], ids]))


def test_padding_between_tokens_is_refused():
    with pytest.raises(ValueError, match="padding may not stand between"):
        build_reasoner()(torch.tensor([[2, 3, 4]]), torch.tensor([[1, 0, 1]]))


def finite_tokens(model: LatentReasoner, ids: list[int]) -> list[set[int]]:
    input_ids, mask = pad([ids])
    logits = model.full_logits(model(input_ids, mask))[0]
    return [set(row.isfinite().nonzero()[:, 0].tolist()) for row in logits]


@pytest.mark.parametrize("allow_rethinking", [True, False])
def test_only_stop_decisions_are_possible_while_thinking_and_never_elsewhere(allow_rethinking):
    everything = set(range(VOCABULARY))
    text = everything - {END, CONTINUE, STOP}
    answer = text if allow_rethinking else text - {START}
    model = build_reasoner(allow_rethinking=allow_rethinking)
    decision = {CONTINUE, STOP}
    expected = [text, decision, decision, answer, answer]
    assert finite_tokens(model, [2, START, CONTINUE, STOP, 3]) == expected


def test_the_temperature_divides_the_two_stop_logits_alone():
    cold, warm = build_reasoner(), build_reasoner(stop_head_temperature=2.0)
    input_ids, mask = pad([[2, 3, START, CONTINUE, STOP, 4]])
    own = warm.full_logits(warm(input_ids, mask))[0]
    expected = cold.full_logits(cold(input_ids, mask))[0]
    decisions = [CONTINUE, STOP]
    assert torch.allclose(own[2:4, decisions], expected[2:4, decisions] / 2, atol=1e-12)
    assert torch.equal(own[[0, 1, 4, 5]], expected[[0, 1, 4, 5]])


@pytest.mark.parametrize("detach", [True, False])
def test_a_detached_stop_head_learns_but_sends_no_gradient_into_the_states(detach):
    model = build_reasoner(detach_stop_head=detach)
    hidden = torch.randn(2, HIDDEN, dtype=torch.float64, requires_grad=True)
    kinds = torch.tensor([int(Kind.THINKING), int(Kind.TEXT)])
    log_probabilities = target_log_probabilities(
        model, hidden, Targets.of(torch.tensor([STOP, 5]), kinds, model.settings)
    )
    log_probabilities.sum().backward()
    assert (hidden.grad[0].norm().item() == 0) == detach
    assert hidden.grad[1].norm().item() > 0
    assert model.base.get_output_embeddings().weight.grad[STOP].norm().item() > 0


@pytest.mark.parametrize("modules", [True, False])
def test_target_log_probabilities_are_those_of_the_full_logits(modules):
    model = build_reasoner(modules=modules, stop_head_temperature=1.7)
    input_ids, mask = pad(ROWS)
    output = model(input_ids, mask)
    logits = model.full_logits(output)
    rows, columns = torch.tensor([0, 0, 0, 3, 3]), torch.tensor([7, 8, -1, 6, -1])
    targets = torch.tensor([CONTINUE, STOP, 4, CONTINUE, 7])
    targets[0] = 6 if output.kinds[0, 7] != Kind.THINKING else CONTINUE
    targets[1] = 6 if output.kinds[0, 8] != Kind.THINKING else STOP
    targets[3] = STOP if output.kinds[3, 6] == Kind.THINKING else 9
    for temperature in (1.0, 0.5):
        expected = (logits[rows, columns] / temperature).log_softmax(-1)
        expected = expected[torch.arange(5), targets]
        own = target_log_probabilities(
            model,
            output.last_hidden[rows, columns],
            Targets.of(targets, output.kinds[rows, columns], model.settings),
            temperature,
        )
        assert torch.allclose(own, expected, atol=1e-12)


def test_a_plain_language_model_gives_its_own_logits():
    base = build_base("gpt2")
    model = LatentReasoner(base, None)
    input_ids, mask = pad([[2, 3, 4, 5], [6, START]])
    logits = model.full_logits(model(input_ids, mask))
    alone = base(torch.tensor([[6, START]])).logits
    assert torch.allclose(logits[1, 2:], alone[0], atol=1e-12)


def test_a_text_past_the_last_position_is_one_clear_line():
    model = LatentReasoner(build_base("gpt2"), None)
    model(*pad([[2] * 64, [3]]))
    with pytest.raises(UserError, match=r"65 tokens .*GPT2LMHeadModel.* has 64 positions"):
        model(*pad([[2] * 65, [3]]))
    assert LatentReasoner(build_base(), None).position_limit is None


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, 64),
        (
            {"rope_type": "longrope", "original_max_position_embeddings": 32}
            | {"short_factor": [1.0, 1.0], "long_factor": [4.0, 8.0]},
            32,
        ),
        ({"rope_type": "linear", "factor": 2.0}, None),
    ],
)
def test_a_text_ends_where_the_rotation_would_change_with_its_length(rope, limit):
    """Phi-3 128k, dynamic NTK: keys in the cache are turned by the rotation of a shorter text."""
    config = build_base().config
    config.rope_parameters = {"rope_theta": 10000.0} | rope
    base = type(build_base())(config).double()
    assert LatentReasoner(base, None).position_limit == limit


def test_the_base_s_own_dropout_can_be_off_while_that_of_adapters_is_on():
    model = build_reasoner("gpt2")
    attach_lora(model, Lora(r=2, alpha=2, dropout=0.5, target_modules=["c_attn"]))
    model.base_dropout = False
    for mode in (True, False):
        model.train(mode)
        on = {name for name, m in model.named_modules() if isinstance(m, Dropout) and m.training}
        adapters = {f"base.transformer.h.{i}.attn.c_attn.lora_dropout.default" for i in (0, 1)}
        assert on == (adapters if mode else set())
        assert model.training == mode


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_state_goes_on_where_the_forward_would(architecture):
    model = build_reasoner(architecture)
    prompts = [[5, 6, 7, START, CONTINUE], [4, START, CONTINUE], [2, 3, START, CONTINUE, CONTINUE]]
    state = model.read_prompts(*pad(prompts))
    latent = model.latent_input(state.last_hidden).unsqueeze(1)
    hidden = model.advance(state, latent)
    for row, prompt in enumerate(prompts):
        expected = slow_hidden_states(model, [*prompt, CONTINUE])[-1][-1]
        assert torch.allclose(hidden[row, -1], expected, atol=1e-9)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_rows_leave_a_shared_trajectory_at_different_steps(architecture):
    model = build_reasoner(architecture)
    prompt = [5, 6, START]
    state = model.read_prompts(*pad([prompt]))
    for _ in range(3):
        model.advance(state, model.latent_input(state.last_hidden).unsqueeze(1))
    steps = torch.tensor([1, 3, 2])
    seen = torch.arange(state.mask.shape[1]) < (len(prompt) + steps)[:, None]
    rows = state.select(torch.zeros(3, dtype=torch.long), seen)
    answer = torch.tensor([[STOP, 7, 8]] * 3)
    hidden = model.advance(rows, model.embed(answer))
    for row, n in enumerate(steps.tolist()):
        ids = [*prompt, *[CONTINUE] * n, STOP, 7, 8]
        expected = slow_hidden_states(model, ids)[-1][-3:]
        assert torch.allclose(hidden[row], expected, atol=1e-9)
    assert len(state.mask) == 1
    assert state.mask.shape[1] == len(prompt) + 3


def test_logits_in_parts_give_the_same_log_probabilities_and_gradients(monkeypatch):
    model = build_reasoner()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, HIDDEN, generator=generator, dtype=torch.float64)
    kinds = torch.tensor([Kind.ANSWER, Kind.THINKING, *[Kind.TEXT] * 6, Kind.ANSWER])
    targets = torch.tensor([3, STOP, *range(4, 11)])
    learned = Targets.of(targets, kinds, model.settings)

    def log_probabilities_and_gradients():
        model.zero_grad()
        own = hidden.clone().requires_grad_()
        result = target_log_probabilities(model, own, learned, temperature=0.7)
        (result * torch.arange(1, 10)).sum().backward()
        weight = model.base.get_output_embeddings().weight
        return result.detach(), own.grad, weight.grad.clone()

    whole = log_probabilities_and_gradients()
    computed = []
    plain_logits = model.logits
    monkeypatch.setattr(model, "logits", lambda h, k: computed.append(len(h)) or plain_logits(h, k))
    monkeypatch.setattr(heads, "LOGITS_AT_ONCE", 3 * VOCABULARY + 1)
    parts = log_probabilities_and_gradients()
    # Eight positions by threes, and each part once more for its gradient.
    assert sorted(computed) == [2, 2, 3, 3, 3, 3]
    for own, expected in zip(parts, whole, strict=True):
        assert (own - expected).abs().max() < 1e-12
