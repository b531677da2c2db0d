"""--cache_teacher: what a method reads of the frozen teacher at the training rows' responses, most
often its final hidden states, computed once and kept on disk. Then its layers are needed no more,
only its embedding and its head."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch

from hub.download import fingerprint_of_model
from methods import find_method, method_file
from methods.blocks import teacher_side
from model import load
from runtime.distributed import barrier, is_first, rank, world_size
from runtime.files import file_label, fingerprint
from runtime.progress import Progress
from tokenize_align import Example, collate


class HiddenStates:
    """What is kept for most methods: the final hidden states at response positions."""

    name = "teacher_hidden"  # in a batch

    def __init__(self, teacher):
        self.width = teacher.config.hidden_size

    def depends_on(self, example):
        """All of an example that what is kept of it depends on."""
        return example.teacher.ids, example.teacher.prompt_length

    def count(self, example) -> int:
        """How many lines of `width` numbers are kept of an example."""
        return len(example.teacher.response_ids)

    def __call__(self, batch, teacher) -> torch.Tensor:
        """The lines of all rows of a batch, (N, width)."""
        return teacher_side(batch, teacher).hidden


class TeacherStates:
    """One file beside the data: (lines of all rows) × width numbers in bfloat16; and .done, a byte
    per row that is 1 when its lines are on the disk, so that several processes can write and an
    interrupted run continues. The name is a hash of all that the lines depend on."""

    def __init__(self, config, folder: Path, teacher, examples: list[Example], dtype, extras=None):
        """folder: where the file is kept. dtype: the type in which the teacher runs. extras: the
        method's batch_extras."""
        self.dtype, self.source, self.extras = dtype, teacher.source, extras
        self.kept, made_by = HiddenStates(teacher), ""
        method = find_method(config.method)
        if method.teacher_part:
            self.kept = method.teacher_part(extras, config)
            made_by = fingerprint(method_file(config.method))
        made_of = [self.kept.depends_on(example) for example in examples]
        text = repr((fingerprint_of_model(self.source), str(dtype), made_by, made_of))
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        label = file_label(Path(config.teacher).name)
        self.path = folder / f"train-states-{label}-{key}.bin"
        self.place, end = {}, 0  # row → its lines in the file
        for example in examples:
            start, end = end, end + self.kept.count(example)
            self.place[example.row] = start, end
        self.shape = end, self.kept.width
        self.examples = sorted(examples, key=lambda example: -len(example.teacher.ids))

    def fill(self, teacher, batch_size: int, pad: int, device: str) -> None:
        """Run the teacher over the rows that are not written yet; all processes share them.
        Without one it is loaded where it is needed."""
        if is_first():
            for path, length in (
                (self.path, 2 * self.shape[0] * self.shape[1]),
                (self._done_path(), len(self.examples)),
            ):
                path.touch()
                with open(path, "r+b") as file:
                    file.truncate(length)  # longer: zeros; what is there stays
        barrier()
        done = np.fromfile(self._done_path(), np.uint8)
        todo = np.flatnonzero(done == 0)[rank() :: world_size()]
        barrier()  # all processes have seen what is to be done
        if len(todo):
            if teacher is None:
                teacher = load(self.source, dtype=self.dtype, device=device)
            self._write(teacher, todo, batch_size, pad, device)
        barrier()

    def _done_path(self) -> Path:
        return self.path.with_suffix(".done")

    def _write(self, teacher, todo, batch_size, pad, device) -> None:
        progress = Progress(len(todo), "the teacher reads the training rows, once", "row")
        with open(self.path, "r+b") as states, open(self._done_path(), "r+b") as done:
            for start in range(0, len(todo), batch_size):
                numbers = todo[start : start + batch_size]
                examples = [self.examples[i] for i in numbers]
                batch = collate(examples, pad, pad)
                batch = {name: tensor.to(device) for name, tensor in batch.items()}
                if self.extras:
                    batch |= self.extras(examples, device)
                with torch.no_grad():
                    lines = self.kept(batch, teacher).bfloat16().cpu().view(torch.uint16)
                counts = [self.kept.count(example) for example in examples]
                for example, of_row in zip(examples, lines.split(counts)):
                    states.seek(2 * self.shape[1] * self.place[example.row][0])
                    states.write(of_row.numpy().tobytes())
                states.flush()
                os.fsync(states.fileno())
                for number in numbers:
                    done.seek(number)
                    done.write(b"\1")
                progress.update(len(examples))
        progress.close()

    def of(self, examples: list[Example]) -> torch.Tensor:
        """The packed lines of a batch, (N, width), in the teacher's type."""
        states = np.memmap(self.path, np.uint16, "r", shape=self.shape)
        parts = [np.array(states[slice(*self.place[example.row])]) for example in examples]
        packed = torch.from_numpy(np.concatenate(parts))
        return packed.view(torch.bfloat16).to(self.dtype)
