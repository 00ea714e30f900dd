"""Reading weights files without running their code, and the pixels they expect."""

import contextlib
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scratch_det.errors import UserError
from scratch_det.weights.read import (
    DETECTRON,
    IMAGENET,
    Pixels,
    adapt_first_layer,
    read_checkpoint,
    read_weights,
)


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
            found = read_checkpoint(tmp_path / "a.pkl", pickled=True)
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
        assert read_checkpoint(tmp_path / "a.pkl", pickled=True)["a"].tolist() == [1.5, -2]

    @pytest.mark.parametrize("wrap", [lambda bomb: bomb, lambda bomb: {"model": {"a": np.zeros(2), "b": [bomb]}}])
    def test_a_pickle_of_anything_else_is_refused_unread(self, wrap: Callable, tmp_path: Path) -> None:
        (tmp_path / "evil.pkl").write_bytes(pickle.dumps(wrap(Bomb(tmp_path / "touched"))))
        with pytest.raises(UserError, match=r"evil\.pkl holds pathlib\S* expected only NumPy arrays"):
            read_weights(tmp_path / "evil.pkl")
        assert not (tmp_path / "touched").exists()

    @pytest.mark.parametrize("array", [np.array(["text"]), np.array([{}]), np.zeros(2, "i4,O"), np.zeros(2, "M8[s]")])
    def test_arrays_of_anything_but_numbers_are_refused(self, array: np.ndarray, tmp_path: Path) -> None:
        """NumPy would read pointers from the file."""
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": array}))
        with pytest.raises(UserError, match="expected arrays of numbers"):
            read_checkpoint(tmp_path / "a.pkl", pickled=True)

    def test_every_changed_byte_is_survived(self, tmp_path: Path) -> None:
        content = pickle.dumps({"a": np.arange(4, dtype=np.float32), "b": np.float32(1)}, protocol=2)
        for place in range(len(content)):
            for change in (0x00, 0xFF, content[place] ^ 1):
                (tmp_path / "a.pkl").write_bytes(content[:place] + bytes([change]) + content[place + 1 :])
                with contextlib.suppress(UserError):
                    read_checkpoint(tmp_path / "a.pkl", pickled=True)

    @pytest.mark.parametrize("content", [b"", b"text", pickle.dumps({"a": np.zeros(9)})[:-20]])
    def test_damage(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "a.pkl").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.pkl is damaged or no pickle"):
            read_checkpoint(tmp_path / "a.pkl", pickled=True)

    def test_no_dictionary(self, tmp_path: Path) -> None:
        (tmp_path / "a.pkl").write_bytes(pickle.dumps([np.zeros(2)]))
        with pytest.raises(UserError, match="holds a list; expected a dictionary of arrays"):
            read_checkpoint(tmp_path / "a.pkl", pickled=True)

    def test_nothing_that_is_a_tensor(self, tmp_path: Path) -> None:
        torch.save({"epoch": 3}, tmp_path / "a.pth")
        with pytest.raises(UserError, match="holds no tensors by name"):
            read_weights(tmp_path / "a.pth")


class TestPixels:
    def test_order_and_division_go_into_the_weights(self) -> None:
        torch.manual_seed(0)
        weight, image = torch.randn(4, 3, 3, 3), torch.rand(1, 3, 9, 9) * 255
        recipe = Pixels("BGR", IMAGENET.mean[::-1], (1.0, 2.0, 3.0))
        adapted, said = adapt_first_layer(weight, IMAGENET, recipe)

        def see(pixels: Pixels, weight: Tensor) -> Tensor:
            values = image if pixels.format == "RGB" else image.flip(1)
            mean, std = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (pixels.mean, pixels.std))
            return F.conv2d((values - mean) / std, weight, padding=1)

        torch.testing.assert_close(see(recipe, adapted), see(IMAGENET, weight))
        assert said == "channels RGB to BGR; divided by PIXEL_STD 1 2 3 instead of 57.375 57.12 58.395"

    def test_another_mean_is_told(self) -> None:
        _, said = adapt_first_layer(torch.zeros(1, 3, 1, 1), IMAGENET.reordered("BGR"), DETECTRON)
        assert said.endswith("PIXEL_MEAN stays the recipe's, up to 0.9 of 255 from the weights' own")

    def test_the_same_pixels_change_nothing(self) -> None:
        weight = torch.randn(2, 3, 1, 1)
        adapted, said = adapt_first_layer(weight, DETECTRON, DETECTRON)
        assert adapted is weight
        assert said == ""
