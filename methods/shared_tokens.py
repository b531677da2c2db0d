"""What two vocabularies share: tokens of the same bytes, positions where both sides have read the
same bytes and the same token comes next, and chunks. alm, dskdv2, gold, strict, xtoken use it."""

import re

import torch


def byte_doubles(tokenizer) -> set[int]:
    """SentencePiece has a token for every byte; where that byte is a token of its own, too, a text
    never gives the first. → the ids of those."""
    named = {i for name, i in tokenizer.id_of.items() if re.fullmatch("<0x[0-9A-F]{2}>", name)}
    others = {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size) if i not in named}
    return {i for i in named if tokenizer.token_bytes(i) in others}


def tokens_by_bytes(tokenizer) -> dict[bytes, int]:
    """The tokens that stand for text, of several with the same bytes the first; neither control
    tokens nor byte_doubles."""
    left_out = tokenizer.control | byte_doubles(tokenizer)
    found = {}
    for i in range(tokenizer.vocab_size):
        if i not in left_out and tokenizer.token_bytes(i):
            found.setdefault(tokenizer.token_bytes(i), i)
    return found


def student_token_of(student_tokenizer, teacher_tokenizer) -> list[int]:
    """The student's token with the same bytes for each of the teacher's, −1 where there is none.
    EOS is EOS."""
    of_student = tokens_by_bytes(student_tokenizer)
    found = [-1] * teacher_tokenizer.vocab_size
    for token_bytes, i in tokens_by_bytes(teacher_tokenizer).items():
        found[i] = of_student.get(token_bytes, -1)
    found[teacher_tokenizer.eos_id] = student_tokenizer.eos_id
    return found


class SharedTokens:
    """Adds shared, the ids (2, K) of tokens that both have, the student's first."""

    def __init__(self, student_tokenizer, teacher_tokenizer, examples):
        self.student_token = student_token_of(student_tokenizer, teacher_tokenizer)
        of_teacher = torch.tensor(self.student_token)
        of_student = of_teacher[of_teacher >= 0]
        self.shared = torch.stack([of_student, (of_teacher >= 0).nonzero().squeeze(1)])

    def __call__(self, examples, device) -> dict:
        return {"shared": self.shared.to(device)}


class ExactPairs(SharedTokens):
    """Adds pairs (2, P) too: student and teacher positions, counted through the batch, where both
    have read the same bytes of the response and the same token comes next."""

    def __call__(self, examples, device) -> dict:
        pairs, num_s, num_t = [], 0, 0
        for example in examples:
            student_ids, teacher_ids = example.student.response_ids, example.teacher.response_ids
            place = {span: j for j, span in enumerate(example.teacher.spans)}
            for i, span in enumerate(example.student.spans):
                j = place.get(span)
                if j is not None and student_ids[i] == self.student_token[teacher_ids[j]]:
                    pairs.append((num_s + i, num_t + j))
            num_s += len(student_ids)
            num_t += len(teacher_ids)
        pairs = torch.tensor(pairs, dtype=torch.long).view(-1, 2).t().contiguous()
        return super().__call__(examples, device) | {"pairs": pairs.to(device)}


def has_dummy_space(sequence, tokenizer, text: bytes) -> bool:
    """Whether the first token of a response has a space before it that the text has not:
    SentencePiece puts one there."""
    begin, end = sequence.spans[0]
    return tokenizer.token_bytes(sequence.response_ids[0]) == b" " + text[begin:end]


class ChunksOfBatch:
    """Numbers a batch's chunks through all its rows.

    → student_batch_chunks (N_s,), teacher_batch_chunks (N_t,): the number of each position's chunk,
    num_chunks where the two sides have not the same text of it (a row was cut there); and
    chunk_weights (num_chunks,): the row's student tokens over its chunks, so that a row weighs as
    many tokens as it has. with_end: whether EOS is a chunk. same_bytes: whether a first chunk is
    left out that begins with a dummy space on one side alone."""

    with_end = True
    same_bytes = False

    def __init__(self, student_tokenizer, teacher_tokenizer, examples):
        self.tokenizers = student_tokenizer, teacher_tokenizer

    def __call__(self, examples, device) -> dict:
        student, teacher, weights = [], [], []
        chunks_of = [self.compared_chunks(example) for example in examples]
        num_chunks = sum(map(len, chunks_of))
        for example, compared in zip(examples, chunks_of):
            number = {chunk: len(weights) + i for i, chunk in enumerate(compared)}
            student += [number.get(chunk, num_chunks) for chunk in example.student.chunks]
            teacher += [number.get(chunk, num_chunks) for chunk in example.teacher.chunks]
            num_tokens = len(example.student.response_ids)
            weights += [num_tokens / len(compared) for _ in compared]
        return {
            "student_batch_chunks": torch.tensor(student, device=device),
            "teacher_batch_chunks": torch.tensor(teacher, device=device),
            "num_chunks": num_chunks,
            "chunk_weights": torch.tensor(weights, device=device),
        }

    def compared_chunks(self, example) -> range:
        """The numbers of a row's chunks that are compared."""
        student, teacher = example.student, example.teacher
        first, end = 0, example.num_whole_chunks
        ends = [side.spans[-1] for side in (student, teacher)]
        if not self.with_end and all(start == stop for start, stop in ends):
            end = min(end, student.chunks[-1], teacher.chunks[-1])
        if self.same_bytes:
            text = example.text.encode()
            student_space = has_dummy_space(student, self.tokenizers[0], text)
            teacher_space = has_dummy_space(teacher, self.tokenizers[1], text)
            if student_space != teacher_space:
                first = 1
        return range(first, end)


class SharedTextChunks(ChunksOfBatch):
    """Adds shared, too; EOS is no chunk."""

    with_end = False
    same_bytes = True

    def __init__(self, student_tokenizer, teacher_tokenizer, examples):
        super().__init__(student_tokenizer, teacher_tokenizer, examples)
        self.shared_tokens = SharedTokens(student_tokenizer, teacher_tokenizer, examples)

    def __call__(self, examples, device) -> dict:
        return super().__call__(examples, device) | self.shared_tokens(examples, device)
