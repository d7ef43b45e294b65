"""The Kanana-2 block on megatron-core. Import only after `device.prepare_device`."""
