"""``taid evaluate --speed``: size, memory and speed of a student, its teacher and the student in fewer bits.

Each row's figures come from a process of its own that holds only that model, so that memory and threads are its own.
The rows take turns, a round at a time, so that a disturbance of the machine meets all of them alike. The figures are
medians over the rounds.

`python -m taid.evaluation.inference_speed` is that process. Its one argument is a subject as JSON; the last line that
it prints is the figures.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer
from transformers.utils import cached_file, logging

from taid.models import loading
from taid.models.generation import generate, own_greedy_decoding

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 128, 64, 5


@dataclass(frozen=True)
class Subject:
    """A model to measure, and the bits of its weights if they are quantized as it is loaded."""

    name: str
    model: str
    bits: int | None = None


def measure(
    student: str, teacher: str | None = None, *, dtype: str = "auto", use_cpu: bool = False, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Measure a student, the same in 8 and 4 bits, and its teacher; greedy decoding of one sequence.

    Args:
        student: a folder or a Hub name.
        teacher: likewise; the ratios are to it.
        dtype: of all models; auto is bfloat16 on a GPU and float32 on a CPU.
        use_cpu: do not use a GPU.
        rounds: how often each is measured.

    Returns:
        `rows`, one a model: `name`, `bits`, and the figures in :data:`taid.artifacts.tables.SPEED`. Memory is the peak
        of resident memory on a CPU and of torch's allocations on a GPU; `model_memory_bytes` is the part that came
        after the libraries. `rounds` has the values of which the two times are the medians. A row that cannot be had
        has `not_available`, the reason. Beside them stand `prompt_tokens`, `new_tokens` and the `machine`.

    Raises:
        ValueError: a model cannot be loaded or is an adapter; says which and the remedy.
    """
    subjects = [Subject("teacher", teacher)] if teacher else []
    subjects += [Subject("student", student), *(Subject(f"student, {bits} bits", student, bits) for bits in (8, 4))]
    for subject in subjects:
        if (Path(subject.model).expanduser() / "adapter_config.json").is_file():
            raise ValueError(f"{subject.name} {subject.model} is an adapter, which is slower than what it is merged "
                             "into: taid export --format merged-lora first")  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {subject.name: [] for subject in subjects}
    reasons: dict[str, str] = {}
    machine: dict[str, Any] = {}
    for _ in range(rounds):
        for subject in subjects:
            if subject.name in reasons:
                continue
            figures, reason = _in_a_process(subject, dtype=dtype, use_cpu=use_cpu)
            if reason and subject.bits is None:
                raise ValueError(f"the speed of {subject.name} {subject.model} cannot be measured: {reason}")
            if reason:
                reasons[subject.name] = reason
            else:
                machine |= figures.pop("machine")
                found[subject.name].append(figures)
    rows = [
        {"name": subject.name, "bits": subject.bits}
        | ({"not_available": reasons[subject.name]} if subject.name in reasons else summary(found[subject.name]))
        for subject in subjects
    ]
    _count_once(rows)
    return {"rows": rows, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "machine": machine}


def summary(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of each figure over the rounds, and all rounds of the two times."""
    timed = ("first_token_seconds", "tokens_per_second")
    medians = {name: statistics.median(of[name] for of in figures) for name in figures[0]}
    return medians | {"rounds": {name: [of[name] for of in figures] for name in timed}}


def _count_once(rows: list[dict[str, Any]]) -> None:
    """Give quantized models the student's count: they pack several parameters into one number, and lie on no disk."""
    student = next(row for row in rows if row["name"] == "student")
    for row in rows:
        if row["bits"] is not None and "not_available" not in row:
            row |= {name: student[name] for name in ("parameters", "parameters_without_embeddings")}
            row["disk_bytes"] = None


# --- the process ------------------------------------------------------------------------------------------------------


def _in_a_process(subject: Subject, *, dtype: str, use_cpu: bool) -> tuple[dict[str, Any], str | None]:
    """Return figures, or the reason why there are none."""
    if subject.bits is not None and importlib.util.find_spec("bitsandbytes") is None:
        return {}, "bitsandbytes is not installed (pip install 'taid[quantized]')"
    asked = json.dumps(asdict(subject) | {"dtype": dtype, "use_cpu": use_cpu})
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "taid.evaluation.inference_speed", asked],
        capture_output=True, text=True, check=False,
        env=environment,
    )  # fmt: skip
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {}, lines[-1] if lines else f"its process ended with status {done.returncode}"
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures, None


def _figures(subject: Subject, dtype_name: str, device: str) -> dict[str, Any]:
    logging.disable_progress_bar()
    dtype = (
        {"cuda": torch.bfloat16, "cpu": torch.float32}[device] if dtype_name == "auto" else getattr(torch, dtype_name)
    )
    options: dict[str, Any] = {"dtype": dtype}
    if subject.bits is not None:
        quantized = loading.quantization_config(f"bnb_{subject.bits}bit", dtype)
        options |= {"quantization_config": quantized, "device_map": {"": device}}
        importlib.import_module("bitsandbytes")  # its share of the memory is not the model's
    before = _memory(device, peak=False)
    model = loading.load_model(subject.model, role=subject.name, **options).eval()
    if subject.bits is None:
        model.to(device)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions < PROMPT_TOKENS + NEW_TOKENS:
        raise ValueError(f"it has {positions} positions, and {PROMPT_TOKENS} + {NEW_TOKENS} are measured")

    ends = {
        id(weight): weight for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    }
    parameters = sum(weight.numel() for weight in model.parameters())
    folder = Path(str(cached_file(os.path.expanduser(subject.model), "config.json"))).parent
    sizes = {
        "parameters": parameters,
        "parameters_without_embeddings": parameters - sum(weight.numel() for weight in ends.values()),
        "disk_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "weight_bytes": model.get_memory_footprint(),
    }
    _generate(model, 8)  # what is made once is made here
    gc.collect()
    _reset_peak(device)
    first, speed = _generate(model, NEW_TOKENS)
    peak = _memory(device, peak=True)
    memory = {"memory_bytes": peak, "model_memory_bytes": peak - before}
    return sizes | memory | {"first_token_seconds": first, "tokens_per_second": speed}


class _Clock(BaseStreamer):  # type: ignore[misc]
    """Is given the prompt, then each token as it is there: generate copies it to the CPU for that."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: no text is left to show."""


def _generate(model: Any, new_tokens: int) -> tuple[float, float]:
    """Return seconds to the first token, and tokens a second after it."""
    prompt = [i % model.get_input_embeddings().weight.shape[0] for i in range(PROMPT_TOKENS)]
    config = own_greedy_decoding(model, padding=0)
    config.min_new_tokens = new_tokens
    clock = _Clock()
    start = time.perf_counter()
    generate(model, [prompt], config, max_new_tokens=new_tokens, streamer=clock)
    times = clock.times[1:]  # the first is the prompt's
    assert len(times) == new_tokens
    return times[0] - start, (new_tokens - 1) / (times[-1] - times[0])


def _memory(device: str, *, peak: bool) -> int:
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():  # Linux keeps ru_maxrss over exec: there it can be the parent's
        name = "VmHWM" if peak else "VmRSS"
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _reset_peak(device: str) -> None:
    """Forget the peak of loading, where the system can."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def _machine(dtype_name: str, device: str) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    packages = ["torch", "transformers", "taid"]
    packages += ["bitsandbytes"] if importlib.util.find_spec("bitsandbytes") else []
    auto = {"cuda": "bfloat16", "cpu": "float32"}[device]
    return {
        "name": torch.cuda.get_device_name() if device == "cuda" else f"{cpu}, {os.cpu_count()} cores",
        "device": device,
        "dtype": auto if dtype_name == "auto" else dtype_name,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
    }


def main() -> None:
    """Measure the subject in the argument, in this process."""
    asked = json.loads(sys.argv[1])
    device = "cuda" if torch.cuda.is_available() and not asked["use_cpu"] else "cpu"
    subject = Subject(asked["name"], asked["model"], asked["bits"])
    figures = _figures(subject, asked["dtype"], device)
    print("\n" + json.dumps(figures | {"machine": _machine(asked["dtype"], device)}))


if __name__ == "__main__":
    main()
