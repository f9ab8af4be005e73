"""Initial values and arithmetic of the recurrent filters."""

import pytest
import torch

from latent_reasoning.model.filters import MLP, SRE, build_filter
from latent_reasoning.model.settings import LatentSettings
from tests.model.models import HIDDEN, IDS, build_base


def test_mlp_starts_with_xavier_weights_and_zero_biases():
    torch.manual_seed(0)
    module = MLP(256)
    bound = (6 / (2 * 256)) ** 0.5
    for layer in (module.input_layer, module.output_layer):
        assert layer.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert layer.bias.norm().item() == 0
    hidden = torch.randn(3, 256)
    inner = module.output_layer(torch.nn.functional.gelu(module.input_layer(hidden)))
    expected = torch.nn.functional.layer_norm(inner, (256,))
    assert torch.allclose(module(hidden), expected, atol=1e-6)


@pytest.mark.parametrize(("norm", "norm_weights"), [(True, 2 * HIDDEN), (False, 0)])
def test_codis_projection_has_a_width_of_its_own_and_torchs_initial_values(norm, norm_weights):
    torch.manual_seed(0)
    settings = LatentSettings(
        **IDS, recurrent_filter="projection", filter_width=400, filter_norm=norm
    )
    module = build_filter(settings, build_base())
    weights = sum(parameter.numel() for parameter in module.parameters())
    assert weights == 2 * 400 * HIDDEN + 400 + HIDDEN + norm_weights
    for layer, fan_in in ((module.input_layer, HIDDEN), (module.output_layer, 400)):
        bound = fan_in**-0.5
        for values in (layer.weight, layer.bias):
            assert values.abs().max().item() <= bound
        assert layer.weight.abs().max().item() == pytest.approx(bound, rel=0.02)
    hidden = torch.randn(3, HIDDEN, dtype=torch.float64)
    inner = module.output_layer(torch.nn.functional.gelu(module.input_layer(hidden)))
    expected = torch.nn.functional.layer_norm(inner, (HIDDEN,)) if norm else inner
    assert torch.allclose(module(hidden), expected)


def test_ecf_maps_by_the_embeddings_covariance_to_vectors_of_their_mean_length():
    base = build_base()
    embeddings = base.get_input_embeddings().weight.detach()
    module = build_filter(LatentSettings(**IDS, recurrent_filter="linear_ECF"), base)
    covariance = embeddings.T @ embeddings / len(embeddings)
    assert torch.allclose(module.layer.weight, covariance, atol=1e-6)
    lengths = module(torch.randn(4, HIDDEN, dtype=torch.float64)).norm(dim=-1)
    expected = embeddings.norm(dim=-1).mean()
    assert torch.allclose(lengths, expected.expand(4), rtol=1e-4)


def test_sre_mixes_the_embeddings_by_the_softmax_of_the_logits():
    matrix = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    logits = torch.tensor([[0.0, 0.0, 0.0], [100.0, 0.0, 0.0]])
    mixed = SRE()(torch.zeros(2, 2), lambda hidden: logits, matrix)
    assert torch.allclose(mixed, torch.tensor([[2 / 3, 2 / 3], [1.0, 0.0]]))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("none", 0),
        ("MLP", 2 * (HIDDEN**2 + HIDDEN) + 2 * HIDDEN),
        ("linear", HIDDEN**2 + 2 * HIDDEN),
        ("linear_ln", HIDDEN**2 + 3 * HIDDEN),
        ("linear_ECF", HIDDEN**2 + 2 * HIDDEN),
        ("SRE", 0),
        ("projection", 2 * (HIDDEN**2 + HIDDEN) + 2 * HIDDEN),
        ("pause", HIDDEN),
    ],
)
def test_each_filter_has_its_parameters(name, parameters):
    module = build_filter(LatentSettings(**IDS, recurrent_filter=name), build_base())
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters


def test_an_unknown_filter_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'gru'; there are none, MLP, linear"):
        build_filter(LatentSettings(**IDS, recurrent_filter="gru"), build_base())
