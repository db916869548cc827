"""Run ``taid compare``: methods x seeds from one start on the same batches, each tuned alike, in one table.

    the teacher's cache -> a grid of learning rates, judged on validation rows -> all seeds -> the test rows, once

    DIR/comparison.yaml    what is compared; another comparison is refused
    DIR/cache/             the teacher's answers, where a cache can replace it
    DIR/runs/NAME/         each run, as `taid train` leaves it           DIR/logs/NAME.log
    DIR/results/NAME.json  the result of a finished run
    DIR/comparison.json, .csv, .md, .html, curves.json

Each run is a process of its own, forked from one that has loaded the libraries. It shares no state or memory with other
runs. A run with a result is not repeated. A run that was killed continues from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from taid.artifacts import run_folder
from taid.comparison import results
from taid.comparison.plan import ComparisonPlan, Run, arguments_of
from taid.comparison.workers import Job, Workers
from taid.config.data import DataArguments
from taid.config.parsing import configured, quiet_logs
from taid.config.training import TAIDConfig
from taid.data.files import local_files
from taid.data.images import has_images
from taid.data.loading import load_rows
from taid.evaluation import evaluate
from taid.evaluation.answers import prompted
from taid.evaluation.options import parse as evaluation_options
from taid.teachers import cache_manifest
from taid.teachers.cache import file_digest
from taid.training.run import cache, train

_SETTINGS, _RECIPE, _CACHE, _REFERENCES = "comparison.yaml", "recipe.yaml", "cache", "before.json"


def compare(plan: ComparisonPlan, data: DataArguments, args: TAIDConfig) -> results.ComparisonResults:
    """Do the missing runs and measurements of a comparison, and write its tables and page.

    Raises:
        ValueError: the folder holds another comparison or other files, or a run fails; names it and says why. Finished
            runs stay.
    """
    rows = _check_rows(plan, data, args)
    with run_folder.claimed(plan.folder):
        plan = _claim(plan, data)
        workers = Workers(plan.folder / "logs", plan.processes)
        shared = plan.arguments if has_images(rows) else _with_cache(plan, data, args, workers)

        def do(jobs: list[Job], what: str) -> None:
            if jobs:
                print(f"{what}: {len(jobs)}", flush=True)
            workers.do(jobs)

        tried = plan.learning_rates if len(plan.learning_rates) > 1 else []
        grid = [Run(m, plan.seeds[0], rate, options) for rate in tried for m, options in plan.methods.items()]
        do(_trainings(plan, grid, shared), "runs to choose learning rates by")
        rates = {method: _learning_rate(plan, method, grid) for method in plan.methods}
        runs = [Run(m, seed, rates[m], options) for seed in plan.seeds for m, options in plan.methods.items()]
        do(_trainings(plan, runs, shared), f"runs of {len(plan.methods)} methods, {len(plan.seeds)} seeds")
        do(_tests(plan, runs, data, args), "models to measure on held-out rows")
        found = results.ComparisonResults.from_runs(
            [_result(plan, run) for run in runs], baseline=plan.baseline, rows=plan.test or str(data.eval_dataset_name),
            select=plan.select if grid else None, grid=[_result(plan, run) for run in grid],
            references=_references(plan),
        )  # fmt: skip
        results.write(found, plan.folder)
    return found


def _check_rows(plan: ComparisonPlan, data: DataArguments, args: TAIDConfig) -> Any:
    """Load the rows that will be measured, and check them before hours are spent on runs.

    Raises:
        ValueError: rows have no prompt, and a method needs one; names the methods.
    """
    rows = load_rows(
        plan.test or str(data.eval_dataset_name), config=data.dataset_config, split=data.dataset_test_split,
        text_field=args.dataset_text_field,
    )  # fmt: skip
    if plan.generate:
        prompted(rows, plan.generate, plan.test or str(data.eval_dataset_name))
    sampled = [method for method, options in plan.methods.items() if _is_sampled(plan, options)]
    if sampled and not ({"prompt", "input_ids"} & set(rows.column_names) or args.assistant_only_loss):
        # Training rows have the same form. Each run checks its own, but the first of these runs may be hours away.
        raise ValueError(
            f"{', '.join(sampled)} let answers to prompts be written, and the rows have `{rows.column_names[0]}`, "
            "all of which is trained: give rows with prompt and completion, messages with assistant_only_loss: true, "
            "or leave these methods away"
        )
    return rows


# --- the folder -------------------------------------------------------------------------------------------------------


def _claim(plan: ComparisonPlan, data: DataArguments) -> ComparisonPlan:
    """Write what is compared, or check it against what was written before; methods, seeds and rates may be added.

    Returns:
        The plan with a copy of the recipe, so that changes to its file do not affect later runs.
    """
    path = plan.folder / _SETTINGS
    now = plan.recipe | {"test": plan.test} | {f"method {name}": options for name, options in plan.methods.items()}
    for name in (*data.names, data.eval_dataset_name, plan.test):
        if name is not None and not data.streaming:
            now |= {f"content of {file}": file_digest(file) for file in local_files(name)}
    before: dict[str, Any] = {}
    if path.exists():
        before = _settings(path)
    elif any(plan.folder.iterdir()):
        raise ValueError(f"output_dir {plan.folder} holds files that are no comparison: choose another folder")
    for name in [name for name in before if name in now and before[name] != now[name]]:
        raise ValueError(
            f"output_dir {plan.folder} holds a comparison with {name}: {before[name]}, and this one has {now[name]}: "
            "choose another folder"
        )
    for name in ("runs", "logs", "results"):
        (plan.folder / name).mkdir(exist_ok=True)
    run_folder.write_atomically(path, yaml.safe_dump(before | now, sort_keys=False))
    arguments = [part for argument in plan.arguments for part in _split(argument)]
    if "--config" in arguments:
        place = arguments.index("--config") + 1
        run_folder.write_atomically(plan.folder / _RECIPE, Path(arguments[place]).read_bytes())
        arguments[place] = str(plan.folder / _RECIPE)
    return replace(plan, arguments=arguments)


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is truncated or damaged, so nobody knows what was compared: choose another folder")
    return found


def _split(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


def _path(plan: ComparisonPlan, run: Run) -> Path:
    return plan.folder / "results" / f"{run.name}.json"


def _result(plan: ComparisonPlan, run: Run) -> dict[str, Any]:
    path, found = _path(plan, run), None
    with contextlib.suppress(ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not {"run", "method", "seed"} <= found.keys():
        raise ValueError(f"{path} is truncated or damaged: delete it, and the run is done again")
    return found


def _learning_rate(plan: ComparisonPlan, method: str, grid: list[Run]) -> float | None:
    """Return the learning rate with the lowest validation loss of this method; the recipe's if no grid was searched."""
    if not grid:
        return plan.learning_rates[0] if plan.learning_rates else None
    found = {run: _result(plan, run) for run in grid if run.method == method}
    losses = {
        run.learning_rate: result["validation"][plan.select]
        for run, result in found.items()
        if "diverged" not in result
    }
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise ValueError(f"{method} has diverged at every one of --learning_rates: add smaller ones")
    return min(finite, key=finite.__getitem__)


# --- the work ---------------------------------------------------------------------------------------------------------


def _with_cache(plan: ComparisonPlan, data: DataArguments, args: TAIDConfig, workers: Workers) -> list[str]:
    """Return the recipe's arguments, with a cache in place of the teacher where that is possible."""
    is_local = args.teacher_server_url is None and args.teacher_cache is None
    is_for_none = all(_is_sampled(plan, options) for options in plan.methods.values())
    if not is_local or data.streaming or args.packing or not args.fused or is_for_none:
        return plan.arguments
    if args.teacher_model_name_or_path is None:
        return plan.arguments
    folder, mark = plan.folder / _CACHE, plan.folder / "results" / "cache.json"
    arguments = [*plan.arguments, "--teacher_cache", str(folder)]
    if not mark.exists() or not (folder / cache_manifest.FILE).exists():
        whole = ["--objective", "taid", "--sampling", "none", "--seq_kd", "false", "--teacher_cache_format", "hidden"]
        workers.do([("cache", _cache, ([*arguments, *whole], mark))])
    return arguments


def _is_sampled(plan: ComparisonPlan, options: dict[str, Any]) -> bool:
    """Return whether a method samples answers in training, which no cache can hold."""
    return any((plan.recipe | options)[name] not in ("none", False) for name in ("sampling", "seq_kd"))


def _trainings(plan: ComparisonPlan, runs: list[Run], shared: list[str]) -> list[Job]:
    jobs: list[Job] = []
    for run in runs:
        folder, result = plan.folder / "runs" / run.name, _path(plan, run)
        if result.exists():
            _result(plan, run)  # raise now if it cannot be read, not after hours
            continue
        start = plan.arguments if _is_sampled(plan, run.options) else shared
        arguments = [*start, *arguments_of(run.options), "--output_dir", str(folder)]
        arguments += ["--seed", str(run.seed), "--data_seed", str(run.seed)]
        arguments += [] if run.learning_rate is None else ["--learning_rate", repr(run.learning_rate)]
        can_go_on = _can_go_on(folder)
        arguments += ["--resume_from_checkpoint", str(can_go_on).lower()]  # whatever the recipe says
        arguments += [] if can_go_on else ["--overwrite_output_dir", "true"]
        facts = {"method": run.method, "seed": run.seed, "learning_rate": run.learning_rate, "run": run.name}
        jobs.append((run.name, _train, (arguments, folder, result, facts)))
    return jobs


def _can_go_on(folder: Path) -> bool:
    """Return whether a run that was killed left a checkpoint to continue from."""
    checkpoint = run_folder.last_checkpoint(folder) if folder.exists() else None
    if checkpoint is None:
        return False
    try:
        run_folder.check_resumable(checkpoint)
    except (ValueError, OSError):
        return False
    return True


def _tests(plan: ComparisonPlan, runs: list[Run], data: DataArguments, args: TAIDConfig) -> list[Job]:
    """Return the jobs that measure the test rows with ``taid evaluate``; nothing else reads these rows."""
    is_remote = args.teacher_server_url or args.teacher_cache  # it may not fit into this machine's memory
    options: dict[str, Any] = {
        "teacher": None if is_remote else args.teacher_model_name_or_path,
        "data": plan.test or data.eval_dataset_name,
        "dataset_config": data.dataset_config, "split": data.dataset_test_split, "max_length": args.max_length or 2**30,
        "dataset_text_field": args.dataset_text_field, "chat_template_path": args.chat_template_path,
        "batch_size": args.per_device_eval_batch_size, "generate": plan.generate or None,
        "max_new_tokens": 256 if plan.generate else None,
    }  # fmt: skip
    flags = [f"--{name}" for name in ("use_cpu", "assistant_only_loss") if getattr(args, name)]
    shared = [*arguments_of({name: value for name, value in options.items() if value is not None}), *flags]
    jobs: list[Job] = []
    references = plan.folder / "results" / _REFERENCES
    # With the teacher's tokenizer, the student's rows would differ before and after training.
    if args.tokenizer_from == "student" and not _is_measured(references, plan.generate):
        jobs.append(("before.test", _test, ([plan.recipe["model_name_or_path"], *shared], references, plan.generate)))
    for run in runs:
        path = _path(plan, run)
        if "diverged" not in _result(plan, run) and not _is_measured(path, plan.generate):
            arguments = [str(plan.folder / "runs" / run.name), *shared, "--student_only"]
            jobs.append((f"{run.name}.test", _test, (arguments, path, plan.generate)))
    return jobs


def _is_measured(result: Path, generate: int) -> bool:
    return result.exists() and json.loads(result.read_text(encoding="utf-8")).get("generate") == generate


def _references(plan: ComparisonPlan) -> dict[str, dict[str, Any]]:
    """Return the measurements of the untrained student and the teacher, as far as there are any."""
    path = plan.folder / "results" / _REFERENCES
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    before = {kind: found[kind] for kind in ("held_out", "generations") if kind in found}
    teacher = {"held_out": found["teacher"]} if found.get("teacher") else {}
    return {name: numbers for name, numbers in (("student before", before), ("teacher", teacher)) if numbers}


def _cache(arguments: list[str], mark: Path) -> None:
    cache(*configured(arguments, "cache"))
    run_folder.write_atomically(mark, "{}\n")


def _train(arguments: list[str], folder: Path, result: Path, facts: dict[str, Any]) -> None:
    try:
        train(*configured(arguments))
    except FloatingPointError as error:  # also a result: the method diverges at this learning rate
        run_folder.write_atomically(result, json.dumps(facts | {"diverged": str(error)}, indent=2) + "\n")
        return
    rows = run_folder.read_metrics(folder)
    evaluated = _saved_evaluation(folder, [row for row in rows if "eval_cross_entropy" in row])
    validation = {name.removeprefix("eval_"): v for name, v in evaluated.items() if name.startswith("eval_")}
    seconds = next(row["seconds"] for row in reversed(rows) if "seconds" in row)
    found = facts | {"validation": validation, "seconds": seconds, "memory_gb": _peak_memory() / 1e9}
    if shares := [row["sampled"] for row in rows if "sampled" in row]:
        found["sampled"] = sum(shares) / len(shares)
    run_folder.write_atomically(result, json.dumps(found, indent=2) + "\n")


def _saved_evaluation(folder: Path, evaluated: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the evaluation of the saved student: the last one, or the best with load_best_model_at_end."""
    settings = yaml.safe_load((folder / run_folder.CONFIG).read_text(encoding="utf-8"))
    if not evaluated or not settings["load_best_model_at_end"]:
        return evaluated[-1] if evaluated else {}
    name = "eval_" + (settings["metric_for_best_model"] or "loss").removeprefix("eval_")
    later = [row for row in evaluated if row["step"] > 0]
    return (max if settings["greater_is_better"] else min)(later, key=lambda row: row[name])


def _test(arguments: list[str], result: Path, generate: int) -> None:
    output = result.with_suffix(".test.json")
    for path in (output, output.with_suffix(".generations.jsonl")):  # from a run that was killed
        path.unlink(missing_ok=True)
    quiet_logs()
    evaluate.run(evaluation_options([*arguments, "--output", str(output)]))
    measured = json.loads(output.read_text(encoding="utf-8"))
    known = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    known.pop("generations", None)  # from another number of prompts
    found = known | {"generate": generate}
    if "teacher" in measured["held_out"]:
        found["teacher"] = measured["held_out"]["teacher"]
    for kind in ("held_out", "generations"):
        if kind in measured:
            found[kind] = measured[kind]["student"]
    run_folder.write_atomically(result, json.dumps(found, indent=2) + "\n")


def _peak_memory() -> float:
    """Return the peak memory in bytes: the GPU's if one was used, else this process's; NaN if unknown."""
    import torch

    if torch.cuda.is_available() and (held := torch.cuda.max_memory_allocated()):
        return float(held)
    try:
        import resource
    except ImportError:  # on Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024.0)
