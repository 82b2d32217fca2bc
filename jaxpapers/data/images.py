"""Image sets: the official files as arrays of 8-bit pixels, 0 black, channels last.

| function | images | training | test | classes |
| --- | --- | --- | --- | --- |
| `mnist` | (28, 28, 1), digits | 60,000 | 10,000 | 10 |
| `fashion_mnist` | (28, 28, 1), clothes | 60,000 | 10,000 | 10 |
| `cifar10` | (32, 32, 3), photographs | 10,000 a batch, of 5 | 10,000 | 10 |
| `cifar100_subset` | (32, 32, 3), photographs | 3,000 | 1,000 | 100 |
| `omniglot` | (28, 28, 1), handwritten characters | 242 characters x 20 drawers | | 242 |

`omniglot` is the union of the two "small background" sets of the Omniglot repository (Lake, Salakhutdinov, Tenenbaum
2015), not Omniglot as a whole. `cifar100_subset` is a selection of CIFAR-100 that no official address serves: a result
on it is no CIFAR-100 result, and should say so. CIFAR-10 is read from the official archive, or, where the wanted
batches lie there one by one, from these.

    data = fashion_mnist()
    pixels = data.train_images / 255
    characters = split_drawers(omniglot(), train_drawers=15)
"""

import io
import math
import pickle
import tarfile
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib.image
import numpy as np
from jaxtyping import Float, Int32, Shaped, UInt8

from jaxpapers.data.download import CorruptData, OfficialFile, StoredForm, data_folder, find, open_data

MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist"  # PyTorch's mirror of the files of yann.lecun.com
FASHION_MNIST = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
# Pinned to a commit, so that an update there is no checksum error here.
OMNIGLOT = "https://raw.githubusercontent.com/brendenlake/omniglot/32aee47094f15296299b761dcaa01400b90c60d5/python"

DIGITS = tuple("0123456789")
CLOTHES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
DRAWERS, CHARACTERS = 20, 242


def _idx_files(folder: str, address: str, files: dict[str, tuple[int, str]]) -> dict[str, OfficialFile]:
    return {
        part: OfficialFile(f"{folder}/{part}-ubyte.gz", f"{address}/{part}-ubyte.gz", sha256, size)
        for part, (size, sha256) in files.items()
    }


MNIST_FILES = _idx_files(
    "mnist",
    MNIST,
    {
        "train-images-idx3": (9_912_422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        "train-labels-idx1": (28_881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
        "t10k-images-idx3": (1_648_877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
        "t10k-labels-idx1": (4_542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
    },
)
FASHION_MNIST_FILES = _idx_files(
    "fashion_mnist",
    FASHION_MNIST,
    {
        "train-images-idx3": (26_421_880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
        "train-labels-idx1": (29_515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
        "t10k-images-idx3": (4_422_102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
        "t10k-labels-idx1": (5_148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
    },
)
OMNIGLOT_FILES = (
    OfficialFile(
        "omniglot/images_background_small1.zip",
        f"{OMNIGLOT}/images_background_small1.zip",
        "f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4",
        1_319_022,
    ),
    OfficialFile(
        "omniglot/images_background_small2.zip",
        f"{OMNIGLOT}/images_background_small2.zip",
        "3ccaa407515a8778e5d0861875af38b17e418f301ad5bb3b5a6b65d901a41c7f",
        1_580_917,
    ),
)
CIFAR10_ARCHIVE = OfficialFile(
    "cifar10/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    170_498_071,
)
CIFAR10_FOLDER = "cifar-10-batches-py"  # in the archive
# Files of the archive, as a data folder may hold them without it.
CIFAR10_MEMBERS = {
    "data_batch_1": OfficialFile(
        "cifar10/data_batch_1",
        None,
        "f80f984545fcbb3eca9d688a50b0b5a247ab47b8e735cd925fb55fbd10f69593",
        31_035_704,
        (
            StoredForm(
                "cifar10/data_batch_1.xz",
                "42a60f6809a3f129c8f7fd79df5847b99d4619a4d3c097cb95e49d5b481556e0",
                23_257_692,
            ),
        ),
    ),
    "test_batch": OfficialFile(
        "cifar10/test_batch",
        None,
        "7830976a344d92a5108cca9beaa1cf6c7bed3e7f3d1cfc2bb03a4dd69547992d",
        31_035_526,
        (
            StoredForm(
                "cifar10/test_batch.xz",
                "44a8286153d9440e13abf22f0ed9036e984f4462d1514d7e6aeacf35f400cd49",
                23_272_980,
            ),
        ),
    ),
    "batches.meta": OfficialFile(
        "cifar10/batches.meta",
        None,
        "f962466ef690d46b226450fb9aadc74ba4bc64a76aa526b5827fe4bc5c7125cb",
        158,
    ),
}
CIFAR100_SUBSET = OfficialFile(
    "cifar100/cifar100_subset.npz",
    None,
    "d8fb6c98bb86b8f185e75f975cf2c9508b757286ea71c0521463b275e0694aa0",
    11_233_596,
)


class ImageData(NamedTuple):
    """Images in two parts.

    Attributes:
        train_images: of training.
        train_labels: the class of each.
        test_images: of the test.
        test_labels: the class of each.
        classes: their names, in the order of the labels.
    """

    train_images: UInt8[np.ndarray, "train height width channels"]
    train_labels: Int32[np.ndarray, "train"]
    test_images: UInt8[np.ndarray, "test height width channels"]
    test_labels: Int32[np.ndarray, "test"]
    classes: tuple[str, ...]


class Characters(NamedTuple):
    """Omniglot: every character once by every drawer, ink 255 on 0.

    Attributes:
        images: sorted by alphabet, character and drawer.
        alphabets: the alphabet of each character.
        names: of each character within its alphabet.
    """

    images: UInt8[np.ndarray, "characters drawers height width"]
    alphabets: tuple[str, ...]
    names: tuple[str, ...]


def mnist() -> ImageData:
    """MNIST (LeCun, Cortes, Burges), white on black.

    Raises:
        DataNotFound: a file is missing and cannot be downloaded.
        CorruptData: a file is not the official one.
    """
    return _from_idx(MNIST_FILES, DIGITS)


def fashion_mnist() -> ImageData:
    """Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747), light on black.

    Raises:
        DataNotFound: a file is missing and cannot be downloaded.
        CorruptData: a file is not the official one.
    """
    return _from_idx(FASHION_MNIST_FILES, CLOTHES)


def omniglot(size: int = 28) -> Characters:
    """The characters of both "small background" sets, 0 where there is no ink, averaged over pixels of the new size.

    Greek and Latin are in both sets; each drawing is taken once.

    Args:
        size: height and width of the result; the files have 105.

    Raises:
        ValueError: a size below 1 or above 105.
        DataNotFound: a file is missing and cannot be downloaded.
        CorruptData: a file is not the official one.
    """
    drawings: dict[tuple[str, str, int], np.ndarray] = {}
    for file in OMNIGLOT_FILES:
        for key, content in _zipped_drawings(file):
            if key not in drawings:
                drawings[key] = _paper(content, file)
    characters = sorted({key[:2] for key in drawings})
    keys = [(*character, drawer) for character in characters for drawer in range(1, DRAWERS + 1)]
    if len(characters) != CHARACTERS or sorted(drawings) != keys:
        found = f"{len(drawings)} drawings of {len(characters)} characters"
        raise _corrupt(OMNIGLOT_FILES[0], f"and its twin have {found}, expected {DRAWERS} of {CHARACTERS} each")
    images = []
    for character in characters:  # one by one: all of them at full size are 200 MB
        ink = np.stack([~drawings[*character, drawer] for drawer in range(1, DRAWERS + 1)])
        images.append(np.rint(255 * area_average(ink, size)).astype(np.uint8))
    alphabets, names = zip(*characters, strict=True)
    return Characters(np.stack(images), alphabets, names)


def split_drawers(characters: Characters, train_drawers: int = 15) -> ImageData:
    """Characters as classes: the first drawers are the training part, the others the test.

    Raises:
        ValueError: a part that would be empty.
    """
    drawers = characters.images.shape[1]
    if not 0 < train_drawers < drawers:
        raise ValueError(f"train_drawers must be between 1 and {drawers - 1}, got {train_drawers}")
    images = characters.images[..., None]
    labels = np.repeat(np.arange(len(images), dtype=np.int32)[:, None], drawers, axis=1)
    parts = (slice(train_drawers), slice(train_drawers, None))
    train, test = ([array[:, part].reshape(-1, *array.shape[2:]) for array in (images, labels)] for part in parts)
    names = zip(characters.alphabets, characters.names, strict=True)
    return ImageData(train[0], train[1], test[0], test[1], tuple(f"{alphabet}/{name}" for alphabet, name in names))


def cifar10(batches: Sequence[int] = (1, 2, 3, 4, 5)) -> ImageData:
    """CIFAR-10 (Krizhevsky 2009): the training batches that are asked for, and the whole test batch.

    Args:
        batches: numbers of training batches, 10,000 images each.

    Raises:
        ValueError: no batches, or numbers outside of 1 to 5.
        DataNotFound: the batches do not lie there one by one, and the archive is missing and cannot be downloaded.
        CorruptData: a file is not the official one.
    """
    if not batches or not set(batches) <= {1, 2, 3, 4, 5}:
        raise ValueError(f"batches must be some of 1 to 5, got {tuple(batches)}")
    names = [*(f"data_batch_{number}" for number in batches), "test_batch", "batches.meta"]
    *parts, meta = _cifar10_members(names)
    images, labels = zip(*(_cifar10_batch(part) for part in parts), strict=True)
    classes = tuple(name.decode() for name in meta[b"label_names"])
    return ImageData(np.concatenate(images[:-1]), np.concatenate(labels[:-1]), images[-1], labels[-1], classes)


def cifar100_subset() -> ImageData:
    """30 training and 10 test images of each of CIFAR-100's classes, sorted by class.

    Raises:
        DataNotFound: the file is missing; no address serves it.
        CorruptData: the file is another one.
    """
    with open_data(CIFAR100_SUBSET) as stream:
        try:
            arrays = dict(np.load(stream, allow_pickle=False))
        except (ValueError, zipfile.BadZipFile) as error:
            raise _corrupt(CIFAR100_SUBSET, f"is no archive of arrays ({error})") from error
    try:
        images = [arrays[f"x_{part}"] for part in ("train", "test")]
        labels = [arrays[f"fine_{part}"].astype(np.int32) for part in ("train", "test")]
        classes = tuple(str(name) for name in arrays["fine_label_names"])
    except KeyError as missing:
        raise _corrupt(CIFAR100_SUBSET, f"has no array {missing}") from missing
    return ImageData(images[0], labels[0], images[1], labels[1], classes)


def area_average(images: Shaped[np.ndarray, "*batch height width"], size: int) -> Float[np.ndarray, "*batch size size"]:
    """Shrinks images: a new pixel is the mean of the area that it covers, shares of old pixels included.

    Args:
        images: any numbers, or bits.
        size: new height and width.

    Raises:
        ValueError: a size below 1, or above the old height or width.
    """
    height, width = images.shape[-2:]
    if not 1 <= size <= min(height, width):
        raise ValueError(f"size must be between 1 and {min(height, width)}, got {size}")
    rows, columns = _cover(height, size), _cover(width, size)
    return rows @ images.astype(np.float32) @ columns.T


def _cover(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Share of every old pixel in every new one; rows sum to 1."""
    edges = np.arange(new + 1) * old / new
    low, high = np.maximum(edges[:-1, None], np.arange(old)), np.minimum(edges[1:, None], np.arange(1, old + 1))
    return (np.maximum(high - low, 0) * new / old).astype(np.float32)


def _from_idx(files: dict[str, OfficialFile], classes: tuple[str, ...]) -> ImageData:
    arrays: list[np.ndarray] = []
    for part in ("train", "t10k"):
        images, labels = (_idx(files[f"{part}-{kind}"]) for kind in ("images-idx3", "labels-idx1"))
        if len(images) != len(labels) or labels.max(initial=0) >= len(classes):
            file = files[f"{part}-labels-idx1"]
            raise _corrupt(file, f"has {len(labels)} labels up to {labels.max(initial=0)} for {len(images)} images")
        arrays += [images[..., None], labels.astype(np.int32)]
    train_images, train_labels, test_images, test_labels = arrays
    return ImageData(train_images, train_labels, test_images, test_labels, classes)


def _idx(file: OfficialFile) -> UInt8[np.ndarray, "..."]:
    """An array of bytes: two zeros, the type 8, the number of axes, their lengths (big-endian), the values."""
    with open_data(file) as stream:
        content = stream.read()
    axes = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    start = 4 + 4 * axes
    shape = tuple(np.frombuffer(content[4:start], ">u4").tolist()) if axes and len(content) >= start else ()
    if len(shape) != axes or not axes or math.prod(shape) != len(content) - start:
        raise _corrupt(file, "is no idx file of bytes, or not a whole one")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _zipped_drawings(file: OfficialFile) -> list[tuple[tuple[str, str, int], bytes]]:
    """((alphabet, character, drawer), content) of the images in an archive."""
    with open_data(file) as stream:
        try:
            with zipfile.ZipFile(stream) as archive:
                paths = [path for path in archive.namelist() if path.endswith(".png")]
                found = []
                for path in paths:  # images_background_small1/Greek/character01/0394_01.png
                    _, alphabet, character, name = path.split("/")
                    found.append(((alphabet, character, int(name[:-4].split("_")[1])), archive.read(path)))
                return found
        except (zipfile.BadZipFile, ValueError, IndexError) as error:
            raise _corrupt(file, f"is no archive of drawings ({error})") from error


def _paper(content: bytes, file: OfficialFile) -> np.ndarray:
    """Bits of a drawing: True where there is no ink."""
    try:
        image = matplotlib.image.imread(io.BytesIO(content), format="png")
    except (OSError, SyntaxError) as error:  # what its PNG reader raises
        raise _corrupt(file, f"has an image that cannot be read ({error})") from error
    if image.shape != (105, 105):
        raise _corrupt(file, f"has an image of shape {image.shape}, expected (105, 105)")
    return image > 0.5


def _cifar10_members(names: Sequence[str]) -> list[dict[bytes, Any]]:
    """Unpickled members of the archive: one by one where all of them lie there, from the archive elsewhere."""
    single = [CIFAR10_MEMBERS.get(name) for name in names]
    if all(file is not None and find(file) for file in single):
        contents = []
        for file in single:
            assert file is not None
            with open_data(file) as stream:
                contents.append(stream.read())
    else:
        with open_data(CIFAR10_ARCHIVE) as stream, tarfile.open(fileobj=stream) as archive:
            contents = [_member(archive, f"{CIFAR10_FOLDER}/{name}") for name in names]
    # A pickle can run code: these bytes are the official ones, by their checksums.
    return [pickle.loads(content, encoding="bytes") for content in contents]


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    try:
        stream = archive.extractfile(name)
    except KeyError as missing:
        raise _corrupt(CIFAR10_ARCHIVE, f"has no {name}") from missing
    if stream is None:
        raise _corrupt(CIFAR10_ARCHIVE, f"has no file {name}")
    return stream.read()


def _cifar10_batch(batch: dict[bytes, Any]) -> tuple[UInt8[np.ndarray, "images 32 32 3"], Int32[np.ndarray, "images"]]:
    """Rows of three planes as images, channels last."""
    planes = np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), np.asarray(batch[b"labels"], np.int32)


def _corrupt(file: OfficialFile, what: str) -> CorruptData:
    return CorruptData(f"{file.name} {what}; it lies in {data_folder()} and comes from {file.url}")
