"""Job files, sweeps, and jobs on a Ray cluster.

Imports ``scan``, ``solve``, ``allocate``, ``config``, ``runs`` and below; Ray only to talk to a
cluster.

Ray's job client prefers ``RAY_ADDRESS`` to the address that it is given (``server`` hides it). Its
``py_modules`` lets pip install a wheel's dependencies, so ``package`` unpacks the wheel. Ray
keeps watching a job by its id for up to 2 s after its end and would fail a new job with the same
id, so ``cluster`` waits.
"""
