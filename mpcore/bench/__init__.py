"""What `mpcore bench` measures: optimizer steps side by side, and the bytes of whole steps.

Part of the command line, which needs the `bench` extra; `import mpcore` does not load it.
"""
