"""The errors that a caller can act on; everything else that is wrong with an input is a `ValueError`."""


class SpecDecodeError(Exception):
    """Base of the package's own errors. Its text is one sentence: what is wrong, and the way out."""


class UnsupportedModelError(SpecDecodeError):
    """The architecture cannot be decoded exactly by this package; the sentence gives the reason."""


class TokenizerMismatchError(SpecDecodeError):
    """The draft cannot speak to the target: their vocabularies differ, or there is no text between them either; the
    sentence names the first difference, or what is lost."""


class ModelFileError(SpecDecodeError):
    """A model's files are missing, damaged or cannot be fetched or stored."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error of a library says, for a sentence of ours; its name if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
