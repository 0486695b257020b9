"""Logits, the cross-entropy, and the networks for discrete data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import SCHEDULES, randn
from ddim.data.pixels import dequantize, quantize
from ddim.errors import DdimError
from ddim.nn import CategoricalUNet, Transformer, TransformerConfig, UNetConfig
from ddim.nn.transformer import rotate
from ddim.objective.cross_entropy import CrossEntropy, token_weights
from ddim.process.categorical import Alphabet, kl, sigma_largest
from ddim.process.parameterization import TokenPrediction, log_probabilities
from ddim.process.schedule import zero_terminal_snr

COSINE = zero_terminal_snr(SCHEDULES["cosine"])
MASKED = Alphabet.masked(3, carry_over=True)


def test_logits_without_a_mask_are_a_softmax() -> None:
    logits = randn(2, 5, 4)
    torch.testing.assert_close(
        log_probabilities(logits, torch.zeros(2, 5).long(), Alphabet.uniform(4)), logits.log_softmax(-1)
    )


@pytest.mark.parametrize("carry_over", [False, True])
def test_x0_is_never_a_mask_and_unmasked_tokens_may_be_carried_over(carry_over: bool) -> None:
    x, logits = torch.tensor([[0, 2, 3, 3]]), randn(1, 4, 4)
    p = log_probabilities(logits, x, Alphabet.masked(3, carry_over)).exp()
    torch.testing.assert_close(p.sum(-1), torch.ones(1, 4).double())
    assert (p[..., 3] == 0).all()
    torch.testing.assert_close(p[0, 2:, :3], logits[0, 2:, :3].softmax(-1))
    carried = torch.nn.functional.one_hot(x[0, :2], 4).double()
    assert torch.equal(p[0, :2], carried) == carry_over


def test_half_precision_logits_are_normalised_in_float32() -> None:
    assert log_probabilities(randn(3, 5).bfloat16(), torch.zeros(3).long(), Alphabet.uniform(5)).dtype == torch.float32


def test_guidance_is_a_product_of_powers() -> None:
    off, on = TokenPrediction(randn(6, 5, seed=1).softmax(-1)), TokenPrediction(randn(6, 5, seed=2).softmax(-1))
    torch.testing.assert_close(off.lerp(on, 0.0).x0, off.x0)
    torch.testing.assert_close(off.lerp(on, 1.0).x0, on.x0)
    product = off.x0.pow(-1) * on.x0.pow(2)
    torch.testing.assert_close(off.lerp(on, 2.0).x0, product / product.sum(-1, keepdim=True))
    excluded = TokenPrediction(torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64))
    assert excluded.lerp(excluded, 3.0).x0.tolist() == [[0.5, 0.5, 0.0]]


@pytest.mark.parametrize("noise", ["uniform", "mask"])
def test_the_loss_is_the_cross_entropy_at_a_draw_of_eq_17(noise: str) -> None:
    """Compared with a token-by-token computation; the fractions of kept and replaced tokens are those of eq. (17)."""
    alphabet = Alphabet.uniform(4) if noise == "uniform" else MASKED
    loss = CrossEntropy(COSINE, alphabet)
    generator = torch.Generator().manual_seed(3)
    x0 = torch.randint(0, 3, (2000, 6), generator=generator)
    t, u = torch.full((2000,), 400), loss.draw(x0, generator)
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return randn(4, 4, seed=9).float()[x]

    error = loss.error(network, x0, t, u)
    [x] = seen
    level = COSINE.level(400)
    same = level.alpha_bar + level.variance * (0.25 if noise == "uniform" else 0.0)
    assert float((x == x0).double().mean()) == pytest.approx(same, abs=0.02)
    if noise == "mask":
        assert ((x == x0) | (x == 3)).all()
    logits = randn(4, 4, seed=9)
    logits = logits.log_softmax(-1) if noise == "uniform" else logits[:, :3].log_softmax(-1)
    for sample in range(3):
        each = [
            0.0 if noise == "mask" and x[sample, i] != 3 else -float(logits[x[sample, i], x0[sample, i]])
            for i in range(6)
        ]
        assert float(error[sample]) == pytest.approx(sum(each) / 6, rel=1e-5)
    assert torch.equal(loss.times.apply_weight(error, t), error)
    assert torch.equal(loss.eps_mse(error, t), error)


def test_the_vlb_weight_bounds_the_divergence_and_equals_it_for_a_mask() -> None:
    """T (abar_{t-1} - abar_t) / (1 - abar_t) times -log p(x_0) against eq. (21) at the largest sigma."""
    weights = token_weights(COSINE, "vlb")
    for t in (1, 300, 1000):
        now, following = COSINE.level(t), COSINE.level(t - 1)
        sigma = sigma_largest(now, following)
        for alphabet, x_t in ((Alphabet.uniform(3), 1), (Alphabet.uniform(3), 0), (Alphabet.masked(2), 2)):
            predicted = randn(3, seed=t).softmax(-1)
            if alphabet.mask:
                predicted = torch.tensor([*predicted[:2] / predicted[:2].sum(), 0.0])
            value = float(kl(torch.tensor(x_t), torch.tensor(0), predicted, now, following, sigma, alphabet.pi))
            bound = weights[t - 1] / 1000 * -math.log(float(predicted[0]))
            assert value <= bound * (1 + 1e-9)
            if alphabet.mask:
                assert value == pytest.approx(bound, rel=1e-9)
    assert (token_weights(COSINE, "simple") == 1).all()
    with pytest.raises(DdimError, match=r"^loss weight p2: "):
        token_weights(COSINE, "p2")  # type: ignore[arg-type]


def tiny(**changes: int) -> Transformer:
    shape = {"categories": 5, "length": 9, "width": 16, "depth": 2, "heads": 2, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = TransformerConfig(**shape).build()  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return network.eval()


def test_a_new_transformer_predicts_equal_probabilities() -> None:
    network = TransformerConfig(categories=5, length=9, width=16, depth=2, heads=2).build()
    logits = network(torch.arange(9)[None] % 5, torch.tensor([3.0]))
    assert logits.shape == (1, 9, 5)
    assert not logits.any()


def test_the_transformer_depends_on_every_token_and_its_position() -> None:
    network, t = tiny(), torch.tensor([500.0])
    x = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    plain = network(x, t)
    for place in range(9):
        changed = x.clone()
        changed[0, place] = (changed[0, place] + 1) % 5
        assert ((network(changed, t) - plain).abs().amax(-1) > 1e-6).all()
    turned = network(x.flip(1), t).flip(1)
    assert not torch.allclose(turned, plain, atol=1e-4)
    assert not torch.allclose(network(x, torch.tensor([501.0])), plain, atol=1e-6)
    torch.testing.assert_close(network(x, t, None), network.body(x, network.condition(t)))


def test_rotary_products_depend_only_on_the_distance_of_positions() -> None:
    q, k = (randn(1, 1, 1, 8, seed=seed).expand(1, 1, 12, 8) for seed in (1, 2))
    products = (rotate(q.float()) @ rotate(k.float()).mT)[0, 0]
    for distance in range(-11, 12):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert products.diagonal(0)[0] != pytest.approx(float(products.diagonal(3)[0]), abs=1e-3)


def test_labels_change_the_transformer_output_and_no_label_is_an_extra_class() -> None:
    network, x, t = tiny(classes=3), torch.zeros(1, 9).long(), torch.tensor([10.0])
    outputs = [network(x, t, torch.tensor([label])) for label in range(4)]
    assert all(not torch.allclose(outputs[0], other, atol=1e-6) for other in outputs[1:])
    assert torch.equal(network(x, t), outputs[3])


def test_casting_to_bfloat16_keeps_the_time_layers_in_float32() -> None:
    network = tiny().cast_body(torch.bfloat16)
    float32_parameters = {*network.time.parameters(), *network.time_to_blocks.parameters()}
    for parameter in network.parameters():
        assert parameter.dtype == (torch.float32 if parameter in float32_parameters else torch.bfloat16)


def test_a_width_not_divisible_by_the_heads_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\b16\b"):
        TransformerConfig(width=16, heads=3)


def test_the_categorical_unet_maps_ids_to_logits_per_channel() -> None:
    """Ids in, logits of each channel's levels out; the logits depend on each id in its channel."""
    shape = {"in_channels": 2, "height": 8, "width": 8, "channels": 16, "groups": 4, "multipliers": (1, 2)}
    config = UNetConfig(**shape, blocks=1, attention=(4,), dropout=0.0, categories=3)  # type: ignore[arg-type]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = config.build()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    assert isinstance(network, CategoricalUNet)
    x = torch.arange(128).reshape(1, 2, 8, 8) % 3
    plain = network(x, torch.tensor([5.0]))
    assert plain.shape == (1, 2, 8, 8, 3)
    for channel in range(2):
        changed = x.clone()
        changed[0, channel, 4, 4] = (changed[0, channel, 4, 4] + 1) % 3
        difference = (network(changed, torch.tensor([5.0])) - plain).abs()
        assert difference[0, channel, 4, 4].max() > 1e-5
    assert str(config).endswith("3 ids")


@pytest.mark.parametrize("levels", [2, 4, 7, 256])
def test_quantisation_levels_are_equal_ranges_and_round_trip(levels: int) -> None:
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    ids = quantize(values, levels)
    assert ids.shape == (1, 1, 16, 16)
    counts = np.bincount(ids.flatten().numpy(), minlength=levels)
    assert counts.max() - counts.min() <= 1
    assert (np.diff(ids.flatten().numpy()) >= 0).all()
    shown = dequantize(ids, levels)
    assert shown.dtype == np.uint8
    assert torch.equal(quantize(shown, levels), ids)
    assert (shown.min(), shown.max()) == (0, 255)
