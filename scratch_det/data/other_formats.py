"""What a file is that was given in the place of a COCO json. Needs no torch."""

import re
from collections.abc import Iterable
from itertools import chain
from typing import Any

START = 2**16  # bytes of a file that are looked at
TEXTS = {  # what a file begins with, a regular expression -> what it is, and the fix
    r"version https://git-lfs": "a pointer of Git LFS, not the file itself: run git lfs pull",
    r"\{[^\n]*\}\s*\n\s*\{": "JSON lines: write one object with COCO's three lists",
    r"\d+( +[\d.eE+-]+){4,}\s*(\n|$)": "a label file of YOLO: convert the set to COCO's format",
    r"\s*<(\?xml|annotation)": "XML, as of PASCAL VOC: see scratch-det data voc",
    r"\s*<(!doctype )?html": "a web page: download the file itself",
    r"\x1f\x8b|PK\x03\x04": "a compressed file: unpack it",
}
CONTENTS = {  # keys of a json; after a dot those of the first item of it or of its annotations -> the same
    ("annotations.caption",): "COCO's captions: take instances_*.json",
    ("annotations.segments_info",): "COCO's panoptic segmentation: take instances_*.json",
    (".image_id", ".score"): "a list of results, which a detector predicted: take the json that it was tested on",
    (".image", ".annotations"): "in CreateML's format: export the set in COCO's",
    (".data", ".annotations"): "in Label Studio's own format: export the set in COCO's",
    ("_via_img_metadata",): "a project of VIA: export its annotations in COCO's format",
    (".regions", ".filename"): "in VIA's own format: export the annotations in COCO's",
    ("shapes", "imagePath"): "a file of labelme, of one image: convert the folder to COCO's format",
}


def other_format(data: bytes, content: Any) -> str | None:
    """What a file is, and the fix; None where it may be a COCO json. content: what json reads of ``data``, or None."""
    own = content if isinstance(content, dict) else {}
    items, objects = own.values() if own else content, own.get("annotations")
    keys = {*own, *_keys_of_first(items, "."), *_keys_of_first(objects, "annotations.")}
    texts = (what for start, what in TEXTS.items() if re.match(start, data[:START].decode("latin-1"), re.IGNORECASE))
    contents = (what for names, what in CONTENTS.items() if keys.issuperset(names) and "annotations.bbox" not in keys)
    return next(chain(texts, contents), None)


def _keys_of_first(items: Any, prefix: str) -> list[str]:
    first = next(iter(items), None) if isinstance(items, Iterable) else None
    return [f"{prefix}{key}" for key in first] if isinstance(first, dict) else []
