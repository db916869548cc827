"""How much of a teacher does each process hold? Peak of resident memory over that before the teacher was read.

    python benchmarks/sharded_teacher.py [--layers 24] [--width 1024] [--processes 1 2 4] [--out runs/sharded_teacher]

A random Llama is written to a folder and read in each of N processes as a run reads it, with teacher_placement sharded
and replicated; then it answers for four batches. Two peaks over what the process had before: of memory of its own, and
with pages of the files in it, which stay there as long as the machine has room for them. glibc is told to give freed
pages back at once (MALLOC_MMAP_THRESHOLD_).

The table goes to benchmarks/results/sharded_teacher.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "sharded_teacher.md"


def resident() -> tuple[int, int]:
    """Bytes of memory of its own, and with pages of files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, files = (1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssFile"))
    return own, own + files


def worker(model: Path, placement: str, out: Path) -> None:
    import torch

    from taid import TAIDConfig
    from taid.models.loading import load_model
    from taid.models.vocabulary import Vocabulary
    from taid.teachers import placement as teacher_placement
    from taid.teachers.teacher import LocalTeacher

    args = TAIDConfig(output_dir=str(out), use_cpu=True, bf16=False, teacher_placement=placement)
    before, peak, is_over = resident(), (0, 0), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_over.is_set():
            peak = tuple(map(max, peak, resident()))
            time.sleep(0.002)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    teacher = load_model(
        str(model), role="teacher", dtype=torch.float32, **teacher_placement.loading_options(args, placement)
    )
    teacher.requires_grad_(False).eval()
    teacher_placement.place(teacher, args)
    rows = teacher.config.vocab_size
    local = LocalTeacher(teacher, Vocabulary(tuple(range(rows))), torch.no_grad, fused=True)
    for seed in range(4):
        torch.manual_seed(seed + 10 * args.process_index)
        ids = torch.randint(rows, (1, 64))
        local({"input_ids": ids, "use_cache": False}, ids)
    is_over.set()
    watching.join()
    grown = [now - then for now, then in zip(peak, before, strict=True)]
    found = {"grown": grown, "teacher": sum(w.numel() * w.element_size() for w in teacher.parameters())}
    (out / f"{args.process_index}.json").write_text(json.dumps(found))


def measured(model: Path, placement: str, processes: int, out: Path) -> tuple[float, list[float]]:
    """Bytes of the teacher, and the largest growths of a process."""
    out.mkdir(parents=True)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launcher, __file__, "--worker", str(model), placement, "--out", str(out)]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    found = [json.loads(path.read_text()) for path in out.glob("*.json")]
    assert len(found) == processes
    return found[0]["teacher"], list(map(max, *(each["grown"] for each in found), [0, 0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/sharded_teacher"), help="a new folder")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(Path(arguments.worker[0]), arguments.worker[1], arguments.out)
        return
    if arguments.out.exists():
        parser.error(f"--out {arguments.out} is there already: remove it, or choose another folder")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from step import _machine

    width = arguments.width
    model = arguments.out / "teacher"
    LlamaForCausalLM(
        LlamaConfig(vocab_size=2000, hidden_size=width, intermediate_size=4 * width, num_attention_heads=8,
                    num_hidden_layers=arguments.layers, tie_word_embeddings=False)
    ).save_pretrained(model)  # fmt: skip
    lines = ["| processes | placement | own memory, of the teacher | with file pages |", "|---|---|---|---|"]
    for processes in arguments.processes:
        for placement in ("replicated", "sharded"):
            if processes == 1 and placement == "sharded":
                continue
            size, grown = measured(model, placement, processes, arguments.out / f"{placement}-{processes}")
            own, whole = (number / size for number in grown)
            lines.append(f"| {processes} | {placement} | {own:.2f} | {whole:.2f} |")
            print(lines[-1], file=sys.stderr)
    about = (
        f"Teacher: Llama, {arguments.layers} layers of width {width}, {size / 1e6:,.0f} MB in float32, a layer "
        f"{1 / arguments.layers:.2f} of it. gloo, {_machine()}, torch {torch.__version__}."
    )
    command = f"`python benchmarks/sharded_teacher.py --layers {arguments.layers} --width {width}`"
    RESULTS.write_text("\n".join(["# What each process holds of a teacher", "", *lines, "", about, "", command, ""]))


if __name__ == "__main__":
    main()
