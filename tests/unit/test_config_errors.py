"""Bad configurations: every one is answered before anything starts, with setting and remedy."""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_kanana import device, train
from megatron_kanana.config import (
    ConfigurationError,
    Environment,
    Settings,
    load_settings,
    write_settings,
)
from megatron_kanana.config.ledger import Ledger, write_ledger
from megatron_kanana.config.saved import SETTINGS_FILE
from tests.hugging_face_tokenizers import save_byte_level_tokenizer
from tests.launch import run_python

ONE_CPU = Environment()
CUDA_MACHINE = Environment(cuda_device_count=1)


@dataclasses.dataclass(frozen=True)
class Bad:
    """One bad configuration and what must be said about it.

    Attributes:
        overrides: words of the command line; `{tmp}` is a folder of the test.
        setting: name the message must give.
        value: value it must show.
        remedy: part of the remedy.
        environment: machine and launch.
    """

    overrides: tuple[str, ...]
    setting: str
    value: str
    remedy: str
    environment: Environment = ONE_CPU


def world(size: int) -> Environment:
    """A launch of `size` processes on CPUs."""
    return Environment(world_size=size, local_world_size=size)


BAD = {
    "unknown setting": Bad(
        ("schedule.stepz=10",), "schedule.stepz", "10", "did you mean schedule.steps?"
    ),
    "unknown top-level setting": Bad(("sed=1",), "sed", "1", "did you mean seed?"),
    "setting of another group": Bad(
        ("model.learning_rate=1",), "model.learning_rate", "1", "the settings of model are:"
    ),
    "unknown config of a group": Bad(("model=gpt",), "model", "gpt", "or kanana_2_tiny"),
    "unknown experiment": Bad(("experiment=big",), "experiment", "big", "or kanana_2_tiny"),
    "unreadable word": Bad(("schedule.steps",), "command line", "schedule.steps", "setting=value"),
    "sweep": Bad(("seed=1,2",), "command line", "seed=1,2", "set one value"),
    "deleted setting": Bad(("~seed",), "command line", "~seed", "set one value"),
    "text for a number": Bad(
        ("schedule.steps=many",), "schedule.steps", "many", "give a whole number"
    ),
    "fraction for a whole number": Bad(
        ("schedule.steps=1.5",), "schedule.steps", "1.5", "give a whole number"
    ),
    "number for a switch": Bad(
        ("checkpoint.resume=1",), "checkpoint.resume", "1", "give true or false"
    ),
    "null where a value is needed": Bad(("seed=null",), "seed", "None", "give a whole number"),
    "value for a group": Bad(("+model.kv_lora_rank.x=3",), "model.kv_lora_rank", "3", "give"),
    "negative learning rate": Bad(
        ("optimizer.learning_rate=-1",), "optimizer.learning_rate", "-1.0", "choose above 0"
    ),
    "not a number": Bad(
        ("optimizer.learning_rate=nan",), "optimizer.learning_rate", "nan", "choose above 0"
    ),
    "value that is not a choice": Bad(
        ("precision.compute=int4",), "precision.compute", "int4", "fp32 or bf16"
    ),
    "broken interpolation": Bad(
        ("run_name=${missing}",), "run_name", "${missing}", "name an existing setting"
    ),
    "device that is not there": Bad(("device=cuda",), "device", "cuda", "set device=cpu"),
    "more processes than devices": Bad(
        (),
        "torchrun --nproc-per-node",
        "2",
        "start one process a device",
        Environment(world_size=2, local_world_size=2, cuda_device_count=1),
    ),
    "fp8 on a CPU": Bad(
        ("precision.compute=fp8",), "precision.compute", "fp8", "choose fp32 or bf16"
    ),
    "GPU kernels on a CPU": Bad(
        ("kernels.backend=sdpa",), "kernels.backend", "sdpa", "choose csrc, torch or auto"
    ),
    "CPU kernels on a GPU": Bad(
        ("kernels.backend=csrc",),
        "kernels.backend",
        "csrc",
        "choose sdpa, torch or auto",
        CUDA_MACHINE,
    ),
    "compiled kernels that were not built": Bad(
        ("kernels.backend=csrc",),
        "kernels.backend",
        "csrc",
        "pip install --no-build-isolation -e .",
        Environment(has_native_library=False),
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
        "parallel.tensor_parallel_size x parallel.pipeline_parallel_size",
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
    "missing tokenizer": Bad(
        ("data.tokenizer={tmp}/no.model",), "data.tokenizer", "no.model", "give a SentencePiece"
    ),
    "file that is no tokenizer": Bad(
        ("data.tokenizer={tmp}/notes.txt",), "data.tokenizer", "notes.txt", "give a .model file"
    ),
    "folder that holds no tokenizer": Bad(
        ("data.tokenizer={tmp}/step_00000007",),
        "data.tokenizer",
        "step_00000007",
        "give a folder with tokenizer.json",
    ),
    "Hugging Face tokenizer that is not JSON": Bad(
        ("data.tokenizer={tmp}/broken",),
        "data.tokenizer",
        "broken",
        "give a folder with tokenizer.json",
    ),
    "Hugging Face tokenizer that does not end texts": Bad(
        ("data.tokenizer={tmp}/endless",), "data.tokenizer", "endless", "give a folder"
    ),
    "more ids than rows of the embedding": Bad(
        ("data.tokenizer={tmp}/published", "model.vocab_size=400"),
        "model.vocab_size",
        "400",
        "set model.vocab_size=500",
    ),
    "dataset too small to hold documents out": Bad(
        ("data.blend=[{path:{tmp}/small,weight:1}]",),
        "data.blend[0].path",
        "small",
        "choose another data.held_out_percent",
    ),
    "dataset cut short": Bad(
        ("data.blend=[{path:{tmp}/short,weight:1}]",),
        "data.blend[0].path",
        "short",
        "make it with tools/preprocess_data.py",
    ),
    "file that is no dataset": Bad(
        ("data.blend=[{path:{tmp}/notes,weight:1}]",),
        "data.blend[0].path",
        "notes",
        "make it with tools/preprocess_data.py",
    ),
    "evaluation without held-out text": Bad(
        ("data.held_out_percent=0",),
        "data.held_out_percent",
        "0.0",
        "schedule.evaluation_interval=0",
    ),
    "missing dataset": Bad(
        ("data.blend=[{path:{tmp}/corpus,weight:1}]",),
        "data.blend[0].path",
        "corpus",
        "make it with tools/preprocess_data.py",
    ),
    "blend without its tokenizer": Bad(
        ("data.blend=[{path:{tmp}/corpus,weight:1}]",),
        "data.tokenizer",
        "null",
        "name the tokenizer that they were made with",
    ),
    "blend with a weight of zero": Bad(
        ("data.blend=[{path:{tmp}/corpus,weight:0}]",),
        "data.blend[0].weight",
        "0.0",
        "choose above 0",
    ),
    "source without dataset or name": Bad(
        ("data.blend=[{weight:1}]",),
        "data.blend[0].path",
        "null",
        "give path or paths, or a source",
    ),
    "source that the built-in text lacks": Bad(
        ("data.blend=[{source:books}]",),
        "data.blend[0].source",
        "books",
        "or choose python_standard_library or six_languages",
    ),
    "two sources of one name": Bad(
        ("data.blend=[{source:six_languages},{source:six_languages}]",),
        "data.blend[1].source",
        "six_languages",
        "a name of its own",
    ),
    "dataset in two sources": Bad(
        ("data.blend=[{path:{tmp}/small},{source:b,paths:[{tmp}/notes,{tmp}/small]}]",),
        "data.blend[1].paths[1]",
        "small",
        "name it once",
    ),
    "dataset of a source that is missing": Bad(
        ("data.blend=[{source:b,paths:[{tmp}/small,{tmp}/corpus]}]",),
        "data.blend[0].paths[1]",
        "corpus",
        "make it with tools/preprocess_data.py",
    ),
    "built-in text among datasets": Bad(
        ("data.blend=[{path:{tmp}/small},{source:six_languages}]",),
        "data.blend",
        "small, six_languages",
        "give every source a path, or none",
    ),
    "dataset smaller than a sample": Bad(
        ("data.blend=[{path:{tmp}/small}]", "data.held_out_percent=10"),
        "data.blend[0].path",
        "small",
        "choose data.sequence_length=54 or less",
    ),
    "weights that are all zero": Bad(
        ("data.blend=[{source:six_languages,weight:0}]",),
        "data.blend",
        "six_languages: 0.0",
        "give at least one source a weight above 0",
    ),
    "infinite weight": Bad(
        ("data.blend=[{source:six_languages,weight:inf}]",),
        "data.blend",
        "six_languages: inf",
        "none an infinite one",
    ),
    "source that no part of the run uses": Bad(
        (
            "data.blend=[{source:six_languages},{source:python_standard_library,weight:0}]",
            "data.blend_changes=[{tokens:1e6,weights:{six_languages:2}}]",
        ),
        "data.blend[1].weight",
        "0.0",
        "give it a weight in data.blend_changes, or leave it out",
    ),
    "mixture changes out of order": Bad(
        (
            "data.blend_changes=[{tokens:2e6,weights:{six_languages:1}},"
            "{tokens:2e6,weights:{six_languages:2}}]",
        ),
        "data.blend_changes[1].tokens",
        "2000000.0",
        "by growing tokens",
    ),
    "mixture change at no tokens": Bad(
        ("data.blend_changes=[{tokens:0,weights:{six_languages:1}}]",),
        "data.blend_changes[0].tokens",
        "0.0",
        "choose above 0",
    ),
    "mixture change of an unknown source": Bad(
        ("data.blend_changes=[{tokens:1e6,weights:{six_language:1}}]",),
        "data.blend_changes[0].weights.six_language",
        "1.0",
        "did you mean six_languages?",
    ),
    "mixture change to nothing": Bad(
        ("data.blend_changes=[{tokens:1e6,weights:{six_languages:0}}]",),
        "data.blend_changes[0].weights",
        "six_languages: 0.0",
        "give at least one source a weight above 0",
    ),
    "mixture change without sources": Bad(
        ("data.blend_changes=[{tokens:1e6,weights:{}}]",),
        "data.blend_changes[0].weights",
        "{}",
        "give at least one source a weight above 0",
    ),
    "negative weight in a mixture change": Bad(
        ("data.blend_changes=[{tokens:1e6,weights:{six_languages:-1}}]",),
        "data.blend_changes[0].weights.six_languages",
        "-1.0",
        "choose at least 0",
    ),
    "mixture change without a mapping": Bad(
        ("data.blend_changes=[{tokens:1e6,weights:[1,2]}]",),
        "data.blend_changes[0].weights",
        "[1, 2]",
        "write data.blend_changes[0].weights={name: …}",
    ),
    "two evaluation sets of one name": Bad(
        ("data.evaluation_sets=[{name:ko,path:{tmp}/notes.txt},{name:ko,path:{tmp}/notes.txt}]",),
        "data.evaluation_sets[1].name",
        "ko",
        "a name of its own",
    ),
    "missing evaluation set": Bad(
        ("data.evaluation_sets=[{name:ko,path:{tmp}/none}]",),
        "data.evaluation_sets[0].path",
        "none",
        "give a .jsonl, .txt or .parquet file",
    ),
    "evaluation set cut short": Bad(
        ("data.evaluation_sets=[{name:ko,path:{tmp}/short}]",),
        "data.evaluation_sets[0].path",
        "short",
        "an indexed dataset without its suffix",
    ),
    "missing conversations": Bad(
        ("data.conversations=[{tmp}/none.jsonl]",),
        "data.conversations[0]",
        "none.jsonl",
        "give a file of conversations",
    ),
    "conversations of an unknown kind": Bad(
        ("data.conversations=[{tmp}/notes.txt]",),
        "data.conversations[0]",
        "notes.txt",
        "give a .jsonl or .parquet file",
    ),
    "conversations both learnt and held out": Bad(
        (
            "data.conversations=[{tmp}/chat.jsonl]",
            "data.held_out_conversations=[{tmp}/chat.jsonl]",
        ),
        "data.held_out_conversations[0]",
        "chat.jsonl",
        "name it once",
    ),
    "held-out conversations alone": Bad(
        ("data.held_out_conversations=[{tmp}/chat.jsonl]",),
        "data.held_out_conversations",
        "chat.jsonl",
        "evaluate on text with data.evaluation_sets",
    ),
    "conversations beside text": Bad(
        ("data.conversations=[{tmp}/chat.jsonl]", "data.blend=[{source:six_languages}]"),
        "data.blend",
        "given",
        "leave one of them out",
    ),
    "no conversations to evaluate on": Bad(
        ("data.conversations=[{tmp}/chat.jsonl]", "data.held_out_percent=0"),
        "data.held_out_percent",
        "0.0",
        "schedule.evaluation_interval=0",
    ),
    "unknown policy for long conversations": Bad(
        ("data.chat.too_long=split",), "data.chat.too_long", "split", "drop or truncate or error"
    ),
    "expert biases reset without a checkpoint": Bad(
        ("checkpoint.reset_expert_bias=true",),
        "checkpoint.reset_expert_bias",
        "true",
        "set checkpoint.load",
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
    "checkpoint that is not whole": Bad(
        ("checkpoint.load={tmp}",), "checkpoint.load", "", "name a step_… folder"
    ),
    "unknown part of a checkpoint": Bad(
        ("checkpoint.load={tmp}/step_00000007", "checkpoint.load_what=moments"),
        "checkpoint.load_what",
        "moments",
        "choose everything or weights or weights_and_optimizer",
    ),
    "part of no checkpoint": Bad(
        ("checkpoint.load_what=weights",), "checkpoint.load_what", "weights", "set checkpoint.load"
    ),
    "going on with samples of another length": Bad(
        ("checkpoint.load={tmp}/step_00000007", "data.sequence_length=64"),
        "data.sequence_length",
        "64",
        "choose 128, or begin a run of its own at step 0 with checkpoint.load_what=weights",
    ),
    "going on with another mixture of what is done": Bad(
        (
            "checkpoint.load={tmp}/step_00000007",
            "data.blend_changes=[{tokens:6400,weights:{six_languages:1}}]",
        ),
        "data.blend_changes",
        "python_standard_library, six_languages",
        "keep the weights of what is done",
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
    "kept steps that are never saved": Bad(
        ("checkpoint.keep_every=70",), "checkpoint.keep_every", "70", "choose a multiple"
    ),
    "unknown cluster": Bad(("cluster=pbs",), "cluster", "pbs", "h200_slurm or local or slurm"),
    "several nodes of this machine": Bad(
        ("cluster.nodes=2",), "cluster.nodes", "2", "choose cluster=slurm"
    ),
    "spare nodes of this machine": Bad(
        ("cluster.spare_nodes=1",), "cluster.spare_nodes", "1", "choose cluster=slurm"
    ),
    "SLURM nodes with unknown GPUs": Bad(
        ("cluster=slurm", "cluster.gpus_per_node=null"),
        "cluster.gpus_per_node",
        "null",
        "or 0 to train on CPUs",
    ),
    "more processes than GPUs of a node": Bad(
        ("cluster=slurm", "cluster.processes_per_node=9"),
        "cluster.processes_per_node",
        "9",
        "start one process a GPU",
    ),
    "time limit in words": Bad(
        ("cluster=slurm", "cluster.time_limit='two days'"),
        "cluster.time_limit",
        "two days",
        "such as 1-12:00:00",
    ),
    "signal before the beginning": Bad(
        ("cluster=slurm", "cluster.time_limit='0:10:00'"),
        "cluster.signal_seconds",
        "600",
        "or a longer time limit",
    ),
    "option of sbatch without its dashes": Bad(
        ("cluster=slurm", "cluster.sbatch_options=['qos=high']"),
        "cluster.sbatch_options",
        "qos=high",
        "write each as '--name=value'",
    ),
    "option of sbatch that is a setting": Bad(
        ("cluster=slurm", "cluster.sbatch_options=['--time=1:00:00']"),
        "cluster.sbatch_options",
        "--time=1:00:00",
        "set cluster.time_limit",
    ),
    "variable that begins with a digit": Bad(
        ("cluster.variables={2ND:INFO}",),
        "cluster.variables.2ND",
        "INFO",
        "use letters, digits and _",
    ),
    "container without an image": Bad(
        ("cluster=slurm", "cluster.container=pyxis"),
        "cluster.container_image",
        "null",
        "name it",
    ),
    "image without a container": Bad(
        ("cluster=slurm", "cluster.container_image=kanana.sif"),
        "cluster.container_image",
        "kanana.sif",
        "set cluster.container=pyxis or apptainer",
    ),
    "container on this machine": Bad(
        ("cluster.container=apptainer", "cluster.container_image=kanana.sif"),
        "cluster.container",
        "apptainer",
        "start submit.py in the container",
    ),
    "output folder that is a file": Bad(
        ("output_dir={tmp}/notes.txt",), "output_dir", "notes.txt", "name a folder"
    ),
    "missing config folder": Bad(
        ("--config-dir={tmp}/none",), "--config-dir", "none", "give an existing folder"
    ),
    "untested megatron-core": Bad(
        (),
        "megatron-core",
        "0.15.0",
        "pip install megatron-core==0.16.1",
        Environment(megatron_core_version="0.15.0"),
    ),
    "no megatron-core": Bad(
        (),
        "megatron-core",
        "not installed",
        "pip install megatron-core==0.16.1",
        Environment(megatron_core_version=None),
    ),
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of Hugging Face's files: a good one, one without an end of text, and a broken one."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for name in ("published", "endless"):
        save_byte_level_tokenizer(folder / name, [str(BAD)], 500)
    for file in ("tokenizer_config.json", "generation_config.json"):
        (folder / "endless" / file).unlink()
    (folder / "broken").mkdir()
    (folder / "broken" / "tokenizer.json").write_text("{")
    return folder


@functools.cache
def settings_to_save(*overrides: str) -> Settings:
    """Settings of a run, composed once."""
    return load_settings(overrides, ONE_CPU)


@pytest.fixture
def folder(tmp_path: Path, tokenizers: Path) -> Path:
    """A folder with a text file and a checkpoint's settings."""
    for suffix in ("txt", "bin", "idx"):
        (tmp_path / f"notes.{suffix}").write_text("neither tokenizer nor dataset " * 3)
    (tmp_path / "chat.jsonl").write_text("")
    for name in ("small", "short"):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=numpy.uint16)
        for _ in range(12):
            builder.add_document(torch.arange(5), [5])
        builder.finalize(str(tmp_path / f"{name}.idx"))
    with (tmp_path / "short.bin").open("ab") as file:
        file.truncate(100)
    shutil.copytree(tokenizers, tmp_path, dirs_exist_ok=True)
    for step, overrides in {6: [], 7: [], 8: ["model.num_mtp_layers=1"]}.items():
        checkpoint = tmp_path / f"step_{step:08d}"
        checkpoint.mkdir()
        write_settings(checkpoint, settings_to_save(*overrides))
    tokens = {"python_standard_library": 90 * 128, "six_languages": 10 * 128}
    write_ledger(tmp_path / "step_00000007", Ledger(100, 128, tokens, {}))
    oldest = tmp_path / "step_00000006" / SETTINGS_FILE
    oldest.write_text(re.sub(r"  \w*mtp\w*: .*\n", "", oldest.read_text()))
    return tmp_path


Answer = Callable[..., str]


@pytest.fixture
def answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Answer:
    """What the main job prints on standard error; fails if it starts anything."""

    def start(*_: object) -> None:
        pytest.fail("the job was started")

    monkeypatch.setattr(device, "prepare_device", start)
    monkeypatch.chdir(folder)

    def run(overrides: tuple[str, ...], environment: Environment) -> str:
        monkeypatch.setattr(train, "detect_environment", lambda: environment)
        before = set(folder.rglob("*"))
        assert train.main([word.replace("{tmp}", str(folder)) for word in overrides]) == 2
        assert set(folder.rglob("*")) == before
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize("name", BAD)
def test_bad_configuration_is_answered_with_setting_value_and_remedy(
    name: str, answer: Answer
) -> None:
    bad = BAD[name]
    message = answer(bad.overrides, bad.environment)
    blocks = message.split("\n\n")[1:]
    assert any(
        block.startswith(f"  {bad.setting} = ")
        and bad.value in block.splitlines()[0]
        and bad.remedy in block.split("remedy: ")[1]
        for block in blocks
    ), message
    assert "Traceback" not in message


def test_all_problems_are_told_together(answer: Answer) -> None:
    """Faults of words, of types, of limits and of combinations, in one run."""
    overrides = (
        "optimzer.learning_rate=1",
        "model=gpt",
        "schedule.steps=many",
        "optimizer.beta1=2",
        "precision.compute=fp8",
        "parallel.tensor_parallel_size=3",
        "data.tokenizer=none.model",
    )
    message = answer(overrides, world(4))
    assert message.startswith("The configuration has 12 problems; nothing was started.")
    assert message.count("does not divide") == 6  # TP 3: five sizes, and the world of 4
    for setting in (
        "optimzer",
        "model",
        "schedule.steps",
        "optimizer.beta1",
        "precision.compute",
        "parallel.tensor_parallel_size",
        "parallel.tensor_parallel_size x parallel.pipeline_parallel_size",
        "data.tokenizer",
    ):
        assert f"\n  {setting} = " in message, message


def test_a_good_configuration_has_no_problems() -> None:
    for overrides, size in ((), 1), (("parallel=expert_parallel",), 2), ((), 2):
        assert load_settings(overrides, world(size)).model.num_experts == 16
    tensor_pipeline = ["parallel=tensor_pipeline", "device=cpu"]
    assert load_settings(tensor_pipeline, world(4)).num_microbatches(4) == 2


def test_a_run_may_change_its_mixture_from_where_it_is_and_begin_another_stage(
    folder: Path,
) -> None:
    checkpoint = f"checkpoint.load={folder}/step_00000007"
    change = "data.blend_changes=[{tokens:12800,weights:{six_languages:1}}]"
    for words in (
        [checkpoint],
        [checkpoint, change],
        [checkpoint, "checkpoint.load_what=weights", "data.sequence_length=64"],
        [checkpoint, "checkpoint.load_what=weights", "data.blend=[{source:six_languages}]"],
    ):
        assert load_settings(words, Environment()).checkpoint.load is not None


def test_folders_that_cannot_be_written_to_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigurationError) as caught:
        load_settings([], Environment())
    assert {problem.setting for problem in caught.value.problems} == {
        "output_dir",
        "checkpoint.directory",
        "data.cache_dir",
    }


def test_under_torchrun_one_process_speaks_and_all_end_with_code_2(tmp_path: Path) -> None:
    finished = run_python(
        "-m",
        "megatron_kanana.train",
        "parallel=tensor_pipeline",
        f"output_dir={tmp_path}",
        processes=2,
    )
    assert finished.returncode != 0
    assert finished.stderr.count("nothing was started") == 1
    assert "exitcode  : 2" in finished.stderr
    assert "exitcode  : 1" not in finished.stderr
    assert not list(tmp_path.iterdir())
