"""Exports as Megatron-LM's package of this name does."""

from .training import get_args, pretrain

__all__ = ["get_args", "pretrain"]
