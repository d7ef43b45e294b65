"""What a run and its launcher tell each other: why it ended, and which start it is."""

WRONG_CONFIGURATION = 2
"""The settings have problems; another start would find the same."""

CANNOT_SAVE = 74
"""Checkpoints could not be saved, as of an error of input or output (EX_IOERR of sysexits.h)."""

TOO_FEW_NODES = 75
"""The pre-flight left too few good nodes; the batch script has submitted another job."""

SAVED_FOR_ANOTHER_START = 85
"""After SIGUSR1, or before the time limit: a batch script puts its job into the queue again."""

HUNG = 86
"""The watchdog ended a run that stood still: torchrun or the batch script starts it again."""

STOPPED = 87
"""The guards ended a run whose numbers were not right, after saving it: somebody must look."""

SAVED_FOR_GOOD = 143
"""After SIGTERM, as of a process that it ended: its sender starts the run again himself, or not."""

WITHOUT_RESTART = (
    WRONG_CONFIGURATION,
    CANNOT_SAVE,
    TOO_FEW_NODES,
    SAVED_FOR_ANOTHER_START,
    STOPPED,
    SAVED_FOR_GOOD,
)
"""After these, torchrun does not start the processes again, whatever `--max-restarts`."""

START = "MEGATRON_KANANA_START"
"""Environment variable: another text for each start of the processes, the same for all of them."""

LAUNCH_TIME = "MEGATRON_KANANA_LAUNCH_TIME"
"""Environment variable: when the launch began, in seconds since 1970, its restarts included."""

END_TIME = "MEGATRON_KANANA_END_TIME"
"""Environment variable: when the job's time is over, in seconds since 1970; of the batch script."""
