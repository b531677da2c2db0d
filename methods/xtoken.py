"""X-Token's P-KL (arXiv 2605.21699, NeMo RL): a fixed sparse map W carries the student's
probabilities into the teacher's vocabulary, and chunks are compared there.

W (V_s, V_t): a student token maps to the teacher's of the same text alone, with weight 1. Any
other token's text is cut by the other tokenizer, and its first PIECES pieces weigh 0.9 · 0.1^i,
rescaled to sum to 1; both ways are added, and each row keeps its PIECES largest.

    p_s = softmax(z_s/T)                p_t = softmax(z_t/T) over the TOP teacher tokens with the
                                        largest logits anywhere in the batch
    p̂ = the mean of Wᵀ p_s over a chunk's student positions, rescaled to sum to 1 over the same
    log q = the mean of log p_t over its teacher positions
    KD = Σ over rows  (student tokens of the row) · mean over its chunks of T² Σ q (log q − log p̂)

The release scales KD to the cross-entropy in every step, in place of --kd_rate."""

import torch
import torch.nn.functional as F

from methods import Method
from methods.blocks import blocks_of, cross_entropy, in_whole_rows, student_side, teacher_side
from methods.shared_tokens import ChunksOfBatch, student_token_of

TOP = 8192
PIECES = 4
SMALLEST = 1e-10


def pieces_of(token: bytes, tokenizer) -> list[tuple[int, float]]:
    """The first pieces into which a tokenizer cuts a token's text, with their weights."""
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return []  # a part of a character has no pieces
    # Behind a line's end, because SentencePiece puts a space before the first word of a text.
    ids, spans = tokenizer.encode_with_spans("\n" + text)
    if any(start == 0 and end > 1 for start, end in spans):  # a token goes over the line's end
        ids = tokenizer.encode(text)
    else:
        ids = [i for i, (start, _) in zip(ids, spans) if start > 0]
    ids = ids[:PIECES]
    weights = [0.9 * 0.1**i for i in range(len(ids))]
    return [(i, weight / sum(weights)) for i, weight in zip(ids, weights)]


class ProjectedChunks(ChunksOfBatch):
    """Adds the map, too: map_ids and map_weights (V_s, PIECES), −1 for no token."""

    same_bytes = True

    def __init__(self, student_tokenizer, teacher_tokenizer, examples):
        super().__init__(student_tokenizer, teacher_tokenizer, examples)
        rows: list[dict[int, float]] = [{} for _ in range(student_tokenizer.vocab_size)]
        same = student_token_of(student_tokenizer, teacher_tokenizer)
        exact = {i: j for j, i in enumerate(same) if i >= 0}
        for i, row in enumerate(rows):
            if i in exact:
                row[exact[i]] = 1.0
            elif i not in student_tokenizer.control:
                for j, weight in pieces_of(student_tokenizer.token_bytes(i), teacher_tokenizer):
                    row[j] = row.get(j, 0.0) + weight
        for j in range(teacher_tokenizer.vocab_size):
            if same[j] < 0 and j not in teacher_tokenizer.control:
                for i, weight in pieces_of(teacher_tokenizer.token_bytes(j), student_tokenizer):
                    if i not in exact:
                        rows[i][j] = rows[i].get(j, 0.0) + weight
        self.ids = torch.full((len(rows), PIECES), -1)
        self.weights = torch.zeros(len(rows), PIECES)
        for i, row in enumerate(rows):
            largest = sorted(row.items(), key=lambda item: -item[1])[:PIECES]
            for place, (j, weight) in enumerate(largest):
                self.ids[i, place], self.weights[i, place] = j, weight

    def __call__(self, examples, device) -> dict:
        mapped = {"map_ids": self.ids.to(device), "map_weights": self.weights.to(device)}
        return super().__call__(examples, device) | mapped


@torch.no_grad()
def likeliest_tokens(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """The TOP tokens with the largest logit at any position, in order: (N, d), (V, d) → (K,)."""
    largest = [
        F.linear(hidden[block], head).max(0).values
        for block in blocks_of(len(hidden), hidden.device)
    ]
    return torch.stack(largest).max(0).values.topk(min(TOP, len(head))).indices.sort().values


def chunk_means(values: torch.Tensor, number: torch.Tensor, count: int) -> torch.Tensor:
    """The mean of values (n, V) over positions of the same number (n,): (count, V)."""
    sums = values.new_zeros(count, values.size(1)).index_add(0, number, values)
    return sums / torch.bincount(number, minlength=count)[:, None]


def xtoken(batch, student, teacher, modules, objective):
    """→ total, terms nll_loss, accuracy and kd_loss."""
    s, t = student_side(batch, student), teacher_side(batch, teacher)
    temperature, num_chunks = objective.options.temperature, batch["num_chunks"]
    top = likeliest_tokens(t.hidden, t.head)
    column = torch.full((len(t.head) + 1,), len(top), device=top.device)  # the last one: left out
    column[top] = torch.arange(len(top), device=top.device)
    columns, weights = column[batch["map_ids"]], batch["map_weights"]  # −1 is the last one, too

    def block_loss(block, of_teacher, z_s):
        terms = cross_entropy(z_s, s.labels[block])
        chunks_s = batch["student_batch_chunks"][block]
        chunks_t = batch["teacher_batch_chunks"][of_teacher]
        in_s, in_t = chunks_s < num_chunks, chunks_t < num_chunks
        here, number_s = chunks_s[in_s].unique(return_inverse=True)
        _, number_t = chunks_t[in_t].unique(return_inverse=True)
        p_s = (z_s[in_s].float() / temperature).softmax(-1)[:, : len(columns)]
        p_s = chunk_means(p_s, number_s, len(here))
        projected = p_s.new_zeros(len(here), len(top) + 1)
        for place in range(PIECES):
            projected = projected.index_add(1, columns[:, place], p_s * weights[:, place])
        projected = projected[:, :-1]
        log_p = (projected / (projected.sum(-1, keepdim=True) + SMALLEST) + SMALLEST).log()
        with torch.no_grad():
            z_t = F.linear(t.hidden[of_teacher][in_t], t.head[top])
            log_q = (z_t.float() / temperature).log_softmax(-1)
            log_q = chunk_means(log_q, number_t, len(here))
        distance = temperature**2 * (log_q.exp() * (log_q - log_p)).sum(-1)
        terms["kd_loss"] = batch["chunk_weights"][here] * distance
        return objective(ce=terms["nll_loss"].sum(), kd=terms["kd_loss"].sum()), terms

    total, sums = in_whole_rows(block_loss, s, t)
    return total, objective.per_student_token(sums)


METHOD = Method(
    loss=xtoken,
    batch_extras=ProjectedChunks,
    defaults=dict(temperature=1.0, kd_rate=0.75),
    uses=("kd_rate", "temperature", "on_policy", "cache_teacher"),
)
