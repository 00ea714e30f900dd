"""Where weights are: a file, or an address from which it is fetched once. Free of torch."""

import re
import time
from hashlib import sha256
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from urllib.request import url2pathname, urlopen

from scratch_det.errors import ConfigError, UserError, did_you_mean
from scratch_det.files import cache_folder, find_file, locked, sha256_of
from scratch_det.log import Progress

HOST = "https://dl.fbaipublicfiles.com"
CATALOG = "catalog://ImageNetPretrained/"  # detectron2's names for Detectron's ImageNet weights
IMAGENET = {
    "FAIR/R-50-GN": "47261647/R-50-GN.pkl",
    "FAIR/R-101-GN": "47592356/R-101-GN.pkl",
    "FAIR/X-101-32x8d": "20171220/X-101-32x8d.pkl",
    "FAIR/X-152-32x8d-IN5k": "25093814/X-152-32x8d-IN5k.pkl",
    "MSRA/R-50": "MSRA/R-50.pkl",
    "MSRA/R-101": "MSRA/R-101.pkl",
}
ZOO, FILE = "detectron2://", "file://"
SUFFIXES = (".pth", ".pt", ".pkl", ".safetensors")
SECONDS_TO_ANSWER, LEAST_SPEED = 30.0, 10_000  # the latter in bytes a second, over all the time
DIGEST = re.compile(r"-(?=\d*[a-f])([0-9a-f]{8,64})\.")  # resnet50-0676ba61.pth: its SHA-256 begins so; no date
BLOCK = 1 << 20  # bytes


def split_part(weights: str) -> tuple[str, str]:
    """MODEL.WEIGHTS as file or address, and which of several networks in it: what is behind a #."""
    source, _, part = weights.rpartition("#")
    return (weights, "") if not source or "/" in part or Path(weights).is_file() else (source, part)


def check_weights(weights: str) -> None:
    """Raise ConfigError or UserError when MODEL.WEIGHTS cannot be used; fetches nothing."""
    if url_of(weights) or not weights:
        return
    path = place_of(weights)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "is missing"
        recipe = Path("configs/Pretraining") / f"{path.parent.name.removeprefix('pretrain_')}.yaml"
        own = f"make it: scratch-det pretrain --config-file {recipe}\n  or " if find_file(recipe).is_file() else ""
        raise UserError(
            f"MODEL.WEIGHTS: file {weights} {problem}; {own}give the path or address of a {' or '.join(SUFFIXES)} "
            'file, or MODEL.WEIGHTS "" to start at random'
        )


def place_of(weights: str) -> Path:
    """Where the file that MODEL.WEIGHTS names is, or will be when it has been fetched."""
    weights, _ = split_part(weights)
    url = url_of(weights)
    if not url:
        return find_checkpoint(Path(url2pathname(weights.removeprefix(FILE)) if weights.startswith(FILE) else weights))
    name = Path(url.split("?")[0]).name
    return cache_folder() / "weights" / f"{sha256(url.encode()).hexdigest()[:12]}-{name}"


def fetch(weights: str) -> Path:
    """The file that MODEL.WEIGHTS names, fetched into the cache unless it is there.

    Raises UserError when it cannot be fetched, or what came is no checkpoint; then nothing is kept.
    """
    weights, _ = split_part(weights)
    url, file = url_of(weights), place_of(weights)
    if not url or file.is_file():
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.with_name(file.name + ".lock")):  # all processes of a run get here at the same time
            if not file.is_file():
                partial = file.with_name(f"partial-{file.name}")
                try:
                    _download(url, partial)
                    partial.replace(file)
                finally:
                    partial.unlink(missing_ok=True)
    except (OSError, HTTPException, ValueError, UserError) as error:
        reason = error.reason if isinstance(error, URLError) else f"{type(error).__name__}: {error}"
        raise UserError(
            f"MODEL.WEIGHTS {weights}: {url} cannot be fetched to {file} ({reason}); on a machine without network, "
            "fetch it elsewhere and give the file: MODEL.WEIGHTS PATH"
        ) from None
    return file


def _download(url: str, file: Path) -> None:
    """Raises OSError, HTTPException, ValueError or UserError where not all of it comes, or what comes is no weights."""
    from scratch_det.weights.read import read_checkpoint  # imports torch, which takes a second

    began = time.monotonic()
    with urlopen(url, timeout=SECONDS_TO_ANSWER) as answer, open(file, "wb") as out:
        size = int(answer.headers.get("Content-Length") or 0)
        with Progress(f"fetching {url} (MB)", -(-size // BLOCK)) as progress:
            while block := answer.read1(BLOCK):  # what there is: of a slow server less
                out.write(block)
                progress.advance(steps=out.tell() // BLOCK - progress.done)
                if (seconds := time.monotonic() - began) > SECONDS_TO_ANSWER + out.tell() / LEAST_SPEED:
                    raise OSError(f"only {out.tell()} bytes came in {seconds:.0f} seconds")
        if size and out.tell() != size:
            raise OSError(f"{out.tell()} of {size} bytes came")
    named = DIGEST.search(Path(url.split("?")[0]).name)  # not of ``file``, whose name begins with one of the address
    if named and not (digest := sha256_of(file)).startswith(named[1]):
        raise ValueError(f"its SHA-256 is {digest}, by its name it begins with {named[1]}")
    read_checkpoint(file)


def url_of(weights: str) -> str | None:
    """The web address that ``weights`` stands for, None for a file. Raises ConfigError for one that is unknown."""
    if weights.startswith(CATALOG):
        name = weights.removeprefix(CATALOG)
        if name not in IMAGENET:
            raise ConfigError(
                f"MODEL.WEIGHTS is {weights}, expected {CATALOG} and one of {', '.join(IMAGENET)}"
                f"{did_you_mean(name, list(IMAGENET))}"
            )
        return f"{HOST}/detectron/ImageNetPretrained/{IMAGENET[name]}"
    if weights.startswith(ZOO):
        return f"{HOST}/detectron2/{weights.removeprefix(ZOO)}"
    if weights.startswith(("https://", "http://")):
        return weights
    if "://" in weights and not weights.startswith(FILE):
        raise ConfigError(f"MODEL.WEIGHTS is {weights}, expected a file, https://, {ZOO} or {CATALOG}")
    return None


def find_checkpoint(path: Path) -> Path:
    """``path``, or the file of that name in checkpoints/ beside it: detectron2 has them in OUTPUT_DIR itself."""
    inside = path.parent / "checkpoints" / path.name
    return inside if inside.is_file() and not path.is_file() else path
