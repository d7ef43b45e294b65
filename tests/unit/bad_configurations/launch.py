"""Words of the command line, machines, launches and clusters that cannot be."""

from __future__ import annotations

from megatron_kanana.config import Environment

from .case import CUDA_MACHINE, Bad

LAUNCH = {
    "limits of the watchdog in the wrong order": Bad(
        ("watchdog.long_timeout=60",), "watchdog.long_timeout", "60", "choose at least 600"
    ),
    "time limit that is no time": Bad(
        ("watchdog.time_limit=tomorrow",), "watchdog.time_limit", "tomorrow", "'47:30:00'"
    ),
    "unknown top-level setting": Bad(("sed=1",), "sed", "1", "did you mean seed?"),
    "unknown experiment": Bad(("experiment=big",), "experiment", "big", "or kanana_2_tiny"),
    "unreadable word": Bad(("schedule.steps",), "command line", "schedule.steps", "setting=value"),
    "sweep": Bad(("seed=1,2",), "command line", "seed=1,2", "set one value"),
    "deleted setting": Bad(("~seed",), "command line", "~seed", "set one value"),
    "null where a value is needed": Bad(("seed=null",), "seed", "None", "give a whole number"),
    "value that is not a choice": Bad(
        ("precision.compute=int4",), "precision.compute", "int4", "fp32 or bf16"
    ),
    "broken interpolation": Bad(
        ("run_name=${missing}",), "run_name", "${missing}", "name an existing setting"
    ),
    "interpolation that calls": Bad(
        ("run_name=${now:%Y}",), "run_name", "${now:%Y}", "write the value, ${another.setting}"
    ),
    "interpolation inside a list": Bad(
        ("data.blend=[{path:${missing}}]",),
        "data.blend[0].path",
        "${missing}",
        "name an existing setting",
    ),
    "line break in a name, which stands in batch scripts": Bad(
        ("run_name='a\nb'",), "run_name", "'a\\nb'", "leave it out"
    ),
    "name longer than a file's may be": Bad(
        (f"run_name={'x' * 300}",), "run_name", "xxx…", "shorten it"
    ),
    "path longer than paths may be": Bad(
        (f"output_dir={'a/' * 2500}",), "output_dir", "a/a/a", "shorten it"
    ),
    "half of a surrogate pair": Bad(
        ("data.cache_dir='\ud83d'",), "data.cache_dir", "'\\ud83d'", "leave it out"
    ),
    "number longer than Python reads": Bad(
        (f"seed={'9' * 5000}",), "command line", "999", "setting=value"
    ),
    "device that is not there": Bad(("device=cuda",), "device", "cuda", "set device=cpu"),
    "more processes than devices": Bad(
        (),
        "torchrun --nproc-per-node",
        "2",
        "start one process a device",
        Environment(world_size=2, local_world_size=2, cuda_device_count=1),
    ),
    "dispatcher of earlier versions": Bad(
        ("parallel.token_dispatcher=allgather",),
        "parallel.token_dispatcher",
        "allgather",
        "alltoall or deepep",
    ),
    "DeepEP on a CPU": Bad(
        ("parallel.token_dispatcher=deepep",),
        "parallel.token_dispatcher",
        "deepep",
        "choose alltoall",
    ),
    "DeepEP that is not installed": Bad(
        ("parallel.token_dispatcher=deepep",),
        "parallel.token_dispatcher",
        "deepep",
        "install DeepEP",
        Environment(cuda_device_count=1, has_deep_ep=False),
    ),
    "DeepEP in fp32": Bad(
        ("parallel.token_dispatcher=deepep", "precision=fp32"),
        "parallel.token_dispatcher",
        "deepep",
        "set precision.compute=bf16",
        CUDA_MACHINE,
    ),
    "DeepEP with experts in parts": Bad(
        ("parallel.token_dispatcher=deepep", "parallel.expert_tensor_parallel_size=2"),
        "parallel.token_dispatcher",
        "deepep",
        "set parallel.expert_tensor_parallel_size=1",
        Environment(world_size=2, local_world_size=2, cuda_device_count=2),
    ),
    "GPU kernels on a CPU": Bad(
        ("kernels.backend=sdpa",), "kernels.backend", "sdpa", "choose csrc, torch or auto"
    ),
    "another GPU library on a CPU": Bad(
        ("kernels.backend=te",), "kernels.backend", "te", "choose csrc, torch or auto"
    ),
    "kernels of other head widths on a GPU": Bad(
        ("kernels.backend=csrc",),
        "kernels.backend",
        "csrc",
        "choose cudnn, sdpa or auto",
        CUDA_MACHINE,
    ),
    "GPU kernels in fp32": Bad(
        ("kernels.backend=cudnn", "precision.compute=fp32"),
        "kernels.backend",
        "cudnn",
        "set precision.compute=bf16",
        CUDA_MACHINE,
    ),
    "GPU library that is not installed": Bad(
        ("kernels.backend=te",),
        "kernels.backend",
        "te",
        "pip install 'transformer-engine[pytorch]'",
        Environment(cuda_device_count=1, transformer_engine_version=None),
    ),
    "documents that a GPU library does not keep apart": Bad(
        ("kernels.backend=te", "data.document_mask=true"),
        "kernels.backend",
        "te",
        "choose csrc, cudnn, sdpa or auto",
        CUDA_MACHINE,
    ),
    "gradients that cannot be deterministic": Bad(
        ("kernels.backend=sdpa", "kernels.deterministic=true"),
        "kernels.deterministic",
        "true",
        "choose kernels.backend=csrc, cudnn or torch",
        CUDA_MACHINE,
    ),
    "compiled kernels that were not built": Bad(
        ("kernels.backend=csrc",),
        "kernels.backend",
        "csrc",
        "pip install --no-build-isolation -e .",
        Environment(has_native_library=False),
    ),
    "compiled experts that were not built": Bad(
        ("kernels.moe_backend=csrc",),
        "kernels.moe_backend",
        "csrc",
        "pip install --no-build-isolation -e .",
        Environment(has_native_library=False),
    ),
    "compiled losses that were not built": Bad(
        ("kernels.loss_backend=csrc",),
        "kernels.loss_backend",
        "csrc",
        "pip install --no-build-isolation -e .",
        Environment(has_native_library=False),
    ),
    "compiled experts in fp32 on a GPU": Bad(
        ("kernels.moe_backend=csrc", "precision.compute=fp32"),
        "kernels.moe_backend",
        "csrc",
        "set precision.compute=bf16",
        CUDA_MACHINE,
    ),
    "compiled experts of a width that a GPU does not take": Bad(
        ("kernels.moe_backend=csrc", "model.moe_ffn_hidden_size=96"),
        "kernels.moe_backend",
        "csrc",
        "choose torch or auto",
        CUDA_MACHINE,
    ),
    "more experts than the compiled routing takes on a GPU": Bad(
        ("kernels.moe_backend=csrc", "model.num_experts=1024"),
        "kernels.moe_backend",
        "csrc",
        "choose torch or auto",
        CUDA_MACHINE,
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
