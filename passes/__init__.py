"""The passes: one file each, named as its YAML key.  Import as ``surgeon.passes``."""

if __name__ != "surgeon.passes":
    raise ImportError(f"import this package as 'surgeon.passes', not as {__name__!r}")
