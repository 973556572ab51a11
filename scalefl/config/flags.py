"""The command line, generated from the options: every field is a flag, its docstring the help."""

import argparse
import ast
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, NoReturn, get_args, get_origin

from scalefl import __version__
from scalefl.config import clientoptions, options, planoptions
from scalefl.config.clientoptions import CLIENT_KINDS, ClientOptions, read_client_options
from scalefl.config.options import GROUPS
from scalefl.config.planoptions import PLAN_KINDS, PlanOptions, read_plan_options
from scalefl.config.resolve import RESUME_SAVE_PATH
from scalefl.config.values import OPTION_KINDS
from scalefl.contracts import InputError


@dataclass(frozen=True, kw_only=True)
class Command:
    """What was typed, not yet resolved."""

    name: str
    """train, evaluate, plan or client."""
    config_files: tuple[str, ...]
    """The later of two wins."""
    flags: dict[str, Any]
    """Option -> text, list of texts, or a switch's bool; also unknown options, which `resolve` names."""
    plan: PlanOptions
    """What only `plan` takes."""
    client: ClientOptions | None
    """What `client` takes."""


class Parser(argparse.ArgumentParser):
    """Raises InputError where argparse would print and exit."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`.")


def parse(argv: Sequence[str]) -> Command:
    """Read a command line. `--help` and `--version` print and leave by SystemExit, as argparse does."""
    typed, extra = _parser().parse_known_args([_underscored(argument) for argument in argv])
    flags = vars(typed)
    command, config_files = flags.pop("command"), tuple(flags.pop("config", ()))
    plan = {name: flags.pop(name) for name in PLAN_KINDS if command == "plan" and name in flags}
    client = {name: flags.pop(name) for name in CLIENT_KINDS if command == "client" and name in flags}
    unknown = [argument.lstrip("-").partition("=")[0] for argument in extra if argument.startswith("-")]
    if extra and not unknown:
        raise InputError(
            f"got '{extra[0]}' after the options; expected --name value; see `scalefl {command} --help`."
        )
    if command == "client" and unknown:
        raise InputError(f"--{unknown[0]}: no option of `scalefl client`; see `scalefl client --help`.")
    return Command(
        name=command,
        config_files=config_files,
        flags={**flags, **dict.fromkeys(unknown)},
        plan=read_plan_options(plan),
        client=read_client_options(client) if command == "client" else None,
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
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|evaluate|plan|client")
    settings: dict[str, Any] = {"argument_default": argparse.SUPPRESS, "allow_abbrev": False}
    train = commands.add_parser("train", help="train, or resume a run", **settings)
    evaluate = commands.add_parser("evaluate", help="evaluate a checkpoint again", **settings)
    evaluate.add_argument("evaluate_from", metavar="CHECKPOINT", help="Folder of the checkpoint.")
    plan = commands.add_parser("plan", help="predict each level's cost and memory, assign levels", **settings)
    _add_options(plan, (PlanOptions,), PLAN_KINDS)
    client = commands.add_parser("client", help="train tasks that a run wrote to files", **settings)
    _add_options(client, (ClientOptions,), CLIENT_KINDS)
    for command in (train, evaluate, plan):
        command.epilog = "Dashes and underscores are the same. The preset overrides the defaults in brackets."
        # Behind several files, evaluate's own argument would be taken for one more.
        several: dict[str, Any] = {"nargs": 1 if command is evaluate else "+", "action": "extend"}
        text = "YAML files of options, of which the later wins; flags override them."
        command.add_argument("--config", metavar="FILE", help=text, **several)
        _add_options(command, GROUPS, OPTION_KINDS)
    return parser


def _add_options(
    parser: argparse.ArgumentParser, groups: Sequence[type[Any]], kinds: Mapping[str, Any]
) -> None:
    helps = _docstrings()
    for group in groups:
        title = group.__name__.removesuffix("Options").lower()
        section = parser.add_argument_group(title, group.__doc__)
        for option in fields(group):
            kind = _without_none(kinds[option.name])
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
    source = "".join(inspect.getsource(module) for module in (options, planoptions, clientoptions))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            for before, after in zip(node.body, node.body[1:], strict=False):
                match before, after:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(
                        value=ast.Constant(value=str(text))
                    ):
                        docstrings[name] = text.replace("%", "%%")
    return docstrings
