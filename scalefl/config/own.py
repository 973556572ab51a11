"""Options that one command alone takes, beside or in place of those of a run."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self, get_type_hints

from scalefl.config.values import coerce
from scalefl.contracts import InputError


@dataclass(frozen=True, kw_only=True)
class OwnOptions:
    """One command's own; every field has a default, for options that were not typed."""

    @classmethod
    def kinds(cls) -> Mapping[str, Any]:
        """Option -> its type."""
        return get_type_hints(cls)

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Self:
        """The options as typed: texts and switches. Raises InputError with one line per problem."""
        values, problems = {}, []
        for name, value in raw.items():
            try:
                values[name] = coerce(value, cls.kinds()[name], f"--{name}")
            except InputError as error:
                problems.append(str(error))
        options = cls(**values)
        problems += [
            p for p in options.problems() if not any(p.startswith(f"--{n}:") for n in raw.keys() - values)
        ]
        if problems:
            raise InputError("\n".join(problems))
        return options

    def problems(self) -> Iterator[str]:
        """What cannot be, a line each."""
        yield from ()
