"""Every option, declared once: key, default, choices or range, and comment."""

from ..option import Section, nearest_to
from . import data, evaluation, model, norm, training  # noqa: F401  # each declares its sections

SECTIONS, OPTIONS = Section.sections, Section.options
RENAMED = {option.renamed_from: key for key, option in OPTIONS.items() if option.renamed_from}


def nearest_key(name: str) -> str:
    """The key of the option whose key, or old key, is spelled most like `name`."""
    nearest = nearest_to(name, [*OPTIONS, *RENAMED])
    return RENAMED.get(nearest, nearest)
