"""Every setting of the main job: its name, type, default, limits and meaning.

Each class is one Hydra group; `Settings` is the whole. Values come from `megatron_kanana/conf`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from .checkpoint_settings import CheckpointSettings
from .cluster_settings import ClusterSettings
from .data_settings import DataSettings
from .fields import setting
from .guard_settings import GuardSettings
from .precision_settings import DENSE_WEIGHTS, PrecisionSettings
from .watchdog_settings import WatchdogSettings

architecture = partial(setting, fixed_by_checkpoint=True)


@dataclass(kw_only=True)
class ModelSettings:
    """The network: multi-head latent attention (MLA) and fine-grained mixture of experts (MoE)."""

    name: str = setting(help="name of the model, for reports")
    num_layers: int = architecture(help="transformer layers", minimum=1)
    hidden_size: int = architecture(help="width of the residual stream", minimum=1)
    num_attention_heads: int = architecture(help="attention heads", minimum=1)
    vocab_size: int = architecture(help="tokenizer vocabulary", minimum=300)
    ffn_hidden_size: int = architecture(help="width of the dense layers' feed-forward", minimum=1)
    num_dense_layers: int = architecture(
        1, help="first layers that have a dense feed-forward, no experts", minimum=0
    )
    q_lora_rank: int | None = architecture(
        None, help="rank of the query down-projection; null projects queries directly", minimum=1
    )
    kv_lora_rank: int = architecture(help="width of the compressed key-value latent", minimum=1)
    qk_nope_head_dim: int = architecture(help="query-key width without position, a head", minimum=1)
    qk_rope_head_dim: int = architecture(
        help="query-key width with rotary position, a head", minimum=2
    )
    v_head_dim: int = architecture(help="value width, a head", minimum=1)
    num_experts: int = architecture(help="routed experts of a layer", minimum=1)
    num_experts_per_token: int = setting(help="routed experts each token visits", minimum=1)
    num_shared_experts: int = architecture(help="experts every token visits", minimum=0)
    moe_ffn_hidden_size: int = architecture(help="width of one expert", minimum=1)
    routed_scaling_factor: float = setting(
        help="factor on the routed experts' sum (DeepSeek-V3, section 2.1.2)", above=0.0
    )
    expert_bias_update_rate: float = setting(
        1e-3, help="step of the balancing bias (arXiv 2408.15664)", minimum=0.0
    )
    balance_loss_coefficient: float = setting(
        1e-4, help="weight of the sequence-level balance loss", minimum=0.0
    )
    z_loss_coefficient: float = setting(
        5e-6, help="weight of the router z-loss (arXiv 2202.08906)", minimum=0.0
    )
    num_expert_groups: int = setting(
        1, help="groups the experts are dealt into (DeepSeek-V3, section 2.1.2)", minimum=1
    )
    num_expert_groups_per_token: int = setting(
        1, help="best groups, from which alone a token's experts are chosen", minimum=1
    )
    rotary_base: float = setting(10000.0, help="rotary embedding base", above=0.0)
    yarn_factor: float = setting(
        1.0, help="times YaRN (arXiv 2309.00071) extends the context; 1 does not", minimum=1.0
    )
    yarn_original_context: int = setting(
        32768, help="positions the model was trained on before YaRN", minimum=1
    )
    yarn_beta_fast: float = setting(
        32.0, help="turns over the original context above which a channel keeps its frequency"
    )
    yarn_beta_slow: float = setting(
        1.0, help="turns over the original context below which a channel is slowed by the factor"
    )
    yarn_mscale: float = setting(
        1.0, help="YaRN's scale of the rotary part of the logits, over yarn_mscale_all_dim's"
    )
    yarn_mscale_all_dim: float = setting(
        1.0, help="YaRN's scale of all logits: (0.1 m ln(factor) + 1)^2", minimum=0.0
    )
    norm_epsilon: float = setting(1e-6, help="epsilon of RMSNorm", above=0.0)
    zero_centered_gamma: bool = architecture(
        False, help="store RMSNorm's gain as gain - 1, so that weight decay pulls it to 1"
    )
    num_mtp_layers: int = architecture(
        0, help="multi-token prediction layers, for training only (DeepSeek-V3, 2.2)", minimum=0
    )
    mtp_loss_coefficient: float = setting(
        0.1, help="weight of their mean loss (DeepSeek-V3, 4.2: 0.3, later 0.1)", minimum=0.0
    )
    init_std: float = setting(0.02, help="standard deviation of initial weights", above=0.0)
    vocab_size_multiple: int = architecture(
        128, help="embedding rows are padded to a multiple of this, whatever the layout", minimum=1
    )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the output layer."""
        return -(-self.vocab_size // self.vocab_size_multiple) * self.vocab_size_multiple

    @property
    def shared_expert_hidden_size(self) -> int:
        """Width of the shared experts taken together."""
        return self.num_shared_experts * self.moe_ffn_hidden_size


RECOMPUTE_PARTS = ("norms", "up_projections", "dense_feed_forward")
"""Parts of a layer that can be computed again by themselves."""


@dataclass(kw_only=True)
class ParallelSettings:
    """How the model is laid over processes. Data parallelism takes what is left of the world."""

    tensor_parallel_size: int = setting(
        1, help="processes one layer is split over; above 1, sequence parallelism is on", minimum=1
    )
    context_parallel_size: int = setting(
        1,
        help="processes one sequence is split over; for attention they take some heads each"
        " instead, by all-to-alls",
        minimum=1,
    )
    pipeline_parallel_size: int = setting(1, help="pipeline stages", minimum=1)
    virtual_pipeline_stages: int = setting(
        1, help="interleaved stages each pipeline rank holds", minimum=1
    )
    embeddings_count_as_layers: bool = setting(
        False,
        help="pipeline stages of equal size count the embedding as a layer of the first and the"
        " output layer as one of the last, which so get fewer transformer layers",
    )
    expert_parallel_size: int = setting(1, help="processes the experts are dealt over", minimum=1)
    expert_tensor_parallel_size: int = setting(
        1, help="processes one expert is split over", minimum=1
    )
    token_dispatcher: str = setting(
        "alltoall",
        help="how tokens reach their experts on other processes: by this project, or by DeepEP's"
        " kernels for CUDA where they are installed",
        choices=("alltoall", "deepep"),
    )
    overlap_gradient_reduction: bool = setting(
        False, help="reduce gradients while the backward pass goes on"
    )
    recompute: str = setting(
        "none",
        help="activations computed again in the backward pass: none, those of"
        " parallel.recompute_parts, or in full, all but each layer's input",
        choices=("none", "selective", "full"),
    )
    recompute_parts: list[str] = setting(
        [],
        help="of parallel.recompute=selective: norms before attention and feed-forward, which cost"
        " next to nothing; MLA's up-projections with queries, keys and values; dense feed-forwards",
        choices=RECOMPUTE_PARTS,
    )

    @property
    def model_parallel_size(self) -> int:
        """Processes that work on the same samples."""
        return self.tensor_parallel_size * self.context_parallel_size * self.pipeline_parallel_size

    @property
    def sequence_pieces(self) -> int:
        """Pieces that context parallelism cuts sequences into, over tensor parallelism as well."""
        if self.context_parallel_size == 1:
            return 1
        return 2 * self.context_parallel_size * self.tensor_parallel_size


PARAMETER_KINDS = (*DENSE_WEIGHTS, "router", "embedding", "output_layer")
"""Kinds of weights in the table of `optimizer/logical_matrices.py`."""


@dataclass(kw_only=True)
class OptimizerSettings:
    """AdamW, or Muon for matrices and AdamW for the rest; and QK-Clip."""

    name: str = setting("adamw", help="optimizer", choices=("adamw", "muon"))
    learning_rate: float = setting(help="peak learning rate", above=0.0)
    beta1: float = setting(0.9, help="decay of the first moment", minimum=0.0, maximum=0.9999)
    beta2: float = setting(0.95, help="decay of the second moment", minimum=0.0, maximum=0.99999)
    epsilon: float = setting(1e-8, help="added to the denominator", above=0.0)
    weight_decay: float = setting(0.1, help="decoupled weight decay of matrices", minimum=0.0)
    decay_norms: bool = setting(
        False, help="weight decay on the weights of norms too; see model.zero_centered_gamma"
    )
    gradient_clip_norm: float = setting(
        1.0, help="largest global gradient norm; 0 does not clip", minimum=0.0
    )
    momentum: float = setting(
        0.95, help="Muon: decay of the Nesterov momentum", minimum=0.0, maximum=0.9999
    )
    orthogonalization: str = setting(
        "polar_express",
        help="Muon: how the momentum is made orthogonal",
        choices=("newton_schulz", "polar_express"),
    )
    orthogonalization_steps: int = setting(5, help="Muon: iterations of it", minimum=1)
    update_scale: str = setting(
        "match_adamw",
        help="Muon: factor on the orthogonal update of a matrix: match_adamw 0.2 sqrt(max(rows,"
        " columns)), jordan sqrt(max(1, rows / columns)), spectral sqrt(rows / columns)",
        choices=("match_adamw", "jordan", "spectral"),
    )
    muon_kinds: list[str] = setting(
        [], help="Muon: weights it updates beside its usual ones", choices=PARAMETER_KINDS
    )
    adamw_kinds: list[str] = setting(
        [], help="Muon: weights it leaves to AdamW beside the usual ones", choices=PARAMETER_KINDS
    )
    per_head: list[str] = setting(
        [],
        help="Muon: projections of which each head's rows are one matrix, not all heads' together",
        choices=("query", "key", "value"),
    )
    adamw_learning_rate_factor: float = setting(
        1.0, help="Muon: learning rate of what AdamW updates, over Muon's", above=0.0
    )
    qk_clip_threshold: float | None = setting(
        None,
        help="QK-Clip (arXiv 2507.20534): after a step, heads whose largest attention logit was"
        " above this are scaled down to it; null only watches",
        above=0.0,
    )


@dataclass(kw_only=True)
class TransferSettings:
    """Hyperparameters found on a narrow model for a wide one (muP, arXiv 2608.20061)."""

    base_hidden_size: int | None = setting(
        None,
        help="width of the model that learning rate and initial weights were chosen for; null uses"
        " them as they are (the standard parametrisation)",
        minimum=1,
    )
    matrix_init_std: float | None = setting(
        None,
        help="standard deviation of initial matrices at the base width; null is model.init_std",
        above=0.0,
    )
    vector_init_std: float | None = setting(
        0.2,
        help="standard deviation of initial embeddings at any width (arXiv 2608.20061: variance"
        " 0.04); null is model.init_std",
        above=0.0,
    )
    scale_output: bool = setting(
        True,
        help="divide logits by the width over the base width, by way of the output layer's weights"
        " (arXiv 2203.03466, table 8)",
    )


STANDARD_PARAMETRIZATION = TransferSettings()


@dataclass(kw_only=True)
class BatchSizeChange:
    """Another batch size from some point of the run on."""

    tokens: float = setting(help="tokens trained on, from which on a step has this size", above=0.0)
    global_batch_size: int = setting(help="sequences in one optimizer step", minimum=1)


@dataclass(kw_only=True)
class ScheduleSettings:
    """Length of the run, batch sizes, and the warm-up, stable, decay (WSD) learning rate."""

    steps: int = setting(help="optimizer steps of the whole run", minimum=1)
    global_batch_size: int = setting(help="sequences in one optimizer step", minimum=1)
    batch_size_changes: list[BatchSizeChange] = setting(
        [],
        help="later sizes of a step, [{tokens: …, global_batch_size: …}, …] by growing tokens;"
        " evaluation keeps the first size",
    )
    micro_batch_size: int = setting(help="sequences in one forward pass of a process", minimum=1)
    warmup_steps: int = setting(0, help="steps of linear warm-up from zero", minimum=0)
    decay_steps: int = setting(0, help="last steps, over which the rate decays", minimum=0)
    decay_style: str = setting(
        "linear",
        help="shape of the decay; minus_sqrt is 1 - sqrt(part of it done) (arXiv 2405.18392)",
        choices=("linear", "cosine", "exponential", "minus_sqrt"),
    )
    minimum_learning_rate: float = setting(
        0.0, help="learning rate at the end of the decay", minimum=0.0
    )
    weight_average_decay: float | None = setting(
        None,
        help="share of an exponential moving average of the weights that stays at each update; such"
        " averaged weights are evaluated and saved beside the weights; null keeps none",
        above=0.0,
        maximum=0.99999,
    )
    weight_average_interval: int = setting(
        1, help="steps between updates of the average", minimum=1
    )
    evaluation_interval: int = setting(
        0, help="steps between evaluations on held-out text; 0 never evaluates", minimum=0
    )
    evaluation_batches: int = setting(4, help="global batches of one evaluation", minimum=1)


@dataclass(kw_only=True)
class LoggingSettings:
    """What a person sees."""

    interval: int = setting(1, help="steps between measurements", minimum=1)
    tensorboard: bool = setting(True, help="write TensorBoard events")
    report: bool = setting(True, help="write report.html with plots and a text sample at the end")
    sample_prompt: str = setting(
        "def __init__(self",
        help="beginning of the text sample in the report",
        several_lines=True,
    )
    sample_tokens: int = setting(
        96, help="tokens generated for the text sample; 0 writes none", minimum=0
    )


@dataclass(kw_only=True)
class KernelSettings:
    """Implementation of the project's own operations."""

    backend: str = setting(
        "auto",
        help="of attention; auto takes the fastest that works here and logs why",
        choices=("auto", "csrc", "cudnn", "te", "sdpa", "torch"),
    )
    moe_backend: str = setting(
        "auto",
        help="the same for routing and experts",
        choices=("auto", "csrc", "torch"),
    )
    linear_backend: str = setting(
        "auto",
        help="the same for the dense linear layers: te is Transformer Engine's, on CUDA, where"
        " weight gradients are added to the fp32 sums in the product itself",
        choices=("auto", "te", "torch"),
    )
    rope_backend: str = setting(
        "auto",
        help="the same for rotary embeddings: triton is megatron-core's kernel, on CUDA, which"
        " turns, splits and joins in one pass",
        choices=("auto", "triton", "torch"),
    )
    norm_backend: str = setting(
        "auto",
        help="the same for norms and the embedding's gradient: csrc is for Hopper GPUs in bf16,"
        " where gradients of both are added to the fp32 sums as they are computed",
        choices=("auto", "csrc", "torch"),
    )
    loss_backend: str = setting(
        "auto",
        help="the same for the output layer's losses",
        choices=("auto", "csrc", "torch"),
    )
    deterministic: bool = setting(
        False,
        help="a run has the same bits each time on a GPU as well; attention's gradients and rotary"
        " embeddings are slower there",
    )


@dataclass(kw_only=True)
class Settings:
    """The whole configuration of the main job."""

    run_name: str = setting(help="name of the run; its folder is output_dir/run_name")
    output_dir: str = setting("runs", help="folder of all runs")
    seed: int = setting(1234, help="seed of weights and of the order of samples", minimum=0)
    device: str = setting(
        "auto",
        help="where to run; auto takes CUDA where there is one",
        choices=("auto", "cpu", "cuda"),
    )
    stop_after_step: int | None = setting(
        None,
        help="save and stop after this step, as if interrupted; the schedule is unchanged",
        minimum=1,
    )
    model: ModelSettings = setting(help="the network")
    parallel: ParallelSettings = setting(help="layout over processes")
    precision: PrecisionSettings = setting(help="number formats")
    optimizer: OptimizerSettings = setting(help="optimizer")
    transfer: TransferSettings = setting(
        TransferSettings, help="hyperparameters from a narrower model"
    )
    schedule: ScheduleSettings = setting(help="length, batches, learning rate")
    data: DataSettings = setting(help="text and tokenizer")
    checkpoint: CheckpointSettings = setting(help="saving and loading")
    logging: LoggingSettings = setting(help="what a person sees")
    kernels: KernelSettings = setting(help="implementation of our operations")
    watchdog: WatchdogSettings = setting(
        WatchdogSettings, help="runs that stand still, slow processes, the end of time"
    )
    guards: GuardSettings = setting(GuardSettings, help="steps whose numbers cannot be right")
    cluster: ClusterSettings = setting(ClusterSettings, help="where tools/submit.py starts it")

    @property
    def run_dir(self) -> str:
        """Folder of this run."""
        return f"{self.output_dir}/{self.run_name}"

    @property
    def checkpoint_dir(self) -> str:
        """Folder of this run's checkpoints."""
        return self.checkpoint.directory or f"{self.run_dir}/checkpoints"

    def data_parallel_size(self, world_size: int) -> int:
        """Processes, or groups that share sequences, with the same weights and other samples."""
        return world_size // self.parallel.model_parallel_size

    def num_microbatches(self, world_size: int, global_batch_size: int | None = None) -> int:
        """Forward passes of one process in one step, of the first size or of another."""
        return (global_batch_size or self.schedule.global_batch_size) // (
            self.schedule.micro_batch_size * self.data_parallel_size(world_size)
        )
