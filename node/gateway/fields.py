"""Typed access to a request's JSON: what is asked for by name comes back checked, or as a 400 that names the place."""

from __future__ import annotations

from typing import Any

import msgspec

from node.gateway.errors import ApiError, invalid


def decode_body(body: bytes) -> dict[str, Any]:
    """The JSON object of a request. Raises: ApiError (400)."""
    try:
        value = msgspec.json.decode(body)
    except RecursionError as exc:
        raise invalid(None, "The body's JSON is nested too deeply. Nothing was sent or paid.", "invalid_json") from exc
    except (msgspec.MsgspecError, UnicodeError) as exc:
        raise invalid(
            None, f"The body is not valid JSON in UTF-8 ({exc}). Nothing was sent or paid.", "invalid_json"
        ) from exc
    if not isinstance(value, dict):
        raise invalid(None, "The body must be a JSON object. Nothing was sent or paid.", "invalid_json")
    return value


class Fields:
    """An object's fields; null counts as absent, as it does at OpenAI. `path`: where the object stands, with a dot."""

    def __init__(self, values: dict[str, Any], path: str = "") -> None:
        self._values = values
        self._path = path

    @classmethod
    def of(cls, value: Any, path: str) -> Fields:
        """The fields of an item of a list. Raises: ApiError (400) when it is no object."""
        if not isinstance(value, dict):
            raise invalid(path, f"{path} must be an object. Nothing was sent or paid.")
        return cls(value, f"{path}.")

    def name(self, field: str) -> str:
        """The field's full name, for messages."""
        return f"{self._path}{field}"

    def get(self, field: str) -> Any:
        """The value as it came."""
        return self._values.get(field)

    def fail(self, field: str, message: str) -> ApiError:
        """A 400 about this field."""
        return invalid(self.name(field), f"{self.name(field)} {message}. Nothing was sent or paid.")

    def text(self, field: str) -> str | None:
        value = self.get(field)
        if value is None or isinstance(value, str):
            return value
        raise self.fail(field, "must be a string")

    def flag(self, field: str) -> bool:
        value = self.get(field)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise self.fail(field, "must be true or false")

    def integer(self, field: str, low: int, high: int) -> int | None:
        value = self.get(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(field, f"must be an integer from {low} to {high}")
        return value

    def number(self, field: str, low: float, high: float) -> float | None:
        value = self.get(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.fail(field, f"must be a number from {low} to {high}")
        return float(value)

    def object(self, field: str) -> Fields:
        """The fields of an object; of an empty one when it is absent."""
        value = self.get(field)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.fail(field, "must be an object")
        return Fields(value, f"{self.name(field)}.")

    def items(self, field: str, most: int) -> list[Any]:
        """A list of at most `most` items; empty when it is absent."""
        value = self.get(field)
        if value is None:
            return []
        if not isinstance(value, list) or len(value) > most:
            raise self.fail(field, f"must be a list of at most {most}")
        return value

    def ids(self, field: str, most: int) -> tuple[int, ...]:
        """Token ids."""
        return token_ids(self.items(field, most), self.name(field))


MAX_U32 = (1 << 32) - 1


def token_ids(value: list[Any], path: str) -> tuple[int, ...]:
    """Raises: ApiError (400) naming the first that is no token id."""
    for index, number in enumerate(value):
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= MAX_U32:
            raise invalid(f"{path}[{index}]", f"{path}[{index}] must be a token id. Nothing was sent or paid.")
    return tuple(value)
