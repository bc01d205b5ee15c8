"""Mixtral-8x7B-shaped layers on a GPU: eager transformers, torch.compile and our artefacts, whole and operated on.

Random weights, hidden 4096, expert width 14336, 8 experts of which 2 are chosen, bfloat16.  Variants: ``whole``; experts
``merged`` from 8 to 4; a quarter of the blocks ``dropped``; ``int4`` weights; ``dropped int4``.  Cells: prefill of 2048 tokens
at batch 1, decode behind 2048 cached positions at batch 1 and 16: eight tokens in a row, as a text goes on, and an eighth of
their time (ONNX Runtime repeats one step, and waits for each).  Beside each decode stands the floor: bytes that a step must
read (weights of the experts that are hit in expectation, and the caches) over the card's bandwidth.

Eager and torch.compile run a model of the variant's shape (fewer layers, fewer experts); they have no int4, and run bfloat16
there.  Every cell runs in a process of its own, so that one that fails or runs out of memory leaves the others, and says why.

Targets: decode within 1.3x of the floor in bfloat16; faster than torch.compile in each cell; ``dropped int4`` more than 6.05x
as fast as eager ``whole`` with less than 23 % of its memory.

    python benchmarks/gpu.py                 one command: table, and benchmarks/results/gpu.json
    python benchmarks/gpu.py --show          the table of benchmarks/results/gpu.json
    python benchmarks/gpu.py --variants whole,int4 --runtimes eager,aotinductor --profile
                                             a part of it, with what each step launches; the rest of the file stays
    python benchmarks/gpu.py --rehearse      the same flow with tiny shapes on the CPU, nothing written

Without a GPU it says so and exits with 3.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _gpu_floor import Shape
from _gpu_models import VARIANTS, artifact_runs, build, module_runs, probes
from _gpu_report import PEERS, add_floors, line, print_table, stored_as, wrong_cells, wrong_tokens

from surgeon.environment import version_of

RESULTS = Path(__file__).parent / "results" / "gpu.json"
NO_GPU = 3
AT_ONCE = 3
"""Variants that are built at a time: as many as the memory of the host holds."""
READY = "ready"
RUNTIMES = ("eager", "torch.compile", "aotinductor", "onnxruntime")
TINY = Shape(64, 128, 4, 2, 8, 2, 4, 160, 32, (1, 2), 32, "float32", "cpu")


def bandwidth() -> tuple[float, str]:
    """Bytes per second that the card reads, and how that is known: a reduction over 4 GiB, the best of 20."""
    data = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    best = 0.0
    for _ in range(20):
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        data.sum()
        end.record()
        torch.cuda.synchronize()
        best = max(best, data.nbytes / (start.elapsed_time(end) / 1e3))
    known = torch.cuda.get_device_properties(0)
    clock, width = getattr(known, "memory_clock_rate", 0), getattr(known, "memory_bus_width", 0)
    peak = 2e3 * clock * width / 8  # kHz, two transfers per clock, bits
    return (peak, "the card's own figure") if peak > best else (best, "measured: sum over 4 GiB")


# -- one cell ---------------------------------------------------------------------------------------------------------


def synchronised(function: Any, device: str) -> Any:
    """The function, returning when the device is done."""

    def run() -> None:
        function()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def launches(run: Callable[[], Any], steps: int, repeats: int = 4) -> list[dict[str, Any]]:
    """What one of a run's steps launches on the device: each kernel's name, times and microseconds in all, longest first."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(repeats):
            run()
    found = [event for event in profile.key_averages() if event.self_device_time_total]
    found.sort(key=lambda event: -event.self_device_time_total)
    count = repeats * steps
    return [
        {"kernel": event.key, "times": event.count / count, "microseconds": event.self_device_time_total / count}
        for event in found
    ]


def run_cell(shape: Shape, variant: str, runtime: str, folder: Path, profile: bool) -> dict[str, Any]:
    """Build if need be, say so, wait for a line on the standard input, and time every cell of one variant on one runtime."""
    from surgeon.latency import measure

    facts: dict[str, Any] = {}
    start = time.perf_counter()
    with torch.no_grad():
        if runtime in ("aotinductor", "onnxruntime"):
            facts = build(shape, variant, runtime, folder / "artifact")
            gc.collect()
            if shape.device == "cuda":
                torch.cuda.empty_cache()
            runs, size, artifact = artifact_runs(shape, runtime, folder / "artifact")
            found = [next(iter(artifact.run(inputs).values())).float().cpu() for inputs in probes(artifact.inputs, shape)]
            pairs = list(zip(found, facts.pop("wanted"), strict=True))
            facts["relative_errors"] = [float((a - b).norm() / b.norm()) for a, b in pairs]
            facts["wrong_tokens"] = [wrong_tokens(a, b) for a, b in pairs]
            facts["same_tokens"] = [float((a.argmax(-1) == b.argmax(-1)).float().mean()) for a, b in pairs]
        else:
            runs, size = module_runs(shape, variant, compiled=runtime == "torch.compile")
        problems = wrong_cells(shape, facts.get("wrong_tokens", []))
        for cell, run in runs.items():
            if cell in problems:
                continue
            try:
                for _ in range(3):  # compiles, loads and picks kernels: not while another process is timed
                    synchronised(run, shape.device)()
            except Exception as error:  # one cell that fails leaves the others
                problems[cell] = f"{type(error).__name__}: {error}"[:500]
        facts["ready_seconds"] = time.perf_counter() - start
        print(READY, flush=True)
        sys.stdin.readline()
        figures = []
        for cell, run in runs.items():
            if cell in problems:
                figures.append({**asdict(cell), "problem": problems[cell]})
                continue
            timing = measure(synchronised(run, shape.device), warmup=5, seconds=1.0 if shape.device == "cuda" else 0.0)
            each = {name: ms / cell.steps if name.endswith("_ms") else ms for name, ms in asdict(timing).items()}
            tokens = cell.batch * (cell.length if cell.phase == "prefill" else 1)
            figures.append({
                **asdict(cell), **each, "steps": cell.steps, "tokens_per_second": 1e3 * tokens / each["median_ms"]
            })  # fmt: skip
            if profile and runtime not in PEERS:
                figures[-1]["launches"] = launches(synchronised(run, shape.device), cell.steps)
    peak = torch.cuda.max_memory_allocated() if shape.device == "cuda" else 0
    measured = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    return {**facts, "measured": measured, "bytes": size, "peak_bytes": peak, "cells": figures}


# -- all of them ------------------------------------------------------------------------------------------------------


def collect(
    shape: Shape, variants: list[str], runtimes: list[str], rehearse: bool, profile: bool, seconds: float,
    keep: Callable[[dict[str, Any]], None],
) -> None:  # fmt: skip
    """Run every variant on every runtime that is asked for, each in a process of its own.

    ``keep`` gets the results so far after each variant.  The processes of a variant build side by side, and those of the next
    variants with them; they are timed one after the other, when all of the variant have built, while those of the next ones
    stand still.
    Eager and torch.compile do not know quantization: what they do for ``int4`` is what they do for ``whole``.
    """
    rate, known = (0.0, "none: a rehearsal") if rehearse else bandwidth()
    if not rehearse:
        torch.cuda.empty_cache()
    results: dict[str, Any] = {
        "device": "cpu (a rehearsal)" if rehearse else torch.cuda.get_device_name(), "torch": torch.__version__,
        "versions": {name: version_of(name) for name in ("transformers", "onnxruntime-gpu", "onnxruntime", "triton")},
        "bandwidth": rate, "bandwidth_known_from": known, "shape": asdict(shape), "cells": {},
    }  # fmt: skip
    cells = results["cells"]
    with tempfile.TemporaryDirectory(prefix="surgeon-gpu-") as scratch:

        def started(variant: str) -> list[Worker]:
            shared = stored_as(variant) != variant and stored_as(variant) in variants
            wanted = [name for name in runtimes if name not in PEERS or not shared]
            home = Path(scratch) / variant.replace(" ", "-")
            cache = Path(scratch) / "inductor"
            return [Worker(shape, variant, name, home / name, cache, rehearse, profile, seconds) for name in wanted]

        building: list[list[Worker]] = []
        for number, variant in enumerate(variants):
            building += [started(name) for name in variants[number + len(building) : number + AT_ONCE]]
            workers = building.pop(0)
            for worker in workers:
                worker.wait_ready()
            ahead = [worker for later in building for worker in later]
            for worker in ahead:
                worker.signal(signal.SIGSTOP)
            found = cells.setdefault(variant, {})
            for worker in workers:
                found[worker.runtime] = worker.finish()
                print(line(variant, worker.runtime, found[worker.runtime]), file=sys.stderr, flush=True)
            for worker in ahead:
                worker.signal(signal.SIGCONT)
            shutil.rmtree(Path(scratch) / variant.replace(" ", "-"), ignore_errors=True)
            for listed in cells:  # in whatever order the variants came
                if stored_as(listed) != listed and stored_as(listed) in cells:
                    shared = cells[stored_as(listed)]
                    cells[listed] = {**{peer: shared[peer] for peer in PEERS if peer in runtimes}, **cells[listed]}
            keep(results)


def joined(before: dict[str, Any] | None, results: dict[str, Any]) -> dict[str, Any]:
    """These results, and what an earlier run of this benchmark on such a card and torch has of what this one did not measure.

    A GPU that is lent for minutes measures in parts.  Every cell says when it was measured: those of one run compare.
    """
    same = ("device", "torch", "shape")
    held = json.loads(json.dumps(results))  # tuples as the file has them
    if before is None or any(before[key] != held[key] for key in same):
        return held
    cells = {variant: dict(before["cells"].get(variant, {})) for variant in {**before["cells"], **held["cells"]}}
    for variant, found in held["cells"].items():
        measured = {name: each for name, each in found.items() if "problem" not in each or name not in cells[variant]}
        cells[variant] |= measured
    versions = {name: held["versions"][name] or version for name, version in before["versions"].items()}
    return {**held, "versions": versions, "cells": cells}


class Worker:
    """One variant on one runtime in a process of its own.

    Its temporary files are its own and go with it.  What inductor compiles for every package alike (headers, trials of the
    compiler) goes to one cache for all; no weights stay there.
    """

    def __init__(
        self, shape: Shape, variant: str, runtime: str, folder: Path, cache: Path, rehearse: bool, profile: bool,
        seconds: float,
    ) -> None:  # fmt: skip
        self.runtime, self.deadline = runtime, time.monotonic() + seconds
        folder.mkdir(parents=True)
        self.answer, self.log = folder / "answer.json", folder / "log"
        command = [sys.executable, "-X", "faulthandler", __file__, "--cell", variant, runtime]
        command += ["--folder", str(folder), "--answer", str(self.answer)]
        command += ["--layers", str(shape.layers), "--caches", shape.caches]
        command += [flag for flag, wanted in (("--rehearse", rehearse), ("--profile", profile)) if wanted]
        caches = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TMPDIR": str(folder)}
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 3))}  # several build at a time
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
                env={**os.environ, **caches, **threads},
            )  # fmt: skip
        self.alarm = threading.Timer(seconds, self.signal, [signal.SIGKILL])
        self.alarm.start()

    def signal(self, number: int) -> None:
        """Signal it and the compilers that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def wait_ready(self) -> None:
        """Return when it has built, or ended."""
        assert self.process.stdout is not None
        for text in self.process.stdout:
            if text.strip() == READY:
                return

    def finish(self) -> dict[str, Any]:
        """Let it time its cells; returns its answer, or why there is none."""
        try:
            self.process.communicate("go\n")
        except BrokenPipeError:
            self.process.wait()
        self.alarm.cancel()
        if self.answer.is_file():
            found: dict[str, Any] = json.loads(self.answer.read_text())
            return found
        lines = self.log.read_text(errors="replace").strip().splitlines()
        code, last = self.process.returncode, next(reversed(lines), "none")
        if time.monotonic() > self.deadline:
            last = f"not done in time; its last line: {last}"
        elif code < 0:
            last = f"ended by {signal.Signals(-code).name}; its last line: {last}"
        return {"problem": last[:500], "log": lines[-40:], "cells": []}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="layers of the whole model; 2.9 GB each in bfloat16")
    parser.add_argument("--caches", default="shared", choices=("shared", "appended"), help="of aotinductor")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="which, with commas")
    parser.add_argument("--runtimes", default=",".join(RUNTIMES), help="which, with commas")
    parser.add_argument("--profile", action="store_true", help="print what each step launches too, longest first")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one variant on one runtime")
    parser.add_argument("--into", type=Path, default=RESULTS, help="where the results go")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU, nothing written")
    parser.add_argument("--show", action="store_true", help="print the table of the results, measure nothing")
    parser.add_argument("--cell", nargs=2, metavar=("VARIANT", "RUNTIME"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.show:
        held = json.loads(options.into.read_text(encoding="utf-8"))
        print_table(Shape(**{**held["shape"], "batches": tuple(held["shape"]["batches"])}), held)
        return 0
    if not options.rehearse and not torch.cuda.is_available():
        print("benchmarks/gpu.py: no CUDA device is here; nothing was measured (--rehearse tries the flow on the CPU)")
        return NO_GPU
    base = TINY if options.rehearse else Shape()
    shape = Shape(**{**asdict(base), "layers": options.layers, "batches": base.batches, "caches": options.caches})
    if options.cell:
        answer = run_cell(shape, *options.cell, options.folder, options.profile)
        options.answer.write_text(json.dumps(answer, default=str))
        return 0
    variants = options.variants.split(",")
    runtimes = options.runtimes.split(",")
    for kind, given, known in (("variants", variants, VARIANTS), ("runtimes", runtimes, RUNTIMES)):
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"unknown {kind} {', '.join(unknown)}; known: {', '.join(known)}")

    earlier = options.into.is_file() and not options.rehearse
    before = json.loads(options.into.read_text(encoding="utf-8")) if earlier else None

    def keep(results: dict[str, Any]) -> None:
        add_floors(shape, results)
        if not options.rehearse:
            options.into.parent.mkdir(exist_ok=True)
            options.into.write_text(json.dumps(joined(before, results), indent=2) + "\n", encoding="utf-8")
        if len(results["cells"]) == len(variants):
            print_table(shape, results)

    collect(shape, variants, runtimes, options.rehearse, options.profile, options.timeout, keep)
    if not options.rehearse:
        print(f"written to {options.into}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
