"""Keys whose value names one of several things: each has a rule, and keys that it alone reads. Projects add some."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from fvcore.common.config import CfgNode

from scratch_det.config.defaults import get_cfg
from scratch_det.config.keys import flatten
from scratch_det.errors import did_you_mean


@dataclass(frozen=True)
class Choice:
    """What a value names: ``function`` is module:function; ``rule`` is on what it reads.

    ``keys`` are those that no other one reads; ones that all read, such as INPUT.RANDOM_FLIP, are not among them.
    """

    function: str
    keys: tuple[str, ...] = ()
    rule: Callable[[CfgNode], Iterator[str]] | None = None


def known_choice(cfg: CfgNode, key: str, name: str, choices: Mapping[str, Choice]) -> Iterator[str]:
    """There is one of this name, its own rule is kept, and nothing is set that only another one reads."""
    if name not in choices:
        known = list(choices)
        yield f"{key} is '{name}', expected {' or '.join(known)}{did_you_mean(name, known)}"
        return
    if rule := choices[name].rule:
        yield from rule(cfg)
    values, defaults = flatten(cfg), flatten(get_cfg())
    for unread in (unread for other, one in choices.items() if other != name for unread in one.keys):
        if values[unread] != defaults[unread]:
            yield (
                f"{unread} is {values[unread]!r}, which would change nothing with {key} {name}; "
                f"leave it at {defaults[unread]!r}"
            )
