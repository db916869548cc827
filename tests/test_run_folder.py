"""The run folder: never two runs in one, never a file of the user's deleted, and whole after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers.trainer_utils import rotate_checkpoints

from taid.artifacts import run_folder
from taid.artifacts.run_folder import (
    append_metrics,
    check_free,
    claimed,
    clear,
    last_checkpoint,
    read_metrics,
    truncate_metrics,
    write_atomically,
)


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def put(folder: Path, *paths: str, text: str = "x") -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def checkpoint(folder: Path, step: int, text: str = "{}") -> Path:
    return put(folder / f"checkpoint-{step}", "trainer_state.json", text=text)


# --- is the folder free? ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_missing_and_an_empty_folder_are_free(tmp_path, overwrite):
    check_free(tmp_path / "absent" / "deeper", overwrite=overwrite)
    check_free(tmp_path, overwrite=overwrite)
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("sign", ["config.yaml", "metrics.jsonl", "checkpoint-3/trainer_state.json"])
def test_a_folder_that_holds_a_run_is_refused_with_every_way_out(tmp_path, sign):
    put(tmp_path, sign, "model.safetensors", text="{}")
    with pytest.raises(ValueError, match=f"output_dir {tmp_path} holds another run: choose another folder") as error:
        check_free(tmp_path, overwrite=False)
    assert "--resume_from_checkpoint" in str(error.value)
    assert "--overwrite_output_dir" in str(error.value)
    check_free(tmp_path, overwrite=True)
    assert names(tmp_path) == {sign, "model.safetensors"}  # asking deletes nothing


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "foreign", ["notes.txt", "config.json", "model.safetensors", "deep/er/a.txt", ".git/HEAD", "checkpoint-3/x"]
)
def test_a_folder_of_other_files_is_refused_even_to_overwrite(tmp_path, foreign, overwrite):
    put(tmp_path, foreign)
    with pytest.raises(ValueError, match=f"output_dir {tmp_path} holds files that are no taid run"):
        check_free(tmp_path, overwrite=overwrite)
    assert names(tmp_path) == {foreign}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_no_folder(tmp_path, overwrite):
    put(tmp_path, "out")
    with pytest.raises(ValueError, match=r"output_dir .*out is a file"):
        check_free(tmp_path / "out", overwrite=overwrite)


# --- clearing it ------------------------------------------------------------------------------------------------------

OWN = """config.yaml versions.json metrics.jsonl report.html t.png loss.png README.md model.safetensors config.json
model-00001-of-00002.safetensors model.safetensors.index.json generation_config.json adapter_model.safetensors
adapter_config.json tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt
chat_template.jinja metrics.jsonl.partial checkpoint-1/trainer_state.json checkpoint-12/model.safetensors
checkpoint-12/deep/rng.pth""".split()
FOREIGN = """notes.txt my-config.yaml report.html.bak data.jsonl plot.png config.yaml.old model.bin sub/config.yaml
sub/model.safetensors checkpoint-best/model.safetensors my-checkpoint-1/a old.checkpoint-1/a checkpoint-1.txt
tokenizer_old/tokenizer.json .hidden""".split()


def test_clear_deletes_a_runs_files_and_no_others(tmp_path):
    put(tmp_path, *OWN, *FOREIGN)
    clear(tmp_path)
    assert names(tmp_path) == set(FOREIGN)
    assert not list(tmp_path.glob("checkpoint-1*/"))


def test_clear_leaves_an_empty_run_folder_empty_and_a_missing_one_missing(tmp_path):
    put(tmp_path / "run", *OWN)
    clear(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    clear(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_clear_follows_no_link_out_of_the_folder(tmp_path):
    put(tmp_path / "elsewhere", "model.safetensors")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").symlink_to(tmp_path / "elsewhere" / "model.safetensors")
    clear(tmp_path / "run")
    assert names(tmp_path / "elsewhere") == {"model.safetensors"}
    assert list((tmp_path / "run").iterdir()) == []


def test_clear_removes_a_linked_checkpoint_but_not_what_it_links_to(tmp_path):
    put(tmp_path / "elsewhere", "model.safetensors")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-3").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    clear(tmp_path / "run")
    assert names(tmp_path / "elsewhere") == {"model.safetensors"}
    assert list((tmp_path / "run").iterdir()) == []


# --- holding it -------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from taid.artifacts.run_folder import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def another_process_holds(folder: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_second_process_is_refused_and_a_killed_one_lets_go(tmp_path):
    folder = tmp_path / "run"
    with another_process_holds(folder) as process:
        with pytest.raises(ValueError, match=f"output_dir {folder} is in use by another taid process"), claimed(folder):
            pytest.fail("two processes hold one folder")
        assert folder.is_dir()  # the loser removes nothing
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        with claimed(folder):
            put(folder, "a")
    assert names(folder) == {"a"}


def test_a_folder_is_held_once_in_one_process_too(tmp_path):
    with claimed(tmp_path):
        with pytest.raises(ValueError, match="is in use"), claimed(tmp_path):
            pytest.fail("held twice")
        with pytest.raises(ValueError, match="is in use"), claimed(tmp_path):
            pytest.fail("the refused one let go of it")
    with claimed(tmp_path):
        pass


def test_two_folders_are_held_at_once(tmp_path):
    with claimed(tmp_path / "a"), claimed(tmp_path / "b"):
        assert (tmp_path / "a").is_dir()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_no_empty_folder_behind(tmp_path, error):
    with pytest.raises(error), claimed(tmp_path / "run"):
        raise error
    assert not (tmp_path / "run").exists()
    with claimed(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


def test_a_failure_leaves_no_empty_parent_behind(tmp_path):
    with pytest.raises(ValueError), claimed(tmp_path / "runs" / "deep" / "run"):  # noqa: PT011
        raise ValueError
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_what_was_there_before(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(KeyError), claimed(tmp_path / "empty"):
        raise KeyError
    assert (tmp_path / "empty").is_dir()
    with pytest.raises(KeyError), claimed(tmp_path / "new"):
        raise KeyError(put(tmp_path / "new", "checkpoint-1/model.safetensors"))
    assert names(tmp_path / "new") == {"checkpoint-1/model.safetensors"}


def test_holding_writes_nothing_into_the_folder(tmp_path):
    with claimed(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_a_blocked_pipe_in_the_run_is_not_taken_for_a_held_folder(tmp_path):
    with pytest.raises(BlockingIOError), claimed(tmp_path):
        raise BlockingIOError("stdout is full")


def test_a_file_in_place_of_the_folder_is_named_as_one(tmp_path):
    put(tmp_path, "out")
    with pytest.raises(ValueError, match=r"output_dir .*out is a file"), claimed(tmp_path / "out"):
        pass


def test_a_file_among_the_parents_is_named(tmp_path):
    put(tmp_path, "out")
    with pytest.raises(ValueError, match=r"output_dir .*out/run: .*out is a file"), claimed(tmp_path / "out" / "run"):
        pass


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_the_last_checkpoint_is_the_one_of_most_steps(tmp_path):
    for step in (9, 100, 20):
        checkpoint(tmp_path, step)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize(
    "text", [None, "", '{"global_step": 1', "\0" * 64, "[]"], ids=["missing", "empty", "cut", "zeros", "list"]
)
def test_a_checkpoint_that_was_cut_while_saving_is_passed_over(tmp_path, text):
    checkpoint(tmp_path, 10)
    put(tmp_path, "checkpoint-20/model.safetensors")
    if text is not None:
        checkpoint(tmp_path, 20, text)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_a_checkpoint_whose_state_is_no_text_is_passed_over(tmp_path):
    checkpoint(tmp_path, 10)
    (checkpoint(tmp_path, 20) / "trainer_state.json").write_bytes(b"\xff\xfe\x00")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_what_is_only_named_like_a_checkpoint_is_none(tmp_path):
    put(tmp_path, "checkpoint-7", "checkpoint-best/trainer_state.json", "checkpoint-1x/trainer_state.json", text="{}")
    put(tmp_path, "sub/checkpoint-3/trainer_state.json", text="{}")
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(put(tmp_path / "other", "a")) is None


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_come_back_as_they_were_appended(tmp_path):
    rows = [{"step": n, "loss": 1 / 3 / (n + 1), "run": "ä"} for n in range(4)]
    for row in rows:
        append_metrics(tmp_path, row)
    assert read_metrics(tmp_path) == rows


def test_a_cut_last_line_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    (tmp_path / "metrics.jsonl").write_text('{"st')
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text("")
    assert read_metrics(tmp_path) == []


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not JSON: "):
        read_metrics(tmp_path)


@pytest.mark.parametrize("line", ["3", "[]", "null"])
def test_a_line_that_is_no_object_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is no JSON object: remove the line"):
        read_metrics(tmp_path)


def test_a_line_that_is_no_text_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not JSON: .*: remove the line"):
        read_metrics(tmp_path)


def test_a_resumed_run_forgets_what_was_logged_after_its_checkpoint(tmp_path):
    for step in (0, 5, 10, 15, 20):
        append_metrics(tmp_path, {"step": step})
    truncate_metrics(tmp_path, 10)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 5, 10]
    append_metrics(tmp_path, {"step": 11})
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 5, 10, 11]


def test_forgetting_heals_a_cut_last_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    truncate_metrics(tmp_path, 2)
    append_metrics(tmp_path, {"step": 2})
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


def test_forgetting_everything_or_nothing_leaves_a_file(tmp_path):
    truncate_metrics(tmp_path, 0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    append_metrics(tmp_path, {"step": 3})
    truncate_metrics(tmp_path, 3)
    assert read_metrics(tmp_path) == [{"step": 3}]
    truncate_metrics(tmp_path, 2)
    assert read_metrics(tmp_path) == []


# --- writing ----------------------------------------------------------------------------------------------------------


def test_start_writes_the_configuration_and_the_versions(tmp_path):
    configuration = {"objective": "taid", "taid_alpha": "auto", "run_name": "ärger", "max_length": None}
    run_folder.start(tmp_path / "a" / "run", configuration, total_steps=250, processes=2, device="cpu", engine="ddp")
    assert yaml.safe_load((tmp_path / "a" / "run" / "config.yaml").read_text(encoding="utf-8")) == configuration
    versions = json.loads((tmp_path / "a" / "run" / "versions.json").read_text())
    assert (versions["total_steps"], versions["processes"], versions["device"]) == (250, 2, "cpu")
    assert versions["engine"] == "ddp"
    assert {"taid", "torch", "transformers", "trl", "accelerate", "datasets", "peft", "python"} <= set(versions)
    assert names(tmp_path / "a" / "run") == {"config.yaml", "versions.json"}


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    write_atomically(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_text_and_bytes_are_written_as_they_are(tmp_path):
    write_atomically(tmp_path / "a", "ä\n")
    write_atomically(tmp_path / "b", b"\x00\xff")
    assert (tmp_path / "a").read_bytes() == "ä\n".encode()
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"
    assert names(tmp_path) == {"a", "b"}


def save_checkpoint(folder, step, files=("optimizer.pt", "scheduler.pt")):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 9}))
    for name in files:
        torch.save({"state": [1.0]}, checkpoint / name)
    return checkpoint


def test_a_checkpoint_without_its_optimizer_cannot_be_resumed(tmp_path):
    for step, files in ((1, ()), (2, ("optimizer.pt",)), (3, ("scheduler.pt",))):
        checkpoint = save_checkpoint(tmp_path, step, files)
        with pytest.raises(ValueError, match=f"checkpoint-{step} lacks the state of the optimizer"):
            run_folder.check_resumable(checkpoint)
    run_folder.check_resumable(save_checkpoint(tmp_path, 4))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
def test_a_damaged_file_of_a_checkpoint_is_named(tmp_path, name):
    checkpoint = save_checkpoint(tmp_path, 2)
    torch.save({"cpu": [1.0]}, checkpoint / "rng_state.pth")
    save_file({"weight": torch.zeros(50)}, checkpoint / "model.safetensors")
    run_folder.check_resumable(checkpoint)
    whole = (checkpoint / name).read_bytes()
    for size in (0, len(whole) // 2):
        (checkpoint / name).write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"{name} is truncated or damaged; delete checkpoint-2"):
            run_folder.check_resumable(checkpoint)


def test_a_state_without_its_step_is_damaged(tmp_path):
    checkpoint = save_checkpoint(tmp_path, 2)
    (checkpoint / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"trainer_state\.json is truncated or damaged"):
        run_folder.check_resumable(checkpoint)


def test_going_back_behind_a_later_checkpoint_is_refused(tmp_path):
    earlier, later = save_checkpoint(tmp_path, 2), save_checkpoint(tmp_path, 4)
    run_folder.check_resumable(later)
    with pytest.raises(ValueError, match="cannot resume at checkpoint-2: checkpoint-4 of the same run is later"):
        run_folder.check_resumable(earlier)


def test_what_an_interrupted_overwrite_leaves_is_still_a_run(tmp_path):
    (tmp_path / "config.yaml.partial").touch()
    run_folder.check_free(tmp_path, overwrite=True)
    put(tmp_path, "model.safetensors")
    put(tmp_path, "config.yaml")
    run_folder.clear(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [None, 0, 1, 2, 3, 7])
@pytest.mark.parametrize("best", [None, 5, 30, 50])
def test_checkpoints_are_thinned_out_as_transformers_does(tmp_path, limit, best):
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        put(folder, *(f"checkpoint-{step}/trainer_state.json" for step in (5, 10, 30, 40, 50, 100)), "checkpoint-x/own")

    def path_of_best(folder):
        return None if best is None else str(folder / f"checkpoint-{best}")

    run_folder.thin_out(tmp_path / "ours", limit, path_of_best(tmp_path / "ours"))
    rotate_checkpoints(str(tmp_path / "theirs"), limit, path_of_best(tmp_path / "theirs"))
    assert names(tmp_path / "ours") == names(tmp_path / "theirs")


def test_a_kill_while_a_checkpoint_is_deleted_leaves_none_that_lacks_files(tmp_path, monkeypatch):
    files = ("trainer_state.json", "optimizer.pt", "model.safetensors")
    put(tmp_path, *(f"checkpoint-{step}/{name}" for step in (5, 10, 15) for name in files), text="{}")

    def killed(path):
        (next(Path(path).rglob("optimizer.pt"))).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(run_folder.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        run_folder.thin_out(tmp_path, 2, None)
    monkeypatch.undo()
    checkpoints = sorted(tmp_path.glob("checkpoint-*"))
    assert [path.name for path in checkpoints] == ["checkpoint-10", "checkpoint-15"]
    assert all(names(path) == set(files) for path in checkpoints)
    with run_folder.unfinished(tmp_path, "checkpoint-20", is_writer=True, wait=lambda: None) as made:
        put(made, *files)
    assert not (tmp_path / run_folder.UNFINISHED).exists(), "the next save clears the rest away"
