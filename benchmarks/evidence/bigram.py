"""Tell apart what a moving t changes and what Adam's memory does, with a student so small that a run takes seconds.

    python benchmarks/evidence/bigram.py

The teacher is the table of which token follows which in this Python's standard library, the student a small network of
too few dimensions for it, begun on the labels alone. All is exact: the teacher's distribution of every token is known,
and held-out KL is over all of them. Every schedule of t has the best of RATES, and is run with SEEDS other orders.

A schedule of t does two things: it turns the gradient, and it scales it, because where both are close TAID's gradient
is t times forward KL's. `scaled` is forward KL with a loss multiplied by the same number, which only scales. Adam
divides by a mean of squared gradients over 1 / (1 - beta2) steps, so that with 0.999 a short run is told of the scale,
with 0.95 not. KL(p || q) is forward KL's own measure, KL(q || p) reverse KL's, both in nats.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from taid import demo, objectives
from taid.comparison.results import Interval
from taid.losses.schedules import AutoSchedule

IDS, WIDTH, STEPS, BATCH = 512, 12, 300, 256  # the most frequent tokens; of the student; of a run
RATES, SEEDS = (5e-2, 1e-1, 2e-1, 4e-1), 5


class Before(NamedTuple):
    """The state of a run that a schedule is told before a step."""

    learned: float  # the share that is done of the sum of all learning rates
    step: int
    first: float  # the loss of the first step


Schedule = Callable[[Before], tuple[float | None, float]]  # t, or None for reverse KL; what the loss is multiplied by


def rising(start: float, full: float = 1.0, *, scales: bool = False) -> Schedule:
    """t from `start` to 1, which it reaches when the share `full` of the learning is done."""

    def schedule(before: Before) -> tuple[float, float]:
        t = start + (1 - start) * min(1.0, before.learned / full)
        return (1.0, t) if scales else (t, 1.0)

    return schedule


def constant(t: float) -> Schedule:
    return lambda before: (t, 1.0)


def falling(start: float, end: float, *, scales: bool = False) -> Schedule:
    def schedule(before: Before) -> tuple[float, float]:
        t = start + (end - start) * before.learned
        return (1.0, t) if scales else (t, 1.0)

    return schedule


def auto(before: Before) -> tuple[float, float]:
    rule = AutoSchedule(STEPS)
    state = rule.initial_state()
    return (rule.advance(replace(state, step=before.step - 1), before.first) if before.step else state).t, 1.0


SCHEDULES: dict[str, Schedule] = {
    "forward KL (t = 1)": constant(1.0),
    "reverse KL": lambda before: (None, 1.0),
    "t from 0.4 to 1": rising(0.4),
    "t from 0.4 to 1, scaled": rising(0.4, scales=True),
    "t from 0 to 1 at half-way": rising(0.0, 0.5),
    "t from 0 to 1 at half-way, scaled": rising(0.0, 0.5, scales=True),
    "t = 0.95": constant(0.95),
    "t = 0.9": constant(0.9),
    "t = 0.7": constant(0.7),
    "t = 0.5": constant(0.5),
    "t from 1 to 0.9": falling(1.0, 0.9),
    "t from 1 to 0.8": falling(1.0, 0.8),
    "t from 1.5 to 1": falling(1.5, 1.0),
    "t from 1.5 to 1, scaled": falling(1.5, 1.0, scales=True),
    "auto": auto,
}


def table() -> tuple[Tensor, Tensor]:
    """How frequent each token is, ``[V]``, and the log-probabilities of the next one, ``[V, V]``."""
    tokenizer = AutoTokenizer.from_pretrained(str(resources.files("taid") / "assets" / "teacher"))
    ids = torch.tensor(tokenizer("\n".join(demo.read("models")))["input_ids"])
    place = torch.full((len(tokenizer),), -1)
    place[ids.bincount(minlength=len(tokenizer)).topk(IDS).indices] = torch.arange(IDS)
    pairs = torch.stack([place[ids[:-1]], place[ids[1:]]])
    pairs = pairs[:, (pairs >= 0).all(0)]
    counts = torch.full((IDS, IDS), 0.05).index_put_(tuple(pairs), torch.ones(pairs.shape[1]), accumulate=True)
    return counts.sum(1) / counts.sum(), (counts / counts.sum(1, keepdim=True)).log()


class Student(nn.Module):
    """Logits of the next token from WIDTH numbers of this one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(IDS, WIDTH)
        self.hidden = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, IDS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.head(x + self.hidden(x))


def train(
    student: Student, frequency: Tensor, log_p: Tensor, schedule: Schedule | None, *, rate: float, beta2: float,
    seed: int, steps: int = STEPS,
) -> Student:  # fmt: skip
    """Without a schedule, on labels."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, betas=(0.9, beta2), weight_decay=0.0)
    first = 0.0
    decay = [0.5 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * decay[step]
        ids = torch.multinomial(frequency, BATCH, replacement=True, generator=generator)
        z_q, z_p = student(ids), log_p[ids]
        if schedule is None:
            labels = torch.multinomial(z_p.exp(), 1, generator=generator)[:, 0]
            loss = nn.functional.cross_entropy(z_q, labels)
        else:
            t, scale = schedule(Before(sum(decay[:step]) / sum(decay), step, first))
            terms = objectives.reverse_kl(z_q, z_p) if t is None else objectives.taid(z_q, z_p, t=t)
            loss = scale * terms.mean()
            first = first if step else float(terms.detach().mean())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    return student


@torch.no_grad()
def measure(student: Student, frequency: Tensor, log_p: Tensor) -> tuple[float, float]:
    """KL(p || q) and KL(q || p)."""
    z_q = student(torch.arange(IDS))
    both = (objectives.forward_kl(z_q, log_p), objectives.reverse_kl(z_q, log_p))
    return tuple(float(frequency @ terms) for terms in both)  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="leave bigram.md as it is")
    keep = parser.parse_args().keep
    torch.set_num_threads(1)
    frequency, log_p = table()
    begun = train(Student(), frequency, log_p, None, rate=1e-2, beta2=0.95, seed=99, steps=200).state_dict()
    begun = {name: tensor.clone() for name, tensor in begun.items()}

    def run(schedule: Schedule, rate: float, beta2: float, seed: int) -> tuple[float, float]:
        student = Student()
        student.load_state_dict(begun)
        return measure(train(student, frequency, log_p, schedule, rate=rate, beta2=beta2, seed=seed), frequency, log_p)

    student = Student()
    student.load_state_dict(begun)
    lines = ["before: KL(p ‖ q) {:.4f}, KL(q ‖ p) {:.4f}".format(*measure(student, frequency, log_p)), ""]
    print(lines[0], flush=True)
    for beta2 in (0.999, 0.95):
        head = ["schedule", "learning rate", "KL(p ‖ q)", "less forward KL's", "KL(q ‖ p)", "less forward KL's"]
        lines += [f"beta2 = {beta2}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        baseline: list[tuple[float, float]] = []
        for name, schedule in SCHEDULES.items():
            rate = min(RATES, key=lambda rate: run(schedule, rate, beta2, SEEDS)[0])
            found = [run(schedule, rate, beta2, seed) for seed in range(SEEDS)]
            baseline = baseline or found
            cells = [name, f"{rate:g}"]
            for place in (0, 1):
                values = [of[place] for of in found]
                less = [of[place] - other[place] for of, other in zip(found, baseline, strict=True)]
                cells += [f"{statistics.fmean(values):.4f}", Interval.from_values(less).text(4, sign=True)]
            lines.append(f"| {' | '.join(cells)} |")
            print(beta2, *cells, sep="  ", flush=True)
        lines.append("")
    if not keep:
        title = f"# A bigram table, a student too small\n\n`python benchmarks/evidence/bigram.py`; {date.today()}."
        (Path(__file__).parent / "bigram.md").write_text("\n".join([title, "", *lines]))


if __name__ == "__main__":
    main()
