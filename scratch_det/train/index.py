"""checkpoints/index.json: the files' checksums, the iterations whose checkpoints stay, and the best AP."""

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from scratch_det.textfile import write_atomically
from scratch_det.train.log import logger


class Index:
    """What a run remembers of its checkpoints from one part to the next; read from the disk each time."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "index.json"

    def digests(self, name: str) -> list[str]:
        """SHA-256 that the file ``name`` may have: more than one after a crash before the file was put in place."""
        return self._read().get("sha256", {}).get(name, [])

    def keep_at(self) -> list[int]:
        """Completed iterations whose checkpoints stay."""
        return self._read().get("keep_at", [])

    def best_ap(self) -> float:
        """The best AP so far, -inf when there is none."""
        return self._read().get("best", {}).get("ap", -math.inf)

    def add(self, name: str, digest: str, keep_at: Collection[int]) -> None:
        """Record a file that is about to be put in place; what it replaces stays valid until then."""
        content = self._read()
        known = {file: found for file, found in content.get("sha256", {}).items() if (self.folder / file).exists()}
        known[name] = list(dict.fromkeys([digest, *known.get(name, [])]))
        self._write({**content, "keep_at": sorted(keep_at), "sha256": known})

    def set_best(self, name: str, completed: int, ap: float) -> None:
        """Record the AP of the file ``name``, which is in place; only its newest checksum is needed from now on."""
        content = self._read()
        best = {"best": {"completed": completed, "ap": ap}}
        self._write({**content, **best, "sha256": {**content["sha256"], name: content["sha256"][name][:1]}})

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self.path.read_text()) if self.path.exists() else {}
        except ValueError:
            logger.warning(
                f"{self.path} is damaged: best AP and checksums are lost; repeat --keep-at, if there was one"
            )
            return {}

    def _write(self, content: dict[str, Any]) -> None:
        write_atomically(self.path, json.dumps(content, indent=2) + "\n")
