"""See what the attention aligns: which teacher tokens does a student token attend to, is it the right place, and do the
distributions of keys and queries match?

    python probe.py out/toy-dskd_cma_ga                            # pictures, a table and probe.json for 20 rows of dev
    python probe.py out/toy-dskd_cma out/toy-dskd_cma_ga           # two checkpoints in one picture and one table
    python probe.py out/toy-dskd_cma_ga --curves                   # the run's losses and accuracies over its steps

As the first half of DSKD-CMA-GA (arXiv 2603.22056) asks it. The right place for a token is its chunk (tokenize_align.py), the
least stretch of text that both tokenizers cut out; a position of either side is named by the token that it predicts.

Notable here:
- attention depends on embeddings and P_q alone (cma.align), so that no model's layers are loaded;
- every number stands beside what uniform attention and the chunk-mean probe get on the same rows;
- intervals are 95% bootstrap intervals over samples (rows), not over tokens, which are not independent of each other.
"""
import collections
import json
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

import discriminator
import hub
import pictures
import toy
from checkpoint import load_modules
from cma import Valid, align
from config import flag, parse
from distill import make_modules
from hub import InputError
from model import load
from tokenize_align import Example, Sequence, collate, encode_rows, load_tokenizer, read_rows

BATCH = 32              # rows whose keys are divided by one σ_K, as in training
RESAMPLES = 2000
MOST_POINTS = 1000      # keys, and queries, in the scatter and in the energy distance

MEASURES = {
    "mass": "attention inside the right chunk",
    "hit": "strongest weight inside it",
    "mass_once": "  inside, tokens that occur once",
    "hit_once": "  strongest, tokens that occur once",
    "mass_repeated": "  inside, tokens that repeat",
    "hit_repeated": "  strongest, tokens that repeat",
    "entropy_bits": "entropy (bits)",
    "byte_distance": "token to the attention's centre (bytes)",
    "monotone_steps": "steps on which the centre moves on or stays",
}
SHARES = {name for name in MEASURES if name.startswith(("mass", "hit", "monotone"))}


# -------------------------------------------------------------------------------------------------- what is measured

def measure(weights: torch.Tensor, same_chunk: torch.Tensor, repeats: torch.Tensor, middles: torch.Tensor, other_middles: torch.Tensor) -> dict[str, torch.Tensor]:
    """One sample, one direction → for each of MEASURES its values, one a token (or a step), whose mean is the number.

    weights (N, M): how much each of N tokens takes of each of M on the other side; same_chunk (N, M) bool; repeats (N,) bool:
    the token occurs more than once among the N; middles (N,) and other_middles (M,): of the tokens' spans, in bytes.
    Weights that are equally strong share a hit. A token whose chunk has nothing on the other side (its text was cut there)
    has no right place and is left out of everything.
    """
    kept = same_chunk.any(1)
    weights, same_chunk, repeats, middles = (x[kept] for x in (weights.double(), same_chunk, repeats, middles))
    strongest = weights == weights.amax(1, keepdim=True)
    mass = (weights * same_chunk).sum(1)
    hit = (strongest & same_chunk).sum(1) / strongest.sum(1)
    centre = weights @ other_middles.double()
    return {"mass": mass, "hit": hit, "mass_once": mass[~repeats], "hit_once": hit[~repeats], "mass_repeated": mass[repeats], "hit_repeated": hit[repeats],
            "entropy_bits": torch.special.entr(weights).sum(1) / np.log(2), "byte_distance": (centre - middles).abs(),
            "monotone_steps": (centre.diff() > -1e-3).double()}


def resample(values: list[torch.Tensor]) -> tuple[float | None, np.ndarray]:
    """Every sample's values → their mean over all tokens, and that mean in RESAMPLES draws of as many samples with replacement.

    The draws depend on the number of samples only, so that two checkpoints' differences are paired. None where there is
    no value at all; draws without one are NaN.
    """
    sums, counts = np.array([float(v.sum()) for v in values]), np.array([len(v) for v in values])
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    with np.errstate(invalid="ignore"):
        means = sums[draws].sum(1) / counts[draws].sum(1)
    return (float(sums.sum() / counts.sum()) if counts.sum() else None), means


def interval(draws: np.ndarray) -> list[float]:
    """The 2.5 and 97.5 percentiles of the draws that have a value."""
    return np.nanpercentile(draws, [2.5, 97.5]).tolist()


def tell_apart(keys: torch.Tensor, queries: torch.Tensor, key_fold: torch.Tensor, query_fold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Is a logistic probe right about each held-out key and query? (N, d), (M, d) → (N,), (M,) of 0 and 1.

    key_fold (N,), query_fold (M,): 0 or 1. The probe is trained on each fold in turn, with an L2 penalty and both classes
    weighing the same, and asked about the other. No random numbers.
    """
    right = [torch.zeros(len(keys)), torch.zeros(len(queries))]
    for fold in (0, 1):
        seen = keys[key_fold == fold].float(), queries[query_fold == fold].float()
        both = torch.cat(seen)
        mean, scale = both.mean(0), both.std(0).clamp(min=1e-6)
        x_keys, x_queries = ((x - mean) / scale for x in seen)
        w = torch.zeros(keys.size(1) + 1, device=keys.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            value = F.softplus(-(x_keys @ w[:-1] + w[-1])).mean() + F.softplus(x_queries @ w[:-1] + w[-1]).mean() + 1e-3 * w[:-1].square().sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        for results, vectors, folds, sign in ((right[0], keys, key_fold, 1), (right[1], queries, query_fold, -1)):
            held_out = folds != fold
            results[held_out] = (sign * ((vectors[held_out].float() - mean) / scale @ w[:-1] + w[-1]).detach() > 0).float().cpu()
    return right[0], right[1]


def evenly(vectors: torch.Tensor) -> torch.Tensor:
    """At most MOST_POINTS of them."""
    return vectors[torch.linspace(0, len(vectors) - 1, min(len(vectors), MOST_POINTS)).long()]


def distances(keys: torch.Tensor, queries: torch.Tensor) -> dict[str, float]:
    """How far queries (M, d) are from keys (N, d), in the keys' standard deviation: the root mean square distance of a key
    from the keys' mean.

    mean_distance: ‖mean K − mean Q‖. energy_distance (Székely & Rizzo): 2 E‖K − Q‖ − E‖K − K'‖ − E‖Q − Q'‖ over different
    tokens, which is 0 on average for equal distributions; of at most MOST_POINTS evenly chosen tokens a side.
    """
    keys, queries = keys.double(), queries.double()
    deviation = (keys - keys.mean(0)).square().sum(1).mean().sqrt()
    some_keys, some_queries = evenly(keys), evenly(queries)
    within = sum(torch.pdist(x).mean() for x in (some_keys, some_queries))
    return {"mean_distance": float((keys.mean(0) - queries.mean(0)).norm() / deviation),
            "energy_distance": float((2 * torch.cdist(some_keys, some_queries).mean() - within) / deviation)}


# ---------------------------------------------------------------------------------------------- from a run to attention

@dataclass
class Sample:
    """One response in both tokenizations, and what each token takes of the other side: S and T valid positions, named by
    the token that they predict."""
    row: int                        # in the data file, from 0
    student: Sequence
    teacher: Sequence
    weights: torch.Tensor           # (S, T), student → teacher: each row sums to 1
    back: torch.Tensor              # (T, S), teacher → student
    queries: torch.Tensor | None    # (S, 2 d_t)
    keys: torch.Tensor              # (T, 2 d_t)

    @property
    def same_chunk(self) -> torch.Tensor:
        """(S, T)"""
        return torch.tensor(self.student.chunks)[:, None] == torch.tensor(self.teacher.chunks)

    @property
    def blocks(self) -> list[tuple[range, range]]:
        """The chunks that have tokens on both sides: (student tokens, teacher tokens)."""
        places = [{k: range(chunks.index(k), len(chunks) - chunks[::-1].index(k)) for k in chunks} for chunks in (self.student.chunks, self.teacher.chunks)]
        return [(places[0][k], places[1][k]) for k in places[0] if k in places[1]]


@torch.no_grad()
def attend(options, examples: list[Example], student, teacher, projectors, pads: tuple[int, int]) -> list[Sample]:
    """The attention of a run's alignment on some examples, float32 on the CPU. student and teacher need only .embed;
    options: distill.Options or a run's settings."""
    device, samples = student.embed.weight.device, []
    for start in range(0, len(examples), BATCH):
        part = examples[start:start + BATCH]
        batch = {name: x.to(device) for name, x in collate(part, *pads, options.align_on).items()}
        found = align(batch, Valid(batch["student_labels"]), Valid(batch["teacher_labels"]), student.embed, teacher.embed, projectors, options.alignment)
        for i, example in enumerate(part):
            s, t = example.student.valid, example.teacher.valid
            here = [None if grid is None else grid[i][cut].float().cpu() for grid, cut in (
                (found.weights, (slice(s), slice(t))), (found.back, (slice(t), slice(s))), (found.queries, slice(s)), (found.keys, slice(t)))]
            samples.append(Sample(example.row, example.student, example.teacher, *here))
    return samples


def attention_values(samples: list[Sample], kind: str = "attention") -> dict[str, list[dict[str, torch.Tensor]]]:
    """direction → each sample's measure(), of the samples' own attention, of "uniform" attention or of the "chunk_mean"."""
    values = {"student → teacher": [], "teacher → student": []}
    for sample in samples:
        middles, repeats = [], []
        for side in (sample.student, sample.teacher):
            labels = side.ids[side.prompt_length:]
            often = collections.Counter(labels)
            repeats.append(torch.tensor([often[i] > 1 for i in labels]))
            middles.append(torch.tensor(side.spans).double().mean(1))
        inside = sample.same_chunk
        for direction, weights, mask, a, b in (("student → teacher", sample.weights, inside, 0, 1), ("teacher → student", sample.back, inside.T, 1, 0)):
            weights = {"attention": weights, "uniform": torch.full_like(weights, 1 / weights.size(1)),
                       "chunk_mean": mask / mask.sum(1, keepdim=True).clamp(min=1)}[kind]
            values[direction].append(measure(weights, mask, repeats[a], middles[a], middles[b]))
    return values


def matching_values(samples: list[Sample]) -> list[list[torch.Tensor]]:
    """Whether a logistic probe, trained on every other sample, is right about the keys and the queries of each → two
    lists (keys, queries) of a tensor of 0 and 1 for each sample."""
    sides = []
    for vectors in ([s.keys for s in samples], [s.queries for s in samples]):
        sides.append((torch.cat(vectors), torch.cat([torch.full((len(v),), number % 2) for number, v in enumerate(vectors)])))
    (keys, key_fold), (queries, query_fold) = sides
    right = tell_apart(keys, queries, key_fold, query_fold)
    return [list(right[0].split([len(s.keys) for s in samples])), list(right[1].split([len(s.queries) for s in samples]))]


@torch.no_grad()
def adversary_numbers(kind: str, adversary, samples: list[Sample]) -> dict[str, float]:
    """The adversary's mean losses and accuracies, without dropout, on the samples' keys and queries."""
    was_training = adversary.training
    adversary.eval()
    device = next(adversary.parameters()).device
    totals = collections.Counter()
    for s in samples:
        keys, queries = s.keys.to(device), s.queries.to(device)
        if kind == "gan":
            parts = discriminator.gan(adversary, keys, queries)
        else:
            everything = [torch.ones(1, len(x), dtype=torch.bool, device=device) for x in (keys, queries)]
            parts = discriminator.conditional_transport(adversary, keys[None], queries[None], *everything)
        totals.update({name: float(value) for name, value in parts.items()})
    adversary.train(was_training)
    n = {"key": sum(len(s.keys) for s in samples), "query": sum(len(s.queries) for s in samples)}
    return {name.removeprefix("adversary_"): value / n[name.split("_")[1]] for name, value in totals.items()}


def training_numbers(options, samples: list[Sample], adversary) -> dict[str, float]:
    """What --probe_interval adds to metrics.jsonl."""
    numbers, directions = {}, attention_values(samples)
    for direction, suffix in (("student → teacher", ""), ("teacher → student", "_back")):
        values = directions[direction]
        numbers |= {f"probe_{name}{suffix}": float(torch.cat([v[name] for v in values]).mean()) for name in ("mass", "hit")}
    if samples[0].queries is not None and len(samples) > 1:
        numbers["probe_accuracy"] = sum(float(torch.cat(right).mean()) for right in matching_values(samples)) / 2
    if adversary is not None:
        numbers |= {f"probe_{name}": value for name, value in adversary_numbers(options.adversary, adversary, samples).items()}
    return numbers


@dataclass
class Run:
    """A checkpoint of train.py, as far as attention needs it."""
    name: str
    folder: Path                    # of the checkpoint
    settings: types.SimpleNamespace  # of the run
    student: torch.nn.Module
    teacher: torch.nn.Module
    projectors: torch.nn.Module
    adversary: torch.nn.Module | None
    tokenizers: tuple               # the student's, the teacher's


def run_folder(checkpoint: str) -> Path:
    """The out_dir of a checkpoint, which may be given as the out_dir itself or as best/ or last/ in it."""
    path = Path(checkpoint)
    path = path.parent if path.name in ("best", "last") and not (path / "metrics.jsonl").exists() else path
    if not (path / "metrics.jsonl").exists() or not (path / "config.json").exists():
        raise InputError(f"{checkpoint}: not a run of train.py (a folder with config.json, metrics.jsonl and best/ or last/)")
    return path


def load_run(checkpoint: str, teacher: str = "", device: str = "cpu") -> Run:
    """Read embeddings, projectors, adversary and tokenizers of a checkpoint. teacher: where it lies now, if it was moved.
    Raises InputError for what is no checkpoint of an attention method."""
    out_dir, folder = run_folder(checkpoint), hub.model_dir(checkpoint)
    try:
        settings = types.SimpleNamespace(**json.loads((out_dir / "config.json").read_text(encoding="utf-8")))
        method, alignment, _ = settings.method, settings.alignment, settings.adversary
        teacher = teacher or settings.teacher
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{out_dir}/config.json: not what train.py writes ({error})") from error
    if alignment == "none":
        raise InputError(f"{checkpoint}: --method {method} has no attention to look at (--curves draws its losses)")
    if teacher == "toy":
        teacher = str(toy.folder("teacher"))
    student, frozen = load(folder, device=device, layers=False), load(teacher, device=device, layers=False)
    projectors, adversary = (module and module.to(device) for module in make_modules(settings, student.config.hidden_size, frozen.config.hidden_size))
    load_modules(folder, projectors, adversary)
    return Run(checkpoint, folder, settings, student, frozen, projectors, adversary, (load_tokenizer(folder), load_tokenizer(teacher)))


def look(run: Run, file: Path, num: int) -> list[Sample]:
    """The attention on the first rows of a data file."""
    settings, rows = run.settings, read_rows(file)
    examples, _, dropped = encode_rows(rows[:num], *run.tokenizers, settings.max_length, settings.max_prompt_length)
    if dropped:
        print(f"{file}: {dropped} of {len(rows[:num])} rows left out, because no response token fits into {settings.max_length}")
    return attend(settings, examples, run.student, run.teacher, run.projectors, tuple(t.eos_id for t in run.tokenizers))


# ------------------------------------------------------------------------------------------------ numbers and pictures

def numbers(run: Run, samples: list[Sample]) -> tuple[dict, dict[str, np.ndarray]]:
    """Everything that is measured, as probe.json has it, and the bootstrap draws by name (for differences)."""
    result, draws = {"checkpoint": str(run.folder), "method": run.settings.method, "rows": [s.row for s in samples],
                     "student_tokens": sum(len(s.weights) for s in samples), "teacher_tokens": sum(len(s.back) for s in samples), "attention": {}}, {}
    kinds = {kind: attention_values(samples, kind) for kind in ("attention", "uniform", "chunk_mean")}
    for direction in kinds["attention"]:
        result["attention"][direction] = {}
        for name in MEASURES:
            row = {}
            for kind, values in kinds.items():
                mean, means = resample([v[name] for v in values[direction]])
                row[kind] = {"mean": mean, "interval": None if mean is None else interval(means)}
                if kind == "attention":
                    draws[direction, name] = means
            result["attention"][direction][name] = row
    if run.settings.alignment != "chunk_mean":
        keys, queries = torch.cat([s.keys for s in samples]), torch.cat([s.queries for s in samples])
        right = [resample(side) for side in matching_values(samples)]
        draws["probe_accuracy"] = sum(means for _, means in right) / 2
        result["keys_and_queries"] = {"probe_accuracy": {"mean": sum(mean for mean, _ in right) / 2, "interval": interval(draws["probe_accuracy"])},
                                      **distances(keys, queries)}
        if run.adversary is not None:
            result["adversary"] = adversary_numbers(run.settings.adversary, run.adversary, samples)
    return result, draws


def cell(name: str, mean: float | None, bounds: list[float] | None = None, sign: str = "") -> str:
    if mean is None:
        return "–"
    scale, digits = (100, 1) if name in SHARES or name == "probe_accuracy" else (1, 2)
    show = lambda value: f"{scale * value:{sign}.{digits}f}"
    return show(mean) + (" %" if scale == 100 else "") + (f"  [{show(bounds[0])}, {show(bounds[1])}]" if bounds else "")


def print_numbers(results: list[dict], draws: list[dict]) -> None:
    """One checkpoint's numbers, or two beside each other with their difference."""
    two = len(results) == 2
    names = [("AB"[i] if two else "attention [95 %]") for i in range(len(results))]
    for direction in results[0]["attention"]:
        print(f"\n{direction:<42}" + "".join(f"{heading:>26}" for heading in [*names, *(["B − A"] if two else []), "uniform", "chunk mean"]))
        for name, title in MEASURES.items():
            rows = [result["attention"][direction][name] for result in results]
            columns = [cell(name, row["attention"]["mean"], row["attention"]["interval"]) for row in rows]
            if two:
                missing = any(row["attention"]["mean"] is None for row in rows)
                columns.append("–" if missing else cell(name, rows[1]["attention"]["mean"] - rows[0]["attention"]["mean"],
                                                        interval(draws[1][direction, name] - draws[0][direction, name]), "+"))
            columns += [cell(name, rows[0][kind]["mean"]) for kind in ("uniform", "chunk_mean")]
            print(f"{title:<42}" + "".join(f"{column:>26}" for column in columns))
    with_queries = [result.get("keys_and_queries") for result in results]
    if not any(with_queries):
        return
    print(f"\n{'keys and queries':<42}" + "".join(f"{heading:>26}" for heading in [*names, *(["B − A"] if two else []), "matched"]))
    for name, title, matched in (("probe_accuracy", "told apart by a logistic probe, held out", "50.0 %"),
                                 ("mean_distance", "distance of means (keys' deviations)", "0.00"), ("energy_distance", "energy distance (keys' deviations)", "0.00")):
        whole = [None if q is None else q[name] if isinstance(q[name], dict) else {"mean": q[name], "interval": None} for q in with_queries]
        columns = ["–" if value is None else cell(name, value["mean"], value["interval"]) for value in whole]
        if two:
            bounds = interval(draws[1][name] - draws[0][name]) if all(name in d for d in draws) else None
            columns.append(cell(name, whole[1]["mean"] - whole[0]["mean"], bounds, "+") if all(whole) else "–")
        print(f"{title:<42}" + "".join(f"{column:>26}" for column in [*columns, matched]))
    for heading, result in zip(names, results):
        if "adversary" in result:
            who = f"{heading}'s adversary" if two else "the run's adversary"
            print(f"{who}, without dropout: " + ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in result["adversary"].items()))


def verdict(results: list[dict], draws: list[dict]) -> str:
    """Whether keys and queries are closer to each other in B than in A."""
    a, b = (result["keys_and_queries"] for result in results)
    closer = [b["probe_accuracy"]["mean"] < a["probe_accuracy"]["mean"], b["mean_distance"] < a["mean_distance"], b["energy_distance"] < a["energy_distance"]]
    low, high = interval(draws[1]["probe_accuracy"] - draws[0]["probe_accuracy"])
    certain = "a clear fall" if high < 0 else "a clear rise" if low > 0 else "no clear difference"
    return (f"keys and queries are closer to each other in B than in A by {sum(closer)} of 3 measures; "
            f"of the probe's accuracy, the one with an interval: {certain}")


def token_labels(side: Sequence, tokenizer) -> list[str]:
    return ["EOS" if i == tokenizer.eos_id else pictures.token_label(tokenizer.token_bytes(i)) for i in side.ids[side.prompt_length:]]


def draw(run: Run, sample: Sample, path: Path) -> Path:
    """One sample's heatmap, both directions."""
    values = {direction: {name: float(x.mean()) for name, x in each.items()} for direction, (each,) in attention_values([sample]).items()}
    heading = lambda direction, whole: f"{direction}\n{whole} sum to 1\n{100 * values[direction]['mass']:.0f} % inside the right chunk"
    panels = {heading("student → teacher", "rows"): sample.weights, heading("teacher → student", "columns"): sample.back.T}
    labels = [token_labels(side, tokenizer) for side, tokenizer in zip((sample.student, sample.teacher), run.tokenizers)]
    title = f"{run.name}, row {sample.row}\nstudent tokens down, teacher tokens across, chunks outlined"
    return pictures.heatmap(path, title, *labels, panels, sample.blocks)


def draw_all(run: Run, samples: list[Sample], result: dict, out_dir: Path) -> None:
    """A heatmap a sample, the contact sheet, the scatter of keys and queries."""
    for old in out_dir.glob("heatmap-*.png"):
        old.unlink()
    for sample in tqdm(samples, desc="heatmaps", unit="row", leave=False, dynamic_ncols=True):
        draw(run, sample, out_dir / f"heatmap-{sample.row:05d}.png")
    masses = [float(values["mass"].mean()) for values in attention_values(samples)["student → teacher"]]
    pictures.contact_sheet(out_dir / "contact_sheet.png", [(f"row {s.row}, {100 * mass:.0f} % inside", s.weights, s.blocks) for s, mass in zip(samples, masses)])
    if "keys_and_queries" in result:
        pictures.scatter(out_dir / "keys_queries.png", scatter_title(run.name, result), *points(samples))


def scatter_title(name: str, result: dict) -> str:
    q = result["keys_and_queries"]
    return f"{name}\nprobe {100 * q['probe_accuracy']['mean']:.1f} %, means {q['mean_distance']:.2f} σ, energy {q['energy_distance']:.2f} σ"


def points(samples: list[Sample]) -> list[torch.Tensor]:
    """At most MOST_POINTS keys and as many queries, evenly chosen."""
    return [evenly(torch.cat([s.keys for s in samples])), evenly(torch.cat([s.queries for s in samples]))]


def readable(samples: list[Sample]) -> Sample:
    """Of the samples that a picture shows whole and large, the longest; else the shortest."""
    length = lambda s: max(s.weights.shape)
    return max((s for s in samples if length(s) <= 40), key=length, default=min(samples, key=length))


def draw_curves(out_dir: Path) -> Path:
    """out_dir/curves.png from out_dir/metrics.jsonl. Raises InputError where there is no line to draw."""
    records = []
    for number, line in enumerate((out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines(True), 1):
        if line.endswith("\n"):             # the last line of a run that is going on may be half-written
            try:
                record = json.loads(line)
                record["step"]
                records.append(record)
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(f"{out_dir}/metrics.jsonl:{number}: not what train.py writes ({error!r})") from error
    if not records:
        raise InputError(f"{out_dir}/metrics.jsonl: no step is recorded yet")
    return pictures.curves(out_dir / "curves.png", str(out_dir), records)


# --------------------------------------------------------------------------------------------------------------- main

@dataclass
class Config:
    checkpoint: str = flag("", "a run's out_dir, or best/ or last/ in it")
    other: str = flag("", "a second one, to compare with it")
    data: str = flag("", "rows to look at: name, folder or .jsonl file (default: the run's data)")
    split: str = flag("dev", "which of them", choices=("train", "dev", "test"))
    num: int = flag(20, "how many rows, from the first", at_least=2, at_most=1000)
    curves: bool = flag(False, "draw the run's metrics.jsonl over its steps, and nothing else")
    teacher: str = flag("", "where the teacher is, if it was moved")
    out_dir: str = flag("", "where it all goes (default: probe/ in the run's folder; of two: probe-with-NAME/ in the first's)")
    device: str = flag("auto", "where to run", choices=("auto", "cpu", "cuda"))


def main() -> None:
    config = parse(Config, __doc__, positional=("checkpoint", "other"))
    if not config.checkpoint:
        raise InputError("name a run: python probe.py OUT_DIR")
    names = [config.checkpoint, *([config.other] if config.other else [])]
    if config.curves:
        for name in names:
            print(f"wrote {draw_curves(run_folder(name))}")
        return
    device, _ = hub.pick_device(config.device, "float32")
    runs = [load_run(name, config.teacher, device) for name in names]
    data = config.data or runs[0].settings.data
    toy.write_data_for([data])
    file = hub.data_file(data, "test" if Path(data).is_file() else config.split)
    every = [look(run, file, config.num) for run in runs]
    common = set.intersection(*({s.row for s in samples} for samples in every))
    every = [[s for s in samples if s.row in common] for samples in every]
    if len(common) < 2:
        raise InputError(f"{file}: {len(common)} rows to look at, and 2 is the least")
    results, draws = zip(*(numbers(run, samples) for run, samples in zip(runs, every)))

    default = run_folder(names[0]) / ("probe" if len(names) == 1 else f"probe-with-{hub.label(names[1])}")
    out_dir = Path(config.out_dir or default)
    out_dir.mkdir(parents=True, exist_ok=True)
    print(f"{file}: {len(every[0])} rows, " + "; ".join(f"{name}{r['checkpoint']} ({r['method']}), {r['student_tokens']} student and {r['teacher_tokens']} teacher tokens"
                                                       for name, r in zip(("A: ", "B: ") if config.other else ("",), results)))
    print_numbers(results, draws)
    with hub.atomic_write(out_dir / "probe.json") as log:
        json.dump({"data": str(file), "resamples": RESAMPLES, "checkpoints": list(results)}, log, indent=2, ensure_ascii=False)
    if config.other:
        if all("keys_and_queries" in r for r in results):
            print(f"\n{verdict(results, draws)}")
        chosen = every[0].index(readable(every[0]))
        columns = []
        for mark, run, samples, result in zip("AB", runs, every, results):
            sample = samples[chosen]
            columns.append(dict(title=f"{mark}: {run.name}", heading=f"row {sample.row}, student → teacher", weights=sample.weights, blocks=sample.blocks,
                                **{f"{side}_labels": token_labels(getattr(sample, side), t) for side, t in zip(("student", "teacher"), run.tokenizers)}))
            if "keys_and_queries" in result:
                keys, queries = points(samples)
                columns[-1] |= dict(keys=keys, queries=queries, title=scatter_title(columns[-1]["title"], result))
        pictures.comparison(out_dir / "comparison.png", columns)
        print(f"\nwrote comparison.png and probe.json into {out_dir}")
        return
    with hub.whole_file(out_dir / "attention.safetensors") as temporary:
        save_file({f"{s.row}.{name}": x.contiguous() for s in every[0] for name, x in (("student_to_teacher", s.weights), ("teacher_to_student", s.back))}, temporary)
    draw_all(runs[0], every[0], results[0], out_dir)
    print(f"\nwrote {len(every[0])} heatmaps, contact_sheet.png, " + ("keys_queries.png, " if "keys_and_queries" in results[0] else "")
          + f"attention.safetensors and probe.json into {out_dir}")


if __name__ == "__main__":
    hub.run(main)
