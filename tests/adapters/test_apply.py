"""Applying LoRA to a model: which layers, what trains, what stays unchanged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lora.adapters.apply import (
    applied_lora,
    apply_lora,
    disabled_adapter,
    lora_layers,
    remove_lora,
)
from lora.adapters.targets import find_targets, output_head_name
from lora.config import LoRAConfig
from lora.decoder.decoder import build_empty_decoder
from lora.decoder.families import decoder_config
from lora.errors import ConfigError, TargetError
from lora.layers.conv1d import LoRAConv1D
from lora.lora_module import LoRALayer, LoRALinear, count_lora_parameters


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.v_proj(self.q_proj(x))
        return x + self.mlp(self.norm(x))


class Toy(nn.Module):
    """A plain module, without get_output_embeddings."""

    def __init__(self, n_blocks: int = 3, width: int = 8, vocab: int = 11) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(n_blocks))
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.layers:
            x = block(x)
        return self.head(x)


class TiedToy(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight


IDS = torch.arange(10).view(2, 5)


@pytest.fixture
def toy(fill_random: Callable[..., nn.Module]) -> nn.Module:
    return fill_random(Toy(), 0).eval()


@pytest.fixture
def tied_toy(fill_random: Callable[..., nn.Module]) -> nn.Module:
    return fill_random(TiedToy(), 0).eval()


def names_of(model: nn.Module) -> list[str]:
    return list(lora_layers(model))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 13),
        ({"targets": "q_proj"}, 3),
        ({"targets": ("q_proj", "v_proj")}, 6),
        ({"targets": ("layers.1.q_proj", "mlp.0")}, 4),
        ({"targets": r"layers\.[02]\..*_proj"}, 4),
        ({"targets": "all-linear", "exclude": ("q_proj", "layers.0.v_proj")}, 9),
        ({"targets": ("q_proj", "head"), "layers": (0, 2)}, 2),
        ({"layers": (1,)}, 4),
    ],
)
def test_targets(toy: nn.Module, options: dict[str, object], expected: int) -> None:
    config = LoRAConfig(rank=2, **options)  # type: ignore[arg-type]
    wanted = find_targets(toy, config)
    apply_lora(toy, config)
    assert len(wanted) == expected
    assert names_of(toy) == wanted == list(applied_lora(toy).target_names)
    assert all(isinstance(toy.get_submodule(name), LoRALinear) for name in wanted)


def test_a_name_is_no_part_of_a_word(toy: nn.Module) -> None:
    toy.add_module("my_q_proj", nn.Linear(8, 8))
    assert "my_q_proj" not in find_targets(toy, LoRAConfig(rank=2, targets="q_proj"))


def test_all_linear_keeps_a_plain_modules_head_and_leaves_out_a_language_models(
    toy: nn.Module, tiny_model: Callable[[str], nn.Module]
) -> None:
    assert output_head_name(toy) is None
    assert "head" in find_targets(toy, LoRAConfig(rank=2))
    for name in ("llama-untied", "llama-tied", "gpt2-tied"):
        model = tiny_model(name)
        assert output_head_name(model) == "lm_head"
        names = find_targets(model, LoRAConfig(rank=2))
        assert "lm_head" not in names
        assert len(names) == (14 if name.startswith("llama") else 8)
        assert find_targets(model, LoRAConfig(rank=2, targets="lm_head")) == ["lm_head"]


def test_gpt2s_conv1d_are_adapted(
    tiny_model: Callable[[str], nn.Module], token_ids: Tensor
) -> None:
    model = tiny_model("gpt2-tied")
    before = model(token_ids).logits
    apply_lora(model, LoRAConfig(rank=2))
    assert {type(layer) for layer in lora_layers(model).values()} == {LoRAConv1D}
    assert torch.equal(model(token_ids).logits, before)


def test_attentions_inner_projection_is_not_taken() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    assert find_targets(model, LoRAConfig(rank=2)) == ["linear1", "linear2"]
    with pytest.raises(TargetError, match="out_proj"):
        find_targets(model, LoRAConfig(rank=2, targets="out_proj"))


def test_the_output_at_the_start_is_the_bases_to_the_bit(toy: nn.Module) -> None:
    before = toy(IDS)
    assert apply_lora(toy) is toy
    assert torch.equal(toy(IDS), before)


def test_only_a_and_b_train_and_names_stay(toy: nn.Module) -> None:
    names = set(toy.state_dict())
    apply_lora(toy, LoRAConfig(rank=2))
    assert names < set(toy.state_dict())
    extra = {name.rpartition(".")[2] for name in set(toy.state_dict()) - names}
    assert extra == {"lora_A", "lora_B"}
    trained = {name.rpartition(".")[2] for name, p in toy.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}
    counts = count_lora_parameters(toy)
    assert counts.other_trainable == 0
    assert counts.lora == sum(
        2 * (x.in_features + x.out_features) for x in lora_layers(toy).values()
    )


def test_training_leaves_the_base_byte_identical(
    toy: nn.Module, fill_random: Callable[..., nn.Module]
) -> None:
    apply_lora(toy, LoRAConfig(rank=2, modules_to_save=("embed",)))
    fill_random(toy, 1, only_trainable=True)
    before = {n: p.detach().clone() for n, p in toy.named_parameters()}
    original = applied_lora(toy).originals["embed"].weight.detach().clone()  # type: ignore[operator,union-attr]
    optimizer = torch.optim.AdamW([p for p in toy.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        toy(IDS).square().mean().backward()
        optimizer.step()
    for name, parameter in toy.named_parameters():
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name
    assert torch.equal(applied_lora(toy).originals["embed"].weight, original)  # type: ignore[arg-type]


def test_patterns_change_rank_and_alpha_by_name(toy: nn.Module) -> None:
    config = LoRAConfig(
        rank=4,
        alpha=8.0,
        rank_pattern={"layers.1.q_proj": 2, "q_proj": 3},
        alpha_pattern={"v_proj": 4.0},
    )
    layers = lora_layers(apply_lora(toy, config))
    assert [layers[f"layers.{i}.q_proj"].rank for i in range(3)] == [3, 2, 3]
    assert layers["layers.0.q_proj"].scaling == 8 / 3
    assert layers["layers.0.v_proj"].scaling == 1.0
    assert layers["head"].rank == 4


def test_a_rank_above_a_side_is_noted_once_for_a_model(
    toy: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    for rank in (64, 99):  # candidates of a sweep
        remove_lora(apply_lora(toy, LoRAConfig(rank=rank, targets=("q_proj",))))
    assert caplog.text.count("the rank is above the smaller side") == 1
    apply_lora(toy, LoRAConfig(rank=64, targets=("v_proj",)))
    assert caplog.text.count("the rank is above the smaller side") == 2


def test_rslora_scales_by_the_root_of_the_rank(toy: nn.Module) -> None:
    layers = lora_layers(apply_lora(toy, LoRAConfig(rank=4, alpha=8.0, rslora=True)))
    assert {layer.scaling for layer in layers.values()} == {4.0}


def test_a_seed_gives_the_same_a(fill_random: Callable[..., nn.Module]) -> None:
    first, again, other = (
        apply_lora(fill_random(Toy(), 0), LoRAConfig(rank=2, init_seed=seed)) for seed in (7, 7, 8)
    )
    a, b, c = (m.get_submodule("layers.1.q_proj") for m in (first, again, other))
    assert torch.equal(a.lora_A, b.lora_A)  # type: ignore[arg-type]
    assert not torch.equal(a.lora_A, c.lora_A)  # type: ignore[arg-type]


def test_a_seed_leaves_the_global_generator_alone(toy: nn.Module) -> None:
    state = torch.get_rng_state()
    apply_lora(toy, LoRAConfig(rank=2, init_seed=7))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_trained_module_is_a_copy_and_a_tied_head_stays(
    tied_toy: nn.Module, fill_random: Callable[..., nn.Module]
) -> None:
    before, weight = tied_toy.get_parameter("head.weight").detach().clone(), tied_toy.embed.weight
    config = LoRAConfig(rank=2, targets="q_proj", modules_to_save=("embed",))
    apply_lora(tied_toy, config)
    fill_random(tied_toy, 1, only_trainable=True)
    assert tied_toy.head.weight is weight  # type: ignore[union-attr]
    assert torch.equal(tied_toy.get_parameter("head.weight"), before)
    assert not torch.equal(tied_toy.get_parameter("embed.weight"), before)
    assert tied_toy.get_parameter("embed.weight").requires_grad
    counts = count_lora_parameters(tied_toy)
    assert counts.other_trainable == 11 * 8


def test_an_adapted_tied_head_never_changes_the_embedding(
    tied_toy: nn.Module, fill_random: Callable[..., nn.Module]
) -> None:
    apply_lora(tied_toy, LoRAConfig(rank=2))
    fill_random(tied_toy, 1, only_trainable=True)
    embedding = tied_toy.get_parameter("embed.weight")
    before = embedding.detach().clone()
    head = tied_toy.get_submodule("head")
    assert isinstance(head, LoRALayer)
    assert head.weight is embedding
    optimizer = torch.optim.SGD([p for p in tied_toy.parameters() if p.requires_grad], lr=0.1)
    tied_toy(IDS).square().mean().backward()
    optimizer.step()
    assert torch.equal(embedding, before)
    assert head.merge().weight is not embedding
    assert torch.equal(embedding, before)


def test_a_disabled_adapter_computes_as_the_base_to_the_bit(
    tied_toy: nn.Module, fill_random: Callable[..., nn.Module]
) -> None:
    before = tied_toy(IDS)
    apply_lora(tied_toy, LoRAConfig(rank=2, dropout=0.5, modules_to_save=("embed", "norm")))
    fill_random(tied_toy, 1, only_trainable=True)
    adapted = tied_toy(IDS)
    with disabled_adapter(tied_toy) as base:
        assert torch.equal(base(IDS), before)
        assert lora_layers(base) == {}
    assert torch.equal(tied_toy(IDS), adapted)
    assert not torch.equal(adapted, before)


def test_an_error_while_disabled_restores_the_adapter(toy: nn.Module) -> None:
    apply_lora(toy, LoRAConfig(rank=2))
    names = names_of(toy)
    with pytest.raises(IndexError), disabled_adapter(toy):
        toy(torch.tensor([[99]]))
    assert names_of(toy) == names


def test_removing_gives_the_base_back(
    tied_toy: nn.Module, fill_random: Callable[..., nn.Module]
) -> None:
    state = {name: tensor.clone() for name, tensor in tied_toy.state_dict().items()}
    before = tied_toy(IDS)
    apply_lora(tied_toy, LoRAConfig(rank=2, modules_to_save=("embed",)))
    fill_random(tied_toy, 1, only_trainable=True)
    assert remove_lora(tied_toy) is tied_toy
    assert torch.equal(tied_toy(IDS), before)
    assert tied_toy.embed.weight is tied_toy.head.weight  # type: ignore[union-attr]
    assert tied_toy.state_dict().keys() == state.keys()
    assert all(torch.equal(state[name], t) for name, t in tied_toy.state_dict().items())
    assert {type(m) for m in tied_toy.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    apply_lora(tied_toy, LoRAConfig(rank=2))  # and LoRA can be put on again


@pytest.mark.parametrize("kind", [Toy, TiedToy])
def test_originals_follow_the_model_to_another_type(kind: type[Toy]) -> None:
    with_disabled, removed = (
        apply_lora(kind(), LoRAConfig(rank=2, modules_to_save=("embed",))).double() for _ in "12"
    )
    with disabled_adapter(with_disabled):
        assert with_disabled(IDS).dtype == torch.float64
    assert remove_lora(removed)(IDS).dtype == torch.float64


def test_training_mode_is_kept(toy: nn.Module) -> None:
    apply_lora(toy.train(), LoRAConfig(rank=2, dropout=0.1, modules_to_save=("norm",)))
    assert all(module.training for module in toy.modules())
    with disabled_adapter(toy.eval()):
        assert not any(module.training for module in toy.modules())


def test_an_unmatched_target_names_the_nearest(toy: nn.Module) -> None:
    with pytest.raises(TargetError) as caught:
        apply_lora(toy, LoRAConfig(rank=2, targets="q_prj"))
    message = str(caught.value)
    assert "Cannot adapt 'q_prj': no linear layer has this name." in message
    assert "Linear layers here: 0, 2, head, q_proj, v_proj." in message
    assert "Did you mean 'q_proj'?" in message
    assert 'targets="all-linear" adapts all of them' in message


@pytest.mark.parametrize("targets", [("all-linear", "head"), ("all-linear",)])
def test_all_linear_stands_alone(toy: nn.Module, targets: tuple[str, ...]) -> None:
    with pytest.raises(TargetError, match=r"it stands alone.*layers here: 0, 2, head, q_proj"):
        apply_lora(toy, LoRAConfig(rank=2, targets=targets))
    assert not lora_layers(toy)


@pytest.mark.parametrize(
    ("model_type", "target", "words"),
    [
        ("phi3", "q_proj", "Queries, keys and values are one linear here: adapt 'qkv_proj'."),
        ("phi3", "up_proj", "Gate and up are one linear here: adapt 'gate_up_proj'."),
        ("gpt2", "v_proj", "Queries, keys and values are one linear here: adapt 'c_attn'."),
    ],
)
def test_a_part_of_a_fused_linear_names_the_linear(
    model_type: str, target: str, words: str
) -> None:
    sizes = {"vocab_size": 9, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    if model_type == "gpt2":
        sizes = {"vocab_size": 9, "n_embd": 16, "n_layer": 1}
    heads = "n_head" if model_type == "gpt2" else "num_attention_heads"
    model = build_empty_decoder(decoder_config({"model_type": model_type, **sizes, heads: 2}))
    with pytest.raises(TargetError) as caught:
        apply_lora(model, LoRAConfig(targets=(target,)))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": ("q_proj", "k_proj")}, "Cannot adapt 'k_proj': no linear layer"),
        ({"targets": r"layers\.9\..*"}, "Cannot adapt .*9.* matches no linear layer's full name"),
        ({"targets": "embed"}, "Cannot adapt 'embed': no linear"),
        ({"exclude": ("o_proj",)}, "Cannot exclude 'o_proj': no linear"),
        ({"rank_pattern": {"k_proj": 2}}, "Cannot set the rank of 'k_proj'"),
        ({"alpha_pattern": {"k_proj": 2.0}}, "Cannot set the alpha of 'k_proj'"),
        ({"layers": (0, 3)}, r"layers=\(0, 3\).*in block 3. Allowed: 0 to 2"),
        ({"targets": "head", "layers": (0,)}, "no block has a number"),
        (
            {"targets": "q_proj", "exclude": ("q_proj",)},
            "Cannot adapt this Toy .*: no linear layer is left",
        ),
        ({"modules_to_save": ("embd",)}, r"'embd'.* Did you mean 'embed'"),
        (
            {"modules_to_save": ("head",)},
            r"'head': it is both a LoRA target and in modules_to_save",
        ),
        ({"modules_to_save": ("mlp",)}, r"'layers.0.mlp.0': it is both .*\('layers.0.mlp'\)"),
        (
            {"targets": "head", "modules_to_save": ("mlp", "layers.0.mlp.0")},
            "both 'layers.0.mlp.0' and 'layers.0.mlp' fully",
        ),
        ({"targets": "q_proj", "modules_to_save": ("mlp.1",)}, "no module with parameters"),
    ],
)
def test_names_that_do_not_fit_are_refused(
    toy: nn.Module, options: dict[str, object], words: str
) -> None:
    with pytest.raises(TargetError, match=words):
        apply_lora(toy, LoRAConfig(rank=2, **options))  # type: ignore[arg-type]
    assert lora_layers(toy) == {}


def test_an_error_leaves_the_model_as_it_was(toy: nn.Module) -> None:
    toy.embed.requires_grad_(False)
    modules = dict(toy.named_modules())
    flags = {name: p.requires_grad for name, p in toy.named_parameters()}
    with pytest.raises(
        ConfigError, match=r"Cannot adapt 'head': rank=65537 .*8 inputs and 11 outputs"
    ):
        apply_lora(toy, LoRAConfig(rank=8, rank_pattern={"head": 2**16 + 1}))
    assert dict(toy.named_modules()) == modules
    assert {name: p.requires_grad for name, p in toy.named_parameters()} == flags
    assert "applied_lora" not in vars(toy)


class Linear4bit(nn.Linear):
    """A linear with a forward of its own, as bitsandbytes has them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class QuantLinear(nn.Module):
    """A linear without a weight, as GPTQ's are."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features


@pytest.mark.parametrize("kind", [Linear4bit, QuantLinear])
def test_quantised_layers_are_refused_and_never_passed_over(kind: type[nn.Module]) -> None:
    model = nn.ModuleDict({"q_proj": kind(4, 4), "k_proj": nn.Linear(4, 4)})
    for targets in ("all-linear", ("q_proj",), "q_.*"):
        with pytest.raises(TargetError, match=rf"'q_proj', a {kind.__name__}: .*exclude"):
            apply_lora(model, LoRAConfig(rank=2, targets=targets))
    apply_lora(model, LoRAConfig(rank=2, exclude=("q_proj",)))
    assert type(model["q_proj"]) is kind
    assert list(lora_layers(model)) == ["k_proj"]


def test_a_second_time_is_refused(toy: nn.Module) -> None:
    apply_lora(toy, LoRAConfig(rank=2))
    with pytest.raises(TargetError, match=r"already has it \(at 'layers.0.q_proj'.*merge_lora"):
        apply_lora(toy, LoRAConfig(rank=2))


def test_a_plain_model_has_no_adapter_to_speak_of(toy: nn.Module) -> None:
    for ask in (applied_lora, remove_lora):
        with pytest.raises(TargetError, match=r"this Toy has no LoRA. Call apply_lora"):
            ask(toy)


def test_a_bare_linear_has_nothing_inside_to_adapt() -> None:
    with pytest.raises(TargetError, match="no linear layers inside that LoRA can wrap"):
        apply_lora(nn.Linear(8, 8), LoRAConfig(rank=2))


def test_one_module_in_two_places_is_refused(toy: nn.Module) -> None:
    toy.add_module("again", toy.get_submodule("layers.0.q_proj"))
    with pytest.raises(TargetError, match=r"'layers.0.q_proj': it is the same"):
        apply_lora(toy, LoRAConfig(rank=2))
    apply_lora(toy, LoRAConfig(rank=2, targets="v_proj"))


def test_a_model_on_the_meta_device_can_be_adapted() -> None:
    with torch.device("meta"):
        model = Toy()
    apply_lora(model, LoRAConfig(rank=2))
    assert all(parameter.is_meta for parameter in model.parameters())
