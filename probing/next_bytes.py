"""What two models expect to come next at every byte of an answer (methods/byte_kd.py). Any teacher
and student have such distributions, whatever the method."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from methods.byte_kd import END, BytePaths, expected_bytes, next_byte_kl
from methods.blocks import Side
from tokenize_align import Example, collate

MEASURES = {
    "kl": "KL(teacher ‖ student), bits per byte",
    "student_bits": "student: −log₂ p(byte), bits per byte",
    "teacher_bits": "teacher: the same",
    "student_right": "student: likeliest byte is right",
    "teacher_right": "teacher: the same",
}


@dataclass
class NextBytePrediction:
    """One answer of M − 1 bytes and EOS: what each model expects at each of them."""

    row: int
    text: bytes
    teacher: torch.Tensor  # (M, 258): q of every byte, of EOS, and that a token ends
    student: torch.Tensor  # (M, 258)

    @property
    def kl(self) -> torch.Tensor:
        """KL(q_t ‖ q_s) in bits, (M,), over the bytes that both can say and the rest, as the loss
        has it."""
        return next_byte_kl(self.student, self.teacher) / math.log(2)

    def measures(self) -> dict[str, torch.Tensor]:
        """MEASURES at every byte, (M,) each."""
        true = torch.tensor([*self.text, 256])
        values = {"kl": self.kl}
        for side, p in (("student", self.student), ("teacher", self.teacher)):
            p_true = p.gather(1, true[:, None]).squeeze(1).clamp(min=1e-30)
            values[f"{side}_bits"] = -p_true.log2()
            values[f"{side}_right"] = (p[:, :END].argmax(1) == true).double()
        return values


@torch.no_grad()
def predict_next_bytes(
    tokenizers, examples: list[Example], student, teacher
) -> list[NextBytePrediction]:
    """tokenizers: the student's, the teacher's. Answers that are cut or changed by normalization
    are left out."""
    paths = BytePaths(*tokenizers, examples)
    predictions = []
    for example in examples:
        text = example.text.encode()
        if len(paths.paths[example.row]) <= len(text):
            continue
        states = paths([example], "cpu")
        batch = collate([example], tokenizers[0].eos_id, tokenizers[1].eos_id)
        expected = {}
        for name, decoder in (("student", student), ("teacher", teacher)):
            side = Side(batch, name, decoder)
            hidden = side.pack(decoder(batch[f"{name}_ids"]))
            logits = F.linear(hidden, side.head)
            expected[name] = expected_bytes(
                logits, states[f"{name}_bytes"], slice(0, len(logits)), temperature=1.0
            )
        predictions.append(NextBytePrediction(example.row, text, **expected))
    return predictions
