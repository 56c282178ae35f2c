"""The errors that a caller can act on. Wrong arguments raise a `ValueError`."""


class SpecDecodeError(Exception):
    """Base class of the package's own errors. The message is one sentence: the problem, and a way to solve it."""


class UnsupportedModelError(SpecDecodeError):
    """This package cannot decode the architecture exactly. The message gives the reason."""


class TokenizerMismatchError(SpecDecodeError):
    """The draft cannot propose tokens for the target.

    Their vocabularies differ, or text cannot be translated between them. The message names the first token that
    differs, or the text that is lost.
    """


class ModelFileError(SpecDecodeError):
    """A model's files are missing or damaged, or cannot be fetched or stored."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, to quote it in another message; its class name if it is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


NO_GPU_MEMORY = "the GPU's memory is too small: take a smaller model, or --device cpu"
"""What a command says if the models do not fit."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error is PyTorch's for a full GPU. PyTorch is not imported here, as that takes seconds."""
    return type(error).__name__ == "OutOfMemoryError"
