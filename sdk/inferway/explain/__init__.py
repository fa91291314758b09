"""What the predictions of a deployed model rest on: Shapley values over the remote model.

The model is asked as any caller asks it, in many requests at once, which the gateway puts together in batches; nothing
of it has to be here. The sampling is shap's (``pip install 'inferway[explain]'``).
"""
