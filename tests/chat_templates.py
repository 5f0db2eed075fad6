"""Chat templates of many families, after their public form, each with a real byte-level tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SYSTEM_FIRST = "{% if messages[0]['role'] == 'system' %}"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN3 = (
    "{%- set ns = namespace(last=-1) %}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}{%- if message.role == 'assistant' %}"
    "{%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}"
    "{%- if loop.index0 > ns.last %}{%- set thought = message.reasoning_content or '' %}"
    "{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}{{- content }}"
    "{%- else %}{{- message.content }}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<|User|>' + message['content'] }}"
    "{% else %}{{ '<|Assistant|>' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"
)
PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GRANITE = (
    "{% for message in messages %}{{ '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + "
    "message['content'] + '<|end_of_text|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
TULU = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\\n' + message['content'] + eos_token }}{% if not loop.last %}{{ '\\n' }}{% endif %}"
    "{% else %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
HARMONY = (
    "{{ '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}"
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + message.content }}"
    "{% if loop.last %}{{ '<|return|>' }}{% else %}{{ '<|end|>' }}{% endif %}"
    "{% else %}{{ '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
GLM = (
    "{{ '[gMASK]<sop>' }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A template, the special tokens of its tokenizer, and the stretches that have loss, by hand."""

    jinja: str
    eos: str
    special: tuple[str, ...]
    first: str
    """What the assistant writes in the first of two exchanges, where it answers `4`; empty for no loss."""
    last: str
    """What it writes in the last, where it answers `6`."""
    bos: str | None = None
    takes_system: bool = True


FAMILIES = {
    "chatml": Family(CHATML, "<|im_end|>", ("<|im_start|>",), "4<|im_end|>", "6<|im_end|>"),
    "marked": Family(MARKED_CHATML, "<|im_end|>", ("<|im_start|>",), "4<|im_end|>", "6<|im_end|>"),
    # In front of later turns it writes no thoughts, which the model would have to write: no loss there.
    "qwen3": Family(
        QWEN3, "<|im_end|>", ("<|im_start|>",), "", "<think>\n\n</think>\n\n6<|im_end|>"
    ),
    "llama3": Family(
        LLAMA3, "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>"), "4<|eot_id|>", "6<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    "mistral": Family(MISTRAL, "</s>", (), " 4</s>", " 6</s>", bos="<s>", takes_system=False),
    "gemma": Family(
        GEMMA, "<eos>", ("<start_of_turn>", "<end_of_turn>"), "4<end_of_turn>", "6<end_of_turn>",
        bos="<bos>", takes_system=False,
    ),
    "deepseek": Family(
        DEEPSEEK, "<|end_of_sentence|>", ("<|User|>", "<|Assistant|>"), "4<|end_of_sentence|>",
        "6<|end_of_sentence|>", bos="<|begin_of_sentence|>",
    ),
    "phi": Family(
        PHI, "<|endoftext|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "4<|end|>", "6<|end|>"
    ),
    "granite": Family(
        GRANITE, "<|end_of_text|>", ("<|start_of_role|>", "<|end_of_role|>"), "4<|end_of_text|>",
        "6<|end_of_text|>",
    ),
    "tulu": Family(TULU, "</s>", (), "4</s>", "6</s>", bos="<s>"),
    # An earlier turn ends with another token than the one that the model would have to end it with.
    "harmony": Family(
        HARMONY, "<|return|>", ("<|start|>", "<|message|>", "<|channel|>", "<|end|>"),
        "<|channel|>final<|message|>4", "<|channel|>final<|message|>6<|return|>",
    ),
    # It writes no end of turn, so the row gets the tokenizer's.
    "glm": Family(
        GLM, "<|endoftext|>", ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"), "4",
        "6<|endoftext|>",
    ),
}  # fmt: skip


def byte_tokenizer(
    eos: str, special: tuple[str, ...] = (), bos: str | None = None, adds_bos: bool = False, jinja: str = ""
) -> PreTrainedTokenizerFast:
    """One token per byte and special token, and three pieces, so that a token may have several letters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("Ġt", "h"), ("a", "n")]
    names = ["<pad>", *letters, *(one + other for one, other in merges)]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(dict.fromkeys(["<pad>", eos, *special, *([bos] if bos else [])])))
    if adds_bos and bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token="<pad>")
    if bos:
        made.bos_token = bos
    if jinja:
        made.chat_template = jinja
    return made


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a family, which adds BOS to plain text where there is one."""
    family = FAMILIES[name]
    return byte_tokenizer(family.eos, family.special, family.bos, True, family.jinja)
