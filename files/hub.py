"""Names → files on this machine, and errors a person can act on.

- `model_dir("gpt2")` is a folder in the hub's layout: a known short name, any hub id, or a folder of yours.
- `data_file("dolly", "train")` is a JSON-lines file: a data set of the DSKD papers, or a folder of yours.
- `run(main)` prints an InputError, which every file here raises for bad input, as one line and exits with 2.

Downloads are checked before use and never left half-written."""
import contextlib
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import traceback
import urllib.request
from pathlib import Path

from safetensors import SafetensorError
from tqdm import tqdm

from files.config import InputError

# Large tensors in huge pages (Linux, CPU): without them a third of a step is the system handing out pages of 4 KB.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

DATA_DIR = Path(__file__).resolve().parents[1] / "data"

MODELS = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "qwen": "Qwen/Qwen1.5-1.8B",
    "qwen1.5-0.5b": "Qwen/Qwen1.5-0.5B",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "llama2": "meta-llama/Llama-2-7b-hf",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "mistral": "mistralai/Mistral-7B-v0.1",
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json", "generation_config.json")

# The data of the DSKD papers: (set, split) → path in the release's repository and the file's git blob id.
RELEASE = "https://raw.githubusercontent.com/stellaevat/DSKD-KQ/375154c/"
DATASETS = {
    ("dolly", "train"): ("data/dolly/train.jsonl", "cb845750fffdd98b6c04d81b1798e5ec72835607"),
    ("dolly", "dev"): ("data/dolly/dev.jsonl", "d956f00cb476aa985b02f4a3ebfd43cd6e17225c"),
    ("dolly", "test"): ("data/dolly/test.jsonl", "f3d75af7b273550bc0ff340faffe17c8c31733d3"),
    ("self-inst", "test"): ("data/self-inst/test.jsonl", "8231f707b86745176db46d2117397476d25d80af"),
    ("vicuna", "test"): ("data/vicuna/test.jsonl", "2fcc9c233a9a0987bc5200c4020092f5fa578e56"),
    ("sinst", "test"): ("data/sinst/11_/test.jsonl", "91ce2bd1332fadea8efcf20300d4a1e3ada3ae21"),
    ("uinst", "test"): ("data/uinst/11_/test.jsonl", "104739f507d121d7ddf689bf428f348291b50f25"),
}
PAPER_SETS = tuple(dict.fromkeys(name for name, _ in DATASETS))

def run(main) -> None:
    """Run a script's main(). What the user can mend becomes one line on stderr and exit code 2, Ctrl-C code 130. One of
    several processes leaves at once, without the interpreter's shutdown: it would wait for peers that never come, and
    gloo's threads, which may still be letting go of their last tensors, would abort a run that is finished."""
    code = 0
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")    # of a terminal that lacks "→" or "−"
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:                     # the reader of our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1                                # a run that ends here is not finished, but can be resumed
    except (InputError, OSError, SafetensorError) as error:     # a folder that cannot be written, a full disk
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except SystemExit as error:
        code = error.code or 0
    except Exception as error:
        if is_out_of_memory(error):
            print("error: out of memory: " + " ".join(str(error).split())[:200], file=sys.stderr)
            code = 2
        elif "LOCAL_RANK" not in os.environ:
            raise
        else:
            traceback.print_exc()
            code = 1
    if "LOCAL_RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)

def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's or the machine's memory was too small: torch and numpy each say it in their own way."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" \
        or isinstance(error, RuntimeError) and "can't allocate memory" in str(error)

@contextlib.contextmanager
def whole_file(path: Path):
    """Give a name beside `path` to write to. What stands there when the block ends well is flushed to disk and renamed
    to `path`, so that the file appears whole or not at all; when the block raises, nothing is left behind. What a
    process of this machine that was killed here has left behind goes, too."""
    host = os.uname().nodename
    for left in path.parent.glob(f"{glob.escape(path.name)}.{host}.*.tmp"):
        try:
            os.kill(int(left.suffixes[-2][1:]), 0)
        except ProcessLookupError:
            left.unlink(missing_ok=True)
        except (PermissionError, ValueError):               # somebody else's process, or not our name
            continue
    temporary = path.with_name(f"{path.name}.{host}.{os.getpid()}.tmp")     # two processes may write the same file
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

@contextlib.contextmanager
def atomic_write(path: Path):
    """Open a text file that appears under its name only when whole."""
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        yield file

def flush(path: Path) -> None:
    """Make sure a file's (or folder's) contents are on the disk, not only in the system's cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

def lock(descriptor: int, path: Path, wait: bool) -> bool:
    """Take the lock of an open file or folder; the system lets go of it when this process ends, however it ends. False
    where another process has it and wait is False; a network file system without locks is told of, and passed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        print(f"note: {path} cannot be locked ({error.strerror}); start nothing else that writes there")
    return True

def claim(folder: Path, mark: str, keys: set[str], others: list[str]) -> dict | None:
    """Make sure that what a command will write into a folder is its own: `mark`, a JSON file with these keys, is there
    from before (→ its content), or neither it nor any of the others is (→ None). Else raises InputError."""
    there = [name for name in (mark, *others) if (folder / name).exists()]
    try:
        content = json.loads((folder / mark).read_text(encoding="utf-8")) if mark in there else None
        if isinstance(content, dict) and keys <= content.keys():
            return content
    except (ValueError, OSError, RecursionError):
        pass                                # not ours: told of below
    if there:
        raise InputError(f"{folder / there[0]}: is there already and not this command's; pass another --out_dir")

def model_dir(name_or_dir: str | Path, weights: bool = True) -> Path:
    """The folder of a model in the hub's layout, downloaded when it is a name.
    name_or_dir: a folder, the out_dir of a training run (its best checkpoint is taken, else its last), a short name
    from MODELS, or a hub id such as "Qwen/Qwen2.5-0.5B".
    weights=False fetches only the configuration and the tokenizer.
    Raises InputError where there is no such folder or the hub does not give it."""
    path = Path(name_or_dir)
    if path.is_dir():
        found = next((path / part for part in ("best", "last") if (path / part / "config.json").exists()), path)
        if found == path and (path / "metrics.jsonl").exists():
            raise InputError(f"{path}: a run that has no checkpoint yet (no best/ and no last/)")
        return found
    name = str(name_or_dir)
    repo = MODELS.get(name, name)
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repo):
        raise InputError(f"{name}: not a folder, not a hub id (owner/name) and not one of {', '.join(MODELS)}")
    return _download_model(name, repo, weights)

def _download_model(name: str, repo: str, weights: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download       # imported here: slow, and a folder needs none of it

    advice = f"pass a folder that holds the files of https://huggingface.co/{repo} instead of a name"
    try:
        files = [file.rfilename for file in HfApi().model_info(repo, timeout=20).siblings]
        return Path(snapshot_download(repo, allow_patterns=_wanted(files, weights)))
    except Exception as error:      # the hub's client raises its own, httpx's, urllib3's or OS errors: all end here
        try:                        # without network a model that was downloaded once is still in the client's cache
            folder = Path(snapshot_download(repo, local_files_only=True))
            if (folder / "config.json").exists() and not (weights and not weight_files(folder)):
                return folder
        except Exception:           # not in the cache either: report the first error, which names the cause
            pass
        reason = {"GatedRepoError": "the repository is gated: accept its terms and run `hf auth login`, or",
                  "RepositoryNotFoundError": "the hub has no such public repository:"}.get(
                      type(error).__name__, f"the hub cannot be reached ({type(error).__name__}):")
        if repo == name:
            reason = f"no such folder here, and {reason}"
        raise InputError(f"{name}: {reason} {advice}") from error

def _wanted(files: list[str], weights: bool) -> list[str]:
    """The files of a repository that we read: top level only, safetensors before pickled weights."""
    wanted = [f for f in files if f == "config.json" or f in TOKENIZER_FILES]
    if weights:
        pattern = r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
        safe = [f for f in files if re.fullmatch(pattern, f)]
        wanted += safe or [f for f in files if re.fullmatch(r"pytorch_model.*\.bin(\.index\.json)?", f)]
    return wanted

def weight_files(folder: Path) -> list[Path]:
    """The weights in a folder, in order of preference: one safetensors file, a sharded index, the .bin forms."""
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    return [folder / name for name in names if (folder / name).exists()]

def data_file(name_or_dir: str | Path, split: str, required: bool = True) -> Path | None:
    """The JSON-lines file of one split ("train", "dev" or "test").
    name_or_dir: a set of the papers (downloaded once, checked against its git blob id at every use), a generated toy
    set, a folder that holds train/dev/test.jsonl or, to be scored, a .jsonl file.
    Raises InputError where there is none; required=False: a folder without this split gives None."""
    name, path = str(name_or_dir), Path(name_or_dir)
    if (name, split) in DATASETS:
        return _download_data(name, split)
    if name in PAPER_SETS:
        raise InputError(f"--data {name}: this set has no {split} split (the papers use it for scoring only)")
    if name.startswith("toy") and (DATA_DIR / name).is_dir():
        path = DATA_DIR / name
    if path.is_file():
        if split != "test":
            raise InputError(f"--data {name}: a file can be scored, training wants a folder with train and dev.jsonl")
        return path
    if not path.is_dir():
        raise InputError(f"--data {name}: no such file or folder, and not one of toy, {', '.join(PAPER_SETS)}")
    if not (path / f"{split}.jsonl").is_file():
        if not required:
            return None
        raise InputError(f"{path}: no {split}.jsonl in this folder (a data folder holds train, dev and test.jsonl)")
    return path / f"{split}.jsonl"

def _download_data(name: str, split: str) -> Path:
    remote, blob_id = DATASETS[name, split]
    path = DATA_DIR / name / f"{split}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with whole_file(path) as temporary:
                with urllib.request.urlopen(RELEASE + remote, timeout=60) as response, open(temporary, "wb") as file, \
                        tqdm.wrapattr(response, "read", desc=f"{name}/{split}.jsonl",
                                      total=int(response.headers.get("Content-Length") or 0) or None) as source:
                    shutil.copyfileobj(source, file)
                if git_blob_id(temporary) != blob_id:
                    raise InputError(f"{RELEASE}{remote}: the download is cut or was changed (expected git blob "
                                     f"{blob_id}); nothing was kept, try again")
        except OSError as error:
            raise InputError(f"--data {name}: cannot download {RELEASE}{remote} ({error}); pass a folder with "
                             f"{split}.jsonl instead") from error
    if git_blob_id(path) != blob_id:
        raise InputError(f"{path}: not the published file (git blob {blob_id}); delete it to download it again")
    return path

def git_blob_id(path: Path) -> str:
    """The id git gives a file's contents: SHA-1 over "blob <size>\\0" and the bytes."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

def sha256(path: Path) -> str:
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()

def fingerprint(path: Path, weights: bool = True) -> str:
    """A hash of a file's contents, or of those of a model's folder: config, tokenizer and, unless left out, weights."""
    wanted = ("config.json", *TOKENIZER_FILES)
    files = [path] if path.is_file() else sorted(
        f for f in path.iterdir() if f.name in wanted or weights
        and re.fullmatch(r"(model|pytorch_model).*\.(safetensors|bin)", f.name))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + bytes.fromhex(sha256(file)))
    return digest.hexdigest()

def pick_device(device: str, dtype: str):
    """("auto", "auto") → (torch device name, torch dtype): CUDA and bfloat16 where there is a GPU, else CPU and
    float32. Raises InputError where CUDA is asked for and there is none."""
    import torch                    # imported here: this file is also used by scripts that only move files
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no CUDA device on this machine (--device cpu works)")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if dtype == "auto" and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        print(f"note: {torch.cuda.get_device_name()} has no bfloat16 of its own; computing in float32")
        dtype = "float32"
    dtype = ("bfloat16" if device == "cuda" else "float32") if dtype == "auto" else dtype
    return device, getattr(torch, dtype)

def autocast(device: str, dtype):
    """The context in which a model runs: bfloat16 autocast where that is the dtype, else none."""
    import torch
    return torch.autocast(device, dtype) if dtype == torch.bfloat16 else contextlib.nullcontext()

def label(name: str) -> str:
    """A name of data or of a model as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", name).strip("_")

def check_vocabulary(name: str, model_size: int, tokenizer_size: int) -> None:
    """Raise InputError where a tokenizer has ids for which the model has no embedding."""
    if tokenizer_size > model_size:
        raise InputError(f"{name}: the tokenizer has {tokenizer_size} ids, the model's vocabulary only {model_size}")

def trained_on(folder: Path) -> str | None:
    """The data a checkpoint of train.py was trained on, or None for any other model."""
    path = folder / "training.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["data"]) if path.exists() else None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not what train.py writes ({error!r})") from error

def same_data(name: str, other: str | None) -> bool:
    """Whether two values of --data mean the same set; a file belongs to its folder's set."""
    def folder(value):
        return Path(value).resolve().parent if Path(value).is_file() else Path(value).resolve()
    return other is not None and (name == other or folder(name) == folder(other))
