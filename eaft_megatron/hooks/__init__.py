"""The seam to Megatron: flags, the loss hook, metrics. No mathematics here.

Importing this package needs torch alone; :func:`install` imports megatron-core.
"""

from eaft_megatron.hooks.arguments import add_eaft_arguments, settings_from_args
from eaft_megatron.hooks.loss_hook import LossHook, install, installed, uninstall
from eaft_megatron.hooks.megatron_lm import attach, rebind_megatron
from eaft_megatron.hooks.metrics import wrap_forward_step
from eaft_megatron.hooks.settings import LossSettings

__all__ = [
    "LossHook",
    "LossSettings",
    "add_eaft_arguments",
    "attach",
    "install",
    "installed",
    "rebind_megatron",
    "settings_from_args",
    "uninstall",
    "wrap_forward_step",
]
