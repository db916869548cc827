"""Keep the outcome of a run, a comparison and a plan, and tell two outcomes apart."""

import hashlib
import json
import math
import platform
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

OF_A_STEP = ("loss", "grad_norm", "t", "kl", "cross_entropy", "num_tokens", "sampled")
OF_THE_MACHINE = ("seconds", "memory_gb")
TOLERANCE = 1e-6  # on another machine than the recorded one
PACKAGES = "torch transformers trl accelerate peft datasets tokenizers numpy".split()


def of_run(folder):
    """Numbers of each step and of the last evaluation, and a digest of the weights."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = {f"step {row['step']}": {n: row[n] for n in OF_A_STEP if n in row} for row in rows if "loss" in row}
    evaluated = [row for row in rows if "eval_loss" in row]
    held_out = {f"step {row['step']}": {n: v for n, v in row.items() if n.startswith("eval_")} for row in evaluated}
    return {**steps, "held out": held_out, "weights": _digest(folder)}


def of_comparison(folder):
    """Everything in the table and of its runs, but for time and memory."""
    found = json.loads((folder / "comparison.json").read_text())
    weights = {path.name: _digest(path) for path in sorted((folder / "runs").iterdir())}
    return {**_without_machine(found), "weights": weights}


def machine():
    """Return all that numbers may depend on in their last digits."""
    from importlib.metadata import version

    cpu = Path("/proc/cpuinfo")
    found = dict(re.findall(r"^(model name|flags|Features)\s*: (.*)$", cpu.read_text(), re.M)) if cpu.exists() else {}
    flags = " ".join(sorted((found.get("flags") or found.get("Features") or "").split()))
    return {
        "cpu": found.get("model name", platform.processor()),
        "cpu flags": hashlib.sha256(flags.encode()).hexdigest()[:16],
        "torch uses": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()} {'-'.join(platform.libc_ver())}",
        "packages": {name: version(name) for name in PACKAGES},
    }


def differences(expected, found, *, exact, where=""):
    """A line for each number that is another one: where it stands, what it was, what it is."""
    if isinstance(expected, dict) and isinstance(found, dict):
        lines = [f"{where}{name}: was there, is missing" for name in expected.keys() - found.keys()]
        lines += [f"{where}{name}: was not there" for name in found.keys() - expected.keys()]
        for name in sorted(expected, key=lambda name: not name.startswith("step")):  # what came first, first
            if name in found and (exact or name != "weights"):
                lines += differences(expected[name], found[name], exact=exact, where=f"{where}{name}, ")
        return lines
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(expected, found, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, exact=exact, where=f"{where}{i}, ")]
    if _is_same(expected, found, exact):
        return []
    return [f"{where.removesuffix(', ')}: was {expected!r}, is {found!r}"]


def _is_same(expected, found, exact):
    if exact or not isinstance(expected, float) or not isinstance(found, float):
        return expected == found
    return math.isclose(expected, found, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _digest(folder):
    """Digest names, types, shapes and bytes of all weights; what else a file holds may change."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        for name, weight in sorted(load_file(path).items()):
            digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
            digest.update(weight.flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _without_machine(value):
    if isinstance(value, dict):
        return {name: _without_machine(of) for name, of in value.items() if name not in OF_THE_MACHINE}
    return [_without_machine(of) for of in value] if isinstance(value, list) else value
