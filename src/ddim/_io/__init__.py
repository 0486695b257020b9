"""File input and output: atomic writes, checksums, safetensors, PNG, and validation of files and arguments.

It imports `errors` and `names` only.
"""
