"""Addresses of weights, and fetching them."""

import io
import os
import re
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scratch_det.errors import ConfigError, UserError
from scratch_det.weights import locate
from scratch_det.weights.locate import check_weights, fetch, split_part, url_of
from scratch_det.weights.read import read_checkpoint

torch.save({"a": torch.ones(3)}, buffer := io.BytesIO())
WEIGHTS = buffer.getvalue()
SHA256 = sha256(WEIGHTS).hexdigest()


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``answer(content, headers)``: what every server says."""

    def serve(content: bytes, headers: dict[str, str] | None = None) -> None:
        reply = type("Reply", (io.BytesIO,), {"headers": headers or {}})
        monkeypatch.setattr(locate, "urlopen", lambda url, timeout: reply(content))

    return serve


class TestAddress:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return tmp_path / "cache/scratch_det/weights"

    def test_names_of_the_catalog(self) -> None:
        """detectron2's own, which its catalog test below confirms."""
        expected = "https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained/47261647/R-50-GN.pkl"
        assert url_of("catalog://ImageNetPretrained/FAIR/R-50-GN") == expected
        assert url_of("detectron2://a/b.pkl") == "https://dl.fbaipublicfiles.com/detectron2/a/b.pkl"
        assert url_of("/a/b.pth") is None

    @pytest.mark.parametrize(("source", "part"), [("https://a/b.pth", "teacher"), ("run#1/model_final.pth", "")])
    def test_a_part_of_a_file(self, source: str, part: str) -> None:
        """A folder's name is none."""
        assert split_part(f"{source}#{part}" if part else source) == (source, part)

    @pytest.mark.detectron2
    @pytest.mark.parametrize("name", locate.IMAGENET)
    def test_addresses_are_detectron2s(self, name: str) -> None:
        from detectron2.checkpoint.catalog import ModelCatalog

        assert url_of(locate.CATALOG + name) == ModelCatalog.get(f"ImageNetPretrained/{name}")

    @pytest.mark.parametrize(
        ("weights", "expected"),
        [
            ("catalog://ImageNetPretrained/FAIR/R-50-GNN", "did you mean 'FAIR/R-50-GN'"),
            ("s3://bucket/a.pth", "expected a file, https://"),
        ],
    )
    def test_unknown_ones_are_rejected_at_once(self, weights: str, expected: str, train: Callable) -> None:
        with pytest.raises(ConfigError, match=expected):
            train("MODEL.WEIGHTS", weights)

    def test_fetched_once(self, answer: Callable, cache: Path) -> None:
        url = "https://example.org/a.pth?download=true"
        check_weights(url)
        answer(WEIGHTS)
        file = fetch(url)
        assert file.is_relative_to(cache)
        answer(b"")
        assert fetch(url) == file
        assert read_checkpoint(file)["a"].tolist() == [1, 1, 1]

    def test_a_file_of_this_machine_is_not_copied(self, tmp_path: Path, cache: Path) -> None:
        """By its address too, with %20; a device or a pipe would never end."""
        path = tmp_path / "a b.pth"
        path.write_bytes(WEIGHTS)
        check_weights(path.as_uri())
        assert fetch(path.as_uri()) == path
        os.mkfifo(tmp_path / "pipe.pth")
        for url in ("file:///dev/zero", str(tmp_path / "pipe.pth"), (tmp_path / "pipe.pth").as_uri()):
            with pytest.raises(UserError, match="is no regular file"):
                check_weights(url)
        assert not cache.exists()

    @pytest.mark.parametrize(
        ("content", "headers", "name", "reason"),
        [
            (b"123", {"Content-Length": "10"}, "a.pth", "3 of 10 bytes came"),
            (b"<html>404</html>", {}, "a.pth", "is a web page in the place of a file"),
            (b"nothing", {}, "a.pkl", "is damaged or no pickle"),
            (WEIGHTS[:-9], {}, "a.pth", "is damaged or no PyTorch file"),
            (WEIGHTS, {}, "resnet50-0676ba61.pth", f"SHA-256 is {SHA256}, by its name it begins with 0676ba61"),
            (WEIGHTS, {"Content-Length": "many"}, "a.pth", "invalid literal for int"),
        ],
    )
    def test_what_is_no_checkpoint_is_not_kept(
        self, content: bytes, headers: dict[str, str], name: str, reason: str, answer: Callable, cache: Path
    ) -> None:
        answer(content, headers)
        with pytest.raises(UserError, match=reason):
            fetch(f"https://example.org/{name}")
        assert not [path for path in cache.iterdir() if path.suffix != ".lock"]

    def test_a_name_that_tells_the_digest(self, answer: Callable) -> None:
        """As torchvision's files have it, and in full; digits alone may be a date."""
        answer(WEIGHTS)
        for number, name in enumerate((SHA256[:8], SHA256, "20260131")):
            assert fetch(f"https://example.org/{number}/resnet50-{name}.pth").is_file()

    def test_a_name_without_a_digest(self, answer: Callable) -> None:
        """The dash before it in the cache is not the name's."""
        answer(WEIGHTS)
        assert fetch("https://example.org/4fa0c1de9b.pth").read_bytes() == WEIGHTS

    def test_a_server_that_is_too_slow(self, answer: Callable, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = iter((0.0, 10.0, 100.0))
        monkeypatch.setattr(locate, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        monkeypatch.setattr(locate, "BLOCK", len(WEIGHTS) // 2)
        answer(WEIGHTS)
        with pytest.raises(UserError, match=r"only \d+ bytes came in 100 seconds"):
            fetch("https://example.org/a.pth")
        assert not [path for path in cache.iterdir() if path.suffix != ".lock"]

    def test_without_network(self, cache: Path) -> None:
        for url in ("http://127.0.0.1:9/a.pth", "http://[bad/a.pth", "http://127.0.0.1:9/a b.pth"):
            with pytest.raises(UserError, match=rf"{re.escape(url)} cannot be fetched .*without network, fetch"):
                fetch(url)
        assert not list(cache.rglob("*.pth*[!k]"))
