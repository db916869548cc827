"""Streams: each row of a numbered corpus is seen once over kill and resume, known by its content in the batches."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset, interleave_datasets
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import pack_dataset

from prompt_server import PromptServer
from taid import TAIDConfig, TAIDTrainer
from taid.artifacts import run_folder
from taid.cli.main import main
from taid.data import loading, stream
from taid.data.files import file_type
from taid.losses.fused import shifted
from taid.teachers.sequences import sequences

WORDS = "one two three four five six seven"


def texts(number, name="a", first=0):
    """Rows that say their number, of 3 to 9 words."""
    return [f"{name}{i}: {' '.join(WORDS.split()[: 2 + i % 7])}" for i in range(first, first + number)]


def write(path, rows):
    """Write texts in the format that the path's name says."""
    suffix = file_type(path)
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": rows, "source": ["made up"] * len(rows)}), path, row_group_size=7)
        return path
    lines = [f"{text}\n\n" if suffix == ".txt" else json.dumps({"text": text}) + "\n" for text in rows]
    content = "".join(lines).encode()
    if path.suffix == ".zst":
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write(content)
    else:
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def made(**options):
    return TAIDConfig(**{"output_dir": "out", "use_cpu": True, "bf16": False, "max_steps": 4} | options)


def opened(*names, weights=None, **options):
    return stream.open_stream([str(name) for name in names], made(**options), weights=weights)


def numbered(dataset):
    """Stand in for TRL's preparation where no tokens are needed."""
    return dataset.map(lambda row: {"n": row["text"], "input_ids": list(row["text"].encode())})


def packed(dataset):
    """TRL's packing, of one token a row and as many more as it has words."""

    def tokens(row):
        number = int(re.match(r"[a-z](\d+)", row["text"])[1])
        return {"input_ids": [number] * len(row["text"].split()), "labels": [1] * len(row["text"].split())}

    return pack_dataset(dataset.map(tokens).select_columns(["input_ids", "labels"]), 16)


def read(opened_stream, number, place=None, prepare=numbered, **ranks):
    """So many prepared rows from a place, and the place behind them, as a checkpoint keeps it."""
    opened_stream.start = None if place is None else json.loads(json.dumps(place))
    rows = list(islice(opened_stream.prepared(prepare(opened_stream.dataset), **ranks), number))
    return [row.get("n", row) for row, _ in rows], rows[-1][1]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(stream, "CHUNK", 8)


# --- the place in a stream --------------------------------------------------------------------------------------------

FORMATS = ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt", "a.txt.gz"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_stream_goes_on_with_the_next_row_from_any_place(name, tmp_path):
    path = write(tmp_path / name, texts(21))
    expected = texts(21) + texts(21) + texts(4)
    assert read(opened(path), 46)[0] == expected
    for cut in (1, 7, 8, 9, 16, 20, 21, 22, 40):
        before, place = read(opened(path), cut)
        assert before + read(opened(path), 46 - cut, place)[0] == expected


@pytest.mark.parametrize("prepare", [numbered, packed])
def test_no_row_is_lost_or_doubled_however_often_a_stream_of_several_files_is_left(prepare, tmp_path):
    for i in range(3):
        write(tmp_path / f"part-{i}.jsonl.gz", texts(20, first=20 * i))
    name = str(tmp_path / "part-*.jsonl.gz")
    alone, _ = read(opened(name), 16, prepare=prepare)
    found, place = [], None
    while len(found) < 16:
        rows, place = read(opened(name), 1, place, prepare)
        found += rows
    assert found == alone
    if prepare is packed:
        seen = Counter(token for row in alone for token in row["input_ids"])
        words = {i: len(text.split()) for i, text in enumerate(texts(60))}
        assert all(seen[i] == words[i] for i in range(40))  # five whole chunks: every token of theirs once


def test_a_stretch_without_a_trained_row_is_passed_and_only_a_stream_without_any_ends(tmp_path):
    path, all_rows = write(tmp_path / "a.jsonl", texts(60)), texts(60)
    good = [*all_rows[:5], *all_rows[45:]]

    def without_stretch(dataset):
        return numbered(dataset).filter(lambda row: row["text"] in good)

    assert read(opened(path), 30, prepare=without_stretch)[0] == good + good[:10]
    before, place = read(opened(path), 5, prepare=without_stretch)
    assert before + read(opened(path), 25, place, without_stretch)[0] == good + good[:10]
    with pytest.raises(ValueError, match="no row with a trained token is left for process 0 of 1"):
        read(opened(path), 1, prepare=lambda dataset: dataset.filter(lambda row: False))


def test_to_go_on_reads_one_chunk_again_and_not_what_was_before(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", texts(5_000))
    _, place = read(opened(path), 4_004)
    late = opened(path)
    parsed = []
    json_row = loading.json_row
    monkeypatch.setattr(loading, "json_row", lambda line, at: parsed.append(at) or json_row(line, at))
    assert read(late, 1, place)[0] == ["a4004: one two"]
    assert parsed[0] == f"{path}, line 4001"
    assert len(parsed) <= 3 * stream.CHUNK


def test_a_mixture_draws_by_its_weights_and_goes_on_exactly(tmp_path):
    names = [write(tmp_path / "a.jsonl", texts(1_000)), write(tmp_path / "b.parquet", texts(40, "b"))]
    weights = [3.0, 1.0]
    alone, _ = read(opened(*names, weights=weights), 1_000)
    drawn = Counter(text[0] for text in alone)
    assert abs(drawn["b"] - 250) < 4 * (1_000 * 0.75 * 0.25) ** 0.5
    for name, of in (("a", 1_000), ("b", 40)):  # in their order, and anew after the end
        assert [t for t in alone if t[0] == name] == [texts(1, name, i % of)[0] for i in range(drawn[name])]
    found, place = [], None
    for number in (3, 50, 200, 11, 736):
        rows, place = read(opened(*names, weights=weights), number, place)
        found += rows
    assert found == alone
    other_seed, _ = read(opened(*names, weights=weights, data_seed=7), 1_000)
    assert other_seed != alone


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_see_different_rows_that_one_process_would_see(processes, tmp_path):
    path = write(tmp_path / "a.jsonl", texts(24 * processes))
    found = []
    for rank in range(processes):
        before, place = read(opened(path), 5, rank=rank, processes=processes)
        after, _ = read(opened(path), 19, place, rank=rank, processes=processes)
        found.append(before + after)
    # Row i of one process is row i // processes of one of them, so a step has the same rows.
    assert [text for row in zip(*found, strict=True) for text in row] == texts(24 * processes)


def test_a_data_set_of_datasets_is_a_stream_too(tmp_path):
    rows = Dataset.from_dict({"text": texts(30)}).to_iterable_dataset(num_shards=3)
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train-0.jsonl", texts(15))
    write(folder / "train-1.jsonl", texts(15, first=15))
    for name in ("rows", "folder"):

        def new(name=name):
            return stream.as_stream(rows, None, made()) if name == "rows" else opened(folder)

        alone, _ = read(new(), 65)
        assert sorted(alone[:30]) == sorted(texts(30))
        for cut in (1, 8, 13, 30, 33):
            before, place = read(new(), cut)
            assert before + read(new(), 65 - cut, place)[0] == alone


def test_what_does_not_go_on_exactly_is_refused_by_name(tmp_path):
    rows = Dataset.from_dict({"text": texts(30)}).to_iterable_dataset()
    shuffled = rows.shuffle(seed=0, buffer_size=8)
    for buffered in (shuffled, shuffled.map(lambda row: row), interleave_datasets([rows, shuffled])):
        with pytest.raises(ValueError, match=r"is shuffled in a buffer.*take \.shuffle\(\) away"):
            stream.as_stream(buffered, None, made())
    for name, value in {
        "shuffle_dataset": True, "dataloader_num_workers": 2, "train_sampling_strategy": "group_by_length",
        "ignore_data_skip": True,
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} does not go together with a stream"):
            stream.as_stream(rows, None, made(**{name: value}))
    with pytest.raises(ValueError, match="a stream has no length: set max_steps, or with packing: true train_tokens"):
        stream.as_stream(rows, None, made(max_steps=-1))
    with pytest.raises(ValueError, match=r"held-out rows are a stream: take the first of them"):
        stream.as_stream(Dataset.from_dict({"text": ["a"]}), {"a": rows}, made())


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_bad_row_is_named_when_it_comes(tmp_path):
    path = write(tmp_path / "a.jsonl", texts(40))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:30], '{"text": 3}\n', *lines[30:]]))
    assert read(opened(path), 16)[0] == texts(16)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 31: text must be text, not int"):
        read(opened(path), 40)
    _, place = read(opened(path), 20)
    path.write_text("".join(lines))  # mended behind the place, where no byte has moved
    assert read(opened(path), 20, place)[0] == texts(20, first=20)


def test_a_file_that_has_changed_before_the_place_is_refused(tmp_path):
    for name in ("a.jsonl", "a.jsonl.gz"):
        path = write(tmp_path / name, texts(40))
        _, place = read(opened(path), 20)
        write(path, [text.replace("one", "1") for text in texts(40)])
        with pytest.raises(ValueError, match=r"a\.jsonl.* has changed since the checkpoint: no line begins at byte"):
            read(opened(path), 1, place)
        write(path, texts(9))
        with pytest.raises(ValueError, match="has changed since the checkpoint"):
            read(opened(path), 1, place)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_other_rows_of_the_same_lengths_are_not_taken_for_those_before_the_checkpoint(name, tmp_path):
    for seen in (5, 20):  # in the first chunk, before which no byte stands, and in a later one
        path = write(tmp_path / name, texts(40))
        _, place = read(opened(path), seen)
        write(path, texts(40, "b"))
        with pytest.raises(ValueError, match=rf"a\.{name[2:]}: the rows are not those that the checkpoint has seen"):
            read(opened(path), 1, place)
        write(path, texts(seen - 2))
        with pytest.raises(ValueError, match=r"are not those that the checkpoint|has changed since the checkpoint"):
            read(opened(path), 1, place)


def test_a_parquet_file_that_is_damaged_in_its_rows_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", [f"{i} {os.urandom(40).hex()}" for i in range(400)])
    content = bytearray(path.read_bytes())
    content[9_000:12_000] = bytes(3_000)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, row group \d+: .*: the file is damaged"):
        read(opened(path), 400)


def test_half_of_a_surrogate_pair_is_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a \\ud83d\\ude00"}\n{"text": "a \\ud83d"}\n')
    for read_all in (lambda: read(opened(path), 2), lambda: loading.load_rows(str(path))):
        with pytest.raises(ValueError, match=r"a\.jsonl, line 2: half of a surrogate pair, '\\ud83d': remove it"):
            read_all()


def test_an_archive_that_is_none_is_named_before_training(tmp_path):
    for name, why in (
        ("a.jsonl.gz", "incorrect header check"), ("a.jsonl.zst", "Unknown frame"), ("a.parquet", "magic bytes"),
    ):  # fmt: skip
        path = tmp_path / name
        path.write_bytes(b"this is no archive, whatever its name may say")
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{why}"):
            opened(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_an_archive_that_is_cut_off_is_named(name, tmp_path):
    path = write(tmp_path / name, [f"{i} {os.urandom(40).hex()}" for i in range(5_000)])
    path.write_bytes(path.read_bytes()[:-200_000])
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, after line \d+: Truncated .* damaged or cut off"):
        read(opened(path), 5_000)


def test_other_bad_input_is_named(tmp_path):
    text, chat = write(tmp_path / "a.jsonl", texts(3)), tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "image.jsonl").write_text(json.dumps({"text": "a", "image": "a.png"}) + "\n")
    (tmp_path / "list.json").write_text('[\n{"text": "a"}\n]\n')
    for names, error in (
        ([text, chat], r"chat\.jsonl, line 1: the row has `prompt` as text and `completion`.*but .*a\.jsonl, line 1"),
        ([tmp_path / "blank.jsonl"], "blank.jsonl holds no rows"),
        ([tmp_path / "image.jsonl"], "image.jsonl, line 1: rows with images are not streamed"),
        ([tmp_path / "list.json"], "list.json, line 1: a JSON array: a stream has one JSON object a line"),
        ([tmp_path / "none.jsonl"], "none.jsonl does not exist"),
        ([tmp_path / "nowhere"], "nowhere could not be read: Couldn't find any data file"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=error):
            opened(*names)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dataset_name": ["a", "b"]}, "dataset_name has 2 names: several need streaming: true"),
        ({"dataset_weights": [1.0]}, "dataset_weights are the shares of a stream: set streaming: true"),
        ({"streaming": True, "dataset_weights": [1.0, 2.0]}, "are 2, but dataset_name has 1 name: give one weight a"),
        ({"streaming": True, "dataset_name": ["a", "b"], "dataset_weights": [1.0, -1.0]}, r"must be positive numbers"),
        ({"streaming": True, "max_steps": -1}, "a stream has no length: set max_steps, or with packing"),
        ({"streaming": True, "teacher_cache": "c"}, "the rows of a stream are not known beforehand"),
        ({"train_tokens": 1000}, "train_tokens needs packing: true and a max_length"),
        ({"train_tokens": 0}, "train_tokens must be positive, got 0"),
        ({"train_tokens": 1000, "packing": True, "max_length": 10, "max_steps": 7}, "are 13 steps of 80 tokens, but"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_named_on_the_command_line(options, error, tmp_path, capsys):
    values = {
        "model_name_or_path": "s",
        "dataset_name": "a.jsonl",
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values | {"max_steps": 4} | options))
    assert main(["train", "--config", str(tmp_path / "r.yaml")]) == 2
    assert re.search(error, capsys.readouterr().err)


def test_a_stream_cannot_be_captured_beforehand(tmp_path, capsys):
    values = {"model_name_or_path": "s", "teacher_model_name_or_path": "t", "dataset_name": "a.jsonl", "max_steps": 4}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values | {"streaming": True, "use_cpu": True, "output_dir": "o"}))
    assert main(["cache", "--teacher_cache", str(tmp_path / "cache"), "--config", str(tmp_path / "r.yaml")]) == 2
    assert "the rows of a stream are not known beforehand" in capsys.readouterr().err


def test_a_budget_of_tokens_gives_the_steps():
    of_a_step = {"packing": True, "max_length": 100, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 5}
    for tokens, steps in ((1, 1), (2_000, 1), (2_001, 2), (10_000_000, 5_000)):
        args = made(train_tokens=tokens, max_steps=-1, **of_a_step)
        assert (args.max_steps, args.alpha_for(args.max_steps)) == (steps, args.taid_alpha)


# --- training ---------------------------------------------------------------------------------------------------------


def numbers(tokenizer, inputs):
    """Which rows a batch has, by what its tokens say."""
    found = [re.match(r"([a-z]\d+):", tokenizer.decode(s.ids)) for s in sequences(inputs, shifted(inputs["labels"]))]
    assert all(found)
    return [match[1] for match in found]


@pytest.fixture
def train(student_folder, teacher_folder, monkeypatch):
    """Train on a stream; returns the weights' file, what was logged, and the rows of each step."""
    seen = {}
    training_step = TAIDTrainer.training_step

    def recording(self, model, inputs, *rest):
        assert "place" not in inputs
        rows = numbers(self.processing_class, inputs)
        seen.setdefault(self.state.global_step + 1, []).extend(rows)
        return training_step(self, model, inputs, *rest)

    monkeypatch.setattr(TAIDTrainer, "training_step", recording)

    def run(folder, *names, weights=None, resume=None, **options):
        seen.clear()
        args = made(
            **{
                "output_dir": str(folder), "max_steps": 9, "per_device_train_batch_size": 2, "learning_rate": 1e-3,
                "optim": "adamw_torch", "activation_checkpointing": False, "logging_steps": 1, "report_to": "none",
                "save_strategy": "steps", "save_steps": 2, "disable_tqdm": True, "max_length": 64, "taid_alpha": 0.1,
            } | options
        )  # fmt: skip
        student = AutoModelForCausalLM.from_pretrained(student_folder, attention_dropout=0.1)
        rows = stream.open_stream([str(name) for name in names], args, weights=weights)
        trainer = TAIDTrainer(
            student, str(teacher_folder), args, rows, processing_class=AutoTokenizer.from_pretrained(student_folder)
        )
        trainer.train(resume_from_checkpoint=resume and str(folder / resume))
        trainer.save_model()
        logged = run_folder.read_metrics(folder)
        timing = ("seconds", "tokens_per_second")
        logged = [{name: value for name, value in row.items() if name not in timing} for row in logged]
        return (folder / "model.safetensors").read_bytes(), logged, {step: list(rows) for step, rows in seen.items()}

    return run


CASES = {
    "jsonl": (["a.jsonl"], {}),
    "gz, accumulation": (["a.jsonl.gz"], {"gradient_accumulation_steps": 3}),
    "packed": (["a.jsonl"], {"packing": True}),
    "a packed mixture of zst and parquet, accumulation":
        (["a.jsonl.zst", "b.parquet"], {"packing": True, "gradient_accumulation_steps": 2, "weights": [2.0, 1.0]}),
}  # fmt: skip


@pytest.mark.parametrize(("names", "options"), CASES.values(), ids=CASES.keys())
@pytest.mark.filterwarnings("ignore:Padding-free training is enabled")
def test_a_resumed_run_sees_each_row_once_and_ends_like_one_left_alone(names, options, tmp_path, train):
    paths = [write(tmp_path / name, texts(400, name[0])) for name in names]
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    weights, logged, expected = train(alone, *paths, **options)
    shutil.copytree(alone, killed)
    for checkpoint in ("checkpoint-6", "checkpoint-8", "checkpoint-9"):
        shutil.rmtree(killed / checkpoint)
    resumed, logged_again, found = train(killed, *paths, resume="checkpoint-4", **options)
    assert found == {step: rows for step, rows in expected.items() if step > 4}
    seen = Counter(row for rows in expected.values() for row in rows)
    assert set(seen.values()) == {1}
    if len(paths) == 1 and "packing" not in options:
        assert list(seen) == [text.split(":")[0] for text in texts(len(seen))]
    assert resumed == weights
    assert logged_again == logged


def test_a_place_is_that_of_the_step_though_a_served_teacher_is_asked_a_step_ahead(tmp_path, train, teacher_folder):
    path = write(tmp_path / "a.jsonl", texts(100))
    model, tokenizer = (cls.from_pretrained(teacher_folder) for cls in (AutoModelForCausalLM, AutoTokenizer))
    with PromptServer(model, tokenizer, max_logprobs=-1) as server:
        options = {"teacher_server_url": server.url, "teacher_top_k": 8, "max_steps": 4}
        weights, _, expected = train(tmp_path / "run", path, **options)
        shutil.rmtree(tmp_path / "run" / "checkpoint-4")
        resumed, _, found = train(tmp_path / "run", path, resume="checkpoint-2", **options)
    assert [row for rows in expected.values() for row in rows] == [f"a{i}" for i in range(8)]
    assert found == {3: ["a4", "a5"], 4: ["a6", "a7"]}
    assert resumed == weights


def test_a_checkpoint_of_other_files_weights_or_packing_is_refused(tmp_path, train):
    paths = [write(tmp_path / name, texts(50, name[0])) for name in ("a.jsonl", "b.jsonl")]
    options = {"max_steps": 3, "packing": True}
    train(tmp_path / "run", *paths, **options)
    with pytest.raises(ValueError, match=r"another run: files of the stream was '\w+', is '\w+'"):
        train(tmp_path / "run", paths[1], paths[0], resume="checkpoint-2", **options)
    with pytest.raises(ValueError, match="packing_strategy was 'bfd', is 'bfd_split'"):
        train(tmp_path / "run", *paths, resume="checkpoint-2", packing_strategy="bfd_split", **options)


def test_rows_that_max_length_cuts_away_end_a_run_and_not_a_loop(tmp_path, train):
    path = tmp_path / "a.jsonl"
    row = {"prompt": "word " * 40, "completion": "b"}
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="no trained token"):
        train(tmp_path / "run", path, max_length=8)


def test_rows_that_are_left_out_of_a_stream_are_counted_once(tmp_path, train, caplog):
    path = tmp_path / "a.jsonl"
    lines = [
        json.dumps({"prompt": f"a{i}: " + "word " * (30 if i % 4 == 0 else 0), "completion": "b"}) for i in range(64)
    ]
    path.write_text("\n".join(lines))
    train(tmp_path / "run", path, max_length=16)
    assert caplog.text.count("are left out: max_length cuts away all their trained tokens") == 1
    assert f"{stream.CHUNK // 4} of the {stream.CHUNK} rows in chunk 0 are left out" in caplog.text


# --- the command line -------------------------------------------------------------------------------------------------

# What `taid` does, with a line for each batch that is trained on, of the step and its rows' token ids; then a SIGKILL.
RECORD = """
import json, os, signal, sys
from taid.cli.main import main
from taid.losses.fused import shifted
from taid.teachers.sequences import sequences
from taid.training.trainer import TAIDTrainer
training_step = TAIDTrainer.training_step
def recording(self, model, inputs, *rest):
    rows = [s.ids.tolist() for s in sequences(inputs, shifted(inputs["labels"]))]
    with open(f"{os.environ['SEEN']}-{self.args.process_index}", "a") as file:
        file.write(json.dumps([self.state.global_step + 1, rows]) + "\\n")
    if self.state.global_step == int(os.environ["KILL_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return training_step(self, model, inputs, *rest)
TAIDTrainer.training_step = recording
sys.exit(main(sys.argv[1:]))
"""


def recorded(seen, tokenizer, first, last):
    """The rows of the steps from `first` to `last` that each of two processes has seen, by what their tokens say."""
    found = []
    for rank in range(2):
        lines = Path(f"{seen}-{rank}").read_text().split("\n")[:-1]
        steps = [(step, rows) for step, rows in map(json.loads, lines) if first <= step <= last]
        found.append([re.match(r"[a-z](\d+):", tokenizer.decode(ids)) for _, rows in steps for ids in rows])
    return [[int(match[1]) for match in matches] for matches in found]


@pytest.mark.cli
@pytest.mark.slow
def test_two_killed_processes_see_different_rows_and_go_on_with_the_next(tmp_path, student_folder, teacher_folder):
    for i in range(2):
        write(tmp_path / f"part-{i}.jsonl.gz", texts(400, first=400 * i))
    recipe, script, run = tmp_path / "recipe.yaml", tmp_path / "record.py", tmp_path / "run"
    script.write_text(RECORD)
    recipe.write_text(yaml.safe_dump({
        "model_name_or_path": str(student_folder), "teacher_model_name_or_path": str(teacher_folder),
        "dataset_name": str(tmp_path / "part-*.jsonl.gz"), "streaming": True, "max_steps": 20, "max_length": 64,
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "output_dir": str(run), "bf16": False,
        "activation_checkpointing": False, "save_steps": 4, "save_strategy": "steps", "report_to": "none",
        "use_cpu": True, "taid_alpha": "auto",
    }))  # fmt: skip

    def run_until(step, seen, *arguments):
        launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", str(script)]
        return subprocess.run(
            [sys.executable, "-m", *launcher, "train", "--config", str(recipe), *arguments],
            capture_output=True, text=True, timeout=300, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1", "SEEN": str(tmp_path / seen), "KILL_AT": str(step)},
        )  # fmt: skip

    assert "Signal 9 (SIGKILL)" in run_until(14, "before").stderr
    checkpoint = run_folder.last_checkpoint(run)
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-12"
    process = run_until(-1, "after", "--resume_from_checkpoint")
    assert process.returncode == 0, process.stderr[-3000:]
    tokenizer = AutoTokenizer.from_pretrained(student_folder)
    before, after = recorded(tmp_path / "before", tokenizer, 1, 12), recorded(tmp_path / "after", tokenizer, 1, 20)
    of_each = [a + b for a, b in zip(before, after, strict=True)]
    assert of_each == [list(range(rank, 20 * 32, 2)) for rank in range(2)]  # disjoint, and together all
