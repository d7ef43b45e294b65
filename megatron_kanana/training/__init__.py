"""The training loop and what it measures. Import only after `device.prepare_device`."""
