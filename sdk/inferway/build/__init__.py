"""From a model of any framework to a folder that a gateway serves: export, verify, optimise, package.

What is public is named in `inferway`. Frameworks are imported where a model of theirs came, and never before.
"""
