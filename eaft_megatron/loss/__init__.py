"""The losses: torch only, no Megatron, no configuration, no global state."""
