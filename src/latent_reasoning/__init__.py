"""Learning when to stop: adaptive latent reasoning, from raw rows to tables and figures.

The package has one folder a stage of the DAG, in the DAG's words; data flows one way:
``data -> model -> sft -> rl -> evaluation -> analysis``. A stage never imports a later one.
"""

import gc
import sys

# A stage starts. What it imports stays, so to look for garbage meanwhile would be in vain.
if sys.argv[:1] == ["-m"]:
    gc.disable()  # until `runtime.command.run_stage`
