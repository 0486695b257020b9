"""The commands: they only translate, arguments in, iterators out."""
