"""Geometry, depth and attention of a small model against slow, obvious ways."""

from __future__ import annotations

import numpy
import pandas
import pytest
import torch
from sklearn.decomposition import PCA
from torch.nn.functional import normalize

from latent_reasoning.inside import depth, geometry
from latent_reasoning.inside.capture import Anatomy, attention_weights, capture
from latent_reasoning.inside.chain import Chain, trajectory_signals
from latent_reasoning.inside.findings import findings
from latent_reasoning.inside.reasoning import read_reasoning
from latent_reasoning.inside.sequences import Place, Text, batched, latent_sequences, length_of
from tests.inside.conftest import rows, tiny_subject


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def seen(request):
    subject = tiny_subject(request.param)
    reasoning = read_reasoning(subject, rows(12), 3)
    anatomy = Anatomy.of(subject.model.base)
    texts = latent_sequences(subject, reasoning)
    return subject, anatomy, reasoning, texts


def every(seen, batch_size=1):
    """Each text alone, with its captured states."""
    subject, anatomy, _, texts = seen
    for text in texts:
        (batch,) = batched(subject, [text], anatomy.blocks)
        yield batch, capture(subject.model, anatomy, batch.inputs, batch.mask)


def observed(seen, *observers):
    subject, anatomy, _, texts = seen
    for batch in batched(subject, texts, anatomy.blocks):
        states = capture(subject.model, anatomy, batch.inputs, batch.mask)
        for observer in observers:
            observer.add(batch, states)


def test_moments_give_sklearns_principal_components():
    vectors = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    vectors = vectors * torch.tensor([5.0, 3, 1, 1, 0.5, 0.2]) + 2
    moments = geometry.Moments(6)
    for part in vectors.split(70):
        moments.add(part)
    mean, axes, shares = moments.components()
    fitted = PCA(2, svd_solver="full").fit(vectors.numpy())
    numpy.testing.assert_allclose(mean, fitted.mean_, atol=1e-5)
    numpy.testing.assert_allclose(numpy.abs(axes), numpy.abs(fitted.components_), atol=1e-4)
    numpy.testing.assert_allclose(shares, fitted.explained_variance_ratio_, atol=1e-5)


def test_norms_and_means_are_those_of_texts_read_alone(seen):
    _, anatomy, _, texts = seen
    space = geometry.Geometry(anatomy, 16, max(map(length_of, texts)))
    observed(seen, space)
    table = geometry.norm_table(space).set_index(["part", "block", "position"])
    alone = list(every(seen))
    norms = [float(states.mlp[1][0, 2].norm()) for _, states in alone]
    assert table.loc[("mlp", 1, 2), "norm"] == pytest.approx(numpy.mean(norms), rel=1e-5)
    assert table.loc[("mlp", 1, 2), "n"] == len(texts)
    unit = torch.stack([normalize(s.attention_stream[0][0, 1], dim=-1) for _, s in alone]).mean(0)
    index = [space.names[i] for i in space.stream].index(("attention_stream", 0))
    torch.testing.assert_close(space.means(space.unit)[index, 1], unit.float())
    streams = [torch.stack([x[0, 1] for x in s.stream + s.attention_stream]) for _, s in alone]
    raw = torch.stack(streams).mean((0, 1)).float()
    torch.testing.assert_close(space.means(space.raw)[1], raw, rtol=1e-4, atol=1e-5)
    first = normalize(alone[0][1].stream[0][0], dim=-1).mean(0).float()
    torch.testing.assert_close(space.kept_means[0][0, 0], first)
    points = geometry.points(space, umap=False)
    assert set(points["figure"]) == {"stream", "parts", "positions_unit", "positions_raw"}


def test_umap_gives_the_same_points_again(seen):
    pytest.importorskip("umap")
    _, anatomy, _, texts = seen
    space = geometry.Geometry(anatomy, 16, max(map(length_of, texts)))
    observed(seen, space)
    once, again = (geometry.points(space, umap=True) for _ in range(2))
    assert once.equals(again)
    assert set(once.query("panel == 'umap'")["part"]) == {"attention", "mlp"}


def test_contributions_are_averaged_over_a_rows_positions_first(seen):
    subject, anatomy, reasoning, _ = seen
    used = depth.Depth(subject, anatomy, lens_rows=4)
    observed(seen, used)
    table = used.means.table().query("operations == 0 and group == 'latent' and block == 1")
    by_measure = table.set_index("measure")
    means = []
    for batch, states in every(seen):
        latent = batch.places == Place.LATENT
        if latent.any():
            ratio = states.mlp[1].norm(dim=-1) / states.attention_stream[1].norm(dim=-1)
            means.append(float(ratio[latent].mean()))
    assert by_measure.loc["relative_mlp", "mean"] == pytest.approx(numpy.mean(means), rel=1e-5)
    assert by_measure.loc["relative_mlp", "n"] == int((reasoning.steps > 0).sum())
    # The last layer's lens is the output.
    last = used.means.table().query("operations == 0 and block == 1 and group == 'answer'")
    assert last.set_index("measure").loc["kl", "mean"] == pytest.approx(0, abs=1e-6)
    assert last.set_index("measure").loc["overlap", "mean"] == 1


def test_skip_effects_are_those_of_a_slow_loop(seen):
    subject, anatomy, _, texts = seen
    table = depth.skip_effects(subject, anatomy, texts)
    expected = {"all": [], "later": []}
    for batch, states in every(seen):
        change = states.attention[1] + states.mlp[1]
        early = (batch.places == Place.QUESTION) | (batch.places == Place.START)
        for where, skipped_at in (("all", batch.mask), ("later", early)):
            # The first block's output taken away by hand, and the second run on what is left.
            taken = (states.attention[0] + states.mlp[0]) * skipped_at.unsqueeze(-1)
            handle = anatomy.attention_norms[1].register_forward_pre_hook(
                lambda _, arguments, taken=taken: (arguments[0] - taken,)
            )
            base, kept = subject.model.base, {}
            hooks = [
                anatomy.attention[1].register_forward_hook(
                    lambda _, __, output, kept=kept: kept.update(a=output)
                ),
                # The pre-hook above does not change the stream that the block adds to.
                anatomy.mlp_norms[1].register_forward_pre_hook(
                    lambda _, arguments, taken=taken: (arguments[0] - taken,)
                ),
                anatomy.mlp[1].register_forward_hook(
                    lambda _, __, output, kept=kept: kept.update(m=output)
                ),
            ]
            base.base_model(inputs_embeds=batch.inputs, use_cache=False)
            for hook in (handle, *hooks):
                hook.remove()
            error = (change - kept["a"] - kept["m"]).norm(dim=-1) / change.norm(dim=-1)
            measured = batch.mask if where == "all" else batch.mask & ~early
            expected[where].append(float(error[measured].mean()))
    every_position = table.query("operations == 0 and group == 'every'").set_index("where")
    for where, values in expected.items():
        assert every_position.loc[where, "mean"] == pytest.approx(numpy.mean(values), rel=1e-4)


def test_attention_mass_adds_up_to_one(seen):
    subject, anatomy, _, texts = seen
    table = depth.attention_mass(subject, anatomy, texts)
    whole = table.query("operations == 0").groupby(["source", "block", "head"])["mean"].sum()
    numpy.testing.assert_allclose(whole, 1, atol=1e-5)
    (batch,) = batched(subject, texts[:1], anatomy.blocks)
    weights = attention_weights(subject.model, anatomy, batch.inputs, batch.mask)
    answer, question = batch.places[0] == Place.ANSWER, batch.places[0] == Place.QUESTION
    mass = weights[1][0, 2][answer][:, question].sum(1).mean()
    alone = depth.attention_mass(subject, anatomy, texts[:1])
    line = alone.query("source == 'answer' and target == 'question' and block == 1 and head == 2")
    assert line["mean"].iloc[0] == pytest.approx(float(mass))


def test_signals_are_those_of_the_states(seen):
    _, anatomy, reasoning, _ = seen
    chain = Chain.empty(reasoning, anatomy.blocks)
    observed(seen, chain)
    torch.testing.assert_close(
        chain.latents[:, 0, -1], reasoning.hidden[:, 0].float(), rtol=1e-4, atol=1e-4
    )
    signals = trajectory_signals(reasoning, chain)
    assert len(signals) == int((reasoning.steps > 0).sum())
    if len(signals):
        row = signals.iloc[0]
        states = chain.latents[int(row["row"]), : int(row["steps"]) + 1, -2]
        net = (states[-1] - states[0]).norm()
        assert row["net_last"] == pytest.approx(float(net), rel=1e-5)
        assert row["accumulated_last"] >= row["net_last"] - 1e-5


def test_single_tokens_have_the_norms_of_texts_of_one_token():
    subject = tiny_subject()
    table = geometry.single_token_norms(subject, Anatomy.of(subject.model.base))
    assert isinstance(table, pandas.DataFrame)
    token = int(table["token"][5])
    inputs = subject.model.embed(torch.tensor([[token]]))
    states = subject.model.base.base_model(
        inputs_embeds=inputs, output_hidden_states=True, use_cache=False
    ).hidden_states
    assert table["mlp_stream_0"][5] == pytest.approx(float(states[1].norm()), rel=1e-5)


def test_texts_of_one_token_have_a_point_of_their_own_and_no_other_positions():
    subject = tiny_subject()
    anatomy = Anatomy.of(subject.model.base)
    texts = [*[Text([5], None, []) for _ in range(12)], Text([5, 6, 7, 8, 9], None, [])]
    (batch,) = batched(subject, texts, anatomy.blocks)
    space = geometry.Geometry(anatomy, 16, 5)
    space.add(batch, capture(subject.model, anatomy, batch.inputs, batch.mask))
    parts = space.kept_parts[0]
    torch.testing.assert_close(parts[:12], parts[:1].expand(12, -1, -1))
    tables = {
        "norms": geometry.norm_table(space),
        "depth": pandas.DataFrame(columns=["operations", "measure", "group", "block"]),
        "skips": pandas.DataFrame(columns=["operations", "group"]),
    }
    summary = {"latent": False, "blocks": 2, "separation": geometry.separation(space)}
    assert findings(tables, summary)["finding"].str.startswith("silhouette").tolist() == [True]
