"""The two sides of a batch, each at its valid positions: those whose label is a response token or EOS."""
from dataclasses import dataclass

import torch

PLACES = "grid_index", "grid_mask", "grid_cells"

def places(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where labels (B, T) are not −100 → index (B, L) into their rows; mask (B, L), true on the grid's real cells; and
    cells (N,), the numbers of these in the grid. A GPU would have to be waited for: how many they are is data."""
    is_valid = labels != -100
    lengths = is_valid.sum(1)
    longest = int(lengths.max())
    index = is_valid.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
    mask = torch.arange(longest, device=labels.device)[None] < lengths[:, None]
    return index, mask, mask.flatten().nonzero().squeeze(1)

def with_places(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch, and the places of both sides, found while it is on the CPU: no step waits for them (side_of)."""
    found = {f"{side}_{name}": x for side in ("student", "teacher")
             for name, x in zip(PLACES, places(batch[f"{side}_labels"]))}
    return batch | found

class Valid:
    """Where the valid positions of one side are, as a packed list and as a (B, L) grid.
    labels: (B, T), −100 where not valid. `labels` (N,) are the others, packed; `mask` (B, L) is true on the grid's real
    cells; a row's valid positions come first, in order, and L is the largest number of them in a row. known: places of
    the labels, where they have been found."""

    def __init__(self, labels: torch.Tensor, known: tuple[torch.Tensor, ...] | None = None):
        self.index, self.mask, self.cells = known or places(labels)
        self.labels = self.pack(labels.gather(1, self.index))

    def grid(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T) or (B, T, d) → the grid's positions of it, (B, L) or (B, L, d); zero where there is no position."""
        index = self.index if x.dim() == 2 else self.index[..., None].expand(-1, -1, x.size(-1))
        mask = self.mask if x.dim() == 2 else self.mask[..., None]
        return x.gather(1, index) * mask

    def pack(self, grid: torch.Tensor) -> torch.Tensor:
        """(B, L, ...) → (N, ...), the valid positions of all rows one after the other."""
        return grid.flatten(0, 1).index_select(0, self.cells)

    def deviation(self, grid: torch.Tensor) -> torch.Tensor:
        """σ: the standard deviation of (B, L, d) over valid positions and features."""
        return self.pack(grid).float().std()

    def mean_one(self, weights: torch.Tensor) -> torch.Tensor:
        """Rescale weights (N,) of the packed positions so that each row's positions have the mean 1."""
        flat = weights.new_zeros(self.mask.numel()).index_copy(0, self.cells, weights)
        grid = flat.view(self.mask.shape)
        mean = grid.sum(1, keepdim=True) / self.mask.sum(1, keepdim=True)
        return self.pack(grid / mean.clamp(min=1e-12))

@dataclass
class Side:
    """What the losses see of one model: its batch on the grid of valid positions, its embedding and its head."""
    valid: Valid
    x: torch.Tensor                     # (B, L), the input tokens
    y: torch.Tensor                     # (B, L), the label tokens
    chunks: torch.Tensor | None         # (B, L), the number of each position's chunk, where an alignment needs it
    embed: torch.nn.Module              # E: token ids → (…, d)
    head: torch.Tensor | None = None    # W: (V, d)
    hidden: torch.Tensor | None = None  # h: (B, L, d) after the final norm
    starts: torch.Tensor | None = None  # (B, L), the byte at which each position's label begins, for causal alignments

    @property
    def packed(self) -> torch.Tensor:
        """h at the valid positions, (N, d)."""
        return self.valid.pack(self.hidden)

def side_of(batch: dict[str, torch.Tensor], name: str, embed: torch.nn.Module) -> Side:
    """name: "student" or "teacher". Its head and hidden states, which attention does not need, are left out."""
    known = tuple(batch[f"{name}_{what}"] for what in PLACES if f"{name}_{what}" in batch)
    valid = Valid(batch[f"{name}_labels"], known)
    more = {what: valid.grid(batch[f"{name}_{what}"]) if f"{name}_{what}" in batch else None
            for what in ("chunks", "starts")}
    return Side(valid, valid.grid(batch[f"{name}_ids"]), valid.grid(batch[f"{name}_labels"]), embed=embed, **more)
