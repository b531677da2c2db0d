"""--report_to: what metrics.jsonl gets goes to TensorBoard or Weights & Biases too."""

import dataclasses

from runtime.config import InputError
from runtime.distributed import is_first


def make_reporter(config, out_dir):
    """A function of a line of metrics.jsonl. Raises InputError where the library is missing."""
    if not config.report_to or not is_first():
        return lambda record: None
    try:
        if config.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
        else:
            import wandb
    except ImportError as error:
        raise InputError(
            f"--report_to {config.report_to}: needs a library:  pip install {config.report_to}"
        ) from error
    if config.report_to == "wandb":
        wandb.init(project="nanodskd", name=out_dir.name, config=dataclasses.asdict(config))
        return lambda record: wandb.log(numbers(record), step=record["step"])
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
