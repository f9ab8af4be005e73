"""Rows written by captured steps against the path that looks at every token."""

from __future__ import annotations

import copy

import pytest
import torch

from latent_reasoning.config import Lora
from latent_reasoning.model import decoding
from latent_reasoning.model.decoding import decodes_statically
from latent_reasoning.model.generation import Generation, generate, generate_forced
from latent_reasoning.model.lora import attach_lora, merge_lora
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.static_rows import (
    Beginning,
    CastWeights,
    Filling,
    Shape,
    StaticRows,
    Writing,
)
from latent_reasoning.runtime import graphs
from latent_reasoning.runtime.memory import OutOfMemoryError
from tests.model.models import CONTINUE, END, EOS, START, STOP, build_base, build_reasoner
from tests.model.test_generation import PROMPTS

CASTS_OF_NOTHING = CastWeights.__init__


def both(model: LatentReasoner, prompts=PROMPTS, **options) -> tuple[list, list]:
    """Completions as on a CPU and by captured steps."""
    settings = {"max_new_tokens": 12, "eos_id": EOS, "batch_size": 3} | options
    model.captured.when = "off"
    expected = generate(model, prompts, **settings)
    model.captured.when = "always"
    return expected, generate(model, prompts, **settings)


def assert_equal(found: list[Generation], expected: list[Generation]) -> None:
    assert [g.ids for g in found] == [g.ids for g in expected]
    for own, other in zip(found, expected, strict=True):
        assert (own.cut_off, own.latent_steps) == (other.cut_off, other.latent_steps)
        made, wanted = torch.tensor(own.stop_probabilities), torch.tensor(other.stop_probabilities)
        assert made.shape == wanted.shape
        assert torch.allclose(made, wanted, atol=1e-6)


def with_adapter(model: LatentReasoner) -> LatentReasoner:
    attach_lora(model, Lora(r=2, alpha=4, dropout=0.1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model.double().eval()


@pytest.mark.parametrize("batch_size", [1, 3, 7])
@pytest.mark.parametrize("bound", [None, 2])
@pytest.mark.parametrize(
    ("lora", "tied", "recurrent_filter"),
    [(False, True, "MLP"), (True, True, "linear"), (True, False, "SRE"), (False, False, "none")],
)
def test_completions_are_those_of_the_other_path(lora, tied, recurrent_filter, bound, batch_size):
    model = build_reasoner(
        tied=tied,
        modules=lora,
        recurrent_filter=recurrent_filter,
        max_latent_steps=bound,
        allow_rethinking=True,
    )
    if lora:
        with_adapter(model)
    expected, found = both(model, batch_size=batch_size)
    assert_equal(found, expected)
    assert any(written.latent_steps for written in found)
    # Where rows end at different places.
    written = [token for row in found for token in row.ids if token < START]
    expected, found = both(model, batch_size=batch_size, eos_id=max(written, key=written.count))
    assert_equal(found, expected)
    assert len({len(row.ids) for row in found}) > 1


def test_completions_of_a_plain_language_model():
    model = LatentReasoner(build_base(), None)
    prompts = [[5, 6, 7], [9], [2, 3, 4, 8]]
    expected, found = both(model, prompts)
    assert_equal(found, expected)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_forced_completions_are_those_of_the_other_path(batch_size):
    model = build_reasoner()
    prompts = [[5, 6, 7, START], [9, START], [2, 3, 4, 8, 9, 10, START]]
    options = {"last": 4, "max_new_tokens": 8, "eos_id": EOS, "batch_size": batch_size}
    expected = generate_forced(model, prompts, [STOP, 3, 4], **options)
    model.captured.when = "always"
    texts = []
    embed = model.embed
    model.embed = lambda ids: (texts.append(ids.shape), embed(ids))[1]
    found = generate_forced(model, prompts, [STOP, 3, 4], **options)
    for own, other in zip(found, expected, strict=True):
        assert_equal(own, other)
    if batch_size == 7:  # each prompt is read once, less its last token
        assert [shape for shape in texts if len(shape) == 2] == [(3, 6)]


def test_rows_grow_out_of_their_columns_and_are_filled_again():
    model = build_reasoner()
    with torch.no_grad():  # texts of all lengths up to the maximum
        model.base.get_output_embeddings().weight[EOS] *= 1.5
    prompts = [[2 + (i * j) % 25 for j in range(1, 3 + 7 * i)] for i in range(1, 9)]
    prompts = [[*prompt, START] for prompt in prompts]
    expected, found = both(model, prompts, max_new_tokens=90, batch_size=3)
    assert_equal(found, expected)
    decoder = model.captured["greedy"]
    assert decoder.shape == Shape(3, 192, 96)
    assert len(decoder._programs) >= 2
    lengths = [len(written.ids) for written in found]
    assert len(set(lengths)) > 3


def test_filling_rows_again_takes_fewer_row_steps_than_whole_batches():
    """Lengths of 1 to 60 tokens: a batch waits for its longest row."""
    lengths = [1 + (17 * i) % 60 for i in range(64)]
    model = build_reasoner(max_latent_steps=1)
    rows = decoding.Decoder(model, Writing(EOS, 60), Shape(8, 128, 64))

    def step(columns: int) -> None:  # a row ends after as many tokens as its text's first id
        at = torch.where(rows.rows.done, 64, rows.rows.written)
        rows.rows.ids.scatter_(1, at[:, None], torch.full_like(at, EOS)[:, None])
        rows.rows.written += ~rows.rows.done
        rows.rows.done |= rows.rows.written >= rows.rows.limit

    rows.rows.step = step
    fill = rows.rows.fill

    def fill_with_limits(plan: Filling) -> None:
        fill(plan)
        rows.rows.limit.index_copy_(0, plan.rows, plan.token)

    rows.rows.fill = fill_with_limits
    written = rows.write([Beginning((3, length)) for length in lengths], 60)
    assert [len(row.ids) for row in written] == lengths
    whole = sum(max(lengths[first : first + 8]) for first in range(0, 64, 8))
    assert rows.steps * 8 < 0.75 * whole * 8
    assert rows.steps * 8 < 1.5 * sum(lengths)


@torch.no_grad()
def test_a_row_that_is_done_does_not_change():
    model = build_reasoner()
    rows = StaticRows(model, Writing(EOS, 9), Shape(4, 64, 12))
    begun = [Beginning.of(model.settings, prompt) for prompt in PROMPTS[:2]]
    rows.fill(Filling.plan([2, 0], begun, tokens=12, new=9))
    rows.step(64)
    rows.done[0] = True
    names = ("token", "length", "written", "kinds", "run_steps", "hidden", "probabilities")
    before = {name: getattr(rows, name).clone() for name in (*names, "ids", "keys", "values")}
    rows.step(64)
    for name in names:  # what comes after its tokens means nothing
        own, earlier = getattr(rows, name)[0], before[name][0]
        if name == "probabilities":
            own, earlier = own[:12], earlier[:12]
        assert torch.equal(own, earlier), name
    assert not torch.equal(rows.hidden[2], before["hidden"][2])
    assert rows.length[2] == before["length"][2] + 1
    assert torch.equal(rows.ids[0, :12], before["ids"][0, :12])
    read = int(rows.length[0])
    assert torch.equal(rows.keys[:, 0, :, :read], before["keys"][:, 0, :, :read])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("precision", [torch.float64, torch.bfloat16])
def test_captured_steps_on_a_gpu_write_what_a_look_a_token_writes(precision):
    model = with_adapter(build_reasoner(modules=True, allow_rethinking=True, max_latent_steps=3))
    model.to("cuda")
    if precision == torch.bfloat16:
        model.float()
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == torch.bfloat16):
        expected, found = both(model, max_new_tokens=80)
        again = both(model, max_new_tokens=80)[1]
    assert_equal(again, found)
    decoder = model.captured["greedy"]
    assert decoder.steps > 80
    assert all(program._graph is not None for program in decoder._programs.values())
    if precision == torch.float64:
        assert_equal(found, expected)


@pytest.fixture
def warming_up(monkeypatch) -> None:
    """Captures make runs of their own, as on a GPU."""
    begin = graphs.Captured.__init__

    def capture(self, function, device, pool=None):
        begin(self, function, device, pool)
        function()

    monkeypatch.setattr(graphs.Captured, "__init__", capture)


def test_a_capture_in_the_middle_changes_nothing(warming_up):
    model = build_reasoner(max_latent_steps=3)
    expected, found = both(model, max_new_tokens=80)
    assert_equal(found, expected)
    assert len(model.captured["greedy"]._programs) > 1


def test_weights_that_change_in_place_are_seen_and_others_captured_anew():
    model = with_adapter(build_reasoner(modules=True))
    both(model)
    decoder = model.captured["greedy"]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.3)
    expected, found = both(model)
    assert_equal(found, expected)
    assert model.captured["greedy"] is decoder
    merge_lora(model)
    expected, found = both(model)
    assert_equal(found, expected)
    assert model.captured["greedy"] is not decoder
    decoder = model.captured["greedy"]
    model.change_settings(max_latent_steps=1)
    expected, found = both(model)
    assert_equal(found, expected)
    assert model.captured["greedy"] is not decoder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("recurrent_filter", ["MLP", "SRE"])
def test_weights_cast_once_change_nothing_in_mixed_precision(monkeypatch, tied, recurrent_filter):
    model = build_reasoner(tied=tied, modules=True, recurrent_filter=recurrent_filter)
    model = with_adapter(model).float()
    model.captured.when = "always"
    options = {"max_new_tokens": 20, "eos_id": EOS, "batch_size": 3}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def written() -> list[Generation]:
        with torch.autocast("cpu", torch.bfloat16):
            return generate(model, PROMPTS, **options)

    before = written()
    rows = model.captured["greedy"].rows
    assert len(rows.linear._casts) == 2 * 7 * 3 + (4 if recurrent_filter == "MLP" else 0)
    assert len(rows.head._casts) == 1
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
        assert tensor.dtype == state[name].dtype
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after = written()
    assert model.captured["greedy"].rows is rows
    assert after != before
    monkeypatch.setattr(CastWeights, "__init__", lambda self, *_: CASTS_OF_NOTHING(self, [], None))
    model.captured.clear()
    assert written() == after


def test_buffers_grow_to_hold_what_was_asked_before():
    model = build_reasoner()
    both(model, batch_size=7)
    both(model, PROMPTS[:2], max_new_tokens=70, batch_size=2)
    assert model.captured["greedy"].shape == Shape(8, 96, 96)
    assert not copy.deepcopy(model).captured


def test_rows_are_free_of_what_a_diverged_model_has_left():
    model = build_reasoner()
    expected, _ = both(model)
    weight = model.base.model.layers[0].self_attn.v_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
        generate(model, PROMPTS, max_new_tokens=12, eos_id=EOS, batch_size=3)
        assert model.captured["greedy"].rows.values.isnan().any()
        weight.copy_(kept)
    found = generate(model, PROMPTS, max_new_tokens=12, eos_id=EOS, batch_size=3)
    assert_equal(found, expected)


def test_with_too_little_memory_fewer_rows_are_written_at_a_time(monkeypatch, capsys):
    model = build_reasoner()
    begin = StaticRows.__init__

    def scarce(self, reasoner, how, shape):
        if shape.rows > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        begin(self, reasoner, how, shape)

    monkeypatch.setattr(StaticRows, "__init__", scarce)
    expected, found = both(model, batch_size=7)
    assert_equal(found, expected)
    assert "out of memory with 7 prompts at a time, continues with 3" in capsys.readouterr().err
    monkeypatch.setattr(StaticRows, "__init__", lambda *_: scarce(*(None,) * 3, Shape(3, 1, 1)))
    model.captured.clear()
    with pytest.raises(OutOfMemoryError, match="single prompt"):
        both(model)


def test_an_illegal_prompt_is_refused_as_on_the_other_path():
    model = build_reasoner()
    model.captured.when = "always"
    for prompt in ([5, CONTINUE], [CONTINUE], [5, END, 3], [5, START, 4]):
        with pytest.raises(ValueError, match="illegal latent sequence in row 1"):
            generate(model, [[5], prompt], max_new_tokens=3, eos_id=EOS, batch_size=2)


def test_no_prompts_and_where_steps_are_captured(capsys):
    model = build_reasoner()
    assert not decodes_statically(model)
    model.captured.when = "always"
    assert decodes_statically(model)
    assert generate(model, [], max_new_tokens=3, eos_id=EOS, batch_size=2) == []
    other = build_reasoner("gpt2")
    other.captured.when = "always"
    decoding._say_once.cache_clear()
    for _ in range(2):
        assert not decodes_statically(other)
    assert capsys.readouterr().err.count("no CUDA graphs for GPT2LMHeadModel") == 1
