"""Images of Matryoshka's experiment: where they come from, and how they are changed at random, on the device.

A part of `matryoshka`. The source "arrays" is a folder below the data folder that holds `train_images.npy`, uint8 of
shape (images, side, side, 3), `train_labels.npy` (images,), `test_images.npy` and `test_labels.npy`: ImageNet, resized
beforehand to 256 x 256 RGB. The files are mapped into memory, not read, and the images taken as they are. They should
be the middle square of each picture, as long as its shorter side: the middle 224/256 of it, on which is tested, is then
what the authors' loader shows. The random crops of the training come from that square, too, the authors' from anywhere
in the picture.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from jaxpapers.data.download import CorruptData, DataNotFound, data_folder
from jaxpapers.data.images import ImageData, fashion_mnist, omniglot, split_drawers
from jaxpapers.data.windows import host_batches

SOURCES = ("omniglot", "fashion_mnist", "arrays", "generated")
AUGMENTATIONS = ("affine", "mirror", "crop")
# Of the random affine maps: radians, shares, pixels.
ANGLE, SCALE, SHEAR, SHIFT = 0.2, (0.85, 1.15), 0.2, 2.5
# Of random crops: share of the area, height over width.
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
# ImageNet's pixels, of 0 to 1.
CHANNEL_MEAN, CHANNEL_DEVIATION = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


class Shape(NamedTuple):
    """What is known of a set of images without its files.

    Attributes:
      train: number of training images.
      test: number of test images.
      image: (height, width, channels).
      classes: number of classes.
    """

    train: int
    test: int
    image: tuple[int, int, int]
    classes: int


def shape_of(recipe: ConfigDict) -> Shape:
    """Counts of a source."""
    match recipe.source:
        case "omniglot":
            return Shape(3_630, 1_210, (28, 28, 1), 242)
        case "fashion_mnist":
            return Shape(60_000, 10_000, (28, 28, 1), 10)
        case "arrays":
            return Shape(recipe.train_images, recipe.test_images, (recipe.side, recipe.side, 3), recipe.classes)
        case _:
            per_class = recipe.train_per_class, recipe.test_per_class
            train, test = (count * recipe.classes for count in per_class)
            return Shape(train, test, (recipe.side, recipe.side, 1), recipe.classes)


def load_images(recipe: ConfigDict, seed: int) -> ImageData:
    """The images of a source.

    Raises:
      DataNotFound: a file is missing and cannot be downloaded.
      CorruptData: a file is no whole array.
      ValueError: arrays are not what the config says.
    """
    match recipe.source:
        case "omniglot":
            return split_drawers(omniglot())
        case "fashion_mnist":
            return fashion_mnist()
        case "arrays":
            return _arrays(recipe)
        case _:
            return _generated(recipe, seed)


def _arrays(recipe: ConfigDict) -> ImageData:
    folder, shape = data_folder() / recipe.folder, shape_of(recipe)
    parts: list[np.ndarray] = []
    for part, count in (("train", shape.train), ("test", shape.test)):
        images, labels = (_mapped(folder / f"{part}_{what}.npy") for what in ("images", "labels"))
        expected = (np.dtype(np.uint8), (count, *shape.image))
        if (images.dtype, images.shape) != expected:
            raise ValueError(
                f"{folder}/{part}_images.npy is {images.dtype} of shape {images.shape}, "
                f"the config says {expected[0]} of shape {expected[1]}"
            )
        if labels.dtype.kind not in "iu" or labels.shape != (count,):
            raise ValueError(
                f"{folder}/{part}_labels.npy is {labels.dtype} of shape {labels.shape}; "
                f"{count} images need as many whole numbers"
            )
        if labels.min() < 0 or labels.max() >= shape.classes:
            raise ValueError(
                f"{folder}/{part}_labels.npy has labels {labels.min()} to {labels.max()}, "
                f"the config says 0 to {shape.classes - 1}"
            )
        parts += [images, labels.astype(np.int32)]
    return ImageData(*parts, classes=tuple(map(str, range(recipe.classes))))


def _mapped(path: Path) -> np.ndarray:
    if not path.is_file():
        raise DataNotFound(
            f"{path} is missing. No reader here downloads it: make the folder's train_images.npy and test_images.npy "
            "(images, side, side, 3) uint8, train_labels.npy and test_labels.npy from the official archives"
        )
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise CorruptData(f"{path} is no whole .npy file ({path.stat().st_size} bytes): {error}") from None


def _generated(recipe: ConfigDict, seed: int) -> ImageData:
    """Blurred noise, one pattern a class, shifted by up to two pixels, with noise of its own in every image."""
    rng, side = np.random.default_rng(seed), recipe.side
    spectrum = np.fft.rfft2(rng.normal(size=(recipe.classes, side, side)))
    rows, columns = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)
    patterns = np.fft.irfft2(spectrum * np.exp(-60 * (rows**2 + columns**2)), s=(side, side))
    patterns /= patterns.std(axis=(1, 2), keepdims=True)
    parts: list[np.ndarray] = []
    for per_class in (recipe.train_per_class, recipe.test_per_class):
        labels = np.repeat(np.arange(recipe.classes, dtype=np.int32), per_class)
        shifts = rng.integers(-2, 3, size=(len(labels), 2))
        images = np.stack([np.roll(patterns[c], shift, (0, 1)) for c, shift in zip(labels, shifts, strict=True)])
        images = 128 + 50 * (images + 0.3 * rng.normal(size=images.shape))
        parts += [np.clip(images, 0, 255).astype(np.uint8)[..., None], labels]
    return ImageData(*parts, classes=tuple(f"{index % 2}/{index}" for index in range(recipe.classes)))


def epoch_rows(count: int, batch_size: int, num_steps: int, seed: int) -> np.ndarray:
    """(num_steps, batch_size) rows of the training images: epoch after epoch, each in an order of its own."""
    batches = host_batches(np.arange(count, dtype=np.int32), batch_size, seed)
    return np.stack([batches[step] for step in range(num_steps)])


def random_affine(key: Array, images: Array) -> Array:
    """Images (batch, height, width, channels) turned, scaled, sheared and shifted about their middle, 0 around them."""
    batch, height, width, channels = images.shape
    ends = jnp.array([(-ANGLE, ANGLE), SCALE, (-SHEAR, SHEAR), (-SHIFT, SHIFT), (-SHIFT, SHIFT)])
    draws = jax.random.uniform(key, (batch, 5), minval=ends[:, 0], maxval=ends[:, 1])
    angle, scale, shear, shifts = draws[:, 0], draws[:, 1], draws[:, 2], draws[:, 3:]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    # Rows of the map from the new image to the old one, shear first.
    inverse = jnp.stack([jnp.stack([cos, -sin + shear * cos], 1), jnp.stack([sin, cos + shear * sin], 1)], 1)
    grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), axis=-1).reshape(-1, 2)
    middle = jnp.array([height - 1, width - 1]) / 2
    places = jnp.einsum("bij,bpj->bpi", inverse / scale[:, None, None], grid - middle - shifts[:, None]) + middle
    return jax.vmap(_bilinear)(images, places).reshape(batch, height, width, channels)


def _bilinear(image: Array, places: Array) -> Array:
    """Values of an image (height, width, channels) at places (points, 2), 0 outside of it."""
    height, width, channels = image.shape
    padded = jnp.pad(image, ((1, 2), (1, 2), (0, 0))).reshape(-1, channels)
    places = jnp.clip(places, -1, jnp.array([height, width])) + 1
    corner = jnp.floor(places)
    part = places - corner
    row, column = corner.astype(jnp.int32).T
    first = row * (width + 3) + column
    total = jnp.zeros((len(places), channels), image.dtype)
    for down in (0, 1):
        for right in (0, 1):
            weight = jnp.where(down, part[:, 0], 1 - part[:, 0]) * jnp.where(right, part[:, 1], 1 - part[:, 1])
            total += weight[:, None] * padded[first + down * (width + 3) + right]
    return total


def random_mirror(key: Array, images: Array) -> Array:
    """Half of the images mirrored, left to right."""
    mirrored = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def random_resized_crop(key: Array, images: Array, side: int) -> Array:
    """A random rectangle of every image, resized to (side, side), and half of them mirrored.

    A rectangle that does not fit is cut down to the image (PyTorch draws another).
    """
    height, width, channels = images.shape[1:]

    def crop(key: Array, image: Array) -> Array:
        ends = jnp.array([AREA, np.log(ASPECT), (0, 1), (0, 1)])
        share, log_aspect, *corner = jax.random.uniform(key, (4,), minval=ends[:, 0], maxval=ends[:, 1])
        pixels, aspect = height * width * share, jnp.exp(log_aspect)
        size = jnp.minimum(jnp.sqrt(jnp.stack([pixels * aspect, pixels / aspect])), jnp.array([height, width]))
        start = jnp.stack(corner) * (jnp.array([height, width]) - size)
        scale = side / size
        return jax.image.scale_and_translate(image, (side, side, channels), (0, 1), scale, -start * scale, "linear")

    crop_key, mirror_key = jax.random.split(key)
    return random_mirror(mirror_key, jax.vmap(crop)(jax.random.split(crop_key, len(images)), images))


def centre_crop(images: Array, ratio: float, side: int) -> Array:
    """The middle of every image, so much of its side, resized to (side, side)."""
    batch, height, _, channels = images.shape
    kept = round(ratio * height)
    start = (height - kept) // 2
    middle = images[:, start : start + kept, start : start + kept]
    return jax.image.resize(middle, (batch, side, side, channels), "linear")


def pixels(images: Array) -> Array:
    """Bytes as numbers from 0 to 1; coloured images standardised channel by channel."""
    values = images.astype(jnp.float32) / 255
    return (values - CHANNEL_MEAN) / CHANNEL_DEVIATION if images.shape[-1] == 3 else values


SMALL_AUGMENTATIONS: dict[str, Callable[[Array, Array], Array]] = {"affine": random_affine, "mirror": random_mirror}


def augment(recipe: ConfigDict, key: Array, images: Array, side: int = 0) -> Array:
    """The recipe's random change of images of numbers; crops have `side` pixels."""
    if recipe.augmentation == "crop":
        return random_resized_crop(key, images, side)
    return SMALL_AUGMENTATIONS[recipe.augmentation](key, images)


def superclasses(data: ImageData) -> np.ndarray | None:
    """Number of the alphabet of each class, where classes are named `alphabet/character`."""
    groups: list[Any] = [name.rpartition("/")[0] for name in data.classes]
    return np.unique(groups, return_inverse=True)[1] if all(groups) else None
