"""Rows: each accepted form gives the same rows, and a bad row is named by its file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from taid.data.loading import load_rows

PROMPT = {"prompt": "What is 2 + 2?", "completion": " 4"}
USER, ASSISTANT = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": "{}"}}]}


@pytest.fixture
def write(tmp_path):
    """write(name, content): text, bytes, or rows as JSON Lines; returns the path."""

    def write(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def loaded(path: Path | str, **options: Any) -> list[dict[str, Any]]:
    return load_rows(str(path), **options).to_list()


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


# --- accepted forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prompt", "messages", "text"])
def test_jsonl_json_array_json_lines_and_parquet_give_the_same_rows(write, tmp_path, make_rows, kind):
    rows = make_rows(kind, 6)
    forms = [
        write("a.jsonl", rows),
        write("array.json", json.dumps(rows)),
        write("indented.json", json.dumps(rows, indent=2)),
        write("lines.json", rows),
        write("blank_lines.jsonl", "\n".join(json.dumps(row) + "\n" for row in rows) + "\n\n"),
        write("no_last_newline.jsonl", "\n".join(map(json.dumps, rows))),
        write("windows.jsonl", "".join(json.dumps(row) + "\r\n" for row in rows)),
        as_parquet(tmp_path / "a.parquet", rows),
    ]
    for form in forms:
        assert loaded(form) == rows, form.name


def test_text_beyond_ascii_arrives_unharmed(write):
    rows = [{"text": "naïve 東京 😀 \u2028 end"}]
    assert loaded(write("escaped.jsonl", rows)) == rows
    assert loaded(write("raw.jsonl", json.dumps(rows[0], ensure_ascii=False) + "\n")) == rows


def test_a_glob_reads_its_files_in_the_order_of_their_names(write, tmp_path):
    for name in ("b", "a", "c"):
        write(f"part-{name}.jsonl", [{"text": name}])
    write("other.jsonl", [{"text": "other"}])
    assert loaded(tmp_path / "part-*.jsonl") == [{"text": "a"}, {"text": "b"}, {"text": "c"}]


def test_a_glob_reaches_into_folders(write, tmp_path):
    write("x/1.jsonl", [{"text": "one"}])
    write("x/y/2.jsonl", [{"text": "two"}])
    assert loaded(tmp_path / "**" / "*.jsonl") == [{"text": "one"}, {"text": "two"}]


def test_an_empty_file_beside_a_full_one_is_no_mistake(write, tmp_path):
    write("a.jsonl", "")
    write("b.jsonl", [PROMPT])
    assert loaded(tmp_path / "*.jsonl") == [PROMPT]


def test_a_folder_has_splits_by_the_names_of_its_files(write, tmp_path):
    write("d/train.jsonl", [{"text": "train"}])
    write("d/test.jsonl", [{"text": "test"}])
    assert loaded(tmp_path / "d") == [{"text": "train"}]
    assert loaded(tmp_path / "d", split="test") == [{"text": "test"}]


def test_a_home_path_is_expanded(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("rows.jsonl", [PROMPT])
    write("folder/train.jsonl", [PROMPT])
    assert loaded("~/rows.jsonl") == loaded("~/row*.jsonl") == loaded("~/folder") == [PROMPT]


PARAGRAPHS = "one\ntwo\n\nthree\n\n \n\n\n\nfour\n"


def test_a_txt_file_is_a_row_a_paragraph(write):
    rows = loaded(write("a.txt", PARAGRAPHS), text_field="body")
    assert [row["body"].strip("\n") for row in rows] == ["one\ntwo", "three", "four"]


def test_a_txt_file_is_read_without_further_options(write):
    assert [row["text"].strip("\n") for row in loaded(write("a.txt", PARAGRAPHS))] == ["one\ntwo", "three", "four"]


def test_txt_files_in_a_folder_are_read_by_paragraph_too(write, tmp_path):
    write("d/a.txt", PARAGRAPHS)
    assert [row["text"].strip("\n") for row in loaded(tmp_path / "d")] == ["one\ntwo", "three", "four"]


def test_a_file_with_brackets_in_its_name_is_a_file(write):
    assert loaded(write("rows [1].jsonl", [PROMPT])) == [PROMPT]


def test_a_glob_may_match_files_with_brackets_in_their_names(write, tmp_path):
    write("rows [1].jsonl", [PROMPT])
    assert loaded(tmp_path / "rows*.jsonl") == [PROMPT]


def test_a_change_of_the_file_is_seen_by_the_next_load(write):
    assert loaded(write("a.jsonl", [{"text": "old"}])) == [{"text": "old"}]
    assert loaded(write("a.jsonl", [{"text": "new"}, {"text": "er"}])) == [{"text": "new"}, {"text": "er"}]


# --- columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra", [{"id": 1}, {"id": None, "source": {"a": [1]}}, {"text": "not read where there is a prompt"}]
)
def test_extra_columns_are_dropped(write, extra):
    assert loaded(write("a.jsonl", [PROMPT | extra, PROMPT])) == [PROMPT, PROMPT]


@pytest.mark.parametrize("values", [(1, "one"), (1, {"a": 1}), ({}, [1]), (None, 2)])
def test_extra_columns_may_change_their_type_from_row_to_row(write, values):
    assert loaded(write("a.jsonl", [PROMPT | {"id": value} for value in values])) == [PROMPT, PROMPT]


def test_extra_columns_of_parquet_are_dropped_too(tmp_path):
    assert loaded(as_parquet(tmp_path / "a.parquet", [PROMPT | {"id": 1}])) == [PROMPT]


def test_messages_are_read_before_prompt_and_text(write):
    row = {"messages": [USER, ASSISTANT]}
    assert loaded(write("a.jsonl", [row | PROMPT | {"text": "x"}])) == [row]


def test_what_belongs_to_a_row_stays_with_it(write):
    row = {"messages": [USER, ASSISTANT], "chat_template_kwargs": {"thinking": False}}
    assert loaded(write("a.jsonl", [row | {"id": 1}])) == [row]
    row = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
    assert loaded(write("b.jsonl", [row | {"id": 1}])) == [row]


def test_text_may_stand_in_a_column_of_another_name(write):
    assert loaded(write("a.jsonl", [{"content": "x", "text": 3}]), text_field="content") == [{"content": "x"}]


def test_prompt_and_completion_may_be_messages(write):
    row = {"prompt": [USER], "completion": [ASSISTANT]}
    assert loaded(write("a.jsonl", [row, row])) == [row, row]


def test_an_empty_prompt_is_no_mistake(write):
    assert loaded(write("a.jsonl", [PROMPT | {"prompt": ""}])) == [PROMPT | {"prompt": ""}]


@pytest.mark.parametrize(
    "messages",
    [
        [USER, ASSISTANT],
        [{"role": "system", "content": ""}, USER, ASSISTANT],
        [USER, {"role": "assistant", "content": ""}, USER, ASSISTANT],  # only the last turn must say something
        [USER, CALL | {"content": None}],
        [USER, CALL | {"content": ""}],
        [USER, ASSISTANT, USER],
    ],
)
def test_messages_with_something_to_learn_are_taken(write, messages):
    (row,) = loaded(write("a.jsonl", [{"messages": messages}]))
    assert [{k: v for k, v in m.items() if v is not None} for m in row["messages"]] == [
        {k: v for k, v in m.items() if v is not None} for m in messages
    ]


def test_content_may_be_a_list_of_parts(write):
    messages = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in (USER, ASSISTANT)]
    assert loaded(write("a.jsonl", [{"messages": messages}])) == [{"messages": messages}]


def test_parts_without_text_are_an_empty_answer(write):
    content = [{"type": "text", "text": " "}]
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: messages: the assistant's last message is empty"):
        load_rows(str(write("a.jsonl", [{"messages": [USER, {"role": "assistant", "content": content}]}])))


# --- bad rows, by file and line ---------------------------------------------------------------------------------------

BAD_ROWS = {
    "not JSON": ("{oops", "not JSON: Expecting property name"),
    "a cut row": ('{"prompt": "a", "comple', "not JSON: Invalid control character"),
    "a list": ("[1, 2]", "a row must be a JSON object, not list"),
    "a number": ("3", "a row must be a JSON object, not int"),
    "null": ("null", "a row must be a JSON object, not NoneType"),
    "nothing": ({}, "needs `messages`, `prompt` and `completion`, or `text`.*; it has nothing"),
    "other columns": ({"question": "a", "answer": "b"}, r"needs .*`prompt` and .*; it has `question`, `answer`"),
    "prompt alone": ({"prompt": "a"}, "needs .*`prompt` and `completion`.*; it has `prompt`"),
    "empty completion": (PROMPT | {"completion": ""}, "completion is empty, so there is nothing to learn"),
    "blank completion": (PROMPT | {"completion": " \n\t"}, "completion is empty, so there is nothing to learn"),
    "null completion": (PROMPT | {"completion": None}, "completion must be text, not NoneType"),
    "number completion": (PROMPT | {"completion": 4}, "completion must be text, not int"),
    "null prompt": (PROMPT | {"prompt": None}, "prompt must be text, not NoneType"),
    "mapping prompt": (PROMPT | {"prompt": {"a": 1}}, "prompt must be text, not dict"),
    "empty text": ({"text": ""}, "text is empty, so there is nothing to learn"),
    "blank text": ({"text": "\n\n"}, "text is empty, so there is nothing to learn"),
    "number text": ({"text": 1.5}, "text must be text, not float"),
    "list text": ({"text": ["a"]}, "text must be text, not list"),
    "no messages": ({"messages": []}, "messages must be a non-empty list of messages"),
    "text for messages": ({"messages": "hi"}, "messages must be a non-empty list of messages"),
    "null for messages": ({"messages": None}, "messages must be a non-empty list of messages"),
    "message without role": ({"messages": [{"content": "x"}]}, "needs a `role` and a `content`, got {'content': 'x'}"),
    "message is text": ({"messages": ["hi"]}, "needs a `role` and a `content`, got 'hi'"),
    "ShareGPT's names": ({"messages": [{"from": "human", "value": "x"}]}, "needs a `role` and a `content`"),
    "message without content": ({"messages": [{"role": "user"}]}, "the content of a user message must be text"),
    "number content": ({"messages": [{"role": "user", "content": 3}]}, "the content of a user message must be text"),
    "empty answer": ({"messages": [USER, ASSISTANT | {"content": ""}]}, "the assistant's last message is empty"),
    "blank answer": ({"messages": [USER, ASSISTANT | {"content": " \n"}]}, "the assistant's last message is empty"),
    "answer without parts": (
        {"messages": [USER, ASSISTANT | {"content": []}]},
        "the assistant's last message is empty",
    ),
    "null answer": ({"messages": [USER, ASSISTANT | {"content": None}]}, "content of a assistant message must be text"),
    "empty completion message": (
        {"prompt": [USER], "completion": [ASSISTANT | {"content": ""}]},
        "completion: the assistant's last message is empty",
    ),
    "no prompt message": ({"prompt": [], "completion": [ASSISTANT]}, "prompt must be a non-empty list of messages"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named_by_its_file_and_line(write, bad, message):
    good = PROMPT if not isinstance(bad, dict) or "text" not in bad else {"text": "x"}
    path = write("rows.jsonl", f"{json.dumps(good)}\n\n{bad if isinstance(bad, str) else json.dumps(bad)}\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 3: (messages: |prompt: )?.*{message}"):
        load_rows(str(path))


@pytest.mark.parametrize(
    "name", ["empty completion", "empty text", "number completion", "empty answer", "other columns"]
)
def test_a_bad_row_of_a_json_array_or_parquet_is_named_by_its_number(write, tmp_path, name):
    bad, message = BAD_ROWS[name]
    array = write("rows.json", json.dumps([bad]))
    parquet = as_parquet(tmp_path / "rows.parquet", [bad])
    for path in (array, parquet):
        with pytest.raises(ValueError, match=rf"{path.name}(, row 0)?: .*{message}"):
            load_rows(str(path))


def test_a_bad_row_far_down_a_parquet_file_is_named_by_its_number(tmp_path):
    rows = [PROMPT] * 1500 + [PROMPT | {"completion": " "}] + [PROMPT] * 10
    with pytest.raises(ValueError, match=r"a\.parquet, row 1500: completion is empty"):
        load_rows(str(as_parquet(tmp_path / "a.parquet", rows)))


def test_a_bad_row_in_the_second_file_of_a_glob_is_named_by_that_file(write, tmp_path):
    write("a.jsonl", [PROMPT, PROMPT])
    write("b.jsonl", [PROMPT, PROMPT | {"completion": ""}])
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2: completion is empty"):
        load_rows(str(tmp_path / "*.jsonl"))


def test_a_bad_row_in_a_folder_is_named(write, tmp_path):
    write("d/train.jsonl", [PROMPT, PROMPT | {"completion": ""}])
    with pytest.raises(ValueError, match=r"/d, row 1: completion is empty"):
        load_rows(str(tmp_path / "d"))


def test_a_missing_text_column_names_the_option_that_changes_it(write):
    with pytest.raises(ValueError, match=r"`content` \(dataset_text_field\); it has `text`"):
        load_rows(str(write("a.jsonl", [{"text": "x"}])), text_field="content")


@pytest.mark.parametrize("ids", ["abc", [], [1, "a"], [1.5], None])
def test_input_ids_that_are_no_list_of_ids_are_refused(write, ids):
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: input_ids"):
        load_rows(str(write("a.jsonl", [{"input_ids": ids}])))


@pytest.mark.parametrize(
    "rows",
    [
        [PROMPT, {"text": "x"}],
        [{"text": "x"}, PROMPT],
        [PROMPT, {"messages": [USER, ASSISTANT]}],
        [{"input_ids": [1, 2]}, PROMPT],
    ],
    ids=["prompt then text", "text then prompt", "prompt then messages", "ids then prompt"],
)
def test_rows_of_two_kinds_in_one_file_are_refused_by_the_line_that_differs(write, rows):
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2"):
        load_rows(str(write("a.jsonl", rows)))


def test_files_of_two_kinds_in_one_glob_are_refused_by_name(write, tmp_path):
    write("a.jsonl", [PROMPT])
    write("b.jsonl", [{"text": "x"}])
    with pytest.raises(ValueError, match=r"b\.jsonl"):
        load_rows(str(tmp_path / "*.jsonl"))


@pytest.mark.parametrize(
    "row", [{"prompt": [USER], "completion": "4"}, {"prompt": "2 + 2?", "completion": [ASSISTANT]}]
)
def test_a_prompt_of_messages_needs_a_completion_of_messages(write, row):
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: "):
        load_rows(str(write("a.jsonl", [row])))


def test_a_prompt_is_text_in_all_rows_or_messages_in_all(write):
    rows = [PROMPT, {"prompt": [USER], "completion": [ASSISTANT]}]
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: the row has .* as a list, but .*, line 1 has .* as text"):
        load_rows(str(write("a.jsonl", rows)))


def test_rows_of_two_kinds_in_a_folder_are_refused_by_the_row_that_differs(write, tmp_path):
    write("d/train.jsonl", [PROMPT, PROMPT, {"text": "x"}])
    with pytest.raises(ValueError, match=r"/d, row 2: the row has `text`"):
        load_rows(str(tmp_path / "d"))


@pytest.mark.parametrize("labels", ["ab", [1], [1, 2, 3], [1, None], [True, False], None])
def test_labels_that_do_not_fit_input_ids_are_refused(write, labels):
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: labels must be"):
        load_rows(str(write("a.jsonl", [{"input_ids": [1, 2], "labels": labels}])))


def test_labels_in_some_rows_only_are_refused(write):
    rows = [{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [1, 2]}]
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: the row has `input_ids` as a list, but .* and `labels`"):
        load_rows(str(write("a.jsonl", rows)))


# --- bad files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.json", "absent.parquet", "absent.txt", "no/folder/a.jsonl"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"data file .*{name} does not exist"):
        load_rows(str(tmp_path / name))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises((FileNotFoundError, ValueError), match="absent_folder"):
        load_rows(str(tmp_path / "absent_folder"))


def test_a_name_on_the_hub_that_cannot_be_reached_is_named():
    with pytest.raises(ValueError, match=r"^nobody/nothing could not be read: "):
        load_rows("nobody/nothing")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.txt"])
def test_an_empty_file_is_named(write, name):
    with pytest.raises(ValueError, match=f"{name} is empty"):
        load_rows(str(write(name, "")))


@pytest.mark.parametrize(("name", "content"), [("a.json", "[]"), ("a.jsonl", "\n \n"), ("a.txt", "\n \n\n ")])
def test_a_file_without_rows_is_named(write, name, content):
    with pytest.raises(ValueError, match=f"{name} (holds no rows|is empty)"):
        load_rows(str(write(name, content)))


def test_a_file_of_blank_paragraphs_holds_no_rows(write):
    with pytest.raises(ValueError, match=r"a\.txt holds no rows"):
        load_rows(str(write("a.txt", " \n\n \n\n ")), text_field="body")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_a_file_that_is_not_utf8_is_named(write, name):
    content = b'{"text": "ok"}\n{"text": "caf\xe9"}\n'
    with pytest.raises(ValueError, match=f"{name}, line 2: not UTF-8 text: .*can't decode byte 0xe9"):
        load_rows(str(write(name, content)))


def test_a_byte_order_mark_is_named(write):
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: not JSON: Unexpected UTF-8 BOM"):
        load_rows(str(write("a.jsonl", b"\xef\xbb\xbf" + json.dumps(PROMPT).encode())))


@pytest.mark.parametrize("content", ['[{"text": "a"},', '[{"text": "a"} {"text": "b"}]', "[}"])
def test_a_broken_json_array_is_named(write, content):
    with pytest.raises(ValueError, match=r"broken\.json.*not JSON"):
        load_rows(str(write("broken.json", content)))


def test_a_json_array_may_begin_with_white_space(write):
    assert loaded(write("a.json", "\n  " + json.dumps([PROMPT]))) == [PROMPT]


def test_a_broken_parquet_file_is_named(write):
    with pytest.raises(ValueError, match=r"broken\.parquet"):
        load_rows(str(write("broken.parquet", b"PAR1 but not really")))


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet.gz", "rows.JSONL", "rows"])
def test_a_file_of_unknown_type_is_refused_with_the_known_ones(write, name):
    with pytest.raises(
        ValueError, match=rf"{name}: files of type .* are not read; use \.jsonl, \.json, \.parquet, \.txt"
    ):
        load_rows(str(write(name, "x")))


def test_a_glob_without_match_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file matches .*part-\*\.jsonl"):
        load_rows(str(tmp_path / "part-*.jsonl"))


def test_a_glob_of_two_types_is_refused_by_the_file_that_differs(write, tmp_path):
    write("a.jsonl", [PROMPT])
    write("b.txt", "x")
    with pytest.raises(ValueError, match=r"must match files of one type .*; it matches .*b\.txt"):
        load_rows(str(tmp_path / "*"))


def test_a_glob_of_an_unknown_type_is_refused(write, tmp_path):
    write("a.csv", "x")
    with pytest.raises(ValueError, match=r"must match files of one type among \.jsonl.*; it matches .*a\.csv"):
        load_rows(str(tmp_path / "*.csv"))


@pytest.mark.parametrize("content", [{}, {"notes.md": "# Notes"}], ids=["empty", "no data"])
def test_a_folder_without_data_is_refused(write, tmp_path, content):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, text in content.items():
        write(f"folder/{name}", text)
    with pytest.raises(ValueError, match="folder could not be read"):
        load_rows(str(folder))


def test_a_split_that_a_folder_lacks_is_refused_by_both_names(write, tmp_path):
    write("d/train.jsonl", [PROMPT])
    with pytest.raises(ValueError, match=r"/d could not be read: .*validation.*'train'.*dataset_test_split"):
        load_rows(str(tmp_path / "d"), split="validation")
