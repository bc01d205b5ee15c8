"""The backends: one file each, named as its YAML key.  Import as ``surgeon.backends``."""

if __name__ != "surgeon.backends":
    raise ImportError(f"import this package as 'surgeon.backends', not as {__name__!r}")
