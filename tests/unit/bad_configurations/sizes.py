"""Sizes, layouts, schedules and optimizers that do not fit one another."""

from __future__ import annotations

from .case import Bad, world

SIZES = {
    "unknown setting": Bad(
        ("schedule.stepz=10",), "schedule.stepz", "10", "did you mean schedule.steps?"
    ),
    "setting of another group": Bad(
        ("model.learning_rate=1",), "model.learning_rate", "1", "the settings of model are:"
    ),
    "unknown config of a group": Bad(("model=gpt",), "model", "gpt", "or kanana_2_tiny"),
    "text for a number": Bad(
        ("schedule.steps=many",), "schedule.steps", "many", "give a whole number"
    ),
    "fraction for a whole number": Bad(
        ("schedule.steps=1.5",), "schedule.steps", "1.5", "give a whole number"
    ),
    "value for a group": Bad(("+model.kv_lora_rank.x=3",), "model.kv_lora_rank", "3", "give"),
    "parts to compute again that are not": Bad(
        ("parallel.recompute_parts=[norms]",),
        "parallel.recompute_parts",
        "['norms']",
        "set parallel.recompute=selective",
    ),
    "nothing to compute again": Bad(
        ("parallel.recompute=selective",),
        "parallel.recompute_parts",
        "[]",
        "name some of norms, up_projections",
    ),
    "negative learning rate": Bad(
        ("optimizer.learning_rate=-1",), "optimizer.learning_rate", "-1.0", "choose above 0"
    ),
    "not a number": Bad(
        ("optimizer.learning_rate=nan",), "optimizer.learning_rate", "nan", "choose above 0"
    ),
    "batch size changes out of order": Bad(
        (
            "schedule.batch_size_changes=[{tokens:2e6,global_batch_size:32},"
            "{tokens:1e6,global_batch_size:64}]",
        ),
        "schedule.batch_size_changes[1].tokens",
        "1000000.0",
        "by growing tokens",
    ),
    "later batch that cannot be dealt out": Bad(
        ("schedule.batch_size_changes=[{tokens:2e6,global_batch_size:28}]",),
        "schedule.batch_size_changes[0].global_batch_size",
        "28",
        "choose a multiple of 16",
        world(2),
    ),
    "base width without whole heads": Bad(
        ("transfer.base_hidden_size=80",),
        "transfer.base_hidden_size",
        "80",
        "choose a multiple of 32",
    ),
    "odd rotary width": Bad(
        ("model.qk_rope_head_dim=15",), "model.qk_rope_head_dim", "15", "choose an even width"
    ),
    "more dense layers than layers": Bad(
        ("model.num_dense_layers=5",), "model.num_dense_layers", "5", "choose at most 4"
    ),
    "more experts a token than experts": Bad(
        ("model.num_experts_per_token=17",),
        "model.num_experts_per_token",
        "17",
        "choose at most 16",
    ),
    "experts that their groups do not divide": Bad(
        ("model.num_expert_groups=3",), "model.num_expert_groups", "3", "choose one of 1, 2, 4"
    ),
    "more chosen groups than groups": Bad(
        ("model.num_expert_groups=2", "model.num_expert_groups_per_token=3"),
        "model.num_expert_groups_per_token",
        "3",
        "choose at most 2",
    ),
    "groups judged by other than two experts": Bad(
        ("model.num_expert_groups=4", "model.num_expert_groups_per_token=1"),
        "model.num_expert_groups_per_token",
        "1",
        "choose 2, or model.num_expert_groups=1",
    ),
    "heads that TP does not divide": Bad(
        ("parallel.tensor_parallel_size=3",),
        "parallel.tensor_parallel_size",
        "3",
        "choose one of 1, 2, 4",
        world(3),
    ),
    "experts that EP does not divide": Bad(
        ("parallel.expert_parallel_size=3",),
        "parallel.expert_parallel_size",
        "3",
        "choose one of 1, 2, 4, 8, 16",
        world(3),
    ),
    "expert width that expert-TP does not divide": Bad(
        ("parallel.expert_tensor_parallel_size=3",),
        "parallel.expert_tensor_parallel_size",
        "3",
        "choose one of 1, 2, 4, 8, 16, 32, 64",
        world(3),
    ),
    "more tokens ahead than a sequence has": Bad(
        ("model.num_mtp_layers=2", "data.sequence_length=2"),
        "model.num_mtp_layers",
        "2",
        "choose fewer layers",
    ),
    "sequence that TP does not divide": Bad(
        ("parallel.tensor_parallel_size=4", "data.sequence_length=126"),
        "parallel.tensor_parallel_size",
        "4",
        "choose one of 1, 2, 3, 6",
        world(4),
    ),
    "sequence that cannot be cut in two pieces for each process of CP": Bad(
        ("parallel.context_parallel_size=2", "data.sequence_length=126"),
        "parallel.context_parallel_size",
        "2",
        "choose a length that is a multiple of 4",
        world(2),
    ),
    "heads that TP x CP does not divide": Bad(
        (
            "parallel.context_parallel_size=4",
            "parallel.tensor_parallel_size=2",
            "data.sequence_length=128",
        ),
        "parallel.context_parallel_size",
        "4",
        "choose one of 1, 2",
        world(8),
    ),
    "CP with two layers of multi-token prediction": Bad(
        ("parallel.context_parallel_size=2", "model.num_mtp_layers=2"),
        "parallel.context_parallel_size",
        "2",
        "model.num_mtp_layers to 0 or 1",
        world(2),
    ),
    "processes that TP x CP x PP does not divide": Bad(
        ("parallel.context_parallel_size=2",),
        "parallel.tensor_parallel_size x parallel.context_parallel_size"
        " x parallel.pipeline_parallel_size",
        "2",
        "start a multiple of 2 processes",
        world(3),
    ),
    "layers that PP does not divide": Bad(
        ("parallel.pipeline_parallel_size=3",),
        "parallel.pipeline_parallel_size x parallel.virtual_pipeline_stages",
        "3",
        "choose a product among 1, 2, 4",
        world(3),
    ),
    "stages do not divide layers, embedding and output layer": Bad(
        ("parallel.pipeline_parallel_size=4", "parallel.embeddings_count_as_layers=true"),
        "parallel.pipeline_parallel_size x parallel.virtual_pipeline_stages",
        "4",
        "1, 2, 3, 6, or parallel.embeddings_count_as_layers=false",
        world(4),
    ),
    "stages without a transformer layer": Bad(
        ("parallel.pipeline_parallel_size=6", "parallel.embeddings_count_as_layers=true"),
        "parallel.pipeline_parallel_size x parallel.virtual_pipeline_stages",
        "6",
        "choose a product among 1, 2, 3, 6 below 6",
        world(6),
    ),
    "embeddings counted as layers without a pipeline": Bad(
        ("parallel.embeddings_count_as_layers=true",),
        "parallel.embeddings_count_as_layers",
        "True",
        "set it to false",
    ),
    "virtual stages without a pipeline": Bad(
        ("parallel.virtual_pipeline_stages=2",),
        "parallel.virtual_pipeline_stages",
        "2",
        "set it to 1",
    ),
    "expert-TP beyond TP": Bad(
        ("parallel.tensor_parallel_size=2", "parallel.expert_tensor_parallel_size=4"),
        "parallel.expert_tensor_parallel_size",
        "4",
        "choose at most 2",
        world(4),
    ),
    "TP x PP against the world": Bad(
        ("parallel=tensor_pipeline",),
        "parallel.tensor_parallel_size x parallel.context_parallel_size"
        " x parallel.pipeline_parallel_size",
        "4",
        "start a multiple of 4 processes",
        world(2),
    ),
    "EP x PP against the world": Bad(
        ("parallel=expert_parallel",),
        "parallel.expert_tensor_parallel_size x parallel.expert_parallel_size"
        " x parallel.pipeline_parallel_size",
        "2",
        "start a multiple of 2 processes",
        world(1),
    ),
    "batch that DP does not divide": Bad(
        ("schedule.global_batch_size=12",),
        "schedule.global_batch_size",
        "12",
        "choose a multiple of 16",
        world(2),
    ),
    "microbatches against interleaved stages": Bad(
        (
            "parallel.pipeline_parallel_size=2",
            "parallel.virtual_pipeline_stages=2",
            "schedule.global_batch_size=24",
        ),
        "schedule.global_batch_size",
        "24",
        "choose a multiple of 16",
        world(2),
    ),
    "warm-up as long as the run": Bad(
        ("schedule.warmup_steps=120",), "schedule.warmup_steps", "120", "choose at most 119"
    ),
    "warm-up and decay longer than the run": Bad(
        ("schedule.decay_steps=111",),
        "schedule.warmup_steps + schedule.decay_steps",
        "121",
        "train longer",
    ),
    "floor of the rate above its peak": Bad(
        ("schedule.minimum_learning_rate=1",),
        "schedule.minimum_learning_rate",
        "1.0",
        "choose a smaller one",
    ),
    "vocabulary too large for the built-in text": Bad(
        ("model.vocab_size=128256",), "model.vocab_size", "128256", "name a tokenizer"
    ),
    "more ids than rows of the embedding": Bad(
        ("data.tokenizer={tmp}/published", "model.vocab_size=400"),
        "model.vocab_size",
        "400",
        "set model.vocab_size=500",
    ),
    "weights with two optimizers": Bad(
        ("optimizer=muon", "optimizer.muon_kinds=[router]", "optimizer.adamw_kinds=[router]"),
        "optimizer.muon_kinds",
        "router",
        "leave it in one of them",
    ),
    "unknown kind of weights": Bad(
        ("optimizer=muon", "optimizer.adamw_kinds=[heads]"),
        "optimizer.adamw_kinds[0]",
        "heads",
        "or key_value_up or",
    ),
    "heads apart in what AdamW updates": Bad(
        ("optimizer=muon", "optimizer.per_head=[key]", "optimizer.adamw_kinds=[key_value_up]"),
        "optimizer.per_head",
        "key",
        "leave it out of one of them",
    ),
    "heads apart without Muon": Bad(
        ("optimizer.per_head=[query]",), "optimizer.per_head", "query", "set optimizer=muon"
    ),
    "no orthogonalisation": Bad(
        ("optimizer=muon", "optimizer.orthogonalization_steps=0"),
        "optimizer.orthogonalization_steps",
        "0",
        "choose at least 1",
    ),
    "threshold of zero": Bad(
        ("optimizer.qk_clip_threshold=0",), "optimizer.qk_clip_threshold", "0.0", "choose above 0"
    ),
    "context beyond YaRN's": Bad(
        ("model.yarn_factor=2", "model.yarn_original_context=32"),
        "model.yarn_factor",
        "2.0",
        "choose a larger factor, or shorter sequences",
    ),
    "checkpoint of another model": Bad(
        ("checkpoint.load={tmp}/step_00000007", "model.num_experts=8"),
        "model.num_experts",
        "8",
        "take those values",
    ),
    "checkpoint from before multi-token prediction": Bad(
        ("checkpoint.load={tmp}/step_00000006", "model.num_mtp_layers=1"),
        "model.num_mtp_layers",
        "1",
        "take those values",
    ),
    "checkpoint with multi-token prediction": Bad(
        ("checkpoint.load={tmp}/step_00000008",),
        "model.num_mtp_layers",
        "0",
        "to-megatron --mtp drop",
    ),
}
