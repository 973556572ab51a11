"""The command line, generated from the options: every field is a flag, its docstring the help."""

import argparse
import ast
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, NoReturn, get_args, get_origin

from scalefl import __version__
from scalefl.config.commands import COMMANDS, OF_A_RUN, OWN_OPTIONS
from scalefl.config.options import GROUPS
from scalefl.config.own import OwnOptions
from scalefl.config.resolve import RESUME_SAVE_PATH
from scalefl.config.values import OPTION_KINDS, nearest
from scalefl.contracts import InputError


@dataclass(frozen=True, kw_only=True)
class Command:
    """What was typed, not yet resolved."""

    name: str
    config_files: tuple[str, ...]
    """The later of two wins."""
    flags: dict[str, Any]
    """Option -> text, list of texts, or a switch's bool; also unknown options, which `resolve` names."""
    own: OwnOptions | None
    """What this command alone takes, if anything."""


class Parser(argparse.ArgumentParser):
    """Raises InputError where argparse would print and exit."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`.")


def parse(argv: Sequence[str]) -> Command:
    """Read a command line. `--help` and `--version` print and leave by SystemExit, as argparse does."""
    typed, extra = _parser().parse_known_args([_underscored(argument) for argument in argv])
    flags = vars(typed)
    command, config_files = flags.pop("command"), tuple(flags.pop("config", ()))
    kind = OWN_OPTIONS.get(command)
    own = {name: flags.pop(name) for name in _own_kinds(kind) if name in flags}
    unknown = [argument.lstrip("-").partition("=")[0] for argument in extra if argument.startswith("-")]
    if extra and not unknown:
        raise InputError(
            f"got '{extra[0]}' after the options; expected --name value; see `scalefl {command} --help`."
        )
    if command not in OF_A_RUN and unknown:
        hint = nearest(unknown[0], _own_kinds(kind), spelled="--{}".format)
        raise InputError(
            f"--{unknown[0]}: no option of `scalefl {command}`; {hint}see `scalefl {command} --help`."
        )
    try:
        read = kind.read(own) if kind else None
    except InputError:
        if not unknown:  # else what is missing may have been misspelt: `resolve` names that
            raise
        read = None
    return Command(
        name=command, config_files=config_files, flags={**flags, **dict.fromkeys(unknown)}, own=read
    )


def _underscored(argument: str) -> str:
    """`--batch-size=4` becomes `--batch_size=4`: dashes and underscores are the same in any mix."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


def _parser() -> Parser:
    parser = Parser(prog="scalefl", description="Federated fine-tuning of one model on machines that differ.")
    parser.add_argument("--version", action="version", version=f"scalefl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, argument_default=argparse.SUPPRESS, allow_abbrev=False)
        if name == "evaluate":
            command.add_argument("evaluate_from", metavar="CHECKPOINT", help="Folder of the checkpoint.")
        if name in OWN_OPTIONS:
            _add_options(command, (OWN_OPTIONS[name],), OWN_OPTIONS[name].kinds())
        if name not in OF_A_RUN:
            continue
        command.epilog = "Dashes and underscores are the same. The preset overrides the defaults in brackets."
        # Behind several files, evaluate's own argument would be taken for one more.
        several: dict[str, Any] = {"nargs": 1 if name == "evaluate" else "+", "action": "extend"}
        files = "YAML files of options, of which the later wins; flags override them."
        command.add_argument("--config", metavar="FILE", help=files, **several)
        _add_options(command, GROUPS, OPTION_KINDS)
    return parser


def _own_kinds(kind: type[OwnOptions] | None) -> Mapping[str, Any]:
    return kind.kinds() if kind else {}


def _add_options(
    parser: argparse.ArgumentParser, groups: Sequence[type[Any]], kinds: Mapping[str, Any]
) -> None:
    for group in groups:
        helps = _docstrings(group)
        title = group.__name__.removesuffix("Options").lower()
        section = parser.add_argument_group(title, group.__doc__)
        for option in fields(group):
            kind = _without_none(kinds[option.name])
            flag, text = f"--{option.name}", helps[option.name] + _default(option.default)
            if option.name == getattr(group, "positional", None):
                parser.add_argument(option.name, nargs="+", metavar="IMAGE", help=text)
            elif kind is bool and hasattr(group, "positional"):  # a value might be what stands behind it
                section.add_argument(flag, action="store_true", help=text)
            elif kind is bool:
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


def _docstrings(group: type[Any]) -> dict[str, str]:
    """Option -> the docstring under its field, which Python itself does not keep; inherited ones too."""
    docstrings = {}
    for kind in group.__mro__[:-1]:
        (node,) = ast.parse(inspect.getsource(kind)).body
        assert isinstance(node, ast.ClassDef)
        for before, after in zip(node.body, node.body[1:], strict=False):
            match before, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docstrings[name] = text.replace("%", "%%")
    return docstrings
