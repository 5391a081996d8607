"""A model that begins with the weights of another one: what fits is loaded, and what does not is named."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ..errors import UserError, cut, quote
from .predictors import ClassRows, Predictors, corresponding, with_rows
from .pretrained import Weights, unwrapped
from .weights import load_fitting, load_weights


class Loading(NamedTuple):
    """How weights are loaded.

    Args:
        class_names: of the model; []: not known.
        trained: whether they must fill the whole model: it is to predict.
        strict: whether anything that differs but rows of classes and a mask branch is refused.
    """

    class_names: Sequence[str]
    trained: bool = False
    strict: bool = True


def initialize_detector(model: nn.Module, weights: Weights, loading: Loading) -> str:
    """Load weights of a detector, or of a classifier, whose last layers are left out.

    Args:
        model: with `backbone.classifier_part`, which takes weights of a classifier.

    Returns:
        What was loaded and what was not, in one line.

    Raises:
        UserError: they do not fit; the model is left as it was.
    """
    found = unwrapped(weights.state_dict, model.state_dict())
    if loading.trained or any(key.startswith("backbone.") for key in found):
        return load_pretrained(model, model.predictors(), weights, loading, optional=model.optional)  # type: ignore
    part: nn.Module = model.get_submodule("backbone").classifier_part  # type: ignore[assignment]
    found = unwrapped(weights.state_dict, part.state_dict())
    blocks = {key.partition(".")[0] for key in part.state_dict()}
    found = {key: value for key, value in found.items() if key.partition(".")[0] in blocks}
    return load_pretrained(part, {}, weights._replace(state_dict=found), loading)


def load_pretrained(
    model: nn.Module, predictors: Predictors, weights: Weights, loading: Loading, *, optional: Iterable[str] = ()
) -> str:
    """Load what fits into `model`: of its `predictors` the rows of the classes that both have.

    Args:
        optional: modules that either may lack.

    Returns, Raises:
        As `initialize_detector`.
    """
    own, source = model.state_dict(), weights.source
    state = unwrapped(weights.state_dict, own)
    fresh: set[str] = set()  # keys of `own`
    anew, left_out = [], []  # what is told of them, and of keys of `state`
    for layer, rows in predictors.items():
        if text := _take_rows(layer, rows, state, own, weights.class_names, loading):
            fresh |= {key for key in own if key.startswith(f"{layer}.")}
            anew.append(text)
    if anew and loading.trained:
        raise UserError(
            f"{source}: weights do not fit the model: they are of the classes {quote(weights.class_names)}, it has "
            f"{quote(list(loading.class_names))}; set MODEL.CLASS_NAMES to those of the weights, or DATASETS.RENAME"
        )
    for part in () if loading.trained else optional:
        theirs, ours = ([key for key in keys if key.startswith(f"{part}.")] for keys in (state, own))
        if ours and not theirs:
            state |= {key: own[key] for key in ours}
            fresh |= {*ours}
            anew.append(part)
        elif theirs and not ours:
            state = {key: value for key, value in state.items() if key not in theirs}
            left_out.append(part)
    if loading.strict or loading.trained:
        remedy = "" if loading.trained else "; MODEL.WEIGHTS_STRICT False initializes anew what does not fit"
        load_weights(model, state, source, remedy)
    else:
        missing, unknown = load_fitting(model, state, source)
        fresh |= {*missing}
        anew, left_out = anew + missing, left_out + unknown
    told = f"{source}: {len(own) - len(fresh)} of {len(own)} entries loaded"
    told += f"; initialized anew: {cut(', '.join(anew), 600)}" if anew else ""
    return told + (f"; left out: {cut(', '.join(left_out), 300)}" if left_out else "")


def _take_rows(
    layer: str, rows: ClassRows, state: dict[str, Tensor], own: Mapping[str, Tensor], names: list[str], loading: Loading
) -> str:
    """Put into `state` what the model is to have in this layer; what is not theirs in it, as text."""
    keys = [key for key in (f"{layer}.weight", f"{layer}.bias") if key in state and key in own]
    theirs, ours = ([rows.num_classes(values[key]) for key in keys] for values in (state, own))
    fits = all(state[key].shape[1:] == own[key].shape[1:] for key in keys)
    if not keys or not fits or theirs[0] <= 0 or len({*theirs}) > 1:
        return ""  # which is refused when it is loaded
    if loading.trained and not (names and loading.class_names):
        return ""
    which = corresponding(names, list(loading.class_names), theirs[0], ours[0])
    if which != list(range(theirs[0])):
        state |= {key: with_rows(rows, own[key], state[key], which) for key in keys}
    if (kept := len(which) - which.count(None)) == len(which):
        return ""
    some = f", {kept} of them by name" if kept else ""
    kinds = ",".join(key.rpartition(".")[2] for key in keys)
    return f"{layer}.{{{kinds}}}: {theirs[0]} → {ours[0]} classes{some}"
