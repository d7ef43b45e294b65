"""Runs on several GPUs of one host: layouts compared, speed, a training (docs/multi_gpu.md)."""
