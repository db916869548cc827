"""A plan in words, as ``taid plan`` prints it."""

from __future__ import annotations

import math

import torch

from taid.models.loading import is_vision_language
from taid.planning.footprint import STATES, Layout, Size
from taid.planning.plan import USABLE, UTILISATION, CacheSize, Memory, Plan, Run, Time
from taid.planning.recipe import Recipe, Rows

_PARTS = ("weights", "gradients", "optimizer", "activations", "buffers", "teacher")


def plan_text(plan: Plan) -> str:
    """Return a plan as lines of text."""
    recipe = plan.recipe
    lines = [_student(recipe, plan.student)]
    if plan.teacher is not None:
        lines += [_teacher(recipe, plan.teacher, plan.teacher_dtype)]
    lines += ["", *_memory(recipe, plan.memory), "", *_run(recipe, plan.run)]
    if plan.caches:
        lines += ["", *_caches(plan.rows, plan.caches)]
    return "\n".join(lines)


def _student(recipe: Recipe, student: Size) -> str:
    adapter = "" if student.peft_config is None else f", {student.trained:,} of an adapter are trained"
    return f"student: {recipe.model.model_name_or_path}, {student.weights:,} weights{adapter}"


def _teacher(recipe: Recipe, teacher: Size, dtype: torch.dtype) -> str:
    text = teacher.config.get_text_config()
    return (
        f"teacher: {recipe.args.teacher_model_name_or_path}, {teacher.weights:,} weights, hidden states of "
        f"{text.hidden_size:,} numbers in {str(dtype).removeprefix('torch.')}, {text.vocab_size:,} output rows"
    )


# --- memory -----------------------------------------------------------------------------------------------------------


def _memory(recipe: Recipe, memory: Memory) -> list[str]:
    if memory.untraced is not None:
        return [f"memory: not known for {recipe.model.model_name_or_path} ({memory.untraced})"]
    lines = ["memory of each process at the fullest moment of a step:", ""]
    if memory.of_cache is not None:
        lines = [f"memory of taid cache: {_size(memory.of_cache)}, teacher's and student's weights", *lines]
    lines += [f"  {'engine':8}{'teacher':16}" + "".join(f"{name:>12}" for name in (*_PARTS, "in all"))]
    for layout, parts in memory.held.items():
        total = sum(parts.values())
        cells = "".join(f"{_size(number):>12}" for number in (*(parts.get(name, 0) for name in _PARTS), total))
        verdict = "" if not recipe.gpus or math.isnan(total) else "  fits" if total <= memory.usable else "  too much"
        lines += [f"  {layout.engine:8}{layout.placement:16}{cells}{verdict}"]
    return [*lines, "", *_left_out(memory), *_advice(recipe, memory)]


def _left_out(memory: Memory) -> list[str]:
    """Say what the table does not contain."""
    footprint, lines = memory.footprint, []
    if footprint.optimizer not in STATES:
        lines += [f"the state of {footprint.optimizer} is not known here"]
    if is_vision_language(footprint.student.config):
        lines += ["activations are those of text: what images add is not known here"]
    return lines


def _advice(recipe: Recipe, memory: Memory) -> list[str]:
    """Name the first layout that fits, or what would make one fit."""
    if not recipe.gpus or not memory.is_known:
        return []
    card = f"{recipe.gpu_memory:g} GB, of which {USABLE:.0%} can be used"
    if (layout := memory.first_that_fits()) is not None:
        return [f"the first that fits into {card}: {_switches(layout)}"]
    return [
        f"none fits into {card}. The smallest of them ({_switches(memory.smallest())}) would hold, with",
        *(f"  {_size(least):>9}  {change}" for change, least in memory.remedies.items()),
        f"  {_size(memory.all_remedies):>9}  all of this",
    ]


def _switches(layout: Layout) -> str:
    engine = [] if layout.engine == "none" else [f"--accelerate_config {layout.engine}"]
    where = [] if layout.placement == "elsewhere" else [f"--teacher_placement {layout.placement}"]
    return " ".join(engine + where) or "one process"


# --- steps, tokens, FLOPs, hours --------------------------------------------------------------------------------------


def _run(recipe: Recipe, run: Run) -> list[str]:
    lines = [
        f"a step: {run.rows_of_step:,} rows ({run.batch} a device x {run.accumulation} micro-batches x {run.devices} "
        f"device{'s' * (run.devices > 1)})"
    ]
    if run.steps is None:
        return [*lines, f"run: how many rows {recipe.data.names[0]} has is not known here: set max_steps to plan it"]
    lines += [f"run: {run.steps:,} steps, {run.bound}{run.tokens:,} tokens"]
    if run.schedule is not None:
        lines += [run.schedule]
    a_token = sum(run.flops.values())
    formula = " + ".join(f"{name} ({value / 1e9:.3g})" for name, value in run.flops.items())
    lines += [f"compute: {formula} = {a_token / 1e9:.3g} GFLOP a token, {a_token * run.tokens:.3g} in all"]
    lines += [_time(run, time) for time in run.times]
    sampled = (
        ["(without the time in which answers are sampled, which is not planned)"] if recipe.args.samples_answers else []
    )
    return lines + sampled


def _time(run: Run, time: Time) -> str:
    number = f"{time.hours:,.0f}" if time.hours >= 100 else f"{time.hours:.2g}"
    return (
        f"time of {time.command}: {time.bound}{number} hours on {run.devices} {run.device.name} at {UTILISATION:.0%} "
        f"of {run.device.peak / 1e12:g} TFLOP/s ({run.device.precision}), "
        f"{time.tokens / time.hours / 3600:,.0f} tokens a second"
    )


# --- disk -------------------------------------------------------------------------------------------------------------


def _caches(rows: Rows, caches: tuple[CacheSize, ...]) -> list[str]:
    at_most = "" if rows.counted else "at most "
    return [
        *(f"{name}: {n:,} different rows, {at_most}{trained:,} trained tokens"
          for name, (n, trained) in rows.distinct.items()),
        "",
        f"{'a cache of' + (', at most' if at_most else ''):33}{'bytes a token':>15}{'size':>12}",
        *(f"{_format(cache):33}{cache.bytes_of_token:15,.0f}{_size(cache.bytes_of_cache):>12}" for cache in caches),
    ]  # fmt: skip


def _format(cache: CacheSize) -> str:
    name, found = cache.format.name, cache.distinct
    if name == "top_k":
        return f"top_k, k = {cache.format.k}"
    if name == "sampled":
        return f"sampled, {cache.format.draws} draws, " + ("at most" if found is None else f"about {found:g} ids")
    return name


def _size(number: float) -> str:
    if not number or math.isnan(number):
        return "?" if number else "-"
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"
