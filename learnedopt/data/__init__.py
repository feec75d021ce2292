"""Images and text as tensors; what is here without arguments needs no download."""

from learnedopt.data.fonts import glyphs, scripts
from learnedopt.data.images import (
    ImageData,
    cifar10,
    digits,
    fashion_mnist,
    image_folder,
    label_subset,
    mnist,
    split_by_class,
)
from learnedopt.data.pictures import photographs, textures
from learnedopt.data.text import TextData, python_docs, text_file

__all__ = [
    "ImageData",
    "TextData",
    "cifar10",
    "digits",
    "fashion_mnist",
    "glyphs",
    "image_folder",
    "label_subset",
    "mnist",
    "photographs",
    "python_docs",
    "scripts",
    "split_by_class",
    "text_file",
    "textures",
]
