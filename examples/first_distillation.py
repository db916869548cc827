"""Distil one model into another from Python, on sums, and print what the student learned.

    python examples/first_distillation.py STUDENT TEACHER [--steps 40] [--output_dir runs/sums]

STUDENT and TEACHER are folders or names on the Hub. Two that come with a checkout and run on a CPU:
src/taid/assets/student src/taid/assets/teacher.
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset

from taid import TAIDConfig, TAIDTrainer


def sums(offset: int) -> Dataset:
    """Sums of two numbers; rows of different offsets share no sum."""
    pairs = [(a, b) for a in range(10, 40) for b in range(10, 40) if (a + b) % 10 == offset]
    return Dataset.from_list([{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a, b in pairs])


def main() -> None:
    """Distil, and print the KL to the teacher before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output_dir", default="runs/sums")
    arguments = parser.parse_args()

    args = TAIDConfig(
        output_dir=arguments.output_dir,
        objective="taid",
        taid_alpha="auto",
        max_steps=arguments.steps,
        per_device_train_batch_size=16,
        learning_rate=1e-4,
        logging_steps=10,
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
    )
    trainer = TAIDTrainer(
        arguments.student,
        arguments.teacher,
        args,
        train_dataset=sums(offset=1),
        eval_dataset=sums(offset=7),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model()
    print(f"KL to the teacher: {before['eval_kl']:.4f} before, {after['eval_kl']:.4f} after {arguments.steps} steps")
    print(f"student: {arguments.output_dir}")


if __name__ == "__main__":
    main()
