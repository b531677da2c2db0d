"""What two vocabularies share: tokens of the same bytes, positions where both sides have read the
same bytes and the same token comes next, and chunks. alm, dskdv2, gold, strict, xtoken use it."""

import torch


def student_token_of(student_tokenizer, teacher_tokenizer) -> list[int]:
    """The student's token with the same bytes for each of the teacher's, −1 where there is none.
    EOS is EOS; other control tokens are left out."""
    own = {}
    for i in reversed(range(student_tokenizer.vocab_size)):
        if i not in student_tokenizer.control and student_tokenizer.token_bytes(i):
            own[student_tokenizer.token_bytes(i)] = i  # of several the first
    found = [-1] * teacher_tokenizer.vocab_size
    for i in range(teacher_tokenizer.vocab_size):
        if i not in teacher_tokenizer.control:
            found[i] = own.pop(teacher_tokenizer.token_bytes(i), -1)  # each is taken once
    found[teacher_tokenizer.eos_id] = student_tokenizer.eos_id
    return found


class SharedTokens:
    """Adds shared, the ids (2, K) of tokens that both have, the student's first."""

    def __init__(self, student_tokenizer, teacher_tokenizer, examples):
        of_teacher = torch.tensor(student_token_of(student_tokenizer, teacher_tokenizer))
        of_student = of_teacher[of_teacher >= 0]
        self.shared = torch.stack([of_student, (of_teacher >= 0).nonzero().squeeze(1)])

    def __call__(self, examples, device) -> dict:
        return {"shared": self.shared.to(device)}


class ExactPairs(SharedTokens):
    """Adds pairs (2, P) too: student and teacher positions, counted through the batch, where both
    have read the same bytes of the response and the next token of both ends at the same byte."""

    def __call__(self, examples, device) -> dict:
        pairs, num_s, num_t = [], 0, 0
        for example in examples:
            place = {span: j for j, span in enumerate(example.teacher.spans)}
            for i, span in enumerate(example.student.spans):
                if span in place:
                    pairs.append((num_s + i, num_t + place[span]))
            num_s += len(example.student.response_ids)
            num_t += len(example.teacher.response_ids)
        pairs = torch.tensor(pairs, dtype=torch.long).view(-1, 2).t().contiguous()
        return super().__call__(examples, device) | {"pairs": pairs.to(device)}


def numbered(chunks: list[int], first: int, whole: int, none: int) -> list[int]:
    """A row's chunks counted through the batch; `none` for those that are not whole."""
    return [first + chunk if chunk < whole else none for chunk in chunks]


class ChunksOfBatch:
    """Numbers a batch's chunks through all its rows.

    → student_batch_chunks (N_s,), teacher_batch_chunks (N_t,): the number of each position's chunk,
    num_chunks where the two sides have not the same text of it (a row was cut there); and
    chunk_weights (num_chunks,): the row's student tokens over its chunks, so that a row weighs as
    many tokens as it has. with_end: whether EOS is a chunk."""

    with_end = True

    def __init__(self, student_tokenizer, teacher_tokenizer, examples):
        pass

    def __call__(self, examples, device) -> dict:
        student, teacher, weights = [], [], []
        wholes = [self.whole_chunks(example) for example in examples]
        num_chunks = sum(wholes)
        for example, whole in zip(examples, wholes):
            first = len(weights)
            student += numbered(example.student.chunks, first, whole, num_chunks)
            teacher += numbered(example.teacher.chunks, first, whole, num_chunks)
            weights += [len(example.student.response_ids) / max(whole, 1)] * whole
        return {
            "student_batch_chunks": torch.tensor(student, device=device),
            "teacher_batch_chunks": torch.tensor(teacher, device=device),
            "num_chunks": num_chunks,
            "chunk_weights": torch.tensor(weights, device=device),
        }

    def whole_chunks(self, example) -> int:
        whole = example.num_whole_chunks
        ends = [side.spans[-1] for side in (example.student, example.teacher)]
        if not self.with_end and all(start == end for start, end in ends):
            whole = min(whole, example.student.chunks[-1], example.teacher.chunks[-1])
        return whole


class SharedTextChunks(ChunksOfBatch):
    """Adds shared, too; EOS is no chunk."""

    with_end = False

    def __init__(self, student_tokenizer, teacher_tokenizer, examples):
        self.shared_tokens = SharedTokens(student_tokenizer, teacher_tokenizer, examples)

    def __call__(self, examples, device) -> dict:
        return super().__call__(examples, device) | self.shared_tokens(examples, device)
