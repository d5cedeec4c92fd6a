"""What trainers need to be told, one module for each; imported only when asked for by name.

`mpcore.integrations.lightning` has plugins for Lightning and Fabric, `mpcore.integrations.keras` an
optimizer for `compile`. Accelerate, Transformers' Trainer and TRL take an `mpcore.GradScaler`.
"""
