"""As `train_in_turn.py`, with linear layers on a stand-in for Transformer Engine: RECORD JOBS.

Writes into RECORD, as a list in JSON, how the layers were built and how they computed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests import transformer_engine_stand_in as stand_in

if __name__ == "__main__":
    stand_in.install()

    from megatron_kanana.kernels import dense
    from tests import train_in_turn

    vars(dense)["_transformer_engine_error"] = lambda *_: None
    record: list[dict[str, object]] = []
    for job in json.loads(sys.argv[2]):
        train_in_turn.main([job])
        record.append(
            {
                "built": list(stand_in.built),
                "contexts": list(stand_in.contexts),
                "checkpointed": list(stand_in.checkpointed),
            }
        )
        stand_in.built.clear()
        stand_in.contexts.clear()
        stand_in.checkpointed.clear()
    Path(sys.argv[1]).write_text(json.dumps(record))
