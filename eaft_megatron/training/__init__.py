"""Parts of ``eaft_megatron.train``: flags, setup, checkpoints, the loop. Clusters run Megatron-LM itself instead."""
