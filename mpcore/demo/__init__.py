"""The demonstration behind `mpcore demo`: the same small GPT trained in eight precision regimes.

Needs the `demo` extra. Nothing here prints: progress goes to callbacks, results are values.
"""
