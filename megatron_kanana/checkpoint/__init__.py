"""Saving and loading through megatron-core's dist_checkpointing."""
