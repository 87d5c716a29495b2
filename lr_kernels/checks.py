"""Error messages of one form: ``lr_kernels.<op>: <argument>: expected …, got …; <hint>``."""

from typing import NoReturn


def fail(
    op: str, argument: str, expected: str, got: object, hint: str = "", error: type[Exception] = ValueError
) -> NoReturn:
    """Raise `error` with the library's one message form."""
    raise error(f"lr_kernels.{op}: {argument}: expected {expected}, got {got}" + (f"; {hint}" if hint else ""))
