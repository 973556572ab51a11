"""The command line, generated from the options: every field is a flag, its docstring the help."""

import argparse
import ast
import inspect
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, NoReturn, get_args, get_origin

from scalefl import __version__
from scalefl.config import options
from scalefl.config.options import GROUPS
from scalefl.config.resolve import RESUME_SAVE_PATH
from scalefl.config.values import OPTION_KINDS
from scalefl.contracts import InputError


@dataclass(frozen=True, kw_only=True)
class Command:
    """What was typed, not yet resolved."""

    name: str
    """train or evaluate."""
    config_file: str | None
    flags: dict[str, Any]
    """Option -> text, list of texts, or a switch's bool; also unknown options, which `resolve` names."""


class Parser(argparse.ArgumentParser):
    """Raises InputError where argparse would print and exit."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`.")


def parse(argv: Sequence[str]) -> Command:
    """Read a command line. `--help` and `--version` print and leave by SystemExit, as argparse does."""
    typed, extra = _parser().parse_known_args([_underscored(argument) for argument in argv])
    flags = vars(typed)
    command, config_file = flags.pop("command"), flags.pop("config", None)
    unknown = [argument.lstrip("-").partition("=")[0] for argument in extra if argument.startswith("-")]
    if extra and not unknown:
        raise InputError(
            f"got '{extra[0]}' after the options; expected --name value; see `scalefl {command} --help`."
        )
    return Command(name=command, config_file=config_file, flags={**flags, **dict.fromkeys(unknown)})


def _underscored(argument: str) -> str:
    """`--batch-size=4` becomes `--batch_size=4`: dashes and underscores are the same in any mix."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


def _parser() -> Parser:
    parser = Parser(prog="scalefl", description="Federated fine-tuning of one model on machines that differ.")
    parser.add_argument("--version", action="version", version=f"scalefl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|evaluate")
    settings: dict[str, Any] = {"argument_default": argparse.SUPPRESS, "allow_abbrev": False}
    train = commands.add_parser("train", help="train, or resume a run", **settings)
    evaluate = commands.add_parser("evaluate", help="evaluate a checkpoint again", **settings)
    evaluate.add_argument("evaluate_from", metavar="CHECKPOINT", help="Folder of the checkpoint.")
    for command in (train, evaluate):
        command.epilog = "Dashes and underscores are the same. The preset overrides the defaults in brackets."
        command.add_argument("--config", metavar="FILE", help="YAML file of options; flags override it.")
        _add_options(command)
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    helps = _docstrings()
    for group in GROUPS:
        title = group.__name__.removesuffix("Options").lower()
        section = parser.add_argument_group(title, group.__doc__)
        for option in fields(group):
            kind = _without_none(OPTION_KINDS[option.name])
            flag, text = f"--{option.name}", helps[option.name] + _default(option.default)
            if kind is bool:
                section.add_argument(flag, nargs="?", const=True, metavar="0|1", help=text)
                off = f"--no_{option.name}"
                section.add_argument(off, action="store_false", dest=option.name, help=argparse.SUPPRESS)
            elif get_origin(kind) is tuple:
                section.add_argument(flag, nargs="*", metavar=_metavar(get_args(kind)[0]), help=text)
            elif option.name == "resume":
                section.add_argument(flag, nargs="?", const=RESUME_SAVE_PATH, metavar="FOLDER", help=text)
            else:
                section.add_argument(flag, metavar=_metavar(kind), help=text)


def _without_none(kind: Any) -> Any:
    kinds = [k for k in get_args(kind) if k is not type(None)]
    return kinds[0] if type(None) in get_args(kind) else kind


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return {int: "N", float: "X", str: "TEXT"}[kind]


def _default(default: Any) -> str:
    if default is MISSING or default is None or default == ():
        return ""
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return f" ({shown})"


def _docstrings() -> dict[str, str]:
    """Option -> the docstring under its field, which Python itself does not keep."""
    docstrings = {}
    for node in ast.walk(ast.parse(inspect.getsource(options))):
        if isinstance(node, ast.ClassDef):
            for before, after in zip(node.body, node.body[1:], strict=False):
                match before, after:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(
                        value=ast.Constant(value=str(text))
                    ):
                        docstrings[name] = text.replace("%", "%%")
    return docstrings
