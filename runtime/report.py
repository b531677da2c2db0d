"""--report_to: what metrics.jsonl gets goes to TensorBoard or Weights & Biases too."""

import dataclasses

from runtime.config import InputError
from runtime.distributed import is_first


def check_report_to(name: str) -> None:
    """Raise InputError where the library is missing."""
    try:
        if name == "tensorboard":
            import torch.utils.tensorboard
        elif name == "wandb":
            import wandb  # noqa: F401
    except ImportError as error:
        raise InputError(f"--report_to {name}: needs a library:  pip install {name}") from error


def make_reporter(config, out_dir):
    """A function of a line of metrics.jsonl."""
    if not config.report_to or not is_first():
        return lambda record: None
    if config.report_to == "wandb":
        import wandb

        wandb.init(project="nanodskd", name=out_dir.name, config=dataclasses.asdict(config))
        return lambda record: wandb.log(numbers(record), step=record["step"])
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(out_dir)

    def write(record):
        for name, value in numbers(record).items():
            writer.add_scalar(name, value, record["step"])

    return write


def numbers(record: dict) -> dict[str, float]:
    return {
        name: value
        for name, value in record.items()
        if name != "step" and isinstance(value, (int, float))
    }
