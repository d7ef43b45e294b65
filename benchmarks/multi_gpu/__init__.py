"""Runs on several GPUs of one host: layouts compared, speed, a training (docs/multi_gpu.md)."""

import time

BEGAN = time.monotonic()
"""When the process began, but for the interpreter: importing torch counts to a script's time."""
