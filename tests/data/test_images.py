"""Images: the official files where they are at hand, and small ones made here for everything else."""

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
import zipfile

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpapers.data import images as module
from jaxpapers.data.download import CorruptData, DataNotFound, OfficialFile, find
from jaxpapers.data.images import (
    CIFAR10_ARCHIVE,
    CIFAR10_MEMBERS,
    CIFAR100_SUBSET,
    FASHION_MNIST_FILES,
    MNIST_FILES,
    OMNIGLOT_FILES,
    Characters,
    area_average,
    cifar10,
    cifar100_subset,
    fashion_mnist,
    mnist,
    omniglot,
    split_drawers,
)


def official(*files):
    for file in files:
        if find(file) is None:
            pytest.skip(f"{file.name} is not in the data folder")


# ---- the official files, their published counts


@pytest.mark.parametrize(
    ("read", "files", "means", "counts"),
    [
        (mnist, MNIST_FILES, (33.318, 33.791), (5923, 980)),
        (fashion_mnist, FASHION_MNIST_FILES, (72.940, 73.147), (6000, 1000)),
    ],
)
def test_official_mnists(read, files, means, counts):
    official(*files.values())
    data = read()
    assert data.train_images.shape == (60_000, 28, 28, 1)
    assert data.test_images.shape == (10_000, 28, 28, 1)
    np.testing.assert_allclose((data.train_images.mean(), data.test_images.mean()), means, atol=1e-3)
    assert (np.sum(data.train_labels == 0), np.sum(data.test_labels == 0)) == counts
    assert data.train_labels.dtype == np.int32
    assert len(data.classes) == 10


def test_official_omniglot():
    official(*OMNIGLOT_FILES)
    characters = omniglot()
    assert characters.images.shape == (242, 20, 28, 28)
    assert characters.images.dtype == np.uint8
    per_alphabet = {name: characters.alphabets.count(name) for name in dict.fromkeys(characters.alphabets)}
    assert per_alphabet == {
        "Balinese": 24,
        "Early_Aramaic": 22,
        "Greek": 24,
        "Japanese_(katakana)": 47,
        "Korean": 40,
        "Latin": 26,
        "Sanskrit": 42,
        "Tagalog": 17,
    }
    # Ink is the rare colour, and the average keeps its share: that of a drawing in the file.
    with zipfile.ZipFile(find(OMNIGLOT_FILES[0])) as archive:
        page = matplotlib.image.imread(
            io.BytesIO(archive.read("images_background_small1/Balinese/character01/0108_03.png"))
        )
    np.testing.assert_allclose(characters.images[0, 2].mean() / 255, 1 - page.mean(), atol=2e-3)  # 8 bits
    data = split_drawers(characters)
    assert (len(data.train_images), len(data.test_images)) == (3630, 1210)
    assert data.classes[0] == "Balinese/character01"


def test_official_cifar10():
    official(*CIFAR10_MEMBERS.values())
    data = cifar10(batches=(1,))
    assert data.train_images.shape == data.test_images.shape == (10_000, 32, 32, 3)
    counts = np.bincount(data.train_labels).tolist()
    assert counts == [1005, 974, 1032, 1016, 999, 937, 1030, 1001, 1025, 981]
    assert np.bincount(data.test_labels).tolist() == [1000] * 10
    assert data.classes[6] == "frog"
    assert data.train_labels[0] == 6
    assert data.train_images[0, 0, 0].tolist() == [59, 62, 63]  # the corner of the first image, red, green, blue


def test_official_cifar100():
    official(CIFAR100_SUBSET)
    data = cifar100_subset()
    assert (data.train_images.shape, data.test_images.shape) == ((3000, 32, 32, 3), (1000, 32, 32, 3))
    assert np.bincount(data.train_labels).tolist() == [30] * 100
    assert data.classes[:2] == ("apple", "aquarium_fish")


def test_files_have_their_addresses():
    files = [*MNIST_FILES.values(), *FASHION_MNIST_FILES.values(), *OMNIGLOT_FILES, CIFAR10_ARCHIVE]
    assert len({file.url for file in files}) == len(files) == 11
    for file in files:
        assert f"{file.url}".rsplit("/")[-1] == file.name.rsplit("/")[-1]


# ---- made-up files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPAPERS_DATA", str(tmp_path))
    return tmp_path


def put(folder, name, content):
    """Writes a file and says that it is official."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return OfficialFile(name, None, hashlib.sha256(content).hexdigest(), len(content))


def idx(array):
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def made_up_mnist(folder, monkeypatch, labels=((3, 1), (9,)), images=idx):
    rng = np.random.default_rng(0)
    arrays, files = {}, {}
    for part, row in zip(("train", "t10k"), labels, strict=True):
        arrays[f"{part}-images-idx3"] = images(rng.integers(0, 256, size=(len(row), 28, 28), dtype=np.uint8))
        arrays[f"{part}-labels-idx1"] = idx(np.array(row, np.uint8))
    for name, content in arrays.items():
        files[name] = put(folder, f"mnist/{name}-ubyte.gz", gzip.compress(content))
    monkeypatch.setattr(module, "MNIST_FILES", files)


def test_idx_files_are_read_whole(folder, monkeypatch):
    made_up_mnist(folder, monkeypatch)
    data = mnist()
    assert data.train_labels.tolist() == [3, 1]
    assert data.test_labels.tolist() == [9]
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(data.train_images[..., 0], rng.integers(0, 256, size=(2, 28, 28), dtype=np.uint8))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: b"\0\0\x0d" + content[3:],
        lambda _: b"\0\0\x08\x03\0\0",
        lambda _: b"",
    ],
    ids=["cut", "longer", "floats", "header", "empty"],
)
def test_damaged_idx_files_are_refused(folder, monkeypatch, damage):
    made_up_mnist(folder, monkeypatch, images=lambda array: damage(idx(array)))
    with pytest.raises(CorruptData, match=r"train-images-idx3-ubyte\.gz is no idx file of bytes, or not a whole one"):
        mnist()


def test_labels_that_do_not_fit_are_refused(folder, monkeypatch):
    made_up_mnist(folder, monkeypatch, labels=((3, 10), (9,)))
    with pytest.raises(CorruptData, match="has 2 labels up to 10 for 2 images"):
        mnist()


def drawing(seed, size=105):
    """A 1-bit PNG and its ink."""
    from PIL import Image

    ink = np.random.default_rng(seed).uniform(size=(size, size)) < 0.1
    stream = io.BytesIO()
    Image.fromarray(~ink).save(stream, format="png")
    return stream.getvalue(), ink


def made_up_omniglot(folder, monkeypatch, sets, characters):
    files = []
    for number, drawings in enumerate(sets, 1):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("set/", "")
            for (alphabet, character, drawer), content in drawings.items():
                archive.writestr(f"set/{alphabet}/{character}/{1000 + drawer}_{drawer:02}.png", content)
        files.append(put(folder, f"omniglot/set{number}.zip", stream.getvalue()))
    monkeypatch.setattr(module, "OMNIGLOT_FILES", tuple(files))
    monkeypatch.setattr(module, "CHARACTERS", characters)


def test_drawings_of_both_sets_are_taken_once(folder, monkeypatch):
    drawings = {
        (alphabet, character, drawer): drawing(1000 * number + drawer)
        for number, (alphabet, character) in enumerate((("Greek", "c02"), ("Greek", "c01"), ("Arcadian", "c01")))
        for drawer in range(1, 21)
    }
    content = {key: png for key, (png, _) in drawings.items()}
    sets = [{key: png for key, png in content.items() if key[0] == "Greek"}, content]
    made_up_omniglot(folder, monkeypatch, sets, 3)
    found = omniglot(size=105)
    assert (found.alphabets, found.names) == (("Arcadian", "Greek", "Greek"), ("c01", "c01", "c02"))
    for row, key in ((0, ("Arcadian", "c01")), (2, ("Greek", "c02"))):
        np.testing.assert_array_equal(found.images[row, 6], 255 * drawings[*key, 7][1])
    assert omniglot(size=28).images.shape == (3, 20, 28, 28)
    monkeypatch.setattr(module, "CHARACTERS", 4)
    with pytest.raises(CorruptData, match="60 drawings of 3 characters, expected 20 of 4 each"):
        omniglot()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop(("Greek", "c01", 20)), "19 drawings of 1 characters, expected 20 of 1 each"),
        (lambda content: content.update({("Greek", "c01", 3): drawing(0, 28)[0]}), r"shape \(28, 28\), expected"),
        (lambda content: content.update({("Greek", "c01", 3): b"no image"}), "an image that cannot be read"),
    ],
    ids=["missing", "small", "text"],
)
def test_damaged_drawings_are_refused(folder, monkeypatch, change, message):
    content = {("Greek", "c01", drawer): drawing(drawer)[0] for drawer in range(1, 21)}
    change(content)
    made_up_omniglot(folder, monkeypatch, [content, {}], 1)
    with pytest.raises(CorruptData, match=message):
        omniglot()


def test_an_archive_that_is_none_is_refused(folder, monkeypatch):
    made_up_omniglot(folder, monkeypatch, [{}, {}], 1)
    file = put(folder, "omniglot/set1.zip", b"no archive")
    monkeypatch.setattr(module, "OMNIGLOT_FILES", (file,))
    with pytest.raises(CorruptData, match="is no archive of drawings"):
        omniglot()


def test_drawers_are_split_by_their_number():
    images = np.arange(3 * 4, dtype=np.uint8).reshape(3, 4, 1, 1) * np.ones((2, 2), np.uint8)
    data = split_drawers(Characters(images, ("A", "A", "B"), ("c1", "c2", "c1")), train_drawers=3)
    np.testing.assert_array_equal(data.train_images[:, 0, 0, 0], [0, 1, 2, 4, 5, 6, 8, 9, 10])
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert (data.test_images[:, 0, 0, 0].tolist(), data.test_labels.tolist()) == ([3, 7, 11], [0, 1, 2])
    assert data.classes == ("A/c1", "A/c2", "B/c1")
    for drawers in (0, 4):
        with pytest.raises(ValueError, match=f"train_drawers must be between 1 and 3, got {drawers}"):
            split_drawers(Characters(images, ("A",) * 3, ("c",) * 3), drawers)


@given(st.integers(1, 13), st.integers(1, 4))
def test_the_average_over_areas_by_a_finer_grid(size, repeat):
    images = np.random.default_rng(size).uniform(size=(repeat, 13, 13))
    fine = images.repeat(size, axis=1).repeat(size, axis=2)  # 13 size pixels: both grids divide it
    expected = fine.reshape(repeat, size, 13, size, 13).mean(axis=(2, 4))
    np.testing.assert_allclose(area_average(images, size), expected, atol=1e-6)  # float32
    np.testing.assert_allclose(area_average(images > 0.5, size).mean(), (images > 0.5).mean(), atol=1e-6)


@pytest.mark.parametrize("size", [0, 14])
def test_an_average_does_not_enlarge(size):
    with pytest.raises(ValueError, match=f"size must be between 1 and 13, got {size}"):
        area_average(np.zeros((13, 20)), size)


def made_up_cifar10():
    rng = np.random.default_rng(0)
    members = {
        name: {b"data": rng.integers(0, 256, size=(4, 3072), dtype=np.uint8), b"labels": rng.integers(0, 2, 4).tolist()}
        for name in ("data_batch_1", "data_batch_2", "test_batch")
    }
    return members | {"batches.meta": {b"label_names": [b"cat", b"dog"]}}


@pytest.mark.parametrize("archived", [False, True])
def test_cifar10_is_read_from_its_members_or_its_archive(folder, monkeypatch, archived):
    members = made_up_cifar10()
    content = {name: pickle.dumps(value) for name, value in members.items()}
    monkeypatch.setattr(module, "CIFAR10_MEMBERS", {})
    monkeypatch.setattr(module, "CIFAR10_ARCHIVE", CIFAR10_ARCHIVE._replace(url=None))
    if archived:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w:gz") as archive:
            for name, value in content.items():
                info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                info.size = len(value)
                archive.addfile(info, io.BytesIO(value))
        monkeypatch.setattr(module, "CIFAR10_ARCHIVE", put(folder, "cifar10/archive.tar.gz", stream.getvalue()))
    else:
        files = {name: put(folder, f"cifar10/{name}", value) for name, value in content.items()}
        monkeypatch.setattr(module, "CIFAR10_MEMBERS", files)
    data = cifar10(batches=(2, 1))
    assert data.train_images.shape == (8, 32, 32, 3)
    pixel = members["data_batch_2"][b"data"][3].reshape(3, 32, 32)[:, 5, 9]
    np.testing.assert_array_equal(data.train_images[3, 5, 9], pixel)
    assert data.train_labels.tolist() == members["data_batch_2"][b"labels"] + members["data_batch_1"][b"labels"]
    assert data.classes == ("cat", "dog")
    with pytest.raises(CorruptData if archived else DataNotFound):
        cifar10(batches=(3,))


@pytest.mark.parametrize("batches", [(), (0,), (1, 6)])
def test_batches_are_one_to_five(batches):
    with pytest.raises(ValueError, match="batches must be some of 1 to 5"):
        cifar10(batches)


def test_a_damaged_subset_is_refused(folder, monkeypatch):
    stream = io.BytesIO()
    np.savez(stream, x_train=np.zeros((1, 32, 32, 3), np.uint8))
    for content, message in ((stream.getvalue(), "has no array 'x_test'"), (b"no archive", "is no archive of arrays")):
        monkeypatch.setattr(module, "CIFAR100_SUBSET", put(folder, "cifar100/subset.npz", content))
        with pytest.raises(CorruptData, match=message):
            cifar100_subset()


def test_missing_files_say_so(folder, monkeypatch):
    monkeypatch.setattr(module, "CIFAR100_SUBSET", CIFAR100_SUBSET._replace(url=None))
    with pytest.raises(DataNotFound, match=r"cifar100_subset\.npz"):
        cifar100_subset()
