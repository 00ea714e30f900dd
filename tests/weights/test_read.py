"""Reading weights files without running their code."""

import contextlib
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from scratch_det.errors import UserError
from scratch_det.weights import read
from scratch_det.weights.origin import read_weights
from scratch_det.weights.read import read_checkpoint, weights_sha256


class Bomb:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


class TestFiles:
    def test_a_pickle_of_arrays(self, tmp_path: Path) -> None:
        """As Python 2 wrote them, too, and with single numbers."""
        blobs = {"a": np.arange(3, dtype=np.float32), "b": np.float32(2), "d": np.array([1, 256], ">i4")}
        content = {"blobs": OrderedDict(blobs, c=np.asfortranarray(np.arange(6).reshape(2, 3))), "cfg": "text"}
        for protocol in (2, 3, 4, 5):
            (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
            found = read_checkpoint(tmp_path / "a.pkl")
            assert found["cfg"] == "text"
            assert (found["blobs"]["a"].tolist(), found["blobs"]["a"].dtype) == ([0, 1, 2], np.float32)
            assert (found["blobs"]["b"], found["blobs"]["b"].shape) == (2, ())
            assert found["blobs"]["c"].tolist() == [[0, 1, 2], [3, 4, 5]]
            assert found["blobs"]["d"].tolist() == [1, 256]

    def test_bytes_that_python_2_wrote(self, tmp_path: Path) -> None:
        """There an array's content was a str, and is read as text."""
        raw = np.array([1.5, -2], "<f4").tobytes()
        kind = b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01K\x02\x85"
        (tmp_path / "a.pkl").write_bytes(b"\x80\x02}U\x01a" + array + kind + b"\x89U\x08" + raw + b"tbs.")
        assert read_checkpoint(tmp_path / "a.pkl")["a"].tolist() == [1.5, -2]

    @pytest.mark.parametrize("wrap", [lambda bomb: bomb, lambda bomb: {"model": {"a": np.zeros(2), "b": [bomb]}}])
    def test_a_pickle_of_anything_else_is_rejected_unread(self, wrap: Callable, tmp_path: Path) -> None:
        (tmp_path / "evil.pkl").write_bytes(pickle.dumps(wrap(Bomb(tmp_path / "touched"))))
        with pytest.raises(UserError, match=r"evil\.pkl holds pathlib\S* expected only NumPy arrays"):
            read_checkpoint(tmp_path / "evil.pkl")
        with pytest.raises(UserError, match=r"evil\.pkl holds"):
            read_weights(tmp_path / "evil.pkl")
        assert not (tmp_path / "touched").exists()

    @pytest.mark.parametrize("array", [np.array(["text"]), np.array([{}]), np.zeros(2, "i4,O"), np.zeros(2, "M8[s]")])
    def test_arrays_of_anything_but_numbers_are_not_read(self, array: np.ndarray, tmp_path: Path) -> None:
        """NumPy would read pointers from the file."""
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": array, "b": np.ones(2)}))
        found = read_checkpoint(tmp_path / "a.pkl")
        assert found["a"].startswith("an array of type ")
        assert found["b"].tolist() == [1, 1]

    def test_a_changed_bit_of_a_zips_directory(self, tmp_path: Path) -> None:
        """It is an error, or changes nothing: torch would take a part for a folder, and leave its tensor as it is."""
        path = tmp_path / "a.pth"
        torch.save({"a": torch.arange(4.0)}, path)
        content, errors = path.read_bytes(), []
        start = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 4)
        for place in range(start, content.index(b"PK\x01\x02", start + 4)):
            for bit in range(8):
                path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
                try:
                    assert read_checkpoint(path)["a"].tolist() == [0, 1, 2, 3]
                except UserError:
                    errors.append((place - start, bit))
        assert (38, 4) in errors

    def test_every_changed_byte_is_survived(self, tmp_path: Path) -> None:
        content = pickle.dumps({"a": np.arange(4, dtype=np.float32), "b": np.float32(1)}, protocol=2)
        for place in range(len(content)):
            for change in (0x00, 0xFF, content[place] ^ 1):
                (tmp_path / "a.pkl").write_bytes(content[:place] + bytes([change]) + content[place + 1 :])
                with contextlib.suppress(UserError):
                    read_checkpoint(tmp_path / "a.pkl")

    @pytest.mark.parametrize("content", [b"", b"text", pickle.dumps({"a": np.zeros(9)})[:-20]])
    def test_damage(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "a.pkl").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.pkl is damaged or no pickle"):
            read_checkpoint(tmp_path / "a.pkl")

    def test_no_dictionary(self, tmp_path: Path) -> None:
        (tmp_path / "a.pkl").write_bytes(pickle.dumps([np.zeros(2)]))
        with pytest.raises(UserError, match="holds a list; expected a checkpoint or tensors by name"):
            read_checkpoint(tmp_path / "a.pkl")

    @pytest.mark.parametrize("content", [{"epoch": 3}, {0: torch.ones(3)}], ids=["numbers", "no names"])
    def test_no_tensor_by_name(self, content: dict, tmp_path: Path) -> None:
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(UserError, match="holds no network that is known"):
            read_weights(tmp_path / "a.pth")


class TestDigest:
    def digest(self, file: Path, model: dict[str, torch.Tensor], **others: object) -> str:
        torch.save({"model": model, **others}, file)
        return weights_sha256(file)

    def test_of_the_model_alone(self, tmp_path: Path) -> None:
        ours = self.digest(tmp_path / "a.pth", {"a": torch.ones(2), "b": torch.zeros(3)}, seconds=1.5)
        other = {"b": torch.zeros(3), "a": torch.ones(2)}
        assert len(ours) == 64
        assert self.digest(tmp_path / "b.pth", other, seconds=2.5, optimizer={0: torch.ones(1)}) == ours

    @pytest.mark.parametrize(
        "other",
        [
            {"a": torch.tensor([1.0, 1.0 + 2**-23])},
            {"b": torch.ones(2)},
            {"a": torch.ones(1, 2)},
            {"a": torch.ones(2).view(torch.int32)},
            {},
        ],
    )
    def test_one_bit_name_shape_or_type(self, tmp_path: Path, other: dict[str, torch.Tensor]) -> None:
        ours = self.digest(tmp_path / "a.pth", {"a": torch.ones(2)})
        assert self.digest(tmp_path / "b.pth", other) not in ("", ours)

    def test_what_is_no_checkpoint(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        said: list[str] = []
        monkeypatch.setattr(read.logger, "warning", said.append)
        path = tmp_path / "a.pth"
        assert weights_sha256(path) == ""
        assert "a.pth: no digest of its weights: weights file" in said[0]
        assert self.digest(path, {"a": torch.ones(2)}, path=path) == ""  # an object that is no plain tensor
        path.write_bytes(path.read_bytes()[:100])
        assert weights_sha256(path) == ""
        assert len(said) == 3
        for content in ({"epoch": 3}, {"model": [1]}, {"model": {"a": 1}}):
            torch.save(content, path)
            assert weights_sha256(path) == ""
            assert said.pop() == f"{path}: no digest of its weights: it holds no model"

    def test_stays_the_same(self, tmp_path: Path) -> None:
        """Results that are stored name it."""
        types = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
        model = {str(i): torch.arange(4).to(getattr(torch, name)) for i, name in enumerate(types)}
        assert (
            self.digest(tmp_path / "a.pth", model) == "932062deb4beb19bcdf5d32ad3560d865e9d33cfdfb8f8191ac378a66f5b15d2"
        )

    def test_as_in_results_that_are_stored(self, tmp_path: Path) -> None:
        """results/ compares digests across versions of this repository."""
        whole = torch.arange(6, dtype=torch.float32)
        stored = "c38b70296a1d0ccc6e51f2e3233dc82e8df852b238063dc4a393e0e2c4cf4588"
        model = {"b": torch.tensor(3), "a": whole.view(2, 3).t(), "c": whole[2:]}
        assert self.digest(tmp_path / "a.pth", model | {"d": torch.ones(2, dtype=torch.bfloat16)}) == stored
