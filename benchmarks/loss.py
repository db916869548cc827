"""Time, peak memory and accuracy of the fused TAID loss against the floor, the plain formula and peers.

    python benchmarks/loss.py                       # timing: shapes B and A, float32 and bfloat16; on CUDA C, bfloat16
    python benchmarks/loss.py --allocator raised    # the same where glibc keeps the pages that are freed
    python benchmarks/loss.py --accuracy            # errors against float64 instead

A run adds its tables to benchmarks/results/loss.json (loss_gpu.json on CUDA), in the place of older ones of the same
processor, and writes the Markdown beside it anew.
Each method has a process of its own, which is told to run once a round and holds its tensors only while it does.

For Linux. N tokens, V ids, D and E widths of student and teacher.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from taid.losses.fused import fused_distillation_loss
from taid.losses.kernels import cpu_matmul, row_stage
from taid.losses.kernels.c_rows import _library
from taid.losses.kernels.head_matmul import HeadProducts, chunk_rows
from taid.losses.kernels.row_task import COLUMNS, Finish, RowTask


class Shape(NamedTuple):
    N: int
    V: int
    D: int
    E: int

    def __str__(self) -> str:
        return f"N = {self.N:,}, V = {self.V:,}, d_s = {self.D:,}, d_t = {self.E:,}"


SHAPES = {
    "A": Shape(2_048, 151_936, 896, 1_536),
    "B": Shape(4_096, 32_000, 512, 1_024),
    "C": Shape(8_192, 151_936, 1_536, 3_584),
    "tiny": Shape(2_100, 1_024, 64, 96),
}
SAMPLE = 32  # tokens, for a method that this CPU cannot afford in full
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RAISED = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
ALLOCATORS = {"default": "glibc's defaults", "raised": f"glibc's with {' and '.join(RAISED)} at 4 GB"}
T = 0.4
ON_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if ON_CUDA else "cpu"
SLOW_BFLOAT16 = not ON_CUDA and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Inputs(NamedTuple):
    student_hidden: Tensor  # [N, D]
    student_weight: Tensor  # [V, D]
    teacher_hidden: Tensor  # [N, E]
    teacher_weight: Tensor  # [V, E]
    labels: Tensor  # [N]

    def to(self, dtype: torch.dtype) -> Inputs:
        student, teacher = ([x.detach().to(dtype) for x in pair] for pair in (self[:2], self[2:4]))
        return Inputs(*(x.requires_grad_() for x in student), *teacher, self.labels)


# Noise in what the student sees of the teacher's signal, and how many times larger its logits are.
PAIRS = {"far": (0.5, 1.0), "near": (0.05, 1.0), "sharp": (0.05, 1.4)}


def make_inputs(shape: Shape, N: int, pair: str, dtype: torch.dtype) -> Inputs:
    """Two models that see one signal of 64 numbers through heads with one common factor."""
    torch.manual_seed(0)
    noise, sharpness = PAIRS[pair]
    teacher, other, factor = (torch.randn(rows, 64).to(DEVICE) for rows in (N, N, shape.V))
    student = (teacher + noise * other) * (sharpness * (1 + noise**2) ** -0.5)
    scale = 0.05 * torch.tensor(shape.V).log().item()  # entropies of 1 to 4 nats, whatever V is
    tensors = []
    for width, signal in ((shape.D, student), (shape.E, teacher)):
        basis = torch.linalg.qr(torch.randn(width, 64)).Q.t().to(DEVICE)
        tensors += [signal @ basis, factor @ basis * scale]
    return Inputs(*tensors, torch.randint(shape.V, (N,)).to(DEVICE)).to(dtype)


# The methods: a loss summed over tokens.


def fused_taid(x: Inputs) -> Tensor:
    return fused_distillation_loss(*x, "taid", t=T).loss


def plain_taid(x: Inputs) -> Tensor:
    student_NV = F.linear(x.student_hidden, x.student_weight)
    with torch.no_grad():
        teacher_NV = F.linear(x.teacher_hidden, x.teacher_weight)
        target_NV = F.softmax((1 - T) * student_NV + T * teacher_NV, dim=-1, dtype=torch.float32)
    log_q_NV = F.log_softmax(student_NV, dim=-1, dtype=torch.float32)
    return -torch.masked_fill(target_NV * log_q_NV, torch.isinf(student_NV), 0).sum(-1).sum()


def checkpointed_taid(x: Inputs, rows: int = 1024) -> Tensor:
    def of_chunk(student_hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
        return plain_taid(x._replace(student_hidden=student_hidden, teacher_hidden=teacher_hidden))

    chunks = zip(x.student_hidden.split(rows), x.teacher_hidden.split(rows), strict=True)
    return torch.stack([checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def liger_jsd(x: Inputs, compiled: bool = True) -> Tensor:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    return LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.1, compiled=compiled)(*x)


def trl_jsd(x: Inputs) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, teacher = (x.student_hidden, x.student_weight, None), (x.teacher_hidden, x.teacher_weight, None)
    return ChunkedDivergenceFunction.apply(*student, *teacher, 0.1)[0].sum()


METHODS: dict[str, tuple[str, Any]] = {
    "floor": ("floor: the products alone, PyTorch's", None),
    "floor-own": ("the same, those of `kernels/cpu_matmul.py`", None),
    "fused": ("**fused**", fused_taid),
    "fused-plain-torch": ("fused, plain torch (`TAID_NATIVE=0`)", fused_taid),
    "fused-half": ("fused, half of the tokens trained", fused_taid),
    "plain": ("plain formula", plain_taid),
    "checkpointed": ("plain formula, checkpointed by 1,024 tokens", checkpointed_taid),
    "liger": ("Liger JSD (another objective)", liger_jsd),
    "trl": ("TRL chunked divergence, JSD (another objective)", trl_jsd),
}
IN_BFLOAT16 = ("plain", "checkpointed", "liger")  # the methods that leave bfloat16 products to the CPU


class Method:
    def __init__(self, name: str) -> None:
        self.loss, self.words = METHODS[name][1], ""

    def load(self, x: Inputs) -> None:
        self.tensors = x

    def warm_up(self) -> None:
        try:
            self.both()
        except Exception as error:  # whatever a compiler may raise
            if self.loss is not liger_jsd:
                raise
            self.loss, self.words = (lambda x: liger_jsd(x, False)), f"compiled=False, else {type(error).__name__}. "
            self.both()
        self.forward()

    @torch.no_grad()
    def forward(self) -> None:
        self.loss(self.tensors)

    def both(self) -> None:
        torch.autograd.grad(self.loss(self.tensors), self.tensors[:2])


class Floor:
    """The products into memory that is there: logits of both, gradients of the hidden states and of the head."""

    def __init__(self, own: bool) -> None:
        self.own, self.rows, self.words = own and not ON_CUDA, 0, ""

    def load(self, x: Inputs) -> None:
        if SLOW_BFLOAT16 and x.student_weight.dtype == torch.bfloat16:
            self.words = self.words or native_rates(x)
            x = x.to(torch.float32)
        x, dtype = Inputs(*(tensor.detach() for tensor in x)), x.student_weight.dtype
        wide = torch.float32 if ON_CUDA else dtype  # as a loss wants logits and the sum of the head's gradients
        self.mixed = {"out_dtype": wide} if wide != dtype else {}
        logits_NV = torch.zeros(len(x.labels), len(x.student_weight), dtype=wide, device=DEVICE)
        d_weight = torch.zeros_like(x.student_weight, dtype=torch.float32 if self.own else wide)
        # Where the dtypes agree, the gradient is the same memory.
        self.tensors = x, logits_NV, logits_NV.to(dtype), torch.zeros_like(x.student_hidden), d_weight

    def warm_up(self) -> None:
        if not self.rows:
            N, seconds = len(self.tensors[0].labels), {}
            for self.rows in sorted({min(rows, N) for rows in (512, 1024, N)}):
                seconds[self.rows] = min(timed(self.both)[0] for _ in range(2))
            self.rows = min(seconds, key=seconds.__getitem__)
            tried = ", ".join(f"{rows:,} in {s:.4g} s" for rows, s in seconds.items())
            self.words += f"{self.rows:,} tokens at a time, the fastest of {tried}. "
        self.both()

    def forward(self, *, backward: bool = False) -> None:
        x, logits_NV, gradient_NV, d_hidden, d_weight = self.tensors
        for start in range(0, len(x.labels), self.rows):
            chunk = slice(start, start + self.rows)
            hidden, g = x.student_hidden[chunk], gradient_NV[chunk]
            for weight, states in ((x.student_weight, hidden), (x.teacher_weight, x.teacher_hidden[chunk])):
                if self.own:
                    cpu_matmul.project(states, weight, logits_NV[chunk])
                else:
                    torch.mm(states, weight.t(), out=logits_NV[chunk], **self.mixed)
            if backward and self.own:
                d_hidden[chunk] = cpu_matmul.project_back(g, x.student_weight)
                cpu_matmul.add_outer(d_weight, g, hidden, int(start > 0))
            elif backward:
                torch.mm(g, x.student_weight, out=d_hidden[chunk])
                if start == 0:
                    torch.mm(g.t(), hidden, out=d_weight, **self.mixed)
                else:
                    torch.addmm(d_weight, g.t(), hidden, out=d_weight, **self.mixed)

    def both(self) -> None:
        self.forward(backward=True)


def native_rates(x: Inputs) -> str:
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        h, w = x.student_hidden.detach()[:64].to(dtype), x.student_weight.detach()[:4096].to(dtype)
        g = h @ w.t()
        pairs = (h, w.t()), (g, w), (g.t(), h)
        seconds = [min(timed(lambda pair=pair: torch.mm(*pair))[0] for _ in range(3)) for pair in pairs]
        found.append(" / ".join(f"{2e-9 * g.numel() * h.shape[1] / s:.2g}" for s in seconds))
    return (
        f"operands converted to float32 beforehand, because on 64 tokens and {len(w):,} ids the products (logits / "
        f"gradient of hidden states / of the head) run at {found[0]} GFLOP/s in bfloat16 and {found[1]} in float32. "
    )


# One method in a process of its own.


def serve(name: str, shape: Shape, dtype: torch.dtype, allocator: str) -> None:
    """Run once for each line of standard input; answer with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    sampled = SLOW_BFLOAT16 and dtype == torch.bfloat16 and name in IN_BFLOAT16
    measured = not name.startswith("floor") and not sampled and allocator == "default"
    N = SAMPLE if sampled else shape.N
    method = Floor(name == "floor-own") if name.startswith("floor") else Method(name)
    for number, _ in enumerate(sys.stdin):
        try:
            x = make_inputs(shape, N, "far", dtype)
            if name == "fused-half":
                x.labels[1::2] = -100
            method.load(x)
            # By glibc's defaults large tensors are new pages every time. Where pages are kept, they have to be there.
            if number == 0 or allocator == "raised" or ON_CUDA:
                method.warm_up()
            answer = fused_sizes(x) if name.startswith("fused") else {}
            for key in ("forward", "both"):
                seconds, peak = timed(getattr(method, key), measured)
                answer[key] = seconds * shape.N / N, peak
            answer["words"] = method.words + (f"measured on {N} tokens, scaled to {shape.N:,}. " if sampled else "")
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        method.tensors = x = None
        give_back()
        print(json.dumps(answer), file=answers, flush=True)


def timed(run: Callable[[], object], measured: bool = False) -> tuple[float, float | None]:
    """Seconds of a run, and its peak memory above what was there before, in MB."""
    repeats, before, peak = 5 if ON_CUDA else 1, 0, None
    if ON_CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    elif measured:
        give_back()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        before = resident("VmRSS")
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    if ON_CUDA:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / repeats
    if measured:
        peak = ((torch.cuda.max_memory_allocated() if ON_CUDA else resident("VmHWM")) - before) / 1e6
    return seconds, peak


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def give_back() -> None:
    gc.collect()
    if ON_CUDA:
        torch.cuda.empty_cache()
    else:
        ctypes.CDLL(None).malloc_trim(0)


def fused_sizes(x: Inputs) -> dict[str, Any]:
    """Return the MB of the fused loss's gradients and of one model's logits, and what computes its rows."""
    V, trained = len(x.student_weight), int((x.labels != -100).sum())
    dtype = HeadProducts(x.student_weight, V, None, False).tile_dtype
    tile = chunk_rows(trained, V, dtype.itemsize, DEVICE) * V * dtype.itemsize
    rows = "a GPU's kernel" if ON_CUDA else "rows.c" if _library() else "plain torch"
    gradients = x.student_hidden.nbytes + x.student_weight.nbytes
    return {"gradients": gradients / 1e6, "tile": tile / 1e6, "rows": rows}


# Rounds: every method once, then every method again.


def run_rounds(shape: str, dtype: str, allocator: str, methods: list[str], rounds: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--shapes", shape, "--dtypes", dtype, "--allocator", allocator, "--serve"]
    environment = os.environ | (RAISED if allocator == "raised" else {})
    processes: dict[str, subprocess.Popen[str]] = {}
    raw: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    for number in range(rounds):
        for name in methods:
            if name not in processes:
                own = environment | ({"TAID_NATIVE": "0"} if name == "fused-plain-torch" else {})
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
                processes[name] = subprocess.Popen([*command, name], env=own, **pipes)
            if not raw[name] or "failed" not in raw[name][-1]:
                raw[name].append(ask(processes[name]))
                print(f"{shape} {dtype}, round {number + 1}: {name} {raw[name][-1]}", file=sys.stderr)
    for process in processes.values():
        process.communicate()  # closes its input, which ends it
    return {
        "shape": shape,
        "dtype": dtype,
        "processor": processor(),
        "allocator": allocator,
        "where": where(allocator),
        "raw": raw,
    }


def ask(process: subprocess.Popen[str]) -> dict[str, Any]:
    try:
        process.stdin.write("run\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())
    except (BrokenPipeError, json.JSONDecodeError):
        return {"failed": f"the process ended with status {process.wait()}"}


def processor() -> str:
    cpu = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(": ")[1] for line in cpu if line.startswith("model name")), platform.machine())
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


def where(allocator: str) -> str:
    """Command line, date, machine and versions."""
    memory = Path("/proc/meminfo").read_text().splitlines()
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    packages = [p for p in metadata.distributions() if p.name in ("torch", "triton", "trl", "liger_kernel")]
    parts = [
        f"`{' '.join(['python benchmarks/loss.py', *sys.argv[1:]])}`; {datetime.date.today()}",
        *([f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"] if ON_CUDA else []),
        f"{processor()}, {os.cpu_count()} cores, {int(memory[0].split()[1]) * 1024 / 1e9:.0f} GB",
        f"{torch.get_num_threads()} threads",
        f"allocator: {'PyTorch on CUDA' if ON_CUDA else ALLOCATORS[allocator]}",
        f"huge pages: {huge_pages.read_text().split('[')[1].split(']')[0] if huge_pages.exists() else 'unknown'}",
        ", ".join(f"{p.name} {p.version}" for p in packages),
        f"commit {subprocess.run(git, capture_output=True, text=True).stdout.strip()}",
    ]
    return "; ".join(parts)


# Accuracy

ERRORS = ("KL(p_t, q)", "cross-entropy", "dL/dlogits", "dL/dhidden", "dL/dhead")


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return what a product that adds up in float32 rounds to, also where the CPU's own takes minutes."""
    return (a.float() @ b.float()).to(a.dtype) if SLOW_BFLOAT16 and a.dtype == torch.bfloat16 else a @ b


def plain_values(x: Inputs, t: float, wide: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    x = Inputs(*(tensor.detach() for tensor in x))
    student_NV = product(x.student_hidden, x.student_weight.t()).requires_grad_()
    mixed_NV = (1 - t) * student_NV.detach() + t * product(x.teacher_hidden, x.teacher_weight.t())
    target, log_target = mixed_NV.softmax(-1, dtype=wide), mixed_NV.log_softmax(-1, dtype=wide)
    log_q = student_NV.log_softmax(-1, dtype=wide)
    cross_entropy = -(target * log_q).sum(-1).sum()
    (g,) = torch.autograd.grad(cross_entropy, student_NV, retain_graph=True)
    kl = (target * (log_target - log_q)).sum(-1).sum()
    return kl, cross_entropy, g, product(g, x.student_weight), product(g.t(), x.student_hidden)


def fused_values(x: Inputs, t: float) -> tuple[Tensor, ...]:
    result = fused_distillation_loss(*x, "taid", t=t)
    gradients = torch.autograd.grad(result.loss, x[:2])
    tiles = []
    for hidden, weight in (x[2:4], x[:2]):
        head = HeadProducts(weight.detach(), len(weight), None, False)
        tiles.insert(0, head.project(head.operand(hidden.detach()), head.tile(len(hidden))))
    task, columns = (
        RowTask.for_objective("taid", 1.0, {"t": t}, Finish(), Finish()),
        torch.empty(len(hidden), len(COLUMNS)),
    )
    g = row_stage(*tiles, x.labels, task, columns.to(DEVICE), gradient=head.operand_dtype)
    return result.loss, result.sums["target_cross_entropy"], g, *gradients


def measure_accuracy(shape: str, dtypes: list[str]) -> dict[str, Any]:
    rows = []
    for pair in PAIRS:
        for dtype in dtypes:
            x = make_inputs(SHAPES[shape], 128, pair, DTYPES[dtype])
            for t in (0.1, 0.4, 0.9):
                truth = plain_values(x.to(torch.float64), t, torch.float64)
                row: dict[str, Any] = {"pair": pair, "dtype": dtype, "t": t}
                for name, values in (("plain", plain_values), ("fused", fused_values)):
                    both = zip(values(x, t), truth, strict=True)
                    row[name] = [((found.double() - true).norm() / true.norm()).item() for found, true in both]
                print(f"{shape} {row}", file=sys.stderr)
                rows.append(row)
    return {"shape": shape, "where": where("default"), "rows": rows}


# Markdown

INTRODUCTION = f"""# The TAID loss: time, peak memory, accuracy

`benchmarks/loss.py` writes this page; the seconds of every round are in the JSON file beside it. TAID at t = {T} from
hidden states and heads, with the gradients of the student's hidden states and head.

- Floor: the four products alone, into memory that is there, by `torch.mm` and `torch.addmm`; below it by what the fused
  loss calls, without its chunks. Every method has a process of its own and its turn in every round; seconds are
  medians, ratios medians of those within a round.
- Forward is without gradients, where the floor is the logits of both. Liger forms its gradients there too.
- Peak memory is above the inputs and with the gradients. A tile is what the fused loss holds of one model's logits; the
  head's gradient adds up in float32, so in bfloat16 it takes twice the bytes that are returned.
- Plain formula: as the official code computes it, logits of all tokens, mixture in their dtype, float32 softmax.
- Liger and TRL compute the generalised JSD (beta 0.1), another objective: they are here for what their frames cost.
- ~: measured on {SAMPLE} tokens and scaled, because this CPU has no bfloat16 products.
- Accuracy: relative error (of norms) against float64 on the same rounded operands. The student sees the teacher's
  signal with noise of 0.5 (far), 0.05 (near), 0.05 and logits 1.4 times as large (sharp). Where a CPU has no bfloat16
  products, the plain formula's are float32 ones, rounded, which is what its own give.
"""


def shown(value: float | None, form: str, mark: str = "") -> str:
    return "not measured" if value is None else mark + format(value, form)


def timing_table(run: dict[str, Any]) -> list[str]:
    done = {name: [answer for answer in run["raw"].get(name, []) if "both" in answer] for name in METHODS}

    def ratio(name: str, to: str, key: str) -> float | None:
        ratios = [a[key][0] / b[key][0] for a, b in zip(done[name], done[to], strict=False)]
        return median(ratios) if ratios else None

    def peak(name: str, key: str = "both") -> float | None:
        return max((answer[key][1] for answer in done[name] if answer[key][1]), default=None)

    columns = (
        "method | forward, s | x floor | peak, MB | forward + backward, s | x floor | x fused | peak, MB | x plain's"
    )
    lines, notes = [f"| {columns} | above gradients, in tiles |", "|---" * 10 + "|"], []
    for name, (words, _) in METHODS.items():
        last = (run["raw"].get(name) or [{}])[-1]
        note = last.get("words") or last.get("failed") or ""
        mark, mine, plain = "~" if "scaled" in note else "", peak(name), peak("plain")
        cells = [words]
        for key, others in (("forward", ["floor"]), ("both", ["floor", "fused"])):
            cells.append(shown(median(answer[key][0] for answer in done[name]) if done[name] else None, ".4g", mark))
            cells += [shown(ratio(name, to, key), ".3f", mark) for to in others]
            cells.append(shown(peak(name, key), ",.0f"))
        cells += [shown(mine / plain if mine and plain else None, ".3f"), ""]
        if "tile" in last:
            cells[-1] = shown((mine - last["gradients"]) / last["tile"] if mine else None, ".2f")
            note += (
                f"{last['gradients']:,.1f} MB of gradients, tiles of {last['tile']:,.1f} MB, rows by {last['rows']}. "
            )
        if name.startswith("floor"):
            cells = [cell if cell != "not measured" else "" for cell in cells]
        lines.append(f"| {' | '.join(cells)} |")
        notes += [f"- {words.split(':')[0]}: {note.strip()}"] if note else []
    title = (
        f"## {run['shape']}, {run['dtype']}, {run['processor']}, allocator {run['allocator']}: {SHAPES[run['shape']]}"
    )
    rounds = max(len(answers) for answers in run["raw"].values())
    return [title, "", f"{run['where']}; {rounds} rounds", "", *lines, "", *notes, ""]


def accuracy_table(run: dict[str, Any]) -> list[str]:
    lines = [f"| pair | dtype | t | {' | '.join(ERRORS)} |", "|---" * (3 + len(ERRORS)) + "|"]
    for row in run["rows"]:
        errors = [f"{plain:.1e} / {fused:.1e}" for plain, fused in zip(row["plain"], row["fused"], strict=True)]
        lines.append(f"| {row['pair']} | {row['dtype']} | {row['t']} | {' | '.join(errors)} |")
    title = f"## Accuracy, {run['shape']}: {SHAPES[run['shape']]._replace(N=128)}"
    return [title, "", "Plain formula / fused. " + run["where"], "", *lines, ""]


def write(path: Path, stored: dict[str, dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(stored) + "\n")
    lines = [INTRODUCTION]
    for table, runs in ((timing_table, stored["timing"]), (accuracy_table, stored["accuracy"])):
        for run in runs.values():
            lines += table(run)
    if not ON_CUDA and not (path.parent / "loss_gpu.md").exists():
        lines.append(f"## C, bfloat16, on an NVIDIA GPU: {SHAPES['C']}\n\nnot measured\n")
    path.write_text("\n".join(lines))
    return path.read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["C"] if ON_CUDA else ["B", "A"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"] if ON_CUDA else list(DTYPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--allocator", choices=ALLOCATORS, default="default")
    parser.add_argument("--accuracy", action="store_true")
    default = Path(__file__).parent / "results" / ("loss_gpu.md" if ON_CUDA else "loss.md")
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--serve", choices=METHODS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        return serve(given.serve, SHAPES[given.shapes[0]], DTYPES[given.dtypes[0]], given.allocator)

    path = given.output.with_suffix(".json")
    stored = json.loads(path.read_text()) if path.exists() else {"timing": {}, "accuracy": {}}
    for shape in given.shapes:
        if given.accuracy:
            stored["accuracy"][shape] = measure_accuracy(shape, given.dtypes)
            write(given.output, stored)
        for dtype in [] if given.accuracy else given.dtypes:
            run = run_rounds(shape, dtype, given.allocator, given.methods, given.rounds)
            stored["timing"][f"{shape} {dtype} {given.allocator} {processor()}"] = run
            write(given.output, stored)  # what is done is kept, whatever comes
    print(given.output.read_text())


if __name__ == "__main__":
    main()
