"""What two models expect to come next at every byte of an answer (methods/byte_kd.py), for probe.py and train.py.

    found = along(tokenizers, examples, rows, student, teacher)

Any teacher and student have such distributions, whatever the method: where there is no attention to look at, and where
runs are compared of which one has none, this is what there is to see."""
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from files.rows import Row
from methods.byte_kd import BytePaths, next_byte_kl
from methods.sides import Valid
from running import pictures
from running.measures import resample
from tokenize_align import Example, collate

FEWEST_BYTES, MOST_BYTES = 12, 60           # of a picture's answer, where there is such a one
MEASURES = {
    "kl": "KL(teacher ‖ student), bits a byte",
    "student_bits": "student: −log₂ p(byte), bits a byte",
    "teacher_bits": "teacher: the same",
    "student_right": "student: likeliest byte is right",
    "teacher_right": "teacher: the same",
}

@dataclass
class Along:
    """One answer of M − 1 bytes, and EOS: what each model expects at every byte of it."""
    row: int                            # in the data file, from 0
    text: bytes
    teacher: torch.Tensor               # (M, 257), p(c | b) of every byte c, and of EOS
    student: torch.Tensor               # (M, 257)

    @property
    def kl(self) -> torch.Tensor:
        """w · KL(p_t ‖ p_s) in bits, (M,), as byte_kd's loss has it: over the bytes that both can say."""
        whole = torch.ones(len(self.student))
        return next_byte_kl.__wrapped__((self.student, whole), (self.teacher, whole)) / math.log(2)    # not compiled

    def values(self) -> dict[str, torch.Tensor]:
        """MEASURES at every byte, (M,) each."""
        true, values = torch.tensor([*self.text, 256]), {"kl": self.kl}
        for side in ("student", "teacher"):
            p = getattr(self, side)
            values[f"{side}_bits"] = -p.gather(1, true[:, None]).squeeze(1).clamp(min=1e-30).log2()
            values[f"{side}_right"] = (p.argmax(1) == true).double()
        return values

@torch.no_grad()
def along(tokenizers, examples: list[Example], rows: list[Row], student, teacher) -> list[Along]:
    """The models' next-byte distributions along the answers, in float32 on the CPU. tokenizers: the student's, the
    teacher's; examples: of encode_rows(rows). An answer that is cut, or changed by a normalization, is left out."""
    texts, device, found = {e.row: rows[e.row].outputs[0] for e in examples}, student.embed.weight.device, []
    paths = BytePaths(*tokenizers, examples, texts, device)
    pads = [tokenizer.eos_id for tokenizer in tokenizers]
    for example in examples:
        text = texts[example.row].encode()
        if len(paths.paths[example.row]) <= len(text):
            continue
        next_bytes, batch = paths.tensors([example])["next_bytes"].to(device), collate([example], *pads)
        expected = {}
        for side, decoder in (("teacher", teacher), ("student", student)):
            valid = Valid(batch[f"{side}_labels"].to(device))
            hidden = valid.pack(valid.grid(decoder(batch[f"{side}_ids"].to(device))))
            logits = F.linear(hidden, decoder.head.weight)
            (masses, whole), _ = next_bytes.masses(side, logits, slice(0, len(logits)), 1.0)
            expected[side] = (masses / whole[:, None].clamp(min=1e-30)).float().cpu()
        found.append(Along(example.row, text, **expected))
    return found

def numbers(found: list[Along]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """MEASURES, means over all bytes, and their bootstrap draws over answers."""
    every = [answer.values() for answer in found]
    both = {name: resample([values[name] for values in every]) for name in MEASURES}
    return {name: mean for name, (mean, _) in both.items()}, {name: draws for name, (_, draws) in both.items()}

def draw(found: dict[str, list[Along]], path: Path, title: str) -> Path:
    """One answer, the same of every run: of those that a picture shows whole, the one that is in the middle by how
    certain the teacher is, else the shortest, cut. found: a run's name → its answers."""
    first = next(iter(found.values()))
    fitting = [answer for answer in first if FEWEST_BYTES <= len(answer.text) < MOST_BYTES]
    if fitting:
        fitting.sort(key=lambda answer: float(torch.special.entr(answer.teacher).sum()))
        row = fitting[len(fitting) // 2].row
    else:
        row = min(first, key=lambda answer: len(answer.text)).row
    chosen = {name: next(answer for answer in answers if answer.row == row) for name, answers in found.items()}
    answer = next(iter(chosen.values()))
    panels = {"teacher": answer.teacher} | {name: of_run.student for name, of_run in chosen.items()}
    return pictures.next_bytes(path, f"what comes next in row {row}\n{title}", answer.text[:MOST_BYTES],
                               {name: p[:MOST_BYTES] for name, p in panels.items()},
                               {name: of_run.kl[:MOST_BYTES] for name, of_run in chosen.items()})
