"""Images and text as tensors; what is here without arguments needs no download."""

from learnedopt.data.images import ImageData, digits, mnist
from learnedopt.data.text import TextData, python_docs, text_file

__all__ = ["ImageData", "TextData", "digits", "mnist", "python_docs", "text_file"]
