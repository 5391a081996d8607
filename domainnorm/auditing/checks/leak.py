"""Predictions of training mode that depend on which other samples share the normalization batch."""

from __future__ import annotations

from ..finding import Finding
from ..seen import Seen


def check(seen: Seen) -> list[Finding]:
    """What mixed batches have shown, if they were asked for."""
    return []
