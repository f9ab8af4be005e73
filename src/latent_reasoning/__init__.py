"""Learning when to stop: adaptive latent reasoning, from raw rows to tables and figures.

The package has one folder a stage of the DAG, in the DAG's words; data flows one way:
``data -> model -> sft -> rl -> evaluation -> analysis``. A stage never imports a later one.
"""

import gc
import sys

if sys.argv[:1] == [
    "-m"
]:  # a stage starts: what is imported stays, so looking for garbage is waste
    gc.disable()  # until `runtime.command.run_stage`
