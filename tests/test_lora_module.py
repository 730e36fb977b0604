"""LoRA on one linear: the formula, the initial values, what trains, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lora.errors import ConfigError, TargetError
from lora.lora_module import LoRALayer, LoRALinear, apply_lora_to_linear, count_lora_parameters


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def build_linear(
    inputs: int, outputs: int, *, bias: bool = True, dtype: torch.dtype = torch.float32
) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    with torch.no_grad():
        for seed, parameter in enumerate(linear.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=10 + seed))
    return linear


def build_lora(
    inputs: int = 12, outputs: int = 7, rank: int = 3, **options: float | bool
) -> LoRALinear:
    """A LoRALinear with every tensor random, B too."""
    bias = bool(options.pop("bias", True))
    layer = LoRALinear(build_linear(inputs, outputs, bias=bias), rank, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        layer.lora_A.copy_(drawn(*layer.lora_A.shape, seed=20))
        layer.lora_B.copy_(drawn(*layer.lora_B.shape, seed=21))
    return layer


@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_formula(bias: bool) -> None:
    layer, x = build_lora(rank=3, alpha=5.0, bias=bias), drawn(2, 4, 12)
    shift = layer.bias if layer.bias is not None else 0.0
    expected = x @ layer.weight.T + shift + x @ layer.lora_A.T @ layer.lora_B.T * (5.0 / 3)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_scaling_can_be_given() -> None:
    layer = LoRALinear(build_linear(8, 8), rank=4, alpha=16.0, scaling=0.25)
    assert layer.scaling == 0.25
    assert LoRALinear(build_linear(8, 8), rank=4, alpha=16.0).scaling == 4.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_output_at_the_start_is_the_bases_to_the_bit(
    dtype: torch.dtype, bias: bool, dropout: float
) -> None:
    linear = build_linear(24, 16, bias=bias, dtype=dtype)
    x = drawn(5, 24, dtype=dtype)
    expected = linear(x)
    layer = LoRALinear(linear, rank=4, dropout=dropout).eval()
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.merge()(x), expected)


def test_output_at_the_start_is_the_bases_in_training_with_dropout() -> None:
    linear, x = build_linear(24, 16), drawn(5, 24)
    expected = linear(x)
    assert torch.equal(LoRALinear(linear, rank=4, dropout=0.5).train()(x), expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_merged_equals_unmerged_for_all_shapes_and_ranks(
    inputs: int, outputs: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(inputs, outputs)))
    layer = build_lora(inputs, outputs, rank, alpha=data.draw(st.sampled_from([0.5, 8.0, 16.0])))
    x = drawn(3, inputs)
    adapted, merged = layer(x), layer.merge()
    assert type(merged) is nn.Linear
    error = (merged(x) - adapted).norm() / adapted.norm()
    assert error <= 1e-6
    assert layer.lora_A.shape == (rank, inputs)
    assert layer.lora_B.shape == (outputs, rank)


def test_merge_leaves_the_layer_and_the_base_as_they_were() -> None:
    layer = build_lora()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    merged = layer.merge()
    assert merged.weight.data_ptr() != layer.weight.data_ptr()
    assert not merged.weight.requires_grad
    assert merged.bias is layer.bias
    assert all(torch.equal(before[name], t) for name, t in layer.state_dict().items())


def test_merge_in_bf16_rounds_once() -> None:
    layer = build_lora().to(torch.bfloat16)
    exact = layer.weight.float() + layer.lora_B.float() @ layer.lora_A.float() * layer.scaling
    assert torch.equal(layer.merge().weight, exact.to(torch.bfloat16))


def test_unwrap_gives_back_the_same_parameters() -> None:
    linear = build_linear(6, 5)
    weight, bias = linear.weight, linear.bias
    plain = LoRALinear(linear, rank=2).eval().unwrap()
    assert plain.weight is weight
    assert plain.bias is bias
    assert not plain.training


def test_a_is_kaiming_uniform_and_b_zero() -> None:
    layer = LoRALinear(build_linear(400, 300), rank=200, generator=generator())
    bound = 1 / math.sqrt(400)  # Kaiming-uniform with a = √5
    a = layer.lora_A.detach()
    assert a.abs().max() <= bound
    assert a.abs().max() > 0.999 * bound
    assert abs(a.mean().item()) < 5 * bound / math.sqrt(3 * a.numel())
    assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert torch.count_nonzero(layer.lora_B) == 0


def test_a_seed_gives_the_same_a_in_every_dtype() -> None:
    fp32 = LoRALinear(build_linear(9, 9), rank=2, generator=generator(3))
    again = LoRALinear(build_linear(9, 9), rank=2, generator=generator(3))
    other = LoRALinear(build_linear(9, 9), rank=2, generator=generator(4))
    bf16 = LoRALinear(build_linear(9, 9, dtype=torch.bfloat16), rank=2, generator=generator(3))
    assert torch.equal(fp32.lora_A, again.lora_A)
    assert not torch.equal(fp32.lora_A, other.lora_A)
    assert torch.equal(fp32.lora_A, bf16.lora_A)  # A and B are fp32 on a bf16 base too
    assert bf16.lora_B.dtype is torch.float32


def test_gradients_reach_a_and_b_only() -> None:
    layer = build_lora()
    layer(drawn(4, 12)).square().sum().backward()
    assert layer.weight.grad is None
    assert layer.bias is not None
    assert layer.bias.grad is None
    assert layer.lora_A.grad is not None
    assert layer.lora_A.grad.abs().sum() > 0
    assert layer.lora_B.grad is not None
    assert layer.lora_B.grad.abs().sum() > 0
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


def test_the_base_is_byte_identical_after_training() -> None:
    layer = build_lora()
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(5):
        optimizer.zero_grad()
        layer(drawn(4, 12, seed=step)).square().sum().backward()
        optimizer.step()
    after = layer.state_dict()
    for name in ("weight", "bias"):
        assert after[name].numpy().tobytes() == before[name].numpy().tobytes()
    for name in ("lora_A", "lora_B"):
        assert not torch.equal(after[name], before[name])


def test_state_dict_keeps_the_bases_names() -> None:
    assert set(build_lora().state_dict()) == {"weight", "bias", "lora_A", "lora_B"}
    assert set(build_lora(bias=False).state_dict()) == {"weight", "lora_A", "lora_B"}


@pytest.mark.parametrize("rank", [1, 7, 20])  # above both sides too, as in PEFT
def test_smallest_and_largest_rank(rank: int) -> None:
    layer, x = build_lora(12, 7, rank), drawn(3, 12)
    torch.testing.assert_close(layer.merge()(x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [0, -1, 2**16 + 1, True, "8", 2.0, None])
def test_a_rank_out_of_range_is_refused(rank: object) -> None:
    with pytest.raises(ConfigError) as caught:
        LoRALinear(build_linear(12, 7), rank=rank)  # type: ignore[arg-type]
    message = str(caught.value)
    assert f"rank={rank!r}" in message
    assert "12 inputs and 7 outputs" in message
    assert "from 1 to 65536" in message


@pytest.mark.parametrize("alpha", [0, -1.0, math.nan, math.inf, 1e308, "16", True])
def test_an_alpha_out_of_range_is_refused(alpha: object) -> None:
    with pytest.raises(ConfigError, match=r"alpha=.*finite number > 0"):
        LoRALinear(build_linear(12, 7), rank=2, alpha=alpha)  # type: ignore[arg-type]


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 2, math.nan, "0.1", True])
def test_a_dropout_out_of_range_is_refused(dropout: object) -> None:
    with pytest.raises(ConfigError, match=r"dropout=.*0 ≤ dropout < 1"):
        LoRALinear(build_linear(12, 7), rank=2, dropout=dropout)  # type: ignore[arg-type]


def test_a_refused_linear_stays_trainable() -> None:
    linear = build_linear(12, 7)
    with pytest.raises(ConfigError):
        LoRALinear(linear, rank=2**17)
    assert linear.weight.requires_grad


def test_only_linears_can_be_wrapped() -> None:
    with pytest.raises(TargetError, match=r"wrap a Embedding.*Allowed: nn.Linear.*apply_lo"):
        LoRALinear(nn.Embedding(3, 4))  # type: ignore[arg-type]


def test_dropout_acts_on_loras_inputs_in_training_only() -> None:
    layer, x = build_lora(dropout=0.5), drawn(64, 12)
    layer.train()
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    expected = plain + dropped @ layer.lora_A.T @ layer.lora_B.T * layer.scaling
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_training_mode_is_taken_over() -> None:
    assert not LoRALinear(build_linear(4, 4).eval(), rank=1, dropout=0.5).dropout.training
    assert LoRALinear(build_linear(4, 4).train(), rank=1, dropout=0.5).dropout.training


def test_counts_of_a_square_linear() -> None:
    layer = apply_lora_to_linear(nn.Linear(256, 256, bias=False), rank=8)
    counts = count_lora_parameters(layer)
    assert (counts.frozen, counts.lora, counts.other_trainable) == (65_536, 4_096, 0)
    assert counts.saved_fraction == 0.9375
    assert counts.total == 69_632
    assert counts.lora_fraction == pytest.approx(4_096 / 69_632)
    assert counts.trainable_fraction == counts.lora_fraction


def test_counts_tell_lora_from_other_trainable_and_count_shared_tensors_once() -> None:
    model = nn.Sequential(nn.Embedding(10, 6), LoRALinear(build_linear(6, 10, bias=False), rank=2))
    model[1].weight = model[0].weight  # type: ignore[union-attr,assignment]
    counts = count_lora_parameters(model)
    assert (counts.lora, counts.other_trainable, counts.frozen) == (2 * 16, 60, 0)
    model[0].requires_grad_(False)
    counts = count_lora_parameters(model)
    assert (counts.lora, counts.other_trainable, counts.frozen) == (2 * 16, 0, 60)
    assert counts.trainable == 32


def test_counts_of_a_model_without_parameters() -> None:
    counts = count_lora_parameters(nn.ReLU())
    assert counts.total == 0
    assert (counts.lora_fraction, counts.trainable_fraction, counts.saved_fraction) == (0, 0, 0)


def test_a_layer_says_its_numbers() -> None:
    words = repr(build_lora(12, 7, rank=3, alpha=6.0))
    assert "in_features=12, out_features=7, rank=3, alpha=6, scaling=2" in words


def test_a_layer_without_storage_stays_so() -> None:
    with torch.device("meta"):
        layer = LoRALinear(nn.Linear(8, 8), rank=2)
    assert layer.lora_A.is_meta
    assert layer.lora_B.is_meta


def test_mixed_precision_adapters_keep_the_bases_output_type() -> None:
    layer = LoRALinear(build_linear(8, 6, dtype=torch.bfloat16), rank=2)
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.float(), layer.lora_B.data.float()
    assert layer(drawn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_common_parent_leaves_merging_to_its_children() -> None:
    for method in (LoRALayer.merge, LoRALayer.unwrap):
        with pytest.raises(NotImplementedError):
            method(build_lora())
