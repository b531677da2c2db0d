"""--cache_teacher: the frozen teacher's final hidden states at every response position of the
training rows, computed once and kept on disk. Then its layers are needed no more, only its
embedding and its head."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch

from hub.download import fingerprint_of_model
from model import load
from runtime.distributed import barrier, is_first, rank, world_size
from runtime.files import file_label
from runtime.progress import Progress
from tokenize_align import Example, collate


class TeacherStates:
    """One file beside the data: (response positions of all rows) × d_t numbers in bfloat16; and
    .done, a byte per row that is 1 when its states are on the disk, so that several processes can
    write and an interrupted run continues. The name is a hash of all that the states depend on."""

    def __init__(self, config, folder: Path, teacher, examples: list[Example], dtype):
        """folder: where the file is kept. dtype: the type in which the teacher runs."""
        self.size, self.dtype = teacher.config.hidden_size, dtype
        self.source = teacher.source
        made_of = [(example.teacher.ids, example.teacher.prompt_length) for example in examples]
        text = repr((fingerprint_of_model(self.source), str(dtype), made_of))
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        label = file_label(Path(config.teacher).name)
        self.path = folder / f"train-states-{label}-{key}.bin"
        self.place, end = {}, 0  # row → its positions in the file
        for example in examples:
            start, end = end, end + len(example.teacher.response_ids)
            self.place[example.row] = start, end
        self.shape = end, self.size
        self.examples = sorted(examples, key=lambda example: -len(example.teacher.ids))

    def fill(self, teacher, batch_size: int, pad: int, device: str) -> None:
        """Run the teacher over the rows that are not written yet; all processes share them.
        Without one it is loaded where it is needed."""
        if is_first():
            for path, length in (
                (self.path, 2 * self.shape[0] * self.size),
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
        progress = Progress(len(todo), "the teacher's hidden states, once", "row")
        with open(self.path, "r+b") as states, open(self._done_path(), "r+b") as done:
            for start in range(0, len(todo), batch_size):
                numbers = todo[start : start + batch_size]
                examples = [self.examples[i] for i in numbers]
                batch = collate(examples, pad, pad)
                ids, mask = batch["teacher_ids"].to(device), batch["teacher_mask"].to(device)
                with torch.no_grad():
                    hidden = teacher(ids, mask).bfloat16().cpu().view(torch.uint16)
                for example, row in zip(examples, hidden):
                    first, last = example.teacher.prompt_length - 1, len(example.teacher.ids) - 1
                    states.seek(2 * self.size * self.place[example.row][0])
                    states.write(row[first:last].numpy().tobytes())
                states.flush()
                os.fsync(states.fileno())
                for number in numbers:
                    done.seek(number)
                    done.write(b"\1")
                progress.update(len(examples))
        progress.close()

    def of(self, examples: list[Example]) -> torch.Tensor:
        """The packed states of a batch, (N_t, d_t), in the teacher's type."""
        states = np.memmap(self.path, np.uint16, "r", shape=self.shape)
        parts = [np.array(states[slice(*self.place[example.row])]) for example in examples]
        packed = torch.from_numpy(np.concatenate(parts))
        return packed.view(torch.bfloat16).to(self.dtype)
