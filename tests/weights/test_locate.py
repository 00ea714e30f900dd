"""Addresses of weights, and fetching them."""

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scratch_det.errors import ConfigError, UserError
from scratch_det.weights import locate
from scratch_det.weights.locate import check_weights, fetch, url_of
from scratch_det.weights.read import read_checkpoint


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

    def test_fetched_once(self, tmp_path: Path, cache: Path) -> None:
        torch.save({"a": torch.ones(3)}, tmp_path / "a.pth")
        url = (tmp_path / "a.pth").as_uri()
        check_weights(url)
        file = fetch(url)
        assert file.is_relative_to(cache)
        (tmp_path / "a.pth").unlink()
        assert fetch(url) == file
        assert read_checkpoint(file)["a"].tolist() == [1, 1, 1]

    def test_without_network(self, cache: Path) -> None:
        for url in ("http://127.0.0.1:9/a.pth", "http://[bad/a.pth", "http://127.0.0.1:9/a b.pth"):
            with pytest.raises(UserError, match=rf"{re.escape(url)} cannot be fetched .*without network, fetch"):
                fetch(url)
        assert not list(cache.rglob("*.pth*[!k]"))

    def test_a_short_answer_is_no_file(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Answer(io.BytesIO):
            headers = {"Content-Length": "10"}  # noqa: RUF012

        monkeypatch.setattr(locate, "urlopen", lambda url, timeout: Answer(b"123"))
        with pytest.raises(UserError, match="3 of 10 bytes came"):
            fetch("https://example.org/a.pth")
        assert not list(cache.rglob("a.pth"))
