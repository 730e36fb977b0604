"""transformers' models behind our interface: the logits that they have alone, packed and cached."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora.adapters.apply import apply_lora, lora_layers
from lora.config import LoRAConfig, SamplingConfig
from lora.errors import ModelError
from lora.inference.generate import generate
from lora.pretrained.load.models import model_config
from lora.pretrained.transformers_models.config import Traits
from lora.pretrained.transformers_models.load import as_language_model, load_transformers_model
from lora.pretrained.transformers_models.model import TransformersModel
from tests.pretrained.tiny_models import VOCAB, randomise, tiny_transformers

pytest.importorskip("transformers")

PACKED = (
    *("llama", "gpt_neox", "gptj", "opt", "bloom", "falcon", "cohere2", "gemma2", "glm4"),
    *("stablelm", "starcoder2", "phi", "mpt", "granite", "mixtral", "gpt_oss"),
)
_made: dict[str, Any] = {}


def model_of(name: str) -> TransformersModel:
    """Return a wrapped model in fp32; tests do not change it."""
    if name not in _made:
        _made[name] = as_language_model(tiny_transformers(name))
    made = _made[name]
    assert isinstance(made, TransformersModel)
    return made


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(5))


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", [*PACKED, "mamba"])
@torch.no_grad()
def test_documents_have_the_logits_that_they_have_alone(name: str) -> None:
    own, ids = model_of(name), tokens(2, 20)
    documents = torch.tensor([[0] * 9 + [1] + [2] * 7 + [-1] * 3, [-1] * 8 + [0] * 12])
    assert_close(own(ids), own.theirs(input_ids=ids).logits)
    logits = own(ids, document_ids=documents)
    for row, number in ((0, 0), (0, 1), (0, 2), (1, 0)):
        places = documents[row] == number
        alone = own.theirs(input_ids=ids[row, places][None]).logits[0]
        assert_close(logits[row, places], alone)
    assert (own.why_not_packed is None) == (name != "mamba")


@pytest.mark.parametrize("name", [*PACKED, "mamba"])
def test_greedy_answers_are_theirs(name: str) -> None:
    own = model_of(name)
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [5, 9, 3], [7, 7, 8, 2, 4]]
    answers = generate(own, prompts, SamplingConfig(temperature=0, max_new_tokens=6))
    for prompt, answer in zip(prompts, answers, strict=True):
        theirs = own.theirs.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None
        )
        assert answer == theirs[0, len(prompt) :].tolist()


def test_the_wrapper_shares_what_the_model_has() -> None:
    theirs = tiny_transformers("llama")
    own = as_language_model(theirs)
    apply_lora(own, LoRAConfig(rank=2, targets=("q_proj", "lm_head")))
    names = dict(theirs.named_parameters())
    assert dict(own.named_parameters()).keys() == names.keys()
    assert all(p is names[name] for name, p in own.named_parameters())
    assert "lm_head.lora_A" in names
    assert isinstance(own.output_head(), type(theirs.lm_head))
    with torch.no_grad():
        for layer in lora_layers(own).values():
            layer.lora_B.fill_(0.1)
        assert_close(own(tokens(1, 5)), theirs(input_ids=tokens(1, 5)).logits)
    own.train()
    assert theirs.training
    assert theirs.model.training
    other = copy.deepcopy(own)
    assert isinstance(other, TransformersModel)
    assert other.theirs is not theirs
    assert other.lm_head is other.theirs.lm_head


def longrope_model() -> TransformersModel:
    """Return a Phi-3 whose frequencies are others in documents of more than 80 tokens."""
    rope = {
        **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 80},
        **{"short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0], "partial_rotary_factor": 0.5},
    }
    theirs = tiny_transformers(
        "phi3",
        rope_parameters=rope,
        original_max_position_embeddings=80,
        max_position_embeddings=160,
        num_key_value_heads=4,
    )
    own = as_language_model(theirs)
    assert isinstance(own, TransformersModel)
    return own


@torch.no_grad()
def test_frequencies_by_length_are_those_of_each_document() -> None:
    own, ids = longrope_model(), tokens(1, 95)
    logits = own(ids, document_ids=torch.tensor([[0] * 5 + [1] * 90]))
    assert_close(logits[:, :5], own.theirs(input_ids=ids[:, :5]).logits)
    assert_close(logits[:, 5:], own.theirs(input_ids=ids[:, 5:]).logits)


@pytest.mark.parametrize("lengths", [(77,), (90, 84), (76, 90, 20, 79), (78, 76)])
def test_a_cache_across_the_length_that_changes_the_frequencies(lengths: tuple[int, ...]) -> None:
    own = longrope_model()
    prompts = [tokens(n).tolist() for n in lengths]
    answers = generate(own, prompts, SamplingConfig(temperature=0, max_new_tokens=9))
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():  # of all prefixes, since a longer one changes what is before
            ends = range(len(prompt), ids.shape[1])
            steps = [own.theirs(input_ids=ids[:, :end]).logits[0, -1] for end in ends]
        assert answer == [int(logits.argmax()) for logits in steps]


def test_rounded_biases_by_position_are_not_packed() -> None:
    """BLOOM's are fp32 numbers in a model of fp32; Falcon's always have the precision of bf16."""
    bloom = tiny_transformers("bloom", n_head=8)
    assert as_language_model(bloom).why_not_packed is None
    narrow = as_language_model(bloom.to(torch.bfloat16)).why_not_packed
    assert narrow is not None
    assert "rounded" in narrow
    falcon = tiny_transformers("falcon-alibi", max_position_embeddings=2048)
    assert "rounded" in (as_language_model(falcon).why_not_packed or "")


def test_the_text_part_of_a_multimodal_model() -> None:
    """Qwen 3 VL's text has no class of its own with a head: what the head does is read off it."""
    transformers = pytest.importorskip("transformers")
    text = {
        **{"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    vision = {
        **{"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16},
        **{"out_hidden_size": 64, "patch_size": 4, "deepstack_visual_indexes": [0]},
    }
    config = transformers.Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=2, video_token_id=3
    )
    theirs = transformers.Qwen3VLForConditionalGeneration(config).eval()
    randomise(theirs, 0)
    own, ids = as_language_model(theirs), tokens(1, 9).clamp(min=5)
    assert not own.needs_all_logits
    assert len(own.blocks()) == 2
    with torch.no_grad():
        assert_close(own(ids), theirs(input_ids=ids).logits)
        logits = own(ids, document_ids=torch.tensor([[0] * 4 + [1] * 5]))
        assert_close(logits[:, 4:], theirs(input_ids=ids[:, 4:]).logits)


def test_sizes_are_those_of_the_language_model() -> None:
    config = model_of("gpt2").config
    assert (config.family, config.vocab_size, config.hidden_size) == ("gpt2", VOCAB, 32)
    assert (config.num_hidden_layers, config.max_position_embeddings) == (2, 64)
    assert model_of("granite").config.logit_scale == 0.5
    assert model_of("gemma2").config.logit_softcap == 3.0
    assert len(model_of("gpt_neox").blocks()) == 2


def test_sizes_are_read_once_for_each_config_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    model_of("stablelm").theirs.config.save_pretrained(tmp_path)
    first = model_config(tmp_path)
    assert model_config(tmp_path) is first
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 99}))
    assert (first.vocab_size, model_config(tmp_path).vocab_size) == (VOCAB, 99)


def test_a_saved_model_is_loaded(tmp_path: Any) -> None:
    theirs = tiny_transformers("stablelm")
    theirs.save_pretrained(tmp_path)
    own = load_transformers_model(tmp_path, dtype=torch.float64)
    assert next(own.parameters()).dtype == torch.float64
    with torch.no_grad():
        wanted = theirs.double()(input_ids=tokens(1, 5)).logits
        assert_close(own(tokens(1, 5)), wanted)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="Cannot load"):
        load_transformers_model(tmp_path)


def test_other_modules_are_refused() -> None:
    with pytest.raises(ModelError, match=r"a Linear as a language model.*lora's Decoder"):
        as_language_model(nn.Linear(2, 2))
    for_embeddings = tiny_transformers("llama").model
    with pytest.raises(ModelError, match=r"a LlamaModel as .*: it is without an output head"):
        as_language_model(for_embeddings)
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCAB
    )
    with pytest.raises(ModelError, match="tokens see those after them"):
        as_language_model(transformers.BertLMHeadModel(config))


def test_a_model_without_a_cache_recomputes() -> None:
    own = TransformersModel(model_of("stablelm").theirs, Traits(has_cache=False))
    prompts = [[5, 6, 7, 8], [9, 3]]
    sampling = SamplingConfig(temperature=0, max_new_tokens=4)
    assert generate(own, prompts, sampling) == generate(model_of("stablelm"), prompts, sampling)


@torch.no_grad()
def test_documents_of_a_model_that_cannot_tell_them_go_through_one_by_one() -> None:
    theirs, ids = model_of("phi").theirs, tokens(1, 9)
    own = TransformersModel(theirs, Traits(why_not_packed="a reason"))
    logits = own(ids, document_ids=torch.tensor([[-1, -1, 0, 0, 0, 0, 1, 1, -1]]))
    assert_close(logits[:, 6:8], theirs(input_ids=ids[:, 6:8]).logits)
    assert_close(logits[:, 2:6], theirs(input_ids=ids[:, 2:6]).logits)


@torch.no_grad()
def test_wide_hidden_states_beside_narrow_weights() -> None:
    theirs = tiny_transformers("mamba").bfloat16()
    own = as_language_model(theirs)
    assert torch.equal(own(tokens(1, 9)), theirs(input_ids=tokens(1, 9)).logits)


@pytest.mark.parametrize("name", ["opt", "gpt_bigcode", "gpt_neo", "gpt2", "gptj", "codegen"])
def test_positions_beyond_the_table_are_refused(name: str) -> None:
    model, asked = model_of(name), SamplingConfig(max_new_tokens=8, temperature=0)
    with pytest.raises(ModelError, match="position embeddings for 64 only"):
        generate(model, [tokens(60).tolist()], asked)
    with pytest.raises(ModelError, match="Cannot run 65 positions"):
        model.hidden_states(tokens(1, 65))
    packed = torch.arange(2).repeat_interleave(50)[None]  # each has positions of its own
    if name == "gpt_neo":  # its mask has so many rows, whatever the positions are
        with pytest.raises(ModelError, match="Cannot run 100 positions"):
            model.hidden_states(tokens(1, 100), document_ids=packed)
    else:
        assert model.hidden_states(tokens(1, 100), document_ids=packed).shape[1] == 100


def test_positions_that_are_computed_have_no_limit() -> None:
    assert model_of("llama").hidden_states(tokens(1, 80)).shape[1] == 80
