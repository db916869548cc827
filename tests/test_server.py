"""A teacher on a server: what it says is what the same model says here; its faults are outlived, or named."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

import taid.teachers.server
from prompt_server import (
    PromptServer,
    a_position_missing,
    an_html_page,
    cut_short,
    dropped,
    mass_above_one,
    no_prompt_logprobs,
    not_a_number,
    one_choice_missing,
    other_tokens,
    other_vocabulary,
    positive,
    slow,
    status,
    too_few,
    wrong_json,
)
from taid import TAIDConfig, TAIDTrainer
from taid.artifacts import run_folder
from taid.config.combinations import TEACHER_SERVER_KEY
from taid.losses.fused import shifted
from taid.losses.sparse_logits import TopK
from taid.models.vocabulary import Vocabulary
from taid.teachers.cache import Cache
from taid.teachers.server import Server
from taid.teachers.teacher import ServedTeacher

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen; the hallway smelt of boiled cabbage."
DATA = Dataset.from_list([{"prompt": TEXT[: 4 + i], "completion": TEXT[4 + i : 20 + 5 * i]} for i in range(12)])
HELD_OUT = Dataset.from_list([{"prompt": TEXT[i : i + 9], "completion": TEXT[i + 9 : i + 40]} for i in range(3)])

capture = TAIDTrainer.capture


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(taid.teachers.server, "_BACKOFF", 0.0)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory, make_model, tokenizer):
    """A teacher with no row that is not a token: of padding that is likely, as in a random model, no server tells."""
    folder = tmp_path_factory.mktemp("models") / "served"
    make_model(300, hidden_size=48, tied=False, seed=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return AutoModelForCausalLM.from_pretrained(teacher_folder)


@pytest.fixture
def serve(teacher, tokenizer):
    """serve(**options): a server of the teacher that is gone after the test."""
    servers = []

    def start(**options):
        server = PromptServer(teacher, tokenizer, **{"max_logprobs": -1} | options).__enter__()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.__exit__()


def trainer_of(folder, student, teacher=None, data=DATA, held_out=None, **options):
    options = {
        "objective": "taid", "taid_alpha": 0.8, "taid_beta": 0.5, "max_steps": 4, "per_device_train_batch_size": 4,
        "learning_rate": 0.3, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 1e9, "max_length": 256,
        "bf16": False, "activation_checkpointing": False, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "teacher_top_k": 8,
    } | options  # fmt: skip
    args = TAIDConfig(output_dir=str(folder), **options)
    given = None if teacher is None else str(teacher)
    return TAIDTrainer(str(student), given, args, train_dataset=data, eval_dataset=held_out)


def losses(trainer):
    trainer.train()
    return [row["loss"] for row in run_folder.read_metrics(Path(trainer.args.output_dir)) if "loss" in row]


# --- the same teacher -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "holes"), [(1, ()), (8, ()), (300, ()), (1, (5, 17, 250)), (8, (5, 17, 250)), (64, (5, 17, 250))]
)
def test_what_a_server_says_is_the_top_k_of_the_same_model_here(serve, teacher, tokenizer, k, holes):
    """With holes, the teacher has tokens of its own; those that are listed are left out, as they are of a local one."""
    vocabulary = Vocabulary(tuple(i for i in range(300) if i not in holes))
    server = serve()
    served = ServedTeacher(Server(server.url), vocabulary, k)
    ids = [i for i in tokenizer(TEXT)["input_ids"] if i not in holes]
    rows = [ids[: 5 + 3 * n] for n in range(6)]
    width = max(map(len, rows))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = shifted(torch.where(mask == 1, padded, -100))
    labels[2, :7] = -100  # a prompt
    inputs = {"input_ids": padded, "attention_mask": mask}
    found = served(inputs, labels)
    with torch.no_grad():
        logits = vocabulary.select(teacher(**inputs).logits[labels != -100])
    expected = TopK.from_logits(logits, vocabulary.position(labels[labels != -100]), min(k, len(vocabulary.ids)))
    assert torch.equal(found.ids, expected.ids)
    if holes:  # what is not listed may hold some of the teacher's own tokens
        factor = found.log_probs[:, :1] - expected.log_probs[:, :1]
        assert (factor < 1e-5).all()
        assert (factor > -0.1).all()
        torch.testing.assert_close(found.log_probs - factor, expected.log_probs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.label_log_probs - factor[:, 0], expected.label_log_probs, rtol=1e-5, atol=1e-5)
        mass = found.log_probs.exp().sum(-1) + found.log_rest.exp()
        torch.testing.assert_close(mass, torch.ones_like(mass))
        return
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.label_log_probs, expected.label_log_probs, rtol=1e-5, atol=1e-5)
    if k == 300:
        assert (found.log_rest == -torch.inf).all()
    else:
        torch.testing.assert_close(found.log_rest.exp(), expected.log_rest.exp(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("split", [{}, {"packing": True}, {"per_device_train_batch_size": 1}, {"fused": False}])
def test_training_from_a_server_is_training_from_a_cache_of_top_k(
    serve, split, tmp_path, student_folder, teacher_folder
):
    options = {"gradient_accumulation_steps": 3, **split}
    folder = tmp_path / "cache"
    capture(trainer_of(tmp_path / "out", student_folder, teacher_folder, teacher_cache_format="top_k"), folder)
    expected = losses(trainer_of(tmp_path / "cached", student_folder, teacher_cache=str(folder), **options))
    server = serve()
    trainer = trainer_of(tmp_path / "run", student_folder, teacher_folder, teacher_server_url=server.url, **options)
    assert trainer.teacher.kind == "top_k 8"
    assert losses(trainer) == pytest.approx(expected, rel=2e-3)  # the cache keeps log-probabilities in half precision


def test_requests_hold_several_rows_and_several_are_under_way(serve, tmp_path, student_folder, monkeypatch):
    monkeypatch.setattr("taid.teachers.teacher._TOKENS", 60)
    server = serve(fault=slow(0.1))
    options = {"gradient_accumulation_steps": 3, "max_steps": 2, "taid_alpha": 1e-9}
    trainer = trainer_of(tmp_path / "run", student_folder, student_folder, teacher_server_url=server.url, **options)
    losses(trainer)
    sizes = [len(body["prompt"]) for body in server.requests]
    assert max(sizes) > 1
    assert server.most_at_once > 1
    assert all(isinstance(i, int) for body in server.requests for prompt in body["prompt"] for i in prompt)


def test_the_rows_of_the_next_step_are_asked_for_while_this_one_is_computed(
    serve, tmp_path, student_folder, teacher_folder
):
    server, asked = serve(), []
    options = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 3, "max_steps": 4}
    trainer = trainer_of(tmp_path / "run", student_folder, teacher_folder, teacher_server_url=server.url, **options)
    compute_loss = trainer.compute_loss

    def spy(model, inputs, *args, **kwargs):
        for future in trainer.teacher._coming.values():
            future.get()
        asked.append(len({tuple(prompt) for body in server.requests for prompt in body["prompt"]}))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    # three rows a step; the self-test has asked for one of the twelve already
    assert asked[0] in (6, 7)
    assert asked[-1] == 12


def test_held_out_rows_are_asked_for_too(serve, tmp_path, student_folder, teacher_folder):
    server = serve()
    trainer = trainer_of(
        tmp_path / "run", student_folder, teacher_folder, held_out=HELD_OUT, teacher_server_url=server.url
    )
    assert trainer.evaluate()["eval_kl"] > 0


def test_a_cache_captured_from_a_server_needs_no_server(serve, tmp_path, student_folder, teacher_folder):
    server, folder = serve(), tmp_path / "cache"
    options = {"teacher_server_url": server.url, "teacher_cache_format": "top_k", "held_out": HELD_OUT}
    capture(trainer_of(tmp_path / "out", student_folder, teacher_folder, **options), folder)
    assert Cache(folder).manifest["server_model"] == "teacher"
    local = tmp_path / "local"
    capture(trainer_of(local, student_folder, teacher_folder, **options | {"teacher_server_url": None}), local / "c")
    given = {"held_out": HELD_OUT}
    expected = losses(trainer_of(tmp_path / "a", student_folder, teacher_cache=str(local / "c"), **given))
    for name, url in (("with its server", server.url), ("alone", None)):
        trainer = trainer_of(
            tmp_path / name, student_folder, teacher_cache=str(folder), teacher_server_url=url, **given
        )
        assert losses(trainer) == pytest.approx(expected, rel=1e-3)
    given = {"teacher_server_url": server.url}
    with pytest.raises(ValueError, match="likeliest tokens only: leave teacher_cache_format: hidden away"):
        capture(trainer_of(tmp_path / "out", student_folder, teacher_folder, teacher_cache_format="hidden", **given),
                tmp_path / "other")  # fmt: skip
    capture(trainer_of(tmp_path / "out", student_folder, teacher_folder, **given), tmp_path / "other")
    assert Cache(tmp_path / "other").format.name == "top_k"


# --- faults that pass -------------------------------------------------------------------------------------------------

PASSING = {
    "errors of the server": status(500, times=3),
    "too many requests": status(429, times=2, headers={"Retry-After": "0"}),
    "connections dropped": dropped(times=3),
    "an answer cut short": cut_short(times=2),
    "a slow answer": slow(1.5, times=1),
}


@pytest.mark.parametrize("kind", PASSING)
def test_faults_that_pass_change_nothing(kind, serve, tmp_path, student_folder, teacher_folder):
    options = {"teacher_server_timeout": 1.0, "max_steps": 2}
    url = serve().url
    expected = losses(trainer_of(tmp_path / "a", student_folder, teacher_folder, teacher_server_url=url, **options))
    server = serve(fault=PASSING[kind])
    trainer = trainer_of(tmp_path / "b", student_folder, teacher_folder, teacher_server_url=server.url, **options)
    assert losses(trainer) == expected


# --- faults that are named --------------------------------------------------------------------------------------------

SPOILED = {
    "errors without end": ({"fault": status(500)}, None, OSError, "answers 500: .*, 8 times. A run continues with"),
    "always dropped": ({"fault": dropped()}, None, OSError, "no answer in 8 tries .*resume_from_checkpoint"),
    "always cut short": ({"fault": cut_short()}, None, OSError, "no answer in 8 tries"),
    "always slow": ({"fault": slow(0.5)}, None, OSError, r"not within 0\.2 s; teacher_server_timeout waits longer"),
    "no such page": ({"fault": status(404)}, None, ValueError, "answers 404"),
    "not JSON": ({}, wrong_json, ValueError, "it is no JSON"),
    "a page of a proxy": ({}, an_html_page, ValueError, "it is no JSON: '<"),
    "no log-probabilities": ({}, no_prompt_logprobs, ValueError, "no prompt_logprobs, which vLLM gives"),
    "too few of them": ({}, too_few(3), ValueError, "8 tokens a position were asked for, it gives .*--max-logprobs 8"),
    "k not granted": ({"max_logprobs": 5}, None, ValueError, "greater than max allowed: 5. Start it with a larger"),
    "an answer missing": ({}, one_choice_missing, ValueError, "1 prompts were sent, the answer is"),
    "a position missing": ({}, a_position_missing, ValueError, r"a prompt of \d+ tokens has prompt_logprobs"),
    "other prompt": ({}, other_tokens, ValueError, r"says nothing of token \d+, which was sent"),
    "not a number": ({}, not_a_number, ValueError, "these are no log-probabilities"),
    "positive": ({}, positive, ValueError, "these are no log-probabilities"),
    "mass above one": ({}, mass_above_one, ValueError, "these are no log-probabilities"),
    "a context too short": ({"max_model_len": 4}, None, ValueError, "maximum context length"),
    "a key wanted": ({"api_key": "secret"}, None, ValueError, f"answers 401.*environment as {TEACHER_SERVER_KEY}"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILED)
def test_a_server_that_cannot_be_used_is_named_before_training(kind, serve, tmp_path, student_folder, teacher_folder):
    options, spoil, error, message = SPOILED[kind]
    server = serve(**options)
    server.spoil = spoil
    timeout = 0.2 if "slow" in kind else 30.0
    with pytest.raises(error, match=message) as raised:
        trainer_of(tmp_path / "run", student_folder, teacher_folder, teacher_server_url=server.url,
                   teacher_server_timeout=timeout)  # fmt: skip
    assert server.url in str(raised.value)
    assert "\n" not in str(raised.value)


ODD = {
    "no index": {"choices": [{"text": ""}]},
    "an index that is none": {"choices": [{"index": None}]},
    "choices that are none": {"choices": [None]},
    "text for a choice": {"choices": ["x"]},
    "no choices": {"object": "error"},
    "a list": [],
    "a number": 5,
    "deep": b"[" * 100_000,
    "places that are none": {"choices": [{"index": 0, "prompt_logprobs": 3}]},
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_but_valid_json_is_named(kind, serve):
    server = serve()
    server.spoil = lambda answer, number: ODD[kind] if isinstance(ODD[kind], bytes) else json.dumps(ODD[kind]).encode()
    with pytest.raises(ValueError, match=r"the answer of the teacher's server .* cannot be used"):
        Server(server.url).prompt_log_probs([[1, 2, 3]], 4)


@pytest.mark.parametrize("body", [b'{"error": {"message": null}}', b'{"error": {"message": {}}}', b'{"error": []}',
                                  b"two\nlines", b"", b'{"error": ' + b"[" * 100_000])  # fmt: skip
def test_odd_refusals_are_one_line(body, serve):
    server = serve(fault=lambda handler, number, _: handler.send(400, body) or True)
    with pytest.raises(ValueError, match="answers 400: ") as raised:
        Server(server.url).prompt_log_probs([[1, 2, 3]], 4)
    assert "\n" not in str(raised.value)
    server.fault = lambda handler, number, _: handler.send(302, b"", {"Location": "http://elsewhere"}) or True
    with pytest.raises(ValueError, match=r"answers 302: .*redirects, which is not followed"):
        Server(server.url).prompt_log_probs([[1, 2, 3]], 4)


def test_a_server_may_not_send_us_to_sleep_for_hours(serve, monkeypatch, caplog):
    monkeypatch.setattr(taid.teachers.server, "_LONGEST_WAIT", 0.0)
    server = serve(fault=status(429, times=2, headers={"Retry-After": "3600"}))
    Server(server.url).prompt_log_probs([[1, 2, 3]], 4)
    assert caplog.text.count("the teacher's server: status 429; trying again in") == 2


def test_a_server_that_does_not_name_its_tokens_is_warned_of(serve, tmp_path, student_folder, teacher_folder, caplog):
    server = serve()

    def spoil(answer, number):
        for place in answer["choices"][0]["prompt_logprobs"][1:]:
            for n, entry in enumerate(place.values()):
                entry["decoded_token"] = n if n % 2 else None

    server.spoil = spoil
    trainer_of(tmp_path / "run", student_folder, teacher_folder, teacher_server_url=server.url)
    assert "does not say what its tokens are (decoded_token)" in caplog.text


def test_a_label_is_not_taken_for_one_of_the_likeliest(serve):
    """The teacher's own token is among them, and the label is listed beside them."""
    served = ServedTeacher(Server(serve().url), Vocabulary(tuple(range(300))), 2, rows=301)
    listed = {i: {"logprob": p} for i, p in ((300, -0.5), (7, -1.5), (9, -3.0), (5, -9.0))}
    assert served._of_position(listed, 5, asked=3)[0] == [7, 9]
    del listed[9]
    assert served._of_position(listed, 5, asked=2) is None  # 5 is the label, of an unknown rank
    assert served._of_position(listed, 5, asked=3)[0] == [7, 5]


def test_another_vocabulary_is_shown_with_both_lists(serve, tokenizer, tmp_path, student_folder, teacher_folder):
    server = serve()
    server.spoil = other_vocabulary(tokenizer)
    with pytest.raises(ValueError, match=r"other tokens than the tokenizer of the teacher: ids \[.*\] are \[.*there"):
        trainer_of(tmp_path / "run", student_folder, teacher_folder, teacher_server_url=server.url)


def test_a_local_copy_is_compared_where_it_is_asked_for(
    serve, make_model, tokenizer, tmp_path, student_folder, teacher_folder, teacher
):
    options = {"teacher_server_url": serve().url, "teacher_server_compare": True}
    trainer_of(tmp_path / "run", student_folder, teacher_folder, **options)  # it agrees
    other = tmp_path / "other"
    make_model(300, hidden_size=48, tied=False, seed=9).save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(ValueError, match=r"disagrees with the teacher here by 0\.\d+ .*are \[.*\] here and \[.*there"):
        trainer_of(tmp_path / "run", student_folder, other, **options)
    trainer_of(tmp_path / "run", student_folder, other, **options | {"teacher_server_compare": False})


def test_a_server_that_is_not_there_or_does_not_serve_the_model(serve, tmp_path, student_folder, teacher_folder):
    def with_url(url, **options):
        return trainer_of(tmp_path / "run", student_folder, teacher_folder, teacher_server_url=url, **options)

    with pytest.raises(OSError, match=r"http://127\.0\.0\.1:9 gave no answer in 8 tries"):
        with_url("http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"does not serve 'qwen' \(it serves: teacher\)"):
        with_url(serve().url, teacher_server_model="qwen")
    for url in ("localhost:8000", "ftp://host", "http://", "8000", "http://[::1", "http://host:port", "http://host/#x",
                "http://host ", "http://host:99999"):  # fmt: skip
        with pytest.raises(ValueError, match="teacher_server_url must be like http://localhost:8000"):
            with_url(url)
    assert with_url(serve().url + "/v1/").teacher.server.model == "teacher"


def test_without_a_tokenizer_the_remedy_is_named(serve, tmp_path, student_folder):
    with pytest.raises(ValueError, match=r"set teacher_model_name_or_path to a folder .*'teacher' could not be loaded"):
        trainer_of(tmp_path / "run", student_folder, teacher_server_url=serve().url)


@pytest.mark.parametrize("objective", ["dkd", "ctkd", "adaptive_kl"])
def test_objectives_that_need_more_than_top_k_are_refused(serve, objective, tmp_path, student_folder, teacher_folder):
    with pytest.raises(ValueError, match=f"'{objective}' needs the teacher's whole distribution"):
        trainer_of(tmp_path / "run", student_folder, teacher_folder, teacher_server_url=serve().url,
                   objective=objective)  # fmt: skip


def test_a_server_that_dies_stops_the_run_with_a_message(serve, tmp_path, student_folder, teacher_folder):
    server = serve()
    options = {"per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 2, "max_steps": 8}
    run = {"teacher_server_url": server.url, **options}
    trainer = trainer_of(tmp_path / "run", student_folder, teacher_folder, **run)
    begin = len(server.requests)
    server.fault = lambda handler, number, body: number > begin + 4 and status(503)(handler, number, body)
    with pytest.raises(OSError, match=r"answers 503.*continues with --resume_from_checkpoint"):
        trainer.train()
    server.fault = None
    checkpoint = run_folder.last_checkpoint(tmp_path / "run")
    trainer = trainer_of(tmp_path / "run", student_folder, teacher_folder, **run)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    resumed = [row["loss"] for row in run_folder.read_metrics(tmp_path / "run") if "loss" in row]
    assert resumed == losses(trainer_of(tmp_path / "alone", student_folder, teacher_folder, **run))


def test_a_run_that_stops_does_not_wait_for_answers_that_hang(serve):
    program = (
        "import sys, torch\n"
        "from taid.teachers.server import Server\n"
        "from taid.teachers.teacher import ServedTeacher\n"
        "from taid.models.vocabulary import Vocabulary\n"
        "teacher = ServedTeacher(Server(sys.argv[1], timeout=600), Vocabulary(tuple(range(300))), 8)\n"
        "ids = torch.arange(40).view(8, 5)\n"
        "teacher.prefetch([{'input_ids': ids, 'attention_mask': torch.ones_like(ids), 'labels': ids}])\n"
        "sys.exit('an error somewhere else')\n"
    )
    server = serve(fault=slow(300))
    done = subprocess.run(
        [sys.executable, "-c", program, server.url], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "an error somewhere else"  # libraries may say something on import


# --- the key ----------------------------------------------------------------------------------------------------------


def test_the_key_comes_from_the_environment_and_is_written_nowhere(
    serve, tmp_path, student_folder, teacher_folder, monkeypatch, caplog, capsys
):
    key = "sk-0123456789abcdef"
    monkeypatch.setenv(TEACHER_SERVER_KEY, key)
    server = serve(api_key=key, fault=status(500, times=1))
    with caplog.at_level(logging.DEBUG):
        trainer = trainer_of(tmp_path / "run", student_folder, teacher_folder, teacher_server_url=server.url)
        trainer.train()
        trainer.save_model()
    assert set(server.authorizations) == {f"Bearer {key}"}
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
    assert written == []
    assert key not in caplog.text + "".join(capsys.readouterr())
    answers = (f"the key {key} is not ours", json.dumps({"error": {"message": key}}), "x" * 390 + key)
    for answer in answers:
        server.fault = lambda handler, number, body, answer=answer: handler.send(403, answer.encode()) or True
        with pytest.raises(ValueError, match=r"answers 403: .*\*\*\*") as raised:
            trainer_of(tmp_path / "run", student_folder, teacher_folder, teacher_server_url=server.url)
        assert key[:6] not in str(raised.value)


@pytest.mark.parametrize("key", ["sk-0123456789abcdef", 'sk-\\back"quote'])
def test_no_part_of_a_key_is_shown_by_an_answer_that_is_cut(key, serve, monkeypatch):
    monkeypatch.setenv(TEACHER_SERVER_KEY, key)
    for before in range(150, 210, 5):
        server = serve()
        text = json.dumps({"object": "x" * before + key})
        server.spoil = lambda answer, number, text=text: text.encode()
        with pytest.raises(ValueError, match="cannot be used") as raised:
            Server(server.url).prompt_log_probs([[1, 2, 3]], 4)
        assert "sk-" not in str(raised.value)


def test_keys_in_the_address_or_that_are_none_are_refused_without_showing_them(tmp_path, monkeypatch):
    for url in ("http://me:secret@host:8000", "http://host:8000/?api_key=secret"):
        with pytest.raises(ValueError, match=f"environment as {TEACHER_SERVER_KEY}") as raised:
            TAIDConfig(output_dir=str(tmp_path), teacher_server_url=url, bf16=False)
        assert "secret" not in str(raised.value)
    monkeypatch.setenv(TEACHER_SERVER_KEY, "secret\r\nX-Evil: 1")
    with pytest.raises(ValueError, match="holds characters that no key has") as raised:
        Server("http://127.0.0.1:9")
    assert "secret" not in str(raised.value)
