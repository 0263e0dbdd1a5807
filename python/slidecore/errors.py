"""The exceptions that slidecore raises, besides those of the native core (`slidecore._core.Error` and below)."""

from __future__ import annotations


class SlidecoreError(Exception):
    """Base of the Python layer's errors."""


class ModelError(SlidecoreError, ValueError):
    """The model (or its files) cannot be offloaded as it is; nothing was changed."""


class BudgetError(SlidecoreError, ValueError):
    """A memory budget is too small; the message says the smallest that works."""


class UsageError(SlidecoreError, RuntimeError):
    """A call that this mode cannot honour; the message says what to write instead."""
