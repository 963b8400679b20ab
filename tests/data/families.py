"""Tiny tokenizers with the chat templates of well-known families, built without any file or network.

The templates are our own lines that write what the families' templates write.
"""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = ["user assistant system model hello world how are you fine thanks the answer is 4 what think tool question"] * 4

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CHATML_TOOLS = """{% if tools %}<|im_start|>system
{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA3 = """{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
GEMMA = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{%- set role = 'model' if m.role == 'assistant' else m.role %}<start_of_turn>{{ role }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
MISTRAL = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}{{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"""
PHI = """{% for m in messages %}<|{{ m.role }}|>
{{ m.content }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% else %}{{ eos_token }}{% endif %}"""
QWEN3 = """{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}
{%- if loop.index0 > ns.last and parts | length > 1 %}{{ parts[0] }}</think>{% endif %}{{ parts[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
THINKING = CHATML.removesuffix("\n{% endif %}") + "\n<think>\n{% endif %}"
HARMONY = """{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"""
PLAIN = """{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
AMNESIC = """{{ messages | length }} turns {% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>{% endfor %}"""


@cache
def byte_level(
    template: str | None,
    control: tuple[str, ...],
    bos: str | None = None,
    eos: str | None = None,
    pad: str | None = None,
) -> PreTrainedTokenizerFast:
    """GPT-2's kind. Llama 3's too: it adds BOS to plain text, if there is one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(control), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return _wrapped(tokenizer, template, bos, eos, pad)


@cache
def sentence_piece(
    template: str | None, control: tuple[str, ...], prefix: bool, eos: str, pad: str | None = None
) -> PreTrainedTokenizerFast:
    """Llama 2's kind (with a space put before the text) and Gemma's (without); both add BOS to plain text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    tokenizer.decoder = decoders.Replace("▁", " ")
    letters = list("▁\nabcdefghijklmnopqrstuvwxyz0123456789.?:<>/|_[]")
    trainer = trainers.BpeTrainer(
        vocab_size=150, special_tokens=["<unk>", *control], initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return _wrapped(tokenizer, template, control[0], eos, pad)


def _wrapped(
    tokenizer: Tokenizer, template: str | None, bos: str | None, eos: str | None, pad: str | None
) -> PreTrainedTokenizerFast:
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, bos_token=bos, eos_token=eos, pad_token=pad
    )


def family(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of one family."""
    ends = ("<|im_start|>", "<|im_end|>")
    match name:
        case "chatml":  # eos is pad
            return byte_level(CHATML, ends, eos="<|im_end|>", pad="<|im_end|>")
        case "chatml_tools":
            return byte_level(CHATML_TOOLS, ends, eos="<|im_end|>", pad="<|im_end|>")
        case "llama3":
            control = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
            return byte_level(LLAMA3, control, "<|begin_of_text|>", "<|eot_id|>")
        case "gemma":
            control = ("<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>")
            return sentence_piece(GEMMA, control, prefix=False, eos="<eos>", pad="<pad>")
        case "mistral":
            return sentence_piece(MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), prefix=True, eos="</s>")
        case "phi":
            control = ("<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
            return sentence_piece(PHI, control, prefix=False, eos="<|endoftext|>", pad="<|endoftext|>")
        case "qwen3":
            return byte_level(QWEN3, ends, eos="<|im_end|>")
        case "thinking":
            return byte_level(THINKING, ends, eos="<|im_end|>")
        case "harmony":
            return byte_level(HARMONY, ("<|start|>", "<|message|>", "<|end|>", "<|return|>"), eos="<|return|>")
        case "plain":
            return byte_level(PLAIN, (), None, None)
        case "amnesic":
            return byte_level(AMNESIC, ends, eos="<|im_end|>")
        case "base":  # no template; one token begins, ends and pads
            return byte_level(None, ("<|endoftext|>",), "<|endoftext|>", "<|endoftext|>", "<|endoftext|>")
    raise KeyError(name)


def marked(tokenizer: PreTrainedTokenizerFast, samples: list) -> list[str]:
    """Samples as their tokens' text, what is learnt in double angle quotes."""
    shown = []
    for ids, supervised in samples:
        text, inside = "", False
        for token, learnt in zip(tokenizer.convert_ids_to_tokens(ids.tolist()), supervised.tolist(), strict=True):
            text += ("«" if learnt else "»") * (learnt != inside) + token
            inside = learnt
        shown.append((text + "»" * inside).replace("Ġ", " ").replace("Ċ", "\n").replace("▁", " "))
    return shown
