"""The two passes over the logits, and the merge between them, as Triton kernels. Importing this imports no Triton.

The kernels communicate with nobody and look at no value on the host: :mod:`eaft_megatron.loss.triton_impl` calls them.
"""
