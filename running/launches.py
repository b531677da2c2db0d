"""What a GPU would feel, counted on any machine: operations launched, and waits of the host for a result.

    with Launches() as count:
        step()
    count.operations, count.waits, count.peak

A launch is an operation that computes: views (select, slice, transpose …) and allocations don't count. A wait is one
whose result the host must see before it goes on: .item(), nonzero, and what torch builds of them, such as indexing with
a boolean mask. peak: bytes of the results that are alive at once, as far as they were made inside."""
import collections
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from files.rows import Row
from methods.mined import MinED, token_strings
from methods.sides import with_places
from methods.soft_dtw import sdtw
from methods.table import KD_PARTS, METHODS, ONE_VOCABULARY, WITHOUT_KD, Options, distill, make_modules, terms
from model import load
from running.batches import valid_tokens
from running.generation import stream
from running.parallel import clip_gradients
from running.setup import pairing_of
from tokenize_align import collate, encode_rows, load_tokenizer

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "_unique2", "item", "equal"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
FREE = ALLOCATES | {"detach", "alias", "lift_fresh", "_unsafe_view", "set_data"}

class Launches(TorchDispatchMode):
    """Counts what is computed while it is on. by_name: operation → how often; waited: the same of the waits."""

    def __init__(self):
        super().__init__()
        self.by_name, self.waited = collections.Counter(), collections.Counter()
        self.alive = self.peak = 0
        self.storages = weakref.WeakValueDictionary()

    @property
    def operations(self) -> int:
        return sum(self.by_name.values())

    @property
    def waits(self) -> int:
        return sum(self.waited.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, name = function(*args, **(kwargs or {})), function._schema.name.removeprefix("aten::")
        indices = args[1] if name in INDEXED else ()
        if name in WAITS or any(x is not None and x.dtype == torch.bool for x in indices):
            self.waited[name] += 1
        if not function.is_view and name not in FREE:
            self.by_name[name] += 1
        if not function.is_view and name not in FREE - ALLOCATES:
            for made in result if isinstance(result, tuple | list) else (result,):
                self._made(made)
        return result

    def _made(self, tensor) -> None:
        """Count a result's memory until its storage is let go of."""
        if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if self.storages.get(storage._cdata) is None:
                self.storages[storage._cdata] = storage
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, size: int) -> None:
        self.alive -= size

# ----------------------------------------------------------------------------------------------------- what is counted
def loss_of(options, batch, student, teacher, projectors, adversary, n: dict[str, int]) -> torch.Tensor:
    """The total of a step, as train.py writes it."""
    α = 0.0 if options.method in WITHOUT_KD else options.kd_rate
    factors = {"nll_loss": 1 - α, **dict.fromkeys(KD_PARTS, α)}
    CE, KD, GA, DTW = terms(distill(options, batch, student, teacher, projectors, adversary, 0, factors), n)
    return (1 - α) * CE + α * KD + options.ga_weight * GA + options.dtw_weight * DTW

def of_step(options, rows: list[Row], folders: list[Path]) -> dict[str, Launches]:
    """A whole optimizer step of a method, on the CPU: its forward pass, backward pass and update. folders: the
    student's and the teacher's; a method of one vocabulary takes the student's twice. It is the second step: AdamW's
    moments are there."""
    folders = [folders[0]] * 2 if options.method in ONE_VOCABULARY else folders
    student, teacher = (load(folder, "random") for folder in folders)
    tokenizers = [load_tokenizer(folder) for folder in folders]
    examples, _, _ = encode_rows(rows, *tokenizers, 96, 72)
    batch = with_places(collate(examples, *(t.eos_id for t in tokenizers), options.align_on))
    if pairing := pairing_of(options, *tokenizers, examples, rows, "cpu"):
        batch |= pairing.tensors(examples)
    if options.method == "mined":
        strings = token_strings(*tokenizers)
        batch |= MinED(strings, torch.arange(len(strings[1])) % len(strings[0])).tensors(examples)
    modules = make_modules(options, student, teacher)
    learners = [p for module in (student.train(), *modules) if module for p in module.parameters()]
    optimizer = torch.optim.AdamW(learners, lr=1e-4, fused=True)
    teacher.requires_grad_(False)
    n = valid_tokens(examples)
    for _ in range(2):
        with Launches() as forward:
            loss = loss_of(options, batch, student, teacher, *modules, n)
        with Launches() as backward:
            loss.backward()
        with Launches() as update:
            clip_gradients(learners, 1.0)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"forward": forward, "backward": backward, "update": update}

def of_token(folder: Path, padded: bool) -> Launches:
    """One more token of four rows that are being answered, of like length or left-padded."""
    ids = torch.ones(4, 12, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0 if padded else 1
    steps = stream(load(folder, "random"), ids, mask, 8, temperature=0)
    next(steps), next(steps)
    with Launches() as count:
        next(steps)
    return count

def of_diagonal() -> tuple[float, float]:
    """Operations for every anti-diagonal of soft-DTW, forward and backward: what 16 more of them cost."""
    counts = []
    for size in (8, 16):
        cost, lengths = torch.rand(3, size, size, requires_grad=True), torch.full((3,), size)
        with Launches() as forward:
            value = sdtw(cost, lengths, lengths, 1.0).sum()
        with Launches() as backward:
            value.backward()
        counts.append((forward.operations, backward.operations))
    return tuple((more - less) / 16 for less, more in zip(*counts))

def show(rows: list[Row], folders: list[Path]) -> list[dict]:
    """Print, and return for bench.json, the counts of a step of every method, of a token and of an anti-diagonal."""
    parts, counts = ("forward", "backward", "update"), []
    print(f"{'operations (waits)':<16}" + "".join(f"{part:>16}" for part in (*parts, "peak kB")))
    for method, preset in METHODS.items():
        found = of_step(Options(method=method, **preset), rows, folders)
        peak = max(count.peak for count in found.values())
        print(f"{method:<16}" + "".join(f"{f'{c.operations} ({c.waits})':>16}" for c in found.values())
              + f"{peak / 1e3:16.0f}")
        counts.append({"what": method, "peak": peak} | {part: [c.operations, c.waits] for part, c in found.items()})
    tokens = [of_token(folders[1], padded).operations for padded in (False, True)]
    print("one more token of the teacher, four rows: {} operations, left-padded {}".format(*tokens))
    diagonal = of_diagonal()
    print("an anti-diagonal of soft-DTW: {:.0f} operations forward, {:.0f} backward".format(*diagonal))
    return [*counts, {"what": "token", "operations": tokens}, {"what": "anti-diagonal", "operations": diagonal}]
