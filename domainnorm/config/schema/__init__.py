"""Every option, declared once: key, default, choices or range, and comment."""

from ..option import Section, nearest_to
from . import data, evaluation, model, norm, training  # noqa: F401  # each declares its sections

SECTIONS = dict(sorted(Section.sections.items()))
OPTIONS = dict(sorted(Section.options.items(), key=lambda item: item[0].rpartition(".")[0]))  # within one as declared
RENAMED = {option.renamed_from: key for key, option in OPTIONS.items() if option.renamed_from}


def nearest_key(name: str) -> str:
    """The key of the option whose key, or old key, is spelled most like `name`; of a section's, if it is one."""
    keys = [*OPTIONS, *RENAMED]
    nearest = nearest_to(name, [key for key in keys if key.startswith(f"{name}.")] or keys)
    return RENAMED.get(nearest, nearest)
