"""Kill a run and resume it, over and over: at the end every file is what a run that was never stopped leaves.

    python -m tools.soak --cycles 100                   # the toy's run
    python -m tools.soak --cycles 20 --processes 2      # the same under torchrun
    python -m tools.soak --cycles 20 --table            # a table of tools.compare

Each cycle starts the command again and kills it (SIGKILL, all its processes) at a random moment, every fourth while a
file is half-written. Needs Linux. Two trees stay in --out_dir, undisturbed/ and killed/; compared are all their files,
byte by byte, but for the times in metrics.jsonl and what was printed into *.log."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import toy
from files import hub
from files.config import InputError, flag, parse

ROOT = Path(__file__).resolve().parents[1]
TIMES = {"seconds", "tokens_per_second", "tflops", "mfu"}
LONGEST = 4             # seconds of work, at most, between the first checkpoint and a kill
SMALL = ["--save_interval", "5", "--eval_interval", "50", "--eval_num", "10", "--probe_interval", "0",
         "--num_threads", "1"]

@dataclass
class Config:
    cycles: int = flag(100, "kills", at_least=1)
    processes: int = flag(1, "of torchrun", at_least=1)
    table: bool = flag(False, "kill tools.compare in place of train.py")
    steps: int = flag(25, "optimizer steps a cycle, of the whole run; with --table of each cell", at_least=1)
    seed: int = flag(1, "of the moments", at_least=0)
    out_dir: str = flag("", "where both trees go (default: a new folder under out/)")

def command(config: Config, resume: bool) -> list[str]:
    """What is started in either tree; everything it writes goes into run/ there."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={config.processes}"] if config.processes > 1 else []
    share = ["--grad_accum", str(config.processes), "--batch_size", str(32 // config.processes)]
    if config.table:
        words = [*torchrun, "-m", *(["--"] if torchrun else []), "tools.compare", "--methods", "sft", "dskd_cma"]
        words += ["--seeds", "1", "2", "--scoring_seeds", "10", "--num", "20"]
        resume = False                                  # the same command goes on
    else:
        words = [*torchrun, str(ROOT / "train.py"), *([] if resume else ["--method", "dskd_cma_ga"])]
    steps = ["--max_steps", str(config.steps if config.table else config.cycles * config.steps)]
    return [sys.executable, *words, "--out_dir", "run", *(["--resume"] if resume else [*steps, *share, *SMALL])]

def start(config: Config, tree: Path, log) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NANODSKD_SOAK": str(tree.resolve())}
    resume = (tree / "run" / "config.json").exists() and not config.table
    return subprocess.Popen(command(config, resume), cwd=tree, env=environment, stdout=log, stderr=log)

def kill_all(process: subprocess.Popen, tree: Path) -> None:
    """Every process of the tree: torchrun's are in sessions of their own, but all inherit our variable."""
    mark = b"NANODSKD_SOAK=" + os.fsencode(tree.resolve()) + b"\0"
    alive = True
    while alive:
        alive = False
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in environ.read_bytes():
                    os.kill(int(environ.parent.name), signal.SIGKILL)
                    alive = True
            except (OSError, ValueError):               # it has ended, or is not ours
                continue
        process.poll()
        time.sleep(0.02)
    process.wait()

def half_written(tree: Path) -> bool:
    return any(tree.rglob("*.tmp"))

def files_of(tree: Path) -> dict[str, bytes]:
    """Path → content, without times."""
    found = {str(path.relative_to(tree)): path.read_bytes() for path in sorted(tree.rglob("*")) if path.is_file()}
    for name, content in found.items():
        if name.endswith("metrics.jsonl"):
            lines = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in content.splitlines()]
            found[name] = json.dumps(lines).encode()
    return {name: content for name, content in found.items() if not name.endswith(".log")}

def soak(config: Config, tree: Path, longest: float, log) -> tuple[int, int]:
    """Kill and start again, then let it end → kills, and how many of them while a file was half-written."""
    rng, kills, in_a_write = random.Random(config.seed), 0, 0
    for cycle in tqdm(range(config.cycles), desc="kills", unit="kill"):
        process, began, wait = start(config, tree, log), time.monotonic(), rng.uniform(0, longest)
        while process.poll() is None:
            time.sleep(0.001)
            late = time.monotonic() - began
            if late > wait if cycle % 4 < 3 else half_written(tree) and late > 0.7 * wait or late > 3 * longest:
                break
        else:
            if process.returncode:
                raise InputError(f"the command failed with exit code {process.returncode}, see {log.name}")
            break                                       # it has come to its end
        os.kill(process.pid, signal.SIGSTOP)            # so that nothing is finished while its parts are found
        in_a_write += half_written(tree)
        kill_all(process, tree)
        kills += 1
    if code := start(config, tree, log).wait():
        raise InputError(f"the command failed with exit code {code}, see {log.name}")
    return kills, in_a_write

def main() -> None:
    config = parse(Config, __doc__)
    toy.prepare(["teacher", "student", "sft"], [])
    out_dir, number = Path(config.out_dir or "out/soak"), 1
    while not config.out_dir and out_dir.exists():
        number += 1
        out_dir = Path(f"out/soak-{number}")
    if out_dir.exists() and any(out_dir.iterdir()):
        raise InputError(f"--out_dir {out_dir}: is not empty")
    whole, broken = out_dir / "undisturbed", out_dir / "killed"
    whole.mkdir(parents=True)
    broken.mkdir()
    with open(out_dir / "soak.log", "w") as log:
        began, process, first = time.monotonic(), start(config, whole, log), None
        while process.poll() is None:
            time.sleep(0.01)
            if first is None and (any(whole.rglob("best")) or any(whole.rglob("last"))):
                first = time.monotonic() - began        # seconds to the first checkpoint
        if process.returncode or first is None:
            raise InputError(f"the command failed with exit code {process.returncode}, see {log.name}")
        kills, in_a_write = soak(config, broken, first + LONGEST, log)
    one, other = files_of(whole), files_of(broken)
    different = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    print(f"{kills} kills, {in_a_write} of them while a file was half-written; {len(one)} files, "
          f"{len(different)} of them different{': ' if different else ''}{', '.join(different[:10])}")
    if different:
        sys.exit(1)

if __name__ == "__main__":
    hub.run(main)
