"""The checks, one a file: each looks at what was seen and returns what it finds."""

from collections.abc import Callable

from ..finding import Finding
from ..seen import Seen
from . import batch_size, calls, consistency, domains, drift, frozen, leak, numerics, padding, training

Check = Callable[[Seen], list[Finding]]
CHECKS: dict[str, Check] = {
    "calls": calls.check,
    "domains": domains.check,
    "drift": drift.check,
    "consistency": consistency.check,
    "leak": leak.check,
    "batch_size": batch_size.check,
    "numerics": numerics.check,
    "frozen": frozen.check,
    "training": training.check,
    "padding": padding.check,
}
CHEAP = ("calls", "drift", "batch_size", "numerics", "frozen")  # for a training that goes on
