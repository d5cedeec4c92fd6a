"""What trainers need to be told, one module for each; imported only when asked for by name.

`mpcore.integrations.lightning` is the only one: Accelerate, Transformers' Trainer and TRL take an
`mpcore.GradScaler`, and need none.
"""
