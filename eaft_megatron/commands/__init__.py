"""The verbs of ``eaft-megatron``: one module each, with ``add_arguments(parser)`` and ``run(args) -> int``.

A verb's module is imported only when that verb is asked for, so that ``--help`` is instant and a verb needs only the
extras it uses.
"""
