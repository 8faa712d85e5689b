"""MLflow: parameters, metrics and files of runs, where ``MLFLOW_TRACKING_URI`` is set.

Imports ``allocate``, ``runs`` and below; MLflow inside functions only, and never where the variable
is unset. A tracking server is never worth a scan: whatever goes wrong with it is one warning.
"""
