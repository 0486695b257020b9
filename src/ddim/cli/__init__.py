"""The commands: they translate options into arguments of the library and show its progress.

One short file per command; files that begin with `_` are shared. No other package imports this one.
"""
