"""A real pair on real generations: a 260k-weight story teacher distils into a weak 280k student.

    python benchmarks/stories.py --teacher DIR --student DIR [--chat FILE.jsonl] --out runs/stories

1. `generate`: the teacher writes stories at temperature 1 from its BOS token; the last 256 are held out.
2. `taid train` once for each objective, from the same start on the same rows in the same order.
3. The last held-out row of each run's metrics.jsonl, as a Markdown table on standard output.

With --chat, steps 2 and 3 are repeated on a data set of `messages`, whose last tenth is held out. One seed: this shows
that the commands work and what they print, not which objective is best.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from taid.artifacts import run_folder

STORIES, HELD_OUT = 3_072, 256
RUNS = {
    "sft": {"objective": "sft"},
    "forward_kl": {"objective": "forward_kl"},
    "reverse_kl": {"objective": "reverse_kl"},
    "taid_linear": {"objective": "taid", "taid_adaptive": False},
    "taid": {"objective": "taid", "taid_alpha": "auto"},
}
RECIPE = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "bf16": False,
    "activation_checkpointing": False,
    "max_length": 256,
    "logging_steps": 5,
    "eval_strategy": "steps",
    "eval_steps": 60,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
}
# The story models know no chat: the plainest template that tells the roles apart.
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@torch.no_grad()
def generate(teacher: Path, folder: Path, trained: int = STORIES, held_out: int = HELD_OUT) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(teacher).eval(), AutoTokenizer.from_pretrained(teacher)
    torch.manual_seed(0)
    stories: list[str] = []
    while len(stories) < trained + held_out:
        start = torch.full((256, 1), tokenizer.bos_token_id)
        rows = model.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, temperature=1.0, top_k=0, max_new_tokens=240,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        stories += [text for row in rows if (text := tokenizer.decode(row, skip_special_tokens=True)).strip()]
        print(f"{len(stories)} stories", file=sys.stderr)
    write_rows(folder / "train.jsonl", [{"text": text} for text in stories[:trained]])
    write_rows(folder / "held_out.jsonl", [{"text": text} for text in stories[trained : trained + held_out]])


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train_all(folder: Path, student: Path, teacher: Path, extra: dict[str, object]) -> list[dict[str, object]]:
    recipe = folder / "recipe.yaml"
    models = {"model_name_or_path": str(student), "teacher_model_name_or_path": str(teacher)}
    data = {"dataset_name": str(folder / "train.jsonl"), "eval_dataset_name": str(folder / "held_out.jsonl")}
    recipe.write_text(yaml.safe_dump(RECIPE | models | data | extra))
    table = []
    for name, options in RUNS.items():
        arguments = [f"--{key}={str(value).lower()}" for key, value in options.items()]
        command = ["train", "--config", str(recipe), "--output_dir", str(folder / name), "--overwrite_output_dir"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        subprocess.run(
            [sys.executable, "-m", "taid", *command, *arguments], check=True, env=environment, stdout=sys.stderr
        )
        rows = run_folder.read_metrics(folder / name)
        held_out = [row for row in rows if "eval_kl" in row]
        if not table:
            table.append({"run": "student before", **held_out[0]})
        seconds = next(row["seconds"] for row in reversed(rows) if "seconds" in row)
        table.append({"run": name, "seconds": seconds, **held_out[-1]})
    return table


def markdown(title: str, table: list[dict[str, object]]) -> str:
    start, teacher = table[0]["eval_cross_entropy"], table[0]["eval_teacher_cross_entropy"]
    lines = [
        f"## {title}",
        "",
        f"Held out: {table[0]['eval_tokens']:,} tokens; the teacher's cross-entropy {teacher:.4f} nats/token.",
        "",
        "| run | cross-entropy | KL to the teacher | gap closed | top-1 accuracy | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in table:
        closed = (start - row["eval_cross_entropy"]) / (start - teacher)
        lines.append(
            f"| {row['run']} | {row['eval_cross_entropy']:.4f} | {row['eval_kl']:.4f} | "
            f"{'' if row is table[0] else f'{closed:.1%}'} | {row['eval_mean_token_accuracy']:.4f} | "
            f"{'' if row is table[0] else round(row['seconds'])} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--chat", type=Path, help="a JSONL file with `messages`")
    parser.add_argument("--out", type=Path, default=Path("runs/stories"))
    arguments = parser.parse_args()

    stories = arguments.out / "text"
    if not (stories / "held_out.jsonl").exists():
        generate(arguments.teacher, stories)
    print(f"{platform.platform()}, {platform.processor() or platform.machine()}, torch {torch.__version__}, ", end="")
    print(f"{torch.get_num_threads()} threads\n")
    print(
        markdown(
            "Stories that the teacher wrote (`text`)", train_all(stories, arguments.student, arguments.teacher, {})
        )
    )
    if arguments.chat:
        chat = arguments.out / "chat"
        rows = [json.loads(line) for line in arguments.chat.read_text().splitlines()]
        write_rows(chat / "train.jsonl", rows[: len(rows) * 9 // 10])
        write_rows(chat / "held_out.jsonl", rows[len(rows) * 9 // 10 :])
        (chat / "template.jinja").write_text(TEMPLATE)
        extra = {"chat_template_path": str(chat / "template.jinja"), "num_train_epochs": 3}
        print(markdown("Chat (`messages`)", train_all(chat, arguments.student, arguments.teacher, extra)))


if __name__ == "__main__":
    main()
