"""Names of models to folders on this machine.

model_folder("gpt2")        # a short name, any hub id, a folder of yours, a run's out_dir
"""

import hashlib
import re
from pathlib import Path

from runtime.config import InputError, did_you_mean
from runtime.files import fingerprint

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
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)
CHAT_TEMPLATES = "additional_chat_templates"  # a folder
SAFETENSORS = ("model*.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def model_folder(name: str | Path, weights: bool = True) -> Path:
    """The folder of a model in the hub's layout, downloaded where `name` is not a folder.

    Of a training run's out_dir it is the best checkpoint, else the last. weights=False downloads
    the configuration and the tokenizer only. Raises InputError where there is no such model."""
    path = Path(name)
    if path.is_dir():
        for checkpoint in ("best", "last"):
            if (path / checkpoint / "config.json").exists():
                return path / checkpoint
        if (path / "metrics.jsonl").exists():
            raise InputError(f"{path}: this run has no checkpoint yet (no best/ and no last/)")
        return path
    check_name(name)
    return _download(hub_id(name), weights)


def hub_id(name: str | Path) -> str:
    """The hub's id of a model, which may have a short name here."""
    return MODELS.get(str(name), str(name))


def check_name(name: str | Path) -> None:
    """Raise InputError for what is no folder, no hub id and no name that is known here."""
    path = Path(name)
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", hub_id(name))
    if not path.is_dir() and (path.exists() or not is_hub_id):
        raise InputError(
            f"{name}: not a folder, not a hub id (owner/name) and not one of "
            f"{', '.join(MODELS)}{did_you_mean(str(name), MODELS)}"
        )


def _download(repository: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["config.json", *TOKENIZER_FILES, f"{CHAT_TEMPLATES}/*"]
    wanted += SAFETENSORS if weights else ()
    try:
        folder = Path(snapshot_download(repository, allow_patterns=wanted))
        if weights and not weight_file(folder):
            folder = Path(snapshot_download(repository, allow_patterns=list(PICKLED)))
        return folder
    except Exception as error:  # the client's own errors, httpx's and the system's
        reasons = {
            "GatedRepoError": "it is gated: accept its terms and run `hf auth login`",
            "RepositoryNotFoundError": "the hub has no such public repository",
        }
        reason = reasons.get(
            type(error).__name__, f"the hub cannot be reached ({type(error).__name__})"
        )
        raise InputError(
            f"{repository}: {reason}; a folder with its files works in place of a name"
        ) from error


def fingerprint_of_model(folder: Path, weights: bool = True) -> str:
    """SHA-256 of the configuration, the tokenizer and the weights, of nothing else there."""
    digest = hashlib.sha256()
    patterns = ["config.json", *TOKENIZER_FILES]
    if weights:
        patterns += [*SAFETENSORS, *PICKLED]
    for pattern in patterns:
        for file in sorted(folder.glob(pattern)):
            digest.update(file.name.encode() + fingerprint(file).encode())
    return digest.hexdigest()


def weight_file(folder: Path) -> Path | None:
    """The weights of a folder, or their index: safetensors before pickles; None without any."""
    for name in (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ):
        if (folder / name).exists():
            return folder / name
    return None
