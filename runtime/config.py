"""A dataclass is the command line, the help text and the saved config.

@dataclass
class Config:
    lr: float = flag(5e-4, "Peak learning rate of the student.", minimum=0)

config = parse(Config, "What the script does.")        # --lr 1e-3
"""

import argparse
import dataclasses
import difflib
import os
import sys
import traceback
import typing

from safetensors import SafetensorError


def _interrupted(kind, error, trace) -> None:
    """Ctrl-C while a script's libraries are still being loaded ends it in one line, too."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _interrupted


class InputError(Exception):
    """Something the user gave is wrong. The message is one line: what, where, and what is right."""


def flag(default, help: str, group: str = "", choices=None, minimum=None, maximum=None):
    """A dataclass field that is also a command-line flag. Numbers must lie within the limits.

    group: the heading in --help of this flag and of those after it."""
    metadata = dict(help=help, group=group, choices=choices, minimum=minimum, maximum=maximum)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def did_you_mean(name: str, names) -> str:
    """ "; did you mean …?" where one of the names is like it, else nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (--help lists the flags)")


def _help_text(field) -> str:
    default = field.default
    if default is dataclasses.MISSING:
        default = " ".join(map(str, field.default_factory()))
    text = field.metadata["help"]
    if field.metadata["choices"]:
        text += " One of " + ", ".join(filter(None, map(str, field.metadata["choices"]))) + "."
    if default is not False and default != "":
        text += f" [{default}]"
    return text.replace("%", "%%")


def given_flags(
    cls,
    description: str,
    argv: list[str] | None = None,
    positional: tuple[str, ...] = (),
    others: list[str] | None = None,
) -> dict:
    """The flags of the command line that were given, as {field: value}.

    positional: fields that are given by their place. others: a list that takes in the unknown
    flags. Raises InputError for an unknown flag without it, or a value of another type."""
    parser = _Parser(
        usage="%(prog)s [flags]",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, kind = field.name, types[field.name]
        options = dict(default=argparse.SUPPRESS, help=_help_text(field))
        if kind is bool:
            options["action"] = "store_true"
        elif typing.get_origin(kind) is list:
            options.update(type=typing.get_args(kind)[0], nargs="+", metavar="X")
        else:
            options.update(type=kind, metavar=kind.__name__)
        if name in positional:
            parser.add_argument(name, **(options | dict(nargs="?", metavar=name)))
            continue
        if field.metadata["group"]:
            group = parser.add_argument_group(field.metadata["group"])
        group.add_argument(f"--{name}", **options)
    given, unknown = parser.parse_known_args(argv)
    if others is not None:
        others += unknown
    elif unknown:
        known = [f"--{field.name}" for field in dataclasses.fields(cls)]
        hint = did_you_mean(unknown[0].partition("=")[0], known)
        raise InputError(f"unknown: {' '.join(unknown)}{hint} (--help lists the flags)")
    return vars(given)


def checked(cls, values: dict):
    """cls(**values), once every value is among its field's choices and in its limits."""
    unknown = values.keys() - cls.__dataclass_fields__.keys()
    if unknown:
        raise InputError(f"{', '.join(sorted(unknown))}: no such option")
    config = cls(**values)
    for field in dataclasses.fields(cls):
        value = getattr(config, field.name)
        name = f"--{field.name} {value!r}"
        choices = field.metadata["choices"]
        minimum, maximum = field.metadata["minimum"], field.metadata["maximum"]
        for item in value if isinstance(value, list) else [value]:
            if choices and item not in choices:
                hint = did_you_mean(str(item), map(str, choices))
                raise InputError(f"{name}: must be one of {', '.join(map(str, choices))}{hint}")
            if minimum is not None and item < minimum:
                raise InputError(f"{name}: must be at least {minimum}")
            if maximum is not None and item > maximum:
                raise InputError(f"{name}: must be at most {maximum}")
    return config


def parse(cls, description: str, argv: list[str] | None = None, positional: tuple[str, ...] = ()):
    """Read the command line into a `cls`. Raises InputError as given_flags and checked do."""
    return checked(cls, given_flags(cls, description, argv, positional))


def is_out_of_memory(error: BaseException) -> bool:
    """PyTorch says it in one way for GPUs and in another for the machine's memory."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def run_script(main) -> None:
    """Run a script's main(); what the user can mend becomes one line on stderr and exit code 2."""
    code = 0
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal may lack "→"
    try:
        main()
    except (InputError, OSError, SafetensorError) as error:  # the last: of a full disk
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except SystemExit as error:
        code = error.code or 0
    except Exception as error:
        if is_out_of_memory(error):
            reason = " ".join(str(error).split())
            print(
                f"error: out of memory ({reason:.200}); a smaller --batch_size needs less; in "
                "train.py, for a new run, also --gradient_checkpointing and --lora_rank",
                file=sys.stderr,
            )
            code = 2
        else:
            traceback.print_exc()
            code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if "LOCAL_RANK" in os.environ:
        # Without the interpreter's shutdown, which would wait for processes that are gone.
        os._exit(code)
    sys.exit(code)
