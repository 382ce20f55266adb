"""Rotary positions: what the knobs mean, and that the tables stay exact."""

from __future__ import annotations

import math

import pytest
import torch

from transformerlm.models.build import create_model, empty_model
from transformerlm.models.rope import rope_frequencies, rope_table, rotate
from transformerlm.models.specs import TransformerSpec


def spec(**changes: object) -> TransformerSpec:
    values: dict[str, object] = {"context_length": 64, "d_model": 32, "num_heads": 2, "num_layers": 1}
    return TransformerSpec(**(values | changes))  # type: ignore[arg-type]


def test_a_rotation_is_the_complex_product() -> None:
    the_spec = spec()
    x = torch.randn(1, 64, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cos, sin = rope_table(the_spec)
    pairs = torch.complex(x[..., :8], x[..., 8:])
    angles = torch.tensor([[t * 10000 ** (-i / 8) for i in range(8)] for t in range(64)], dtype=torch.float64)
    turned = pairs * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    torch.testing.assert_close(rotate(x, cos, sin), torch.cat([turned.real, turned.imag], dim=-1))


def test_products_depend_on_the_distance_only() -> None:
    cos, sin = rope_table(spec())
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def product(query_position: int, key_position: int) -> float:
        turned = [rotate(x, cos[[t]], sin[[t]]) for x, t in ((q, query_position), (k, key_position))]
        return float((turned[0] * turned[1]).sum())

    assert product(10, 7) == pytest.approx(product(63, 60)) and product(10, 7) != pytest.approx(product(10, 6))


def test_linear_scaling_squeezes_positions() -> None:
    scaled = rope_table(spec(rope_scaling="linear", rope_scaling_factor=4.0))
    torch.testing.assert_close(scaled[:, ::4], rope_table(spec())[:, :16])


def test_ntk_scaling_slows_the_slowest_pair_by_the_factor_and_keeps_the_fastest() -> None:
    plain, scaled = rope_frequencies(spec()), rope_frequencies(spec(rope_scaling="ntk", rope_scaling_factor=4.0))
    assert scaled[0] == plain[0]
    assert float(plain[-1] / scaled[-1]) == pytest.approx(4.0)
    assert (plain / scaled).diff().min() > 0


def test_the_table_stays_exact_when_the_model_changes_its_type() -> None:
    model = create_model(spec(), vocab_size=100)
    exact = rope_table(model.spec)
    assert model.bfloat16().rope.table.equal(exact.float())
    assert model.double().rope.table.equal(exact)
    assert model.float().rope.table.equal(exact.float())


def test_the_table_appears_with_the_weights_and_is_stored_nowhere() -> None:
    model = empty_model(spec(), vocab_size=100, device="meta")
    assert model.rope.table.is_meta
    assert model.to_empty(device="cpu").rope.table.equal(rope_table(model.spec).float())
    assert not any("rope" in name for name in model.state_dict()) and not list(model.buffers())


def test_a_head_of_two_channels_has_one_frequency_whatever_the_scaling() -> None:
    tiny = spec(d_model=4, num_heads=2, rope_scaling="ntk", rope_scaling_factor=3.0)
    assert rope_frequencies(tiny).tolist() == [1.0]
    assert math.isfinite(float(rope_table(tiny).sum()))
