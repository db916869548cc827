"""The config.yaml of a run repeats it: same numbers, same weights, same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from taid.cli.main import main


def trained(recipe: Path, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], bytes]:
    """Train from a recipe into a folder; return its configuration, its metrics without times, and its weights."""
    assert main(["train", "--config", str(recipe), "--output_dir", str(folder)]) == 0
    configuration = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    metrics = [{k: v for k, v in row.items() if not any(word in k for word in ("second", "time"))} for row in rows]
    return configuration, metrics, (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "own",
    [
        {"objective": "taid", "taid_alpha": "auto", "model_init_kwargs": {"attn_implementation": "eager"}},
        {"objective": "jsd", "kd_ratio": 0.5, "teacher_model_init_kwargs": {"dtype": "bfloat16"}, "packing": True},
    ],
    ids=["taid", "jsd"],
)
def test_training_from_config_yaml_repeats_the_run(tmp_path, student_folder, teacher_folder, rows, own):
    recipe = tmp_path / "recipe.yaml"
    options = {
        "model_name_or_path": str(student_folder),
        "teacher_model_name_or_path": str(teacher_folder),
        "dataset_name": str(rows(tmp_path / "rows.jsonl", number=8)),
        "eval_dataset_name": str(rows(tmp_path / "held_out.jsonl", number=4, seed=1)),
        "max_steps": 3,
        "max_length": 64,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
    }
    recipe.write_text(yaml.safe_dump(options | own))
    first = trained(recipe, tmp_path / "first")
    again = trained(tmp_path / "first" / "config.yaml", tmp_path / "again")
    assert first[0]["model_init_kwargs"] == own.get("model_init_kwargs")
    assert again[0] == first[0] | {"output_dir": str(tmp_path / "again")}
    assert again[1] == first[1]
    assert len(first[1]) >= 3
    assert again[2] == first[2]
