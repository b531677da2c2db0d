"""What never changes during training is computed once and kept on disk: token ids, the frozen teacher's hidden states,
and MinED's map of one vocabulary into another.

The files are named by a hash of all that they depend on, so that a change of text, tokenizer, teacher or limits finds
no cache in place of a wrong one; a file that was cut or is not ours is made anew."""
import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import tokenize_align
from files import hub, tokenizer_config
from files.rows import Row
from methods.mined import map_vocabulary
from running import parallel
from tokenize_align import Example, Sequence, Tokenizer, collate, encode_rows

BUFFER = 1 << 28        # bytes of hidden states between two flushes to disk

def _key(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

# -------------------------------------------------------------------------------------------------------- token ids
def cached_rows(folder: Path, rows: list[Row], student: Tokenizer, teacher: Tokenizer, max_length: int,
                max_prompt_length: int):
    """encode_rows; from a file in `folder` where the same rows were encoded with the same tokenizers before."""
    made_of = [hub.fingerprint(tokenizer.folder, weights=False) for tokenizer in (student, teacher)]
    made_by = [hub.fingerprint(Path(module.__file__)) for module in (tokenize_align, tokenizer_config)]
    path = folder / f"tokens-{_key(rows, made_of, made_by, max_length, max_prompt_length)}.npz"
    sides = ("student", "teacher")
    try:
        with np.load(path, allow_pickle=False) as stored:
            content = {name: stored[name] for name in stored.files}
        sequences = [_unpack(*(content[f"{side}_{name}"] for name in ("ids", "lengths", "prompts", "spans", "chunks")))
                     for side in sides]
        examples = [Example(row, *pair) for row, *pair in zip(content["rows"].tolist(), *sequences)]
        return examples, *content["counts"].tolist()
    except OSError:                     # not there
        pass
    except Exception as error:          # numpy and zipfile raise a dozen kinds on a damaged file
        print(f"{path}: a damaged cache, made anew ({type(error).__name__})")
    examples, *counts = encode_rows(rows, student, teacher, max_length, max_prompt_length)
    content = {"rows": [e.row for e in examples], "counts": counts}
    for side in sides:
        packed = [getattr(e, side) for e in examples]
        content |= {f"{side}_ids": [i for s in packed for i in s.ids], f"{side}_lengths": [len(s.ids) for s in packed],
                    f"{side}_prompts": [s.prompt_length for s in packed],
                    f"{side}_spans": [span for s in packed for span in s.spans],
                    f"{side}_chunks": [c for s in packed for c in s.chunks]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with hub.whole_file(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **{name: np.array(values, np.int64) for name, values in content.items()})
    except OSError as error:
        print(f"the token ids could not be kept for the next run ({error})")
    return examples, *counts

def _unpack(ids, lengths, prompts, spans, chunks) -> list[Sequence]:
    ids = np.split(ids, np.cumsum(lengths)[:-1])
    spans, chunks = (np.split(x, np.cumsum(lengths - prompts)[:-1]) for x in (spans, chunks))
    return [Sequence(i.tolist(), p, list(zip(*s.T.tolist())), c.tolist())
            for i, p, s, c in zip(ids, prompts.tolist(), spans, chunks)]

def kept_vocabulary_map(folder: Path, strings: list[list[bytes]]) -> torch.Tensor:
    """mined.map_vocabulary of token_strings, from a file in `folder` where it is there."""
    path = folder / f"vocabulary-map-{hashlib.sha256(repr(strings).encode()).hexdigest()[:16]}.safetensors"
    try:
        return load_file(path)["vocabulary_map"]
    except (OSError, SafetensorError, KeyError):            # not there, or damaged
        vocabulary_map = map_vocabulary(*strings)
    folder.mkdir(parents=True, exist_ok=True)
    with hub.whole_file(path) as temporary:
        save_file({"vocabulary_map": vocabulary_map}, temporary)
    return vocabulary_map

# ----------------------------------------------------------------------------------------- the teacher's hidden states
class TeacherStates:
    """The teacher's final hidden states at every valid position of the training rows, in one memory-mapped file.
    With them the teacher's layers are needed no more, only its embedding and its head. The file lies beside the data:
    (valid positions of all rows) × d_t numbers of `dtype` (torch.bfloat16 or torch.float32). Beside it, .json holds the
    settings and .done a byte for every row, 1 when its states are on the disk, so that several processes can write, and
    an interrupted writing goes on, with as many processes as there are then."""

    def __init__(self, data_file: Path, name: str, folder: Path, examples: list[Example], size: int, dtype: torch.dtype,
                 computed_in: torch.dtype):
        """name and folder: the teacher's. size: d_t. computed_in: the type in which the teacher runs."""
        self.size, self.dtype = size, dtype
        made_of = repr([(e.teacher.ids, e.teacher.prompt_length) for e in examples])
        self.settings = {"teacher": name, "teacher_sha256": hub.fingerprint(folder), "dtype": str(dtype),
                         "computed_in": str(computed_in), "size": size,
                         "rows_sha256": hashlib.sha256(made_of.encode()).hexdigest()}
        label = hub.label(Path(name).name)
        self.path = data_file.with_name(f"{data_file.stem}-states-{label}-{_key(self.settings)}.bin")
        ends = np.cumsum([e.teacher.valid for e in examples])
        self.place = {e.row: (int(end) - e.teacher.valid, int(end)) for e, end in zip(examples, ends)}
        self.shape = int(ends[-1]), size
        self.rows = sorted(examples, key=lambda e: -len(e.teacher.ids))         # the same at every start
        self.complete = self._finished()

    def _finished(self) -> bool:
        return self._begun() and bool(self._map(".done").all())

    def _begun(self) -> bool:
        """Whether the files are there, and what their names say."""
        try:
            same = json.loads(self.path.with_suffix(".json").read_text(encoding="utf-8")) == self.settings
            sizes = [self.path.with_suffix(kind).stat().st_size for kind in (".bin", ".done")]
        except (OSError, ValueError, RecursionError):
            return False
        return same and sizes == [self._bytes(), len(self.rows)]

    def _bytes(self) -> int:
        return self.shape[0] * self.size * self.dtype.itemsize

    def _map(self, kind: str = ".bin", mode: str = "r") -> np.memmap:
        dtype = np.uint8 if kind == ".done" else np.uint16 if self.dtype == torch.bfloat16 else np.float32
        return np.memmap(self.path.with_suffix(kind), dtype=dtype, mode=mode,
                         shape=len(self.rows) if kind == ".done" else self.shape)

    def fill(self, load_teacher: Callable, batch_size: int, pad: int, device: str) -> None:
        """Run the teacher, ids (B, T) → hidden (B, T, d_t), over the rows that are not written yet. All processes call
        this: those of the first machine share its rows; other machines, unless they see its disk, have their turn."""
        number, several = parallel.here()
        for turn in (0, 1):
            if all(parallel.gather(self.complete)):
                return
            mine = not self.complete and (turn == 1 or int(os.environ.get("GROUP_RANK", 0)) == 0)
            with contextlib.ExitStack() as stack:
                if mine and number == 0:
                    lock = stack.enter_context(open(self.path.with_suffix(".lock"), "w"))
                    hub.lock(lock.fileno(), self.path, wait=True)       # of another run with the same teacher and rows
                    self._begin()
                parallel.barrier()
                todo = np.flatnonzero(self._map(".done") == 0).tolist() if mine else []
                parallel.barrier()                                      # all have seen what is to do
                self._write(todo[number::several], load_teacher, batch_size, pad, device)
                parallel.barrier()
            self.complete = self._finished()

    def _begin(self) -> None:
        if self._begun():
            return
        if self.path.with_suffix(".json").exists():
            print(f"{self.path}: cut, or not what its name says; it is made anew")
            self.path.with_suffix(".json").unlink()
        for kind, size in ((".bin", self._bytes()), (".done", len(self.rows))):
            with open(self.path.with_suffix(kind), "wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)              # a full disk is noticed here
        with hub.atomic_write(self.path.with_suffix(".json")) as file:
            json.dump(self.settings, file, indent=2)

    def _write(self, todo: list[int], load_teacher, batch_size, pad, device) -> None:
        """Some of self.rows, by number. A row is done when its states are on the disk."""
        if not todo:
            return
        forward, states, done, unflushed = load_teacher(), self._map(mode="r+"), self._map(".done", "r+"), []
        with tqdm(total=len(todo), desc="the teacher's hidden states, once", unit="row", dynamic_ncols=True) as bar:
            for start in range(0, len(todo), batch_size):
                numbers = todo[start:start + batch_size]
                part = [self.rows[k] for k in numbers]
                with torch.no_grad():
                    hidden = forward(collate(part, pad, pad)["teacher_ids"].to(device)).to(self.dtype).cpu()
                for example, row in zip(part, hidden):
                    first, (begin, end) = example.teacher.prompt_length - 1, self.place[example.row]
                    block = row[first:first + end - begin].contiguous()
                    states[begin:end] = (block.view(torch.uint16) if self.dtype == torch.bfloat16 else block).numpy()
                unflushed += numbers
                bar.update(len(part))
                size = sum(self.rows[k].teacher.valid for k in unflushed) * self.size * self.dtype.itemsize
                if size > BUFFER or start + batch_size >= len(todo):
                    states.flush()
                    done[unflushed] = 1
                    done.flush()
                    unflushed = []

    def grid(self, examples: list[Example], dtype: torch.dtype) -> torch.Tensor:
        """(B, T, d_t) of `dtype` on the grid of valid positions, as cma.Valid lays it out."""
        states = self._map()
        grid = torch.zeros(len(examples), max(e.teacher.valid for e in examples), self.size, dtype=dtype)
        for i, example in enumerate(examples):
            start, end = self.place[example.row]
            block = torch.from_numpy(np.array(states[start:end]))
            grid[i, :end - start] = block.view(torch.bfloat16) if self.dtype == torch.bfloat16 else block
        return grid
