"""How far a long loop is: a bar on a terminal, else now and then a line for a log file. Both go to
the standard error, as bars do."""

import sys
import time

from tqdm import tqdm

from runtime.distributed import is_first

SECONDS = 30  # between lines


class Progress:
    """progress = Progress(1200, "training", "step"); progress.update(1, "loss 0.31") after each.

    parts: where there is no terminal, a line after each of so many parts too, however fast."""

    def __init__(self, total: int, what: str, unit: str, done: int = 0, parts: int = 0):
        self.total, self.what, self.unit, self.done = total, what, unit, done
        self.first, self.started = done, time.monotonic()
        self.last = self.started
        self.every = total / parts if parts else float("inf")
        self.bar = None
        if sys.stderr.isatty() and is_first():
            self.bar = tqdm(
                total=total, initial=done, desc=what, unit=unit, leave=False, dynamic_ncols=True
            )

    def update(self, count: int, text: str = "") -> None:
        before, self.done = self.done, self.done + count
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(count)
            return
        now = time.monotonic()
        if now - self.last >= SECONDS or self.done // self.every > before // self.every:
            self.last = now
            left = (now - self.started) / (self.done - self.first) * (self.total - self.done)
            minutes, seconds = divmod(round(left), 60)
            said = f"{self.what}: {self.unit} {self.done} of {self.total}"
            said += f", {minutes}:{seconds:02} left" + (f", {text}" if text else "")
            if is_first():
                print(said, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
