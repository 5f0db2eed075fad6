"""Rows of whole conversations, as OpenAI, ShareGPT and TRL spell them, and rows that are none."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.examples_drawn import MANY
from tests.json_lines import write_lines

from fedflame.data import messages
from fedflame.data.conversations import Conversation, Turn, as_fields, single_turn
from fedflame.data.given import given_rows
from fedflame.data.messages import BrokenRowError, read_conversation
from fedflame.data.rows import load_rows, read_rows
from fedflame.errors import UserError

ASKED, TOLD = Turn("user", "2 and 2"), Turn("assistant", "4")
OPENAI = [{"role": "user", "content": "2 and 2"}, {"role": "assistant", "content": "4"}]
SHAREGPT = [{"from": "human", "value": "2 and 2"}, {"from": "gpt", "value": "4"}]


def read(*rows: dict[str, Any], **given: str) -> list[Conversation]:
    return read_rows(given_rows(list(rows)).sources[0], given).rows


def reason(row: dict[str, Any], **columns: str) -> str:
    found = columns or {"messages": "messages"}
    with pytest.raises(BrokenRowError) as caught:
        read_conversation(row, found, "here")
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": OPENAI}, Conversation((ASKED, TOLD))),
        ({"conversations": SHAREGPT, "id": "7"}, Conversation((ASKED, TOLD))),
        ({"messages": SHAREGPT, "category": "sum"}, Conversation((ASKED, TOLD), "sum")),
        ({"prompt": OPENAI[:1], "completion": OPENAI[1:]}, Conversation((ASKED, TOLD), completion=1)),
        ({"prompt": OPENAI[:1], "completion": "4"}, Conversation((ASKED, TOLD), completion=1)),
        ({"prompt": "2 and 2", "completion": OPENAI[1:]}, Conversation((ASKED, TOLD), completion=1)),
        ({"prompt": "2 and 2", "completion": "4"}, single_turn("2 and 2", "", "4", "all")),
        # Whole conversations come before an instruction beside them.
        ({"prompt": "2 and 2", "completion": "5", "messages": OPENAI}, Conversation((ASKED, TOLD))),
        ({"messages": OPENAI, "system": "Add."}, Conversation((Turn("system", "Add."), ASKED, TOLD))),
        (
            {"system_prompt": "Add.", "question": "2 and 2", "response": "4"},
            Conversation((Turn("system", "Add."), ASKED, TOLD), completion=2),
        ),
        (
            {"messages": [{"role": "system", "content": "Add."}, *OPENAI], "system": "Not this."},
            Conversation((Turn("system", "Add."), ASKED, TOLD)),
        ),
        # What the user says last has no answer and is left out.
        ({"messages": [*OPENAI, OPENAI[0]]}, Conversation((ASKED, TOLD))),
        (
            {"messages": [
                {"role": "user", "content": [{"type": "text", "text": "2 "}, {"text": "and 2"}]}, OPENAI[1]
            ]},
            Conversation((ASKED, TOLD)),
        ),
    ],
)  # fmt: skip
def test_rows_of_every_spelling_are_conversations(row: dict[str, Any], expected: Conversation) -> None:
    assert read(row) == [expected]


@pytest.mark.parametrize("role", ["Human", " user ", "USER"])
def test_roles_are_known_in_any_case(role: str) -> None:
    assert read({"messages": [{"role": role, "content": "2 and 2"}, OPENAI[1]]}) == [
        Conversation((ASKED, TOLD))
    ]


def test_tools_and_calls_are_kept_for_the_template() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    turns = [OPENAI[0], {"role": "assistant", "content": None, "tool_calls": [call]},
             {"role": "tool", "name": "add", "tool_call_id": "1", "content": "4"}, OPENAI[1]]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "add"}}]
    for kind in (tools, json.dumps(tools)):
        (row,) = read({"messages": turns, "tools": kind})
        assert [turn.role for turn in row.turns] == ["user", "assistant", "tool", "assistant"]
        assert row.turns[1].content == "" and json.loads(row.turns[1].more) == {"tool_calls": [call]}
        assert json.loads(row.turns[2].more) == {"tool_call_id": "1", "name": "add"}
        assert json.loads(row.tools) == tools


def test_a_column_of_another_name_is_read_where_the_user_names_it() -> None:
    assert read({"dialogue": OPENAI, "prompt": "no"}, messages="dialogue") == [Conversation((ASKED, TOLD))]


def test_instruction_and_response_named_by_the_user_come_before_messages() -> None:
    row = {"messages": OPENAI, "q": "3 and 3", "a": "6"}
    assert read(row, instruction="q", response="a") == [single_turn("3 and 3", "", "6", "all")]


def test_messages_in_files_of_every_kind_are_the_same_rows(tmp_path: Path) -> None:
    rows = [{"messages": OPENAI}, {"messages": [{"role": "system", "content": "Add."}, *OPENAI]}]
    write_lines(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["messages"], *([json.dumps(row["messages"])] for row in rows)])
    expected = [Conversation((ASKED, TOLD)), Conversation((Turn("system", "Add."), ASKED, TOLD))]
    for name in ("rows.jsonl", "rows.json", "rows.parquet", "rows.csv"):
        loaded = load_rows(dataset_name=str(tmp_path / name))
        assert (loaded.rows, loaded.skipped) == (expected, [])


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (None, "'messages' is missing"),
        ({"role": "user"}, "'messages' is of type dict, not a list of messages"),
        ("not JSON", "'messages' is text and not JSON: Expecting value: line 1 column 1 (char 0)"),
        ("[" * 100_000, "'messages' is text and not JSON: nested too deep"),
        ([], "'messages' has no turn of the assistant"),
        (OPENAI[:1], "'messages' has no turn of the assistant"),
        (["hi"], "'messages', message 1 is of type str, not an object"),
        ([{"content": "hi"}], "'messages', message 1 has neither 'role' nor 'from'"),
        (
            [OPENAI[0], {"role": "narrator\x1b[2J", "content": "hi"}],
            "'messages', message 2: role 'narrator\\x1b[2J' is not known; known are system, developer, user, "
            "human, assistant, gpt, model, tool, function, observation, function_response",
        ),
        ([{"role": 7, "content": "hi"}], "'messages', message 1: role 7 is not known; known are system, "),
        ([{"role": ["user"], "content": "hi"}], "'messages', message 1: role ['user'] is not known; "),
        (
            [OPENAI[0], {"role": "assistant", "content": " "}],
            "'messages', message 2: the assistant says nothing",
        ),
        ([OPENAI[0], {"role": "assistant"}], "'messages', message 2: the assistant says nothing"),
        ([{"role": "user", "content": 7}], "'messages', message 1: its content is of type int, not text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "'messages', message 1: a 'image_url' in its content is not text",
        ),
        ([{"role": "user", "content": [7]}], "'messages', message 1: a 'int' in its content is not text"),
        ([{"role": "user", "content": "\ud800"}], "'messages', message 1 is not valid UTF-8"),
        (OPENAI * 501, "'messages' has 1,002 messages; at most 1,000 are read"),
        (
            [OPENAI[0], {"role": "assistant", "content": "x" * (1 << 20)}],
            "has 1,048,583 characters; at most 1,048,576 are read",
        ),
        (
            [OPENAI[0], {"role": "assistant", "content": "4", "tool_calls": [10**30]}],
            "'messages', message 2: has an integer of more than 64 bits",
        ),
    ],
)
def test_what_is_no_conversation_is_skipped_with_its_reason(turns: Any, expected: str) -> None:
    found = reason({"messages": turns})
    assert found == expected or (expected.endswith((", ", "; ")) and found.startswith(expected))


def nested(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("levels", [100, 100_000])
def test_tools_nested_too_deep_are_refused(levels: int) -> None:
    tools = [{"name": nested(levels)}]
    columns = {"messages": "messages", "tools": "tools"}
    assert reason({"messages": OPENAI, "tools": tools}, **columns) == "'tools': nested in more than 64 levels"


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ("x", "'tools' is text and not JSON: Expecting value: line 1 column 1 (char 0)"),
        ({"a": 1}, "'tools' is not a list of objects"),
        (["add"], "'tools' is not a list of objects"),
        ([{"name": float("nan")}], "'tools': Out of range float values are not JSON compliant: nan"),
        ([{"name": {1, 2}}], "'tools': Object of type set is not JSON serializable"),
    ],
)
def test_tools_that_are_none_are_refused(tools: Any, expected: str) -> None:
    found = reason({"messages": OPENAI, "tools": tools}, messages="messages", tools="tools")
    assert found.removesuffix(": nan") == expected.removesuffix(": nan")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": [], "completion": "4"}, "'prompt' is empty"),
        ({"prompt": "2 and 2", "completion": []}, "'completion' has no turn of the assistant"),
        ({"prompt": OPENAI[:1], "completion": OPENAI[:1]}, "'completion' has no turn of the assistant"),
        ({"prompt": " ", "completion": "4"}, "'prompt' is empty"),
        ({"prompt": {"a": 1}, "completion": "4"}, "'prompt' is of type dict, not text"),
    ],
)
def test_a_prompt_or_completion_that_is_none_is_skipped(row: dict[str, Any], expected: str) -> None:
    assert reason(row, instruction="prompt", response="completion") == expected


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
MESSAGE = VALUES | st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "gpt", "system", "x"]) | VALUES},
    optional={"content": st.text(max_size=5) | VALUES, "tool_calls": VALUES, "name": VALUES},
)


@settings(max_examples=MANY, deadline=None)
@given(st.lists(MESSAGE, max_size=4) | VALUES, VALUES)
def test_any_values_are_a_conversation_or_have_a_reason(turns: Any, tools: Any) -> None:
    columns = {"messages": "messages", "tools": "tools"}
    try:
        row = read_conversation({"messages": turns, "tools": tools}, columns, "here")
    except BrokenRowError as error:
        assert str(error)
        return
    assert row.turns[-1].role == "assistant"
    assert all(turn.content.encode() is not None for turn in row.turns)
    json.loads(row.tools or "[]")


@pytest.mark.parametrize(
    "rows",
    [
        [single_turn("2 and 2", "", "4", "sum"), single_turn("Name it", "A fox.", "fox", "qa")],
        [Conversation((ASKED, TOLD)), Conversation((ASKED, TOLD, ASKED, TOLD), "sum", '[{"name": "add"}]')],
        [Conversation((ASKED, TOLD, ASKED, TOLD), completion=3), single_turn("2 and 2", "", "4", "all")],
        [Conversation((ASKED, Turn("assistant", "", more='{"tool_calls": [1]}'), Turn("tool", "4"), TOLD))],
    ],
)
def test_rows_that_are_written_are_read_as_they_were(tmp_path: Path, rows: list[Conversation]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(fields) + "\n" for fields in as_fields(rows)))
    assert load_rows(dataset_name=str(path)).rows == rows


def test_every_row_knows_its_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"messages": OPENAI}) for _ in range(2)))
    assert [row.where for row in load_rows(dataset_name=str(path)).rows] == [f"{path}:1", f"{path}:2"]


def test_a_file_of_broken_conversations_says_what_the_first_lacks(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": OPENAI[:1]}) + "\n")
    with pytest.raises(UserError) as caught:
        load_rows(dataset_name=str(path))
    assert str(caught.value) == (
        f"{path}: no usable row (1 skipped; the first, {path}:1: 'messages' has no turn of the assistant)"
    )


def test_the_bounds_are_those_that_the_page_says() -> None:
    assert (messages.LONGEST_ROW, messages.MOST_TURNS) == (1_048_576, 1000)
