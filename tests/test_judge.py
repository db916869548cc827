"""A judge: the answers are the student's greedy ones, the means are of the grades given, and nothing is asked twice."""

import json
import logging
import re

import pytest
import torch

import taid.evaluation.judge
import taid.teachers.server
from prompt_server import PromptServer, cut_short, dropped, slow, status
from taid.artifacts.tables import grade_table
from taid.cli.main import main
from taid.evaluation.judge import API_KEY, Judge, answer, grade_in, grading_messages, read_prompts

ROWS = [
    {"prompt": "Who learns from whom?", "category": "facts", "reference": "The student from the teacher."},
    {"turns": ["Count to three.", "And backwards?"], "category": "numbers"},
    {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "One token?"}]},
]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(taid.teachers.server, "_BACKOFF", 0.0)


class JudgeServer(PromptServer):
    """Grades what it is shown by `says(messages)`, in the manner of an OpenAI-compatible chat endpoint."""

    path = "/v1/chat/completions"

    def __init__(self, model, tokenizer, says, **options):
        super().__init__(model, tokenizer, name="judge", **options)
        self.says = says

    def completions(self, body):
        message = {"role": "assistant", "content": self.says(body["messages"])}
        return 200, {"object": "chat.completion", "choices": [{"index": 0, "message": message}]}


def by_length(messages):
    """A grade that depends on all that is shown."""
    return f"It says something; [[1]] would be too low.\nGrade: [[{1 + len(messages[1]['content']) % 10}]]"


@pytest.fixture
def serve(make_model, tokenizer):
    """serve(says=by_length, **options): a judge that is gone after the test."""
    servers, model = [], make_model()

    def start(says=by_length, **options):
        servers.append(JudgeServer(model, tokenizer, says, **options).__enter__())
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__()


@pytest.fixture
def student(make_model):
    return make_model(300, seed=1)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def judge(tmp_path, prompts, student_folder):
    """judge(server, **options): one that keeps its answers in answers.jsonl."""

    def make(server, **options):
        options = {"max_new_tokens": 6, "student": str(student_folder), "timeout": 30.0} | options
        return Judge(server.url, "judge", read_prompts(prompts), tmp_path / "answers.jsonl", **options)

    return make


def kept(tmp_path):
    return [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]


# --- grades and questions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("Good. [[7]]", 7.0), ("[[ 8.5 ]] it is", 8.5), ("not [[2]] but\nGrade: [[9]]", 9.0), ("[[10]]", 10.0),
        ("[[0]]", None), ("[[11]]", None), ("7 of 10", None), ("[7]", None), ("[[seven]]", None), ("", None),
    ],
)  # fmt: skip
def test_the_last_grade_in_double_brackets_counts(text, grade):
    assert grade_in(text) == grade


def test_the_judge_is_shown_the_conversation_and_the_reference():
    chat = [{"role": r, "content": c} for r, c in (("user", "1 + 1?"), ("assistant", "Two."))]
    system, user = grading_messages(chat, [])
    assert (system["role"], user["role"]) == ("system", "user")
    assert user["content"] == "[user]\n1 + 1?\n\n[assistant]\nTwo."
    assert "[[7]]" in system["content"]
    assert "reference" not in system["content"]
    assert "several turns" not in system["content"]
    longer = [*chat, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    system, user = grading_messages(longer, ["2", "It is 2."])
    assert "the last one only" in system["content"]
    assert "a reference reply" in system["content"]
    assert user["content"].endswith("[assistant]\nYes.\n\n[reference reply to the last turn]\nIt is 2.")


def test_rows_are_read_in_three_forms(prompts):
    one, two, chat = read_prompts(prompts)
    assert (one.turns, one.references, one.category) == (
        ("Who learns from whom?",), ("The student from the teacher.",), "facts"
    )  # fmt: skip
    assert (two.turns, two.references, two.category) == (("Count to three.", "And backwards?"), (), "numbers")
    assert (chat.messages, chat.turns) == (({"role": "system", "content": "Be short."},), ("One token?",))


BAD = {
    "no JSON": ("{", "not JSON"),
    "no question": ('{"text": "x"}', "needs `prompt`, `messages` or `turns`"),
    "an empty one": ('{"prompt": " "}', "must be text, and not empty"),
    "no turns": ('{"turns": []}', "must be text, and not empty"),
    "an answer at the end": ('{"messages": [{"role": "assistant", "content": "x"}]}', "the last one the user's"),
    "no text": ('{"messages": [{"role": "user", "content": 3}]}', "must be texts with a role"),
    "a number": ('{"prompt": "x", "reference": 3}', "reference must be text"),
    "too few references": ('{"turns": ["x", "y"], "reference": ["z"]}', "2 turns, but 1 references"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_named_by_its_line(kind, tmp_path):
    line, message = BAD[kind]
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"prompts\.jsonl, line 3: .*{re.escape(message)}"):
        read_prompts(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no rows"):
        read_prompts(path)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read_prompts(tmp_path / "missing.jsonl")


# --- answers, grades, means -------------------------------------------------------------------------------------------


def greedy(model, tokenizer, messages, count):
    """Token by token, without generate."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_answers_are_greedy_and_the_score_is_the_mean_of_the_grades(serve, judge, student, tokenizer, tmp_path):
    server = serve()
    found = judge(server).grade(student, tokenizer)
    conversations, references = [], [["The student from the teacher."], [], [], []]
    for row in ROWS:
        messages = list(row.get("messages", []))[:-1]
        for text in row.get("turns", [row.get("prompt", "One token?")]):
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": greedy(student, tokenizer, messages, 6)})
            conversations.append(list(messages))
    shown = [grading_messages(*pair) for pair in zip(conversations, references, strict=True)]
    assert sorted(map(str, shown)) == sorted(str(body["messages"]) for body in server.requests)
    assert {(body["model"], body["temperature"]) for body in server.requests} == {("judge", 0.0)}
    grades = [grade_in(by_length(messages)) for messages in shown]
    assert found == {
        "score": sum(grades) / 4,
        "by_turn": {"1": (grades[0] + grades[1] + grades[3]) / 3, "2": grades[2]},
        "by_category": {"facts": grades[0], "numbers": (grades[1] + grades[2]) / 2},
        "graded": 4, "ungraded": 0, "judge_model": "judge", "file": str(tmp_path / "answers.jsonl"),
    }  # fmt: skip
    rows = kept(tmp_path)
    assert [row["answer"] for row in rows if "answer" in row] == [c[-1]["content"] for c in conversations]
    assert {row["said"][0]: row["grade"] for row in rows if "said" in row} == {
        by_length(messages): grade for messages, grade in zip(shown, grades, strict=True)
    }


@pytest.fixture
def answered(monkeypatch):
    """How often the student was asked."""
    asked = []

    def spy(*arguments):
        asked.append(arguments)
        return answer(*arguments)

    monkeypatch.setattr(taid.evaluation.judge, "answer", spy)
    return asked


def test_a_run_that_stops_goes_on_without_asking_again(serve, judge, student, tokenizer, tmp_path, answered):
    alone = serve()
    expected = judge(alone).grade(student, tokenizer)
    (tmp_path / "answers.jsonl").unlink()
    answered.clear()
    server = serve(fault=lambda handler, number, body: number >= 2 and status(503)(handler, number, body))
    with pytest.raises(ConnectionError, match=r"the judge .* answers 503.*same command goes on where this one stopped"):
        judge(server).grade(student, tokenizer)
    graded = [row for row in kept(tmp_path) if "said" in row]
    assert (len(graded), len(answered)) == (2, 4)
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"key": "cut o')  # by a kill
    server.fault, begin = None, len(server.requests)
    assert judge(server).grade(student, tokenizer) == expected
    assert (len(server.requests) - begin, len(answered)) == (2, 4)
    assert judge(server).grade(student, tokenizer) == expected
    assert (len(server.requests) - begin, len(answered)) == (2, 4)
    assert len(kept(tmp_path)) == 8


def test_other_weights_are_asked_anew_and_another_judge_grades_the_same_answers(
    serve, judge, student, tokenizer, tmp_path, answered, teacher_folder, monkeypatch
):
    server = serve()
    judge(server).grade(student, tokenizer)
    judge(server, student=str(teacher_folder)).grade(student, tokenizer)
    assert (len(answered), len(server.requests)) == (8, 4)  # the answers are equal here, so are the grades
    other = serve()
    other.name = "other"
    Judge(other.url, "other", judge(server).prompts, tmp_path / "answers.jsonl", max_new_tokens=6,
          student=str(teacher_folder)).grade(student, tokenizer)  # fmt: skip
    assert (len(answered), len(other.requests)) == (8, 4)


# --- faults -----------------------------------------------------------------------------------------------------------

PASSING = {
    "errors of the server": status(500, times=3),
    "too many requests": status(429, times=3, headers={"Retry-After": "0"}),
    "connections dropped": dropped(times=3),
    "answers cut short": cut_short(times=2),
    "a slow answer": slow(1.5, times=1),
}


@pytest.mark.parametrize("kind", PASSING)
def test_faults_that_pass_change_nothing(kind, serve, judge, student, tokenizer, tmp_path):
    expected = judge(serve()).grade(student, tokenizer)
    (tmp_path / "answers.jsonl").unlink()
    server = serve(fault=PASSING[kind])
    assert judge(server, timeout=1.0 if "slow" in kind else 30.0).grade(student, tokenizer) == expected


UNGRADED = {
    "no grade": lambda answer, number: None,
    "no JSON": lambda answer, number: b'{"choices": [}',
    "a page": lambda answer, number: b"<html>Welcome</html>",
    "no choices": lambda answer, number: b'{"object": "error"}',
    "no text": lambda answer, number: b'{"choices": [{"message": {"content": null}}]}',
    "a list": lambda answer, number: b"[]",
}


@pytest.mark.parametrize("kind", UNGRADED)
def test_what_cannot_be_graded_is_tried_three_times_and_is_never_zero(
    kind, serve, judge, student, tokenizer, tmp_path, caplog
):
    def says(messages):
        return "I cannot say." if "backwards" in messages[1]["content"] else "Fine. [[6]]"

    server = serve(says)
    server.spoil = lambda answer, number: (
        UNGRADED[kind](answer, number) if "backwards" in str(server.requests[number]["messages"]) else None
    )
    found = judge(server).grade(student, tokenizer)
    assert (found["score"], found["graded"], found["ungraded"]) == (6.0, 3, 1)
    assert found["by_turn"] == {"1": 6.0}
    tries = [body["temperature"] for body in server.requests if "backwards" in body["messages"][1]["content"]]
    assert tries == [0.0, 0.7, 0.7]
    assert caplog.text.count("the judge gave no grade in 3 tries") == 1
    (row,) = (row for row in kept(tmp_path) if row.get("grade", 0) is None)
    assert len(row["said"]) == 3
    # The next run asks for that one alone, and may be luckier.
    server.spoil, server.says, begin = None, lambda messages: "[[9]]", len(server.requests)
    found = judge(server).grade(student, tokenizer)
    assert (found["score"], found["ungraded"], len(server.requests) - begin) == ((6 + 6 + 6 + 9) / 4, 0, 1)


def test_half_of_a_surrogate_pair_in_what_the_judge_says_is_kept_and_read_again(serve, judge, student, tokenizer):
    server = serve(lambda messages: "Good \ud83d [[5]]")
    found = judge(server).grade(student, tokenizer)
    assert (found["score"], found["graded"]) == (5.0, 4)
    begin = len(server.requests)
    assert judge(server).grade(student, tokenizer) == found
    assert len(server.requests) == begin


@pytest.mark.parametrize("line", ['{"key": "a", "answer": 3}', '{"key": "a", "grade": "9"}', '{"key": 1}', "[]", "{"])
def test_a_file_of_answers_that_was_edited_is_named(line, serve, judge, tmp_path):
    (tmp_path / "answers.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"answers\.jsonl, line 1: taid evaluate did not write this"):
        judge(serve())


def test_without_any_grade_there_is_no_score(serve, judge, student, tokenizer):
    found = judge(serve(lambda messages: "Hm.")).grade(student, tokenizer)
    assert (found["score"], found["graded"], found["ungraded"], found["by_turn"]) == (None, 0, 4, {})
    shown = grade_table(found).terminal()
    assert list(shown.columns[1].cells) == [""]
    assert "4 without a grade" in shown.caption


def test_a_judge_that_is_always_slow_names_the_option(serve, judge, student, tokenizer):
    server = serve(fault=slow(0.5))
    with pytest.raises(ConnectionError, match=r"not within 0\.2 s; --judge_timeout waits longer"):
        judge(server, timeout=0.2).grade(student, tokenizer)


# --- the key, and what is said before a model is loaded ---------------------------------------------------------------


def test_the_key_comes_from_the_environment_and_is_written_nowhere(
    serve, judge, student, tokenizer, tmp_path, monkeypatch, caplog, capsys
):
    key = "sk-0123456789abcdef"
    monkeypatch.setenv(API_KEY, key)
    server = serve(lambda messages: f"Your key is {key}. [[5]]", api_key=key, fault=status(500, times=1))
    with caplog.at_level(logging.DEBUG):
        found = judge(server).grade(student, tokenizer)
    assert found["score"] == 5.0
    assert set(server.authorizations) == {f"Bearer {key}"}
    assert "Your key is ***." in (tmp_path / "answers.jsonl").read_text()
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert key not in written + caplog.text + "".join(capsys.readouterr())
    server.fault = lambda handler, number, body: handler.send(403, f"the key {key} is not ours".encode()) or True
    (tmp_path / "answers.jsonl").unlink()
    with pytest.raises(ValueError, match=rf"the judge .* answers 403: .*\*\*\*.*The key in {API_KEY} is refused"):
        judge(server).grade(student, tokenizer)


def test_a_judge_that_cannot_be_used_is_named_before_a_model_is_loaded(serve, prompts, tmp_path, capsys):
    def error_of(url, model="judge"):
        output = tmp_path / "e.json"
        options = ("--judge_url", url, "--judge_model", model, "--prompts", prompts, "--output", output)
        assert main(["evaluate", "no/such/model", *map(str, options)]) == 2
        return capsys.readouterr().err

    server = serve()
    assert "does not serve 'gpt' (it serves: judge)" in error_of(server.url, "gpt")
    assert "--judge_url must be like http://localhost:8000" in error_of("localhost")
    assert "--judge_url holds credentials" in error_of("http://a:b@host")
    assert "the judge http://127.0.0.1:9 gave no answer in 8 tries" in error_of("http://127.0.0.1:9")
    assert "environment as JUDGE_API_KEY" in error_of(serve(api_key="secret").url)
    (tmp_path / "e.judged.jsonl").write_text('{"mine": 1}\n')
    assert "line 1: taid evaluate did not write this: choose another --output" in error_of(server.url)
    assert server.requests == []


def test_a_tokenizer_without_a_chat_template_is_named(serve, judge, student, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="no chat template"):
        judge(serve()).grade(student, tokenizer)


def test_the_command_grades_measures_and_writes_both(
    serve, prompts, tmp_path, student_folder, teacher_folder, rows, capsys
):
    """Behind the fused loss, which stands in the models' heads."""
    server, output = serve(), tmp_path / "e.json"
    options = ("--judge_url", server.url, "--judge_model", "judge", "--prompts", prompts, "--max_new_tokens", 6)
    more = ("--data", rows(tmp_path / "rows.jsonl"), "--teacher", teacher_folder)
    found = []
    for arguments in (options, (*options, *more)):
        (tmp_path / "e.judged.jsonl").unlink(missing_ok=True)
        argv = ["evaluate", student_folder, "--use_cpu", "--output", output, *arguments]
        assert main([*map(str, argv)]) == 0
        found.append(json.loads(output.read_text()))
        assert f"{found[-1]['judge']['score']:.2f}" in capsys.readouterr().out
    assert found[0]["judge"] == found[1]["judge"]
    assert "held_out" in found[1]
    assert (tmp_path / "e.judged.jsonl").read_text().count('"answer": ') == 4
