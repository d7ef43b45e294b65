"""megatron_kanana: training Kakao's Kanana-2 models on megatron-core."""

__version__ = "0.1.0"
