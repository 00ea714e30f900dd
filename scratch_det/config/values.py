"""One value of a recipe: decoded and type-checked as stock detectron2 does it, but with the mend in the message."""

from typing import Any

from fvcore.common.config import CfgNode

from scratch_det.errors import ConfigError


def accept(key: str, raw: Any, default: Any, where: str) -> Any:
    """``raw`` as it will be stored under ``key``, or a ConfigError that starts with ``where``.

    Decoding and type rules are yacs's own. Refused beyond them, because stock accepts it and trips over it later: null
    for a key that has a value, anything but a number where the default is null, and elements of another kind.
    """
    probe = CfgNode({"VALUE": default})
    try:
        probe.merge_from_list(["VALUE", raw])
        fits = _same_kind(probe.VALUE, default)
    except ValueError:
        fits = False
    if fits:
        return probe.VALUE
    found = CfgNode._decode_cfg_value(raw)
    raise ConfigError(
        f"{where}: {key} is {found!r} ({_type(found)}), expected {_type(default)} such as {_example(default)}"
        f"{_mend(found, default)}"
    )


def _same_kind(value: Any, default: Any) -> bool:
    """Whether elements are numbers where the default's are, and so on; empty defaults say nothing about elements."""
    if default is None:
        return value is None or _is_number(value)
    if isinstance(default, (list, tuple)):
        return isinstance(value, (list, tuple)) and all(_same_kind(v, d) for v in value for d in default[:1])
    return _is_number(value) if _is_number(default) else type(value) is type(default)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _type(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _example(default: Any) -> str:
    return '""' if default == "" else repr(default)


def _mend(found: Any, default: Any) -> str:
    """The value to write instead, where it can be guessed."""
    meant = _meant(found, default)
    if meant is not None:
        return f": write {meant}"
    return f": leave the key out to keep {default!r}" if found is None else ""


def _meant(found: Any, default: Any) -> str | None:
    expected = type(default)
    if found is None:
        return '""' if default == "" else None
    if expected is bool:
        return {"0": "False", "1": "True", "no": "False", "yes": "True"}.get(str(found).lower())
    if expected is float and _is_number(found):
        return repr(float(found))
    if expected is int and isinstance(found, float) and found.is_integer():
        return repr(int(found))
    if expected is str and _is_number(found):
        return f"""\"'{found}'\""""  # quoted twice: one pair is eaten by the decoding
    if expected in (list, tuple) and isinstance(found, (int, float, str)) and _same_kind([found], default):
        return repr(expected([found]))
    return None
