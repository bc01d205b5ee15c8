"""The rules by which structure is found; :func:`surgeon.discover.discover` applies them in order.

Nothing here looks at the name of a parameter, module or class: only operators, edges, shapes and numeric evaluation.
"""
