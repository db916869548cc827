"""Vision-language pairs: one number a step, the same images for both, images never trained on, always used."""

import io
import json
import logging
import os
import random
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from datasets import Dataset, Image, List
from peft import LoraConfig
from PIL import Image as Pixels
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from taid import TAIDConfig, TAIDTrainer, objectives
from taid.artifacts import model_card, run_folder
from taid.cli.main import main
from taid.data import images, vision_collator
from taid.data.loading import load_rows
from taid.models.vocabulary import Vocabulary
from taid.planning.dry_run import config_like
from vision_models import ARCHITECTURES, make_processor, make_vision_model

WORDS = "alpha beta gamma delta epsilon zeta eta theta".split()


def picture(seed, width=16, height=16):
    noise = random.Random(seed)
    return Pixels.frombytes("RGB", (width, height), bytes(noise.randrange(256) for _ in range(3 * width * height)))


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# One image, two of different sizes, none.
ROWS = [
    {
        "images": [picture(i, 16 + 8 * n, 16 - 4 * n) for n in range((1, 2, 0, 1)[i % 4])],
        "messages": chat("Which?", word),
    }
    for i, word in enumerate(WORDS)
]


def config(folder, **options):
    options = {
        "taid_alpha": 0.8, "taid_beta": 0.5, "max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 0.3,
        "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 1e9, "max_length": 256, "bf16": False,
        "activation_checkpointing": False, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "disable_tqdm": True,
    } | options  # fmt: skip
    return TAIDConfig(output_dir=str(folder), **options)


def make(folder, architecture="llava", rows=ROWS, held_out=None, student=None, teacher=None, teachers=None, **options):
    processor = make_processor(architecture)
    return TAIDTrainer(
        student or make_vision_model(architecture, processor),
        teacher or make_vision_model(architecture, processor, hidden_size=64, seed=1),
        config(folder, **options),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        eval_dataset=held_out and Dataset.from_list(held_out),
        processing_class=processor,
        teacher_processing_class=teachers or processor,
    )


def steps(trainer):
    trainer.train()
    names = ("kl", "loss", "grad_norm", "t")
    return [tuple(row[name] for name in names) for row in trainer.state.log_history if "loss" in row]


def collator(architecture="llava", teacher=None, processor=None, max_length=None, skip=False, **options):
    processor = processor or make_processor(architecture)
    of_trl = DataCollatorForVisionLanguageModeling(processor, max_length=max_length, **options)
    vocabulary = Vocabulary.from_tokenizer(processor.tokenizer, 10_000)
    return vision_collator.Collator(of_trl, teacher or processor, vocabulary, skip=skip)


# --- one number a step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_learns_and_its_numbers_do_not_depend_on_fusion_or_on_how_the_rows_are_split(
    tmp_path, architecture
):
    whole = steps(make(tmp_path / "whole", architecture))
    assert whole[-1][0] < whole[0][0]
    for name, options in {
        "plain": {"fused": False},
        "rows": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    }.items():
        torch.testing.assert_close(steps(make(tmp_path / name, architecture, **options)), whole, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_loss_is_the_objective_of_both_models_own_logits(tmp_path, architecture):
    trainer = make(tmp_path, architecture, objective="forward_kl", max_steps=1, learning_rate=1e-9)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        student, teacher = (model(**batch).logits[:, :-1] for model in (trainer.model, trainer.teacher.model))
    of_tokens = objectives.forward_kl(student[labels != -100], teacher[labels != -100])
    assert first_loss(trainer) == pytest.approx(of_tokens.mean().item(), rel=1e-5)


def first_loss(trainer):
    trainer.train()
    return next(row["loss"] for row in trainer.state.log_history if "loss" in row)


def test_an_adapter_in_both_towers_learns(tmp_path):
    processor = make_processor("qwen2_vl")
    trainer = TAIDTrainer(
        make_vision_model("qwen2_vl", processor), make_vision_model("qwen2_vl", processor, hidden_size=64, seed=1),
        config(tmp_path, max_steps=4), train_dataset=Dataset.from_list(ROWS), processing_class=processor,
        teacher_processing_class=processor, peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj", "qkv"]),
    )  # fmt: skip
    losses = steps(trainer)
    assert losses[-1][0] < losses[0][0]
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert any(".visual." in name for name in trained)
    assert all("lora_" in name for name in trained)


def test_the_card_of_an_adapter_opens_it(tmp_path, monkeypatch):
    processor = make_processor("llava")
    make_vision_model("llava", processor).save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    trainer = TAIDTrainer(
        str(tmp_path / "base"), make_vision_model("llava", processor, hidden_size=64, seed=1),
        config(tmp_path / "run", learning_rate=5.0), train_dataset=Dataset.from_list(ROWS),
        teacher_processing_class=processor, peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    text = model_card.write_card(tmp_path / "run", overwrite=True).read_text()
    assert "pipeline_tag: image-text-to-text" in text
    program = text.split("```python\n")[1].split("\n\ninputs")[0].split("\n\nmessages")[0]
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(program, found)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        theirs, ours = found["model"].eval()(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits
        before = found["model"].get_base_model().eval()
        with found["model"].disable_adapter():
            assert not torch.allclose(before(input_ids=ids).logits, ours, atol=1e-3)
    torch.testing.assert_close(theirs, ours)


def test_workers_make_the_same_batches(tmp_path):
    alone = steps(make(tmp_path / "alone", "idefics3", per_device_train_batch_size=3))
    assert steps(make(tmp_path / "two", "idefics3", per_device_train_batch_size=3, dataloader_num_workers=2)) == alone


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_resumed_run_ends_like_one_left_alone_byte_for_byte(tmp_path, architecture):
    """transformers loads by the names in memory, and on disk a vision tower has others."""
    options = {"max_steps": 6, "per_device_train_batch_size": 3, "optim": "adamw_torch", "learning_rate": 1e-3}
    options |= {"save_strategy": "steps", "save_steps": 2}
    alone = make(tmp_path / "alone", architecture, **options)
    alone.train()
    shutil.copytree(tmp_path / "alone" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    again = make(tmp_path / "again", architecture, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-2"))
    weights = (f"checkpoint-{step}/model.safetensors" for step in (4, 6))
    assert all((tmp_path / "again" / w).read_bytes() == (tmp_path / "alone" / w).read_bytes() for w in weights)


def test_fine_tuning_needs_no_teacher(tmp_path, caplog):
    caplog.set_level(logging.INFO, "taid")
    processor = make_processor("idefics3")
    trainer = TAIDTrainer(
        make_vision_model("idefics3", processor), None, config(tmp_path, objective="sft", max_steps=1),
        train_dataset=Dataset.from_list(ROWS), processing_class=processor,
    )  # fmt: skip
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        logits = trainer.model(**batch).logits[:, :-1]
    expected = F.cross_entropy(logits[labels != -100], labels[labels != -100])
    assert first_loss(trainer) == pytest.approx(expected.item(), rel=1e-5)
    assert "student: " in caplog.text
    assert "teacher: " not in caplog.text


def test_evaluation_counts_every_row_once(tmp_path):
    trainer = make(tmp_path, held_out=ROWS[:5], per_device_eval_batch_size=2)
    measured = trainer.evaluate()
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(5)])
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        logits = trainer.model(**batch).logits[:, :-1]
    expected = F.cross_entropy(logits[labels != -100], labels[labels != -100])
    assert measured["eval_cross_entropy"] == pytest.approx(expected.item(), rel=1e-5)
    assert measured["eval_tokens"] == (labels != -100).sum()


def test_held_out_rows_may_be_text_alone(tmp_path):
    held_out = [{"messages": row["messages"]} for row in ROWS]
    none = [{**row, "images": []} for row in held_out]
    measured = make(tmp_path / "text", held_out=held_out).evaluate()
    expected = make(tmp_path / "none", rows=[*ROWS], held_out=none).evaluate()
    assert measured["eval_cross_entropy"] == pytest.approx(expected["eval_cross_entropy"], rel=1e-6)


def test_rows_that_fill_a_batch_are_not_trained_on():
    rows = [{**ROWS[0], images.PLACE: "row 0"}, {**ROWS[3], images.PLACE: vision_collator.UNTRAINED}]
    labels = collator()(rows)["labels"]
    assert (labels[0] != -100).any()
    assert (labels[1] == -100).all()


# --- images are never trained on --------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_of_images_are_not_trained_and_all_others_are(architecture):
    collate = collator(architecture)
    batch = collate([dict(row) for row in ROWS])
    processor = collate.collator.processor
    special = set(processor.tokenizer.added_tokens_decoder) - {0, 1, 2}  # all that images bring
    new_line = processor.tokenizer.convert_tokens_to_ids("Ċ")
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        of_image = [place for place, token in enumerate(ids.tolist()) if token in special]
        for place, (token, seen, label) in enumerate(zip(ids.tolist(), mask.tolist(), labels.tolist(), strict=True)):
            within = token == new_line and of_image and of_image[0] < place < of_image[-1]
            assert label == (-100 if token in special or not seen or within else token)
    assert (batch["input_ids"] == processor.image_token_id).any()


def test_an_ending_that_touches_an_image_is_trained():
    collate = collator("llava")
    image, end, text = collate.image_ids[0], 2, 70
    ids = torch.tensor([[text, end, image, image, 1, text, image], [image, text, 1, end, text, text, text]])
    of_images = [[False, False, True, True, True, False, True], [True, False, False, False, False, False, False]]
    assert collate.image_tokens(ids).tolist() == of_images


def test_only_the_completion_is_trained_where_there_is_one():
    rows = [{"images": row["images"], "prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in ROWS]
    collate = collator("internvl", completion_only_loss=True)
    batch = collate(rows)
    tokenizer = collate.collator.processor.tokenizer
    for labels, word in zip(batch["labels"], WORDS, strict=True):
        said = tokenizer.decode(labels[labels != -100])
        assert word in said
        assert "Which" not in said


def test_parts_of_a_message_do_not_get_the_keys_of_others():
    """Arrow fills a struct: a text part comes back with an image of None, which many templates take for an image."""
    parts = [{"type": "image"}, {"type": "text", "text": "Which?"}]
    row = {"images": [picture(0)], "messages": [{"role": "user", "content": parts}, *chat("", "alpha")[1:]]}
    row["messages"][1]["content"] = [{"type": "text", "text": "alpha"}]
    through_arrow = Dataset.from_list([row])[0]
    assert through_arrow["messages"][0]["content"][0] == {"type": "image", "text": None}
    collate = collator("qwen2_vl")
    template = collate.collator.processor.chat_template.replace("part['type'] == 'image'", "not 'text' in part")
    collate.collator.processor.chat_template = template
    assert (collate([through_arrow])["input_ids"] == collate([row])["input_ids"]).all()


# --- what the two models are shown ------------------------------------------------------------------------------------


def test_a_teacher_with_other_pixels_gets_its_own_of_the_same_images(tmp_path):
    ours, theirs = make_processor("llava"), make_processor("llava")
    theirs.image_processor.image_mean, theirs.image_processor.image_std = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    batch = collator("llava", processor=ours, teacher=theirs)([dict(row) for row in ROWS])
    flat = [image for row in ROWS for image in row["images"]]
    torch.testing.assert_close(
        vision_collator.for_teacher(batch)["pixel_values"],
        theirs.image_processor(flat, return_tensors="pt")["pixel_values"],
    )
    torch.testing.assert_close(
        vision_collator.for_student(batch)["pixel_values"],
        ours.image_processor(flat, return_tensors="pt")["pixel_values"],
    )
    assert set(vision_collator.for_student(batch)) == set(vision_collator.for_teacher(batch))

    trainer = make(tmp_path, teachers=theirs, objective="forward_kl", max_steps=1, learning_rate=1e-9)
    labels = (batch := trainer.data_collator([trainer.train_dataset[i] for i in range(8)])).pop("labels")[:, 1:]
    with torch.no_grad():
        student = trainer.model(**vision_collator.for_student(batch)).logits[:, :-1]
        teacher = trainer.teacher.model(**vision_collator.for_teacher(batch)).logits[:, :-1]
    expected = objectives.forward_kl(student[labels != -100], teacher[labels != -100]).mean().item()
    assert first_loss(trainer) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["messages", "prompt and completion"])
def test_a_teacher_with_other_pixels_is_given_the_students_template(kind):
    ours, theirs = make_processor("llava"), make_processor("llava")
    theirs.image_processor.image_mean = [0.1, 0.2, 0.3]
    theirs.chat_template = theirs.chat_template.replace("<|im_start|>' +", "<|im_start|>ROLE ' +")
    assert theirs.chat_template != ours.chat_template
    rows = [dict(row) for row in ROWS]
    if kind != "messages":
        rows = [{"images": r["images"], "prompt": r["messages"][:1], "completion": r["messages"][1:]} for r in rows]
    batch = collator("llava", processor=ours, teacher=theirs)(rows)
    assert not torch.equal(batch["pixel_values"], batch["teacher_pixel_values"])
    assert "ROLE" in theirs.chat_template  # the user's own object


def test_the_same_processor_is_asked_once():
    batch = collator("qwen2_vl", teacher=make_processor("qwen2_vl"))([dict(row) for row in ROWS])
    assert not any(name.startswith("teacher_") for name in batch)
    assert vision_collator.for_teacher(batch) is batch


def test_a_teacher_whose_images_take_another_number_of_tokens_is_refused_and_the_row_named():
    collate = collator("internvl", teacher=make_processor("internvl", tiles=1))
    with pytest.raises(
        ValueError, match=r"of the demo, row 1: the student's processor makes \d+ tokens .* the teacher's \d+"
    ):
        collate([{**ROWS[1], images.PLACE: "of the demo, row 1"}])


def test_a_token_that_the_teacher_does_not_know_is_named():
    processor = make_processor("llava")
    collate = vision_collator.Collator(
        DataCollatorForVisionLanguageModeling(processor), processor, Vocabulary(tuple(range(1, 301))), skip=False
    )
    collate.shared_ids = collate.shared_ids[collate.shared_ids != processor.image_token_id]
    with pytest.raises(ValueError, match="row 0 of a batch contains token '<image>'"):
        collate([dict(ROWS[0])])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_server_url": "http://localhost:1"}, "teacher_server_url and tokenizer_from: teacher are for text"),
        ({"tokenizer_from": "teacher"}, "tokenizer_from: teacher are for text"),
        ({"packing": True}, "Packing is not supported for vision datasets"),
        ({"padding_free": True}, "Padding-free training is yet not supported for vision"),
    ],
)
def test_what_does_not_go_with_images_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)


def test_a_student_that_sees_keeps_its_tokenizer_also_for_rows_of_text(tmp_path):
    rows = [{"messages": chat("Which?", word)} for word in WORDS]
    with pytest.raises(ValueError, match="tokenizer_from: teacher is for text models"):
        make(tmp_path, rows=rows, teachers=make_processor("llava").tokenizer, tokenizer_from="teacher")


def test_a_cache_of_rows_with_images_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="rows with images are not cached"):
        TAIDTrainer.capture(make(tmp_path / "run"), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_model_that_cannot_see_is_refused(tmp_path, make_model, tokenizer):
    with pytest.raises(ValueError, match=r"the rows have images, but the teacher .* takes none"):
        make(tmp_path, teacher=make_model(300), teachers=tokenizer)


def test_a_vision_language_pair_trains_on_text_alone(tmp_path):
    trainer = make(tmp_path, "qwen2_5_vl", [{"text": f"the letter {word}"} for word in WORDS])
    losses = steps(trainer)
    assert losses[-1][0] < losses[0][0]


# --- images unused ---------------------------------------------------------------------------------------------------


def without_pixels(model):
    """Images come to nothing: what a processor that drops pixels, or a broken merge, does."""
    with torch.no_grad():
        for weight in model.model.multi_modal_projector.parameters():
            weight.zero_()
    return model


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_model_that_does_not_use_its_images_is_found_before_the_first_step(tmp_path, role, fused):
    model = without_pixels(make_vision_model("llava", make_processor("llava")))
    trainer = make(tmp_path, **{role: model}, fused=fused)
    message = f"the {role} does not use its images: its loss of the first 4 rows is .* nats a token"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_images_that_are_not_attended_to_are_found(tmp_path):
    trainer = make(tmp_path, "internvl")
    collate = trainer.data_collator.collator

    def without_attention(rows):
        batch = collate(rows)
        batch["attention_mask"][torch.isin(batch["input_ids"], torch.tensor([3]))] = 0
        return batch

    trainer.data_collator.collator = without_attention
    with pytest.raises(ValueError, match="does not use its images"):
        trainer.train()


def test_what_the_models_lose_by_other_images_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO, "taid")
    make(tmp_path, max_steps=1).train()
    said = [r.message for r in caplog.records if "with other rows' images" in r.message]
    assert [line.split(":")[0] for line in said] == ["student", "teacher"]


def test_a_model_that_cannot_take_the_pixels_is_named(tmp_path):
    other = make_vision_model("llava", make_processor("llava"), size=32)
    with pytest.raises(ValueError, match="the teacher cannot take what the student's processor makes of a row"):
        make(tmp_path, teacher=other).train()


def test_rows_of_one_text_are_no_false_alarm(tmp_path):
    """Images that are permuted among equal texts leave the mean as it was."""
    rows = [{"images": [picture(i)], "messages": chat("Which?", "alpha")} for i in range(8)]
    make(tmp_path, rows=rows, max_steps=1).train()


def test_rows_whose_answers_are_cut_off_are_not_what_the_use_of_images_is_tested_on(tmp_path):
    cut = [{"images": [picture(i)], "prompt": "<image>" + "a" * 60, "completion": " alpha"} for i in range(5)]
    good = [{"images": [picture(i)], "prompt": "<image>", "completion": f" {word}"} for i, word in enumerate(WORDS)]
    losses = steps(make(tmp_path / "some", rows=cut + good, max_length=40, max_steps=1))
    assert losses[0][1] > 0
    with pytest.raises(ValueError, match="of the first 5 rows with images none can be trained on"):
        make(tmp_path / "none", rows=cut, max_length=40).train()


def test_images_none_of_which_can_be_read_are_an_error_even_when_left_out(tmp_path):
    rows = [{"images": [{"bytes": b"nothing", "path": None}], "messages": chat("Which?", word)} for word in WORDS]
    data = Dataset.from_list(rows).cast_column("images", List(Image(decode=False)))
    with pytest.raises(ValueError, match="of the first 8 rows with images none can be trained on"):
        make(tmp_path, rows=data, skip_bad_images=True).train()


def test_steps_without_a_trained_token_do_not_dilute_the_logged_loss(tmp_path):
    unreadable = {"bytes": b"nothing", "path": None}
    good = [{"images": [{"bytes": encoded(picture(i)), "path": None}], "messages": chat("Which?", word)}
            for i, word in enumerate(WORDS[:4])]  # fmt: skip
    rows = [r for row in good for r in (row, row | {"images": [unreadable]})]
    options = {"per_device_train_batch_size": 1, "learning_rate": 1e-12, "skip_bad_images": True}
    options |= {"objective": "forward_kl"}
    raw = List(Image(decode=False))
    half = make(tmp_path / "half", rows=Dataset.from_list(rows).cast_column("images", raw), logging_steps=8,
                max_steps=8, **options)  # fmt: skip
    alone = make(tmp_path / "alone", rows=Dataset.from_list(good).cast_column("images", raw), logging_steps=4,
                 max_steps=4, **options)  # fmt: skip
    assert first_loss(half) == pytest.approx(first_loss(alone), rel=1e-5)


def test_images_are_exchanged_in_their_own_sizes():
    rows = [images.decoded(row) for row in ROWS]
    others = images.exchanged(rows)
    for row, other in zip(rows, others, strict=True):
        assert [image.size for image in row["images"]] == [image.size for image in other["images"]]
        assert all(a.tobytes() != b.tobytes() for a, b in zip(row["images"], other["images"], strict=True))
        assert row["messages"] == other["messages"]
    assert others[0]["images"][0].tobytes() == rows[1]["images"][0].resize((16, 16)).tobytes()


def test_where_all_rows_show_the_same_image_it_is_inverted():
    same = [{"images": [picture(0)]}, {"images": [picture(0)]}]
    assert images.exchanged(same)[0]["images"][0].tobytes() == bytes(255 - b for b in picture(0).tobytes())


# --- rows that cannot be used -----------------------------------------------------------------------------------------


def png(width, height):
    """A PNG of a size that it does not hold."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


BROKEN = {
    "no image": b"this is text",
    "cut": encoded(picture(1, 64, 64))[:3000],
    "huge": png(30_000, 30_000),
    "too large": png(10_000, 10_000),
    "empty": b"",
}


@pytest.mark.parametrize(
    ("column", "value"),
    [("images", [3]), ("images", [["a.png"]]), ("images", "a.png"), ("images", {"a": 1}), ("images", [None]),
     ("images", [{"url": "x"}]), ("image", ["a.png"]), ("image", 3)],
)  # fmt: skip
def test_images_in_json_that_are_no_paths_are_named_with_their_line(column, value, tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(picture(0)))
    good = {"prompt": "p", "completion": "c", column: ["a.png"] if column == "images" else "a.png"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | {column: value}) + "\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2: `{column}` must be (a list of paths|the path of one)"):
        load_rows(str(path))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_of_an_older_student_is_left_where_a_run_is_overwritten(architecture, tmp_path):
    processor = make_processor(architecture)
    make_vision_model(architecture, processor).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "evaluation.speed.md").write_text("| tokens/s |")
    assert (tmp_path / "processor_config.json").exists()
    run_folder.clear(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def rows_file(tmp_path):
    """Write rows whose images are files beside the rows; the content of one may be given."""

    def write(broken=None, at=2, missing=False):
        (tmp_path / "images").mkdir(exist_ok=True)
        lines = []
        for number, word in enumerate(WORDS):
            name = f"images/{number}.png"
            (tmp_path / name).write_bytes(broken if number == at and broken is not None else encoded(picture(number)))
            if number == at and missing:
                (tmp_path / name).unlink()
            lines.append(json.dumps({"images": [name], "messages": chat("Which?", word)}) + "\n")
        (tmp_path / "rows.jsonl").write_text("".join(lines))
        return tmp_path / "rows.jsonl"

    return write


@pytest.mark.parametrize("kind", BROKEN)
def test_an_image_that_cannot_be_read_is_named_with_its_row(tmp_path, rows_file, kind):
    path = rows_file(BROKEN[kind])
    with pytest.raises(ValueError, match=r"rows.jsonl, line 3: image .*images/2.png cannot be read: .*skip_bad_images"):
        make(tmp_path / "run", rows=load_rows(str(path)), max_steps=1).train()


@pytest.fixture(scope="module")
def without_the_third_row(tmp_path_factory):
    good = [row for number, row in enumerate(Dataset.from_list(plain_rows())) if number != 2]
    return steps(make(tmp_path_factory.mktemp("good"), rows=good, max_steps=1))


@pytest.mark.parametrize("kind", [*BROKEN, "missing"])
def test_such_rows_are_left_out_when_asked_and_the_others_count_alike(
    tmp_path, rows_file, kind, caplog, without_the_third_row
):
    path = rows_file(BROKEN.get(kind), missing=kind == "missing")
    rows = load_rows(str(path), skip_bad_images=True)
    loss = steps(make(tmp_path / "run", rows=rows, max_steps=1, skip_bad_images=True))
    torch.testing.assert_close(loss, without_the_third_row, rtol=1e-5, atol=1e-7)
    assert "images/2.png cannot be read" in caplog.text
    assert "line 3" in caplog.text


def plain_rows():
    return [{"images": [picture(i)], "messages": chat("Which?", word)} for i, word in enumerate(WORDS)]


def test_a_missing_file_is_named_before_a_model_is_loaded(rows_file):
    with pytest.raises(ValueError, match=r"rows.jsonl, line 3: image .*images/2.png cannot be read: .*No such file"):
        load_rows(str(rows_file(missing=True)))


def test_rows_of_which_no_image_can_be_read_are_an_error_even_when_asked(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"images": ["nothing.png"], "messages": chat("Which?", "alpha")}) + "\n")
    with pytest.raises(ValueError, match=r"line 1: image .*nothing.png cannot be read"):
        load_rows(str(path), skip_bad_images=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_max_length_that_cuts_into_an_image_is_an_error_that_names_row_and_length(architecture):
    with pytest.raises(ValueError, match=r"row 1 of a batch: max_length 12 cuts into its images; the row has \d+ tok"):
        collator(architecture, max_length=12)([dict(row) for row in (ROWS[2], ROWS[1])])


def test_a_max_length_that_cuts_text_only_cuts_it():
    collate = collator("llava", max_length=30)
    batch = collate([dict(ROWS[0])])
    whole = collator("llava")([dict(ROWS[0])])
    assert batch["input_ids"].tolist() == whole["input_ids"][:, :30].tolist()
    assert batch["labels"].tolist() == whole["labels"][:, :30].tolist()
    assert torch.equal(batch["pixel_values"], whole["pixel_values"])


@pytest.mark.parametrize("form", ["messages", "prompt", "text"])
def test_a_row_that_is_too_long_is_left_out_when_asked(form, caplog):
    def as_form(row):
        said = {
            "messages": {"messages": row["messages"]},
            "prompt": {"prompt": row["messages"][:1], "completion": row["messages"][1:]},
            "text": {"text": "<image>" * len(row["images"]) + "Which? alpha"},
        }
        return {"images": row["images"], **said[form]}

    max_length = 24 if form == "text" else 36
    collate = collator("llava", max_length=max_length, skip=True, completion_only_loss=form == "prompt")
    batch = collate([as_form(ROWS[1]), as_form(ROWS[0])])
    assert (batch["labels"][0] == -100).all()
    assert (batch["labels"][1] != -100).any()
    alone = collate([as_form(ROWS[0])])["labels"]
    assert batch["labels"][1][batch["labels"][1] != -100].tolist() == alone[alone != -100].tolist()
    assert f"max_length {max_length} cuts into its images" in caplog.text


def test_a_placeholder_in_the_text_of_a_row_is_named():
    rows = [
        dict(ROWS[0]),
        {"images": [picture(0)], "messages": chat("Which <image>?", "alpha"), images.PLACE: "f, row 7"},
    ]
    with pytest.raises(ValueError, match="f, row 7: the student's processor cannot take this row"):
        collator("llava")(rows)


def test_images_of_every_kind_and_mode_are_read(tmp_path):
    grey = picture(0).convert("L")
    for number, mode in enumerate(("L", "RGBA", "P", "1", "CMYK")):
        kind = "TIFF" if mode == "CMYK" else "PNG"
        picture(number).convert(mode).save(tmp_path / f"{mode}.{kind.lower()}", kind)
        row = images.decoded({"images": [{"path": str(tmp_path / f"{mode}.{kind.lower()}"), "bytes": None}]})
        assert row["images"][0].mode == "RGB"
    assert images.decoded({"image": grey})["images"][0].tobytes() == grey.convert("RGB").tobytes()
    assert images.decoded({"image": None})["images"] == []


def test_a_picture_that_says_how_it_is_turned_is_turned(tmp_path):
    turned = Pixels.Exif()
    turned[0x0112] = 6  # the camera was held upright
    picture(0, 20, 10).save(tmp_path / "a.jpg", exif=turned)
    assert images.decoded({"image": {"path": str(tmp_path / "a.jpg"), "bytes": None}})["images"][0].size == (10, 20)


def test_rows_of_text_with_placeholders_train(tmp_path):
    rows = [{"images": [picture(i)], "text": f"<image> is {word}"} for i, word in enumerate(WORDS)]
    losses = steps(make(tmp_path, rows=rows))
    assert losses[-1][0] < losses[0][0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"images": "0.png"}, "`images` is a list of images and `image` is one"),
        ({"image": ["0.png"]}, "`images` is a list of images and `image` is one"),
        ({"images": ["0.png"], "input_ids": [1, 2, 3]}, "rows of input_ids have no images"),
    ],
)
def test_a_column_of_another_form_is_named(tmp_path, row, message):
    picture(0).save(tmp_path / "0.png")
    messages = {} if "input_ids" in row else {"messages": chat("Which?", "alpha")}
    Dataset.from_list([row | messages]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=f"rows.parquet: {message}"):
        load_rows(str(tmp_path / "rows.parquet"))


def test_image_and_images_may_stand_beside_each_other(tmp_path):
    picture(0).save(tmp_path / "0.png")
    rows = [{"image": "0.png"}, {"images": ["0.png", "0.png"]}, {}]
    rows = [row | {"messages": chat("Which?", "alpha")} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = [images.decoded(row)["images"] for row in load_rows(str(tmp_path / "rows.jsonl"))]
    assert [len(shown) for shown in read] == [1, 2, 0]


@pytest.mark.parametrize("column", ["tools", "chat_template_kwargs"])
def test_a_column_that_would_be_ignored_is_refused(tmp_path, column):
    rows = [{**row, column: "[]"} for row in plain_rows()]
    with pytest.raises(ValueError, match=f"the train data set: rows with images go without `{column}`"):
        make(tmp_path, rows=rows)


def test_sixteen_bits_are_scaled_and_floats_refused(tmp_path):
    ramp = Pixels.fromarray(np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16))
    ramp.save(tmp_path / "ramp.png")
    shown = images.decoded({"image": {"path": str(tmp_path / "ramp.png"), "bytes": None}})["images"][0]
    assert np.abs(np.asarray(shown)[..., 0].astype(int).ravel() - np.arange(256)).max() <= 1
    Pixels.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="floating-point values"):
        images.decoded({"image": {"path": str(tmp_path / "float.tiff"), "bytes": None}})


@pytest.mark.parametrize("part", [{"type": "image", "url": "https://x.org/a.png"}, {"type": "video"}])
def test_a_part_that_would_be_fetched_is_refused(part):
    content = [part, {"type": "text", "text": "Which?"}]
    row = {"images": [], "messages": [{"role": "user", "content": content}, *chat("", "alpha")[1:]]}
    with pytest.raises(ValueError, match="row 0 of a batch: a part of a message is text, or"):
        collator()([row])


def test_parquet_with_images_inside_is_read(tmp_path):
    data = Dataset.from_list(plain_rows()).cast_column("images", List(Image()))
    data.to_parquet(tmp_path / "rows.parquet")
    rows = load_rows(str(tmp_path / "rows.parquet"))
    assert [row[images.PLACE] for row in rows] == [f"{tmp_path}/rows.parquet, row {i}" for i in range(8)]
    assert images.decoded(rows[3])["images"][0].tobytes() == picture(3).tobytes()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_miniature_takes_what_the_large_models_processor_makes(architecture):
    processor = make_processor(architecture, size=32)
    large = make_vision_model(architecture, processor, hidden_size=128, layers=4, vision_size=96, size=32).config
    small = AutoModelForImageTextToText.from_config(config_like(large, hidden_size=64))
    assert small.config.get_text_config().hidden_size == 64
    assert small.config.get_text_config().num_hidden_layers == 2
    batch = collator(architecture, processor=processor)([dict(row) for row in ROWS])
    with torch.no_grad():
        seen = small(**vision_collator.for_student({k: v for k, v in batch.items() if k != "labels"})).logits
        batch["pixel_values"] = -batch["pixel_values"]
        otherwise = small(**{k: v for k, v in batch.items() if k != "labels"}).logits
    assert (seen - otherwise).abs().max() > 1e-6


def test_evaluate_says_what_a_model_makes_of_its_images_and_of_others(tmp_path, rows_file, capsys):
    processor = make_processor("qwen2_vl")
    for name, options in {"student": {}, "teacher": {"hidden_size": 64, "seed": 1}}.items():
        make_vision_model("qwen2_vl", processor, **options).save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    output = tmp_path / "found.json"
    arguments = [str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher"), "--data", str(rows_file())]
    assert main(["evaluate", *arguments, "--use_cpu", "--batch_size", "8", "--output", str(output)]) == 0
    found = json.loads(output.read_text())["held_out"]

    trainer = make(tmp_path / "run", "qwen2_vl", plain_rows())
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    trainer.data_collator.exchange = True
    others = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    labels = batch["labels"][:, 1:]
    for name, model in {"student": trainer.model, "teacher": trainer.teacher.model}.items():
        for measure, shown in {"cross_entropy": batch, "others_images": others}.items():
            with torch.no_grad():
                logits = model(**{k: v for k, v in shown.items() if k != "labels"}).logits[:, :-1]
            expected = F.cross_entropy(logits[labels != -100], labels[labels != -100]).item()
            assert found[name][measure] == pytest.approx(expected, rel=1e-5)
    tokenizer = processor.tokenizer
    texts = [ids[label != -100] for ids, label in zip(batch["input_ids"][:, 1:], labels, strict=True)]
    size = sum(len(tokenizer.decode(text, skip_special_tokens=True).encode()) for text in texts)
    assert found["student"]["bytes"] == size
    assert "others'" in capsys.readouterr().out


def test_a_recipe_whose_rows_with_images_are_here_is_planned(tmp_path, rows_file, capsys):
    processor = make_processor("llava")
    for name, options in {"student": {}, "teacher": {"hidden_size": 64, "seed": 1}}.items():
        make_vision_model("llava", processor, **options).save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    arguments = {
        "model_name_or_path": tmp_path / "student", "teacher_model_name_or_path": tmp_path / "teacher",
        "dataset_name": rows_file(), "output_dir": tmp_path / "run", "max_steps": 2, "use_cpu": True,
    }  # fmt: skip
    options = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    assert main(["plan", *options]) == 0
    said = capsys.readouterr().out
    assert "student:" in said
    assert "run: 2 steps" in said
    assert main(["train", *options, "--dry_run"]) == 0
    assert "dry run passed" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.cli
@pytest.mark.slow
def test_a_run_through_the_command_line_leaves_a_model_with_its_processor_and_two_processes_give_what_one_gives(
    tmp_path, rows_file
):
    processor = make_processor("idefics3")
    for name, options in {"student": {}, "teacher": {"hidden_size": 64, "seed": 1}}.items():
        make_vision_model("idefics3", processor, **options).save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    arguments = {
        "model_name_or_path": tmp_path / "student", "teacher_model_name_or_path": tmp_path / "teacher",
        "dataset_name": rows_file(), "eval_dataset_name": rows_file(), "max_steps": 2, "max_length": 512,
        "learning_rate": 0.3, "optim": "sgd", "lr_scheduler_type": "constant", "use_cpu": True, "bf16": False,
        "activation_checkpointing": False, "report_to": "none", "logging_steps": 1, "per_device_eval_batch_size": 3,
    }  # fmt: skip
    for folder, launcher, rows in (("one", [], 8), ("two", ["accelerate.commands.launch", "--multi_gpu", "-m"], 4)):
        options = arguments | {"output_dir": tmp_path / folder, "per_device_train_batch_size": rows}
        launcher = [*launcher[:-1], "--num_processes", "2", *launcher[-1:]] if launcher else []
        command = [sys.executable, "-m", *launcher, "taid", "train"]
        command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert "with other rows' images" in done.stderr

    one, two = (run_folder.read_metrics(tmp_path / folder) for folder in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for name in a.keys() - {"epoch", "seconds", "tokens_per_second"}:
            assert abs(a[name] - b[name]) <= 1e-5 * abs(a[name]) + 1e-12, (name, a["step"])
    trained = AutoModelForImageTextToText.from_pretrained(tmp_path / "one")
    assert type(AutoProcessor.from_pretrained(tmp_path / "one")).__name__ == "Idefics3Processor"
    before = AutoModelForImageTextToText.from_pretrained(tmp_path / "student")
    assert not torch.equal(trained.lm_head.weight, before.lm_head.weight)
