"""Learning when to stop: adaptive latent reasoning, from raw rows to tables and figures.

The package has one folder a stage of the DAG, in the DAG's words; data flows one way:
``data -> model -> sft -> rl -> evaluation -> analysis``. A stage never imports a later one.
"""
