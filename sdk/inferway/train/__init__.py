"""Training, locally and over several processes or machines, of models that are deployed afterwards.

What is public is named in `inferway`. Frameworks and Ray are imported where they are used, and never before.
"""
