"""The keys that a recipe may set, with their defaults (``defaults.yaml`` beside this file), and strict loading.

A recipe is loaded with its chain of ``_BASE_`` files, then the overrides of the command line. It means the same to
stock detectron2 (``get_cfg().merge_from_file``): bases in their order, then the file itself, each value decoded and
coerced by yacs's rules. Every error names file and line. Never imports torch.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from fvcore.common.config import CfgNode

from scratch_det.command_line import RESUME, WEIGHTS, missing_project
from scratch_det.config import choices
from scratch_det.errors import ConfigError, did_you_mean, quoted, raise_problems
from scratch_det.files import ROOT, find_file
from scratch_det.reading import RESTORE, PlainLoader, read_yaml, yaml_loader

BASE_KEY = "_BASE_"  # fvcore's word for the recipes a recipe is built on
MOST_FILES = 100  # of one recipe; the most here are 11
COMMAND_LINE = "command line"  # the place of overrides, in messages
EXAMPLE = "configs/Digits/quickstart.yaml"
NO_KEYS = (  # what others write where a key is expected, and what to write here
    (r".*\.(ya?ml|py)", f"a recipe is given as --config-file FILE, such as {EXAMPLE}"),
    (r".*EARLY_STOP.*", "a run ends early by TEST.PATIENCE N, a number of evaluations"),
    (r".*#.*|.*\.(pth|pt|pkl|ckpt|safetensors)", WEIGHTS),
    (r"auto|.*/.*", RESUME),
)
PROJECTS = ROOT / "projects"
OUTSIDE_OUR_SUBSET = ("MODEL.RETINANET", "MODEL.SEM_SEG_HEAD", "MODEL.PANOPTIC_FPN", "GLOBAL")  # of detectron2's keys


class Entry(NamedTuple):
    """A dotted key, its value as PyYAML reads it, and ``file:line``."""

    key: str
    value: Any
    where: str


class LoadedConfig(NamedTuple):
    """A configuration and where its values come from.

    explicit: the dotted keys that a recipe or an override set, as opposed to defaults.
    overridden: those of them that the command line set.
    file_cfg: the configuration without the command line's overrides.
    """

    cfg: CfgNode
    explicit: frozenset[str]
    overridden: frozenset[str]
    file_cfg: CfgNode


def get_cfg() -> CfgNode:
    """A fresh configuration with every default, to be changed freely by the caller."""
    return with_project_keys(_defaults().clone())


@cache
def _defaults() -> CfgNode:
    cfg = CfgNode(read_yaml(Path(__file__).with_name("defaults.yaml")))
    for key, value in flatten(cfg).items():
        set_key(cfg, key, CfgNode._decode_cfg_value(value))  # a text may spell a tuple, as in a recipe
    return cfg


def with_project_keys(cfg: CfgNode) -> CfgNode:
    """``cfg``, changed: with the keys of the loaded projects."""
    return with_keys(cfg, choices.PROJECT_KEYS)


def with_keys(cfg: CfgNode, keys: Mapping[str, Any]) -> CfgNode:
    """``cfg``, changed: with these dotted keys, new ones too."""
    for key, value in keys.items():
        *sections, name = key.split(".")
        node = cfg
        for section in sections:
            node = node.setdefault(section, CfgNode())
        node[name] = value
    return cfg


def flatten(tree: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """Every value of nested dictionaries, such as a configuration, by its dotted key, in their order."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= {f"{name}{separator}{key}": item for key, item in flatten(value, separator).items()}
        else:
            flat[str(name)] = value
    return flat


def set_key(cfg: CfgNode, key: str, value: Any) -> None:
    """Set one existing dotted key; the value is stored as it is. Raises KeyError for an unknown key or a section."""
    *sections, name = key.split(".")
    node = cfg
    for section in sections:
        node = node[section]
    if name not in node or isinstance(node[name], CfgNode):
        raise KeyError(key)
    setattr(node, name, value)  # unlike node[name] = value, raises on a frozen configuration


def plain(value: Any) -> Any:
    """Tuples as lists: a recipe may have either, and yacs saves both as lists."""
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def load_config(
    config_file: str | Path, overrides: Sequence[Any] = (), defaults: CfgNode | None = None
) -> LoadedConfig:
    """The defaults, changed by ``config_file`` and its bases, then by ``overrides`` (``KEY VALUE KEY VALUE ...``).

    defaults: all keys there are, by default ``get_cfg()``; a backend may know more. Raises one ConfigError that names
    every unknown key and every wrong type with file and line, and keys that a project's choice lists without adding.
    """
    in_files = list(_chain(Path(config_file), COMMAND_LINE, (), []))
    in_command = _override_entries(overrides)
    cfg = defaults.clone() if defaults else get_cfg()
    known = flatten(cfg)
    problems = [*_choices_without_keys(), *_apply(cfg, in_files, known)]
    file_cfg = cfg.clone()
    problems += _apply(cfg, in_command, known)
    if problems and (project := missing_project(find_file(config_file))):
        problems.append(f"{config_file} is a recipe of a project; give --project {quoted(project)}")
    raise_problems(dict.fromkeys(problems))
    explicit, overridden = (frozenset(entry.key for entry in entries) for entries in (in_files, in_command))
    return LoadedConfig(cfg, explicit | overridden, overridden, file_cfg)


def _choices_without_keys() -> Iterator[str]:
    """Every key that a Choice lists has a default: rules compare it with that."""
    known = flatten(get_cfg())
    for entries in (choices.BACKBONES, *choices.LISTS.values()):
        for name, choice in entries.items():
            if unknown := [key for key in choice.keys if key not in known]:
                yield (
                    f"the Choice {name!r} of a project lists {', '.join(unknown)}, expected keys that have a default; "
                    "add it to PROJECT_KEYS, see projects/README.md"
                )


def _chain(path: Path, asked_by: str, ancestors: tuple[Path, ...], files: list[Path]) -> Iterator[Entry]:
    """The entries in merging order: those of all bases of a file before its own; ``files`` has all that were read."""
    path = find_file(path)
    files.append(path)
    if len(files) > MOST_FILES:
        raise ConfigError(f"{asked_by}: {BASE_KEY} leads to more than {MOST_FILES} files: name each in one place")
    if path.resolve() in ancestors:
        raise ConfigError(f"{asked_by}: {BASE_KEY} {path} leads back to itself: remove it from one of the files")
    entries = read_source(path, asked_by)
    for _, names, where in (entry for entry in entries if entry.key == BASE_KEY):
        for name in names if isinstance(names, list) else [names]:
            if not isinstance(name, str) or not name:
                raise ConfigError(f"{where}: {BASE_KEY} is {name!r}, expected a file name or a list of file names")
            base = os.path.normpath(path.parent / os.path.expanduser(name))  # as in fvcore: ~ is the home folder
            yield from _chain(Path(base), where, (*ancestors, path.resolve()), files)
    yield from (entry for entry in entries if entry.key != BASE_KEY)


def read_resolved(path: Path, needed: Collection[str] = ()) -> CfgNode:
    """The config.yaml of a run; tuples are lists. It has the keys ``needed`` and may have any other.

    Raises ConfigError for damage, and when a value has another type than the key's default.
    """
    content, known = read_yaml(path), flatten(get_cfg())
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no sections of keys, as a run's config does; {RESTORE}")
    found = flatten(content)
    for key in (key for key in known if key in found or key in needed):
        if key not in found or not same_kind(found[key], known[key]):
            what = f"{key} {found[key]!r}" if key in found else f"no {key}"
            raise ConfigError(f"{path} has {what}, expected a value such as {plain(known[key])!r}; {RESTORE}")
    return CfgNode(content)


def read_source(path: Path, asked_by: str) -> list[Entry]:
    """The entries of one file, BASE_KEY's too; ``asked_by`` says who named it, for the message when it is missing."""
    if path.suffix == ".py":
        raise ConfigError(f"{asked_by}: {path} is Python, a recipe is YAML{_nearest(path) or f', such as {EXAMPLE}'}")
    if not path.is_file():
        what = "is a folder or a pipe, not a recipe" if path.exists() else f"does not exist{_nearest(path)}"
        raise ConfigError(f"{asked_by}: {path} {what}")
    with yaml_loader(path) as loader:
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}: expected lines such as 'SOLVER:' and '  BASE_LR: 0.02', found no keys at all")
        return list(_walk(loader, root, path, prefix=""))


def _nearest(path: Path) -> str:
    """``; did you mean ...?`` for a recipe of another spelling in the same folders, or of that name in another one."""
    near = next(folder for folder in (*path.parents, Path()) if folder.is_dir())
    found = {
        one.stem: one for one in (*find_file("configs").glob("*/*.yaml"), *near.glob("*/*.yaml"), *near.glob("*.yaml"))
    }
    close = get_close_matches(path.stem, found, n=1)
    return f"; did you mean '{found[close[0]]}'?" if close else ""


def _walk(loader: PlainLoader, node: yaml.MappingNode, path: Path, prefix: str) -> Iterator[Entry]:
    """Every leaf below ``node``; an empty section has none."""
    loader.flatten_mapping(node)  # resolves YAML's own "<<" merges
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        if isinstance(value_node, yaml.MappingNode):
            yield from _walk(loader, value_node, path, f"{key}.")
        else:
            where = f"{path}:{key_node.start_mark.line + 1}"
            yield Entry(key, loader.construct_object(value_node, deep=True), where)


def _override_entries(overrides: Sequence[Any]) -> list[Entry]:
    keys = [str(token) for token in overrides[::2]]
    for key in keys:
        if "=" in key:
            name, _, value = key.partition("=")
            raise ConfigError(f"{COMMAND_LINE}: '{key}' joins key and value: write {name} {quoted(value)}")
        if answer := next((answer for pattern, answer in NO_KEYS if re.fullmatch(pattern, key)), None):
            raise ConfigError(f"{COMMAND_LINE}: '{key}' is no key; {answer}")
    if len(overrides) % 2:
        raise ConfigError(
            f"{COMMAND_LINE}: '{keys[-1]}' has no value: overrides come in pairs, KEY VALUE KEY VALUE ..."
        )
    return [Entry(key, value, COMMAND_LINE) for key, value in zip(keys, overrides[1::2], strict=True)]


def _apply(cfg: CfgNode, entries: list[Entry], defaults: dict[str, Any]) -> list[str]:
    """Set what can be set; the problems of the others.

    Decoding and type rules are yacs's own. Rejected beyond them, because stock accepts it and fails later: null
    for a key that has a value, anything but a number where the default is null, and elements of another kind.
    """
    problems: list[str] = []
    for key, raw, where in entries:
        if key not in defaults:
            problems.append(f"{where}: {_explain_unknown(key, list(defaults))}")
            continue
        probe, found = CfgNode({"VALUE": defaults[key]}), raw
        with suppress(ValueError, RecursionError, MemoryError):  # the last two: ((( without end, for Python's parser
            found = CfgNode._decode_cfg_value(raw)
            probe.merge_from_list(["VALUE", raw])
            if same_kind(probe.VALUE, defaults[key]):
                set_key(cfg, key, probe.VALUE)
                continue
        problems.append(f"{where}: {key} is {_wrong_type(found, defaults[key], where)}")
    return problems


def same_kind(value: Any, default: Any) -> bool:
    """Whether elements are numbers where the default's are, and so on; empty defaults say nothing about elements."""
    if default is None:
        return value is None or _is_number(value)
    if isinstance(default, (list, tuple)):
        return isinstance(value, (list, tuple)) and all(same_kind(v, d) for v in value for d in default[:1])
    return _is_number(value) if _is_number(default) else type(value) is type(default)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _wrong_type(found: Any, default: Any, where: str) -> str:
    """The value ``found``, the type of ``default``, and where it can be guessed the value that was meant."""
    expected, meant = type(default), None
    if found is None:
        meant = '""' if default == "" else None
    elif expected is bool:
        meant = {"0": "False", "1": "True", "no": "False", "yes": "True"}.get(str(found).lower())
    elif expected is str and default == "cuda":  # MODEL.DEVICE: a GPU's number
        meant = f"cuda:{found}"
    elif expected is str and _is_number(found):
        meant = f"""\"'{found}'\""""  # quoted twice: one pair is eaten by the decoding
    elif expected is float and _is_number(found):
        meant = repr(float(found))
    elif expected is int and isinstance(found, float) and found.is_integer():
        meant = repr(int(found))
    elif expected in (list, tuple) and isinstance(found, (int, float, str)) and same_kind([found], default):
        meant = (quoted if where == COMMAND_LINE else str)(expected([found]))
    fix = f": write {meant}" if meant else f": leave the key out to keep {default!r}" if found is None else ""
    kinds = ["null" if value is None else type(value).__name__ for value in (found, default)]
    example = '""' if default == "" else repr(default)
    return f"{found!r} ({kinds[0]}), expected {kinds[1]} such as {example}{fix}"


def _explain_unknown(key: str, known: list[str]) -> str:
    """What to write instead of ``key``: the same name in its right section first, then the closest spelling."""
    below = [other for other in known if other.startswith(key + ".")]
    if below:
        return f"{key} is a section, not a value; it holds keys such as {below[0]}"
    for package in sorted(PROJECTS.glob("*/__init__.py")):
        if f'"{key}"' in package.read_text(encoding="utf-8"):
            return f"key {key} is one of a project: give --project projects/{package.parent.name}"
    if key.startswith(OUTSIDE_OUR_SUBSET):
        return f"key {key} is of a part of detectron2 that is not trained here, such as RetinaNet: remove it"
    name = key.rpartition(".")[2]
    namesakes = get_close_matches(key, [other for other in known if other.rpartition(".")[2] == name], n=3, cutoff=0)
    meant = [key.upper()] if key.upper() in known else namesakes
    if meant:
        return f"unknown key {key}; did you mean {' or '.join(map(repr, meant))}?"
    return f"unknown key {key}{did_you_mean(key, known) or '; see scratch_det/config/defaults.yaml for all keys'}"
