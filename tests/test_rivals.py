"""dskdv2, strict, gold and xtoken against their definitions, and gold against TRL."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import tokenize_align as ta
from methods import blocks, dskdv2, find_method, gold, mined, strict, xtoken
from methods.divergences import divergence
from methods.projector_init import shared_tokens
from methods.shared_tokens import student_token_of
from tests.helpers import TEXTS, WAYS, chunks, close, objective, options, random_models, two_sides

LENGTHS = ((99, 99), (4, 9), (9, 3))


def prepared(method, way, lengths, world, monkeypatch, **more):
    """tokenizers, examples, models, batch, objective, and both sides' logits by row."""
    tokenizers, examples = two_sides(world, way, lengths)
    models = random_models(tokenizers, monkeypatch)
    batch = ta.collate(examples, 0, 0)
    batch |= find_method(method).batch_extras(*tokenizers, examples)(examples, "cpu")
    chosen = objective(options(method, **more), batch)
    sides = blocks.student_side(batch, models[0]), blocks.teacher_side(batch, models[1])
    logits = [(side.hidden @ side.head.t()).split(side.counts) for side in sides]
    return tokenizers, examples, models, batch, chosen, logits


def labels_of(sequence) -> torch.Tensor:
    return torch.tensor(sequence.response_ids)


def cross_entropy_by_hand(examples, logits) -> torch.Tensor:
    return sum(
        F.cross_entropy(z, labels_of(e.student), reduction="sum") for z, e in zip(logits, examples)
    )


def exact_pairs(example, tokenizers):
    """(i, j) of every two tokens of the same bytes that stand for the same bytes of the text."""
    student, teacher = tokenizers
    for i, (token, span) in enumerate(zip(example.student.response_ids, example.student.spans)):
        for j, (other, place) in enumerate(
            zip(example.teacher.response_ids, example.teacher.spans)
        ):
            ends = token == student.eos_id and other == teacher.eos_id
            if span == place and (ends or student.token_bytes(token) == teacher.token_bytes(other)):
                yield i, j


def compared_chunks(example, tokenizers) -> list[tuple[range, range]]:
    """The chunks, without a first one whose tokens have other bytes: SentencePiece adds a space."""
    found = chunks(example.student.spans, example.teacher.spans)
    starts = []
    sides = (example.student, example.teacher)
    for side, tokenizer, positions in zip(sides, tokenizers, found[0]):
        starts.append(b"".join(tokenizer.token_bytes(side.response_ids[i]) for i in positions))
    return found if starts[0] == starts[1] else found[1:]


def assert_same(loss, batch, models, modules, chosen, ce, kd, monkeypatch):
    """Values and gradients, in blocks of any size."""
    n, α = chosen.num_student_tokens, chosen.options.kd_rate
    parameters = [models[0].head.weight, models[0].embed.weight]
    parameters += [p for module in modules.values() for p in module.parameters()]
    wanted = torch.autograd.grad((1 - α) * ce / n + α * kd / n, parameters, allow_unused=True)
    for size in (1, 7, 500):
        monkeypatch.setattr(blocks, "BLOCK", size)
        total, terms = loss(batch, *models, modules, chosen)
        close(terms["nll_loss"], ce.detach() / n, 1e-4)
        close(terms["kd_loss"], kd.detach() / n, 1e-4)
        found = torch.autograd.grad(total, parameters, allow_unused=True)
        for mine, other in zip(found, wanted):
            assert (mine is None) == (other is None)
            if other is not None:
                close(mine, other, 2e-4)


def test_tokens_of_the_same_bytes(world):
    student, teacher = (ta.load_tokenizer(world / side) for side in ("student", "teacher"))
    found = student_token_of(student, teacher)
    assert found[teacher.eos_id] == student.eos_id and found[1] == -1  # <s> is no text
    for j, i in enumerate(found):
        if i >= 0 and j != teacher.eos_id:
            assert student.token_bytes(i) == teacher.token_bytes(j)
    own = {student.token_bytes(i) for i in range(student.vocab_size) if i not in student.control}
    names = {j: name for name, j in teacher.id_of.items()}
    num_doubles = 0
    for j, i in enumerate(found):
        if i < 0 and j not in teacher.control and teacher.token_bytes(j) in own:
            num_doubles += 1
            assert names[j] == f"<0x{teacher.token_bytes(j)[0]:02X}>"  # "." has a token of its own
    assert num_doubles > 10
    for text in TEXTS:
        for j in teacher.encode(text):  # what a text gives is mapped where it can be
            assert (found[j] >= 0) == (teacher.token_bytes(j) in own)
    assert shared_tokens(student, teacher)[0][1] == found.index(
        shared_tokens(student, teacher)[0][0]
    )


def test_mined_maps_to_tokens_that_texts_give(world):
    """Here SentencePiece is the student."""
    teacher, student = (ta.load_tokenizer(world / side) for side in ("student", "teacher"))
    vocabulary_map = mined.AlignedPairs(student, teacher, []).vocabulary_map
    of_bytes = {teacher.token_bytes(j): j for j in range(teacher.vocab_size)}
    wanted = [i for text in TEXTS for i in student.encode(text)]
    found = [i for i in wanted if student.token_bytes(i) in of_bytes]
    assert len(found) > 20
    assert [vocabulary_map[of_bytes[student.token_bytes(i)]] for i in found] == found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_strict_from_its_definition(way, lengths, world, monkeypatch):
    tokenizers, examples, models, batch, chosen, (z_s, z_t) = prepared(
        "strict", way, lengths, world, monkeypatch, temperature=1.5
    )
    of_teacher = student_token_of(*tokenizers)
    shared = [(i, j) for j, i in enumerate(of_teacher) if i >= 0]
    kd, num_pairs = 0.0, 0
    for row, example in enumerate(examples):
        for i, j in exact_pairs(example, tokenizers):
            num_pairs += 1
            s, t = z_s[row][i] / 1.5, z_t[row][j].detach() / 1.5
            best = sorted(shared, key=lambda pair: -float(s[pair[0]]))[:16]
            q = s[[i for i, _ in best]].log_softmax(0)
            p = t[[j for _, j in best]].log_softmax(0)
            kd = kd + (q.exp() * (q - p)).sum()
    assert num_pairs > 3
    ce = cross_entropy_by_hand(examples, z_s)
    assert_same(strict.strict, batch, models, {}, chosen, ce, kd, monkeypatch)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_dskdv2_from_its_definition(way, lengths, world, monkeypatch):
    tokenizers, examples, models, batch, chosen, (z_s, z_t) = prepared(
        "dskdv2", way, lengths, world, monkeypatch, divergence="js_divergence"
    )
    torch.manual_seed(1)
    sizes = (model.embed.weight.size(1) for model in models)
    configs = [SimpleNamespace(hidden_size=size) for size in sizes]
    modules = dskdv2.make_projectors(SimpleNamespace(adversary="none"), *configs)
    projectors = modules["projectors"].double()
    head_s, head_t = models[0].head.weight, models[1].head.weight.detach()
    of_teacher = student_token_of(*tokenizers) + [-1] * 3  # the head has more rows
    guesses = [
        of_teacher[int(z_t[row][j].argmax())]
        for row, example in enumerate(examples)
        for _, j in exact_pairs(example, tokenizers)
    ]
    with torch.no_grad():  # the student's logits of some guesses are the largest easily
        models[0].head.weight[[g for g in guesses if g >= 0][:3]] *= 20
    sides = blocks.student_side(batch, models[0]), blocks.teacher_side(batch, models[1])
    h_s, h_t = (side.hidden.split(side.counts) for side in sides)
    z_s = [(side @ head_s.t()) for side in h_s]
    pairs = []
    for row, example in enumerate(examples):
        for i, j in exact_pairs(example, tokenizers):
            g = of_teacher[int(z_t[row][j].argmax())]
            if g >= 0:
                pairs.append((z_s[row][i], z_t[row][j].detach(), h_s[row][i], h_t[row][j], g))
    # Two pairs on which the projector agrees with the teacher.
    with torch.no_grad():
        inputs = torch.stack([pair[3] for pair in pairs[:2]])
        wanted = torch.stack([head_s[pair[4]] * 9 for pair in pairs[:2]])
        solution = torch.linalg.lstsq(inputs, wanted).solution
        projectors.t2s.weight.copy_(solution.t())
        projectors.t2s.bias.zero_()
    ce_term = s2t_term = right_term = 0.0
    num_right = 0
    for z, z_teacher, state_s, state_t, g in pairs:
        t2s = head_s.detach() @ projectors.t2s(state_t)
        ce_term = ce_term - t2s.log_softmax(0)[g] / len(pairs)
        s2t = head_t @ projectors.s2t(state_s)
        kind = chosen.options.divergence, chosen.options.temperature
        s2t_term = s2t_term + divergence(kind[0], s2t[None], z_teacher[None], kind[1]).sum() / len(
            pairs
        )
        if int(t2s.argmax()) == g:
            num_right += 1
            right_term = (
                right_term + divergence(kind[0], z[None], t2s[None].detach(), kind[1]).sum()
            )
    assert 0 < num_right < len(pairs)
    kd = chosen.num_student_tokens * (ce_term + s2t_term + right_term / num_right)
    ce = cross_entropy_by_hand(examples, z_s)
    assert_same(dskdv2.dskdv2, batch, models, modules, chosen, ce, kd, monkeypatch)


def test_pieces_of_a_token(world):
    """As they would stand inside a text."""
    student, teacher = (ta.load_tokenizer(world / side) for side in ("student", "teacher"))
    for tokenizer in (student, teacher):
        pieces = xtoken.pieces_of(b" Mira", tokenizer)
        text = b"".join(tokenizer.token_bytes(i) for i, _ in pieces)
        assert b" Mira".startswith(text) and len(text) > 2
        assert abs(sum(weight for _, weight in pieces) - 1) < 1e-9
        if len(pieces) > 1:
            close(pieces[1][1] / pieces[0][1], 0.1)
        assert [tokenizer.token_bytes(i) for i, _ in xtoken.pieces_of(b"\n", tokenizer)] == [b"\n"]
    assert xtoken.pieces_of("é".encode()[:1], teacher) == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_xtoken_from_its_definition(way, lengths, world, monkeypatch):
    monkeypatch.setattr(xtoken, "TOP", 300)
    tokenizers, examples, models, batch, chosen, (z_s, z_t) = prepared(
        "xtoken", way, lengths, world, monkeypatch, temperature=1.5
    )
    student, teacher = tokenizers
    exact = {i: j for j, i in enumerate(student_token_of(*tokenizers)) if i >= 0}
    W = torch.zeros(student.vocab_size, teacher.vocab_size, dtype=torch.float64)
    ways = ((student, teacher, exact.keys(), False), (teacher, student, set(exact.values()), True))
    for own, other, known, swapped in ways:
        for i in range(own.vocab_size):
            if i in known or i in own.control:
                continue
            pieces = [piece for piece, _ in xtoken.pieces_of(own.token_bytes(i), other)]
            total = sum(0.9 * 0.1**k for k in range(len(pieces)))
            for k, piece in enumerate(pieces):
                place = (piece, i) if swapped else (i, piece)
                if place[0] not in exact:
                    W[place] += 0.9 * 0.1**k / total
    for i, j in exact.items():
        W[i], W[i, j] = 0.0, 1.0
    smallest = W.topk(4).values[:, -1:]
    ties = ((W == smallest) & (smallest > 0)).sum(1) > 1
    found = torch.zeros(student.vocab_size, teacher.vocab_size + 1, dtype=torch.float64)
    found.scatter_(1, batch["map_ids"] % (teacher.vocab_size + 1), batch["map_weights"].double())
    close(found[~ties, :-1], torch.where(W >= smallest, W, 0.0)[~ties], 1e-6)
    W = found[:, :-1]  # of several equally large ones any may stay

    top = torch.cat(z_t).detach().max(0).values.topk(300).indices
    top = top[top < teacher.vocab_size + 3].sort().values
    wide = F.pad(W, (0, 3))[:, top]
    kd, num_chunks = 0.0, 0
    for row, e in enumerate(examples):
        of_row = []
        for of_s, of_t in compared_chunks(e, tokenizers):
            if of_s and of_t and e.student.spans[of_s[-1]][1] == e.teacher.spans[of_t[-1]][1]:
                p = (z_s[row][list(of_s)] / 1.5).softmax(-1).mean(0)[: len(W)]
                p = p @ wide
                p = p / p.sum()
                log_q = (z_t[row][list(of_t)].detach()[:, top] / 1.5).log_softmax(-1).mean(0)
                of_row.append(1.5**2 * (log_q.exp() * (log_q - (p + 1e-10).log())).sum())
        num_chunks += len(of_row)
        if of_row:
            kd = kd + len(e.student.response_ids) * torch.stack(of_row).mean()
    assert num_chunks > 3
    ce = cross_entropy_by_hand(examples, z_s)
    assert_same(xtoken.xtoken, batch, models, {}, chosen, ce, kd, monkeypatch)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_gold_from_its_definition(way, lengths, world, monkeypatch):
    """Rows whose last token is cut; EOS is no chunk."""
    tokenizers, examples, models, batch, chosen, (z_s, z_t) = prepared(
        "gold", way, lengths, world, monkeypatch
    )
    kd = gold_by_hand(tokenizers, examples, z_s, z_t)
    ce = cross_entropy_by_hand(examples, z_s)
    assert_same(gold.gold, batch, models, {}, chosen, ce, kd, monkeypatch)


def gold_by_hand(tokenizers, examples, z_s, z_t):
    pairs = [(i, j) for j, i in enumerate(student_token_of(*tokenizers)) if i >= 0]
    of_s, of_t = (list(side) for side in zip(*pairs))
    kd = 0.0
    for row, e in enumerate(examples):
        of_row = []
        for in_s, in_t in compared_chunks(e, tokenizers):
            if not (in_s and in_t):
                continue
            ends = e.student.spans[in_s[-1]], e.teacher.spans[in_t[-1]]
            if ends[0][1] != ends[1][1] or ends[0][0] == ends[0][1]:
                continue
            merged = []
            for side, z, positions in ((e.student, z_s, in_s), (e.teacher, z_t, in_t)):
                p = z[row].softmax(-1)
                whole = p[positions[0]]
                for position in positions[1:]:
                    whole = whole * p[position, side.response_ids[position]].clamp(min=1e-8)
                merged.append(whole)
            P_s, P_t = merged[0], merged[1].detach()
            a, b = P_s[of_s].clamp(min=1e-8), P_t[of_t].clamp(min=1e-8)
            m = (a + b) / 2
            js = 0.5 * (a * (a / m).log() + b * (b / m).log()).sum()
            rest_s = [i for i in range(len(P_s)) if i not in set(of_s)]
            rest_t = [j for j in range(len(P_t)) if j not in set(of_t)]
            size = max(len(rest_s), len(rest_t))
            sorted_s = F.pad(P_s[rest_s].sort(descending=True).values, (0, size - len(rest_s)))
            sorted_t = F.pad(P_t[rest_t].sort(descending=True).values, (0, size - len(rest_t)))
            w = len(of_t) / len(P_t)
            of_row.append(w * js + (1 - w) * (sorted_s - sorted_t).abs().sum())
        if of_row:
            kd = kd + len(e.student.response_ids) * torch.stack(of_row).mean()
    return kd


def test_gold_equals_trl(world, monkeypatch):
    """ULDLoss with uld_use_hybrid_loss, on one row at a time, because TRL's mean is over rows. It
    is given the logits that predict a token at that token's place, where it reads them."""
    gold_trainer = pytest.importorskip("trl.experimental.gold.gold_trainer")
    tokenizers, examples, models, batch, chosen, logits = prepared(
        "gold", (0, 1), (99, 99), world, monkeypatch, kd_rate=1.0
    )
    pairs = [(i, j) for j, i in enumerate(student_token_of(*tokenizers)) if i >= 0]
    vocabularies = [
        {f"t{i}": i for i, _ in pairs} | {f"s{i}": i for i in range(600) if i not in dict(pairs)},
        {f"t{i}": j for i, j in pairs},
    ]
    fakes = [SimpleNamespace(get_vocab=lambda of=of: of) for of in vocabularies]
    config = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=True,
        uld_skip_teacher_eos=True,
        use_extended_uld=True,
        uld_token_merge_strategy="observed",
        uld_use_hybrid_loss=True,
        uld_hybrid_matched_weight=None,
        uld_hybrid_unmatched_weight=None,
        beta=0.5,
    )
    reference = gold_trainer.ULDLoss(config, *fakes)
    num_compared = 0
    for example in examples:
        part = ta.collate([example], 0, 0)
        part |= gold.SharedTextChunks(*tokenizers, examples)([example], "cpu")
        alone = objective(options("gold", kd_rate=1.0), part)
        total, _ = gold.gold(part, *models, {}, alone)
        mine = torch.autograd.grad(total, models[0].head.weight)[0]
        left = compared_chunks(example, tokenizers)
        if len(left) == 1:  # EOS
            assert part["num_chunks"] == 0
            continue
        num_compared += 1
        first = left[0][0][0], left[0][1][0]
        of_text = list(zip((example.student, example.teacher), first))
        ids = [labels_of(side)[None, begin:] for side, begin in of_text]
        offsets = [torch.tensor([side.spans[begin:]]) for side, begin in of_text]
        sides = blocks.student_side(part, models[0]), blocks.teacher_side(part, models[1])
        z = [(s.hidden @ s.head.t())[None, begin:] for s, begin in zip(sides, first)]
        expected = reference(z[0], z[1].detach(), *ids, *ids, *offsets)
        close(total.detach(), expected.detach().squeeze(), 1e-5)
        close(mine, torch.autograd.grad(expected, models[0].head.weight)[0], 1e-4)
    assert num_compared > 2
