"""How a job is laid over processes, and what lies on each pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_kanana.config import Settings
from megatron_kanana.config.schema import ParallelSettings

from .architecture import Architecture, Weight


@dataclass(frozen=True)
class Layout:
    """Sizes of the layout and of a step.

    Attributes:
        world_size: processes, one a GPU.
        tensor, pipeline, virtual, expert, expert_tensor: sizes of the parallelisms; `virtual` is
            the number of interleaved stages on a process.
        counts_embeddings: whether stages of equal size count embedding and output layer.
        sequence_length: tokens of a sequence.
        micro_batch_size: sequences of one forward pass of a process.
        global_batch_size: sequences of a step.
        recompute: what is computed again in the backward pass: 'full', or any of 'up_projections'
            (of MLA), 'activations', 'norms' and 'dense_feed_forward', which megatron-core has too.
        overlaps_gradients: whether gradients are reduced while the backward pass goes on.
        overlaps_dispatch: whether experts' messages overlap with other microbatches' computation.
        microbatches_per_flush: after so many the pipeline runs empty; None is the whole step.
        shards_weights: whether weights are sharded over data parallelism too (FSDP), and gathered
            and reduced once a flush.
        consecutive_experts: whether each token visits experts one after another, as a benchmark's
            gate may choose them; else they are spread at random.
        expert_load: tokens that come to the experts of the busiest process, over the mean.
    """

    world_size: int
    tensor: int
    pipeline: int
    virtual: int
    expert: int
    expert_tensor: int
    counts_embeddings: bool
    sequence_length: int
    micro_batch_size: int
    global_batch_size: int
    recompute: frozenset[str] = frozenset()
    overlaps_gradients: bool = False
    overlaps_dispatch: bool = False
    microbatches_per_flush: int | None = None
    shards_weights: bool = False
    consecutive_experts: bool = False
    expert_load: float = 1.0

    @classmethod
    def of(
        cls,
        settings: Settings,
        world_size: int,
        global_batch_size: int,
        expert_load: float = 1.0,
    ) -> Layout:
        """The layout of a run's settings, for one of its batch sizes."""
        parallel = settings.parallel
        return cls(
            world_size=world_size,
            tensor=parallel.tensor_parallel_size,
            pipeline=parallel.pipeline_parallel_size,
            virtual=parallel.virtual_pipeline_stages,
            expert=parallel.expert_parallel_size,
            expert_tensor=parallel.expert_tensor_parallel_size,
            counts_embeddings=parallel.embeddings_count_as_layers,
            sequence_length=settings.data.sequence_length,
            micro_batch_size=settings.schedule.micro_batch_size,
            global_batch_size=global_batch_size,
            recompute=_recompute(parallel),
            overlaps_gradients=parallel.overlap_gradient_reduction,
            expert_load=expert_load,
        )

    @property
    def data(self) -> int:
        """Processes with the same dense weights and other samples."""
        return self.world_size // (self.tensor * self.pipeline)

    @property
    def expert_data(self) -> int:
        """Processes that hold the same experts."""
        return self.world_size // (self.expert_tensor * self.expert * self.pipeline)

    @property
    def microbatches(self) -> int:
        """Forward passes of a process in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.data)

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch."""
        return self.micro_batch_size * self.sequence_length

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step."""
        return self.global_batch_size * self.sequence_length

    @property
    def has_full_recompute(self) -> bool:
        """Whether whole layers are computed again."""
        return "full" in self.recompute


def _recompute(parallel: ParallelSettings) -> frozenset[str]:
    if parallel.recompute == "selective":
        return frozenset(parallel.recompute_parts)
    return frozenset() if parallel.recompute == "none" else frozenset({"full"})


@dataclass(frozen=True)
class Stage:
    """What one (virtual) pipeline stage holds.

    Attributes:
        embedding, output: whether embedding and output layer lie here.
        first_layer: number of the first transformer layer, from 0.
        dense, moe: transformer layers without and with experts.
        mtp: multi-token prediction layers.
    """

    embedding: bool
    output: bool
    first_layer: int
    dense: int
    moe: int
    mtp: int

    def layers_by_format(
        self, num_layers: int, bf16_layers: tuple[int, int]
    ) -> list[tuple[bool, bool, int]]:
        """How many layers, by whether they have experts, and whether fp8 does not leave them out.

        Args:
            num_layers: of the model.
            bf16_layers: first and last layers that fp8 leaves out, where there is any; of
                multi-token prediction it leaves out none.
        """
        start, end = bf16_layers

        def left_out(first: int, count: int) -> int:
            last = first + count
            at_start = max(0, min(last, start) - first)
            at_end = max(0, last - max(first, num_layers - end))
            return min(count, at_start + at_end)

        of_dense = left_out(self.first_layer, self.dense)
        of_moe = left_out(self.first_layer + self.dense, self.moe)
        counts = [
            (False, True, self.dense - of_dense),
            (False, False, of_dense),
            (True, True, self.moe - of_moe + self.mtp),
            (True, False, of_moe),
        ]
        return [each for each in counts if each[2]]

    def weights(self, architecture: Architecture) -> list[Weight]:
        """Its weights; the layers' one after another."""
        weights: list[Weight] = []
        if self.embedding or self.mtp:
            weights += architecture.embedding()
        weights += self.dense * architecture.layer(is_moe=False)
        weights += self.moe * architecture.layer(is_moe=True)
        weights += self.mtp * architecture.mtp_layer()
        if self.output:
            weights += architecture.output_layer()
        return weights


def stages(architecture: Architecture, layout: Layout) -> list[list[Stage]]:
    """The virtual stages of each pipeline rank, in order.

    Stage k of all is virtual stage k // pipeline of rank k % pipeline. Where the layers do not
    divide, which our settings refuse, the first stages have one more.
    """
    count = layout.pipeline * layout.virtual
    counted = 1 if layout.counts_embeddings else 0
    places = architecture.num_layers + 2 * counted
    sizes = [places // count + (index < places % count) for index in range(count)]
    sizes[0] -= counted
    sizes[-1] -= counted
    result: list[list[Stage]] = [[] for _ in range(layout.pipeline)]
    first = 0
    for index, size in enumerate(sizes):
        dense = max(0, min(first + size, architecture.num_dense_layers) - first)
        last = index == count - 1
        stage = Stage(
            embedding=index == 0,
            output=last,
            first_layer=first,
            dense=dense,
            moe=size - dense,
            mtp=architecture.num_mtp_layers if last else 0,
        )
        result[index % layout.pipeline].append(stage)
        first += size
    return result
