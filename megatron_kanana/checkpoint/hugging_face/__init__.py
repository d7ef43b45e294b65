"""Conversion between Hugging Face's `deepseek_v3` checkpoints and this project's.

Weights are streamed tensor by tensor; nothing here builds a model or imports megatron-core.
"""
