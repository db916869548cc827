"""A cached teacher: the same loss, the same weights; a cache of another run or a damaged one is refused."""

import errno
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import taid.teachers.cache
import taid.teachers.cache_manifest
from taid import TAIDConfig, TAIDTrainer
from taid.artifacts import run_folder
from taid.losses.fused import shifted
from taid.teachers.cache import Cache, Writer
from taid.teachers.cache_format import Format
from taid.teachers.sequences import sequences
from taid.training.cache_check import AskedTeacher

capture = TAIDTrainer.capture

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen; the hallway smelt of boiled cabbage."
ROWS = [{"prompt": TEXT[: 4 + 3 * i], "completion": TEXT[4 + 3 * i : 20 + 9 * i]} for i in range(8)]
DATA = Dataset.from_list(ROWS)
HELD_OUT = Dataset.from_list([{"prompt": TEXT[i : i + 9], "completion": TEXT[i + 9 : i + 40]} for i in range(3)])


def config(folder, **options):
    options = {
        "objective": "taid", "taid_alpha": 0.8, "taid_beta": 0.5, "max_steps": 4, "per_device_train_batch_size": 8,
        "learning_rate": 0.3, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 1e9, "max_length": 256,
        "bf16": False, "activation_checkpointing": False, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    } | options  # fmt: skip
    return TAIDConfig(output_dir=str(folder), **options)


def trainer_of(folder, student, teacher, data=DATA, held_out=HELD_OUT, **options):
    teacher = None if teacher is None else str(teacher)
    return TAIDTrainer(str(student), teacher, config(folder, **options), train_dataset=data, eval_dataset=held_out)


def train(folder, *models, **options):
    trainer = trainer_of(folder, *models, **options)
    trainer.train()
    trainer.evaluate()
    rows = run_folder.read_metrics(folder)
    return trainer, [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]


@pytest.fixture(scope="module")
def make_cache(tmp_path_factory, student_folder, teacher_folder):
    """make_cache(**options): capture DATA and HELD_OUT, once for each set of options."""
    made = {}

    def make(**options):
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("cache") / "cache"
            capture(trainer_of(folder.parent / "out", student_folder, teacher_folder, **options), folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture
def cache(make_cache, tmp_path):
    """A copy of a cache of hidden states, to spoil."""
    return Path(shutil.copytree(make_cache(), tmp_path / "cache"))


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


# --- the same loss ----------------------------------------------------------------------------------------------------

SPLITS = {
    "the batches of the capture": {},
    "one row at a time": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True},
    "by the plain formula": {"fused": False},
}


@pytest.mark.parametrize(
    ("split", "objective"),
    [*((split, "taid") for split in SPLITS), *((next(iter(SPLITS)), o) for o in ("dkd", "adaptive_kl"))],
)
def test_training_on_hidden_states_is_training_with_the_local_teacher(
    split, objective, make_cache, tmp_path, student_folder, teacher_folder
):
    options = {"objective": objective, **SPLITS[split]}
    local, expected = train(tmp_path / "local", student_folder, teacher_folder, **options)
    cached, found = train(tmp_path / "cached", student_folder, None, teacher_cache=str(make_cache()), **options)
    assert cached.teacher.kind == local.teacher.kind == "exact"
    assert cached.configuration["teacher_model_name_or_path"] == str(teacher_folder)  # for the report
    assert cached.configuration["teacher_cache_format"] == "hidden"
    assert len(found) == len(expected) == 4 + 1
    for row, reference in zip(found, expected, strict=True):
        assert row.keys() == reference.keys()
        for name, value in row.items():
            # Momentum is a difference of losses by one of them: what they are off relatively, it is off absolutely.
            allowed = 1e-6 if name == "momentum" else 1e-6 * abs(reference[name])
            assert abs(value - reference[name]) <= allowed, (name, row["step"])
        if split == "the batches of the capture":  # then not a byte differs
            assert row == reference
    for name, tensor in weights(cached).items():
        expected_tensor = weights(local)[name]
        assert (tensor - expected_tensor).norm() <= 1e-6 * expected_tensor.norm(), name
        assert split != "the batches of the capture" or torch.equal(tensor, expected_tensor)


def test_any_subset_of_the_rows_in_any_order_needs_no_new_cache(make_cache, tmp_path, student_folder, teacher_folder):
    data = DATA.select([6, 2, 5, 0, 5])
    options = {"per_device_train_batch_size": 2, "data": data, "held_out": None}
    _, expected = _losses(tmp_path / "local", student_folder, teacher_folder, **options)
    _, found = _losses(tmp_path / "cached", student_folder, None, teacher_cache=str(make_cache()), **options)
    assert found == pytest.approx(expected, rel=1e-6)


def _losses(folder, *models, **options):
    trainer = trainer_of(folder, *models, **options)
    trainer.train()
    return trainer, [row["loss"] for row in run_folder.read_metrics(folder) if "loss" in row]


def test_eight_bits_are_close_and_say_so(make_cache, tmp_path, student_folder, teacher_folder):
    _, expected = _losses(tmp_path / "local", student_folder, teacher_folder)
    folder = make_cache(teacher_cache_format="hidden_int8")
    trainer, found = _losses(tmp_path / "cached", student_folder, None, teacher_cache=str(folder))
    assert trainer.teacher.kind == "hidden_int8"
    assert found != expected
    assert found == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("k", [8, 300])
def test_top_k_is_below_the_full_loss_and_equal_to_it_where_all_are_listed(
    k, make_cache, tmp_path, student_folder, teacher_folder
):
    _, expected = _losses(tmp_path / "local", student_folder, teacher_folder, max_steps=1)
    folder = make_cache(teacher_cache_format="top_k", teacher_top_k=k)
    for fused in (True, False):
        _, found = _losses(
            tmp_path / f"cached {fused}", student_folder, None, teacher_cache=str(folder), max_steps=1, fused=fused
        )
        if k == 300:
            assert found == pytest.approx(expected, rel=1e-3)  # log-probabilities are kept in half precision
        else:
            assert 0 < found[0] < expected[0]
    assert not (folder / "head.safetensors").exists()


def test_a_run_that_resumes_with_another_kind_of_teacher_is_refused(
    make_cache, tmp_path, student_folder, teacher_folder
):
    saving = {"save_strategy": "steps", "save_steps": 2}
    _losses(tmp_path / "run", student_folder, teacher_folder, **saving)
    folder = make_cache(teacher_cache_format="top_k", teacher_top_k=8)
    trainer = trainer_of(tmp_path / "run", student_folder, teacher_folder, teacher_cache=str(folder), **saving)
    with pytest.raises(ValueError, match="teacher_signal was 'exact', is 'top_k 8'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    # hidden states are the teacher itself
    trainer = trainer_of(tmp_path / "run", student_folder, teacher_folder, teacher_cache=str(make_cache()), **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


# --- rows are found by content ----------------------------------------------------------------------------------------


def test_a_sequence_has_one_key_padded_packed_and_alone():
    ids = [[5, 6, 7, 8], [9, 10, 11]]
    labels = [[-100, 6, 7, 8], [-100, 10, 11]]
    padded = {
        "input_ids": torch.tensor([ids[0], [*ids[1], 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    }
    of_padded = list(sequences(padded, shifted(torch.tensor([labels[0], [*labels[1], -100]]))))
    flat = {"input_ids": torch.tensor([ids[0] + ids[1]]), "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]])}
    of_flat = list(sequences(flat, shifted(torch.tensor([labels[0] + labels[1]]))))
    assert [s.key for s in of_padded] == [s.key for s in of_flat]
    assert [(s.row, s.start, s.stop) for s in of_padded] == [(0, 0, 4), (1, 0, 3)]
    assert [(s.row, s.start, s.stop) for s in of_flat] == [(0, 0, 4), (0, 4, 7)]
    assert [s.trained for s in of_padded] == [3, 2]
    other = list(sequences(padded, shifted(torch.tensor([[-100, -100, 7, 8], [-100, 10, 11, -100]]))))
    assert other[0].key != of_padded[0].key
    assert other[1].key == of_padded[1].key


# --- a capture that is cut off ----------------------------------------------------------------------------------------


def test_a_capture_continues_where_it_stopped_and_adds_rows(tmp_path, student_folder, teacher_folder, monkeypatch):
    folder, asked = tmp_path / "cache", []
    trainer = trainer_of(tmp_path / "out", student_folder, teacher_folder, data=DATA.select(range(5)), held_out=None)
    capture(trainer, folder)
    assert len(Cache(folder)) == 5
    before = set(Cache(folder).shard_paths())
    (folder / "shards" / f"{'0123abcd' * 4}.partial").write_bytes(b"what a kill left")
    (folder / "shards" / "notes.partial").write_bytes(b"mine")
    trainer = trainer_of(tmp_path / "out", student_folder, teacher_folder, per_device_train_batch_size=1)
    hidden = trainer.teacher.hidden
    monkeypatch.setattr(trainer.teacher, "hidden", lambda inputs: asked.append(1) or hidden(inputs))
    capture(trainer, folder)
    assert len(Cache(folder)) == 8 + 3
    assert before < set(Cache(folder).shard_paths())
    assert [path.name for path in folder.rglob("*.partial")] == ["notes.partial"]
    # an example, one row to know how long it takes, the three new rows one by one, and the held-out ones at once
    assert len(asked) == 1 + 1 + 3 + 1
    asked.clear()
    capture(trainer, folder)
    assert len(asked) == 1


def test_rows_that_the_first_epoch_leaves_out_are_captured_too(tmp_path, student_folder, teacher_folder):
    options = {"per_device_train_batch_size": 5, "dataloader_drop_last": True}
    folder = tmp_path / "cache"
    capture(trainer_of(tmp_path / "out", student_folder, teacher_folder, **options), folder)
    assert len(Cache(folder)) == 8 + 3
    trainer_of(tmp_path / "run", student_folder, None, teacher_cache=str(folder), max_steps=3, **options).train()


def test_a_full_disk_stops_it_with_a_message_and_leaves_whole_shards(
    tmp_path, student_folder, teacher_folder, monkeypatch
):
    folder, written = tmp_path / "cache", []
    save_file = taid.teachers.cache.save_file

    def save(tensors, path, metadata=None):
        if len(written) == 3:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        save_file(tensors, path, metadata)

    trainer = trainer_of(tmp_path / "out", student_folder, teacher_folder)
    monkeypatch.setattr(taid.teachers.cache, "save_file", save)
    monkeypatch.setattr(Writer.__init__, "__defaults__", (1, 120.0))
    with pytest.raises(OSError, match=r"no space left.*same command again"):
        capture(trainer, folder)
    assert not list(folder.rglob("*.partial"))
    assert len(Cache(folder)) == 2  # one of the three was the head
    monkeypatch.undo()
    capture(trainer, folder)
    assert len(Cache(folder)) == 8 + 3


def test_a_cache_larger_than_the_disk_is_refused_before_it_begins(
    tmp_path, student_folder, teacher_folder, monkeypatch
):
    trainer = trainer_of(tmp_path / "out", student_folder, teacher_folder)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"needs .* MB, but .* has 0 MB left"):
        capture(trainer, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("shards/*"))


# --- spoiled caches ---------------------------------------------------------------------------------------------------


def manifest(folder, **changes):
    taid.teachers.cache_manifest.write(folder, taid.teachers.cache_manifest.read(folder) | changes)


def edit(folder, old, new):
    path = folder / "manifest.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def shard(folder):
    return sorted((folder / "shards").glob("*.safetensors"))[0]


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def data_place(path):
    """A byte of the hidden states: the only float32 tensor."""
    header_length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + header_length])
    return 8 + header_length + header["hidden"]["data_offsets"][0] + 1


SPOILED = {
    "no folder": (lambda c: shutil.rmtree(c), "no manifest.json; `taid cache` makes one"),
    "a flipped bit in the manifest": (lambda c: flip(c / "manifest.json", 60), "manifest.json (is not what|cannot be)"),
    "another scale of the head": (lambda c: edit(c, '"scale": 1.0', '"scale": 3.0'), "is not what was written"),
    "no tokenizer": (lambda c: shutil.rmtree(c / "tokenizer"), "tokenizer is missing: `taid cache`"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "has lost its manifest.json"),
    "a manifest cut short": (lambda c: (c / "manifest.json").write_text('{"layout": 1'), "cannot be read"),
    "a manifest of other content": (lambda c: (c / "manifest.json").write_text("[]"), "is not what was written"),
    "another layout": (lambda c: manifest(c, layout=99), "layout of the files was 99 .* is 2 now"),
    "a shard truncated": (lambda c: shard(c).write_bytes(shard(c).read_bytes()[:-7]), "truncated or damaged"),
    "an empty shard": (lambda c: shard(c).write_bytes(b""), "truncated or damaged"),
    "a shard missing": (lambda c: shard(c).unlink(), "1 of its 1 shards are missing"),
    "a flipped bit in the header": (lambda c: flip(shard(c), 40), "damaged"),
    "a flipped bit in the index": (lambda c: flip(shard(c), -1), "damaged"),
    "the head damaged": (lambda c: flip(c / "head.safetensors", -1), "head.safetensors is damaged"),
    "the head missing": (lambda c: (c / "head.safetensors").unlink(), "head.safetensors cannot be read"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_spoiled_cache_is_refused_before_training(kind, cache, tmp_path, student_folder, teacher_folder):
    spoil, message = SPOILED[kind]
    spoil(cache)
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path / "out", student_folder, teacher_folder, teacher_cache=str(cache))


FIELDS = {
    "teacher_options": "way in which the teacher was run",
    "teacher_tokenizer": "tokenizer of the teacher",
    "tokenizer": "tokenizer of the student",
    "chat_template": "chat template",
    "teacher_weights": "weights of the teacher",
    "teacher_config": "configuration of the teacher",
    "teacher_revision": "revision of the teacher",
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_cache_of_another_run_is_refused_with_the_field_and_both_values(
    field, cache, tmp_path, student_folder, teacher_folder, monkeypatch
):
    manifest = AskedTeacher.manifest
    monkeypatch.setattr(AskedTeacher, "manifest", lambda *a: manifest(*a) | {field: "another"})
    before = Cache(cache).manifest[field]
    message = re.escape(f"{FIELDS[field]} was {before!r} at its capture and is 'another' now. Remedy: ")
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path / "out", student_folder, teacher_folder, teacher_cache=str(cache))


def test_another_precision_is_another_cache(cache, tmp_path, student_folder, teacher_folder):
    with pytest.raises(ValueError, match=r"way in which the teacher was run was .*float32.* is .*bfloat16"):
        trainer_of(
            tmp_path / "out", student_folder, teacher_folder, teacher_cache=str(cache),
            teacher_model_init_kwargs={"dtype": "bfloat16"},
        )  # fmt: skip


def test_a_flipped_bit_in_the_data_is_found_when_it_is_read_and_repaired(
    cache, tmp_path, student_folder, teacher_folder
):
    path = shard(cache)
    flip(path, data_place(path))
    trainer = trainer_of(tmp_path / "out", student_folder, None, teacher_cache=str(cache))
    with pytest.raises(ValueError, match=f"row 0 of shard .*{path.name} is damaged; `taid cache --repair`"):
        trainer.train()
    capture(trainer_of(tmp_path / "out", student_folder, teacher_folder), cache, repair=True)
    assert taid.teachers.cache.is_whole(shard(cache), taid.teachers.cache_manifest.identity(Cache(cache).manifest))
    trainer_of(tmp_path / "again", student_folder, None, teacher_cache=str(cache)).train()


@pytest.mark.parametrize(
    "kind",
    [
        "a shard truncated",
        "a shard missing",
        "a flipped bit in the header",
        "the head damaged",
        "the head missing",
        "no manifest",
        "a manifest cut short",
        "another scale of the head",
        "no tokenizer",
    ],
)
def test_repair_mends_it(kind, cache, tmp_path, student_folder, teacher_folder):
    SPOILED[kind][0](cache)
    capture(trainer_of(tmp_path / "out", student_folder, teacher_folder), cache, repair=True)
    trainer_of(tmp_path / "again", student_folder, None, teacher_cache=str(cache)).train()


def test_missing_rows_are_counted_before_training(make_cache, tmp_path, student_folder):
    data = Dataset.from_list(
        [*ROWS, {"prompt": "New", "completion": " row."}, {"prompt": "New", "completion": " too."}]
    )
    with pytest.raises(ValueError, match="lacks 2 of the 10 different rows of the train data set"):
        trainer_of(tmp_path / "out", student_folder, None, data=data, teacher_cache=str(make_cache()))


def test_a_cache_of_another_format_or_pair_is_not_continued(cache, tmp_path, student_folder, teacher_folder):
    other = trainer_of(tmp_path / "out", student_folder, teacher_folder, teacher_cache_format="top_k")
    with pytest.raises(ValueError, match=r"format was 'hidden' .* 'top_k' now"):
        capture(other, cache)
    with pytest.raises(ValueError, match="configuration of the teacher was"):
        capture(trainer_of(tmp_path / "out", teacher_folder, student_folder), cache)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="holds files that are no teacher cache"):
        capture(other, tmp_path / "mine")


@pytest.mark.parametrize("objective", ["dkd", "ctkd", "adaptive_kl"])
def test_objectives_that_top_k_does_not_determine_are_refused_by_name(objective, make_cache, tmp_path, student_folder):
    folder = make_cache(teacher_cache_format="top_k", teacher_top_k=8)
    with pytest.raises(ValueError, match=f"objective '{objective}' needs the teacher's whole distribution"):
        trainer_of(tmp_path / "out", student_folder, None, teacher_cache=str(folder), objective=objective)
    with pytest.raises(ValueError, match="taid_signal: cross_entropy needs"):
        trainer_of(tmp_path / "out", student_folder, None, teacher_cache=str(folder), taid_signal="cross_entropy")


def test_reading_rows_leaves_nothing_behind(make_cache):
    for format_ in ("hidden", "top_k"):
        cache = Cache(make_cache(teacher_cache_format=format_))
        keys = list(cache)

        def read(cache=cache, keys=keys):
            for number in range(1_000):
                cache.read(keys[number % len(keys)])

        read()
        before = sys.getallocatedblocks()
        read()
        assert sys.getallocatedblocks() - before < 100, "safetensors 0.8.0 loses an object a tensor that it makes"


def test_nothing_is_pickled_and_the_tensors_are_what_the_format_says(make_cache):
    folder = make_cache(teacher_cache_format="top_k", teacher_top_k=8)
    tensors = load_file(shard(folder))
    assert {n: t.dtype for n, t in tensors.items()} == {
        "keys": torch.uint8, "stops": torch.int64, "checksums": torch.int64,
        "ids": torch.uint16, "log_probs": torch.float16, "of_token": torch.float32,
    }  # fmt: skip
    assert shard(folder).stat().st_mode & 0o666 == (folder / "manifest.json").stat().st_mode & 0o666
    tokens = len(tensors["ids"])
    stored = sum(t.nbytes for n, t in tensors.items() if n in ("ids", "log_probs", "of_token"))
    each = Format("top_k", hidden_size=48, dtype=torch.float32, vocabulary_size=300, k=8).bytes_per_token()
    assert stored == each * tokens == 44 * tokens


def test_a_shard_of_another_teacher_is_refused_and_not_deleted_by_repair(
    cache, tmp_path, student_folder, teacher_folder, make_model, tokenizer
):
    other = tmp_path / "other"
    make_model(308, hidden_size=48, tied=False, seed=9).save_pretrained(other)
    tokenizer.save_pretrained(other)
    capture(trainer_of(tmp_path / "out", student_folder, other), tmp_path / "foreign")
    foreign = shutil.copy(shard(tmp_path / "foreign"), cache / "shards")
    with pytest.raises(ValueError, match="belongs to another cache: remove it"):
        trainer_of(tmp_path / "run", student_folder, None, teacher_cache=str(cache))
    for repair in (True, False):
        with pytest.raises(ValueError, match="is whole and belongs to something else"):
            capture(trainer_of(tmp_path / "out", student_folder, teacher_folder), cache, repair=repair)
    assert Path(foreign).exists()
    Path(foreign).unlink()
    trainer_of(tmp_path / "run", student_folder, None, teacher_cache=str(cache)).train()


@pytest.mark.parametrize("lost", ["manifest.json is lost", "manifest.json is damaged"])
def test_a_whole_cache_whose_manifest_is_lost_is_not_deleted_by_a_wrong_recipe(
    lost, cache, tmp_path, student_folder, teacher_folder
):
    before = sorted(path.name for path in cache.rglob("*.safetensors"))
    if lost == "manifest.json is lost":
        (cache / "manifest.json").unlink()
    else:
        (cache / "manifest.json").write_text("x")
    wrong = {"teacher_cache_format": "top_k"}
    with pytest.raises(ValueError, match="is whole and belongs to something else"):
        capture(trainer_of(tmp_path / "out", student_folder, teacher_folder, **wrong), cache, repair=True)
    assert sorted(path.name for path in cache.rglob("*.safetensors")) == before
    capture(trainer_of(tmp_path / "out", student_folder, teacher_folder), cache, repair=True)
    trainer_of(tmp_path / "run", student_folder, None, teacher_cache=str(cache)).train()


def test_a_folder_of_models_that_is_called_shards_is_left_alone(tmp_path, student_folder, teacher_folder):
    mine = tmp_path / "cache" / "shards" / "model.safetensors"
    mine.parent.mkdir(parents=True)
    shutil.copy(student_folder / "model.safetensors", mine)
    for repair in (True, False):
        with pytest.raises(ValueError, match="is whole and belongs to something else"):
            capture(trainer_of(tmp_path / "out", student_folder, teacher_folder), tmp_path / "cache", repair=repair)
    assert mine.exists()


BROKEN_TEACHERS = {
    "a pointer of Git LFS": ("model.safetensors", b"version https://git-lfs.github.com/spec/v1", "pointer of Git LFS"),
    "an empty file": ("model.safetensors", b"", "model.safetensors cannot be read"),
    "a broken configuration": ("config.json", b"{", "config.json cannot be read"),
}


@pytest.mark.parametrize("kind", BROKEN_TEACHERS)
def test_a_broken_folder_of_a_teacher_that_is_not_loaded_is_named(
    kind, cache, tmp_path, student_folder, teacher_folder
):
    name, content, message = BROKEN_TEACHERS[kind]
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "teacher"))
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"teacher file .*{message}"):
        trainer_of(tmp_path / "out", student_folder, folder, teacher_cache=str(cache))


@pytest.mark.parametrize("format_", ["hidden", "hidden_int8", "top_k", "sampled"])
def test_a_teacher_that_is_not_finite_is_not_captured(format_, tmp_path, student_folder, make_model, tokenizer):
    model = make_model(308, hidden_size=48, tied=False, seed=2)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    tokenizer.save_pretrained(tmp_path / "nan")
    objective = "forward_kl" if format_ == "sampled" else "taid"
    trainer = trainer_of(
        tmp_path / "out", student_folder, tmp_path / "nan", teacher_cache_format=format_, objective=objective
    )
    with pytest.raises(ValueError, match=r"not finite on the row that begins with tokens \[.*in float32"):
        capture(trainer, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("shards/*"))


def test_a_disk_that_is_full_for_the_tokenizer_is_named(tmp_path, student_folder, teacher_folder, monkeypatch):
    trainer = trainer_of(tmp_path / "out", student_folder, teacher_folder)

    def full(*args):
        raise Exception("No space left on device (os error 28)")  # as tokenizers does

    monkeypatch.setattr(trainer.teacher_tokenizer, "save_pretrained", full)
    with pytest.raises(OSError, match=r"no space left for the teacher cache in .*same command again"):
        capture(trainer, tmp_path / "cache")


def test_every_process_knows_of_every_data_set_even_without_a_share(tmp_path, student_folder, teacher_folder):
    one = HELD_OUT.select([0])
    trainer = trainer_of(tmp_path / "out", student_folder, teacher_folder, held_out={"a": one, "b": HELD_OUT})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer.accelerator), "num_processes", 2)
        patch.setattr(type(trainer.accelerator), "process_index", 1)
        found = trainer.rows.keys()
    assert {name: len(keys) for name, keys in found.items()} == {"train": 4, "a": 0, "b": 1}


@pytest.mark.parametrize("left", ["head.safetensors.partial", "manifest.json.partial", "head.safetensors"])
def test_a_capture_killed_before_its_manifest_is_there_continues(left, tmp_path, student_folder, teacher_folder):
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / left).write_bytes(b"half")
    capture(trainer_of(tmp_path / "out", student_folder, teacher_folder), folder)
    assert not list(folder.rglob("*.partial"))
    trainer_of(tmp_path / "run", student_folder, None, teacher_cache=str(folder)).train()


def test_a_wrong_recipe_repairs_nothing(cache, tmp_path, student_folder, teacher_folder):
    path = shard(cache)
    flip(path, data_place(path))
    with pytest.raises(ValueError, match="configuration of the teacher was"):
        capture(trainer_of(tmp_path / "out", teacher_folder, student_folder), cache, repair=True)
    assert path.exists()


@pytest.mark.parametrize("options", [{}, {"teacher_cache_format": "top_k", "teacher_top_k": 100_000}])
def test_the_recipe_that_captured_a_cache_trains_from_it_and_continues_it(
    options, tmp_path, student_folder, teacher_folder
):
    options = {"teacher_top_k": 64} | options
    capture(trainer_of(tmp_path / "out", student_folder, teacher_folder, **options), tmp_path / "cache")
    given = {"teacher_cache": str(tmp_path / "cache"), "max_steps": 1}
    trainer_of(tmp_path / "run", student_folder, teacher_folder, **options, **given).train()
    # the format is the cache's where it is not given
    capture(trainer_of(tmp_path / "out", student_folder, teacher_folder), tmp_path / "cache", repair=True)


def test_top_k_without_a_share_takes_any_objective(make_cache, tmp_path, student_folder):
    folder = make_cache(teacher_cache_format="top_k", teacher_top_k=8)
    for fused in (True, False):
        options = {"teacher_cache": str(folder), "objective": "dkd", "kd_ratio": 0.0, "max_steps": 1, "fused": fused}
        assert trainer_of(tmp_path / str(fused), student_folder, None, **options).evaluate()["eval_kl"] > 0


def test_held_out_rows_are_all_counted_where_training_drops_its_last_batch(tmp_path, student_folder, teacher_folder):
    options = {"dataloader_drop_last": True, "per_device_train_batch_size": 2}
    found = trainer_of(tmp_path / "a", student_folder, teacher_folder, per_device_eval_batch_size=2, **options)
    expected = trainer_of(tmp_path / "b", student_folder, teacher_folder, per_device_eval_batch_size=8, **options)
    assert found.evaluate()["eval_tokens"] == expected.evaluate()["eval_tokens"] > 0


def test_a_teacher_that_is_an_adapter_is_captured_and_known_by_both_its_parts(
    tmp_path, student_folder, teacher_folder, tokenizer
):
    base = Path(shutil.copytree(teacher_folder, tmp_path / "base"))
    adapter = tmp_path / "adapter"
    with torch.random.fork_rng(devices=[]):
        lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    _, with_base = _losses(tmp_path / "base run", student_folder, base)
    _, expected = _losses(tmp_path / "local", student_folder, adapter)
    assert with_base != expected
    capture(trainer_of(tmp_path / "out", student_folder, adapter), tmp_path / "cache")
    _, found = _losses(tmp_path / "cached", student_folder, adapter, teacher_cache=str(tmp_path / "cache"))
    assert found == expected
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="weights of the teacher was"):
        trainer_of(tmp_path / "run", student_folder, adapter, teacher_cache=str(tmp_path / "cache"))


@pytest.mark.parametrize(("format_", "given"), [("sampled", {"objective": "forward_kl"}),
                                                ("sampled", {"objective": "sft", "kd_ratio": 0.5}),
                                                ("sampled", {"objective": "forward_kl", "kd_ratio": 0.5})])  # fmt: skip
def test_samples_train_with_what_is_linear_in_the_teacher(format_, given, tmp_path, student_folder, teacher_folder):
    options = {"teacher_cache_format": format_, "teacher_cache_samples": 255, **given}
    capture(trainer_of(tmp_path / "out", student_folder, teacher_folder, **options), tmp_path / "cache")
    _, expected = _losses(tmp_path / "local", student_folder, teacher_folder, **given)
    for name, split in SPLITS.items():
        folder = tmp_path / name
        trainer, found = _losses(folder, student_folder, None, teacher_cache=str(tmp_path / "cache"), **given, **split)
        assert trainer.teacher.kind == "sampled 255"
        assert found == pytest.approx(expected, rel=3e-2)


def test_samples_of_a_row_do_not_depend_on_its_batch(make_cache):
    whole = make_cache(teacher_cache_format="sampled", objective="forward_kl")
    single = make_cache(teacher_cache_format="sampled", objective="forward_kl", per_device_train_batch_size=1)
    one, other = Cache(whole), Cache(single)
    keys = list(one)
    same = sum(torch.equal(one.read(key)["ids"], other.read(key)["ids"]) for key in keys)
    assert same >= len(keys) - 1  # a probability at the edge of a draw may round to the other side
    each = sum(t.nbytes for key in keys for t in one.read(key).values()) / sum(
        len(one.read(key)["distinct"]) for key in keys
    )
    assert each < one.format.bytes_per_token()


@pytest.mark.parametrize("objective", ["taid", "reverse_kl", "dkd"])
def test_samples_are_refused_for_other_objectives_before_the_capture(
    objective, make_cache, tmp_path, student_folder, teacher_folder
):
    message = f"objective '{objective}' is not linear in the teacher's distribution"
    options = {"objective": objective, "teacher_cache_format": "sampled"}
    with pytest.raises(ValueError, match=message):
        capture(trainer_of(tmp_path / "out", student_folder, teacher_folder, **options), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    folder = make_cache(teacher_cache_format="sampled", objective="forward_kl")
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path / "run", student_folder, None, objective=objective, teacher_cache=str(folder))


def test_what_a_format_loses_is_printed(tmp_path, student_folder, teacher_folder, capsys):
    for format_, said in (
        ("hidden", ""),
        ("hidden_int8", r"8 bits move the teacher by \d\.\de-0\d nats a token \(KL to itself, \d+ tokens\)"),
        ("top_k", r"top k: \d+\.\d % of the teacher's probability is listed \(mean of \d+ tokens\)"),
    ):
        capture(trainer_of(tmp_path / "out", student_folder, teacher_folder, teacher_cache_format=format_),
                tmp_path / format_)  # fmt: skip
        out = capsys.readouterr().out
        assert re.search(r"trained tokens to capture, \d+ bytes each: 0\.\d MB, about \d+ s\n", out)
        assert re.search(said, out)


def test_a_capture_without_a_teacher_to_ask_says_what_to_set(tmp_path, student_folder, teacher_folder):
    with pytest.raises(ValueError, match="leave fused: false away"):
        capture(trainer_of(tmp_path / "out", student_folder, teacher_folder, fused=False), tmp_path / "cache")
    with pytest.raises(ValueError, match="a cache needs a teacher"):
        capture(trainer_of(tmp_path / "out", student_folder, None, objective="sft"), tmp_path / "cache")
