"""Read a YAML mapping; what is wrong with the file is one line."""

from pathlib import Path
from typing import Any

import yaml

from scalefl.contracts import InputError


class Loader(yaml.SafeLoader):
    """YAML in which only true and false are booleans, as in YAML 1.2: `logit_adjustment: off` is a text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if first in "tTfF" or not tag.endswith(":bool")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """PyYAML keeps the last of two equal keys without a word; here they are an error."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} given twice", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[Any, Any]:
    """The mapping in a file. Raises InputError if there is no such file or no mapping in it."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; expected a YAML file.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file; expected YAML in UTF-8.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{path}{place}: not valid YAML ({error.problem}); mend that line.") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict):
        got = "an empty file" if content is None else f"a {type(content).__name__}"
        raise InputError(f"{path}: got {got}; expected a mapping, such as `num_rounds: 5`.")
    return content
