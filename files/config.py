"""A dataclass is the command line, the help text and the saved config.

    @dataclass
    class Config:
        lr: float = flag(5e-4, "peak learning rate of the student", at_least=0)

    config = parse(Config, "what the script does")        # --lr 1e-3"""
import argparse
import dataclasses
import typing

class InputError(Exception):
    """Something the user gave is wrong; the message is one line that says what, where, and what would be right."""

def flag(default, help: str, choices=None, at_least=None, at_most=None):
    """A dataclass field that is also a command-line flag. `help` names the unit; every number must be in its range."""
    metadata = dict(help=help, choices=choices, at_least=at_least, at_most=at_most)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)

class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (--help lists the flags)")

def parse(cls, description: str, argv: list[str] | None = None, positional: tuple[str, ...] = (),
          presets=lambda given: {}):
    """Read the command line into a `cls`.
    positional: fields given by place. presets: a function of the flags that were given → other defaults for the rest.
    Raises InputError for an unknown flag, a value of the wrong type or outside its range."""
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    kinds = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = kinds[field.name]
        options = dict(default=argparse.SUPPRESS, help=_help(field))
        if kind is bool:
            options["action"] = "store_true"
        else:
            is_list = typing.get_origin(kind) is list
            options |= dict(type=typing.get_args(kind)[0] if is_list else kind, metavar=field.name.upper(),
                            choices=field.metadata["choices"])
            if field.name in positional:
                options |= dict(nargs="?")
            elif is_list:
                options |= dict(nargs="+")
        parser.add_argument(field.name if field.name in positional else f"--{field.name}", **options)
    given = vars(parser.parse_args(argv))
    config = cls(**{**presets(given), **given})
    for field in dataclasses.fields(cls):
        value, kind = getattr(config, field.name), kinds[field.name]                # from a preset or a file, too
        at_least, at_most = field.metadata["at_least"], field.metadata["at_most"]
        if kind in (str, bool, int, float) and type(value) not in ((int, float) if kind is float else (kind,)):
            raise InputError(f"--{field.name} {value!r:.60}: must be of type {kind.__name__}")
        if field.metadata["choices"] and value not in field.metadata["choices"]:
            raise InputError(f"--{field.name} {value!r:.60}: must be one of {', '.join(field.metadata['choices'])}")
        for number in value if isinstance(value, list) else [value]:
            if at_least is not None and not at_least <= number:
                raise InputError(f"--{field.name} {number}: must be at least {at_least}")
            if at_most is not None and not number <= at_most:
                raise InputError(f"--{field.name} {number}: must be at most {at_most}")
    return config

def _help(field) -> str:
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    choices = f" {{{', '.join(map(str, field.metadata['choices']))}}}" if field.metadata["choices"] else ""
    shown = "" if default in (None, "", False) else f" (default: {default})"
    return f"{field.metadata['help']}{choices}{shown}".replace("%", "%%")
