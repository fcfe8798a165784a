"""Strict reading of parsed JSON and YAML into dataclasses: an unknown, missing or mistyped field is named."""

import dataclasses
import json
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from penumbra.models.errors import BadArtifact, PenumbraError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

CHOSEN = "\0"
"""How the tag of a union's member begins, before its class's name: a step to a problem that is no field, as no field of
a configuration begins."""

T = TypeVar("T")


def read_strict(kind: type[T], data: Any, *, where: str, refusal: type[PenumbraError] = BadArtifact) -> T:
    """Build the dataclass `kind` from parsed JSON or YAML; `where` names the place in error messages.

    Raises `refusal` naming a field that is unknown, missing, of the wrong type, NaN or infinite.
    """
    reader: TypeAdapter[list[T]] = _reader(kind)  # type: ignore[arg-type]  # a class is hashable
    try:
        return reader.validate_json(json.dumps([data]))[0]
    except ValidationError as error:
        problems = error.errors(include_url=False)
        raise refusal(_sentence(kind, next(filter(_is_unknown, problems), problems[0]), where)) from None
    except (TypeError, ValueError, RecursionError) as error:  # what YAML has and JSON has not: dates, circles
        raise refusal(f"{where} cannot be read: {error}") from None


@cache
def _reader(kind: type[T]) -> TypeAdapter[list[T]]:
    """Build a reader of a list of one: a dataclass that stands alone takes no configuration for its fields."""
    return TypeAdapter(list[kind], config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))  # type: ignore[valid-type]


def _is_unknown(problem: "ErrorDetails") -> bool:
    return problem["type"] == "unexpected_keyword_argument"


def _sentence(kind: Any, problem: "ErrorDetails", where: str) -> str:
    steps = [step for step in problem["loc"][1:] if not str(step).startswith(CHOSEN)]
    *parents, name = steps or ("",)
    place = where + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in parents)
    if _is_unknown(problem):
        for field_name in (step for step in parents if isinstance(step, str)):
            hint = get_type_hints(kind)[field_name]
            kinds = [arg for arg in (hint, *get_args(hint)) if isinstance(arg, type) and dataclasses.is_dataclass(arg)]
            kind = next((arg for arg in kinds if CHOSEN + arg.__name__ in problem["loc"]), kinds[0])
        return f"{place} has an unknown field {name!r}; known are {', '.join(f.name for f in dataclasses.fields(kind))}"
    if problem["type"] == "missing":
        return f"{place} lacks the field {name!r}"
    place += f"[{name}]" if isinstance(name, int) else f".{name}" if name else ""
    remedy = problem["msg"].replace("Input", "it").replace("Tuple", "it")
    if problem["type"] == "literal_error":
        *others, last = problem["ctx"]["expected"].split(" or ")
        remedy = f"one of {', '.join((*others, last))} is wanted" if others else f"{last} is wanted"
    return f"{place} is {problem['input']!r:.200}; {remedy}"
