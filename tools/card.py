"""Everything that wants a graphics card, in one command of at most 8 minutes: a table to paste into a report.

    python -m tools.card                    # on all cards of this machine; without one, the same in small on the CPU
    python -m tools.card --only step toy    # tests, step, lora, shard (over several cards), toy

Nothing is downloaded: models of the papers' shapes have random weights. Each part is a command of its own, whose output
stays in --out_dir beside card.json; one that fails or runs out of time is told of, and the others go on. The packages
of requirements-test.txt are needed for `tests` and `step`."""
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from files import hub
from files.config import InputError, flag, parse

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("tests", "step", "lora", "shard", "toy")
SHORT = ["--max_steps", "20", "--eval_num", "8", "--eval_interval", "20", "--probe_interval", "0", "--batch_size", "8"]

@dataclass
class Config:
    only: list[str] = flag(list(PARTS), "what to run")
    minutes: float = flag(8.0, "for all of it; what does not fit is left out", at_least=0.1)
    out_dir: str = flag("out/card", "where card.json and the parts' logs go")
    device: str = flag("auto", "where to run", choices=("auto", "cpu", "cuda"))

def commands(config: Config, out_dir: Path, cards: int) -> dict[str, list[str]]:
    """Each part's command; one card has nothing to shard over. cards: 0 for the CPU's small form."""
    python, device = [sys.executable], ["--device", "cuda" if cards else "cpu"]

    def train(name, *more, processes=1):
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
        return python + several + ["train.py", *more, *device, "--overwrite", "--out_dir", str(out_dir / name)]
    processes = cards or 2
    shapes = ["--shapes", "papers", "--batch_size", "16"] if cards else ["--shapes", "tiny", "--max_length", "128"]
    shard = ["--grad_accum", str(processes), "--shard_student", "--shard_teacher"]
    every = {
        "tests": python + ["-m", "pytest", "-q", "-m", "cuda", "test_all.py"],
        "step": python + ["-m", "tools.bench", *device, "--out_dir", str(out_dir / "bench"), *shapes, "--only", "step",
                          "generation", "launches", *(["parts", "decoder"] if cards else [])],
        "lora": train("lora", *SHORT, "--method", "dskd_cma_ga", "--lora_rank", "8"),
        "shard": train("shard", *SHORT, "--method", "dskd_cma_ga", *shard, processes=processes),
        "toy": train("toy") if cards else train("toy", *SHORT)}
    return {name: command for name, command in every.items() if (name, cards) != ("shard", 1)}

def run(name: str, command: list[str], out_dir: Path, seconds: float) -> dict:
    """One part → how it ended, its seconds, and the last line that it printed. It is stopped when its time is over."""
    started, log = time.monotonic(), out_dir / f"{name}.log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                                   env=os.environ | {"PYTHONUNBUFFERED": "1"})
        try:
            ended = f"exit code {process.wait(max(1.0, seconds))}"
        except subprocess.TimeoutExpired:
            ended = "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = [line for line in log.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    return {"part": name, "command": command[1:], "ended": "good" if ended == "exit code 0" else ended,
            "seconds": round(time.monotonic() - started, 1), "last_line": lines[-1].strip()[:200] if lines else ""}

def measured(name: str, out_dir: Path) -> list[tuple[str, str]]:
    """(what, value) of all that a part has measured, from the files that it left."""
    if name == "step" and (path := out_dir / "bench" / "bench.json").exists():
        rows = [row for row in json.loads(path.read_text())["table"] if "ratio" in row]
        return [(row["what"], f"{row['ours']:.3f} s, other {row['other']:.3f} s, × {row['ratio']:.2f}"
                 + (", {:.1f} | {:.1f} GB".format(*row["memory"]) if "memory" in row else "")
                 + (f", MFU {100 * row['mfu']:.0f} %" if "mfu" in row else "")) for row in rows]
    if (path := out_dir / name / "metrics.jsonl").exists():
        steps = [json.loads(line) for line in path.read_text().splitlines()]
        half = steps[len(steps) // 2:]
        middle = {what: statistics.median_high(step[what] for step in half) for what in ("tokens_per_second", "mfu")}
        last = next((step for step in reversed(steps) if "dev_bits_per_byte" in step), {})
        scores = f", dev {last['dev_bits_per_byte']:.3f} bits a byte, ROUGE-L {last['dev_rouge_l']:.2f}" if last else ""
        return [(f"{name}: {len(steps)} steps", f"{middle['tokens_per_second']:.0f} tokens/s, MFU "
                 f"{100 * middle['mfu']:.1f} %, loss {steps[-1].get('loss', float('nan')):.4f}{scores}")]
    return []

def write(out_dir: Path, machine: dict, parts: list[dict]) -> None:
    with hub.atomic_write(out_dir / "card.json") as file:
        json.dump({"machine": machine, "parts": parts}, file, indent=2)

def main() -> None:
    config = parse(Config, __doc__)
    if unknown := set(config.only) - set(PARTS):
        raise InputError(f"--only {' '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    device, _ = hub.pick_device(config.device, "auto")
    cards = torch.cuda.device_count() if device == "cuda" else 0
    machine = {"torch": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads(),
               "cards": [torch.cuda.get_device_name(i) for i in range(cards)]}
    where = ", ".join(machine["cards"]) or f"no GPU here: everything small, on the CPU ({machine['threads']} threads)"
    print(f"{where}, torch {machine['torch']}", flush=True)
    out_dir = Path(config.out_dir)
    hub.claim(out_dir, "card.json", {"machine", "parts"}, [*PARTS, "bench", *(f"{name}.log" for name in PARTS)])
    out_dir.mkdir(parents=True, exist_ok=True)
    until, parts = time.monotonic() + 60 * config.minutes, []
    write(out_dir, machine, parts)                          # what follows is this command's
    for name, command in commands(config, out_dir.resolve(), cards).items():
        if name not in config.only:
            continue
        found = run(name, command, out_dir, until - time.monotonic())
        found["measured"] = measured(name, out_dir) if found["ended"] == "good" else []
        parts.append(found)
        print(f"{name:<8}{found['ended']:<16}{found['seconds']:7.1f} s   {found['last_line']}", flush=True)
        write(out_dir, machine, parts)
    print("\n| | |\n|---|---|")
    for found in parts:
        for what, value in found["measured"] or [(found["part"], f"{found['ended']}: {found['last_line']}")]:
            print(f"| {what} | {value} |")
    print(f"\nwrote card.json and the logs into {out_dir}")
    if any(found["ended"] != "good" for found in parts):
        sys.exit(1)

if __name__ == "__main__":
    hub.run(main)
