"""What of a rendered conversation has loss: what the assistant writes and its end of turn, nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
from tests.chat_templates import CHATML, FAMILIES, GEMMA, MISTRAL, PHI, byte_tokenizer, tokenizer_of
from transformers import PreTrainedTokenizerFast

from fedflame.config.sections import DataConfig
from fedflame.data import templates
from fedflame.data.batches import IGNORE_INDEX, collate
from fedflame.data.conversations import Conversation, Turn, single_turn
from fedflame.data.encoder import new_encoder, prompt_form
from fedflame.data.encoding import EncodedRow, encode, encode_prompts, encode_rows
from fedflame.errors import UserError

SYSTEM = Turn("system", "Add the numbers.")
TURNS = (Turn("user", "2 and 2"), Turn("assistant", "4"), Turn("user", "3 and 3"), Turn("assistant", "6"))


def two_exchanges(name: str) -> Conversation:
    return Conversation((SYSTEM, *TURNS) if FAMILIES[name].takes_system else TURNS)


def with_loss(row: EncodedRow, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The stretches of tokens that have labels, as text."""
    labels = collate([row], 0).labels[0].tolist()
    stretches = groupby(zip(row.ids, labels, strict=True), key=lambda pair: pair[1] != IGNORE_INDEX)
    return [str(tokenizer.decode([id for id, _ in pairs])) for labelled, pairs in stretches if labelled]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_token_of_the_assistant_has_loss_and_no_other(name: str) -> None:
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    row = encode(two_exchanges(name), new_encoder(tokenizer, 1000))
    assert with_loss(row, tokenizer) == [text for text in (family.first, family.last) if text]
    assert row.labelled == sum(
        len(tokenizer.encode(text, add_special_tokens=False)) for text in (family.first, family.last)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_text_is_what_transformers_renders_with_bos_once(name: str) -> None:
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    row, conversation = encode(two_exchanges(name), new_encoder(tokenizer, 1000)), two_exchanges(name)
    messages = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    if name == "harmony":  # it names the date, which is the same on every day here
        assert "Current date: 2024-07-26" in tokenizer.decode(row.ids)
    else:
        assert row.ids == ids + [tokenizer.eos_token_id] * (name == "glm")
    if family.bos:
        assert row.ids[0] == tokenizer.bos_token_id and row.ids.count(tokenizer.bos_token_id) == 1
    else:
        assert tokenizer.bos_token_id is None


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_is_generated_from_what_stands_before_it_in_the_row(name: str) -> None:
    tokenizer = tokenizer_of(name)
    encoder = new_encoder(tokenizer, 1000, DataConfig(completion_only_loss="true"))
    row = encode(two_exchanges(name), encoder)
    (prompt,) = encode_prompts([two_exchanges(name)], encoder, None)
    assert prompt.ids == row.ids[: row.prompt_length] and not prompt.truncated
    assert with_loss(row, tokenizer) == [FAMILIES[name].last]


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_ends_with_the_tokens_that_end_a_trained_answer(name: str) -> None:
    tokenizer = tokenizer_of(name)
    encoder = new_encoder(tokenizer, 1000)
    row = encode(two_exchanges(name), encoder)
    last = max(index for index, label in enumerate(collate([row], 0).labels[0].tolist()) if label >= 0)
    assert {row.ids[last], tokenizer.eos_token_id} == set(encoder.end_tokens)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_train_on_eos_the_end_of_a_turn_has_no_loss(name: str) -> None:
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    row = encode(two_exchanges(name), new_encoder(tokenizer, 1000, DataConfig(train_on_eos=False)))
    ends = [family.eos, "<end_of_turn>", "<|end|>"]
    said = [text for text in (family.first, family.last) if text]
    for end in ends:
        said = [text.removesuffix(end) for text in said]
    assert with_loss(row, tokenizer) == said


@pytest.mark.parametrize(
    ("data", "turns"),
    [
        (DataConfig(), ["4<|im_end|>", "6<|im_end|>"]),
        (DataConfig(completion_only_loss="true"), ["6<|im_end|>"]),
    ],
)
def test_of_whole_conversations_every_turn_has_loss_or_the_last(data: DataConfig, turns: list[str]) -> None:
    tokenizer = tokenizer_of("chatml")
    assert with_loss(encode(Conversation(TURNS), new_encoder(tokenizer, 1000, data)), tokenizer) == turns


@pytest.mark.parametrize("name", ["chatml", "marked", "phi", "harmony"])
def test_of_a_row_with_a_completion_only_that_has_loss_unless_said_otherwise(name: str) -> None:
    tokenizer, family = tokenizer_of(name), FAMILIES[name]
    row = Conversation(TURNS, completion=3)
    assert with_loss(encode(row, new_encoder(tokenizer, 1000)), tokenizer) == [family.last]
    both = new_encoder(tokenizer, 1000, DataConfig(completion_only_loss="false"))
    assert with_loss(encode(row, both), tokenizer) == [family.first, family.last]


def test_without_assistant_only_loss_all_tokens_have_loss() -> None:
    tokenizer = tokenizer_of("chatml")
    every = new_encoder(tokenizer, 1000, DataConfig(assistant_only_loss=False))
    row = encode(Conversation(TURNS), every)
    assert row.labelled == len(row.ids)
    completion = encode(Conversation(TURNS, completion=3), every)
    assert with_loss(completion, tokenizer) == ["6<|im_end|>\n"]


def test_tools_and_tool_calls_reach_the_template() -> None:
    jinja = (
        "{% if tools %}{{ '<|tools|>' + (tools | map(attribute='name') | join(',')) }}{% endif %}"
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.tool_calls %}"
        "{{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}{% endif %}{{ '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    tokenizer = byte_tokenizer("<|end|>", ("<|tools|>", "<|user|>", "<|assistant|>", "<|tool|>"), jinja=jinja)
    call = json.dumps({"tool_calls": [{"function": {"name": "add"}}]})
    turns = (
        Turn("user", "2 and 2"), Turn("assistant", "", more=call), Turn("tool", "4"),
        Turn("assistant", "It is 4"),
    )  # fmt: skip
    row = encode(Conversation(turns, tools='[{"name": "add"}]'), new_encoder(tokenizer, 1000))
    assert tokenizer.decode(row.ids) == (
        "<|tools|>add<|user|>2 and 2<|end|><|assistant|>add<|end|><|tool|>4<|end|><|assistant|>It is 4<|end|>"
    )
    assert with_loss(row, tokenizer) == ["add<|end|>", "It is 4<|end|>"]
    plain = new_encoder(tokenizer, 1000, DataConfig(chat_template_path="plain"))
    assert "the plain form cannot show" in encode_rows([Conversation(turns)], plain)[0]


def test_a_tool_call_after_a_content_has_loss_to_its_end() -> None:
    jinja = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
        "{% for call in m.tool_calls or [] %}{{ '\\n<tool_call>' + call.name + '</tool_call>' }}{% endfor %}"
        "{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    tokenizer = byte_tokenizer("<|im_end|>", ("<|im_start|>", "<tool_call>", "</tool_call>"), jinja=jinja)
    call = '{"tool_calls": [{"name": "add"}]}'
    turns = (TURNS[0], Turn("assistant", "Let me see.", more=call), Turn("tool", "4"), TURNS[1])
    row = encode(Conversation(turns), new_encoder(tokenizer, 1000))
    assert with_loss(row, tokenizer) == [
        "Let me see.\n<tool_call>add</tool_call><|im_end|>", "4<|im_end|>"
    ]  # fmt: skip


def test_a_tool_call_in_an_earlier_turn_ends_with_its_end_of_turn() -> None:
    """Of a template that writes something else after the last turn."""
    said = "(message['content'] or 'call ' ~ message['tool_calls'][0]['name'])"
    family = FAMILIES["phi"]
    tokenizer = byte_tokenizer(
        family.eos, (*family.special, "<|tool|>"), jinja=PHI.replace("message['content']", said)
    )
    call = '{"tool_calls": [{"name": "add"}]}'
    turns = (TURNS[0], Turn("assistant", "", more=call), Turn("tool", "4"), TURNS[1])
    row = encode(Conversation(turns), new_encoder(tokenizer, 1000))
    assert with_loss(row, tokenizer) == ["call add<|end|>", "4<|end|>"]


def test_an_earlier_turn_that_only_begins_as_it_would_be_generated_has_no_loss() -> None:
    tokenizer = tokenizer_of("qwen3")
    turns = (TURNS[0], Turn("assistant", "<b>4</b>"), *TURNS[2:])
    row = encode(Conversation(turns), new_encoder(tokenizer, 1000))
    assert with_loss(row, tokenizer) == [FAMILIES["qwen3"].last]


def test_a_row_whose_last_turn_has_no_loss_gets_no_end_token() -> None:
    jinja = (
        "{% for m in messages %}{% if loop.index0 == 1 %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{{ '|' }}{% endfor %}"
    )
    tokenizer = byte_tokenizer("</s>", jinja=jinja)
    row = encode(Conversation(TURNS), new_encoder(tokenizer, 1000))
    assert tokenizer.decode(row.ids) == "2 and 2|4|3 and 3|6|" and with_loss(row, tokenizer) == ["4"]


def test_a_template_that_writes_nothing_before_an_answer_is_refused_where_answers_are_generated() -> None:
    jinja = "{% for m in messages if m.role == 'assistant' %}{{ m.content + '</s>' }}{% endfor %}"
    encoder = new_encoder(byte_tokenizer("</s>", jinja=jinja), 100)
    row = single_turn("Hi", "", "Yes", "all")
    assert encode(row, encoder).labelled == 4
    with pytest.raises(UserError, match="the chat template writes nothing in front of it"):
        encode_prompts([row], encoder, None)


def test_a_context_follows_the_instruction_after_an_empty_line() -> None:
    tokenizer = tokenizer_of("chatml")
    row = encode(single_turn("Who won?", "Ann won.", "Ann", "all"), new_encoder(tokenizer, 1000))
    assert "user\nWho won?\n\nAnn won.<|im_end|>" in tokenizer.decode(row.ids)


# What a template does not take, and what it may not do


@pytest.mark.parametrize(
    ("jinja", "row", "reason"),
    [
        (GEMMA, Conversation((SYSTEM, *TURNS)), "the chat template refuses it: System role not supported"),
        (
            MISTRAL,
            Conversation((TURNS[0], TURNS[0], TURNS[1])),
            "the chat template refuses it: Conversation roles must alternate "
            "user/assistant/user/assistant/...",
        ),
        ("{{ messages[7].content }}", Conversation(TURNS), "the chat template refuses it: "),
        ("{{ 1 // 0 }}", Conversation(TURNS), "the chat template refuses it: "),
        (
            "{{ ''.__class__.__mro__ }}",
            Conversation(TURNS),
            "the chat template refuses it: access to attribute",
        ),
        ("{{ messages.append(1) }}", Conversation(TURNS), "the chat template refuses it: "),
        ("{{ raise_exception('a\\nb\\x1b[2J') }}", Conversation(TURNS), "the chat template refuses it: a"),
        ("nothing of it", Conversation(TURNS), "the chat template writes no turn of the assistant"),
    ],
)
def test_what_a_template_refuses_costs_the_row_and_is_its_reason(
    jinja: str, row: Conversation, reason: str
) -> None:
    tokenizer = byte_tokenizer("</s>", bos="<s>", jinja=jinja)
    (encoded,) = encode_rows([row], new_encoder(tokenizer, 1000))
    assert isinstance(encoded, str) and encoded.startswith(reason)
    assert encoded.isprintable()


def test_a_template_that_writes_too_much_costs_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "LONGEST_TEXT", 100)
    tokenizer = byte_tokenizer("</s>", jinja="{% for i in range(200) %}x{% endfor %}")
    (encoded,) = encode_rows([Conversation(TURNS)], new_encoder(tokenizer, 1000))
    assert encoded == "the chat template writes 200 characters of it; at most 4,194,304 are taken"


def test_a_template_file_or_folder_takes_the_place_of_the_models(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("llama3")
    (tmp_path / "mine.jinja").write_text(CHATML)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    expected = encode(Conversation(TURNS), new_encoder(byte_like(tokenizer, CHATML), 1000))
    for place in (tmp_path / "mine.jinja", tmp_path / "tokenizer"):
        given = new_encoder(tokenizer, 1000, DataConfig(chat_template_path=str(place)))
        assert encode(Conversation(TURNS), given) == expected
        assert prompt_form(given).template == "given" and prompt_form(given).jinja == CHATML
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(GEMMA)
    folder = new_encoder(tokenizer, 1000, DataConfig(chat_template_path=str(tmp_path / "tokenizer")))
    assert folder.template.jinja == GEMMA


def byte_like(tokenizer: PreTrainedTokenizerFast, jinja: str) -> PreTrainedTokenizerFast:
    family = FAMILIES["llama3"]
    made = byte_tokenizer(family.eos, family.special, family.bos, True, jinja)
    assert made.get_vocab() == tokenizer.get_vocab()
    return made


@pytest.mark.parametrize(
    ("content", "end"),
    [
        (
            None,
            ": no such file; it must be a jinja file, a tokenizer's folder with chat_template.jinja, 'plain'",
        ),
        ("{% for %}", ": no jinja template: line 1: "),
        ("  ", ": has no chat template"),
        ("{{ '" + "x" * (1 << 20) + "' }}", ": larger than 1,048,576 bytes"),
    ],
)
def test_a_template_that_is_none_is_refused_in_a_line(tmp_path: Path, content: str | None, end: str) -> None:
    path = tmp_path / "mine.jinja"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        new_encoder(tokenizer_of("chatml"), 1000, DataConfig(chat_template_path=str(path)))
    assert str(caught.value).startswith(f"data.chat_template_path = {str(path)!r}{end}")
    assert "\n" not in str(caught.value)


def test_a_models_template_that_is_no_jinja_is_refused_in_a_line() -> None:
    tokenizer = byte_tokenizer("</s>", jinja="{% if %}")
    with pytest.raises(UserError, match="the model's chat template: no jinja template: line 1"):
        new_encoder(tokenizer, 1000)


def test_a_models_template_that_is_too_long_is_refused_in_a_line() -> None:
    tokenizer = byte_tokenizer("</s>", jinja="{{ messages }}" + " " * (1 << 20))
    with pytest.raises(UserError, match=r"the model's chat template: has 1,048,590 characters; at most "):
        new_encoder(tokenizer, 1000)


def test_plain_takes_the_plain_form_also_where_the_model_has_a_template() -> None:
    tokenizer = tokenizer_of("gemma")
    encoder = new_encoder(tokenizer, 1000, DataConfig(chat_template_path="plain"))
    row = encode(single_turn("Greet", "", "Hi", "all"), encoder)
    assert tokenizer.decode(row.ids) == "<bos>Instruction: Greet\nResponse: Hi<eos>"
    form = prompt_form(encoder)
    assert (form.template, form.prompt, form.beginning) == (
        "plain",
        "Instruction: {instruction}\nResponse:",
        "<bos>",
    )


def test_thoughts_of_the_last_turn_have_loss() -> None:
    tokenizer = tokenizer_of("qwen3")
    thinking = replace(TURNS[-1], more='{"reasoning_content": "3 twice"}')
    row = encode(Conversation((*TURNS[:-1], thinking)), new_encoder(tokenizer, 1000))
    assert with_loss(row, tokenizer) == ["<think>\n3 twice\n</think>\n\n6<|im_end|>"]
