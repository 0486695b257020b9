"""The commands: they only translate, arguments in, iterators out.

One short file per command; files that begin with `_` are shared. Nothing imports it.
"""
