"""What all processors of cached references have in common."""

from ....runtime.checks import fail
from ....source import Source


class ReadsReferences:
    """A processor whose queries may also read references: those of the model's cache, or a bank's."""

    reference: Source | None = None
    """a bank's keys and values of this layer; None: those of the model's cache"""
    keeps_unrotated = False
    """whether keys go to the model's cache as they are before RoPE, for a bank that is placed later"""

    def refuse_cache(self, mode: str | None) -> None:
        """NotImplementedError for a pass that fills or reads the model's cache while a bank is read."""
        if mode is not None:
            hint = "call the pipeline without reference images, or remove() the bank"
            fail(
                "use_cached_references", "kv_cache_mode", "None while a bank is read", repr(mode), hint,
                NotImplementedError,
            )  # fmt: skip
