"""Types of settings that were read from YAML or JSON."""

import dataclasses
from typing import Any, Literal, get_args, get_origin

from megatron_jam.config.errors import UsageError

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number, such as 1.0e-5",  # YAML reads 1e-5 as text
    str: "text",
}


def check_types(settings: Any, where: str = "") -> None:
    """Check the fields of a dataclass that are declared as plain types or as `Literal`.

    Args:
        settings: an instance; fields of other types are left alone.
        where: what stands before a field's name in the message, such as "bridges.".

    Raises:
        UsageError: naming the first field whose value is not what it is declared as.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if get_origin(field.type) is Literal:
            if value not in get_args(field.type):
                choices = ", ".join(map(str, get_args(field.type)))
                raise UsageError(f"{where}{field.name} is {value!r}; choose one of {choices}")
        elif field.type in _WORDS:
            is_whole_float = field.type is float and type(value) is int
            if type(value) is not field.type and not is_whole_float:
                raise UsageError(
                    f"{where}{field.name} is {value!r}; it must be {_WORDS[field.type]}"
                )
