"""Plumbing: files that are never half-written, safetensors, PNG, and checks of what is read or passed in.

It imports `errors` and `names` only.
"""
